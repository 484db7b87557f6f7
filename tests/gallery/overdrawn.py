"""Check, then act, and somebody acts in between: an account is overdrawn.

Both transfers look at the balance, and both find enough. Then each writes a line into the journal, and then both pay.
The journal is a channel with plenty of room, so as a rule nobody waits there, and all is well. As a rule.

What was checked must still be true when it is acted upon. Either nothing happens in between (no `await`), or it happens
under a lock, or the check comes again.

In March 2014 thousands of simultaneous transfers between two accounts emptied the bitcoin bank Flexcoin, which closed
(https://vladmihalcea.com/race-condition/ tells the story).
"""

from __future__ import annotations

import math

import kernel

ERROR = AssertionError


class NaiveAccount:
    def __init__(self, balance: int) -> None:
        self.balance = balance
        self.journal, _ = kernel.open_memory_channel[int](math.inf)

    async def pay(self, amount: int) -> bool:
        if self.balance < amount:
            return False
        await self.journal.send(amount)
        self.balance -= amount
        return True


class Account(NaiveAccount):
    def __init__(self, balance: int) -> None:
        super().__init__(balance)
        self.lock = kernel.Lock()

    async def pay(self, amount: int) -> bool:
        async with self.lock:
            return await super().pay(amount)


async def story(account: NaiveAccount) -> None:
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(account.pay, 70, name="rent")
        nursery.start_soon(account.pay, 50, name="groceries")
    assert account.balance >= 0, "overdrawn"


async def buggy() -> None:
    await story(NaiveAccount(100))


async def correct() -> None:
    await story(Account(100))
