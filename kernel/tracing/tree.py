"""The task tree: who there is, what each waits for, and where in its code.

    main: waits for its children
        shop.py:31 in main: async with kernel.open_nursery() as nursery:
      nursery, 1001 tasks
        till: waits for <Event at 0x7f2f6c1b4a60, not set, 1 waiting>
            shop.py:12 in till: await opened.wait()
        customer (1000 of them): sleeps 2.500 s more
            shop.py:20 in customer: await kernel.sleep(3)

`task.trap` is what a task waits for and `task.scope` where it stands, so nothing has to be recorded for this: a dump
reads what is there anyway.

Tasks of a nursery that are alike are shown together. Alike are those with the same stack, the same kind of trap, and
trees below them that are alike in turn. So a server with 100,000 connections prints a page and not a book. To find
out what is alike, each task gets the number of its *shape*, from the leaves of the tree upwards: equal shapes, equal
numbers. So two trees of any size are compared by comparing two numbers, and the whole is linear in the number of tasks.

Frames of this package are left out, but for the kernel's own tasks: the trap says what they do. Nothing here recurses,
as the tree may be deeper than Python's stack, and deep lines are not indented further, as that would make the text
quadratic.
"""

from __future__ import annotations

import linecache
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from math import inf
from types import CodeType, FrameType
from typing import IO, Any, Final

from ..core.loop import Kernel
from ..core.nursery import _Join
from ..core.scopes import CancelScope
from ..core.task import Task, current_kernel, here
from ..core.traps import _FOREVER, SleepUntil

__all__ = ["dump_on_signal", "dump_tasks", "format_task_tree", "running_stack", "show", "waits"]

MAX_ALIKE: Final = 6  # of tasks that are alike, so many are named
MAX_FRAMES: Final = 40  # of a deeper stack, only the two ends are shown
MAX_INDENT: Final = 24
MAX_TEXT: Final = 200  # for the repr of what a task waits for
HERE: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

Stack = tuple[tuple[CodeType, int], ...]  # code and line number
_Item = tuple[int, list[Task] | CancelScope]  # what is to be printed at which depth: tasks that are alike, or a scope


def format_task_tree(kernel: Kernel | None = None) -> str:
    """The tasks of a run as text: nurseries, scopes with deadlines and shields, each task's trap and stack.

    `kernel` is the running one unless given. From another thread, or a signal handler, it shows what it sees at that
    moment, and the tree may be changing meanwhile. Not a checkpoint. Cost: linear in the number of tasks, about 10 us
    each.

    Raises:
        RuntimeError: used outside the kernel.
    """
    kernel = kernel if kernel is not None else current_kernel("format_task_tree()")
    return "\n".join(_Tree(kernel).lines()) + "\n"


def dump_tasks(file: IO[str] | None = None) -> None:
    """Print the task tree of this run to `file`, by default `sys.stderr`. See `format_task_tree`."""
    print(format_task_tree(), file=file if file is not None else sys.stderr, end="", flush=True)


def dump_on_signal(signum: int | None = None, file: IO[str] | None = None) -> None:
    """From now on, print the task tree of the main thread's run whenever the process gets `signum` (default: SIGUSR1).

    For a program that seems stuck: `kill -USR1 PID`. Works while the kernel sleeps and while a task computes; a task
    that is stuck in a call into C is shown when it comes back. Replaces the signal's previous handler. Call it once,
    from the main thread, in a run or before. Raises ValueError in another thread.
    """
    number = signum if signum is not None else signal.SIGUSR1

    def dump(signum: int, frame: FrameType | None) -> None:
        text = f"{signal.Signals(signum).name}: no kernel runs in the main thread\n"
        try:
            if here.kernel is not None:
                text = format_task_tree(here.kernel)
        except Exception as error:  # it must not come out in the midst of whatever was interrupted
            text = f"{signal.Signals(signum).name}: the task tree could not be read: {error!r}. Try again.\n"
        try:
            print(text, file=file if file is not None else sys.stderr, end="", flush=True)
        except Exception:
            pass  # the file is closed, or the signal came in the midst of a write to it

    signal.signal(number, dump)


class _Tree:
    """One dump."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._now = kernel.clock.current_time()
        self._stacks: dict[Task, Stack] = {}
        self._below: dict[Task, list[tuple[CancelScope, list[Task]]]] = {}
        self._shapes: dict[Any, int] = {}  # each shape that there is, and its number
        self._shape: dict[Task, int] = {}  # the number of each task's
        self._texts: dict[Stack, list[str]] = {}  # stacks as they are printed

    def lines(self) -> Iterator[str]:
        kernel = self._kernel
        root = kernel.root_task
        if root is None:
            yield f"Task tree at {self._now:.3f} s: no run"
            return
        nurseries = [kernel.main_nursery, kernel.system_nursery]
        programs, systems = ([] if nursery is None else list(nursery._children) for nursery in nurseries)
        number = self._explore(list(programs), _of_the_program) + self._explore(list(systems), lambda code: True)
        yield (
            f"Task tree at {self._now:.3f} s: {number} tasks, {len(kernel.ready)} ready, {len(kernel.timers)} timers, "
            f"{len(kernel.poller)} waits for files"
        )
        if kernel.main_nursery is not None and kernel.main_nursery.cancel_scope.cancelled is not None:
            yield f"The run is ending: {kernel.main_nursery.cancel_scope.cancelled}"
        yield from self._print(self._groups(programs, 0))
        if systems:
            yield "The kernel's own:"
            yield from self._print(self._groups(systems, 1))

    def _explore(self, tasks: list[Task], shown: Callable[[CodeType], bool]) -> int:
        """Look at each task once, from the top down; number the shapes, from the bottom up. Returns their number."""
        for task in tasks:
            self._stacks[task] = tuple(place for place in _stack(task, self._kernel) if shown(place[0]))
            self._below[task] = below = [
                (scope, [] if (nursery := scope.nursery) is None else list(nursery._children))
                for scope in _scopes_of(task)
                if _kind(scope)
            ]
            for _, children in below:
                tasks += children
        for task in reversed(tasks):
            trees = tuple(
                (_kind(scope), tuple(sorted(Counter(self._shape.get(child, -1) for child in children).items())))
                for scope, children in self._below[task]
            )
            trap = task.trap
            shape = (
                self._stacks[task],
                self._kernel.current is task,
                type(trap),
                type(getattr(trap, "on", None)),
                trees,
            )
            self._shape[task] = self._shapes.setdefault(shape, len(self._shapes))
        return len(tasks)

    def _groups(self, tasks: list[Task], depth: int) -> list[_Item]:
        """`tasks`, those that are alike together. A few are shown one by one if there is more to see below them."""
        groups: dict[Any, list[Task]] = {}
        for task in tasks:
            groups.setdefault(self._shape[task], []).append(task)
        found: list[_Item] = []
        for group in groups.values():
            if self._below[group[0]] and len(group) <= MAX_ALIKE:
                found += [(depth, [task]) for task in group]
            else:
                found.append((depth, group))
        return found

    def _print(self, groups: list[_Item]) -> Iterator[str]:
        """What is below a group is printed right after it, before the next one: hence the stack of things to do."""
        todo = groups[::-1]
        while todo:
            depth, thing = todo.pop()
            if isinstance(thing, CancelScope):
                yield _indent(depth) + self._scope(thing)
                continue
            yield from self._heads(thing, _indent(depth))
            first = thing[0]
            yield from (f"{_indent(depth)}    {line}" for line in self._text(self._stacks[first]))
            below: list[_Item] = []
            for scope, children in self._below[first]:
                below.append((depth + 1, scope))
                below += self._groups(children, depth + 2)
            if below and len(thing) > 1:
                yield f"{_indent(depth)}  each with a tree like this, which is the first one's:"
            todo += reversed(below)

    def _heads(self, tasks: list[Task], indent: str) -> Iterator[str]:
        """A line for each task, or one for several that differ in nothing."""
        heads = Counter(f"{task.name}\0{self._doing(task)}" for task in tasks)
        for head, number in list(heads.items())[:MAX_ALIKE]:
            name, _, doing = head.partition("\0")
            yield f"{indent}{name}{f' ({number} of them)' if number > 1 else ''}: {doing}"
        rest = sum(list(heads.values())[MAX_ALIKE:])
        if rest:
            yield f"{indent}... and {rest} more like these"

    def _doing(self, task: Task) -> str:
        trap = task.trap
        if trap is None:
            return "running" if self._kernel.current is task else task.state
        return waits(trap, self._now)

    def _text(self, stack: Stack) -> list[str]:
        if stack not in self._texts:
            self._texts[stack] = list(_text(stack))
        return self._texts[stack]

    def _scope(self, scope: CancelScope) -> str:
        words = []
        nursery = scope.nursery
        if nursery is None:
            words.append("scope")
        else:
            number = len(nursery._children)
            words.append(f"{type(nursery).__name__.lower()}, {number} {'task' if number == 1 else 'tasks'}")
        if scope._deadline != inf and scope._why is None:
            words.append(f"deadline in {scope._deadline - self._now:.3f} s")
        if scope._shield:
            words.append("shielded")
        if scope.cancelled is not None:
            words.append(f"cancelled by {scope.cancelled}")
        return ", ".join(words)


def _scopes_of(task: Task) -> list[CancelScope]:
    """The scopes that the task itself has entered, outermost first."""
    found: list[CancelScope] = []
    scope: CancelScope | None = task.scope
    while scope is not None and scope._task is task:
        found.append(scope)
        scope = scope._parent
    return found[::-1]


def _kind(scope: CancelScope) -> tuple[str, ...]:
    """What there is to say of a scope, without the figures; nothing of one that does nothing."""
    facts = {
        type(scope.nursery).__name__: scope.nursery is not None,
        "deadline": scope._deadline != inf and scope._why is None,
        "shielded": scope._shield,
        "cancelled": scope.cancelled is not None,
    }
    return tuple(fact for fact, holds in facts.items() if holds)


# ---- stacks -------------------------------------------------------------------------------------------


def _stack(task: Task, kernel: Kernel) -> Stack:
    """Where the task is, outermost first."""
    if kernel.current is task:
        return running_stack(task)
    return tuple((frame.f_code, number or 0) for frame, number in task.iter_await_frames())


def _of_the_program(code: CodeType) -> bool:
    return not code.co_filename.startswith(HERE)


def running_stack(task: Task) -> Stack:
    """Where a task is that runs at this moment, in whatever thread, outermost first; empty if it does not run.

    Places and not frames, for a frame that knows a list with itself in it would be left to the garbage collector.
    """
    outermost = getattr(task.coro, "cr_frame", None) or getattr(task.coro, "gi_frame", None)
    others = sys._current_frames()
    others[threading.get_ident()] = sys._getframe(1)
    for frame in others.values():
        found: list[tuple[CodeType, int]] = []
        inner: FrameType | None = frame
        while inner is not None:
            found.append((inner.f_code, inner.f_lineno or 0))
            if inner is outermost:
                return tuple(reversed(found))
            inner = inner.f_back
    return ()


def _text(stack: Stack) -> Iterator[str]:
    half = MAX_FRAMES // 2
    left_out = len(stack) - MAX_FRAMES
    for place, (code, number) in enumerate(stack):
        if left_out <= 0 or place < half or place >= len(stack) - half:
            text = linecache.getline(code.co_filename, number).strip()
            yield f"{_short(code.co_filename)}:{number} in {code.co_qualname}" + (f": {text}" if text else "")
        elif place == half:
            yield f"... {left_out} more ..."


def _short(filename: str) -> str:
    """A file below the working directory is named as one would name it there."""
    try:
        return filename.removeprefix(os.getcwd() + os.sep)
    except OSError:  # the directory is gone
        return filename


# ---- texts --------------------------------------------------------------------------------------------


def waits(trap: Any, now: float) -> str:
    """What sleeping on `trap` means, in words."""
    if trap is _FOREVER:
        return "sleeps for ever"
    if isinstance(trap, _Join):
        return "waits for its children"
    if isinstance(trap, SleepUntil):
        return f"sleeps {trap.deadline - now:.3f} s more"
    on = getattr(trap, "on", None)
    return f"waits for {show(trap if on is None else on)}"


def show(thing: object) -> str:
    """Its repr, on one line of bearable length. Somebody else's `__repr__` may be broken, and we are a last resort."""
    try:
        text = thing if isinstance(thing, str) else repr(thing)
    except Exception as error:
        text = f"<{type(thing).__name__} at {id(thing):#x}, whose repr raised {type(error).__name__}>"
    text = " ".join(text.split())
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 4] + " ..."


def _indent(depth: int) -> str:
    return "  " * depth if depth <= MAX_INDENT else "  " * MAX_INDENT + f"[{depth}] "
