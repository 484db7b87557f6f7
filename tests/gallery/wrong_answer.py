"""Each gets the answer to the question before: a request is cancelled, and its answer stays in the pipe.

Questions and answers travel over one connection, and belong together by their order alone. One who asks is cancelled
after it has sent its question. The lock is released as it should be, the connection goes back to the pool; but the
answer is still to come, and the next one to ask will read it.

What was begun and not finished must not be used again. A cancelled request ends the connection.

In March 2023 ChatGPT showed people the titles of other people's chats, and for some the last four digits of a card: a
cancelled request in redis-py's asyncio client (redis/redis-py#2624; the first cure was not enough, see #2665).
"""

from __future__ import annotations

from collections import deque

import kernel
from kernel.lowlevel import checkpoint

ERROR = AssertionError


class NaiveClient:
    """One connection to a server that answers in the order of the questions."""

    def __init__(self) -> None:
        self.lock = kernel.Lock()
        self.pipe: deque[str] = deque()

    async def ask(self, question: str) -> str:
        async with self.lock:
            self.pipe.append(f"answer to {question}")
            await checkpoint()  # until the answer is here
            return self.pipe.popleft()


class Client(NaiveClient):
    async def ask(self, question: str) -> str:
        async with self.lock:
            self.pipe.append(f"answer to {question}")
            try:
                await checkpoint()
            except BaseException:
                self.pipe = deque()  # hangs up. The next question opens a new connection
                raise
            return self.pipe.popleft()


async def story(client: NaiveClient) -> None:
    patience = kernel.CancelScope()

    async def ann() -> None:
        with patience:
            await client.ask("ann")

    async def ben() -> None:
        answer = await client.ask("ben")
        assert answer == "answer to ben", f"ben got the {answer}"

    async def canceller() -> None:
        await checkpoint()
        patience.cancel()

    async with kernel.open_nursery() as nursery:
        for task in (ann, ben, canceller):
            nursery.start_soon(task, name=task.__name__)


async def buggy() -> None:
    await story(NaiveClient())


async def correct() -> None:
    await story(Client())
