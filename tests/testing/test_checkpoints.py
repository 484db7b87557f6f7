"""assert_checkpoints and assert_no_checkpoints: what counts, on fast paths, in scopes, over several steps, nested."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import kernel
from kernel.core.loop import BUDGET
from kernel.core.scopes import CancelScope
from kernel.core.traps import Park
from kernel.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
    consume_budget,
    current_kernel,
    operation,
    start_thread_soon,
)
from kernel.testing import MockClock, assert_checkpoints, assert_no_checkpoints, explore, wait_all_tasks_blocked

SLOT = CancelScope.__dict__["cancelled"]
BOTH = {"cancel point", "schedule point"}


async def found(call: Callable[[], Any]) -> set[str]:
    """What is in `call()`, as both of them see it."""
    missing = complaint(await caught_by(assert_checkpoints, call))
    there = complaint(await caught_by(assert_no_checkpoints, call))
    assert there == BOTH - missing
    return there


async def caught_by(block: Callable[[], Any], call: Callable[[], Any]) -> str:
    with pytest.raises(AssertionError) as caught:
        with block():
            await call()
        raise AssertionError("nothing")
    return str(caught.value)


def complaint(text: str) -> set[str]:
    """What there is, or what is missing, if it says `text`."""
    assert text.startswith(("nothing", "there was a ", "no checkpoint", "no cancel point", "no schedule point"))
    return BOTH if text.startswith("no checkpoint") else set(re.findall("cancel point|schedule point", text))


async def nothing() -> None:
    pass


async def look_only_at_the_budget() -> None:
    k = current_kernel()
    k.budget -= 1
    if k.budget < 0:
        await cancel_shielded_checkpoint()


async def look_at_another_scope() -> None:
    assert CancelScope().cancelled is None


async def look_inline() -> None:
    k = current_kernel()
    k.budget -= 1
    assert k.current is not None
    if k.budget < 0 or k.current.scope.cancelled is not None:
        await checkpoint()


async def in_a_scope(call: Callable[[], Any], **options: Any) -> None:
    with CancelScope(**options), CancelScope():
        await call()


async def in_a_cleanup(call: Callable[[], Any]) -> None:
    with kernel.cleanup(10):
        await call()


async def in_a_nursery(call: Callable[[], Any]) -> None:
    async with kernel.open_nursery():
        await call()


async def in_a_child(call: Callable[[], Any]) -> None:
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(call)


async def behind(first: Callable[[], Any], call: Callable[[], Any]) -> None:
    await first()
    await call()


async def lock() -> None:
    async with kernel.Lock():
        pass


async def set_event() -> None:
    event = kernel.Event()
    event.set()
    await event.wait()


async def channel() -> None:
    sender, _ = kernel.open_memory_channel[int](1)
    await sender.send(1)


def generator_style() -> Any:
    yield from consume_budget()


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (nothing, set()),
        (kernel.current_effective_deadline, None),
        # the traps
        (checkpoint, BOTH),
        (consume_budget, BOTH),
        (partial(kernel.sleep, 0), BOTH),
        (partial(kernel.sleep, 1), BOTH),
        (checkpoint_if_cancelled, {"cancel point"}),
        (cancel_shielded_checkpoint, {"schedule point"}),
        # fast paths
        (look_inline, BOTH),
        (look_only_at_the_budget, {"schedule point"}),
        (look_at_another_scope, set()),
        (lock, BOTH),
        (set_event, BOTH),
        (channel, BOTH),
        (operation(generator_style), BOTH),
        # scopes inside the block
        (partial(in_a_scope, nothing), set()),
        (partial(in_a_scope, checkpoint), BOTH),
        (partial(in_a_scope, look_inline), BOTH),
        (partial(in_a_scope, look_only_at_the_budget), {"schedule point"}),
        (partial(in_a_scope, look_inline, deadline=10**9), BOTH),
        (partial(in_a_scope, checkpoint, shield=True), {"schedule point"}),
        (partial(in_a_scope, look_inline, shield=True), {"schedule point"}),
        (partial(in_a_scope, partial(kernel.sleep, 1), shield=True), {"schedule point"}),
        (partial(in_a_cleanup, checkpoint), {"schedule point"}),
        (partial(behind, checkpoint_if_cancelled, partial(in_a_scope, checkpoint, shield=True)), BOTH),
        # nurseries: leaving one is no cancel point, and what children do is theirs
        (partial(in_a_nursery, nothing), {"schedule point"}),
        (partial(in_a_nursery, look_inline), BOTH),
        (partial(in_a_child, checkpoint), {"schedule point"}),
        # several steps
        (partial(behind, cancel_shielded_checkpoint, look_inline), BOTH),
        (partial(behind, cancel_shielded_checkpoint, nothing), {"schedule point"}),
        (partial(behind, cancel_shielded_checkpoint, checkpoint_if_cancelled), BOTH),
        (partial(behind, partial(kernel.sleep, 1), nothing), BOTH),
    ],
)
def test_what_is_found(call: Any, expected: set[str] | None) -> None:
    async def main() -> None:
        if expected is None:
            with assert_no_checkpoints():
                call()
        else:
            assert await found(call) == expected
        assert current_kernel().budget <= BUDGET

    kernel.run(main, clock=MockClock(autojump_threshold=0))
    assert CancelScope.__dict__["cancelled"] is SLOT


def test_it_is_found_under_every_schedule() -> None:
    """Whether the operation yields or not, which is what a schedule decides."""

    async def program() -> None:
        other = kernel.Lock()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(checkpoint)
            assert await found(look_inline) == BOTH
            assert await found(look_only_at_the_budget) == {"schedule point"}
            assert await found(nothing) == set()
            assert await found(lambda: in_a_scope(look_inline)) == BOTH
            with assert_checkpoints():
                await other.acquire()

    exploration = explore(program)
    assert exploration.complete
    assert exploration.schedules > 50


def test_a_block_that_raises_passes_and_its_error_goes_on() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="mine"), assert_checkpoints():
            raise ValueError("mine")
        with pytest.raises(ValueError, match="mine"), assert_no_checkpoints():
            raise ValueError("mine")
        with (
            pytest.raises(AssertionError, match="there was a cancel point and a schedule point") as caught,
            assert_no_checkpoints(),
        ):
            await checkpoint()
            raise ValueError("mine")
        assert isinstance(caught.value.__context__, ValueError)

    kernel.run(main)
    assert CancelScope.__dict__["cancelled"] is SLOT


def test_a_cancelled_block_passes_as_it_raises() -> None:
    async def main() -> bool:
        with CancelScope() as scope:
            scope.cancel()
            with assert_checkpoints():
                await consume_budget()
        return scope.cancelled_caught

    assert kernel.run(main)


def test_blocks_may_be_nested_and_each_judges_for_itself() -> None:
    async def main() -> None:
        with assert_checkpoints():
            with assert_no_checkpoints():
                pass
            with assert_checkpoints():
                await look_inline()
            with assert_no_checkpoints():
                pass
        with pytest.raises(AssertionError, match="no checkpoint"), assert_checkpoints():
            with assert_no_checkpoints():
                pass
        with assert_checkpoints(), pytest.raises(AssertionError), assert_no_checkpoints():
            await look_inline()
        with assert_checkpoints():
            with assert_checkpoints():
                await checkpoint()
            with pytest.raises(AssertionError, match="no checkpoint"), assert_checkpoints():
                pass

    kernel.run(main)


def test_what_other_tasks_do_meanwhile_does_not_count() -> None:
    async def busy() -> None:
        while True:
            await look_inline()
            await checkpoint()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(busy)
            with pytest.raises(AssertionError, match="no cancel point"), assert_checkpoints():
                await cancel_shielded_checkpoint()
                await cancel_shielded_checkpoint()
            nursery.cancel_scope.cancel()

    kernel.run(main)


def test_a_shield_around_the_block_does_not_matter() -> None:
    """A cancel point is one for the scope in which the block is."""

    async def main() -> None:
        with CancelScope(shield=True), assert_checkpoints():
            await in_a_scope(look_inline)

    kernel.run(main)


def test_two_tasks_may_have_blocks_open_at_once(virtual: Any) -> None:
    async def good(seconds: float) -> None:
        with assert_checkpoints():
            await kernel.sleep(seconds)

    async def bad(seconds: float) -> None:
        with pytest.raises(AssertionError, match="no cancel point"), assert_checkpoints():
            await in_a_scope(partial(kernel.sleep, seconds), shield=True)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(good, number)
                nursery.start_soon(bad, number)
            await wait_all_tasks_blocked()
            assert CancelScope.__dict__["cancelled"] is not SLOT

    virtual(main)
    assert CancelScope.__dict__["cancelled"] is SLOT


def test_the_budget_is_charged_as_ever() -> None:
    """A block does not lend anybody operations, nor take them, and a loop of it yields when it should."""

    async def main() -> None:
        await checkpoint()
        with assert_checkpoints():
            await look_inline()
            with assert_checkpoints():
                await look_inline()
        assert current_kernel().budget == BUDGET - 2
        with assert_checkpoints():
            await checkpoint()
            await look_inline()
        assert current_kernel().budget == BUDGET - 1
        turns = 0

        async def other() -> None:
            nonlocal turns
            turns += 1

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(BUDGET):
                with assert_checkpoints():
                    await look_inline()
        assert turns == 1

    kernel.run(main)


def test_a_wait_that_cannot_be_taken_back_is_believed() -> None:
    """The limit of what can be seen, stated in the module's docstring: to know it, one would have to cancel."""

    class Stubborn(Park):
        __slots__ = ()

        def abort(self, kernel: Any, task: Any) -> bool:
            return False

    async def main() -> None:
        task = kernel.lowlevel.current_task()
        async with kernel.open_nursery() as nursery:

            async def wake() -> None:
                current_kernel().wake(task)

            nursery.start_soon(wake)
            with assert_checkpoints():
                await Stubborn("a stone")

    kernel.run(main)


def test_a_block_needs_a_task() -> None:
    for block in (assert_checkpoints, assert_no_checkpoints):
        with pytest.raises(RuntimeError, match="outside the kernel"), block():
            pass


def test_cancelling_works_while_a_block_is_open() -> None:
    async def main() -> None:
        with CancelScope() as scope, pytest.raises(kernel.Cancelled, match="enough"):
            with assert_no_checkpoints():
                scope.cancel("enough")
            with assert_checkpoints():
                await look_inline()
        with CancelScope() as scope:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(kernel.sleep_forever)
                await wait_all_tasks_blocked()
                with assert_no_checkpoints():
                    scope.cancel()
        assert scope.cancelled_caught

    kernel.run(main)


def test_kernels_in_other_threads_go_on_undisturbed() -> None:
    """They read the same class of scopes."""
    done = threading.Event()
    results: list[Any] = []

    def other_run() -> None:
        async def other() -> str:
            with CancelScope() as scope:
                scope.cancel()
                await checkpoint()
            with assert_checkpoints():
                await look_inline()
            return "well"

        results.append(kernel.run(other))

    def deliver(outcome: Any) -> None:
        outcome.unwrap()
        done.set()

    async def main() -> None:
        with pytest.raises(AssertionError, match="no checkpoint"), assert_checkpoints():
            start_thread_soon(other_run, deliver)
            assert done.wait(60)

    kernel.run(main)
    assert results == ["well"]
    assert CancelScope.__dict__["cancelled"] is SLOT
