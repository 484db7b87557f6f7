"""What the pytest plugin can be told: on the command line, in the ini file, by a test's mark."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import pytest

from .leftovers import KINDS

__all__ = ["LEFTOVERS", "Options", "kinds", "options", "seconds"]

LEFTOVERS: Final = ("tasks", *KINDS)


@dataclass(frozen=True)
class Options:
    """What the command line and the ini file say."""

    auto: bool
    timeout: float
    leftovers: frozenset[str]
    patience: float
    stderr: int | None
    """Where to write what must be seen at once: a copy of stderr's descriptor, made before pytest captures that."""


options: Final = pytest.StashKey[Options]()


def seconds(value: Any, name: str) -> float:
    """A number of seconds from 0 up. Raises UsageError for anything else."""
    with suppress(TypeError, ValueError):
        if float(value) >= 0:
            return float(value)
    raise pytest.UsageError(f"{name} must be a number of seconds from 0 up, not {value!r}")


def kinds(value: str | Iterable[str] | bool, name: str) -> frozenset[str]:
    """Kinds of leftovers; True for all, False for none. Raises UsageError for words that are none."""
    if isinstance(value, bool):
        return frozenset(LEFTOVERS if value else ())
    words = value.split() if isinstance(value, str) else value
    if unknown := set(words) - set(LEFTOVERS):
        raise pytest.UsageError(f"{name} knows {', '.join(LEFTOVERS)}, but not {', '.join(sorted(unknown))}")
    return frozenset(words)
