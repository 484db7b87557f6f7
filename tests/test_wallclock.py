"""Sleeping until a date: with a wall clock of our own, and once with the system's.

The system's clock cannot be set by a test. So `time.time` is ours, and in the timerfd's place stands an eventfd, which
a test makes readable as the system would when the clock is set or the date has come.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest

import kernel
from kernel import sleep_until_wallclock
from kernel.testing import MockClock, wait_all_tasks_blocked
from kernel.wallclock import _Timerfd

NOW = 1_700_000_000.0
linux = pytest.mark.skipif(sys.platform != "linux", reason="timerfd is Linux's")


def at(seconds: float) -> datetime:
    """So many seconds after NOW."""
    return datetime.fromtimestamp(NOW + seconds, UTC)


class WallClock:
    """What `time.time` shows."""

    def __init__(self) -> None:
        self.now = NOW

    def time(self) -> float:
        return self.now


class FakeTimer:
    """In place of a timerfd. `ring` makes it readable; `refusals` calls of `set` find the clock set meanwhile."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.dates: list[float] = []
        self.refusals = 0

    def set(self, timestamp: float) -> bool:
        self.dates.append(timestamp - NOW)
        try:
            os.eventfd_read(self.fd)  # setting a timer makes it silent
        except BlockingIOError:
            pass
        self.refusals -= 1
        return self.refusals < 0

    def ring(self) -> None:
        os.eventfd_write(self.fd, 1)


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    clock = WallClock()
    monkeypatch.setattr(time, "time", clock.time)
    return clock


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch, wall: WallClock) -> list[FakeTimer]:
    """The timers that were made."""
    made: list[FakeTimer] = []

    def create() -> FakeTimer:
        made.append(FakeTimer())
        return made[-1]

    monkeypatch.setattr(_Timerfd, "create", create)
    return made


@pytest.fixture
def no_timerfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Timerfd, "create", lambda: None)


class SlewedClock(MockClock):
    """Virtual time, and a wall clock that follows it, `rate` times as fast, but for what happens in between."""

    def __init__(self, wall: WallClock, rate: float = 1.0) -> None:
        super().__init__(autojump_threshold=0)
        self._wall, self._wall_rate, self._last = wall, rate, 0.0
        self.events: dict[float, Callable[[], None]] = {}

    def autojump(self, deadline: float) -> None:
        super().autojump(deadline)
        self._wall.now += (self.current_time() - self._last) * self._wall_rate
        self._last = self.current_time()
        for moment in [moment for moment in self.events if moment <= self._last]:
            self.events.pop(moment)()


async def sleeper(seconds: float, log: list[Any]) -> None:
    await sleep_until_wallclock(at(seconds))
    log.append((seconds, kernel.current_time(), time.time() - NOW))


# ---- with a timerfd ------------------------------------------------------------------------------------


@linux
def test_it_sleeps_until_the_timer_rings_on_the_date(wall: WallClock, timers: list[FakeTimer]) -> None:
    log: list[Any] = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sleeper, 60, log)
            await wait_all_tasks_blocked()
            assert [timer.dates for timer in timers] == [[60]]
            assert log == []
            wall.now = NOW + 60
            timers[0].ring()

    kernel.run(main)
    assert [entry[0] for entry in log] == [60]


@linux
def test_a_clock_that_is_set_is_asked_again(wall: WallClock, timers: list[FakeTimer]) -> None:
    """Forward but not far enough, back behind the beginning, and forward beyond the date."""
    log: list[Any] = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sleeper, 60, log)
            for seconds in (59, -1000):
                await wait_all_tasks_blocked()
                wall.now = NOW + seconds
                timers[0].ring()
            await wait_all_tasks_blocked()
            assert log == []
            assert timers[0].dates == [60, 60, 60]
            wall.now = NOW + 3600
            timers[0].ring()

    kernel.run(main)
    assert [entry[0] for entry in log] == [60]
    assert len(timers) == 1


@linux
def test_a_clock_that_is_set_while_the_timer_is_being_set_is_asked_again(
    wall: WallClock, timers: list[FakeTimer], monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[Any] = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sleeper, 60, log)
            await wait_all_tasks_blocked()
            timers[0].refusals = 2
            timers[0].ring()
            await wait_all_tasks_blocked()
            assert timers[0].dates == [60] * 4
            nursery.cancel_scope.cancel()

    kernel.run(main)
    assert log == []


@linux
def test_a_timer_that_rings_a_little_early_is_set_again(wall: WallClock, timers: list[FakeTimer]) -> None:
    log: list[Any] = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sleeper, 60, log)
            await wait_all_tasks_blocked()
            wall.now = NOW + 60 - 2**-21
            timers[0].ring()
            await wait_all_tasks_blocked()
            assert log == []
            wall.now = NOW + 60
            timers[0].ring()

    kernel.run(main)
    assert len(log) == 1


@linux
def test_many_sleep_at_once_each_until_its_own_date(wall: WallClock, timers: list[FakeTimer]) -> None:
    log: list[Any] = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for seconds in range(1, 101):
                nursery.start_soon(sleeper, seconds, log)
            await wait_all_tasks_blocked()
            for seconds in range(100, 0, -1):
                wall.now = NOW + seconds
                timers[seconds - 1].ring()
                await wait_all_tasks_blocked()
                assert log[-1][0] == seconds

    kernel.run(main)
    assert len(log) == 100


@linux
def test_a_cancellation_leaves_no_descriptor() -> None:
    """With real timers."""

    async def main() -> None:
        before = os.listdir("/proc/self/fd")
        async with kernel.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(sleep_until_wallclock, datetime(9999, 1, 1))
            await wait_all_tasks_blocked()
            assert len(os.listdir("/proc/self/fd")) == len(before) + 20
            nursery.cancel_scope.cancel()
        assert os.listdir("/proc/self/fd") == before

    kernel.run(main)


@linux
def test_a_run_that_breaks_off_leaves_no_descriptor() -> None:
    """The fixture of all tests looks."""

    def breaks_it() -> None:
        raise LookupError

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sleep_until_wallclock, datetime(9999, 1, 1))
            await wait_all_tasks_blocked()
            kernel.lowlevel.current_kernel_token().run_sync_soon(breaks_it)

    with pytest.raises(kernel.KernelInternalError):
        kernel.run(main)


@linux
def test_the_systems_own_timer_ends_the_sleep_and_not_before_the_date(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    real = _Timerfd.set

    def counted(self: _Timerfd, timestamp: float) -> bool:
        calls.append(timestamp)
        return real(self, timestamp)

    monkeypatch.setattr(_Timerfd, "set", counted)

    async def main() -> None:
        when = datetime.now(UTC) + timedelta(milliseconds=30)
        await sleep_until_wallclock(when)
        assert datetime.now(UTC) >= when

    kernel.run(main)
    assert 1 <= len(calls) <= 3  # it did not come down to asking without pause


@linux
def test_the_systems_timer_is_on_the_wall_clock_and_wants_to_know_when_that_is_set() -> None:
    timer = _Timerfd.create()
    assert timer is not None
    try:
        timer.set(time.time() + 1000)
        with open(f"/proc/self/fdinfo/{timer.fd}") as info:
            fields = dict(line.split(":", 1) for line in info.read().splitlines())
    finally:
        os.close(timer.fd)
    assert int(fields["clockid"]) == time.CLOCK_REALTIME
    assert int(fields["settime flags"], 8) == _Timerfd.ABSTIME | _Timerfd.CANCEL_ON_SET
    assert fields["it_value"].strip().startswith(("(999,", "(998,"))


@linux
def test_the_systems_timer_takes_the_last_date_there_is_and_one_that_is_past() -> None:
    timer = _Timerfd.create()
    assert timer is not None
    try:
        assert timer.set(datetime.max.replace(tzinfo=UTC).timestamp())
        assert timer.set(1.5)

        async def main() -> None:
            await kernel.lowlevel.wait_readable(timer.fd)

        kernel.run(main)
    finally:
        os.close(timer.fd)


@linux
def test_an_error_of_the_system_is_raised_and_one_that_says_that_the_clock_was_set_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timer = _Timerfd.create()
    assert timer is not None
    fd, timer.fd = timer.fd, -1
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            timer.set(NOW)
        monkeypatch.setattr(ctypes, "get_errno", lambda: errno.ECANCELED)
        assert timer.set(NOW) is False
    finally:
        os.close(fd)


@linux
def test_without_descriptors_it_looks_at_the_clock_itself(wall: WallClock) -> None:
    import resource

    log: list[Any] = []
    clock = SlewedClock(wall)

    async def main() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            await sleeper(3.5, log)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    kernel.run(main, clock=clock)
    assert log == [(3.5, 3.5, 3.5)]


@pytest.mark.parametrize(("platform", "maxsize"), [("darwin", 2**63 - 1), ("linux", 2**31 - 1)])
def test_elsewhere_there_is_no_timerfd(platform: str, maxsize: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(sys, "maxsize", maxsize)
    assert _Timerfd.create() is None


def test_a_c_library_without_timerfd_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: object())
    assert _Timerfd.create() is None


# ---- without one ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_timerfd")
def test_looking_at_the_clock_it_ends_on_the_date(wall: WallClock) -> None:
    log: list[Any] = []
    kernel.run(sleeper, 10.25, log, clock=SlewedClock(wall))
    assert log == [(10.25, 10.25, 10.25)]


@pytest.mark.usefixtures("no_timerfd")
def test_looking_at_the_clock_it_notices_a_jump_within_a_second(wall: WallClock) -> None:
    """Forward beyond the date, as after a suspension: a second late at most. Back: it sleeps longer."""
    log: list[Any] = []

    def set_to(seconds: float) -> Callable[[], None]:
        def do() -> None:
            wall.now = NOW + seconds

        return do

    forward = SlewedClock(wall)
    forward.events = {5.0: set_to(3000)}
    kernel.run(sleeper, 2000, log, clock=forward)
    assert log.pop() == (2000, 5.0, 3000)

    wall.now = NOW
    back = SlewedClock(wall)
    back.events = {5.0: set_to(-5)}
    kernel.run(sleeper, 10, log, clock=back)
    assert log.pop() == (10, 20.0, 10)


@pytest.mark.usefixtures("no_timerfd")
@pytest.mark.parametrize("rate", [0.5, 0.999, 1.001, 2.0])
def test_looking_at_a_clock_that_goes_wrong_it_never_ends_before_the_date(wall: WallClock, rate: float) -> None:
    log: list[Any] = []
    kernel.run(sleeper, 10, log, clock=SlewedClock(wall, rate))
    assert 10 <= log[0][2] <= 10 + max(1, rate)


# ---- in both -------------------------------------------------------------------------------------------


@pytest.fixture(params=["timerfd", "looking"])
def either(request: pytest.FixtureRequest, wall: WallClock) -> None:
    request.getfixturevalue("timers" if request.param == "timerfd" and sys.platform == "linux" else "no_timerfd")


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("seconds", [0, -1, -1e9])
def test_a_past_date_is_a_checkpoint(seconds: float) -> None:
    log: list[Any] = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other)
            await sleep_until_wallclock(at(seconds))
            log.append("main")

    async def other() -> None:
        log.append("other")

    kernel.run(main)
    assert log == ["other", "main"], "the others had no turn"


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("seconds", [-10, 10])
def test_in_a_cancelled_scope_it_leaves_at_once(seconds: float) -> None:
    async def main() -> None:
        with kernel.CancelScope() as scope:
            scope.cancel()
            await sleep_until_wallclock(at(seconds))
            raise AssertionError("it was not cancelled")
        assert scope.cancelled_caught

    kernel.run(main)


@pytest.mark.usefixtures("either")
def test_it_can_be_cancelled_while_it_sleeps() -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sleep_until_wallclock, at(10))
            await wait_all_tasks_blocked(0.001)
            nursery.cancel_scope.cancel()

    kernel.run(main)


@pytest.mark.usefixtures("no_timerfd")
def test_generator_style_works(wall: WallClock) -> None:
    def main() -> Any:
        yield from sleep_until_wallclock(at(3))
        return kernel.current_time()

    assert kernel.run(main, clock=SlewedClock(wall)) == 3.0


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def seconds_slept(when: datetime, start: float, wall: WallClock) -> float:
    wall.now = start

    async def main() -> float:
        await sleep_until_wallclock(when)
        return kernel.current_time()

    return float(kernel.run(main, clock=SlewedClock(wall)))


@pytest.mark.usefixtures("no_timerfd", "berlin")
def test_a_date_without_a_zone_is_local_and_one_with_a_zone_is_that_moment(wall: WallClock) -> None:
    midnight = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    assert seconds_slept(datetime(2026, 1, 1, 2, 0), midnight, wall) == 3600  # Berlin is an hour ahead
    assert seconds_slept(datetime(2026, 1, 1, 2, 0, tzinfo=UTC), midnight, wall) == 7200
    east = timezone(timedelta(hours=5, minutes=30))
    assert seconds_slept(datetime(2026, 1, 1, 6, 0, tzinfo=east), midnight, wall) == 1800


@pytest.mark.usefixtures("no_timerfd", "berlin")
def test_an_hour_that_comes_twice_is_the_one_that_fold_says(wall: WallClock) -> None:
    summer = datetime(2026, 10, 25, 0, 0, tzinfo=UTC).timestamp()  # 02:00 in Berlin, for the first time
    half_past = datetime(2026, 10, 25, 2, 30)
    assert seconds_slept(half_past, summer, wall) == 1800
    assert seconds_slept(half_past.replace(fold=1), summer, wall) == 5400


@pytest.mark.usefixtures("no_timerfd", "berlin")
def test_an_hour_that_is_skipped_is_what_datetime_takes_it_for(wall: WallClock) -> None:
    winter = datetime(2026, 3, 29, 0, 0, tzinfo=UTC).timestamp()  # 01:00 in Berlin; at 02:00 it will be 03:00
    skipped = datetime(2026, 3, 29, 2, 30)
    assert seconds_slept(skipped, winter, wall) == skipped.timestamp() - winter == 5400


@pytest.mark.parametrize("wrong", [date(2026, 1, 1), 1_700_000_000.0, None, "tomorrow"])
def test_what_is_no_datetime_is_refused(wrong: Any) -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match="wants a datetime"):
            await sleep_until_wallclock(wrong)

    kernel.run(main)
