"""The time limit of a test: a thread that watches the clock, and ends what takes too long.

    real time    what happens                                                  if it does not help
    -----------  ------------------------------------------------------------  -----------------------------
    the limit    all tasks are cancelled; the run ends with `TooSlowError`     somebody shields himself
    + a grace    the run is broken off on the spot

The loop is asked to do that, as with any call from another thread. If it does not get round to it, a task is stuck in
plain Python or in a call into C, or it is not the kernel's turn at all. Such code cannot be cancelled. But the thread
can see where it is, and writes that down at once, as nobody knows whether there will be a report later.

The limit is in real seconds, whatever clock the run has.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from typing import Final

from ..core.errors import CancelReason, TooSlowError
from ..core.loop import Kernel
from .phases import picture_of

__all__ = ["Alarm"]

GRACE: Final = 5.0
"""Seconds that a test gets to clean up when its time is up, and that the loop gets to react."""


class Alarm:
    """`Alarm(seconds, kernel, report)`, and `off()` when all is well. It belongs to the thread that makes it.

    Attributes:
        picture: once the time was up: the task tree as it was at that moment, else None.
    """

    def __init__(self, seconds: float, kernel: Kernel, report: Callable[[str], object]) -> None:
        self.picture: str | None = None
        self._seconds = seconds
        self._kernel = kernel
        self._report = report
        self._watched = threading.get_ident()
        self._off = threading.Event()
        self._rung = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kernel test alarm", daemon=True)
        self._thread.start()

    def off(self) -> None:
        """End the thread. May be called twice."""
        self._off.set()
        self._rung.set()
        self._thread.join()

    def _watch(self) -> None:
        if self._off.wait(self._seconds):
            return
        self._kernel.call_soon(self._ring)
        if self._off.wait(GRACE):
            return
        if not self._rung.is_set():
            self._take_picture()
            self._report(
                f"the time limit of {self._seconds:g} s is over, and the loop does not get to run:\n{self.picture}"
            )
            self._rung.wait()
            if self._off.wait(GRACE):
                return
        self._kernel.call_soon(self._ring)  # the second verdict does not wait

    def _ring(self) -> None:
        """The time is up. Runs in the loop."""
        if self._off.is_set():
            return
        error = TooSlowError(f"the test was still running after {self._seconds:g} s, its time limit")
        if self._rung.is_set():
            error = TooSlowError(f"it was broken off: its time was up, and {GRACE:g} s after that it had not left")
        self._rung.set()
        if self.picture is None:
            self.picture = picture_of(self._kernel)
        self._kernel.condemn(error, CancelReason("deadline", reason="the time limit of the test"))

    def _take_picture(self) -> None:
        picture = picture_of(self._kernel)
        if self._kernel.current is None:  # then the tree does not tell what the thread does
            frame = sys._current_frames().get(self._watched)
            picture += "What runs instead:\n" + "".join(traceback.format_stack(frame))
        self.picture = picture
