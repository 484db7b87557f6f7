"""The parking lot: tasks asleep in a row, until somebody lets some of them go.

Most of what makes tasks wait for one another (events, locks, channels) is a parking lot with a rule about when to open
it. Here the lot *is* the trap: `yield lot` arms it, which puts the task at the end of the row, and a cancellation
aborts it, which takes the task out again. So nothing is allocated for a wait, and `task.trap` names the lot.

First come, first served. `unpark` commits: who was let go can no longer be cancelled out of the wait. The row is a
linked list with a dict beside it (`OrderedDict`), so taking one task out of it costs the same wherever it stands.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from .task import Task, current_kernel
from .traps import Trap, operation

if TYPE_CHECKING:
    from .loop import Kernel


@dataclass(frozen=True, slots=True)
class ParkingLotStatistics:
    """What a lot says of itself: `tasks_waiting`, the number of tasks parked in it."""

    tasks_waiting: int


class ParkingLot(Trap):
    """A row of sleeping tasks. `len(lot)` is how many there are, `bool(lot)` whether there are any.

    `on` is what the tasks wait for, shown in reports: pass the lock or event that owns the lot.
    """

    __slots__ = ("__weakref__", "_parked", "on")

    def __init__(self, on: object = None) -> None:
        self.on = on
        # all(task.trap is self for task in _parked). A plain dict would scan over what was deleted at its front.
        self._parked: OrderedDict[Task, None] = OrderedDict()

    def arm(self, kernel: Kernel, task: Task) -> None:
        self._parked[task] = None

    def abort(self, kernel: Kernel, task: Task) -> bool:
        del self._parked[task]
        return True

    @operation
    def park(self) -> Generator[Any, Any, None]:
        """Sleep here until let go. Always a cancel point and a schedule point; a cancellation leaves no trace."""
        yield self

    def unpark(self, *, count: float = 1) -> list[Task]:
        """Let the first `count` tasks go (`math.inf`: all) and return them. Not a checkpoint.

        Raises ValueError for a `count` that is neither a whole number from 0 up nor `math.inf`.
        """
        tasks = self._first(count)
        kernel = current_kernel("ParkingLot.unpark()") if tasks else None
        for task in tasks:
            assert kernel is not None
            del self._parked[task]
            kernel.wake(task)
        return tasks

    def unpark_all(self) -> list[Task]:
        """Let all tasks go and return them."""
        return self.unpark(count=inf)

    def repark(self, new_lot: ParkingLot, *, count: float = 1) -> None:
        """Move the first `count` tasks to the end of `new_lot`'s row without waking them. Errors as `unpark`'s."""
        if not isinstance(new_lot, ParkingLot):
            raise TypeError(f"repark() wants a ParkingLot to move to, not {new_lot!r}")
        for task in self._first(count):
            del self._parked[task]
            new_lot._parked[task] = None
            task.trap = new_lot

    def repark_all(self, new_lot: ParkingLot) -> None:
        """Move all tasks to the end of `new_lot`'s row without waking them."""
        self.repark(new_lot, count=inf)

    def statistics(self) -> ParkingLotStatistics:
        """How many tasks are parked."""
        return ParkingLotStatistics(tasks_waiting=len(self._parked))

    def _first(self, count: float) -> list[Task]:
        if count == inf:
            return list(self._parked)
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"count must be a whole number from 0 up, or math.inf, not {count!r}")
        return [task for task, _ in zip(self._parked, range(count), strict=False)]

    def __len__(self) -> int:
        return len(self._parked)

    def __repr__(self) -> str:
        return f"<ParkingLot of {self.on if self.on is not None else hex(id(self))}, {len(self)} waiting>"
