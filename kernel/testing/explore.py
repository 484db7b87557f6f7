"""Exploring: run a program under many schedules, and show the one that breaks it.

    explore(program)                        all schedules, or the first million
    explore(program, strategy="random")     some, from a seed
    explore_cancellation(program)           cancelled at its first cancel point, then at its second, and so on
    replay(program, "1(3)2")                the one that failed, with a table of what happened
    run_with("1(3)2", program, *args)       one, for property-based tests: see `strategies`

A test runs a concurrent program once, in the order that the kernel happens to choose. The bug is in another order. The
kernel chooses in few places, and all of them are ports: which ready task runs next is the ready queue's business,
whether a budgeted operation yields is the budget's, when a deadline passes is the clock's. Here a *schedule* makes
these choices (`kernel.testing.schedules`), so a run is a list of small numbers, and all runs are all such lists. Whom
to cancel, and where, is one more choice (`kernel.testing.targets`).

What is run is the core with a virtual clock and without files: no system call, and 0.03 milliseconds for a run of ten
steps. Programs that use threads, real sockets or the real time are not repeatable, and refused when that shows. Only
`explore_cancellation` takes them too, with `real=True`.

A failure is an exception that leaves the program, a deadlock, an invariant that does not hold between two steps, a
check that fails when all is over, a leak, or a run that does not end. The schedule that led to it is shrunk to as few
deviations from first come, first served as will do, and told as a short string.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from math import inf
from textwrap import indent
from typing import IO, Any, Final, Literal

from outcome import Outcome

from ..boot import Kernel
from ..core.errors import Cancelled, CancelReason, KernelInternalError
from ..core.loop import BUDGET
from ..core.nursery import AsyncFn
from ..core.ports import Clock
from ..core.task import START, Task, name_of
from ..inbox import wind_up
from .closed_world import Generators, NoFiles, VirtualClock, Watched, files_left, open_files, what_is_left
from .footprints import Footprints
from .pruning import Pruned, PrunedSchedule
from .report import Exploration, InvariantError, LeakError, Rows, ScheduleFailure, TooManySteps
from .schedules import PCT, Exhaustive, Random, Recorded, Schedule, cancellations, from_text
from .targets import Targets, Whom, cancel_target

__all__ = [
    "Exploration",
    "InvariantError",
    "LeakError",
    "ScheduleFailure",
    "TooManySteps",
    "cancel_target",
    "explore",
    "explore_cancellation",
    "replay",
    "run_with",
]

Errors = type[BaseException] | tuple[type[BaseException], ...]

_STRIDE: Final = 100_000  # how many steps a pass may have: when it ends is the schedule's choice, and not a number's
_FAILED: Final = CancelReason("shutdown", reason="the schedule has failed")
_ASLEEP: Final = CancelReason("shutdown", reason="the program would sleep for ever")


@dataclass(frozen=True)
class _Options:
    """How a program is run, whatever the schedule. See `explore` and `explore_cancellation`."""

    invariant: Callable[[], object] | None = None
    check: Callable[[], object] | None = None
    cancel: Whom | None = None
    may_raise: Errors = ()
    may_leak: bool = False
    deadlines: Literal["idle", "any time"] = "idle"
    max_steps: int = 10_000
    real: bool = False
    clock: Clock | None = None
    seconds: float = 10.0


# ---- one run ----------------------------------------------------------------------------------------


class _OpenKernel(Kernel):
    """The kernel as it is, but that it notes what the tasks have left behind."""

    def __init__(self, run: _Run, clock: Clock | None) -> None:
        super().__init__(clock=clock, ready=run.ready)
        self.poller: Any = Watched(self.poller, run, run.ready)
        self.left: list[str] = []
        self._asyncgens = self._generators = Generators(self)

    def finish(self) -> Outcome[Any] | None:
        self.left = what_is_left(self) + self._generators.left()
        return super().finish()


class _ClosedKernel(Kernel):
    """A kernel in a closed world. A run is not surrounded by what only the world outside needs: half the cost."""

    def __init__(self, run: _Run) -> None:
        super().__init__(clock=VirtualClock(), poller=NoFiles(run), ready=run.ready)
        self.left: list[str] = []
        self._asyncgens = self._generators = Generators(self)
        self.instruments._on = True  # should there ever be any
        self._stride = _STRIDE

    def start(self, async_fn: AsyncFn, args: tuple[Any, ...], *, signal_wakeup: bool = False) -> None:
        self.begin()
        self._generators.take_hooks()
        try:
            self.plant(async_fn, args, self._generators.close_all)
        except BaseException:
            self.finish()
            raise

    def finish(self) -> Outcome[Any] | None:
        self.left = what_is_left(self) + self._generators.left()
        try:
            wind_up(self)
            while self.soon:
                self.soon.popleft()()
        finally:
            outcome = self.end()
            self._generators.restore()
        return outcome


class _Ready(list[Task]):
    """The ready queue: what runs next is the schedule's choice. Before that, the run looks around."""

    __slots__ = ("_run",)

    def __init__(self, run: _Run) -> None:
        self._run = run

    def popleft(self) -> Task:
        run = self._run
        run.steps = steps = run.steps + 1
        if steps > run.quiet or run.kernel.soon:
            run.look()
        task = self.pop() if len(self) == 1 else self.pop(run.schedule.pick(self))
        if run.rows is not None:
            run.rows.begin(task)
        return task


class _ReadyToBeCancelled(_Ready):
    """The same where somebody can be cancelled."""

    __slots__ = ()

    def append(self, task: Task, /) -> None:
        if task.step is START and self._run.targets is not None:
            self._run.targets.meet(task)
        super().append(task)


class _ReadyObserved(_ReadyToBeCancelled):
    """The same for a schedule that looks at each step."""

    __slots__ = ()

    def append(self, task: Task, /) -> None:
        super().append(task)
        schedule = self._run.schedule
        assert isinstance(schedule, PrunedSchedule)
        schedule.woken(task)

    def popleft(self) -> Task:
        run = self._run
        run.steps += 1
        run.look()
        return self.pop(run.schedule.pick(self))


class _Budget:
    """The budget: the loop assigns it at each step; operations take one away, and look whether it is below 0."""

    __slots__ = ("_charged", "_operations", "_run", "step")

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._charged = False  # whether an operation was paid for since somebody looked
        self.step = 0  # the last one in which that was so, and how many operations there were in it
        self._operations = 0

    def __sub__(self, operations: int) -> _Budget:
        self._charged = True
        return self

    def __lt__(self, other: object) -> bool:
        charged, self._charged = self._charged, False
        run = self._run
        task = run.kernel.current
        if task is None or task.parent_nursery is None:
            return False  # the root task: when it yields is the kernel's own business
        if run.targets is not None:
            run.targets.inside_step(task)
        if not charged:
            return False
        if self.step != run.steps:
            self.step, self._operations = run.steps, 0
        self._operations += 1
        return self._operations >= BUDGET or run.schedule.pause() == 1


class _Run:
    """A program's runs: a kernel whose ready queue and budget ask the schedule."""

    def __init__(self, options: _Options, *, observed: bool = False) -> None:
        self._options = options
        self.looks = options.invariant is not None or options.cancel is not None or options.deadlines == "any time"
        self.quiet = 0 if self.looks else options.max_steps  # up to that step there is nothing to look at
        self.schedule: Schedule = Recorded()
        self.rows: Rows | None = None  # what happens, if that is to be shown
        self.targets: Targets | None = None  # who can be cancelled, if anybody
        self.steps = 0
        self.result: Any = None  # what the program has returned
        kind = _ReadyObserved if observed else _Ready if options.cancel is None else _ReadyToBeCancelled
        self.ready = kind(self)
        self.kernel = _OpenKernel(self, options.clock) if options.real else _ClosedKernel(self)
        self.budget = _Budget(self)
        self.kernel.allowance = self.budget  # type: ignore[assignment]

    def run(self, program: AsyncFn, schedule: Schedule) -> BaseException | None:
        """Run the program once; return what it failed with."""
        options, kernel = self._options, self.kernel
        self.schedule = schedule
        self.steps = self.budget.step = 0
        kernel.locals[Schedule] = schedule  # for what is not a matter of the kernel's, such as the fate of a packet
        if options.cancel is not None:
            kernel.locals[Targets] = self.targets = Targets(options.cancel, kernel, schedule, self.rows)
        self.result = None
        try:
            if isinstance(kernel, _OpenKernel):
                kernel.poller.end = time.monotonic() + options.seconds
                self.result = kernel.run(program)
            else:
                self.result = kernel._run(program, ()).unwrap()
        except KeyboardInterrupt:
            raise
        except KernelInternalError as error:
            return error.__cause__ or error
        except BaseException as error:
            if not _all_are(error, self._forgiven()):
                return error
        finally:
            if self.rows is not None:
                self.rows.settle()
        if kernel.left and not options.may_leak:
            return LeakError(f"the run has left behind: {', '.join(kernel.left)}")
        return None if options.check is None else _fault_of(options.check)

    def _forgiven(self) -> tuple[type[BaseException], ...]:
        """What the program may end with, as somebody was cancelled."""
        if self.targets is None or not self.targets.cancelled:
            return ()
        wanted = self._options.may_raise
        # If it was `asleep_for_ever` who did it, there is no scope of ours that would catch it.
        ours = () if self.targets.chosen else (Cancelled,)
        return (*ours, *wanted) if isinstance(wanted, tuple) else (*ours, wanted)

    def look(self) -> None:
        """Between two steps."""
        options, kernel = self._options, self.kernel
        if self.steps > options.max_steps:
            self._fail(TooManySteps(f"the run has not ended after {options.max_steps:,} steps"))
        if options.invariant is not None and kernel.main_nursery is not None:
            error = _fault_of(options.invariant)
            if error is not None:
                self._fail(error)
        if self.targets is not None:
            self.targets.between_steps()
        if options.real:
            return
        if options.deadlines == "any time":
            self._let_time_pass()
        while kernel.soon and self.schedule.choose(2):  # the pass, which may end anywhere, ends here
            kernel.current = None
            kernel.soon.popleft()()

    def _let_time_pass(self) -> None:
        """A step may take any time, so the next deadline may pass before the next step."""
        kernel = self.kernel
        while (deadline := kernel.timers.next_deadline()) < inf and self.schedule.choose(2):
            kernel.current = None
            kernel.clock.autojump(deadline)
            for timed in kernel.timers.expired(deadline):
                timed.expire(kernel)

    def idle(self) -> None:
        """The loop looks for events."""
        if self.ready:
            return
        if isinstance(self.schedule, PrunedSchedule):
            self.schedule.all_sleep(was_question=self.looks or bool(self.kernel.soon))
        if self.targets is not None:
            self.targets.while_asleep()

    def asleep_for_ever(self) -> None:
        """Nothing happens any more. A program that was to be cancelled, and was not, may well wait for that."""
        kernel = self.kernel
        if self.ready or kernel.main_nursery is None:
            return
        if isinstance(kernel, _OpenKernel):
            kernel.poller.end = time.monotonic() + self._options.seconds
        if self.targets is not None and not self.targets.cancelled and kernel._verdict is None:
            self.targets.cancelled = True
            kernel.main_nursery.cancel_scope._cancel(_ASLEEP)
        else:
            self._fail(TooManySteps("the run does not end: its tasks sleep, and nothing happens any more"))

    def _fail(self, error: BaseException) -> None:
        """The schedule has failed, and no task of the program knows. End the run; at once, if that was tried before."""
        if self.kernel._verdict is None:
            self.steps = 0
            self.kernel.condemn(error, _FAILED)
        elif isinstance(error, TooManySteps):
            raise self.kernel._verdict


def _fault_of(function: Callable[[], object]) -> BaseException | None:
    """What an invariant or a check says against the program."""
    try:
        return None if function() is not False else InvariantError(f"{name_of(function)} does not hold")
    except Exception as error:
        return error


def _all_are(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_all_are(one, kinds) for one in error.exceptions)
    return isinstance(error, kinds)


# ---- many runs --------------------------------------------------------------------------------------


def explore(
    program: AsyncFn,
    *,
    strategy: Literal["exhaustive", "random", "pct"] = "exhaustive",
    schedules: int | None = None,
    seed: int = 0,
    depth: int = 3,
    cancel: Whom | None = None,
    invariant: Callable[[], object] | None = None,
    check: Callable[[], object] | None = None,
    may_raise: type[BaseException] | tuple[type[BaseException], ...] = (),
    may_leak: bool = False,
    deadlines: Literal["idle", "any time"] = "idle",
    max_steps: int = 10_000,
    shares: Literal["anything", "kernel objects"] = "anything",
) -> Exploration:
    """Run `program` under many schedules; raise `ScheduleFailure` for the first under which it fails.

    `program` is an async function without arguments, or a generator function. It must make its own state afresh each
    time, and do nothing but what the kernel decides: no threads, files, real time or unseeded random numbers.

    Args:
        strategy: "exhaustive", depth first; "random"; or "pct" (see `schedules.PCT`).
        schedules: how many at most; by default 1,000,000 for "exhaustive", 1,000 for the others.
        seed: of "random" and "pct". The same seed gives the same schedules.
        depth: of "pct".
        cancel: whom to cancel, once in each run and at any place; see `explore_cancellation`. By default nobody.
        invariant: called between any two steps; the schedule fails if it raises, or returns False.
        check: the same, called when the run is over, if it has not failed.
        may_raise: errors that a program that was cancelled may end with.
        may_leak: whether it may leave timers or open async generators behind.
        deadlines: when one may pass: when nothing else can happen, or also while tasks are ready, as a step may take
            any time.
        max_steps: a run with more steps fails.
        shares: what the tasks of the program share. If that is nothing but kernel objects, say so, and schedules that
            only swap steps which have nothing to do with one another are left out; see `pruning`. Values may go
            through channels, if the sender lets go of them. For "exhaustive", and without an invariant: it would see
            what is left out.

    Raises:
        ScheduleFailure: with the shrunk schedule and a table of the run.
        ValueError: the program is not deterministic, or an argument is out of range.
        RuntimeError: called inside a running kernel.
    """
    limit = schedules if schedules is not None else 1_000_000 if strategy == "exhaustive" else 1_000
    options = _Options(invariant, check, cancel, may_raise, may_leak, deadlines, max_steps)
    prune = shares == "kernel objects"
    if not prune and shares != "anything":
        raise ValueError(f"shares must be 'anything' or 'kernel objects', not {shares!r}")
    if prune and (strategy != "exhaustive" or invariant is not None):
        raise ValueError("shares='kernel objects' is for the exhaustive strategy, and without an invariant")
    run = _Run(options, observed=prune)
    if prune:  # once as it is, for what the program imports while it runs: its classes are to be watched, too
        _Run(options).run(program, Recorded())
    footprints = Footprints(run.kernel) if prune else None
    space = Exhaustive() if footprints is None else Pruned(footprints)
    number = cancelled = 0
    error = None
    with nullcontext() if footprints is None else footprints.watching():
        for schedule in islice(_schedules(strategy, space, run, seed, depth), limit):
            number += 1
            error = run.run(program, schedule)
            if error is not None:
                break
            cancelled += run.targets is not None and run.targets.chosen
    if error is None:
        return Exploration(number, space.covered, cancelled if cancel is not None else None)
    shrunk = _shrink(program, options, schedule.made, error)
    raise _failure(program, options, shrunk, number) from error


def _schedules(strategy: str, space: Iterable[Any], run: _Run, seed: int, depth: int) -> Iterator[Any]:
    """The schedules to run, each asked for when the one before it has been run."""
    if strategy == "exhaustive":
        yield from space
        return
    if strategy not in ("random", "pct"):
        raise ValueError(f"strategy must be 'exhaustive', 'random' or 'pct', not {strategy!r}")
    yield Recorded()  # first come, first served; it tells how long a run is
    steps, places = run.steps, max(run.targets.places, 1) if run.targets is not None else 1
    for number in count():
        if strategy == "random":
            yield Random(f"{seed}:{number}", places=places)
        else:
            schedule = PCT(f"{seed}:{number}", depth=depth, steps=steps, places=places)
            yield schedule
            steps = max(steps, schedule.steps)


def explore_cancellation(
    program: AsyncFn,
    *,
    cancel: Whom = "program",
    invariant: Callable[[], object] | None = None,
    check: Callable[[], object] | None = None,
    may_raise: type[BaseException] | tuple[type[BaseException], ...] = (),
    may_leak: bool = False,
    max_steps: int = 10_000,
    real: bool = False,
    clock: Clock | None = None,
    seconds: float = 10.0,
) -> Exploration:
    """Run `program` and cancel it at the first place where that is possible; then run it and cancel it at the second;
    and so on, until it ends before that. Raise `ScheduleFailure` for the first run that fails.

    Ready tasks run first come, first served. (`explore(program, cancel=...)` cancels at every place of every schedule.)
    A place is before each step, while all sleep, and where an operation looks for a cancellation without yielding: all
    moments at which `scope.cancel()` can have an effect of its own.

    A run must end, without an exception, without leaving anything behind: no timer, no wait, no open async generator,
    and with `real`, on Linux, no open file. A program that sleeps for ever and waits to be cancelled is cancelled then.

    Args:
        program: as for `explore`; with `real`, it may do anything.
        cancel: whom. "program": the main task and all it has started. "tasks": at each place, each task in turn, alone,
            as `TaskHandle.cancel` would; or a function that is called with each new task and says whether it is to be
            cancelled. "targets": the `cancel_target()` blocks of the program.
        invariant: called between any two steps; the run fails if it raises, or returns False.
        check: the same, called when the run is over, if it has not failed.
        may_raise: errors that the program may end with if somebody was cancelled: when a single task is, others may
            have to notice. They may come in groups.
        may_leak: whether something may be left behind.
        max_steps: a run with more steps fails.
        real: use the real clock, real files, sockets, threads, processes. Such runs may differ from one another, so a
            place may be missed; the program should end by itself in good time.
        clock: with `real`, another clock: `MockClock(autojump_threshold=0.01)` for virtual time beside real sockets.
        seconds: with `real`, how many real seconds a run may take.

    Returns:
        how many runs there were, and in how many somebody was cancelled: in all but one, as a rule.

    Raises:
        ScheduleFailure: the text says who was cancelled when and where, with a table of the run.
        RuntimeError: called inside a running kernel.
    """
    options = _Options(
        invariant, check, cancel, may_raise, may_leak, "idle", max_steps, real, clock, seconds
    )  # fmt: skip
    run = _Run(options)
    number = 0
    for number, schedule in enumerate(chain([Recorded()], cancellations())):
        if real:
            error, rows = _run_and_record(program, options, schedule)
        else:
            error, rows = run.run(program, schedule), None
        if error is not None:
            raise _failure(program, options, schedule, max(number, 1), error, rows) from error
    return Exploration(number, True, number - 1)  # the last one has come to its end, as the first one had


def _shrink(program: AsyncFn, options: _Options, choices: list[int], error: BaseException) -> Recorded:
    """Fewer deviations with an error of the same kind: leave out halves, then single ones, then make them small."""

    def fails(candidate: list[int]) -> bool:
        run = _Run(options)
        found = run.run(program, Recorded(candidate))
        same = found is not None and _kind(found) == _kind(error)
        if run.kernel._closed:  # its tasks were thrown away. Now, or their clean-up runs in the midst of the next run
            del found, run
            gc.collect()
        return same

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
    return Recorded(choices)


def _kind(error: BaseException) -> object:
    """Errors that are alike in this are taken for the same bug."""
    if isinstance(error, BaseExceptionGroup):
        return (BaseExceptionGroup, frozenset(_kind(one) for one in error.exceptions))
    return type(error)


def _failure(
    program: AsyncFn,
    options: _Options,
    schedule: Recorded,
    number: int,
    error: BaseException | None = None,
    rows: Rows | None = None,
) -> ScheduleFailure:
    """What to raise. Without `rows`, the program is run once more for them."""
    text = str(schedule)
    if rows is None:
        error, rows = _run_and_record(program, options, from_text(text))
    assert error is not None
    name = name_of(program)
    parts = [f"{name} fails with {_told(error)}"]
    if options.cancel is not None:
        parts[0] += f"\n{rows.cancelled or 'Nobody was cancelled'}."
    parts.append(rows.table())
    if not schedule.place:
        deviations = sum(choice > 0 for choice in schedule.choices)
        parts.append(
            f"Schedule {number:,} was the first to fail; shrunk, it deviates {deviations} times from first come, first "
            "served."
        )
    parts.append(f"To see it again: kernel.testing.replay({name}, {text!r}{_as_written(options)})")
    return ScheduleFailure("\n\n".join(parts), text, error, number)


def _told(error: BaseException) -> str:
    """An error in words. Of a group, what is in it."""
    if isinstance(error, BaseExceptionGroup):
        return f"{type(error).__name__} of\n" + indent("\n".join(map(_told, error.exceptions)), "  ")
    return f"{type(error).__name__}: {error}"


def _as_written(options: _Options) -> str:
    """What else `replay` must be told, beside the functions and what concerns failures only."""
    told = {
        name: value
        for name in ("cancel", "deadlines", "real")
        if (value := getattr(options, name)) != getattr(_Options, name)
    }
    return "".join(f", {name}={name_of(value) if callable(value) else repr(value)}" for name, value in told.items())


def replay(
    program: AsyncFn,
    schedule: str,
    *,
    cancel: Whom | None = None,
    invariant: Callable[[], object] | None = None,
    check: Callable[[], object] | None = None,
    may_raise: type[BaseException] | tuple[type[BaseException], ...] = (),
    may_leak: bool = False,
    deadlines: Literal["idle", "any time"] = "idle",
    max_steps: int = 10_000,
    real: bool = False,
    clock: Clock | None = None,
    seconds: float = 10.0,
    file: IO[str] | None = None,
) -> None:
    """Run `program` under one schedule, as told by a `ScheduleFailure`; print what happened as a table.

    One column per task, one row per step; in the cell what the step ended with. To `file`, by default `sys.stdout`. The
    other arguments must be those `explore` or `explore_cancellation` was given.

    Raises:
        BaseException: what the program fails with.
        ValueError: `schedule` is no schedule.
    """
    options = _Options(
        invariant, check, cancel, may_raise, may_leak, deadlines, max_steps, real, clock, seconds
    )  # fmt: skip
    error, rows = _run_and_record(program, options, from_text(schedule))
    print(rows.table(), file=file if file is not None else sys.stdout)
    if error is not None:
        raise error


def run_with(
    schedule: str,
    program: AsyncFn,
    *args: Any,
    cancel: Whom | None = None,
    invariant: Callable[[], object] | None = None,
    check: Callable[[], object] | None = None,
    may_raise: Errors = (),
    may_leak: bool = False,
    deadlines: Literal["idle", "any time"] = "idle",
    max_steps: int = 10_000,
) -> Any:
    """Run `program(*args)` under one schedule, such as one of `strategies.any_schedule()`; return what it returns.

    If it fails, the error has a note with the table of the run. The keyword arguments are those of `explore`. Where the
    schedule does not fit, as it was not made for this program, the last option is taken.

    Returns:
        what the program returns; None if it was cancelled, or ended with an error that it may end with.

    Raises:
        BaseException: what the program fails with.
        ValueError: `schedule` is no schedule.
    """
    options = _Options(invariant, check, cancel, may_raise, may_leak, deadlines, max_steps)
    bound = partial(program, *args)
    run = _Run(options)
    error = run.run(bound, from_text(schedule))
    if error is not None:
        _, rows = _run_and_record(bound, options, from_text(schedule))
        error.add_note(f"Schedule {schedule!r}. {rows.cancelled}\n{rows.table()}")
        raise error
    return run.result


def _run_and_record(program: AsyncFn, options: _Options, schedule: Schedule) -> tuple[BaseException | None, Rows]:
    """Run the program once, in a kernel of its own, and note what happens."""
    files = open_files() if options.real else {}
    run = _Run(options)
    rows = run.rows = Rows()
    run.kernel.trapped = rows.trapped
    try:
        error = run.run(program, schedule)
    finally:
        run.kernel.close()
    if error is None and options.real and not options.may_leak and (left := files_left(files)):
        error = LeakError(f"the run has left behind: {', '.join(left)}")
    return error, rows
