"""The network in memory: real programs on simulated sockets, with faults, and the same each time."""

from __future__ import annotations

import errno
import gc
import socket as stdlib
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import kernel
import kernel.socket
from kernel.testing import MockClock, check_half_closeable_stream, explore, wait_all_tasks_blocked
from kernel.testing.network import Host, Network


def simulate(async_fn: Callable[..., Any], *args: Any) -> Any:
    return kernel.run(async_fn, *args, clock=MockClock(autojump_threshold=0))


async def echo(stream: kernel.SocketStream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk)


async def serve_echo(port: int = 7) -> None:
    await kernel.serve_tcp(echo, port, handler_errors="log")


async def ask(host: str, question: bytes, port: int = 7) -> bytes:
    async with await kernel.open_tcp_stream(host, port) as stream:
        await stream.send_all(question)
        await stream.send_eof()
        return b"".join([chunk async for chunk in stream])


async def pair(network: Network) -> tuple[kernel.SocketStream, kernel.SocketStream]:
    """A connection from host "a" to host "b"."""
    a, b = network.host("a"), network.host("b")

    async def listen() -> kernel.SocketListener:
        (listener,) = await kernel.open_tcp_listeners(0, host=b.ipv4)
        return listener

    listener = await b.run(listen)
    client = await a.run(kernel.open_tcp_stream, *listener.socket.getsockname())
    server = await listener.accept()
    await listener.aclose()
    return client, server


def in_network(test: Callable[[Network], Awaitable[None]], **options: Any) -> list[str]:
    async def main() -> list[str]:
        with Network(**options) as network:
            await test(network)
            return network.log

    log: list[str] = simulate(main)
    return log


# ---- ordinary life -------------------------------------------------------------------------------------


def test_a_client_and_a_server_written_for_real_sockets_find_each_other_by_name() -> None:
    async def main(network: Network) -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(network.host("server").run, serve_echo)
            await wait_all_tasks_blocked()
            assert await network.host("client").run(ask, "server", b"hello") == b"hello"
            assert await network.host("server").run(ask, "localhost", b"myself") == b"myself"
            nursery.cancel_scope.cancel()

    in_network(main)


def test_outside_the_block_the_real_network_is_back() -> None:
    async def main() -> None:
        with Network():
            with kernel.socket.socket() as simulated:
                assert simulated.fileno() >= 1 << 30
            with pytest.raises(stdlib.gaierror):
                await kernel.socket.getaddrinfo("nobody", 1)
        with kernel.socket.socket() as real:
            assert real.fileno() < 1 << 20

    simulate(main)


def test_streams_keep_all_their_promises() -> None:
    async def main(network: Network) -> None:
        async def clogged() -> tuple[kernel.SocketStream, kernel.SocketStream]:
            client, server = await pair(network)
            for stream in (client, server):
                with kernel.move_on_after(10):
                    await stream.send_all(bytes(1_000_000))
            return client, server

        await check_half_closeable_stream(lambda: pair(network), clogged)

    in_network(main, latency=0)  # the checks take what is under way for lost


def test_connecting_takes_a_round_trip_and_a_message_half_of_one() -> None:
    async def main(network: Network) -> None:
        began = kernel.current_time()
        client, server = await pair(network)
        assert kernel.current_time() - began == pytest.approx(0.3)  # the server knows when the third packet arrives
        async with client, server:
            began = kernel.current_time()
            await client.send_all(b"x")
            assert kernel.current_time() == began
            assert await server.receive_some() == b"x"
            assert kernel.current_time() - began == pytest.approx(0.1)

    in_network(main, latency=0.1)


def test_loopback_takes_no_time_and_loses_nothing() -> None:
    async def main(network: Network) -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(network.host("a").run, serve_echo)
            await wait_all_tasks_blocked()
            began = kernel.current_time()
            assert await network.host("a").run(ask, "127.0.0.1", bytes(100_000)) == bytes(100_000)
            assert kernel.current_time() == began
            nursery.cancel_scope.cancel()

    in_network(main, latency=1.0, loss=1.0)


def test_bytes_arrive_whole_and_in_order_whatever_is_lost_or_late() -> None:
    content = bytes(range(256)) * 2000

    async def main(network: Network) -> None:
        client, server = await pair(network)
        async with client, server, kernel.open_nursery() as nursery:

            async def send() -> None:
                for start in range(0, len(content), 1000):
                    await client.send_all(content[start : start + 1000])
                await client.send_eof()

            nursery.start_soon(send)
            assert b"".join([chunk async for chunk in server]) == content

    for seed in range(5):
        in_network(main, seed=seed, latency=(0.001, 0.5), loss=0.2)


def test_a_sender_stops_when_nobody_reads() -> None:
    async def main(network: Network) -> None:
        client, server = await pair(network)
        async with client, server:
            with kernel.move_on_after(1000) as scope:
                try:
                    await client.send_all(bytes(1_000_000))
                except kernel.Cancelled as error:
                    sent = error.bytes_sent  # type: ignore[attr-defined]
                    raise
            assert scope.cancelled_caught
            assert sent == 65536
            got = 0
            while got < 65536:
                got += len(await server.receive_some())

    in_network(main)


def test_addresses_are_those_of_the_hosts_in_both_families() -> None:
    async def main(network: Network) -> None:
        a, b = network.host("a"), network.host("b")
        seen: list[Any] = []

        async def note(stream: kernel.SocketStream) -> None:
            seen.append((stream.socket.getsockname(), stream.socket.getpeername()[0]))

        async with kernel.open_nursery() as nursery:
            listeners = await b.run(nursery.start, kernel.serve_tcp, note, 80)
            assert [listener.socket.getsockname()[1] for listener in listeners] == [80, 80]
            for address in (b.ipv4, b.ipv6):
                stream = await a.run(kernel.open_tcp_stream, address, 80)
                await stream.aclose()
            await kernel.sleep(1)
            nursery.cancel_scope.cancel()
        assert seen == [((b.ipv4, 80), a.ipv4), ((b.ipv6, 80, 0, 0), a.ipv6)]
        assert await kernel.socket.getnameinfo((b.ipv4, 80), 0) == ("b", "80")
        numeric = stdlib.NI_NUMERICHOST | stdlib.NI_NUMERICSERV
        assert await kernel.socket.getnameinfo((b.ipv6, 80, 0, 0), numeric) == (b.ipv6, "80")

    in_network(main)


def test_an_address_or_port_that_is_not_to_be_had_is_told() -> None:
    async def main(network: Network) -> None:
        with kernel.socket.socket() as one, kernel.socket.socket() as two, kernel.socket.socket() as three:
            with pytest.raises(OSError) as info:
                await one.bind((network.host("elsewhere").ipv4, 80))
            assert info.value.errno == errno.EADDRNOTAVAIL
            await one.bind(("0.0.0.0", 80))
            with pytest.raises(OSError) as info:
                await two.bind(("127.0.0.1", 80))
            assert info.value.errno == errno.EADDRINUSE
            one.close()
            await two.bind(("127.0.0.1", 80))
            with pytest.raises(OSError) as info:
                await three.connect(("10.9.9.9", 1))
            assert info.value.errno == errno.EHOSTUNREACH
        with pytest.raises(OSError) as info:
            kernel.socket.socket(stdlib.AF_UNIX)
        assert info.value.errno == errno.EAFNOSUPPORT

    in_network(main)


# ---- datagrams ------------------------------------------------------------------------------------------


async def send_hundred(network: Network) -> list[int]:
    async with await kernel.open_udp_socket(("0.0.0.0", 9)) as here:
        async with kernel.open_nursery() as nursery:

            async def send() -> None:
                async with await kernel.open_udp_socket(remote_address=("main", 9)) as there:
                    for number in range(100):
                        await there.send(b"%d" % number)

            nursery.start_soon(network.host("a").run, send)
            got = []
            with kernel.move_on_after(10):
                async for data, (ip, _) in here:
                    assert ip == network.host("a").ipv4
                    got.append(int(data))
        return got


def test_datagrams_are_lost_doubled_and_overtake_each_other_as_told() -> None:
    results: dict[str, list[int]] = {}

    def with_options(name: str, **options: Any) -> list[int]:
        async def main(network: Network) -> None:
            network.host("main")
            results[name] = await send_hundred(network)

        in_network(main, **options)
        return results[name]

    assert with_options("plain") == list(range(100))
    late = with_options("late", latency=(0, 1))
    assert sorted(late) == list(range(100))
    assert late != sorted(late)
    some = with_options("lossy", loss=0.5)
    assert some == sorted(some)
    assert 20 < len(some) < 80
    assert sorted(with_options("twice", duplicates=1.0)) == sorted([*range(100)] * 2)
    assert with_options("nothing", loss=1.0) == []


def test_a_datagram_goes_to_who_is_bound_there_at_the_time_and_to_nobody_else() -> None:
    async def main(network: Network) -> None:
        network.host("main")
        async with await kernel.open_udp_socket() as sender:
            await sender.send_to(b"too early", ("127.0.0.1", 9))
            await kernel.sleep(1)
            async with await kernel.open_udp_socket(("127.0.0.1", 9)) as here:
                await sender.send_to(b"x", ("127.0.0.1", 9))
                assert (await here.receive())[0] == b"x"
                with pytest.raises(OSError) as info:
                    await sender.send_to(bytes(70_000), ("127.0.0.1", 9))
                assert info.value.errno == errno.EMSGSIZE
                with pytest.raises(OSError) as info:
                    await sender.send(b"x")
                assert info.value.errno == errno.EDESTADDRREQ

    in_network(main)


def test_a_dual_socket_hears_both_families() -> None:
    async def main(network: Network) -> None:
        network.host("main")
        async with await kernel.open_udp_socket((None, 9)) as here:
            for address in ("127.0.0.1", "::1"):
                async with await kernel.open_udp_socket(remote_address=(address, 9)) as sender:
                    await sender.send(address.encode())
                    data, source = await here.receive()
                    assert data == address.encode()
                    await here.send_to(b"back", source)
                    assert (await sender.receive())[0] == b"back"

    in_network(main)


# ---- faults -------------------------------------------------------------------------------------------


def test_connecting_where_nobody_listens_is_refused_after_a_round_trip() -> None:
    async def main(network: Network) -> None:
        network.host("server")
        with pytest.raises(ConnectionRefusedError):
            await kernel.open_tcp_stream("server", 80)
        assert kernel.current_time() > 0

    in_network(main)


def test_a_socket_that_was_refused_may_try_again() -> None:
    """Linux answers the second attempt with ECONNABORTED, and the third as ours the second."""

    async def main(network: Network) -> None:
        with kernel.socket.socket() as sock, kernel.socket.socket() as listener:
            await listener.bind(("127.0.0.1", 80))
            for _ in range(2):
                with pytest.raises(ConnectionRefusedError):
                    await sock.connect(("127.0.0.1", 80))
                assert not sock.is_readable()
            listener.listen()
            await sock.connect(("127.0.0.1", 80))
            (await listener.accept())[0].close()
            assert await sock.recv(1) == b""

    in_network(main)


def test_connecting_across_a_partition_times_out_unless_it_is_healed_in_time() -> None:
    async def main(network: Network) -> None:
        server, client = network.host("server"), network.host("client")
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(server.run, serve_echo)
            await wait_all_tasks_blocked()
            network.partition({server}, {client})
            with pytest.raises(TimeoutError):
                await client.run(ask, server.ipv4, b"x")
            assert kernel.current_time() > 100
            nursery.start_soon(client.run, ask, server.ipv4, b"x")
            await kernel.sleep(5)
            network.heal()
            with kernel.fail_after(30):
                assert await client.run(ask, server.ipv4, b"y") == b"y"
            nursery.cancel_scope.cancel()

    in_network(main)


def test_what_was_sent_during_a_partition_arrives_when_it_is_healed() -> None:
    async def main(network: Network) -> None:
        client, server = await pair(network)
        async with client, server:
            network.partition({network.host("a")}, {network.host("b")})
            await client.send_all(b"meanwhile")
            with kernel.move_on_after(30) as scope:
                await server.receive_some()
            assert scope.cancelled_caught
            network.heal()
            assert await server.receive_some() == b"meanwhile"

    in_network(main)


def test_a_partition_that_lasts_breaks_the_connection_of_who_sends() -> None:
    async def main(network: Network) -> None:
        client, server = await pair(network)
        async with client, server:
            network.partition({network.host("a")}, {network.host("b")})
            await client.send_all(b"x")
            with pytest.raises(kernel.BrokenResourceError) as info:
                await client.receive_some()
            assert isinstance(info.value.__cause__, TimeoutError)
            assert 100 < kernel.current_time() < 300
            with pytest.raises(kernel.BrokenResourceError):
                await client.send_all(b"y")

    in_network(main)


def test_a_partition_cuts_only_between_its_groups() -> None:
    async def main(network: Network) -> None:
        one, two, three = (network.host(name) for name in ("one", "two", "three"))
        async with kernel.open_nursery() as nursery:
            for host in (one, two, three):
                nursery.start_soon(host.run, serve_echo)
            await wait_all_tasks_blocked()
            network.partition({one, two}, {three})
            assert await one.run(ask, "two", b"x") == b"x"
            assert await three.run(ask, "three", b"x") == b"x"
            for host, other in ((one, "three"), (three, "two")):
                with kernel.move_on_after(10) as scope:
                    await host.run(ask, other, b"x")
                assert scope.cancelled_caught
            nursery.cancel_scope.cancel()

    in_network(main)


def test_closing_with_unread_bytes_resets_the_other_side() -> None:
    async def main(network: Network) -> None:
        client, server = await pair(network)
        async with client:
            await client.send_all(b"never read")
            await kernel.sleep(1)
            await server.aclose()
            with pytest.raises(kernel.BrokenResourceError) as info:
                await client.receive_some()
            assert isinstance(info.value.__cause__, ConnectionResetError)

    in_network(main)


def test_sending_to_who_has_closed_brings_a_reset() -> None:
    async def main(network: Network) -> None:
        client, server = await pair(network)
        async with client:
            await server.aclose()
            assert await client.receive_some() == b""
            await client.send_all(b"into the void")
            await kernel.sleep(1)
            with pytest.raises(kernel.BrokenResourceError):
                await client.send_all(b"x")

    in_network(main)


def test_lingering_for_no_time_resets() -> None:
    async def main(network: Network) -> None:
        client, server = await pair(network)
        async with server:
            client.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, struct.pack("ii", 1, 0))
            await client.aclose()
            with pytest.raises(kernel.BrokenResourceError):
                await server.receive_some()

    in_network(main)


def test_a_listener_that_closes_resets_who_was_not_accepted() -> None:
    async def main(network: Network) -> None:
        (listener,) = await kernel.open_tcp_listeners(80, host="127.0.0.1")
        async with await kernel.open_tcp_stream("127.0.0.1", 80) as stream:
            await listener.aclose()
            with pytest.raises(kernel.BrokenResourceError) as info:
                await stream.receive_some()
            assert isinstance(info.value.__cause__, ConnectionResetError)

    in_network(main)


def test_a_crash_cancels_what_runs_there_and_says_nothing_to_anybody() -> None:
    async def main(network: Network) -> None:
        server, client = network.host("server"), network.host("client")
        ended: list[object] = []
        async with kernel.open_nursery() as nursery:

            async def life() -> None:
                ended.append(await server.run(serve_echo))

            nursery.start_soon(life)
            await wait_all_tasks_blocked()
            stream = await client.run(kernel.open_tcp_stream, "server", 7)
            async with stream:
                await kernel.sleep(1)
                server.crash()
                with kernel.move_on_after(1000) as scope:
                    await stream.receive_some()
                assert scope.cancelled_caught
                assert ended == [None]
                with pytest.raises(RuntimeError, match="'server' is down"):
                    await server.run(serve_echo)
                server.restart()
                await stream.send_all(b"do you remember me?")
                with pytest.raises(kernel.BrokenResourceError) as info:
                    await stream.receive_some()
                assert isinstance(info.value.__cause__, ConnectionResetError)
            nursery.start_soon(server.run, serve_echo)
            await wait_all_tasks_blocked()
            assert await client.run(ask, "server", b"again") == b"again"
            nursery.cancel_scope.cancel()

    in_network(main)


def test_sockets_on_a_crashed_host_are_dead_in_its_clean_up() -> None:
    async def main(network: Network) -> None:
        host = network.host("a")
        said: list[object] = []

        async def life() -> None:
            stream = await kernel.open_tcp_stream("main", 7)
            try:
                await kernel.sleep_forever()
            finally:
                with kernel.CancelScope(shield=True):
                    try:
                        await stream.send_all(b"farewell")
                    except kernel.BrokenResourceError as error:
                        said.append(type(error))
                    await stream.aclose()

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(serve_echo)
            nursery.start_soon(host.run, life)
            await kernel.sleep(1)
            host.crash()
            await wait_all_tasks_blocked()
            assert said == [kernel.BrokenResourceError]
            nursery.cancel_scope.cancel()

    in_network(main)


def test_closing_a_socket_wakes_who_waits_on_it() -> None:
    async def main(network: Network) -> None:
        client, server = await pair(network)

        async def refused(operation: Callable[..., Awaitable[object]], *args: Any) -> None:
            with pytest.raises(kernel.ClosedResourceError):
                await operation(*args)

        async with server, kernel.open_nursery() as nursery:
            nursery.start_soon(refused, client.receive_some)
            nursery.start_soon(refused, client.send_all, bytes(1_000_000))
            await wait_all_tasks_blocked()
            with pytest.raises(kernel.BusyResourceError):
                await client.socket.recv(1)
            await client.aclose()

    in_network(main)


def test_a_client_that_has_gone_when_the_answer_arrives_is_never_accepted() -> None:
    async def main(network: Network) -> None:
        async with kernel.open_nursery() as nursery:
            (listener,) = await kernel.open_tcp_listeners(80, host=network.host("main").ipv4)
            with kernel.move_on_after(0.15) as scope:  # the first packet has arrived, and the answer is under way
                await network.host("a").run(kernel.open_tcp_stream, *listener.socket.getsockname())
            assert scope.cancelled_caught
            with kernel.move_on_after(10) as scope:
                await listener.accept()
            assert scope.cancelled_caught
            nursery.cancel_scope.cancel()
        await kernel.aclose_forcefully(listener)

    in_network(main, latency=0.1)


@pytest.mark.parametrize("says_something", [False, True])
def test_a_connection_whose_third_packet_is_lost_for_good_is_there_at_one_end_only(says_something: bool) -> None:
    async def main(network: Network) -> None:
        (listener,) = await kernel.open_tcp_listeners(80, host=network.host("main").ipv4)
        client = await network.host("a").run(kernel.open_tcp_stream, *listener.socket.getsockname())
        async with client, listener:
            network.partition({network.host("main")}, {network.host("a")})
            if says_something:
                await client.send_all(b"x")
                with pytest.raises(kernel.BrokenResourceError):
                    await client.receive_some()
            else:
                with kernel.move_on_after(10_000) as scope:
                    await client.receive_some()
                assert scope.cancelled_caught
                network.heal()
                with kernel.move_on_after(10_000) as scope:
                    await listener.accept()
                assert scope.cancelled_caught
                await client.send_all(b"x")
                with pytest.raises(kernel.BrokenResourceError) as info:
                    await client.receive_some()
                assert isinstance(info.value.__cause__, ConnectionResetError)

    in_network(main)


def test_a_listener_that_closes_in_the_middle_of_a_handshake_resets_the_client() -> None:
    async def main(network: Network) -> None:
        (listener,) = await kernel.open_tcp_listeners(80, host=network.host("main").ipv4)
        client = await network.host("a").run(kernel.open_tcp_stream, *listener.socket.getsockname())
        async with client:
            await listener.aclose()  # the third packet is under way
            with pytest.raises(kernel.BrokenResourceError):
                await client.receive_some()

    in_network(main, latency=0.1)


def test_what_was_sent_before_a_reset_arrives_before_it() -> None:
    async def main(network: Network) -> None:
        client, server = await pair(network)
        async with server:
            await client.send_all(b"last words")
            client.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, struct.pack("ii", 1, 0))
            await client.aclose()
            assert await server.receive_some() == b"last words"
            with pytest.raises(kernel.BrokenResourceError):
                await server.receive_some()

    in_network(main)


def test_ports_are_used_again_and_their_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = range(65530, 65536)
    monkeypatch.setattr("kernel.testing.network.sockets.PORTS", ports)
    monkeypatch.setattr("kernel.testing.network.world.PORTS", ports)

    async def main(network: Network) -> None:
        seen = set()
        for _ in range(10):
            with kernel.socket.socket() as sock:
                await sock.bind(("127.0.0.1", 0))
                seen.add(sock.getsockname()[1])
        assert seen == set(ports)
        many = [kernel.socket.socket() for _ in ports]
        for sock in many:
            await sock.bind(("127.0.0.1", 0))
        with kernel.socket.socket() as one_more, pytest.raises(OSError) as info:
            await one_more.bind(("127.0.0.1", 0))
        assert info.value.errno == errno.EADDRINUSE
        for sock in many:
            sock.close()

    in_network(main)


def test_sockets_that_share_a_port_share_the_load() -> None:
    async def main(network: Network) -> None:
        socks = [kernel.socket.socket() for _ in range(3)]
        clients = [kernel.socket.socket() for _ in range(6)]
        for sock in socks:
            sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_REUSEPORT, 1)
            await sock.bind(("127.0.0.1", 80))
            sock.listen()
        for client in clients:
            await client.connect(("127.0.0.1", 80))
        for sock in socks:
            for _ in range(2):
                with kernel.fail_after(1):
                    (await sock.accept())[0].close()
        for sock in (*socks, *clients):
            sock.close()

    in_network(main)


def test_a_datagram_socket_with_a_full_queue_loses_the_rest() -> None:
    async def main(network: Network) -> None:
        async with await kernel.open_udp_socket(("127.0.0.1", 9)) as here:
            for number in range(300):
                await here.send_to(b"%d" % number, ("127.0.0.1", 9))
            await wait_all_tasks_blocked()
            assert [data for data, _ in await here.receive_many(1000)] == [b"%d" % number for number in range(256)]
            with kernel.move_on_after(1) as scope:
                await here.receive()
            assert scope.cancelled_caught

    in_network(main)


def test_a_connect_that_is_shielded_fails_with_its_host() -> None:
    async def main(network: Network) -> None:
        host = network.host("a")

        async def life() -> None:
            with kernel.CancelScope(shield=True), kernel.socket.socket() as sock:
                with pytest.raises(OSError) as info:
                    await sock.connect((network.host("main").ipv4, 80))
                assert info.value.errno == errno.ENETDOWN
                failed.append(True)

        failed: list[bool] = []
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(host.run, life)
            await kernel.sleep(0.05)
            host.crash()
        assert failed

    in_network(main, latency=0.1)


def test_a_dead_socket_stays_dead() -> None:
    async def main(network: Network) -> None:
        client, server = await pair(network)
        await server.send_all(b"lost with the machine")
        await kernel.sleep(1)
        network.host("a").crash()
        for _ in range(3):
            with pytest.raises(kernel.BrokenResourceError) as info:
                await client.receive_some()
            assert isinstance(info.value.__cause__, OSError)
            assert info.value.__cause__.errno == errno.ENETDOWN
            with pytest.raises(kernel.BrokenResourceError):
                await client.send_all(b"x")
        await client.aclose()
        await server.aclose()

    in_network(main)


# ---- the same each time, and fast -------------------------------------------------------------------------


async def busy_life(network: Network) -> None:
    hosts: list[Host] = [network.host(f"h{number}") for number in range(4)]

    async def talk(peer: str) -> None:
        for number in range(20):
            with kernel.move_on_after(20):
                try:
                    assert await ask(peer, b"%d" % number) == b"%d" % number
                except OSError:
                    pass
                except kernel.BrokenResourceError:
                    pass
            await kernel.sleep(3)

    async with kernel.open_nursery() as servers:
        for host in hosts:
            servers.start_soon(host.run, serve_echo)
        async with kernel.open_nursery() as clients:
            for one, other in zip(hosts, hosts[1:] + hosts[:1], strict=True):
                clients.start_soon(one.run, talk, other.name)
            await kernel.sleep(20)
            network.partition(hosts[:2], hosts[2:])
            await kernel.sleep(20)
            network.heal()
        servers.cancel_scope.cancel()


def test_the_same_seed_gives_the_same_run_to_the_byte_and_another_seed_another() -> None:
    options = {"latency": (0.01, 0.5), "loss": 0.1, "duplicates": 0.1}
    logs = [in_network(busy_life, seed=seed, **options) for seed in (1, 1, 2)]
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]
    assert len(logs[0]) > 300


def test_a_million_seconds_go_by() -> None:
    async def main(network: Network) -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(network.host("server").run, serve_echo)
            for _ in range(100):
                await kernel.sleep(10_000)
                assert await network.host("client").run(ask, "server", b"still there?") == b"still there?"
            assert kernel.current_time() > 1_000_000
            nursery.cancel_scope.cancel()

    in_network(main)


def test_in_an_exploration_the_schedule_decides_what_is_lost() -> None:
    outcomes = set()

    async def program() -> None:
        with Network(loss=0.5, duplicates=0.5) as network:
            network.host("main")
            async with await kernel.open_udp_socket(("0.0.0.0", 9)) as here:

                async def send() -> None:
                    async with await kernel.open_udp_socket(remote_address=("main", 9)) as there:
                        await there.send(b"x")

                await network.host("a").run(send)
                got = []
                with kernel.move_on_after(1):
                    async for data, _ in here:
                        got.append(data)
                outcomes.add(b"".join(got))

    result = explore(program)
    assert result.complete
    assert outcomes == {b"", b"x", b"xx"}


def test_an_exploration_finds_the_order_in_which_two_clients_break_a_server() -> None:
    async def program() -> None:
        value = 0

        async def add(stream: kernel.SocketStream) -> None:
            nonlocal value
            seen = value
            await stream.receive_some()  # somebody else may come in here
            value = seen + 1
            await stream.send_all(b"done")

        with Network(latency=(0.1, 0.2)) as network:
            server = network.host("server")
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(server.run, lambda: kernel.serve_tcp(add, 7, host=server.ipv4))
                async with kernel.open_nursery() as clients:
                    for name in ("one", "two"):
                        clients.start_soon(network.host(name).run, ask, server.ipv4, b"x")
                nursery.cancel_scope.cancel()
        assert value == 2

    with pytest.raises(kernel.testing.ScheduleFailure):
        explore(program, strategy="random", schedules=200)


# ---- rules of use ----------------------------------------------------------------------------------------


def test_what_is_misused_says_so() -> None:
    async def main(network: Network) -> None:
        host = network.host("a")
        assert repr(host) == "<Host 'a', 10.0.0.1>"
        host.crash()
        assert repr(host) == "<Host 'a', 10.0.0.1, down>"
        nobody = ("10.9.9.9", 9)
        async with await kernel.open_udp_socket() as sock:
            with pytest.raises(OSError) as info:
                await sock.send_to(b"x", nobody)
            assert info.value.errno == errno.EHOSTUNREACH
        for flags, answer in ((0, ("10.9.9.9", "9")), (stdlib.NI_NAMEREQD, None)):
            try:
                assert await kernel.socket.getnameinfo(nobody, flags | stdlib.NI_NUMERICSERV) == answer
            except stdlib.gaierror:
                assert answer is None
        with pytest.raises(stdlib.gaierror):
            await kernel.socket.getaddrinfo("no such host", 1)
        with kernel.socket.socket() as sock:
            sock.listen()
            assert sock.getsockname()[1] >= 49152
            with pytest.raises(BlockingIOError):
                sock._sock.accept()
            assert not sock.is_readable()

    in_network(main)


def test_connecting_to_somebody_who_is_connecting_already_is_refused() -> None:
    async def main(network: Network) -> None:
        network.host("server")
        with kernel.socket.socket() as sock:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(sock.connect, (network.host("server").ipv4, 80))
                with kernel.fail_after(1):
                    await kernel.sleep(0.05)
                with pytest.raises(OSError) as info:
                    sock._sock.connect((network.host("server").ipv4, 80))
                assert info.value.errno == errno.EALREADY
                for operation in (lambda: sock._sock.recv(1), lambda: sock._sock.send(b"x")):
                    with pytest.raises(BlockingIOError):
                        operation()
                with pytest.raises(OSError) as info:
                    sock.getpeername()
                assert info.value.errno == errno.ENOTCONN
                nursery.cancel_scope.cancel()

    in_network(main, latency=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": -1}, "latency"), ({"latency": (2, 1)}, "latency"), ({"latency": float("inf")}, "latency"),
        ({"loss": 2}, "loss"), ({"duplicates": -1}, "duplicates"), ({"give_up": 0}, "give_up"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Network(**options)


def test_one_network_serves_one_run_at_a_time() -> None:
    async def main() -> None:
        with Network() as network:
            with pytest.raises(RuntimeError, match="in use"), network:
                pass
        with network:
            pass

    simulate(main)
    with pytest.raises(RuntimeError), Network():
        pass


def test_nothing_of_it_stays_when_the_block_is_left() -> None:
    async def main() -> None:
        with Network(latency=1000) as network:
            client, server = await pair(network)
            await client.send_all(b"never to arrive")
            await server.send_eof()
        with pytest.raises(kernel.BrokenResourceError):
            await client.send_all(b"x")
        await client.aclose()
        await server.aclose()
        assert len(kernel.lowlevel.current_kernel().timers) == 0

    simulate(main)


def test_a_socket_that_nobody_closed_is_told() -> None:
    async def main() -> None:
        with Network():
            sock = kernel.socket.socket()
            with pytest.warns(ResourceWarning, match="unclosed <simulated TCP socket on 'main'"):
                sock._sock.__del__()  # the network knows it, so it is not collected
            sock.close()
            with pytest.raises(OSError):
                sock.dup()
            left = kernel.socket.socket()
            with pytest.raises(OSError, match="no file descriptor"):
                left.detach()
            left.close()
        gc.collect()

    simulate(main)


def test_what_the_model_lacks_says_so() -> None:
    async def main(network: Network) -> None:
        client, server = await pair(network)
        async with client, server:
            with pytest.raises(OSError, match="ancillary"):
                await client.socket.sendmsg([b"x"], [(1, 1, b"")])
            with pytest.raises(OSError, match="MSG_PEEK"):
                await client.socket.recv(1, stdlib.MSG_OOB)
            assert client.socket.getsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY) == 1
            assert not client.socket.get_inheritable()
            client.socket.set_inheritable(True)
            await client.socket.sendmsg([b"ab", b"cd"])
            one, two = bytearray(3), bytearray(3)
            assert (await server.socket.recvmsg_into([one, two]))[0] == 4
            assert bytes(one + two) == b"abcd\0\0"
            await client.send_all(b"xyz")
            assert await server.socket.recv(2, stdlib.MSG_PEEK) == b"xy"
            assert server.socket.is_readable()
            buffer = bytearray(2)
            assert await server.socket.recv_into(buffer) == 2
            assert (await server.socket.recvmsg(9))[0] == b"z"

    in_network(main)
