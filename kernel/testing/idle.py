"""Waiting until nothing happens any more."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from ..core.task import Task
from ..core.traps import Trap, operation

if TYPE_CHECKING:
    from ..core.loop import Kernel

__all__ = ["wait_all_tasks_blocked"]


class _WaitIdle(Trap):
    __slots__ = ("cushion",)

    def __init__(self, cushion: float) -> None:
        self.cushion = cushion

    def arm(self, kernel: Kernel, task: Task) -> None:
        kernel.idle_waiters[task] = self.cushion

    def abort(self, kernel: Kernel, task: Task) -> bool:
        del kernel.idle_waiters[task]
        return True

    def __repr__(self) -> str:
        return f"<WaitIdle for {self.cushion:g} s>"


@operation
def wait_all_tasks_blocked(cushion: float = 0.0) -> Generator[Any, Any, None]:
    """Wait until no other task can run and nothing has happened for `cushion` real seconds.

    The way to let other tasks get to where they wait, without sleeping and hoping. Tasks that wait here too do not
    count as busy; the ones with the shortest cushion wake first, all together. It goes before a clock's autojump. A
    cushion above 0 is for programs in which something outside the kernel is on its way: a packet, a thread.

    Always a cancel point and a schedule point. A cancellation leaves nothing behind.

    Raises:
        ValueError: `cushion` is negative or NaN.
    """
    if not cushion >= 0:
        raise ValueError(f"cushion must be a number of real seconds from 0 up, not {cushion!r}")
    yield _WaitIdle(cushion)
