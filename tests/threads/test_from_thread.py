"""from_thread: calls from a thread into the kernel, who serves them, and that each gets an answer."""

from __future__ import annotations

import concurrent.futures
import contextvars
import gc
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest

import kernel
from kernel import Cancelled, CancelScope, CapacityLimiter, RunFinishedError, from_thread, to_thread
from kernel.drivers.poller import default_poller
from kernel.inbox import when_run_ends
from kernel.lowlevel import (
    KernelToken,
    checkpoint,
    current_kernel,
    current_kernel_token,
    current_root_task,
    current_task,
    in_kernel_run,
    in_kernel_task,
    spawn_system_task,
)
from kernel.testing import wait_all_tasks_blocked
from kernel.threads import cache, calls


@pytest.fixture
def log() -> list[Any]:
    return []


class Foreign:
    """A thread that no kernel has started. `result()` waits for it, not in a kernel."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._outcome: Any = None
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], Any]) -> None:
        try:
            self._outcome = function(), None
        except BaseException as error:
            self._outcome = None, error

    def result(self) -> Any:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the thread waits for ever"
        result, error = self._outcome
        try:
            if error is not None:
                raise error
            return result
        finally:
            del error, self._outcome


async def joined(thread: Foreign) -> Any:
    return await to_thread.run_sync(thread.result)


async def no_calls() -> None:
    while calls._state_of(current_kernel()).calls:
        await kernel.sleep(0.001)


def wait_for_workers() -> None:
    while any(
        thread.name.startswith("kernel worker") and thread not in {worker.thread for worker in list(cache._idle)}
        for thread in threading.enumerate()
    ):
        time.sleep(0.001)


class BreakingPoller:
    """Fails once it was told to, which is the end of the run on the spot."""

    def __init__(self) -> None:
        self.inner = default_poller()
        self.broken = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def poll(self, timeout: float) -> Any:
        if self.broken:
            self.broken = False
            raise OSError("broken")
        return self.inner.poll(timeout)


# ---- results ------------------------------------------------------------------------------------------


async def add(a: int, b: int) -> int:
    await checkpoint()
    return a + b


def add_in_generator_style(a: int, b: int) -> Iterator[Any]:
    yield from checkpoint()
    return a + b


@pytest.mark.parametrize("function", [add, add_in_generator_style])
def test_run_gives_what_the_async_function_returns(function: Any) -> None:
    async def main() -> None:
        assert await to_thread.run_sync(from_thread.run, function, 1, 2) == 3
        token = current_kernel_token()
        assert await to_thread.run_sync(lambda: from_thread.run(function, 1, 2, kernel_token=token)) == 3

    kernel.run(main)


def test_run_sync_gives_what_the_function_returns() -> None:
    async def main() -> None:
        assert await to_thread.run_sync(from_thread.run_sync, divmod, 17, 5) == (3, 2)
        token = current_kernel_token()
        assert await to_thread.run_sync(lambda: from_thread.run_sync(divmod, 17, 5, kernel_token=token)) == (3, 2)

    kernel.run(main)


class OfItsOwn(BaseException):
    pass


@pytest.mark.parametrize("kind", [ValueError, OfItsOwn, KeyboardInterrupt, SystemExit, StopIteration])
@pytest.mark.parametrize("with_token", [False, True])
def test_what_it_raises_is_raised_in_the_thread_and_nothing_else_is_harmed(
    kind: type[BaseException], with_token: bool
) -> None:
    def fail() -> None:
        raise kind("in the kernel")

    async def afail() -> None:
        await checkpoint()
        raise kind("in the kernel")

    async def main() -> None:
        token = current_kernel_token() if with_token else None

        def thread() -> None:
            with pytest.raises(kind, match="in the kernel"):
                from_thread.run_sync(fail, kernel_token=token)
            with pytest.raises(kind if kind is not StopIteration else RuntimeError):
                from_thread.run(afail, kernel_token=token)

        await to_thread.run_sync(thread)
        await checkpoint()

    kernel.run(main)


def test_what_is_no_function_or_of_the_wrong_colour_is_a_type_error() -> None:
    async def main() -> None:
        for wrong in (None, int, "add"):
            with pytest.raises(TypeError, match=r"from_thread.run wants an async function"):
                await to_thread.run_sync(from_thread.run, wrong)
        for wrong in (checkpoint, lambda: add(1, 2)):
            with pytest.raises(TypeError, match=r"from_thread.run_sync wants a plain function"):
                await to_thread.run_sync(from_thread.run_sync, wrong)

    kernel.run(main)


# ---- who serves -----------------------------------------------------------------------------------------


def test_the_task_that_waits_for_the_thread_serves_it() -> None:
    async def whoami() -> Any:
        await checkpoint()
        return current_task(), threading.current_thread()

    async def main() -> None:
        me = current_task(), threading.current_thread()

        def thread() -> None:
            assert from_thread.run(whoami) == me
            assert from_thread.run_sync(lambda: (current_task(), threading.current_thread())) == me
            assert from_thread.run(whoami) == me

        await to_thread.run_sync(thread)
        await to_thread.run_sync(thread, abandon_on_cancel=True)
        assert current_task() is me[0]

    kernel.run(main)


def test_with_a_token_a_system_task_serves_it_or_nobody() -> None:
    async def parent() -> Any:
        await checkpoint()
        nursery = current_task().parent_nursery
        assert nursery is not None
        return nursery.parent_task is current_root_task()

    async def main() -> None:
        token = current_kernel_token()

        def thread() -> None:
            assert from_thread.run(parent, kernel_token=token) is True
            assert from_thread.run_sync(lambda: (in_kernel_run(), in_kernel_task()), kernel_token=token) == (
                True, False,
            )  # fmt: skip

        await to_thread.run_sync(thread)
        await joined(Foreign(thread))

    kernel.run(main)


def test_a_thread_that_was_abandoned_is_served_by_a_system_task(log: list[Any]) -> None:
    async def whoami() -> Any:
        await checkpoint()
        nursery = current_task().parent_nursery
        assert nursery is not None
        return nursery.parent_task

    async def main() -> None:
        left = threading.Event()

        def thread() -> None:
            from_thread.run_sync(scope.cancel)
            assert left.wait(60)
            log.append(from_thread.run(whoami) is root)
            log.append(from_thread.run_sync(in_kernel_task))

        root = current_root_task()
        with CancelScope() as scope:
            await to_thread.run_sync(thread, abandon_on_cancel=True)
        assert scope.cancelled_caught
        left.set()
        await no_calls()

    kernel.run(main)
    assert log == [True, False]


def test_what_cancels_the_task_cancels_what_its_thread_does_in_the_kernel(log: list[Any]) -> None:
    async def main() -> None:
        def thread() -> None:
            log.append("before")
            try:
                from_thread.run(kernel.sleep_forever)
            except Cancelled:
                log.append("cancelled in the thread")
                raise

        async def child() -> None:
            with CancelScope() as scope:
                scopes.append(scope)
                await to_thread.run_sync(thread)
            log.append(scope.cancelled_caught)

        scopes: list[CancelScope] = []
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            while not log:
                await kernel.sleep(0.001)
            await wait_all_tasks_blocked()
            scopes[0].cancel()

    kernel.run(main)
    assert log == ["before", "cancelled in the thread", True]


def test_a_cancelled_task_still_serves_and_what_it_runs_is_cancelled_at_its_first_checkpoint(log: list[Any]) -> None:
    async def main() -> None:
        async def inner() -> None:
            log.append("begun")
            await checkpoint()
            log.append("unreachable")

        def thread() -> str:
            from_thread.run_sync(scope.cancel)
            log.append(from_thread.run_sync(lambda: current_task() is task))
            with pytest.raises(Cancelled):
                from_thread.run(inner)
            return "result"

        task = current_task()
        with CancelScope() as scope:
            log.append(await to_thread.run_sync(thread))
            await checkpoint()
            log.append("unreachable")

    kernel.run(main)
    assert log == [True, "begun", "result"]


@pytest.mark.parametrize("busy", [0, 100])
def test_a_thread_that_is_quick_after_the_reply_does_not_overtake_its_task(busy: int) -> None:
    """With many tasks ready, the task that has served the thread takes passes to get back to sleep. The thread may have
    returned, or called again, by then.
    """

    async def main() -> None:
        stop = False

        async def other() -> None:
            while not stop:
                await checkpoint()

        async def asked() -> Any:
            return current_task()

        def thread(host: Any) -> str:
            for _ in range(20):
                assert from_thread.run(asked) is host
                assert from_thread.run_sync(current_task) is host
            return "result"

        async with kernel.open_nursery() as nursery:
            for _ in range(busy):
                nursery.start_soon(other)
            for _ in range(3):
                assert await to_thread.run_sync(thread, current_task()) == "result"
            stop = True

    kernel.run(main)


def test_threads_and_the_kernel_may_call_each_other_many_levels_deep() -> None:
    async def down(levels: int) -> int:
        return await to_thread.run_sync(up, levels) + 1

    def up(levels: int) -> int:
        return from_thread.run(down, levels - 1) + 1 if levels else 0

    assert kernel.run(down, 20) == 41


# ---- limiters -----------------------------------------------------------------------------------------------


def test_thread_to_kernel_to_thread_with_a_limiter_of_one_is_no_deadlock(log: list[Any]) -> None:
    """The thread that waits for the kernel lends its token to the one that is started meanwhile, and that one to the
    next.
    """

    async def main() -> None:
        limiter = CapacityLimiter(1)

        async def down(levels: int) -> None:
            await to_thread.run_sync(up, levels, limiter=limiter)

        def up(levels: int) -> None:
            log.append(limiter.borrowed_tokens)
            if levels:
                from_thread.run(down, levels - 1)
                from_thread.run(down, 0)

        with kernel.fail_after(60):
            await down(3)
        assert limiter.statistics().borrowers == []

    kernel.run(main)
    assert set(log) == {1}


@pytest.mark.parametrize("route", ["token", "abandoned"])
def test_a_thread_served_by_a_system_task_lends_its_token_too(route: str, log: list[Any]) -> None:
    async def main() -> None:
        limiter = CapacityLimiter(1)
        token = current_kernel_token() if route == "token" else None
        left = threading.Event()

        async def again() -> None:
            with kernel.fail_after(60):
                log.append(await to_thread.run_sync(lambda: limiter.borrowed_tokens, limiter=limiter))

        def thread() -> None:
            if route == "abandoned":
                from_thread.run_sync(scope.cancel)
                assert left.wait(60)
            from_thread.run(again, kernel_token=token)

        with CancelScope() as scope:
            await to_thread.run_sync(thread, limiter=limiter, abandon_on_cancel=True)
        left.set()
        await no_calls()
        assert limiter.borrowed_tokens == 0

    kernel.run(main)
    assert log == [1]


def test_a_token_is_lent_to_the_task_that_serves_and_not_to_others_it_starts() -> None:
    async def main() -> None:
        limiter = CapacityLimiter(1)

        async def several() -> None:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(lambda: to_thread.run_sync(int, limiter=limiter))
                await wait_all_tasks_blocked()
                assert limiter.statistics().tasks_waiting == 1
                nursery.cancel_scope.cancel()

        await to_thread.run_sync(from_thread.run, several, limiter=limiter)
        await to_thread.run_sync(int, limiter=limiter)

    kernel.run(main)


def test_in_a_cancelled_scope_no_function_is_called_in_the_lenders_place_either(log: list[Any]) -> None:
    async def main() -> None:
        limiter = CapacityLimiter(1)

        async def inner() -> None:
            with CancelScope() as scope:
                scope.cancel()
                await to_thread.run_sync(log.append, "called", limiter=limiter)
            assert scope.cancelled_caught

        await to_thread.run_sync(from_thread.run, inner, limiter=limiter)

    kernel.run(main)
    assert log == []


# ---- contexts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_token", [False, True])
def test_context_variables_are_copied_into_the_kernel_and_not_back(with_token: bool) -> None:
    var = contextvars.ContextVar[str]("var")

    async def change() -> str:
        before = var.get()
        var.set("changed")
        await checkpoint()
        assert var.get() == "changed"
        return before

    def change_sync() -> str:
        before = var.get()
        var.set("changed")
        return before

    async def main() -> None:
        token = current_kernel_token() if with_token else None

        def thread() -> None:
            assert var.get() == "task's"
            var.set("thread's")
            assert from_thread.run(change, kernel_token=token) == "thread's"
            assert from_thread.run_sync(change_sync, kernel_token=token) == "thread's"
            assert var.get() == "thread's"
            future = from_thread.submit(change, kernel_token=token)
            assert future.result(60) == "thread's"
            with pytest.raises(ZeroDivisionError):
                from_thread.run_sync(divmod, 1, 0, kernel_token=token)

        var.set("task's")
        await to_thread.run_sync(thread)
        assert var.get() == "task's"
        await checkpoint()
        assert var.get() == "task's"

    kernel.run(main)


# ---- tokens, and other threads -----------------------------------------------------------------------------------


def test_a_thread_of_nobodys_needs_a_token() -> None:
    for call in (from_thread.run, from_thread.run_sync, from_thread.submit):
        with pytest.raises(RuntimeError, match=r"not started by to_thread\.run_sync"):
            call(checkpoint)
    with pytest.raises(RuntimeError, match=r"to_thread.run_sync\(\) has not started"):
        from_thread.check_cancelled()
    with pytest.raises(RuntimeError, match="kernel_token must be what"):
        from_thread.run(checkpoint, kernel_token="token")  # type: ignore[arg-type]


def test_a_worker_belongs_to_a_run_only_while_it_works_for_it() -> None:
    async def main() -> None:
        await to_thread.run_sync(int)
        results: SimpleQueue[Any] = SimpleQueue()
        kernel.lowlevel.start_thread_soon(lambda: from_thread.run_sync(int), results.put)
        with pytest.raises(RuntimeError, match="not started by"):
            results.get(timeout=60).unwrap()

    kernel.run(main)


def test_in_the_kernels_own_thread_it_is_refused_and_told_why() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="await the function"):
            from_thread.run_sync(int)
        with pytest.raises(RuntimeError, match="would wait for itself"):
            from_thread.run_sync(int, kernel_token=current_kernel_token())
        with pytest.raises(RuntimeError, match="would wait for itself"):
            from_thread.run(checkpoint, kernel_token=current_kernel_token())

    kernel.run(main)


def test_a_thread_that_runs_another_kernel_may_call_the_first_one_with_a_token_or_for_whom_it_works() -> None:
    async def first() -> None:
        token = current_kernel_token()
        host = current_task()

        async def second() -> None:
            assert current_kernel_token() is not token
            assert from_thread.run(add, 1, 2, kernel_token=token) == 3
            assert from_thread.run_sync(current_kernel_token, kernel_token=token) is token
            assert from_thread.run_sync(current_task) is host
            assert await to_thread.run_sync(from_thread.run_sync, current_kernel_token) is current_kernel_token()
            future = from_thread.submit(add, 1, 2, kernel_token=token)
            assert await kernel.wait_future(future) == 3

        await to_thread.run_sync(kernel.run, second)

    kernel.run(first)


# ---- check_cancelled ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abandon", [False, True])
def test_check_cancelled_raises_from_the_cancellation_on_and_says_why(abandon: bool, log: list[Any]) -> None:
    async def main() -> None:
        def thread() -> None:
            from_thread.check_cancelled()
            from_thread.run_sync(scope.cancel, "enough")
            from_thread.run_sync(int)  # by now the task sleeps again, or has left
            for _ in range(2):
                with pytest.raises(Cancelled) as caught:
                    from_thread.check_cancelled()
                log.append(caught.value.reason)
            from_thread.check_cancelled()

        with CancelScope() as scope:
            await to_thread.run_sync(thread, abandon_on_cancel=abandon)
        assert scope.cancelled_caught
        await no_calls()

    kernel.run(main)
    assert log == ["enough", "enough"]


# ---- the end of the run -----------------------------------------------------------------------------------------


def test_after_the_run_a_call_is_refused() -> None:
    async def main() -> KernelToken:
        return current_kernel_token()

    token = kernel.run(main)
    with pytest.raises(RunFinishedError):
        from_thread.run(checkpoint, kernel_token=token)
    with pytest.raises(RunFinishedError):
        from_thread.run_sync(int, kernel_token=token)
    with pytest.raises(RunFinishedError):
        from_thread.submit(checkpoint, kernel_token=token)


def test_when_the_run_ends_what_a_foreign_thread_waits_for_is_cancelled() -> None:
    threads: list[Foreign] = []

    async def main() -> None:
        token = current_kernel_token()
        begun = kernel.Event()

        async def wait() -> None:
            begun.set()
            await kernel.sleep_forever()

        threads.append(Foreign(lambda: from_thread.run(wait, kernel_token=token)))
        await begun.wait()

    kernel.run(main)
    with pytest.raises(Cancelled):
        threads[0].result()


def test_a_call_that_comes_as_the_run_ends_is_answered_with_run_finished() -> None:
    """From a finalizer of an async generator, which runs when system tasks can't be started any more."""
    threads: list[Foreign] = []

    async def numbers(token: KernelToken) -> AsyncGenerator[int, None]:
        try:
            yield 1
        finally:
            with CancelScope(shield=True):
                threads.append(Foreign(lambda: from_thread.run(checkpoint, kernel_token=token)))
                threads.append(Foreign(lambda: from_thread.submit(checkpoint, kernel_token=token).result(60)))
                await kernel.sleep(0)
                for thread in threads:
                    while thread._thread.is_alive():
                        await kernel.sleep(0.001)

    async def main() -> None:
        generator = numbers(current_kernel_token())
        await anext(generator)
        kept.append(generator)

    kept: list[Any] = []
    kernel.run(main)
    for thread in threads:
        with pytest.raises(RunFinishedError):
            thread.result()


@pytest.mark.parametrize("what", ["run", "run in the host", "submit"])
def test_when_the_run_crashes_a_thread_that_waits_gets_run_finished(what: str) -> None:
    poller = BreakingPoller()
    threads: list[Any] = []
    errors: SimpleQueue[BaseException] = SimpleQueue()

    async def main() -> None:
        token = current_kernel_token()
        begun = kernel.Event()

        async def wait() -> None:
            begun.set()
            await kernel.sleep_forever()

        def worker() -> None:
            try:
                from_thread.run(wait)
            except BaseException as error:
                errors.put(error)

        async with kernel.open_nursery() as nursery:
            if what == "run":
                threads.append(Foreign(lambda: from_thread.run(wait, kernel_token=token)))
            elif what == "submit":
                threads.append(Foreign(lambda: from_thread.submit(wait, kernel_token=token).result(60)))
            else:
                nursery.start_soon(to_thread.run_sync, worker)
            await begun.wait()
            poller.broken = True
            await kernel.sleep_forever()

    with pytest.raises(kernel.KernelInternalError):
        kernel.run(main, poller=poller)
    for thread in threads:
        with pytest.raises(RunFinishedError):
            thread.result()
    if not threads:
        assert type(errors.get(timeout=60)) is RunFinishedError
        wait_for_workers()
    gc.collect()


@pytest.mark.parametrize("what", ["run", "run_sync", "submit"])
def test_a_call_of_a_thread_that_the_end_of_the_run_waits_for_is_answered_with_run_finished(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is over, but for the thread that was abandoned, which is waited for a little. Nobody can serve it."""
    monkeypatch.setattr(calls, "PATIENCE", 60.0)
    log: list[Any] = []
    gate = threading.Event()

    def thread() -> None:
        from_thread.run_sync(scopes[0].cancel)
        assert gate.wait(60)
        try:
            if what == "run":
                from_thread.run(checkpoint)
            elif what == "run_sync":
                from_thread.run_sync(log.append, "unreachable")
            else:
                from_thread.submit(checkpoint).result(60)
        except RunFinishedError:
            log.append("finished")

    scopes: list[CancelScope] = []

    async def main() -> None:
        with CancelScope() as scope:
            scopes.append(scope)
            await to_thread.run_sync(thread, abandon_on_cancel=True)
        when_run_ends(current_kernel(), gate.set)

    kernel.run(main)
    assert log == ["finished"]


# ---- submit ---------------------------------------------------------------------------------------------------


def test_submit_returns_a_future_of_the_result_or_the_error() -> None:
    async def fail() -> None:
        await checkpoint()
        raise ValueError("in the kernel")

    async def main() -> None:
        def thread() -> None:
            future = from_thread.submit(add, 1, 2)
            assert isinstance(future, concurrent.futures.Future)
            assert future.result(60) == 3
            assert isinstance(from_thread.submit(fail).exception(60), ValueError)
            assert isinstance(from_thread.submit(None).exception(60), TypeError)  # type: ignore[arg-type]

        await to_thread.run_sync(thread)

    kernel.run(main)


def test_submit_does_not_wait_and_many_may_be_under_way() -> None:
    async def main() -> None:
        event = kernel.Event()

        def thread() -> int:
            futures = [from_thread.submit(event.wait) for _ in range(100)]
            assert not any(future.done() for future in futures)
            from_thread.run_sync(event.set)
            done, undone = concurrent.futures.wait(futures, 60)
            assert not undone
            return len(done)

        assert await to_thread.run_sync(thread) == 100

    kernel.run(main)


def test_submit_may_be_used_in_the_kernels_own_thread_with_the_token() -> None:
    async def main() -> None:
        future = from_thread.submit(add, 1, 2, kernel_token=current_kernel_token())
        assert not future.done()
        assert await kernel.wait_future(future) == 3

    kernel.run(main)


def test_cancelling_the_future_cancels_the_task(log: list[Any]) -> None:
    async def main() -> None:
        begun = threading.Event()
        ended = kernel.Event()

        async def work() -> None:
            begun.set()
            try:
                await kernel.sleep_forever()
            except Cancelled as cancelled:
                log.append(cancelled.reason)
                raise
            finally:
                ended.set()

        def thread() -> None:
            future = from_thread.submit(work)
            assert begun.wait(60)
            assert future.cancel()
            assert future.cancelled()
            with pytest.raises(concurrent.futures.CancelledError):
                future.result(60)
            assert concurrent.futures.wait([future], 60).done == {future}

        await to_thread.run_sync(thread)
        await ended.wait()

    kernel.run(main)
    assert log == ["its future was cancelled"]


def test_a_future_cancelled_before_its_task_was_started_keeps_it_from_starting(log: list[Any]) -> None:
    async def work() -> None:
        log.append("unreachable")

    async def main() -> None:
        future = from_thread.submit(work, kernel_token=current_kernel_token())
        assert future.cancel()
        await wait_all_tasks_blocked()
        assert concurrent.futures.wait([future], 0).done == {future}

    kernel.run(main)
    assert log == []


def test_a_future_cancelled_from_a_thread_mid_start_leaves_no_task_behind_and_breaks_nothing() -> None:
    """At any moment between `submit` and the first steps of the task."""
    begun = ended = 0

    async def work() -> None:
        nonlocal begun, ended
        begun += 1
        try:
            await kernel.sleep_forever()
        finally:
            ended += 1

    async def main() -> None:
        nursery = current_kernel().system_nursery
        assert nursery is not None
        before = len(nursery.child_tasks)
        token = current_kernel_token()

        def thread() -> None:
            for _ in range(100):
                assert from_thread.submit(work, kernel_token=token).cancel()

        async with kernel.open_nursery() as threads:
            for _ in range(3):
                threads.start_soon(to_thread.run_sync, thread)
        await wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == before
        assert begun == ended

    kernel.run(main)


def test_a_task_that_ends_though_it_was_cancelled_does_no_harm(log: list[Any]) -> None:
    async def main() -> None:
        begun = threading.Event()

        async def work() -> str:
            begun.set()
            try:
                await kernel.sleep_forever()
            except Cancelled:
                log.append("stubborn")
            return "result"

        def thread() -> None:
            future = from_thread.submit(work)
            assert begun.wait(60)
            assert future.cancel()
            assert not future.done() or future.cancelled()

        await to_thread.run_sync(thread)
        await wait_all_tasks_blocked()

    kernel.run(main)
    assert log == ["stubborn"]


def test_a_future_that_is_done_cannot_be_cancelled() -> None:
    async def main() -> None:
        def thread() -> None:
            future = from_thread.submit(add, 1, 2)
            assert future.result(60) == 3
            assert not future.cancel()

        await to_thread.run_sync(thread)

    kernel.run(main)


def test_the_run_does_not_wait_for_what_was_submitted_and_the_future_says_so() -> None:
    futures: list[concurrent.futures.Future[Any]] = []

    async def main() -> None:
        futures.append(from_thread.submit(kernel.sleep_forever, kernel_token=current_kernel_token()))
        await wait_all_tasks_blocked()
        futures.append(from_thread.submit(kernel.sleep_forever, kernel_token=current_kernel_token()))

    kernel.run(main)
    for future in futures:
        assert isinstance(future.exception(0), RunFinishedError)
        assert not future.cancel()


def test_cancelling_a_future_after_the_run_is_no_error() -> None:
    async def main() -> concurrent.futures.Future[Any]:
        return from_thread.submit(add, 1, 2, kernel_token=current_kernel_token())

    future = kernel.run(main)
    assert future.cancel() is False


# ---- memory ---------------------------------------------------------------------------------------------------


def test_calls_from_threads_leave_no_cycles_behind() -> None:
    class Thing:
        pass

    class Failed(Exception):
        pass

    async def fail(thing: Thing) -> None:
        await checkpoint()
        raise Failed

    async def keep(thing: Thing) -> Thing:
        await checkpoint()
        return Thing()

    refs: list[weakref.ref[Any]] = []

    def thread() -> None:
        thing = Thing()
        refs.append(weakref.ref(thing))
        refs.append(weakref.ref(from_thread.run(keep, thing)))
        refs.append(weakref.ref(from_thread.run_sync(lambda _: Thing(), thing)))
        try:
            from_thread.run(fail, thing)
        except Failed as error:
            refs.append(weakref.ref(error))

    async def main() -> None:
        await to_thread.run_sync(thread)
        await checkpoint()
        assert [ref() for ref in refs] == [None] * 4

    gc.collect()
    gc.disable()
    try:
        kernel.run(main)
    finally:
        gc.enable()


def test_a_system_task_of_the_programs_can_be_started_by_a_thread(log: list[Any]) -> None:
    async def main() -> None:
        done = kernel.Event()

        async def service() -> None:
            log.append("service")
            done.set()

        await to_thread.run_sync(from_thread.run_sync, spawn_system_task, service)
        await done.wait()

    kernel.run(main)
    assert log == ["service"]
