"""One measurement in a process of its own, which compare.py starts: `measure.py CONTENDER WORKLOAD SECONDS REPEATS`.

Prints one line of JSON: seconds or bytes per operation, or for `scaling:BACKGROUND:POPULATION` and
`waiters:THING:POPULATION` a figure for each operation. So no contender inherits another's heap, imports or garbage.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import os
import subprocess
import sys
import time
import tracemalloc
from functools import partial
from types import ModuleType
from typing import Any

from workloads import WORKLOADS, Workload, sized


def main(contender: str, name: str, at_least: float, repeats: int) -> None:
    if name == "import":
        print(json.dumps(import_time(contender, 5 * repeats)))
        return
    module = importlib.import_module(f"workloads_{contender}")
    if ":" in name:
        curve, subject, population = name.split(":")
        module.run(getattr(module, curve), int(population), subject, _print_and_leave)
    workload = next(workload for workload in WORKLOADS if workload.name == name)
    print(json.dumps(measure(module, workload, at_least, repeats)))


def measure(module: ModuleType, workload: Workload, at_least: float, repeats: int) -> float | None:
    """Seconds or bytes per operation; None if the contender does not have it."""
    if workload.name == "memory":
        return memory(module, workload.size)
    if workload.name == "memory_rss":
        return module.run(module.memory, workload.size, resident) / workload.size if resident() else None
    function = getattr(module, workload.name, None)
    if function is None:
        return None
    operation = partial(module.run, function) if inspect.iscoroutinefunction(function) else function
    return sized(operation, workload, at_least, repeats)


def memory(module: ModuleType, size: int) -> float:
    """Python's own allocations only: what a library takes in C (uvloop) is not in it. The resident set has that too."""
    module.run(module.memory, 10, traced)  # what is allocated once stays out of it
    tracemalloc.start()
    grown: float = module.run(module.memory, size, traced)
    return grown / size


def traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def resident() -> int:
    """Bytes of the process in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def import_time(contender: str, repeats: int) -> float:
    """A fresh interpreter that imports it, less one that does not, in turn; of each the best."""
    best = {code: float("inf") for code in ("pass", f"import {contender}")}
    for _ in range(repeats):
        for code in best:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            best[code] = min(best[code], time.perf_counter() - start)
    return best[f"import {contender}"] - best["pass"]


def _print_and_leave(figures: dict[str, Any]) -> None:
    print(json.dumps(figures), flush=True)
    os._exit(0)  # cancelling a million sleepers is another measurement


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
