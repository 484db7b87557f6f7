"""Guest mode, on four hosts: a tiny one of our own, which does what it is told, and asyncio, uvloop and Tk."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import queue
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import pytest
from outcome import Error, Outcome, Value

import kernel
from kernel.abc import Instrument
from kernel.core.loop import STRIDE
from kernel.lowlevel import (
    ParkingLot,
    add_instrument,
    checkpoint,
    current_kernel,
    current_kernel_token,
    in_kernel_run,
    in_kernel_task,
    remove_instrument,
    spawn_system_task,
    start_guest_run,
    wait_readable,
    wait_writable,
)
from kernel.testing import MockClock, wait_all_tasks_blocked

ROOT = Path(__file__).parent.parent
BRIDGES = runpy.run_path(str(ROOT / "examples" / "guest_asyncio.py"))


class Host:
    """The smallest host loop: a row of callbacks, called one by one in the thread that made it."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.thread = threading.get_ident()
        self.outcome: Outcome[Any] | None = None
        self.asked_by_helper = 0

    def soon(self, function: Callable[[], object]) -> None:
        assert threading.get_ident() == self.thread
        self.calls.put(function)

    def soon_threadsafe(self, function: Callable[[], object]) -> None:
        assert threading.get_ident() != self.thread
        self.asked_by_helper += 1
        self.calls.put(function)

    def done(self, outcome: Outcome[Any]) -> None:
        assert self.outcome is None
        assert threading.get_ident() == self.thread
        self.outcome = outcome

    def start(self, async_fn: Callable[..., Any], *args: Any, **options: Any) -> Host:
        options = {
            "run_sync_soon_threadsafe": self.soon_threadsafe,
            "run_sync_soon_not_threadsafe": self.soon,
            "done_callback": self.done,
            **options,
        }
        start_guest_run(async_fn, *args, **options)
        return self

    def turn(self) -> None:
        """Call the next callback, waiting for it if need be."""
        self.calls.get(timeout=10)()

    def turn_until_asleep(self) -> None:
        """Until the kernel has handed itself over to the helper."""
        while not self.calls.empty():
            self.turn()
        assert in_kernel_run()
        assert current_kernel().asleep

    def run(self) -> Any:
        while self.outcome is None:
            self.turn()
        try:
            return self.outcome.unwrap()
        finally:
            self.outcome = Value(None)  # an error knows this frame by its traceback


def run(async_fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return Host().start(async_fn, *args, **options).run()


async def sleep_forever() -> None:
    await kernel.sleep_forever()


def assert_nothing_left() -> None:
    """Beyond what conftest checks: no kernel here, Ctrl-C and signals as they were, and the next run works."""
    assert not in_kernel_run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sys.get_asyncgen_hooks() == (None, None)
    previous = signal.set_wakeup_fd(-1)
    assert previous == -1
    assert kernel.run(answer) == 42


async def answer() -> int:
    await checkpoint()
    return 42


# ---- how it ends ---------------------------------------------------------------------------------------------


def test_what_the_program_returns_arrives_as_an_outcome() -> None:
    host = Host().start(answer)
    while host.outcome is None:
        host.turn()
    assert host.outcome == Value(42)
    assert_nothing_left()


def test_what_the_program_raises_arrives_as_an_outcome() -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sleep_forever)
            raise KeyError("whoops")

    host = Host().start(main)
    while host.outcome is None:
        host.turn()
    assert isinstance(host.outcome, Error)
    group = host.outcome.error
    assert isinstance(group, ExceptionGroup)
    assert [repr(error) for error in group.exceptions] == ["KeyError('whoops')"]
    assert_nothing_left()


def test_a_generator_function_will_do() -> None:
    def main() -> Any:
        yield from kernel.sleep(0)
        return "from a generator"

    assert run(main) == "from a generator"


def test_an_error_of_the_program_is_freed_by_counting_references() -> None:
    class Big:
        pass

    big: Any = Big()
    gone = weakref.ref(big)

    async def main(thing: Any) -> None:
        raise ValueError(thing)

    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            run(main, big)
        del big
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("where", ["poll", "helper", "report", "call", "clock", "idle"])
def test_a_bug_in_the_kernel_or_a_driver_arrives_as_an_internal_error(where: str) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError(where)

    async def main() -> None:
        await checkpoint()
        poller: Any = current_kernel().poller
        if where == "poll":
            poller.poll = broken
        elif where == "helper":
            wait = poller.wait
            host_thread = threading.get_ident()
            poller.wait = lambda timeout: wait(0) if threading.get_ident() == host_thread else broken()
        elif where == "report":
            take = poller.take
            poller.take = lambda happened: broken() if happened else take(happened)
            host.soon(poller.wakeup)
        elif where == "call":
            current_kernel_token().run_sync_soon(broken)
        elif where == "clock":
            current_kernel().clock.current_time = broken  # type: ignore[method-assign, assignment]
        elif where == "idle":
            current_kernel().clock.deadline_to_sleep_time = broken  # type: ignore[method-assign, assignment]
        await checkpoint()
        await kernel.sleep_forever()

    host = Host()
    with pytest.raises(kernel.KernelInternalError) as caught:
        host.start(main).run()
    assert repr(caught.value.__cause__) == f"ZeroDivisionError({where!r})"
    del caught
    gc.collect()
    assert_nothing_left()


def test_a_failed_system_task_arrives_as_an_internal_error() -> None:
    async def fail() -> None:
        raise KeyError("service")

    host = Host().start(sleep_forever)
    spawn_system_task(fail)
    with pytest.raises(kernel.KernelInternalError):
        host.run()
    assert_nothing_left()


def test_what_done_callback_raises_is_the_hosts_affair_and_the_run_is_over_and_clean() -> None:
    def done(outcome: Outcome[Any]) -> None:
        raise LookupError("in the host")

    host = Host().start(answer, done_callback=done)
    with pytest.raises(LookupError, match="in the host"):
        host.run()
    assert_nothing_left()


def test_the_run_is_cleaned_up_before_done_callback_is_called() -> None:
    threads = threading.active_count()

    def done(outcome: Outcome[Any]) -> None:
        assert threading.active_count() == threads
        assert_nothing_left()
        host.done(outcome)

    async def main() -> None:
        await kernel.sleep(0.001)
        assert threading.active_count() == threads + 1

    host = Host().start(main, done_callback=done)
    host.run()


# ---- how it begins -------------------------------------------------------------------------------------------


async def never() -> None:
    raise AssertionError("unreachable")


def fail_to_start(error: type[BaseException], message: str, async_fn: Any = never, **options: Any) -> None:
    """The start fails, and later on the host calls what it may have been asked to call: nothing happens."""
    host = Host()
    with pytest.raises(error, match=message):
        host.start(async_fn, **options)
    while not host.calls.empty():
        host.turn()
    assert host.outcome is None


def test_errors_before_the_start_are_raised_by_the_call_and_change_nothing() -> None:
    class NoClock(MockClock):
        def start_clock(self) -> None:
            raise ValueError("stopped")

    def refuse(function: object) -> None:
        raise RuntimeError("the host is closed")

    fail_to_start(TypeError, "wants an async function", async_fn=42)
    fail_to_start(TypeError, "wants an async function", async_fn=print)
    fail_to_start(kernel.KernelInternalError, "drivers broke", clock=NoClock())
    fail_to_start(RuntimeError, "the host is closed", run_sync_soon_not_threadsafe=refuse)
    fail_to_start(
        RuntimeError, "the host is closed", run_sync_soon_not_threadsafe=None, run_sync_soon_threadsafe=refuse
    )
    assert_nothing_left()


def test_a_guest_inside_a_run_is_refused() -> None:
    async def main() -> None:
        fail_to_start(RuntimeError, "inside a kernel")
        await checkpoint()

    kernel.run(main)
    run(main)
    assert_nothing_left()


def test_a_run_inside_a_guest_is_refused_in_a_task_and_between_two_ticks() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="inside a kernel"):
            kernel.run(answer)

    host = Host().start(main)
    with pytest.raises(RuntimeError, match="inside a kernel"):
        kernel.run(answer)
    host.run()


def test_two_hosts_in_two_threads_have_a_guest_each() -> None:
    def in_thread() -> None:
        results.append(run(answer))

    results: list[int] = []
    host = Host().start(sleep_forever_in(scope := kernel.CancelScope()))
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    scope.cancel()
    host.run()
    assert results == [42]


def sleep_forever_in(scope: kernel.CancelScope) -> Callable[[], Any]:
    async def main() -> str:
        with scope:
            await kernel.sleep_forever()
        return "cancelled"

    return main


def test_when_the_start_returns_the_program_has_not_begun_but_tasks_can_be_started() -> None:
    log: list[str] = []

    async def main() -> None:
        log.append("main")
        await checkpoint()
        assert current_kernel_token() is token

    async def early() -> None:
        log.append("system task")

    host = Host().start(main)
    assert log == []
    assert in_kernel_run()
    token = current_kernel_token()
    token.run_sync_soon(log.append, "call")
    spawn_system_task(early)
    kernel.current_time()
    host.run()
    assert sorted(log) == ["call", "main", "system task"]


def test_a_second_guest_may_be_started_from_done_callback() -> None:
    def next_one(outcome: Outcome[Any]) -> None:
        log.append(outcome.unwrap())
        host.start(answer)

    log: list[int] = []
    host = Host().start(answer, done_callback=next_one)
    assert host.run() == 42
    assert log == [42]


def test_one_callable_is_enough() -> None:
    host = Host()
    asked: list[bool] = []

    def soon(function: Callable[[], object]) -> None:
        asked.append(threading.get_ident() == host.thread)
        host.calls.put(function)

    async def main() -> int:
        await checkpoint()
        await kernel.sleep(0.001)
        return 42

    host.start(main, run_sync_soon_threadsafe=soon, run_sync_soon_not_threadsafe=None)
    assert host.run() == 42
    assert set(asked) == {True, False}


def test_host_code_is_in_the_run_and_in_no_task() -> None:
    async def main() -> None:
        assert in_kernel_run()
        assert in_kernel_task()
        lot = ParkingLot()
        host.soon(lambda: log.append((in_kernel_run(), in_kernel_task())))
        host.soon(lot.unpark)
        await lot.park()
        assert in_kernel_task()

    log: list[tuple[bool, bool]] = []
    host = Host()
    host.start(main).run()
    assert log == [(True, False)]
    assert not in_kernel_run()


# ---- taking turns --------------------------------------------------------------------------------------------


def count_steps_per_tick(turns: int, in_between: Callable[[], object] = lambda: None) -> list[int]:
    """How many steps a task that never rests gets in each of `turns` ticks."""
    steps = 0

    async def busy() -> None:
        nonlocal steps
        while True:
            steps += 1
            await checkpoint()

    async def main() -> None:
        with scope:
            await busy()

    scope = kernel.CancelScope()
    counts = []
    host = Host().start(main, clock=clock)
    clock.jump(0)
    for _ in range(turns):
        before = steps
        host.turn()
        counts.append(steps - before)
        assert host.calls.qsize() == 1  # the next tick, and it was asked for in this thread
        in_between()
    assert host.asked_by_helper == 0
    scope.cancel()
    host.run()
    return counts


clock = MockClock()


def test_one_tick_is_one_pass_so_a_busy_kernel_does_not_starve_the_host() -> None:
    assert count_steps_per_tick(5) == [STRIDE] * 5


def test_a_slow_host_does_not_make_the_passes_shorter() -> None:
    assert count_steps_per_tick(5, in_between=lambda: clock.jump(1)) == [STRIDE] * 5


def test_a_kernel_with_nothing_to_do_takes_none_of_the_hosts_turns() -> None:
    host = Host().start(sleep_forever_in(scope := kernel.CancelScope()))
    host.turn_until_asleep()
    with pytest.raises(queue.Empty):
        host.calls.get(timeout=0.02)
    scope.cancel()
    assert host.run() == "cancelled"
    assert host.asked_by_helper == 1


def test_real_time_passes_in_the_helper() -> None:
    async def main() -> None:
        began = kernel.current_time()
        await kernel.sleep(0.003)
        assert kernel.current_time() - began >= 0.003
        with kernel.move_on_after(0.001) as scope:
            await kernel.sleep_forever()
        assert scope.cancelled_caught

    host = Host().start(main)
    host.run()
    assert host.asked_by_helper >= 2


def test_virtual_time_jumps() -> None:
    async def main() -> float:
        await kernel.sleep(3600)
        with kernel.move_on_after(60):
            await kernel.sleep_forever()
        return kernel.current_time()

    host = Host().start(main, clock=MockClock(autojump_threshold=0))
    assert host.run() == 3660
    assert host.asked_by_helper == 0

    host = Host().start(main, clock=MockClock(autojump_threshold=0.001))
    assert host.run() == 3660
    assert host.asked_by_helper == 2


def test_files_are_waited_for_in_the_helper_and_looked_at_by_a_busy_kernel() -> None:
    async def echo(sock: socket.socket) -> None:
        await wait_readable(sock)
        await wait_writable(sock)
        sock.send(sock.recv(10).upper())

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(echo, right)
            await wait_all_tasks_blocked()
            host.soon(partial(left.send, b"ping"))
            await wait_readable(left)
            assert left.recv(10) == b"PING"

            async def busy() -> None:
                while not done:
                    await checkpoint()

            done = False
            nursery.start_soon(busy)
            nursery.start_soon(echo, right)
            left.send(b"again")
            await wait_readable(left)
            assert left.recv(10) == b"AGAIN"
            done = True

    host = Host()
    left, right = socket.socketpair()
    with left, right:
        host.start(main).run()
    assert host.asked_by_helper >= 1


def test_a_file_closed_between_the_report_and_the_tick_wakes_its_waiter_with_an_error() -> None:
    async def main() -> None:
        with pytest.raises(kernel.ClosedResourceError):
            await wait_readable(left)

    left, right = socket.socketpair()
    with left, right:
        host = Host().start(main)
        host.turn_until_asleep()
        right.send(b"x")
        tick = host.calls.get(timeout=10)  # the helper has seen it
        kernel.lowlevel.notify_closing(left)
        tick()
        host.run()


def test_instruments_see_the_wait_in_the_hosts_thread() -> None:
    class Waits(Instrument):
        def before_io_wait(self, timeout: float) -> None:
            log.append(("before", timeout, threading.get_ident()))

        def after_io_wait(self, timeout: float) -> None:
            log.append(("after", timeout, threading.get_ident()))

    log: list[tuple[str, float, int]] = []
    me = threading.get_ident()
    host = Host().start(sleep_forever_in(scope := kernel.CancelScope()), instruments=[Waits()])
    host.turn_until_asleep()
    scope.cancel()
    host.run()
    assert [entry for entry in log if entry[1] != 0] == [("before", inf, me), ("after", inf, me)]


def test_instruments_come_and_go_while_the_kernel_sleeps() -> None:
    class Steps(Instrument):
        def before_task_step(self, task: kernel.lowlevel.Task) -> None:
            log.append(f"{self.name} before {task.name}")

        def after_task_step(self, task: kernel.lowlevel.Task) -> None:
            log.append(f"{self.name} after {task.name}")

        def __init__(self, name: str) -> None:
            self.name = name

    async def sleeper() -> None:
        for _ in range(3):
            await lot.park()
            log.append("step")

    log: list[str] = []
    lot = ParkingLot()
    first, second = Steps("first"), Steps("second")
    host = Host().start(sleeper)
    host.turn_until_asleep()
    add_instrument(first)
    lot.unpark()
    host.turn()
    host.turn_until_asleep()
    name = sleeper.__qualname__
    assert log == [f"first before {name}", "step", f"first after {name}"]

    log.clear()
    add_instrument(second)
    remove_instrument(first)
    lot.unpark()
    host.turn()
    host.turn_until_asleep()
    assert log == [f"second before {name}", "step", f"second after {name}"]

    log.clear()
    remove_instrument(second)
    lot.unpark()
    host.run()
    assert log == ["step"]


def test_a_step_is_over_for_instruments_before_the_wait_that_follows() -> None:
    class Log(Instrument):
        def before_task_step(self, task: kernel.lowlevel.Task) -> None:
            running.append(task)

        def after_task_step(self, task: kernel.lowlevel.Task) -> None:
            running.remove(task)

        def before_io_wait(self, timeout: float) -> None:
            seen.append(len(running))

    async def main() -> None:
        for _ in range(3 * STRIDE):
            await checkpoint()

    running: list[kernel.lowlevel.Task] = []
    seen: list[int] = []
    run(main, instruments=[Log()])
    assert set(seen) == {0}


def test_steps_of_a_guest_go_past_no_bell() -> None:
    async def main() -> None:
        for _ in range(3):
            await kernel.sleep(0.001)
            await checkpoint()
            assert not current_kernel().asleep
            assert not vars(current_kernel().ready)
            assert "add" not in vars(current_kernel().timers)
        while not host.calls.empty():
            await checkpoint()
        for _ in range(2 * STRIDE):
            await checkpoint()
            assert not current_kernel().asleep

    host = Host()
    host.start(main).run()


# ---- host code calls the kernel ------------------------------------------------------------------------------


def by_unpark(scope: kernel.CancelScope, lot: ParkingLot, nursery: kernel.Nursery) -> None:
    lot.unpark()


def by_cancel(scope: kernel.CancelScope, lot: ParkingLot, nursery: kernel.Nursery) -> None:
    scope.cancel()


def by_deadline_in_the_past(scope: kernel.CancelScope, lot: ParkingLot, nursery: kernel.Nursery) -> None:
    scope.deadline = -inf


def by_deadline_in_the_future(scope: kernel.CancelScope, lot: ParkingLot, nursery: kernel.Nursery) -> None:
    scope.deadline = kernel.current_time() + 1000
    scope.deadline = kernel.current_time() + 0.001


def by_start_soon(scope: kernel.CancelScope, lot: ParkingLot, nursery: kernel.Nursery) -> None:
    async def child() -> None:
        lot.unpark()

    nursery.start_soon(child)


def by_system_task(scope: kernel.CancelScope, lot: ParkingLot, nursery: kernel.Nursery) -> None:
    async def service() -> None:
        lot.unpark()

    spawn_system_task(service)


def by_token(scope: kernel.CancelScope, lot: ParkingLot, nursery: kernel.Nursery) -> None:
    current_kernel_token().run_sync_soon(lot.unpark)


def by_thread(scope: kernel.CancelScope, lot: ParkingLot, nursery: kernel.Nursery) -> None:
    thread = threading.Thread(target=current_kernel_token().run_sync_soon, args=(lot.unpark,))
    thread.start()
    thread.join()


@pytest.mark.parametrize("timer", [None, 1000.0])
@pytest.mark.parametrize(
    "wake",
    [
        by_unpark, by_cancel, by_deadline_in_the_past, by_deadline_in_the_future,
        by_start_soon, by_system_task, by_token, by_thread,
    ],
)  # fmt: skip
def test_host_code_wakes_the_sleeping_kernel(wake: Callable[..., None], timer: float | None) -> None:
    """Twice in one run, as the bell must be hung up again; with and without something else to wait for."""

    async def main() -> None:
        nonlocal scope
        async with kernel.open_nursery() as nursery:
            if timer is not None:
                nursery.start_soon(kernel.sleep, timer)
            for _ in range(2):
                with kernel.CancelScope() as scope:
                    args.append((scope, lot, nursery))
                    await lot.park()
                log.append("woken")
            nursery.cancel_scope.cancel()

    scope: kernel.CancelScope
    lot = ParkingLot()
    args: list[Any] = []
    log: list[str] = []
    host = Host().start(main)
    host.turn_until_asleep()
    wake(*args[-1])
    while log != ["woken"]:
        host.turn()
    host.turn_until_asleep()
    wake(*args[-1])
    host.run()
    assert log == ["woken", "woken"]


def test_a_channel_and_an_event_may_be_used_from_the_host() -> None:
    async def main() -> None:
        log.append(await receive.receive())
        await event.wait()
        log.append("event")

    log: list[str] = []
    event = kernel.Event()
    send, receive = kernel.open_memory_channel[str](0)
    host = Host().start(main)
    host.turn_until_asleep()
    send.send_nowait("item")
    while not log:
        host.turn()
    host.turn_until_asleep()
    event.set()
    host.run()
    assert log == ["item", "event"]
    send.close()
    receive.close()


def test_the_helper_is_woken_once_however_much_the_host_changes() -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(lot.park)

    lot = ParkingLot()
    host = Host().start(main)
    host.turn_until_asleep()
    wakeups = 0
    poller: Any = current_kernel().poller
    wakeup = poller.wakeup

    def counted() -> None:
        nonlocal wakeups
        wakeups += 1
        wakeup()

    poller.wakeup = counted
    lot.unpark_all()
    host.run()
    assert wakeups == 1
    assert host.asked_by_helper == 1


@pytest.mark.parametrize("busy", [True, False])
def test_calls_from_a_thread_all_arrive_in_order(busy: bool) -> None:
    async def main() -> None:
        token = current_kernel_token()

        def call() -> None:
            for i in range(500):
                token.run_sync_soon(log.append, i)
            token.run_sync_soon(done.set)

        thread = threading.Thread(target=call)
        thread.start()
        while busy and not done.is_set():
            await checkpoint()
        await done.wait()
        thread.join()

    log: list[int] = []
    done = kernel.Event()
    run(main)
    assert log == list(range(500))


def test_wait_all_tasks_blocked_waits_for_the_guests_tasks() -> None:
    async def child() -> None:
        for _ in range(200):
            await checkpoint()
        log.append("child")
        await kernel.sleep_forever()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            await wait_all_tasks_blocked()
            log.append("blocked")
            await wait_all_tasks_blocked(0.001)
            log.append("blocked for a while")
            nursery.cancel_scope.cancel()

    log: list[str] = []
    run(main)
    assert log == ["child", "blocked", "blocked for a while"]


@pytest.mark.parametrize("how", ["deadline", "call"])
def test_a_wake_up_in_which_nothing_becomes_ready_does_not_count_as_quiet(how: str) -> None:
    """Of 1000 seconds to be quiet, not one has passed."""

    async def main() -> None:
        with kernel.CancelScope() as scope:
            scopes.append(scope)
            await wait_all_tasks_blocked(cushion=1000)
            log.append("quiet")

    scopes: list[kernel.CancelScope] = []
    log: list[str] = []
    host = Host().start(main)
    host.turn_until_asleep()
    if how == "deadline":
        scopes[0].deadline = kernel.current_time() + 1e6
    else:
        current_kernel_token().run_sync_soon(lambda: None)
    host.turn()  # the helper was woken
    host.turn_until_asleep()
    assert log == []
    scopes[0].cancel()
    host.run()
    assert log == []


def test_the_guest_is_cancelled_by_the_host_and_has_left_when_done_is_called() -> None:
    async def main() -> str:
        try:
            await kernel.sleep_forever()
        finally:
            with kernel.CancelScope(shield=True):
                await kernel.sleep(0.001)
                log.append("cleaned up")
        return "unreachable"

    async def outer() -> str:
        with scope:
            await main()
        return "cancelled"

    log: list[str] = []
    scope = kernel.CancelScope()
    host = Host().start(outer)
    host.turn_until_asleep()
    scope.cancel()
    assert host.run() == "cancelled"
    assert log == ["cleaned up"]


# ---- signals and Ctrl-C --------------------------------------------------------------------------------------


def test_ctrl_c_in_the_program_strikes_there_and_in_the_host_goes_to_the_program() -> None:
    async def main() -> None:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        log.append("struck")
        host.soon(partial(signal.raise_signal, signal.SIGINT))
        try:
            await kernel.sleep_forever()
        finally:
            log.append("struck in its sleep")

    log: list[str] = []
    host = Host()
    with pytest.raises(KeyboardInterrupt):
        host.start(main).run()
    assert log == ["struck", "struck in its sleep"]
    assert_nothing_left()


def test_ctrl_c_in_the_host_waits_for_a_busy_programs_checkpoint() -> None:
    async def main() -> None:
        host.soon(partial(signal.raise_signal, signal.SIGINT))
        while True:
            await checkpoint()

    host = Host()
    with pytest.raises(KeyboardInterrupt):
        host.start(main).run()
    assert_nothing_left()


def test_ctrl_c_can_be_restricted_to_checkpoints() -> None:
    async def main() -> None:
        signal.raise_signal(signal.SIGINT)
        log.append("not struck")
        await checkpoint()

    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(main, restrict_keyboard_interrupt_to_checkpoints=True)
    assert log == ["not struck"]
    assert_nothing_left()


def test_ctrl_c_after_the_program_has_ended_arrives_with_its_outcome() -> None:
    async def main() -> None:
        host.soon(partial(signal.raise_signal, signal.SIGINT))
        spawn_system_task(linger)
        raise KeyError("main")

    async def linger() -> None:
        try:
            await kernel.sleep_forever()
        finally:
            with kernel.CancelScope(shield=True):
                for _ in range(2 * STRIDE):
                    await checkpoint()

    host = Host()
    with pytest.raises(KeyboardInterrupt) as caught:
        host.start(main).run()
    assert isinstance(caught.value.__context__, KeyError)
    del caught
    assert_nothing_left()


def test_a_handler_of_the_hosts_is_left_in_place() -> None:
    def handler(signum: int, frame: object) -> None:
        log.append("the host's")

    async def main() -> None:
        assert signal.getsignal(signal.SIGINT) is handler
        signal.raise_signal(signal.SIGINT)
        await checkpoint()

    log: list[str] = []
    previous = signal.signal(signal.SIGINT, handler)
    try:
        run(main)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, previous)
    assert log == ["the host's"]


def current_wakeup_fd() -> int:
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    return fd


@pytest.mark.parametrize("hosts", [True, False])
def test_the_signal_wakeup_fd_is_ours_or_the_hosts(hosts: bool) -> None:
    async def main() -> int:
        return current_wakeup_fd()

    assert (run(main, host_uses_signal_set_wakeup_fd=hosts) == -1) is hosts
    assert_nothing_left()


def test_a_wakeup_fd_in_use_is_left_alone_or_warned_of() -> None:
    async def main() -> int:
        return current_wakeup_fd()

    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        signal.set_wakeup_fd(left.fileno())
        try:
            assert run(main, host_uses_signal_set_wakeup_fd=True) == left.fileno()
            with pytest.warns(RuntimeWarning, match="host_uses_signal_set_wakeup_fd=True"):
                assert run(main) != left.fileno()
            assert current_wakeup_fd() == left.fileno()
            with pytest.raises(RuntimeWarning):  # as an error: then the run has not begun
                run(main)
            assert not in_kernel_run()
        finally:
            assert signal.set_wakeup_fd(-1) == left.fileno()
    assert_nothing_left()


def test_a_signal_that_another_thread_gets_wakes_a_host_that_sleeps_in_c() -> None:
    """The handler runs in the main thread, when that comes by. The wake-up fd and the helper see to it."""

    def handler(signum: int, frame: object) -> None:
        log.append("handled")
        lot.unpark()

    def strike_here() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    lot = ParkingLot()
    log: list[str] = []
    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        host = Host().start(lot.park)
        host.turn_until_asleep()
        thread = threading.Thread(target=strike_here)
        thread.start()
        host.run()
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert log == ["handled"]


# ---- async generators ----------------------------------------------------------------------------------------


def test_each_loop_finishes_the_async_generators_that_it_began() -> None:
    async def numbers(name: str) -> AsyncGenerator[int, None]:
        try:
            for number in range(10):
                yield number
        finally:
            log.append((name, in_kernel_task()))

    async def take_one(agen: AsyncGenerator[int, None]) -> None:
        async for _ in agen:
            break

    def drop_in_host() -> None:
        agen = numbers("host's, dropped between two ticks")
        with pytest.raises(StopIteration):
            take_one(agen).send(None)

    def keep_in_host() -> None:
        with pytest.raises(StopIteration):
            take_one(kept).send(None)

    async def main() -> None:
        nonlocal kept
        with pytest.warns(ResourceWarning, match="abandoned"):
            await take_one(numbers("guest's, dropped in a task"))
        host.soon(drop_in_host)
        host.soon(keep_in_host)
        mine.append(numbers("guest's, dropped in the host"))
        await take_one(mine[0])
        host.soon(mine.clear)
        host.soon(lot.unpark)
        with pytest.warns(ResourceWarning, match="abandoned"):
            await lot.park()
        kept = None  # dropped in a task
        await wait_all_tasks_blocked()

    def began(agen: object) -> None:
        hooks.append("began")

    def finish(agen: Any) -> None:
        hooks.append("finish")
        with pytest.raises(StopIteration):
            agen.aclose().send(None)

    log: list[tuple[str, bool]] = []
    hooks: list[str] = []
    mine: list[Any] = []
    lot = ParkingLot()
    kept: Any = numbers("host's, dropped in a task")
    sys.set_asyncgen_hooks(began, finish)
    try:
        host = Host()
        host.start(main).run()
        assert sys.get_asyncgen_hooks() == (began, finish)
    finally:
        sys.set_asyncgen_hooks(None, None)
    assert sorted(log) == [
        ("guest's, dropped in a task", True),
        ("guest's, dropped in the host", True),
        ("host's, dropped between two ticks", False),
        ("host's, dropped in a task", True),  # at once, by its own finalizer, wherever it is dropped
    ]
    assert hooks == ["began", "finish", "began", "finish"]


def test_hooks_that_the_host_sets_while_a_guest_runs_stay() -> None:
    """As when asyncio's loop begins after `start_guest_run`."""

    def began(agen: object) -> None:
        raise AssertionError("unreachable")

    async def numbers() -> AsyncGenerator[int, None]:
        try:
            yield 1
        finally:
            log.append(in_kernel_task())

    async def main() -> None:
        agen = numbers()
        async for _ in agen:
            break
        keep.append(agen)

    log: list[bool] = []
    keep: list[Any] = []
    host = Host().start(main)
    sys.set_asyncgen_hooks(began, None)
    try:
        host.run()
        assert sys.get_asyncgen_hooks() == (began, None)
    finally:
        sys.set_asyncgen_hooks(None, None)
    assert log == [True]


# ---- a host that does not go on ------------------------------------------------------------------------------


def test_a_host_that_drops_the_next_tick_loses_the_run_and_is_told() -> None:
    async def main() -> None:
        await kernel.sleep(0.001)  # so that there is a helper
        log.append("slept")
        while True:
            await checkpoint()

    log: list[str] = []
    host = Host().start(main)
    while not log:
        host.turn()
    del host
    with pytest.warns(RuntimeWarning, match="before its guest run had ended"):
        gc.collect()
    assert_nothing_left()


def test_asyncio_closed_before_the_guest_has_ended() -> None:
    async def main() -> None:
        start_guest_run(
            busy,
            run_sync_soon_threadsafe=(loop := asyncio.get_running_loop()).call_soon_threadsafe,
            run_sync_soon_not_threadsafe=loop.call_soon,
            done_callback=print,
            host_uses_signal_set_wakeup_fd=True,
        )
        await asyncio.sleep(0.001)

    async def busy() -> None:
        await kernel.sleep(0)
        while True:
            await checkpoint()

    with pytest.warns(RuntimeWarning, match="before its guest run had ended"):
        asyncio.run(main())
    gc.collect()
    assert not in_kernel_run()
    assert kernel.run(answer) == 42


def test_a_host_closed_while_the_helper_waits_is_noticed_at_the_next_wake_up() -> None:
    """In a process of its own: what belongs to the host's thread cannot be taken back from the helper's."""
    program = """
        import asyncio, threading, warnings, kernel
        from kernel.lowlevel import start_guest_run, current_kernel_token

        async def main():
            loop = asyncio.get_running_loop()
            start_guest_run(kernel.sleep_forever, run_sync_soon_threadsafe=loop.call_soon_threadsafe,
                            done_callback=print, host_uses_signal_set_wakeup_fd=True)
            token = current_kernel_token()
            await asyncio.sleep(0.01)
            return token

        token = asyncio.run(main())
        (helper,) = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
        print(helper.name, helper.daemon)
        token.run_sync_soon(print)
        helper.join()
    """
    finished = python("-c", textwrap.dedent(program))
    assert finished.stdout == "helper of a guest run True\n"
    assert finished.stderr.count("RuntimeWarning: a host loop was closed before its guest run had ended") == 1
    assert "Traceback" not in finished.stderr
    assert finished.returncode == 0


def python(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# ---- real hosts ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def on_loop(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`on_loop(coroutine)`: run it in asyncio, on asyncio's own loop or uvloop's."""
    if request.param == "asyncio":
        return asyncio.run
    uvloop = pytest.importorskip("uvloop", reason="uvloop is in the bench extra, and is not installed")

    def run(coroutine: Any) -> Any:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(coroutine)

    run(asyncio.sleep(0))  # the first loop of a process opens a pipe that is never closed: not ours to answer for
    return run


run_guest, from_asyncio, to_asyncio = (BRIDGES[name] for name in ("run_guest", "from_asyncio", "to_asyncio"))


def test_a_program_on_asyncio(on_loop: Callable[..., Any]) -> None:
    async def program() -> list[str]:
        log = []
        left, right = socket.socketpair()
        with left, right:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(wait_readable, left)
                await kernel.sleep(0.001)
                right.send(b"x")
            log.append("socket")
            token, lot = current_kernel_token(), ParkingLot()
            thread = threading.Thread(target=token.run_sync_soon, args=(lot.unpark,))
            thread.start()
            await lot.park()
            thread.join()
            log.append("thread")
            with kernel.move_on_after(0.001):
                await kernel.sleep_forever()
            log.append("timeout")
            log.append(await from_asyncio(asyncio.sleep(0.001, "asyncio")))
        return log

    async def main() -> list[str]:
        ticks = 0

        async def alive() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(alive())
        result: list[str] = await run_guest(program)
        other.cancel()
        assert ticks > 3
        assert await run_guest(program) == result  # and once more, on the same loop
        return result

    assert on_loop(main()) == ["socket", "thread", "timeout", "asyncio"]


def test_asyncio_and_the_kernel_play_ping_pong(on_loop: Callable[..., Any]) -> None:
    async def main() -> None:
        to_asyncio_queue: asyncio.Queue[int] = asyncio.Queue()
        send, receive = kernel.open_memory_channel[int](inf)

        async def pong() -> None:
            while True:
                send.send_nowait(await to_asyncio_queue.get() + 1)

        async def ping() -> int:
            number = 0
            while number < 20:
                to_asyncio_queue.put_nowait(number)
                number = await receive.receive() + 1
            return number

        other = asyncio.create_task(pong())
        assert await run_guest(ping) == 20
        other.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await other
        send.close()
        receive.close()

    on_loop(main())


def test_cancelling_the_asyncio_side_cancels_the_guest_and_waits_for_its_end(on_loop: Callable[..., Any]) -> None:
    async def main() -> None:
        task = asyncio.create_task(run_guest(program))
        await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()  # impatient
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == ["cleaned up"]
        assert not in_kernel_run()

    async def program() -> None:
        try:
            await kernel.sleep_forever()
        finally:
            with kernel.CancelScope(shield=True):
                await kernel.sleep(0.001)
            log.append("cleaned up")

    log: list[str] = []
    on_loop(main())


def test_results_errors_and_cancellations_cross_from_asyncio_to_the_kernel(on_loop: Callable[..., Any]) -> None:
    async def fail() -> None:
        raise KeyError("asyncio's")

    async def slow_to_leave() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.001)
            log.append("asyncio has cleaned up")

    async def program() -> None:
        with pytest.raises(KeyError, match="asyncio's"):
            await from_asyncio(fail())
        with kernel.move_on_after(0.001) as scope:
            await from_asyncio(slow_to_leave())
        assert scope.cancelled_caught
        log.append("the kernel has left")
        with kernel.CancelScope() as scope:
            scope.cancel()
            future = asyncio.get_running_loop().create_future()
            await from_asyncio(future)
        assert scope.cancelled_caught
        assert not future.cancelled()  # it was never waited for
        future.set_result(None)
        await from_asyncio(future)

    log: list[str] = []
    on_loop(run_guest(program))
    assert log == ["asyncio has cleaned up", "the kernel has left"]


def test_results_errors_and_cancellations_cross_from_the_kernel_to_asyncio(on_loop: Callable[..., Any]) -> None:
    async def fail() -> None:
        raise KeyError("the kernel's")

    async def program() -> None:
        async with kernel.open_nursery() as nursery:
            future = to_asyncio(nursery, answer)
            assert await from_asyncio(future) == 42
            with pytest.raises(KeyError, match="the kernel's"):
                await from_asyncio(to_asyncio(nursery, fail))
            future = to_asyncio(nursery, kernel.sleep_forever)
            await wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 1
            future.cancel()  # asyncio loses interest
        async with kernel.open_nursery() as nursery:
            future = to_asyncio(nursery, kernel.sleep_forever)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert future.cancelled()

    on_loop(run_guest(program))


def test_asyncios_own_ctrl_c_handler_cancels_its_main_task_and_so_the_guest() -> None:
    async def program() -> None:
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
        try:
            await kernel.sleep_forever()
        finally:
            log.append("cancelled")

    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(run_guest(program))
    assert log == ["cancelled"]
    assert_nothing_left()


def test_without_a_handler_of_asyncios_ctrl_c_goes_to_the_guest() -> None:
    async def program() -> None:
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
        try:
            await kernel.sleep_forever()
        finally:
            log.append("interrupted")

    log: list[str] = []
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(run_guest(program))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
    assert log == ["interrupted"]
    assert_nothing_left()


def test_asyncios_signal_handlers_work_beside_a_guest() -> None:
    async def program() -> None:
        event = kernel.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, event.set)
        os.kill(os.getpid(), signal.SIGUSR1)
        await event.wait()
        loop.remove_signal_handler(signal.SIGUSR1)

    asyncio.run(run_guest(program))


def test_asyncios_async_generators_go_to_asyncio(on_loop: Callable[..., Any]) -> None:
    async def numbers(name: str) -> AsyncGenerator[int, None]:
        try:
            yield 1
        finally:
            await (checkpoint() if name == "kernel" else asyncio.sleep(0))
            log.append((name, in_kernel_task()))

    async def take_one(name: str) -> None:
        async for _ in numbers(name):
            break

    async def program() -> None:
        await from_asyncio(take_one("asyncio"))
        await from_asyncio(asyncio.sleep(0.001))
        with pytest.warns(ResourceWarning, match="abandoned"):
            await take_one("kernel")
        await wait_all_tasks_blocked()

    log: list[tuple[str, bool]] = []
    on_loop(run_guest(program))
    assert log == [("asyncio", False)]  # the kernel closes in a cancelled scope: its `finally` got no further


# ---- trio, both ways round -----------------------------------------------------------------------------------


def test_a_guest_of_trio_and_trio_as_a_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    trio = pytest.importorskip("trio", reason="trio is in the bench extra, and is not installed")
    monkeypatch.setattr("trio._core._thread_cache.IDLE_TIMEOUT", 0.01)  # its helper stays for 10 s otherwise

    async def in_trio() -> str:
        await trio.sleep(0.001)
        return "trio's"

    async def in_kernel() -> str:
        await kernel.sleep(0.001)
        return "the kernel's"

    async def trio_as_host() -> str:
        token = trio.lowlevel.current_trio_token()
        done, outcomes = trio.Event(), []
        start_guest_run(
            in_kernel,
            run_sync_soon_threadsafe=token.run_sync_soon,
            done_callback=lambda outcome: (outcomes.append(outcome), done.set()),
            host_uses_signal_set_wakeup_fd=True,
        )
        await done.wait()
        return str(outcomes[0].unwrap())

    async def kernel_as_host() -> str:
        token = current_kernel_token()
        done, outcomes = kernel.Event(), []
        trio.lowlevel.start_guest_run(
            in_trio,
            run_sync_soon_threadsafe=token.run_sync_soon,
            done_callback=lambda outcome: (outcomes.append(outcome), done.set()),
            host_uses_signal_set_wakeup_fd=True,
        )
        await done.wait()
        return str(outcomes[0].unwrap())

    assert trio.run(trio_as_host) == "the kernel's"
    assert kernel.run(kernel_as_host) == "trio's"
    for thread in set(threading.enumerate()) - {threading.main_thread()}:
        thread.join()


# ---- Tk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def display() -> Iterator[str]:
    """A display that nobody sees, of our own."""
    if importlib.util.find_spec("_tkinter") is None:
        pytest.skip("this Python has no tkinter")
    if shutil.which("Xvfb") is None:
        pytest.skip("there is no Xvfb (Debian: apt-get install xvfb)")
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as numbers:
        try:
            server = subprocess.Popen(
                ["Xvfb", "-displayfd", str(writer), "-screen", "0", "640x480x24", "-nolisten", "tcp"],
                pass_fds=[writer],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        finally:
            os.close(writer)
        try:
            number = b""
            while not number.endswith(b"\n"):
                assert select.select([numbers], [], [], 30)[0], "Xvfb did not start within 30 s"
                byte = numbers.read(1)
                assert byte, "Xvfb could not start"
                number += byte
            yield f":{number.decode().strip()}"
        finally:
            server.terminate()
            server.wait()


TK_PROGRAM = """
    import gc, runpy, socket, sys, threading, tkinter
    import kernel
    from kernel.lowlevel import current_kernel_token, in_kernel_run, ParkingLot, start_guest_run, wait_readable
    from kernel.lowlevel import checkpoint

    Host = runpy.run_path(sys.argv[1])["Host"]
    root = tkinter.Tk()
    host = Host(root)
    log = []

    async def program():
        lot, token = ParkingLot(), current_kernel_token()
        root.after(1, lot.unpark)  # a callback of Tk's wakes a task
        await lot.park()
        log.append("Tk")
        left, right = socket.socketpair()
        with left, right:
            root.after(1, right.send, b"x")
            await wait_readable(left)
        log.append("socket")
        thread = threading.Thread(target=token.run_sync_soon, args=(lot.unpark,))
        thread.start()
        await lot.park()
        thread.join()
        log.append("thread")
        with kernel.move_on_after(0.005):
            await kernel.sleep_forever()
        log.append("timeout")
        with kernel.CancelScope() as scope:
            button = tkinter.Button(root, command=scope.cancel)
            root.after(1, button.invoke)
            await kernel.sleep_forever()
        log.append("button")
        drawn = []
        root.after_idle(drawn.append, 1)
        root.after(1, drawn.append, 2)
        while len(drawn) < 2:  # busy, and Tk goes on
            await checkpoint()
        log.append("busy")
        return 42

    def done(outcome):
        log.append(outcome)
        root.quit()

    for _ in range(2):  # a second guest after the first
        start_guest_run(program, run_sync_soon_threadsafe=host.soon_threadsafe, run_sync_soon_not_threadsafe=host.soon,
                        done_callback=done)
        root.mainloop()
        assert not in_kernel_run() and threading.active_count() == 1
    host.close()
    root.destroy()
    print(*log)
"""


def test_a_program_on_tk(display: str) -> None:
    finished = python(
        "-W", "error", "-c", textwrap.dedent(TK_PROGRAM), str(ROOT / "examples" / "guest_tk.py"), DISPLAY=display
    )
    assert finished.stderr == ""
    assert finished.stdout == " ".join(["Tk socket thread timeout button busy Value(42)"] * 2) + "\n"


def test_the_tk_example_with_a_window(display: str) -> None:
    finished = python("-W", "error", str(ROOT / "examples" / "guest_tk.py"), "--demo", DISPLAY=display)
    assert finished.stderr == ""
    assert finished.stdout.splitlines() == [
        "paused",
        "going on",
        "salt: here",
        "tea: here",
        "silk: given up",
        "stopped",
    ]
    assert finished.returncode == 0
