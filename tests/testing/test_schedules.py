"""kernel.testing.schedules: who decides, and how decisions are written down."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel.testing.schedules import PCT, Exhaustive, Random, Recorded, decode, encode


@given(st.lists(st.integers(0, 50), max_size=30))
def test_decoding_undoes_encoding_but_for_zeros_at_the_end(choices: list[int]) -> None:
    text = encode(choices)
    while choices and choices[-1] == 0:
        choices.pop()
    assert decode(text) == (choices or [0])


def test_runs_of_zeros_are_written_short() -> None:
    assert encode([1, 0, 0, 0, 0, 2]) == "1(4)2"
    assert encode([0, 10, 0, 99]) == "0a0[99]"
    assert encode([]) == "0"


@pytest.mark.parametrize("text", ["?", "(x)", "(3", "[", "1[a]"])
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no schedule"):
        decode(text)


def test_exhaustive_goes_through_all_paths_of_an_uneven_tree_once() -> None:
    """A first choice of 3; after 0 a choice of 2; after 2 a choice of 2 and then one of 3."""

    def walk(schedule: Recorded) -> tuple[int, ...]:
        path = [schedule.choose(3)]
        if path[0] == 0:
            path.append(schedule.choose(2))
        if path[0] == 2:
            path.append(schedule.choose(2))
            path.append(schedule.choose(3))
        return tuple(path)

    space = Exhaustive()
    paths = [walk(schedule) for schedule in space]
    assert paths == [(0, 0), (0, 1), (1,), *[(2, a, b) for a in range(2) for b in range(3)]]
    assert space.covered


def test_a_recorded_choice_that_is_not_offered_becomes_the_last_one() -> None:
    schedule = Recorded([5, 1])
    assert [schedule.choose(3), schedule.choose(4), schedule.choose(4)] == [2, 1, 0]
    assert schedule.made == [2, 1, 0]
    assert schedule.offered == [3, 4, 4]


def test_random_reaches_all_options() -> None:
    schedule = Random(0)
    assert {schedule.choose(5) for _ in range(100)} == set(range(5))


def test_pct_runs_the_highest_priority_and_drops_it_at_the_chosen_steps() -> None:
    schedule = PCT(3, depth=1, steps=10)
    first = schedule.pick("abc")
    assert all(schedule.pick("abc") == first for _ in range(9))  # no change point with a depth of 1
    schedule = PCT(3, depth=2, steps=10)
    picks = [schedule.pick("abc") for _ in range(12)]
    assert sum(a != b for a, b in pairwise(picks)) <= 1  # one change point, somewhere
    assert schedule.made == picks


def test_pct_ranks_those_who_have_dropped_by_when_they_did() -> None:
    schedule = PCT(1, depth=3, steps=2)
    schedule._changes = {0, 1}
    tasks = ["a", "b", "c"]
    winner = tasks[schedule.pick(tasks)]  # the highest has dropped, so this is the second
    last = tasks[schedule.pick(tasks)]  # and so has this one
    first = next(task for task in tasks if task not in (winner, last))
    two = [winner, first]
    assert two[schedule.pick(two)] == first


def test_random_cancels_at_one_place_in_so_many() -> None:
    schedule = Random(0, places=10)
    made = [schedule.cancel(3) for _ in range(1000)]
    assert 50 < sum(choice > 0 for choice in made) < 200
    assert set(made) == {0, 1, 2}


def test_a_recorded_cancellation_is_at_its_place_and_of_whom_there_is() -> None:
    schedule = Recorded((), place=2, who=3)
    assert [schedule.cancel(5), schedule.cancel(3), schedule.cancel(5)] == [0, 2, 0]
    assert schedule.present == 2
