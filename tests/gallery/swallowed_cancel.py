"""A loop that tries again takes the cancellation for a failure.

Connecting fails now and then, so it is tried again, whatever the reason was. One reason is that the task was told to
stop. It tries again; that is a cancel point and fails at once, for the task is still told to stop; it tries again. The
nursery waits for a task that will never end, with a processor at full speed.

Catch what you can cure. `Cancelled` is a `BaseException` so that `except Exception` lets it pass; a bare `except:` does
not, and a list of exceptions that somebody has "completed" does not either.

Seen in redis-py's asyncio client (redis/redis-py#2028). asyncio delivers a cancellation once, so there it got lost
quietly and the program went on; here it comes again at each cancel point, and the bug is loud.
"""

from __future__ import annotations

import kernel
from kernel.lowlevel import checkpoint
from kernel.testing import TooManySteps

ERROR = TooManySteps
OPTIONS = {"max_steps": 100}


async def story(cure: tuple[type[BaseException], ...]) -> None:
    patience = kernel.CancelScope()
    attempts = 0

    async def connect() -> None:
        nonlocal attempts
        attempts += 1
        await checkpoint()
        if attempts == 1:
            raise ConnectionRefusedError

    async def client() -> None:
        with patience:
            while True:
                try:
                    return await connect()
                except cure:
                    continue

    async def canceller() -> None:
        await checkpoint()
        await checkpoint()
        patience.cancel()

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(client, name="client")
        nursery.start_soon(canceller, name="canceller")


async def buggy() -> None:
    await story((OSError, kernel.Cancelled))


async def correct() -> None:
    await story((OSError,))
