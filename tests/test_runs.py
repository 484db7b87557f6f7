"""One kernel for many runs, kernels in many threads, and what happens when one is started inside another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator
from queue import SimpleQueue
from typing import Any

import pytest

import kernel
from kernel import Deadlock, Kernel, KernelInternalError
from kernel.abc import Instrument
from kernel.core.task import here
from kernel.lowlevel import (
    KernelToken,
    RunVar,
    checkpoint,
    current_kernel,
    current_kernel_token,
    current_root_task,
    current_task,
    spawn_system_task,
)
from kernel.testing import MockClock, wait_all_tasks_blocked

var: RunVar[str] = RunVar("var", default="fresh")


async def result(value: Any = "result") -> Any:
    await checkpoint()
    return value


async def failing(error: BaseException) -> None:
    await checkpoint()
    raise error


async def stuck() -> None:
    await kernel.Event().wait()


async def crash() -> None:
    """A driver breaks."""
    current_kernel().poller.poll = lambda timeout: 1 // 0  # type: ignore[assignment, method-assign, return-value]
    await kernel.sleep_forever()


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()


class Counting(Instrument):
    def __init__(self) -> None:
        self.log: list[str] = []

    def before_run(self) -> None:
        self.log.append("before")

    def after_run(self) -> None:
        self.log.append("after")


# ---- one after the other -----------------------------------------------------------------------------


def test_a_kernel_serves_one_run_after_the_other_with_arguments_and_results() -> None:
    with Kernel() as one:
        assert [one.run(result, number) for number in range(3)] == [0, 1, 2]


def test_clock_poller_ready_queue_and_instruments_stay() -> None:
    async def main() -> tuple[Any, ...]:
        running = current_kernel()
        await kernel.sleep(10)
        return running, running.clock, running.timers, running.poller, running.ready

    instrument, clock = Counting(), MockClock(autojump_threshold=0)
    with Kernel(clock=clock, instruments=[instrument]) as one:
        assert one.run(main) == one.run(main) == (one, clock, one.timers, one.poller, one.ready)
        assert clock.current_time() == 20  # one clock, which goes on
    assert instrument.log == ["before", "after"] * 2


def test_tasks_tokens_and_run_variables_belong_to_one_run() -> None:
    async def main() -> tuple[str, KernelToken, Any, Any]:
        found = var.get()
        var.set("changed")
        return found, current_kernel_token(), current_task(), current_root_task()

    with Kernel() as one:
        first, second = one.run(main), one.run(main)
    assert first[0] == second[0] == "fresh"
    for mine, theirs in zip(first[1:], second[1:], strict=True):
        assert mine is not theirs


def test_between_two_runs_nothing_is_left_of_the_first() -> None:
    async def main() -> None:
        spawn_system_task(kernel.sleep_forever)
        var.set("changed")
        current_kernel_token()
        with kernel.move_on_after(1000):
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(result)

    with Kernel() as one:
        one.run(main)
        assert not one.running
        assert here.kernel is None
        assert one.locals == {}
        assert len(one.timers) == len(one.poller) == len(one.ready) == len(one.soon) == 0
        assert one.root_task is one.main_task is one.system_nursery is one.main_nursery is one.current is None
        assert one.farewells == one.idle_waiters == {}


@pytest.mark.parametrize(
    "error", [KeyError("a"), KeyboardInterrupt(), SystemExit(3)], ids=lambda error: type(error).__name__
)
def test_after_a_run_that_failed_the_kernel_is_as_good_as_new(error: BaseException) -> None:
    with Kernel() as one:
        for _ in range(2):
            with pytest.raises(type(error)):
                one.run(failing, error)
            assert one.run(result) == "result"


def test_after_a_deadlock_the_kernel_is_as_good_as_new() -> None:
    with Kernel() as one:
        for _ in range(2):
            with pytest.raises(Deadlock):
                one.run(stuck)
            assert one.run(result) == "result"


def test_after_a_ctrl_c_that_found_the_kernel_asleep_it_is_as_good_as_new() -> None:
    async def main() -> None:
        await wait_all_tasks_blocked()
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        await kernel.sleep_forever()

    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with Kernel() as one:
            for _ in range(3):
                with pytest.raises(KeyboardInterrupt):
                    one.run(main)
                assert one.run(result) == "result"
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGALRM, before)


def test_after_a_main_that_is_no_async_function_the_kernel_is_as_good_as_new() -> None:
    instrument = Counting()
    with Kernel(instruments=[instrument]) as one:
        with pytest.raises(TypeError, match=r"kernel\.run wants an async function"):
            one.run(42)  # type: ignore[arg-type]
        assert not one.running
        assert one.run(result) == "result"
    assert instrument.log == ["before", "after"] * 2


def test_after_a_run_that_broke_off_the_kernel_refuses_and_says_why() -> None:
    with Kernel() as one:
        with pytest.raises(KernelInternalError):
            one.run(crash)
        with pytest.raises(RuntimeError, match=r"cannot run any more: its last run broke off.*Make another one"):
            one.run(result)
        assert here.kernel is None
    assert kernel.run(result) == "result"


def test_if_a_run_cannot_begin_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor is left for the pipe that signals are reported through."""
    hooks = sys.get_asyncgen_hooks()
    with Kernel() as one:

        def no_more_files() -> int:
            raise OSError("Too many open files")

        monkeypatch.setattr(one.poller, "signal_fd", no_more_files, raising=False)
        with pytest.raises(OSError, match="Too many open files"):
            one.run(result)
        assert here.kernel is None
        assert not one.running
        assert sys.get_asyncgen_hooks() == hooks
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        monkeypatch.undo()
        assert one.run(result) == "result"


def test_async_generators_of_one_run_are_closed_at_its_end_and_not_in_the_next() -> None:
    log: list[str] = []
    kept: list[AsyncGenerator[int, None]] = []

    async def numbers() -> AsyncGenerator[int, None]:
        try:
            yield 1
        finally:
            log.append(f"closed, {var.get()}")

    async def main() -> None:
        kept.append(numbers())
        await kept[0].__anext__()
        var.set("in the first run")

    with Kernel() as one:
        one.run(main)
        assert log == ["closed, in the first run"]
        one.run(result)
    assert len(log) == 1


def test_a_hundred_runs_of_one_kernel_open_nothing_more() -> None:
    with Kernel() as one:
        one.run(result)
        before = open_fds()
        for _ in range(100):
            one.run(result)
        assert open_fds() == before


# ---- closing -----------------------------------------------------------------------------------------


def test_a_kernel_gives_its_files_back_when_it_is_closed() -> None:
    before = open_fds()
    with Kernel() as one:
        one.run(result)
        if sys.platform == "linux":
            assert open_fds() > before
    assert open_fds() == before


def test_a_kernel_may_be_closed_twice_and_unused() -> None:
    before = open_fds()
    one = Kernel()
    one.close()
    one.close()
    with one:
        pass
    assert open_fds() == before


def test_a_kernel_that_is_closed_refuses_to_run() -> None:
    with Kernel() as one:
        pass
    with pytest.raises(RuntimeError, match=r"cannot run any more: it is closed\. Make another one"):
        one.run(result)
    assert here.kernel is None


def test_a_kernel_cannot_be_closed_while_it_runs() -> None:
    async def main() -> str:
        with pytest.raises(RuntimeError, match=r"cannot be closed while it runs"):
            one.close()
        await wait_all_tasks_blocked()
        return "went on"

    with Kernel() as one:
        assert one.run(main) == "went on"


# ---- one inside another ------------------------------------------------------------------------------


def test_a_run_inside_a_run_is_an_error_and_the_outer_run_goes_on_undisturbed() -> None:
    async def main() -> str:
        token, hooks = current_kernel_token(), sys.get_asyncgen_hooks()
        handler = signal.getsignal(signal.SIGINT)
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        other = Kernel()
        with other, pytest.raises(RuntimeError, match="called from inside a kernel that is running"):
            other.run(result)
        with pytest.raises(RuntimeError, match="called from inside a kernel that is running"):
            kernel.run(result)
        with pytest.raises(RuntimeError, match="this kernel is running already"):
            one.run(result)
        assert current_kernel() is one
        assert current_kernel_token() is token
        assert sys.get_asyncgen_hooks() == hooks
        assert signal.getsignal(signal.SIGINT) == handler != signal.default_int_handler
        assert signal.set_wakeup_fd(wakeup) == wakeup != -1
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(result)
        await kernel.sleep(0.001)
        return "went on"

    with Kernel() as one:
        assert one.run(main) == "went on"
        assert one.run(result) == "result"


def test_a_ctrl_c_still_reaches_a_run_that_has_refused_another() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError):
            one.run(result)
        signal.raise_signal(signal.SIGINT)
        await wait_all_tasks_blocked()

    with Kernel(restrict_keyboard_interrupt_to_checkpoints=True) as one, pytest.raises(KeyboardInterrupt):
        one.run(main)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_kernel_that_runs_in_one_thread_is_refused_in_another() -> None:
    errors: list[str] = []

    async def main() -> str:
        def thread() -> None:
            try:
                one.run(result)
            except RuntimeError as error:
                errors.append(str(error))

        worker = threading.Thread(target=thread)
        worker.start()
        worker.join(60)
        await wait_all_tasks_blocked()
        return "went on"

    with Kernel() as one:
        assert one.run(main) == "went on"
    assert "running already" in errors[0]


# ---- in threads --------------------------------------------------------------------------------------


def test_a_kernel_may_be_used_in_one_thread_after_the_other() -> None:
    results: SimpleQueue[Any] = SimpleQueue()
    with Kernel() as one:
        for number in range(3):
            worker = threading.Thread(target=lambda number=number: results.put(one.run(result, number)))  # type: ignore[misc]
            worker.start()
            worker.join(60)
        assert [results.get(timeout=60) for _ in range(3)] == [0, 1, 2]
        assert one.run(result, "mine") == "mine"


def test_kernels_in_several_threads_know_nothing_of_one_another() -> None:
    """Each has its events, timers, inbox and files; and they are all under way at the same time."""
    threads = 8
    barrier = threading.Barrier(threads)
    tokens: SimpleQueue[KernelToken] = SimpleQueue()
    results: SimpleQueue[tuple[int, int]] = SimpleQueue()

    async def main(number: int) -> None:
        running, got = current_kernel(), []
        tokens.put(current_kernel_token())
        barrier.wait(60)
        send, receive = kernel.open_memory_channel[int](0)

        async def producer() -> None:
            async with send:
                for item in range(100):
                    await send.send(number * 1000 + item)
                    if item % 10 == 0:
                        await kernel.sleep(0.0001)

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(producer)
            async for item in receive:
                got.append(item)
                assert current_kernel() is running
        assert got == [number * 1000 + item for item in range(100)]
        results.put((number, len(got)))

    workers = [threading.Thread(target=kernel.run, args=(main, number)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sorted(results.get(timeout=60) for _ in workers) == [(number, 100) for number in range(threads)]
    assert len({tokens.get() for _ in workers}) == threads


def test_two_kernels_call_each_other_through_their_tokens() -> None:
    """A ball goes to and fro between two threads a thousand times, over nothing but the two inboxes."""
    table: dict[str, Any] = {}
    ready = threading.Barrier(2)
    bounces = {"left": 0, "right": 0}

    async def player(side: str, other: str) -> None:
        event = kernel.Event()
        table[side] = current_kernel_token(), lambda: table[f"{side} event"].set()
        table[f"{side} event"] = event
        ready.wait(60)
        token, throw = table[other]
        for turn in range(500):
            if side == "right" or turn > 0:
                await table[f"{side} event"].wait()
            table[f"{side} event"] = kernel.Event()
            bounces[side] += 1
            if not (side == "right" and turn == 499):
                token.run_sync_soon(throw)

    workers = [
        threading.Thread(target=kernel.run, args=(player, *sides)) for sides in (("left", "right"), ("right", "left"))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert bounces == {"left": 500, "right": 500}


FIRST_USE = """
import sys, threading

sys.setswitchinterval(1e-6)
barrier, results = threading.Barrier(8), []

def thread(number):
    barrier.wait(60)
    import kernel

    async def main():
        await kernel.sleep(0.001)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(kernel.lowlevel.checkpoint)
        kernel.lowlevel.current_kernel_token().run_sync_soon(results.append, number)

    kernel.run(main)

threads = [threading.Thread(target=thread, args=(number,)) for number in range(8)]
for one in threads:
    one.start()
for one in threads:
    one.join(60)
print(sorted(results))
"""


def test_kernels_whose_first_use_is_at_the_same_moment_in_many_threads() -> None:
    """Even the import: nobody has imported the package before."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FIRST_USE], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("[0, 1, 2, 3, 4, 5, 6, 7]\n", "")


def test_a_kernel_in_another_thread_leaves_the_signals_alone() -> None:
    seen: list[Any] = []

    async def main() -> None:
        seen.append(signal.getsignal(signal.SIGINT))
        seen.append(open_fds())

    before = open_fds()
    worker = threading.Thread(target=kernel.run, args=(main,))
    worker.start()
    worker.join(60)
    assert seen[0] is signal.default_int_handler
    if sys.platform == "linux":
        assert len(seen[1] - before) == 2  # the epoll and the eventfd, and no pipe for signals
