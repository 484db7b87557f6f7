"""Channels against plain models: whatever is done in whatever order, they do what lists would.

One rule: a handful of acts in one go, with no task taking a step in between. An act is a call that does not wait, the
start or the cancelling of one that may, closing or cloning an end. Then everybody runs until all wait, and the model
must have said who got what, who was cancelled, in which order all of them ran, and what the channel looks like. So the
races between hand-over, cancellation and closing are played through in every order, without a clock.

After that the conservation law, in bulk and under random cancellation: what was sent is received, is still in the
buffer, or its `send` raised; nothing comes twice; and the values of one sender stay in order. `KERNEL_TEST_LONG=1`
draws fifty times as many machines, new ones each time, and does more than a million operations.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from math import inf
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import kernel
from kernel import (
    BrokenResourceError,
    Cancelled,
    CancelScope,
    ClosedResourceError,
    EndOfChannel,
    LaggedError,
    WouldBlock,
    open_broadcast_channel,
    open_latest_channel,
    open_memory_channel,
    open_nursery,
    open_priority_channel,
)
from kernel.lowlevel import Park, checkpoint
from kernel.testing import MockClock

LONG = os.environ.get("KERNEL_TEST_LONG", "") not in ("", "0")

ERRORS = (BrokenResourceError, ClosedResourceError, EndOfChannel, LaggedError, WouldBlock)

Act = tuple[str, int]


class Refused(Exception):
    """The model's way to say that the real one raises: with the name of the error."""


# ---- the models -----------------------------------------------------------------------------------------


class Model:
    """What the models have in common: calls are numbers, ends are indices, and `ready` is who runs next, and how.

    In `ready` are (call, outcome), in the order of their turns; outcome is None for a call that has not begun.
    """

    def __init__(self) -> None:
        self.ready: list[tuple[int, str | None]] = []
        self.calls: list[tuple[str, int, Any]] = []  # what each call is to do: name, end, value
        self.cancelled: set[int] = set()
        self.senders: list[int] = []  # calls that wait
        self.receivers: list[int] = []
        self.sides: list[str] = []  # of each end: "send" or "receive"
        self.closed: list[bool] = []

    def open_ends(self, side: str) -> list[int]:
        return [end for end, its in enumerate(self.sides) if its == side and not self.closed[end]]

    def new_end(self, side: str) -> None:
        self.sides.append(side)
        self.closed.append(False)

    def start(self, name: str, end: int, value: Any) -> None:
        self.calls.append((name, end, value))
        self.ready.append((len(self.calls) - 1, None))

    def wake(self, call: int, outcome: str) -> None:
        self.ready.append((call, outcome))

    def cancel(self, call: int) -> None:
        self.cancelled.add(call)
        for row in (self.senders, self.receivers):
            if call in row:
                row.remove(call)
                self.wake(call, "Cancelled")

    def begin(self, call: int) -> str | None:
        """The call's first step: how it ends, or None if it waits."""
        name, end, value = self.calls[call]
        if call in self.cancelled:
            self.wake(call, "Cancelled")  # at its first checkpoint, for which it queues
            return None
        try:
            return str(getattr(self, name)(end, value))
        except Refused as refused:
            if str(refused) != "WouldBlock":
                return str(refused)
        (self.senders if name == "send" else self.receivers).append(call)
        return None

    def fail(self, row: list[int], error: str, end: int | None = None) -> None:
        for call in [call for call in row if end is None or self.calls[call][1] == end]:
            row.remove(call)
            self.wake(call, error)

    def check_open(self, end: int) -> None:
        if self.closed[end]:
            raise Refused("ClosedResourceError")


class MemoryModel(Model):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.size, self.peak = size, 0
        self.buffer: list[Any] = []
        self.new_end("send")
        self.new_end("receive")

    def send(self, end: int, value: Any) -> None:
        self.check_open(end)
        if self.receivers:
            self.wake(self.receivers.pop(0), str(value))
        elif not self.open_ends("receive"):
            raise Refused("BrokenResourceError")
        elif len(self.buffer) < self.size:
            self.put(value)
            self.peak = max(self.peak, len(self.buffer))
        else:
            raise Refused("WouldBlock")

    def put(self, value: Any) -> None:
        self.buffer.append(value)

    def receive(self, end: int, _: Any) -> Any:
        self.check_open(end)
        if self.senders:
            sender = self.senders.pop(0)
            self.put(self.calls[sender][2])
            self.wake(sender, "None")
        if self.buffer:
            return self.buffer.pop(0)
        raise Refused("WouldBlock" if self.open_ends("send") else "EndOfChannel")

    def clone(self, end: int) -> None:
        self.check_open(end)
        self.new_end(self.sides[end])

    def close(self, end: int) -> None:
        if self.closed[end]:
            return
        self.closed[end] = True
        if self.sides[end] == "send":
            self.fail(self.senders, "ClosedResourceError", end)
            if not self.open_ends("send"):
                self.fail(self.receivers, "EndOfChannel")
        else:
            self.fail(self.receivers, "ClosedResourceError", end)
            if not self.open_ends("receive"):
                self.buffer.clear()
                self.fail(self.senders, "BrokenResourceError")

    def state(self) -> object:
        return (
            len(self.buffer), len(self.open_ends("send")), len(self.open_ends("receive")),
            len(self.senders), len(self.receivers), self.peak,
        )  # fmt: skip


class PriorityModel(MemoryModel):
    """Values are numbers; the key is the number modulo 3. Python's sort is stable."""

    def put(self, value: Any) -> None:
        self.buffer.append(value)
        self.buffer.sort(key=lambda number: int(number % 3))


class BroadcastModel(Model):
    def __init__(self, size: float, slow: str) -> None:
        super().__init__()
        self.size, self.slow = size, slow
        self.buffers: dict[int, list[Any]] = {}
        self.lost: dict[int, int] = {}
        self.new_end("send")

    def full(self) -> bool:
        return self.slow == "wait" and any(len(buffer) >= self.size for buffer in self.buffers.values())

    def send(self, end: int, value: Any) -> None:
        self.check_open(end)
        if self.full():
            raise Refused("WouldBlock")
        self.deliver(value)

    def deliver(self, value: Any) -> None:
        for end, buffer in self.buffers.items():
            waiting = [call for call in self.receivers if self.calls[call][1] == end]
            if waiting:
                self.receivers.remove(waiting[0])
                self.wake(waiting[0], str(value))
            else:
                buffer.append(value)
                if len(buffer) > self.size:
                    del buffer[0]
                    self.lost[end] += 1

    def admit(self) -> None:
        while self.senders and not self.full():
            sender = self.senders.pop(0)
            self.wake(sender, "None")
            self.deliver(self.calls[sender][2])

    def receive(self, end: int, _: Any) -> Any:
        self.check_open(end)
        if self.slow == "error" and self.lost[end]:
            self.lost[end] = 0
            raise Refused("LaggedError")
        if self.buffers[end]:
            value = self.buffers[end].pop(0)
            self.admit()
            return value
        raise Refused("WouldBlock" if self.open_ends("send") else "EndOfChannel")

    def subscribe(self, end: int) -> None:
        self.check_open(end)
        self.new_end("receive")
        self.buffers[len(self.sides) - 1] = []
        self.lost[len(self.sides) - 1] = 0

    def clone(self, end: int) -> None:
        self.check_open(end)
        self.new_end(self.sides[end])
        if self.sides[end] == "receive":
            self.buffers[len(self.sides) - 1] = self.buffers[end].copy()
            self.lost[len(self.sides) - 1] = self.lost[end]

    def close(self, end: int) -> None:
        if self.closed[end]:
            return
        self.closed[end] = True
        if self.sides[end] == "send":
            self.fail(self.senders, "ClosedResourceError", end)
            if not self.open_ends("send"):
                for receiver in self.open_ends("receive"):
                    self.fail(self.receivers, "EndOfChannel", receiver)
        else:
            del self.buffers[end]
            self.fail(self.receivers, "ClosedResourceError", end)
            self.admit()

    def state(self) -> object:
        return (
            len(self.open_ends("send")), len(self.open_ends("receive")), len(self.senders), len(self.receivers),
            max(map(len, self.buffers.values()), default=0),
        )  # fmt: skip


class LatestModel(Model):
    """Values are numbered by their position in `values`."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Any] = ["initial"]
        self.seen: dict[int, int] = {}
        self.new_end("send")

    def send(self, end: int, value: Any) -> None:
        self.check_open(end)
        self.values.append(value)
        for call in self.receivers:
            self.wake(call, "newest")
        self.receivers.clear()

    def receive(self, end: int, _: Any) -> Any:
        self.check_open(end)
        if self.seen[end] < len(self.values):
            return self.newest(end)
        raise Refused("WouldBlock" if self.open_ends("send") else "EndOfChannel")

    def newest(self, end: int) -> Any:
        self.seen[end] = len(self.values)
        return self.values[-1]

    def subscribe(self, end: int) -> None:
        self.new_end("receive")
        self.seen[len(self.sides) - 1] = 0

    def clone(self, end: int) -> None:
        self.check_open(end)
        self.new_end("receive")
        self.seen[len(self.sides) - 1] = self.seen[end]

    def close(self, end: int) -> None:
        if not self.closed[end]:
            self.closed[end] = True
            if self.sides[end] == "send":
                self.fail(self.receivers, "EndOfChannel")
            else:
                self.fail(self.receivers, "ClosedResourceError", end)

    def state(self) -> object:
        return self.values[-1]


# ---- the machines ---------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Runs a kernel by hand: after each rule, until everybody waits."""

    model: Any
    extra: tuple[str, ...] = ()
    """Acts that only this kind of channel has."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[object] = []
        self.expected: list[object] = []
        self.ends: list[Any] = []
        self.scopes: list[CancelScope] = []
        self.values = 0
        self.kernel = kernel.Kernel(detect_deadlock=False)
        self.kernel.start(self._main, ())
        self._settle()

    async def _main(self) -> None:
        async with open_nursery() as self.nursery:
            await Park("the end of the test")

    def _settle(self) -> None:
        while self.kernel.ready:
            self.kernel.run_ready()

    async def _call(self, number: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        with self.scopes[number]:
            try:
                outcome = str(await fn(*args))
            except Cancelled:
                self.log.append((number, "Cancelled"))
                raise
            except ERRORS as error:
                outcome = type(error).__name__
            self.log.append((number, outcome))

    names = ("start send", "start send", "start receive", "start receive", "send", "receive", "cancel", "cancel")

    @rule(data=st.data())
    def act(self, data: st.DataObject) -> None:
        names = st.sampled_from(self.names + self.names + self.extra + ("clone", "close"))
        for name, number in data.draw(st.lists(st.tuples(names, st.integers(0, 11)), min_size=1, max_size=8)):
            self.do(name, number)
        self._settle()
        self.run_model()
        assert self.log == self.expected
        assert self.state() == self.model.state()
        self.check_rows()

    def do(self, name: str, number: int) -> None:
        """One act, by both. What `number` means depends: a call, an end, an end of the right side."""
        model = self.model
        if name == "cancel":
            if self.scopes:
                call = len(self.scopes) - 1 - number % len(self.scopes)  # with a liking for the newest
                model.cancel(call)
                self.scopes[call].cancel()
            return
        verb = name.removeprefix("start ")
        side = verb if verb in ("send", "receive") else "send" if verb == "subscribe" else None
        ends = [end for end, its in enumerate(model.sides) if side in (None, its)]
        if not ends or (verb in ("clone", "subscribe") and len(model.sides) > 8):
            return
        end = ends[number % len(ends)]
        real = self.ends[end]
        value = self.values
        self.values += verb == "send"
        args = (value,) if verb == "send" else ()
        if name.startswith("start "):
            self.scopes.append(CancelScope())
            model.start(verb, end, value)
            self.nursery.start_soon(self._call, len(self.scopes) - 1, getattr(real, verb), args)
            return
        try:
            if side in ("send", "receive") and verb == side:
                outcome = str(getattr(model, verb)(end, value))
            else:
                outcome = str(getattr(model, verb)(end))
        except Refused as refused:
            outcome = str(refused)
        try:
            result = getattr(real, verb + "_nowait" * (verb in ("send", "receive")))(*args)
        except ERRORS as error:
            result = type(error).__name__
        if verb in ("clone", "subscribe") and not isinstance(result, str):
            self.ends.append(result)
            result = None
        assert str(result) == outcome, (name, number)

    def run_model(self) -> None:
        model = self.model
        while model.ready:
            call, outcome = model.ready.pop(0)
            if outcome is None:
                outcome = model.begin(call)
            if outcome is not None:
                self.expected.append((call, outcome))

    def state(self) -> object:
        raise NotImplementedError

    def check_rows(self) -> None:
        """Who sleeps on an end is known to it, and the other way round."""
        waiting = {task for task in self.nursery.child_tasks if task.trap is not None}
        known = [task for end in self.ends for task in end._tasks]
        assert len(known) == len(waiting)
        assert set(known) == waiting
        for end in self.ends:
            assert all(task.trap is end for task in end._tasks)

    def teardown(self) -> None:
        try:
            self.nursery.cancel_scope.cancel()
            self.kernel.drive()
        finally:
            outcome = self.kernel.finish()
            self.kernel.close()
        assert outcome is not None
        outcome.unwrap()


SIZES = st.sampled_from([0, 1, 2, inf])


class MemoryMachine(Machine):
    @initialize(size=SIZES)
    def open(self, size: float) -> None:
        self.ends = list(open_memory_channel[int](size))
        self.model = MemoryModel(size)

    def state(self) -> object:
        told = self.ends[0].statistics()
        assert all(end.statistics() == told for end in self.ends)
        return (
            told.current_buffer_used, told.open_send_channels, told.open_receive_channels,
            told.tasks_waiting_send, told.tasks_waiting_receive, told.peak_buffer_used,
        )  # fmt: skip

    def check_rows(self) -> None:
        super().check_rows()
        state = self.ends[0]._state
        for row, method in ((state.senders, "send"), (state.receivers, "receive")):
            assert not row or row[0][0] is not None
            assert row.vacant == sum(cell[0] is None for cell in row)
            cells = [id(cell) for end in self.ends if hasattr(end, method) for cell in end._tasks.values()]
            assert sorted(cells) == sorted(id(cell) for cell in row if cell[0] is not None)


class PriorityMachine(Machine):
    @initialize(size=SIZES)
    def open(self, size: float) -> None:
        self.ends = list(open_priority_channel(size, key=lambda number: number % 3))
        self.model = PriorityModel(size)

    state = MemoryMachine.state

    def check_rows(self) -> None:
        assert sum(task.trap is not None for task in self.nursery.child_tasks) == len(
            self.model.senders + self.model.receivers
        )


class BroadcastMachine(Machine):
    extra = ("subscribe", "subscribe")

    @initialize(size=st.sampled_from([1, 2, inf]), slow=st.sampled_from(["wait", "wait", "drop_oldest", "error"]))
    def open(self, size: float, slow: Any) -> None:
        self.ends = [open_broadcast_channel(size, slow=slow)]
        self.model = BroadcastModel(size, slow)

    def state(self) -> object:
        told = self.ends[0].statistics()
        return (
            told.open_send_channels, told.open_receive_channels, told.tasks_waiting_send, told.tasks_waiting_receive,
            told.longest_buffer,
        )  # fmt: skip

    def check_rows(self) -> None:
        super().check_rows()
        hub = self.ends[0]._hub
        full = sum(len(receiver._buffer) >= hub.max_buffer_size for receiver in hub.receivers)
        assert hub.full == (full if hub.slow == "wait" else 0)
        assert hub.full or not hub.senders


class LatestMachine(Machine):
    """`set` stands for both kinds of sending; a woken receiver gets what is newest when it runs."""

    names = ("start receive", "start receive", "start receive", "send", "send", "cancel")
    extra = ("subscribe", "subscribe")

    @initialize()
    def open(self) -> None:
        self.ends = [open_latest_channel("initial")]
        self.model = LatestModel()

    def do(self, name: str, number: int) -> None:
        if name == "send":
            value, self.values = self.values, self.values + 1
            try:
                self.model.send(0, value)
            except Refused:
                with pytest.raises(ClosedResourceError):
                    self.ends[0].set(value)
            else:
                self.ends[0].set(value)
        elif name != "clone" or self.model.sides[number % len(self.model.sides)] == "receive":
            super().do(name, number)

    def run_model(self) -> None:
        model = self.model
        while model.ready:
            call, outcome = model.ready.pop(0)
            if outcome == "newest":
                outcome = str(model.newest(model.calls[call][1]))
            elif outcome is None:
                outcome = model.begin(call)
            if outcome is not None:
                self.expected.append((call, outcome))

    def state(self) -> object:
        return self.ends[0].value

    def check_rows(self) -> None:
        cell = self.ends[0]._cell
        waiting = {task for task in self.nursery.child_tasks if task.trap is not None}
        assert set(cell.waiting) == waiting
        for task, end in cell.waiting.items():
            assert task.trap is end
            assert task in end._tasks


_settings = settings(max_examples=1500 if LONG else 30, stateful_step_count=25, deadline=None, derandomize=not LONG)

TestMemory = MemoryMachine.TestCase
TestPriority = PriorityMachine.TestCase
TestBroadcast = BroadcastMachine.TestCase
TestLatest = LatestMachine.TestCase
for _case in (TestMemory, TestPriority, TestBroadcast, TestLatest):
    _case.settings = _settings
del _case


# ---- the conservation law -------------------------------------------------------------------------------


class Mill:
    """Producers and consumers with no patience, on one channel, and somebody who cancels and closes at random.

    Each producer numbers its values. Its `sent` are those whose `send` returned, its `refused` those whose `send`
    raised. Each consumer has its own clone, which it closes now and then to take another.
    """

    PRODUCERS = 4
    CONSUMERS = 3

    def __init__(self, size: float, operations: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.operations = operations
        self.counts: Counter[str] = Counter()
        self.send_channel, self.receive_channel = open_memory_channel[tuple[int, int]](size)
        self.sent: list[list[int]] = [[] for _ in range(self.PRODUCERS)]
        self.received: list[list[tuple[int, int]]] = [[] for _ in range(self.CONSUMERS)]
        self.scopes: dict[str, CancelScope] = {}

    def patience(self, name: str) -> CancelScope:
        """A scope for one operation: perhaps with a deadline, perhaps to be cancelled by the troublemaker."""
        delay = self.random.choice([inf, inf, inf, 0, 0.001, 0.002])
        self.scopes[name] = scope = kernel.move_on_after(delay)
        return scope

    async def rest(self) -> None:
        how = self.random.random()
        if how < 0.02:
            await kernel.sleep(self.random.choice([0.001, 0.002]))
        elif how < 0.2:
            await checkpoint()

    async def produce(self, name: int, end: Any) -> None:
        number = 0
        while self.counts["send"] < self.operations // 2:
            self.counts["send"] += 1
            number += 1
            if self.random.random() < 0.02:
                fresh = end.clone()
                end.close()
                end = fresh
            try:
                with self.patience(f"p{name}"):
                    if self.random.random() < 0.2:
                        end.send_nowait((name, number))
                    else:
                        await end.send((name, number))
                    self.sent[name].append(number)
                    continue
            except WouldBlock:
                self.counts["send would block"] += 1
            except ClosedResourceError:
                self.counts["send closed"] += 1
                end = self.send_channel.clone()
            await self.rest()
        end.close()

    async def consume(self, name: int, end: Any) -> None:
        while True:
            self.counts["receive"] += 1
            try:
                with self.patience(f"c{name}"):
                    if self.random.random() < 0.2:
                        self.received[name].append(end.receive_nowait())
                    else:
                        self.received[name].append(await end.receive())
                    continue
            except WouldBlock:
                self.counts["receive would block"] += 1
            except ClosedResourceError:
                self.counts["receive closed"] += 1
                end = self.receive_channel.clone()
            except EndOfChannel:
                end.close()
                return
            await self.rest()

    async def trouble(self) -> None:
        """Cancel whatever operation is going on, at any moment."""
        while True:
            if self.random.random() < 0.2:
                await kernel.sleep(0.0005)
            else:
                await checkpoint()
            for _ in range(self.random.randrange(3)):
                self.random.choice(list(self.scopes.values()) or [CancelScope()]).cancel()
                self.counts["cancelled"] += 1
            if self.random.random() < 0.2:  # close an end under somebody who waits at it
                state = self.send_channel._state
                for row in (state.senders, state.receivers):
                    if row:
                        row[0][0].trap.close()

    async def main(self) -> None:
        async with open_nursery() as others:
            others.start_soon(self.trouble)
            async with open_nursery() as consumers:
                for name in range(self.CONSUMERS):
                    consumers.start_soon(self.consume, name, self.receive_channel.clone())
                async with open_nursery() as producers:
                    for name in range(self.PRODUCERS):
                        producers.start_soon(self.produce, name, self.send_channel.clone())
                self.send_channel.close()
            others.cancel_scope.cancel()
        told = self.send_channel.statistics()
        assert (told.open_send_channels, told.tasks_waiting_send, told.tasks_waiting_receive) == (0, 0, 0)
        assert told.current_buffer_used == 0
        self.receive_channel.close()

    def check(self) -> None:
        everything = [value for part in self.received for value in part]
        assert len(everything) == len(set(everything)), "a value came twice"
        assert sorted(everything) == sorted(
            (name, number) for name, numbers in enumerate(self.sent) for number in numbers
        )
        for part in self.received:
            for name in range(self.PRODUCERS):
                numbers = [number for whose, number in part if whose == name]
                assert numbers == sorted(numbers), "a sender's values came out of order"


@pytest.mark.parametrize("size", [0, 1, 3, 100, inf])
def test_values_sent_are_received_once_or_their_send_raised(size: float) -> None:
    operations = 300_000 if LONG else 4000
    mill = Mill(size, operations, seed=random.randrange(10**6) if LONG else 1)
    kernel.run(mill.main, clock=MockClock(autojump_threshold=0))
    mill.check()
    assert mill.counts["send"] + mill.counts["receive"] >= 0.9 * operations
    seldom = ("send would block", "send closed", "receive closed") if size < 100 else ()
    for what in ("cancelled", "receive would block", *seldom):
        assert mill.counts[what] > 0, what


def test_the_books_can_fail() -> None:
    mill = Mill(1, 500, seed=1)
    kernel.run(mill.main, clock=MockClock(autojump_threshold=0))
    mill.check()
    lost = mill.received[0].pop()
    with pytest.raises(AssertionError):
        mill.check()
    mill.received[0] += [lost, lost]
    with pytest.raises(AssertionError, match="twice"):
        mill.check()
