"""Who can be cancelled in an explored run, and where. See `explore_cancellation` for what that is good for.

A *place* is a moment at which the kernel could deliver a cancellation in a way of its own. There are three kinds:

* before a step: the task that runs next is committed, or queues at a checkpoint, or has not begun; others sleep;
* while all sleep;
* in the midst of a step, where an operation charges the budget, or looks for a cancellation. In an ordinary run the
  budget may be used up just there, and while the task queues for its next turn, somebody may cancel it.

Between two neighbouring places nothing changes that a cancellation could meet. So to cancel at each of them in turn is
to cancel at every moment.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Final, Literal

from ..core.errors import CancelReason
from ..core.loop import Kernel
from ..core.scopes import CancelScope
from ..core.task import Task, current_kernel
from ..core.traps import operation
from .report import Rows
from .schedules import Schedule

__all__ = ["cancel_target"]

Whom = Literal["program", "tasks", "targets"] | Callable[[Task], bool]

_EXPLORED: Final = CancelReason("explicit", reason="the explorer cancels here")


class Targets:
    """Those who can be cancelled in one run. The schedule is asked at each place, until it has chosen somebody."""

    def __init__(self, whom: Whom, kernel: Kernel, schedule: Schedule, rows: Rows | None) -> None:
        self._whom = whom
        self._kernel = kernel
        self._schedule = schedule
        self._rows = rows
        self._scopes: dict[CancelScope, Task] = {}  # in the order in which they have come up
        self._slept = False  # whether the last place was one where all slept, and nobody has run since
        self.places = 0
        self.chosen = False  # whether the schedule has chosen somebody
        self.cancelled = False  # whether somebody was cancelled, by whomever

    def meet(self, task: Task) -> None:
        """A task begins. If it can be cancelled alone, put a scope around all it will do."""
        kernel, whom, nursery = self._kernel, self._whom, task.parent_nursery
        if nursery is None or nursery is kernel.system_nursery:
            return  # the kernel's own
        if whom == "program":
            chosen = nursery is kernel.main_nursery and kernel.main_task is None
        else:
            chosen = whom == "tasks" or (callable(whom) and whom(task))
        if chosen:
            scope = CancelScope()
            task._name = task.name
            task.coro = _within(scope, task.coro)  # type: ignore[assignment]
            self._scopes[scope] = task

    def enter(self, scope: CancelScope, task: Task) -> None:
        """`task` enters a scope that it offers."""
        if self._whom == "targets":
            self._scopes[scope] = task

    def between_steps(self) -> None:
        """A place: before a step."""
        self._slept = False
        self._at_a_place(idle=False)

    def while_asleep(self) -> None:
        """Another one: nobody is ready. The loop may look several times before somebody is."""
        if not self._slept:
            self._slept = True
            self._at_a_place(idle=True)

    def _at_a_place(self, *, idle: bool) -> None:
        scopes = self._present()
        if not scopes:
            return
        self.places += 1
        choice = self._schedule.cancel(len(scopes) + 1)
        if choice:
            scope = scopes[choice - 1]
            if self._rows is not None:
                self._rows.cancel_between(self._name_of(scope), self._scopes[scope], idle=idle)
            self._kernel.current = None  # who ran last has nothing to do with it
            self._cancel(scope)

    def inside_step(self, task: Task) -> None:
        """A place in the midst of a step of `task`, which looks whether it is cancelled. Shall it be?"""
        present, scopes = self._present(), []
        scope: CancelScope | None = task.scope if present else None
        while scope is not None:
            if scope in present:
                scopes.append(scope)
            scope = scope._parent if not scope._shield else None
        if not scopes or task.scope.cancelled is not None:
            return
        self.places += 1
        choice = self._schedule.cancel(len(scopes) + 1)
        if choice:
            if self._rows is not None:
                self._rows.cancel_inside(self._name_of(scopes[choice - 1]))
            self._cancel(scopes[choice - 1])

    def _present(self) -> list[CancelScope]:
        if self.cancelled:
            return []
        for scope in [scope for scope in self._scopes if scope._state not in ("new", "active")]:
            del self._scopes[scope]
        return [scope for scope in self._scopes if scope._why is None]

    def _cancel(self, scope: CancelScope) -> None:
        self.chosen = self.cancelled = True
        scope._cancel(_EXPLORED)

    def _name_of(self, scope: CancelScope) -> str:
        if self._whom == "program":
            return "The program"
        return f"{'A block of task' if self._whom == 'targets' else 'Task'} {self._scopes[scope].name!r}"


@operation
def _within(scope: CancelScope, coro: Any) -> Generator[Any, Any, Any]:
    """What a task runs that can be cancelled alone."""
    with scope:
        return (yield from coro)


class _Target(CancelScope):
    """A scope that the program offers."""

    __slots__ = ()

    def __enter__(self) -> CancelScope:
        super().__enter__()
        kernel = current_kernel()
        targets: Targets | None = kernel.locals.get(Targets)
        if targets is not None and kernel.current is not None:
            targets.enter(self, kernel.current)
        return self


def cancel_target() -> CancelScope:
    """A scope, `with cancel_target(): ...`, that the explorer is to cancel when it is told `cancel="targets"`.

    For what must still work when a part of the program was cancelled: do that part inside, and look after it. In
    ordinary runs, and with another `cancel=`, it is a plain `CancelScope`.
    """
    return _Target()
