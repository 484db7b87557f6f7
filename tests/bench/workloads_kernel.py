"""The workloads on this package. See `workloads` for what a function here must do."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from workloads import timed

import kernel
from kernel.lowlevel import Park, Task, checkpoint, current_kernel, current_task

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
