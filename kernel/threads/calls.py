"""One call into a worker thread, and the calls it makes back into the kernel.

    task                                   worker thread
    ----                                   -------------
    yield Call  --------- job ---------->  function(*args)
    (asleep)                                 from_thread.run(afn)
    runs afn   <--------- Message --------     (blocked)
    yield Call  --------- reply --------->     ...
    (asleep)                               return
    result     <--------- result ---------

The trap is the call. A task that waits for its thread is still there to serve it: a message wakes the task, which runs
the thread's async function itself, under its own scopes, and goes back to sleep. So whatever cancels the task cancels
what its thread does in the kernel too. A thread whose task has been cancelled away from it (`abandon_on_cancel`), or
which never had one, is served by a system task.

Everything a call refers to is let go of by whoever is done with it: the thread forgets function and arguments before it
reports, the kernel forgets the result when it has handed it over. So what a finished job has used is free at once, not
when the worker gets its next one.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future, InvalidStateError
from contextvars import ContextVar, copy_context
from inspect import CO_ITERABLE_COROUTINE
from types import CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from outcome import Error, Outcome, Value, capture

from ..core.errors import Cancelled, CancelReason, RunFinishedError, new_cancelled
from ..core.loop import _without_our_frame
from ..core.nursery import AsyncFn, call_async
from ..core.scopes import CancelScope
from ..core.task import Task, current_kernel, current_task, name_of
from ..core.traps import Trap, cancel_shielded_checkpoint, operation
from ..inbox import KernelToken, current_kernel_token, spawn_system_task, when_run_ends
from ..interrupts import claim_interrupt
from ..sync import CapacityLimiter
from .cache import hand_over

if TYPE_CHECKING:
    from ..core.loop import Kernel

T = TypeVar("T")

__all__ = ["Call", "Message", "Submission", "stands_in", "this_thread"]

PATIENCE: Final = 1.0
"""Seconds that the end of a run waits for threads, before it says which are stuck."""

_CTRL_C: Final = CancelReason("KeyboardInterrupt", reason="Ctrl-C, while the main task waited for this thread")

_log = logging.getLogger("kernel.to_thread")


class _ThisThread(threading.local):
    call: Call | None = None


this_thread = _ThisThread()
"""In a worker thread: the call it works on."""

_serving: ContextVar[tuple[Task, Call] | None] = ContextVar("_serving", default=None)
"""In a task that runs a thread's message: itself, and the call whose thread waits for that."""


class Call(Trap):
    """One call of `function` in a worker thread. Stands for the thread with its limiter, and in reports."""

    # fmt: off
    __slots__ = (
        "token", "limiter", "borrows", "abandonable", "name",   # set once. borrows: whether it has a token of its own
        "function", "args", "context",                          # the thread's; None when it has done with them
        "value", "error",                                       # the thread's until it reports
        "begun", "task", "message",                             # who sleeps on it, and what it was woken for to serve
        "cancelled", "timer",                                   # why its task should leave; when to complain
        "ident",                                                # the worker thread's, while it works
        "__weakref__",
    )
    # fmt: on

    def __init__(
        self,
        kernel: Kernel,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        limiter: CapacityLimiter,
        abandonable: bool,
        name: str | None,
    ) -> None:
        self.token: KernelToken = kernel.locals.get(KernelToken) or current_kernel_token()
        self.limiter = limiter
        self.borrows = False
        self.abandonable = abandonable
        self.name = name
        self.function: Any = function
        self.args: Any = args
        self.context: Any = copy_context()
        self.value: Any = None
        self.error: BaseException | None = None
        self.begun = False
        self.task: Task | None = None
        self.message: Message | None = None
        self.cancelled: CancelReason | None = None
        self.timer: tuple[float, float, Any] | None = None
        self.ident: int | None = None

    # ---- in the kernel's thread -------------------------------------------------------------------

    @operation
    def run(self) -> Generator[Any, Any, Any]:
        """Have it done, serve the thread meanwhile, and return the result."""
        while True:
            result = yield self
            message, self.message = self.message, None
            if message is None:
                return result
            yield from message.serve()
            message.reply()  # not before the very end: who is told may be done before we sleep again

    def arm(self, kernel: Kernel, task: Task) -> None:
        self.task = task
        if not self.begun:
            self.begun = True
            _state_of(kernel).calls[self] = None
            try:
                hand_over(self, self.name)
            except BaseException:
                self._settle(kernel)
                raise

    def abort(self, kernel: Kernel, task: Task) -> bool:
        first, self.cancelled = self.cancelled is None, task.scope.cancelled or _CTRL_C
        if self.abandonable:
            self.task = None
            return True
        if first and self.cancelled.source in ("KeyboardInterrupt", "shutdown"):
            kernel.timers.add(kernel.clock.current_time() + PATIENCE, self)  # the run shall end: if it can't, say why
        return False

    def expire(self, kernel: Kernel) -> None:
        """The run is ending, and this holds it up."""
        _log.warning("the run cannot end before %s, which cannot be interrupted", repr(self))

    def finish(self) -> None:
        """The function has returned or raised."""
        kernel = current_kernel()
        value, error = self.value, self.error
        self.value = self.error = None
        try:
            self._settle(kernel)
        except BaseException as trouble:  # a limiter of the user's: it is its task that must know
            trouble.__context__ = error
            error = trouble
        if self.cancelled is _CTRL_C and isinstance(error, KeyboardInterrupt):
            claim_interrupt(kernel)  # the function has asked `check_cancelled`
        task, self.task = self.task, None
        if task is not None:
            kernel.wake(task, value, error)

    def _settle(self, kernel: Kernel) -> None:
        """No thread works on this any more."""
        del _state_of(kernel).calls[self]
        if self.timer is not None:
            kernel.timers.remove(self)
        if self.borrows:
            self.limiter.release_on_behalf_of(self)

    # ---- in the worker thread ---------------------------------------------------------------------

    def work(self) -> None:
        this_thread.call = self
        self.ident = threading.get_ident()
        try:
            self.value = _refuse_async(self.context.run(self.function, *self.args), self.function, "to_thread.run_sync")
        except BaseException as error:
            self.error = _without_our_frame(error)
        this_thread.call = self.ident = self.context = self.function = self.args = None

    def report(self) -> None:
        try:
            self.token.run_sync_soon(self.finish)
        except RunFinishedError:
            pass  # it was abandoned, and nobody is there any more

    def check_cancelled(self) -> None:
        if self.cancelled is _CTRL_C and not self.abandonable:
            raise KeyboardInterrupt
        if self.cancelled is not None:
            raise new_cancelled(self.cancelled)

    def __repr__(self) -> str:
        function, ident = self.function, self.ident
        if function is None:
            return "<thread's call, done>"
        return f"<thread's call of {name_of(function)}{_place(ident)}>"


def _place(ident: int | None) -> str:
    frame = sys._current_frames().get(ident) if ident is not None else None
    if frame is None:
        return ""
    entry = traceback.extract_stack(frame, limit=1)[0]
    return f", now at {entry.filename}:{entry.lineno} in {entry.name}"


def _refuse_async(result: Any, function: object, how: str) -> Any:
    """Pass on what a function has returned that should be a plain one. `how` is what the user wrote.

    Raises TypeError if it was an async one: what it has returned has not run, and nobody would ever run it.
    """
    if type(result) is CoroutineType:
        result.close()  # or Python would warn as well that it was never awaited
    elif type(result) is not GeneratorType or not result.gi_code.co_flags & CO_ITERABLE_COROUTINE:
        return result
    raise TypeError(f"{how} wants a plain function, but {name_of(function)} is async. Await it in the kernel.")


class Message:
    """A call from a thread into the kernel, and the reply. The thread waits on a lock until that has come."""

    __slots__ = ("args", "caller", "context", "function", "is_async", "result", "_replied")

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], *, is_async: bool) -> None:
        self.function = function
        self.args = args
        self.is_async = is_async
        self.caller = this_thread.call
        self.context = copy_context()
        self.result: Outcome[Any] | None = None
        self._replied = threading.Lock()
        self._replied.acquire()

    # ---- in the kernel's thread -------------------------------------------------------------------

    def post(self, host: Call | None) -> None:
        """Have it served by the task that waits for `host`, or by one of the run's if there is none or it has left."""
        kernel = current_kernel()
        if not _state_of(kernel).expects(self):
            return
        if host is not None and host.task is not None:
            task, host.task = host.task, None
            host.message = self
            kernel.wake(task)
        elif not self.is_async:
            self._call()
            self.reply()
        else:
            try:
                spawn_system_task(self._serve_alone, name=name_of(self.function), context=self.context)
            except RuntimeError:
                self.fail()

    @operation
    def serve(self) -> Generator[Any, Any, None]:
        """In the task that waits for the thread: call the function, and keep what comes out of it for the reply."""
        if not self.is_async:
            self._call()
            return
        task = current_task()
        before, task.context = task.context, self.context
        try:
            yield from cancel_shielded_checkpoint()  # the next step will run in the other context
            yield from self._run()
        finally:
            task.context = before
        yield from cancel_shielded_checkpoint()  # and the one after this in its own again

    @operation
    def _serve_alone(self) -> Generator[Any, Any, None]:
        yield from self._run()
        self.reply()

    @operation
    def _run(self) -> Generator[Any, Any, None]:
        if self.caller is not None:
            _serving.set((current_task(), self.caller))
        self.result = yield from _captured(self.function, self.args)

    def _call(self) -> None:
        self.result = capture(self._call_in_its_context)

    def _call_in_its_context(self) -> Any:
        return _refuse_async(self.context.run(self.function, *self.args), self.function, "from_thread.run_sync")

    def fail(self) -> None:
        """Reply that nobody is there any more."""
        self.result = Error(RunFinishedError("the run has ended, or is ending, and takes no more calls from threads"))
        self.reply()

    def reply(self) -> None:
        _state_of(current_kernel()).expected.pop(self, None)
        self._replied.release()

    # ---- in the other thread ----------------------------------------------------------------------

    def wait(self) -> Any:
        self._replied.acquire()
        assert self.result is not None
        try:
            return self.result.unwrap()
        finally:
            self.result = None


@operation
def _captured(function: Callable[..., Any], args: tuple[Any, ...]) -> Generator[Any, Any, Outcome[Any]]:
    try:
        coro = call_async(function, args, "from_thread.run")
        return Value((yield from coro.__await__() if isinstance(coro, Coroutine) else coro))
    except GeneratorExit:  # the run has crashed, and the task is thrown away
        raise
    except BaseException as error:
        return Error(error)


class Submission(Generic[T]):
    """An async function on its way into the kernel, and the future of what becomes of it."""

    def __init__(self, async_fn: AsyncFn, args: tuple[Any, ...], token: KernelToken) -> None:
        self.future: Future[T] = Future()
        self.future.add_done_callback(self._done)
        self._async_fn = async_fn
        self._args = args
        self._token = token
        self._scope = CancelScope()
        self._context = copy_context()

    def start(self) -> None:
        """In the kernel's thread."""
        if self.future.cancelled() or not _state_of(current_kernel()).expects(self):
            return
        try:
            spawn_system_task(self._run, name=name_of(self._async_fn), context=self._context)
        except RuntimeError:
            self.fail()

    def _done(self, future: Future[T]) -> None:
        """If it is so because somebody has cancelled it, in whatever thread, cancel the task."""
        if future.cancelled():
            future.set_running_or_notify_cancel()  # tells those in `concurrent.futures.wait` too
            try:
                self._token.run_sync_soon(self._scope.cancel, "its future was cancelled")
            except RunFinishedError:
                pass

    @operation
    def _run(self) -> Generator[Any, Any, None]:
        with self._scope:
            result = yield from _captured(self._async_fn, self._args)
        if isinstance(result, Error) and isinstance(result.error, Cancelled):
            self.fail()
        else:
            self._settle(result)

    def fail(self) -> None:
        """Nobody is there any more."""
        self._settle(Error(RunFinishedError("the run has ended, and the call from a thread with it")))

    def _settle(self, result: Outcome[T]) -> None:
        _state_of(current_kernel()).expected.pop(self, None)
        try:
            if isinstance(result, Error):
                self.future.set_exception(result.error)
            else:
                self.future.set_result(result.unwrap())
        except InvalidStateError:
            pass  # cancelled in the very last moment


def stands_in(limiter: CapacityLimiter) -> bool:
    """Whether the running task serves a thread that holds a token of `limiter`. That thread does nothing meanwhile, so
    another may work in its place; if it needed a token of its own, a limiter of one would be a deadlock.
    """
    serving = _serving.get()
    return serving is not None and serving[0] is current_task() and serving[1].limiter is limiter


class _State:
    """The threads' business of one run: the calls that go on, and who in another thread expects an answer."""

    def __init__(self, kernel: Kernel) -> None:
        self.calls: dict[Call, None] = {}
        self.expected: dict[Message | Submission[Any], None] = {}
        token: KernelToken | None = kernel.locals.get(KernelToken)
        self._is_over = token is not None and token._kernel is None  # if so, this is one of the last calls in the inbox
        when_run_ends(kernel, self.wind_up)

    def expects(self, request: Message | Submission[Any]) -> bool:
        """Note that `request` must get an answer, come what may. If the run is over, it has got one: False."""
        if self._is_over:
            request.fail()
            return False
        self.expected[request] = None
        return True

    def wind_up(self) -> None:
        """The run has ended. Nobody may wait for ever for an answer; and whatever still works must be known."""
        self._is_over = True
        for request in list(self.expected):
            request.fail()
        end = time.monotonic() + PATIENCE
        kernel = current_kernel()
        while self.calls and (left := end - time.monotonic()) > 0:
            kernel.asleep = True
            if not kernel.soon:
                kernel.poller.poll(left)
            kernel.asleep = False
            while kernel.soon:
                kernel.soon.popleft()()
        if self.calls:
            warnings.warn(
                f"the run has ended, and its threads still work: {', '.join(map(repr, self.calls))}. They go on; what "
                "they return is lost.", RuntimeWarning, stacklevel=2,
            )  # fmt: skip


def _state_of(kernel: Kernel) -> _State:
    state: _State | None = kernel.locals.get(_State)
    if state is None:
        state = kernel.locals[_State] = _State(kernel)
    return state
