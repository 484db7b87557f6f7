"""Three philosophers, three forks, and each takes the left one first.

The circle needs all three of them to stop between their two forks. The more of them there are, the less likely a test
run is to show it: the schedules that fail become rarer, and there are ever more of those that do not.

The cure is an order. Two of three take their left fork first, the third has the lower number at its right.

Edsger W. Dijkstra set it as an examination question in 1965, with five tape drives.
"""

from __future__ import annotations

import kernel

ERROR = kernel.Deadlock


async def dinner(places: list[tuple[int, int]]) -> None:
    forks = [kernel.Lock() for _ in places]

    async def philosopher(first: int, second: int) -> None:
        async with forks[first], forks[second]:
            pass  # eats

    async with kernel.open_nursery() as nursery:
        for name, (first, second) in zip(("ann", "ben", "cleo"), places, strict=True):
            nursery.start_soon(philosopher, first, second, name=name)


async def buggy() -> None:
    await dinner([(0, 1), (1, 2), (2, 0)])


async def correct() -> None:
    await dinner([(0, 1), (1, 2), (0, 2)])
