"""A run in phases: the kernel goes on for a while, and then somebody else does.

`kernel.run(main)` gives the thread to the kernel until all is over. A test framework wants something else: set up a
fixture, then the next one, run the test, tear the fixtures down, and do as it likes in between. Each of these is a
*phase* here:

    phases = Phases("test_soup")
    value = phases.do(set_up)       # drives the kernel until `await set_up()` has ended
    phases.do(test, value)          # and so on, all in one run
    phases.close()

How it works. The main task of the run does what it is given, and then sleeps on a trap that wakes it with the next
thing to do:

    main task       set_up()  |  asleep  |  test(value)  |  asleep  |  ends
    the loop        drives    |          |  drives       |          |  drives until all has ended
    whose thread    kernel's  |  yours   |  kernel's     |  yours   |  kernel's

One task does all of it, so scopes and nurseries that a phase leaves open are around the phases that follow, as if
these stood inside the `with` block; and context variables that it sets are seen by them. Between phases nothing of the
run moves, no kernel is active in the thread, and Ctrl-C is as it was.

What comes of a phase:

* What `fn` raised; in a group of one, the one error.
* If the phase was cancelled because something failed in a nursery that an earlier one has left open: that error. It is
  reported once: the nursery, which raises it again when it is closed, is not heard.
* If it was cancelled for another reason: RuntimeError, with the reason.
* If the whole run was put to an end (`Deadlock`, a time limit): that.

What does not work:

* Between phases, operations that wake a task (`event.set()`) raise RuntimeError: they need a kernel that runs. Make
  them a phase.
* Context variables that are set in a phase are not seen by the caller. Those of the caller are seen in the next phase,
  but not that he has reset one that had no value.
* Phases that leave scopes open must be ended in reverse by phases that leave them, as with any scopes of one task.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextvars import Context, copy_context
from math import inf
from time import monotonic
from types import FrameType
from typing import Any, NamedTuple

from outcome import Error, Outcome, Value

from ..boot import Kernel
from ..core.errors import Cancelled
from ..core.nursery import call_async
from ..core.ports import Clock
from ..core.task import Task, here
from ..core.traps import Trap, checkpoint_if_cancelled, operation
from ..groups import raise_single
from ..interrupts import KeyboardInterrupts
from ..tracing.tree import format_task_tree

__all__ = ["Phases", "all_in", "picture_of"]


class _Job(NamedTuple):
    """What the main task is to do next."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    enter: bool  # whether it is to be left undone if it would be cancelled from the start


class _Between(Trap):
    """The main task sleeps between two phases. Nothing but the next one wakes it, no cancellation either."""

    __slots__ = ("reached",)

    def __init__(self) -> None:
        self.reached = False

    def arm(self, kernel: Any, task: Task) -> None:
        self.reached = True
        kernel.end_pass()

    def abort(self, kernel: Any, task: Task) -> bool:
        return False

    def __repr__(self) -> str:
        return "<the next phase of the test>"


class _Interrupts(KeyboardInterrupts):
    """Ctrl-C as ever; and it takes a picture of the tasks, before the interrupt has changed any of them."""

    picture: str | None = None

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if here.kernel is not None:
            self.picture = picture_of(here.kernel)
        super()._handle(signum, frame)

    _handle.__module__ = KeyboardInterrupts.__module__  # by which the deadlock report knows that it wakes nobody


def picture_of(kernel: Any) -> str:
    """The task tree, at any moment and from any thread: as it may be changing meanwhile, try more than once."""
    for _ in range(10):
        try:
            return format_task_tree(kernel)
        except Exception as error:
            failure = error
    return f"The task tree could not be read: {failure!r}\n"


class Phases:
    """One run, in phases. `name` is the main task's; for `clock` see `Kernel`. The first phase starts the run.

    Attributes:
        kernel: the kernel.
        interrupts: its SIGINT handler; `interrupts.picture` is the task tree as it was at the last Ctrl-C, or None.
    """

    def __init__(self, name: str, clock: Clock | None = None) -> None:
        self.kernel = Kernel(clock=clock)
        self.interrupts = self.kernel.interrupts = _Interrupts(only_at_checkpoints=False)
        self._name = name
        self._between = _Between()
        self._main: Task | None = None
        self._outcome: Outcome[Any] | None = None  # what the last job came to
        self._told: list[object] = []  # errors and reasons of cancellations that a phase has reported
        self._context: Context | None = None  # the caller's, at the last phase

    def do(
        self,
        fn: Callable[..., Any],
        *args: Any,
        enter: bool = True,
        patience: float = inf,
        impatient: Callable[[], object] | None = None,
    ) -> Any:
        """Run the kernel until the main task has done `fn(*args)`, an async or generator function. Returns its result.

        If `patience` real seconds have not been enough, call `impatient()`, once, and go on. With `enter`, a phase that
        would be cancelled from the start does not begin. Without, it is one that tidies up: what was reported before
        is not reported again, and then it returns None.

        Raises:
            RuntimeError: the run is over, or a kernel runs in this thread already; or see above.
            BaseException: see above.
        """
        __tracebackhide__ = True
        if here.kernel is not None:
            raise RuntimeError("a phase cannot begin while a kernel runs in this thread")
        if self._main is None:
            self._begin()
        assert self._main is not None
        if not self.kernel.running:  # it was broken off, and somebody knows why
            if enter:
                raise RuntimeError("the run is over: it was broken off in an earlier phase")
            return None
        self._bring_context()
        with self.interrupts:
            self._resume()
            try:
                self.kernel.wake(self._main, _Job(fn, args, enter))
                self._drive(patience, impatient)
            finally:
                self._pause()
            outcome, self._outcome = self._outcome, None
            assert outcome is not None
            error = self._judge(outcome, again=enter)
            if error is None:
                return outcome.value if isinstance(outcome, Value) else None
            try:
                with raise_single():
                    raise error
            finally:
                del error, outcome  # they know this frame by their tracebacks

    def close(self) -> None:
        """End the run, and release the kernel. Raises what the run ends with and no phase has reported."""
        __tracebackhide__ = True
        try:
            if self.kernel.running:
                assert self._main is not None
                with self.interrupts:
                    self._resume()
                    self.kernel.wake(self._main)
                    self._drive()
                    outcome = self.kernel.finish()
                    if isinstance(outcome, Error) and (error := self._judge(outcome, again=False)) is not None:
                        with raise_single():
                            raise error
        finally:
            self.kernel.close()

    # ---- driving ------------------------------------------------------------------------------------

    def _begin(self) -> None:
        __tracebackhide__ = True
        self._context = copy_context()
        with self.interrupts:
            self.kernel.start(self._work, ())
            self._drive()
            assert self.kernel.main_task is not None
            self._main = self.kernel.main_task
            self._main.name = self._name
            self._pause()

    @operation
    def _work(self) -> Generator[Any, Any, None]:
        """The main task."""
        __tracebackhide__ = True
        while (job := (yield from self._between)) is not None:
            try:
                if job.enter:
                    yield from checkpoint_if_cancelled()
                coro: Any = call_async(job.fn, job.args, "a kernel test")
                self._outcome = Value((yield from coro))
            except GeneratorExit:  # the run has crashed, and this generator is thrown away
                raise
            except BaseException as error:
                self._outcome = Error(error)

    def _drive(self, patience: float = inf, impatient: Callable[[], object] | None = None) -> None:
        """What `Kernel.drive` does, until the phase is over. If it raises, so is the run."""
        __tracebackhide__ = True
        kernel = self.kernel
        end = monotonic() + patience
        self._between.reached = False
        try:
            while True:
                try:
                    kernel.run_ready()
                    if self._between.reached or kernel.is_over():
                        return
                    if impatient is not None and monotonic() >= end:
                        impatient()
                        impatient = None
                    timeout = kernel.idle_time()
                    kernel.poll(timeout if impatient is None else min(timeout, max(0.0, end - monotonic())))
                except BaseException as error:
                    kernel.judge(error)
        except BaseException as error:
            kernel.finish()
            error.__traceback__ = None  # where the loop was tells nobody anything
            raise

    def _resume(self) -> None:
        kernel = self.kernel
        here.kernel = kernel
        kernel._passed_at = kernel.clock.current_time()  # what the caller has taken is not the length of a pass
        kernel._asyncgens.take_hooks()
        self.interrupts.attach(kernel)

    def _pause(self) -> None:
        """Give the thread back. After the run has ended there is nothing to do."""
        if self.kernel.running:
            self.interrupts.detach()
            self.kernel._asyncgens.return_hooks()
            here.kernel = None

    def _bring_context(self) -> None:
        """Let the main task see the context variables that the caller has set since the last phase."""
        assert self._main is not None
        assert self._context is not None
        before, self._context = self._context, copy_context()
        for var, value in self._context.items():
            if var not in before or before[var] is not value:
                self._main.context.run(var.set, value)

    # ---- what a phase came to -----------------------------------------------------------------------

    def _judge(self, outcome: Outcome[Any], *, again: bool) -> BaseException | None:
        """What the caller gets to know. With `again`, also if he knows it already."""
        found = self._find(outcome.error if isinstance(outcome, Error) else None)
        if found is None:
            return None
        reason, error = found
        if not again:
            if self._was_told(reason):
                return None
            if isinstance(error, BaseExceptionGroup):
                _, rest = error.split(lambda one: self._was_told(one))
                if rest is None:
                    return None
                error = rest
        self._told += [reason, *all_in(error)]
        return error

    def _was_told(self, thing: object) -> bool:
        return any(thing is told for told in self._told)

    def _find(self, error: BaseException | None) -> tuple[object, BaseException] | None:
        """What has happened, as something to remember it by, and as the error to raise.

        In place of a `Cancelled`, its cause: with the traceback of the `Cancelled`, which shows where it struck.
        """
        verdict = self.kernel._verdict
        if not isinstance(error, Cancelled):
            if verdict is not None and not self._was_told(verdict):
                verdict.__context__ = verdict.__context__ or error
                return verdict, verdict
            return None if error is None else (error, error)
        if verdict is not None:
            return verdict, verdict.with_traceback(error.__traceback__)
        failures = self._failures()
        if len(failures) == 1:
            return failures[0], failures[0]
        if failures:
            return failures[0], BaseExceptionGroup("in the background of the test", failures)
        what = "this was cancelled by a scope around it, which a fixture has entered and not left yet. The reason: "
        return error._why, RuntimeError(f"{what}{error._why}").with_traceback(error.__traceback__)

    def _failures(self) -> list[BaseException]:
        """The errors in nurseries that earlier phases have left open, those of the outermost one first."""
        nurseries = [] if self._main is None else self._main.child_nurseries
        return [error for nursery in nurseries for error, _ in nursery._errors.values()]


def all_in(error: BaseException) -> list[BaseException]:
    """`error`, and if it is a group, all that is in it."""
    found = [error]
    for one in found:
        if isinstance(one, BaseExceptionGroup):
            found += one.exceptions
    return found
