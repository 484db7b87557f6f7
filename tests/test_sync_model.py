"""Synchronization against plain models: whatever is done in whatever order, the primitives do what lists would.

A few actors, each a task. One rule: an actor does some things that do not wait, all in one step (release, notify,
cancel another one's wait, ...), and then perhaps one thing that may wait. The model says who gets what, who is
cancelled, and in which order all of them run; and what state the primitive is in. So the races between a hand-over and
a cancellation are played through in every order, without a clock.

After that the conservation laws: permits, tokens, locks and notifications under random cancellation, in bulk.
`KERNEL_TEST_LONG=1` draws fifty times as many machines, new ones each time, and does more than a million operations.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

import kernel
from kernel import (
    Barrier,
    BrokenResourceError,
    CancelScope,
    CapacityLimiter,
    Condition,
    Event,
    Lock,
    Semaphore,
    WouldBlock,
    open_nursery,
)
from kernel.lowlevel import Park, Task, checkpoint, current_task
from kernel.testing import wait_all_tasks_blocked

LONG = os.environ.get("KERNEL_TEST_LONG", "") not in ("", "0")

ACTORS = 5

ERRORS = (RuntimeError, ValueError, WouldBlock, BrokenResourceError)


# ---- the models -----------------------------------------------------------------------------------------


WAITS = "waits again"
Act = tuple[Any, ...]


class Refused(Exception):
    """The model's way to say that the real one raises: with the name of the error."""


class Model:
    """What the models have in common: actors are numbers, and `ready` is who runs next, and to do what."""

    def __init__(self) -> None:
        self.ready: list[tuple[int, Callable[[], str]]] = []
        self.queue: list[Any] = []

    def wake(self, actor: int, outcome: str) -> None:
        self.ready.append((actor, lambda: outcome))

    def cancel(self, actor: int) -> None:
        if actor in self.queue:
            self.queue.remove(actor)
            self.wake(actor, "Cancelled")

    def cancelled_before(self, actor: int, act: Act) -> None:
        self.wake(actor, "Cancelled")

    def end(self, actor: int) -> None:
        pass


class EventModel(Model):
    is_set = False

    def set(self, actor: int) -> None:
        self.is_set = True
        for waiter in self.queue:
            self.wake(waiter, "None")
        self.queue = []

    def wait(self, actor: int) -> str | None:
        if self.is_set:
            return "None"
        self.queue.append(actor)
        return None

    def state(self) -> object:
        return self.is_set, len(self.queue)


class LockModel(Model):
    owner: int | None = None
    dead = False

    def acquire(self, actor: int) -> str | None:
        if self.owner is None:
            self.owner = actor
            return "None"
        self.check(actor)
        self.queue.append(actor)
        return None

    def acquire_nowait(self, actor: int) -> None:
        if self.owner is not None:
            self.check(actor)
            raise Refused("WouldBlock")
        self.owner = actor

    def check(self, actor: int) -> None:
        if self.dead:
            raise Refused("BrokenResourceError")
        if self.owner == actor:
            raise Refused("RuntimeError")

    def release(self, actor: int) -> None:
        if self.owner != actor or self.dead:
            raise Refused("RuntimeError")
        self.owner = None
        if self.queue:
            self.owner = self.queue.pop(0)
            self.wake(self.owner, "None")

    def end(self, actor: int) -> None:
        if self.owner == actor:
            self.dead = True
            for waiter in self.queue:
                self.wake(waiter, "BrokenResourceError")
            self.queue = []

    def state(self) -> object:
        return self.owner, len(self.queue)


class SemaphoreModel(Model):
    def __init__(self, value: int, max_value: int) -> None:
        super().__init__()
        self.value, self.max_value = value, max_value

    def acquire(self, actor: int) -> str | None:
        if self.value:
            self.value -= 1
            return "None"
        self.queue.append(actor)
        return None

    def acquire_nowait(self, actor: int) -> None:
        if not self.value:
            raise Refused("WouldBlock")
        self.value -= 1

    def release(self, actor: int) -> None:
        if self.queue:
            self.wake(self.queue.pop(0), "None")
        elif self.value == self.max_value:
            raise Refused("ValueError")
        else:
            self.value += 1

    def state(self) -> object:
        return self.value, len(self.queue)


class LimiterModel(Model):
    """Borrowers are the actors' numbers, and 100, 101 and so on for others. The queue holds (actor, borrower)."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.total = total
        self.borrowers: list[int] = []

    def acquire(self, actor: int) -> str | None:
        return self.acquire_on_behalf_of(actor, actor)

    def acquire_on_behalf_of(self, actor: int, borrower: int) -> str | None:
        self.check(borrower)
        self.queue.append((actor, borrower))
        if len(self.borrowers) < self.total:
            self.borrowers.append(self.queue.pop()[1])
            return "None"
        return None

    def acquire_on_behalf_of_nowait(self, actor: int, borrower: int) -> None:
        self.check(borrower)
        if len(self.borrowers) >= self.total:
            raise Refused("WouldBlock")
        self.borrowers.append(borrower)

    def acquire_nowait(self, actor: int) -> None:
        self.acquire_on_behalf_of_nowait(actor, actor)

    def check(self, borrower: int) -> None:
        if borrower in self.borrowers or any(borrower == waiting for _, waiting in self.queue):
            raise Refused("RuntimeError")

    def release(self, actor: int) -> None:
        self.release_on_behalf_of(actor, actor)

    def release_on_behalf_of(self, actor: int, borrower: int) -> None:
        if borrower not in self.borrowers:
            raise Refused("RuntimeError")
        self.borrowers.remove(borrower)
        self.lend()

    def set_total(self, actor: int, total: int) -> None:
        self.total = total
        self.lend()

    def lend(self) -> None:
        while self.queue and len(self.borrowers) < self.total:
            waiter, borrower = self.queue.pop(0)
            self.borrowers.append(borrower)
            self.wake(waiter, "None")

    def cancel(self, actor: int) -> None:
        for entry in self.queue:
            if entry[0] == actor:
                self.queue.remove(entry)
                self.wake(actor, "Cancelled")
                return

    def state(self) -> object:
        return self.total, self.borrowers, len(self.queue)


class ConditionModel(Model):
    """`waiting` wait for a notification. `queue` waits for the lock: the actor, why, and what it does once it has it.

    Why is "acquire", "notified", or "again" after a cancelled wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.owner: int | None = None
        self.dead = False
        self.waiting: list[int] = []

    def acquire(self, actor: int) -> str | None:
        return self.get_lock(actor, "acquire", lambda: "None")

    def get_lock(self, actor: int, why: str, then: Callable[[], str]) -> str | None:
        if self.owner is None:
            self.owner = actor
            return then()
        self.check(actor)
        self.queue.append((actor, why, then))
        return None

    def acquire_nowait(self, actor: int) -> None:
        if self.owner is not None:
            self.check(actor)
            raise Refused("WouldBlock")
        self.owner = actor

    def check(self, actor: int) -> None:
        if self.dead:
            raise Refused("BrokenResourceError")
        if self.owner == actor:
            raise Refused("RuntimeError")

    def own(self, actor: int) -> None:
        if self.owner != actor or self.dead:
            raise Refused("RuntimeError")

    def release(self, actor: int) -> None:
        self.own(actor)
        self.owner = None
        if self.queue:
            self.owner, _, then = self.queue.pop(0)
            self.ready.append((self.owner, then))

    def wait(self, actor: int) -> str | None:
        self.release(actor)
        self.waiting.append(actor)
        return None

    def cancelled_before(self, actor: int, act: Act) -> None:
        if act[0] == "wait":
            self.own(actor)
        super().cancelled_before(actor, act)

    def notify(self, actor: int, n: int) -> None:
        self.own(actor)
        for _ in range(min(n, len(self.waiting))):
            self.queue.append((self.waiting.pop(0), "notified", lambda: "None"))

    def cancel(self, actor: int) -> None:
        """A cancelled wait has the lock again before it raises, and then passes its notification on."""
        if actor in self.waiting:
            self.waiting.remove(actor)
            self.ready.append((actor, lambda: self.again(actor, lambda: "Cancelled")))
        for entry in self.queue:
            if entry[0] == actor and entry[1] != "again":
                self.queue.remove(entry)
                if entry[1] == "acquire":
                    self.wake(actor, "Cancelled")
                else:
                    self.ready.append((actor, lambda: self.again(actor, lambda: self.pass_on(actor))))
                return

    def again(self, actor: int, then: Callable[[], str]) -> str:
        return self.get_lock(actor, "again", then) or WAITS

    def pass_on(self, actor: int) -> str:
        self.notify(actor, 1)
        return "Cancelled"

    def end(self, actor: int) -> None:
        if self.owner == actor:
            self.dead = True
            for waiter, _, _ in self.queue:
                self.wake(waiter, "BrokenResourceError")
            self.queue = []

    def state(self) -> object:
        return self.owner, len(self.queue), len(self.waiting)


class BarrierModel(Model):
    def __init__(self, parties: int) -> None:
        super().__init__()
        self.parties, self.broken = parties, False

    def wait(self, actor: int) -> str | None:
        if self.broken:
            raise Refused("BrokenResourceError")
        if len(self.queue) + 1 < self.parties:
            self.queue.append(actor)
            return None
        for index, waiter in enumerate(self.queue):
            self.wake(waiter, str(index))
        self.queue = []
        return str(self.parties - 1)

    def send_away(self) -> None:
        for waiter in self.queue:
            self.wake(waiter, "BrokenResourceError")
        self.queue = []

    def abort(self, actor: int) -> None:
        self.send_away()
        self.broken = True

    def reset(self, actor: int) -> None:
        self.send_away()
        self.broken = False

    def state(self) -> object:
        return self.broken, len(self.queue)


# ---- the machines ---------------------------------------------------------------------------------------


class Actor:
    """A task that does as it is told, one command per step, and its number in the model."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.machine = machine
        self.number = number
        self.mailbox = Park(self)
        self.idle = True  # for the model: it does not wait for anything
        self.scope = CancelScope()
        self.task: Task

    async def live(self) -> None:
        self.task = current_task()
        while True:
            acts, finally_ = await self.mailbox
            for act in acts:
                self.machine.log.append((self.number, act, self.machine.perform(self, act)))
            if finally_ == ("end",):
                return
            if finally_ is not None:
                self.machine.log.append((self.number, await self.attempt(finally_)))

    async def attempt(self, act: Act) -> str:
        outcome = "Cancelled"
        self.scope = CancelScope()
        with self.scope:
            if act[-1] == "cancelled before":
                self.scope.cancel()
                act = act[:-1]
            try:
                outcome = str(await self.machine.call(act))
            except ERRORS as error:
                outcome = type(error).__name__
        return outcome


class Machine(RuleBasedStateMachine):
    """Runs a kernel by hand: after each rule, until everybody waits."""

    acts: ClassVar[st.SearchStrategy[Act]]
    waits: ClassVar[st.SearchStrategy[Act]]

    def __init__(self) -> None:
        super().__init__()
        self.log: list[object] = []
        self.expected: list[object] = []
        self.count = 0
        self.kernel = kernel.Kernel(detect_deadlock=False)
        self.kernel.start(self._main, ())
        self._settle()
        self.actors = [self._new_actor() for _ in range(ACTORS)]
        self.renew()
        self._settle()

    async def _main(self) -> None:
        async with open_nursery() as self.nursery:
            await Park("the end of the test")

    def _settle(self) -> None:
        while self.kernel.ready:
            self.kernel.run_ready()

    def _new_actor(self) -> Actor:
        actor = Actor(self, self.count)
        self.count += 1
        self.nursery.start_soon(actor.live, name=str(actor.number))
        return actor

    def renew(self) -> None:
        """Make a new primitive and its model."""
        raise NotImplementedError

    def spent(self) -> bool:
        """Nothing more will happen with this one."""
        return False

    def state(self) -> object:
        raise NotImplementedError

    def call(self, act: Act) -> Any:
        name, *arguments = act
        return getattr(self.thing, name)(*arguments)

    def perform(self, actor: Actor, act: Act) -> str:
        if act[0] == "cancel":
            self.actors[act[1]].scope.cancel()
            return "None"
        try:
            return str(self.call(act))
        except ERRORS as error:
            return type(error).__name__

    thing: Any
    model: Any

    @rule(data=st.data(), which=st.integers(0, ACTORS - 1))
    def act(self, data: st.DataObject, which: int) -> None:
        idle = [actor for actor in self.actors if actor.idle]
        if not idle:
            scopes = [actor.scope for actor in self.actors]
            scopes[which].cancel()
            self.expect_cancel(self.actors[which])
            self.check()
            return
        actor = idle[which % len(idle)]
        cancels = st.tuples(st.just("cancel"), st.integers(0, ACTORS - 1))
        acts = data.draw(st.lists(self.acts | cancels, max_size=4), label=f"actor {actor.number}")
        late = self.waits.map(lambda act: (*act, "cancelled before"))
        end = data.draw(st.none() | self.waits | self.waits | late | st.just(("end",)), label="and then")
        self.kernel.wake(actor.task, (acts, end))
        self.expect(actor, acts, end)
        self.check()

    def expect_cancel(self, actor: Actor) -> None:
        if not actor.idle:
            self.model.cancel(actor.number)

    def expect(self, actor: Actor, acts: list[Act], end: Act | None) -> None:
        for act in acts:
            if act[0] == "cancel":
                self.expect_cancel(self.actors[act[1]])
                result = "None"
            else:
                result = self.ask(actor, act) or "None"
            self.expected.append((actor.number, act, result))
        if end == ("end",):
            self.model.end(actor.number)
            self.actors[self.actors.index(actor)] = self._new_actor()
        elif end is not None:
            late = end[-1] == "cancelled before"
            outcome = self.ask(actor, ("cancelled_before", end) if late else end)
            if outcome is None:
                actor.idle = False
            else:
                self.expected.append((actor.number, outcome))

    def ask(self, actor: Actor, act: Act) -> str | None:
        name, *arguments = act
        try:
            outcome: str | None = getattr(self.model, name)(actor.number, *arguments)
        except Refused as refused:
            return str(refused)
        return outcome

    def check(self) -> None:
        self._settle()
        model = self.model
        while model.ready:
            number, run = model.ready.pop(0)
            try:
                outcome = run()
            except Refused as refused:
                outcome = str(refused)
            if outcome == WAITS:
                continue
            self.expected.append((number, outcome))
            for actor in self.actors:
                if actor.number == number:
                    actor.idle = True
        assert self.log == self.expected
        assert self.state() == model.state()
        for actor in self.actors:
            assert (actor.task.trap is actor.mailbox) == actor.idle
        if self.spent():
            self.renew_quietly()

    def renew_quietly(self) -> None:
        """Nobody is left waiting on the old one: send them away first."""
        for actor in self.actors:
            if not actor.idle:
                actor.scope.cancel()
                self.expect_cancel(actor)
        self._settle()
        self.log, self.expected = [], []
        for actor in self.actors:
            actor.idle = True
        self.renew()

    def teardown(self) -> None:
        try:
            self.nursery.cancel_scope.cancel()
            self.kernel.drive()
        finally:
            outcome = self.kernel.finish()
            self.kernel.close()
        assert outcome is not None


def number(value: Any) -> Any:
    """A task's or borrower's number in the model."""
    return int(value.name) if isinstance(value, Task) else value


class EventMachine(Machine):
    acts = st.just(("set",))
    waits = st.just(("wait",))

    def renew(self) -> None:
        self.thing, self.model = Event(), EventModel()
        self.age = 0

    def spent(self) -> bool:
        self.age += self.thing.is_set()
        return self.age > 2

    def state(self) -> object:
        return self.thing.is_set(), self.thing.statistics().tasks_waiting


class LockMachine(Machine):
    acts = st.sampled_from([("release",), ("release",), ("acquire_nowait",)])
    waits = st.just(("acquire",))

    def renew(self) -> None:
        self.thing, self.model = Lock(), LockModel()

    def spent(self) -> bool:
        dead: bool = self.model.dead
        return dead

    def state(self) -> object:
        told = self.thing.statistics()
        assert told.locked == (told.owner is not None)
        assert len(self.thing._row) - self.thing._gone == told.tasks_waiting
        assert not told.tasks_waiting or told.owner in self.thing._watched or self.model.dead
        return number(told.owner), told.tasks_waiting


class SemaphoreMachine(Machine):
    acts = st.sampled_from([("release",), ("release",), ("acquire_nowait",)])
    waits = st.just(("acquire",))

    def renew(self) -> None:
        self.thing, self.model = Semaphore(1, max_value=2), SemaphoreModel(1, 2)

    def state(self) -> object:
        return self.thing.value, self.thing.statistics().tasks_waiting


_others = st.integers(100, 102)


class LimiterMachine(Machine):
    acts = (
        st.sampled_from([("release",), ("acquire_nowait",)])
        | st.tuples(st.sampled_from(["acquire_on_behalf_of_nowait", "release_on_behalf_of"]), _others)
        | st.tuples(st.just("set_total"), st.integers(0, 4))
    )
    waits = st.just(("acquire",)) | st.tuples(st.just("acquire_on_behalf_of"), _others)

    def renew(self) -> None:
        self.thing, self.model = CapacityLimiter(1), LimiterModel(1)

    def call(self, act: Act) -> Any:
        if act[0] == "set_total":
            self.thing.total_tokens = act[1]
            return None
        return super().call(act)

    def state(self) -> object:
        told = self.thing.statistics()
        assert told.borrowed_tokens == len(told.borrowers) == told.total_tokens - self.thing.available_tokens
        assert self.thing._hoping == set(self.thing._row.values())
        return told.total_tokens, [number(borrower) for borrower in told.borrowers], told.tasks_waiting

    def spent(self) -> bool:  # those who have ended keep their tokens
        return sum(borrower < 100 for borrower in self.model.borrowers) > 2


class ConditionMachine(Machine):
    acts = st.sampled_from([("release",), ("acquire_nowait",), ("notify", 1), ("notify", 2), ("notify", 1)])
    waits = st.sampled_from([("acquire",), ("wait",), ("wait",)])

    def renew(self) -> None:
        self.thing, self.model = Condition(), ConditionModel()

    def spent(self) -> bool:
        dead: bool = self.model.dead
        return dead

    def state(self) -> object:
        told = self.thing.statistics()
        return number(told.lock_statistics.owner), told.lock_statistics.tasks_waiting, told.tasks_waiting


class BarrierMachine(Machine):
    acts = st.sampled_from([("abort",), ("reset",), ("reset",)])
    waits = st.just(("wait",))

    def renew(self) -> None:
        self.thing, self.model = Barrier(3), BarrierModel(3)

    def state(self) -> object:
        told = self.thing.statistics()
        return told.broken, told.tasks_waiting


_settings = settings(max_examples=1000 if LONG else 20, stateful_step_count=40, deadline=None, derandomize=not LONG)

TestEvent = EventMachine.TestCase
TestLock = LockMachine.TestCase
TestSemaphore = SemaphoreMachine.TestCase
TestLimiter = LimiterMachine.TestCase
TestCondition = ConditionMachine.TestCase
TestBarrier = BarrierMachine.TestCase
for _case in (TestEvent, TestLock, TestSemaphore, TestLimiter, TestCondition, TestBarrier):
    _case.settings = _settings
del _case


# ---- conservation ---------------------------------------------------------------------------------------


class Mill:
    """A crowd that uses everything at random and is cancelled at random; and the books."""

    def __init__(self, operations: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.left = operations
        self.counts: Counter[str] = Counter()
        self.scopes: list[CancelScope] = []
        self.lock, self.inside = Lock(), 0
        self.semaphore, self.permits = Semaphore(3, max_value=3), 0
        self.limiter, self.tokens = CapacityLimiter(3), 0
        self.condition, self.store = Condition(), 0
        self.barrier, self.passed = Barrier(3), Counter[int]()

    async def pause(self) -> None:
        for _ in range(self.random.choice((0, 0, 1, 2))):
            await checkpoint()

    async def use_lock(self) -> None:
        async with self.lock:
            self.inside += 1
            assert self.inside == 1
            try:
                await self.pause()
            finally:
                self.inside -= 1

    async def use_semaphore(self) -> None:
        async with self.semaphore:
            self.permits += 1
            assert self.permits + self.semaphore.value <= 3
            try:
                await self.pause()
            finally:
                self.permits -= 1

    async def use_limiter(self) -> None:
        async with self.limiter:
            self.tokens += 1
            assert self.tokens <= self.limiter.borrowed_tokens
            try:
                await self.pause()
            finally:
                self.tokens -= 1

    async def put(self) -> None:
        async with self.condition:
            await self.pause()
            self.store += 1
            self.counts["stored"] += 1
            self.condition.notify()

    async def get(self) -> None:
        async with self.condition:
            while not self.store:
                await self.condition.wait()
            self.store -= 1
            self.counts["taken"] += 1

    async def meet(self) -> None:
        index = await self.barrier.wait()
        self.passed[index] += 1

    async def cancel(self) -> None:
        self.random.choice(self.scopes).cancel()

    async def shrink_or_grow(self) -> None:
        self.limiter.total_tokens = self.random.randrange(1, 5)

    async def actor(self, me: int) -> None:
        uses = (self.use_lock, self.use_semaphore, self.use_limiter, self.shrink_or_grow)
        deeds = (*uses, self.put, self.get, self.meet, self.cancel, self.cancel)
        while self.left > 0:
            self.left -= 1
            with CancelScope() as self.scopes[me]:
                deed = self.random.choice(deeds)
                self.counts[deed.__name__] += 1
                await deed()
            self.counts["cancelled"] += self.scopes[me].cancelled_caught
            await checkpoint()

    async def season(self) -> None:
        async with open_nursery() as nursery:
            for me in range(20):
                self.scopes.append(CancelScope())
                nursery.start_soon(self.actor, me)
            while nursery.child_tasks:
                await wait_all_tasks_blocked()
                self.audit()
                for scope in self.scopes:
                    scope.cancel()
        self.scopes.clear()

    def audit(self) -> None:
        """All sleep: those who hold something sleep with it, and nobody sleeps for what is there."""
        assert self.counts["stored"] == self.counts["taken"] + self.store
        assert not (self.store and self.condition.statistics().tasks_waiting), "a notification was lost"
        assert self.inside == self.permits == self.tokens == 0  # nobody waits inside
        assert not self.lock.locked()
        assert not self.condition.locked()
        assert self.semaphore.value == 3
        assert self.limiter.borrowed_tokens == 0
        for thing in (self.lock, self.semaphore, self.limiter):
            assert thing.statistics().tasks_waiting == 0
        assert len({self.passed[index] for index in range(3)}) == 1
        assert self.barrier.n_waiting < 3

    async def main(self) -> None:
        total = self.left
        while total > 0:
            self.left = min(20_000, total)
            total -= self.left
            await self.season()
        assert self.barrier.n_waiting == 0
        assert self.condition.statistics().tasks_waiting == 0


@pytest.mark.parametrize("seed", range(8 if LONG else 1))
def test_permits_tokens_locks_and_notifications_are_conserved_under_random_cancellation(seed: int) -> None:
    operations = 250_000 if LONG else 40_000
    mill = Mill(operations, seed)
    kernel.run(mill.main)
    done = sum(n for what, n in mill.counts.items() if what not in ("cancelled", "stored", "taken"))
    assert done >= operations
    for what in ("cancelled", "stored", "taken", "use_lock", "use_semaphore", "use_limiter", "meet"):
        assert mill.counts[what] > operations / 100, mill.counts
    assert mill.passed[0] > operations / 100
