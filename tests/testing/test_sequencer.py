"""Sequencer: blocks run in the order of their numbers, or the sequence is broken for all."""

from __future__ import annotations

from typing import Any

import pytest

import kernel
from kernel.lowlevel import checkpoint
from kernel.testing import Sequencer, assert_no_checkpoints, explore, wait_all_tasks_blocked


@pytest.fixture
def log() -> list[Any]:
    return []


async def at(sequencer: Sequencer, positions: list[int], log: list[Any]) -> None:
    for position in positions:
        async with sequencer(position):
            log.append(position)
            await checkpoint()


def test_blocks_run_in_the_order_of_their_numbers_whatever_the_schedule() -> None:
    async def program() -> None:
        log: list[int] = []
        sequencer = Sequencer()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(at, sequencer, [1, 2], log)
            nursery.start_soon(at, sequencer, [0, 3], log)
        assert log == [0, 1, 2, 3]

    assert explore(program).complete


def test_a_block_that_fails_lets_the_next_one_begin(log: list[Any]) -> None:
    async def main() -> None:
        sequencer = Sequencer()
        with pytest.raises(ValueError, match="spilt"):
            async with sequencer(0):
                raise ValueError("spilt")
        await at(sequencer, [1], log)

    kernel.run(main)
    assert log == [1]


def test_a_block_that_is_cancelled_lets_the_next_one_begin(log: list[Any]) -> None:
    async def main() -> None:
        sequencer = Sequencer()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(at, sequencer, [1], log)
            with kernel.CancelScope() as scope:
                async with sequencer(0):
                    scope.cancel()
                    await checkpoint()

    kernel.run(main)
    assert log == [1]


def test_a_number_serves_once(log: list[Any]) -> None:
    async def main() -> None:
        sequencer = Sequencer()
        await at(sequencer, [0], log)
        with pytest.raises(RuntimeError, match="position 0 of the sequence was used before"):
            await at(sequencer, [0], log)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(at, sequencer, [2], log)
            await wait_all_tasks_blocked()
            with pytest.raises(RuntimeError, match="position 2 of the sequence was used before"):
                await at(sequencer, [2], log)
            await at(sequencer, [1], log)

    kernel.run(main)
    assert log == [0, 1, 2]


def test_who_is_cancelled_while_waiting_breaks_the_sequence_for_all(log: list[Any]) -> None:
    async def main() -> None:
        sequencer = Sequencer()

        async def expect_broken(position: int) -> None:
            with pytest.raises(RuntimeError, match="the sequence is broken"):
                await at(sequencer, [position], log)
            log.append(f"{position} broken")

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(expect_broken, 2)
            nursery.start_soon(expect_broken, 3)
            await wait_all_tasks_blocked()
            with kernel.CancelScope() as scope:
                scope.cancel()
                with pytest.raises(RuntimeError, match="this task was cancelled while it waited for position 1"):
                    await at(sequencer, [1], log)
        await expect_broken(0)
        await expect_broken(4)

    kernel.run(main)
    assert log == ["2 broken", "3 broken", "0 broken", "4 broken"]


def test_a_turn_that_has_come_is_not_lost_to_a_cancellation_in_the_same_moment(log: list[Any]) -> None:
    async def main() -> None:
        sequencer = Sequencer()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(at, sequencer, [1], log)
            await wait_all_tasks_blocked()
            async with sequencer(0):
                pass
            nursery.cancel_scope.cancel()
        await at(sequencer, [2], log)

    kernel.run(main)
    assert log == [1, 2]


def test_entering_the_first_block_is_a_cancel_point_and_leaving_is_none() -> None:
    async def main() -> None:
        with kernel.CancelScope() as scope:
            scope.cancel()
            with pytest.raises(RuntimeError, match="cancelled while it waited for position 0"):
                async with Sequencer()(0):
                    raise AssertionError("unreachable: the block was entered")
        turn = Sequencer()(0)
        await turn.__aenter__()
        with assert_no_checkpoints():
            await turn.__aexit__(None, None, None)

    kernel.run(main)


def test_generator_style_works(log: list[Any]) -> None:
    def first(_: None) -> Any:
        yield from kernel.sleep(0)
        log.append(0)

    def main() -> Any:
        sequencer = Sequencer()
        yield from kernel.within(sequencer(0), first)
        yield from kernel.within(sequencer(1), first)

    kernel.run(main)
    assert log == [0, 0]
