"""Running a blocking function in a thread: `await kernel.to_thread.run_sync(fn, *args)`.

The task sleeps meanwhile and the others go on. What the function does must be fit for a thread; what it calls in the
kernel goes through `kernel.from_thread`. How it works is in `kernel/threads/calls.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Final, ParamSpec, TypeVar

from .core.task import current_kernel, current_task, here
from .core.traps import checkpoint, operation
from .inbox import RunVar
from .sync import CapacityLimiter
from .threads.calls import Call, stands_in

__all__ = ["current_default_thread_limiter", "run_sync"]

T = TypeVar("T")
P = ParamSpec("P")

DEFAULT_LIMIT: Final = 40

_limiter: RunVar[CapacityLimiter] = RunVar("default thread limiter")


def current_default_thread_limiter() -> CapacityLimiter:
    """The limiter of this run's `run_sync`: 40 threads at once, unless you set its `total_tokens`.

    Raises RuntimeError outside the kernel.
    """
    current_kernel("current_default_thread_limiter()")
    return _limiter.get_or_make(lambda: CapacityLimiter(DEFAULT_LIMIT))


@operation
def run_sync(
    sync_fn: Callable[..., T],
    *args: Any,
    thread_name: str | None = None,
    abandon_on_cancel: bool = False,
    limiter: CapacityLimiter | None = None,
) -> Generator[Any, Any, T]:
    """Call `sync_fn(*args)` in a worker thread, and return what it returns or raise what it raises.

    Args:
        thread_name: the thread's name while it does this.
        abandon_on_cancel: a thread cannot be interrupted. So by default a cancellation waits until the function has
            returned, and is raised at the next cancel point; the function may ask `from_thread.check_cancelled()`. With
            True the task leaves at once, the thread goes on by itself, and its result is dropped.
        limiter: bounds how many threads work at once; by default `current_default_thread_limiter()`. Any object with
            `acquire_on_behalf_of` and `release_on_behalf_of` will do. The thread holds a token until the function has
            returned, also when it was abandoned. While it waits for `from_thread.run(afn)`, a thread that `afn` itself
            starts (not a child of it) needs no token: it works in the other's place.

    Context variables are copied. Always a cancel point, before the function is called, and then it was not called;
    always a schedule point. A `StopIteration` is raised as RuntimeError, as in any coroutine. Cost: a round trip takes
    about 10 us.

    Raises:
        BaseException: what the function raises, or the limiter.
        TypeError: `sync_fn` is not callable, or an async function.
        RuntimeError: used outside the kernel; or the system allows no more threads.
    """
    kernel = here.kernel or current_kernel("to_thread.run_sync()")
    task = kernel.current or current_task("to_thread.run_sync()")
    if not callable(sync_fn):
        raise TypeError(f"to_thread.run_sync() wants a function and its arguments, not {sync_fn!r}")
    if task.scope.cancelled is not None:
        yield from checkpoint()
    if limiter is None:
        limiter = kernel.locals.get(_limiter) or current_default_thread_limiter()
    call = Call(kernel, sync_fn, args, limiter, bool(abandon_on_cancel), thread_name)
    if not stands_in(limiter):
        yield from limiter.acquire_on_behalf_of(call)
        call.borrows = True
    result: T = yield from call.run()
    return result
