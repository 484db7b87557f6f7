"""The loop: whose turn it is, when the outside world is looked at, how a run begins and ends."""

from __future__ import annotations

import asyncio
import gc
import random
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextvars import ContextVar
from functools import partial
from itertools import pairwise
from math import inf
from typing import Any

import pytest

import kernel
from kernel.core.loop import STRIDE, Kernel
from kernel.core.task import here
from kernel.drivers.clock import MonotonicClock
from kernel.drivers.poller import default_poller
from kernel.drivers.timers import SortedTimers
from kernel.lowlevel import (
    ParkingLot,
    Task,
    Trap,
    cancel_shielded_checkpoint,
    checkpoint,
    consume_budget,
    current_kernel,
    current_task,
    wait_readable,
)
from kernel.testing import MockClock, wait_all_tasks_blocked

Virtual = Callable[..., Any]


@pytest.fixture
def wreckage() -> Iterator[None]:
    """For runs that break: they leave coroutines in the middle, and what those say when they are collected is not the
    subject.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda unraisable: None)
        yield
        gc.collect()


class DrivenPoller:
    """A poller that waits for nothing real: each look that may block takes the next thing from the script."""

    def __init__(self, *script: Callable[[], list[Task]]) -> None:
        self.script = list(script)
        self.looks: list[float] = []

    def poll(self, timeout: float) -> list[Task]:
        self.looks.append(timeout)
        return self.script.pop(0)() if timeout > 0 and self.script else []

    def arm(self, fd: int, direction: Any, task: Task) -> None:
        raise NotImplementedError

    disarm = arm

    def forget(self, fd: int) -> list[Task]:
        return []

    def close(self) -> None:
        pass

    def __len__(self) -> int:
        return 0


def interrupt() -> list[Task]:
    raise KeyboardInterrupt


# ---- whose turn it is --------------------------------------------------------------------------------


def names_in_turn(log: list[str], rounds: int = 3) -> Callable[[str], Any]:
    async def child(name: str) -> None:
        for _ in range(rounds):
            log.append(name)
            await checkpoint()

    return child


def test_ready_tasks_run_first_come_first_served() -> None:
    log: list[str] = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(names_in_turn(log), name)

    kernel.run(main)
    assert "".join(log) == "abcabcabc"


def test_tasks_run_in_the_order_they_were_woken() -> None:
    log: list[str] = []
    lots = {name: ParkingLot() for name in "abc"}

    async def child(name: str) -> None:
        await lots[name].park()
        log.append(name)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(child, name)
            await wait_all_tasks_blocked()
            for name in "cab":
                lots[name].unpark()

    kernel.run(main)
    assert "".join(log) == "cab"


def test_equal_deadlines_wake_in_the_order_they_were_set(virtual: Virtual) -> None:
    log: list[int] = []

    async def child(number: int) -> None:
        await kernel.sleep_until(10)
        log.append(number)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(child, number)

    virtual(main)
    assert log == list(range(20))


class Lifo:
    """Last come, first served."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.picked: list[str] = []

    def append(self, task: Task, /) -> None:
        self.tasks.append(task)

    def popleft(self) -> Task:
        task = self.tasks.pop(self.pick())
        self.picked.append(task.name)
        return task

    def pick(self) -> int:
        return -1

    def __len__(self) -> int:
        return len(self.tasks)


class Shuffled(Lifo):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)

    def pick(self) -> int:
        return self.random.randrange(len(self.tasks))


def run_three(ready: Lifo) -> list[str]:
    log: list[str] = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(names_in_turn(log), name, name=name)

    kernel.run(main, ready=ready)
    # The last turn of each task, in which it ends, is picked too and writes nothing.
    assert sorted(name for name in ready.picked if name in "abc") == sorted("abc" * 4)
    return log


def test_a_lifo_queue_makes_the_last_one_run_first() -> None:
    assert "".join(run_three(Lifo())) == "cccbbbaaa"


def test_a_random_queue_replays_from_its_seed() -> None:
    runs = {seed: run_three(Shuffled(seed)) for seed in range(5)}
    assert len({"".join(log) for log in runs.values()}) > 1
    for seed, log in runs.items():
        again = Shuffled(seed)
        assert run_three(again) == log


def test_the_kernel_runs_whom_the_queue_picks() -> None:
    ready = Shuffled(7)
    log: list[str] = []

    async def child() -> None:
        for _ in range(20):
            log.append(current_task().name)
            await checkpoint()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(child, name=name)

    kernel.run(main, ready=ready)
    picked = [name for name in ready.picked if name in "abc"]
    for name in "abc":  # without the turn in which each ends
        del picked[len(picked) - 1 - picked[::-1].index(name)]
    assert log == picked


# ---- looking at the outside world --------------------------------------------------------------------


@pytest.mark.parametrize("spin", [checkpoint, cancel_shielded_checkpoint, lambda: kernel.sleep(0)])
def test_a_spinning_task_keeps_neither_a_sleeper_nor_a_socket_waiter_from_running(spin: Callable[[], Any]) -> None:
    a, b = socket.socketpair()
    clock = MockClock()
    log: list[str] = []

    async def sleeper() -> None:
        await kernel.sleep(1)
        log.append("sleeper")

    async def reader() -> None:
        await wait_readable(a)
        log.append("reader")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sleeper)
            nursery.start_soon(reader)
            await wait_all_tasks_blocked()
            clock.jump(2)
            b.send(b"x")
            for _ in range(2 * STRIDE):
                await spin()
            log.append("spun")

    with a, b:
        kernel.run(main, clock=clock)
    assert log == ["reader", "sleeper", "spun"]


def test_operations_that_need_not_block_do_not_keep_a_sleeper_from_running() -> None:
    clock = MockClock()
    log: list[str] = []

    async def sleeper() -> None:
        await kernel.sleep(1)
        log.append("sleeper")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sleeper)
            await wait_all_tasks_blocked()
            clock.jump(2)
            for _ in range(129 * 2 * STRIDE):
                await consume_budget()
            log.append("spun")

    kernel.run(main, clock=clock)
    assert log == ["sleeper", "spun"]


def test_what_happened_to_files_comes_before_what_became_due() -> None:
    a, b = socket.socketpair()
    log: list[str] = []
    clock = MockClock()

    async def sleeper() -> None:
        await kernel.sleep(1)
        log.append("timer")

    async def reader() -> None:
        await wait_readable(a)
        log.append("file")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sleeper)
            nursery.start_soon(reader)
            await wait_all_tasks_blocked()
            b.send(b"x")
            clock.jump(1)

    with a, b:
        kernel.run(main, clock=clock)
    assert log == ["file", "timer"]


def steps_between_looks(cost_of_step: Callable[[int], float], steps: int) -> list[int]:
    """Run one task that spins, each step taking so many seconds; how many of its steps fell between two looks."""
    clock = MockClock()
    done = 0
    at_look: list[int] = []

    class Watching(DrivenPoller):
        def poll(self, timeout: float) -> list[Task]:
            at_look.append(done)
            return super().poll(timeout)

    async def main() -> None:
        nonlocal done
        while done < steps:
            done += 1
            clock.jump(cost_of_step(done))
            await checkpoint()

    kernel.run(main, clock=clock, poller=Watching())
    return [after - before for before, after in pairwise(at_look)]


def test_quick_steps_are_run_61_at_a_time_from_the_start() -> None:
    assert STRIDE == 61
    assert set(steps_between_looks(lambda step: 0.0, 1000)[:-1]) == {61}


def test_slow_steps_make_the_stride_shrink_to_one() -> None:
    between = steps_between_looks(lambda step: 0.01, 1000)
    assert between[:4] in ([30, 15, 7, 3], [15, 7, 3, 1])  # the first counts only from the first look
    assert set(between[5:-1]) == {1}


def test_the_stride_settles_where_a_pass_takes_a_millisecond() -> None:
    between = steps_between_looks(lambda step: 0.0001, 2000)
    assert min(between[20:-1]) >= 4
    assert max(between[20:-1]) <= 20


def test_the_stride_grows_back_when_steps_are_quick_again() -> None:
    between = steps_between_looks(lambda step: 0.01 if step < 500 else 0.0, 2000)
    assert 1 in between
    quick = between[between.index(1) :]
    grown = quick[quick.index(2) :]
    assert grown[:6] == [2, 4, 8, 16, 32, 61]
    assert set(grown[6:-1]) == {61}


def test_the_look_that_slept_until_a_deadline_serves_it() -> None:
    real = 0.0

    def sleep() -> list[Task]:
        nonlocal real
        real += poller.looks[-1]
        return []

    poller = DrivenPoller(sleep, sleep)

    async def main() -> None:
        await kernel.sleep(2.5)
        with kernel.move_on_after(4):
            await kernel.sleep_forever()

    kernel.run(main, poller=poller, clock=MockClock(rate=1, real_clock=lambda: real))
    assert [timeout for timeout in poller.looks if timeout] == [2.5, 4]
    assert poller.looks[0] == 2.5
    assert poller.looks[1] == 4  # and no look in between


def test_an_idle_kernel_that_is_woken_for_nothing_goes_back_to_sleep() -> None:
    """Signals do that, and late reports; the longest a poller sleeps is a day."""
    tasks: list[Task] = []
    poller = DrivenPoller(list, list, list, lambda: tasks)

    async def main() -> str:
        tasks.append(current_task())
        await ParkingLot().park()
        return "woken"

    assert kernel.run(main, poller=poller, detect_deadlock=False) == "woken"
    assert poller.looks == [inf] * 4


def test_an_idle_kernel_that_is_woken_for_nothing_does_not_move_a_virtual_clock() -> None:
    tasks: list[Task] = []
    poller = DrivenPoller(list, list, lambda: tasks)

    async def main() -> float:
        tasks.append(current_task())
        await ParkingLot().park()
        return kernel.current_time()

    assert kernel.run(main, poller=poller, clock=MockClock(), detect_deadlock=False) == 0
    assert poller.looks == [inf] * 3


# ---- step by step from outside -----------------------------------------------------------------------


def by_hand(main: Callable[..., Any], clock: MockClock, steps: Callable[[Kernel, Task], None]) -> None:
    """A run that nobody drives but the test: `steps` gets the kernel and its root task, and does what a host would."""

    guest = Kernel(clock=clock, timers=SortedTimers(), poller=default_poller(), ready=deque())
    guest.begin()
    guest.plant(main, (), in_async(lambda: None))
    root = guest.root_task
    assert root is not None
    try:
        steps(guest, root)
        guest.drive()
    finally:
        outcome = guest.end()
        guest.poller.close()
    assert outcome is not None
    outcome.unwrap()


def test_a_host_may_call_run_ready_idle_time_and_poll_itself() -> None:
    real = 100.0
    clock = MockClock(rate=2.0, real_clock=lambda: real)
    a, b = socket.socketpair()
    log: list[str] = []

    async def main() -> None:
        log.append("begun")
        await kernel.sleep(5)
        log.append("slept")
        await wait_readable(a)
        log.append("read")

    def steps(run: Kernel, root: Task) -> None:
        nonlocal real
        assert run.idle_time() == 0
        assert log == []
        run.run_ready()
        assert log == ["begun"]
        assert run.current is None
        assert run.idle_time() == 2.5  # real seconds
        run.poll(0)
        run.run_ready()
        assert log == ["begun"]
        real += 2.5
        assert run.idle_time() == 0
        run.poll(0)
        assert log == ["begun"]  # poll makes ready, and runs nothing
        assert run.idle_time() == 0
        run.run_ready()
        assert log == ["begun", "slept"]
        assert run.idle_time() == inf
        run.poll(0)
        assert run.idle_time() == inf
        b.send(b"x")
        run.poll(inf)
        assert run.idle_time() == 0
        assert root.outcome is None
        run.run_ready()
        assert log == ["begun", "slept", "read"]

    with a, b:
        by_hand(main, clock, steps)


def test_run_ready_does_at_most_61_steps_and_then_comes_back() -> None:
    done = 0

    async def main() -> None:
        nonlocal done
        for _ in range(200):
            done += 1
            await checkpoint()

    def steps(run: Kernel, root: Task) -> None:
        run.run_ready()
        assert done == STRIDE - 1  # and one of the root task's
        assert run.idle_time() == 0
        run.run_ready()
        assert done == 2 * STRIDE - 1

    by_hand(main, MockClock(), steps)


def test_run_ready_with_nothing_ready_does_nothing() -> None:
    clock = MockClock()

    async def main() -> None:
        await kernel.sleep(1)

    def steps(run: Kernel, root: Task) -> None:
        run.run_ready()
        run.run_ready()
        assert run.current is None
        assert run.idle_time() == inf
        clock.jump(1)

    by_hand(main, clock, steps)


# ---- when something of the kernel's breaks -----------------------------------------------------------


class BrokenError(Exception):
    pass


def broken(*args: object) -> Any:
    raise BrokenError("it broke")


def break_driver(which: str, method: str) -> dict[str, Any]:
    """Keyword arguments for `run` with one method of one driver broken."""
    if which == "clock":
        drivers: dict[str, Any] = {"clock": MonotonicClock()}
    elif which == "poller":
        drivers = {"poller": DrivenPoller()}
    else:
        drivers = {"ready": Lifo()}
    setattr(drivers[which], method, broken)
    return drivers


@pytest.mark.parametrize(
    ("which", "method"),
    [
        ("clock", "start_clock"),
        ("clock", "current_time"),
        ("clock", "deadline_to_sleep_time"),
        ("poller", "poll"),
        ("ready", "popleft"),
    ],
)
def test_a_driver_that_breaks_ends_the_run_with_its_state_and_the_cause(
    which: str, method: str, wreckage: None
) -> None:
    async def main() -> None:
        await kernel.sleep_forever()

    with pytest.raises(
        kernel.KernelInternalError,
        match=r"one of its drivers broke.*tasks ready, \d+ timers, \d+ waits for files, running",
    ) as info:
        kernel.run(main, **break_driver(which, method))
    assert isinstance(info.value.__cause__, BrokenError)
    assert here.kernel is None


@pytest.mark.parametrize("method", ["expired", "next_deadline"])
def test_timers_that_break_end_the_run(method: str, monkeypatch: pytest.MonkeyPatch, wreckage: None) -> None:
    async def main() -> None:
        await kernel.sleep(1000)

    with monkeypatch.context() as patch:
        patch.setattr(SortedTimers, method, broken)
        with pytest.raises(kernel.KernelInternalError, match="0 tasks ready, 1 timers, 0 waits for files") as info:
            kernel.run(main, poller=DrivenPoller())
    assert isinstance(info.value.__cause__, BrokenError)


def test_a_trap_that_breaks_when_its_time_has_come_ends_the_run(wreckage: None) -> None:
    class Bad(kernel.lowlevel.SleepUntil):
        def expire(self, kernel: Kernel) -> None:
            raise BrokenError("it broke")

    async def main() -> None:
        await Bad(10)

    with pytest.raises(kernel.KernelInternalError) as info:
        kernel.run(main, clock=MockClock(autojump_threshold=0))
    assert isinstance(info.value.__cause__, BrokenError)


def test_a_system_task_that_fails_ends_the_run_after_everything_was_asked_to_leave() -> None:
    log: list[str] = []

    async def main() -> None:
        nursery = current_kernel().system_nursery
        assert nursery is not None
        nursery.start_soon(in_async(broken))
        try:
            await kernel.sleep_forever()
        except kernel.Cancelled as why:
            log.append(why.source)
            raise

    with pytest.raises(kernel.KernelInternalError, match="a task of the kernel's own failed") as info:
        kernel.run(main)
    assert log == ["nursery"]
    assert isinstance(info.value.__cause__, ExceptionGroup)
    assert isinstance(info.value.__cause__.exceptions[0], BrokenError)


def in_async(function: Callable[[], Any]) -> Callable[[], Any]:
    async def body() -> Any:
        return function()

    return body


def test_a_system_task_is_cancelled_when_the_program_has_ended() -> None:
    log: list[str] = []

    async def system() -> None:
        try:
            await kernel.sleep_forever()
        except kernel.Cancelled as why:
            log.append(f"system: {why.source}")
            raise

    async def main() -> None:
        nursery = current_kernel().system_nursery
        assert nursery is not None
        nursery.start_soon(system)
        await checkpoint()
        log.append("main")

    kernel.run(main)
    assert log == ["main", "system: shutdown"]


# ---- run: what it takes, what it gives ---------------------------------------------------------------


def test_run_inside_a_run_is_an_error_that_says_what_to_do_and_the_kernel_lives_on() -> None:
    async def inner() -> None:
        raise AssertionError("never runs")

    async def main() -> str:
        outer = current_kernel()
        with pytest.raises(RuntimeError, match=r"called from inside a kernel.*Await the function instead"):
            kernel.run(inner)
        assert current_kernel() is outer
        await checkpoint()
        return "lives"

    assert kernel.run(main) == "lives"


def test_two_threads_may_each_run_a_kernel_at_once() -> None:
    barrier = threading.Barrier(2, timeout=30)
    seen: dict[str, Any] = {}

    async def main(name: str) -> None:
        seen[name] = current_kernel()
        barrier.wait()
        for _ in range(200):
            await checkpoint()
            assert current_kernel() is seen[name]
        await kernel.sleep(0)
        barrier.wait()

    def thread(name: str) -> None:
        kernel.run(main, name)
        seen[name + " ended"] = here.kernel

    threads = [threading.Thread(target=thread, args=(name,)) for name in "ab"]
    for one in threads:
        one.start()
    for one in threads:
        one.join(30)
    assert seen["a"] is not seen["b"]
    assert seen["a ended"] is seen["b ended"] is None


async def async_main(*args: object) -> object:
    await checkpoint()
    return args


def generator_main(*args: object) -> Generator[Any, Any, object]:
    yield from checkpoint()
    return args


class AsyncCallable:
    async def __call__(self, *args: object) -> object:
        return args

    async def method(self, *args: object) -> object:
        return args


class Awaitable:
    def __init__(self, *args: object) -> None:
        self.args = args

    def __await__(self) -> Generator[Any, Any, object]:
        yield from checkpoint()
        return self.args


@pytest.mark.parametrize(
    "main",
    [
        async_main,
        generator_main,
        partial(async_main),
        partial(generator_main),
        lambda *args: async_main(*args),
        AsyncCallable(),
        AsyncCallable().method,
        Awaitable,
    ],
)
def test_run_takes_everything_whose_call_can_be_awaited_and_returns_its_result(main: Any) -> None:
    assert kernel.run(main) == ()
    assert kernel.run(main, 1, "two") == (1, "two")


async def async_generator() -> AsyncIterator[int]:
    yield 1


def plain() -> int:
    return 42


def returning_a_future() -> Any:
    loop = asyncio.new_event_loop()
    try:
        return loop.create_future()
    finally:
        loop.close()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: async_main(), r"kernel\.run wants the function.*Write kernel\.run\(async_main, \.\.\.\), not"),
        (lambda: generator_main(), r"Write kernel\.run\(generator_main, \.\.\.\), not kernel\.run\(generator_main\("),
        (lambda: plain, r"plain is a plain one: it has run already and returned 42.*Write `async def plain`"),
        (lambda: async_generator, r"async_generator is an async generator: it contains `yield`.*async for item in"),
        (lambda: 42, r"kernel\.run wants an async function, not 42"),
        (lambda: None, r"kernel\.run wants an async function, not None"),
        (lambda: returning_a_future, r"returned <Future.*a future of asyncio"),
    ],
)
def test_run_refuses_what_is_no_async_function_and_names_the_cure(make: Callable[[], Any], text: str) -> None:
    hooks = sys.get_asyncgen_hooks()
    with pytest.raises(TypeError, match=text):
        kernel.run(make())
    assert here.kernel is None
    assert sys.get_asyncgen_hooks() == hooks
    assert kernel.run(async_main, "and after that") == ("and after that",)


def test_wrong_arguments_are_the_functions_own_type_error() -> None:
    async def main(one: int) -> None:
        raise AssertionError("never runs")

    with pytest.raises(TypeError, match="missing 1 required positional argument: 'one'"):
        kernel.run(main)


def test_what_main_raises_comes_out_as_it_is() -> None:
    error = ValueError("mine")

    async def main() -> None:
        await checkpoint()
        raise error

    with pytest.raises(ValueError, match="mine") as info:
        kernel.run(main)
    assert info.value is error


@pytest.mark.parametrize("steps", [0, 1])
def test_system_exit_in_main_comes_out_as_it_is(steps: int) -> None:
    async def main() -> None:
        for _ in range(steps):
            await checkpoint()
        raise SystemExit(3)

    with pytest.raises(SystemExit) as info:
        kernel.run(main)
    assert info.value.code == 3


def test_system_exit_in_a_child_comes_out_in_a_group_after_the_others_have_left() -> None:
    log: list[str] = []

    async def other() -> None:
        try:
            await kernel.sleep_forever()
        finally:
            log.append("left")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other)
            nursery.start_soon(in_async(lambda: sys.exit(3)))

    with pytest.raises(BaseExceptionGroup) as info:
        kernel.run(main)
    (error,) = info.value.exceptions
    assert isinstance(error, SystemExit)
    assert error.code == 3
    assert log == ["left"]


def test_main_runs_in_a_copy_of_the_callers_context() -> None:
    var: ContextVar[str] = ContextVar("var", default="default")
    seen: list[str] = []

    async def main() -> None:
        seen.append(var.get())
        var.set("set in main")
        await checkpoint()
        seen.append(var.get())

    token = var.set("set outside")
    try:
        kernel.run(main)
        assert seen == ["set outside", "set in main"]
        assert var.get() == "set outside"
    finally:
        var.reset(token)


# ---- Ctrl-C while nothing runs -----------------------------------------------------------------------


def test_ctrl_c_while_idle_asks_everything_to_leave_and_then_comes_out() -> None:
    log: list[str] = []

    async def child() -> None:
        try:
            await kernel.sleep_forever()
        except kernel.Cancelled as why:
            log.append(f"child: {why.source}")
            with kernel.CancelScope(shield=True):
                await checkpoint()
                log.append("child has cleaned up")
            raise

    async def main() -> None:
        try:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(child)
        finally:
            log.append("main has left")

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main, poller=DrivenPoller(interrupt))
    assert log == ["child: KeyboardInterrupt", "child has cleaned up", "main has left"]
    assert here.kernel is None


def test_ctrl_c_comes_out_even_if_main_returns_or_fails() -> None:
    async def returning() -> str:
        try:
            await kernel.sleep_forever()
        except kernel.Cancelled:
            return "never mind"

    async def failing() -> None:
        try:
            await kernel.sleep_forever()
        finally:
            raise OSError("never mind")

    with pytest.raises(KeyboardInterrupt) as info:
        kernel.run(returning, poller=DrivenPoller(interrupt))
    assert info.value.__context__ is None
    with pytest.raises(KeyboardInterrupt) as info:
        kernel.run(failing, poller=DrivenPoller(interrupt))
    assert isinstance(info.value.__context__, OSError)


def test_a_second_ctrl_c_does_not_wait(wreckage: None) -> None:
    log: list[str] = []

    async def main() -> None:
        try:
            await kernel.sleep_forever()
        except kernel.Cancelled:
            log.append("cleaning up")
            with kernel.CancelScope(shield=True):
                await kernel.sleep_forever()
            log.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main, poller=DrivenPoller(interrupt, interrupt))
    assert log == ["cleaning up"]
    assert here.kernel is None


def test_ctrl_c_before_the_first_step_comes_out_at_once(wreckage: None) -> None:
    class Interrupting(Lifo):
        def popleft(self) -> Task:
            raise KeyboardInterrupt

    async def main() -> None:
        raise AssertionError("never runs")

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main, ready=Interrupting())
    assert here.kernel is None


def test_ctrl_c_in_a_task_is_that_tasks_exception() -> None:
    async def main() -> None:
        await checkpoint()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)


# ---- tracebacks --------------------------------------------------------------------------------------


def frames(error: BaseException) -> list[str]:
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


def files(error: BaseException) -> set[str]:
    found = {frame.filename.rpartition("/")[2] for frame in traceback.extract_tb(error.__traceback__)}
    for inner in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        found |= files(inner)
    return found


async def deep(depth: int) -> None:
    if depth:
        await deep(depth - 1)
    else:
        await checkpoint()
        raise BrokenError


def test_an_error_of_main_shows_run_and_then_the_users_own_frames() -> None:
    async def main() -> None:
        await deep(2)

    with pytest.raises(BrokenError) as info:
        kernel.run(main)
    assert frames(info.value)[1:] == ["run", "unwrap", "main", "deep", "deep", "deep"]


def test_an_error_of_a_child_shows_its_own_frames_alone() -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(deep, 1)

    with pytest.raises(ExceptionGroup) as info:
        kernel.run(main)
    assert frames(info.value)[1:] == ["run", "unwrap", "main", "_close"]
    assert frames(info.value.exceptions[0]) == ["deep", "deep"]
    assert "loop.py" not in files(info.value)


def test_an_error_of_a_generator_shows_the_same() -> None:
    def main() -> Generator[Any, Any, None]:
        yield from checkpoint()
        raise BrokenError

    with pytest.raises(BrokenError) as info:
        kernel.run(main)
    assert frames(info.value)[1:] == ["run", "unwrap", "main"]


def test_an_error_of_arm_shows_the_task_and_the_trap_and_not_the_loop() -> None:
    class Bad(Trap):
        def arm(self, kernel: Kernel, task: Task) -> None:
            raise BrokenError

    async def main() -> None:
        await Bad()

    with pytest.raises(BrokenError) as info:
        kernel.run(main)
    assert frames(info.value)[1:] == ["run", "unwrap", "main", "__iter__", "arm"]
    assert "loop.py" not in files(info.value)


def test_an_error_of_abort_shows_the_task_and_the_trap_and_not_the_loop() -> None:
    class Bad(Trap):
        def arm(self, kernel: Kernel, task: Task) -> None:
            pass

        def abort(self, kernel: Kernel, task: Task) -> bool:
            raise BrokenError

    async def main() -> None:
        with kernel.CancelScope() as scope:
            scope.cancel()
            await Bad()

    with pytest.raises(BrokenError) as info:
        kernel.run(main)
    assert frames(info.value)[1:] == ["run", "unwrap", "main", "__iter__", "abort"]
    assert "loop.py" not in files(info.value)


def test_a_refused_trap_shows_where_it_was_awaited() -> None:
    def main() -> Generator[Any, Any, None]:
        yield 1

    with pytest.raises(TypeError) as info:
        kernel.run(main)
    assert frames(info.value)[1:] == ["run", "unwrap", "main"]
    assert info.value.__context__ is None


@pytest.mark.parametrize(
    "wait", [checkpoint, kernel.sleep_forever, lambda: kernel.sleep(1), lambda: ParkingLot().park()]
)
def test_a_cancelled_shows_where_the_task_was_and_not_the_loop(wait: Callable[[], Any]) -> None:
    async def main() -> None:
        with kernel.CancelScope() as scope:
            scope.cancel()
            with pytest.raises(kernel.Cancelled) as info:
                await wait()
            assert files(info.value) <= {"test_loop.py", "traps.py", "parking.py"}
            assert frames(info.value)[0] == "main"
            assert info.value.__context__ is None
            await checkpoint()
        assert scope.cancelled_caught

    kernel.run(main)


def test_an_error_given_to_wake_shows_the_sleepers_frames_alone() -> None:
    async def child() -> None:
        await ParkingLot().park()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            current_kernel().wake(task, error=BrokenError())

    with pytest.raises(ExceptionGroup) as info:
        kernel.run(main)
    assert frames(info.value.exceptions[0]) == ["child", "park"]
