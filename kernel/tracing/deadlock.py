"""Deadlock: noticing that nothing can ever happen again, and saying why.

The loop is about to sleep without end. No task is ready, no timer is set, no file is watched. If nobody outside can
call in either, it will sleep for ever. Then this module says so:

    Deadlock: nothing can happen any more: all tasks (3) wait, and nobody is left to wake one of them.
    They wait for one another:
      'ann' waits for <Lock at 0x7f2f6c1b4a60, held by 'ben', 1 waiting>
      'ben' waits for <Lock at 0x7f2f6c1b4b20, held by 'ann', 1 waiting>

It keeps silent

* if a task of the program is in `sleep_forever()`: that was asked for;
* if somebody holds the run's token (`current_kernel_token()`), in whatever thread: they may call at any time. When
  they drop it, nobody tells us, so the loop sleeps a second at a time meanwhile, and asks again;
* if a signal handler of the program's is installed: it may do the same. The kernel's own, for Ctrl-C and
  `dump_on_signal`, do not count;
* in guest mode, where the host may do anything.

And it cannot see a deadlock of some tasks while others go on, nor one beside a timer or a socket that is still watched.
`kernel.lowlevel.format_task_tree()` shows those.

Then all tasks are cancelled, so that their clean-up runs, and the run ends with the error. If they get stuck in that
too, the run ends on the spot.

Whom a task waits for is read off its trap. That has an attribute `on`: a nursery, which waits for its children, or a
thing with an `owner`, or `owners`, that could let the task go. So tasks and things form a graph, and a circle in it is
what a reader wants to see. There need not be one: an event that nobody will set belongs to nobody.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Iterator
from math import inf
from typing import Any, Final

from ..core.errors import CancelReason, Deadlock
from ..core.loop import Kernel
from ..core.nursery import Nursery
from ..core.task import Task
from ..core.traps import _FOREVER
from ..inbox import KernelToken
from .tree import format_task_tree, show

__all__ = ["find_circle", "look_for_deadlock"]

AGAIN: Final = 1.0  # seconds until we look again whether the token is still held
_OURS: Final = (f"{__name__.partition('.')[0]}.interrupts", f"{__package__}.tree")  # handlers that wake nobody


def look_for_deadlock(kernel: Kernel) -> float:
    """The loop's `stuck` hook: it is about to sleep until something comes from outside. Returns how long it shall.

    If this is a deadlock, cancel all tasks; the run will end with the report. Raises Deadlock if that was tried before.
    Called whenever the loop goes to sleep without a timeout, so what is cheap and likely comes first.
    """
    if kernel.poller or len(kernel.timers):
        return inf
    if _references(kernel.locals) > _NOT_HELD:
        return AGAIN
    if _a_signal_may_help():
        return inf
    tasks = list(_tasks(kernel))
    if not tasks or any(task.trap is _FOREVER for task in tasks):
        return inf
    error = Deadlock(_report(kernel, tasks))
    error.__context__ = kernel._verdict  # the first one, if this is the clean-up
    kernel.condemn(error, CancelReason("shutdown", reason="deadlock"))
    return 0.0


def _references(run: dict[object, Any]) -> int:
    """How often the token in `run`, if there is one, is referred to."""
    token = run.get(KernelToken)
    return sys.getrefcount(token) if token is not None else 0


_NOT_HELD: Final = _references({KernelToken: object()})  # so often if nobody but the kernel does


def _a_signal_may_help() -> bool:
    handlers = map(signal.getsignal, signal.valid_signals())
    return any(
        callable(handler)
        and handler is not signal.default_int_handler
        and getattr(handler, "__module__", None) not in _OURS
        for handler in handlers
    )


def _tasks(kernel: Kernel) -> Iterator[Task]:
    """The program's tasks; not the root, nor the kernel's own."""
    todo = [kernel.main_nursery] if kernel.main_nursery is not None else []
    for nursery in todo:
        for task in nursery._children:
            yield task
            todo += task.child_nurseries


def _behind(node: object) -> Iterable[object]:
    """What a task waits for, and who could bring that about: the graph, one step at a time."""
    if isinstance(node, Task):
        return [on] if (on := getattr(node.trap, "on", None)) is not None else []
    if isinstance(node, Nursery):
        return node._children
    owners = getattr(node, "owners", None)
    return owners if owners is not None else [getattr(node, "owner", None)]


def find_circle(tasks: Iterable[Task]) -> list[Any]:
    """Tasks and things in turn, each waiting for the next and the last for the first; empty if there are none.

    Linear: each task and each thing is looked at once.
    """
    done: set[int] = set()
    for start in tasks:
        path: dict[int, object] = {}
        branches: list[Iterator[object]] = [iter([start])]
        while branches:
            node = next(branches[-1], branches)
            if node is branches:  # no more of them
                branches.pop()
                if path:
                    done.add(path.popitem()[0])
            elif id(node) in path:
                nodes = list(path.values())
                return nodes[list(path).index(id(node)) :]
            elif id(node) not in done and node is not None:
                path[id(node)] = node
                branches.append(iter(_behind(node)))
    return []


def _report(kernel: Kernel, tasks: list[Task]) -> str:
    waiting = f"all tasks ({len(tasks)}) wait" if len(tasks) > 1 else "the only task waits"
    lines = [f"nothing can happen any more: {waiting}, and nobody is left to wake one of them."]
    circle = find_circle(tasks)
    if circle:
        if not isinstance(circle[0], Task):
            circle = circle[1:] + circle[:1]
        lines.append("They wait for one another:")
        for task, thing, other in zip(circle[::2], circle[1::2], circle[2::2] + circle[:1], strict=True):
            what = "its child" if isinstance(thing, Nursery) else show(thing)
            holder = "" if repr(other.name) in what else f"{'' if what == 'its child' else ', held by'} {other.name!r}"
            lines.append(f"  {task.name!r} waits for {what}{holder}")
    lines.append("If waiting for ever is what you want, say so with sleep_forever().")
    return "\n".join(lines) + "\n" + format_task_tree(kernel)
