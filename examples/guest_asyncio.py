"""The kernel as a guest of asyncio: two worlds in one thread, each waiting for the other.

    .venv/bin/python examples/guest_asyncio.py

A wholesaler speaks asyncio; think of a client library that knows nothing else. Our shop is written for the kernel, with
nurseries and timeouts. Three small bridges join them, and can be copied:

    run_guest     called in asyncio: run a kernel program here, and return what it returns
    from_asyncio  called in the kernel: wait for something of asyncio's
    to_asyncio    called in the kernel: start a task, and give asyncio a future of its result

All three pass on results, errors and cancellations. docs/guest-mode.md explains how the kernel does it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import kernel
from kernel.lowlevel import Trap, checkpoint_if_cancelled, operation, start_guest_run

# ---- three bridges ----


async def run_guest(async_fn: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """For asyncio: run `async_fn(*args)` in a kernel on top of the running loop. Cancel this, and it is cancelled."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    scope = kernel.CancelScope()

    async def main() -> Any:
        with scope:
            return await async_fn(*args)

    start_guest_run(
        main,
        run_sync_soon_threadsafe=loop.call_soon_threadsafe,
        run_sync_soon_not_threadsafe=loop.call_soon,
        done_callback=done.set_result,
        host_uses_signal_set_wakeup_fd=True,
    )
    while not done.done():
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError:
            scope.cancel("asyncio has cancelled run_guest()")  # and wait until it has left
    result = done.result().unwrap()
    if scope.cancelled_caught:
        raise asyncio.CancelledError
    return result


class WaitFuture(Trap):
    """Sleep until a future of asyncio's is done."""

    def __init__(self, future: asyncio.Future[Any]) -> None:
        self.future = future
        self.asked = False

    def arm(self, kernel: Any, task: Any) -> None:
        self.future.add_done_callback(lambda _: kernel.wake(task))

    def abort(self, kernel: Any, task: Any) -> bool:
        if not self.asked:
            self.asked = True
            self.future.cancel()
        return False  # it may have something to clean up: we sleep on until it has

    def __repr__(self) -> str:
        return f"<WaitFuture {self.future!r}>"


@operation
def from_asyncio(awaitable: Awaitable[Any]) -> Generator[Any, Any, Any]:
    """For the kernel: wait for a coroutine, task or future of asyncio's. A cancellation is passed on to it."""
    yield from checkpoint_if_cancelled()
    future = asyncio.ensure_future(awaitable)
    yield WaitFuture(future)
    if future.cancelled():
        yield from checkpoint_if_cancelled()  # it was us who cancelled it
    return future.result()


def to_asyncio(nursery: kernel.Nursery, async_fn: Callable[..., Awaitable[Any]], *args: Any) -> asyncio.Future[Any]:
    """For the kernel: start `async_fn(*args)` in `nursery`, and return a future that asyncio can await or cancel."""
    future = asyncio.get_running_loop().create_future()
    scope = kernel.CancelScope()

    async def run() -> None:
        try:
            with scope:
                result = await async_fn(*args)
                if not future.done():
                    future.set_result(result)
        except Exception as error:
            if future.done():
                raise
            future.set_exception(error)
        finally:
            future.cancel()  # if there is nothing in it, we are being cancelled

    def done(_: object) -> None:
        if future.cancelled():
            scope.cancel("asyncio has cancelled the future")

    future.add_done_callback(done)
    nursery.start_soon(run)
    return future


# ---- the wholesaler, in asyncio ----

DELAYS = {"tea": 0.0, "salt": 0.01, "silk": 60.0}


async def ask_price(good: str) -> float:
    try:
        await asyncio.sleep(DELAYS[good])
    except asyncio.CancelledError:
        print(f"  wholesaler: hung up while looking for {good}")
        raise
    return len(good) * 1.5


async def bargain(offer: asyncio.Future[float]) -> float:
    return await offer * 0.9


# ---- the shop, in the kernel ----


async def price_of(good: str, prices: dict[str, float]) -> None:
    with kernel.move_on_after(1 if good != "silk" else 0.1) as patience:
        prices[good] = await from_asyncio(ask_price(good))
    if patience.cancelled_caught:
        print(f"  shop: no price for {good}")


async def our_offer() -> float:
    await kernel.sleep(0.01)
    return 100.0


async def shop() -> dict[str, float]:
    prices: dict[str, float] = {}
    async with kernel.open_nursery() as nursery:
        for good in DELAYS:
            nursery.start_soon(price_of, good, prices)
    for good, price in sorted(prices.items()):
        print(f"  shop: {good} is {price:.2f}")

    async with kernel.open_nursery() as nursery:
        offer = to_asyncio(nursery, our_offer)
        print(f"  shop: agreed on {await from_asyncio(bargain(offer)):.2f}")

    try:
        await from_asyncio(ask_price("snow"))
    except KeyError as error:
        print(f"  shop: the wholesaler has no {error}")
    return prices


async def keep_shop() -> None:
    try:
        print("  shop: open")
        await kernel.sleep_forever()
    finally:
        print("  shop: closed")


async def main() -> None:
    print("The shop asks the wholesaler")
    prices = await run_guest(shop)
    print(f"  asyncio: got {len(prices)} prices")

    print("asyncio runs out of time")
    try:
        async with asyncio.timeout(0.05):
            await run_guest(keep_shop)
    except TimeoutError:
        print("  asyncio: TimeoutError")


if __name__ == "__main__":
    asyncio.run(main())
