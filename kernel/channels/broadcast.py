"""Broadcast channels: each receiver gets every value that is sent while it is subscribed.

    news = open_broadcast_channel(100)
    with news.subscribe() as receive_channel:
        async for item in receive_channel: ...

Each receiver has a buffer of its own. What happens when one of them is full is for the opener to say, with `slow=`:

    "wait"          `send` waits until every receiver has room: the slowest sets the pace. Nothing is lost.
    "drop_oldest"   the receiver loses the oldest value it has not received; `dropped` counts. `send` never waits.
    "error"         the same, and its next `receive` says so, once, with a `LaggedError`; then it goes on

Rules:

* A value reaches all receivers or none: a `send` that is cancelled while it waits has reached nobody.
* All receivers see the values in the same order.
* A value that is sent while nobody is subscribed is gone. That is no error: listeners come and go.

The third policy and its error are those of tokio's `sync::broadcast`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args

from ..abc import SendChannel
from ..core.errors import ClosedResourceError, EndOfChannel, WouldBlock
from ..core.task import Task, current_kernel
from ..core.traps import consume_budget, operation
from .ends import End, ReceiveEnd, check_buffer_size

if TYPE_CHECKING:
    from ..core.loop import Kernel

__all__ = [
    "BroadcastReceiveChannel",
    "BroadcastSendChannel",
    "BroadcastStatistics",
    "LaggedError",
    "open_broadcast_channel",
]

T = TypeVar("T")
Slow = Literal["wait", "drop_oldest", "error"]


class LaggedError(Exception):
    """A receiver of a broadcast channel with `slow="error"` was too slow. Receiving goes on behind the gap.

    Attributes:
        dropped: how many values this receiver has lost since it was last told.
    """

    def __init__(self, dropped: int) -> None:
        super().__init__(f"this receiver was too slow and has lost {dropped} values")
        self.dropped = dropped


@dataclass(frozen=True, slots=True)
class BroadcastStatistics:
    """What a broadcast channel says of itself.

    Attributes:
        max_buffer_size: how many values each receiver's buffer holds.
        open_send_channels, open_receive_channels: ends that are not closed.
        tasks_waiting_send, tasks_waiting_receive: tasks that sleep in `send` and in `receive`.
        longest_buffer: the number of values in the fullest receiver's buffer.
    """

    max_buffer_size: float
    open_send_channels: int
    open_receive_channels: int
    tasks_waiting_send: int
    tasks_waiting_receive: int
    longest_buffer: int


class _Hub(Generic[T]):
    """What all ends of one channel share.

    Invariants: full == the number of receivers whose buffer is full if slow == "wait", else 0; full > 0 if senders.
    """

    __slots__ = ("full", "max_buffer_size", "open_senders", "receivers", "senders", "slow")

    def __init__(self, max_buffer_size: float, slow: Slow) -> None:
        self.max_buffer_size = max_buffer_size
        self.slow = slow
        self.full = 0
        self.open_senders = 0
        self.receivers: dict[BroadcastReceiveChannel[T], None] = {}  # in the order of their subscription
        self.senders: OrderedDict[Task, tuple[BroadcastSendChannel[T], T]] = OrderedDict()

    def deliver(self, value: T) -> None:
        current_kernel("send_nowait()")  # ask first: once some have the value, it must reach all
        for receiver in self.receivers:
            receiver._accept(value)

    def let_senders_go(self) -> None:
        """A receiver has room again, or is gone: if none is full now, the next sender's value goes out."""
        while self.senders and not self.full:
            task, (end, value) = self.senders.popitem(last=False)
            del end._tasks[task]
            current_kernel().wake(task)
            self.deliver(value)

    def statistics(self) -> BroadcastStatistics:
        return BroadcastStatistics(
            max_buffer_size=self.max_buffer_size,
            open_send_channels=self.open_senders,
            open_receive_channels=len(self.receivers),
            tasks_waiting_send=len(self.senders),
            tasks_waiting_receive=sum(len(receiver._tasks) for receiver in self.receivers),
            longest_buffer=max((len(receiver._buffer) for receiver in self.receivers), default=0),
        )


class BroadcastSendChannel(End, SendChannel[T]):
    """The end to send into, and to subscribe at. Made by `open_broadcast_channel` and `clone`."""

    __slots__ = ("_hub", "_tasks")

    def __init__(self, hub: _Hub[T]) -> None:
        self._closed = False
        self._hub = hub
        self._tasks: dict[Task, None] = {}
        hub.open_senders += 1

    def subscribe(self) -> BroadcastReceiveChannel[T]:
        """A new receiver, which gets what is sent from now on. Close it when done: one that nobody reads from holds up
        the senders (`slow="wait"`), or fills its buffer. Not a checkpoint.

        Raises:
            ClosedResourceError: this end is closed.
        """
        if self._closed:
            self._refuse()
        return BroadcastReceiveChannel(self._hub)

    def send_nowait(self, value: T) -> None:
        """Send `value` if that needs no wait. Not a checkpoint.

        Raises:
            WouldBlock: `slow="wait"`, and a receiver's buffer is full.
            ClosedResourceError: this end is closed.
            RuntimeError: used outside the kernel.
        """
        if self._closed:
            self._refuse()
        if self._hub.full:
            raise WouldBlock(f"{self._hub.full} receivers have no room")
        self._hub.deliver(value)

    @operation
    def send(self, value: T) -> Generator[Any, Any, None]:
        """Send `value` to all who are subscribed. With `slow="wait"`, waits until all of them have room.

        Always a cancel point; a schedule point if it blocks or the budget is used up. A cancelled `send` has reached
        nobody. Cost: 0.2 us and 0.1 us for each receiver.

        Raises:
            ClosedResourceError: this end is closed; or another task closes it meanwhile, and the value was not sent.
            RuntimeError: used outside the kernel.
        """
        yield from consume_budget()
        if self._closed or not self._hub.full:
            self.send_nowait(value)
        else:
            task = current_kernel("send()").current
            assert task is not None
            self._tasks[task] = None
            self._hub.senders[task] = (self, value)
            yield self

    def arm(self, kernel: Kernel, task: Task) -> None:
        """Of the trap: `send` has put the task into the row."""

    def abort(self, kernel: Kernel, task: Task) -> bool:
        """Of the trap: the task is cancelled, and takes its value with it."""
        del self._tasks[task], self._hub.senders[task]
        return True

    def clone(self) -> BroadcastSendChannel[T]:
        """Another end of the same channel, to be closed by itself. Not a checkpoint.

        Raises:
            ClosedResourceError: this end is closed.
        """
        if self._closed:
            self._refuse()
        return BroadcastSendChannel(self._hub)

    def close(self) -> None:
        """Close this end; tasks that wait in its `send` get `ClosedResourceError`. Not a checkpoint.

        If it is the last one, receivers get what is in their buffers, and then `EndOfChannel`.

        Raises:
            RuntimeError: tasks must be woken, and this is not the kernel's thread.
        """
        if self._closed:
            return
        hub = self._hub
        last = hub.open_senders == 1
        if self._tasks or (last and any(receiver._tasks for receiver in hub.receivers)):
            current_kernel("close()")
        self._closed = True
        hub.open_senders -= 1
        _fail(self._tasks, ClosedResourceError, "another task closed this end of the channel", hub.senders)
        if last:
            for receiver in hub.receivers:
                _fail(receiver._tasks, EndOfChannel, "the sending side was closed, and nothing is left")

    def statistics(self) -> BroadcastStatistics:
        """How many ends there are, how many tasks wait, how far behind the slowest receiver is. Not a checkpoint."""
        return self._hub.statistics()

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"<BroadcastSendChannel at {id(self):#x}{state}, {len(self._hub.receivers)} receivers>"


class BroadcastReceiveChannel(ReceiveEnd[T]):
    """One receiver's end, with its own buffer. Made by `subscribe` and `clone`.

    Several tasks may receive from one end; they share the values out among them.

    Attributes:
        dropped: how many values this receiver has lost so far, by being slow.
    """

    __slots__ = ("_buffer", "_hub", "_tasks", "_told", "dropped")

    def __init__(self, hub: _Hub[T]) -> None:
        self._closed = False
        self._hub = hub
        self._buffer: deque[T] = deque()
        self._tasks: OrderedDict[Task, None] = OrderedDict()  # not (_tasks and _buffer)
        self.dropped = 0
        self._told = 0  # so many of the dropped ones were reported by a LaggedError
        hub.receivers[self] = None

    def _accept(self, value: T) -> None:
        """A value is sent."""
        hub, buffer = self._hub, self._buffer
        if self._tasks:
            task, _ = self._tasks.popitem(last=False)
            current_kernel().wake(task, value)
            return
        if len(buffer) == hub.max_buffer_size:
            buffer.popleft()
            self.dropped += 1
        buffer.append(value)
        if hub.slow == "wait" and len(buffer) == hub.max_buffer_size:
            hub.full += 1

    def receive_nowait(self) -> T:
        """Receive a value if there is one. Not a checkpoint.

        Raises:
            WouldBlock: there is none at the moment.
            EndOfChannel, ClosedResourceError, LaggedError: as `receive`.
        """
        hub = self._hub
        if self._closed:
            self._refuse()
        if hub.slow == "error" and self.dropped > self._told:
            lost, self._told = self.dropped - self._told, self.dropped
            raise LaggedError(lost)
        if self._buffer:
            was_full = hub.slow == "wait" and len(self._buffer) == hub.max_buffer_size
            if was_full and hub.senders:
                current_kernel("receive_nowait()")
            value = self._buffer.popleft()
            if was_full:
                hub.full -= 1
                hub.let_senders_go()
            return value
        if not hub.open_senders:
            raise EndOfChannel("the channel's sending side is closed, and nothing is left")
        raise WouldBlock("there is nothing to receive at the moment")

    @operation
    def receive(self) -> Generator[Any, Any, T]:
        """Receive the next value. Waits while there is none.

        Always a cancel point; a schedule point if it blocks or the budget is used up. A cancelled `receive` has taken
        nothing.

        Raises:
            EndOfChannel: the sending side is closed, and nothing is left; or it is closed meanwhile.
            LaggedError: the channel was opened with `slow="error"`, and values were lost. The next call goes on.
            ClosedResourceError: this end is closed; or another task closes it meanwhile.
            RuntimeError: used outside the kernel.
        """
        yield from consume_budget()
        value: T
        if self._buffer or self._closed or not self._hub.open_senders:
            value = self.receive_nowait()
        else:
            value = yield self
        return value

    def arm(self, kernel: Kernel, task: Task) -> None:
        """Of the trap: the task sleeps until it is handed a value."""
        self._tasks[task] = None

    def abort(self, kernel: Kernel, task: Task) -> bool:
        """Of the trap: the task is cancelled."""
        del self._tasks[task]
        return True

    def clone(self) -> BroadcastReceiveChannel[T]:
        """Another receiver, at the same place: it gets what this one has not received yet, and all that follows.

        Raises:
            ClosedResourceError: this end is closed.
        """
        if self._closed:
            self._refuse()
        twin = BroadcastReceiveChannel(self._hub)
        twin._buffer.extend(self._buffer)
        twin.dropped, twin._told = self.dropped, self._told
        self._hub.full += self._hub.slow == "wait" and len(twin._buffer) == self._hub.max_buffer_size
        return twin

    def close(self) -> None:
        """Unsubscribe. Tasks that wait in its `receive` get `ClosedResourceError`. Not a checkpoint.

        Raises:
            RuntimeError: tasks must be woken, and this is not the kernel's thread.
        """
        if self._closed:
            return
        hub = self._hub
        if self._tasks or hub.senders:
            current_kernel("close()")
        self._closed = True
        del hub.receivers[self]
        hub.full -= hub.slow == "wait" and len(self._buffer) == hub.max_buffer_size
        self._buffer.clear()
        _fail(self._tasks, ClosedResourceError, "another task closed this end of the channel")
        hub.let_senders_go()

    def statistics(self) -> BroadcastStatistics:
        """As `BroadcastSendChannel.statistics`."""
        return self._hub.statistics()

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"<BroadcastReceiveChannel at {id(self):#x}{state}, {len(self._buffer)} to receive>"


def _fail(
    tasks: dict[Task, None], error: type[Exception], text: str, row: OrderedDict[Task, Any] | None = None
) -> None:
    """Wake all `tasks` with an error, and strike them off the `row`."""
    for task in tasks:
        if row is not None:
            del row[task]
        current_kernel().wake(task, error=error(text))
    tasks.clear()


def open_broadcast_channel(max_buffer_size: float, *, slow: Slow = "wait") -> BroadcastSendChannel[Any]:
    """Open a broadcast channel and return its sending end; receivers come from its `subscribe()`.

    Args:
        max_buffer_size: how many values a receiver may be behind: a whole number from 1 up, or `math.inf`.
        slow: what happens when one is further behind: "wait", "drop_oldest" or "error"; see the module's text.

    Raises:
        TypeError: `max_buffer_size` is neither a whole number nor `math.inf`.
        ValueError: it is below 1, or `slow` is none of the three.
    """
    check_buffer_size(max_buffer_size, 1)
    if slow not in get_args(Slow):
        raise ValueError(f"slow must be one of {get_args(Slow)}, not {slow!r}")
    return BroadcastSendChannel(_Hub(max_buffer_size, slow))
