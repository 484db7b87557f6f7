"""Connecting to a name, listening on a port, and `serve_tcp`.

What happy eyeballs do is tested in virtual time, with a resolver and sockets that do as a table says; the rest over the
loopback interface.
"""

from __future__ import annotations

import errno
import gc
import os
import socket as stdlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from math import inf, nan
from typing import Any

import pytest

import kernel
from kernel import SocketStream, TooSlowError, open_tcp_listeners, open_tcp_stream, serve_tcp
from kernel.abc import HostnameResolver, SocketFactory
from kernel.net import tcp
from kernel.socket import AF_INET, AF_INET6, SocketType, set_custom_hostname_resolver, set_custom_socket_factory
from kernel.testing import MockClock, assert_checkpoints, explore_cancellation, wait_all_tasks_blocked
from kernel.testing.network_tools import open_stream_to_socket_listener


def port_of(listener: kernel.SocketListener) -> int:
    return listener.socket.getsockname()[1]  # type: ignore[no-any-return]


def error_of(number: int) -> OSError:
    return OSError(number, os.strerror(number))


# ---- a network that does as it is told -----------------------------------------------------------------------


class Names(HostnameResolver):
    """Every name has the given addresses, in their order."""

    def __init__(self, addresses: Iterable[str]) -> None:
        self.addresses = list(addresses)

    async def getaddrinfo(self, host: Any, port: Any, family: int = 0, type: int = 0, *rest: int) -> Any:
        return [
            (AF_INET6, type, stdlib.IPPROTO_TCP, "", (address, port, 0, 0))
            if ":" in address
            else (AF_INET, type, stdlib.IPPROTO_TCP, "", (address, port))
            for address in self.addresses
        ]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


class Network(SocketFactory):
    """What becomes of connecting to an address: after how many seconds, and with which error (0: it works).

    `log` has who was tried when, `open` the sockets that are not closed.
    """

    def __init__(self, fate: dict[str, tuple[float, int]], absent: Iterable[int] = ()) -> None:
        self.fate = fate
        self.absent = set(absent)
        self.log: list[tuple[float, str]] = []
        self.open: list[Wire] = []

    def socket(self, family: int, type: int, proto: int) -> SocketType:
        if family in self.absent:
            raise error_of(errno.EAFNOSUPPORT)
        return Wire(self, family)


class Wire(SocketType):
    def __init__(self, network: Network, family: int) -> None:
        super().__init__(stdlib.socket(family))
        self.network = network
        self.peer: str | None = None
        network.open.append(self)

    def close(self) -> None:
        if self in self.network.open:
            self.network.open.remove(self)
        super().close()

    @kernel.lowlevel.operation
    def connect(self, address: Any) -> Any:
        self.peer = address[0]
        self.network.log.append((kernel.current_time(), address[0]))
        delay, number = self.network.fate[address[0]]
        yield from kernel.sleep(delay)
        if number:
            raise error_of(number)


Dial = Callable[..., tuple[Network, Any]]


@pytest.fixture
def dial(virtual: Callable[..., Any]) -> Dial:
    """`dial({address: (seconds, error number)}, ...)`: connect in virtual time. Who has answered when, or the error."""

    def run(fate: dict[str, tuple[float, int]], *, absent: Iterable[int] = (), **options: Any) -> tuple[Network, Any]:
        network = Network(fate, absent)

        async def main() -> Any:
            set_custom_hostname_resolver(Names(fate))
            set_custom_socket_factory(network)
            async with await open_tcp_stream("example.com", 80, **options) as stream:
                assert [stream.socket] == network.open, "the others are closed before it returns"
                return stream.socket.peer, kernel.current_time()

        try:
            result = virtual(main)
        except OSError as error:
            result = error
        assert network.open == []
        return network, result

    return run


NEVER, WORKS, REFUSED = (inf, 0), (0.1, 0), (0.1, errno.ECONNREFUSED)


def test_the_first_address_that_answers_is_taken_and_no_other_one_is_tried(dial: Dial) -> None:
    network, winner = dial({"::1": WORKS, "1.1.1.1": WORKS})
    assert winner == ("::1", 0.1)
    assert network.log == [(0, "::1")]


def test_the_families_take_turns_and_keep_the_order_of_the_system(dial: Dial) -> None:
    network, winner = dial({"::1": NEVER, "::2": NEVER, "::3": NEVER, "1.1.1.1": NEVER, "2.2.2.2": NEVER, "::4": WORKS})
    assert network.log == [
        (0, "::1"), (0.25, "1.1.1.1"), (0.5, "::2"), (0.75, "2.2.2.2"), (1, "::3"), (1.25, "::4"),
    ]  # fmt: skip
    assert winner == ("::4", 1.35)
    network, _ = dial({"1.1.1.1": NEVER, "2.2.2.2": NEVER, "::1": NEVER, "3.3.3.3": WORKS})
    assert [address for _, address in network.log] == ["1.1.1.1", "::1", "2.2.2.2", "3.3.3.3"]


def test_the_next_address_is_tried_at_once_when_one_has_failed(dial: Dial) -> None:
    network, winner = dial({"::1": REFUSED, "1.1.1.1": (0.2, errno.EHOSTUNREACH), "::2": WORKS})
    assert network.log == [(0, "::1"), (0.1, "1.1.1.1"), (pytest.approx(0.3), "::2")]
    assert winner == ("::2", pytest.approx(0.4))


def test_an_address_that_answers_late_wins_if_the_others_fail(dial: Dial) -> None:
    network, winner = dial({"::1": (0.9, 0), "1.1.1.1": REFUSED, "2.2.2.2": NEVER})
    assert network.log == [(0, "::1"), (0.25, "1.1.1.1"), (0.35, "2.2.2.2")]
    assert winner == ("::1", 0.9)


def test_the_delay_can_be_chosen(dial: Dial) -> None:
    network, winner = dial({"::1": NEVER, "1.1.1.1": (2, 0)}, happy_eyeballs_delay=1)
    assert network.log == [(0, "::1"), (1, "1.1.1.1")]
    assert winner == ("1.1.1.1", 3)
    network, winner = dial({"::1": (0.5, 0), "1.1.1.1": (0.25, 0)}, happy_eyeballs_delay=0)
    assert network.log == [(0, "::1"), (0, "1.1.1.1")]
    assert winner == ("1.1.1.1", 0.25)


def test_without_a_delay_there_is_one_attempt_at_a_time(dial: Dial) -> None:
    network, winner = dial({"::1": (100, errno.ETIMEDOUT), "1.1.1.1": WORKS}, happy_eyeballs_delay=None)
    assert network.log == [(0, "::1"), (100, "1.1.1.1")]
    assert winner == ("1.1.1.1", 100.1)


@pytest.mark.parametrize("seconds", [0.24999, 0.25, 0.25001])
def test_a_connection_that_comes_about_as_the_next_one_is_due_is_taken(dial: Dial, seconds: float) -> None:
    network, (winner, when) = dial({"::1": (seconds, 0), "1.1.1.1": (1, 0)})
    assert (winner, when) == ("::1", seconds)
    assert len(network.log) == 1 or seconds >= 0.25


def test_of_two_that_connect_in_the_same_moment_one_is_closed(dial: Dial) -> None:
    _, (winner, when) = dial({"::1": (0.5, 0), "1.1.1.1": (0.25, 0)})  # `dial` has looked at what is open
    assert (winner in ("::1", "1.1.1.1"), when) == (True, 0.5)


def test_a_system_without_ipv6_goes_on_with_ipv4_at_once(dial: Dial) -> None:
    network, winner = dial({"::1": WORKS, "1.1.1.1": WORKS}, absent=[AF_INET6])
    assert network.log == [(0, "1.1.1.1")]
    assert winner == ("1.1.1.1", 0.1)


def test_if_all_fail_the_error_has_what_each_had_to_say(dial: Dial) -> None:
    _, error = dial({"::1": REFUSED, "1.1.1.1": (0.1, errno.EHOSTUNREACH)})
    assert type(error) is OSError
    assert str(error) == "cannot connect to example.com:80"
    assert [type(one) for one in error.__cause__.exceptions] == [ConnectionRefusedError, OSError]
    assert [one.errno for one in error.__cause__.exceptions] == [errno.ECONNREFUSED, errno.EHOSTUNREACH]


def test_if_all_fail_alike_the_error_is_of_that_class(dial: Dial) -> None:
    _, error = dial({"::1": REFUSED, "1.1.1.1": REFUSED})
    assert type(error) is ConnectionRefusedError
    assert error.errno == errno.ECONNREFUSED
    assert len(error.__cause__.exceptions) == 2


def test_a_resolver_that_finds_nothing_is_an_error(dial: Dial) -> None:
    _, error = dial({})
    assert str(error) == "cannot connect to example.com:80"


def test_an_address_that_is_named_twice_is_tried_once(virtual: Callable[..., Any]) -> None:
    network = Network({"1.1.1.1": REFUSED})

    async def main() -> None:
        set_custom_hostname_resolver(Names(["1.1.1.1", "1.1.1.1"]))
        set_custom_socket_factory(network)
        with pytest.raises(ConnectionRefusedError):
            await open_tcp_stream("example.com", 80)

    virtual(main)
    assert network.log == [(0, "1.1.1.1")]


def test_any_other_error_of_an_attempt_closes_the_others_and_arrives_as_it_is(virtual: Callable[..., Any]) -> None:
    class Broken(Network):
        def socket(self, family: int, type: int, proto: int) -> SocketType:
            if self.open:
                raise LookupError("a bug in the factory")
            return super().socket(family, type, proto)

    network = Broken({"::1": NEVER, "1.1.1.1": NEVER})

    async def main() -> None:
        set_custom_hostname_resolver(Names(network.fate))
        set_custom_socket_factory(network)
        with pytest.raises(LookupError, match="a bug in the factory"):
            await open_tcp_stream("example.com", 80)

    virtual(main)
    assert network.open == []


def test_a_cancellation_in_the_moment_of_success_leaves_no_connection(virtual: Callable[..., Any]) -> None:
    network = Network({"::1": (1, 0), "1.1.1.1": NEVER})

    async def main() -> None:
        set_custom_hostname_resolver(Names(network.fate))
        set_custom_socket_factory(network)
        stream = None
        with kernel.move_on_after(1) as scope:
            stream = await open_tcp_stream("example.com", 80)
        assert scope.cancelled_caught == (stream is None)
        if stream is not None:
            await stream.aclose()

    virtual(main)
    assert network.open == []


def test_a_lookup_that_hangs_can_be_given_up(virtual: Callable[..., Any]) -> None:
    class Silent(Names):
        async def getaddrinfo(self, *args: Any) -> Any:
            await kernel.sleep_forever()

    async def main() -> None:
        set_custom_hostname_resolver(Silent([]))
        with pytest.raises(TooSlowError), kernel.fail_after(5):
            await open_tcp_stream("example.com", 80)
        with pytest.raises(TooSlowError), kernel.fail_after(5):
            await open_tcp_listeners(80, host="example.com")

    virtual(main)


def test_a_name_that_is_not_known_is_the_error_of_the_resolver(virtual: Callable[..., Any]) -> None:
    class Ignorant(Names):
        async def getaddrinfo(self, *args: Any) -> Any:
            raise stdlib.gaierror(stdlib.EAI_NONAME, "never heard of it")

    async def main() -> None:
        set_custom_hostname_resolver(Ignorant([]))
        with pytest.raises(stdlib.gaierror, match="never heard of it"):
            await open_tcp_stream("example.com", 80)
        with pytest.raises(stdlib.gaierror, match="never heard of it"):
            await open_tcp_listeners(80, host="example.com")

    virtual(main)


# ---- connecting over the loopback --------------------------------------------------------------------------


async def echo(stream: SocketStream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", b"localhost"])
def test_connecting_by_address_and_by_name(host: str | bytes) -> None:
    async def main() -> None:
        (listener,) = await open_tcp_listeners(0, host="127.0.0.1")
        async with listener, await open_tcp_stream(host, port_of(listener)) as client:
            async with await listener.accept() as stream:
                await client.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
                assert client.socket.getpeername() == listener.socket.getsockname()

    kernel.run(main)


def test_connecting_where_nobody_listens_is_refused_and_no_garbage_is_left() -> None:
    async def main() -> None:
        with stdlib.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            for _ in range(2):
                gc.collect()
                with suppress(ConnectionRefusedError):
                    await open_tcp_stream(*nobody.getsockname())
                    pytest.fail("somebody listens there")
                await kernel.sleep(0)
            assert gc.collect() == 0, "an error is freed when nobody refers to it"

    gc.disable()
    try:
        kernel.run(main)
    finally:
        gc.enable()


def test_an_ipv6_address_is_told_in_brackets(virtual: Callable[..., Any]) -> None:
    network = Network({"::1": REFUSED})

    async def main() -> None:
        set_custom_socket_factory(network)
        with pytest.raises(ConnectionRefusedError, match=r"cannot connect to \[::1\]:80"):
            await open_tcp_stream("::1", 80)

    virtual(main)


def test_the_address_to_connect_from_can_be_chosen() -> None:
    async def main() -> None:
        (listener,) = await open_tcp_listeners(0, host="127.0.0.1")
        async with (
            listener,
            await open_tcp_stream("127.0.0.1", port_of(listener), local_address="127.0.0.1") as client,
            await listener.accept(),
        ):
            assert client.socket.getsockname()[0] == "127.0.0.1"
            with pytest.raises(OSError, match="cannot connect") as caught:
                await open_tcp_stream("127.0.0.1", port_of(listener), local_address="::1")
            assert isinstance(caught.value.__cause__, ExceptionGroup)
            (reason,) = caught.value.__cause__.exceptions
            assert "local_address='::1'" in str(reason)

    kernel.run(main)


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((None, 80), {}, ValueError),
        ((b"h".decode, 80), {}, ValueError),
        (("localhost", "80"), {}, TypeError),
        (("localhost", None), {}, TypeError),
        (("localhost", -1), {}, ValueError),
        (("localhost", 65536 + 80), {}, ValueError),
        (("localhost", 80), {"happy_eyeballs_delay": -1}, ValueError),
        (("localhost", 80), {"happy_eyeballs_delay": nan}, ValueError),
        (("a\0b", 80), {}, ValueError),
    ],
)
def test_open_tcp_stream_refuses_what_makes_no_sense(arguments: Any, options: Any, error: type[Exception]) -> None:
    async def main() -> None:
        with pytest.raises(error):
            await open_tcp_stream(*arguments, **options)

    kernel.run(main)


def test_a_cancelled_open_tcp_stream_did_nothing() -> None:
    async def main() -> None:
        (listener,) = await open_tcp_listeners(0, host="127.0.0.1")
        async with listener:
            with kernel.CancelScope() as scope:
                scope.cancel()
                await open_tcp_stream("127.0.0.1", port_of(listener))
            assert scope.cancelled_caught
            assert not listener.socket.is_readable()
            with assert_checkpoints():
                client = await open_tcp_stream("127.0.0.1", port_of(listener))
            async with client, await listener.accept():
                pass

    kernel.run(main)


def test_nothing_leaks_when_connecting_is_cancelled_at_any_place() -> None:
    async def main() -> None:
        set_custom_hostname_resolver(Names(["::1", "127.0.0.1"]))
        (listener,) = await open_tcp_listeners(0, host="127.0.0.1")
        async with listener, await open_tcp_stream("example.com", port_of(listener), local_address="127.0.0.1"):
            pass

    explored = explore_cancellation(main, real=True)
    assert explored.cancelled is not None
    assert explored.cancelled > 5


# ---- listening ---------------------------------------------------------------------------------------------


def test_without_a_host_both_families_are_served_on_one_port() -> None:
    async def main() -> None:
        listeners = await open_tcp_listeners(0)
        assert {listener.socket.family for listener in listeners} == {AF_INET, AF_INET6}
        assert len({port_of(listener) for listener in listeners}) == 1
        for listener in listeners:
            async with listener, await open_stream_to_socket_listener(listener) as client:
                async with await listener.accept() as stream:
                    assert client.socket.getpeername()[:2] == stream.socket.getsockname()[:2]
                    assert stream.socket.family == listener.socket.family

    kernel.run(main)


def test_a_port_that_is_free_on_one_family_only_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(SocketFactory):
        """The first two ports that are free on IPv4 are in use on IPv6."""

        ports: list[tuple[int, int]]

        def __init__(self) -> None:
            self.ports = []

        def socket(self, family: int, type: int, proto: int) -> SocketType:
            return Bound(self, stdlib.socket(family, type, proto))

    class Bound(SocketType):
        def __init__(self, factory: Picky, sock: stdlib.socket) -> None:
            super().__init__(sock)
            self.factory = factory

        @kernel.lowlevel.operation
        def bind(self, address: Any) -> Any:
            self.factory.ports.append((self.family, address[1]))
            if self.family == AF_INET6 and len(self.factory.ports) <= self.refusals * 2:
                raise error_of(errno.EADDRINUSE)
            yield from super().bind(address)

        refusals = 2

    async def main() -> None:
        factory = Picky()
        set_custom_socket_factory(factory)
        listeners = await open_tcp_listeners(0)
        (port,) = {port_of(listener) for listener in listeners}
        for listener in listeners:
            await listener.aclose()
        assert [(family, port == 0) for family, port in factory.ports] == [(AF_INET, True), (AF_INET6, False)] * 3
        monkeypatch.setattr(Bound, "refusals", inf)
        factory.ports.clear()
        with pytest.raises(OSError) as caught:
            await open_tcp_listeners(0)
        assert caught.value.errno == errno.EADDRINUSE
        assert len(factory.ports) == 2 * tcp.PORT_TRIES
        factory.ports.clear()
        with pytest.raises(OSError, match="in use"):
            await open_tcp_listeners(port)
        assert len(factory.ports) == 2, "a port that was asked for is tried once"

    kernel.run(main)


def test_a_port_in_use_is_an_error_unless_both_say_reuse_port() -> None:
    async def main() -> None:
        (one,) = await open_tcp_listeners(0, host="127.0.0.1", reuse_port=True)
        async with one:
            with pytest.raises(OSError) as caught:
                await open_tcp_listeners(port_of(one), host="127.0.0.1")
            assert caught.value.errno == errno.EADDRINUSE
            (two,) = await open_tcp_listeners(port_of(one), host="127.0.0.1", reuse_port=True)
            async with two:
                assert port_of(one) == port_of(two)

    kernel.run(main)


def test_a_port_can_be_listened_on_again_while_old_connections_linger() -> None:
    async def main() -> None:
        (listener,) = await open_tcp_listeners(0, host="127.0.0.1")
        port = port_of(listener)
        async with listener, await open_stream_to_socket_listener(listener) as client:
            await (await listener.accept()).aclose()  # who closes first keeps the port in TIME_WAIT
            assert await client.receive_some() == b""
        (again,) = await open_tcp_listeners(port, host="127.0.0.1")
        await again.aclose()

    kernel.run(main)


class Recorder(SocketFactory):
    """Real sockets that tell what was done with them; some families or addresses are not there."""

    def __init__(self, no_family: int = -1, no_address: str = "-") -> None:
        self.no_family, self.no_address = no_family, no_address
        self.backlogs: list[int] = []
        self.made: list[SocketType] = []

    def socket(self, family: int, type: int, proto: int) -> SocketType:
        if family == self.no_family:
            raise error_of(errno.EAFNOSUPPORT)
        self.made.append(Recorded(self, stdlib.socket(family, type, proto)))
        return self.made[-1]


class Recorded(SocketType):
    def __init__(self, recorder: Recorder, sock: stdlib.socket) -> None:
        super().__init__(sock)
        self.recorder = recorder

    @kernel.lowlevel.operation
    def bind(self, address: Any) -> Any:
        if address[0] == self.recorder.no_address:
            raise error_of(errno.EADDRNOTAVAIL)
        yield from super().bind(address)

    def listen(self, backlog: int = 0) -> None:
        self.recorder.backlogs.append(backlog)
        super().listen(backlog)


@pytest.mark.parametrize("recorder", [partial(Recorder, no_family=AF_INET6), partial(Recorder, no_address="::")])
def test_a_machine_without_ipv6_listens_on_ipv4(recorder: Callable[[], Recorder]) -> None:
    async def main() -> None:
        factory = recorder()
        set_custom_socket_factory(factory)
        (listener,) = await open_tcp_listeners(0)
        async with listener:
            assert listener.socket.family == AF_INET
            assert [sock for sock in factory.made if sock.fileno() != -1] == [listener.socket]

    kernel.run(main)


def test_a_machine_without_ipv4_listens_on_ipv6() -> None:
    async def main() -> None:
        set_custom_socket_factory(Recorder(no_family=AF_INET))
        (listener,) = await open_tcp_listeners(0)
        async with listener:
            assert listener.socket.family == AF_INET6
            assert listener.socket.getsockopt(stdlib.IPPROTO_IPV6, stdlib.IPV6_V6ONLY)

    kernel.run(main)


def test_if_nothing_is_left_to_listen_on_that_is_an_error() -> None:
    async def main() -> None:
        set_custom_socket_factory(Recorder(no_family=AF_INET6))
        with pytest.raises(OSError, match="none of the addresses") as caught:
            await open_tcp_listeners(0, host="::1")
        assert caught.value.errno == errno.EAFNOSUPPORT
        assert isinstance(caught.value.__cause__, ExceptionGroup)

    kernel.run(main)


def test_an_ipv4_address_that_is_not_ours_is_an_error_and_nothing_stays_open() -> None:
    async def main() -> None:
        factory = Recorder(no_address="127.0.0.2")
        set_custom_socket_factory(factory)
        set_custom_hostname_resolver(Names(["127.0.0.1", "127.0.0.2"]))
        with pytest.raises(OSError) as caught:
            await open_tcp_listeners(0, host="example.com")
        assert caught.value.errno == errno.EADDRNOTAVAIL
        assert [sock.fileno() for sock in factory.made] == [-1, -1]

    kernel.run(main)


def test_the_backlog_is_as_large_as_the_system_allows_or_as_asked_for() -> None:
    async def main() -> list[int]:
        factory = Recorder()
        set_custom_socket_factory(factory)
        for backlog in (None, 10, 1_000_000):
            for listener in await open_tcp_listeners(0, host="127.0.0.1", backlog=backlog):
                await listener.aclose()
        return factory.backlogs

    assert kernel.run(main) == [65535, 10, 65535]


@pytest.mark.parametrize(
    ("port", "options", "error"),
    [
        ("80", {}, TypeError),
        (None, {}, TypeError),
        (-1, {}, ValueError),
        (65536, {}, ValueError),
        (0, {"backlog": "1"}, TypeError),
        (0, {"backlog": -1}, ValueError),
    ],
)
def test_open_tcp_listeners_refuses_what_makes_no_sense(port: Any, options: Any, error: type[Exception]) -> None:
    async def main() -> None:
        with pytest.raises(error):
            await open_tcp_listeners(port, **options)

    kernel.run(main)


def test_reuse_port_is_refused_where_the_system_has_no_such_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(stdlib, "SO_REUSEPORT")

    async def main() -> None:
        with pytest.raises(ValueError, match="SO_REUSEPORT"):
            await open_tcp_listeners(0, reuse_port=True)

    kernel.run(main)


def test_nothing_leaks_when_opening_listeners_is_cancelled_at_any_place() -> None:
    async def main() -> None:
        set_custom_hostname_resolver(Names(["127.0.0.1", "::1"]))
        for listener in await open_tcp_listeners(0, host="example.com"):
            listener.socket.close()

    explored = explore_cancellation(main, real=True)
    assert explored.cancelled is not None
    assert explored.cancelled >= 3


# ---- serve_tcp ---------------------------------------------------------------------------------------------


def test_serve_tcp_serves_until_it_is_cancelled_and_closes_its_listeners() -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            listeners = await nursery.start(partial(serve_tcp, echo, 0, host="127.0.0.1"))
            port = port_of(listeners[0])
            for _ in range(3):
                async with await open_tcp_stream("127.0.0.1", port) as client:
                    await client.send_all(b"hello")
                    assert await client.receive_some() == b"hello"
            nursery.cancel()
        assert [listener.socket.fileno() for listener in listeners] == [-1]
        with pytest.raises(ConnectionRefusedError):
            await open_tcp_stream("127.0.0.1", port)

    kernel.run(main)


def test_serve_tcp_passes_its_arguments_on() -> None:
    async def main() -> None:
        factory = Recorder()
        set_custom_socket_factory(factory)
        async with kernel.open_nursery() as nursery, kernel.open_nursery() as handlers:
            (listener,) = await nursery.start(
                partial(
                    serve_tcp, echo, 0, host="127.0.0.1", backlog=7, reuse_port=True, handler_nursery=handlers,
                    max_connections=1,
                )
            )  # fmt: skip
            assert factory.backlogs == [7]
            assert listener.socket.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_REUSEPORT)
            set_custom_socket_factory(None)
            clients = [await open_stream_to_socket_listener(listener) for _ in range(2)]
            await wait_all_tasks_blocked()
            assert [task.name for task in handlers.child_tasks] == ["_Server._handle"], "one, and the other one waits"
            for client in clients:
                await client.aclose()
            nursery.cancel()
            handlers.cancel()

    kernel.run(main)


def test_serve_tcp_that_cannot_listen_says_so_to_who_starts_it() -> None:
    async def main() -> None:
        (listener,) = await open_tcp_listeners(0, host="127.0.0.1")
        async with listener, kernel.open_nursery() as nursery:
            with pytest.raises(OSError) as caught:
                await nursery.start(partial(serve_tcp, echo, port_of(listener), host="127.0.0.1"))
            assert caught.value.errno == errno.EADDRINUSE

    kernel.run(main)


def test_a_virtual_clock_serves_real_connections() -> None:
    async def main() -> float:
        async with kernel.open_nursery() as nursery:

            async def slowly(stream: SocketStream) -> None:
                await kernel.sleep(60)
                await stream.send_all(b"done")

            (listener,) = await nursery.start(partial(serve_tcp, slowly, 0, host="127.0.0.1"))
            async with await open_stream_to_socket_listener(listener) as client:
                assert await client.receive_some() == b"done"
            nursery.cancel()
        return kernel.current_time()

    assert kernel.run(main, clock=MockClock(autojump_threshold=0.1)) == 60
