"""Worker processes: what comes back, what a cancellation kills, what a death does not take with it.

What shows that a worker has begun, and what holds it up, are files: a named pipe that it opens. Opening one waits for
the other side, so nothing here sleeps or polls.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from leftovers import idle_workers_leave, resource_tracker_leaves
from process_jobs import (
    NotThere,
    OnlyThere,
    ctrl_c_is_ignored,
    die,
    fail,
    fail_fussily,
    keep_the_interpreter_busy,
    make_something_that_cannot_be_pickled,
    run_in_a_kernel_of_its_own,
    start_something_that_stays,
    tell,
    tell_and_wait,
)

import kernel
from kernel import to_process, to_thread
from kernel.lowlevel import checkpoint, current_kernel
from kernel.testing import wait_all_tasks_blocked

__all__ = ["idle_workers_leave", "resource_tracker_leaves"]

pytestmark = pytest.mark.usefixtures("idle_workers_leave", "resource_tracker_leaves", "light_main_module")

ROOT = Path(__file__).parent.parent


@pytest.fixture
def light_main_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker imports the main module. Ours is pytest, which takes ten times as long as all the rest."""
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "begun")
    return tmp_path / "begun"


@pytest.fixture
def go(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "go")
    return tmp_path / "go"


async def read(fifo: Path) -> str:
    return await to_thread.run_sync(fifo.read_text)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


# ---- results and errors --------------------------------------------------------------------------------


def test_result_comes_back_from_another_process() -> None:
    async def main() -> None:
        assert await to_process.run_sync(pow, 2, 10) == 1024
        assert await to_process.run_sync(os.getpid) != os.getpid()
        assert await to_process.run_sync(partial(int, base=2), "101") == 5

    kernel.run(main)


def test_a_worker_is_used_again() -> None:
    async def main() -> None:
        assert len({await to_process.run_sync(os.getpid) for _ in range(5)}) == 1

    kernel.run(main)


def test_workers_are_gone_when_the_run_is_over() -> None:
    async def main() -> list[int]:
        return await kernel.gather(*[partial(to_process.run_sync, os.getpid) for _ in range(2)])

    pids = kernel.run(main)
    assert not any(map(is_alive, pids))
    assert not multiprocessing.active_children()


def test_error_of_the_function_is_raised_with_the_traceback_of_the_other_side() -> None:
    async def main() -> None:
        with pytest.raises(LookupError, match="lost") as info:
            await to_process.run_sync(fail, LookupError("lost"))
        assert "in fail\n" in str(info.value.__cause__)
        with pytest.raises(SystemExit):  # it is no end of the worker's
            await to_process.run_sync(sys.exit, 3)

    kernel.run(main)


def test_what_cannot_be_sent_is_an_error_of_that_call_and_the_worker_stays() -> None:
    calls: list[tuple[Callable[..., object], tuple[object, ...], Any, str]] = [
        (lambda: 1, (), (AttributeError, pickle.PicklingError), "<lambda>"),
        (print, (threading.Lock(),), TypeError, "cannot pickle '_thread.lock'"),
        (print, (NotThere(),), LookupError, "not in a worker"),
        (make_something_that_cannot_be_pickled, (), TypeError, "cannot pickle '_thread.lock'"),
        (OnlyThere, (), LookupError, "not in this process"),
        (fail_fussily, (), TypeError, "missing 1 required positional argument"),
    ]

    async def main() -> None:
        pid = await to_process.run_sync(os.getpid)
        for function, args, error, message in calls:
            with pytest.raises(error, match=message) as info:
                await to_process.run_sync(function, *args)
            assert await to_process.run_sync(os.getpid) == pid
        assert "Fussy: this: that" in str(info.value.__cause__), "the error that cannot be sent is shown all the same"

    kernel.run(main)


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match=r"to_process\.run_sync\(\) wants a function and its arguments, not 3"):
        kernel.run(to_process.run_sync, 3)  # type: ignore[arg-type]


def test_outside_the_kernel_is_an_error_that_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"to_process\.run_sync\(\) was used outside the kernel"):
        to_process.run_sync(abs, 1).send(None)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="outside the kernel"):
        to_process.current_default_process_limiter()


def test_a_megabyte_goes_there_and_back() -> None:
    data = os.urandom(1_000_000)
    assert kernel.run(to_process.run_sync, bytes.swapcase, data) == data.swapcase()


def test_a_worker_may_run_a_kernel_with_workers_of_its_own() -> None:
    assert kernel.run(to_process.run_sync, run_in_a_kernel_of_its_own) == 1024


def test_workers_ignore_ctrl_c() -> None:
    """It comes from the terminal to the whole process group; what it means is the kernel's business."""
    assert kernel.run(to_process.run_sync, ctrl_c_is_ignored)


# ---- a worker dies -------------------------------------------------------------------------------------


def test_a_worker_that_dies_is_an_error_of_that_call_and_the_next_gets_another() -> None:
    async def main() -> None:
        for death in (partial(os._exit, 0), partial(die, signal.SIGKILL), partial(die, signal.SIGSEGV)):
            pid = await to_process.run_sync(os.getpid)
            with pytest.raises(BrokenExecutor):
                await to_process.run_sync(death)
            assert not is_alive(pid)
            assert await to_process.run_sync(os.getpid) != pid

    kernel.run(main)


def test_a_worker_that_dies_does_not_take_another_with_it(begun: Path, go: Path) -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            worker = nursery.spawn(to_process.run_sync, tell_and_wait, begun, go)
            await read(begun)
            with pytest.raises(BrokenExecutor):
                await to_process.run_sync(os._exit, 1)
            await to_thread.run_sync(tell, go, "unharmed")
            assert await worker == "unharmed"

    kernel.run(main)


def test_a_worker_that_has_died_while_idle_is_replaced() -> None:
    async def main() -> None:
        pid = await to_process.run_sync(os.getpid)
        os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # it was reaped already
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert await to_process.run_sync(os.getpid) != pid

    kernel.run(main)


@pytest.mark.skipif(
    sys.version_info < (3, 11, 5), reason="ProcessPoolExecutor itself hangs then, before 3.11.5 (cpython#94777)"
)
def test_a_worker_killed_while_it_is_sent_a_lot_is_an_error_and_no_hang(begun: Path, go: Path) -> None:
    """The thread that sends is stuck in a full pipe then."""

    async def main() -> None:
        pid = await to_process.run_sync(os.getpid)
        os.kill(pid, signal.SIGSTOP)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(send)
            await wait_all_tasks_blocked(0.05)
            os.kill(pid, signal.SIGKILL)

    async def send() -> None:
        with pytest.raises(BrokenExecutor):
            await to_process.run_sync(len, bytes(10_000_000))

    kernel.run(main)


# ---- cancellation --------------------------------------------------------------------------------------


def test_a_cancelled_task_calls_nothing(begun: Path) -> None:
    async def main() -> bool:
        with kernel.CancelScope() as scope:
            scope.cancel()
            await to_process.run_sync(tell, begun, "called")  # it would wait for a reader for ever
        return scope.cancelled_caught

    assert kernel.run(main)
    assert not multiprocessing.active_children()


def test_a_task_cancelled_while_it_waits_for_the_limiter_calls_nothing(begun: Path, go: Path) -> None:
    async def main() -> None:
        limiter = kernel.CapacityLimiter(1)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(partial(to_process.run_sync, tell_and_wait, begun, go, limiter=limiter))
            await read(begun)
            second = nursery.spawn(partial(to_process.run_sync, tell, begun, "called", limiter=limiter))
            await wait_all_tasks_blocked()
            assert limiter.statistics().tasks_waiting == 1
            second.cancel()
            await wait_all_tasks_blocked()
            assert limiter.statistics().tasks_waiting == 0
            await to_thread.run_sync(tell, go, "")
        assert limiter.borrowed_tokens == 0

    kernel.run(main)


def test_a_task_cancelled_as_it_gets_its_token_calls_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = ProcessPoolExecutor.submit

    def submit_beyond_recall(self: ProcessPoolExecutor, fn: Any, /, *args: Any) -> Future[Any]:
        future = submit(self, fn, *args)
        while not future.running() and not future.done():
            pass  # what is pending could still be cancelled
        return future

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit_beyond_recall)

    async def main() -> None:
        limiter = kernel.CapacityLimiter(1)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(first, limiter, nursery.cancel_scope)
            nursery.start_soon(partial(to_process.run_sync, Path.touch, tmp_path / "called", limiter=limiter))
        assert limiter.borrowed_tokens == 0

    async def first(limiter: kernel.CapacityLimiter, scope: kernel.CancelScope) -> None:
        await to_process.run_sync(abs, -1, limiter=limiter)  # its last act is to hand the token over
        scope.cancel()

    kernel.run(main)
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("kill", [False, True])
def test_a_task_cancelled_while_its_process_starts_calls_nothing_and_leaves_at_once(kill: bool, begun: Path) -> None:
    async def main() -> bool:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(partial(to_process.run_sync, tell, begun, "called", kill_on_cancel=kill))
            while not multiprocessing.active_children():
                await checkpoint()
            nursery.cancel_scope.cancel()
        assert not multiprocessing.active_children()
        assert to_process.current_default_process_limiter().borrowed_tokens == 0
        return nursery.cancel_scope.cancelled_caught

    assert kernel.run(main)


def test_a_function_that_runs_is_waited_for_and_the_worker_stays(begun: Path, go: Path) -> None:
    async def main() -> None:
        log: list[str] = []

        async def call() -> None:
            log.append(await to_process.run_sync(tell_and_wait, begun, go))
            with pytest.raises(kernel.Cancelled):
                await checkpoint()
            log.append("cancelled afterwards")

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(call)
            pid = int(await read(begun))
            nursery.cancel_scope.cancel()
            with kernel.CancelScope(shield=True):
                await wait_all_tasks_blocked()
                assert log == []
                await to_thread.run_sync(tell, go, "done")
        assert log == ["done", "cancelled afterwards"]
        assert await to_process.run_sync(os.getpid) == pid

    kernel.run(main)


@pytest.mark.parametrize("stubborn", [False, True])
def test_kill_on_cancel_leaves_when_the_process_is_dead(stubborn: bool, begun: Path, go: Path) -> None:
    async def main() -> bool:
        work = partial(keep_the_interpreter_busy, begun) if stubborn else partial(tell_and_wait, begun, go)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(partial(call, work))
            pid = int(await read(begun))
            nursery.cancel_scope.cancel()
        assert not is_alive(pid)
        assert to_process.current_default_process_limiter().borrowed_tokens == 0
        assert await to_process.run_sync(pow, 2, 3) == 8
        return nursery.cancel_scope.cancelled_caught

    async def call(work: Callable[[], Any]) -> None:
        await to_process.run_sync(work, kill_on_cancel=True)

    assert kernel.run(main)


def test_the_loop_goes_on_while_a_killed_process_is_cleared_away(begun: Path, go: Path) -> None:
    """Reaping it and its threads takes some ms. The others do not wait for that."""

    async def main() -> None:
        finished: list[str] = []
        steps = 0

        async def call() -> None:
            try:
                await to_process.run_sync(tell_and_wait, begun, go, kill_on_cancel=True)
            finally:
                finished.append("call")

        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(call)
            await read(begun)
            handle.cancel()
            while not finished:
                await checkpoint()
                steps += 1
        assert steps > 3

    kernel.run(main)


# ---- the limiter ---------------------------------------------------------------------------------------


def test_the_limiter_bounds_how_many_processes_there_are() -> None:
    async def main() -> None:
        limiter = kernel.CapacityLimiter(2)
        calls = [partial(to_process.run_sync, os.getpid, limiter=limiter) for _ in range(20)]
        assert len(set(await kernel.gather(*calls))) <= 2
        assert limiter.borrowed_tokens == 0

    kernel.run(main)


def test_the_default_limiter_belongs_to_the_run_and_counts_processors() -> None:
    async def main() -> kernel.CapacityLimiter:
        limiter = to_process.current_default_process_limiter()
        assert limiter is to_process.current_default_process_limiter()
        assert limiter.total_tokens == os.cpu_count()
        return limiter

    assert kernel.run(main) is not kernel.run(main)


def test_the_threads_of_the_program_are_not_needed_to_start_a_process() -> None:
    """Somebody who uses up all threads, while waiting for a process, must not wait for ever."""

    async def main() -> int:
        to_thread.current_default_thread_limiter().total_tokens = 0
        with kernel.fail_after(60):
            return await to_process.run_sync(pow, 2, 3)

    assert kernel.run(main) == 8


# ---- the end -------------------------------------------------------------------------------------------


def test_a_worker_that_will_not_leave_is_killed_at_the_end_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_process, "PATIENCE", 0.05)

    async def main() -> int:
        await to_process.run_sync(start_something_that_stays)
        return await to_process.run_sync(os.getpid)

    assert not is_alive(kernel.run(main))


def test_a_run_that_breaks_off_leaves_no_process(begun: Path, go: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_process, "PATIENCE", 0.05)
    pids: list[int] = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(to_process.run_sync, tell_and_wait, begun, go)
            pids.append(int(await read(begun)))
            current_kernel().call_soon(partial(divmod, 1, 0))

    with pytest.raises(kernel.KernelInternalError):
        kernel.run(main)
    assert not any(map(is_alive, pids))


def test_an_error_of_the_program_does_not_leave_processes() -> None:
    async def main() -> None:
        await to_process.run_sync(abs, 1)
        raise LookupError

    with pytest.raises(LookupError):
        kernel.run(main)
    assert not multiprocessing.active_children()


# ---- from a program of its own -------------------------------------------------------------------------


def run_script(source: str, path: Path, *command: str, stdin: str | None = None) -> tuple[str, str]:
    path.write_text(textwrap.dedent(source))
    finished = subprocess.run(
        [sys.executable, "-W", "error", *(command or (str(path),))],
        input=stdin, capture_output=True, text=True, timeout=60, check=False, cwd=path.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return finished.stdout, finished.stderr


SCRIPT = """\
import kernel

def square(x):
    return x * x

async def main():
    print(await kernel.to_process.run_sync(square, 12))
"""

GUARDED = SCRIPT + "if __name__ == '__main__':\n    kernel.run(main)\n"


def test_a_script_with_a_guard_works_and_says_nothing_on_stderr(tmp_path: Path) -> None:
    assert run_script(GUARDED, tmp_path / "script.py") == ("144\n", "")


def test_a_module_that_is_run_works(tmp_path: Path) -> None:
    assert run_script(GUARDED, tmp_path / "program.py", "-m", "program") == ("144\n", "")


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    _, stderr = run_script(SCRIPT + "kernel.run(main)\n", tmp_path / "script.py")
    assert 'must stand under `if __name__ == "__main__":`' in stderr
    assert "BrokenProcessPool" in stderr


def test_functions_of_a_command_line_cannot_be_found_and_those_of_modules_can(tmp_path: Path) -> None:
    """As in the REPL: there is no file that the worker could import as the main module."""
    source = """\
        import kernel

        def mine():
            pass

        async def main():
            try:
                await kernel.to_process.run_sync(mine)
            except AttributeError as error:
                print(error)
            print(await kernel.to_process.run_sync(pow, 2, 10))

        kernel.run(main)
        """
    source = textwrap.dedent(source)
    out, err = run_script("", tmp_path / "unused.py", "-c", source)
    assert "Can't get attribute 'mine' on <module '__main__'" in out
    assert out.endswith("1024\n")
    assert err == ""


def test_workers_end_when_this_process_is_killed(tmp_path: Path) -> None:
    """They have its standard output, so that has an end only when all are gone."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""\
            import os, time, kernel

            async def main():
                print(await kernel.to_process.run_sync(os.getpid), flush=True)
                await kernel.to_process.run_sync(time.sleep, 1000)

            if __name__ == "__main__":
                kernel.run(main)
            """)
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as program:
        assert program.stdout is not None
        assert int(program.stdout.readline()) != program.pid
        program.kill()
        assert program.stdout.read() == b""
