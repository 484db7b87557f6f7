"""The echo server of echo.py once more, in plain generators: no `async`, no `await`.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/echo_generators.py

It prints what echo.py prints, and the two files differ as little as they can. To come from one to the other:

    async def f(): ...                          def f(): ...
    await g()                                   yield from g()
    async with open_nursery() as nursery: ...   yield from within(open_nursery(), body)

where `body(nursery)` is a generator function of its own. Everything else stays: scopes are plain `with` blocks, errors
and `Cancelled` arrive at the `yield from`, `return` hands back a value. A function without any `yield from` in it is no
generator and cannot be a task. The kernel sees no difference: both kinds of tasks yield the same traps to it.
"""

import os
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import kernel
from kernel.lowlevel import ParkingLot, checkpoint, notify_closing, wait_readable, wait_writable

T = TypeVar("T")
Steps = Generator[Any, Any, T]  # what a generator function returns that ends with a T
Address = tuple[str, int]

# ---- sockets: wait, then try -----------------------------------------------------------------------


def accept(listener: socket.socket) -> Steps[socket.socket]:
    while True:
        yield from wait_readable(listener)
        with suppress(BlockingIOError, ConnectionAbortedError):  # the peer may be gone again by now
            connection, _ = listener.accept()
            connection.setblocking(False)
            return connection


def connect(address: Address) -> Steps[socket.socket]:
    sock = socket.socket()
    try:
        sock.setblocking(False)
        with suppress(BlockingIOError):  # EINPROGRESS: the handshake has begun
            sock.connect(address)
        yield from wait_writable(sock)
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
    except BaseException:  # Cancelled too: nobody else knows of this socket yet
        hang_up(sock)
        raise
    return sock


def receive(sock: socket.socket) -> Steps[bytes]:
    """Some bytes, at least one; none at all means that the peer will send no more."""
    while True:
        yield from wait_readable(sock)
        with suppress(BlockingIOError):
            return sock.recv(65536)


def send_all(sock: socket.socket, data: bytes) -> Steps[None]:
    rest = memoryview(data)
    while rest:
        yield from wait_writable(sock)
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


def serve(*, task_status: kernel.TaskStatus[tuple[Address, kernel.CancelScope]]) -> Steps[None]:
    """Echo until cancelled. Reports the address, and the scope to cancel, once it listens."""

    def take_connections(connections: kernel.Nursery) -> Steps[None]:
        print("server: open")
        task_status.started((listener.getsockname(), connections.cancel_scope))
        try:
            while True:
                connection = yield from accept(listener)
                connections.start_soon(echo, connection)
                print(f"server: connections: {len(connections.child_tasks)}")
        except kernel.Cancelled as cancelled:
            print(f"server: told to leave, {cancelled.reason!r}")
            raise

    listener = socket.create_server(("127.0.0.1", 0))  # port 0: one that is free
    listener.setblocking(False)
    with hanging_up(listener):
        yield from kernel.within(kernel.open_nursery(), take_connections)
    print("server: closed")


def echo(connection: socket.socket) -> Steps[None]:
    with hanging_up(connection), suppress(ConnectionError):  # a guest who ran away gets no answer
        while data := (yield from receive(connection)):
            yield from send_all(connection, data)


# ---- the guests ----------------------------------------------------------------------------------


class Party:
    """What the guests share: where to go, for whom to wait, and a book to write in."""

    def __init__(self, address: Address, guests: int) -> None:
        self.address = address
        self.missing = guests
        self.door = ParkingLot("all guests to arrive")
        self.book: dict[str, str] = {}

    def arrive(self) -> Steps[socket.socket]:
        """Connect, get one echo, and wait for the others, so that all are really served at the same time."""
        sock = yield from connect(self.address)
        try:
            yield from ask(sock, b"hello")
            self.missing -= 1
            if self.missing:
                yield from self.door.park()
            else:
                self.door.unpark_all()
        except BaseException:
            hang_up(sock)
            raise
        return sock


def ask(sock: socket.socket, question: bytes) -> Steps[None]:
    """Send a question and read until all of it has come back. TCP keeps the order, not the pieces."""
    yield from send_all(sock, question)
    answer = b""
    while len(answer) < len(question):
        answer += yield from receive(sock)
    assert answer == question


def ada(party: Party) -> Steps[None]:
    """Asks, says that it will send no more, and sees the server hang up in turn."""
    with hanging_up((yield from party.arrive())) as sock:
        for question in (b"who?", b"how?", b"why?"):
            yield from ask(sock, question)
        sock.shutdown(socket.SHUT_WR)
        end = yield from receive(sock)
    party.book["ada"] = f"3 questions, 3 answers, and then {end!r}"


def bob(party: Party) -> Steps[None]:
    """Sends more than fits into all buffers on the way. Without a second task that reads, both ends would be stuck."""
    data = bytes(range(256)) * 65536
    returned = bytearray()

    def exchange(nursery: kernel.Nursery) -> Steps[None]:
        nursery.start_soon(send_all, sock, data)
        while len(returned) < len(data):
            returned.extend((yield from receive(sock)))

    with hanging_up((yield from party.arrive())) as sock:
        yield from kernel.within(kernel.open_nursery(), exchange)
    party.book["bob"] = (
        f"{len(data) >> 20} MiB sent while they came back, {'intact' if returned == data else 'spoiled'}"
    )


def cyd(party: Party) -> Steps[None]:
    """Hangs up while another of its tasks is reading. That task gets an error, and does not sleep for ever."""

    def listen(sock: socket.socket) -> Steps[None]:
        try:
            yield from receive(sock)
        except kernel.ClosedResourceError as error:
            party.book["cyd"] = f"hung up, and the reader got {type(error).__name__}"

    def leave(nursery: kernel.Nursery) -> Steps[None]:
        nursery.start_soon(listen, sock)
        yield from checkpoint()  # let it begin to read
        hang_up(sock)

    sock = yield from party.arrive()
    yield from kernel.within(kernel.open_nursery(), leave)


def dan(party: Party) -> Steps[None]:
    """Waits for a word of the server's own, but not for long."""
    with hanging_up((yield from party.arrive())) as sock, kernel.move_on_after(0.1) as patience:
        yield from receive(sock)
    party.book["dan"] = "lost patience after 0.1 s" if patience.cancelled_caught else "got an answer to nothing"


def eve(party: Party) -> Steps[None]:
    """Stays for as long as the server does."""
    with hanging_up((yield from party.arrive())) as sock:
        end = yield from receive(sock)
    party.book["eve"] = f"stayed until the server hung up: {end!r}"


# ---- both ----------------------------------------------------------------------------------------


def main() -> Steps[None]:
    def evening(house: kernel.Nursery) -> Steps[Party]:
        address, opening_hours = yield from house.start(serve)
        party = Party(address, guests=5)
        house.start_soon(eve, party)
        yield from kernel.within(kernel.open_nursery(), receive_guests, party)
        for name, line in sorted(party.book.items()):
            print(f"{name}: {line}")
        opening_hours.cancel(reason="closing time")
        return party

    def receive_guests(guests: kernel.Nursery, party: Party) -> Steps[None]:
        for guest in (ada, bob, cyd, dan):
            guests.start_soon(guest, party)
        yield from checkpoint()  # nothing to wait for, but without a `yield` this would be a plain function

    party = yield from kernel.within(kernel.open_nursery(), evening)
    print(f"eve: {party.book['eve']}")


if __name__ == "__main__":
    kernel.run(main)
