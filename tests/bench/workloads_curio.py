"""The workloads on curio, whose last release, 1.6, runs on Python 3.11 and not on later ones.

Tasks are spawned and joined one after the other, which is a little faster than a `TaskGroup` (`nursery_1` shows that).
curio reads the clock and enters the kernel by a trap for every timeout and every spawn.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import curio

run = curio.run


async def noop() -> None:
    pass


def run_noop(n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        curio.run(noop)
    return perf_counter() - start


async def switch_1(n: int) -> float:
    sleep = curio.sleep
    start = perf_counter()
    for _ in range(n):
        await sleep(0)
    return perf_counter() - start


async def switch_1000(n: int) -> float:
    stop = False
    sleep = curio.sleep

    async def other() -> None:
        while not stop:
            await sleep(0)

    others = [await curio.spawn(other) for _ in range(999)]
    await sleep(0)
    start = perf_counter()
    for _ in range(n // 1000):
        await sleep(0)
    elapsed = perf_counter() - start
    stop = True
    for task in others:
        await task.join()
    return elapsed


async def spawn_join(n: int) -> float:
    start = perf_counter()
    for _ in range(n // 1000):
        tasks = [await curio.spawn(noop) for _ in range(1000)]
        for task in tasks:
            await task.join()
    return perf_counter() - start


spawn_join_bare = spawn_join  # there are no other tasks here


async def nursery_1(n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        async with curio.TaskGroup() as group:
            await group.spawn(noop)
    return perf_counter() - start


async def timeout(n: int) -> float:
    sleep = curio.sleep
    start = perf_counter()
    for _ in range(n):
        async with curio.timeout_after(10):
            await sleep(0)
    return perf_counter() - start


async def _give_up(delay: float) -> None:
    async with curio.ignore_after(delay):
        await curio.Event().wait()


async def timeouts_fire(n: int) -> float:
    start = perf_counter()
    tasks = [await curio.spawn(_give_up, (i + 1) / n * 1e-3) for i in range(n)]
    for task in tasks:
        await task.join()
    return perf_counter() - start


async def sleepers(n: int) -> float:
    start = perf_counter()
    tasks = [await curio.spawn(curio.sleep, (i % 1000 + 1) * 1e-5) for i in range(n)]
    for task in tasks:
        await task.join()
    return perf_counter() - start


async def _sleep_long() -> None:
    await curio.sleep(3600)


async def cancel_all(n: int) -> float:
    tasks = [await curio.spawn(_sleep_long) for _ in range(n)]
    await curio.sleep(0.01)
    start = perf_counter()
    await _cancel(tasks)
    return perf_counter() - start


async def _cancel(tasks: list[curio.Task]) -> None:
    for task in tasks:
        await task.cancel(blocking=False)
    for task in tasks:
        await task.wait()


async def memory(n: int, gauge: Callable[[], int]) -> float:
    before = gauge()
    tasks = [await curio.spawn(_sleep_long) for _ in range(n)]
    await curio.sleep(0.01)
    grown = gauge() - before
    await _cancel(tasks)
    return grown


async def channel(n: int) -> float:
    queue = curio.Queue(100)

    async def produce() -> None:
        for i in range(n):
            await queue.put(i)

    async def consume() -> None:
        for _ in range(n):
            await queue.get()

    start = perf_counter()
    for task in [await curio.spawn(produce), await curio.spawn(consume)]:
        await task.join()
    return perf_counter() - start


async def ping_pong(n: int) -> float:
    ping, pong = curio.Queue(), curio.Queue()

    async def serve() -> None:
        for i in range(n):
            await ping.put(i)
            await pong.get()

    async def send_back() -> None:
        for i in range(n):
            await ping.get()
            await pong.put(i)

    start = perf_counter()
    for task in [await curio.spawn(serve), await curio.spawn(send_back)]:
        await task.join()
    return perf_counter() - start


async def lock_100(n: int) -> float:
    lock = curio.Lock()
    sleep = curio.sleep

    async def use() -> None:
        for _ in range(n // 100):
            async with lock:
                await sleep(0)

    start = perf_counter()
    for task in [await curio.spawn(use) for _ in range(100)]:
        await task.join()
    return perf_counter() - start


async def lock(n: int) -> float:
    lock = curio.Lock()
    start = perf_counter()
    for _ in range(n):
        async with lock:
            pass
    return perf_counter() - start


async def semaphore(n: int) -> float:
    semaphore = curio.Semaphore(10)
    start = perf_counter()
    for _ in range(n):
        async with semaphore:
            pass
    return perf_counter() - start


async def event_wait(n: int) -> float:
    event = curio.Event()
    await event.set()
    start = perf_counter()
    for _ in range(n):
        await event.wait()
    return perf_counter() - start


async def gather_1000(n: int) -> float:
    """The results are those of `join`, which is a little faster than a `TaskGroup` and its `results`."""
    start = perf_counter()
    for _ in range(n // 1000):
        tasks = [await curio.spawn(noop) for _ in range(1000)]
        [await task.join() for task in tasks]
    return perf_counter() - start
