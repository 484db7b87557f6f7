"""Timeouts: cancel scopes with a deadline, and an error on top if you want one.

    move_on_after(5)    give up quietly after 5 seconds; `scope.cancelled_caught` says whether that happened
    fail_after(5)       give up with `TooSlowError`
    move_on_at(t), fail_at(t)    the same at an absolute time on the kernel's clock

The time starts when the block is entered. There is nothing else to it: a timeout covers all that happens inside, in
whatever function and however many tasks, and nesting works because scopes nest.
"""

from __future__ import annotations

from math import inf

from .core.errors import TooSlowError
from .core.scopes import CancelScope
from .core.task import current_task

__all__ = ["current_effective_deadline", "fail_after", "fail_at", "move_on_after", "move_on_at"]


def move_on_after(seconds: float, *, shield: bool = False) -> CancelScope:
    """A scope that cancels itself `seconds` (not below 0) after it is entered. See `CancelScope` for the errors."""
    return CancelScope(inf, seconds, shield)


def move_on_at(deadline: float, *, shield: bool = False) -> CancelScope:
    """A scope that cancels itself at `deadline`, in seconds on the kernel's clock. See `CancelScope` for errors and
    cost.
    """
    return CancelScope(deadline=deadline, shield=shield)


class _Fail(CancelScope):
    """A scope that reports having caught its own cancellation."""

    __slots__ = ()

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> bool:
        swallowed = super().__exit__(exc_type, exc, traceback)
        if swallowed:
            raise TooSlowError(f"the block did not end in time: it was cancelled by {self._why}")
        return swallowed


def fail_after(seconds: float, *, shield: bool = False) -> CancelScope:
    """As `move_on_after`, and raises `TooSlowError` when the block was cut short.

    Cancelling the scope by hand counts too. An error that leaves the block is not replaced.
    """
    return _Fail(relative_deadline=seconds, shield=shield)


def fail_at(deadline: float, *, shield: bool = False) -> CancelScope:
    """As `move_on_at`, and raises `TooSlowError` when the block was cut short."""
    return _Fail(deadline=deadline, shield=shield)


def current_effective_deadline() -> float:
    """The earliest deadline that holds for the running task, as an absolute time; `inf` for none, `-inf` if cancelled.

    Not a checkpoint. Cost: the number of scopes in sight. Raises RuntimeError outside any task.
    """
    scope = current_task("current_effective_deadline()").scope
    if scope.cancelled is not None:
        return -inf
    deadline = scope._deadline
    while scope._parent is not None and not scope._shield:
        scope = scope._parent
        deadline = min(deadline, scope._deadline)
    return deadline
