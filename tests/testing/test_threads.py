"""Waiting until no thread works for the run any more."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import kernel
from kernel import from_thread, to_thread
from kernel.lowlevel import current_kernel_token, start_thread_soon
from kernel.testing import (
    active_thread_count,
    assert_checkpoints,
    wait_all_tasks_blocked,
    wait_all_threads_completed,
)


@pytest.fixture
def log() -> list[Any]:
    return []


async def thread_waits_for(event: kernel.Event, ended: kernel.Event) -> None:
    await to_thread.run_sync(from_thread.run, event.wait)
    ended.set()


def test_it_waits_for_the_last_thread_and_counts_them(log: list[Any]) -> None:
    async def wait() -> None:
        await wait_all_threads_completed()
        log.append("none left")

    async def main() -> None:
        ann, ben, ann_ended, ben_ended = (kernel.Event() for _ in range(4))
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(thread_waits_for, ann, ann_ended)
            nursery.start_soon(thread_waits_for, ben, ben_ended)
            await wait_all_tasks_blocked()
            assert active_thread_count() == 2
            nursery.start_soon(wait)
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            ann.set()
            await ann_ended.wait()
            await wait_all_tasks_blocked()
            assert (log, active_thread_count()) == ([], 1)
            ben.set()
            await ben_ended.wait()
            assert active_thread_count() == 0

    kernel.run(main)
    assert log == ["none left", "none left"]


def test_without_threads_there_is_nothing_to_wait_for() -> None:
    async def main() -> None:
        for _ in range(2):
            assert active_thread_count() == 0
            with assert_checkpoints():
                await wait_all_threads_completed()
            await to_thread.run_sync(int)

    kernel.run(main)


def test_an_abandoned_call_counts_until_its_function_returns(log: list[Any]) -> None:
    go = threading.Event()

    def work() -> None:
        assert go.wait(60)
        log.append("worked")

    async def main() -> None:
        with kernel.CancelScope() as scope:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(lambda: to_thread.run_sync(work, abandon_on_cancel=True))
                await wait_all_tasks_blocked()
                scope.cancel()
        assert active_thread_count() == 1
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(wait_all_threads_completed)
            await wait_all_tasks_blocked()
            go.set()
        log.append("none left")

    kernel.run(main)
    assert log == ["worked", "none left"]


def test_a_call_that_begins_before_the_waiter_gets_on_is_waited_for_too(log: list[Any]) -> None:
    async def main() -> None:
        first, second, ended = (kernel.Event() for _ in range(3))

        async def go_on() -> None:
            await wait_all_tasks_blocked()
            log.append(f"waits still: {not waiter.done}")
            second.set()

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(thread_waits_for, first, ended)
            await wait_all_tasks_blocked()
            waiter = nursery.spawn(wait_all_threads_completed)
            await wait_all_tasks_blocked()
            first.set()
            while active_thread_count():
                await kernel.sleep(0)
            nursery.start_soon(go_on)  # the waiter has been woken, and it is not its turn yet
            await thread_waits_for(second, ended)
            await waiter

    kernel.run(main)
    assert log == ["waits still: True"]


def test_a_waiter_that_is_cancelled_leaves_nothing_behind() -> None:
    async def main() -> None:
        event, ended = kernel.Event(), kernel.Event()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(thread_waits_for, event, ended)
            await wait_all_tasks_blocked()
            for _ in range(2):
                with kernel.CancelScope() as scope:
                    async with kernel.open_nursery() as inner:
                        inner.start_soon(wait_all_threads_completed)
                        await wait_all_tasks_blocked()
                        scope.cancel()
                assert scope.cancelled_caught
            event.set()
            await wait_all_threads_completed()
            assert active_thread_count() == 0

    kernel.run(main)


def test_threads_that_belong_to_no_call_do_not_count() -> None:
    go = threading.Event()

    async def main() -> None:
        token, ended = current_kernel_token(), kernel.Event()
        start_thread_soon(lambda: go.wait(60), lambda _: token.run_sync_soon(ended.set))
        assert active_thread_count() == 0
        await wait_all_threads_completed()
        go.set()
        await ended.wait()

    kernel.run(main)


def test_both_need_a_kernel() -> None:
    with pytest.raises(RuntimeError, match="outside the kernel"):
        active_thread_count()
    with pytest.raises(RuntimeError, match="outside the kernel"):
        next(iter(wait_all_threads_completed()))
