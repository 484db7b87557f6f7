"""What every test gets: a check that it leaves nothing behind, and a virtual clock to run on."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kernel
from kernel.core.task import Task, here
from kernel.integrations.leftovers import describe, look, wait_until_gone
from kernel.testing import MockClock

_told: weakref.WeakSet[Task] = weakref.WeakSet()
"""Tasks that a test has failed for already: the tests after it are not to blame."""


def pytest_collection_finish() -> None:
    """Take all that was imported out of the garbage collector's view: the check below looks at what is left, often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a file descriptor, a thread, a child process, a running kernel or an unfinished task."""
    before = look(("fds", "threads"))  # of child processes there must be none at all
    yield
    gc.collect()
    assert here.kernel is None, "a kernel is still running"
    left = wait_until_gone(before)
    assert not left, f"the test has left behind: {describe(left)}"
    everything = gc.get_objects()
    unfinished = [thing for thing in everything if type(thing) is Task and thing.outcome is None]
    if len(everything) > 20_000:  # something large was imported: out of view with it, as in pytest_collection_finish
        gc.freeze()
    del everything
    fresh = [task for task in unfinished if task not in _told]
    _told.update(fresh)
    assert not fresh, f"tasks were left unfinished: {fresh}"
    with pytest.raises(ChildProcessError):  # where there is no /proc, nobody else has looked
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture
def virtual() -> Callable[..., Any]:
    """`virtual(main, *args)`: run in virtual time, which jumps ahead whenever there is nothing to do."""

    def run(async_fn: Callable[..., Any], *args: Any) -> Any:
        return kernel.run(async_fn, *args, clock=MockClock(autojump_threshold=0))

    return run
