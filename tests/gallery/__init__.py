"""A gallery of concurrency bugs: each was in a program that people rely on, and is re-created here on one page.

An exhibit is a module. Its text tells the story and where it was seen. It has

    buggy, correct    two programs, to be given to `kernel.testing.explore`
    ERROR             what the buggy one fails with, under some schedule
    OPTIONS           other arguments of `explore`, if there are any

`ALL` has them, in an order in which they can be read. Most are right as long as nobody else runs at one certain
`await`. No test run shows them, unless the schedule is looked for.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from . import (
    abba,
    broken_after_delivery,
    double_close,
    ghost_owner,
    half_made,
    lapped,
    lost_item,
    lost_notification,
    lost_wakeup,
    missed_pulse,
    over_granted,
    overdrawn,
    philosophers,
    put_after_close,
    select_drops,
    shared_connection,
    starved_writer,
    stranded,
    swallowed_cancel,
    timeout_drops,
    upgrade,
    wait_without_lock,
    woken_twice,
    wrong_answer,
    wrong_one_notified,
)

__all__ = ["ALL", "name_of", "options"]

ALL: tuple[ModuleType, ...] = (
    # looked, and acted later
    overdrawn, half_made, shared_connection, put_after_close, double_close,
    # slept through it
    lost_wakeup, missed_pulse, lapped, wrong_one_notified,
    # wait for one another
    abba, philosophers, upgrade, starved_writer,
    # given to the wrong one
    over_granted, broken_after_delivery, woken_twice,
    # cancelled at the wrong moment
    lost_item, select_drops, timeout_drops, stranded, ghost_owner, lost_notification, wait_without_lock, wrong_answer,
    swallowed_cancel,
)  # fmt: skip


def name_of(exhibit: ModuleType) -> str:
    """What it is called: the last part of its module's name."""
    return exhibit.__name__.rpartition(".")[2]


def options(exhibit: ModuleType) -> dict[str, Any]:
    """How to explore it."""
    found: dict[str, Any] = getattr(exhibit, "OPTIONS", {})
    return found
