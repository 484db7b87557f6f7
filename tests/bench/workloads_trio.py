"""The workloads on trio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random
from time import perf_counter
from typing import NoReturn

import trio
from trio.lowlevel import (
    Abort,
    ParkingLot,
    Task,
    checkpoint,
    current_task,
    current_trio_token,
    reschedule,
    start_guest_run,
    wait_task_rescheduled,
)
from workloads import pin, timed

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
    call_soon = current_trio_token().run_sync_soon
    start = perf_counter()
    for _ in range(n):
        call_soon(lot.unpark)
        await lot.park()
    return perf_counter() - start


async def _wakeup_by_asyncio(n: int) -> float:
    """trio is asleep when asyncio calls `unpark`, so this is a round trip through a thread."""
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


async def channel(n: int) -> float:
    send_channel, receive_channel = trio.open_memory_channel[int](100)

    async def produce() -> None:
        for i in range(n):
            await send_channel.send(i)

    async def consume() -> None:
        for _ in range(n):
            await receive_channel.receive()

    start = perf_counter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(produce)
        nursery.start_soon(consume)
    return perf_counter() - start


async def ping_pong(n: int) -> float:
    send_ping, receive_ping = trio.open_memory_channel[int](0)
    send_pong, receive_pong = trio.open_memory_channel[int](0)

    async def serve() -> None:
        for i in range(n):
            await send_ping.send(i)
            await receive_pong.receive()

    async def send_back() -> None:
        for i in range(n):
            await receive_ping.receive()
            await send_pong.send(i)

    start = perf_counter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        nursery.start_soon(send_back)
    return perf_counter() - start


async def lock_100(n: int) -> float:
    """Who holds the lock lets the others run meanwhile. So they queue, and each use is a hand-over and two switches."""
    lock = trio.Lock()

    async def use() -> None:
        for _ in range(n // 100):
            async with lock:
                await checkpoint()

    start = perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(use)
    return perf_counter() - start


async def lock(n: int) -> float:
    lock = trio.Lock()
    start = perf_counter()
    for _ in range(n):
        async with lock:
            pass
    return perf_counter() - start


async def semaphore(n: int) -> float:
    semaphore = trio.Semaphore(10)
    start = perf_counter()
    for _ in range(n):
        async with semaphore:
            pass
    return perf_counter() - start


async def event_wait(n: int) -> float:
    event = trio.Event()
    event.set()
    start = perf_counter()
    for _ in range(n):
        await event.wait()
    return perf_counter() - start


async def gather_1000(n: int) -> float:
    """trio has no gather. This is what its users write: each child leaves its result in a list."""
    start = perf_counter()
    for _ in range(n // 1000):
        results: list[None] = [None] * 1000

        async def keep(place: int, results: list[None] = results) -> None:
            results[place] = await noop()

        async with trio.open_nursery() as nursery:
            for place in range(1000):
                nursery.start_soon(keep, place)
    return perf_counter() - start


async def processes(n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        await trio.run_process(["true"])
    return perf_counter() - start


async def processes_at_once(n: int) -> float:
    start = perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(n):
            nursery.start_soon(trio.run_process, ["true"])
    return perf_counter() - start


async def thread_call(n: int) -> float:
    run_sync = trio.to_thread.run_sync
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
    async with trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(thread_call, n // 40)
    return perf_counter() - start


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


async def waiters(population: int, thing: str, report: Callable[[dict[str, float]], None]) -> None:
    """Seconds per operation while `population` tasks wait for one `thing`: to let one go, and to cancel one.

    Either way it waits again at once. Letting go is measured in rounds in which each has its turn; but for the channel,
    where each value is a turn. Who is cancelled stands anywhere in the row.
    """
    event, lock, semaphore = trio.Event(), trio.Lock(), trio.Semaphore(1)
    send_channel, receive_channel = trio.open_memory_channel[int](0)
    scopes = [trio.CancelScope()] * population

    async def wait_event() -> None:
        await event.wait()

    async def set_event(n: int) -> None:
        nonlocal event
        for _ in range(n // population):
            happened, event = event, trio.Event()
            happened.set()
            await checkpoint()
            await checkpoint()  # trio shuffles each pass: only now have all surely run

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

    async def waiter(place: int, wait: Callable[[], Awaitable[object]]) -> None:
        while True:
            with trio.CancelScope() as scopes[place]:
                while True:
                    await wait()

    async def cancel(n: int) -> None:
        for place in Random(n).choices(range(population), k=n):
            scopes[place].cancel()
            await checkpoint()
        await checkpoint()

    wait, let_go, batch = {
        "event": (wait_event, set_event, population),
        "lock": (use_lock, hand_lock, population + 1),
        "semaphore": (use_semaphore, hand_semaphore, population + 1),
        "channel": (receive_channel.receive, send, 1),
    }[thing]
    await lock.acquire()
    await semaphore.acquire()
    async with trio.open_nursery() as nursery:
        for place in range(population):
            nursery.start_soon(waiter, place, wait)
        await trio.sleep(0.1)
        report({"let one go": await timed(let_go, batch), "cancel one": await timed(cancel)})
        nursery.cancel_scope.cancel()
