"""Streams in memory and in lockstep: the test's side of them, hooks, closing. See also test_check_streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import kernel
from kernel import BrokenResourceError, BusyResourceError, Cancelled, ClosedResourceError, WouldBlock
from kernel.lowlevel import checkpoint
from kernel.testing import (
    MemoryReceiveStream,
    MemorySendStream,
    assert_checkpoints,
    assert_no_checkpoints,
    explore,
    lockstep_stream_one_way_pair,
    lockstep_stream_pair,
    memory_stream_one_way_pair,
    memory_stream_pair,
    memory_stream_pump,
    wait_all_tasks_blocked,
)


@pytest.fixture
def log() -> list[Any]:
    return []


async def into(log: list[Any], function: Callable[..., Any], *args: Any) -> None:
    """Note what `function(*args)` returns or raises."""
    try:
        log.append(await function(*args))
    except Exception as error:
        log.append(type(error))


# ---- the test's side --------------------------------------------------------------------------------------


def test_what_is_sent_can_be_fetched_in_pieces() -> None:
    async def main() -> None:
        stream = MemorySendStream()
        with pytest.raises(WouldBlock):
            stream.get_data_nowait()
        await stream.send_all(b"123")
        assert stream.get_data_nowait(1) == b"1"
        assert stream.get_data_nowait() == b"23"
        await stream.send_all(b"456")
        await stream.send_all(bytearray(b"789"))
        with assert_checkpoints():
            assert await stream.get_data(4) == b"4567"
        await stream.aclose()
        assert await stream.get_data() == b"89"
        for _ in range(2):
            assert stream.get_data_nowait() == b""
            assert await stream.get_data() == b""

    kernel.run(main)


def test_who_waits_to_fetch_wakes_when_something_is_sent_or_the_stream_is_closed(log: list[Any]) -> None:
    async def main() -> None:
        stream = MemorySendStream()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(into, log, stream.get_data, 2)
            await wait_all_tasks_blocked()
            with pytest.raises(BusyResourceError):
                await stream.get_data()
            with pytest.raises(BusyResourceError):
                stream.get_data_nowait()
            await stream.send_all(b"")  # nothing to wake up for
            await wait_all_tasks_blocked()
            assert log == []
            await stream.send_all(b"abc")
        assert stream.get_data_nowait() == b"c"
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(into, log, stream.get_data)
            await wait_all_tasks_blocked()
            stream.close()

    kernel.run(main)
    assert log == [b"ab", b""]


def test_data_may_be_put_before_there_is_a_kernel() -> None:
    stream = MemoryReceiveStream()
    stream.put_data(b"abc")
    stream.put_data(memoryview(b"def"))
    stream.put_eof()
    stream.put_eof()
    with pytest.raises(ClosedResourceError):
        stream.put_data(b"ghi")

    async def main() -> None:
        assert await stream.receive_some(1) == b"a"
        assert await stream.receive_some(1000) == b"bcdef"
        assert await stream.receive_some() == b""
        assert await stream.receive_some() == b""

    kernel.run(main)


def test_wrong_numbers_of_bytes_are_refused_everywhere() -> None:
    async def main() -> None:
        sender, receiver = memory_stream_one_way_pair()
        lockstep = lockstep_stream_one_way_pair()[1]
        for wrong, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), ("1", TypeError)):
            number: Any = wrong
            for fetch in (sender.get_data, receiver.receive_some, lockstep.receive_some):
                with pytest.raises(error, match="max_bytes must be a whole number"):
                    await fetch(number)
            with pytest.raises(error, match="max_bytes must be a whole number"):
                sender.get_data_nowait(number)
            with pytest.raises(error, match="max_bytes must be a whole number"):
                memory_stream_pump(sender, receiver, max_bytes=number)

    kernel.run(main)


def test_text_is_refused_and_sends_nothing() -> None:
    async def main() -> None:
        stream = MemorySendStream()
        text: Any = "text"
        with pytest.raises(TypeError) as caught:
            await stream.send_all(text)
        assert caught.value.bytes_sent == 0  # type: ignore[attr-defined]
        await stream.send_all(b"x")
        assert stream.get_data_nowait() == b"x"

    kernel.run(main)


def test_generator_style_works() -> None:
    def main() -> Any:
        sender, receiver = memory_stream_one_way_pair()
        yield from sender.send_all(b"hello")
        chunk = yield from receiver.receive_some()
        yield from sender.aclose()
        yield from receiver.aclose()
        return chunk

    assert kernel.run(main) == b"hello"


# ---- hooks ------------------------------------------------------------------------------------------------


def test_hooks_are_called_where_it_says(log: list[Any]) -> None:
    sender, receiver = MemorySendStream(), MemoryReceiveStream()
    hooks = [sender.send_all_hook, sender.wait_send_all_might_not_block_hook, sender.close_hook]
    assert hooks == [None] * 3
    assert (receiver.receive_some_hook, receiver.close_hook) == (None, None)

    async def sent() -> None:
        log.append(("sent", bytes(sender.get_data_nowait())))

    async def waits() -> None:
        log.append("waits")

    async def receives() -> None:
        receiver.put_data(b"more")

    sender = MemorySendStream(sent, waits, lambda: log.append("closed"))
    receiver = MemoryReceiveStream(receives, lambda: log.append("closed too"))

    async def main() -> None:
        await sender.send_all(b"abc")
        await sender.wait_send_all_might_not_block()
        receiver.put_data(b"some and ")
        assert await receiver.receive_some() == b"some and more"
        await sender.aclose()
        sender.close()
        receiver.close()
        await receiver.aclose()

    kernel.run(main)
    assert log == [("sent", b"abc"), "waits", "closed", "closed", "closed too", "closed too"]


def test_hooks_may_be_generator_functions_or_replaced(log: list[Any]) -> None:
    def hook() -> Any:
        yield from kernel.sleep(0)
        log.append("generator")

    async def main() -> None:
        stream = MemorySendStream(hook)
        await stream.send_all(b"x")
        stream.send_all_hook = None
        await stream.send_all(b"y")
        assert stream.get_data_nowait() == b"xy"

    kernel.run(main)
    assert log == ["generator"]


def test_a_hook_that_is_no_async_function_is_an_error_that_says_so() -> None:
    async def main() -> None:
        plain: Any = lambda: None  # noqa: E731
        with pytest.raises(TypeError, match="send_all_hook wants an async function"):
            await MemorySendStream(plain).send_all(b"x")

    kernel.run(main)


def test_what_a_hook_raises_says_that_the_bytes_are_in_the_buffer() -> None:
    async def fail() -> None:
        raise OSError("cut")

    async def main() -> None:
        stream = MemorySendStream(fail)
        with pytest.raises(OSError, match="cut") as caught:
            await stream.send_all(memoryview(b"12345678").cast("I"))
        assert caught.value.bytes_sent == 8  # type: ignore[attr-defined]
        with kernel.CancelScope() as scope:
            scope.cancel()
            with pytest.raises(Cancelled) as cancelled:
                await stream.send_all(b"not sent")
        assert cancelled.value.bytes_sent == 0  # type: ignore[attr-defined]
        assert stream.get_data_nowait() == b"12345678"

    kernel.run(main)


@pytest.mark.parametrize("which", ["send_all", "wait_send_all_might_not_block", "receive_some"])
def test_closing_ends_a_hook_that_waits(which: str, log: list[Any]) -> None:
    async def main() -> None:
        async def forever() -> None:
            try:
                await kernel.sleep_forever()
            finally:
                log.append("hook left")

        stream: Any = MemoryReceiveStream(forever) if "receive" in which else MemorySendStream(forever, forever)
        args = [b"x"] if which == "send_all" else []
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(into, log, getattr(stream, which), *args)
            await wait_all_tasks_blocked()
            stream.close()

    kernel.run(main)
    assert log == ["hook left", ClosedResourceError]


def test_no_hook_is_called_on_a_closed_stream(log: list[Any]) -> None:
    async def hook() -> None:
        raise AssertionError("unreachable: the hook was called")

    async def main() -> None:
        sender, receiver = MemorySendStream(hook, hook), MemoryReceiveStream(hook)
        sender.close()
        receiver.close()
        await into(log, sender.send_all, b"x")
        await into(log, sender.wait_send_all_might_not_block)
        await into(log, receiver.receive_some)

    kernel.run(main)
    assert log == [ClosedResourceError] * 3


def test_a_hook_that_closes_its_own_stream_lets_the_operation_end_well() -> None:
    async def main() -> None:
        stream = MemorySendStream()

        async def close() -> None:
            stream.close()

        stream.send_all_hook = close
        await stream.send_all(b"last words")
        assert await stream.get_data() == b"last words"

    kernel.run(main)


# ---- the pump ---------------------------------------------------------------------------------------------


def test_the_pump_moves_data_and_the_end_and_says_whether_it_did() -> None:
    async def main() -> None:
        sender, receiver = MemorySendStream(), MemoryReceiveStream()
        with assert_no_checkpoints():
            assert memory_stream_pump(sender, receiver) is False
        await sender.send_all(b"12345")
        assert memory_stream_pump(sender, receiver, max_bytes=2) is True
        assert await receiver.receive_some() == b"12"
        assert memory_stream_pump(sender, receiver) is True
        assert memory_stream_pump(sender, receiver) is False
        assert await receiver.receive_some() == b"345"
        sender.close()
        assert memory_stream_pump(sender, receiver) is True
        assert await receiver.receive_some() == b""

    kernel.run(main)


def test_pumping_into_a_closed_stream_is_a_broken_one() -> None:
    async def main() -> None:
        sender, receiver = MemorySendStream(), MemoryReceiveStream()
        await sender.send_all(b"x")
        receiver.close()
        with pytest.raises(BrokenResourceError):
            memory_stream_pump(sender, receiver)
        sender.close()
        memory_stream_pump(sender, receiver)  # the end does not hurt anybody

    kernel.run(main)


# ---- pairs ------------------------------------------------------------------------------------------------


def test_a_pair_pumps_by_its_hooks_and_stalls_without() -> None:
    async def main() -> None:
        sender, receiver = memory_stream_one_way_pair()
        assert sender.wait_send_all_might_not_block_hook is None
        assert receiver.receive_some_hook is receiver.close_hook is None
        hook, sender.send_all_hook = sender.send_all_hook, None
        await sender.send_all(b"stalled ")
        with kernel.CancelScope() as scope:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(receiver.receive_some)
                await wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught
        sender.send_all_hook = hook
        await sender.send_all(b"no more")
        assert await receiver.receive_some() == b"stalled no more"

    kernel.run(main)


def test_closing_a_pair_that_stalls_delivers_what_was_left_and_then_the_end() -> None:
    async def main() -> None:
        sender, receiver = memory_stream_one_way_pair()
        sender.send_all_hook = None
        await sender.send_all(b"left over")
        sender.close()
        assert await receiver.receive_some() == b"left over"
        assert await receiver.receive_some() == b""
        sender, receiver = memory_stream_one_way_pair()
        sender.send_all_hook = None
        await sender.send_all(b"for nobody")
        receiver.close()
        sender.close()  # is not the place to complain

    kernel.run(main)


def test_a_stream_can_be_made_to_drip(virtual: Any, log: list[Any]) -> None:
    async def main() -> None:
        left, right = memory_stream_pair()

        async def drip() -> None:
            while memory_stream_pump(left.send_stream, right.receive_stream, max_bytes=1):
                await kernel.sleep(1)

        async def receive() -> None:
            async for chunk in right:
                log.append((kernel.current_time(), bytes(chunk)))

        left.send_stream.send_all_hook = drip
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(receive)
            await left.send_all(b"abc")
            await left.send_eof()

    virtual(main)
    assert log == [(0, b"a"), (1, b"b"), (2, b"c")]


def test_two_tasks_that_send_at_once_are_found_out_though_nothing_blocks(log: list[Any]) -> None:
    async def main() -> None:
        sender, _ = memory_stream_one_way_pair()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(into, log, sender.send_all, b"x")
            nursery.start_soon(into, log, sender.send_all, b"y")
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(into, log, sender.wait_send_all_might_not_block)
            nursery.start_soon(into, log, sender.send_all, b"y")

    kernel.run(main)
    assert log == [BusyResourceError, None] * 2


def test_two_tasks_that_receive_at_once_are_found_out_though_nothing_blocks(log: list[Any]) -> None:
    async def main() -> None:
        receiver = MemoryReceiveStream()
        receiver.put_data(b"xy")
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(into, log, receiver.receive_some, 1)
            nursery.start_soon(into, log, receiver.receive_some, 1)

    kernel.run(main)
    assert log == [BusyResourceError, b"x"]


def test_closing_a_receiver_throws_its_data_away(log: list[Any]) -> None:
    async def main() -> None:
        sender, receiver = memory_stream_one_way_pair()
        await sender.send_all(b"lost")
        receiver.close()
        await into(log, receiver.receive_some)
        await into(log, sender.send_all, b"more")

    kernel.run(main)
    assert log == [ClosedResourceError, BrokenResourceError]


def test_a_receiver_that_was_woken_by_data_and_closed_in_the_same_moment_is_told_so(log: list[Any]) -> None:
    async def main() -> None:
        stream = MemoryReceiveStream()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(into, log, stream.receive_some)
            await wait_all_tasks_blocked()
            stream.put_data(b"x")
            stream.close()

    kernel.run(main)
    assert log == [ClosedResourceError]


# ---- lockstep ---------------------------------------------------------------------------------------------


def test_in_lockstep_sending_ends_when_the_last_byte_is_received(log: list[Any]) -> None:
    async def main() -> None:
        sender, receiver = lockstep_stream_one_way_pair()

        async def send() -> None:
            await sender.send_all(b"12345")
            log.append("sent")

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(send)
            for size in (1, 3, 100):
                await wait_all_tasks_blocked()
                log.append(bytes(await receiver.receive_some(size)))
            await wait_all_tasks_blocked()
        await sender.send_all(b"")  # there is nothing to wait for

    kernel.run(main)
    assert log == [b"1", b"234", b"5", "sent"]


@pytest.mark.parametrize("how", ["cancelled", "closed", "broken"])
def test_in_lockstep_what_was_not_received_is_withdrawn_and_counted(how: str) -> None:
    async def main() -> None:
        sender, receiver = lockstep_stream_one_way_pair()
        async with kernel.open_nursery() as nursery:

            async def send() -> None:
                error = {"cancelled": Cancelled, "closed": ClosedResourceError, "broken": BrokenResourceError}[how]
                with kernel.CancelScope() as scope:
                    nursery.start_soon(end, scope)
                    with pytest.raises(error) as caught:
                        await sender.send_all(b"12345")
                    assert caught.value.bytes_sent == 2  # type: ignore[attr-defined]

            async def end(scope: kernel.CancelScope) -> None:
                await wait_all_tasks_blocked()
                assert await receiver.receive_some(2) == b"12"
                await wait_all_tasks_blocked()
                {"cancelled": scope.cancel, "closed": sender.close, "broken": receiver.close}[how]()
                if how == "closed":
                    assert await receiver.receive_some() == b""

            nursery.start_soon(send)
        if how == "cancelled":
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(sender.send_all, b"again")
                assert await receiver.receive_some() == b"again"

    kernel.run(main)


def test_in_lockstep_a_send_that_is_complete_stands_though_the_stream_is_closed_at_once(log: list[Any]) -> None:
    async def main() -> None:
        sender, receiver = lockstep_stream_one_way_pair()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(into, log, sender.send_all, b"x")
            await wait_all_tasks_blocked()
            await receiver.receive_some()
            sender.close()
            receiver.close()

    kernel.run(main)
    assert log == [None]


def test_in_lockstep_nothing_is_lost_whatever_the_schedule() -> None:
    async def program() -> None:
        sender, receiver = lockstep_stream_one_way_pair()
        got = bytearray()
        sent = 0

        async def send() -> None:
            nonlocal sent
            try:
                await sender.send_all(b"12")
                sent = 2
            except Cancelled as cancelled:
                sent = cancelled.bytes_sent  # type: ignore[attr-defined]
                raise
            finally:
                sender.close()

        async def receive() -> None:
            while chunk := await receiver.receive_some(1):
                got.extend(chunk)

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(receive)
            with kernel.CancelScope() as scope:
                async with kernel.open_nursery() as inner:
                    inner.start_soon(send)
                    await checkpoint()
                    scope.cancel()
        assert got == b"12"[:sent]

    assert explore(program).complete


def test_streams_in_lockstep_go_both_ways() -> None:
    async def main() -> None:
        left, right = lockstep_stream_pair()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(left.send_all, b"there")
            nursery.start_soon(right.send_all, b"back")
            assert await right.receive_some() == b"there"
            assert await left.receive_some() == b"back"

    kernel.run(main)


def test_a_stuck_program_is_told_which_stream_it_waits_for() -> None:
    async def main() -> None:
        sender, _ = lockstep_stream_one_way_pair()
        await sender.send_all(b"x")

    with pytest.raises(kernel.Deadlock, match="lockstep stream"):
        kernel.run(main)
