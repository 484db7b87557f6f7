"""The workloads on asyncio. uvloop runs these very functions on its own loop (see `workloads_uvloop`).

Where there is a choice, the fastest: tasks are joined by awaiting one after the other, which beats `TaskGroup`,
`gather` and `wait` by a fifth to a half here (`nursery_1` shows `TaskGroup`); a timeout is `asyncio.timeout`, which
beats `wait_for`; waiting forever is a bare future. `asyncio.eager_task_factory` (3.12) is not used: it would run the
trivial task of `spawn_join` without making it wait its turn, which is another thing than this row is about.
"""

from __future__ import annotations

import asyncio
from asyncio import create_task, get_running_loop
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from random import Random
from time import perf_counter
from typing import Any

from workloads import pin, timed


def run(async_fn: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
    return asyncio.run(async_fn(*args))


async def noop() -> None:
    pass


def run_noop(n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        asyncio.run(noop())
    return perf_counter() - start


async def switch_1(n: int) -> float:
    sleep = asyncio.sleep
    start = perf_counter()
    for _ in range(n):
        await sleep(0)
    return perf_counter() - start


async def switch_1000(n: int) -> float:
    stop = False
    sleep = asyncio.sleep

    async def other() -> None:
        while not stop:
            await sleep(0)

    others = [create_task(other()) for _ in range(999)]
    await sleep(0)
    start = perf_counter()
    for _ in range(n // 1000):
        await sleep(0)
    elapsed = perf_counter() - start
    stop = True
    for task in others:
        await task
    return elapsed


async def spawn_join(n: int) -> float:
    start = perf_counter()
    for _ in range(n // 1000):
        async with asyncio.TaskGroup() as group:
            for _ in range(1000):
                group.create_task(noop())
    return perf_counter() - start


async def spawn_join_bare(n: int) -> float:
    """Tasks of nobody's, awaited one by one: no common fate, and an error in one says nothing to the others."""
    start = perf_counter()
    for _ in range(n // 1000):
        tasks = [create_task(noop()) for _ in range(1000)]
        for task in tasks:
            await task
    return perf_counter() - start


async def nursery_1(n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        async with asyncio.TaskGroup() as group:
            group.create_task(noop())
    return perf_counter() - start


async def timeout(n: int) -> float:
    sleep = asyncio.sleep
    start = perf_counter()
    for _ in range(n):
        async with asyncio.timeout(10):
            await sleep(0)
    return perf_counter() - start


async def outside_wakeup(n: int) -> float:
    loop = get_running_loop()
    start = perf_counter()
    for _ in range(n):
        future = loop.create_future()
        loop.call_soon(future.set_result, None)
        await future
    return perf_counter() - start


guest_switch = switch_1  # what a step costs that is no guest's
guest_wakeup = outside_wakeup


async def _give_up(delay: float) -> None:
    try:
        async with asyncio.timeout(delay):
            await get_running_loop().create_future()
    except TimeoutError:
        pass


async def timeouts_fire(n: int) -> float:
    start = perf_counter()
    tasks = [create_task(_give_up((i + 1) / n * 1e-3)) for i in range(n)]
    for task in tasks:
        await task
    return perf_counter() - start


async def sleepers(n: int) -> float:
    start = perf_counter()
    tasks = [create_task(asyncio.sleep((i % 1000 + 1) * 1e-5)) for i in range(n)]
    for task in tasks:
        await task
    return perf_counter() - start


async def _sleep_long() -> None:
    await asyncio.sleep(3600)


async def cancel_all(n: int) -> float:
    tasks = [create_task(_sleep_long()) for _ in range(n)]
    await asyncio.sleep(0.01)
    start = perf_counter()
    await _cancel(tasks)
    return perf_counter() - start


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        try:
            await task
        except asyncio.CancelledError:
            pass


async def memory(n: int, gauge: Callable[[], int]) -> float:
    before = gauge()
    tasks = [create_task(_sleep_long()) for _ in range(n)]
    await asyncio.sleep(0.01)
    grown = gauge() - before
    await _cancel(tasks)
    return grown


async def channel(n: int) -> float:
    queue = asyncio.Queue[int](100)

    async def produce() -> None:
        for i in range(n):
            await queue.put(i)

    async def consume() -> None:
        for _ in range(n):
            await queue.get()

    start = perf_counter()
    for task in [create_task(produce()), create_task(consume())]:
        await task
    return perf_counter() - start


async def ping_pong(n: int) -> float:
    """The queues have no bound, which is faster than one of 1; there is never more than one item in them."""
    ping, pong = asyncio.Queue[int](), asyncio.Queue[int]()

    async def serve() -> None:
        for i in range(n):
            await ping.put(i)
            await pong.get()

    async def send_back() -> None:
        for i in range(n):
            await ping.get()
            await pong.put(i)

    start = perf_counter()
    for task in [create_task(serve()), create_task(send_back())]:
        await task
    return perf_counter() - start


async def lock_100(n: int) -> float:
    lock = asyncio.Lock()
    sleep = asyncio.sleep

    async def use() -> None:
        for _ in range(n // 100):
            async with lock:
                await sleep(0)

    start = perf_counter()
    for task in [create_task(use()) for _ in range(100)]:
        await task
    return perf_counter() - start


async def lock(n: int) -> float:
    lock = asyncio.Lock()
    start = perf_counter()
    for _ in range(n):
        async with lock:
            pass
    return perf_counter() - start


async def semaphore(n: int) -> float:
    semaphore = asyncio.Semaphore(10)
    start = perf_counter()
    for _ in range(n):
        async with semaphore:
            pass
    return perf_counter() - start


async def event_wait(n: int) -> float:
    event = asyncio.Event()
    event.set()
    start = perf_counter()
    for _ in range(n):
        await event.wait()
    return perf_counter() - start


async def gather_1000(n: int) -> float:
    start = perf_counter()
    for _ in range(n // 1000):
        await asyncio.gather(*[noop() for _ in range(1000)])
    return perf_counter() - start


async def _run_true() -> None:
    process = await asyncio.create_subprocess_exec("true", stdin=asyncio.subprocess.DEVNULL)
    await process.wait()


async def processes(n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        await _run_true()
    return perf_counter() - start


async def processes_at_once(n: int) -> float:
    start = perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(n):
            group.create_task(_run_true())
    return perf_counter() - start


async def thread_call(n: int) -> float:
    to_thread = asyncio.to_thread
    await to_thread(int)
    start = perf_counter()
    for _ in range(n):
        await to_thread(int)
    return perf_counter() - start


async def thread_call_pinned(n: int) -> float:
    pin()
    return await thread_call(n)


async def thread_calls_40(n: int) -> float:
    get_running_loop().set_default_executor(ThreadPoolExecutor(40))
    start = perf_counter()
    for task in [create_task(thread_call(n // 40)) for _ in range(40)]:
        await task
    return perf_counter() - start


async def scaling(population: int, background: str, report: Callable[[dict[str, float]], None]) -> None:
    parked: list[asyncio.Future[None] | None] = []

    async def parker(number: int) -> None:
        create_future = get_running_loop().create_future
        parked.append(None)
        while True:
            future = parked[number] = create_future()
            await future

    async def wake(n: int) -> None:
        count = len(parked)
        for i in range(n):
            future = parked[i * 7919 % count]
            assert future is not None
            future.set_result(None)
            await asyncio.sleep(0)

    async def nap(n: int) -> None:
        for _ in range(n):
            async with asyncio.timeout(10):
                await asyncio.sleep(1e-9)

    async def naps(n: int) -> None:
        for task in [create_task(nap(n // 100)) for _ in range(100)]:
            await task

    tasks: list[asyncio.Task[None]] = []
    if background == "standing deadlines":
        tasks += [create_task(asyncio.sleep(10_000 + i * 7919 % population)) for i in range(population)]
    tasks += [create_task(parker(i)) for i in range(100 if background == "standing deadlines" else population)]
    await asyncio.sleep(0.1)
    report(
        {
            "checkpoint": await timed(switch_1),
            "wake a parked task": await timed(wake),
            "timeout": await timed(timeout),
            "timeout around a sleep": await timed(naps),
        }
    )
    await _cancel(tasks)


async def waiters(population: int, thing: str, report: Callable[[dict[str, float]], None]) -> None:
    event, lock, semaphore = asyncio.Event(), asyncio.Lock(), asyncio.Semaphore(1)
    queue = asyncio.Queue[int]()
    leaving = False

    async def wait_event() -> None:
        await event.wait()

    async def set_event(n: int) -> None:
        nonlocal event
        for _ in range(n // population):
            happened, event = event, asyncio.Event()
            happened.set()
            await asyncio.sleep(0)

    async def use_lock() -> None:
        await lock.acquire()
        lock.release()

    async def hand_lock(n: int) -> None:
        for _ in range(n // (population + 1)):
            lock.release()
            await lock.acquire()

    async def use_semaphore() -> None:
        await semaphore.acquire()
        semaphore.release()

    async def hand_semaphore(n: int) -> None:
        for _ in range(n // (population + 1)):
            semaphore.release()
            await semaphore.acquire()

    async def send(n: int) -> None:
        for i in range(n):
            await queue.put(i)
            await asyncio.sleep(0)

    async def waiter(wait: Callable[[], Coroutine[Any, Any, object]]) -> None:
        while not leaving:
            try:
                while True:
                    await wait()
            except asyncio.CancelledError:
                pass

    async def cancel(n: int) -> None:
        for victim in Random(n).choices(tasks, k=n):
            victim.cancel()
            await asyncio.sleep(0)

    wait, let_go, batch = {
        "event": (wait_event, set_event, population),
        "lock": (use_lock, hand_lock, population + 1),
        "semaphore": (use_semaphore, hand_semaphore, population + 1),
        "channel": (queue.get, send, 1),
    }[thing]
    await lock.acquire()
    await semaphore.acquire()
    tasks = [create_task(waiter(wait)) for _ in range(population)]
    await asyncio.sleep(0.1)
    report({"let one go": await timed(let_go, batch), "cancel one": await timed(cancel)})
    leaving = True
    await _cancel(tasks)
