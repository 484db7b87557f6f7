"""Readers overtake a writer that waits, and can go on doing so for ever.

A reader may come in while others read; why should it wait? But if readers come often enough, the room is never empty,
and the writer never gets in. Nothing is wrong at any moment, and so it shows in no test, only in production, as an
update that does not arrive.

First come, first served: a reader waits if a writer waits already.

Found in one audit in three async libraries of Rust: async-rs/async-std#705, asomers/futures-locks#34 and
rust-lang/futures-rs#2082. Courtois, Heymans and Parnas described both kinds in 1971.
"""

from __future__ import annotations

import kernel
from kernel.lowlevel import checkpoint

from .rwlock import ReadWriteLock

ERROR = AssertionError


class FairLock(ReadWriteLock):
    def __init__(self) -> None:
        super().__init__()
        self.writers_waiting = 0

    async def acquire_read(self) -> None:
        while self.writing or self.writers_waiting:
            await self.lot.park()
        self.readers += 1

    async def acquire_write(self) -> None:
        self.writers_waiting += 1
        try:
            await super().acquire_write()
        finally:
            self.writers_waiting -= 1


async def story(lock: ReadWriteLock) -> None:
    writer_waits = False

    async def reader() -> None:
        await lock.acquire_read()
        assert not writer_waits, "a reader has overtaken the writer"
        await checkpoint()
        lock.release_read()

    async def writer() -> None:
        nonlocal writer_waits
        writer_waits = True
        await lock.acquire_write()
        writer_waits = False
        lock.release_write()

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(reader, name="ann")
        nursery.start_soon(reader, name="ben")
        nursery.start_soon(writer, name="writer")


async def buggy() -> None:
    await story(ReadWriteLock())


async def correct() -> None:
    await story(FairLock())
