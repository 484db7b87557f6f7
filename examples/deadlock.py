"""Two bookings that wait for one another: what the kernel says when nothing can ever happen again.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/deadlock.py

A booking takes money from one account and puts it into another, and locks both meanwhile, the one it takes from first.

* *Crosswise.* Ann pays Ben while Ben pays Ann. Each booking has its first lock and waits for the other one's. Other
  kernels sleep now until somebody pulls the plug. This one ends the run with `Deadlock`: who waits for whom, then the
  task tree, with the line where each task stands. Before that, all tasks were cancelled, so the `finally` has run.
* *In one's own way.* The auditor closes the bank, then lets the branches count, and waits for them inside the lock
  that they need. Here the circle goes through a nursery: the parent waits for its child, the child for the parent's
  lock.
* *In order.* Both bookings lock the account with the smaller number first. A circle would have to go down somewhere.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import kernel
from kernel.testing import MockClock


@dataclass
class Account:
    number: int
    money: int
    lock: kernel.Lock = field(default_factory=kernel.Lock)


async def book(amount: int, source: Account, target: Account) -> None:
    async with source.lock:
        await kernel.sleep(1)  # look up the rates
        async with target.lock:
            source.money -= amount
            target.money += amount


async def book_in_order(amount: int, source: Account, target: Account) -> None:
    first, second = sorted((source, target), key=lambda account: account.number)
    async with first.lock:
        await kernel.sleep(1)
        async with second.lock:
            source.money -= amount
            target.money += amount


async def crosswise(booking: Callable = book) -> None:
    ann, ben = Account(1, 100), Account(2, 100)
    try:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(booking, 30, ann, ben, name="ann pays ben")
            nursery.start_soon(booking, 10, ben, ann, name="ben pays ann")
    finally:
        print(f"  ann has {ann.money}, ben has {ben.money}")


async def audit() -> None:
    bank = kernel.Lock()

    async def count(branch: str) -> None:
        async with bank:
            print(f"  counting in {branch}")

    async with bank, kernel.open_nursery() as nursery:
        nursery.start_soon(count, "Rome", name="Rome")
        nursery.start_soon(count, "Oslo", name="Oslo")


def run(title: str, function: Callable, *args: object) -> None:
    print(title)
    try:
        kernel.run(function, *args, clock=MockClock(autojump_threshold=0))  # so that nobody waits for the bank
    except kernel.Deadlock as deadlock:
        print("\n".join(f"  {line}" for line in str(deadlock).splitlines()))


if __name__ == "__main__":
    run("Crosswise", crosswise)
    run("In one's own way", audit)
    run("In order", crosswise, book_in_order)
