"""What the ends of all channels have in common: they are closed, by hand or by a block, and some are iterated over."""

from __future__ import annotations

from collections.abc import Generator
from math import inf
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from ..abc import AsyncResource, ReceiveChannel
from ..core.errors import ClosedResourceError, EndOfChannel
from ..core.traps import consume_budget, operation

AnyEnd = TypeVar("AnyEnd", bound="End")
AnyReceiveEnd = TypeVar("AnyReceiveEnd", bound="ReceiveEnd[Any]")
ReceiveType = TypeVar("ReceiveType", covariant=True)


class End(AsyncResource):
    """An end of a channel. `with` and `async with` close it."""

    __slots__ = ("__weakref__", "_closed")
    _closed: bool

    def close(self) -> None:
        raise NotImplementedError

    @operation
    def aclose(self) -> Generator[Any, Any, None]:
        """As `close`, and then a cancel point; a schedule point if the budget is used up."""
        self.close()
        yield from consume_budget()

    def __enter__(self: AnyEnd) -> AnyEnd:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except RuntimeError:
            if not isinstance(exc, GeneratorExit):
                raise
            # The run has crashed, and this coroutine is thrown away: nobody is left to be told.

    @operation
    def __aexit__(  # type: ignore[override]  # an operation will do for `async with`
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> Generator[Any, Any, None]:
        self.__exit__(exc_type, exc, traceback)
        if exc is None:
            yield from consume_budget()

    def _refuse(self) -> NoReturn:
        raise ClosedResourceError(f"{self!r} was closed before: it cannot be used any more")


class ReceiveEnd(End, ReceiveChannel[ReceiveType]):
    """An end to receive from. `async for` goes on until there is no more, or until somebody closes this end."""

    __slots__ = ()

    def __aiter__(self: AnyReceiveEnd) -> AnyReceiveEnd:
        if self._closed:
            self._refuse()
        return self

    @operation
    def __anext__(self) -> Generator[Any, Any, ReceiveType]:
        try:
            return (yield from self.receive())  # type: ignore[misc, no-any-return]  # ours are operations
        except (EndOfChannel, ClosedResourceError):
            raise StopAsyncIteration from None


def check_buffer_size(size: float, least: int) -> None:
    if size != inf and not isinstance(size, int):
        raise TypeError(f"max_buffer_size must be a whole number or math.inf, not {size!r}")
    if size < least:
        raise ValueError(f"max_buffer_size must be at least {least}, not {size}")
