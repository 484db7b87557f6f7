"""`nursery.spawn`, `nursery.cancel` and task handles: joining, cancelling, and what becomes of errors."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import CheckedReadyQueue, NoFiles
from outcome import Error, Value

import kernel
from kernel import Cancelled, TaskCancelled, TaskHandle
from kernel.interrupts import currently_ki_protected
from kernel.lowlevel import ParkingLot, checkpoint, current_kernel, current_task
from kernel.testing import MockClock, wait_all_tasks_blocked

Virtual = Callable[..., Any]


async def give(value: Any, seconds: float = 1) -> Any:
    await kernel.sleep(seconds)
    return value


async def fail(error: BaseException, seconds: float = 1) -> None:
    await kernel.sleep(seconds)
    raise error


# ---- joining -----------------------------------------------------------------------------------------


def test_join_waits_for_the_result(virtual: Virtual) -> None:
    async def main() -> tuple[Any, float]:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(give, "soup", 2)
            assert not handle.done
            assert handle.outcome is None
            result = await handle.join()
            assert handle.done
            assert handle.outcome == Value("soup")
            return result, kernel.current_time()

    assert virtual(main) == ("soup", 2)


def test_awaiting_the_handle_is_joining(virtual: Virtual) -> None:
    async def main() -> Any:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(give, "soup")
            return [await handle, await handle, await handle.join()]

    assert virtual(main) == ["soup"] * 3


def test_generators_spawn_and_join_too(virtual: Virtual) -> None:
    def cook(dish: str) -> Generator[Any, Any, str]:
        yield from kernel.sleep(1)
        return dish

    def body(nursery: kernel.Nursery) -> Generator[Any, Any, Any]:
        soup, noodles = nursery.spawn(cook, "soup"), nursery.spawn(cook, "noodles")
        return [(yield from soup), (yield from noodles.join())]

    def main() -> Generator[Any, Any, Any]:
        return (yield from kernel.within(kernel.open_nursery(), body))

    assert virtual(main) == ["soup", "noodles"]


def test_all_joiners_wake_in_the_order_they_came(virtual: Virtual) -> None:
    log: list[tuple[int, Any]] = []

    async def joiner(number: int, handle: TaskHandle[Any]) -> None:
        log.append((number, await handle))

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(give, "soup")
            for number in range(5):
                nursery.start_soon(joiner, number, handle)

    virtual(main)
    assert log == [(number, "soup") for number in range(5)]


def test_a_handle_outlives_its_nursery_and_its_run(virtual: Virtual) -> None:
    async def main() -> TaskHandle[Any]:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(give, "soup")
        assert await handle == "soup"
        return handle

    async def other(handle: TaskHandle[Any]) -> Any:
        return await handle

    handle = virtual(main)
    assert handle.outcome == Value("soup")
    assert kernel.run(other, handle) == "soup"


def test_cancelling_a_joiner_does_not_cancel_the_child(virtual: Virtual) -> None:
    async def main() -> Any:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(give, "soup", 5)
            with kernel.move_on_after(1) as scope:
                await handle
            assert scope.cancelled_caught
            assert not handle.done
            return await handle

    assert virtual(main) == "soup"


def test_a_cancelled_joiner_does_not_strand_the_next(virtual: Virtual) -> None:
    log: list[str] = []

    async def joiner(handle: TaskHandle[Any], patience: float) -> None:
        with kernel.move_on_after(patience):
            log.append(await handle)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(give, "soup", 5)
            for patience in (1, 10, 2, 10):
                nursery.start_soon(joiner, handle, patience)

    virtual(main)
    assert log == ["soup", "soup"]


def test_a_cancelled_operation_did_nothing_join_of_a_finished_child_in_a_cancelled_scope_raises_cancelled() -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(give, "soup", 0)
            await handle
            with kernel.CancelScope() as scope:
                scope.cancel()
                await handle
            assert scope.cancelled_caught
            assert await handle == "soup"

    kernel.run(main)


def test_the_child_ends_and_the_joiners_deadline_fires_in_the_same_pass_neither_is_lost(virtual: Virtual) -> None:
    log: list[Any] = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(give, "soup", 0)
            with kernel.CancelScope() as scope:
                nursery.start_soon(cancel_when_done, handle, scope)
                log.append(await handle)
                log.append("before the next cancel point")
                await checkpoint()
                log.append("not reached")
            log.append(scope.cancelled_caught)

    async def cancel_when_done(handle: TaskHandle[Any], scope: kernel.CancelScope) -> None:
        await checkpoint()
        assert handle.done  # and the joiner queues behind us
        scope.cancel()

    virtual(main)
    assert log == ["soup", "before the next cancel point", True]


def test_join_is_a_schedule_point_once_the_budget_is_used_up() -> None:
    log: list[str] = []

    async def other() -> None:
        log.append("other")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(give, 1, 0)
            await handle
            nursery.start_soon(other)
            for _ in range(1000):
                await handle
            log.append("joined")

    kernel.run(main)
    assert log == ["other", "joined"]


# ---- errors ------------------------------------------------------------------------------------------


def test_an_error_that_is_joined_by_the_body_arrives_once_in_the_group(virtual: Virtual) -> None:
    error = ValueError("lid stuck")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(fail, error)
            await handle

    with pytest.raises(ExceptionGroup) as caught:
        virtual(main)
    assert caught.value.exceptions == (error,)


def test_an_error_that_is_joined_by_siblings_arrives_once_in_the_group(virtual: Virtual) -> None:
    error = ValueError("lid stuck")
    log: list[BaseException] = []

    async def joiner(handle: TaskHandle[Any]) -> None:
        try:
            await handle
        except ValueError as caught:
            log.append(caught)
            raise

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(fail, error)
            nursery.start_soon(joiner, handle)
            nursery.start_soon(joiner, handle)

    with pytest.raises(ExceptionGroup) as caught:
        virtual(main)
    assert caught.value.exceptions == (error,)
    assert log == [error, error]


def test_an_error_arrives_in_the_group_though_a_joiner_has_dealt_with_it(virtual: Virtual) -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(fail, ValueError("lid stuck"))
            with pytest.raises(ValueError, match="lid stuck"):
                await handle

    with pytest.raises(ExceptionGroup) as caught:
        virtual(main)
    assert caught.group_contains(ValueError, match="lid stuck", depth=1)


def test_different_errors_of_child_and_body_both_arrive(virtual: Virtual) -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            try:
                await nursery.spawn(fail, ValueError("child"))
            except ValueError as error:
                raise KeyError("body") from error

    with pytest.raises(ExceptionGroup) as caught:
        virtual(main)
    assert [type(error) for error in caught.value.exceptions] == [ValueError, KeyError]


def test_a_child_joined_from_another_task_tree_fails_there_too(virtual: Virtual) -> None:
    error = ValueError("lid stuck")
    log: list[str] = []

    async def elsewhere(handle: TaskHandle[Any]) -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(kernel.sleep_forever)
            try:
                await handle
            finally:
                log.append("elsewhere")

    async def home(handles: list[TaskHandle[Any]]) -> None:
        async with kernel.open_nursery() as nursery:
            handles.append(nursery.spawn(fail, error))

    async def main() -> None:
        handles: list[TaskHandle[Any]] = []
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(home, handles)
            await wait_all_tasks_blocked()
            nursery.start_soon(elsewhere, handles[0])

    with pytest.raises(ExceptionGroup) as caught:
        virtual(main)
    home_group, elsewhere_group = caught.value.exceptions
    assert home_group.exceptions == elsewhere_group.exceptions == (error,)  # type: ignore[attr-defined]
    assert log == ["elsewhere"]


def lines(traceback: TracebackType | None) -> list[str]:
    names = []
    while traceback is not None:
        names.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    return names


def test_joiners_do_not_pile_their_frames_on_the_error(virtual: Virtual) -> None:
    seen: list[list[str]] = []

    async def joiner(handle: TaskHandle[Any]) -> None:
        try:
            await handle
        except ValueError as error:
            seen.append(lines(error.__traceback__))

    async def main() -> None:
        handles: list[TaskHandle[Any]] = []
        try:
            async with kernel.open_nursery() as nursery:
                handles.append(nursery.spawn(fail, ValueError()))
        except* ValueError:
            pass
        for _ in range(3):
            await joiner(handles[0])

    virtual(main)
    assert seen == [["joiner", "__await__", "join", "_run", "fail"]] * 3


def test_joining_changes_neither_cause_nor_context_nor_the_traceback_in_the_group(virtual: Virtual) -> None:
    async def child() -> None:
        try:
            raise KeyError("first")
        except KeyError:
            raise ValueError("second") from OSError("cause")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(child)
            try:
                raise RuntimeError("being handled")
            except RuntimeError:
                await handle

    with pytest.raises(ExceptionGroup) as caught:
        virtual(main)
    (error,) = caught.value.exceptions
    assert isinstance(error.__context__, KeyError)
    assert isinstance(error.__cause__, OSError)
    assert lines(error.__traceback__) == ["_run", "child"]


def test_a_failing_child_reaches_its_joiner_before_the_nursery_cancels_it(virtual: Virtual) -> None:
    log: list[str] = []

    async def main() -> None:
        try:
            async with kernel.open_nursery() as nursery:
                try:
                    await nursery.spawn(fail, ValueError())
                except BaseException as error:
                    log.append(type(error).__name__)
        except* ValueError:
            log.append("group")

    virtual(main)
    assert log == ["ValueError", "group"]


# ---- cancelling one child ----------------------------------------------------------------------------


def test_cancel_ends_this_child_and_no_other(virtual: Virtual) -> None:
    async def main() -> Any:
        async with kernel.open_nursery() as nursery:
            doomed, other = nursery.spawn(give, "soup", 10), nursery.spawn(give, "noodles", 2)
            await kernel.sleep(1)
            doomed.cancel("no soup")
            doomed.cancel("twice")
            with pytest.raises(TaskCancelled, match="'give' was cancelled by explicit, with reason 'no soup', from"):
                await doomed
            assert kernel.current_time() == 1
            assert isinstance(doomed.outcome, Error)
            assert isinstance(doomed.outcome.error, TaskCancelled)
            return await other

    assert virtual(main) == "noodles"


def test_a_task_cancelled_before_its_first_step_still_runs_to_its_first_checkpoint() -> None:
    log: list[str] = []

    async def child() -> None:
        log.append("begun")
        await checkpoint()
        log.append("not reached")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.spawn(child).cancel()

    kernel.run(main)
    assert log == ["begun"]


def test_a_child_that_ends_well_in_spite_of_its_cancel_has_a_result(virtual: Virtual) -> None:
    async def child() -> str:
        try:
            await kernel.sleep_forever()
        except Cancelled:
            return "stubborn"
        raise AssertionError("unreachable")

    async def main() -> Any:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(child)
            await wait_all_tasks_blocked()
            handle.cancel()
            return await handle

    assert virtual(main) == "stubborn"


def test_the_result_is_there_and_cancel_comes_in_the_same_pass_the_result_counts() -> None:
    async def main() -> Any:
        lot = ParkingLot()
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(lot.park)
            await wait_all_tasks_blocked()
            lot.unpark()
            handle.cancel()
            await handle
            assert handle.outcome == Value(None)
            return await handle

    assert kernel.run(main) is None


def test_cancel_after_the_end_does_nothing(virtual: Virtual) -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(give, "soup")
            await handle
            handle.cancel()
            assert not handle.cancel_scope.cancel_called
            assert await handle == "soup"

    virtual(main)


def test_an_error_of_a_cancelled_childs_cleanup_is_not_replaced_by_its_cancel(virtual: Virtual) -> None:
    async def child() -> None:
        try:
            await kernel.sleep_forever()
        finally:
            raise ValueError("cleanup")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(child)
            await wait_all_tasks_blocked()
            handle.cancel()

    with pytest.raises(ExceptionGroup) as caught:
        virtual(main)
    assert caught.group_contains(ValueError, match="cleanup", depth=1)


def test_joining_a_child_that_was_cancelled_with_its_nursery_says_so_to_a_joiner_elsewhere(virtual: Virtual) -> None:
    log: list[str] = []

    async def elsewhere(handle: TaskHandle[Any]) -> None:
        try:
            await handle
        except TaskCancelled as error:
            log.append(str(error).partition(", from")[0])

    async def main() -> None:
        async with kernel.open_nursery() as outer:
            async with kernel.open_nursery() as nursery:
                handle = nursery.spawn(kernel.sleep_forever, name="sleeper")
                outer.start_soon(elsewhere, handle)
                await wait_all_tasks_blocked()
                nursery.cancel("closing time")
            assert "cancelled" in repr(handle)

    virtual(main)
    assert log == ["'sleeper' was cancelled by explicit, with reason 'closing time'"]


def test_a_child_cancelled_by_handle_and_from_outside_at_once_lets_the_cancel_pass(virtual: Virtual) -> None:
    async def main() -> None:
        handles = []
        with kernel.CancelScope() as scope:
            async with kernel.open_nursery() as nursery:
                handles.append(nursery.spawn(kernel.sleep_forever))
                await wait_all_tasks_blocked()
                scope.cancel("outer")
                handles[0].cancel("inner")
        assert scope.cancelled_caught
        with pytest.raises(TaskCancelled, match="outer"):
            await handles[0]

    virtual(main)


def test_no_nursery_injects_a_cancelled_that_nobody_received(virtual: Virtual) -> None:
    async def main() -> str:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(kernel.sleep_forever)
            await wait_all_tasks_blocked()
            handle.cancel()
        await checkpoint()
        return "went on"

    assert virtual(main) == "went on"


def test_the_deadline_of_a_handles_scope_is_a_timeout_for_the_child(virtual: Virtual) -> None:
    async def main() -> float:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(kernel.sleep_forever)
            handle.cancel_scope.deadline = 3
            with pytest.raises(TaskCancelled, match="by deadline"):
                await handle
        return kernel.current_time()

    assert virtual(main) == 3


# ---- nursery.cancel ----------------------------------------------------------------------------------


def test_nursery_cancel_is_plain_and_idempotent(virtual: Virtual) -> None:
    log: list[str | None] = []

    async def child() -> None:
        try:
            await kernel.sleep_forever()
        except Cancelled as error:
            log.append(error.reason)
            raise

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            nursery.spawn(child)
            await wait_all_tasks_blocked()
            assert nursery.cancel("enough") is None  # type: ignore[func-returns-value]
            nursery.cancel("again")
        assert nursery.cancel_scope.cancelled_caught
        nursery.cancel("after the end")

    virtual(main)
    assert log == ["enough", "enough"]


# ---- misuse ------------------------------------------------------------------------------------------


def test_joining_oneself_is_an_error(virtual: Virtual) -> None:
    handles: list[TaskHandle[Any]] = []

    async def child() -> None:
        with pytest.raises(RuntimeError, match="join itself"):
            await handles[0]

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handles.append(nursery.spawn(child))

    virtual(main)


def test_joining_an_ancestor_is_an_error(virtual: Virtual) -> None:
    handles: list[TaskHandle[Any]] = []
    log: list[str] = []

    async def grandchild() -> None:
        with pytest.raises(RuntimeError, match="from inside one of its own children"):
            await handles[0]
        log.append("refused")

    async def child() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(grandchild)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handles.append(nursery.spawn(child))

    virtual(main)
    assert log == ["refused"]


def test_joining_outside_the_kernel_or_in_another_one_is_an_error() -> None:
    handles: list[TaskHandle[Any]] = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handles.append(nursery.spawn(kernel.sleep_forever))
            await wait_all_tasks_blocked()
            with pytest.raises(RuntimeError, match="another kernel"):
                in_a_thread(kernel.run, other)
            nursery.cancel()

    async def other() -> None:
        await handles[0]

    kernel.run(main)
    with pytest.raises(RuntimeError, match="outside the kernel"):
        next(handles[0].__await__())


def in_a_thread(function: Callable[..., Any], *args: Any) -> None:
    errors: list[BaseException] = []

    def call() -> None:
        try:
            function(*args)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_spawn_in_a_closed_nursery_or_of_no_function_is_an_error_and_starts_nothing() -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            with pytest.raises(TypeError, match=r"nursery\.spawn wants an async function, not 3"):
                nursery.spawn(3)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=r"Write nursery\.spawn\(give, \.\.\.\)"):
                nursery.spawn(give(1))
            assert not nursery.child_tasks
        with pytest.raises(RuntimeError, match="closed"):
            nursery.spawn(give, 1)
        with pytest.raises(RuntimeError, match="not open yet"):
            kernel.open_nursery().spawn(give, 1)

    kernel.run(main)


def test_a_yield_that_lost_its_from_is_told() -> None:
    def main() -> Generator[Any, Any, None]:
        def body(nursery: kernel.Nursery) -> Generator[Any, Any, None]:
            yield nursery.spawn(give, 1)

        yield from kernel.within(kernel.open_nursery(), body)

    with pytest.raises(ExceptionGroup) as caught:
        kernel.run(main)
    assert caught.group_contains(TypeError, match="yield from")


# ---- names and reports -------------------------------------------------------------------------------


def test_names_and_reprs_tell_what_became_of_the_child(virtual: Virtual) -> None:
    async def main() -> None:
        states = []
        async with kernel.open_nursery() as nursery:
            named, plain = nursery.spawn(give, 1, name="cook"), nursery.spawn(give, 2)
            assert (named.task.name, plain.task.name) == ("cook", "give")
            states.append(repr(named))
            await wait_all_tasks_blocked()
            states.append(repr(named))
            await named
            states.append(repr(named))
            gone = nursery.spawn(kernel.sleep_forever)
            gone.cancel()
            await wait_all_tasks_blocked()
            states.append(repr(gone))
        try:
            async with kernel.open_nursery() as nursery:
                failing = nursery.spawn(fail, ValueError())
        except* ValueError:
            states.append(repr(failing))
        words = [state.rpartition(", ")[2] for state in states]
        assert words == ["ready>", "sleeping>", "returned>", "cancelled>", "failed with ValueError>"]
        assert states[0].startswith("<TaskHandle of 'cook' at 0x")

    virtual(main)


def test_a_joiners_trap_names_the_child_it_waits_for(virtual: Virtual) -> None:
    async def join(handle: TaskHandle[Any]) -> Any:
        return await handle

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(give, 1, name="cook")
            joiner = nursery.spawn(join, handle)
            await checkpoint()
            await checkpoint()
            trap: Any = joiner.task.trap
            assert repr(trap) == "<Join of 'cook'>"
            assert trap.on.owner is handle.task

    virtual(main)


# ---- memory ------------------------------------------------------------------------------------------


class Thing:
    """Something whose end can be watched."""


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("ending", ["result", "cancel"])
def test_a_handle_that_is_kept_keeps_no_frame(ending: str, virtual: Virtual, no_gc: None) -> None:
    refs: list[weakref.ref[Thing]] = []

    async def child() -> str:
        thing = Thing()
        refs.append(weakref.ref(thing))
        await kernel.sleep(1)
        return "result"

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(child)
            await checkpoint()
            if ending == "cancel":
                handle.cancel()
            await wait_all_tasks_blocked() if ending == "cancel" else await handle
        await checkpoint()
        assert refs[0]() is None
        assert handle.done

    virtual(main)


def test_a_handle_goes_with_its_last_reference(virtual: Virtual, no_gc: None) -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(give, "soup")
            ref, task_ref = weakref.ref(handle), weakref.ref(handle.task)
            await handle
            await checkpoint()
            del handle
            assert ref() is None
            assert task_ref() is None

    virtual(main)


@pytest.mark.parametrize("who", ["nobody", "the body", "a sibling", "both"])
def test_errors_that_were_joined_leave_no_garbage_to_collect(who: str, virtual: Virtual, no_gc: None) -> None:
    async def joiner(handle: TaskHandle[Any]) -> None:
        await handle

    async def scene() -> None:
        try:
            async with kernel.open_nursery() as nursery:
                handle = nursery.spawn(fail_with_context)
                if who in ("a sibling", "both"):
                    nursery.start_soon(joiner, handle)
                if who in ("the body", "both"):
                    await handle
        except* ValueError:
            pass

    async def fail_with_context() -> None:
        await kernel.sleep(1)
        try:
            raise KeyError
        except KeyError:
            raise ValueError from None

    async def main() -> None:
        await scene()
        await checkpoint()
        gc.collect()
        for _ in range(10):
            await scene()
        await checkpoint()
        assert gc.collect() == 0

    virtual(main)


def test_cancelled_children_and_their_joiners_leave_no_garbage_to_collect(virtual: Virtual, no_gc: None) -> None:
    async def scene() -> None:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(kernel.sleep_forever)
            await wait_all_tasks_blocked()
            handle.cancel()
            try:
                await handle
            except TaskCancelled:
                pass

    async def main() -> None:
        await scene()
        await checkpoint()
        gc.collect()
        for _ in range(10):
            await scene()
        await checkpoint()
        assert gc.collect() == 0

    virtual(main)


def test_children_that_time_out_leave_no_garbage_though_the_body_keeps_their_handles(
    virtual: Virtual, no_gc: None
) -> None:
    async def scene() -> None:
        with kernel.move_on_after(1):
            async with kernel.open_nursery() as nursery:
                handles = [nursery.spawn(kernel.sleep_forever) for _ in range(3)]
        assert all(handle.done for handle in handles)

    async def main() -> None:
        await scene()
        await checkpoint()
        gc.collect()
        for _ in range(10):
            await scene()
        await checkpoint()
        assert gc.collect() == 0

    virtual(main)


def test_a_handle_that_is_kept_does_not_keep_those_who_joined_it(virtual: Virtual, no_gc: None) -> None:
    refs: list[weakref.ref[Any]] = []

    async def joiner(handle: TaskHandle[Any]) -> None:
        refs.append(weakref.ref(current_task()))
        await handle

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(give, "soup", 2)
            nursery.start_soon(joiner, handle)
            with kernel.move_on_after(1):
                await handle
            await kernel.sleep(5)
            assert handle.done
            assert refs[0]() is None

    virtual(main)


def test_joining_long_after_the_failure_closes_no_cycle_of_its_own(virtual: Virtual, no_gc: None) -> None:
    handles: list[TaskHandle[Any]] = []

    async def join() -> None:
        try:
            await handles.pop()
        except ValueError:
            pass

    async def scene() -> None:
        try:
            async with kernel.open_nursery() as nursery:
                handles.append(nursery.spawn(fail_anew))
        except* ValueError:
            pass
        await join()

    async def fail_anew() -> None:
        raise ValueError

    async def main() -> None:
        await scene()
        await checkpoint()
        gc.collect()
        for _ in range(5):
            await scene()
        await checkpoint()
        assert gc.collect() == 0

    virtual(main)


def test_ctrl_c_strikes_a_spawned_child_as_any_other(virtual: Virtual) -> None:
    async def child() -> bool:
        await checkpoint()
        return currently_ki_protected()

    async def main() -> bool:
        async with kernel.open_nursery() as nursery:
            return await nursery.spawn(child)

    assert virtual(main) is False


def test_nobody_is_left_in_the_farewells(virtual: Virtual) -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(give, 1)
            with kernel.move_on_after(0.5):
                await handle
        assert not current_kernel().farewells

    virtual(main)


# ---- any tree, against a plain model -----------------------------------------------------------------
#
# A program is a tree of nodes. A node opens a nursery, spawns its children, sleeps until its `at`, and ends there with
# its name or an error. Who wants to cancels nodes, joins them, cancels a node's nursery. All times are different, so
# that no two things happen at once, and what becomes of each node can be said without knowing the kernel.


@dataclass
class Node:
    name: int
    at: float  # when the body ends
    fails: bool
    children: list[Node] = field(default_factory=list)
    parent: Node | None = None

    def family(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            yield from child.family()


@dataclass
class Plan:
    root: Node
    cancels: list[tuple[float, int]]  # handle.cancel() of the node with that name, at that time
    nursery_cancels: list[tuple[float, int]]
    joins: list[int]  # somebody from outside joins this node from the beginning


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    times = iter(draw(st.permutations(range(1, 41))))

    def node(name: Iterator[int], depth: int) -> Node:
        made = Node(next(name), next(times), draw(st.booleans()) and draw(st.booleans()))
        if depth:
            for _ in range(draw(st.integers(0, 3))):
                child = node(name, depth - 1)
                child.parent = made
                made.children.append(child)
        return made

    root = node(iter(range(100)), 2)
    names = st.integers(0, sum(1 for _ in root.family()) - 1)
    some = st.lists(names, max_size=3)
    return Plan(
        root,
        [(next(times), name) for name in draw(some)],
        [(next(times), name) for name in draw(some)],
        draw(some),
    )


class PlainModel:
    """What becomes of the nodes. Time goes from event to event; an event tells the nodes concerned."""

    def __init__(self, plan: Plan) -> None:
        self.results: dict[int, tuple[float, Any]] = {}
        self.body: dict[int, Any] = {}  # what the body of a node ended with, while it waits for its children
        self.errors: dict[int, set[int]] = {node.name: set() for node in plan.root.family()}
        self.nodes = {node.name: node for node in plan.root.family()}
        events: list[tuple[float, str, int]] = [(node.at, "body", node.name) for node in self.nodes.values()]
        events += [(at, "cancel", name) for at, name in plan.cancels]
        events += [(at, "cancel nursery", name) for at, name in plan.nursery_cancels]
        for self.now, what, name in sorted(events):
            node = self.nodes[name]
            if name in self.results:
                continue
            if what == "body":
                if name not in self.body:
                    self.end_body(node, {name} if node.fails else set(), ("value", name))
            elif what == "cancel":
                self.cancel_inside(node, passes=True)
            else:
                self.cancel_inside(node, passes=False)

    def cancel_inside(self, node: Node, *, passes: bool) -> None:
        """Body and children get `Cancelled`. It `passes` through the node's nursery if it came from outside."""
        running = [child for child in node.children if child.name not in self.results]
        body_runs = node.name not in self.body
        if body_runs or running:
            self.body[node.name] = ("cancelled", None) if passes else ("value", node.name)
        for child in running:
            self.cancel_inside(child, passes=True)
        self.settle(node)

    def end_body(self, node: Node, errors: set[int], value: Any) -> None:
        self.body[node.name] = value
        if errors:
            self.fail(node, errors)
        self.settle(node)

    def fail(self, node: Node, errors: set[int]) -> None:
        """An error in the node's nursery: body and other children are cancelled."""
        self.errors[node.name] |= errors
        self.cancel_inside(node, passes=False)

    def settle(self, node: Node) -> None:
        """If body and children have ended, the node has."""
        if node.name in self.results or node.name not in self.body:
            return
        if any(child.name not in self.results for child in node.children):
            return
        errors = self.errors[node.name]
        result = ("errors", frozenset(errors)) if errors else self.body[node.name]
        self.results[node.name] = (self.now, result)
        if node.parent is not None:
            if errors:
                self.fail(node.parent, errors)
            self.settle(node.parent)


class NodeError(Exception):
    pass


def leaves(error: BaseException) -> frozenset[int]:
    if isinstance(error, BaseExceptionGroup):
        return frozenset().union(*(leaves(each) for each in error.exceptions))
    assert isinstance(error, NodeError), repr(error)
    name: int = error.args[0]
    return frozenset({name})


def result_of(outcome: Any) -> Any:
    if isinstance(outcome, Value):
        return ("value", outcome.value)
    if isinstance(outcome.error, TaskCancelled):
        return ("cancelled", None)
    return ("errors", leaves(outcome.error))


def run_plan(plan: Plan) -> tuple[dict[int, tuple[float, Any]], list[tuple[int, float, Any]]]:
    handles: dict[int, TaskHandle[Any]] = {}
    nurseries: dict[int, kernel.Nursery] = {}
    ended: dict[int, float] = {}
    joined: list[tuple[int, float, Any]] = []

    async def run_node(node: Node) -> int:
        try:
            async with kernel.open_nursery() as nurseries[node.name]:
                for child in node.children:
                    handles[child.name] = nurseries[node.name].spawn(run_node, child)
                await kernel.sleep_until(node.at)
                if node.fails:
                    raise NodeError(node.name)
            return node.name
        finally:
            ended[node.name] = kernel.current_time()

    async def at(time: float, act: Callable[[], None]) -> None:
        await kernel.sleep_until(time)
        act()

    async def join(name: int) -> None:
        try:
            value = ("value", await handles[name])
        except TaskCancelled:
            value = ("cancelled", None)
        except (NodeError, ExceptionGroup) as error:
            value = ("errors", leaves(error))
        joined.append((name, kernel.current_time(), value))

    async def main() -> None:
        try:
            async with kernel.open_nursery() as outer, kernel.open_nursery() as home:
                handles[plan.root.name] = home.spawn(run_node, plan.root)
                for _ in range(3):
                    await checkpoint()
                for time, name in plan.cancels:
                    outer.start_soon(at, time, handles[name].cancel)
                for time, name in plan.nursery_cancels:
                    outer.start_soon(at, time, nurseries[name].cancel)
                for name in plan.joins:
                    outer.start_soon(join, name)
        except* NodeError:
            pass
        assert all(handle.done for handle in handles.values())

    queue = CheckedReadyQueue()
    kernel.run(main, clock=MockClock(autojump_threshold=0), ready=queue, poller=NoFiles())
    queue.finish()
    return {name: (ended[name], result_of(handle.outcome)) for name, handle in handles.items()}, joined


@settings(max_examples=150, deadline=None)
@given(plans())
def test_after_any_mix_of_spawn_cancel_join_and_failure_all_is_joined_and_as_the_plain_model_says(plan: Plan) -> None:
    results, joined = run_plan(plan)
    model = PlainModel(plan).results
    assert results == model
    # Who joins from outside is cancelled with the outer nursery only when home has failed, and then all has ended.
    assert all(model[name] == (time, value) for name, time, value in joined)
    root_failed = model[0][1][0] == "errors"
    assert root_failed or len(joined) == len(plan.joins)
