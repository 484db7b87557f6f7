"""One cook, two pots of dumplings: what a nursery is, and what a timeout covers.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/hello.py

A pot takes time but no hands: first its water must boil, then its dumplings must cook. The dinner is made three
times. First one pot after the other, which wastes the waiting. Then both at once in a nursery, the block that ends when
both are done. Last with a timeout around the whole dinner, which takes the slower pot off the fire, wherever its
task happens to be waiting. The sleeps are real; the times in front of the lines are rounded to tenths of a second.
"""

import kernel


class Kitchen:
    """Tells what happens, with the seconds since this dinner was begun."""

    def __init__(self, title: str) -> None:
        print(title)
        self.began = kernel.current_time()

    def says(self, text: str) -> None:
        print(f"  {kernel.current_time() - self.began:.1f} s  {text}")


async def boil(kitchen: Kitchen, filling: str, heating: float, cooking: float) -> None:
    try:
        kitchen.says(f"{filling}: water on the fire")
        await kernel.sleep(heating)
        kitchen.says(f"{filling}: dumplings in")
        await kernel.sleep(cooking)
        kitchen.says(f"{filling}: served")
    except kernel.Cancelled:
        kitchen.says(f"{filling}: taken off the fire, half done")
        raise  # whoever cancelled wants to see it arrive


async def one_after_the_other() -> None:
    kitchen = Kitchen("One pot after the other")
    await boil(kitchen, "pork", heating=0.2, cooking=0.3)
    await boil(kitchen, "leek", heating=0.1, cooking=0.2)
    kitchen.says("dinner is ready")


async def both_at_once() -> None:
    kitchen = Kitchen("Both pots at once")
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(boil, kitchen, "pork", 0.2, 0.3)
        nursery.start_soon(boil, kitchen, "leek", 0.1, 0.2)
    kitchen.says("dinner is ready")


async def in_a_hurry() -> None:
    kitchen = Kitchen("Both pots at once, and 0.4 s for the whole dinner")
    with kernel.move_on_after(0.4) as hurry:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(boil, kitchen, "pork", 0.2, 0.3)
            nursery.start_soon(boil, kitchen, "leek", 0.1, 0.2)
    kitchen.says("time is up, we eat what there is" if hurry.cancelled_caught else "dinner is ready")


async def main() -> None:
    await one_after_the_other()
    await both_at_once()
    await in_a_hurry()


if __name__ == "__main__":
    kernel.run(main)
