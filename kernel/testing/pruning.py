"""Pruning: of all schedules that only swap steps that have nothing to do with one another, run one.

    A takes its lock  | B takes its lock      the same as      B takes its lock  | A takes its lock

Two schedules are equivalent if one becomes the other by swapping neighbouring steps of different tasks whose footprints
do not conflict (`footprints`). Each task then does the same in both, and they end alike. For a program whose tasks
share nothing but kernel objects, it is enough to run one of each class (A. Mazurkiewicz called a class a *trace*).

How to find one of each without running all: dynamic partial-order reduction, with source sets and sleep sets, after
P. Abdulla, S. Aronis, B. Jonsson, K. Sagonas, "Optimal Dynamic Partial Order Reduction" (POPL 2014), who built on
C. Flanagan, P. Godefroid, "Dynamic Partial-Order Reduction for Model Checking Software" (POPL 2005).

1. Run the program, first come, first served, and write down the footprint of each step. Step `i` *happens before* step
   `j` if they are of one task, or conflict, or `i` has woken the task of `j`; or if there is a chain of such pairs.
2. A *race* is a pair of steps of different tasks that conflict, with no other step in between by which the first would
   happen before the second anyway. They could have come the other way round. So at the point before the first of them,
   another task must be tried as well: one that can begin those steps up to the second that do not depend on the first.
3. When a task has been tried at some point, and then another one is, the first goes to *sleep* there. It need not be
   tried again until somebody has done a step that conflicts with its own.
4. Go back to the last point where a task is left to be tried, and run the program up to there and on.

Two things make it simpler here than in general. A ready task stays ready until it runs: nobody can disable its step.
And a step never fails to know what it does: its footprint is complete when it has ended.

What is not a question of which task runs (whom to cancel, whether a deadline passes while somebody is ready, whether
the pass ends here) is tried in all ways, and no step around such a question is swapped with any other. When all sleep
and the clock goes on to the next deadline, that is a wall: what was before stays before. Each operation yields, so that
it ends its step; that it had not yielded is the same as that its task was picked again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..core.task import Task
from .footprints import EVERYTHING, READ, UNNAMED, WRITE, Footprint, Footprints, conflict
from .schedules import NOT_DETERMINISTIC

__all__ = ["Pruned"]


class _Step:
    """A step of a run: whose, and what it has touched."""

    __slots__ = ("before", "joined", "left", "pick", "task", "touched", "woken_by")

    def __init__(self, task: int, woken_by: int, joined: int | None) -> None:
        self.task = task
        self.touched: Footprint = {}
        self.pick: _Pick | None = None  # where it was chosen; None if there was nothing to choose from
        self.woken_by = woken_by  # the step that has made its task ready; -1 if that was the task itself
        self.joined = joined  # the nursery whose end it has waited for
        self.left: int | None = None  # the nursery that its task has left, having ended
        self.before = 0  # the steps that happen before it, as bits


class _Pick:
    """A point at which one of several tasks was to be picked. Tasks are names, so that they mean the same in all runs.

    Invariant: chosen in todo <= set(ready)
    """

    def __init__(self, ready: list[int], asleep: dict[int, Footprint], chosen: int) -> None:
        self.ready = ready
        self.asleep = asleep  # with what they would do
        self.chosen = chosen
        self.todo = {chosen}  # to be tried here, or tried already
        self.done: dict[int, Footprint] = {}  # with what they have done

    def go_on(self, touched: Footprint) -> bool:
        """The chosen one was tried in all ways. Choose another, if one is left."""
        self.done[self.chosen] = touched
        left = [task for task in self.ready if task in self.todo and task not in self.done and task not in self.asleep]
        if left:
            self.chosen = left[0]
        return bool(left)


class _Question:
    """A point at which something else was to be decided. All answers are tried."""

    def __init__(self, options: int) -> None:
        self.options = options
        self.chosen = 0


class Pruned:
    """All schedules of a program up to equivalence: iterate, and run the program once with each.

    Attributes:
        covered: whether the last schedule there is has been run.
    """

    def __init__(self, footprints: Footprints) -> None:
        self.covered = False
        self._footprints = footprints

    def __iter__(self) -> Iterator[PrunedSchedule]:
        points: list[_Pick | _Question] = []
        while True:
            schedule = PrunedSchedule(self._footprints, points)
            yield schedule
            schedule.end()
            while points:
                point = points[-1]
                if isinstance(point, _Pick):
                    if point.go_on(schedule.step_of(point)):
                        break
                elif point.chosen + 1 < point.options:
                    point.chosen += 1
                    break
                points.pop()
            if not points:
                self.covered = True
                return


class PrunedSchedule:
    """One run: up to the last of `points` it goes as before, then as it comes; new points are added.

    Besides what a schedule is asked, it is told when a step begins, and when all sleep.
    """

    def __init__(self, footprints: Footprints, points: list[_Pick | _Question]) -> None:
        footprints.begin_run()
        self.made: list[int] = []
        self._footprints = footprints
        self._points = points
        self._known = len(points)  # how many points are old
        self._at = 0  # how many have been passed
        self._steps: list[_Step] = []
        self._asleep: dict[int, Footprint] = {}
        self._woken: dict[Task, int] = {}
        self._redundant: int | None = None  # from this step on, all has been seen in another run
        self._strayed = False  # whether the same choices have not led to the same points
        self._unswappable = False  # whether the step that comes next stays where it is

    # ---- what is asked ----

    def pick(self, tasks: Sequence[Any]) -> int:
        """Which of `tasks` runs. Asked also if there is only one."""
        self._end_step()
        names = [self._footprints.name(task) for task in tasks]
        point: _Pick | None = None
        if len(names) == 1:
            place = 0
            if names[0] in self._asleep:
                self._stop()
        else:
            point = self._pick_point(names)
            place = names.index(point.chosen) if point is not None else 0
            self.made.append(place)
        self._begin_step(tasks[place], names[place], point)
        return place

    def _pick_point(self, names: list[int]) -> _Pick | None:
        if self._redundant is not None:
            return None
        if self._at < self._known:
            point = self._points[self._at]
            if not isinstance(point, _Pick) or point.ready != names:
                self._strayed = True
                self._stop()
                return None
        else:
            awake = [name for name in names if name not in self._asleep]
            if not awake:
                self._stop()
                return None
            point = _Pick(names, self._asleep, awake[0])
            self._points.append(point)
        self._at += 1
        return point

    def choose(self, options: int) -> int:
        self._keep_apart()
        if self._redundant is not None:
            self.made.append(0)
            return 0
        if self._at < self._known:
            point = self._points[self._at]
            if not isinstance(point, _Question) or point.options != options:
                self._strayed = True
                self._stop()
                return 0
        else:
            point = _Question(options)
            self._points.append(point)
        self._at += 1
        self.made.append(point.chosen)
        return point.chosen

    cancel = choose

    def pause(self) -> int:
        self.made.append(1)
        return 1

    # ---- what is told ----

    def woken(self, task: Task) -> None:
        """`task` has become ready."""
        if self._steps and self._steps[-1].task != self._footprints.name(task):
            self._woken[task] = len(self._steps) - 1
        self._footprints.woken(task)

    def all_sleep(self, *, was_question: bool) -> None:
        """Whatever happens now, it happens after all that was before, and before all that will be. `was_question`: if
        somebody were ready, something else might be asked first.
        """
        if was_question:
            self._keep_apart()
        self._end_step()
        self._begin_step(None, UNNAMED, None)
        self._keep_apart()
        self._unswappable = False

    def end(self) -> None:
        """The run is over: find the races, and what is to be tried because of them."""
        self._end_step()
        if self._strayed or self._at < self._known:
            raise ValueError(NOT_DETERMINISTIC)
        self._find_races()

    def step_of(self, point: _Pick) -> Footprint:
        """What the step that was chosen at `point` has touched."""
        return next(step.touched for step in self._steps if step.pick is point)

    # ---- steps ----

    def _begin_step(self, task: Task | None, name: int, point: _Pick | None) -> None:
        step = _Step(name, -1, None)
        if task is not None:
            step.woken_by = self._woken.pop(task, -1)
            step.joined = self._footprints.joined.pop(task, None)
        step.pick = point
        self._steps.append(step)
        self._footprints.begin_step(name)
        if task is not None:
            self._footprints.enter_frames(task)
        if self._unswappable:
            self._unswappable = False
            self._footprints.use(EVERYTHING, WRITE)

    def _keep_apart(self) -> None:
        """The step that goes on, or has just ended, is swapped with no other; nor is the one that comes next."""
        self._footprints.use(EVERYTHING, WRITE)
        self._unswappable = True

    def _end_step(self) -> None:
        if not self._steps or self._steps[-1].touched:
            return
        step = self._steps[-1]
        step.touched = self._footprints.touched
        step.left = self._footprints.left
        if self._redundant is None:
            asleep = self._asleep if step.pick is None else self._asleep | step.pick.done
            self._asleep = {
                task: touched
                for task, touched in asleep.items()
                if task != step.task and not conflict(touched, step.touched)
            }

    def _stop(self) -> None:
        if self._redundant is None:
            self._redundant = len(self._steps)

    # ---- races ----

    def _find_races(self) -> None:
        steps = self._steps if self._redundant is None else self._steps[: self._redundant]
        uses: dict[object, list[tuple[int, int]]] = {}
        last: dict[int, int] = {}
        for number, step in enumerate(steps):
            conflicting = _earlier(step, number, uses)
            causes = conflicting | {last.get(step.task, -1), step.woken_by}
            causes.discard(-1)
            last[step.task] = number
            for cause in sorted(causes, reverse=True):
                if step.before >> cause & 1:
                    continue  # by way of another one
                step.before |= steps[cause].before | 1 << cause
                if cause in conflicting and _could_be_reversed(steps[cause], cause, step):
                    self._reverse(steps, cause, number)

    def _reverse(self, steps: list[_Step], first: int, second: int) -> None:
        """Before step `first`, somebody else must be tried, so that step `second` comes before it."""
        point = steps[first].pick
        if point is None:
            return  # nobody else was ready
        between = [n for n in range(first + 1, second) if not steps[n].before >> first & 1] + [second]
        earlier = 0
        begin: list[int] = []
        for n in between:
            if not steps[n].before & earlier:
                begin.append(steps[n].task)
            earlier |= 1 << n
        if not any(task in point.todo or task in point.asleep for task in begin):
            possible = [task for task in begin if task in point.ready]
            point.todo.update(possible[:1] or point.ready)


def _earlier(step: _Step, number: int, uses: dict[object, list[tuple[int, int]]]) -> set[int]:
    """The steps before `step`, which is the `number`th, that conflict with it. Of those that conflict with one another
    the later ones will do.
    """
    found: set[int] = set()
    for cell, how in step.touched.items():
        history = uses.setdefault(cell, [])
        for earlier, use in reversed(history):
            if use | how not in (READ, 2):
                found.add(earlier)
            if use & WRITE:
                break
        history.append((number, how))
    return found


def _could_be_reversed(cause: _Step, number: int, step: _Step) -> bool:
    if cause.task == step.task or UNNAMED in (cause.task, step.task) or step.woken_by == number:
        return False
    return step.joined is None or cause.left != step.joined  # who waits for all children goes on after the last one
