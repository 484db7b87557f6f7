"""What each part of a switch, a spawn and a timeout costs, in ns: `python tests/bench/steps.py`.

To see which part of the kernel has become slower, or where time might still be won. A part is timed by doing it over
and over, loop included (about 10 ns), and the cache misses of a real program not included. "Python's share" of a
switch is the same without a kernel: a deque, a context, a coroutine. Nothing written in Python can be faster.
"""

from __future__ import annotations

import platform
import types
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from contextvars import copy_context
from itertools import repeat
from math import inf
from typing import Any

from workloads import timed

import kernel
from kernel import CancelScope, move_on_after, open_nursery
from kernel.abc import Instrument
from kernel.lowlevel import (
    Park,
    SleepUntil,
    Task,
    Trap,
    add_instrument,
    checkpoint,
    current_kernel,
    current_task,
    remove_instrument,
)

PARK = Park("the benchmark")


async def noop() -> None:
    pass


def unbothered(call: Callable[[], object]) -> Callable[[int], Awaitable[None]]:
    """Time a plain function: the cost of one call of it."""

    async def operation(n: int) -> None:
        for _ in repeat(None, n):
            call()

    return operation


@types.coroutine
def bare_yield() -> Generator[Any, Any, None]:
    yield None


async def pythons_share(n: int) -> None:
    async def forever() -> None:
        while True:
            await bare_yield()

    coro = forever()
    ready = deque([(copy_context(), coro.send)])
    for _ in repeat(None, n):
        entry = ready.popleft()
        context, send = entry
        context.run(send, None)
        ready.append(entry)
    coro.close()


async def switch(n: int) -> None:
    for _ in repeat(None, n):
        await checkpoint()


async def park_and_wake(n: int) -> None:
    """Two switches, one of them by way of a trap."""
    wake, sleeper = current_kernel().wake, []

    async def sleep() -> None:
        sleeper.append(current_task())
        for _ in repeat(None, n):
            await PARK

    async with open_nursery() as nursery:
        nursery.start_soon(sleep)
        await checkpoint()
        for _ in repeat(None, n):
            wake(sleeper[0])
            await checkpoint()


async def sleep_and_expire(n: int) -> None:
    for _ in repeat(None, n):
        await kernel.sleep(1e-9)


def make_coroutine() -> None:
    noop().close()


async def start_soon(n: int) -> None:
    """The whole life of a task, a hundred at a time."""
    for _ in range(0, n, 100):
        async with open_nursery() as nursery:
            start = nursery.start_soon
            for _ in repeat(None, 100):
                start(noop)


async def empty_nursery(n: int) -> None:
    for _ in repeat(None, n):
        async with open_nursery():
            pass


def enter_scope() -> None:
    with CancelScope():
        pass


def enter_timeout() -> None:
    with move_on_after(10):
        pass


def timer_struck_out() -> None:
    timers, trap = current_kernel().timers, SleepUntil(1e9)
    timers.add(1e9, trap)
    timers.remove(trap)


def timer_sorted_in() -> None:
    timers, trap = current_kernel().timers, SleepUntil(1e9)
    timers.add(1e9, trap)
    timers.next_deadline()
    timers.remove(trap)


class OnlyTheRun(Instrument):
    """Two hooks, neither of which is in the way of a step."""

    def before_run(self) -> None:
        pass

    def after_run(self) -> None:
        pass


class OnlyTheWaits(Instrument):
    def before_io_wait(self, timeout: float) -> None:
        pass


class AllHooks(OnlyTheRun, OnlyTheWaits):
    def task_spawned(self, task: Task) -> None:
        pass

    def task_scheduled(self, task: Task) -> None:
        pass

    def before_task_step(self, task: Task) -> None:
        pass

    def task_trapped(self, task: Task, trap: Trap | None) -> None:
        pass

    def after_task_step(self, task: Task) -> None:
        pass

    def task_exited(self, task: Task) -> None:
        pass

    def after_io_wait(self, timeout: float) -> None:
        pass


def watched(*instruments: Instrument) -> Callable[[int], Awaitable[None]]:
    """A switch under these instruments."""

    async def operation(n: int) -> None:
        for instrument in instruments:
            add_instrument(instrument)
        await switch(n)
        for instrument in instruments:
            remove_instrument(instrument)
        await kernel.sleep(1e-9)  # they leave at the end of the pass

    return operation


async def main() -> None:
    here = current_kernel()
    rows: dict[str, Callable[[int], Awaitable[None]]] = {
        "switch: Python's share": pythons_share,
        "switch: checkpoint()": switch,
        "switch: under an instrument for begin and end": watched(OnlyTheRun()),
        "switch: under one for the waits": watched(OnlyTheWaits()),
        "switch: under one with all hooks": watched(AllHooks()),
        "switch: park, and wake from another task": park_and_wake,
        "spawn: making and closing a coroutine": unbothered(make_coroutine),
        "spawn: copy_context()": unbothered(copy_context),
        "spawn: start_soon, run, end": start_soon,
        "spawn: an empty nursery": empty_nursery,
        "timeout: making a scope": unbothered(CancelScope),
        "timeout: a scope, entered and left": unbothered(enter_scope),
        "timeout: a scope with a deadline, entered and left": unbothered(enter_timeout),
        "timeout: current_time()": unbothered(here.clock.current_time),
        "timers: added and removed": unbothered(timer_struck_out),
        "timers: added, put in order, removed": unbothered(timer_sorted_in),
        "pass: poll with nobody waiting": unbothered(lambda: here.poller.poll(0)),
        "pass: what is due, with nothing due": unbothered(lambda: list(here.timers.expired(-inf))),
        "pass: a sleep that is over at once": sleep_and_expire,
    }
    print(f"Python {platform.python_version()}\n\n| part | ns |\n| --- | ---: |")
    for what, operation in rows.items():
        print(f"| {what} | {await timed(operation) * 1e9:.0f} |", flush=True)


if __name__ == "__main__":
    kernel.run(main)
