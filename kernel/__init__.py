"""A coroutine kernel: tasks that trap, nurseries that wait, scopes that cancel.

The names stand in the order in which a program meets them. `kernel.lowlevel` is for building primitives,
`kernel.testing` for tests. Start with docs/index.md.
"""

# isort: off

# Running a program.
from .boot import Kernel, current_time, run

# Errors.
from .core.errors import (
    BrokenResourceError,
    BusyResourceError,
    Cancelled,
    ClosedResourceError,
    Deadlock,
    EndOfChannel,
    KernelInternalError,
    RunFinishedError,
    TooSlowError,
    WouldBlock,
)

# Tasks and the blocks they live in.
from .children import Nursery, TaskCancelled, TaskHandle, open_nursery
from .core.nursery import TASK_STATUS_IGNORED, TaskStatus
from .gathering import as_completed, gather, map_concurrently, race
from .groups import raise_single, unwrap_single

# Leaving: cancellation and deadlines.
from .cleanup import cleanup
from .core.scopes import CancelScope

# Waiting.
from .core.traps import sleep, sleep_forever, sleep_until
from .generators import within
from .timeouts import current_effective_deadline, fail_after, fail_at, move_on_after, move_on_at

# Waiting for one another.
from .sync import Barrier, CapacityLimiter, Condition, Event, Lock, Semaphore, StrictFIFOLock

# Handing values over.
from .channels import (
    LaggedError,
    MemoryReceiveChannel,
    MemorySendChannel,
    as_safe_channel,
    open_broadcast_channel,
    open_latest_channel,
    open_memory_channel,
    open_priority_channel,
)

# Threads, executors and processes.
from .process import Process, run_process
from .threads.executors import run_in, wait_future

# Byte streams.
from .streams import StapledStream, aclose_forcefully

# Signals, files, dates.
from .files import open_file, temporary_directory, temporary_file, wrap_file
from .path import Path, PosixPath, WindowsPath
from .signals import open_signal_receiver
from .wallclock import sleep_until_wallclock

# Looking at a run.
from .tracing.tree import dump_on_signal, dump_tasks
from .tracing.watchdog import Watchdog

# In reach without an import of their own.
from . import abc, from_thread, lowlevel, testing, to_process, to_thread

__version__ = "0.2.0"

__all__ = [
    "Barrier",
    "BrokenResourceError",
    "BusyResourceError",
    "CancelScope",
    "Cancelled",
    "CapacityLimiter",
    "ClosedResourceError",
    "Condition",
    "Deadlock",
    "EndOfChannel",
    "Event",
    "Kernel",
    "KernelInternalError",
    "LaggedError",
    "Lock",
    "MemoryReceiveChannel",
    "MemorySendChannel",
    "Nursery",
    "Path",
    "PosixPath",
    "Process",
    "RunFinishedError",
    "Semaphore",
    "StapledStream",
    "StrictFIFOLock",
    "TASK_STATUS_IGNORED",
    "TaskCancelled",
    "TaskHandle",
    "TaskStatus",
    "TooSlowError",
    "Watchdog",
    "WindowsPath",
    "WouldBlock",
    "abc",
    "aclose_forcefully",
    "as_completed",
    "as_safe_channel",
    "cleanup",
    "current_effective_deadline",
    "current_time",
    "dump_on_signal",
    "dump_tasks",
    "fail_after",
    "fail_at",
    "from_thread",
    "gather",
    "lowlevel",
    "map_concurrently",
    "move_on_after",
    "move_on_at",
    "open_broadcast_channel",
    "open_file",
    "open_latest_channel",
    "open_memory_channel",
    "open_nursery",
    "open_priority_channel",
    "open_signal_receiver",
    "race",
    "raise_single",
    "run",
    "run_in",
    "run_process",
    "sleep",
    "sleep_forever",
    "sleep_until",
    "sleep_until_wallclock",
    "temporary_directory",
    "temporary_file",
    "testing",
    "to_process",
    "to_thread",
    "unwrap_single",
    "wait_future",
    "within",
    "wrap_file",
]
