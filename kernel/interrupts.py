"""Ctrl-C: a KeyboardInterrupt that strikes the program's code and never the kernel's.

The interpreter runs a signal handler between any two instructions of the main thread. A handler that raises, as
Python's own does for Ctrl-C, may therefore leave half-done whatever was running. For a program that is its own affair.
For the kernel it would be a task in no queue, or a lock with no owner. So while a run goes on in the main thread, the
handler is ours, and decides by where it interrupted:

    in the program's code             raise KeyboardInterrupt on the spot, as Python would
    in the kernel's code, or asleep   raise it in the main task, at its next checkpoint
    in a finalizer                    the same: what is raised there is printed and lost
    at the end of an `async with`     the same, or the block might be left without its `__aexit__`

Which code is whose? The handler walks the stack from the interrupted line outwards. The first of these decides:

    a function of this package      protected. But a coroutine of ours that has one of the program's inside it only
                                    hosts that one, and the walk goes on
    a function with a mark          as `enable_ki_protection` or `disable_ki_protection` says
    `__del__`, the `weakref` module protected: finalizers, and the callbacks by which weak containers are kept
    a line of `contextlib` itself   protected: the way into a context manager, and out of it
    the loop                        what it has called is a task, or protected; the kernel's own tasks are protected

All other code counts as that of whoever called it. So the standard library's, when called by a task of the program, is
the program's.

The main task at its next checkpoint: if it sleeps, its trap is aborted; if that cannot be, as in a nursery that waits
for its children, the interrupt is an error of the nursery, which cancels the children. If it runs, its budget is taken
away, so that the next operation yields, and passes of the loop are one step long until it has done so. A shield keeps
out cancellation, not Ctrl-C.

What does not work:

* A signal between `lock.acquire()` and the `try:` on the next line leaves the lock taken. That is so in any Python
  program; `restrict_keyboard_interrupt_to_checkpoints=True` is the way out, and its price is that a task that
  computes without end cannot be interrupted.
* The callback of a bare `weakref.ref`, and the `finally` of a generator that is collected, look like functions called
  by the code that they interrupt. If that is the program's, Python prints what is raised there, and it is lost.
* A signal handler of yours that runs within kernel code is taken for kernel code; and what it raises is not held back.
* If the program has installed a handler of its own for SIGINT, or runs its kernel in another thread than the main
  one, the kernel leaves Ctrl-C alone.
"""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR
from opcode import opmap
from types import CodeType, FrameType
from typing import Any, Final, Protocol, TypeVar

from .core.loop import Kernel
from .core.nursery import Nursery, _Join
from .core.task import here

__all__ = ["currently_ki_protected", "disable_ki_protection", "enable_ki_protection"]

_PROTECTED: Final = "kernel: Ctrl-C waits for a checkpoint"
_EXPOSED: Final = "kernel: Ctrl-C strikes here"
_PACKAGE: Final = __name__.partition(".")[0]
_RUN_READY: Final = Kernel.run_ready.__code__
_AWAIT_AEXIT: Final = bytes((opmap["GET_AWAITABLE"], 2))
_COROUTINE: Final = CO_COROUTINE | CO_GENERATOR | CO_ASYNC_GENERATOR


class _HasCode(Protocol):
    __code__: CodeType


F = TypeVar("F", bound=_HasCode)


def enable_ki_protection(function: F, /) -> F:
    """Decorator: while `function` runs, and what it calls, a Ctrl-C waits for the main task's next checkpoint.

    For functions, methods, generators, async functions and async generators; put it below decorators that wrap. What it
    calls may be marked otherwise: the innermost mark counts. Costs nothing when called: the mark is in the code object.
    """
    return _mark(function, _PROTECTED)


def disable_ki_protection(function: F, /) -> F:
    """Decorator: while `function` runs, a Ctrl-C is raised in it at once. For user code called by protected code."""
    return _mark(function, _EXPOSED)


def _mark(function: F, mark: str) -> F:
    """Put the mark among the constants of the code. There it survives `operation`, which replaces the code object."""
    plain = getattr(function, "__func__", function)  # of a bound method
    code = plain.__code__
    consts = tuple(const for const in code.co_consts if not _is_mark(const))
    plain.__code__ = code.replace(co_consts=(*consts, mark))
    return function


def _is_mark(const: object) -> bool:
    return type(const) is str and const in (_PROTECTED, _EXPOSED)


def currently_ki_protected() -> bool:
    """Whether the caller's code is protected: whether a Ctrl-C at this moment would wait for a checkpoint.

    True outside a kernel's run, where nobody asks. It tells of the code; whether all Ctrl-Cs wait, because `run` was
    told so, it does not tell.
    """
    return _is_protected(sys._getframe(1), here.kernel)


def _is_protected(frame: FrameType | None, kernel: Kernel | None) -> bool:
    """Whose code was interrupted: see the module's docstring."""
    if frame is not None and _is_leaving_async_with(frame):
        return True
    inside: FrameType | None = None  # what `frame` has called
    while frame is not None:
        code = frame.f_code
        if code is _RUN_READY:
            return kernel is None or inside is None or not _is_of_the_program(inside, kernel)
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] == _PACKAGE:
            if inside is None or not (code.co_flags & _COROUTINE and inside.f_code.co_flags & _COROUTINE):
                return True
        else:
            mark = next((const for const in code.co_consts if _is_mark(const)), None)
            if mark is not None:
                return bool(mark == _PROTECTED)
            if code.co_name == "__del__" or module in ("weakref", "_weakrefset"):
                return True
            if inside is None and module == "contextlib":
                return True
        inside, frame = frame, frame.f_back
    return True


def _is_of_the_program(frame: FrameType, kernel: Kernel) -> bool:
    """Whether the loop has called `frame` as a step of a task, and that is none of the kernel's own tasks."""
    task = kernel.current
    if task is None or frame is not getattr(task.coro, "cr_frame", getattr(task.coro, "gi_frame", None)):
        return False
    while task.parent_nursery is not None:
        if task.parent_nursery is kernel.main_nursery:
            return True
        task = task.parent_nursery.parent_task
    return False


def _is_leaving_async_with(frame: FrameType) -> bool:
    """Whether `frame` has called an `__aexit__` and will await what it has returned, but has not begun to.

    The interpreter looks for signals there. If one were to raise, the nursery's children, or the lock, would stay.
    """
    following = frame.f_code.co_code[frame.f_lasti + 2 :].lstrip(b"\0")  # what is zero belongs to the call
    return following.startswith(_AWAIT_AEXIT)


def claim_interrupt(kernel: Kernel) -> None:
    """For whoever raises a KeyboardInterrupt that is owed himself."""
    interrupts: KeyboardInterrupts = kernel.interrupts  # type: ignore[attr-defined]
    interrupts.claim()


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


_GONE: Final = object()


class KeyboardInterrupts:
    """The SIGINT handler around one run: `with KeyboardInterrupts(...) as interrupts:`, then `attach(kernel)`.

    From entering on, nothing inside can be broken off by a Ctrl-C but the program's own code. One that could not be
    delivered is raised on leaving, so that none gets into the next run. And if the block ends with a group that has a
    KeyboardInterrupt somewhere in it, that becomes a plain one, which an `except KeyboardInterrupt` sees.

    A signal may come between any two lines here, too. So what is noted for it is taken back *before* it is acted upon:
    one that comes in between is served by the same act, and one that comes later is noted anew.
    """

    def __init__(self, *, only_at_checkpoints: bool) -> None:
        self._only_at_checkpoints = only_at_checkpoints
        self._kernel: Kernel | None = None  # while its run goes on
        self._installed = False  # while our handler is to be the process's
        self._fd = self._previous_fd = -1
        self._owed = False  # one has come that nobody has got
        self._pressed = False  # one has come since the loop last looked
        self._stuck_on: object = None  # what the main task slept on, then, and could not be taken out of

    def __enter__(self) -> KeyboardInterrupts:
        self._owed = self._pressed = False
        if _in_main_thread() and _is_default(signal.getsignal(signal.SIGINT)):
            self._installed = True
            signal.signal(signal.SIGINT, self._handle)
        return self

    def attach(self, kernel: Kernel, *, wakeup: bool = True) -> None:
        """`kernel` is what runs from now on. With `wakeup`, let signals end its sleep: the interpreter calls their
        handlers only when it runs Python code at all.
        """
        self._kernel = kernel
        if self._owed:
            self._ask(kernel)
        signal_fd = getattr(kernel.poller, "signal_fd", None)
        if wakeup and signal_fd is not None and _in_main_thread():
            self._fd = signal_fd()
            self._previous_fd = signal.set_wakeup_fd(self._fd, warn_on_full_buffer=False)
            if self._previous_fd != -1:
                warnings.warn(
                    "somebody else in this thread, another event loop perhaps, uses signal.set_wakeup_fd, and will not "
                    "see the signals that come during this run. If that is the host of a guest run, pass "
                    "host_uses_signal_set_wakeup_fd=True.", RuntimeWarning, stacklevel=2,
                )  # fmt: skip

    def detach(self) -> None:
        """The run is over. To be called before the poller is closed; may be called twice."""
        kernel, self._kernel = self._kernel, None
        if kernel is not None:
            kernel.interrupted = None
        self._stuck_on = None
        if self._fd != -1:
            present = signal.set_wakeup_fd(self._previous_fd)
            if present != self._fd:  # somebody has set another one meanwhile
                signal.set_wakeup_fd(present)
            self._fd = -1

    def restore(self) -> None:
        """Put the previous handler back, unless somebody has put another one in our place."""
        self.detach()
        try:
            if self._installed and signal.getsignal(signal.SIGINT) == self._handle:
                signal.signal(signal.SIGINT, signal.default_int_handler)
        finally:
            self._installed = False

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        wrapped = isinstance(exc, BaseExceptionGroup) and _has_interrupt(exc)
        self.restore()
        if wrapped:
            raise KeyboardInterrupt from exc
        if self._owed and not isinstance(exc, KeyboardInterrupt):
            raise KeyboardInterrupt

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self._installed:  # the run is over; but the program had kept this handler, and has put it back
            signal.default_int_handler(signum, frame)
        if not self._only_at_checkpoints and not _is_protected(frame, self._kernel):
            raise KeyboardInterrupt
        self._owed = self._pressed = True
        if self._kernel is not None:
            self._ask(self._kernel)

    def _ask(self, kernel: Kernel) -> None:
        """Let the loop call `_deliver`, as soon as the step that runs is over, and let that be soon."""
        kernel.interrupted = self._deliver
        kernel.budget = -1
        kernel.end_pass()
        kernel.poller.wakeup()

    def claim(self) -> None:
        """Somebody is about to deliver what is owed."""
        self._owed = False
        if self._kernel is not None:
            self._kernel.interrupted = None

    def _deliver(self) -> None:
        """At the end of each pass while one is owed: raise it in the main task, if that can be done now.

        If it can't, and another Ctrl-C shows that somebody is losing patience, the loop gets that: it cancels all
        tasks. If that does not help either, the one after that ends the run on the spot.
        """
        kernel = self._kernel
        assert kernel is not None
        pressed, self._pressed = self._pressed, False
        self.claim()
        if pressed and self._stuck_on is not None and self._stuck_on is _where_main_is(kernel):
            raise KeyboardInterrupt
        if not _strike(kernel):
            self._owed = True
            kernel.interrupted = self._deliver
        self._stuck_on = _where_main_is(kernel)
        if self._owed and self._stuck_on is None:
            kernel.poller.wakeup()  # it is about to run: look again right after that, before the loop sleeps


def _is_default(handler: Any) -> bool:
    """Whether the handler is Python's own; or that of a run that is over, which does the same."""
    owner = getattr(handler, "__self__", None)
    return handler is signal.default_int_handler or (isinstance(owner, KeyboardInterrupts) and not owner._installed)


def _has_interrupt(group: BaseException) -> bool:
    """Whether there is a KeyboardInterrupt in the group. Its own `subgroup` can't look a thousand levels deep."""
    found = [group]
    for error in found:
        if isinstance(error, BaseExceptionGroup):
            found += error.exceptions
    return any(isinstance(error, KeyboardInterrupt) for error in found)


def _where_main_is(kernel: Kernel) -> object:
    """What the main task sleeps on; None if it is about to run, `_GONE` if it has ended or not even begun."""
    main = kernel.main_task
    return _GONE if main is None or main.outcome is not None else main.trap


def _strike(kernel: Kernel) -> bool:
    """Raise KeyboardInterrupt in the main task, between two steps. Whether that could be done."""
    main = kernel.main_task
    if main is None:
        return False
    error = KeyboardInterrupt()
    if isinstance(main.trap, _Join):
        nursery = main.trap.on
        assert isinstance(nursery, Nursery)
        nursery._failed(main, error)
        return True
    if main.trap is not None:
        kernel.interrupt(main, error)
    elif main.step is None:  # it queues at a checkpoint, and holds nothing that could get lost
        main.step, main.value = main.coro.throw, error
    return main.value is error
