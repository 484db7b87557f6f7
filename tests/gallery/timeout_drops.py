"""A timeout that throws the result away, though it came in time.

`wait_for` runs the call in a task of its own and waits for it, but not for longer than it was told. The time is up; it
cancels the task, waits until it has ended, and reports a timeout. It does not look whether the task has ended with a
result after all. If the result was an item out of a queue, the item is lost.

Two things can happen in one moment: the call returns and the time is up. Then somebody has to decide, and what has
happened decides best: if there is a result, it is the result. (A scope around the call itself, `fail_after`, has no
such question, since there is nobody between the call and its caller.)

asyncio's `wait_for` had this, in ever rarer forms, for years: python/asyncio#201 and #343, python/cpython#86296.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import kernel

ERROR = AssertionError
OPTIONS = {"deadlines": "any time"}

AsyncCall = Callable[[], Awaitable[str]]
WaitFor = Callable[[float, AsyncCall], Awaitable[str]]


async def naive_wait_for(seconds: float, call: AsyncCall) -> str:
    result, too_late = await _first_of_call_and_time(seconds, call)
    if too_late:
        raise kernel.TooSlowError
    return result[0]


async def wait_for(seconds: float, call: AsyncCall) -> str:
    result, _ = await _first_of_call_and_time(seconds, call)
    if not result:
        raise kernel.TooSlowError
    return result[0]


async def _first_of_call_and_time(seconds: float, call: AsyncCall) -> tuple[list[str], bool]:
    result: list[str] = []
    done = kernel.Event()

    async def run() -> None:
        result.append(await call())
        done.set()

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(run, name="the call")
        with kernel.move_on_after(seconds) as patience:
            await done.wait()
        nursery.cancel_scope.cancel()
    return result, patience.cancelled_caught


async def story(wait: WaitFor) -> None:
    send_channel, receive_channel = kernel.open_memory_channel[str](1)
    received = []

    async def reader() -> None:
        try:
            received.append(await wait(1, receive_channel.receive))
        except kernel.TooSlowError:
            pass

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(reader, name="reader")
        nursery.start_soon(send_channel.send, "the only copy", name="sender")
    left = receive_channel.statistics().current_buffer_used
    assert len(received) + left == 1, "the item is nowhere"


async def buggy() -> None:
    await story(naive_wait_for)


async def correct() -> None:
    await story(wait_for)
