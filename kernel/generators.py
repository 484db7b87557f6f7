"""Generator style: what `async def` has syntax for, as functions for plain generators.

    async def                              plain generator
    -------------------------------------  ---------------------------------------------------
    await sleep(1)                         yield from sleep(1)
    with move_on_after(1): ...             the same
    async with open_nursery() as nursery:  yield from within(open_nursery(), body)
    await a_coroutine()                    yield from a_coroutine().__await__()

An `async def` calls a generator function of yours with `await` once that is marked with `kernel.lowlevel.operation`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Protocol, TypeVar

from .core.nursery import call_async
from .core.task import Coro
from .core.traps import operation

__all__ = ["within"]

T_co = TypeVar("T_co", covariant=True)


class AsyncManager(Protocol[T_co]):
    """What `async with` takes."""

    def __aenter__(self) -> Awaitable[T_co]: ...

    def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None, /
    ) -> Awaitable[bool | None]: ...


@operation
def within(manager: AsyncManager[T_co], body: Callable[..., Any], *args: Any) -> Generator[Any, Any, Any]:
    """`async with manager as value`, for generators: run `body(value, *args)` inside and return its result.

        def dinner(nursery):
            nursery.start_soon(cook, "soup")
            yield from sleep(1)

        yield from within(open_nursery(), dinner)

    `body` is an async function or a generator function. Checkpoints and errors are those of the manager and the body.
    """

    async def run() -> Any:
        async with manager as value:
            return await _steps(call_async(body, (value, *args), "within"))

    return (yield from run().__await__())


@operation
def _steps(coro: Coro) -> Generator[Any, Any, Any]:
    """Make a plain generator fit for `await`."""
    return (yield from coro.__await__() if isinstance(coro, Coroutine) else coro)
