"""A soak: millions of random operations, after which the books must balance: `python tests/bench/soak.py`.

Tasks spawn tasks, open nurseries and scopes with deadlines and shields, cancel each other's scopes and change them,
sleep, park, let others go, fail, and send bytes through socket pairs while all of that happens to them. The run is a
series of *seasons*: a nursery with a deadline, in which a crowd does as it likes. When a season is over, nothing of it
may be left:

    tasks       every one that was started has ended, inside the block of its nursery
    bytes       all that was sent arrived, in order, or still lay in the socket of a receiver that was cancelled
    errors      every one that was raised arrived in an ExceptionGroup, once
    timers      none; waits for files: none; tasks parked: none; scopes and nurseries open: none

And now and then in mid-season, the kernel's books must agree with the tasks': as many timers as there are sleepers and
scopes with a deadline to come, as many waits for files as there are tasks that wait for one.

Time is virtual and jumps when there is nothing to do, so that the same seed gives the same run, to the last step: the
report has a digest of all that happened. With `--real`, time is real and a thousand times as fast.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import gc
import os
import random
import socket
import sys
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from math import inf
from types import TracebackType

import kernel
from kernel import CancelScope, ClosedResourceError, Nursery, move_on_after, open_nursery, sleep
from kernel.lowlevel import (
    ParkingLot,
    SleepUntil,
    Task,
    WaitReadable,
    WaitWritable,
    checkpoint,
    current_kernel,
    current_task,
    notify_closing,
    wait_readable,
    wait_writable,
)
from kernel.testing import MockClock, wait_all_tasks_blocked
from kernel.threads import cache

SEASON = 20_000
"""Operations of a season."""

CROWD = 300
"""Tasks alive at once, about."""

PAIRS = 60
"""Conversations at once, two sockets each."""

DEPTH = 5
"""Blocks within blocks in one task."""

PATTERN = bytes(range(251)) * 600
"""What is said in a conversation: a prime period, so that a lost or doubled buffer shows."""

SIZES = (1, 100, 5_000, 100_000)
"""Bytes of a message."""

STUCK = 10.0
"""Real seconds of silence with no timer set after which the season is stuck."""


class Boom(Exception):
    """An error that a task raises on purpose."""


class SoakError(AssertionError):
    """The books do not balance."""


@dataclass
class Report:
    """What a soak did: `counts` by kind, `digest` of the whole course of it, and what it cost."""

    operations: int = 0
    seconds: float = 0.0
    digest: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    memory_after_warm_up: int = 0
    memory_high: int = 0

    def lines(self) -> Iterator[str]:
        yield f"{self.operations} operations in {self.seconds:.0f} s, {self.operations / self.seconds:.0f} per second"
        yield f"digest {self.digest:08x}"
        yield ", ".join(f"{what}: {number}" for what, number in sorted(self.counts.items()))
        if self.memory_high:
            yield f"memory: {self.memory_after_warm_up >> 10} KiB after warm-up, {self.memory_high >> 10} KiB at most"


class Soak:
    """One soak. `counts` is the ledger; what is alive now is in `scopes`, `nurseries`, `tasks` and `pairs`."""

    def __init__(self, operations: int, seed: int, scale: float = 1.0) -> None:
        self.operations = operations
        self.random = random.Random(seed)
        self.scale = scale  # seconds on the clock per second here
        self.report = Report()
        self.counts = self.report.counts
        self.season_ends = 0
        # Dicts, as their order is that of insertion: a set's would depend on addresses.
        self.scopes: dict[CancelScope, None] = {}
        self.nurseries: dict[Nursery, bool] = {}  # whether its body still runs
        self.tasks: dict[Task, None] = {}
        self.guards: dict[CancelScope, None] = {}  # those that nobody plays with
        self.host: Task | None = None
        self.host_scope: CancelScope | None = None
        self.host_nursery: Nursery | None = None
        self.lot = ParkingLot("the soak")
        self.pairs = 0
        self.actions: tuple[Callable[[int], Awaitable[None]], ...] = ()
        self.weights: tuple[int, ...] = ()
        weighted: dict[Callable[[int], Awaitable[None]], int] = {
            self.yield_once: 20,
            self.doze: 20,
            self.spawn: 12,
            self.cancel_some_scope: 3,
            self.change_some_scope: 6,
            self.in_a_scope: 14,
            self.in_a_nursery: 5,
            self.start_and_wait: 2,
            self.converse: 3,
            self.park: 3,
            self.let_some_go: 4,
            self.fail: 1,
        }
        self.actions, self.weights = tuple(weighted), tuple(weighted.values())

    # ---- the frame --------------------------------------------------------------------------------------

    async def main(self, after_season: Callable[[Soak], None] = lambda soak: None) -> None:
        while self.report.operations < self.operations:
            self.season_ends = min(self.report.operations + SEASON, self.operations)
            async with open_nursery() as watch:
                watch.start_soon(self.watch)
                await self.season()
                watch.cancel_scope.cancel()
            self.host = self.host_scope = self.host_nursery = None
            self.balance()
            after_season(self)

    async def season(self) -> None:
        """A crowd in a nursery that closes in the end, whatever they do: nobody plays with its scope."""
        self.host = current_task()
        with move_on_after(1000 * self.scale) as self.host_scope:
            try:
                async with open_nursery() as nursery:
                    self.host_nursery = nursery
                    while self.report.operations < self.season_ends:
                        for _ in range(min(20, CROWD - len(self.tasks))):
                            self.start(nursery)
                        await sleep(self.random.random() * self.scale)
                    if self.random.random() < 0.5:
                        nursery.cancel_scope.cancel("the season is over")
            except* Boom as group:
                self.saw(group)

    async def watch(self) -> None:
        """A kernel with nobody to run and nothing to wait for would be silent for ever. Say what it was about."""
        while True:
            await wait_all_tasks_blocked(STUCK)
            if len(current_kernel().timers) == 0:
                raise SoakError("stuck: " + "; ".join(map(repr, self.tasks)))

    def did(self, what: str) -> None:
        """An operation was done: count it, and set it down in the digest."""
        report = self.report
        report.operations += 1
        self.counts[what] += 1
        report.digest = zlib.crc32(what.encode(), report.digest)
        if report.operations % 1000 == 0:
            self.audit()

    # ---- the tasks --------------------------------------------------------------------------------------

    def start(self, nursery: Nursery) -> None:
        self.did("tasks started")
        nursery.start_soon(self.live, self.random.randrange(DEPTH))

    async def live(self, depth: int, *, task_status: kernel.TaskStatus[int] = kernel.TASK_STATUS_IGNORED) -> None:
        """A task: some actions, one after the other."""
        self.tasks[current_task()] = None  # no local variable: it would tie the task to its own traceback
        try:
            await self.act(depth)
            task_status.started(len(self.tasks))
            await self.act(depth)
        finally:
            self.counts["outlived their nursery"] += not self.at_home(current_task())
            del self.tasks[current_task()]
            self.counts["tasks ended"] += 1

    def at_home(self, task: Task) -> bool:
        """Whether the nursery that `task` runs in still has its block around it. `start` uses a hidden one at first."""
        home = task.parent_nursery
        return task.eventual_parent_nursery is not None or home is self.host_nursery or home in self.nurseries

    async def act(self, depth: int) -> None:
        for action in self.random.choices(self.actions, self.weights, k=self.random.randrange(1, 8)):
            if self.report.operations >= self.season_ends:
                break
            await action(depth)

    def some_scope(self) -> CancelScope | None:
        return self.random.choice(list(self.scopes)) if self.scopes else None

    def some_nursery(self) -> Nursery | None:
        """One that takes children: its body runs, or it waits for some."""
        taking = [nursery for nursery, in_body in self.nurseries.items() if in_body or nursery.child_tasks]
        return self.random.choice(taking) if taking else None

    def some_time(self) -> float:
        """Seconds: often none, seldom long."""
        return self.random.choice((0.0, 0.001, 0.1, 1.0, 10.0)) * self.random.random() * self.scale

    # ---- what a task may do -------------------------------------------------------------------------------

    async def yield_once(self, depth: int) -> None:
        self.did("checkpoints")
        await checkpoint()

    async def doze(self, depth: int) -> None:
        self.did("sleeps")
        await sleep(self.some_time())

    async def spawn(self, depth: int) -> None:
        """Start a task in anybody's nursery."""
        nursery = self.some_nursery()
        if nursery is not None and len(self.tasks) < CROWD:
            self.start(nursery)

    async def cancel_some_scope(self, depth: int) -> None:
        scope = self.some_scope()
        if scope is not None:
            self.did("scopes cancelled")
            scope.cancel()

    async def change_some_scope(self, depth: int) -> None:
        """A shield is never without a deadline: else the season might not end."""
        scope = self.some_scope()
        if scope is None:
            return
        self.did("scopes changed")
        change = self.random.randrange(4)
        if change == 0:
            scope.deadline = kernel.current_time() + self.some_time()
        elif change == 1 and not scope.shield:
            scope.deadline = inf
        elif change == 2:
            scope.deadline = min(scope.deadline, kernel.current_time() + 100 * self.scale)
            scope.shield = True
        else:
            scope.shield = False

    async def in_a_scope(self, depth: int) -> None:
        if not depth:
            return
        self.did("scopes entered")
        kind = self.random.randrange(4)
        scope = CancelScope(relative_deadline=self.some_time(), shield=kind == 1) if kind else CancelScope()
        with Played(self, scope):
            await self.act(depth - 1)

    async def in_a_nursery(self, depth: int) -> None:
        if not depth:
            return
        self.did("nurseries opened")
        nursery = open_nursery()
        self.scopes[nursery.cancel_scope] = None
        try:
            async with nursery:
                self.nurseries[nursery] = True
                try:
                    for _ in range(self.random.randrange(4)):
                        self.start(nursery)
                    await self.act(depth - 1)
                finally:
                    self.nurseries[nursery] = False
        except* Boom as group:
            self.saw(group)
        finally:
            del self.nurseries[nursery], self.scopes[nursery.cancel_scope]

    async def start_and_wait(self, depth: int) -> None:
        nursery = self.some_nursery()
        if nursery is None or len(self.tasks) >= CROWD:
            return
        self.did("tasks started")
        try:
            await nursery.start(self.live, depth)
        except Boom:
            self.counts["errors seen"] += 1
        except RuntimeError as error:
            # The child was cancelled, and a shield went up between it and us before that had got here.
            if "without calling" not in str(error):
                raise
            self.counts["starts undone"] += 1

    async def park(self, depth: int) -> None:
        self.did("parks")
        with Played(self, CancelScope(relative_deadline=10 * self.scale)):
            await self.lot.park()

    async def let_some_go(self, depth: int) -> None:
        self.did("lets go")
        self.counts["tasks let go"] += len(self.lot.unpark(count=self.random.randrange(4)))

    async def fail(self, depth: int) -> None:
        if self.random.random() < 0.3:
            self.did("errors raised")
            raise Boom

    def saw(self, group: BaseExceptionGroup[Boom]) -> None:
        for error in group.exceptions:
            if isinstance(error, BaseExceptionGroup):
                self.saw(error)
            else:
                self.counts["errors seen"] += 1

    # ---- socket traffic -------------------------------------------------------------------------------------

    async def converse(self, depth: int) -> None:
        """One task sends a message to another, sometimes two more the other way, while any of them may be cancelled, or
        a socket be closed under them.
        """
        if self.pairs >= PAIRS:
            return
        self.did("conversations")
        self.pairs += 1
        talks = [Conversation(self, self.random.choice(SIZES))]
        if self.random.random() < 0.3:
            talks.append(Conversation(self, self.random.choice(SIZES), talks[0]))
        try:
            async with open_nursery() as nursery:
                for talk in talks:
                    for half in (talk.send, talk.receive):
                        self.counts["tasks started"] += 1
                        nursery.start_soon(self.converse_half, talk, half)
                if len(talks) == 1 and self.random.random() < 0.1:
                    await checkpoint()
                    talks[0].close_one()
        finally:
            for talk in talks:
                talk.drain()
            for talk in talks:
                talk.settle()
            self.pairs -= 1

    async def converse_half(self, talk: Conversation, half: Callable[[], Awaitable[None]]) -> None:
        self.tasks[current_task()] = None
        try:
            if self.random.random() < 0.3:
                with Played(self, CancelScope(relative_deadline=self.some_time(), shield=self.random.random() < 0.3)):
                    await half()
            else:
                await self.undisturbed(talk, half)
        finally:
            if not (talk.sender_done if half == talk.send else talk.receiver_done):
                talk.cut_short = True
            del self.tasks[current_task()]
            self.counts["tasks ended"] += 1

    async def undisturbed(self, talk: Conversation, half: Callable[[], Awaitable[None]]) -> None:
        """In virtual time the bytes need none. So if time runs out, the other half has left, or a wake-up was lost."""
        virtual = self.scale == 1.0
        with move_on_after(self.random.choice((1e-6, 50.0)) if virtual else 50 * self.scale) as guard:
            self.guards[guard] = None
            try:
                await half()
            finally:
                del self.guards[guard]
        if guard.cancelled_caught and not talk.cut_short and virtual:
            raise SoakError(f"a conversation has stalled after {talk.sent} bytes sent and {talk.received} received")

    # ---- the books --------------------------------------------------------------------------------------------

    def audit(self) -> None:
        """In mid-season: what the drivers hold is what the tasks wait for."""
        self.counts["audits"] += 1
        kernel = current_kernel()
        # Asking whether a scope is cancelled cancels it if its time has come: first ask all of them, then count.
        scopes = [*self.scopes, *self.guards, *([self.host_scope] if self.host_scope is not None else [])]
        uncalled = [scope for scope in scopes if not scope.cancel_called]
        deadlines = sum(scope.deadline < inf and not scope.cancel_called for scope in uncalled)
        traps = [task.trap for task in (*self.tasks, self.host) if task is not None]
        check("timers", len(kernel.timers), deadlines + sum(isinstance(trap, SleepUntil) for trap in traps))
        check("waits", len(kernel.poller), sum(isinstance(trap, WaitReadable | WaitWritable) for trap in traps))
        check("tasks parked", len(self.lot), sum(trap is self.lot for trap in traps))

    def balance(self) -> None:
        """A season is over: nothing is left, and what came in has gone out."""
        kernel, counts = current_kernel(), self.counts
        pairs = {
            "tasks alive": (len(self.tasks), 0),
            "scopes open": (len(self.scopes) + len(self.guards), 0),
            "nurseries open": (len(self.nurseries), 0),
            "tasks parked": (len(self.lot), 0),
            "conversations": (self.pairs, 0),
            "timers": (len(kernel.timers), 0),
            "waits for files": (len(kernel.poller), 0),
            "tasks ready": (len(kernel.ready), 0),
            "tasks that outlived their nursery": (counts["outlived their nursery"], 0),
            "tasks ended": (counts["tasks ended"], counts["tasks started"]),
            "errors seen": (counts["errors seen"], counts["errors raised"]),
            "bytes sent or not": (counts["bytes sent"] + counts["bytes not sent"], counts["bytes wanted"]),
            "bytes received or left": (counts["bytes received"] + counts["bytes left"], counts["bytes sent"]),
        }
        for what, (found, expected) in pairs.items():
            check(what, found, expected)


class Played:
    """`with Played(soak, scope):` enters the scope and lets the others play with it while it lasts."""

    def __init__(self, soak: Soak, scope: CancelScope) -> None:
        self.soak = soak
        self.scope = scope

    def __enter__(self) -> None:
        self.soak.scopes[self.scope] = None
        self.scope.__enter__()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        scope = self.scope
        try:
            return scope.__exit__(exc_type, exc, traceback)
        finally:
            del self.soak.scopes[scope]
            if scope.cancelled_caught:
                self.soak.counts["scopes that caught"] += 1
                if not scope.cancel_called:
                    raise SoakError(f"{scope!r} caught a cancellation that was not its own")


def check(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise SoakError(f"{what}: {found}, and it should be {expected}")


class Conversation:
    """A socket pair and a message of `wanted` bytes: what was sent, what arrived, and who did not finish.

    `back` is the conversation whose sockets this one uses the other way round, so that each has a reader and a writer.
    """

    def __init__(self, soak: Soak, wanted: int, back: Conversation | None = None) -> None:
        self.soak = soak
        self.wanted = wanted
        self.sent = self.received = 0
        self.sender_done = self.receiver_done = False
        self.cut_short = False  # whether one of them has ended before it was done
        self.left = 0
        self.sender, self.receiver = (back.receiver, back.sender) if back is not None else socket.socketpair()
        self.sender.setblocking(False)
        self.receiver.setblocking(False)
        self.sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)  # so that senders have to wait, too

    async def send(self) -> None:
        while self.sent < self.wanted:
            self.soak.did("sends")
            chunk = memoryview(PATTERN)[self.sent : min(self.wanted, self.sent + 20_000)]
            try:
                self.sent += self.sender.send(chunk)
            except BlockingIOError:
                if not await self.wait(wait_writable, self.sender):
                    return
            except OSError as error:
                if error.errno not in (errno.EBADF, errno.EPIPE, errno.ECONNRESET):
                    raise
                return
        # The end comes later now and then, so that the other side waits for it while it waits to write, too.
        for _ in range(self.soak.random.choice((0, 0, 50))):
            await checkpoint()
        if self.sender.fileno() >= 0:
            self.sender.shutdown(socket.SHUT_WR)
        self.sender_done = True

    async def receive(self) -> None:
        while True:
            self.soak.did("receives")
            try:
                data = self.receiver.recv(8192)
            except BlockingIOError:
                if not await self.wait(wait_readable, self.receiver):
                    return
                continue
            except OSError as error:
                if error.errno not in (errno.EBADF, errno.ECONNRESET):
                    raise
                return
            if not data:
                break
            self.took(data)
        self.receiver_done = True

    async def wait(self, wait: Callable[[socket.socket], Awaitable[None]], sock: socket.socket) -> bool:
        """Whether the socket is still there afterwards."""
        try:
            await wait(sock)
        except ClosedResourceError:
            self.soak.counts["closed while waiting"] += 1
            return False
        return True

    def took(self, data: bytes) -> None:
        if data != PATTERN[self.received : self.received + len(data)]:
            raise SoakError(f"what arrived after byte {self.received} is not what was sent")
        self.received += len(data)

    def close_one(self) -> None:
        """Close one end, which somebody may be waiting on. What lies in the receiver's own buffer is read first, to be
        counted: it would be lost with it.
        """
        sock = self.sender if self.soak.random.random() < 0.5 else self.receiver
        if sock.fileno() < 0:
            return
        self.soak.did("sockets closed")
        if sock is self.receiver:
            self.drain()
        notify_closing(sock)
        sock.close()

    def drain(self) -> None:
        """Take out what was sent to a receiver that will not fetch it."""
        if self.receiver.fileno() < 0:
            return
        try:
            while data := self.receiver.recv(65536):
                self.left += len(data)
                if data != PATTERN[self.received + self.left - len(data) : self.received + self.left]:
                    raise SoakError("what was left in the socket is not what was sent")
        except BlockingIOError:
            pass

    def settle(self) -> None:
        """Both halves have ended: close, and enter the bytes into the books.

        Half of the time without a word to the kernel, as nobody waits: the next use of the number must not suffer.
        """
        self.drain()
        for sock in (self.sender, self.receiver):
            if sock.fileno() >= 0:
                if self.soak.random.random() < 0.5:
                    notify_closing(sock)
                sock.close()
        if self.receiver_done and self.left:
            raise SoakError(f"the receiver saw the end, but {self.left} bytes came after it")
        if self.sender_done and self.receiver_done and self.received != self.wanted:
            raise SoakError(f"of {self.wanted} bytes only {self.received} arrived, though nobody was cancelled")
        counts = self.soak.counts
        counts["bytes wanted"] += self.wanted
        counts["bytes sent"] += self.sent
        counts["bytes not sent"] += self.wanted - self.sent
        counts["bytes received"] += self.received
        counts["bytes left"] += self.left


KINDS = (Task, CancelScope, Nursery)
"""What must not be left in memory."""


# ---- a whole soak -----------------------------------------------------------------------------------------------


def soak(
    operations: int, seed: int, *, real: bool = False, after_season: Callable[[Soak], None] = lambda soak: None
) -> Report:
    """Do about so many operations and check the books; returns what was done.

    Raises:
        SoakError: something was lost or left behind.
    """
    gc.collect()
    fds, before = open_files(), {kind: alive(kind) for kind in KINDS}
    this = Soak(operations, seed, 1e-3 if real else 1.0)
    start = time.perf_counter()
    kernel.run(this.main, after_season, clock=None if real else MockClock(autojump_threshold=0))
    this.report.seconds = time.perf_counter() - start
    check("files open", open_files(), fds)
    gc.collect()
    for kind in KINDS:
        check(f"left in memory, {kind.__name__}", alive(kind), before[kind])
    return this.report


def open_files() -> int:
    """Without those of idle worker threads, which come and go by themselves."""
    fds = set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()
    return len(fds - set(map(str, cache._eventfds)))


def alive(kind: type) -> int:
    return sum(isinstance(thing, kind) for thing in gc.get_objects())


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class Watcher:
    """After each season: how far it is, how fast it goes, and whether memory grows."""

    def __init__(self, operations: int, every: float = 5.0) -> None:
        self.warm_up = min(operations // 5, 500_000)
        self.every = every
        self.started = self.told = time.monotonic()

    def __call__(self, soak: Soak) -> None:
        report, now, memory = soak.report, time.monotonic(), resident()
        if report.operations <= self.warm_up or not report.memory_after_warm_up:
            report.memory_after_warm_up = memory
        report.memory_high = max(report.memory_high, memory)
        bound = report.memory_after_warm_up * 5 // 4 + (8 << 20)
        if memory > bound:
            raise SoakError(f"memory has grown to {memory >> 10} KiB; {bound >> 10} KiB was the bound after warm-up")
        if now - self.told >= self.every:
            self.told = now
            speed = report.operations / (now - self.started)
            print(f"{report.operations} operations, {speed:.0f} per second, {memory >> 10} KiB", flush=True)


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--operations", type=int, default=10_000_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", action="store_true", help="real time, a thousand times as fast")
    parser.add_argument("--no-gc", action="store_true", help="no garbage collector: cycles show as growth")
    options = parser.parse_args()
    if options.no_gc:
        gc.disable()
    faulthandler.enable()
    report = soak(options.operations, options.seed, real=options.real, after_season=Watcher(options.operations))
    print("\n".join(report.lines()))
    print("nothing lost, nothing left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
