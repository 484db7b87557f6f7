"""Async functions as tests, for any framework that calls functions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from functools import partial, wraps
from typing import Any, Final, ParamSpec, TypeVar

from ..abc import Instrument
from ..boot import run

__all__ = ["kernel_test"]

P = ParamSpec("P")
T = TypeVar("T")

_CLOCK: Final = ("start_clock", "current_time", "deadline_to_sleep_time")


def kernel_test(async_fn: Callable[P, Awaitable[T] | Generator[Any, Any, T]]) -> Callable[P, T]:
    """Decorator: make an async function, or a generator function, a plain one that runs in a kernel of its own.

        @kernel_test
        async def test_soup(virtual_clock):
            ...

    An argument that is a clock (an object whose class has its methods) becomes the run's clock, and all that are a
    `kernel.abc.Instrument` its instruments. So a pytest fixture can make them. The function gets them as well.

    Calling it raises what `kernel.run` does, and ValueError if there are two clocks.
    """

    @wraps(async_fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        values = [*args, *kwargs.values()]
        clocks: list[Any] = [value for value in values if all(hasattr(type(value), name) for name in _CLOCK)]
        if len(clocks) > 1:
            raise ValueError(f"a run has one clock, but {wrapper.__qualname__} was given {len(clocks)}: {clocks}")
        return run(
            partial(async_fn, *args, **kwargs),
            clock=clocks[0] if clocks else None,
            instruments=[value for value in values if isinstance(value, Instrument)],
        )

    return wrapper
