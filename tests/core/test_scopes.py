"""Cancel scopes: who is cancelled, when, and by whom it is caught; and what misuse does."""

from __future__ import annotations

import gc
import re
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import inf, nan
from types import FrameType
from typing import Any

import pytest

import kernel
from kernel import (
    Cancelled,
    CancelScope,
    current_effective_deadline,
    current_time,
    fail_after,
    move_on_after,
    move_on_at,
    open_nursery,
    sleep,
    sleep_forever,
    sleep_until,
)
from kernel.lowlevel import (
    Kernel,
    ParkingLot,
    Trap,
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
    current_kernel,
    current_task,
)
from kernel.testing import MockClock, wait_all_tasks_blocked

Run = Callable[..., Any]


async def is_cancelled() -> bool:
    """Whether a cancel point raises here."""
    try:
        await checkpoint()
    except Cancelled:
        return True
    return False


async def kernel_lives_on() -> None:
    """After a misuse: scopes, deadlines and nurseries still do what they should."""
    with move_on_after(1) as scope:
        async with open_nursery() as nursery:
            nursery.start_soon(sleep_forever)
    assert scope.cancelled_caught
    assert not await is_cancelled()
    assert len(current_kernel().timers) == 0


# ---- making one ---------------------------------------------------------------------------------


def test_a_new_scope_asks_for_nothing() -> None:
    scope = CancelScope()
    assert scope.deadline == inf
    assert scope.relative_deadline == inf
    assert scope.is_relative is False
    assert scope.shield is False
    assert scope.cancel_called is False
    assert scope.cancelled_caught is False


def test_arguments_are_kept() -> None:
    assert CancelScope(deadline=7).deadline == 7
    assert CancelScope(relative_deadline=7).relative_deadline == 7
    assert CancelScope(shield=True).shield is True


@pytest.mark.parametrize("which", ["deadline", "relative_deadline"])
def test_a_nan_deadline_is_refused(which: str) -> None:
    """trio#2493"""
    with pytest.raises(ValueError, match=rf"(?i)^{which} must .*nan"):
        CancelScope(**{which: nan})


@pytest.mark.parametrize("which", ["deadline", "relative_deadline"])
def test_setting_a_nan_deadline_is_refused_and_changes_nothing(which: str) -> None:
    """trio#2493"""
    scope = CancelScope(**{which: 5.0})
    with pytest.raises(ValueError, match=rf"(?i)^{which} must .*nan"):
        setattr(scope, which, nan)
    assert getattr(scope, which) == 5


def test_a_negative_relative_deadline_is_refused() -> None:
    with pytest.raises(ValueError, match=r"relative_deadline must .*-0.5"):
        CancelScope(relative_deadline=-0.5)


def test_setting_a_negative_relative_deadline_is_refused_and_changes_nothing(virtual: Run) -> None:
    async def main() -> None:
        scope = CancelScope(relative_deadline=5)
        with pytest.raises(ValueError, match=r"relative_deadline must .*-1"):
            scope.relative_deadline = -1
        assert scope.relative_deadline == 5
        with scope:
            with pytest.raises(ValueError, match=r"relative_deadline must .*-1"):
                scope.relative_deadline = -1
            assert scope.deadline == 5

    virtual(main)


def test_both_deadlines_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match=r"either deadline= .* or relative_deadline= .*not both"):
        CancelScope(deadline=1, relative_deadline=1)


@pytest.mark.parametrize("given", [None, "soon"])
@pytest.mark.parametrize("which", ["deadline", "relative_deadline"])
def test_a_deadline_that_is_no_number_is_refused_where_it_is_given(which: str, given: Any) -> None:
    """As `None` for "no timeout", which other libraries take: not accepted first and stumbled over on entering."""
    with pytest.raises(TypeError):
        CancelScope(**{which: given})


@pytest.mark.parametrize("shield", [0, 1, None, "yes"])
def test_a_shield_that_is_no_bool_is_refused(shield: Any) -> None:
    with pytest.raises(TypeError, match=f"shield must be a bool, not {shield!r}"):
        CancelScope(shield=shield)
    scope = CancelScope()
    with pytest.raises(TypeError, match=f"shield must be a bool, not {shield!r}"):
        scope.shield = shield
    assert scope.shield is False


def test_a_scope_can_be_referred_to_weakly_and_takes_no_other_attributes() -> None:
    import weakref

    scope = CancelScope()
    assert weakref.ref(scope)() is scope
    with pytest.raises(AttributeError):
        scope.dead_line = 5  # type: ignore[attr-defined]


# ---- absolute and relative before entering ----------------------------------------------------------


def test_an_unentered_scope_has_either_an_absolute_or_a_relative_deadline() -> None:
    scope = CancelScope(relative_deadline=5)
    assert scope.is_relative is True
    with pytest.raises(RuntimeError, match="relative deadline and was not entered"):
        scope.deadline
    with pytest.raises(RuntimeError, match="relative deadline and was not entered"):
        scope.deadline = 3
    assert scope.relative_deadline == 5

    scope = CancelScope(deadline=5)
    assert scope.is_relative is False
    with pytest.raises(RuntimeError, match="absolute deadline and was not entered"):
        scope.relative_deadline
    with pytest.raises(RuntimeError, match="absolute deadline and was not entered"):
        scope.relative_deadline = 3
    assert scope.deadline == 5


def test_an_infinite_deadline_of_one_kind_makes_room_for_the_other() -> None:
    scope = CancelScope(relative_deadline=5)
    scope.relative_deadline = inf
    scope.deadline = 3
    assert scope.is_relative is False
    scope.deadline = inf
    scope.relative_deadline = 4
    assert scope.is_relative is True
    assert scope.relative_deadline == 4


def test_deadlines_that_are_set_become_floats(virtual: Run) -> None:
    async def main() -> None:
        scope = CancelScope()
        scope.deadline = 3
        assert type(scope.deadline) is float
        scope.deadline = inf
        scope.relative_deadline = 3
        assert type(scope.relative_deadline) is float

    virtual(main)


def test_a_relative_deadline_counts_from_entering(virtual: Run) -> None:
    async def main() -> None:
        scope = CancelScope(relative_deadline=5)
        await sleep(10)
        with scope:
            assert scope.deadline == 15
            assert scope.relative_deadline == 5
            assert scope.is_relative is None
            await sleep(2)
            assert scope.relative_deadline == 3
        await sleep(4)
        assert scope.relative_deadline == -1
        assert scope.is_relative is None

    virtual(main)


def test_a_relative_deadline_set_before_entering_is_the_one_that_counts(virtual: Run) -> None:
    async def main() -> None:
        scope = CancelScope(relative_deadline=5)
        scope.relative_deadline = 2
        await sleep(1)
        with scope:
            await sleep_forever()
        assert current_time() == 3

    virtual(main)


# ---- entering and leaving -----------------------------------------------------------------------


def test_entering_returns_the_scope_and_neither_end_is_a_checkpoint(virtual: Run) -> None:
    log = []

    async def other() -> None:
        log.append("other")

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(other)
            with CancelScope() as outer:
                outer.cancel()
                scope = CancelScope()
                with scope as entered:
                    assert entered is scope
                with move_on_after(0), fail_after(0):
                    pass
                log.append("main")
            assert not outer.cancelled_caught

    virtual(main)
    assert log == ["main", "other"]


def test_a_scope_without_a_deadline_never_looks_at_the_clock() -> None:
    looks = []

    class Counting(MockClock):
        def current_time(self) -> float:
            looks.append("look")
            return super().current_time()

    async def main() -> None:
        await checkpoint()
        looks.clear()
        with CancelScope() as scope, CancelScope(shield=True):
            scope.cancel()
        assert looks == []
        with move_on_after(5):
            pass
        assert looks == ["look"]

    kernel.run(main, clock=Counting())


def test_an_uncancelled_scope_swallows_nothing(virtual: Run) -> None:
    async def main() -> None:
        error = ZeroDivisionError()
        with pytest.raises(ZeroDivisionError) as caught, CancelScope() as scope:
            raise error
        assert caught.value is error
        assert not scope.cancelled_caught
        assert not scope.cancel_called

    virtual(main)


def test_a_cancelled_scope_lets_other_errors_pass(virtual: Run) -> None:
    async def main() -> None:
        with pytest.raises(ZeroDivisionError), CancelScope() as scope:
            scope.cancel()
            raise ZeroDivisionError
        assert scope.cancel_called
        assert not scope.cancelled_caught

    virtual(main)


def test_a_cancelled_block_that_ends_before_a_cancel_point_caught_nothing(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel()
        assert scope.cancel_called
        assert not scope.cancelled_caught
        assert not await is_cancelled()

    virtual(main)


def test_cancelled_caught_cannot_be_foreseen(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel()
            try:
                await checkpoint()
            finally:
                assert not scope.cancelled_caught
        assert scope.cancelled_caught

    virtual(main)


# ---- level-triggered ----------------------------------------------------------------------------


def test_every_cancel_point_in_a_cancelled_scope_raises(virtual: Run) -> None:
    """A task that catches the first cancel and blocks again is cancelled again (curio#329)."""
    log = []

    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel()
            for wait in (checkpoint, sleep_forever, checkpoint_if_cancelled, ParkingLot().park, wait_all_tasks_blocked):
                try:
                    await wait()
                except Cancelled:
                    log.append(wait.__name__)
            await sleep(1)
        assert scope.cancelled_caught
        assert current_time() == 0

    virtual(main)
    assert log == ["checkpoint", "sleep_forever", "checkpoint_if_cancelled", "park", "wait_all_tasks_blocked"]


def test_a_sleeping_task_that_swallows_its_cancel_is_cancelled_when_it_sleeps_again(virtual: Run) -> None:
    """curio#329"""
    log = []

    async def stubborn() -> None:
        for _ in range(3):
            try:
                await sleep_forever()
            except Cancelled:
                log.append("cancelled")
        await sleep_forever()

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(stubborn)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    virtual(main)
    assert log == ["cancelled"] * 3


def test_a_task_cancelled_before_its_first_step_runs_to_its_first_checkpoint(virtual: Run) -> None:
    log = []

    async def child() -> None:
        log.append("first step")
        try:
            await checkpoint()
        except Cancelled:
            log.append("cancelled")
            raise
        log.append("not reached")

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(child)
            nursery.cancel_scope.cancel()
        async with open_nursery() as nursery:
            nursery.cancel_scope.cancel()
            nursery.start_soon(child)

    virtual(main)
    assert log == ["first step", "cancelled"] * 2


def test_cancel_shielded_checkpoint_does_not_raise(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel()
            await cancel_shielded_checkpoint()
        assert not scope.cancelled_caught

    virtual(main)


# ---- cancel() -----------------------------------------------------------------------------------


def test_cancel_wakes_what_sleeps_inside_and_is_no_checkpoint_itself(virtual: Run) -> None:
    log = []

    async def child(scope: CancelScope) -> None:
        with scope:
            await sleep_forever()
        log.append("child left")

    async def main() -> None:
        scope = CancelScope()
        async with open_nursery() as nursery:
            nursery.start_soon(child, scope)
            await wait_all_tasks_blocked()
            scope.cancel()
            log.append("cancel returned")
        assert scope.cancelled_caught

    virtual(main)
    assert log == ["cancel returned", "child left"]


def test_cancel_reaches_the_canceller_itself_at_its_next_cancel_point(virtual: Run) -> None:
    log = []

    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel()
            log.append("still here")
            await checkpoint()
            log.append("not reached")

    virtual(main)
    assert log == ["still here"]


def test_cancel_before_entering_cancels_the_block(virtual: Run) -> None:
    log = []

    async def main() -> None:
        scope = CancelScope(relative_deadline=5)
        scope.cancel()
        assert scope.cancel_called
        with scope:
            log.append("entered")
            await checkpoint()
            log.append("not reached")
        assert scope.cancelled_caught
        assert len(current_kernel().timers) == 0

    virtual(main)
    assert log == ["entered"]


def test_cancel_sees_a_task_that_queues_at_a_checkpoint(virtual: Run) -> None:
    log = []

    async def child(scope: CancelScope) -> None:
        with scope:
            await checkpoint()
            log.append("not reached")
        log.append("left")

    async def main() -> None:
        scope = CancelScope()
        async with open_nursery() as nursery:
            nursery.start_soon(child, scope)
            await checkpoint()
            scope.cancel()

    virtual(main)
    assert log == ["left"]


def test_a_task_that_was_woken_before_the_cancel_keeps_what_it_got(virtual: Run) -> None:
    """Waking commits: the cancel is seen at the next cancel point."""
    log = []

    async def child(scope: CancelScope, lot: ParkingLot) -> None:
        with scope:
            await lot.park()
            log.append("woken")
            await checkpoint()
            log.append("not reached")

    async def main() -> None:
        scope, lot = CancelScope(), ParkingLot()
        async with open_nursery() as nursery:
            nursery.start_soon(child, scope, lot)
            await wait_all_tasks_blocked()
            lot.unpark()
            scope.cancel()
        assert scope.cancelled_caught

    virtual(main)
    assert log == ["woken"]


def test_a_trap_that_cannot_be_taken_back_sleeps_on_and_the_cancel_comes_after(virtual: Run) -> None:
    log = []

    class Stubborn(Trap):
        def arm(self, kernel: Kernel, task: Any) -> None:
            log.append("arm")

        def abort(self, kernel: Kernel, task: Any) -> bool:
            log.append("abort")
            return False

    async def child(scope: CancelScope) -> None:
        with scope:
            await Stubborn()
            log.append("woken")
            await checkpoint()
            log.append("not reached")

    async def main() -> None:
        scope = CancelScope()
        async with open_nursery() as nursery:
            nursery.start_soon(child, scope)
            await wait_all_tasks_blocked()
            scope.cancel()
            scope.cancel()
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            current_kernel().wake(task)
        assert scope.cancelled_caught

    virtual(main)
    assert log == ["arm", "abort", "woken"]


def test_a_second_cancel_changes_nothing(virtual: Run) -> None:
    log = []

    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel("first")
            scope.cancel("second")
            try:
                await checkpoint()
            except Cancelled as exc:
                log.append(exc.reason)
                raise

    virtual(main)
    assert log == ["first"]


@pytest.mark.parametrize("reason", [5, b"bytes", ValueError("x")])
def test_a_reason_that_is_no_string_is_refused_and_nothing_is_cancelled(virtual: Run, reason: Any) -> None:
    async def main() -> None:
        with CancelScope() as scope:
            with pytest.raises(TypeError, match=r"cancel\(reason=\.\.\.\) wants a string, not"):
                scope.cancel(reason)
            assert not scope.cancel_called
            await checkpoint()

    virtual(main)


def test_cancel_after_the_block_is_remembered_and_harms_nobody(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as scope:
            pass
        scope.cancel()
        assert scope.cancel_called
        assert not scope.cancelled_caught
        assert not await is_cancelled()

    virtual(main)
    scope = CancelScope()
    kernel.run(_enter_once, scope)
    scope.cancel()
    assert scope.cancel_called


async def _enter_once(scope: CancelScope) -> None:
    with scope:
        await checkpoint()


def test_cancel_from_another_thread_is_refused_and_nothing_is_cancelled(virtual: Run) -> None:
    errors: list[BaseException] = []

    def in_thread(scope: CancelScope) -> None:
        try:
            scope.cancel()
        except BaseException as exc:
            errors.append(exc)

    async def main() -> None:
        with CancelScope() as scope:
            thread = threading.Thread(target=in_thread, args=(scope,))
            thread.start()
            thread.join()
            assert not scope.cancel_called
            assert not await is_cancelled()
        (error,) = errors
        assert isinstance(error, RuntimeError)
        assert "outside its kernel's thread" in str(error)
        assert "the kernel" in str(error).partition(";")[2], "the cure is missing"

    virtual(main)


def test_a_scope_that_was_not_entered_can_be_cancelled_from_any_thread(virtual: Run) -> None:
    async def main() -> None:
        scope = CancelScope()
        thread = threading.Thread(target=scope.cancel)
        thread.start()
        thread.join()
        with scope:
            await sleep_forever()
        assert scope.cancelled_caught

    virtual(main)


def test_a_sibling_scope_is_not_touched(virtual: Run) -> None:
    log = []

    async def child(name: str, scope: CancelScope) -> None:
        with scope:
            await sleep(1)
            log.append(name)

    async def main() -> None:
        a, b = CancelScope(), CancelScope()
        async with open_nursery() as nursery:
            nursery.start_soon(child, "a", a)
            nursery.start_soon(child, "b", b)
            await wait_all_tasks_blocked()
            a.cancel()
        assert (a.cancelled_caught, b.cancelled_caught) == (True, False)

    virtual(main)
    assert log == ["b"]


def test_cancel_reaches_tasks_in_the_order_in_which_they_were_started(virtual: Run) -> None:
    log = []

    async def child(number: int) -> None:
        try:
            await sleep_forever()
        finally:
            log.append(number)

    async def main() -> None:
        async with open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(child, number)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    virtual(main)
    assert log == list(range(20))


# ---- nested scopes: which one catches -----------------------------------------------------------


@pytest.mark.parametrize(
    ("called", "catcher"),
    [("inner", "inner"), ("outer", "outer"), ("inner outer", "outer"), ("outer inner", "outer"), ("middle", "middle")],
)
def test_the_outermost_cancelled_scope_catches(virtual: Run, called: str, catcher: str) -> None:
    async def main() -> None:
        scopes = {}
        reasons = []
        with CancelScope() as scopes["outer"], CancelScope() as scopes["middle"], CancelScope() as scopes["inner"]:
            for name in called.split():
                scopes[name].cancel(name)
            try:
                await sleep_forever()
            except Cancelled as exc:
                reasons.append(exc.reason)
                raise
        assert reasons == [catcher]
        assert [name for name, scope in scopes.items() if scope.cancelled_caught] == [catcher]
        assert not await is_cancelled()

    virtual(main)


def test_the_reason_is_always_that_of_the_scope_that_would_catch_now(virtual: Run) -> None:
    async def reason() -> str | None:
        with pytest.raises(Cancelled) as caught:
            await checkpoint()
        return caught.value.reason

    async def main() -> None:
        with CancelScope() as outer, CancelScope() as middle, CancelScope() as inner, CancelScope():
            inner.cancel("inner")
            assert await reason() == "inner"
            outer.cancel("outer")
            assert await reason() == "outer"
            middle.cancel("middle")
            assert await reason() == "outer"
            inner.shield = True
            assert await reason() == "inner"
            middle.shield = True
            assert await reason() == "inner"
            inner.shield = False
            assert await reason() == "middle"
            middle.shield = False
            assert await reason() == "outer"

    virtual(main)


def test_inside_a_shield_the_outermost_scope_up_to_the_shield_catches(virtual: Run) -> None:
    log = []

    async def main() -> None:
        with CancelScope() as outer:
            outer.cancel("outer")
            with CancelScope(shield=True) as shield:
                shield.cancel("shield")
                with CancelScope() as inner:
                    inner.cancel("inner")
                    try:
                        await checkpoint()
                    except Cancelled as exc:
                        log.append(exc.reason)
                        raise
            assert shield.cancelled_caught
            assert not inner.cancelled_caught
            try:
                await checkpoint()
            except Cancelled as exc:
                log.append(exc.reason)
                raise
        assert outer.cancelled_caught

    virtual(main)
    assert log == ["shield", "outer"]


def test_an_inner_scope_cancelled_while_the_outer_cancel_propagates_does_not_catch_it(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as outer, CancelScope() as inner:
            outer.cancel()
            try:
                await checkpoint()
            finally:
                inner.cancel()
        assert outer.cancelled_caught
        assert not inner.cancelled_caught

    virtual(main)


def test_an_outer_cancel_that_comes_while_the_inner_one_propagates_is_not_lost(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as outer, CancelScope() as inner:
            inner.cancel()
            try:
                await checkpoint()
            finally:
                outer.cancel()
        assert outer.cancelled_caught
        assert not inner.cancelled_caught

    virtual(main)


def test_a_scope_cancelled_before_it_is_entered_inside_a_cancelled_one_leaves_the_catch_to_that(virtual: Run) -> None:
    reasons = []

    async def main() -> None:
        inner = CancelScope()
        inner.cancel("inner")
        with CancelScope() as outer:
            outer.cancel("outer")
            with inner:
                try:
                    await checkpoint()
                except Cancelled as exc:
                    reasons.append(exc.reason)
                    raise
        assert outer.cancelled_caught
        assert not inner.cancelled_caught

    virtual(main)
    assert reasons == ["outer"]


def test_a_scope_entered_inside_a_cancelled_one_is_cancelled_but_not_called(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as outer:
            outer.cancel()
            with CancelScope() as inner:
                assert not inner.cancel_called
                await checkpoint()
        assert outer.cancelled_caught
        assert not inner.cancel_called

    virtual(main)


def test_cancel_reaches_through_nurseries_and_the_scopes_of_grandchildren(virtual: Run) -> None:
    log = []

    async def grandchild(name: str, scope: CancelScope) -> None:
        with scope:
            try:
                await sleep_forever()
            finally:
                log.append(name)

    async def child() -> None:
        with CancelScope(), CancelScope():
            async with open_nursery() as nursery:
                nursery.start_soon(grandchild, "open", CancelScope())
                nursery.start_soon(grandchild, "shielded", CancelScope(shield=True, deadline=9))

    async def main() -> None:
        with CancelScope() as scope:
            async with open_nursery() as nursery:
                nursery.start_soon(child)
                await wait_all_tasks_blocked()
                scope.cancel()
                await cancel_shielded_checkpoint()
                assert log == ["open"]
        assert scope.cancelled_caught
        assert current_time() == 9

    virtual(main)
    assert log == ["open", "shielded"]


# ---- shields ------------------------------------------------------------------------------------


def test_a_shield_keeps_the_outside_out_and_not_its_own_cancel(virtual: Run) -> None:
    log = []

    async def main() -> None:
        with CancelScope() as outer:
            outer.cancel()
            with CancelScope(shield=True) as shield:
                await sleep(1)
                log.append("slept")
                shield.cancel()
                await sleep(1)
                log.append("not reached")
            assert shield.cancelled_caught
            await checkpoint()
            log.append("not reached")
        assert outer.cancelled_caught

    virtual(main)
    assert log == ["slept"]


def test_leaving_a_shield_brings_back_every_cancelled_parent(virtual: Run) -> None:
    """anyio#370"""

    async def main() -> None:
        with CancelScope() as a, CancelScope() as b:
            with CancelScope(shield=True):
                a.cancel("a")
                b.cancel("b")
                await sleep(1)
            for _ in range(2):
                with pytest.raises(Cancelled) as caught:
                    await checkpoint()
                assert caught.value.reason == "a"
            await checkpoint()
        assert a.cancelled_caught
        assert not b.cancelled_caught

    virtual(main)


def test_children_are_cancelled_although_their_host_sits_in_a_shield(virtual: Run) -> None:
    """anyio#642"""
    log = []

    async def child() -> None:
        try:
            await sleep_forever()
        finally:
            log.append(("child", current_time()))

    async def main() -> None:
        with move_on_after(1) as outer:
            async with open_nursery() as nursery:
                nursery.start_soon(child)
                with CancelScope(shield=True):
                    await sleep(5)
                    log.append(("host", current_time()))
        assert outer.cancelled_caught

    virtual(main)
    assert log == [("child", 1), ("host", 5)]


def test_a_shield_set_before_entering_counts(virtual: Run) -> None:
    async def main() -> None:
        scope = CancelScope()
        scope.shield = True
        with CancelScope() as outer:
            outer.cancel()
            with scope:
                await checkpoint()
        assert not outer.cancelled_caught

    virtual(main)


def test_a_shield_raised_by_the_running_task_holds_from_then_on(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as outer, CancelScope() as inner:
            outer.cancel()
            assert await is_cancelled()
            inner.shield = True
            assert not await is_cancelled()
            inner.shield = False
            assert await is_cancelled()

    virtual(main)


def test_lowering_a_shield_lets_a_waiting_cancellation_in_at_once(virtual: Run) -> None:
    log = []

    async def child(shield: CancelScope) -> None:
        with shield, CancelScope():
            try:
                await sleep_forever()
            finally:
                log.append("cancelled")

    async def main() -> None:
        shield = CancelScope(shield=True)
        async with open_nursery() as nursery:
            nursery.start_soon(child, shield)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            await cancel_shielded_checkpoint()
            log.append("lower")
            shield.shield = False
        assert not shield.cancelled_caught

    virtual(main)
    assert log == ["lower", "cancelled"]


def test_raising_a_shield_over_a_sleeping_task_keeps_a_later_cancel_out(virtual: Run) -> None:
    log = []

    async def child(scope: CancelScope) -> None:
        with scope:
            await sleep(3)
            log.append("slept")

    async def main() -> None:
        scope = CancelScope()
        async with open_nursery() as nursery:
            nursery.start_soon(child, scope)
            await wait_all_tasks_blocked()
            scope.shield = True
            nursery.cancel_scope.cancel()

    virtual(main)
    assert log == ["slept"]


def test_a_shield_raised_after_the_wake_does_not_take_the_cancel_back(virtual: Run) -> None:
    """The sleep is over and has ended with `Cancelled`: it belongs to the outer scope, which catches it."""
    log = []

    async def child(scope: CancelScope) -> None:
        with scope:
            try:
                await sleep_forever()
            except Cancelled:
                log.append("cancelled")
                await sleep(1)
                log.append("but shielded since")
                raise

    async def main() -> None:
        scope = CancelScope()
        with CancelScope() as outer:
            async with open_nursery() as nursery:
                nursery.start_soon(child, scope)
                await wait_all_tasks_blocked()
                outer.cancel()
                scope.shield = True
        assert outer.cancelled_caught
        assert not scope.cancelled_caught

    virtual(main)
    assert log == ["cancelled", "but shielded since"]


def test_a_shield_raised_while_a_task_queues_at_a_checkpoint_saves_it(virtual: Run) -> None:
    log = []

    async def child(scope: CancelScope) -> None:
        with scope:
            await checkpoint()
            log.append("passed")

    async def main() -> None:
        scope = CancelScope()
        async with open_nursery() as nursery:
            nursery.start_soon(child, scope)
            await checkpoint()
            nursery.cancel_scope.cancel()
            scope.shield = True

    virtual(main)
    assert log == ["passed"]


def test_an_uncancelled_scope_shielded_while_cancelled_propagates_does_not_swallow_it(virtual: Run) -> None:
    """trio#1175, trio#860"""

    async def main() -> None:
        with CancelScope() as outer:
            with CancelScope() as inner:
                outer.cancel()
                try:
                    await checkpoint()
                finally:
                    inner.shield = True
            raise AssertionError("unreachable: the inner scope has swallowed it")
        assert outer.cancelled_caught
        assert not inner.cancelled_caught

    virtual(main)


def test_a_cancelled_scope_shielded_while_cancelled_propagates_catches_it(virtual: Run) -> None:
    """From inside it is the outermost cancelled scope in sight. The outer one is still cancelled afterwards."""

    async def main() -> None:
        with CancelScope() as outer:
            with CancelScope() as inner:
                outer.cancel()
                inner.cancel()
                try:
                    await checkpoint()
                finally:
                    inner.shield = True
            assert inner.cancelled_caught
            await checkpoint()
        assert outer.cancelled_caught

    virtual(main)


def test_a_shield_lowered_while_its_own_cancelled_propagates_lets_it_pass_to_the_outer_scope(virtual: Run) -> None:
    """trio#1175"""

    async def main() -> None:
        with CancelScope() as outer:
            with CancelScope(shield=True) as inner:
                outer.cancel()
                inner.cancel()
                try:
                    await checkpoint()
                finally:
                    inner.shield = False
            raise AssertionError("unreachable: the outer cancel was visible")
        assert outer.cancelled_caught
        assert not inner.cancelled_caught

    virtual(main)


def test_a_shield_set_after_the_block_changes_nothing(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as outer:
            with CancelScope() as inner:
                pass
            inner.shield = True
            assert inner.shield is True
            outer.cancel()
            await checkpoint()
        assert outer.cancelled_caught

    virtual(main)


def test_setting_a_shield_to_what_it_is_changes_nothing(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as outer, CancelScope(shield=True) as inner:
            outer.cancel()
            inner.shield = True
            assert not await is_cancelled()

    virtual(main)


# ---- deadlines ----------------------------------------------------------------------------------


def test_a_deadline_cancels_the_scope_when_it_has_come(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope(deadline=5) as scope:
            await sleep_until(4.5)
            assert not scope.cancel_called
            await sleep_forever()
        assert current_time() == 5
        assert scope.cancel_called
        assert scope.cancelled_caught

    virtual(main)


@pytest.mark.parametrize("deadline", [0, -1, -inf])
def test_a_past_deadline_cancels_at_the_first_checkpoint(virtual: Run, deadline: float) -> None:
    """trio#320, trio#958"""
    log = []

    async def main() -> None:
        with move_on_at(deadline) as scope:
            log.append(scope.cancel_called)
            await checkpoint()
            log.append("not reached")
        assert scope.cancelled_caught

    virtual(main)
    assert log == [True]


def test_a_past_deadline_is_no_error_of_the_canceller(virtual: Run) -> None:
    """trio#958: the source is the deadline."""

    async def main() -> None:
        with move_on_at(-1):
            with pytest.raises(Cancelled) as caught:
                await checkpoint()
            assert caught.value.source == "deadline"

    virtual(main)


def test_cancel_called_looks_at_the_clock() -> None:
    clock = MockClock()

    async def main() -> None:
        early, late = CancelScope(deadline=5), CancelScope(deadline=15)
        with move_on_at(5) as scope:
            clock.jump(4)
            assert not scope.cancel_called
            assert not early.cancel_called
            clock.jump(6)
            assert scope.cancel_called
            assert early.cancel_called
            assert not late.cancel_called
            assert len(current_kernel().timers) == 0
            with pytest.raises(Cancelled) as caught:
                await checkpoint()
            assert caught.value.source == "deadline"
            await checkpoint()
        assert scope.cancelled_caught

    kernel.run(main, clock=clock)


def test_outside_a_run_cancel_called_has_no_clock_to_look_at() -> None:
    assert not CancelScope(deadline=-inf).cancel_called


def test_a_relative_deadline_does_not_run_before_entering(virtual: Run) -> None:
    async def main() -> None:
        scope = CancelScope(relative_deadline=1)
        await sleep(5)
        assert not scope.cancel_called
        with scope:
            assert not scope.cancel_called

    virtual(main)


def test_a_deadline_that_passes_after_the_block_is_none_of_its_business(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope(deadline=5) as scope:
            await sleep(1)
        await sleep(9)
        assert not scope.cancel_called

    virtual(main)


@pytest.mark.parametrize("new", [3.0, 9.0])
def test_the_deadline_of_an_unentered_scope_can_be_moved(virtual: Run, new: float) -> None:
    async def main() -> None:
        scope = CancelScope(deadline=5)
        scope.deadline = new
        with scope:
            await sleep_forever()
        assert current_time() == new

    virtual(main)


@pytest.mark.parametrize("new", [3.0, 9.0])
@pytest.mark.parametrize("old", [5.0, inf])
def test_the_deadline_of_an_active_scope_can_be_moved_either_way(virtual: Run, old: float, new: float) -> None:
    async def main() -> None:
        with CancelScope(deadline=old) as scope:
            await sleep(1)
            scope.deadline = new
            assert scope.deadline == new
            assert scope.relative_deadline == new - 1
            await sleep_forever()
        assert current_time() == new
        assert scope.cancelled_caught

    virtual(main)


def test_a_deadline_can_be_taken_away(virtual: Run) -> None:
    async def main() -> None:
        with move_on_after(5) as scope:
            scope.deadline = inf
            assert len(current_kernel().timers) == 0
            await sleep(9)
        assert not scope.cancel_called
        with move_on_after(5) as scope:
            await sleep(1)
            scope.relative_deadline = inf
            await sleep(9)
        assert not scope.cancel_called

    virtual(main)


def test_a_deadline_can_be_moved_by_another_task(virtual: Run) -> None:
    log = []

    async def child(scope: CancelScope) -> None:
        with scope:
            await sleep_forever()
        log.append(current_time())

    async def main() -> None:
        scope = CancelScope(deadline=9)
        async with open_nursery() as nursery:
            nursery.start_soon(child, scope)
            await sleep(2)
            scope.relative_deadline = 4

    virtual(main)
    assert log == [6]


@pytest.mark.parametrize("how", ["absolute", "relative"])
def test_moving_the_deadline_into_the_past_cancels_at_once(virtual: Run, how: str) -> None:
    log = []

    async def child(scope: CancelScope) -> None:
        with scope:
            await sleep_forever()
        log.append(current_time())

    async def main() -> None:
        scope = CancelScope(deadline=9)
        async with open_nursery() as nursery:
            nursery.start_soon(child, scope)
            await sleep(2)
            if how == "absolute":
                scope.deadline = 1
            else:
                scope.relative_deadline = 0
            assert scope.cancel_called
            (task,) = nursery.child_tasks
            assert task.trap is None

    virtual(main)
    assert log == [2]


def test_moving_the_deadline_of_the_own_scope_into_the_past_cancels_at_the_next_cancel_point(virtual: Run) -> None:
    log = []

    async def main() -> None:
        with CancelScope() as scope:
            scope.deadline = 0
            log.append("still here")
            await checkpoint()
            log.append("not reached")
        assert scope.cancelled_caught

    virtual(main)
    assert log == ["still here"]


def test_a_deadline_put_off_after_it_has_passed_does_not_uncancel(virtual: Run) -> None:
    async def main() -> None:
        with move_on_after(1) as scope:
            with CancelScope(shield=True):
                await sleep(2)
            scope.deadline = 100
            assert scope.deadline == 100
            assert scope.cancel_called
            assert len(current_kernel().timers) == 0
            await checkpoint()
        assert scope.cancelled_caught
        assert current_time() == 2

    virtual(main)


def test_a_deadline_set_after_the_block_harms_nobody(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as scope:
            pass
        scope.deadline = 1
        assert scope.deadline == 1
        scope.relative_deadline = 3
        assert scope.deadline == 3
        assert len(current_kernel().timers) == 0
        await sleep(9)
        assert not scope.cancel_called

    virtual(main)


def test_after_the_run_a_relative_deadline_has_no_clock_to_count_on(virtual: Run) -> None:
    scope = CancelScope(deadline=5)
    virtual(_enter_once, scope)
    assert scope.deadline == 5
    with pytest.raises(RuntimeError, match=r"relative_deadline was used outside the kernel"):
        scope.relative_deadline
    with pytest.raises(RuntimeError, match=r"relative_deadline was used outside the kernel"):
        scope.relative_deadline = 3


def test_equal_deadlines_expire_in_the_order_they_were_set(virtual: Run) -> None:
    """Scopes and tasks are never compared (curio#37)."""
    log = []

    async def child(number: int) -> None:
        with CancelScope(deadline=5):
            await sleep_forever()
        log.append(number)

    async def main() -> None:
        async with open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(child, number)

    virtual(main)
    assert log == list(range(30))


def test_of_equal_deadlines_in_one_task_the_outermost_catches(virtual: Run) -> None:
    """curio#37"""

    async def main() -> None:
        with CancelScope(deadline=5) as outer, CancelScope(deadline=5) as middle, CancelScope(deadline=5) as inner:
            await sleep_forever()
        assert [scope.cancelled_caught for scope in (outer, middle, inner)] == [True, False, False]
        assert [scope.cancel_called for scope in (outer, middle, inner)] == [True, True, True]

    virtual(main)


def test_a_scope_that_cancels_another_with_the_same_deadline_does_not_disturb_the_timers(virtual: Run) -> None:
    """One of a batch of expired deadlines takes the next one away."""
    log = []

    async def child(mine: CancelScope, other: CancelScope) -> None:
        with mine:
            try:
                await sleep_forever()
            finally:
                other.cancel("too late: it has expired in the same pass")
                log.append(current_time())

    async def main() -> None:
        a, b = CancelScope(deadline=5), CancelScope(deadline=5)
        async with open_nursery() as nursery:
            nursery.start_soon(child, a, b)
            nursery.start_soon(child, b, a)
        await kernel_lives_on()

    virtual(main)
    assert log == [5, 5]


def test_cancel_ends_the_pending_deadline(virtual: Run) -> None:
    """Cleanup is not hit by it again, and the reason stays the first one."""
    log = []

    async def main() -> None:
        with move_on_after(5) as scope:
            scope.cancel("by hand")
            assert len(current_kernel().timers) == 0
            assert scope.deadline == 5
            with CancelScope(shield=True):
                await sleep(9)
            try:
                await checkpoint()
            except Cancelled as exc:
                log.append((exc.source, exc.reason))
                raise

    virtual(main)
    assert log == [("explicit", "by hand")]


@pytest.mark.parametrize("end", ["well", "error", "cancel", "outer cancel", "expired"])
def test_a_scope_leaves_no_timer_behind(virtual: Run, end: str) -> None:
    async def main() -> None:
        timers = current_kernel().timers
        with CancelScope() as outer:
            try:
                with move_on_after(5) as scope:
                    await sleep(1)
                    if end == "error":
                        raise ZeroDivisionError
                    if end == "cancel":
                        scope.cancel()
                    if end == "outer cancel":
                        outer.cancel()
                    if end == "expired":
                        await sleep_forever()
                    await checkpoint()
            except ZeroDivisionError:
                pass
            assert len(timers) == 0
        assert len(timers) == 0

    virtual(main)


def test_an_unsorted_timeout_is_never_sorted(virtual: Run) -> None:
    """A deadline costs nothing until time is looked at: a timeout around what does not block stays off the list."""

    async def main() -> None:
        timers: Any = current_kernel().timers
        for _ in range(50):
            with move_on_after(5):
                assert len(timers) == 1
                assert len(timers._sorted) == 0
        assert len(timers) == 0

    virtual(main)


# ---- current_effective_deadline ---------------------------------------------------------------------


def test_the_effective_deadline_is_the_earliest_in_sight(virtual: Run) -> None:
    async def child() -> None:
        assert current_effective_deadline() == 3
        with move_on_at(2):
            assert current_effective_deadline() == 2

    async def main() -> None:
        assert current_effective_deadline() == inf
        with move_on_at(7):
            assert current_effective_deadline() == 7
            with move_on_at(9):
                assert current_effective_deadline() == 7
                with move_on_at(3) as scope:
                    assert current_effective_deadline() == 3
                    async with open_nursery() as nursery:
                        nursery.start_soon(child)
                    scope.deadline = 5
                    assert current_effective_deadline() == 5
            assert current_effective_deadline() == 7
        assert current_effective_deadline() == inf

    virtual(main)


def test_the_effective_deadline_does_not_look_beyond_a_shield(virtual: Run) -> None:
    async def main() -> None:
        with move_on_at(7) as outer, CancelScope(shield=True) as shield:
            assert current_effective_deadline() == inf
            shield.deadline = 9
            assert current_effective_deadline() == 9
            outer.cancel()
            assert current_effective_deadline() == 9
            shield.shield = False
            assert current_effective_deadline() == -inf

    virtual(main)


def test_the_effective_deadline_in_a_cancelled_scope_is_minus_infinity(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as outer, move_on_at(7):
            outer.cancel()
            assert current_effective_deadline() == -inf
        with move_on_at(-5):
            assert current_effective_deadline() == -inf

    virtual(main)


def test_the_effective_deadline_is_no_checkpoint_and_needs_a_task(virtual: Run) -> None:
    with pytest.raises(RuntimeError, match=r"current_effective_deadline\(\) was used outside the kernel"):
        current_effective_deadline()
    said = _outside_any_task(current_effective_deadline)
    assert re.match(r"current_effective_deadline\(\) was .* outside any .*task", said)


def _outside_any_task(function: Callable[[], object]) -> str:
    """What `function` says when the kernel calls it between two steps, as it does a driver."""
    said: list[str] = []

    class Curious(MockClock):
        def autojump(self, deadline: float) -> None:
            try:
                function()
            except RuntimeError as exc:
                said.append(str(exc))
            super().autojump(deadline)

    kernel.run(sleep, 1, clock=Curious(autojump_threshold=0))
    assert len(said) == 1
    return said[0]


# ---- exception groups ---------------------------------------------------------------------------


async def _cancelled_here() -> Cancelled:
    """A `Cancelled` as the innermost scope raises it."""
    try:
        await checkpoint()
    except Cancelled as exc:
        return exc
    raise AssertionError("unreachable: the scope was cancelled")


def test_a_group_of_nothing_but_cancelled_is_swallowed_whole(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel()
            one, two = await _cancelled_here(), await _cancelled_here()
            raise BaseExceptionGroup("outer", [one, BaseExceptionGroup("inner", [two])])
        assert scope.cancelled_caught

    virtual(main)


def test_cancelled_is_taken_out_of_a_group_and_the_rest_goes_on(virtual: Run) -> None:
    async def main() -> None:
        key, value = KeyError("k"), ValueError("v")
        with pytest.raises(ExceptionGroup) as caught, CancelScope() as scope:
            scope.cancel()
            one, two = await _cancelled_here(), await _cancelled_here()
            raise BaseExceptionGroup("outer", [key, one, BaseExceptionGroup("inner", [two, value])])
        assert scope.cancelled_caught
        assert caught.value.message == "outer"
        first, rest = caught.value.exceptions
        assert first is key
        assert isinstance(rest, ExceptionGroup)
        assert rest.message == "inner"
        assert rest.exceptions == (value,)

    virtual(main)


def test_the_rest_of_a_group_keeps_cause_context_notes_and_traceback(virtual: Run) -> None:
    async def main() -> None:
        cause, context = KeyError("cause"), ValueError("context")
        group: list[BaseException] = []

        async def raise_here() -> None:
            mixed = BaseExceptionGroup("mixed", [await _cancelled_here(), ZeroDivisionError()])
            group.append(mixed)
            mixed.add_note("noted")
            try:
                raise context
            except ValueError:
                raise mixed from cause

        with pytest.raises(ExceptionGroup) as caught, CancelScope() as scope:
            scope.cancel()
            await raise_here()
        rest = caught.value
        assert rest.__cause__ is cause
        assert rest.__context__ is context
        assert rest.__suppress_context__
        assert rest.__notes__ == ["noted"]
        assert "raise_here" in [name for _, name in frames(rest)]
        assert group[0] is not rest

    virtual(main)


def test_the_rest_of_a_group_without_a_context_gets_none(virtual: Run) -> None:
    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught, CancelScope() as scope:
            scope.cancel()
            raise BaseExceptionGroup("mixed", [await _cancelled_here(), ZeroDivisionError()])
        assert caught.value.__context__ is None
        assert caught.value.__cause__ is None

    virtual(main)


def test_a_group_without_cancelled_passes_untouched(virtual: Run) -> None:
    async def main() -> None:
        group = ExceptionGroup("errors", [KeyError(), ExceptionGroup("more", [ValueError()])])
        with pytest.raises(ExceptionGroup) as caught, CancelScope() as scope:
            scope.cancel()
            raise group
        assert caught.value is group
        assert not scope.cancelled_caught

    virtual(main)


@pytest.mark.parametrize("called", ["outer", "both"])
def test_an_inner_scope_does_not_split_a_group_that_is_the_outer_ones_business(virtual: Run, called: str) -> None:
    async def main() -> None:
        seen: list[BaseException] = []
        with pytest.raises(ExceptionGroup) as caught, CancelScope() as outer:
            try:
                with CancelScope() as inner:
                    outer.cancel()
                    if called == "both":
                        inner.cancel()
                    raise BaseExceptionGroup("mixed", [await _cancelled_here(), ZeroDivisionError()])
            except BaseExceptionGroup as group:
                seen.append(group)
                raise
        assert [type(exc) for exc in seen[0].exceptions] == [Cancelled, ZeroDivisionError]  # type: ignore[attr-defined]
        assert [type(exc) for exc in caught.value.exceptions] == [ZeroDivisionError]
        assert outer.cancelled_caught
        assert not inner.cancelled_caught

    virtual(main)


def test_a_group_nested_too_deep_to_be_taken_apart_passes_whole(virtual: Run) -> None:
    """trio#1235: Python splits groups by recursion; when it gives up, the errors still arrive."""

    class Deep(BaseExceptionGroup[BaseException]):
        def split(self, condition: Any) -> Any:
            raise RecursionError

    async def main() -> None:
        group = Deep("deep", [ZeroDivisionError()])
        with pytest.raises(Deep) as caught, CancelScope() as scope:
            scope.cancel()
            raise group
        assert caught.value is group
        assert not scope.cancelled_caught

    virtual(main)


def test_a_scope_that_nobody_called_does_not_split_groups(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel()
            cancelled = await _cancelled_here()
        with pytest.raises(BaseExceptionGroup) as caught, CancelScope():
            raise BaseExceptionGroup("mixed", [cancelled, ZeroDivisionError()])
        assert cancelled in caught.value.exceptions

    virtual(main)


def test_except_star_sees_cancelled_and_the_scope_still_catches_what_is_reraised(virtual: Run) -> None:
    """anyio#634, anyio#1091"""
    log = []

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught, CancelScope() as scope:
            scope.cancel()
            try:
                raise BaseExceptionGroup("mixed", [await _cancelled_here(), ZeroDivisionError(), KeyError()])
            except* ZeroDivisionError:
                log.append("zero")
            except* Cancelled:
                log.append("cancelled")
                raise
        assert scope.cancelled_caught
        matched, _ = caught.value.split(Cancelled)
        assert matched is None
        assert caught.value.subgroup(KeyError) is not None
        assert caught.value.subgroup(ZeroDivisionError) is None

    virtual(main)
    assert log == ["zero", "cancelled"]


def test_except_star_may_wrap_a_bare_cancelled_and_reraise_it(virtual: Run) -> None:
    """anyio#634"""

    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel()
            try:
                await checkpoint()
            except* Cancelled:
                raise
        assert scope.cancelled_caught

    virtual(main)


# ---- misuse -------------------------------------------------------------------------------------


def test_a_scope_is_entered_once(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as scope:
            with pytest.raises(RuntimeError, match=r"(?i)entered a second time.*make .* for each"), scope:
                raise AssertionError("unreachable: it is entered already")
            scope.cancel()
            await checkpoint()
        assert scope.cancelled_caught
        with pytest.raises(RuntimeError, match="entered a second time"):
            scope.__enter__()
        await kernel_lives_on()

    virtual(main)


def test_a_scope_is_entered_once_in_all_tasks_together(virtual: Run) -> None:
    async def child(scope: CancelScope) -> None:
        with pytest.raises(RuntimeError, match="entered a second time"):
            scope.__enter__()

    async def main() -> None:
        with CancelScope() as scope:
            async with open_nursery() as nursery:
                nursery.start_soon(child, scope)
        await kernel_lives_on()

    virtual(main)


def test_a_scope_cannot_be_entered_outside_the_kernel_but_afterwards_inside(virtual: Run) -> None:
    scope = CancelScope()
    with pytest.raises(RuntimeError, match="CancelScope was used outside the kernel"):
        scope.__enter__()
    virtual(_enter_once, scope)


def test_a_scope_cannot_be_entered_outside_any_task() -> None:
    assert re.match("(a )?CancelScope was .* outside any .*task", _outside_any_task(CancelScope().__enter__))


def test_leaving_a_scope_that_was_not_entered_is_an_error(virtual: Run) -> None:
    async def main() -> None:
        scope = CancelScope()
        with pytest.raises(RuntimeError, match="left without having been entered, or a second time"):
            scope.__exit__(None, None, None)
        with scope:
            pass
        with pytest.raises(RuntimeError, match="left without having been entered, or a second time"):
            scope.__exit__(None, None, None)
        await kernel_lives_on()

    virtual(main)


def test_a_scope_left_before_an_inner_one_is_one_runtime_error_that_names_the_cause_and_cure(virtual: Run) -> None:
    """trio#882, trio#1061"""

    async def main() -> None:
        outer, inner = CancelScope(), CancelScope()
        outer.__enter__()
        inner.__enter__()
        with pytest.raises(RuntimeError) as caught:
            outer.__exit__(None, None, None)
        text = str(caught.value)
        assert repr(outer)[:20] in text
        assert "left before a scope or nursery inside it was" in text
        assert "innermost first" in text
        assert "async generator" in text
        assert "async context manager instead" in text
        assert caught.value.__cause__ is None
        inner.__exit__(None, None, None)
        await kernel_lives_on()

    virtual(main)


def test_scopes_inside_one_left_out_of_order_stay_in_force(virtual: Run) -> None:
    """trio#882"""

    async def main() -> None:
        with CancelScope() as outermost:
            left, inner, innermost = CancelScope(), CancelScope(), CancelScope()
            for scope in (left, inner, innermost):
                scope.__enter__()
            with pytest.raises(RuntimeError):
                left.__exit__(None, None, None)
            left.cancel()
            assert not await is_cancelled()
            innermost.__exit__(None, None, None)
            inner.cancel()
            with pytest.raises(Cancelled) as caught:
                await checkpoint()
            assert inner.__exit__(Cancelled, caught.value, None) is True
            assert inner.cancelled_caught
            assert not await is_cancelled()
            outermost.cancel()
            await checkpoint()
        assert outermost.cancelled_caught
        await kernel_lives_on()

    virtual(main)


def test_a_cancelled_scope_left_out_of_order_no_longer_cancels_those_inside(virtual: Run) -> None:
    async def main() -> None:
        outer, inner = CancelScope(), CancelScope()
        outer.__enter__()
        inner.__enter__()
        outer.cancel()
        assert await is_cancelled()
        with pytest.raises(RuntimeError):
            outer.__exit__(None, None, None)
        assert not await is_cancelled()
        inner.__exit__(None, None, None)
        await kernel_lives_on()

    virtual(main)


def test_a_shield_left_out_of_order_no_longer_shields_those_inside(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as outermost:
            shield, inner = CancelScope(shield=True), CancelScope()
            shield.__enter__()
            inner.__enter__()
            outermost.cancel()
            assert not await is_cancelled()
            with pytest.raises(RuntimeError):
                shield.__exit__(None, None, None)
            assert await is_cancelled()
            inner.__exit__(None, None, None)
        await kernel_lives_on()

    virtual(main)


def test_the_deadline_of_a_scope_left_out_of_order_does_not_fire(virtual: Run) -> None:
    async def main() -> None:
        outer, inner = CancelScope(deadline=5), CancelScope()
        outer.__enter__()
        inner.__enter__()
        with pytest.raises(RuntimeError):
            outer.__exit__(None, None, None)
        assert len(current_kernel().timers) == 0
        await sleep(9)
        assert not outer.cancel_called
        inner.__exit__(None, None, None)

    virtual(main)


def test_leaving_out_of_order_with_an_error_keeps_it_as_the_cause(virtual: Run) -> None:
    async def main() -> None:
        outer, inner = CancelScope(), CancelScope()
        outer.__enter__()
        inner.__enter__()
        error = ZeroDivisionError()
        with pytest.raises(RuntimeError) as caught:
            outer.__exit__(type(error), error, None)
        assert caught.value.__cause__ is error
        inner.__exit__(None, None, None)

    virtual(main)


def test_a_scope_left_through_an_async_generator_is_one_runtime_error(virtual: Run) -> None:
    """trio#1061, trio#3298"""

    async def numbers() -> AsyncGenerator[int, None]:
        with move_on_after(5):
            yield 1
            yield 2

    async def main() -> None:
        generator = numbers()
        assert await anext(generator) == 1
        with move_on_after(9) as scope:
            with pytest.raises(RuntimeError, match="left before a scope or nursery inside it"):
                await generator.aclose()
            assert current_effective_deadline() == 9
            scope.cancel()
            await checkpoint()
        assert scope.cancelled_caught
        await kernel_lives_on()

    virtual(main)


def test_a_scope_left_by_another_task_is_one_runtime_error_there(virtual: Run) -> None:
    """trio#1443, trio#3298"""

    async def numbers() -> AsyncGenerator[int, None]:
        with CancelScope():
            yield 1

    async def child(generator: AsyncGenerator[int, None]) -> None:
        with pytest.raises(
            RuntimeError, match=r"was entered by <Task '.*main'.*> but left by <Task 'closer'.*>"
        ) as caught:
            await generator.aclose()
        assert isinstance(caught.value.__cause__, GeneratorExit)
        await kernel_lives_on()

    async def main() -> None:
        generator = numbers()
        await anext(generator)
        async with open_nursery() as nursery:
            nursery.start_soon(child, generator, name="closer")
        await kernel_lives_on()

    virtual(main)


def test_a_scope_left_by_another_task_while_it_is_the_innermost_one_is_taken_out(virtual: Run) -> None:
    """trio#1443"""
    log = []

    async def sleeper(scope: CancelScope, lot: ParkingLot) -> None:
        scope.__enter__()
        await lot.park()
        log.append("woken")
        assert not await is_cancelled()

    async def main() -> None:
        scope, lot = CancelScope(deadline=5), ParkingLot()
        async with open_nursery() as nursery:
            nursery.start_soon(sleeper, scope, lot)
            await wait_all_tasks_blocked()
            with pytest.raises(RuntimeError, match=r"was entered by .* but left by"):
                scope.__exit__(None, None, None)
            scope.cancel()
            await wait_all_tasks_blocked()
            assert log == []
            lot.unpark()
        await kernel_lives_on()

    virtual(main)
    assert log == ["woken"]


@pytest.mark.parametrize("inner", ["nothing", "a scope"])
def test_a_shield_left_by_another_task_lets_the_waiting_cancellation_in(virtual: Run, inner: str) -> None:
    """trio#1443: the shield is gone, and the task that sleeps without it now is in a cancelled scope."""
    log = []

    async def sleeper(shield: CancelScope, lot: ParkingLot) -> None:
        shield.__enter__()
        with CancelScope() if inner == "a scope" else ExitStack():
            try:
                await lot.park()
                log.append("not cancelled")
            except Cancelled:
                log.append("cancelled")
                raise

    async def main() -> None:
        shield, lot = CancelScope(shield=True), ParkingLot()
        with CancelScope() as outer:
            async with open_nursery() as nursery:
                nursery.start_soon(sleeper, shield, lot)
                await wait_all_tasks_blocked()
                outer.cancel()
                with pytest.raises(RuntimeError):
                    shield.__exit__(None, None, None)
                with CancelScope(shield=True):
                    await wait_all_tasks_blocked()
                lot.unpark_all()
        await kernel_lives_on()

    virtual(main)
    assert log == ["cancelled"]


def test_a_scope_left_by_hand_in_another_thread_stays_in_force(virtual: Run) -> None:
    def in_thread(scope: CancelScope) -> None:
        try:
            scope.__exit__(None, None, None)
        except RuntimeError:
            pass

    async def main() -> None:
        with CancelScope(deadline=5) as scope:
            with CancelScope():
                thread = threading.Thread(target=in_thread, args=(scope,))
                thread.start()
                thread.join()
            assert current_effective_deadline() == 5
            await sleep_forever()
        assert scope.cancelled_caught
        await kernel_lives_on()

    virtual(main)


# ---- a task ends inside an open scope -----------------------------------------------------------


def test_a_task_that_ends_inside_a_scope_ends_with_one_runtime_error(virtual: Run) -> None:
    async def child() -> None:
        CancelScope().__enter__()

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with open_nursery() as nursery:
                nursery.start_soon(child, name="forgetful")
        (error,) = caught.value.exceptions
        assert isinstance(error, RuntimeError)
        assert "<Task 'forgetful'" in str(error)
        assert "ended inside <CancelScope" in str(error)
        assert "which it never left" in str(error)
        assert "innermost first" in str(error)
        await kernel_lives_on()

    virtual(main)


def test_a_task_that_fails_inside_a_scope_it_never_leaves_keeps_its_error_and_gets_a_note(virtual: Run) -> None:
    error = ZeroDivisionError()

    async def child() -> None:
        CancelScope().__enter__()
        raise error

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with open_nursery() as nursery:
                nursery.start_soon(child)
        assert caught.value.exceptions == (error,)
        (note,) = error.__notes__
        assert "ended inside <CancelScope" in note

    virtual(main)


def test_a_task_that_is_cancelled_inside_a_scope_it_never_leaves_reports_the_misuse(virtual: Run) -> None:
    async def child() -> None:
        CancelScope().__enter__()
        await sleep_forever()

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with open_nursery() as nursery:
                nursery.start_soon(child)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        assert [type(exc) for exc in caught.value.exceptions] == [RuntimeError]

    virtual(main)


def test_main_that_ends_inside_a_scope_ends_with_a_runtime_error(virtual: Run) -> None:
    async def main() -> None:
        CancelScope().__enter__()

    with pytest.raises(RuntimeError, match="ended inside <CancelScope"):
        virtual(main)


def test_scopes_of_a_task_that_has_ended_are_over_and_leaving_them_late_is_quiet(virtual: Run) -> None:
    """The task was told already; its error is the one RuntimeError."""

    async def child(scopes: list[CancelScope]) -> None:
        for scope in scopes:
            scope.__enter__()

    async def main() -> None:
        scopes = [CancelScope(deadline=50), CancelScope(), CancelScope(relative_deadline=5)]
        with pytest.raises(ExceptionGroup):
            async with open_nursery() as nursery:
                nursery.start_soon(child, scopes)
        assert len(current_kernel().timers) == 0
        for scope in scopes:
            assert "abandoned" in repr(scope)
            assert not scope.__exit__(None, None, None)
            scope.cancel()
            with pytest.raises(RuntimeError, match="entered a second time"):
                scope.__enter__()
        await sleep(99)
        await kernel_lives_on()

    virtual(main)


def test_an_async_generator_closed_after_its_tasks_end_says_nothing_more(virtual: Run) -> None:
    """trio#3298"""

    async def numbers() -> AsyncGenerator[int, None]:
        with CancelScope():
            yield 1

    async def child(generator: AsyncGenerator[int, None]) -> None:
        await anext(generator)

    async def main() -> None:
        generator = numbers()
        with pytest.raises(ExceptionGroup):
            async with open_nursery() as nursery:
                nursery.start_soon(child, generator)
        await generator.aclose()
        await kernel_lives_on()

    virtual(main)


# ---- what it looks like -------------------------------------------------------------------------


def test_repr_says_the_state_the_cancellation_or_deadline_and_the_shield(virtual: Run) -> None:
    async def main() -> None:
        scope = CancelScope(shield=True)
        at = f"<CancelScope at {id(scope):#x}, "
        assert repr(scope) == f"{at}new, shielded>"
        with scope:
            assert repr(scope) == f"{at}active, shielded>"
            scope.deadline = 2.5
            await sleep(1)
            assert repr(scope) == f"{at}active, deadline 2.500, shielded>"
            scope.shield = False
            assert repr(scope) == f"{at}active, deadline 2.500>"
            scope.cancel()
            assert repr(scope) == f"{at}active, cancelled>"
        assert repr(scope) == f"{at}exited, cancelled>"

    virtual(main)


def test_repr_works_outside_the_kernel() -> None:
    assert repr(CancelScope()).endswith(", new>")
    assert repr(CancelScope(deadline=5)).endswith(", new, deadline 5.000>")
    assert repr(CancelScope(relative_deadline=5)).endswith(", new, deadline 5 s after entering>")


# ---- size, garbage, tracebacks ------------------------------------------------------------------


@contextmanager
def counting_lines() -> Iterator[list[int]]:
    """How many lines of the package's own code run inside, in `count[0]`. What traced before goes on afterwards."""
    count = [0]

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if "/kernel/core/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            count[0] += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


def frames(error: BaseException) -> list[tuple[str, str]]:
    """File and function of every line in the traceback of `error`."""
    found, traceback = [], error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        found.append((code.co_filename, code.co_name))
        traceback = traceback.tb_next
    return found


async def cyclic_garbage(scenario: Callable[[], Awaitable[None]]) -> int:
    """How many objects `scenario()` leaves to the garbage collector, once everything that is cached is warm."""
    await scenario()
    gc.collect()
    gc.disable()
    try:
        await scenario()
        return gc.collect()
    finally:
        gc.enable()


async def _cancelled_by_hand() -> None:
    with CancelScope() as scope:
        scope.cancel()
        await sleep_forever()


async def _timed_out() -> None:
    with move_on_after(1):
        await sleep_forever()


async def _too_slow() -> None:
    try:
        with fail_after(1):
            await sleep_forever()
    except kernel.TooSlowError:
        pass


async def _nested() -> None:
    with CancelScope() as outer, CancelScope(), move_on_after(5):
        outer.cancel()
        await checkpoint()


async def _group_split() -> None:
    try:
        with CancelScope() as scope:
            scope.cancel()
            try:
                await checkpoint()
            except Cancelled as exc:
                raise BaseExceptionGroup("mixed", [exc, ZeroDivisionError()]) from None
    except ExceptionGroup:
        pass


async def _out_of_order() -> None:
    outer, inner = CancelScope(), CancelScope()
    outer.__enter__()
    inner.__enter__()
    try:
        outer.__exit__(None, None, None)
    except RuntimeError:
        pass
    inner.__exit__(None, None, None)


@pytest.mark.parametrize(
    "scenario",
    [_cancelled_by_hand, _timed_out, _too_slow, _nested, _group_split, _out_of_order],
    ids=lambda scenario: scenario.__name__.strip("_"),
)
def test_a_cancelled_block_leaves_no_cyclic_garbage(virtual: Run, scenario: Callable[[], Awaitable[None]]) -> None:
    """trio#1770, trio#2063; anyio#806"""

    async def main() -> None:
        assert await cyclic_garbage(scenario) == 0

    virtual(main)


def test_a_left_scope_lets_go_of_its_task_and_its_parent(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as outer, move_on_after(5) as inner:
            pass
        referents = gc.get_referents(inner, outer)
        assert current_task() not in referents
        assert outer not in referents
        assert current_kernel() not in referents

    virtual(main)


@pytest.mark.parametrize("how", ["checkpoint", "sleep", "woken"])
def test_the_traceback_of_cancelled_shows_no_line_of_the_loop(virtual: Run, how: str) -> None:
    caught: list[Cancelled] = []

    async def child() -> None:
        try:
            await (checkpoint() if how == "checkpoint" else sleep(5))
        except Cancelled as exc:
            caught.append(exc)
            raise

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(child)
            if how == "woken":
                await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    virtual(main)
    files = [file for file, _ in frames(caught[0])]
    assert files[0] == __file__
    assert not [file for file in files if file.endswith("loop.py")]


def test_the_traceback_of_cancelled_grows_linearly_with_the_depth_of_calls(virtual: Run) -> None:
    """trio#1793"""

    async def nest(depth: int) -> None:
        with CancelScope():
            if depth:
                await nest(depth - 1)
            else:
                await checkpoint()

    async def length(depth: int) -> int:
        with CancelScope() as scope:
            scope.cancel()
            try:
                await nest(depth)
            except Cancelled as exc:
                return len(frames(exc))
        raise AssertionError("unreachable: the scope was cancelled")

    async def main() -> None:
        at_10, at_20, at_40 = [await length(depth) for depth in (10, 20, 40)]
        assert at_40 - at_20 == 2 * (at_20 - at_10) == 20

    virtual(main)


@pytest.mark.parametrize("cancel", ["outermost", "innermost", "none"])
def test_two_thousand_nested_scopes_need_no_recursion(virtual: Run, cancel: str) -> None:
    """trio#1235"""

    async def main() -> None:
        with ExitStack() as stack:
            scopes = [stack.enter_context(CancelScope()) for _ in range(2000)]
            if cancel != "none":
                (scopes[0] if cancel == "outermost" else scopes[-1]).cancel()
                assert current_effective_deadline() == -inf
            await checkpoint()
        catcher = {"outermost": [scopes[0]], "innermost": [scopes[-1]], "none": []}[cancel]
        assert [scope for scope in scopes if scope.cancelled_caught] == catcher

    virtual(main)


def test_a_scope_of_two_thousand_can_be_left_out_of_order(virtual: Run) -> None:
    async def main() -> None:
        scopes = [CancelScope() for _ in range(2000)]
        for scope in scopes:
            scope.__enter__()
        with pytest.raises(RuntimeError):
            scopes[0].__exit__(None, None, None)
        for scope in reversed(scopes[1:]):
            scope.__exit__(None, None, None)
        await kernel_lives_on()

    virtual(main)


@pytest.mark.parametrize("shape", ["wide", "deep"])
def test_the_cost_of_cancel_is_proportional_to_the_scopes_and_tasks_inside(virtual: Run, shape: str) -> None:
    async def grow(size: int) -> None:
        async with open_nursery() as nursery:
            if shape == "deep" and size > 1:
                nursery.start_soon(grow, size - 1)
            for _ in range(size if shape == "wide" else 1):
                nursery.start_soon(sleep_forever)

    async def lines(size: int) -> int:
        with CancelScope() as scope:
            async with open_nursery() as nursery:
                nursery.start_soon(grow, size)
                await wait_all_tasks_blocked()
                with counting_lines() as count:
                    scope.cancel()
        return count[0]

    async def main() -> None:
        await lines(5)
        at_50, at_100, at_200 = [await lines(size) for size in (50, 100, 200)]
        assert at_200 - at_100 == 2 * (at_100 - at_50) > 0

    virtual(main)


def test_a_shield_keeps_the_cost_of_cancel_out_too(virtual: Run) -> None:
    async def lines(size: int) -> int:
        with CancelScope() as outer, CancelScope(shield=True):
            async with open_nursery() as nursery:
                for _ in range(size):
                    nursery.start_soon(sleep_forever)
                await wait_all_tasks_blocked()
                with counting_lines() as count:
                    outer.cancel()
                nursery.cancel_scope.cancel()
        return count[0]

    async def main() -> None:
        await lines(1)
        assert await lines(1) == await lines(100)

    virtual(main)


def test_cancelling_again_costs_nothing_for_the_tasks_inside(virtual: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted: list[object] = []
    interrupt = Kernel.interrupt

    def counting(self: Kernel, task: Any, *args: Any) -> None:
        interrupted.append(task)
        interrupt(self, task, *args)

    monkeypatch.setattr(Kernel, "interrupt", counting)

    async def main() -> None:
        async with open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(sleep_forever)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            assert len(interrupted) == 11
            nursery.cancel_scope.cancel()
            assert len(interrupted) == 11

    virtual(main)
