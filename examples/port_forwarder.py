"""A port forwarder: what comes in at one port goes out to another one, in both directions, with both ends.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/port_forwarder.py

It forwards to a server of its own, and prints what clients come to see. With arguments it forwards until Ctrl-C:
`python examples/port_forwarder.py 8000 example.com 80`.

The forwarder is two loops per connection, and all that is difficult about it is how they end:

* *One direction ends, the other goes on.* When the client has sent all, the server must see that, and may still have
  much to say. So `send_eof`, and not `aclose`, follows a loop; the connection ends when both loops have.
* *A connection breaks.* Then the other loop has nobody left to serve. The error cancels it, through the nursery, and
  both connections are closed.
* *One side is faster than the other.* A loop does not receive before it has sent. So it is the slower side that sets
  the pace, by way of the system's buffers, and nothing piles up here.
"""

import hashlib
import sys
from collections.abc import Awaitable, Callable
from functools import partial

import kernel


async def copy(source: kernel.abc.Stream, sink: kernel.abc.HalfCloseableStream) -> None:
    async for chunk in source:
        await sink.send_all(chunk)
    await sink.send_eof()


async def forward(host: str, port: int, client: kernel.SocketStream) -> None:
    try:
        server = await kernel.open_tcp_stream(host, port)
    except OSError as error:
        print(f"forwarder: {type(error).__name__}")
        return  # and the client is hung up on
    async with server:
        try:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(copy, client, server)
                nursery.start_soon(copy, server, client)
        except* kernel.BrokenResourceError:
            pass  # one of the two is gone, and so is the other one now


# ---- to try it out -----------------------------------------------------------------------------------------


async def digest(stream: kernel.SocketStream) -> None:
    """A server that answers when it has heard all."""
    total = hashlib.sha256()
    async for chunk in stream:
        total.update(chunk)
    await stream.send_all(total.hexdigest().encode())


async def echo(stream: kernel.SocketStream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk)


async def ask(port: int, data: bytes) -> bytes:
    async with await kernel.open_tcp_stream("localhost", port) as stream:

        async def send() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(send)
            chunks = [chunk async for chunk in stream]
        return b"".join(chunks)


async def serve(nursery: kernel.Nursery, handler: Callable[[kernel.SocketStream], Awaitable[None]]) -> int:
    """Serve on a port that is free, and return it."""
    listeners = await nursery.start(partial(kernel.serve_tcp, handler, 0, host="localhost"))
    port: int = listeners[0].socket.getsockname()[1]
    return port


async def main() -> None:
    data = bytes(range(256)) * 65_536  # 16 MiB
    async with kernel.open_nursery() as nursery:
        for handler in (digest, echo):
            there = await serve(nursery, handler)
            here = await serve(nursery, partial(forward, "localhost", there))
            print(f"{handler.__name__}: {len(data) >> 20} MiB through the forwarder")
            answer = await ask(here, data)
            if handler is digest:
                print(f"  the answer came after the end: {answer.decode() == hashlib.sha256(data).hexdigest()}")
            else:
                print(f"  they came back at the same time, intact: {answer == data}")
        nobody = await kernel.open_tcp_listeners(0, host="localhost")
        port = nobody[0].socket.getsockname()[1]
        await nobody[0].aclose()
        here = await serve(nursery, partial(forward, "localhost", port))
        print("nobody at the other end")
        print(f"client: {await ask(here, b'')!r}")
        nursery.cancel_scope.cancel("all clients have been served")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        kernel.run(partial(kernel.serve_tcp, partial(forward, sys.argv[2], int(sys.argv[3])), int(sys.argv[1])))
    else:
        kernel.run(main)
