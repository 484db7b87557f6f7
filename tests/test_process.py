"""Processes: they run, are fed and read, and whatever happens none is left, no zombie, no descriptor, no thread.

`cancel_everywhere` runs a program again and again and cancels it at its first cancel point, its second, and so on.
After each test, tests/conftest.py looks for children that were not reaped, descriptors and threads.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import pytest

import kernel
from kernel import ClosedResourceError, Process, process, run_process
from kernel.lowlevel import FdStream, Task, Trap, current_kernel, open_process, wait_readable
from kernel.testing import wait_all_tasks_blocked
from kernel.threads import cache

PIPE, STDOUT, DEVNULL = subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL
MUCH = bytes(range(256)) * 4096  # a megabyte: more than any pipe holds
IGNORES_TERM = "trap '' TERM; echo $$; while :; do sleep 0.02; done"
"""A shell script that says its number once it does. What it starts ignores the signal too."""


@pytest.fixture(autouse=True)
def _workers_do_not_linger(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cache, "_idle", {})
    monkeypatch.setattr(cache, "IDLE_SECONDS", 0.001)
    before = set(threading.enumerate())
    yield
    send_workers_home(before)


def send_workers_home(staying: set[threading.Thread]) -> None:
    for thread in set(threading.enumerate()) - staying:
        thread.join(10)


@pytest.fixture(params=["pidfd", "thread", "thread without waitid"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the end of a process is noticed: each test that asks for this runs in each way."""
    if request.param != "pidfd":
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    if request.param == "thread without waitid":
        monkeypatch.delattr(os, "waitid")
    way: str = request.param
    return way


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL follows soon after SIGTERM."""
    monkeypatch.setattr(process, "GRACE", 0.05)


def is_running(pid: int) -> bool:
    """Whether there is such a process, zombies apart."""
    try:
        return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


async def line_from(stream: Any) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        chunk = await stream.receive_some()
        assert chunk, line
        line += chunk
    return line


async def until_gone(pid: int) -> None:
    """Wait for the end of somebody else's process; what became of it is its parent's business."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with kernel.fail_after(10):
        while is_running(pid):
            with kernel.move_on_after(0.05):
                await wait_readable(pidfd)
    os.close(pidfd)


# ---- run_process -----------------------------------------------------------------------------------


def test_a_program_runs_and_its_result_tells_how_it_ended(way: str) -> None:
    async def main() -> None:
        done = await run_process(["true"])
        assert (done.args, done.returncode, done.stdout, done.stderr) == (["true"], 0, None, None)
        done = await run_process(["sh", "-c", "exit 3"], check=False)
        assert done.returncode == 3
        done = await run_process(["sh", "-c", "kill -9 $$"], check=False)
        assert done.returncode == -9

    kernel.run(main)


def test_a_program_is_fed_and_read_at_the_same_time(way: str) -> None:
    async def main() -> None:
        done = await run_process(["cat"], stdin=MUCH, capture_stdout=True)
        assert (done.stdout, done.stderr) == (MUCH, None)
        done = await run_process(["sh", "-c", "cat >&2; echo out"], stdin=bytearray(b"in"), capture_stderr=True,
                                 capture_stdout=True)  # fmt: skip
        assert (done.stdout, done.stderr) == (b"out\n", b"in")
        done = await run_process("echo out; echo err >&2", shell=True, capture_stdout=True, stderr=STDOUT)
        assert (done.stdout, done.stderr) == (b"out\nerr\n", None)

    kernel.run(main)


def test_by_default_there_is_nothing_to_read() -> None:
    assert kernel.run(partial(run_process, ["cat"], capture_stdout=True)).stdout == b""
    stdin = kernel.run(partial(run_process, ["readlink", "/proc/self/fd/0"], capture_stdout=True)).stdout
    assert stdin == b"/dev/null\n"


def test_what_a_stream_gives_is_passed_on_as_it_comes() -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            first = await nursery.start(partial(run_process, ["sh", "-c", "echo one; cat"], stdin=PIPE, stdout=PIPE))
            second = await nursery.start(partial(run_process, ["cat"], stdin=first.stdout, stdout=PIPE))
            assert (second.stdin, second.stdio) == (None, None)
            assert await line_from(second.stdout) == b"one\n"
            await first.stdin.send_all(b"two\n")
            assert await line_from(second.stdout) == b"two\n"
            await first.stdin.aclose()
            assert await second.stdout.receive_some() == b""
            for stream in (first.stdout, second.stdout):
                await stream.aclose()

    kernel.run(main)


def test_feeding_ends_with_the_process_though_the_source_does_not(way: str) -> None:
    async def main() -> None:
        read, write = os.pipe()
        async with FdStream(read) as source:
            await run_process(["true"], stdin=source)
        os.close(write)

    kernel.run(main)


def test_an_error_of_the_source_ends_the_process_and_is_raised() -> None:
    async def main() -> None:
        read, write = os.pipe()
        source = FdStream(read)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(close_later, source)
            with pytest.raises(ClosedResourceError):
                await run_process(["cat"], stdin=source)
        os.close(write)

    async def close_later(source: FdStream) -> None:
        while not any("receive_some" in repr(frame) for task in tasks() for frame in task.iter_await_frames()):
            await kernel.sleep(0.001)
        source.close()

    kernel.run(main)


def tasks() -> list[Task]:
    """All tasks of the main nursery's tree."""
    nursery = current_kernel().main_nursery
    assert nursery is not None
    todo = [nursery]
    found: list[Task] = []
    for nursery in todo:
        for task in nursery.child_tasks:
            found.append(task)
            todo += task.child_nurseries
    return found


def test_a_program_need_not_read_what_it_is_given() -> None:
    kernel.run(partial(run_process, ["true"], stdin=MUCH))
    kernel.run(partial(run_process, ["head", "-c", "1"], stdin=MUCH, stdout=DEVNULL))


def test_a_grandchild_that_sits_on_stdin_does_not_hold_up_the_end() -> None:
    """It was started with the child's stdin and does not read. Nobody will, as the child has ended."""

    async def main() -> int:
        done = await run_process("exec 3<&0; sleep 100 <&3 >/dev/null 3<&- & echo $!", shell=True, stdin=MUCH,
                                 capture_stdout=True)  # fmt: skip
        os.kill(int(done.stdout), signal.SIGKILL)
        return int(done.stdout)

    kernel.run(main)


def test_a_failed_program_raises_with_its_output() -> None:
    async def main() -> None:
        with pytest.raises(subprocess.CalledProcessError) as caught:
            await run_process("echo out; echo err >&2; exit 5", shell=True, capture_stdout=True, capture_stderr=True)
        assert (caught.value.returncode, caught.value.stdout, caught.value.stderr) == (5, b"out\n", b"err\n")
        with pytest.raises(subprocess.CalledProcessError) as caught:  # no group around it
            await run_process(["false"])
        assert (caught.value.cmd, caught.value.stdout) == (["false"], None)

    kernel.run(main)


def test_wrong_arguments_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)

    async def main() -> None:
        for name in ("universal_newlines", "text", "encoding", "errors", "bufsize"):
            with pytest.raises(TypeError, match=name):
                await run_process(["true"], **{name: "utf-8"})
            with pytest.raises(TypeError, match=name):
                await open_process(["true"], **{name: 1})
        with pytest.raises(UnicodeError, match="bytes"):
            await run_process(["true"], stdin="text")  # type: ignore[arg-type]
        for name in ("stdin", "stdout", "stderr"):
            with pytest.raises(ValueError, match=rf"{name}=PIPE needs .*nursery\.start"):
                await run_process(["true"], **{name: PIPE})
        for name in ("stdout", "stderr"):
            with pytest.raises(ValueError, match=f"capture_{name}"):
                await run_process(["true"], **{name: DEVNULL, f"capture_{name}": True})
        for command, shell in (("ls", False), (b"ls", False), (["ls"], True)):
            with pytest.raises(TypeError, match="shell=True"):
                await run_process(command, shell=shell)
        with pytest.raises(ValueError, match="process_group"):
            await run_process(["true"], kill_tree=True, process_group=1)

    kernel.run(main)


def test_a_program_that_does_not_exist_leaves_nothing() -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            await run_process(["/does/not/exist"], capture_stdout=True, capture_stderr=True)
        with pytest.raises(FileNotFoundError):
            await open_process(["/does/not/exist"], stdin=PIPE, stdout=PIPE, stderr=PIPE)

    kernel.run(main)


def test_running_out_of_descriptors_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def pipe(original: Callable[[], tuple[int, int]] = os.pipe) -> tuple[int, int]:
        if len(made) == 4:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        made.extend(original())
        return made[-2], made[-1]

    async def main() -> None:
        await kernel.to_thread.run_sync(int)  # a thread is there already
        monkeypatch.setattr(os, "pipe", pipe)
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            await open_process(["true"], stdin=PIPE, stdout=PIPE, stderr=PIPE)

    kernel.run(main)
    assert len(made) == 4


def test_options_of_popen_are_passed_on(tmp_path: Path) -> None:
    done = kernel.run(partial(run_process, ["sh", "-c", "pwd; echo $WHO"], cwd=tmp_path, env={"WHO": "me"},
                              capture_stdout=True))  # fmt: skip
    assert done.stdout == f"{tmp_path}\nme\n".encode()


def test_a_preexec_fn_runs_in_the_child_only() -> None:
    """It makes `subprocess` fork for real, so the hooks for that run in the midst of a run."""
    done = kernel.run(partial(run_process, ["sh", "-c", "umask"], preexec_fn=partial(os.umask, 0o77),
                              capture_stdout=True))  # fmt: skip
    assert done.stdout == b"0077\n"


def test_generator_style_works() -> None:
    def main() -> Any:
        done = yield from run_process(["cat"], stdin=b"hello", capture_stdout=True)
        child = yield from open_process(["sh", "-c", "exit 7"])
        return done.stdout, (yield from child.wait())

    assert kernel.run(main) == (b"hello", 7)


def test_output_of_a_grandchild_is_waited_for_and_a_cancellation_ends_that() -> None:
    """The child has ended and was reaped. Somebody else has stdout open, and may write yet."""

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            command = "sleep 1000 & echo $! >&2"
            child = await nursery.start(
                partial(run_process, command, shell=True, capture_stdout=True, stderr=PIPE, check=False)
            )
            grandchild = int(await line_from(child.stderr))
            await child.stderr.aclose()
            assert await child.wait() == 0
            await wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 1, "run_process should wait for the output"
            nursery.cancel_scope.cancel()
        assert nursery.cancel_scope.cancelled_caught
        assert is_running(grandchild)
        os.kill(grandchild, signal.SIGKILL)

    kernel.run(main)


# ---- Process ------------------------------------------------------------------------------------------


def test_a_process_tells_about_itself(way: str) -> None:
    async def main() -> None:
        child = await open_process(["cat"], stdin=PIPE, stdout=PIPE, stderr=PIPE)
        assert child.args == ["cat"]
        assert (child.returncode, child.poll()) == (None, None)
        assert repr(child) == f"<Process ['cat']: running with PID {child.pid}>"
        assert child.stdio is not None
        assert (child.stdio.send_stream, child.stdio.receive_stream) == (child.stdin, child.stdout)
        async with child.stdio, child.stderr:
            await child.stdio.send_all(b"hello")
            assert await child.stdio.receive_some() == b"hello"
            await child.stdio.send_eof()
            assert await child.stdio.receive_some() == b""
        assert await child.wait() == 0
        assert (child.returncode, child.poll(), child._pidfd) == (0, 0, None)
        assert repr(child) == "<Process ['cat']: exited with status 0>"
        child = await open_process(["sleep", "1000"])
        assert (child.stdin, child.stdout, child.stderr, child.stdio) == (None, None, None, None)
        child.kill()
        assert await child.wait() == -9
        assert repr(child) == "<Process ['sleep', '1000']: killed by signal 9>"

    kernel.run(main)


def test_a_process_cannot_be_made_by_hand() -> None:
    with pytest.raises(TypeError, match="run_process"):
        Process(["ls"])  # type: ignore[arg-type]


def test_several_tasks_wait_and_one_of_them_is_cancelled(way: str) -> None:
    log: list[object] = []

    async def wait(child: Process, scope: kernel.CancelScope) -> None:
        with scope:
            log.append(await child.wait())

    async def main() -> None:
        child = await open_process(["cat"], stdin=PIPE)
        scopes = [kernel.CancelScope() for _ in range(3)]
        async with kernel.open_nursery() as nursery:
            for scope in scopes:
                nursery.start_soon(wait, child, scope)
            await wait_all_tasks_blocked()
            scopes[0].cancel()
            await wait_all_tasks_blocked()
            assert child.returncode is None
            await child.stdin.aclose()
        assert log == [0, 0]

    kernel.run(main)


def test_a_wait_that_is_cancelled_again_and_again_takes_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    started: list[object] = []

    def start(*args: Any, original: Callable[..., None] = cache.start_thread_soon) -> None:
        started.append(args)
        original(*args)

    monkeypatch.setattr(process, "start_thread_soon", start)

    async def main() -> None:
        child = await open_process(["cat"], stdin=PIPE)
        for _ in range(20):
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(child.wait)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        await child.stdin.aclose()
        assert await child.wait() == 0

    kernel.run(main)
    assert len(started) == 1


def test_a_run_may_end_before_a_process_that_somebody_waited_for(way: str) -> None:
    async def main() -> Process:
        child = await open_process(["cat"], stdin=PIPE)
        with kernel.CancelScope() as scope:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(child.wait)
                await wait_all_tasks_blocked()
                scope.cancel()
        return child

    child = kernel.run(main)
    child.kill()
    if way == "pidfd":
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    else:
        send_workers_home({threading.current_thread()})
    assert child.returncode == -9


@pytest.mark.parametrize("pidfd", [True, False])
def test_the_returncode_is_right_before_wait_wakes(pidfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """trio#2209: somebody looks at the return code in the very pass in which the waiting task is to wake."""
    if not pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    log: list[object] = []

    async def wait(child: Process) -> None:
        log.append(await child.wait())

    async def main() -> None:
        child = await open_process(["cat"], stdin=PIPE)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(wait, child)
            nursery.start_soon(wait, child)
            await wait_all_tasks_blocked()
            child.stdin.close()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            assert log == []
            assert child.returncode == 0
            assert child.poll() == 0
        assert log == [0, 0]

    kernel.run(main)


def test_wait_is_a_cancel_point_also_when_the_process_has_ended() -> None:
    async def main() -> None:
        child = await open_process(["true"])
        assert await child.wait() == 0
        with kernel.CancelScope() as scope:
            scope.cancel()
            with pytest.raises(kernel.Cancelled):
                await child.wait()

    kernel.run(main)


def test_signals_are_delivered(way: str) -> None:
    async def main() -> None:
        for send, number in (
            (Process.terminate, signal.SIGTERM), (Process.kill, signal.SIGKILL),
            (lambda child: child.send_signal(signal.SIGINT), signal.SIGINT),
        ):  # fmt: skip
            child = await open_process(["cat"], stdin=PIPE)
            send(child)
            assert await child.wait() == -number
            await child.stdin.aclose()

    kernel.run(main)


def test_no_signal_is_sent_to_a_number_that_may_be_a_strangers(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        child = await open_process(["true"])
        assert await child.wait() == 0
        monkeypatch.setattr(os, "kill", never)
        monkeypatch.setattr(signal, "pidfd_send_signal", never)
        for number in (0, signal.SIGTERM, signal.SIGKILL):
            child.send_signal(number)

    def never(*args: object) -> None:
        raise AssertionError(f"a signal was sent: {args}")

    kernel.run(main)


def test_a_process_that_was_reaped_behind_our_back_is_not_signalled_by_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody calls `os.waitpid(-1)`, between our looking at the return code and our sending."""

    async def main() -> None:
        child = await open_process(["true"])
        with monkeypatch.context() as patch:
            patch.setattr(subprocess.Popen, "poll", lambda self: None)
            os.waitpid(child.pid, 0)
            patch.setattr(os, "kill", None)
            child.kill()
        assert await child.wait() == 0  # nobody knows, and `subprocess` says 0

    kernel.run(main)


def test_wait_ends_when_somebody_else_reaps_the_process(way: str) -> None:
    async def main() -> None:
        child = await open_process(["cat"], stdin=PIPE)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child.wait)
            await wait_all_tasks_blocked()
            child.stdin.close()
            try:
                os.waitpid(child.pid, 0)
            except ChildProcessError:
                pass  # the thread was first
        assert child.returncode == 0

    kernel.run(main)


def test_a_signal_that_is_not_allowed_or_does_not_exist_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        child = await open_process(["cat"], stdin=PIPE)
        with pytest.raises(OSError):
            child.send_signal(1000)
        child.kill()
        await child.wait()
        await child.stdin.aclose()

    kernel.run(main)


def test_a_sandbox_without_pidfd_falls_back_to_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert kernel.run(partial(run_process, ["true"])).returncode == 0


def test_the_package_can_be_imported_where_the_system_offers_less() -> None:
    program = """
import os, signal
for module, names in ((os, "pidfd_open waitid WEXITED WNOWAIT killpg get_blocking set_blocking"),
                      (signal, "pidfd_send_signal SIGKILL")):
    for name in names.split():
        delattr(module, name)
import kernel
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    kernel.run(partial(run_process, [sys.executable, "-c", program], env=environment))


def test_many_processes_at_once_are_all_reaped(way: str) -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(run_process, ["true"])

    kernel.run(main)


def test_with_pipes_in_the_hands_of_the_program_a_full_one_does_not_hold_up_the_end(impatient: None) -> None:
    """The process is blocked in a write that nobody will read, as the reader was cancelled as well."""

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            child = await nursery.start(partial(run_process, ["yes"], stdout=PIPE))
            assert await child.stdout.receive_some(1)
            nursery.cancel_scope.cancel()
        assert child.returncode == -signal.SIGTERM
        await child.stdout.aclose()

    kernel.run(main)


# ---- how a process is made to end ---------------------------------------------------------------------


async def start_and_cancel(command: str, log: list[Any], grace: float | None = None, **options: Any) -> Process:
    """Run a shell command under `run_process` until it has said something, and cancel it."""
    async with kernel.open_nursery() as nursery:
        child: Process = await nursery.start(partial(run_process, command, shell=True, stdout=PIPE, **options))
        assert child.stdout is not None
        async with child.stdout:
            log.append((await line_from(child.stdout)).decode().strip())
            nursery.cancel_scope.cancel("enough", **({} if grace is None else {"grace": grace}))
            with kernel.CancelScope(shield=True):
                try:
                    await child.wait()
                finally:
                    log.append(child.returncode)
    return child


def test_cancelled_the_process_is_asked_to_end_and_has_ended_when_the_call_returns(way: str) -> None:
    log: list[object] = []
    kernel.run(start_and_cancel, "trap 'exit 5' TERM; echo ready; while :; do sleep 0.01; done", log)
    assert log == ["ready", 5]


def test_a_process_that_ignores_the_request_is_killed_with_a_warning(way: str, impatient: None) -> None:
    log: list[object] = []
    with pytest.warns(RuntimeWarning, match="after SIGTERM, .* got SIGKILL"):
        kernel.run(start_and_cancel, IGNORES_TERM, log)
    assert log[1:] == [-9]


def test_the_end_of_a_grace_kills_at_once() -> None:
    """`cancel(grace=...)` says how much time there is; the 5 seconds would be longer."""
    log: list[object] = []
    kernel.run(partial(start_and_cancel, IGNORES_TERM, log, grace=0.05))
    assert log[1:] == [-9]


def test_a_deliver_cancel_of_ones_own_ends_the_process_in_its_own_way() -> None:
    log: list[object] = []

    async def deliver(child: Process) -> None:
        try:
            log.append("asking")
            child.send_signal(signal.SIGINT)
            await kernel.sleep_forever()
        finally:
            log.append("no longer needed")

    command = "trap 'exit 6' INT; echo ready; while :; do sleep 0.01; done"
    kernel.run(partial(start_and_cancel, command, log, deliver_cancel=deliver))
    assert sorted(map(str, log)) == sorted(["ready", "asking", "6", "no longer needed"])


def test_a_deliver_cancel_that_returns_leaves_the_process_its_time_up_to_the_grace() -> None:
    log: list[object] = []

    async def deliver(child: Process) -> None:
        log.append("said goodbye")

    kernel.run(partial(start_and_cancel, "echo ready; exec sleep 1000", log, deliver_cancel=deliver, grace=0.05))
    assert log == ["ready", "said goodbye", -9]


def test_a_deliver_cancel_that_returns_is_not_the_end_of_the_process() -> None:
    log: list[object] = []

    async def deliver(child: Process) -> None:
        child.terminate()

    command = "trap 'sleep 0.05; exit 4' TERM; echo ready; while :; do sleep 0.01; done"
    kernel.run(partial(start_and_cancel, command, log, deliver_cancel=deliver))
    assert log == ["ready", 4]


def test_a_deliver_cancel_that_fails_does_not_leave_a_zombie() -> None:
    async def deliver(child: Process) -> None:
        raise ValueError("foo")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            scope = kernel.CancelScope()
            nursery.start_soon(cancel_later, scope)
            with scope, pytest.raises(ValueError, match="foo"):
                await run_process(["sleep", "1000"], deliver_cancel=deliver)
            with pytest.raises(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)

    async def cancel_later(scope: kernel.CancelScope) -> None:
        while not any("deliver_cancel" in frame.f_locals for task in tasks() for frame, _ in task.iter_await_frames()):
            await kernel.lowlevel.checkpoint()
        scope.cancel()

    kernel.run(main)


def test_a_deliver_cancel_that_fails_kills_the_process_and_is_heard_of() -> None:
    log: list[object] = []

    async def deliver(child: Process) -> None:
        raise ValueError("foo")

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            await start_and_cancel("echo ready; exec sleep 1000", log, deliver_cancel=deliver)
        assert caught.group_contains(ValueError, match="foo", depth=1)

    kernel.run(main)
    assert log == ["ready", -9]


def test_a_process_that_cannot_be_signalled_is_waited_for_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """trio#1209: it runs as another user."""
    log: list[object] = []

    def not_permitted(self: Process, number: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Process, "send_signal", not_permitted)
    with pytest.warns(RuntimeWarning, match="PermissionError.*Waiting for the process to end"):
        kernel.run(partial(start_and_cancel, "echo ready; sleep 0.05; exit 4", log, grace=0.01))
    assert log == ["ready", 4]


def test_warnings_as_errors_do_not_save_the_process(impatient: None) -> None:
    log: list[object] = []

    async def main() -> None:
        with warnings.catch_warnings(), pytest.raises(ExceptionGroup) as caught:
            warnings.simplefilter("error")
            await start_and_cancel(IGNORES_TERM, log)
        assert caught.group_contains(RuntimeWarning, depth=1)

    kernel.run(main)
    assert log[1:] == [-9]


def test_a_task_status_that_fails_ends_the_process() -> None:
    class Broken:
        def started(self, child: Process) -> None:
            self.child = child
            raise ValueError("nobody is interested")

    status: Any = Broken()
    with pytest.raises(ValueError, match="nobody is interested"):
        kernel.run(partial(run_process, ["sleep", "1000"], task_status=status))
    assert status.child.returncode == -signal.SIGTERM


def test_a_run_that_crashes_kills_its_processes() -> None:
    children: list[Process] = []
    grandchildren: list[int] = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            children.append(await nursery.start(run_process, ["sleep", "1000"]))
            family = partial(run_process, ["sh", "-c", "sleep 1000 & echo $!; wait"], kill_tree=True, stdout=PIPE)
            children.append(await nursery.start(family))
            async with children[1].stdout:
                grandchildren.append(int(await line_from(children[1].stdout)))
            current_kernel().call_soon(crash)  # where only the kernel itself calls
            await kernel.sleep_forever()

    def crash() -> None:
        raise ValueError("a bug")

    with pytest.raises(kernel.KernelInternalError):
        kernel.run(main)
    gc.collect()
    assert [child._popen.wait(timeout=10) for child in children] == [-9, -9]
    kernel.run(until_gone, grandchildren[0])


# ---- the whole tree -------------------------------------------------------------------------------------


def test_without_kill_tree_a_grandchild_lives_on() -> None:
    log: list[Any] = []
    kernel.run(start_and_cancel, "sleep 1000 >/dev/null & echo $!; wait", log)
    assert is_running(int(log[0]))
    os.kill(int(log[0]), signal.SIGKILL)


@pytest.mark.parametrize("session", [False, True])
def test_cancelled_the_whole_tree_ends(session: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """trio#3237: `sh -c "a & b"` is two processes more than it seems."""
    if session is False:
        monkeypatch.delattr(os, "pidfd_open")
    log: list[Any] = []
    command = "sh -c 'sleep 1000 >/dev/null & echo $!; wait'; true"
    kernel.run(partial(start_and_cancel, command, log, kill_tree=True, start_new_session=session))
    assert log[1] == -signal.SIGTERM
    assert not is_running(int(log[0]))


@pytest.mark.usefixtures("impatient")
def test_a_tree_that_ignores_the_request_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    events: list[object] = []

    def group_lives(group: int, original: Callable[[int], bool | None] = process._group_lives) -> bool | None:
        events.append(original(group))
        return bool(events[-1])

    def killpg(group: int, number: int, original: Callable[[int, int], None] = os.killpg) -> None:
        events.append(signal.Signals(number).name)
        original(group, number)

    monkeypatch.setattr(process, "_group_lives", group_lives)
    monkeypatch.setattr(os, "killpg", killpg)
    with pytest.warns(RuntimeWarning, match="after SIGTERM, .* got SIGKILL"):
        kernel.run(partial(start_and_cancel, f"sh -c {quote(IGNORES_TERM)} & wait", log, kill_tree=True))
    assert not is_running(int(log[0]))
    assert (events[0], events[-1]) == ("SIGTERM", False), "it is killed, and then waited for"
    assert "SIGKILL" in events


def test_grandchildren_have_their_time_to_end_though_the_child_has_ended() -> None:
    """The child dies of SIGTERM at once. The grandchild cleans up, and that is not cut short."""
    log: list[Any] = []

    async def main() -> None:
        read, write = os.pipe()
        grandchild = "trap 'sleep 0.1; echo cleaned >&2; exit' TERM; echo ready; while :; do sleep 0.01; done"
        await start_and_cancel(f"sh -c {quote(grandchild)} & wait", log, kill_tree=True, stderr=write)
        os.close(write)
        assert os.read(read, 100).splitlines()[-1] == b"cleaned"
        os.close(read)

    kernel.run(main)
    assert log == ["ready", -signal.SIGTERM]


def test_what_is_left_of_the_tree_ends_when_the_child_has_ended_well() -> None:
    async def main() -> None:
        with kernel.fail_after(10):
            done = await run_process("sleep 1000 & echo $!", shell=True, kill_tree=True, capture_stdout=True)
        assert done.returncode == 0
        assert not is_running(int(done.stdout))

    kernel.run(main)


def test_a_deliver_cancel_of_ones_own_deals_with_the_child_and_the_rest_is_ended_after_that() -> None:
    log: list[Any] = []

    async def deliver(child: Process) -> None:
        log.append(is_running(int(log[0])))
        child.kill()

    async def failing(child: Process) -> None:
        raise ValueError("foo")

    async def main() -> None:
        with pytest.raises(ExceptionGroup):
            await start_and_cancel("sleep 1000 & echo $!; wait", log, kill_tree=True, deliver_cancel=failing)
        assert not is_running(int(log[0]))
        log.clear()
        await start_and_cancel("sleep 1000 & echo $!; wait", log, kill_tree=True, deliver_cancel=deliver)

    kernel.run(main)
    assert log[1:] == [True, -9]
    assert not is_running(int(log[0]))


def test_the_number_of_a_group_is_kept_until_the_group_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reaping the child would free its number, which is the group's; so each signal comes before that."""
    signalled: list[tuple[int, bool]] = []

    def killpg(group: int, number: int, original: Callable[[int, int], None] = os.killpg) -> None:
        os.waitid(os.P_PID, group, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # ChildProcessError: it was reaped
        signalled.append((number, True))
        original(group, number)

    monkeypatch.setattr(os, "killpg", killpg)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            child = await nursery.start(partial(run_process, ["sh", "-c", "exit 3"], kill_tree=True, check=False))
            while not signalled:
                assert child.returncode in (None, 3)  # this must not reap it either
                await kernel.lowlevel.checkpoint()
        assert child.returncode == 3

    kernel.run(main)
    assert [number for number, _ in signalled] == [signal.SIGTERM, signal.SIGKILL]


def test_a_group_whose_leader_was_reaped_behind_our_back_is_not_signalled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be a stranger's by then."""
    monkeypatch.setattr(os, "killpg", None)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            child = await nursery.start(partial(run_process, ["cat"], stdin=PIPE, kill_tree=True))
            await wait_all_tasks_blocked()
            child.stdin.close()
            os.waitpid(child.pid, 0)
        assert child.returncode == 0

    kernel.run(main)


def test_a_system_that_does_not_list_its_processes_gives_descendants_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str = ".", original: Callable[..., list[str]] = os.listdir) -> list[str]:
        if path == "/proc":
            raise FileNotFoundError(path)
        return original(path)

    log: list[Any] = []
    monkeypatch.setattr(os, "listdir", refuse)

    async def main() -> None:
        await start_and_cancel(f"trap 'exit 0' TERM; sh -c {quote(IGNORES_TERM)} & wait", log, kill_tree=True)
        await until_gone(int(log[0]))

    kernel.run(main)
    assert log[1] == 0


def test_kill_tree_says_so_where_it_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "killpg")
    with pytest.raises(NotImplementedError, match="process groups"):
        kernel.run(partial(run_process, ["true"], kill_tree=True))


# ---- cancelling everywhere --------------------------------------------------------------------------------


class CancelAtStep(deque[Task]):
    """A ready queue that cancels a scope just before the `k`-th step: who is ready is committed by then, or queues."""

    def __init__(self, scope: kernel.CancelScope, k: int) -> None:
        super().__init__()
        self.scope, self.left = scope, k

    def popleft(self) -> Task:
        self.left -= 1
        if self.left == 0:
            self.scope.cancel()
        return super().popleft()


class CancelAtTrap(kernel.abc.Instrument):
    """Cancels a scope once the `k`-th trap was armed: somebody sleeps on it."""

    def __init__(self, scope: kernel.CancelScope, k: int) -> None:
        self.scope, self.left = scope, k

    def task_trapped(self, task: Task, trap: Trap | None) -> None:
        self.left -= 1
        if self.left == 0:
            current_kernel().call_soon(self.scope.cancel)


def cancel_everywhere(program: Callable[[], Awaitable[object]], check: Callable[[], None]) -> int:
    """Run `program` in a scope that is cancelled at its first cancel point, then its second, until it comes to its
    end before that. Call `check` after each. Returns how often it was cancelled.
    """
    cancelled = 0
    for mode in ("step", "trap"):
        for k in range(1, 1000):
            scope = kernel.CancelScope()

            async def main(scope: kernel.CancelScope = scope) -> None:
                with scope:
                    await program()

            if mode == "step":
                kernel.run(main, ready=CancelAtStep(scope, k))
            else:
                kernel.run(main, instruments=[CancelAtTrap(scope, k)])
            check()
            if not scope.cancel_called:
                break
            cancelled += 1
        else:
            raise AssertionError("the program does not come to an end")
    return cancelled


def test_the_tool_cancels_at_every_point() -> None:
    seen: set[str] = set()

    async def program() -> None:
        for place in ("first", "second", "third"):
            try:
                await kernel.sleep(0)
            except kernel.Cancelled:
                seen.add(place)
                raise

    cancel_everywhere(program, lambda: None)
    assert seen == {"first", "second", "third"}


def nothing_is_left(fds: int) -> None:
    send_workers_home({threading.current_thread()})
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert len(os.listdir("/proc/self/fd")) == fds


async def fed_and_read() -> None:
    await run_process(["cat"], stdin=b"x" * 100_000, capture_stdout=True, capture_stderr=True)


async def a_tree() -> None:
    await run_process("cat & cat; wait", shell=True, kill_tree=True, stdin=b"hello", capture_stdout=True)


async def fails() -> None:
    await run_process(["false"], check=False)


async def in_the_background() -> None:
    async with kernel.open_nursery() as nursery:
        child: Process = await nursery.start(partial(run_process, ["cat"], stdin=PIPE, stdout=PIPE))
        assert child.stdio is not None
        async with child.stdio:
            await child.stdio.send_all(b"hello")
            await child.stdio.receive_some()


async def opened() -> None:
    """With `open_process`, ending and reaping are the program's business."""
    child = await open_process(["cat"], stdin=PIPE)
    try:
        assert child.stdin is not None
        await child.stdin.aclose()
        await child.wait()
    finally:
        if child.stdin is not None:
            child.stdin.close()
        child.kill()
        with kernel.CancelScope(shield=True):
            await child.wait()


@pytest.mark.parametrize("pidfd", [True, False])
@pytest.mark.parametrize("program", [fed_and_read, a_tree, fails, in_the_background, opened])
def test_cancelled_anywhere_nothing_is_left(
    program: Callable[[], Awaitable[object]], pidfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    fds = len(os.listdir("/proc/self/fd"))
    assert cancel_everywhere(program, partial(nothing_is_left, fds)) > 5
