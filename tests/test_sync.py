"""Events, locks, semaphores, limiters, conditions, barriers: hand-over, order, misuse, what a cancellation leaves."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Awaitable, Callable, Generator
from math import inf, nan
from threading import Thread
from typing import Any

import pytest

import kernel
from kernel import (
    Barrier,
    BrokenResourceError,
    Cancelled,
    CancelScope,
    CapacityLimiter,
    Condition,
    Event,
    Lock,
    Nursery,
    Semaphore,
    StrictFIFOLock,
    WouldBlock,
    open_nursery,
    sync,
)
from kernel.core.loop import BUDGET
from kernel.lowlevel import Task, checkpoint, current_kernel, current_task
from kernel.testing import MockClock, wait_all_tasks_blocked

LOCKS = [Lock, StrictFIFOLock]


class Crowd:
    """Tasks that do the same thing and write what became of them to `log`: a name, or `name cancelled`, `name broken`.

    Each has a scope of its own. `start` brings them up one after the other, so that their order is the names'.
    """

    def __init__(self, nursery: Nursery, act: Callable[[str], Any]) -> None:
        self.nursery = nursery
        self.act = act
        self.log: list[str] = []
        self.scopes: dict[str, CancelScope] = {}
        self.tasks: dict[str, Task] = {}

    async def _run(self, name: str) -> None:
        self.tasks[name] = current_task()
        with self.scopes[name]:
            try:
                await self.act(name)
                self.log.append(name)
            except Cancelled:
                self.log.append(f"{name} cancelled")
                raise
            except BrokenResourceError:
                self.log.append(f"{name} broken")

    async def start(self, names: str) -> None:
        for name in names:
            self.scopes[name] = CancelScope()
            self.nursery.start_soon(self._run, name, name=name)
        await wait_all_tasks_blocked()

    def cancel(self, *names: str) -> None:
        for name in names:
            self.scopes[name].cancel()


def run(async_fn: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    return kernel.run(async_fn, *args)


def with_crowd(act: Callable[[str], Any], body: Callable[[Crowd], Awaitable[object]]) -> list[str]:
    """Run `body(crowd)`; the log as it stood when `body` was through and all were blocked again."""

    async def main() -> list[str]:
        async with open_nursery() as nursery:
            crowd = Crowd(nursery, act)
            await body(crowd)
            await wait_all_tasks_blocked()
            log = list(crowd.log)
            nursery.cancel_scope.cancel()
        return log

    log: list[str] = run(main)
    return log


async def refuses(error: type[BaseException], words: str, thing: Any, act: Callable[[], Any]) -> None:
    """`act` raises, and `thing` is as it was."""
    before = (repr(thing), thing.statistics())
    with pytest.raises(error, match=words):
        result = act()
        if result is not None:
            await result
    assert (repr(thing), thing.statistics()) == before


# ---- Event --------------------------------------------------------------------------------------------


def test_event_lets_all_waiters_go_in_the_order_they_came() -> None:
    event = Event()

    async def body(crowd: Crowd) -> None:
        await crowd.start("abc")
        assert event.statistics() == sync.EventStatistics(tasks_waiting=3)
        event.set()
        assert event.statistics().tasks_waiting == 0
        assert crowd.log == []
        event.set()
        await crowd.start("d")

    assert with_crowd(lambda _: event.wait(), body) == ["a", "b", "c", "d"]
    assert event.is_set()


def test_event_may_be_made_and_set_outside_the_kernel() -> None:
    event = Event()
    assert not event.is_set()
    event.set()
    assert event.is_set()
    run(event.wait)


def test_event_with_waiters_cannot_be_set_from_outside_their_kernel() -> None:
    event = Event()
    errors: list[BaseException] = []

    def set_it() -> None:
        try:
            event.set()
        except RuntimeError as error:
            errors.append(error)

    async def body(crowd: Crowd) -> None:
        await crowd.start("a")
        thread = Thread(target=set_it)
        thread.start()
        thread.join(30)
        assert not event.is_set()
        assert event.statistics().tasks_waiting == 1

    assert with_crowd(lambda _: event.wait(), body) == []
    assert "Event.set() was used outside the kernel" in str(errors[0])


def test_event_cancelled_waiter_is_gone_and_the_others_wake() -> None:
    event = Event()

    async def body(crowd: Crowd) -> None:
        await crowd.start("abc")
        crowd.cancel("b")
        assert event.statistics().tasks_waiting == 2
        event.set()

    assert with_crowd(lambda _: event.wait(), body) == ["b cancelled", "a", "c"]


def test_event_set_and_a_cancel_in_the_same_step_the_event_is_seen() -> None:
    event = Event()

    async def body(crowd: Crowd) -> None:
        await crowd.start("a")
        event.set()
        crowd.cancel("a")

    assert with_crowd(lambda _: event.wait(), body) == ["a"]


def test_event_has_no_truth_value() -> None:
    with pytest.raises(NotImplementedError, match=r"event\.is_set"):
        bool(Event())


def test_event_cannot_be_awaited_itself() -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match="await"):
            await Event()  # type: ignore[misc]
        with pytest.raises(TypeError, match="await"):
            await Lock()  # type: ignore[misc]

    run(main)


# ---- Lock ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", LOCKS)
def test_lock_is_handed_over_in_the_order_of_arrival(make: type[Lock]) -> None:
    lock = make()
    owners: list[object] = []

    async def act(name: str) -> None:
        async with lock:
            owners.append(lock.owner)
            await checkpoint()

    async def body(crowd: Crowd) -> None:
        async with lock:
            await crowd.start("abc")
            assert lock.owner is current_task()
            assert lock.statistics() == sync.LockStatistics(locked=True, owner=current_task(), tasks_waiting=3)
        assert lock.owner is crowd.tasks["a"]  # at once, before it runs
        assert lock.locked()
        await wait_all_tasks_blocked()
        assert owners == [crowd.tasks[name] for name in "abc"]

    assert with_crowd(act, body) == ["a", "b", "c"]
    assert not lock.locked()
    assert lock.statistics() == sync.LockStatistics(locked=False, owner=None, tasks_waiting=0)


@pytest.mark.parametrize("used", range(BUDGET - 2, BUDGET + 2))
def test_lock_acquire_queues_at_once_even_when_the_budget_is_used_up(used: int) -> None:
    """Strict order is that of the calls: an operation that is due for a turn must not take it before it queues."""
    order: list[str] = []

    async def locker(lock: Lock, name: str) -> None:
        async with lock:
            order.append(name)

    async def spender(lock: Lock) -> None:
        for _ in range(used):
            await event.wait()
        order.append("calls")
        await locker(lock, "spender")

    async def late(lock: Lock) -> None:
        while "calls" not in order:
            await checkpoint()
        await locker(lock, "late")

    async def main() -> None:
        event.set()
        lock = StrictFIFOLock()
        async with open_nursery() as nursery:
            await lock.acquire()
            nursery.start_soon(spender, lock)
            nursery.start_soon(late, lock)
            await wait_all_tasks_blocked()
            lock.release()

    event = Event()
    run(main)
    assert order == ["calls", "spender", "late"]


@pytest.mark.parametrize("make", LOCKS)
def test_lock_cancelled_waiter_does_not_strand_the_next(make: type[Lock]) -> None:
    lock = make()

    async def body(crowd: Crowd) -> None:
        await lock.acquire()
        await crowd.start("abcd")
        crowd.cancel("a", "c")
        assert lock.statistics().tasks_waiting == 2
        lock.release()

    async def act(name: str) -> None:
        async with lock:
            pass

    assert with_crowd(act, body) == ["a cancelled", "c cancelled", "b", "d"]
    assert not lock.locked()


def test_lock_handed_to_a_task_that_is_then_cancelled_goes_on_to_the_next() -> None:
    """a was woken: it owns the lock, so its acquire returns. It is cancelled at its next checkpoint and releases."""
    lock = Lock()
    log: list[str] = []

    async def act(name: str) -> None:
        async with lock:
            log.append(f"{name} has it")
            await checkpoint()

    async def body(crowd: Crowd) -> None:
        async with lock:
            await crowd.start("ab")
        crowd.cancel("a")

    assert with_crowd(act, body) == ["a cancelled", "b"]
    assert log == ["a has it", "b has it"]


def test_lock_released_in_the_pass_of_the_waiters_deadline_is_not_lost(
    virtual: Callable[..., Any],
) -> None:
    lock = Lock()
    log: list[object] = []

    async def holder() -> None:
        async with lock:
            await kernel.sleep(5)

    async def waiter() -> None:
        await checkpoint()
        with kernel.move_on_after(5) as scope:
            await lock.acquire()
            log.append("acquired")
            try:
                await checkpoint()
            finally:
                lock.release()
        log.append(scope.cancelled_caught)

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(holder)
            nursery.start_soon(waiter)

    virtual(main)
    assert log == [True]  # both timers are due in one pass: the deadline reaches the waiter before the holder runs
    assert not lock.locked()


def test_lock_handed_over_before_the_deadline_passes_is_held_though_the_deadline_is_seen_first(
    virtual: Callable[..., Any],
) -> None:
    lock = Lock()
    log: list[object] = []

    async def waiter(scope: CancelScope) -> None:
        with scope:
            await lock.acquire()
            log.append("acquired")
            try:
                await checkpoint()
            finally:
                lock.release()
        log.append(scope.cancelled_caught)

    async def main() -> None:
        scope = CancelScope()
        async with open_nursery() as nursery:
            async with lock:
                nursery.start_soon(waiter, scope)
                await kernel.sleep(5)
            scope.deadline = kernel.current_time()

    virtual(main)
    assert log == ["acquired", True]
    assert not lock.locked()


def test_lock_acquire_in_a_cancelled_scope_takes_nothing_and_leaves_the_row_as_it_was() -> None:
    lock = Lock()

    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel()
            await lock.acquire()
        assert scope.cancelled_caught
        assert not lock.locked()
        async with open_nursery() as nursery:
            crowd = Crowd(nursery, lambda _: lock.acquire())
            await crowd.start("a")
            with CancelScope() as scope:
                scope.cancel()
                await lock.acquire()
            assert lock.statistics().tasks_waiting == 0
            assert lock.owner is crowd.tasks["a"]

    run(main)


@pytest.mark.parametrize("make", LOCKS)
def test_lock_nowait_between_release_and_wake_does_not_overtake(make: type[Lock]) -> None:
    lock = make()

    async def body(crowd: Crowd) -> None:
        lock.acquire_nowait()
        await crowd.start("a")
        lock.release()
        with pytest.raises(WouldBlock):
            lock.acquire_nowait()

    assert with_crowd(lambda _: lock.acquire(), body) == ["a"]


@pytest.mark.parametrize("make", LOCKS)
def test_lock_misuse_raises_and_changes_nothing(make: type[Lock]) -> None:
    lock = make()

    async def body(crowd: Crowd) -> None:
        await refuses(RuntimeError, "nobody holds it", lock, lock.release)
        await crowd.start("a")
        await refuses(RuntimeError, "'a' holds it", lock, lock.release)
        await refuses(WouldBlock, "held by another", lock, lock.acquire_nowait)
        crowd.cancel("a")
        await wait_all_tasks_blocked()
        async with lock:
            await refuses(RuntimeError, "wait for itself", lock, lock.acquire)
            await refuses(RuntimeError, "wait for itself", lock, lock.acquire_nowait)
            await crowd.start("bc")
            await refuses(RuntimeError, "wait for itself", lock, lock.acquire)

    async def act(name: str) -> None:
        async with lock:
            if name == "a":
                await kernel.sleep_forever()

    assert with_crowd(act, body) == ["a cancelled", "b", "c"]


def test_lock_outside_a_task_is_refused() -> None:
    lock = Lock()
    for act in (lock.acquire_nowait, lock.release):
        with pytest.raises(RuntimeError, match="outside the kernel"):
            act()
    with pytest.raises(RuntimeError, match="outside the kernel"):
        next(iter(lock.acquire()))
    assert not lock.locked()


def test_lock_is_not_released_by_a_thread_while_its_owner_waits() -> None:
    lock = Lock()
    errors: list[BaseException] = []

    def release() -> None:
        try:
            lock.release()
        except RuntimeError as error:
            errors.append(error)

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(holder)
            await wait_all_tasks_blocked()
            thread = Thread(target=release)
            thread.start()
            thread.join(30)
            assert lock.locked()
            nursery.cancel_scope.cancel()

    async def holder() -> None:
        async with lock:
            await kernel.sleep_forever()

    run(main)
    assert "Lock.release() was used outside the kernel" in str(errors[0])


def test_lock_whose_owner_ends_without_release_tells_its_waiters_and_later_comers() -> None:
    lock = Lock()

    leave = Event()

    async def leaver() -> None:
        await lock.acquire()
        await leave.wait()

    async def body(crowd: Crowd) -> None:
        crowd.nursery.start_soon(leaver, name="leaver")
        await checkpoint()
        await crowd.start("ab")
        leave.set()
        await wait_all_tasks_blocked()
        assert crowd.log == ["a broken", "b broken"]
        assert "broken: 'leaver' has ended without releasing it" in repr(lock)
        await refuses(BrokenResourceError, "'leaver', has ended without releasing", lock, lock.acquire)
        await refuses(BrokenResourceError, "'leaver', has ended without releasing", lock, lock.acquire_nowait)
        await refuses(RuntimeError, "'leaver' holds it", lock, lock.release)

    with_crowd(lambda _: lock.acquire(), body)


def test_lock_whose_owner_failed_tells_its_waiters() -> None:
    lock = Lock()

    leave = Event()

    async def fails() -> None:
        await lock.acquire()
        await leave.wait()
        raise ValueError("dropped it")

    async def main() -> None:
        async with open_nursery() as outer:
            crowd = Crowd(outer, lambda _: lock.acquire())
            with pytest.raises(ExceptionGroup):
                async with open_nursery() as nursery:
                    nursery.start_soon(fails)
                    await checkpoint()
                    await crowd.start("a")
                    assert crowd.log == []
                    leave.set()
            await wait_all_tasks_blocked()
            assert crowd.log == ["a broken"]

    run(main)


def test_lock_abandoned_while_nobody_waits_is_refused_later() -> None:
    lock = Lock()

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(lock.acquire, name="leaver")
        with pytest.raises(BrokenResourceError, match="'leaver'"):
            await lock.acquire()
        with pytest.raises(BrokenResourceError, match="'leaver'"):
            lock.acquire_nowait()

    run(main)
    with pytest.raises(BrokenResourceError, match="'leaver'"):
        run(lock.acquire)


def test_lock_handed_to_one_who_then_ends_tells_those_behind() -> None:
    lock = Lock()

    async def body(crowd: Crowd) -> None:
        await lock.acquire()
        await crowd.start("abc")
        lock.release()  # a gets it, and ends

    assert with_crowd(lambda _: lock.acquire(), body) == ["a", "b broken", "c broken"]


def test_lock_that_was_released_is_not_broken_by_the_end_of_its_former_owners() -> None:
    """Those who are watched are watched until nobody waits: their ends must not be mistaken for the owner's."""
    lock = Lock()

    async def holder(done: Event) -> None:
        async with lock:
            await done.wait()

    async def main() -> None:
        async with open_nursery() as nursery:
            first, last = Event(), Event()
            nursery.start_soon(holder, first)
            await wait_all_tasks_blocked()
            nursery.start_soon(holder, first)
            nursery.start_soon(holder, last)
            nursery.start_soon(holder, last)
            await wait_all_tasks_blocked()
            first.set()
            await wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 2
            assert lock.statistics().tasks_waiting == 1
            last.set()
        assert not lock.locked()
        async with lock:
            pass

    run(main)


def test_lock_nobody_waits_for_is_not_watched() -> None:
    """The uncontended path pays nothing for broken locks, and no lock is kept alive by its former users."""
    lock = Lock()

    async def act(name: str) -> None:
        async with lock:
            await checkpoint()

    async def main() -> None:
        farewells = current_kernel().farewells
        async with lock:
            assert not farewells
        async with open_nursery() as nursery:
            crowd = Crowd(nursery, act)
            async with lock:
                await crowd.start("abc")
                assert list(farewells) == [current_task()]
                crowd.cancel("a")
            async with lock:
                pass
        assert not farewells
        assert lock._watched == set()
        async with open_nursery() as nursery:  # the only one who waits is cancelled
            crowd = Crowd(nursery, act)
            async with lock:
                await crowd.start("a")
                crowd.cancel("a")
            assert not lock.locked()
        assert not farewells

    run(main)


def test_lock_once_broken_watches_nobody() -> None:
    lock = Lock()

    release = Event()

    async def holds_first() -> None:
        async with lock:
            await release.wait()
        await kernel.sleep_forever()

    async def body(crowd: Crowd) -> None:
        crowd.nursery.start_soon(holds_first)
        await wait_all_tasks_blocked()
        await crowd.start("ab")
        release.set()
        await wait_all_tasks_blocked()
        assert crowd.log == ["a", "b broken"]
        assert not current_kernel().farewells
        assert lock._watched == set()

    with_crowd(lambda _: lock.acquire(), body)


def test_lock_keeps_other_farewells_of_its_owner() -> None:
    lock = Lock()
    said: list[str] = []

    async def body(crowd: Crowd) -> None:
        mine = current_kernel().farewells.setdefault(current_task(), [])
        mine.append(lambda task: said.append(task.name))
        async with lock:
            await crowd.start("a")
            assert len(mine) == 2
        async with lock:
            pass
        assert len(mine) == 1
        del current_kernel().farewells[current_task()]

    async def act(name: str) -> None:
        async with lock:
            pass

    assert with_crowd(act, body) == ["a"]


def test_lock_row_keeps_order_whoever_leaves_it_from_wherever() -> None:
    """Leaving is by number, and the numbers are given anew when many have left."""
    names = "abcdefghijklmnopqrstuvwxyz"
    for leaving in ("a", "z", "abc", "zyx", "mnopq", names[1:-1], "acegikmoqsuwy", "zxvtrpnljhfdb", names[:13] + "z"):
        lock = Lock()

        async def act(name: str, lock: Lock = lock) -> None:
            async with lock:
                pass

        async def body(crowd: Crowd, lock: Lock = lock, leaving: str = leaving) -> None:
            async with lock:
                await crowd.start(names)
                for name in leaving:
                    crowd.cancel(name)
                assert lock.statistics().tasks_waiting == 26 - len(leaving)
                await wait_all_tasks_blocked()
                await crowd.start("AB")
                crowd.cancel("A")

        log = with_crowd(act, body)
        assert [name for name in log if "cancelled" not in name] == [n for n in [*names, "B"] if n not in leaving]
        assert lock._row.count(None) == lock._gone


def test_lock_forgets_those_who_tried_for_a_while_and_gave_up(virtual: Callable[..., Any]) -> None:
    lock = Lock()

    async def impatient(seconds: float) -> None:
        for _ in range(200):
            with kernel.move_on_after(seconds):
                await lock.acquire()

    async def main() -> None:
        async with lock, open_nursery() as nursery:
            for seconds in (1, 1.1, 1.3, 1000):
                nursery.start_soon(impatient, seconds)
            await kernel.sleep(150)
            assert len(lock._row) <= 9
            nursery.cancel_scope.cancel()

    virtual(main)


def test_lock_may_be_referred_to_weakly_and_goes_with_its_last_user() -> None:
    async def main() -> None:
        lock: Lock | None = Lock()
        event: Event | None = Event()
        references = [weakref.ref(lock), weakref.ref(event)]

        async def use(name: str) -> None:
            assert lock is not None
            async with lock:
                pass

        async with open_nursery() as nursery:
            crowd = Crowd(nursery, use)
            async with lock:
                await crowd.start("ab")
                crowd.cancel("a")
        del crowd, nursery
        lock = event = None
        assert [reference() for reference in references] == [None, None]

    gc.disable()
    try:
        run(main)
    finally:
        gc.enable()


# ---- Semaphore ----------------------------------------------------------------------------------------


def test_semaphore_lets_as_many_in_as_it_has_permits_and_hands_over_in_order() -> None:
    semaphore = Semaphore(2, max_value=2)
    assert (semaphore.value, semaphore.max_value) == (2, 2)

    async def body(crowd: Crowd) -> None:
        await crowd.start("abcd")
        assert crowd.log == ["a", "b"]
        assert semaphore.value == 0
        assert semaphore.statistics() == sync.SemaphoreStatistics(tasks_waiting=2)
        semaphore.release()
        assert semaphore.value == 0  # it went to c, who has not run
        with pytest.raises(WouldBlock):
            semaphore.acquire_nowait()
        await wait_all_tasks_blocked()
        semaphore.release()
        await wait_all_tasks_blocked()
        semaphore.release()
        assert semaphore.value == 1
        semaphore.acquire_nowait()
        assert semaphore.value == 0

    assert with_crowd(lambda _: semaphore.acquire(), body) == ["a", "b", "c", "d"]


def test_semaphore_cancelled_waiter_does_not_use_up_a_permit() -> None:
    semaphore = Semaphore(0)

    async def body(crowd: Crowd) -> None:
        await crowd.start("abc")
        crowd.cancel("a", "b")
        semaphore.release()

    assert with_crowd(lambda _: semaphore.acquire(), body) == ["a cancelled", "b cancelled", "c"]
    assert semaphore.value == 0


def test_semaphore_waiter_cancelled_as_it_wakes_has_its_permit_and_the_count_is_right() -> None:
    semaphore = Semaphore(0)

    async def act(name: str) -> None:
        async with semaphore:
            await checkpoint()

    async def body(crowd: Crowd) -> None:
        await crowd.start("ab")
        semaphore.release()
        crowd.cancel("a")
        await wait_all_tasks_blocked()
        assert semaphore.value == 1

    assert with_crowd(act, body) == ["a cancelled", "b"]


def test_semaphore_acquire_in_a_cancelled_scope_takes_nothing() -> None:
    semaphore = Semaphore(1)

    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel()
            await semaphore.acquire()
        assert scope.cancelled_caught
        assert semaphore.value == 1

    run(main)


def test_semaphore_misuse_raises_and_changes_nothing() -> None:
    for initial, error in ((1.0, TypeError), ("1", TypeError), (-1, ValueError), (inf, TypeError)):
        with pytest.raises(error, match="initial_value"):
            Semaphore(initial)  # type: ignore[arg-type]
    for most, error in ((1.0, TypeError), (1, ValueError)):
        with pytest.raises(error, match="max_value"):
            Semaphore(2, max_value=most)  # type: ignore[arg-type]
    semaphore = Semaphore(1, max_value=1)

    async def main() -> None:
        await refuses(ValueError, r"released too often: its value is max_value, 1", semaphore, semaphore.release)
        semaphore.acquire_nowait()
        await refuses(WouldBlock, "at 0", semaphore, semaphore.acquire_nowait)

    run(main)


def test_semaphore_may_be_used_outside_the_kernel_while_nobody_waits() -> None:
    semaphore = Semaphore(0)
    semaphore.release()
    semaphore.acquire_nowait()
    assert semaphore.value == 0
    with pytest.raises(RuntimeError, match=r"Semaphore.acquire\(\) was used outside the kernel"):
        next(iter(semaphore.acquire()))


# ---- CapacityLimiter ----------------------------------------------------------------------------------


def test_limiter_lends_in_order_and_knows_its_borrowers() -> None:
    limiter = CapacityLimiter(2)

    async def act(name: str) -> None:
        async with limiter:
            if name in "ab":
                await kernel.sleep_forever()

    async def body(crowd: Crowd) -> None:
        await crowd.start("abcd")
        a, b = crowd.tasks["a"], crowd.tasks["b"]
        assert limiter.statistics() == sync.CapacityLimiterStatistics(
            borrowed_tokens=2, total_tokens=2, borrowers=[a, b], tasks_waiting=2
        )
        assert limiter.owners == [a, b]
        assert (limiter.borrowed_tokens, limiter.available_tokens) == (2, 0)
        crowd.cancel("a")
        await wait_all_tasks_blocked()
        assert limiter.owners == [b]
        assert limiter.available_tokens == 1

    assert with_crowd(act, body) == ["a cancelled", "c", "d"]
    assert limiter.borrowed_tokens == 0


def test_limiter_token_granted_to_a_cancelled_waiter_is_passed_on_and_nobody_stays_in_the_row() -> None:
    limiter = CapacityLimiter(1)

    async def act(name: str) -> None:
        async with limiter:
            await checkpoint()

    async def body(crowd: Crowd) -> None:
        async with limiter:
            await crowd.start("abc")
        crowd.cancel("a")  # it has the token and is cancelled at its checkpoint
        crowd.cancel("b")  # it has not, and leaves the row
        await wait_all_tasks_blocked()
        assert limiter.statistics().tasks_waiting == 0
        assert limiter.statistics().borrowers == []
        assert limiter._row == {}
        assert limiter._hoping == set()

    assert with_crowd(act, body) == ["b cancelled", "a cancelled", "c"]


def test_limiter_nowait_between_release_and_wake_does_not_over_grant() -> None:
    limiter = CapacityLimiter(1)

    async def body(crowd: Crowd) -> None:
        limiter.acquire_nowait()
        await crowd.start("a")
        limiter.release()
        with pytest.raises(WouldBlock):
            limiter.acquire_nowait()
        assert limiter.borrowed_tokens == 1

    assert with_crowd(lambda _: limiter.acquire(), body) == ["a"]


def test_limiter_total_may_grow_and_shrink_while_in_use() -> None:
    limiter = CapacityLimiter(1)

    async def body(crowd: Crowd) -> None:
        await crowd.start("abcdef")
        assert crowd.log == ["a"]
        limiter.total_tokens = 3
        assert limiter.borrowed_tokens == 3  # at once
        await wait_all_tasks_blocked()
        assert crowd.log == ["a", "b", "c"]
        limiter.total_tokens = 1
        assert limiter.available_tokens == -2
        limiter.release_on_behalf_of(crowd.tasks["a"])
        limiter.release_on_behalf_of(crowd.tasks["b"])
        assert limiter.borrowed_tokens == 1
        assert limiter.statistics().tasks_waiting == 3
        limiter.release_on_behalf_of(crowd.tasks["c"])
        assert limiter.owners == [crowd.tasks["d"]]
        limiter.total_tokens = inf
        assert limiter.borrowed_tokens == 3
        assert limiter.available_tokens == inf
        limiter.total_tokens = 0
        with pytest.raises(WouldBlock):
            limiter.acquire_nowait()

    assert with_crowd(lambda _: limiter.acquire(), body) == list("abcdef")


def test_limiter_total_of_zero_holds_everybody_up_until_it_grows() -> None:
    limiter = CapacityLimiter(0)

    async def body(crowd: Crowd) -> None:
        await crowd.start("ab")
        assert crowd.log == []
        limiter.total_tokens = 1

    assert with_crowd(lambda _: limiter.acquire(), body) == ["a"]


@pytest.mark.parametrize(
    ("total", "error"), [(1.5, TypeError), (1.0, TypeError), (nan, TypeError), ("1", TypeError), (None, TypeError),
                         (-inf, TypeError), (-1, ValueError)]
)  # fmt: skip
def test_limiter_total_must_be_a_count_or_infinite(total: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="total_tokens must"):
        CapacityLimiter(total)
    limiter = CapacityLimiter(1)
    with pytest.raises(error, match="total_tokens must"):
        limiter.total_tokens = total
    assert limiter.total_tokens == 1
    assert CapacityLimiter(inf).available_tokens == inf


def test_limiter_on_behalf_of_anybody_hashable() -> None:
    limiter = CapacityLimiter(2)

    async def main() -> None:
        await limiter.acquire_on_behalf_of("job 1")
        limiter.acquire_on_behalf_of_nowait(None)
        assert limiter.statistics().borrowers == ["job 1", None]
        assert limiter.owners == []
        with pytest.raises(WouldBlock):
            limiter.acquire_nowait()
        async with open_nursery() as nursery:
            crowd = Crowd(nursery, limiter.acquire_on_behalf_of)
            await crowd.start("xy")
            limiter.release_on_behalf_of("job 1")
            assert limiter.statistics().borrowers == [None, "x"]
            crowd.cancel("y")
        assert crowd.log == ["y cancelled", "x"] or crowd.log == ["x", "y cancelled"]
        limiter.release_on_behalf_of("x")
        limiter.release_on_behalf_of(None)
        assert limiter.borrowed_tokens == 0

    run(main)


def test_limiter_misuse_raises_and_changes_nothing() -> None:
    limiter = CapacityLimiter(1)

    async def main() -> None:
        await refuses(RuntimeError, "gave back a token of .*, but has none", limiter, limiter.release)
        await refuses(RuntimeError, "'job' gave back", limiter, lambda: limiter.release_on_behalf_of("job"))
        await refuses(TypeError, "unhashable", limiter, lambda: limiter.acquire_on_behalf_of([]))
        await refuses(TypeError, "unhashable", limiter, lambda: limiter.acquire_on_behalf_of_nowait([]))
        async with open_nursery() as nursery:
            crowd = Crowd(nursery, lambda _: limiter.acquire_on_behalf_of("job"))
            async with limiter:
                await refuses(RuntimeError, "asked for a second token", limiter, limiter.acquire)
                await refuses(RuntimeError, "asked for a second token", limiter, limiter.acquire_nowait)
                await crowd.start("a")
                # trio would let the second one in, and one token would be lent twice
                waits = "'job' asked for a token of .*, and waits for one already"
                await refuses(RuntimeError, waits, limiter, lambda: limiter.acquire_on_behalf_of("job"))
                await refuses(RuntimeError, waits, limiter, lambda: limiter.acquire_on_behalf_of_nowait("job"))
            await refuses(RuntimeError, "second token", limiter, lambda: limiter.acquire_on_behalf_of("job"))
        limiter.release_on_behalf_of("job")

    run(main)
    assert limiter.borrowed_tokens == 0


def test_limiter_acquire_borrows_for_the_task_that_runs_it_not_for_the_one_that_called_it() -> None:
    limiter = CapacityLimiter(1)

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(limiter.acquire, name="child")
        (borrower,) = limiter.owners
        assert borrower.name == "child"

    run(main)


def test_limiter_acquire_in_a_cancelled_scope_borrows_nothing() -> None:
    limiter = CapacityLimiter(1)

    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel()
            await limiter.acquire()
        assert scope.cancelled_caught
        assert limiter.borrowed_tokens == 0

    run(main)


# ---- Condition ----------------------------------------------------------------------------------------


async def wait_on(condition: Condition) -> None:
    async with condition:
        await condition.wait()


@pytest.mark.parametrize(("n", "woken"), [(0, ""), (1, "a"), (2, "ab"), (9, "abcd"), (inf, "abcd")])
def test_condition_notify_lets_the_first_ones_go(n: float, woken: str) -> None:
    condition = Condition()

    async def body(crowd: Crowd) -> None:
        await crowd.start("abcd")
        assert condition.statistics().tasks_waiting == 4
        async with condition:
            condition.notify(n)
        await wait_all_tasks_blocked()
        assert condition.statistics().tasks_waiting == 4 - len(woken)

    assert with_crowd(lambda _: wait_on(condition), body) == list(woken)
    assert not condition.locked()


def test_condition_notify_all_lets_all_go_one_by_one() -> None:
    condition = Condition()
    inside: list[str] = []

    async def act(name: str) -> None:
        async with condition:
            await condition.wait()
            inside.append(name)
            await checkpoint()
            assert inside[-1] == name

    async def body(crowd: Crowd) -> None:
        await crowd.start("abc")
        async with condition:
            condition.notify_all()

    assert with_crowd(act, body) == ["a", "b", "c"]


def test_condition_notified_waiters_queue_for_the_lock_without_waking() -> None:
    lock = Lock()
    condition = Condition(lock)

    async def body(crowd: Crowd) -> None:
        await crowd.start("ab")
        async with condition:
            first = Crowd(crowd.nursery, lambda _: lock.acquire())
            await first.start("x")
            condition.notify_all()
            for name in "ab":
                assert crowd.tasks[name].state == "sleeping"
                assert crowd.tasks[name].trap is lock
            assert condition.statistics() == sync.ConditionStatistics(
                tasks_waiting=0,
                lock_statistics=sync.LockStatistics(locked=True, owner=current_task(), tasks_waiting=3),
            )
            for _ in range(3):
                await checkpoint()
            assert crowd.log == []
        assert lock.owner is first.tasks["x"]  # it came before those who were notified

    assert with_crowd(lambda _: wait_on(condition), body) == ["a broken", "b broken"]  # x never let go


def test_condition_notify_races_the_cancel_of_the_notified_waiter_and_the_next_one_wakes() -> None:
    condition = Condition()

    async def body(crowd: Crowd) -> None:
        await crowd.start("abc")
        async with condition:
            condition.notify()
            crowd.cancel("a")

    assert with_crowd(lambda _: wait_on(condition), body) == ["a cancelled", "b"]


def test_condition_notifications_of_several_cancelled_waiters_all_reach_somebody() -> None:
    condition = Condition()

    async def body(crowd: Crowd) -> None:
        await crowd.start("abcdef")
        async with condition:
            condition.notify(3)
            crowd.cancel("a", "c", "d")  # two who were notified, and one who was not

    log = with_crowd(lambda _: wait_on(condition), body)
    assert sorted(log) == ["a cancelled", "b", "c cancelled", "d cancelled", "e", "f"]
    assert [name for name in log if "cancelled" not in name] == ["b", "e", "f"]


def test_condition_notification_of_the_last_waiter_is_lost_with_it() -> None:
    condition = Condition()

    async def body(crowd: Crowd) -> None:
        await crowd.start("a")
        async with condition:
            condition.notify()
            crowd.cancel("a")
        await wait_all_tasks_blocked()
        await crowd.start("b")

    assert with_crowd(lambda _: wait_on(condition), body) == ["a cancelled"]
    assert not condition.locked()


def test_condition_waiter_that_has_the_lock_is_not_cancelled_out_of_its_notification() -> None:
    condition = Condition()

    async def body(crowd: Crowd) -> None:
        await crowd.start("ab")
        async with condition:
            condition.notify()
        crowd.cancel("a")  # it owns the lock already

    assert with_crowd(lambda _: wait_on(condition), body) == ["a"]


def test_condition_cancelled_waiter_that_was_not_notified_notifies_nobody() -> None:
    condition = Condition()

    async def body(crowd: Crowd) -> None:
        async with condition:
            await crowd.start("ab")  # they wait for the lock first, and then for a notification
        await wait_all_tasks_blocked()
        crowd.cancel("a")

    assert with_crowd(lambda _: wait_on(condition), body) == ["a cancelled"]


def test_condition_wait_that_ctrl_c_ends_has_the_lock_again() -> None:
    condition = Condition()

    async def body(crowd: Crowd) -> None:
        await crowd.start("a")
        async with condition:
            condition.notify()
            current_kernel().interrupt(crowd.tasks["a"], KeyboardInterrupt())
            await checkpoint()
            assert crowd.log == []

    async def act(name: str) -> None:
        async with condition:
            with pytest.raises(KeyboardInterrupt):
                await condition.wait()
            assert condition._lock.owner is current_task()

    assert with_crowd(act, body) == ["a"]
    assert not condition.locked()


@pytest.mark.parametrize("notified", [False, True])
def test_condition_cancelled_wait_has_the_lock_again_and_keeps_the_original_exception(notified: bool) -> None:
    condition = Condition()
    log: list[object] = []

    async def waiter(scope: CancelScope) -> None:
        with scope:
            async with condition:
                try:
                    await condition.wait()
                except Cancelled as cancelled:
                    log.append((cancelled.reason, condition._lock.owner is current_task(), cancelled.__context__))
                    raise
            raise AssertionError("unreachable: the cancellation passes")
        log.append(scope.cancelled_caught)

    async def main() -> None:
        scope = CancelScope()
        async with open_nursery() as nursery:
            nursery.start_soon(waiter, scope)
            await wait_all_tasks_blocked()
            async with condition:
                if notified:
                    condition.notify()
                scope.cancel("enough")
                for _ in range(3):
                    await checkpoint()
                assert log == []  # it waits for the lock, cancelled or not
                assert condition.statistics().lock_statistics.tasks_waiting == 1
        assert log == [("enough", True, None), True]
        assert not condition.locked()

    run(main)


def test_condition_wait_in_a_cancelled_scope_keeps_the_lock_throughout() -> None:
    condition = Condition()

    async def main() -> None:
        async with open_nursery() as nursery:
            crowd = Crowd(nursery, lambda _: condition.acquire())
            with CancelScope() as scope:
                async with condition:
                    await crowd.start("a")
                    scope.cancel()
                    try:
                        await condition.wait()
                    finally:
                        assert crowd.log == []
                        assert condition._lock.owner is current_task()
            assert scope.cancelled_caught

    run(main)


def test_condition_whose_lock_breaks_tells_those_who_were_notified() -> None:
    """The error leaves `async with condition` as it is: there is no lock to release."""
    condition = Condition()

    async def leaver() -> None:
        await condition.acquire()
        condition.notify()

    async def body(crowd: Crowd) -> None:
        await crowd.start("ab")
        async with open_nursery() as nursery:
            nursery.start_soon(leaver)

    assert with_crowd(lambda _: wait_on(condition), body) == ["a broken"]


def test_condition_cancelled_wait_whose_lock_breaks_says_so() -> None:
    condition = Condition()

    async def body(crowd: Crowd) -> None:
        await crowd.start("a")
        async with open_nursery() as nursery:
            nursery.start_soon(leaver, crowd)

    async def leaver(crowd: Crowd) -> None:
        await condition.acquire()
        crowd.cancel("a")
        await wait_all_tasks_blocked()

    assert with_crowd(lambda _: wait_on(condition), body) == ["a broken"]


def test_condition_misuse_raises_and_changes_nothing() -> None:
    with pytest.raises(TypeError, match="a Condition wants a Lock, not 3"):
        Condition(3)  # type: ignore[arg-type]
    lock = StrictFIFOLock()
    condition = Condition(lock)

    async def main() -> None:
        await refuses(RuntimeError, "tried to wait on .* without holding its lock", condition, condition.wait)
        await refuses(RuntimeError, "tried to notify .* without holding its lock", condition, condition.notify)
        await refuses(RuntimeError, "tried to notify .* without holding its lock", condition, condition.notify_all)
        await refuses(RuntimeError, "nobody holds it", condition, condition.release)
        async with open_nursery() as nursery:
            crowd = Crowd(nursery, lambda _: wait_on(condition))
            await crowd.start("a")
            async with condition:
                assert lock.owner is current_task()
                for n in (-1, 1.5, nan, "1"):
                    bad: Any = n
                    await refuses(ValueError, "n must be", condition, lambda bad=bad: condition.notify(bad))
                await refuses(RuntimeError, "wait for itself", condition, condition.acquire)
                await refuses(RuntimeError, "wait for itself", condition, condition.acquire_nowait)
                condition.notify()
        condition.acquire_nowait()
        assert condition.locked()
        condition.release()

    run(main)


def test_conditions_may_share_a_lock() -> None:
    """The textbook's bounded buffer, with two conditions on one lock."""
    lock = Lock()
    filled, emptied = Condition(lock), Condition(lock)
    buffer: list[int] = []
    got: list[int] = []

    async def put() -> None:
        for item in range(20):
            async with lock:
                while len(buffer) == 3:
                    await emptied.wait()
                buffer.append(item)
                filled.notify()

    async def get() -> None:
        for _ in range(20):
            async with filled:
                while not buffer:
                    await filled.wait()
                got.append(buffer.pop(0))
                emptied.notify()

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(get)
            nursery.start_soon(put)

    run(main)
    assert got == list(range(20))


# ---- Barrier ------------------------------------------------------------------------------------------


def test_barrier_lets_all_go_when_the_last_has_come_each_with_its_number() -> None:
    barrier = Barrier(3)
    numbers: dict[str, int] = {}

    async def act(name: str) -> None:
        numbers[name] = await barrier.wait()

    async def body(crowd: Crowd) -> None:
        await crowd.start("ab")
        assert (crowd.log, barrier.n_waiting) == ([], 2)
        assert barrier.statistics() == sync.BarrierStatistics(parties=3, tasks_waiting=2, broken=False)
        await crowd.start("c")
        assert numbers == {"a": 0, "b": 1, "c": 2}
        assert barrier.n_waiting == 0
        await crowd.start("defg")
        assert numbers == {"a": 0, "b": 1, "c": 2, "d": 0, "e": 1, "f": 2}

    assert with_crowd(act, body) == ["c", "a", "b", "f", "d", "e"]


def test_barrier_one_who_is_back_at_once_waits_in_the_next_round() -> None:
    barrier = Barrier(2)
    rounds: list[tuple[str, int]] = []

    async def act(name: str) -> None:
        for number in range(3):
            await barrier.wait()
            rounds.append((name, number))

    with_crowd(act, lambda crowd: crowd.start("ab"))
    for number in range(3):
        assert sorted(rounds[2 * number : 2 * number + 2]) == [("a", number), ("b", number)]


def test_barrier_cancelled_waiter_leaves_as_if_it_had_not_come() -> None:
    barrier = Barrier(3)
    numbers: dict[str, int] = {}

    async def act(name: str) -> None:
        numbers[name] = await barrier.wait()

    async def body(crowd: Crowd) -> None:
        await crowd.start("ab")
        crowd.cancel("a")
        assert barrier.n_waiting == 1
        assert not barrier.broken
        await crowd.start("c")
        assert numbers == {}
        await crowd.start("d")

    assert with_crowd(act, body) == ["a cancelled", "d", "b", "c"]
    assert numbers == {"b": 0, "c": 1, "d": 2}


def test_barrier_opening_as_a_waiter_is_cancelled_lets_it_through() -> None:
    barrier = Barrier(2)

    async def body(crowd: Crowd) -> None:
        await crowd.start("a")
        assert await barrier.wait() == 1
        crowd.cancel("a")

    assert with_crowd(lambda _: barrier.wait(), body) == ["a"]


def test_barrier_in_a_cancelled_scope_does_not_count() -> None:
    barrier = Barrier(2)

    async def body(crowd: Crowd) -> None:
        await crowd.start("a")
        with CancelScope() as scope:
            scope.cancel()
            await barrier.wait()
        assert scope.cancelled_caught
        assert barrier.n_waiting == 1

    assert with_crowd(lambda _: barrier.wait(), body) == []


def test_barrier_abort_sends_away_who_waits_and_who_comes_until_reset() -> None:
    barrier = Barrier(2)

    async def body(crowd: Crowd) -> None:
        await crowd.start("a")
        barrier.abort()
        assert barrier.broken
        assert barrier.n_waiting == 0
        barrier.abort()
        await crowd.start("b")
        assert crowd.log == ["a broken", "b broken"]
        barrier.reset()
        assert not barrier.broken
        await crowd.start("cd")

    assert with_crowd(lambda _: barrier.wait(), body) == ["a broken", "b broken", "d", "c"]


def test_barrier_reset_sends_away_who_waits_and_begins_anew() -> None:
    barrier = Barrier(2)

    async def body(crowd: Crowd) -> None:
        await crowd.start("a")
        barrier.reset()
        await crowd.start("bc")

    assert with_crowd(lambda _: barrier.wait(), body) == ["a broken", "c", "b"]


def test_barrier_that_opened_is_not_undone_by_abort_or_reset() -> None:
    for undo in (Barrier.abort, Barrier.reset):
        barrier = Barrier(2)

        async def body(crowd: Crowd, barrier: Barrier = barrier, undo: Callable[[Barrier], None] = undo) -> None:
            await crowd.start("a")
            await barrier.wait()
            undo(barrier)

        assert with_crowd(lambda _, barrier=barrier: barrier.wait(), body) == ["a"]


def test_barrier_misuse_raises() -> None:
    for parties, error in ((0, ValueError), (-1, ValueError), (1.0, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="parties"):
            Barrier(parties)  # type: ignore[arg-type]
    barrier = Barrier(2)
    barrier.abort()
    barrier.reset()
    with pytest.raises(RuntimeError, match=r"Barrier.wait\(\) was used outside the kernel"):
        next(iter(barrier.wait()))


# ---- all of them --------------------------------------------------------------------------------------

ALL: list[tuple[Callable[[], Any], str]] = [
    (Event, "wait"),
    (Lock, "acquire"),
    (StrictFIFOLock, "acquire"),
    (lambda: Semaphore(1), "acquire"),
    (lambda: CapacityLimiter(1), "acquire"),
    (Condition, "acquire"),
    (lambda: Barrier(1), "wait"),
]
IDS = ["Event", "Lock", "StrictFIFOLock", "Semaphore", "CapacityLimiter", "Condition", "Barrier"]


@pytest.mark.parametrize(("make", "operation"), ALL, ids=IDS)
def test_every_operation_is_a_cancel_point_even_if_it_need_not_block(make: Callable[[], Any], operation: str) -> None:
    thing = make()
    if isinstance(thing, Event):
        thing.set()

    async def main() -> None:
        before = repr(thing)
        with CancelScope() as scope:
            scope.cancel()
            await getattr(thing, operation)()
            raise AssertionError("unreachable")
        assert scope.cancelled_caught
        assert repr(thing) == before

    run(main)


@pytest.mark.parametrize(("make", "operation"), ALL, ids=IDS)
def test_no_operation_starves_others_and_what_it_took_it_has_while_they_run(
    make: Callable[[], Any], operation: str
) -> None:
    """After a budget's worth it lets the others run. A cancellation meanwhile comes too late for it: it has taken."""
    thing = make()
    if isinstance(thing, Event):
        thing.set()
    free = repr(thing)
    seen: list[str] = []

    async def other(scope: CancelScope) -> None:
        seen.append(repr(thing))
        scope.cancel()

    async def main() -> None:
        async with open_nursery() as nursery:
            with CancelScope() as scope:
                nursery.start_soon(other, scope)
                used = 0
                while not seen and used < 2 * BUDGET:
                    if operation == "acquire" and used:
                        thing.release()
                    used += 1
                    await getattr(thing, operation)()
            assert used == BUDGET + 1
            if operation == "acquire":
                assert not scope.cancelled_caught
                assert seen == [repr(thing)] != [free]
                thing.release()
        assert repr(thing) == free

    run(main)


@pytest.mark.parametrize("what", ["semaphore", "limiter", "total_tokens", "abort", "reset"])
def test_what_would_wake_tasks_of_another_threads_kernel_raises_and_changes_nothing(what: str) -> None:
    semaphore, limiter, barrier = Semaphore(0), CapacityLimiter(1), Barrier(2)
    errors: list[BaseException] = []
    acts: dict[str, Callable[[], None]] = {
        "semaphore": semaphore.release,
        "limiter": lambda: limiter.release_on_behalf_of("job"),
        "total_tokens": lambda: setattr(limiter, "total_tokens", 5),
        "abort": barrier.abort,
        "reset": barrier.reset,
    }

    def elsewhere() -> None:
        try:
            acts[what]()
        except RuntimeError as error:
            errors.append(error)

    async def main() -> None:
        limiter.acquire_on_behalf_of_nowait("job")
        async with open_nursery() as nursery:
            for wait in (semaphore.acquire, limiter.acquire, barrier.wait):
                nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            before = [repr(thing) for thing in (semaphore, limiter, barrier)]
            thread = Thread(target=elsewhere)
            thread.start()
            thread.join(30)
            assert [repr(thing) for thing in (semaphore, limiter, barrier)] == before
            nursery.cancel_scope.cancel()

    run(main)
    assert "outside the kernel" in str(errors[0])


@pytest.mark.parametrize("make", [make for make, _ in ALL], ids=IDS)
def test_statistics_are_frozen(make: Callable[[], Any]) -> None:
    statistics = make().statistics()
    with pytest.raises(dataclasses.FrozenInstanceError):
        statistics.tasks_waiting = 1
    assert statistics.tasks_waiting == 0 if not isinstance(statistics, sync.ConditionStatistics) else True
    assert statistics == make().statistics()


@pytest.mark.parametrize("make", [make for make, _ in ALL], ids=IDS)
def test_all_may_be_referred_to_weakly(make: Callable[[], Any]) -> None:
    thing = make()
    reference = weakref.ref(thing)
    assert reference() is thing
    gc.disable()
    try:
        del thing
        assert reference() is None  # no reference cycle
    finally:
        gc.enable()


def test_reprs_show_the_state() -> None:
    def shown(thing: object) -> str:
        return repr(thing).replace(f" at {id(thing):#x}", "")

    async def main() -> None:
        event, lock, semaphore, limiter = Event(), Lock(), Semaphore(1, max_value=3), CapacityLimiter(1)
        condition, barrier = Condition(lock), Barrier(3)
        assert shown(event) == "<Event, not set>"
        assert shown(lock) == "<Lock, free>"
        assert shown(StrictFIFOLock()) == "<StrictFIFOLock, free>"
        assert shown(semaphore) == "<Semaphore, 1 of 3 free>"
        assert shown(Semaphore(2)) == "<Semaphore, 2 free>"
        assert shown(limiter) == "<CapacityLimiter, 0 of 1 borrowed>"
        assert shown(condition) == f"<Condition, with {lock!r}>"
        async with lock, semaphore, limiter, open_nursery() as nursery:
            assert shown(lock) == "<Lock, held by 'main'>".replace("main", current_task().name)
            for wait in (event.wait, lock.acquire, semaphore.acquire, limiter.acquire, barrier.wait):
                nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            assert shown(event) == "<Event, not set, 1 waiting>"
            assert shown(lock) == f"<Lock, held by {current_task().name!r}, 1 waiting>"
            assert shown(semaphore) == "<Semaphore, 0 of 3 free, 1 waiting>"
            assert shown(limiter) == "<CapacityLimiter, 1 of 1 borrowed, 1 waiting>"
            assert repr(barrier).endswith(", 1 of 3 have come>")
            nursery.cancel_scope.cancel()
        event.set()
        barrier.abort()
        assert shown(event) == "<Event, set>"
        assert repr(barrier).endswith(", broken>")
        assert repr(barrier).startswith("<Barrier at ")

    run(main)


def test_a_sleeping_task_leads_a_report_to_what_it_waits_for_and_to_the_owner() -> None:
    lock, limiter, condition, event = Lock(), CapacityLimiter(1), Condition(), Event()
    waits: dict[str, Callable[[], Any]] = {
        "l": lock.acquire,
        "m": limiter.acquire,
        "c": lambda: wait_on(condition),
        "e": event.wait,
    }

    async def body(crowd: Crowd) -> None:
        async with lock, limiter:
            await crowd.start("lmce")
            on: dict[str, Any] = {name: crowd.tasks[name].trap.on for name in "lmce"}  # type: ignore[union-attr]
            assert on == {"l": lock, "m": limiter, "c": condition, "e": event}
            assert on["l"].owner is current_task()
            assert on["m"].owners == [current_task()]
            async with condition:
                condition.notify()
                assert crowd.tasks["c"].trap.on.owner is current_task()  # type: ignore[union-attr]
            assert repr(lock) in repr(crowd.tasks["l"])

    with_crowd(lambda name: waits[name](), body)


def test_two_tasks_with_two_locks_are_reported_as_a_deadlock() -> None:
    one, two = Lock(), Lock()

    async def take(first: Lock, second: Lock) -> None:
        async with first:
            await checkpoint()
            async with second:
                pass

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(take, one, two, name="left")
            nursery.start_soon(take, two, one, name="right")

    with pytest.raises(kernel.Deadlock) as caught:
        run(main)
    assert "'left' waits for <Lock" in str(caught.value)
    assert "held by 'right'" in str(caught.value)


def test_all_of_them_in_generator_style() -> None:
    event, lock, semaphore, limiter = Event(), Lock(), Semaphore(1), CapacityLimiter(1)
    condition, barrier = Condition(lock), Barrier(2)
    log: list[str] = []

    def partner() -> Generator[Any, Any, None]:
        yield from lock.acquire()
        yield from condition.wait()
        log.append("notified")
        lock.release()
        log.append(f"barrier {(yield from barrier.wait())}")
        event.set()

    def body(nursery: Nursery) -> Generator[Any, Any, None]:
        nursery.start_soon(partner)
        yield from wait_all_tasks_blocked()
        yield from condition.acquire()
        condition.notify()
        condition.release()
        yield from semaphore.acquire()
        semaphore.release()
        yield from limiter.acquire()
        limiter.release()
        yield from wait_all_tasks_blocked()
        log.append(f"barrier {(yield from barrier.wait())}")
        yield from event.wait()
        log.append("event")

    def in_block(_: None) -> Generator[Any, Any, str]:
        assert lock.locked()
        yield from checkpoint()
        return "held"

    def main() -> Generator[Any, Any, None]:
        yield from kernel.within(open_nursery(), body)
        log.append((yield from kernel.within(lock, in_block)))
        assert not lock.locked()

    kernel.run(main)
    assert log == ["notified", "barrier 1", "barrier 0", "event", "held"]


@pytest.mark.parametrize("make", [make for make, _ in ALL[1:6]], ids=IDS[1:6])
def test_async_with_releases_whatever_the_block_ends_with(make: Callable[[], Any]) -> None:
    thing = make()
    before = repr(thing)

    async def main() -> None:
        async with thing as value:
            assert value is None
            assert repr(thing) != before
        assert repr(thing) == before
        with pytest.raises(ValueError, match="the block's"):
            async with thing:
                raise ValueError("the block's")
        with CancelScope() as scope:
            async with thing:
                scope.cancel()
                await checkpoint()
        assert scope.cancelled_caught
        assert repr(thing) == before

    run(main)


class BrokenClock(MockClock):
    """Breaks the kernel as soon as that has nothing to do."""

    def deadline_to_sleep_time(self, deadline: float) -> float:
        raise OSError("the clock has stopped")


@pytest.mark.parametrize("make", [make for make, _ in ALL[1:6]], ids=IDS[1:6])
def test_a_crashed_run_throws_its_tasks_away_without_complaints_about_locks(make: Callable[[], Any]) -> None:
    """Their `async with` blocks are closed outside the kernel: there is nobody to release to, and no noise."""
    thing = make()

    async def main() -> None:
        async with thing:
            await kernel.sleep_forever()

    with pytest.raises(kernel.KernelInternalError):
        kernel.run(main, clock=BrokenClock())
    gc.collect()  # an error in __aexit__ would be a warning here
