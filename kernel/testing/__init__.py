"""Tools for testing programs that run in the kernel."""

from .check_streams import check_half_closeable_stream, check_one_way_stream, check_two_way_stream
from .checkpoints import assert_checkpoints, assert_no_checkpoints
from .clock import MockClock
from .decorate import kernel_test
from .explore import (
    Exploration,
    InvariantError,
    LeakError,
    ScheduleFailure,
    TooManySteps,
    cancel_target,
    explore,
    explore_cancellation,
    replay,
    run_with,
)
from .idle import wait_all_tasks_blocked
from .network_tools import open_stream_to_socket_listener
from .sequencer import Sequencer
from .streams import (
    MemoryReceiveStream,
    MemorySendStream,
    lockstep_stream_one_way_pair,
    lockstep_stream_pair,
    memory_stream_one_way_pair,
    memory_stream_pair,
    memory_stream_pump,
)
from .threads import active_thread_count, wait_all_threads_completed

__all__ = [
    "Exploration",
    "InvariantError",
    "LeakError",
    "MemoryReceiveStream",
    "MemorySendStream",
    "MockClock",
    "ScheduleFailure",
    "Sequencer",
    "TooManySteps",
    "active_thread_count",
    "assert_checkpoints",
    "assert_no_checkpoints",
    "cancel_target",
    "check_half_closeable_stream",
    "check_one_way_stream",
    "check_two_way_stream",
    "explore",
    "kernel_test",
    "explore_cancellation",
    "lockstep_stream_one_way_pair",
    "lockstep_stream_pair",
    "memory_stream_one_way_pair",
    "memory_stream_pair",
    "memory_stream_pump",
    "open_stream_to_socket_listener",
    "replay",
    "run_with",
    "wait_all_tasks_blocked",
    "wait_all_threads_completed",
]
