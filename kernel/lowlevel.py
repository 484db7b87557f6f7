"""For those who build primitives, and for those who look inside: traps, tasks, readiness, parking.

Names and meanings are trio's where trio has the thing. What `kernel` itself offers is written on these.
"""

from .boot import current_clock
from .core.loop import Kernel
from .core.ports import READ, WRITE, Clock, Poller, ReadyQueue, Timed, Timers
from .core.task import Task, current_kernel, current_task
from .core.traps import (
    Operation,
    Park,
    SleepUntil,
    Trap,
    WaitReadable,
    WaitWritable,
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
    consume_budget,
    notify_closing,
    operation,
    wait_readable,
    wait_writable,
)
from .fd_stream import FdStream
from .guest import start_guest_run
from .inbox import (
    KernelToken,
    RunVar,
    RunVarToken,
    current_kernel_token,
    current_root_task,
    in_kernel_run,
    in_kernel_task,
    spawn_system_task,
)
from .interrupts import currently_ki_protected, disable_ki_protection, enable_ki_protection
from .net.resolve import encode_hostname
from .parking import ParkingLot, ParkingLotStatistics, add_parking_lot_breaker, remove_parking_lot_breaker
from .process import open_process
from .rescheduling import (
    Abort,
    permanently_detach_coroutine_object,
    reattach_detached_coroutine_object,
    reschedule,
    temporarily_detach_coroutine_object,
    wait_task_rescheduled,
)
from .threads.cache import start_thread_soon
from .tracing.instruments import add_instrument, remove_instrument
from .tracing.tree import format_task_tree

__all__ = [
    "Abort",
    "Clock",
    "FdStream",
    "Kernel",
    "KernelToken",
    "Operation",
    "Park",
    "ParkingLot",
    "ParkingLotStatistics",
    "Poller",
    "READ",
    "ReadyQueue",
    "RunVar",
    "RunVarToken",
    "SleepUntil",
    "Task",
    "Timed",
    "Timers",
    "Trap",
    "WRITE",
    "WaitReadable",
    "WaitWritable",
    "add_instrument",
    "add_parking_lot_breaker",
    "cancel_shielded_checkpoint",
    "checkpoint",
    "checkpoint_if_cancelled",
    "consume_budget",
    "current_clock",
    "current_kernel",
    "current_kernel_token",
    "current_root_task",
    "current_task",
    "currently_ki_protected",
    "disable_ki_protection",
    "enable_ki_protection",
    "encode_hostname",
    "format_task_tree",
    "in_kernel_run",
    "in_kernel_task",
    "notify_closing",
    "open_process",
    "operation",
    "permanently_detach_coroutine_object",
    "reattach_detached_coroutine_object",
    "remove_instrument",
    "remove_parking_lot_breaker",
    "reschedule",
    "spawn_system_task",
    "start_guest_run",
    "start_thread_soon",
    "temporarily_detach_coroutine_object",
    "wait_readable",
    "wait_task_rescheduled",
    "wait_writable",
]
