"""A coroutine kernel: tasks that trap, nurseries that wait, scopes that cancel.

The names stand in the order in which a program meets them. `kernel.lowlevel` is for building primitives,
`kernel.testing` for tests. Start with docs/index.md.
"""

# Running a program.
from .boot import current_time, run

# Errors.
from .core.errors import (
    BrokenResourceError,
    BusyResourceError,
    Cancelled,
    ClosedResourceError,
    EndOfChannel,
    KernelInternalError,
    RunFinishedError,
    TooSlowError,
    WouldBlock,
)

# Tasks and the blocks they live in.
from .core.nursery import TASK_STATUS_IGNORED, Nursery, TaskStatus, open_nursery

# Leaving: cancellation and deadlines.
from .core.scopes import CancelScope, current_effective_deadline

# Waiting.
from .core.traps import sleep, sleep_forever, sleep_until
from .generators import within
from .timeouts import fail_after, fail_at, move_on_after, move_on_at

# In reach without an import of their own.
from . import lowlevel, testing  # isort: skip

__version__ = "0.1.0"

__all__ = [
    "TASK_STATUS_IGNORED",
    "BrokenResourceError",
    "BusyResourceError",
    "CancelScope",
    "Cancelled",
    "ClosedResourceError",
    "EndOfChannel",
    "KernelInternalError",
    "Nursery",
    "RunFinishedError",
    "TaskStatus",
    "TooSlowError",
    "WouldBlock",
    "current_effective_deadline",
    "current_time",
    "fail_after",
    "fail_at",
    "lowlevel",
    "move_on_after",
    "move_on_at",
    "open_nursery",
    "run",
    "sleep",
    "sleep_forever",
    "sleep_until",
    "testing",
    "within",
]
