"""An item is taken out of the queue, and its new owner is cancelled before it is told.

`get` takes the item, and then does one more thing that can be cancelled: it stores a receipt, it takes a lock, it
yields to be fair. If the cancellation comes there, the item is in no queue and in nobody's hands.

A cancelled operation must have done nothing. So what can be cancelled comes first, and the taking last.

Seen in Tornado's queue (tornadoweb/tornado#2826), asyncio's (python/asyncio#256), anyio's streams (agronholm/anyio#146)
and, where it lost messages of a messenger, in a loop around `select!` (marmot-protocol/mdk#712).
"""

from __future__ import annotations

from collections import deque

import kernel
from kernel.lowlevel import ParkingLot, checkpoint

ERROR = AssertionError


class Queue:
    def __init__(self) -> None:
        self.items: deque[str] = deque()
        self.lot = ParkingLot("items")

    def put(self, item: str) -> None:
        self.items.append(item)
        self.lot.unpark()

    async def get(self) -> str:
        await checkpoint()
        while not self.items:
            await self.lot.park()
        return self.items.popleft()


class NaiveQueue(Queue):
    async def get(self) -> str:
        while not self.items:
            await self.lot.park()
        item = self.items.popleft()
        await checkpoint()
        return item


async def story(queue: Queue) -> None:
    received: list[str] = []
    patience = kernel.CancelScope()

    async def consumer() -> None:
        with patience:
            received.append(await queue.get())

    async def producer() -> None:
        queue.put("the only copy")

    async def canceller() -> None:
        await checkpoint()
        await checkpoint()
        patience.cancel()

    async with kernel.open_nursery() as nursery:
        for task in (consumer, producer, canceller):
            nursery.start_soon(task, name=task.__name__)
    assert received or queue.items, "the item is nowhere"


async def buggy() -> None:
    await story(NaiveQueue())


async def correct() -> None:
    await story(Queue())
