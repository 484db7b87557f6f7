"""The same server in many styles: each sends back what it receives. `python echo_servers.py CONTENDER LIFETIME`.

Prints the number of the port, on 127.0.0.1, and serves until it is killed, or for LIFETIME seconds.

Each is written as users of that library write it, by its own documentation, and where there are several ways, in the
fastest. TCP_NODELAY is set in all of them: by the library, or else by hand. What a library does for its users is what
is compared, so nobody leaves out what a real server needs, except for `epoll`: that one is the limit.
"""

from __future__ import annotations

import importlib.util
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

HOST = "127.0.0.1"
BACKLOG = 1024  # room for all that connect at once
SIZE = 65536  # how much is received at a time, where the server says


def tell(listener: socket.socket) -> None:
    print(listener.getsockname()[1], flush=True)


def listening_socket() -> socket.socket:
    listener = socket.create_server((HOST, 0), backlog=BACKLOG)
    listener.setblocking(False)
    tell(listener)
    return listener


# ---- by hand ----------------------------------------------------------------------------------------------


def epoll() -> None:
    """One callback per connection, and nothing else: the least that one can do in Python."""
    from select import EPOLLIN, EPOLLOUT
    from select import epoll as Epoll

    poller, callbacks = Epoll(), {}

    def accept() -> None:
        connection, _ = listener.accept()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        fd = connection.fileno()
        recv, send = connection.recv, connection.send
        rest = b""

        def echo() -> None:
            nonlocal rest
            try:
                data = rest or recv(SIZE)
                if data:
                    try:
                        sent = send(data)
                    except BlockingIOError:
                        sent = 0
                    if sent < len(data):  # nothing more is read until all of this is gone
                        if not rest:
                            poller.modify(fd, EPOLLOUT)
                        rest = data[sent:]
                    elif rest:
                        rest = b""
                        poller.modify(fd, EPOLLIN)
                    return
            except ConnectionError:
                pass
            del callbacks[fd]
            connection.close()

        callbacks[fd] = echo
        poller.register(fd, EPOLLIN)

    listener = listening_socket()
    callbacks[listener.fileno()] = accept
    poller.register(listener.fileno(), EPOLLIN)
    while True:
        for fd, _ in poller.poll():
            callbacks[fd]()


# ---- asyncio, uvloop, anyio ----------------------------------------------------------------------------------


async def protocols() -> None:
    import asyncio

    class Echo(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

    server = await asyncio.get_running_loop().create_server(Echo, HOST, 0, backlog=BACKLOG)
    tell(server.sockets[0])
    await server.serve_forever()


async def streams() -> None:
    import asyncio

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(SIZE):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, HOST, 0, backlog=BACKLOG)
    tell(server.sockets[0])
    await server.serve_forever()


def asyncio_protocols() -> None:
    import asyncio

    asyncio.run(protocols())


def asyncio_streams() -> None:
    import asyncio

    asyncio.run(streams())


def uvloop_protocols() -> None:
    import uvloop

    uvloop.run(protocols())


def uvloop_streams() -> None:
    import uvloop

    uvloop.run(streams())


def anyio_streams() -> None:
    """On asyncio, anyio's default."""
    import anyio

    async def echo(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            async for data in stream:
                await stream.send(data)

    async def main() -> None:
        listener = await anyio.create_tcp_listener(local_host=HOST, backlog=BACKLOG)
        print(listener.extra(anyio.abc.SocketAttribute.local_port), flush=True)
        await listener.serve(echo)

    anyio.run(main)


# ---- trio, curio ---------------------------------------------------------------------------------------------


def trio_streams() -> None:
    import trio

    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(
                lambda task_status: trio.serve_tcp(echo, 0, host=HOST, backlog=BACKLOG, task_status=task_status)
            )
            tell(listener.socket)

    trio.run(main)


def curio_streams() -> None:
    import curio

    async def echo(client: Any, address: Any) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = client.as_stream()
        while data := await stream.read(SIZE):
            await stream.write(data)

    async def main() -> None:
        listener = curio.network.tcp_server_socket(HOST, 0, backlog=BACKLOG)
        tell(listener)
        await curio.network.run_server(listener, echo)

    curio.run(main)


# ---- this package --------------------------------------------------------------------------------------------


def kernel_streams() -> None:
    async def echo(stream: Any) -> None:
        async for data in stream:
            await stream.send_all(data)

    _serve_kernel(echo)


def kernel_receive_some() -> None:
    """The same with a loop that asks."""

    async def echo(stream: Any) -> None:
        while data := await stream.receive_some():
            await stream.send_all(data)

    _serve_kernel(echo)


def _serve_kernel(echo: Callable[[Any], Any]) -> None:
    import kernel

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            listeners = await nursery.start(
                lambda task_status: kernel.serve_tcp(echo, 0, host=HOST, backlog=BACKLOG, task_status=task_status)
            )
            tell(listeners[0].socket)

    kernel.run(main)


def kernel_sockets() -> None:
    """Sockets with async methods, without streams."""
    import kernel

    async def echo(connection: Any) -> None:
        connection.setsockopt(kernel.socket.IPPROTO_TCP, kernel.socket.TCP_NODELAY, 1)
        with connection:
            while data := await connection.recv(SIZE):
                await connection.sendall(data)

    async def main() -> None:
        with kernel.socket.from_stdlib_socket(listening_socket()) as listener:
            async with kernel.open_nursery() as nursery:
                while True:
                    connection, _ = await listener.accept()
                    nursery.start_soon(echo, connection)

    kernel.run(main)


def kernel_readiness() -> None:
    """The standard library's sockets, and a task that asks when they are ready: what a first lesson might show."""
    import kernel
    from kernel.lowlevel import notify_closing, wait_readable, wait_writable

    async def echo(connection: socket.socket) -> None:
        with connection:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                await wait_readable(connection)
                data = connection.recv(SIZE)
                if not data:
                    break
                while data:
                    try:
                        data = data[connection.send(data) :]
                    except BlockingIOError:
                        await wait_writable(connection)
            notify_closing(connection)

    async def main() -> None:
        with listening_socket() as listener:
            async with kernel.open_nursery() as nursery:
                while True:
                    await wait_readable(listener)
                    connection, _ = listener.accept()
                    nursery.start_soon(echo, connection)

    kernel.run(main)


SERVERS: dict[str, Callable[[], None]] = {
    "epoll": epoll,
    "kernel": kernel_streams,
    "kernel-receive-some": kernel_receive_some,
    "kernel-sockets": kernel_sockets,
    "kernel-readiness": kernel_readiness,
    "uvloop-protocols": uvloop_protocols,
    "uvloop-streams": uvloop_streams,
    "asyncio-protocols": asyncio_protocols,
    "asyncio-streams": asyncio_streams,
    "trio": trio_streams,
    "curio": curio_streams,
    "anyio": anyio_streams,
}


def missing(name: str) -> str | None:
    """Why the contender cannot take part here, or None."""
    package = name.partition("-")[0]
    if package == "epoll":
        return None if sys.platform == "linux" else "epoll is of Linux"
    if package == "curio" and sys.version_info >= (3, 12):
        return "curio does not run on Python 3.12 and later"
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if name in ("kernel", "kernel-receive-some", "kernel-sockets"):
        import kernel

        needed = "socket" if name == "kernel-sockets" else "serve_tcp"
        return None if hasattr(kernel, needed) else f"this kernel has no {needed}"
    return None


def options(name: str) -> list[str]:
    """What the interpreter is started with. curio checks `task not in ready` at each wake-up, linear in the ready."""
    return ["-O"] if name == "curio" else []


if __name__ == "__main__":
    signal.alarm(int(sys.argv[2]))  # nobody catches this: the server ends by itself, whatever became of who started it
    SERVERS[sys.argv[1]]()
