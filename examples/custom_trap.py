"""A trap of your own: two tasks meet and swap what they carry.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/custom_trap.py

A trap is an object with two methods. `arm(kernel, task)` is called when the task has yielded it, and arranges for the
wake-up. `abort(kernel, task)` is called when the task is cancelled in its sleep, and takes the arrangement back. The
kernel has no list of traps, so one that is written here works like those it brings.

This one is a meeting place. Whoever comes first sleeps; whoever comes second takes the thing of the first, leaves its
own, and both go on. Three points are worth a look:

* `arm` may find that there is nothing to wait for. Then it wakes the task at once.
* Waking commits. The moment the two things change hands, neither task can be cancelled out of the meeting any more, so
  nobody ends up with both things, and nobody with none.
* That is also why `swap` asks for a pending cancellation first. A task that has been told to leave must not trade.
"""

from collections.abc import Generator
from typing import Any

import kernel
from kernel.lowlevel import Kernel, Task, Trap, checkpoint_if_cancelled, operation
from kernel.testing import wait_all_tasks_blocked


class MeetingPlace:
    """Where tasks swap things in pairs. First come, first served."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.first: Swap | None = None  # who is here already. self.first.task sleeps on self.first

    @operation  # makes it fit for `await` as well as for `yield from`
    def swap(self, thing: object) -> Generator[Any, Any, Any]:
        """Wait for another task, give it `thing`, and return what it gave. A cancelled swap has given nothing."""
        yield from checkpoint_if_cancelled()
        return (yield Swap(self, thing))


class Swap(Trap):
    """One task's wait at a meeting place."""

    __slots__ = ("place", "task", "thing")

    def __init__(self, place: MeetingPlace, thing: object) -> None:
        self.place = place
        self.thing = thing
        self.task: Task | None = None

    def arm(self, kernel: Kernel, task: Task) -> None:
        first = self.place.first
        if first is None:
            self.task = task
            self.place.first = self
        else:
            assert first.task is not None
            self.place.first = None
            kernel.wake(first.task, self.thing)
            kernel.wake(task, first.thing)

    def abort(self, kernel: Kernel, task: Task) -> bool:
        self.place.first = None
        return True

    def __repr__(self) -> str:
        return f"<Swap of {self.thing!r} at {self.place.name}>"


async def trade(name: str, place: MeetingPlace, thing: str) -> None:
    print(f"{name}: has {thing}")
    try:
        thing = await place.swap(thing)
    finally:
        print(f"{name}: leaves with {thing}")


async def main() -> None:
    market = MeetingPlace("the market")

    print("Two tasks meet")
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(trade, "ann", market, "tea")
        await wait_all_tasks_blocked()
        for task in nursery.child_tasks:
            print(f"ann's task sleeps on {task.trap}")
        nursery.start_soon(trade, "ben", market, "salt")

    print("One loses patience, and is gone when the next one comes")
    with kernel.move_on_after(0.05):
        await trade("cal", market, "snow")
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(trade, "deb", market, "rice")
        nursery.start_soon(trade, "eli", market, "figs")

    print("One has been told to leave before it comes")
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(trade, "fay", market, "wool")
        await wait_all_tasks_blocked()
        with kernel.CancelScope() as scope:
            scope.cancel()
            await trade("gus", market, "sand")
        nursery.start_soon(trade, "hal", market, "silk")


if __name__ == "__main__":
    kernel.run(main)
