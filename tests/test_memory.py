"""What the kernel keeps alive, and what it lets go of: by reference counting, without the garbage collector."""

from __future__ import annotations

import gc
import socket
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kernel
from kernel.lowlevel import ParkingLot, Task, Trap, checkpoint, current_kernel, current_task, wait_readable
from kernel.testing import MockClock, wait_all_tasks_blocked

Virtual = Callable[..., Any]


class Thing:
    """Something whose end can be watched."""


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Only reference counting, as after a cycle is made things would live on until a collection."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# ---- staying alive ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sleeping", "parked", "waiting for a file", "ready"])
def test_a_running_task_survives_a_collection_though_nobody_else_refers_to_it(how: str, virtual: Virtual) -> None:
    a, b = socket.socketpair()
    log: list[str] = []

    async def child() -> None:
        lot = ParkingLot()  # nobody else knows it
        try:
            if how == "sleeping":
                await kernel.sleep(5)
            elif how == "parked":
                await lot.park()
            elif how == "waiting for a file":
                await wait_readable(a)
            else:
                for _ in range(200):
                    await checkpoint()
            log.append("done")
        except kernel.Cancelled:
            log.append("cancelled")
            raise

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            await checkpoint()
            for _ in range(3):
                gc.collect()
                await checkpoint()
            assert log == []
            b.send(b"x")
            await kernel.sleep(10)
            nursery.cancel_scope.cancel()

    with a, b:
        virtual(main)
    assert log == (["cancelled"] if how == "parked" else ["done"])


# ---- letting go ------------------------------------------------------------------------------------------


def endings() -> dict[str, Callable[[kernel.Nursery], Any]]:
    """Ways in which the task in `test_a_task_frees_its_locals_as_it_ends` may end."""

    async def by_cancel(nursery: kernel.Nursery) -> None:
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    async def by_deadline(nursery: kernel.Nursery) -> None:
        nursery.cancel_scope.deadline = kernel.current_time() + 5

    async def by_sibling(nursery: kernel.Nursery) -> None:
        await wait_all_tasks_blocked()
        nursery.start_soon(fail)

    async def by_body(nursery: kernel.Nursery) -> None:
        await wait_all_tasks_blocked()
        raise KeyError("body")

    return {"cancel": by_cancel, "deadline": by_deadline, "a sibling's error": by_sibling, "the body's error": by_body}


async def fail() -> None:
    raise KeyError("sibling")


WAITS: dict[str, Callable[[], Any]] = {
    "sleep": lambda: kernel.sleep(1000),
    "sleep_forever": lambda: kernel.sleep_forever(),
    "park": lambda: ParkingLot().park(),
    "checkpoints": lambda: spin(),
    "nested": lambda: nested(5),
    "a nursery": lambda: with_children(),
}


async def spin() -> None:
    while True:
        await checkpoint()


async def nested(depth: int) -> None:
    thing = Thing()
    with kernel.CancelScope():
        await (nested(depth - 1) if depth else kernel.sleep_forever())
    del thing


async def with_children() -> None:
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(kernel.sleep_forever)
        nursery.start_soon(kernel.sleep_forever)


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("ending", endings())
def test_a_task_that_is_made_to_end_frees_its_locals_at_once(
    wait: str, ending: str, virtual: Virtual, no_gc: None
) -> None:
    if wait == "checkpoints" and ending != "the body's error":
        pytest.skip("never idle")
    refs: list[weakref.ref[Any]] = []

    async def child() -> None:
        thing = Thing()
        refs.append(weakref.ref(thing))
        refs.append(weakref.ref(current_task()))
        await WAITS[wait]()

    async def scene() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            nursery.start_soon(child)
            if wait == "checkpoints":
                await checkpoint()
                raise KeyError
            await endings()[ending](nursery)

    async def main() -> None:
        for _ in range(3):
            try:
                await scene()
            except* KeyError:
                pass
            assert len(refs) == 4
            await checkpoint()  # the task that ended last is the loop's until the end of its pass
            assert [ref() for ref in refs] == [None] * 4
            refs.clear()

    virtual(main)


@pytest.mark.parametrize("timeout", [kernel.move_on_after, kernel.fail_after])
def test_a_timed_out_block_frees_its_locals_at_once(timeout: Any, virtual: Virtual, no_gc: None) -> None:
    refs: list[weakref.ref[Thing]] = []

    async def work() -> None:
        thing = Thing()
        refs.append(weakref.ref(thing))
        await kernel.sleep(1000)

    async def main() -> None:
        for _ in range(3):
            try:
                with timeout(1):
                    await work()
            except kernel.TooSlowError:
                pass
            await checkpoint()  # what a task was woken with is the loop's until the end of its step
            assert refs.pop()() is None

    virtual(main)


def test_ten_thousand_cancelled_tasks_leave_no_garbage_to_collect(virtual: Virtual, no_gc: None) -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:  # once, so that everything is set up
            nursery.start_soon(kernel.sleep_forever)
            nursery.cancel_scope.cancel()
        gc.collect()
        with kernel.move_on_after(10):
            async with kernel.open_nursery() as nursery:
                for _ in range(10_000):
                    nursery.start_soon(kernel.sleep, 1000)
        await checkpoint()
        del nursery
        assert gc.collect() == 0

    virtual(main)


def test_errors_of_children_leave_no_garbage_to_collect(virtual: Virtual, no_gc: None) -> None:
    async def scene() -> None:
        try:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(fail)
                nursery.start_soon(fail)
                nursery.start_soon(kernel.sleep_forever)
        except* KeyError:
            pass

    async def main() -> None:
        await scene()
        await checkpoint()
        gc.collect()
        for _ in range(10):
            await scene()
        await checkpoint()
        assert gc.collect() == 0

    virtual(main)


class Bad(Trap):
    """Fails in both of its methods, as it is told."""

    def __init__(self, where: str) -> None:
        self.where = where

    def arm(self, kernel: Any, task: Task) -> None:
        if self.where == "arm":
            raise OSError("arm")

    def abort(self, kernel: Any, task: Task) -> bool:
        raise OSError("abort")


@pytest.mark.parametrize("where", ["arm", "abort"])
def test_a_trap_that_fails_leaves_no_garbage_to_collect(where: str, no_gc: None) -> None:
    refs: list[weakref.ref[Thing]] = []

    async def scene() -> None:
        thing = Thing()
        refs.append(weakref.ref(thing))
        with kernel.CancelScope() as scope:
            scope.cancel()
            await Bad(where)

    async def main() -> None:
        for _ in range(5):
            with pytest.raises(OSError):
                await scene()
            gc.collect()
            await _caught(scene)
            await checkpoint()
            assert gc.collect() == 0
            assert refs[-1]() is None

    async def _caught(fn: Callable[[], Any]) -> None:
        try:
            await fn()
        except OSError:
            pass

    kernel.run(main)


def test_a_value_that_was_handed_over_is_not_kept_after_the_step(no_gc: None) -> None:
    log: list[bool] = []

    async def child() -> None:
        thing = await ParkingLot()
        ref = weakref.ref(thing)
        del thing
        await checkpoint()
        log.append(ref() is None)
        await kernel.sleep_forever()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            current_kernel().wake(task, Thing())
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    kernel.run(main)
    assert log == [True]


def test_an_error_that_was_handed_over_is_not_kept_after_the_step(no_gc: None) -> None:
    class ThingError(Exception):
        pass

    refs: list[weakref.ref[Any]] = []

    async def child() -> None:
        try:
            await ParkingLot()
        except ThingError as error:
            refs.append(weakref.ref(error))
        await kernel.sleep_forever()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            current_kernel().wake(task, error=ThingError())
            await wait_all_tasks_blocked()
            assert refs[0]() is None
            nursery.cancel_scope.cancel()

    kernel.run(main)


def test_the_result_of_a_child_goes_with_its_task(no_gc: None) -> None:
    refs: list[weakref.ref[Thing]] = []

    async def child() -> Thing:
        thing = Thing()
        refs.append(weakref.ref(thing))
        return thing

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            (task,) = nursery.child_tasks
            await wait_all_tasks_blocked()
            assert refs[0]() is not None
            del task
            await checkpoint()
            assert refs[0]() is None

    kernel.run(main)


def test_a_finished_task_does_not_keep_other_tasks_of_its_nursery_alive(no_gc: None) -> None:
    kept: list[Task] = []
    refs: list[weakref.ref[Task]] = []

    async def first() -> None:
        kept.append(current_task())

    async def second() -> None:
        refs.append(weakref.ref(current_task()))

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(first)
            nursery.start_soon(second)
        del nursery
        await checkpoint()
        assert kept[0].state == "finished"
        assert refs[0]() is None

    kernel.run(main)


def test_a_finished_task_does_not_keep_the_frames_of_an_error_that_was_dealt_with(no_gc: None) -> None:
    kept: list[Task] = []
    refs: list[weakref.ref[Thing]] = []

    async def child() -> None:
        kept.append(current_task())
        await inner()

    async def inner() -> None:
        thing = Thing()
        refs.append(weakref.ref(thing))
        with kernel.move_on_after(0):
            await kernel.sleep_forever()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
        await checkpoint()
        assert refs[0]() is None

    kernel.run(main)


def test_a_scope_that_was_left_does_not_keep_its_task_alive(no_gc: None) -> None:
    kept: list[kernel.CancelScope] = []
    refs: list[weakref.ref[Task]] = []

    async def child() -> None:
        refs.append(weakref.ref(current_task()))
        with kernel.move_on_after(10) as scope:
            kept.append(scope)
            await checkpoint()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
        await checkpoint()
        assert refs[0]() is None

    kernel.run(main)


def test_what_main_returns_is_the_callers_alone_after_the_run(no_gc: None) -> None:
    async def main() -> Thing:
        await checkpoint()
        return Thing()

    thing = kernel.run(main)
    ref = weakref.ref(thing)
    del thing
    assert ref() is None


def test_what_main_raises_is_the_callers_alone_after_the_run(no_gc: None) -> None:
    refs: list[weakref.ref[Thing]] = []

    async def main() -> None:
        thing = Thing()
        refs.append(weakref.ref(thing))
        await checkpoint()
        raise KeyError

    def call() -> None:
        try:
            kernel.run(main)
        except KeyError:
            pass

    call()
    assert refs[0]() is None


# ---- tracebacks ------------------------------------------------------------------------------------------


def traceback_entries(error: BaseException | None, seen: set[int] | None = None) -> int:
    """All entries of all tracebacks of an error, its group, its cause and its context."""
    seen = set() if seen is None else seen
    if error is None or id(error) in seen:
        return 0
    seen.add(id(error))
    count, traceback = 0, error.__traceback__
    while traceback is not None:
        count += 1
        traceback = traceback.tb_next
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return count + sum(traceback_entries(one, seen) for one in (*inner, error.__cause__, error.__context__))


async def in_calls(depth: int, leaf: Callable[[], Any]) -> None:
    await (in_calls(depth - 1, leaf) if depth else leaf())


async def in_scopes(depth: int, leaf: Callable[[], Any]) -> None:
    with kernel.CancelScope():
        await (in_scopes(depth - 1, leaf) if depth else leaf())


async def in_nurseries(depth: int, leaf: Callable[[], Any]) -> None:
    async with kernel.open_nursery():
        await (in_nurseries(depth - 1, leaf) if depth else leaf())


async def in_children(depth: int, leaf: Callable[[], Any]) -> None:
    async with kernel.open_nursery() as nursery:
        if depth:
            nursery.start_soon(in_children, depth - 1, leaf)
        else:
            nursery.start_soon(leaf)


@pytest.mark.parametrize("shape", [in_calls, in_scopes, in_nurseries, in_children])
@pytest.mark.parametrize("leaf", [fail, kernel.sleep_forever], ids=["error", "cancelled"])
def test_tracebacks_grow_linearly_with_the_depth(shape: Callable[..., Any], leaf: Any, virtual: Virtual) -> None:
    async def main(depth: int) -> int:
        with kernel.move_on_after(1):
            try:
                await shape(depth, leaf)
            except BaseException as error:
                return traceback_entries(error)
        raise AssertionError("not reached")

    sizes = [virtual(main, depth) for depth in (10, 20, 30, 40, 80)]
    step = sizes[1] - sizes[0]
    assert sizes == [sizes[0] + step * (depth - 10) // 10 for depth in (10, 20, 30, 40, 80)]
    assert step <= 10 * 6


def test_a_task_that_keeps_catching_its_cancel_gathers_no_traceback() -> None:
    sizes: list[int] = []

    async def main() -> None:
        with kernel.CancelScope() as scope:
            scope.cancel()
            for _ in range(5):
                try:
                    await kernel.sleep_forever()
                except kernel.Cancelled as error:
                    sizes.append(traceback_entries(error))

    kernel.run(main)
    assert len(set(sizes)) == 1


# ---- a virtual clock -------------------------------------------------------------------------------------


def test_a_virtual_clock_meets_a_past_deadline(virtual: Virtual) -> None:
    log: list[float] = []

    async def main() -> None:
        await kernel.sleep(100)
        with kernel.move_on_at(50) as scope:
            await kernel.sleep_forever()
        assert scope.cancelled_caught
        with kernel.CancelScope() as scope:
            scope.deadline = 60
            await kernel.sleep(1000)
        assert scope.cancelled_caught
        await kernel.sleep_until(70)
        log.append(kernel.current_time())

    virtual(main)
    assert log == [100]


def test_a_virtual_clock_beside_real_sockets() -> None:
    a, b = socket.socketpair()
    a.setblocking(False)
    log: list[tuple[str, float]] = []

    async def server() -> None:
        for _ in range(3):
            await wait_readable(a)
            log.append((a.recv(100).decode(), kernel.current_time()))

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(server)
            for number in range(3):
                await kernel.sleep(3600)
                b.send(str(number).encode())

    with a, b:
        kernel.run(main, clock=MockClock(autojump_threshold=0))
    assert log == [("0", 3600), ("1", 7200), ("2", 10_800)]
