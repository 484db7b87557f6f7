"""An echo server and three clients, in as few lines as it takes: `serve_tcp`, `open_tcp_stream`, and streams.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/echo_streams.py

It does what echo.py does by hand with sockets and readiness traps. With a port as an argument it serves until Ctrl-C,
to be tried with `nc localhost 8000`.
"""

import sys

import kernel


async def echo(stream: kernel.SocketStream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk)


async def ask(port: int, name: str, answers: dict[str, bytes]) -> None:
    async with await kernel.open_tcp_stream("localhost", port) as stream:
        await stream.send_all(f"hello from {name}".encode())
        await stream.send_eof()
        answers[name] = b"".join([chunk async for chunk in stream])


async def main() -> None:
    async with kernel.open_nursery() as nursery:
        listeners = await nursery.start(kernel.serve_tcp, echo, 0)  # port 0: one that is free
        port = listeners[0].socket.getsockname()[1]
        answers: dict[str, bytes] = {}
        async with kernel.open_nursery() as clients:
            for name in ("ada", "bob", "cyd"):
                clients.start_soon(ask, port, name, answers)
        for name, answer in sorted(answers.items()):
            print(f"{name}: {answer.decode()}")
        nursery.cancel_scope.cancel("all clients have been served")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        kernel.run(kernel.serve_tcp, echo, int(sys.argv[1]))
    else:
        kernel.run(main)
