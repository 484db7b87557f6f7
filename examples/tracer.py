"""A tracer in forty lines: every step of a program, and what each task waits for, as a table.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/tracer.py

An instrument is an object with hooks that the kernel calls as things happen. This one keeps a column for each task and
prints a line for each event, so that time runs downwards:

    *         the task became ready
    |         it runs, and what it prints comes here
    waits     it has trapped: this is what it waits for; `yields` if it only lets the others run
    ends      it has ended, and how

The program is a waiter and a cook with one tray, in virtual time. See who holds the tray while the soup boils.
"""

from typing import Any

import kernel
from kernel.abc import Instrument
from kernel.testing import MockClock

WIDTH = 26


class Tracer(Instrument):
    """Prints a table of what the tasks with these names do."""

    def __init__(self, *names: str) -> None:
        self.columns = {name: place for place, name in enumerate(names)}
        print("  time  " + "".join(name.ljust(WIDTH) for name in names).rstrip())

    def show(self, task: kernel.lowlevel.Task, text: str) -> None:
        place = self.columns.get(task.name)
        if place is not None:
            print(f"{kernel.current_time():6.1f}  {' ' * WIDTH * place}{text}")

    def task_scheduled(self, task: kernel.lowlevel.Task) -> None:
        self.show(task, "*")

    def task_trapped(self, task: kernel.lowlevel.Task, trap: Any) -> None:
        if trap is None:
            self.show(task, "yields")
        elif isinstance(trap, kernel.Lock):
            self.show(task, f"waits for {trap.owner.name}'s tray")
        elif isinstance(trap, kernel.lowlevel.SleepUntil):
            self.show(task, f"waits until {trap.deadline:.1f}")
        else:
            self.show(task, f"waits: {type(trap).__name__}")

    def task_exited(self, task: kernel.lowlevel.Task) -> None:
        self.show(task, f"ends with {type(task.outcome).__name__}")


async def cook(tray: kernel.Lock, ready: kernel.Event) -> None:
    async with tray:
        print(f"{'':8}| fetches the pot")
        await kernel.sleep(2)
    ready.set()


async def waiter(tray: kernel.Lock, ready: kernel.Event) -> None:
    await kernel.lowlevel.checkpoint()
    async with tray:
        print(f"{'':8}{'':{WIDTH}}| has the tray")
        await ready.wait()
        await kernel.sleep(0.5)


async def dinner() -> None:
    tray, ready = kernel.Lock(), kernel.Event()
    with kernel.move_on_after(10):
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(cook, tray, ready, name="cook")
            nursery.start_soon(waiter, tray, ready, name="waiter")


if __name__ == "__main__":
    kernel.run(dinner, clock=MockClock(autojump_threshold=0), instruments=[Tracer("cook", "waiter")])
