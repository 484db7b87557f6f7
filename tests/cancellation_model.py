"""Programs as data, and a plain model that says how each of them must end.

A *program* is a tree of actions: sleep, open a scope, open a nursery, start a task in it, cancel something, fail, and
so on. `Model(program).run()` works out what happens when it runs. It is a discrete-event simulation written from the
documented rules and shares no code and no data structure with the kernel:

* There are no coroutines. A task is a stack of frames, and an exception is a value that is handed down the stack.
* Nothing is cached. Whether a task is cancelled is found by walking outward from it each time somebody asks, and
  after every change all tasks are looked at again.
* There are no timers. When nothing is ready, all deadlines are collected and the earliest one is next.

So the model is slow and simple where the kernel is fast and clever. It keeps to the order that the kernel promises:
ready tasks run first come, first served; equal deadlines come in the order they were set; a cancellation reaches the
tasks breadth first, children in the order they joined their nursery.

An exception is written as its *shape*: "Cancelled", the name of an error, or a tuple of shapes for a group.

Left out: the budget (no program here does 128 operations in one step), and files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from itertools import count
from math import inf

Shape = str | tuple["Shape", ...]
Event = tuple[float, str, str]

CANCELLED = "Cancelled"
MISUSE = "RuntimeError"
SHUTDOWN = "shutdown"


# ---- programs -----------------------------------------------------------------------------------------


class Action:
    """Something that a task does. The repr of one is the Python expression that makes it, without the defaults."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(text for _, text in self._arguments())})"

    def _arguments(self) -> Iterator[tuple[object, str]]:
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if each.default is MISSING:
                yield value, repr(value)
            elif value != each.default:
                yield value, f"{each.name}={value!r}"

    def lines(self, indent: str) -> Iterator[str]:
        """The same expression, one action to a line."""
        bodies = [each.name for each in fields(self) if isinstance(getattr(self, each.name), list)]  # type: ignore[arg-type]
        if not any(getattr(self, name) for name in bodies):
            yield f"{indent}{self!r},"
            return
        plain = [text for value, text in self._arguments() if not isinstance(value, list)]
        positional = [text for text in plain if "=" not in text]
        keywords = [text for text in plain if "=" in text]
        if len(bodies) == 1:
            yield f"{indent}{type(self).__name__}({', '.join([*positional, '['])}"
            for action in getattr(self, bodies[0]):
                yield from action.lines(indent + "    ")
            yield f"{indent}{', '.join([']', *keywords])}),"
            return
        yield f"{indent}{type(self).__name__}("
        for name in bodies:
            yield f"{indent}    ["
            for action in getattr(self, name):
                yield from action.lines(indent + "        ")
            yield f"{indent}    ],"
        yield f"{indent}),"


Body = list[Action]


@dataclass(repr=False)
class Sleep(Action):
    """Sleep for so many seconds; 0 is a checkpoint."""

    seconds: float


@dataclass(repr=False)
class Checkpoint(Action):
    """A cancel point and a schedule point."""


@dataclass(repr=False)
class ShieldedCheckpoint(Action):
    """A schedule point, no cancel point."""


@dataclass(repr=False)
class Raise(Action):
    """Fail with an error of this name."""

    error: str


@dataclass(repr=False)
class Swallow(Action):
    """Do `body`; if it ends with `Cancelled`, ignore that and go on."""

    body: Body


@dataclass(repr=False)
class Catch(Action):
    """Do `body`; if it ends with an `Exception`, note it and go on. A group with a `Cancelled` in it is none."""

    body: Body


@dataclass(repr=False)
class Mix(Action):
    """Do `body`; if it ends with `Cancelled`, raise a group of that and an error instead."""

    body: Body
    error: str


@dataclass(repr=False)
class Cleanup(Action):
    """Do `body`, and `cleanup` in any case."""

    body: Body
    cleanup: Body


@dataclass(repr=False)
class Scope(Action):
    """Do `body` inside a cancel scope. The scope exists from the start, so that others may meddle with it earlier."""

    label: str
    body: Body
    deadline: float = inf
    relative: float = inf
    shield: bool = False


@dataclass(repr=False)
class Nursery(Action):
    """Do `body` inside a nursery. Its scope has the same label, and exists from the moment it is opened."""

    label: str
    body: Body


@dataclass(repr=False)
class Spawn(Action):
    """`start_soon` a task in a nursery."""

    nursery: str
    task: str
    body: Body


@dataclass(repr=False)
class Start(Action):
    """`start` a task in a nursery and wait for its `Started()`."""

    nursery: str
    task: str
    body: Body


@dataclass(repr=False)
class Started(Action):
    """Call `started()` on the task status of the nearest task around that was run by `Start`."""


@dataclass(repr=False)
class Cancel(Action):
    """Cancel the scope."""

    scope: str


@dataclass(repr=False)
class SetShield(Action):
    """Raise or lower the shield of the scope."""

    scope: str
    on: bool


@dataclass(repr=False)
class SetDeadline(Action):
    """Set the deadline of the scope, an absolute time."""

    scope: str
    at: float


@dataclass(repr=False)
class SetRelative(Action):
    """Set the deadline of the scope in seconds from now, or from entering."""

    scope: str
    seconds: float


@dataclass(repr=False)
class Peek(Action):
    """Look at the scope's `cancel_called`, and at the effective deadline here."""

    scope: str


@dataclass(repr=False)
class Enter(Action):
    """Misuse: enter a scope and never leave it."""

    label: str
    deadline: float = inf
    relative: float = inf
    shield: bool = False


@dataclass(repr=False)
class Leave(Action):
    """Misuse: leave a scope by hand, whosever it is and whatever state it is in."""

    scope: str


@dataclass(repr=False)
class Open(Action):
    """Misuse: open a nursery and never close it."""

    label: str


@dataclass(repr=False)
class Program:
    """What the main task does."""

    body: Body

    def __repr__(self) -> str:
        return "\n".join(["Program([", *(line for action in self.body for line in action.lines("    ")), "])"])

    def _repr_pretty_(self, printer: object, cycle: bool) -> None:
        printer.text(repr(self))  # type: ignore[attr-defined]


def actions_of(body: Body) -> Iterator[Action]:
    """All actions of a body, and of the bodies in it, in the order they are written."""
    for action in body:
        yield action
        for each in fields(action):  # type: ignore[arg-type]
            value = getattr(action, each.name)
            if isinstance(value, list):
                yield from actions_of(value)


# ---- the model: what there is ---------------------------------------------------------------------------


@dataclass(eq=False)
class ScopeState:
    label: str
    deadline: float = inf
    relative: float = inf
    shield: bool = False
    state: str = "new"  # then "active", then "exited"; "abandoned" if its task ended inside
    called: bool = False
    caught: bool = False
    why: str = ""
    order: int = 0  # when the deadline was set, as compared with others
    task: TaskState | None = None
    nursery: NurseryState | None = None


@dataclass(eq=False)
class NurseryState:
    scope: ScopeState
    owner: TaskState | None
    bare: bool = False  # a lone error comes out as it is
    open: bool = True
    joining: bool = False
    pending: int = 0  # how many Start actions for it are under way
    children: list[TaskState] = field(default_factory=list)
    errors: list[Shape] = field(default_factory=list)
    cancelled: bool = False  # somebody in it ended with Cancelled


@dataclass(eq=False)
class Status:
    room: NurseryState
    target: NurseryState
    called: bool = False


@dataclass(eq=False)
class TaskState:
    name: str
    nursery: NurseryState
    status: Status | None
    frames: list[Frame]
    scopes: list[ScopeState] = field(default_factory=list)  # its own, outermost first
    begun: bool = False
    # A ready task is in the queue. `looks`: at its turn it looks whether it is cancelled; else it goes on with `gets`.
    looks: bool = False
    gets: Shape | None = None
    gets_why: str = ""
    # A sleeping task is not in the queue.
    sleeping: bool = False
    interruptible: bool = False
    until: float = inf
    order: int = 0


# What a task has on its stack, the innermost last. `Doing` is a list of actions; the others say what to do on the
# way out of it, by exception or not.


@dataclass
class Doing:
    actions: Body
    at: int = 0


@dataclass
class Waiting:
    action: Action


@dataclass
class InScope:
    scope: ScopeState


@dataclass
class InNursery:
    nursery: NurseryState
    joined: bool = False


@dataclass
class Starting:
    task: str
    status: Status


@dataclass
class Swallowing:
    pass


@dataclass
class Catching:
    pass


@dataclass
class Mixing:
    error: str


@dataclass
class CleaningAfter:
    cleanup: Body


@dataclass
class Reraising:
    error: Shape | None


Frame = (
    Doing | Waiting | InScope | InNursery | Starting | Swallowing | Catching | Mixing | CleaningAfter | Reraising
)  # fmt: skip


# ---- the model: what happens ----------------------------------------------------------------------------


class Model:
    """Simulates one program. `run` returns the log and the shape of what the main task ended with."""

    def __init__(self, program: Program) -> None:
        self.now = 0.0
        self.log: list[Event] = []
        self.ready: deque[TaskState] = deque()
        self.numbers = count(1)
        self.nurseries: dict[str, NurseryState] = {}
        self.scopes: dict[str, ScopeState] = {
            action.label: ScopeState(action.label, action.deadline, action.relative, action.shield)
            for action in actions_of(program.body)
            if isinstance(action, Scope | Enter)
        }
        self.program = program
        self.result: Shape | None = None
        # What lies around the main task: a nursery that is cancelled when the main task has ended.
        self.ground = NurseryState(ScopeState("ground", state="active"), owner=None)

    def run(self) -> tuple[list[Event], Shape | None]:
        self.main = self.spawn(self.ground, "main", self.program.body, None)
        while True:
            while self.ready:
                self.step(self.ready.popleft())
            if not self.advance():
                return self.log, self.outcome()

    def outcome(self) -> Shape | None:
        """What the run ends with: the main task's error, and those of tasks that it has left in a nursery left open."""
        errors = self.ground.errors
        together = errors[0] if len(errors) == 1 else tuple(errors)
        return without_cancelled(together) or self.result

    # -- time

    def advance(self) -> bool:
        """Nothing is ready: go to the next deadline and let all that is due happen, in order."""
        due: list[tuple[float, int, TaskState | ScopeState]] = []
        for task in self.tasks():
            if task.sleeping and task.until < inf:
                due.append((task.until, task.order, task))
            for scope in task.scopes:
                if not scope.called and scope.deadline < inf:
                    due.append((scope.deadline, scope.order, scope))
        if not due:
            return False
        self.now = min(due)[0]
        for deadline, _, thing in sorted(due, key=lambda entry: entry[:2]):
            if deadline > self.now:
                break
            if isinstance(thing, ScopeState):
                self.cancel(thing, "deadline")
            elif thing.sleeping:  # else one of those before it has cancelled it
                self.wake(thing)
        return True

    def set_deadline(self, scope: ScopeState, deadline: float) -> None:
        scope.deadline = deadline
        scope.order = next(self.numbers)
        if scope.state == "active" and deadline <= self.now:
            self.cancel(scope, "deadline")

    # -- who is cancelled

    def tasks(self) -> list[TaskState]:
        """All tasks, breadth first."""
        found = list(self.ground.children)
        for task in found:
            for scope in task.scopes:
                if scope.nursery is not None:
                    found.extend(scope.nursery.children)
        return found

    def outward(self, task: TaskState, start: ScopeState | None = None) -> Iterator[ScopeState]:
        """The scopes around a task, or from one of its scopes on, from the inside out."""
        own = task.scopes if start is None else task.scopes[: task.scopes.index(start) + 1]
        yield from reversed(own)
        nursery = task.nursery
        if nursery.owner is None:
            yield nursery.scope
        else:
            yield from self.outward(nursery.owner, nursery.scope)

    def why(self, scopes: Iterator[ScopeState]) -> str:
        """Why somebody inside these scopes is cancelled: the reason of the outermost one in sight. "" if not at all."""
        why = ""
        for scope in scopes:
            if scope.called:
                why = scope.why
            if scope.shield:
                break
        return why

    def cancel(self, scope: ScopeState, why: str) -> None:
        if not scope.called:
            scope.called = True
            scope.why = why
            self.settle()

    def settle(self) -> None:
        """Something has changed: whoever sleeps and is cancelled wakes up."""
        for task in self.tasks():
            if task.sleeping and task.interruptible:
                why = self.why(self.outward(task))
                if why:
                    self.wake(task, CANCELLED, why)

    # -- sleeping and waking

    def queue(self, task: TaskState, looks: bool, gets: Shape | None = None, why: str = "") -> None:
        task.looks, task.gets, task.gets_why = looks, gets, why
        self.ready.append(task)

    def sleep(self, task: TaskState, until: float = inf, interruptible: bool = True) -> None:
        task.sleeping, task.interruptible, task.until, task.order = True, interruptible, until, next(self.numbers)
        self.settle()

    def wake(self, task: TaskState, gets: Shape | None = None, why: str = "") -> None:
        """From now on it is settled what the task gets."""
        task.sleeping, task.until = False, inf
        self.queue(task, False, gets, why)

    # -- tasks and nurseries

    def spawn(self, nursery: NurseryState, name: str, body: Body, status: Status | None) -> TaskState:
        task = TaskState(name, nursery, status, [Doing(body)])
        nursery.children.append(task)
        self.queue(task, looks=False)
        return task

    def move(self, task: TaskState, target: NurseryState) -> None:
        task.nursery.children.remove(task)
        task.nursery = target
        target.children.append(task)

    def failed(self, nursery: NurseryState, error: Shape) -> None:
        if error == CANCELLED:
            nursery.cancelled = True
        else:
            nursery.errors.append(error)
        self.cancel(nursery.scope, "nursery")

    def let_go(self, nursery: NurseryState) -> None:
        """Wake the owner if it waits and there is nothing left to wait for."""
        if nursery.joining and not nursery.children and not nursery.pending:
            nursery.joining = nursery.open = False
            assert nursery.owner is not None
            self.wake(nursery.owner)

    def join(self, nursery: NurseryState, error: Shape | None) -> bool:
        """The body has ended. Returns whether there is something to wait for."""
        if error is not None:
            self.failed(nursery, error)
        if not nursery.children and not nursery.pending:
            nursery.open = False
            return False
        nursery.joining = True
        assert nursery.owner is not None
        self.sleep(nursery.owner, interruptible=False)
        return True

    def close(self, task: TaskState, nursery: NurseryState) -> Shape | None:
        """All have ended: what comes out?"""
        verdict: Shape | None = None
        if nursery.errors:
            verdict = nursery.errors[0] if nursery.bare and len(nursery.errors) == 1 else tuple(nursery.errors)
        elif nursery.cancelled:
            verdict = CANCELLED
        return self.leave(task, nursery.scope, verdict)

    def ended(self, task: TaskState, error: Shape | None) -> None:
        self.note(task, f"ends with {error}")
        nursery = task.nursery
        if task.scopes:  # it never left them
            while task.scopes:
                scope = task.scopes[-1]
                scope.state = "abandoned"
                if scope.nursery is not None:
                    scope.nursery.open = False
                    nursery.errors += scope.nursery.errors
                    for child in list(scope.nursery.children):
                        self.move(child, nursery)
                    self.settle()
                task.scopes.pop()
            if error is None or error == CANCELLED:
                error = MISUSE
        nursery.children.remove(task)
        if task is self.main:
            self.result = error
            self.cancel(self.ground.scope, SHUTDOWN)
        if error is not None:
            self.failed(nursery, error)
        self.let_go(nursery)

    # -- scopes

    def enter(self, task: TaskState, scope: ScopeState) -> None:
        scope.state, scope.task = "active", task
        task.scopes.append(scope)
        if scope.relative < inf:
            scope.deadline, scope.relative = self.now + scope.relative, inf
        self.set_deadline(scope, scope.deadline)

    def leave(self, task: TaskState, scope: ScopeState, error: Shape | None) -> Shape | None:
        """`task` leaves `scope` with `error`: with what does it go on?"""
        if scope.state == "abandoned":
            return error
        if scope.state != "active":
            return MISUSE
        owner = scope.task
        assert owner is not None
        in_order = owner is task and task.scopes[-1] is scope
        scope.state = "exited"
        owner.scopes.remove(scope)
        if not in_order:
            self.settle()
            return MISUSE
        if error is None or not scope.called or (not scope.shield and self.why(self.outward(task))):
            return error
        rest = without_cancelled(error)
        scope.caught = rest != error
        return rest

    def called(self, scope: ScopeState) -> bool:
        """What `cancel_called` says. It looks at the clock, and what it has said stays true."""
        if scope.state in ("new", "active") and scope.deadline <= self.now:
            self.cancel(scope, "deadline")
        return scope.called

    def effective_deadline(self, task: TaskState) -> float:
        deadline = inf
        for scope in self.outward(task):
            deadline = min(deadline, -inf if scope.called else scope.deadline)
            if scope.shield:
                break
        return deadline

    # -- one step of one task

    def note(self, task: TaskState, what: str) -> None:
        self.log.append((self.now, task.name, what))

    def step(self, task: TaskState) -> None:
        if task.looks:
            task.gets_why = self.why(self.outward(task))
            task.gets = CANCELLED if task.gets_why else None
        if not task.begun:
            task.begun = True
            self.note(task, "begins")
        error = task.gets
        while task.frames:
            frame = task.frames[-1]
            if isinstance(frame, Doing):
                if error is not None or frame.at == len(frame.actions):
                    task.frames.pop()
                    continue
                frame.at += 1
                error = self.do(task, frame.actions[frame.at - 1])
                if task.sleeping or task in self.ready:
                    return
            else:
                if isinstance(frame, InNursery) and not frame.joined:
                    frame.joined = True
                    if self.join(frame.nursery, error):
                        return
                task.frames.pop()
                error = self.way_out(task, frame, error)
        self.ended(task, error)

    def do(self, task: TaskState, action: Action) -> Shape | None:
        """Do one action, or begin it: then it leaves frames on the stack, or the task asleep or queued."""
        match action:
            case Sleep(seconds):
                task.frames.append(Waiting(action))
                if seconds == 0:
                    self.queue(task, looks=True)
                else:
                    self.sleep(task, self.now + seconds)
            case Checkpoint():
                task.frames.append(Waiting(action))
                self.queue(task, looks=True)
            case ShieldedCheckpoint():
                task.frames.append(Waiting(action))
                self.queue(task, looks=False)
            case Raise(name):
                return name
            case Swallow(body):
                task.frames += [Swallowing(), Doing(body)]
            case Catch(body):
                task.frames += [Catching(), Doing(body)]
            case Mix(body, name):
                task.frames += [Mixing(name), Doing(body)]
            case Cleanup(body, cleanup):
                task.frames += [CleaningAfter(cleanup), Doing(body)]
            case Scope(label, body) | Nursery(label, body):
                if isinstance(action, Nursery):
                    task.frames.append(InNursery(self.open(task, label)))
                else:
                    self.enter(task, self.scopes[label])
                    task.frames.append(InScope(self.scopes[label]))
                self.note(task, f"enters {label}{' cancelled' if self.scopes[label].called else ''}")
                task.frames.append(Doing(body))
            case Enter(label):
                self.enter(task, self.scopes[label])
                self.note(task, f"enters {label}{' cancelled' if self.scopes[label].called else ''}")
            case Open(label):
                self.open(task, label)
                self.note(task, f"enters {label}")
            case Spawn(label, name, body):
                nursery = self.nurseries.get(label)
                if nursery is None or not nursery.open:
                    self.note(task, f"spawns {name}: refused")
                else:
                    self.note(task, f"spawns {name}")
                    self.spawn(nursery, name, body, task.status)
            case Start(label, name, body):
                nursery = self.nurseries.get(label)
                self.note(task, f"starts {name}")
                if nursery is None or not nursery.open:
                    self.note(task, f"has started {name}: {MISUSE}")
                else:
                    room = NurseryState(ScopeState(f"room of {name}"), task, bare=True)
                    room.scope.nursery = room
                    self.enter(task, room.scope)
                    nursery.pending += 1
                    status = Status(room, nursery)
                    self.spawn(room, name, body, status)
                    task.frames.append(Starting(name, status))
                    self.join(room, None)
            case Started():
                self.started(task)
            case _:
                self.meddle(task, action)
        return None

    def open(self, task: TaskState, label: str) -> NurseryState:
        scope = self.scopes[label] = ScopeState(label)
        nursery = self.nurseries[label] = scope.nursery = NurseryState(scope, task)
        self.enter(task, scope)
        return nursery

    def started(self, task: TaskState) -> None:
        status = task.status
        if status is None or status.called or not status.room.open:
            self.note(task, "Started(): refused")
            return
        self.note(task, "Started()")
        status.called = True
        room = status.room
        assert room.owner is not None
        if status.target.open and not self.why(self.outward(room.owner, room.scope)):
            for child in list(room.children):
                self.move(child, status.target)
            self.settle()
            self.let_go(room)

    def meddle(self, task: TaskState, action: Action) -> None:
        """Do something to a scope, anywhere."""
        scope = self.scopes.get(action.scope)  # type: ignore[attr-defined]
        if scope is None:
            self.note(task, f"{action}: no such scope")
            return
        verdict = ""
        match action:
            case Cancel():
                self.cancel(scope, f"explicit {task.name}")
            case SetShield(_, on):
                scope.shield = on
                self.settle()
            case SetDeadline(_, at):
                if scope.relative < inf:
                    verdict = ": refused"
                else:
                    self.set_deadline(scope, at)
            case SetRelative(_, seconds):
                if scope.state != "new":
                    self.set_deadline(scope, self.now + seconds)
                elif scope.deadline < inf:
                    verdict = ": refused"
                else:
                    scope.relative = seconds
            case Peek():
                verdict = f": called={self.called(scope)}, effective deadline {float(self.effective_deadline(task))}"
            case Leave():
                if self.leave(task, scope, None) is not None:
                    verdict = ": refused"
        self.note(task, f"{action}{verdict}")

    def way_out(self, task: TaskState, frame: Frame, error: Shape | None) -> Shape | None:
        """The innermost frame is left with `error`, or without: with what does the task go on?"""
        match frame:
            case Waiting(action):
                self.note(task, f"{action}: {'done' if error is None else f'cancelled, {task.gets_why}'}")
            case InScope(scope):
                error = self.leave(task, scope, error)
                self.note(task, f"leaves {scope.label} with {error}, called={scope.called}, caught={scope.caught}")
            case InNursery(nursery):
                scope = nursery.scope
                error = self.close(task, nursery)
                self.note(task, f"leaves {scope.label} with {error}, called={scope.called}, caught={scope.caught}")
            case Starting(name, status):
                error = self.close(task, status.room)
                status.target.pending -= 1
                self.let_go(status.target)
                if error is None and not status.called:
                    error = CANCELLED if self.why(self.outward(task)) else MISUSE
                self.note(task, f"has started {name}: {error}")
                if error == MISUSE:
                    error = None
            case Swallowing():
                if error == CANCELLED:
                    self.note(task, "swallows Cancelled")
                    error = None
            case Catching():
                if error is not None and without_cancelled(error) == error:
                    self.note(task, f"catches {error}")
                    error = None
            case Mixing(name):
                if error == CANCELLED:
                    error = (CANCELLED, name)
            case CleaningAfter(cleanup):
                self.note(task, f"cleans up after {error}")
                task.frames += [Reraising(error), Doing(cleanup)]
                error = None
            case Reraising(earlier):
                error = error or earlier
        return error


def without_cancelled(error: Shape) -> Shape | None:
    """What is left of an exception when every `Cancelled` is taken out."""
    if error == CANCELLED:
        return None
    if isinstance(error, str):
        return error
    rest = tuple(left for left in map(without_cancelled, error) if left is not None)
    return rest or None
