"""The poller port: one contract, run against every way of asking the system that this machine has.

The first half calls the port as the loop would, with stand-ins for tasks. The second half runs whole programs.
kqueue is tried on the real thing where there is one, and elsewhere on a small model of it.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import resource
import select
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from math import inf
from queue import SimpleQueue
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import kernel
from kernel.drivers import poller as poller_module
from kernel.drivers.poller import SelectorPoller, default_poller
from kernel.lowlevel import READ, WRITE, checkpoint, notify_closing, wait_readable, wait_writable
from kernel.testing import MockClock, wait_all_tasks_blocked

# ---- every poller ------------------------------------------------------------------------------------


class ModelOfKqueue:
    """What `select.kqueue()` does, as far as the driver uses it, on top of `select.poll`."""

    def __init__(self) -> None:
        self.filters: dict[tuple[int, int], tuple[int, int]] = {}
        self.lasting: set[tuple[int, int]] = set()  # not one-shot
        self.closed = False

    def control(self, changes: Any, max_events: int, timeout: float | None = None) -> list[Any]:
        for change in changes or ():
            key = (change.ident, change.filter)
            try:
                file = os.fstat(change.ident)
            except OSError:
                self.filters.pop(key, None)
                raise
            if self.filters.get(key, (file.st_dev, file.st_ino)) != (file.st_dev, file.st_ino):
                del self.filters[key]  # closed and reused: the system dropped it with the close
            if change.flags == FAKE_SELECT.KQ_EV_DELETE:
                if key not in self.filters:
                    raise FileNotFoundError(errno.ENOENT, "No such file or directory")
                del self.filters[key]
            else:
                assert change.flags in (FAKE_SELECT.KQ_EV_ADD | FAKE_SELECT.KQ_EV_ONESHOT, FAKE_SELECT.KQ_EV_ADD)
                (self.lasting.add if change.flags == FAKE_SELECT.KQ_EV_ADD else self.lasting.discard)(key)
                self.filters[key] = (file.st_dev, file.st_ino)
        events: list[Any] = []
        poll = select.poll()
        for fd in {fd for fd, _ in self.filters}:
            wanted = [one for other, one in self.filters if other == fd]
            poll.register(
                fd,
                sum(
                    {FAKE_SELECT.KQ_FILTER_READ: select.POLLIN, FAKE_SELECT.KQ_FILTER_WRITE: select.POLLOUT}[one]
                    for one in wanted
                ),
            )
        for fd, seen in poll.poll((timeout or 0) * 1000) if max_events else ():
            for one, mask in (
                (FAKE_SELECT.KQ_FILTER_READ, select.POLLIN),
                (FAKE_SELECT.KQ_FILTER_WRITE, select.POLLOUT),
            ):
                if (fd, one) in self.filters and seen & (mask | select.POLLHUP | select.POLLERR | select.POLLNVAL):
                    if (fd, one) not in self.lasting:
                        del self.filters[fd, one]
                    if not seen & select.POLLNVAL:
                        events.append(FAKE_SELECT.kevent(fd, one, 0))
        return events[:max_events]

    def close(self) -> None:
        self.closed = True


FAKE_SELECT: Any = SimpleNamespace(
    kqueue=ModelOfKqueue,
    kevent=lambda ident, filter, flags: SimpleNamespace(ident=ident, filter=filter, flags=flags),
    KQ_FILTER_READ=-1,
    KQ_FILTER_WRITE=-2,
    KQ_EV_ADD=1,
    KQ_EV_DELETE=2,
    KQ_EV_ONESHOT=16,
)


def driver_as_seen_on(platform: str, select_module: object) -> ModuleType:
    """Load kernel/drivers/poller.py once more, as another system would."""
    spec = importlib.util.spec_from_file_location("kernel.drivers.poller_elsewhere", poller_module.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "platform", platform)
        patch.setitem(sys.modules, "select", select_module)
        spec.loader.exec_module(module)
    return module


POLLERS: dict[str, Callable[[], Any]] = {"default": default_poller}
for _name in ("PollSelector", "SelectSelector", "EpollSelector", "KqueueSelector", "DevpollSelector"):
    if hasattr(selectors, _name):
        POLLERS[_name] = lambda name=_name: SelectorPoller(getattr(selectors, name)())
if not hasattr(select, "kqueue"):
    POLLERS["kqueue (a model)"] = driver_as_seen_on("darwin", FAKE_SELECT).KqueuePoller

every_poller = pytest.mark.parametrize("kind", POLLERS)


@pytest.fixture
def poller(kind: str) -> Iterator[Any]:
    poller = POLLERS[kind]()
    yield poller
    poller.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    yield a, b
    a.close()
    b.close()


@pytest.fixture
def other_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    yield a, b
    a.close()
    b.close()


@pytest.fixture
def duplicate() -> Iterator[Callable[[int], int]]:
    """`duplicate(fd)`: another number for the same open file, which keeps it alive until the test has ended."""
    made: list[int] = []

    def duplicate(fd: int) -> int:
        made.append(os.dup(fd))
        return made[-1]

    yield duplicate
    for fd in made:
        os.close(fd)


Pair = tuple[socket.socket, socket.socket]
Duplicate = Callable[[int], int]


class Somebody:
    """Stands in for a task: the port only keeps it and gives it back."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


A, B, C = Somebody("A"), Somebody("B"), Somebody("C")


def fill(sock: socket.socket) -> None:
    try:
        while True:
            sock.send(b"x" * 100_000)
    except BlockingIOError:
        pass


def drain(sock: socket.socket) -> None:
    try:
        while True:
            sock.recv(1_000_000)
    except BlockingIOError:
        pass


# ---- the port ----------------------------------------------------------------------------------------


@every_poller
def test_nobody_is_ready_when_nobody_waits(poller: Any) -> None:
    assert len(poller) == 0
    assert list(poller.poll(0)) == []
    assert list(poller.poll(0.0001)) == []


@every_poller
def test_a_reader_is_returned_once_there_is_something_to_read(poller: Any, pair: Pair) -> None:
    poller.arm(pair[0].fileno(), READ, A)
    assert len(poller) == 1
    assert list(poller.poll(0)) == []
    assert len(poller) == 1
    pair[1].send(b"x")
    assert list(poller.poll(inf)) == [A]
    assert len(poller) == 0


@every_poller
def test_a_writer_is_returned_once_there_is_room(poller: Any, pair: Pair) -> None:
    fill(pair[0])
    poller.arm(pair[0].fileno(), WRITE, A)
    assert list(poller.poll(0)) == []
    drain(pair[1])
    assert list(poller.poll(inf)) == [A]
    assert len(poller) == 0


@every_poller
def test_a_wait_is_over_when_it_was_reported(poller: Any, pair: Pair) -> None:
    pair[1].send(b"x")
    poller.arm(pair[0].fileno(), READ, A)
    assert list(poller.poll(0)) == [A]
    assert list(poller.poll(0)) == []
    assert list(poller.poll(0.001)) == []


@every_poller
def test_what_is_still_there_is_reported_to_each_new_wait(poller: Any, pair: Pair) -> None:
    pair[1].send(b"x")  # never read: readiness is a level and not an edge
    for who in (A, B, A):
        poller.arm(pair[0].fileno(), READ, who)
        assert list(poller.poll(0)) == [who]


@every_poller
def test_a_reader_and_a_writer_share_one_fd(poller: Any, pair: Pair) -> None:
    fd = pair[0].fileno()
    poller.arm(fd, READ, A)
    poller.arm(fd, WRITE, B)
    assert len(poller) == 2
    assert list(poller.poll(0)) == [B]
    assert len(poller) == 1
    assert list(poller.poll(0)) == []  # the writer's interest is gone: it would be ready all the time
    pair[1].send(b"x")
    assert list(poller.poll(0)) == [A]
    assert len(poller) == 0


@every_poller
def test_a_writer_goes_on_waiting_when_the_reader_was_served(poller: Any, pair: Pair) -> None:
    fd = pair[0].fileno()
    fill(pair[0])
    poller.arm(fd, WRITE, B)
    poller.arm(fd, READ, A)
    pair[1].send(b"x")
    assert list(poller.poll(0)) == [A]
    assert list(poller.poll(0)) == []
    drain(pair[1])
    assert list(poller.poll(0)) == [B]


@every_poller
def test_a_reader_and_a_writer_who_are_both_ready_are_both_returned(poller: Any, pair: Pair) -> None:
    pair[1].send(b"x")
    poller.arm(pair[0].fileno(), WRITE, B)
    poller.arm(pair[0].fileno(), READ, A)
    assert list(poller.poll(0)) == [A, B]
    assert len(poller) == 0


@every_poller
def test_many_fds_are_reported_in_one_look(poller: Any) -> None:
    pairs = [socket.socketpair() for _ in range(20)]
    people = [Somebody(str(number)) for number in range(20)]
    for (a, b), who in zip(pairs, people, strict=True):
        poller.arm(a.fileno(), READ, who)
        b.send(b"x")
    assert set(poller.poll(0)) == set(people)
    for a, b in pairs:
        a.close()
        b.close()


@every_poller
@pytest.mark.parametrize(("direction", "doing"), [(READ, "read from"), (WRITE, "write to")])
def test_two_who_wait_for_the_same_thing_are_an_error_that_changes_nothing(
    poller: Any, pair: Pair, direction: Any, doing: str
) -> None:
    fill(pair[0])
    fd = pair[0].fileno()
    poller.arm(fd, direction, A)
    with pytest.raises(kernel.BusyResourceError, match=rf"fd {fd} .*<A>.*{doing} a file.*put a lock"):
        poller.arm(fd, direction, B)
    assert len(poller) == 1
    pair[1].send(b"x")
    drain(pair[1])
    assert list(poller.poll(0)) == [A]


@every_poller
def test_a_wait_that_was_taken_back_is_not_reported_and_its_place_is_free(poller: Any, pair: Pair) -> None:
    fd = pair[0].fileno()
    poller.arm(fd, READ, A)
    poller.disarm(fd, READ)
    assert len(poller) == 0
    pair[1].send(b"x")
    assert list(poller.poll(0)) == []
    assert list(poller.poll(0.001)) == []
    poller.arm(fd, READ, B)
    assert list(poller.poll(0)) == [B]


@every_poller
def test_a_late_report_is_dropped_and_disturbs_nobody_else(poller: Any, pair: Pair, other_pair: Pair) -> None:
    poller.arm(pair[0].fileno(), READ, A)
    poller.disarm(pair[0].fileno(), READ)
    poller.arm(other_pair[0].fileno(), READ, B)
    pair[1].send(b"x")
    assert list(poller.poll(0)) == []  # the report of a wait that is over, if there is one
    other_pair[1].send(b"x")
    assert list(poller.poll(inf)) == [B]


@every_poller
@pytest.mark.parametrize("direction", [READ, WRITE])
def test_taking_back_one_direction_leaves_the_other(poller: Any, pair: Pair, direction: Any) -> None:
    fill(pair[0])
    fd = pair[0].fileno()
    poller.arm(fd, READ, A)
    poller.arm(fd, WRITE, B)
    poller.disarm(fd, direction)
    assert len(poller) == 1
    pair[1].send(b"x")
    drain(pair[1])
    left = B if direction == READ else A
    reports = [*poller.poll(0), *poller.poll(0), *poller.poll(0)]
    assert reports == [left]
    assert len(poller) == 0


@every_poller
def test_a_new_waiter_takes_the_place_of_one_that_left_while_the_other_direction_waits(poller: Any, pair: Pair) -> None:
    fill(pair[0])
    fd = pair[0].fileno()
    poller.arm(fd, WRITE, B)
    poller.arm(fd, READ, A)
    poller.disarm(fd, READ)
    poller.arm(fd, READ, C)
    pair[1].send(b"x")
    assert list(poller.poll(0)) == [C]
    drain(pair[1])
    assert list(poller.poll(0)) == [B]


@every_poller
def test_forget_returns_who_waited_reader_first_and_reports_nothing_more(poller: Any, pair: Pair) -> None:
    fd = pair[0].fileno()
    poller.arm(fd, WRITE, B)
    poller.arm(fd, READ, A)
    assert poller.forget(fd) == [A, B]
    assert len(poller) == 0
    pair[1].send(b"x")
    assert list(poller.poll(0)) == []


@every_poller
def test_forget_of_one_direction_alone(poller: Any, pair: Pair) -> None:
    poller.arm(pair[0].fileno(), WRITE, B)
    assert poller.forget(pair[0].fileno()) == [B]
    assert poller.forget(pair[0].fileno()) == []
    assert len(poller) == 0


@every_poller
def test_forget_of_an_fd_nobody_waits_for_does_nothing(poller: Any, pair: Pair) -> None:
    assert poller.forget(pair[0].fileno()) == []
    pair[1].send(b"x")
    poller.arm(pair[0].fileno(), READ, A)
    assert list(poller.poll(0)) == [A]
    assert poller.forget(pair[0].fileno()) == []
    assert poller.forget(987_654) == []


@every_poller
def test_a_forgotten_fd_can_be_waited_for_again(poller: Any, pair: Pair) -> None:
    fd = pair[0].fileno()
    poller.arm(fd, READ, A)
    poller.forget(fd)
    pair[1].send(b"x")
    poller.arm(fd, READ, B)
    assert list(poller.poll(0)) == [B]


@every_poller
def test_an_end_of_file_is_something_to_read(poller: Any, pair: Pair) -> None:
    poller.arm(pair[0].fileno(), READ, A)
    pair[1].close()
    assert list(poller.poll(0)) == [A]


@every_poller
def test_a_broken_pipe_is_something_to_show_to_the_writer(poller: Any) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * 10_000)
    except BlockingIOError:
        pass
    poller.arm(writer, WRITE, A)
    assert list(poller.poll(0)) == []
    os.close(reader)
    assert list(poller.poll(0)) == [A]
    os.close(writer)


@every_poller
def test_a_hang_up_wakes_both_sides(poller: Any, pair: Pair) -> None:
    fill(pair[0])
    poller.arm(pair[0].fileno(), READ, A)
    poller.arm(pair[0].fileno(), WRITE, B)
    pair[1].close()
    assert [*poller.poll(0), *poller.poll(0)] == [A, B]


@every_poller
@pytest.mark.parametrize("direction", [READ, WRITE])
@pytest.mark.parametrize("what", ["a file", "a directory"])
def test_a_regular_file_is_refused_with_the_reason(
    kind: str, poller: Any, tmp_path: Any, direction: Any, what: str
) -> None:
    if "kqueue" in kind.lower() or hasattr(select, "kqueue"):
        pytest.skip("kqueue can watch files")
    (tmp_path / "file").write_text("text")
    fd = os.open(tmp_path / "file" if what == "a file" else tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(PermissionError) as info:
            poller.arm(fd, direction, A)
    finally:
        os.close(fd)
    assert info.value.errno == errno.EPERM
    assert f"fd {fd} is a regular file or a directory: always ready" in info.value.__notes__[0]
    assert len(poller) == 0
    assert list(poller.poll(0)) == []


@every_poller
@pytest.mark.parametrize("direction", [READ, WRITE])
def test_a_closed_fd_is_refused_with_the_reason(poller: Any, pair: Pair, direction: Any) -> None:
    fd = pair[0].fileno()
    pair[0].close()
    with pytest.raises(OSError) as info:
        poller.arm(fd, direction, A)
    assert info.value.errno == errno.EBADF
    assert info.value.__notes__ == [f"fd {fd} is not open: was it closed while it was still in use?"]
    assert len(poller) == 0
    assert list(poller.poll(0)) == []


@every_poller
def test_a_closed_fd_that_was_waited_for_before_is_refused_too(poller: Any, pair: Pair) -> None:
    fd = pair[0].fileno()
    pair[1].send(b"x")
    poller.arm(fd, READ, A)
    assert list(poller.poll(0)) == [A]
    pair[0].close()
    for _ in range(2):
        with pytest.raises(OSError) as info:
            poller.arm(fd, READ, A)
        assert info.value.errno == errno.EBADF
    assert len(poller) == 0


@every_poller
def test_an_arm_that_fails_leaves_the_other_direction_as_it_was(poller: Any, pair: Pair) -> None:
    fd = pair[0].fileno()
    poller.arm(fd, READ, A)
    pair[0].close()
    with pytest.raises(OSError) as info:
        poller.arm(fd, WRITE, B)
    assert info.value.errno == errno.EBADF
    assert len(poller) == 1
    assert poller.forget(fd) == [A]


@every_poller
@pytest.mark.parametrize("alive", [False, True], ids=["closed", "closed but duplicated"])
@pytest.mark.parametrize("order", [(READ, WRITE), (WRITE, READ), (READ,), (WRITE,)])
def test_a_wait_can_be_taken_back_after_its_fd_was_closed(
    poller: Any, pair: Pair, alive: bool, order: tuple[Any, ...]
) -> None:
    fill(pair[0])
    fd = pair[0].fileno()
    for direction in order:
        poller.arm(fd, direction, A)
    twin = os.dup(fd) if alive else None
    pair[0].close()
    try:
        for direction in order:
            poller.disarm(fd, direction)
        assert len(poller) == 0
        assert list(poller.poll(0)) == []
    finally:
        if twin is not None:
            os.close(twin)


@every_poller
@pytest.mark.parametrize("alive", [False, True], ids=["closed", "closed but duplicated"])
def test_a_wait_can_be_forgotten_after_its_fd_was_closed(poller: Any, pair: Pair, alive: bool) -> None:
    fill(pair[0])
    fd = pair[0].fileno()
    poller.arm(fd, READ, A)
    poller.arm(fd, WRITE, B)
    twin = os.dup(fd) if alive else None
    pair[0].close()
    try:
        assert poller.forget(fd) == [A, B]
        assert list(poller.poll(0)) == []
    finally:
        if twin is not None:
            os.close(twin)


@every_poller
def test_a_closed_but_duplicated_fd_is_reported_at_most_once_and_breaks_nothing(
    poller: Any, pair: Pair, other_pair: Pair
) -> None:
    fd = pair[0].fileno()
    poller.arm(fd, READ, A)
    poller.arm(other_pair[0].fileno(), READ, B)
    twin = os.dup(fd)
    pair[0].close()
    pair[1].send(b"x")
    try:
        reports = [who for _ in range(5) for who in poller.poll(0)]
        assert reports in ([], [A])
        other_pair[1].send(b"x")
        assert [who for _ in range(5) for who in poller.poll(0)] == [B]
    finally:
        os.close(twin)


@every_poller
@pytest.mark.parametrize("reuse", ["no", "a socket", "a regular file"])
def test_a_report_for_one_direction_of_a_closed_but_duplicated_fd_breaks_nothing(
    poller: Any, pair: Pair, other_pair: Pair, reuse: str, tmp_path: Any
) -> None:
    fill(pair[0])
    fd = pair[0].fileno()
    poller.arm(fd, READ, A)
    poller.arm(fd, WRITE, C)  # goes on waiting when the reader has been reported: for an fd that is gone
    poller.arm(other_pair[0].fileno(), READ, B)
    twin = os.dup(fd)
    pair[0].close()
    if reuse == "a socket":
        os.dup2(other_pair[1].fileno(), fd)
    elif reuse == "a regular file":
        file = os.open(tmp_path, os.O_RDONLY)
        if file != fd:
            os.dup2(file, fd)
            os.close(file)
    pair[1].send(b"x")
    try:
        reports = [who for _ in range(5) for who in poller.poll(0)]
        assert reports.count(A) <= 1
        assert reports.count(C) <= 1
        assert set(reports) <= {A, C}
        other_pair[1].send(b"x")
        assert B in [who for _ in range(5) for who in poller.poll(0)]
        assert len(poller) == 2 - len(reports)
        poller.forget(fd)
        assert len(poller) == 0
    finally:
        os.close(twin)
        if reuse != "no":
            os.close(fd)


@every_poller
@pytest.mark.parametrize("alive", [False, True], ids=["closed", "closed but duplicated"])
@pytest.mark.parametrize("how", ["reported", "taken back", "forgotten"])
def test_an_fd_number_that_is_reused_is_armed_again(
    poller: Any, pair: Pair, other_pair: Pair, how: str, alive: bool
) -> None:
    fd = pair[0].fileno()
    poller.arm(fd, READ, A)
    if how == "reported":
        pair[1].send(b"x")
        assert list(poller.poll(0)) == [A]
    elif how == "taken back":
        poller.disarm(fd, READ)
    else:
        poller.forget(fd)
    twin = os.dup(fd) if alive else None
    pair[0].close()
    os.dup2(other_pair[0].fileno(), fd)  # another file under the same number
    try:
        poller.arm(fd, READ, B)
        assert list(poller.poll(0)) == []
        other_pair[1].send(b"x")
        assert list(poller.poll(inf)) == [B]
        poller.arm(fd, WRITE, C)
        assert list(poller.poll(0)) == [C]
    finally:
        os.close(fd)
        if twin is not None:
            os.close(twin)


@every_poller
def test_a_number_that_is_given_back_to_the_same_open_file_is_armed_again(
    kind: str, poller: Any, pair: Pair, duplicate: Duplicate
) -> None:
    if kind == "EpollSelector":
        pytest.skip("the standard library's selector cannot know that the registration is still there")
    fd = pair[0].fileno()
    twin = duplicate(fd)
    poller.arm(fd, READ, A)
    pair[0].close()
    poller.forget(fd)  # too late: nothing can be unregistered by a number that is closed
    os.dup2(twin, fd)
    pair[1].send(b"x")
    try:
        poller.arm(fd, READ, B)
        assert list(poller.poll(0)) == [B]
    finally:
        os.close(fd)


@every_poller
def test_what_a_duplicate_of_the_old_file_reports_cannot_deafen_the_new_one(
    poller: Any, pair: Pair, other_pair: Pair
) -> None:
    fd = pair[0].fileno()
    poller.arm(fd, READ, A)
    poller.disarm(fd, READ)
    twin = os.dup(fd)
    pair[0].close()
    os.dup2(other_pair[0].fileno(), fd)
    pair[1].send(b"for the old file")
    try:
        poller.arm(fd, READ, B)
        if list(poller.poll(0)) == [B]:  # taken for a report of the new file: a wake-up is a hint
            poller.arm(fd, READ, B)
        assert list(poller.poll(0)) == []  # but not twice
        other_pair[1].send(b"for the new file")
        assert list(poller.poll(inf)) == [B]
    finally:
        os.close(fd)
        os.close(twin)


@every_poller
def test_an_fd_number_beyond_what_the_system_call_takes_is_refused_at_once_or_works(poller: Any, pair: Pair) -> None:
    number = 1500  # select() ends at 1024
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= number:
        pytest.skip("no such fd number here")
    os.dup2(pair[0].fileno(), number)
    pair[1].send(b"x")
    try:
        try:
            poller.arm(number, READ, A)
        except (OSError, ValueError):
            assert len(poller) == 0
        else:
            assert list(poller.poll(0)) == [A]
    finally:
        os.close(number)


@every_poller
def test_two_thousand_waits_leave_nothing_behind(poller: Any, pair: Pair) -> None:
    fd = pair[0].fileno()
    for number in range(2000):
        poller.arm(fd, READ, A)
        if number % 3:
            poller.disarm(fd, READ)
        else:
            assert poller.forget(fd) == [A]
    assert len(poller) == 0
    assert list(poller.poll(0)) == []


def test_a_timeout_is_rounded_up_and_bounded() -> None:
    milliseconds = poller_module._milliseconds
    assert [milliseconds(seconds) for seconds in (0, 1e-9, 0.001, 0.0011, 1, 86_400)] == [0, 1, 1, 2, 1000, 86_400_000]
    assert milliseconds(inf) == milliseconds(1e30) == 86_400_000


def test_the_default_is_the_best_the_system_has() -> None:
    poller = default_poller()
    poller.close()
    assert type(poller).__name__ == ("EpollPoller" if sys.platform == "linux" else "KqueuePoller")


@pytest.mark.skipif(hasattr(select, "kqueue"), reason="the real one is tested")
def test_the_default_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    bsd = driver_as_seen_on("darwin", FAKE_SELECT)
    monkeypatch.setattr(sys, "platform", "darwin")
    poller = bsd.default_poller()
    assert type(poller) is bsd.KqueuePoller
    poller.close()
    assert poller._kqueue.closed
    other = driver_as_seen_on("win32", SimpleNamespace())
    monkeypatch.setattr(sys, "platform", "win32")
    poller = other.default_poller()
    assert type(poller) is other.SelectorPoller
    poller.close()


@pytest.mark.skipif(hasattr(select, "kqueue"), reason="the real one is tested")
def test_kqueue_an_error_that_is_no_closed_fd_is_not_swallowed(pair: Pair) -> None:
    poller = POLLERS["kqueue (a model)"]()
    poller.arm(pair[0].fileno(), READ, A)

    def control(*args: object) -> Any:
        raise OSError(errno.EIO, "the disk is on fire")

    poller._kqueue.control = control
    with pytest.raises(OSError, match="on fire"):
        poller.disarm(pair[0].fileno(), READ)
    poller.close()


def test_a_selector_poller_makes_a_selector_of_its_own_if_it_is_given_none(pair: Pair) -> None:
    poller = SelectorPoller()
    pair[1].send(b"x")
    poller.arm(pair[0].fileno(), READ, A)
    assert list(poller.poll(0)) == [A]
    poller.close()


def test_a_selector_poller_works_where_fds_cannot_be_looked_at(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poller_module, "os", SimpleNamespace(name="nt"))
    poller = SelectorPoller(selectors.SelectSelector())
    pair[1].send(b"x")
    poller.arm(pair[0].fileno(), READ, A)
    assert list(poller.poll(0)) == [A]
    poller.close()


def test_a_selector_that_fails_for_another_reason_is_not_excused(pair: Pair) -> None:
    class Broken(selectors.SelectSelector):
        def select(self, timeout: float | None = None) -> Any:
            raise OSError(errno.EIO, "the disk is on fire")

    poller = SelectorPoller(Broken())
    poller.arm(pair[0].fileno(), READ, A)
    with pytest.raises(OSError, match="on fire"):
        poller.poll(0)
    poller.close()


# ---- ending a poll from outside ----------------------------------------------------------------------


class InThread:
    """`function(*args)` in a thread of its own; `result()` waits for what it returns."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._results: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=lambda: self._results.put(function(*args)))
        self._thread.start()

    def result(self) -> Any:
        result = self._results.get(timeout=60)
        self._thread.join(60)
        return result


@every_poller
def test_a_wake_up_ends_a_poll_that_sleeps(poller: Any) -> None:
    sleeping = InThread(lambda: list(poller.poll(60.0)))
    poller.wakeup()
    assert sleeping.result() == []


@every_poller
def test_a_wake_up_that_comes_before_the_poll_ends_that_one_and_only_that_one(poller: Any) -> None:
    for _ in range(3):
        poller.wakeup()
    assert list(poller.poll(60.0)) == []
    asked = InThread(poller.wait, 0.0)
    assert not list(asked.result())


@every_poller
def test_a_hundred_thousand_wake_ups_that_nobody_looks_at_do_not_block(poller: Any) -> None:
    """A pipe or a socket is full long before."""
    for _ in range(100_000):
        poller.wakeup()
    assert list(poller.poll(60.0)) == []
    while poller.wait(0.0):
        assert list(poller.poll(0.001)) == []


@every_poller
def test_a_wake_up_does_not_hide_a_file_that_is_ready_nor_the_other_way_round(poller: Any, pair: Pair) -> None:
    a, b = pair
    poller.arm(a.fileno(), READ, A)
    b.send(b"!")
    poller.wakeup()
    seen: list[Any] = []
    for _ in range(2):  # a system may report them one by one
        seen += poller.poll(0.01)
    assert seen == [A]
    assert not poller.wait(0.0)


@every_poller
def test_wake_ups_are_no_waits(poller: Any) -> None:
    poller.wakeup()
    poller.signal_fd()
    assert len(poller) == 0


@every_poller
def test_a_byte_for_the_signals_ends_a_poll_that_sleeps(poller: Any) -> None:
    fd = poller.signal_fd()
    sleeping = InThread(lambda: list(poller.poll(60.0)))
    assert os.write(fd, b"\2") == 1  # as the interpreter's handler does, with the signal's number
    assert sleeping.result() == []
    assert not poller.wait(0.0)


@every_poller
def test_there_is_one_way_in_for_signals_and_it_is_not_that_of_the_threads(poller: Any) -> None:
    fd = poller.signal_fd()
    assert poller.signal_fd() == fd
    assert not os.get_blocking(fd)  # or signal.set_wakeup_fd would refuse it
    assert not os.get_inheritable(fd)
    poller.wakeup()
    poller.poll(0.01)
    for _ in range(70_000):
        try:
            os.write(fd, b"\2")
        except BlockingIOError:
            break
    poller.wakeup()
    while poller.wait(0.0):
        assert list(poller.poll(0.001)) == []


@every_poller
def test_a_real_signal_ends_a_poll_of_the_main_thread(poller: Any) -> None:
    """Also one that comes before the system call, when its handler has long returned."""
    before_handler = signal.signal(signal.SIGUSR1, lambda *_: None)
    before_fd = signal.set_wakeup_fd(poller.signal_fd(), warn_on_full_buffer=False)
    try:
        signal.raise_signal(signal.SIGUSR1)
        assert list(poller.poll(60.0)) == []
        thread = InThread(signal.pthread_kill, threading.main_thread().ident, signal.SIGUSR1)
        assert list(poller.poll(60.0)) == []
        thread.result()
    finally:
        signal.set_wakeup_fd(before_fd)
        signal.signal(signal.SIGUSR1, before_handler)


@every_poller
def test_a_poll_can_be_done_in_two_halves_the_first_in_another_thread(
    poller: Any, pair: Pair, other_pair: Pair
) -> None:
    (a, b), (c, d) = pair, other_pair
    poller.arm(a.fileno(), READ, A)
    poller.arm(c.fileno(), READ, C)
    sleeping = InThread(poller.wait, 60.0)
    b.send(b"!")
    happened = sleeping.result()
    assert len(poller) == 2  # the first half changes nothing
    assert list(poller.take(happened)) == [A]
    assert len(poller) == 1
    d.send(b"!")
    assert list(poller.take(poller.wait(60.0))) == [C]


@every_poller
def test_what_has_changed_between_the_two_halves_is_minded(poller: Any, pair: Pair, other_pair: Pair) -> None:
    """A wait that was taken back after it was reported, and one whose file was forgotten."""
    (a, b), (c, d) = pair, other_pair
    poller.arm(a.fileno(), READ, A)
    poller.arm(c.fileno(), READ, C)
    b.send(b"!")
    d.send(b"!")
    happened = poller.wait(60.0)
    poller.disarm(a.fileno(), READ)
    assert poller.forget(c.fileno()) == [C]
    assert list(poller.take(happened)) == []
    assert len(poller) == 0


@every_poller
def test_a_wake_up_ends_the_first_half_too(poller: Any) -> None:
    sleeping = InThread(poller.wait, 60.0)
    poller.wakeup()
    assert list(poller.take(sleeping.result())) == []
    assert not poller.wait(0.0)


@pytest.mark.skipif(sys.platform != "linux", reason="looks in /proc")
@every_poller
def test_closing_gives_back_what_the_wakers_hold_and_may_be_done_twice(kind: str) -> None:
    before = os.listdir("/proc/self/fd")
    poller = POLLERS[kind]()
    poller.signal_fd()
    assert len(os.listdir("/proc/self/fd")) > len(before)
    poller.close()
    poller.close()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("without", [(), ("eventfd",), ("eventfd", "pipe2")], ids=["eventfd", "pipe", "sockets"])
@pytest.mark.parametrize("eventfd", [True, False], ids=["threads", "signals"])
def test_a_waker_works_with_what_the_system_has(
    without: tuple[str, ...], eventfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in without:
        monkeypatch.delattr(os, name, raising=False)
    waker = poller_module._Waker(eventfd=eventfd)

    def awake() -> bool:
        return bool(select.select([waker.fd], [], [], 0)[0])

    try:
        assert not awake()
        for _ in range(3):
            waker.wake()
            assert awake()
        waker.drain()
        assert not awake()
        waker.drain()  # nothing to do
        for _ in range(300_000 if "pipe2" in without else 70_000):
            waker.wake()
        while awake():
            waker.drain()
        waker.wake()
        assert awake()
    finally:
        waker.close()


# ---- whole programs ----------------------------------------------------------------------------------


def run(kind: str, main: Callable[..., Any], *args: Any) -> Any:
    """Run in virtual time: real files, and sleeps that cost nothing."""
    return kernel.run(main, *args, poller=POLLERS[kind](), clock=MockClock(autojump_threshold=0))


async def receive(sock: socket.socket) -> bytes:
    while True:
        try:
            return sock.recv(65536)
        except BlockingIOError:
            await wait_readable(sock)


async def send_all(sock: socket.socket, data: bytes) -> None:
    while data:
        try:
            data = data[sock.send(data) :]
        except BlockingIOError:
            await wait_writable(sock)


@every_poller
def test_program_a_megabyte_goes_both_ways_at_once(kind: str, pair: Pair) -> None:
    sent = bytes(range(256)) * 4096
    got: dict[socket.socket, bytes] = dict.fromkeys(pair, b"")

    async def reader(sock: socket.socket) -> None:
        while len(got[sock]) < len(sent):
            got[sock] += await receive(sock)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for sock in pair:
                nursery.start_soon(reader, sock)
                nursery.start_soon(send_all, sock, sent)

    run(kind, main)
    assert got[pair[0]] == got[pair[1]] == sent


@every_poller
def test_program_whoever_waits_on_a_file_that_is_closed_wakes_with_a_closed_error(kind: str, pair: Pair) -> None:
    log: list[str] = []

    async def waiter(wait: Callable[[Any], Any]) -> None:
        with pytest.raises(
            kernel.ClosedResourceError, match="another task closed this file while it was being waited on"
        ):
            await wait(pair[0])
        await checkpoint()
        log.append(wait.__name__)

    async def main() -> None:
        fill(pair[0])
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(waiter, wait_writable)
            nursery.start_soon(waiter, wait_readable)
            await wait_all_tasks_blocked()
            notify_closing(pair[0])
            pair[0].close()
            with pytest.raises(kernel.ClosedResourceError, match="notify_closing must come before close"):
                notify_closing(pair[0])

    run(kind, main)
    assert log == ["wait_readable", "wait_writable"]


@every_poller
def test_program_one_that_is_woken_by_closing_has_committed(kind: str, pair: Pair) -> None:
    async def waiter() -> None:
        with pytest.raises(kernel.ClosedResourceError):
            await wait_readable(pair[0])

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(waiter)
            await wait_all_tasks_blocked()
            notify_closing(pair[0])
            nursery.cancel_scope.cancel()

    run(kind, main)


@every_poller
@pytest.mark.parametrize("event", [False, True], ids=["quiet", "with an event before"])
@pytest.mark.parametrize("waits", [(wait_readable,), (wait_writable,), (wait_readable, wait_writable)])
def test_program_waits_for_a_duplicated_fd_that_was_closed_can_be_cancelled(
    kind: str, pair: Pair, duplicate: Duplicate, waits: tuple[Any, ...], event: bool
) -> None:
    ended: list[str] = []

    async def waiter(wait: Callable[[Any], Any], fd: int) -> None:
        try:
            await wait(fd)
            ended.append("woken")
        except kernel.Cancelled:
            ended.append("cancelled")
            raise

    async def main() -> None:
        fill(pair[0])
        fd = pair[0].fileno()
        duplicate(fd)
        with kernel.move_on_after(10) as scope:
            async with kernel.open_nursery() as nursery:
                for wait in waits:
                    nursery.start_soon(waiter, wait, fd)
                await wait_all_tasks_blocked()
                pair[0].close()
                if event:
                    pair[1].send(b"x")
                await wait_all_tasks_blocked()
                nursery.start_soon(kernel.sleep_forever)
        assert scope.cancelled_caught
        async with kernel.open_nursery() as nursery:  # and the kernel lives on
            nursery.start_soon(send_all, pair[1], b"")
            await checkpoint()

    run(kind, main)
    assert len(ended) == len(waits)
    assert set(ended) <= {"woken", "cancelled"}


@every_poller
def test_program_a_closed_but_duplicated_fd_does_not_keep_the_loop_spinning(
    kind: str, pair: Pair, duplicate: Duplicate, request: pytest.FixtureRequest
) -> None:
    if kind == "EpollSelector":
        reason = "a level-triggered epoll goes on reporting what nobody can unregister: why EpollPoller is one-shot"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    poller = POLLERS[kind]()
    looks = 0

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(poller, name)

        def __len__(self) -> int:
            return len(poller)

        def poll(self, timeout: float) -> Any:
            nonlocal looks
            looks += 1
            return poller.poll(timeout)

    async def main() -> None:
        fd = pair[0].fileno()
        duplicate(fd)
        with kernel.CancelScope() as scope:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(wait_readable, fd)
                await wait_all_tasks_blocked()
                pair[0].close()
                pair[1].send(b"x")
                await wait_all_tasks_blocked()
                before = looks
                await kernel.sleep(0.05)  # real, for once: the number of looks is the subject
                scope.cancel()
        assert looks - before < 5

    kernel.run(main, poller=Counting())


@every_poller
def test_program_a_number_that_is_reused_while_somebody_waits_is_really_waited_for(
    kind: str, pair: Pair, other_pair: Pair
) -> None:
    log: list[str] = []

    async def waiter(fd: int, name: str) -> None:
        await wait_readable(fd)
        log.append(name)

    async def main() -> None:
        fd = pair[0].fileno()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(waiter, fd, "old")
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        pair[0].close()
        os.dup2(other_pair[0].fileno(), fd)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(waiter, fd, "new")
            await wait_all_tasks_blocked()
            assert log == []
            log.append("sent")
            other_pair[1].send(b"x")
        os.close(fd)

    run(kind, main)
    assert log == ["sent", "new"]


@every_poller
@pytest.mark.parametrize("wait", [wait_readable, wait_writable])
def test_program_the_second_to_wait_for_the_same_thing_gets_the_error_and_the_first_goes_on(
    kind: str, pair: Pair, wait: Callable[[Any], Any]
) -> None:
    log: list[str] = []

    async def first() -> None:
        await wait(pair[0])
        log.append("first")

    async def main() -> None:
        fill(pair[0])
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(first)
            await wait_all_tasks_blocked()
            with pytest.raises(kernel.BusyResourceError, match="first"):
                await wait(pair[0])
            log.append("second")
            pair[1].send(b"x")
            drain(pair[1])

    run(kind, main)
    assert log == ["second", "first"]


@every_poller
def test_program_a_regular_file_and_a_closed_number_raise_in_the_task(kind: str, pair: Pair, tmp_path: Any) -> None:
    async def main() -> None:
        fd = pair[0].fileno()
        pair[0].close()
        with pytest.raises(OSError) as info:
            await wait_readable(fd)
        assert info.value.errno == errno.EBADF
        if "kqueue" not in kind:
            with open(tmp_path / "x", "w") as file, pytest.raises(PermissionError, match="not permitted") as info:
                await wait_writable(file)
            assert "Read it in a thread" in info.value.__notes__[0]
        await checkpoint()

    run(kind, main)


@every_poller
def test_program_the_poller_is_closed_when_the_run_has_ended(kind: str) -> None:
    closed: list[str] = []
    poller = POLLERS[kind]()
    close = poller.close
    poller.close = lambda: (closed.append("closed"), close())

    async def main() -> None:
        await checkpoint()
        assert closed == []

    kernel.run(main, poller=poller)
    assert closed == ["closed"]


@pytest.mark.skipif(sys.platform != "linux", reason="only epoll's registrations outlive their wait")
def test_program_the_report_of_a_cancelled_wait_does_not_disturb_an_idle_kernel(pair: Pair, other_pair: Pair) -> None:
    log: list[str] = []

    class World(poller_module.EpollPoller):
        """What happens outside, one thing each time the kernel has nothing to do."""

        def poll(self, timeout: float) -> Any:
            if timeout == inf:
                what, sock = events.pop(0)
                log.append(what)
                sock.send(b"x")
            return super().poll(timeout)

    events = [("late", pair[1]), ("real", other_pair[1])]

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(wait_readable, pair[0])
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await wait_readable(other_pair[0])
        log.append("woken")

    kernel.run(main, poller=World())
    assert log == ["late", "real", "woken"]


# ---- sockets of our own: watched once, for many waits --------------------------------------------------


class Watched:
    """A stand-in for one direction of a socket: what `watch` takes."""

    def __init__(self, fd: int, direction: Any) -> None:
        self.fd = fd
        self.direction = direction
        self.task: Any = None
        self.poller: Any = None
        self.misses = 0


def wait_again(watch: Watched, task: str) -> None:
    """What a socket does for a second wait: no call into the poller."""
    assert watch.poller is not None
    assert watch.task is None
    watch.task = task


@every_poller
def test_a_watch_serves_many_waits_without_a_further_call(
    poller: Any, pair: tuple[socket.socket, socket.socket]
) -> None:
    watch = Watched(pair[0].fileno(), READ)
    poller.watch(watch, "reader")
    assert (watch.task, watch.poller) == ("reader", poller)
    assert list(poller.poll(0)) == []
    for number in range(20):
        pair[1].send(b"x")
        assert list(poller.poll(1)) == ["reader"], number
        assert watch.task is None
        pair[0].recv(10)
        wait_again(watch, "reader")
        assert list(poller.poll(0)) == []


@every_poller
def test_both_directions_of_a_socket_are_watched_apart(poller: Any, pair: tuple[socket.socket, socket.socket]) -> None:
    reader, writer = Watched(pair[0].fileno(), READ), Watched(pair[0].fileno(), WRITE)
    poller.watch(reader, "reader")
    poller.watch(writer, "writer")
    assert list(poller.poll(0)) == ["writer"]
    assert reader.task == "reader"
    pair[1].send(b"x")
    for _ in range(10):
        done = list(poller.poll(0))
        if done:
            break
    assert done == ["reader"]


@every_poller
def test_reports_that_nobody_waits_for_stop_after_a_few(poller: Any, pair: tuple[socket.socket, socket.socket]) -> None:
    """Else a peer that sends to a task which does something else would keep the loop from sleeping."""
    watch = Watched(pair[0].fileno(), READ)
    poller.watch(watch, "reader")
    pair[1].send(b"x")
    assert list(poller.poll(1)) == ["reader"]
    for _ in range(10):
        assert list(poller.poll(0)) == []
    assert watch.poller is None
    assert not poller
    poller.watch(watch, "reader")
    assert list(poller.poll(1)) == ["reader"]


@every_poller
def test_a_report_for_nobody_ends_only_its_own_direction(
    poller: Any, pair: tuple[socket.socket, socket.socket]
) -> None:
    reader, writer = Watched(pair[0].fileno(), READ), Watched(pair[0].fileno(), WRITE)
    poller.watch(writer, "writer")
    poller.watch(reader, "reader")
    for _ in range(10):
        list(poller.poll(0))
    assert (writer.poller, reader.poller) == (None, poller)
    pair[1].send(b"x")
    assert list(poller.poll(1)) == ["reader"]


@every_poller
def test_a_hang_up_wakes_whoever_waits_and_then_is_silent(
    poller: Any, pair: tuple[socket.socket, socket.socket]
) -> None:
    reader, writer = Watched(pair[0].fileno(), READ), Watched(pair[0].fileno(), WRITE)
    pair[0].send(bytes(10))
    poller.watch(reader, "reader")
    pair[1].close()
    assert list(poller.poll(1)) == ["reader"]
    poller.watch(writer, "writer")
    assert list(poller.poll(1)) == ["writer"]
    for _ in range(20):
        list(poller.poll(0))
    assert (reader.poller, writer.poller) == (None, None)


@every_poller
def test_a_wait_that_was_given_up_is_not_reported(poller: Any, pair: tuple[socket.socket, socket.socket]) -> None:
    watch = Watched(pair[0].fileno(), READ)
    poller.watch(watch, "reader")
    assert len(poller) == 1
    assert poller
    watch.task = None
    assert len(poller) == 0
    assert not poller
    pair[1].send(b"x")
    assert list(poller.poll(0)) == []


@every_poller
def test_forget_returns_who_waits_and_nothing_stays(poller: Any, pair: tuple[socket.socket, socket.socket]) -> None:
    reader, writer = Watched(pair[0].fileno(), READ), Watched(pair[0].fileno(), WRITE)
    pair[0].setblocking(False)
    poller.watch(writer, "writer")
    poller.watch(reader, "reader")
    assert poller.forget(pair[0].fileno()) == ["reader", "writer"]
    assert (reader.task, reader.poller, writer.task, writer.poller) == (None, None, None, None)
    pair[1].send(b"x")
    assert list(poller.poll(0)) == []
    assert poller.forget(pair[0].fileno()) == []


@every_poller
def test_after_forget_a_duplicate_that_stays_open_is_not_reported(
    poller: Any, pair: tuple[socket.socket, socket.socket]
) -> None:
    duplicate = pair[0].dup()
    watch = Watched(pair[0].fileno(), READ)
    poller.watch(watch, "reader")
    poller.forget(pair[0].fileno())
    pair[0].close()
    pair[1].send(b"x")
    assert list(poller.poll(0)) == []
    duplicate.close()


@every_poller
def test_a_number_that_was_reused_is_really_watched_again(
    poller: Any, pair: tuple[socket.socket, socket.socket]
) -> None:
    fd = pair[0].fileno()
    poller.watch(Watched(fd, READ), "first")
    poller.forget(fd)
    other, far = socket.socketpair()
    os.dup2(other.fileno(), fd)
    poller.watch(Watched(fd, READ), "second")
    far.send(b"x")
    assert list(poller.poll(1)) == ["second"]
    other.close()
    far.close()


@every_poller
def test_waiting_for_a_watched_socket_by_its_number_works_and_so_does_the_next_watch(
    poller: Any, pair: tuple[socket.socket, socket.socket]
) -> None:
    fd = pair[0].fileno()
    reader = Watched(fd, READ)
    poller.watch(reader, "reader")
    poller.arm(fd, WRITE, "writer by number")
    assert reader.poller is None
    with pytest.raises(kernel.BusyResourceError):
        poller.arm(fd, READ, "another reader")
    assert list(poller.poll(1)) == ["writer by number"]
    assert len(poller) == 1
    pair[1].send(b"x")
    assert list(poller.poll(1)) == ["reader"]
    poller.watch(reader, "reader")
    assert poller._watched[pair[0].fileno()][READ] is reader
    assert list(poller.poll(1)) == ["reader"]


@every_poller
def test_a_watch_beside_a_wait_by_number_is_a_wait_by_number(
    poller: Any, pair: tuple[socket.socket, socket.socket]
) -> None:
    fd = pair[0].fileno()
    reader, writer = Watched(fd, READ), Watched(fd, WRITE)
    poller.arm(fd, READ, "reader by number")
    with pytest.raises(kernel.BusyResourceError):
        poller.watch(reader, "reader")
    poller.watch(writer, "writer")
    assert (writer.task, writer.poller) == (None, None)
    assert list(poller.poll(1)) == ["writer"]
    assert poller.forget(fd) == ["reader by number"]


@every_poller
def test_watching_a_closed_number_fails_and_changes_nothing(poller: Any) -> None:
    fd = os.dup(0)
    os.close(fd)
    watch = Watched(fd, READ)
    with pytest.raises(OSError, match="Bad file descriptor"):
        poller.watch(watch, "reader")
    assert (watch.task, watch.poller, len(poller)) == (None, None, 0)


@every_poller
def test_a_poller_that_is_closed_lets_go_of_what_it_watched(
    kind: str, pair: tuple[socket.socket, socket.socket]
) -> None:
    poller = POLLERS[kind]()
    watch = Watched(pair[0].fileno(), READ)
    poller.watch(watch, "reader")
    poller.close()
    assert watch.poller is None


def test_no_more_is_reported_at_a_time_than_the_loop_runs_before_it_asks_again() -> None:
    poller = default_poller()
    pairs = [socket.socketpair() for _ in range(200)]
    watches = [Watched(a.fileno(), READ) for a, _ in pairs]
    for number, watch in enumerate(watches):
        poller.watch(watch, number)  # type: ignore[attr-defined]
    for _, b in pairs:
        b.send(b"x")
    seen: list[Any] = []
    for _ in range(4):
        done = list(poller.poll(0))
        assert len(done) <= 61
        seen += done
    assert sorted(seen) == list(range(200))  # those that were reported before come last, so the others are not starved
    poller.close()
    for a, b in pairs:
        a.close()
        b.close()


@every_poller
def test_a_watch_can_be_moved_to_another_poller_while_somebody_waits_in_the_other_direction(
    kind: str, poller: Any, pair: tuple[socket.socket, socket.socket]
) -> None:
    reader, writer = Watched(pair[0].fileno(), READ), Watched(pair[0].fileno(), WRITE)
    poller.watch(reader, "reader")
    poller.watch(writer, "writer")
    assert list(poller.poll(0)) == ["writer"]
    poller.unwatch(writer)
    assert (reader.poller, writer.poller) == (poller, None)
    elsewhere = POLLERS[kind]()
    elsewhere.watch(writer, "writer")
    assert list(elsewhere.poll(0)) == ["writer"]
    pair[1].send(b"x")
    assert list(poller.poll(1)) == ["reader"]
    late = Watched(pair[0].fileno(), READ)  # of a socket that was closed by other means, and whose number was reused
    poller.unwatch(late)
    assert poller._watched[pair[0].fileno()][READ] is reader
    poller.unwatch(reader)
    poller.unwatch(reader)
    assert not poller._watched
    elsewhere.close()


@every_poller
@pytest.mark.parametrize("alive", [False, True])
def test_a_watched_number_that_was_closed_by_other_means_breaks_nothing(
    poller: Any, pair: tuple[socket.socket, socket.socket], alive: bool
) -> None:
    duplicate = pair[0].dup() if alive else None
    watch = Watched(pair[0].fileno(), READ)
    poller.watch(watch, "reader")
    watch.task = None
    pair[1].send(b"x")
    pair[0].close()
    for _ in range(10):
        assert list(poller.poll(0)) == []
    assert not poller
    if duplicate is not None:
        duplicate.close()


@every_poller
def test_a_watched_number_that_is_another_files_by_now_is_really_watched(
    poller: Any, pair: tuple[socket.socket, socket.socket]
) -> None:
    fd = pair[0].fileno()
    poller.watch(Watched(fd, READ), "old")
    other, far = socket.socketpair()
    os.dup2(other.fileno(), fd)
    poller.watch(Watched(fd, READ), "new")
    far.send(b"x")
    assert list(poller.poll(1)) == ["new"]
    other.close()
    far.close()


@every_poller
def test_nobody_waits_any_more_in_a_poller_that_is_closed(kind: str, pair: tuple[socket.socket, socket.socket]) -> None:
    """Else the socket would be busy for ever, as after a fork, in the child."""
    poller = POLLERS[kind]()
    watch = Watched(pair[0].fileno(), READ)
    poller.watch(watch, "reader")
    poller.close()
    assert watch.task is None


@every_poller
def test_a_socket_that_is_collected_while_the_waits_are_counted_breaks_nothing(
    poller: Any, pair: tuple[socket.socket, socket.socket], other_pair: tuple[socket.socket, socket.socket]
) -> None:
    class Collecting(Watched):
        def __getattribute__(self, name: str) -> Any:
            if name == "task":
                poller.forget(other_pair[0].fileno())
            return super().__getattribute__(name)

    for count in (len, bool):
        watch = Collecting(pair[0].fileno(), READ)
        poller.watch(watch, None)
        poller.watch(Watched(other_pair[0].fileno(), READ), None)
        assert not count(poller)
        poller.forget(pair[0].fileno())


@every_poller
def test_taking_back_a_wait_that_was_forgotten_meanwhile_does_nothing(
    poller: Any, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Another thread may have closed the file, and its word for whoever waits is still on its way."""
    poller.arm(pair[0].fileno(), READ, "reader")
    assert poller.forget(pair[0].fileno()) == ["reader"]
    poller.disarm(pair[0].fileno(), READ)
    assert not poller
