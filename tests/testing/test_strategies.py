"""kernel.testing.strategies and run_with: data and schedule are found together, and shrink together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

import kernel
from kernel.lowlevel import checkpoint
from kernel.testing import InvariantError, run_with
from kernel.testing.schedules import from_text
from kernel.testing.strategies import any_schedule


async def total(amounts: list[int]) -> int:
    """Each of two tasks adds to a sum what is its own; it reads the sum before a checkpoint, and writes it after."""
    found = 0

    async def add(mine: list[int]) -> None:
        nonlocal found
        for amount in mine:
            before = found
            await checkpoint()
            found = before + amount

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(add, amounts[::2], name="even")
        nursery.start_soon(add, amounts[1::2], name="odd")
    return found


def smallest(cases: st.SearchStrategy[Any], wrong: Callable[[Any], bool]) -> Any:
    return find(cases, wrong, settings=settings(max_examples=2000, database=None, derandomize=True))


def test_data_and_schedule_shrink_together() -> None:
    """The fewest numbers that make a wrong sum are two, of which one is not zero; and no deviation is needed."""
    cases = st.tuples(st.lists(st.integers(0, 9)), any_schedule())
    amounts, schedule = smallest(cases, lambda case: run_with(case[1], total, case[0]) != sum(case[0]))
    assert sorted(amounts) == [0, 1]
    assert schedule == "0"


def test_a_schedule_shrinks_to_the_deviation_that_is_needed() -> None:
    async def order() -> str:
        log: list[str] = []

        async def child(name: str) -> None:
            log.append(name)

        async with kernel.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(child, name)
        return "".join(log)

    assert run_with("0", order) == "abc"
    assert smallest(any_schedule(), lambda schedule: run_with(schedule, order) != "abc") == "1"
    assert smallest(any_schedule(), lambda schedule: run_with(schedule, order) == "cba") in ("21", "2[1]")


def test_a_cancellation_is_part_of_the_schedule_if_that_is_asked_for() -> None:
    async def program() -> int:
        done = 0
        with kernel.CancelScope():
            for _ in range(3):
                await checkpoint()
                done += 1
        return done

    wanted = any_schedule(cancel=True)
    assert smallest(wanted, lambda schedule: run_with(schedule, program, cancel="program") is None) == "@1"
    assert not any("@" in text for text in (any_schedule().example() for _ in range(0)))


@settings(max_examples=50)
@given(any_schedule(cancel=True))
def test_what_is_drawn_is_a_schedule(text: str) -> None:
    assert str(from_text(text)) == text


@settings(max_examples=50)
@given(st.lists(st.integers(0, 9), max_size=4), any_schedule())
def test_a_correct_program_holds(amounts: list[int], schedule: str) -> None:
    async def locked() -> int:
        found, lock = 0, kernel.Lock()

        async def add(mine: list[int]) -> None:
            nonlocal found
            for amount in mine:
                async with lock:
                    before = found
                    await checkpoint()
                    found = before + amount

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(add, amounts[::2])
            nursery.start_soon(add, amounts[1::2])
        return found

    assert run_with(schedule, locked) == sum(amounts)


# ---- run_with ---------------------------------------------------------------------------------------


def test_a_failure_has_the_table_in_a_note() -> None:
    async def program(how: type[Exception]) -> None:
        await checkpoint()
        raise how("as it is")

    with pytest.raises(LookupError, match="as it is") as info:
        run_with("0(3)1", program, LookupError)
    (note,) = info.value.__notes__
    assert "Schedule '0(3)1'" in note
    assert "raises LookupError" in note


def test_what_explore_looks_at_is_looked_at_here_too() -> None:
    with pytest.raises(InvariantError):
        run_with("0", total, [1, 2], invariant=lambda: False)
    with pytest.raises(InvariantError):
        run_with("0", total, [1, 2], check=lambda: False)
    assert run_with("@1", checkpoint, cancel="program") is None


def test_what_is_no_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="is no schedule"):
        run_with("what?", checkpoint)
