"""A chat room: what a guest says is heard by all guests, and one who does not listen holds up nobody.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/chat.py

It opens a room, brings a few guests of its own, prints what they hear, and closes. With a port as an argument it stays
open until Ctrl-C: `python examples/chat.py 8000`, and then `nc localhost 8000` in several terminals.

The room is a broadcast channel. Each guest has two tasks, one that takes from the connection and puts into the room,
and one that does the opposite. Points worth a look:

* *The slow guest.* Lines that he has not fetched wait in his own buffer of the channel. When that is full, he loses the
  oldest, and is told. `send` never waits. Behind the channel's buffer there is the system's, which we cannot take back
  from, so it is kept small.
* *Leaving.* A nursery ties the two tasks together. When the guest hangs up, the loop over his lines ends, and the other
  task is cancelled. When his connection breaks, the error does that.
* *Bounds.* A name has 20 bytes at most, a line 10,000, and the room 100 guests. The 101st waits at the door.
* *Closing time.* Cancelling the server ends all conversations. The grace is for saying so.
"""

import socket
import sys
from functools import partial

import kernel

Room = kernel.channels.BroadcastSendChannel[str]

LINE = 10_000


async def serve_guest(room: Room, stream: kernel.SocketStream) -> None:
    """One guest, as the server sees him."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    guest = kernel.BufferedStream(stream)
    name = (await guest.receive_line(max=20)).decode(errors="replace")
    try:
        await talk(room, guest, name)
    except* kernel.BrokenResourceError:
        pass  # he has hung up without a word
    await room.send(f"* {name} has left")


async def talk(room: Room, guest: kernel.BufferedStream[kernel.SocketStream], name: str) -> None:
    try:
        with room.subscribe() as news:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(tell, guest, news)
                await room.send(f"* {name} comes in")
                async for line in guest.lines(max=LINE, strict=False):
                    await room.send(f"{name}: {line.decode(errors='replace')}")
                nursery.cancel()
    except kernel.Cancelled:
        with kernel.cleanup(1):
            await say(guest, "* closing time")
        raise


async def tell(guest: kernel.abc.SendStream, news: kernel.channels.BroadcastReceiveChannel[str]) -> None:
    while True:
        try:
            line = await news.receive()
        except kernel.LaggedError:
            line = "* you were too slow, and have missed something"
        await say(guest, line)


async def say(stream: kernel.abc.SendStream, line: str) -> None:
    await stream.send_all(line.encode() + b"\n")


async def open_room(
    port: int, task_status: kernel.TaskStatus[list[kernel.SocketListener]] = kernel.TASK_STATUS_IGNORED
) -> None:
    room = kernel.open_broadcast_channel(20, slow="error")
    await kernel.serve_tcp(
        partial(serve_guest, room),
        port,
        host="localhost",
        max_connections=100,
        handler_errors="log",
        task_status=task_status,
    )


class Guest:
    """One guest, as he sees it himself."""

    def __init__(self, name: str, stream: kernel.SocketStream) -> None:
        self.name = name
        self.stream = kernel.BufferedStream(stream)

    async def say(self, line: str) -> None:
        await say(self.stream, line)

    async def hears(self) -> str:
        return (await self.stream.receive_line()).decode()


async def come(port: int, name: str) -> Guest:
    guest = Guest(name, await kernel.open_tcp_stream("localhost", port))
    await guest.say(name)
    assert await guest.hears() == f"* {name} comes in"
    return guest


async def heard(*guests: Guest) -> None:
    for guest in guests:
        print(f"  {guest.name} hears  {await guest.hears()}")


async def main() -> None:
    async with kernel.open_nursery() as nursery:
        listeners = await nursery.start(open_room, 0)
        port = listeners[0].socket.getsockname()[1]

        print("Two guests")
        ann = await come(port, "ann")
        ben = await come(port, "ben")
        await heard(ann)
        await ann.say("good evening")
        await heard(ann, ben)
        await ben.say("must go")
        await heard(ann, ben)
        await ben.stream.aclose()
        await heard(ann)

        print("One who does not listen")
        cyd = await come(port, "cyd")
        await heard(ann)
        count = 0
        for number in range(500):
            await ann.say(f"{number:03} {'bla ' * 2_000}")
            count += (await ann.hears()).startswith(f"ann: {number:03}")
        print(f"  ann hears all she has said: {count == 500}")
        while not (line := await cyd.hears()).startswith("*"):
            count -= 1
        print(f"  cyd hears less: {count > 0}")
        print(f"  cyd hears  {line}")
        while not (await cyd.hears()).startswith("ann: 499"):
            pass

        print("The end")
        nursery.cancel_scope.cancel("the room closes", grace=5)
        with kernel.cleanup(5):
            await heard(ann, cyd)
            for guest in (ann, cyd):
                await guest.stream.aclose()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        kernel.run(open_room, int(sys.argv[1]))
    else:
        kernel.run(main)
