"""Cancel scopes: which part of the program shall leave, and by when.

A scope is a `with` block that can be told to end. The scopes of a task form a chain from the innermost one,
`task.scope`, outward; the chain goes on through the nursery the task runs in to the scopes around that nursery. So
all scopes form a tree whose branches are tasks:

    main        [ scope ] <- [ nursery's scope ] <- [ scope ] <- main.scope
                                      ^
    child                             +--- [ scope ] <- child.scope

Rules:

* A scope is *cancelled* when its parent is cancelled and it does not shield, or else when `cancel()` was called on it
  or its deadline has passed. `scope.cancelled` holds the reason, or None. It is recomputed, downwards, only when
  something changes, so a cancel point is one attribute test: `task.scope.cancelled is None`.
* Cancellation is level-triggered: while its innermost scope is cancelled, *every* cancel point of a task raises.
* A scope swallows `Cancelled` if it was called itself and no cancellation is visible to it from outside. Otherwise the
  exception is meant for another scope and passes. A scope that nobody cancelled never swallows anything.

No scope keeps a list of the scopes or tasks inside it: a task's own scopes are a chain, and a nursery knows its tasks.
`propagate` walks down along those; entering and leaving a scope moves one pointer.
"""

from __future__ import annotations

from math import inf, isnan
from typing import TYPE_CHECKING, Any, ClassVar, Final

from .errors import Cancelled, CancelReason
from .task import Task, current_kernel, current_task, here

if TYPE_CHECKING:
    from .loop import Kernel
    from .nursery import Nursery

_DEADLINE: Final = CancelReason("deadline")

_ADVICE: Final = (
    "Scopes and nurseries must be left by the task that entered them, the innermost first. The usual cause is an async "
    "generator or a fixture that yields from inside one: make it an async context manager instead."
)


class CancelScope:
    """A block of code that can be cancelled: `with CancelScope() as scope: ...`, then `scope.cancel()` from anywhere.

    It may be cancelled, and its deadline and shield set, before it is entered, also by another task. It can be entered
    once. Entering and leaving are not checkpoints.

    Args:
        deadline: absolute time on the kernel's clock, in seconds, at which the scope cancels itself.
        relative_deadline: the same as seconds from the moment of entering, not below 0. Not both.
        shield: whether cancellation from outside is kept out.

    Raises ValueError if a deadline is NaN, the relative one negative, or both given; TypeError if `shield` is no bool.

    Attributes:
        cancelled_caught: whether the block ended because this scope swallowed a `Cancelled`.
    """

    soft: ClassVar[bool] = False  # whether its shield gives way when the grace of a scope around it is over
    # fmt: off
    __slots__ = (
        # The user's wishes. _relative == inf or (_deadline == inf and _state == "new")
        "_why", "_deadline", "_relative", "_shield", "_grace_end",  # _why: the reason it was called for, or None
        # Its place. _state is "new", "active", "exited" or "abandoned"; while "active", it is in _task's chain.
        "_state", "_task", "_parent", "_kernel",
        "nursery",  # whose scope it is, if any
        # Derived: cancelled is (None if _shield else _parent.cancelled) or _why, while active.
        "cancelled", "cancelled_caught",
        # The timers driver's. In the timers exactly while active and _why is None and _deadline < inf.
        "timer", "__weakref__",
    )
    # fmt: on

    # By keyword, please. Positions are for this package: they save 0.15 of the 0.9 us that a timeout takes.
    def __init__(self, deadline: float = inf, relative_deadline: float = inf, shield: bool = False) -> None:
        if deadline != inf:
            _check_deadline(deadline)
        if relative_deadline != inf:
            _check_relative(relative_deadline)
            if deadline != inf:
                raise ValueError("give either deadline= (absolute) or relative_deadline= (from entering), not both")
        if shield is not False:
            _check_shield(shield)
        self._deadline = deadline
        self._relative = relative_deadline
        self._shield = shield
        self._why: CancelReason | None = None
        self._grace_end = inf
        self._state = "new"
        self._task: Task | None = None
        self._parent: CancelScope | None = None
        self._kernel: Kernel | None = None
        self.nursery: Nursery | None = None
        self.timer: tuple[float, float, Any] | None = None
        self.cancelled: CancelReason | None = None
        self.cancelled_caught = False

    # ---- entering and leaving -----------------------------------------------------------------

    def __enter__(self) -> CancelScope:
        if self._state != "new":
            raise RuntimeError(
                f"{self!r} was entered a second time: a scope serves one `with` block, make one for each"
            )
        kernel = here.kernel or current_kernel("CancelScope")
        task = kernel.current or current_task("CancelScope")
        parent = task.scope
        self._kernel = kernel
        self._task = task
        self._parent = parent
        self._state = "active"
        if self._relative != inf or self._deadline != inf:
            now = kernel.clock.current_time()
            if self._relative != inf:
                self._deadline = now + self._relative
                self._relative = inf
            if self._why is None:
                self._start_timer(kernel, now)
        self.cancelled = self._why if self._shield else parent.cancelled or self._why
        task.scope = self
        return self

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> bool:
        task, kernel = self._task, self._kernel
        if kernel is None or task is None or task.scope is not self or kernel.current is not task:
            self._leave_out_of_order(exc)
            return False
        parent = self._parent
        assert parent is not None
        task.scope = parent
        self._retire()
        if exc is None or self._why is None or (parent.cancelled is not None and not self._shield):
            return False
        return self._swallow(exc)

    def _retire(self) -> None:
        """The block is over: let go of everything."""
        if self._deadline != inf and self._why is None:
            assert self._kernel is not None
            self._kernel.timers.remove(self)
        self._state = "exited"
        self._kernel = self._task = self._parent = self.nursery = None

    def _swallow(self, exc: BaseException) -> bool:
        """`exc` leaves a block whose cancellation is this scope's business: take the `Cancelled` out of it."""
        if isinstance(exc, Cancelled):
            self.cancelled_caught = True
            return True
        if not isinstance(exc, BaseExceptionGroup):
            return False
        try:
            ours, rest = exc.split(Cancelled)
        except RecursionError:  # nested a thousand deep: let it pass as it is
            return False
        if ours is None:
            return False
        self.cancelled_caught = True
        if rest is None:
            return True
        context = rest.__context__
        try:
            raise rest
        finally:
            rest.__context__ = context  # `raise` has set it to `exc`, which we have just taken apart
            del rest, exc, ours, context

    def _leave_out_of_order(self, exc: BaseException | None) -> None:
        """Take the scope out of its chain, wherever it stands. The scopes inside it stay in force and can be left in
        order, so that one RuntimeError is all the harm.
        """
        if self._state == "abandoned" or (self._kernel is not None and not self._kernel.running):
            return  # its task has ended and was told; or the run has crashed, and the task is being thrown away
        task, parent = self._task, self._parent
        if task is None or parent is None:
            raise RuntimeError(f"{self!r} was left without having been entered, or a second time. {_ADVICE}")
        kernel = current_kernel("CancelScope")
        if task.scope is self:
            task.scope = parent
        else:
            outermost_inside(task, self)._parent = parent
        self._retire()
        propagate(kernel, [task], parent, True)
        current = kernel.current
        if current is task:
            raise RuntimeError(f"{self!r} was left before a scope or nursery inside it was. {_ADVICE}") from exc
        raise RuntimeError(f"{self!r} was entered by {task!r} but left by {current!r}. {_ADVICE}") from exc

    # ---- cancelling ---------------------------------------------------------------------------

    def cancel(self, reason: str | None = None, *, grace: float = inf) -> None:
        """Cancel the scope: every cancel point inside raises `Cancelled` from now on; who sleeps inside wakes with it.

        Not a checkpoint. The scope's deadline ends. `Cancelled` will show the `reason`. `cleanup` blocks inside end in
        `grace` seconds at the latest, counted from now; other shields stand. Calling it again does nothing, but that a
        shorter `grace` counts. Cost: proportional to the scopes and tasks inside.

        Raises:
            TypeError, ValueError: `reason` is no string; `grace` is negative or NaN.
            RuntimeError: called from another thread than the kernel's.
        """
        if reason is not None and not isinstance(reason, str):
            raise TypeError(f"cancel(reason=...) wants a string, not {reason!r}")
        _check_relative(grace, "grace")
        end = inf if grace == inf else current_kernel("cancel(grace=...)").clock.current_time() + grace
        task = here.kernel.current if here.kernel is not None else None
        name, number = (None, 0) if task is None else (task.name, id(task))
        self._cancel(CancelReason("explicit", name, number, reason))
        if end < self._grace_end:
            hasten(self, end)

    def _cancel(self, why: CancelReason) -> None:
        kernel = self._kernel
        if kernel is not None and here.kernel is not kernel:
            raise RuntimeError("a scope was cancelled from outside its kernel's thread; have the kernel do it")
        if self._why is not None:
            return
        if kernel is not None and self._deadline != inf:
            kernel.timers.remove(self)
        self._why = why
        if self._state == "active":
            self._update()

    def expire(self, kernel: Kernel) -> None:
        """The deadline has passed, and the timer is gone. Called by the loop."""
        self._why = _DEADLINE
        self._update()

    def _update(self) -> None:
        """Something about this scope has changed: bring `cancelled` up to date here and below."""
        kernel, task, parent = self._kernel, self._task, self._parent
        assert kernel is not None
        assert task is not None
        if task.scope is not self or self.nursery is not None:
            propagate(kernel, [task], parent, False)
            return
        # Nothing below, as with nearly every timeout: the same for this scope alone. Saves 0.7 of 5 us when one fires.
        newly = self.cancelled is None
        self.cancelled = self._why if self._shield or parent is None else parent.cancelled or self._why
        if newly and self.cancelled is not None:
            kernel.interrupt(task)

    # ---- deadline and shield ------------------------------------------------------------------

    def _start_timer(self, kernel: Kernel, now: float) -> None:
        """The scope is active, uncalled, and has a deadline: wait for it, or be called if it has passed."""
        if self._deadline <= now:
            self._why = _DEADLINE
        else:
            kernel.timers.add(self._deadline, self)

    def _set_deadline(self, deadline: float) -> None:
        kernel = self._kernel if self._why is None else None  # None: no timer is running, and none will
        if kernel is not None and self._deadline != inf:
            kernel.timers.remove(self)
        self._deadline = deadline
        if kernel is not None and deadline != inf:
            self._start_timer(kernel, kernel.clock.current_time())
            self._update()

    @property
    def deadline(self) -> float:
        """When the scope cancels itself, on the kernel's clock; `inf` for never. Settable; a past time cancels at once.
        Raises RuntimeError while the scope is unentered and has a relative deadline, ValueError for NaN.
        """
        self._refuse_relative()
        return self._deadline

    @deadline.setter
    def deadline(self, deadline: float) -> None:
        _check_deadline(deadline)
        self._refuse_relative()
        self._set_deadline(float(deadline))

    @property
    def relative_deadline(self) -> float:
        """Seconds to the deadline: from entering while unentered, from now afterwards. Settable likewise, not below 0.
        Raises RuntimeError while the scope is unentered and has an absolute deadline.
        """
        if self._state != "new":
            return self._deadline - current_kernel("relative_deadline").clock.current_time()
        self._refuse_absolute()
        return self._relative

    @relative_deadline.setter
    def relative_deadline(self, seconds: float) -> None:
        _check_relative(seconds)
        if self._state != "new":
            self._set_deadline(current_kernel("relative_deadline").clock.current_time() + seconds)
        else:
            self._refuse_absolute()
            self._relative = float(seconds)

    @property
    def is_relative(self) -> bool | None:
        """Before entering: whether a relative deadline is set. None afterwards."""
        return self._relative != inf if self._state == "new" else None

    def _refuse_relative(self) -> None:
        if self._relative != inf:
            raise RuntimeError("the scope has a relative deadline and was not entered yet: it has no absolute one")

    def _refuse_absolute(self) -> None:
        if self._deadline != inf:
            raise RuntimeError("the scope has an absolute deadline and was not entered yet: it has no relative one")

    @property
    def shield(self) -> bool:
        """Whether cancellation from outside is kept out. Settable; lowered, it lets a waiting one in at once."""
        return self._shield

    @shield.setter
    def shield(self, shield: bool) -> None:
        _check_shield(shield)
        self._shield = shield
        if self._state == "active":
            self._update()

    @property
    def cancel_called(self) -> bool:
        """Whether `cancel()` was called or the deadline has passed; looks at the clock, not only at checkpoints."""
        if self._why is None and self._deadline != inf and self._state in ("new", "active"):
            kernel = here.kernel
            if kernel is not None and self._kernel in (None, kernel) and self._deadline <= kernel.clock.current_time():
                self._cancel(_DEADLINE)
        return self._why is not None

    def __repr__(self) -> str:
        parts = [self._state]
        if self._why is not None:
            parts.append("cancelled")
        elif self._relative != inf:
            parts.append(f"deadline {self._relative:g} s after entering")
        elif self._deadline != inf:
            parts.append(f"deadline {self._deadline:.3f}")
        if self._shield:
            parts.append("shielded")
        return f"<CancelScope at {id(self):#x}, {', '.join(parts)}>"


def outermost_inside(task: Task, scope: CancelScope) -> CancelScope:
    """The scope in `task`'s chain whose parent is `scope`."""
    inside = task.scope
    while inside._parent is not scope:
        assert inside._parent is not None
        inside = inside._parent
    return inside


def propagate(kernel: Kernel, tasks: list[Task], settled: CancelScope | None, newly: bool) -> None:
    """Recompute `cancelled` down the tree, and interrupt the tasks that cancellation has newly reached.

    The chains of `tasks` are recomputed from `settled` inwards; `newly` is whether that one was not cancelled before.
    Where a scope does not change, nothing below it does. Breadth first; children in the order of their start.
    """
    levels = [(tasks, settled, newly)]
    for tasks, settled, was_free in levels:
        for task in tasks:
            newly, chain, scope = was_free, [], task.scope
            while scope is not settled:
                chain.append(scope)
                scope = scope._parent  # type: ignore[assignment]  # not None before `settled`
            for scope in reversed(chain):
                parent = scope._parent
                reason = scope._why if scope._shield or parent is None else parent.cancelled or scope._why
                if reason is scope.cancelled:
                    break
                newly = scope.cancelled is None
                scope.cancelled = reason
                if scope.nursery is not None:
                    levels.append((list(scope.nursery._children), scope, newly))
            else:
                if newly and task.scope.cancelled is not None:
                    kernel.interrupt(task)


def hasten(scope: CancelScope, end: float) -> None:
    """Soft shields inside `scope` give way at `end` at the latest. Other shields hide what is inside them."""
    scope._grace_end = end  # for those that are entered later
    levels = [([scope._task], scope._parent)] if scope._task is not None else []
    for tasks, outside in levels:
        for task in tasks:
            chain, inner = [], task.scope
            while inner is not outside:
                chain.append(inner)
                inner = inner._parent  # type: ignore[assignment]  # as in propagate
            for inner in reversed(chain):
                if inner._shield and not inner.soft and inner is not scope:
                    break
                if inner.soft and end < inner._deadline:
                    inner._set_deadline(end)
                if inner.nursery is not None:
                    levels.append((list(inner.nursery._children), inner))


def leave_open_scopes(task: Task, base: CancelScope, error: BaseException | None) -> BaseException:
    """`task` has ended, with `error` or well, inside scopes that it never left. Close them; return what to raise.

    Children of a nursery left open go to the nursery of `task` itself, which the error returned here will cancel.
    """
    innermost = task.scope
    while task.scope is not base:
        scope = task.scope
        assert scope._parent is not None
        assert task.parent_nursery is not None
        if scope.nursery is not None:
            task.parent_nursery._inherit(scope.nursery)
        task.scope = scope._parent
        scope._retire()
        scope._state = "abandoned"
    text = f"{task!r} ended inside {innermost!r}, which it never left. {_ADVICE}"
    if error is None or isinstance(error, Cancelled):
        return RuntimeError(text)
    error.add_note(text)
    return error


def _check_deadline(deadline: float) -> None:
    if isnan(deadline):
        raise ValueError("deadline must not be NaN")


def _check_relative(seconds: float, what: str = "relative_deadline") -> None:
    if not seconds >= 0:
        raise ValueError(f"{what} must be a number of seconds from 0 up, not {seconds!r}")


def _check_shield(shield: bool) -> None:
    if not isinstance(shield, bool):
        raise TypeError(f"shield must be a bool, not {shield!r}")
