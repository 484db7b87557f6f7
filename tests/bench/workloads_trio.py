"""The workloads on trio."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import NoReturn

import trio
from trio.lowlevel import Abort, Task, checkpoint, current_task, reschedule, wait_task_rescheduled
from workloads import timed

run = trio.run


async def noop() -> None:
    pass


def run_noop(n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        trio.run(noop)
    return perf_counter() - start


async def switch_1(n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        await checkpoint()
    return perf_counter() - start


async def switch_1000(n: int) -> float:
    stop = False

    async def other() -> None:
        while not stop:
            await checkpoint()

    async with trio.open_nursery() as nursery:
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
        async with trio.open_nursery() as nursery:
            for _ in range(1000):
                nursery.start_soon(noop)
    return perf_counter() - start


spawn_join_bare = spawn_join  # there are no other tasks here


async def nursery_1(n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(noop)
    return perf_counter() - start


async def timeout(n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        with trio.move_on_after(10):
            await checkpoint()
    return perf_counter() - start


async def _give_up(delay: float) -> None:
    with trio.move_on_after(delay):
        await trio.sleep_forever()


async def timeouts_fire(n: int) -> float:
    start = perf_counter()
    async with trio.open_nursery() as nursery:
        for i in range(n):
            nursery.start_soon(_give_up, (i + 1) / n * 1e-3)
    return perf_counter() - start


async def sleepers(n: int) -> float:
    start = perf_counter()
    async with trio.open_nursery() as nursery:
        for i in range(n):
            nursery.start_soon(trio.sleep, (i % 1000 + 1) * 1e-5)
    return perf_counter() - start


async def _sleep_long() -> None:
    await trio.sleep(3600)


async def cancel_all(n: int) -> float:
    async with trio.open_nursery() as nursery:
        for _ in range(n):
            nursery.start_soon(_sleep_long)
        await trio.sleep(0.01)
        start = perf_counter()
        nursery.cancel_scope.cancel()
    return perf_counter() - start


async def memory(n: int, gauge: Callable[[], int]) -> float:
    async with trio.open_nursery() as nursery:
        before = gauge()
        for _ in range(n):
            nursery.start_soon(_sleep_long)
        await trio.sleep(0.01)
        grown = gauge() - before
        nursery.cancel_scope.cancel()
    return grown


async def scaling(population: int, background: str, report: Callable[[dict[str, float]], None]) -> None:
    parked: list[Task] = []

    def abort(raise_cancel: Callable[[], NoReturn]) -> Abort:
        return Abort.SUCCEEDED

    async def parker() -> None:
        parked.append(current_task())
        while True:
            await wait_task_rescheduled(abort)

    async def wake(n: int) -> None:
        count = len(parked)
        for i in range(n):
            reschedule(parked[i * 7919 % count])
            await checkpoint()
        await checkpoint()  # trio shuffles each pass: only now has the last one surely gone back to sleep

    async def nap(n: int) -> None:
        for _ in range(n):
            with trio.move_on_after(10):
                await trio.sleep(1e-9)

    async def naps(n: int) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(nap, n // 100)

    async with trio.open_nursery() as nursery:
        if background == "standing deadlines":
            for i in range(population):
                nursery.start_soon(trio.sleep, 10_000 + i * 7919 % population)
        for _ in range(100 if background == "standing deadlines" else population):
            nursery.start_soon(parker)
        await trio.sleep(0.1)
        report(
            {
                "checkpoint": await timed(switch_1),
                "wake a parked task": await timed(wake),
                "timeout": await timed(timeout),
                "timeout around a sleep": await timed(naps),
            }
        )
        nursery.cancel_scope.cancel()
