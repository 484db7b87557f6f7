"""A coroutine kernel: tasks that trap, nurseries that wait, scopes that cancel.

The names stand in the order in which a program meets them. `kernel.lowlevel` is for building primitives,
`kernel.testing` for tests. Start with docs/index.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

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

# Byte streams and servers.
from .buffered import BufferedReceiveStream, BufferedStream, IncompleteReadError, ItemTooLongError, TextReceiveStream
from .net.serving import TimeoutStream, serve_listeners
from .net.streams import SocketListener, SocketStream
from .net.tcp import open_tcp_listeners, open_tcp_stream, serve_tcp
from .net.udp import UDPSocket, open_udp_socket
from .net.unix import (
    PeerCredentials,
    UnixListener,
    open_unix_listener,
    open_unix_socket,
    peer_credentials,
    receive_fds,
    send_fds,
    serve_unix,
)
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
from . import abc, from_thread, lowlevel, socket, to_thread

# Imported when somebody first asks for them. Few programs do, and together they are a quarter of the import.
if TYPE_CHECKING:
    from . import testing, to_process
    from .net.ssl_over_tcp import open_ssl_over_tcp_listeners, open_ssl_over_tcp_stream, serve_ssl_over_tcp
    from .net.tls import NeedHandshakeError, SSLListener, SSLStream

_LATER = {
    "testing": ".testing",
    "to_process": ".to_process",
    "NeedHandshakeError": ".net.tls",
    "SSLListener": ".net.tls",
    "SSLStream": ".net.tls",
    "open_ssl_over_tcp_listeners": ".net.ssl_over_tcp",
    "open_ssl_over_tcp_stream": ".net.ssl_over_tcp",
    "serve_ssl_over_tcp": ".net.ssl_over_tcp",
}

__version__ = "0.3.0"

__all__ = [
    "Barrier",
    "BrokenResourceError",
    "BufferedReceiveStream",
    "BufferedStream",
    "BusyResourceError",
    "CancelScope",
    "Cancelled",
    "CapacityLimiter",
    "ClosedResourceError",
    "Condition",
    "Deadlock",
    "EndOfChannel",
    "Event",
    "IncompleteReadError",
    "ItemTooLongError",
    "Kernel",
    "KernelInternalError",
    "LaggedError",
    "Lock",
    "MemoryReceiveChannel",
    "MemorySendChannel",
    "NeedHandshakeError",
    "Nursery",
    "Path",
    "PeerCredentials",
    "PosixPath",
    "Process",
    "RunFinishedError",
    "SSLListener",
    "SSLStream",
    "Semaphore",
    "SocketListener",
    "SocketStream",
    "StapledStream",
    "StrictFIFOLock",
    "TASK_STATUS_IGNORED",
    "TaskCancelled",
    "TaskHandle",
    "TaskStatus",
    "TextReceiveStream",
    "TimeoutStream",
    "TooSlowError",
    "UDPSocket",
    "UnixListener",
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
    "open_ssl_over_tcp_listeners",
    "open_ssl_over_tcp_stream",
    "open_tcp_listeners",
    "open_tcp_stream",
    "open_udp_socket",
    "open_unix_listener",
    "open_unix_socket",
    "peer_credentials",
    "race",
    "raise_single",
    "receive_fds",
    "run",
    "run_in",
    "run_process",
    "send_fds",
    "serve_listeners",
    "serve_ssl_over_tcp",
    "serve_tcp",
    "serve_unix",
    "sleep",
    "sleep_forever",
    "sleep_until",
    "sleep_until_wallclock",
    "socket",
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


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LATER[name], __name__)
    globals()[name] = thing = getattr(module, name, module)
    return thing
