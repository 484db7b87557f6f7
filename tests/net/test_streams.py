"""SocketStream and SocketListener: bytes over real sockets, who may use them, and what becomes of the connection."""

from __future__ import annotations

import errno
import os
import socket as stdlib
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import kernel
from kernel import BrokenResourceError, BusyResourceError, Cancelled, ClosedResourceError, SocketListener, SocketStream
from kernel.socket import SocketType, from_stdlib_socket, socketpair
from kernel.testing import (
    MockClock,
    assert_checkpoints,
    check_half_closeable_stream,
    explore_cancellation,
    wait_all_tasks_blocked,
)
from kernel.testing.network_tools import open_stream_to_socket_listener

MUCH = bytes(range(256)) * 16384  # 4 MiB: more than any socket holds

Maker = Callable[[], Any]


async def unix_pair() -> tuple[SocketStream, SocketStream]:
    one, two = socketpair()
    return SocketStream(one), SocketStream(two)


async def tcp_pair() -> tuple[SocketStream, SocketStream]:
    (listener,) = await kernel.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        client = await open_stream_to_socket_listener(listener)
        return client, await listener.accept()


both_kinds = pytest.mark.parametrize("pair", [unix_pair, tcp_pair])


async def clogged_pair() -> tuple[SocketStream, SocketStream]:
    """A pair whose buffers are full, both ways. They are small, so that one receive makes room again."""
    streams = await unix_pair()
    for stream in streams:
        stream.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_SNDBUF, 4096)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, MUCH)
            await wait_all_tasks_blocked()
            nursery.cancel()
    return streams


async def drain(stream: SocketStream) -> int:
    """How many bytes are received up to the end."""
    total = 0
    async for chunk in stream:
        total += len(chunk)
    return total


def reset(stream: SocketStream) -> None:
    """Close the connection as one does who cannot wait: the other side gets a reset, not an end."""
    stream.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


async def log_error(log: list[str], function: Any, *args: Any) -> None:
    try:
        log.append(f"returned {await function(*args)!r}")
    except Exception as error:
        log.append(type(error).__name__)


# ---- bytes ------------------------------------------------------------------------------------------------


@both_kinds
def test_what_is_sent_is_received_and_then_comes_the_end(pair: Maker) -> None:
    async def main() -> None:
        one, two = await pair()
        async with two:
            async with one:
                await one.send_all(b"hello")
                assert await two.receive_some() == b"hello"
                await one.send_all(bytearray(b"abc"))
                assert await two.receive_some(2) == b"ab"
                assert await two.receive_some(2) == b"c"
                await one.send_all(memoryview(struct.pack("2i", 1, 2)).cast("i"))
                assert await two.receive_some() == struct.pack("2i", 1, 2)
                await one.send_all(b"")
            assert await two.receive_some() == b""
            assert await two.receive_some() == b""

    kernel.run(main)


def test_stream_keeps_the_promises_of_its_interface() -> None:
    kernel.run(check_half_closeable_stream, tcp_pair, None)
    kernel.run(check_half_closeable_stream, unix_pair, None)


def test_stream_keeps_the_promises_of_its_interface_while_a_task_waits_to_send() -> None:
    kernel.run(check_half_closeable_stream, unix_pair, clogged_pair)


def test_stream_works_in_generator_style() -> None:
    def main() -> Any:
        one, two = (SocketStream(end) for end in socketpair())
        yield from one.send_all(b"hello")
        got = yield from two.receive_some()
        for stream in (one, two):
            yield from stream.aclose()
        return got

    assert kernel.run(main) == b"hello"


@both_kinds
def test_data_and_the_end_that_arrive_together_are_both_delivered(pair: Maker) -> None:
    async def main() -> None:
        one, two = await pair()
        async with one, two:
            async with kernel.open_nursery() as nursery:
                receiving = nursery.spawn(drain, two)
                await wait_all_tasks_blocked()
                await one.send_all(b"last words")
                await one.send_eof()
                assert await receiving == len(b"last words")
            await one.send_eof()  # once more does nothing
            with pytest.raises(ClosedResourceError, match="send_eof"):
                await one.send_all(b"")
            await two.send_all(b"and the other way")  # half-open: that still works
            assert await one.receive_some() == b"and the other way"

    kernel.run(main)


def test_both_sides_send_much_at_once() -> None:
    async def exchange(stream: SocketStream) -> int:
        async with kernel.open_nursery() as nursery:
            receiving = nursery.spawn(drain, stream)
            await stream.send_all(MUCH)
            await stream.send_eof()
            return await receiving

    async def main() -> None:
        one, two = await tcp_pair()
        async with one, two:
            assert await kernel.gather(partial(exchange, one), partial(exchange, two)) == [len(MUCH)] * 2

    kernel.run(main)


@pytest.mark.parametrize(
    ("max_bytes", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("1", TypeError)]
)
def test_receive_some_refuses_a_size_that_is_none(max_bytes: Any, error: type[Exception]) -> None:
    async def main() -> None:
        one, two = await unix_pair()
        async with one, two:
            with pytest.raises(error, match="max_bytes"):
                await one.receive_some(max_bytes)

    kernel.run(main)


def test_send_all_refuses_text_and_sends_nothing() -> None:
    async def main() -> None:
        one, two = await unix_pair()
        async with two:
            async with one:
                with pytest.raises(TypeError):
                    await one.send_all("text")  # type: ignore[arg-type]
                await one.send_all(b".")  # the stream is not busy any more
            assert await drain(two) == 1

    kernel.run(main)


# ---- what it is made of ------------------------------------------------------------------------------------


def test_nagle_is_off_and_options_can_be_set_and_read() -> None:
    async def main() -> None:
        one, two = await tcp_pair()
        async with one, two:
            for stream in (one, two):
                assert stream.getsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY)
            one.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 0)
            assert one.getsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY) == 0
            assert len(one.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, 8)) == 8

    kernel.run(main)


def test_stream_wants_a_stream_socket_of_ours() -> None:
    with stdlib.socket() as plain:
        with pytest.raises(TypeError, match=r"kernel\.socket"):
            SocketStream(plain)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"kernel\.socket"):
            SocketListener(plain)  # type: ignore[arg-type]
    with kernel.socket.socket(type=stdlib.SOCK_DGRAM) as datagrams:
        with pytest.raises(ValueError, match="SOCK_STREAM"):
            SocketStream(datagrams)
        with pytest.raises(ValueError, match="SOCK_STREAM"):
            SocketListener(datagrams)


def test_listener_wants_a_socket_that_listens() -> None:
    with kernel.socket.socket() as sock, pytest.raises(ValueError, match="listen"):
        SocketListener(sock)


def test_the_methods_of_a_derived_socket_are_not_gone_round() -> None:
    calls: list[str] = []

    class Counting(SocketType):
        def send(self, *args: Any) -> Any:
            calls.append("send")
            return super().send(*args)

        def recv(self, *args: Any) -> Any:
            calls.append("recv")
            return super().recv(*args)

    async def main() -> None:
        one, two = stdlib.socketpair()
        async with SocketStream(Counting(one)) as stream, SocketStream(from_stdlib_socket(two)) as other:
            await stream.send_all(b"ping")
            await other.send_all(await other.receive_some())
            assert await stream.receive_some() == b"ping"
            await stream.send_eof()
            assert await other.receive_some() == b""

    kernel.run(main)
    assert calls == ["send", "recv"]


# ---- one at a time -----------------------------------------------------------------------------------------


def test_two_tasks_cannot_receive_at_once_nor_send_at_once() -> None:
    log: list[str] = []

    async def main() -> None:
        one, two = await unix_pair()
        async with one, two, kernel.open_nursery() as nursery:
            receiving = nursery.spawn(one.receive_some)
            sending = nursery.spawn(one.send_all, MUCH)
            await wait_all_tasks_blocked()
            await log_error(log, one.receive_some)
            await log_error(log, one.send_all, b"x")
            await log_error(log, one.send_all, b"")
            await log_error(log, one.wait_send_all_might_not_block)
            await log_error(log, one.send_eof)
            await two.send_all(b"the receiver is not disturbed")
            assert await receiving == b"the receiver is not disturbed"
            draining = nursery.spawn(drain, two)
            await sending
            await one.aclose()
            assert await draining == len(MUCH)  # and nobody's bytes are in between

    kernel.run(main)
    assert log == ["BusyResourceError"] * 5


def test_a_refusal_says_that_nothing_was_sent() -> None:
    async def main() -> None:
        a, b = await unix_pair()
        async with a, b, kernel.open_nursery() as nursery:
            nursery.start_soon(a.send_all, bytes(5_000_000))
            await wait_all_tasks_blocked()
            with pytest.raises(kernel.BusyResourceError) as busy:
                await a.send_all(b"x")
            assert busy.value.bytes_sent == 0  # type: ignore[attr-defined]
            nursery.cancel_scope.cancel()
        a, b = await unix_pair()
        async with a, b:
            await a.send_eof()
            with pytest.raises(kernel.ClosedResourceError) as closed:
                await a.send_all(b"x")
            assert closed.value.bytes_sent == 0  # type: ignore[attr-defined]

    kernel.run(main)


def test_who_waits_to_send_is_busy_too() -> None:
    async def main() -> None:
        one, two = await clogged_pair()
        async with one, two, kernel.open_nursery() as nursery:
            nursery.start_soon(one.wait_send_all_might_not_block)
            await wait_all_tasks_blocked()
            with pytest.raises(BusyResourceError):
                await one.send_all(b"x")
            nursery.start_soon(drain, two)
            await wait_all_tasks_blocked()
            nursery.cancel()

    kernel.run(main)


# ---- closing -----------------------------------------------------------------------------------------------


@both_kinds
def test_closing_wakes_whoever_waits_on_the_stream(pair: Maker) -> None:
    log: list[str] = []

    async def main() -> None:
        one, two = await pair()
        async with two, kernel.open_nursery() as nursery:
            nursery.start_soon(log_error, log, one.receive_some)
            nursery.start_soon(log_error, log, one.send_all, MUCH)
            await wait_all_tasks_blocked()
            await one.aclose()
        three, four = await clogged_pair()
        async with four, kernel.open_nursery() as nursery:
            nursery.start_soon(log_error, log, three.wait_send_all_might_not_block)
            await wait_all_tasks_blocked()
            await three.aclose()

    kernel.run(main)
    assert log == ["ClosedResourceError"] * 3


def test_a_send_that_is_cut_short_by_closing_says_how_much_went_out() -> None:
    async def main() -> None:
        one, two = await unix_pair()
        async with two, kernel.open_nursery() as nursery:

            async def send() -> int:
                with pytest.raises(ClosedResourceError) as caught:
                    await one.send_all(MUCH)
                return caught.value.bytes_sent  # type: ignore[attr-defined, no-any-return]

            sending = nursery.spawn(send)
            await wait_all_tasks_blocked()
            await one.aclose()
            assert await sending == await drain(two) > 0

    kernel.run(main)


@both_kinds
def test_a_closed_stream_refuses_everything_but_being_closed(pair: Maker) -> None:
    async def main() -> None:
        one, two = await pair()
        async with two:
            await one.aclose()
            await one.aclose()
            for operation in (
                partial(one.send_all, b"x"), partial(one.send_all, b""), one.receive_some, one.send_eof,
                one.wait_send_all_might_not_block,
            ):  # fmt: skip
                with pytest.raises(ClosedResourceError):
                    await operation()
        for stream in await pair():
            await stream.send_eof()
            await stream.aclose()
            with pytest.raises(ClosedResourceError):
                await stream.send_all(b"")

    kernel.run(main)


def test_a_closed_stream_does_not_wait_on_the_number_that_another_file_has_got() -> None:
    async def main() -> None:
        one, two = await unix_pair()
        await two.send_all(b"x")
        await one.receive_some(100)  # less than asked for, so that the next one would wait before it asks
        number = one.socket.fileno()
        await one.aclose()
        three, four = await unix_pair()
        async with two, three, four:
            assert three.socket.fileno() == number
            with pytest.raises(ClosedResourceError):
                await one.receive_some(100)
            await four.send_all(b"y")
            assert await three.receive_some() == b"y"

    kernel.run(main)


def test_a_closed_listener_does_not_wait_on_the_number_that_another_file_has_got() -> None:
    async def main() -> None:
        (listener,) = await kernel.open_tcp_listeners(0, host="127.0.0.1")
        client = await open_stream_to_socket_listener(listener)
        accepted = await listener.accept()
        number = listener.socket.fileno()
        await listener.aclose()
        three, four = await unix_pair()
        async with client, accepted, three, four:
            assert three.socket.fileno() == number
            with pytest.raises(ClosedResourceError):
                await listener.accept()

    kernel.run(main)


def test_closing_is_a_checkpoint_and_closes_even_if_cancelled() -> None:
    async def main() -> None:
        one, two = await unix_pair()
        async with two:
            with kernel.CancelScope() as scope:
                scope.cancel()
                await one.aclose()
            assert scope.cancelled_caught
            assert one.socket.fileno() == -1
            assert await two.receive_some() == b""
            with assert_checkpoints():
                await one.aclose()

    kernel.run(main)


# ---- peers that do not behave ----------------------------------------------------------------------------


def test_a_reset_breaks_the_stream_at_its_next_use() -> None:
    async def main() -> None:
        one, two = await tcp_pair()
        async with two:
            await two.send_all(b"never read")
            reset(one)
            with pytest.raises(BrokenResourceError) as caught:
                await two.receive_some()
            assert isinstance(caught.value.__cause__, ConnectionResetError)
            with pytest.raises(BrokenResourceError):
                await two.send_all(b"x")

    kernel.run(main)


def test_a_reset_wakes_the_one_who_receives_and_the_one_who_sends() -> None:
    log: list[str] = []

    async def main() -> None:
        one, two = await tcp_pair()
        async with two, kernel.open_nursery() as nursery:
            nursery.start_soon(log_error, log, two.receive_some)
            nursery.start_soon(log_error, log, two.send_all, MUCH)
            await wait_all_tasks_blocked()
            reset(one)

    kernel.run(main)
    assert log == ["BrokenResourceError"] * 2


def test_sending_to_a_peer_that_has_gone_fails_and_says_how_much_went_out() -> None:
    async def main() -> None:
        one, two = await unix_pair()
        async with one:
            async with kernel.open_nursery() as nursery:

                async def send() -> int:
                    with pytest.raises(BrokenResourceError) as caught:
                        await one.send_all(MUCH)
                    assert isinstance(caught.value.__cause__, BrokenPipeError)
                    return caught.value.bytes_sent  # type: ignore[attr-defined, no-any-return]

                sending = nursery.spawn(send)
                await wait_all_tasks_blocked()
                got = await two.receive_some(1000)
                await two.aclose()
                assert len(got) == 1000
                assert 1000 <= await sending < len(MUCH)
            with pytest.raises(BrokenResourceError) as caught:
                await one.send_all(b"x")
            assert caught.value.bytes_sent == 0  # type: ignore[attr-defined]

    kernel.run(main)


@both_kinds
def test_sending_to_a_peer_that_never_reads_can_be_cancelled_and_says_how_much_went_out(pair: Maker) -> None:
    async def main() -> None:
        one, two = await pair()
        async with two:
            with kernel.CancelScope() as scope:
                async with kernel.open_nursery() as nursery:

                    async def send() -> None:
                        try:
                            await one.send_all(MUCH)
                        except Cancelled as cancelled:
                            sent.append(cancelled.bytes_sent)  # type: ignore[attr-defined]
                            raise

                    sent: list[int] = []
                    nursery.start_soon(send)
                    await wait_all_tasks_blocked()
                    scope.cancel()
            assert scope.cancelled_caught
            async with one, kernel.open_nursery() as nursery:
                receiving = nursery.spawn(drain, two)
                await one.send_all(b"as good as before")
                await one.send_eof()
                assert await receiving == sent[0] + len(b"as good as before")

    kernel.run(main)


# ---- cancellation ----------------------------------------------------------------------------------------


def test_every_operation_is_a_checkpoint_whether_it_waits_or_not() -> None:
    async def main() -> None:
        one, two = await tcp_pair()
        async with one, two:
            for operation in (
                partial(one.send_all, b"x"), two.receive_some, one.wait_send_all_might_not_block, one.send_eof,
                one.send_eof, two.receive_some,
            ):  # fmt: skip
                with assert_checkpoints():
                    await operation()
        (listener,) = await kernel.open_tcp_listeners(0, host="127.0.0.1")
        async with listener:
            for _ in range(2):  # the second one waits before it asks
                async with await open_stream_to_socket_listener(listener):
                    with assert_checkpoints():
                        stream = await listener.accept()
                    await stream.aclose()

    kernel.run(main)


def test_a_cancelled_operation_did_nothing() -> None:
    async def main() -> None:
        one, two = await unix_pair()
        async with one, two:
            await one.send_all(b"one")
            for operation in (partial(one.send_all, b"two"), two.receive_some, one.send_eof):
                with kernel.CancelScope() as scope:
                    scope.cancel()
                    await operation()
                assert scope.cancelled_caught
            await one.send_all(b"three")
            assert await two.receive_some() == b"onethree"
        (listener,) = await kernel.open_tcp_listeners(0, host="127.0.0.1")
        async with listener, await open_stream_to_socket_listener(listener) as client:
            with kernel.CancelScope() as scope:
                scope.cancel()
                await listener.accept()
            assert scope.cancelled_caught
            async with await listener.accept() as stream:
                await client.send_all(b"still there")
                assert await stream.receive_some() == b"still there"

    kernel.run(main)


def test_no_byte_is_lost_when_a_receive_is_cancelled_at_any_place() -> None:
    outcome: list[bytes] = []

    async def main() -> None:
        outcome.clear()
        one, two = await unix_pair()
        async with one, two, kernel.open_nursery() as nursery:
            got: list[bytes] = []

            async def receive() -> None:
                with kernel.testing.cancel_target():
                    while sum(map(len, got)) < 4:
                        got.append(await two.receive_some(3))

            async def send() -> None:
                await one.send_all(b"ab")
                await kernel.lowlevel.checkpoint()
                await one.send_all(b"cd")
                await one.send_eof()

            nursery.start_soon(receive)
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            while chunk := await two.receive_some():
                got.append(chunk)
            outcome.extend(got)

    explored = explore_cancellation(main, cancel="targets", real=True, check=lambda: b"".join(outcome) == b"abcd")
    assert explored.cancelled is not None
    assert explored.cancelled > 2


def test_no_connection_is_lost_and_nothing_leaks_when_accept_is_cancelled_at_any_place() -> None:
    accepted: list[str] = []

    async def main() -> None:
        accepted.clear()
        (listener,) = await kernel.open_tcp_listeners(0, host="127.0.0.1")

        async def accept() -> None:
            async with await listener.accept():
                accepted.append("accepted")

        async with listener, kernel.open_nursery() as nursery:

            async def first() -> None:
                with kernel.testing.cancel_target():
                    await accept()

            trying = nursery.spawn(first)
            await wait_all_tasks_blocked()
            async with await open_stream_to_socket_listener(listener):
                await trying
                if not accepted:
                    await accept()

    explore_cancellation(main, cancel="targets", real=True, check=lambda: accepted == ["accepted"])


def test_nothing_leaks_when_a_conversation_is_cancelled_at_any_place() -> None:
    async def main() -> None:
        (listener,) = await kernel.open_tcp_listeners(0, host="127.0.0.1")

        async def serve() -> None:
            async with await listener.accept() as stream:
                await stream.wait_send_all_might_not_block()
                async for chunk in stream:
                    await stream.send_all(chunk)

        async with listener, kernel.open_nursery() as nursery:
            nursery.start_soon(serve)
            async with await open_stream_to_socket_listener(listener) as client:
                await client.send_all(b"x")
                assert await client.receive_some() == b"x"
                await client.send_eof()
                assert await client.receive_some() == b""

    explored = explore_cancellation(main, real=True)
    assert explored.cancelled is not None
    assert explored.cancelled > 10


# ---- listeners --------------------------------------------------------------------------------------------


def test_only_one_task_at_a_time_may_wait_for_a_connection() -> None:
    async def main() -> None:
        (listener,) = await kernel.open_tcp_listeners(0, host="127.0.0.1")
        async with listener, kernel.open_nursery() as nursery:
            waiting = nursery.spawn(listener.accept)
            await wait_all_tasks_blocked()
            with pytest.raises(BusyResourceError):
                await listener.accept()
            async with await open_stream_to_socket_listener(listener), await waiting:
                pass

    kernel.run(main)


def test_closing_a_listener_wakes_who_waits_for_a_connection() -> None:
    log: list[str] = []

    async def main() -> None:
        (listener,) = await kernel.open_tcp_listeners(0, host="127.0.0.1")
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(log_error, log, listener.accept)
            await wait_all_tasks_blocked()
            await listener.aclose()
        await listener.aclose()
        await log_error(log, listener.accept)

    kernel.run(main)
    assert log == ["ClosedResourceError"] * 2


class Troubled(SocketType):
    """A listening socket whose `accept` fails with some numbers first."""

    def __init__(self, sock: stdlib.socket, *numbers: int) -> None:
        super().__init__(sock)
        self.numbers = list(numbers)

    @kernel.lowlevel.operation
    def accept(self) -> Any:
        if self.numbers:
            number = self.numbers.pop(0)
            raise OSError(number, os.strerror(number))
        return (yield from super().accept())


def test_connections_that_have_failed_before_they_were_accepted_are_passed_over() -> None:
    async def main() -> None:
        with stdlib.create_server(("127.0.0.1", 0)) as plain:
            troubled = Troubled(plain, errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN)
            async with SocketListener(troubled) as listener, await open_stream_to_socket_listener(listener):
                async with await listener.accept():
                    assert troubled.numbers == []

    kernel.run(main)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EFAULT])
def test_accept_tells_when_the_system_is_short_of_something(number: int) -> None:
    async def main() -> None:
        with stdlib.create_server(("127.0.0.1", 0)) as plain:
            async with SocketListener(Troubled(plain, number)) as listener:
                with pytest.raises(OSError) as caught:
                    await listener.accept()
                assert caught.value.errno == number

    kernel.run(main)


# ---- time ------------------------------------------------------------------------------------------------


def test_a_virtual_clock_jumps_while_sockets_are_silent_and_waits_while_they_are_not() -> None:
    async def main() -> float:
        one, two = await tcp_pair()
        async with one, two:
            with kernel.move_on_after(3600) as scope:
                await two.receive_some()
            assert scope.cancelled_caught
            async with kernel.open_nursery() as nursery:
                receiving = nursery.spawn(drain, two)
                with kernel.fail_after(3600):
                    await one.send_all(MUCH)
                    await one.send_eof()
                    assert await receiving == len(MUCH)
        return kernel.current_time()

    # On their way through the loopback bytes may be nowhere to be seen for a moment. The threshold is for that.
    assert kernel.run(main, clock=MockClock(autojump_threshold=0.2)) == 3600
