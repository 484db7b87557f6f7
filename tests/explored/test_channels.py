"""Channels: all schedules of two or three tasks. No value is lost, none comes twice, and the order is kept."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from explored.scenes import Scene, committed, explored, large

import kernel
from kernel.core.task import Task
from kernel.lowlevel import checkpoint, current_task


class Books(Scene):
    """What was sent, and what has arrived.

    A value is `sent` when `send` has returned. One whose `send` was cut short must not arrive, and one that was sent
    must: it is with a receiver, or in the buffer, unless it was there when the last receiver closed.
    """

    def __init__(self) -> None:
        self.offered: list[str] = []  # whose `send` has not returned. It may have been cancelled, or be asleep
        self.sent: list[str] = []
        self.received: list[str] = []
        self.receiving: list[Task] = []

    async def _send(self, channel: Any, *values: str) -> None:
        """Send, and close. It is no error if nobody receives any more."""
        with channel, suppress(kernel.BrokenResourceError):
            for value in values:
                self.offered.append(value)
                await channel.send(value)
                self.offered.remove(value)
                self.sent.append(value)

    async def _receive(self, channel: Any, most: int = 9) -> None:
        """Receive as many as there are, or `most`, and close."""
        self.receiving.append(current_task())
        with channel, suppress(kernel.EndOfChannel):
            try:
                for _ in range(most):
                    before = self.buffered()
                    value = await channel.receive()
                    self.look(value, before)
                    self.received.append(value)
            finally:
                self.receiving.remove(current_task())

    def look(self, value: str, before: list[str]) -> None:
        """At a value that was received, and at what was in the buffer before."""

    def buffered(self) -> list[str]:
        raise NotImplementedError

    def on_the_way(self) -> list[str]:
        """What was handed to a receiver that has not run since."""
        return [task.value for task in self.receiving if committed(task) and isinstance(task.value, str)]

    def each_value_once(self) -> None:
        there = self.received + self.on_the_way() + self.buffered()
        assert len(there) == len(set(there)), "a value has come twice"
        assert set(self.sent) <= set(there), "a value is lost"

    def nothing_else_has_come(self) -> None:
        """When all is over, what was not sent has not arrived."""
        assert not set(self.received) & set(self.offered), "a send that failed has sent"

    def in_order(self) -> None:
        """The values of one sender, all beginning with the same letter, arrive in the order of their numbers."""
        for sender in {value[0] for value in self.received}:
            values = [value for value in self.received if value[0] == sender]
            assert values == sorted(values)


# ---- memory channels --------------------------------------------------------------------------------


class OneChannel(Books):
    size: float = 0
    one_receiver = True

    def __init__(self) -> None:
        super().__init__()
        self.send_channel, self.receive_channel = kernel.open_memory_channel[str](self.size)

    def buffered(self) -> list[str]:
        return list(self.send_channel._state.buffer)

    def between_steps(self) -> None:
        state, statistics = self.send_channel._state, self.send_channel.statistics()
        assert statistics.current_buffer_used <= self.size
        assert not (statistics.tasks_waiting_send and statistics.tasks_waiting_receive)
        assert not statistics.tasks_waiting_send or statistics.current_buffer_used == self.size
        assert not statistics.tasks_waiting_receive or not state.buffer
        if statistics.open_receive_channels:
            self.each_value_once()

    def at_the_end(self) -> None:
        self.between_steps()
        if self.one_receiver:
            self.in_order()
        self.nothing_else_has_come()
        statistics = self.send_channel.statistics()
        assert statistics.tasks_waiting_send == statistics.tasks_waiting_receive == 0


class SenderAndReceiver(OneChannel):
    async def ann(self) -> None:
        await self._send(self.send_channel, "a1", "a2")

    async def rob(self) -> None:
        await self._receive(self.receive_channel)


class SenderAndReceiverAndRoom(SenderAndReceiver):
    size = 1


class TwoSenders(OneChannel):
    def __init__(self) -> None:
        super().__init__()
        self.clone = self.send_channel.clone()

    async def ann(self) -> None:
        await self._send(self.send_channel, "a1")

    async def ben(self) -> None:
        await self._send(self.clone, "b1")

    async def rob(self) -> None:
        await self._receive(self.receive_channel, 1)


class TwoSendersAndRoom(TwoSenders):
    size = 1


class TwoSendersToTheEnd(TwoSenders):
    async def rob(self) -> None:
        await self._receive(self.receive_channel)


class TwoSendersAndRoomToTheEnd(TwoSendersToTheEnd):
    size = 1


class TwoReceivers(OneChannel):
    one_receiver = False

    def __init__(self) -> None:
        super().__init__()
        self.clone = self.receive_channel.clone()

    async def ann(self) -> None:
        await self._send(self.send_channel, "a1")

    async def rob(self) -> None:
        await self._receive(self.receive_channel, 1)

    async def sue(self) -> None:
        await self._receive(self.clone, 1)


class TwoReceiversOfTwo(TwoReceivers):
    async def ann(self) -> None:
        await self._send(self.send_channel, "a1", "a2")


class OneWhoDoesNotWait(OneChannel):
    """Takes what is there, also from a sender that waits, and sends where there is room."""

    size = 1

    async def ann(self) -> None:
        await self._send(self.send_channel.clone(), "a1", "a2")

    async def nora(self) -> None:
        with self.receive_channel:
            self._take_all()
            with suppress(kernel.WouldBlock):
                self.send_channel.send_nowait("n1")
                self.sent.append("n1")
            await checkpoint()
            self._take_all()

    def _take_all(self) -> None:
        with suppress(kernel.WouldBlock):
            while True:
                self.received.append(self.receive_channel.receive_nowait())
                self.between_steps()


class ClosedUnderTheirHands(OneChannel):
    """Somebody closes the end at which others wait."""

    async def rob(self) -> None:
        with suppress(kernel.ClosedResourceError):
            await self._receive(self.receive_channel)

    async def ann(self) -> None:
        with suppress(kernel.ClosedResourceError):
            await self._send(self.send_channel, "a1")

    async def closer(self) -> None:
        with self.receive_channel, self.send_channel:
            pass


class ClosedUnderTheirHandsTheOtherWay(ClosedUnderTheirHands):
    async def closer(self) -> None:
        with self.send_channel, self.receive_channel:
            await checkpoint()


MEMORY = [
    SenderAndReceiver,
    SenderAndReceiverAndRoom,
    large(TwoSenders),
    TwoSendersAndRoom,
    large(TwoSendersToTheEnd),
    large(TwoSendersAndRoomToTheEnd),
    TwoReceivers,
    OneWhoDoesNotWait,
    large(TwoReceiversOfTwo),
    ClosedUnderTheirHands,
    large(ClosedUnderTheirHandsTheOtherWay),
]


@pytest.mark.parametrize("scene", MEMORY)
def test_memory_channel_delivers_each_value_once_and_in_order(scene: type[Scene]) -> None:
    explored(scene)


class ByUrgency(Books):
    """A priority channel: what is received is the smallest of what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.send_channel, self.receive_channel = kernel.open_priority_channel(2, key=lambda value: int(value[1]))

    async def ann(self) -> None:
        await self._send(self.send_channel, "a3", "a1")

    async def rob(self) -> None:
        await self._receive(self.receive_channel)

    def look(self, value: str, before: list[str]) -> None:
        assert all(value[1] <= other[1] for other in before), "something smaller was there"

    def buffered(self) -> list[str]:
        return [value for _, _, value in self.receive_channel._plain._state.buffer]

    def on_the_way(self) -> list[str]:
        return [task.value[2] for task in self.receiving if committed(task) and isinstance(task.value, tuple)]

    def between_steps(self) -> None:
        if not self.receive_channel._closed:
            self.each_value_once()

    def at_the_end(self) -> None:
        self.nothing_else_has_come()


def test_priority_channel_hands_out_the_smallest_that_is_there() -> None:
    explored(ByUrgency)


# ---- broadcast channels -----------------------------------------------------------------------------


class OneBroadcast(Scene):
    """Each receiver notes what it gets. The values are 1 and 2, sent by one task."""

    slow: Any = "wait"

    def __init__(self) -> None:
        self.send_channel = kernel.open_broadcast_channel(1, slow=self.slow)
        self.receivers = {name: self.send_channel.subscribe() for name in ("rob", "sue")}
        self.got: dict[str, list[str]] = {name: [] for name in self.receivers}
        self.sent: list[str] = []
        self.withdrawn: list[str] = []

    async def _send(self, *values: str) -> None:
        for value in values:
            try:
                await self.send_channel.send(value)
            except BaseException:
                self.withdrawn.append(value)
                raise
            self.sent.append(value)

    async def _receive_all(self) -> None:
        name = current_task().name
        with self.receivers[name] as channel:
            async for value in channel:
                self.got[name].append(value)

    def between_steps(self) -> None:
        hub = self.send_channel._hub
        buffers = [receiver._buffer for receiver in hub.receivers]
        assert all(len(buffer) <= 1 for buffer in buffers)
        assert hub.full == (sum(len(buffer) == 1 for buffer in buffers) if self.slow == "wait" else 0)
        assert not hub.senders or hub.full
        assert not any(receiver._tasks and receiver._buffer for receiver in hub.receivers)
        for values in self.got.values():
            assert not set(values) & set(self.withdrawn)
            assert values == sorted(values)

    def at_the_end(self) -> None:
        statistics = self.send_channel.statistics()
        assert statistics.tasks_waiting_send == statistics.tasks_waiting_receive == 0


class SlowOneSetsThePace(OneBroadcast):
    def __init__(self) -> None:
        super().__init__()
        self.receivers["sue"].close()

    async def ann(self) -> None:
        with self.send_channel:
            await self._send("1", "2")

    async def rob(self) -> None:
        await self._receive_all()
        assert set(self.sent) <= set(self.got["rob"])


class OneWhoLeavesMakesRoom(SlowOneSetsThePace):
    async def rob(self) -> None:
        with self.receivers["rob"]:
            await checkpoint()


class AllGetAll(OneBroadcast):
    async def ann(self) -> None:
        with self.send_channel:
            await self._send("1")

    async def rob(self) -> None:
        await self._receive_one()

    async def sue(self) -> None:
        await self._receive_one()

    async def _receive_one(self) -> None:
        name = current_task().name
        with self.receivers[name] as channel, suppress(kernel.EndOfChannel):
            self.got[name].append(await channel.receive())

    def at_the_end(self) -> None:
        super().at_the_end()
        assert self.sent or not any(self.got.values())


class AllGetAllOfTwo(AllGetAll):
    async def ann(self) -> None:
        with self.send_channel:
            await self._send("1", "2")

    async def rob(self) -> None:
        await self._receive_all()
        assert set(self.sent) <= set(self.got["rob"])


class SlowOnesLose(OneBroadcast):
    slow = "drop_oldest"

    async def ann(self) -> None:
        with self.send_channel:
            await self._send("1", "2")

    async def rob(self) -> None:
        await self._receive_all()
        assert len(self.got["rob"]) + self.receivers["rob"].dropped == len(self.sent)


class SlowOnesAreTold(OneBroadcast):
    slow = "error"

    async def ann(self) -> None:
        with self.send_channel:
            await self._send("1", "2")

    async def rob(self) -> None:
        told, channel = 0, self.receivers["rob"]
        with channel, suppress(kernel.EndOfChannel):
            while True:
                try:
                    self.got["rob"].append(await channel.receive())
                except kernel.LaggedError as error:
                    told += error.dropped
        assert told == channel.dropped
        assert len(self.got["rob"]) + told == len(self.sent)


@pytest.mark.parametrize(
    "scene",
    [SlowOneSetsThePace, OneWhoLeavesMakesRoom, AllGetAll, large(AllGetAllOfTwo), SlowOnesLose, SlowOnesAreTold],
)
def test_broadcast_channel_reaches_all_or_nobody(scene: type[Scene]) -> None:
    explored(scene)


# ---- latest-value channels --------------------------------------------------------------------------


class TheLatest(Scene):
    def __init__(self) -> None:
        self.send_channel = kernel.open_latest_channel(0)
        self.receive_channel = self.send_channel.subscribe()
        self.got: list[int] = []

    async def setter(self) -> None:
        with self.send_channel:
            self.send_channel.set(1)
            await checkpoint()
            self.send_channel.set(2)

    async def rob(self) -> None:
        async for value in self.receive_channel:
            assert value == self.send_channel.value, "not the latest"
            self.got.append(value)
        assert self.got[-1] == self.send_channel.value, "the last one is missing"

    def between_steps(self) -> None:
        assert self.got == sorted(set(self.got)), "a value has come twice"

    def at_the_end(self) -> None:
        assert not self.send_channel._cell.waiting


def test_latest_channel_never_misses_the_last_value() -> None:
    explored(TheLatest)


# ---- a channel out of an async generator ------------------------------------------------------------


class Safe(Scene):
    """The generator is never ahead of its consumer, and is closed when the block is left."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.got: list[int] = []
        self.closed = False

    async def rob(self) -> None:
        @kernel.as_safe_channel
        async def numbers() -> Any:
            try:
                for number in (1, 2):
                    self.made.append(number)
                    yield number
                    await checkpoint()
            finally:
                self.closed = True

        async with numbers() as channel:
            async for number in channel:
                self.got.append(number)
                if number == 2:
                    break

    def between_steps(self) -> None:
        assert self.got == self.made[: len(self.got)]
        assert len(self.made) <= len(self.got) + 1

    def at_the_end(self) -> None:
        assert self.closed or not self.made


def test_safe_channel_closes_its_generator_however_the_block_is_left() -> None:
    explored(Safe)
