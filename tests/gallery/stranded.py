"""A lock is given to one that has left, and those behind it wait for ever.

Each who waits has an event in a row; `release` sets the first one, and leaves the lock locked for its owner. One is
cancelled while it waits, and its event stays in the row. The lock will be handed to nobody, and kept.

Seen in asyncio's `Lock` (python/asyncio#393), in `trio.Queue` in its first years (python-trio/trio#553). The next
exhibit, `ghost_owner`, is the cure that is not enough.
"""

from __future__ import annotations

from collections import deque

import kernel
from kernel.lowlevel import checkpoint

ERROR = kernel.Deadlock


class NaiveLock:
    def __init__(self) -> None:
        self.locked = False
        self.waiting: deque[kernel.Event] = deque()

    async def acquire(self) -> None:
        if not self.locked:
            self.locked = True
            return
        turn = kernel.Event()
        self.waiting.append(turn)
        try:
            await turn.wait()
        except kernel.Cancelled:
            self.cancelled(turn)
            raise

    def cancelled(self, turn: kernel.Event) -> None:
        """Does not know that there is anything to do."""

    def release(self) -> None:
        if self.waiting:
            self.waiting.popleft().set()
        else:
            self.locked = False


class Lock(NaiveLock):
    def cancelled(self, turn: kernel.Event) -> None:
        if turn.is_set():
            self.release()  # it was given to us after the cancellation and before we came to run
        else:
            self.waiting.remove(turn)


async def story(lock: NaiveLock) -> None:
    patience = kernel.CancelScope()

    async def use() -> None:
        await lock.acquire()
        await checkpoint()
        lock.release()

    async def ben() -> None:
        with patience:
            await lock.acquire()
            lock.release()

    async def canceller() -> None:
        await checkpoint()
        await checkpoint()
        patience.cancel()

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(use, name="ann")
        nursery.start_soon(ben, name="ben")
        nursery.start_soon(use, name="cleo")
        nursery.start_soon(canceller, name="canceller")


async def buggy() -> None:
    await story(NaiveLock())


async def correct() -> None:
    await story(Lock())
