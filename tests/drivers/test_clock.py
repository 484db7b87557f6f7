"""MonotonicClock: the system's clock behind the port."""

from __future__ import annotations

import time
from math import inf

import pytest

import kernel
from kernel.drivers.clock import MonotonicClock


def test_the_time_is_the_systems_monotonic_one() -> None:
    clock = MonotonicClock()
    before = time.monotonic()
    now = clock.current_time()
    assert before <= now <= time.monotonic()


def test_starting_the_clock_changes_nothing() -> None:
    clock = MonotonicClock()
    before = clock.current_time()
    clock.start_clock()
    assert clock.current_time() - before >= 0


def test_the_sleep_time_is_what_is_left_until_the_deadline() -> None:
    clock = MonotonicClock()
    assert clock.deadline_to_sleep_time(inf) == inf
    assert clock.deadline_to_sleep_time(-inf) == -inf
    assert clock.deadline_to_sleep_time(clock.current_time()) <= 0
    deadline = clock.current_time() + 1000
    assert 0 < clock.deadline_to_sleep_time(deadline) <= 1000


def test_it_never_jumps() -> None:
    clock = MonotonicClock()
    assert clock.autojump_threshold == inf
    with pytest.raises(AssertionError):
        clock.autojump(1)


def test_it_is_the_clock_of_a_run_that_was_given_none() -> None:
    async def main() -> None:
        before = time.monotonic()
        assert isinstance(kernel.lowlevel.current_clock(), MonotonicClock)
        assert before <= kernel.current_time() <= time.monotonic()
        await kernel.sleep(0.001)
        assert kernel.current_time() >= before + 0.001

    kernel.run(main)
