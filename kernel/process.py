"""Child processes: run a program, feed it, read it, and be sure that it has ended.

    done = await run_process(["git", "log"], capture_stdout=True)         # like a function call
    process = await nursery.start(run_process, ["sshd", "-D"])            # like a background task

The rule is that of nurseries: nothing outlives its block. However `run_process` is left, by return, error or
cancellation, the process has ended and was reaped, its pipes are closed, and nobody but its own descendants remains.

How a process ends:

    running ----- exits, or is killed -----> zombie ----- reaped -----> gone
            the number is taken: signals                    the number may belong to anybody:
            go to this process                              send nothing any more

Between its end and the moment at which its parent asks how it ended (`waitpid`: reaping), a process is a *zombie*: an
entry in a table with the exit status and the number. So a program that never asks fills the table; and one that asks
too early, or twice, or lets somebody else ask, may signal a stranger who has got the number since.

* The end is awaited through a *pidfd* where there is one, a descriptor that becomes readable when the process ends.
  Elsewhere a worker thread sleeps in `waitid`, which does not reap.
* Reaping is done in the kernel's thread only, when the return code is looked at: it is right at any time, not only
  after `wait` has woken up.
* Signals go through the pidfd too, which stands for this process and never for another that has its number.

To end a process is to ask (SIGTERM), wait a while, and kill (SIGKILL). That concerns one process. What it has started
itself lives on, and holds the pipes open; `kill_tree=True` puts the child and all its descendants into a process group
of their own, and ends the whole group. docs/processes.md explains all this at length.

Starting blocks until the program has been found and loaded, so it is done in a worker thread.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any, Final

from outcome import Outcome

from .abc import ReceiveStream, SendStream
from .cleanup import cleanup
from .core.errors import BrokenResourceError, ClosedResourceError, RunFinishedError
from .core.nursery import TASK_STATUS_IGNORED, Nursery, TaskStatus, _IgnoredStatus
from .core.scopes import CancelScope
from .core.task import current_kernel, current_task, here
from .core.traps import HasFileno, consume_budget, notify_closing, operation, sleep, sleep_forever, wait_readable
from .fd_stream import FdStream
from .inbox import KernelToken, current_kernel_token
from .parking import ParkingLot
from .streams import StapledStream
from .sync import Event
from .threads.cache import start_thread_soon
from .to_thread import run_sync

__all__ = ["Process", "open_process", "run_process"]

GRACE: Final = 5.0
"""Seconds between asking a process to end and killing it."""

_REFUSED: Final = ("universal_newlines", "text", "encoding", "errors", "bufsize")

Word = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Command = Word | Sequence[Word]
Redirection = int | HasFileno | None
Data = bytes | bytearray | memoryview


class Process:
    """A child process. Made by `await nursery.start(run_process, ...)` or `lowlevel.open_process(...)`, never by hand.

    Attributes:
        args: the command, as it was given.
        pid: the process's number. Once `returncode` is not None it may belong to somebody else.
        stdin: a stream into the process's standard input, if that was to be a pipe and is not fed by `run_process`.
        stdout, stderr: streams out of its standard output and error, likewise.
        stdio: `stdin` and `stdout` as one stream, if there are both.
    """

    # fmt: off
    __slots__ = (
        "_popen", "_pidfd", "_ended",             # the system's side
        "_watched", "_others", "_held",
        "stdin", "stdout", "stderr", "stdio", "__weakref__",
    )
    # fmt: on

    def __init__(
        self,
        popen: subprocess.Popen[bytes],
        stdin: SendStream | None = None,
        stdout: ReceiveStream | None = None,
        stderr: ReceiveStream | None = None,
    ) -> None:
        self._pidfd: int | None = None  # None: it was reaped, or there is none
        if not isinstance(popen, subprocess.Popen):
            raise TypeError("a Process cannot be made by hand: use run_process() or lowlevel.open_process()")
        self._popen = popen
        self._pidfd = _open_pidfd(popen.pid)
        self._watched = False  # one task waits for the end itself, and the others for that task
        self._others = ParkingLot(popen)  # not self: that would be a cycle, and streams be closed late
        self._ended: Event | None = None  # without a pidfd: what a thread will set
        self._held = False  # do not reap it yet: its number is also that of its group
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.stdio = StapledStream(stdin, stdout) if stdin is not None and stdout is not None else None

    @property
    def args(self) -> Command:
        return self._popen.args

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """How the process has ended: its exit status, or minus the number of the signal that killed it. None: it runs.

        Right at any moment, as the system is asked. Not a checkpoint.
        """
        if self._held and self._popen.returncode is None:
            return _status_of_zombie(self.pid)
        code = self._popen.poll()
        if code is not None:
            self._close_pidfd()
        return code

    def poll(self) -> int | None:
        """The same as `returncode`, under the name that it has in `subprocess`."""
        return self.returncode

    @operation
    def wait(self) -> Generator[Any, Any, int]:
        """Wait until the process has ended, and return its `returncode`. Any number of tasks may.

        Always a cancel point; a schedule point if it waits. A cancellation leaves the process as it is.
        """
        yield from consume_budget()
        while (code := self.returncode) is None:
            if self._watched:
                yield from self._others.park()
            else:
                self._watched = True
                try:
                    yield from self._wait_for_end()
                finally:
                    self._watched = False
                    self._others.unpark_all()  # it is over; or else one of them takes over
        return code

    @operation
    def _wait_for_end(self) -> Generator[Any, Any, None]:
        if self._pidfd is not None:
            with suppress(ClosedResourceError):  # somebody has looked at the return code, and reaped it
                yield from wait_readable(self._pidfd)
            return
        if self._ended is None:
            # One thread until the end, however often the wait is cancelled. It is not waited for when the run ends.
            self._ended = Event()
            deliver = partial(_tell, current_kernel_token(), self._ended)
            start_thread_soon(partial(_block_until_end, self._popen), deliver, f"waiting for process {self.pid}")
        yield from self._ended.wait()

    def send_signal(self, sig: int) -> None:
        """Send the signal `sig` to the process, and to no other; nothing happens if it has ended. Not a checkpoint.

        Raises:
            PermissionError: the process runs as another user.
            ValueError, OSError: there is no such signal.
        """
        if self.returncode is not None:
            return
        with suppress(ProcessLookupError):  # it was reaped behind our back
            if sys.platform == "linux" and self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, sig)
            elif os.name == "posix":
                os.kill(self.pid, sig)  # Popen's own way would reap it first, if it has ended meanwhile
            else:
                self._popen.send_signal(sig)

    def terminate(self) -> None:
        """Ask the process to end: SIGTERM. On Windows, the same as `kill`."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the process: SIGKILL. It cannot refuse, but it takes a moment: `wait` for it."""
        if hasattr(signal, "SIGKILL"):
            self.send_signal(signal.SIGKILL)
        else:
            self._popen.kill()

    def _close_pidfd(self) -> None:
        if self._pidfd is not None:
            pidfd, self._pidfd = self._pidfd, None
            if here.kernel is not None:
                notify_closing(pidfd)
            os.close(pidfd)

    def __del__(self) -> None:
        if self._pidfd is not None:  # nobody waits for it, or it would not be collected
            os.close(self._pidfd)

    def __repr__(self) -> str:
        code = self.returncode
        if code is None:
            state = f"running with PID {self.pid}"
        else:
            state = f"exited with status {code}" if code >= 0 else f"killed by signal {-code}"
        return f"<Process {self.args!r}: {state}>"


# ---- what the system offers -------------------------------------------------------------------------


def _open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the child `pid` has ended, if the system has such a thing."""
    if sys.platform == "linux" and hasattr(os, "pidfd_open"):
        with suppress(OSError):  # an old kernel, a sandbox, no descriptor left
            return os.pidfd_open(pid)
    return None


def _block_until_end(popen: subprocess.Popen[bytes]) -> None:
    """In a worker thread."""
    if sys.platform != "win32" and hasattr(os, "waitid"):
        with suppress(ChildProcessError):  # it was reaped meanwhile
            os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)
    else:
        popen.wait()  # this reaps it. Popen's own lock keeps that apart from our looking at the return code


def _tell(token: KernelToken, ended: Event, result: Outcome[None]) -> None:
    """In a worker thread: the process has ended."""
    with suppress(RunFinishedError):
        token.run_sync_soon(ended.set)


_PEEK: Final = getattr(os, "WEXITED", 0) | getattr(os, "WNOHANG", 0) | getattr(os, "WNOWAIT", 0)


def _status_of_zombie(pid: int) -> int | None:
    """The return code of the child `pid`, None while it runs; without reaping it."""
    try:
        info = os.waitid(os.P_PID, pid, _PEEK)
    except ChildProcessError:
        return 0  # reaped behind our back, and nobody knows how it ended. subprocess says so too
    if info is None:
        return None
    return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status


def _group_lives(group: int) -> bool | None:
    """Whether the process group has members that run, zombies apart; None if the system does not tell."""
    try:
        numbers = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return None
    for number in numbers:
        with suppress(OSError):  # it has gone since
            with open(f"/proc/{number}/stat", "rb") as file:
                # "1234 (any name) S 1 1234 ...": the state, the parent, the group
                state, _, its_group = file.read().rpartition(b")")[2].split(None, 3)[:3]
            if int(its_group) == group and state not in b"ZX":
                return True
    return False


# ---- starting -----------------------------------------------------------------------------------------


@operation
def open_process(
    command: Command,
    *,
    stdin: Redirection = None,
    stdout: Redirection = None,
    stderr: Redirection = None,
    **options: Any,
) -> Generator[Any, Any, Process]:
    """Start a program, and leave everything else to you: nobody waits for the process, or ends it. See `run_process`.

    The arguments are those of `subprocess.Popen`. `PIPE` gives the process a stream under that name. Always a cancel
    point, and then nothing was started; always a schedule point. Takes one of the threads of
    `to_thread.current_default_thread_limiter()`. Cost: 0.2 ms.

    Raises:
        OSError: there is no such program, or the system has run out of something.
        TypeError: a string is given without `shell=True`, or a sequence with it (POSIX); or `text`, `encoding`,
            `errors`, `universal_newlines` or `bufsize`: the streams are of bytes, unbuffered.
    """
    return (yield from _start(command, {"stdin": stdin, "stdout": stdout, "stderr": stderr}, options))


@operation
def _start(command: Command, redirections: dict[str, Any], options: dict[str, Any]) -> Generator[Any, Any, Process]:
    for name in _REFUSED:
        if options.get(name):
            raise TypeError(f"processes communicate by streams of bytes, unbuffered: {name}= is not supported")
    if os.name == "posix":
        is_text = isinstance(command, str | bytes)
        if is_text and not options.get("shell"):
            raise TypeError(f"without shell=True the command must be a sequence, such as ['ls', '-l'], not {command!r}")
        if not is_text and options.get("shell"):
            raise TypeError(f"with shell=True the command must be a string, not {command!r}")
    yield from consume_budget()
    ours: dict[str, FdStream] = {}
    theirs = redirections.copy()
    try:
        for name, wish in redirections.items():
            if wish == subprocess.PIPE:
                ours[name], theirs[name] = _pipe(into_child=name == "stdin")
        popen: Any = yield from run_sync(partial(subprocess.Popen, command, **theirs, **options))
    except BaseException:
        for stream in ours.values():
            stream.close()
        raise
    finally:
        for name in ours:  # the child has copies. As long as we have ours, a stream that it closes has no end
            os.close(theirs[name])
    return Process(popen, **ours)


def _pipe(*, into_child: bool) -> tuple[FdStream, int]:
    """A new pipe: our end as a stream, and the child's."""
    if os.name != "posix":
        raise NotImplementedError("pipes to processes need a POSIX system: here, use files, or a thread")
    read, write = os.pipe()
    return (FdStream(write), read) if into_child else (FdStream(read), write)


# ---- a whole life --------------------------------------------------------------------------------------


@operation
def run_process(
    command: Command,
    *,
    stdin: Data | ReceiveStream | Redirection = b"",
    capture_stdout: bool = False,
    capture_stderr: bool = False,
    check: bool = True,
    deliver_cancel: Callable[[Process], Awaitable[object]] | None = None,
    kill_tree: bool = False,
    task_status: TaskStatus[Process] | _IgnoredStatus = TASK_STATUS_IGNORED,
    **options: Any,
) -> Generator[Any, Any, subprocess.CompletedProcess[bytes]]:
    """Run a program until it has ended. With `await nursery.start(run_process, ...)` you get the `Process` meanwhile.

    Args:
        command: a sequence such as `["ls", "-l"]`; with `shell=True` a string.
        stdin: what the program reads: bytes, or a stream whose chunks are passed on while the program runs. By default
            nothing, `/dev/null`. None lets it read where this program does. Otherwise as in `subprocess.Popen`.
        capture_stdout, capture_stderr: collect what the program writes, for the result. By default it writes where
            this program does; `stdout=` and `stderr=` are as in `subprocess.Popen`.
        check: raise `CalledProcessError` if the program fails.
        deliver_cancel: an async function that makes the process end when this call is cancelled, or fails. It is
            called with the `Process`, and is cancelled itself when that has ended. By default it sends SIGTERM, and
            SIGKILL after 5 seconds. No cancellation from outside reaches it; but when the time of a `cancel(grace=...)`
            is over, the process is killed.
        kill_tree: give the process a process group of its own, and when it has ended, well or not, end all its
            descendants that are left in that group: SIGTERM, after 5 seconds SIGKILL. A cancellation, without a
            `deliver_cancel`, addresses the whole group from the start. Who has gone into another group, as daemons do,
            is not found. On other systems than Linux the 5 seconds are over when the process itself has ended.
        **options: others of `subprocess.Popen`, such as `cwd` and `env`.

    Always a cancel point, and then nothing was started; always a schedule point. However this is left, the process has
    ended and was reaped. A cancellation that comes when it has ended already does not take the result away, but for
    the output: that must first come to its end, for which all processes that hold the pipe must have closed it.

    Raises:
        subprocess.CalledProcessError: `check`, and the return code is not 0. Has the output that was captured.
        OSError, TypeError: as `open_process`.
        ValueError: `PIPE` without `nursery.start`, as nobody could get at the stream; one stream redirected twice;
            `kill_tree` in somebody else's process group.
        UnicodeError: `stdin` is text.
        Exception: what `deliver_cancel` raises; the process is killed then. What reading from a `stdin` stream raises.

    Warns with RuntimeWarning if the process had to be killed as it did not heed SIGTERM, or could not be.
    """
    if isinstance(stdin, str):
        raise UnicodeError("the process's stdin must be bytes, not str: encode it")
    for name, wish in {"stdin": stdin, **options}.items():
        if wish is subprocess.PIPE and task_status is TASK_STATUS_IGNORED:
            raise ValueError(f"{name}=PIPE needs `await nursery.start(run_process, ...)`: nobody could get at the pipe")
    if kill_tree:
        _own_group(options)
    if isinstance(stdin, Data) and not stdin:
        stdin = subprocess.DEVNULL  # as empty, and takes neither a pipe nor a task
    source = stdin if isinstance(stdin, Data | ReceiveStream) else None
    redirections: dict[str, Any] = {"stdin": subprocess.PIPE if source is not None else stdin}
    captured: dict[str, list[bytes | bytearray]] = {}
    for name, capture in (("stdout", capture_stdout), ("stderr", capture_stderr)):
        if capture and name in options:
            raise ValueError(f"{name}= and capture_{name}=True are one too many: where shall it go?")
        if capture:
            captured[name] = []
            options[name] = subprocess.PIPE
        redirections[name] = options.pop(name, None)
    process = yield from _start(command, redirections, options)
    process._held = kill_tree
    yield from _supervise(process, source, captured, deliver_cancel, task_status).__await__()
    code = process.returncode
    assert code is not None
    output = {name: b"".join(chunks) for name, chunks in captured.items()}
    if check and code:
        raise subprocess.CalledProcessError(code, process.args, output.get("stdout"), output.get("stderr"))
    return subprocess.CompletedProcess(process.args, code, output.get("stdout"), output.get("stderr"))


def _own_group(options: dict[str, Any]) -> None:
    if not (hasattr(os, "killpg") and hasattr(os, "waitid")):
        raise NotImplementedError("kill_tree=True needs a system with process groups and waitid()")
    if options.get("process_group") not in (None, 0):
        raise ValueError("kill_tree=True ends the whole group, so it must be the process's own: drop process_group=")
    if not options.get("start_new_session"):  # that makes a group as well
        options["process_group"] = 0


async def _supervise(
    process: Process,
    source: Data | ReceiveStream | None,
    captured: dict[str, list[bytes | bytearray]],
    deliver_cancel: Callable[[Process], Awaitable[object]] | None,
    task_status: TaskStatus[Process] | _IgnoredStatus,
) -> None:
    """Feed the process and read from it, until it has ended; and see to it that it does."""
    async with Nursery(current_kernel(), current_task(), bare=True) as nursery:
        try:
            feeding = CancelScope()
            if source is not None:
                nursery.start_soon(_feed, _take(process, "stdin"), source, feeding)
            for name, chunks in captured.items():
                nursery.start_soon(_collect, _take(process, name), chunks)
            task_status.started(process)
            await process.wait()
        except BaseException:
            if here.kernel is None:  # the run has crashed, and this coroutine is thrown away
                _signal_group(process, signal.SIGKILL) if process._held else process.kill()
                raise
            await _make_end(process, deliver_cancel)
            raise
        feeding.cancel("the process has ended")
        if process._held:
            await _end_tree(process)


def _take(process: Process, name: str) -> FdStream:
    """From now on the stream is ours, not the user's."""
    stream: FdStream = getattr(process, name)
    setattr(process, name, None)
    process.stdio = None
    return stream


async def _feed(stream: FdStream, source: Data | ReceiveStream, scope: CancelScope) -> None:
    with scope:
        async with stream:
            if not isinstance(source, ReceiveStream):
                await _send(stream, source)
                return
            async for chunk in source:
                if not await _send(stream, chunk):
                    return


async def _send(stream: FdStream, data: Data) -> bool:
    """Whether the process still listens. It need not: it may know enough."""
    try:
        await stream.send_all(data)
    except BrokenResourceError:
        return False
    return True


async def _collect(stream: FdStream, chunks: list[bytes | bytearray]) -> None:
    async with stream:
        async for chunk in stream:
            chunks.append(chunk)


# ---- the end ------------------------------------------------------------------------------------------------


async def _make_end(process: Process, deliver_cancel: Callable[[Process], Awaitable[object]] | None) -> None:
    """Something has gone wrong, or enough is enough: have the process end, and wait until it has."""
    failure: BaseException | None = None
    if deliver_cancel is not None or not process._held:
        try:
            with cleanup(inf):  # nothing comes through but the end of a grace
                async with Nursery(current_kernel(), current_task(), bare=True) as nursery:
                    nursery.start_soon(_deliver, process, deliver_cancel or _terminate_then_kill)
                    with CancelScope(shield=True):
                        await process.wait()
                    nursery.cancel_scope.cancel("the process has ended")
        except GeneratorExit:
            raise
        except BaseException as error:
            failure = error
    if process._held:
        await _end_tree(process)
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # it knows this frame by its traceback


async def _deliver(process: Process, deliver_cancel: Callable[[Process], Awaitable[object]]) -> None:
    """Until the process has ended, and this is cancelled. If anything else happens, the process is killed."""
    try:
        await deliver_cancel(process)
        await sleep_forever()
    finally:
        _try(process.kill)


async def _terminate_then_kill(process: Process) -> None:
    _try(process.terminate)
    await sleep(GRACE)
    _try(process.kill)
    _warn_that_ignored(process)


def _try(signalling: Callable[[], None]) -> None:
    try:
        signalling()
    except OSError as error:  # the process runs as another user, by sudo perhaps
        warnings.warn(f"{signalling} failed: {error!r}. Waiting for the process to end.", RuntimeWarning, stacklevel=2)


def _warn_that_ignored(process: Process) -> None:
    warnings.warn(
        f"{process!r} had not ended in time after SIGTERM, or what it has started had not, and got SIGKILL. (If it "
        "needs more time, or another signal, pass a deliver_cancel of your own.)",
        RuntimeWarning,
        stacklevel=2,
    )


async def _end_tree(process: Process) -> None:
    """End all that is left of the process's group, itself included.

    It is a zombie, or will be one, and is not reaped before this is done. So nobody else can have its number, which is
    the group's, and a signal that finds the group empty reaches nobody.
    """
    heeded = False
    try:
        _signal_group(process, signal.SIGTERM)
        heeded = await _group_has_ended(process)
    finally:
        _signal_group(process, signal.SIGKILL)
    await _group_has_ended(process)
    with CancelScope(shield=True):
        await process.wait()
    process._held = False
    process.poll()  # which reaps it now
    if not heeded:
        _warn_that_ignored(process)


def _signal_group(process: Process, number: int) -> None:
    with suppress(ChildProcessError, PermissionError):  # macOS: nobody is left but a zombie, which can't be signalled
        os.waitid(os.P_PID, process.pid, _PEEK)  # ChildProcessError: reaped behind our back, so it is no number of ours
        os.killpg(process.pid, number)


async def _group_has_ended(process: Process) -> bool:
    """Wait until nobody runs in the group any more, for up to `GRACE` seconds; whether that came true."""
    pause = 0.001
    with cleanup(GRACE):
        while True:
            lives = _group_lives(process.pid)
            if lives is None:
                lives = process.returncode is None
            if not lives:
                return True
            await sleep(pause)
            pause = min(2 * pause, 0.1)
    return False
