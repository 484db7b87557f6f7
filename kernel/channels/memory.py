"""Memory channels: a row of values between tasks, with an end to send into and an end to receive from.

    send_channel, receive_channel = open_memory_channel(10)

Between the ends are a buffer and two rows of tasks: those that wait to send, each with its value, and those that wait
to receive. A channel is always in one of three states, and at most one of the rows has tasks in it:

    the buffer is empty     in between          the buffer is full
    ----------------------  ------------------  ----------------------
    receivers may wait      nobody waits        senders may wait

Rules:

* A value has one owner at each moment: its sender until `send` returns, then the buffer, then its receiver. Waking is
  what hands it over. A task that was handed something cannot be cancelled before its next cancel point, so there is no
  moment at which a value could get lost between two tasks; and one that is cancelled while it waits has done nothing.
* First come, first served, on both sides. The value of a sender that waits moves up into the buffer as soon as there is
  room, and the sender is woken then.
* Each end may be cloned, and a side is closed when all its ends are. When the sending side is, receivers get what is
  left, and then `EndOfChannel`. When the receiving side is, what is left is thrown away, and senders get
  `BrokenResourceError`. A task that waits at an end which *another task* closes gets `ClosedResourceError`.

An end is itself the trap that its tasks sleep on. No checks for garbage: an end that nobody closes is no leak, there is
nothing behind it but memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..abc import SendChannel
from ..core.errors import BrokenResourceError, ClosedResourceError, EndOfChannel, WouldBlock
from ..core.task import Task, current_kernel, here
from ..core.traps import checkpoint, operation
from ..inbox import current_kernel_token
from .ends import End, ReceiveEnd, check_buffer_size
from .threads import ThreadReceiveChannel, ThreadSendChannel

if TYPE_CHECKING:
    from ..core.loop import Kernel

__all__ = ["MemoryChannelStatistics", "MemoryReceiveChannel", "MemorySendChannel", "open_memory_channel"]

T = TypeVar("T")
SendType = TypeVar("SendType", contravariant=True)
ReceiveType = TypeVar("ReceiveType", covariant=True)


@dataclass(frozen=True, slots=True)
class MemoryChannelStatistics:
    """What a channel says of itself. The numbers are of the whole channel, whichever of its ends is asked.

    Attributes:
        current_buffer_used: values in the buffer.
        max_buffer_size: how many values the buffer holds; may be `math.inf`.
        open_send_channels, open_receive_channels: ends that are not closed.
        tasks_waiting_send, tasks_waiting_receive: tasks that sleep in `send` and in `receive`.
        peak_buffer_used: the most values that have been in the buffer at once.
    """

    current_buffer_used: int
    max_buffer_size: float
    open_send_channels: int
    open_receive_channels: int
    tasks_waiting_send: int
    tasks_waiting_receive: int
    peak_buffer_used: int


class _Row(deque[list[Any]]):
    """Tasks that wait, as cells `[task, its value]`, the first one at the left.

    A task that is cancelled leaves its cell behind, emptied, since a deque cannot remove from its middle in less than
    linear time. An OrderedDict can, and costs 0.1 us more for each wait, of the 0.7 us from task to task.
    """

    __slots__ = ("vacant",)

    def __init__(self) -> None:
        super().__init__()
        self.vacant = 0  # empty cells. The first one is never empty, so that `if row` means that somebody waits

    def take(self) -> tuple[Task, Any]:
        """Take the first task out, with its value. Whoever takes a task wakes it."""
        task, value = self.popleft()
        if self.vacant:
            self.tidy()
        del task.trap._tasks[task]
        return task, value

    def vacate(self, cell: list[Any]) -> None:
        """The cell's task leaves before its turn. Cost: constant on average; if more than half are empty, they go."""
        cell[:] = None, None
        self.vacant += 1
        if self.vacant * 2 > len(self):
            cells = [cell for cell in self if cell[0] is not None]
            self.clear()
            self.extend(cells)
            self.vacant = 0
        else:
            self.tidy()

    def tidy(self) -> None:
        while self.vacant and self[0][0] is None:
            self.popleft()
            self.vacant -= 1


class State(Generic[T]):
    """What all ends of one channel share.

    Invariants, with `n = len(buffer)`: `peak <= max_buffer_size`; `n == max_buffer_size` if `senders`; `n == 0 and not
    senders` if `receivers`. So if `0 < n < peak`, there is a value, there is room, and nobody waits.
    """

    __slots__ = ("buffer", "max_buffer_size", "open_receivers", "open_senders", "peak", "receivers", "senders")

    def __init__(self, max_buffer_size: float, buffer: Any) -> None:
        self.buffer = buffer  # a deque, or what hands its values out in another order
        self.max_buffer_size = max_buffer_size
        self.peak = 0
        self.open_senders = 0
        self.open_receivers = 0
        self.senders = _Row()
        self.receivers = _Row()

    def append(self, value: T) -> None:
        self.buffer.append(value)
        self.peak = max(self.peak, len(self.buffer))


class _MemoryEnd(End):
    """What both kinds of ends of a memory channel have in common."""

    __slots__ = ("_buffer", "_state", "_tasks")

    def __init__(self, state: State[Any]) -> None:
        self._closed = False
        self._state = state
        self._buffer: Any = state.buffer  # or () once closed: one test for "closed, or nothing there"
        self._tasks: dict[Task, list[Any]] = {}  # who sleeps on this end, and the cell. All have task.trap is self

    def _retire(self, row: _Row) -> None:
        """This end is closed: tasks that wait at it leave the `row`."""
        self._closed = True
        self._buffer = ()
        while self._tasks:
            task, cell = next(iter(self._tasks.items()))
            del self._tasks[task]
            row.vacate(cell)
            current_kernel().wake(task, error=ClosedResourceError("another task closed this end of the channel"))

    def statistics(self) -> MemoryChannelStatistics:
        """How full the channel is, how many ends it has, how many tasks wait. Not a checkpoint."""
        state = self._state
        return MemoryChannelStatistics(
            current_buffer_used=len(state.buffer),
            max_buffer_size=state.max_buffer_size,
            open_send_channels=state.open_senders,
            open_receive_channels=state.open_receivers,
            tasks_waiting_send=len(state.senders) - state.senders.vacant,
            tasks_waiting_receive=len(state.receivers) - state.receivers.vacant,
            peak_buffer_used=state.peak,
        )

    def __repr__(self) -> str:
        state = self._state
        return (
            f"<{type(self).__name__} at {id(self):#x}{', closed' if self._closed else ''}, "
            f"{len(state.buffer)} of {state.max_buffer_size} buffered>"
        )


class MemorySendChannel(_MemoryEnd, SendChannel[SendType]):
    """The end of a memory channel that values are sent into. Made by `open_memory_channel` and by `clone`.

    Any number of tasks may use it at the same time.
    """

    __slots__ = ()

    def __init__(self, state: State[Any]) -> None:
        super().__init__(state)
        state.open_senders += 1

    def send_nowait(self, value: SendType) -> None:
        """Send `value` if that needs no wait. Not a checkpoint.

        Raises:
            WouldBlock: there is no room, and nobody waits to receive.
            ClosedResourceError, BrokenResourceError: as `send`.
            RuntimeError: a task must be woken, and this is not the kernel's thread.
        """
        state = self._state
        if self._closed:
            self._refuse()
        if state.receivers:
            kernel = current_kernel("send_nowait()")
            task, _ = state.receivers.take()
            kernel.wake(task, value)
        elif not state.open_receivers:
            raise BrokenResourceError("the channel's receiving side is closed: nobody would ever get the value")
        elif len(state.buffer) < state.max_buffer_size:
            state.append(value)
        else:
            raise WouldBlock(f"nobody is waiting to receive, and there is no room: {self!r}")

    @operation
    def send(self, value: SendType) -> Generator[Any, Any, None]:
        """Send `value`. Waits while there is no room for it, behind those who wait already.

        Always a cancel point; a schedule point if it blocks or the budget is used up. A cancelled `send` has not sent.
        Cost: 0.15 us if there is room, 0.7 us from task to task.

        Raises:
            ClosedResourceError: this end is closed; or another task closes it meanwhile, and the value was not sent.
            BrokenResourceError: the receiving side is closed; or is closed meanwhile, and the value was not sent.
            RuntimeError: used outside the kernel.
        """
        kernel = here.kernel or current_kernel("send()")
        kernel.budget -= 1
        if kernel.budget < 0 or kernel.current.scope.cancelled is not None:  # type: ignore[union-attr]
            yield from checkpoint()
        # In essence send_nowait, spelled out, the commonest case first. A call would cost a seventh of an item's time.
        state = self._state
        if (buffer := self._buffer) and len(buffer) < state.peak:
            buffer.append(value)
        elif self._closed:
            self._refuse()
        elif state.receivers:
            task, _ = state.receivers.popleft()
            if state.receivers.vacant:
                state.receivers.tidy()
            del task.trap._tasks[task]
            kernel.wake(task, value)
        elif len(buffer) < state.max_buffer_size or not state.open_receivers:
            self.send_nowait(value)
        else:
            # No signal handler gets in between here, so the task is in the row exactly while it sleeps.
            task = kernel.current
            self._tasks[task] = cell = [task, value]  # type: ignore[index]
            state.senders.append(cell)
            yield self

    def arm(self, kernel: Kernel, task: Task) -> None:
        """Of the trap: `send` has put the task into the row."""

    def abort(self, kernel: Kernel, task: Task) -> bool:
        """Of the trap: the task is cancelled, and takes its value with it."""
        self._state.senders.vacate(self._tasks.pop(task))
        return True

    def clone(self) -> MemorySendChannel[SendType]:
        """Another end of the same channel. The sending side is closed when all its ends are.

        Give each producer its own, and receivers will know when the last one has finished. Not a checkpoint.

        Raises:
            ClosedResourceError: this end is closed.
        """
        if self._closed:
            self._refuse()
        return MemorySendChannel(self._state)

    def for_thread(self) -> ThreadSendChannel[SendType]:
        """A clone for use by threads: its `send` blocks the thread. To be closed by itself. Not a checkpoint.

        Raises:
            ClosedResourceError: this end is closed.
            RuntimeError: used outside the kernel.
        """
        token = current_kernel_token()
        return ThreadSendChannel(self.clone(), token)

    def close(self) -> None:
        """Close this end. What was sent stays sent; tasks that wait in its `send` get `ClosedResourceError`.

        If it is the last one, tasks that wait to receive get `EndOfChannel`. Not a checkpoint. Closing what is closed
        does nothing. Cost: the number of tasks that are woken.

        Raises:
            RuntimeError: tasks must be woken, and this is not the kernel's thread.
        """
        state = self._state
        if self._closed:
            return
        if self._tasks or state.receivers:
            current_kernel("close()")
        state.open_senders -= 1
        self._retire(state.senders)
        while state.receivers and not state.open_senders:
            task, _ = state.receivers.take()
            current_kernel().wake(task, error=EndOfChannel("the sending side was closed, and nothing is left"))


class MemoryReceiveChannel(_MemoryEnd, ReceiveEnd[ReceiveType]):
    """The end of a memory channel that values are received from. Made by `open_memory_channel` and by `clone`.

    Any number of tasks may use it at the same time; each value goes to one of them. `async for` takes values until the
    sending side is closed and nothing is left, or until this end is closed by somebody in between.
    """

    __slots__ = ()

    def __init__(self, state: State[Any]) -> None:
        super().__init__(state)
        state.open_receivers += 1

    def receive_nowait(self) -> ReceiveType:
        """Receive a value if there is one. Not a checkpoint.

        Raises:
            WouldBlock: there is none at the moment.
            EndOfChannel, ClosedResourceError: as `receive`.
            RuntimeError: a task must be woken, and this is not the kernel's thread.
        """
        state = self._state
        if self._closed:
            self._refuse()
        if state.senders:
            kernel = current_kernel("receive_nowait()")
            task, value = state.senders.take()
            kernel.wake(task)
            state.buffer.append(value)
        if state.buffer:
            received: ReceiveType = state.buffer.popleft()
            return received
        if not state.open_senders:
            raise EndOfChannel("the channel's sending side is closed, and nothing is left")
        raise WouldBlock(f"there is nothing to receive at the moment: {self!r}")

    @operation
    def receive(self) -> Generator[Any, Any, ReceiveType]:
        """Receive the next value. Waits while there is none, behind those who wait already.

        Always a cancel point; a schedule point if it blocks or the budget is used up. A cancelled `receive` has taken
        nothing. Cost: as `send`.

        Raises:
            EndOfChannel: the sending side is closed, and nothing is left; or it is closed meanwhile.
            ClosedResourceError: this end is closed; or another task closes it meanwhile.
            RuntimeError: used outside the kernel.
        """
        kernel = here.kernel or current_kernel("receive()")
        kernel.budget -= 1
        if kernel.budget < 0 or kernel.current.scope.cancelled is not None:  # type: ignore[union-attr]
            yield from checkpoint()
        # receive_nowait, spelled out likewise.
        state = self._state
        value: ReceiveType
        if (buffer := self._buffer) and len(buffer) < state.peak:
            value = buffer.popleft()
        elif self._closed:
            self._refuse()
        elif state.senders:
            task, value = state.senders.popleft()
            if state.senders.vacant:
                state.senders.tidy()
            del task.trap._tasks[task]
            kernel.wake(task)
            if buffer:
                buffer.append(value)
                value = buffer.popleft()
        elif buffer or not state.open_senders:
            value = self.receive_nowait()
        else:
            value = yield self
        return value

    def arm(self, kernel: Kernel, task: Task) -> None:
        """Of the trap: the task sleeps until it is handed a value."""
        self._tasks[task] = cell = [task, None]
        self._state.receivers.append(cell)

    def abort(self, kernel: Kernel, task: Task) -> bool:
        """Of the trap: the task is cancelled."""
        self._state.receivers.vacate(self._tasks.pop(task))
        return True

    def clone(self) -> MemoryReceiveChannel[ReceiveType]:
        """Another end of the same channel. The receiving side is closed when all its ends are. Not a checkpoint.

        Clones share the values out among them. To give each of several tasks all values, use `open_broadcast_channel`.

        Raises:
            ClosedResourceError: this end is closed.
        """
        if self._closed:
            self._refuse()
        return MemoryReceiveChannel(self._state)

    def for_thread(self) -> ThreadReceiveChannel[ReceiveType]:
        """A clone for use by threads: its `receive` blocks the thread. To be closed by itself. Not a checkpoint.

        Raises:
            ClosedResourceError: this end is closed.
            RuntimeError: used outside the kernel.
        """
        token = current_kernel_token()
        return ThreadReceiveChannel(self.clone(), token)

    def _give_back(self, value: Any) -> None:
        """The next receiver gets `value`, which was received and not taken. The buffer may be one too long for that."""
        state = self._state
        if state.receivers:
            task, _ = state.receivers.take()
            current_kernel().wake(task, value)
        elif state.open_receivers:
            state.buffer.appendleft(value)

    def close(self) -> None:
        """Close this end. Tasks that wait in its `receive` get `ClosedResourceError`.

        If it is the last one, what is left in the buffer is thrown away, and tasks that wait to send get
        `BrokenResourceError`. Not a checkpoint. Closing what is closed does nothing. Cost: the number of tasks that are
        woken.

        Raises:
            RuntimeError: tasks must be woken, and this is not the kernel's thread.
        """
        state = self._state
        if self._closed:
            return
        if self._tasks or state.senders:
            current_kernel("close()")
        state.open_receivers -= 1
        self._retire(state.receivers)
        if state.open_receivers:
            return
        state.buffer.clear()
        while state.senders:
            task, _ = state.senders.take()
            current_kernel().wake(task, error=BrokenResourceError("the channel's receiving side was closed meanwhile"))


class open_memory_channel(tuple[MemorySendChannel[T], MemoryReceiveChannel[T]]):
    """Open a channel: `send_channel, receive_channel = open_memory_channel(max_buffer_size)`. Data flows to the right.

    `max_buffer_size` is how many values may be in it before `send` waits: a whole number or `math.inf`. With 0, `send`
    waits for a receiver; if in doubt, take that. `open_memory_channel[int](5)` says for type checkers what is sent.

    May be called outside the kernel. Cost: 2 us. It is a class, for the brackets; what it returns is a plain tuple.

    Raises:
        TypeError: `max_buffer_size` is neither a whole number nor `math.inf`.
        ValueError: it is negative.
    """

    def __new__(  # type: ignore[misc]
        cls, max_buffer_size: float
    ) -> tuple[MemorySendChannel[T], MemoryReceiveChannel[T]]:
        check_buffer_size(max_buffer_size, 0)
        state: State[T] = State(max_buffer_size, deque())
        return MemorySendChannel(state), MemoryReceiveChannel(state)

    def __init__(self, max_buffer_size: float) -> None:
        """Never called: for type checkers."""
