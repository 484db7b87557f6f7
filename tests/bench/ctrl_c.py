"""Ctrl-C at random moments: thousands of short runs, each struck by real SIGINTs from another process.

    .venv/bin/python tests/bench/ctrl_c.py --runs 20000

Three processes. This one starts a *target*, which runs one small random program after the other: nurseries, scopes,
timeouts, locks, channels, sockets, system tasks, calls from a thread that never stops calling. The target has a
*sender* beside it, and asks it before each run for one to three signals, so and so many microseconds from now. So they
come at any instruction, the ones before the first and after the last line of `kernel.run` included.

After each run the target looks at what has come out, and at what is left:

* each run ends with KeyboardInterrupt if a signal came while it went on, unless its program has caught that; if the
  signal came too early or too late, the code around `kernel.run` gets it; none is lost;
* the exception was never raised in a line of the kernel's, nor in a `__del__`, a system task, or a function marked
  `enable_ki_protection`; with `restrict_keyboard_interrupt_to_checkpoints`, only where a task yields;
* no task is unfinished, no lock taken, no lot or channel has a waiter; signal handler, wake-up fd, descriptors and the
  hooks for async generators are as before; the kernel's books (tests/invariants.py) were right before each step.

A run that has got three signals may have been broken off, and leaves tasks behind; of it, the rest is asked.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import linecache
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import kernel
from kernel.core.task import Task, here
from kernel.lowlevel import (
    KernelToken,
    ParkingLot,
    checkpoint,
    current_kernel_token,
    enable_ki_protection,
    spawn_system_task,
    wait_readable,
    wait_writable,
)

PACKAGE = str(Path(kernel.__file__).parent) + os.sep
TESTS = Path(__file__).parent.parent
STEP = 1e-4
"""Seconds: the programs' unit of time."""


# ---- the sender ---------------------------------------------------------------------------------------


def send(target: int) -> None:
    """Read "100 250\\n", send signals after 100 and 250 microseconds, answer with a byte; and again, until the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for order in sys.stdin:
        start = time.perf_counter()
        for microseconds in order.split():
            while time.perf_counter() - start < int(microseconds) / 1e6:
                pass
            os.kill(target, signal.SIGINT)
        os.write(1, b".")


# ---- the programs -------------------------------------------------------------------------------------


class Trouble:
    """Has a finalizer, in which a KeyboardInterrupt would be lost."""

    @enable_ki_protection
    def __init__(self, program: Program) -> None:
        self.program = program

    def __del__(self) -> None:
        with self.program.no_interrupt("a __del__"):
            spin(20)


class _NoInterrupt:
    def __init__(self, program: Program, where: str) -> None:
        self.program = program
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        if isinstance(exc, KeyboardInterrupt):
            self.program.wrong.append(f"Ctrl-C has struck in {self.where}")


def spin(times: int) -> int:
    total = 0
    for number in range(times):
        total += number
    return total


class Program:
    """One random program. What may not be torn in two is counted before and after."""

    def __init__(self, seed: int, token: list[KernelToken | None]) -> None:
        self.random = random.Random(seed)
        self.token = token
        self.wrong: list[str] = []
        self.caught = 0
        self.endless = self.random.random() < 0.5
        self.before = self.after = 0
        self.lot = ParkingLot()
        self.lock = kernel.Lock()
        self.actions: list[Callable[[int], Any]] = [
            self.turns, self.nap, self.timeout, self.shielded, self.family, self.family, self.park, self.locked,
            self.channel, self.sockets, self.system, self.compute, self.finalizer, self.protected, self.generators,
            self.handles, self.stream,
        ]  # fmt: skip

    def no_interrupt(self, where: str) -> _NoInterrupt:
        return _NoInterrupt(self, where)

    async def main(self) -> None:
        gc.enable()
        if self.random.random() < 0.5:
            self.token[0] = current_kernel_token()  # from now on, the thread calls
        catching = self.random.random() < 0.2
        try:
            with kernel.CancelScope(shield=self.random.random() < 0.2):
                async with kernel.open_nursery() as nursery:
                    if self.random.random() < 0.7:
                        nursery.start_soon(self.busy)
                    await self.work(2)
                    nursery.cancel_scope.cancel()
        except (KeyboardInterrupt, BaseExceptionGroup) as error:
            wrapped = isinstance(error, BaseExceptionGroup) and not error.subgroup(KeyboardInterrupt)
            if wrapped or not catching:
                raise
            self.caught += 1
            with kernel.CancelScope(shield=True):
                await kernel.sleep(STEP / 2)
        finally:
            gc.disable()  # a finalizer outside of the run would be struck by Python's own handler

    async def work(self, depth: int) -> None:
        for _ in range(self.random.randint(1, 5)):
            await self.action(depth)
        while self.endless and depth == 2:
            await self.action(depth)

    async def busy(self) -> None:
        """Keeps the kernel from sleeping, so that signals come while something runs."""
        while True:
            await checkpoint()
            spin(20)

    async def action(self, depth: int) -> None:
        await self.random.choice(self.actions)(depth)

    async def turns(self, depth: int) -> None:
        for _ in range(self.random.randint(0, 10)):
            await checkpoint()

    async def nap(self, depth: int) -> None:
        await kernel.sleep(STEP * self.random.random())

    async def timeout(self, depth: int) -> None:
        with kernel.move_on_after(STEP * self.random.random()):
            await self.action(depth)

    async def shielded(self, depth: int) -> None:
        with kernel.move_on_after(STEP * self.random.random(), shield=True):
            await kernel.sleep(STEP)

    async def family(self, depth: int) -> None:
        if depth == 0:
            await checkpoint()
            return
        async with kernel.open_nursery() as nursery:
            for _ in range(self.random.randint(1, 4)):
                nursery.start_soon(self.work, depth - 1)
            if self.random.random() < 0.3:
                await self.action(depth - 1)
            if self.random.random() < 0.2:
                nursery.cancel_scope.cancel()

    async def park(self, depth: int) -> None:
        if self.random.random() < 0.5:
            self.lot.unpark_all()
        with kernel.move_on_after(STEP):
            await self.lot.park()

    async def locked(self, depth: int) -> None:
        async with self.lock:
            await self.turns(depth)

    async def channel(self, depth: int) -> None:
        send_channel, receive_channel = kernel.open_memory_channel[int](self.random.choice((0, 1, 3)))

        async def produce() -> None:
            async with send_channel:
                for number in range(5):
                    await send_channel.send(number)

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(produce)
            async with receive_channel:
                async for _ in receive_channel:
                    pass

    async def sockets(self, depth: int) -> None:
        with SocketPair() as (left, right):

            async def echo() -> None:
                for _ in range(2):
                    await wait_readable(right)
                    data = right.recv(100)
                    await wait_writable(right)
                    right.send(data)

            async with kernel.open_nursery() as nursery:
                nursery.start_soon(echo)
                for _ in range(2):
                    left.send(b"hello")
                    await wait_readable(left)
                    left.recv(100)

    async def system(self, depth: int) -> None:
        async def serve() -> None:
            with self.no_interrupt("a system task"):
                async with kernel.open_nursery() as nursery:
                    nursery.start_soon(self.nap, 0)
                    spin(50)
                    await kernel.sleep(STEP)

        spawn_system_task(serve)

    async def compute(self, depth: int) -> None:
        """In the standard library, in callbacks called by C, deep in the stack."""

        def dive(levels: int) -> str:
            if levels:
                return dive(levels - 1)
            return json.dumps({"numbers": sorted(range(30), key=lambda number: -number)}, indent=1)

        dive(self.random.randint(0, 60))

    async def finalizer(self, depth: int) -> None:
        trouble = Trouble(self)
        if self.random.random() < 0.5:
            await checkpoint()
        del trouble
        spin(50)

    @enable_ki_protection
    async def protected(self, depth: int) -> None:
        """One more before, one more after, and nothing can come in between. It has no checkpoint."""
        self.before += 1
        spin(self.random.randint(0, 100))
        sorted(range(20), key=lambda number: -number)
        self.after += 1

    async def generators(self, depth: int) -> None:
        def child() -> Generator[Any, Any, None]:
            for _ in range(3):
                yield from checkpoint()

        def body(nursery: kernel.Nursery) -> Generator[Any, Any, None]:
            nursery.start_soon(child)
            spin(50)
            yield from child()

        def parent() -> Generator[Any, Any, None]:
            yield from kernel.within(kernel.open_nursery(), body)

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(parent)

    async def handles(self, depth: int) -> None:
        async def child() -> int:
            await checkpoint()
            return spin(50)

        await kernel.gather(child, child)
        await kernel.race(child, kernel.sleep_forever)
        async with kernel.open_nursery() as nursery:
            await nursery.spawn(child)

    async def stream(self, depth: int) -> None:
        async def numbers() -> Any:
            for number in range(5):
                await checkpoint()
                yield number

        async for number in numbers():
            if number == 3:
                break

    def state(self) -> list[str]:
        """What is wrong with what the program has left."""
        if self.before != self.after:
            self.wrong.append("Ctrl-C has struck in a protected function")
        if self.lot or self.lock.locked() or self.lock.statistics().tasks_waiting:
            self.wrong.append(f"left behind: {self.lot}, {self.lock}")
        return self.wrong


class SocketPair:
    """Opening and closing in one piece each, so that a descriptor that is left behind is the kernel's fault."""

    @enable_ki_protection
    def __enter__(self) -> tuple[socket.socket, socket.socket]:
        self.pair = socket.socketpair()
        for sock in self.pair:
            sock.setblocking(False)
        return self.pair

    @enable_ki_protection
    def __exit__(self, *exc_info: object) -> None:
        for sock in self.pair:
            sock.close()


# ---- the target ---------------------------------------------------------------------------------------


class Recorded(deque[Task]):
    """A ready queue that remembers the tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: set[Task] = set()

    def append(self, task: Task, /) -> None:
        self.tasks.add(task)
        super().append(task)


class Target:
    """Makes the runs, with a sender beside it, and checks."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.sender = subprocess.Popen(
            [sys.executable, __file__, "--sender", str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.tolerant = False
        self.started = time.monotonic()
        self.token: list[KernelToken | None] = [None]
        self.thread = threading.Thread(target=self.call, daemon=True)
        self.thread.start()
        self.kept = new_kernel()
        sys.unraisablehook = self.unraisable
        self.lowest_free_fd = free_fd()

    def call(self) -> None:
        """In the thread: call whoever runs; and if that one does not end, say so."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # or one might come late
        while True:
            token = self.token[0]
            if token is not None:
                with suppress(kernel.RunFinishedError):
                    token.run_sync_soon(spin, 5)
            time.sleep(STEP / 2)
            if time.monotonic() - self.started > 20:
                print("\n".join(["a run does not end", *self.wrong]), file=sys.stderr)
                for running in gc.get_objects():
                    if isinstance(running, kernel.Kernel) and running.running:
                        print(vars(running.interrupts), kernel.lowlevel.format_task_tree(running), file=sys.stderr)
                faulthandler.dump_traceback()
                os._exit(1)

    def unraisable(self, info: Any) -> None:
        if not self.tolerant:
            stack = "".join(traceback.format_stack())
            self.wrong.append(f"printed and lost: {info.exc_value!r}, {info.object!r}, at\n{stack}")

    def run(self, number: int) -> None:
        """One run and its signals, and a look at what is left of it."""
        self.started = time.monotonic()
        signals = self.run_and_check(number)
        if signals < 3:
            if self.kept._closed:
                self.wrong.append(f"run {number}: broken off")
        else:  # it may have been broken off, and then it is garbage that grumbles when it is collected
            if self.kept._closed:
                self.counts["broken off"] += 1
                with suppress(Exception):
                    self.kept.close()
                self.kept = new_kernel()
            self.tolerant = True
            gc.collect()
            self.tolerant = False
            self.lowest_free_fd = free_fd()

    def run_and_check(self, number: int) -> int:
        from invariants import CheckedReadyQueue

        chance = random.Random(self.seed * 1_000_000_007 + number)
        program = Program(chance.randrange(1 << 60), self.token)
        signals = chance.choices((1, 2, 3), (80, 15, 5))[0]
        when = sorted(chance.choice((50, 300, 1500)) * chance.random() for _ in range(signals))
        restricted = chance.random() < 0.15
        queue = chance.choices((None, Recorded(), CheckedReadyQueue()), (50, 40, 10))[0]
        wait = chance.choice((0, 0, 100)) * 1e-6 * chance.random()
        keep = queue is None and not restricted and chance.random() < 0.3
        ended: list[str] = []

        def shoot() -> None:
            assert self.sender.stdin is not None
            os.write(self.sender.stdin.fileno(), (" ".join(str(int(moment)) for moment in when) + "\n").encode())
            begin = time.perf_counter()
            while time.perf_counter() - begin < wait:
                pass
            if keep:
                self.kept.run(program.main)
            else:
                kernel.run(program.main, ready=queue, restrict_keyboard_interrupt_to_checkpoints=restricted)
            ended.append("well")

        heard: list[BaseException] = []

        def only_note() -> None:
            signal.signal(signal.SIGINT, lambda *_: heard.append(KeyboardInterrupt("late")))

        guarded(5, shoot, only_note, heard)
        assert self.sender.stdout is not None
        os.read(self.sender.stdout.fileno(), 1)
        gc.collect(0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.token[0] = None

        interrupts = [error for error in heard if isinstance(error, KeyboardInterrupt)]
        found = [f"the run has ended with {error!r}" for error in heard if not isinstance(error, KeyboardInterrupt)]
        if not 1 <= len(interrupts) + program.caught <= signals:
            found.append(f"{signals} signals, {program.caught} caught, {len(interrupts)} came out")
        for error in interrupts:
            found += self.place(error, restricted, 0)
        found += self.left_behind(queue, program, signals)
        if found or program.wrong:
            text = "".join("".join(traceback.format_exception(error)) for error in heard)
            self.wrong += [f"run {number}, {signals} signals: {what}\n{text}" for what in (*found, *program.wrong)]
        self.counts["runs"] += 1
        self.counts["ended well"] += len(ended)
        self.counts["caught"] += program.caught
        return signals

    def place(self, error: BaseException, restricted: bool, level: int) -> list[str]:
        """Where it was raised; empty if that is in order."""
        if isinstance(error, BaseExceptionGroup):
            return [text for inner in error.exceptions for text in self.place(inner, restricted, level + 1)]
        if not isinstance(error, KeyboardInterrupt):
            return [] if level else [f"came together with {error!r}"]
        found = [] if error.__cause__ is None else self.place(error.__cause__, restricted, level + 1)
        frames = list(traceback.walk_tb(error.__traceback__))
        if not frames:
            self.counts["late" if error.args else "in a nursery's end"] += 1
            return found
        ours = [frame.f_code.co_filename.startswith(PACKAGE) for frame, _ in frames]
        (frame, line), name = frames[-1], frames[-1][0].f_code.co_name
        if ours[-1] and frame.f_code.co_filename.endswith("interrupts.py") and name == "_handle":
            self.counts["in the program"] += 1
            if ours[-2] or restricted:
                found.append(f"raised in {frames[-2][0].f_code}")
        elif ours[-1] and name == "_deliver":
            self.counts["in the loop"] += 1
        elif ours[-1] and "yield" in linecache.getline(frame.f_code.co_filename, line):
            self.counts["at a checkpoint"] += 1
        elif name == "__exit__" and frame.f_code.co_filename.endswith("interrupts.py"):
            self.counts["at the end of the run"] += 1
        elif ours[-1] and name not in ("run", "__enter__", "__init__", "restore", "_in_main_thread", "_is_default"):
            found.append(f"raised in {frame.f_code}, line {line}")
        elif any(frame.f_code.co_name == "_run" for frame, _ in frames):
            found.append(f"raised without our handler, in {frame.f_code}, line {line}")
        else:
            self.counts["before or after the run"] += 1
        return found

    def left_behind(self, queue: Any, program: Program, signals: int) -> list[str]:
        found = []
        if here.kernel is not None:
            found.append("a kernel is still running")
            here.kernel = None
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            found.append(f"the handler is {signal.getsignal(signal.SIGINT)}")
        if (fd := signal.set_wakeup_fd(-1)) != -1:
            found.append(f"the wakeup fd is {fd}")
        if sys.get_asyncgen_hooks() != (None, None):
            found.append("the hooks for async generators are left")
        if signals < 3:
            program.state()
            if isinstance(queue, Recorded) and (unfinished := [task for task in queue.tasks if task.outcome is None]):
                found.append(f"unfinished: {unfinished}")
            elif getattr(queue, "kernel", None) is not None:
                try:
                    queue.finish()
                except AssertionError as error:
                    found.append(str(error))
        if not self.kept._closed and free_fd() != self.lowest_free_fd:
            found.append(f"the lowest free fd was {self.lowest_free_fd}, and is {free_fd()}")
            self.lowest_free_fd = free_fd()
        return found


def guarded(levels: int, function: Callable[[], None], then: Callable[[], None], heard: list[BaseException]) -> None:
    """Call `function`, note what it raises, call `then`. What a Ctrl-C raises meanwhile, the next level notes."""
    try:
        if levels:
            guarded(levels - 1, function, then, heard)
        else:
            function()
    except BaseException as error:
        heard.append(error)
    then()


def new_kernel() -> kernel.Kernel:
    """One that has opened all descriptors that it keeps."""
    fresh = kernel.Kernel()
    fresh.run(checkpoint)
    return fresh


def free_fd() -> int:
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    return fd


def target(runs: int, seed: int) -> None:
    sys.setswitchinterval(1e-4)
    warnings.filterwarnings("ignore", "async generator", ResourceWarning)
    this = Target(seed)
    for number in range(runs):
        this.run(number)
        if len(this.wrong) > 10:
            break
    this.kept.close()
    this.sender.stdin.close()  # type: ignore[union-attr]
    this.sender.wait()
    print(json.dumps({"counts": this.counts, "wrong": this.wrong}))


# ---- from outside -------------------------------------------------------------------------------------


def strike(runs: int, seed: int, timeout: float) -> tuple[Counter[str], list[str]]:
    """Start a target; return what happened how often, and what was wrong."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", __file__, "--target", "--runs", str(runs), "--seed", str(seed)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
    )
    if finished.returncode != 0:
        return Counter(), [f"the target has ended with {finished.returncode}:\n{finished.stdout}\n{finished.stderr}"]
    report = json.loads(finished.stdout)
    wrong = report["wrong"]
    if finished.stderr:
        wrong.append(f"stderr: {finished.stderr}")
    return Counter(report["counts"]), wrong


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sender", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sender is not None:
        send(options.sender)
    elif options.target:
        target(options.runs, options.seed)
    else:
        total: Counter[str] = Counter()
        for start in range(0, options.runs, 2000):
            counts, wrong = strike(min(2000, options.runs - start), options.seed + start, 600)
            total += counts
            print(dict(total), flush=True)
            if wrong:
                print("\n".join(wrong))
                return 1
        print(f"{total['runs']} runs, and nothing was lost, torn or left behind")
    return 0


if __name__ == "__main__":
    sys.exit(main())
