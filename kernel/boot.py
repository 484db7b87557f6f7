"""`run`: choose the drivers, build a kernel around them, run, clean up. The only file that names core and drivers."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Generator
from typing import Any, TypeVar

from .asyncgens import AsyncGenerators
from .core.loop import Kernel
from .core.ports import Clock, Poller, ReadyQueue
from .core.task import current_kernel
from .drivers.clock import MonotonicClock
from .drivers.poller import default_poller
from .drivers.timers import SortedTimers

__all__ = ["current_clock", "current_time", "run"]

T = TypeVar("T")


def run(
    async_fn: Callable[..., Awaitable[T] | Generator[Any, Any, T]],
    *args: Any,
    clock: Clock | None = None,
    poller: Poller | None = None,
    ready: ReadyQueue | None = None,
) -> T:
    """Run `async_fn(*args)` in a new kernel until it, and everything it started, has ended. Returns what it returns.

    `async_fn` is an async function, or a generator function whose `yield from`s are all of operations of the kernel.

    Args:
        clock: what time it is; by default the system's monotonic clock. `kernel.testing.MockClock` brings virtual
            time.
        poller: how to wait for files; by default the best the system has. It is closed when the run ends.
        ready: which ready task runs next; by default a `collections.deque`: first come, first served.

    Raises:
        BaseException: whatever `async_fn` raises.
        KeyboardInterrupt: Ctrl-C. Everything was asked to leave, and has, before this is raised; a second Ctrl-C does
            not wait.
        RuntimeError: called from inside a running kernel.
        TypeError: `async_fn` is no async function; the message says what it was and what to write.
        KernelInternalError: the kernel or a driver broke.

    Cost: 20 us for a run that does nothing.
    """
    kernel = Kernel(
        clock=clock if clock is not None else MonotonicClock(),
        timers=SortedTimers(),
        poller=poller if poller is not None else default_poller(),
        ready=ready if ready is not None else deque(),
    )
    asyncgens = AsyncGenerators(kernel)
    asyncgens.install()
    try:
        outcome = kernel.run(async_fn, args, epilogue=asyncgens.close_all)
    finally:
        asyncgens.restore()
        kernel.poller.close()
    try:
        result: T = outcome.unwrap()
        return result
    finally:
        del outcome  # an error knows this frame by its traceback


def current_time() -> float:
    """The time on the kernel's clock, in seconds: what deadlines are compared with. Not a checkpoint.

    Raises:
        RuntimeError: used outside the kernel.
    """
    return current_kernel("current_time()").clock.current_time()


def current_clock() -> Clock:
    """The clock of the running kernel. Raises RuntimeError when used outside one."""
    return current_kernel("current_clock()").clock
