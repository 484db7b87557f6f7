"""Locks, semaphores, limiters, events, conditions, barriers: all schedules of two or three tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from explored.scenes import Scene, committed, explored, large

import kernel
from kernel.lowlevel import Task, checkpoint, current_task


class Books(Scene):
    """Who is in `acquire`, in the order in which they came, and who holds what it got there."""

    def __init__(self) -> None:
        self.asking: list[Task] = []
        self.holding: list[Task] = []

    async def _acquire(self, primitive: Any) -> None:
        self.asking.append(current_task())
        try:
            await primitive.acquire()
            before_us = self.asking[: self.asking.index(current_task())]
            assert not any(task.trap is not None for task in before_us), "overtaken"
            self.holding.append(current_task())
        finally:
            self.asking.remove(current_task())

    def _acquire_nowait(self, primitive: Any) -> bool:
        try:
            primitive.acquire_nowait()
        except kernel.WouldBlock:
            return False
        self.holding.append(current_task())
        return True

    def _release(self, primitive: Any) -> None:
        self.holding.remove(current_task())
        primitive.release()

    @asynccontextmanager
    async def _held(self, primitive: Any) -> AsyncIterator[None]:
        await self._acquire(primitive)
        try:
            yield
        finally:
            self._release(primitive)

    def waiting(self) -> list[Task]:
        return [task for task in self.asking if task.trap is not None]

    def given(self) -> list[Task]:
        """Who was given what it asked for, and does not know it yet."""
        return [task for task in self.asking if committed(task)]

    def owners(self) -> list[Task]:
        return self.holding + self.given()

    def check_order(self) -> None:
        """First come, first served: nobody is given anything while one who came before it waits."""
        waiting, given = self.waiting(), self.given()
        assert [task for task in self.asking if task in waiting or task in given] == given + waiting


# ---- Lock -------------------------------------------------------------------------------------------


class OneLock(Books):
    lock_type = kernel.Lock

    def __init__(self) -> None:
        super().__init__()
        self.lock = self.lock_type()

    async def _use(self) -> None:
        async with self._held(self.lock):
            assert self.holding == [current_task()]
            await checkpoint()

    def between_steps(self) -> None:
        owner = self.lock.owner
        assert self.owners() == ([] if owner is None else [owner])
        assert self.lock.statistics().tasks_waiting == len(self.waiting())
        assert owner is not None or not self.waiting()
        self.check_order()

    def at_the_end(self) -> None:
        self.between_steps()
        assert not self.lock.locked()


class TwoAtALock(OneLock):
    async def ann(self) -> None:
        await self._use()
        await self._use()

    async def ben(self) -> None:
        await self._use()
        await self._use()


class ThreeAtALock(OneLock):
    async def ann(self) -> None:
        await self._use()

    async def ben(self) -> None:
        await self._use()

    async def cleo(self) -> None:
        async with self._held(self.lock):
            pass


class ThreeAtAFIFOLock(ThreeAtALock):
    lock_type = kernel.StrictFIFOLock


class OneWhoDoesNotWait(OneLock):
    async def ann(self) -> None:
        await self._use()

    async def ben(self) -> None:
        await self._use()

    async def nora(self) -> None:
        if self._acquire_nowait(self.lock):
            self.between_steps()
            self._release(self.lock)


class OwnerWhoEnds(OneLock):
    """Ends without releasing. Who waits then, or comes later, is told; who had the lock before, has had it."""

    broken = False

    async def ann(self) -> None:
        await self._acquire(self.lock)
        self.broken = True

    async def ben(self) -> None:
        with suppress(kernel.BrokenResourceError):
            await self._use()

    async def cleo(self) -> None:
        with suppress(kernel.BrokenResourceError):
            await self._use()

    def between_steps(self) -> None:
        if not self.broken:
            super().between_steps()

    def at_the_end(self) -> None:
        assert not self.waiting()
        assert self.lock.statistics().tasks_waiting == 0
        assert self.lock.locked() == self.broken


@pytest.mark.parametrize("scene", [TwoAtALock, ThreeAtALock, large(ThreeAtAFIFOLock), OneWhoDoesNotWait, OwnerWhoEnds])
def test_lock_has_one_owner_and_first_come_is_first_served(scene: type[Scene]) -> None:
    explored(scene)


# ---- Semaphore and CapacityLimiter ------------------------------------------------------------------


class OneSemaphore(Books):
    permits = 1

    def __init__(self) -> None:
        super().__init__()
        self.semaphore = kernel.Semaphore(self.permits, max_value=self.permits)

    async def _use(self) -> None:
        async with self._held(self.semaphore):
            assert len(self.holding) <= self.permits
            await checkpoint()

    def between_steps(self) -> None:
        assert self.semaphore.value + len(self.owners()) == self.permits
        assert self.semaphore.statistics().tasks_waiting == len(self.waiting())
        assert self.semaphore.value == 0 or not self.waiting()
        self.check_order()

    def at_the_end(self) -> None:
        self.between_steps()
        assert self.semaphore.value == self.permits


class ThreeAtASemaphore(OneSemaphore):
    async def ann(self) -> None:
        await self._use()

    async def ben(self) -> None:
        await self._use()

    async def cleo(self) -> None:
        await self._use()


class TwoPermits(OneSemaphore):
    permits = 2

    async def ann(self) -> None:
        await self._use()

    async def ben(self) -> None:
        async with self._held(self.semaphore):
            pass

    async def cleo(self) -> None:
        async with self._held(self.semaphore):
            pass


class TwoPermitsForLong(ThreeAtASemaphore):
    permits = 2


class OneWhoTakesWhatLiesThere(OneSemaphore):
    async def ann(self) -> None:
        await self._use()

    async def ben(self) -> None:
        await self._use()

    async def nora(self) -> None:
        if self._acquire_nowait(self.semaphore):
            self.between_steps()
            self._release(self.semaphore)


@pytest.mark.parametrize(
    "scene", [ThreeAtASemaphore, large(TwoPermits), large(TwoPermitsForLong), OneWhoTakesWhatLiesThere]
)
def test_semaphore_neither_makes_nor_loses_a_permit(scene: type[Scene]) -> None:
    explored(scene)


class OneLimiter(Books):
    tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.limiter = kernel.CapacityLimiter(self.tokens)

    async def _use(self) -> None:
        async with self._held(self.limiter):
            await checkpoint()

    async def ann(self) -> None:
        await self._use()

    async def ben(self) -> None:
        await self._use()

    def between_steps(self) -> None:
        statistics = self.limiter.statistics()
        assert set(statistics.borrowers) == set(self.owners())
        assert statistics.tasks_waiting == len(self.waiting())
        assert not self.waiting() or self.limiter.available_tokens <= 0
        assert self.limiter._hoping == set(self.limiter._row.values())
        self.check_order()

    def at_the_end(self) -> None:
        self.between_steps()
        assert self.limiter.borrowed_tokens == 0


class ThreeAtALimiter(OneLimiter):
    async def cleo(self) -> None:
        await self._use()


class LimiterThatChanges(OneLimiter):
    """There is a second token for a while, and then not."""

    async def ben(self) -> None:
        async with self._held(self.limiter):
            pass

    async def manager(self) -> None:
        self.limiter.total_tokens = 2
        await checkpoint()
        self.limiter.total_tokens = 1

    def between_steps(self) -> None:
        super().between_steps()
        assert self.limiter.borrowed_tokens <= 2


class LimiterThatShrinks(OneLimiter):
    """Two have a token when there is only one left. Who comes then must wait for both."""

    tokens = 2

    async def ben(self) -> None:
        async with self._held(self.limiter):
            pass

    async def cleo(self) -> None:
        self.limiter.total_tokens = 1
        async with self._held(self.limiter):
            assert self.limiter.available_tokens == 0


@pytest.mark.parametrize("scene", [ThreeAtALimiter, LimiterThatChanges, LimiterThatShrinks])
def test_limiter_lends_each_token_once_and_gets_it_back(scene: type[Scene]) -> None:
    explored(scene)


# ---- Event ------------------------------------------------------------------------------------------


class TwoAtAnEvent(Scene):
    def __init__(self) -> None:
        self.event = kernel.Event()
        self.passed = 0

    async def ann(self) -> None:
        await self.event.wait()
        self.passed += 1
        await self.event.wait()

    async def ben(self) -> None:
        await self.event.wait()
        self.passed += 1

    async def setter(self) -> None:
        try:
            await checkpoint()
        finally:
            self.event.set()
            self.event.set()

    def between_steps(self) -> None:
        assert self.event.is_set() or not self.passed
        assert not self.event.is_set() or not self.event.statistics().tasks_waiting

    def at_the_end(self) -> None:
        assert self.event.is_set()
        assert not self.event.statistics().tasks_waiting


def test_event_lets_all_go_who_wait_and_who_come_later() -> None:
    explored(TwoAtAnEvent)


# ---- Condition --------------------------------------------------------------------------------------


class OneCondition(Scene):
    """One newspaper, which is read and passed on: a notification that gets lost is a deadlock."""

    def __init__(self) -> None:
        self.condition = kernel.Condition()
        self.there = False
        self.inside: list[Task] = []

    @asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        async with self.condition:
            self.inside.append(current_task())
            try:
                yield
            finally:
                self._check_inside()
                self.inside.remove(current_task())

    def _check_inside(self) -> None:
        assert self.inside == [current_task()]
        assert self.condition.statistics().lock_statistics.owner is current_task()

    async def _read(self) -> None:
        async with self._locked():
            while not self.there:
                self.inside.remove(current_task())
                try:
                    await self.condition.wait()
                finally:
                    self.inside.append(current_task())
                self._check_inside()
            self.condition.notify()

    def between_steps(self) -> None:
        assert len(self.inside) <= 1

    def at_the_end(self) -> None:
        statistics = self.condition.statistics()
        assert not statistics.tasks_waiting
        assert not statistics.lock_statistics.tasks_waiting
        assert not self.condition.locked()


class OneNotification(OneCondition):
    async def ann(self) -> None:
        await self._read()

    async def ben(self) -> None:
        await self._read()

    async def boy(self) -> None:
        with kernel.CancelScope(shield=True):
            async with self._locked():
                self.there = True
                self.condition.notify()
                await checkpoint()


class AllNotified(OneCondition):
    async def ann(self) -> None:
        await self._read()

    async def ben(self) -> None:
        await self._read()

    async def boy(self) -> None:
        with kernel.CancelScope(shield=True):
            async with self._locked():
                self.there = True
                self.condition.notify_all()


@pytest.mark.parametrize("scene", [OneNotification, AllNotified])
def test_condition_loses_no_notification_and_comes_back_with_the_lock(scene: type[Scene]) -> None:
    explored(scene)


# ---- Barrier ----------------------------------------------------------------------------------------


class OneBarrier(Scene):
    """Who is cancelled breaks the barrier, or the others would wait for it for ever."""

    parties = 2

    def __init__(self) -> None:
        self.barrier = kernel.Barrier(self.parties)
        self.places: list[int] = []

    async def _wait(self, times: int) -> None:
        try:
            for _ in range(times):
                self.places.append(await self.barrier.wait())
        except kernel.Cancelled:
            self.barrier.abort()
            raise
        except kernel.BrokenResourceError:
            assert self.barrier.broken

    def between_steps(self) -> None:
        assert self.barrier.n_waiting < self.parties
        assert not self.barrier.broken or not self.barrier.n_waiting

    def at_the_end(self) -> None:
        assert self.barrier.n_waiting == 0
        if not self.barrier.broken:
            for index in range(self.parties):
                assert self.places.count(index) * self.parties == len(self.places)


class TwoLaps(OneBarrier):
    async def ann(self) -> None:
        await self._wait(2)

    async def ben(self) -> None:
        await self._wait(2)


class ThreeAtABarrier(OneBarrier):
    parties = 3

    async def ann(self) -> None:
        await self._wait(1)

    async def ben(self) -> None:
        await self._wait(1)

    async def cleo(self) -> None:
        await self._wait(1)


@pytest.mark.parametrize("scene", [TwoLaps, ThreeAtABarrier])
def test_barrier_lets_all_parties_go_together(scene: type[Scene]) -> None:
    explored(scene)
