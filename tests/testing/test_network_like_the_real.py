"""The same programs on the simulated network and on the real loopback: what they see must be the same.

Each test is a program that returns what it has seen: results, and the names of errors. Port numbers are left out.
"""

from __future__ import annotations

import errno
import importlib.util
import inspect
import socket as stdlib
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kernel
from kernel import socket
from kernel.testing import MockClock, wait_all_tasks_blocked
from kernel.testing.network import Network

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the model is of Linux")

HERE = ("127.0.0.1", 0)
RESET = struct.pack("ii", 1, 0)  # linger for no time


def alike(*arguments: tuple[Any, ...]) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Make a test of a program: run it here and there, with each of `arguments`, and compare what it returns."""

    def decorate(program: Callable[..., Any]) -> Callable[..., None]:
        @pytest.mark.parametrize("args", arguments or [()])
        def test(args: tuple[Any, ...]) -> None:
            async def simulated() -> Any:
                with Network(latency=0):
                    return await program(*args)

            async def real() -> Any:
                with kernel.fail_after(20):
                    return await program(*args)

            outcome = kernel.run(simulated, clock=MockClock(autojump_threshold=0))
            assert outcome, "a program that has seen nothing proves nothing"
            for _ in range(3):  # the port that the real system gives out may be blocked by a connection that has ended
                expected = kernel.run(real)
                if outcome == expected:
                    break
            assert outcome == expected

        test.__doc__ = program.__doc__
        return test

    return decorate


async def seen(function: Callable[..., Any], *args: Any) -> Any:
    """What comes of a call, or of awaiting it: the result, or the name of the error. It must not take long."""
    with kernel.move_on_after(0.02):
        try:
            result = function(*args)
            if inspect.isawaitable(result):
                result = await result
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        except (kernel.ClosedResourceError, kernel.BrokenResourceError, kernel.BusyResourceError) as error:
            return type(error).__name__
        except (ValueError, OverflowError, TypeError) as error:
            return type(error).__name__
        return result
    return "waits"


async def settled() -> None:
    """What was sent has arrived."""
    await wait_all_tasks_blocked(0.002)


async def listening(family: int = stdlib.AF_INET, host: str = "127.0.0.1", backlog: int = 5) -> socket.SocketType:
    sock = socket.socket(family)
    await sock.bind((host, 0))
    sock.listen(backlog)
    return sock


async def pair(family: int = stdlib.AF_INET, host: str = "127.0.0.1") -> tuple[socket.SocketType, socket.SocketType]:
    with await listening(family, host) as listener:
        client = socket.socket(family)
        await client.connect(listener.getsockname())
        server, _ = await listener.accept()
    return client, server


async def nobodys_address(kind: int = stdlib.SOCK_STREAM) -> Any:
    with socket.socket(type=kind) as gone:
        await gone.bind(HERE)
        return gone.getsockname()


async def ends(sock: socket.SocketType) -> list[Any]:
    """What one sees of a connection that is over, or about to be."""
    return [
        await seen(sock.recv, 3), await seen(sock.recv, 100), await seen(sock.recv, 100), await seen(sock.recv, 100),
        await seen(sock.send, b"x"), await settled(), await seen(sock.send, b"x"), await seen(sock.recv, 100),
    ]  # fmt: skip


# ---- the life of a connection ----------------------------------------------------------------------------


@alike((stdlib.AF_INET, "127.0.0.1"), (stdlib.AF_INET6, "::1"))
async def test_addresses_have_the_same_form_and_fit_together(family: int, host: str) -> Any:
    log: list[Any] = []
    with await listening(family, host) as listener, socket.socket(family) as client:
        log += [listener.getsockname()[0], len(listener.getsockname()), await seen(listener.getpeername)]
        log += [client.getsockname(), await seen(client.getpeername)]
        await client.connect(listener.getsockname())
        server, address = await listener.accept()
        with server:
            log += [address == client.getsockname() == server.getpeername()]
            log += [client.getpeername() == server.getsockname() == listener.getsockname()]
            log += [server.family == family, server.type, await seen(client.connect, listener.getsockname()) != "waits"]
    return log


@alike()
async def test_a_dual_socket_shows_ipv4_addresses_as_ipv6_writes_them() -> Any:
    if not stdlib.has_dualstack_ipv6():
        return "no IPv6"
    with socket.socket(stdlib.AF_INET6) as listener, socket.socket() as client:
        listener.setsockopt(stdlib.IPPROTO_IPV6, stdlib.IPV6_V6ONLY, 0)
        await listener.bind(("::", 0))
        listener.listen()
        await client.connect(("127.0.0.1", listener.getsockname()[1]))
        server, address = await listener.accept()
        with server:
            return address[0], address[2:], server.getsockname()[0], client.getpeername()[0], listener.getsockname()[0]


@alike()
async def test_half_close_in_both_orders() -> Any:
    log: list[Any] = []
    client, server = await pair()
    with client, server:
        await client.send(b"question")
        client.shutdown(stdlib.SHUT_WR)
        await settled()
        log += [await seen(client.send, b"more"), await seen(client.shutdown, stdlib.SHUT_WR)]
        log += [await seen(server.recv, 100), await seen(server.recv, 100), await seen(server.send, b"answer")]
        log += [await seen(client.recv, 100), await seen(client.recv, 100)]
        server.shutdown(stdlib.SHUT_WR)
        await settled()
        log += [await seen(client.recv, 100), await seen(server.send, b"x")]
    return log


@alike()
async def test_who_does_not_want_to_receive_any_more_sees_the_end() -> Any:
    client, server = await pair()
    with client, server:
        log = [await seen(client.recv, 1), await seen(client.shutdown, stdlib.SHUT_RD), await seen(client.recv, 1)]
        return [*log, await seen(client.send, b"x"), await seen(server.recv, 9), client.did_shutdown_SHUT_WR]


@alike(("close",), ("close with unread bytes",), ("linger",), ("data, then linger",), ("data, then close",))
async def test_what_the_other_end_sees_of_a_close(how: str) -> Any:
    client, server = await pair()
    with client, server:
        if how == "close with unread bytes":
            await client.send(b"unread")
            await settled()
        if "linger" in how:
            server.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, RESET)
        if "data" in how:
            await server.send(b"farewell")
        server.close()
        await settled()
        return await ends(client)


@alike(("send",), ("shutdown",), ("getpeername",))
async def test_what_is_left_of_a_connection_after_a_reset(what: str) -> Any:
    client, server = await pair()
    with client, server:
        server.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, RESET)
        server.close()
        await settled()
        first = {
            "send": (client.send, b"x"),
            "shutdown": (client.shutdown, stdlib.SHUT_WR),
            "getpeername": (client.getpeername,),
        }
        log = [await seen(*first[what])]  # type: ignore[arg-type]
        return [*log, await seen(client.recv, 1), await seen(client.recv, 1), await seen(client.send, b"x")]


@alike()
async def test_who_waits_is_woken_by_data_by_the_end_and_by_a_reset() -> Any:
    log: list[Any] = []
    client, server = await pair()
    with client, server:
        async with kernel.open_nursery() as nursery:

            async def receive() -> None:
                for _ in range(2):
                    try:
                        log.append(await client.recv(100))
                    except OSError as error:
                        log.append(type(error).__name__)

            nursery.start_soon(receive)
            await settled()
            await server.send(b"x")
            await settled()
            server.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, RESET)
            server.close()
    return log


@alike((True,), (False,))
async def test_a_listener_that_closes_resets_who_was_not_accepted(says_something: bool) -> Any:
    listener = await listening()
    with socket.socket() as client:
        await client.connect(listener.getsockname())
        if says_something:
            await client.send(b"x")
        await settled()
        listener.close()
        await settled()
        return [await seen(client.recv, 1), await seen(client.recv, 1), await seen(client.send, b"x")]


@alike()
async def test_connections_are_accepted_in_the_order_in_which_they_came_with_what_they_have_sent() -> Any:
    log: list[Any] = []
    with await listening() as listener:
        clients = [socket.socket() for _ in range(4)]
        for number, client in enumerate(clients):
            await client.connect(listener.getsockname())
            await client.send(b"%d" % number)
        clients[2].close()
        for _ in clients:
            server, _ = await listener.accept()
            with server:
                log += [await seen(server.recv, 10), await seen(server.recv, 10)]
        for client in clients:
            client.close()
        log.append(await seen(listener.accept))
    return log


@alike((0,), (3,), (-1,))
async def test_as_many_connections_queue_as_the_backlog_says(backlog: int) -> Any:
    connected = 0
    with await listening(backlog=backlog) as listener:
        clients = [socket.socket() for _ in range(6)]
        for client in clients:
            connected += await seen(client.connect, listener.getsockname()) is None
        for client in clients:
            client.close()
    return connected, "of 6"


# ---- connecting -------------------------------------------------------------------------------------------


@alike()
async def test_connecting_where_nobody_listens() -> Any:
    address = await nobodys_address()
    with socket.socket() as sock, socket.socket() as bound:
        log = [await seen(sock.connect, address), await seen(sock.getpeername)]
        await bound.bind(HERE)  # bound, and does not listen
        with socket.socket() as other:
            log.append(await seen(other.connect, bound.getsockname()))
    return log


@alike()
async def test_a_host_written_as_any_address_is_this_one() -> Any:
    with await listening() as listener, socket.socket() as client:
        await client.connect(("0.0.0.0", listener.getsockname()[1]))
        return client.getpeername() == listener.getsockname()


@alike()
async def test_a_client_may_be_bound_to_an_address_first() -> Any:
    with await listening() as listener, socket.socket() as client:
        await client.bind(HERE)
        port = client.getsockname()[1]
        await client.connect(listener.getsockname())
        server, address = await listener.accept()
        server.close()
        return address == ("127.0.0.1", port)


@alike()
async def test_a_cancelled_connect_leaves_no_trace_and_a_closed_socket() -> Any:
    with await listening(backlog=0) as listener, socket.socket() as first, socket.socket() as second:
        await first.connect(listener.getsockname())
        log = [await seen(second.connect, listener.getsockname()), second.fileno()]
        (await listener.accept())[0].close()
    return log


# ---- misuse -----------------------------------------------------------------------------------------------


@alike()
async def test_a_socket_that_is_not_connected_refuses() -> Any:
    with socket.socket() as sock:
        return [
            await seen(sock.recv, 1), await seen(sock.recv, 0), await seen(sock.recvfrom, 1),
            await seen(sock.send, b"x"), await seen(sock.accept), await seen(sock.getpeername),
            await seen(sock.recv, -1), await seen(sock.recv_into, bytearray(3)), await seen(sock.sendall, b"x"),
            await seen(sock.sendmsg, [b"x"]), await seen(sock.shutdown, stdlib.SHUT_RDWR),
        ]  # fmt: skip


@alike()
async def test_a_listener_does_nothing_but_listen() -> Any:
    with await listening() as sock:
        return [
            await seen(sock.listen), await seen(sock.recv, 1), await seen(sock.send, b"x"),
            await seen(sock.getpeername), await seen(sock.connect, sock.getsockname()), await seen(sock.bind, HERE),
            await seen(sock.accept), sock.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_ACCEPTCONN),
        ]  # fmt: skip


@alike()
async def test_a_connection_cannot_be_made_anything_else() -> Any:
    client, server = await pair()
    with client, server:
        return [
            await seen(server.connect, client.getsockname()), await seen(client.listen), await seen(client.accept),
            await seen(client.bind, HERE), server.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_ACCEPTCONN),
            await seen(client.recvfrom, 0), await seen(client.sendto, b"x", server.getsockname()),
            await seen(server.recvfrom, 5), await seen(client.sendmsg, [b"a", b"b"]), await seen(server.recvmsg, 5),
        ]  # fmt: skip


@alike()
async def test_a_closed_socket_refuses_everything() -> Any:
    sock = socket.socket()
    sock.close()
    sock.close()
    return [
        sock.fileno(), await seen(sock.recv, 1), await seen(sock.send, b"x"), await seen(sock.listen),
        await seen(sock.accept), await seen(sock.getsockname), await seen(sock.getpeername),
        await seen(sock.shutdown, stdlib.SHUT_WR), await seen(sock.bind, HERE),
        await seen(sock.connect, ("127.0.0.1", 1)), await seen(sock.getsockopt, stdlib.SOL_SOCKET, stdlib.SO_ERROR),
        await seen(sock.setsockopt, stdlib.SOL_SOCKET, stdlib.SO_REUSEADDR, 1),
    ]  # fmt: skip


@alike()
async def test_addresses_that_cannot_be_had() -> Any:
    with socket.socket() as sock:
        log = [await seen(sock.bind, ("192.0.2.1", 80)), await seen(sock.bind, ("127.0.0.1", 70_000))]
        log += [
            await seen(sock.connect, ("127.0.0.1", 70_000)),
            await seen(sock.bind, HERE),
            await seen(sock.bind, HERE),
        ]
    return log


# ---- who may have which port ------------------------------------------------------------------------------

NONE, ADDR, PORT = None, stdlib.SO_REUSEADDR, getattr(stdlib, "SO_REUSEPORT", None)


@alike(
    *(
        (kind, one, two, first, second)
        for kind in (stdlib.SOCK_STREAM, stdlib.SOCK_DGRAM)
        for one in ("127.0.0.1", "0.0.0.0")
        for two in ("127.0.0.1", "0.0.0.0")
        for first, second in ((NONE, NONE), (ADDR, ADDR), (ADDR, NONE), (PORT, PORT), (PORT, NONE), (NONE, PORT))
    )
)  # fmt: skip
async def test_two_sockets_on_one_port(kind: int, one: str, two: str, first: Any, second: Any) -> Any:
    log: list[Any] = []
    for listen_before in (False, True) if kind == stdlib.SOCK_STREAM else (False,):
        with socket.socket(type=kind) as here, socket.socket(type=kind) as there:
            for sock, option in ((here, first), (there, second)):
                if option is not None:
                    sock.setsockopt(stdlib.SOL_SOCKET, option, 1)
            await here.bind((one, 0))
            if listen_before:
                here.listen()
            log.append(await seen(there.bind, (two, here.getsockname()[1])))
            if kind == stdlib.SOCK_STREAM and log[-1] is None:
                log += [await seen(here.listen), await seen(there.listen)]
    return log


@alike((0,), (1,))
async def test_one_port_for_both_families(v6only: int) -> Any:
    if not stdlib.has_dualstack_ipv6():
        return "no IPv6"
    log: list[Any] = []
    for host in ("0.0.0.0", "127.0.0.1"):
        with socket.socket(stdlib.AF_INET6) as six, socket.socket() as four:
            six.setsockopt(stdlib.IPPROTO_IPV6, stdlib.IPV6_V6ONLY, v6only)
            await six.bind(("::", 0))
            log.append(await seen(four.bind, (host, six.getsockname()[1])))
        with socket.socket(stdlib.AF_INET6) as six, socket.socket() as four:
            six.setsockopt(stdlib.IPPROTO_IPV6, stdlib.IPV6_V6ONLY, v6only)
            await four.bind((host, 0))
            log.append(await seen(six.bind, ("::", four.getsockname()[1])))
    return log


@alike()
async def test_who_is_bound_more_exactly_gets_it() -> Any:
    with socket.socket() as anywhere, socket.socket() as here, socket.socket() as client:
        for sock, host in ((anywhere, "0.0.0.0"), (here, "127.0.0.1")):
            sock.setsockopt(stdlib.SOL_SOCKET, PORT, 1)
            await sock.bind((host, anywhere.getsockname()[1]))
            sock.listen()
        await client.connect(here.getsockname())
        await settled()
        log = [anywhere.is_readable(), here.is_readable()]
        (await here.accept())[0].close()
        return log


# ---- datagrams --------------------------------------------------------------------------------------------


async def datagrams(address: Any = HERE) -> socket.SocketType:
    sock = socket.socket(type=stdlib.SOCK_DGRAM)
    if address is not None:
        await sock.bind(address)
    return sock


@alike()
async def test_datagrams_keep_their_borders_and_say_where_they_come_from() -> Any:
    with await datagrams() as here, await datagrams(None) as there:
        address = here.getsockname()
        log: list[Any] = [there.getsockname(), await seen(there.recv, 1)]
        for data in (b"one", b"", b"three", b"four"):
            log.append(await seen(there.sendto, data, address))
        log += [there.getsockname()[0], (await here.recvfrom(100))[1] == ("127.0.0.1", there.getsockname()[1])]
        log += [await seen(here.recv, 100), await seen(here.recv, 2), await seen(here.recv, 100, stdlib.MSG_PEEK)]
        log += [await seen(here.recv, 0), await seen(here.recv, 100), await seen(here.recv, 100)]
        log += [await seen(there.send, b"x"), await seen(there.sendto, bytes(70_000), address)]
        return log


@alike()
async def test_a_connected_socket_hears_its_peer_only() -> Any:
    with await datagrams() as here, await datagrams() as peer, await datagrams() as stranger:
        await here.sendto(b"before", here.getsockname())
        await settled()
        await here.connect(peer.getsockname())
        await stranger.sendto(b"from a stranger", here.getsockname())
        await peer.sendto(b"from the peer", here.getsockname())
        await here.send(b"to the peer")
        await here.sendto(b"to a stranger", stranger.getsockname())
        log = [here.getpeername() == peer.getsockname(), await seen(here.recv, 100), await seen(here.recv, 100)]
        log += [await seen(here.recv, 100), await seen(peer.recv, 100), await seen(stranger.recv, 100)]
        await here.connect(stranger.getsockname())
        log += [here.getpeername() == stranger.getsockname()]
        return log


@alike()
async def test_of_two_on_one_port_the_connected_one_hears_its_peer() -> Any:
    with await datagrams() as peer, await datagrams(None) as one, await datagrams(None) as two:
        for sock in (one, two):
            sock.setsockopt(stdlib.SOL_SOCKET, PORT, 1)
            await sock.bind(("127.0.0.1", one.getsockname()[1]))
        await two.connect(peer.getsockname())
        await peer.sendto(b"x", one.getsockname())
        await settled()
        return one.is_readable(), two.is_readable()


@alike()
async def test_connecting_settles_the_address_at_this_end() -> Any:
    with await datagrams() as peer, await datagrams(("0.0.0.0", 0)) as sock:
        port = sock.getsockname()[1]
        await sock.connect(peer.getsockname())
        return sock.getsockname() == ("127.0.0.1", port)


@alike()
async def test_datagram_sockets_are_no_streams() -> Any:
    with await datagrams() as sock:
        log = [await seen(sock.listen), await seen(sock.accept), await seen(sock.getpeername)]
        return [*log, await seen(sock.shutdown, stdlib.SHUT_WR)]


# ---- streams, and programs --------------------------------------------------------------------------------


@alike()
async def test_streams_raise_the_same() -> Any:
    log: list[Any] = []
    client, server = (kernel.SocketStream(sock) for sock in await pair())
    async with client, server:
        log += [await seen(client.send_all, b"x"), await seen(server.receive_some), await seen(client.send_eof)]
        log += [await seen(client.send_all, b"x"), await seen(server.receive_some), await seen(client.send_eof)]
        await client.aclose()
        log += [await seen(client.receive_some), await seen(client.send_all, b"x"), await seen(client.aclose)]
        log += [await seen(server.send_all, b"x")]
        await settled()
        log += [await seen(server.send_all, b"x"), await seen(server.receive_some)]
    return log


@alike()
async def test_a_sender_stops_until_somebody_reads_and_all_arrives() -> Any:
    content = bytes(range(256)) * 20_000
    client, server = (kernel.SocketStream(sock) for sock in await pair())
    async with client, server:
        async with kernel.open_nursery() as nursery:

            async def send() -> None:
                await client.send_all(content)
                await client.send_eof()

            nursery.start_soon(send)
            await settled()
            waits = len(nursery.child_tasks)
            received = b"".join([chunk async for chunk in server])
        return waits, received == content


def example(name: str) -> Any:
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@alike()
async def test_a_datagram_that_nobody_takes_is_told_to_a_connected_sender_only() -> Any:
    address = await nobodys_address(stdlib.SOCK_DGRAM)
    with await datagrams(None) as sock:
        log = [await seen(sock.sendto, b"x", address), await settled(), await seen(sock.sendto, b"x", address)]
        await sock.connect(address)
        log += [await seen(sock.send, b"x"), await settled(), await seen(sock.send, b"x"), await seen(sock.send, b"x")]
        log += [await settled(), await seen(sock.recv, 1), await seen(sock.recv, 1)]
    return log


@alike()
async def test_an_http_server_answers() -> Any:
    pytest.importorskip("h11")
    http_server = example("http_server")

    async def ask(port: int, request: bytes) -> bytes:
        async with await kernel.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(request)
            answer = b"".join([chunk async for chunk in stream])
        return b"\r\n".join(line for line in answer.split(b"\r\n") if not line.startswith(b"Date"))

    log: list[Any] = []
    async with kernel.open_nursery() as nursery:
        (listener,) = await nursery.start(http_server.serve, 0)
        port = listener.socket.getsockname()[1]
        for method, path, body in ((b"GET", b"/", b""), (b"POST", b"/upper", b"shout"), (b"GET", b"/nowhere", b"")):
            head = b"%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            log.append(await ask(port, head % (method, path, len(body)) + body))
        log.append(await ask(port, b"what is this?\r\n\r\n"))
        nursery.cancel_scope.cancel()
    return log


@alike()
async def test_tls_runs_over_it() -> Any:
    trustme = pytest.importorskip("trustme")
    import ssl

    authority = trustme.CA()
    for_the_server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(for_the_server)
    for_the_client = ssl.create_default_context()
    authority.configure_trust(for_the_client)
    log: list[Any] = []

    async def serve(stream: Any) -> None:
        async for chunk in stream:
            await stream.send_all(chunk.upper())

    async with kernel.open_nursery() as nursery:
        listeners = await nursery.start(kernel.serve_ssl_over_tcp, serve, 0, for_the_server)
        port = listeners[0].transport_listener.socket.getsockname()[1]
        stream = await kernel.open_ssl_over_tcp_stream("localhost", port, ssl_context=for_the_client)
        async with stream:
            await stream.send_all(b"hello")
            log += [await stream.receive_some(), stream.version(), stream.getpeercert()["subjectAltName"]]
        nursery.cancel_scope.cancel()
    return log
