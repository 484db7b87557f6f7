"""The inbox: calls from threads, signal handlers and finalizers; system tasks; what belongs to a run."""

from __future__ import annotations

import contextvars
import gc
import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest

import kernel
from kernel import Kernel, KernelInternalError, RunFinishedError
from kernel.abc import Instrument
from kernel.drivers.clock import MonotonicClock
from kernel.drivers.poller import default_poller
from kernel.lowlevel import (
    KernelToken,
    RunVar,
    Task,
    cancel_shielded_checkpoint,
    checkpoint,
    current_kernel,
    current_kernel_token,
    current_root_task,
    current_task,
    currently_ki_protected,
    in_kernel_run,
    in_kernel_task,
    spawn_system_task,
)
from kernel.testing import wait_all_tasks_blocked

LONG = 20 if os.environ.get("KERNEL_TEST_LONG") else 1


@pytest.fixture
def log() -> list[Any]:
    return []


@pytest.fixture
def hasty() -> Iterator[None]:
    """Let threads take turns every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_thread(function: Callable[[], object]) -> None:
    """Call `function` in a thread and wait until it is done."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


class WatchedPoller:
    """Counts the wake-ups. While `gate` is closed, a poll that has slept does not return, so that the loop takes no
    notice of what goes on; `asleep` is set when it begins to sleep.
    """

    def __init__(self) -> None:
        self.inner = default_poller()
        self.wakeups = 0
        self.asleep = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def wakeup(self) -> None:
        self.wakeups += 1
        self.inner.wakeup()

    def poll(self, timeout: float) -> Any:
        if timeout > 0:
            self.asleep.set()
        ready = self.inner.poll(timeout)
        if timeout > 0:
            assert self.gate.wait(60)
        return ready


# ---- calls -------------------------------------------------------------------------------------------


def test_a_call_from_a_thread_wakes_a_kernel_that_sleeps() -> None:
    poller = WatchedPoller()
    done = kernel.Event()

    async def main() -> None:
        token = current_kernel_token()

        def thread() -> None:
            assert poller.asleep.wait(60)
            token.run_sync_soon(done.set)

        worker = threading.Thread(target=thread)
        worker.start()
        await done.wait()
        worker.join(60)

    kernel.run(main, poller=poller)
    assert poller.wakeups == 1


def test_calls_of_many_threads_are_all_made_and_each_threads_in_order() -> None:
    threads, calls = 4, 25_000
    made: list[tuple[int, int]] = []

    async def main() -> None:
        token = current_kernel_token()
        done = kernel.Semaphore(0)

        def thread(number: int) -> None:
            for index in range(calls):
                token.run_sync_soon(made.append, (number, index))
            token.run_sync_soon(done.release)

        workers = [threading.Thread(target=thread, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for _ in workers:
            await done.acquire()
        for worker in workers:
            worker.join(60)

    kernel.run(main)
    for number in range(threads):
        assert [index for who, index in made if who == number] == list(range(calls))
    assert len(made) == threads * calls


def test_a_hundred_thousand_calls_can_wait_in_the_row(log: list[Any]) -> None:
    async def main() -> None:
        token = current_kernel_token()
        in_thread(lambda: [token.run_sync_soon(log.append, number) for number in range(100_000)])
        assert log == []  # not before the pass is over
        await wait_all_tasks_blocked()
        assert len(log) == 100_000

    kernel.run(main)
    assert log == list(range(100_000))


def test_a_row_of_calls_wakes_a_sleeping_kernel_once(log: list[Any]) -> None:
    poller = WatchedPoller()

    async def main() -> None:
        token, done = current_kernel_token(), kernel.Event()

        def thread() -> None:
            assert poller.asleep.wait(60)
            poller.gate.clear()
            for number in range(1000):
                token.run_sync_soon(log.append, number)
            token.run_sync_soon(done.set)
            poller.gate.set()

        worker = threading.Thread(target=thread)
        worker.start()
        await done.wait()
        worker.join(60)

    kernel.run(main, poller=poller)
    assert log == list(range(1000))
    assert poller.wakeups == 1


def test_a_wake_up_is_one_system_call(monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    written: list[bytes] = []

    def watched(fd: int, data: bytes) -> int:
        written.append(data)
        return write(fd, data)

    poller = WatchedPoller()

    async def main() -> None:
        token, done = current_kernel_token(), kernel.Event()

        def thread() -> None:
            assert poller.asleep.wait(60)
            poller.gate.clear()
            monkeypatch.setattr(os, "write", watched)
            for _ in range(100):
                token.run_sync_soon(done.set)
            monkeypatch.undo()
            poller.gate.set()

        worker = threading.Thread(target=thread)
        worker.start()
        await done.wait()
        worker.join(60)

    kernel.run(main, poller=poller)
    assert len(written) == 1


def test_a_busy_kernel_is_not_woken_at_all(log: list[Any]) -> None:
    poller = WatchedPoller()

    async def main() -> None:
        token = current_kernel_token()
        for number in range(100):
            token.run_sync_soon(log.append, number)
            in_thread(lambda number=number: token.run_sync_soon(log.append, -number))  # type: ignore[misc]
        while len(log) < 200:
            await checkpoint()

    kernel.run(main, poller=poller)
    assert poller.wakeups == 0


def test_a_kernel_that_is_about_to_sleep_sees_what_came_in_the_last_moment(hasty: None) -> None:
    """Each time around, a thread calls at about the moment in which the kernel goes to sleep."""

    async def main() -> None:
        token = current_kernel_token()
        turns: SimpleQueue[kernel.Event | None] = SimpleQueue()

        def thread() -> None:
            while (turn := turns.get()) is not None:
                token.run_sync_soon(turn.set)

        worker = threading.Thread(target=thread)
        worker.start()
        for _ in range(2000 * LONG):
            event = kernel.Event()
            turns.put(event)
            with kernel.fail_after(60):
                await event.wait()
        turns.put(None)
        worker.join(60)

    kernel.run(main)


def test_a_kernel_does_not_sleep_on_a_call_that_came_after_it_last_looked() -> None:
    """Between the look into the row and the word that it is asleep, while nobody would wake it."""
    done = kernel.Event()

    class Clock(MonotonicClock):
        token: KernelToken | None = None

        def current_time(self) -> float:
            if self.token is not None:
                token, self.token = self.token, None
                token.run_sync_soon(done.set)
            return super().current_time()

    class Poller(WatchedPoller):
        def poll(self, timeout: float) -> Any:
            assert timeout == 0 or not current_kernel().soon
            return super().poll(timeout)

    async def main() -> None:
        clock.token = current_kernel_token()
        await done.wait()

    clock = Clock()
    kernel.run(main, clock=clock, poller=Poller())


def test_calls_of_the_kernels_own_thread_are_made_between_steps_too(log: list[Any]) -> None:
    async def main() -> None:
        token = current_kernel_token()
        token.run_sync_soon(log.append, "called")
        log.append("step goes on")
        await wait_all_tasks_blocked()
        log.append("main goes on")

    kernel.run(main)
    assert log == ["step goes on", "called", "main goes on"]


def test_what_a_call_leaves_is_made_one_pass_later_so_that_tasks_are_not_starved() -> None:
    rounds = 0

    async def main() -> None:
        token = current_kernel_token()

        def again() -> None:
            nonlocal rounds
            rounds += 1
            if rounds < 1000:
                token.run_sync_soon(again)

        token.run_sync_soon(again)
        while not rounds:
            await checkpoint()
        assert rounds < 1000
        await wait_all_tasks_blocked()
        assert rounds == 1000  # somebody who can still call is not blocked

    kernel.run(main)


def test_a_call_may_set_events_start_tasks_and_cancel_scopes(log: list[Any]) -> None:
    async def child(name: str) -> None:
        log.append(name)
        await kernel.sleep_forever()

    async def main() -> None:
        token, event = current_kernel_token(), kernel.Event()
        async with kernel.open_nursery() as nursery:

            def thread() -> None:
                token.run_sync_soon(event.set)
                token.run_sync_soon(nursery.start_soon, child, "started")
                token.run_sync_soon(nursery.cancel_scope.cancel, "enough")

            worker = threading.Thread(target=thread)
            worker.start()
            await event.wait()
            worker.join(60)

    kernel.run(main)
    assert log == ["started"]


Call = Callable[[], object]


def at_the_end(call: Call) -> Call:
    """`call`, left in such a way that it is made when the last task has ended."""

    async def main() -> None:
        current_kernel_token().run_sync_soon(call)

    return main


def in_the_middle(call: Call) -> Call:
    async def main() -> None:
        current_kernel_token().run_sync_soon(call)
        await wait_all_tasks_blocked()

    return main


whenever = pytest.mark.parametrize("left", [in_the_middle, at_the_end])


@whenever
def test_a_call_is_made_in_no_task_in_the_runs_first_context_and_safe_from_ctrl_c(
    log: list[Any], left: Callable[[Call], Any]
) -> None:
    var: contextvars.ContextVar[str] = contextvars.ContextVar("var")
    idempotent: list[Any] = []

    def look(into: list[Any]) -> None:
        into += [in_kernel_run(), in_kernel_task(), current_kernel().current, currently_ki_protected(), var.get()]

    async def main() -> None:
        var.set("main's")
        current_kernel_token().run_sync_soon(look_once, idempotent=True)
        await left(lambda: look(log))()  # type: ignore[misc]

    def look_once() -> None:
        look(idempotent)

    var.set("the caller's")
    kernel.run(main)
    assert log == idempotent == [True, False, None, True, "the caller's"]


@pytest.mark.parametrize("wrong", [None, 42, "f"])
def test_what_cannot_be_called_is_refused_on_the_spot(wrong: Any) -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match=r"run_sync_soon\(\) wants a function and its arguments, not"):
            current_kernel_token().run_sync_soon(wrong)

    kernel.run(main)


def test_a_held_token_keeps_no_run_alive() -> None:
    async def main() -> KernelToken:
        return current_kernel_token()

    token = kernel.run(main)
    assert "run is over" in repr(token)


# ---- who may call ------------------------------------------------------------------------------------


def test_a_signal_handler_may_call_while_the_kernel_sleeps() -> None:
    poller = WatchedPoller()

    async def main() -> None:
        token, done = current_kernel_token(), kernel.Event()
        before = signal.signal(signal.SIGUSR1, lambda *_: token.run_sync_soon(done.set))

        def thread() -> None:
            assert poller.asleep.wait(60)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

        worker = threading.Thread(target=thread)
        worker.start()
        try:
            await done.wait()
        finally:
            signal.signal(signal.SIGUSR1, before)
            worker.join(60)

    kernel.run(main, poller=poller)


def test_a_storm_of_signals_interrupts_calls_at_any_point_and_none_is_lost() -> None:
    """The handler calls in the middle of the main thread's calls, and in the middle of the loop."""
    token: KernelToken
    by_handler, by_task = [0, 0], [0, 0]

    def count(which: list[int]) -> None:
        which[1] += 1

    def handler(*_: object) -> None:
        token.run_sync_soon(count, by_handler)
        token.run_sync_soon(once, idempotent=True)
        by_handler[0] += 1

    def once() -> None:
        pass

    async def main() -> None:
        nonlocal token
        token = current_kernel_token()
        before = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        try:
            while by_handler[0] < 300 * LONG:
                for _ in range(50):
                    token.run_sync_soon(count, by_task)
                    token.run_sync_soon(once, idempotent=True)
                    by_task[0] += 1
                await checkpoint()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    kernel.run(main)
    assert by_handler[0] == by_handler[1] >= 300
    assert by_task[0] == by_task[1]


def test_a_finalizer_may_call_also_from_the_garbage_collector_in_another_thread(log: list[Any]) -> None:
    class Resource:
        def __init__(self, name: str, token: KernelToken) -> None:
            self.name, self.token = name, token
            self.cycle: object = None

        def __del__(self) -> None:
            self.token.run_sync_soon(log.append, self.name)

    async def main() -> None:
        token = current_kernel_token()
        Resource("dropped", token)
        ring = Resource("collected", token)
        ring.cycle = ring
        del ring
        in_thread(gc.collect)
        await wait_all_tasks_blocked()

    kernel.run(main)
    assert log == ["dropped", "collected"]


def test_one_may_call_in_the_middle_of_a_call(log: list[Any]) -> None:
    """As a signal handler would: while this very thread holds the inbox."""
    token: KernelToken

    class Rude:
        def __hash__(self) -> int:
            token.run_sync_soon(log.append, "from inside")
            return 1

    async def main() -> None:
        nonlocal token
        token = current_kernel_token()
        token.run_sync_soon(log.append, Rude(), idempotent=True)
        await wait_all_tasks_blocked()

    kernel.run(main)
    assert log.count("from inside") == len(log) - 1 >= 1


def test_a_wake_up_that_a_signal_breaks_off_does_not_keep_later_calls_from_waking() -> None:
    """The main thread holds the token of another thread's kernel, and its Ctrl-C strikes just before the write."""
    poller = WatchedPoller()
    tokens: SimpleQueue[KernelToken] = SimpleQueue()
    first, second = kernel.Event(), kernel.Event()

    async def main() -> None:
        tokens.put(current_kernel_token())
        await first.wait()
        await second.wait()

    worker = threading.Thread(target=lambda: kernel.run(main, poller=poller, detect_deadlock=False))
    worker.start()
    token = tokens.get()
    assert poller.asleep.wait(60)
    wakeup = poller.wakeup

    def struck() -> None:
        poller.wakeup = wakeup  # type: ignore[method-assign]
        raise KeyboardInterrupt

    poller.wakeup = struck  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        token.run_sync_soon(first.set)
    token.run_sync_soon(second.set)
    worker.join(60)
    assert not worker.is_alive()


# ---- idempotent --------------------------------------------------------------------------------------


def test_idempotent_calls_that_are_equal_are_made_once_until_made_and_then_again(log: list[Any]) -> None:
    async def main() -> None:
        token = current_kernel_token()
        for _ in range(2):
            for _ in range(1000):
                token.run_sync_soon(log.append, "a", idempotent=True)
                token.run_sync_soon(log.append, "b", idempotent=True)
            await wait_all_tasks_blocked()
            log.append("|")

    kernel.run(main)
    assert "".join(log) == "ab|ab|"


def test_idempotent_calls_keep_their_place_among_the_others_and_drop_none_of_those(log: list[Any]) -> None:
    async def main() -> None:
        token = current_kernel_token()
        for idempotent, what in ((False, "a"), (True, "a"), (True, "b"), (False, "a"), (True, "a"), (False, "c")):
            token.run_sync_soon(log.append, what, idempotent=idempotent)
        await wait_all_tasks_blocked()

    kernel.run(main)
    assert "".join(log) == "aabac"


def test_an_idempotent_call_may_leave_itself_again(log: list[Any]) -> None:
    async def main() -> None:
        token = current_kernel_token()

        def again() -> None:
            log.append(1)
            if len(log) < 5:
                token.run_sync_soon(again, idempotent=True)
                token.run_sync_soon(again, idempotent=True)

        token.run_sync_soon(again, idempotent=True)
        await wait_all_tasks_blocked()

    kernel.run(main)
    assert len(log) == 5


def test_an_idempotent_call_with_arguments_that_cannot_be_hashed_is_refused_and_leaves_nothing(log: list[Any]) -> None:
    async def main() -> None:
        token = current_kernel_token()
        with pytest.raises(TypeError, match="unhashable"):
            token.run_sync_soon(log.append, [], idempotent=True)
        token.run_sync_soon(log.append, [1])  # the others need not be hashable
        await wait_all_tasks_blocked()

    kernel.run(main)
    assert log == [[1]]


def test_an_idempotent_call_that_a_signal_breaks_off_does_not_keep_out_its_equals(
    log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        token = current_kernel_token()

        def struck(function: object) -> None:
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(current_kernel(), "call_soon", struck)
        with pytest.raises(KeyboardInterrupt):
            token.run_sync_soon(log.append, "a", idempotent=True)
        token.run_sync_soon(log.append, "a", idempotent=True)
        await wait_all_tasks_blocked()

    kernel.run(main)
    assert log == ["a"]


def test_idempotent_calls_from_threads_are_each_made_after_they_were_left(hasty: None) -> None:
    """What a thread has changed before its call is seen by a call that is made after it: no wake-up is swallowed."""

    async def main() -> None:
        token, todo, done = current_kernel_token(), SimpleQueue[int](), 0
        finished = kernel.Event()

        def work() -> None:
            nonlocal done
            while not todo.empty():
                todo.get_nowait()
                done += 1
            if done == 20_000:
                finished.set()

        def thread() -> None:
            for number in range(10_000):
                todo.put(number)
                token.run_sync_soon(work, idempotent=True)

        workers = [threading.Thread(target=thread) for _ in range(2)]
        for worker in workers:
            worker.start()
        with kernel.fail_after(60):
            await finished.wait()
        for worker in workers:
            worker.join(60)

    kernel.run(main)


# ---- the end of the run ------------------------------------------------------------------------------


def test_after_the_run_a_call_is_refused_from_any_thread() -> None:
    async def main() -> KernelToken:
        return current_kernel_token()

    token = kernel.run(main)
    for idempotent in (False, True):
        with pytest.raises(RunFinishedError, match="after the run had ended"):
            token.run_sync_soon(print, idempotent=idempotent)
        with pytest.raises(RunFinishedError):
            in_thread(lambda: token.run_sync_soon(print, idempotent=idempotent))  # noqa: B023


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_after_a_run_that_failed_too(error: type[BaseException]) -> None:
    tokens: list[KernelToken] = []

    async def main() -> None:
        tokens.append(current_kernel_token())
        raise error

    with pytest.raises(error):
        kernel.run(main)
    with pytest.raises(RunFinishedError):
        tokens[0].run_sync_soon(print)


def test_what_was_accepted_is_made_however_close_the_end_is(hasty: None) -> None:
    """A thread calls without pause while runs end under its hands. Each call either raises or is made."""
    tokens: SimpleQueue[KernelToken | None] = SimpleQueue()
    accepted, made = [0, 0], [0, 0]
    refusals = 0
    begun: kernel.Event

    def made_one(which: int) -> None:
        made[which] += 1
        begun.set()

    def thread() -> None:
        nonlocal refusals
        while (token := tokens.get()) is not None:
            number = 0
            try:
                while True:
                    token.run_sync_soon(made_one, 0)
                    accepted[0] += 1
                    token.run_sync_soon(lambda: made_one(1), idempotent=True)
                    accepted[1] += 1
                    number += 1
            except RunFinishedError:
                refusals += 1

    async def main(steps: int) -> None:
        nonlocal begun
        begun = kernel.Event()
        tokens.put(current_kernel_token())
        await begun.wait()
        for _ in range(steps):
            await checkpoint()

    worker = threading.Thread(target=thread)
    worker.start()
    with Kernel() as one:
        for number in range(1000 * LONG):
            one.run(main, number % 7)
    tokens.put(None)
    worker.join(60)
    assert refusals == 1000 * LONG
    assert made == accepted
    assert accepted[0] >= 1000 * LONG


def test_a_call_that_is_being_left_while_the_run_ends_is_waited_for(
    log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, ending = threading.Event(), threading.Event()

    class AtTheEnd(Instrument):
        def after_run(self) -> None:
            ending.set()

    async def main() -> threading.Thread:
        running, token = current_kernel(), current_kernel_token()
        call_soon = running.call_soon

        def slowly(function: Call) -> None:
            inside.set()
            assert ending.wait(60)
            call_soon(function)

        monkeypatch.setattr(running, "call_soon", slowly)
        worker = threading.Thread(target=token.run_sync_soon, args=(log.append, "made"))
        worker.start()
        assert inside.wait(60)
        return worker

    kernel.run(main, instruments=[AtTheEnd()]).join(60)
    assert log == ["made"]


def test_calls_made_at_the_end_may_leave_more_as_long_as_the_inbox_is_open(log: list[Any]) -> None:
    async def main() -> None:
        token = current_kernel_token()

        def first() -> None:
            log.append("first")
            token.run_sync_soon(second)

        def second() -> None:
            log.append("second")
            with pytest.raises(RunFinishedError):
                token.run_sync_soon(first)

        token.run_sync_soon(first)

    kernel.run(main)
    assert log == ["first", "second"]


# ---- calls that raise --------------------------------------------------------------------------------


@whenever
def test_a_call_that_raises_ends_the_run_with_its_error_as_the_cause(left: Callable[[Call], Any]) -> None:
    def bad() -> None:
        raise KeyError("the call's")

    with pytest.raises(KernelInternalError) as info:
        kernel.run(left(bad))
    assert isinstance(info.value.__cause__, KeyError)
    assert info.value.__cause__.args == ("the call's",)


def test_a_call_that_raises_cancels_all_tasks_and_waits_for_them_and_the_kernel_is_as_good_as_new(
    log: list[Any],
) -> None:
    async def child() -> None:
        try:
            await kernel.sleep_forever()
        finally:
            with kernel.CancelScope(shield=True):
                await wait_all_tasks_blocked()
            log.append("cleaned up")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            await wait_all_tasks_blocked()
            current_kernel_token().run_sync_soon(lambda: 1 // 0)
            try:
                await kernel.sleep_forever()
            except kernel.Cancelled as why:
                log.append(f"{why.source}, {'has raised ZeroDivisionError' in str(why.reason)}")
                raise

    with Kernel() as one:
        for _ in range(2):
            with pytest.raises(
                KernelInternalError, match=r"<lambda>, called for run_sync_soon\(\), has raised Zero"
            ) as info:
                one.run(main)
            assert isinstance(info.value.__cause__, ZeroDivisionError)
    assert log == ["shutdown, True", "cleaned up"] * 2


def test_calls_that_raise_while_the_run_is_ending_are_told_too() -> None:
    def bad(what: str) -> None:
        raise KeyError(what)

    async def main() -> None:
        token = current_kernel_token()
        token.run_sync_soon(bad, "first")
        try:
            await kernel.sleep_forever()
        finally:
            token.run_sync_soon(bad, "second")
            with kernel.CancelScope(shield=True):
                await wait_all_tasks_blocked()
            token.run_sync_soon(bad, "last")

    with pytest.raises(KernelInternalError) as info:
        kernel.run(main)
    assert isinstance(info.value.__cause__, KeyError)
    assert info.value.__cause__.args == ("first",)
    second, last = info.value.__notes__
    assert "KeyError('second')" in second
    assert "KeyError('last')" in last


def test_a_call_that_raises_is_worse_than_the_ctrl_c_the_run_would_have_ended_with() -> None:
    async def main() -> None:
        token = current_kernel_token()
        token.run_sync_soon(sys.exit, 7)
        try:
            await kernel.sleep_forever()
        finally:
            token.run_sync_soon(lambda: 1 // 0)

    with pytest.raises(KernelInternalError) as info:
        kernel.run(main)
    assert isinstance(info.value.__cause__, ZeroDivisionError)


@whenever
def test_calls_that_raise_do_not_keep_the_others_from_being_made(log: list[Any], left: Callable[[Call], Any]) -> None:
    tokens: list[KernelToken] = []

    def bad() -> None:
        raise KeyError("the first one's")

    def worse() -> None:
        raise ValueError("the second one's")

    async def main() -> None:
        tokens.append(current_kernel_token())
        for call in (bad, lambda: log.append("good"), worse, lambda: log.append("better")):
            await left(call)() if call is worse else tokens[0].run_sync_soon(call)  # type: ignore[func-returns-value]

    with pytest.raises(KernelInternalError):
        kernel.run(main)
    assert log[:1] == ["good"]
    with pytest.raises(RunFinishedError):
        tokens[0].run_sync_soon(print)


def test_each_call_is_made_though_the_ones_before_it_raise(log: list[Any]) -> None:
    async def main() -> None:
        token = current_kernel_token()

        def call(number: int) -> None:
            log.append(number)
            raise KeyError(number)

        for number in range(3):
            token.run_sync_soon(call, number)

    with pytest.raises(KernelInternalError) as info:
        kernel.run(main)
    assert log == [0, 1, 2]
    assert isinstance(info.value.__cause__, KeyError)
    assert info.value.__cause__.args == (0,)


@whenever
def test_an_exit_raised_in_a_call_is_what_the_run_ends_with(left: Callable[[Call], Any]) -> None:
    with pytest.raises(SystemExit, match="7"):
        kernel.run(left(lambda: sys.exit(7)))


def test_what_is_raised_by_several_calls_at_the_end_is_the_first_and_the_others_are_made_all_the_same(
    log: list[Any],
) -> None:
    async def main() -> None:
        token = current_kernel_token()
        for call in (lambda: sys.exit(7), lambda: log.append("made"), lambda: sys.exit(8), lambda: log.append("too")):
            token.run_sync_soon(call)

    with pytest.raises(SystemExit, match="7"):
        kernel.run(main)
    assert log == ["made", "too"]


# ---- the token ---------------------------------------------------------------------------------------


def test_a_run_has_one_token_and_each_run_its_own() -> None:
    async def main() -> KernelToken:
        token = current_kernel_token()
        await checkpoint()
        assert current_kernel_token() is token
        return token

    with Kernel() as one:
        tokens = [one.run(main), one.run(main), kernel.run(main)]
    assert len(set(tokens)) == 3
    assert tokens[0] != tokens[1]


def test_a_token_that_is_first_asked_for_at_once_by_a_task_and_a_signal_handler_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens: list[KernelToken] = []
    create = KernelToken.__init__

    def interrupted(self: KernelToken, *args: Any) -> None:
        monkeypatch.undo()
        tokens.append(current_kernel_token())  # the handler's
        create(self, *args)

    async def main() -> None:
        monkeypatch.setattr(KernelToken, "__init__", interrupted)
        tokens.append(current_kernel_token())

    kernel.run(main)
    assert tokens[0] is tokens[1]


def test_a_token_can_be_a_key_and_can_be_referred_to_weakly() -> None:
    async def main() -> weakref.ref[KernelToken]:
        token = current_kernel_token()
        by_run = weakref.WeakKeyDictionary({token: "this run"})
        assert by_run[current_kernel_token()] == "this run"
        assert repr(token) == f"<KernelToken at {id(token):#x}, open>"
        return weakref.ref(token)

    assert kernel.run(main)() is None


def test_outside_a_run_there_is_no_token() -> None:
    with pytest.raises(RuntimeError, match=r"^current_kernel_token\(\) was used outside the kernel"):
        current_kernel_token()


def test_whether_a_kernel_and_a_task_run_here_is_told_per_thread(log: list[Any]) -> None:
    def look() -> None:
        log.append((in_kernel_run(), in_kernel_task()))

    async def main() -> None:
        look()
        in_thread(look)

    look()
    kernel.run(main)
    look()
    assert log == [(False, False), (True, True), (False, False), (False, False)]


# ---- system tasks ------------------------------------------------------------------------------------


async def forever(log: list[Any], name: str = "system") -> None:
    try:
        await kernel.sleep_forever()
    except kernel.Cancelled as why:
        log.append(f"{name} cancelled by {why.source}")
        raise


def test_a_system_task_is_cancelled_when_main_and_its_children_have_ended(log: list[Any]) -> None:
    async def child() -> None:
        await wait_all_tasks_blocked()
        log.append("child ends")

    async def main() -> None:
        spawn_system_task(forever, log)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
        log.append("main ends")

    kernel.run(main)
    assert log == ["child ends", "main ends", "system cancelled by shutdown"]


def test_a_system_task_may_take_its_time_to_end(log: list[Any]) -> None:
    async def system() -> None:
        try:
            await kernel.sleep_forever()
        finally:
            with kernel.CancelScope(shield=True):
                await wait_all_tasks_blocked()
            log.append("done")

    async def main() -> str:
        spawn_system_task(system)
        await checkpoint()
        return "result"

    assert kernel.run(main) == "result"
    assert log == ["done"]


def test_a_system_task_hangs_from_the_root_and_outlives_the_task_that_started_it(log: list[Any]) -> None:
    tasks: list[Task] = []

    async def child() -> None:
        tasks.append(spawn_system_task(forever, log, name="the service"))

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
        assert tasks[0].state == "sleeping"
        assert tasks[0].parent_nursery is not None
        assert tasks[0].parent_nursery.parent_task is current_root_task()
        assert tasks[0].name == "the service"

    kernel.run(main)
    assert log == ["system cancelled by shutdown"]


def test_a_system_task_is_called_by_its_function_if_it_gets_no_name() -> None:
    async def main() -> None:
        assert spawn_system_task(forever, []).name == "forever"

    kernel.run(main)


def test_a_system_task_in_generator_style(log: list[Any]) -> None:
    def system() -> Any:
        yield from checkpoint()
        log.append("ran")

    async def main() -> None:
        spawn_system_task(system)
        await wait_all_tasks_blocked()

    kernel.run(main)
    assert log == ["ran"]


def test_a_system_task_runs_in_a_copy_of_the_runs_first_context_or_in_the_one_given(log: list[Any]) -> None:
    var: contextvars.ContextVar[str] = contextvars.ContextVar("var")

    async def system() -> None:
        log.append(var.get())
        await checkpoint()
        var.set("changed by the system task")

    async def main() -> None:
        var.set("main's")
        spawn_system_task(system)
        mine = contextvars.copy_context()
        spawn_system_task(system, context=mine)
        await wait_all_tasks_blocked()
        log.append(mine[var])
        spawn_system_task(system)  # each gets a copy of its own
        await wait_all_tasks_blocked()
        log.append(var.get())

    var.set("the caller's")
    kernel.run(main)
    assert log == ["the caller's", "main's", "changed by the system task", "the caller's", "main's"]
    assert var.get() == "the caller's"


def test_a_system_task_is_safe_from_ctrl_c(log: list[Any]) -> None:
    async def system() -> None:
        log.append(currently_ki_protected())

    async def main() -> None:
        log.append(currently_ki_protected())
        spawn_system_task(system)
        await wait_all_tasks_blocked()

    kernel.run(main)
    assert log == [False, True]


def test_a_system_task_that_fails_cancels_the_program_and_ends_the_run(log: list[Any]) -> None:
    async def system() -> None:
        await wait_all_tasks_blocked()
        raise KeyError("the service's")

    async def main() -> None:
        spawn_system_task(system)
        await forever(log, "main")

    with pytest.raises(KernelInternalError, match=r"a task of the kernel's own failed") as info:
        kernel.run(main)
    group = info.value.__cause__
    assert isinstance(group, ExceptionGroup)
    assert [repr(error) for error in group.exceptions] == ["""KeyError("the service's")"""]
    assert log == ["main cancelled by nursery"]


def test_a_system_task_that_fails_while_it_is_cancelled_ends_the_run_too() -> None:
    async def system() -> None:
        try:
            await kernel.sleep_forever()
        finally:
            raise KeyError("cleaning up")

    async def main() -> None:
        spawn_system_task(system)
        await checkpoint()

    with pytest.raises(KernelInternalError):
        kernel.run(main)


def test_a_system_task_can_be_started_by_a_call_from_a_thread(log: list[Any]) -> None:
    async def system(done: kernel.Event) -> None:
        log.append(current_task().name)
        done.set()

    async def main() -> None:
        token, done = current_kernel_token(), kernel.Event()
        in_thread(lambda: token.run_sync_soon(spawn_system_task, system, done))
        await done.wait()

    kernel.run(main)
    assert len(log) == 1


def test_a_system_task_can_start_others_until_the_last_one_has_ended(log: list[Any]) -> None:
    async def system() -> None:
        try:
            await forever(log, "first")
        finally:
            spawn_system_task(forever, log, "second")

    async def main() -> None:
        spawn_system_task(system)
        await checkpoint()

    kernel.run(main)
    assert log == ["first cancelled by shutdown", "second cancelled by shutdown"]


def test_too_late_and_too_early_a_system_task_is_refused_with_the_reason(log: list[Any]) -> None:
    def try_it() -> None:
        with pytest.raises(RuntimeError, match=r"when the run had hardly begun, or was as good as over"):
            spawn_system_task(forever, log)
        log.append("refused")

    class Early(Instrument):
        def before_run(self) -> None:
            try_it()

    kernel.run(at_the_end(try_it), instruments=[Early()])
    assert log == ["refused", "refused"]


def test_what_is_no_async_function_is_no_system_task_either() -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match=r"spawn_system_task wants an async function, not 42"):
            spawn_system_task(42)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"spawn_system_task wants the function, but got the result of calling it"):
            spawn_system_task(forever([]))  # type: ignore[arg-type]

    kernel.run(main)


def test_outside_a_run_there_are_no_system_tasks() -> None:
    with pytest.raises(RuntimeError, match=r"^spawn_system_task\(\) was used outside the kernel"):
        spawn_system_task(forever, [])


def test_a_system_task_keeps_its_async_generators_until_it_has_ended(
    log: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def numbers(waits: bool) -> AsyncGenerator[int, None]:
        try:
            yield 1
            if waits:
                await kernel.sleep_forever()
            yield 2
        except kernel.Cancelled:
            log.append("cancelled inside the generator")
            raise
        finally:
            log.append("generator closed")

    async def system(waits: bool) -> None:
        agen = numbers(waits)
        try:
            async for number in agen:
                if number == 2 or not waits:
                    await kernel.sleep_forever()
            log.append("the generator ended early")
        finally:
            await cancel_shielded_checkpoint()
            log.append("system task ends")

    for waits, expected in (
        (True, ["cancelled inside the generator", "generator closed", "system task ends"]),
        (False, ["system task ends", "generator closed"]),
    ):
        log.clear()

        async def main(waits: bool = waits) -> None:
            spawn_system_task(system, waits)
            await wait_all_tasks_blocked()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            kernel.run(main)
        assert log == expected
    assert caplog.records == []


# ---- the root ----------------------------------------------------------------------------------------


def test_from_the_root_one_finds_every_task(log: list[Any]) -> None:
    async def child() -> None:
        await kernel.sleep_forever()

    async def main() -> None:
        spawn_system_task(forever, log, name="system")
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child, name="child")
            await wait_all_tasks_blocked()
            root = current_root_task()
            assert root is not None
            assert root.parent_nursery is None
            found = []
            todo = [root]
            for task in todo:
                found.append(task.name)
                for inner in task.child_nurseries:
                    todo += inner.child_tasks
            assert sorted(found) == sorted(["<root>", "child", current_task().name, "system"])
            nursery.cancel_scope.cancel()

    kernel.run(main)


def test_outside_a_run_there_is_no_root() -> None:
    with pytest.raises(RuntimeError, match=r"^current_root_task\(\) was used outside the kernel"):
        current_root_task()


# ---- run variables -----------------------------------------------------------------------------------

counter: RunVar[int] = RunVar("counter", default=0)
bare: RunVar[str] = RunVar("bare")


def test_a_run_variable_is_shared_by_all_tasks_and_fresh_in_each_run() -> None:
    async def child() -> None:
        counter.set(counter.get() + 1)

    async def main() -> int:
        assert counter.get() == 0
        async with kernel.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(child)
        return counter.get()

    with Kernel() as one:
        assert [one.run(main), one.run(main), kernel.run(main)] == [5, 5, 5]


def test_a_run_variable_can_be_used_in_calls_from_outside(log: list[Any]) -> None:
    async def main() -> None:
        current_kernel_token().run_sync_soon(lambda: counter.set(7))
        await wait_all_tasks_blocked()
        assert counter.get() == 7

    kernel.run(at_the_end(lambda: log.append(counter.get())))
    kernel.run(main)
    assert log == [0]


def test_get_takes_the_value_or_its_own_default_or_the_variables_default_or_raises() -> None:
    async def main() -> None:
        with pytest.raises(LookupError) as info:
            bare.get()
        assert info.value.args == (bare,)
        assert bare.get("mine") == "mine"
        assert counter.get(5) == 5
        assert counter.get() == 0
        maybe: RunVar[int | None] = RunVar("maybe", default=None)
        assert maybe.get() is None
        assert maybe.get(1) == 1
        maybe.set(None)
        assert maybe.get(1) is None
        bare.set("value")
        assert bare.get() == bare.get("mine") == "value"

    kernel.run(main)


def test_reset_brings_back_what_was_before_its_set_also_nothing() -> None:
    async def main() -> None:
        first = bare.set("a")
        second = bare.set("b")
        bare.reset(second)
        assert bare.get() == "a"
        bare.reset(first)
        with pytest.raises(LookupError):
            bare.get()
        one, two = counter.set(1), counter.set(2)
        counter.reset(one)  # out of order is allowed: each brings back what it saw
        assert counter.get() == 0
        counter.reset(two)
        assert counter.get() == 1

    kernel.run(main)


def test_a_reset_token_serves_once_and_only_its_variable_in_its_run() -> None:
    async def main() -> Any:
        token = counter.set(1)
        with pytest.raises(ValueError, match="of the same variable"):
            RunVar[int]("other").reset(token)
        counter.reset(token)
        counter.set(5)
        with pytest.raises(ValueError, match="used already"):
            counter.reset(token)
        assert counter.get() == 5
        return counter.set(6)

    async def later(token: Any) -> None:
        with pytest.raises(ValueError, match="in the same run"):
            counter.reset(token)
        assert counter.get() == 0

    kernel.run(later, kernel.run(main))


def test_a_run_variable_outside_a_run_is_an_error_that_names_the_method() -> None:
    async def main() -> Any:
        return counter.set(1)

    token = kernel.run(main)
    for call in (counter.get, lambda: counter.set(1), lambda: counter.reset(token)):
        with pytest.raises(RuntimeError, match=r"^RunVar\.(get|set|reset)\(\) was used outside the kernel"):
            call()  # type: ignore[operator]


def test_a_run_variable_of_kernels_in_several_threads_has_a_value_in_each() -> None:
    barrier = threading.Barrier(4)
    results: SimpleQueue[int] = SimpleQueue()

    async def main(number: int) -> None:
        counter.set(number)
        barrier.wait(60)
        results.put(counter.get())

    threads = [threading.Thread(target=kernel.run, args=(main, number)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results.get() for _ in threads) == [1, 2, 3, 4]


def test_a_run_variable_is_generic_and_shows_its_name() -> None:
    assert repr(RunVar[int]("counter")) == "<RunVar name='counter'>"
