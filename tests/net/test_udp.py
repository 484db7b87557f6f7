"""UDP: datagrams come whole, alone or in batches, and errors of the network come with the next operation."""

from __future__ import annotations

import errno
import socket as stdlib
from typing import Any

import pytest

import kernel
import kernel.socket
from kernel.net.udp import UDPSocket, open_udp_socket
from kernel.testing import wait_all_tasks_blocked

LOOPBACK = ("127.0.0.1", 0)


def test_datagrams_come_whole_with_the_address_of_the_sender_and_can_be_answered() -> None:
    async def main() -> None:
        async with await open_udp_socket(LOOPBACK) as server:
            address = server.socket.getsockname()
            async with await open_udp_socket(remote_address=address) as client:
                await client.send(b"one")
                await client.send(b"")
                await client.send(bytes(65507))
                first, sender = await server.receive()
                assert (first, sender) == (b"one", client.socket.getsockname())
                assert await server.receive() == (b"", sender)
                assert await server.receive() == (bytes(65507), sender)
                await server.send_to(b"answer", sender)
                assert await client.receive() == (b"answer", address)

    kernel.run(main)


def test_a_batch_has_all_that_is_there_and_no_more_than_was_asked_for() -> None:
    async def main() -> None:
        async with await open_udp_socket(LOOPBACK) as server:
            async with await open_udp_socket(remote_address=server.socket.getsockname()) as client:
                for number in range(10):
                    await client.send(b"%d" % number)
                batch = await server.receive_many(4)
                assert [data for data, _ in batch] == [b"0", b"1", b"2", b"3"]
                assert {address for _, address in batch} == {client.socket.getsockname()}
                assert [data for data, _ in await server.receive_many()] == [b"4", b"5", b"6", b"7", b"8", b"9"]
                with pytest.raises(ValueError, match="max_datagrams"):
                    await server.receive_many(0)

    kernel.run(main)


def test_a_batch_waits_for_its_first_datagram() -> None:
    async def main() -> None:
        async with await open_udp_socket(LOOPBACK) as server, kernel.open_nursery() as nursery:
            got: list[Any] = []

            async def receive() -> None:
                got.extend(data for data, _ in await server.receive_many())

            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            assert not got
            async with await open_udp_socket(remote_address=server.socket.getsockname()) as client:
                await client.send(b"x")
                await wait_all_tasks_blocked()
            assert got == [b"x"]

    kernel.run(main)


def test_iterating_receives_for_ever() -> None:
    async def main() -> None:
        async with await open_udp_socket(LOOPBACK) as server:
            async with await open_udp_socket() as client:
                for data in (b"a", b"b", b"stop"):
                    await client.send_to(data, server.socket.getsockname())
            got = []
            async for data, _ in server:
                got.append(data)
                if data == b"stop":
                    break
            assert got == [b"a", b"b", b"stop"]

    kernel.run(main)


def test_names_are_looked_up() -> None:
    async def main() -> None:
        async with await open_udp_socket(LOOPBACK) as server, await open_udp_socket() as client:
            await client.send_to(b"x", ("localhost", server.socket.getsockname()[1]))
            assert (await server.receive())[0] == b"x"
            async with await open_udp_socket(remote_address=("localhost", 9)) as other:
                assert other.socket.getpeername()[1] == 9
            with pytest.raises(stdlib.gaierror):
                await open_udp_socket(remote_address=("no.such.host.invalid", 9))

    kernel.run(main)


def test_host_none_takes_both_families_on_one_socket() -> None:
    if not stdlib.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")

    async def main() -> None:
        async with await open_udp_socket((None, 0)) as server:
            port = server.socket.getsockname()[1]
            for host in ("127.0.0.1", "::1"):
                async with await open_udp_socket(remote_address=(host, port)) as client:
                    await client.send(host.encode())
                    data, sender = await server.receive()
                    assert data == host.encode()
                    await server.send_to(b"back", sender)
                    assert (await client.receive())[0] == b"back"

    kernel.run(main)


def test_a_system_without_ipv6_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    real = stdlib.socket

    class NoIPv6(real):
        def __init__(self, family: int = -1, *args: Any, **kwargs: Any) -> None:
            if family == stdlib.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "no IPv6")
            super().__init__(family, *args, **kwargs)

    monkeypatch.setattr(stdlib, "socket", NoIPv6)

    async def main() -> None:
        async with await open_udp_socket((None, 0)) as server:
            assert server.socket.family == stdlib.AF_INET

    kernel.run(main)


def test_an_address_in_use_is_told_unless_both_have_said_reuse_port() -> None:
    async def main() -> None:
        async with await open_udp_socket(LOOPBACK) as one:
            with pytest.raises(OSError) as info:
                await open_udp_socket(one.socket.getsockname())
            assert info.value.errno == errno.EADDRINUSE
        async with await open_udp_socket(LOOPBACK, reuse_port=True) as one:
            async with await open_udp_socket(one.socket.getsockname(), reuse_port=True):
                pass

    kernel.run(main)


def test_local_and_remote_address_go_together() -> None:
    async def main() -> None:
        async with await open_udp_socket(LOOPBACK) as server:
            async with await open_udp_socket(LOOPBACK, remote_address=server.socket.getsockname()) as client:
                assert client.socket.getpeername() == server.socket.getsockname()
                assert client.socket.getsockname()[0] == "127.0.0.1"

    kernel.run(main)


def test_broadcast_is_an_option() -> None:
    async def main() -> None:
        for broadcast in (False, True):
            async with await open_udp_socket(LOOPBACK, broadcast=broadcast) as sock:
                assert bool(sock.socket.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_BROADCAST)) is broadcast

    kernel.run(main)


def test_sending_without_an_address_or_too_much_is_an_error_and_the_socket_lives() -> None:
    async def main() -> None:
        async with await open_udp_socket(LOOPBACK) as sock:
            with pytest.raises(OSError) as info:
                await sock.send(b"x")
            assert info.value.errno == errno.EDESTADDRREQ
            with pytest.raises(OSError) as info:
                await sock.send_to(bytes(70000), sock.socket.getsockname())
            assert info.value.errno == errno.EMSGSIZE
            await sock.send_to(b"x", sock.socket.getsockname())
            assert (await sock.receive())[0] == b"x"

    kernel.run(main)


async def refusing_peer() -> Any:
    """An address on which nobody listens any more."""
    async with await open_udp_socket(LOOPBACK) as gone:
        return gone.socket.getsockname()


def test_that_nobody_listens_is_told_by_the_next_operation_and_the_socket_lives() -> None:
    async def main() -> None:
        address = await refusing_peer()
        async with await open_udp_socket(remote_address=address) as client:
            await client.send(b"x")
            with pytest.raises(ConnectionRefusedError):
                await client.receive()
            async with await open_udp_socket(address) as server:
                await client.send(b"again")
                assert (await server.receive())[0] == b"again"

    kernel.run(main)


def test_an_error_after_some_datagrams_of_a_batch_does_not_lose_them() -> None:
    async def main() -> None:
        async with await open_udp_socket(LOOPBACK) as server:
            address = server.socket.getsockname()
            async with await open_udp_socket(remote_address=address) as client:
                await client.send(b"x")
                (_, sender) = await server.receive()
                await server.send_to(b"one", sender)
                beneath = client.socket._sock
                calls = [0]

                class Failing:
                    def __getattr__(self, name: str) -> Any:
                        return getattr(beneath, name)

                    def recvfrom(self, size: int, *flags: int) -> Any:
                        calls[0] += 1
                        if calls[0] == 2:
                            raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody there")
                        return beneath.recvfrom(size, *flags)

                client.socket._sock = Failing()
                assert await client.receive_many() == [(b"one", address)]
                with kernel.CancelScope() as scope:
                    scope.cancel()
                    await client.receive()
                assert scope.cancelled_caught
                with pytest.raises(ConnectionRefusedError):
                    await client.receive()
                await server.send_to(b"two", sender)
                assert await client.receive_many() == [(b"two", address)]

    kernel.run(main)


def test_an_error_that_waits_keeps_nothing_alive() -> None:
    async def main() -> None:
        async with await open_udp_socket(remote_address=("127.0.0.1", 9)) as sock:
            sock.socket._sock = Script([(b"data", None), ConnectionRefusedError()], sock.socket._sock)
            assert await sock.receive_many() == [(b"data", None)]
            assert sock._trouble is not None
            assert sock._trouble.__traceback__ is None

    class Script:
        def __init__(self, results: list[Any], beneath: Any) -> None:
            self.results, self.beneath = results, beneath

        def __getattr__(self, name: str) -> Any:
            return getattr(self.beneath, name)

        def recvfrom(self, *args: Any) -> Any:
            result = self.results.pop(0)
            if isinstance(result, BaseException):
                raise result
            return result

    kernel.run(main)


def test_a_batch_does_not_go_round_the_methods_of_a_derived_socket() -> None:
    class Upper(kernel.socket.SocketType):
        __slots__ = ()

        async def recvfrom(self, *args: Any) -> Any:
            data, address = await super().recvfrom(*args)
            return data.upper(), address

    async def main() -> None:
        beneath = stdlib.socket(stdlib.AF_INET, stdlib.SOCK_DGRAM)
        beneath.bind(LOOPBACK)
        async with UDPSocket(Upper(beneath)) as sock:
            for data in (b"a", b"b"):
                await sock.send_to(data, beneath.getsockname())
            got: list[bytes] = []
            while len(got) < 2:
                got += [data for data, _ in await sock.receive_many()]
            assert got == [b"A", b"B"]

    kernel.run(main)


def test_a_resolvers_answer_is_not_sorted_in_place() -> None:
    answer = (
        (stdlib.AF_INET, stdlib.SOCK_DGRAM, 0, "", ("127.0.0.1", 0)),
        (stdlib.AF_INET, stdlib.SOCK_DGRAM, 0, "", ("127.0.0.2", 0)),
    )

    async def getaddrinfo(*args: Any, **kwargs: Any) -> Any:
        return answer

    async def main() -> None:
        async with await open_udp_socket((None, 0)) as sock:
            assert sock.socket.getsockname()[0] == "127.0.0.1"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernel.net.udp.getaddrinfo", getaddrinfo)
        kernel.run(main)


def test_a_system_without_reuse_port_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="SO_REUSEPORT"):
            await open_udp_socket(LOOPBACK, reuse_port=True)

    monkeypatch.delattr(stdlib, "SO_REUSEPORT", raising=False)
    kernel.run(main)


def test_an_address_that_is_not_ours_leaves_no_socket_behind() -> None:
    async def main() -> None:
        with pytest.raises(OSError) as info:
            await open_udp_socket(("192.0.2.1", 9))
        assert info.value.errno == errno.EADDRNOTAVAIL
        with kernel.CancelScope() as scope:
            scope.cancel()
            await open_udp_socket(LOOPBACK)
        assert scope.cancelled_caught

    kernel.run(main)


def test_only_one_task_receives_and_closing_wakes_it() -> None:
    async def main() -> None:
        sock = await open_udp_socket(LOOPBACK)
        async with kernel.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(kernel.ClosedResourceError):
                    await sock.receive()

            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            with pytest.raises(kernel.BusyResourceError):
                await sock.receive()
            with pytest.raises(kernel.BusyResourceError):
                await sock.receive_many()
            await sock.aclose()
        for operation in (sock.receive, sock.receive_many):
            with pytest.raises(kernel.ClosedResourceError):
                await operation()
        with pytest.raises(kernel.ClosedResourceError):
            await sock.send(b"x")
        with pytest.raises(kernel.ClosedResourceError):
            await sock.send_to(b"x", ("127.0.0.1", 9))
        await sock.aclose()

    kernel.run(main)


def test_a_cancelled_receive_takes_no_datagram() -> None:
    async def main() -> None:
        async with await open_udp_socket(LOOPBACK) as sock:
            await sock.send_to(b"x", sock.socket.getsockname())
            for operation in (sock.receive, sock.receive_many):
                with kernel.CancelScope() as scope:
                    scope.cancel()
                    await operation()
                assert scope.cancelled_caught
            with kernel.CancelScope() as scope:
                scope.cancel()
                await sock.send_to(b"y", sock.socket.getsockname())
            assert [data for data, _ in await sock.receive_many()] == [b"x"]

    kernel.run(main)


def test_only_datagram_sockets_of_ours_will_do() -> None:
    with pytest.raises(TypeError, match=r"kernel\.socket"):
        UDPSocket(object())  # type: ignore[arg-type]
    left, right = kernel.socket.socketpair()
    with left, right, pytest.raises(ValueError, match="SOCK_DGRAM"):
        UDPSocket(left)
