"""Leftovers: what was there before a test, what is there after it, and what the difference is.

    before = look()
    ...
    left = wait_until_gone(before, patience=1.0)
    assert not left, describe(left)

A *thing* is a pair: its kind, and what tells it from all others. So a set of things is an inventory, and what a test
has left behind is the difference of two sets.

    kind        what                                    where it is read
    ----------  --------------------------------------  -----------------------------------
    fds         number, device and inode of the file    /proc/self/fd; none where there is no /proc
    threads     the `threading.Thread`                  `threading.enumerate()`
    children    process id                              /proc/self/task/*/children; likewise

The number of a descriptor alone would not do: it may be closed, and belong to another file a moment later.

The kernel's worker threads stay for ten seconds after a call, to serve the next one. While they are idle, neither they
nor the descriptors they sleep on count. One that still works does.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from typing import Any, Final

from ..threads import cache

__all__ = ["KINDS", "Thing", "describe", "look", "wait_until_gone"]

Thing = tuple[str, Any]


def _fds() -> Iterator[tuple[int, int, int]]:
    bells = cache._eventfds
    with suppress(FileNotFoundError):
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # such as the one by which this directory was read
                fd = int(name)
                status = os.fstat(fd)
                if fd not in bells:
                    yield fd, status.st_dev, status.st_ino


def _threads() -> set[threading.Thread]:
    return set(threading.enumerate()) - {worker.thread for worker in list(cache._idle)}


def _children() -> Iterator[int]:
    with suppress(FileNotFoundError):
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError), open(f"/proc/self/task/{thread}/children") as file:
                yield from map(int, file.read().split())


_LOOK: Final = {"fds": _fds, "threads": _threads, "children": _children}
KINDS: Final = tuple(_LOOK)


def look(kinds: Iterable[str] = KINDS) -> set[Thing]:
    """What there is now, of the given kinds. Cost: 40 us, most of it for the descriptors."""
    return {(kind, what) for kind in kinds for what in _LOOK[kind]()}


def wait_until_gone(before: Collection[Thing], kinds: Collection[str] = KINDS, patience: float = 1.0) -> set[Thing]:
    """What is there now and was not before. As long as there is such a thing, look again, for `patience` real seconds.

    A thread that was told to end takes a moment to do so. A file may be open only because it is part of a reference
    cycle: the garbage collector is asked, once, before anything is called left.
    """
    end = time.monotonic() + patience
    pause = 0.001
    while left := look(kinds).difference(before):
        if pause == 0.001:
            gc.collect()
        elif time.monotonic() >= end:
            break
        else:
            time.sleep(pause)
        pause *= 2
    return left


def describe(things: Iterable[Thing]) -> list[str]:
    """A line for each, for people."""
    return sorted(f"{_NOUNS[kind]} {_TELL[kind](what)}" for kind, what in things)


def _tell_fd(what: tuple[int, int, int]) -> str:
    target = "closed meanwhile"
    with suppress(OSError):
        target = os.readlink(f"/proc/self/fd/{what[0]}")
    return f"{what[0]}: {target}"


def _tell_child(pid: int) -> str:
    command = ""
    with suppress(OSError), open(f"/proc/{pid}/cmdline") as file:
        command = file.read().replace("\0", " ").strip()
    return f"{pid}: {command or 'has ended, and nobody has asked how'}"


_NOUNS: Final = {"fds": "file descriptor", "threads": "thread", "children": "child process"}
_TELL: Final[dict[str, Any]] = {"fds": _tell_fd, "threads": repr, "children": _tell_child}
