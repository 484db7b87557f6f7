"""Async generators that nobody finishes: closed inside the kernel, in the right order, and never after the run."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import threading
import warnings
from collections.abc import AsyncGenerator, Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest

import kernel
from kernel import Kernel
from kernel.lowlevel import checkpoint, current_kernel, current_kernel_token, current_task, spawn_system_task
from kernel.testing import MockClock, wait_all_tasks_blocked

Numbers = AsyncGenerator[int, None]


@pytest.fixture
def log() -> list[str]:
    return []


def run(main: Callable[..., Any], **drivers: Any) -> list[str]:
    """Run `main` and return the texts of the ResourceWarnings; any other warning is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernel.run(main, **drivers)
        gc.collect()
    assert all(one.category is ResourceWarning for one in caught), [str(one.message) for one in caught]
    return [str(one.message) for one in caught]


def numbers_into(log: list[str], name: str = "gen") -> Callable[[], Numbers]:
    async def numbers() -> Numbers:
        try:
            for number in range(10):
                yield number
        finally:
            log.append(f"{name} closed in a task: {current_kernel().current is not None}")

    return numbers


async def take_one(agen: Numbers) -> None:
    async for _ in agen:
        break


def test_one_that_is_abandoned_in_a_task_is_closed_in_the_kernel_while_the_program_goes_on(log: list[str]) -> None:
    async def main() -> None:
        await take_one(numbers_into(log)())
        gc.collect()
        assert log == []  # not on the spot
        await wait_all_tasks_blocked()
        log.append("main goes on")

    run(main)
    assert log == ["gen closed in a task: True", "main goes on"]


def test_the_warning_names_the_generator_and_the_cure(log: list[str]) -> None:
    async def main() -> None:
        await take_one(numbers_into(log)())
        gc.collect()
        await wait_all_tasks_blocked()

    (text,) = run(main)
    assert "async generator 'numbers_into.<locals>.numbers'" in text
    assert "contextlib.aclosing(...)" in text


def test_one_that_is_exhausted_or_closed_needs_nothing(log: list[str]) -> None:
    async def main() -> None:
        async for _ in numbers_into(log)():
            pass
        async with contextlib.aclosing(numbers_into(log)()) as agen:
            await take_one(agen)
        numbers_into(log)()  # never iterated
        del agen
        gc.collect()
        await wait_all_tasks_blocked()

    assert run(main) == []
    assert log == ["gen closed in a task: True"] * 2


def test_one_that_is_abandoned_in_the_last_step_of_main_is_closed(log: list[str]) -> None:
    async def main() -> None:
        await take_one(numbers_into(log)())

    assert len(run(main)) == 1
    assert log == ["gen closed in a task: True"]


def test_one_that_is_abandoned_in_the_last_step_of_a_child_is_closed(log: list[str]) -> None:
    async def child() -> None:
        await checkpoint()
        await take_one(numbers_into(log)())

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)

    assert len(run(main)) == 1
    assert log == ["gen closed in a task: True"]


def test_one_that_is_still_alive_when_the_run_ends_is_closed_before_it_has_ended(log: list[str]) -> None:
    kept: list[Numbers] = []

    async def main() -> None:
        kept.append(numbers_into(log)())
        await take_one(kept[0])
        log.append("main ends")

    assert run(main) == []
    assert log == ["main ends", "gen closed in a task: True"]


def test_nested_ones_are_closed_from_the_outside_in_when_abandoned(log: list[str]) -> None:
    async def inner() -> Numbers:
        try:
            yield 1
        finally:
            log.append("inner")

    async def outer() -> Numbers:
        try:
            async for number in inner():
                yield number
        finally:
            log.append("outer")

    async def main() -> None:
        await take_one(outer())
        gc.collect()
        await wait_all_tasks_blocked()
        log.append("main goes on")

    run(main)
    assert log == ["outer", "inner", "main goes on"]


def test_nested_ones_are_closed_from_the_outside_in_when_the_run_ends(log: list[str]) -> None:
    kept: list[Numbers] = []

    async def level(number: int) -> Numbers:
        try:
            if number:
                async for item in kept[number - 1]:
                    yield item
            yield number
        finally:
            log.append(str(number))

    async def main() -> None:
        kept.extend(level(number) for number in range(5))
        await take_one(kept[4])

    run(main)
    assert log == ["4", "3", "2", "1", "0"]


def test_an_outer_one_may_still_use_the_inner_one_in_its_finally_when_the_run_ends(log: list[str]) -> None:
    kept: list[Numbers] = []

    async def inner() -> Numbers:
        try:
            yield 1
            yield 2
        finally:
            log.append("inner")

    async def outer(source: Numbers) -> Numbers:
        try:
            async for number in source:
                yield number
        finally:
            log.append(f"outer got {await source.__anext__()}")

    async def main() -> None:
        source = inner()
        kept.extend([source, outer(source)])
        await take_one(kept[1])

    run(main)
    assert log == ["outer got 2", "inner"]


def test_several_that_live_side_by_side_are_closed_in_the_order_they_were_first_iterated(log: list[str]) -> None:
    kept: list[Numbers] = []

    async def main() -> None:
        kept.extend(numbers_into(log, name)() for name in "abc")
        for index in (2, 0, 1):
            await take_one(kept[index])

    run(main)
    assert [line[0] for line in log] == ["c", "a", "b"]


def test_one_that_is_first_iterated_while_others_are_closed_is_closed_too(log: list[str]) -> None:
    kept: list[Numbers] = []

    async def late() -> Numbers:
        try:
            yield 1
        finally:
            log.append("late")

    async def early() -> Numbers:
        try:
            yield 1
        finally:
            log.append("early")
            kept.append(late())
            await kept[-1].__anext__()

    async def main() -> None:
        kept.append(early())
        await take_one(kept[0])

    run(main)
    assert log == ["early", "late"]


@pytest.mark.parametrize("alive", [True, False], ids=["alive at the end", "abandoned"])
def test_whatever_would_wait_in_its_finally_is_cancelled(log: list[str], alive: bool) -> None:
    kept: list[Numbers] = []

    async def numbers() -> Numbers:
        try:
            yield 1
        finally:
            try:
                await kernel.sleep(1000)
            except kernel.Cancelled as why:
                log.append(f"{why.source}: {why.reason}")
                raise
            finally:
                log.append("closed")

    async def main() -> None:
        agen = numbers()
        if alive:
            kept.append(agen)
        await take_one(agen)
        del agen
        gc.collect()
        await wait_all_tasks_blocked()
        log.append("main ends")

    run(main)
    closing = ["explicit: the async generator was abandoned", "closed"]
    assert log == (["main ends", *closing] if alive else [*closing, "main ends"])


def test_a_finally_may_wait_in_a_shield_of_its_own(log: list[str]) -> None:
    kept: list[Numbers] = []

    async def numbers() -> Numbers:
        try:
            yield 1
        finally:
            with kernel.CancelScope(shield=True):
                await checkpoint()
                await wait_all_tasks_blocked()
                log.append("closed in peace")

    async def main() -> None:
        kept.append(numbers())
        await take_one(kept[0])
        await take_one(numbers())
        gc.collect()
        await checkpoint()

    run(main)
    assert log == ["closed in peace"] * 2


@pytest.mark.parametrize("alive", [True, False], ids=["alive at the end", "abandoned"])
def test_one_whose_closing_fails_is_logged_and_harms_nobody(
    log: list[str], alive: bool, caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[Numbers] = []

    async def bad() -> Numbers:
        try:
            yield 1
        finally:
            raise ValueError("the finally failed")

    async def main() -> None:
        for make in (bad, numbers_into(log)):
            agen = make()
            if alive:
                kept.append(agen)
            await take_one(agen)
            del agen
        gc.collect()
        await wait_all_tasks_blocked()

    with caplog.at_level(logging.ERROR):
        run(main)
    (record,) = caplog.records
    assert "test_one_whose_closing_fails_is_logged_and_harms_nobody.<locals>.bad" in record.getMessage()
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "the finally failed"
    assert log == ["gen closed in a task: True"]


def test_one_that_refuses_to_be_closed_is_logged(log: list[str], caplog: pytest.LogCaptureFixture) -> None:
    kept: list[Numbers] = []

    async def stubborn() -> Numbers:
        try:
            yield 1
        except GeneratorExit:
            yield 2

    async def main() -> None:
        kept.append(stubborn())
        await take_one(kept[0])

    with caplog.at_level(logging.ERROR):
        run(main)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "ignored GeneratorExit" in str(record.exc_info[1])


def test_a_task_that_closes_an_abandoned_one_is_named_after_it() -> None:
    names: list[str] = []

    async def numbers() -> Numbers:
        try:
            yield 1
        finally:
            names.append(current_task().name)

    async def main() -> None:
        await take_one(numbers())
        gc.collect()
        await wait_all_tasks_blocked()

    run(main)
    assert names == ["close test_a_task_that_closes_an_abandoned_one_is_named_after_it.<locals>.numbers"]


def test_one_that_is_abandoned_when_main_is_cancelled_or_fails_is_closed(log: list[str]) -> None:
    async def main() -> None:
        async for _ in numbers_into(log)():
            raise KeyError("main failed")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        with pytest.raises(KeyError, match="main failed") as info:
            kernel.run(main)
    del info
    gc.collect()
    assert log == ["gen closed in a task: True"]


def test_one_that_is_collected_in_a_cycle_is_closed(log: list[str]) -> None:
    async def main() -> None:
        ring: list[Any] = [numbers_into(log)()]
        ring.append(ring)
        await take_one(ring[0])
        del ring
        assert log == []
        gc.collect()
        await wait_all_tasks_blocked()
        log.append("main goes on")

    run(main)
    assert log == ["gen closed in a task: True", "main goes on"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_warning_that_is_made_an_error_neither_breaks_the_kernel_nor_leaves_the_generator_open(
    log: list[str],
) -> None:
    async def main() -> str:
        await take_one(numbers_into(log)())
        gc.collect()
        await wait_all_tasks_blocked()
        return "done"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel.run(main) == "done"
    assert log == ["gen closed in a task: True"]


def test_one_that_is_abandoned_by_the_last_system_task_in_its_last_step_is_closed(log: list[str]) -> None:
    clock = MockClock()

    async def system() -> None:
        try:
            await kernel.sleep_forever()
        finally:
            await take_one(numbers_into(log)())
            clock.jump(1)

    async def main() -> None:
        nursery = current_kernel().system_nursery
        assert nursery is not None
        nursery.start_soon(system)
        for _ in range(100):  # slow steps, so that the kernel looks around after each
            clock.jump(1)
            await checkpoint()

    assert len(run(main, clock=clock)) == 1
    assert log == ["gen closed in a task: True"]


def test_one_that_is_first_iterated_by_a_call_after_the_last_task_is_left_as_it_is_with_a_warning(
    log: list[str],
) -> None:
    """Nothing runs any more that could close it."""

    def call() -> None:
        agen = numbers_into(log)()
        with pytest.raises(StopIteration):
            agen.__anext__().send(None)

    async def main() -> None:
        current_kernel_token().run_sync_soon(call)

    (text,) = run(main)
    assert "was abandoned before it was exhausted" in text
    assert log == []


def test_one_that_a_system_task_uses_is_left_to_it(log: list[str], caplog: pytest.LogCaptureFixture) -> None:
    async def system() -> None:
        try:
            async with contextlib.aclosing(waiting()) as agen:
                async for _ in agen:
                    pass
        finally:
            log.append("system task ends")

    async def waiting() -> Numbers:
        try:
            await kernel.sleep_forever()
            yield 1
        except kernel.Cancelled as why:
            log.append(f"cancelled by {why.source}")
            raise

    async def main() -> None:
        spawn_system_task(system)
        await wait_all_tasks_blocked()

    assert run(main) == []
    assert log == ["cancelled by shutdown", "system task ends"]
    assert caplog.records == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("alive", [True, False], ids=["alive at the end", "abandoned"])
def test_one_whose_closing_raises_what_is_no_ordinary_error_is_logged_too(
    error: type[BaseException], alive: bool, caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[Numbers] = []

    async def bad() -> Numbers:
        try:
            yield 1
        finally:
            raise error

    async def main() -> str:
        agen = bad()
        if alive:
            kept.append(agen)
        await take_one(agen)
        del agen
        await wait_all_tasks_blocked()
        return "result"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        assert kernel.run(main) == "result"
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[0] is error


def test_one_that_is_collected_by_another_thread_is_closed_in_the_kernel(log: list[str]) -> None:
    async def main() -> None:
        kept = [numbers_into(log)()]
        await take_one(kept[0])
        done = kernel.Event()
        token = current_kernel_token()

        def thread() -> None:
            kept.clear()
            token.run_sync_soon(done.set)

        worker = threading.Thread(target=thread)
        worker.start()
        await done.wait()
        worker.join(60)
        await wait_all_tasks_blocked()
        log.append("main goes on")

    run(main)
    assert log == ["gen closed in a task: True", "main goes on"]


def test_ones_that_another_thread_drops_while_the_run_ends_break_nothing(log: list[str]) -> None:
    """Each is closed, or the run is over and it is left as it is."""
    drops: SimpleQueue[list[Numbers] | None] = SimpleQueue()

    def thread() -> None:
        while (kept := drops.get()) is not None:
            kept.clear()

    async def main(steps: int) -> None:
        kept = [numbers_into(log)()]
        await take_one(kept[0])
        drops.put(kept)
        del kept
        for _ in range(steps):
            await checkpoint()

    worker = threading.Thread(target=thread)
    worker.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        with Kernel() as one:
            for number in range(500):
                one.run(main, number % 5)
        drops.put(None)
        worker.join(60)
    assert set(log) == {"gen closed in a task: True"}


def test_after_a_run_that_broke_off_the_hooks_are_restored_and_nothing_of_the_generators_is_kept(
    log: list[str],
) -> None:
    hooks = sys.get_asyncgen_hooks()
    kept: list[Numbers] = []

    async def main() -> None:
        kept.append(numbers_into(log)())
        await take_one(kept[0])
        current_kernel().poller.poll = lambda timeout: 1 // 0  # type: ignore[assignment, method-assign, return-value]
        await kernel.sleep_forever()

    with Kernel() as one:
        with pytest.raises(kernel.KernelInternalError):
            one.run(main)
        assert sys.get_asyncgen_hooks() == hooks
        with pytest.warns(ResourceWarning, match="was abandoned"):
            kept.clear()
        assert len(one.soon) == 0
    assert log == []


# ---- the interpreter's hooks --------------------------------------------------------------------------


@pytest.fixture
def foreign_hooks() -> Iterator[list[str]]:
    before = sys.get_asyncgen_hooks()
    calls: list[str] = []
    sys.set_asyncgen_hooks(
        firstiter=lambda agen: calls.append("firstiter"), finalizer=lambda agen: calls.append("finalizer")
    )
    yield calls
    sys.set_asyncgen_hooks(*before)


def test_the_hooks_are_restored_after_a_run_however_it_ends(foreign_hooks: list[str], log: list[str]) -> None:
    hooks = sys.get_asyncgen_hooks()

    async def good() -> None:
        assert sys.get_asyncgen_hooks() != hooks
        await take_one(numbers_into(log)())
        gc.collect()
        await wait_all_tasks_blocked()

    async def bad() -> None:
        raise KeyError

    run(good)
    assert sys.get_asyncgen_hooks() == hooks
    with pytest.raises(KeyError):
        kernel.run(bad)
    assert sys.get_asyncgen_hooks() == hooks
    with pytest.raises(TypeError):
        kernel.run(42)  # type: ignore[arg-type]
    assert sys.get_asyncgen_hooks() == hooks
    assert foreign_hooks == []  # the run's generators were none of theirs


def test_the_hooks_of_the_outer_run_stay_in_force_after_a_refused_inner_one(log: list[str]) -> None:
    async def main() -> None:
        hooks = sys.get_asyncgen_hooks()
        with pytest.raises(RuntimeError):
            kernel.run(main)
        assert sys.get_asyncgen_hooks() == hooks
        await take_one(numbers_into(log)())
        gc.collect()
        await wait_all_tasks_blocked()

    run(main)
    assert log == ["gen closed in a task: True"]


def test_one_that_is_first_iterated_outside_is_not_the_kernels_business(log: list[str]) -> None:
    async def numbers() -> Numbers:
        try:
            yield 0
            yield 1
        finally:
            log.append("closed")

    agen = numbers()
    with pytest.raises(StopIteration):
        agen.__anext__().send(None)

    async def main() -> None:
        assert await agen.__anext__() == 1

    assert run(main) == []
    assert log == []
    with pytest.raises(StopIteration):
        agen.aclose().send(None)
    assert log == ["closed"]


def test_one_that_is_abandoned_after_the_run_has_long_been_closed(log: list[str]) -> None:
    kept: list[Numbers] = []

    async def main() -> None:
        kept.append(numbers_into(log)())
        await take_one(kept[0])

    run(main)
    assert log == ["gen closed in a task: True"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept.clear()
        gc.collect()
    assert len(log) == 1
