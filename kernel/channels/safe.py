"""`as_safe_channel`: write an async generator, use a channel.

    @as_safe_channel
    async def ticks(seconds):
        with move_on_after(60):
            while True:
                yield current_time()
                await sleep(seconds)

    async with ticks(1) as receive_channel:
        async for tick in receive_channel: ...

An async generator with a scope or nursery around a `yield` breaks the rule on which all cancellation rests, that blocks
nest: the scope is entered in the generator and in force in its caller (PEP 789). And one that is left in the middle is
cleaned up who knows when (PEP 533). Here the generator runs in a task of its own, which does nothing else. Its scopes
are in force there and nowhere else, and the task ends with the block.

To the generator, `yield` is like a checkpoint: its own scopes can cancel it there, and it goes on behind them. It runs
only while somebody waits in `receive`, so it is never ahead of its consumer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import wraps
from math import inf
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ..abc import ReceiveChannel
from ..core.errors import BrokenResourceError, Cancelled
from ..core.nursery import Nursery
from ..core.scopes import CancelScope
from ..core.task import Task, current_kernel, current_task, name_of
from ..core.traps import Operation
from ..parking import ParkingLot
from .ends import ReceiveEnd
from .memory import MemoryReceiveChannel, MemorySendChannel, State

if TYPE_CHECKING:
    from ..core.loop import Kernel

__all__ = ["as_safe_channel"]

P = ParamSpec("P")
T = TypeVar("T")


class _Source(MemoryReceiveChannel[T]):
    """Lets the generator run when somebody sleeps here. Sooner would be too soon: it would find nobody in the row."""

    __slots__ = ("_demand",)

    def __init__(self, state: State[T], demand: ParkingLot) -> None:
        super().__init__(state)
        self._demand = demand

    def arm(self, kernel: Kernel, task: Task) -> None:
        """Of the trap: the task sleeps until it is handed a value, and the generator is to make one."""
        super().arm(kernel, task)
        self._demand.unpark_all()

    def close(self) -> None:
        super().close()
        self._demand.unpark_all()


class _SafeReceiveChannel(ReceiveEnd[T]):
    """What `async with` gives: a receive channel, and nothing else that a `_Source` could do."""

    __slots__ = ("_source",)

    def __init__(self, source: _Source[T]) -> None:
        self._closed = False
        self._source = source

    def receive(self) -> Operation[T]:
        return self._source.receive()

    def close(self) -> None:
        self._closed = True
        self._source.close()


def as_safe_channel(
    fn: Callable[P, AsyncGenerator[T, None]],
) -> Callable[P, AbstractAsyncContextManager[ReceiveChannel[T]]]:
    """Make an async generator function into one that returns an async context manager of a receive channel.

    Leaving the block closes the generator and waits until it has ended. An error in it comes out of the block, as it
    is; together with another one of the block itself, as an `ExceptionGroup`.
    """

    @asynccontextmanager
    @wraps(fn)
    async def open_channel(*args: P.args, **kwargs: P.kwargs) -> AsyncIterator[ReceiveChannel[T]]:
        generator = fn(*args, **kwargs)
        if not isinstance(generator, AsyncGenerator):
            raise TypeError(f"as_safe_channel wants an async generator function, and {name_of(fn)} is none")
        state: State[T] = State(inf, deque())
        demand = ParkingLot("somebody who wants a value")
        send_channel, source = MemorySendChannel[T](state), _Source(state, demand)
        # Bare: the nursery is ours, and a lone error shall not come in a group.
        async with Nursery(current_kernel(), current_task(), bare=True) as nursery:
            nursery.start_soon(_run, generator, send_channel, demand, nursery.cancel_scope, name=name_of(fn))
            with _SafeReceiveChannel(source) as channel:
                yield channel
            nursery.cancel_scope.cancel("the block around the channel was left")

    return open_channel


async def _run(
    generator: AsyncGenerator[T, None], send_channel: MemorySendChannel[T], demand: ParkingLot, outside: CancelScope
) -> None:
    """Run the generator, one step for each value that somebody waits for."""
    state = send_channel._state
    with send_channel:
        try:
            while True:
                own: Cancelled | None = None
                try:
                    while not state.receivers and state.open_receivers:
                        await demand.park()
                except Cancelled as cancelled:
                    if outside.cancelled is not None:
                        raise
                    own = cancelled  # of a scope that is open in the generator, around its `yield`
                if not state.open_receivers:
                    return
                value = await (anext(generator) if own is None else generator.athrow(own))
                send_channel.send_nowait(value)
        except (StopAsyncIteration, BrokenResourceError):
            return
        finally:
            await _close(generator)


async def _close(generator: AsyncGenerator[Any, None]) -> None:
    try:
        await generator.aclose()
    except BaseExceptionGroup as group:  # a nursery was open around the `yield`, and has wrapped the GeneratorExit
        rest = group.split(GeneratorExit)[1]
        if rest is not None:
            raise rest from None
