"""What every test gets: a check that it leaves nothing behind, and a virtual clock to run on."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kernel
from kernel.core.task import Task, here
from kernel.testing import MockClock

_told: weakref.WeakSet[Task] = weakref.WeakSet()
"""Tasks that a test has failed for already: the tests after it are not to blame."""


def pytest_collection_finish() -> None:
    """Take all that was imported out of the garbage collector's view: the check below looks at what is left, often."""
    gc.collect()
    gc.freeze()


def _open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a file descriptor, a thread, a child process, a running kernel or an unfinished task."""
    fds, threads = _open_fds(), set(threading.enumerate())
    yield
    gc.collect()
    assert here.kernel is None, "a kernel is still running"
    assert set(threading.enumerate()) <= threads, "threads were left running"
    assert len(_open_fds()) <= len(fds), f"file descriptors were left open: {sorted(_open_fds() - fds)}"
    unfinished = [thing for thing in gc.get_objects() if type(thing) is Task and thing.outcome is None]
    fresh = [task for task in unfinished if task not in _told]
    _told.update(fresh)
    assert not fresh, f"tasks were left unfinished: {fresh}"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture
def virtual() -> Callable[..., Any]:
    """`virtual(main, *args)`: run in virtual time, which jumps ahead whenever there is nothing to do."""

    def run(async_fn: Callable[..., Any], *args: Any) -> Any:
        return kernel.run(async_fn, *args, clock=MockClock(autojump_threshold=0))

    return run
