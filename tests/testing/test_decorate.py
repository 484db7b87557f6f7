"""kernel_test: async functions as tests."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest

import kernel
from kernel.abc import Instrument
from kernel.testing import MockClock, kernel_test


class Counts(Instrument):
    steps = 0

    def before_task_step(self, task: Any) -> None:
        self.steps += 1


@pytest.fixture
def leaping() -> MockClock:
    return MockClock(autojump_threshold=0)


@pytest.fixture
def counts() -> Iterator[Counts]:
    counts = Counts()
    yield counts
    assert counts.steps > 0


@kernel_test
async def test_an_async_function_is_a_test() -> None:
    await kernel.sleep(0)


@kernel_test
def test_a_generator_function_is_a_test_with_fixtures(leaping: MockClock, counts: Counts) -> Any:
    yield from kernel.sleep(1000)
    assert kernel.lowlevel.current_clock() is leaping
    assert leaping.current_time() == 1000
    assert counts.steps > 1


class TestMethods:
    @kernel_test
    async def test_a_method_is_a_test(self, leaping: MockClock) -> None:
        await kernel.sleep(1000)


@pytest.mark.parametrize("number", [1, 2])
@kernel_test
async def test_parameters_are_passed_on(number: int, leaping: MockClock) -> None:
    await kernel.sleep(number)
    assert kernel.current_time() == number


def test_what_the_function_returns_or_raises_comes_out() -> None:
    @kernel_test
    async def halves(number: int, *, fail: bool = False) -> float:
        """Half of it."""
        if fail:
            raise ValueError("no halves today")
        return number / 2

    assert halves(3) == 1.5
    with pytest.raises(ValueError, match="no halves today"):
        halves(3, fail=True)
    assert (halves.__name__, halves.__doc__) == ("halves", "Half of it.")
    assert list(inspect.signature(halves).parameters) == ["number", "fail"]
    assert not inspect.iscoroutinefunction(halves)


def test_two_clocks_are_refused_before_anything_runs() -> None:
    @kernel_test
    async def never(one: object, two: object) -> None:
        raise AssertionError("unreachable: it has run")

    with pytest.raises(ValueError, match="a run has one clock"):
        never(MockClock(), two=MockClock(autojump_threshold=0))


def test_what_answers_to_every_name_is_no_clock() -> None:
    @kernel_test
    async def main(mock: object) -> bool:
        return kernel.lowlevel.current_clock() is mock

    assert main(mock=Mock()) is False
