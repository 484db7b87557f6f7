"""Priority channels: a memory channel out of which the smallest comes first.

    send_channel, receive_channel = open_priority_channel(math.inf, key=lambda job: job.deadline)

It *is* a memory channel, with a heap for a buffer, in which each value travels with its key and a number. The number
keeps values of equal keys in the order in which they were sent, and the values themselves are never compared.

Only what is in the buffer can be put in order. Senders that wait for room wait in their own order; the value of the
first one takes part as soon as the next value is received. With `key=lambda value: -next(counter)` the last value comes
first: a stack.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from heapq import heappop, heappush
from itertools import count
from math import isnan
from typing import Any, TypeVar

from ..abc import SendChannel
from ..core.traps import operation
from .ends import End, ReceiveEnd, check_buffer_size
from .memory import MemoryChannelStatistics, MemoryReceiveChannel, MemorySendChannel, State

__all__ = ["PriorityReceiveChannel", "PrioritySendChannel", "open_priority_channel"]

T = TypeVar("T")


class _Heap(list[Any]):
    """Has what a memory channel needs of its deque, and hands out the smallest."""

    __slots__ = ()

    def append(self, entry: Any) -> None:
        heappush(self, entry)

    appendleft = append

    def popleft(self) -> Any:
        return heappop(self)


Entry = tuple[float, int, T]


class PrioritySendChannel(End, SendChannel[T]):
    """The sending end. Its methods are those of `MemorySendChannel`, with the same errors and costs."""

    __slots__ = ("_key", "_numbers", "_plain")

    def __init__(self, plain: MemorySendChannel[Entry[T]], key: Callable[[T], float], numbers: count[int]) -> None:
        self._closed = False
        self._plain = plain
        self._key = key
        self._numbers = numbers

    def _entry(self, value: T) -> Entry[T]:
        key = float(self._key(value))
        if isnan(key):
            raise ValueError(f"the key of {value!r} is NaN, which has no place in any order")
        return key, next(self._numbers), value

    def send_nowait(self, value: T) -> None:
        """As `MemorySendChannel.send_nowait`. Whatever `key` raises is raised here, and nothing is sent."""
        self._plain.send_nowait(self._entry(value))

    @operation
    def send(self, value: T) -> Generator[Any, Any, None]:
        """As `MemorySendChannel.send`. Whatever `key` raises is raised here, and nothing is sent."""
        yield from self._plain.send(self._entry(value))

    def clone(self) -> PrioritySendChannel[T]:
        """As `MemorySendChannel.clone`."""
        return PrioritySendChannel(self._plain.clone(), self._key, self._numbers)

    def close(self) -> None:
        """As `MemorySendChannel.close`."""
        self._plain.close()
        self._closed = True

    def statistics(self) -> MemoryChannelStatistics:
        """As `MemorySendChannel.statistics`."""
        return self._plain.statistics()


class PriorityReceiveChannel(ReceiveEnd[T]):
    """The receiving end. Its methods are those of `MemoryReceiveChannel`, with the same errors and costs."""

    __slots__ = ("_plain",)

    def __init__(self, plain: MemoryReceiveChannel[Entry[T]]) -> None:
        self._closed = False
        self._plain = plain

    def receive_nowait(self) -> T:
        """As `MemoryReceiveChannel.receive_nowait`; the value with the smallest key."""
        return self._plain.receive_nowait()[2]

    @operation
    def receive(self) -> Generator[Any, Any, T]:
        """As `MemoryReceiveChannel.receive`; the value with the smallest key."""
        entry = yield from self._plain.receive()
        return entry[2]

    def clone(self) -> PriorityReceiveChannel[T]:
        """As `MemoryReceiveChannel.clone`."""
        return PriorityReceiveChannel(self._plain.clone())

    def close(self) -> None:
        """As `MemoryReceiveChannel.close`."""
        self._plain.close()
        self._closed = True

    def statistics(self) -> MemoryChannelStatistics:
        """As `MemoryReceiveChannel.statistics`."""
        return self._plain.statistics()


def open_priority_channel(
    max_buffer_size: float, *, key: Callable[[T], float]
) -> tuple[PrioritySendChannel[T], PriorityReceiveChannel[T]]:
    """Open a channel out of which the value with the smallest key comes first; of equal ones, that which was sent
    first.

    Args:
        max_buffer_size: how many values may be in the buffer before `send` waits: a whole number or `math.inf`.
        key: is called once for each value, when it is sent, and returns a number.

    Raises:
        TypeError: `max_buffer_size` is neither a whole number nor `math.inf`; `key` is not callable.
        ValueError: `max_buffer_size` is negative.
    """
    check_buffer_size(max_buffer_size, 0)
    if not callable(key):
        raise TypeError(f"key must be a function that returns a number, not {key!r}")
    state: State[Entry[T]] = State(max_buffer_size, _Heap())
    return PrioritySendChannel(MemorySendChannel(state), key, count()), PriorityReceiveChannel(
        MemoryReceiveChannel(state)
    )
