"""The inbox: how anything outside the kernel's thread gets a word in. And what a run keeps for those who serve it.

All of the kernel belongs to one thread. Others hold a token, and leave calls in the inbox:

    token.run_sync_soon(event.set)

The kernel makes the calls between two steps, in order. It is not told of each: if it is busy, it will look anyway; if
it sleeps, the first call wakes it with one write to an eventfd, and the others find it awake. So a call costs 0.8 us to
a busy kernel. Signal handlers and finalizers, which may run in the middle of anything, are welcome as well.

The call runs in no task. It may set events, send to channels, start tasks, and must not wait. What it raises is taken
for a bug: all tasks are cancelled, and the run ends with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import Context, copy_context
from functools import partial
from typing import Any, Final, Generic, TypeVar, overload

from .core.errors import CancelReason, KernelInternalError, RunFinishedError
from .core.loop import Kernel
from .core.nursery import AsyncFn, call_async
from .core.task import Task, current_kernel, here, name_of

__all__ = [
    "KernelToken",
    "RunVar",
    "current_kernel_token",
    "current_root_task",
    "in_kernel_run",
    "in_kernel_task",
    "spawn_system_task",
]

T = TypeVar("T")


class KernelToken:
    """One run's address, for other threads. Made by `current_kernel_token()`; compared by identity, hashable."""

    __slots__ = ("__weakref__", "_context", "_kernel", "_lock", "_once")

    def __init__(self, kernel: Kernel, context: Context) -> None:
        self._kernel: Kernel | None = kernel  # None: the run is over
        self._context = context
        # Between looking whether the run is over and leaving the call, it must not end. Reentrant, as a signal handler
        # may come in between too.
        self._lock = threading.RLock()
        self._once: set[tuple[Any, ...]] = set()  # the idempotent calls that wait to be made

    def run_sync_soon(self, sync_fn: Callable[..., object], *args: Any, idempotent: bool = False) -> None:
        """Have the kernel call `sync_fn(*args)` soon, between two steps. For any thread, signal handlers, `__del__`.

        Calls are made in the order in which they were left, each exactly once. The row is unbounded. With `idempotent`,
        a call that equals one that still waits (same function, same arguments, all hashable) is dropped. The function
        runs in the context in which the run began, in no task, and safe from Ctrl-C. If it raises an error, all tasks
        are cancelled, and the run ends with `KernelInternalError`. Not a checkpoint. Cost: 0.8 us, and a system call if
        the kernel sleeps.

        Raises:
            RunFinishedError: the run is over. If this is not raised, the call is made, come what may.
            TypeError: `sync_fn` is not callable; `idempotent`, and an argument is not hashable.
        """
        if not callable(sync_fn):
            raise TypeError(f"run_sync_soon() wants a function and its arguments, not {sync_fn!r}")
        call = (sync_fn, *args)
        with self._lock:
            if self._kernel is None:
                raise RunFinishedError("run_sync_soon() was called after the run had ended: nobody is there any more")
            if not idempotent:
                self._kernel.call_soon(partial(self._make, call))
            elif call not in self._once:
                # In this order: an exception out of a signal handler may come in between. A call that is made unnoted
                # may be made again. One that is noted and never made would keep out all that equal it.
                self._kernel.call_soon(partial(self._call_once, call))
                self._once.add(call)

    def _call_once(self, call: tuple[Any, ...]) -> None:
        with self._lock:  # not before it was noted
            self._once.discard(call)
        self._make(call)

    def _make(self, call: tuple[Any, ...]) -> None:
        try:
            self._context.run(*call)
        except Exception as error:
            _crash(current_kernel(), f"{name_of(call[0])}, called for run_sync_soon(), has raised {error!r}", error)

    def close(self) -> None:
        """The run is over: accept no more calls. Called by the kernel, which then makes those that were accepted."""
        with self._lock:
            self._kernel = None

    def forget(self) -> None:
        """In a process that was forked off: the run is the parent's. A thread that is not here may hold the lock."""
        self._lock = threading.RLock()
        self._kernel = None

    def __repr__(self) -> str:
        return f"<KernelToken at {id(self):#x}, {'run is over' if self._kernel is None else 'open'}>"


def _crash(kernel: Kernel, what: str, error: Exception) -> None:
    """Something that nobody waits for has failed: cancel all tasks and let the run end with that."""
    if isinstance(kernel._verdict, KernelInternalError):  # it does so already
        kernel._verdict.add_note(f"and then {what}")
        return
    verdict = KernelInternalError(what)
    verdict.__cause__ = error
    kernel._verdict = None  # a Ctrl-C, say: this is worse
    kernel.condemn(verdict, CancelReason("shutdown", reason=what))


def current_kernel_token() -> KernelToken:
    """The token of this run: the same object each time. Hand it to other threads.

    While somebody holds it, no deadlock is reported: the kernel cannot know what its holder is up to.

    Raises:
        RuntimeError: used outside the kernel.
    """
    kernel = current_kernel("current_kernel_token()")
    token: KernelToken | None = kernel.locals.get(KernelToken)
    if token is None:
        context = kernel.root_task.context if kernel.root_task is not None else copy_context()  # a run about to begin
        # In one act, as a signal handler may ask for it too, just here.
        token = kernel.locals.setdefault(KernelToken, KernelToken(kernel, context))
    return token


_ENDINGS: Final = object()


def when_run_ends(kernel: Kernel, call: Callable[[], object]) -> None:
    """Have `call` called in the kernel's thread once the last task has ended. For layers that have things to tidy."""
    kernel.locals.setdefault(_ENDINGS, []).append(call)


def wind_up(kernel: Kernel) -> None:
    """The last task has ended. Make the calls that `when_run_ends` has gathered, the last one first; then close the
    inbox.
    """
    endings = kernel.locals.get(_ENDINGS, [])
    try:
        while endings:
            endings.pop()()
    finally:
        token: KernelToken | None = kernel.locals.get(KernelToken)
        if token is not None:
            token.close()


def in_kernel_run() -> bool:
    """Whether a kernel runs in this thread: whether nurseries and events can be used here."""
    return here.kernel is not None


def in_kernel_task() -> bool:
    """Whether a task runs in this thread at this moment: whether `await` of an operation would work."""
    return here.kernel is not None and here.kernel.current is not None


def current_root_task() -> Task | None:
    """The task at the top of the tree, whose nurseries hold the system tasks and the main task. Walk down from here.

    Raises:
        RuntimeError: used outside the kernel.
    """
    return current_kernel("current_root_task()").root_task


def spawn_system_task(async_fn: AsyncFn, *args: Any, name: object = None, context: Context | None = None) -> Task:
    """Start a task that belongs to the run and not to any nursery of the program: a service for libraries.

    It is cancelled after the main task and all its children have ended. If it raises anything but `Cancelled`, the run
    ends with `KernelInternalError`. Ctrl-C never strikes it. It runs in `context`, or a copy of that in which the run
    began. May be called from `run_sync_soon`. Not a checkpoint.

    Raises:
        RuntimeError: used outside the kernel, or when the run is as good as over.
        TypeError: as `Nursery.start_soon`.
    """
    kernel = current_kernel("spawn_system_task()")
    nursery = kernel.system_nursery
    if nursery is None or nursery._state != "open":
        raise RuntimeError("spawn_system_task() was called when the run had hardly begun, or was as good as over")
    if context is None:
        assert kernel.root_task is not None
        context = kernel.root_task.context.copy()
    task = nursery._spawn(context.run(call_async, async_fn, args, "spawn_system_task"), name)
    task.context = context
    return task


class _Missing:
    def __repr__(self) -> str:
        return "<no default>"


_MISSING: Final = _Missing()


class RunVar(Generic[T]):
    """A variable that has one value per run, like a global of which each run starts afresh.

    Args:
        name: for its repr.
        default: what `get` returns before `set` was called in this run.

    Outside a kernel every method raises RuntimeError.
    """

    __slots__ = ("_default", "_name")

    def __init__(self, name: str, default: T | _Missing = _MISSING) -> None:
        self._name = name
        self._default = default

    @overload
    def get(self) -> T: ...
    @overload
    def get(self, default: T) -> T: ...

    def get(self, default: T | _Missing = _MISSING) -> T:
        """The value in this run, else `default`, else the variable's own default. LookupError if there is none."""
        value = current_kernel("RunVar.get()").locals.get(self, _MISSING)
        for candidate in (value, default, self._default):
            if not isinstance(candidate, _Missing):
                return candidate
        raise LookupError(self)

    def get_or_make(self, make: Callable[[], T]) -> T:
        """The value in this run; if there is none, `make()`, which is the value from now on. Ignores the default."""
        values = current_kernel("RunVar.get_or_make()").locals
        if self not in values:
            values[self] = make()
        value: T = values[self]
        return value

    def set(self, value: T) -> RunVarToken[T]:
        """Set the value for this run. What is returned undoes it: `reset(token)`."""
        values = current_kernel("RunVar.set()").locals
        token = RunVarToken(self, values, values.get(self, _MISSING))
        values[self] = value
        return token

    def reset(self, token: RunVarToken[T]) -> None:
        """Bring back the value from before the `set` that returned `token`.

        Raises ValueError when the token is another variable's or another run's, or was used before.
        """
        values = current_kernel("RunVar.reset()").locals
        if token._var is not self or token._values is not values:
            raise ValueError("reset() wants what set() of the same variable returned in the same run")
        if token._used:
            raise ValueError("the token was used already: each undoes one set()")
        token._used = True
        if isinstance(token._before, _Missing):
            values.pop(self, None)
        else:
            values[self] = token._before

    def __repr__(self) -> str:
        return f"<RunVar name={self._name!r}>"


class RunVarToken(Generic[T]):
    """What `RunVar.set` returns, for `RunVar.reset`."""

    __slots__ = ("_before", "_used", "_values", "_var")

    def __init__(self, var: RunVar[T], values: dict[object, Any], before: T | _Missing) -> None:
        self._var = var
        self._values = values
        self._before = before
        self._used = False
