"""Schedules: who decides, where the kernel has a choice.

A run under a virtual clock is the same each time, but for the choices the kernel makes: which of several ready tasks
goes next, and whether an operation that need not block yields. A *schedule* makes them. It is asked for a number, and 0
always means what the kernel itself would have done. So a schedule is known by its deviations, and the shorter the list
of those is, the easier it is to understand.

    Recorded        replays a list of choices, then goes on with 0: what everything else boils down to
    Exhaustive      all of them, depth first, over many runs
    Random          any, with equal probability
    PCT             a few deviations at random places: finds a bug that takes d of them with a known probability
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Final, Protocol

__all__ = [
    "PCT",
    "Exhaustive",
    "Random",
    "Recorded",
    "Schedule",
    "cancellations",
    "decode",
    "encode",
    "from_text",
]


NOT_DETERMINISTIC: Final = (
    "the program is not deterministic: the same choices have led to different offers. Does it use the real time, "
    "threads, real files, or random numbers without a seed?"
)


class Schedule(Protocol):
    """What makes the choices of one run. All choices are numbers from 0 up, and below `options`, which is 2 or more."""

    made: list[int]
    """The choices so far, if they were noted: `Recorded(made)` would make them again."""

    def pick(self, tasks: Sequence[object]) -> int:
        """Which of `tasks`, two or more, runs: its place."""

    def pause(self) -> int:
        """Whether an operation that need not block yields: 0 or 1."""

    def cancel(self, options: int) -> int:
        """Whom to cancel here, where that is possible: 0 for nobody."""

    def choose(self, options: int) -> int:
        """Anything else."""


class Recorded:
    """Makes the given choices, one after the other, and then always 0.

    Where there are fewer options than the choice wants, it is the last one: a schedule that was shrunk, or a program
    that was changed, need not fit exactly. `made` and `offered` tell what happened.

    Args:
        choices: if there is no `place`, also those of whom to cancel.
        place: the place, among those where somebody can be cancelled, at which somebody is; counted from 1.
        who: who of those who can be, counted from 1.

    Attributes:
        present: how many could be cancelled at `place`; 0 if the run has not come so far.
    """

    def __init__(self, choices: Sequence[int] = (), place: int = 0, who: int = 1) -> None:
        self.choices = choices
        self.place = place
        self.who = who
        self.present = 0
        self.made: list[int] = []
        self.offered: list[int] = []
        self._given = len(choices)
        self._places = 0

    def choose(self, options: int) -> int:
        place = len(self.made)
        choice = self.choices[place] if place < self._given else 0
        if choice >= options:
            choice = options - 1
        self.made.append(choice)
        self.offered.append(options)
        return choice

    def pick(self, tasks: Sequence[object]) -> int:
        return self.choose(len(tasks))

    def pause(self) -> int:
        return self.choose(2)

    def cancel(self, options: int) -> int:
        if not self.place:
            return self.choose(options)
        self._places += 1
        if self._places != self.place:
            return 0
        self.present = options - 1
        return min(self.who, self.present)

    def __str__(self) -> str:
        text = encode(self.choices) if any(self.choices) or not self.place else ""
        if self.place:
            text += f"@{self.place}" if self.who == 1 else f"@{self.place}:{self.who}"
        return text


def cancellations() -> Iterator[Recorded]:
    """First come, first served, with a cancellation: at each place in turn, and there of each one who can be cancelled,
    until a run does not come so far. Each must be run before the next one is asked for.
    """
    for place in count(1):
        for who in count(1):
            schedule = Recorded((), place, who)
            yield schedule
            if not schedule.present:
                return
            if who == schedule.present:
                break


class Exhaustive:
    """All schedules of a program, depth first: iterate, and run the program once with each.

    What comes next follows from what the last run was offered, so each must be run before the next is asked for. The
    program must be deterministic: the same choices must lead to the same offers. Otherwise `ValueError` says so.
    """

    def __init__(self) -> None:
        self.covered = False
        """Whether the last schedule there is has been run."""

    def __iter__(self) -> Iterator[Recorded]:
        choices: list[int] = []
        offered: list[int] = []
        while True:
            schedule = Recorded(choices)
            yield schedule
            if schedule.offered[: len(choices)] != offered:
                raise ValueError(NOT_DETERMINISTIC)
            choices, offered = schedule.made, schedule.offered
            while choices and choices[-1] + 1 == offered[-1]:
                choices.pop()
                offered.pop()
            if not choices:
                self.covered = True
                return
            choices[-1] += 1


class Random:
    """Each option with the same probability. Somebody is cancelled at one in `places` places where that is possible."""

    def __init__(self, seed: int | str, *, places: int = 1) -> None:
        self._random = random.Random(seed)
        self._randrange = self._random.randrange
        self._places = places
        self.made: list[int] = []

    def choose(self, options: int) -> int:
        choice = self._randrange(options)
        self.made.append(choice)
        return choice

    def pick(self, tasks: Sequence[object]) -> int:
        return self.choose(len(tasks))

    def pause(self) -> int:
        return self.choose(2)

    def cancel(self, options: int) -> int:
        choice = 0 if self._randrange(self._places) else self._randrange(1, options)
        self.made.append(choice)
        return choice


class PCT(Random):
    """Probabilistic concurrency testing, after Burckhardt and others, "A Randomized Scheduler with Probabilistic
    Guarantees of Finding Bugs" (ASPLOS 2010).

    Tasks get random priorities, and the highest ready one runs. At `depth - 1` moments, chosen in advance among the
    `steps` that a run has, the one that would run drops below all others. A bug that shows when `depth` things happen
    in a certain order is found by one run with a probability of at least 1 / (n * steps ** (depth - 1)), n the number
    of tasks; most known bugs have a depth of 1 to 3.

    Every operation yields, so that each is a place where a drop can have an effect; a task that has not dropped goes
    on at once. A step is counted where two tasks or more are ready: elsewhere a drop changes nothing yet. What is no
    question of which task runs is decided as by `Random`, and the bound does not speak of it.
    """

    def __init__(self, seed: int | str, *, depth: int, steps: int, places: int = 1) -> None:
        super().__init__(seed, places=places)
        self.steps = 0
        self._changes = set(self._random.sample(range(max(steps, depth)), depth - 1))
        self._priorities: dict[object, float] = {}
        self._lowest = 0.0

    def pause(self) -> int:
        self.made.append(1)
        return 1

    def pick(self, tasks: Sequence[object]) -> int:
        priorities = self._priorities
        for task in tasks:
            if task not in priorities:
                priorities[task] = self._random.random()
        best = max(tasks, key=priorities.__getitem__)
        if self.steps in self._changes:
            self._lowest -= 1.0
            priorities[best] = self._lowest
            best = max(tasks, key=priorities.__getitem__)
        self.steps += 1
        choice = tasks.index(best)
        self.made.append(choice)
        return choice


def from_text(text: str) -> Recorded:
    """The schedule that `str(schedule)` was. Raises ValueError for a text that it cannot have been."""
    choices, at, rest = text.partition("@")
    place, _, who = rest.partition(":")
    if not at:
        return Recorded(decode(text))
    if not place.isdigit() or not (who.isdigit() or rest == place):
        raise ValueError(f"{text!r} is no schedule: what follows the @ is not understood")
    return Recorded(decode(choices), int(place), int(who or 1))


_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def encode(choices: Sequence[int]) -> str:
    """Choices as a short string: a digit each, zeros in a row as their number in parentheses. `decode` undoes it."""
    choices = list(choices)
    while choices and choices[-1] == 0:
        choices.pop()
    text, zeros = "", 0
    for choice in [*choices, None]:
        if choice == 0:
            zeros += 1
            continue
        if zeros:
            text += "0" if zeros == 1 else f"({zeros})"
            zeros = 0
        if choice is not None:
            text += _DIGITS[choice] if choice < len(_DIGITS) else f"[{choice}]"
    return text or "0"


def decode(text: str) -> list[int]:
    """The choices that `encode` has written. Raises ValueError for a text that it cannot have written."""
    choices: list[int] = []
    place = 0
    while place < len(text):
        character = text[place]
        if character in "([":
            end = text.find(")" if character == "(" else "]", place)
            number = text[place + 1 : end] if end > 0 else ""
            if not number.isdigit():
                raise ValueError(f"{text!r} is no schedule: {text[place:]!r} is not understood")
            choices += [0] * int(number) if character == "(" else [int(number)]
            place = end + 1
        elif character in _DIGITS:
            choices.append(_DIGITS.index(character))
            place += 1
        else:
            raise ValueError(f"{text!r} is no schedule: {character!r} is not understood")
    return choices
