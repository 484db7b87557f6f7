"""Sleeping until a date.

The kernel's clock counts seconds from somewhere, evenly. A date is another matter: the wall clock is set by hand and by
the network, jumps at will, and goes on while the machine is suspended. "At seven tomorrow" is a question to the wall
clock, and has to be asked again whenever that may have changed.

    Linux       a timerfd on the wall clock, with the request to be told when it is set. It ends in time whatever
                happens to the clock, and at once when a suspended machine wakes up after the date. It does not wake
                the machine.
    elsewhere   the wall clock is looked at once a second. So it may be up to a second late after the clock was set
                forward or the machine was suspended, and is right otherwise. The same if no timerfd can be had, as when
                the process has no descriptors left.

In both cases the sleep never ends before the wall clock shows the date. If the clock is set back after that, it has
ended all the same. Leap seconds are what the system makes of them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import time
from collections.abc import Generator
from datetime import datetime
from typing import Any, Final

from .core.traps import checkpoint, operation, sleep, wait_readable

__all__ = ["sleep_until_wallclock"]

LOOK_SECONDS: Final = 1.0
"""How often the wall clock is looked at where the system does not tell when it is set."""


@operation
def sleep_until_wallclock(when: datetime) -> Generator[Any, Any, None]:
    """Sleep until the wall clock shows `when`, or later. With a time zone, that moment; without one, in local time.

    Right across changes of the clock and suspended machines, as far as the system allows: see the module. A local time
    that the change to summer time skips or repeats is what `datetime.timestamp()` takes it for. Virtual clocks have no
    influence: this is about the world outside.

    Always a cancel point and a schedule point; a past date is a `checkpoint`. A cancellation leaves nothing behind.
    Cost: some 30 us, and on Linux a descriptor while it sleeps.

    Raises:
        TypeError: `when` is no datetime.
        ValueError, OverflowError: without a time zone, and within a day of the first or last date there is.
        RuntimeError: used outside the kernel.
    """
    if not isinstance(when, datetime):
        raise TypeError(f"sleep_until_wallclock() wants a datetime, not {when!r}")
    timestamp = when.timestamp()
    yield from checkpoint()
    if timestamp <= time.time():
        return
    timer = _Timerfd.create()
    if timer is None:
        while (left := timestamp - time.time()) > 0:
            yield from sleep(min(left, LOOK_SECONDS))
        return
    try:
        while time.time() < timestamp:
            if timer.set(timestamp):
                yield from wait_readable(timer.fd)
    finally:
        os.close(timer.fd)  # nobody else knows of it, so there is nobody to be told


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class _Timerfd:
    """Linux's timerfd on the wall clock. Python's own came with 3.13; asking the C library does for all versions."""

    ABSTIME: Final = 1
    CANCEL_ON_SET: Final = 2

    @classmethod
    def create(cls) -> _Timerfd | None:
        """A new one, or None where there is no such thing, or none to be had."""
        if sys.platform != "linux" or sys.maxsize < 2**32:  # with 32 bits, it ends in 2038
            return None
        library = ctypes.CDLL(None, use_errno=True)
        if not hasattr(library, "timerfd_create"):
            return None
        fd = library.timerfd_create(time.CLOCK_REALTIME, os.O_NONBLOCK | os.O_CLOEXEC)
        return cls(library, fd) if fd >= 0 else None

    def __init__(self, library: ctypes.CDLL, fd: int) -> None:
        self.fd = fd
        self._library = library

    def set(self, timestamp: float) -> bool:
        """Become readable at `timestamp`, or when the clock is set. False if it was set just now: look again."""
        spec = _Itimerspec(value=_Timespec(*divmod(round(timestamp * 1e9), 1_000_000_000)))
        if self._library.timerfd_settime(self.fd, self.ABSTIME | self.CANCEL_ON_SET, ctypes.byref(spec), None) == 0:
            return True
        number = ctypes.get_errno()
        if number == errno.ECANCELED:
            return False
        raise OSError(number, os.strerror(number))
