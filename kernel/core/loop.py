"""The loop: runs what is ready, and sleeps when nothing is.

    run_ready()     resume ready tasks, one step each, at most `stride` of them
    poll(timeout)   ask the poller who can go on, then the timers
    idle_time()     how long poll may sleep: not at all while a task is ready

`drive` calls the first two in turn until the main task has ended; a host loop may call the three itself. A *step* is
what one task does between two traps. What a trap does, what a scope means and who waits for whom is not known here:
the loop calls `trap.arm`, `trap.abort`, and tells a nursery when a child has ended.

Rules:

* Ready tasks run first come, first served. Another order is another `ReadyQueue`.
* Sockets and timers are looked at when nothing is ready, else after `stride` steps: asking costs a system call, 0.5
  us, as much as three steps. The stride is 61, a prime, so that it does not keep step with any pattern in the
  program; Go and tokio do the same. When steps are slow it shrinks until a pass takes about a millisecond, so that
  timeouts stay sharp.
* Only `wake` makes a sleeping task ready, and it commits: what it hands over has an owner from that moment.
* An error in a task is the task's. An error in the kernel's own code, or in a driver, ends the run with
  `KernelInternalError`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import copy_context
from inspect import isgenerator
from math import inf
from typing import Any, Final

from outcome import Error, Outcome, Value

from .asyncgens import AsyncGenerators
from .errors import CancelReason, KernelInternalError, new_cancelled
from .nursery import AsyncFn, Nursery, call_async, open_nursery
from .ports import Clock, Poller, ReadyQueue, Timers
from .scopes import CancelScope, leave_open_scopes
from .task import Coro, Task, here, name_of

__all__ = ["Kernel"]

STRIDE: Final = 61
"""Steps between two looks at the poller and the timers."""

PASS_TIME: Final = 0.001
"""Seconds a pass should not exceed; the stride adapts."""

BUDGET: Final = 128
"""How many operations a step may do that need not block before one of them yields all the same (tokio's number)."""


class Kernel:
    """One run: the tasks, and the four drivers they are served by. `kernel.run` makes one.

    What a trap may use: `wake`, `current`, and the drivers `clock`, `timers` and `poller`. All of it belongs to the
    thread that runs the kernel; nothing here may be called from another one.
    """

    __slots__ = (
        "__weakref__",
        # The drivers: see ports.py.
        "clock",
        "poller",
        "ready",
        "timers",
        # The step that runs. current is None between steps; budget below 0 means that the step has had its share.
        "budget",
        "current",
        # For those who wait until nothing happens any more (kernel.testing): for how many real seconds.
        "idle_waiters",
        # The loop's own.
        "_asyncgens",
        "_interrupted",
        "_passed_at",
        "_root",
        "_stride",
        # The ends of the task tree: root task > system nursery > main nursery > main task.
        "_main_nursery",
        "main_outcome",
        "main_task",
        "system_nursery",
    )

    def __init__(self, *, clock: Clock, timers: Timers, poller: Poller, ready: ReadyQueue) -> None:
        self.clock = clock
        self.timers = timers
        self.poller = poller
        self.ready = ready
        self.current: Task | None = None
        self.budget = BUDGET
        self.idle_waiters: dict[Task, float] = {}
        self._asyncgens = AsyncGenerators(self)
        self._interrupted: KeyboardInterrupt | None = None
        self._passed_at = -inf
        self._root: Task | None = None
        self._stride = STRIDE
        self._main_nursery: Nursery | None = None
        self.main_outcome: Outcome[Any] | None = None
        self.main_task: Task | None = None
        self.system_nursery: Nursery | None = None

    # ---- what traps and primitives call ---------------------------------------------------------

    def wake(self, task: Task, value: object = None, error: BaseException | None = None) -> None:
        """Make a sleeping task ready: its `yield` returns `value`, or raises `error`. From now on it cannot be cancelled
        out of it.

        Raises:
            RuntimeError: the task is not asleep (it was woken before, or cancelled).
        """
        if task.trap is None:
            raise RuntimeError(
                f"{task!r} is not asleep and cannot be woken; each sleep ends with exactly one wake or abort"
            )
        task.trap = None
        if error is None:
            task.step = task.send
            task.value = value
        else:
            task.step = task.coro.throw
            task.value = error
        self.ready.append(task)

    def interrupt(self, task: Task) -> None:
        """The scope `task` is in was cancelled: if it sleeps on something that can be taken back, wake it with
        `Cancelled`.

        A task at a checkpoint is not asleep; it sees for itself when its turn comes.
        """
        trap = task.trap
        if trap is None:
            return
        try:
            if not trap.abort(self, task):
                return
            error: BaseException = new_cancelled(task.scope.why_cancelled())
        except BaseException as failure:  # a bug in the trap: its task gets to know, and the others are still cancelled
            error = failure
        self.wake(task, error=error)

    # ---- one pass -------------------------------------------------------------------------------

    def run_ready(self) -> None:
        """Resume ready tasks, at most `_stride` of them, one step each.

        The hottest code of the package. Hence the local names, `trap is None` for a checkpoint, and no function call
        but the one into the task: 0.13 us a step, of which `Context.run` and the coroutine's own work are 0.1.
        """
        ready = self.ready
        popleft, append = ready.popleft, ready.append
        for _ in range(self._stride):
            if not ready:
                break
            task = popleft()
            self.current = task
            self.budget = BUDGET
            step = task.step
            try:
                if step is not None:
                    task.step = None
                    trap = task.context.run(step, task.value)
                    task.value = None
                elif task.scope.cancelled:
                    trap = task.context.run(task.coro.throw, new_cancelled(task.scope.why_cancelled()))
                else:
                    trap = task.context.run(task.send, None)
            except StopIteration as stop:
                self._finish(task, Value, stop.value)
            except BaseException as error:
                self._finish(task, Error, _without_our_frame(error))
            else:
                if trap is None:
                    append(task)
                    continue
                task.trap = trap
                try:
                    trap.arm(self, task)
                except BaseException as error:
                    self._refuse_trap(task, trap, _without_our_frame(error))
                else:
                    if task.scope.cancelled:
                        self.interrupt(task)
        self.current = None

    def idle_time(self) -> float:
        """How many real seconds `poll` may sleep: 0 while a task is ready, `inf` when only the outside world can help."""
        if self.ready or self._asyncgens.orphans:
            return 0.0
        return max(0.0, min(self.clock.deadline_to_sleep_time(self.timers.next_deadline()), self._cushion()))

    def poll(self, timeout: float) -> None:
        """Sleep up to `timeout` seconds until something happens, and make ready whom it concerns: first sockets, then
        timers.
        """
        clock = self.clock
        now = clock.current_time()
        if now - self._passed_at > PASS_TIME:
            self._stride = max(1, self._stride // 2)
        elif self._stride < STRIDE:
            self._stride = min(STRIDE, self._stride * 2)
        for task in self.poller.poll(timeout):
            self.wake(task)
        if timeout > 0:
            now = clock.current_time()
        for timed in self.timers.expired(now):
            timed.expire(self)
        if self._asyncgens.orphans:
            self._asyncgens.close_orphans()
        if not self.ready and timeout >= self._cushion():
            self._quiet()
        self._passed_at = now

    def _cushion(self) -> float:
        """How long nothing must happen before somebody wants to be told, in real seconds."""
        jump = self.clock.autojump_threshold
        if jump != inf and self.timers.next_deadline() == inf:
            jump = inf  # a clock with nowhere to jump to
        return (
            min(self.idle_waiters.values(), default=inf) if jump == inf else min(jump, *self.idle_waiters.values(), inf)
        )

    def _quiet(self) -> None:
        """Nothing happened for as long as somebody was waiting for: wake those, or let the clock jump."""
        cushion = self._cushion()
        waiters = [task for task, wanted in self.idle_waiters.items() if wanted == cushion]
        if not waiters:
            self.clock.autojump(self.timers.next_deadline())
        for task in waiters:
            del self.idle_waiters[task]
            self.wake(task)

    def _refuse_trap(self, task: Task, trap: Any, error: BaseException) -> None:
        """`arm` has failed: the task gets the error, and has not slept."""
        if not hasattr(trap, "arm"):
            error = _not_a_trap(trap)
        if task.trap is None:  # arm had woken it before it failed; it queues already
            task.step, task.value = task.coro.throw, error
        else:
            self.wake(task, error=error)

    # ---- the end of a task ------------------------------------------------------------------------

    def _finish(self, task: Task, how: Callable[[Any], Outcome[Any]], value: Any) -> None:
        """`task` has returned `value`, or raised it: `how` says which, and is what the outcome will be built with."""
        nursery = task.parent_nursery
        if nursery is None:
            task.step, task.value = how, value
            return
        if task.scope is not nursery.cancel_scope:
            left_open = leave_open_scopes(task, nursery.cancel_scope, value if how is Error else None)
            how, value = Error, left_open
        task.step, task.value = how, value
        if task is self.main_task:
            self.main_outcome = how(value)
            nursery.cancel_scope._cancel(CancelReason("shutdown"))
            nursery._child_ended(task, None)
        else:
            nursery._child_ended(task, value if how is Error else None)

    # ---- a whole run --------------------------------------------------------------------------------

    def run(self, async_fn: AsyncFn, args: tuple[Any, ...]) -> Outcome[Any]:
        """Run `async_fn(*args)` as the main task until it and all that it started have ended; return its outcome.

        Raises:
            RuntimeError: a kernel is running in this thread already.
            TypeError: `async_fn` is no async function (the message says what it was).
            KernelInternalError: the kernel or a driver broke.
        """
        if here.kernel is not None:
            raise RuntimeError(
                "kernel.run() was called from inside a kernel that is running in this thread. "
                "Await the function instead, or start it in a nursery."
            )
        here.kernel = self
        self._asyncgens.install()
        try:
            self._begin(call_async(async_fn, args, "kernel.run"), name_of(async_fn))
            self._drive()
        finally:
            self._asyncgens.restore()
            here.kernel = None
        assert self.main_outcome is not None
        if self._interrupted is not None:
            return Error(self._interrupted)
        return self.main_outcome

    def _begin(self, main: Coro, name: str) -> None:
        self.clock.start_clock()
        scope = CancelScope()
        self._root = Task(self._root_main(main, name), copy_context(), scope, None, "<root>")
        scope._bind(self, self._root)
        self.ready.append(self._root)

    async def _root_main(self, main: Coro, name: str) -> None:
        """The task at the root of the tree: first the program, then what it has left lying about, then the system's own
        tasks.
        """
        async with open_nursery() as self.system_nursery:
            async with open_nursery() as self._main_nursery:
                self.main_task = self._main_nursery._spawn(main, name)
            await self._asyncgens.close_all()
            self.system_nursery.cancel_scope._cancel(CancelReason("shutdown"))

    def _drive(self) -> None:
        root = self._root
        assert root is not None
        while True:
            try:
                self.run_ready()
                if root.outcome is not None:
                    break
                self.poll(self.idle_time())
            except KeyboardInterrupt as interrupt:
                self._interrupt_main(interrupt)
            except Exception as error:
                raise KernelInternalError(self._describe("the kernel or one of its drivers broke")) from error
        if isinstance(root.outcome, Error):
            raise KernelInternalError(self._describe("a task of the kernel's own failed")) from root.outcome.error

    def _interrupt_main(self, interrupt: KeyboardInterrupt) -> None:
        """Ctrl-C came while no task was running: ask everything to leave. A second one does not wait for it."""
        if self._interrupted is not None or self._main_nursery is None:
            raise interrupt
        self._interrupted = interrupt
        self._main_nursery.cancel_scope._cancel(CancelReason("KeyboardInterrupt"))

    def _describe(self, what: str) -> str:
        return (
            f"{what}; its state: {len(self.ready)} tasks ready, {len(self.timers)} timers, {len(self.poller)} waits for files, "
            f"running {self.current!r}. This is a bug in the kernel, a driver or a trap, not in the way it is used."
        )


def _without_our_frame(error: BaseException) -> BaseException:
    """Drop the loop's own line from the traceback: it is noise, and it would keep the loop's variables alive in a cycle."""
    traceback = error.__traceback__
    return error.with_traceback(traceback.tb_next) if traceback is not None else error


def _not_a_trap(thing: object) -> TypeError:
    """Somebody awaited, or yielded, what this kernel cannot wait for. Name the likely mistake."""
    library = type(thing).__module__.partition(".")[0].lstrip("_")
    if isgenerator(thing) or isinstance(thing, Awaitable):
        if hasattr(thing, "_asyncio_future_blocking"):
            return TypeError(
                f"a task awaited {thing!r}, which belongs to {library}. This kernel cannot wait for another library's futures: use this "
                "package's counterpart, or run that library in a thread of its own."
            )
        return TypeError(
            f"a generator yielded {thing!r} itself. Write `yield from` instead of `yield`, or `await` in an async def."
        )
    if library == "builtins":
        return TypeError(
            f"a task yielded {thing!r}, which is not a trap. A generator that runs as a task may only `yield from` operations of the kernel; "
            "a bare `yield` is for traps. (An awaited object of a library written for another kernel, such as curio, does this too.)"
        )
    return TypeError(
        f"a task awaited something of {library} ({thing!r}), which this kernel cannot wait for: "
        f"it has no arm() and abort(). Use this package's counterpart, or run {library} in a thread of its own."
    )
