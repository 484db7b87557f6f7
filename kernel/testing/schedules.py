"""Schedules: who decides, where the kernel has a choice.

A run under a virtual clock is the same each time, but for the choices the kernel makes: which of several ready tasks
goes next, and whether an operation that need not block yields. A *schedule* makes them. `choose(options)` is asked for
a number below `options`, and 0 always means what the kernel itself would have done. So a schedule is known by its
deviations, and the shorter the list of those is, the easier it is to understand.

    Recorded        replays a list of choices, then goes on with 0: what everything else boils down to
    Exhaustive      all of them, depth first, over many runs
    Random          any, with equal probability
    PCT             a few deviations at random places: finds a bug that takes d of them with a known probability
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Protocol

__all__ = ["PCT", "Exhaustive", "Random", "Recorded", "Schedule", "decode", "encode"]


class Schedule(Protocol):
    """What makes the choices of one run."""

    def choose(self, options: int) -> int:
        """A number from 0 to `options - 1`; `options` is at least 2."""


class Recorded:
    """Makes the given choices, one after the other, and then always 0.

    Where there are fewer options than the choice wants, it is the last one: a schedule that was shrunk, or a program
    that was changed, need not fit exactly. `made` and `offered` tell what happened.
    """

    def __init__(self, choices: Sequence[int] = ()) -> None:
        self._choices = choices
        self.made: list[int] = []
        self.offered: list[int] = []

    def choose(self, options: int) -> int:
        place = len(self.made)
        choice = min(self._choices[place], options - 1) if place < len(self._choices) else 0
        self.made.append(choice)
        self.offered.append(options)
        return choice


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
                raise ValueError(
                    "the program is not deterministic: the same choices have led to different offers. Does it use the "
                    "real time, threads, real files, or random numbers without a seed?"
                )
            choices, offered = schedule.made, schedule.offered
            while choices and choices[-1] + 1 == offered[-1]:
                choices.pop()
                offered.pop()
            if not choices:
                self.covered = True
                return
            choices[-1] += 1


class Random:
    """Each option with the same probability."""

    def __init__(self, seed: int | str) -> None:
        self._randrange = random.Random(seed).randrange
        self.made: list[int] = []

    def choose(self, options: int) -> int:
        choice = self._randrange(options)
        self.made.append(choice)
        return choice


class PCT:
    """Probabilistic concurrency testing, after Burckhardt and others, "A Randomized Scheduler with Probabilistic
    Guarantees of Finding Bugs" (ASPLOS 2010).

    Tasks get random priorities, and the highest ready one runs. At `depth - 1` moments, chosen in advance among the
    `steps` that a run has, the one that would run drops below all others. A bug that shows when `depth` things happen
    in a certain order is found by one run with a probability of at least 1 / (n * steps ** (depth - 1)), n the number
    of tasks; most known bugs have a depth of 1 to 3.

    The queue is asked by position, and priorities belong to tasks; so this schedule is told the tasks, see `pick`.
    """

    def __init__(self, seed: int | str, *, depth: int, steps: int) -> None:
        self._random = random.Random(seed)
        self._changes = set(self._random.sample(range(max(steps, depth)), depth - 1))
        self._priorities: dict[object, float] = {}
        self._lowest = 0.0
        self._step = 0
        self.made: list[int] = []

    def choose(self, options: int) -> int:
        choice = self._random.randrange(options)
        self.made.append(choice)
        return choice

    def pick(self, tasks: Sequence[object]) -> int:
        """Which of `tasks` runs."""
        priorities = self._priorities
        for task in tasks:
            if task not in priorities:
                priorities[task] = self._random.random()
        best = max(range(len(tasks)), key=lambda place: priorities[tasks[place]])
        if self._step in self._changes:
            self._lowest -= 1.0
            priorities[tasks[best]] = self._lowest
            best = max(range(len(tasks)), key=lambda place: priorities[tasks[place]])
        self._step += 1
        self.made.append(best)
        return best


_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def encode(choices: Sequence[int]) -> str:
    """Choices as a short string: a digit each, runs of zeros as `.` and their number. `decode` is the way back."""
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
