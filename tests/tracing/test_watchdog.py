"""The watchdog: which steps it reports, how often, and that its thread goes with the run.

What it sees depends on when it looks. So most tests here look for it, at times of their own: `Looks` is a watchdog
without a thread. Two have a real one, and wait for its report and not for a time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from math import inf
from types import SimpleNamespace
from typing import Any

import pytest

import kernel
from kernel import Watchdog
from kernel.core.loop import BUDGET
from kernel.lowlevel import add_instrument, checkpoint, consume_budget, current_kernel, remove_instrument


class Looks(Watchdog):
    """Looks when it is told to: `look(seconds later)`. `reports` has what it said."""

    def __init__(self, threshold: float = 1.0) -> None:
        self.reports: list[str] = []
        super().__init__(threshold, self.reports.append)
        self.now = 1000.0

    def before_run(self) -> None:
        pass

    def look(self, later: float = 0.25) -> None:
        self.now += later
        text = self._look(current_kernel(), self.now)
        if text is not None:
            self.reports.append(text)


def test_step_is_reported_once_when_it_has_lasted_as_long_as_the_threshold() -> None:
    dog = Looks()

    async def main() -> None:
        dog.look()
        for _ in range(3):
            dog.look()
        assert dog.reports == []
        for _ in range(10):
            dog.look()

    kernel.run(main)
    (report,) = dog.reports
    assert "main' has run for 1.000 s" in report


def test_report_shows_the_tasks_stack_and_nothing_around_it() -> None:
    dog = Looks()

    async def main() -> None:
        await outer()

    async def outer() -> None:
        inner()

    def inner() -> None:
        dog.look()
        dog.look(5)

    kernel.run(main)
    lines = [line for line in dog.reports[0].splitlines() if line.startswith("  File ")]
    assert [line.rpartition(" in ")[2] for line in lines[:4]] == ["main", "outer", "inner", "look"]
    assert "    await outer()" in dog.reports[0].splitlines()
    assert "in run_ready" not in dog.reports[0]


def test_many_short_steps_are_silent_however_long_they_take_together() -> None:
    dog = Looks()

    async def main() -> None:
        for _ in range(100):
            dog.look()
            dog.look()
            dog.look()
            await checkpoint()

    kernel.run(main)
    assert dog.reports == []


def test_two_tasks_that_take_turns_are_silent() -> None:
    dog = Looks()

    async def child() -> None:
        for _ in range(20):
            dog.look(0.9)
            await checkpoint()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            nursery.start_soon(child)

    kernel.run(main)
    assert dog.reports == []


def test_loop_that_sleeps_is_silent(virtual: Callable[..., Any]) -> None:
    """And a step that begins after a long sleep has not lasted as long as the sleep."""
    dog = Looks()

    async def main() -> None:
        dog.look()
        running = current_kernel()
        poll = running.poll

        def sleep_and_look(timeout: float) -> None:
            for _ in range(10):
                dog.look()
            poll(timeout)

        running.poll = sleep_and_look  # type: ignore[method-assign]
        await kernel.sleep(100)
        dog.look(0)
        dog.look(0.5)

    virtual(main)
    assert dog.reports == []


def test_each_of_several_blocked_steps_is_reported() -> None:
    dog = Looks()

    async def main() -> None:
        for _ in range(3):
            for _ in range(10):
                dog.look()
            await checkpoint()

    kernel.run(main)
    assert len(dog.reports) == 3


def test_operation_that_need_not_block_yields_under_the_watchdogs_eyes() -> None:
    """Its mark is a budget that is used up."""
    dog = Looks()
    order: list[str] = []

    async def child() -> None:
        order.append("child")

    async def main() -> None:
        running = current_kernel()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            await consume_budget()
            assert running.budget == BUDGET - 1
            dog.look()
            assert running.budget == -inf
            await consume_budget()
            order.append("main")

    kernel.run(main)
    assert order == ["child", "main"]


def test_task_that_is_never_blocked_but_does_many_operations_is_not_reported() -> None:
    dog = Looks()

    async def main() -> None:
        event = kernel.Event()
        event.set()
        for _ in range(1000):
            await event.wait()
            dog.look()

    kernel.run(main)
    assert dog.reports == []


def test_look_in_the_moment_before_a_step_gets_its_budget_is_not_taken_in() -> None:
    """The loop says who runs, and then what the step may spend. In between there is the mark of the step before."""
    other = Any
    for between in (other, None):
        dog, running = Watchdog(1.0), SimpleNamespace(current="task", budget=BUDGET)
        assert dog._look(running, 0.0) is None  # type: ignore[arg-type]
        running.current = between
        assert dog._look(running, 0.9) is None  # type: ignore[arg-type]
        running.current = "task"
        assert dog._look(running, 1.8) is None  # type: ignore[arg-type]


def test_running_task_in_generator_style_is_shown() -> None:
    dog = Looks()

    def main() -> Any:
        yield from checkpoint()
        dog.look()
        dog.look(5)

    kernel.run(main)
    assert "    dog.look(5)" in dog.reports[0]


@pytest.mark.parametrize("threshold", [0, -1, inf, float("nan")])
def test_threshold_must_be_a_number_of_seconds(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must be a number of seconds above 0"):
        Watchdog(threshold)


# ---- with its thread --------------------------------------------------------------------------------


def test_blocked_step_is_reported_while_it_is_stuck() -> None:
    """The step ends when the report has come, so it cannot have been made afterwards."""
    reports: list[str] = []
    reported = threading.Event()

    def report(text: str) -> None:
        reports.append(text)
        reported.set()

    async def blocks() -> None:
        assert reported.wait(30)

    async def main() -> None:
        await checkpoint()
        await blocks()
        await checkpoint()

    kernel.run(main, instruments=[Watchdog(0.001, report)])
    assert "reported.wait(30)" in reports[0]
    assert "main' has run for" in reports[0]
    assert "await blocks()" in reports[0]


def test_report_is_a_warning_of_a_logger_by_default(caplog: pytest.LogCaptureFixture) -> None:
    logged = threading.Event()

    class Wakes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.set()

    async def main() -> None:
        assert logged.wait(30)

    handler = Wakes()
    logging.getLogger("kernel.watchdog").addHandler(handler)
    try:
        kernel.run(main, instruments=[Watchdog(0.001)])
    finally:
        logging.getLogger("kernel.watchdog").removeHandler(handler)
    assert [(record.name, record.levelname) for record in caplog.records] == [("kernel.watchdog", "WARNING")]


def test_report_function_that_raises_is_logged_and_the_watch_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    calls = [threading.Event(), threading.Event()]
    left = calls.copy()

    def report(text: str) -> None:
        if left:
            left.pop(0).set()
            raise ValueError("bad")

    async def main() -> None:
        for call in calls:
            assert call.wait(30)
            await checkpoint()

    kernel.run(main, instruments=[Watchdog(0.001, report)])
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 2
    assert "was to report to, has raised" in errors[0].getMessage()


def watchdogs() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "kernel watchdog"]


def test_thread_lives_as_long_as_the_run_and_one_instance_serves_several_runs() -> None:
    async def main() -> list[str]:
        return watchdogs()

    dog = Watchdog(1)
    with kernel.Kernel(instruments=[dog]) as several:
        for _ in range(3):
            assert several.run(main) == ["kernel watchdog"]
            assert watchdogs() == []
    assert kernel.run(main, instruments=[dog]) == ["kernel watchdog"]


def test_thread_ends_with_a_run_that_fails() -> None:
    async def main() -> None:
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        kernel.run(main, instruments=[Watchdog(1)])
    assert watchdogs() == []


def test_second_run_at_the_same_time_is_refused_and_the_first_one_still_watched(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dog = Watchdog(1)

    async def inner() -> list[str]:
        return watchdogs()

    async def main() -> None:
        other: list[list[str]] = []
        thread = threading.Thread(target=lambda: other.append(kernel.run(inner, instruments=[dog])))
        thread.start()
        thread.join()
        assert other == [["kernel watchdog"]]
        assert watchdogs() == ["kernel watchdog"]

    kernel.run(main, instruments=[dog])
    assert watchdogs() == []
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "one run at a time" in str(record.exc_info[1])


def test_watchdog_does_not_stand_in_the_way_of_a_step() -> None:
    async def main() -> bool:
        running = current_kernel()
        return type(running.ready).__name__ == "deque" and "Observed" not in type(running.poller).__name__

    assert kernel.run(main, instruments=[Watchdog(1)])


def test_watchdog_that_is_added_later_has_no_thread() -> None:
    async def main() -> list[str]:
        dog = Watchdog(1)
        add_instrument(dog)
        seen = watchdogs()
        remove_instrument(dog)
        return seen

    assert kernel.run(main) == []


def test_thread_of_a_watchdog_that_was_removed_goes_with_the_run() -> None:
    dog = Watchdog(0.01)

    async def main() -> None:
        remove_instrument(dog)

    kernel.run(main, instruments=[dog])
    assert dog._thread is not None
    dog._thread.join()


def test_watchdog_beside_a_deadlock_is_no_hindrance() -> None:
    with pytest.raises(kernel.Deadlock):
        kernel.run(kernel.Event().wait, instruments=[Watchdog(1)])
    assert watchdogs() == []
