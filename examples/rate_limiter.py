"""A rate limiter: a burst of requests is smoothed before it reaches a server that would turn it away.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/rate_limiter.py

Twelve clients want something at the same moment, and four more come later. The server stands 2 requests per second.
Three ways to treat them, and what the server sees, one column for half a second:

* *Nothing.* All twelve arrive at once.
* *A bucket.* 2 per second on average, and up to 3 at once after a quiet time. It needs a lock and one number. Each
  waits in the row for the lock; the first in the row has the lock and sleeps until it is time. So it is first come,
  first served, no task is needed that fills anything, and who gives up while waiting has used up nothing.
* *A window.* No more than 4 within any 2 seconds. It is a `CapacityLimiter` whose tokens come back by the clock, and
  not when the work is done. They are borrowed on behalf of an object, as another task brings them back. The average is
  the same as the bucket's; the server sees steps.

Time is virtual: whenever all wait, the clock jumps.
"""

from contextlib import AbstractAsyncContextManager, nullcontext
from math import inf

import kernel


class Bucket:
    """`rate` per second, and up to `burst` at once if it has been quiet for long enough.

    The usual description is a bucket of `burst` tokens into which a new one drops every `1 / rate` seconds. There is no
    need to count: that the bucket will be full at time `_full` says the same, and needs no update as time goes by.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self._interval = 1 / rate
        self._slack = (burst - 1) / rate
        self._full = -inf
        self._turn = kernel.Lock()

    async def __aenter__(self) -> None:
        async with self._turn:
            await kernel.sleep_until(self._full - self._slack)  # then there is one token, or more
            self._full = max(self._full, kernel.current_time()) + self._interval

    async def __aexit__(self, *exc_info: object) -> None:
        pass


class Window:
    """No more than `most` within any `seconds`. `nursery` is where the tokens are timed."""

    def __init__(self, most: int, seconds: float, nursery: kernel.Nursery) -> None:
        self._limiter = kernel.CapacityLimiter(most)
        self._seconds = seconds
        self._nursery = nursery

    async def __aenter__(self) -> None:
        ticket = object()
        await self._limiter.acquire_on_behalf_of(ticket)
        self._nursery.start_service_soon(self._bring_back, ticket)  # a service: the nursery does not wait for it

    async def _bring_back(self, ticket: object) -> None:
        await kernel.sleep(self._seconds)
        self._limiter.release_on_behalf_of(ticket)

    async def __aexit__(self, *exc_info: object) -> None:
        pass


class Server:
    """Counts what arrives in each half of a second."""

    def __init__(self) -> None:
        self.began = kernel.current_time()
        self.seen = [0] * 20

    async def request(self) -> None:
        self.seen[int((kernel.current_time() - self.began) * 2)] += 1
        await kernel.sleep(0.2)


async def clients(name: str, server: Server, limit: AbstractAsyncContextManager[None]) -> None:
    async def client(number: int) -> None:
        await kernel.sleep(0 if number < 12 else 8)
        with kernel.move_on_after(2.5 if number == 9 else 60) as patience:
            async with limit:
                await server.request()
        if patience.cancelled_caught:
            print(f"  number {number} gave up at {kernel.current_time() - server.began:.1f} s")

    print(name)
    async with kernel.open_nursery() as nursery:
        for number in range(16):
            nursery.start_soon(client, number)
    print("  " + " ".join(str(count or ".").rjust(2) for count in server.seen))


async def main() -> None:
    await clients("Nothing", Server(), nullcontext())
    await clients("A bucket", Server(), Bucket(rate=2, burst=3))
    async with kernel.open_nursery() as nursery:
        await clients("A window", Server(), Window(4, 2, nursery))


if __name__ == "__main__":
    kernel.run(main, clock=kernel.testing.MockClock(autojump_threshold=0))
