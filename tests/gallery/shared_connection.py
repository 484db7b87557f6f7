"""A connection pool gives the same connection to two.

The pool looks at the connection that lies on top, asks the server whether it is still alive, and takes it off the pile
if it is. The question is an `await`. Whoever comes meanwhile finds the same connection on top.

It was right as long as the check was a plain function; making it `async` broke it, with not one line in another place.
What you intend to take, take first. If it turns out that you can't have it, put it back.

neo4j's JavaScript driver let its pool grow over its limit in just this way: looking, validating, then counting
(neo4j/neo4j-javascript-driver#1216).
"""

from __future__ import annotations

import kernel
from kernel.lowlevel import checkpoint

ERROR = AssertionError


class Connection:
    def __init__(self) -> None:
        self.users = 0

    async def is_alive(self) -> bool:
        await checkpoint()
        return True

    async def query(self) -> None:
        self.users += 1
        assert self.users == 1, "another operation is in progress"
        await checkpoint()
        self.users -= 1


class NaivePool:
    """Opens connections when they are needed, and keeps them. At first there is one."""

    def __init__(self) -> None:
        self.idle = {Connection(): None}  # a set that keeps its order

    async def acquire(self) -> Connection:
        if self.idle:
            connection = next(iter(self.idle))
            alive = await connection.is_alive()
            self.idle.pop(connection, None)
            if alive:
                return connection
        return Connection()

    def release(self, connection: Connection) -> None:
        self.idle[connection] = None


class Pool(NaivePool):
    async def acquire(self) -> Connection:
        if self.idle:
            connection, _ = self.idle.popitem()
            if await connection.is_alive():
                return connection
        return Connection()


async def story(pool: NaivePool) -> None:
    async def client() -> None:
        connection = await pool.acquire()
        await connection.query()
        pool.release(connection)

    async def ben() -> None:
        await checkpoint()  # comes a little later
        await client()

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(client, name="ann")
        nursery.start_soon(ben, name="ben")


async def buggy() -> None:
    await story(NaivePool())


async def correct() -> None:
    await story(Pool())
