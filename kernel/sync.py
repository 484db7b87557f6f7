"""Synchronization: how tasks of one kernel wait for one another.

    Event             has it happened? Once set, set for ever
    Lock              one task at a time. StrictFIFOLock is the same, and says that its order matters to you
    Semaphore         a number that cannot go below zero
    CapacityLimiter   a sack of tokens, which knows who has borrowed them
    Condition         wait, with a lock, until another task says that something has changed
    Barrier           wait until all have come

Rules:

* *Hand over, never retry.* Who releases a lock makes the first in the row its owner, then wakes it. So the lock is
  never free while somebody waits, nobody can overtake, and since waking commits, no cancellation can come between the
  hand-over and the new owner. Permits and tokens go the same way.
* First come, first served, without exception.
* What does not wait is a plain function: `set`, `release`, `notify` and all `*_nowait`.
* What need not wait costs no trap. An operation looks for a cancellation first, then takes, and only when the step has
  used up its budget does it let the others run, holding what it has taken. (A budget that is used up before that is a
  Ctrl-C's sign: then it yields first, and takes nothing.)
* Misuse raises and changes nothing.

Each primitive is itself the trap that its waiters sleep on. So a wait allocates nothing, `task.trap` leads a report to
the lock and to its `owner`, and there is no reference back from a row to the thing it belongs to: a cycle, which would
leave every lock and event to the garbage collector.

All of this is for the tasks of one kernel, in one thread.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Generator
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, cast

from outcome import Error, Value

from .core.errors import BrokenResourceError, Cancelled, WouldBlock
from .core.scopes import CancelScope
from .core.task import Task, current_kernel, current_task, here
from .core.traps import Operation, cancel_shielded_checkpoint, checkpoint, consume_budget, operation

if TYPE_CHECKING:
    from .core.loop import Kernel
    from .core.traps import Trap

__all__ = [
    "Barrier",
    "BarrierStatistics",
    "CapacityLimiter",
    "CapacityLimiterStatistics",
    "Condition",
    "ConditionStatistics",
    "Event",
    "EventStatistics",
    "Lock",
    "LockStatistics",
    "Semaphore",
    "SemaphoreStatistics",
    "StrictFIFOLock",
]


class _Waitable:
    """What the primitives have in common: each is a trap, and itself what its sleepers wait for."""

    __slots__ = ("__weakref__",)

    @property
    def on(self) -> object:
        """For reports: what those who sleep on this trap wait for."""
        return self


class _Row(_Waitable):
    """A trap with the row of those who sleep on it, first come first."""

    __slots__ = ("_row",)

    def __init__(self) -> None:
        # all(task.trap is self for task in _row). A plain dict would scan over what was deleted at its front.
        self._row: OrderedDict[Task, Any] = OrderedDict()

    def arm(self, kernel: Kernel, task: Task) -> None:
        """For the kernel: `task` goes to the end of the row."""
        self._row[task] = None

    def abort(self, kernel: Kernel, task: Task) -> bool:
        """For the kernel: `task` is cancelled, and leaves the row. It costs the same wherever it stands."""
        del self._row[task]
        return True


class _Held:
    """What a block holds: `async with` acquires and releases."""

    __slots__ = ()

    def release(self) -> None:
        raise NotImplementedError

    @operation
    def __aexit__(self, exc_type: object, exc: object, traceback: object) -> Generator[Any, Any, None]:
        if exc_type is not GeneratorExit or here.kernel is not None:  # or else a crashed run throws its tasks away
            self.release()
        return
        yield  # makes it a generator; nothing to wait for


def _and_waiting(number: int) -> str:
    return f", {number} waiting" if number else ""


# ---- Event --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EventStatistics:
    """What an event says of itself: `tasks_waiting`, the number of tasks in `wait`."""

    tasks_waiting: int


class Event(_Waitable):
    """Something that happens once. Tasks `wait` for it; whoever sees it happen calls `set`.

    There is no way back: make a new event for the next time. An event may be made anywhere, and set anywhere while
    nobody waits for it.
    """

    __slots__ = ("_flag", "_waiting")

    def __init__(self) -> None:
        self._flag = False
        self._waiting: dict[Task, None] = {}  # all(task.trap is self for task in _waiting)

    def is_set(self) -> bool:
        """Whether it has happened."""
        return self._flag

    def set(self) -> None:
        """It has happened: let all who wait go, in the order they came. Calling it again does nothing.

        Not a checkpoint. Raises RuntimeError if somebody waits and this is not the thread of their kernel.
        """
        if self._waiting:
            kernel = current_kernel("Event.set()")
            for task in self._waiting:
                kernel.wake(task)
            self._waiting.clear()
        self._flag = True

    @operation
    def wait(self) -> Generator[Any, Any, None]:
        """Wait until it has happened. Always a cancel point; a schedule point if it has not happened yet.

        Once `set` was called, a waiting task is not cancelled out of this any more. Raises RuntimeError outside the
        kernel.
        """
        if self._flag:
            yield from consume_budget()
        else:
            _ = here.kernel or current_kernel("Event.wait()")
            yield self

    def arm(self, kernel: Kernel, task: Task) -> None:
        """For the kernel: `task` waits."""
        self._waiting[task] = None

    def abort(self, kernel: Kernel, task: Task) -> bool:
        """For the kernel: `task` is cancelled, and waits no more."""
        del self._waiting[task]
        return True

    def statistics(self) -> EventStatistics:
        """How many tasks wait."""
        return EventStatistics(tasks_waiting=len(self._waiting))

    def __bool__(self) -> Literal[True]:
        raise NotImplementedError("an event has no truth value: write `if event.is_set():`, not `if event:`")

    def __repr__(self) -> str:
        return f"<Event at {id(self):#x}, {'set' if self._flag else 'not set'}{_and_waiting(len(self._waiting))}>"


# ---- Lock ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LockStatistics:
    """What a lock says of itself: whether it is `locked`, its `owner`, and how many tasks wait for it."""

    locked: bool
    owner: Task | None
    tasks_waiting: int


class Lock(_Waitable, _Held):
    """One task at a time: `async with lock: ...`.

    Only the task that has acquired it may release it, and it cannot acquire it twice. If that task ends without
    having released it, the lock is broken, for good: what it protects may be half-done.

    Cost: 0.3 us for `async with` if nobody holds it, 0.9 us including the sleep if somebody does, however many wait.
    """

    # fmt: off
    __slots__ = (
        "_owner",         # if None, nobody waits
        "_row", "_came",  # who waits, or None where one has left; how many have ever come: each has a number
        "_gone",          # _row.count(None)
        "_watched",       # tasks whose end we shall hear of. If somebody waits, the owner is among them
    )
    # fmt: on

    def __init__(self) -> None:
        self._owner: Task | None = None
        self._row: deque[Task | None] = _NOBODY
        self._came = self._gone = 0
        self._watched: set[Task] = set()

    @property
    def owner(self) -> Task | None:
        """The task that holds the lock."""
        return self._owner

    def locked(self) -> bool:
        """Whether some task holds the lock."""
        return self._owner is not None

    def acquire_nowait(self) -> None:
        """Take the lock if it is free. Not a checkpoint.

        Raises:
            WouldBlock: another task holds it.
            BrokenResourceError: its owner has ended without releasing it.
            RuntimeError: this task holds it already; or called from outside any task.
        """
        task = current_task("Lock.acquire_nowait()")
        if self._owner is not None:
            self._check_owner(self._owner, task)
            raise WouldBlock("the lock is held by another task")
        self._owner = task

    @operation
    def acquire(self) -> Generator[Any, Any, None]:
        """Take the lock, waiting for it if need be. Always a cancel point, and then nothing was taken.

        A schedule point if it waits, or if the budget is used up. The lock is yours from the moment in which the one
        before you released it, even if you run, or are cancelled, only later.

        Raises:
            BrokenResourceError: its owner has ended without releasing it, before or meanwhile.
            RuntimeError: this task holds it already; or called from outside any task.
        """
        kernel = here.kernel or current_kernel("Lock.acquire()")
        task = kernel.current or current_task("Lock.acquire()")
        if kernel.budget < 0 or task.scope.cancelled is not None:
            yield from checkpoint()
        owner = self._owner
        if owner is None:
            self._owner = task
            kernel.budget -= 1
            if kernel.budget < 0:
                yield from cancel_shielded_checkpoint()
        else:
            if owner is task or not self._watched:
                self._check_owner(owner, task)
                self._watch(kernel, owner)
            yield self

    def release(self) -> None:
        """Give the lock to the first who waits for it, or to nobody. Not a checkpoint.

        Raises RuntimeError if this task does not hold it.
        """
        # By the owner's scope and not by the thread: that look-up would be 0.05 us, a fifth of an uncontended use.
        owner = self._owner
        kernel = owner.scope._kernel if owner is not None else None
        if kernel is None or kernel.current is not owner:
            self._refuse_release()
        if not self._watched:
            self._owner = None
            return
        row = self._row
        while row:
            heir = row.popleft()
            if heir is not None:
                self._owner = heir
                if heir not in self._watched:
                    self._watch(kernel, heir)
                kernel.wake(heir)
                return
            self._gone -= 1
        self._owner = None
        self._unwatch(kernel)

    __aenter__ = acquire

    def arm(self, kernel: Kernel, task: Task) -> None:
        """For the kernel: `task` goes to the end of the row, and keeps its number, as in a post office."""
        self._came += 1
        task.custom_sleep_data = self._came
        self._row.append(task)

    def abort(self, kernel: Kernel, task: Task) -> bool:
        """For the kernel: `task` is cancelled. The number says where it stands: the last one is that of `_row[-1]`."""
        row = self._row
        row[task.custom_sleep_data - self._came - 1] = None
        self._gone += 1
        if 2 * self._gone > len(row):
            self._close_ranks()
        return True

    def _close_ranks(self) -> None:
        """More have left the row than stand in it. Done so seldom that each who leaves pays for one or two."""
        self._row = deque(filter(None, self._row))
        self._gone = 0
        for number, task in enumerate(self._row, self._came - len(self._row) + 1):
            assert task is not None
            task.custom_sleep_data = number

    def _join(self, kernel: Kernel, task: Task) -> None:
        """`task` sleeps on a condition of this lock, which is held. From now on it sleeps on the lock instead."""
        assert self._owner is not None
        if not self._watched:
            self._watch(kernel, self._owner)
        self.arm(kernel, task)
        task.trap = cast("Trap", self)

    # Watching costs 0.2 us. So it begins when somebody waits, and who was watched stays so until nobody waits any more.

    def _watch(self, kernel: Kernel, owner: Task) -> None:
        if self._row is _NOBODY:
            self._row = deque()
        self._watched.add(owner)
        kernel.farewells.setdefault(owner, []).append(self._owner_ended)

    def _unwatch(self, kernel: Kernel) -> None:
        for task in self._watched:
            calls = kernel.farewells[task]
            calls.remove(self._owner_ended)
            if not calls:
                del kernel.farewells[task]
        self._watched.clear()

    def _owner_ended(self, task: Task) -> None:
        """A watched task has ended. If it holds the lock, nobody can release it any more."""
        self._watched.remove(task)
        if task is not self._owner:
            return
        kernel = current_kernel()
        for waiter in filter(None, self._row):
            kernel.wake(waiter, error=self._broken(task))
        self._row = _NOBODY
        self._gone = 0
        self._unwatch(kernel)

    def _check_owner(self, owner: Task, task: Task) -> None:
        """Raise if it makes no sense that `task` waits for `owner`."""
        if owner is task:
            raise RuntimeError(
                f"task {task.name!r} tried to acquire {self!r}, which it holds already, and would wait for itself for "
                "ever. Let the caller take the lock, and have what it calls rely on that."
            )
        if _ended(owner):
            raise self._broken(owner)

    def _is_broken(self) -> bool:
        return self._owner is not None and _ended(self._owner)

    def _broken(self, owner: Task) -> BrokenResourceError:
        return BrokenResourceError(
            f"the owner of this lock, task {owner.name!r}, has ended without releasing it, so nobody ever will. "
            "Hold locks with `async with lock:`. What it protects may be half-done: make both anew."
        )

    def _refuse_release(self) -> NoReturn:
        task = current_task("Lock.release()")
        held = "nobody holds it" if self._owner is None else f"{self._owner.name!r} holds it"
        raise RuntimeError(
            f"task {task.name!r} tried to release {self!r}, but {held}. Only the task that has acquired a lock may "
            "release it, once; `async with lock:` sees to both."
        )

    def statistics(self) -> LockStatistics:
        """Whether it is held, by whom, and how many tasks wait."""
        return LockStatistics(locked=self.locked(), owner=self._owner, tasks_waiting=len(self._row) - self._gone)

    def __repr__(self) -> str:
        owner = self._owner
        if owner is None:
            state = "free"
        elif self._is_broken():
            state = f"broken: {owner.name!r} has ended without releasing it"
        else:
            state = f"held by {owner.name!r}{_and_waiting(len(self._row) - self._gone)}"
        return f"<{type(self).__name__} at {id(self):#x}, {state}>"


_NOBODY: Final[deque[Task | None]] = deque()  # the row of all locks that nobody has ever waited for: saves 700 bytes


class StrictFIFOLock(Lock):
    """A `Lock`, for code that relies on its order: whoever calls `acquire` first, owns it first.

    `Lock` promises the same here. In trio it need not for ever, and the name tells a reader what would break.
    """

    __slots__ = ()


def _ended(task: Task) -> bool:
    return task.step is Value or task.step is Error


# ---- Semaphore ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SemaphoreStatistics:
    """What a semaphore says of itself: `tasks_waiting`, the number of tasks in `acquire`."""

    tasks_waiting: int


class Semaphore(_Row, _Held):
    """A number of permits. `acquire` takes one, waiting until there is one; `release` adds one.

    Any task may release. That is what it is for: one task makes something available, another one takes it. To limit
    how many tasks do something at once, `CapacityLimiter` is better, as it notices mistakes.

    Args:
        initial_value: so many permits at first, a whole number from 0 up.
        max_value: `release` refuses to let the number go beyond this one.

    Raises ValueError or TypeError if they are not such numbers.
    """

    __slots__ = ("_max_value", "_value")

    def __init__(self, initial_value: int, *, max_value: int | None = None) -> None:
        super().__init__()
        if not isinstance(initial_value, int):
            raise TypeError(f"initial_value must be an int, not {initial_value!r}")
        if initial_value < 0:
            raise ValueError(f"initial_value must not be below 0, and is {initial_value}")
        if max_value is not None:
            if not isinstance(max_value, int):
                raise TypeError(f"max_value must be an int or None, not {max_value!r}")
            if max_value < initial_value:
                raise ValueError(f"max_value {max_value} is below initial_value {initial_value}")
        self._value = initial_value  # if not 0, the row is empty
        self._max_value = max_value

    @property
    def value(self) -> int:
        """The permits that are there now."""
        return self._value

    @property
    def max_value(self) -> int | None:
        """What `value` cannot exceed, or None."""
        return self._max_value

    def acquire_nowait(self) -> None:
        """Take a permit if there is one. Not a checkpoint. Raises WouldBlock if there is none."""
        if self._value == 0:
            raise WouldBlock("the semaphore is at 0")
        self._value -= 1

    @operation
    def acquire(self) -> Generator[Any, Any, None]:
        """Take a permit, waiting for one if need be. Always a cancel point, and then nothing was taken.

        A schedule point if it waits, or if the budget is used up. Raises RuntimeError outside any task.
        """
        kernel = here.kernel or current_kernel("Semaphore.acquire()")
        task = kernel.current or current_task("Semaphore.acquire()")
        if kernel.budget < 0 or task.scope.cancelled is not None:
            yield from checkpoint()
        if self._value > 0:
            self._value -= 1
            kernel.budget -= 1
            if kernel.budget < 0:
                yield from cancel_shielded_checkpoint()
        else:
            yield self

    def release(self) -> None:
        """Give a permit to the first who waits for one, or put it back. Not a checkpoint.

        Raises:
            ValueError: the value is at `max_value`.
            RuntimeError: somebody waits, and this is not the thread of their kernel.
        """
        if self._row:
            kernel = current_kernel("Semaphore.release()")
            task, _ = self._row.popitem(last=False)
            kernel.wake(task)
        elif self._value == self._max_value:
            raise ValueError(
                f"the semaphore was released too often: its value is max_value, {self._max_value}, already. Each "
                "release() belongs to an acquire(); `async with semaphore:` sees to both."
            )
        else:
            self._value += 1

    __aenter__ = acquire

    def statistics(self) -> SemaphoreStatistics:
        """How many tasks wait."""
        return SemaphoreStatistics(tasks_waiting=len(self._row))

    def __repr__(self) -> str:
        most = "" if self._max_value is None else f" of {self._max_value}"
        return f"<Semaphore at {id(self):#x}, {self._value}{most} free{_and_waiting(len(self._row))}>"


# ---- CapacityLimiter ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CapacityLimiterStatistics:
    """What a limiter says of itself: tokens borrowed, tokens in all, who has one, and how many tasks wait for one."""

    borrowed_tokens: int
    total_tokens: int | float
    borrowers: list[Task | object]
    tasks_waiting: int


class CapacityLimiter(_Row, _Held):
    """A sack of tokens: so many tasks at once, and no more. `async with limiter: ...`

    A borrower holds one token at most, and gives it back itself. It is the running task, or with the
    `*_on_behalf_of` methods any hashable object that stands for somebody, such as a worker thread's job.

    Args:
        total_tokens: how many may be borrowed at once, an int from 0 up or `math.inf`.

    Raises TypeError or ValueError if it is no such number.
    """

    __slots__ = ("_borrowers", "_hoping", "_total")

    def __init__(self, total_tokens: int | float) -> None:
        super().__init__()
        _check_total(total_tokens)
        self._total = total_tokens
        # The row maps each waiting task to whom it borrows for, and is empty if len(_borrowers) < _total.
        self._borrowers: dict[object, None] = {}
        self._hoping: set[object] = set()  # set(_row.values())

    @property
    def total_tokens(self) -> int | float:
        """How many tokens there are. Settable: new ones go to those who wait, at once. If there are fewer than are
        borrowed, nobody loses one, and nobody gets one until enough have come back.

        Raises TypeError or ValueError, as the constructor; RuntimeError if this would let tasks go that wait in
        another thread's kernel.
        """
        return self._total

    @total_tokens.setter
    def total_tokens(self, total_tokens: int | float) -> None:
        _check_total(total_tokens)
        kernel = current_kernel("CapacityLimiter.total_tokens") if self._row else None
        self._total = total_tokens
        while kernel is not None and self._row and len(self._borrowers) < total_tokens:
            self._lend_to_next(kernel)

    @property
    def borrowed_tokens(self) -> int:
        """How many tokens are borrowed now."""
        return len(self._borrowers)

    @property
    def available_tokens(self) -> int | float:
        """How many tokens are left. Below 0 after `total_tokens` was set to less than are borrowed."""
        return self._total - len(self._borrowers)

    @property
    def owners(self) -> list[Task]:
        """The tasks that have a token, for reports: they could let the waiting ones go."""
        return [borrower for borrower in self._borrowers if isinstance(borrower, Task)]

    def acquire_nowait(self) -> None:
        """Borrow a token if one is left. Not a checkpoint.

        Raises:
            WouldBlock: none is left.
            RuntimeError: this task has one already; or called from outside any task.
        """
        self.acquire_on_behalf_of_nowait(current_task("CapacityLimiter.acquire_nowait()"))

    def acquire_on_behalf_of_nowait(self, borrower: Task | object) -> None:
        """Borrow a token for `borrower` if one is left. As `acquire_nowait`."""
        if borrower in self._borrowers or borrower in self._hoping:
            self._refuse(borrower)
        if len(self._borrowers) >= self._total:
            raise WouldBlock("all tokens of the limiter are borrowed")
        self._borrowers[borrower] = None

    @operation
    def acquire(self) -> Generator[Any, Any, None]:
        """Borrow a token, waiting for one if need be. Always a cancel point, and then nothing was borrowed.

        A schedule point if it waits, or if the budget is used up. Raises RuntimeError if this task has a token already;
        or outside any task.
        """
        yield from self.acquire_on_behalf_of(current_task("CapacityLimiter.acquire()"))

    @operation
    def acquire_on_behalf_of(self, borrower: Task | object) -> Generator[Any, Any, None]:
        """Borrow a token for `borrower`, waiting for one if need be. As `acquire`.

        Raises:
            RuntimeError: `borrower` has a token already, or waits for one; or called from outside any task.
            TypeError: it is not hashable.
        """
        kernel = here.kernel or current_kernel("CapacityLimiter.acquire_on_behalf_of()")
        task = kernel.current or current_task("CapacityLimiter.acquire_on_behalf_of()")
        if kernel.budget < 0 or task.scope.cancelled is not None:
            yield from checkpoint()
        if borrower in self._borrowers or borrower in self._hoping:
            self._refuse(borrower)
        if len(self._borrowers) < self._total:
            self._borrowers[borrower] = None
            kernel.budget -= 1
            if kernel.budget < 0:
                yield from cancel_shielded_checkpoint()
        else:
            self._row[task] = borrower
            self._hoping.add(borrower)
            yield self

    def release(self) -> None:
        """Give the running task's token back: to the first who waits for one, or into the sack. Not a checkpoint.

        Raises RuntimeError if it has none, or outside any task.
        """
        self.release_on_behalf_of(current_task("CapacityLimiter.release()"))

    def release_on_behalf_of(self, borrower: Task | object) -> None:
        """Give the token of `borrower` back. Any task may do so. Not a checkpoint.

        Raises RuntimeError if `borrower` has none, or if this would let tasks go that wait in another thread's kernel.
        """
        if borrower not in self._borrowers:
            raise RuntimeError(
                f"{_name(borrower)} gave back a token of {self!r}, but has none: each acquire() wants one release(), "
                "by the same borrower. `async with limiter:` sees to both."
            )
        kernel = current_kernel("CapacityLimiter.release()") if self._row else None
        del self._borrowers[borrower]
        if kernel is not None and len(self._borrowers) < self._total:
            self._lend_to_next(kernel)

    __aenter__ = acquire

    def arm(self, kernel: Kernel, task: Task) -> None:
        """For the kernel. `acquire` has put the task in the row: it knew for whom."""

    def abort(self, kernel: Kernel, task: Task) -> bool:
        """For the kernel: `task` is cancelled, and leaves the row."""
        self._hoping.remove(self._row.pop(task))
        return True

    def _lend_to_next(self, kernel: Kernel) -> None:
        task, borrower = self._row.popitem(last=False)
        self._hoping.remove(borrower)
        self._borrowers[borrower] = None
        kernel.wake(task)

    def _refuse(self, borrower: object) -> NoReturn:
        if borrower in self._hoping:
            raise RuntimeError(f"{_name(borrower)} asked for a token of {self!r}, and waits for one already")
        raise RuntimeError(
            f"{_name(borrower)} asked for a second token of {self!r}. A borrower holds one at most: if all who "
            "have one wanted another, all would wait for ever. Let the caller borrow, and what it calls rely on that."
        )

    def statistics(self) -> CapacityLimiterStatistics:
        """How many tokens there are and are borrowed, by whom, and how many tasks wait for one."""
        return CapacityLimiterStatistics(
            borrowed_tokens=len(self._borrowers),
            total_tokens=self._total,
            borrowers=list(self._borrowers),
            tasks_waiting=len(self._row),
        )

    def __repr__(self) -> str:
        borrowed = f"{len(self._borrowers)} of {self._total} borrowed{_and_waiting(len(self._row))}"
        return f"<CapacityLimiter at {id(self):#x}, {borrowed}>"


def _check_total(total_tokens: int | float) -> None:
    if not isinstance(total_tokens, int) and total_tokens != inf:
        raise TypeError(f"total_tokens must be an int or math.inf, not {total_tokens!r}")
    if total_tokens < 0:
        raise ValueError(f"total_tokens must not be below 0, and is {total_tokens}")


def _name(borrower: object) -> str:
    return f"task {borrower.name!r}" if isinstance(borrower, Task) else repr(borrower)


# ---- Condition ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ConditionStatistics:
    """What a condition says of itself: tasks that wait to be notified, and the `lock_statistics` of its lock."""

    tasks_waiting: int
    lock_statistics: LockStatistics


class Condition(_Row, _Held):
    """Wait until another task says that something has changed, which a lock protects.

        async with condition:
            while not enough():
                await condition.wait()  # gives the lock away meanwhile
            take()

        async with condition:
            put()
            condition.notify()

    The `while` is needed: between the notification and the moment the lock is yours, others may have had it. Between
    two `await`s nobody else runs, so where no `await` stands between test and wait an `Event` or a `Semaphore` will do.

    Args:
        lock: the lock to use, by default one of its own. Several conditions may share one.

    Raises TypeError if `lock` is something else.
    """

    __slots__ = ("_lock",)

    def __init__(self, lock: Lock | None = None) -> None:
        super().__init__()
        if lock is None:
            lock = Lock()
        elif not isinstance(lock, Lock):
            raise TypeError(f"a Condition wants a Lock, not {lock!r}")
        self._lock = lock

    def locked(self) -> bool:
        """Whether some task holds the lock."""
        return self._lock.locked()

    def acquire_nowait(self) -> None:
        """Take the lock if it is free. See `Lock.acquire_nowait`."""
        self._lock.acquire_nowait()

    def acquire(self) -> Operation[None]:
        """Take the lock, waiting for it if need be. See `Lock.acquire`."""
        return self._lock.acquire()

    def release(self) -> None:
        """Release the lock. See `Lock.release`."""
        self._lock.release()

    def __aenter__(self) -> Operation[None]:
        return self._lock.acquire()

    @operation
    def __aexit__(self, exc_type: object, exc: object, traceback: object) -> Generator[Any, Any, None]:
        # After an error, wait() may have lost the lock for good; or a crashed run throws its tasks away.
        if exc_type is None or not (self._lock._is_broken() or here.kernel is None):
            self._lock.release()
        return
        yield  # makes it a generator; nothing to wait for

    @operation
    def wait(self) -> Generator[Any, Any, None]:
        """Release the lock, wait to be notified, and have the lock again. Always a cancel point and a schedule point.

        A cancelled wait still waits for the lock before it raises `Cancelled`, for the code around it relies on having
        the lock: it is not prompt while another task holds it. A notification that had come already goes to the next
        one who waits.

        Raises:
            RuntimeError: this task does not hold the lock.
            BrokenResourceError: the lock's owner has ended without releasing it: this task does not hold it now.
        """
        task = self._check_owner("wait on")
        if task.scope.cancelled is not None:
            yield from checkpoint()
        self._lock.release()
        task.custom_sleep_data = None
        try:
            yield self
        except (Cancelled, KeyboardInterrupt):
            notified = task.custom_sleep_data is not None  # it has a number in the lock's row already
            with CancelScope(shield=True):
                yield from self._lock.acquire()
            if notified:
                self.notify()
            raise

    def notify(self, n: float = 1) -> None:
        """Let the first `n` tasks go that wait (`math.inf`: all). They go on one by one, as each gets the lock.

        Not a checkpoint; nobody is woken yet. They are queued for the lock, which this task still holds.

        Raises:
            RuntimeError: this task does not hold the lock.
            ValueError: `n` is neither a whole number from 0 up nor `math.inf`.
        """
        self._check_owner("notify")
        kernel = current_kernel()
        if n != inf and (not isinstance(n, int) or n < 0):
            raise ValueError(f"n must be a whole number from 0 up, or math.inf, not {n!r}")
        for _ in range(int(min(n, len(self._row)))):
            waiter, _ = self._row.popitem(last=False)
            self._lock._join(kernel, waiter)

    def notify_all(self) -> None:
        """Let all tasks go that wait. As `notify`."""
        self.notify(inf)

    def _check_owner(self, what: str) -> Task:
        task = current_task("a Condition")
        if self._lock.owner is not task:
            raise RuntimeError(
                f"task {task.name!r} tried to {what} {self!r} without holding its lock: what it has seen may have "
                "changed since. Write `async with condition:` around the test and this."
            )
        return task

    def statistics(self) -> ConditionStatistics:
        """How many tasks wait to be notified, and the lock's statistics."""
        return ConditionStatistics(tasks_waiting=len(self._row), lock_statistics=self._lock.statistics())

    def __repr__(self) -> str:
        return f"<Condition at {id(self):#x}{_and_waiting(len(self._row))}, with {self._lock!r}>"


# ---- Barrier ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BarrierStatistics:
    """What a barrier says of itself: how many `parties` it takes, how many tasks wait, and whether it is broken."""

    parties: int
    tasks_waiting: int
    broken: bool


class _Round(_Row):
    """The trap of a barrier, for which `abort` is a method of another meaning. It holds all the state, so that it need
    not refer back.
    """

    __slots__ = ("broken", "parties")

    def __init__(self, parties: int) -> None:
        super().__init__()
        self.parties = parties
        self.broken = False

    @operation
    def wait(self) -> Generator[Any, Any, int]:
        kernel = here.kernel or current_kernel("Barrier.wait()")
        task = kernel.current or current_task("Barrier.wait()")
        if task.scope.cancelled is not None:
            yield from checkpoint()
        if self.broken:
            raise _broken_barrier()
        place = len(self._row)
        if place + 1 < self.parties:
            index: int = yield self
            return index
        for index, waiter in enumerate(self._row):
            kernel.wake(waiter, index)
        self._row.clear()
        kernel.budget -= 1
        if kernel.budget < 0:
            yield from cancel_shielded_checkpoint()
        return place

    def dismiss(self, caller: str) -> None:
        """All who wait get an error."""
        if self._row:
            kernel = current_kernel(caller)
            for task in self._row:
                kernel.wake(task, error=_broken_barrier())
            self._row.clear()

    def __repr__(self) -> str:
        state = "broken" if self.broken else f"{len(self._row)} of {self.parties} have come"
        return f"<Barrier at {id(self):#x}, {state}>"


class Barrier:
    """A place where `parties` tasks wait for one another. When the last has come, all go on; then it starts anew.

    The last to come lets all go in one act, and one who is soon back waits in the next round. (asyncio's has a state in
    between, "draining", until all who were let go have run.)

    A cancelled `wait` leaves as if it had never come, and the others wait for another task in its place. In one nursery
    with the rest that is all one needs: a task that fails takes them along. Where the parties do not live and die
    together, the one that gives up must say so with `abort`.

        state     wait()                    abort()                 reset()
        -------   -----------------------   ---------------------   ----------------------
        filling   waits; the last lets go   sends away, -> broken   sends away, -> filling
        broken    raises                    -                       -> filling

    Who is sent away gets BrokenResourceError.

    trio has no barrier; this one has the methods of `threading.Barrier` and `asyncio.Barrier`, and trio's error.

    Args:
        parties: how many it takes, a whole number from 1 up.

    Raises TypeError or ValueError if it is no such number.
    """

    __slots__ = ("__weakref__", "_round")

    def __init__(self, parties: int) -> None:
        if not isinstance(parties, int):
            raise TypeError(f"parties must be an int, not {parties!r}")
        if parties < 1:
            raise ValueError(f"parties must not be below 1, and is {parties}")
        self._round = _Round(parties)

    @property
    def parties(self) -> int:
        """How many it takes."""
        return self._round.parties

    @property
    def n_waiting(self) -> int:
        """How many have come, and wait for the others."""
        return len(self._round._row)

    @property
    def broken(self) -> bool:
        """Whether `abort` was called, and not `reset` since."""
        return self._round.broken

    def wait(self) -> Operation[int]:
        """Wait until all parties have come. Returns a different number to each, from 0 for the first of them to
        `parties - 1` for the last.

        Always a cancel point, and then it is as if this task had not come. A schedule point for all but the last, and
        for that one if the budget is used up.

        Raises:
            BrokenResourceError: the barrier is broken, or `abort` or `reset` is called meanwhile.
            RuntimeError: called from outside any task.
        """
        return self._round.wait()

    def abort(self) -> None:
        """Break the barrier: who waits, or comes later, gets BrokenResourceError, until `reset`. Not a checkpoint.

        Raises RuntimeError if somebody waits and this is not the thread of their kernel.
        """
        self._round.dismiss("Barrier.abort()")
        self._round.broken = True

    def reset(self) -> None:
        """Begin anew: who waits gets BrokenResourceError, who comes later does not. Not a checkpoint.

        Raises RuntimeError if somebody waits and this is not the thread of their kernel.
        """
        self._round.dismiss("Barrier.reset()")
        self._round.broken = False

    def statistics(self) -> BarrierStatistics:
        """How many it takes, how many have come, and whether it is broken."""
        return BarrierStatistics(parties=self.parties, tasks_waiting=self.n_waiting, broken=self.broken)

    def __repr__(self) -> str:
        return repr(self._round)


def _broken_barrier() -> BrokenResourceError:
    return BrokenResourceError("the barrier was broken by abort() or reset(): not all parties will come")
