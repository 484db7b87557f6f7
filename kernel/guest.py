"""Guest mode: the kernel on top of another event loop, in the same thread.

    host's thread    ...  tick  ...  ...                    tick  ...  ...
                          a pass                            settle, a pass
    helper thread              `-> poller.wait -> the host's `-^
                                                  run_sync_soon_threadsafe

The host calls us as one of its callbacks, a *tick*, in which we do one pass: run what is ready, look at files and
timers. If somebody is ready after that, we ask the host for another tick. If nobody is, we must not sleep, as the
thread is not ours. So a helper thread waits for our files and timers, and asks the host for the tick when something
has come up. It does nothing else: all of the kernel stays in the host's thread.

Host code may call the kernel's plain functions between two ticks: `event.set()`, `scope.cancel()`,
`nursery.start_soon(...)`. If the helper sleeps, it does not know of what they change. All of them come to a task made
ready or a deadline set; so while it sleeps, a *bell* hangs at the ready queue and at the timers, which wakes it. During
a pass there is none, and a step costs what it costs in an ordinary run.

The interpreter's hooks for async generators are ours during a tick and the host's otherwise. A generator remembers the
hooks of its first iteration, so each one is finished by the loop that began it.

A run has the thread's one place for a kernel: no other run in it until this one has ended. A deadlock is not reported,
since the host may always do something.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import ExitStack
from functools import partial
from queue import SimpleQueue
from typing import Any

from outcome import Outcome, capture

from .abc import Instrument
from .boot import Kernel
from .core.loop import STRIDE
from .core.ports import Clock
from .core.task import Task
from .interrupts import KeyboardInterrupts

__all__ = ["start_guest_run"]

RunSyncSoon = Callable[[Callable[[], object]], object]
Slept = tuple[float, Outcome[Any]]  # for how long the helper was to wait, and what has come up


def start_guest_run(
    async_fn: Callable[..., Awaitable[Any] | Generator[Any, Any, Any]],
    *args: Any,
    run_sync_soon_threadsafe: RunSyncSoon,
    done_callback: Callable[[Outcome[Any]], object],
    run_sync_soon_not_threadsafe: RunSyncSoon | None = None,
    host_uses_signal_set_wakeup_fd: bool = False,
    clock: Clock | None = None,
    instruments: Sequence[Instrument] = (),
    restrict_keyboard_interrupt_to_checkpoints: bool = False,
) -> None:
    """Start a run of `async_fn(*args)` on top of the host loop that runs in this thread. Returns at once.

    The run takes place in callbacks of the host, and the first line of `async_fn` in the first of them. But tasks can
    be started (`spawn_system_task`) and the token taken as soon as this has returned. The host must go on until
    `done_callback` was called; see docs/guest-mode.md for what happens if it does not.

    Args:
        run_sync_soon_threadsafe: called as `f(fn)` from any thread; must have the host call `fn()` soon in this one,
            and must not wait for that.
        done_callback: called with the run's `outcome.Outcome` when it has ended and has cleaned up after itself. What
            it raises is the host's affair.
        run_sync_soon_not_threadsafe: the same as `run_sync_soon_threadsafe` for calls from this thread, if the host
            has something cheaper for that.
        host_uses_signal_set_wakeup_fd: whether the host loop calls `signal.set_wakeup_fd`, as asyncio does; then the
            kernel leaves that alone, and relies on the host to wake up at a signal.
        clock, instruments, restrict_keyboard_interrupt_to_checkpoints: as in `kernel.run`.

    Raises:
        RuntimeError: a kernel runs in this thread already.
        TypeError: as `kernel.run`.
        KernelInternalError: the clock did not start.
        BaseException: what `run_sync_soon_*` raises. After an error the run has not begun.

    Cost: as `kernel.run`, and a thread. A step as in an ordinary run; a pass, which is up to 61 steps, one callback
    of the host; a sleep, two switches between threads.
    """
    interrupts = KeyboardInterrupts(only_at_checkpoints=restrict_keyboard_interrupt_to_checkpoints)
    with ExitStack() as stack:
        stack.enter_context(interrupts)
        ready = _Ready()
        kernel = stack.enter_context(Kernel(clock=clock, ready=ready, instruments=instruments, detect_deadlock=False))
        kernel.interrupts = interrupts
        soon = run_sync_soon_not_threadsafe or run_sync_soon_threadsafe
        guest = _Guest(kernel, ready, run_sync_soon_threadsafe, soon, done_callback)
        guest.soon(guest.tick)  # before there is anything to undo, should the host refuse
        kernel.start(async_fn, args, signal_wakeup=not host_uses_signal_set_wakeup_fd)
        guest.stack = stack.pop_all()  # from now on it is the last tick that cleans up
        guest.begin()


class _Ready(deque[Task]):
    """The ready queue. It is a class of its own because a bell cannot be hung at a bare deque."""


class _Guest:
    """The run's side of the arrangement. At any time there is either a tick to come, or the helper waits."""

    stack: ExitStack  # what surrounds the run, to be left when it ends

    def __init__(
        self,
        kernel: Kernel,
        ready: _Ready,
        soon_threadsafe: RunSyncSoon,
        soon: RunSyncSoon,
        done: Callable[[Outcome[Any]], object],
    ) -> None:
        self.kernel = kernel
        self.soon = soon
        self.soon_threadsafe = soon_threadsafe
        self._done = done
        self._bells = ((ready, "append"), (kernel.timers, "add"))
        self._thread = threading.get_ident()
        self._helper: threading.Thread | None = None
        # For the helper: who wants to know, and how long to wait. None: go home.
        self._waits: SimpleQueue[tuple[_Guest, float] | None] = SimpleQueue()

    def begin(self) -> None:
        """The root task's first step, so that the nurseries are open. It runs nothing of the program."""
        self.kernel._stride = 1
        self.kernel.run_ready()
        self.kernel._stride = STRIDE
        self.kernel._asyncgens.return_hooks()

    def tick(self, slept: Slept | None = None) -> None:
        """Called by the host. `slept` is the helper's report, if it was the helper who asked for this tick."""
        kernel = self.kernel
        if not kernel.running:
            return  # the start has failed, and start_guest_run has raised the reason
        over, verdict = False, None
        kernel._asyncgens.take_hooks()
        try:
            try:
                over = self._pass(slept)
            except BaseException as error:
                kernel.judge(error)
                self.soon(self.tick)
        except BaseException as error:
            over, verdict = True, error
        finally:
            kernel._asyncgens.return_hooks()
        try:
            if over:
                self._conclude(verdict)
        finally:
            del verdict  # it knows this frame by its traceback

    def _pass(self, slept: Slept | None) -> bool:
        """What `Kernel.drive` does in a loop, but for the sleep. Returns whether the run is over."""
        kernel = self.kernel
        if slept is not None:
            self._wake_up(*slept)
        else:
            kernel._passed_at = kernel.clock.current_time()  # or a slow host would count as slow steps
        kernel.run_ready()
        if kernel.is_over():
            return True
        kernel.poll(0.0)  # often saves waking the helper
        kernel.asleep = True  # before looking: a call from another thread must either be seen or ring
        timeout = kernel.idle_time()
        if timeout == 0:
            kernel.asleep = False
            self.soon(self.tick)
        else:
            self._sleep(timeout)
        return False

    def _sleep(self, timeout: float) -> None:
        """Let the helper wait where the host's thread must not."""
        if self._helper is None:
            name = "helper of a guest run"
            self._helper = threading.Thread(target=_help, args=(self._waits,), name=name, daemon=True)
            self._helper.start()
        for port, method in self._bells:
            setattr(port, method, _ringing(self.kernel, getattr(port, method)))
        self.kernel.instruments.call("before_io_wait", timeout)
        self._waits.put((self, timeout))

    def _wake_up(self, timeout: float, happened: Outcome[Any]) -> None:
        kernel = self.kernel
        for port, method in self._bells:
            delattr(port, method)
        kernel.instruments.call("after_io_wait", timeout)
        poller: Any = kernel.poller
        kernel.settle(poller.take(happened.unwrap()), kernel.clock.current_time(), timeout)

    def _conclude(self, verdict: BaseException | None) -> None:
        """Clean up and tell the host."""
        self._send_helper_home()
        self._done(capture(self._end, verdict))

    def _end(self, verdict: BaseException | None) -> Any:
        with self.stack:
            outcome = self.kernel.finish()
            try:
                if verdict is not None:
                    raise verdict
                assert outcome is not None
                return outcome.unwrap()
            finally:
                del outcome, verdict  # likewise

    def _send_helper_home(self) -> None:
        """To be called in a tick, or when there will be none: then the helper does not wait for files."""
        if self._helper is not None:
            self._waits.put(None)
            self._helper.join()

    def __del__(self) -> None:
        """Nobody will call `tick` again. If the run has not ended, its host has."""
        if not self.kernel.running:
            return
        if threading.get_ident() == self._thread:
            self._send_helper_home()
            self.kernel.finish()
            self.stack.close()
        warnings.warn(
            "a host loop was closed before its guest run had ended: the tasks are lost, and so are their cleanup "
            "handlers. Cancel the run, and let the host go on until done_callback was called.",
            RuntimeWarning,
            stacklevel=1,
        )


def _help(waits: SimpleQueue[tuple[_Guest, float] | None]) -> None:
    """The helper thread. Between two waits it has no reference to the guest, which is to go when its host goes."""
    while (wait := waits.get()) is not None:
        guest, timeout = wait
        poller: Any = guest.kernel.poller
        slept = timeout, capture(poller.wait, timeout)
        try:
            guest.soon_threadsafe(partial(guest.tick, slept))
        except Exception:
            return  # the host is closed, see __del__
        finally:
            del guest, wait, poller, slept


def _ringing(kernel: Kernel, method: Callable[..., object]) -> Callable[..., None]:
    """`method`, which then wakes the helper, unless that was done already."""

    def ring(*args: Any) -> None:
        method(*args)
        if kernel.asleep:
            kernel.asleep = False
            kernel.poller.wakeup()

    return ring
