"""Random programs of nurseries, scopes, shields, deadlines and cancels end as the rules say.

A program is drawn as data (see `cancellation_model`), run in the kernel in virtual time, and simulated by the model.
Both write a log: who did what and when, what each block ended with, why a task was cancelled. The logs must be equal,
line by line, as the order of everything is promised. Between any two steps the kernel's books are checked too (see
`invariants`).

`KERNEL_TEST_LONG=1` draws fifty times as many programs, new ones each time.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, fields, replace
from itertools import count
from math import inf
from typing import Any

import pytest
from cancellation_model import (
    Action,
    Body,
    Cancel,
    Catch,
    Checkpoint,
    Cleanup,
    Enter,
    Event,
    Leave,
    Mix,
    Model,
    Nursery,
    Open,
    Peek,
    Program,
    Raise,
    Scope,
    SetDeadline,
    SetRelative,
    SetShield,
    Shape,
    ShieldedCheckpoint,
    Sleep,
    Spawn,
    Start,
    Started,
    Swallow,
    actions_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from invariants import CheckedReadyQueue, NoFiles, close_all

import kernel
from kernel.lowlevel import ParkingLot, cancel_shielded_checkpoint, checkpoint, checkpoint_if_cancelled, current_task
from kernel.testing import MockClock

LONG = os.environ.get("KERNEL_TEST_LONG", "") not in ("", "0")


def examples(number: int) -> settings:
    """Settings for a property: the same examples each time, or very many and always others."""
    return settings(
        max_examples=number * 50 if LONG else number,
        derandomize=not LONG,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# ---- drawing programs -----------------------------------------------------------------------------------

# Few values, so that many things happen at the same time. The simplest comes first, as programs shrink towards it.
SECONDS = st.sampled_from([1, 2, 3, 4, 6, 9, 0])
DEADLINES = st.sampled_from([1, 2, 3, 4, 6, 8, 0, inf])
# Whom an action aims at: drawn as a number, made a label by `labelled`. 0 is the nearest scope or nursery around.
TARGETS = st.integers(0, 9)
NEAR = st.sampled_from([0, 0, 0, 1, 2, 3, 5])

LEAVES = [Sleep] * 6 + [Checkpoint] * 2 + [ShieldedCheckpoint, Raise, Peek, Started]
LEAVES += [Cancel] * 5 + [SetShield] * 3 + [SetDeadline, SetRelative]
BLOCKS = [Scope] * 6 + [Nursery] * 6 + [Spawn] * 3 + [Start] * 3 + [Swallow, Catch, Cleanup, Mix]
MISUSES = [Leave, Enter, Open]


class Drawing:
    """Draws one program: at most `actions` actions, blocks at most `depth` deep."""

    def __init__(self, draw: Any, *, misuse: bool, actions: int = 45, depth: int = 6) -> None:
        self.draw = draw
        self.left = actions
        self.depth = depth
        self.leaves = LEAVES + MISUSES if misuse else LEAVES
        self.kinds = self.leaves + BLOCKS * 2

    def body(self, depth: int) -> Body:
        return [self.action(depth) for _ in range(self.draw(st.integers(0, 5))) if self.left > 0]

    def action(self, depth: int) -> Action:
        self.left -= 1
        draw = self.draw
        kind: Any = draw(st.sampled_from(self.kinds if depth else self.leaves))
        if kind in (Checkpoint, ShieldedCheckpoint, Started):
            return kind()  # type: ignore[no-any-return]
        if kind in (Cancel, Peek, Leave):
            return kind(draw(TARGETS))  # type: ignore[no-any-return]
        if kind in (Raise, Open):
            return kind("?")  # type: ignore[no-any-return]
        if kind is Sleep:
            return Sleep(draw(SECONDS))
        if kind is SetShield:
            return SetShield(draw(TARGETS), draw(st.booleans()))
        if kind in (SetDeadline, SetRelative):
            return kind(draw(TARGETS), draw(DEADLINES))  # type: ignore[no-any-return]
        if kind is Enter:
            return Enter("?", **self.options())
        return self.block(kind, depth - 1)

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"shield": self.draw(st.sampled_from([False, False, True]))}
        which = self.draw(st.sampled_from(["none", "deadline", "relative"]))
        if which != "none":
            options[which] = self.draw(DEADLINES)
        return options

    def block(self, kind: Any, depth: int) -> Action:
        if kind is Scope:
            return Scope("?", self.body(depth), **self.options())
        if kind is Nursery:
            children = [self.child(depth) for _ in range(self.draw(st.integers(0, 3))) if self.left > 0]
            return Nursery("?", [*children, *self.body(depth)])
        if kind in (Spawn, Start):
            return self.child(depth, kind)
        if kind is Cleanup:
            return Cleanup(self.body(depth), self.body(depth))
        if kind is Mix:
            return Mix(self.body(depth), "?")
        return kind(self.body(depth))  # type: ignore[no-any-return]

    def child(self, depth: int, kind: Any = None) -> Action:
        kind = kind or self.draw(st.sampled_from([Spawn, Spawn, Start]))
        body = self.body(depth)
        if kind is Start and self.draw(st.booleans()):
            body = [*body, Started(), *self.body(depth)]
        return kind(self.draw(NEAR), "?", body)  # type: ignore[no-any-return]


@st.composite
def programs(draw: Any, misuse: bool = False) -> Program:
    drawing = Drawing(draw, misuse=misuse)
    return labelled(Program(drawing.body(drawing.depth)), apart=draw(st.booleans()))


class labelled:
    """Give names to scopes, nurseries, tasks and errors, and turn the numbers that actions aim with into names.

    With `apart`, every time in the program gets a fraction of its own, so that hardly two things happen at once.
    """

    def __new__(cls, program: Program, apart: bool) -> Program:  # type: ignore[misc]
        self = super().__new__(cls)
        self.counts = {"s": 0, "n": 0, "t": 0, "E": 0, "apart": 0}
        self.apart = apart
        named = self._named(program.body)
        self.all = [each for each in actions_of(named) if isinstance(each, Scope | Nursery | Enter | Open)]
        return Program(self._aimed(named, []))

    def _next(self, prefix: str) -> str:
        self.counts[prefix] += 1
        return f"{prefix}{self.counts[prefix]}"

    def _named(self, body: Body) -> Body:
        return [self._name(action) for action in body]

    def _name(self, action: Action) -> Action:
        changes: dict[str, Any] = {}
        for each in fields(action):  # type: ignore[arg-type]
            value = getattr(action, each.name)
            if each.name == "label":
                changes["label"] = self._next("n" if isinstance(action, Nursery | Open) else "s")
            elif each.name == "task":
                changes["task"] = self._next("t")
            elif each.name == "error":
                changes["error"] = self._next("E")
            elif isinstance(value, list):
                changes[each.name] = self._named(value)
            elif self.apart and each.name in ("seconds", "deadline", "relative", "at") and 0 < value < inf:
                self.counts["apart"] += 1
                changes[each.name] = value + self.counts["apart"] / 1024
        return replace(action, **changes)  # type: ignore[type-var]

    def _aimed(self, body: Body, around: list[Action]) -> Body:
        around = list(around)
        done = []
        for action in body:
            done.append(self._aim(action, around))
            if isinstance(action, Enter | Open):
                around.insert(0, action)
        return done

    def _aim(self, action: Action, around: list[Action]) -> Action:
        changes: dict[str, Any] = {}
        for each in fields(action):  # type: ignore[arg-type]
            value = getattr(action, each.name)
            if each.name == "scope":
                wanted: Any = Scope | Enter if isinstance(action, Leave) else object
                changes["scope"] = self._target(value, wanted, around)
            elif each.name == "nursery":
                changes["nursery"] = self._target(value, Nursery | Open, around)
            elif isinstance(value, list):
                inside = [action, *around] if isinstance(action, Scope | Nursery) else around
                changes[each.name] = self._aimed(value, inside)
        return replace(action, **changes)  # type: ignore[type-var]

    def _target(self, number: int, kind: Any, around: list[Action]) -> str:
        candidates = [each.label for each in [*around, *self.all] if isinstance(each, kind)]  # type: ignore[attr-defined]
        unique = list(dict.fromkeys(candidates))
        return unique[number % len(unique)] if unique else "none"


# ---- running them in the kernel ---------------------------------------------------------------------------


class ProgramError(Exception):
    pass


def shape(error: BaseException | None) -> Shape | None:
    if error is None:
        return None
    if isinstance(error, BaseExceptionGroup):
        return tuple(shape(each) or "" for each in error.exceptions)
    return str(error) if isinstance(error, ProgramError) else type(error).__name__


class Execution:
    """One run of a program in the kernel, and the log of it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.log: list[Event] = []
        self.over = False
        self.nurseries: dict[str, kernel.Nursery] = {}
        self.scopes = {
            action.label: kernel.CancelScope(
                deadline=action.deadline, relative_deadline=action.relative, shield=action.shield
            )
            for action in actions_of(program.body)
            if isinstance(action, Scope | Enter)
        }

    def run(self) -> tuple[list[Event], Shape | None]:
        queue = CheckedReadyQueue(max_steps=10_000)
        result = None
        try:
            kernel.run(
                self.task,
                "main",
                self.program.body,
                clock=MockClock(autojump_threshold=0),
                ready=queue,
                poller=NoFiles(),  # type: ignore[arg-type]
            )
        except kernel.KernelInternalError as error:
            if queue.kernel is not None:
                close_all(queue.kernel)
            raise AssertionError("\n".join([str(error.__cause__), *queue.violations])) from error
        except BaseException as error:
            if not self.log:
                raise
            result = shape(error)
        finally:
            self.over = True
        queue.finish()
        return self.log, result

    def note(self, task: str, what: str) -> None:
        if self.over:  # a coroutine is closed that a broken kernel has left
            return
        self.log.append((kernel.current_time(), task, what))

    async def task(self, name: str, body: Body, task_status: Any = None) -> None:
        self.note(name, "begins")
        try:
            await self.do_all(name, task_status, body)
        except BaseException as error:
            self.note(name, f"ends with {shape(error)}")
            raise
        self.note(name, "ends with None")

    async def do_all(self, task: str, status: Any, body: Body) -> None:
        for action in body:
            await self.do(task, status, action)

    async def do(self, task: str, status: Any, action: Action) -> None:
        match action:
            case Sleep(seconds):
                await self.wait(task, action, kernel.sleep(seconds))
            case Checkpoint():
                await self.wait(task, action, checkpoint())
            case ShieldedCheckpoint():
                await self.wait(task, action, cancel_shielded_checkpoint())
            case Raise(error):
                raise ProgramError(error)
            case Swallow(body):
                try:
                    await self.do_all(task, status, body)
                except kernel.Cancelled:
                    self.note(task, "swallows Cancelled")
            case Catch(body):
                try:
                    await self.do_all(task, status, body)
                except Exception as error:
                    self.note(task, f"catches {shape(error)}")
            case Mix(body, error):
                try:
                    await self.do_all(task, status, body)
                except kernel.Cancelled as cancelled:
                    raise BaseExceptionGroup("mixed", [cancelled, ProgramError(error)]) from None
            case Cleanup(body, cleanup):
                error = None
                try:
                    await self.do_all(task, status, body)
                except BaseException as caught:
                    error = caught
                    raise
                finally:
                    self.note(task, f"cleans up after {shape(error)}")
                    del error
                    await self.do_all(task, status, cleanup)
            case Scope(label, body):
                await self.block(task, label, self.in_scope(task, status, label, body))
            case Nursery(label, body):
                await self.block(task, label, self.in_nursery(task, status, label, body))
            case Enter(label):
                self.scopes[label].__enter__()
                self.entered(task, label)
            case Open(label):
                nursery = self.nurseries[label] = kernel.open_nursery()
                self.scopes[label] = nursery.cancel_scope
                await nursery.__aenter__()
                self.entered(task, label)
            case Spawn(label, name, body):
                try:
                    self.nurseries[label].start_soon(self.task, name, body, status)
                except (KeyError, RuntimeError):
                    self.note(task, f"spawns {name}: refused")
                else:
                    self.note(task, f"spawns {name}")
            case Start(label, name, body):
                await self.start(task, label, name, body)
            case Started():
                try:
                    status.started()
                except (AttributeError, RuntimeError):
                    self.note(task, "Started(): refused")
                else:
                    self.note(task, "Started()")
            case _:
                self.meddle(task, action)

    async def wait(self, task: str, action: Action, operation: Any) -> None:
        try:
            await operation
        except kernel.Cancelled as cancelled:
            why = f"{cancelled.source} {cancelled.reason}" if cancelled.source == "explicit" else cancelled.source
            self.note(task, f"{action}: cancelled, {why}")
            raise
        self.note(task, f"{action}: done")

    async def block(self, task: str, label: str, inside: Any) -> None:
        error: BaseException | None = None
        try:
            await inside
        except BaseException as raised:
            error = raised
            raise
        finally:
            scope = self.scopes[label]
            self.note(
                task,
                f"leaves {label} with {shape(error)}, called={scope.cancel_called}, caught={scope.cancelled_caught}",
            )
            del error

    async def in_scope(self, task: str, status: Any, label: str, body: Body) -> None:
        with self.scopes[label]:
            self.entered(task, label)
            await self.do_all(task, status, body)

    async def in_nursery(self, task: str, status: Any, label: str, body: Body) -> None:
        nursery = self.nurseries[label] = kernel.open_nursery()
        self.scopes[label] = nursery.cancel_scope
        async with nursery:
            self.entered(task, label)
            await self.do_all(task, status, body)

    def entered(self, task: str, label: str) -> None:
        self.note(task, f"enters {label}{' cancelled' if self.scopes[label].cancel_called else ''}")

    async def start(self, task: str, label: str, name: str, body: Body) -> None:
        self.note(task, f"starts {name}")
        error: BaseException | None = None
        try:
            if label not in self.nurseries:
                raise RuntimeError("no such nursery")
            await self.nurseries[label].start(self.task, name, body)
        except RuntimeError as raised:
            error = raised
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.note(task, f"has started {name}: {shape(error)}")
            del error

    def meddle(self, task: str, action: Any) -> None:
        scope = self.scopes.get(action.scope)
        if scope is None:
            self.note(task, f"{action}: no such scope")
            return
        verdict = ""
        try:
            match action:
                case Cancel():
                    scope.cancel(reason=task)
                case SetShield(_, on):
                    scope.shield = on
                case SetDeadline(_, at):
                    scope.deadline = at
                case SetRelative(_, seconds):
                    scope.relative_deadline = seconds
                case Peek():
                    called = scope.cancel_called
                    verdict = f": called={called}, effective deadline {float(kernel.current_effective_deadline())}"
                case Leave():
                    scope.__exit__(None, None, None)
        except RuntimeError:
            verdict = ": refused"
        self.note(task, f"{action}{verdict}")


def compare(program: Program) -> None:
    """Run `program` both ways. Raises AssertionError that shows the program and where the logs part."""
    log, result = Execution(program).run()
    expected_log, expected_result = Model(program).run()
    if (log, result) == (expected_log, expected_result):
        return
    same = 0
    while log[same : same + 1] == expected_log[same : same + 1] != []:
        same += 1
    lines = [repr(program), "both:", *(f"    {event}" for event in log[:same])]
    lines += ["kernel:", *(f"    {event}" for event in log[same:]), f"    ended with {result}"]
    lines += ["model:", *(f"    {event}" for event in expected_log[same:]), f"    ended with {expected_result}"]
    raise AssertionError("\n".join(lines))


@examples(1200)
@given(programs())
def test_programs_of_nurseries_scopes_and_cancels_end_as_the_rules_say(program: Program) -> None:
    compare(program)


@examples(600)
@given(programs(misuse=True))
def test_programs_that_leave_scopes_out_of_order_end_as_the_rules_say(program: Program) -> None:
    compare(program)


# ---- programs that are rarely drawn ------------------------------------------------------------------------

# fmt: off


def test_shield_raised_inside_a_cancelled_scope_keeps_the_cancellation_out() -> None:
    compare(Program([
        Scope("s1", [
            Cancel("s1"),
            Scope("s2", [SetShield("s2", True), Sleep(1)]),
            Sleep(1),
        ]),
    ]))


def test_child_that_moves_into_a_cancelled_nursery_is_cancelled_with_the_scopes_it_has_entered() -> None:
    compare(Program([
        Nursery("n1", [
            Scope("s1", [
                Cancel("n1"),
                Start("n1", "t1", [Scope("s2", [Started(), Sleep(5)])]),
            ], shield=True),
        ]),
    ]))


def test_sleeping_child_that_somebody_else_moves_into_a_cancelled_nursery_is_woken() -> None:
    compare(Program([
        Nursery("n1", [
            Scope("s1", [
                Cancel("n1"),
                Start("n1", "t1", [Spawn("n1", "t2", [Started()]), Sleep(5)]),
            ], shield=True),
        ]),
    ]))


@pytest.mark.parametrize("before", [[], [Spawn("n2", "t4", [Sleep(2)])]], ids=["no child", "a child that ends"])
@pytest.mark.parametrize("after", [[], [Started(), Sleep(2)]], ids=["not started", "started"])
def test_nursery_waits_for_a_start_that_another_task_has_under_way(before: Body, after: Body) -> None:
    compare(Program([
        Nursery("n1", [
            Spawn("n1", "t1", [Nursery("n2", [*before, Sleep(1)])]),
            Spawn("n1", "t2", [Start("n2", "t3", [Sleep(3), *after])]),
        ]),
    ]))


def test_nursery_is_closed_from_the_end_of_its_last_child_on_though_its_owner_has_not_run_yet() -> None:
    compare(Program([
        Nursery("n1", [
            Spawn("n1", "t1", [Nursery("n2", [Spawn("n2", "t2", [Sleep(1)])])]),
            Spawn("n1", "t3", [Checkpoint(), Sleep(1), Spawn("n2", "t4", [])]),
        ]),
    ]))


def test_shield_taken_away_from_around_a_sleeper_lets_the_waiting_cancellation_in() -> None:
    compare(Program([
        Nursery("n1", [
            Spawn("n1", "t1", [Scope("s1", [Sleep(9)], shield=True)]),
            Sleep(1),
            Cancel("n1"),
            Leave("s1"),
        ]),
    ]))


def test_nursery_left_open_by_its_task_takes_no_more_children() -> None:
    compare(Program([
        Nursery("n1", [
            Spawn("n1", "t1", [Open("n2")]),
            ShieldedCheckpoint(),
            ShieldedCheckpoint(),
            Spawn("n2", "t2", [Sleep(1)]),
        ]),
    ]))


def test_error_that_a_nursery_had_gathered_when_its_task_left_it_open_still_arrives() -> None:
    compare(Program([
        Nursery("n1", [
            Spawn("n1", "t1", [
                Open("n2"),
                Spawn("n2", "t2", [Raise("E1")]),
                ShieldedCheckpoint(),
                ShieldedCheckpoint(),
            ]),
        ]),
    ]))


def test_child_started_for_a_nursery_that_was_left_open_meanwhile_stays_with_its_caller() -> None:
    compare(Program([
        Nursery("n1", [
            Spawn("n1", "t1", [Open("n2"), Sleep(1)]),
            Spawn("n1", "t2", [
                Scope("s1", [
                    Checkpoint(),
                    Start("n2", "t3", [Sleep(2), Started(), Sleep(1)]),
                    Sleep(1),
                ], shield=True),
            ]),
        ]),
    ]))


def test_error_in_a_nursery_left_open_by_main_is_not_blamed_on_the_kernel() -> None:
    compare(Program([Open("n1"), Spawn("n1", "t1", [Raise("E1")])]))


# fmt: on

# ---- values handed over at the wake ---------------------------------------------------------------------


class HandOver:
    """The simplest thing that hands values from task to task: whoever puts one gives it to the first who waits."""

    def __init__(self) -> None:
        self.waiting = ParkingLot(self)
        self.others = ParkingLot(self)
        self.tickets: dict[Any, int] = {}  # in which order the tasks came to wait
        self.numbers = count()
        self.served = -1  # the ticket served last
        self.stock: deque[int] = deque()
        self.handed: dict[Any, int] = {}

    def put(self, values: list[int]) -> None:
        """Serve as many waiting tasks as there are values, each with one; what is left goes into stock."""
        todo = deque(values)
        served = min(len(self.waiting), len(values))
        for task in self.waiting.unpark(count=len(values)):
            self.handed[task] = todo.popleft()
            if task in self.tickets:
                assert self.served < self.tickets[task], "somebody was served before one who had waited longer"
                self.served = self.tickets.pop(task)
        assert len(values) - len(todo) == served
        self.stock.extend(todo)

    async def get(self) -> int:
        await checkpoint_if_cancelled()
        if self.stock:
            return self.stock.popleft()
        self.tickets[current_task()] = next(self.numbers)
        await self.waiting.park()
        return self.handed.pop(current_task())

    def let_in(self, number: int) -> None:
        self.others.repark(self.waiting, count=number)

    async def get_late(self) -> int:
        """Wait in a side room, until `let_in`."""
        await self.others.park()
        return self.handed.pop(current_task())


@dataclass
class Getter:
    """Begins at a time, and gets up to `count` values; gives up at a deadline, or when somebody cancels it."""

    begins: int
    count: int
    late: bool
    gives_up: float


@dataclass
class Putter:
    """At a time: first cancel some getters, or let the side room in; then put so many values; then cancel some more."""

    at: int
    first: list[int]
    let_in: int
    values: int
    then: list[int]


MOMENTS = st.integers(0, 4)
VICTIMS = st.lists(st.integers(0, 5), max_size=3)
getters = st.builds(Getter, MOMENTS, st.integers(1, 3), st.booleans(), st.sampled_from([inf, 1, 2, 3, 4]))
putters = st.builds(Putter, MOMENTS, VICTIMS, st.sampled_from([0, 0, 1, 2]), st.integers(0, 3), VICTIMS)


@examples(1200)
@given(st.lists(getters, min_size=1, max_size=6), st.lists(putters, min_size=1, max_size=6))
def test_values_handed_over_at_the_wake_have_an_owner_whoever_is_cancelled(
    getters: list[Getter], putters: list[Putter]
) -> None:
    place = HandOver()
    scopes = [kernel.CancelScope(deadline=getter.gives_up) for getter in getters]
    put: list[int] = []
    got: list[int] = []
    short: list[kernel.CancelScope] = []  # of those who left with less than they wanted

    async def get(getter: Getter, scope: kernel.CancelScope) -> None:
        await kernel.sleep(getter.begins)
        with scope:
            for _ in range(getter.count):
                try:
                    got.append(await (place.get_late() if getter.late else place.get()))
                except kernel.Cancelled:
                    assert current_task() not in place.handed, "a task that was handed a value was cancelled"
                    short.append(scope)
                    raise

    async def act(putter: Putter) -> None:
        await kernel.sleep(putter.at)
        for victim in putter.first:
            scopes[victim % len(scopes)].cancel()
        place.let_in(putter.let_in)
        values = list(range(len(put), len(put) + putter.values))
        put.extend(values)
        place.put(values)
        for victim in putter.then:
            scopes[victim % len(scopes)].cancel()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for getter, scope in zip(getters, scopes, strict=True):
                nursery.start_soon(get, getter, scope)
            for putter in putters:
                nursery.start_soon(act, putter)
            await kernel.sleep(9)
            for scope in scopes:
                scope.cancel()

    queue = CheckedReadyQueue(max_steps=10_000)
    kernel.run(main, clock=MockClock(autojump_threshold=0), ready=queue, poller=NoFiles())  # type: ignore[arg-type]
    queue.finish()
    assert sorted([*got, *place.stock]) == put, "a value was lost or came twice"
    assert not place.handed
    assert not place.waiting
    assert not place.others
    assert [scope for scope in scopes if scope.cancelled_caught] == [scope for scope in scopes if scope in short]
    assert len(got) + len(short) <= sum(getter.count for getter in getters)
