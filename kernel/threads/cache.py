"""Worker threads that wait for work: starting one costs 60 us, waking one 5.

    idle ----- job put down, bell rung -------> working
      ^                                             |
      +---- puts itself on the list of the idle ----+
      |
      +---- nothing came for 10 seconds ----> gone

Each worker sleeps on a bell of its own. Whoever has a job takes the worker that became idle last, whose memory is the
warmest, puts the job down and rings. There is no queue: if nobody is idle, there is a new worker, and it is the
limiters' business how many that can become.

A worker that gives up must not be handed a job at the same moment. So to be on the list is to be available, taking one
off the list is one atomic operation of a dict, and a worker goes only if it found itself still on it.

The bell would be a lock, if there were not the GIL. The system likes to run a thread that was woken at once, in place
of the one that woke it. `lock.release()` keeps the GIL: the worker wakes, cannot go on, and sleeps again, and all that
switching is twice the work. A write to a file lets go of the GIL first: the worker runs, goes idle and sleeps, and the
writer continues behind its `write`. That halves the time of a whole call, so on Linux the bell is an eventfd; without
one, or when the process has no descriptors left, it is a lock.

The threads are daemons: a program that ends does not wait for a function that never returns.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from contextvars import Context
from itertools import count
from typing import Any, Final, Protocol, TypeVar

from outcome import Outcome, capture

__all__ = ["hand_over", "start_thread_soon"]

T = TypeVar("T")

IDLE_SECONDS: Final = 10.0
"""How long a worker waits for the next job."""

_ONE: Final = b"\1\0\0\0\0\0\0\0"

_idle: dict[_Worker, None] = {}
_eventfds: set[int] = set()  # of all workers, for the child of a fork
_numbers = count()


class Job(Protocol):
    """What a worker can do. Neither method may raise."""

    def work(self) -> None:
        """Do it."""

    def report(self) -> None:
        """Tell whoever waits. The worker is available again already, so it may get the next job through this."""


class _LockBell:
    __slots__ = ("ring", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self.ring = self._lock.release

    def wait(self, seconds: float) -> bool:
        """Sleep until it is rung; False if it was not."""
        return self._lock.acquire(timeout=seconds)

    def close(self) -> None:
        pass


class _EventfdBell:
    __slots__ = ("_fd", "_poll")

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC)
        _eventfds.add(self._fd)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def ring(self) -> None:
        os.write(self._fd, _ONE)

    def wait(self, seconds: float) -> bool:
        if not self._poll.poll(seconds * 1000):
            return False
        os.read(self._fd, 8)
        return True

    def close(self) -> None:
        _eventfds.discard(self._fd)
        os.close(self._fd)


def _new_bell() -> _EventfdBell | _LockBell:
    if hasattr(os, "eventfd"):
        try:
            return _EventfdBell()
        except OSError:  # no descriptors left
            pass
    return _LockBell()


class _Worker:
    """One thread. `_job` belongs to whoever has taken the worker off the list, from then until the bell is rung."""

    __slots__ = ("_bell", "_job", "_job_name", "_name", "thread")

    def __init__(self) -> None:
        self._job: Job | None = None
        self._job_name: str | None = None
        self._bell = _new_bell()
        self._name = f"kernel worker {next(_numbers)}"
        self.thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        try:
            Context().run(self.thread.start)  # some Pythons let a thread inherit the context, and this one stays
        except BaseException:
            self._bell.close()
            raise

    def take(self, job: Job, name: str | None) -> None:
        self._job = job
        self._job_name = name
        self._bell.ring()

    def _work(self) -> None:
        while True:
            if self._bell.wait(IDLE_SECONDS):
                self._do_job()
                continue
            try:
                del _idle[self]
            except KeyError:
                continue  # somebody has taken us off the list, and is about to ring
            self._bell.close()
            return

    def _do_job(self) -> None:
        """In a function of its own, so that no variable keeps the job while the worker is idle."""
        job, name = self._job, self._job_name
        assert job is not None
        self._job = None
        if name is not None:
            self.thread.name = name
        job.work()
        if name is not None:
            self.thread.name = self._name
        _idle[self] = None  # before reporting: whoever is told may bring the next job at once
        try:
            job.report()
        except BaseException as error:  # say so as if the thread had died of it; but it is on the list
            threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, self.thread)))


def hand_over(job: Job, name: str | None = None) -> None:
    """Have a worker do `job`, called `name` meanwhile. Raises RuntimeError if the system allows no more threads."""
    try:
        worker, _ = _idle.popitem()
    except KeyError:
        worker = _Worker()
    worker.take(job, name)


class _Delivery:
    """A function, and whom to tell what came of it."""

    __slots__ = ("_deliver", "_fn", "_result")

    def __init__(self, fn: Callable[[], Any], deliver: Callable[[Outcome[Any]], object]) -> None:
        self._fn: Callable[[], Any] | None = fn
        self._deliver = deliver
        self._result: Outcome[Any] | None = None

    def work(self) -> None:
        assert self._fn is not None
        self._result = capture(self._fn)
        self._fn = None  # what it refers to must not live until this thread gets on

    def report(self) -> None:
        assert self._result is not None
        self._deliver(self._result)


def start_thread_soon(fn: Callable[[], T], deliver: Callable[[Outcome[T]], object], name: str | None = None) -> None:
    """Call `deliver(outcome.capture(fn))` in a worker thread. Returns at once; may be called from any thread.

    `deliver` runs in the worker thread, must not raise, and should be quick: usually it says `run_sync_soon`. `name` is
    the thread's while it does this. No limit on the number of threads; for blocking functions use
    `kernel.to_thread.run_sync`, which has one.

    Raises RuntimeError if the system allows no more threads.
    """
    hand_over(_Delivery(fn, deliver), name)


def _forget_all() -> None:
    """In the child of a fork: the workers, idle or not, are the parent's."""
    _idle.clear()
    while _eventfds:
        os.close(_eventfds.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
