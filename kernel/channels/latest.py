"""Latest-value channels: one value that changes, and tasks that want to know what it is now.

    price = open_latest_channel(100)
    with price.subscribe() as receive_channel:
        async for value in receive_channel: ...     # 100 at once; then what it has changed to

A receiver that is slow misses what was in between and never the last one. So there is no buffer, nobody is ever held
up, and `set` is a plain function. Configuration, a state that others react to, progress shown on a screen: all that is
a latest value. If every change counts, it is `open_broadcast_channel`. The model is tokio's `sync::watch`.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..core.errors import ClosedResourceError, EndOfChannel
from ..core.task import Task, current_kernel
from ..core.traps import consume_budget, operation
from .ends import End, ReceiveEnd

if TYPE_CHECKING:
    from ..core.loop import Kernel

__all__ = ["LatestReceiveChannel", "LatestSendChannel", "open_latest_channel"]

T = TypeVar("T")


class _Cell(Generic[T]):
    """What all ends share."""

    __slots__ = ("closed", "value", "version", "waiting")

    def __init__(self, value: T) -> None:
        self.value = value
        self.version = 1  # counts the values
        self.closed = False
        self.waiting: dict[Task, LatestReceiveChannel[T]] = {}

    def wake_all(self, error: str | None = None) -> None:
        """The value has changed, or will never change again: everybody who waits goes on."""
        for task, end in self.waiting.items():
            del end._tasks[task]
            current_kernel().wake(task, error=None if error is None else EndOfChannel(error))
        self.waiting.clear()


class LatestSendChannel(End, Generic[T]):
    """The end where the value is set. Made by `open_latest_channel`. Share it, if there are several who set."""

    __slots__ = ("_cell",)

    def __init__(self, cell: _Cell[T]) -> None:
        self._closed = False
        self._cell = cell

    @property
    def value(self) -> T:
        """The value as it is now."""
        return self._cell.value

    def set(self, value: T) -> None:
        """Change the value, and wake who waits for a change. An equal value is a change too. Not a checkpoint.

        Cost: the number of tasks that wait.

        Raises:
            ClosedResourceError: this end is closed.
            RuntimeError: tasks must be woken, and this is not the kernel's thread.
        """
        if self._closed:
            self._refuse()
        if self._cell.waiting:
            current_kernel("set()")
        self._cell.value = value
        self._cell.version += 1
        self._cell.wake_all()

    def subscribe(self) -> LatestReceiveChannel[T]:
        """A new receiver, which has seen nothing yet: it will receive the present value first. Not a checkpoint."""
        return LatestReceiveChannel(self._cell, seen=0)

    def close(self) -> None:
        """The value will not change any more. Receivers see it once, if they have not, and then get `EndOfChannel`."""
        if self._closed:
            return
        if self._cell.waiting:
            current_kernel("close()")
        self._closed = self._cell.closed = True
        self._cell.wake_all("the sending side was closed: the value will not change any more")

    def __repr__(self) -> str:
        return f"<LatestSendChannel at {id(self):#x}{', closed' if self._closed else ''}, {self._cell.value!r}>"


class LatestReceiveChannel(ReceiveEnd[T]):
    """One receiver's end, which knows what this receiver has seen. Made by `subscribe` and `clone`."""

    __slots__ = ("_cell", "_seen", "_tasks")

    def __init__(self, cell: _Cell[T], seen: int) -> None:
        self._closed = False
        self._cell = cell
        self._seen = seen  # the version last received
        self._tasks: dict[Task, None] = {}  # those in _cell.waiting that sleep on this end

    @property
    def value(self) -> T:
        """The value as it is now. Looking at it here does not count as receiving it."""
        return self._cell.value

    @operation
    def receive(self) -> Generator[Any, Any, T]:
        """The value as it is now, if this receiver has not received it yet; otherwise wait until it changes.

        Always a cancel point; a schedule point if it blocks or the budget is used up. After a cancelled `receive` the
        change is still to be received. Tasks that wait at the same end get it all.

        Raises:
            EndOfChannel: the sending end is closed, and its last value was received; or it is closed meanwhile.
            ClosedResourceError: this end is closed; or another task closes it meanwhile.
            RuntimeError: used outside the kernel.
        """
        yield from consume_budget()
        if self._closed:
            self._refuse()
        cell = self._cell
        if self._seen == cell.version:
            if cell.closed:
                raise EndOfChannel("the sending side is closed: the value will not change any more")
            yield self
        self._seen = cell.version  # which may be newer than the one that woke us
        return cell.value

    def arm(self, kernel: Kernel, task: Task) -> None:
        """Of the trap: the task sleeps until the value changes."""
        self._tasks[task] = None
        self._cell.waiting[task] = self

    def abort(self, kernel: Kernel, task: Task) -> bool:
        """Of the trap: the task is cancelled."""
        del self._tasks[task], self._cell.waiting[task]
        return True

    def clone(self) -> LatestReceiveChannel[T]:
        """Another receiver, which has seen what this one has. Raises ClosedResourceError if this end is closed."""
        if self._closed:
            self._refuse()
        return LatestReceiveChannel(self._cell, self._seen)

    def close(self) -> None:
        """Close this end. Tasks that wait in its `receive` get `ClosedResourceError`. Not a checkpoint."""
        if self._closed:
            return
        if self._tasks:
            current_kernel("close()")
        self._closed = True
        for task in self._tasks:
            del self._cell.waiting[task]
            current_kernel().wake(task, error=ClosedResourceError("another task closed this end of the channel"))
        self._tasks.clear()

    def __repr__(self) -> str:
        return f"<LatestReceiveChannel at {id(self):#x}{', closed' if self._closed else ''}, {self._cell.value!r}>"


def open_latest_channel(initial: T) -> LatestSendChannel[T]:
    """Open a channel that holds the latest value, and return its sending end; receivers come from its `subscribe()`."""
    return LatestSendChannel(_Cell(initial))
