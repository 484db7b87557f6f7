"""An echo server and its clients: real TCP on loopback, raw non-blocking sockets, and the readiness traps.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/echo.py

The kernel knows nothing of sockets but two traps, `wait_readable(sock)` and `wait_writable(sock)`, and one plain
function, `notify_closing(sock)`. The first part of this file makes the usual operations out of them. Each is a loop of
two steps, wait and then try, because readiness is a hint: the attempt may still raise `BlockingIOError`.

The second part is the server: a nursery with one task per connection. The third is its five guests. One says when it
has sent all, one sends more than the buffers hold, one hangs up while it is reading, one loses patience, and one stays
until the server is told to leave. Nothing is left running in the end, as every task lives in a block that waits for it.

Which guest is served first is up to the network. So they report into a book, which is printed in order of name.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import kernel
from kernel.lowlevel import ParkingLot, checkpoint, notify_closing, wait_readable, wait_writable

Address = tuple[str, int]

# ---- sockets: wait, then try -----------------------------------------------------------------------


async def accept(listener: socket.socket) -> socket.socket:
    while True:
        await wait_readable(listener)
        with suppress(BlockingIOError, ConnectionAbortedError):  # the peer may be gone again by now
            connection, _ = listener.accept()
            connection.setblocking(False)
            return connection


async def connect(address: Address) -> socket.socket:
    sock = socket.socket()
    try:
        sock.setblocking(False)
        with suppress(BlockingIOError):  # EINPROGRESS: the handshake has begun
            sock.connect(address)
        await wait_writable(sock)
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
    except BaseException:  # Cancelled too: nobody else knows of this socket yet
        hang_up(sock)
        raise
    return sock


async def receive(sock: socket.socket) -> bytes:
    """Some bytes, at least one; none at all means that the peer will send no more."""
    while True:
        await wait_readable(sock)
        with suppress(BlockingIOError):
            return sock.recv(65536)


async def send_all(sock: socket.socket, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        await wait_writable(sock)
        with suppress(BlockingIOError):
            rest = rest[sock.send(rest) :]  # the system takes what it has room for


def hang_up(sock: socket.socket) -> None:
    """Close, and first wake whoever waits on the socket, as the system would not. A second time it does nothing."""
    if sock.fileno() >= 0:
        notify_closing(sock)
        sock.close()


@contextmanager
def hanging_up(sock: socket.socket) -> Iterator[socket.socket]:
    try:
        yield sock
    finally:
        hang_up(sock)


# ---- the server ----------------------------------------------------------------------------------


async def serve(*, task_status: kernel.TaskStatus[tuple[Address, kernel.CancelScope]]) -> None:
    """Echo until cancelled. Reports the address, and the scope to cancel, once it listens."""
    listener = socket.create_server(("127.0.0.1", 0))  # port 0: one that is free
    listener.setblocking(False)
    with hanging_up(listener):
        async with kernel.open_nursery() as connections:
            print("server: open")
            task_status.started((listener.getsockname(), connections.cancel_scope))
            try:
                while True:
                    connection = await accept(listener)
                    connections.start_soon(echo, connection)
                    print(f"server: connections: {len(connections.child_tasks)}")
            except kernel.Cancelled as cancelled:
                print(f"server: told to leave, {cancelled.reason!r}")
                raise
    print("server: closed")


async def echo(connection: socket.socket) -> None:
    with hanging_up(connection), suppress(ConnectionError):  # a guest who ran away gets no answer
        while data := await receive(connection):
            await send_all(connection, data)


# ---- the guests ----------------------------------------------------------------------------------


class Party:
    """What the guests share: where to go, for whom to wait, and a book to write in."""

    def __init__(self, address: Address, guests: int) -> None:
        self.address = address
        self.missing = guests
        self.door = ParkingLot("all guests to arrive")
        self.book: dict[str, str] = {}

    async def arrive(self) -> socket.socket:
        """Connect, get one echo, and wait for the others, so that all are really served at the same time."""
        sock = await connect(self.address)
        try:
            await ask(sock, b"hello")
            self.missing -= 1
            if self.missing:
                await self.door.park()
            else:
                self.door.unpark_all()
        except BaseException:
            hang_up(sock)
            raise
        return sock


async def ask(sock: socket.socket, question: bytes) -> None:
    """Send a question and read until all of it has come back. TCP keeps the order, not the pieces."""
    await send_all(sock, question)
    answer = b""
    while len(answer) < len(question):
        answer += await receive(sock)
    assert answer == question


async def ada(party: Party) -> None:
    """Asks, says that it will send no more, and sees the server hang up in turn."""
    with hanging_up(await party.arrive()) as sock:
        for question in (b"who?", b"how?", b"why?"):
            await ask(sock, question)
        sock.shutdown(socket.SHUT_WR)
        end = await receive(sock)
    party.book["ada"] = f"3 questions, 3 answers, and then {end!r}"


async def bob(party: Party) -> None:
    """Sends more than fits into all buffers on the way. Without a second task that reads, both ends would be stuck."""
    data = bytes(range(256)) * 65536
    returned = bytearray()
    with hanging_up(await party.arrive()) as sock:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(send_all, sock, data)
            while len(returned) < len(data):
                returned += await receive(sock)
    party.book["bob"] = (
        f"{len(data) >> 20} MiB sent while they came back, {'intact' if returned == data else 'spoiled'}"
    )


async def cyd(party: Party) -> None:
    """Hangs up while another of its tasks is reading. That task gets an error, and does not sleep for ever."""

    async def listen(sock: socket.socket) -> None:
        try:
            await receive(sock)
        except kernel.ClosedResourceError as error:
            party.book["cyd"] = f"hung up, and the reader got {type(error).__name__}"

    sock = await party.arrive()
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(listen, sock)
        await checkpoint()  # let it begin to read
        hang_up(sock)


async def dan(party: Party) -> None:
    """Waits for a word of the server's own, but not for long."""
    with hanging_up(await party.arrive()) as sock, kernel.move_on_after(0.1) as patience:
        await receive(sock)
    party.book["dan"] = "lost patience after 0.1 s" if patience.cancelled_caught else "got an answer to nothing"


async def eve(party: Party) -> None:
    """Stays for as long as the server does."""
    with hanging_up(await party.arrive()) as sock:
        end = await receive(sock)
    party.book["eve"] = f"stayed until the server hung up: {end!r}"


# ---- both ----------------------------------------------------------------------------------------


async def main() -> None:
    async with kernel.open_nursery() as house:
        address, opening_hours = await house.start(serve)
        party = Party(address, guests=5)
        house.start_soon(eve, party)
        async with kernel.open_nursery() as guests:
            for guest in (ada, bob, cyd, dan):
                guests.start_soon(guest, party)
        for name, line in sorted(party.book.items()):
            print(f"{name}: {line}")
        opening_hours.cancel(reason="closing time")
    print(f"eve: {party.book['eve']}")


if __name__ == "__main__":
    kernel.run(main)
