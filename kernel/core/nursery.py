"""Nurseries: where tasks live, and the block that none of them outlives.

    async with open_nursery() as nursery:
        nursery.start_soon(cook, "soup")
        nursery.start_soon(cook, "noodles")
    # here both are done

Rules:

* The block ends when its body and all its children have ended, not before.
* When the body or a child fails, the nursery's scope is cancelled: the others are asked to leave, and waited for.
* All errors arrive, in one `ExceptionGroup`, in the order they happened. `Cancelled` is filtered out of it; when
  there is nothing but `Cancelled`, one of those goes on up to the scope it belongs to.
* Waiting for the children cannot be interrupted: leaving them behind is what a nursery exists to prevent. Instead, a
  cancellation reaches the children, and the body's task sees it at its next cancel point. So a nursery never makes up
  a `Cancelled` that nobody received.
"""

from __future__ import annotations

import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import copy_context
from functools import partial
from types import AsyncGeneratorType, CoroutineType, GeneratorType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, NoReturn, Self, TypeVar

from .errors import Cancelled, CancelReason, Source, new_cancelled
from .scopes import CancelScope, outermost_inside, propagate
from .task import Coro, Task, current_kernel, current_task, here, name_of
from .traps import Operation, Park, cancel_shielded_checkpoint, operation

if TYPE_CHECKING:
    from .loop import Kernel

T = TypeVar("T")
AsyncFn = Callable[..., Awaitable[Any] | Generator[Any, Any, Any]]


class _Join(Park):
    """The body's task waits for the children. Cannot be taken back: see the rules above."""

    __slots__ = ()

    def abort(self, kernel: Kernel, task: Task) -> bool:
        return False

    def __repr__(self) -> str:
        return f"<Join of {self.on}>"


class Nursery:
    """What `open_nursery()` returns: an async context manager and, inside the block, where children are started.

    Attributes:
        cancel_scope: the scope around the body and all children.
    """

    # fmt: off
    __slots__ = (
        "cancel_scope", "_kernel",
        "_parent",                   # weak: a task keeps the error it ended with, whose traceback keeps this nursery
        "_state",                    # "new", "open", "closed" or "abandoned"
        "_children",                 # a dict, for its order: whom a cancellation reaches first must not be chance
        "_pending_starts",           # children that start() is bringing up elsewhere
        "_joining",                  # the task that sleeps on the _Join: the parent. Then there is somebody to wait for
        "_errors", "_cancelled",     # what the body and the children ended with, by id; the first Cancelled
        "_bare",                     # a lone error is raised as it is: for nurseries that the user did not open
        "__weakref__",
    )
    # fmt: on

    def __init__(self, kernel: Kernel, parent: Task, *, bare: bool = False) -> None:
        self._kernel = kernel
        self._parent = weakref.ref(parent)
        self.cancel_scope = CancelScope()
        self._bare = bare
        self._cancelled: Cancelled | None = None
        self._children: dict[Task, None] = {}
        self._errors: dict[int, tuple[BaseException, TracebackType | None]] = {}
        self._joining: Task | None = None
        self._pending_starts = 0
        self._state = "new"

    @property
    def parent_task(self) -> Task:
        """The task whose block this is."""
        parent = self._parent()
        if parent is None:
            raise RuntimeError("the nursery's block is long over, and its task is gone")
        return parent

    @property
    def child_tasks(self) -> frozenset[Task]:
        """The tasks that run in this nursery now."""
        return frozenset(self._children)

    def __repr__(self) -> str:
        parent = self._parent()
        whose = "nobody" if parent is None else repr(parent.name)
        return f"<Nursery of {whose} at {id(self):#x}, {self._state}, {len(self._children)} children>"

    def start_soon(self, async_fn: AsyncFn, *args: Any, name: object = None) -> None:
        """Start `async_fn(*args)` as a child. It takes its first step later; this is not a checkpoint. Cost: 0.5 us.

        `async_fn` is an async function, or a generator function in generator style. The child gets a copy of the
        current context (`contextvars`). In reports it is called `name`, or else by the function's qualified name.

        Raises:
            RuntimeError: the nursery is closed, or not opened yet, or belongs to another thread's kernel.
            TypeError: `async_fn` is not such a function; the message says what it was.
        """
        if self._state != "open" or here.kernel is not self._kernel:
            self._refuse(async_fn)
        # What _spawn does, spelled out: a call to it would be 4 % of spawn and join.
        task = Task(call_async(async_fn, args), copy_context(), self.cancel_scope, self, name)
        self._children[task] = None
        self._kernel.ready.append(task)

    @operation
    def start(self, async_fn: AsyncFn, *args: Any, name: object = None) -> Generator[Any, Any, Any]:
        """Start a child and wait until it calls `task_status.started(value)`; returns `value`.

        `async_fn` is called with the keyword argument `task_status`. Until it calls `started()`, it runs under the
        caller's scopes, so cancelling the caller cancels it. From then on it runs in this nursery. Always a schedule
        point; a cancel point where the child has one.

        Raises:
            RuntimeError: the child ended without calling `started()`; or as `start_soon`.
            TypeError: as `start_soon`.
            BaseException: what the child failed with before it called `started()`, as it is, not in a group.
        """
        if self._state != "open" or here.kernel is not self._kernel:
            self._refuse(async_fn)
        if not callable(async_fn):
            raise _no_async_function(async_fn, "nursery.start")
        room = Nursery(self._kernel, current_task(), bare=True)
        status: TaskStatus[Any] = TaskStatus(room, self)
        coro = call_async(partial(async_fn, task_status=status), args, "nursery.start")
        self._pending_starts += 1
        try:
            room._open()
            room._spawn(coro, name_of(name or async_fn)).eventual_parent_nursery = self
            del coro
            yield from room._close(None)
        finally:
            self._pending_starts -= 1
            self._release_parent()
        if status._called:
            return status._value
        reason = current_task().scope.cancelled
        if reason is not None:  # the child kept the cancellation to itself; the caller still sees it
            raise new_cancelled(reason)
        raise RuntimeError(f"{name_of(name or async_fn)} ended without calling task_status.started()")

    def _spawn(self, coro: Coro, name: object) -> Task:
        task = Task(coro, copy_context(), self.cancel_scope, self, name)
        self._children[task] = None
        self._kernel.ready.append(task)
        return task

    def _take_over(self, other: Nursery) -> None:
        """All children of `other` become ours, and hang with all scopes they have entered from our scope."""
        old, new = other.cancel_scope, self.cancel_scope
        moved = list(other._children)
        for task in moved:
            task.parent_nursery = self
            task.eventual_parent_nursery = None
            self._children[task] = None
            if task.scope is old:
                task.scope = new
            else:
                outermost_inside(task, old)._parent = new
        other._children.clear()
        propagate(self._kernel, moved, new, True)

    def _inherit(self, other: Nursery) -> None:
        """The task whose block `other` is has ended without leaving it: what is in there becomes ours."""
        other._state = "abandoned"
        self._errors |= other._errors
        self._take_over(other)

    def _refuse(self, async_fn: object) -> NoReturn:
        if here.kernel is not self._kernel:
            raise RuntimeError("a nursery was used outside its kernel's thread, or after its run had ended")
        if self._state == "new":
            raise RuntimeError("the nursery is not open yet: write `async with open_nursery() as nursery:`")
        raise RuntimeError(
            f"{name_of(async_fn)} cannot be started: the nursery is closed. Its block has ended; nothing outlives it. "
            "Open the nursery in a caller that lives long enough, and pass it down."
        )

    @operation
    def __aenter__(self) -> Generator[Any, Any, Self]:
        self._open()
        return self
        yield  # makes it a generator; nothing to wait for

    def __aexit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> Operation[bool]:
        return self._close(exc)

    def __enter__(self, *exc_info: object) -> NoReturn:
        raise RuntimeError("write `async with open_nursery()`, not `with open_nursery()`")

    __exit__ = __enter__  # never reached, but Python asks for it first

    def _open(self) -> None:
        if self._state != "new":
            raise RuntimeError("a nursery serves one `async with` block; call open_nursery() for each")
        self._parent = weakref.ref(current_task("a nursery"))
        self.cancel_scope.__enter__()
        self.cancel_scope.nursery = self
        self._state = "open"

    @operation
    def _close(self, exc: BaseException | None) -> Generator[Any, Any, bool]:
        """The body has ended, with `exc` or well. Wait for the children and make one exception of all that happened.

        Never a cancel point. A schedule point when there is something to wait for, or the budget is used up.
        """
        if self._state == "abandoned" or not self._kernel.running:
            return False  # its task has ended and was told; or the run has crashed, and this coroutine is thrown away
        if exc is not None:
            self._failed(self.parent_task, exc)
        if self._children or self._pending_starts:
            self._joining = self._kernel.current
            yield _Join(self)
        else:
            self._state = "closed"
            self._kernel.budget -= 1
            if self._kernel.budget < 0:
                yield from cancel_shielded_checkpoint()
        verdict = self._verdict(exc)
        try:
            if verdict is None:
                self.cancel_scope.__exit__(None, None, None)
                return False
            if self.cancel_scope.__exit__(type(verdict), verdict, verdict.__traceback__):
                return True
            if verdict is exc:
                return False
            context = verdict.__context__
            try:
                raise verdict
            finally:
                verdict.__context__ = context
                del context
        finally:
            del verdict, exc  # they refer to this frame by their tracebacks

    def _verdict(self, exc: BaseException | None) -> BaseException | None:
        """What the block ends with: the errors if there are any, else a `Cancelled` if there was one."""
        cancelled, self._cancelled = self._cancelled, None
        if not self._errors:
            return exc if isinstance(exc, Cancelled) else cancelled
        errors, self._errors = [error.with_traceback(traceback) for error, traceback in self._errors.values()], {}
        if self._bare and len(errors) == 1:
            return errors[0]
        return BaseExceptionGroup(f"in a nursery of {self.parent_task.name!r}", errors)

    def _failed(self, task: Task, error: BaseException) -> None:
        """The body or a child ended with `error`: keep it, and ask the others to leave."""
        if not isinstance(error, Cancelled):  # once, as it first came: whoever joins a task raises its error too
            self._errors.setdefault(id(error), (error, error.__traceback__))
        elif self._cancelled is None:
            self._cancelled = error
            if task.value is error:  # it goes on from here, through frames that may know the task: no cycle, please
                task.value = new_cancelled(error._why)
        if self.cancel_scope._why is None:
            source: Source = "KeyboardInterrupt" if type(error) is KeyboardInterrupt else "nursery"
            self.cancel_scope._cancel(
                CancelReason(source, task.name, id(task), f"it ended with {type(error).__name__}")
            )

    def _release_parent(self) -> None:
        """Wake the parent if it waits and nothing is left to wait for. From this moment on, nobody can come in."""
        parent = self._joining
        if parent is not None and not self._children and not self._pending_starts:
            self._joining = None
            self._state = "closed"
            self._kernel.wake(parent)


def open_nursery() -> Nursery:
    """Make a nursery: `async with open_nursery() as nursery: ...`.

    Entering is not a checkpoint. Leaving waits for the children, and is never a cancel point itself. What the body and
    the children raised comes out as an `ExceptionGroup`, a `BaseExceptionGroup` if one of them was no `Exception`.

    Raises:
        RuntimeError: called from outside any task.
    """
    parent = current_task("open_nursery()")
    return Nursery(current_kernel(), parent)


class TaskStatus(Generic[T]):
    """What a function run by `nursery.start()` gets as `task_status`."""

    __slots__ = ("_called", "_nursery", "_room", "_value")

    def __init__(self, room: Nursery, nursery: Nursery) -> None:
        self._room = room
        self._nursery = nursery
        self._called = False
        self._value: T | None = None

    def started(self, value: T | None = None) -> None:
        """Say that the task is up: `start()` returns `value`, and the task goes on in the nursery it was started for.

        Not a checkpoint. If `start()` is being cancelled already, the task stays where it is and is cancelled with it.
        Raises RuntimeError when called a second time, or after `start()` has ended.
        """
        if self._called:
            raise RuntimeError("task_status.started() was called a second time")
        if self._room._state != "open":
            raise RuntimeError("task_status.started() was called after start() had ended")
        self._called = True
        self._value = value
        if self._room.cancel_scope.cancelled is None and self._nursery._state == "open":
            self._nursery._take_over(self._room)
            self._room._release_parent()


class _IgnoredStatus(TaskStatus[Any]):
    """The default of a `task_status` parameter, for functions that are run by `start_soon` too. Does nothing."""

    def __init__(self) -> None:
        pass

    def started(self, value: object = None) -> None:
        pass

    def __repr__(self) -> str:
        return "TASK_STATUS_IGNORED"


TASK_STATUS_IGNORED: Final[TaskStatus[Any]] = _IgnoredStatus()


def call_async(async_fn: AsyncFn, args: tuple[Any, ...], how: str = "nursery.start_soon") -> Coro:
    """Call `async_fn` and return the coroutine or generator it gives. `how` is what the user wrote, for the errors."""
    try:
        coro = async_fn(*args)
    except TypeError:
        if callable(async_fn):
            raise
        raise _no_async_function(async_fn, how) from None
    if type(coro) is CoroutineType or isinstance(coro, GeneratorType | Coroutine):
        return coro
    if hasattr(coro, "__await__") and not hasattr(coro, "_asyncio_future_blocking"):
        return _await(coro)
    name = name_of(async_fn)
    if hasattr(coro, "__await__"):
        wrong = f"{name} returned {coro!r}, a future of asyncio, which only asyncio can wait for. Use our counterpart."
    elif isinstance(coro, AsyncGeneratorType):
        wrong = (
            f"{name} is an async generator: it contains `yield`. Write a function with `async for item in {name}(...)`."
        )
    else:
        wrong = f"{name} is a plain one: it has run already and returned {coro!r}. Write `async def {name}`."
    raise TypeError(f"{how} wants an async function, but {wrong}")


def _no_async_function(given: object, how: str) -> TypeError:
    if not isinstance(given, CoroutineType | GeneratorType):
        return TypeError(f"{how} wants an async function, not {given!r}")
    given.close()  # or Python would warn as well that it was never awaited
    name = given.__name__
    return TypeError(
        f"{how} wants the function, but got the result of calling it. Write {how}({name}, ...), not {how}({name}(...))."
    )


async def _await(awaitable: Any) -> Any:
    return await awaitable
