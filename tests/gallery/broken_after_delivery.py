"""`send` fails, though the value has arrived.

A sender waits until a receiver has taken its value, or until the last receiver is gone. When it wakes it must find out
which of the two it was, and asks whether there are receivers left. But the receiver took the value, was content, and
closed its end, all before the sender came to run. The sender reports an error, and its caller may well send the value a
second time, somewhere else.

When you wake, do not ask what the world looks like now. Ask what has happened to you; who wakes you, knows.

Seen in anyio (agronholm/anyio#186). The other way round it was no better: asking "was it taken?" by the value's truth,
it reported success for a 0 that nobody had got (agronholm/anyio#731).
"""

from __future__ import annotations

from collections import deque

import kernel
from kernel.lowlevel import ParkingLot, checkpoint

ERROR = kernel.BrokenResourceError


class Offer:
    def __init__(self, value: object) -> None:
        self.value = value
        self.taken = False
        self.over = kernel.Event()


class NaiveChannel:
    """Without a buffer: `send` waits for a receiver."""

    def __init__(self) -> None:
        self.open = True
        self.offers: deque[Offer] = deque()
        self.receivers = ParkingLot("offers")

    async def send(self, value: object) -> None:
        offer = Offer(value)
        self.offers.append(offer)
        self.receivers.unpark()
        await offer.over.wait()
        if not self.arrived(offer):
            raise kernel.BrokenResourceError

    def arrived(self, offer: Offer) -> bool:
        return self.open

    async def receive(self) -> object:
        while not self.offers:
            await self.receivers.park()
        offer = self.offers.popleft()
        offer.taken = True
        offer.over.set()
        return offer.value

    def close(self) -> None:
        self.open = False
        for offer in self.offers:
            offer.over.set()


class Channel(NaiveChannel):
    def arrived(self, offer: Offer) -> bool:
        return offer.taken


async def story(channel: NaiveChannel) -> None:
    async def receiver() -> None:
        assert await channel.receive() == 0
        await checkpoint()  # makes use of it
        channel.close()

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(channel.send, 0, name="sender")
        nursery.start_soon(receiver, name="receiver")


async def buggy() -> None:
    await story(NaiveChannel())


async def correct() -> None:
    await story(Channel())
