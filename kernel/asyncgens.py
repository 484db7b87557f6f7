"""Async generators that nobody finishes.

    async for line in lines():
        break                  # lines() is left in the middle, perhaps inside a `finally` that must wait

A generator left like that is found by the garbage collector, which can't wait. So the interpreter offers two hooks:
one when an async generator is first iterated, one when it is about to be collected. The second puts it on a list, and
the kernel runs `aclose()` in a task of its own at the next pass. Nobody awaits that task, so it must not linger: it
runs in a cancelled scope, in which every cancel point raises.

When the last task has ended, generators that are still alive are closed in the order in which they were first
iterated: the outer one of a nest came first, and closing it closes those it iterates over, as leaving nested blocks
would.

What does not work: context variables and scopes of the code that iterated are not those in which the rest of the
generator runs. Finishing generators yourself, with `contextlib.aclosing`, has none of these problems; a
`ResourceWarning` says so.
"""

from __future__ import annotations

import logging
import sys
import warnings
import weakref
from collections import deque
from collections.abc import AsyncGenerator
from contextvars import copy_context
from typing import Any

from .core.errors import Cancelled, RunFinishedError
from .core.loop import Kernel
from .core.scopes import CancelScope
from .core.task import here, name_of
from .inbox import KernelToken

AsyncGen = AsyncGenerator[Any, Any]


class AsyncGenerators:
    """The async generators of one run, and the interpreter's hooks while it lasts."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._alive: weakref.WeakKeyDictionary[AsyncGen, int] = weakref.WeakKeyDictionary()
        self._found: deque[AsyncGen] = deque()  # abandoned; nobody closes them yet
        self._seen = 0
        self._previous: Any = None
        self._token: KernelToken | None = None  # the collector may run in any thread, and when the run is over

    def install(self) -> None:
        self._token = KernelToken(self._kernel, copy_context())
        self.take_hooks()

    def take_hooks(self) -> None:
        self._previous = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(firstiter=self._first_iterated, finalizer=self._abandoned)

    def return_hooks(self) -> None:
        """To whoever had them before. May be called twice. In guest mode this is done at the end of each tick."""
        if self._previous is not None:
            sys.set_asyncgen_hooks(*self._previous)
            self._previous = None

    def restore(self) -> None:
        assert self._token is not None
        self._token.close()
        self._found.clear()
        self.return_hooks()

    def forget(self) -> None:
        """In a process that was forked off."""
        assert self._token is not None
        self._token.forget()
        if here.kernel is self._kernel:  # the hooks are a thread's own
            self.restore()

    def _first_iterated(self, agen: AsyncGen) -> None:
        self._alive[agen] = self._seen
        self._seen += 1

    def _abandoned(self, agen: AsyncGen) -> None:
        """Called by the garbage collector: at any moment, in any thread. What it raises is reported and ignored."""
        assert self._token is not None
        self._found.append(agen)
        try:
            self._token.run_sync_soon(self._start_closing)
        except RunFinishedError:  # nobody is there to close it: it stays as it is
            self._found.clear()
        warnings.warn(
            f"async generator {name_of(agen)!r} was abandoned before it was exhausted; "
            "iterate over it inside `async with contextlib.aclosing(...)`",
            ResourceWarning,
            stacklevel=2,
            source=agen,
        )

    def _start_closing(self) -> None:
        nursery = self._kernel.system_nursery
        if nursery is not None and nursery._state == "open":  # otherwise `close_all` will see to it
            agen = self._found.popleft()
            nursery.start_soon(self._close, agen, name=f"close {name_of(agen)}")

    async def close_all(self) -> None:
        """All tasks have ended: close what is still alive, outer ones first, until nothing new turns up."""
        while self._found or self._alive:
            found = [self._found.popleft() for _ in range(len(self._found))]
            alive = [agen for agen, _ in sorted(self._alive.items(), key=lambda item: item[1])]
            for agen in (*found, *alive):
                await self._close(agen)

    async def _close(self, agen: AsyncGen) -> None:
        self._alive.pop(agen, None)
        with CancelScope(shield=True) as scope:
            scope.cancel("the async generator was abandoned")
            try:
                await agen.aclose()
            except (Cancelled, GeneratorExit):
                raise
            except BaseException:
                logging.getLogger(__name__).exception("closing the abandoned %r failed", name_of(agen))
