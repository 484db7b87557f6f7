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
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

CONTENDERS = ("kernel", "asyncio", "uvloop", "trio", "curio")
SCALING_CONTENDERS = ("kernel", "asyncio", "trio")
BACKGROUNDS = ("sleeping tasks", "standing deadlines")


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
    Workload("run_noop", "run(noop)", unit="us"),
    Workload("import", "import", unit="ms"),
)

UNITS = {"ns": 1e9, "us": 1e6, "ms": 1e3, "B": 1.0}


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


async def timed(operation: Callable[[int], Awaitable[object]], at_least: float = 0.02, repeats: int = 5) -> float:
    """The same from inside a run: seconds per operation of `await operation(n)`, which does `n` of them."""
    size, elapsed = 100, 0.0
    while elapsed < at_least:
        start = time.perf_counter()
        await operation(size)
        elapsed = time.perf_counter() - start
        if elapsed < at_least:
            size = int(size * (10.0 if elapsed < at_least / 10 else 1.2 * at_least / elapsed)) + 1
    best = elapsed
    for _ in range(repeats):
        start = time.perf_counter()
        await operation(size)
        best = min(best, time.perf_counter() - start)
    return best / size
