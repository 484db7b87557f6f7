"""What must be true of a kernel between any two steps, whatever the program: the book-keeping, checked from scratch.

    queue = CheckedReadyQueue()
    kernel.run(main, ready=queue, poller=NoFiles())
    queue.finish()

`CheckedReadyQueue` is a ready queue that looks at the whole task tree before each step. It only notes what it finds,
so that the run goes on and ends in an orderly way; `finish` raises `AssertionError` with the first violations, and
checks that the run has left nothing. `check(kernel, ready)` is the list of rules, for use elsewhere. Both read private
fields: they are the statement of what those fields mean.

`NoFiles` is a poller for programs without files. It has the same look each time it is polled, so that the moment
before the clock jumps is seen too, and it refuses to sleep for ever, which is what a lost wake-up leads to.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from math import inf
from typing import Any

from kernel.core.nursery import Nursery, _Join
from kernel.core.scopes import CancelScope
from kernel.core.task import Task, here
from kernel.core.traps import SleepUntil, WaitReadable, WaitWritable
from kernel.lowlevel import Kernel
from kernel.parking import ParkingLot
from kernel.testing.idle import _WaitIdle

__all__ = ["CheckedReadyQueue", "NoFiles", "Stuck", "check", "check_nothing_left", "close_all", "tasks_of"]


class Stuck(Exception):
    """The run would never end."""


class CheckedReadyQueue:
    """First come, first served, with a check of everything before each step.

    A queue may look only while the kernel stands still, and `popleft` is the one moment that it knows to be between
    two steps. What holds after the last step is checked by `finish`.

    Args:
        max_steps: after so many, end the run with `Stuck`.
    """

    def __init__(self, *, max_steps: float = inf) -> None:
        self.violations: list[str] = []
        self.kernel: Kernel | None = None
        self.steps = 0
        self._max_steps = max_steps
        self._queue: deque[Task] = deque()

    def append(self, task: Task, /) -> None:
        if task in self._queue:
            self.violations.append(f"before step {self.steps}: {task!r} was queued while it was in the queue")
        self._queue.append(task)

    def popleft(self) -> Task:
        self.look()
        self.steps += 1
        if self.steps > self._max_steps:
            raise Stuck(f"the program has taken more than {self._max_steps} steps")
        return self._queue.popleft()

    def look(self) -> None:
        """Check everything now, between two steps, and note what is wrong."""
        self.kernel = here.kernel
        assert self.kernel is not None
        if len(self.violations) < 5:
            self.violations += [f"before step {self.steps}: {text}" for text in check(self.kernel, self._queue)]

    def finish(self) -> None:
        """The run has ended: raise if anything was wrong, then or now.

        Raises:
            AssertionError: with what was found.
        """
        assert self.kernel is not None, "no run has used this queue"
        self.violations += [f"after the run: {text}" for text in check_nothing_left(self.kernel)]
        assert not self.violations, "\n".join(["the kernel's books are wrong:", *self.violations])

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._queue)


class NoFiles:
    """A poller without files: never anything to report. To sleep in it without end is an error, `Stuck`."""

    def arm(self, fd: int, direction: int, task: Task) -> None:
        raise AssertionError("this program was not supposed to wait for files")

    def disarm(self, fd: int, direction: int) -> None:
        raise AssertionError("nothing was armed")

    def forget(self, fd: int) -> list[Task]:
        return []

    def poll(self, timeout: float) -> Iterable[Task]:
        kernel = here.kernel
        assert kernel is not None
        if isinstance(kernel.ready, CheckedReadyQueue):
            kernel.ready.look()
        if timeout == inf:
            asleep = [repr(task) for task in tasks_of(kernel)]
            raise Stuck("\n".join(["all tasks sleep, and nothing is there to wake one:", *asleep]))
        return ()

    def wakeup(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __len__(self) -> int:
        return 0


# ---- the rules ----------------------------------------------------------------------------------------


def tasks_of(kernel: Kernel) -> list[Task]:
    """All tasks in the tree, from the root, breadth first."""
    top = kernel.system_nursery
    tasks = [top.parent_task] if top is not None and top.parent_task.outcome is None else []
    for task in tasks:
        for nursery in task.child_nurseries:
            tasks.extend(nursery._children)
    return tasks


def check(kernel: Kernel, ready: Iterable[Task]) -> Iterator[str]:
    """All rules that hold between two steps; yields a sentence for each violation. `ready` is the queue's content."""
    if kernel.system_nursery is None:  # not even the root task has begun
        return
    tasks = tasks_of(kernel)
    twice = [task for task, times in Counter(tasks).items() if times > 1]
    if twice:
        yield f"more than once in the tree: {twice}"
        return
    yield from _check_states(kernel, tasks, list(ready))
    for task in tasks:
        yield from _check_scopes(kernel, task)
        for nursery in task.child_nurseries:
            yield from _check_nursery(nursery, task)
    yield from _check_drivers(kernel, tasks)


def check_nothing_left(kernel: Kernel) -> Iterator[str]:
    """What holds when a run has ended."""
    if tasks_of(kernel):
        yield f"tasks are left: {tasks_of(kernel)}"
    if len(kernel.ready):
        yield f"{len(kernel.ready)} tasks are still ready"
    if len(kernel.timers):
        yield f"timers are left: {_timed(kernel)}"
    if len(kernel.poller):
        yield f"{len(kernel.poller)} waits for files are left"
    if kernel.idle_waiters:
        yield f"waiting for quiet: {list(kernel.idle_waiters)}"
    if kernel.running or kernel.main_task or kernel.system_nursery or kernel.main_nursery:
        yield "the kernel still refers to the top of its tree"


def _check_states(kernel: Kernel, tasks: list[Task], ready: list[Task]) -> Iterator[str]:
    """Each task is in exactly one state: ready and in the queue once, or asleep and not in it. None has finished."""
    times_queued = Counter(ready)
    for task in set(ready) - set(tasks):
        yield f"in the queue but not in the tree: {task!r}"
    for task in tasks:
        if task.outcome is not None:
            yield f"finished, but still in the tree: {task!r}"
        elif task.trap is None and times_queued[task] != 1:
            yield f"{times_queued[task]} times in the queue: {task!r}"
        elif task.trap is not None and (times_queued[task] or task.step is not None):
            yield f"asleep, but also in the queue or woken: {task!r}"
        if task.trap is not None and task.scope.cancelled and not isinstance(task.trap, _Join):
            yield f"cancelled, but asleep: {task!r}"
        if isinstance(task.trap, ParkingLot) and task not in task.trap._parked:
            yield f"asleep in a lot that does not know it: {task!r}"
    for lot in {task.trap for task in tasks if isinstance(task.trap, ParkingLot)}:
        for task in lot._parked:
            if task.trap is not lot:
                yield f"in the row of {lot!r}, but not asleep there: {task!r}"


def _check_scopes(kernel: Kernel, task: Task) -> Iterator[str]:
    """The chain of `task` leads to its nursery's scope, and the cached `cancelled` is what the definition gives."""
    base = None if task.parent_nursery is None else task.parent_nursery.cancel_scope
    scope: CancelScope | None = task.scope
    while scope is not base:
        if scope is None:
            yield f"the scopes of {task!r} do not lead to its nursery"
            return
        if scope._state != "active" or scope._task is not task or scope._kernel is not kernel:
            yield f"in the chain of {task!r}, but not active there: {scope!r}"
        parent = scope._parent
        from_outside = None if parent is None or scope._shield else parent.cancelled
        if scope.cancelled is not (from_outside or scope._why):
            yield f"of {task!r}: cancelled is {scope.cancelled}, called for {scope._why}, parent {parent!r}: {scope!r}"
        scope = parent


def _check_nursery(nursery: Nursery, owner: Task) -> Iterator[str]:
    if nursery.parent_task is not owner or nursery.cancel_scope.nursery is not nursery:
        yield f"not a nursery of {owner!r}: {nursery!r}"
    for child in nursery._children:
        if child.parent_nursery is not nursery:
            yield f"a child of {nursery!r} that believes to be in {child.parent_nursery!r}: {child!r}"
    joiner = nursery._joining
    if joiner is not None:
        if nursery._state != "open" or not (nursery._children or nursery._pending_starts):
            yield f"joining with nothing to wait for: {nursery!r}"
        if not (isinstance(joiner.trap, _Join) and joiner.trap.on is nursery):
            yield f"joining, but {joiner!r} does not wait for it: {nursery!r}"
    elif isinstance(owner.trap, _Join) and owner.trap.on is nursery:
        yield f"waited for, but not joining: {nursery!r}"
    if nursery._state == "closed" and (nursery._children or nursery._pending_starts):
        yield f"closed with children: {nursery!r}"
    if nursery._pending_starts < 0:
        yield f"{nursery._pending_starts} starts are pending: {nursery!r}"


def _check_drivers(kernel: Kernel, tasks: list[Task]) -> Iterator[str]:
    """The drivers hold what the tree needs, no more and no less."""
    timed: dict[Any, float] = {}
    for task in tasks:
        if isinstance(task.trap, SleepUntil):
            timed[task.trap] = task.trap.deadline
        scope = task.scope
        while scope._task is task:
            if scope._why is None and scope._deadline < inf:
                timed[scope] = scope._deadline
            if scope._parent is None:
                break
            scope = scope._parent
    if len(kernel.timers) != len(timed) or _timed(kernel) != timed:
        yield f"the timers hold {_timed(kernel)}, but the tree has {timed}"
    files = sum(isinstance(task.trap, WaitReadable | WaitWritable) for task in tasks)
    if len(kernel.poller) != files:
        yield f"the poller has {len(kernel.poller)} waits, but {files} tasks wait for files"
    quiet = {task for task in tasks if isinstance(task.trap, _WaitIdle)}
    if set(kernel.idle_waiters) != quiet:
        yield f"waiting for quiet: {list(kernel.idle_waiters)}, asleep for it: {quiet}"


def _timed(kernel: Kernel) -> dict[Any, float]:
    """What the timers driver holds, and for when."""
    timers: Any = kernel.timers
    held = [entry for entry in timers._sorted if entry not in timers._removed]
    return {**timers._fresh, **{timed: deadline for deadline, _, timed in held}}


def close_all(kernel: Kernel) -> None:
    """After a run that broke: end the coroutines that it has left, quietly."""
    for task in reversed(tasks_of(kernel)):
        with suppress(BaseException):
            task.coro.close()
