"""Two locks, taken in two orders.

Whoever logs takes the log's lock and then, to print what it logs, the disk's. Whoever works on the disk holds the
disk's lock and logs. Each holds what the other one waits for.

All who need two locks must take them in the same order. Often the second lock hides: here in a `__str__`.

This is how the installer of Fedora and Red Hat hung (rhinstaller/anaconda#7196, storaged-project/blivet#1500).
"""

from __future__ import annotations

import kernel

ERROR = kernel.Deadlock


async def use(first: kernel.Lock, second: kernel.Lock) -> None:
    async with first, second:
        pass


async def buggy() -> None:
    log, disk = kernel.Lock(), kernel.Lock()
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(use, log, disk, name="logger")
        nursery.start_soon(use, disk, log, name="worker")


async def correct() -> None:
    log, disk = kernel.Lock(), kernel.Lock()
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(use, disk, log, name="logger")
        nursery.start_soon(use, disk, log, name="worker")
