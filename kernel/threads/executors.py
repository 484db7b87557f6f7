"""Other people's executors: anything that gives out `concurrent.futures.Future`s.

    result = await run_in(executor, fn, *args)      a pool of threads, processes or interpreters; Dask's; ...
    result = await wait_future(future)              a future you have already, such as Ray's ref.future()

    task                             future                            somebody's thread
    ----                             ------                            ----------------
    yield WaitFuture  -- callback ->  pending, then running
    (asleep)                         done      <---------------------  set_result()
    result       <----- inbox -----  callback
    Cancelled    ------ cancel ---->  cancelled, if it was still pending

A future calls back in whatever thread has settled it, so the wake-up goes through the inbox. Cancelling goes the other
way: the future is asked to cancel itself, which it does if its work has not begun. Work that has begun can't be taken
back; `abandon_on_cancel` says whether to wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.errors import RunFinishedError
from ..core.task import Task, current_kernel, here
from ..core.traps import Trap, checkpoint_if_cancelled, consume_budget, operation
from ..inbox import KernelToken, current_kernel_token

if TYPE_CHECKING:
    from ..core.loop import Kernel

__all__ = ["run_in", "wait_future"]

T = TypeVar("T")


class _WaitFuture(Trap):
    """Sleep until `on`, a future, is done. That may happen in any thread, and before we sleep."""

    __slots__ = ("abandon", "on", "task", "token")

    def __init__(self, future: Future[Any], abandon: bool) -> None:
        self.abandon = abandon
        self.on: Any = future
        self.task: Task | None = None
        self.token: KernelToken | None = current_kernel_token()

    def arm(self, kernel: Kernel, task: Task) -> None:
        self.task = task
        self.on.add_done_callback(self._done)

    def abort(self, kernel: Kernel, task: Task) -> bool:
        if self.on.cancel() or (self.abandon and not self.on.done()):
            self._let_go()
            return True
        return False  # it is done, and the wake-up is on its way; or it shall be waited for

    def _done(self, future: Future[Any]) -> None:
        """In any thread."""
        token = self.token
        if token is not None:
            with suppress(RunFinishedError):
                token.run_sync_soon(self._wake)

    def _wake(self) -> None:
        task = self._let_go()
        if task is not None:
            current_kernel().wake(task)

    def _let_go(self) -> Task | None:
        """The wait is over. A future never forgets a callback: it must not keep the task by this one, nor itself, nor
        make the deadlock detector believe that somebody will call.
        """
        task = self.task
        self.on = self.task = self.token = None
        return task

    def __repr__(self) -> str:
        return f"<WaitFuture {self.on!r}>"


@operation
def wait_future(future: Future[T], *, abandon_on_cancel: bool = True) -> Generator[Any, Any, T]:
    """Wait until `future` is done; return its result or raise its error.

    If the waiting task is cancelled, the future is cancelled, for all who wait for it. If its work has begun already,
    that can't be taken back: the task leaves at once and the work goes on by itself, or with `abandon_on_cancel=False`
    the task stays until it is done, and sees the cancellation at its next cancel point. A future that is done when the
    cancellation comes keeps its result, and so does this.

    Always a cancel point; a schedule point if the future is not done, or the budget is used up. Several tasks, of
    several runs, may wait for one future. Each wait that was abandoned leaves some 150 bytes with it until it is done.

    Raises:
        BaseException: the future's error. concurrent.futures.CancelledError: somebody else has cancelled it.
        TypeError: `future` is no `concurrent.futures.Future`.
        RuntimeError: used outside the kernel.
    """
    _ = here.kernel or current_kernel("wait_future()")
    if not isinstance(future, Future):
        raise TypeError(
            f"wait_future() wants a concurrent.futures.Future, not {future!r}. asyncio's belong to asyncio's loop: use "
            "asyncio.run_coroutine_threadsafe(). Ray gives one out with ref.future(), and Dask's executor, "
            "client.get_executor(), does too."
        )
    try:
        if future.done():
            yield from consume_budget()
        else:
            yield from _WaitFuture(future, abandon_on_cancel)
        return future.result(timeout=0)
    finally:
        del future  # an error would know this frame by its traceback, and this frame the error by its future


@operation
def run_in(
    executor: Executor, fn: Callable[..., T], *args: Any, abandon_on_cancel: bool = False
) -> Generator[Any, Any, T]:
    """`executor.submit(fn, *args)`, and wait for the result.

    `executor` is any `concurrent.futures.Executor`, or an object with such a `submit`: a pool of threads, processes or
    interpreters, or a cluster. If the task is cancelled, so is work that has not begun. For work that has begun the
    task stays, so that nothing goes on behind its back; with `abandon_on_cancel` it leaves at once, and the result is
    dropped. The executor remains yours to shut down.

    Always a cancel point, before `fn` is submitted, and then it was not; always a schedule point. `submit` itself runs
    in the kernel's thread: a pool that starts a process there takes some ms. Context variables are not carried.

    Raises:
        BaseException: what `fn` raises; or what the executor does, such as RuntimeError after its shutdown, or
            `concurrent.futures.BrokenExecutor` when a worker has died.
        concurrent.futures.CancelledError: the executor has dropped the work, as in `shutdown(cancel_futures=True)`.
        RuntimeError: used outside the kernel.
    """
    _ = here.kernel or current_kernel("run_in()")
    yield from checkpoint_if_cancelled()
    result: T = yield from wait_future(executor.submit(fn, *args), abandon_on_cancel=abandon_on_cancel)
    return result
