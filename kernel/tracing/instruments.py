"""Instruments: watching a run without slowing down those who do not.

The loop has no hooks for most of what an instrument sees. It has ports, and whoever stands in a port's place sees all
that goes through it: a ready queue in front of the real one knows who becomes ready and who runs next, a poller in
front of the real one knows when the loop sleeps. They are put there when the first instrument wants them, and leave
after the last one. So a run without instruments does not even ask whether there are any.

    ready queue   append      task_spawned, task_scheduled
                  popleft     before_task_step
                  bool        the step is over: task_exited, after_task_step
    poller        poll        before_io_wait, after_io_wait
    `trapped`     (a hook of the loop's, off the checkpoint's path)    task_trapped

The loop asks whether more tasks are ready after each step, so that is where a step's end is seen. The last step of a
pass is over when the poller is asked.

Coming is possible at any time. The loop knows its queue by heart while a pass lasts, so the pass is ended with the step
that runs, and of that step we see the end. Going waits until the pass is over: until then, the observers are in the
loop's hands.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

from ..abc import Instrument
from ..core.loop import Kernel
from ..core.ports import Poller, ReadyQueue
from ..core.task import START, Task, current_kernel

__all__ = ["Instruments", "add_instrument", "remove_instrument"]

_STEP_HOOKS: Final = (
    "task_spawned", "task_scheduled", "before_task_step", "task_trapped", "after_task_step", "task_exited",
)  # fmt: skip
_WAIT_HOOKS: Final = ("before_io_wait", "after_io_wait")
_RUN_HOOKS: Final = ("before_run", "after_run")


class Instruments:
    """The instruments of one kernel, and for each hook those that implement it."""

    def __init__(self, kernel: Kernel, instruments: Iterable[Instrument] = ()) -> None:
        self._kernel = kernel
        self._all: dict[Instrument, None] = {}
        self._hooks: dict[str, dict[Instrument, Callable[..., object]]] = {
            name: {} for name in _STEP_HOOKS + _WAIT_HOOKS + _RUN_HOOKS
        }
        # Who stands in front of the real drivers, if anybody does; and whether somebody may, as a run is on.
        self._ready: _ObservedReady | None = None
        self._poller: _ObservedPoller | None = None
        self._on = False
        for instrument in instruments:
            self.add(instrument)

    def add(self, instrument: Instrument) -> None:
        found = {name: hook for name in self._hooks if (hook := _implemented(instrument, name)) is not None}
        self._all[instrument] = None
        for name, hook in found.items():
            self._hooks[name][instrument] = hook
        self._come()

    def remove(self, instrument: Instrument) -> None:
        del self._all[instrument]
        for hooks in self._hooks.values():
            hooks.pop(instrument, None)

    def call(self, name: str, *args: object) -> None:
        hooks = self._hooks[name]
        for instrument, hook in list(hooks.items()):
            if instrument not in hooks:
                continue  # another one's hook has removed it
            try:
                hook(*args)
            except BaseException:
                if instrument in self._all:
                    self.remove(instrument)
                logging.getLogger("kernel.abc.Instrument").exception(
                    "the hook %s() of %r has raised; the instrument was removed", name, instrument
                )

    def before_run(self) -> None:
        self._on = True
        self._come()
        self.call("before_run")

    def after_run(self) -> None:
        self.end_step()
        self.call("after_run")
        self._on = False
        self.go()

    def end_step(self) -> None:
        """The pass is over: so is its last step."""
        if self._ready is not None:
            self._ready.end_step()

    def _wanted(self, names: tuple[str, ...]) -> bool:
        return self._on and any(self._hooks[name] for name in names)

    def _come(self) -> None:
        """Stand in front of ready queue and poller, if that is wanted and not done already."""
        kernel = self._kernel
        if self._ready is None and self._wanted(_STEP_HOOKS):
            kernel.ready = self._ready = _ObservedReady(kernel, self)
            kernel.end_pass()
        if self._poller is None and self._wanted(_STEP_HOOKS + _WAIT_HOOKS):
            kernel.poller = self._poller = _ObservedPoller(kernel.poller, self)
        if self._wanted(("task_trapped",)):
            kernel.trapped = self._trapped

    def go(self) -> None:
        """Leave the places where nobody wants us any more. Only for between two passes."""
        kernel = self._kernel
        if kernel.trapped == self._trapped and not self._wanted(("task_trapped",)):  # it may be somebody else's
            kernel.trapped = None
        if self._ready is not None and not self._wanted(_STEP_HOOKS):
            kernel.ready, self._ready = self._ready.real, None
        if self._poller is not None and not self._wanted(_STEP_HOOKS + _WAIT_HOOKS):
            kernel.poller, self._poller = self._poller.real, None

    def _trapped(self, task: Task, trap: Any) -> None:
        self.call("task_trapped", task, trap)


def _implemented(instrument: Instrument, name: str) -> Any:
    """The hook, unless it is the base class's, which does nothing; None also for what has no such attribute."""
    hook = getattr(instrument, name, None)
    return None if getattr(hook, "__func__", None) is getattr(Instrument, name) else hook


class _ObservedReady:
    """Stands in front of the real ready queue.

    A step can end in three ways, and all leave a mark: the task has trapped, has ended, or is back in the queue. So
    somebody else may ask `bool(kernel.ready)` in the midst of a step, and will not be mistaken for the loop.
    """

    def __init__(self, kernel: Kernel, instruments: Instruments) -> None:
        self.real: ReadyQueue = kernel.ready
        self._kernel = kernel
        self._call = instruments.call
        self._stepping = kernel.current  # the task whose step goes on, if any
        self._yielded = False  # whether it is back in the queue, from a checkpoint

    def append(self, task: Task, /) -> None:
        if task is self._stepping and task.step is None:
            self.real.append(task)
            self._yielded = True  # told when the step is over, in one place for all three ends
            return
        if task.step is START:
            self._call("task_spawned", task)
        self.real.append(task)
        self._call("task_scheduled", task)

    def popleft(self) -> Task:
        task = self.real.popleft()
        self._stepping, self._yielded = task, False
        self._kernel.current = task  # a little early, so that hooks can ask who runs
        self._call("before_task_step", task)
        return task

    def __bool__(self) -> bool:
        task = self._stepping
        if task is not None and (self._yielded or task.trap is not None or task.step is not None):
            self.end_step()
        return len(self.real) > 0

    def end_step(self) -> None:
        task = self._stepping
        if task is None:
            return
        current, self._kernel.current = self._kernel.current, task
        self._stepping = None
        if task.outcome is not None:
            self._call("task_exited", task)
        elif task.trap is None and task.step is None:
            self._call("task_trapped", task, None)
            self._call("task_scheduled", task)
        self._call("after_task_step", task)
        self._kernel.current = current

    def __len__(self) -> int:
        return len(self.real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class _ObservedPoller:
    """Stands in front of the real poller."""

    def __init__(self, real: Poller, instruments: Instruments) -> None:
        self.real = real
        self._instruments = instruments

    def poll(self, timeout: float) -> Iterable[Task]:
        instruments = self._instruments
        instruments.end_step()
        instruments.call("before_io_wait", timeout)
        tasks = self.real.poll(timeout)
        instruments.call("after_io_wait", timeout)
        instruments.go()
        return tasks

    def __len__(self) -> int:
        return len(self.real)

    def __bool__(self) -> bool:
        return bool(self.real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def add_instrument(instrument: Instrument) -> None:
    """Watch this run with `instrument` from now on. Adding it again does nothing. Not a checkpoint.

    Its `before_run` is not called, as the run has begun; of the step that runs now it sees the end. On a `Kernel` with
    several runs it stays for those that follow.

    Raises:
        RuntimeError: used outside the kernel.
    """
    _instruments_here("add_instrument()").add(instrument)


def remove_instrument(instrument: Instrument) -> None:
    """Stop watching with `instrument`: none of its hooks is called any more. Not a checkpoint.

    Raises:
        KeyError: it is not one of this run's, or was removed because it had raised.
        RuntimeError: used outside the kernel.
    """
    _instruments_here("remove_instrument()").remove(instrument)


def _instruments_here(what: str) -> Instruments:
    instruments: Instruments = current_kernel(what).instruments  # type: ignore[attr-defined]
    return instruments
