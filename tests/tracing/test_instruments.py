"""Instruments: what they are told, in which order, and that a run does not suffer from them.

The logs of the first part were compared with trio's: the same program, written for both, runs on both where trio is
installed. The program's tasks are those whose names are listed; each library has tasks of its own besides.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from invariants import CheckedReadyQueue, NoFiles

import kernel
from kernel.abc import Instrument
from kernel.lowlevel import (
    Task,
    Trap,
    add_instrument,
    cancel_shielded_checkpoint,
    checkpoint,
    current_kernel,
    current_kernel_token,
    current_task,
    remove_instrument,
    start_guest_run,
)
from kernel.testing import MockClock


def short(task: Any) -> str:
    return str(task.name).rpartition(".")[2]


class Tasks:
    """Logs what happens to the tasks of the program, with the hooks that trio has too. No `Instrument` by descent."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.log: list[str] = []

    def note(self, what: str, task: Any) -> None:
        if short(task) in self.names:
            self.log.append(f"{what} {short(task)}")

    def task_spawned(self, task: Any) -> None:
        self.note("spawned", task)

    def task_scheduled(self, task: Any) -> None:
        self.note("scheduled", task)

    def before_task_step(self, task: Any) -> None:
        self.note("before", task)

    def after_task_step(self, task: Any) -> None:
        self.note("after", task)

    def task_exited(self, task: Any) -> None:
        self.note("exited", task)


class Everything(Tasks):
    """And the trap, which is ours alone."""

    def task_trapped(self, task: Task, trap: Trap | None) -> None:
        if short(task) in self.names:
            self.log.append(f"trapped {short(task)} {None if trap is None else type(trap).__name__}")


class Waits(Instrument):
    """Logs the waits of the loop, and begin and end of the run."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def before_run(self) -> None:
        self.log.append("before_run")

    def after_run(self) -> None:
        self.log.append("after_run")

    def before_io_wait(self, timeout: float) -> None:
        self.log.append(f"before_io_wait {timeout}")

    def after_io_wait(self, timeout: float) -> None:
        self.log.append(f"after_io_wait {timeout}")


# ---- the same as in trio ------------------------------------------------------------------------------

Program = Callable[[Any, Any], Callable[[], Any]]
PROGRAMS: dict[str, tuple[Program, str]] = {}


def program(expected: str) -> Callable[[Program], Program]:
    """Register a program, given as a function of the library and the instrument, with the log it must give."""

    def register(function: Program) -> Program:
        PROGRAMS[function.__name__] = (function, expected)
        return function

    return register


@program("spawned main, scheduled main, before main, exited main, after main")
def returns_at_once(lib: Any, watch: Any) -> Any:
    async def main() -> None:
        pass

    return main


@program(
    """
    spawned main, scheduled main, before main, scheduled main, after main,
    before main, scheduled main, after main, before main, exited main, after main
    """
)
def checkpoints(lib: Any, watch: Any) -> Any:
    async def main() -> None:
        await lib.lowlevel.checkpoint()
        await lib.lowlevel.cancel_shielded_checkpoint()

    return main


@program(
    """
    spawned main, scheduled main, before main,
    spawned ann, scheduled ann, spawned ben, scheduled ben, after main,
    before ann, after ann,
    before ben, scheduled ann, exited ben, after ben,
    before ann, scheduled main, exited ann, after ann,
    before main, exited main, after main
    """
)
def children_and_an_event(lib: Any, watch: Any) -> Any:
    async def main() -> None:
        event = lib.Event()

        async def ann() -> None:
            await event.wait()

        async def ben() -> None:
            event.set()

        async with lib.open_nursery() as nursery:
            nursery.start_soon(ann)
            nursery.start_soon(ben)

    return main


@program(
    """
    spawned main, scheduled main, before main,
    spawned ann, scheduled ann, scheduled main, after main, before ann, after ann,
    before main, scheduled ann, after main,
    before ann, scheduled main, exited ann, after ann, before main, exited main, after main
    """
)
def a_cancelled_sleep(lib: Any, watch: Any) -> Any:
    async def main() -> None:
        async def ann() -> None:
            await lib.sleep(10)

        async with lib.open_nursery() as nursery:
            nursery.start_soon(ann)
            await lib.lowlevel.cancel_shielded_checkpoint()
            nursery.cancel_scope.cancel()

    return main


@program(
    """
    spawned main, scheduled main, before main, after main, scheduled main, before main, after main,
    scheduled main, before main, exited main, after main
    """
)
def sleeps_and_a_timeout(lib: Any, watch: Any) -> Any:
    async def main() -> None:
        await lib.sleep(1)
        with lib.move_on_after(1):
            await lib.sleep(10)

    return main


@program(
    """
    spawned main, scheduled main, before main, spawned ann, scheduled ann, after main,
    before ann, scheduled main, exited ann, after ann, before main, exited main, after main
    """
)
def a_child_that_fails(lib: Any, watch: Any) -> Any:
    async def main() -> None:
        async def ann() -> None:
            raise ValueError

        try:
            async with lib.open_nursery() as nursery:
                nursery.start_soon(ann)
        except* ValueError:
            pass

    return main


@program("scheduled main, after main, before main, exited main, after main")
def added_in_the_middle_of_a_step(lib: Any, watch: Any) -> Any:
    async def main() -> None:
        lib.lowlevel.add_instrument(watch)
        await lib.lowlevel.checkpoint()

    return main


@program("after main, scheduled main, before main, exited main, after main")
def added_before_a_sleep(lib: Any, watch: Any) -> Any:
    async def main() -> None:
        lib.lowlevel.add_instrument(watch)
        await lib.sleep(1)

    return main


@program("exited main, after main")
def added_in_the_last_step(lib: Any, watch: Any) -> Any:
    async def main() -> None:
        lib.lowlevel.add_instrument(watch)

    return main


@program(
    """
    spawned ben, scheduled ben, after main, before ann, exited ann, after ann,
    before ben, scheduled main, exited ben, after ben, before main, exited main, after main
    """
)
def added_in_the_middle_of_a_pass(lib: Any, watch: Any) -> Any:
    async def main() -> None:
        async def ann() -> None:
            pass

        async def ben() -> None:
            pass

        async with lib.open_nursery() as nursery:
            nursery.start_soon(ann)
            lib.lowlevel.add_instrument(watch)
            nursery.start_soon(ben)

    return main


@program("scheduled main, after main, before main, scheduled main, after main, before main, exited main, after main")
def added_twice(lib: Any, watch: Any) -> Any:
    async def main() -> None:
        lib.lowlevel.add_instrument(watch)
        await lib.lowlevel.checkpoint()
        lib.lowlevel.add_instrument(watch)
        await lib.lowlevel.checkpoint()

    return main


@program("scheduled main, after main, before main, scheduled main, after main, before main, exited main, after main")
def removed_and_added_in_the_middle_of_a_step(lib: Any, watch: Any) -> Any:
    async def main() -> None:
        lib.lowlevel.add_instrument(watch)
        await lib.lowlevel.checkpoint()
        lib.lowlevel.remove_instrument(watch)
        lib.lowlevel.add_instrument(watch)
        await lib.lowlevel.checkpoint()

    return main


@program("scheduled main, after main, before main, scheduled main, after main, before main, exited main, after main")
def removed_for_a_while(lib: Any, watch: Any) -> Any:
    async def main() -> None:
        lib.lowlevel.add_instrument(watch)
        await lib.lowlevel.checkpoint()
        lib.lowlevel.remove_instrument(watch)
        await lib.sleep(1)
        lib.lowlevel.add_instrument(watch)
        await lib.lowlevel.checkpoint()

    return main


def entries(text: str) -> list[str]:
    return [entry.strip() for entry in text.replace("\n", " ").split(",") if entry.strip()]


def log_of(lib: Any, name: str, clock: Any, **options: Any) -> list[str]:
    function, _ = PROGRAMS[name]
    watch = Tasks("main", "ann", "ben")
    at_once = [] if "add_instrument" in function(lib, watch).__code__.co_names else [watch]
    lib.run(function(lib, watch), clock=clock, instruments=at_once, **options)
    return watch.log


@pytest.mark.parametrize("name", PROGRAMS)
def test_log_is_complete_and_in_order(name: str) -> None:
    assert log_of(kernel, name, MockClock(autojump_threshold=0)) == entries(PROGRAMS[name][1])


@pytest.mark.parametrize("name", PROGRAMS)
def test_log_is_that_of_trio(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trio: Any = pytest.importorskip("trio")
    testing: Any = pytest.importorskip("trio.testing")
    # First come, first served: trio turns its batches over by chance, or shuffles them when Hypothesis is about.
    monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", False)
    monkeypatch.setattr(trio._core._run._r, "random", lambda: 0.0)
    assert log_of(trio, name, testing.MockClock(autojump_threshold=0)) == log_of(
        kernel, name, MockClock(autojump_threshold=0)
    )


# ---- what is ours: the trap ---------------------------------------------------------------------------


def test_traps_are_told_before_they_are_armed_and_a_checkpoint_is_none(virtual: Callable[..., Any]) -> None:
    watch = Everything("main")

    async def main() -> None:
        add_instrument(watch)
        await checkpoint()
        await kernel.sleep(1)
        await cancel_shielded_checkpoint()
        with pytest.raises(TypeError):
            await NoTrap()

    class NoTrap:
        def __await__(self) -> Iterator[Any]:
            yield 42

    virtual(main)
    assert watch.log == entries(
        """
        trapped main None, scheduled main, after main,
        before main, trapped main SleepUntil, after main,
        scheduled main, before main, trapped main _Pass, scheduled main, after main,
        before main, trapped main int, scheduled main, after main,
        before main, exited main, after main
        """
    )


# ---- coming and going -----------------------------------------------------------------------------------


def test_instrument_added_by_a_call_from_outside_sees_all_that_comes_after() -> None:
    watch = Everything("main")

    async def main() -> None:
        token = current_kernel_token()
        token.run_sync_soon(add_instrument, watch)
        await checkpoint()
        await kernel.sleep(1)
        token.run_sync_soon(remove_instrument, watch)
        await kernel.sleep(1)

    run(main)
    assert watch.log == entries("scheduled main, before main, trapped main SleepUntil, after main")


HOOKS = (
    "task_spawned", "task_scheduled", "before_task_step", "task_trapped", "after_task_step", "task_exited",
    "before_io_wait", "after_io_wait",
)  # fmt: skip


class Once(Instrument):
    """Calls `action(self)` the first time that the hook `name` is called."""

    def __init__(self, name: str, action: Callable[[Any], object]) -> None:
        setattr(self, name, self._hook)
        self._action: Callable[[Any], object] | None = action

    def _hook(self, *args: object) -> None:
        action, self._action = self._action, None
        if action is not None:
            action(self)


async def busy() -> list[str]:
    """Something of everything. The result tells whether anything got lost."""
    done: list[str] = []
    event = kernel.Event()

    async def waits(name: str) -> None:
        await event.wait()
        await checkpoint()
        done.append(name)

    async with kernel.open_nursery() as nursery:
        for name in "abc":
            nursery.start_soon(waits, name)
        await checkpoint()
        for _ in range(3):
            await kernel.sleep(1)
        event.set()
        await cancel_shielded_checkpoint()
        done.append("body")
    await checkpoint()
    return done


def run(function: Callable[..., Any], **options: Any) -> Any:
    """In virtual time."""
    return kernel.run(function, clock=MockClock(autojump_threshold=0), **options)


DONE = run(busy)


@pytest.mark.parametrize("hook", HOOKS)
def test_instrument_added_from_a_hook_sees_the_rest_once(hook: str) -> None:
    watch, both = Everything("busy", "waits"), Everything("busy", "waits")
    start = 0

    def action(self: Any) -> None:
        nonlocal start
        start = len(both.log)
        add_instrument(watch)

    assert run(busy, instruments=[both, Once(hook, action)]) == DONE
    assert start < len(both.log)
    assert watch.log == both.log[start:]


@pytest.mark.parametrize("hook", HOOKS)
def test_instrument_removed_from_a_hook_sees_nothing_more(hook: str) -> None:
    watch, both = Everything("busy", "waits"), Everything("busy", "waits")
    end = -1

    def action(self: Any) -> None:
        nonlocal end
        end = len(watch.log)
        remove_instrument(self)
        remove_instrument(watch)

    queue = CheckedReadyQueue()
    assert run(busy, ready=queue, instruments=[both, Once(hook, action), watch]) == DONE
    queue.finish()
    assert 0 <= end < len(both.log)
    assert watch.log == both.log[:end]


@pytest.mark.parametrize("hook", HOOKS)
def test_instrument_that_comes_and_goes_from_a_hook_is_told_nothing_twice(hook: str) -> None:
    watch, both = Everything("busy", "waits"), Everything("busy", "waits")

    def action(self: Any) -> None:
        remove_instrument(self)
        for instrument in (watch, both):
            remove_instrument(instrument)
        for instrument in (watch, both):
            add_instrument(instrument)

    assert run(busy, instruments=[watch, Once(hook, action), both]) == DONE
    reference = Everything("busy", "waits")
    run(busy, instruments=[reference])
    # One of them has seen the hook's event and the other one has not.
    assert watch.log == reference.log
    missed = [what for what in reference.log if what not in both.log]
    assert len(reference.log) - len(both.log) in (0, 1), missed


def test_instrument_added_twice_is_told_once() -> None:
    watch = Everything("main")

    async def main() -> None:
        add_instrument(watch)
        add_instrument(watch)

    kernel.run(main, instruments=[watch, watch])
    assert watch.log == entries("spawned main, scheduled main, before main, exited main, after main")


def test_removing_a_stranger_is_a_key_error_and_outside_a_run_both_are_runtime_errors() -> None:
    async def main() -> None:
        with pytest.raises(KeyError):
            remove_instrument(Waits())

    kernel.run(main)
    for function in (add_instrument, remove_instrument):
        with pytest.raises(RuntimeError, match="outside the kernel"):
            function(Waits())


def test_ports_are_the_real_ones_without_step_hooks_and_again_when_the_last_instrument_has_gone() -> None:
    queue: deque[Any] = deque()
    watch, waits = Everything("main"), Waits()

    class OnlyRun(Instrument):
        def before_run(self) -> None:
            pass

        def after_run(self) -> None:
            pass

    async def main() -> tuple[bool, ...]:
        running = current_kernel()
        real = running.poller
        seen = [running.ready is queue]
        add_instrument(waits)
        seen += [running.ready is queue, running.poller is not real]
        add_instrument(watch)
        seen += [running.ready is not queue, running.trapped is not None]
        remove_instrument(watch)
        await kernel.sleep(1)
        seen += [running.ready is queue, running.trapped is None, running.poller is not real]
        remove_instrument(waits)
        await kernel.sleep(1)
        return (*seen, running.poller is real)

    assert all(run(main, ready=queue, instruments=[OnlyRun()]))


# ---- instruments that raise ---------------------------------------------------------------------------


class Broken(Instrument):
    """Raises `error` at the `count`-th call of one hook."""

    def __init__(self, hook: str, error: BaseException, count: int = 1) -> None:
        self.hook, self.error, self.count = hook, error, count
        self.calls = 0
        setattr(self, hook, self._raise)

    def _raise(self, *args: object) -> None:
        self.calls += 1
        if self.calls == self.count:
            raise self.error

    def __repr__(self) -> str:
        return f"<Broken {self.hook}>"


@pytest.mark.parametrize(
    "error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("hook", ["before_run", "after_run", *HOOKS])
def test_instrument_that_raises_is_removed_with_a_logged_traceback_and_nothing_is_lost(
    hook: str, count: int, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    broken, watch, queue = Broken(hook, error, count), Everything("busy", "waits"), CheckedReadyQueue()
    reference = Everything("busy", "waits")
    run(busy, instruments=[reference])
    assert run(busy, ready=queue, instruments=[broken, watch]) == DONE
    queue.finish()
    assert watch.log == reference.log
    if hook.endswith("_run") and count > 1:
        assert not caplog.records
        return
    assert broken.calls == count
    (record,) = caplog.records
    assert record.name == "kernel.abc.Instrument"
    assert record.levelno == logging.ERROR
    assert record.getMessage() == f"the hook {hook}() of <Broken {hook}> has raised; the instrument was removed"
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_instrument_that_has_raised_stays_away_from_the_next_run(caplog: pytest.LogCaptureFixture) -> None:
    broken, waits = Broken("before_run", ValueError("bad")), Waits()
    with kernel.Kernel(instruments=[broken, waits]) as several:
        several.run(checkpoint)
        several.run(checkpoint)
    assert broken.calls == 1
    assert [what for what in waits.log if what.endswith("_run")] == ["before_run", "after_run"] * 2


def test_hook_that_removes_its_own_instrument_and_raises_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    def action(self: Any) -> None:
        remove_instrument(self)
        raise ValueError("bad")

    assert run(busy, instruments=[Once("before_task_step", action)]) == DONE
    assert len(caplog.records) == 1


def test_instrument_with_a_property_that_raises_is_not_added() -> None:
    class Strange(Instrument):
        def before_task_step(self, task: Task) -> None:
            raise AssertionError

        @property
        def task_exited(self) -> Any:  # type: ignore[override]
            raise ValueError("bad")

    async def main() -> None:
        with pytest.raises(ValueError, match="bad"):
            add_instrument(Strange())
        await checkpoint()

    kernel.run(main)


# ---- in the kernel's other surroundings ---------------------------------------------------------------


def test_waits_are_told_with_their_timeouts() -> None:
    waits = Waits()
    kernel.run(kernel.sleep, 1, clock=MockClock(autojump_threshold=0), instruments=[waits], poller=NoFiles())
    assert waits.log == [
        "before_run",
        *["before_io_wait 0.0", "after_io_wait 0.0"] * (len(waits.log) // 2 - 1),
        "after_run",
    ]
    assert len(waits.log) > 4


def test_run_with_instruments_can_watch_its_end_and_look_around_in_all_hooks() -> None:
    seen: set[str] = set()

    class Looks(Instrument):
        def before_run(self) -> None:
            seen.add(f"before_run {kernel.current_time() >= 0}")

        def after_run(self) -> None:
            seen.add(f"after_run {kernel.current_time() >= 0}")

        def before_task_step(self, task: Task) -> None:
            seen.add(f"before {current_task() is task} {bool(current_kernel().ready) >= 0}")

        def after_task_step(self, task: Task) -> None:
            seen.add(f"after {current_task() is task}")

        def task_exited(self, task: Task) -> None:
            seen.add(f"exited {current_task() is task} {task.outcome is not None}")

    assert run(busy, instruments=[Looks()]) == DONE
    assert seen == {"before_run True", "after_run True", "before True True", "after True", "exited True True"}


def test_looking_at_the_ready_queue_in_the_middle_of_a_step_does_not_end_it() -> None:
    watch = Everything("main")

    async def main() -> None:
        ready = current_kernel().ready
        for _ in range(2):
            assert not ready
            assert len(ready) == 0
            kernel.lowlevel.format_task_tree()
            watch.log.append("here")
            await checkpoint()

    kernel.run(main, instruments=[watch])
    assert watch.log == entries(
        """
        spawned main, scheduled main, before main, here, trapped main None, scheduled main, after main,
        before main, here, trapped main None, scheduled main, after main, before main, exited main, after main
        """
    )


class LastComeFirst(list[Task]):
    """Another policy, with an attribute of its own."""

    policy = "last come, first served"

    def popleft(self) -> Task:
        return self.pop()


def test_ready_queue_of_another_policy_keeps_its_order_and_its_attributes() -> None:
    async def main() -> list[str]:
        order: list[str] = []

        async def child(name: str) -> None:
            order.append(name)
            await checkpoint()
            order.append(name)

        async with kernel.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(child, name)
        ready: Any = current_kernel().ready
        return [*order, ready.policy]

    watch = Everything("main", "child")
    assert kernel.run(main, ready=LastComeFirst()) == kernel.run(main, instruments=[watch], ready=LastComeFirst())
    assert watch.log.count("exited child") == 3


def test_kernels_books_are_right_at_each_step_under_instruments() -> None:
    queue = CheckedReadyQueue()
    watch = Everything("busy")
    assert run(busy, ready=queue, instruments=[watch, Waits()]) == DONE
    queue.finish()
    assert queue.steps > 10


def test_poller_of_the_users_is_used_and_closed_under_instruments() -> None:
    calls: list[str] = []

    class Poller(NoFiles):
        def poll(self, timeout: float) -> Iterable[Task]:
            calls.append("poll")
            return ()

        def close(self) -> None:
            calls.append("close")

    waits = Waits()
    kernel.run(kernel.sleep, 1, clock=MockClock(autojump_threshold=0), poller=Poller(), instruments=[waits])
    assert calls.count("poll") == waits.log.count("after_io_wait 0.0") > 0
    assert calls[-1] == "close"


def test_files_can_be_waited_for_under_instruments() -> None:
    async def main() -> None:
        reader, writer = os.pipe()
        try:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(kernel.lowlevel.wait_readable, reader)
                await checkpoint()
                assert len(current_kernel().poller) == 1
                os.write(writer, b"x")
        finally:
            os.close(reader)
            os.close(writer)

    kernel.run(main, instruments=[Everything(), Waits()])


def test_one_instrument_can_watch_several_runs_one_after_the_other_and_in_threads() -> None:
    class Steps(Instrument):
        def __init__(self) -> None:
            self.threads: dict[int, list[str]] = {}

        def before_run(self) -> None:
            self.threads.setdefault(threading.get_ident(), []).append("run")

        def task_exited(self, task: Task) -> None:
            self.threads[threading.get_ident()].append(task.name)

    steps = Steps()

    together = threading.Barrier(3)

    def runs() -> None:
        together.wait()
        with kernel.Kernel(instruments=[steps], clock=MockClock(autojump_threshold=0)) as several:
            several.run(busy)
            several.run(busy)

    threads = [threading.Thread(target=runs) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logs = list(steps.threads.values())
    assert len(logs) == 3
    assert logs[0] == logs[1] == logs[2]
    assert logs[0].count("run") == 2
    assert logs[0].count("busy") == 2


def test_last_event_before_the_end_of_the_run_is_the_end_of_the_root_tasks_last_step() -> None:
    class Both(Tasks):
        def after_run(self) -> None:
            self.log.append("after_run")

    watch = Both("<root>")
    kernel.run(checkpoint, instruments=[watch])
    assert watch.log[:3] == entries("spawned <root>, scheduled <root>, before <root>")
    assert watch.log[-3:] == entries("exited <root>, after <root>, after_run")


def test_hook_of_the_loop_that_somebody_else_has_set_is_left_alone() -> None:
    traps: list[Any] = []

    async def main() -> None:
        current_kernel().trapped = lambda task, trap: traps.append(trap)
        await kernel.sleep(1)
        await kernel.sleep(1)

    run(main, instruments=[Tasks(), Waits()])
    assert len(traps) == 2


def test_instrument_in_a_kernel_of_several_runs_stays_and_the_ports_are_given_back_in_between() -> None:
    queue: deque[Any] = deque()
    watch = Everything("main")

    async def main() -> None:
        add_instrument(watch)

    with kernel.Kernel(ready=queue) as several:
        real = several.poller
        several.run(main)
        assert (several.ready, several.poller, several.trapped) == (queue, real, None)
        several.run(main)
    assert watch.log == entries(
        "exited main, after main, spawned main, scheduled main, before main, exited main, after main"
    )


def test_run_that_fails_or_never_begins_ends_for_its_instruments_too() -> None:
    async def main() -> None:
        raise ValueError("bad")

    for function, error in ((main, ValueError), (lambda: 3, TypeError)):
        waits = Waits()
        with pytest.raises(error):
            kernel.run(function, instruments=[waits])  # type: ignore[arg-type]
        assert waits.log[0] == "before_run"
        assert waits.log[-1] == "after_run"


def test_instruments_of_a_guest_see_each_step_once_and_in_order() -> None:
    """The order of the host's callbacks is that of a queue here."""
    todo: deque[Callable[[], object]] = deque()
    watch, waits, ends = Everything("busy", "waits"), Waits(), []
    came = threading.Condition()

    def soon(function: Callable[[], object]) -> None:
        with came:
            todo.append(function)
            came.notify()

    start_guest_run(
        busy,
        run_sync_soon_threadsafe=soon,
        done_callback=ends.append,
        clock=MockClock(autojump_threshold=0),
        instruments=[watch, waits],
    )
    while not ends:
        with came:
            came.wait_for(lambda: todo)
        todo.popleft()()
    assert ends[0].unwrap() == DONE
    reference = Everything("busy", "waits")
    run(busy, instruments=[reference])
    assert watch.log == reference.log
    assert waits.log[0] == "before_run"
    assert waits.log[-1] == "after_run"
    befores = [what.partition(" ")[2] for what in waits.log if what.startswith("before_io")]
    assert befores == [what.partition(" ")[2] for what in waits.log if what.startswith("after_io")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_instruments_are_no_hindrance_to_fork() -> None:
    async def main() -> int:
        await checkpoint()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = kernel.run(answer, instruments=[Everything("answer")])
            finally:
                os._exit(code)
        await checkpoint()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    async def answer() -> int:
        await checkpoint()
        return 42

    assert kernel.run(main, instruments=[Everything("main"), Waits()]) == 42
