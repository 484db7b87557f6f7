"""Timeouts: they cut short, they report, and they are ordinary scopes otherwise."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest

from kernel import (
    Cancelled,
    CancelScope,
    TooSlowError,
    current_time,
    fail_after,
    fail_at,
    move_on_after,
    move_on_at,
    open_nursery,
    sleep,
    sleep_forever,
)
from kernel.lowlevel import checkpoint
from kernel.testing import wait_all_tasks_blocked

Run = Callable[..., Any]
RELATIVE = [move_on_after, fail_after]
ABSOLUTE = [move_on_at, fail_at]
ALL = RELATIVE + ABSOLUTE


# ---- cutting short --------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [move_on_after, move_on_at])
def test_move_on_ends_the_block_at_the_deadline_and_says_so(virtual: Run, timeout: Callable[..., CancelScope]) -> None:
    async def main() -> None:
        with timeout(3) as scope:
            await sleep_forever()
        assert current_time() == 3
        assert scope.cancel_called
        assert scope.cancelled_caught

    virtual(main)


@pytest.mark.parametrize("timeout", ALL)
def test_a_block_that_ends_in_time_is_left_alone(virtual: Run, timeout: Callable[..., CancelScope]) -> None:
    async def main() -> None:
        with timeout(3) as scope:
            await sleep(2)
        await sleep(5)
        assert not scope.cancel_called
        assert not scope.cancelled_caught

    virtual(main)


@pytest.mark.parametrize("timeout", [fail_after, fail_at])
def test_fail_raises_too_slow_at_the_deadline(virtual: Run, timeout: Callable[..., CancelScope]) -> None:
    async def main() -> None:
        with (
            pytest.raises(TooSlowError, match="did not end in time: it was cancelled by deadline"),
            timeout(3) as scope,
        ):
            await sleep_forever()
        assert current_time() == 3
        assert scope.cancel_called
        assert scope.cancelled_caught

    virtual(main)


@pytest.mark.parametrize("timeout", RELATIVE)
def test_relative_timeouts_count_from_entering(virtual: Run, timeout: Callable[..., CancelScope]) -> None:
    async def main() -> None:
        scope = timeout(3)
        assert scope.is_relative is True
        assert scope.relative_deadline == 3
        await sleep(10)
        with scope:
            assert scope.deadline == 13
            assert scope.is_relative is None

    virtual(main)


@pytest.mark.parametrize("timeout", ABSOLUTE)
def test_absolute_timeouts_know_their_deadline_before_entering(
    virtual: Run, timeout: Callable[..., CancelScope]
) -> None:
    async def main() -> None:
        scope = timeout(3)
        assert scope.is_relative is False
        assert scope.deadline == 3
        await sleep(2)
        with scope:
            assert scope.deadline == 3
            assert scope.relative_deadline == 1

    virtual(main)


@pytest.mark.parametrize("timeout", ALL)
def test_a_timeout_without_time_lets_the_block_run_to_its_first_cancel_point(
    virtual: Run, timeout: Callable[..., CancelScope]
) -> None:
    log = []

    async def main() -> None:
        try:
            with timeout(0):
                log.append("entered")
                await checkpoint()
                log.append("not reached")
        except TooSlowError:
            log.append("too slow")
        assert current_time() == 0

    virtual(main)
    assert log == (["entered", "too slow"] if timeout in (fail_after, fail_at) else ["entered"])


@pytest.mark.parametrize("timeout", [fail_after, fail_at])
def test_a_block_that_overruns_without_a_cancel_point_is_not_too_slow(
    virtual: Run, timeout: Callable[..., CancelScope]
) -> None:
    async def main() -> None:
        with timeout(0) as scope:
            pass
        assert scope.cancel_called
        assert not scope.cancelled_caught

    virtual(main)


@pytest.mark.parametrize("timeout", ALL)
def test_an_infinite_timeout_never_fires(virtual: Run, timeout: Callable[..., CancelScope]) -> None:
    async def main() -> None:
        with timeout(inf) as scope:
            await sleep(1e9)
        assert not scope.cancel_called

    virtual(main)


def test_a_timeout_covers_child_tasks(virtual: Run) -> None:
    log = []

    async def child(name: str) -> None:
        try:
            await sleep_forever()
        finally:
            log.append((name, current_time()))

    async def main() -> None:
        with pytest.raises(TooSlowError), fail_after(4):
            async with open_nursery() as nursery:
                nursery.start_soon(child, "a")
                nursery.start_soon(child, "b")

    virtual(main)
    assert log == [("a", 4), ("b", 4)]


# ---- errors of the arguments ----------------------------------------------------------------------


@pytest.mark.parametrize("timeout", ALL)
def test_nan_is_refused(timeout: Callable[..., CancelScope]) -> None:
    """trio#2493"""
    with pytest.raises(ValueError, match=r"(?i)nan"):
        timeout(nan)


@pytest.mark.parametrize("timeout", RELATIVE)
def test_a_negative_relative_timeout_is_refused(timeout: Callable[..., CancelScope]) -> None:
    with pytest.raises(ValueError, match=r"relative_deadline must .*-1"):
        timeout(-1)


@pytest.mark.parametrize("timeout", ABSOLUTE)
def test_an_absolute_timeout_may_lie_before_the_clock_began(virtual: Run, timeout: Callable[..., CancelScope]) -> None:
    async def main() -> None:
        try:
            with timeout(-5) as scope:
                await checkpoint()
        except TooSlowError:
            pass
        assert scope.cancelled_caught

    virtual(main)


@pytest.mark.parametrize("timeout", ALL)
def test_shield_is_passed_on(virtual: Run, timeout: Callable[..., CancelScope]) -> None:
    assert timeout(1, shield=True).shield is True
    assert timeout(1).shield is False
    with pytest.raises(TypeError, match="shield must be a bool"):
        timeout(1, shield=1)
    with pytest.raises(TypeError):
        timeout(1, True)


@pytest.mark.parametrize("timeout", [fail_after, fail_at])
def test_a_shielded_timeout_still_fires_inside_a_cancelled_scope(
    virtual: Run, timeout: Callable[..., CancelScope]
) -> None:
    log = []

    async def main() -> None:
        with CancelScope() as outer:
            outer.cancel()
            with pytest.raises(TooSlowError), timeout(2, shield=True):
                await sleep_forever()
            log.append(current_time())
            await checkpoint()
            log.append("not reached")
        assert outer.cancelled_caught

    virtual(main)
    assert log == [2]


# ---- what fail_after reports, and what it leaves alone ----------------------------------------------


def test_fail_after_cancelled_by_hand_is_too_slow_as_well_and_says_why(virtual: Run) -> None:
    async def main() -> None:
        scope = fail_after(3)
        with pytest.raises(TooSlowError, match=r"cancelled by explicit, with reason 'enough'"), scope:
            scope.cancel("enough")
            await checkpoint()
        assert scope.cancelled_caught

    virtual(main)


def test_fail_after_lets_the_cancellation_of_an_outer_scope_pass(virtual: Run) -> None:
    async def main() -> None:
        with move_on_after(1) as outer, fail_after(5) as inner:
            await sleep_forever()
        assert outer.cancelled_caught
        assert not inner.cancel_called
        assert not inner.cancelled_caught

    virtual(main)


@pytest.mark.parametrize("shape", ["fail inside fail", "both at once"])
def test_of_two_expired_timeouts_only_the_outer_one_reports(virtual: Run, shape: str) -> None:
    async def main() -> None:
        outer, inner = fail_after(1 if shape == "both at once" else 0), fail_after(1)
        with pytest.raises(TooSlowError) as caught, outer, inner:
            await sleep_forever()
        assert outer.cancelled_caught
        assert not inner.cancelled_caught
        assert isinstance(caught.value.__context__, Cancelled)

    virtual(main)


def test_fail_after_does_not_replace_an_error_that_leaves_the_block(virtual: Run) -> None:
    async def main() -> None:
        error = ZeroDivisionError()
        with pytest.raises(ZeroDivisionError) as caught, fail_after(1) as scope:
            try:
                await sleep_forever()
            except Cancelled:
                raise error from None
        assert caught.value is error
        assert scope.cancel_called
        assert not scope.cancelled_caught

    virtual(main)


def test_fail_after_takes_cancelled_out_of_a_group_and_lets_the_errors_pass(virtual: Run) -> None:
    async def main() -> None:
        error = ZeroDivisionError()
        with pytest.raises(ExceptionGroup) as caught, fail_after(1) as scope:
            try:
                await sleep_forever()
            except Cancelled as cancelled:
                raise BaseExceptionGroup("mixed", [cancelled, error]) from None
        assert caught.value.message == "mixed"
        assert caught.value.exceptions == (error,)
        assert scope.cancelled_caught

    virtual(main)


def test_fail_after_is_too_slow_when_a_group_holds_nothing_but_cancelled(virtual: Run) -> None:
    async def main() -> None:
        with pytest.raises(TooSlowError), fail_after(1) as scope:
            try:
                await sleep_forever()
            except Cancelled as cancelled:
                raise BaseExceptionGroup("only", [cancelled]) from None
        assert scope.cancelled_caught

    virtual(main)


def test_fail_after_left_out_of_order_is_a_runtime_error_and_not_too_slow(virtual: Run) -> None:
    async def main() -> None:
        outer, inner = fail_after(1), move_on_after(5)
        outer.__enter__()
        inner.__enter__()
        with pytest.raises(RuntimeError, match="left before a scope or nursery inside it"):
            outer.__exit__(None, None, None)
        inner.__exit__(None, None, None)

    virtual(main)


def test_too_slow_shows_where_the_block_was_cut_short(virtual: Run) -> None:
    async def stuck_here() -> None:
        await sleep_forever()

    async def main() -> None:
        with pytest.raises(TooSlowError) as caught, fail_after(1):
            await stuck_here()
        cancelled = caught.value.__context__
        assert isinstance(cancelled, Cancelled)
        names, traceback = [], cancelled.__traceback__
        while traceback is not None:
            names.append(traceback.tb_frame.f_code.co_name)
            traceback = traceback.tb_next
        assert names[:2] == ["main", "stuck_here"]

    virtual(main)


# ---- moving the deadline ----------------------------------------------------------------------------


def test_a_timeout_can_be_put_off_and_brought_forward_while_it_runs(virtual: Run) -> None:
    log = []

    async def main() -> None:
        with move_on_after(2) as scope:
            await sleep(1)
            scope.deadline += 10
            await sleep(5)
            log.append(current_time())
            scope.relative_deadline = 1
            await sleep_forever()
        log.append(current_time())

    virtual(main)
    assert log == [6, 7]


def test_an_idle_timeout_is_renewed_by_setting_the_relative_deadline(virtual: Run) -> None:
    async def main() -> None:
        with pytest.raises(TooSlowError), fail_after(2) as scope:
            for pause in (1, 1.5, 1.9, 3):
                await sleep(pause)
                scope.relative_deadline = 2
        assert current_time() == 6.4

    virtual(main)


def test_cancel_ends_the_timeout_so_that_cleanup_is_not_hit_again(virtual: Run) -> None:
    """A shielded cleanup that outlasts the old deadline is not called late, and the first reason stays."""

    async def main() -> None:
        with pytest.raises(TooSlowError, match="explicit"), fail_after(2) as scope:
            scope.cancel()
            with CancelScope(shield=True):
                await sleep(5)
            await wait_all_tasks_blocked()

    virtual(main)
