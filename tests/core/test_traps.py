"""Traps: what a task yields, what the kernel does with it, and what it says to things that are no traps."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import socket
import warnings
from collections.abc import Awaitable, Callable, Generator, Iterator
from math import inf, nan
from typing import Any

import pytest

import kernel
from kernel.core.loop import BUDGET
from kernel.lowlevel import (
    Kernel,
    Park,
    ParkingLot,
    SleepUntil,
    Task,
    Trap,
    WaitReadable,
    WaitWritable,
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
    consume_budget,
    current_task,
    notify_closing,
    operation,
    wait_readable,
    wait_writable,
)
from kernel.testing import MockClock, wait_all_tasks_blocked

Virtual = Callable[..., Any]
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    yield a, b
    a.close()
    b.close()


class Call(Trap):
    """A user's trap: `arm` and `abort` do what the test says, and everything is written down."""

    def __init__(
        self,
        on_arm: Callable[[Kernel, Task], object] = lambda kernel, task: None,
        on_abort: Callable[[Kernel, Task], bool] = lambda kernel, task: True,
    ) -> None:
        self.log: list[str] = []
        self.on_arm, self.on_abort = on_arm, on_abort

    def arm(self, kernel: Kernel, task: Task) -> None:
        self.log.append("arm")
        self.on_arm(kernel, task)

    def abort(self, kernel: Kernel, task: Task) -> bool:
        self.log.append("abort")
        return self.on_abort(kernel, task)

    def __repr__(self) -> str:
        return "<Call>"


def fail(error: BaseException) -> Callable[..., Any]:
    def failing(*args: object) -> Any:
        raise error

    return failing


# ---- both worlds -------------------------------------------------------------------------------------


@operation
def user_operation() -> Generator[Any, Any, str]:
    yield from checkpoint()
    return "done"


ALL_THAT_RETURN: dict[str, tuple[Callable[[socket.socket], Any], object]] = {
    "checkpoint": (lambda sock: checkpoint(), None),
    "cancel_shielded_checkpoint": (lambda sock: cancel_shielded_checkpoint(), None),
    "checkpoint_if_cancelled": (lambda sock: checkpoint_if_cancelled(), None),
    "consume_budget": (lambda sock: consume_budget(), None),
    "sleep(0)": (lambda sock: kernel.sleep(0), None),
    "sleep(1)": (lambda sock: kernel.sleep(1), None),
    "sleep_until(past)": (lambda sock: kernel.sleep_until(-1), None),
    "sleep_until(7)": (lambda sock: kernel.sleep_until(7), None),
    "wait_readable": (wait_readable, None),
    "wait_readable(int)": (lambda sock: wait_readable(sock.fileno()), None),
    "wait_writable": (wait_writable, None),
    "wait_all_tasks_blocked": (lambda sock: wait_all_tasks_blocked(), None),
    "an operation of the user's": (lambda sock: user_operation(), "done"),
    "a trap": (lambda sock: Call(lambda kernel, task: kernel.wake(task, "woken")), "woken"),
}

ALL_THAT_WAIT: dict[str, Callable[[socket.socket], Any]] = {
    "sleep(inf)": lambda sock: kernel.sleep(inf),
    "sleep_until(inf)": lambda sock: kernel.sleep_until(inf),
    "sleep_forever": lambda sock: kernel.sleep_forever(),
    "wait_readable": wait_readable,
    "wait_writable": wait_writable,
    "park": lambda sock: ParkingLot().park(),
    "a lot as a trap": lambda sock: ParkingLot(),
    "a Park": lambda sock: Park("nothing"),
    "a trap": lambda sock: Call(),
}


def in_async(make: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    async def body() -> Any:
        return await make(*args)

    return body


def in_generator(make: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    def body() -> Any:
        return (yield from make(*args))

    return body


WORLDS = pytest.mark.parametrize("world", [in_async, in_generator])
World = Callable[..., Callable[[], Any]]


@WORLDS
@pytest.mark.parametrize("what", ALL_THAT_RETURN)
def test_every_operation_works_as_main_in_both_worlds(what: str, world: World, virtual: Virtual, pair: Pair) -> None:
    make, expected = ALL_THAT_RETURN[what]
    pair[1].send(b"x")
    assert virtual(world(make, pair[0])) == expected


@WORLDS
@pytest.mark.parametrize("what", ALL_THAT_RETURN)
def test_every_operation_works_in_a_child_in_both_worlds(what: str, world: World, virtual: Virtual, pair: Pair) -> None:
    make, expected = ALL_THAT_RETURN[what]
    pair[1].send(b"x")
    ended: list[object] = []

    def main() -> Generator[Any, Any, None]:
        def body(nursery: kernel.Nursery) -> Generator[Any, Any, Task]:
            nursery.start_soon(world(make, pair[0]))
            yield from checkpoint_if_cancelled()
            return next(iter(nursery.child_tasks))

        task = yield from kernel.within(kernel.open_nursery(), body)
        ended.append(task.outcome.unwrap())

    virtual(main)
    assert ended == [expected]


@WORLDS
@pytest.mark.parametrize("what", ALL_THAT_WAIT)
def test_everything_that_waits_is_left_by_cancelling_in_both_worlds(
    what: str, world: World, virtual: Virtual, pair: Pair
) -> None:
    if what == "wait_writable":
        fill(pair[0])

    async def main() -> None:
        with kernel.move_on_after(3) as scope:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(world(ALL_THAT_WAIT[what], pair[0]))
                await wait_all_tasks_blocked()
                (child,) = nursery.child_tasks
                assert child.state == "sleeping"
        assert scope.cancelled_caught
        assert kernel.current_time() == 3
        assert isinstance(child.outcome.error, kernel.Cancelled)

    virtual(main)


@pytest.mark.parametrize(
    "what", [name for name in ALL_THAT_RETURN if name not in ("cancel_shielded_checkpoint", "a trap")]
)
def test_every_operation_is_a_cancel_point_even_when_it_need_not_block(what: str, virtual: Virtual, pair: Pair) -> None:
    pair[1].send(b"x")

    async def main() -> None:
        with kernel.CancelScope() as scope:
            scope.cancel()
            await ALL_THAT_RETURN[what][0](pair[0])
            raise AssertionError("not reached")
        assert scope.cancelled_caught

    virtual(main)


def fill(sock: socket.socket) -> None:
    try:
        while True:
            sock.send(b"x" * 100_000)
    except BlockingIOError:
        pass


# ---- a trap's life -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 0, "x", (1, 2)])
def test_wake_hands_its_value_to_the_yield(value: object) -> None:
    async def main() -> object:
        task = current_task()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(wake_soon, task, value)
            return await Call()

    async def wake_soon(task: Task, value: object) -> None:
        await wait_all_tasks_blocked()
        kernel.lowlevel.current_kernel().wake(task, value)

    assert kernel.run(main) == value


def test_wake_with_an_error_raises_it_at_the_yield() -> None:
    error = KeyError("told")

    async def main() -> None:
        trap = Call(lambda kernel, task: kernel.wake(task, error=error))
        with pytest.raises(KeyError) as info:
            await trap
        assert info.value is error
        await checkpoint()

    kernel.run(main)


def test_while_a_task_sleeps_its_trap_is_the_trap() -> None:
    async def main() -> None:
        trap = Call()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(in_async(lambda: trap))
            await wait_all_tasks_blocked()
            (child,) = nursery.child_tasks
            assert child.trap is trap
            nursery.cancel_scope.cancel()
            assert child.trap is None
        assert trap.log == ["arm", "abort"]

    kernel.run(main)


def test_a_trap_that_wakes_in_arm_gives_the_others_a_turn_first() -> None:
    log: list[str] = []

    async def other() -> None:
        log.append("other")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other)
            log.append(await Call(lambda kernel, task: kernel.wake(task, "woken at once")))

    kernel.run(main)
    assert log == ["other", "woken at once"]


def test_a_trap_that_wakes_in_arm_has_committed_and_a_cancelled_scope_does_not_abort_it() -> None:
    async def main() -> None:
        trap = Call(lambda kernel, task: kernel.wake(task, "mine"))
        with kernel.CancelScope() as scope:
            scope.cancel()
            assert await trap == "mine"
        assert trap.log == ["arm"]
        assert not scope.cancelled_caught

    kernel.run(main)


def test_a_trap_in_a_cancelled_scope_is_armed_and_aborted() -> None:
    async def main() -> None:
        trap = Call()
        with kernel.CancelScope() as scope:
            scope.cancel()
            await trap
        assert scope.cancelled_caught
        assert trap.log == ["arm", "abort"]

    kernel.run(main)


def test_a_woken_task_is_committed_and_sees_a_later_cancel_at_its_next_cancel_point() -> None:
    log: list[object] = []

    async def main() -> None:
        trap = Call()

        async def child() -> None:
            log.append(await trap)
            await checkpoint()
            log.append("not reached")

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            kernel.lowlevel.current_kernel().wake(task, "the goods")
            nursery.cancel_scope.cancel()
        assert trap.log == ["arm"]

    kernel.run(main)
    assert log == ["the goods"]


@pytest.mark.parametrize("error", [OSError("no such thing"), TypeError("bad"), SystemExit(3), KeyboardInterrupt()])
def test_an_arm_that_raises_raises_in_the_task_which_has_not_slept(error: BaseException) -> None:
    async def main() -> None:
        trap = Call(on_arm=fail(error))
        with pytest.raises(type(error)) as info:
            await trap
        assert info.value is error
        assert current_task().trap is None
        assert trap.log == ["arm"]
        await checkpoint()

    kernel.run(main)


def test_an_arm_that_raises_lets_the_others_run_before_its_task_learns_of_it() -> None:
    log: list[str] = []

    async def other() -> None:
        log.append("other")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other)
            with pytest.raises(OSError, match="no"):
                await Call(on_arm=fail(OSError("no")))
            log.append("main")

    kernel.run(main)
    assert log == ["other", "main"]


def test_an_arm_that_raises_after_it_has_woken_raises_and_the_task_runs_once() -> None:
    def arm(kernel: Kernel, task: Task) -> None:
        kernel.wake(task, "lost")
        raise OSError("too late")

    log: list[str] = []

    async def main() -> None:
        with pytest.raises(OSError, match="too late"):
            await Call(arm)
        log.append("after")
        for _ in range(3):
            await checkpoint()

    kernel.run(main)
    assert log == ["after"]


def test_an_arm_that_raises_in_a_cancelled_scope_is_not_aborted() -> None:
    async def main() -> None:
        trap = Call(on_arm=fail(OSError("no")))
        with kernel.CancelScope() as scope:
            scope.cancel()
            with pytest.raises(OSError, match="no"):
                await trap
        assert trap.log == ["arm"]

    kernel.run(main)


def test_an_abort_that_returns_false_lets_the_task_sleep_until_it_is_woken() -> None:
    log: list[object] = []
    trap = Call(on_abort=lambda kernel, task: False)

    async def child() -> None:
        log.append(await trap)
        try:
            await checkpoint()
        except kernel.Cancelled:
            log.append("cancelled")
            raise

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            nursery.cancel_scope.cancel()
            with kernel.CancelScope(shield=True):
                await wait_all_tasks_blocked()
            log.append(task.state)
            kernel.lowlevel.current_kernel().wake(task, "finished in peace")

    kernel.run(main)
    assert log == ["sleeping", "finished in peace", "cancelled"]
    assert trap.log == ["arm", "abort"]


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(2)])
def test_an_abort_that_raises_raises_in_its_task_and_the_others_are_still_cancelled(error: BaseException) -> None:
    ended: list[object] = []

    async def child(trap: Trap) -> None:
        try:
            await trap
        except BaseException as how:
            ended.append(type(how))

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child, Call())
            nursery.start_soon(child, Call(on_abort=fail(error)))
            nursery.start_soon(child, Call())
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert ended == [kernel.Cancelled, type(error), kernel.Cancelled]

    kernel.run(main)


def test_an_abort_that_wakes_its_task_and_then_fails_has_woken_it() -> None:
    """Waking commits, whatever goes wrong after it: the task gets what it was handed, and the cancellation later."""
    log: list[object] = []

    def abort(kernel: Kernel, task: Task) -> bool:
        kernel.wake(task, "by abort")
        raise ZeroDivisionError

    async def child() -> None:
        log.append(await Call(on_abort=abort))
        try:
            await checkpoint()
        except kernel.Cancelled:
            log.append("cancelled")
            raise

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    kernel.run(main)
    assert log == ["by abort", "cancelled"]


def test_an_abort_that_wakes_its_task_itself_does_not_keep_the_others_from_being_cancelled() -> None:
    ended: list[str] = []

    def abort(kernel: Kernel, task: Task) -> bool:
        kernel.wake(task, "by abort")
        return True

    async def child(name: str, trap: Trap) -> None:
        try:
            await trap
            await checkpoint()
        finally:
            ended.append(name)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child, "wrong", Call(on_abort=abort))
            nursery.start_soon(child, "right", Call())
            await wait_all_tasks_blocked()
            with kernel.CancelScope(shield=True):
                try:
                    nursery.cancel_scope.cancel()
                except RuntimeError:
                    pass  # telling the canceller is fine, stopping half-way is not
                await wait_all_tasks_blocked()
                left = list(nursery.child_tasks)
                for task in left:  # so that the run ends
                    kernel.lowlevel.current_kernel().wake(task)
            assert left == []

    kernel.run(main)
    assert sorted(ended) == ["right", "wrong"]


def test_waking_twice_is_an_error_of_the_waker_and_the_kernel_lives_on() -> None:
    log: list[object] = []

    async def child() -> None:
        log.append(await Call())
        await checkpoint()
        log.append("still here")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child, name="sleeper")
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            wake = kernel.lowlevel.current_kernel().wake
            wake(task, "first")
            with pytest.raises(RuntimeError, match=r"<Task 'sleeper' at 0x[0-9a-f]+, ready> is not asleep"):
                wake(task, "second")
            with pytest.raises(RuntimeError, match="exactly one wake or abort"):
                wake(task, error=OSError("second"))

    kernel.run(main)
    assert log == ["first", "still here"]


def test_a_task_that_was_cancelled_or_runs_or_has_ended_can_not_be_woken() -> None:
    async def main() -> None:
        wake = kernel.lowlevel.current_kernel().wake
        with pytest.raises(RuntimeError, match="running> is not asleep"):
            wake(current_task())
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(in_async(Call))
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            nursery.cancel_scope.cancel()
            with pytest.raises(RuntimeError, match="ready> is not asleep"):
                wake(task)
        with pytest.raises(RuntimeError, match="finished> is not asleep"):
            wake(task)

    kernel.run(main)


def test_one_trap_may_hold_many_tasks() -> None:
    log: list[object] = []
    trap = Call()

    async def child() -> None:
        log.append(await trap)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(child)
            await wait_all_tasks_blocked()
            for number, task in enumerate(sorted(nursery.child_tasks, key=lambda task: id(task))):
                assert task.trap is trap
                kernel.lowlevel.current_kernel().wake(task, number)

    kernel.run(main)
    assert sorted(map(str, log)) == ["0", "1", "2"]


class Duck:
    """Has what a trap needs, and derives from nothing."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def arm(self, kernel: Kernel, task: Task) -> None:
        self.log.append("arm")
        if len(self.log) == 1:
            kernel.wake(task, "quack")

    def abort(self, kernel: Kernel, task: Task) -> bool:
        self.log.append("abort")
        return True


def test_a_trap_need_not_derive_from_trap() -> None:
    duck = Duck()

    def main() -> Generator[Any, Any, None]:
        assert (yield duck) == "quack"
        scope = kernel.CancelScope()
        with scope:
            scope.cancel()
            yield duck
        assert scope.cancelled_caught

    kernel.run(main)
    assert duck.log == ["arm", "arm", "abort"]


def test_an_attribute_error_inside_arm_is_not_taken_for_something_that_is_no_trap() -> None:
    async def main() -> None:
        with pytest.raises(AttributeError, match="'Kernel' object has no attribute 'oops'"):
            await Call(lambda kernel, task: kernel.oops)  # type: ignore[attr-defined]

    kernel.run(main)


def test_the_base_class_has_no_arm_and_no_abort_of_its_own() -> None:
    with pytest.raises(NotImplementedError):
        Trap().arm(None, None)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError):
        Trap().abort(None, None)  # type: ignore[arg-type]


# ---- what is no trap ---------------------------------------------------------------------------------


class ForeignTrap:
    """An object of another library, as its traps yield them."""


ForeignTrap.__module__ = "trio._core._traps"


@operation
def bring(thing: object) -> Generator[Any, Any, Any]:
    """What an awaitable of another library does: yields something of its own."""
    return (yield thing)


def a_generator() -> Generator[Any, Any, None]:
    yield from checkpoint()


FOREIGN: dict[str, tuple[Callable[[], Any], str]] = {
    "an object of another kernel": (lambda: bring(ForeignTrap()), r"something of trio.*no arm\(\) and abort\(\)"),
    "a number": (lambda: bring(42), "yielded 42, which is not a trap"),
    "a tuple, as curio's": (lambda: bring(("_trap_sleep", 1)), "which is not a trap.*curio"),
    "a string": (lambda: bring("x"), "yielded 'x', which is not a trap"),
    "False": (lambda: bring(False), "yielded False, which is not a trap"),
    "a generator": (lambda: bring(a_generator()), "itself. Write `yield from`.* or `await`"),
    "an operation": (lambda: bring(checkpoint()), "itself. Write `yield from`.* or `await`"),
}


def check_refusal(make: Callable[[], Awaitable[object]], text: str) -> None:
    """The TypeError comes in the task, and both the task and the others go on."""
    log: list[str] = []

    async def other() -> None:
        await checkpoint()
        log.append("other")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other)
            with pytest.raises(TypeError, match="(?s)" + text):
                await make()
            assert current_task().trap is None
            await kernel.sleep(1)
            log.append("main")

    kernel.run(main, clock=MockClock(autojump_threshold=0))
    assert log == ["other", "main"]


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_trap_is_a_type_error_in_the_task_and_the_kernel_lives_on(what: str) -> None:
    make, text = FOREIGN[what]
    check_refusal(make, text)


def test_a_coroutine_that_is_yielded_is_named_as_a_missing_await() -> None:
    async def work() -> None:
        raise AssertionError("never runs")

    coro = work()
    check_refusal(lambda: bring(coro), "itself. Write `yield from`.* or `await`")
    coro.close()


def test_an_asyncio_future_is_refused_by_its_name() -> None:
    loop = asyncio.new_event_loop()
    try:
        future = loop.create_future()
        check_refusal(lambda: future, r"<Future pending.*belongs to asyncio.*run asyncio in a thread of its own")
    finally:
        loop.close()


def test_a_trap_of_the_real_trio_is_refused_by_its_name() -> None:
    trio = pytest.importorskip("trio")
    check_refusal(lambda: trio.lowlevel.wait_task_rescheduled(lambda _: None), "something of trio")


def test_a_checkpoint_of_the_real_trio_is_refused_by_its_name_although_it_yields_a_class() -> None:
    trio = pytest.importorskip("trio")
    check_refusal(trio.lowlevel.cancel_shielded_checkpoint, "something of trio")


def test_an_awaitable_of_the_real_curio_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curio = pytest.importorskip("curio")
    check_refusal(lambda: curio.sleep(1), "which is not a trap.*curio")


def test_a_library_of_the_users_own_is_named() -> None:
    class Mine:
        __module__ = "noodles.core"

        def __repr__(self) -> str:
            return "<Mine>"

    check_refusal(lambda: bring(Mine()), r"awaited something of noodles.*<Mine>.*run noodles in a thread")


def test_a_refused_thing_ends_the_run_with_the_type_error_if_nobody_catches_it() -> None:
    def main() -> Generator[Any, Any, None]:
        yield 1

    with pytest.raises(TypeError, match="yielded 1, which is not a trap"):
        kernel.run(main)


# ---- outside the kernel ------------------------------------------------------------------------------

OUTSIDE: dict[str, Callable[[], Any]] = {
    "sleep": lambda: kernel.sleep(1),
    "sleep(0)": lambda: kernel.sleep(0),
    "sleep_until": lambda: kernel.sleep_until(1),
    "sleep_forever": lambda: kernel.sleep_forever(),
    "wait_readable": lambda: wait_readable(0),
    "wait_writable": lambda: wait_writable(1),
    "checkpoint_if_cancelled": lambda: checkpoint_if_cancelled(),
    "consume_budget": lambda: consume_budget(),
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_a_trap_outside_the_kernel_is_a_runtime_error_that_names_it(what: str) -> None:
    name = re.escape(what.partition("(")[0])
    with pytest.raises(RuntimeError, match=rf"^{name}\(\) was used outside the kernel: no kernel\.run"):
        next(iter(OUTSIDE[what]()))


@pytest.mark.parametrize("what", OUTSIDE)
def test_a_trap_inside_asyncio_is_a_runtime_error_that_names_the_cure(what: str) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match=r"Move the call into the function you pass to kernel\.run"):
            await OUTSIDE[what]()

    asyncio.run(main())


@pytest.mark.parametrize(
    "make", [cancel_shielded_checkpoint, lambda: ParkingLot().park(), wait_all_tasks_blocked, Call]
)
def test_asyncio_refuses_the_traps_that_do_not_look_where_they_are(make: Callable[[], Any]) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="Task got bad yield"):
            await make()

    asyncio.run(main())


def test_notify_closing_outside_the_kernel_is_a_runtime_error() -> None:
    with pytest.raises(RuntimeError, match=r"^notify_closing\(\) was used outside the kernel"):
        notify_closing(0)


# ---- sleeping ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [-1, -0.001, -inf, nan])
def test_sleep_refuses_what_is_no_time(seconds: float, virtual: Virtual) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match=re.escape(f"from 0 up, not {seconds!r}")):
            await kernel.sleep(seconds)

    virtual(main)


def test_sleep_until_refuses_nan(virtual: Virtual) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="deadline must not be NaN"):
            await kernel.sleep_until(nan)

    virtual(main)


@pytest.mark.parametrize("bad", ["1", None, object()])
def test_sleep_refuses_what_is_no_number(bad: Any, virtual: Virtual) -> None:
    async def main() -> None:
        with pytest.raises(TypeError):
            await kernel.sleep(bad)
        with pytest.raises(TypeError):
            await kernel.sleep_until(bad)

    virtual(main)


@pytest.mark.parametrize(
    ("make", "end"),
    [
        (lambda: kernel.sleep(0), 10.0),
        (lambda: kernel.sleep(2.5), 12.5),
        (lambda: kernel.sleep_until(-inf), 10.0),
        (lambda: kernel.sleep_until(10), 10.0),
        (lambda: kernel.sleep_until(10.5), 10.5),
    ],
)
def test_a_sleep_ends_exactly_when_it_should(make: Callable[[], Any], end: float, virtual: Virtual) -> None:
    async def main() -> None:
        await kernel.sleep(10)
        await make()
        assert kernel.current_time() == end

    virtual(main)


@pytest.mark.parametrize("make", [lambda: kernel.sleep(0), lambda: kernel.sleep_until(-1), checkpoint])
def test_a_sleep_that_is_over_at_once_still_lets_the_others_run(make: Callable[[], Any], virtual: Virtual) -> None:
    log: list[str] = []

    async def other() -> None:
        log.append("other")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other)
            await make()
            log.append("main")

    virtual(main)
    assert log == ["other", "main"]


def test_a_cancelled_sleep_leaves_no_timer(virtual: Virtual) -> None:
    async def main() -> None:
        with kernel.CancelScope() as scope:
            scope.cancel()
            await kernel.sleep(100)
        assert len(kernel.lowlevel.current_kernel().timers) == 0
        await wait_all_tasks_blocked()
        assert kernel.current_time() == 0

    virtual(main)


def test_sleeping_for_ever_needs_no_timer(virtual: Virtual) -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(kernel.sleep, inf)
            nursery.start_soon(kernel.sleep_until, inf)
            nursery.start_soon(kernel.sleep_forever)
            await wait_all_tasks_blocked()
            assert len(kernel.lowlevel.current_kernel().timers) == 0
            assert {task.state for task in nursery.child_tasks} == {"sleeping"}
            nursery.cancel_scope.cancel()

    virtual(main)


# ---- checkpoints -------------------------------------------------------------------------------------


def test_a_cancel_that_comes_while_a_task_queues_at_a_checkpoint_is_seen() -> None:
    async def main() -> None:
        with kernel.CancelScope() as scope:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(in_async(lambda: bring_cancel(scope)))
                await checkpoint()
                raise AssertionError("not reached")
        assert scope.cancelled_caught

    @operation
    def bring_cancel(scope: kernel.CancelScope) -> Generator[Any, Any, None]:
        scope.cancel()
        yield from cancel_shielded_checkpoint()

    kernel.run(main)


def test_cancel_shielded_checkpoint_lets_the_others_run_and_never_raises() -> None:
    log: list[str] = []

    async def other(scope: kernel.CancelScope) -> None:
        log.append("other")
        scope.cancel()  # also not when it comes while the first one queues

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other, nursery.cancel_scope)
            await cancel_shielded_checkpoint()
            log.append("main")
            await cancel_shielded_checkpoint()
            log.append("cancelled long since")

    kernel.run(main)
    assert log == ["other", "main", "cancelled long since"]


def test_checkpoint_if_cancelled_is_no_schedule_point() -> None:
    log: list[str] = []

    async def other() -> None:
        log.append("other")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(1000):
                await checkpoint_if_cancelled()
            log.append("main")

    kernel.run(main)
    assert log == ["main", "other"]


def test_checkpoint_if_cancelled_raises_each_time() -> None:
    log: list[int] = []

    async def main() -> None:
        with kernel.CancelScope() as scope:
            scope.cancel()
            for number in range(3):
                try:
                    await checkpoint_if_cancelled()
                except kernel.Cancelled:
                    log.append(number)

    kernel.run(main)
    assert log == [0, 1, 2]


def turns_of_another_while(operations: int, make: Callable[[], Any]) -> int:
    """How often another task that only queues has its turn while one task does `operations` operations."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await checkpoint()
            turns += 1

    async def main() -> int:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other)
            await checkpoint()
            start = turns
            for _ in range(operations):
                await make()
            result = turns - start
            nursery.cancel_scope.cancel()
        return result

    return kernel.run(main)


def test_consume_budget_yields_after_128_operations_of_one_step() -> None:
    assert BUDGET == 128
    assert turns_of_another_while(BUDGET, consume_budget) == 0
    assert turns_of_another_while(BUDGET + 1, consume_budget) == 1
    assert turns_of_another_while(10 * (BUDGET + 1), consume_budget) == 10


def test_any_step_starts_with_a_full_budget() -> None:
    @operation
    def some() -> Generator[Any, Any, None]:
        for _ in range(BUDGET):
            yield from consume_budget()
        yield from checkpoint()

    assert turns_of_another_while(5, some) == 5  # only those of its checkpoints


def test_consume_budget_is_a_cancel_point_each_time_and_at_once() -> None:
    log: list[int] = []

    async def main() -> None:
        await consume_budget()
        with kernel.CancelScope() as scope:
            scope.cancel()
            for number in range(3):
                try:
                    await consume_budget()
                except kernel.Cancelled:
                    log.append(number)

    kernel.run(main)
    assert log == [0, 1, 2]


# ---- readiness: arguments (what happens with files is in tests/drivers/test_poller.py) ---------------


@pytest.mark.parametrize("wait", [wait_readable, wait_writable])
def test_a_negative_number_is_refused(wait: Callable[[int], Any]) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match=rf"^{wait.__name__}\(\) got -1, which is no file descriptor"):
            await wait(-1)

    kernel.run(main)


@pytest.mark.parametrize("wait", [wait_readable, wait_writable])
def test_a_closed_socket_is_refused_by_its_name(wait: Callable[[socket.socket], Any]) -> None:
    sock = socket.socket()
    sock.close()

    async def main() -> None:
        with pytest.raises(kernel.ClosedResourceError, match=rf"^{wait.__name__}\(\) got <socket.*closed already$"):
            await wait(sock)

    kernel.run(main)


@pytest.mark.parametrize("wait", [wait_readable, wait_writable])
def test_a_closed_file_object_is_refused_as_a_closed_socket_is(wait: Callable[[Any], Any]) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    file = os.fdopen(reader)
    file.close()

    async def main() -> None:
        with pytest.raises(kernel.ClosedResourceError):
            await wait(file)

    kernel.run(main)


def test_notify_closing_after_close_says_so() -> None:
    sock = socket.socket()
    sock.close()

    async def main() -> None:
        with pytest.raises(kernel.ClosedResourceError, match=r"notify_closing must come before close\(\)"):
            notify_closing(sock)
        with pytest.raises(ValueError, match=r"^notify_closing\(\) got -1"):
            notify_closing(-1)

    kernel.run(main)


def test_notify_closing_of_a_file_nobody_waits_for_does_nothing(pair: Pair) -> None:
    async def main() -> None:
        notify_closing(pair[0])
        notify_closing(pair[0].fileno())

    kernel.run(main)


# ---- what they look like -----------------------------------------------------------------------------


def test_traps_show_what_is_waited_for() -> None:
    assert repr(Park("a green light")) == "<Park on a green light>"
    assert repr(SleepUntil(12.3456)) == "<SleepUntil 12.346>"
    assert repr(WaitReadable(5)) == "<WaitReadable fd=5>"
    assert repr(WaitWritable(6)) == "<WaitWritable fd=6>"


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("sleep(inf)", "<Park on nothing: sleep_forever()>"),
        ("sleep_forever", "<Park on nothing: sleep_forever()>"),
        ("wait_readable", "<WaitReadable fd="),
        ("wait_writable", "<WaitWritable fd="),
        ("park", "<ParkingLot of 0x"),
    ],
)
def test_a_sleeping_task_shows_its_trap(what: str, text: str, pair: Pair) -> None:
    fill(pair[0])

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(in_async(ALL_THAT_WAIT[what], pair[0]), name="it")
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            assert re.match(rf"<Task 'it' at 0x[0-9a-f]+, sleeping on {re.escape(text)}", repr(task))
            nursery.cancel_scope.cancel()

    kernel.run(main)


def test_an_operation_is_both_awaitable_and_iterable() -> None:
    thing = kernel.sleep(1)
    assert hasattr(thing, "__iter__")
    assert isinstance(thing, Generator)
    assert thing.gi_code.co_flags & inspect.CO_ITERABLE_COROUTINE  # or `await` would refuse it
    thing.close()
