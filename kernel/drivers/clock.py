"""The clock the kernel uses unless told otherwise: the system's monotonic one."""

from __future__ import annotations

import time
from math import inf

__all__ = ["MonotonicClock"]


class MonotonicClock:
    """`time.monotonic()`: unaffected by changes of the date. On Linux it stands still during a suspend."""

    autojump_threshold = inf

    # The C function itself rather than a method that calls it: half the time of a look at the clock.
    current_time = staticmethod(time.monotonic)

    def start_clock(self) -> None:
        pass

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return deadline - time.monotonic()

    def autojump(self, deadline: float) -> None:
        raise AssertionError("unreachable: this clock's threshold is infinite")
