"""Who is late misses the bell: an event that is set, and cleared again.

A gate opens for a moment and shuts. Who came before is let through, if it runs before the gate is shut again and looks
at a state that still says "open". Who was woken and comes to look afterwards sees a shut gate, and goes back to sleep.

A state that comes and goes cannot be waited for; that something has happened can. So count the openings, and wait for
the next one that you have not seen. Or make a new event for each.

trio has removed `Event.clear` for this (python-trio/trio#637).
"""

from __future__ import annotations

import kernel
from kernel.lowlevel import ParkingLot, checkpoint

ERROR = kernel.Deadlock


class NaiveGate:
    """Opens and shuts."""

    def __init__(self) -> None:
        self.is_open = False
        self.lot = ParkingLot("the gate")

    async def pulse(self) -> None:
        self.is_open = True
        self.lot.unpark_all()
        await checkpoint()  # time enough for all who wait, one should think
        self.is_open = False

    async def wait(self) -> None:
        while not self.is_open:
            await self.lot.park()


class Gate:
    """Counts how often it has opened."""

    def __init__(self) -> None:
        self.openings = 0
        self.lot = ParkingLot("the gate")

    async def pulse(self) -> None:
        self.openings += 1
        self.lot.unpark_all()
        await checkpoint()

    async def wait(self, seen: int = 0) -> None:
        while self.openings == seen:
            await self.lot.park()


async def story(gate: NaiveGate | Gate) -> None:
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(gate.wait, name="ann")
        nursery.start_soon(gate.pulse, name="keeper")


async def buggy() -> None:
    await story(NaiveGate())


async def correct() -> None:
    await story(Gate())
