"""A crawler: workers that are both producers and consumers, and how such a program comes to its end.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/crawler.py

Three workers take addresses from a frontier, fetch the pages, and put the links they find back into the frontier. What
they fetched goes to one reader. The web is made up, and time is virtual: whenever all wait, the clock jumps. Points
worth a look:

* *The end.* A worker that finds the frontier empty cannot know whether it is over; another one may be about to add
  links. So the frontier counts the addresses that are known and not done yet. Whoever does the last one closes it, and
  with that all loops end: `async for` of the workers, since nothing more will come; then that of the reader, since each
  worker closes its end of the channel as it leaves. Nobody is cancelled, and nothing polls.
* *No lock.* "Was it seen? If not, remember it, count it, send it" has no `await` inside, so nobody gets in between.
* *Bounds.* Workers wait when the reader is slow: its channel has no buffer. The frontier has no bound, and must not
  have one. Its producers are its consumers; if all of them waited for room in it, there would never be any.
* *Failures.* A page that is missing or slow is news, and the crawl goes on. Any other exception is a bug. It would
  cancel all workers and come out of the nursery.

There is a shorter way, if a page may be a task: start a child for each link, and let a `CapacityLimiter` bound how many
fetch at once. The nursery then knows when the last one is done. docs/queues.md has it. Workers are the better choice
when each owns something that is dear, such as a connection or a browser.
"""

import math

import kernel

LINKS = {
    "/": ["/news", "/about", "/shop"],
    "/about": ["/", "/team"],
    "/news": ["/", "/news/1", "/news/2"],
    "/news/1": ["/news", "/old"],
    "/news/2": ["/news", "/slow"],
    "/shop": ["/", "/shop/cart"],
    "/shop/cart": ["/shop"],
    "/slow": [],
    "/team": ["/about"],
}
SECONDS = {"/shop": 3.0, "/slow": 60.0}
PATIENCE = 5.0
WORKERS = 3


class NotFound(Exception):
    """There is no such page."""


async def fetch(address: str) -> list[str]:
    """The links on a page."""
    await kernel.sleep(SECONDS.get(address, 1.0))
    if address not in LINKS:
        raise NotFound(address)
    return LINKS[address]


class Frontier:
    """Addresses to visit, each once, until there are none, and none is being visited that could lead to more."""

    def __init__(self) -> None:
        self._send, self.addresses = kernel.open_memory_channel[str](math.inf)
        self._seen: set[str] = set()
        self._pending = 0  # addresses that were added, and are not done

    def add(self, address: str) -> None:
        if address not in self._seen:
            self._seen.add(address)
            self._pending += 1
            self._send.send_nowait(address)

    def done(self) -> None:
        """Told for each address, after what it led to was added."""
        self._pending -= 1
        if self._pending == 0:
            self._send.close()


async def crawl(frontier: Frontier, pages: kernel.MemorySendChannel[tuple[str, str]]) -> None:
    with pages:
        async for address in frontier.addresses:
            try:
                with kernel.fail_after(PATIENCE):
                    links = await fetch(address)
            except NotFound:
                await pages.send((address, "not found"))
            except kernel.TooSlowError:
                await pages.send((address, "too slow"))
            else:
                for link in links:
                    frontier.add(link)
                await pages.send((address, f"{len(links)} links"))
            frontier.done()


async def main() -> None:
    frontier = Frontier()
    frontier.add("/")
    send_pages, pages = kernel.open_memory_channel[tuple[str, str]](0)
    async with kernel.open_nursery() as nursery:
        with send_pages:
            for _ in range(WORKERS):
                nursery.start_soon(crawl, frontier, send_pages.clone())
        count = 0
        async for address, what in pages:
            count += 1
            print(f"{kernel.current_time():4.1f} s  {address}: {what}")
    print(f"{kernel.current_time():4.1f} s  that was all: {count} pages, and nobody is left")


if __name__ == "__main__":
    kernel.run(main, clock=kernel.testing.MockClock(autojump_threshold=0))
