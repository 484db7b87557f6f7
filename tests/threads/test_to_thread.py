"""to_thread.run_sync: results, cancellation, limiters, and what happens to threads that are stuck."""

from __future__ import annotations

import contextvars
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kernel
from kernel import CancelScope, CapacityLimiter, from_thread, to_thread
from kernel.drivers.poller import default_poller
from kernel.lowlevel import checkpoint, current_kernel, current_kernel_token, current_task, in_kernel_run
from kernel.testing import wait_all_tasks_blocked
from kernel.threads import cache, calls

ROOT = Path(__file__).parent.parent.parent
LONG = 20 if os.environ.get("KERNEL_TEST_LONG") else 1


@pytest.fixture
def log() -> list[Any]:
    return []


class Gate:
    """A function that blocks its thread: `await gate.entered()` in the kernel, `gate.open()` from anywhere."""

    def __init__(self) -> None:
        self._entered = kernel.Event()
        self._open = threading.Event()
        self.token = current_kernel_token()

    def __call__(self, result: Any = None) -> Any:
        self.token.run_sync_soon(self._entered.set)
        assert self._open.wait(60)
        return result

    async def entered(self) -> None:
        await self._entered.wait()

    def open(self) -> None:
        self._open.set()


async def no_calls() -> None:
    """Wait until no thread works for this run."""
    while calls._state_of(current_kernel()).calls:
        await kernel.sleep(0.001)


# ---- results ------------------------------------------------------------------------------------------


def test_the_function_gets_its_arguments_and_its_result_comes_back() -> None:
    async def main() -> None:
        assert await to_thread.run_sync(divmod, 17, 5) == (3, 2)
        assert await to_thread.run_sync(dict) == {}

    kernel.run(main)


def test_generator_style_works_too() -> None:
    def main() -> Iterator[Any]:
        assert (yield from to_thread.run_sync(divmod, 17, 5)) == (3, 2)

    kernel.run(main)


def test_the_function_runs_in_another_thread_where_no_kernel_runs() -> None:
    async def main() -> None:
        thread, in_run = await to_thread.run_sync(lambda: (threading.current_thread(), in_kernel_run()))
        assert thread is not threading.current_thread()
        assert not in_run

    kernel.run(main)


def test_other_tasks_run_meanwhile() -> None:
    async def main() -> None:
        gate = Gate()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(to_thread.run_sync, gate)
            await gate.entered()
            for _ in range(10):
                await checkpoint()
            gate.open()

    kernel.run(main)


class OfItsOwn(BaseException):
    pass


@pytest.mark.parametrize(
    "kind", [ValueError, OfItsOwn, KeyboardInterrupt, SystemExit, GeneratorExit, StopAsyncIteration, ExceptionGroup]
)
def test_what_the_function_raises_is_raised_in_the_task(kind: type[BaseException]) -> None:
    error = kind("in a thread") if kind is not ExceptionGroup else ExceptionGroup("several", [ValueError()])

    def fail() -> None:
        raise error

    async def main() -> None:
        with pytest.raises(kind) as caught:
            await to_thread.run_sync(fail)
        assert caught.value is error
        assert await to_thread.run_sync(int) == 0  # and the thread goes on

    kernel.run(main)


def test_a_stop_iteration_becomes_a_runtime_error_as_in_any_coroutine() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="StopIteration") as caught:
            await to_thread.run_sync(next, iter(()))
        assert isinstance(caught.value.__cause__, StopIteration)

    kernel.run(main)


def test_the_traceback_shows_the_function_and_not_the_worker() -> None:
    def innermost() -> None:
        raise ValueError

    def outer() -> None:
        innermost()

    async def main() -> None:
        with pytest.raises(ValueError) as caught:
            await to_thread.run_sync(outer)
        names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert names[-2:] == ["outer", "innermost"]
        assert "work" not in names

    kernel.run(main)


@pytest.mark.parametrize("wrong", [None, "print", 7])
def test_what_cannot_be_called_is_refused(wrong: Any) -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match="wants a function and its arguments"):
            await to_thread.run_sync(wrong)

    kernel.run(main)


async def an_async_function() -> None:
    raise AssertionError("unreachable")


@pytest.mark.parametrize("wrong", [an_async_function, lambda: kernel.sleep(1), lambda: checkpoint()])
def test_an_async_function_is_refused(wrong: Any) -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match="wants a plain function"):
            await to_thread.run_sync(wrong)

    kernel.run(main)


def test_a_generator_is_a_result_like_any_other() -> None:
    def numbers() -> Iterator[int]:
        yield 1

    async def main() -> None:
        result = await to_thread.run_sync(numbers)
        assert isinstance(result, types.GeneratorType)
        assert list(result) == [1]

    kernel.run(main)


def test_outside_a_run_it_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"to_thread.run_sync\(\) was used outside the kernel"):
        next(iter(to_thread.run_sync(int)))
    with pytest.raises(RuntimeError, match="current_default_thread_limiter"):
        to_thread.current_default_thread_limiter()


def test_calls_one_after_the_other_are_done_by_one_thread() -> None:
    async def main() -> None:
        assert len({await to_thread.run_sync(threading.get_ident) for _ in range(100)}) == 1

    kernel.run(main)


def test_a_thousand_calls_forty_at_once_get_each_its_own_result() -> None:
    results: dict[int, int] = {}

    async def one(number: int) -> None:
        results[number] = await to_thread.run_sync(lambda: number * number)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for number in range(1000):
                nursery.start_soon(one, number)
        assert to_thread.current_default_thread_limiter().borrowed_tokens == 0

    kernel.run(main)
    assert results == {number: number * number for number in range(1000)}


# ---- names and contexts -------------------------------------------------------------------------------


def test_the_thread_bears_the_name_given_during_the_call_only() -> None:
    async def main() -> None:
        thread, name = await to_thread.run_sync(
            lambda: (threading.current_thread(), threading.current_thread().name), thread_name="resolver"
        )
        assert name == "resolver"
        assert thread.name.startswith("kernel worker ")

    kernel.run(main)


def test_context_variables_are_copied_into_the_thread_and_not_back() -> None:
    var = contextvars.ContextVar[str]("var")

    def change() -> str:
        before = var.get()
        var.set("thread's")
        return before

    async def main() -> None:
        var.set("task's")
        assert await to_thread.run_sync(change) == "task's"
        assert await to_thread.run_sync(var.get) == "task's"
        assert var.get() == "task's"

    kernel.run(main)


# ---- checkpoints and cancellation ---------------------------------------------------------------------


def test_in_a_cancelled_scope_the_function_is_not_called(log: list[Any]) -> None:
    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel()
            await to_thread.run_sync(log.append, "called")
        assert scope.cancelled_caught
        assert to_thread.current_default_thread_limiter().borrowed_tokens == 0

    kernel.run(main)
    assert log == []


def test_a_cancellation_waits_for_the_function_and_its_result_is_not_lost(log: list[Any]) -> None:
    async def main() -> None:
        gate = Gate()

        async def child() -> None:
            with CancelScope() as scope:
                scopes.append(scope)
                log.append(await to_thread.run_sync(gate, "result"))
                await checkpoint()
                log.append("unreachable")
            log.append(scope.cancelled_caught)

        scopes: list[CancelScope] = []
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            await gate.entered()
            scopes[0].cancel()
            await wait_all_tasks_blocked()
            log.append("still waiting")
            gate.open()

    kernel.run(main)
    assert log == ["still waiting", "result", True]


@pytest.mark.parametrize("how", ["returns", "raises"])
def test_with_abandon_on_cancel_the_task_leaves_at_once_and_the_result_is_dropped(how: str, log: list[Any]) -> None:
    async def main() -> None:
        gate = Gate()
        limiter = CapacityLimiter(1)

        def work() -> None:
            gate()
            log.append("thread went on")
            if how == "raises":
                raise ValueError

        async with kernel.open_nursery() as nursery:
            with CancelScope() as scope:
                nursery.start_soon(_cancel_when_entered, gate, scope)
                await to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
        assert scope.cancelled_caught
        log.append("task left")
        assert limiter.borrowed_tokens == 1  # the thread still works
        gate.open()
        await no_calls()
        assert limiter.borrowed_tokens == 0

    kernel.run(main)
    assert log == ["task left", "thread went on"]


async def _cancel_when_entered(gate: Gate, scope: CancelScope) -> None:
    await gate.entered()
    scope.cancel()


def test_abandon_on_cancel_is_looked_at_as_a_truth_value_before_anything_happens(log: list[Any]) -> None:
    class Undecided:
        def __bool__(self) -> bool:
            raise NotImplementedError

    async def main() -> None:
        with pytest.raises(NotImplementedError):
            await to_thread.run_sync(log.append, 1, abandon_on_cancel=Undecided())  # type: ignore[arg-type]
        assert to_thread.current_default_thread_limiter().borrowed_tokens == 0

    kernel.run(main)
    assert log == []


def test_a_cancellation_and_the_result_at_the_same_moment_lose_nothing() -> None:
    """The result is on its way, in the row of calls, as the scope is cancelled."""

    async def main(abandon: bool) -> None:
        with CancelScope() as scope:
            left = threading.Event()

            class Token:
                def __init__(self) -> None:
                    self.token = current_kernel_token()

                def run_sync_soon(self, finish: Callable[[], None]) -> None:
                    self.token.run_sync_soon(scope.cancel)
                    self.token.run_sync_soon(finish)
                    left.set()

            limiter = CapacityLimiter(1)
            call = calls.Call(current_kernel(), lambda: "result", (), limiter, abandon, None)
            call.token = Token()  # type: ignore[assignment]
            result = await call.run()
            assert (result, abandon) == ("result", False)
            await checkpoint()
        assert scope.cancelled_caught

    kernel.run(main, True)
    kernel.run(main, False)


# ---- limiters -----------------------------------------------------------------------------------------


def test_the_default_limiter_is_one_per_run_has_forty_tokens_and_can_be_set() -> None:
    async def main() -> CapacityLimiter:
        limiter = to_thread.current_default_thread_limiter()
        assert limiter.total_tokens == 40
        assert await to_thread.run_sync(lambda: limiter.borrowed_tokens) == 1
        assert to_thread.current_default_thread_limiter() is limiter
        limiter.total_tokens = 1
        gate = Gate()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(to_thread.run_sync, gate)
            await gate.entered()
            nursery.start_soon(to_thread.run_sync, int)
            await wait_all_tasks_blocked()
            assert limiter.statistics().tasks_waiting == 1
            gate.open()
        return limiter

    assert kernel.run(main) is not kernel.run(main)


@pytest.mark.parametrize("abandon", [False, True])
def test_never_more_threads_than_tokens_work_at_once(abandon: bool) -> None:
    lock = threading.Lock()
    working = most = done = 0

    def work() -> None:
        nonlocal working, most, done
        with lock:
            working += 1
            most = max(most, working)
        time.sleep(0)
        with lock:
            working -= 1
            done += 1

    async def main() -> None:
        limiter = CapacityLimiter(3)

        async def one() -> None:
            await to_thread.run_sync(work, limiter=limiter, abandon_on_cancel=abandon)

        async with kernel.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(one)
            await checkpoint()
            if abandon:
                nursery.cancel_scope.cancel()
        await no_calls()
        assert limiter.statistics().borrowers == []

    kernel.run(main)
    assert most <= 3
    assert abandon or done == 200


def test_a_task_cancelled_while_it_waits_for_the_limiter_borrows_nothing_and_calls_nothing(log: list[Any]) -> None:
    async def main() -> None:
        gate = Gate()
        limiter = CapacityLimiter(1)

        async def second() -> None:
            with CancelScope() as scope:
                scopes.append(scope)
                await to_thread.run_sync(log.append, "second", limiter=limiter)

        async def run(*args: Any) -> None:
            await to_thread.run_sync(*args, limiter=limiter)

        scopes: list[CancelScope] = []
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(run, gate)
            await gate.entered()
            nursery.start_soon(second)
            await wait_all_tasks_blocked()
            nursery.start_soon(run, log.append, "third")
            await wait_all_tasks_blocked()
            assert limiter.statistics().tasks_waiting == 2
            scopes[0].cancel()
            await wait_all_tasks_blocked()
            assert limiter.statistics().tasks_waiting == 1
            gate.open()
        assert scopes[0].cancelled_caught
        assert limiter.statistics().borrowers == []

    kernel.run(main)
    assert log == ["third"]


@pytest.mark.parametrize("seed", range(5 * LONG))
def test_under_random_cancellation_no_token_is_lost_and_none_too_many_lent(seed: int) -> None:
    choice = random.Random(seed)
    lock = threading.Lock()
    counts: Counter[str] = Counter()

    def work() -> None:
        with lock:
            counts["now"] += 1
            counts["most"] = max(counts["most"], counts["now"])
        time.sleep(choice.choice([0, 0, 0.0002]))
        with lock:
            counts["now"] -= 1

    async def main() -> None:
        limiter = CapacityLimiter(2)

        async def one(abandon: bool) -> None:
            with CancelScope() as scope:
                scopes.append(scope)
                await to_thread.run_sync(work, limiter=limiter, abandon_on_cancel=abandon)

        scopes: list[CancelScope] = []
        async with kernel.open_nursery() as nursery:
            for _ in range(60):
                nursery.start_soon(one, choice.random() < 0.5)
                for _ in range(choice.randrange(3)):
                    await checkpoint()
                if scopes and choice.random() < 0.5:
                    choice.choice(scopes).cancel()
                if choice.random() < 0.1:
                    await kernel.sleep(0.0003)
        await no_calls()
        assert limiter.statistics().borrowed_tokens == 0
        assert limiter.statistics().tasks_waiting == 0

    kernel.run(main)
    assert counts["now"] == 0
    assert counts["most"] <= 2


class Recording:
    """A limiter of the user's, with nothing but what it must have."""

    def __init__(self, log: list[Any], *, acquire: BaseException | None = None, release: BaseException | None = None):
        self.log = log
        self.errors = acquire, release

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        await checkpoint()
        self.log.append(("acquire", borrower))
        if self.errors[0] is not None:
            raise self.errors[0]

    def release_on_behalf_of(self, borrower: object) -> None:
        self.log.append(("release", borrower))
        if self.errors[1] is not None:
            raise self.errors[1]


def test_a_limiter_of_ones_own_needs_two_methods_and_gets_a_borrower_per_call(log: list[Any]) -> None:
    limiter: Any = Recording(log)

    async def main() -> None:
        assert await to_thread.run_sync(lambda: len(log), limiter=limiter) == 1
        await to_thread.run_sync(int, limiter=limiter)

    kernel.run(main)
    assert [what for what, _ in log] == ["acquire", "release"] * 2
    assert log[0][1] is log[1][1] is not log[2][1]


def test_an_error_of_the_limiter_is_the_tasks_and_the_functions_error_is_its_context(log: list[Any]) -> None:
    async def main() -> None:
        limiter: Any = Recording(log, acquire=ValueError("acquire"))
        with pytest.raises(ValueError, match="acquire"):
            await to_thread.run_sync(log.append, "called", limiter=limiter)
        limiter = Recording(log, release=ValueError("release"))
        with pytest.raises(ValueError, match="release"):
            await to_thread.run_sync(int, limiter=limiter)
        with pytest.raises(ValueError, match="release") as caught:
            await to_thread.run_sync(int, "no number", limiter=limiter)
        assert "no number" in str(caught.value.__context__)

    kernel.run(main)
    assert "called" not in log


def test_a_thread_that_cannot_be_started_is_an_error_and_gives_the_token_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(cache, "_idle", {})
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await to_thread.run_sync(int)
        assert to_thread.current_default_thread_limiter().borrowed_tokens == 0
        assert not calls._state_of(current_kernel()).calls
        assert await to_thread.run_sync(int) == 0

    kernel.run(main)


# ---- memory -------------------------------------------------------------------------------------------


class Thing:
    pass


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
def test_arguments_are_free_as_soon_as_the_task_has_the_result_and_that_one_step_later() -> None:
    """By then the worker may not have got on by a single line. (The loop itself keeps what it sends for the step.)"""

    def work(thing: Thing) -> Thing:
        return Thing()

    async def main() -> None:
        for _ in range(50):
            argument = Thing()
            ref = weakref.ref(argument)
            result = weakref.ref(await to_thread.run_sync(work, argument))
            del argument
            assert ref() is None
            await checkpoint()
            assert result() is None

    kernel.run(main)


@pytest.mark.usefixtures("_no_collector")
def test_an_error_that_was_handled_is_free_and_so_is_what_its_frames_had() -> None:
    class Failed(Exception):
        pass

    def work(thing: Thing) -> None:
        raise Failed

    async def main() -> None:
        argument = Thing()
        refs: list[weakref.ref[Any]] = [weakref.ref(argument)]
        try:
            await to_thread.run_sync(work, argument)
        except Failed as error:
            refs.append(weakref.ref(error))
        del argument
        await checkpoint()
        assert [ref() for ref in refs] == [None, None]

    kernel.run(main)


@pytest.mark.usefixtures("_no_collector")
def test_an_abandoned_calls_result_is_free_when_the_run_has_taken_notice() -> None:
    refs: list[weakref.ref[Thing]] = []

    async def main() -> None:
        gate = Gate()

        def work() -> Thing:
            gate()
            thing = Thing()
            refs.append(weakref.ref(thing))
            return thing

        async with kernel.open_nursery() as nursery:
            with CancelScope() as scope:
                nursery.start_soon(_cancel_when_entered, gate, scope)
                await to_thread.run_sync(work, abandon_on_cancel=True)
        gate.open()
        await no_calls()
        assert refs[0]() is None

    kernel.run(main)


# ---- deadlock -----------------------------------------------------------------------------------------


def test_while_a_thread_works_there_is_no_deadlock_and_afterwards_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Event()
    look: list[float] = []

    async def main() -> None:
        stuck = current_kernel().stuck
        assert stuck is not None

        def watched() -> float:
            look.append(stuck())
            looked.set()
            return look[-1]

        monkeypatch.setattr(current_kernel(), "stuck", watched)
        assert await to_thread.run_sync(looked.wait, 60)
        monkeypatch.setattr(current_kernel(), "stuck", stuck)
        await kernel.Event().wait()

    with pytest.raises(kernel.Deadlock):
        kernel.run(main)


# ---- the end of a run ---------------------------------------------------------------------------------


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "PATIENCE", 0.01)


async def _abandon(gate: Gate, function: Callable[[], Any]) -> None:
    async with kernel.open_nursery() as nursery:
        with CancelScope() as scope:
            nursery.start_soon(_cancel_when_entered, gate, scope)
            await to_thread.run_sync(function, abandon_on_cancel=True)


@pytest.mark.usefixtures("_impatient")
def test_the_end_of_the_run_names_the_function_that_is_stuck_and_where_it_is() -> None:
    gates: list[Gate] = []

    def read_the_tape() -> None:
        gates[0]()

    async def main() -> str:
        gates.append(Gate())
        await _abandon(gates[0], read_the_tape)
        return "done"

    with pytest.warns(RuntimeWarning, match=r"call of .*read_the_tape, now at .*threading\.py:\d+ in wait"):
        assert kernel.run(main) == "done"
    gates[0].open()
    _wait_for_workers()


def _wait_for_workers() -> None:
    """Until every worker is idle."""
    while any(
        thread.name.startswith("kernel worker") and thread not in {worker.thread for worker in list(cache._idle)}
        for thread in threading.enumerate()
    ):
        time.sleep(0.001)


def test_the_end_of_the_run_waits_a_little_for_threads_that_were_abandoned(
    log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "PATIENCE", 60.0)

    async def main() -> None:
        gate = Gate()

        def work() -> None:
            gate()
            log.append("done")

        await _abandon(gate, work)
        kernel.lowlevel.current_kernel().call_soon(gate.open)

    kernel.run(main)
    assert log == ["done"]


@pytest.mark.usefixtures("_impatient")
def test_a_run_that_shall_end_and_waits_for_a_call_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Opening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            gates[0].open()

    def read_the_tape() -> None:
        gates[0]()

    gates: list[Gate] = []

    async def main() -> None:
        gates.append(Gate())

        async def child() -> None:
            await to_thread.run_sync(read_the_tape)

        kernel.lowlevel.spawn_system_task(child)
        await gates[0].entered()

    handler = Opening()
    logging.getLogger("kernel.to_thread").addHandler(handler)
    try:
        kernel.run(main)
    finally:
        logging.getLogger("kernel.to_thread").removeHandler(handler)
    (message,) = caplog.messages
    assert "read_the_tape" in message
    assert "cannot be interrupted" in message


def test_a_run_whose_threads_return_in_time_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        gate = Gate()

        async def child() -> None:
            try:
                await to_thread.run_sync(gate)
            finally:
                assert len(current_kernel().timers) == 0

        kernel.lowlevel.spawn_system_task(child)
        await gate.entered()
        gate.token.run_sync_soon(gate.token.run_sync_soon, gate.open)

    kernel.run(main)
    assert caplog.messages == []


class BreakingPoller:
    """Fails once it was told to, which is the end of the run on the spot."""

    def __init__(self) -> None:
        self.inner = default_poller()
        self.broken = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def poll(self, timeout: float) -> Any:
        if self.broken:
            self.broken = False
            raise OSError("broken")
        return self.inner.poll(timeout)


@pytest.mark.usefixtures("_impatient")
def test_a_run_that_crashes_names_the_threads_that_still_work() -> None:
    poller = BreakingPoller()
    gates: list[Gate] = []

    async def main() -> None:
        gates.append(Gate())

        async def crash() -> None:
            await gates[0].entered()
            poller.broken = True

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(crash)
            await to_thread.run_sync(gates[0])

    with (
        pytest.warns(RuntimeWarning, match="its threads still work: .*Gate"),
        pytest.raises(kernel.KernelInternalError),
    ):
        kernel.run(main, poller=poller)
    gates[0].open()
    _wait_for_workers()
    gc.collect()


# ---- whole programs -----------------------------------------------------------------------------------


def start(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_program_ends_though_an_abandoned_thread_is_stuck() -> None:
    process = start(
        """
import threading
import kernel
from kernel.threads import calls
calls.PATIENCE = 0.05

def stuck():
    threading.Event().wait()

async def main():
    with kernel.move_on_after(0.01):
        await kernel.to_thread.run_sync(stuck, abandon_on_cancel=True)

kernel.run(main)
print("end")
"""
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, b"end\n")
    assert b"RuntimeWarning: the run has ended, and its threads still work: <thread's call of stuck, now at" in err
    assert b"Traceback" not in err


@pytest.mark.parametrize("kind", ["waits", "abandons", "asks"])
def test_ctrl_c_with_worker_threads_running_ends_the_program_without_a_stray_traceback(kind: str) -> None:
    """The main task waits for a thread; or it abandons it; or the function asks whether it is cancelled."""
    process = start(
        f"""
import sys, threading, time
import kernel
from kernel import from_thread, to_thread
kind = {kind!r}
interrupted = threading.Event()

def work():
    print("ready", flush=True)
    if kind == "asks":
        while True:
            from_thread.check_cancelled()
            time.sleep(0.001)
    if kind == "waits":
        sys.stdin.read()

async def helper(gate):
    await to_thread.run_sync(gate.wait, abandon_on_cancel=True)

async def main():
    gate = threading.Event()
    async with kernel.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(helper, gate)
        try:
            await to_thread.run_sync(work if kind != "abandons" else lambda: (work(), gate.wait()),
                                     abandon_on_cancel=kind == "abandons")
            for _ in range(2000):
                await kernel.sleep(0.001)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            raise
        finally:
            gate.set()
            await kernel.lowlevel.cancel_shielded_checkpoint()
            with kernel.CancelScope(shield=True):
                await kernel.sleep(0)
                print("cleaned up", flush=True)

try:
    kernel.run(main)
except KeyboardInterrupt:
    print("end", flush=True)
"""
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, b"interrupted\ncleaned up\nend\n", b"")


def test_a_ctrl_c_that_came_while_a_thread_worked_strikes_the_main_task_wherever_it_sleeps_next(log: list[Any]) -> None:
    main_thread = threading.get_ident()

    def work() -> str:
        signal.pthread_kill(main_thread, signal.SIGINT)
        for _ in range(3):
            from_thread.run_sync(int, kernel_token=tokens[0])  # the loop has looked at it by now, in vain
        return "result"

    tokens = []

    async def main() -> None:
        tokens.append(current_kernel_token())
        assert await to_thread.run_sync(work) == "result"
        try:
            await kernel.sleep(0.3)
            log.append("it has slept to the end")
        except KeyboardInterrupt:
            log.append("struck")
            raise

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)
    assert log == ["struck"]


def test_two_kernels_in_two_threads_may_use_threads_for_the_first_time_at_once() -> None:
    program = """
import sys, threading
import kernel
sys.setswitchinterval(1e-6)
start = threading.Barrier(4)
results = []

async def main():
    start.wait(60)
    limiter = kernel.to_thread.current_default_thread_limiter()
    own = [await kernel.to_thread.run_sync(lambda i=i: i) for i in range(50)]
    assert own == list(range(50))
    assert limiter.borrowed_tokens == 0
    return limiter

threads = [threading.Thread(target=lambda: results.append(kernel.run(main))) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
assert len(set(map(id, results))) == 4
"""
    out, err = (process := start(program)).communicate(timeout=60)
    assert (process.returncode, out, err) == (0, b"", b"")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_a_fork_in_a_run_with_threads_the_child_can_run_a_kernel_of_its_own() -> None:
    program = """
import os, threading
import kernel
from kernel import to_thread
from kernel.threads import cache

async def child():
    return await to_thread.run_sync(lambda: "from the child's thread")

async def main():
    await to_thread.run_sync(int)
    gate = threading.Event()
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(to_thread.run_sync, gate.wait)
        await kernel.testing.wait_all_tasks_blocked()
        pid = os.fork()
        if pid == 0:
            assert not cache._idle
            print(kernel.run(child), flush=True)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        gate.set()
    assert await to_thread.run_sync(int) == 0

kernel.run(main)
"""
    process = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program], cwd=ROOT, capture_output=True, timeout=60
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, b"from the child's thread\n", b"")


# ---- reports ------------------------------------------------------------------------------------------


def test_a_sleeping_task_shows_which_function_it_waits_for_and_where_that_is() -> None:
    async def main() -> None:
        gate = Gate()
        async with kernel.open_nursery() as nursery:

            async def child() -> None:
                tasks.append(current_task())
                await to_thread.run_sync(gate.__call__)

            tasks: list[Any] = []
            nursery.start_soon(child)
            await gate.entered()
            shown = repr(tasks[0].trap)
            assert "Gate.__call__, now at " in shown
            gate.open()
            while tasks[0].trap is not None:
                trap = tasks[0].trap
                await checkpoint()
            assert repr(trap) == "<thread's call, done>"

    kernel.run(main)


def test_check_cancelled_is_the_way_for_a_function_to_leave_early() -> None:
    async def main() -> None:
        entered = kernel.Event()
        token = current_kernel_token()

        def work() -> None:
            token.run_sync_soon(entered.set)
            while True:
                from_thread.check_cancelled()
                time.sleep(0)

        with CancelScope() as scope:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(to_thread.run_sync, work)
                await entered.wait()
                scope.cancel("enough")
        assert scope.cancelled_caught

    kernel.run(main)
