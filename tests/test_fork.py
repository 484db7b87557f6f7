"""fork: the child starts clean, its copy of a run says what it is, and the parent does not notice."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import kernel
from kernel import Kernel
from kernel.core.task import here
from kernel.lowlevel import (
    KernelToken,
    RunVar,
    checkpoint,
    current_kernel,
    current_kernel_token,
    spawn_system_task,
    wait_readable,
)
from kernel.testing import wait_all_tasks_blocked
from kernel.threads import cache

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    # Python is right to warn of forking with threads around. That is what is tested here.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]

COPY = "its copy of the run cannot go on"


def read_all(fd: int) -> bytes:
    """What the child writes until it has ended. It gets 20 seconds for each word."""
    data = b""
    while select.select([fd], [], [], 20)[0] and (chunk := os.read(fd, 65536)):
        data += chunk
    return data


def leave(fd: int, answer: Any) -> None:
    """In the child: tell the parent, and end."""
    os.write(fd, pickle.dumps(answer))
    os._exit(0)


def in_child(function: Callable[[], Any]) -> Any:
    """Fork; return what `function` returns in the child, or the traceback of what it raised."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            answer = function()
        except BaseException:
            answer = traceback.format_exc()
        leave(write, answer)
    os.close(write)
    data = read_all(read)
    os.close(read)
    os.kill(pid, signal.SIGKILL)  # if it hangs; otherwise it is dead already
    os.waitpid(pid, 0)
    assert data, "the child has hung, or ended without a word"
    return pickle.loads(data)


def open_fds() -> set[str]:
    """Without those of idle worker threads, which a child closes too."""
    return set(os.listdir("/proc/self/fd")) - set(map(str, cache._eventfds))


async def small_program() -> str:
    """Something that needs the whole kernel: timers, tasks, the inbox, files."""
    a, b = os.pipe()
    try:
        event = kernel.Event()
        current_kernel_token().run_sync_soon(event.set)
        await event.wait()
        await kernel.sleep(0.001)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(wait_readable, a)
            await wait_all_tasks_blocked()
            os.write(b, b"!")
        return "works"
    finally:
        os.close(a)
        os.close(b)


def run_small_program() -> str:
    return kernel.run(small_program)


# ---- outside any run ---------------------------------------------------------------------------------


def test_a_child_that_was_forked_outside_any_run_runs_kernels() -> None:
    run_small_program()
    assert in_child(run_small_program) == "works"
    assert run_small_program() == "works"


def test_a_kernel_that_was_open_belongs_to_the_parent_and_to_nobody_else() -> None:
    with Kernel() as one:
        assert one.run(small_program) == "works"

        def child() -> tuple[str, str]:
            with pytest.raises(RuntimeError, match="was forked off while it was open") as info:
                one.run(small_program)
            one.close()
            return str(info.value), run_small_program()

        text, result = in_child(child)
        assert "Make another one" in text
        assert result == "works"
        assert one.run(small_program) == "works"


@pytest.mark.skipif(sys.platform != "linux", reason="looks in /proc")
def test_a_child_inherits_no_file_of_a_kernel() -> None:
    before = open_fds()
    with Kernel() as one:
        one.run(small_program)
        assert open_fds() > before

        async def main() -> set[str]:
            fds = in_child(open_fds)
            assert current_kernel() is one
            return set(fds)

        pipe = 1  # the end that the child writes to
        assert len(in_child(open_fds)) == len(before) + pipe
        assert len(one.run(main)) == len(before) + pipe


# ---- inside a run ------------------------------------------------------------------------------------


def test_a_child_that_was_forked_in_a_task_runs_kernels_of_its_own() -> None:
    async def main() -> str:
        assert in_child(run_small_program) == "works"
        assert in_child(lambda: in_child(run_small_program)) == "works"  # and so do its children
        return await small_program()

    assert kernel.run(main) == "works"


def test_in_the_child_nobody_thinks_that_a_kernel_is_running() -> None:
    var: RunVar[int] = RunVar("var", default=0)

    def child() -> list[str]:
        errors = []
        assert here.kernel is None
        assert not kernel.lowlevel.in_kernel_run()
        for call in (kernel.current_time, var.get, current_kernel_token, kernel.open_nursery):
            with pytest.raises(RuntimeError) as info:
                call()
            errors.append(str(info.value))
        return errors

    async def main() -> list[str]:
        return in_child(child)  # type: ignore[no-any-return]

    for text in kernel.run(main):
        assert "this process was forked off inside a run, and only the parent goes on with that" in text


@pytest.mark.parametrize("step", ["checkpoint", "sleep", "event", "return", "error", "nursery", "child", "scope"])
def test_a_child_that_goes_on_in_its_copy_of_the_run_is_told_so_and_the_run_ends_there(step: str) -> None:
    read, write = os.pipe()
    log: list[str] = []

    async def fork() -> bool:
        log.append("forked")
        return os.fork() == 0

    async def main(parent_pid: int) -> str:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(kernel.sleep_forever)
            await wait_all_tasks_blocked()
            if step == "child":
                nursery.start_soon(fork)
                await kernel.sleep(0.001)
            elif await fork():
                if step == "checkpoint":
                    await checkpoint()
                elif step == "sleep":
                    await kernel.sleep(0)
                elif step == "event":
                    await kernel.Event().wait()
                elif step == "error":
                    raise KeyError("the child's")
                elif step == "nursery":
                    nursery.start_soon(checkpoint)
                elif step == "scope":
                    nursery.cancel_scope.cancel()
                return "the child's"
            assert os.getpid() == parent_pid, "the child's copy of the run went on"
            nursery.cancel_scope.cancel()
        return "the parent's"

    parent = os.getpid()
    try:
        result = kernel.run(main, parent)
    except BaseException as error:
        if os.getpid() != parent:
            leave(write, (type(error).__name__, str(error)))
        raise
    if os.getpid() != parent:
        leave(write, ("no error", result))
    os.close(write)
    answer = pickle.loads(read_all(read))
    os.close(read)
    assert os.waitpid(-1, 0)[1] == 0
    assert answer[0] == "RuntimeError"
    assert COPY in answer[1]
    assert result == "the parent's"
    assert log == ["forked"]


def test_in_the_copy_no_other_task_runs_any_more() -> None:
    read, write = os.pipe()

    async def sibling() -> None:
        os.write(write, f"{os.getpid()}\n".encode())

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(sibling)
            os.fork()
            await checkpoint()

    parent = os.getpid()
    try:
        kernel.run(main)
    except RuntimeError:
        if os.getpid() != parent:
            os._exit(0)
        raise
    os.close(write)
    assert os.waitpid(-1, 0)[1] == 0
    assert read_all(read).split() == [str(parent).encode()] * 3
    os.close(read)


def test_calls_that_wait_in_the_inbox_are_made_in_the_parent_and_not_in_the_child() -> None:
    read, write = os.pipe()
    tokens: list[KernelToken] = []

    async def main() -> None:
        tokens.append(current_kernel_token())
        tokens[0].run_sync_soon(os.write, write, b"call\n")
        if os.fork() == 0:
            with pytest.raises(kernel.RunFinishedError):
                tokens[0].run_sync_soon(print)
            os.write(write, b"child\n")
            await checkpoint()

    parent = os.getpid()
    try:
        kernel.run(main)
    except RuntimeError:
        if os.getpid() != parent:
            os._exit(0)
        raise
    if os.getpid() != parent:
        os._exit(1)
    os.close(write)
    assert os.waitpid(-1, 0)[1] == 0
    assert sorted(read_all(read).split()) == [b"call", b"child"]
    os.close(read)


def test_the_inbox_is_not_locked_in_the_child_though_a_thread_was_in_the_middle_of_a_call() -> None:
    async def main() -> str:
        token = current_kernel_token()
        held, done = threading.Event(), threading.Event()

        def thread() -> None:
            with token._lock:
                held.set()
                done.wait(60)

        def child() -> str:
            with pytest.raises(kernel.RunFinishedError):
                token.run_sync_soon(print)
            return "refused"

        worker = threading.Thread(target=thread)
        worker.start()
        assert held.wait(60)
        try:
            return str(in_child(child))
        finally:
            done.set()
            worker.join(60)

    assert kernel.run(main) == "refused"


@pytest.mark.skipif(not hasattr(signal, "set_wakeup_fd"), reason="no signals to speak of")
def test_in_the_child_signals_do_what_they_do_in_any_process() -> None:
    def child() -> tuple[bool, int, str]:
        mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        wakeup = signal.set_wakeup_fd(-1)
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            return mine, wakeup, "interrupted"
        return mine, wakeup, "nothing"

    async def main() -> Any:
        answer = in_child(child)
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        return answer

    assert kernel.run(main, restrict_keyboard_interrupt_to_checkpoints=True) == (True, -1, "interrupted")


def test_in_the_child_async_generators_are_nobodys_business_until_a_kernel_runs() -> None:
    async def numbers() -> Any:
        yield 1

    def child() -> tuple[Any, str]:
        hooks = sys.get_asyncgen_hooks()
        agen = numbers()
        with pytest.raises(StopIteration):
            agen.__anext__().send(None)
        del agen
        gc.collect()
        return tuple(hooks), run_small_program()

    async def main() -> Any:
        return in_child(child)

    assert kernel.run(main) == ((None, None), "works")


def test_an_async_generator_of_the_run_that_the_child_drops_is_left_as_it_is() -> None:
    closed: list[int] = []

    async def numbers() -> Any:
        try:
            yield 1
        finally:
            closed.append(os.getpid())

    kept: list[Any] = []

    async def main() -> Any:
        kept.append(numbers())
        await kept[0].__anext__()

        def child() -> list[int]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kept.clear()
                gc.collect()
            run_small_program()
            return closed

        return in_child(child)

    assert kernel.run(main) == []
    assert closed == [os.getpid()]


def test_the_parent_goes_on_while_the_child_lives_and_after_it_has_used_and_closed_its_copies() -> None:
    """epoll and eventfd are shared by a fork. What the child does to its copies must not be felt here."""

    async def main() -> int:
        a, b = os.pipe()
        log: list[str] = []

        async def reader() -> None:
            for _ in range(5):
                await wait_readable(a)
                log.append(os.read(a, 1).decode())

        async def system() -> None:
            await kernel.sleep_forever()

        spawn_system_task(system)
        token = current_kernel_token()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(reader)
            for number in range(5):
                await wait_all_tasks_blocked()
                assert in_child(run_small_program) == "works"
                os.write(b, str(number).encode())
                event = kernel.Event()
                worker = threading.Thread(target=token.run_sync_soon, args=(event.set,))
                worker.start()
                await event.wait()
                worker.join(60)
        os.close(a)
        os.close(b)
        assert log == list("01234")
        return len(log)

    assert kernel.run(main) == 5


# ---- threads -----------------------------------------------------------------------------------------


def run_in_thread(function: Callable[[], Any]) -> Any:
    answers: list[Any] = []
    worker = threading.Thread(target=lambda: answers.append(function()))
    worker.start()
    worker.join(60)
    return answers[0]


def test_a_child_that_was_forked_in_another_thread_runs_kernels() -> None:
    assert run_in_thread(lambda: in_child(run_small_program)) == "works"


def test_a_child_that_was_forked_in_a_task_of_another_threads_kernel_runs_kernels() -> None:
    async def main() -> Any:
        return in_child(run_small_program)

    assert run_in_thread(lambda: kernel.run(main)) == "works"


def test_a_child_of_a_thread_beside_a_running_kernel_starts_clean_and_the_kernel_goes_on() -> None:
    """The kernel runs in the main thread; another one forks. In the child, that one is the main thread."""

    def child() -> tuple[str, bool, int]:
        result = run_small_program()
        return result, signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.set_wakeup_fd(-1)

    async def main() -> Any:
        token, answers, done = current_kernel_token(), [], kernel.Event()

        def thread() -> None:
            answers.append(in_child(child))
            token.run_sync_soon(done.set)

        worker = threading.Thread(target=thread)
        worker.start()
        await done.wait()
        worker.join(60)
        return answers[0]

    assert kernel.run(main) == ("works", True, -1)


# ---- those who fork for a living ---------------------------------------------------------------------


def _in_process(queue: Any) -> None:
    queue.put(run_small_program())


@pytest.mark.parametrize("inside", [False, True], ids=["outside a run", "in a task"])
def test_multiprocessing_with_fork_runs_kernels_in_the_child(inside: bool) -> None:
    context = multiprocessing.get_context("fork")

    def start() -> str:
        queue = context.SimpleQueue()
        process = context.Process(target=_in_process, args=(queue,))
        process.start()
        answer = str(queue.get())
        process.join(60)
        assert process.exitcode == 0
        process.close()
        queue.close()
        return answer

    async def main() -> str:
        answer = start()
        await small_program()
        return answer

    assert (kernel.run(main) if inside else start()) == "works"


def test_subprocesses_can_be_started_in_a_task() -> None:
    async def main() -> str:
        done = subprocess.run([sys.executable, "-c", "print('works')"], capture_output=True, text=True, check=True)
        assert await small_program() == "works"
        return done.stdout.strip()

    assert kernel.run(main) == "works"
