"""One permit, two holders: a semaphore that is free for a moment while somebody waits for it.

`release` puts the permit back and wakes the first who waits, and that one takes it when it runs. In between the permit
lies there, and `acquire_nowait` finds it. Then the woken one takes it too, for that is what it was woken for.

So a permit is handed over, and never laid down while somebody waits: `release` gives it away in the same step.

Seen in anyio's `CapacityLimiter` (agronholm/anyio#1170), and in its `Semaphore`, where the woken one looked again and
`acquire` raised `WouldBlock` (agronholm/anyio#252).
"""

from __future__ import annotations

import kernel
from kernel.lowlevel import ParkingLot, checkpoint

ERROR = AssertionError


class NaiveSemaphore:
    def __init__(self) -> None:
        self.value = 1
        self.lot = ParkingLot("permits")

    def acquire_nowait(self) -> None:
        if self.value == 0:
            raise kernel.WouldBlock
        self.value -= 1

    async def acquire(self) -> None:
        if self.value == 0:
            await self.lot.park()
        self.value -= 1

    def release(self) -> None:
        self.value += 1
        self.lot.unpark()


class Semaphore(NaiveSemaphore):
    async def acquire(self) -> None:
        if self.value > 0:
            self.value -= 1
        else:
            await self.lot.park()  # who wakes us, gives us the permit

    def release(self) -> None:
        if not self.lot.unpark():
            self.value += 1


async def story(semaphore: NaiveSemaphore) -> None:
    inside = 0

    async def work() -> None:
        nonlocal inside
        inside += 1
        assert inside == 1, "two hold the one permit"
        await checkpoint()
        inside -= 1
        semaphore.release()

    async def patient() -> None:
        await semaphore.acquire()
        await work()

    async def impatient() -> None:
        try:
            semaphore.acquire_nowait()
        except kernel.WouldBlock:
            return
        await work()

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(patient, name="ann")
        nursery.start_soon(patient, name="ben")
        nursery.start_soon(impatient, name="cleo")


async def buggy() -> None:
    await story(NaiveSemaphore())


async def correct() -> None:
    await story(Semaphore())
