"""A clock that tests set: it stands still, runs at any rate, or jumps ahead whenever the program has nothing to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf

__all__ = ["MockClock"]


class MockClock:
    """Virtual time, starting at 0. Pass it to `kernel.run(main, clock=MockClock(...))`.

    Three ways to move it, which combine:

    * `jump(seconds)` moves it by hand.
    * `rate` lets it run: virtual seconds per real second. 0, the default, stands still.
    * `autojump_threshold`: when every task has been waiting for this many *real* seconds and nothing has happened,
      jump to the next deadline. With 0, a program that sleeps for hours ends in milliseconds. With real sockets or
      threads in play use a little more, 0.01 say: the kernel can't see that a packet is on its way. Default `inf`:
      never.

    `rate` and `autojump_threshold` are settable while it runs; the time is continuous when they change.
    """

    def __init__(
        self,
        rate: float = 0.0,
        autojump_threshold: float = inf,
        *,
        real_clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._real_clock = real_clock
        self._real_base = real_clock()
        self._virtual_base = 0.0
        self._rate = 0.0
        self.rate = rate
        self.autojump_threshold = autojump_threshold

    @property
    def rate(self) -> float:
        """Virtual seconds per real second, not below 0."""
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        if not 0 <= rate < inf:
            raise ValueError(f"rate must be a finite number from 0 up, not {rate!r}")
        self._virtual_base, self._real_base = self.current_time(), self._real_clock()
        self._rate = float(rate)

    @property
    def autojump_threshold(self) -> float:
        """Real seconds of idleness before the clock jumps; `inf` for never."""
        return self._autojump_threshold

    @autojump_threshold.setter
    def autojump_threshold(self, seconds: float) -> None:
        if not seconds >= 0:
            raise ValueError(f"autojump_threshold must be a number from 0 up, not {seconds!r}")
        self._autojump_threshold = float(seconds)

    def start_clock(self) -> None:
        """Called by the kernel. The time goes on from where it stood, so that one clock can serve several runs."""
        self._virtual_base, self._real_base = self.current_time(), self._real_clock()

    def current_time(self) -> float:
        """The virtual time, in seconds."""
        if self._rate == 0.0:
            return self._virtual_base
        return self._virtual_base + self._rate * (self._real_clock() - self._real_base)

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Real seconds until `deadline` at the present rate."""
        ahead = deadline - self.current_time()
        if ahead <= 0:
            return 0.0
        return ahead / self._rate if self._rate > 0 else inf

    def jump(self, seconds: float) -> None:
        """Move the time ahead by `seconds`, not below 0.

        Sleeping tasks and deadlines that this passes are served when the kernel next looks, which is not at once;
        `await wait_all_tasks_blocked()` sees to it.
        """
        if not seconds >= 0:
            raise ValueError(f"time cannot go back: jump() wants a number of seconds from 0 up, not {seconds!r}")
        self._virtual_base += seconds

    def autojump(self, deadline: float) -> None:
        """Called by the kernel when it has been idle for `autojump_threshold`."""
        ahead = deadline - self.current_time()
        if ahead > 0:
            self._virtual_base += ahead

    def __repr__(self) -> str:
        threshold = self._autojump_threshold
        return f"<MockClock, time={self.current_time():.7f}, rate={self._rate:g}, autojump_threshold={threshold:g}>"
