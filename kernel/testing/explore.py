"""Exploring: run a program under many schedules, and show the one that breaks it.

    explore(program)                        all schedules, or the first million
    explore(program, strategy="random")     some, from a seed
    replay(program, "1(3)2")                the one that failed, with a table of what happened

A test runs a concurrent program once, in the order that the kernel happens to choose. The bug is in another order. The
kernel chooses in few places, and all of them are ports: which ready task runs next is the ready queue's business,
whether a budgeted operation yields is the budget's, when a deadline passes is the clock's. Here a *schedule* makes
these choices (`kernel.testing.schedules`), so a run is a list of small numbers, and all runs are all such lists.

What is run is the core with a virtual clock and without files: no system call, a hundredth of a millisecond per run.
Programs that use threads, real sockets or the real time are not repeatable, and refused when that shows.

A failure is an exception that leaves the program, a deadlock, an invariant that does not hold between two steps, or a
run that does not end within `max_steps`. The schedule that led to it is shrunk to as few deviations from first come,
first served as will do, and told as a short string.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import inf
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

from outcome import Error

from ..boot import Kernel
from ..core.errors import CancelReason, KernelInternalError
from ..core.nursery import AsyncFn
from ..core.task import Task
from .schedules import PCT, Exhaustive, Random, Recorded, Schedule, decode, encode

__all__ = ["Exploration", "InvariantError", "ScheduleFailure", "TooManySteps", "explore", "replay"]


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


@dataclass(frozen=True)
class Exploration:
    """What `explore` returns when no schedule fails.

    Attributes:
        schedules: how many were run.
        complete: whether that was all there are.
    """

    schedules: int
    complete: bool

    def __str__(self) -> str:
        return f"all {self.schedules:,} schedules hold" if self.complete else f"{self.schedules:,} schedules hold"


class InvariantError(AssertionError):
    """An invariant does not hold between two steps."""


class TooManySteps(AssertionError):
    """The run does not seem to end under this schedule."""


@dataclass(frozen=True)
class _Options:
    """How a program is run, whatever the schedule."""

    invariant: Callable[[], object] | None = None
    deadlines_any_time: bool = False
    max_steps: int = 10_000


class _VirtualClock:
    """Stands still while anything can run, then jumps to the next deadline."""

    autojump_threshold = 0.0

    def __init__(self) -> None:
        self.now = 0.0
        self.current_time = partial(getattr, self, "now")

    def start_clock(self) -> None:
        self.now = 0.0

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return 0.0 if deadline <= self.now else inf

    def autojump(self, deadline: float) -> None:
        self.now = deadline


class _NoFiles:
    """The poller of a program without files."""

    def arm(self, fd: int, direction: int, task: Task) -> NoReturn:
        raise RuntimeError("a program that is explored cannot wait for files: the world outside is not repeatable")

    def disarm(self, fd: int, direction: int) -> None:
        raise AssertionError("unreachable: nothing was armed")

    def forget(self, fd: int) -> list[Task]:
        return []

    def poll(self, timeout: float) -> Iterable[Task]:
        return ()

    def wakeup(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __len__(self) -> int:
        return 0


class _Run:
    """A program's runs: a kernel whose ready queue and budget ask the schedule, and look around between two steps."""

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._ready: list[Task] = []
        self.schedule: Schedule = Recorded()
        self.steps = 0
        self._charged = False  # whether an operation has been paid for since the budget was last looked at
        self.rows: list[_Row] | None = None  # what happened, if that is to be shown
        self.kernel = Kernel(clock=_VirtualClock(), poller=_NoFiles(), ready=self)
        self.kernel.allowance = self  # type: ignore[assignment]

    def run(self, program: AsyncFn, schedule: Schedule) -> BaseException | None:
        """Run the program once; return what it failed with."""
        self.schedule = schedule
        self.steps = 0
        try:
            self.kernel._run(program, ()).unwrap()
        except KeyboardInterrupt:
            raise
        except KernelInternalError as error:
            return error.__cause__ or error
        except BaseException as error:
            return error
        return None

    # ---- as a ready queue ----

    def append(self, task: Task, /) -> None:
        self._ready.append(task)

    def __len__(self) -> int:
        return len(self._ready)

    def popleft(self) -> Task:
        ready, options = self._ready, self._options
        self.steps += 1
        if self.steps > options.max_steps:
            self._fail(TooManySteps(f"the run has not ended after {options.max_steps:,} steps"))
        if options.invariant is not None and self.kernel.main_nursery is not None:
            self._check(options.invariant)
        if options.deadlines_any_time:
            self._let_time_pass()
        if len(ready) == 1:
            task = ready.pop()
        elif isinstance(self.schedule, PCT):
            task = ready.pop(self.schedule.pick(ready))
        else:
            task = ready.pop(self.schedule.choose(len(ready)))
        if self.rows is not None:
            self.rows.append(_Row(task))
        return task

    def _let_time_pass(self) -> None:
        """A step may take any time, so the next deadline may pass before the next step."""
        kernel = self.kernel
        while (deadline := kernel.timers.next_deadline()) < inf and self.schedule.choose(2):
            kernel.clock.autojump(deadline)
            for timed in kernel.timers.expired(deadline):
                timed.expire(kernel)

    def _check(self, invariant: Callable[[], object]) -> None:
        try:
            if invariant() is False:
                self._fail(InvariantError("the invariant does not hold"))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """The schedule has failed, and no task of the program knows. End the run; at once, if that was tried before."""
        if self.kernel._verdict is None:
            self.steps = 0
            self.kernel.condemn(error, CancelReason("shutdown", reason="the schedule has failed"))
        elif isinstance(error, TooManySteps):
            raise self.kernel._verdict

    # ---- as a budget: the loop assigns it at each step, operations take one away and look whether it is below 0 ----

    def __sub__(self, operations: int) -> _Run:
        self._charged = True
        return self

    def __lt__(self, other: object) -> bool:
        charged, self._charged = self._charged, False
        task = self.kernel.current
        if not charged or task is None or task.parent_nursery is None:
            return False  # the root task: when it yields is the kernel's own business
        return self.schedule.choose(2) == 1


def explore(
    program: AsyncFn,
    *,
    strategy: Literal["exhaustive", "random", "pct"] = "exhaustive",
    schedules: int | None = None,
    seed: int = 0,
    depth: int = 3,
    invariant: Callable[[], object] | None = None,
    deadlines: Literal["idle", "any time"] = "idle",
    max_steps: int = 10_000,
) -> Exploration:
    """Run `program` under many schedules; raise `ScheduleFailure` for the first under which it fails.

    `program` is an async function without arguments, or a generator function. It must make its own state afresh each
    time, and do nothing but what the kernel decides: no threads, files, real time or unseeded random numbers.

    Args:
        strategy: "exhaustive", depth first; "random"; or "pct" (see `schedules.PCT`).
        schedules: how many at most; by default 1,000,000 for "exhaustive", 1,000 for the others.
        seed: of "random" and "pct". The same seed gives the same schedules.
        depth: of "pct".
        invariant: called between any two steps; the schedule fails if it raises, or returns False.
        deadlines: when one may pass: when nothing else can happen, or also while tasks are ready, as a step may take
            any time.
        max_steps: a run with more steps fails.

    Raises:
        ScheduleFailure: with the shrunk schedule and a table of the run.
        ValueError: the program is not deterministic, or an argument is out of range.
        RuntimeError: called inside a running kernel.
    """
    limit = schedules if schedules is not None else 1_000_000 if strategy == "exhaustive" else 1_000
    options = _Options(invariant, deadlines == "any time", max_steps)
    run = _Run(options)
    space = Exhaustive()
    number = 0
    for number, schedule in enumerate(islice(_schedules(strategy, space, run, program, seed, depth), limit), 1):
        error = run.run(program, schedule)
        if error is not None:
            choices = _shrink(program, options, schedule.made, error)
            raise _failure(program, options, choices, number) from error
        if run.kernel._closed:
            run = _Run(options)
    return Exploration(number, complete=space.covered)


def _schedules(strategy: str, space: Exhaustive, run: _Run, program: AsyncFn, seed: int, depth: int) -> Iterator[Any]:
    """The schedules to run, each asked for when the one before it has been run."""
    if strategy == "exhaustive":
        yield from space
    elif strategy == "random":
        number = 0
        while True:
            yield Random(f"{seed}:{number}")
            number += 1
    elif strategy == "pct":
        yield Recorded()  # first come, first served; it tells how long a run is
        steps, number = run.steps, 0
        while True:
            yield PCT(f"{seed}:{number}", depth=depth, steps=steps)
            number += 1
    else:
        raise ValueError(f"strategy must be 'exhaustive', 'random' or 'pct', not {strategy!r}")


def _shrink(program: AsyncFn, options: _Options, choices: list[int], error: BaseException) -> list[int]:
    """Fewer deviations with an error of the same kind: leave out halves, then single ones, then make them small."""

    def fails(candidate: list[int]) -> bool:
        found = _Run(options).run(program, Recorded(candidate))
        return found is not None and _kind(found) == _kind(error)

    size = len(choices)
    while size:
        for start in range(0, len(choices), size):
            part = choices[start : start + size]
            candidate = [*choices[:start], *[0] * len(part), *choices[start + size :]]
            if any(part) and fails(candidate):
                choices = candidate
        size //= 2
    for place, choice in enumerate(choices):
        for smaller in range(1, choice):
            candidate = [*choices[:place], smaller, *choices[place + 1 :]]
            if fails(candidate):
                choices = candidate
                break
    while choices and choices[-1] == 0:
        choices = choices[:-1]
    return choices


def _kind(error: BaseException) -> object:
    """Errors that are alike in this are taken for the same bug."""
    if isinstance(error, BaseExceptionGroup):
        return (BaseExceptionGroup, frozenset(_kind(one) for one in error.exceptions))
    return type(error)


def _failure(program: AsyncFn, options: _Options, choices: list[int], number: int) -> ScheduleFailure:
    error, table = _run_and_show(program, options, choices)
    assert error is not None
    text = encode(choices)
    name = getattr(program, "__qualname__", repr(program))
    deviations = sum(choice > 0 for choice in choices)
    return ScheduleFailure(
        f"{name} fails with {type(error).__name__}: {error}\n\n{table}\n\n"
        f"Schedule {number:,} was the first to fail; shrunk, it deviates {deviations} times from first come, first "
        f"served. To see it again: kernel.testing.replay({name}, {text!r})",
        text, error, number,
    )  # fmt: skip


def replay(
    program: AsyncFn,
    schedule: str,
    *,
    invariant: Callable[[], object] | None = None,
    deadlines: Literal["idle", "any time"] = "idle",
    max_steps: int = 10_000,
    file: IO[str] | None = None,
) -> None:
    """Run `program` under one schedule, as told by a `ScheduleFailure`; print what happened as a table.

    One column per task, one row per step; in the cell what the step ended with. To `file`, by default `sys.stdout`. The
    other arguments must be those `explore` was given.

    Raises:
        BaseException: what the program fails with.
        ValueError: `schedule` is no schedule.
    """
    error, table = _run_and_show(program, _Options(invariant, deadlines == "any time", max_steps), decode(schedule))
    print(table, file=file if file is not None else sys.stdout)
    if error is not None:
        raise error


# ---- the table ------------------------------------------------------------------------------------

_WIDTH = 40
_PACKAGE = str(Path(__file__).parent.parent)


class _Row:
    """One step: whose, what it ended with, and where in the program that is."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.name = task.name
        self.what = ""

    def ended(self) -> None:
        """The step is over: the task is where it is."""
        outcome = self.task.outcome
        if outcome is not None:
            self.what = f"raises {type(outcome.error).__name__}" if isinstance(outcome, Error) else "returns"
            return
        lines = [n for frame, n in self.task.iter_await_frames() if not frame.f_code.co_filename.startswith(_PACKAGE)]
        self.what = (self.what or "checkpoint") + (f", line {lines[-1]}" if lines else "")


def _run_and_show(program: AsyncFn, options: _Options, choices: list[int]) -> tuple[BaseException | None, str]:
    run = _Run(options)
    rows = run.rows = _Rows()

    def trapped(task: Task, trap: Any) -> None:
        what = re.sub(r" at 0x[0-9a-f]+", "", repr(trap)).strip("<>")
        rows[-1].what = what if len(what) <= _WIDTH else what[: _WIDTH - 3] + "..."

    run.kernel.trapped = trapped
    error = run.run(program, Recorded(choices))
    rows.settle()
    return error, _table([row for row in rows if row.task.parent_nursery is not None])


class _Rows(list[_Row]):
    """The steps of a run. Each is looked at when the next one begins."""

    def append(self, row: _Row) -> None:
        self.settle()
        super().append(row)

    def settle(self) -> None:
        if self:
            self[-1].ended()


def _table(rows: list[_Row]) -> str:
    columns = list(dict.fromkeys(row.task for row in rows))
    names = {row.task: row.name for row in rows}
    widths = [max(len(names[task]), *(len(row.what) for row in rows if row.task is task)) for task in columns]
    head = ["step", *(names[task].ljust(width) for task, width in zip(columns, widths, strict=True))]
    lines = [" | ".join(head).rstrip(), "-|-".join(["----", *("-" * width for width in widths)])]
    for number, row in enumerate(rows, 1):
        cells = [
            (row.what if row.task is task else "").ljust(width) for task, width in zip(columns, widths, strict=True)
        ]
        lines.append(" | ".join([f"{number:4}", *cells]).rstrip())
    return "\n".join(lines)
