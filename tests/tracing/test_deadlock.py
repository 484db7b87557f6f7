"""Deadlocks: each rule of when one is reported and when not, what the report says, and what becomes of the run."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextvars import copy_context
from math import inf
from typing import Any

import pytest
from bench.deadlocks import Outcome, play
from invariants import NoFiles
from outcome import Value

import kernel
from kernel import CancelScope, Deadlock, Event, Lock, open_nursery
from kernel.lowlevel import (
    KernelToken,
    Park,
    ParkingLot,
    RunVar,
    Task,
    Trap,
    checkpoint,
    current_kernel,
    current_kernel_token,
    current_task,
    spawn_system_task,
    start_guest_run,
    wait_readable,
)
from kernel.testing import MockClock
from kernel.tracing.deadlock import AGAIN, find_circle


class Asleep(Exception):
    """The loop has gone to sleep for ever without a word."""


class World(NoFiles):
    """What is outside the kernel, in the poller's place: each time the loop goes to sleep, one event happens.

    When none is left and the loop would sleep for ever, or has slept too often, it gets `Asleep`.
    """

    def __init__(self, *events: Callable[[], object]) -> None:
        self.events = deque(events)
        self.timeouts: list[float] = []

    def poll(self, timeout: float) -> Iterable[Task]:
        if timeout > 0:
            self.timeouts.append(timeout)
            if self.events:
                self.events.popleft()()
            elif timeout == inf or len(self.timeouts) > 20:
                raise Asleep
        return ()


def run(main: Callable[..., Any], *args: Any, world: World | None = None, **options: Any) -> Any:
    return kernel.run(main, *args, poller=World() if world is None else world, **options)


def report_of(main: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    """The lines of the report, before the tree."""
    with pytest.raises(Deadlock) as caught:
        run(main, *args, **options)
    assert caught.value.__context__ is None
    head, found, tree = str(caught.value).partition("Task tree at ")
    assert found
    assert "Deadlock" not in tree
    return [line for line in head.splitlines() if not line.startswith("If waiting for ever")]


def sleeps_on_without_a_word(main: Callable[..., Any], *args: Any, world: World | None = None, **options: Any) -> None:
    """The loop goes to sleep for ever. (That ends the run, which is the only way out for a test.)"""
    with pytest.raises(kernel.KernelInternalError) as caught:
        run(main, *args, world=world, **options)
    assert isinstance(caught.value.__cause__, Asleep)


# ---- what is reported, and the circle -----------------------------------------------------------------


async def take(first: Lock, second: Lock) -> None:
    async with first:
        await checkpoint()
        async with second:
            raise AssertionError("unreachable")


def test_two_tasks_and_two_locks() -> None:
    a, b = Lock(), Lock()

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(take, a, b, name="ann")
            nursery.start_soon(take, b, a, name="ben")

    assert report_of(main) == [
        "nothing can happen any more: all tasks (3) wait, and nobody is left to wake one of them.",
        "They wait for one another:",
        f"  'ann' waits for <Lock at {id(b):#x}, held by 'ben', 1 waiting>",
        f"  'ben' waits for <Lock at {id(a):#x}, held by 'ann', 1 waiting>",
    ]


def test_parent_that_holds_a_lock_waits_for_a_child_that_wants_it() -> None:
    lock = Lock()

    async def child() -> None:
        async with lock:
            raise AssertionError("unreachable")

    async def main() -> None:
        async with lock, open_nursery() as nursery:
            nursery.start_soon(child, name="child")

    main.__qualname__ = "main"
    assert report_of(main)[1:] == [
        "They wait for one another:",
        "  'main' waits for its child 'child'",
        f"  'child' waits for <Lock at {id(lock):#x}, held by 'main', 1 waiting>",
    ]


def test_circle_through_several_generations_of_children() -> None:
    lock = Lock()

    async def grandchild() -> None:
        await lock.acquire()

    async def child() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(Event().wait, name="another")
            nursery.start_soon(grandchild, name="grandchild")

    async def main() -> None:
        async with lock, open_nursery() as nursery:
            nursery.start_soon(child, name="child")

    main.__qualname__ = "main"
    assert report_of(main)[2:] == [
        "  'main' waits for its child 'child'",
        "  'child' waits for its child 'grandchild'",
        f"  'grandchild' waits for <Lock at {id(lock):#x}, held by 'main', 1 waiting>",
    ]


def test_philosophers() -> None:
    forks = [Lock() for _ in range(3)]

    async def main() -> None:
        async with open_nursery() as nursery:
            for seat in range(3):
                nursery.start_soon(take, forks[seat], forks[(seat + 1) % 3], name=seat)

    lines = report_of(main)
    assert lines[0].startswith("nothing can happen any more: all tasks (4) wait")
    assert lines[2:] == [
        f"  '{seat}' waits for <Lock at {id(forks[(seat + 1) % 3]):#x}, held by '{(seat + 1) % 3}', 1 waiting>"
        for seat in range(3)
    ]


def test_limiter_names_one_of_those_who_hold_its_tokens() -> None:
    limiter, lock = kernel.CapacityLimiter(2), Lock()

    async def holds_a_token_and_wants_the_lock() -> None:
        async with limiter, lock:
            raise AssertionError("unreachable")

    async def holds_the_lock_and_wants_a_token() -> None:
        async with lock:
            await checkpoint()
            async with limiter:
                raise AssertionError("unreachable")

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(holds_the_lock_and_wants_a_token, name="ben")
            for _ in range(2):
                nursery.start_soon(holds_a_token_and_wants_the_lock, name="ann")

    assert report_of(main)[2:] == [
        f"  'ben' waits for <CapacityLimiter at {id(limiter):#x}, 2 of 2 borrowed, 1 waiting>, held by 'ann'",
        f"  'ann' waits for <Lock at {id(lock):#x}, held by 'ben', 2 waiting>",
    ]


def test_children_that_join_one_another() -> None:
    async def main() -> None:
        handles: list[kernel.TaskHandle[None]] = []

        async def joins(other: int) -> None:
            await handles[other].join()

        async with open_nursery() as nursery:
            handles += [nursery.spawn(joins, 1, name="ann"), nursery.spawn(joins, 0, name="ben")]

    assert report_of(main)[2:] == ["  'ann' waits for <Join of 'ben'>", "  'ben' waits for <Join of 'ann'>"]


@pytest.mark.parametrize("style", ["async", "generator"])
def test_lone_task_parked_for_ever_is_reported_without_a_circle(style: str) -> None:
    lot = ParkingLot("the bus")

    async def parks() -> None:
        await lot.park()

    def parks_in_generator_style() -> Iterator[Any]:
        yield from lot.park()

    assert report_of(parks if style == "async" else parks_in_generator_style) == [
        "nothing can happen any more: the only task waits, and nobody is left to wake one of them."
    ]


def test_tasks_that_wait_beside_a_circle_are_not_taken_for_a_part_of_it() -> None:
    a, b = Lock(), Lock()

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(take, a, b, name="ann")
            nursery.start_soon(take, b, a, name="ben")
            nursery.start_soon(take, a, b, name="cal")
            nursery.start_soon(ParkingLot("the bus").park, name="dan")

    lines = report_of(main)
    assert [line.split()[0] for line in lines[2:]] == ["'ann'", "'ben'"]


def test_main_has_ended_and_a_child_that_it_left_behind_waits_in_a_shield() -> None:
    async def child() -> None:
        with CancelScope(shield=True):
            await Event().wait()

    async def main() -> None:
        nursery = open_nursery()
        await nursery.__aenter__()
        nursery.start_soon(child, name="child")
        await checkpoint()

    with pytest.raises(Deadlock, match="the only task waits") as caught:
        run(main)
    assert isinstance(caught.value.__context__, Deadlock)


class Thing:
    """Of a user's own, and not a pleasant one: unhashable, equal to everything, and it cannot be printed."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __eq__(self, other: object) -> bool:
        return True

    def __repr__(self) -> str:
        raise ValueError("bad")


def test_things_of_the_users_with_an_owner_are_part_of_the_circle() -> None:
    tasks: list[Task] = []

    async def waits(for_whom: int) -> None:
        tasks.append(current_task())
        await checkpoint()
        await Park(Thing(tasks[for_whom]))

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(waits, 1, name="ann")
            nursery.start_soon(waits, 0, name="ben")

    lines = report_of(main)[2:]
    assert [line.split(" waits ")[0].strip() for line in lines] == ["'ann'", "'ben'"]
    assert all("whose repr raised ValueError>, held by" in line for line in lines)


def test_owner_that_is_no_task_is_nobody() -> None:
    async def main() -> None:
        await Park(Thing("the weather"))

    assert len(report_of(main)) == 1


async def noop() -> None:
    pass


def asleep(*traps: Any) -> list[Task]:
    """Tasks that sleep on these traps, and have ended nevertheless."""
    tasks = []
    for number, trap in enumerate(traps):
        coro = noop()
        coro.close()
        task = Task(coro, copy_context(), CancelScope(), None, str(number))
        task.trap, task.step = trap, Value
        tasks.append(task)
    return tasks


@pytest.mark.parametrize("closed", [True, False])
def test_circle_of_any_length_is_found_without_recursion(closed: bool) -> None:
    things = [Thing(None) for _ in range(20_000)]
    tasks = asleep(*map(Park, things))
    for thing, owner in zip(things, [*tasks[1:], tasks[0] if closed else None], strict=True):
        thing.owner = owner
    assert find_circle(tasks)[::2] == (tasks if closed else [])


def test_search_for_a_circle_looks_at_the_owners_of_a_thing_once_however_many_wait() -> None:
    looked = 0

    class Limiter:
        @property
        def owners(self) -> list[object]:
            nonlocal looked
            looked += 1
            return [object()] * 50

    assert find_circle(asleep(*[Park(Limiter())] * 1000)) == []
    assert looked == 1


# ---- when it keeps silent -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", [kernel.sleep_forever, lambda: kernel.sleep(inf), lambda: kernel.sleep_until(inf)])
def test_sleep_forever_in_any_task_was_asked_for(how: Callable[[], Any]) -> None:
    async def grandchild() -> None:
        await how()

    async def child() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(grandchild)

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(Event().wait)
            nursery.start_soon(child)

    sleeps_on_without_a_word(main)


def test_system_task_that_sleeps_for_ever_or_waits_does_not_count() -> None:
    async def main() -> None:
        spawn_system_task(kernel.sleep_forever)
        spawn_system_task(Event().wait)
        await Event().wait()

    assert "the only task waits" in report_of(main)[0]


def test_system_task_that_never_ends_is_none_of_the_programs_tasks() -> None:
    """A system task that does not leave when the program has ended is a bug of the library's. No task is stuck."""

    async def stays() -> None:
        with CancelScope(shield=True):
            await Event().wait()

    async def main() -> None:
        spawn_system_task(stays)
        await checkpoint()

    sleeps_on_without_a_word(main)


def test_token_in_another_thread_keeps_it_silent_until_it_is_dropped() -> None:
    """The thread drops it while the loop sleeps. Nobody wakes the loop, and it finds out all the same."""
    go, gone = threading.Event(), threading.Event()

    def thread(tokens: list[KernelToken]) -> None:
        token = tokens.pop()
        go.wait()
        del token
        gone.set()

    async def main() -> None:
        tokens = [current_kernel_token()]
        worker = threading.Thread(target=thread, args=(tokens,))
        worker.start()
        while tokens:
            await checkpoint()
        try:
            await Event().wait()
        finally:
            worker.join()

    def drop() -> None:
        go.set()
        gone.wait()

    world = World(lambda: None, lambda: None, drop)
    report_of(main, world=world)
    assert world.timeouts == [AGAIN] * 3


class Held:
    """Something that keeps a token as an attribute."""

    token: KernelToken


def in_a_global_object() -> tuple[Callable[[], None], Callable[[], None]]:
    held = Held()

    def hold() -> None:
        held.token = current_kernel_token()

    def drop() -> None:
        del held.token

    return hold, drop


def as_a_bound_method() -> tuple[Callable[[], None], Callable[[], None]]:
    calls: list[Any] = []
    return lambda: calls.append(current_kernel_token().run_sync_soon), calls.clear


def in_a_run_variable() -> tuple[Callable[[], None], Callable[[], None]]:
    variable: RunVar[Any] = RunVar("token")
    return lambda: variable.set(current_kernel_token()) and None, lambda: variable.set(None) and None


@pytest.mark.parametrize("place", [in_a_global_object, as_a_bound_method, in_a_run_variable])
def test_token_that_something_refers_to_keeps_it_silent_until_it_is_dropped(place: Callable[[], Any]) -> None:
    hold, drop = place()

    async def main() -> None:
        hold()
        await Event().wait()

    world = World(lambda: None, drop)
    report_of(main, world=world)
    assert world.timeouts == [AGAIN] * 2


def test_token_in_a_local_variable_of_a_task_keeps_it_silent() -> None:
    async def main() -> None:
        token = current_kernel_token()
        await Event().wait()
        del token

    def give_up() -> None:
        raise Asleep

    world = World(*[lambda: None] * 10, give_up)
    with pytest.raises(kernel.KernelInternalError):
        run(main, world=world)
    assert world.timeouts == [AGAIN] * 11


def test_token_that_somebody_has_asked_for_and_forgotten_does_not_count() -> None:
    async def main() -> None:
        first, second = current_kernel_token(), current_kernel_token()
        assert first is second
        del first, second
        await Event().wait()

    world = World()
    report_of(main, world=world)
    assert world.timeouts == []


def test_call_from_a_holder_of_the_token_goes_on_as_if_nothing_had_been() -> None:
    tokens: list[KernelToken] = []

    async def main() -> str:
        event = Event()
        tokens.append(current_kernel_token())
        world.events.append(lambda: None)
        world.events.append(lambda: tokens.pop().run_sync_soon(event.set))
        await event.wait()
        return "woken"

    world = World()
    assert run(main, world=world) == "woken"


def test_worker_threads_leave_no_token_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """After calls into threads have ended, a deadlock is one again, whenever the threads let go of their tokens."""
    monkeypatch.setattr("kernel.threads.cache.IDLE_SECONDS", 0.001)
    monkeypatch.setattr("kernel.tracing.deadlock.AGAIN", 0.001)
    workers: list[threading.Thread] = []

    async def main() -> None:
        workers.append(await kernel.to_thread.run_sync(threading.current_thread))
        await Event().wait()

    with pytest.raises(Deadlock):
        kernel.run(main)
    workers[0].join()


@pytest.fixture
def handler() -> Iterator[Callable[[Any], None]]:
    """Installs a handler for SIGUSR2, and puts the previous one back."""
    before = signal.getsignal(signal.SIGUSR2)
    yield lambda new: signal.signal(signal.SIGUSR2, new) and None
    signal.signal(signal.SIGUSR2, before)


class Handler:
    """It has no module, and nearly no attributes."""

    __slots__ = ()
    __module__ = None  # type: ignore[assignment]

    def __call__(self, *args: object) -> None:
        pass


HANDLERS = {"def": lambda *args: None, "partial": functools.partial(print), "object": Handler(), "C": [].append}


@pytest.mark.parametrize("function", HANDLERS.values(), ids=HANDLERS)
def test_signal_handler_of_the_programs_keeps_it_silent(function: Any, handler: Callable[[Any], None]) -> None:
    handler(function)
    sleeps_on_without_a_word(Event().wait)
    handler(signal.SIG_IGN)
    report_of(Event().wait)


def test_handler_of_the_programs_for_ctrl_c_keeps_it_silent_and_pythons_own_does_not() -> None:
    before = signal.signal(signal.SIGINT, lambda *args: None)
    try:
        sleeps_on_without_a_word(Event().wait)
    finally:
        signal.signal(signal.SIGINT, before)
    assert before is signal.default_int_handler
    report_of(Event().wait)


def test_dump_on_signal_does_not_keep_it_silent(handler: Callable[[Any], None]) -> None:
    kernel.dump_on_signal(signal.SIGUSR2)
    report_of(Event().wait)


def test_open_signal_receiver_keeps_it_silent_while_it_is_open() -> None:
    if not hasattr(kernel, "open_signal_receiver"):
        pytest.skip("no signal receivers")

    async def main() -> None:
        with kernel.open_signal_receiver(signal.SIGUSR2):
            world.events.append(lambda: None)
            world.events.append(stop.cancel)
            with stop:
                await Event().wait()
        await Event().wait()

    stop, world = CancelScope(), World()
    with pytest.raises(Deadlock):
        run(main, world=world)
    assert len(world.timeouts) == 2


def test_timer_beside_it_keeps_it_silent_until_it_has_fired() -> None:
    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(kernel.sleep, 5)
            await Event().wait()

    clock = MockClock()
    world = World(lambda: clock.jump(4), lambda: clock.jump(1))
    report_of(main, clock=clock, world=world)
    assert world.timeouts == [inf, inf]


def test_deadline_of_a_scope_keeps_it_silent(virtual: Callable[..., Any]) -> None:
    async def main() -> None:
        with kernel.move_on_after(5):
            await Event().wait()
        await Event().wait()

    with pytest.raises(Deadlock, match=r"Task tree at 5.000 s"):
        virtual(main)


def test_watched_file_beside_it_keeps_it_silent_until_it_is_ready() -> None:
    async def main() -> list[str]:
        log = []
        reader, writer = os.pipe()

        async def watches() -> None:
            await wait_readable(reader)
            log.append("readable")

        try:
            async with open_nursery() as nursery:
                nursery.start_soon(watches)
                thread = threading.Timer(0.01, os.write, (writer, b"x"))
                thread.start()
                with pytest.raises(kernel.Cancelled):
                    await Event().wait()
                log.append("deadlock")
        finally:
            thread.join()
            os.close(reader)
            os.close(writer)
            seen.extend(log)
        return log

    seen: list[str] = []
    with pytest.raises(Deadlock):
        kernel.run(main)
    assert seen == ["readable", "deadlock"]


def test_tasks_that_wait_for_quiet_are_woken_and_not_reported() -> None:
    async def main() -> str:
        async with open_nursery() as nursery:
            nursery.start_soon(Event().wait)
            await kernel.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        return "quiet"

    assert run(main) == "quiet"


def test_guest_run_says_nothing() -> None:
    todo: deque[Callable[[], object]] = deque()
    came = threading.Condition()
    ends: list[Any] = []
    scope = CancelScope()

    def soon(function: Callable[[], object]) -> None:
        with came:
            todo.append(function)
            came.notify()

    async def main() -> str:
        with scope:
            await Event().wait()
        return "told to leave by the host"

    start_guest_run(main, run_sync_soon_threadsafe=soon, done_callback=ends.append)
    for _ in range(3):
        if todo:
            todo.popleft()()
    assert not ends
    scope.cancel()
    while not ends:
        with came:
            came.wait_for(lambda: todo)
        todo.popleft()()
    assert ends[0].unwrap() == "told to leave by the host"


@pytest.mark.parametrize("several", [False, True])
def test_switch_turns_it_off(several: bool) -> None:
    if not several:
        sleeps_on_without_a_word(Event().wait, detect_deadlock=False)
        return
    with pytest.raises(kernel.KernelInternalError), kernel.Kernel(poller=World(), detect_deadlock=False) as kept:
        kept.run(Event().wait)


# ---- what becomes of the run --------------------------------------------------------------------------


def test_clean_up_runs_in_order_before_run_raises() -> None:
    log: list[str] = []
    unfinished: list[AsyncIterator[int]] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await kernel.lowlevel.cancel_shielded_checkpoint()
            log.append("generator closed")

    async def child(name: str) -> None:
        try:
            await Event().wait()
        except kernel.Cancelled as cancelled:
            log.append(f"{name} cancelled by {cancelled.source}, {cancelled.reason}")
            raise
        finally:
            with CancelScope(shield=True):
                await kernel.sleep(1)
            log.append(f"{name} cleaned up")

    async def main() -> None:
        unfinished.append(numbers())
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(child, "ann")
                nursery.start_soon(child, "ben")
                await anext(unfinished[0])
        finally:
            log.append("main leaves")
        raise AssertionError("unreachable")

    with pytest.raises(Deadlock) as caught:
        run(main, clock=MockClock(autojump_threshold=0))
    assert caught.value.__context__ is None
    assert log == [
        "ann cancelled by shutdown, deadlock",
        "ben cancelled by shutdown, deadlock",
        "ann cleaned up",
        "ben cleaned up",
        "main leaves",
        "generator closed",
    ]


def test_result_of_a_main_that_swallows_the_cancellation_is_not_returned() -> None:
    async def main() -> str:
        try:
            await Event().wait()
        except kernel.Cancelled:
            pass
        return "as if nothing had been"

    report_of(main)


def test_error_in_the_clean_up_is_kept_as_context() -> None:
    async def main() -> None:
        try:
            await Event().wait()
        finally:
            raise ValueError("in the clean-up")

    with pytest.raises(Deadlock) as caught:
        run(main)
    assert isinstance(caught.value.__context__, ValueError)


def test_shielded_clean_up_that_waits_for_ever_ends_the_run_with_both_reports() -> None:
    async def main() -> None:
        try:
            await ParkingLot("the first").park()
        finally:
            with CancelScope(shield=True):
                await ParkingLot("the second").park()

    with pytest.raises(Deadlock, match="main: waits for the second") as caught:
        run(main)
    first = caught.value.__context__
    assert isinstance(first, Deadlock)
    assert "main: waits for the first" in str(first)
    assert "The run is ending" not in str(first)
    assert "The run is ending" in str(caught.value)


def test_tasks_that_are_all_shielded_cannot_be_cancelled_and_the_run_ends_all_the_same() -> None:
    async def main() -> None:
        with CancelScope(shield=True):
            await Event().wait()

    with pytest.raises(Deadlock) as caught:
        run(main)
    assert isinstance(caught.value.__context__, Deadlock)


def test_clean_up_may_be_long_and_deadlock_of_a_part_of_it_is_no_second_one() -> None:
    """While anything goes on, the run goes on."""
    log = []

    async def main() -> None:
        async def cleans() -> None:
            try:
                await Event().wait()
            finally:
                with CancelScope(shield=True):
                    for _ in range(3):
                        await kernel.sleep(10)
                log.append("clean")

        async with open_nursery() as nursery:
            nursery.start_soon(cleans)
            nursery.start_soon(cleans)

    assert report_of(main, clock=MockClock(autojump_threshold=0))
    assert log == ["clean", "clean"]


def test_kernel_of_several_runs_goes_on_after_a_deadlock_but_not_after_one_in_the_clean_up() -> None:
    async def fine() -> str:
        await checkpoint()
        return "fine"

    async def stuck_twice() -> None:
        with CancelScope(shield=True):
            await Event().wait()

    with kernel.Kernel(poller=World()) as several:
        for _ in range(2):
            with pytest.raises(Deadlock):
                several.run(Event().wait)
            assert several.run(fine) == "fine"
        with pytest.raises(Deadlock):
            several.run(stuck_twice)
        with pytest.raises(RuntimeError, match="broke off"):
            several.run(fine)


def test_deadlock_is_a_runtime_error_and_no_group() -> None:
    assert issubclass(Deadlock, RuntimeError)
    with pytest.raises(RuntimeError) as caught:
        run(Event().wait)
    assert type(caught.value) is Deadlock


def test_report_shows_the_tree_with_every_task() -> None:
    async def child() -> None:
        await ParkingLot("the bus").park()

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(child, name="the only child")

    with pytest.raises(Deadlock) as caught:
        run(main)
    text = str(caught.value)
    assert "the only child: waits for the bus\n" in text
    assert 'await ParkingLot("the bus").park()' in text
    assert "waits for its children" in text
    assert "say so with sleep_forever()" in text


def test_deadlock_in_a_thread_of_its_own() -> None:
    errors: list[BaseException] = []

    def thread() -> None:
        try:
            kernel.run(Event().wait)
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=thread)
    worker.start()
    worker.join()
    assert [type(error) for error in errors] == [Deadlock]


def test_deadlock_with_the_systems_own_poller_and_clock() -> None:
    with pytest.raises(Deadlock):
        kernel.run(Event().wait)


def test_deadlock_with_a_generator_as_main() -> None:
    def main() -> Iterator[Any]:
        yield from Event().wait()

    with pytest.raises(Deadlock):
        kernel.run(main)


# ---- what it costs ------------------------------------------------------------------------------------


def test_detection_is_asked_only_when_the_loop_goes_to_sleep_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    async def main() -> None:
        running = current_kernel()
        real = running.stuck
        assert real is not None

        def counted() -> float:
            nonlocal asked
            asked += 1
            return real()

        running.stuck = counted
        for _ in range(1000):
            await checkpoint()
        await kernel.sleep(1)
        assert asked == 0
        await Event().wait()

    with pytest.raises(Deadlock):
        run(main, clock=MockClock(autojump_threshold=0))
    assert asked == 1


def test_tasks_are_not_looked_at_while_a_token_is_held() -> None:
    """A program that waits for its threads goes to sleep often; that must not cost a walk over all its tasks."""
    looked = 0

    class Looked(Trap):
        def arm(self, kernel: Any, task: Task) -> None:
            pass

        def abort(self, kernel: Any, task: Task) -> bool:
            return True

        @property
        def on(self) -> object:
            nonlocal looked
            looked += 1
            return None

    def give_up() -> None:
        raise Asleep

    async def main() -> None:
        token = current_kernel_token()
        await Looked()
        del token

    with pytest.raises(kernel.KernelInternalError):
        run(main, world=World(lambda: None, give_up))
    assert looked == 0


# ---- at random ----------------------------------------------------------------------------------------


def test_random_programs_are_reported_when_and_only_when_they_cannot_go_on() -> None:
    """`tests/bench/deadlocks.py` plays the same game for as long as you like, and in it the oracle."""
    ends = [play(seed) for seed in range(1500)]
    assert ends.count(Outcome.DEADLOCK) > 300
    assert ends.count(Outcome.FINISHED) > 300
    assert ends.count(Outcome.SILENT) > 10
