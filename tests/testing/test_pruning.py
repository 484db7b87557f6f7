"""shares="kernel objects": of schedules that only swap independent steps, one is run, and nothing that can come of a
program is missed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from testing.pruning_programs import Program, endings_of, programs

import kernel
from kernel.lowlevel import checkpoint
from kernel.testing import ScheduleFailure, explore, replay, wait_all_tasks_blocked

LONG = os.environ.get("KERNEL_TEST_LONG", "") not in ("", "0")
EXAMPLES, LIMIT = (2_000, 3_000) if LONG else (30, 300)


def pruned(program: Callable[[], Awaitable[Any]], **options: Any) -> int:
    result = explore(program, shares="kernel objects", **options)
    assert result.complete
    return result.schedules


def tasks(*functions: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[None]]:
    """A program that starts these, and waits for them. Each time, `functions` have to make what they share."""

    async def program() -> None:
        async with kernel.open_nursery() as nursery:
            for number, function in enumerate(functions):
                nursery.start_soon(function, name=f"task {number}")

    return program


# ---- how much is left out ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 3, 10])
def test_tasks_with_a_lock_each_have_one_schedule(number: int) -> None:
    async def use() -> None:
        lock = kernel.Lock()
        for _ in range(3):
            async with lock:
                await checkpoint()

    assert pruned(tasks(*[use] * number)) == 1


def test_the_same_without_the_declaration_has_thousands() -> None:
    async def use() -> None:
        async with kernel.Lock():
            await checkpoint()

    assert explore(tasks(use, use, use)).schedules == 4080


def test_what_comes_before_they_meet_makes_no_schedules() -> None:
    """Two tasks come to a lock, in one order or the other; how far each was when the other came does not matter."""

    def meeting(steps: int) -> Callable[[], Awaitable[None]]:
        async def program() -> None:
            lock = kernel.Lock()

            async def use() -> None:
                for _ in range(steps):
                    await checkpoint()
                async with lock:
                    pass

            async with kernel.open_nursery() as nursery:
                nursery.start_soon(use)
                nursery.start_soon(use)

        return program

    assert pruned(meeting(0)) == pruned(meeting(1)) == pruned(meeting(7))


def test_one_who_writes_and_two_who_only_look_have_four_schedules() -> None:
    """Each looks before or after, and does not care for the other one."""
    seen = set()

    async def program() -> None:
        event = kernel.Event()
        looks: list[bool] = [False, False]

        async def look(number: int) -> None:
            looks[number] = event.is_set()

        async def write() -> None:
            event.set()

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(look, 0)
            nursery.start_soon(look, 1)
            nursery.start_soon(write)
        seen.add(tuple(looks))

    assert pruned(program) == 4
    assert len(seen) == 4


def test_that_tasks_end_in_another_order_makes_no_schedule_of_its_own() -> None:
    async def long() -> None:
        for _ in range(5):
            await checkpoint()

    assert pruned(tasks(checkpoint, long, checkpoint, long)) == 1


def test_that_they_fail_in_another_order_does() -> None:
    """The errors of the group are in the order in which they came."""

    async def fail(how: type[Exception]) -> None:
        raise how

    seen = set()

    async def program() -> None:
        try:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(fail, KeyError)
                nursery.start_soon(fail, ValueError)
        except* (KeyError, ValueError) as group:
            seen.add(tuple(type(error).__name__ for error in group.exceptions))

    pruned(program)
    assert seen == {("KeyError", "ValueError"), ("ValueError", "KeyError")}


def test_two_pairs_that_do_not_meet_do_not_multiply() -> None:
    async def pair() -> None:
        send, receive = kernel.open_memory_channel[int](1)

        async def sender() -> None:
            with send:
                for value in range(3):
                    await send.send(value)

        async def receiver() -> None:
            assert [value async for value in receive] == [0, 1, 2]

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sender)
            nursery.start_soon(receiver)

    alone = pruned(pair)
    assert alone > 1
    assert pruned(tasks(pair, pair)) == alone**2


# ---- nothing is missed ------------------------------------------------------------------------------


def check(program: Program, limit: int = 20_000, **options: Any) -> tuple[int, int] | None:
    """Both searches come to the same endings. Returns how many schedules they took; None if it would take too long."""
    whole = endings_of(program, limit, prune=False, **options)
    if whole is None:
        return None
    part = endings_of(program, 2 * limit, prune=True, **options)
    assert part is not None, "the pruned search is the longer one"
    assert part[0] == whole[0]
    return whole[1], part[1]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_all_endings_of_random_programs_are_found(program: Program) -> None:
    check(program, LIMIT)


@settings(max_examples=EXAMPLES // 5, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_also_if_somebody_is_cancelled(program: Program) -> None:
    check(program, LIMIT, cancel="tasks")


@settings(max_examples=EXAMPLES // 5, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_also_if_time_passes_at_any_time(program: Program) -> None:
    check(program, LIMIT, deadlines="any time")


@pytest.mark.parametrize(
    "program",
    [
        [[("lock", 0), ("lock", 1)], [("lock", 1), ("lock", 0)]],
        [[("is_locked", 0)], [("locked", 0)], [("is_locked", 0)]],
        [[("wait",), ("is_set",)], [("set",)], [("is_set",)]],
        [[("take",), ("give",)], [("take",), ("value",)]],
        [[("send", 0, 1)], [("receive", 0)], [("receive_nowait", 0)]],
        [[("send_nowait", 1, 1), ("close", 1)], [("receive", 1)], [("buffered", 1)]],
        [[("cancel", 1)], [("step",), ("was_cancelled", 0)], [("step",)]],
        [[("cancel_child", 1)], [("step",), ("step",)], [("done", 1)]],
        [[("join", 1)], [("step",), ("fail",)]],
        [[("join", 2)], [("done", 2)], [("step",)]],
        [[("cancel_all",)], [("step",)], [("children",)]],
        [[("start",)], [("children",)], [("cancel_all",)]],
        [[("race",)], [("cancel", 0)]],
        [[("race_of_failures",)], [("step",)]],
        [[("gather",)], [("is_set",)]],
        [[("meet",)], [("meet",)], [("meet",)]],
        [[("wait_for_change",)], [("change",)], [("change",)]],
        [[("park",)], [("unpark",)], [("unpark",)]],
        [[("listen",)], [("tell", 1)], [("tell", 2)]],
        [[("watch",)], [("update", 1)], [("update", 2)]],
        [[("sleep", 1), ("set",)], [("sleep", 1), ("is_set",)], [("time_out",)]],
        [[("write", 1), ("step",), ("read",)], [("write", 2), ("step",), ("read",)]],
        [[("limited",), ("borrowed",)], [("limited",)]],
        [[("shield", 1), ("cancel", 1)], [("step",), ("step",)]],
    ],
)
def test_all_endings_of_these_are_found(program: Program) -> None:
    counts = check(program)
    assert counts is not None
    assert counts[1] <= counts[0]


@pytest.mark.parametrize(
    "program",
    [
        [[("is_set",)], [("sleep", 1)]],
        [[("read",)], [("read",)], [("time_out",)]],
        [[("wait",)], [("receive", 1), ("set",)], [("send_nowait", 1, 1), ("brief",)]],
        [[("time_out",)], [("step",), ("set",)]],
        [[("sleep", 1), ("unlock", 0)], [("lock", 0), ("step",)]],
    ],
)
def test_also_of_these_if_time_passes_at_any_time(program: Program) -> None:
    assert check(program, deadlines="any time") is not None


def test_steps_are_not_moved_past_the_moment_when_all_sleep() -> None:
    seen = set()

    async def program() -> None:
        event = kernel.Event()
        log: list[str] = []

        async def early() -> None:
            await checkpoint()
            event.set()

        async def late() -> None:
            await wait_all_tasks_blocked()
            log.append(f"set: {event.is_set()}")

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(early)
            nursery.start_soon(late)
        seen.add(tuple(log))

    pruned(program)
    assert seen == {("set: True",)}


def test_an_object_that_was_there_before_the_run_is_not_lost_sight_of() -> None:
    """It has no name that would be the same in all runs."""
    lock = kernel.Lock()
    seen = set()

    async def program() -> None:
        got: list[bool] = [False, False]

        async def try_it(number: int) -> None:
            try:
                lock.acquire_nowait()
            except kernel.WouldBlock:
                return
            got[number] = True
            await checkpoint()
            lock.release()

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(try_it, 0)
            nursery.start_soon(try_it, 1)
        seen.add(tuple(got))

    pruned(program)
    assert seen == {(True, True), (True, False), (False, True)}


def test_nor_if_none_of_its_attributes_is_set() -> None:
    """What changes is a dict that is one of them."""
    limiter = kernel.CapacityLimiter(1)
    seen = set()

    async def borrow() -> None:
        limiter.acquire_on_behalf_of_nowait("somebody")

    async def look() -> int:
        return limiter.borrowed_tokens

    async def program() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(borrow)
            looked = nursery.spawn(look)
        seen.add(await looked)
        limiter.release_on_behalf_of("somebody")

    pruned(program)
    assert seen == {0, 1}


def test_a_trap_of_the_programs_own_is_an_object_like_the_others() -> None:
    seen = set()

    class Box(kernel.lowlevel.Trap):
        def __init__(self) -> None:
            self.content: Any = None

    async def program() -> None:
        box = Box()
        logs: list[Any] = [None, None]

        async def put(number: int) -> None:
            logs[number], box.content = box.content, number

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(put, 0)
            nursery.start_soon(put, 1)
        seen.add(tuple(logs))

    pruned(program)
    assert seen == {(None, 0), (1, None)}


# ---- failures ---------------------------------------------------------------------------------------


async def abba() -> None:
    a, b = kernel.Lock(), kernel.Lock()

    async def use(first: kernel.Lock, second: kernel.Lock) -> None:
        async with first, second:
            pass

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(use, a, b, name="A")
        nursery.start_soon(use, b, a, name="B")


def test_a_failure_is_told_as_ever_and_can_be_replayed_as_ever() -> None:
    with pytest.raises(ScheduleFailure) as info:
        explore(abba, shares="kernel objects")
    assert isinstance(info.value.error, kernel.Deadlock)
    with pytest.raises(kernel.Deadlock):
        replay(abba, info.value.schedule, file=io.StringIO())


def test_a_race_on_an_ordinary_variable_is_not_seen_by_who_says_there_is_none() -> None:
    """And is seen by default. Here it is not even looked at whether the declaration is true."""

    async def program() -> None:
        counter = 0

        async def increment() -> None:
            nonlocal counter
            before = counter
            await checkpoint()
            counter = before + 1

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(increment)
            nursery.start_soon(increment)
        assert counter == 2

    with pytest.raises(ScheduleFailure):
        explore(program)


@pytest.mark.parametrize("options", [{"strategy": "random"}, {"strategy": "pct"}, {"invariant": lambda: True}])
def test_it_goes_with_the_exhaustive_strategy_and_without_invariants(options: Any) -> None:
    with pytest.raises(ValueError, match="shares='kernel objects' is for"):
        explore(abba, shares="kernel objects", **options)


def test_an_unknown_declaration_is_an_error() -> None:
    with pytest.raises(ValueError, match="shares must be"):
        explore(abba, shares="nothing")  # type: ignore[arg-type]


def test_a_bound_is_kept() -> None:
    async def program() -> None:
        lock = kernel.Lock()

        async def use() -> None:
            async with lock:
                await checkpoint()

        async with kernel.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(use)

    result = explore(program, shares="kernel objects", schedules=5)
    assert (result.schedules, result.complete) == (5, False)


def test_a_program_that_is_not_deterministic_is_refused() -> None:
    sizes = iter(range(2, 100))

    async def program() -> None:
        event = kernel.Event()

        async def touch() -> None:
            event.set()

        async with kernel.open_nursery() as nursery:
            for _ in range(next(sizes)):
                nursery.start_soon(touch)

    with pytest.raises(ValueError, match="not deterministic"):
        explore(program, shares="kernel objects")
