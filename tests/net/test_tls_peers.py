"""SSLStream with others at the other end: the blocking `ssl` module in a thread, openssl's own client and server."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tls_contexts import HOST, TLS_1_2, VERSIONS, authority, certificate, client_context, server_context

import kernel
from kernel import BrokenResourceError, open_nursery
from kernel.net.streams import SocketStream
from kernel.net.tls import SSLStream
from kernel.socket import from_stdlib_socket
from kernel.testing import wait_all_tasks_blocked

MUCH = bytes(range(256)) * 4096  # a megabyte
SECONDS = 20  # after which a peer is stuck

each_version = pytest.mark.parametrize("version", VERSIONS, ids=["TLSv1.2", "TLSv1.3"])
each_side = pytest.mark.parametrize("server_side", [False, True], ids=["client", "server"])


def contexts(version: ssl.TLSVersion, server_side: bool) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Ours and the peer's."""
    both = client_context(version), server_context(version)
    return both[::-1] if server_side else both


def tls_stream(
    sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, https: bool = False
) -> SSLStream[Any]:
    stream = SocketStream(from_stdlib_socket(sock))
    name = None if server_side else HOST
    return SSLStream(stream, context, server_hostname=name, server_side=server_side, https_compatible=https)


# ---- the blocking ssl module ---------------------------------------------------------------------------


@contextmanager
def blocking_peer(
    serve: Callable[[ssl.SSLSocket], object], context: ssl.SSLContext, *, server_side: bool
) -> Iterator[socket.socket]:
    """Run `serve` in a thread, with its end of a connection. We get the other one."""
    ours, theirs = socket.socketpair()
    errors: list[BaseException] = []

    def run() -> None:
        theirs.settimeout(SECONDS)
        try:
            with context.wrap_socket(
                theirs,
                server_side=server_side,
                server_hostname=None if server_side else HOST,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,
            ) as sock:
                serve(sock)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join()
        theirs.close()
    if errors:
        raise errors[0]


def echo(sock: ssl.SSLSocket) -> None:
    """What comes goes back, until the end, which is answered."""
    while data := sock.recv(65536):
        sock.sendall(data)
    with contextlib.suppress(ssl.SSLError, OSError):
        sock.unwrap()


@each_version
@each_side
def test_the_ssl_module_echoes_a_megabyte(version: ssl.TLSVersion, server_side: bool) -> None:
    ours, theirs = contexts(version, server_side)

    async def main(sock: socket.socket) -> None:
        async with tls_stream(sock, ours, server_side=server_side) as stream, open_nursery() as nursery:
            nursery.start_soon(stream.send_all, MUCH)
            got = bytearray()
            while len(got) < len(MUCH):
                got += await stream.receive_some()
            assert got == MUCH

    with blocking_peer(echo, theirs, server_side=not server_side) as sock:
        kernel.run(main, sock)


@each_version
@each_side
def test_tiny_pieces(version: ssl.TLSVersion, server_side: bool) -> None:
    def talk(sock: ssl.SSLSocket) -> None:
        got = bytearray()
        for byte in b"hello":
            sock.sendall(bytes([byte]))
            got += sock.recv(1)
        assert got == b"HELLO"
        assert sock.recv(1) == b""

    async def main(sock: socket.socket) -> None:
        async with tls_stream(sock, ours, server_side=server_side) as stream:
            for byte in b"hello":
                assert await stream.receive_some(1) == bytes([byte])
                await stream.send_all(bytes([byte]).upper())

    ours, theirs = contexts(version, server_side)
    with blocking_peer(talk, theirs, server_side=not server_side) as sock:
        kernel.run(main, sock)


@each_version
@each_side
def test_our_goodbye_is_an_end_to_the_ssl_module_and_its_goodbye_to_us(
    version: ssl.TLSVersion, server_side: bool
) -> None:
    def talk(sock: ssl.SSLSocket) -> None:
        assert sock.recv(10) == b"hello"
        assert sock.recv(10) == b""  # would raise without a goodbye, as suppress_ragged_eofs is off

    def say_goodbye(sock: ssl.SSLSocket) -> None:
        sock.do_handshake()
        with contextlib.suppress(OSError):
            sock.unwrap()

    async def main(sock: socket.socket) -> None:
        async with tls_stream(sock, ours, server_side=server_side) as stream:
            await stream.send_all(b"hello")

    async def listen(sock: socket.socket) -> None:
        async with tls_stream(sock, ours, server_side=server_side) as stream:
            assert await stream.receive_some() == b""

    ours, theirs = contexts(version, server_side)
    with blocking_peer(talk, theirs, server_side=not server_side) as sock:
        kernel.run(main, sock)
    with blocking_peer(say_goodbye, theirs, server_side=not server_side) as sock:
        kernel.run(listen, sock)


@each_version
@each_side
def test_the_ssl_module_that_just_closes_has_not_said_goodbye(version: ssl.TLSVersion, server_side: bool) -> None:
    def leave(sock: ssl.SSLSocket) -> None:
        sock.sendall(b"hello")

    async def main(sock: socket.socket, https: bool) -> None:
        async with tls_stream(sock, ours, server_side=server_side, https=https) as stream:
            assert await stream.receive_some() == b"hello"
            if https:
                assert await stream.receive_some() == b""
            else:
                with pytest.raises(BrokenResourceError, match="close_notify"):
                    await stream.receive_some()

    ours, theirs = contexts(version, server_side)
    for https in (False, True):
        with blocking_peer(leave, theirs, server_side=not server_side) as sock:
            kernel.run(main, sock, https)


@each_version
@each_side
def test_the_ssl_module_unwraps_with_us(version: ssl.TLSVersion, server_side: bool) -> None:
    def talk(sock: ssl.SSLSocket) -> None:
        sock.sendall(b"secret")
        plain = sock.unwrap()
        plain.sendall(b"in the clear")
        assert plain.recv(100) == b"me too"
        plain.close()

    async def main(sock: socket.socket) -> None:
        stream = tls_stream(sock, ours, server_side=server_side)
        assert await stream.receive_some() == b"secret"
        transport, trailing = await stream.unwrap()
        async with transport:
            await transport.send_all(b"me too")
            got = bytearray(trailing)
            async for chunk in transport:
                got += chunk
        assert got == b"in the clear"

    ours, theirs = contexts(version, server_side)
    with blocking_peer(talk, theirs, server_side=not server_side) as sock:
        kernel.run(main, sock)


def test_a_peer_that_never_reads_makes_us_wait_and_a_deadline_frees_us() -> None:
    done = threading.Event()

    def stall(sock: ssl.SSLSocket) -> None:
        sock.do_handshake()
        done.wait(SECONDS)

    async def main(sock: socket.socket) -> None:
        async with tls_stream(sock, ours, server_side=True) as stream:
            await stream.do_handshake()
            async with open_nursery() as nursery:
                nursery.start_soon(stream.send_all, MUCH * 8)
                await wait_all_tasks_blocked(0.05)
                nursery.cancel_scope.cancel()
        done.set()

    ours, theirs = contexts(TLS_1_2, True)
    with blocking_peer(stall, theirs, server_side=False) as sock:
        kernel.run(main, sock)


# ---- openssl s_client and s_server ---------------------------------------------------------------------

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl tool")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The authority's certificate, and the server's with its key, as files."""
    cert = certificate(HOST)
    for name, blob in (
        ("ca", authority().cert_pem), ("key", cert.private_key_pem), ("cert", cert.cert_chain_pems[0])
    ):  # fmt: skip
        blob.write_to_path(str(tmp_path / name))
    return {name: str(tmp_path / name) for name in ("ca", "key", "cert")}


@contextmanager
def openssl(*args: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        ["openssl", *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def s_client(files: dict[str, str], version: ssl.TLSVersion, *args: str) -> Iterator[tuple[socket.socket, Any]]:
    """The connection that openssl's client makes, and its process."""
    flag = "-tls1_2" if version is TLS_1_2 else "-tls1_3"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SECONDS)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        command = ("s_client", "-connect", address, flag, "-CAfile", files["ca"], "-verify_return_error")
        with openssl(*command, "-servername", HOST, "-verify_hostname", HOST, *args) as process:
            sock, _ = listener.accept()
            with sock:
                yield sock, process


@contextmanager
def s_server(files: dict[str, str], version: ssl.TLSVersion, *args: str) -> Iterator[tuple[socket.socket, Any]]:
    """A connection to openssl's server, and its process."""
    flag = "-tls1_2" if version is TLS_1_2 else "-tls1_3"
    command = (
        "s_server",
        "-accept",
        "127.0.0.1:0",
        flag,
        "-cert",
        files["cert"],
        "-key",
        files["key"],
        "-naccept",
        "1",
    )
    with openssl(*command, *args) as process:
        assert process.stdout is not None
        line = b""
        while not line.startswith(b"ACCEPT"):  # ACCEPT 127.0.0.1:46213
            line = process.stdout.readline()
            assert line, "s_server did not start"
        port = int(line.rpartition(b":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as sock:
            yield sock, process


async def receive_until(stream: SSLStream[Any], end: bytes) -> bytes:
    got = bytearray()
    while not got.endswith(end):
        chunk = await stream.receive_some()
        assert chunk, f"the end came after {bytes(got)!r}"
        got += chunk
    return bytes(got)


def type_in(process: subprocess.Popen[bytes], text: bytes) -> None:
    assert process.stdin is not None
    os.write(process.stdin.fileno(), text)


def read_until(process: subprocess.Popen[bytes], end: bytes) -> bytes:
    assert process.stdout is not None
    got = b""
    while end not in got:
        readable, _, _ = select.select([process.stdout], [], [], SECONDS)
        assert readable, f"openssl says nothing more after {got!r}"
        chunk = os.read(process.stdout.fileno(), 65536)
        assert chunk, f"openssl ended after {got!r}"
        got += chunk
    return got


@needs_openssl
@each_version
def test_openssls_client_talks_with_our_server(files: dict[str, str], version: ssl.TLSVersion) -> None:
    async def main(sock: socket.socket, process: subprocess.Popen[bytes]) -> None:
        async with tls_stream(sock, server_context(version), server_side=True) as stream:
            type_in(process, b"hello\n")
            assert await receive_until(stream, b"\n") == b"hello\n"
            await stream.send_all(MUCH[:50_000] + b"that was all")
        # The end: our goodbye, which makes the client leave in peace.
        answer = await kernel.to_thread.run_sync(process.wait)
        assert answer == 0

    with s_client(files, version, "-quiet") as (sock, process):
        reader = threading.Thread(target=read_until, args=(process, b"that was all"))
        reader.start()
        kernel.run(main, sock, process)
        reader.join()


@needs_openssl
@each_version
def test_openssls_server_talks_with_our_client(files: dict[str, str], version: ssl.TLSVersion) -> None:
    async def main(sock: socket.socket, process: subprocess.Popen[bytes]) -> None:
        async with tls_stream(sock, client_context(version), server_side=False) as stream:
            await stream.send_all(b"hello\n")
            assert await receive_until(stream, b"\n") == b"olleh\n"  # -rev: each line backwards

    with s_server(files, version, "-rev") as (sock, process):
        kernel.run(main, sock, process)


@needs_openssl
@each_version
def test_openssls_client_that_does_not_trust_us_leaves(files: dict[str, str], version: ssl.TLSVersion) -> None:
    async def main(sock: socket.socket) -> None:
        async with tls_stream(sock, server_context(version, "other.test"), server_side=True) as stream:
            with pytest.raises(BrokenResourceError, match="alert"):
                await stream.receive_some()

    with s_client(files, version) as (sock, _):
        kernel.run(main, sock)


@needs_openssl
def test_a_renegotiation_that_the_server_asks_for(files: dict[str, str], tmp_path: Path) -> None:
    """TLS 1.2 only. It comes while one task of ours sends and another receives."""
    context = client_context(TLS_1_2)
    context.keylog_filename = str(tmp_path / "keys")  # gets a line for each handshake

    async def main(sock: socket.socket, process: subprocess.Popen[bytes]) -> None:
        async with tls_stream(sock, context, server_side=False) as stream:
            await stream.do_handshake()
            async with open_nursery() as nursery:
                nursery.start_soon(receive_until, stream, b"done\n")
                for number in range(5):
                    type_in(process, b"r\n")  # renegotiate
                    line = f"line {number}\n".encode()
                    await stream.send_all(line)
                    await kernel.to_thread.run_sync(read_until, process, line)
                type_in(process, b"done\n")

    with s_server(files, TLS_1_2) as (sock, process):
        kernel.run(main, sock, process)
    handshakes = (tmp_path / "keys").read_text().count("CLIENT_RANDOM")
    assert handshakes > 1  # how many of the five are over by the end is the server's affair


@needs_openssl
@pytest.mark.parametrize("key", [b"k\n", b"K\n"], ids=["update", "update and answer"])
@each_side
def test_new_keys_in_the_middle(files: dict[str, str], key: bytes, server_side: bool) -> None:
    """TLS 1.3 only: openssl changes its keys, and with K wants us to change ours."""

    async def main(sock: socket.socket, process: subprocess.Popen[bytes]) -> None:
        context = (server_context if server_side else client_context)(ssl.TLSVersion.TLSv1_3)
        async with tls_stream(sock, context, server_side=server_side) as stream:
            await stream.do_handshake()
            for number in range(3):
                line = f"line {number}\n".encode()
                type_in(process, key)
                if server_side:  # s_server says nothing, but takes this before our line
                    await kernel.to_thread.run_sync(read_until, process, b"KEYUPDATE")
                await stream.send_all(line)
                await kernel.to_thread.run_sync(read_until, process, line)
                type_in(process, line)  # goes out behind the new keys
                assert await receive_until(stream, b"\n") == line

    with (s_client if server_side else s_server)(files, ssl.TLSVersion.TLSv1_3) as (sock, process):
        kernel.run(main, sock, process)
