"""ParkingLot: first come, first served, who was let go cannot be called back, and a lot breaks with its breaker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from math import inf, nan
from typing import Any

import pytest

import kernel
from kernel import BrokenResourceError
from kernel.lowlevel import (
    ParkingLot,
    ParkingLotStatistics,
    Task,
    add_parking_lot_breaker,
    checkpoint,
    current_kernel,
    current_kernel_token,
    current_task,
    remove_parking_lot_breaker,
    spawn_system_task,
)
from kernel.testing import wait_all_tasks_blocked


class Row:
    """Tasks parked in `lot`, named by letters. Who leaves it is written to `log`."""

    def __init__(self, names: str, lot: ParkingLot | None = None) -> None:
        self.names = names
        self.lot = lot if lot is not None else ParkingLot()
        self.log: list[str] = []
        self.tasks: dict[str, Task] = {}
        self.scopes: dict[str, kernel.CancelScope] = {name: kernel.CancelScope() for name in names}

    async def park(self, name: str) -> None:
        with self.scopes[name]:
            try:
                await self.lot.park()
                self.log.append(name)
            except kernel.Cancelled:
                self.log.append(f"{name} cancelled")
                raise

    async def fill(self, nursery: kernel.Nursery) -> None:
        for name in self.names:
            nursery.start_soon(self.park, name, name=name)
        await wait_all_tasks_blocked()
        self.tasks = {task.name: task for task in nursery.child_tasks}


def with_row(names: str, body: Callable[[Row], Awaitable[object]], lot: ParkingLot | None = None) -> list[str]:
    row = Row(names, lot)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            await row.fill(nursery)
            await body(row)
            await wait_all_tasks_blocked()
            row.log.append("|")
            nursery.cancel_scope.cancel()

    kernel.run(main)
    assert len(row.lot) == 0
    return row.log


def served(log: list[str]) -> str:
    """Those who were let go before the end, in order."""
    return " ".join(log[: log.index("|")])


def test_unpark_lets_the_first_one_go() -> None:
    async def body(row: Row) -> None:
        assert [task.name for task in row.lot.unpark()] == ["a"]
        assert row.log == []  # it runs when its turn comes
        assert len(row.lot) == 2

    assert served(with_row("abc", body)) == "a"


@pytest.mark.parametrize(
    ("count", "expected"), [(0, ""), (1, "a"), (2, "a b"), (3, "a b c"), (99, "a b c"), (inf, "a b c")]
)
def test_unpark_lets_as_many_go_as_it_is_told_in_the_order_they_came(count: float, expected: str) -> None:
    async def body(row: Row) -> None:
        tasks = row.lot.unpark(count=count)
        assert " ".join(task.name for task in tasks) == expected
        assert all(task.state == "ready" for task in tasks)

    assert served(with_row("abc", body)) == expected


def test_unpark_all_lets_all_go_and_returns_them() -> None:
    async def body(row: Row) -> None:
        assert [task.name for task in row.lot.unpark_all()] == ["a", "b", "c"]
        assert row.lot.unpark_all() == []

    assert served(with_row("abc", body)) == "a b c"


def test_one_who_comes_back_goes_to_the_end() -> None:
    lot = ParkingLot()
    log: list[str] = []

    async def child(name: str) -> None:
        for _ in range(2):
            await lot.park()
            log.append(name)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(child, name)
            for _ in range(6):
                await wait_all_tasks_blocked()
                lot.unpark()

    kernel.run(main)
    assert "".join(log) == "abcabc"


@pytest.mark.parametrize("count", [-1, 1.5, nan, -inf, "1", None])
def test_a_count_that_is_none_is_refused_and_nobody_moves(count: Any) -> None:
    async def body(row: Row) -> None:
        with pytest.raises(ValueError, match=r"count must be a whole number from 0 up, or math\.inf, not"):
            row.lot.unpark(count=count)
        with pytest.raises(ValueError, match="count must be a whole number"):
            row.lot.repark(ParkingLot(), count=count)
        assert len(row.lot) == 2

    assert served(with_row("ab", body)) == ""


def test_a_cancelled_task_leaves_the_middle_of_the_row_and_strands_nobody() -> None:
    async def body(row: Row) -> None:
        row.scopes["b"].cancel()
        assert len(row.lot) == 2  # at once, not when it runs
        row.lot.unpark(count=2)

    assert served(with_row("abc", body)) == "b cancelled a c"


def test_one_who_was_let_go_is_not_cancelled_out_of_it() -> None:
    async def body(row: Row) -> None:
        row.lot.unpark()
        row.scopes["a"].cancel()

    assert served(with_row("ab", body)) == "a"


def test_one_who_was_cancelled_does_not_use_up_an_unpark() -> None:
    async def body(row: Row) -> None:
        row.scopes["a"].cancel()
        row.lot.unpark()

    assert served(with_row("ab", body)) == "a cancelled b"


@pytest.mark.parametrize(("count", "moved", "left"), [(0, "", "abc"), (1, "a", "bc"), (2, "ab", "c"), (inf, "abc", "")])
def test_repark_moves_the_first_to_the_end_of_another_row_without_waking_them(
    count: float, moved: str, left: str
) -> None:
    other = ParkingLot("elsewhere")

    async def body(row: Row) -> None:
        row.lot.repark(other, count=count)
        assert len(other) == len(moved)
        assert len(row.lot) == len(left)
        assert all(row.tasks[name].trap is other for name in moved)
        assert all(row.tasks[name].trap is row.lot for name in left)
        await wait_all_tasks_blocked()
        assert row.log == []
        assert "".join(task.name for task in other.unpark_all()) == moved

    assert served(with_row("abc", body)) == " ".join(moved)


def test_reparked_tasks_come_after_those_who_wait_there_already() -> None:
    other = ParkingLot()
    first = Row("xy", other)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            await first.fill(nursery)
            second = Row("ab")
            await second.fill(nursery)
            second.lot.repark_all(other)
            assert "".join(task.name for task in other.unpark_all()) == "xyab"

    kernel.run(main)


def test_one_who_was_reparked_is_cancelled_out_of_its_new_row() -> None:
    other = ParkingLot()

    async def body(row: Row) -> None:
        row.lot.repark_all(other)
        row.scopes["a"].cancel()
        assert len(other) == 1
        other.unpark()

    assert served(with_row("ab", body)) == "a cancelled b"


def test_repark_into_the_same_lot_sends_the_first_to_the_end() -> None:
    async def body(row: Row) -> None:
        row.lot.repark(row.lot)
        row.lot.unpark_all()

    assert served(with_row("abc", body)) == "b c a"


def test_repark_wants_a_lot() -> None:
    async def body(row: Row) -> None:
        with pytest.raises(TypeError, match=r"repark\(\) wants a ParkingLot to move to, not \[\]"):
            row.lot.repark([])  # type: ignore[arg-type]
        assert len(row.lot) == 1

    with_row("a", body)


def test_park_is_a_cancel_point_that_leaves_no_trace() -> None:
    lot = ParkingLot()

    async def main() -> None:
        with kernel.CancelScope() as scope:
            scope.cancel()
            await lot.park()
        assert scope.cancelled_caught
        assert not lot

    kernel.run(main)


def test_the_length_and_the_truth_of_a_lot_are_those_of_its_row() -> None:
    async def body(row: Row) -> None:
        assert len(row.lot) == 2
        assert bool(row.lot) is True
        assert row.lot.statistics() == ParkingLotStatistics(tasks_waiting=2)
        row.lot.unpark_all()
        assert len(row.lot) == 0
        assert bool(row.lot) is False
        assert row.lot.statistics().tasks_waiting == 0

    with_row("ab", body)


def test_unparking_an_empty_lot_works_outside_the_kernel_too() -> None:
    lot = ParkingLot()
    assert lot.unpark() == []
    assert lot.unpark_all() == []
    lot.repark_all(ParkingLot())


def test_unparking_tasks_of_another_threads_kernel_is_an_error_that_changes_nothing() -> None:
    from threading import Thread

    errors: list[BaseException] = []

    async def body(row: Row) -> None:
        def thread() -> None:
            try:
                row.lot.unpark()
            except RuntimeError as error:
                errors.append(error)

        one = Thread(target=thread)
        one.start()
        one.join(30)
        assert len(row.lot) == 1
        await checkpoint()

    assert served(with_row("a", body)) == ""
    assert "ParkingLot.unpark() was used outside the kernel" in str(errors[0])


def test_the_repr_names_what_is_waited_for_and_how_many_wait() -> None:
    assert repr(ParkingLot("the noodles")) == "<ParkingLot of the noodles, 0 waiting>"
    lot = ParkingLot()
    assert repr(lot) == f"<ParkingLot of {id(lot):#x}, 0 waiting>"

    async def body(row: Row) -> None:
        assert repr(row.lot) == "<ParkingLot of 0, 2 waiting>"

    with_row("ab", body, ParkingLot(0))


# ---- broken lots -------------------------------------------------------------------------------------


async def break_when_told(lot: ParkingLot, ending: Callable[[], Awaitable[object]]) -> None:
    add_parking_lot_breaker(current_task(), lot)
    await ending()


async def wait_for_the_break(lot: ParkingLot, log: list[str], name: str = "waiter") -> None:
    try:
        await lot.park()
    except BrokenResourceError as error:
        log.append(f"{name}: {error}")


async def returns() -> None:
    await wait_all_tasks_blocked()


async def fails() -> None:
    await wait_all_tasks_blocked()
    raise KeyError("the breaker's")


async def is_cancelled() -> None:
    with kernel.CancelScope() as scope:
        await wait_all_tasks_blocked()
        scope.cancel()
        await checkpoint()


BROKEN = "the well was broken by 'breaker': nobody is left to let go of those who wait for it"


class Well:
    def __repr__(self) -> str:
        return "the well"


@pytest.mark.parametrize("ending", [returns, fails, is_cancelled])
def test_when_its_breaker_ends_however_the_lot_breaks_and_the_waiters_get_the_error(
    ending: Callable[[], Awaitable[object]],
) -> None:
    lot, log = ParkingLot(Well()), []
    tasks: list[Task] = []

    async def shielded(name: str) -> None:
        with kernel.CancelScope(shield=True):
            await wait_for_the_break(lot, log, name)

    async def breaker() -> None:
        tasks.append(current_task())
        await break_when_told(lot, ending)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(breaker, name="breaker")
            for name in "ab":
                nursery.start_soon(shielded, name)

    if ending is fails:
        with pytest.raises(ExceptionGroup):
            kernel.run(main)
    else:
        kernel.run(main)
    assert log == [f"a: {BROKEN}", f"b: {BROKEN}"]
    assert lot.broken_by == tasks
    assert not lot


def test_a_waiter_that_was_let_go_before_the_break_has_committed() -> None:
    log: list[str] = []

    async def main() -> None:
        lot = ParkingLot()

        async def waiter() -> None:
            await lot.park()
            log.append("let go")

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(waiter)
            nursery.start_soon(wait_for_the_break, lot, log)
            await wait_all_tasks_blocked()
            lot.unpark()
            lot.break_lot()

    kernel.run(main)
    assert log[0] == "let go"
    assert log[1].startswith("waiter: this parking lot was broken by ")


def test_in_a_broken_lot_nobody_can_park_any_more() -> None:
    async def main() -> None:
        lot = ParkingLot(Well())
        lot.break_lot()
        assert lot.broken_by == [current_task()]
        with pytest.raises(BrokenResourceError, match=r"the well was broken by '.*main'"):
            await lot.park()
        assert lot.unpark() == []
        other = ParkingLot()
        lot.repark_all(other)

    kernel.run(main)


def test_tasks_that_are_moved_to_a_broken_lot_wake_with_its_error() -> None:
    log: list[str] = []

    async def main() -> None:
        lot, broken = ParkingLot(), ParkingLot(Well())
        async with kernel.open_nursery() as nursery:
            for name in "ab":
                nursery.start_soon(wait_for_the_break, lot, log, name)
            await wait_all_tasks_blocked()
            broken.break_lot()
            lot.repark(broken)
            await wait_all_tasks_blocked()
            assert [line[:11] for line in log] == ["a: the well"]
            assert len(lot) == 1
            lot.repark_all(broken)

    kernel.run(main)
    assert [line[:11] for line in log] == ["a: the well", "b: the well"]


def test_a_lot_with_several_breakers_breaks_with_the_first_and_lists_all() -> None:
    log: list[str] = []

    async def main() -> None:
        lot, tasks = ParkingLot(), []
        async with kernel.open_nursery() as nursery:
            gates = [kernel.Event() for _ in range(3)]
            for number, gate in enumerate(gates):
                nursery.start_soon(break_when_told, lot, gate.wait, name=str(number))
            nursery.start_soon(wait_for_the_break, lot, log)
            await wait_all_tasks_blocked()
            tasks = sorted(current_kernel().farewells, key=lambda task: task.name)
            for number in (1, 0, 2):
                gates[number].set()
                await wait_all_tasks_blocked()
                assert len(log) == 1
        assert lot.broken_by == [tasks[1], tasks[0], tasks[2]]

    kernel.run(main)
    assert "'1'" in log[0]
    assert "'0'" not in log[0]


def test_a_breaker_that_was_removed_breaks_nothing() -> None:
    lot = ParkingLot()

    async def child() -> None:
        add_parking_lot_breaker(current_task(), lot)
        await checkpoint()
        remove_parking_lot_breaker(current_task(), lot)
        assert current_kernel().farewells == {}

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)

    kernel.run(main)
    assert lot.broken_by == []


@pytest.mark.parametrize(("removed", "broken"), [(0, 2), (1, 1), (2, 0)])
def test_a_breaker_that_was_added_twice_must_be_removed_twice(removed: int, broken: int) -> None:
    lot = ParkingLot()

    async def child() -> None:
        for _ in range(2):
            add_parking_lot_breaker(current_task(), lot)
        for _ in range(removed):
            remove_parking_lot_breaker(current_task(), lot)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)

    kernel.run(main)
    assert len(lot.broken_by) == broken


def test_removing_one_breaker_leaves_the_tasks_other_lots_and_the_lots_other_tasks() -> None:
    first, second = ParkingLot(), ParkingLot()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            gate = kernel.Event()
            nursery.start_soon(gate.wait, name="a")
            nursery.start_soon(gate.wait, name="b")
            tasks = {task.name: task for task in nursery.child_tasks}
            for task in tasks.values():
                add_parking_lot_breaker(task, first)
                add_parking_lot_breaker(task, second)
            remove_parking_lot_breaker(tasks["a"], first)
            gate.set()
        assert first.broken_by == [tasks["b"]]
        assert set(second.broken_by) == set(tasks.values())

    kernel.run(main)


def test_to_remove_what_is_no_breaker_is_an_error() -> None:
    async def main() -> None:
        lot, other = ParkingLot(Well()), ParkingLot()
        with pytest.raises(RuntimeError, match="is no breaker of <ParkingLot of the well"):
            remove_parking_lot_breaker(current_task(), lot)
        add_parking_lot_breaker(current_task(), other)
        with pytest.raises(RuntimeError, match="is no breaker of"):
            remove_parking_lot_breaker(current_task(), lot)
        remove_parking_lot_breaker(current_task(), other)
        with pytest.raises(RuntimeError, match="is no breaker of"):
            remove_parking_lot_breaker(current_task(), other)

    kernel.run(main)


def test_a_task_that_has_ended_cannot_become_a_breaker() -> None:
    async def main() -> None:
        lot = ParkingLot()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(checkpoint)
            (task,) = nursery.child_tasks
        with pytest.raises(BrokenResourceError, match="has ended already"):
            add_parking_lot_breaker(task, lot)
        assert current_kernel().farewells == {}
        assert not lot.broken_by

    kernel.run(main)


def test_breaking_and_breakers_belong_into_a_run() -> None:
    async def main() -> Task:
        return current_task()

    task, lot = kernel.run(main), ParkingLot()
    for function in (add_parking_lot_breaker, remove_parking_lot_breaker):
        with pytest.raises(RuntimeError, match=rf"^{function.__name__}\(\) was used outside the kernel"):
            function(task, lot)
    with pytest.raises(RuntimeError, match=r"ParkingLot\.break_lot\(\) was used outside the kernel"):
        lot.break_lot()
    lot.break_lot(task)  # nobody waits, and somebody takes the blame: that works anywhere
    assert lot.broken_by == [task]


def test_a_lot_can_be_broken_by_a_call_from_outside_in_the_name_of_a_task() -> None:
    log: list[str] = []

    async def main() -> None:
        lot = ParkingLot()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(wait_for_the_break, lot, log)
            await wait_all_tasks_blocked()
            current_kernel_token().run_sync_soon(lot.break_lot, current_task())

    kernel.run(main)
    assert len(log) == 1


def test_no_breaker_is_left_over_when_the_run_has_ended_well_or_not() -> None:
    lots = [ParkingLot() for _ in range(3)]

    async def main(error: BaseException | None) -> None:
        spawn_system_task(break_when_told, lots[0], kernel.sleep_forever)
        add_parking_lot_breaker(current_task(), lots[1])
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(break_when_told, lots[2], kernel.sleep_forever)
            await wait_all_tasks_blocked()
            assert len(current_kernel().farewells) == 3
            if error is not None:
                raise error
            nursery.cancel_scope.cancel()

    with kernel.Kernel() as one:
        one.run(main, None)
        with pytest.raises(ExceptionGroup):
            one.run(main, KeyError())
        with pytest.raises(KeyboardInterrupt):
            one.run(main, KeyboardInterrupt())
        assert one.farewells == {}
    assert [len(lot.broken_by) for lot in lots] == [3, 3, 3]


def test_when_a_service_crashes_the_run_its_lot_breaks_too() -> None:
    log: list[str] = []
    lot = ParkingLot()

    async def main() -> None:
        spawn_system_task(break_when_told, lot, fails)
        with kernel.CancelScope(shield=True):
            await wait_for_the_break(lot, log)

    with pytest.raises(kernel.KernelInternalError):
        kernel.run(main)
    assert len(log) == 1
