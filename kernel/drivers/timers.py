"""Deadlines, in order, on a sorted list.

Most timeouts never fire: they are set, the operation is done in time, they are removed. So `add` only writes the timer
down in a dict of *fresh* ones, and `remove` strikes it out again, 0.05 us each. Only when the loop is about to sleep,
or something is due, are the fresh ones sorted in, all at once; those gone by then have never touched the list.

The list holds tuples `(deadline, number, timed)`, which compare in C. The number counts up, so that equal deadlines
expire in the order they were added and no two tuples ever compare their third items. Taking one out costs 1 to 2 us.
Those that are removed are therefore gathered, and taken out when the list is next looked at, or when they are half of
it: one by one if they are few, else by building the list anew, at a tenth of the price when everything is cancelled.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from math import inf
from typing import Any, Final

from sortedcontainers import SortedList

from ..core.ports import Timed

__all__ = ["SortedTimers"]

Entry = tuple[float, float, Any]

_DUE: Final = (inf, -1, None)
"""Stands for the entry of a timer that has come off the list and waits for its turn to expire in this pass."""


class SortedTimers:
    """See above. A `timed` is nowhere, fresh, in the list (`timer` is its entry) or due (`timer is _DUE`)."""

    def __init__(self) -> None:
        self._fresh: dict[Timed, float] = {}
        self._soonest = inf  # all(self._soonest <= deadline for deadline in _fresh.values())
        self._sorted: SortedList[Entry] = SortedList()
        self._removed: list[Entry] = []  # in _sorted still, but nobody's any more
        self._numbers = count()

    def add(self, deadline: float, timed: Timed) -> None:
        self._fresh[timed] = deadline
        if deadline < self._soonest:
            self._soonest = deadline

    def remove(self, timed: Timed) -> None:
        if self._fresh.pop(timed, None) is not None:
            return
        entry, timed.timer = timed.timer, None
        if entry is not None and entry is not _DUE:
            self._removed.append(entry)
            if len(self._removed) * 2 >= len(self._sorted):
                self._take_out_removed()

    def next_deadline(self) -> float:
        self._settle()
        return self._sorted[0][0] if self._sorted else inf

    def expired(self, now: float) -> Iterator[Timed]:
        if now < self._soonest and not (self._sorted and self._sorted[0][0] <= now):
            return iter(())
        self._settle()
        return self._take(now)

    def _settle(self) -> None:
        """Take out what was removed, sort in what is fresh."""
        if self._removed:
            self._take_out_removed()
        if self._fresh:
            entries: list[Entry] = []
            for timed, deadline in self._fresh.items():
                timed.timer = entry = (deadline, next(self._numbers), timed)
                entries.append(entry)
            self._fresh.clear()
            self._soonest = inf
            self._sorted.update(entries)

    def _take_out_removed(self) -> None:
        if len(self._removed) > len(self._sorted) // 16:
            numbers = {entry[1] for entry in self._removed}
            self._sorted = SortedList(entry for entry in self._sorted if entry[1] not in numbers)
        else:
            for entry in self._removed:
                self._sorted.remove(entry)
        self._removed.clear()

    def _take(self, now: float) -> Iterator[Timed]:
        """Cut off what is due, then hand it out one by one, as the first may well remove the second."""
        end = self._sorted.bisect_right((now, inf, None))
        batch = [entry[2] for entry in self._sorted[:end]]
        del self._sorted[:end]
        for timed in batch:
            timed.timer = _DUE
        for timed in batch:
            if timed.timer is _DUE:
                timed.timer = None
                yield timed

    def __len__(self) -> int:
        return len(self._fresh) + len(self._sorted) - len(self._removed)
