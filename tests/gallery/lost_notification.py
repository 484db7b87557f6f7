"""A notification dies with the one that got it.

Two wait for the newspaper. It comes, and `notify` wakes one of them, who is to wake the next when it has read it. It
must still get the lock, and while it waits for that it is cancelled, and leaves. The newspaper lies there, the other
one would like to have it, and nobody will tell it.

Who leaves with a notification unused must pass it on.

Seen in asyncio's `Condition` (python/cpython#112202) and in anyio's (agronholm/anyio#1075).
"""

from __future__ import annotations

from collections import deque

import kernel
from kernel.lowlevel import checkpoint

ERROR = kernel.Deadlock


class NaiveCondition:
    def __init__(self) -> None:
        self.lock = kernel.Lock()
        self.waiting: deque[kernel.Event] = deque()

    async def wait(self) -> None:
        notified = kernel.Event()
        self.waiting.append(notified)
        self.lock.release()
        try:
            await notified.wait()
            await self.lock.acquire()
        except kernel.Cancelled:
            with kernel.CancelScope(shield=True):
                await self.lock.acquire()
            self.cancelled(notified)
            raise

    def cancelled(self, notified: kernel.Event) -> None:
        if not notified.is_set():
            self.waiting.remove(notified)

    def notify(self) -> None:
        if self.waiting:
            self.waiting.popleft().set()


class Condition(NaiveCondition):
    def cancelled(self, notified: kernel.Event) -> None:
        super().cancelled(notified)
        if notified.is_set():
            self.notify()


async def story(condition: NaiveCondition) -> None:
    newspaper: list[str] = []
    patience = kernel.CancelScope()

    async def reader() -> None:
        async with condition.lock:
            while not newspaper:
                await condition.wait()
            condition.notify()  # has read it, the next one may

    async def ann() -> None:
        with patience:
            await reader()

    async def boy() -> None:
        async with condition.lock:
            newspaper.append("the news")
            condition.notify()

    async def canceller() -> None:
        await checkpoint()
        patience.cancel()

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(ann, name="ann")
        nursery.start_soon(reader, name="ben")
        nursery.start_soon(boy, name="newspaper boy")
        nursery.start_soon(canceller, name="canceller")


async def buggy() -> None:
    await story(NaiveCondition())


async def correct() -> None:
    await story(Condition())
