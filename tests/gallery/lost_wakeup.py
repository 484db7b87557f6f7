"""A wake-up that comes between the look and the sleep.

A worker looks for work, finds none, writes a line into its log, and goes to sleep. The work comes while it writes.
Nobody sleeps yet, so the bell rings for nobody; then the worker goes to sleep, and nothing will ever wake it.

The rule is older than most programs: nothing may happen between the look and the sleep. Where others run only at an
`await`, it is enough to have none there.

Seen in Poco's `NotificationQueue.wakeUpAll` (pocoproject/poco#5213) and in Arroyo's bounded queue, where a pipeline
stood still for it (ArroyoSystems/arroyo#1017).
"""

from __future__ import annotations

from collections import deque

import kernel
from kernel.lowlevel import ParkingLot

ERROR = kernel.Deadlock


class Inbox:
    """Work for one worker."""

    def __init__(self) -> None:
        self.work: deque[str] = deque()
        self.lot = ParkingLot("work")

    def put(self, item: str) -> None:
        self.work.append(item)
        self.lot.unpark()

    async def get(self) -> str:
        while not self.work:
            await self.lot.park()
        return self.work.popleft()


class NaiveInbox(Inbox):
    def __init__(self) -> None:
        super().__init__()
        self.log = kernel.Lock()

    async def get(self) -> str:
        while not self.work:
            async with self.log:
                pass  # writes "idle"
            await self.lot.park()
        return self.work.popleft()


async def story(inbox: Inbox) -> None:
    async def producer() -> None:
        inbox.put("a letter")

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(inbox.get, name="worker")
        nursery.start_soon(producer, name="producer")


async def buggy() -> None:
    await story(NaiveInbox())


async def correct() -> None:
    await story(Inbox())
