"""The pytest plugin beside others: pytest-asyncio, pytest-trio, anyio's, hypothesis; and in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import kernel.integrations.pytest_tests  # or each run would import it anew

pytest_plugins = ["pytester"]

# The others are loaded by the runs below, by their entry points. Here they are only imported, once for all of these.
for _module in ("pytest_asyncio.plugin", "pytest_trio.plugin", "anyio.pytest_plugin", "_hypothesis_pytestplugin"):
    pytest.importorskip(_module)

INSTALLED = any(entry.value == "kernel.integrations.pytest_plugin" for entry in entry_points(group="pytest11"))
LOAD = () if INSTALLED else ("-pkernel.integrations.pytest_plugin", "-Wignore::pytest.PytestAssertRewriteWarning")

ROOT = Path(kernel.__file__).parent.parent

TESTS = """
import asyncio, anyio, trio
import pytest, pytest_asyncio
import kernel
from hypothesis import HealthCheck, given, settings, strategies

@pytest.fixture
async def common():
    await kernel.sleep(0)
    yield "kernel"
    await kernel.sleep(0)

@pytest_asyncio.fixture
async def of_asyncio():
    await asyncio.sleep(0)
    return asyncio.get_running_loop()

@pytest.mark.kernel
async def test_kernel(common, nursery, autojump_clock, of_asyncio):
    assert common == "kernel"
    assert isinstance(nursery, kernel.Nursery)
    assert kernel.lowlevel.current_clock() is autojump_clock
    assert isinstance(of_asyncio, asyncio.AbstractEventLoop)
    nursery.start_soon(kernel.sleep, 1000)

@pytest.mark.kernel
def test_kernel_generator(common, nursery):
    yield from kernel.sleep(0)

seen = []

@pytest.mark.kernel
@pytest.mark.parametrize("letter", ["a", "b"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None, database=None)
@given(number=strategies.integers())
async def test_kernel_hypothesis(number, letter, common, nursery, autojump_clock):
    assert isinstance(number, int) and common == "kernel"
    start = kernel.current_time()
    await kernel.sleep(1)
    assert kernel.current_time() == start + 1
    seen.append(letter)

def test_kernel_hypothesis_has_run():
    assert seen.count("a") >= 10 and seen.count("b") >= 10

class TestKernel:
    @pytest.mark.kernel
    @settings(max_examples=5, deadline=None, database=None)
    @given(number=strategies.integers())
    async def test_kernel_method(self, number):
        await kernel.sleep(0)
        assert isinstance(self, TestKernel)

@pytest.mark.trio
async def test_trio(nursery, autojump_clock):
    assert isinstance(nursery, trio.Nursery)
    assert isinstance(autojump_clock, trio.testing.MockClock)
    assert trio.lowlevel.current_clock() is autojump_clock
    nursery.start_soon(trio.sleep_forever)
    await trio.sleep(1000)

@pytest.mark.trio
async def test_trio_mock(mock_clock):
    assert isinstance(mock_clock, trio.testing.MockClock)

@pytest.mark.asyncio
async def test_asyncio(of_asyncio):
    await asyncio.sleep(0)
    assert asyncio.get_running_loop() is of_asyncio

@pytest.mark.anyio
async def test_anyio(anyio_backend_name):
    await anyio.sleep(0)

async def test_anyio_by_fixture(anyio_backend):
    await anyio.sleep(0)

async def test_unmarked():
    await asyncio.sleep(0)
"""


KERNEL = {
    "test_kernel", "test_kernel_generator", "test_kernel_hypothesis[a]", "test_kernel_hypothesis[b]",
    "test_kernel_hypothesis_has_run", "TestKernel::test_kernel_method",
}  # fmt: skip
TRIO = {"test_trio", "test_trio_mock"}
ASYNCIO = {"test_asyncio"}
ANYIO = {f"{test}[{backend}]" for test in ("test_anyio", "test_anyio_by_fixture") for backend in ("asyncio", "trio")}
QUIET = ("-oasyncio_default_fixture_loop_scope=function", "-pno:cacheprovider", "-Wignore")


@pytest.mark.parametrize(
    ("mode", "tests"),
    [
        ("asyncio_mode=strict", KERNEL | TRIO | ASYNCIO | ANYIO),
        ("kernel_mode=auto", KERNEL | TRIO | ASYNCIO | ANYIO),
        ("asyncio_mode=auto", KERNEL | ASYNCIO | {"test_unmarked"}),
        ("trio_mode=true", KERNEL | TRIO),
        ("anyio_mode=auto", KERNEL | ANYIO | {"test_unmarked[asyncio]"}),
    ],
)
def test_each_plugin_runs_its_own_tests(pytester: pytest.Pytester, mode: str, tests: set[str]) -> None:
    # The tests that a mode of one other plugin takes away from another one are left out.
    file = pytester.makepyfile(TESTS)
    result = pytester.inline_run(*LOAD, *QUIET, f"-o{mode}", *(f"{file}::{test}" for test in sorted(tests)))
    passed, skipped, failed = result.listoutcomes()
    assert [report.nodeid for report in (*skipped, *failed)] == []
    assert {report.nodeid.partition("::")[2] for report in passed} == tests


@pytest.mark.parametrize("other", ["asyncio_mode=auto", "trio_mode=true", "anyio_mode=auto"])
def test_two_plugins_that_want_every_test_are_refused(pytester: pytest.Pytester, other: str) -> None:
    pytester.makepyfile("def test_it(): pass")
    result = pytester.runpytest_inprocess(*LOAD, *QUIET, "-okernel_mode=auto", f"-o{other}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*kernel_mode = auto and {other.partition('=')[0]} = * both want every async test*"])


def test_hypothesis_finds_the_smallest_example_that_fails(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
import pytest, kernel
from hypothesis import given, settings, strategies

@pytest.mark.kernel
@settings(database=None, deadline=None)
@given(number=strategies.integers())
async def test_it(number):
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(check, number)

async def check(number):
    assert number < 10
"""
    )
    result = pytester.runpytest_inprocess(*LOAD, *QUIET)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*assert 10 < 10", "*number=10*"])


# ---- in a process of its own ----------------------------------------------------------------------------


PLUGIN = ("-p", "kernel.integrations.pytest_plugin")


def run_alone(path: Path, source: str, *args: str, typed: str = "", autoload: bool = False) -> str:
    """What a new process prints, both to stdout and to stderr, of a file with this source."""
    (path / "pytest.ini").write_text("[pytest]\nkernel_mode = auto\n")
    (path / "test_alone.py").write_text("import pytest, time, kernel\n" + source)
    path_of_modules = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-pno:cacheprovider", *(() if autoload else PLUGIN), *args],
        cwd=path,
        env={
            **os.environ,
            "PYTHONPATH": path_of_modules,
            "COLUMNS": "200",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "" if autoload else "1",
        },
        input=typed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    ).stdout


def test_what_cannot_be_cancelled_is_shown_at_once_or_broken_off(tmp_path: Path) -> None:
    # `block` does not let the loop run until the alarm has written its report.
    shown = run_alone(
        tmp_path,
        """
from kernel.integrations import alarm, pytest_tests

alarm.GRACE = 0.02
written = []

def report(self, text, original=pytest_tests.TestRun._report_at_once):
    original(self, text)
    written.append(text)

pytest_tests.TestRun._report_at_once = report

def block():
    written.clear()
    while not written:
        time.sleep(0.001)

@pytest.mark.kernel(timeout=0.02)
async def test_it(nursery):
    block()
    with kernel.CancelScope(shield=True):
        await kernel.sleep(0)
    alarm.GRACE = 5
    await kernel.sleep(1000)

@pytest.fixture
async def inside():
    alarm.GRACE = 0.02

@pytest.fixture
def outside():
    block()
    alarm.GRACE = 5

@pytest.mark.kernel(timeout=0.02)
async def test_fixture(inside, outside):
    await kernel.sleep(1000)

@pytest.mark.kernel(timeout=0.02)
async def test_shielded(inside, nursery):
    with kernel.CancelScope(shield=True):
        await kernel.sleep(1000)

async def test_next(nursery):
    await kernel.sleep(0)
""",
    )
    assert "3 failed, 1 passed" in shown
    assert "test_alone.py::test_it: the time limit of 0.02 s is over, and the loop does not get to run:" in shown
    assert "test_it: running" in shown
    assert shown.count("in block: time.sleep(0.001)") == 2  # at once, and in the report
    assert "TooSlowError: the test was still running after 0.02 s" in shown
    assert "test_alone.py::test_fixture: the time limit of 0.02 s is over, and the loop does not get to run:" in shown
    assert "What runs instead:" in shown
    assert "in outside" in shown
    assert "TooSlowError: it was broken off: its time was up, and 0.02 s after that it had not left" in shown
    assert "test_shielded: sleeps 999." in shown


def test_the_debugger_works_after_a_failure_and_in_the_midst_of_a_test(tmp_path: Path) -> None:
    shown = run_alone(
        tmp_path,
        """
async def test_fails(nursery):
    number = 42
    await kernel.sleep(0)
    assert number == 43

@pytest.mark.kernel(timeout=0.05)
async def test_stops(nursery):
    number = 7
    breakpoint()
    kernel.integrations.pytest_tests._runs[-1]._alarm._off.wait(5)
    await kernel.sleep(0.1)
    print("number is", number)
""",
        "--pdb",
        "-s",
        typed="p number + 1000\nc\np number + 2000\nnumber = 8\nc\n",
    )
    assert "1042" in shown
    assert "2007" in shown
    assert "number is" in shown
    assert "1 failed, 1 passed" in shown


@pytest.mark.skipif(not INSTALLED, reason="the package is not installed with its entry points")
def test_the_distribution_names_the_plugin_and_pytest_loads_it(tmp_path: Path) -> None:
    source = "async def test_it():\n    await kernel.sleep(0)\n"
    off = ("-pno:asyncio", "-pno:trio", "-pno:anyio")
    assert "1 passed" in run_alone(tmp_path, source, *off, autoload=True)
    shown = run_alone(tmp_path, source, *off, "-pno:kernel", autoload=True)
    assert "async def functions are not natively supported" in shown
