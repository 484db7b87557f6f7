"""Several calls at once: `gather` all results, the first of a `race`, results `as_completed`, `map_concurrently`.

    soup, noodles = await gather(partial(boil, "soup"), partial(boil, "noodles"))
    page = await race(partial(fetch, mirror), partial(fetch, origin))
    pages = await map_concurrently(fetch, urls, limit=10)

    async with as_completed([partial(fetch, url) for url in urls]) as pages:
        async for page in pages:
            ...

Each opens a nursery of its own, and what a nursery promises holds: nothing outlives the call. When something fails, the
others are cancelled and waited for, and the errors arrive in an `ExceptionGroup`.

A *call* is a function without arguments, async or of generator style: `partial(fetch, url)`. Coroutine objects,
`gather(fetch(url))`, are refused. They can't be called twice or late, and one that is never awaited is a leak.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Generator, Iterable
from contextlib import aclosing, nullcontext
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from outcome import Value

from .children import TaskCancelled
from .core.errors import Cancelled, CancelReason
from .core.nursery import Nursery, call_async
from .core.task import Coro, Task, current_kernel, current_task, name_of
from .core.traps import Operation, Trap, consume_budget, operation
from .parking import ParkingLot

if TYPE_CHECKING:
    from .core.loop import Kernel

__all__ = ["as_completed", "gather", "map_concurrently", "race"]

T = TypeVar("T")
S = TypeVar("S")
AsyncCall = Callable[[], Awaitable[T] | Generator[Any, Any, T]]


@operation
def gather(*calls: AsyncCall[T]) -> Generator[Any, Any, list[T]]:
    """Make all calls at once; return their results, in the order of the calls.

    Always a cancel point, before anything is called; a schedule point if there are calls. When the last call has
    returned, the results are returned, even if a cancellation came in that moment: the caller sees it at its next
    cancel point.

    Raises:
        ExceptionGroup: one or several calls failed. The others were cancelled and have ended.
        TypeError: one of `calls` is no function without arguments that can be awaited. Nothing was started.
        RuntimeError: used outside a task.

    Cost: that of `start_soon` for each call.
    """
    yield from consume_budget()
    coros = _call_all(calls, "gather")
    nursery = Nursery(current_kernel(), current_task())
    nursery._open()
    tasks = [nursery._spawn(coro, None) for coro in coros]
    yield from nursery._close(None)
    _check(nursery, "gather")
    return [task.value for task in tasks]


@operation
def race(*calls: AsyncCall[T]) -> Generator[Any, Any, T]:
    """Make all calls at once; return the first result. The others are cancelled, and have ended when this returns.

    A call that fails is out of the race. Once there is a result, the failures of the others do not matter, be they
    earlier or later; but what is no `Exception`, such as SystemExit, always does. Of two calls that return in the same
    moment one wins, and the result of the other is dropped: a result that must be closed is closed best by the call.

    Always a cancel point, before anything is called, and a schedule point. A cancellation that comes when there is a
    result already does not take it away: the caller sees it at its next cancel point.

    Raises:
        ExceptionGroup: all calls failed; their errors, in the order in which they came.
        ValueError: there are no calls.
        TypeError: as `gather`.
        RuntimeError: used outside a task.
    """
    if not calls:
        raise ValueError("race() of no calls: nobody could win it")
    yield from consume_budget()
    coros = _call_all(calls, "race")
    nursery = Nursery(current_kernel(), current_task())
    results: list[T] = []
    errors: list[Exception] = []

    @operation
    def run(coro: Any) -> Generator[Any, Any, None]:
        try:
            result = yield from coro
        except Exception as error:
            errors.append(error)
        except Cancelled:
            if not results:
                raise
        else:
            results.append(result)
            nursery.cancel_scope._cancel(CancelReason("explicit", reason="another call has won the race"))

    nursery._open()
    for call, coro in zip(calls, coros, strict=True):
        runner: Any = run(coro)
        nursery._spawn(runner, name_of(call))
    try:
        yield from nursery._close(None)
        if results:
            return results[0]
        _check(nursery, "race")
        raise ExceptionGroup(f"all {len(calls)} calls of race() failed", errors)
    finally:
        errors.clear()  # their tracebacks know the frames of `run`, which know this list


class _Completions(Trap, Generic[T]):
    """What `as_completed` returns: an async context manager and, inside the block, an async iterator.

    It is the trap, too, on which the block's task sleeps until there is a result.
    """

    def __init__(self, calls: Iterable[AsyncCall[T]]) -> None:
        self._calls: tuple[AsyncCall[T], ...] | None = tuple(calls)
        self._results: deque[T] = deque()
        self._nursery: Nursery | None = None
        self._waiter: Task | None = None

    @operation
    def __aenter__(self) -> Generator[Any, Any, _Completions[T]]:
        calls, self._calls = self._calls, None
        if calls is None:
            raise RuntimeError("as_completed() serves one `async with` block; call it for each")
        yield from consume_budget()
        coros = _call_all(calls, "as_completed")
        kernel = current_kernel()
        self._nursery = Nursery(kernel, current_task())
        self._nursery._open()
        for coro in coros:
            kernel.farewells[self._nursery._spawn(coro, None)] = [self._ended]
        return self

    def __aexit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> Operation[bool]:
        nursery, self._nursery = self._nursery, None
        assert nursery is not None
        if exc is None and nursery._children:
            nursery.cancel_scope._cancel(CancelReason("explicit", reason="the as_completed() block was left"))
        return nursery._close(exc)

    def __aiter__(self) -> _Completions[T]:
        return self

    @operation
    def __anext__(self) -> Generator[Any, Any, T]:
        """The next result. Always a cancel point, a schedule point if there is none yet. A cancellation takes none."""
        nursery = self._nursery
        if nursery is None or current_task() is not nursery.parent_task:
            raise RuntimeError("write `async with as_completed(...) as results:`, and iterate there, in that task")
        yield from consume_budget()
        if self._results:
            return self._results.popleft()
        if not nursery._children:
            raise StopAsyncIteration
        result: T = yield from self
        return result

    def _ended(self, task: Task) -> None:
        """A call has ended. If it failed, the nursery sees to that."""
        if task.step is not Value:
            return
        if self._waiter is None:
            self._results.append(task.value)
        else:
            waiter, self._waiter = self._waiter, None
            current_kernel().wake(waiter, task.value)

    def arm(self, kernel: Kernel, task: Task) -> None:
        self._waiter = task

    def abort(self, kernel: Kernel, task: Task) -> bool:
        self._waiter = None
        return True

    def __repr__(self) -> str:
        return f"<as_completed at {id(self):#x}, {len(self._results)} results>"


def as_completed(calls: Iterable[AsyncCall[T]]) -> _Completions[T]:
    """Make all calls at once; `async with as_completed(calls) as results: async for result in results: ...`

    The results come in the order in which the calls return. Leaving the block early, by `break`, `return` or an error,
    cancels the calls that still run, and waits for them. Entering is a cancel point, leaving is not; each step of the
    loop is one, and a schedule point if there is no result yet.

    It is no bare iterator, as a loop that is left early would have no way to say so, and the calls would run on.

    Raises:
        ExceptionGroup: leaving; one or several calls failed, or the body did. The others were cancelled.
        TypeError: entering; as `gather`.
        RuntimeError: iterated outside the block or by another task, or entered a second time.
    """
    return _Completions(calls)


@operation
def map_concurrently(
    fn: Callable[[S], Awaitable[T] | Generator[Any, Any, T]],
    items: Iterable[S] | AsyncIterable[S],
    *,
    limit: int | None = None,
) -> Generator[Any, Any, list[T]]:
    """Call `fn(item)` for each of `items`, up to `limit` at once; return the results, in the order of the items.

    Each call is a task. `items` may be lazy: the next item is asked for when there is room for it. It may be an async
    iterable too; an async generator is closed at the end, should it not be exhausted.

    Always a cancel point, before the first item is asked for; a schedule point if there are items.

    Raises:
        ExceptionGroup: one or several calls, or the iteration, failed. The others were cancelled and have ended.
        ValueError: `limit` is below 1.
        TypeError: `limit` is no whole number; or in the group, `fn` is no async function.
        RuntimeError: used outside a task.
    """
    if limit is not None and not isinstance(limit, int):
        raise TypeError(f"map_concurrently(limit=...) wants a whole number or None, not {limit!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"map_concurrently(limit=...) must be at least 1, not {limit}")
    return (yield from _map(fn, items, limit).__await__())


async def _map(fn: Callable[[Any], Any], items: Any, limit: int | None) -> list[Any]:
    await consume_budget()
    kernel = current_kernel()
    nursery = Nursery(kernel, current_task())
    room = ParkingLot("room for one more call of map_concurrently()")
    tasks: list[Task] = []

    @operation
    def begin(item: Any) -> Generator[Any, Any, None]:
        task = nursery._spawn(call_async(fn, (item,), "map_concurrently"), None)
        tasks.append(task)
        if limit is not None:
            kernel.farewells[task] = [lambda _: room.unpark()]
            if len(nursery._children) >= limit:
                yield from room.park()
        yield from consume_budget()  # before the next item is asked for

    async with nursery:
        if isinstance(items, AsyncIterable):
            async with aclosing(items) if isinstance(items, AsyncGeneratorType) else nullcontext():
                async for item in items:
                    await begin(item)
        else:
            for item in items:
                await begin(item)
    _check(nursery, "map_concurrently")
    return [task.value for task in tasks]


def _call_all(calls: Iterable[AsyncCall[Any]], how: str) -> list[Coro]:
    """Make the calls. If one can't be made, close what the others returned: nothing has run."""
    coros: list[Coro] = []
    try:
        for call in calls:
            coros.append(call_async(call, (), how))
    except BaseException:
        given = [call for call in calls if isinstance(call, CoroutineType | GeneratorType)]
        coro: Any
        for coro in (*coros, *given):
            coro.close()
        if not given:
            raise
        name = given[0].__name__
        raise TypeError(
            f"{how} wants functions to call, but got the result of calling {name}. Write {how} with "
            f"`functools.partial({name}, ...)`, or with `{name}` itself if it takes no arguments."
        ) from None
    return coros


def _check(nursery: Nursery, how: str) -> None:
    if nursery.cancel_scope.cancelled_caught:
        raise TaskCancelled(f"a call of {how}() has cancelled the nursery it ran in, and so there are no results")
