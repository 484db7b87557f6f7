"""How many schedules a second: our explorer and, where they are installed, simloom, seedloop and frontrun.

    python tests/bench/schedules.py [SECONDS]        each contender for that long, 1 by default, in turn, three times

The program is the same for all: a main task starts three tasks and waits for them, and each lets the others run once.
With us that is a run of ten steps, three of them the kernel's own; with asyncio, of about as many callbacks.

What is compared is the whole cost of one more schedule: to choose it, to run the program under it, to look whether it
has failed. What comes with that differs: simloom and seedloop simulate a network and more, and write down what happens;
frontrun traces the byte code and so sees races between any two lines. So this says how far one gets in a second with
each, and not who is better. The figures are seconds of the process's own time; of three rounds the best counts.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import kernel
from kernel.lowlevel import checkpoint
from kernel.testing import explore

Contender = Callable[[int], int]
"""Runs about that many schedules, and says how many it were."""


async def program() -> None:
    async with kernel.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(checkpoint)


async def yields() -> None:
    await asyncio.sleep(0)


async def asyncio_program(*_: object) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(yields())


def ours(number: int, **options: Any) -> int:
    """All that there are, or as many as wanted, again and again."""
    done = 0
    while done < number:
        done += explore(program, schedules=number - done, **options).schedules
    return done


def simloom_random(simloom: Any, number: int) -> int:
    done: int = simloom.explore(asyncio_program, runs=number).runs
    return done


def simloom_systematic(simloom: Any, number: int) -> int:
    done: int = simloom.explore_systematic(asyncio_program, max_delays=100, max_schedules=number).schedules
    return done


def seedloop_check(seedloop: Any, number: int) -> int:
    done: int = seedloop.check(asyncio_program, seeds=number).checked
    return done


def frontrun_random(frontrun: Any, number: int) -> int:
    async def worker(state: object) -> None:
        await asyncio.sleep(0)

    exploring = frontrun.explore(
        setup=object, workers=worker, invariant=lambda state: True, count=3, strategy="random", max_attempts=number
    )
    done: int = asyncio.run(exploring).num_explored
    return done


def contenders() -> dict[str, Contender]:
    found: dict[str, Contender] = {
        "kernel, all schedules": ours,
        "kernel, random": partial(ours, strategy="random"),
        "kernel, PCT": partial(ours, strategy="pct"),
        "kernel, all schedules and cancellations": partial(ours, cancel="tasks"),
    }
    peers: list[tuple[str, str, Callable[[Any, int], int]]] = [
        ("simloom", "random", simloom_random),
        ("simloom", "systematic", simloom_systematic),
        ("seedloop", "random", seedloop_check),
        ("frontrun", "random", frontrun_random),
    ]
    for module, what, function in peers:
        try:
            found[f"{module}, {what}"] = partial(function, importlib.import_module(module))
        except ImportError:
            print(f"{module} is not installed", file=sys.stderr)
    return found


def cost(contender: Contender, seconds: float) -> float:
    """Seconds per schedule."""
    number = 90
    while True:
        start = time.process_time()
        done = contender(number)
        elapsed = time.process_time() - start
        if elapsed >= seconds / 2:
            return elapsed / done
        number = int(number * min(10.0, seconds / max(elapsed, 0.001))) + 1


def main(seconds: float = 1.0, rounds: int = 3) -> dict[str, float]:
    """Print a table; return schedules per second."""
    everybody = contenders()
    gc.collect()
    gc.freeze()  # simloom collects garbage after each run, and shall not have to look at all that was imported here
    best = dict.fromkeys(everybody, float("inf"))
    for _ in range(rounds):
        for name, contender in everybody.items():
            best[name] = min(best[name], cost(contender, seconds))
    first = next(iter(best.values()))
    print(f"{'':42}{'schedules/s':>12}{'of ours':>10}")
    for name, each in best.items():
        print(f"{name:42}{1 / each:12,.0f}{first / each:10.3f}")
    return {name: 1 / each for name, each in best.items()}


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]))
