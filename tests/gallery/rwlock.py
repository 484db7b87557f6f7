"""A plain readers-writer lock, of which `upgrade` and `starved_writer` show two diseases. Not an exhibit itself."""

from __future__ import annotations

from kernel.lowlevel import ParkingLot


class ReadWriteLock:
    """Many readers at once, or one writer. A reader comes in whenever no writer is inside."""

    def __init__(self) -> None:
        self.readers = 0
        self.writing = False
        self.lot = ParkingLot("the lock")

    async def acquire_read(self) -> None:
        while self.writing:
            await self.lot.park()
        self.readers += 1

    def release_read(self) -> None:
        self.readers -= 1
        self.lot.unpark_all()

    async def acquire_write(self) -> None:
        while self.writing or self.readers:
            await self.lot.park()
        self.writing = True

    def release_write(self) -> None:
        self.writing = False
        self.lot.unpark_all()
