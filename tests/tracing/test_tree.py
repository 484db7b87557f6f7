"""The task tree as text: what it shows of each task, how much of it, and where it can be had from."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import pytest

import kernel
from kernel import CancelScope, Event, Lock, open_nursery
from kernel.lowlevel import Park, ParkingLot, checkpoint, current_kernel, format_task_tree, spawn_system_task
from kernel.testing import MockClock, wait_all_tasks_blocked

HERE = re.escape(__file__.removeprefix(os.getcwd() + os.sep))


def plain(text: str) -> str:
    """Without addresses, and with short places."""
    text = re.sub(r"0x[0-9a-f]+", "0x", text)
    text = re.sub(r"test_\w+\.<locals>\.", "", text)
    return re.sub(rf"{HERE}:\d+ in ", "file: ", text)


def tree_of(main: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    """The tree while `main` and all it has started are blocked; in virtual time, where 0.0 is the beginning."""

    async def watch() -> str:
        async with open_nursery() as nursery:
            nursery.start_soon(partial(main, **options), *args, name="main")
            await wait_all_tasks_blocked()
            text = format_task_tree()
            for task in nursery.child_tasks:
                for other in task.child_nurseries:
                    other.cancel_scope.cancel()
            nursery.cancel_scope.cancel()
            clock.jump(1e6)  # for what is shielded, and has a deadline
        return text

    clock = MockClock()
    lines = plain(kernel.run(watch, clock=clock)).splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("    main"))
    assert lines[start - 1] == "  nursery, 1 task"
    return [line[4:] for line in lines[start:]]


# ---- what is shown --------------------------------------------------------------------------------------


def test_task_with_its_trap_and_its_stack() -> None:
    async def main() -> None:
        await inner()

    async def inner() -> None:
        await kernel.sleep(3)

    assert tree_of(main) == [
        "main: sleeps 3.000 s more",
        "    file: main: await inner()",
        "    file: inner: await kernel.sleep(3)",
    ]


def test_kinds_of_waiting_have_their_words() -> None:
    lock = Lock()
    reader, writer = os.pipe()

    async def main() -> None:
        async with lock, open_nursery() as nursery:
            nursery.start_soon(lock.acquire, name="lock")
            nursery.start_soon(kernel.sleep_forever, name="forever")
            nursery.start_soon(ParkingLot("the bus").park, name="bus")
            nursery.start_soon(Event().wait, name="event")
            nursery.start_soon(kernel.lowlevel.wait_readable, reader, name="file")
            nursery.start_soon(NoOn, name="trap")

    class NoOn:
        def __await__(self) -> Iterator[Any]:
            yield Bare()

    class Bare:
        def arm(self, kernel: Any, task: Any) -> None:
            pass

        def abort(self, kernel: Any, task: Any) -> bool:
            return True

        def __repr__(self) -> str:
            return "<Bare>"

    try:
        lines = tree_of(main)
    finally:
        os.close(reader)
        os.close(writer)
    heads = [line.strip() for line in lines if "file:" not in line or "fd" in line]
    assert heads == [
        "main: waits for its children",
        "nursery, 6 tasks",
        "lock: waits for <Lock at 0x, held by 'main', 1 waiting>",
        "forever: sleeps for ever",
        "bus: waits for the bus",
        "event: waits for <Event at 0x, not set, 1 waiting>",
        f"file: waits for <WaitReadable fd={reader}>",
        "trap: waits for <Bare>",
    ]


def test_scopes_with_deadlines_and_shields_and_why_they_were_cancelled() -> None:
    async def main() -> None:
        with kernel.move_on_after(10), CancelScope(), CancelScope(shield=True):
            async with open_nursery() as nursery:
                nursery.cancel_scope.shield = True
                nursery.cancel_scope.deadline = kernel.current_time() + 5
                nursery.start_soon(child, name="child")
                nursery.cancel_scope.cancel("time to go")

    async def child() -> None:
        with kernel.move_on_after(2, shield=True):
            await Event().wait()

    lines = [re.sub(r", from task <.*>", "", line) for line in tree_of(main)]
    assert lines == [
        "main: waits for its children",
        "    file: main: async with open_nursery() as nursery:",
        "  scope, deadline in 10.000 s",
        "  scope, shielded",
        "  nursery, 1 task, shielded, cancelled by explicit, with reason 'time to go'",
        "    child: waits for <Event at 0x, not set, 1 waiting>",
        "        file: child: await Event().wait()",
        "      scope, deadline in 2.000 s, shielded",
    ]


def test_tasks_that_are_ready_or_run_or_have_not_begun() -> None:
    async def yields() -> None:
        await checkpoint()

    async def main() -> list[str]:
        async with open_nursery() as nursery:
            nursery.start_soon(yields, name="yields")
            await checkpoint()
            nursery.start_soon(yields, name="fresh")
            return plain(format_task_tree()).splitlines()[1:]

    lines = kernel.run(main)
    assert [line for line in lines if "file" not in line] == [
        "main: running",
        "  nursery, 2 tasks",
        "    yields: ready",
        "    fresh: ready",
    ]
    # The stack of the one that runs goes to where the tree was asked for.
    assert lines[1] == "    file: main: return plain(format_task_tree()).splitlines()[1:]"


def test_generator_style_and_async_generators_are_a_part_of_the_stack() -> None:
    def main() -> Iterator[Any]:
        yield from middle()

    @kernel.lowlevel.operation
    def middle() -> Iterator[Any]:
        yield from iterates().__await__()

    async def iterates() -> None:
        async for _ in numbers():
            raise AssertionError("unreachable")

    async def numbers() -> AsyncIterator[int]:
        await Event().wait()
        yield 1

    assert tree_of(main)[1:] == [
        "    file: main: yield from middle()",
        "    file: middle: yield from iterates().__await__()",
        "    file: iterates: async for _ in numbers():",
        "    file: numbers: await Event().wait()",
    ]


def test_frames_of_the_kernel_are_left_out_wherever_they_stand() -> None:
    async def both() -> None:
        await kernel.gather(child, child)

    async def child() -> None:
        await Event().wait()

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.spawn(both)

    lines = tree_of(main)
    assert "kernel/" not in "\n".join(lines)
    assert "        file: both: await kernel.gather(child, child)" in lines


def test_services_have_a_heading_of_their_own() -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_service_soon(Event().wait, name="service")
            nursery.start_soon(Event().wait, name="client")

    lines = [line.strip() for line in tree_of(main) if "file" not in line]
    assert lines[1:] == [
        "services, 1 task",
        "service: waits for <Event at 0x, not set, 1 waiting>",
        "scope, shielded",
        "nursery, 1 task",
        "client: waits for <Event at 0x, not set, 1 waiting>",
    ]


def test_system_tasks_come_last_with_the_kernels_frames() -> None:
    async def main() -> str:
        task = spawn_system_task(kernel.sleep_forever, name="system")
        await checkpoint()
        text = format_task_tree()
        assert task.trap is not None
        return text

    lines = plain(kernel.run(main)).splitlines()
    place = lines.index("The kernel's own:")
    assert lines[1].startswith("main: running")
    assert lines[place + 1] == "  system: sleeps for ever"
    assert "in sleep_forever: yield _FOREVER" in lines[place + 2]


def test_first_line_counts() -> None:
    async def main() -> str:
        reader, writer = os.pipe()
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(kernel.sleep, 7)
                nursery.start_soon(kernel.lowlevel.wait_readable, reader)
                await checkpoint()
                nursery.start_soon(checkpoint)
                nursery.cancel_scope.cancel()
                return format_task_tree()
        finally:
            os.close(reader)
            os.close(writer)

    text = kernel.run(main, clock=MockClock())
    assert text.startswith("Task tree at 0.000 s: 4 tasks, 3 ready, 0 timers, 0 waits for files\n")


def test_end_of_the_run_says_so() -> None:
    async def main() -> str:
        try:
            current_kernel().main_nursery.cancel_scope.cancel("enough")  # type: ignore[union-attr]
            await checkpoint()
        finally:
            raise ValueError(format_task_tree())

    with pytest.raises(ValueError, match="The run is ending: explicit, with reason 'enough'"):
        kernel.run(main)


def test_name_trap_or_thing_that_cannot_be_printed_does_not_break_the_dump() -> None:
    class Bad:
        def __repr__(self) -> str:
            raise ValueError("bad")

    class Long:
        def __repr__(self) -> str:
            return "<long\nand\n\n" + "very " * 1000 + ">"

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(park, Bad(), name="bad")
            nursery.start_soon(park, Long(), name="long")

    async def park(on: object) -> None:
        await Park(on)

    lines = [line.strip() for line in tree_of(main)]
    assert "bad: waits for <Bad at 0x, whose repr raised ValueError>" in lines
    (long,) = (line for line in lines if line.startswith("long: "))
    assert long.startswith("long: waits for <long and very very")
    assert long.endswith(" ...")
    assert len(long) < 250


# ---- what is shown together -----------------------------------------------------------------------------


async def tasks_like(number: int, function: Callable[..., Any], *args: Any, names: str | None = "same") -> None:
    async with open_nursery() as nursery:
        for n in range(number):
            nursery.start_soon(function, *args, name=names or f"task {n}")


def test_tasks_that_are_alike_in_everything_are_one_line() -> None:
    event = Event()

    async def waits() -> None:
        await event.wait()

    assert tree_of(tasks_like, 1000, waits)[2:] == [
        "  nursery, 1000 tasks",
        "    same (1000 of them): waits for <Event at 0x, not set, 1000 waiting>",
        "        file: waits: await event.wait()",
    ]


def test_tasks_at_the_same_place_that_wait_for_different_things_are_named_above_one_stack() -> None:
    async def waits() -> None:
        await kernel.sleep(3)

    assert tree_of(tasks_like, 3, waits, names=None)[2:] == [
        "  nursery, 3 tasks",
        "    task 0: sleeps 3.000 s more",
        "    task 1: sleeps 3.000 s more",
        "    task 2: sleeps 3.000 s more",
        "        file: waits: await kernel.sleep(3)",
    ]


def test_of_many_tasks_with_different_names_six_are_named() -> None:
    async def waits() -> None:
        await Event().wait()

    lines = tree_of(tasks_like, 1000, waits, names=None)
    assert len(lines) == 3 + 6 + 2
    assert lines[8] == "    task 5: waits for <Event at 0x, not set, 1 waiting>"
    assert lines[9] == "    ... and 994 more like these"


def test_tasks_at_different_places_are_apart_in_the_order_of_their_start() -> None:
    event = Event()

    async def here() -> None:
        await event.wait()

    async def there() -> None:
        await event.wait()

    async def main() -> None:
        async with open_nursery() as nursery:
            for n in range(4):
                nursery.start_soon(here if n % 2 else there, name=n)

    heads = [line.split(":")[0].strip() for line in tree_of(main)[3:]]
    assert heads == ["0", "2", "file", "1", "3", "file"]


def test_many_trees_that_are_alike_are_one_with_the_first_one_as_the_example() -> None:
    async def connection() -> None:
        with kernel.move_on_after(30):
            async with open_nursery() as nursery:
                nursery.start_soon(Event().wait, name="reads")
                nursery.start_soon(Event().wait, name="writes")

    lines = [line for line in tree_of(tasks_like, 500, connection) if "file" not in line]
    assert lines[1:] == [
        "  nursery, 500 tasks",
        "    same (500 of them): waits for its children",
        "      each with a tree like this, which is the first one's:",
        "      scope, deadline in 30.000 s",
        "      nursery, 2 tasks",
        "        reads: waits for <Event at 0x, not set, 1 waiting>",
        "        writes: waits for <Event at 0x, not set, 1 waiting>",
    ]


def test_trees_that_differ_below_are_apart_and_a_few_that_are_alike_are_shown_in_full() -> None:
    async def parent(children: int) -> None:
        async with open_nursery() as nursery:
            for _ in range(children):
                nursery.start_soon(Event().wait, name="child")

    async def main() -> None:
        async with open_nursery() as nursery:
            for n in (1, 2, 2):
                nursery.start_soon(parent, n, name=f"parent of {n}")

    lines = [line.strip() for line in tree_of(main) if "file" not in line]
    assert [line for line in lines if not line.startswith("child")] == [
        "main: waits for its children",
        "nursery, 3 tasks",
        "parent of 1: waits for its children",
        "nursery, 1 task",
        "parent of 2: waits for its children",
        "nursery, 2 tasks",
        "parent of 2: waits for its children",
        "nursery, 2 tasks",
    ]


def test_trees_that_differ_only_far_below_are_apart() -> None:
    async def here() -> None:
        await Event().wait()

    async def there() -> None:
        await Event().wait()

    async def parent(child: Callable[..., Any], levels: int) -> None:
        async with open_nursery() as nursery:
            if levels:
                nursery.start_soon(parent, child, levels - 1, name="between")
            else:
                nursery.start_soon(child, name=child.__qualname__)

    async def main() -> None:
        async with open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(parent, here, 3, name="parent of here")
                nursery.start_soon(parent, there, 3, name="parent of there")

    heads = [line.split(":")[0].strip() for line in tree_of(main)]
    assert heads.count("parent of here (10 of them)") == heads.count("parent of there (10 of them)") == 1
    assert heads.count("here") == heads.count("there") == 1


# ---- how much it costs ----------------------------------------------------------------------------------


def count_calls(function: Callable[[], object]) -> int:
    """How many functions, Python's and C's, are called by `function()`."""
    calls = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


def wide(number: int) -> tuple[int, int]:
    """Work and size for so many tasks with names of their own, half of them with a child."""

    async def with_child() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(Event().wait)

    async def main() -> tuple[int, int]:
        async with open_nursery() as nursery:
            for n in range(number // 3):
                nursery.start_soon(with_child, name=f"a{n}")
                nursery.start_soon(Event().wait, name=f"b{n}")
            await wait_all_tasks_blocked()
            work = count_calls(format_task_tree)
            size = len(format_task_tree())
            nursery.cancel_scope.cancel()
        return work, size

    return kernel.run(main)


def deep(generations: int) -> tuple[int, int]:
    """Work and size for a line of descent."""

    async def generation(left: int) -> tuple[int, int] | None:
        if left == 0:
            await checkpoint()
            found.append((count_calls(format_task_tree), len(format_task_tree())))
            return
        async with open_nursery() as nursery:
            nursery.start_soon(generation, left - 1, name=f"generation {left:05}")

    found: list[tuple[int, int]] = []
    kernel.run(generation, generations)
    return found[0]


def test_work_is_linear_in_the_number_of_tasks_and_the_text_does_not_grow() -> None:
    work, size = wide(1000)
    more_work, same_size = wide(4000)
    assert more_work < 4.2 * work
    assert same_size < 1.1 * size


def test_work_and_text_are_linear_in_the_depth_and_5000_generations_are_no_recursion() -> None:
    work, size = deep(1250)
    more_work, more_size = deep(5000)
    assert more_work < 4.2 * work
    assert more_size < 4.5 * size


def test_lines_of_a_deep_tree_tell_the_depth_where_indentation_ends() -> None:
    texts: list[str] = []

    async def generation(left: int) -> None:
        if left == 0:
            texts.append(format_task_tree())
            return
        async with open_nursery() as nursery:
            nursery.start_soon(generation, left - 1, name=f"{left} left")

    kernel.run(generation, 100)
    lines = texts[0].splitlines()
    assert max(len(line) - len(line.lstrip()) for line in lines) < 60
    (last,) = (line for line in lines if line.endswith("1 left: running"))
    assert last.strip() == "[200] 1 left: running"


def test_of_a_deep_stack_both_ends_are_shown() -> None:
    async def down(left: int) -> None:
        if left:
            await down(left - 1)
        else:
            await Event().wait()

    lines = tree_of(down, 300)
    assert len(lines) == 1 + 41
    assert lines[21] == "    ... 261 more ..."
    assert lines[-1] == "    file: down: await Event().wait()"


def test_nothing_is_left_behind_that_keeps_tasks_alive() -> None:
    import gc
    import weakref

    async def main() -> Any:
        async with open_nursery() as nursery:
            nursery.start_soon(Event().wait)
            await checkpoint()
            (task,) = nursery.child_tasks
            format_task_tree()
            nursery.cancel_scope.cancel()
        return weakref.ref(task)

    gc.disable()
    try:
        assert kernel.run(main)() is None
    finally:
        gc.enable()


# ---- from where -----------------------------------------------------------------------------------------


def test_dump_tasks_prints_to_stderr_or_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        kernel.dump_tasks()
        file = io.StringIO()
        kernel.dump_tasks(file)
        assert "main: running" in plain(file.getvalue())
        assert file.getvalue().endswith("\n")

    kernel.run(main)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "main: running" in plain(captured.err)


def test_outside_a_run_there_is_nothing_to_show() -> None:
    for function in (format_task_tree, kernel.dump_tasks):
        with pytest.raises(RuntimeError, match="outside the kernel"):
            function()


def test_kernel_between_two_runs_has_no_run() -> None:
    with kernel.Kernel() as several:
        several.run(checkpoint)
        assert format_task_tree(several).endswith(": no run\n")


def test_kernel_of_another_thread_is_shown_while_it_sleeps_and_while_it_computes() -> None:
    kernels: list[kernel.Kernel] = []
    arrived, go = threading.Event(), threading.Event()

    async def child() -> None:
        await ParkingLot("the bus").park()

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(child, name="child")
            await checkpoint()
            computes()
            nursery.cancel_scope.cancel()

    def computes() -> None:
        arrived.set()
        assert go.wait(30)

    def thread() -> None:
        with kernel.Kernel() as several:
            kernels.append(several)
            several.run(main)

    worker = threading.Thread(target=thread)
    worker.start()
    assert arrived.wait(30)
    text = plain(format_task_tree(kernels[0]))
    go.set()
    worker.join()
    assert "main: running" in text
    assert "file: computes: assert go.wait(30)" in text
    assert "child: waits for the bus" in text


def test_tree_that_changes_while_another_thread_looks_does_no_harm() -> None:
    """Many looks at many moments of a run that never holds still. What they show is of no interest here."""
    kernels: list[kernel.Kernel] = []
    started, enough = threading.Event(), threading.Event()

    async def child() -> None:
        with kernel.move_on_after(10):
            async with open_nursery() as nursery:
                nursery.start_soon(checkpoint)
                await checkpoint()

    async def main() -> None:
        started.set()
        while not enough.is_set():
            async with open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(child)

    def thread() -> None:
        with kernel.Kernel() as several:
            kernels.append(several)
            several.run(main)

    worker = threading.Thread(target=thread)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        worker.start()
        assert started.wait(30)
        for _ in range(200):
            assert format_task_tree(kernels[0]).startswith("Task tree at ")
    finally:
        enough.set()
        worker.join()
        sys.setswitchinterval(before)


@pytest.fixture
def on_signal() -> Iterator[io.StringIO]:
    """What `dump_on_signal` writes at SIGUSR1."""
    file = io.StringIO()
    before = signal.getsignal(signal.SIGUSR1)
    kernel.dump_on_signal(file=file)
    yield file
    signal.signal(signal.SIGUSR1, before)


def test_dump_on_signal_while_a_task_computes(on_signal: io.StringIO) -> None:
    async def main() -> None:
        computes()

    def computes() -> None:
        signal.raise_signal(signal.SIGUSR1)

    kernel.run(main)
    text = plain(on_signal.getvalue())
    assert "main: running" in text
    assert "file: computes: signal.raise_signal(signal.SIGUSR1)" in text


def test_dump_on_signal_while_the_kernel_sleeps(on_signal: io.StringIO) -> None:
    async def main() -> None:
        stop = Event()
        token = kernel.lowlevel.current_kernel_token()

        def send() -> None:
            os.kill(os.getpid(), signal.SIGUSR1)
            token.run_sync_soon(stop.set)

        thread = threading.Timer(0.01, send)
        thread.start()
        await stop.wait()
        thread.join()

    kernel.run(main)
    assert "main: waits for <Event at 0x, not set, 1 waiting>" in plain(on_signal.getvalue())


def test_dump_on_signal_at_any_moment_in_the_kernels_code(on_signal: io.StringIO) -> None:
    """A signal at every line of a run that does something of everything, the kernel's code included."""

    async def child() -> None:
        with kernel.move_on_after(10):
            await kernel.sleep(1)

    async def main() -> str:
        async with open_nursery() as nursery:
            nursery.start_soon(child)
            nursery.spawn(child)
            await nursery.start(started)
            nursery.cancel_scope.cancel()
        return "done"

    async def started(task_status: Any) -> None:
        task_status.started()
        await kernel.sleep(1)

    lines = 0

    def trace(frame: Any, event: str, arg: object) -> Any:
        nonlocal lines
        if "/kernel/tracing/" in frame.f_code.co_filename or "/kernel/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            lines += 1
            format_task_tree(current) if current.root_task is not None else None
        return trace

    with kernel.Kernel(clock=MockClock(autojump_threshold=0)) as current:
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            result = current.run(main)
        finally:
            sys.settrace(before)
    assert result == "done"
    assert lines > 500


def test_dump_on_signal_without_a_run_says_so(on_signal: io.StringIO) -> None:
    signal.raise_signal(signal.SIGUSR1)
    assert on_signal.getvalue() == "SIGUSR1: no kernel runs in the main thread\n"


def test_dump_on_signal_raises_nothing_into_the_program(
    on_signal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> str:
        raise ValueError("bad")

    async def main() -> str:
        signal.raise_signal(signal.SIGUSR1)
        on_signal.close()
        signal.raise_signal(signal.SIGUSR1)
        return "still here"

    monkeypatch.setattr("kernel.tracing.tree.format_task_tree", broken)
    seen = []
    monkeypatch.setattr(on_signal, "close", lambda: (seen.append(on_signal.getvalue()), io.StringIO.close(on_signal)))
    assert kernel.run(main) == "still here"
    assert seen == ["SIGUSR1: the task tree could not be read: ValueError('bad'). Try again.\n"]


def test_dump_on_another_signal_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    try:
        kernel.dump_on_signal(signal.SIGUSR2)
        signal.raise_signal(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert capsys.readouterr().err == "SIGUSR2: no kernel runs in the main thread\n"


def test_dump_on_signal_from_another_thread_is_refused() -> None:
    errors: list[BaseException] = []

    def thread() -> None:
        try:
            kernel.dump_on_signal()
        except ValueError as error:
            errors.append(error)

    worker = threading.Thread(target=thread)
    worker.start()
    worker.join()
    assert len(errors) == 1


def test_places_are_named_from_the_working_directory_if_they_are_below_it(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> str:
        return format_task_tree()

    monkeypatch.chdir(os.path.dirname(__file__))
    assert f"    {os.path.basename(__file__)}:" in kernel.run(main)
    monkeypatch.chdir(tmp_path)
    assert f"    {__file__}:" in kernel.run(main)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert f"    {__file__}:" in kernel.run(main)
