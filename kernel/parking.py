"""The parking lot: tasks asleep in a row, until somebody lets some of them go.

Most of what makes tasks wait for one another (events, locks, channels) is a parking lot with a rule about when to open
it. Here the lot *is* the trap: `yield lot` arms it, which puts the task at the end of the row, and a cancellation
aborts it, which takes the task out again. So nothing is allocated for a wait, and `task.trap` names the lot.

First come, first served. `unpark` commits: who was let go can no longer be cancelled out of the wait. The row is a
linked list with a dict beside it (`OrderedDict`), so taking one task out of it costs the same wherever it stands.

A lot can break: when the one task that would have opened it is gone, whoever waits would wait for ever. A lock whose
owner has ended is such a case. `add_parking_lot_breaker(task, lot)` ties the lot to the life of a task.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from .core.errors import BrokenResourceError
from .core.task import Task, current_kernel, current_task
from .core.traps import Trap, operation

if TYPE_CHECKING:
    from .core.loop import Kernel

__all__ = ["ParkingLot", "ParkingLotStatistics", "add_parking_lot_breaker", "remove_parking_lot_breaker"]


@dataclass(frozen=True, slots=True)
class ParkingLotStatistics:
    """What a lot says of itself: `tasks_waiting`, the number of tasks parked in it."""

    tasks_waiting: int


class ParkingLot(Trap):
    """A row of sleeping tasks. `len(lot)` is how many there are, `bool(lot)` whether there are any.

    Attributes:
        on: what the tasks wait for, shown in reports: pass the lock or event that owns the lot. If that has an
            attribute `owner` (a task) or `owners` (several), reports say who could let the waiting ones go.
        broken_by: the tasks that broke the lot; empty while it is sound.
    """

    __slots__ = ("__weakref__", "_parked", "broken_by", "on")

    def __init__(self, on: object = None) -> None:
        self.on = on
        self.broken_by: list[Task] = []
        # all(task.trap is self for task in _parked). A plain dict would scan over what was deleted at its front.
        self._parked: OrderedDict[Task, None] = OrderedDict()

    def arm(self, kernel: Kernel, task: Task) -> None:
        if self.broken_by:
            raise self._broken()
        self._parked[task] = None

    def abort(self, kernel: Kernel, task: Task) -> bool:
        del self._parked[task]
        return True

    @operation
    def park(self) -> Generator[Any, Any, None]:
        """Sleep here until let go. Always a cancel point and a schedule point; a cancellation leaves no trace.

        Raises:
            BrokenResourceError: the lot is broken, or breaks while the task is parked.
        """
        yield self

    def unpark(self, *, count: float = 1) -> list[Task]:
        """Let the first `count` tasks go (`math.inf`: all) and return them. Not a checkpoint.

        Raises ValueError for a `count` that is neither a whole number from 0 up nor `math.inf`.
        """
        tasks = self._first(count)
        kernel = current_kernel("ParkingLot.unpark()") if tasks else None
        if tasks and tasks[0].scope._kernel is not kernel:
            raise RuntimeError(f"{self!r} has tasks of another thread's kernel; leave the call in that one's inbox")
        for task in tasks:
            assert kernel is not None
            del self._parked[task]
            kernel.wake(task)
        return tasks

    def unpark_all(self) -> list[Task]:
        """Let all tasks go and return them."""
        return self.unpark(count=inf)

    def repark(self, new_lot: ParkingLot, *, count: float = 1) -> None:
        """Move the first `count` tasks to the end of `new_lot`'s row without waking them. Errors as `unpark`'s.

        If `new_lot` is broken, they wake with BrokenResourceError instead.
        """
        if not isinstance(new_lot, ParkingLot):
            raise TypeError(f"repark() wants a ParkingLot to move to, not {new_lot!r}")
        tasks = self._first(count)
        if new_lot.broken_by:
            self._fail(tasks, new_lot._broken)
            return
        for task in tasks:
            del self._parked[task]
            new_lot._parked[task] = None
            task.trap = new_lot

    def repark_all(self, new_lot: ParkingLot) -> None:
        """Move all tasks to the end of `new_lot`'s row without waking them."""
        self.repark(new_lot, count=inf)

    def break_lot(self, task: Task | None = None) -> None:
        """Break the lot, in the name of `task` (by default the running one): who is parked here wakes with
        `BrokenResourceError`, and so does whoever tries to park later. Not a checkpoint. Cannot be undone.
        """
        self.broken_by.append(task if task is not None else current_task("ParkingLot.break_lot()"))
        self._fail(list(self._parked), self._broken)

    def _broken(self) -> BrokenResourceError:
        names = ", ".join(repr(task.name) for task in self.broken_by)
        what = "this parking lot" if self.on is None else repr(self.on)
        return BrokenResourceError(f"{what} was broken by {names}: nobody is left to let go of those who wait for it")

    def _fail(self, tasks: list[Task], error: Callable[[], BaseException]) -> None:
        kernel = current_kernel("ParkingLot") if tasks else None
        for task in tasks:
            assert kernel is not None
            del self._parked[task]
            kernel.wake(task, error=error())

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


def add_parking_lot_breaker(task: Task, lot: ParkingLot) -> None:
    """When `task` ends, break `lot`. Adding it twice takes removing it twice. Not a checkpoint.

    Raises:
        BrokenResourceError: the task has ended already.
        RuntimeError: used outside the kernel.
    """
    kernel = current_kernel("add_parking_lot_breaker()")
    if task.outcome is not None:
        raise BrokenResourceError(f"{task!r} has ended already, so it cannot break a parking lot when it does")
    kernel.farewells.setdefault(task, []).append(lot.break_lot)


def remove_parking_lot_breaker(task: Task, lot: ParkingLot) -> None:
    """Take one `add_parking_lot_breaker(task, lot)` back. Raises RuntimeError if there is none."""
    calls = current_kernel("remove_parking_lot_breaker()").farewells.get(task, [])
    if lot.break_lot not in calls:
        raise RuntimeError(f"{task!r} is no breaker of {lot!r}: it was removed before, or never added")
    calls.remove(lot.break_lot)
    if not calls:
        del current_kernel().farewells[task]
