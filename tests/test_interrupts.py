"""Ctrl-C: it strikes the program's code, and nothing else; it is never lost, and leaves nothing behind.

Most of these raise SIGINT in their own process. At the end stand real children: a few hundred runs that are struck at
random moments (tests/bench/ctrl_c.py; `CTRL_C_RUNS=20000` makes it as many), a debugger and a prompt in a terminal.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bench.ctrl_c import strike
from outcome import Value, capture

import kernel
from kernel import interrupts
from kernel.core.task import Task, here
from kernel.drivers.poller import default_poller
from kernel.lowlevel import (
    Abort,
    ParkingLot,
    Trap,
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
    consume_budget,
    current_kernel,
    current_kernel_token,
    current_task,
    currently_ki_protected,
    disable_ki_protection,
    enable_ki_protection,
    operation,
    reschedule,
    spawn_system_task,
    wait_readable,
    wait_task_rescheduled,
)
from kernel.testing import MockClock

ROOT = Path(__file__).parent.parent


def ctrl_c() -> None:
    """A SIGINT, now: the handler runs before this returns."""
    signal.raise_signal(signal.SIGINT)


@enable_ki_protection
def protected_ctrl_c() -> None:
    """A SIGINT as if it had come while the kernel's own code ran."""
    signal.raise_signal(signal.SIGINT)


def innermost(error: BaseException) -> str:
    """The innermost function that is not the handler."""
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return [name for name in names if name != "_handle"][-1]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Each test leaves the process's handler and its wake-up fd as they were."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.set_wakeup_fd(-1) == -1


@pytest.fixture
def wreckage() -> Iterator[None]:
    """For runs that are broken off: what their coroutines say when they are collected is not the subject."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda unraisable: None)
        yield
        gc.collect()


# ---- in the program's code: on the spot --------------------------------------------------------------


def test_ctrl_c_strikes_the_main_task_when_that_runs() -> None:
    async def main() -> None:
        await checkpoint()
        ctrl_c()
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt) as info:
        kernel.run(main)
    assert innermost(info.value) == "ctrl_c"
    assert info.value.__cause__ is None


def test_ctrl_c_strikes_the_child_that_runs_and_the_others_are_cancelled() -> None:
    log: list[str] = []

    async def other() -> None:
        try:
            await kernel.sleep_forever()
        except kernel.Cancelled as cancelled:
            log.append(f"other: {cancelled.source}")
            raise

    async def child() -> None:
        await checkpoint()
        try:
            ctrl_c()
        except KeyboardInterrupt:
            log.append("child: struck")
            raise

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other)
            nursery.start_soon(child)

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)
    assert log == ["child: struck", "other: KeyboardInterrupt"]


def test_a_plain_generator_is_struck_like_a_coroutine() -> None:
    def main() -> Generator[Any, Any, None]:
        yield from checkpoint()
        ctrl_c()

    with pytest.raises(KeyboardInterrupt) as info:
        kernel.run(main)
    assert innermost(info.value) == "ctrl_c"


STDLIB: dict[str, Callable[[], object]] = {
    "sorted": lambda: sorted([1, 2], key=lambda number: ctrl_c()),
    "json": lambda: json.dumps(object(), default=lambda thing: ctrl_c()),
    "re": lambda: re.sub("a", lambda match: str(ctrl_c()), "aa"),
    "contextlib": lambda: contextmanager(lambda: (ctrl_c() for _ in range(1)))().__enter__(),
    "recursion": lambda: _dive(300),
}


def _dive(levels: int) -> None:
    if levels:
        _dive(levels - 1)
    else:
        ctrl_c()


@pytest.mark.parametrize("call", STDLIB.values(), ids=STDLIB)
def test_code_that_the_program_calls_counts_as_the_programs(call: Callable[[], object]) -> None:
    log: list[str] = []

    async def main() -> None:
        try:
            call()
        except KeyboardInterrupt:
            log.append("on the spot")
            raise

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)
    assert log == ["on the spot"]


def test_a_line_of_the_standard_librarys_is_the_programs_too() -> None:
    async def main() -> None:
        def default(thing: object) -> str:
            encoder = sys._getframe(1)
            assert encoder.f_globals["__name__"] == "json.encoder"
            assert not interrupts._is_protected(encoder, current_kernel())
            return ""

        json.dumps([object()], default=default, indent=1)

    kernel.run(main)


async def struck() -> None:
    await checkpoint()
    assert not currently_ki_protected()
    ctrl_c()
    raise AssertionError("not reached")


class Awaitable:
    def __await__(self) -> Generator[Any, Any, None]:
        yield from checkpoint()
        ctrl_c()


def generator_within() -> Generator[Any, Any, None]:
    def body(nursery: kernel.Nursery) -> Generator[Any, Any, None]:
        yield from checkpoint()
        ctrl_c()

    yield from kernel.within(kernel.open_nursery(), body)


async def spawned() -> None:
    async with kernel.open_nursery() as nursery:
        await nursery.spawn(struck)


async def service() -> None:
    async with kernel.open_nursery() as nursery:
        nursery.start_service_soon(struck)
        await kernel.sleep_forever()


async def safe_channel() -> None:
    @kernel.as_safe_channel
    async def numbers() -> Any:
        await struck()
        yield 1

    async with numbers() as channel:
        await channel.receive()


HOSTS: dict[str, Callable[[], Any]] = {
    "an awaitable": Awaitable,
    "within": generator_within,
    "gather": partial(kernel.gather, struck),
    "race": partial(kernel.race, struck),
    "map_concurrently": partial(kernel.map_concurrently, lambda _: struck(), [1]),
    "spawn": spawned,
    "service": service,
    "as_safe_channel": safe_channel,
}


@pytest.mark.parametrize("main", HOSTS.values(), ids=HOSTS)
def test_the_programs_code_is_struck_inside_of_ours_that_only_hosts_it(main: Callable[[], Any]) -> None:
    with pytest.raises(KeyboardInterrupt) as info:
        kernel.run(main)
    errors: list[BaseException] = [info.value.__cause__ or info.value]
    for error in errors:
        errors += error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    (struck,) = [error for error in errors if isinstance(error, KeyboardInterrupt)]
    assert innermost(struck) == "ctrl_c"


def test_lines_of_the_loop_are_protected_whatever_the_last_step_was() -> None:
    answers: set[bool] = set()

    class Looking(deque[Task]):
        """The loop asks for its length after each step."""

        def __len__(self) -> int:
            if here.kernel is not None:
                answers.add(interrupts._is_protected(sys._getframe(1), here.kernel))
            return super().__len__()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(checkpoint)
            await kernel.sleep(0.001)

    kernel.run(main, ready=Looking())
    assert answers == {True}


def test_lines_of_a_host_are_protected() -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.spawn(checkpoint)
            (child,) = nursery.child_tasks
            host = child.coro.gi_frame  # type: ignore[union-attr]
            assert interrupts._is_protected(host, current_kernel())

    kernel.run(main)


# ---- in the kernel's code: never -----------------------------------------------------------------------


class Interrupting(Trap):
    """Interrupts in `arm` or `abort`, which are called by the loop, and notes that these were not broken off."""

    def __init__(self, log: list[str], *, aborting: bool = False) -> None:
        self.log = log
        self.aborting = aborting

    def arm(self, kernel: Any, task: Task) -> None:
        if self.aborting:
            return
        ctrl_c()
        self.log.append("went on")
        kernel.wake(task)

    def abort(self, kernel: Any, task: Task) -> bool:
        ctrl_c()
        self.log.append("went on")
        return True


class InterruptingClock(MockClock):
    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def current_time(self) -> float:
        if here.kernel is not None and here.kernel.current is not None and not self.log:
            ctrl_c()
            self.log.append("went on")
        return super().current_time()


def in_arm(log: list[str]) -> Any:
    return Interrupting(log).__await__


def in_abort(log: list[str]) -> Any:
    async def place() -> None:
        with kernel.move_on_after(0):
            await Interrupting(log, aborting=True)

    return place


def in_a_call_from_outside(log: list[str]) -> Any:
    def call() -> None:
        ctrl_c()
        log.append("went on")

    async def place() -> None:
        current_kernel_token().run_sync_soon(call)
        await checkpoint()
        await kernel.sleep_forever()

    return place


def in_a_scopes_entering(log: list[str]) -> Any:
    async def place() -> None:
        with kernel.move_on_after(5):
            pass

    return place


def in_a_system_task(log: list[str]) -> Any:
    async def child() -> None:
        ctrl_c()
        log.append("went on")

    async def system() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)

    async def place() -> None:
        spawn_system_task(system)
        await kernel.sleep_forever()

    return place


def in_del(log: list[str]) -> Any:
    class Dying:
        def __del__(self) -> None:
            ctrl_c()
            log.append("went on")

    async def place() -> None:
        Dying()

    return place


def in_a_finalizer(log: list[str]) -> Any:
    def last_words() -> None:
        ctrl_c()
        log.append("went on")

    async def place() -> None:
        weakref.finalize(weakref.WeakSet(), last_words)

    return place


def in_a_weak_container(log: list[str]) -> Any:
    class Key:
        pass

    class Noisy(dict[Any, Any]):
        def __delitem__(self, key: object) -> None:
            ctrl_c()
            log.append("went on")
            super().__delitem__(key)

    async def place() -> None:
        known: Any = weakref.WeakKeyDictionary()
        known.data = Noisy()
        known[Key()] = None
        assert not known.data

    return place


def in_protected_code(log: list[str]) -> Any:
    async def place() -> None:
        protected_ctrl_c()
        log.append("went on")

    return place


def in_abort_fn(log: list[str]) -> Any:
    def abort_fn(raise_cancel: object) -> Abort:
        ctrl_c()
        log.append("went on")
        return Abort.SUCCEEDED

    async def place() -> None:
        with kernel.move_on_after(0):
            await wait_task_rescheduled(abort_fn)

    return place


PLACES = [
    in_arm, in_abort, in_a_call_from_outside, in_a_scopes_entering, in_a_system_task, in_del, in_a_finalizer,
    in_a_weak_container, in_protected_code, in_abort_fn,
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_what_must_not_be_broken_off_goes_on_and_main_gets_it_at_its_next_checkpoint(place: Callable[..., Any]) -> None:
    log: list[str] = []

    async def main() -> None:
        body = place(log)
        try:
            try:
                await (body() if place is not in_arm else Interrupting(log))
            finally:
                await checkpoint()
        except KeyboardInterrupt:
            log.append("main")
            raise
        raise AssertionError("not reached")

    clock = InterruptingClock(log) if place is in_a_scopes_entering else None
    with pytest.raises(KeyboardInterrupt) as info:
        kernel.run(main, clock=clock)
    assert log == ["went on", "main"]
    assert innermost(info.value) in ("checkpoint", "sleep_forever")


# ---- the main task at its next checkpoint --------------------------------------------------------------


async def asleep_in_sleep_forever() -> None:
    await kernel.sleep_forever()


async def asleep_until_a_deadline() -> None:
    await kernel.sleep(1000)


async def asleep_in_a_lot() -> None:
    await ParkingLot().park()


async def asleep_until_readable() -> None:
    reader, writer = os.pipe()
    try:
        await wait_readable(reader)
    finally:
        os.close(reader)
        os.close(writer)


async def asleep_until_rescheduled() -> None:
    await wait_task_rescheduled(lambda raise_cancel: Abort.SUCCEEDED)


async def asleep_until_rescheduled_with_the_interrupt() -> None:
    def abort_fn(raise_cancel: Callable[[], Any]) -> Abort:
        reschedule(task, capture(raise_cancel))
        return Abort.FAILED

    task = current_task()
    await wait_task_rescheduled(abort_fn)


async def queueing_at_a_checkpoint() -> None:
    while True:
        await checkpoint()


async def asleep_in_start() -> None:
    async def never_started(task_status: object) -> None:
        await kernel.sleep_forever()

    async with kernel.open_nursery() as nursery:
        await nursery.start(never_started)


SLEEPS = [
    asleep_in_sleep_forever, asleep_until_a_deadline, asleep_in_a_lot, asleep_until_readable, asleep_until_rescheduled,
    asleep_until_rescheduled_with_the_interrupt, queueing_at_a_checkpoint, asleep_in_start,
]  # fmt: skip


async def press(times: int = 1) -> None:
    """In a system task: Ctrl-C once everybody sleeps."""
    for _ in range(times):
        for _ in range(5):
            await checkpoint()
        protected_ctrl_c()


@pytest.mark.parametrize("shield", [False, True])
@pytest.mark.parametrize("sleep", SLEEPS)
def test_main_gets_it_wherever_it_waits_shielded_or_not(sleep: Callable[[], Any], shield: bool) -> None:
    log: list[str] = []

    async def main() -> None:
        spawn_system_task(press)
        with kernel.CancelScope(shield=shield):
            try:
                await sleep()
            except (KeyboardInterrupt, BaseExceptionGroup):
                log.append("main")
                raise

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)
    assert log == ["main"]


def test_main_that_waits_for_children_gets_it_as_an_error_of_that_nursery() -> None:
    log: list[str] = []

    async def child() -> None:
        try:
            await kernel.sleep_forever()
        except kernel.Cancelled as cancelled:
            log.append(f"{cancelled.source}, {cancelled.reason}")
            raise

    async def main() -> None:
        spawn_system_task(press)
        async with kernel.open_nursery():
            try:
                async with kernel.open_nursery() as nursery:
                    nursery.start_soon(child)
            finally:
                log.append("main")

    with pytest.raises(KeyboardInterrupt) as info:
        kernel.run(main)
    assert log == ["KeyboardInterrupt, it ended with KeyboardInterrupt", "main"]
    outer = info.value.__cause__
    assert isinstance(outer, BaseExceptionGroup)
    (inner,) = outer.exceptions
    assert isinstance(inner, BaseExceptionGroup)
    assert [type(error) for error in inner.exceptions] == [KeyboardInterrupt]


async def lock_is_free() -> None:
    lock = kernel.Lock()
    protected_ctrl_c()
    try:
        await lock.acquire()
    finally:
        assert not lock.locked()


async def semaphore_is_free() -> None:
    semaphore = kernel.Semaphore(1)
    protected_ctrl_c()
    try:
        await semaphore.acquire()
    finally:
        assert semaphore.value == 1


async def limiter_is_free() -> None:
    limiter = kernel.CapacityLimiter(1)
    protected_ctrl_c()
    try:
        await limiter.acquire()
    finally:
        assert limiter.available_tokens == 1


async def event_is_set() -> None:
    event = kernel.Event()
    event.set()
    protected_ctrl_c()
    await event.wait()


async def channel_has_room() -> None:
    send, receive = kernel.open_memory_channel[int](1)
    protected_ctrl_c()
    try:
        await send.send(1)
    finally:
        assert receive.statistics().current_buffer_used == 0


async def channel_has_something() -> None:
    send, receive = kernel.open_memory_channel[int](1)
    send.send_nowait(1)
    protected_ctrl_c()
    try:
        await receive.receive()
    finally:
        assert receive.statistics().current_buffer_used == 1


async def budget_is_left() -> None:
    protected_ctrl_c()
    await consume_budget()


async def is_not_cancelled() -> None:
    protected_ctrl_c()
    await checkpoint_if_cancelled()


READY = [
    lock_is_free, semaphore_is_free, limiter_is_free, event_is_set, channel_has_room, channel_has_something,
    budget_is_left, is_not_cancelled,
]  # fmt: skip


@pytest.mark.parametrize("operation", READY)
def test_an_operation_that_need_not_wait_raises_it_and_has_done_nothing(operation: Callable[[], Any]) -> None:
    log: list[str] = []

    async def main() -> None:
        await operation()
        log.append("not reached")

    with pytest.raises(KeyboardInterrupt) as info:
        kernel.run(main)
    assert log == []
    assert info.value.__context__ is None


def test_what_main_was_woken_with_arrives_first() -> None:
    log: list[object] = []

    async def main() -> None:
        send, receive = kernel.open_memory_channel[str](0)

        async def give() -> None:
            await checkpoint()
            with kernel.CancelScope(shield=True):
                await send.send("a value")  # wakes main
            protected_ctrl_c()

        spawn_system_task(give)
        log.append(await receive.receive())
        await consume_budget()
        log.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)
    assert log == ["a value"]


def test_next_checkpoint_means_the_next_one() -> None:
    """Main is woken, so it can't have it at once; then it comes by many checkpoints, which one pass would hold."""
    passed: list[int] = []

    async def main() -> None:
        lot = ParkingLot()

        async def wake() -> None:
            await checkpoint()
            lot.unpark_all()
            protected_ctrl_c()

        spawn_system_task(wake)
        await lot.park()
        for number in range(10):
            passed.append(number)
            await checkpoint()

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)
    assert passed == [0]


def test_a_signal_while_the_run_is_set_up_waits_for_mains_first_checkpoint_and_not_for_its_last() -> None:
    class Clock(MockClock):
        def start_clock(self) -> None:
            ctrl_c()

    log: list[str] = []

    async def main() -> None:
        log.append("begun")
        await checkpoint()
        log.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main, clock=Clock())
    assert log == ["begun"]


def test_main_may_catch_it_and_go_on() -> None:
    async def main() -> str:
        spawn_system_task(press)
        try:
            await kernel.sleep_forever()
        except KeyboardInterrupt:
            await checkpoint()
        return "well"

    assert kernel.run(main) == "well"


def test_two_at_once_are_one() -> None:
    async def main() -> str:
        protected_ctrl_c()
        protected_ctrl_c()
        try:
            await checkpoint()
        except KeyboardInterrupt:
            await checkpoint()
        return "well"

    assert kernel.run(main) == "well"


def test_one_that_was_not_delivered_comes_out_of_the_run_and_does_not_get_into_the_next() -> None:
    async def late() -> str:
        protected_ctrl_c()
        return "no checkpoint follows"

    async def afterwards() -> str:
        await checkpoint()
        return "well"

    with kernel.Kernel() as kept:
        with pytest.raises(KeyboardInterrupt) as info:
            kept.run(late)
        assert info.value.__context__ is None
        assert kept.run(afterwards) == "well"


def test_an_error_of_the_run_is_kept_as_the_context() -> None:
    async def main() -> None:
        protected_ctrl_c()
        raise ValueError("and this")

    with pytest.raises(KeyboardInterrupt) as info:
        kernel.run(main)
    assert isinstance(info.value.__context__, ValueError)


class AbortWithABug(Trap):
    """Can't be taken back, and says so with an error."""

    def arm(self, kernel: Any, task: Task) -> None:
        pass

    def abort(self, kernel: Any, task: Task) -> bool:
        raise ValueError("a bug in a trap")


class AbortByWaking(Trap):
    """Is woken by its own abort, with a value."""

    def arm(self, kernel: Any, task: Task) -> None:
        pass

    def abort(self, kernel: Any, task: Task) -> bool:
        kernel.wake(task, "woken")
        return False


@pytest.mark.parametrize("trap", [AbortWithABug(), AbortByWaking()])
def test_a_trap_that_wakes_main_with_something_else_does_not_swallow_it(trap: Trap) -> None:
    log: list[object] = []

    async def main() -> None:
        spawn_system_task(press)
        try:
            log.append(await trap)
        except ValueError as error:
            log.append(str(error))
        await checkpoint()
        log.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)
    assert log in (["woken"], ["a bug in a trap"])


# ---- losing patience -----------------------------------------------------------------------------------


def test_the_second_cancels_everything_and_the_third_does_not_wait_for_children_that_do_not_leave(
    wreckage: None,
) -> None:
    log: list[str] = []

    async def stubborn(presses: int) -> None:
        with kernel.CancelScope(shield=True):
            await kernel.sleep_forever()
        log.append("not reached")

    async def leaving() -> None:
        try:
            await kernel.sleep_forever()
        except kernel.Cancelled as cancelled:
            log.append(f"cancelled by {cancelled.reason}")
            raise

    async def presses() -> None:
        for number in (1, 2, 3):
            for _ in range(5):
                await checkpoint()
            log.append(f"Ctrl-C {number}")
            protected_ctrl_c()

    async def main() -> None:
        spawn_system_task(presses)
        async with kernel.open_nursery() as outer:
            outer.start_soon(leaving)
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(stubborn, 1)

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)
    assert log == ["Ctrl-C 1", "Ctrl-C 2", "cancelled by KeyboardInterrupt came while idle", "Ctrl-C 3"]
    assert here.kernel is None


def test_the_second_is_enough_if_it_makes_everybody_leave() -> None:
    class Stubborn(Trap):
        """Can't be taken back; who waits for it must be helped by others."""

        def arm(self, kernel: Any, task: Task) -> None:
            self.task = task

        def abort(self, kernel: Any, task: Task) -> bool:
            return False

    async def main() -> None:
        trap = Stubborn()

        async def helper() -> None:
            try:
                await kernel.sleep_forever()
            finally:
                current_kernel().wake(trap.task)

        spawn_system_task(press, 2)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(helper)
            with kernel.CancelScope(shield=True):
                await trap

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)


def test_one_that_has_to_wait_cancels_nobody() -> None:
    log: list[str] = []

    async def main() -> None:
        task = current_task()

        def abort_fn(raise_cancel: object) -> Abort:
            return Abort.FAILED

        async def child() -> None:
            for _ in range(20):
                await checkpoint()
            log.append("child has ended")
            reschedule(task)

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            spawn_system_task(press)
            await wait_task_rescheduled(abort_fn)
            try:
                await checkpoint()
            except KeyboardInterrupt:
                log.append("main")
                raise

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)
    assert log == ["child has ended", "main"]


def test_main_that_catches_it_and_goes_back_to_the_same_lot_is_not_stubborn() -> None:
    caught: list[int] = []

    async def main() -> str:
        lot = ParkingLot()
        spawn_system_task(press, 5)
        for number in range(5):
            try:
                await lot.park()
            except KeyboardInterrupt:
                caught.append(number)
        return "well"

    assert kernel.run(main) == "well"
    assert caught == [0, 1, 2, 3, 4]


# ---- what comes out of the run -------------------------------------------------------------------------


def test_the_run_raises_a_plain_one_however_deep_it_was_in_groups() -> None:
    async def main() -> None:
        error: BaseException = KeyboardInterrupt()
        for _ in range(20_000):
            error = BaseExceptionGroup("nested", [ValueError(), error])
        raise error

    with pytest.raises(KeyboardInterrupt) as info:
        kernel.run(main)
    assert isinstance(info.value.__cause__, BaseExceptionGroup)


def test_a_group_without_one_stays_as_it_is() -> None:
    async def main() -> None:
        async with kernel.open_nursery():
            raise SystemExit(3)

    with pytest.raises(BaseExceptionGroup) as info:
        kernel.run(main)
    assert [type(error) for error in info.value.exceptions] == [SystemExit]


# ---- marks ---------------------------------------------------------------------------------------------


def is_protected() -> bool:
    return currently_ki_protected()


class Marked:
    @enable_ki_protection
    def method(self) -> bool:
        return is_protected()

    @classmethod
    @enable_ki_protection
    def of_the_class(cls) -> bool:
        return is_protected()

    @enable_ki_protection
    async def async_method(self) -> bool:
        await checkpoint()
        return is_protected()

    def unmarked(self) -> bool:
        return is_protected()


@enable_ki_protection
def marked_function() -> bool:
    return is_protected()


@enable_ki_protection
def marked_generator() -> Iterator[bool]:
    yield is_protected()


@enable_ki_protection
async def marked_async_generator() -> AsyncIterator[bool]:
    await checkpoint()
    yield is_protected()


@enable_ki_protection
@operation
def marked_above() -> Generator[Any, Any, bool]:
    yield from checkpoint()
    return is_protected()


@operation
@enable_ki_protection
def marked_below() -> Generator[Any, Any, bool]:
    yield from checkpoint()
    return is_protected()


@disable_ki_protection
def exposed_function() -> bool:
    return is_protected()


@enable_ki_protection
def nested(function: Callable[[], bool]) -> bool:
    return function()


def test_marks_hold_for_every_kind_of_function() -> None:
    async def main() -> None:
        assert not is_protected()
        assert marked_function()
        assert Marked().method()
        assert Marked.of_the_class()
        assert next(iter(marked_generator()))
        assert await Marked().async_method()
        assert [item async for item in marked_async_generator()] == [True]
        assert await marked_above()
        assert await marked_below()
        assert not is_protected()

    kernel.run(main)


def test_a_bound_method_can_be_marked() -> None:
    def unmarked(self: object) -> bool:
        return is_protected()

    kind = type("Kind", (), {"unmarked": unmarked})
    thing: Any = kind()
    before = thing.unmarked
    assert enable_ki_protection(before) is before

    async def main() -> None:
        assert thing.unmarked()

    kernel.run(main)


def test_the_innermost_mark_counts_and_the_last_one_put_on_a_function() -> None:
    @disable_ki_protection
    @enable_ki_protection
    def changed() -> bool:
        return is_protected()

    async def main() -> None:
        assert not exposed_function()
        assert not nested(exposed_function)
        assert nested(lambda: is_protected())
        assert nested(partial(nested, exposed_function)) is False
        assert not changed()

    kernel.run(main)


def test_a_mark_changes_nothing_else_about_a_function() -> None:
    def plain(argument: int = 3, *, other: str = "x") -> tuple[int, str]:
        """What it does."""
        return argument, other

    before = (plain.__doc__, plain.__name__, plain.__defaults__, plain.__kwdefaults__)
    assert enable_ki_protection(plain) is plain
    assert (plain.__doc__, plain.__name__, plain.__defaults__, plain.__kwdefaults__) == before
    assert plain(4, other="y") == (4, "y")
    assert enable_ki_protection(plain).__code__.co_consts == enable_ki_protection(plain).__code__.co_consts


def test_protected_code_is_not_struck_and_exposed_code_inside_it_is() -> None:
    log: list[str] = []

    @enable_ki_protection
    def protected() -> None:
        ctrl_c()
        log.append("went on")
        exposed()
        log.append("not reached")

    @disable_ki_protection
    def exposed() -> None:
        ctrl_c()

    async def main() -> None:
        protected()

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)
    assert log == ["went on"]


def test_currently_ki_protected_outside_and_in_other_threads() -> None:
    assert currently_ki_protected()
    answers: list[bool] = []

    async def main() -> None:
        answers.append(currently_ki_protected())

    thread = threading.Thread(target=kernel.run, args=(main,))
    thread.start()
    thread.join()
    assert answers == [False]


def test_restricted_to_checkpoints_user_code_is_not_struck() -> None:
    log: list[str] = []

    async def child() -> None:
        ctrl_c()
        log.append("child went on")
        await kernel.sleep_forever()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
    with kernel.Kernel(restrict_keyboard_interrupt_to_checkpoints=True) as kept, pytest.raises(KeyboardInterrupt):
        kept.run(main)
    assert log == ["child went on"] * 2


# ---- the end of a block ----------------------------------------------------------------------------------


def test_between_the_call_of_aexit_and_its_await_nothing_is_raised() -> None:
    """The interpreter looks for signals there, and the block would be left without its `__aexit__`."""
    log: list[str] = []

    class Block:
        def __aenter__(self) -> Any:
            assert not interrupts._is_leaving_async_with(sys._getframe(1))
            return checkpoint()

        def __aexit__(self, *exc_info: object) -> Any:
            signal.getsignal(signal.SIGINT)(signal.SIGINT, sys._getframe(1))  # type: ignore[operator, misc]
            log.append("called")
            return self.leave()

        async def leave(self) -> None:
            log.append("left")
            await checkpoint()

    async def main() -> None:
        async with Block():
            log.append("body")

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)
    assert log == ["body", "called", "left"]


def test_the_lines_of_contextlib_are_protected_and_what_they_call_is_not() -> None:
    """Otherwise a Ctrl-C between `with manager():` and the manager's own code would skip what that has to do."""
    protected: list[bool] = []

    @contextmanager
    def manager() -> Iterator[None]:
        entering = sys._getframe(1)
        assert entering.f_globals["__name__"] == "contextlib"
        protected.append(interrupts._is_protected(entering, current_kernel()))
        protected.append(currently_ki_protected())
        yield

    async def main() -> None:
        with manager():
            pass

    kernel.run(main)
    assert protected == [True, False]


def test_any_other_instruction_is_no_such_place() -> None:
    def callback() -> bool:
        return interrupts._is_leaving_async_with(sys._getframe(1))

    async def awaited(value: bool) -> bool:
        return value

    async def main() -> None:
        assert not callback()
        assert not await awaited(callback())
        with kernel.CancelScope():
            assert not callback()
        while True:
            assert not callback()
            break

    kernel.run(main)

    def endless() -> Iterator[Any]:
        while True:
            yield sys._getframe()

    frame = next(endless())
    code = frame.f_code.co_code
    assert not any(code[at:].lstrip(b"\0").startswith(interrupts._AWAIT_AEXIT) for at in range(0, len(code) + 4, 2))


# ---- handlers and file descriptors -----------------------------------------------------------------------


def test_a_handler_that_the_program_installs_meanwhile_stays() -> None:
    def mine(signum: int, frame: object) -> None:
        log.append("mine")

    log: list[str] = []

    async def main() -> None:
        signal.signal(signal.SIGINT, mine)
        ctrl_c()

    try:
        kernel.run(main)
        assert signal.getsignal(signal.SIGINT) is mine
        assert log == ["mine"]
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_handlers_than_pythons_own_are_left_alone() -> None:
    log: list[object] = []

    async def main() -> None:
        log.append(signal.getsignal(signal.SIGINT))
        ctrl_c()
        await checkpoint()

    for handler in (signal.SIG_IGN, lambda *_: None):
        signal.signal(signal.SIGINT, handler)
        try:
            kernel.run(main)
            assert log.pop() == signal.getsignal(signal.SIGINT) == handler
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def test_our_handler_put_back_after_the_run_is_as_good_as_pythons() -> None:
    """A program, or a debugger, may remember the handler it finds and put it back later, when the run is over."""
    kept: list[Any] = []

    async def main() -> None:
        kept.append(signal.signal(signal.SIGINT, lambda *_: None))

    async def next_run() -> None:
        assert signal.getsignal(signal.SIGINT) is not kept[0]
        protected_ctrl_c()
        await checkpoint()

    kernel.run(main)
    signal.signal(signal.SIGINT, kept[0])
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()
    with pytest.raises(KeyboardInterrupt) as info:
        kernel.run(next_run)
    assert innermost(info.value) == "checkpoint"


def test_a_kernel_in_another_thread_leaves_signals_alone() -> None:
    async def main() -> None:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        await kernel.sleep(0.001)

    failed: list[BaseException] = []

    def run() -> None:
        try:
            kernel.run(main)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed


def test_a_wakeup_fd_that_was_there_is_noticed_and_put_back() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    try:
        with pytest.warns(RuntimeWarning, match=re.escape("signal.set_wakeup_fd")):
            kernel.run(checkpoint)
        assert signal.set_wakeup_fd(-1) == writer
    finally:
        os.close(reader)
        os.close(writer)


def test_a_wakeup_fd_that_somebody_sets_meanwhile_stays() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    async def main() -> None:
        signal.set_wakeup_fd(writer)

    try:
        kernel.run(main)
        assert signal.set_wakeup_fd(-1) == writer
    finally:
        os.close(reader)
        os.close(writer)


def test_a_poller_that_can_give_no_fd_for_signals_leaves_everything_as_it_was() -> None:
    class Exhausted:
        def __init__(self) -> None:
            self.inner = default_poller()

        def signal_fd(self) -> int:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __len__(self) -> int:
            return len(self.inner)

    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        kernel.run(checkpoint, poller=Exhausted())
    assert here.kernel is None


def test_a_signal_that_interrupts_no_system_call_of_ours_wakes_the_kernel_all_the_same() -> None:
    """It goes to another thread: no poll is interrupted, no line of Python runs in ours. As when it comes in the last
    moment before a poll.
    """

    async def main() -> None:
        def strike_myself() -> None:
            while not kernel_.asleep:
                time.sleep(0)
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)

        kernel_ = current_kernel()
        thread = threading.Thread(target=strike_myself)
        thread.start()
        try:
            with kernel.fail_after(20):
                await kernel.sleep_forever()
        finally:
            thread.join()

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)


def test_a_full_wakeup_pipe_does_no_harm(capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        poller: Any = current_kernel().poller
        with pytest.raises(BlockingIOError):
            while True:
                os.write(poller.signal_fd(), bytes(65536))
        ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)
    assert capfd.readouterr().err == ""


def test_running_a_kernel_inside_its_own_run_does_not_take_its_ctrl_c_away() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="running already"):
            kept.run(checkpoint)
        with pytest.raises(RuntimeError, match=re.escape("kernel.run()")):
            kernel.run(checkpoint)
        protected_ctrl_c()
        await checkpoint()

    with kernel.Kernel() as kept, pytest.raises(KeyboardInterrupt) as info:
        kept.run(main)
    assert innermost(info.value) == "checkpoint"


def test_a_signal_handler_of_the_programs_that_raises_while_idle_cancels_everything_and_comes_out() -> None:
    log: list[str] = []

    class Idle:
        """The signal comes while the poller waits."""

        def __init__(self) -> None:
            self.inner = default_poller()
            self.sent = False

        def poll(self, timeout: float) -> Iterable[Task]:
            if timeout > 0 and not self.sent:
                self.sent = True
                signal.raise_signal(signal.SIGTERM)
            return self.inner.poll(timeout)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __len__(self) -> int:
            return len(self.inner)

    async def child() -> None:
        try:
            await kernel.sleep_forever()
        finally:
            with kernel.CancelScope(shield=True):
                await kernel.sleep(0.001)
            log.append("child has cleaned up")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)

    def terminate(signum: int, frame: object) -> None:
        sys.exit(5)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(SystemExit) as info:
            kernel.run(main, poller=Idle())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert info.value.code == 5
    assert log == ["child has cleaned up"]


@pytest.mark.parametrize("host_uses_wakeup_fd", [False, True])
def test_in_guest_mode_the_guests_main_task_gets_what_strikes_the_host(host_uses_wakeup_fd: bool) -> None:
    ticks: list[Callable[[], object]] = []
    outcomes: list[Any] = []
    arrived = threading.Event()

    def soon(call: Callable[[], object]) -> None:
        ticks.append(call)
        arrived.set()

    kernel.lowlevel.start_guest_run(
        kernel.sleep_forever,
        run_sync_soon_threadsafe=soon,
        done_callback=outcomes.append,
        host_uses_signal_set_wakeup_fd=host_uses_wakeup_fd,
    )
    for _ in range(3):
        ticks.pop(0)() if ticks else None
    ctrl_c()  # the host's code
    while not outcomes:
        if not ticks:
            assert arrived.wait(20)
        arrived.clear()
        while ticks:
            ticks.pop(0)()
    with pytest.raises(KeyboardInterrupt):
        outcomes[0].unwrap()


def test_claimed_twice_is_raised_twice_and_owed_no_more() -> None:
    """`raise_cancel` may be called late: the wait goes on until somebody reschedules."""
    log: list[str] = []

    async def main() -> None:
        task = current_task()

        def abort_fn(raise_cancel: Callable[[], Any]) -> Abort:
            current_kernel_token().run_sync_soon(lambda: reschedule(task, capture(raise_cancel)))
            return Abort.FAILED

        spawn_system_task(press)
        try:
            await wait_task_rescheduled(abort_fn)
        except KeyboardInterrupt:
            log.append("raised")
        await checkpoint()
        log.append("and only once")

    kernel.run(main)
    assert log == ["raised", "and only once"]


def test_a_value_in_place_of_raise_cancel_leaves_it_owed() -> None:
    log: list[str] = []

    async def main() -> None:
        task = current_task()

        def abort_fn(raise_cancel: object) -> Abort:
            current_kernel_token().run_sync_soon(lambda: reschedule(task, Value("done all the same")))
            return Abort.FAILED

        spawn_system_task(press)
        log.append(await wait_task_rescheduled(abort_fn))
        await cancel_shielded_checkpoint()
        await checkpoint()

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)
    assert log == ["done all the same"]


# ---- real children ---------------------------------------------------------------------------------------

RUNS = int(os.environ.get("CTRL_C_RUNS", "400"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs os.kill to be a signal")
def test_runs_that_are_struck_at_random_moments_lose_nothing_and_leave_nothing_behind() -> None:
    counts, wrong = strike(RUNS, seed=1, timeout=60 + RUNS / 10)
    assert wrong == []
    assert counts["runs"] == RUNS
    for what in ("in the program", "at a checkpoint", "in a nursery's end", "before or after the run", "caught"):
        assert counts[what] > 0, what


class Terminal:
    """A child with a terminal of its own, in which Ctrl-C is a key."""

    def __init__(self, *args: str) -> None:
        import fcntl
        import pty
        import termios

        self.fd, slave = pty.openpty()
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb", "PYTHONSTARTUP": ""},
        )
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def expect(self, text: str, *, pressing: bool = False) -> str:
        """Read on until `text` has come; return what came before. With `pressing`, press Ctrl-C until it has: a prompt
        is printed some time before it can be interrupted.
        """
        end = time.monotonic() + 30
        while text not in self.text:
            if pressing:
                self.type("\x03")
            readable, _, _ = select.select([self.fd], [], [], 0.2 if pressing else 1)
            try:
                data = os.read(self.fd, 65536) if readable else None
            except OSError:
                data = b""
            assert data != b"", f"ended before {text!r}; instead: {self.text}"
            assert time.monotonic() < end, f"no {text!r}; instead: {self.text}"
            self.text += (data or b"").decode(errors="replace")
        before, _, self.text = self.text.partition(text)
        return before


needs_a_terminal = pytest.mark.skipif(not sys.platform.startswith(("linux", "darwin")), reason="needs a terminal")

DEBUGGED = """
import kernel, signal

done = False

def called_by_the_kernel():
    breakpoint()

async def main():
    breakpoint()
    print("on its way")
    while not done:
        await kernel.sleep(0.001)
    print("and on")
    kernel.lowlevel.current_kernel_token().run_sync_soon(called_by_the_kernel)
    await kernel.sleep_forever()

try:
    kernel.run(main)
except KeyboardInterrupt:
    print("interrupted")
kernel.run(kernel.sleep, 0)
print("and another run")
"""


@needs_a_terminal
def test_the_debugger_and_ctrl_c_get_on(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(DEBUGGED)
    with Terminal(str(tmp_path / "program.py")) as terminal:

        def command(text: str) -> None:
            terminal.expect("(Pdb) ")
            terminal.type(text + "\n")

        terminal.expect("(Pdb) ")
        terminal.expect("--KeyboardInterrupt--", pressing=True)  # at the prompt, in the program's code: the debugger's
        command("p 6 * 7")
        terminal.expect("42")
        command("c")
        terminal.expect("on its way")
        terminal.type("\x03")  # while the program runs: the debugger comes up, wherever that was
        terminal.expect("Program interrupted")
        command("import __main__; __main__.done = True")
        command("c")
        terminal.expect("and on")
        command("signal.raise_signal(2)")  # at a prompt in the kernel's code: it waits until the program goes on
        command("c")
        terminal.expect("interrupted")
        terminal.expect("and another run")
        assert terminal.process.wait(30) == 0


@needs_a_terminal
def test_at_the_prompt_of_the_interpreter_a_run_can_be_interrupted_again_and_again() -> None:
    with Terminal("-i", "-q", "-c", "import kernel, signal") as terminal:
        for _ in range(3):
            terminal.expect(">>> ")
            terminal.type("kernel.run(lambda: (print('now', 'asleep'), kernel.sleep_forever())[1])\n")
            terminal.expect("now asleep")
            terminal.type("\x03")
            assert "KeyboardInterrupt" in terminal.expect("KeyboardInterrupt\r\n") + "KeyboardInterrupt"
        terminal.expect(">>> ")
        terminal.type("kernel.run(kernel.sleep, 0.001); print(6 * 7)\n")
        terminal.expect("42")
        terminal.expect(">>> ")
        terminal.type("signal.getsignal(signal.SIGINT)\n")
        terminal.expect("default_int_handler")
