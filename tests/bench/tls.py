"""What TLS costs: an echo over a socket pair, both ends in one process, `python tests/bench/tls.py [seconds]`.

Peers: trio's SSLStream; asyncio's and uvloop's streams with `ssl=`. And the limit: two `ssl.SSLObject`s that hand each
other their bytes through a socket pair by plain calls, without any loop. All take turns in one process, and of each the
best of several rounds counts. Microseconds of CPU time per round trip, since a busy machine hardly changes those, and
in brackets how many times those of the kernel.

    1 x 1 KiB     send 1 KiB, wait until it has come back
    1 x 64 KiB    the same with 64 KiB
    1 MiB         send a megabyte, receive it back meanwhile
    handshake     connect two streams, shake hands, say goodbye
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
import time
from collections.abc import Callable
from typing import Any

import trio
import trustme
import uvloop

import kernel
from kernel.net.streams import SocketStream
from kernel.net.tls import SSLStream
from kernel.socket import from_stdlib_socket

KIB = 1024
HOST = "example.test"
ROUNDS = 5

authority = trustme.CA()
server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
authority.issue_cert(HOST).configure_cert(server_context)
client_context = ssl.create_default_context()
authority.configure_trust(client_context)


# ---- kernel and trio: the same program -----------------------------------------------------------------


class TrioLike:
    def __init__(self, library: Any, ssl_stream: Any, socket_stream: Callable[[socket.socket], Any]) -> None:
        self.library = library
        self.ssl_stream = ssl_stream
        self.socket_stream = socket_stream

    def run(self, workload: str, size: int, times: int) -> float:
        result: float = self.library.run(getattr(self, workload), size, times)
        return result

    def pair(self) -> tuple[Any, Any]:
        here, there = map(self.socket_stream, socket.socketpair())
        return (
            self.ssl_stream(here, client_context, server_hostname=HOST),
            self.ssl_stream(there, server_context, server_side=True),
        )

    async def echo(self, size: int, times: int) -> float:
        client, server = self.pair()
        data = bytes(size)

        async def serve() -> None:
            async with server:
                async for chunk in server:
                    await server.send_all(chunk)

        async def receive() -> None:
            got = 0
            while got < size:
                got += len(await client.receive_some(65536))

        async def talk(times: int) -> None:
            for _ in range(times):
                if size <= 64 * KIB:
                    await client.send_all(data)
                    await receive()
                else:
                    async with self.library.open_nursery() as both:
                        both.start_soon(client.send_all, data)
                        both.start_soon(receive)

        async with client, self.library.open_nursery() as nursery:
            nursery.start_soon(serve)
            await talk(10)
            start = time.process_time()
            await talk(times)
            seconds = time.process_time() - start
            await client.aclose()
        return seconds / times

    async def handshake(self, size: int, times: int) -> float:
        start = time.process_time()
        for _ in range(times):
            client, server = self.pair()
            async with client, server, self.library.open_nursery() as nursery:
                nursery.start_soon(client.do_handshake)
                nursery.start_soon(server.do_handshake)
        return (time.process_time() - start) / times


# ---- asyncio and uvloop --------------------------------------------------------------------------------


class AsyncioLike:
    def __init__(self, run: Callable[[Any], Any]) -> None:
        self._run = run

    def run(self, workload: str, size: int, times: int) -> float:
        result: float = self._run(getattr(self, workload)(size, times))
        return result

    async def pair(self) -> tuple[Any, Any]:
        here, there = socket.socketpair()
        loop = asyncio.get_running_loop()

        async def wrap(sock: socket.socket, *, server: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader = asyncio.StreamReader()
            protocol = asyncio.StreamReaderProtocol(reader)
            if server:
                transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock, ssl=server_context)
            else:
                transport, _ = await loop.create_connection(
                    lambda: protocol, sock=sock, ssl=client_context, server_hostname=HOST
                )
            return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

        client, server = await asyncio.gather(wrap(here, server=False), wrap(there, server=True))
        return client, server

    async def echo(self, size: int, times: int) -> float:
        (reader, writer), (server_reader, server_writer) = await self.pair()
        data = bytes(size)

        async def serve() -> None:
            while chunk := await server_reader.read(65536):
                server_writer.write(chunk)
                await server_writer.drain()
            server_writer.close()

        async def receive() -> None:
            got = 0
            while got < size:
                got += len(await reader.read(65536))

        async def send() -> None:
            writer.write(data)
            await writer.drain()

        async def talk(times: int) -> None:
            for _ in range(times):
                if size <= 64 * KIB:
                    await send()
                    await receive()
                else:
                    await asyncio.gather(send(), receive())

        server = asyncio.create_task(serve())
        await talk(10)
        start = time.process_time()
        await talk(times)
        seconds = time.process_time() - start
        writer.close()
        await server
        return seconds / times

    async def handshake(self, size: int, times: int) -> float:
        start = time.process_time()
        for _ in range(times):
            (_, one), (_, two) = await self.pair()
            one.close()
            two.close()
            await asyncio.gather(one.wait_closed(), two.wait_closed(), return_exceptions=True)
        return (time.process_time() - start) / times


# ---- the limit -----------------------------------------------------------------------------------------


class Limit:
    """The calls that cannot be done without, and nothing else."""

    class End:
        def __init__(self, sock: socket.socket, context: ssl.SSLContext, **kwargs: Any) -> None:
            self.sock = sock
            self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            self.tls = context.wrap_bio(self.incoming, self.outgoing, **kwargs)

        def shake(self) -> None:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                pass
            self.flush()

        def flush(self) -> None:
            if self.outgoing.pending:
                self.sock.sendall(self.outgoing.read())

        def send(self, data: bytes) -> None:
            self.tls.write(data)
            self.flush()

        def feed(self) -> None:
            self.incoming.write(self.sock.recv(65536))

        def receive(self, size: int) -> None:
            got = 0
            while got < size:
                try:
                    got += len(self.tls.read(65536))
                except ssl.SSLWantReadError:
                    self.feed()

    def pair(self) -> tuple[End, End]:
        here, there = socket.socketpair()
        return (
            self.End(here, client_context, server_hostname=HOST),
            self.End(there, server_context, server_side=True),
        )

    def handshake_of(self, client: End, server: End) -> None:
        client.shake()
        server.feed()
        server.shake()
        client.feed()
        client.shake()
        server.feed()
        server.shake()

    def run(self, workload: str, size: int, times: int) -> float:
        start = time.process_time()
        if workload == "handshake":
            for _ in range(times):
                client, server = self.pair()
                self.handshake_of(client, server)
                client.sock.close()
                server.sock.close()
            return (time.process_time() - start) / times
        client, server = self.pair()
        self.handshake_of(client, server)
        piece = min(size, 64 * KIB)
        data = bytes(piece)
        start = time.process_time()
        for _ in range(times * size // piece):
            client.send(data)
            server.receive(piece)
            server.send(data)
            client.receive(piece)
        seconds = time.process_time() - start
        client.sock.close()
        server.sock.close()
        return seconds / times


CONTENDERS: dict[str, Any] = {
    "kernel": TrioLike(kernel, SSLStream, lambda sock: SocketStream(from_stdlib_socket(sock))),
    "trio": TrioLike(trio, trio.SSLStream, lambda sock: trio.SocketStream(trio.socket.from_stdlib_socket(sock))),
    "asyncio": AsyncioLike(asyncio.run),
    "uvloop": AsyncioLike(uvloop.run),
    "limit": Limit(),
}
WORKLOADS = [
    ("1 x 1 KiB", "echo", KIB), ("1 x 64 KiB", "echo", 64 * KIB), ("1 MiB", "echo", KIB * KIB),
    ("handshake", "handshake", 0),
]  # fmt: skip


def main(seconds: float) -> None:
    print(f"CPython {sys.version.split()[0]}, {ssl.OPENSSL_VERSION}; us of CPU time (times the kernel's)")
    for title, workload, size in WORKLOADS:
        best = dict.fromkeys(CONTENDERS, float("inf"))
        for _ in range(ROUNDS):
            for name, contender in CONTENDERS.items():
                guess = min(best[name], 0.002)
                times = max(3, int(seconds / ROUNDS / guess))
                best[name] = min(best[name], contender.run(workload, size, times))
        row = "   ".join(f"{name} {best[name] * 1e6:.0f} ({best[name] / best['kernel']:.2f})" for name in best)
        print(f"{title:<12}{row}")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
