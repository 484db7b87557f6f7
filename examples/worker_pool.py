"""A worker pool that is shut down gracefully: what is under way is finished, in bounded time; nothing new is begun.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/worker_pool.py

Three workers develop films and put the prints into an archive. Each worker is in one of two states, and they differ in
what a shutdown means. While it waits for a film, it may go at once. While it has one in the bath, that one shall be
finished; but not if it takes all night. Points worth a look:

* *Who knows what.* The worker marks the code that should be finished: `with cleanup(inf)`. How long there is for it,
  only whoever stops the pool knows: `cancel(grace=5)`. Neither needs the other's number.
* *No flag.* There is no `self.stopping` that loops have to look at. A cancellation reaches the worker where it waits.
* *The archive is a service.* Workers need it to the last moment. A service lives until the other children of its
  nursery have ended, and is told to leave then; no cancellation from outside reaches it before. It is not inside the
  pool's scope, and so has time of its own for closing. There, it would have what the workers leave of the grace.
* *Every film has a fate.* It is finished; or it is not, and somebody says so; or it was still at the counter, and is
  given back; or it was not taken any more.

Time is virtual: whenever all wait, the clock jumps.
"""

from contextlib import suppress
from math import inf

import kernel
from kernel import TaskStatus

Film = tuple[str, float]  # whose it is, and the seconds it takes


def says(who: str, what: str) -> None:
    print(f"{kernel.current_time():4.1f} s  {who}: {what}")


class Archive:
    """Where prints go. It takes a while to open and to close."""

    is_open = False

    async def run(self, task_status: TaskStatus[None] = kernel.TASK_STATUS_IGNORED) -> None:
        await kernel.sleep(0.5)
        self.is_open = True
        says("archive", "open")
        task_status.started()
        try:
            await kernel.sleep_forever()
        finally:
            with kernel.cleanup(1):
                await kernel.sleep(0.5)
                self.is_open = False
                says("archive", "closed")

    async def keep(self, print_of: str) -> None:
        assert self.is_open
        await kernel.sleep(0.1)
        says("archive", f"has {print_of}")


class Pool:
    """Three workers, and a counter with room for two films."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._counter, self._films = kernel.open_memory_channel[Film](2)
        self._staff = kernel.CancelScope()

    async def bring(self, whose: str, seconds: float) -> None:
        """Leave a film at the counter; wait while that is full. Raises ClosedResourceError once the pool is stopped."""
        await self._counter.send((whose, seconds))

    def stop(self, grace: float) -> None:
        """Take no more films, and go home within `grace` seconds. (Closing alone would mean: when all is done.)"""
        self._counter.close()
        self._staff.cancel("closing time", grace=grace)

    async def run(self) -> list[str]:
        """Work until stopped. Returns whose films were left at the counter."""
        with self._staff:
            async with kernel.open_nursery() as nursery:
                for name in ("ann", "ben", "cat"):
                    nursery.start_soon(self._work, name)
        left = []
        with suppress(kernel.EndOfChannel):
            while True:
                left.append(self._films.receive_nowait()[0])
        return left

    async def _work(self, name: str) -> None:
        while True:
            whose, seconds = await self._films.receive()  # stopped here, it goes at once
            with kernel.cleanup(inf) as bath:  # and here, when the grace is over
                says(name, f"develops {whose}")
                await kernel.sleep(seconds)
                await self._archive.keep(whose)
            if bath.cancelled_caught:
                says(name, f"had no time to finish {whose}")


async def customer(pool: Pool, whose: str, comes_at: float, seconds: float) -> None:
    await kernel.sleep_until(comes_at)
    try:
        await pool.bring(whose, seconds)
    except kernel.ClosedResourceError:
        says(whose, "sent away")


async def main() -> None:
    archive = Archive()
    pool = Pool(archive)
    async with kernel.open_nursery() as nursery:
        await nursery.start_service(archive.run)
        staff = nursery.spawn(pool.run)
        for whose, comes_at, seconds in (
            ("Adams", 1, 2),
            ("Brandt", 1, 7),
            ("Cameron", 1, 60),
            ("Doisneau", 2, 4),
            ("Evans", 3, 1),
            ("Frank", 4, 1),
            ("Goldin", 5, 1),
            ("Hoepker", 7, 1),
        ):
            nursery.start_soon(customer, pool, whose, comes_at, seconds)
        await kernel.sleep_until(6)
        says("boss", "closing time, you have 5 seconds")
        pool.stop(grace=5)
        for whose in await staff:
            says("boss", f"gives {whose} the film back")
    says("boss", f"goes home, and the archive is {'open' if archive.is_open else 'closed'}")


if __name__ == "__main__":
    kernel.run(main, clock=kernel.testing.MockClock(autojump_threshold=0))
