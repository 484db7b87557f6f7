"""Children with results: `nursery.spawn` returns a handle, which can be awaited and cancelled.

    async with open_nursery() as nursery:
        soup = nursery.spawn(boil, "soup")
        noodles = nursery.spawn(boil, "noodles")
        serve(await soup, await noodles)

The nursery here is the core's, plus what is written on top of it: `spawn`, `cancel`, and services (see services.py).

Rules:

* A handle is a view of a child, not its owner. The nursery is: it waits for the child whether anybody joins it or not,
  and a child's error cancels the nursery and arrives in its group, whether anybody has seen it or not.
* Joining gives what the child came to: its result, or its error. The error is the child's own object. If it goes on
  to the nursery by the joiner as well, it arrives there once.
* `handle.cancel()` cancels the child and nobody else: it is a scope around the child. Who joins a cancelled child gets
  `TaskCancelled`, which is an ordinary error. `Cancelled` would say that the *joiner* is to leave.
* Cancelling a joiner does not cancel the child.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from math import inf
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from outcome import Error, Outcome, Value

from .core.errors import Cancelled
from .core.nursery import AsyncFn, call_async
from .core.nursery import Nursery as CoreNursery
from .core.scopes import CancelScope
from .core.task import Task, current_kernel, current_task, here, name_of
from .core.traps import Operation, Trap, checkpoint, operation
from .services import Services, wait_for_children
from .sync import _Row

if TYPE_CHECKING:
    from .core.loop import Kernel

__all__ = ["Nursery", "TaskCancelled", "TaskHandle", "open_nursery"]

T = TypeVar("T")


class TaskCancelled(Exception):
    """Raised when joining a task that was cancelled: there is no result, and there will be none."""


class _Joiners(_Row, Trap):
    """Sleep until `task` has ended. It knows the task and not the handle, which knows it: there is no cycle."""

    __slots__ = ("owner",)

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.owner = task  # for reports: whom the joiners wait for

    def wake(self, task: Task) -> None:
        """Called when `task`, the owner, has ended."""
        for joiner in self._row:
            current_kernel().wake(joiner)
        self._row.clear()

    def __repr__(self) -> str:
        return f"<Join of {self.owner.name!r}>"


class TaskHandle(Generic[T]):
    """What `nursery.spawn()` returns: a child, to be joined or cancelled. Any number of tasks may do so.

    A handle that is kept keeps the child's result or error, but not its frames (those of an error excepted).

    Attributes:
        task: the child's `Task`.
        cancel_scope: the scope around the child. Its deadline, if you set one, is a timeout for the child.
    """

    __slots__ = ("__weakref__", "_joiners", "_traceback", "cancel_scope", "task")

    task: Task

    def __init__(self) -> None:
        self.cancel_scope = CancelScope()
        self._joiners: _Joiners | None = None  # made for the first one who has to wait
        self._traceback: TracebackType | None = None

    @property
    def done(self) -> bool:
        """Whether the child has ended, in whatever way."""
        return self.task.step is Value or self.task.step is Error

    @property
    def outcome(self) -> Outcome[T] | None:
        """How the child ended: `outcome.Value` or `outcome.Error`; None while it has not. Built when asked.

        A cancelled child has an `Error(TaskCancelled)`. One that was cancelled and ended all the same with a result, or
        with an error of its own, has that.
        """
        outcome = self.task.outcome
        if isinstance(outcome, Error) and isinstance(outcome.error, Cancelled):
            return Error(TaskCancelled(f"{self.task.name!r} was {outcome.error}"))
        if isinstance(outcome, Value) and self.cancel_scope.cancelled_caught:
            return Error(TaskCancelled(f"{self.task.name!r} was cancelled by {self.cancel_scope._why}"))
        return outcome

    def cancel(self, reason: str | None = None, *, grace: float = inf) -> None:
        """Cancel the child, and nothing else. Not a checkpoint; does nothing when the child has ended.

        A child that has not begun yet runs to its first cancel point. See `CancelScope.cancel` for `grace` and errors.
        """
        if not self.done:
            self.cancel_scope.cancel(reason, grace=grace)

    @operation
    def join(self) -> Generator[Any, Any, T]:
        """Wait until the child has ended; return its result, or raise its error. `await handle` is the same.

        Always a cancel point, and a schedule point if the child has not ended. A cancellation leaves nothing behind and
        does not cancel the child. When the child's end has woken the joiner, that is what the joiner gets.

        Raises:
            TaskCancelled: the child was cancelled, by the handle or together with a scope around it.
            RuntimeError: the child is the caller or waits for the caller to end, so that this would wait for ever; or
                it belongs to another kernel.
            BaseException: what the child failed with, in each joiner the same object.
        """
        kernel = here.kernel or current_kernel("TaskHandle.join()")
        task = self.task
        if task.step is Value or task.step is Error:
            kernel.budget -= 1
            if kernel.budget < 0 or kernel.current.scope.cancelled is not None:  # type: ignore[union-attr]
                yield from checkpoint()
        else:
            self._refuse_deadlock(kernel)
            if self._joiners is None:
                self._joiners = _Joiners(self.task)
                kernel.farewells.setdefault(self.task, []).append(self._joiners.wake)
            yield from self._joiners
        if task.step is Value and not self.cancel_scope.cancelled_caught:
            return task.value  # type: ignore[no-any-return]
        outcome = self.outcome
        assert isinstance(outcome, Error)
        error = outcome.error
        if self._traceback is None:
            self._traceback = error.__traceback__
        context = error.__context__
        try:
            raise error.with_traceback(self._traceback)  # without the frames of those who joined before
        finally:
            error.__context__ = context
            del self, task, outcome, error, context  # the traceback knows this frame: they would close a cycle

    def __await__(self) -> Generator[Any, Any, T]:
        joining = self.join()
        del self  # as in `join`
        return (yield from joining)

    __iter__ = __await__

    def _refuse_deadlock(self, kernel: Kernel) -> None:
        nursery = self.task.parent_nursery
        if nursery is None or nursery._kernel is not kernel:
            raise RuntimeError(f"{self!r} belongs to another kernel: only tasks of that one can join it")
        waiting: Task | None = kernel.current
        if waiting is self.task:
            raise RuntimeError(f"{self!r} tried to join itself, and would wait for ever")
        while waiting is not None and waiting.parent_nursery is not None:
            waiting = waiting.parent_nursery._parent()
            if waiting is self.task:
                raise RuntimeError(
                    f"{self!r} cannot be joined from inside one of its own children: it ends only when they have"
                )

    def __repr__(self) -> str:
        if not self.done:
            state = self.task.state
        elif isinstance(outcome := self.outcome, Error):
            cancelled = isinstance(outcome.error, TaskCancelled)
            state = "cancelled" if cancelled else f"failed with {type(outcome.error).__name__}"
        else:
            state = "returned"
        return f"<TaskHandle of {self.task.name!r} at {id(self):#x}, {state}>"


class Nursery(CoreNursery):
    """What `open_nursery()` returns: an async context manager and, inside the block, where children are started.

    Attributes:
        cancel_scope: the scope around the body and all children.
    """

    __slots__ = ("_services",)

    _services: Services | None  # None until the first one is started

    def spawn(
        self, async_fn: Callable[..., Awaitable[T] | Generator[Any, Any, T]], *args: Any, name: object = None
    ) -> TaskHandle[T]:
        """Start `async_fn(*args)` as a child, and return a handle to join or cancel it. Not a checkpoint.

        As `start_soon` otherwise, which costs half as much if you do not need the handle. Raises what that raises.
        """
        if self._state != "open" or here.kernel is not self._kernel:
            self._refuse(async_fn)
        handle: TaskHandle[T] = TaskHandle()
        coro = call_async(async_fn, args, "nursery.spawn")
        runner: Any = _run(handle.cancel_scope, coro)
        runner.__qualname__ = name_of(coro)  # what the task is called, unless there is a name
        handle.task = self._spawn(runner, name)
        return handle

    def cancel(self, reason: str | None = None, *, grace: float = inf) -> None:
        """Cancel the body and all children: `cancel_scope.cancel()`. Not a checkpoint; calling it again does nothing.

        Services end when the others have, and what is left of `grace` counts for them. Errors as `CancelScope.cancel`.
        """
        self.cancel_scope.cancel(reason, grace=grace)

    def start_service_soon(self, async_fn: AsyncFn, *args: Any, name: object = None) -> None:
        """Start a service: a child that lives as long as the body and the ordinary children. Not a checkpoint.

        When those have ended, the services are cancelled and waited for, the last one first. Until then, cancellation
        from outside does not reach a service. If it fails, the nursery is cancelled, as with any child.

        Raises:
            RuntimeError: as `start_soon`.
            TypeError: as `start_soon`.
        """
        self._with_services(async_fn).launch(async_fn, args, name)

    @operation
    def start_service(self, async_fn: AsyncFn, *args: Any, name: object = None) -> Generator[Any, Any, Any]:
        """Start a service and wait until it calls `task_status.started(value)`; returns `value`.

        Until then it can be cancelled together with the caller, and its errors are raised here. See `start` for both,
        and for the checkpoints and errors; and `start_service_soon` for what comes after.
        """
        return (yield from self._with_services(async_fn).bring_up(async_fn, args, name))

    def _with_services(self, async_fn: object) -> Services:
        if self._state != "open" or here.kernel is not self._kernel:
            self._refuse(async_fn)
        if self._services is None:
            self._services = Services(self)
        return self._services

    def __aexit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> Operation[bool]:
        if self._services is None or self._state != "open" or not self._kernel.running:
            return self._close(exc)
        return self._close_all(self._services, exc)

    @operation
    def _close_all(self, services: Services, exc: BaseException | None) -> Generator[Any, Any, bool]:
        """`_close` for a nursery with services: first the clients end, then these, then the errors of all come out."""
        if exc is not None:
            self._failed(self.parent_task, exc)
        yield from wait_for_children(self)
        services.begin_end()
        yield from wait_for_children(services)
        try:
            return (yield from self._close(exc))
        finally:
            self._services = None
            services.cancel_scope.__exit__(None, None, None)


@operation
def _run(scope: CancelScope, coro: Any) -> Generator[Any, Any, Any]:
    """What a spawned task runs. It must not know the handle: the traceback of an error knows this frame."""
    with scope:
        return (yield from coro)


def open_nursery() -> Nursery:
    """Make a nursery: `async with open_nursery() as nursery: ...`.

    Entering is not a checkpoint. Leaving waits for the children, and is never a cancel point itself. What the body and
    the children raised comes out as an `ExceptionGroup`, a `BaseExceptionGroup` if one of them was no `Exception`.

    Raises:
        RuntimeError: called from outside any task.
    """
    parent = current_task("open_nursery()")
    nursery = Nursery(current_kernel(), parent)
    nursery._services = None
    return nursery
