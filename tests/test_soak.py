"""The soak of tests/bench/soak.py in small: the same tasks, the same books, a few seconds instead of minutes."""

from __future__ import annotations

import gc

import pytest
from bench.soak import Report, Soak, SoakError, Watcher, soak

import kernel
from kernel.core.task import Task
from kernel.testing import MockClock

OPERATIONS = 60_000
"""Three seasons."""


@pytest.fixture(scope="module")
def report() -> Report:
    """What one short soak did. It has checked its own books by then: after each season, and at the end."""
    return soak(OPERATIONS, seed=1)


def test_soak_loses_nothing_and_leaves_nothing(report: Report) -> None:
    counts = report.counts
    assert report.operations >= OPERATIONS
    assert counts["tasks ended"] == counts["tasks started"]
    assert counts["errors seen"] == counts["errors raised"]
    assert counts["bytes sent"] + counts["bytes not sent"] == counts["bytes wanted"]
    assert counts["bytes received"] + counts["bytes left"] == counts["bytes sent"]


def test_soak_comes_to_everything_it_is_about(report: Report) -> None:
    """A soak in which nobody is ever cancelled while sending would balance, too."""
    for what in (
        "audits",
        "bytes left",
        "bytes not sent",
        "bytes received",
        "closed while waiting",
        "errors raised",
        "nurseries opened",
        "parks",
        "scopes cancelled",
        "scopes changed",
        "scopes entered",
        "scopes that caught",
        "sleeps",
        "sockets closed",
        "tasks let go",
        "tasks started",
    ):
        assert report.counts[what] > 0, what


def test_soak_goes_the_same_way_each_time_in_virtual_time(report: Report) -> None:
    again = soak(OPERATIONS, seed=1)
    assert (again.digest, again.counts) == (report.digest, report.counts)
    assert soak(1000, seed=2).digest != soak(1000, seed=3).digest


def test_soak_ends_in_real_time_too() -> None:
    counts = soak(2000, seed=1, real=True).counts
    assert counts["tasks ended"] == counts["tasks started"] > 0


def test_soak_of_cancelled_tasks_makes_no_cyclic_garbage() -> None:
    """Cancelled tasks, with nurseries open or in the middle of `start`, go by reference counting."""
    kept: list[int] = []

    def finished() -> int:
        return sum(type(thing) is Task and thing.outcome is not None for thing in gc.get_objects())

    def count(this: Soak) -> None:
        kept.append(finished() - before)

    gc.collect()
    before = finished()
    gc.disable()
    try:
        kernel.run(Soak(2000, 1).main, count, clock=MockClock(autojump_threshold=0))
    finally:
        gc.enable()
    assert kept == [0]


def test_soak_notices_what_is_lost() -> None:
    """The books can fail: a task, an error and a byte that nobody accounts for."""

    def run(spoil: str) -> None:
        this = Soak(500, seed=1)
        this.counts[spoil] += 1
        kernel.run(this.main, clock=MockClock(autojump_threshold=0))

    for spoil in ("tasks started", "errors raised", "bytes sent", "bytes received"):
        with pytest.raises(SoakError, match="and it should be"):
            run(spoil)


def test_soak_notices_growing_memory() -> None:
    this, watcher = Soak(1000, seed=1), Watcher(1000)
    this.report.operations, this.report.memory_after_warm_up = 1000, 1
    with pytest.raises(SoakError, match="memory has grown"):
        watcher(this)
