"""The cache of worker threads: who gets a job, who goes, and what an idle worker keeps."""

from __future__ import annotations

import contextvars
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from outcome import Error, Outcome, Value

from kernel.lowlevel import start_thread_soon
from kernel.threads import cache

ROOT = Path(__file__).parent.parent.parent
LONG = 20 if os.environ.get("KERNEL_TEST_LONG") else 1


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers of other tests are out of sight, and those of this one are gone at its end."""
    monkeypatch.setattr(cache, "_idle", {})
    yield
    send_home()


@pytest.fixture(params=["eventfd", "lock"])
def _bell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of bells."""
    if request.param == "lock":
        monkeypatch.setattr(cache, "_new_bell", cache._LockBell)
    elif not hasattr(os, "eventfd"):
        pytest.skip("no eventfd here")


class Leave:
    """A job that ends its worker, in the only way there is: its time is up as soon as it is idle."""

    def __init__(self, worker: cache._Worker) -> None:
        self.worker = worker

    def work(self) -> None:
        bell = self.worker._bell

        class Silent:
            def wait(self, seconds: float) -> bool:
                return False

            def close(self) -> None:
                bell.close()

        self.worker._bell = Silent()  # type: ignore[assignment]

    def report(self) -> None:
        pass


def send_home() -> None:
    """Let all idle workers go, and wait until they have."""
    while cache._idle:
        worker, _ = cache._idle.popitem()
        worker.take(Leave(worker), None)
        worker.thread.join(60)
        assert not worker.thread.is_alive()


def result_of(fn: Callable[[], Any], name: str | None = None) -> Outcome[Any]:
    results: SimpleQueue[Outcome[Any]] = SimpleQueue()
    start_thread_soon(fn, results.put, name)
    return results.get(timeout=60)


# ---- jobs -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_bell")
def test_deliver_gets_what_the_function_returned_or_raised_in_the_thread_that_called_it() -> None:
    delivered: SimpleQueue[tuple[Outcome[Any], threading.Thread]] = SimpleQueue()

    def deliver(result: Outcome[Any]) -> None:
        delivered.put((result, threading.current_thread()))

    start_thread_soon(threading.current_thread, deliver)
    result, thread = delivered.get(timeout=60)
    assert result == Value(thread)
    assert thread is not threading.current_thread()
    assert thread.daemon

    class Broken(BaseException):
        pass

    def fail() -> None:
        raise Broken

    start_thread_soon(fail, deliver)
    result, again = delivered.get(timeout=60)
    assert isinstance(result, Error)
    assert type(result.error) is Broken
    assert again is thread


@pytest.mark.usefixtures("_bell")
def test_a_hundred_jobs_at_once_get_a_hundred_threads_and_later_ones_no_new_one() -> None:
    together = threading.Barrier(101)
    threads: SimpleQueue[Outcome[threading.Thread]] = SimpleQueue()

    def job() -> threading.Thread:
        together.wait(60)
        return threading.current_thread()

    for _ in range(100):
        start_thread_soon(job, threads.put)
    together.wait(60)
    first = {threads.get(timeout=60).unwrap() for _ in range(100)}
    assert len(first) == 100
    for _ in range(100):
        assert result_of(threading.current_thread).unwrap() in first


def test_the_worker_that_became_idle_last_gets_the_next_job() -> None:
    gates = [threading.Event() for _ in range(3)]
    done: SimpleQueue[threading.Thread] = SimpleQueue()

    def job(gate: threading.Event) -> None:
        assert gate.wait(60)

    for gate in gates:
        start_thread_soon(lambda gate=gate: job(gate), lambda _: done.put(threading.current_thread()))  # type: ignore[misc]
    order = []
    for number in (1, 2, 0):
        gates[number].set()
        order.append(done.get(timeout=60))
    assert result_of(threading.current_thread).unwrap() is order[-1]


@pytest.mark.usefixtures("_bell")
def test_a_job_that_is_brought_by_the_delivery_of_another_gets_the_same_worker() -> None:
    threads: SimpleQueue[threading.Thread] = SimpleQueue()

    def deliver(_: object, left: int = 50) -> None:
        threads.put(threading.current_thread())
        if left:
            start_thread_soon(int, lambda result: deliver(result, left - 1))

    start_thread_soon(int, deliver)
    assert len({threads.get(timeout=60) for _ in range(51)}) == 1


def test_a_delivery_that_raises_is_reported_and_the_worker_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: SimpleQueue[Any] = SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", reports.put)

    def deliver(result: object) -> None:
        raise SystemExit(f"delivery of {result}")

    start_thread_soon(threading.current_thread, deliver)
    report = reports.get(timeout=60)
    assert report.exc_type is SystemExit
    assert result_of(threading.current_thread).unwrap() is report.thread


def test_a_thread_has_the_name_of_its_job_only_while_it_does_that() -> None:
    def name() -> str:
        return threading.current_thread().name

    own = result_of(name).unwrap()
    assert own.startswith("kernel worker ")
    assert result_of(name, "fetching").unwrap() == "fetching"
    assert result_of(name, "").unwrap() == ""
    assert result_of(name).unwrap() == own


def test_a_worker_has_nothing_of_the_context_in_which_it_was_started() -> None:
    secret = contextvars.ContextVar[str]("secret", default="none")
    secret.set("of the first caller")
    assert result_of(secret.get).unwrap() == "none"


# ---- what is kept -------------------------------------------------------------------------------------


class Thing:
    def __call__(self) -> Thing:
        return Thing()


@pytest.mark.usefixtures("_bell")
def test_a_finished_job_is_not_kept_referenced_by_the_idle_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    new_bell = cache._new_bell
    asleep: SimpleQueue[None] = SimpleQueue()

    class Telling:
        def __init__(self) -> None:
            self.inner = new_bell()
            self.ring, self.close = self.inner.ring, self.inner.close

        def wait(self, seconds: float) -> bool:
            asleep.put(None)
            return self.inner.wait(seconds)

    monkeypatch.setattr(cache, "_new_bell", Telling)
    function = Thing()
    refs = [weakref.ref(function)]

    def deliver(result: Outcome[Any]) -> None:
        refs.extend([weakref.ref(result), weakref.ref(result.unwrap())])

    gc.disable()
    try:
        start_thread_soon(function, deliver)
        del function
        asleep.get(timeout=60)  # before the job
        asleep.get(timeout=60)  # after it
        assert [ref() for ref in refs] == [None] * 3
    finally:
        gc.enable()


def test_the_function_is_let_go_of_before_the_delivery() -> None:
    function = Thing()
    ref = weakref.ref(function)
    forgotten = threading.Event()
    alive: SimpleQueue[object] = SimpleQueue()
    start_thread_soon(function, lambda _: alive.put((forgotten.wait(60), ref() is not None)[1]))
    del function
    forgotten.set()
    assert alive.get(timeout=60) is False


# ---- going --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_bell")
def test_a_worker_that_gets_no_job_goes_and_takes_its_descriptor_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "IDLE_SECONDS", 0.001)
    before = set(cache._eventfds)
    thread = result_of(threading.current_thread).unwrap()
    thread.join(60)
    assert not thread.is_alive()
    assert not cache._idle
    assert cache._eventfds == before


@pytest.mark.usefixtures("_bell")
def test_a_worker_that_goes_idle_as_a_job_arrives_does_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is up just as it was taken off the list, three times in a row. It must not leave: the job is coming."""
    new_bell = cache._new_bell
    log: list[str] = []

    class Late:
        def __init__(self) -> None:
            self.inner = new_bell()
            self.ring, self.close = self.inner.ring, self.inner.close

        def wait(self, seconds: float) -> bool:
            rung = self.inner.wait(seconds)
            if rung and len(log) < 3:
                log.append("time is up")
                self.inner.ring()
                return False
            return rung

    monkeypatch.setattr(cache, "_new_bell", Late)
    assert result_of(lambda: "done").unwrap() == "done"
    assert log == ["time is up"] * 3


@pytest.mark.usefixtures("_bell")
def test_workers_that_go_and_jobs_that_come_at_the_same_moment_all_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "IDLE_SECONDS", 1e-6)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = []
        for number in range(200 * LONG):
            thread, answer = result_of(lambda number=number: (threading.current_thread(), number)).unwrap()
            assert answer == number
            threads.append(thread)
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(before)
    assert not cache._idle


def test_without_descriptors_a_worker_gets_a_lock_for_a_bell(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "eventfd", no_more, raising=False)
    assert result_of(lambda: "done").unwrap() == "done"
    ((worker, _),) = cache._idle.items()
    assert type(worker._bell) is cache._LockBell


@pytest.mark.usefixtures("_bell")
def test_a_thread_that_cannot_be_started_is_an_error_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise RuntimeError("can't start new thread")

    before = set(cache._eventfds)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        start_thread_soon(int, print)
    assert cache._eventfds == before
    assert not cache._idle


# ---- other processes -------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_a_fork_the_cache_of_the_child_is_empty_and_works_and_has_no_descriptors_of_the_parent() -> None:
    program = """
import os, sys, threading
from queue import SimpleQueue
from kernel.lowlevel import start_thread_soon
from kernel.threads import cache

def result_of(fn):
    results = SimpleQueue()
    start_thread_soon(fn, results.put)
    return results.get(timeout=60).unwrap()

fds = len(os.listdir("/proc/self/fd"))
gate = threading.Event()
start_thread_soon(gate.wait, print)  # one that is busy
started = SimpleQueue()
start_thread_soon(lambda: started.put(1), lambda _: None)
started.get()
assert result_of(threading.get_ident) != threading.get_ident()
pid = os.fork()
if pid == 0:
    try:
        assert not cache._idle and not cache._eventfds
        assert len(os.listdir("/proc/self/fd")) == fds
        assert result_of(threading.get_ident) != threading.get_ident()
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert result_of(lambda: "still here") == "still here"
gate.set()
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program], cwd=ROOT, capture_output=True, timeout=60
    )
    assert done.stderr == b""
    assert done.returncode == 0


def test_a_program_ends_though_a_worker_never_returns() -> None:
    program = """
import threading
from kernel.lowlevel import start_thread_soon
inside = threading.Event()
start_thread_soon(lambda: (inside.set(), threading.Event().wait()), print)
inside.wait()
print("end")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"end\n", b"")
