"""MockClock: virtual time by hand, at a rate, and by jumping ahead when there is nothing to do."""

from __future__ import annotations

import socket
from math import inf, nan
from typing import Any

import pytest

import kernel
from kernel.lowlevel import checkpoint, current_clock, wait_readable
from kernel.testing import MockClock, wait_all_tasks_blocked


class RealTime:
    """What the clock takes for real time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_time_begins_at_zero_and_stands_still() -> None:
    real = RealTime()
    clock = MockClock(real_clock=real)
    assert clock.current_time() == 0
    real.now += 100
    assert clock.current_time() == 0
    assert clock.rate == 0
    assert clock.autojump_threshold == inf


def test_time_runs_at_its_rate() -> None:
    real = RealTime()
    clock = MockClock(rate=2.5, real_clock=real)
    real.now += 4
    assert clock.current_time() == 10
    assert clock.deadline_to_sleep_time(20) == 4
    assert clock.deadline_to_sleep_time(10) == 0
    assert clock.deadline_to_sleep_time(3) == 0
    assert clock.deadline_to_sleep_time(inf) == inf


def test_when_time_stands_still_no_deadline_comes_by_itself() -> None:
    clock = MockClock()
    assert clock.deadline_to_sleep_time(1) == inf
    assert clock.deadline_to_sleep_time(inf) == inf
    assert clock.deadline_to_sleep_time(0) == 0
    assert clock.deadline_to_sleep_time(-1) == 0


def test_time_is_continuous_when_the_rate_changes() -> None:
    real = RealTime()
    clock = MockClock(rate=2, real_clock=real)
    real.now += 5
    clock.rate = 10
    assert clock.current_time() == 10
    real.now += 1
    assert clock.current_time() == 20
    clock.rate = 0
    real.now += 1000
    assert clock.current_time() == 20
    clock.rate = 1
    assert clock.current_time() == 20
    real.now += 1
    assert clock.current_time() == 21


def test_jumps_add_up_with_running_time() -> None:
    real = RealTime()
    clock = MockClock(rate=1, real_clock=real)
    clock.jump(100)
    real.now += 1
    clock.jump(0)
    clock.jump(0.5)
    assert clock.current_time() == 101.5


@pytest.mark.parametrize("bad", [-1, -0.001, nan, -inf])
def test_what_is_no_amount_of_time_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="rate must be a finite number from 0 up, not"):
        MockClock(rate=bad)
    with pytest.raises(ValueError, match="autojump_threshold must be a number from 0 up, not"):
        MockClock(autojump_threshold=bad)
    clock = MockClock(rate=1, autojump_threshold=2)
    with pytest.raises(ValueError, match="rate must be"):
        clock.rate = bad
    with pytest.raises(ValueError, match="autojump_threshold must be"):
        clock.autojump_threshold = bad
    with pytest.raises(ValueError, match="time cannot go back"):
        clock.jump(bad)
    assert clock.rate == 1
    assert clock.autojump_threshold == 2


def test_an_infinite_rate_is_refused_as_it_leads_to_no_time_at_all() -> None:
    with pytest.raises(ValueError, match="rate must be"):
        MockClock(rate=inf)


def test_the_repr_shows_all_three() -> None:
    clock = MockClock(autojump_threshold=0.5, real_clock=RealTime())
    clock.jump(1.25)
    assert repr(clock) == "<MockClock, time=1.2500000, rate=0, autojump_threshold=0.5>"
    assert repr(MockClock(2, real_clock=RealTime())) == "<MockClock, time=0.0000000, rate=2, autojump_threshold=inf>"


# ---- in a run -----------------------------------------------------------------------------------------


def test_autojump_at_once_makes_a_day_of_sleeping_take_no_time() -> None:
    log: list[tuple[str, float]] = []

    async def child(name: str, seconds: float) -> None:
        await kernel.sleep(seconds)
        log.append((name, kernel.current_time()))

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child, "noon", 43_200)
            nursery.start_soon(child, "midnight", 86_400)
            nursery.start_soon(child, "soon", 0.5)

    kernel.run(main, clock=MockClock(autojump_threshold=0))
    assert log == [("soon", 0.5), ("noon", 43_200), ("midnight", 86_400)]


def test_autojump_happens_only_when_every_task_waits() -> None:
    log: list[str] = []

    async def busy() -> None:
        for _ in range(500):
            await checkpoint()
        log.append("busy is done")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(busy)
            await kernel.sleep(1)
            log.append("slept")

    kernel.run(main, clock=MockClock(autojump_threshold=0))
    assert log == ["busy is done", "slept"]


def test_autojump_goes_to_the_deadline_of_a_scope_too() -> None:
    async def main() -> None:
        with kernel.move_on_after(60) as scope:
            await kernel.sleep_forever()
        assert scope.cancelled_caught
        assert kernel.current_time() == 60

    kernel.run(main, clock=MockClock(autojump_threshold=0))


def test_autojump_after_a_small_threshold() -> None:
    async def main() -> None:
        await kernel.sleep(1_000_000)
        assert kernel.current_time() == 1_000_000

    kernel.run(main, clock=MockClock(autojump_threshold=0.001))


def test_a_packet_that_is_there_comes_before_the_jump() -> None:
    a, b = socket.socketpair()
    log: list[tuple[str, float]] = []

    async def reader() -> None:
        await wait_readable(a)
        log.append(("read", kernel.current_time()))

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(reader)
            b.send(b"x")
            await kernel.sleep(100)
            log.append(("slept", kernel.current_time()))

    with a, b:
        kernel.run(main, clock=MockClock(autojump_threshold=0))
    assert log == [("read", 0), ("slept", 100)]


def test_without_autojump_time_moves_by_hand_and_sleepers_are_served_when_the_kernel_looks() -> None:
    clock = MockClock()
    log: list[str] = []

    async def child(seconds: float) -> None:
        await kernel.sleep(seconds)
        log.append(f"{seconds}")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for seconds in (3, 1, 2):
                nursery.start_soon(child, seconds)
            await wait_all_tasks_blocked()
            clock.jump(0.999)
            await wait_all_tasks_blocked()
            assert log == []
            clock.jump(0.001)
            assert log == []  # not at once
            await wait_all_tasks_blocked()
            assert log == ["1"]
            clock.jump(10)
            await wait_all_tasks_blocked()
            assert log == ["1", "2", "3"]

    kernel.run(main, clock=clock)


def test_a_virtual_clock_meets_deadlines_that_are_past_already() -> None:
    clock = MockClock(autojump_threshold=0)
    clock.jump(1000)

    async def main() -> None:
        with kernel.move_on_at(5) as scope:
            assert scope.cancel_called
            await checkpoint()
            raise AssertionError("not reached")
        assert scope.cancelled_caught
        await kernel.sleep_until(5)
        await kernel.sleep(0)
        with kernel.move_on_after(0) as scope:
            await kernel.sleep_forever()
        assert scope.cancelled_caught
        assert kernel.current_time() == 1000

    kernel.run(main, clock=clock)


def test_jumping_past_many_deadlines_at_once_serves_them_in_order() -> None:
    clock = MockClock()
    log: list[int] = []

    async def child(seconds: int) -> None:
        await kernel.sleep(seconds)
        log.append(seconds)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for seconds in (5, 3, 9, 1, 7):
                nursery.start_soon(child, seconds)
            await wait_all_tasks_blocked()
            clock.jump(100)

    kernel.run(main, clock=clock)
    assert log == [1, 3, 5, 7, 9]


def test_the_threshold_may_be_set_while_it_runs() -> None:
    clock = MockClock()

    async def main() -> None:
        clock.autojump_threshold = 0
        await kernel.sleep(10)
        clock.autojump_threshold = inf
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(kernel.sleep, 10)
            await wait_all_tasks_blocked()
            assert kernel.current_time() == 10
            nursery.cancel_scope.cancel()

    kernel.run(main, clock=clock)


def test_one_clock_serves_several_runs_and_goes_on_from_where_it_stood() -> None:
    real = RealTime()
    clock = MockClock(rate=1, autojump_threshold=0, real_clock=real)

    async def main() -> float:
        assert current_clock() is clock
        await kernel.sleep(5)
        return kernel.current_time()

    assert kernel.run(main, clock=clock) == 5
    assert kernel.run(main, clock=clock) == 10
    clock.jump(1)
    assert kernel.run(main, clock=clock) == 16


def test_an_autojump_never_goes_back() -> None:
    clock = MockClock()
    clock.jump(10)
    clock.autojump(5)
    assert clock.current_time() == 10
    clock.autojump(12)
    assert clock.current_time() == 12


def test_a_running_clock_serves_sleepers_in_real_time() -> None:
    async def main() -> Any:
        await kernel.sleep(10)
        return kernel.current_time()

    assert kernel.run(main, clock=MockClock(rate=100_000)) >= 10
