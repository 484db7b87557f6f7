"""Is it a checkpoint? `with assert_checkpoints(): await something()`, and `assert_no_checkpoints`.

A checkpoint is two things at once. It is a *cancel point*: had the scope been cancelled, it would have raised
`Cancelled`. And it is a *schedule point*: it has let the others run, or has charged the budget, after which it will do
so every so often. (In trio the second is always a turn; see docs/coming-from-trio.md.)

Neither can be seen from outside when nothing happens, as on the fast path of an operation, which is where a checkpoint
is most easily forgotten. So while a block is open, two things of the kernel's are replaced by spies:

    kernel.budget           by a meter, which notes that it was charged. It lasts for one step; if there is a second
                            step, the block has yielded
    CancelScope.cancelled   by a descriptor, which notes who reads it. To read that of the innermost scope is a cancel
                            point, if it is the loop that does, or what could yield, and no shield is in between

What this cannot see: whether `Cancelled`, had it come, would have been let through; and whether a trap can be taken
back. It takes that for granted, but for the wait of a nursery for its children, which it knows.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from inspect import CO_COROUTINE, CO_GENERATOR
from types import CodeType
from typing import Any, Final

from ..core.loop import Kernel
from ..core.nursery import _Join
from ..core.scopes import CancelScope
from ..core.task import Task, current_kernel, current_task, here

__all__ = ["assert_checkpoints", "assert_no_checkpoints"]

_CANCELLED: Final[Any] = CancelScope.__dict__["cancelled"]  # the slot
_RESUMES: Final = Kernel.run_ready.__code__

_blocks: dict[Task, list[_Block]] = {}
_lock = threading.Lock()  # several threads may have kernels, and there is one class CancelScope


class _Block:
    """A block that is open, and what was seen in it. It stands in for the budget of the step in which it begins."""

    def __init__(self, task: Task, budget: float) -> None:
        self.task = task
        self.scope = task.scope
        self.budget = budget
        self.looked = False  # for a cancellation of `scope`
        self.scheduled = False

    def __sub__(self, operations: int) -> _Block:
        self.budget -= operations
        self.scheduled = True
        return self

    def __lt__(self, other: float) -> bool:
        return self.budget < other

    def shielded(self) -> bool:
        """Whether the task is, now, in a shield that was put up inside the block."""
        scope: CancelScope | None = self.task.scope
        while scope is not None and scope is not self.scope:
            if scope._shield:
                return True
            scope = scope._parent
        return False


class _Spy:
    """Stands in for the slot `CancelScope.cancelled`."""

    def __get__(self, scope: CancelScope | None, owner: object = None) -> Any:
        if scope is None:
            return self
        kernel = here.kernel
        task = kernel.current if kernel is not None else None
        if task in _blocks and scope is task.scope:
            _seen(task, sys._getframe(1).f_code)
        return _CANCELLED.__get__(scope)

    def __set__(self, scope: CancelScope, value: object) -> None:
        _CANCELLED.__set__(scope, value)


def _seen(task: Task, reader: CodeType) -> None:
    """`reader` has read whether the innermost scope of the running `task` is cancelled."""
    blocks = _blocks[task]
    if reader is _RESUMES:  # the task has just yielded a trap, or goes on behind a checkpoint
        for block in blocks:
            block.scheduled = True
        if task.step is not None or isinstance(task.trap, _Join):
            return  # woken at once, and thereby committed; or to be woken by the children only
    elif not reader.co_flags & (CO_GENERATOR | CO_COROUTINE):
        return  # a plain function cannot do what a cancel point does
    for block in blocks:
        if not block.shielded():
            block.looked = True


@contextmanager
def _watch() -> Iterator[_Block]:
    kernel, task = current_kernel("a block that is searched for checkpoints"), current_task()
    block = _Block(task, kernel.budget)
    with _lock:
        _blocks.setdefault(task, []).append(block)
        setattr(CancelScope, "cancelled", _Spy())  # noqa: B010  # mypy knows that it is a slot
    stand_in: Any = block
    kernel.budget = stand_in
    try:
        yield block
    finally:
        if kernel.budget is stand_in:
            kernel.budget = block.budget
        with _lock:
            _blocks[task].remove(block)
            if not _blocks[task]:
                del _blocks[task]
            if not _blocks:
                setattr(CancelScope, "cancelled", _CANCELLED)  # noqa: B010


@contextmanager
def _assert_checkpoints() -> Iterator[None]:
    with _watch() as block:
        yield
    if not block.looked and not block.scheduled:
        raise AssertionError("no checkpoint in this block: it has neither yielded nor charged the budget")
    if not block.looked:
        raise AssertionError(
            "no cancel point in this block: it would go on in a cancelled scope. Use consume_budget() before the effect"
        )
    if not block.scheduled:
        raise AssertionError(
            "no schedule point in this block: it has neither yielded nor charged the budget, so a loop of it would "
            "starve the others. Use consume_budget()"
        )


@contextmanager
def _assert_no_checkpoints() -> Iterator[None]:
    with _watch() as block:
        try:
            yield
        finally:
            points = ["a cancel point"] * block.looked + ["a schedule point"] * block.scheduled
            if points:
                raise AssertionError(f"there was {' and '.join(points)} in this block")


def assert_checkpoints() -> AbstractContextManager[None]:
    """`with` it: the block must either raise, or have in it at least one cancel point and one schedule point.

    An operation that need not wait passes if it looks whether it is cancelled and charges the budget, as
    `kernel.lowlevel.consume_budget` does. Only what the block's own task does counts, and a cancel point in a shield
    does not. Blocks may be nested. Entering and leaving are not checkpoints, and change nothing: what is tested is the
    path that the code takes without this, too. Slow, for the time of the block, in all threads.

    Raises:
        AssertionError: the block has ended without. The message says what was missing.
        RuntimeError: used outside a task.
    """
    return _assert_checkpoints()


def assert_no_checkpoints() -> AbstractContextManager[None]:
    """`with` it: the block must have neither a cancel point nor a schedule point in it, however it ends.

    Raises:
        AssertionError: it had one; raised also in place of what the block raised, which is its context then.
        RuntimeError: used outside a task.
    """
    return _assert_no_checkpoints()
