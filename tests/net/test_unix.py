"""Unix sockets: paths, who is at the other end, and handing over open files."""

from __future__ import annotations

import errno
import os
import socket as stdlib
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import kernel
import kernel.socket
from kernel.net.unix import (
    UnixListener,
    open_unix_listener,
    open_unix_socket,
    peer_credentials,
    receive_fds,
    send_fds,
    serve_unix,
)
from kernel.testing import wait_all_tasks_blocked

pytestmark = pytest.mark.skipif(not hasattr(stdlib, "AF_UNIX"), reason="this system has no Unix sockets")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


async def echo(stream: kernel.SocketStream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk)


def stream_pair() -> tuple[kernel.SocketStream, kernel.SocketStream]:
    left, right = kernel.socket.socketpair()
    return kernel.SocketStream(left), kernel.SocketStream(right)


# ---- connecting and listening -------------------------------------------------------------------------


def test_a_server_on_a_path_answers_and_removes_the_path_when_it_ends(path: Path) -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            (listener,) = await nursery.start(serve_unix, echo, path)
            assert isinstance(listener, UnixListener)
            async with await open_unix_socket(path) as stream:
                await stream.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
            assert stat.S_ISSOCK(path.stat().st_mode)
            nursery.cancel_scope.cancel()
        assert not path.exists()

    kernel.run(main)


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_a_path_may_be_text_bytes_or_a_path(path: Path, kind: Any) -> None:
    async def main() -> None:
        async with await open_unix_listener(kind(path)) as listener, await open_unix_socket(kind(path)) as client:
            async with await listener.accept() as server:
                await server.send_all(b"x")
                assert await client.receive_some() == b"x"

    kernel.run(main)


def test_connecting_where_nobody_listens_fails_and_leaves_nothing_open(path: Path) -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            await open_unix_socket(path)
        with stdlib.socket(stdlib.AF_UNIX) as gone:
            gone.bind(str(path))
        with pytest.raises(ConnectionRefusedError):
            await open_unix_socket(path)

    kernel.run(main)


def test_a_path_left_behind_by_a_process_that_has_gone_is_taken_over(path: Path) -> None:
    async def main() -> None:
        with stdlib.socket(stdlib.AF_UNIX) as gone:
            gone.bind(str(path))
        async with await open_unix_listener(path) as listener, await open_unix_socket(path) as client:
            async with await listener.accept():
                await client.send_all(b"x")
        assert not path.exists()

    kernel.run(main)


def test_a_path_on_which_somebody_listens_is_not_taken_over(path: Path) -> None:
    async def main() -> None:
        async with await open_unix_listener(path) as listener:
            with pytest.raises(OSError) as info:
                await open_unix_listener(path)
            assert info.value.errno == errno.EADDRINUSE
            async with await open_unix_socket(path), await listener.accept():
                pass

    kernel.run(main)


def test_a_file_of_another_kind_is_not_taken_over(path: Path) -> None:
    path.write_text("precious")

    async def main() -> None:
        with pytest.raises(OSError) as info:
            await open_unix_listener(path)
        assert info.value.errno == errno.EADDRINUSE

    kernel.run(main)
    assert path.read_text() == "precious"


def test_closing_a_listener_does_not_remove_a_path_that_is_somebody_elses_by_now(path: Path) -> None:
    async def main() -> None:
        first = await open_unix_listener(path)
        path.unlink()
        async with await open_unix_listener(path):
            await first.aclose()
            async with await open_unix_socket(path):
                pass

    kernel.run(main)


def test_closing_a_listener_whose_path_has_gone_already_is_fine(path: Path) -> None:
    async def main() -> None:
        listener = await open_unix_listener(path)
        path.unlink()
        await listener.aclose()
        await listener.aclose()

    kernel.run(main)


def test_the_path_is_removed_even_if_closing_is_cancelled(path: Path) -> None:
    async def main() -> None:
        listener = await open_unix_listener(path)
        await kernel.aclose_forcefully(listener)
        assert not path.exists()
        assert listener.socket.fileno() == -1

    kernel.run(main)


def test_mode_says_who_may_connect_whatever_the_umask_is(path: Path) -> None:
    async def main() -> None:
        before = os.umask(0)
        try:
            async with await open_unix_listener(path, mode=0o600):
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
            os.umask(0o077)
            async with await open_unix_listener(path, mode=0o666):
                assert stat.S_IMODE(path.stat().st_mode) == 0o666
        finally:
            os.umask(before)

    kernel.run(main)


def test_a_directory_that_is_missing_and_a_bad_backlog_are_told(path: Path) -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            await open_unix_listener(path / "s")
        with pytest.raises(ValueError, match="backlog"):
            await open_unix_listener(path, backlog=-1)

    kernel.run(main)


@pytest.mark.parametrize("options", [{"mode": 1 << 40}, {"backlog": 1 << 40}])
def test_an_open_that_fails_in_its_last_steps_leaves_no_path_behind(path: Path, options: Any) -> None:
    async def main() -> None:
        with pytest.raises(OverflowError):
            await open_unix_listener(path, **options)
        assert not path.exists()

    kernel.run(main)


def test_nobody_can_connect_before_the_mode_is_set(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def chmod(there: Any, mode: int) -> None:
        with stdlib.socket(stdlib.AF_UNIX) as early:
            tried.append(early.connect_ex(there))
        real(there, mode)

    async def main() -> None:
        async with await open_unix_listener(path, mode=0o600):
            assert tried == [errno.ECONNREFUSED]

    real = os.chmod
    monkeypatch.setattr(os, "chmod", chmod)
    kernel.run(main)


@pytest.mark.skipif(sys.platform != "linux", reason="abstract names are Linux's")
@pytest.mark.parametrize("options", [{}, {"mode": 0o600}])
def test_an_empty_path_is_an_abstract_name_of_the_systems_choice(options: Any) -> None:
    async def main() -> None:
        async with await open_unix_listener("", **options) as listener:
            name = listener.socket.getsockname()
            assert name[:1] == b"\0"
            async with await open_unix_socket(name), await listener.accept():
                pass

    kernel.run(main)


@pytest.mark.skipif(sys.platform != "linux", reason="abstract names are Linux's")
def test_an_abstract_name_is_no_file() -> None:
    name = f"\0kernel-test-{os.getpid()}"

    async def main() -> None:
        async with await open_unix_listener(name) as listener:
            assert listener.socket.getsockname() == name.encode()
            async with await open_unix_socket(name) as client, await listener.accept() as server:
                await client.send_all(b"x")
                assert await server.receive_some() == b"x"
            with pytest.raises(OSError) as info:
                await open_unix_listener(name)
            assert info.value.errno == errno.EADDRINUSE

    kernel.run(main)


def test_connecting_to_a_full_queue_waits_for_room(path: Path) -> None:
    """Linux answers EAGAIN then, and nothing tells when there is room; who waits to write then connects to nobody."""

    async def main() -> None:
        async with await open_unix_listener(path, backlog=0) as listener:
            first = await open_unix_socket(path)
            async with kernel.open_nursery() as nursery:
                done: list[str] = []

                async def second() -> None:
                    async with await open_unix_socket(path) as stream:
                        done.append("connected")
                        assert await stream.receive_some() == b"welcome"

                nursery.start_soon(second)
                await kernel.sleep(0)
                assert not done
                (await listener.accept()).socket.close()
                async with await listener.accept() as server:
                    assert done == ["connected"]
                    await server.send_all(b"welcome")
            await first.aclose()

    kernel.run(main)


def test_connecting_to_a_full_queue_can_be_cancelled(path: Path) -> None:
    async def main() -> None:
        async with await open_unix_listener(path, backlog=0):
            async with await open_unix_socket(path):
                with kernel.move_on_after(0.005) as scope:
                    await open_unix_socket(path)
                assert scope.cancelled_caught

    kernel.run(main)


def test_a_cancelled_open_does_nothing(path: Path) -> None:
    async def main() -> None:
        with kernel.CancelScope() as scope:
            scope.cancel()
            await open_unix_listener(path)
        assert not path.exists()
        async with await open_unix_listener(path) as listener:
            with kernel.CancelScope() as scope:
                scope.cancel()
                await open_unix_socket(path)
            with kernel.move_on_after(0) as scope:
                await listener.accept()
            assert scope.cancelled_caught  # nobody has connected

    kernel.run(main)


# ---- who is there -------------------------------------------------------------------------------------


def test_both_ends_know_who_the_other_is(path: Path) -> None:
    async def main() -> None:
        async with await open_unix_listener(path) as listener, await open_unix_socket(path) as client:
            async with await listener.accept() as server:
                for stream in (client, server):
                    who = peer_credentials(stream)
                    assert (who.uid, who.gid) == (os.getuid(), os.getgid())
                    assert who.pid in (os.getpid(), None)

    kernel.run(main)


def test_credentials_are_refused_on_tcp_and_on_a_closed_stream() -> None:
    async def main() -> None:
        (listener,) = await kernel.open_tcp_listeners(0, host="127.0.0.1")
        async with listener, await kernel.open_tcp_stream(*listener.socket.getsockname()) as client:
            with pytest.raises(OSError, match="only Unix sockets"):
                peer_credentials(client)
        left, right = stream_pair()
        await left.aclose()
        await right.aclose()
        with pytest.raises(OSError, match="Bad file descriptor"):
            peer_credentials(left)

    kernel.run(main)


# ---- handing over open files --------------------------------------------------------------------------


def test_a_file_that_was_handed_over_is_the_same_file_and_not_inheritable() -> None:
    async def main() -> None:
        left, right = stream_pair()
        async with left, right:
            reader, writer = os.pipe()
            await send_fds(left, b"here", [writer])
            os.close(writer)
            data, (received,) = await receive_fds(right)
            assert data == b"here"
            assert not os.get_inheritable(received)
            os.write(received, b"through")
            os.close(received)
            assert os.read(reader, 100) == b"through"
            assert os.read(reader, 100) == b""
            os.close(reader)

    kernel.run(main)


def test_data_without_descriptors_and_the_end_come_as_such() -> None:
    async def main() -> None:
        left, right = stream_pair()
        async with right:
            async with left:
                await send_fds(left, b"x", [])
            assert await receive_fds(right) == (b"x", [])
            assert await receive_fds(right) == (b"", [])

    kernel.run(main)


def test_a_message_too_long_for_the_buffer_goes_out_whole_after_its_descriptors() -> None:
    async def main() -> None:
        left, right = stream_pair()
        size = 5_000_000
        async with left, right, kernel.open_nursery() as nursery:
            nursery.start_soon(send_fds, left, b"x" * size, [0])
            data, fds = await receive_fds(right)
            assert len(fds) == 1
            os.close(fds[0])
            got = len(data)
            while got < size:
                got += len(await right.receive_some())
            assert got == size

    kernel.run(main)


def test_too_many_descriptors_for_the_receiver_are_closed_and_told() -> None:
    async def main() -> None:
        left, right = stream_pair()
        async with left, right:
            await send_fds(left, b"x", [0, 0, 0, 0, 0])
            before = set(os.listdir("/proc/self/fd"))
            with pytest.raises(kernel.BrokenResourceError, match="max_fds=1"):
                await receive_fds(right, max_fds=1)
            assert set(os.listdir("/proc/self/fd")) == before

    kernel.run(main)


def test_bad_calls_are_refused_before_anything_is_sent() -> None:
    async def main() -> None:
        left, right = stream_pair()
        async with left, right:
            with pytest.raises(ValueError, match="at least one byte"):
                await send_fds(left, b"", [0])
            with pytest.raises(ValueError, match="253"):
                await send_fds(left, b"x", [0] * 254)
            closed = os.dup(0)
            os.close(closed)
            with pytest.raises(OSError, match="Bad file descriptor") as info:
                await send_fds(left, b"x", [closed])
            assert info.value.bytes_sent == 0  # type: ignore[attr-defined]
            assert not right.socket.is_readable()
            await left.send_eof()
            with pytest.raises(kernel.ClosedResourceError):
                await send_fds(left, b"x", [0])
        with pytest.raises(kernel.ClosedResourceError):
            await receive_fds(right)
        with pytest.raises(kernel.ClosedResourceError):
            await send_fds(right, b"x", [0])

    kernel.run(main)


def test_nobody_else_may_receive_or_send_meanwhile() -> None:
    async def main() -> None:
        left, right = stream_pair()
        async with left, right, kernel.open_nursery() as nursery:
            nursery.start_soon(receive_fds, right)
            await wait_all_tasks_blocked()
            with pytest.raises(kernel.BusyResourceError):
                await right.receive_some()
            with pytest.raises(kernel.BusyResourceError):
                await receive_fds(right)
            nursery.cancel_scope.cancel()
        left, right = stream_pair()
        async with left, right, kernel.open_nursery() as nursery:
            nursery.start_soon(left.send_all, bytes(5_000_000))
            await wait_all_tasks_blocked()
            with pytest.raises(kernel.BusyResourceError):
                await send_fds(left, b"x", [0])
            nursery.cancel_scope.cancel()

    kernel.run(main)


def test_a_cancelled_receive_leaves_the_descriptors_for_the_next() -> None:
    async def main() -> None:
        left, right = stream_pair()
        async with left, right:
            await send_fds(left, b"x", [0])
            with kernel.CancelScope() as scope:
                scope.cancel()
                await receive_fds(right)
            data, fds = await receive_fds(right)
            assert (data, len(fds)) == (b"x", 1)
            os.close(fds[0])

    kernel.run(main)


def test_a_full_socket_says_how_much_was_sent_when_cancelled() -> None:
    async def main() -> None:
        left, right = stream_pair()
        async with left, right:
            with kernel.CancelScope() as scope:
                async with kernel.open_nursery() as nursery:

                    @nursery.start_soon
                    async def sender() -> None:
                        try:
                            await send_fds(left, bytes(5_000_000), [0])
                        except kernel.Cancelled as error:
                            seen.append(error.bytes_sent)  # type: ignore[attr-defined]
                            raise

                    seen: list[int] = []
                    await wait_all_tasks_blocked()
                    scope.cancel()
            data, fds = await receive_fds(right)
            os.close(fds[0])
            got = len(data)
            while right.socket.is_readable():
                got += len(await right.receive_some())
            assert seen == [got]

    kernel.run(main)


def test_the_blocking_module_understands_what_we_send() -> None:
    left, right = kernel.socket.socketpair()
    plain = stdlib.socket(stdlib.AF_UNIX, fileno=right.detach())
    got: list[Any] = []
    plain.setblocking(True)
    thread = threading.Thread(target=lambda: got.append(stdlib.recv_fds(plain, 100, 3)))
    thread.start()

    async def main() -> None:
        async with kernel.SocketStream(left) as stream:
            await send_fds(stream, b"hi", [0, 1])

    kernel.run(main)
    thread.join()
    plain.close()
    ((data, fds, _, _),) = got
    assert data == b"hi"
    assert len(fds) == 2
    for fd in fds:
        os.close(fd)


def test_asking_for_no_bytes_is_refused_as_it_would_look_like_the_end() -> None:
    async def main() -> None:
        left, right = kernel.socket.socketpair()
        async with kernel.SocketStream(left), kernel.SocketStream(right) as stream:
            with pytest.raises(ValueError, match="max_bytes"):
                await receive_fds(stream, 0)

    kernel.run(main)


def test_where_the_system_does_not_do_it_descriptors_are_made_non_inheritable_by_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        left, right = kernel.socket.socketpair()
        async with kernel.SocketStream(left) as one, kernel.SocketStream(right) as two:
            await send_fds(one, b"x", [0])
            _, (fd,) = await receive_fds(two)
            try:
                assert not os.get_inheritable(fd)
            finally:
                os.close(fd)

    monkeypatch.delattr(stdlib, "MSG_CMSG_CLOEXEC", raising=False)
    kernel.run(main)


def test_a_system_without_unix_sockets_or_credentials_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        left, right = kernel.socket.socketpair()
        async with kernel.SocketStream(left) as stream, kernel.SocketStream(right):
            with pytest.raises(RuntimeError, match="does not tell"):
                peer_credentials(stream)
        for operation in (open_unix_socket, open_unix_listener):
            with pytest.raises(RuntimeError, match="no Unix sockets"):
                await operation(path)

    monkeypatch.delattr(stdlib, "SO_PEERCRED", raising=False)
    monkeypatch.setattr(sys, "platform", "sunos5")
    monkeypatch.setattr("kernel.net.unix.HAVE_UNIX", False)
    kernel.run(main)
