"""Futures of other threads, and executors: who wakes whom, and who is cancelled with whom."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import multiprocessing
import os
import random
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from leftovers import resource_tracker_leaves

import kernel
from kernel import run_in, wait_future
from kernel.abc import Instrument
from kernel.lowlevel import checkpoint, current_kernel, current_task
from kernel.testing import wait_all_tasks_blocked

__all__ = ["resource_tracker_leaves"]


def running_future() -> Future[Any]:
    """One whose work has begun, so that it can't be cancelled any more."""
    future: Future[Any] = Future()
    assert future.set_running_or_notify_cancel()
    return future


def in_thread(function: Callable[..., object], *args: object) -> None:
    """Call it in another thread, and wait until that has ended."""
    thread = threading.Thread(target=function, args=args)
    thread.start()
    thread.join()


class Settled(Instrument):
    """Settles a future in another thread when the kernel is about to sleep for long."""

    def __init__(self, future: Future[Any]) -> None:
        self.future = future

    def before_io_wait(self, timeout: float) -> None:
        if timeout >= 1 and not self.future.done():
            threading.Thread(target=self.future.set_result, args=("late",)).start()


# ---- waiting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settle", ["before", "at", "after"])
@pytest.mark.parametrize("other_thread", [False, True])
def test_result_arrives_whenever_and_wherever_the_future_is_settled(settle: str, other_thread: bool) -> None:
    class Touchy(Future[str]):
        def add_done_callback(self, fn: Callable[[Future[str]], object]) -> None:
            if settle == "at":
                do(self.set_result, "value")
            super().add_done_callback(fn)

    do = in_thread if other_thread else lambda function, *args: function(*args)

    async def main() -> str:
        future = Touchy()
        if settle == "before":
            do(future.set_result, "value")
        async with kernel.open_nursery() as nursery:
            waiter = nursery.spawn(wait_future, future)
            if settle == "after":
                await wait_all_tasks_blocked()
                do(future.set_result, "value")
        return await waiter

    assert kernel.run(main) == "value"


def test_a_future_that_is_done_is_not_slept_on() -> None:
    async def main() -> None:
        future: Future[int] = Future()
        future.set_result(3)
        steps: list[str] = []
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other, steps)
            assert await wait_future(future) == 3
            steps.append("waited")
        assert steps == ["waited", "other"]

    async def other(steps: list[str]) -> None:
        steps.append("other")

    kernel.run(main)


def test_waiting_for_futures_that_are_done_lets_others_run_in_the_end() -> None:
    async def main() -> int:
        future: Future[int] = Future()
        future.set_result(3)
        turns = 0
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other, nursery.cancel_scope)
            while True:
                await wait_future(future)
                turns += 1
                assert turns < 10_000
        return turns

    async def other(scope: kernel.CancelScope) -> None:
        scope.cancel()

    assert kernel.run(main) > 0


def test_error_of_the_future_is_raised_as_it_is() -> None:
    error = LookupError("lost")

    async def main() -> None:
        future: Future[int] = Future()
        future.set_exception(error)
        with pytest.raises(LookupError) as info:
            await wait_future(future)
        assert info.value is error

    kernel.run(main)


def test_works_from_plain_generators() -> None:
    def main() -> Generator[Any, Any, list[int]]:
        future: Future[int] = Future()
        future.set_result(1)
        with ThreadPoolExecutor(1) as pool:
            return [(yield from wait_future(future)), (yield from run_in(pool, pow, 2, 3))]

    assert kernel.run(main) == [1, 8]


def test_all_waiters_wake_in_the_order_in_which_they_came() -> None:
    log: list[tuple[int, str]] = []

    async def waiter(number: int, future: Future[str]) -> None:
        log.append((number, await wait_future(future)))

    async def main() -> None:
        future = running_future()
        async with kernel.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(waiter, number, future)
                await wait_all_tasks_blocked()
            in_thread(future.set_result, "all")

    kernel.run(main)
    assert log == [(number, "all") for number in range(5)]


def test_two_runs_wait_for_one_future() -> None:
    future = running_future()
    results: list[str] = []
    both_wait = threading.Barrier(3)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            waiter = nursery.spawn(wait_future, future)
            await wait_all_tasks_blocked()
            both_wait.wait()
        results.append(await waiter)

    threads = [threading.Thread(target=kernel.run, args=(main,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    both_wait.wait()
    future.set_result("both")
    for thread in threads:
        thread.join()
    assert results == ["both", "both"]


@pytest.mark.parametrize(
    "wrong", [None, 3, "future", abs, lambda: Future()], ids=["none", "int", "str", "function", "lambda"]
)
def test_what_is_no_future_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"wait_future\(\) wants a concurrent.futures.Future, not "):
        kernel.run(wait_future, wrong)


def test_futures_of_asyncio_are_refused_with_the_cure() -> None:
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(TypeError, match=r"asyncio's loop: use asyncio\.run_coroutine_threadsafe"):
            kernel.run(wait_future, loop.create_future())
    finally:
        loop.close()


def test_the_cure_for_asyncio_works() -> None:
    """A coroutine of asyncio's, in asyncio's thread, and a task of ours that waits for it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        assert kernel.run(wait_future, asyncio.run_coroutine_threadsafe(asyncio.sleep(0, "theirs"), loop)) == "theirs"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.parametrize("operation", [lambda: wait_future(Future()), lambda: run_in(None, abs, 1)])  # type: ignore[arg-type]
def test_outside_the_kernel_is_an_error_that_says_so(operation: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"(wait_future|run_in)\(\) was used outside the kernel"):
        operation().send(None)


# ---- cancelling the task ---------------------------------------------------------------------------------


@pytest.mark.parametrize("abandon", [False, True])
def test_cancelling_the_task_cancels_a_pending_future(abandon: bool) -> None:
    future: Future[int] = Future()

    async def main() -> bool:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(partial(wait_future, future, abandon_on_cancel=abandon))
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        return nursery.cancel_scope.cancelled_caught

    assert kernel.run(main)
    assert future.cancelled()


def test_a_task_that_is_cancelled_before_it_waits_cancels_a_pending_future_too() -> None:
    future: Future[int] = Future()

    async def main() -> bool:
        with kernel.CancelScope() as scope:
            scope.cancel()
            await wait_future(future)
        return scope.cancelled_caught

    assert kernel.run(main)
    assert future.cancelled()


def test_a_task_that_is_cancelled_leaves_the_result_in_a_future_that_is_done() -> None:
    future: Future[int] = Future()
    future.set_result(3)

    async def main() -> bool:
        with kernel.CancelScope() as scope:
            scope.cancel()
            await wait_future(future)
        return scope.cancelled_caught

    assert kernel.run(main)
    assert future.result(0) == 3


def test_cancelling_one_waiter_cancels_the_future_for_the_others_too() -> None:
    async def main() -> None:
        future: Future[int] = Future()
        async with kernel.open_nursery() as nursery:
            first = nursery.spawn(wait_future, future)
            nursery.start_soon(second, future)
            await wait_all_tasks_blocked()
            first.cancel()

    async def second(future: Future[int]) -> None:
        with pytest.raises(concurrent.futures.CancelledError):
            await wait_future(future)

    kernel.run(main)


def test_work_that_has_begun_is_left_at_once() -> None:
    future = running_future()

    async def main() -> bool:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(wait_future, future)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        return nursery.cancel_scope.cancelled_caught

    assert kernel.run(main)
    assert future.running()


def test_work_that_has_begun_is_waited_for_if_so_wished() -> None:
    log: list[object] = []

    async def main() -> None:
        future = running_future()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(waiter, future)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            with kernel.CancelScope(shield=True):
                await wait_all_tasks_blocked()
                log.append("it waits on")
                future.set_result("done")

    async def waiter(future: Future[str]) -> None:
        log.append(await wait_future(future, abandon_on_cancel=False))
        with pytest.raises(kernel.Cancelled):
            await checkpoint()
        log.append("cancelled afterwards")

    kernel.run(main)
    assert log == ["it waits on", "done", "cancelled afterwards"]


@pytest.mark.parametrize("abandon", [False, True])
@pytest.mark.parametrize("other_thread", [False, True])
def test_a_result_that_comes_just_before_the_cancellation_is_kept(abandon: bool, other_thread: bool) -> None:
    async def main() -> object:
        future = running_future()
        async with kernel.open_nursery() as nursery:
            waiter = nursery.spawn(partial(wait_future, future, abandon_on_cancel=abandon))
            await wait_all_tasks_blocked()
            if other_thread:
                in_thread(future.set_result, "just in time")
            else:
                future.set_result("just in time")
            nursery.cancel_scope.cancel()
        return await waiter

    assert kernel.run(main) == "just in time"


def test_a_result_that_comes_just_after_the_cancellation_wakes_nobody() -> None:
    async def main() -> list[str]:
        log = []
        future = running_future()
        with kernel.CancelScope() as scope:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(wait_future, future)
                await wait_all_tasks_blocked()
                scope.cancel()
                in_thread(future.set_result, "too late")
        log.append("left")
        with kernel.move_on_after(0):
            await kernel.sleep_forever()  # a late wake-up would strike here, or end the run
        log.append("still sound")
        await wait_all_tasks_blocked()
        return log

    assert kernel.run(main) == ["left", "still sound"]


# ---- the future is cancelled by somebody else ------------------------------------------------------------


@pytest.mark.parametrize("other_thread", [False, True])
def test_a_future_cancelled_by_somebody_else_raises_their_cancellederror_and_not_ours(other_thread: bool) -> None:
    async def main() -> None:
        future: Future[int] = Future()
        with kernel.CancelScope() as scope:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(waiter, future)
                await wait_all_tasks_blocked()
                assert in_thread(future.cancel) is None if other_thread else future.cancel()
        assert not scope.cancel_called

    async def waiter(future: Future[int]) -> None:
        with pytest.raises(concurrent.futures.CancelledError) as info:
            await wait_future(future)
        assert not isinstance(info.value, kernel.Cancelled)
        await checkpoint()  # this task is not cancelled

    kernel.run(main)


# ---- the run, the deadlock detector, memory --------------------------------------------------------------


def test_a_future_may_be_settled_after_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """Its callback has nobody left to tell. `concurrent.futures` would log it if that raised."""
    future = running_future()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(wait_future, future)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    with caplog.at_level(logging.DEBUG, "concurrent.futures"):
        kernel.run(main)
        future.set_result(1)
    assert not caplog.records


def test_a_future_may_be_settled_after_a_run_that_broke_off(caplog: pytest.LogCaptureFixture) -> None:
    future = running_future()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(wait_future, future)
            await wait_all_tasks_blocked()
            current_kernel().call_soon(partial(divmod, 1, 0))

    with pytest.raises(kernel.KernelInternalError):
        kernel.run(main)
    gc.collect()
    with caplog.at_level(logging.DEBUG, "concurrent.futures"):
        future.set_result(1)
    assert not caplog.records


def test_no_deadlock_is_reported_while_a_future_is_awaited() -> None:
    future = running_future()
    assert kernel.run(wait_future, future, instruments=[Settled(future)]) == "late"


def test_a_deadlock_is_reported_again_once_the_wait_was_given_up() -> None:
    future = running_future()
    scope = kernel.CancelScope()

    class Impatient(Instrument):
        def before_io_wait(self, timeout: float) -> None:
            if timeout >= 1:  # it was not noticed. Better no deadlock than a test that hangs
                current_kernel().call_soon(scope.cancel)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(wait_future, future)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        with scope:
            await kernel.Event().wait()

    with pytest.raises(kernel.Deadlock):
        kernel.run(main, instruments=[Impatient()])
    assert not future.done()


def test_a_report_shows_the_future() -> None:
    async def main() -> None:
        future = running_future()
        async with kernel.open_nursery() as nursery:
            waiter = nursery.spawn(wait_future, future)
            await wait_all_tasks_blocked()
            tree = kernel.lowlevel.format_task_tree()
            assert f"at {id(future):#x} state=running" in tree
            waiter.cancel()

    kernel.run(main)


def test_a_wait_that_was_given_up_does_not_keep_its_task() -> None:
    """The future can't forget the callback, and may be kept for long."""
    future = running_future()
    tasks: list[weakref.ref[Any]] = []

    async def waiter() -> None:
        tasks.append(weakref.ref(current_task()))
        await wait_future(future)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(waiter)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    kernel.run(main)
    gc.collect()
    assert [task() for task in tasks] == [None]


@pytest.mark.parametrize("settle", ["before", "after"])
def test_an_error_leaves_no_cyclic_garbage(settle: str) -> None:
    class Weakling(Exception):
        pass

    gone: list[weakref.ref[Any]] = []

    def fail(future: Future[Any]) -> None:
        error = Weakling()
        gone.append(weakref.ref(error))
        future.set_exception(error)

    async def later(future: Future[Any]) -> None:
        await wait_all_tasks_blocked()
        in_thread(fail, future)

    async def main() -> None:
        future = running_future()
        async with kernel.open_nursery() as nursery:
            if settle == "after":
                nursery.start_soon(later, future)
            else:
                fail(future)
            try:
                await wait_future(future)
            except Weakling:
                del future
        await checkpoint()
        assert [error() for error in gone] == [None]

    gc.collect()
    gc.disable()
    try:
        kernel.run(main)
    finally:
        gc.enable()


def test_a_future_that_was_given_up_leaves_no_cyclic_garbage() -> None:
    async def main() -> None:
        future = running_future()
        gone = weakref.ref(future)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(wait_future, future)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        del future, nursery
        await checkpoint()
        assert gone() is None

    gc.collect()
    gc.disable()
    try:
        kernel.run(main)
    finally:
        gc.enable()


# ---- executors -------------------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_run_in_returns_what_the_function_returns_or_raises_what_it_raises(pool: ThreadPoolExecutor) -> None:
    async def main() -> None:
        assert await run_in(pool, pow, 2, 5) == 32
        assert await run_in(pool, threading.get_ident) != threading.get_ident()
        with pytest.raises(ZeroDivisionError):
            await run_in(pool, divmod, 1, 0)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await run_in(pool, next, iter(()))

    kernel.run(main)


class Refusing(concurrent.futures.Executor):
    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        pytest.fail("was submitted")


def test_a_cancelled_task_submits_nothing() -> None:
    async def main() -> bool:
        with kernel.CancelScope() as scope:
            scope.cancel()
            await run_in(Refusing(), print)
        return scope.cancelled_caught

    assert kernel.run(main)


def test_work_that_has_not_begun_is_cancelled_with_its_task(pool: ThreadPoolExecutor) -> None:
    go, calls = threading.Event(), []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(run_in, pool, go.wait)
            second = nursery.spawn(run_in, pool, calls.append, 2)
            await wait_all_tasks_blocked()
            second.cancel()
            nursery.start_soon(run_in, pool, calls.append, 3)
            await wait_all_tasks_blocked()
            go.set()

    kernel.run(main)
    assert calls == [3]


@pytest.mark.parametrize("abandon", [False, True])
def test_work_that_has_begun_is_waited_for_unless_abandoned(pool: ThreadPoolExecutor, abandon: bool) -> None:
    begun, go = threading.Event(), threading.Event()
    log: list[str] = []

    def work() -> str:
        begun.set()
        go.wait()
        return "done"

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(waiter)
            await wait_all_tasks_blocked()
            begun.wait()
            nursery.cancel_scope.cancel()
            with kernel.CancelScope(shield=True):
                await wait_all_tasks_blocked()
            log.append("go")
            go.set()

    async def waiter() -> None:
        try:
            # By default it is waited for.
            log.append(await (run_in(pool, work, abandon_on_cancel=True) if abandon else run_in(pool, work)))
        except kernel.Cancelled:
            log.append("left")
            raise

    kernel.run(main)
    assert log == (["left", "go"] if abandon else ["go", "done"])


def test_an_executor_that_was_shut_down_says_so() -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        kernel.run(run_in, pool, print)


def test_work_that_a_shutdown_drops_raises_their_cancellederror(pool: ThreadPoolExecutor) -> None:
    go = threading.Event()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(run_in, pool, go.wait)
            nursery.start_soon(dropped)
            await wait_all_tasks_blocked()
            pool.shutdown(wait=False, cancel_futures=True)
            go.set()

    async def dropped() -> None:
        with pytest.raises(concurrent.futures.CancelledError):
            await run_in(pool, print)

    kernel.run(main)


def test_an_executor_with_futures_of_its_own_kind_is_refused() -> None:
    class Strange:
        def submit(self, fn: Any, *args: Any) -> object:
            return "a future of mine"

    with pytest.raises(TypeError, match=r"not 'a future of mine'.*client\.get_executor\(\)"):
        kernel.run(run_in, Strange(), print)


@pytest.mark.usefixtures("resource_tracker_leaves")
def test_a_pool_of_processes_works_and_says_when_it_is_broken() -> None:
    async def main(pool: ProcessPoolExecutor) -> None:
        assert await run_in(pool, os.getpid) != os.getpid()
        with pytest.raises(BrokenExecutor):
            await run_in(pool, os._exit, 1)
        with pytest.raises(BrokenExecutor):  # by `submit`, this time
            await run_in(pool, os.getpid)

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        kernel.run(main, pool)


@pytest.mark.skipif(sys.version_info < (3, 14), reason="InterpreterPoolExecutor came with Python 3.14")
def test_a_pool_of_interpreters_works() -> None:
    async def main() -> None:
        with concurrent.futures.InterpreterPoolExecutor(1) as pool:  # type: ignore[attr-defined]
            assert await run_in(pool, pow, 2, 5) == 32

    kernel.run(main)


def test_work_whose_task_was_cancelled_has_not_run() -> None:
    """Four threads settle what six tasks submit and give up at the same time. Whatever the race: who gets Cancelled
    has run nothing, and who has run something gets its result.
    """
    ran: list[tuple[int, int]] = []
    got: list[tuple[int, int]] = []
    chance = random.Random(4)

    def work(name: tuple[int, int]) -> tuple[int, int]:
        ran.append(name)
        return name

    async def client(pool: ThreadPoolExecutor, number: int) -> None:
        for i in range(150):
            with kernel.move_on_after(chance.choice([0, 0.000_01, 0.000_1, 1])):
                got.append(await run_in(pool, work, (number, i)))

    async def main(pool: ThreadPoolExecutor) -> None:
        async with kernel.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(client, pool, number)

    with ThreadPoolExecutor(4) as pool:
        kernel.run(main, pool)
    assert sorted(ran) == sorted(got)
    assert 0 < len(got) < 900
