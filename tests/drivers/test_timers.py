"""SortedTimers: deadlines in order, and nothing left of those that were taken back."""

from __future__ import annotations

import gc
import weakref
from math import inf
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kernel.drivers.timers import SortedTimers


class Timer:
    """Stands in for a trap or a scope."""

    def __init__(self, name: object = None) -> None:
        self.name = name
        self.timer: tuple[float, float, Any] | None = None

    def expire(self, kernel: object) -> None:
        raise AssertionError("the loop calls this, never the driver")

    def __repr__(self) -> str:
        return f"<Timer {self.name}>"


def names(timers: SortedTimers, now: float) -> list[object]:
    return [timed.name for timed in timers.expired(now)]  # type: ignore[attr-defined]


def test_nothing_is_due_when_there_is_nothing() -> None:
    timers = SortedTimers()
    assert timers.next_deadline() == inf
    assert names(timers, inf) == []
    assert len(timers) == 0


def test_expired_ones_come_in_the_order_of_their_deadlines() -> None:
    timers = SortedTimers()
    for deadline in (3, 1, 4, 1.5, 9, 2):
        timers.add(deadline, Timer(deadline))
    assert timers.next_deadline() == 1
    assert names(timers, 3) == [1, 1.5, 2, 3]
    assert timers.next_deadline() == 4
    assert len(timers) == 2


def test_equal_deadlines_expire_in_the_order_they_were_added() -> None:
    timers = SortedTimers()
    for name in range(100):
        timers.add(5, Timer(name))
        if name % 7 == 0:
            timers.next_deadline()  # some are sorted in early, which changes nothing
    assert names(timers, 5) == list(range(100))


def test_a_deadline_is_due_at_its_very_moment_and_not_before() -> None:
    timers = SortedTimers()
    timers.add(5, Timer("x"))
    assert names(timers, 4.999) == []
    assert len(timers) == 1
    assert names(timers, 5) == ["x"]
    assert names(timers, 5) == []


def test_a_fresh_timer_is_removed_without_ever_having_been_sorted() -> None:
    timers, timer = SortedTimers(), Timer()
    timers.add(5, timer)
    assert len(timers) == 1
    timers.remove(timer)
    assert len(timers) == 0
    assert timers.next_deadline() == inf


def test_a_fresh_timer_at_zero_is_removed_too() -> None:
    timers, timer = SortedTimers(), Timer()
    timers.add(0, timer)
    timers.remove(timer)
    assert len(timers) == 0


def test_a_sorted_timer_is_removed_and_the_others_of_its_deadline_stay() -> None:
    timers = SortedTimers()
    a, b, c = Timer("a"), Timer("b"), Timer("c")
    for timer in (a, b, c):
        timers.add(5, timer)
    assert timers.next_deadline() == 5
    timers.remove(b)
    assert b.timer is None
    assert len(timers) == 2
    assert names(timers, 5) == ["a", "c"]


@pytest.mark.parametrize("sorted_in", [False, True])
def test_a_timer_that_was_removed_can_be_added_again_and_goes_to_the_end(sorted_in: bool) -> None:
    timers = SortedTimers()
    a, b = Timer("a"), Timer("b")
    timers.add(5, a)
    timers.add(5, b)
    if sorted_in:
        timers.next_deadline()
    timers.remove(a)
    timers.add(5, a)
    assert names(timers, 5) == ["b", "a"]


def test_a_timer_that_expired_can_be_added_again() -> None:
    timers, timer = SortedTimers(), Timer("x")
    timers.add(1, timer)
    assert names(timers, 1) == ["x"]
    assert timer.timer is None
    timers.add(2, timer)
    assert names(timers, 1) == []
    assert names(timers, 2) == ["x"]


def test_the_first_that_expires_may_remove_a_later_one() -> None:
    timers = SortedTimers()
    a, b, c, d = (Timer(name) for name in "abcd")
    for timer in (a, b, c, d):
        timers.add(1, timer)
    log = []
    for timed in timers.expired(1):
        log.append(timed)
        if timed is a:
            timers.remove(b)
            timers.remove(d)
    assert log == [a, c]
    assert len(timers) == 0
    assert [timer.timer for timer in (a, b, c, d)] == [None] * 4


def test_one_that_is_removed_and_set_again_while_it_was_due_waits_for_its_new_deadline() -> None:
    timers = SortedTimers()
    a, b = Timer("a"), Timer("b")
    timers.add(1, a)
    timers.add(1, b)
    log = []
    for timed in timers.expired(1):
        log.append(timed)
        timers.remove(b)
        timers.add(7, b)
        assert timers.next_deadline() == 7
    assert log == [a]
    assert names(timers, 7) == ["b"]


def test_one_that_is_added_while_others_expire_waits_for_the_next_time() -> None:
    timers = SortedTimers()
    a, b = Timer("a"), Timer("b")
    timers.add(1, a)
    log = []
    for timed in timers.expired(1):
        log.append(timed)
        timers.add(0, b)
    assert log == [a]
    assert names(timers, 1) == ["b"]


def test_removing_what_is_not_there_does_nothing() -> None:
    timers, timer = SortedTimers(), Timer()
    timers.remove(timer)
    timers.add(1, timer)
    assert names(timers, 1) == [None]
    timers.remove(timer)
    assert len(timers) == 0


def test_timers_are_never_compared_with_each_other() -> None:
    class Incomparable(Timer):
        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared")

        def __lt__(self, other: object) -> bool:
            raise AssertionError("compared")

        __hash__ = object.__hash__

    timers = SortedTimers()
    some = [Incomparable() for _ in range(50)]
    for timer in some:
        timers.add(1, timer)
    timers.next_deadline()
    for timer in some[::2]:
        timers.remove(timer)
    assert sum(1 for _ in timers.expired(inf)) == 25


@pytest.mark.parametrize("sorted_in", [False, True])
def test_a_hundred_thousand_timeouts_that_were_taken_back_leave_nothing(sorted_in: bool) -> None:
    timers = SortedTimers()
    standing = Timer("standing")
    timers.add(1e9, standing)
    for number in range(100_000):
        timer = Timer()
        timers.add(number % 1000, timer)
        if sorted_in:
            timers.next_deadline()
        timers.remove(timer)
    ref = weakref.ref(timer)
    del timer
    assert ref() is None
    assert len(timers) == 1
    assert names(timers, inf) == ["standing"]
    assert not [thing for thing in gc.get_referrers(standing) if isinstance(thing, dict | list | tuple) and thing]


@pytest.mark.parametrize("share", [1, 30, 100, 600, 1000])
def test_those_that_are_taken_back_from_among_many_are_gone_when_time_is_next_looked_at(share: int) -> None:
    timers = SortedTimers()
    some = [Timer(number) for number in range(1000)]
    for timer in some:
        timers.add(timer.name // 10, timer)  # type: ignore[operator]
    assert timers.next_deadline() == 0
    for timer in some[:share]:
        timers.remove(timer)
    assert len(timers) == 1000 - share
    refs = [weakref.ref(timer) for timer in some[:share]]
    del some[:share], timer
    assert timers.next_deadline() == (share // 10 if share < 1000 else inf)
    assert [ref() for ref in refs] == [None] * share
    assert names(timers, 30) == list(range(share, 310))
    assert names(timers, inf) == list(range(max(share, 310), 1000))


def test_an_expired_timer_is_not_kept() -> None:
    timers = SortedTimers()
    timers.add(1, Timer())
    (expired,) = timers.expired(1)
    ref = weakref.ref(expired)
    del expired
    assert ref() is None


class Model(RuleBasedStateMachine):
    """Random use against a plain list, which is searched and sorted from the start each time."""

    def __init__(self) -> None:
        super().__init__()
        self.timers = SortedTimers()
        self.model: list[tuple[float, int, Timer]] = []
        self.idle: list[Timer] = [Timer(name) for name in range(80)]
        self.number = 0
        self.now = 0.0

    @rule(which=st.integers(0, 100), deadline=st.integers(0, 10))
    def add_one(self, which: int, deadline: int) -> None:
        self.add(which, deadline)

    def add(self, which: int, deadline: int) -> None:
        if self.idle:
            timer = self.idle.pop(which % len(self.idle))
            self.timers.add(self.now + deadline, timer)
            self.model.append((self.now + deadline, self.number, timer))
            self.number += 1

    @rule(deadline=st.integers(0, 10), count=st.integers(2, 40))
    def add_many(self, deadline: int, count: int) -> None:
        for offset in range(count):
            self.add(which=0, deadline=deadline + offset % 3)

    @rule(which=st.integers(0, 100))
    def remove(self, which: int) -> None:
        if self.model:
            _, _, timer = self.model.pop(which % len(self.model))
            self.timers.remove(timer)
            self.idle.append(timer)

    @rule()
    def look(self) -> None:
        assert self.timers.next_deadline() == min((entry[0] for entry in self.model), default=inf)

    @rule(step=st.integers(0, 6), victim=st.integers(0, 100), again=st.booleans())
    def pass_time(self, step: int, victim: int, again: bool) -> None:
        """Whatever expires first removes another one, which may be due too, and perhaps sets it again for later."""
        self.now += step
        expected = sorted(entry for entry in self.model if entry[0] <= self.now)
        got: list[Timer] = []
        for timed in self.timers.expired(self.now):
            assert isinstance(timed, Timer)
            got.append(timed)
            mine = next(entry for entry in self.model if entry[2] is timed)
            self.model.remove(mine)
            self.idle.append(timed)
            if len(got) == 1 and self.model:
                entry = self.model.pop(victim % len(self.model))
                self.timers.remove(entry[2])
                if again:
                    self.timers.add(self.now + 1, entry[2])
                    self.model.append((self.now + 1, self.number, entry[2]))
                    self.number += 1
                else:
                    self.idle.append(entry[2])
                expected = [other for other in expected if other[2] is not entry[2]]
        assert got == [entry[2] for entry in expected]

    @invariant()
    def same_length(self) -> None:
        assert len(self.timers) == len(self.model)


TestAgainstAPlainList = Model.TestCase
TestAgainstAPlainList.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
