"""What the explorer has to say: that all is well, or which run went wrong, as a table.

One column per task, one row per step; in the cell what the step ended with:

    step | main                | A                          | B
    -----|---------------------|----------------------------|--------------------
       1 | Join of <Nursery>   |                            |
       2 |                     | checkpoint, line 12        |
         |                     | <- cancelled               |
       3 |                     | returns                    |
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from outcome import Error

from ..core.task import Task

__all__ = ["Exploration", "InvariantError", "LeakError", "ScheduleFailure", "TooManySteps"]


class ScheduleFailure(AssertionError):
    """A schedule under which the program fails. The text has the error, a table of the run, and how to replay it.

    Attributes:
        schedule: the shrunk schedule, for `replay`.
        error: what the run ended with; also the `__cause__`.
        schedules: how many schedules had been run when it was found.
    """

    def __init__(self, text: str, schedule: str, error: BaseException, schedules: int) -> None:
        super().__init__(text)
        self.schedule = schedule
        self.error = error
        self.schedules = schedules


class InvariantError(AssertionError):
    """An invariant does not hold between two steps, or a check not after the run: it has returned False."""


class LeakError(AssertionError):
    """The run has left something behind: a timer, a wait for a file, an open async generator, a file descriptor."""


class TooManySteps(AssertionError):
    """The run does not seem to end under this schedule: it has had too many steps, or too much time."""


@dataclass(frozen=True)
class Exploration:
    """What `explore` and `explore_cancellation` return when no schedule fails.

    Attributes:
        schedules: how many were run.
        complete: whether that was all there are.
        cancelled: in how many of them somebody was cancelled; None if that was not asked for.
    """

    schedules: int
    complete: bool
    cancelled: int | None = None

    def __str__(self) -> str:
        text = f"{'all ' if self.complete else ''}{self.schedules:,} schedules hold"
        if self.schedules == 1:
            text = "the only schedule holds" if self.complete else "one schedule holds"
        return text if self.cancelled is None else f"{text}, cancelled in {self.cancelled:,} of them"


_WIDTH = 40
_PACKAGE = str(Path(__file__).parent.parent)


@dataclass
class _Row:
    """One step: whose, and what it ended with. Or, without a number, a cancellation between two steps."""

    task: Task
    name: str
    number: int | None
    what: str = ""

    def settle(self) -> None:
        """The step is over: the task is where it is."""
        outcome = self.task.outcome
        if outcome is not None:
            self.what += f"raises {type(outcome.error).__name__}" if isinstance(outcome, Error) else "returns"
            return
        if not self.what or self.what.endswith(", "):
            self.what += "checkpoint"
        lines = [n for frame, n in self.task.iter_await_frames() if not frame.f_code.co_filename.startswith(_PACKAGE)]
        if lines:
            self.what += f", line {lines[-1]}"


class Rows:
    """What the tasks of the program did in a run. Each step is looked at when the next one begins."""

    def __init__(self) -> None:
        self._rows: list[_Row] = []
        self._open: _Row | None = None  # the step that goes on, if it is one of the program's
        self._steps = 0
        self.cancelled = ""  # who was cancelled, and when

    def begin(self, task: Task) -> None:
        """A step of `task` begins."""
        self.settle()
        if task.parent_nursery is not None:
            self._steps += 1
            self._open = _Row(task, task.name, self._steps)
            self._rows.append(self._open)

    def trapped(self, task: Task, trap: Any) -> None:
        """The step ends with `trap`."""
        if self._open is not None:
            what = re.sub(r" at 0x[0-9a-f]+", "", repr(trap)).strip("<>")
            self._open.what += what if len(what) <= _WIDTH else what[: _WIDTH - 3] + "..."

    def settle(self) -> None:
        """No step goes on any more."""
        if self._open is not None:
            self._open.settle()
            self._open = None

    def cancel_between(self, who: str, task: Task, *, idle: bool) -> None:
        """A scope of `task` is cancelled between two steps; while all sleep, if `idle`."""
        self.settle()
        when = f"before step {self._steps + 1}" if not idle else f"after step {self._steps}, while all slept"
        self.cancelled = f"{who} was cancelled {when}"
        self._rows.append(_Row(task, task.name, None, "<- cancelled"))

    def cancel_inside(self, who: str) -> None:
        """A scope is cancelled in the middle of the step that goes on, where an operation looks for that."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        line = f" in line {frame.f_lineno}" if frame is not None else ""
        self.cancelled = f"{who} was cancelled in step {self._steps},{line}"
        if self._open is not None:
            self._open.what = f"cancelled{line}, "

    def table(self) -> str:
        columns = list(dict.fromkeys(row.task for row in self._rows))
        names = {row.task: row.name for row in self._rows}
        widths = [max(len(names[task]), *(len(row.what) for row in self._rows if row.task is task)) for task in columns]
        head = ["step", *(names[task].ljust(width) for task, width in zip(columns, widths, strict=True))]
        lines = [" | ".join(head).rstrip(), "-|-".join(["----", *("-" * width for width in widths)])]
        for row in self._rows:
            cells = [
                (row.what if row.task is task else "").ljust(width) for task, width in zip(columns, widths, strict=True)
            ]
            number = "" if row.number is None else row.number
            lines.append(" | ".join([f"{number:>4}", *cells]).rstrip())
        return "\n".join(lines)
