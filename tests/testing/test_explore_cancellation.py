"""kernel.testing.explore_cancellation: cancelled at every place in turn, in the closed world and in the real one."""

from __future__ import annotations

import io
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest

import kernel
from kernel.lowlevel import ParkingLot, checkpoint, checkpoint_if_cancelled, consume_budget, wait_readable
from kernel.testing import (
    InvariantError,
    LeakError,
    MockClock,
    ScheduleFailure,
    TooManySteps,
    cancel_target,
    explore,
    explore_cancellation,
    replay,
)
from kernel.testing.schedules import Recorded, cancellations, from_text


def marking(seen: set[str], **places: Callable[[], Any]) -> Callable[[], Any]:
    """A program that awaits each of `places`, and notes in which it was cancelled."""

    async def program() -> None:
        for name, operation in places.items():
            try:
                await operation()
            except kernel.Cancelled:
                seen.add(name)
                raise

    return program


# ---- which places -----------------------------------------------------------------------------------


def test_each_checkpoint_is_cancelled_in_its_turn() -> None:
    seen: set[str] = set()
    result = explore_cancellation(marking(seen, first=checkpoint, second=checkpoint, third=checkpoint))
    assert seen == {"first", "second", "third"}
    assert (result.schedules, result.complete, result.cancelled) == (5, True, 4)  # before the first step, too
    assert str(result) == "all 5 schedules hold, cancelled in 4 of them"


def test_an_operation_that_need_not_block_is_cancelled_too() -> None:
    """Each is in the midst of the only step. In an ordinary run, the budget might be used up there."""
    seen: set[str] = set()
    event = kernel.Event()
    event.set()
    explore_cancellation(marking(seen, first=event.wait, second=consume_budget, third=checkpoint_if_cancelled))
    assert seen == {"first", "second", "third"}


def test_sleepers_are_cancelled_where_they_sleep() -> None:
    seen: set[str] = set()

    async def wait() -> None:
        await ParkingLot().park()

    async def program() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(marking(seen, park=wait))
            await marking(seen, sleep=lambda: kernel.sleep(1))()
            nursery.cancel_scope.cancel()

    explore_cancellation(program)
    assert seen == {"park", "sleep"}


def test_one_who_was_woken_is_cancelled_only_at_the_next_cancel_point() -> None:
    """A place of its own: after the wake, before the step."""
    got: list[str] = []

    async def program() -> None:
        got.append("")
        send, receive = kernel.open_memory_channel[str](0)

        async def taker() -> None:
            got[-1] += await receive.receive()
            await checkpoint()
            got[-1] += ", went on"

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(taker)
            await send.send("taken")

    explore_cancellation(program)
    assert set(got) == {"", "taken", "taken, went on"}


def test_a_shield_hides_its_checkpoints() -> None:
    seen: set[str] = set()

    async def shielded() -> None:
        with kernel.CancelScope(shield=True):
            await checkpoint()
            await consume_budget()

    explore_cancellation(marking(seen, shielded=shielded, after=checkpoint))
    assert seen == {"after"}


async def sleeps() -> None:
    await kernel.sleep(1)


async def works_behind_a_shield() -> None:
    with kernel.CancelScope(shield=True):
        await consume_budget()


async def cancels_itself() -> None:
    with kernel.CancelScope() as scope:
        scope.cancel()
        await consume_budget()


@pytest.mark.parametrize(
    ("program", "places"),
    [
        (sleeps, 3),  # before it has begun, asleep, woken
        (works_behind_a_shield, 1),
        (cancels_itself, 2),  # before it has begun; and while it queues, cancelled as it is
    ],
)
def test_places_at_which_nothing_new_could_happen_are_left_out(program: Any, places: int) -> None:
    assert explore_cancellation(program).cancelled == places


def test_a_block_that_has_cancelled_itself_is_no_target_any_more() -> None:
    async def program() -> None:
        with cancel_target() as target:
            target.cancel()
            await checkpoint()

    assert explore_cancellation(program, cancel="targets").cancelled == 0


def test_the_canceller_is_no_task() -> None:
    """Whose step was the last one has nothing to do with it; an abort function that asks must not be told so."""
    asked: set[bool] = set()

    async def program() -> None:
        def abort(raise_cancel: object) -> kernel.lowlevel.Abort:
            asked.add(kernel.lowlevel.in_kernel_task())
            return kernel.lowlevel.Abort.SUCCEEDED

        async def wake(sleeper: kernel.lowlevel.Task) -> None:
            await checkpoint()
            await checkpoint()
            kernel.lowlevel.reschedule(sleeper)

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(wake, kernel.lowlevel.current_task())
            await kernel.lowlevel.wait_task_rescheduled(abort)

    explore_cancellation(program)
    assert False in asked  # who falls asleep though cancelled is asked in its own step, in every kernel


def test_the_uncancelled_program_must_hold_as_well() -> None:
    async def program() -> None:
        raise LookupError("from the start")

    with pytest.raises(ScheduleFailure, match=r"(?s)LookupError: from the start.*Nobody was cancelled") as info:
        explore_cancellation(program)
    assert info.value.schedule == "0"


def test_a_program_that_waits_for_ever_is_cancelled_in_the_end() -> None:
    async def serve() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(kernel.sleep_forever)
            nursery.start_soon(checkpoint)

    assert explore_cancellation(serve).complete
    with pytest.raises(ScheduleFailure) as info:
        explore(serve)  # here nobody will ever come
    assert isinstance(info.value.error, TooManySteps)


# ---- whom -------------------------------------------------------------------------------------------


def test_each_task_is_cancelled_alone_and_the_others_go_on() -> None:
    ends: set[tuple[str, ...]] = set()

    async def program() -> None:
        ended = []

        async def child(name: str) -> None:
            await checkpoint()
            await checkpoint()
            ended.append(name)

        async with kernel.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(child, name)
        ends.add(tuple(ended))

    explore_cancellation(program, cancel="tasks")
    assert ends == {("a", "b", "c"), ("b", "c"), ("a", "c"), ("a", "b")}  # or main was, and has not come so far


def test_a_function_may_say_whom() -> None:
    ended: list[str] = []

    async def program() -> None:
        async with kernel.open_nursery() as nursery:
            for name in ("reader", "writer"):
                nursery.start_soon(marking(cancelled, **{name: checkpoint}), name=name)
        ended.append("main")

    cancelled: set[str] = set()
    result = explore_cancellation(program, cancel=lambda task: task.name == "writer")
    assert cancelled == {"writer"}
    assert len(ended) == result.schedules + 1  # it ends each time, also the first time, when nobody is cancelled
    assert result.cancelled is not None
    assert result.cancelled >= 3


def test_a_block_may_be_offered_and_what_follows_must_still_work() -> None:
    left: set[tuple[bool, int]] = set()

    async def program() -> None:
        send, _receive = kernel.open_memory_channel[int](2)
        with cancel_target() as target:
            await send.send(1)
            await send.send(2)
        assert isinstance(target, kernel.CancelScope)
        left.add((target.cancelled_caught, send.statistics().current_buffer_used))
        await checkpoint()

    explore_cancellation(program, cancel="targets")
    assert left == {(True, 0), (True, 1), (False, 2)}
    kernel.run(program)  # and it is nothing special in an ordinary run


def test_tasks_of_the_kernel_itself_are_left_alone() -> None:
    names: set[str] = set()

    def note(task: kernel.lowlevel.Task) -> bool:
        names.add(task.name)
        return True

    async def system() -> None:
        await kernel.sleep_forever()

    async def program() -> None:
        kernel.lowlevel.spawn_system_task(system, name="system")
        await checkpoint()

    explore_cancellation(program, cancel=note)
    assert len(names) == 1
    assert next(iter(names)).endswith("program")


# ---- what is a failure ------------------------------------------------------------------------------


def loses_an_item() -> Any:
    """A queue whose `get` takes the item, and only then looks for a cancellation."""
    books: dict[str, int] = {}

    async def program() -> None:
        books.update(sent=0, received=0, left=0)
        items = [1, 2]
        books["sent"] = len(items)
        try:
            for _ in range(2):
                item = items.pop()
                await consume_budget()
                books["received"] += bool(item)
        finally:
            books["left"] = len(items)

    return program, books


def test_an_item_that_a_cancellation_loses_is_found() -> None:
    program, books = loses_an_item()
    with pytest.raises(ScheduleFailure) as info:
        explore_cancellation(program, check=lambda: books["sent"] == books["received"] + books["left"])
    failure = info.value
    assert isinstance(failure.error, InvariantError)
    assert "The program was cancelled" in str(failure)
    assert "kernel.testing.replay(" in str(failure)
    assert "cancel='program'" in str(failure)


def test_a_check_that_raises_is_a_failure_with_that_error() -> None:
    def check() -> None:
        raise LookupError("the books are wrong")

    with pytest.raises(ScheduleFailure, match="the books are wrong"):
        explore_cancellation(checkpoint, check=check)  # type: ignore[arg-type]


def test_the_invariant_is_checked_between_the_steps_of_each_run() -> None:
    state = {"open": 0}

    async def program() -> None:
        state["open"] = 0
        await checkpoint()
        state["open"] += 1
        try:
            await checkpoint()
        except kernel.Cancelled:
            with kernel.CancelScope(shield=True):
                state["open"] += 1
                await checkpoint()
                state["open"] -= 1
            raise
        finally:
            state["open"] -= 1

    assert explore_cancellation(program, check=lambda: state["open"] == 0).complete
    with pytest.raises(ScheduleFailure):
        explore_cancellation(program, invariant=lambda: state["open"] < 2)


def test_an_error_that_a_cancellation_turns_into_is_a_failure() -> None:
    async def program() -> None:
        try:
            await checkpoint()
        except kernel.Cancelled:
            raise ValueError("so what?") from None

    with pytest.raises(ScheduleFailure, match="ValueError: so what"):
        explore_cancellation(program)
    assert explore_cancellation(program, may_raise=ValueError).complete
    assert explore_cancellation(program, may_raise=(KeyError, ValueError)).complete


def test_errors_of_the_others_may_be_allowed_for_also_in_groups() -> None:
    async def program() -> None:
        lock = kernel.Lock()

        async def careless() -> None:
            await lock.acquire()
            await checkpoint()
            lock.release()

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(careless, name="ann")
            nursery.start_soon(careless, name="ben")

    with pytest.raises(ScheduleFailure, match=r"Task 'ann' was cancelled"):
        explore_cancellation(program, cancel="tasks")
    assert explore_cancellation(program, cancel="tasks", may_raise=kernel.BrokenResourceError).complete


def test_errors_are_allowed_for_only_if_somebody_was_cancelled() -> None:
    async def program() -> None:
        raise ValueError

    with pytest.raises(ScheduleFailure, match="Nobody was cancelled"):
        explore_cancellation(program, may_raise=ValueError)


def test_a_cancelled_that_gets_into_other_hands_is_a_failure() -> None:
    """It belongs to the scope of the task that was cancelled, and no scope of another task will catch it."""

    async def program() -> None:
        caught: list[kernel.Cancelled] = []

        async def child() -> None:
            try:
                await checkpoint()
            except kernel.Cancelled as cancelled:
                caught.append(cancelled)
                raise

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child, name="child")
        if caught:
            raise caught.pop()

    with pytest.raises(ScheduleFailure, match="Task 'child' was cancelled") as info:
        explore_cancellation(program, cancel=lambda task: task.name == "child")
    assert isinstance(info.value.error, kernel.Cancelled)


def test_a_deadlock_after_a_cancellation_is_a_failure() -> None:
    async def program() -> None:
        event = kernel.Event()

        async def sets() -> None:
            await checkpoint()
            event.set()

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sets, name="sets")
            nursery.start_soon(event.wait, name="waits")

    with pytest.raises(ScheduleFailure, match="Task 'sets' was cancelled") as info:
        explore_cancellation(program, cancel="tasks")
    assert isinstance(info.value.error, kernel.Deadlock)


def test_one_who_does_not_leave_is_a_failure() -> None:
    async def program() -> None:
        try:
            await checkpoint()
        except kernel.Cancelled:
            with kernel.CancelScope(shield=True):
                await kernel.sleep_forever()

    with pytest.raises(ScheduleFailure, match="its tasks sleep") as info:
        explore_cancellation(program)
    assert isinstance(info.value.error, TooManySteps)


def test_one_who_eats_cancellations_for_ever_is_a_failure() -> None:
    async def program() -> None:
        for _ in range(10**9):
            try:
                await checkpoint()
            except kernel.Cancelled:
                continue
            return

    with pytest.raises(ScheduleFailure) as info:
        explore_cancellation(program, max_steps=100)
    assert isinstance(info.value.error, TooManySteps)


def test_an_open_async_generator_is_a_leak() -> None:
    async def numbers() -> Any:
        yield 1
        yield 2

    async def program() -> None:
        generator = numbers()
        await anext(generator)
        await checkpoint()
        await generator.aclose()

    with pytest.raises(ScheduleFailure, match=r"the async generator .*numbers, which is not at its end") as info:
        explore_cancellation(program)
    assert isinstance(info.value.error, LeakError)
    assert explore_cancellation(program, may_leak=True).complete


def test_so_is_one_that_somebody_keeps() -> None:
    kept: list[Any] = []

    async def numbers() -> Any:
        yield 1

    async def program() -> None:
        kept.append(numbers())
        await anext(kept[-1])

    with pytest.raises(ScheduleFailure, match="which is not at its end"):
        explore_cancellation(program)


def test_a_timer_that_is_left_is_a_leak() -> None:
    class Forgets(kernel.lowlevel.Trap):
        timer: Any = None

        def arm(self, kernel: Any, task: Any) -> None:
            kernel.timers.add(10.0, self)
            kernel.wake(task)

        def expire(self, kernel: Any) -> None: ...

    async def program() -> None:
        await Forgets()

    with pytest.raises(ScheduleFailure, match="1 timers"):
        explore_cancellation(program)


# ---- how it is told ---------------------------------------------------------------------------------


async def bad_cleanup() -> None:
    async def careless() -> None:
        try:
            await kernel.sleep(1)
        except kernel.Cancelled:
            raise OSError("while cleaning up") from None

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(careless, name="careless")
        nursery.start_soon(kernel.sleep, 0.5, name="careful")


def is_careless(task: kernel.lowlevel.Task) -> bool:
    return task.name == "careless"


def test_a_failure_tells_whom_when_and_where_and_can_be_replayed() -> None:
    with pytest.raises(ScheduleFailure) as info:
        explore_cancellation(bad_cleanup, cancel=is_careless)
    text = str(info.value)
    assert "OSError: while cleaning up" in text
    assert "\nTask 'careless' was cancelled before step 2.\n" in text
    assert "<- cancelled" in text
    assert "replay(bad_cleanup, '@1', cancel=is_careless)" in text
    shown = io.StringIO()
    with pytest.raises(ExceptionGroup):
        replay(bad_cleanup, info.value.schedule, cancel=is_careless, file=shown)
    assert shown.getvalue().strip() in text


def test_a_cancellation_inside_a_step_is_told_with_its_line() -> None:
    program, _ = loses_an_item()
    shown = io.StringIO()
    replay(program, "@2", cancel="program", file=shown)
    assert f"cancelled in line {program.__code__.co_firstlineno + 7}, checkpoint" in shown.getvalue()

    async def fails() -> None:
        try:
            await program()
        except kernel.Cancelled:
            raise OSError from None

    with pytest.raises(ScheduleFailure) as info:
        explore_cancellation(fails, cancel="program", check=lambda: False, may_raise=OSError)
    assert "Nobody was cancelled." in str(info.value)
    with pytest.raises(OSError):
        replay(fails, "@2", cancel="program", file=io.StringIO())


@pytest.mark.parametrize(("place", "who", "text"), [(0, 1, "0"), (7, 1, "@7"), (7, 2, "@7:2")])
def test_a_cancellation_is_written_by_its_place(place: int, who: int, text: str) -> None:
    assert str(from_text(text)) == str(Recorded((), place, who)) == text


def test_all_places_are_tried_with_all_who_can_be_cancelled_there() -> None:
    tried = []
    for schedule in cancellations():
        for options in (3, 2):
            if choice := schedule.cancel(options):
                tried.append((options, choice))
    assert tried == [(3, 1), (3, 2), (2, 1)]


# ---- together with schedules ------------------------------------------------------------------------


async def handover() -> None:
    """Right in first come, first served, cancelled or not; and in any order, if nobody is cancelled."""
    waiting: list[kernel.Event] = []
    free = True

    async def use() -> None:
        nonlocal free
        if not free:
            event = kernel.Event()
            waiting.append(event)
            await event.wait()  # who is cancelled here stays in the row
        free = False
        try:
            await checkpoint()
        finally:
            free = True
            if waiting:
                waiting.pop(0).set()

    async with kernel.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(use)


def test_all_places_of_all_schedules_can_be_cancelled() -> None:
    """All orders of three tasks, and all of two if one was cancelled in time."""
    seen = set()

    async def program() -> None:
        order: list[str] = []

        async def child(name: str) -> None:
            await checkpoint()
            order.append(name)

        async with kernel.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(child, name, name=name)
        seen.add("".join(order))

    result = explore(program, cancel=lambda task: task.name == "b")
    assert seen == {"abc", "acb", "bac", "bca", "cab", "cba", "ac", "ca"}
    assert result.complete
    assert result.cancelled is not None
    assert 0 < result.cancelled < result.schedules


@pytest.mark.parametrize("strategy", ["exhaustive", "random", "pct"])
def test_a_bug_that_takes_an_order_and_a_cancellation_is_found(strategy: Any) -> None:
    assert explore(handover).complete
    with pytest.raises(ScheduleFailure, match=r"Task '.*use' was cancelled") as info:
        explore(handover, strategy=strategy, cancel="tasks", schedules=20_000)
    assert isinstance(info.value.error, kernel.Deadlock)
    with pytest.raises(kernel.Deadlock):
        replay(handover, info.value.schedule, cancel="tasks", file=io.StringIO())


# ---- the real world ---------------------------------------------------------------------------------


async def over_a_socket() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)

        async def read() -> None:
            await wait_readable(left)
            assert left.recv(10) == b"x"

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(read, name="reader")
            await kernel.sleep(0.001)
            right.send(b"x")


@pytest.mark.parametrize("cancel", ["program", "tasks"])
def test_real_sockets_can_be_used(cancel: Any) -> None:
    result = explore_cancellation(over_a_socket, cancel=cancel, real=True)
    assert result.cancelled is not None
    assert result.cancelled >= 6


def test_virtual_time_can_be_had_beside_real_sockets() -> None:
    async def program() -> None:
        await over_a_socket()
        await kernel.sleep(3600)

    assert explore_cancellation(program, real=True, clock=MockClock(autojump_threshold=0)).complete


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_file_that_a_cancellation_leaves_open_is_a_leak() -> None:
    kept: list[socket.socket] = []

    async def program() -> None:
        left, right = socket.socketpair()
        kept[:] = left, right
        await checkpoint()
        left.close()
        right.close()

    with pytest.raises(ScheduleFailure, match=r"the open file \d+, socket:") as info:
        explore_cancellation(program, real=True)
    assert isinstance(info.value.error, LeakError)
    assert "real=True" in str(info.value)
    for end in kept:
        end.close()


def test_a_real_run_that_hangs_after_a_cancellation_is_a_failure() -> None:
    async def program() -> None:
        left, right = socket.socketpair()
        with left, right:
            try:
                await checkpoint()
            except kernel.Cancelled:
                with kernel.CancelScope(shield=True):
                    await wait_readable(left)

    with pytest.raises(ScheduleFailure, match="nothing happens any more") as info:
        explore_cancellation(program, real=True, seconds=0.05)
    assert isinstance(info.value.error, TooManySteps)


def test_threads_can_be_used_in_a_real_run() -> None:
    async def program() -> None:
        await kernel.to_thread.run_sync(int, "7")

    result = explore_cancellation(program, real=True)
    assert result.cancelled is not None
    assert result.cancelled >= 3


def test_a_real_run_can_be_replayed() -> None:
    shown = io.StringIO()
    replay(over_a_socket, "@3", cancel="program", real=True, file=shown)
    assert "<- cancelled" in shown.getvalue()


def test_it_cannot_be_called_inside_a_run() -> None:
    async def main() -> None:
        with pytest.raises(ScheduleFailure, match="inside a kernel that is running"):
            explore_cancellation(checkpoint)  # type: ignore[arg-type]

    kernel.run(main)
