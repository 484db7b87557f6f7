"""Random programs against the deadlock detector: `python tests/bench/deadlocks.py 1000000 [first seed]`.

Each program is a few tasks that take locks, tokens of a limiter and permits, wait for events and set them, sleep, open
nurseries, cancel and shield one another, and hand the run's token to the world outside, which calls back or loses it.
They have no plan, so they get stuck in every way there is.

Beside each program goes a plain oracle: it writes down who holds what, who waits for what and which scopes were
cancelled, in dicts and flags of its own, and never looks into the kernel. Whenever the loop is about to go to sleep for
ever, the oracle is asked first whether anything can still happen, then the detector. They must agree, both ways: an
alarm when and only when the oracle says that this is a deadlock. The oracle also finds what is neither: a task that
sleeps though it could go on, which is a lost wake-up.

The world outside stands in the poller's place, so nothing here takes real time, and a seed gives the same program and
the same end each time.
"""

from __future__ import annotations

import enum
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from math import inf
from typing import Any

import kernel
from kernel import CancelScope, Deadlock, open_nursery
from kernel.lowlevel import KernelToken, Task, checkpoint, current_kernel_token
from kernel.testing import MockClock

__all__ = ["Outcome", "Wrong", "play"]


class Wrong(Exception):
    """The oracle and the detector disagree, or something was lost."""


class Outcome(enum.Enum):
    FINISHED = "finished"
    DEADLOCK = "reported as deadlocks"
    SILENT = "asleep for ever, and rightly not reported"


class Scope:
    """The oracle's idea of a cancel scope."""

    def __init__(self, outside: Scope | None, *, shield: bool = False, deadline: float = inf) -> None:
        self.outside = outside
        self.shield = shield
        self.deadline = deadline
        self.called = False

    def cancelled(self, now: float) -> bool:
        return (
            self.called
            or self.deadline <= now
            or (self.outside is not None and not self.shield and self.outside.cancelled(now))
        )


class Member:
    """The oracle's idea of a task: what it waits for, as a question whether it could go on."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.waits: Any = None  # a function; None while it does not wait
        self.for_ever = False
        self.can_be_cancelled = True


class Outside:
    """The poller: what happens outside the kernel while it sleeps."""

    def __init__(self, game: Game) -> None:
        self.game = game

    def poll(self, timeout: float) -> Iterable[Task]:
        if timeout > 0:
            self.game.loop_sleeps(timeout)
        return ()

    def wakeup(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __len__(self) -> int:
        return 0


class Game:
    """One program, its oracle and the world outside."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.clock = MockClock(autojump_threshold=0)
        self.kernel = kernel.Kernel(poller=Outside(self), clock=self.clock)  # type: ignore[arg-type]
        self.detector: Any = self.kernel.stuck
        self.kernel.stuck = self.loop_is_stuck
        # The program's things, and beside each what the oracle knows of it.
        choose = self.rng.randint
        self.locks = [kernel.Lock() for _ in range(choose(1, 3))]
        self.holders: list[Member | None] = [None] * len(self.locks)
        self.events = [kernel.Event() for _ in range(choose(1, 2))]
        self.happened = [False] * len(self.events)
        self.permits = choose(0, 1)
        self.semaphore = kernel.Semaphore(self.permits)
        self.tokens = choose(1, 2)
        self.limiter = kernel.CapacityLimiter(self.tokens)
        # The tasks that have not ended, all scopes, and who outside or in a frame holds the run's token.
        self.members: dict[Member, None] = {}
        self.scopes: dict[CancelScope, Scope] = {}
        self.outside: list[KernelToken] = []
        self.in_frames = 0
        self.tasks_left = 6
        self.lone = choose(1, 8) == 1  # whether tasks of this program like to sleep for ever
        self.end: Outcome | None = None
        self.asked = False

    # ---- the oracle -------------------------------------------------------------------------------

    def is_deadlock(self) -> bool:
        """Whether nothing can happen any more. Raises Wrong if something could that the kernel has slept through."""
        now = self.clock.current_time()
        for member in self.members:
            if member.waits is None:
                raise Wrong("a task is ready, and the loop goes to sleep")
            if member.waits():
                raise Wrong("a task has what it waits for, and the loop goes to sleep")
            if member.can_be_cancelled and member.scope.cancelled(now):
                raise Wrong("a task is cancelled and asleep")
        return (
            bool(self.members)
            and not self.outside
            and not self.in_frames
            and not any(member.for_ever for member in self.members)
        )

    def loop_is_stuck(self) -> float:
        """In the place of the loop's hook."""
        if self.end is not None:
            raise Wrong("everything was cancelled, and there are tasks left that wait")
        self.asked = True
        expected = self.is_deadlock()
        timeout: float = self.detector()
        if (timeout == 0) != expected:
            raise Wrong(f"deadlock: the oracle says {expected}, the detector {timeout == 0}")
        if expected:
            self.finish(Outcome.DEADLOCK)
        return timeout

    def finish(self, how: Outcome) -> None:
        self.end = how
        self.kernel.call_soon(self.cancel_all)

    def cancel_all(self) -> None:
        """Let clean-up end, shields or not. If it is a deadlock, it was told to already."""
        assert self.kernel.main_nursery is not None
        if self.end is Outcome.SILENT:
            self.kernel.main_nursery.cancel_scope.cancel()
        for scope in self.scopes:
            scope.cancel()

    def loop_sleeps(self, timeout: float) -> None:
        """The world outside has the word."""
        if not self.asked:
            raise Wrong("the loop goes to sleep and has not asked whether it is a deadlock")
        self.asked = False
        if not self.outside:
            self.finish(Outcome.SILENT)
            return
        token = self.outside.pop(self.rng.randrange(len(self.outside)))
        if self.rng.random() < 0.7:
            token.run_sync_soon(self.set, self.rng.randrange(len(self.events)))

    # ---- the program ------------------------------------------------------------------------------

    async def main(self) -> None:
        await self.live(Scope(None))

    async def live(self, scope: Scope) -> None:
        """A task."""
        member = Member(scope)
        self.members[member] = None
        self.tasks_left -= 1
        try:
            await self.act(member, self.rng.randint(1, 6))
        finally:
            del self.members[member]
            self.let_go(member)

    def let_go(self, member: Member) -> None:
        for number, holder in enumerate(self.holders):
            if holder is member:
                self.holders[number] = None
                self.locks[number].release()

    async def act(self, member: Member, length: int) -> None:
        for _ in range(length):
            if self.end is not None:  # a shield that was cancelled swallows that, and its task would go on
                return
            action = self.rng.choices(ACTIONS, WEIGHTS)[0]
            await action(self, member)

    async def wait(self, member: Member, operation: Any, could: Any) -> None:
        """Do what may wait. `could` tells the oracle whether it has reason to go on."""
        member.waits = could
        try:
            await operation
        finally:
            member.waits = None

    async def lock(self, member: Member) -> None:
        number = self.rng.randrange(len(self.locks))
        if self.holders[number] is member:
            self.holders[number] = None
            self.locks[number].release()
            return
        await self.wait(member, self.locks[number].acquire(), lambda: self.holders[number] is None)
        self.holders[number] = member

    async def borrow(self, member: Member) -> None:
        """A token of the limiter around a few other things."""
        try:
            await self.wait(member, self.limiter.acquire(), lambda: self.tokens > 0)
        except RuntimeError:
            return  # it has one
        self.tokens -= 1
        try:
            await self.act(member, self.rng.randint(1, 3))
        finally:
            self.tokens += 1
            self.limiter.release()

    async def down(self, member: Member) -> None:
        await self.wait(member, self.semaphore.acquire(), lambda: self.permits > 0)
        self.permits -= 1

    async def up(self, member: Member) -> None:
        self.permits += 1
        self.semaphore.release()

    async def expect(self, member: Member) -> None:
        number = self.rng.randrange(len(self.events))
        await self.wait(member, self.events[number].wait(), lambda: self.happened[number])

    async def cause(self, member: Member) -> None:
        self.set(self.rng.randrange(len(self.events)))

    def set(self, number: int) -> None:
        self.happened[number] = True
        self.events[number].set()

    async def pause(self, member: Member) -> None:
        await checkpoint()

    async def sleep(self, member: Member) -> None:
        end = self.clock.current_time() + self.rng.randint(1, 3)
        await self.wait(member, kernel.sleep_until(end), lambda: self.clock.current_time() >= end)

    async def sleep_forever(self, member: Member) -> None:
        if not self.lone:
            return
        member.for_ever = True
        try:
            await self.wait(member, kernel.sleep_forever(), lambda: False)
        finally:
            member.for_ever = False

    async def family(self, member: Member) -> None:
        if self.tasks_left <= 0:
            return
        children: list[int] = []  # one for each that lives
        scope = Scope(member.scope)
        inside = member.scope
        try:
            async with open_nursery() as nursery:
                self.scopes[nursery.cancel_scope] = scope
                member.scope = scope

                async def child() -> None:
                    try:
                        await self.live(scope)
                    finally:
                        children.pop()

                for _ in range(self.rng.randint(1, 3)):
                    children.append(1)
                    nursery.start_soon(child)
                try:
                    await self.act(member, self.rng.randint(0, 3))
                finally:
                    member.waits, member.can_be_cancelled = lambda: not children, False
        finally:
            member.waits, member.can_be_cancelled = None, True
            member.scope = inside
            self.scopes.pop(nursery.cancel_scope, None)

    async def scoped(self, member: Member) -> None:
        """A block with a deadline or without one, shielded or not, which others may cancel."""
        shield, seconds = self.rng.random() < 0.3, self.rng.choice([inf, inf, 2.0])
        inside = member.scope
        with CancelScope(relative_deadline=seconds, shield=shield) as real:
            self.scopes[real] = member.scope = Scope(inside, shield=shield, deadline=real.deadline)
            try:
                await self.act(member, self.rng.randint(1, 3))
            finally:
                member.scope = inside
                del self.scopes[real]

    async def cancel(self, member: Member) -> None:
        if self.scopes:
            real = self.rng.choice(list(self.scopes))
            self.scopes[real].called = True
            real.cancel()

    async def tell_the_world(self, member: Member) -> None:
        self.outside.append(current_kernel_token())

    async def keep_the_token(self, member: Member) -> None:
        token = current_kernel_token()
        self.in_frames += 1
        try:
            await self.act(member, self.rng.randint(1, 2))
        finally:
            self.in_frames -= 1
            del token

    async def ask_for_the_token(self, member: Member) -> None:
        current_kernel_token()


ACTIONS: list[Any] = [
    Game.lock, Game.borrow, Game.down, Game.up, Game.expect, Game.cause, Game.pause, Game.sleep, Game.family,
    Game.scoped, Game.cancel, Game.sleep_forever, Game.tell_the_world, Game.keep_the_token, Game.ask_for_the_token,
]  # fmt: skip
WEIGHTS = [10, 5, 2, 2, 3, 2, 5, 2, 5, 4, 1, 1, 1, 0.3, 1]


def play(seed: int) -> Outcome:
    """Run the program with this number. Returns how it has ended.

    Raises:
        Wrong: the detector was wrong, or the kernel.
    """
    game = Game(seed)
    try:
        with game.kernel, suppress(kernel.Cancelled):
            game.kernel.run(game.main)
        reported = False
    except Deadlock:
        reported = True
    except kernel.KernelInternalError as error:
        raise Wrong(f"program {seed}: {error.__cause__}") from error
    if reported != (game.end is Outcome.DEADLOCK):
        raise Wrong(f"program {seed}: the run should have ended as {game.end}; it has raised Deadlock: {reported}")
    return game.end or Outcome.FINISHED


def main() -> None:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    counts: Counter[Outcome] = Counter()
    start = time.monotonic()
    for seed in range(first, first + number):
        counts[play(seed)] += 1
        if (seed - first + 1) % 10_000 == 0:
            report(counts, time.monotonic() - start)
    report(counts, time.monotonic() - start)


def report(counts: Counter[Outcome], seconds: float) -> None:
    total = sum(counts.values())
    ends = ", ".join(f"{counts[end]:,} {end.value}" for end in Outcome)
    print(f"{total:,} programs in {seconds:.0f} s, no mistake: {ends}", flush=True)


if __name__ == "__main__":
    main()
