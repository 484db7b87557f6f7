"""`run` and `Kernel`: choose the drivers, put the layers around the core, run, clean up.

The only file that names core and drivers. A run is wrapped like this, from the outside in: Ctrl-C, the interpreter's
hooks for async generators, instruments, the task tree.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from outcome import Outcome

from .abc import Instrument
from .asyncgens import AsyncGenerators
from .core import loop
from .core.ports import Clock, Poller, ReadyQueue
from .core.task import current_kernel, here
from .drivers.clock import MonotonicClock
from .drivers.poller import default_poller
from .drivers.timers import SortedTimers
from .inbox import KernelToken, wind_up
from .interrupts import KeyboardInterrupts
from .tracing.deadlock import look_for_deadlock
from .tracing.instruments import Instruments

__all__ = ["Kernel", "current_clock", "current_time", "run"]

T = TypeVar("T")


class Kernel(loop.Kernel):
    """A kernel for several runs, one after the other: `with Kernel() as k: k.run(f); k.run(g)`.

    It keeps its drivers and its instruments; tasks, `RunVar`s and the token belong to one run. `kernel.run` is this for
    a single run. Each thread may have its own.

    Args:
        clock: what time it is; by default the system's monotonic clock. `kernel.testing.MockClock` brings virtual time.
        poller: how to wait for files; by default the best the system has. It is closed with the kernel.
        ready: which ready task runs next; by default a `collections.deque`: first come, first served.
        instruments: objects with hooks that are called as things happen, see `kernel.abc.Instrument`.
        restrict_keyboard_interrupt_to_checkpoints: let Ctrl-C wait for the main task's next checkpoint, always.
        detect_deadlock: raise `Deadlock` when nothing can ever happen again. See docs/deadlock.md.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        poller: Poller | None = None,
        ready: ReadyQueue | None = None,
        instruments: Sequence[Instrument] = (),
        restrict_keyboard_interrupt_to_checkpoints: bool = False,
        detect_deadlock: bool = True,
    ) -> None:
        super().__init__(
            clock=clock if clock is not None else MonotonicClock(),
            timers=SortedTimers(),
            poller=poller if poller is not None else default_poller(),
            ready=ready if ready is not None else deque(),
        )
        self.instruments = Instruments(self, instruments)
        self.interrupts = KeyboardInterrupts(only_at_checkpoints=restrict_keyboard_interrupt_to_checkpoints)
        if detect_deadlock:
            self.stuck = partial(look_for_deadlock, self)
        self._asyncgens = AsyncGenerators(self)
        self._closed = ""  # or why it cannot run any more
        _open.add(self)

    def __enter__(self) -> Kernel:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the poller. May be called twice; not while a run goes on."""
        if self.running:
            raise RuntimeError("a kernel cannot be closed while it runs; leave its `with` block after the run")
        self._closed = self._closed or "it is closed"
        _open.discard(self)
        self.poller.close()

    def run(self, async_fn: Callable[..., Awaitable[T] | Generator[Any, Any, T]], *args: Any) -> T:
        """Run `async_fn(*args)` until it, and everything it started, has ended. Returns what it returns.

        Errors are those of `kernel.run`; and RuntimeError when the kernel runs already, was closed, or broke in its
        last run.
        """
        if self.running:  # before the `with`, at whose end the run that goes on would lose its Ctrl-C
            raise RuntimeError("this kernel is running already; a kernel has one run at a time, in one thread")
        with self.interrupts:
            outcome = self._run(async_fn, args)
            try:
                result: T = outcome.unwrap()
                return result
            finally:
                del outcome  # an error knows this frame by its traceback

    def _run(self, async_fn: Callable[..., Any], args: tuple[Any, ...]) -> Outcome[Any]:
        self.start(async_fn, args)
        try:
            self.drive()
        except BaseException:
            self._closed = "its last run broke off, and has left things behind"
            raise
        finally:
            outcome = self.finish()
        try:
            assert outcome is not None
            return outcome
        finally:
            del outcome  # likewise

    def start(self, async_fn: Callable[..., Any], args: tuple[Any, ...], *, signal_wakeup: bool = True) -> None:
        """Everything that comes before the first pass. If it raises, nothing has changed."""
        if self._closed:
            raise RuntimeError(f"this kernel cannot run any more: {self._closed}. Make another one.")
        self.begin()
        self._asyncgens.install()
        try:
            self.interrupts.attach(self, wakeup=signal_wakeup)
            self.instruments.before_run()
            self.plant(async_fn, args, self._asyncgens.close_all)
        except BaseException:
            self.finish()
            raise

    def finish(self) -> Outcome[Any] | None:
        """Everything that comes after the last pass. Returns the main task's outcome, or None if the run broke off."""
        self.instruments.after_run()
        self.soon.append(partial(wind_up, self))
        trouble: BaseException | None = None
        while self.soon:  # each of them, whatever the others raise: that is promised
            try:
                self.soon.popleft()()
            except BaseException as error:
                trouble = trouble or error
        try:
            if trouble is not None:
                self.judge(trouble)
        finally:
            del trouble  # likewise
            outcome = self.end()
            self._asyncgens.restore()
            self.interrupts.detach()
        return outcome

    def _stop_the_copy(self) -> None:
        """This is not the kernel but its copy in a child process. If its task goes on, let the present step be its last
        one, and see to it that it cannot disturb anybody.
        """
        self.running = False
        self.end_pass()
        self.poll = self.judge = _in_the_copy  # type: ignore[method-assign, assignment]
        self.soon.clear()
        token: KernelToken | None = self.locals.get(KernelToken)
        if token is not None:
            token.forget()
        self.locals.clear()
        self._asyncgens.forget()
        self.interrupts.restore()


def run(
    async_fn: Callable[..., Awaitable[T] | Generator[Any, Any, T]],
    *args: Any,
    clock: Clock | None = None,
    poller: Poller | None = None,
    ready: ReadyQueue | None = None,
    instruments: Sequence[Instrument] = (),
    restrict_keyboard_interrupt_to_checkpoints: bool = False,
    detect_deadlock: bool = True,
) -> T:
    """Run `async_fn(*args)` in a new kernel until it, and everything it started, has ended. Returns what it returns.

    `async_fn` is an async function, or a generator function whose `yield from`s are all of operations of the kernel.
    For the keyword arguments see `Kernel`, which also serves several runs.

    Raises:
        BaseException: whatever `async_fn` raises.
        KeyboardInterrupt: Ctrl-C, if the program lets it pass; a plain one even if it has come through nurseries, whose
            group is its `__cause__` then. See docs/ctrl-c.md.
        Deadlock: nothing can ever happen again, and nobody asked for that.
        RuntimeError: called from inside a running kernel.
        TypeError: `async_fn` is no async function; the message says what it was and what to write.
        KernelInternalError: the kernel or a driver broke.

    Cost: 50 us for a run that does nothing, 25 on a `Kernel` that is kept.
    """
    # Before the kernel is built, so that a Ctrl-C cannot leave it half-built.
    with (
        KeyboardInterrupts(only_at_checkpoints=restrict_keyboard_interrupt_to_checkpoints) as interrupts,
        Kernel(
            clock=clock, poller=poller, ready=ready, instruments=instruments, detect_deadlock=detect_deadlock
        ) as kernel,
    ):
        kernel.interrupts = interrupts
        outcome = kernel._run(async_fn, args)
        try:
            result: T = outcome.unwrap()
            return result
        finally:
            del outcome


def current_time() -> float:
    """The time on the kernel's clock, in seconds: what deadlines are compared with. Not a checkpoint.

    Raises:
        RuntimeError: used outside the kernel.
    """
    return current_kernel("current_time()").clock.current_time()


def current_clock() -> Clock:
    """The clock of the running kernel. Raises RuntimeError when used outside one."""
    return current_kernel("current_clock()").clock


# ---- fork -----------------------------------------------------------------------------------------

_open: weakref.WeakSet[Kernel] = weakref.WeakSet()


def _after_fork() -> None:
    """In the child. The kernels go on in the parent, and share an epoll and an eventfd with their copies here, so the
    copies must neither use them nor go on. A new `kernel.run` in the child is fine.
    """
    for kernel in list(_open):
        with suppress(OSError):
            kernel.poller.close()
        kernel._closed = "this process was forked off while it was open, and only the parent may use it"
        if kernel.running:
            kernel._stop_the_copy()
    here.forked = here.kernel is not None
    here.kernel = None


def _in_the_copy(*_: object) -> NoReturn:
    raise RuntimeError(
        "this process was forked off inside kernel.run(), and its copy of the run cannot go on: that is the parent's. "
        "Leave the child with os._exit(), or start processes with the subprocess module."
    )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
