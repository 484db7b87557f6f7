"""Schedules for hypothesis, so that data and schedule are found together, and shrink together.

    @given(items=st.lists(st.integers()), schedule=any_schedule())
    def test_nothing_is_lost(items: list[int], schedule: str) -> None:
        assert run_with(schedule, send_and_receive, items) == items

What is drawn is the text of a schedule. It stands as it is in the failing example that hypothesis prints, and fits into
`replay` and `run_with` as it is. It shrinks as any list of numbers does: to a shorter one, with more zeros, which is to
say with fewer deviations from first come, first served.

This module imports hypothesis, and no other one of this package imports this module.
"""

from __future__ import annotations

from hypothesis import strategies as st

from .schedules import Recorded

__all__ = ["any_schedule"]


def any_schedule(*, choices: int = 100, options: int = 8, cancel: bool = False) -> st.SearchStrategy[str]:
    """A strategy for schedules, as texts.

    Args:
        choices: how many are made before the kernel goes on first come, first served.
        options: how many options each has: of that many ready tasks, any can be picked.
        cancel: whether somebody may be cancelled somewhere; `run_with` must be told whom.
    """
    numbers = st.lists(st.integers(0, options - 1), max_size=choices)
    if not cancel:
        return numbers.map(lambda made: str(Recorded(made)))
    places = st.one_of(st.just(0), st.integers(1, choices))
    return st.builds(lambda made, place, who: str(Recorded(made, place, who)), numbers, places, st.integers(1, options))
