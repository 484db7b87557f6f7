"""Channels: each value has one owner at each moment, and everybody who waits learns how it ended."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from math import inf, nan
from typing import Any

import pytest

import kernel
from kernel import (
    BrokenResourceError,
    Cancelled,
    CancelScope,
    ClosedResourceError,
    EndOfChannel,
    LaggedError,
    MemoryReceiveChannel,
    MemorySendChannel,
    RunFinishedError,
    WouldBlock,
    open_broadcast_channel,
    open_latest_channel,
    open_memory_channel,
    open_priority_channel,
)
from kernel.abc import AsyncResource, ReceiveChannel, SendChannel
from kernel.channels import MemoryChannelStatistics, ThreadReceiveChannel, ThreadSendChannel
from kernel.core.loop import BUDGET
from kernel.lowlevel import consume_budget, current_task
from kernel.testing import MockClock, wait_all_tasks_blocked

Main = Callable[[], Awaitable[Any]]


def run(main: Main) -> Any:
    return kernel.run(main, clock=MockClock(autojump_threshold=0))


class Callers:
    """Tasks that each make one call. `log` says how the calls ended, in order: `name: result` or `name! error`."""

    def __init__(self, nursery: kernel.Nursery) -> None:
        self.log: list[str] = []
        self.scopes: dict[str, CancelScope] = {}
        self._nursery = nursery

    async def _call(self, name: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        with self.scopes[name]:
            try:
                result = await fn(*args)  # not inside the next line: it would be said to the log of before
                self.log.append(f"{name}: {result}")
            except Cancelled:
                self.log.append(f"{name}! Cancelled")
                raise
            except Exception as error:
                self.log.append(f"{name}! {type(error).__name__}")

    def start(self, name: str, fn: Callable[..., Any], *args: Any) -> None:
        self.scopes[name] = CancelScope()
        self._nursery.start_soon(self._call, name, fn, args, name=name)

    async def settle(self) -> list[str]:
        """Wait until nobody can go on; the log so far, and a new one."""
        await wait_all_tasks_blocked()
        log, self.log = self.log, []
        return log


def with_callers(body: Callable[[Callers], Awaitable[None]]) -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            await body(Callers(nursery))
            nursery.cancel_scope.cancel()

    run(main)


def outside(thing: Any, method: str, *args: Any) -> Any:
    """A call that needs no kernel."""
    return getattr(thing, method)(*args)


# ---- opening ------------------------------------------------------------------------------------------


def test_buffer_size_is_a_whole_number_or_infinite() -> None:
    for wrong in (1.5, "2", None, nan):
        with pytest.raises(TypeError, match="whole number"):
            open_memory_channel(wrong)  # type: ignore[arg-type]
    for wrong in (-1, -inf):
        with pytest.raises((ValueError, TypeError)):
            open_memory_channel(wrong)
    for size in (0, 3, inf):
        send_channel, receive_channel = open_memory_channel[int](size)
        assert send_channel.statistics() == receive_channel.statistics()
        assert send_channel.statistics() == MemoryChannelStatistics(0, size, 1, 1, 0, 0, 0)


def test_open_memory_channel_takes_a_type_in_brackets_and_returns_a_plain_tuple() -> None:
    pair = open_memory_channel[int](5)
    assert type(pair) is tuple
    assert [type(end) for end in pair] == [MemorySendChannel, MemoryReceiveChannel]


def test_ends_are_what_the_interfaces_describe() -> None:
    send_channel, receive_channel = open_memory_channel[int](0)
    assert isinstance(send_channel, SendChannel)
    assert isinstance(receive_channel, ReceiveChannel)
    assert weakref.ref(send_channel)() is send_channel
    assert not hasattr(send_channel, "__dict__")
    assert not hasattr(receive_channel, "__dict__")


# ---- order, and who has the value ---------------------------------------------------------------------


def test_values_come_out_in_order_through_the_buffer_and_from_waiting_senders() -> None:
    async def body(callers: Callers) -> None:
        send_channel, receive_channel = open_memory_channel[int](2)
        for number in range(5):
            callers.start(f"s{number}", send_channel.send, number)
        assert await callers.settle() == ["s0: None", "s1: None"]
        assert send_channel.statistics() == MemoryChannelStatistics(2, 2, 1, 1, 3, 0, 2)
        assert [await receive_channel.receive() for _ in range(5)] == [0, 1, 2, 3, 4]
        assert await callers.settle() == ["s2: None", "s3: None", "s4: None"]
        assert send_channel.statistics() == MemoryChannelStatistics(0, 2, 1, 1, 0, 0, 2)

    with_callers(body)


def test_waiting_receivers_are_served_first_come_first_served() -> None:
    async def body(callers: Callers) -> None:
        send_channel, receive_channel = open_memory_channel[str](0)
        twin = receive_channel.clone()
        for name, end in (("a", receive_channel), ("b", twin), ("c", receive_channel)):
            callers.start(name, end.receive)
        await callers.settle()
        assert send_channel.statistics().tasks_waiting_receive == 3
        for value in "xyz":
            send_channel.send_nowait(value)
        assert await callers.settle() == ["a: x", "b: y", "c: z"]
        assert send_channel.statistics().tasks_waiting_receive == 0

    with_callers(body)


def test_unbuffered_send_waits_until_somebody_has_received() -> None:
    async def body(callers: Callers) -> None:
        send_channel, receive_channel = open_memory_channel[str](0)
        callers.start("s", send_channel.send, "x")
        assert await callers.settle() == []
        assert await receive_channel.receive() == "x"
        assert await callers.settle() == ["s: None"]
        assert send_channel.statistics().peak_buffer_used == 0

    with_callers(body)


def test_falsy_values_are_values() -> None:
    async def body(callers: Callers) -> None:
        falsy: list[Any] = [None, 0, "", (), False]
        for size in (0, 2, inf):
            send_channel, receive_channel = open_memory_channel[Any](size)
            for number, value in enumerate(falsy):
                callers.start(f"s{number}", send_channel.send, value)
            await callers.settle()
            assert [await receive_channel.receive() for _ in falsy] == falsy
            callers.start("r", receive_channel.receive)
            await callers.settle()
            send_channel.send_nowait(None)
            assert await callers.settle() == ["r: None"]

    with_callers(body)


def test_statistics_remember_the_peak() -> None:
    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[int](inf)
        for number in range(5):
            await send_channel.send(number)
        for _ in range(5):
            await receive_channel.receive()
        await send_channel.send(1)
        assert send_channel.statistics().peak_buffer_used == 5
        assert send_channel.statistics().current_buffer_used == 1

    run(main)


def test_a_buffered_channel_is_filled_again_and_again() -> None:
    """The fast path of `send` ends where the peak is; beyond it, there may be room all the same."""

    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[int](4)
        sent = received = 0
        for up, down in [(1, 1), (2, 1), (2, 3), (4, 2), (1, 1), (2, 4), (4, 4)]:
            for _ in range(up):
                await send_channel.send(sent)
                sent += 1
            for _ in range(down):
                assert await receive_channel.receive() == received
                received += 1
        assert sent == received
        assert send_channel.statistics().peak_buffer_used == 4

    run(main)


def test_nowait_raises_would_block_and_changes_nothing() -> None:
    send_channel, receive_channel = open_memory_channel[int](1)
    with pytest.raises(WouldBlock, match="nothing to receive"):
        receive_channel.receive_nowait()
    send_channel.send_nowait(1)
    with pytest.raises(WouldBlock, match="no room"):
        send_channel.send_nowait(2)
    assert receive_channel.receive_nowait() == 1
    with pytest.raises(WouldBlock):
        receive_channel.receive_nowait()
    assert send_channel.statistics() == MemoryChannelStatistics(0, 1, 1, 1, 0, 0, 1)


def test_receive_nowait_lets_the_next_sender_go() -> None:
    async def body(callers: Callers) -> None:
        for size in (0, 1):
            send_channel, receive_channel = open_memory_channel[int](size)
            for number in range(3):
                callers.start(f"s{number}", send_channel.send, number)
            await callers.settle()
            assert [receive_channel.receive_nowait() for _ in range(3)] == [0, 1, 2]
            assert len(await callers.settle()) == 3 - size
            with pytest.raises(WouldBlock):
                receive_channel.receive_nowait()

    with_callers(body)


# ---- cancellation -------------------------------------------------------------------------------------


def test_a_put_wakes_a_getter_that_is_cancelled_before_it_runs_and_the_item_is_not_lost() -> None:
    """aio#201, aio#256, anyio#728: the getter has it, for waking commits."""

    async def body(callers: Callers) -> None:
        send_channel, receive_channel = open_memory_channel[str](0)
        callers.start("a", receive_channel.receive)
        callers.start("b", receive_channel.receive)
        await callers.settle()
        send_channel.send_nowait("x")
        callers.scopes["a"].cancel()
        assert await callers.settle() == ["a: x"]
        send_channel.send_nowait("y")
        assert await callers.settle() == ["b: y"]

    with_callers(body)


def test_a_slot_freed_for_a_cancelled_putter_goes_to_the_next() -> None:
    """aio#269."""

    async def body(callers: Callers) -> None:
        for cancel_first in (True, False):
            send_channel, receive_channel = open_memory_channel[str](1)
            send_channel.send_nowait("x")
            for name in "abc":
                callers.start(name, send_channel.send, name)
            await callers.settle()
            if cancel_first:
                callers.scopes["a"].cancel()
            assert receive_channel.receive_nowait() == "x"
            callers.scopes["a"].cancel()  # too late, if it was woken: its value is sent
            expected = ["a! Cancelled", "b: None"] if cancel_first else ["a: None"]
            assert await callers.settle() == expected
            rest = ["b", "c"] if cancel_first else ["a", "b", "c"]
            assert [await receive_channel.receive() for _ in rest] == rest
            await callers.settle()

    with_callers(body)


def test_a_cancelled_send_has_not_sent_and_a_cancelled_receive_has_not_taken() -> None:
    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[int](2)
        await send_channel.send(1)
        with CancelScope() as scope:
            scope.cancel()
            await send_channel.send(2)  # there is room, but a cancel point comes first
        assert scope.cancelled_caught
        with CancelScope() as scope:
            scope.cancel()
            await receive_channel.receive()
        assert scope.cancelled_caught
        assert send_channel.statistics() == MemoryChannelStatistics(1, 2, 1, 1, 0, 0, 1)
        assert receive_channel.receive_nowait() == 1

    run(main)


def test_a_cancelled_waiter_in_the_middle_does_not_strand_the_others() -> None:
    async def body(callers: Callers) -> None:
        for gone in ("a", "b", "c", "ab", "bc", "ac", "abc", "cba"):
            send_channel, receive_channel = open_memory_channel[str](0)
            for name in "abcd":
                callers.start(name, receive_channel.receive)
            await callers.settle()
            for name in gone:
                callers.scopes[name].cancel()
            await callers.settle()
            left = [name for name in "abcd" if name not in gone]
            assert send_channel.statistics().tasks_waiting_receive == len(left)
            for name in left:
                send_channel.send_nowait(name.upper())
            assert await callers.settle() == [f"{name}: {name.upper()}" for name in left]
            with pytest.raises(WouldBlock):
                send_channel.send_nowait("nobody")

    with_callers(body)


def test_a_cancelled_waiter_that_comes_back_goes_to_the_end_of_the_row() -> None:
    async def body(callers: Callers) -> None:
        send_channel, receive_channel = open_memory_channel[str](0)
        again = CancelScope()

        async def twice() -> str:
            with again:
                await receive_channel.receive()
            return await receive_channel.receive()

        callers.start("a", receive_channel.receive)
        callers.start("twice", twice)
        callers.start("b", receive_channel.receive)
        await callers.settle()
        again.cancel()
        await callers.settle()
        for value in "xyz":
            send_channel.send_nowait(value)
        assert await callers.settle() == ["a: x", "b: y", "twice: z"]

    with_callers(body)


@pytest.mark.parametrize("woken_first", [True, False])
def test_the_operation_completes_and_its_deadline_passes_in_the_same_pass_and_neither_is_lost(
    woken_first: bool,
) -> None:
    """py#86296, curio#52. Cancelled first: the value is refused. Woken first: it is there, and then the cancel."""
    log: list[str] = []
    clock = MockClock()

    async def nothing() -> None:
        pass

    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[str](0)

        async def receiver() -> None:
            with kernel.move_on_after(1) as scope:
                log.append(await receive_channel.receive())
                await kernel.lowlevel.checkpoint()
            assert scope.cancelled_caught
            log.append("cancelled")

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(receiver)
            await wait_all_tasks_blocked()
            clock.jump(2)
            if not woken_first:
                await kernel.sleep(0)
                while not log:
                    await kernel.lowlevel.checkpoint()
                with pytest.raises(WouldBlock):
                    send_channel.send_nowait("x")
                return
            for _ in range(200):  # they come first, so that the timers are looked at before it is the receiver's turn
                nursery.start_soon(nothing)
            send_channel.send_nowait("x")
            assert not log

    kernel.run(main, clock=clock)
    assert log == (["x", "cancelled"] if woken_first else ["cancelled"])


def test_a_cancelled_sender_lets_go_of_its_value_and_its_locals_at_once() -> None:
    class Thing:
        pass

    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[Thing](0)
        gone: list[weakref.ref[Thing]] = []

        async def send() -> None:
            thing = Thing()
            gone.append(weakref.ref(thing))
            await send_channel.send(thing)

        async with kernel.open_nursery() as others:
            for _ in range(2):
                others.start_soon(send_channel.send, Thing())
            await wait_all_tasks_blocked()
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(send)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            assert gone[0]() is None
            others.cancel_scope.cancel()
        assert receive_channel.statistics().tasks_waiting_send == 0

    gc.disable()
    try:
        run(main)
    finally:
        gc.enable()


def test_every_operation_is_a_cancel_point_and_gives_way_when_the_budget_is_used_up() -> None:
    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[int](1)
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await kernel.lowlevel.checkpoint()

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other)
            for number in range(1000):
                await send_channel.send(number)
                assert await receive_channel.receive() == number
            nursery.cancel_scope.cancel()
        assert 2000 / 128 - 1 <= turns <= 2000 / 128 + 2

    run(main)


def test_sending_alone_or_receiving_alone_gives_way_too() -> None:
    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[int](inf)
        turns: list[int] = []

        async def other() -> None:
            while True:
                turns.append(send_channel.statistics().current_buffer_used)
                await kernel.lowlevel.checkpoint()

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other)
            for number in range(1000):
                await send_channel.send(number)
            assert len(turns) in (7, 8)
            for _ in range(1000):
                await receive_channel.receive()
            assert len(turns) in (15, 16)
            nursery.cancel_scope.cancel()

    run(main)


def test_cancelled_waiters_do_not_pile_up_behind_one_who_stays() -> None:
    async def body(callers: Callers) -> None:
        send_channel, receive_channel = open_memory_channel[int](0)
        callers.start("stays", receive_channel.receive)
        for _ in range(100):
            with CancelScope() as scope:
                callers.start("goes", receive_channel.receive)
                await wait_all_tasks_blocked()
                callers.scopes["goes"].cancel()
                await wait_all_tasks_blocked()
            assert not scope.cancelled_caught
        assert len(send_channel._state.receivers) <= 2
        assert send_channel.statistics().tasks_waiting_receive == 1

    with_callers(body)


# ---- closing ------------------------------------------------------------------------------------------


def test_closing_the_sending_side_lets_receivers_drain_and_then_end() -> None:
    async def body(callers: Callers) -> None:
        send_channel, receive_channel = open_memory_channel[int](5)
        for number in range(3):
            await send_channel.send(number)
        send_channel.close()
        assert [await receive_channel.receive() for _ in range(3)] == [0, 1, 2]
        for call in (receive_channel.receive_nowait, receive_channel.receive):
            with pytest.raises(EndOfChannel):
                await call()  # type: ignore[misc]
        send_channel, receive_channel = open_memory_channel[int](5)
        callers.start("a", receive_channel.receive)
        callers.start("b", receive_channel.clone().receive)
        await callers.settle()
        send_channel.close()
        assert await callers.settle() == ["a! EndOfChannel", "b! EndOfChannel"]

    with_callers(body)


def test_closing_the_receiving_side_breaks_the_channel_for_senders() -> None:
    async def body(callers: Callers) -> None:
        send_channel, receive_channel = open_memory_channel[int](1)
        await send_channel.send(0)
        callers.start("a", send_channel.send, 1)
        callers.start("b", send_channel.clone().send, 2)
        await callers.settle()
        receive_channel.close()
        assert await callers.settle() == ["a! BrokenResourceError", "b! BrokenResourceError"]
        for call in (send_channel.send_nowait, send_channel.send):
            with pytest.raises(BrokenResourceError):
                await call(3)  # type: ignore[func-returns-value]
        assert send_channel.statistics() == MemoryChannelStatistics(0, 1, 2, 0, 0, 0, 1)

    with_callers(body)


def test_the_last_receiver_closes_while_a_falsy_item_is_being_sent_and_the_sender_is_told() -> None:
    """anyio#731."""

    async def body(callers: Callers) -> None:
        for value in (None, 0, ""):
            send_channel, receive_channel = open_memory_channel[Any](0)
            callers.start("s", send_channel.send, value)
            await callers.settle()
            receive_channel.close()
            assert await callers.settle() == ["s! BrokenResourceError"]

    with_callers(body)


def test_an_end_closed_by_another_task_wakes_those_who_wait_at_it_and_no_others() -> None:
    async def body(callers: Callers) -> None:
        send_channel, receive_channel = open_memory_channel[str](0)
        twin = receive_channel.clone()
        for name, end in (("a", receive_channel), ("b", twin), ("c", receive_channel), ("d", twin)):
            callers.start(name, end.receive)
        await callers.settle()
        receive_channel.close()
        assert await callers.settle() == ["a! ClosedResourceError", "c! ClosedResourceError"]
        send_channel.send_nowait("x")
        assert await callers.settle() == ["b: x"]
        twin.close()
        assert await callers.settle() == ["d! ClosedResourceError"]

        send_channel, receive_channel = open_memory_channel[str](0)
        other = send_channel.clone()
        for name, sender in (("a", send_channel), ("b", other), ("c", send_channel)):
            callers.start(name, sender.send, name)
        await callers.settle()
        send_channel.close()
        assert await callers.settle() == ["a! ClosedResourceError", "c! ClosedResourceError"]
        assert await receive_channel.receive() == "b"  # the values of the other two were not sent
        other.close()
        with pytest.raises(EndOfChannel):
            await receive_channel.receive()

    with_callers(body)


def test_a_closed_end_refuses_everything_but_closing_and_statistics() -> None:
    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[int](3)
        await send_channel.send(1)
        others = send_channel.clone(), receive_channel.clone()
        send_channel.close()
        receive_channel.close()
        send_channel.close()
        receive_channel.close()
        await send_channel.aclose()
        calls: list[Callable[[], Any]] = [
            lambda: send_channel.send(1), receive_channel.receive,
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(ClosedResourceError, match="was closed before"):
                await call()
        plain: list[Callable[[], Any]] = [
            lambda: send_channel.send_nowait(1), receive_channel.receive_nowait, send_channel.clone,
            receive_channel.clone, send_channel.for_thread, receive_channel.for_thread, receive_channel.__aiter__,
        ]  # fmt: skip
        for call in plain:
            with pytest.raises(ClosedResourceError, match="was closed before"):
                call()
        assert send_channel.statistics() == MemoryChannelStatistics(1, 3, 1, 1, 0, 0, 1)
        assert others[1].receive_nowait() == 1

    run(main)


def test_closed_comes_before_broken_and_before_the_end() -> None:
    send_channel, receive_channel = open_memory_channel[int](1)
    send_channel.close()
    receive_channel.close()
    with pytest.raises(ClosedResourceError):
        send_channel.send_nowait(1)
    with pytest.raises(ClosedResourceError):
        receive_channel.receive_nowait()


def test_a_side_is_closed_when_all_its_clones_are() -> None:
    send_channel, receive_channel = open_memory_channel[int](1)
    clones = [send_channel.clone() for _ in range(3)]
    assert send_channel.statistics().open_send_channels == 4
    send_channel.close()
    for clone in clones[:-1]:
        clone.close()
    with pytest.raises(WouldBlock):
        receive_channel.receive_nowait()
    clones[-1].close()
    with pytest.raises(EndOfChannel):
        receive_channel.receive_nowait()


def test_blocks_close_ends_whichever_way_they_are_left() -> None:
    async def main() -> None:
        for leave in (None, ValueError("oops")):
            send_channel, receive_channel = open_memory_channel[int](0)
            with suppress(ValueError):
                async with send_channel as first:
                    with receive_channel as second:
                        assert (first, second) == (send_channel, receive_channel)
                        if leave is not None:
                            raise leave
            statistics = send_channel.statistics()
            assert (statistics.open_send_channels, statistics.open_receive_channels) == (0, 0)

    run(main)


def test_aclose_closes_and_is_a_cancel_point_after_that() -> None:
    async def main() -> None:
        send_channel, _ = open_memory_channel[int](0)
        with CancelScope() as scope:
            scope.cancel()
            await send_channel.aclose()
        assert scope.cancelled_caught
        assert send_channel.statistics().open_send_channels == 0

    run(main)


def test_leaving_async_with_in_a_cancelled_scope_does_not_replace_the_error() -> None:
    """trio#1559."""

    async def main() -> None:
        send_channel, _ = open_memory_channel[int](0)
        with pytest.raises(ValueError, match="real"), CancelScope() as scope:
            async with send_channel:
                scope.cancel()
                raise ValueError("the real one")
        assert not scope.cancelled_caught
        with CancelScope() as scope:
            async with open_memory_channel[int](0)[0]:
                scope.cancel()
        assert scope.cancelled_caught

    run(main)


def test_an_interface_of_your_own_needs_only_send_or_receive_and_aclose() -> None:
    class Countdown(ReceiveChannel[int]):
        def __init__(self) -> None:
            self.left = 3

        async def receive(self) -> int:
            if not self.left:
                raise EndOfChannel
            self.left -= 1
            return self.left

        async def aclose(self) -> None:
            self.left = 0
            await kernel.lowlevel.checkpoint()

    async def main() -> None:
        async with Countdown() as countdown:
            assert [number async for number in countdown] == [2, 1, 0]
        with pytest.raises(KeyError), CancelScope() as scope:
            async with Countdown():
                scope.cancel()
                raise KeyError
        with pytest.raises(TypeError, match="abstract"):
            AsyncResource()  # type: ignore[abstract]

    run(main)


# ---- iterating ----------------------------------------------------------------------------------------


def test_async_for_ends_when_the_other_side_closes() -> None:
    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[int](1)
        got = []

        async def produce() -> None:
            with send_channel:
                for number in range(5):
                    await send_channel.send(number)

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(produce)
            async for number in receive_channel:
                got.append(number)
        assert got == [0, 1, 2, 3, 4]

    run(main)


def test_a_channel_closed_while_another_task_iterates_it_ends_the_iteration_cleanly() -> None:
    """trio#3331. While it waits, and while it is busy with a value."""

    async def body(callers: Callers) -> None:
        for busy in (False, True):
            send_channel, receive_channel = open_memory_channel[int](5)
            send_channel.send_nowait(1)

            async def consume(receive_channel: MemoryReceiveChannel[int], busy: bool) -> list[int]:
                got = []
                async for number in receive_channel:
                    got.append(number)
                    if busy:
                        await kernel.sleep(1)
                return got

            callers.start("c", consume, receive_channel, busy)
            if busy:
                await kernel.sleep(0.5)
            else:
                await wait_all_tasks_blocked()
            receive_channel.close()
            await kernel.sleep(1)
            assert await callers.settle() == ["c: [1]"]

    with_callers(body)


def test_iterating_over_an_end_that_is_closed_already_is_an_error() -> None:
    async def main() -> None:
        _, receive_channel = open_memory_channel[int](5)
        receive_channel.close()
        with pytest.raises(ClosedResourceError):
            async for _ in receive_channel:
                pass

    run(main)


def test_plain_generators_use_channels_with_yield_from() -> None:
    send_channel, receive_channel = open_memory_channel[int](0)
    got: list[int] = []

    def produce() -> Generator[Any, Any, None]:
        with send_channel:
            for number in range(3):
                yield from send_channel.send(number)
        yield from send_channel.aclose()

    def consume() -> Generator[Any, Any, None]:
        end = object()
        while (number := (yield from anext(receive_channel, end))) is not end:  # type: ignore[misc]
            got.append(number)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(produce)
            nursery.start_soon(consume)

    run(main)
    assert got == [0, 1, 2]


# ---- misuse, and what one sees ------------------------------------------------------------------------


def test_outside_the_kernel_what_needs_no_kernel_works_and_the_rest_says_so() -> None:
    send_channel, receive_channel = open_memory_channel[int](1)
    send_channel.send_nowait(1)
    assert receive_channel.receive_nowait() == 1
    for call in (send_channel.send(2), receive_channel.receive()):
        with pytest.raises(RuntimeError, match="outside the kernel"):
            next(iter(call))
    for plain in (send_channel.for_thread, receive_channel.for_thread):
        with pytest.raises(RuntimeError, match="outside the kernel"):
            plain()
    assert send_channel.statistics() == MemoryChannelStatistics(0, 1, 1, 1, 0, 0, 1)


def in_a_thread(call: Callable[[], Any]) -> BaseException | None:
    """Call it in another thread; the error, if any."""
    caught: list[BaseException | None] = []

    def target() -> None:
        try:
            call()
        except BaseException as error:
            caught.append(error)
        else:
            caught.append(None)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return caught[0]


def test_from_another_thread_a_call_that_must_wake_a_task_is_refused_and_changes_nothing() -> None:
    async def body(callers: Callers) -> None:
        send_channel, receive_channel = open_memory_channel[int](0)
        callers.start("r", receive_channel.receive)
        await callers.settle()
        before = send_channel.statistics()
        for call in (lambda: send_channel.send_nowait(1), send_channel.close, receive_channel.close):
            error = in_a_thread(call)
            assert isinstance(error, RuntimeError)
            assert "outside the kernel" in str(error)
        assert send_channel.statistics() == before
        send_channel.send_nowait(2)
        assert await callers.settle() == ["r: 2"]
        callers.start("s", send_channel.send, 3)
        await callers.settle()
        before = send_channel.statistics()
        for call in (receive_channel.receive_nowait, send_channel.close, receive_channel.close):
            assert isinstance(in_a_thread(call), RuntimeError)
        assert send_channel.statistics() == before
        assert receive_channel.receive_nowait() == 3

    with_callers(body)


def test_a_sleeping_task_shows_the_channel_it_waits_for() -> None:
    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[int](0)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(receive_channel.receive, name="hungry")
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            assert task.trap is receive_channel
            assert f"sleeping on <MemoryReceiveChannel at {id(receive_channel):#x}, 0 of 0 buffered>" in repr(task)
            nursery.cancel_scope.cancel()
        send_channel.close()
        assert repr(send_channel) == f"<MemorySendChannel at {id(send_channel):#x}, closed, 0 of 0 buffered>"
        assert current_task().trap is None

    run(main)


def test_a_run_that_crashes_leaves_channels_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    """Its tasks are thrown away in the middle of their blocks, when there is no kernel any more."""

    async def main() -> None:
        _send_channel, receive_channel = open_memory_channel[int](0)
        news, price = open_broadcast_channel(1), open_latest_channel(0)

        async def receive() -> None:
            with receive_channel:
                await receive_channel.receive()

        async def iterate(channel: Any) -> None:
            async with channel as ends:
                async for _ in ends:
                    pass

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(receive)
            for channel in (news.subscribe(), price.subscribe()):
                nursery.start_soon(iterate, channel)
            await wait_all_tasks_blocked()
            kernel.lowlevel.current_kernel().call_soon(fail)
            await kernel.sleep_forever()

    def fail() -> None:
        raise ValueError("the kernel's own")

    with pytest.raises(kernel.KernelInternalError):
        kernel.run(main)
    gc.collect()
    assert capsys.readouterr().err == ""


def steps_to(population: int, act: Callable[[kernel.Nursery, list[CancelScope]], object]) -> int:
    """How many lines of the channels' code `act` runs, with so many tasks waiting to receive."""
    import sys

    lines = 0

    def trace(frame: Any, event: str, arg: object) -> Any:
        nonlocal lines
        if "kernel/channels" not in frame.f_code.co_filename:
            return None
        lines += event == "line"
        return trace

    async def main() -> None:
        _, receive_channel = open_memory_channel[int](0)
        scopes = [CancelScope() for _ in range(population)]

        async def wait(scope: CancelScope) -> None:
            with scope:
                await receive_channel.receive()

        async with kernel.open_nursery() as nursery:
            for scope in scopes:
                nursery.start_soon(wait, scope)
            await wait_all_tasks_blocked()
            previous = sys.gettrace()
            sys.settrace(trace)
            try:
                act(nursery, scopes)
            finally:
                sys.settrace(previous)
            nursery.cancel_scope.cancel()

    run(main)
    return lines


def test_cancelling_one_waiter_costs_the_same_among_ten_and_among_thousands() -> None:
    for victim in (0, 5, -1):
        few, many = (steps_to(size, lambda _, scopes: scopes[victim].cancel()) for size in (10, 3000))  # noqa: B023
        assert few == many < 20


def test_cancelling_all_waiters_costs_the_same_for_each() -> None:
    """Also in the unlucky order, last first, in which the empty cells stay as long as they may."""
    few, many = (
        steps_to(size, lambda _, scopes: [scope.cancel() for scope in reversed(scopes)]) / size for size in (100, 3000)
    )
    assert many < few * 1.5


# ---- priority -----------------------------------------------------------------------------------------


def test_priority_channel_hands_out_the_smallest_key_first_and_equal_ones_in_order() -> None:
    async def main() -> None:
        key: Callable[[tuple[int, Any]], float] = lambda pair: pair[0]  # noqa: E731
        send_channel, receive_channel = open_priority_channel(inf, key=key)
        for pair in ((3, "a"), (1, "z"), (2, "c"), (1, {}), (1, "b"), (3, "e")):
            await send_channel.send(pair)
        send_channel.clone().send_nowait((0, "f"))
        assert [receive_channel.receive_nowait() for _ in range(4)] == [(0, "f"), (1, "z"), (1, {}), (1, "b")]
        assert send_channel.statistics().current_buffer_used == 3
        send_channel.close()
        assert send_channel.statistics() == receive_channel.statistics()

    run(main)


def test_priority_channel_drains_in_order_and_ends() -> None:
    async def main() -> None:
        send_channel, receive_channel = open_priority_channel(inf, key=lambda number: -number)
        for number in (2, 5, 1):
            await send_channel.send(number)
        send_channel.close()
        assert [number async for number in receive_channel.clone()] == [5, 2, 1]

    run(main)


def test_priority_channel_counts_the_value_of_the_first_sender_that_waits() -> None:
    async def body(callers: Callers) -> None:
        send_channel, receive_channel = open_priority_channel(2, key=float)
        for number in (5, 4, 1, 0):
            callers.start(f"s{number}", send_channel.send, number)
        assert await callers.settle() == ["s5: None", "s4: None"]
        assert [await receive_channel.receive() for _ in range(4)] == [1, 0, 4, 5]
        callers.start("r", receive_channel.receive)
        await callers.settle()
        send_channel.send_nowait(9)
        assert "r: 9" in await callers.settle()

    with_callers(body)


def test_priority_channel_refuses_a_bad_key_at_the_sender_and_nothing_is_sent() -> None:
    async def main() -> None:
        send_channel, receive_channel = open_priority_channel(inf, key=lambda value: value)
        await send_channel.send(1)
        for wrong, error in (("x", ValueError), (None, TypeError), (nan, ValueError)):
            with pytest.raises(error):
                await send_channel.send(wrong)  # type: ignore[arg-type]
        assert send_channel.statistics().current_buffer_used == 1
        assert receive_channel.receive_nowait() == 1
        receive_channel.close()
        with pytest.raises(ClosedResourceError):
            receive_channel.__aiter__()
        with pytest.raises(BrokenResourceError):
            await send_channel.send(1)
        with pytest.raises(TypeError, match="key must be a function"):
            open_priority_channel(1, key=3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="at least 0"):
            open_priority_channel(-1, key=float)

    run(main)


# ---- broadcast ----------------------------------------------------------------------------------------


def test_broadcast_gives_every_receiver_every_value_sent_after_it_subscribed() -> None:
    async def main() -> None:
        send_channel = open_broadcast_channel(10)
        await send_channel.send("nobody hears this")
        first = send_channel.subscribe()
        await send_channel.send(1)
        second = send_channel.subscribe()
        await send_channel.send(2)
        third = first.clone()
        send_channel.close()
        assert [value async for value in first] == [1, 2]
        assert [value async for value in second] == [2]
        assert [value async for value in third] == [1, 2]

    run(main)


def test_broadcast_wakes_all_who_wait() -> None:
    async def body(callers: Callers) -> None:
        send_channel = open_broadcast_channel(1)
        for name in "abc":
            callers.start(name, send_channel.subscribe().receive)
        await callers.settle()
        assert send_channel.statistics().tasks_waiting_receive == 3
        assert send_channel.subscribe().statistics() == send_channel.statistics()
        await send_channel.send(None)
        assert await callers.settle() == ["a: None", "b: None", "c: None"]

    with_callers(body)


def test_broadcast_wait_holds_senders_up_until_the_slowest_has_room() -> None:
    async def body(callers: Callers) -> None:
        send_channel = open_broadcast_channel(2)
        fast, slow = send_channel.subscribe(), send_channel.subscribe()
        for number in range(4):
            callers.start(f"s{number}", send_channel.send, number)
        assert await callers.settle() == ["s0: None", "s1: None"]
        with pytest.raises(WouldBlock):
            send_channel.send_nowait(9)
        assert [await fast.receive(), await fast.receive()] == [0, 1]
        assert await callers.settle() == []
        assert send_channel.statistics().tasks_waiting_send == 2
        assert await slow.receive() == 0
        assert await callers.settle() == ["s2: None"]
        assert await slow.receive() == 1
        assert await callers.settle() == ["s3: None"]
        assert [slow.receive_nowait(), slow.receive_nowait()] == [2, 3]
        assert [fast.receive_nowait(), fast.receive_nowait()] == [2, 3]

    with_callers(body)


def test_broadcast_send_that_is_cancelled_while_it_waits_has_reached_nobody() -> None:
    async def body(callers: Callers) -> None:
        send_channel = open_broadcast_channel(1)
        fast, slow = send_channel.subscribe(), send_channel.subscribe()
        await send_channel.send(0)
        assert await fast.receive() == 0
        for name in "ab":
            callers.start(name, send_channel.send, name)
        await callers.settle()
        callers.scopes["a"].cancel()
        assert await callers.settle() == ["a! Cancelled"]
        with pytest.raises(WouldBlock):
            fast.receive_nowait()
        assert [await slow.receive(), await slow.receive()] == [0, "b"]
        assert await fast.receive() == "b"
        assert send_channel.statistics().longest_buffer == 0

    with_callers(body)


def test_broadcast_slow_receiver_that_leaves_lets_the_senders_go() -> None:
    async def body(callers: Callers) -> None:
        send_channel = open_broadcast_channel(1)
        fast, slow = send_channel.subscribe(), send_channel.subscribe()
        twin = slow.clone()
        await send_channel.send(0)
        await fast.receive()
        callers.start("s", send_channel.send, 1)
        await callers.settle()
        slow.close()
        slow.close()
        assert await callers.settle() == []
        full = twin.clone()
        twin.close()
        assert await callers.settle() == []
        full.close()
        assert await callers.settle() == ["s: None"]
        assert fast.receive_nowait() == 1
        assert send_channel.statistics().open_receive_channels == 1

    with_callers(body)


def test_broadcast_room_for_several_lets_several_senders_go() -> None:
    async def body(callers: Callers) -> None:
        send_channel = open_broadcast_channel(2)
        fast, slow = send_channel.subscribe(), send_channel.subscribe()
        for number in range(5):
            callers.start(f"s{number}", send_channel.send, number)
        assert await callers.settle() == ["s0: None", "s1: None"]
        assert [await fast.receive(), await fast.receive()] == [0, 1]
        slow.close()
        assert await callers.settle() == ["s2: None", "s3: None"]
        assert [await fast.receive() for _ in range(3)] == [2, 3, 4]

    with_callers(body)


def test_broadcast_drop_oldest_keeps_the_newest_and_counts() -> None:
    async def main() -> None:
        send_channel = open_broadcast_channel(2, slow="drop_oldest")
        fast, slow = send_channel.subscribe(), send_channel.subscribe()
        for number in range(5):
            await send_channel.send(number)
            assert await fast.receive() == number
        assert (fast.dropped, slow.dropped) == (0, 3)
        assert [await slow.receive(), await slow.receive()] == [3, 4]

    run(main)


def test_broadcast_error_tells_the_slow_receiver_once_how_many_it_lost() -> None:
    async def main() -> None:
        send_channel = open_broadcast_channel(2, slow="error")
        slow = send_channel.subscribe()
        for number in range(5):
            await send_channel.send(number)
        twin = slow.clone()
        with pytest.raises(LaggedError, match="lost 3 values") as caught:
            await slow.receive()
        assert caught.value.dropped == 3
        assert await slow.receive() == 3
        await send_channel.send(5)
        await send_channel.send(6)
        with pytest.raises(LaggedError, match="lost 1 values"):
            slow.receive_nowait()
        assert slow.dropped == 4
        send_channel.close()
        assert [value async for value in slow] == [5, 6]
        with pytest.raises(LaggedError, match="lost 5 values"):
            await twin.receive()

    run(main)


def test_broadcast_closing_ends_receivers_and_clones_count() -> None:
    async def body(callers: Callers) -> None:
        send_channel = open_broadcast_channel(1)
        clone = send_channel.clone()
        receive_channel = send_channel.subscribe()
        callers.start("r", receive_channel.receive)
        await callers.settle()
        send_channel.close()
        send_channel.close()
        assert await callers.settle() == []
        clone.close()
        assert await callers.settle() == ["r! EndOfChannel"]
        with pytest.raises(EndOfChannel):
            receive_channel.receive_nowait()
        for call in (clone.clone, clone.subscribe, lambda: clone.send_nowait(1)):
            with pytest.raises(ClosedResourceError):
                call()
        with pytest.raises(ClosedResourceError):
            await clone.send(1)

    with_callers(body)


def test_broadcast_end_closed_by_another_task_wakes_those_who_wait_at_it() -> None:
    async def body(callers: Callers) -> None:
        send_channel = open_broadcast_channel(1)
        keep = send_channel.clone()
        receive_channel = send_channel.subscribe()
        callers.start("r", receive_channel.receive)
        await callers.settle()
        receive_channel.close()
        assert await callers.settle() == ["r! ClosedResourceError"]
        with pytest.raises(ClosedResourceError):
            await receive_channel.receive()
        with pytest.raises(ClosedResourceError):
            receive_channel.clone()
        slow = keep.subscribe()
        await keep.send(0)
        callers.start("s", send_channel.send, 1)
        callers.start("k", keep.send, 2)
        await callers.settle()
        send_channel.close()
        assert await callers.settle() == ["s! ClosedResourceError"]
        assert [await slow.receive(), await slow.receive()] == [0, 2]

    with_callers(body)


def test_broadcast_receive_that_is_cancelled_has_taken_nothing() -> None:
    async def body(callers: Callers) -> None:
        send_channel = open_broadcast_channel(1)
        receive_channel = send_channel.subscribe()
        for name in "abc":
            callers.start(name, receive_channel.receive)
        await callers.settle()
        callers.scopes["b"].cancel()
        await send_channel.send(1)
        callers.scopes["a"].cancel()  # too late
        await send_channel.send(2)
        assert await callers.settle() == ["b! Cancelled", "a: 1", "c: 2"]

    with_callers(body)


def test_broadcast_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        open_broadcast_channel(0)
    with pytest.raises(TypeError):
        open_broadcast_channel(1.5)
    with pytest.raises(ValueError, match="drop_oldest"):
        open_broadcast_channel(1, slow="drop")  # type: ignore[arg-type]
    assert "0 receivers" in repr(open_broadcast_channel(inf))
    assert "0 to receive" in repr(open_broadcast_channel(inf).subscribe())


def test_broadcast_from_another_thread_is_refused_and_changes_nothing() -> None:
    async def body(callers: Callers) -> None:
        send_channel = open_broadcast_channel(1)
        receive_channel = send_channel.subscribe()
        callers.start("r", receive_channel.receive)
        await callers.settle()
        before = send_channel.statistics()
        for call in (lambda: send_channel.send_nowait(1), send_channel.close, receive_channel.close):
            assert isinstance(in_a_thread(call), RuntimeError)
        assert send_channel.statistics() == before
        await send_channel.send(1)
        await send_channel.send(2)
        callers.start("s", send_channel.send, 3)
        assert await callers.settle() == ["r: 1"]
        before = send_channel.statistics()
        for call in (receive_channel.receive_nowait, send_channel.close, receive_channel.close):
            assert isinstance(in_a_thread(call), RuntimeError)
        assert send_channel.statistics() == before

    with_callers(body)


# ---- latest -------------------------------------------------------------------------------------------


def test_latest_receivers_get_the_present_value_and_then_the_newest_after_each_change() -> None:
    async def body(callers: Callers) -> None:
        price = open_latest_channel(100)
        receive_channel = price.subscribe()
        assert await receive_channel.receive() == 100
        callers.start("r", receive_channel.receive)
        assert await callers.settle() == []
        price.set(101)
        price.set(102)
        assert await callers.settle() == ["r: 102"]
        assert (price.value, receive_channel.value) == (102, 102)
        callers.start("r", receive_channel.receive)
        assert await callers.settle() == []
        price.set(102)
        assert await callers.settle() == ["r: 102"]

    with_callers(body)


def test_latest_change_is_still_to_be_received_after_a_cancelled_receive() -> None:
    async def body(callers: Callers) -> None:
        price = open_latest_channel(0)
        receive_channel = price.subscribe()
        await receive_channel.receive()
        callers.start("r", receive_channel.receive)
        await callers.settle()
        callers.scopes["r"].cancel()
        price.set(None)
        assert await callers.settle() == ["r! Cancelled"]
        with CancelScope() as scope:
            scope.cancel()
            await receive_channel.receive()
        assert await receive_channel.receive() is None

    with_callers(body)


def test_latest_channel_that_is_closed_shows_its_last_value_once_and_ends() -> None:
    async def body(callers: Callers) -> None:
        price = open_latest_channel(0)
        first, second = price.subscribe(), price.subscribe()
        await first.receive()
        twin = first.clone()
        callers.start("r", first.receive)
        await callers.settle()
        price.set(1)
        price.close()
        price.close()
        assert await callers.settle() == ["r: 1"]
        assert [value async for value in second] == [1]
        assert [value async for value in twin] == [1]
        assert [value async for value in price.subscribe()] == [1]
        with pytest.raises(ClosedResourceError):
            price.set(2)

    with_callers(body)


def test_latest_channel_closing_wakes_those_who_wait() -> None:
    async def body(callers: Callers) -> None:
        price = open_latest_channel(0)
        first, second = price.subscribe(), price.subscribe()
        for name, end in (("a", first), ("b", second)):
            await end.receive()
            callers.start(name, end.receive)
        await callers.settle()
        for call in (first.close, price.close, lambda: price.set(5)):
            assert isinstance(in_a_thread(call), RuntimeError)
        first.close()
        first.close()
        assert await callers.settle() == ["a! ClosedResourceError"]
        price.close()
        assert await callers.settle() == ["b! EndOfChannel"]
        with pytest.raises(ClosedResourceError):
            await first.receive()
        with pytest.raises(ClosedResourceError):
            first.clone()
        assert "closed, 0" in repr(first)
        assert "closed, 0" in repr(price)

    with_callers(body)


# ---- as_safe_channel ----------------------------------------------------------------------------------


def test_safe_channel_runs_the_generator_only_while_somebody_waits() -> None:
    log: list[str] = []

    @kernel.as_safe_channel
    async def numbers(limit: int, *, step: int) -> AsyncGenerator[int, None]:
        try:
            for number in range(0, limit, step):
                log.append(f"make {number}")
                yield number
            log.append("end")
        finally:
            log.append("close")

    async def main() -> None:
        async with numbers(4, step=2) as receive_channel:
            await wait_all_tasks_blocked()
            log.append("begin")
            assert await receive_channel.receive() == 0
            await wait_all_tasks_blocked()
            log.append("one")
            assert [number async for number in receive_channel] == [2]
            with pytest.raises(EndOfChannel):
                await receive_channel.receive()

    run(main)
    assert numbers.__name__ == "numbers"
    assert log == ["begin", "make 0", "one", "make 2", "end", "close"]


def test_safe_channel_makes_a_value_for_a_receiver_whose_budget_was_used_up() -> None:
    """It asks, and lets the others run before it waits: the generator must not look in between and find nobody."""

    @kernel.as_safe_channel
    async def numbers() -> AsyncGenerator[int, None]:
        yield 1
        yield 2

    async def main() -> None:
        async with numbers() as receive_channel:
            assert await receive_channel.receive() == 1
            for _ in range(BUDGET):
                await consume_budget()
            assert await receive_channel.receive() == 2

    run(main)


def test_safe_channel_left_early_closes_the_generator_before_the_block_ends() -> None:
    log: list[str] = []

    @kernel.as_safe_channel
    async def endless() -> AsyncGenerator[int, None]:
        try:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(kernel.sleep_forever)
                while True:
                    yield 1
        finally:
            log.append("closed")

    async def main() -> None:
        async with endless() as receive_channel:
            async for _ in receive_channel:
                break
        log.append("left")
        with pytest.raises(KeyError):
            async with endless() as receive_channel:
                await receive_channel.receive()
                raise KeyError

    run(main)
    assert log == ["closed", "left", "closed"]


def test_safe_channel_tells_a_generator_at_its_yield_to_end_and_cancels_one_that_waits() -> None:
    log: list[str] = []

    @kernel.as_safe_channel
    async def watched() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await kernel.sleep_forever()
        except BaseException as error:
            log.append(type(error).__name__)
            raise

    async def main() -> None:
        async with watched() as receive_channel:
            await receive_channel.receive()
            await wait_all_tasks_blocked()
        with kernel.move_on_after(1):
            async with watched() as receive_channel:
                await receive_channel.receive()
                await kernel.sleep(2)
        async with watched() as receive_channel:
            await receive_channel.receive()
            with kernel.move_on_after(1):
                await receive_channel.receive()

        with kernel.move_on_after(1):
            async with watched() as receive_channel:
                await receive_channel.receive()
                with CancelScope(shield=True):
                    await kernel.sleep(2)  # the generator's task is cancelled before this one

    run(main)
    assert log == ["GeneratorExit", "GeneratorExit", "Cancelled", "GeneratorExit"]


def test_safe_channel_lets_a_lone_error_out_as_it_is_and_two_in_a_group() -> None:
    @kernel.as_safe_channel
    async def failing() -> AsyncGenerator[int, None]:
        try:
            yield 1
            raise ValueError("from the generator")
        finally:
            if log == ["twice"]:
                raise IndexError("while closing")

    log: list[str] = []

    async def main() -> None:
        with pytest.raises(ValueError, match="from the generator"):
            async with failing() as receive_channel:
                async for _ in receive_channel:
                    pass
        log.append("twice")
        with pytest.raises(ExceptionGroup) as caught:
            async with failing() as receive_channel:
                await receive_channel.receive()
                raise KeyError("from the block")
        assert {type(error) for error in caught.value.exceptions} == {KeyError, IndexError}

    run(main)


def test_safe_channel_scope_around_a_yield_is_the_generators_and_nobody_elses() -> None:
    """PEP 789: a timeout in the generator, over a `yield`, cuts the generator short and not its consumer."""

    @kernel.as_safe_channel
    async def ticks() -> AsyncGenerator[str, None]:
        with kernel.move_on_after(2.5):
            while True:
                yield "tick"
                await kernel.sleep(1)
        yield "over"

    async def main() -> list[str]:
        got = []
        async with ticks() as receive_channel:
            async for tick in receive_channel:
                got.append(tick)
                if len(got) == 2:
                    await kernel.sleep(10)  # the deadline passes while the generator stands at its `yield`
        return got

    assert run(main) == ["tick", "tick", "over"]


def test_safe_channel_child_that_fails_behind_a_yield_ends_the_block() -> None:
    @kernel.as_safe_channel
    async def broken() -> AsyncGenerator[int, None]:
        async def child() -> None:
            await kernel.sleep(1)
            raise ValueError("child")

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            yield 1
            yield 2

    async def main() -> None:
        async with broken() as receive_channel:
            await receive_channel.receive()
            await kernel.sleep(5)

    with pytest.raises(ExceptionGroup) as caught:
        run(main)
    assert [repr(error) for error in caught.value.exceptions] == ["ValueError('child')"]


def test_safe_channel_cleanup_error_comes_out_without_the_generator_exit() -> None:
    @kernel.as_safe_channel
    async def broken() -> AsyncGenerator[int, None]:
        async def child() -> None:
            try:
                await kernel.sleep_forever()
            finally:
                raise ValueError("child")

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            yield 1

    async def main() -> None:
        async with broken() as receive_channel:
            await receive_channel.receive()
            await wait_all_tasks_blocked()

    with pytest.raises(ExceptionGroup) as caught:
        run(main)
    assert [repr(error) for error in caught.value.exceptions] == ["ValueError('child')"]


def test_safe_channel_closed_while_another_task_iterates_it_ends_cleanly() -> None:
    """trio#3331."""

    @kernel.as_safe_channel
    async def slow() -> AsyncGenerator[int, None]:
        yield 1
        await kernel.sleep(1)
        yield 2

    async def main() -> None:
        async def consume(receive_channel: ReceiveChannel[int]) -> None:
            async for number in receive_channel:
                got.append(number)
            got.append("end")

        got: list[Any] = []
        async with slow() as receive_channel, kernel.open_nursery() as nursery:
            nursery.start_soon(consume, receive_channel)
            await kernel.sleep(0.5)
            await receive_channel.aclose()
            await kernel.sleep(5)
            with pytest.raises(ClosedResourceError):
                await receive_channel.receive()
        assert got == [1, "end"]

    run(main)


def test_safe_channel_that_is_closed_closes_the_generator_at_its_yield() -> None:
    log: list[str] = []

    @kernel.as_safe_channel
    async def numbers() -> AsyncGenerator[int, None]:
        try:
            yield 1
        finally:
            log.append("closed")

    async def main() -> None:
        async with numbers() as receive_channel:
            assert await receive_channel.receive() == 1
            await receive_channel.aclose()
            await wait_all_tasks_blocked()
            log.append("still in the block")

    run(main)
    assert log == ["closed", "still in the block"]


def test_safe_channel_cancelled_receive_loses_no_value() -> None:
    @kernel.as_safe_channel
    async def numbers() -> AsyncGenerator[int, None]:
        for number in range(3):
            await kernel.sleep(1)
            yield number

    async def main() -> None:
        async with numbers() as receive_channel:
            with kernel.move_on_after(0.5) as scope:
                await receive_channel.receive()
            assert scope.cancelled_caught
            await kernel.sleep(5)
            with CancelScope() as scope:
                scope.cancel()
                await receive_channel.receive()
            assert [number async for number in receive_channel] == [0, 1, 2]

    run(main)


def test_safe_channel_cancelled_from_outside_leaves() -> None:
    closed: list[str] = []

    @kernel.as_safe_channel
    async def numbers() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await kernel.sleep_forever()
        finally:
            closed.append("closed")

    async def main() -> None:
        with kernel.move_on_after(1) as scope:
            async with numbers() as receive_channel:
                async for _ in receive_channel:
                    pass
        assert scope.cancelled_caught

    run(main)
    assert closed == ["closed"]


def test_safe_channel_wants_an_async_generator() -> None:
    @kernel.as_safe_channel  # type: ignore[arg-type]
    def wrong() -> Iterator[int]:
        return iter(())

    async def main() -> None:
        with pytest.raises(TypeError, match="async generator function"):
            async with wrong():
                pass

    run(main)


# ---- threads ------------------------------------------------------------------------------------------


class Crew:
    """Threads that make calls. `join` waits for them, and hands out what they returned or raised, by name."""

    def __init__(self) -> None:
        self._threads: dict[str, threading.Thread] = {}
        self.results: dict[str, Any] = {}

    def start(self, name: str, fn: Callable[..., Any], *args: Any) -> None:
        def target() -> None:
            try:
                self.results[name] = fn(*args)
            except BaseException as error:
                self.results[name] = type(error).__name__

        self._threads[name] = thread = threading.Thread(target=target, name=name)
        thread.start()

    def join(self) -> dict[str, Any]:
        for thread in self._threads.values():
            thread.join(20)
            assert not thread.is_alive(), f"{thread} is blocked for ever"
        return self.results


@contextmanager
def crew() -> Iterator[Crew]:
    it = Crew()
    try:
        yield it
    finally:
        it.join()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that a thread brings about."""
    with kernel.fail_after(20):
        while not condition():
            await kernel.sleep(0.001)


def test_thread_sends_to_tasks_and_receives_from_tasks() -> None:
    async def main() -> list[int]:
        to_thread, from_main = open_memory_channel[int](0)
        to_main, from_thread = open_memory_channel[int](2)

        def work(source: ThreadReceiveChannel[int], sink: ThreadSendChannel[int]) -> None:
            with source, sink:
                for number in source:
                    sink.send(number * number)

        async def produce() -> None:
            with to_thread:
                for number in range(10):
                    await to_thread.send(number)

        threads.start("worker", work, from_main.for_thread(), to_main.for_thread())
        from_main.close()
        to_main.close()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(produce)
            return [number async for number in from_thread]

    with crew() as threads:
        assert kernel.run(main) == [number * number for number in range(10)]


def test_thread_call_times_out_and_has_done_nothing() -> None:
    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[int](1)
        sender, receiver = send_channel.for_thread(), receive_channel.for_thread()
        for timeout in (0, 0.001):
            threads.start(f"r{timeout}", receiver.receive, timeout)
            await until(lambda: len(threads.results) in (1, 3))
            threads.start(f"full{timeout}", lambda: (sender.send(7, 20), sender.send(8, timeout)))  # noqa: B023
            await until(lambda: len(threads.results) in (2, 4))
            statistics = send_channel.statistics()
            assert (statistics.current_buffer_used, statistics.tasks_waiting_send) == (1, 0)
            assert statistics.tasks_waiting_receive == 0
            assert receive_channel.receive_nowait() == 7

    with crew() as threads:
        kernel.run(main)
        assert set(threads.join().values()) == {"TimeoutError"}


def test_thread_call_with_timeout_zero_does_what_can_be_done_at_once() -> None:
    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[int](1)
        sender, receiver = send_channel.for_thread(), receive_channel.for_thread()
        threads.start("both", lambda: (sender.send(5, 0), receiver.receive(0)))
        await until(lambda: bool(threads.results))

    with crew() as threads:
        kernel.run(main)
        assert threads.join() == {"both": (None, 5)}


def test_thread_waits_in_the_same_row_as_tasks() -> None:
    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[str](0)
        receiver = receive_channel.for_thread()
        got: list[str] = []

        async def receive() -> None:
            got.append(await receive_channel.receive())

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            threads.start("t", receiver.receive)
            await until(lambda: send_channel.statistics().tasks_waiting_receive == 2)
            nursery.start_soon(receive)
            await until(lambda: send_channel.statistics().tasks_waiting_receive == 3)
            for value in "abc":
                send_channel.send_nowait(value)
        await until(lambda: bool(threads.results))
        assert got == ["a", "c"]

    with crew() as threads:
        kernel.run(main)
        assert threads.join() == {"t": "b"}


def test_thread_is_told_when_the_channel_ends_breaks_or_is_closed() -> None:
    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[int](0)
        threads.start("end", receive_channel.for_thread().receive)
        await until(lambda: send_channel.statistics().tasks_waiting_receive == 1)
        send_channel.close()

        send_channel, receive_channel = open_memory_channel[int](0)
        threads.start("broken", send_channel.for_thread().send, 1)
        await until(lambda: send_channel.statistics().tasks_waiting_send == 1)
        receive_channel.close()

        send_channel, receive_channel = open_memory_channel[int](0)
        end = receive_channel.for_thread()
        threads.start("closed", end.receive)
        threads.start("loop", list, end)
        await until(lambda: send_channel.statistics().tasks_waiting_receive == 2)
        end.close()
        end.close()
        threads.start("refused", end.receive)
        await until(lambda: len(threads.results) == 5)
        assert send_channel.statistics().open_receive_channels == 1

    with crew() as threads:
        kernel.run(main)
        assert threads.join() == {
            "end": "EndOfChannel", "broken": "BrokenResourceError", "closed": "ClosedResourceError", "loop": [],
            "refused": "ClosedResourceError",
        }  # fmt: skip


def test_no_thread_is_left_blocked_when_the_run_ends() -> None:
    kept: list[Any] = []

    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[int](0)
        kept.extend([send_channel.for_thread(), receive_channel.for_thread()])
        other, _ = open_memory_channel[int](0)
        threads.start("r", kept[1].receive)
        threads.start("s", other.for_thread().send, 1)
        await until(lambda: send_channel.statistics().tasks_waiting_receive == 1)
        await until(lambda: other.statistics().tasks_waiting_send == 1)

    with crew() as threads:
        kernel.run(main)
        threads.start("late", kept[0].send, 1)
        threads.start("late r", kept[1].receive, 0)
        assert threads.join() == dict.fromkeys(["r", "s", "late", "late r"], "RunFinishedError")
    for end in kept:
        end.close()
        with pytest.raises(ClosedResourceError):
            end.send(1) if end is kept[0] else end.receive()


def test_no_thread_is_left_blocked_when_main_fails() -> None:
    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[int](0)
        threads.start("r", receive_channel.for_thread().receive)
        await until(lambda: send_channel.statistics().tasks_waiting_receive == 1)
        raise KeyError

    with crew() as threads:
        with pytest.raises(KeyError):
            kernel.run(main)
        assert threads.join() == {"r": "RunFinishedError"}


def test_thread_end_refuses_the_kernels_own_thread() -> None:
    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[int](1)
        with send_channel.for_thread() as sender, receive_channel.for_thread() as receiver:
            for call in (lambda: sender.send(1), receiver.receive):
                with pytest.raises(RuntimeError, match="kernel's own thread"):
                    call()
            assert send_channel.statistics().open_send_channels == 2
            assert "of <MemorySendChannel" in repr(sender)
        await until(lambda: send_channel.statistics().open_send_channels == 1)

    kernel.run(main)


class Interrupt(BaseException):
    """What Ctrl-C would be in the main thread."""


class Interrupted:
    """An event whose `wait` is cut short, after `first()`."""

    def __init__(self, event: threading.Event, first: Callable[[], object]) -> None:
        self._event = event
        self._first = first
        self.set, self.is_set = event.set, event.is_set

    def wait(self, timeout: float | None = None) -> bool:
        self._first()
        raise Interrupt


def interrupted_call(end: Any, method: str, *args: Any, first: Callable[[], object]) -> str:
    """A call of a thread that is interrupted while it waits for the kernel's answer."""
    original = end._call

    def call(request: Any, timeout: float | None) -> Any:
        request.done = Interrupted(request.done, first)
        return original(request, timeout)

    end._call = call
    try:
        getattr(end, method)(*args)
    except Interrupt:
        return "interrupted"
    finally:
        del end._call
    return "went through"


def test_thread_interrupted_while_it_waits_has_done_nothing() -> None:
    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[int](0)
        waiting = threading.Event()

        def look() -> None:
            assert waiting.wait(20)

        sender, receiver = send_channel.for_thread(), receive_channel.for_thread()
        threads.start("s", lambda: interrupted_call(sender, "send", 1, first=look))
        await until(lambda: send_channel.statistics().tasks_waiting_send == 1)
        waiting.set()
        await until(lambda: send_channel.statistics().tasks_waiting_send == 0)
        with pytest.raises(WouldBlock):
            receive_channel.receive_nowait()
        waiting.clear()
        threads.start("r", lambda: interrupted_call(receiver, "receive", first=look))
        await until(lambda: send_channel.statistics().tasks_waiting_receive == 1)
        waiting.set()
        await until(lambda: send_channel.statistics().tasks_waiting_receive == 0)
        with pytest.raises(WouldBlock):
            send_channel.send_nowait(1)

    with crew() as threads:
        kernel.run(main)
        assert set(threads.join().values()) == {"interrupted"}


@pytest.mark.parametrize("late", [False, True])
def test_thread_interrupted_as_a_value_arrives_gives_it_back_to_the_front(late: bool) -> None:
    """Either before the kernel hears of it (the value is with the call), or in between wake-up and the task's step."""

    async def main() -> None:
        send_channel, receive_channel = open_memory_channel[int](1)
        receiver = receive_channel.for_thread()
        go, arrived = threading.Event(), threading.Event()

        def first() -> None:
            go.set()
            assert arrived.wait(20)

        threads.start("r", lambda: interrupted_call(receiver, "receive", first=first))
        await until(lambda: send_channel.statistics().tasks_waiting_receive == 1 and go.is_set())
        async with kernel.open_nursery() as nursery:
            for _ in range(200 * late):  # so many steps, that the inbox is looked at before the woken task's turn comes
                nursery.start_soon(kernel.lowlevel.checkpoint)
            send_channel.send_nowait(1)
            send_channel.send_nowait(2)
            if not late:
                await kernel.lowlevel.checkpoint()
            arrived.set()
            threads._threads["r"].join(20)
        await until(lambda: send_channel.statistics().current_buffer_used == 2)
        assert [receive_channel.receive_nowait(), receive_channel.receive_nowait()] == [1, 2]

    with crew() as threads:
        kernel.run(main)
        assert threads.join() == {"r": "interrupted"}


def test_value_given_back_goes_to_whoever_waits_or_is_dropped_with_the_channel() -> None:
    async def body(callers: Callers) -> None:
        send_channel, receive_channel = open_memory_channel[int](0)
        callers.start("r", receive_channel.receive)
        await callers.settle()
        receive_channel._give_back(1)
        assert await callers.settle() == ["r: 1"]
        receive_channel._give_back(2)
        callers.start("s", send_channel.send, 3)
        assert await callers.settle() == []
        assert [await receive_channel.receive(), await receive_channel.receive()] == [2, 3]
        assert await callers.settle() == ["s: None"]
        receive_channel.close()
        receive_channel._give_back(4)
        assert send_channel.statistics().current_buffer_used == 0

    with_callers(body)


def test_threads_and_tasks_together_lose_nothing_and_double_nothing() -> None:
    """Some threads have no patience. What they could not send, they send again."""
    each = 60

    def produce(name: int, sink: ThreadSendChannel[tuple[int, int]]) -> int:
        retries = 0
        with sink:
            for number in range(each):
                while True:
                    try:
                        sink.send((name, number), 0.0002 * (number % 3))
                        break
                    except TimeoutError:
                        retries += 1
        return retries

    def consume(source: ThreadReceiveChannel[tuple[int, int]]) -> list[tuple[int, int]]:
        got = []
        with source:
            while True:
                try:
                    got.append(source.receive(0.0002))
                except TimeoutError:
                    pass
                except EndOfChannel:
                    return got

    async def main() -> list[tuple[int, int]]:
        send_channel, receive_channel = open_memory_channel[tuple[int, int]](1)
        for name in range(2):
            threads.start(f"p{name}", produce, name, send_channel.for_thread())
        threads.start("c", consume, receive_channel.for_thread())
        send_channel.close()
        got = []
        async for value in receive_channel:
            got.append(value)
            await kernel.sleep(0.0005)
        await until(lambda: len(threads.results) == 3)
        return got

    with crew() as threads:
        ours = kernel.run(main)
        theirs = threads.join()["c"]
    assert sorted(ours + theirs) == [(name, number) for name in range(2) for number in range(each)]
    for part in (ours, theirs):
        for name in range(2):
            numbers = [number for whose, number in part if whose == name]
            assert numbers == sorted(numbers)


def test_a_call_left_as_the_run_ends_is_answered() -> None:
    """The token still makes calls that it accepted, when tasks can be started no more."""

    async def main() -> ThreadReceiveChannel[int]:
        _, receive_channel = open_memory_channel[int](0)
        return receive_channel.for_thread()

    end = kernel.run(main)
    from kernel.channels.threads import _Call

    call = _Call("late", end._end.receive_nowait, end._end.receive)
    call.start()
    assert call.done.is_set()
    with pytest.raises(RunFinishedError):
        call.outcome.unwrap()
