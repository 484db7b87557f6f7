"""Nurseries and what is built on them, parking lots, timeouts: all schedules, and the kernel's books between steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import invariants
import pytest
from explored.scenes import Scene, committed, explored

import kernel
from kernel.core.task import Task, here
from kernel.lowlevel import ParkingLot, checkpoint, current_task


class Booked(Scene):
    """A scene in which the kernel's books are checked between any two steps."""

    def between_steps(self) -> None:
        running = here.kernel
        assert running is not None
        ready = [task for task in invariants.tasks_of(running) if task.trap is None]
        assert len(running.ready) == len(ready)
        wrong = list(invariants.check(running, ready))
        assert not wrong, wrong


async def _never() -> None:
    """Sleeps until it is cancelled. If nobody does so, that is a deadlock, which `sleep_forever` would not be."""
    await kernel.Event().wait()


# ---- ParkingLot -------------------------------------------------------------------------------------


class OneLot(Booked):
    def __init__(self) -> None:
        self.lot = ParkingLot("the lot")
        self.parked: list[Task] = []
        self.over = False

    async def _park(self) -> None:
        if not self.over:
            self.parked.append(current_task())
            try:
                await self.lot.park()
            finally:
                self.parked.remove(current_task())

    async def ann(self) -> None:
        await self._park()

    async def ben(self) -> None:
        await self._park()

    def between_steps(self) -> None:
        super().between_steps()
        asleep = [task for task in self.parked if task.trap is not None]
        assert list(self.lot._parked) == asleep, "not in the order in which they came"

    def at_the_end(self) -> None:
        assert not self.lot


class LetGo(OneLot):
    """Who is let go is the first, and is not cancelled any more."""

    async def keeper(self) -> None:
        try:
            await checkpoint()
        finally:
            self.over = True
            first, gone = list(self.lot._parked)[:1], self.lot.unpark()
            assert gone == first
            assert all(committed(task) for task in gone)
            self.lot.unpark_all()


class Reparked(OneLot):
    """They go on sleeping, in another lot."""

    def __init__(self) -> None:
        super().__init__()
        self.other = ParkingLot("the other lot")

    async def keeper(self) -> None:
        try:
            self.lot.repark_all(self.other)
            await checkpoint()
        finally:
            self.over = True
            self.lot.unpark_all()
            self.other.unpark_all()

    def between_steps(self) -> None:
        Booked.between_steps(self)
        asleep = {task for task in self.parked if task.trap is not None}
        assert {*self.lot._parked, *self.other._parked} == asleep

    def at_the_end(self) -> None:
        assert not self.lot
        assert not self.other


class Broken(OneLot):
    async def ann(self) -> None:
        with suppress(kernel.BrokenResourceError):
            await self._park()

    async def ben(self) -> None:
        with suppress(kernel.BrokenResourceError):
            await self._park()

    async def keeper(self) -> None:
        kernel.lowlevel.add_parking_lot_breaker(current_task(), self.lot)
        await checkpoint()


@pytest.mark.parametrize("scene", [LetGo, Reparked, Broken])
def test_parking_lot_lets_the_first_go_and_forgets_who_left(scene: type[Scene]) -> None:
    explored(scene)


# ---- nurseries --------------------------------------------------------------------------------------


class OneNursery(Booked):
    """The block ends when its children have, with all that they raised."""

    def __init__(self) -> None:
        self.begun = self.ended = 0
        self.caught: list[str] = []

    async def _child(self, steps: int = 1, error: type[Exception] | None = None) -> None:
        self.begun += 1
        try:
            for _ in range(steps):
                await checkpoint()
            if error is not None:
                raise error
        finally:
            self.ended += 1

    def at_the_end(self) -> None:
        assert self.begun == self.ended


class TwoChildrenOneFails(OneNursery):
    async def ann(self) -> None:
        try:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(self._child, 2)
                nursery.start_soon(self._child, 1, KeyError)
        except* KeyError:
            self.caught.append("KeyError")
        assert self.begun == self.ended == 2


class BothFail(OneNursery):
    async def ann(self) -> None:
        try:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(self._child, 1, KeyError)
                nursery.start_soon(self._child, 1, ValueError)
        except* (KeyError, ValueError) as group:
            self.caught += [type(error).__name__ for error in group.exceptions]
        assert self.caught
        assert self.begun == self.ended == 2


class NestedAndCancelled(OneNursery):
    """Somebody else cancels the inner nursery; the outer one goes on."""

    async def ann(self) -> None:
        async with kernel.open_nursery() as outer:
            outer.start_soon(self._child)
            async with kernel.open_nursery() as inner:
                inner.start_soon(self._child, 2)
                inner.start_soon(self._canceller, inner.cancel_scope)
            if not outer.cancel_scope.cancel_called:
                outer.start_soon(self._child, 0)
        assert self.begun == self.ended

    async def _canceller(self, scope: kernel.CancelScope) -> None:
        scope.cancel()


class ChildStartedWithStart(OneNursery):
    """`start` returns when the child is up, or raises what it failed with. No child runs after its nursery's end."""

    fails: type[Exception] | None = None
    patience: kernel.CancelScope | None = None
    too_late = False

    async def ann(self) -> None:
        async with kernel.open_nursery() as nursery:
            with suppress(OSError):
                assert await nursery.start(self._serve) == "up"
                assert self.begun == 1
                nursery.cancel_scope.cancel()
        assert self.begun == self.ended

    async def _get_ready(self) -> None:
        await checkpoint()

    async def _serve(self, *, task_status: Any) -> None:
        self.begun += 1
        try:
            await self._get_ready()
            if self.fails is not None:
                raise self.fails
            with kernel.CancelScope():
                self.too_late = self.patience is not None and self.patience.cancel_called
                task_status.started("up")
                await _never()
        finally:
            self.ended += 1


class ChildThatFailsToStart(ChildStartedWithStart):
    fails = OSError


class StartFromElsewhere(ChildStartedWithStart):
    """The nursery is ann's, `start` is called by ben: either of them may be cancelled, or the nursery closed."""

    def __init__(self) -> None:
        super().__init__()
        self.nursery: kernel.Nursery | None = None

    async def ann(self) -> None:
        async with kernel.open_nursery() as self.nursery:
            await checkpoint()
            self.nursery.cancel_scope.cancel()
        assert self.begun == self.ended

    async def ben(self) -> None:
        if self.nursery is not None:
            with suppress(RuntimeError):  # it is closed
                await self.nursery.start(self._serve)


class StartThatIsCancelled(ChildStartedWithStart):
    """A `start` that is cancelled leaves no child behind, though the nursery goes on.

    Also if the cancellation comes when the child cannot be stopped any more before it calls `started()`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ready = kernel.Event()

    async def _get_ready(self) -> None:
        await self.ready.wait()

    async def ann(self) -> None:
        over = kernel.Event()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(self._caller, nursery, over)
            await over.wait()
            nursery.cancel_scope.cancel()

    async def _caller(self, nursery: kernel.Nursery, over: kernel.Event) -> None:
        try:
            with kernel.CancelScope() as self.patience:
                await nursery.start(self._serve)
                assert not self.too_late, "the caller was cancelled, and the child goes on"
            if self.patience.cancelled_caught:
                assert self.begun == self.ended, "a child of which nobody knows"
        finally:
            over.set()

    async def canceller(self) -> None:
        self.ready.set()
        if self.patience is not None:
            self.patience.cancel()


@pytest.mark.parametrize(
    "scene",
    [
        TwoChildrenOneFails,
        BothFail,
        NestedAndCancelled,
        ChildStartedWithStart,
        ChildThatFailsToStart,
        StartFromElsewhere,
        StartThatIsCancelled,
    ],
)
def test_nursery_ends_with_its_children_and_all_errors_arrive(scene: type[Scene]) -> None:
    explored(scene, children=scene in (TwoChildrenOneFails, BothFail))


class OneJoined(OneNursery):
    """A handle gives each joiner what the child came to."""

    handle: Any = None

    async def ann(self) -> None:
        async with kernel.open_nursery() as nursery:
            self.handle = handle = nursery.spawn(self._result)
            nursery.start_soon(self._join, handle)
            await self._join(handle)
        assert handle.done

    async def _result(self) -> int:
        await self._child()
        return 7

    async def ben(self) -> None:
        if self.handle is not None:
            self.handle.cancel()

    async def _join(self, handle: Any) -> None:
        try:
            assert await handle == 7
        except kernel.TaskCancelled:
            assert handle.cancel_scope.cancelled_caught
        assert handle.done


def test_handle_gives_each_joiner_the_result() -> None:
    explored(OneJoined)


class OneService(OneNursery):
    """The services end after their clients, the last one first, whoever is cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    async def ann(self) -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_service_soon(self._serve, "first")
            nursery.start_service_soon(self._serve, "second")
            nursery.start_soon(self._client)

    async def _serve(self, name: str) -> None:
        try:
            await _never()
        finally:
            self.log.append(name)

    async def _client(self) -> None:
        try:
            await checkpoint()
        finally:
            assert not self.log
            self.log.append("client")

    def at_the_end(self) -> None:
        assert self.log in ([], ["client", "second", "first"])


def test_services_end_after_their_clients_and_the_last_one_first() -> None:
    explored(OneService)


# ---- several calls at once --------------------------------------------------------------------------


class Gathered(OneNursery):
    async def ann(self) -> None:
        assert await kernel.gather(partial(self._give, 1), partial(self._give, 2)) == [1, 2]

    async def _give(self, number: int) -> int:
        await self._child(number - 1)
        return number


class Raced(Gathered):
    async def ann(self) -> None:
        assert await kernel.race(partial(self._give, 1), partial(self._give, 2)) in (1, 2)


class RacedByOthers(Gathered):
    async def ann(self) -> None:
        assert await kernel.race(partial(self._give, 1), self._fail, _never) == 1

    async def _fail(self) -> int:
        raise OSError


class Completed(Gathered):
    async def ann(self) -> None:
        async with kernel.as_completed([partial(self._give, 1), partial(self._give, 2)]) as results:
            assert sorted([result async for result in results]) == [1, 2]


class LeftEarly(Gathered):
    async def ann(self) -> None:
        async with kernel.as_completed([partial(self._give, 1), _never]) as results:
            async for _ in results:
                break
        assert self.begun == self.ended


class Mapped(Gathered):
    limit = 2

    async def ann(self) -> None:
        assert await kernel.map_concurrently(self._give, [2, 2], limit=self.limit) == [2, 2]

    def between_steps(self) -> None:
        super().between_steps()
        assert self.begun - self.ended <= self.limit


class MappedOneByOne(Mapped):
    limit = 1


@pytest.mark.parametrize("scene", [Gathered, Raced, RacedByOthers, Completed, LeftEarly, Mapped, MappedOneByOne])
def test_calls_made_at_once_all_end_before_the_call_returns(scene: type[Scene]) -> None:
    explored(scene)


# ---- timeouts ---------------------------------------------------------------------------------------


class OneTimeout(Booked):
    """The time is up at any moment, also in that in which the work is done. One of the two has happened, not both."""

    scope: Callable[[float], kernel.CancelScope] = kernel.move_on_after

    def __init__(self) -> None:
        self.event = kernel.Event()

    async def ann(self) -> None:
        done = False
        with type(self).scope(1) as patience:
            await self.event.wait()
            done = True
        assert done != patience.cancelled_caught
        await checkpoint()

    async def ben(self) -> None:
        await checkpoint()
        self.event.set()

    def at_the_end(self) -> None:
        assert not self.event.statistics().tasks_waiting


class TooSlow(OneTimeout):
    async def ann(self) -> None:
        done = False
        try:
            with kernel.fail_after(1):
                await self.event.wait()
                done = True
        except kernel.TooSlowError:
            assert not done
        else:
            assert done


class Nested(OneTimeout):
    async def ann(self) -> None:
        with kernel.move_on_after(1) as outer:
            with kernel.move_on_after(2) as inner:
                await self.event.wait()
            assert not inner.cancelled_caught or outer.cancel_called or kernel.current_time() >= 2
            with kernel.CancelScope(shield=True), kernel.move_on_after(2):
                await checkpoint()


class CancelledBeforeItsTime(OneTimeout):
    """By hand, or by the clock: there is one reason, and no timer is left."""

    async def ann(self) -> None:
        with kernel.move_on_after(1) as self.patience:
            await kernel.sleep_forever()
        assert self.patience.cancelled_caught
        await kernel.sleep(2)

    patience: kernel.CancelScope | None = None

    async def ben(self) -> None:
        if self.patience is not None:
            self.patience.cancel()


@pytest.mark.parametrize("scene", [OneTimeout, TooSlow, Nested, CancelledBeforeItsTime])
def test_timeout_either_happens_or_does_not(scene: type[Scene]) -> None:
    explored(scene, deadlines="any time")
