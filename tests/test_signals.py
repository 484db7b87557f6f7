"""Signal receivers: what comes out, in what order, and what is left of the handlers. Signals are real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import kernel
from kernel import Cancelled, open_signal_receiver
from kernel.core.task import current_kernel
from kernel.signals import SignalReceiver
from kernel.testing import wait_all_tasks_blocked

ONE, TWO, THREE = signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP
ROOT = Path(__file__).parent.parent
LONG = 20 if os.environ.get("KERNEL_TEST_LONG") else 1


def send(number: int) -> None:
    """To ourselves, the whole way through the system."""
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def log() -> Iterator[list[int]]:
    """The handlers from before log what comes to them, and are there again after each test."""
    came: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, handle) for number in (ONE, TWO, THREE)}
    interrupt = signal.getsignal(signal.SIGINT)
    yield came
    assert all(signal.getsignal(number) is handle for number in before), "a handler was not restored"
    assert signal.getsignal(signal.SIGINT) is interrupt
    for number, handler in before.items():
        signal.signal(number, handler)


async def take(receiver: SignalReceiver, count: int) -> list[int]:
    return [await anext(receiver) for _ in range(count)]


async def take_into(receiver: SignalReceiver, who: str, got: list[Any]) -> None:
    try:
        got.append((who, await anext(receiver)))
    except (RuntimeError, Cancelled) as error:
        got.append((who, type(error).__name__))
        raise


# ---- what comes out ------------------------------------------------------------------------------------


def test_signals_come_out_in_the_order_in_which_they_came(log: list[int]) -> None:
    async def main() -> list[int]:
        with open_signal_receiver(ONE, TWO, THREE) as receiver:
            for number in (TWO, THREE, ONE):
                send(number)
            return await take(receiver, 3)

    assert kernel.run(main) == [TWO, THREE, ONE]
    assert log == []


def test_a_signal_that_comes_again_before_it_was_taken_counts_once_and_keeps_its_place(log: list[int]) -> None:
    async def main() -> None:
        with open_signal_receiver(ONE, TWO) as receiver:
            for number in (ONE, TWO, ONE, TWO, ONE):
                send(number)
            assert await take(receiver, 2) == [ONE, TWO]
            send(ONE)  # now it is a new one
            assert await take(receiver, 1) == [ONE]
            with kernel.CancelScope() as scope:
                scope.cancel()
                await anext(receiver)
            assert scope.cancelled_caught

    kernel.run(main)
    assert log == []


def test_a_signal_given_twice_is_received_once_and_its_handler_comes_back(log: list[int]) -> None:
    async def main() -> None:
        with open_signal_receiver(ONE, ONE) as receiver:
            send(ONE)
            assert await take(receiver, 1) == [ONE]
        send(ONE)

    kernel.run(main)
    assert log == [ONE]


def test_thousands_of_signals_while_the_loop_is_busy_are_neither_lost_nor_piled_up(log: list[int]) -> None:
    """More than the pipe behind `signal.set_wakeup_fd` holds."""

    async def main() -> None:
        task_kernel = current_kernel("the test")
        with open_signal_receiver(ONE, TWO) as receiver:
            for _ in range(70_000 * LONG):
                signal.raise_signal(ONE)
            signal.raise_signal(TWO)
            assert len(task_kernel.soon) <= 2
            assert await take(receiver, 2) == [ONE, TWO]
            send(ONE)
            assert await take(receiver, 1) == [ONE]

    kernel.run(main)
    assert log == []


def test_a_signal_wakes_a_loop_that_sleeps() -> None:
    async def main() -> list[int]:
        with open_signal_receiver(ONE) as receiver:
            subprocess.Popen(["sh", "-c", f"kill -USR1 {os.getpid()}"]).wait()  # it comes once `wait` is over
            got = await take(receiver, 1)
            child = subprocess.Popen(["sh", "-c", f"read x; kill -USR1 {os.getpid()}"], stdin=subprocess.PIPE)
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(take_into, receiver, "sleeper", got)
                await wait_all_tasks_blocked()
                assert child.stdin is not None
                child.stdin.close()  # the shell goes on now, and we sleep without a timeout
            await kernel.to_thread.run_sync(child.wait)
            return got

    assert kernel.run(main) == [ONE, ("sleeper", ONE)]


def test_a_signal_just_before_the_poll_is_not_slept_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes after the loop has decided to sleep and before the system call."""

    async def main() -> list[int]:
        loop = current_kernel("the test")
        poll = loop.poller.poll

        def late(timeout: float) -> Any:
            if timeout > 1:
                monkeypatch.undo()
                send(ONE)
            return poll(timeout)

        with open_signal_receiver(ONE) as receiver:
            monkeypatch.setattr(loop.poller, "poll", late)
            return await take(receiver, 1)

    assert kernel.run(main) == [ONE]


def test_a_signal_between_looking_and_falling_asleep_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    arm = SignalReceiver.arm

    def late(self: SignalReceiver, *args: Any) -> None:
        send(ONE)
        arm(self, *args)

    monkeypatch.setattr(SignalReceiver, "arm", late)

    async def main() -> list[int]:
        with open_signal_receiver(ONE) as receiver:
            return await take(receiver, 1)

    assert kernel.run(main) == [ONE]


def test_real_signals_from_a_child_process_come_while_tasks_work(log: list[int]) -> None:
    script = f"for i in 1 2 3 4 5; do kill -USR1 {os.getpid()}; kill -USR2 {os.getpid()}; done"

    async def main() -> set[int]:
        got: set[int] = set()
        with open_signal_receiver(ONE, TWO) as receiver:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(kernel.run_process, ["sh", "-c", script])
                while len(got) < 2:
                    got.add(await anext(receiver))
            return got

    assert kernel.run(main) == {ONE, TWO}
    assert set(log) <= {ONE, TWO}  # what came and was not taken


# ---- who gets it ---------------------------------------------------------------------------------------


def test_several_tasks_may_wait_and_each_signal_goes_to_the_first_of_them() -> None:
    got: list[Any] = []

    async def main() -> None:
        with open_signal_receiver(ONE, TWO) as receiver:
            async with kernel.open_nursery() as nursery:
                for who in "abc":
                    nursery.start_soon(take_into, receiver, who, got)
                    await wait_all_tasks_blocked()
                send(ONE)
                await wait_all_tasks_blocked()
                assert got == [("a", ONE)]
                send(TWO)
                send(ONE)
        assert repr(receiver) == "<SignalReceiver for SIGUSR1, SIGUSR2, closed>"

    kernel.run(main)
    assert got == [("a", ONE), ("b", TWO), ("c", ONE)]


def test_who_comes_later_does_not_take_the_signal_of_one_who_waits() -> None:
    got: list[Any] = []

    async def main() -> None:
        with open_signal_receiver(ONE, TWO) as receiver:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(take_into, receiver, "first", got)
                await wait_all_tasks_blocked()
                send(ONE)  # noted, and not handed over yet
                send(TWO)
                await take_into(receiver, "second", got)

    kernel.run(main)
    assert got == [("first", ONE), ("second", TWO)]


def test_a_cancelled_waiter_loses_no_signal() -> None:
    got: list[Any] = []

    async def main() -> None:
        with open_signal_receiver(ONE) as receiver:
            async with kernel.open_nursery() as nursery:
                with kernel.CancelScope() as scope:
                    nursery.start_soon(cancelled_first, receiver, scope)
                    await wait_all_tasks_blocked()
                nursery.start_soon(take_into, receiver, "second", got)
                await wait_all_tasks_blocked()
                scope_of_first.cancel()
                send(ONE)

    scope_of_first = kernel.CancelScope()

    async def cancelled_first(receiver: SignalReceiver, _: object) -> None:
        with scope_of_first:
            await take_into(receiver, "first", got)

    kernel.run(main)
    assert got == [("first", "Cancelled"), ("second", ONE)]


def test_a_signal_and_a_cancellation_at_once_the_one_handed_over_is_kept() -> None:
    """Woken before it was cancelled: it has the signal. Cancelled before: the next one has it."""
    got: list[Any] = []

    async def main() -> None:
        with open_signal_receiver(ONE) as receiver:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(take_into, receiver, "a", got)
                await wait_all_tasks_blocked()
                send(ONE)
                receiver._hand_over()  # as at the end of the pass
                nursery.cancel_scope.cancel()
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(take_into, receiver, "b", got)
                await wait_all_tasks_blocked()
                send(ONE)
                nursery.cancel_scope.cancel()
            assert await take(receiver, 1) == [ONE]

    kernel.run(main)
    assert got == [("a", ONE), ("b", "Cancelled")]


def test_receiving_in_a_cancelled_scope_takes_nothing() -> None:
    async def main() -> None:
        with open_signal_receiver(ONE) as receiver:
            send(ONE)
            with kernel.CancelScope() as scope:
                scope.cancel()
                await anext(receiver)
            assert scope.cancelled_caught
            assert await take(receiver, 1) == [ONE]

    kernel.run(main)


def test_generator_style_works() -> None:
    def main() -> Any:
        with open_signal_receiver(ONE) as receiver:
            send(ONE)
            return (yield from receiver.__anext__())

    assert kernel.run(main) == ONE


def test_a_task_that_only_takes_signals_lets_the_others_run() -> None:
    turns = 0

    async def main() -> None:
        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await kernel.lowlevel.checkpoint()

        with open_signal_receiver(ONE) as receiver:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(other)
                for _ in range(1000):
                    send(ONE)
                    await anext(receiver)
                nursery.cancel_scope.cancel()

    kernel.run(main)
    assert turns >= 5


# ---- the end of the block ------------------------------------------------------------------------------


def test_what_was_not_taken_meets_the_handlers_from_before_in_order(log: list[int]) -> None:
    async def main() -> None:
        with open_signal_receiver(ONE, TWO, THREE) as receiver:
            for number in (THREE, ONE, TWO):
                send(number)
            assert await take(receiver, 1) == [THREE]
            assert log == []
        assert log == [ONE, TWO]
        send(THREE)
        assert log == [ONE, TWO, THREE]

    kernel.run(main)


def test_a_signal_in_the_last_step_of_the_block_is_raised_again(log: list[int]) -> None:
    async def main() -> None:
        await kernel.lowlevel.checkpoint()
        with open_signal_receiver(ONE):
            send(ONE)
        assert log == [ONE]
        await kernel.lowlevel.checkpoint()

    kernel.run(main)
    assert log == [ONE]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_ignoring_and_the_default_come_back_too(handler: Any) -> None:
    before = signal.signal(signal.SIGWINCH, handler)  # whose default does nothing
    try:

        async def main() -> None:
            with open_signal_receiver(signal.SIGWINCH) as receiver:
                send(signal.SIGWINCH)
                assert await take(receiver, 1) == [signal.SIGWINCH]
                send(signal.SIGWINCH)
            assert signal.getsignal(signal.SIGWINCH) is handler

        kernel.run(main)
    finally:
        signal.signal(signal.SIGWINCH, before)


def test_a_handler_that_is_not_pythons_gives_way_to_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """`signal.signal` returns None for it, and does not take None."""
    real = signal.signal
    before = real(signal.SIGWINCH, signal.SIG_IGN)

    async def main() -> None:
        monkeypatch.setattr(signal, "signal", lambda *args: (real(*args), None)[1])
        with open_signal_receiver(signal.SIGWINCH):
            monkeypatch.undo()
        assert signal.getsignal(signal.SIGWINCH) is signal.SIG_DFL

    try:
        kernel.run(main)
    finally:
        real(signal.SIGWINCH, before)


@pytest.mark.parametrize("how", ["error", "cancelled", "interrupt"])
def test_handlers_come_back_however_the_block_ends(how: str, log: list[int]) -> None:
    async def main() -> None:
        with kernel.CancelScope() as scope, open_signal_receiver(ONE, TWO):
            send(TWO)
            if how == "error":
                raise LookupError
            if how == "interrupt":
                raise KeyboardInterrupt
            scope.cancel()
            await kernel.sleep_forever()

    expected = {"error": LookupError, "interrupt": KeyboardInterrupt}
    if how in expected:
        with pytest.raises(expected[how]):
            kernel.run(main)
    else:
        kernel.run(main)
    assert log == [TWO]  # and the fixture looks at the handlers


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_handlers_come_back_when_the_run_breaks_off(log: list[int]) -> None:
    def breaks_it() -> None:
        raise LookupError

    async def main() -> None:
        with open_signal_receiver(ONE, TWO) as receiver:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(anext, receiver)
                await wait_all_tasks_blocked()
                send(TWO)
                kernel.lowlevel.current_kernel_token().run_sync_soon(breaks_it)
                await anext(receiver)
                await kernel.sleep_forever()

    with pytest.raises(kernel.KernelInternalError):
        kernel.run(main)
    assert signal.getsignal(ONE).__qualname__.startswith("log.")  # type: ignore[union-attr]


def test_a_receiver_that_was_left_behind_by_a_broken_run_gives_way_at_the_first_signal(log: list[int]) -> None:
    """Its coroutine is alive still, as an error's traceback may keep it."""
    kept: list[Any] = []
    crash = kernel.KernelInternalError("the disk is full")

    class Bad(kernel.lowlevel.Trap):
        def arm(self, kernel: Any, task: Any) -> None:
            kernel.poller.poll = self.fail

        def fail(self, timeout: float) -> Any:
            raise crash

        def abort(self, kernel: Any, task: Any) -> bool:
            return True

    async def main() -> None:
        kept.append(kernel.lowlevel.current_task().coro)
        with open_signal_receiver(ONE, TWO) as receiver:
            kept.append(receiver)
            send(ONE)
            await Bad()

    with pytest.raises(kernel.KernelInternalError):
        kernel.run(main)
    coro, receiver = kept
    try:
        assert log == []
        send(TWO)
        assert log == [TWO]  # at once, as nobody would take it
        assert signal.getsignal(ONE) == receiver._handle
    finally:
        coro.close()
    assert log == [TWO, ONE]


def test_each_untaken_signal_is_raised_though_a_handler_raises(log: list[int]) -> None:
    def fails(number: int, frame: FrameType | None) -> None:
        raise LookupError(number)

    async def main() -> None:
        before = signal.signal(ONE, fails)
        try:
            with pytest.raises(LookupError), open_signal_receiver(ONE, TWO, THREE):
                for number in (ONE, TWO, THREE):
                    send(number)
        finally:
            signal.signal(ONE, before)

    kernel.run(main)
    assert log == [TWO, THREE]


def test_a_handler_that_the_program_installs_meanwhile_stays(log: list[int]) -> None:
    def theirs(number: int, frame: FrameType | None) -> None:
        log.append(-number)

    async def main() -> None:
        before = signal.getsignal(ONE)
        with open_signal_receiver(ONE):
            send(ONE)
            ours = signal.signal(ONE, theirs)
        assert log == [-ONE]  # what was not taken meets it
        assert signal.getsignal(ONE) is theirs
        signal.signal(ONE, ours)  # they thought that they could put ours back
        send(ONE)
        assert log == [-ONE, ONE]
        assert signal.getsignal(ONE) is before

    kernel.run(main)


def test_a_closed_receivers_handler_called_by_another_one_does_nothing(log: list[int]) -> None:
    async def main() -> None:
        before = signal.getsignal(ONE)

        def chained(number: int, frame: FrameType | None) -> None:
            log.append(-number)
            assert callable(ours)
            ours(number, frame)

        with open_signal_receiver(ONE):
            ours = signal.signal(ONE, chained)
        send(ONE)
        assert log == [-ONE]
        signal.signal(ONE, before)

    kernel.run(main)


def test_the_end_of_the_block_wakes_who_still_waits() -> None:
    got: list[Any] = []

    async def waits(receiver: SignalReceiver) -> None:
        with pytest.raises(RuntimeError, match="its `with` block has ended"):
            await take_into(receiver, "waiter", got)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            with open_signal_receiver(ONE) as receiver:
                nursery.start_soon(waits, receiver)
                await wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="closed"):
            await anext(receiver)

    kernel.run(main)
    assert got == [("waiter", "RuntimeError")]


def test_a_signal_handed_over_in_the_last_pass_is_taken_though_the_block_has_ended(log: list[int]) -> None:
    got: list[Any] = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            with open_signal_receiver(ONE) as receiver:
                nursery.start_soon(take_into, receiver, "waiter", got)
                await wait_all_tasks_blocked()
                send(ONE)
                receiver._hand_over()  # as at the end of the pass

    kernel.run(main)
    assert got == [("waiter", ONE)]
    assert log == []


# ---- several receivers ---------------------------------------------------------------------------------


def test_of_nested_receivers_the_inner_one_gets_the_signal_and_the_outer_one_what_it_leaves(log: list[int]) -> None:
    async def main() -> None:
        with open_signal_receiver(ONE) as outer:
            with open_signal_receiver(ONE, TWO) as inner:
                send(ONE)
                assert await take(inner, 1) == [ONE]
                send(ONE)
                send(TWO)
            assert log == [TWO]
            assert await take(outer, 1) == [ONE]
            send(ONE)
            assert await take(outer, 1) == [ONE]

    kernel.run(main)
    assert log == [TWO]


def test_overlapping_receivers_may_be_closed_in_any_order(log: list[int]) -> None:
    """Two services, say, each with its own. Then what was "before" the second one is gone when it ends."""

    async def main() -> None:
        first, second, third = (open_signal_receiver(ONE) for _ in range(3))
        first.__enter__()
        receiver = second.__enter__()
        third.__enter__()
        first.__exit__(None, None, None)
        third.__exit__(None, None, None)
        send(ONE)
        assert await take(receiver, 1) == [ONE]
        second.__exit__(None, None, None)
        assert signal.getsignal(ONE) is before
        send(ONE)

    before = signal.getsignal(ONE)
    kernel.run(main)
    assert log == [ONE]


def test_one_kernel_after_another_receives_signals(log: list[int]) -> None:
    async def main() -> list[int]:
        with open_signal_receiver(ONE) as receiver:
            send(ONE)
            got = await take(receiver, 1)
            send(ONE)
            return got

    with kernel.Kernel() as k:
        assert k.run(main) == [ONE]
        assert k.run(main) == [ONE]
    assert log == [ONE, ONE]


# ---- SIGINT --------------------------------------------------------------------------------------------


def test_ctrl_c_is_a_signal_in_the_block_and_an_interrupt_after_it() -> None:
    got: list[Any] = []

    async def main() -> None:
        with open_signal_receiver(signal.SIGINT) as receiver:
            send(signal.SIGINT)
            got.extend(await take(receiver, 1))
        got.append("after")
        send(signal.SIGINT)
        got.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)
    assert got == [signal.SIGINT, "after"]


def test_a_ctrl_c_that_was_not_taken_interrupts_when_the_block_ends() -> None:
    got: list[Any] = []

    async def main() -> None:
        with open_signal_receiver(signal.SIGINT):
            send(signal.SIGINT)
            await kernel.lowlevel.checkpoint()
            got.append("in the block")
        await kernel.lowlevel.checkpoint()
        got.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)
    assert got == ["in the block"]


# ---- errors, which change nothing ----------------------------------------------------------------------


def _open(*signals: Any) -> None:
    with open_signal_receiver(*signals):
        raise AssertionError("it was opened")


@pytest.mark.parametrize(
    ("signals", "error"),
    [
        ((), TypeError),
        (("SIGTERM",), TypeError),
        ((ONE, 100_000), ValueError),
        ((ONE, TWO, signal.SIGKILL), OSError),
        ((ONE, -1), ValueError),
    ],
)
def test_what_is_no_signal_to_receive_is_refused_and_changes_nothing(
    signals: tuple[Any, ...], error: type[Exception], log: list[int]
) -> None:
    async def main() -> None:
        with pytest.raises(error):
            _open(*signals)
        send(ONE)

    kernel.run(main)
    assert log == [ONE]


def test_outside_a_kernel_it_is_refused() -> None:
    with pytest.raises(RuntimeError, match="open_signal_receiver"):
        _open(ONE)


def test_in_another_thread_it_is_refused() -> None:
    errors: list[str] = []

    async def main() -> None:
        with pytest.raises(RuntimeError) as caught:
            _open(ONE)
        errors.append(str(caught.value))

    thread = threading.Thread(target=kernel.run, args=(main,))
    thread.start()
    thread.join()
    assert "main thread only" in errors[0]


def test_a_receiver_shows_its_signals_and_those_without_a_name_too() -> None:
    nameless = signal.SIGRTMIN + 1

    async def main() -> None:
        with open_signal_receiver(ONE, nameless) as receiver:
            assert repr(receiver) == f"<SignalReceiver for SIGUSR1, {nameless}, 0 to be taken>"
            send(nameless)
            assert repr(receiver).endswith(", 1 to be taken>")
            assert await take(receiver, 1) == [nameless]

    kernel.run(main)


# ---- with the rest -------------------------------------------------------------------------------------


def _slow_stuck(k: Any) -> Callable[[], float]:
    """Lets the loop say that it is stuck, and sends a signal in place of sleeping."""
    stuck: Callable[[], float] = k.stuck

    def then_send() -> float:
        seconds = stuck()
        assert seconds == float("inf"), "while a signal may come there is no deadlock"
        send(ONE)
        return seconds

    return then_send


def test_no_deadlock_is_reported_while_a_receiver_is_open_and_one_is_after_it() -> None:
    got: list[int] = []

    async def main() -> None:
        before = {number: signal.signal(number, signal.SIG_DFL) for number in (ONE, TWO, THREE)}
        try:
            with open_signal_receiver(ONE) as receiver:
                k = current_kernel("the test")
                stuck = k.stuck
                k.stuck = _slow_stuck(k)
                got.extend(await take(receiver, 1))
                k.stuck = stuck
            await kernel.Event().wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    with pytest.raises(kernel.Deadlock):
        kernel.run(main)
    assert got == [ONE]


def test_a_waiting_task_says_what_it_waits_for() -> None:
    async def main() -> None:
        with open_signal_receiver(ONE) as receiver:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(anext, receiver)
                await wait_all_tasks_blocked()
                assert "<SignalReceiver for SIGUSR1, 0 to be taken>" in kernel.lowlevel.format_task_tree()
                nursery.cancel_scope.cancel()

    kernel.run(main)


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import kernel, os, signal\n" + textwrap.dedent(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)


def test_an_untaken_sigterm_ends_the_process_as_it_would_have() -> None:
    done = run_script("""
        async def main():
            with kernel.open_signal_receiver(signal.SIGTERM):
                os.kill(os.getpid(), signal.SIGTERM)
                await kernel.lowlevel.checkpoint()
                print("still here", flush=True)
            print("not reached", flush=True)

        kernel.run(main)
    """)
    assert (done.stdout, done.returncode) == ("still here\n", -signal.SIGTERM), done.stderr


def test_a_forked_child_can_be_ended_with_a_signal_that_the_parent_receives() -> None:
    done = run_script("""
        async def main():
            with kernel.open_signal_receiver(signal.SIGTERM) as receiver:
                child = os.fork()
                if child == 0:
                    try:
                        os.kill(os.getpid(), signal.SIGTERM)
                        print("the child is still here", flush=True)
                    finally:
                        os._exit(0)
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
                print(await anext(receiver))

        kernel.run(main)
    """)
    assert (done.stdout, done.returncode) == (f"{-signal.SIGTERM}\n{int(signal.SIGTERM)}\n", 0), done.stderr
