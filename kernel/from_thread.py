"""Calling into the kernel from a thread, and waiting for the answer.

In a thread that `to_thread.run_sync` has started, these find their run by themselves. In any other thread, pass
`kernel_token=`, which `kernel.lowlevel.current_kernel_token()` gives you in the kernel.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

from .core.task import here
from .inbox import KernelToken
from .threads.calls import Message, Submission, this_thread

__all__ = ["check_cancelled", "run", "run_sync", "submit"]

T = TypeVar("T")


def run(
    async_fn: Callable[..., Awaitable[T] | Generator[Any, Any, T]], *args: Any, kernel_token: KernelToken | None = None
) -> T:
    """Run `async_fn(*args)` in the kernel, and block this thread until it returns. Returns or raises what it does.

    Without `kernel_token`: the task that waits for this thread runs it itself, so it is cancelled with that task and
    sees its scopes. If that task has abandoned this thread, or with a token, a system task runs it. Either way in a
    copy of this thread's context (`contextvars`). Cost: about 30 us.

    Raises:
        BaseException: what `async_fn` raises, `Cancelled` included.
        RunFinishedError: the run has ended, or ends without having got to it.
        RuntimeError: no token, and this thread was not started by `to_thread.run_sync`; or this is the thread of the
            very kernel that would have to answer.
        TypeError: `async_fn` is no async function.
    """
    result: T = _send(Message(async_fn, args, is_async=True), kernel_token)
    return result


def run_sync(fn: Callable[..., T], *args: Any, kernel_token: KernelToken | None = None) -> T:
    """Call `fn(*args)` in the kernel's thread, and block this thread until it returns. As `run`, for plain functions.

    Without a token it is called in the task that waits for this thread; otherwise between two steps, in no task.
    Errors are those of `run`; TypeError if `fn` is an async function.
    """
    result: T = _send(Message(fn, args, is_async=False), kernel_token)
    return result


def _send(message: Message, kernel_token: KernelToken | None) -> Any:
    token = _address(kernel_token)
    if here.kernel is not None and here.kernel.locals.get(KernelToken) is token:
        raise RuntimeError(
            "from_thread was used in the kernel's own thread, which would wait for itself. Await the function instead."
        )
    token.run_sync_soon(message.post, this_thread.call if kernel_token is None else None)
    return message.wait()


def _address(kernel_token: KernelToken | None) -> KernelToken:
    """The run that this thread may call: the one it was told, or the one that it works for."""
    if kernel_token is not None:
        if not isinstance(kernel_token, KernelToken):
            raise RuntimeError(f"kernel_token must be what current_kernel_token() returns, not {kernel_token!r}")
        return kernel_token
    if this_thread.call is None:
        raise RuntimeError(
            "this thread was not started by to_thread.run_sync(), so it belongs to no run. Pass kernel_token=, which "
            "current_kernel_token() returns in the kernel; and if this is the kernel's own thread, await the function."
        )
    return this_thread.call.token


def check_cancelled() -> None:
    """Raise `Cancelled` if the task that waits for this thread is cancelled, or has abandoned it. For long functions.

    Raises:
        Cancelled: so it is. Let it pass: the task gets it.
        KeyboardInterrupt: the task is the main task, and a Ctrl-C waits for it. Let it pass too.
        RuntimeError: this thread was not started by `to_thread.run_sync`.
    """
    call = this_thread.call
    if call is None:
        raise RuntimeError("check_cancelled() was called in a thread that to_thread.run_sync() has not started")
    call.check_cancelled()


def submit(
    async_fn: Callable[..., Awaitable[T] | Generator[Any, Any, T]], *args: Any, kernel_token: KernelToken | None = None
) -> Future[T]:
    """Start `async_fn(*args)` in the kernel, in a system task, and return a future of its result. Does not block.

    `future.cancel()` cancels the task, at any time until it has ended; the future counts as cancelled at once. If the
    run ends first, the future fails with RunFinishedError. May be used in the kernel's own thread, given the token.

    Raises:
        RunFinishedError: the run has ended.
        RuntimeError, TypeError: as `run`; but what is wrong with `async_fn` itself is the future's error.
    """
    token = _address(kernel_token)
    submission: Submission[T] = Submission(async_fn, args, token)
    token.run_sync_soon(submission.start)
    return submission.future
