"""Blocks of code in several tasks, one after the other, in an order that the test says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator
from typing import Any

from ..core.errors import Cancelled
from ..core.traps import operation
from ..sync import Event

__all__ = ["Sequencer"]


class Sequencer:
    """`async with sequencer(n):` runs the block when that of `n - 1` has ended. Block 0 need not wait.

        async def ann(sequencer):
            async with sequencer(0):
                print("first")
            async with sequencer(2):
                print("third")

        async def ben(sequencer):
            async with sequencer(1):
                print("second")

    Entering is always a cancel point, and a schedule point if it waits. Leaving is neither, and lets the next block
    begin also if this one has failed. A number serves once. A task that is cancelled while it waits breaks the sequence
    for all, as its block would be missing.

    Entering raises RuntimeError: the number was used before; or the sequence is broken, or breaks meanwhile, also by
    the cancellation of this task (a lost turn is a mistake in the test, and shall not pass in silence).
    """

    def __init__(self) -> None:
        self._turns: defaultdict[int, Event] = defaultdict(Event)
        self._turns[0].set()
        self._taken: set[int] = set()
        self._broken = False

    def __call__(self, position: int) -> _Turn:
        return _Turn(self, position)


class _Turn:
    """What `sequencer(position)` returns: the async context manager."""

    __slots__ = ("_position", "_sequencer")

    def __init__(self, sequencer: Sequencer, position: int) -> None:
        self._sequencer = sequencer
        self._position = position

    @operation
    def __aenter__(self) -> Generator[Any, Any, None]:
        sequencer, position = self._sequencer, self._position
        if position in sequencer._taken:
            raise RuntimeError(f"position {position} of the sequence was used before: each serves one block")
        if not sequencer._broken:
            sequencer._taken.add(position)
            try:
                yield from sequencer._turns[position].wait()
            except Cancelled:
                sequencer._broken = True
                for turn in sequencer._turns.values():
                    turn.set()
                raise RuntimeError(
                    f"the sequence is broken: this task was cancelled while it waited for position {position}"
                ) from None
        if sequencer._broken:
            raise RuntimeError("the sequence is broken: a task was cancelled while it waited for its turn")

    @operation
    def __aexit__(self, *exc_info: object) -> Generator[Any, Any, None]:
        self._sequencer._turns[self._position + 1].set()
        return
        yield  # makes it a generator; nothing to wait for
