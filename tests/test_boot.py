"""kernel.run and its companions: which drivers a run gets, and that they are given back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from typing import Any

import pytest

import kernel
from kernel.drivers.clock import MonotonicClock
from kernel.drivers.poller import default_poller
from kernel.drivers.timers import SortedTimers
from kernel.lowlevel import checkpoint, current_clock, current_kernel
from kernel.testing import MockClock


async def drivers() -> tuple[Any, ...]:
    await checkpoint()
    running = current_kernel()
    return running.clock, running.timers, running.poller, running.ready


def test_a_run_gets_the_best_drivers_there_are_and_first_come_first_served() -> None:
    expected = default_poller()
    expected.close()
    clock, timers, poller, ready = kernel.run(drivers)
    assert type(clock) is MonotonicClock
    assert type(timers) is SortedTimers
    assert type(poller) is type(expected)
    assert type(ready) is deque


class EmptyIsFalse(deque[Any]):
    """A ready queue of the user's; an empty one is false, and is used all the same."""


class ClosingPoller:
    """Counts how often it is closed, and is false, as it has a length of 0."""

    def __init__(self) -> None:
        self.inner = default_poller()
        self.closed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def close(self) -> None:
        self.closed += 1
        self.inner.close()


class FalseClock(MockClock):
    def __bool__(self) -> bool:
        return False


def test_a_run_uses_the_drivers_it_is_given_even_if_they_count_as_false() -> None:
    given = FalseClock(), ClosingPoller(), EmptyIsFalse()
    clock, _, poller, ready = kernel.run(drivers, clock=given[0], poller=given[1], ready=given[2])
    assert (clock, poller, ready) == given
    assert clock is given[0]
    assert ready is given[2]


async def failing() -> None:
    raise KeyError


def plain() -> None:
    pass


@pytest.mark.parametrize(("main", "error"), [(failing, KeyError), (plain, TypeError), (42, TypeError)])
def test_the_poller_is_closed_once_however_the_run_ends(main: Any, error: type[BaseException]) -> None:
    poller = ClosingPoller()
    with pytest.raises(error):
        kernel.run(main, poller=poller)
    assert poller.closed == 1
    poller = ClosingPoller()
    kernel.run(drivers, poller=poller)
    assert poller.closed == 1


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
def test_a_hundred_runs_leave_no_fd_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        kernel.run(drivers)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_run_that_was_refused_leaves_no_fd_open_and_no_kernel_behind() -> None:
    async def main() -> None:
        before = set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()
        with pytest.raises(RuntimeError, match="from inside a kernel"):
            kernel.run(drivers)
        assert before == (set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set())

    kernel.run(main)


def test_one_run_after_another_starts_from_nothing() -> None:
    async def main() -> int:
        return id(current_kernel().main_task)

    assert [kernel.run(drivers)[3] for _ in range(3)] == [deque()] * 3
    assert isinstance(kernel.run(main), int)


def test_current_time_and_current_clock_are_those_of_the_run() -> None:
    clock = MockClock()
    clock.jump(42)

    async def main() -> None:
        assert kernel.current_time() == 42
        assert current_clock() is clock

    kernel.run(main, clock=clock)


def test_current_time_and_current_clock_outside_a_run_are_errors_that_name_them() -> None:
    with pytest.raises(RuntimeError, match=r"^current_time\(\) was used outside the kernel"):
        kernel.current_time()
    with pytest.raises(RuntimeError, match=r"^current_clock\(\) was used outside the kernel"):
        current_clock()


def test_every_public_name_is_there_and_listed() -> None:
    for module in (kernel, kernel.lowlevel, kernel.testing):
        assert len(set(module.__all__)) == len(module.__all__)
        for name in module.__all__:
            assert hasattr(module, name), name


def test_importing_the_package_brings_in_no_other_event_loop() -> None:
    program = "import sys, kernel; print(sorted({'asyncio', 'trio', 'curio', 'uvloop', 'ssl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
