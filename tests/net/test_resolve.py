"""Lookups: who is asked, in which thread, with what; and what happens when the answer does not come."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import kernel
from kernel import CancelScope, to_thread
from kernel.abc import HostnameResolver
from kernel.lowlevel import checkpoint, current_kernel, current_task, operation
from kernel.net import resolve
from kernel.net.resolve import (
    SystemResolver,
    encode_hostname,
    getaddrinfo,
    getnameinfo,
    getprotobyname,
    set_custom_hostname_resolver,
)
from kernel.testing import wait_all_tasks_blocked
from kernel.threads import cache
from kernel.tracing.deadlock import _NOT_HELD, _references

ROOT = Path(__file__).parent.parent.parent
FOUND = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", 80))]
UNKNOWN = socket.gaierror(socket.EAI_NONAME, "Name or service not known")


class System:
    """Takes the place of the system's functions: answers at once, fails, or blocks until the gate is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.threads: list[threading.Thread] = []
        self.answers: dict[bytes, Any] = {}
        self.gates: dict[bytes, threading.Event] = {}
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self.getaddrinfo)

    async def was_asked(self, times: int) -> None:
        while len(self.asked) < times:
            await kernel.sleep(0.001)

    def block(self, host: bytes) -> threading.Event:
        return self.gates.setdefault(host, threading.Event())

    def getaddrinfo(self, host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0) -> Any:
        if flags & socket.AI_NUMERICHOST:
            return self._real(host, port, family, type, proto, flags)
        self.asked.append((host, port, family, type, proto, flags))
        self.threads.append(threading.current_thread())
        if host in self.gates:
            assert self.gates[host].wait(60)
        answer = self.answers.get(host, FOUND)
        if isinstance(answer, BaseException):
            raise answer
        return answer


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    system = System(monkeypatch)
    yield system
    for gate in system.gates.values():
        gate.set()
    while {thread for thread in system.threads if thread.is_alive()} - {worker.thread for worker in list(cache._idle)}:
        time.sleep(0.001)


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"a thread was asked: {args}")

    monkeypatch.setattr(resolve, "start_thread_soon", refuse)


class Recording(HostnameResolver):
    """A resolver that writes down what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    async def getaddrinfo(self, *args: Any) -> Any:
        self.asked.append(args)
        return FOUND

    async def getnameinfo(self, *args: Any) -> Any:
        self.asked.append(args)
        return "name", "service"


def outcome_of(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return type(error), error.args


# ---- numbers ------------------------------------------------------------------------------------------


def test_for_numbers_nobody_is_asked_and_the_answer_is_the_standard_librarys(no_threads: None) -> None:
    hosts = [None, "127.0.0.1", b"127.0.0.1", "127.1", "0.0.0.0", "255.255.255.255", "::", "::1", b"::1", "fe80::1%lo"]
    ports = [0, 80, 65_535, 70_000, "80", b"80"]
    families = [0, socket.AF_INET, socket.AF_INET6, socket.AF_UNIX]
    types = [(0, 0), (socket.SOCK_STREAM, 0), (socket.SOCK_DGRAM, socket.IPPROTO_UDP), (socket.SOCK_STREAM, 17)]
    all_flags = [0, socket.AI_PASSIVE, socket.AI_CANONNAME, socket.AI_NUMERICHOST, socket.AI_V4MAPPED, 1 << 30]
    cases: list[tuple[Any, ...]] = [
        (*case[:3], *case[3], case[4])
        for case in product(hosts, ports, families, types, all_flags)
        if (case[0], case[4]) != (None, socket.AI_CANONNAME)
    ]
    cases += [(host, None, *rest) for host, _, *rest in cases[:: len(ports)] if host is not None]

    async def ours(args: tuple[Any, ...]) -> Any:
        try:
            return await getaddrinfo(*args)
        except Exception as error:
            return type(error), error.args

    async def main() -> None:
        resolver = Recording()
        set_custom_hostname_resolver(resolver)
        for args in cases:
            assert await ours(args) == outcome_of(lambda args=args: socket.getaddrinfo(*args)), args  # type: ignore[misc]
        assert resolver.asked == []

    kernel.run(main)


def test_full_width_digits_are_numbers_too(no_threads: None) -> None:
    async def main() -> None:
        assert await getaddrinfo("１２７.0.0.１", 80) == socket.getaddrinfo("127.0.0.1", 80)  # noqa: RUF001

    kernel.run(main)


@pytest.mark.parametrize("sockaddr", [("127.0.0.1", 80), ("::1", 80, 0, 0), ("localhost", 80), ("", 80), (), 5, ("x",)])
def test_names_in_numbers_are_given_without_a_thread(sockaddr: Any, no_threads: None) -> None:
    flags = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV

    async def main() -> Any:
        try:
            return await getnameinfo(sockaddr, flags)
        except Exception as error:
            return type(error), error.args

    assert kernel.run(main) == outcome_of(lambda: socket.getnameinfo(sockaddr, flags))


def test_many_lookups_of_numbers_let_the_others_run() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await checkpoint()
            turns += 1

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(500):
                await getaddrinfo("127.0.0.1", 80)
                await getnameinfo(("127.0.0.1", 80), 3)
            nursery.cancel_scope.cancel()

    kernel.run(main)
    assert turns > 5


# ---- the system, in a thread --------------------------------------------------------------------------


def test_a_name_is_looked_up_in_a_thread_with_all_arguments(system: System) -> None:
    async def main() -> None:
        assert await getaddrinfo("example.org", "http", socket.AF_INET, socket.SOCK_STREAM, 6, 0x20) == FOUND
        assert await getaddrinfo(b"example.org", 80) == FOUND
        assert await getaddrinfo("127.0.0.1", "http") == FOUND  # the service is a question

    kernel.run(main)
    assert system.asked == [
        (b"example.org", "http", socket.AF_INET, socket.SOCK_STREAM, 6, 0x20),
        (b"example.org", 80, 0, 0, 0, 0),
        (b"127.0.0.1", "http", 0, 0, 0, 0),
    ]
    assert threading.current_thread() not in system.threads


def test_the_real_system_knows_this_machine() -> None:
    async def main() -> None:
        assert await getaddrinfo("localhost", 80) == socket.getaddrinfo("localhost", 80)
        assert await getnameinfo(("127.0.0.1", 80), 0) == socket.getnameinfo(("127.0.0.1", 80), 0)
        assert await getprotobyname("tcp") == socket.IPPROTO_TCP
        with pytest.raises(OSError, match="not found"):
            await getprotobyname("no such protocol")

    kernel.run(main)


@pytest.mark.parametrize("flags", [0, socket.NI_NUMERICHOST, socket.NI_NUMERICSERV, socket.NI_DGRAM])
def test_names_of_an_address_are_looked_up_in_a_thread(flags: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(*args: object) -> object:
        return args, threading.current_thread() is not threading.main_thread()

    monkeypatch.setattr(socket, "getnameinfo", names)

    async def main() -> Any:
        return await getnameinfo(("127.0.0.1", 80), flags)

    assert kernel.run(main) == ((("127.0.0.1", 80), flags), True)


def test_generator_style_works(system: System) -> None:
    def main() -> Generator[Any, Any, None]:
        assert (yield from getaddrinfo("example.org", 80)) == FOUND
        assert (yield from getaddrinfo("127.0.0.1", 80))[0][4] == ("127.0.0.1", 80)

    kernel.run(main)


def test_a_name_that_is_not_known_is_an_error_that_says_which_name(system: System) -> None:
    system.answers[b"nowhere.example"] = UNKNOWN

    async def main() -> None:
        with pytest.raises(socket.gaierror) as caught:
            await getaddrinfo("nowhere.example", 80)
        assert caught.value is UNKNOWN
        assert caught.value.__context__ is None
        assert "nowhere.example" in "".join(caught.value.__notes__)

    kernel.run(main)


def test_two_lookups_at_once_get_each_its_own_answer_in_any_order(system: System) -> None:
    first, second = system.block(b"first"), system.block(b"second")
    system.answers = {b"first": ["1"], b"second": ["2"]}
    log: list[Any] = []

    async def look_up(name: str) -> None:
        log.append((name, await getaddrinfo(name, 80)))

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(look_up, "first")
            nursery.start_soon(look_up, "second")
            await wait_all_tasks_blocked()
            second.set()
            while not log:
                await checkpoint()
            first.set()

    kernel.run(main)
    assert log == [("second", ["2"]), ("first", ["1"])]


def test_other_tasks_run_while_a_lookup_hangs_and_reports_show_what_for(system: System) -> None:
    gate = system.block(b"slow.example")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(getaddrinfo, "slow.example", 80)
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            assert repr(task.trap) == "<lookup getaddrinfo(b'slow.example', 80, 0, 0, 0, 0)>"
            gate.set()

    kernel.run(main)


def test_a_cancelled_lookup_leaves_at_once_and_its_thread_keeps_the_token(system: System) -> None:
    gate = system.block(b"hangs.example")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(getaddrinfo, "hangs.example", 80)
            await wait_all_tasks_blocked()
            limiter = resolve._limiter.get()
            assert limiter.borrowed_tokens == 1
            nursery.cancel_scope.cancel()
        assert nursery.cancel_scope.cancelled_caught
        assert limiter.borrowed_tokens == 1
        assert to_thread.current_default_thread_limiter().borrowed_tokens == 0
        gate.set()
        while limiter.borrowed_tokens:
            await kernel.sleep(0.001)

    kernel.run(main)


def test_an_answer_that_is_there_already_is_not_lost_to_a_cancellation(system: System) -> None:
    gate = system.block(b"host")
    log: list[Any] = []

    async def look_up(scope: CancelScope) -> None:
        with scope:
            log.append(await getaddrinfo("host", 80))

    async def main() -> None:
        scope = CancelScope()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(look_up, scope)
            await wait_all_tasks_blocked()
            lookup: Any = next(iter(nursery.child_tasks)).trap
            finish = lookup._finish
            type_of_lookup = type(lookup)

            def finish_and_cancel(self: Any, outcome: Any) -> None:
                finish(outcome)
                scope.cancel()

            type_of_lookup._finish, before = finish_and_cancel, type_of_lookup._finish
            gate.set()
        type_of_lookup._finish = before

    kernel.run(main)
    assert log == [FOUND]


def test_so_many_lookups_at_once_and_the_next_one_waits_for_a_token(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "LOOKUPS", 2)
    gates = [system.block(b"a"), system.block(b"b")]

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            for name in "ab":
                nursery.start_soon(getaddrinfo, name, 80)
            await system.was_asked(2)
            async with kernel.open_nursery() as impatient:
                impatient.start_soon(getaddrinfo, "c", 80)
                await wait_all_tasks_blocked()
                impatient.cancel_scope.cancel()
            nursery.start_soon(getaddrinfo, "d", 80)
            await wait_all_tasks_blocked()
            assert len(system.asked) == 2
            gates[0].set()
            await system.was_asked(3)
            gates[1].set()

    kernel.run(main)
    assert [args[0] for args in system.asked][2:] == [b"d"]


def test_without_a_thread_to_be_had_the_token_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(resolve, "start_thread_soon", refuse)

    async def main() -> None:
        with pytest.raises(RuntimeError, match="new thread"):
            await getaddrinfo("example.org", 80)
        assert resolve._limiter.get().borrowed_tokens == 0

    kernel.run(main)


def test_the_run_ends_without_waiting_for_a_lookup_that_nobody_waits_for(system: System) -> None:
    """A thread of `to_thread`, abandoned likewise, would hold it up for a second and cause a warning: an error here."""
    gate = system.block(b"hangs.example")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(getaddrinfo, "hangs.example", 80)
            await system.was_asked(1)
            nursery.cancel_scope.cancel()

    kernel.run(main)
    gate.set()  # the thread is done after the run, and finds nobody: that is no error either


def test_a_program_ends_though_a_lookup_never_does() -> None:
    program = """
import socket, threading, kernel
from kernel.net.resolve import getaddrinfo

def hang(host, port, family, type, proto, flags):
    if flags & socket.AI_NUMERICHOST:
        raise socket.gaierror(socket.EAI_NONAME, "no number")
    threading.Event().wait()

async def main():
    with kernel.move_on_after(0.01) as scope:
        await getaddrinfo("hangs.example", 80)
    print(scope.cancelled_caught)

socket.getaddrinfo = hang
kernel.run(main)
print("over")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr, done.returncode) == ("True\nover\n", "", 0)


def test_ctrl_c_gets_through_to_who_waits_for_a_lookup(system: System) -> None:
    gate = system.block(b"hangs.example")

    async def interrupt() -> None:
        await system.was_asked(1)
        signal.raise_signal(signal.SIGINT)

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(interrupt)
            await getaddrinfo("hangs.example", 80)

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main)
    gate.set()


# ---- cancelled before, bad arguments --------------------------------------------------------------------


def test_in_a_cancelled_scope_nobody_is_asked(system: System) -> None:
    async def main() -> None:
        resolver = Recording()
        for custom in (None, resolver):
            set_custom_hostname_resolver(custom)
            for function, *args in (
                (getaddrinfo, "example.org", 80), (getaddrinfo, "127.0.0.1", 80), (getnameinfo, ("127.0.0.1", 80), 3),
                (getnameinfo, ("127.0.0.1", 80), 0), (getprotobyname, "tcp"),
            ):  # fmt: skip
                with CancelScope() as scope:
                    scope.cancel()
                    await function(*args)
                    pytest.fail("it was no cancel point")
                assert scope.cancelled_caught
        assert resolver.asked == []

    kernel.run(main)
    assert system.asked == []


@pytest.mark.parametrize("host", ["bank.example\0.evil.example", b"127.0.0.1\0.evil.example"])
def test_a_null_character_does_not_hide_the_rest_of_a_name(host: Any, system: System) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="null character"):
            await getaddrinfo(host, 80)

    kernel.run(main)
    assert system.asked == []


def test_arguments_of_wrong_types_are_refused_as_by_the_standard_library(system: System) -> None:
    async def main() -> None:
        args: Any
        for args in ((5, 80, 0), ("127.0.0.1", 1.5, 0), ("127.0.0.1", 80, "inet")):
            theirs = outcome_of(lambda args=args: socket.getaddrinfo(*args, flags=socket.AI_NUMERICHOST))  # type: ignore
            with pytest.raises(theirs[0]):
                await getaddrinfo(*args)

    kernel.run(main)
    assert system.asked == []


def test_operations_need_a_kernel() -> None:
    for wait in (getaddrinfo("127.0.0.1", 80), getnameinfo(("127.0.0.1", 80), 3), getprotobyname("tcp")):
        with pytest.raises(RuntimeError, match="outside the kernel"):
            next(iter(wait))
    with pytest.raises(RuntimeError, match="outside the kernel"):
        set_custom_hostname_resolver(None)


# ---- a resolver of the program's ------------------------------------------------------------------------


def test_a_custom_resolver_is_asked_in_place_of_the_system(no_threads: None) -> None:
    async def main() -> None:
        resolver = Recording()
        assert set_custom_hostname_resolver(resolver) is None
        assert await getaddrinfo("bücher.example", "http", 2, 1, 6, 0x20) == FOUND
        assert await getaddrinfo(b"raw", 80) == FOUND
        assert await getnameinfo(("127.0.0.1", 80), 0) == ("name", "service")
        assert await getnameinfo(("127.0.0.1", 80), 3) == ("name", "service")
        assert resolver.asked == [
            (b"xn--bcher-kva.example", "http", 2, 1, 6, 0x20),
            (b"raw", 80, 0, 0, 0, 0),
            (("127.0.0.1", 80), 0),
            (("127.0.0.1", 80), 3),
        ]

    kernel.run(main)


def test_setting_a_resolver_returns_the_one_before_and_none_brings_the_systems_back(system: System) -> None:
    async def main() -> None:
        first, second = Recording(), Recording()
        assert set_custom_hostname_resolver(first) is None
        assert set_custom_hostname_resolver(second) is first
        assert set_custom_hostname_resolver(None) is second
        assert set_custom_hostname_resolver(first) is None
        set_custom_hostname_resolver(None)
        await getaddrinfo("example.org", 80)
        assert first.asked == second.asked == []

    async def another_run() -> None:
        await getaddrinfo("example.org", 80)
        set_custom_hostname_resolver(Recording())

    kernel.run(main)
    kernel.run(another_run)
    kernel.run(another_run)  # each run begins with the system's
    assert len(system.asked) == 3


class Failing(Recording):
    async def getaddrinfo(self, *args: Any) -> Any:
        raise UNKNOWN


class OfGenerators(Recording):
    @operation
    def getaddrinfo(self, *args: Any) -> Generator[Any, Any, Any]:  # type: ignore[override]
        yield from checkpoint()
        return [(0, 0, 0, current_task().name, ())]


class OfAwaitables(Recording):
    def getaddrinfo(self, *args: Any) -> Awaitable[Any]:  # type: ignore[override]
        class Answer:
            def __await__(self) -> Generator[Any, Any, Any]:
                yield from checkpoint()
                return FOUND

        return Answer()


def test_a_resolver_may_give_whatever_can_be_awaited_and_its_errors_pass() -> None:
    async def main() -> None:
        set_custom_hostname_resolver(OfGenerators())
        assert await getaddrinfo("example.org", 80) == [(0, 0, 0, current_task().name, ())]
        set_custom_hostname_resolver(OfAwaitables())
        assert await getaddrinfo("example.org", 80) == FOUND
        set_custom_hostname_resolver(Failing())
        with pytest.raises(socket.gaierror) as caught:
            await getaddrinfo("example.org", 80)
        assert caught.value is UNKNOWN

    kernel.run(main)


def test_a_resolver_that_hangs_is_cancelled_where_it_hangs() -> None:
    log: list[str] = []

    class Hanging(Recording):
        async def getaddrinfo(self, *args: Any) -> Any:
            try:
                await kernel.sleep_forever()
            finally:
                log.append("left")

    async def main() -> None:
        set_custom_hostname_resolver(Hanging())
        with CancelScope() as scope:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(getaddrinfo, "example.org", 80)
                await wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught

    kernel.run(main)
    assert log == ["left"]


def test_a_resolver_can_add_something_to_the_systems(system: System) -> None:
    class Remembering(SystemResolver):
        def __init__(self) -> None:
            self.known: dict[Any, Any] = {}

        async def getaddrinfo(self, *args: Any) -> Any:
            if args not in self.known:
                self.known[args] = await super().getaddrinfo(*args)
            return self.known[args]

    async def main() -> None:
        set_custom_hostname_resolver(Remembering())
        assert [await getaddrinfo("example.org", 80) for _ in range(3)] == [FOUND] * 3
        assert await getnameinfo(("127.0.0.1", 80), 3) == ("127.0.0.1", "80")

    kernel.run(main)
    assert len(system.asked) == 1


# ---- names outside ASCII ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("example.org", b"example.org"),
        ("Example.ORG.", b"Example.ORG."),
        ("::1", b"::1"),
        ("under_score.a..b", b"under_score.a..b"),
        ("", b""),
        ("bücher.example", b"xn--bcher-kva.example"),
        ("BÜCHER.Example.", b"xn--bcher-kva.example."),
        ("faß.de", b"xn--fa-hia.de"),  # IDNA 2003 has "fass.de", which belongs to somebody else
        ("βόλος.com", b"xn--nxasmm1c.com"),
        ("ｅｘａｍｐｌｅ。org", b"example.org"),  # noqa: RUF001
    ],
)
def test_names_are_encoded_as_the_browsers_do(name: str, encoded: bytes) -> None:
    assert encode_hostname(name) == encoded


@pytest.mark.parametrize("name", ["☃.example", "ü" * 64 + ".example", "ü..example", "\ud800", "-ü.example"])
def test_a_name_that_no_host_can_have_is_a_unicode_error_and_nobody_is_asked(name: str, system: System) -> None:
    async def main() -> None:
        with pytest.raises(UnicodeError):
            await getaddrinfo(name, 80)

    kernel.run(main)
    assert system.asked == []


def test_without_the_package_other_names_are_refused_and_never_guessed(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "idna", None)

    async def main() -> None:
        with pytest.raises(RuntimeError, match=r"faß.*trapkernel\[idna\]"):
            await getaddrinfo("faß.de", 80)
        assert system.asked == []
        await getaddrinfo("example.org", 80)
        await getaddrinfo("bücher.example".encode("idna"), 80)

    kernel.run(main)
    assert [args[0] for args in system.asked] == [b"example.org", b"xn--bcher-kva.example"]


def test_the_token_of_the_run_is_not_kept_by_a_lookup_that_is_over(system: System) -> None:
    """While somebody has it, no deadlock is reported."""

    async def main() -> None:
        await getaddrinfo("example.org", 80)
        for _ in range(1000):
            if _references(current_kernel().locals) == _NOT_HELD:
                return
            await kernel.sleep(0.001)  # the thread may be about to let go of it
        pytest.fail("somebody has it")

    kernel.run(main)
