"""kernel.socket: the standard library's sockets, with `await`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import io
import os
import socket as stdlib
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kernel
import kernel.drivers.poller
from kernel import socket
from kernel.abc import SocketFactory
from kernel.lowlevel import wait_readable
from kernel.testing import assert_checkpoints, wait_all_tasks_blocked

LOOPBACK = ("127.0.0.1", 0)
linux = pytest.mark.skipif(sys.platform != "linux", reason="as Linux does it")


async def tcp_pair() -> tuple[socket.SocketType, socket.SocketType]:
    with socket.socket() as listener:
        await listener.bind(LOOPBACK)
        listener.listen()
        client = socket.socket()
        await client.connect(listener.getsockname())
        server, _ = await listener.accept()
    return client, server


def cancelled(operation: Callable[..., Any], *args: Any) -> Any:
    """Await `operation(*args)` in a scope that is cancelled. Returns the `Cancelled` it has raised."""

    async def attempt() -> BaseException | None:
        with kernel.CancelScope() as scope:
            scope.cancel()
            try:
                await operation(*args)
            except kernel.Cancelled as error:
                caught.append(error)
                raise
        return caught[0] if caught else None

    caught: list[BaseException] = []
    return attempt()


# ---- the module ----------------------------------------------------------------------------------------


def test_constants_errors_and_functions_that_compute_are_the_standard_librarys() -> None:
    for name in ("AF_INET", "SOCK_DGRAM", "TCP_NODELAY", "gaierror", "inet_pton", "ntohs", "SHUT_WR", "AF_UNIX"):
        assert getattr(socket, name) is getattr(stdlib, name)


def test_every_name_of_the_standard_library_is_there_or_says_what_to_use_instead() -> None:
    for name in stdlib.__all__:
        if not hasattr(socket, name):
            with pytest.raises(AttributeError, match=f"kernel.socket has no {name}: "):
                getattr(socket, name)
    with pytest.raises(AttributeError, match=r"module 'kernel.socket' has no attribute 'nonsense'"):
        socket.nonsense  # type: ignore[attr-defined]


def test_nothing_that_blocks_is_left_in_the_module() -> None:
    allowed = {"if_nameindex", "if_nametoindex", "if_indextoname", "gethostname", "sethostname", "has_dualstack_ipv6"}
    for name in socket.__all__:
        thing = getattr(socket, name)
        if callable(thing) and thing is getattr(stdlib, name, None) and not isinstance(thing, type):
            assert name in allowed or name.startswith(("inet_", "nto", "hton", "CMSG_")), name


@pytest.mark.parametrize(
    "name", [name for name in dir(stdlib.socket) if not name.startswith("_") and callable(getattr(stdlib.socket, name))]
)
def test_every_method_of_a_socket_is_there_but_for_those_with_a_reason(name: str) -> None:
    without = {
        "connect_ex": "an operation raises", "getblocking": "it never blocks", "setblocking": "it never blocks",
        "gettimeout": "a scope's business", "settimeout": "a scope's business", "makefile": "a stream's business",
        "timeout": "a scope's business", "sendmsg_afalg": "nobody waits for the kernel's cryptography",
    }  # fmt: skip
    assert hasattr(socket.SocketType, name) is (name not in without)


# ---- making them ---------------------------------------------------------------------------------------


def test_a_socket_is_non_blocking_and_has_what_it_was_made_with() -> None:
    with socket.socket(stdlib.AF_INET, stdlib.SOCK_DGRAM) as sock:
        assert (sock.family, sock.type, sock.proto) == (stdlib.AF_INET, stdlib.SOCK_DGRAM, 0)
        assert not os.get_blocking(sock.fileno())
        assert not sock.get_inheritable()
        assert repr(sock).startswith("<kernel.socket.socket fd=")
        sock.set_inheritable(True)
        assert sock.get_inheritable()
    assert sock.fileno() == -1
    sock.close()


def test_a_descriptors_kind_is_asked_of_the_system() -> None:
    beneath = stdlib.socket(stdlib.AF_INET, stdlib.SOCK_DGRAM)
    with socket.fromfd(beneath.fileno()) as duplicate:
        assert duplicate.fileno() != beneath.fileno()
        if sys.platform == "linux":
            assert (duplicate.type, duplicate.proto) == (stdlib.SOCK_DGRAM, stdlib.IPPROTO_UDP)
    with socket.socket(fileno=beneath.detach()) as owner:
        if sys.platform == "linux":
            assert owner.type == stdlib.SOCK_DGRAM


def test_a_descriptor_that_is_no_socket_is_refused_and_stays_open() -> None:
    reader, writer = os.pipe()
    before = set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()
    for make in (lambda: socket.socket(fileno=reader), lambda: socket.fromfd(reader)):
        with pytest.raises(OSError) as info:
            make()
        assert info.value.errno == errno.ENOTSOCK
    if sys.platform == "linux":
        assert set(os.listdir("/proc/self/fd")) == before
    os.close(reader)
    os.close(writer)


def test_only_plain_sockets_are_taken_over() -> None:
    import ssl

    with pytest.raises(TypeError, match=r"from_stdlib_socket\(\) wants a plain socket.socket"):
        socket.from_stdlib_socket(object())  # type: ignore[arg-type]
    plain = stdlib.socket()
    with ssl.create_default_context().wrap_socket(plain, server_hostname="x", do_handshake_on_connect=False) as tls:
        with pytest.raises(TypeError, match=r"use kernel.SSLStream"):
            socket.from_stdlib_socket(tls)
    with pytest.raises(TypeError, match=r"kernel.socket.socket\(\)"):
        socket.SocketType(object())
    closed = stdlib.socket()
    closed.close()
    with pytest.raises(OSError, match="closed"):
        socket.from_stdlib_socket(closed)


def test_dup_and_detach_give_the_connection_to_somebody_else() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with right:
            with left.dup() as other:
                fd = left.detach()
                assert left.fileno() == -1
                await other.send(b"x")
                assert await right.recv(10) == b"x"
            os.write(fd, b"y")
            assert await right.recv(10) == b"y"
            os.close(fd)

    kernel.run(main)


def test_a_factory_makes_the_sockets_of_this_run_and_of_no_other() -> None:
    class Counting(socket.SocketType):
        __slots__ = ()

    class Factory(SocketFactory):
        def socket(self, family: int, type: int, proto: int) -> Counting:
            return Counting(stdlib.socket(family, type, proto))

    async def main() -> None:
        factory = Factory()
        assert socket.set_custom_socket_factory(factory) is None
        with socket.socket() as made, socket.socket(fileno=stdlib.socket().detach()) as given:
            assert type(made) is Counting
            assert type(given) is socket.SocketType
        assert socket.set_custom_socket_factory(None) is factory
        with socket.socket() as plain:
            assert type(plain) is socket.SocketType
        with pytest.raises(TypeError, match="SocketFactory"):
            socket.set_custom_socket_factory(object())  # type: ignore[arg-type]
        socket.set_custom_socket_factory(factory)

    kernel.run(main)

    async def another() -> None:
        with socket.socket() as plain:
            assert type(plain) is socket.SocketType

    kernel.run(another)
    with pytest.raises(RuntimeError):
        socket.set_custom_socket_factory(None)


# ---- coming together ------------------------------------------------------------------------------------


def test_two_sockets_find_each_other_and_talk() -> None:
    async def main() -> None:
        client, server = await tcp_pair()
        with client, server:
            assert client.getpeername() == server.getsockname()
            await client.sendall(b"hello")
            assert await server.recv(100) == b"hello"
            client.shutdown(stdlib.SHUT_WR)
            assert client.did_shutdown_SHUT_WR
            assert await server.recv(100) == b""
            assert await server.recv(100) == b""

    kernel.run(main)


def test_connecting_with_nobody_is_refused() -> None:
    async def main() -> None:
        with stdlib.socket() as gone:
            gone.bind(LOOPBACK)
            address = gone.getsockname()
        with socket.socket() as sock:
            with pytest.raises(ConnectionRefusedError, match=r"127.0.0.1"):
                await sock.connect(address)

    kernel.run(main)


def test_names_and_services_in_addresses_are_looked_up() -> None:
    async def main() -> None:
        with socket.socket() as listener, socket.socket() as client:
            await listener.bind(("localhost", 0))
            listener.listen()
            await client.connect(("localhost", listener.getsockname()[1]))
            (await listener.accept())[0].close()
        with socket.socket() as everywhere:
            await everywhere.bind(("", 0))
            assert everywhere.getsockname()[0] == "0.0.0.0"

    kernel.run(main)


@pytest.mark.parametrize("address", ["127.0.0.1", ("127.0.0.1",), ("127.0.0.1", 1, 2), None])
def test_an_address_of_the_wrong_shape_is_refused_with_the_right_one(address: Any) -> None:
    async def main() -> None:
        with socket.socket() as sock:
            for operation in (sock.bind, sock.connect, lambda there: sock.sendto(b"x", there)):
                with pytest.raises(ValueError, match=r"is a tuple \(host, port\)"):
                    await operation(address)

    kernel.run(main)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_out_of_range_is_an_overflow_as_in_the_standard_library(host: str) -> None:
    async def main() -> None:
        with socket.socket() as sock:
            for operation in (sock.bind, sock.connect):
                with pytest.raises(OverflowError, match="65535"):
                    await operation((host, 70000))

    kernel.run(main)


@pytest.mark.skipif(not stdlib.has_ipv6, reason="no IPv6")
def test_the_rest_of_an_ipv6_address_survives_the_lookup() -> None:
    async def main() -> None:
        with socket.socket(stdlib.AF_INET6) as sock:
            assert (await sock._resolve(("::1", 80, 7, 3), local=False)) == ("::1", 80, 7, 3)
            assert (await sock._resolve(("::1", "80", 7, 3), local=False)) == ("::1", 80, 7, 3)
            with pytest.raises(ValueError, match="AF_INET6"):
                await sock._resolve(("::1",), local=False)

    kernel.run(main)


def test_a_cancelled_connect_closes_the_socket_only_once_it_was_under_way() -> None:
    async def main() -> None:
        with socket.socket() as listener:
            await listener.bind(LOOPBACK)
            listener.listen(0)
            sock = socket.socket()
            await cancelled(sock.connect, listener.getsockname())
            assert sock.fileno() != -1
            await sock.connect(listener.getsockname())
            more = [socket.socket() for _ in range(8)]  # the queue is full soon, and the system lets the rest wait
            async with kernel.open_nursery() as nursery:
                for one in more:
                    nursery.start_soon(one.connect, listener.getsockname())
                await wait_all_tasks_blocked()
                waiting = len(nursery.child_tasks)
                assert waiting
                nursery.cancel_scope.cancel()
            assert [one.fileno() for one in more].count(-1) == waiting
            for one in (*more, sock):
                one.close()

    kernel.run(main)


def test_a_number_that_a_cancelled_connect_has_freed_is_not_closed_again() -> None:
    """uvloop#738: the number may be another file's by the time the socket is closed."""

    async def main() -> None:
        with socket.socket() as listener:
            await listener.bind(LOOPBACK)
            listener.listen(0)
            more = [socket.socket() for _ in range(8)]
            async with kernel.open_nursery() as nursery:
                for one in more:
                    nursery.start_soon(one.connect, listener.getsockname())
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            others = [os.dup(0) for _ in range(8)]
            for one in more:
                one.close()
            del more, one
            gc.collect()
            for fd in others:
                os.close(fd)  # raises if somebody else has

    kernel.run(main)


def test_accept_before_listen_says_so_at_once() -> None:
    async def main() -> None:
        with socket.socket() as sock:
            with pytest.raises(OSError) as info:
                await sock.accept()
            assert info.value.errno == errno.EINVAL

    kernel.run(main)


def test_accepting_one_after_the_other_loses_nobody() -> None:
    async def main() -> None:
        with socket.socket() as listener:
            await listener.bind(LOOPBACK)
            listener.listen()
            for burst in (1, 3, 1, 5):
                clients = [socket.socket() for _ in range(burst)]
                for client in clients:
                    await client.connect(listener.getsockname())
                names = set()
                for _ in clients:
                    server, address = await listener.accept()
                    names.add(address)
                    server.close()
                assert names == {client.getsockname() for client in clients}
                for client in clients:
                    client.close()

    kernel.run(main)


# ---- receiving and sending --------------------------------------------------------------------------------


def test_every_way_to_receive_gets_what_was_sent() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with left, right:

            async def sent() -> None:
                await left.send(b"hello")

            buffer = bytearray(10)
            await sent()
            assert (await right.recv_into(buffer), bytes(buffer[:5])) == (5, b"hello")
            await sent()
            assert await right.recv_into(buffer, 2) == 2
            assert await right.recv(10) == b"llo"
            await sent()
            assert (await right.recvfrom(10))[0] == b"hello"
            await sent()
            assert (await right.recvfrom_into(buffer))[0] == 5
            await sent()
            data, ancillary, _, _ = await right.recvmsg(10)
            assert (data, ancillary) == (b"hello", [])
            await sent()
            one, two = bytearray(2), bytearray(10)
            assert (await right.recvmsg_into([one, two]))[0] == 5
            assert (bytes(one), bytes(two[:3])) == (b"he", b"llo")
            await sent()
            assert await right.recv(10, stdlib.MSG_PEEK) == b"hello"
            assert await right.recv(10, stdlib.MSG_PEEK) == b"hello"
            assert await right.recv(10) == b"hello"

    kernel.run(main)


def test_every_way_to_send_arrives() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with left, right:
            assert await left.send(b"a") == 1
            await left.sendall(bytearray(b"bc"))
            await left.sendall(memoryview(b"d"))
            assert await left.sendmsg([b"e", bytearray(b"f")]) == 2
            assert await right.recv(100) == b"abcdef"
        with (
            socket.socket(stdlib.AF_INET, stdlib.SOCK_DGRAM) as one,
            socket.socket(stdlib.AF_INET, stdlib.SOCK_DGRAM) as two,
        ):
            await two.bind(LOOPBACK)
            there = two.getsockname()
            assert await one.sendto(b"a", there) == 1
            assert await one.sendto(b"b", 0, there) == 1
            assert await one.sendto(b"c", ("localhost", there[1])) == 1
            assert await one.sendmsg([b"d", b"e"], [], 0, there) == 2
            assert [await two.recv(10) for _ in range(4)] == [b"a", b"b", b"c", b"de"]
            with pytest.raises(TypeError, match="sendto"):
                await one.sendto(b"x")

    kernel.run(main)


def test_receiving_waits_and_wakes_again_and_again() -> None:
    """After a short recv the next one sleeps first. It must wake for what comes, in all the ways it may come."""

    async def main() -> None:
        left, right = await tcp_pair()
        with left, right, kernel.fail_after(10):
            got: list[bytes] = []

            async def receive() -> None:
                while data := await right.recv(4):
                    got.append(data)

            async with kernel.open_nursery() as nursery:
                nursery.start_soon(receive)
                for chunk in (b"a", b"bcde", b"fghijk", b"lmnopqrs", b"t"):
                    await left.send(chunk)
                    await wait_all_tasks_blocked()
                    assert sum(map(len, got)) == len(b"".join(got))
                await left.send(b"last")
                left.shutdown(stdlib.SHUT_WR)  # data and the end together: both arrive
            assert b"".join(got) == b"abcdefghijklmnopqrstlast"

    kernel.run(main)


def test_datagrams_shorter_than_the_buffer_do_not_mean_that_there_are_no_more() -> None:
    async def main() -> None:
        with socket.socket(stdlib.AF_INET, stdlib.SOCK_DGRAM) as sock:
            await sock.bind(LOOPBACK)
            for data in (b"a", b"b", b"c"):
                await sock.sendto(data, sock.getsockname())
            with kernel.CancelScope() as scope:
                got = [await sock.recv(100), await sock.recv(100)]
                assert not sock._drained
                got.append(await sock.recv(100))
            assert not scope.cancelled_caught
            assert got == [b"a", b"b", b"c"]

    kernel.run(main)


def test_one_reader_and_one_writer_at_a_time() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with left, right:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(left.recv, 1)
                nursery.start_soon(left.sendall, bytes(5_000_000))
                await wait_all_tasks_blocked()
                with pytest.raises(kernel.BusyResourceError, match="receiving"):
                    await left.recv(1)
                with pytest.raises(kernel.BusyResourceError, match="sending"):
                    await left.send(b"x")
                with pytest.raises(kernel.BusyResourceError):
                    await wait_readable(left)
                nursery.cancel_scope.cancel()

    kernel.run(main)


def test_waiting_by_number_and_by_method_get_on() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with left, right, kernel.fail_after(10):
            for _ in range(3):
                async with kernel.open_nursery() as nursery:
                    nursery.start_soon(wait_readable, right)
                    await wait_all_tasks_blocked()
                    await left.send(b"x")
                assert await right.recv(10) == b"x"
                async with kernel.open_nursery() as nursery:
                    nursery.start_soon(right.recv, 10)
                    await wait_all_tasks_blocked()
                    await left.send(b"x")
            async with kernel.open_nursery() as nursery:  # one of each, on the same socket
                nursery.start_soon(right.recv, 10)
                await wait_all_tasks_blocked()
                await kernel.lowlevel.wait_writable(right)
                await left.send(b"x")

    kernel.run(main)


def test_closing_wakes_reader_and_writer() -> None:
    async def main() -> None:
        left, right = socket.socketpair()

        async def refused(operation: Callable[..., Any], *args: Any) -> None:
            with pytest.raises(kernel.ClosedResourceError, match="another task closed this socket"):
                await operation(*args)

        with right:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(refused, left.recv, 1)
                nursery.start_soon(refused, left.sendall, bytes(5_000_000))
                await wait_all_tasks_blocked()
                left.close()
        for operation in (lambda: left.recv(1), lambda: left.send(b"x"), lambda: left.recv_into(bytearray(1))):
            with pytest.raises(OSError) as info:
                await operation()
            assert info.value.errno == errno.EBADF

    kernel.run(main)


def test_detaching_wakes_who_waits_and_leaves_nothing_in_the_poller() -> None:
    async def main() -> None:
        left, right = socket.socketpair()

        async def refused() -> None:
            with pytest.raises(kernel.ClosedResourceError):
                await left.recv(1)

        with right:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(refused)
                await wait_all_tasks_blocked()
                fd = left.detach()
            await right.send(b"x")
            await wait_readable(fd)
            os.close(fd)

    kernel.run(main)


@linux
def test_a_duplicate_that_stays_open_does_not_keep_the_loop_from_sleeping() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        duplicate = os.dup(left.fileno())
        with right:
            with kernel.move_on_after(0.001):
                await left.recv(1)
            left.close()
            await right.send(b"x")
            polls = 0
            kernel_ = kernel.lowlevel.current_kernel()
            real = kernel_.poller.poll

            def counting(timeout: float) -> Any:
                nonlocal polls
                polls += 1
                return real(timeout)

            kernel_.poller.poll = counting  # type: ignore[method-assign]
            await kernel.sleep(0.02)
            assert polls < 5
        os.close(duplicate)

    kernel.run(main)


@linux
def test_a_reader_that_is_away_does_not_keep_the_loop_from_sleeping() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with left, right:
            await right.send(b"x")
            await left.recv(1)
            with kernel.move_on_after(0.001):
                await left.recv(1)  # from now on it is watched
            await right.send(b"x")
            polls = 0
            kernel_ = kernel.lowlevel.current_kernel()
            real = kernel_.poller.poll

            def counting(timeout: float) -> Any:
                nonlocal polls
                polls += 1
                return real(timeout)

            kernel_.poller.poll = counting  # type: ignore[method-assign]
            await kernel.sleep(0.02)
            assert polls < 10
            assert await left.recv(10) == b"x"

    kernel.run(main)


def test_a_socket_outlives_a_run_and_works_in_the_next() -> None:
    left, right = socket.socketpair()

    async def main() -> None:
        with kernel.move_on_after(0.001):
            await left.recv(1)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(left.recv, 1)
            await wait_all_tasks_blocked()
            await right.send(b"x")

    kernel.run(main)
    kernel.run(main)
    with kernel.Kernel() as one, kernel.Kernel() as two:
        for which, other in ((one, two), (two, one), (one, two)):
            which.run(main)
            assert left.fileno() not in other.poller._watched  # type: ignore[attr-defined]
    left.close()
    right.close()


def test_a_socket_that_is_collected_leaves_its_number_to_the_next_one() -> None:
    async def main() -> None:
        for _ in range(3):
            left, right = socket.socketpair()
            with kernel.move_on_after(0.001):
                await left.recv(1)
            fd = left.fileno()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                del left, right
                await kernel.sleep(0)  # what the deadline has raised knows them, as long as this step lasts
                gc.collect()
            one, two = socket.socketpair()
            assert fd in (one.fileno(), two.fileno())
            with one, two, kernel.fail_after(10):
                async with kernel.open_nursery() as nursery:
                    nursery.start_soon(one.recv, 1)
                    nursery.start_soon(two.recv, 1)
                    await wait_all_tasks_blocked()
                    await one.send(b"x")
                    await two.send(b"x")

    kernel.run(main)


def test_every_operation_is_a_cancel_point_before_it_does_anything() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with left, right, open(os.devnull, "rb") as file, socket.socket() as listener:
            await listener.bind(LOOPBACK)
            listener.listen()
            with stdlib.create_connection(listener.getsockname()):
                await right.send(b"here")
                for operation, args in {
                    listener.accept: (), left.recv: (9,), left.recv_into: (bytearray(9),), left.recvfrom: (9,),
                    left.recvfrom_into: (bytearray(9),), left.recvmsg: (9,), left.recvmsg_into: ([bytearray(9)],),
                    left.send: (b"x",), left.sendall: (b"x",), left.sendmsg: ([b"x"],), left.sendfile: (file,),
                }.items():  # fmt: skip
                    assert await cancelled(operation, *args) is not None, operation
                assert await left.recv(9) == b"here"
                assert not right.is_readable()
                (await listener.accept())[0].close()

    kernel.run(main)


def test_operations_that_need_not_wait_are_checkpoints_all_the_same() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with left, right:
            with assert_checkpoints():
                await left.send(b"xxxxxx")
            with assert_checkpoints():
                await right.recv(1)
            with assert_checkpoints():
                await right.recv_into(bytearray(1))
            with assert_checkpoints():
                await left.sendall(b"x")
            with assert_checkpoints():
                await left.sendmsg([b"x"])

    kernel.run(main)


def test_a_task_that_never_has_to_wait_lets_the_others_run() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with left, right:
            done = False

            async def other() -> None:
                nonlocal done
                done = True

            async with kernel.open_nursery() as nursery:
                nursery.start_soon(other)
                for _ in range(200):
                    await left.send(b"x")
                    await right.recv(1)
                assert done

    kernel.run(main)


@pytest.mark.parametrize("end", ["cancelled", "broken", "closed"])
def test_sendall_says_how_much_had_gone_out(end: str) -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        sent: list[int] = []

        async def send() -> None:
            try:
                await left.sendall(bytes(5_000_000))
            except BaseException as error:
                sent.append(error.bytes_sent)  # type: ignore[attr-defined]
                raise

        with contextlib.suppress(BaseExceptionGroup):
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(send)
                await wait_all_tasks_blocked()
                if end == "broken":
                    right.close()
                elif end == "closed":
                    left.close()
                else:
                    nursery.cancel_scope.cancel()
        received = 0
        if end != "broken":
            while right.is_readable() and (chunk := await right.recv(100_000)):
                received += len(chunk)
            assert sent == [received]
        assert 0 < sent[0] < 5_000_000
        left.close()
        right.close()

    kernel.run(main)


@linux
def test_a_reset_is_told_to_both_sides() -> None:
    async def main() -> None:
        client, server = await tcp_pair()
        client.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, struct.pack("ii", 1, 0))
        with server:
            async with kernel.open_nursery() as nursery:

                async def receive() -> None:
                    with pytest.raises(ConnectionResetError):
                        await server.recv(1)

                nursery.start_soon(receive)
                await wait_all_tasks_blocked()
                client.close()
            with pytest.raises(BrokenPipeError):
                await server.send(b"x")

    kernel.run(main)


# ---- options, and sending files -----------------------------------------------------------------------


def test_options_can_be_set_and_asked_in_every_form() -> None:
    with socket.socket() as sock:
        sock.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)
        assert sock.getsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY)
        sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, struct.pack("ii", 1, 3))
        assert struct.unpack("ii", sock.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, 8)) == (1, 3)
        if sys.platform == "linux":
            sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_BINDTODEVICE, None, 0)


def test_is_readable_looks_without_waiting() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with left, right:
            assert not right.is_readable()
            await left.send(b"x")
            assert right.is_readable()

    kernel.run(main)


async def collect(sock: socket.SocketType) -> bytes:
    got = bytearray()
    while chunk := await sock.recv(100_000):
        got += chunk
    return bytes(got)


@pytest.mark.parametrize(("offset", "count"), [(0, None), (10, None), (10, 1000), (0, 10_000_000), (4_000_000, None)])
@pytest.mark.parametrize("source", ["file", "memory", "file without a number"])
def test_sendfile_sends_the_part_that_was_asked_for(
    tmp_path: Path, source: str, offset: int, count: int | None
) -> None:
    content = os.urandom(1000) * 3000
    path = tmp_path / "f"
    path.write_bytes(content)

    async def main() -> None:
        left, right = socket.socketpair()
        file: Any = io.BytesIO(content) if source == "memory" else path.open("rb")
        if source == "file without a number":

            class Wrapped(io.RawIOBase):
                def fileno(self) -> int:
                    raise io.UnsupportedOperation("fileno")

                def __getattribute__(self, name: str) -> Any:
                    return getattr(file, name) if name in ("read", "seek", "tell") else super().__getattribute__(name)

            given: Any = Wrapped()
        else:
            given = file
        with file, right:
            async with kernel.open_nursery() as nursery:
                expected = content[offset:][: count if count is not None else len(content)]

                async def check() -> None:
                    assert await collect(right) == expected

                nursery.start_soon(check)
                with left:
                    assert await left.sendfile(given, offset, count) == len(expected)
            assert file.tell() == offset + len(expected)

    kernel.run(main)


def test_a_cancelled_sendfile_says_how_far_it_came_and_so_does_the_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(5_000_000))

    async def main() -> None:
        left, right = socket.socketpair()
        for make in (lambda: path.open("rb"), lambda: io.BytesIO(bytes(5_000_000))):
            with make() as file:
                sent = []

                async def send(file: Any = file, sent: list[int] = sent) -> None:
                    try:
                        await left.sendfile(file)
                    except kernel.Cancelled as error:
                        sent.append(error.bytes_sent)  # type: ignore[attr-defined]
                        raise

                async with kernel.open_nursery() as nursery:
                    nursery.start_soon(send)
                    await wait_all_tasks_blocked(0.01)
                    nursery.cancel_scope.cancel()
                received = 0
                while right.is_readable():
                    received += len(await right.recv(1_000_000))
                assert sent == [received]
                assert file.tell() == received
        left.close()
        right.close()

    kernel.run(main)


def test_a_sendfile_that_the_system_refuses_in_the_midst_says_how_far_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that it refuses at once goes another way."""
    (tmp_path / "f").write_bytes(bytes(1000))
    left, right = socket.socketpair()

    def sendfile(out: int, file: int, offset: int, count: int) -> int:
        if offset >= good:
            raise OSError(errno.EINVAL, "no")
        return min(count, 10)

    async def main() -> None:
        nonlocal good
        with left, right, (tmp_path / "f").open("rb") as file:
            with pytest.raises(OSError, match="no") as info:
                await left.sendfile(file)
            assert (info.value.bytes_sent, file.tell()) == (20, 20)  # type: ignore[attr-defined]
            good = 0
            assert await left.sendfile(file, 0, 500) == 500
            assert len(await right.recv(1000)) == 500
            assert file.tell() == 500
            right.close()
            with pytest.raises(BrokenPipeError) as broken:
                await left.sendfile(file)
            assert (broken.value.bytes_sent, file.tell()) == (0, 0)  # type: ignore[attr-defined]

    good = 20
    monkeypatch.setattr(os, "sendfile", sendfile, raising=False)
    kernel.run(main)


def test_sendfile_refuses_what_it_cannot_send(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("text")

    async def main() -> None:
        left, right = socket.socketpair()
        with left, right, (tmp_path / "f").open() as text, (tmp_path / "f").open("rb") as file:
            with pytest.raises(ValueError, match="binary"):
                await left.sendfile(text)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="count"):
                await left.sendfile(file, count=0)
            with socket.socket(stdlib.AF_INET, stdlib.SOCK_DGRAM) as datagrams:
                with pytest.raises(ValueError, match="stream sockets"):
                    await datagrams.sendfile(file)

    kernel.run(main)


# ---- outside, and on other pollers ----------------------------------------------------------------------


def test_outside_the_kernel_operations_say_so() -> None:
    left, right = socket.socketpair()
    with left, right:
        for operation in (left.recv(1), left.send(b"x"), left.accept(), left.recvfrom(1)):
            with pytest.raises(RuntimeError, match="kernel"):
                operation.send(None)  # type: ignore[attr-defined]


class OnlyArm:
    """A poller that has no `watch`, as somebody's own may not."""

    def __init__(self) -> None:
        self._real = kernel.drivers.poller.default_poller()  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        if name == "watch":
            raise AttributeError(name)
        return getattr(self._real, name)

    def __len__(self) -> int:
        return len(self._real)


def test_a_poller_without_watch_will_do() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        for _ in range(3):
            with kernel.move_on_after(0.001):
                await left.recv(1)
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(left.recv, 1)
                await wait_all_tasks_blocked()
                await right.send(b"x")

        async def refused() -> None:
            with pytest.raises(kernel.ClosedResourceError):
                await left.recv(1)

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(refused)
            await wait_all_tasks_blocked()
            left.close()
        right.close()

    kernel.run(main, poller=OnlyArm())  # type: ignore[arg-type]


# ---- more than one run, more than one process --------------------------------------------------------------


def test_a_socket_that_another_thread_closes_wakes_who_waits_on_it() -> None:
    async def main() -> None:
        left, right = socket.socketpair()

        async def refused(operation: Callable[..., Any], *args: Any) -> None:
            with pytest.raises(kernel.ClosedResourceError):
                await operation(*args)

        with right, kernel.fail_after(10):
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(refused, left.recv, 1)
                nursery.start_soon(refused, left.sendall, bytes(5_000_000))
                await wait_all_tasks_blocked()
                await kernel.to_thread.run_sync(left.close)

    kernel.run(main)


def test_a_wait_that_is_cancelled_before_the_other_threads_word_arrives_is_just_cancelled() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with right, kernel.fail_after(10), kernel.CancelScope() as scope:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(left.recv, 1)
                await wait_all_tasks_blocked()
                thread = threading.Thread(target=left.close)
                thread.start()
                thread.join()  # nothing else runs here meanwhile
                scope.cancel()
        assert scope.cancelled_caught

    kernel.run(main)


def test_two_runs_in_two_threads_may_use_one_socket_one_to_read_and_one_to_write() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        got: list[bytes] = []

        async def receive() -> None:
            got.append(await left.recv(10))

        async def send() -> None:
            with pytest.raises(kernel.BusyResourceError, match="receiving"):
                await left.recv(10)
            await left.sendall(bytes(5_000_000))

        with left, right, kernel.fail_after(10):
            with kernel.move_on_after(0.001):
                await left.sendall(bytes(5_000_000))  # so that both directions are watched here
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(receive)
                await wait_all_tasks_blocked()
                async with kernel.open_nursery() as others:
                    others.start_soon(kernel.to_thread.run_sync, kernel.run, send)
                    await wait_all_tasks_blocked(0.01)
                    while others.child_tasks:
                        with kernel.move_on_after(0.01):
                            await right.recv(1_000_000)
                assert not got
                await right.send(b"x")
            assert got == [b"x"]

    kernel.run(main)


@pytest.mark.parametrize("method", ["recv", "sendall"])
def test_closing_in_one_run_wakes_who_waits_in_another(method: str) -> None:
    left, right = socket.socketpair()
    waits = threading.Event()

    async def elsewhere() -> None:
        async def refused() -> None:
            with pytest.raises(kernel.ClosedResourceError):
                await (left.recv(1) if method == "recv" else left.sendall(bytes(5_000_000)))

        with kernel.fail_after(10):
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(refused)
                await wait_all_tasks_blocked()
                waits.set()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(kernel.to_thread.run_sync, kernel.run, elsewhere)
            await kernel.to_thread.run_sync(waits.wait)
            left.close()

    with right:
        kernel.run(main)


def test_a_guests_sockets_are_watched_and_closed_while_its_helper_waits() -> None:
    async def host() -> Any:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        kernel.lowlevel.start_guest_run(
            main, run_sync_soon_threadsafe=loop.call_soon_threadsafe, done_callback=done.set_result,
            host_uses_signal_set_wakeup_fd=True,
        )  # fmt: skip
        return (await done).unwrap()

    async def main() -> list[str]:
        left, right = socket.socketpair()
        loop = asyncio.get_running_loop()
        log: list[str] = []

        async def refused() -> None:
            with pytest.raises(kernel.ClosedResourceError):
                await left.recv(1)
            log.append("closed")

        with right, kernel.fail_after(10):
            for _ in range(5):
                async with kernel.open_nursery() as nursery:
                    nursery.start_soon(right.recv, 1)
                    await wait_all_tasks_blocked(0.001)
                    loop.call_later(0.001, left._sock.send, b"x")
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(refused)
                await wait_all_tasks_blocked(0.001)
                loop.call_later(0.001, left.close)
        return log

    assert asyncio.run(host()) == ["closed"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_may_use_a_socket_on_which_a_task_of_its_parent_waits() -> None:
    async def child() -> None:
        with kernel.fail_after(10):
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(left.recv, 1)
                await wait_all_tasks_blocked()
                await right.send(b"x")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(left.recv, 1)
            await wait_all_tasks_blocked()
            if (pid := os.fork()) == 0:
                status = 1
                try:
                    kernel.run(child)
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(pid, 0)[1] == 0
            nursery.cancel_scope.cancel()

    left, right = socket.socketpair()
    with left, right:
        kernel.run(main)


@linux
def test_sendfile_does_not_send_to_the_file_that_has_got_the_number_of_a_closed_socket(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(5_000_000))

    async def main() -> None:
        left, right = socket.socketpair()
        sent: list[int] = []

        async def send() -> None:
            with (tmp_path / "f").open("rb") as file, pytest.raises(OSError) as info:
                await left.sendfile(file)
            assert info.value.errno == errno.EBADF
            sent.append(info.value.bytes_sent)  # type: ignore[attr-defined]

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            received = 0
            while right.is_readable():
                received += len(right._sock.recv(1_000_000))
            kernel.lowlevel.current_kernel().poll(0)  # it is woken now, and has its turn when all of this is done
            fd = left.fileno()
            left.close()
            one, two = stdlib.socketpair()
            assert one.fileno() == fd
        with one, two, right:
            two.setblocking(False)
            with pytest.raises(BlockingIOError):
                two.recv(1)
        assert sent == [received]

    kernel.run(main)


@linux
@pytest.mark.parametrize("how", ["sendto", "sendmsg"])
def test_a_datagram_to_a_unix_socket_whose_queue_is_full_waits_without_spinning(tmp_path: Path, how: str) -> None:
    path = str(tmp_path / "s")

    async def main() -> None:
        unix = (stdlib.AF_UNIX, stdlib.SOCK_DGRAM)
        with socket.socket(*unix) as there, socket.socket(*unix) as here, kernel.fail_after(10):
            await there.bind(path)
            attempts = 0

            async def send() -> None:
                if how == "sendto":
                    await here.sendto(b"x", path)
                else:
                    await here.sendmsg([b"x"], [], 0, path)

            queued = 0
            with kernel.move_on_after(0.01):
                while True:
                    await send()
                    queued += 1
            assert queued
            kernel_ = kernel.lowlevel.current_kernel()
            real = kernel_.poller.poll

            def counting(timeout: float) -> Any:
                nonlocal attempts
                attempts += 1
                return real(timeout)

            kernel_.poller.poll = counting  # type: ignore[method-assign]
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(send)
                await kernel.sleep(0.03)
                assert attempts < 30
                await there.recv(1)

    kernel.run(main)


def test_asking_for_no_bytes_does_not_wait_for_any() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with left, right, kernel.fail_after(10):
            assert await right.recv(0) == b""
            await left.send(b"x")
            assert await right.recv(10) == b"x"
            assert await right.recv(0) == b""

    kernel.run(main)


@pytest.mark.parametrize("kind", ["SOCK_SEQPACKET", "SOCK_DGRAM"])
def test_unix_sockets_of_other_types_keep_the_borders_of_messages(kind: str) -> None:
    if not hasattr(stdlib, kind) or sys.platform != "linux":
        pytest.skip("this system has no such socket")

    async def main() -> None:
        left, right = socket.socketpair(stdlib.AF_UNIX, getattr(stdlib, kind))
        with left, right, kernel.fail_after(10):
            await left.send(b"one")
            await left.send(b"two")
            assert [await right.recv(100), await right.recv(100)] == [b"one", b"two"]
            with pytest.raises(ValueError, match="SOCK_STREAM"):
                kernel.SocketStream(left)
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(right.recv, 100)
                await wait_all_tasks_blocked()
                await left.send(b"three")

    kernel.run(main)


@linux
def test_urgent_data_are_received_where_the_system_has_put_them() -> None:
    async def main() -> None:
        client, server = await tcp_pair()
        with client, server, kernel.fail_after(10):
            await client.send(b"abc", stdlib.MSG_OOB)
            assert await server.recv(10) == b"ab"
            assert await server.recv(1, stdlib.MSG_OOB) == b"c"
            server.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_OOBINLINE, 1)
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(server.recv, 10)
                await wait_all_tasks_blocked()
                await client.send(b"!", stdlib.MSG_OOB)

    kernel.run(main)


def test_ending_the_receiving_half_wakes_who_receives_with_the_end() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with left, right, kernel.fail_after(10):
            got: list[bytes] = []

            async def receive() -> None:
                got.append(await left.recv(10))

            async with kernel.open_nursery() as nursery:
                nursery.start_soon(receive)
                await wait_all_tasks_blocked()
                left.shutdown(stdlib.SHUT_RD)
            assert got == [b""]
            assert not left.did_shutdown_SHUT_WR

    kernel.run(main)


def test_what_was_peeked_at_is_still_there_after_a_short_receive() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with left, right, kernel.fail_after(10):
            await left.send(b"abc")
            assert await right.recv(10) == b"abc"
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(right.recv, 10, stdlib.MSG_PEEK)
                await wait_all_tasks_blocked()
                await left.send(b"def")
            assert await right.recv(2) == b"de"
            assert await right.recv(2) == b"f"

    kernel.run(main)


@linux
@pytest.mark.parametrize("platform", ["win32", "darwin", "freebsd14"])
def test_the_package_can_be_imported_where_the_system_has_less(platform: str) -> None:
    """A stand-in for trying it there: the names that only some systems have are taken away."""
    program = f"""
import selectors, ssl, subprocess, tempfile, multiprocessing, concurrent.futures, logging.handlers, random
import os, select, socket, sys
for module, names in (
    (socket, "AF_UNIX SO_REUSEPORT SCM_RIGHTS CMSG_SPACE CMSG_LEN MSG_CMSG_CLOEXEC SO_PEERCRED SO_DOMAIN SO_PROTOCOL"
             " send_fds recv_fds sethostname TCP_FASTOPEN TCP_USER_TIMEOUT MSG_CTRUNC MSG_NOSIGNAL if_nameindex"),
    (select, "epoll EPOLLIN EPOLLOUT EPOLLONESHOT poll"),
    (os, "eventfd EFD_NONBLOCK EFD_CLOEXEC pipe2 sendfile register_at_fork"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
        if name in getattr(module, "__all__", ()):
            module.__all__.remove(name)
sys.platform = {platform!r}
import kernel, kernel.socket, kernel.testing.network
from kernel.net import resolve, serving, sockets, ssl_over_tcp, streams, tcp, tls, udp, unix
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
