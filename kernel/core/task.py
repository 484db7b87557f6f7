"""The task: a coroutine, and what the kernel must know to run it.

A task is in one of four states, all readable from two fields:

    state      trap        step
    ---------  ----------  --------------------------------------------------------------------
    ready      None        None: it yielded at a checkpoint, go on unless cancelled
                           `START`: it has not begun, and will run to its first checkpoint, cancelled or not
                           `coro.send` or `coro.throw`: it was woken, and must get `value`
                           `Cancelled`: it was interrupted, and must get one, for the reason in `value`
    running    None        None                                     (and `kernel.current is task`)
    sleeping   the trap    None
    finished   None        `outcome.Value` or `outcome.Error`: how it ended, with `value`

So `step(value)` always says what follows: resume the coroutine so, or build the outcome so. A woken task is
*committed*: it holds what it was handed, and cancellation waits for its next cancel point. A task at a checkpoint
holds nothing and can be cancelled even while it queues. That is why the two are told apart.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextvars import Context
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from outcome import Error, Outcome, Value

if TYPE_CHECKING:
    from .loop import Kernel
    from .nursery import Nursery
    from .scopes import CancelScope
    from .traps import Trap

Coro = Coroutine[Any, Any, Any] | Generator[Any, Any, Any]

START: Final[Any] = object()
"""The `step` of a task that has not begun."""


class Task:
    """One thread of control in the kernel. Made by `nursery.start_soon`, never by hand; compared by identity.

    Attributes:
        coro: the coroutine or generator.
        context: its `contextvars.Context`, a copy of the spawner's.
        parent_nursery: the nursery it runs in; None for the task at the root of the tree.
        eventual_parent_nursery: while inside `nursery.start()`, the nursery it will move to; otherwise None.
        trap: what it sleeps on, or None while it is ready, running or finished.
        custom_sleep_data: for whoever put it to sleep; the kernel never reads it.
    """

    # fmt: off
    __slots__ = (
        "coro", "send", "context", "_name",                      # set once
        "scope", "parent_nursery", "eventual_parent_nursery",    # the scopes' and nurseries': its place in the tree
        "trap", "step", "value",                                 # the loop's: see the table above
        "custom_sleep_data", "__weakref__",
    )
    # fmt: on

    def __init__(
        self, coro: Coro, context: Context, scope: CancelScope, nursery: Nursery | None, name: object = None
    ) -> None:
        self.coro = coro
        self.send: Callable[[Any], Any]  # looked up at the first step: at each one it would be 30 of 160 ns
        self.context = context
        self.scope = scope
        self.parent_nursery = nursery
        self.eventual_parent_nursery: Nursery | None = None
        self.trap: Trap | None = None
        self.step: Callable[[Any], Any] | None = START
        self.value: Any = None
        self.custom_sleep_data: Any = None
        self._name = name

    @property
    def name(self) -> str:
        """What `start_soon(..., name=)` said, or the function's qualified name. Settable."""
        return name_of(self.coro if self._name is None else self._name)

    @name.setter
    def name(self, name: str) -> None:
        self._name = name

    @property
    def outcome(self) -> Outcome[Any] | None:
        """How the task ended, as an `outcome.Value` or `outcome.Error`; None while it has not. Built when asked."""
        if self.step is Value or self.step is Error:
            return self.step(self.value)
        return None

    @property
    def child_nurseries(self) -> list[Nursery]:
        """The nurseries this task has open, outermost first. Cost: the number of scopes the task is in."""
        found: list[Nursery] = []
        scope: CancelScope | None = self.scope
        while scope is not None and scope._task is self:
            if scope.nursery is not None:
                found.append(scope.nursery)
            scope = scope._parent
        return found[::-1]

    @property
    def state(self) -> str:
        """ "ready", "running", "sleeping" or "finished"."""
        if self.trap is not None:
            return "sleeping"
        if self.step is Value or self.step is Error:
            return "finished"
        if here.kernel is not None and here.kernel.current is self:
            return "running"
        return "ready"

    def iter_await_frames(self) -> Iterator[tuple[FrameType, int]]:
        """The task's stack while it does not run, outermost first, as (frame, line number).

        Follows `await` and `yield from` through coroutines, generators and async generators, up to an object in C.
        """
        awaiting: Any = self.coro
        while awaiting is not None:
            for frame_of, next_of in (
                ("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await")
            ):  # fmt: skip
                if hasattr(awaiting, frame_of):
                    frame = getattr(awaiting, frame_of)
                    if frame is None:
                        return
                    yield frame, frame.f_lineno
                    awaiting = getattr(awaiting, next_of)
                    break
            else:
                awaiting = _behind_wrapper(awaiting)

    def __repr__(self) -> str:
        doing = f"sleeping on {self.trap!r}" if self.trap is not None else self.state
        return f"<Task {self.name!r} at {id(self):#x}, {doing}>"


def _behind_wrapper(awaiting: Any) -> Any:
    """`coro.__await__()`, `agen.__anext__()` and the like return objects without a frame that hold one that has."""
    import gc  # Only for stack dumps; the garbage collector is the one that knows what a C object refers to.

    for referent in gc.get_referents(awaiting):
        if hasattr(referent, "cr_frame") or hasattr(referent, "ag_frame"):
            return referent
    return None


def name_of(thing: object) -> str:
    """What to call a function, a coroutine, or what the user gave as a name."""
    if isinstance(thing, str):
        return thing
    while isinstance(thing, partial):
        thing = thing.func
    return getattr(thing, "__qualname__", None) or repr(thing)


class _Here(threading.local):
    """The kernel that runs in this thread. One look-up costs 25 ns, so the loop itself never asks."""

    kernel: Kernel | None = None
    forked = False


here = _Here()


def current_kernel(what: str = "this function") -> Kernel:
    """The kernel of this thread. `what` is named in the error.

    Raises:
        RuntimeError: no kernel runs here.
    """
    kernel = here.kernel
    if kernel is None:
        why = "this process was forked off inside a run, and only the parent goes on with that"
        raise RuntimeError(
            f"{what} was used outside the kernel: {why if here.forked else 'no kernel.run(...) is active'} in this "
            "thread. Move the call into the function you pass to kernel.run, or into one that it awaits."
        )
    return kernel


def current_task(what: str = "current_task()") -> Task:
    """The task that is running. `what` is named in the error.

    Raises:
        RuntimeError: called from outside any task.
    """
    task = current_kernel(what).current
    if task is None:
        raise RuntimeError(f"{what} was called from outside any task")
    return task
