"""Ctrl-C: a program that leaves in good order when it is interrupted, whatever it is doing.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/ctrl_c.py
    .venv/bin/python examples/ctrl_c.py wait

Two clerks copy entries into a ledger. Three times the program gets a Ctrl-C: while a clerk computes, while everybody
sleeps, and in the middle of an entry, which must not be torn. It sends that to itself, so that the output is the same
each time; with `wait` it lets you do it. Each time all clean up and leave, and `kernel.run` raises KeyboardInterrupt.

* In the program's own code it is raised on the spot, in whatever task runs: so it can interrupt an endless loop.
* Otherwise the main task gets it, at its next checkpoint. Here that is the end of the nursery, or a sleep.
* In a function marked `enable_ki_protection` it has to wait. Keep those short.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable

import kernel
from kernel.lowlevel import enable_ki_protection


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


class Ledger:
    """Two columns that must always have the same length."""

    def __init__(self) -> None:
        self.sums: list[int] = []
        self.names: list[str] = []
        self.complete = kernel.Event()

    @enable_ki_protection
    def enter(self, name: str, amount: int, meanwhile: Callable[[], None] | None = None) -> None:
        """Both columns or none. A Ctrl-C in here waits for the main task's next checkpoint."""
        self.names.append(name)
        if meanwhile is not None:
            meanwhile()
        self.sums.append(amount)
        if len(self.names) == 6:
            self.complete.set()

    def close(self) -> None:
        print(f"  the ledger is closed with {len(self.names)} names and {len(self.sums)} sums")


async def clerk(name: str, ledger: Ledger, work: Callable[[int], None]) -> None:
    try:
        for number in range(1, 4):
            work(number)
            ledger.enter(name, number)
            await kernel.sleep(0)
        await kernel.sleep_forever()
    finally:  # KeyboardInterrupt, if it has struck here; Cancelled, if somewhere else
        error = sys.exc_info()[0]
        assert error is not None
        with kernel.cleanup(1):  # putting the pen away takes a moment, which a cancelled task would not get otherwise
            await kernel.sleep(0.01)
        print(f"  {name} leaves, because of {error.__name__}")


async def office(work: Callable[[int], None], meanwhile: Callable[[], None] | None) -> None:
    ledger = Ledger()
    try:
        async with kernel.open_nursery() as clerks:
            clerks.start_soon(clerk, "ann", ledger, work)
            clerks.start_soon(clerk, "ben", ledger, copy)
            await ledger.complete.wait()
            ledger.enter("the office", 0, meanwhile)
    finally:
        ledger.close()


def copy(number: int) -> None:
    """What a clerk does for each entry."""


def compute(number: int) -> None:
    """The same, with a Ctrl-C in it. This is the program's own code."""
    if number == 3:
        print("  ann computes")
        press_ctrl_c()
        print("never printed")


def run(work: Callable[[int], None], meanwhile: Callable[[], None] | None = None) -> None:
    try:
        kernel.run(office, work, meanwhile)
    except KeyboardInterrupt:
        print("  ended by Ctrl-C")


def press_ctrl_c_later() -> None:
    threading.Timer(0.1, press_ctrl_c).start()


def demonstrate() -> None:
    print("While a clerk computes")
    run(compute)
    print("While everybody sleeps")
    run(copy, press_ctrl_c_later)
    print("In the middle of an entry")
    run(copy, press_ctrl_c)


if __name__ == "__main__":
    if sys.argv[1:] == ["wait"]:
        print("Press Ctrl-C")
        run(copy)
    else:
        demonstrate()
