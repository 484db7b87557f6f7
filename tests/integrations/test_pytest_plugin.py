"""The pytest plugin, seen from outside: small test files, run by pytest, and what pytest says of them.

Most run in this process. What concerns the process itself, or other plugins, is in test_pytest_plugin_beside.py.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable

import pytest

import kernel.integrations.pytest_tests  # noqa: F401 - or each run would import it anew

pytest_plugins = ["pytester"]

Result = pytest.RunResult
Run = Callable[..., Result]

PLUGIN = ("-pkernel.integrations.pytest_plugin", "-Wignore::pytest.PytestAssertRewriteWarning", "-pno:cacheprovider")

HEAD = """
import contextvars, gc, os, signal, sys, threading
import pytest
import kernel
from kernel.lowlevel import operation

def log(*words):
    print("\\nlog:", *words)
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(source, *args)`: what pytest makes of a file with this source. All async tests are the kernel's."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # with our entry point or without: it is loaded once

    def run(source: str, *args: str, ini: str = "kernel_mode = auto", **options: bool) -> Result:
        pytester.makeini(f"[pytest]\nkernel_patience = 0.03\nmarkers =\n  trio\n  asyncio\n{ini}\n")
        pytester.makepyfile(HEAD + source)
        return pytester.runpytest_inprocess(*PLUGIN, "-s", *args, **options)

    return run


def logged(result: Result) -> list[str]:
    """What the file has printed with `log`."""
    return re.findall(r"^log: (.*)$", "\n".join(result.outlines), re.MULTILINE)


def said(result: Result, *lines: str) -> None:
    """The lines stand in the output, in this order."""
    result.stdout.fnmatch_lines([f"*{line}*" for line in lines])


# ---- whose test is it? --------------------------------------------------------------------------------


def test_marked_tests_run_in_the_kernel_and_others_do_not(run: Run) -> None:
    result = run(
        """
@pytest.mark.kernel
async def test_async():
    await kernel.sleep(0)
    log(kernel.lowlevel.current_task().name)

@pytest.mark.kernel
def test_generator():
    yield from kernel.sleep(0)
    log(kernel.lowlevel.current_task().name)

def test_plain():
    log(kernel.lowlevel.in_kernel_run())
""",
        ini="",
    )
    result.assert_outcomes(passed=3)
    assert logged(result) == ["test_async", "test_generator", "False"]


def test_a_mark_on_the_module_means_those_that_can_wait(run: Run) -> None:
    result = run(
        """
pytestmark = pytest.mark.kernel

async def test_async():
    await kernel.sleep(0)

def test_plain():
    assert not kernel.lowlevel.in_kernel_run()

class TestClass:
    def test_generator(self):
        yield from kernel.sleep(0)
""",
        ini="",
    )
    result.assert_outcomes(passed=3)


def test_in_auto_mode_no_mark_is_needed(run: Run) -> None:
    result = run(
        """
async def test_async():
    await kernel.sleep(0)

def test_generator():
    yield from kernel.sleep(0)

def test_plain():
    assert not kernel.lowlevel.in_kernel_run()
"""
    )
    result.assert_outcomes(passed=3)


def test_the_command_line_goes_before_the_ini_file(run: Run) -> None:
    result = run("async def test_async(): pass", "--kernel-mode=strict")
    result.assert_outcomes(failed=1)
    said(result, "async def functions are not natively supported")


def test_a_plain_function_with_a_mark_of_its_own_is_told_to_be_async(run: Run) -> None:
    result = run("@pytest.mark.kernel\ndef test_plain(): pass\n")
    result.assert_outcomes(failed=1)
    said(result, "Write `async def *test_plain`")


@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_an_async_generator_is_no_test(run: Run, mode: str) -> None:
    result = run("@pytest.mark.kernel\nasync def test_it():\n    yield\n", f"--kernel-mode={mode}")
    result.assert_outcomes(errors=1)
    said(result, "test_it is an async generator: a test returns")


def test_marks_of_two_event_loops_are_refused(run: Run) -> None:
    result = run("@pytest.mark.kernel\n@pytest.mark.trio\nasync def test_it(): pass\n")
    result.assert_outcomes(errors=1)
    said(result, "test_it is marked for several event loops: kernel, trio")


def test_the_innermost_mark_says_whose_a_test_is(run: Run) -> None:
    result = run(
        """
pytestmark = pytest.mark.trio

class TestOurs:
    pytestmark = pytest.mark.kernel

    async def test_ours(self):
        await kernel.sleep(0)

    @pytest.mark.asyncio
    async def test_theirs(self): pass

async def test_theirs(): pass
""",
        "-Wignore",
    )
    assert result.parseoutcomes()["passed"] == 1  # nobody runs the others here, which pytest fails or skips


def test_methods_static_methods_and_parameters(run: Run) -> None:
    result = run(
        """
@pytest.fixture(params=["x", "y"])
async def letter(request):
    await kernel.sleep(0)
    return request.param

class TestClass:
    @pytest.fixture
    async def me(self):
        return self

    @pytest.mark.parametrize("number", [1, 2])
    async def test_method(self, me, number, letter):
        assert me is self
        log(number, letter)

    @staticmethod
    async def test_static(letter):
        log(letter)
"""
    )
    result.assert_outcomes(passed=6)
    assert logged(result) == ["1 x", "2 x", "1 y", "2 y", "x", "y"]


def test_methods_of_unittest_are_refused(run: Run) -> None:
    result = run(
        """
import unittest

class Case(unittest.TestCase):
    @pytest.mark.kernel
    async def test_it(self): pass
"""
    )
    result.assert_outcomes(errors=1)
    said(result, "test_it cannot run in the kernel: it is a method of a unittest.TestCase")


def test_a_mark_that_comes_after_collection_is_refused(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        "def pytest_collection_modifyitems(items):\n    for item in items: item.add_marker('kernel')\n"
    )
    result = run("async def test_it(): pass", ini="")
    result.assert_outcomes(errors=1)
    said(result, "put the mark into the source")


def test_doctests_are_left_alone(run: Run) -> None:
    run('def f():\n    """\n    >>> 1 + 1\n    2\n    """\n', "--doctest-modules").assert_outcomes(passed=1)


# ---- fixtures -------------------------------------------------------------------------------------------


def test_fixtures_and_test_are_one_task_in_one_run_and_end_in_reverse(run: Run) -> None:
    result = run(
        """
def here(what):
    log(what, kernel.lowlevel.current_task().name)

@pytest.fixture
async def returns():
    await kernel.sleep(0)
    here("returns")
    return 1

@pytest.fixture
async def yields(returns):
    here("yields")
    yield returns + 1
    await kernel.sleep(0)
    here("yields ends")

@pytest.fixture
@operation
def in_generator_style(yields):
    yield from kernel.sleep(0)
    here("generator")
    yield yields + 1
    yield from kernel.sleep(0)
    here("generator ends")

@pytest.fixture
@operation
def returns_in_generator_style(in_generator_style):
    yield from kernel.sleep(0)
    return in_generator_style + 1

@pytest.fixture
def plain(returns_in_generator_style):
    here("plain")
    yield returns_in_generator_style + 1
    here("plain ends")

@pytest.fixture
def plain_and_returns(plain):
    here("another")
    return plain + 1

async def test_it(plain_and_returns):
    here(f"test {plain_and_returns}")
"""
    )
    result.assert_outcomes(passed=1)
    assert logged(result) == [
        f"{what} test_it"
        for what in (
            "returns", "yields", "generator", "plain", "another", "test 6", "plain ends", "generator ends",
            "yields ends",
        )
    ]  # fmt: skip


def test_a_plain_generator_may_yield_none_or_an_operation_as_its_value(run: Run) -> None:
    # In generator style a bare `yield` is the fixture's, and all that comes from a `yield from` is the kernel's.
    result = run(
        """
@pytest.fixture
@operation
def nothing():
    yield from kernel.lowlevel.checkpoint()
    yield
    yield from kernel.lowlevel.checkpoint()
    log("nothing ends")

async def test_it(nothing):
    assert nothing is None
"""
    )
    result.assert_outcomes(passed=1)
    assert logged(result) == ["nothing ends"]


def test_a_plain_fixture_without_kernel_fixtures_stays_outside(run: Run) -> None:
    result = run(
        """
async def program():
    return kernel.lowlevel.current_task().name

@pytest.fixture
async def inside(): pass

@pytest.fixture
def outside():
    yield kernel.run(program)
    log(kernel.run(program))

async def test_it(inside, outside):
    log(outside)
    with pytest.raises(RuntimeError):
        kernel.run(program)
"""
    )
    result.assert_outcomes(passed=1)
    assert logged(result) == ["program", "program"]


def test_a_fixture_that_yields_twice_or_never_is_an_error(run: Run) -> None:
    result = run(
        """
@pytest.fixture
async def twice():
    yield
    yield

@pytest.fixture
@operation
def twice_in_generator_style():
    yield
    yield

@pytest.fixture
async def never():
    if False: yield

async def test_twice(twice): pass
async def test_twice_in_generator_style(twice_in_generator_style): pass
async def test_never(never): pass
"""
    )
    result.assert_outcomes(passed=2, errors=3)
    text = result.stdout.str()
    for told in (
        "twice has yielded a second time",
        "twice_in_generator_style has yielded a second time",
        "never has ended without a yield",
    ):  # once, whatever the summary quotes
        assert len(re.findall(rf"^E +RuntimeError: {told}", text, re.MULTILINE)) == 1


def test_an_error_in_a_fixture_is_an_error_of_the_test_and_not_a_failure(run: Run) -> None:
    result = run(
        """
@pytest.fixture
async def outer():
    yield
    log("outer ends")

@pytest.fixture
async def fails_early(outer):
    raise ValueError("early")

@pytest.fixture
async def fails_late(outer):
    yield
    raise ValueError("late")

async def test_early(fails_early):
    log("not reached")

async def test_late(fails_late): pass
"""
    )
    result.assert_outcomes(passed=1, errors=2)
    assert logged(result) == ["outer ends", "outer ends"]
    said(
        result,
        "ERROR at setup of test_early",
        "ValueError: early",
        "ERROR at teardown of test_late",
        "ValueError: late",
    )


def test_scopes_of_a_fixture_are_around_the_test(run: Run) -> None:
    result = run(
        """
@pytest.fixture
async def limited():
    with kernel.move_on_after(5) as scope:
        yield scope
    log("caught", scope.cancelled_caught)

async def test_inside(limited, autojump_clock):
    assert kernel.current_effective_deadline() == 5

async def test_too_slow(limited, autojump_clock):
    await kernel.sleep(10)
"""
    )
    result.assert_outcomes(passed=1, failed=1)
    said(result, "await kernel.sleep(10)", "RuntimeError: this was cancelled by a scope around it*reason: deadline")
    assert logged(result) == ["caught False", "caught False"]


def test_context_variables_reach_the_test_from_fixtures_inside_and_outside(run: Run) -> None:
    result = run(
        """
var = contextvars.ContextVar("var", default="nothing")
other = contextvars.ContextVar("other", default="nothing")

@pytest.fixture
async def inside():
    token = var.set("inside")
    yield
    log(var.get())
    var.reset(token)
    log(var.get())

@pytest.fixture
def outside():
    token = other.set("outside")
    yield
    other.reset(token)

async def test_it(inside, outside):
    log(var.get(), other.get())
    var.set("test")

def test_next():
    log(var.get(), other.get())
"""
    )
    result.assert_outcomes(passed=2)
    assert logged(result) == ["inside outside", "test", "nothing", "nothing nothing"]


def test_a_kernel_fixture_of_a_wider_scope_is_refused(run: Run) -> None:
    scopes = ("class", "module", "package", "session")
    result = run(
        "\n".join(
            f"@pytest.fixture(scope={scope!r})\n"
            f"async def wide_{scope}(): pass\n"
            f"async def test_{scope}(wide_{scope}): pass"
            for scope in scopes
        )
    )
    result.assert_outcomes(errors=4)
    for scope in scopes:
        said(result, f"fixture 'wide_{scope}' has the scope '{scope}', and is to be set up in the kernel")


def test_a_kernel_fixture_cannot_be_asked_for_by_a_running_test(run: Run) -> None:
    result = run(
        """
@pytest.fixture
async def late(): pass

async def test_it(request):
    request.getfixturevalue("late")
"""
    )
    result.assert_outcomes(failed=1)
    said(result, "fixture 'late' cannot be set up by getfixturevalue() while the kernel runs")


def test_an_operation_is_no_fixture_of_a_plain_test(run: Run) -> None:
    result = run(
        """
@pytest.fixture
@operation
def fixture():
    yield from kernel.sleep(0)

def test_plain(fixture): pass
def test_nursery(nursery): pass
"""
    )
    result.assert_outcomes(errors=2)
    said(result, "fixture 'fixture' runs in the kernel, and 'test_plain' does not: mark the test")
    said(result, "fixture 'nursery' runs in the kernel, and 'test_nursery' does not: mark the test")


# ---- the nursery ----------------------------------------------------------------------------------------


def test_a_fixture_and_its_test_share_one_nursery(run: Run) -> None:
    result = run(
        """
@pytest.fixture
async def first(nursery):
    return nursery

@pytest.fixture
def second(nursery):
    nursery.start_soon(child, "started by a plain fixture")
    return nursery

async def child(word):
    await kernel.sleep(0)
    log(word)

async def test_it(first, second, nursery):
    assert first is second is nursery
    nursery.start_soon(child, "started by the test")
"""
    )
    result.assert_outcomes(passed=1)
    assert logged(result) == ["started by a plain fixture", "started by the test"]


def test_the_nursery_waits_for_children_and_then_ends_services(run: Run) -> None:
    result = run(
        """
async def serve():
    try:
        await kernel.sleep_forever()
    finally:
        log("service ends")

async def child():
    await kernel.sleep(100)
    log("child ends")

async def test_it(nursery, autojump_clock):
    nursery.start_service_soon(serve)
    nursery.start_soon(child)
"""
    )
    result.assert_outcomes(passed=1)
    assert logged(result) == ["child ends", "service ends"]


def test_a_failure_in_the_background_fails_the_test_with_that_error_once(run: Run) -> None:
    result = run(
        """
@pytest.fixture
async def server():
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(fail)
        yield
        log("server ends")

async def fail():
    await kernel.testing.wait_all_tasks_blocked()
    value = [1]
    assert value == [2]

@pytest.fixture
async def client(server):
    yield
    log("client ends")

async def test_it(client):
    try:
        await kernel.sleep_forever()
    finally:
        log("test ends")
"""
    )
    result.assert_outcomes(failed=1)
    assert logged(result) == ["test ends", "client ends", "server ends"]
    said(result, "assert value == ?2?", "E*At index 0 diff: 1 != 2")


def test_a_failure_in_the_background_keeps_the_test_from_beginning(run: Run) -> None:
    result = run(
        """
async def fail():
    raise ValueError("in the background")

@pytest.fixture
async def first(nursery):
    nursery.start_soon(fail)

@pytest.fixture
async def second(first):
    log("not reached")

async def test_first(first):
    log("not reached")

async def test_second(second):
    log("not reached")
"""
    )
    result.assert_outcomes(failed=1, errors=1)
    assert logged(result) == []
    said(result, "FAILED*::test_first", "ERROR*::test_second")


def test_a_failure_in_the_background_after_the_test_is_an_error(run: Run) -> None:
    result = run(
        """
async def fail(event):
    await event.wait()
    raise ValueError("in the background")

@pytest.fixture
async def event(nursery):
    event = kernel.Event()
    nursery.start_soon(fail, event)
    return event

@pytest.fixture
async def between(event):
    yield
    await kernel.sleep_forever()

async def test_it(between, event):
    event.set()
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    assert result.stdout.str().count("E       ValueError: in the background") == 1


def test_a_nursery_that_a_fixture_cancels_is_told_and_not_taken_for_success(run: Run) -> None:
    result = run(
        """
@pytest.fixture
async def shop():
    async with kernel.open_nursery() as nursery:
        yield nursery

async def test_it(shop):
    shop.cancel("closing time")
    await kernel.sleep(1)
"""
    )
    result.assert_outcomes(failed=1)
    said(result, "RuntimeError: this was cancelled by a scope around it*'closing time'")


# ---- clocks ---------------------------------------------------------------------------------------------


def test_the_clock_is_that_of_the_run_wherever_it_stands_among_the_fixtures(run: Run) -> None:
    result = run(
        """
@pytest.fixture
async def earlier():
    await kernel.sleep(1000)
    return kernel.lowlevel.current_clock()

async def test_autojump(earlier, autojump_clock):
    assert earlier is autojump_clock
    assert kernel.current_time() == 1000

@pytest.fixture
async def asleep(nursery):
    nursery.start_soon(kernel.sleep, 1000)

async def test_mock(asleep, mock_clock):
    await kernel.testing.wait_all_tasks_blocked()
    assert kernel.lowlevel.current_clock() is mock_clock
    mock_clock.jump(1000)

def test_by_hand(autojump_clock):
    kernel.run(kernel.sleep, 1000, clock=autojump_clock)
"""
    )
    result.assert_outcomes(passed=3)


def test_a_clock_may_be_overridden_by_a_plain_fixture_only(run: Run) -> None:
    result = run(
        """
class TestPlain:
    @pytest.fixture
    def mock_clock(self):
        return kernel.testing.MockClock(rate=1000)

    async def test_it(self, mock_clock):
        assert kernel.lowlevel.current_clock().rate == 1000

class TestAsync:
    @pytest.fixture
    async def mock_clock(self):
        return kernel.testing.MockClock()

    async def test_it(self, mock_clock): pass
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    said(result, "mock_clock makes the clock of the kernel, and cannot be set up in the kernel")


def test_two_clocks_or_one_that_comes_late_are_refused(run: Run) -> None:
    result = run(
        """
async def test_two(mock_clock, autojump_clock): pass

async def test_late(request):
    request.getfixturevalue("mock_clock")
"""
    )
    result.assert_outcomes(failed=2)
    said(result, "test_two asks for two clocks, mock_clock and autojump_clock: a run has one")
    said(result, "mock_clock came too late")


# ---- what comes out -------------------------------------------------------------------------------------


def test_a_single_error_in_a_group_is_the_error(run: Run) -> None:
    result = run(
        """
async def fail(words):
    raise ValueError(words)

async def group(*words):
    async with kernel.open_nursery() as nursery:
        for word in words:
            nursery.start_soon(fail, word)

@pytest.mark.xfail(raises=ValueError, strict=True)
async def test_one():
    await group("one")

@pytest.mark.xfail(raises=ExceptionGroup, strict=True)
async def test_two():
    await group("one", "two")
"""
    )
    result.assert_outcomes(xfailed=2)


def test_skip_and_xfail_and_fail_are_heard_through_nurseries(run: Run) -> None:
    result = run(
        """
async def group(*fns):
    async with kernel.open_nursery() as nursery:
        for fn in fns:
            nursery.start_soon(fn)

async def skip(): pytest.skip("no server")
async def xfail(): pytest.xfail("known")
async def fail(): pytest.fail("on purpose")

@pytest.fixture
async def skips(): pytest.skip("by a fixture")

async def test_skip(): await group(skip)
async def test_skip_twice(): await group(skip, skip)
async def test_skip_by_fixture(skips): pass
async def test_xfail(): await group(xfail)
async def test_fail(): await group(fail)
async def test_skip_and_fail(): await group(skip, fail)
""",
        "-rsf",
    )
    result.assert_outcomes(skipped=3, xfailed=1, failed=2)
    said(result, "Failed: on purpose")


def test_exit_is_heard_through_nurseries(run: Run) -> None:
    result = run(
        """
async def leave():
    pytest.exit("enough", returncode=7)

async def test_it():
    async with kernel.open_nursery() as outer:
        outer.start_soon(kernel.sleep_forever)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(leave)

async def test_next(): pass
"""
    )
    assert result.ret == 7
    said(result, "Exit: enough")


def test_a_test_that_never_leaves_a_nursery_is_told(run: Run) -> None:
    result = run(
        """
async def test_it():
    await kernel.open_nursery().__aenter__()
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    said(result, "RuntimeError: <Task 'test_it'*which it never left")


def test_what_a_test_returns_is_none_of_the_plugins_business(run: Run) -> None:
    result = run("async def test_it():\n    return 5\n", "-Wdefault")
    result.assert_outcomes(passed=1)
    said(result, "PytestReturnNotNoneWarning")


# ---- tests that hang ------------------------------------------------------------------------------------


def test_a_deadlock_is_reported_where_it_is_and_with_who_waits_for_whom(run: Run) -> None:
    result = run(
        """
@pytest.fixture
async def waits(nursery):
    nursery.start_soon(kernel.Event().wait)
    yield
    with kernel.cleanup(5):
        await kernel.sleep(1)
        log("cleaned up")

async def test_it(waits, autojump_clock):
    await kernel.Event().wait()
"""
    )
    result.assert_outcomes(failed=1)
    said(result, ">*await kernel.Event().wait()", "Deadlock: nothing can happen any more: all tasks (2) wait")
    assert logged(result) == ["cleaned up"]


@pytest.mark.parametrize(
    ("ini", "args", "marks"),
    [("kernel_timeout = 0.02", (), ""), ("", ("--kernel-timeout=0.02",), ""), ("", (), "timeout=0.02")],
)
def test_a_test_that_takes_too_long_ends_with_its_task_tree(run: Run, ini: str, args: tuple[str], marks: str) -> None:
    result = run(
        f"""
async def child():
    await kernel.sleep(1000)

@pytest.mark.kernel({marks})
async def test_it(mock_clock):
    try:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
    finally:
        log("cleaned up")
""",
        *args,
        ini=ini,
    )
    result.assert_outcomes(failed=1)
    said(result, "TooSlowError: the test was still running after 0.02 s, its time limit")
    said(result, "- kernel: the tasks when the time was up -", "test_it: waits for its children", "child: sleeps 1000")
    assert logged(result) == ["cleaned up"]


def test_a_test_whose_limit_is_not_reached_is_not_ended(run: Run) -> None:
    result = run(
        """
@pytest.mark.kernel(timeout=100)
async def test_mark(autojump_clock):
    await kernel.sleep(1000)

@pytest.mark.kernel(timeout=0)
async def test_none():
    assert "kernel test alarm" not in {thread.name for thread in threading.enumerate()}
""",
        ini="kernel_timeout = 50",
    )
    result.assert_outcomes(passed=2)


def test_ctrl_c_shows_the_tasks_as_they_were_and_tears_down(run: Run) -> None:
    result = run(
        """
@pytest.fixture
async def fixture(nursery):
    yield
    await kernel.sleep(0)
    log("torn down")

async def child():
    await kernel.lowlevel.checkpoint()
    signal.raise_signal(signal.SIGINT)
    await kernel.sleep_forever()

async def test_it(fixture):
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(child, name="presses")
        nursery.start_soon(kernel.sleep_forever, name="sleeps")

async def test_next():
    log("not reached")
""",
        no_reraise_ctrlc=True,
    )
    assert result.ret == pytest.ExitCode.INTERRUPTED
    said(result, "= kernel: the tasks when Ctrl-C came =", "test_it: waits for its children", "presses: running")
    said(result, "sleeps: sleeps for ever", "!* KeyboardInterrupt *!")
    assert logged(result) == ["torn down"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_between_two_phases_is_pythons_own(run: Run) -> None:
    result = run(
        """
@pytest.fixture
async def inside(): pass

@pytest.fixture
def outside():
    log(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.set_wakeup_fd(-1))

async def test_it(inside, outside): pass
"""
    )
    assert logged(result) == ["True -1"]


# ---- leftovers ------------------------------------------------------------------------------------------


def test_tasks_that_stay_are_named_and_cancelled(run: Run) -> None:
    result = run(
        """
async def serve(what):
    try:
        await kernel.sleep_forever()
    finally:
        log(what, "ends")

@pytest.fixture
async def server(nursery):
    nursery.start_soon(serve, "a", name="serve a")

async def test_it(server, nursery):
    nursery.start_soon(serve, "b", name="serve b")
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    said(result, "test_it has left tasks behind:", "<Task 'serve a'*sleeping", "<Task 'serve b'*sleeping")
    said(result, "Start what shall end with the test by nursery.start_service")
    assert logged(result) == ["a ends", "b ends"]


LEAVES_ALL = """
kept = []

async def test_it():
    kept.append(os.pipe())
    event = threading.Event()
    kept.append(event)
    threading.Thread(target=event.wait, name="stays").start()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    kept.append(pid)

def test_clean_up():
    fds, event, pid = kept
    os.close(fds[0]), os.close(fds[1]), event.set(), os.waitpid(pid, 0)
    for thread in threading.enumerate():
        if thread.name == "stays":
            thread.join()
"""


def test_descriptors_threads_and_children_that_stay_are_named(run: Run) -> None:
    result = run(LEAVES_ALL, "-Wignore::DeprecationWarning")
    result.assert_outcomes(passed=2, errors=1)
    said(result, "test_it has left things behind:", "child process *: has ended, and nobody has asked how")
    said(result, "file descriptor *: pipe:", "file descriptor *: pipe:", "thread <Thread(stays, started")


def test_the_mark_says_what_may_stay(run: Run) -> None:
    body = LEAVES_ALL.partition("async def test_it():")[2].partition("def test_clean_up")[0]
    marks = {"nothing": "False", "tasks": "'tasks'", "none": "[]"}
    tests = [f"@pytest.mark.kernel(leftovers={mark})\nasync def test_{name}():{body}" for name, mark in marks.items()]
    clean_up = """
def test_clean_up():
    while kept:
        fds, event, pid = kept.pop(0), kept.pop(0), kept.pop(0)
        os.close(fds[0]), os.close(fds[1]), event.set(), os.waitpid(pid, 0)
    for thread in threading.enumerate():
        if thread.name == "stays":
            thread.join()
"""
    source = "\n".join(["kept = []", *tests, clean_up])
    run(source, "-Wignore::DeprecationWarning").assert_outcomes(passed=4)


def test_the_ini_file_says_what_may_stay(run: Run) -> None:
    ini = "kernel_mode = auto\nkernel_leftovers = tasks threads"
    result = run(LEAVES_ALL, "-Wignore::DeprecationWarning", ini=ini)
    result.assert_outcomes(passed=2, errors=1)
    said(result, "thread <Thread(stays")
    result.stdout.no_fnmatch_line("*file descriptor*")
    result.stdout.no_fnmatch_line("*child process*")


def test_what_belongs_to_wider_fixtures_to_workers_or_to_garbage_is_not_left(run: Run) -> None:
    result = run(
        """
import socket

@pytest.fixture(scope="module")
def wide():
    a, b = socket.socketpair()
    event = threading.Event()
    thread = threading.Thread(target=event.wait)
    thread.start()
    yield
    event.set(), thread.join(), a.close(), b.close()

@pytest.fixture
def asks_for_it(request):
    return request.getfixturevalue("wide")

async def test_wide(asks_for_it): pass

async def test_worker():
    await kernel.to_thread.run_sync(int)

@pytest.fixture(scope="module")
def no_automatic_collection():
    gc.disable()
    yield
    gc.enable()

async def test_garbage(no_automatic_collection):
    cycle = [open(os.devnull)]
    cycle.append(cycle)
""",
        "-Wignore",
    )
    result.assert_outcomes(passed=3)


def test_a_test_that_has_failed_is_not_blamed_for_leftovers_too(run: Run) -> None:
    result = run(
        """
kept = []

async def test_it(nursery):
    nursery.start_soon(kernel.sleep_forever)
    kept.extend(os.pipe())
    assert False

def test_clean_up():
    for fd in kept: os.close(fd)
"""
    )
    result.assert_outcomes(failed=1, passed=1)


# ---- options that are wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ini", "words"),
    [
        ("kernel_mode = always", "kernel_mode must be strict or auto, not 'always'"),
        ("kernel_timeout = soon", "kernel_timeout must be a number of seconds from 0 up, not 'soon'"),
        ("kernel_patience = -1", "kernel_patience must be a number of seconds from 0 up, not '-1'"),
        ("kernel_leftovers = fds sockets", "kernel_leftovers knows tasks, fds, threads, children, but not sockets"),
    ],
)
def test_a_wrong_option_is_refused_at_once(run: Run, ini: str, words: str) -> None:
    result = run("def test_it(): pass", ini=ini if "patience" not in ini else "")
    if "patience" in ini:
        result = run("def test_it(): pass", "-o", ini.replace(" ", ""))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{words}*"])


def test_a_wrong_mark_is_an_error_of_its_test(run: Run) -> None:
    result = run(
        """
@pytest.mark.kernel(limit=3)
async def test_unknown(): pass

@pytest.mark.kernel(timeout="soon")
async def test_wrong(): pass

@pytest.mark.kernel(leftovers="sockets")
async def test_none(): pass
"""
    )
    result.assert_outcomes(errors=3)
    said(result, "the mark kernel takes timeout= and leftovers=, not {'limit': 3}")
    said(result, "timeout must be a number of seconds from 0 up, not 'soon'")
    said(result, "leftovers knows tasks, fds, threads, children, but not sockets")
