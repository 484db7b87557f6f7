"""Two readers both want to write, and neither lets go.

A cache is read under the reading half of a lock. Who finds a value missing makes itself the writer, and for that waits
until the other readers have left, while staying one itself. Two who do this wait for each other.

An upgrade can't be granted to two. So there is either a third kind of lock, which only one may hold beside the readers;
or one leaves, comes back as a writer, and looks again, for the world has moved on.

Why Rust's parking_lot has no `upgrade` on a read lock: Amanieu/parking_lot#200. Why osquery has given it up:
osquery/osquery#4721.
"""

from __future__ import annotations

import kernel
from kernel.lowlevel import checkpoint

from .rwlock import ReadWriteLock

ERROR = kernel.Deadlock


class NaiveCache:
    def __init__(self) -> None:
        self.lock = ReadWriteLock()
        self.values: dict[str, str] = {}

    async def get(self, key: str) -> str:
        await self.lock.acquire_read()
        if await self.has(key):
            self.lock.release_read()
        else:
            while self.lock.readers > 1:
                await self.lock.lot.park()
            self.lock.release_read()
            self.lock.writing = True
            await self.compute(key)
            self.lock.release_write()
        return self.values[key]

    async def has(self, key: str) -> bool:
        await checkpoint()
        return key in self.values

    async def compute(self, key: str) -> None:
        await checkpoint()
        self.values[key] = key.upper()


class Cache(NaiveCache):
    async def get(self, key: str) -> str:
        await self.lock.acquire_read()
        missing = not await self.has(key)
        self.lock.release_read()
        if missing:
            await self.lock.acquire_write()
            if not await self.has(key):
                await self.compute(key)
            self.lock.release_write()
        return self.values[key]


async def story(cache: NaiveCache) -> None:
    async def ben() -> None:
        await checkpoint()  # comes a little later
        await cache.get("a")

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(cache.get, "a", name="ann")
        nursery.start_soon(ben, name="ben")


async def buggy() -> None:
    await story(NaiveCache())


async def correct() -> None:
    await story(Cache())
