"""`gather`, `race`, `as_completed` and `map_concurrently`."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from functools import partial
from typing import Any

import pytest

import kernel
from kernel import TaskCancelled, as_completed, gather, map_concurrently, race
from kernel.interrupts import currently_ki_protected
from kernel.lowlevel import ParkingLot, checkpoint, current_kernel, current_task
from kernel.testing import wait_all_tasks_blocked

Virtual = Callable[..., Any]


async def give(value: Any, seconds: float = 1) -> Any:
    await kernel.sleep(seconds)
    return value


async def fail(error: BaseException, seconds: float = 1) -> None:
    await kernel.sleep(seconds)
    raise error


def old_style(value: Any, seconds: float = 1) -> Generator[Any, Any, Any]:
    yield from kernel.sleep(seconds)
    return value


async def leave_a_note(log: list[str], note: str = "cancelled") -> None:
    try:
        await kernel.sleep_forever()
    finally:
        log.append(note)


async def cancel_my_nursery() -> None:
    nursery = current_task().parent_nursery
    assert nursery is not None
    nursery.cancel_scope.cancel()
    await checkpoint()


# ---- what holds for all of them ------------------------------------------------------------------------


async def all_of(*calls: Callable[[], Any]) -> list[Any]:
    async with as_completed(calls) as results:
        return [result async for result in results]


async def mapped(*calls: Callable[[], Any]) -> list[Any]:
    return await map_concurrently(lambda call: call(), calls)


ALL: dict[str, Callable[..., Any]] = {
    "gather": gather, "race": race, "as_completed": all_of, "map_concurrently": mapped,
}  # fmt: skip
NO_RACE = {name: fn for name, fn in ALL.items() if name != "race"}


@pytest.mark.parametrize("name", NO_RACE)
def test_a_failure_cancels_and_joins_the_others_and_arrives_in_a_group(name: str, virtual: Virtual) -> None:
    log: list[str] = []

    async def main() -> float:
        with pytest.raises(ExceptionGroup) as caught:
            await ALL[name](partial(leave_a_note, log), partial(fail, ValueError()), partial(leave_a_note, log))
        assert [type(error) for error in caught.value.exceptions] == [ValueError]
        assert log == ["cancelled", "cancelled"]
        return kernel.current_time()

    assert virtual(main) == 1


@pytest.mark.parametrize("name", NO_RACE)
def test_all_errors_arrive(name: str, virtual: Virtual) -> None:
    async def fail_in_cleanup() -> None:
        try:
            await kernel.sleep_forever()
        finally:
            raise KeyError("cleanup")

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            await ALL[name](fail_in_cleanup, partial(fail, ValueError()))
        assert [type(error) for error in caught.value.exceptions] == [ValueError, KeyError]

    virtual(main)


@pytest.mark.parametrize("name", ALL)
def test_cancelling_the_call_cancels_and_joins_all(name: str, virtual: Virtual) -> None:
    log: list[str] = []

    async def main() -> None:
        with kernel.move_on_after(1) as scope:
            await ALL[name](partial(leave_a_note, log), partial(leave_a_note, log))
        assert scope.cancelled_caught
        assert log == ["cancelled", "cancelled"]

    virtual(main)


@pytest.mark.parametrize("name", ALL)
def test_a_cancelled_operation_did_nothing_and_called_nobody(name: str, virtual: Virtual) -> None:
    log: list[str] = []

    def call() -> Any:
        log.append("called")
        return give(1)

    async def main() -> None:
        with kernel.CancelScope() as scope:
            scope.cancel()
            await ALL[name](call)
        assert scope.cancelled_caught

    virtual(main)
    assert log == []


@pytest.mark.parametrize("name", ALL)
def test_generator_functions_and_awaitables_are_calls_too(name: str, virtual: Virtual) -> None:
    result = virtual(ALL[name], partial(old_style, "old", 1))
    assert result == ("old" if name == "race" else ["old"])

    def main() -> Generator[Any, Any, Any]:
        return (yield from gather(partial(old_style, 1), partial(give, 2), checkpoint))

    assert virtual(main) == [1, 2, None]


@pytest.mark.parametrize("name", ["gather", "race", "as_completed"])
def test_coroutine_objects_are_refused_all_are_closed_and_nothing_is_started(name: str, virtual: Virtual) -> None:
    log: list[str] = []

    def call() -> Any:
        log.append("called")
        return begin()

    async def begin() -> None:
        log.append("begun")

    async def main() -> None:
        with pytest.raises(TypeError, match=rf"{name} wants functions .* result of calling give.*partial\(give"):
            await ALL[name](call, give(1), kernel.sleep(1), give(2))

    virtual(main)  # warnings of coroutines that were never awaited would be errors
    assert log == ["called"]


@pytest.mark.parametrize("name", ["gather", "race", "as_completed"])
def test_what_is_no_async_function_is_refused(name: str, virtual: Virtual) -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match=f"{name} wants an async function"):
            await ALL[name](partial(give, 1), lambda: 3)
        with pytest.raises(TypeError, match=f"{name} wants an async function, not 3"):
            await ALL[name](partial(give, 1), 3)

    virtual(main)


@pytest.mark.parametrize("name", ["gather", "race", "map_concurrently"])
def test_a_call_that_cancels_the_nursery_it_runs_in_leaves_no_results(name: str, virtual: Virtual) -> None:
    with pytest.raises(TaskCancelled, match=rf"a call of {name}\(\) has cancelled"):
        virtual(ALL[name], cancel_my_nursery, partial(give, 1))


def test_a_call_that_cancels_the_as_completed_block_ends_it_quietly(virtual: Virtual) -> None:
    async def main() -> str:
        async with as_completed([cancel_my_nursery]) as results:
            async for _ in results:
                raise AssertionError("no result")
        return "went on"

    assert virtual(main) == "went on"


@pytest.mark.parametrize("name", NO_RACE)
def test_no_calls_no_results_but_still_a_cancel_point(name: str, virtual: Virtual) -> None:
    async def main() -> None:
        assert await ALL[name]() == []
        with kernel.CancelScope() as scope:
            scope.cancel()
            await ALL[name]()
        assert scope.cancelled_caught

    virtual(main)


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("ending", ["results", "errors", "cancelled"])
@pytest.mark.parametrize("name", ALL)
def test_they_leave_no_garbage_to_collect(name: str, ending: str, virtual: Virtual, no_gc: None) -> None:
    async def scene() -> None:
        with kernel.move_on_after(5):
            try:
                if ending == "results":
                    await ALL[name](partial(give, 1), partial(give, 2))
                elif ending == "errors":
                    await ALL[name](fail_anew, fail_anew)
                else:
                    await ALL[name](kernel.sleep_forever, kernel.sleep_forever)
            except* ValueError:
                pass

    async def fail_anew() -> None:
        await kernel.sleep(1)
        raise ValueError

    async def main() -> None:
        await scene()
        await checkpoint()
        gc.collect()
        for _ in range(5):
            await scene()
        await checkpoint()
        assert gc.collect() == 0
        assert not current_kernel().farewells

    virtual(main)


@pytest.mark.parametrize("name", ALL)
def test_ctrl_c_strikes_the_calls_as_any_other_task(name: str, virtual: Virtual) -> None:
    async def call() -> bool:
        await checkpoint()
        return currently_ki_protected()

    assert virtual(ALL[name], call) == (False if name == "race" else [False])


def test_ctrl_c_strikes_the_items_of_map_concurrently(virtual: Virtual) -> None:
    def items() -> Iterator[bool]:
        yield currently_ki_protected()

    assert virtual(map_concurrently, partial(give, seconds=0), items()) == [False]


# ---- gather --------------------------------------------------------------------------------------------


def test_gather_returns_results_in_the_order_of_the_calls(virtual: Virtual) -> None:
    async def main() -> tuple[list[Any], float]:
        return await gather(partial(give, "a", 3), partial(give, "b", 1), partial(give, "c", 2)), kernel.current_time()

    assert virtual(main) == (["a", "b", "c"], 3)


def test_the_last_call_returns_and_an_outer_cancel_fires_in_the_same_pass_neither_is_lost(virtual: Virtual) -> None:
    log: list[Any] = []

    async def main() -> None:
        lot = ParkingLot()

        async def wait() -> str:
            await lot.park()
            return "result"

        async def open_and_cancel() -> None:
            await wait_all_tasks_blocked()
            lot.unpark()
            scope.cancel()

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(open_and_cancel)
            with kernel.CancelScope() as scope:
                log.append(await gather(wait))
                await checkpoint()
                raise AssertionError("the cancellation was lost")
            assert scope.cancelled_caught

    virtual(main)
    assert log == [["result"]]


def test_gathered_tasks_are_named_after_their_functions(virtual: Virtual) -> None:
    async def name() -> str:
        return current_task().name.rpartition(".")[2]

    assert virtual(gather, name, partial(name)) == ["name", "name"]


# ---- race ----------------------------------------------------------------------------------------------


def test_race_returns_the_first_success_and_cancels_and_joins_the_others(virtual: Virtual) -> None:
    log: list[str] = []

    async def main() -> None:
        assert await race(partial(leave_a_note, log), partial(give, "slow", 2), partial(give, "fast", 1)) == "fast"
        assert log == ["cancelled"]
        assert kernel.current_time() == 1

    virtual(main)


def test_race_goes_on_when_a_call_fails(virtual: Virtual) -> None:
    assert virtual(race, partial(fail, ValueError(), 1), partial(give, "winner", 2)) == "winner"


def test_race_that_all_lose_raises_one_group_of_all_errors_in_the_order_they_came(virtual: Virtual) -> None:
    late, early = ValueError("late"), ValueError("early")
    with pytest.raises(ExceptionGroup, match=r"all 2 calls of race\(\) failed") as caught:
        virtual(race, partial(fail, late, 2), partial(fail, early, 1))
    assert caught.value.exceptions == (early, late)


def test_race_has_one_winner_when_two_return_in_the_same_pass(virtual: Virtual) -> None:
    assert virtual(race, partial(give, "first", 1), partial(give, "second", 1)) == "first"


def test_race_drops_what_losers_raise_when_cancelled(virtual: Virtual) -> None:
    async def fail_in_cleanup() -> None:
        try:
            await kernel.sleep_forever()
        finally:
            raise ValueError("cleanup")

    assert virtual(race, fail_in_cleanup, partial(give, "winner")) == "winner"


@pytest.mark.parametrize("seconds", [0.5, 2])
def test_race_lets_what_is_no_exception_through(seconds: float, virtual: Virtual) -> None:
    async def exits() -> None:
        try:
            await kernel.sleep(seconds)
        finally:
            raise SystemExit(3)

    with pytest.raises(BaseExceptionGroup) as caught:
        virtual(race, exits, partial(give, "winner", 1))
    assert caught.group_contains(SystemExit)


def test_a_winner_is_there_and_an_outer_cancel_comes_while_losers_clean_up_neither_is_lost(virtual: Virtual) -> None:
    async def slow_to_leave() -> None:
        try:
            await kernel.sleep_forever()
        finally:
            with kernel.cleanup(10):
                await kernel.sleep(5)
            await checkpoint()

    log: list[Any] = []

    async def main() -> None:
        with kernel.move_on_after(3) as scope:
            log.append(await race(slow_to_leave, partial(give, "winner", 1)))
            log.append(kernel.current_time())
            await checkpoint()
            raise AssertionError("the cancellation was lost")
        assert scope.cancelled_caught

    virtual(main)
    assert log == ["winner", 6]


def test_race_of_nobody_is_an_error(virtual: Virtual) -> None:
    with pytest.raises(ValueError, match="no calls"):
        virtual(race)


# ---- as_completed --------------------------------------------------------------------------------------


def test_as_completed_gives_results_in_the_order_they_come(virtual: Virtual) -> None:
    async def main() -> list[tuple[Any, float]]:
        async with as_completed([partial(give, n, n) for n in (3, 1, 2)]) as results:
            return [(result, kernel.current_time()) async for result in results]

    assert virtual(main) == [(1, 1), (2, 2), (3, 3)]


def test_as_completed_keeps_results_for_a_slow_reader(virtual: Virtual) -> None:
    async def main() -> list[Any]:
        got = []
        async with as_completed([partial(give, n, n) for n in (3, 1, 2)]) as results:
            await kernel.sleep(10)
            async for result in results:
                got.append(result)
                await kernel.sleep(10)
        return got

    assert virtual(main) == [1, 2, 3]


@pytest.mark.parametrize("how", ["break", "error"])
def test_leaving_as_completed_early_cancels_and_joins_the_rest(how: str, virtual: Virtual) -> None:
    log: list[Any] = []

    async def main() -> None:
        try:
            async with as_completed([partial(leave_a_note, log), partial(give, "first")]) as results:
                async for result in results:
                    log.append(result)
                    if how == "error":
                        raise ValueError
                    break
        except* ValueError:
            log.append("error")
        log.append(kernel.current_time())

    virtual(main)
    assert log == ["first", "cancelled", 1] if how == "break" else ["first", "cancelled", "error", 1]


def test_a_result_comes_and_the_readers_deadline_fires_in_the_same_pass_neither_is_lost(virtual: Virtual) -> None:
    async def main() -> list[Any]:
        lot = ParkingLot()
        got: list[Any] = []

        async def wait() -> str:
            await lot.park()
            return "result"

        async def open_and_cancel() -> None:
            await wait_all_tasks_blocked()
            lot.unpark()
            await checkpoint()  # `wait` has returned, and the reader was woken
            scope.cancel()

        async with as_completed([wait, open_and_cancel]) as results:
            with kernel.CancelScope() as scope:
                got.append(await anext(results))
                await checkpoint()
                raise AssertionError("the cancellation was lost")
            got.append(await anext(results))
            with pytest.raises(StopAsyncIteration):
                await anext(results)
        return got

    assert virtual(main) == ["result", None]


def test_a_reader_that_gave_up_misses_nothing(virtual: Virtual) -> None:
    async def main() -> Any:
        async with as_completed([partial(give, "late", 5)]) as results:
            with kernel.move_on_after(1):
                await anext(results)
            return await anext(results)

    assert virtual(main) == "late"


def test_a_result_that_comes_when_the_reader_has_gone_to_do_something_else_is_kept(virtual: Virtual) -> None:
    async def main() -> tuple[Any, float]:
        async with as_completed([partial(give, "late", 5)]) as results:
            with kernel.move_on_after(1):
                await anext(results)
            await kernel.sleep(10)
            return await anext(results), kernel.current_time()

    assert virtual(main) == ("late", 11)


def test_a_cancelled_operation_did_nothing_the_next_result_stays(virtual: Virtual) -> None:
    async def main() -> Any:
        async with as_completed([partial(give, "result")]) as results:
            await kernel.sleep(2)
            with kernel.CancelScope() as scope:
                scope.cancel()
                await anext(results)
            assert scope.cancelled_caught
            return await anext(results)

    assert virtual(main) == "result"


def test_an_error_is_no_result(virtual: Virtual) -> None:
    log: list[Any] = []

    async def main() -> None:
        async with as_completed([partial(fail, ValueError())]) as results:
            async for result in results:
                log.append(result)

    with pytest.raises(ExceptionGroup):
        virtual(main)
    assert log == []


def test_as_completed_is_iterated_inside_its_block_by_its_task_once(virtual: Virtual) -> None:
    async def other(results: Any) -> None:
        with pytest.raises(RuntimeError, match="in that task"):
            await anext(results)

    async def main() -> None:
        bare = as_completed([partial(give, 1)])
        with pytest.raises(RuntimeError, match="async with as_completed"):
            async for _ in bare:
                pass
        async with bare as results, kernel.open_nursery() as nursery:
            nursery.start_soon(other, results)
        with pytest.raises(RuntimeError, match="async with as_completed"):
            await anext(bare)
        with pytest.raises(RuntimeError, match="serves one"):
            async with bare:
                pass

    virtual(main)


def test_generators_read_as_completed_too(virtual: Virtual) -> None:
    def body(results: Any) -> Generator[Any, Any, list[Any]]:
        return [(yield from anext(results)), (yield from anext(results))]

    def main() -> Generator[Any, Any, Any]:
        return (yield from kernel.within(as_completed([partial(old_style, n, n) for n in (2, 1)]), body))

    assert virtual(main) == [1, 2]


# ---- map_concurrently ----------------------------------------------------------------------------------


def test_map_concurrently_returns_results_in_the_order_of_the_items(virtual: Virtual) -> None:
    async def wait(n: int) -> tuple[int, float]:
        await kernel.sleep(n)
        return n, kernel.current_time()

    assert virtual(map_concurrently, wait, [3, 1, 2]) == [(3, 3), (1, 1), (2, 2)]


@pytest.mark.parametrize("limit", [1, 2, 5, 100])
def test_map_concurrently_has_no_more_than_limit_calls_at_once_and_asks_no_earlier(
    limit: int, virtual: Virtual
) -> None:
    running, most = 0, 0
    asked: list[int] = []

    def items() -> Iterator[int]:
        for n in range(20):
            asked.append(running)
            yield n

    async def work(n: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await kernel.sleep(1 + n % 3)
        running -= 1
        return n * n

    async def main() -> list[int]:
        return await map_concurrently(work, items(), limit=limit)

    assert virtual(main) == [n * n for n in range(20)]
    assert most == min(limit, 20)
    assert max(asked) < limit


def test_map_concurrently_takes_async_iterables_and_generator_functions(virtual: Virtual) -> None:
    async def items() -> AsyncIterator[int]:
        for n in range(5):
            await kernel.sleep(1)
            yield n

    def main() -> Generator[Any, Any, Any]:
        results = yield from map_concurrently(old_style, items(), limit=2)
        return results, kernel.current_time()

    assert virtual(main) == ([0, 1, 2, 3, 4], 6)


def test_map_concurrently_closes_an_async_generator_that_it_leaves_early(virtual: Virtual) -> None:
    log: list[str] = []

    async def items() -> AsyncIterator[int]:
        try:
            while True:
                await kernel.sleep(1)
                yield 1
        finally:
            log.append("closed")

    async def main() -> None:
        with kernel.move_on_after(5):
            await map_concurrently(lambda n: kernel.sleep(100), items(), limit=1)
        log.append("left")

    virtual(main)
    assert log == ["closed", "left"]


def test_map_concurrently_asks_for_no_item_any_more_when_a_call_has_failed(virtual: Virtual) -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for n in range(10):
            asked.append(n)
            yield n

    with pytest.raises(ExceptionGroup):
        virtual(partial(map_concurrently, lambda n: fail(ValueError()), items(), limit=1))
    assert asked == [0]


def test_map_concurrently_lets_others_run_while_it_asks_for_many_items() -> None:
    log: list[str] = []

    async def other() -> None:
        log.append("other")

    def items() -> Iterator[int]:
        yield from range(1000)
        log.append("asked for all")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other)
            await map_concurrently(lambda n: kernel.sleep(0), items())

    kernel.run(main)
    assert log == ["other", "asked for all"]


def test_an_error_of_the_items_cancels_the_calls(virtual: Virtual) -> None:
    log: list[str] = []

    def items() -> Iterator[int]:
        yield 1
        raise KeyError("items")

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            await map_concurrently(lambda n: leave_a_note(log), items(), limit=2)
        assert caught.group_contains(KeyError, depth=1)
        assert log == ["cancelled"]

    virtual(main)


@pytest.mark.parametrize(("limit", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError)])
def test_map_concurrently_refuses_a_limit_that_makes_no_sense(limit: Any, error: Any, virtual: Virtual) -> None:
    with pytest.raises(error, match="limit"):
        virtual(partial(map_concurrently, give, [1], limit=limit))
