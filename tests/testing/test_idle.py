"""wait_all_tasks_blocked: until no other task can run, and nothing has happened for a while."""

from __future__ import annotations

import socket
from math import inf, nan
from typing import Any

import pytest

import kernel
from kernel.lowlevel import ParkingLot, checkpoint, current_task, wait_readable
from kernel.testing import MockClock, wait_all_tasks_blocked


def test_it_returns_when_all_others_wait() -> None:
    log: list[str] = []

    async def busy(name: str, steps: int) -> None:
        for _ in range(steps):
            await checkpoint()
        log.append(name)
        await kernel.sleep_forever()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(busy, "short", 3)
            nursery.start_soon(busy, "long", 1000)
            await wait_all_tasks_blocked()
            log.append("idle")
            nursery.cancel_scope.cancel()

    kernel.run(main)
    assert log == ["short", "long", "idle"]


def test_it_returns_when_there_is_nobody_else() -> None:
    async def main() -> None:
        await wait_all_tasks_blocked()
        await wait_all_tasks_blocked(0.001)

    kernel.run(main)


def test_it_waits_for_what_those_it_finds_start() -> None:
    log: list[str] = []
    lot = ParkingLot()

    async def chain(nursery: kernel.Nursery, left: int) -> None:
        if left:
            nursery.start_soon(chain, nursery, left - 1)
        else:
            log.append("end of the chain")
            await lot.park()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(chain, nursery, 200)
            await wait_all_tasks_blocked()
            log.append("idle")
            lot.unpark()

    kernel.run(main)
    assert log == ["end of the chain", "idle"]


def test_the_shortest_cushion_wakes_first_and_equal_ones_wake_together() -> None:
    log: list[str] = []

    async def waiter(name: str, cushion: float) -> None:
        await wait_all_tasks_blocked(cushion)
        log.append(name)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for name, cushion in (("long", 0.002), ("b", 0.0), ("middle", 0.001), ("c", 0.0)):
                nursery.start_soon(waiter, name, cushion)

    kernel.run(main)
    assert log == ["b", "c", "middle", "long"]


def test_those_who_wake_are_busy_for_those_with_a_longer_cushion() -> None:
    log: list[str] = []

    async def short() -> None:
        for number in range(3):
            await wait_all_tasks_blocked(0)
            log.append(f"short {number}")

    async def longer() -> None:
        await wait_all_tasks_blocked(0.001)
        log.append("long")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(longer)
            nursery.start_soon(short)

    kernel.run(main)
    assert log == ["short 0", "short 1", "short 2", "long"]


def test_a_socket_that_is_ready_comes_first() -> None:
    a, b = socket.socketpair()
    log: list[str] = []

    async def reader() -> None:
        await wait_readable(a)
        log.append("read")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(reader)
            await wait_all_tasks_blocked()
            log.append("idle")
            b.send(b"x")
            await wait_all_tasks_blocked()
            log.append("idle again")

    with a, b:
        kernel.run(main)
    assert log == ["idle", "read", "idle again"]


def test_a_deadline_that_has_come_comes_first() -> None:
    clock = MockClock()
    log: list[str] = []

    async def sleeper() -> None:
        await kernel.sleep(1)
        log.append("slept")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sleeper)
            await wait_all_tasks_blocked()
            log.append("idle")
            clock.jump(1)
            await wait_all_tasks_blocked()
            log.append("idle again")

    kernel.run(main, clock=clock)
    assert log == ["idle", "slept", "idle again"]


def test_something_that_happens_within_the_cushion_starts_it_anew() -> None:
    log: list[str] = []

    async def sleeper() -> None:
        for number in range(3):
            await kernel.sleep(0.001)
            log.append(f"{number}")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sleeper)
            await wait_all_tasks_blocked(0.3)
            log.append("idle")

    kernel.run(main)
    assert log == ["0", "1", "2", "idle"]


@pytest.mark.parametrize("cushion", [0.0, 5.0, inf])
def test_a_cancelled_one_leaves_nothing_behind(cushion: float) -> None:
    async def main() -> None:
        for early in (True, False):
            with kernel.CancelScope() as scope:
                async with kernel.open_nursery() as nursery:
                    if early:
                        scope.cancel()
                    else:
                        nursery.start_soon(cancel_later, scope)
                    await wait_all_tasks_blocked(cushion)
                    raise AssertionError("not reached")
            assert scope.cancelled_caught
            assert kernel.lowlevel.current_kernel().idle_waiters == {}
        await wait_all_tasks_blocked()

    async def cancel_later(scope: kernel.CancelScope) -> None:
        scope.cancel()

    kernel.run(main)


@pytest.mark.parametrize("bad", [-1, -0.001, nan, -inf])
def test_what_is_no_amount_of_time_is_refused(bad: float) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="cushion must be a number of real seconds from 0 up, not"):
            await wait_all_tasks_blocked(bad)

    kernel.run(main)


def test_the_trap_shows_what_it_is() -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(wait_all_tasks_blocked, 5)
            await checkpoint()
            (task,) = nursery.child_tasks
            assert repr(task.trap) == "<WaitIdle for 5 s>"
            nursery.cancel_scope.cancel()

    kernel.run(main)


# ---- together with autojump ---------------------------------------------------------------------------


def test_it_goes_before_an_autojump() -> None:
    log: list[tuple[str, float]] = []

    async def sleeper() -> None:
        await kernel.sleep(10)
        log.append(("slept", kernel.current_time()))

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sleeper)
            for _ in range(3):
                await wait_all_tasks_blocked()
                log.append(("idle", kernel.current_time()))

    kernel.run(main, clock=MockClock(autojump_threshold=0))
    assert log == [("idle", 0)] * 3 + [("slept", 10)]


@pytest.mark.parametrize(
    ("cushion", "threshold", "expected"),
    [(0.001, 0.0, "jump idle"), (0.0, 0.001, "idle jump"), (0.001, 0.001, "idle jump"), (0.002, 0.001, "jump idle")],
)
def test_the_shorter_of_cushion_and_threshold_comes_first(cushion: float, threshold: float, expected: str) -> None:
    log: list[str] = []

    async def sleeper() -> None:
        await kernel.sleep(10)
        log.append("jump")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sleeper)
            await wait_all_tasks_blocked(cushion)
            log.append("idle")

    kernel.run(main, clock=MockClock(autojump_threshold=threshold))
    assert " ".join(log) == expected


def test_a_clock_that_could_jump_but_has_nowhere_to_go_does_not_get_in_the_way() -> None:
    async def main() -> float:
        await wait_all_tasks_blocked(0.001)
        return kernel.current_time()

    assert kernel.run(main, clock=MockClock(autojump_threshold=0)) == 0


def test_an_infinite_cushion_never_ends_by_itself() -> None:
    log: list[Any] = []

    async def waiter() -> None:
        await wait_all_tasks_blocked(inf)
        log.append("idle")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(waiter)
            await kernel.sleep(1000)
            log.append(current_task().state)
            nursery.cancel_scope.cancel()

    kernel.run(main, clock=MockClock(autojump_threshold=0))
    assert log == ["running"]
