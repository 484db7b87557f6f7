"""trio's low-level vocabulary: waits that anybody can end, and coroutines that change kernels and come back."""

from __future__ import annotations

import gc
import signal
import threading
import types
from collections.abc import Callable, Generator
from typing import Any, NoReturn

import pytest
from outcome import Error, Value, capture

import kernel
from kernel.lowlevel import (
    Abort,
    ParkingLot,
    Task,
    add_parking_lot_breaker,
    checkpoint,
    current_kernel,
    current_task,
    permanently_detach_coroutine_object,
    reattach_detached_coroutine_object,
    reschedule,
    temporarily_detach_coroutine_object,
    wait_task_rescheduled,
)
from kernel.testing import wait_all_tasks_blocked

RaiseCancel = Callable[[], NoReturn]


@pytest.fixture
def log() -> list[Any]:
    return []


def succeed(raise_cancel: RaiseCancel) -> Abort:
    return Abort.SUCCEEDED


def never(raise_cancel: RaiseCancel) -> Abort:
    raise AssertionError("nobody has cancelled this")


class Sleeper:
    """A task that sleeps in `wait_task_rescheduled` under a scope of its own, and writes down how that ended."""

    def __init__(self, abort_fn: Callable[[RaiseCancel], Abort]) -> None:
        self.abort_fn = abort_fn
        self.scope = kernel.CancelScope()
        self.task: Task
        self.ended: list[Any] = []

    async def main(self) -> None:
        self.task = current_task()
        with self.scope:
            try:
                self.ended.append(await wait_task_rescheduled(self.abort_fn))
            except BaseException as error:
                self.ended.append(error)
                if isinstance(error, kernel.Cancelled):
                    raise


def with_sleeper(abort_fn: Callable[[RaiseCancel], Abort], body: Callable[[Sleeper], object]) -> Sleeper:
    """Run `body` while the sleeper sleeps, then wait for it to end."""
    sleeper = Sleeper(abort_fn)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sleeper.main)
            await wait_all_tasks_blocked()
            body(sleeper)

    kernel.run(main)
    return sleeper


# ---- waiting and rescheduling ------------------------------------------------------------------------


def test_a_wait_returns_what_it_is_rescheduled_with() -> None:
    sleeper = with_sleeper(never, lambda sleeper: reschedule(sleeper.task, Value("tea")))
    assert sleeper.ended == ["tea"]


def test_a_wait_returns_none_if_it_is_rescheduled_with_nothing_any_number_of_times() -> None:
    for _ in range(3):
        assert with_sleeper(never, lambda sleeper: reschedule(sleeper.task)).ended == [None]


def test_a_wait_raises_what_it_is_rescheduled_with() -> None:
    error = KeyError("the waker's")
    sleeper = with_sleeper(never, lambda sleeper: reschedule(sleeper.task, Error(error)))
    assert sleeper.ended == [error]


def test_an_outcome_can_be_used_for_many() -> None:
    outcome = Value("tea")
    for _ in range(2):
        assert with_sleeper(never, lambda sleeper: reschedule(sleeper.task, outcome)).ended == ["tea"]


def test_it_works_in_generator_style_too(log: list[Any]) -> None:
    def waiter() -> Generator[Any, Any, None]:
        log.append(current_task())
        log.append((yield from wait_task_rescheduled(never)))

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(waiter)
            await wait_all_tasks_blocked()
            reschedule(log.pop(), Value("tea"))

    kernel.run(main)
    assert log == ["tea"]


def test_a_task_can_be_rescheduled_before_anybody_else_runs(log: list[Any]) -> None:
    """Whoever shall wake it may do so at once, but not before it sleeps."""

    async def main() -> None:
        task = current_task()

        async def waker() -> None:
            reschedule(task, Value("at once"))

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(waker)
            log.append(await wait_task_rescheduled(never))

    kernel.run(main)
    assert log == ["at once"]


def refused(task: Task, match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        reschedule(task, Value("wrong"))


def test_to_reschedule_twice_is_an_error_that_changes_nothing() -> None:
    def body(sleeper: Sleeper) -> None:
        reschedule(sleeper.task, Value("once"))
        refused(sleeper.task, "is not in wait_task_rescheduled")

    assert with_sleeper(never, body).ended == ["once"]


def test_to_reschedule_one_that_was_cancelled_is_an_error_that_changes_nothing() -> None:
    def body(sleeper: Sleeper) -> None:
        sleeper.scope.cancel()
        refused(sleeper.task, "is not in wait_task_rescheduled")

    (ended,) = with_sleeper(succeed, body).ended
    assert isinstance(ended, kernel.Cancelled)


def test_to_reschedule_one_that_runs_or_has_ended_or_sleeps_on_something_else_is_an_error() -> None:
    lot = ParkingLot()

    async def main() -> None:
        refused(current_task(), "is not in wait_task_rescheduled")
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(lot.park)
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            refused(task, "is not in wait_task_rescheduled")
            assert len(lot) == 1
            lot.unpark()
            await wait_all_tasks_blocked()
            refused(task, "is not in wait_task_rescheduled")

    kernel.run(main)


def test_what_is_no_outcome_is_refused_and_the_task_sleeps_on() -> None:
    def body(sleeper: Sleeper) -> None:
        with pytest.raises(TypeError, match=r"must be an outcome\.Value or an outcome\.Error, not 'tea'"):
            reschedule(sleeper.task, "tea")  # type: ignore[arg-type]
        reschedule(sleeper.task, Value("milk"))

    assert with_sleeper(never, body).ended == ["milk"]


def test_to_reschedule_from_another_thread_is_an_error_whether_a_kernel_runs_there_or_not(log: list[Any]) -> None:
    def body(sleeper: Sleeper) -> None:
        async def elsewhere() -> None:
            refused(sleeper.task, "belongs to the kernel of another thread")
            log.append("refused")

        def thread() -> None:
            refused(sleeper.task, r"reschedule\(\) was used outside the kernel")
            kernel.run(elsewhere)

        worker = threading.Thread(target=thread)
        worker.start()
        worker.join(60)
        reschedule(sleeper.task, Value("mine"))

    assert with_sleeper(never, body).ended == ["mine"]
    assert log == ["refused"]


# ---- cancelling --------------------------------------------------------------------------------------


def test_a_wait_whose_abort_succeeds_is_cancelled() -> None:
    sleeper = with_sleeper(succeed, lambda sleeper: sleeper.scope.cancel("enough"))
    (ended,) = sleeper.ended
    assert isinstance(ended, kernel.Cancelled)
    assert ended.reason == "enough"
    assert sleeper.scope.cancelled_caught


def test_a_wait_whose_abort_fails_goes_on_until_it_is_rescheduled_and_is_asked_once(log: list[Any]) -> None:
    def abort(raise_cancel: RaiseCancel) -> Abort:
        log.append("asked")
        return Abort.FAILED

    sleeper = Sleeper(abort)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sleeper.main)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            assert sleeper.task.state == "sleeping"
            sleeper.scope.shield = True  # it is not cancelled any more, and then it is again: no reason to ask
            sleeper.scope.shield = False
            reschedule(sleeper.task, Value("done all the same"))

    kernel.run(main)
    assert sleeper.ended == ["done all the same"]
    assert log == ["asked"]


def test_whoever_aborts_later_may_hand_on_the_cancellation() -> None:
    cancels: list[RaiseCancel] = []

    def abort(raise_cancel: RaiseCancel) -> Abort:
        cancels.append(raise_cancel)
        return Abort.FAILED

    def body(sleeper: Sleeper) -> None:
        sleeper.scope.cancel("enough")
        reschedule(sleeper.task, capture(cancels[0]))

    sleeper = with_sleeper(abort, body)
    (ended,) = sleeper.ended
    assert isinstance(ended, kernel.Cancelled)
    assert ended.reason == "enough"
    assert sleeper.scope.cancelled_caught


def test_an_abort_may_reschedule_the_task_itself() -> None:
    sleeper: Sleeper

    def abort(raise_cancel: RaiseCancel) -> Abort:
        reschedule(sleeper.task, capture(raise_cancel))
        return Abort.FAILED

    def body(it: Sleeper) -> None:
        nonlocal sleeper
        sleeper = it
        it.scope.cancel()

    (ended,) = with_sleeper(abort, body).ended
    assert isinstance(ended, kernel.Cancelled)


def test_in_a_cancelled_scope_the_wait_is_aborted_at_once(log: list[Any]) -> None:
    def abort(raise_cancel: RaiseCancel) -> Abort:
        log.append("asked")
        return Abort.SUCCEEDED

    async def main() -> None:
        with kernel.CancelScope() as scope:
            scope.cancel()
            await wait_task_rescheduled(abort)
        assert scope.cancelled_caught

    kernel.run(main)
    assert log == ["asked"]


def test_a_deadline_aborts_the_wait(virtual: Callable[..., Any]) -> None:
    async def main() -> None:
        with kernel.move_on_after(5) as scope:
            await wait_task_rescheduled(succeed)
        assert scope.cancelled_caught
        assert kernel.current_time() == 5

    virtual(main)


@pytest.mark.parametrize("answer", [None, True, "SUCCEEDED"])
def test_an_abort_that_answers_nonsense_is_an_error_in_the_task_that_waits(answer: Any) -> None:
    sleeper = with_sleeper(lambda raise_cancel: answer, lambda sleeper: sleeper.scope.cancel())
    (ended,) = sleeper.ended
    assert isinstance(ended, TypeError)
    assert f"must return Abort.SUCCEEDED or Abort.FAILED, not {answer!r}" in str(ended)


def test_an_abort_that_raises_is_an_error_in_the_task_that_waits() -> None:
    def abort(raise_cancel: RaiseCancel) -> Abort:
        raise KeyError("the abort_fn's")

    (ended,) = with_sleeper(abort, lambda sleeper: sleeper.scope.cancel()).ended
    assert isinstance(ended, KeyError)


@pytest.mark.parametrize("later", [False, True], ids=["aborted", "handed on later"])
def test_ctrl_c_aborts_the_wait_of_the_main_task(later: bool) -> None:
    cancels: list[RaiseCancel] = []

    def abort(raise_cancel: RaiseCancel) -> Abort:
        cancels.append(raise_cancel)
        return Abort.FAILED if later else Abort.SUCCEEDED

    async def main() -> None:
        task = current_task()

        async def hand_on() -> None:
            await wait_all_tasks_blocked()
            signal.raise_signal(signal.SIGINT)
            await wait_all_tasks_blocked()
            if later:
                reschedule(task, capture(cancels[0]))

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(hand_on)
            await checkpoint()
            with pytest.raises(KeyboardInterrupt):
                await wait_task_rescheduled(abort)
        await checkpoint()  # there was one, and it has been delivered

    kernel.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
    assert len(cancels) == 1


def test_the_repr_says_what_would_end_the_wait() -> None:
    def body(sleeper: Sleeper) -> None:
        assert "WaitRescheduled, abort_fn=<function never" in repr(sleeper.task.trap)
        reschedule(sleeper.task)

    with_sleeper(never, body)


# ---- another kernel ----------------------------------------------------------------------------------


@types.coroutine
def to_the_other_kernel(thing: object) -> Generator[Any, Any, Any]:
    return (yield thing)


class OtherKernel:
    """As small as they come: resumes a coroutine with whatever it is told, and keeps what it yields."""

    def __init__(self, coro: Any) -> None:
        self.coro = coro
        self.got: list[Any] = []

    def send(self, value: object) -> None:
        self.got.append(self.coro.send(value))

    def finish(self, value: object) -> Any:
        with pytest.raises(StopIteration) as info:
            self.coro.send(value)
        return info.value.value


async def quietly_forever() -> None:
    await kernel.sleep_forever()


def test_a_coroutine_that_is_detached_for_good_ends_its_task_and_goes_on_elsewhere(log: list[Any]) -> None:
    async def traveller() -> str:
        await checkpoint()
        log.append(await permanently_detach_coroutine_object(Value("the task's result")))
        log.append(await to_the_other_kernel("hello"))
        with pytest.raises(RuntimeError, match="outside the kernel"):
            await kernel.sleep(1)
        return "the coroutine's result"

    async def main() -> Task:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(traveller)
            (task,) = nursery.child_tasks
        assert task.state == "finished"
        assert task.outcome == Value("the task's result")
        return task

    task = kernel.run(main)
    other = OtherKernel(task.coro)
    other.send("welcome")
    assert other.finish("goodbye") == "the coroutine's result"
    assert other.got == ["hello"]
    assert log == ["welcome", "goodbye"]


def test_the_main_task_can_detach_itself(log: list[Any]) -> None:
    coros: list[Any] = []

    async def main() -> None:
        coros.append(current_task().coro)
        await permanently_detach_coroutine_object(Value("result"))
        log.append("goes on")

    assert kernel.run(main) == "result"
    OtherKernel(coros[0]).finish(None)
    assert log == ["goes on"]


def test_a_task_can_be_ended_with_an_error_by_detaching(log: list[Any]) -> None:
    async def traveller() -> None:
        log.append(current_task().coro)
        await permanently_detach_coroutine_object(Error(KeyError("the task's")))

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(traveller)

    with pytest.raises(ExceptionGroup) as info:
        kernel.run(main)
    assert [repr(error) for error in info.value.exceptions] == ['KeyError("the task\'s")']
    OtherKernel(log.pop()).finish(None)


def test_detaching_tells_those_who_wait_for_the_end_of_the_task(log: list[Any]) -> None:
    lot = ParkingLot()

    async def traveller() -> None:
        log.append(current_task().coro)
        add_parking_lot_breaker(current_task(), lot)
        await permanently_detach_coroutine_object(Value(None))

    async def waiter() -> None:
        with pytest.raises(kernel.BrokenResourceError):
            await lot.park()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(waiter)
            nursery.start_soon(traveller)

    kernel.run(main)
    OtherKernel(log.pop()).finish(None)


def test_detaching_for_good_is_no_cancel_point(log: list[Any]) -> None:
    async def traveller() -> None:
        log.append(current_task().coro)
        await permanently_detach_coroutine_object(Value(None))

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.cancel_scope.cancel()
            nursery.start_soon(traveller)
        assert not nursery.cancel_scope.cancelled_caught

    kernel.run(main)
    OtherKernel(log.pop()).finish(None)


@pytest.mark.parametrize("inside", [kernel.open_nursery, kernel.CancelScope])
def test_inside_a_nursery_or_a_scope_a_task_cannot_be_detached(inside: Callable[[], Any]) -> None:
    async def detach() -> None:
        with pytest.raises(RuntimeError, match="cannot be detached inside a nursery or a cancel scope"):
            await permanently_detach_coroutine_object(Value("wrong"))
        await checkpoint()

    async def main() -> str:
        if inside is kernel.open_nursery:
            async with inside():
                await detach()
        else:
            with inside():
                await detach()
        return "went on"

    assert kernel.run(main) == "went on"


@pytest.mark.parametrize("wrong", [None, "result", KeyError()])
def test_a_task_ends_with_an_outcome_or_not_at_all(wrong: Any) -> None:
    async def main() -> str:
        with pytest.raises(TypeError, match=r"must be an outcome\.Value or an outcome\.Error"):
            await permanently_detach_coroutine_object(wrong)
        return "went on"

    assert kernel.run(main) == "went on"


def test_an_outcome_that_was_unwrapped_before_will_do(log: list[Any]) -> None:
    outcome = Value("result")
    outcome.unwrap()

    async def main() -> None:
        log.append(current_task().coro)
        await permanently_detach_coroutine_object(outcome)

    assert kernel.run(main) == "result"
    OtherKernel(log.pop()).finish(None)


def test_outside_the_kernel_nothing_is_detached() -> None:
    coro: Any = permanently_detach_coroutine_object(Value(None))
    with pytest.raises(RuntimeError, match=r"^permanently_detach_coroutine_object\(\) was used outside the kernel"):
        coro.send(None)


def test_a_coroutine_goes_to_another_kernel_and_comes_back_many_times(log: list[Any]) -> None:
    """And it is the same task all along: its context, its scope and its nursery wait for it."""

    async def traveller() -> str:
        task = current_task()
        for journey in range(3):
            await checkpoint()
            with kernel.CancelScope() as scope:
                log.append(await temporarily_detach_coroutine_object(never))
                log.append(await to_the_other_kernel(f"letter {journey}"))
                await reattach_detached_coroutine_object(task, f"back {journey}")
                assert current_task() is task
                assert task.scope is scope
            await checkpoint()
        return "home"

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(traveller, name="traveller")
            (task,) = nursery.child_tasks
            other = OtherKernel(task.coro)
            for journey in range(3):
                await wait_all_tasks_blocked()
                assert task.state == "sleeping"
                other.send(f"hello {journey}")
                other.send(f"reply {journey}")
                assert task.state == "ready"
                assert other.got[-2:] == [f"letter {journey}", f"back {journey}"]
            await wait_all_tasks_blocked()
            assert task.outcome == Value("home")

    kernel.run(main)
    assert log == ["hello 0", "reply 0", "hello 1", "reply 1", "hello 2", "reply 2"]


def test_a_generator_task_can_travel_too(log: list[Any]) -> None:
    def traveller() -> Generator[Any, Any, None]:
        task = current_task()
        log.append((yield from temporarily_detach_coroutine_object(never)))
        yield from reattach_detached_coroutine_object(task, "back")
        yield from checkpoint()
        log.append("home")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(traveller)
            (task,) = nursery.child_tasks
            await wait_all_tasks_blocked()
            other = OtherKernel(task.coro)
            other.send("hello")
            assert other.got == ["back"]

    kernel.run(main)
    assert log == ["hello", "home"]


def test_a_traveller_that_is_cancelled_meanwhile_is_asked_and_may_come_home_first(log: list[Any]) -> None:
    def abort(raise_cancel: RaiseCancel) -> Abort:
        log.append("asked")
        return Abort.FAILED

    async def traveller() -> None:
        task = current_task()
        await temporarily_detach_coroutine_object(abort)
        await reattach_detached_coroutine_object(task, "back")
        log.append("home")  # coming home is no cancel point
        await checkpoint()
        log.append("unreachable")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(traveller)
            (task,) = nursery.child_tasks
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            await kernel.lowlevel.cancel_shielded_checkpoint()
            assert task.state == "sleeping"
            OtherKernel(task.coro).send("hello")
        assert nursery.cancel_scope.cancelled_caught

    kernel.run(main)
    assert log == ["asked", "home"]


def test_a_traveller_that_the_other_kernel_gives_up_is_cancelled_where_it_stands(log: list[Any]) -> None:
    async def traveller() -> None:
        await temporarily_detach_coroutine_object(succeed)
        try:
            await to_the_other_kernel("abroad")
        except kernel.Cancelled:
            log.append("cancelled abroad")
            raise

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(traveller)
            (task,) = nursery.child_tasks
            await wait_all_tasks_blocked()
            OtherKernel(task.coro).send("hello")
            nursery.cancel_scope.cancel()

    kernel.run(main)
    assert log == ["cancelled abroad"]


def test_only_the_coroutine_itself_can_come_back_as_its_task_and_only_if_it_was_away(log: list[Any]) -> None:
    async def impostor(task: Task) -> None:
        with pytest.raises(RuntimeError, match="what runs here is not the coroutine of"):
            await reattach_detached_coroutine_object(task, "wrong")
        log.append("refused")

    async def main() -> None:
        with pytest.raises(RuntimeError, match="is not in wait_task_rescheduled"):
            await reattach_detached_coroutine_object(current_task(), "wrong")
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(quietly_forever)
            (task,) = nursery.child_tasks
            await wait_all_tasks_blocked()
            await impostor(task)
            OtherKernel(impostor(task)).finish(None)
            nursery.cancel_scope.cancel()

    kernel.run(main)
    assert log == ["refused", "refused"]


def test_a_traveller_that_ends_abroad_leaves_a_task_that_can_only_fail() -> None:
    """Nothing is left to be resumed. The attempt is an error of that task, and not of the kernel's."""

    async def traveller() -> None:
        await temporarily_detach_coroutine_object(succeed)
        raise KeyError("abroad")

    async def main() -> str:
        with pytest.raises(ExceptionGroup) as info:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(traveller)
                (task,) = nursery.child_tasks
                await wait_all_tasks_blocked()
                with pytest.raises(KeyError):
                    task.coro.send("hello")
                nursery.cancel_scope.cancel()
        assert info.group_contains(RuntimeError, match="cannot reuse already awaited coroutine")
        return "went on"

    assert kernel.run(main) == "went on"


def test_waits_leave_no_garbage(log: list[Any]) -> None:
    async def main() -> None:
        for end in (lambda it: reschedule(it.task), lambda it: it.scope.cancel()):
            async with kernel.open_nursery() as nursery:
                sleeper = Sleeper(succeed)
                nursery.start_soon(sleeper.main)
                await wait_all_tasks_blocked()
                gc.collect()
                gc.disable()
                end(sleeper)
                await wait_all_tasks_blocked()
                sleeper.ended.clear()
                del sleeper.task
            collected = gc.collect()
            gc.enable()
            log.append(collected)
        assert not current_kernel().farewells

    kernel.run(main)
    assert log == [0, 0]
