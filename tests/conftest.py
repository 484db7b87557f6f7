"""What every test gets: a check that it leaves nothing behind, and a virtual clock to run on."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kernel
from kernel.core.task import Task, here
from kernel.testing import MockClock
from kernel.threads import cache

_told: weakref.WeakSet[Task] = weakref.WeakSet()
"""Tasks that a test has failed for already: the tests after it are not to blame."""


def pytest_collection_finish() -> None:
    """Take all that was imported out of the garbage collector's view: the check below looks at what is left, often."""
    gc.collect()
    gc.freeze()


def _open_fds() -> set[str]:
    """Those of worker threads do not count: if the worker may live, so may its bell."""
    return set(os.listdir("/proc/self/fd")) - set(map(str, cache._eventfds)) if sys.platform == "linux" else set()


def _threads() -> set[threading.Thread]:
    """All but the workers that have nothing to do and wait for the next job."""
    return set(threading.enumerate()) - {worker.thread for worker in list(cache._idle)}


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a file descriptor, a thread, a child process, a running kernel or an unfinished task."""
    fds, threads = _open_fds(), _threads()
    yield
    gc.collect()
    assert here.kernel is None, "a kernel is still running"
    for thread in _threads() - threads:
        thread.join(timeout=1.0)  # a worker that is just going, or about to be idle
    assert _threads() <= threads, f"threads were left running: {_threads() - threads}"
    for _ in range(100):
        if len(_open_fds()) <= len(fds):
            break
        time.sleep(0.01)  # a worker that is going has taken its bell off the list, and closes it now
    assert len(_open_fds()) <= len(fds), f"file descriptors were left open: {sorted(_open_fds() - fds)}"
    everything = gc.get_objects()
    unfinished = [thing for thing in everything if type(thing) is Task and thing.outcome is None]
    if len(everything) > 20_000:  # something large was imported: out of view with it, as in pytest_collection_finish
        gc.freeze()
    del everything
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
