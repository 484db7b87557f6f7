"""`cleanup(seconds)` and `cancel(grace=...)`: cancellation in two phases."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from math import inf, nan
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernel
from kernel import Cancelled, CancelScope, cleanup
from kernel.lowlevel import checkpoint
from kernel.testing import MockClock, wait_all_tasks_blocked

Virtual = Callable[..., Any]
Log = list[tuple[str, float]]


async def work(log: Log, seconds: float, needed: float, *, shield: bool = False) -> None:
    """Work until cancelled, then clean up for as long as is needed, in `cleanup(seconds)` or behind a hard shield."""
    try:
        await kernel.sleep_forever()
    finally:
        log.append(("cleanup", kernel.current_time()))
        with CancelScope(shield=True) if shield else cleanup(seconds) as scope:
            await kernel.sleep(needed)
        log.append(("too slow" if scope.cancelled_caught else "clean", kernel.current_time()))


# ---- cleanup -------------------------------------------------------------------------------------------


def test_cleanup_keeps_cancellation_out_until_it_is_done(virtual: Virtual) -> None:
    log: Log = []

    async def main() -> None:
        with kernel.move_on_after(1) as scope:
            await work(log, 5, 3)
        assert scope.cancelled_caught

    virtual(main)
    assert log == [("cleanup", 1), ("clean", 4)]


def test_cleanup_that_takes_too_long_is_cancelled_and_left_quietly(virtual: Virtual) -> None:
    log: Log = []

    async def main() -> None:
        with kernel.move_on_after(1) as scope:
            await work(log, 5, 30)
        assert scope.cancelled_caught

    virtual(main)
    assert log == [("cleanup", 1), ("too slow", 6)]


def test_a_cancelled_never_replaces_a_live_exception_on_its_way_through_a_cleanup(virtual: Virtual) -> None:
    async def main() -> None:
        with kernel.move_on_after(1):
            try:
                raise ValueError("live")
            finally:
                with cleanup(5):
                    await kernel.sleep(30)

    with pytest.raises(ValueError, match="live"):
        virtual(main)


def test_an_error_of_the_cleanup_comes_out(virtual: Virtual) -> None:
    async def main() -> None:
        with kernel.move_on_after(1):
            try:
                await kernel.sleep_forever()
            finally:
                with cleanup(5):
                    raise ValueError("cleanup")

    with pytest.raises(ValueError, match="cleanup") as caught:
        virtual(main)
    assert isinstance(caught.value.__context__, Cancelled)


def test_after_a_cleanup_the_cancellation_is_seen_again(virtual: Virtual) -> None:
    log: Log = []

    async def main() -> None:
        with kernel.move_on_after(1):
            with cleanup(5):
                await kernel.sleep(3)
            log.append(("out", kernel.current_time()))
            await checkpoint()
            raise AssertionError("unreachable")

    virtual(main)
    assert log == [("out", 3)]


def test_children_started_in_a_cleanup_are_covered_by_it(virtual: Virtual) -> None:
    async def main() -> float:
        with kernel.move_on_after(1):
            async with kernel.open_nursery() as nursery:
                with cleanup(5):
                    async with kernel.open_nursery() as inner:
                        inner.start_soon(kernel.sleep, 3)
                        inner.start_soon(kernel.sleep, 100)
                nursery.cancel()
        return kernel.current_time()

    assert virtual(main) == 5


def test_generators_clean_up_too(virtual: Virtual) -> None:
    def main() -> Generator[Any, Any, float]:
        with kernel.move_on_after(1):
            try:
                yield from kernel.sleep_forever()
            finally:
                with cleanup(5):
                    yield from kernel.sleep(2)
        return kernel.current_time()

    assert virtual(main) == 3


def test_cleanup_within_cleanup_ends_with_the_outer_one_or_before(virtual: Virtual) -> None:
    log: Log = []

    async def main() -> None:
        with cleanup(5):
            with cleanup(2):
                await kernel.sleep(100)
            log.append(("inner", kernel.current_time()))
            with cleanup(100):
                await kernel.sleep(100)
            log.append(("inner", kernel.current_time()))
            await kernel.sleep(100)
        log.append(("outer", kernel.current_time()))

    virtual(main)
    assert log == [("inner", 2), ("inner", 5), ("outer", 5)]


@pytest.mark.parametrize("seconds", [-1, nan])
def test_cleanup_refuses_times_that_make_no_sense(seconds: float) -> None:
    with pytest.raises(ValueError, match="from 0 up"):
        cleanup(seconds)


def test_cleanup_is_no_checkpoint_and_serves_one_block() -> None:
    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel()
            with cleanup(5) as block:
                pass
            with pytest.raises(RuntimeError, match="second time"), block:
                pass
            assert not scope.cancelled_caught

    kernel.run(main)


# ---- cancel(grace=...) ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grace", "seconds", "needed", "end"),
    [
        (2, 5, 1, 1),  # done in time
        (2, 5, 30, 2),  # the grace is over first
        (5, 2, 30, 2),  # its own time is over first
        (2, inf, 30, 2),
        (0, 5, 30, 0),
        (inf, 5, 30, 5),
    ],
)
@pytest.mark.parametrize("entered", ["before", "after"])
def test_the_earlier_of_grace_and_own_time_ends_a_cleanup(
    entered: str, grace: float, seconds: float, needed: float, end: float, virtual: Virtual
) -> None:
    log: Log = []

    async def early() -> None:
        with cleanup(seconds):
            await kernel.sleep(needed)
        log.append(("out", kernel.current_time()))

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(*((early,) if entered == "before" else (work, log, seconds, needed)))
            await wait_all_tasks_blocked()
            nursery.cancel(grace=grace)

    virtual(main)
    assert log[-1][1] == end


def test_phase_one_cancels_work_at_once_and_phase_two_only_cleanups(virtual: Virtual) -> None:
    log: Log = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(work, log, 10, 100)
            nursery.start_soon(lambda: work(log, 0, 7, shield=True))
            await wait_all_tasks_blocked()
            nursery.cancel("closing", grace=3)

    virtual(main)
    assert log == [("cleanup", 0), ("cleanup", 0), ("too slow", 3), ("clean", 7)]


def test_a_cleanup_entered_later_has_what_is_left_of_the_grace(virtual: Virtual) -> None:
    log: Log = []

    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel(grace=5)
            for _ in range(3):
                with cleanup(2):
                    await kernel.sleep(100)
                log.append(("out", kernel.current_time()))
            with cleanup(2) as block:
                assert block.cancel_called

    virtual(main)
    assert log == [("out", 2), ("out", 4), ("out", 5)]


def test_a_grace_reaches_cleanups_in_grandchildren_and_within_cleanups(virtual: Virtual) -> None:
    log: Log = []

    async def family(depth: int) -> None:
        async with kernel.open_nursery() as nursery:
            if depth:
                nursery.start_soon(family, depth - 1)
            nursery.start_soon(work, log, 50, 100)
            with cleanup(60):
                async with kernel.open_nursery() as inner:
                    inner.start_soon(work, log, 50, 100)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(family, 2)
            await wait_all_tasks_blocked()
            nursery.cancel(grace=4)

    virtual(main)
    assert [entry for entry in log if entry[0] == "too slow"] == [("too slow", 4)] * 6
    assert max(time for _, time in log) == 4


def test_a_hard_shield_hides_the_cleanups_inside_it(virtual: Virtual) -> None:
    log: Log = []

    async def main() -> None:
        with CancelScope() as scope:
            async with kernel.open_nursery() as nursery:
                nursery.cancel_scope.shield = True
                nursery.start_soon(inner)
                await wait_all_tasks_blocked()
                scope.cancel(grace=1)

    async def inner() -> None:
        with cleanup(5):
            await kernel.sleep(100)
        log.append(("entered before", kernel.current_time()))
        with cleanup(5):
            await kernel.sleep(100)
        log.append(("entered after", kernel.current_time()))

    virtual(main)
    assert log == [("entered before", 5), ("entered after", 10)]


def test_the_shield_of_the_cancelled_scope_itself_hides_nothing(virtual: Virtual) -> None:
    async def main() -> float:
        with CancelScope(shield=True) as scope, cleanup(50):
            scope.cancel(grace=2)
            await kernel.sleep(100)
        return kernel.current_time()

    assert virtual(main) == 2


def test_a_second_cancel_can_shorten_the_grace_and_not_lengthen_it(virtual: Virtual) -> None:
    log: Log = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(work, log, 50, 100)
            await wait_all_tasks_blocked()
            nursery.cancel("first")
            nursery.cancel("second", grace=10)
            nursery.cancel(grace=20)
            with cleanup(inf):
                await kernel.sleep(4)
                nursery.cancel(grace=2)

    virtual(main)
    assert log[-1] == ("too slow", 6)


def test_a_longer_grace_does_not_count_for_cleanups_entered_later_either(virtual: Virtual) -> None:
    async def main() -> float:
        with CancelScope() as scope:
            scope.cancel(grace=2)
            scope.cancel(grace=20)
            with cleanup(inf):
                await kernel.sleep(100)
        return kernel.current_time()

    assert virtual(main) == 2


def test_the_reason_stays_that_of_the_first_cancel(virtual: Virtual) -> None:
    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel("first")
            scope.cancel("second", grace=1)
            with pytest.raises(Cancelled, match="'first'"):
                await checkpoint()

    virtual(main)


def test_a_scope_cancelled_by_its_deadline_can_be_given_a_grace_later(virtual: Virtual) -> None:
    log: Log = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.cancel_scope.deadline = 1
            nursery.start_soon(work, log, 50, 100)
            with cleanup(inf):
                await kernel.sleep(3)
                nursery.cancel(grace=2)

    virtual(main)
    assert log == [("cleanup", 1), ("too slow", 5)]


def test_the_grace_of_a_scope_cancelled_before_it_is_entered_counts_from_the_cancel(virtual: Virtual) -> None:
    async def main() -> float:
        scope = CancelScope()
        scope.cancel(grace=5)
        await kernel.sleep(2)
        with scope, cleanup(50):
            await kernel.sleep(100)
        return kernel.current_time()

    assert virtual(main) == 5


def test_requests_under_way_get_the_grace_and_idle_waits_end_at_once(virtual: Virtual) -> None:
    log: Log = []

    async def connection(idle: float, busy: float) -> None:
        try:
            await kernel.sleep(idle)
            with cleanup(inf):
                await kernel.sleep(busy)
                log.append((f"served {busy}", kernel.current_time()))
            await checkpoint()
        finally:
            log.append(("closed", kernel.current_time()))

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for idle, busy in ((100, 1), (1, 5), (1, 50)):
                nursery.start_soon(connection, idle, busy)
            await kernel.sleep(2)
            nursery.cancel(grace=10)

    virtual(main)
    assert log == [("closed", 2), ("served 5", 6), ("closed", 6), ("closed", 12)]


@pytest.mark.parametrize("grace", [-1, nan])
def test_a_grace_that_makes_no_sense_is_refused_and_cancels_nothing(grace: float) -> None:
    async def main() -> None:
        with CancelScope() as scope:
            with pytest.raises(ValueError, match="grace must be a number of seconds from 0 up"):
                scope.cancel(grace=grace)
            assert not scope.cancel_called

    kernel.run(main)


def test_a_grace_is_refused_outside_the_kernel_and_in_other_threads() -> None:
    scope = CancelScope()
    with pytest.raises(RuntimeError, match="outside the kernel"):
        scope.cancel(grace=1)
    assert not scope.cancel_called
    refused: list[str] = []

    def elsewhere(scope: CancelScope) -> None:
        async def main() -> None:
            try:
                scope.cancel(grace=1)
            except RuntimeError as error:
                refused.append(str(error))

        kernel.run(main)

    async def main() -> None:
        with CancelScope() as scope:
            for _ in range(2):
                thread = threading.Thread(target=elsewhere, args=(scope,))
                thread.start()
                thread.join()
                scope.cancel()

    kernel.run(main)
    assert len(refused) == 2
    assert "outside its kernel's thread" in refused[0]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["soft", "hard", "plain"]), st.integers(1, 40)), max_size=6),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=3),
    st.booleans(),
)
def test_any_nest_of_shields_ends_when_the_rules_say(
    nest: list[tuple[str, int]], cancels: list[tuple[int, int]], children: bool
) -> None:
    """All blocks are entered at 0, outermost first. The innermost sleeps; nobody else waits for anything."""

    async def enter(blocks: list[tuple[str, int]]) -> None:
        if not blocks:
            await kernel.sleep(1000)
            return
        (kind, seconds), *rest = blocks
        scope = {
            "soft": lambda: cleanup(seconds),
            "hard": lambda: kernel.move_on_after(seconds, shield=True),
            "plain": CancelScope,
        }[kind]()
        with scope:
            if children:
                async with kernel.open_nursery() as nursery:
                    nursery.start_soon(enter, rest)
            else:
                await enter(rest)

    async def main() -> float:
        async with kernel.open_nursery() as outer:
            with CancelScope() as scope:
                for at, grace in cancels:
                    outer.start_soon(cancel, scope, at, grace)
                await enter(nest)
            end = kernel.current_time()
            outer.cancel()
        return end

    async def cancel(scope: CancelScope, at: float, grace: float) -> None:
        await kernel.sleep_until(at)
        scope.cancel(grace=grace)

    # How long the innermost is let sleep: from the inside outwards, each shield decides what reaches it.
    first_cancel = min(at for at, _ in cancels)
    grace_end = min(at + grace for at, grace in cancels)
    end: float = 1000
    shield = "none"  # the hardest one met so far
    limits: list[float] = []
    for kind, seconds in reversed(nest):
        if kind == "hard":
            if shield == "none":
                limits.append(seconds)
            shield = "hard"
        elif kind == "soft" and shield != "hard":
            limits.append(seconds)
            shield = "soft"
    outside = {"none": first_cancel, "soft": max(first_cancel, grace_end), "hard": inf}[shield]
    end = min([end, outside, *limits])
    # A hard shield with a deadline does not end a soft one inside it; but the soft one has its own time.
    assert kernel.run(main, clock=MockClock(autojump_threshold=0)) == end
