"""A lock is given to one that is leaving: the cure of `stranded`, and why it is not enough.

The cancelled one takes its event out of the row now. But between the cancellation and the moment in which it runs, and
can do so, there is time. A `release` in between finds the event still in the row, sets it, and the lock belongs to a
task that is on its way out.

Either who leaves looks whether it was given the lock meanwhile, and passes it on. Or, better, it leaves the row at the
cancellation, and not when it comes to run: that is what the `abort` of a trap is for, and `ParkingLot` has one.

asyncio had it until 2017 (python/cpython#1031), and anyio until 2026 (agronholm/anyio#1145).
"""

from __future__ import annotations

import kernel
from kernel.lowlevel import ParkingLot

from .stranded import NaiveLock, story

ERROR = kernel.Deadlock


class BetterLock(NaiveLock):
    """Takes its event out of the row, if it is still there."""

    def cancelled(self, turn: kernel.Event) -> None:
        if turn in self.waiting:
            self.waiting.remove(turn)


class Lock(NaiveLock):
    """Sleeps in a parking lot."""

    def __init__(self) -> None:
        super().__init__()
        self.lot = ParkingLot("the lock")

    async def acquire(self) -> None:
        if self.locked:
            await self.lot.park()
        self.locked = True

    def release(self) -> None:
        if not self.lot.unpark():
            self.locked = False


async def buggy() -> None:
    await story(BetterLock())


async def correct() -> None:
    await story(Lock())
