"""The hooks and fixtures of the pytest plugin: which tests are the kernel's, and how they are run.

A test that is ours is collected as a `KernelTest`, whose `obj` is a plain function: to pytest, and to all other
plugins, it is a test like any other. That function runs the test in the kernel. Likewise, a fixture that is ours is
shown to pytest as a plain generator function. So there is nothing that another plugin could take for its own, and
pytest's own order holds: what it sets up first is torn down last, an error in a fixture is an error and not a failure.

All of one test, from its first fixture to the last, is one run of the kernel, in phases (see phases.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from inspect import (
    CO_ITERABLE_COROUTINE,
    isasyncgenfunction,
    isclass,
    iscoroutinefunction,
    isgeneratorfunction,
    ismethod,
)
from math import inf
from types import GeneratorType
from typing import Any, Final
from unittest import TestCase

import pytest

from ..children import Nursery, open_nursery
from ..core.task import here, name_of
from ..core.traps import operation
from ..testing.clock import MockClock
from .alarm import Alarm
from .leftovers import Thing, describe, look, wait_until_gone
from .phases import Phases, all_in, picture_of
from .pytest_options import kinds, options, seconds

__all__ = ["KernelTest", "autojump_clock", "mock_clock", "nursery"]

MASTERS: Final = {"kernel", "asyncio", "trio", "anyio"}  # the marks by which a test says whose it is
CLOCKS: Final = ("mock_clock", "autojump_clock")

_runs: Final[list[TestRun]] = []  # of the tests that are being run: one, unless a test runs pytest
_interrupted: Final = pytest.StashKey[tuple[str, str]]()


# ---- whose test is it? --------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(
    collector: pytest.Module | pytest.Class, name: str, obj: object
) -> list[pytest.Item] | None:
    function: Any = getattr(obj, "__func__", obj)
    if isclass(obj) or not collector.istestfunction(obj, name):
        return None
    inner = function.hypothesis.inner_test if hasattr(function, "hypothesis") else function
    levels: list[tuple[str, Iterable[pytest.Mark]]] = [(name, getattr(function, "pytestmark", ()))]
    if _may_wait(inner):  # a mark on a class or a module leaves the plain tests in it alone
        levels += _levels(collector)
    master = _master(levels)
    auto = master is None and collector.config.stash[options].auto and _may_wait(inner)
    if master != "kernel" and not auto:
        return None
    if isasyncgenfunction(inner):
        raise collector.CollectError(f"{name} is an async generator: a test returns, and does not yield")
    if inner is not function and not hasattr(inner, "runs_in_kernel"):
        function.hypothesis.inner_test = _each_example(inner)

    @wraps(function)
    def shown(*args: Any, **kwargs: Any) -> None:
        """What the other plugins see of the test while its parameters are worked out."""

    items = list(collector._genfunctions(name, shown))
    if auto and any("anyio_backend" in item.fixturenames for item in items):
        return None  # this is how tests without a mark say that they are anyio's
    return [_converted(item) for item in items]


def _levels(node: pytest.Item | pytest.Collector) -> list[tuple[str, Iterable[pytest.Mark]]]:
    """The marks of a node and of all it is in, from the inside out, with the names of where they are."""
    return [(one.name, one.own_markers) for one in reversed(node.listchain())]


def _master(levels: Iterable[tuple[str, Iterable[pytest.Mark]]]) -> str | None:
    """Whose a test is by its marks. The innermost one counts."""
    for where, marks in levels:
        names = {mark.name for mark in marks} & MASTERS
        if "kernel" in names and len(names) > 1:
            raise pytest.Collector.CollectError(
                f"{where} is marked for several event loops: {', '.join(sorted(names))}"
            )
        if names:
            return str(min(names))
    return None


def _may_wait(function: Any) -> bool:
    return (
        iscoroutinefunction(function)
        or isgeneratorfunction(function)
        or isasyncgenfunction(function)
        or hasattr(function, "runs_in_kernel")
    )


def _converted(item: pytest.Function) -> KernelTest:
    callspec = getattr(item, "callspec", None)
    test: KernelTest = KernelTest.from_parent(
        item.parent,
        name=item.name,
        callspec=callspec,
        keywords=None if callspec is None else {callspec.id: True},
        fixtureinfo=item._fixtureinfo,
        originalname=item.originalname,
    )
    return test


def _each_example(function: Callable[..., Any]) -> Callable[..., Any]:
    """What hypothesis calls for each example. The function is shared by all parametrizations of the test."""

    @wraps(function)
    def example(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return _runs[-1].do(partial(function, *args, **kwargs))

    example.runs_in_kernel = True  # type: ignore[attr-defined]
    return example


class KernelTest(pytest.Function):
    """A test that runs in the kernel."""

    kernel_run: TestRun

    def _getobj(self) -> Any:
        function = super()._getobj()  # type: ignore[no-untyped-call]
        if hasattr(function, "hypothesis"):
            return function  # a plain one, which calls the examples

        @wraps(function)
        def test(**kwargs: Any) -> Any:
            __tracebackhide__ = True
            return self.kernel_run.do(partial(function, **kwargs))

        if ismethod(function):
            vars(test)["__self__"] = function.__self__  # where pytest before 8.2 looks for the instance
        return test

    def setup(self) -> None:
        __tracebackhide__ = True
        self.kernel_run = TestRun(self)
        with self.kernel_run.noting_failure():
            self.kernel_run.begin()
            super().setup()

    def runtest(self) -> None:
        __tracebackhide__ = True
        with self.kernel_run.noting_failure():
            super().runtest()

    def teardown(self) -> None:
        super().teardown()
        self.kernel_run.close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if not isinstance(item, pytest.Function) or isinstance(item, KernelTest):
        return
    if iscoroutinefunction(item.function) and _master(_levels(item)) == "kernel":
        why = "it was marked when it had been collected already: put the mark into the source"
        if item.cls is not None and issubclass(item.cls, TestCase):
            why = "it is a method of a unittest.TestCase, which calls its tests itself: make it a class without a base"
        pytest.fail(f"{item.name} cannot run in the kernel: {why}", pytrace=False)


# ---- one test -------------------------------------------------------------------------------------------


class TestRun:
    """A kernel test from its setup to the end of its teardown. The kernel is started when it is needed first."""

    __test__ = False

    def __init__(self, item: KernelTest) -> None:
        self.options = item.config.stash[options]
        self.item = item
        self.timeout = self.options.timeout
        self.leftovers = self.options.leftovers
        self.inside: set[str] = set()  # names of the fixtures that were set up in the kernel
        self.failed = False
        self._phases: Phases | None = None
        self._alarm: Alarm | None = None
        self._picture: tuple[str, str] | None = None
        self._kinds: frozenset[str] = frozenset()
        self._before: set[Thing] = set()

    def begin(self) -> None:
        """Before anything is set up: see what the test's mark says, and what there is."""
        _runs.append(self)
        given = _mark_arguments(self.item)
        self.timeout = seconds(given.get("timeout", self.timeout) or 0, "timeout")
        self.leftovers = kinds(given.get("leftovers", self.leftovers), "leftovers")
        self._kinds = self.leftovers - {"tasks"}
        self._before = look(self._kinds)

    def do(self, fn: Callable[..., Any], **options: Any) -> Any:
        """Run the kernel until `fn()` is done. See `Phases.do`."""
        __tracebackhide__ = True
        if self._phases is None:
            self._start()
        assert self._phases is not None
        try:
            return self._phases.do(fn, **options)
        except BaseExceptionGroup as group:
            if (word := _last_word(group)) is not None:
                raise word from group
            raise

    def _start(self) -> None:
        __tracebackhide__ = True
        wanted = [name for name in CLOCKS if name in self.item.fixturenames]
        if len(wanted) > 1:
            pytest.fail(f"{self.item.name} asks for two clocks, {' and '.join(wanted)}: a run has one", pytrace=False)
        clock = self.item._request.getfixturevalue(wanted[0]) if wanted else None
        self._phases = Phases(self.item.name, clock)
        if self.timeout:
            self._alarm = Alarm(self.timeout, self._phases.kernel, self._report_at_once)

    def refuse_new_clock(self, name: str) -> None:
        if self._phases is not None:
            pytest.fail(f"{name} came too late: the kernel runs already. Name it as an argument", pytrace=False)

    def close(self) -> None:
        """Everything is torn down: end the run, and see what is left."""
        __tracebackhide__ = True
        try:
            if self._phases is not None:
                with self.noting_failure():
                    self._phases.close()
        finally:
            self.no_limit()
            self._picture = self.take_picture()
            self._phases = self._alarm = None  # pytest keeps its items, and need not keep all that was in the run
            _runs.remove(self)
        if self.failed:
            return  # the traceback may keep things open
        left = wait_until_gone(self._before, self._kinds, self.options.patience)
        if left:
            self._complain("things", describe(left))

    def _complain(self, what: str, lines: list[str], more: str = "") -> None:
        __tracebackhide__ = True
        text = "\n".join(f"  {line}" for line in lines)
        pytest.fail(f"{self.item.name} has left {what} behind:\n{text}\n{more}".rstrip(), pytrace=False)

    @contextmanager
    def noting_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.failed = True
            raise

    @contextmanager
    def excusing(self) -> Iterator[None]:
        """What appears within the block is none of the test's business."""
        before = look(self._kinds)
        yield
        self._before |= look(self._kinds) - before

    # ---- the nursery

    def open_nursery(self) -> Nursery:
        nursery: Nursery = self.do(_enter_nursery)
        return nursery

    def close_nursery(self, nursery: Nursery) -> None:
        """Wait for what was started there. What takes too long is cancelled, and is left over."""
        __tracebackhide__ = True
        left: list[str] = []
        picture = ""

        def lose_patience() -> None:
            nonlocal picture
            left.extend(repr(task) for task in nursery._children)
            picture = picture_of(nursery._kernel)
            nursery.cancel("the test is over")

        patience = self.options.patience if "tasks" in self.leftovers else inf
        leave = partial(_leave_nursery, nursery, self.failed)
        self.do(leave, enter=False, patience=patience, impatient=lose_patience)
        if left:
            more = f"(Start what shall end with the test by nursery.start_service.)\n{picture}"
            self._complain("tasks", left, more)

    # ---- the time limit

    def no_limit(self) -> None:
        if self._alarm is not None:
            self._alarm.off()

    def _report_at_once(self, text: str) -> None:
        """Called in the alarm's thread, when it is not certain that anything will come after it."""
        if self.options.stderr is not None:
            os.write(self.options.stderr, f"\n{self.item.nodeid}: {text}\n".encode())

    def take_picture(self) -> tuple[str, str] | None:
        """The task tree of a test that was ended, with a title. To be had once."""
        interrupts = None if self._phases is None else self._phases.interrupts
        for when, taker in (("the time was up", self._alarm), ("Ctrl-C came", interrupts)):
            if taker is not None and taker.picture is not None:
                picture, taker.picture = taker.picture, None
                return f"kernel: the tasks when {when}", picture
        return self._picture


@operation
def _enter_nursery() -> Generator[Any, Any, Nursery]:
    return (yield from open_nursery().__aenter__())


@operation
def _leave_nursery(nursery: Nursery, failed: bool) -> Generator[Any, Any, None]:
    if failed:
        nursery.cancel("the test has failed")
    yield from nursery.__aexit__(None, None, None)


def _mark_arguments(item: pytest.Item) -> dict[str, Any]:
    """What the test's `kernel` marks say, the closest one first."""
    given: dict[str, Any] = {}
    for mark in item.iter_markers("kernel"):
        if mark.args or mark.kwargs.keys() - {"timeout", "leftovers"}:
            pytest.fail(f"the mark kernel takes timeout= and leftovers=, not {mark.args or mark.kwargs}", pytrace=False)
        given = {**mark.kwargs, **given}
    return given


def _last_word(group: BaseExceptionGroup[Any]) -> BaseException | None:
    """`pytest.exit()`, `skip()` and `xfail()` speak to pytest, which does not look into groups."""
    leaves = [error for error in all_in(group) if not isinstance(error, BaseExceptionGroup)]
    for error in leaves:
        if isinstance(error, pytest.exit.Exception):
            return error
    for kind in (pytest.skip.Exception, pytest.xfail.Exception):
        if all(isinstance(error, kind) for error in leaves):
            return leaves[0]
    return None


# ---- fixtures -------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> Iterator[Any]:
    item = request._pyfuncitem
    function = fixturedef.func
    waits = _waits(function)
    if not isinstance(item, KernelTest):
        if waits and _is_operation(function):
            pytest.fail(_only_for_kernel_tests(request), pytrace=False)
        return (yield)
    run = item.kernel_run
    if fixturedef.scope != "function":
        if waits:
            pytest.fail(
                f"fixture {request.fixturename!r} has the scope {fixturedef.scope!r}, and is to be set up in the "
                "kernel. A run of the kernel lasts for one test, and so does what lives in it: make it 'function'.",
                pytrace=False,
            )
        with run.excusing():
            return (yield)
    if not waits and run.inside.isdisjoint(fixturedef.argnames):
        return (yield)
    if request.fixturename in CLOCKS:
        pytest.fail(
            f"{request.fixturename} makes the clock of the kernel, and cannot be set up in the kernel: "
            "make it a plain function without kernel fixtures",
            pytrace=False,
        )
    if here.kernel is not None:
        pytest.fail(
            f"fixture {request.fixturename!r} cannot be set up by getfixturevalue() while the kernel runs: "
            "name it among the arguments",
            pytrace=False,
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixturedef, "func", _in_kernel(run, request, _bound(function, request)))
        return (yield)


def _bound(function: Any, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """A fixture that is a method of the test's class: bound to the test's instance, not to that of the collection."""
    if ismethod(function) and isinstance(request.instance, type(function.__self__)):
        return function.__func__.__get__(request.instance)  # type: ignore[no-any-return]
    return function  # type: ignore[no-any-return]


def _waits(function: Any) -> bool:
    """Whether the fixture is one for an event loop, and not expressly for another plugin's."""
    function = getattr(function, "__func__", function)
    if getattr(function, "_force_asyncio_fixture", False) or getattr(function, "_force_trio_fixture", False):
        return False
    return iscoroutinefunction(function) or isasyncgenfunction(function) or _is_operation(function)


def _is_operation(function: Any) -> bool:
    """Whether it is a generator function with the mark by which `yield` belongs to the kernel."""
    code = getattr(function, "__code__", None)
    return isgeneratorfunction(function) and code is not None and bool(code.co_flags & CO_ITERABLE_COROUTINE)


def _only_for_kernel_tests(request: pytest.FixtureRequest) -> str:
    return (
        f"fixture {request.fixturename!r} runs in the kernel, and {request.node.name!r} does not: "
        "mark the test with @pytest.mark.kernel, or set kernel_mode = auto. It must be an async or generator function"
    )


def _in_kernel(
    run: TestRun, request: pytest.FixtureRequest, function: Callable[..., Any]
) -> Callable[..., Iterator[Any]]:
    """The fixture as a plain generator function, as pytest knows it."""

    def fixture(**kwargs: Any) -> Iterator[Any]:
        __tracebackhide__ = True
        steps = _Fixture(function, kwargs)
        run.inside.add(str(request.fixturename))
        yield run.do(steps.set_up)
        if not steps.over:
            with run.noting_failure():
                run.do(steps.tear_down, enter=False)

    return fixture


class _Fixture:
    """A fixture of any kind, as two operations: up to its `yield`, and from there on."""

    def __init__(self, function: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        self._function = function
        self._kwargs = kwargs
        self._made: Any = None
        self.over = False

    @operation
    def set_up(self) -> Generator[Any, Any, Any]:
        __tracebackhide__ = True
        function = self._function
        self._made = function(**self._kwargs)
        value = yield from self._go_on()
        if self.over and (isasyncgenfunction(function) or (isgeneratorfunction(function) and not _waits(function))):
            raise RuntimeError(f"{name_of(function)} has ended without a yield, so the test gets no value")
        return value

    @operation
    def tear_down(self) -> Generator[Any, Any, None]:
        __tracebackhide__ = True
        yield from self._go_on()
        if not self.over:
            raise RuntimeError(f"{name_of(self._function)} has yielded a second time; a fixture has one value to give")

    @operation
    def _go_on(self) -> Generator[Any, Any, Any]:
        """Up to its next `yield`, or its end, and then it is over. Returns the value it gives."""
        __tracebackhide__ = True
        function, made = self._function, self._made
        try:
            if isasyncgenfunction(function):
                return (yield from made.__anext__())
            if isgeneratorfunction(function) and _waits(function):
                steps = _ToYield(made)
                value = yield from steps
                self.over = steps.over
                return value
            if isgeneratorfunction(function):
                return next(made)
        except (StopAsyncIteration, StopIteration):
            self.over = True
            return None
        self.over = True
        return (yield from made) if iscoroutinefunction(function) else made


class _ToYield:
    """`value = yield from _ToYield(generator)`: run it up to its next `yield` of its own.

    What comes from a `yield from` inside the generator is a trap for the kernel; what comes from a plain `yield` is the
    value of the fixture. The generator itself tells: while it delegates, `gi_yieldfrom` is what it delegates to.
    """

    def __init__(self, generator: GeneratorType[Any, Any, Any]) -> None:
        self._generator = generator
        self.over = False

    # What the task tree looks at: the stack goes on in the generator.
    gi_frame = property(lambda self: self._generator.gi_frame)
    gi_yieldfrom = property(lambda self: self._generator.gi_yieldfrom)

    def __iter__(self) -> _ToYield:
        return self

    def __next__(self) -> Any:
        return self._step(self._generator.__next__)

    def send(self, value: Any) -> Any:
        return self._step(self._generator.send, value)

    def throw(self, *error: Any) -> Any:
        return self._step(self._generator.throw, *error)

    def close(self) -> None:
        self._generator.close()

    def _step(self, method: Callable[..., Any], *args: Any) -> Any:
        __tracebackhide__ = True
        try:
            given = method(*args)
        except StopIteration:
            self.over = True
            raise
        if self._generator.gi_yieldfrom is None:
            raise StopIteration(given)
        return given


def _run_of(request: pytest.FixtureRequest) -> TestRun | None:
    item = request._pyfuncitem
    return item.kernel_run if isinstance(item, KernelTest) else None


def _of_another_plugin(request: pytest.FixtureRequest) -> Any:
    """The fixture of the same name that ours goes before; None if there is no such."""
    assert request.fixturename is not None
    try:
        return request.getfixturevalue(request.fixturename)
    except pytest.FixtureLookupError:
        return None


@pytest.fixture
def nursery(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The nursery of the test, the same one for all its fixtures. When they have ended, it waits for its tasks."""
    run = _run_of(request)
    if run is None:
        theirs = _of_another_plugin(request)
        if theirs is None:
            pytest.fail(_only_for_kernel_tests(request), pytrace=False)
        yield theirs
        return
    run.inside.add("nursery")
    nursery = run.open_nursery()
    yield nursery
    with run.noting_failure():
        run.close_nursery(nursery)


def _clock(request: pytest.FixtureRequest, autojump_threshold: float = inf) -> Any:
    run = _run_of(request)
    if run is None and (theirs := _of_another_plugin(request)) is not None:
        return theirs
    if run is not None:
        run.refuse_new_clock(request.fixturename or "")
    return MockClock(autojump_threshold=autojump_threshold)


@pytest.fixture
def mock_clock(request: pytest.FixtureRequest) -> Any:
    """The clock of the test's run: a `MockClock` that stands still until the test calls `jump`."""
    return _clock(request)


@pytest.fixture
def autojump_clock(request: pytest.FixtureRequest) -> Any:
    """The clock of the test's run: a `MockClock` that jumps to the next deadline when there is nothing to do."""
    return _clock(request, autojump_threshold=0)


# ---- reports --------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report: Any = yield
    if isinstance(item, KernelTest) and call.excinfo is not None and (picture := item.kernel_run.take_picture()):
        report.sections.append(picture)
    return report  # type: ignore[no-any-return]


def pytest_keyboard_interrupt() -> None:
    """There will be no report of the test. Its tasks are shown at the end."""
    if _runs and (picture := _runs[-1].take_picture()) is not None:
        _runs[-1].item.config.stash[_interrupted] = picture


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if _interrupted in config.stash:
        title, text = config.stash[_interrupted]
        terminalreporter.section(title)
        terminalreporter.write(text)


def pytest_enter_pdb() -> None:
    """From now on time is measured by a human."""
    for run in _runs:
        run.no_limit()
