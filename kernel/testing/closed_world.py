"""Drivers for runs that are watched: a clock that jumps, a poller without files, and what notices what is left behind.

In the closed world nothing comes from outside, so a run is the same each time but for the choices of its schedule. The
open world has the real clock and the real files. There, the poller sees to it that a run does not sleep for longer than
it may.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from math import inf
from typing import Any, Final, NoReturn, Protocol

from ..asyncgens import AsyncGen, AsyncGenerators
from ..core.loop import Kernel
from ..core.ports import Poller
from ..core.task import Task, name_of
from ..inbox import KernelToken
from ..threads import cache

__all__: list[str] = []

_FILES: Final = "/proc/self/fd"
_PATIENCE: Final = 1_000_000  # looks at nothing, one after the other, before we believe that nothing will come


class VirtualClock:
    """Stands still while anything can run, then jumps to the next deadline."""

    autojump_threshold = 0.0

    def __init__(self) -> None:
        self.now = 0.0
        self.current_time = partial(getattr, self, "now")

    def start_clock(self) -> None:
        self.now = 0.0

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return 0.0 if deadline <= self.now else inf

    def autojump(self, deadline: float) -> None:
        self.now = deadline


class Idle(Protocol):
    """What a poller of ours tells."""

    def idle(self) -> None:
        """The loop looks for events, perhaps because all sleep. Somebody may be woken by this."""

    def asleep_for_ever(self) -> None:
        """Nothing happens any more."""


class NoFiles:
    """The poller of a program without files."""

    def __init__(self, run: Idle) -> None:
        self._run = run
        self._in_vain = 0

    def arm(self, fd: int, direction: int, task: Task) -> NoReturn:
        raise RuntimeError("a program that is explored cannot wait for files: the world outside is not repeatable")

    def disarm(self, fd: int, direction: int) -> None:
        raise AssertionError("unreachable: nothing was armed")

    def forget(self, fd: int) -> list[Task]:
        return []

    def poll(self, timeout: float) -> Iterable[Task]:
        self._run.idle()
        self._in_vain = self._in_vain + 1 if timeout > 0 else 0
        if timeout == inf or self._in_vain > _PATIENCE:  # otherwise a thread may call yet
            self._run.asleep_for_ever()
        return ()

    def wakeup(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __len__(self) -> int:
        return 0


class Watched:
    """A real poller, whose sleep ends with the time the run has."""

    def __init__(self, real: Poller, run: Idle, ready: list[Task]) -> None:
        self._real = real
        self._run = run
        self._ready = ready
        self.end = inf  # when the run must be over, on the monotonic clock

    def poll(self, timeout: float) -> Iterable[Task]:
        self._run.idle()
        left = max(self.end - time.monotonic(), 0.0)
        tasks = self._real.poll(0.0 if self._ready else min(timeout, left))
        if time.monotonic() >= self.end:
            self._run.asleep_for_ever()
        return tasks

    def __len__(self) -> int:
        return len(self._real)

    def __bool__(self) -> bool:
        return bool(self._real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class Generators(AsyncGenerators):
    """Notes which async generators the program has not brought to their ends."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self._left: list[str] = []

    def install(self) -> None:
        self.take_hooks()

    def _abandoned(self, agen: AsyncGen) -> None:
        if self._token is None:  # that takes as long as ten steps, and is hardly ever needed
            self._token = KernelToken(self._kernel, copy_context())
        self._note(agen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # it is told as a leak
            super()._abandoned(agen)

    async def close_all(self) -> None:
        if self._found or self._alive:
            for agen in self._alive:
                self._note(agen)
            await super().close_all()

    def _note(self, agen: AsyncGen) -> None:
        self._left.append(f"the async generator {name_of(agen)}, which is not at its end")

    def left(self) -> list[str]:
        """What was noted, which is then forgotten."""
        left, self._left = self._left, []
        return left

    def restore(self) -> None:
        if self._token is not None:
            self._token.close()
            self._token = None
        self.return_hooks()


def what_is_left(kernel: Kernel) -> list[str]:
    """What the tasks, which have all ended, have left in the drivers."""
    left = [(len(kernel.poller), "waits for files"), (len(kernel.timers), "timers")]
    return [f"{number} {what}" for number, what in left if number]


def open_files() -> dict[str, str]:
    """The open files by number, and what they are; on Linux. Those of idle worker threads are nobody's leak."""
    found: dict[str, str] = {}
    for fd in os.listdir(_FILES) if sys.platform == "linux" else ():
        with suppress(OSError):  # the one that listdir itself has had open
            found[fd] = os.readlink(f"{_FILES}/{fd}")
    return {fd: what for fd, what in found.items() if int(fd) not in cache._eventfds}


def files_left(before: dict[str, str]) -> list[str]:
    """Those that were opened since, and are open. A worker thread that is going may need a moment."""
    left: list[str] = []
    for _ in range(100):
        left = [f"the open file {fd}, {what}" for fd, what in open_files().items() if before.get(fd) != what]
        if not left:
            break
        time.sleep(0.01)
    return left
