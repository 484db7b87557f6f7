"""serve_listeners: who is served when, what ends a server, and how. And streams that do not wait for ever.

Most of it happens in memory and in virtual time; what has to do with the system is at the end.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket as stdlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from math import inf, nan
from typing import Any

import pytest

import kernel
from kernel import (
    BrokenResourceError,
    BusyResourceError,
    Cancelled,
    ClosedResourceError,
    SocketStream,
    TimeoutStream,
    TooSlowError,
    serve_listeners,
    serve_tcp,
)
from kernel.abc import Listener
from kernel.net import serving
from kernel.socket import socketpair
from kernel.testing import (
    MockClock,
    assert_checkpoints,
    check_half_closeable_stream,
    explore,
    explore_cancellation,
    memory_stream_pair,
    wait_all_tasks_blocked,
)
from kernel.testing.network_tools import open_stream_to_socket_listener

Virtual = Callable[..., Any]


class Door(Listener[Any]):
    """A listener in memory: `knock()` gives the client's end of a new connection; `trouble` is what accept raises."""

    def __init__(self) -> None:
        self.send, self.receive = kernel.open_memory_channel[Any](inf)
        self.ends: list[Any] = []
        self.accepted = 0
        self.closed = False

    def knock(self) -> Any:
        client, server = memory_stream_pair()
        self.send.send_nowait(server)
        self.ends.append(server)
        return client

    def trouble(self, number: int) -> None:
        self.send.send_nowait(OSError(number, os.strerror(number)))

    @property
    def waiting(self) -> int:
        """How many have knocked and were not let in."""
        return len(self.ends) - self.accepted

    @property
    def served(self) -> list[bool]:
        """Whether the server has closed its end of each connection."""
        return [end.receive_stream._closed for end in self.ends]

    async def accept(self) -> Any:
        what = await self.receive.receive()
        if isinstance(what, OSError):
            raise what
        self.accepted += 1
        return what

    async def aclose(self) -> None:
        self.closed = True
        self.receive.close()
        self.send.close()
        await kernel.lowlevel.checkpoint()


# ---- serving ---------------------------------------------------------------------------------------------


def test_every_connection_gets_a_task_of_its_own_and_is_closed_in_the_end(virtual: Virtual) -> None:
    async def handler(stream: Any) -> None:
        assert kernel.lowlevel.current_task().name.endswith("handler")
        word = await stream.receive_some()
        await stream.send_all(word.upper())

    async def main() -> None:
        door = Door()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(serve_listeners, handler, [door])
            ann, ben = door.knock(), door.knock()
            await ben.send_all(b"ben")
            assert await ben.receive_some() == b"BEN"
            await ann.send_all(b"ann")
            assert await ann.receive_some() == b"ANN"
            for client in (ann, ben):
                assert await client.receive_some() == b""
            nursery.cancel()
        assert door.closed

    virtual(main)


def test_a_handler_may_be_in_generator_style_and_may_close_its_stream_itself(virtual: Virtual) -> None:
    def handler(stream: Any) -> Any:
        word = yield from stream.receive_some()
        yield from stream.send_all(word)
        yield from stream.aclose()

    async def main() -> None:
        door = Door()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(serve_listeners, handler, [door])
            client = door.knock()
            await client.send_all(b"hello")
            assert await client.receive_some() == b"hello"
            assert await client.receive_some() == b""
            nursery.cancel()

    virtual(main)


def test_start_returns_the_listeners_and_each_of_them_is_served(virtual: Virtual) -> None:
    async def main() -> None:
        doors = [Door(), Door()]
        async with kernel.open_nursery() as nursery:
            assert await nursery.start(serve_listeners, lambda stream: kernel.sleep(1), doors) is doors
            clients = [door.knock() for door in doors]
            for client in clients:
                assert await client.receive_some() == b""
            assert kernel.current_time() == 1
            nursery.cancel()
        assert all(door.closed for door in doors)

    virtual(main)


def test_a_handler_nursery_keeps_the_handlers_when_the_server_is_gone(virtual: Virtual) -> None:
    async def main() -> None:
        door = Door()
        async with kernel.open_nursery() as handlers:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(
                    partial(serve_listeners, lambda stream: kernel.sleep(10), [door], handler_nursery=handlers)
                )
                client = door.knock()
                await kernel.sleep(1)
                nursery.cancel()
            assert door.closed
            assert len(handlers.child_tasks) == 1
            assert await client.receive_some() == b""
            assert kernel.current_time() == 10

    virtual(main)


def test_a_handler_nursery_is_anything_that_can_start_a_task(virtual: Virtual) -> None:
    class Counter:
        def __init__(self, nursery: kernel.Nursery) -> None:
            self.nursery, self.count = nursery, 0

        def start_soon(self, async_fn: Any, *args: Any) -> None:
            self.count += 1
            self.nursery.start_soon(async_fn, *args)

    async def main() -> None:
        door = Door()
        async with kernel.open_nursery() as nursery:
            counter = Counter(nursery)
            nursery.start_soon(
                partial(serve_listeners, lambda stream: kernel.sleep(0), [door], handler_nursery=counter)
            )
            assert await door.knock().receive_some() == b""
            assert await door.knock().receive_some() == b""
            assert counter.count == 2
            nursery.cancel()

    virtual(main)


def test_a_connection_that_no_handler_can_be_started_for_is_closed(virtual: Virtual) -> None:
    async def main() -> None:
        door = Door()
        async with kernel.open_nursery() as closed:
            pass
        client = door.knock()
        with pytest.raises(RuntimeError, match="nursery is closed"):
            await serve_listeners(kernel.sleep, [door], handler_nursery=closed)  # type: ignore[arg-type]
        assert await client.receive_some() == b""
        assert door.closed

    virtual(main)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_connections": 0}, ValueError, "max_connections"),
        ({"max_connections": 1.5}, TypeError, "max_connections"),
        ({"drain": -1}, ValueError, "drain"),
        ({"drain": nan}, ValueError, "drain"),
        ({"drain": 1, "handler_nursery": object()}, ValueError, "handler_nursery"),
        ({"handler_errors": "ignore"}, ValueError, "handler_errors"),
        ({"listeners": []}, ValueError, "no listeners"),
    ],
)
def test_serve_listeners_refuses_what_makes_no_sense(
    virtual: Virtual, options: Any, error: type[Exception], text: str
) -> None:
    async def main() -> None:
        door = Door()
        with pytest.raises(error, match=text):
            await serve_listeners(lambda stream: kernel.sleep(0), **{"listeners": [door]} | options)
        assert door.closed or "listeners" in options, "who serves takes the listeners over, and nobody else closes them"

    virtual(main)


# ---- what goes wrong -------------------------------------------------------------------------------------


async def moody(stream: Any) -> None:
    """A handler that fails with what its client says."""
    word = (await stream.receive_some()).decode()
    if word:
        raise {
            "value": ValueError("a bug"),
            "broken": BrokenResourceError("the peer is gone"),
            "slow": TooSlowError("the peer is slow"),
            "both": ExceptionGroup("", [BrokenResourceError("gone"), ExceptionGroup("", [TooSlowError("slow")])]),
            "mixed": ExceptionGroup("", [BrokenResourceError("gone"), ValueError("a bug")]),
            "exit": SystemExit(3),
        }[word]


def test_an_error_of_a_handler_ends_the_server_and_all_its_handlers(virtual: Virtual) -> None:
    async def main() -> None:
        door = Door()
        clients = [door.knock() for _ in range(3)]
        async with kernel.open_nursery() as nursery:

            async def serve() -> None:
                with pytest.raises(ExceptionGroup) as caught:
                    await serve_listeners(moody, [door], drain=100)
                (error,) = caught.value.exceptions
                assert isinstance(error, ValueError)

            nursery.start_soon(serve)
            await clients[1].send_all(b"value")
            assert [await client.receive_some() for client in clients] == [b""] * 3
        assert door.closed
        assert kernel.current_time() == 0

    virtual(main)


def test_logged_errors_of_handlers_end_only_their_connections(
    virtual: Virtual, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        door = Door()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(partial(serve_listeners, moody, [door], handler_errors="log"))
            door.knock()
            for word in (b"value", b"broken", b"slow", b"both", b"mixed"):
                client = door.knock()
                await client.send_all(word)
                assert await client.receive_some() == b""
            await wait_all_tasks_blocked()
            assert door.served == [False, True, True, True, True, True]
            nursery.cancel()

    virtual(main)
    assert [(record.name, record.levelno, bool(record.exc_info)) for record in caplog.records] == [
        ("kernel.serve_listeners", logging.ERROR, True),
        ("kernel.serve_listeners", logging.WARNING, False),
        ("kernel.serve_listeners", logging.WARNING, False),
        ("kernel.serve_listeners", logging.WARNING, False),
        ("kernel.serve_listeners", logging.ERROR, True),
    ]
    assert "has failed" in caplog.messages[0]
    assert "BrokenResourceError('the peer is gone')" in caplog.messages[1]


def test_what_is_no_exception_ends_the_server_even_if_errors_are_logged(virtual: Virtual) -> None:
    async def main() -> None:
        door = Door()
        client = door.knock()
        await client.send_all(b"exit")
        with pytest.raises(BaseExceptionGroup) as caught:
            await serve_listeners(moody, [door], handler_errors="log")
        assert isinstance(caught.value.exceptions[0], SystemExit)

    virtual(main)


def test_an_error_of_accept_ends_the_server_and_arrives_as_it_is(virtual: Virtual) -> None:
    async def main() -> None:
        door, other = Door(), Door()
        client = other.knock()
        door.trouble(errno.EBADF)
        with pytest.raises(OSError) as caught:
            await serve_listeners(moody, [other, door])
        assert caught.value.errno == errno.EBADF
        assert door.closed
        assert other.closed
        assert await client.receive_some() == b""

    virtual(main)


def test_handlers_are_drained_when_accept_has_failed_too(virtual: Virtual) -> None:
    async def main() -> None:
        door = Door()
        client = door.knock()
        door.trouble(errno.EBADF)
        with pytest.raises(OSError):
            await serve_listeners(lambda stream: kernel.sleep(5), [door], drain=10)
        assert await client.receive_some() == b""
        assert kernel.current_time() == 5

    virtual(main)


def test_a_listener_that_somebody_closes_ends_the_server(virtual: Virtual) -> None:
    async def main() -> None:
        (listener,) = await kernel.open_tcp_listeners(0, host="127.0.0.1")
        async with kernel.open_nursery() as nursery:

            async def serve() -> None:
                with pytest.raises(ClosedResourceError):
                    await serve_listeners(moody, [listener])

            nursery.start_soon(serve)
            await wait_all_tasks_blocked()
            await listener.aclose()

    virtual(main)


@pytest.mark.parametrize("number", sorted(serving.SHORTAGES))
def test_a_shortage_is_waited_out_and_told_once(
    virtual: Virtual, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    async def main() -> None:
        door = Door()
        for _ in range(5):
            door.trouble(number)
        client = door.knock()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(serve_listeners, lambda stream: kernel.sleep(0), [door])
            assert await client.receive_some() == b""
            assert kernel.current_time() == pytest.approx(5 * serving.PAUSE)
            for seconds, messages in ((59, 1), (59, 1), (61, 2)):  # a minute without one makes the next one news
                await kernel.sleep(seconds)
                door.trouble(number)
                assert await door.knock().receive_some() == b""
                assert len(caplog.messages) == messages
            nursery.cancel()

    virtual(main)
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert os.strerror(number) in caplog.messages[0]


# ---- how many ----------------------------------------------------------------------------------------------


def test_nobody_is_accepted_while_as_many_as_allowed_are_served(virtual: Virtual) -> None:
    async def main() -> None:
        door = Door()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(
                partial(serve_listeners, lambda stream: stream.receive_some(), [door], max_connections=2)
            )
            clients = [door.knock() for _ in range(5)]
            await wait_all_tasks_blocked()
            assert door.waiting == 3
            await clients[1].send_all(b"bye")
            await wait_all_tasks_blocked()
            assert door.waiting == 2
            assert door.served == [False, True, False, False, False]
            for client in clients:
                if client is not clients[1]:
                    await client.send_all(b"bye")
            assert [await client.receive_some() for client in clients] == [b""] * 5
            nursery.cancel()

    virtual(main)


def test_a_place_is_free_again_however_its_handler_ended(virtual: Virtual) -> None:
    async def main() -> None:
        door = Door()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(partial(serve_listeners, moody, [door], max_connections=1, handler_errors="log"))
            for word in (b"value", b"broken", b"slow") * 2:
                client = door.knock()
                await client.send_all(word)
                assert await client.receive_some() == b""
            nursery.cancel()

    virtual(main)


def test_several_listeners_share_the_places_and_none_is_starved(virtual: Virtual) -> None:
    running: list[int] = []
    log: list[int] = []

    async def handler(stream: Any) -> None:
        running.append(1)
        log.append(len(running))
        await kernel.sleep(1)
        running.pop()

    async def main() -> None:
        doors = [Door(), Door(), Door()]
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(partial(serve_listeners, handler, doors, max_connections=1))
            await wait_all_tasks_blocked()
            for door in reversed(doors):  # one after the other: an idle listener does not keep the place
                assert await door.knock().receive_some() == b""
            assert kernel.current_time() == 3
            clients = [door.knock() for door in doors for _ in range(2)]
            for client in clients:
                assert await client.receive_some() == b""
            assert kernel.current_time() == 9
            nursery.cancel()

    virtual(main)
    assert log == [1] * 9


def test_a_server_that_is_full_can_be_cancelled(virtual: Virtual) -> None:
    async def main() -> None:
        doors = [Door(), Door()]
        for door in doors * 3:
            door.knock()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(
                partial(serve_listeners, lambda stream: kernel.sleep_forever(), doors, max_connections=1)
            )
            await wait_all_tasks_blocked()
            nursery.cancel()
        assert 1 <= 6 - sum(door.waiting for door in doors) <= 2
        assert sum(sum(door.served) for door in doors) == 6 - sum(door.waiting for door in doors)

    virtual(main)


# ---- stopping ------------------------------------------------------------------------------------------------


def serve_and_cancel(virtual: Virtual, drain: float, grace: float, *seconds: float) -> tuple[list[str], list[float]]:
    """Serve as many connections as there are `seconds`, each for so long. After 1 second, cancel the server.

    Returns what has happened to the handlers, in the order in which they ended; and when.
    """
    log: list[str] = []
    times: list[float] = []
    lasts = iter(seconds)

    async def handler(stream: Any) -> None:
        try:
            await kernel.sleep(next(lasts))
            log.append("served")
        except Cancelled as cancelled:
            log.append(cancelled.source)
            raise
        finally:
            times.append(kernel.current_time())

    async def main() -> None:
        door = Door()
        async with kernel.open_nursery() as nursery:
            server = nursery.spawn(partial(serve_listeners, handler, [door], drain=drain))
            clients = [door.knock() for _ in seconds]
            await kernel.sleep(1)
            server.cancel("closing time", grace=grace)
            await wait_all_tasks_blocked()
            assert door.closed, "no new connection from the first moment on"
            with pytest.raises(kernel.TaskCancelled):
                await server
            assert server.cancel_scope.cancelled_caught
        for client in clients:
            assert await client.receive_some() == b""

    virtual(main)
    return log, times


def test_without_drain_the_handlers_are_cancelled_with_the_server(virtual: Virtual) -> None:
    assert serve_and_cancel(virtual, 0, inf, 2, 5) == (["explicit", "explicit"], [1, 1])
    assert serve_and_cancel(virtual, 0, 10, 2, 5) == (["explicit", "explicit"], [1, 1])


def test_handlers_may_finish_while_the_server_drains_and_then_it_ends(virtual: Virtual) -> None:
    assert serve_and_cancel(virtual, 10, inf, 2, 5) == (["served", "served"], [2, 5])
    assert serve_and_cancel(virtual, 10, inf) == ([], [])


def test_handlers_that_take_longer_than_the_drain_are_cancelled(virtual: Virtual) -> None:
    assert serve_and_cancel(virtual, 3, inf, 2, 5, 6) == (["served", "deadline", "deadline"], [2, 4, 4])


def test_a_grace_ends_the_drain_if_it_is_shorter_and_only_then(virtual: Virtual) -> None:
    assert serve_and_cancel(virtual, 10, 3, 2, 5) == (["served", "deadline"], [2, 4])
    assert serve_and_cancel(virtual, 3, 10, 2, 5) == (["served", "deadline"], [2, 4])
    assert serve_and_cancel(virtual, inf, 3, 2, 5) == (["served", "deadline"], [2, 4])
    assert serve_and_cancel(virtual, 10, 0, 2, 5) == (["deadline", "deadline"], [1, 1])


def test_a_drain_can_be_cut_short_by_cancelling_again(virtual: Virtual) -> None:
    async def main() -> None:
        door = Door()
        async with kernel.open_nursery() as nursery:
            server = nursery.spawn(partial(serve_listeners, lambda stream: kernel.sleep_forever(), [door], drain=inf))
            door.knock()
            await kernel.sleep(1)
            server.cancel()
            await kernel.sleep(100)
            assert not server.done
            server.cancel(grace=1)
        assert kernel.current_time() == 102

    virtual(main)


def test_an_error_of_a_handler_ends_the_drain(virtual: Virtual) -> None:
    async def main() -> None:
        door = Door()
        clients = [door.knock() for _ in range(2)]
        async with kernel.open_nursery() as outside:

            async def serve() -> None:
                with pytest.raises(ExceptionGroup):
                    await serve_listeners(moody, [door], drain=inf)

            server = outside.spawn(serve)
            await kernel.sleep(1)
            server.cancel()
            await kernel.sleep(1)
            await clients[0].send_all(b"value")
            assert await clients[1].receive_some() == b""
            await wait_all_tasks_blocked()
            assert server.done

    virtual(main)


def test_requests_can_be_shielded_one_by_one_so_that_idle_connections_leave_at_once(virtual: Virtual) -> None:
    log: list[tuple[str, float]] = []

    async def handler(stream: Any) -> None:
        try:
            async for request in stream:
                with kernel.cleanup(10):  # what is under way may take so long, and no longer than the grace
                    await kernel.sleep(float(request))
                    await stream.send_all(b"done")
        finally:
            log.append(("left", kernel.current_time()))

    async def main() -> None:
        door = Door()
        async with kernel.open_nursery() as nursery:
            server = nursery.spawn(serve_listeners, handler, [door])
            idle, quick, slow = (door.knock() for _ in range(3))
            await quick.send_all(b"2")
            await slow.send_all(b"9")
            await kernel.sleep(1)
            server.cancel("closing time", grace=3)
            for client in (idle, quick, slow):
                log.append(((await client.receive_some()).decode(), kernel.current_time()))
        del idle

    virtual(main)
    assert log == [("left", 1), ("", 1), ("done", 2), ("left", 2), ("left", 4), ("", 4)]


@pytest.mark.parametrize("options", [{}, {"drain": 1}, {"max_connections": 1}, {"max_connections": 1, "drain": 1}])
def test_nothing_leaks_and_no_bound_breaks_under_any_schedule_and_cancellation(options: Any) -> None:
    doors: list[Door] = []
    running: list[Any] = []

    async def handler(stream: Any) -> None:
        running.append(stream)
        try:
            await stream.receive_some()
        finally:
            running.remove(stream)

    async def client(door: Door) -> None:
        with suppress(ClosedResourceError):
            await door.knock().send_all(b"x")

    async def main() -> None:
        doors[:] = [Door(), Door()]
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(partial(serve_listeners, handler, doors, **options))
            async with kernel.open_nursery() as clients:
                for door in doors:
                    clients.start_soon(client, door)
            await kernel.sleep(1)
            nursery.cancel()

    explored = explore(
        main, strategy="random", schedules=200, cancel="program", seed=1,
        invariant=lambda: len(running) <= options.get("max_connections", 2),
        check=lambda: not running and all(door.closed and sum(door.served) == door.accepted for door in doors),
    )  # fmt: skip
    assert explored.cancelled is not None
    assert explored.cancelled > 50


def test_a_connection_that_comes_in_as_the_server_is_cancelled_is_closed_and_is_no_error() -> None:
    closed: list[bool] = []

    class Plain(TwoWay):
        async def aclose(self) -> None:  # no cancel point
            closed.append(True)

    async def main() -> None:
        closed.clear()
        door = Door()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(serve_listeners, lambda stream: kernel.sleep(1), [door])
            await wait_all_tasks_blocked()
            door.send.send_nowait(Plain())  # from here on it is the acceptor's
            nursery.cancel()

    assert explore(main, check=lambda: bool(closed)).complete


# ---- streams that do not wait for ever -----------------------------------------------------------------------


class TwoWay(kernel.abc.Stream):
    """A stream that does nothing and cannot be half-closed."""

    async def send_all(self, data: Any) -> None: ...

    async def receive_some(self, max_bytes: Any = None) -> bytes:
        return b""

    async def wait_send_all_might_not_block(self) -> None: ...

    async def aclose(self) -> None: ...


async def timed_pair() -> tuple[TimeoutStream[SocketStream], TimeoutStream[SocketStream]]:
    one, two = socketpair()
    return TimeoutStream(SocketStream(one), 3600), TimeoutStream(SocketStream(two), 3600)


async def clogged_pair() -> tuple[TimeoutStream[SocketStream], TimeoutStream[SocketStream]]:
    streams = await timed_pair()
    for stream in streams:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(4_000_000))
            await wait_all_tasks_blocked()
            nursery.cancel()
    return streams


def test_timeout_stream_keeps_the_promises_of_a_stream() -> None:
    kernel.run(check_half_closeable_stream, timed_pair, clogged_pair)


def test_receiving_from_a_silent_peer_ends_in_time_and_can_be_tried_again(virtual: Virtual) -> None:
    async def main() -> None:
        client, end = memory_stream_pair()
        stream = TimeoutStream(end, 30)
        for _ in range(2):
            with pytest.raises(TooSlowError, match="30 seconds"):
                await stream.receive_some()
        assert kernel.current_time() == 60
        async with kernel.open_nursery() as nursery:

            async def drip() -> None:
                for _ in range(3):
                    await kernel.sleep(29)
                    await client.send_all(b"x")
                await client.send_eof()

            nursery.start_soon(drip)
            assert [chunk async for chunk in stream] == [b"x"] * 3  # slow, but steady

    virtual(main)


def test_the_handlers_own_time_does_not_count(virtual: Virtual) -> None:
    async def main() -> None:
        client, end = memory_stream_pair()
        stream = TimeoutStream(end, 30)
        await kernel.sleep(100)
        await client.send_all(b"x")
        assert await stream.receive_some() == b"x"
        stream.seconds = inf
        with kernel.move_on_after(1000) as scope:
            await stream.receive_some()
        assert scope.cancelled_caught

    virtual(main)


def test_sending_to_a_peer_that_never_reads_ends_in_time_and_says_how_much_went_out() -> None:
    async def main() -> None:
        one, two = socketpair()
        async with TimeoutStream(SocketStream(one), 30) as stream, SocketStream(two) as peer:
            with pytest.raises(TooSlowError) as caught:
                await stream.send_all(bytes(4_000_000))
            assert kernel.current_time() == 30
            with pytest.raises(TooSlowError):
                await stream.wait_send_all_might_not_block()
            await stream.transport_stream.aclose()
            got = 0
            async for chunk in peer:
                got += len(chunk)
            assert got == caught.value.bytes_sent > 0  # type: ignore[attr-defined]

    kernel.run(main, clock=MockClock(autojump_threshold=0.01))


def test_sending_to_a_slow_but_steady_peer_takes_its_time() -> None:
    async def main() -> None:
        one, two = socketpair()
        one.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_SNDBUF, 8192)  # it is writable when half of that is free
        async with TimeoutStream(SocketStream(one), 30) as stream, SocketStream(two) as peer:
            async with kernel.open_nursery() as nursery:
                sending = nursery.spawn(stream.send_all, bytes(300_000))
                got = 0
                while got < 300_000:
                    await kernel.sleep(1)
                    got += len(await peer.receive_some(5000))
                await sending
            assert kernel.current_time() >= 60

    kernel.run(main, clock=MockClock(autojump_threshold=0.002))


def test_a_send_that_was_cancelled_from_outside_says_how_much_went_out() -> None:
    async def main() -> None:
        one, two = socketpair()
        async with SocketStream(two) as peer:
            stream = TimeoutStream(SocketStream(one), 30)
            sent = -1
            with kernel.move_on_after(1):
                try:
                    await stream.send_all(bytes(4_000_000))
                except Cancelled as cancelled:
                    sent = cancelled.bytes_sent  # type: ignore[attr-defined]
                    raise
            await stream.aclose()
            got = 0
            async for chunk in peer:
                got += len(chunk)
            assert got == sent > 0

    kernel.run(main, clock=MockClock(autojump_threshold=0.01))


def test_between_two_pieces_nobody_else_can_send(virtual: Virtual) -> None:
    sent: list[bytes] = []

    class Slow(TwoWay):
        async def send_all(self, data: Any) -> None:
            await kernel.sleep(1)
            sent.append(bytes(data[:1]))

    async def main() -> None:
        stream = TimeoutStream(Slow(), 30)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, b"x" * (serving.PIECE + 1))
            await kernel.sleep(1)  # one piece is through, and the transport would take another one's
            for operation in (partial(stream.send_all, b"y"), stream.wait_send_all_might_not_block):
                with pytest.raises(BusyResourceError):
                    await operation()
        await stream.send_all(b"z")

    virtual(main)
    assert sent == [b"x", b"x", b"z"]


def test_closing_does_not_wait_for_a_silent_peer_either(virtual: Virtual) -> None:
    class Ceremonious(kernel.StapledStream[Any, Any]):
        async def _say_goodbye(self) -> None:
            try:
                await kernel.sleep_forever()
            finally:
                await kernel.aclose_forcefully(super())  # type: ignore[arg-type]

        def aclose(self) -> Any:
            return self._say_goodbye()

    async def main() -> None:
        client, end = memory_stream_pair()
        stream = TimeoutStream(Ceremonious(end.send_stream, end.receive_stream), 5)
        await stream.aclose()
        assert kernel.current_time() == 5
        assert await client.receive_some() == b""

    virtual(main)


def test_a_stream_that_cannot_end_one_direction_says_so(virtual: Virtual) -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match="send_eof"):
            await TimeoutStream(TwoWay(), 5).send_eof()

    virtual(main)


@pytest.mark.parametrize("seconds", [0, -1, nan])
def test_a_timeout_of_no_time_is_refused(seconds: float) -> None:
    client, _ = memory_stream_pair()
    with pytest.raises(ValueError, match="seconds"):
        TimeoutStream(client, seconds)


# ---- with the system -----------------------------------------------------------------------------------------


async def echo(stream: SocketStream) -> None:
    with suppress(BrokenResourceError):
        async for chunk in stream:
            await stream.send_all(chunk)


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096) if hard != resource.RLIM_INFINITY else 4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_connections_in_a_burst_are_all_served(many_files: None) -> None:
    async def client(listener: kernel.SocketListener) -> None:
        async with await open_stream_to_socket_listener(listener) as stream:
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            (listener,) = await nursery.start(partial(serve_tcp, echo, 0, host="127.0.0.1"))
            async with kernel.open_nursery() as clients:
                for _ in range(1000):
                    clients.start_soon(client, listener)
            nursery.cancel()

    kernel.run(main)


def test_a_program_without_descriptors_left_waits_and_recovers(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        (listener,) = await kernel.open_tcp_listeners(0, host="127.0.0.1")
        clients = [await open_stream_to_socket_listener(listener) for _ in range(3)]
        lowest = os.dup(0)
        os.close(lowest)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        try:
            async with kernel.open_nursery() as nursery:
                await nursery.start(serve_listeners, echo, [listener])
                await kernel.sleep(5)  # fifty tries
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                for client in clients:
                    await client.send_all(b"hello")
                    assert await client.receive_some() == b"hello"
                    await client.aclose()
                nursery.cancel()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    kernel.run(main, clock=MockClock(autojump_threshold=0.01))
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "Too many open files" in caplog.text


@pytest.mark.parametrize("options", [{}, {"drain": 0.01, "max_connections": 1}])
def test_nothing_leaks_when_a_server_is_cancelled_at_any_place(options: Any) -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            (listener,) = await nursery.start(partial(serve_tcp, echo, 0, host="127.0.0.1", **options))
            async with await open_stream_to_socket_listener(listener) as client:
                await client.send_all(b"hello")
                assert await client.receive_some() == b"hello"
            nursery.cancel()

    explored = explore_cancellation(main, real=True)
    assert explored.cancelled is not None
    assert explored.cancelled > 10


def test_serving_is_a_checkpoint_even_if_cancelled_from_the_start(virtual: Virtual) -> None:
    async def main() -> None:
        for options in ({}, {"drain": 5}):
            door = Door()
            door.knock()
            with kernel.CancelScope() as scope:
                scope.cancel()
                with assert_checkpoints():
                    await serve_listeners(lambda stream: kernel.sleep(1), [door], **options)  # type: ignore[arg-type]
            assert scope.cancelled_caught
            assert door.closed
            assert door.waiting == 1

    virtual(main)
