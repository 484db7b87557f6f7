"""The loop: runs what is ready, and sleeps when nothing is.

    run_ready()     resume ready tasks, one step each, at most `stride` of them
    poll(timeout)   ask the poller who can go on, then the timers
    idle_time()     how long poll may sleep: not at all while a task is ready

`drive` calls them in turn until all tasks have ended; a host loop may do so itself. A *step* is what one task does
between two traps. What a trap does, what a scope means and who waits for whom is not known here:
the loop calls `trap.arm` and `trap.abort`, and strikes a task that has ended off its nursery's list.

Rules:

* Ready tasks run first come, first served. Another order is another `ReadyQueue`.
* Sockets and timers are looked at when nothing is ready, else after `stride` steps: asking costs a system call, 0.5
  us, as much as three steps. The stride is 61, a prime, so that it does not keep step with any pattern in the
  program; Go and tokio do the same. When steps are slow it shrinks until a pass takes about a millisecond, so that
  timeouts stay sharp.
* Only `wake` makes a sleeping task ready, and it commits: what it hands over has an owner from that moment.
* Only `call_soon` may be called from outside the kernel's thread. It is the one door, and leads to the end of a pass.
* An error in a task is the task's. An error in the kernel's own code, or in a driver, ends the run with
  `KernelInternalError`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextvars import copy_context
from inspect import isgenerator
from itertools import repeat
from math import inf
from typing import Any, Final

from outcome import Error, Outcome, Value

from .errors import Cancelled, CancelReason, KernelInternalError, new_cancelled
from .nursery import AsyncFn, Nursery, call_async, open_nursery
from .ports import Clock, Poller, ReadyQueue, Timers
from .scopes import CancelScope, leave_open_scopes
from .task import START, Coro, Task, current_task, here, name_of

STRIDE: Final = 61  # steps between two looks at the poller and the timers
PASS_TIME: Final = 0.001  # seconds that a pass should not exceed: the stride adapts
BUDGET: Final = 128  # operations that need not block, before one of them yields all the same (tokio's number)


class Kernel:
    """One run: the tasks, and the four drivers they are served by. `kernel.Kernel` is this plus all that surrounds it.

    What a trap may use: `wake`, `current`, and the drivers `clock`, `timers` and `poller`. All of it belongs to the
    thread that runs the kernel; nothing but `call_soon` may be called from another one.
    """

    def __init__(self, *, clock: Clock, timers: Timers, poller: Poller, ready: ReadyQueue) -> None:
        # The drivers: see ports.py.
        self.clock = clock
        self.timers = timers
        self.poller = poller
        self.ready = ready
        self.running = False
        # The step that runs. `current` is None between steps; a `budget` below 0 means the step has had its share.
        self.current: Task | None = None
        self.budget: float = BUDGET
        self.allowance: float = BUDGET  # what each step begins with
        # Calls to make at the end of the pass; whether the loop sleeps, so that a new one must wake it.
        self.soon: deque[Callable[[], object]] = deque()
        self.asleep = False
        # Who waits until nothing happens any more (kernel.testing), and for how many real seconds.
        self.idle_waiters: dict[Task, float] = {}
        # Calls to make when a task ends: breaking the locks it holds, telling who waits for its result.
        self.farewells: dict[Task, list[Callable[[Task], object]]] = {}
        # For observers: called with each trap that is no checkpoint; called when the loop is about to sleep for ever.
        self.trapped: Callable[[Task, Any], object] | None = None
        self.stuck: Callable[[], float] | None = None  # returns how long it shall sleep
        # Called at the end of each pass, while a signal waits for a task to be in a state to get it.
        self.interrupted: Callable[[], object] | None = None
        # What belongs to this run, and is none of the core's business.
        self.locals: dict[object, Any] = {}
        # The top of the task tree.
        self.root_task: Task | None = None
        self.system_nursery: Nursery | None = None
        self.main_nursery: Nursery | None = None
        self.main_task: Task | None = None
        # What the run ends with: main's outcome, unless something from outside the tasks has put an end to it.
        self._main_outcome: Outcome[Any] | None = None
        self._verdict: BaseException | None = None
        # How many steps a pass may have, those that the present one still has, and when the last one ended.
        self._stride = STRIDE
        self._steps = repeat(None, 0)
        self._passed_at = 0.0

    # ---- what traps and primitives call ---------------------------------------------------------

    def wake(self, task: Task, value: object = None, error: BaseException | None = None) -> None:
        """Make a sleeping task ready: its `yield` returns `value`, or raises `error`, and cannot be cancelled any more.

        Raises RuntimeError when the task is not asleep, because it was woken before or was cancelled.
        """
        if task.trap is None:
            raise RuntimeError(f"{task!r} is not asleep: each sleep ends with exactly one wake or abort")
        task.trap = None
        if error is None:
            task.step = task.send
            task.value = value
        else:
            task.step = task.coro.throw
            task.value = error
        self.ready.append(task)

    def interrupt(self, task: Task, error: BaseException | None = None) -> None:
        """If `task` sleeps on what can be taken back, wake it with `error`; without, as its scope was cancelled, with
        `Cancelled`.

        A task at a checkpoint is not asleep; it sees a cancellation for itself when its turn comes.
        """
        trap = task.trap
        if trap is None:
            return
        try:
            if not trap.abort(self, task) or task.trap is None:
                return  # it can't be taken back, or abort has woken the task itself
        except BaseException as bug:  # in the trap: its task gets to know, and the others are still cancelled
            if task.trap is not None:
                self.wake(task, error=_without_our_frame(bug))
        else:
            if error is not None:
                self.wake(task, error=error)
                return
            task.trap, task.step, task.value = None, Cancelled, task.scope.cancelled
            self.ready.append(task)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call `function` at the end of the pass, in the order of these calls. For any thread, signal handlers and
        finalizers; wakes the loop if it sleeps. What `function` raises ends the run. Cost: 0.1 us, or a system call.
        """
        self.soon.append(function)
        if self.asleep:
            self.asleep = False  # one wake-up serves all that comes before the loop has looked
            try:
                self.poller.wakeup()
            except BaseException:  # out of a signal handler. Then the next call must try again
                self.asleep = True
                raise

    def end_pass(self) -> None:
        """Let the present pass end with the step that runs now."""
        deque(self._steps, maxlen=0)

    # ---- one pass -------------------------------------------------------------------------------

    def run_ready(self) -> None:
        """Resume ready tasks, at most `_stride` of them, one step each.

        The hottest code of the package. Hence the local names, `trap is None` for a checkpoint, and no function call
        but the one into the task: 0.16 us a step, of which `Context.run` and the coroutine's own work are 0.1.
        """
        ready = self.ready
        popleft, append = ready.popleft, ready.append
        # While an interrupt waits until its task can get it: one step at a time, in which the next operation yields.
        stride, allowance = (self._stride, self.allowance) if self.interrupted is None else (1, -1)
        self._steps = steps = repeat(None, stride)
        for _ in steps:
            if not ready:
                break
            task = popleft()
            self.current = task
            self.budget = allowance
            step = task.step
            try:
                if step is not None:
                    task.step = None
                    if step is START:
                        task.send = step = task.coro.send
                        trap = task.context.run(step, None)
                    elif step is Cancelled:
                        trap = task.context.run(task.coro.throw, new_cancelled(task.value))
                    else:
                        trap = task.context.run(step, task.value)
                    task.value = None
                elif (reason := task.scope.cancelled) is not None:
                    trap = task.context.run(task.coro.throw, new_cancelled(reason))
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
                if self.trapped is not None:
                    self.trapped(task, trap)
                try:
                    trap.arm(self, task)
                except BaseException as error:
                    self._refuse_trap(task, trap, _without_our_frame(error))
                else:
                    if task.scope.cancelled is not None:
                        self.interrupt(task)
        # Tracebacks keep this frame on some versions, and must not keep the last task with it.
        self.current = task = step = trap = None  # type: ignore[assignment]

    def idle_time(self) -> float:
        """How many real seconds `poll` may sleep: 0 while a task is ready, `inf` if only the outside world can help."""
        if self.ready or self.soon:
            return 0.0
        return max(0.0, min(self.clock.deadline_to_sleep_time(self.timers.next_deadline()), self._cushion()))

    def poll(self, timeout: float) -> None:
        """Sleep up to `timeout` seconds until something happens; wake whom it concerns: sockets first, then timers."""
        clock = self.clock
        now = clock.current_time()
        if now - self._passed_at > PASS_TIME:
            self._stride = max(1, self._stride // 2)
        elif self._stride < STRIDE:
            self._stride = min(STRIDE, self._stride * 2)
        if timeout > 0:
            if timeout == inf and self.stuck is not None and self.interrupted is None:
                timeout = self.stuck()
            self.asleep = True
            if self.soon:  # left just now; who calls from here on sees that we are asleep
                timeout = 0.0
        tasks = self.poller.poll(timeout)
        self.settle(tasks, clock.current_time() if timeout > 0 else now, timeout)

    def settle(self, tasks: Iterable[Task], now: float, timeout: float) -> None:
        """The second half of `poll`: `tasks` are those whose files are ready `now`, after up to `timeout` seconds."""
        timeout, self.asleep = timeout if self.asleep else 0.0, False  # woken before its time, it was no quiet one
        for task in tasks:
            self.wake(task)
        for timed in self.timers.expired(now):
            timed.expire(self)
        if self.soon:
            for _ in range(len(self.soon)):
                self.soon.popleft()()
        if self.interrupted is not None:
            self.interrupted()
        self._passed_at = now
        if not self.ready and not self.soon:
            cushion = self._cushion()
            if cushion != inf and cushion <= timeout:
                self._quiet(cushion)

    def _cushion(self) -> float:
        """For how many real seconds nothing must happen before somebody wants to know; `inf` if nobody does."""
        cushion = min(self.idle_waiters.values()) if self.idle_waiters else inf
        jump = self.clock.autojump_threshold
        return jump if jump < cushion and self.timers.next_deadline() != inf else cushion

    def _quiet(self, cushion: float) -> None:
        """Nothing has happened for `cushion` seconds: wake those who wanted to know, or let the clock jump."""
        waiters = [task for task, wanted in self.idle_waiters.items() if wanted == cushion]
        for task in waiters:
            del self.idle_waiters[task]
            self.wake(task)
        if not waiters:
            self.clock.autojump(self.timers.next_deadline())
            self._passed_at = self.clock.current_time()

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
            value = leave_open_scopes(task, nursery.cancel_scope, value if how is Error else None)
            how = Error
        task.step, task.value = how, value
        if self.farewells:
            for call in self.farewells.pop(task, ()):
                call(task)
        if task is self.main_task:
            nursery.cancel_scope._cancel(CancelReason("shutdown"))
        # The nursery's own business, done here because each task comes by: a call to it would be 3 % of spawn and join.
        children = nursery._children
        del children[task]
        if how is Error:
            nursery._failed(task, value)
        if not children and nursery._joining is not None:
            nursery._release_parent()

    # ---- a whole run --------------------------------------------------------------------------------

    def begin(self) -> None:
        """A run begins, in this thread. Raises RuntimeError, and changes nothing, if there is one already."""
        if here.kernel is not None:
            raise RuntimeError(
                "kernel.run() was called from inside a kernel that is running in this thread. "
                "Await the function instead, or start it in a nursery."
            )
        try:
            self.clock.start_clock()
            self._passed_at = self.clock.current_time()
        except Exception as error:
            raise self._broken() from error
        here.kernel, self.running = self, True

    def plant(self, async_fn: AsyncFn, args: tuple[Any, ...], epilogue: Callable[[], Awaitable[None]]) -> None:
        """Make the task tree: `async_fn(*args)` is the main task, and when it and all that it started have ended comes
        `epilogue()`.
        """
        main = call_async(async_fn, args, "kernel.run")
        # The root task is in no nursery, and in a scope of its own that nobody ever leaves.
        scope = CancelScope()
        root = Task(self._root(main, name_of(async_fn), epilogue), copy_context(), scope, None, "<root>")
        scope._kernel, scope._task, scope._state = self, root, "active"
        self.root_task = root
        self.ready.append(root)

    async def _root(self, main: Coro, name: str, epilogue: Callable[[], Awaitable[None]]) -> None:
        async with open_nursery() as self.system_nursery:
            try:
                async with Nursery(self, current_task(), bare=True) as self.main_nursery:
                    self.main_task = task = self.main_nursery._spawn(main, name)
                self._main_outcome = task.outcome
            except GeneratorExit:  # the run has crashed, and this coroutine is thrown away
                raise
            except BaseException as error:  # main's, and those of children that it left behind in an open nursery
                self._main_outcome = Error(_without_our_frame(_without_our_frame(error)))
            self.system_nursery.cancel_scope._cancel(CancelReason("shutdown"))
        await epilogue()

    def drive(self) -> None:
        """Pass after pass, until the last task has ended."""
        root = self.root_task
        assert root is not None
        while True:
            try:
                while True:
                    self.run_ready()
                    if root.outcome is not None and self.is_over():
                        return
                    self.poll(self.idle_time())
            except BaseException as error:
                self.judge(error)

    def is_over(self) -> bool:
        """Whether the last task has ended. Raises KernelInternalError if one of the kernel's own has failed."""
        assert self.root_task is not None
        outcome = self.root_task.outcome
        if isinstance(outcome, Error):
            raise self._broken("a task of the kernel's own failed") from outcome.error
        return outcome is not None

    def judge(self, error: BaseException) -> None:
        """A pass has raised what is no task's. A bug ends the run. An exception that a signal handler has raised in the
        midst of the loop asks everything to leave, and comes out of the run in the end; a second one does not wait.
        """
        if error is self._verdict or isinstance(error, KernelInternalError):
            raise error
        if isinstance(error, Exception):
            raise self._broken() from error
        self.condemn(error, CancelReason("KeyboardInterrupt", reason=f"{type(error).__name__} came while idle"))

    def condemn(self, verdict: BaseException, why: CancelReason) -> None:
        """Cancel all tasks, and let the run end with `verdict`. Raises it at once if that was tried already."""
        tried, self._verdict = self._verdict, verdict
        if tried is not None or self.main_nursery is None:
            raise verdict
        self.main_nursery.cancel_scope._cancel(why)

    def end(self) -> Outcome[Any] | None:
        """The run is over, well or not: forget it, and return the main task's outcome if there is one."""
        here.kernel, self.running = None, False
        # These would keep one another alive.
        self.root_task = self.main_task = self.system_nursery = self.main_nursery = None
        self.locals = {}
        self.farewells.clear()
        outcome, self._main_outcome = self._main_outcome, None
        verdict, self._verdict = self._verdict, None
        try:
            if verdict is None or outcome is None:
                return outcome
            if isinstance(outcome, Error) and not isinstance(outcome.error, Cancelled):
                verdict.__context__ = outcome.error  # cleaning up has failed, and that must not get lost
            return Error(verdict)
        finally:
            del outcome, verdict  # an error may know this frame by its traceback

    def _broken(self, what: str = "the kernel or one of its drivers broke") -> KernelInternalError:
        return KernelInternalError(
            f"{what}: a bug in it, not in the way it is used. State: {len(self.ready)} tasks ready, {len(self.timers)} "
            f"timers, {len(self.poller)} waits for files, running {self.current!r}"
        )


def _without_our_frame(error: BaseException) -> BaseException:
    """Drop the loop's own line from the traceback: it is noise, and its variables would close a reference cycle."""
    traceback = error.__traceback__
    return error.with_traceback(traceback.tb_next) if traceback is not None else error


def _not_a_trap(thing: object) -> TypeError:
    """Somebody awaited, or yielded, what this kernel cannot wait for. Name the likely mistake and the cure."""
    kind = thing if isinstance(thing, type) else type(thing)
    library = kind.__module__.partition(".")[0].lstrip("_")
    cure = f"Use this package's counterpart of what you called, or run {library} in a thread of its own."
    if hasattr(thing, "_asyncio_future_blocking"):
        return TypeError(
            f"a task awaited {thing!r}, which belongs to {library}, and only {library} can wait for it. {cure}"
        )
    if isgenerator(thing) or isinstance(thing, Awaitable):
        return TypeError(f"a generator yielded {thing!r} itself. Write `yield from`, or `await` in an async def.")
    if library == "builtins":
        return TypeError(
            f"a task yielded {thing!r}, which is not a trap. A generator that runs as a task may only `yield from` "
            "operations of the kernel. (Awaiting something of another library, such as curio, does this too.)"
        )
    return TypeError(f"a task awaited something of {library}, {thing!r}, which has no arm() and abort(). {cure}")
