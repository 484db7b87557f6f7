"""Footprints: which kernel objects a step touches.

Two steps of different tasks may be swapped if neither touches what the other changes. To know that, we must see every
access to every object that tasks can share through the kernel: locks, channels, scopes, nurseries, tasks, handles.
An access need not be a call of an operation. `lock.release()`, `event.is_set()` and `scope.cancelled_caught` are
accesses too, and so is what the loop does for a task that sleeps, is woken or ends.

But whatever it is, it reads or sets an attribute. So while a program is explored in this way, the classes of this
package have a `__getattribute__` and a `__setattr__` that note what they are asked for. An ordinary run never sees
them.

What is noted is a *cell*, an attribute of an object, and how it was used:

    READ      the attribute was read, and its value cannot change: a number, a string, another kernel object
    WRITE     it was set; or it was read, and its value is a list, a dict, or anything else that whoever has it can
              change. Then the value itself is a cell, as two objects may share it
    COUNT     a task has ended well, and leaves its nursery. The order in which two of them do so does not matter

Two uses of a cell *conflict* unless both are READ, or both are COUNT. When in doubt, a use is a WRITE.

Rules:

* An object, and a task is one, is named by how many were made before it in this run. Two runs that are alike up to
  some point give the same names up to there, and no more is asked of a name. What existed before the run has none: all
  of it together is one cell.
* A function that closes over variables shares them without an attribute. Few functions of this package do, and they
  all count as uses of one cell, whenever a task goes on inside of one.
* No function of this package keeps a list or dict that it has from an attribute over a `yield`. A test looks for that
  in the source: tests/testing/test_footprints.py.
* How far a task has come is a cell as well. Whoever looks at another task's coroutine reads it.
"""

from __future__ import annotations

import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from dataclasses import is_dataclass
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

from outcome import Error, Value

from ..core.nursery import Nursery
from ..core.task import START, Task
from ..sync import _NOBODY

if TYPE_CHECKING:
    from ..core.loop import Kernel
    from ..core.ports import Timed, Timers

__all__ = ["Footprint", "Footprints", "conflict"]

Cell = tuple[object, object]
Footprint = dict[Cell, int]

READ: Final = 1
COUNT: Final = 2
WRITE: Final = 4

UNNAMED: Final = 0
"""The name of all objects that have none."""
EVERYTHING: Final[Cell] = ("everything", None)
"""READ by each step; WRITE for a step that must not be swapped with any other."""

_CLOSURE: Final[Cell] = ("closure", None)
_LOCALS: Final[Cell] = ("locals", None)
_TIMERS: Final[Cell] = ("timers", None)

_PACKAGE: Final = __name__.partition(".")[0]
_UNSEEN: Final = (
    "core.errors", "core.loop", "core.ports", "boot", "drivers", "guest", "interrupts", "asyncgens", "tracing",
    "integrations", "path", "testing.closed_world", "testing.explore", "testing.footprints", "testing.pruning",
    "testing.report", "testing.schedules", "testing.targets",
)  # fmt: skip
"""Modules whose classes are not watched: the loop, whose doings are noted one by one; the drivers; and ourselves."""

_CONSTANT: Final = (
    int, float, complex, bool, str, bytes, type(None), type, types.FunctionType, types.BuiltinFunctionType,
    types.MethodType, types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType, types.ModuleType,
    types.TracebackType, weakref.ref, partial, Context, BaseException, Value, Error,
)  # fmt: skip
"""Types whose values do not change, or only by what is noted anyway: the steps of the task whose coroutine it is."""

_object_get: Final = object.__getattribute__
_object_set: Final = object.__setattr__
_STEP: Final[Any] = Task.__dict__["step"]
_NURSERY: Final[Any] = Task.__dict__["parent_nursery"]
_OF_NURSERY: Final = frozenset({"cancel_scope", "_kernel", "_bare", "_parent"})  # never change once it is open


def conflict(one: Footprint, other: Footprint) -> bool:
    """Whether two steps with these footprints may not be swapped."""
    if len(one) > len(other):
        one, other = other, one
    return any(use | other.get(cell, use) not in (READ, COUNT) for cell, use in one.items() if cell in other)


class Footprints:
    """Notes what one step after the other touches, in one run after the other.

    Attributes:
        touched: the footprint of the step that goes on.
        left: the name of the nursery that a task has left in this step, having ended; None if none has.
        joined: for each task that was woken at the end of a nursery's block, the name of that nursery.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._classes = _classes()
        self._thread = get_ident()
        self._names: dict[int, int] = {}  # of objects, lists and dicts of this run, by id
        self._kept: list[object] = []  # the same things: an id must not be used twice
        self.joined: dict[Task, int] = {}
        self._is_constant: dict[type, bool] = {}  # whether values of a type are; see _constant
        self._not_of_instance: dict[type, frozenset[str]] = {}  # methods, properties and the like of a class
        self._special: set[type] = set()  # nurseries and tasks, which have rules of their own
        self.serve(kernel)
        self.begin_run()

    def serve(self, kernel: Kernel) -> None:
        """Note what happens in this one."""
        self._kernel = kernel

    def begin_run(self) -> None:
        self._names.clear()
        self._kept.clear()
        self.joined.clear()
        self.begin_step(UNNAMED)
        kernel = self._kernel
        kernel.farewells = _Farewells(self)
        kernel.locals = _Locals(self)
        kernel.timers = _Timers(self, getattr(kernel.timers, "real", kernel.timers))

    def begin_step(self, task: int) -> None:
        self.touched: Footprint = {EVERYTHING: READ, (task, "progress"): WRITE}
        self.left: int | None = None
        self._joins: int | None = None

    def use(self, cell: Cell, how: int) -> None:
        self.touched[cell] = self.touched.get(cell, 0) | how

    def read(self, cell: Cell, value: object) -> None:
        """`value` was read from `cell`."""
        self.use(cell, READ)
        if not self._constant(value):
            self.use((self.name(value), None), WRITE)

    def name(self, thing: object) -> int:
        return self._names.get(id(thing), UNNAMED)

    def _give_name(self, thing: object) -> None:
        self._kept.append(thing)
        self._names[id(thing)] = len(self._kept)

    def woken(self, task: Task) -> None:
        """`task` becomes ready."""
        if self._joins is not None:
            self.joined[task] = self._joins
            self._joins = None

    def enter_frames(self, task: Task) -> None:
        """`task` goes on in the functions where it sleeps, or begins."""
        frames = [frame for frame, _ in task.iter_await_frames()]
        if task.step is START:  # what is run in a scope, say, is an argument as yet
            frames += [frame for inner in map(_argument, frames) if (frame := _frame_of(inner)) is not None]
        if any(frame.f_code.co_freevars and _is_ours(frame.f_globals.get("__name__")) for frame in frames):
            self.use(_CLOSURE, WRITE)

    # ---- watching ----

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, accesses are noted, in this thread."""
        replaced: list[tuple[type, str, Any]] = []

        def replace(kind: type, name: str, function: Callable[..., Any]) -> None:
            replaced.append((kind, name, kind.__dict__.get(name)))
            setattr(kind, name, function)

        get, set_ = self._getattribute(), self._setattr()
        try:
            for kind in self._classes:
                if not any(base in self._classes for base in kind.__mro__[1:]):
                    replace(kind, "__getattribute__", get)
                    replace(kind, "__setattr__", set_)
                if "__init__" in kind.__dict__:
                    replace(kind, "__init__", self._init(kind.__dict__["__init__"]))
            yield
            self._look_for_strangers()
        finally:
            for kind, name, original in reversed(replaced):
                if original is None:
                    delattr(kind, name)
                else:
                    setattr(kind, name, original)

    def _look_for_strangers(self) -> None:
        """Raise ValueError if there are classes that were not there when watching began."""
        new = _classes() - self._classes
        if new:
            modules = ", ".join(sorted({kind.__module__ for kind in new}))
            raise ValueError(f"{modules} was imported by the program, and was not watched. Import it before exploring.")

    def _init(self, original: Callable[..., None]) -> Callable[..., None]:
        def __init__(thing: Any, *args: Any, **kwargs: Any) -> None:
            if id(thing) not in self._names and get_ident() == self._thread:
                self._give_name(thing)
            original(thing, *args, **kwargs)

        return __init__

    def _getattribute(self) -> Callable[[Any, str], Any]:
        names, thread, is_constant = self._names, self._thread, self._is_constant
        not_of_instance, special = self._not_of_instance, self._special

        def __getattribute__(thing: Any, name: str) -> Any:
            value = _object_get(thing, name)
            kind = type(thing)
            if name in (not_of_instance.get(kind) or self._look_at(kind)) or get_ident() != thread:
                return value
            # The commonest case by itself, without calls: an exploration spends most of its time here.
            if is_constant.get(type(value)) and id(thing) in names and kind not in special:
                touched, cell = self.touched, (names[id(thing)], name)
                touched[cell] = touched.get(cell, 0) | READ
            else:
                self._got(thing, name, value)
            return value

        return __getattribute__

    def _setattr(self) -> Callable[[Any, str, Any], None]:
        def __setattr__(thing: Any, name: str, value: Any) -> None:
            kind = type(thing)
            if name not in (self._not_of_instance.get(kind) or self._look_at(kind)) and get_ident() == self._thread:
                self._sets(thing, name, value)
            _object_set(thing, name, value)

        return __setattr__

    def _look_at(self, kind: type) -> frozenset[str]:
        """What is no attribute of an instance. Of methods and properties we see what they do."""
        names = {
            name
            for base in kind.__mro__
            for name, value in base.__dict__.items()
            if name.startswith("__")
            or (hasattr(type(value), "__get__") and not isinstance(value, types.MemberDescriptorType))
        }
        if issubclass(kind, Nursery | Task):
            self._special.add(kind)
        self._not_of_instance[kind] = frozenset(names)
        return self._not_of_instance[kind]

    def _got(self, thing: Any, name: str, value: Any) -> None:
        owner = self.name(thing)
        if isinstance(thing, Nursery):
            self._use_nursery(thing, name)
        elif owner == UNNAMED:
            self.use((UNNAMED, None), WRITE)
        elif name == "coro" and isinstance(thing, Task):
            if thing is not self._kernel.current:
                self.use((owner, "progress"), READ)
        else:
            self.read((owner, name), value)

    def _sets(self, thing: Any, name: str, value: Any) -> None:
        owner = self.name(thing)
        if isinstance(thing, Nursery):
            if name == "_joining" and value is None and getattr(thing, "_joining", None) is not None:
                self._joins = owner
            self._use_nursery(thing, name)
        else:
            self.use((owner, name if owner != UNNAMED else None), WRITE)
        if not self._constant(value) and id(value) not in self._names:
            self._give_name(value)

    def _use_nursery(self, nursery: Nursery, name: str) -> None:
        """A nursery is one cell. A task that has ended well only takes itself off the list."""
        if name in _OF_NURSERY:
            return
        number, how = self.name(nursery), WRITE
        task = self._kernel.current
        if task is not None and _NURSERY.__get__(task) is nursery:
            step = _STEP.__get__(task)
            if step is Value or step is Error:
                self.left = number
                how = COUNT if step is Value and number != UNNAMED else WRITE
        self.use((number, None), how)

    def _constant(self, value: object) -> bool:
        """Whether `value` cannot change, or only by changes that are noted where they happen."""
        if isinstance(value, tuple):
            return all(map(self._constant, value))
        kind = type(value)
        constant = self._is_constant.get(kind)
        if constant is None:
            constant = kind is object or issubclass(kind, _CONSTANT)
            if not issubclass(kind, list | dict | set | deque | bytearray):  # and some of these are watched, too
                constant = constant or any(base in self._classes for base in kind.__mro__)
            self._is_constant[kind] = constant
        return constant or value is self._kernel or value is _NOBODY


def _frame_of(coro: object) -> types.FrameType | None:
    return getattr(coro, "cr_frame", None) or getattr(coro, "gi_frame", None)


def _argument(frame: types.FrameType) -> object:
    return frame.f_locals.get("coro") if _is_ours(frame.f_globals.get("__name__")) else None


def _is_ours(module: object) -> bool:
    return str(module).partition(".")[0] == _PACKAGE


def _classes() -> set[type]:
    """The classes of this package whose instances tasks can share."""
    found: set[type] = set()
    for name, module in list(sys.modules.items()):
        package, _, rest = name.partition(".")
        if package == _PACKAGE and not any(rest == unseen or rest.startswith(f"{unseen}.") for unseen in _UNSEEN):
            found.update(kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == name)
    return {kind for kind in found if _can_change(kind)}


def _can_change(kind: type) -> bool:
    if issubclass(kind, BaseException | tuple | threading.local):
        return False
    parameters = getattr(kind, "__dataclass_params__", None)
    frozen = is_dataclass(kind) and parameters is not None and parameters.frozen
    return not frozen and not getattr(kind, "_is_protocol", False)


# ---- what belongs to the kernel itself ----------------------------------------------------------------


class _Timers:
    """The timers. Two that are set for the same time stay in their order; otherwise the order does not matter."""

    def __init__(self, footprints: Footprints, real: Timers) -> None:
        self._footprints = footprints
        self.real = real

    def add(self, deadline: float, timed: Timed) -> None:
        self._footprints.use(_TIMERS, COUNT)
        self._footprints.use(("deadline", deadline), WRITE)
        self.real.add(deadline, timed)

    def remove(self, timed: Timed) -> None:
        self._footprints.use(_TIMERS, COUNT)
        self.real.remove(timed)

    def __len__(self) -> int:
        return len(self.real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class _Farewells(dict[Task, Any]):
    """What is called when a task ends: a cell for each task."""

    def __init__(self, footprints: Footprints) -> None:
        super().__init__()
        self._footprints = footprints

    def _use(self, task: Task) -> None:
        self._footprints.use((self._footprints.name(task), "farewell"), WRITE)

    def __getitem__(self, task: Task) -> Any:
        self._use(task)
        return super().__getitem__(task)

    def __setitem__(self, task: Task, calls: Any) -> None:
        self._use(task)
        super().__setitem__(task, calls)

    def __delitem__(self, task: Task) -> None:
        self._use(task)
        super().__delitem__(task)

    def get(self, task: Task, default: Any = None) -> Any:
        self._use(task)
        return super().get(task, default)

    def setdefault(self, task: Task, default: Any = None) -> Any:
        self._use(task)
        return super().setdefault(task, default)

    def pop(self, task: Task, *default: Any) -> Any:
        self._use(task)
        return super().pop(task, *default)


class _Locals(dict[object, Any]):
    """The values of `RunVar`s, and what layers keep for the run: one cell, which most programs only read."""

    def __init__(self, footprints: Footprints) -> None:
        super().__init__()
        self._footprints = footprints

    def __getitem__(self, key: object) -> Any:
        value = super().__getitem__(key)
        self._footprints.read(_LOCALS, value)
        return value

    def get(self, key: object, default: Any = None) -> Any:
        value = super().get(key, default)
        self._footprints.read(_LOCALS, value)
        return value

    def __contains__(self, key: object) -> bool:
        self._footprints.use(_LOCALS, READ)
        return super().__contains__(key)

    def __setitem__(self, key: object, value: Any) -> None:
        self._footprints.use(_LOCALS, WRITE)
        super().__setitem__(key, value)

    def setdefault(self, key: object, default: Any = None) -> Any:
        self._footprints.use(_LOCALS, WRITE)
        return super().setdefault(key, default)

    def pop(self, key: object, *default: Any) -> Any:
        self._footprints.use(_LOCALS, WRITE)
        return super().pop(key, *default)
