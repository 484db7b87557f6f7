"""kernel.testing.footprints: which kernel objects a step is seen to touch, and that ordinary runs are not watched."""

from __future__ import annotations

import ast
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kernel
from kernel.core.scopes import CancelScope
from kernel.core.task import Task
from kernel.lowlevel import checkpoint, current_task
from kernel.testing import explore
from kernel.testing.footprints import COUNT, READ, WRITE, _classes, conflict

PACKAGE = Path(kernel.__file__).parent
UNWATCHED = (
    "core/errors", "core/loop", "core/ports", "boot", "drivers", "guest", "interrupts", "asyncgens", "tracing", "path",
    "integrations", "threads", "to_thread", "from_thread", "to_process", "process", "files", "signals", "wallclock",
    "testing/closed_world", "testing/explore", "testing/footprints", "testing/pruning", "testing/report",
    "testing/schedules", "testing/strategies", "testing/targets",
)  # fmt: skip
"""Files of what belongs to no task, or to the world outside."""


def endings(*functions: Callable[[Any], Awaitable[Any]], make: Callable[[], Any] = lambda: None) -> set[Any]:
    """Run the functions as tasks, each with the one thing that `make` makes. Their results, in all pruned schedules."""
    found = set()

    async def program() -> None:
        shared = make()
        async with kernel.open_nursery() as nursery:
            handles = [nursery.spawn(function, shared) for function in functions]
        found.add(tuple(handle.outcome.unwrap() for handle in handles))  # type: ignore[union-attr]

    assert explore(program, shares="kernel objects").complete
    return found


# ---- cells ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [(READ, READ, False), (COUNT, COUNT, False), (READ, COUNT, True), (READ, WRITE, True), (WRITE, WRITE, True)],
)
def test_uses_conflict_unless_both_read_or_both_count(one: int, other: int, expected: bool) -> None:
    assert conflict({("cell", 1): one}, {("cell", 1): other, ("cell", 2): WRITE}) is expected
    assert conflict({("cell", 1): one}, {("cell", 2): other}) is False


def test_an_attribute_that_is_read_by_the_program_itself_is_seen() -> None:
    async def look(scope: CancelScope) -> bool:
        return scope.cancelled_caught

    async def use(scope: CancelScope) -> bool:
        with scope:
            scope.cancel()
            await checkpoint()
        return True

    assert endings(look, use, make=CancelScope) == {(False, True), (True, True)}


def test_where_another_task_stands_is_seen() -> None:
    """A line number is no attribute of a task; that somebody looks at its coroutine is."""

    async def look(shared: list[Task]) -> int:
        await checkpoint()
        return len([frame for frame, _ in shared[0].iter_await_frames()]) if shared else -1

    async def walk(shared: list[Task]) -> int:
        shared.append(current_task())
        await checkpoint()
        return 0

    assert len(endings(look, walk, make=list)) >= 2


def test_ends_of_a_channel_share_its_buffer() -> None:
    """Neither touches an attribute of the other one, or of the channel."""

    async def send(ends: Any) -> Any:
        return ends[0].send_nowait("value")

    async def receive(ends: Any) -> Any:
        try:
            return ends[1].receive_nowait()
        except kernel.WouldBlock:
            return None

    assert endings(send, receive, make=lambda: kernel.open_memory_channel[str](1)) == {(None, None), (None, "value")}


def test_results_of_tasks_are_seen() -> None:
    async def program() -> None:
        async def child() -> str:
            await checkpoint()
            return "result"

        async with kernel.open_nursery() as nursery:
            handle = nursery.spawn(child)
            await checkpoint()
            await checkpoint()
            seen.add(str(handle.outcome))

    seen: set[str] = set()
    assert explore(program, shares="kernel objects").complete
    assert seen == {"None", "Value('result')"}


# ---- ordinary runs ----------------------------------------------------------------------------------


async def abba() -> None:
    lock = kernel.Lock()

    async def use() -> None:
        async with lock:
            await checkpoint()

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(use)
        nursery.start_soon(use)


def test_afterwards_the_classes_are_as_before() -> None:
    def contents() -> dict[type, dict[str, Any]]:
        return {kind: dict(vars(kind)) for kind in _classes()}

    before = contents()
    explore(abba, shares="kernel objects")
    assert contents() == before
    assert CancelScope.__getattribute__ is object.__getattribute__


def test_also_if_the_exploration_ends_with_an_error() -> None:
    async def fails() -> None:
        raise ValueError

    with pytest.raises(AssertionError):
        explore(fails, shares="kernel objects")
    assert Task.__getattribute__ is object.__getattribute__
    assert Task.__setattr__ is object.__setattr__


def test_a_plain_exploration_watches_nothing() -> None:
    seen = set()

    async def program() -> None:
        seen.add(Task.__getattribute__)

    explore(program)
    assert seen == {object.__getattribute__}


def test_ordinary_runs_are_as_fast_as_before() -> None:
    """The interpreter specializes attribute accesses; it must do so again."""

    def cost() -> float:
        best = float("inf")
        for _ in range(7):
            start = time.process_time()
            for _ in range(20):
                kernel.run(abba)
            best = min(best, time.process_time() - start)
        return best

    before = cost()
    explore(abba, shares="kernel objects")
    assert cost() < 2 * before


def test_other_threads_are_not_watched() -> None:
    """They may run a kernel of their own meanwhile."""
    done: list[str] = []

    def in_a_thread() -> None:
        kernel.run(abba)
        done.append("well")

    async def program() -> None:
        thread = threading.Thread(target=in_a_thread)
        thread.start()
        thread.join()

    assert explore(program, shares="kernel objects").schedules == 1
    assert set(done) == {"well"}


# ---- the rules that the source must keep ------------------------------------------------------------

Function = ast.FunctionDef | ast.AsyncFunctionDef
Loop = ast.For | ast.While | ast.AsyncFor
Wait = ast.Yield | ast.YieldFrom | ast.Await | ast.AsyncFor | ast.AsyncWith


def watched_files() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).with_suffix("").as_posix()
        if not any(name == other or name.startswith(f"{other}/") for other in UNWATCHED):
            yield name, ast.parse(file.read_text(encoding="utf-8"))


def nodes_of(function: ast.AST, loops: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
    """Those of a function, without those of functions in it; each with the loops around it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, Function | ast.Lambda | ast.ClassDef):
            inside = (*loops, child) if isinstance(child, Loop) else loops
            yield child, inside
            yield from nodes_of(child, inside)


def assignments(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.NamedExpr):
        yield node.target.id, node.value
    elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                yield target.id, node.value
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for one, value in zip(target.elts, node.value.elts, strict=False):
                    if isinstance(one, ast.Name):
                        yield one.id, value


def aliases(function: ast.AST) -> set[tuple[str, str]]:
    """Variables that are given the value of an attribute, and used after a wait: name and attribute."""
    nodes = list(nodes_of(function))
    waits = [(node, loops) for node, loops in nodes if isinstance(node, Wait)]
    uses = [(n, loops) for n, loops in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]

    def end(node: Any) -> tuple[int, int]:
        return node.end_lineno, node.end_col_offset

    return {
        (name, value.attr)
        for node, around in nodes
        for name, value in assignments(node)
        if isinstance(value, ast.Attribute)
        for use, loops in uses
        if use.id == name  # type: ignore[attr-defined]
        for wait, waiting in waits
        if end(node) < end(wait) < end(use) or any(loop in waiting and loop not in around for loop in loops)
    }


def test_no_list_or_dict_is_kept_over_a_yield() -> None:
    """If this fails because of something new: is its value one of those that can change, and not an object of ours?

    Then write `self.things` at each use instead of a local name, or the steps in between seem not to touch it. If not,
    add the attribute here.
    """
    harmless = {
        "_at", "_chunk", "_grown", "_calls", "_cell", "coro", "_nursery", "_owner", "_position", "_sequencer", "_state",
        "_trouble", "nbytes", "socket", "task",
    }  # fmt: skip
    found = {
        (name, function.name, alias)
        for name, tree in watched_files()
        for function in ast.walk(tree)
        if isinstance(function, Function)
        for _, alias in aliases(function)
        if alias not in harmless
    }
    assert found == set()


def test_what_that_looks_for_is_found() -> None:
    (function,) = ast.parse(
        """
async def f(self):
    row = self._row
    other = self._other
    other.append(1)
    while (again := self._again):
        again.append(1)
        await wait()
    early = self._early
    for _ in range(3):
        early.append(1)
        await wait()
    row.append(1)
"""
    ).body
    assert aliases(function) == {("row", "_row"), ("early", "_early")}


def test_functions_that_close_over_variables_are_few() -> None:
    """All of them together are one cell, so that a program that uses one is hardly pruned."""
    closures = set()

    def look(code: Any) -> None:
        for inner in code.co_consts:
            if hasattr(inner, "co_freevars"):
                if set(inner.co_freevars) - {"__class__", "self"} and inner.co_flags & 0x2A0:
                    closures.add(inner.co_name)
                look(inner)

    for name, _ in watched_files():
        if not name.startswith(("testing/", "net/")):
            look(compile((PACKAGE / f"{name}.py").read_text(encoding="utf-8"), name, "exec"))
    assert {"run", "begin"} <= closures
    assert len(closures - {"<genexpr>"}) < 10
