"""How many schedules it takes to find each bug of the gallery: one after the other, at random, and with PCT.

    PYTHONPATH=.:tests python -m gallery.counts

`first` is the number of the first schedule that fails when all are tried, depth first. Random and PCT, with depths 3
and 6, start from 21 seeds; the number is the median, in brackets the worst. A `-` means that 2,000 were not enough.
`deviations` is how many choices of the shrunk schedule differ from first come, first served, and `correct` how many
schedules the correct program has. All numbers are the same in each run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from statistics import median
from types import ModuleType
from typing import Literal

from kernel.testing import ScheduleFailure, explore

from . import ALL, name_of, options

SEEDS = range(21)
PATIENCE = 2_000

Strategy = Literal["exhaustive", "random", "pct"]


@dataclass(frozen=True)
class Counts:
    """What the table says of one exhibit."""

    name: str
    schedule: str
    first: int
    random: list[float]
    pct_3: list[float]
    pct_6: list[float]
    correct: int

    @property
    def deviations(self) -> int:
        return sum(character not in "0()" for character in without_runs(self.schedule))


def without_runs(schedule: str) -> str:
    """The schedule, without the lengths of its runs of zeros."""
    return "".join(part.partition(")")[2] if number else part for number, part in enumerate(schedule.split("(")))


def count(exhibit: ModuleType, seeds: Iterable[int] = SEEDS) -> Counts:
    """Look for one bug, in all three ways."""
    failure = find(exhibit, "exhaustive", 0)
    assert failure is not None
    correct = explore(exhibit.correct, **options(exhibit))
    assert correct.complete
    return Counts(
        name_of(exhibit),
        failure.schedule,
        failure.schedules,
        [tries(exhibit, "random", seed) for seed in seeds],
        [tries(exhibit, "pct", seed, 3) for seed in seeds],
        [tries(exhibit, "pct", seed, 6) for seed in seeds],
        correct.schedules,
    )


def find(exhibit: ModuleType, strategy: Strategy, seed: int, **more: int) -> ScheduleFailure | None:
    try:
        explore(exhibit.buggy, strategy=strategy, seed=seed, **more, **options(exhibit))
    except ScheduleFailure as failure:
        return failure
    return None


def tries(exhibit: ModuleType, strategy: Strategy, seed: int, depth: int = 3) -> float:
    """How many schedules it took from this seed."""
    failure = find(exhibit, strategy, seed, schedules=PATIENCE, depth=depth)
    return inf if failure is None else failure.schedules


def in_words(numbers: list[float]) -> str:
    middle, worst = (f"{number:,.0f}" if number < inf else "-" for number in (median(numbers), max(numbers)))
    return f"{middle} ({worst})"


def table(all_counts: Iterable[Counts]) -> str:
    """As Markdown."""
    lines = ["| bug | deviations | first | random | PCT, 3 | PCT, 6 | correct |", "|---|--:|--:|--:|--:|--:|--:|"]
    for counts in all_counts:
        lines.append(
            f"| `{counts.name}` | {counts.deviations} | {counts.first:,} | {in_words(counts.random)} "
            f"| {in_words(counts.pct_3)} | {in_words(counts.pct_6)} | {counts.correct:,} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(count(exhibit) for exhibit in ALL))
