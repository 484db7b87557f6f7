"""Cancel scopes: which part of the program shall leave, and by when.

A scope is a `with` block that can be told to end. The scopes of a task form a chain from the innermost one,
`task.scope`, outward; the chain goes on through the nursery the task runs in to the scopes around that nursery. So
all scopes form a tree whose branches are tasks:

    main        [ scope ] <- [ nursery's scope ] <- [ scope ] <- main.scope
                                      ^
    child                             +--- [ scope ] <- child.scope

Rules:

* A scope is *cancelled* when `cancel()` was called on it or its deadline has passed, or when its parent is cancelled
  and it does not shield. This is kept in `scope.cancelled` and recomputed, downwards, only when something changes; so
  a cancel point is one attribute test: `task.scope.cancelled`.
* Cancellation is level-triggered: while its innermost scope is cancelled, *every* cancel point of a task raises
  `Cancelled`.
* A scope swallows `Cancelled` if it was called itself and no cancellation is visible to it from outside; otherwise it
  lets the exception pass, to be caught by the scope that it is meant for. A scope that nobody cancelled never
  swallows anything.
* A deadline costs nothing until it may matter: the timers driver sorts it in only when time is next looked at.

There are no lists of child scopes or of tasks in a scope: a task's own scopes are a chain, and the nursery knows its
tasks. Walking down from a scope uses those, and entering and leaving one writes two fields.
"""

from __future__ import annotations

from math import inf
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from .errors import Cancelled, CancelReason
from .task import Task, current_kernel, here

if TYPE_CHECKING:
    from .loop import Kernel
    from .nursery import Nursery

__all__ = ["CancelScope", "current_effective_deadline", "leave_open_scopes", "propagate"]

_DEADLINE: Final = CancelReason("deadline")

_ADVICE: Final = (
    "Scopes and nurseries must be left in the reverse of the order they were entered in, by the task that entered them. "
    "The usual cause is an async generator or a fixture that yields from inside one: make it an async context manager instead."
)


class CancelScope:
    """A block of code that can be cancelled: `with CancelScope() as scope: ...`, then `scope.cancel()` from anywhere in
    the run.

    It may be made, cancelled, and have its deadline and shield set before it is entered, in another task too. It can
    be entered once. Entering and leaving are not checkpoints.

    Args:
        deadline: absolute time on the kernel's clock, in seconds, at which the scope cancels itself.
        relative_deadline: the same as seconds from the moment of entering, not below 0. Not both.
        shield: whether cancellation from outside is kept out.

    Raises:
        ValueError: a deadline is NaN, the relative one is negative, or both are given.
        TypeError: `shield` is no bool.

    Attributes:
        cancelled_caught: whether the block ended because this scope swallowed a `Cancelled`.
    """

    __slots__ = (
        "__weakref__",
        # The user's wishes. not (_deadline < inf and _relative < inf); _relative == inf once entered.
        "_called",
        "_deadline",
        # Set while entered. _state == "active" implies: self is in the chain from _task.scope.
        "_kernel",
        "_parent",
        "_relative",
        "_shield",
        "_state",
        "_task",
        "_why",
        # Derived. cancelled == _called or (not _shield and _parent.cancelled), while active.
        "cancelled",
        "cancelled_caught",
        # Set by the nursery whose scope this is.
        "nursery",
        # The timers driver's. Among the timers, exactly while active and not _called and _deadline < inf.
        "timer",
    )

    def __init__(self, *, deadline: float = inf, relative_deadline: float = inf, shield: bool = False) -> None:
        if deadline != inf or relative_deadline != inf:
            _check_deadline(deadline, "deadline")
            _check_relative(relative_deadline)
            if deadline != inf and relative_deadline != inf:
                raise ValueError(
                    "give either deadline= (absolute) or relative_deadline= (seconds from entering), not both"
                )
        if shield is not False:
            _check_shield(shield)
        self._deadline = deadline
        self._relative = relative_deadline
        self._shield = shield
        self._called = False
        self._why: CancelReason | None = None
        self._state = "new"
        self._task: Task | None = None
        self._parent: CancelScope | None = None
        self._kernel: Kernel | None = None
        self.nursery: Nursery | None = None
        self.timer: tuple[float, float, Any] | None = None
        self.cancelled = False
        self.cancelled_caught = False

    # ---- entering and leaving -----------------------------------------------------------------

    def __enter__(self) -> CancelScope:
        if self._state != "new":
            raise RuntimeError(
                f"{self!r} was entered a second time; a scope serves one `with` block. Make a new CancelScope for each."
            )
        kernel = here.kernel or current_kernel("CancelScope")
        task = kernel.current
        if task is None:
            raise RuntimeError("a CancelScope was entered outside any task")
        if self._relative != inf:
            self._deadline = kernel.clock.current_time() + self._relative
            self._relative = inf
        parent = task.scope
        self._kernel = kernel
        self._task = task
        self._parent = parent
        self._state = "active"
        if self._deadline != inf and not self._called:
            self._start_timer(kernel)
        self.cancelled = self._called or (parent.cancelled and not self._shield)
        task.scope = self
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        task, kernel = self._task, self._kernel
        if kernel is None or task is None or task.scope is not self or kernel.current is not task:
            self._leave_out_of_order(exc)
            return False
        parent = self._parent
        assert parent is not None
        task.scope = parent
        self._retire()
        if exc is None or not self._called or (parent.cancelled and not self._shield):
            return False
        return self._swallow(exc)

    def _bind(self, kernel: Kernel, task: Task) -> None:
        """Make this the scope at the root of everything: active from the start, never left."""
        self._kernel, self._task, self._state = kernel, task, "active"

    def _retire(self) -> None:
        """The block is over: let go of everything."""
        if self._deadline != inf and not self._called:
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
        ours, rest = exc.split(Cancelled)
        if ours is None:
            return False
        self.cancelled_caught = True
        if rest is None:
            return True
        context = rest.__context__
        try:
            raise rest
        finally:
            # `raise` has set the context to `exc`, which we have just taken apart.
            rest.__context__ = context
            del rest, exc, ours, context

    def _leave_out_of_order(self, exc: BaseException | None) -> None:
        """Somebody left this scope while it was not the innermost one of the running task.

        The scope is taken out of its chain, wherever it stands there, and the scopes inside it stay in force; so this
        one RuntimeError is all the harm, and everything else can be left in order.
        """
        if self._state == "abandoned":  # its task has ended and was told
            return
        if self._state != "active":
            raise RuntimeError(f"{self!r} was left without having been entered, or a second time. {_ADVICE}")
        task, current = self._task, current_kernel("CancelScope").current
        assert task is not None
        self._splice_out()
        if current is task:
            raise RuntimeError(f"{self!r} was left before a scope or nursery inside it was. {_ADVICE}") from exc
        raise RuntimeError(f"{self!r} was entered by {task!r} but left by {current!r}. {_ADVICE}") from exc

    def _splice_out(self) -> None:
        task, parent = self._task, self._parent
        assert task is not None
        assert parent is not None
        if task.scope is self:
            task.scope = parent
            above = parent
        else:
            above = task.scope
            while above._parent is not self:
                assert above._parent is not None
                above = above._parent
            above._parent = parent
        self._retire()
        above._update()

    # ---- cancelling ---------------------------------------------------------------------------

    def cancel(self, reason: str | None = None) -> None:
        """Cancel the scope: from now on every cancel point inside raises `Cancelled`, and what sleeps inside wakes with
        it.

        Not a checkpoint; calling it again does nothing. Pending deadlines of the scope end. Cost: proportional to the
        scopes and tasks inside.

        Args:
            reason: shown by the `Cancelled` it causes.

        Raises:
            TypeError: `reason` is no string.
            RuntimeError: called from another thread than the kernel's.
        """
        if reason is not None and not isinstance(reason, str):
            raise TypeError(f"cancel(reason=...) wants a string, not {reason!r}")
        if not self._called:
            kernel = here.kernel
            task = kernel.current if kernel is not None else None
            if task is None:
                self._cancel(CancelReason("explicit", reason=reason))
            else:
                self._cancel(CancelReason("explicit", task.name, id(task), reason))

    def _cancel(self, why: CancelReason) -> None:
        if self._called:
            return
        kernel = self._kernel
        if kernel is not None:
            if here.kernel is not kernel:
                raise RuntimeError(
                    "a scope was cancelled from outside its kernel's thread; ask the kernel to do it there"
                )
            if self._deadline != inf:
                kernel.timers.remove(self)
        self._called = True
        self._why = why
        if self._state == "active":
            self._update()

    def expire(self, kernel: Kernel) -> None:
        """The deadline has passed (called by the loop; the timer is gone)."""
        self._called = True
        self._why = _DEADLINE
        self._update()

    def _update(self) -> None:
        """Something about this scope has changed: bring `cancelled` up to date here and below."""
        if self._task is not None and self._kernel is not None:
            propagate(self._kernel, [(self._task, self._parent)])

    def why_cancelled(self) -> CancelReason | None:
        """The reason given to the scope that will catch a `Cancelled` raised here: the outermost one in sight."""
        why, scope = None, self
        while True:
            if scope._called:
                why = scope._why
            if scope._shield or scope._parent is None:
                return why
            scope = scope._parent

    # ---- deadline and shield ------------------------------------------------------------------

    def _start_timer(self, kernel: Kernel) -> None:
        """The scope is active, uncalled, and has a deadline: wait for it, or cancel if it has passed."""
        if self._deadline <= kernel.clock.current_time():
            self._called = True
            self._why = _DEADLINE
        else:
            kernel.timers.add(self._deadline, self)

    def _set_deadline(self, deadline: float) -> None:
        waits = self._state == "active" and not self._called
        if waits and self._deadline != inf:
            assert self._kernel is not None
            self._kernel.timers.remove(self)
        self._deadline = deadline
        if waits and deadline != inf:
            assert self._kernel is not None
            self._start_timer(self._kernel)
            if self._called:
                self._update()

    @property
    def deadline(self) -> float:
        """Absolute time on the kernel's clock at which the scope cancels itself; `inf` for never. Settable at any time.

        A past time cancels at once. Raises RuntimeError while the scope is unentered and has a relative deadline,
        ValueError for NaN.
        """
        self._refuse_relative()
        return self._deadline

    @deadline.setter
    def deadline(self, deadline: float) -> None:
        _check_deadline(deadline, "deadline")
        self._refuse_relative()
        self._set_deadline(float(deadline))

    @property
    def relative_deadline(self) -> float:
        """Seconds until the deadline: from entering while unentered, from now afterwards. Settable likewise; not below
        0.

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
            raise RuntimeError("this scope has a relative deadline and was not entered yet: it has no absolute one")

    def _refuse_absolute(self) -> None:
        if self._deadline != inf:
            raise RuntimeError("this scope has an absolute deadline and was not entered yet: it has no relative one")

    @property
    def shield(self) -> bool:
        """Whether cancellation from outside is kept out. Settable at any time; lowering it lets a waiting cancellation
        in at once.
        """
        return self._shield

    @shield.setter
    def shield(self, shield: bool) -> None:
        _check_shield(shield)
        self._shield = shield
        if self._state == "active":
            self._update()

    @property
    def cancel_called(self) -> bool:
        """Whether `cancel()` was called or the deadline has passed. Looks at the clock, so that it is right between
        checkpoints too.
        """
        if not self._called and self._deadline != inf and self._state in ("new", "active"):
            kernel = self._kernel or here.kernel
            if kernel is not None and self._deadline <= kernel.clock.current_time():
                self._cancel(_DEADLINE)
        return self._called

    def __repr__(self) -> str:
        parts = [self._state]
        if self._called:
            parts.append("cancelled")
        elif self._relative != inf:
            parts.append(f"deadline {self._relative:g} s after entering")
        elif self._deadline != inf:
            kernel = self._kernel or here.kernel
            if kernel is None:
                parts.append(f"deadline {self._deadline:.3f}")
            else:
                parts.append(f"deadline in {self._deadline - kernel.clock.current_time():.3f} s")
        if self._shield:
            parts.append("shielded")
        return f"<CancelScope at {id(self):#x}, {', '.join(parts)}>"


def propagate(kernel: Kernel, reached: list[tuple[Task, CancelScope | None]]) -> None:
    """Recompute `cancelled` down the tree, and interrupt the tasks that cancellation has newly reached.

    Each entry of `reached` is a task and the scope up to which all is settled: its chain is recomputed from there
    inwards. Where a scope does not change, nothing below it does. Breadth first, without recursion; children in the
    order they were started.
    """
    for task, settled in reached:
        chain = []
        scope: CancelScope | None = task.scope
        while scope is not settled:
            assert scope is not None
            chain.append(scope)
            scope = scope._parent
        for scope in reversed(chain):
            parent = scope._parent
            cancelled = scope._called or (parent is not None and parent.cancelled and not scope._shield)
            if cancelled == scope.cancelled:
                break
            scope.cancelled = cancelled
            if scope.nursery is not None:
                reached.extend((child, scope) for child in scope.nursery._children)
        else:
            if task.scope.cancelled:
                kernel.interrupt(task)


def leave_open_scopes(task: Task, base: CancelScope, error: BaseException | None) -> BaseException:
    """`task` has ended, with `error` or well, inside scopes that it never left. Close them; return what to raise.

    Children of a nursery left open go to the nursery that `task` itself ran in, which the error returned here will
    cancel.
    """
    innermost = task.scope
    while task.scope is not base:
        scope = task.scope
        assert scope._parent is not None
        assert task.parent_nursery is not None
        if scope.nursery is not None:
            task.parent_nursery._take_over(scope.nursery)
        task.scope = scope._parent
        scope._retire()
        scope._state = "abandoned"
    text = f"{task!r} ended inside {innermost!r}, which it never left. {_ADVICE}"
    if error is None or isinstance(error, Cancelled):
        return RuntimeError(text)
    error.add_note(text)
    return error


def current_effective_deadline() -> float:
    """The earliest deadline that holds for the running task, as an absolute time; `-inf` if it is cancelled already,
    `inf` for none.

    Not a checkpoint. Cost: the number of scopes in sight.

    Raises:
        RuntimeError: called from outside any task.
    """
    task = current_kernel("current_effective_deadline()").current
    if task is None:
        raise RuntimeError("current_effective_deadline() was called from outside any task")
    deadline, scope = inf, task.scope
    while True:
        deadline = min(deadline, scope._deadline)
        if scope._called:
            return -inf
        if scope._shield or scope._parent is None:
            return deadline
        scope = scope._parent


def _check_deadline(deadline: float, what: str) -> None:
    if deadline != deadline:
        raise ValueError(f"{what} must not be NaN")


def _check_relative(seconds: float) -> None:
    _check_deadline(seconds, "relative_deadline")
    if seconds < 0:
        raise ValueError(f"relative_deadline must not be negative, but is {seconds!r}")


def _check_shield(shield: bool) -> None:
    if not isinstance(shield, bool):
        raise TypeError(f"shield must be a bool, not {shield!r}")
