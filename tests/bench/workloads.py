"""The list of workloads, and how one of them is timed.

Each contender has a module, `workloads_kernel`, `workloads_asyncio` and so on, with one function per workload that
bears the workload's name. An async function `name(n)` does `n` operations and returns the seconds they took, so that
it decides itself what is set-up and what is measured. `run(async_fn, *args)` runs it. A plain function `name(n)` does
the same without being run by anything. A contender that lacks a function is left out of that row.

To add a workload: one line in `WORKLOADS` and one function in each module. Write it in each library as its own
documentation and users would, and where there are several ways, take the fastest; say so if it was close.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

CONTENDERS = ("kernel", "asyncio", "uvloop", "trio", "curio")
SCALING_CONTENDERS = ("kernel", "asyncio", "trio")
BACKGROUNDS = ("sleeping tasks", "standing deadlines")
WAITED_FOR = ("event", "lock", "semaphore", "channel")


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    `size` is the number of operations when the row is about that number; 0 lets it grow until the measurement is long
    enough, in steps of `batch`. `targets` is how many times the kernel's figure each peer's shall at least be.
    """

    name: str
    what: str
    unit: str = "ns"
    size: int = 0
    batch: int = 1
    targets: dict[str, float] = field(default_factory=dict)


_MANY = {"uvloop": 1.3, "asyncio": 1.6, "trio": 4.0}
_UNCONTENDED = {"trio": 8.0}

WORKLOADS = (
    Workload("switch_1", "switch, 1 task", targets={"uvloop": 2.5, "asyncio": 6, "trio": 9}),
    Workload("switch_1000", "switch, 1000 tasks", batch=1000, targets={"uvloop": 1.3, "asyncio": 2.8, "trio": 4.5}),
    Workload("spawn_join", "spawn and join a task", batch=1000, targets={"uvloop": 1.6, "asyncio": 2.5, "trio": 4}),
    Workload("spawn_join_bare", "the same, asyncio's without a TaskGroup", batch=1000),
    Workload("nursery_1", "a nursery around one child"),
    Workload("timeout", "timeout around a checkpoint", targets={"uvloop": 1.8, "asyncio": 2.5, "trio": 4}),
    Workload("timeouts_fire", "10,000 timeouts that fire, each", size=10_000, targets=_MANY),
    Workload("sleepers", "50,000 sleepers, each", size=50_000, targets=_MANY),
    Workload("cancel_all", "50,000 tasks cancelled at once, each", size=50_000, targets=_MANY),
    Workload(
        "memory", "memory per sleeping task", unit="B", size=20_000, targets={"asyncio": 1 / 0.65, "trio": 1 / 0.35}
    ),
    Workload("memory_rss", "the same by resident set", unit="B", size=20_000),
    Workload("channel", "channel item, buffer 100", targets={"uvloop": 1.4, "trio": 12}),
    Workload("ping_pong", "ping-pong over two channels", targets={"uvloop": 2.3, "trio": 7}),
    Workload("lock_100", "100 tasks on one lock", batch=100, targets={"uvloop": 3, "asyncio": 5, "trio": 9}),
    Workload("lock", "lock, nobody else wants it", targets=_UNCONTENDED),
    Workload("semaphore", "semaphore, with permits left", targets=_UNCONTENDED),
    Workload("event_wait", "wait for an event that is set", targets=_UNCONTENDED),
    Workload("gather_1000", "gather of 1000 trivial children, each", batch=1000, targets={"asyncio": 2}),
    Workload("outside_wakeup", "woken by a call from outside any task", unit="us"),
    Workload("guest_switch", "switch, as a guest of asyncio (asyncio: its own)"),
    Workload("guest_wakeup", "woken by asyncio, as its guest (asyncio: its own)", unit="us"),
    Workload("processes", "start and reap `true`, 500 times", unit="us", size=500, targets={"asyncio": 1, "uvloop": 1}),
    Workload("processes_at_once", "the same, all at once", unit="us", size=500, targets={"asyncio": 1, "uvloop": 1}),
    Workload("thread_call", "a call in a thread and back", unit="us", targets={"uvloop": 2, "trio": 4}),
    Workload("thread_call_pinned", "the same on one CPU", unit="us", targets={"uvloop": 2, "trio": 4}),
    Workload("thread_calls_40", "10,000 such calls, 40 at once, each", unit="us", size=10_000, targets={"asyncio": 1}),
    Workload("run_noop", "run(noop)", unit="us"),
    Workload("import", "import", unit="ms"),
)

UNITS = {"ns": 1e9, "us": 1e6, "ms": 1e3, "B": 1.0}


def pin() -> None:
    """Keep this thread, and those that it will start, on one CPU: what it costs to wake another one is left out."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def sized(operation: Callable[[int], float], workload: Workload, at_least: float, repeats: int) -> float:
    """Seconds (or bytes) per operation: the best of `repeats`, at a size that takes `at_least` seconds."""
    size = workload.size
    if not size:
        size = workload.batch
        while (elapsed := operation(size)) < at_least:
            growth = 10.0 if elapsed < at_least / 10 else 1.2 * at_least / elapsed
            size = max(size + workload.batch, int(size * growth) // workload.batch * workload.batch)
    best = float("inf")
    for _ in range(repeats):
        gc.collect()  # what the last repeat has left is not this one's to clean up
        best = min(best, operation(size))
    return best / size


async def timed(
    operation: Callable[[int], Awaitable[object]], batch: int = 1, at_least: float = 0.02, repeats: int = 5
) -> float:
    """The same from inside a run: seconds per operation of `await operation(n)`, which does `n` of them."""
    size, elapsed = -(-100 // batch) * batch, 0.0
    while elapsed < at_least:
        start = time.perf_counter()
        await operation(size)
        elapsed = time.perf_counter() - start
        if elapsed < at_least:
            growth = 10.0 if elapsed < at_least / 10 else 1.2 * at_least / elapsed
            size = (int(size * growth) // batch + 1) * batch
    best = elapsed
    for _ in range(repeats):
        start = time.perf_counter()
        await operation(size)
        best = min(best, time.perf_counter() - start)
    return best / size
