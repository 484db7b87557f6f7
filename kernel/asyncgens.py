"""Async generators that nobody finishes.

    async for line in lines():
        break                  # lines() is left in the middle, perhaps inside a `finally` that must wait

A generator left like that is found by the garbage collector, which can't wait. So the interpreter offers two hooks:
one when an async generator is first iterated, one when it is about to be collected. The second puts it on a list, and
the kernel runs `aclose()` in a task of its own at the next pass. Nobody awaits that task, so it must not linger: it
runs in a cancelled scope, in which every cancel point raises.

When the run ends, generators that are still alive are closed in the order in which they were first iterated: the
outer one of a nest came first, and closing it closes those it iterates over, as leaving nested blocks would.

What does not work: context variables and scopes of the code that iterated are not those in which the rest of the
generator runs. Finishing generators yourself, with `contextlib.aclosing`, has none of these problems; a
`ResourceWarning` says so.
"""

from __future__ import annotations

import logging
import sys
import warnings
import weakref
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from .core.loop import Kernel
from .core.scopes import CancelScope
from .core.task import name_of
from .core.traps import checkpoint

AsyncGen = AsyncGenerator[Any, Any]


class AsyncGenerators:
    """The async generators of one run, and the interpreter's hooks while it lasts."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._alive: weakref.WeakKeyDictionary[AsyncGen, int] = weakref.WeakKeyDictionary()
        self._seen = 0
        self._previous: Any = None

    def install(self) -> None:
        self._previous = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(firstiter=self._first_iterated, finalizer=self._abandoned)

    def restore(self) -> None:
        sys.set_asyncgen_hooks(*self._previous)

    def _first_iterated(self, agen: AsyncGen) -> None:
        self._alive[agen] = self._seen
        self._seen += 1

    def _abandoned(self, agen: AsyncGen) -> None:
        """Called by the garbage collector: at any moment, in any thread. What it raises is reported and ignored."""
        self._kernel.soon.append(partial(self._start_closing, agen))
        warnings.warn(
            f"async generator {name_of(agen)!r} was abandoned before it was exhausted; "
            "iterate over it inside `async with contextlib.aclosing(...)`",
            ResourceWarning,
            stacklevel=2,
            source=agen,
        )

    def _start_closing(self, agen: AsyncGen) -> None:
        self._alive.pop(agen, None)
        nursery = self._kernel.system_nursery
        if nursery is not None and nursery._state == "open":  # otherwise the run is over, and it stays as it is
            nursery.start_soon(self._close, agen, name=f"close {name_of(agen)}")

    async def close_all(self) -> None:
        """The run is ending: close what is still alive, outer ones first, until nothing new turns up."""
        while self._alive or self._kernel.soon:
            for agen, _ in sorted(self._alive.items(), key=lambda item: item[1]):
                self._alive.pop(agen, None)
                await self._close(agen)
            await checkpoint()  # those abandoned in the last moment are still on their way through `soon`

    async def _close(self, agen: AsyncGen) -> None:
        with CancelScope(shield=True) as scope:
            scope.cancel("the async generator was abandoned")
            try:
                await agen.aclose()
            except Exception:
                logging.getLogger(__name__).exception("closing the abandoned %r failed", name_of(agen))
