"""A cancelled `wait` comes back without the lock.

`Condition.wait` promises that the lock is held when it ends. It takes it back in a `finally`, and that is an `await`
like any other: in a cancelled scope it raises at once. The code around it believes that it holds the lock, changes what
it protects, and releases it: a second time, or somebody else's.

What must be done on the way out of a cancellation needs a shield.

asyncio's `Condition` once did this (python/asyncio#346). With a shield it is not prompt any more: it waits for the lock
before it can leave. That is what its users rely on.
"""

from __future__ import annotations

import kernel
from kernel.lowlevel import ParkingLot, checkpoint

ERROR = RuntimeError


class NaiveCondition:
    def __init__(self) -> None:
        self.lock = kernel.Lock()
        self.lot = ParkingLot("notifications")

    async def wait(self) -> None:
        self.lock.release()
        try:
            await self.lot.park()
        finally:
            await self.lock.acquire()


class Condition(NaiveCondition):
    async def wait(self) -> None:
        self.lock.release()
        try:
            await self.lot.park()
        finally:
            with kernel.CancelScope(shield=True):
                await self.lock.acquire()


async def story(condition: NaiveCondition) -> None:
    patience = kernel.CancelScope()

    async def waiter() -> None:
        with patience:
            async with condition.lock:
                await condition.wait()

    async def notifier() -> None:
        async with condition.lock:
            condition.lot.unpark()

    async def canceller() -> None:
        await checkpoint()
        patience.cancel()

    async with kernel.open_nursery() as nursery:
        for task in (waiter, notifier, canceller):
            nursery.start_soon(task, name=task.__name__)


async def buggy() -> None:
    await story(NaiveCondition())


async def correct() -> None:
    await story(Condition())
