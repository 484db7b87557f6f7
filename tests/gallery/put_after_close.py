"""A job is handed in while the door is being shut, and nobody will ever do it.

`submit` looks whether the workers still take jobs, waits for room in the queue, and puts the job there. The workers
were told to finish meanwhile; they have finished what there was and gone home. The job lies in the queue, and whoever
has handed it in waits for its end.

After each wait the world is a new one: look again, in the same step in which you act.

Elasticsearch's executors dropped jobs so (elastic/elasticsearch#104580, and #37700 before).
"""

from __future__ import annotations

from collections import deque

import kernel
from kernel.lowlevel import ParkingLot

ERROR = kernel.Deadlock


class NaiveWorkshop:
    """One worker, and room for one job in the queue."""

    def __init__(self) -> None:
        self.closed = False
        self.room = kernel.Semaphore(1)
        self.jobs: deque[kernel.Event] = deque()
        self.bell = ParkingLot("jobs")

    async def submit(self) -> None:
        """Hand a job in, and wait until it is done."""
        self.check()
        await self.room.acquire()
        await self.put()

    def check(self) -> None:
        if self.closed:
            raise kernel.ClosedResourceError

    async def put(self) -> None:
        done = kernel.Event()
        self.jobs.append(done)
        self.bell.unpark()
        await done.wait()

    async def work(self) -> None:
        while self.jobs or not self.closed:
            if self.jobs:
                done = self.jobs.popleft()
                self.room.release()
                done.set()
            else:
                await self.bell.park()

    def close(self) -> None:
        self.closed = True
        self.bell.unpark_all()


class Workshop(NaiveWorkshop):
    async def submit(self) -> None:
        self.check()
        await self.room.acquire()
        self.check()
        await self.put()


async def story(workshop: NaiveWorkshop) -> None:
    async def client() -> None:
        try:
            await workshop.submit()
        except kernel.ClosedResourceError:
            pass  # told so, and free to go elsewhere

    async def manager() -> None:
        workshop.close()

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(client, name="client")
        nursery.start_soon(workshop.work, name="worker")
        nursery.start_soon(manager, name="manager")


async def buggy() -> None:
    await story(NaiveWorkshop())


async def correct() -> None:
    await story(Workshop())
