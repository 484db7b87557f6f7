"""Waiting for a socket of our own: a trap per direction, which lives as long as the socket does.

`kernel.lowlevel.wait_readable(fd)` makes a trap for each wait and tells the poller about it, a system call each time,
as it knows nothing of the file but a number. A socket that the package has made is known for all its life, to the
close. So its two traps stay in the poller once they have waited there, and a further wait is one assignment, `self.task
= task`. A poller that has no `watch` is asked in the other way, wait by wait (kernel/drivers/poller.py has both).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..core.errors import BusyResourceError, ClosedResourceError
from ..core.ports import READ, WRITE, Direction
from ..core.task import Task, here
from ..core.traps import Trap

if TYPE_CHECKING:
    from ..core.loop import Kernel

__all__ = ["Readable", "Readiness", "Writable"]


class Readiness(Trap):
    """Sleep until the socket is ready in one direction. For one task at a time.

    `task` is who waits; None if nobody does, or if `poller.arm` was asked for this one wait. `poller` is where the
    interest is in place, or None.
    """

    __slots__ = ("fd", "misses", "poller", "task")
    direction: Direction
    doing: str

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.task: Task | None = None
        self.poller: Any = None
        self.misses = 0  # the poller's

    def arm(self, kernel: Kernel, task: Task) -> None:
        if self.task is None and self.poller is kernel.poller:
            self.task = task
        else:
            self._arm(kernel, task)

    def _arm(self, kernel: Kernel, task: Task) -> None:
        if self.task is not None:
            raise BusyResourceError(
                f"{self.task!r} is {self.doing} this socket already. Only one task at a time may: put a lock around it."
            )
        if self.poller is not None:  # of an earlier run, or of another thread's
            self.poller.unwatch(self)
        watch = getattr(kernel.poller, "watch", None)
        if watch is not None:
            watch(self, task)
        else:
            kernel.poller.arm(self.fd, self.direction, task)

    def abort(self, kernel: Kernel, task: Task) -> bool:
        if self.task is not None:
            self.task = None
        else:
            kernel.poller.disarm(self.fd, self.direction)
        return True

    def forget(self) -> None:
        """The socket is about to be closed, or handed over to somebody else: nothing of it stays in the poller, and
        whoever waits wakes with ClosedResourceError.
        """
        kernel = here.kernel
        waiting = kernel.poller.forget(self.fd) if kernel is not None else []
        if self.poller is not None:  # not this run's
            waiting = waiting + self.poller.forget(self.fd)
        for task in waiting:
            its_kernel = task.scope._kernel
            assert its_kernel is not None, "a task that sleeps is in a scope that is entered"
            if its_kernel is kernel:
                _refuse(its_kernel, task, task.trap)
            else:  # it runs in another thread
                its_kernel.call_soon(partial(_refuse, its_kernel, task, task.trap))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} socket, fd={self.fd}>"


def _refuse(kernel: Kernel, task: Task, trap: Trap | None) -> None:
    if task.trap is trap:  # else it was woken or cancelled before word came from the other thread
        kernel.wake(task, error=ClosedResourceError("another task closed this socket while it was in use"))


class Readable(Readiness):
    """Sleep until there is something to receive or to accept, or an error or the end to report."""

    __slots__ = ()
    direction = READ
    doing = "receiving from"


class Writable(Readiness):
    """Sleep until there is room to send, a connection has come about, or there is an error to report."""

    __slots__ = ()
    direction = WRITE
    doing = "sending on"

    def forget(self) -> None:
        if self.poller is not None:  # otherwise the reader's, which comes first, was for both
            super().forget()
