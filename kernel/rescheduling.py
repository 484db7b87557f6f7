"""trio's low-level vocabulary, spelled on our traps; and coroutines that move from one kernel to another.

What trio does in two calls is a trap here: what you do before `wait_task_rescheduled(abort_fn)` is its `arm`, the
`abort_fn` is its `abort`, and `reschedule` is `kernel.wake`. So this file is small. For a new primitive, write a trap
(docs/traps.md); this is for code that comes from trio, and for a wait that is used once.

Detaching: a coroutine object is not tied to its task. It can go on under another event loop and come back, if both
loops agree on the moments. `permanently_detach_coroutine_object` ends the task and leaves the coroutine.
`temporarily_detach_coroutine_object` lets the task sleep meanwhile, and `reattach_detached_coroutine_object` brings the
coroutine back.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Final, NoReturn

from outcome import Error, Outcome, Value

from .core.errors import new_cancelled
from .core.task import Task, current_kernel, current_task
from .core.traps import Trap, operation
from .interrupts import claim_interrupt

if TYPE_CHECKING:
    from .core.loop import Kernel

__all__ = [
    "Abort",
    "permanently_detach_coroutine_object",
    "reattach_detached_coroutine_object",
    "reschedule",
    "temporarily_detach_coroutine_object",
    "wait_task_rescheduled",
]

RaiseCancel = Callable[[], NoReturn]


class Abort(enum.Enum):
    """What an `abort_fn` returns."""

    SUCCEEDED = 1
    """The wait was taken back: nobody will call `reschedule`. The task gets the `Cancelled`."""
    FAILED = 2
    """It could not be taken back: somebody will call `reschedule`, if need be with `outcome.capture(raise_cancel)`."""


class _WaitRescheduled(Trap):
    __slots__ = ("abort_fn",)

    def __init__(self, abort_fn: Callable[[RaiseCancel], Abort]) -> None:
        self.abort_fn: Callable[[RaiseCancel], Abort] | None = abort_fn

    def arm(self, kernel: Kernel, task: Task) -> None:
        pass

    def abort(self, kernel: Kernel, task: Task) -> bool:
        abort_fn, self.abort_fn = self.abort_fn, None
        if abort_fn is None:
            return False  # asked before: it is asked once in each wait

        reason = task.scope.cancelled

        def raise_cancel() -> NoReturn:
            if reason is not None:
                raise new_cancelled(reason)
            claim_interrupt(kernel)
            raise KeyboardInterrupt

        answer = abort_fn(raise_cancel)
        if not isinstance(answer, Abort):
            raise TypeError(f"an abort_fn must return Abort.SUCCEEDED or Abort.FAILED, not {answer!r}")
        return answer is Abort.SUCCEEDED

    def __repr__(self) -> str:
        return f"<WaitRescheduled, abort_fn={self.abort_fn!r}>"


@operation
def wait_task_rescheduled(abort_fn: Callable[[RaiseCancel], Abort]) -> Generator[Any, Any, Any]:
    """Sleep until somebody calls `reschedule(task, ...)` for this task; return or raise what that says.

    Whoever shall do so must have been told before. If the task is cancelled first, `abort_fn(raise_cancel)` is called
    to take that back, at most once; see `Abort`. Always a cancel point and a schedule point.

    Raises:
        TypeError: `abort_fn` returned something else.
    """
    return (yield _WaitRescheduled(abort_fn))


_NOTHING: Final = Value(None)


def reschedule(task: Task, next_send: Outcome[Any] = _NOTHING) -> None:
    """Wake `task`, which sleeps in `wait_task_rescheduled`: that returns, or raises, what `next_send` holds.

    Exactly once for each wait, in the kernel's thread. Not a checkpoint.

    Raises:
        RuntimeError: the task does not sleep there: it was woken before, or cancelled, or sleeps on something else. Or
            this is not its kernel's thread. Nothing has changed then.
        TypeError: `next_send` is no `outcome.Value` or `outcome.Error`.
    """
    kernel = current_kernel("reschedule()")
    if not isinstance(task.trap, _WaitRescheduled):
        raise RuntimeError(f"{task!r} is not in wait_task_rescheduled(): each wait ends with one reschedule() or abort")
    if task.scope._kernel is not kernel:
        raise RuntimeError(f"{task!r} belongs to the kernel of another thread: use run_sync_soon() of that one's token")
    how, value = _taken_apart(next_send)
    if how is Value:
        kernel.wake(task, value)
    else:
        kernel.wake(task, error=value)


def _taken_apart(given: Outcome[Any]) -> tuple[Callable[[Any], Outcome[Any]], Any]:
    if isinstance(given, Value):
        return Value, given.value
    if isinstance(given, Error):
        return Error, given.error
    raise TypeError(f"what a task gets or ends with must be an outcome.Value or an outcome.Error, not {given!r}")


class _Detach(Trap):
    """End the task and keep the coroutine."""

    __slots__ = ("how", "value")

    def __init__(self, how: Callable[[Any], Outcome[Any]], value: Any) -> None:
        self.how = how
        self.value = value

    def arm(self, kernel: Kernel, task: Task) -> None:
        task.trap = None
        kernel._finish(task, self.how, self.value)

    def abort(self, kernel: Kernel, task: Task) -> bool:
        raise AssertionError("unreachable: nothing sleeps on it")


@operation
def permanently_detach_coroutine_object(final_outcome: Outcome[Any]) -> Generator[Any, Any, Any]:
    """End the running task with `final_outcome`. Its coroutine stays suspended here; another loop may resume it.

    Returns what that loop sends. Not a cancel point.

    Raises:
        RuntimeError: the task is inside a nursery or a cancel scope, which belong to it and not to the coroutine.
        TypeError: `final_outcome` is no `outcome.Value` or `outcome.Error`.
    """
    task = current_task("permanently_detach_coroutine_object()")
    how, value = _taken_apart(final_outcome)
    if task.parent_nursery is None or task.scope is not task.parent_nursery.cancel_scope:
        raise RuntimeError(f"{task!r} cannot be detached inside a nursery or a cancel scope: it could never leave it")
    return (yield _Detach(how, value))


@operation
def temporarily_detach_coroutine_object(abort_fn: Callable[[RaiseCancel], Abort]) -> Generator[Any, Any, Any]:
    """Let the running task sleep while another loop resumes its coroutine.

    Returns what that loop sends first. The coroutine comes back with `reattach_detached_coroutine_object`. If the task
    is cancelled meanwhile, `abort_fn` is called as in `wait_task_rescheduled`. Before that returns `SUCCEEDED`, it must
    have taken the coroutine from the other loop, as `Cancelled` is raised in it where it stands. Always a cancel point.
    """
    return (yield _WaitRescheduled(abort_fn))


@operation
def reattach_detached_coroutine_object(task: Task, yield_value: object) -> Generator[Any, Any, None]:
    """To be awaited by a detached coroutine, under the other loop: `task` goes on from here, in its kernel.

    `yield_value` is what the other loop gets to see, as the coroutine's last word. The other loop must run in the
    kernel's thread. Not a cancel point.

    Raises:
        RuntimeError: `task` is not the task of the coroutine that runs, or is not detached.
    """
    coro: Any = task.coro
    if not getattr(coro, "cr_running", getattr(coro, "gi_running", False)):
        raise RuntimeError(f"what runs here is not the coroutine of {task!r}, so it cannot go on as that task")
    reschedule(task)
    yield yield_value
