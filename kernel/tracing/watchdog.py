"""The watchdog: who blocks the loop?

All tasks share one thread, so one that computes for a second, or calls a function that blocks, stops all others for a
second. `Watchdog` is an instrument with a thread of its own, which notices while it happens and shows the line:

    kernel.run(main, instruments=[Watchdog(0.1)])

It costs the loop nothing: no clock is read at a step, no counter counts. The thread looks in now and then, and leaves a
mark where every step writes anyway, in `kernel.budget`. If the same task runs and the mark is still there when it looks
again, no step has begun in between. The mark is a budget of minus infinity, so a task that does a great many
operations without ever blocking yields at the next one; the idea is that of `sysmon` in Go's scheduler.

    look        task   budget     so
    ---------   ----   --------   -----------------------------------------
    1st         ann    127        a step we have not seen: leave the mark
    2nd         ann    -inf       the same step, since the 1st look at least
    3rd, ...    ann    -inf       and longer than the threshold: report, once
    later       ann    128        another step: leave the mark
    or          none              the loop sleeps, which is what it should do

What it does not see: what runs in no task, such as calls left with `run_sync_soon` or hooks of other instruments; and a
call into C that keeps the interpreter to itself, until that returns.
"""

from __future__ import annotations

import linecache
import logging
import threading
import time
from collections.abc import Callable
from math import inf

from ..abc import Instrument
from ..core.loop import Kernel
from ..core.task import Task, current_kernel
from .tree import running_stack

__all__ = ["Watchdog"]

_log = logging.getLogger("kernel.watchdog")


class Watchdog(Instrument):
    """An instrument that reports, once, each task step that runs longer than `threshold` seconds, while it does.

    Args:
        threshold: seconds, above 0. A step is seen when it has lasted 1 to 1.5 times as long.
        report: called with the text, in the watchdog's thread; by default a warning of the logger "kernel.watchdog".

    The text has the task and its stack at that moment. Pass it to `kernel.run`: one that is added later, with
    `add_instrument`, is not told of the run's begin and does nothing; one that is removed goes on until the run has
    ended. One instance watches one run at a time, and any number one after the other.

    Raises:
        ValueError: `threshold` is no such number.
    """

    def __init__(self, threshold: float = 0.1, report: Callable[[str], object] | None = None) -> None:
        if not 0 < threshold < inf:
            raise ValueError(f"threshold must be a number of seconds above 0, not {threshold!r}")
        self.threshold = threshold
        self._report = report if report is not None else _log.warning
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        # The step that bears our mark, since when it does, and whether it was reported.
        self._marked: Task | None = None
        self._since = 0.0
        self._reported = False

    def before_run(self) -> None:
        """Start the thread."""
        if self._thread is not None:
            raise RuntimeError("a Watchdog watches one run at a time; make one for each")
        self._stop.clear()
        args = (current_kernel(),)
        self._thread = threading.Thread(target=self._watch, args=args, name="kernel watchdog", daemon=True)
        self._thread.start()

    def after_run(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = self._marked = None

    def _watch(self, kernel: Kernel) -> None:
        """The thread."""
        while kernel.running and not self._stop.wait(self.threshold / 4):
            text = self._look(kernel, time.monotonic())
            if text is not None:
                try:
                    self._report(text)
                except Exception:
                    _log.exception("%r, which a Watchdog was to report to, has raised", self._report)

    def _look(self, kernel: Kernel, now: float) -> str | None:
        """Look in once: see the module's docstring. Returns what there is to report."""
        task = kernel.current  # which a new step sets a moment before the budget: hence both are compared
        if task is None:
            self._marked = None
        elif task is not self._marked or kernel.budget != -inf:
            self._marked, self._since, self._reported = task, now, False
            kernel.budget = -inf
        elif now - self._since >= self.threshold and not self._reported:
            self._reported = True
            return _describe(task, now - self._since)
        return None


def _describe(task: Task, seconds: float) -> str:
    lines = [
        f"task {task.name!r} has run for {seconds:.3f} s without letting others run, and holds up all of them. "
        "It is here now:"
    ]
    for code, number in running_stack(task):
        lines.append(f'  File "{code.co_filename}", line {number}, in {code.co_name}')
        text = linecache.getline(code.co_filename, number).strip()
        if text:
            lines.append(f"    {text}")
    return "\n".join(lines)
