"""kernel.testing.explore: which schedules are run, what is found, and how it is told."""

from __future__ import annotations

import io
import itertools
from collections.abc import AsyncGenerator

import pytest

import kernel
from kernel.lowlevel import ParkingLot, checkpoint, consume_budget
from kernel.testing import (
    InvariantError,
    LeakError,
    ScheduleFailure,
    TooManySteps,
    explore,
    replay,
    wait_all_tasks_blocked,
)


async def nothing() -> None:
    pass


async def seven_at_once() -> None:
    async with kernel.open_nursery() as nursery:
        for _ in range(7):
            nursery.start_soon(nothing)


async def lost_update() -> None:
    """A counter that is read, and written a checkpoint later."""
    counter = 0

    async def increment() -> None:
        nonlocal counter
        before = counter
        await checkpoint()
        counter = before + 1

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(increment, name="A")
        nursery.start_soon(increment, name="B")
    assert counter == 2


async def abba() -> None:
    a, b = kernel.Lock(), kernel.Lock()

    async def use(first: kernel.Lock, second: kernel.Lock) -> None:
        async with first, second:
            pass

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(use, a, b, name="A")
        nursery.start_soon(use, b, a, name="B")


# ---- which schedules --------------------------------------------------------------------------------


def test_all_orders_of_seven_tasks_are_tried_each_once() -> None:
    orders = set()
    runs = 0

    async def program() -> None:
        nonlocal runs
        order: list[int] = []

        async def child(number: int) -> None:
            order.append(number)

        async with kernel.open_nursery() as nursery:
            for number in range(7):
                nursery.start_soon(child, number)
        orders.add(tuple(order))
        runs += 1

    result = explore(program)
    assert len(orders) == 5040
    assert (result.schedules, result.complete) == (runs, True)
    assert str(result) == f"all {runs:,} schedules hold"
    assert runs % 5040 == 0  # the rest is whether leaving the nursery yields


def test_a_program_without_choices_has_one_schedule() -> None:
    assert str(explore(nothing)) == "the only schedule holds"


def test_a_bound_is_kept_and_then_nothing_is_claimed_of_the_rest() -> None:
    result = explore(seven_at_once, schedules=100)
    assert (result.schedules, result.complete) == (100, False)
    assert str(result) == "100 schedules hold"


@pytest.mark.parametrize("strategy", ["random", "pct"])
def test_the_same_seed_gives_the_same_runs(strategy: str) -> None:
    def orders(seed: int) -> list[list[int]]:
        seen: list[list[int]] = []

        async def program() -> None:
            order: list[int] = []
            seen.append(order)

            async def child(number: int) -> None:
                await checkpoint()
                order.append(number)

            async with kernel.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(child, number)

        explore(program, strategy=strategy, schedules=20, seed=seed)  # type: ignore[arg-type]
        return seen

    assert orders(1) == orders(1)
    assert orders(1) != orders(2)
    assert len({tuple(order) for order in orders(1)}) > 5


def test_generators_are_explored_too() -> None:
    def program():  # type: ignore[no-untyped-def]
        yield from checkpoint()
        raise KeyError("here")

    with pytest.raises(ScheduleFailure, match="KeyError"):
        explore(program)


def test_virtual_time_passes_when_nothing_else_can_happen() -> None:
    times: list[float] = []

    async def program() -> None:
        await kernel.sleep(3600)
        times.append(kernel.current_time())

    assert explore(program).complete
    assert set(times) == {3600.0}


def test_a_deadline_may_be_let_pass_while_a_task_is_ready() -> None:
    async def program() -> None:
        with kernel.move_on_after(1) as scope:
            await checkpoint()
        assert not scope.cancelled_caught

    assert explore(program).complete
    with pytest.raises(ScheduleFailure, match="AssertionError"):
        explore(program, deadlines="any time")


def test_whether_a_budgeted_operation_yields_is_a_choice() -> None:
    """Between acquiring a free lock and the next line, others run only if the budget is used up just then."""
    seen: set[tuple[str, ...]] = set()

    async def program() -> None:
        log: list[str] = []

        async def first() -> None:
            log.append("begun")
            async with kernel.Lock():
                log.append("holds it")

        async def second() -> None:
            log.append("passing by")

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(first)
            nursery.start_soon(second)
        seen.add(tuple(log))

    assert explore(program).complete
    assert seen == {
        ("begun", "holds it", "passing by"),
        ("begun", "passing by", "holds it"),
        ("passing by", "begun", "holds it"),
    }


# ---- what is found ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["exhaustive", "random", "pct"])
def test_an_abba_deadlock_is_found_and_shrunk_to_one_deviation(strategy: str) -> None:
    with pytest.raises(ScheduleFailure) as info:
        explore(abba, strategy=strategy)  # type: ignore[arg-type]
    failure = info.value
    assert isinstance(failure.error, kernel.Deadlock)
    assert failure.__cause__ is not None
    assert sum(character not in "0()" for character in failure.schedule) == 1
    assert "'A' waits for" in str(failure)


def test_a_lost_update_is_found() -> None:
    with pytest.raises(ScheduleFailure) as info:
        explore(lost_update)
    assert isinstance(info.value.error, AssertionError)


def test_the_cure_holds_under_all_schedules() -> None:
    async def cured() -> None:
        counter, lock = 0, kernel.Lock()

        async def increment() -> None:
            nonlocal counter
            async with lock:
                before = counter
                await checkpoint()
                counter = before + 1

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(increment)
            nursery.start_soon(increment)
        assert counter == 2

    assert explore(cured).complete


def test_an_invariant_is_checked_between_any_two_steps() -> None:
    state = {"inside": 0}

    async def program() -> None:
        state["inside"] = 0

        async def enter() -> None:
            state["inside"] += 1
            await checkpoint()
            state["inside"] -= 1

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(enter)
            nursery.start_soon(enter)

    with pytest.raises(ScheduleFailure) as info:
        explore(program, invariant=lambda: state["inside"] <= 1)
    assert isinstance(info.value.error, InvariantError)


def test_an_invariant_that_raises_is_a_failure_with_that_error() -> None:
    def invariant() -> None:
        raise LookupError("the books are wrong")

    with pytest.raises(ScheduleFailure, match="the books are wrong"):
        explore(nothing, invariant=invariant)


def test_a_run_that_does_not_end_is_a_failure() -> None:
    async def program() -> None:
        while True:
            await checkpoint()

    with pytest.raises(ScheduleFailure) as info:
        explore(program, max_steps=100)
    assert isinstance(info.value.error, TooManySteps)


def test_a_run_that_cannot_even_be_cancelled_is_a_failure_too() -> None:
    async def program() -> None:
        while True:
            try:
                await checkpoint()
            except kernel.Cancelled:
                pass

    with pytest.raises(ScheduleFailure) as info:
        explore(program, max_steps=100)
    assert isinstance(info.value.error, TooManySteps)


def test_a_program_that_is_not_deterministic_is_refused() -> None:
    sizes = itertools.cycle([3, 2])

    async def program() -> None:
        async with kernel.open_nursery() as nursery:
            for _ in range(next(sizes)):
                nursery.start_soon(nothing)

    with pytest.raises(ValueError, match="not deterministic"):
        explore(program)


def test_a_program_that_waits_for_a_file_is_refused() -> None:
    async def program() -> None:
        await kernel.lowlevel.wait_readable(0)

    with pytest.raises(ScheduleFailure, match="cannot wait for files"):
        explore(program)


def test_waiting_until_all_are_blocked_works_in_explored_programs() -> None:
    async def program() -> None:
        lot = ParkingLot()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(lot.park)
            nursery.start_soon(lot.park)
            await wait_all_tasks_blocked()
            assert len(lot.unpark_all()) == 2

    assert explore(program).complete


# ---- how it is told ---------------------------------------------------------------------------------


def test_a_failure_can_be_replayed_from_its_string() -> None:
    with pytest.raises(ScheduleFailure) as info:
        explore(abba)
    for _ in range(2):
        shown = io.StringIO()
        with pytest.raises(kernel.Deadlock):
            replay(abba, info.value.schedule, file=shown)
        table = shown.getvalue()
        assert table.strip() in str(info.value)


def test_the_table_has_a_column_per_task_and_a_row_per_step() -> None:
    shown = io.StringIO()
    with pytest.raises(AssertionError):
        replay(lost_update, "0", file=shown)
    head, rule, *rows = shown.getvalue().splitlines()
    assert [cell.strip() for cell in head.split("|")] == ["step", "lost_update", "A", "B"]
    assert set(rule) <= {"-", "|"}
    steps = [[cell.strip().partition(",")[0] for cell in row.split("|")[2:]] for row in rows[1:5]]
    assert steps == [["checkpoint", ""], ["", "checkpoint"], ["returns", ""], ["", "returns"]]
    assert "raises AssertionError" in rows[-1]


def test_a_schedule_under_which_the_program_holds_can_be_replayed_too() -> None:
    replay(abba, "0", file=io.StringIO())


def test_replaying_what_is_no_schedule_is_an_error() -> None:
    with pytest.raises(ValueError, match="is no schedule"):
        replay(nothing, "what?", file=io.StringIO())


def test_an_unknown_strategy_is_an_error() -> None:
    with pytest.raises(ValueError, match="strategy must be"):
        explore(nothing, strategy="guess")  # type: ignore[arg-type]


def test_what_is_no_async_function_is_refused_and_leaves_nothing() -> None:
    with pytest.raises(ScheduleFailure, match="wants an async function"):
        explore(lambda: None)  # type: ignore[arg-type, return-value]
    assert explore(nothing).complete


def test_exploring_inside_a_run_is_an_error() -> None:
    async def main() -> None:
        with pytest.raises(ScheduleFailure, match="inside a kernel that is running"):
            explore(nothing)

    kernel.run(main)


# ---- budgets ----------------------------------------------------------------------------------------


def test_a_task_that_never_blocks_yields_in_the_end_as_in_an_ordinary_run() -> None:
    """Otherwise it would run for ever, in one step."""

    async def program() -> None:
        done = False

        async def other() -> None:
            nonlocal done
            done = True

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other)
            while not done:
                await consume_budget()

    assert explore(program, schedules=100).schedules == 100


def test_the_budget_of_a_run_is_not_what_the_one_before_has_left() -> None:
    """One operation in each of 240 runs, always in the same step."""

    async def program() -> None:
        event = kernel.Event()
        event.set()
        await event.wait()
        async with kernel.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(nothing)

    assert explore(program).schedules == 240


# ---- what comes from outside the tasks --------------------------------------------------------------


def test_a_call_from_outside_comes_between_any_two_steps() -> None:
    """In an ordinary run it comes at the end of a pass, which has up to 61 steps."""
    seen = set()

    async def program() -> None:
        log: list[str] = []

        async def child() -> None:
            log.append("first")
            await checkpoint()
            log.append("second")

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            kernel.lowlevel.current_kernel_token().run_sync_soon(log.append, "call")
        seen.add(" ".join(log))

    assert explore(program).complete
    assert seen == {"call first second", "first call second", "first second call", "first second"}  # or it was too late


def test_such_a_call_is_made_in_no_task() -> None:
    seen: set[bool] = set()

    async def program() -> None:
        kernel.lowlevel.current_kernel_token().run_sync_soon(lambda: seen.add(kernel.lowlevel.in_kernel_task()))
        await checkpoint()

    assert explore(program).complete
    assert seen == {False}


def test_two_deadlines_may_pass_with_no_step_in_between() -> None:
    """What waited for the first one has no time left then, though it had a second."""
    seen = set()

    async def program() -> None:
        with kernel.move_on_after(2) as scope:
            await kernel.sleep(1)
            await checkpoint()
        seen.add(scope.cancelled_caught)

    assert explore(program).complete
    assert seen == {False}
    assert explore(program, deadlines="any time").complete
    assert seen == {False, True}


# ---- at the end of a run ----------------------------------------------------------------------------


def test_a_check_is_made_when_the_run_is_over() -> None:
    log: list[str] = []

    async def program() -> None:
        log[:] = ["begun"]
        await checkpoint()
        log.append("ended")

    assert explore(program, check=lambda: log == ["begun", "ended"]).complete
    with pytest.raises(ScheduleFailure) as info:
        explore(program, check=lambda: len(log) == 1)
    assert isinstance(info.value.error, InvariantError)


def test_an_async_generator_that_is_left_open_is_a_failure() -> None:
    """Here in one of the orders: if somebody else is quicker, nobody finishes it."""

    async def numbers() -> AsyncGenerator[int, None]:
        yield 1
        yield 2

    async def program() -> None:
        source = numbers()
        left = 2

        async def take() -> None:
            nonlocal left
            left -= 1
            if left:
                await checkpoint()
                assert await anext(source) == 1
            else:
                await source.aclose()

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(take)
            nursery.start_soon(take)

    async def careless() -> None:
        await anext(numbers())

    with pytest.raises(ScheduleFailure, match="is not at its end") as info:
        explore(careless)
    assert isinstance(info.value.error, LeakError)
    assert explore(careless, may_leak=True).complete
    with pytest.raises(ScheduleFailure):
        explore(program)


def test_a_program_that_sleeps_for_ever_is_a_failure() -> None:
    async def program() -> None:
        await kernel.sleep_forever()

    with pytest.raises(ScheduleFailure, match="its tasks sleep") as info:
        explore(program)
    assert isinstance(info.value.error, TooManySteps)


def test_a_group_of_errors_is_told_with_what_is_in_it() -> None:
    async def program() -> None:
        async def fail(how: type[Exception]) -> None:
            raise how("so it is")

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(fail, KeyError)
            nursery.start_soon(fail, OSError)

    with pytest.raises(ScheduleFailure, match=r"(?s)ExceptionGroup of\n  KeyError: 'so it is'\n  OSError: so it is"):
        explore(program)


# ---- PCT --------------------------------------------------------------------------------------------


def test_pct_finds_a_bug_of_depth_two_as_often_as_the_paper_promises() -> None:
    """Two orders must come together: ann's second step before ben's first, which is before her third. n = 3 tasks."""

    async def program() -> None:
        state = 0

        async def ann() -> None:
            nonlocal state
            for _ in range(4):
                await checkpoint()
            state = 1
            await checkpoint()
            state = 2

        async def ben() -> None:
            assert state != 1

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(ann)
            nursery.start_soon(ben)

    found, steps = 0, 9
    for seed in range(600):
        try:
            explore(program, strategy="pct", depth=2, schedules=2, seed=seed)
        except ScheduleFailure as failure:
            found += failure.schedules == 2  # the first is first come, first served
    assert found / 600 >= 1 / (3 * steps)
