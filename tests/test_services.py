"""Service tasks: they live while ordinary children do, end in reverse order, and are sheltered until then."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import pytest
from invariants import CheckedReadyQueue, NoFiles

import kernel
from kernel import Cancelled, cleanup
from kernel.interrupts import currently_ki_protected
from kernel.lowlevel import checkpoint, current_task
from kernel.testing import MockClock, wait_all_tasks_blocked

Virtual = Callable[..., Any]
Log = list[tuple[str, float]]


@pytest.fixture
def checked() -> Callable[..., Any]:
    """Run in virtual time, with the kernel's books checked before each step."""

    def run(async_fn: Callable[..., Any], *args: Any) -> Any:
        queue = CheckedReadyQueue()
        try:
            return kernel.run(async_fn, *args, clock=MockClock(autojump_threshold=0), ready=queue, poller=NoFiles())
        finally:
            queue.finish()

    return run


async def live(
    log: Log, name: str, lasts: float = 1, task_status: Any = kernel.TASK_STATUS_IGNORED, up: float = 0
) -> None:
    """Live until cancelled, and take some time to leave."""
    log.append((f"{name} begins", kernel.current_time()))
    try:
        await kernel.sleep(up)
        task_status.started(name)
        await kernel.sleep_forever()
    finally:
        with cleanup(100):
            await kernel.sleep(lasts)
        log.append((f"{name} ends", kernel.current_time()))


def test_services_live_while_the_body_and_ordinary_children_do_and_end_in_reverse_order(checked: Virtual) -> None:
    log: Log = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_service_soon(live, log, "pool")
            nursery.start_service_soon(live, log, "cache")
            nursery.start_soon(kernel.sleep, 5)
            await kernel.sleep(3)
        log.append(("out", kernel.current_time()))

    checked(main)
    assert log == [("pool begins", 0), ("cache begins", 0), ("cache ends", 6), ("pool ends", 7), ("out", 7)]


def test_a_nursery_with_nothing_but_services_ends(checked: Virtual) -> None:
    async def main() -> str:
        async with kernel.open_nursery() as nursery:
            nursery.start_service_soon(kernel.sleep_forever)
            nursery.start_service_soon(kernel.sleep, 0)
        return "ended"

    assert checked(main) == "ended"


def test_cancellation_from_outside_reaches_the_clients_first(checked: Virtual) -> None:
    log: Log = []

    async def main() -> None:
        with kernel.move_on_after(3) as scope:
            async with kernel.open_nursery() as nursery:
                nursery.start_service_soon(live, log, "service")
                nursery.start_soon(live, log, "client", 2)
        assert scope.cancelled_caught

    checked(main)
    assert log[2:] == [("client ends", 5), ("service ends", 6)]


@pytest.mark.parametrize("who", ["nursery.cancel", "a client fails", "the body fails"])
def test_however_the_clients_end_the_services_end_after_them(who: str, checked: Virtual) -> None:
    log: Log = []

    async def fail() -> None:
        await kernel.sleep(3)
        raise ValueError

    async def main() -> None:
        try:
            async with kernel.open_nursery() as nursery:
                nursery.start_service_soon(live, log, "service")
                nursery.start_soon(live, log, "client", 2)
                if who == "a client fails":
                    nursery.start_soon(fail)
                elif who == "the body fails":
                    await fail()
                else:
                    await kernel.sleep(3)
                    nursery.cancel()
        except* ValueError as group:
            log.append((f"{len(group.exceptions)} error", 0))

    checked(main)
    assert log[2:] == [("client ends", 5), ("service ends", 6)] + ([] if "cancel" in who else [("1 error", 0)])


def test_a_failing_service_cancels_its_clients_and_its_error_arrives(checked: Virtual) -> None:
    log: Log = []

    async def fail() -> None:
        await kernel.sleep(3)
        raise ValueError("service")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_service_soon(live, log, "other service")
            nursery.start_service_soon(fail)
            nursery.start_soon(live, log, "client", 2)

    with pytest.raises(ExceptionGroup) as caught:
        checked(main)
    assert [str(error) for error in caught.value.exceptions] == ["service"]
    assert log[2:] == [("client ends", 5), ("other service ends", 6)]


def test_errors_of_clients_and_of_services_at_their_end_arrive_in_one_flat_group(checked: Virtual) -> None:
    log: list[str] = []

    async def service(name: str) -> None:
        try:
            await kernel.sleep_forever()
        finally:
            log.append(name)
            raise KeyError(name)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_service_soon(service, "first")
            nursery.start_service_soon(service, "second")
            await wait_all_tasks_blocked()
            raise ValueError("body")

    with pytest.raises(ExceptionGroup) as caught:
        checked(main)
    assert [str(error) for error in caught.value.exceptions] == ["body", "'second'", "'first'"]
    assert log == ["second", "first"]


def test_a_service_that_ends_early_and_well_is_no_matter(checked: Virtual) -> None:
    async def main() -> float:
        async with kernel.open_nursery() as nursery:
            nursery.start_service_soon(kernel.sleep, 1)
            await kernel.sleep(5)
            nursery.start_service_soon(kernel.sleep, 1)
        return kernel.current_time()

    assert checked(main) == 5


def test_a_service_may_start_children_and_services(checked: Virtual) -> None:
    log: Log = []

    async def service(nursery: kernel.Nursery) -> None:
        nursery.start_soon(kernel.sleep, 5)
        nursery.start_service_soon(live, log, "second")
        await live(log, "first")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_service_soon(service, nursery)
            await checkpoint()

    checked(main)
    assert log[2:] == [("second ends", 6), ("first ends", 7)]


def test_nothing_is_started_any_more_once_the_clients_have_ended(checked: Virtual) -> None:
    log: list[str] = []

    async def service(nursery: kernel.Nursery) -> None:
        try:
            await kernel.sleep_forever()
        finally:
            for start in (nursery.start_soon, nursery.spawn, nursery.start_service_soon):
                with pytest.raises(RuntimeError, match="closed"):
                    start(kernel.sleep, 1)
            with cleanup(1), pytest.raises(RuntimeError, match="closed"):
                await nursery.start_service(live)
            log.append("refused")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_service_soon(service, nursery)

    checked(main)
    assert log == ["refused"]


def test_a_grace_reaches_services_whether_they_wait_for_their_clients_or_clean_up(checked: Virtual) -> None:
    log: Log = []

    async def main() -> None:
        with kernel.CancelScope() as scope:
            async with kernel.open_nursery() as nursery:
                nursery.start_service_soon(live, log, "service", 50)
                nursery.start_soon(live, log, "client", 2)
                await kernel.sleep(1)
                scope.cancel(grace=4)

    checked(main)
    assert log[2:] == [("client ends", 3), ("service ends", 5)]


def test_the_grace_of_nursery_cancel_counts_for_its_services_too(checked: Virtual) -> None:
    log: Log = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_service_soon(live, log, "first", 50)
            nursery.start_service_soon(live, log, "second", 50)
            nursery.start_soon(live, log, "client", 2)
            await kernel.sleep(1)
            nursery.cancel(grace=4)

    checked(main)
    assert log[3:] == [("client ends", 3), ("second ends", 5), ("first ends", 5)]


def test_the_grace_reaches_a_cleanup_that_a_service_is_in_when_its_turn_comes(checked: Virtual) -> None:
    async def service() -> None:
        with cleanup(50):
            await kernel.sleep(100)

    async def main() -> float:
        async with kernel.open_nursery() as nursery:
            nursery.start_service_soon(service)
            await kernel.sleep(1)
            nursery.cancel(grace=4)
        return kernel.current_time()

    assert checked(main) == 5


def test_the_first_service_may_be_started_when_all_is_cancelled_already(checked: Virtual) -> None:
    log: Log = []

    async def main() -> None:
        with kernel.CancelScope() as scope:
            scope.cancel()
            async with kernel.open_nursery() as nursery:
                nursery.start_service_soon(live, log, "service")
                with cleanup(3):
                    await kernel.sleep(2)
                await checkpoint()
        assert scope.cancelled_caught

    checked(main)
    assert log == [("service begins", 0), ("service ends", 3)]


def test_ctrl_c_strikes_a_service_as_any_other_task(checked: Virtual) -> None:
    log: list[bool] = []

    async def service() -> None:
        await checkpoint()
        log.append(currently_ki_protected())

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_service_soon(service)
            await kernel.sleep(1)

    checked(main)
    assert log == [False]


# ---- start_service -------------------------------------------------------------------------------------


def test_start_service_waits_until_it_is_up(checked: Virtual) -> None:
    log: Log = []

    async def main() -> tuple[Any, float]:
        async with kernel.open_nursery() as nursery:
            value = await nursery.start_service(lambda task_status: live(log, "service", task_status=task_status, up=2))
            return value, kernel.current_time()

    assert checked(main) == ("service", 2)
    assert log == [("service begins", 0), ("service ends", 3)]


def test_a_service_can_be_cancelled_with_its_caller_while_it_comes_up(checked: Virtual) -> None:
    log: Log = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            with kernel.move_on_after(1) as scope:
                await nursery.start_service(lambda task_status: live(log, "service", task_status=task_status, up=2))
            assert scope.cancelled_caught
            await kernel.sleep(10)

    checked(main)
    assert log == [("service begins", 0), ("service ends", 2)]


def test_a_service_that_is_up_is_sheltered_from_that_moment(checked: Virtual) -> None:
    log: list[str] = []

    async def service(task_status: Any) -> None:
        task_status.started()
        scope.cancel()
        await checkpoint()
        log.append("sheltered")
        await kernel.sleep_forever()

    async def main() -> None:
        nonlocal scope
        with scope:
            async with kernel.open_nursery() as nursery:
                with kernel.CancelScope(shield=True):
                    await nursery.start_service(service)
                    await wait_all_tasks_blocked()
                log.append("body")

    scope = kernel.CancelScope()
    checked(main)
    assert log == ["sheltered", "body"]


def test_a_service_whose_start_is_cancelled_already_is_not_sheltered_by_started(checked: Virtual) -> None:
    log: list[str] = []

    async def service(task_status: Any) -> None:
        try:
            await kernel.sleep_forever()
        except Cancelled:
            task_status.started()
            log.append("started")
            await kernel.sleep_forever()

    async def main() -> float:
        async with kernel.open_nursery() as nursery:
            with kernel.move_on_after(1):
                await nursery.start_service(service)
        return kernel.current_time()

    assert checked(main) == 1
    assert log == ["started"]


def test_an_error_before_a_service_is_up_is_raised_as_it_is(checked: Virtual) -> None:
    async def service(task_status: Any) -> None:
        raise ValueError("no port")

    async def main() -> str:
        async with kernel.open_nursery() as nursery:
            with pytest.raises(ValueError, match="no port"):
                await nursery.start_service(service)
            with pytest.raises(RuntimeError, match=r"without calling task_status\.started"):
                await nursery.start_service(lambda task_status: kernel.sleep(0))
        return "well"

    assert checked(main) == "well"


# ---- misuse and disorder -------------------------------------------------------------------------------


def test_what_is_no_service_is_refused_at_the_call(checked: Virtual) -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            with pytest.raises(TypeError, match=r"nursery\.start_service_soon wants an async function"):
                nursery.start_service_soon(3)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="wants an async function"):
                await nursery.start_service(lambda task_status: 3)  # type: ignore[arg-type,return-value]
        with pytest.raises(RuntimeError, match="closed"):
            nursery.start_service_soon(kernel.sleep, 1)
        with pytest.raises(RuntimeError, match="not open yet"):
            kernel.open_nursery().start_service_soon(kernel.sleep, 1)

    checked(main)


def test_services_of_a_nursery_that_its_task_never_left_end_all_the_same(virtual: Virtual) -> None:
    log: Log = []

    async def careless() -> None:
        nursery = kernel.open_nursery()
        await nursery.__aenter__()
        nursery.start_service_soon(live, log, "first")
        nursery.start_service_soon(live, log, "second")
        await wait_all_tasks_blocked()
        nursery.start_service_soon(live, log, "never begun")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(careless)

    with pytest.raises(ExceptionGroup) as caught:
        virtual(main)
    assert caught.group_contains(RuntimeError, match="never left")
    assert {what for what, _ in log if what.endswith("ends")} == {"first ends", "second ends", "never begun ends"}


def test_a_nursery_with_services_that_was_given_up_can_be_left_late_and_in_vain(virtual: Virtual) -> None:
    async def careless(nurseries: list[kernel.Nursery]) -> None:
        nurseries.append(kernel.open_nursery())
        await nurseries[0].__aenter__()
        nurseries[0].start_service_soon(kernel.sleep_forever)

    async def main() -> None:
        nurseries: list[kernel.Nursery] = []
        with pytest.raises(ExceptionGroup):
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(careless, nurseries)
        assert not await nurseries[0].__aexit__(None, None, None)

    virtual(main)


def test_a_run_that_breaks_throws_nurseries_with_services_away_in_silence() -> None:
    class Breaks(deque[Any]):
        def append(self, task: Any) -> None:
            if self.broken:
                raise OSError("broken")
            super().append(task)

        broken = False

    ready = Breaks()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_service_soon(kernel.sleep, 1)
            nursery.start_soon(kernel.sleep_forever)
            await wait_all_tasks_blocked()
            ready.broken = True

    with pytest.raises(kernel.KernelInternalError):
        kernel.run(main, clock=MockClock(autojump_threshold=0), ready=ready)
    gc.collect()  # what a coroutine raises when it is thrown away would be a warning, and those are errors


def test_a_services_task_is_named_and_lives_beside_the_clients(checked: Virtual) -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_service_soon(kernel.sleep_forever, name="reader")
            nursery.start_soon(kernel.sleep, 1, name="client")
            services, clients = current_task().child_nurseries
            assert clients is nursery
            assert [task.name for task in services.child_tasks] == ["reader"]
            assert [task.name for task in clients.child_tasks] == ["client"]

    checked(main)


def test_generator_services(checked: Virtual) -> None:
    log: list[str] = []

    def service(task_status: Any = kernel.TASK_STATUS_IGNORED) -> Generator[Any, Any, None]:
        task_status.started("up")
        try:
            yield from kernel.sleep_forever()
        finally:
            log.append("ended")

    def body(nursery: kernel.Nursery) -> Generator[Any, Any, None]:
        nursery.start_service_soon(service)
        assert (yield from nursery.start_service(service)) == "up"

    def main() -> Generator[Any, Any, None]:
        yield from kernel.within(kernel.open_nursery(), body)

    checked(main)
    assert log == ["ended", "ended"]


def test_services_leave_no_garbage_to_collect(virtual: Virtual) -> None:
    async def fail() -> None:
        await kernel.sleep(1)
        raise ValueError

    async def scene() -> None:
        try:
            with kernel.move_on_after(3):
                async with kernel.open_nursery() as nursery:
                    nursery.start_service_soon(kernel.sleep_forever)
                    nursery.start_service_soon(fail)
                    await kernel.sleep(10)
        except* ValueError:
            pass

    async def main() -> None:
        await scene()
        await checkpoint()
        gc.collect()
        for _ in range(5):
            await scene()
        await checkpoint()
        assert gc.collect() == 0

    gc.disable()
    try:
        virtual(main)
    finally:
        gc.enable()
