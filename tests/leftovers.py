"""What tests with worker processes and threads must clear away before tests/conftest.py looks.

Neither of the two belongs to a run. Import them: `from leftovers import idle_workers_leave, resource_tracker_leaves`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

import pytest

from kernel.threads import cache


@pytest.fixture
def idle_workers_leave(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel's worker threads wait for ten seconds for the next job. Here they don't, and are waited for."""
    before = set(threading.enumerate())
    monkeypatch.setattr(cache, "IDLE_SECONDS", 0.001)
    yield
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("kernel worker"):
            thread.join(10)


@pytest.fixture
def resource_tracker_leaves() -> Iterator[None]:
    """`multiprocessing` starts one helper process per program, which stays until the program ends."""
    yield
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]
