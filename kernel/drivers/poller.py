"""Which files are ready: one port, three ways to ask the system.

    EpollPoller      Linux. One-shot registrations that stay in place, re-armed for each wait.
    KqueuePoller     macOS and the BSDs. One-shot filters, which the system removes itself.
    SelectorPoller   everything else, on a selector of the standard library: poll, select.

All serve two kinds of descriptors. Those of *other people's* files are plain numbers, whose closing we do not see, and
that decides how they are watched. When a number is closed, epoll and kqueue drop it silently, unless a duplicate keeps
the open file alive, in which case epoll goes on reporting a number that nobody can unregister. A one-shot registration
is deaf after it has spoken once, so such a report comes at most once, is for nobody, and is dropped. And each wait is
armed anew, `modify` first and `register` if that finds nothing, so a number that was closed and reused is really armed
again. The price is one `epoll_ctl` per wait, 0.5 us (docs/decisions/0003-readiness.md has the alternatives).

Those of *our own* sockets are closed by us, and `forget` comes before. So they are watched once, level-triggered, and
stay so: `watch` puts the interest in place, and a wait is no more than a task's name in the socket's trap. It is taken
back when reports find nobody waiting, else the same report would come again and again.

A poll that sleeps can be ended from outside. For other threads there is `wakeup`, through an eventfd where there is
one, else a pipe or a pair of sockets. For signals there is `signal_fd`: a signal may arrive in the moment between the
last line of Python and the system call that sleeps, when no Python code can react to it any more; so the C code of the
interpreter, told by `signal.set_wakeup_fd`, writes a byte that the sleep will see. (It can't write to an eventfd, which
wants eight.)
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import selectors
import socket
import stat
import sys
from collections.abc import Iterable, Sequence
from math import ceil, inf
from typing import Any, Final, Protocol

from ..core.errors import BusyResourceError
from ..core.loop import STRIDE
from ..core.ports import READ, WRITE, Direction, Poller
from ..core.task import Task

__all__ = ["SelectorPoller", "default_poller"]

LONGEST: Final = 86400.0  # seconds of a sleep: a day, as the systems' limits are below a month
PATIENCE: Final = 3  # reports for nobody, after which a socket of ours is not watched any longer
_DOING: Final = ("read from", "write to")


class Watch(Protocol):
    """One direction of a socket of our own: what `watch` takes. A poller in which it has been put in place keeps it."""

    fd: int
    direction: Direction
    task: Task | None
    """Who waits. Set by the socket; cleared by the poller, when the wait is over."""
    poller: Any
    """In which poller the interest is in place; set by that."""
    misses: int
    """How many reports have found nobody waiting."""


class _Waiters:
    """Who waits for which fd: the book-keeping that all pollers share. `_waiting[fd] == [reader, writer]`, at least one
    of them a task; `_watched[fd] == [to read, to write]`, at least one of them a watch. An fd is in one of the two.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[Task | None]] = {}
        self._watched: dict[int, list[Watch | None]] = {}
        self._wakers: dict[int, _Waker] = {}
        self._waker = self._add_waker(_Waker(eventfd=True))
        self._signals: _Waker | None = None

    def _add_waker(self, waker: _Waker) -> _Waker:
        self._wakers[waker.fd] = waker
        self._watch_always(waker.fd)
        return waker

    def wakeup(self) -> None:
        self._waker.wake()

    def signal_fd(self) -> int:
        """For `signal.set_wakeup_fd`: a byte written to this fd ends a poll. Made when first asked for."""
        if self._signals is None:
            self._signals = self._add_waker(_Waker(eventfd=False))
        return self._signals.other

    def poll(self, timeout: float) -> Iterable[Task]:
        if timeout == 0 and not self._waiting and not self._watched:
            return ()
        return self.take(self.wait(timeout))

    def close(self) -> None:
        """Release all descriptors. May be called twice."""
        for pair in list(self._watched.values()):
            for watch in pair:
                if watch is not None:
                    watch.poller = watch.task = None  # it may wait again, in another run, or in a forked process
        self._watched.clear()
        for waker in self._wakers.values():
            waker.close()
        self._wakers.clear()

    def arm(self, fd: int, direction: Direction, task: Task) -> None:
        if fd in self._watched:
            self._unwatch(fd)
        pair = self._waiting.get(fd)
        if pair is None:
            pair = self._waiting[fd] = [None, None]
        elif pair[direction] is not None:
            raise BusyResourceError(
                f"fd {fd} is waited on by {pair[direction]!r} already. Only one task at a time may wait to "
                f"{_DOING[direction]} a file: put a lock around it."
            )
        pair[direction] = task
        try:
            self._watch(fd, pair)
        except BaseException as error:
            self._clear(fd, direction)
            _explain(error, fd)
            raise

    def disarm(self, fd: int, direction: Direction) -> None:
        if fd in self._waiting:  # else another thread has just closed the file
            pair = self._clear(fd, direction)
            self._watch_less(fd, pair)

    def forget(self, fd: int) -> list[Task]:
        watched = self._watched.pop(fd, None)
        if watched is not None:
            return self._forget_watched(fd, watched)
        pair = self._waiting.pop(fd, None)
        if pair is None:
            return []
        self._watch_less(fd, [None, None])
        return [task for task in pair if task is not None]

    # Sockets of our own.

    def watch(self, watch: Watch, task: Task) -> None:
        """Let `task` wait, and leave the interest in place for the waits to come, each of which is then `watch.task =
        task` and no call. The wait ends as one of `arm` does, or by setting `watch.task` to None.

        While somebody waits for the same fd by its number, this is `arm`. Errors are those of `arm`.
        """
        fd = watch.fd
        if fd in self._waiting:
            self.arm(fd, watch.direction, task)
            return
        known = self._watched.get(fd)
        pair: list[Watch | None] = [None, None] if known is None else list(known)
        pair[watch.direction] = watch
        try:
            self._keep(fd, pair, known)
        except BaseException as error:
            _explain(error, fd)
            raise
        self._watched[fd] = pair
        watch.poller = self
        watch.task = task

    def unwatch(self, watch: Watch) -> None:
        """Take the interest back, as another poller is to have it. Nobody waits here in this direction; somebody may in
        the other. For any thread.
        """
        pair = self._watched.get(watch.fd)
        if pair is not None and pair[watch.direction] is watch:
            rest = list(pair)
            rest[watch.direction] = None
            self._watch_only(watch.fd, rest, pair)
        watch.poller = None

    def _unwatch(self, fd: int) -> None:
        """Somebody waits for a socket of ours by its number: so do all who wait for it, until the next `watch`."""
        pair = self._watched.pop(fd)
        waiting = [None if watch is None else watch.task for watch in pair]
        self._forget_watched(fd, pair)
        if waiting[READ] is not None or waiting[WRITE] is not None:
            self._waiting[fd] = waiting
            self._watch(fd, waiting)

    def _forget_watched(self, fd: int, pair: list[Watch | None]) -> list[Task]:
        tasks = []
        for watch in pair:
            if watch is not None:
                watch.poller = None
                if watch.task is not None:
                    tasks.append(watch.task)
                    watch.task = None
        self._watch_only(fd, [None, None], pair)
        return tasks

    def _watch_only(self, fd: int, rest: list[Watch | None], pair: list[Watch | None]) -> None:
        """Of those in `pair`, go on with those in `rest`."""
        with contextlib.suppress(OSError):  # the number was closed, by other means than the socket's own
            self._keep(fd, rest, pair)
        if rest[READ] is None and rest[WRITE] is None:
            self._watched.pop(fd, None)
        else:
            self._watched[fd] = rest

    def _report(self, fd: int, pair: list[Watch | None], over: tuple[bool, bool], done: list[Task]) -> None:
        """`fd`, which is watched, is ready where `over` says so: add to `done` those whose wait is over. What was
        reported and finds nobody is not watched any longer.
        """
        rest = list(pair)
        for watch in pair:
            if watch is None or not over[watch.direction]:
                continue
            if watch.task is not None:
                done.append(watch.task)
                watch.task = None
            elif watch.misses < PATIENCE:  # it may have been woken, and not have had its turn yet
                watch.misses += 1
            else:
                watch.misses = 0
                rest[watch.direction] = watch.poller = None
        if rest != pair:
            self._watch_only(fd, rest, pair)

    def _clear(self, fd: int, direction: Direction) -> list[Task | None]:
        pair = self._waiting[fd]
        pair[direction] = None
        if pair[not direction] is None:
            del self._waiting[fd]
        return pair

    def _ready(self, fd: int, readable: bool, writable: bool) -> list[Task]:
        """Take out and return those whose wait is over. If somebody goes on waiting for the other direction, arm for
        that one again.
        """
        pair = self._waiting.get(fd)
        if pair is None:
            if fd in self._wakers:
                self._wakers[fd].drain()
            return []  # or a late report: whoever waited was cancelled, or the file is closed
        done = [task for task, over in zip(pair, (readable, writable), strict=True) if over and task is not None]
        for direction, over in ((READ, readable), (WRITE, writable)):
            if over:
                pair[direction] = None
        if pair[READ] is None and pair[WRITE] is None:
            del self._waiting[fd]
        try:
            self._after_report(fd, pair)
        except OSError:  # closed meanwhile: whoever goes on waiting will find out from the system call that follows
            done += [task for task in pair if task is not None]
            self._waiting.pop(fd, None)
        return done

    def __len__(self) -> int:
        # Over a copy: the garbage collector may come in between, and find a socket that nobody has closed.
        own = sum(watch is not None and watch.task is not None for pair in [*self._watched.values()] for watch in pair)
        return own + sum(task is not None for pair in self._waiting.values() for task in pair)

    def __bool__(self) -> bool:
        """What `len` says, without counting. Asked before each sleep without end; with `any` it took twice as long."""
        if self._waiting:
            return True
        try:
            for reader, writer in self._watched.values():
                if (reader is not None and reader.task is not None) or (writer is not None and writer.task is not None):
                    return True
        except RuntimeError:  # a socket was collected meanwhile, in another thread
            return len(self) > 0
        return False

    # What each system does in its own way.

    def wait(self, timeout: float) -> Any:
        """The first half of a poll: sleep, and return what happened. In guest mode another thread does this, so it
        touches nothing that the other methods write.
        """
        raise NotImplementedError

    def take(self, happened: Any) -> Iterable[Task]:
        """The second half: who can go on after what `wait` has returned."""
        raise NotImplementedError

    def _watch_always(self, fd: int) -> None:
        """Report `fd` whenever it is readable."""
        raise NotImplementedError

    def _watch(self, fd: int, pair: list[Task | None]) -> None:
        """From now on, report `fd` for those in `pair`."""
        raise NotImplementedError

    def _watch_less(self, fd: int, pair: list[Task | None]) -> None:
        """Somebody has left `pair` without a report."""

    def _keep(self, fd: int, pair: list[Watch | None], known: list[Watch | None] | None) -> None:
        """From now on, report `fd` for those in `pair`, again and again; up to now that was for those in `known`."""
        raise NotImplementedError

    def _after_report(self, fd: int, pair: list[Task | None]) -> None:
        """`fd` was reported, and `pair` is who goes on waiting, if anybody."""
        if pair[READ] is not None or pair[WRITE] is not None:
            self._watch(fd, pair)


_ONE: Final = (1).to_bytes(8, sys.byteorder)  # what an eventfd wants; a pipe takes it too


class _Waker:
    """A wire: `wake` makes `fd` readable, `drain` makes it silent again. `other` is the end to write to."""

    def __init__(self, *, eventfd: bool) -> None:
        self._sockets: tuple[socket.socket, ...] = ()
        self.fd = self.other = -1
        if eventfd and hasattr(os, "eventfd"):
            self.fd = self.other = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        elif hasattr(os, "pipe2"):
            self.fd, self.other = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        else:
            self._sockets = socket.socketpair()
            for end in self._sockets:
                end.setblocking(False)
            self.fd, self.other = (end.fileno() for end in self._sockets)

    def wake(self) -> None:
        try:
            if self._sockets:
                self._sockets[1].send(_ONE)
            else:
                os.write(self.other, _ONE)
        except BlockingIOError:
            pass  # full: there is more than enough to wake up for

    def drain(self) -> None:
        try:
            if self._sockets:
                self._sockets[0].recv(4096)
            else:
                os.read(self.fd, 4096)
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Close both ends. May be called twice."""
        ends, self.fd, self.other = {self.fd, self.other}, -1, -1
        for end in self._sockets:
            end.close()
        if not self._sockets and ends != {-1}:
            for fd in ends:
                os.close(fd)

    __del__ = close  # of a kernel that was dropped without being closed


def _explain(error: BaseException, fd: int) -> None:
    number = getattr(error, "errno", None)
    if number == errno.EPERM:
        error.add_note(
            f"fd {fd} is a regular file or a directory: always ready, nothing to wait for. Read it in a thread."
        )
    elif number == errno.EBADF:
        error.add_note(f"fd {fd} is not open: was it closed while it was still in use?")


if sys.platform == "linux":
    EPOLLIN: Final = select.EPOLLIN
    EPOLLOUT: Final = select.EPOLLOUT
    EPOLLONESHOT: Final = select.EPOLLONESHOT

    class EpollPoller(_Waiters):
        """Linux. A registration is made once per fd and re-armed for each wait. Taking a wait back costs nothing."""

        def __init__(self) -> None:
            self._epoll = select.epoll()
            self._known: set[int] = set()  # registered once; whether they still are, only the system knows
            super().__init__()

        def _watch_always(self, fd: int) -> None:
            self._epoll.register(fd, EPOLLIN)

        def _watch(self, fd: int, pair: list[Task | None]) -> None:
            events = EPOLLONESHOT
            if pair[READ] is not None:
                events |= EPOLLIN
            if pair[WRITE] is not None:
                events |= EPOLLOUT
            if fd in self._known:
                try:
                    self._epoll.modify(fd, events)
                    return
                except FileNotFoundError:
                    self._known.discard(fd)  # closed and reused since
            try:
                self._epoll.register(fd, events)
            except FileExistsError:
                self._epoll.modify(fd, events)
            self._known.add(fd)

        def _keep(self, fd: int, pair: list[Watch | None], known: list[Watch | None] | None) -> None:
            events = (EPOLLIN if pair[READ] is not None else 0) | (EPOLLOUT if pair[WRITE] is not None else 0)
            if not events:
                self._epoll.unregister(fd)
            elif known is not None:
                try:
                    self._epoll.modify(fd, events)
                except FileNotFoundError:  # somebody closed it by its number, and it was reused since
                    self._epoll.register(fd, events)
            else:
                try:
                    self._epoll.register(fd, events)
                except FileExistsError:  # there were waits for it by its number
                    self._known.discard(fd)
                    self._epoll.modify(fd, events)

        def forget(self, fd: int) -> list[Task]:
            if fd in self._known:
                self._known.discard(fd)
                with contextlib.suppress(OSError):  # closed already: nothing of ours is left in the epoll
                    self._epoll.unregister(fd)
            return super().forget(fd)

        def wait(self, timeout: float) -> list[tuple[int, int]]:
            # No more at a time than the loop will run before it asks again. The others' turn comes then. If all were
            # reported, those whose task had no turn yet would be reported twice; with 500 busy sockets, a third slower.
            return self._epoll.poll(timeout if timeout < LONGEST else LONGEST, STRIDE)  # it rounds up by itself

        def take(self, happened: list[tuple[int, int]]) -> Iterable[Task]:
            ready: list[Task] = []
            watched = self._watched
            for fd, events in happened:
                pair = watched.get(fd)
                if pair is not None and events == EPOLLIN:  # by far the most frequent: here it costs half
                    watch = pair[READ]
                    if watch is not None and (task := watch.task) is not None:
                        watch.task = None
                        ready.append(task)
                        continue
                # Errors and hang-ups wake both sides: the system call that follows will say what is wrong.
                readable, writable = bool(events & ~EPOLLOUT), bool(events & ~EPOLLIN)
                if pair is not None:
                    self._report(fd, pair, (readable, writable), ready)
                else:
                    ready += self._ready(fd, readable, writable)
            return ready

        def close(self) -> None:
            self._epoll.close()
            super().close()


if sys.platform != "linux" and hasattr(select, "kqueue"):

    class KqueuePoller(_Waiters):
        """macOS and the BSDs. A filter per direction, which the system removes when it reports."""

        def __init__(self) -> None:
            self._kqueue = select.kqueue()
            self._filters = (select.KQ_FILTER_READ, select.KQ_FILTER_WRITE)
            super().__init__()

        def _watch_always(self, fd: int) -> None:
            self._kqueue.control([select.kevent(fd, self._filters[READ], select.KQ_EV_ADD)], 0)

        def _watch(self, fd: int, pair: list[Task | None]) -> None:
            flags = select.KQ_EV_ADD | select.KQ_EV_ONESHOT
            for direction in (READ, WRITE):
                if pair[direction] is not None:
                    self._kqueue.control([select.kevent(fd, self._filters[direction], flags)], 0)

        def _watch_less(self, fd: int, pair: list[Task | None]) -> None:
            for direction in (READ, WRITE):
                if pair[direction] is None:
                    try:
                        self._kqueue.control([select.kevent(fd, self._filters[direction], select.KQ_EV_DELETE)], 0)
                    except OSError as error:
                        if error.errno not in (errno.ENOENT, errno.EBADF):
                            raise

        def _after_report(self, fd: int, pair: list[Task | None]) -> None:
            pass  # each filter stands for itself: the other direction's is still in place

        def _keep(self, fd: int, pair: list[Watch | None], known: list[Watch | None] | None) -> None:
            for direction in (READ, WRITE):
                was = known[direction] if known is not None else None
                if pair[direction] is not None and pair[direction] is not was:
                    self._kqueue.control([select.kevent(fd, self._filters[direction], select.KQ_EV_ADD)], 0)
                elif was is not None and pair[direction] is None:
                    self._kqueue.control([select.kevent(fd, self._filters[direction], select.KQ_EV_DELETE)], 0)

        def wait(self, timeout: float) -> list[Any]:
            room = len(self._waiting) + 2 * len(self._watched) + len(self._wakers) + 1
            return self._kqueue.control(None, room, _milliseconds(timeout) / 1000)

        def take(self, happened: list[Any]) -> Iterable[Task]:
            ready: list[Task] = []
            for event in happened:
                readable = event.filter == select.KQ_FILTER_READ
                pair = self._watched.get(event.ident)
                if pair is not None:
                    self._report(event.ident, pair, (readable, not readable), ready)
                else:
                    ready += self._ready(event.ident, readable, not readable)
            return ready

        def close(self) -> None:
            self._kqueue.close()
            super().close()


class SelectorPoller(_Waiters):
    """Any system, on a selector of the standard library. An fd is registered for each wait, unregistered after it."""

    def __init__(self, selector: selectors.BaseSelector | None = None) -> None:
        self._selector = selector or selectors.DefaultSelector()
        super().__init__()

    def _watch_always(self, fd: int) -> None:
        self._selector.register(fd, selectors.EVENT_READ)

    def _watch(self, fd: int, pair: list[Task | None]) -> None:
        self._check(fd)
        self._set(fd, pair)

    def _check(self, fd: int) -> None:
        if isinstance(self._selector, selectors.SelectSelector):
            select.select([fd], [], [], 0)  # refuses a number beyond its limit, which later would break all waits
        if os.name == "posix":  # poll and select would take any number, and report it at once
            mode = os.fstat(fd).st_mode
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def _watch_less(self, fd: int, pair: list[Task | None]) -> None:
        with contextlib.suppress(OSError):  # closed already: nothing is being watched
            self._set(fd, pair)

    def _after_report(self, fd: int, pair: list[Task | None]) -> None:
        self._set(fd, pair)

    def _keep(self, fd: int, pair: list[Watch | None], known: list[Watch | None] | None) -> None:
        if known is None:
            self._check(fd)
        elif any(old is not None and new is not None and old is not new for old, new in zip(known, pair, strict=True)):
            self._set(fd, [None, None])  # closed and reused since, unnoticed: it must really be registered again
        self._set(fd, pair)

    def _set(self, fd: int, pair: Sequence[object | None]) -> None:
        events = (selectors.EVENT_READ if pair[READ] is not None else 0) | (
            selectors.EVENT_WRITE if pair[WRITE] is not None else 0
        )
        known = fd in self._selector.get_map()
        if not events:
            if known:
                self._selector.unregister(fd)
        elif known:
            self._selector.modify(fd, events)
        else:
            self._selector.register(fd, events)

    def wait(self, timeout: float) -> list[tuple[Any, int]]:
        return self._select(timeout)

    def take(self, happened: list[tuple[Any, int]]) -> Iterable[Task]:
        ready: list[Task] = []
        for key, events in happened:
            readable, writable = bool(events & selectors.EVENT_READ), bool(events & selectors.EVENT_WRITE)
            pair = self._watched.get(key.fd)
            if pair is not None:
                self._report(key.fd, pair, (readable, writable), ready)
            else:
                ready += self._ready(key.fd, readable, writable)
        return ready

    def _select(self, timeout: float) -> list[tuple[Any, int]]:
        try:
            return self._selector.select(None if timeout == inf else _milliseconds(timeout) / 1000)
        except (OSError, ValueError):
            # select() refuses the whole set because of one closed fd. Report just those: their owners will find out.
            closed = [(key, key.events) for key in self._selector.get_map().values() if not _is_open(key.fd)]
            if not closed:
                raise
            return closed

    def close(self) -> None:
        self._selector.close()
        super().close()


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _milliseconds(timeout: float) -> int:
    """Rounded up, as waking too early means asking twice."""
    return ceil(min(timeout, LONGEST) * 1000)


def default_poller() -> Poller:
    """The best this system has."""
    if sys.platform == "linux":
        return EpollPoller()
    if sys.platform != "linux" and hasattr(select, "kqueue"):
        return KqueuePoller()
    return SelectorPoller()
