"""Both kinds wait in one row, and the wrong one is woken.

A buffer for one item; who finds it empty and who finds it full wait for the same condition. A consumer that takes the
item wakes one of them, for there is room for one. It is another consumer. That finds the buffer empty and goes back to
sleep, and the notification is used up. The producer for which it was meant sleeps on, and all sleep.

It takes four tasks for a buffer of one, and more for a larger one: with enough room in the buffer no test will find it.
Give each reason to wait a condition of its own (they may share the lock), or wake all.

Known as the last question of "Extreme Programming Challenge Fourteen"; Markus Kuppe's lemmy/BlockingQueue explains it
with TLA+ in small steps. Debezium met it in 2022, after `notifyAll` had been made a `notify` (debezium/debezium#3629).
"""

from __future__ import annotations

import kernel

ERROR = kernel.Deadlock


class Buffer:
    """Room for one item."""

    def __init__(self, not_empty: kernel.Condition, not_full: kernel.Condition) -> None:
        self.not_empty = not_empty
        self.not_full = not_full
        self.items: list[str] = []

    async def put(self, item: str) -> None:
        async with self.not_full:
            while self.items:
                await self.not_full.wait()
            self.items.append(item)
            self.not_empty.notify()

    async def take(self) -> str:
        async with self.not_empty:
            while not self.items:
                await self.not_empty.wait()
            self.not_full.notify()
            return self.items.pop()


async def story(buffer: Buffer) -> None:
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(buffer.take, name="ann")
        nursery.start_soon(buffer.take, name="ben")
        nursery.start_soon(buffer.put, "soup", name="cook")
        nursery.start_soon(buffer.put, "noodles", name="chef")


async def buggy() -> None:
    both = kernel.Condition()
    await story(Buffer(both, both))


async def correct() -> None:
    lock = kernel.Lock()
    await story(Buffer(kernel.Condition(lock), kernel.Condition(lock)))
