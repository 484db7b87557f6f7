"""Five philosophers at dinner: a deadlock, the report that names it, how to find one that hides, and two cures.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/philosophers.py

Between any two plates lies one fork, and it takes two to eat. A philosopher takes the left fork, then the right one. If
all hold their left fork, all wait for the right one, for ever. Four dinners are served:

* *Slow.* Each thinks for a second between the two forks. That goes wrong at once. A program of which nothing can wake
  any task ends with `kernel.Deadlock`, whose text names the circle. No debugger, no guessing.
* *Quick.* Nobody thinks. A free lock is taken without a turn of the loop, so each has both forks before the next one
  looks: all goes well, on this machine, today. The bug is still there. `explore` runs the dinner under other schedules,
  all of which the kernel is free to choose, and finds one that hangs. It can be replayed, as often as you like.
* *Ordered.* Forks are numbered, and the lower number is taken first. A circle would have to go down somewhere.
* *Four chairs.* At most four sit down, so one of them gets two forks.

Which cure is better? The order costs nothing, if you know all the locks beforehand. The limit needs no order, and keeps
one philosopher standing who could have eaten. Neither is proved here: a thousand schedules are many, and not all.
"""

from collections.abc import Awaitable, Callable

import kernel
from kernel.testing.explore import ScheduleFailure, explore

NAMES = ("Arendt", "Benjamin", "Cassirer", "Descartes", "Epicurus")


class Fork(kernel.Lock):
    """A lock with a number, so that reports can be read."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __repr__(self) -> str:
        return f"<fork {self.number}>"


async def eat(first: Fork, second: Fork, thinks: float = 0) -> None:
    async with first:
        if thinks:
            await kernel.sleep(thinks)
        async with second:
            pass  # eats


def left_and_right(place: int) -> list[int]:
    return [place, (place + 1) % len(NAMES)]


async def dinner(choose: Callable[[int], list[int]], philosopher: Callable[..., Awaitable[None]]) -> None:
    forks = [Fork(number) for number in range(len(NAMES))]
    async with kernel.open_nursery() as nursery:
        for place, name in enumerate(NAMES):
            first, second = choose(place)
            nursery.start_soon(philosopher, forks[first], forks[second], name=name)


async def slow_dinner() -> None:
    async def eat_slowly(first: Fork, second: Fork) -> None:
        await eat(first, second, thinks=1)

    await dinner(left_and_right, eat_slowly)


async def quick_dinner() -> None:
    await dinner(left_and_right, eat)


async def ordered_dinner() -> None:
    await dinner(lambda place: sorted(left_and_right(place)), eat)


async def dinner_with_four_chairs() -> None:
    chairs = kernel.CapacityLimiter(4)

    async def sit_and_eat(first: Fork, second: Fork) -> None:
        async with chairs:
            await eat(first, second)

    await dinner(left_and_right, sit_and_eat)


def show(deadlock: BaseException) -> None:
    """The circle. What follows it in the text is the tree of tasks, with the line at which each one waits."""
    for line in str(deadlock).split("If waiting for ever")[0].splitlines():
        print("  " + line)


def main() -> None:
    print("A slow dinner")
    try:
        kernel.run(slow_dinner, clock=kernel.testing.MockClock(autojump_threshold=0))
    except kernel.Deadlock as deadlock:
        show(deadlock)

    print("A quick dinner")
    kernel.run(quick_dinner)
    print("  ends well, when served first come, first served")
    try:
        explore(quick_dinner, strategy="random")
    except ScheduleFailure as failure:  # as text, it shows the run that fails as a table, step by step
        print("  and under another schedule:")
        show(failure.error)

    print("An ordered dinner")
    print("  " + str(explore(ordered_dinner, strategy="random")))
    print("A dinner with four chairs")
    print("  " + str(explore(dinner_with_four_chairs, strategy="random")))


if __name__ == "__main__":
    main()
