"""What the core needs from outside: four ports, each served by one small driver.

The core schedules, cancels and joins; it does not know what time it is or how the operating system reports readiness.
It asks through these protocols. `kernel.boot` plugs in the real drivers; tests plug in a virtual clock, a recording
poller or a ready queue that picks tasks in another order. A driver needs no base class: having the methods is enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from .loop import Kernel
    from .task import Task

Direction = Literal[0, 1]
READ: Direction = 0
"""Waiting to read."""
WRITE: Direction = 1
"""Waiting to write."""


class Clock(Protocol):
    """What time it is, in seconds from an arbitrary start; never goes backwards."""

    autojump_threshold: float
    """Real seconds of idleness after which the kernel calls `autojump`; `inf` for a clock that cannot jump."""

    def start_clock(self) -> None:
        """Called once, when a run begins."""

    def current_time(self) -> float:
        """The time now, in seconds."""

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Real seconds until `deadline`, a time on this clock; 0 or less when it has passed, `inf` for never."""

    def autojump(self, deadline: float) -> None:
        """The kernel has been idle for `autojump_threshold` seconds and `deadline` (finite) is what happens next."""


class Timed(Protocol):
    """Something that wants to be told when a time has come: a sleeping task's trap, or a scope with a deadline."""

    timer: tuple[float, float, Any] | None
    """Belongs to the timers driver: where this one stands in the order, or None."""

    def expire(self, kernel: Kernel) -> None:
        """The deadline has passed. Called once; the timer is gone already."""


class Timers(Protocol):
    """Deadlines in order. Equal ones expire in the order they were added."""

    def add(self, deadline: float, timed: Timed) -> None:
        """Call `timed.expire` once `deadline` has passed. Each `timed` may be in once."""

    def remove(self, timed: Timed) -> None:
        """Forget `timed`, which was added and has not expired."""

    def next_deadline(self) -> float:
        """The earliest deadline, or `inf`."""

    def expired(self, now: float) -> Iterable[Timed]:
        """Take out all that is due at `now`, in order. Expiring one of them may `remove` a later one."""

    def __len__(self) -> int: ...


class Poller(Protocol):
    """Which file descriptors are ready. At most one reader and one writer wait on each."""

    def arm(self, fd: int, direction: Direction, task: Task) -> None:
        """Let `task` wait for `fd`. One wait: it is over when `poll` or `forget` returns the task, or `disarm` is
        called.

        Raises `BusyResourceError` when a task waits there already, `OSError` (`EBADF`, `EPERM`) for an fd that is
        closed or can never be waited for; then nothing has changed.
        """

    def disarm(self, fd: int, direction: Direction) -> None:
        """Take a wait back. Works on an fd that was closed or reused meanwhile."""

    def forget(self, fd: int) -> list[Task]:
        """`fd` is about to be closed: drop all that is known of it and return who was waiting, reader first."""

    def poll(self, timeout: float) -> Iterable[Task]:
        """Wait up to `timeout` real seconds (`inf`: for as long as it takes), return the tasks whose wait is over."""

    def wakeup(self) -> None:
        """End the `poll` that goes on, or the next one. The one method that any thread and signal handler may call."""

    def close(self) -> None:
        """Release what the driver holds. Called once, when the run has ended."""

    def __len__(self) -> int:
        """How many waits are pending."""


class ReadyQueue(Protocol):
    """Which ready task runs next: the scheduling policy. A `collections.deque` is one, and means first come, first
    served.
    """

    def append(self, task: Task, /) -> None:
        """`task` became ready."""

    def popleft(self) -> Task:
        """The task to run next; called only when there is one."""

    def __len__(self) -> int: ...
