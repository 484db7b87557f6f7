"""A barrier is overtaken by its own next round.

The last to come sets the counter back to 0 and wakes the others, who look whether it is 0. But the last one is quick,
comes back for the next round, and makes it 1. Those who were woken look now, and go back to sleep in a round that is
over; the quick one waits for them in the next.

Do not ask "is it 0?", ask "is it still my round?". What one waits for must not be undone by what comes after.

Seen in Zephyr's `pthread_barrier_wait` (zephyrproject-rtos/zephyr#119000) and in Microsoft's `AsyncBarrier`
(microsoft/vs-threading#90). "The Little Book of Semaphores" has a chapter on it, with two solutions that are none.
"""

from __future__ import annotations

import kernel
from kernel.lowlevel import ParkingLot, checkpoint

ERROR = kernel.Deadlock


class NaiveBarrier:
    """For two."""

    def __init__(self) -> None:
        self.count = 0
        self.lot = ParkingLot("the next round")

    async def wait(self) -> None:
        self.count += 1
        if self.count == 2:
            self.count = 0
            self.lot.unpark_all()
        while self.count != 0:
            await self.lot.park()


class Barrier(NaiveBarrier):
    def __init__(self) -> None:
        super().__init__()
        self.round = 0

    async def wait(self) -> None:
        mine = self.round
        self.count += 1
        if self.count == 2:
            self.count = 0
            self.round += 1
            self.lot.unpark_all()
        while self.round == mine:
            await self.lot.park()


async def story(barrier: NaiveBarrier) -> None:
    async def runner() -> None:
        await barrier.wait()
        await checkpoint()  # works
        await barrier.wait()

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(runner, name="ann")
        nursery.start_soon(runner, name="ben")


async def buggy() -> None:
    await story(NaiveBarrier())


async def correct() -> None:
    await story(Barrier())
