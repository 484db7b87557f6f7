"""For those who build primitives, and for those who look inside: traps, tasks, readiness, parking.

Names and meanings are trio's where trio has the thing. What `kernel` itself offers is written on these.
"""

from .boot import current_clock
from .core.loop import Kernel
from .core.parking import ParkingLot, ParkingLotStatistics
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

__all__ = [
    "READ",
    "WRITE",
    "Clock",
    "Kernel",
    "Operation",
    "Park",
    "ParkingLot",
    "ParkingLotStatistics",
    "Poller",
    "ReadyQueue",
    "SleepUntil",
    "Task",
    "Timed",
    "Timers",
    "Trap",
    "WaitReadable",
    "WaitWritable",
    "cancel_shielded_checkpoint",
    "checkpoint",
    "checkpoint_if_cancelled",
    "consume_budget",
    "current_clock",
    "current_kernel",
    "current_task",
    "notify_closing",
    "operation",
    "wait_readable",
    "wait_writable",
]
