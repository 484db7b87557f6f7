"""The workloads on this package. See `workloads` for what a function here must do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random
from time import perf_counter

from workloads import pin, timed

import kernel
from kernel.lowlevel import (
    Park,
    ParkingLot,
    Task,
    checkpoint,
    current_kernel,
    current_kernel_token,
    current_task,
    start_guest_run,
)

run = kernel.run


async def noop() -> None:
    pass


def run_noop(n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        kernel.run(noop)
    return perf_counter() - start


async def switch_1(n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        await checkpoint()
    return perf_counter() - start


async def switch_1000(n: int) -> float:
    """Each turn of the measuring task is a turn of 999 others."""
    stop = False

    async def other() -> None:
        while not stop:
            await checkpoint()

    async with kernel.open_nursery() as nursery:
        for _ in range(999):
            nursery.start_soon(other)
        await checkpoint()
        start = perf_counter()
        for _ in range(n // 1000):
            await checkpoint()
        elapsed = perf_counter() - start
        stop = True
    return elapsed


async def spawn_join(n: int) -> float:
    start = perf_counter()
    for _ in range(n // 1000):
        async with kernel.open_nursery() as nursery:
            for _ in range(1000):
                nursery.start_soon(noop)
    return perf_counter() - start


spawn_join_bare = spawn_join  # there are no other tasks here


async def nursery_1(n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(noop)
    return perf_counter() - start


async def timeout(n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        with kernel.move_on_after(10):
            await checkpoint()
    return perf_counter() - start


def _in_asyncio(async_fn: Callable[..., Awaitable[float]], n: int) -> float:
    """As a guest. asyncio is imported here, and not above, as it is in nobody's way then in the other rows."""
    import asyncio

    async def main() -> float:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        start_guest_run(
            async_fn,
            n,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            run_sync_soon_not_threadsafe=loop.call_soon,
            done_callback=done.set_result,
            host_uses_signal_set_wakeup_fd=True,
        )
        return (await done).unwrap()

    return asyncio.run(main())


def guest_switch(n: int) -> float:
    return _in_asyncio(switch_1, n)


async def outside_wakeup(n: int) -> float:
    lot = ParkingLot()
    call_soon = current_kernel_token().run_sync_soon
    start = perf_counter()
    for _ in range(n):
        call_soon(lot.unpark)
        await lot.park()
    return perf_counter() - start


async def _wakeup_by_asyncio(n: int) -> float:
    """The kernel is asleep when asyncio calls `unpark`, so this is a round trip through its helper thread."""
    lot = ParkingLot()
    from asyncio import get_running_loop

    call_soon = get_running_loop().call_soon
    start = perf_counter()
    for _ in range(n):
        call_soon(lot.unpark)
        await lot.park()
    return perf_counter() - start


def guest_wakeup(n: int) -> float:
    return _in_asyncio(_wakeup_by_asyncio, n)


async def _give_up(delay: float) -> None:
    with kernel.move_on_after(delay):
        await kernel.sleep_forever()


async def timeouts_fire(n: int) -> float:
    """All within 1 ms, which is far less than starting the tasks takes: so nobody waits, and the time is work."""
    start = perf_counter()
    async with kernel.open_nursery() as nursery:
        for i in range(n):
            nursery.start_soon(_give_up, (i + 1) / n * 1e-3)
    return perf_counter() - start


async def sleepers(n: int) -> float:
    """10 us to 10 ms, which is less than starting them takes."""
    start = perf_counter()
    async with kernel.open_nursery() as nursery:
        for i in range(n):
            nursery.start_soon(kernel.sleep, (i % 1000 + 1) * 1e-5)
    return perf_counter() - start


async def _sleep_long() -> None:
    await kernel.sleep(3600)


async def cancel_all(n: int) -> float:
    async with kernel.open_nursery() as nursery:
        for _ in range(n):
            nursery.start_soon(_sleep_long)
        await kernel.sleep(0.01)
        start = perf_counter()
        nursery.cancel_scope.cancel()
    return perf_counter() - start


async def memory(n: int, gauge: Callable[[], int]) -> float:
    async with kernel.open_nursery() as nursery:
        before = gauge()
        for _ in range(n):
            nursery.start_soon(_sleep_long)
        await kernel.sleep(0.01)
        grown = gauge() - before
        nursery.cancel_scope.cancel()
    return grown


async def channel(n: int) -> float:
    send_channel, receive_channel = kernel.open_memory_channel[int](100)

    async def produce() -> None:
        for i in range(n):
            await send_channel.send(i)

    async def consume() -> None:
        for _ in range(n):
            await receive_channel.receive()

    start = perf_counter()
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(produce)
        nursery.start_soon(consume)
    return perf_counter() - start


async def ping_pong(n: int) -> float:
    send_ping, receive_ping = kernel.open_memory_channel[int](0)
    send_pong, receive_pong = kernel.open_memory_channel[int](0)

    async def serve() -> None:
        for i in range(n):
            await send_ping.send(i)
            await receive_pong.receive()

    async def send_back() -> None:
        for i in range(n):
            await receive_ping.receive()
            await send_pong.send(i)

    start = perf_counter()
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(serve)
        nursery.start_soon(send_back)
    return perf_counter() - start


async def lock_100(n: int) -> float:
    """Who holds the lock lets the others run meanwhile. So they queue, and each use is a hand-over and two switches."""
    lock = kernel.Lock()

    async def use() -> None:
        for _ in range(n // 100):
            async with lock:
                await checkpoint()

    start = perf_counter()
    async with kernel.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(use)
    return perf_counter() - start


async def lock(n: int) -> float:
    lock = kernel.Lock()
    start = perf_counter()
    for _ in range(n):
        async with lock:
            pass
    return perf_counter() - start


async def semaphore(n: int) -> float:
    semaphore = kernel.Semaphore(10)
    start = perf_counter()
    for _ in range(n):
        async with semaphore:
            pass
    return perf_counter() - start


async def event_wait(n: int) -> float:
    event = kernel.Event()
    event.set()
    start = perf_counter()
    for _ in range(n):
        await event.wait()
    return perf_counter() - start


async def gather_1000(n: int) -> float:
    start = perf_counter()
    for _ in range(n // 1000):
        await kernel.gather(*[noop] * 1000)
    return perf_counter() - start


async def processes(n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        await kernel.run_process(["true"])
    return perf_counter() - start


async def processes_at_once(n: int) -> float:
    start = perf_counter()
    async with kernel.open_nursery() as nursery:
        for _ in range(n):
            nursery.start_soon(kernel.run_process, ["true"])
    return perf_counter() - start


async def thread_call(n: int) -> float:
    run_sync = kernel.to_thread.run_sync
    await run_sync(int)
    start = perf_counter()
    for _ in range(n):
        await run_sync(int)
    return perf_counter() - start


async def thread_call_pinned(n: int) -> float:
    pin()
    return await thread_call(n)


async def thread_calls_40(n: int) -> float:
    start = perf_counter()
    async with kernel.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(thread_call, n // 40)
    return perf_counter() - start


async def scaling(population: int, background: str, report: Callable[[dict[str, float]], None]) -> None:
    """Seconds per operation while `population` tasks are asleep."""
    park = Park("the benchmark")
    parked: list[Task] = []

    async def parker() -> None:
        parked.append(current_task())
        while True:
            await park

    async def wake(n: int) -> None:
        """Wake one and let it sleep again. They are taken from all over the memory, as events do."""
        wake_up, count = current_kernel().wake, len(parked)
        for i in range(n):
            wake_up(parked[i * 7919 % count])
            await checkpoint()

    async def nap(n: int) -> None:
        for _ in range(n):
            with kernel.move_on_after(10):
                await kernel.sleep(1e-9)

    async def naps(n: int) -> None:
        """100 tasks that sleep for a moment inside a timeout. As all are asleep at once, the deadlines must be put in
        order: one sleep's end and one timeout's removal each.
        """
        async with kernel.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(nap, n // 100)

    async with kernel.open_nursery() as nursery:
        if background == "standing deadlines":
            for i in range(population):
                nursery.start_soon(kernel.sleep, 10_000 + i * 7919 % population)
        for _ in range(100 if background == "standing deadlines" else population):
            nursery.start_soon(parker)
        await kernel.sleep(0.1)
        report(
            {
                "checkpoint": await timed(switch_1),
                "wake a parked task": await timed(wake),
                "timeout": await timed(timeout),
                "timeout around a sleep": await timed(naps),
            }
        )
        nursery.cancel_scope.cancel()


async def waiters(population: int, thing: str, report: Callable[[dict[str, float]], None]) -> None:
    """Seconds per operation while `population` tasks wait for one `thing`: to let one go, and to cancel one.

    Either way it waits again at once. Letting go is measured in rounds in which each has its turn; but for the channel,
    where each value is a turn. Who is cancelled stands anywhere in the row.
    """
    event, lock, semaphore = kernel.Event(), kernel.Lock(), kernel.Semaphore(1)
    send_channel, receive_channel = kernel.open_memory_channel[int](0)
    scopes = [kernel.CancelScope()] * population

    async def wait_event() -> None:
        await event.wait()

    async def set_event(n: int) -> None:
        nonlocal event
        for _ in range(n // population):
            happened, event = event, kernel.Event()
            happened.set()
            await checkpoint()

    async def use_lock() -> None:
        await lock.acquire()
        lock.release()

    async def hand_lock(n: int) -> None:
        for _ in range(n // (population + 1)):
            lock.release()
            await lock.acquire()  # when all the others have had it

    async def use_semaphore() -> None:
        await semaphore.acquire()
        semaphore.release()

    async def hand_semaphore(n: int) -> None:
        for _ in range(n // (population + 1)):
            semaphore.release()
            await semaphore.acquire()

    async def send(n: int) -> None:
        for i in range(n):
            await send_channel.send(i)
            await checkpoint()  # sending alone does not let the receiver run

    async def waiter(place: int, wait: Callable[[], Awaitable[object]]) -> None:
        while True:
            with kernel.CancelScope() as scopes[place]:
                while True:
                    await wait()

    async def cancel(n: int) -> None:
        for place in Random(n).choices(range(population), k=n):
            scopes[place].cancel()
            await checkpoint()

    wait, let_go, batch = {
        "event": (wait_event, set_event, population),
        "lock": (use_lock, hand_lock, population + 1),
        "semaphore": (use_semaphore, hand_semaphore, population + 1),
        "channel": (receive_channel.receive, send, 1),
    }[thing]
    await lock.acquire()
    await semaphore.acquire()
    async with kernel.open_nursery() as nursery:
        for place in range(population):
            nursery.start_soon(waiter, place, wait)
        await kernel.sleep(0.1)
        report({"let one go": await timed(let_go, batch), "cancel one": await timed(cancel)})
        nursery.cancel_scope.cancel()
