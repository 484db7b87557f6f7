"""Traps: the one way from a task down into the kernel.

A task that must wait *yields a trap*: a small object that says what it waits for. The loop puts the task to sleep on
it (`task.trap = trap`), calls `trap.arm(kernel, task)`, and runs somebody else. From then on one of two things
happens:

* the awaited thing comes true, and whoever noticed calls `kernel.wake(task, value)` or `kernel.wake(task,
  error=...)`: the `yield` returns or raises that;
* a scope around the task is cancelled first: the loop calls `trap.abort(kernel, task)`, which takes back what `arm`
  arranged and returns True; then the `yield` raises `Cancelled`. Or it returns False, "this can no longer be taken
  back", and the task sleeps on until it is woken.

That is all a trap is. The loop knows none of the classes below, so a trap of your own, in your own module, is their
equal; docs/traps.md builds one. If `arm` raises, the task never slept and the `yield` raises that. `arm` may call
`wake` at once, if there is nothing to wait for after all. One trap is spelled without an object: a bare `yield None` is
a checkpoint, "let the others run". It is the commonest, and the loop handles it inline.

Every function here works in both worlds, `await sleep(1)` in an `async def` and `yield from sleep(1)` in a plain
generator, because it *is* a generator, marked by `operation` as fit for `await`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Generator
from math import inf, isnan
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, Protocol, TypeVar

from .errors import ClosedResourceError
from .ports import READ, WRITE, Direction
from .task import Task, current_kernel, current_task, here

if TYPE_CHECKING:
    from .loop import Kernel

P = ParamSpec("P")
T_co = TypeVar("T_co", covariant=True)


class Operation(Protocol[T_co]):
    """What a call of an operation returns: `await` it in an `async def`, `yield from` it in a generator."""

    def __await__(self) -> Generator[Any, Any, T_co]: ...

    def __iter__(self) -> Generator[Any, Any, T_co]: ...


if TYPE_CHECKING:

    def operation(function: Callable[P, Generator[Any, Any, T_co]]) -> Callable[P, Operation[T_co]]:
        """Mark a generator function as one that may be awaited too."""
        raise NotImplementedError

else:
    # The standard library's own switch: one flag on the code object, nothing is wrapped, a call costs the same.
    operation = types.coroutine


class Trap:
    """Base of the traps. It is convenient (awaitable as it stands) and not required: `arm` and `abort` are.

    Many tasks may yield the same instance, as with a lock's, if it keeps no state of a single wait.
    """

    __slots__ = ()

    def arm(self, kernel: Kernel, task: Task) -> None:
        """Arrange for `kernel.wake(task, ...)` to be called. May raise: the task then gets the error. May wake at once:
        no cancellation comes in between then, so an operation that does so starts with `checkpoint_if_cancelled()`.
        """
        raise NotImplementedError

    def abort(self, kernel: Kernel, task: Task) -> bool:
        """The task is being cancelled: take the arrangement back and return True; or False, to let it sleep on. After
        False it may be asked again.
        """
        raise NotImplementedError

    def __iter__(self) -> Generator[Any, Any, Any]:
        return (yield self)

    __await__ = __iter__


class Park(Trap):
    """Sleep until somebody calls `kernel.wake(task)`; whoever shall do so must know the task already.

    `on` is what the task waits for, to be shown in reports. One instance serves any number of tasks.
    """

    __slots__ = ("on",)

    def __init__(self, on: object) -> None:
        self.on = on

    def arm(self, kernel: Kernel, task: Task) -> None:
        pass

    def abort(self, kernel: Kernel, task: Task) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<Park on {self.on}>"


class SleepUntil(Trap):
    """Sleep until the kernel's clock reaches `deadline`. One instance, one wait: the timer is kept in it."""

    __slots__ = ("deadline", "task", "timer")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.task: Task | None = None
        self.timer: tuple[float, float, Any] | None = None

    def arm(self, kernel: Kernel, task: Task) -> None:
        self.task = task
        kernel.timers.add(self.deadline, self)

    def abort(self, kernel: Kernel, task: Task) -> bool:
        kernel.timers.remove(self)
        self.task = None  # the timers may keep this object for a while, but not the task
        return True

    def expire(self, kernel: Kernel) -> None:
        assert self.task is not None
        kernel.wake(self.task)

    def __repr__(self) -> str:
        return f"<SleepUntil {self.deadline:.3f}>"


class _Readiness(Trap):
    """What waiting to read and waiting to write have in common."""

    __slots__ = ("fd",)
    direction: ClassVar[Direction]

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def arm(self, kernel: Kernel, task: Task) -> None:
        kernel.poller.arm(self.fd, self.direction, task)

    def abort(self, kernel: Kernel, task: Task) -> bool:
        kernel.poller.disarm(self.fd, self.direction)
        return True

    def __repr__(self) -> str:
        return f"<{type(self).__name__} fd={self.fd}>"


class WaitReadable(_Readiness):
    """Sleep until `fd` has something to read, or an error or end of file to report."""

    __slots__ = ()
    direction = READ


class WaitWritable(_Readiness):
    """Sleep until `fd` has room to write, or an error to report."""

    __slots__ = ()
    direction = WRITE


class HasFileno(Protocol):
    def fileno(self) -> int: ...


FileDescriptorLike = int | HasFileno


class _Pass(Trap):
    """Go to the end of the row. Woken as soon as it is armed, and therefore beyond the reach of cancellation."""

    __slots__ = ()

    def arm(self, kernel: Kernel, task: Task) -> None:
        kernel.wake(task)

    def __repr__(self) -> str:
        return "<Pass>"


_FOREVER = Park("nothing: sleep_forever()")
_PASS = _Pass()


@operation
def checkpoint() -> Generator[Any, Any, None]:
    """Let every other ready task run once, and be cancelled if need be. Always a cancel point, always a schedule point.

    A cancellation leaves nothing behind, and is delivered even if it comes while this task queues for its turn. Cost: a
    step of the loop, 0.15 us.
    """
    yield None


@operation
def cancel_shielded_checkpoint() -> Generator[Any, Any, None]:
    """Let the others run, as `checkpoint` does, but never raise `Cancelled`. A schedule point, not a cancel point."""
    yield _PASS


@operation
def checkpoint_if_cancelled() -> Generator[Any, Any, None]:
    """A `checkpoint` if the running task is cancelled, otherwise nothing: a cancel point that is no schedule point."""
    kernel = current_kernel("checkpoint_if_cancelled()")
    if (task := kernel.current) is not None and (kernel.budget < 0 or task.scope.cancelled is not None):
        yield None


@operation
def consume_budget() -> Generator[Any, Any, None]:
    """A checkpoint that yields only when it must: what an operation calls when it did not need to block.

    Always a cancel point. A schedule point once the running step has used up its budget of operations, so that a task
    that never blocks still lets the others run. The name and the idea are tokio's (`tokio::task::coop`).
    """
    kernel = here.kernel or current_kernel("consume_budget()")
    task = kernel.current or current_task("consume_budget()")
    kernel.budget -= 1
    if kernel.budget < 0 or task.scope.cancelled is not None:
        yield None


@operation
def sleep_until(deadline: float) -> Generator[Any, Any, None]:
    """Sleep until the kernel's clock (`current_time()`) shows `deadline`, in seconds. A past one is a `checkpoint`.

    Always a cancel point and a schedule point. A cancellation leaves nothing behind.

    Raises:
        ValueError: `deadline` is NaN.
        RuntimeError: used outside the kernel.
    """
    if isnan(deadline):
        raise ValueError("deadline must not be NaN")
    kernel = here.kernel or current_kernel("sleep_until()")
    if deadline == inf:
        yield _FOREVER
    elif deadline <= kernel.clock.current_time():
        yield None
    else:
        yield SleepUntil(deadline)


@operation
def sleep(seconds: float) -> Generator[Any, Any, None]:
    """Sleep for `seconds`, a number not below 0. `sleep(0)` is a `checkpoint`.

    Always a cancel point and a schedule point. Never shorter than asked; longer by up to the poller's resolution (1 ms
    with epoll) plus the wait for its turn. A cancellation leaves nothing behind. Cost: about 1 us and a timer.

    Raises:
        ValueError: `seconds` is negative or NaN.
        RuntimeError: used outside the kernel.
    """
    kernel = here.kernel or current_kernel("sleep()")
    if 0 < seconds < inf:
        yield SleepUntil(kernel.clock.current_time() + seconds)
    elif seconds == 0:
        yield None
    elif seconds == inf:
        yield _FOREVER
    else:
        raise ValueError(f"sleep() wants a number of seconds from 0 up, not {seconds!r}")


@operation
def sleep_forever() -> Generator[Any, Any, None]:
    """Sleep until cancelled. Always a cancel point and a schedule point."""
    _ = here.kernel or current_kernel("sleep_forever()")
    yield _FOREVER


@operation
def wait_readable(fd: FileDescriptorLike) -> Generator[Any, Any, None]:
    """Wait until `fd` can be read without blocking, or has an error or end of file to show.

    `fd` is a number or an object with `fileno()`. Always a cancel point and a schedule point. A cancellation leaves
    nothing behind. The wake-up is a hint: use non-blocking mode, and be ready for `BlockingIOError`, for somebody else
    may have read first.

    Raises:
        BusyResourceError: another task waits to read this fd already.
        ClosedResourceError: the file is closed, or was closed meanwhile by somebody who called `notify_closing`.
        OSError: `EBADF`, the number is not open; `EPERM`, a regular file: always ready, so it can't be waited for.
        ValueError: a negative number.
        RuntimeError: used outside the kernel.
    """
    _ = here.kernel or current_kernel("wait_readable()")
    yield WaitReadable(_fileno(fd, "wait_readable"))


@operation
def wait_writable(fd: FileDescriptorLike) -> Generator[Any, Any, None]:
    """Wait until `fd` can be written without blocking, or has an error to show. Otherwise as `wait_readable`."""
    _ = here.kernel or current_kernel("wait_writable()")
    yield WaitWritable(_fileno(fd, "wait_writable"))


def notify_closing(fd: FileDescriptorLike) -> None:
    """Call this before closing `fd`: whoever waits on it wakes with `ClosedResourceError`. Not a checkpoint.

    Raises:
        ClosedResourceError: `fd` is closed already. Its number may belong to another file by now: it is too late.
        ValueError: a negative number.
        RuntimeError: used outside the kernel.
    """
    kernel = current_kernel("notify_closing()")
    for task in kernel.poller.forget(_fileno(fd, "notify_closing")):
        kernel.wake(task, error=ClosedResourceError("another task closed this file while it was being waited on"))


def _fileno(fd: FileDescriptorLike, caller: str) -> int:
    if isinstance(fd, int):
        if fd < 0:
            raise ValueError(f"{caller}() got {fd}, which is no file descriptor (was it read from a closed file?)")
        return fd
    number = -1 if getattr(fd, "closed", False) is True else fd.fileno()
    if number < 0:
        raise ClosedResourceError(
            f"{caller}() got {fd!r}, which is closed already"
            + (": notify_closing must come before close()" if caller == "notify_closing" else "")
        )
    return number
