"""How the package is put together: who imports whom, where tasks yield, how long the core is. Read from the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kernel

PACKAGE = Path(kernel.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = ["kernel", *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `node`, without what stands under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from runtime_nodes(other)
            continue
        yield child
        yield from runtime_nodes(child)


def imported_by(module: str, tree: ast.AST, *, is_package: bool) -> set[str]:
    """The full names of the modules that `module` imports at run time, in functions too."""
    found: set[str] = set()
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".") if is_package else module.split(".")[:-1]
                here = here[: len(here) - (node.level - 1)]
                base = ".".join([*here, base] if base else here)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in MODULES else base)
    return found


IMPORTS = {
    name: imported_by(name, tree, is_package=MODULES[name].name == "__init__.py") for name, tree in TREES.items()
}


def ours(module: str) -> set[str]:
    return {name for name in IMPORTS[module] if name.split(".")[0] == "kernel"}


def part_of(module: str) -> str:
    """`kernel.core.loop` -> `core`; `kernel.boot` -> `boot`; `kernel` -> ``."""
    return ".".join(module.split(".")[1:2])


def test_the_reader_of_imports_resolves_what_python_would() -> None:
    source = """
import os.path, outcome
from typing import TYPE_CHECKING
from . import errors
from .task import Task
from ..drivers import clock
if TYPE_CHECKING:
    from ..boot import run
else:
    from .ports import READ
def late():
    from kernel.testing import MockClock
"""
    found = imported_by("kernel.core.invented", ast.parse(source), is_package=False)
    assert found == {
        "os.path", "outcome", "typing", "kernel.core.errors", "kernel.core.task", "kernel.drivers.clock",
        "kernel.core.ports", "kernel.testing",
    }  # fmt: skip
    assert imported_by("kernel", ast.parse("from .boot import run"), is_package=True) == {"kernel.boot"}


def test_every_name_imported_from_the_package_is_a_module_that_exists() -> None:
    for module in MODULES:
        assert ours(module) <= set(MODULES), module


def test_the_core_imports_nothing_else_of_the_package() -> None:
    for module in MODULES:
        if part_of(module) == "core":
            assert {part_of(name) for name in ours(module)} <= {"core"}, module


def test_drivers_import_the_core_and_not_each_other() -> None:
    for module in MODULES:
        if part_of(module) == "drivers":
            assert {part_of(name) for name in ours(module)} <= {"core"}, module


def test_only_boot_names_both_the_core_and_the_drivers() -> None:
    naming_drivers = {module for module in MODULES if "drivers" in {part_of(name) for name in ours(module)}}
    assert naming_drivers == {"kernel.boot"}


def test_only_the_front_doors_import_boot() -> None:
    importing_boot = {module for module in MODULES if "kernel.boot" in ours(module)}
    # `run` is what starts a program, or a test.
    assert importing_boot == {
        "kernel", "kernel.guest", "kernel.integrations.phases", "kernel.lowlevel", "kernel.testing.decorate",
        "kernel.testing.explore",
    }  # fmt: skip


def test_no_module_imports_the_front_doors() -> None:
    for module in MODULES:
        assert "kernel" not in ours(module), module
        if module != "kernel":
            assert "kernel.lowlevel" not in ours(module), module


def test_there_is_no_import_cycle() -> None:
    # A `from .x import y` in a package's own __init__ is how packages are made; the package is no module of its own.
    graph = {module: ours(module) - {module} for module in MODULES}
    list(TopologicalSorter(graph).static_order())  # CycleError names the cycle


def test_a_cycle_would_be_found() -> None:
    with pytest.raises(ValueError, match="cycle"):
        list(TopologicalSorter({"kernel.a": {"kernel.b"}, "kernel.b": {"kernel.a"}}).static_order())


def test_the_only_foreign_packages_imported_are_outcome_and_sortedcontainers() -> None:
    """But for what is there when it is needed (pytest, hypothesis), and for `idna`, without which there is an error."""
    extras = {"kernel.net.resolve": {"idna"}, "kernel.testing.strategies": {"hypothesis"}}
    for module in MODULES:
        tops = {name.split(".")[0] for name in IMPORTS[module]} - set(sys.stdlib_module_names) - {"kernel"}
        allowed = {"outcome", "sortedcontainers"} | extras.get(module, set())
        if module.startswith("kernel.integrations."):
            allowed |= {"pytest", "_pytest"}
        assert tops <= allowed, module


def test_the_core_can_be_read_in_one_sitting() -> None:
    lines = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in (PACKAGE / "core").glob("*.py")}
    assert sum(lines.values()) < 2000, lines


def test_the_core_names_all_its_modules_in_its_reading_order() -> None:
    order = (ast.get_docstring(TREES["kernel.core"]) or "").split("\n\n")[-1].rstrip(".").split(", ")
    assert sorted(order) == sorted(name.rpartition(".")[2] for name in MODULES if name.startswith("kernel.core."))


# ---- bare yields ------------------------------------------------------------------------------------

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST, owner: ast.ClassDef | None = None) -> Iterator[tuple[ast.ClassDef | None, Function]]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, Function):
            yield owner, child
        yield from functions(child, child if isinstance(child, ast.ClassDef) else owner)


def own_yields(function: Function) -> list[ast.Yield]:
    """The bare yields of this function, without those of functions inside it and those that can't be reached."""
    found: list[ast.Yield] = []

    def walk(node: ast.AST) -> None:
        if isinstance(node, Function | ast.Lambda | ast.ClassDef):
            return
        if isinstance(node, ast.Yield):
            found.append(node)
        for _, value in ast.iter_fields(node):
            block(value if isinstance(value, list) else [value])

    def block(nodes: list[ast.AST]) -> None:
        for node in nodes:
            if isinstance(node, ast.AST):
                walk(node)
            if isinstance(node, ast.Return | ast.Raise):
                break  # what follows only makes the function a generator

    block(list(function.body))
    return found


def traps_of(tree: ast.AST) -> set[str]:
    """Classes of this file that say themselves how they are taken back."""
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(isinstance(f, Function) and f.name == "abort" for f in node.body)
    }


def derived_from(traps: set[str], trees: Iterable[ast.AST]) -> set[str]:
    """`traps`, and all classes of `trees` with one of them among their ancestors. By name, generic or not."""
    found = set(traps)
    for _ in range(10):  # longer lines of descent would be a finding of their own
        for tree in trees:
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    bases = {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases}
                    if bases & found:
                        found.add(node.name)
    return found


def iterates_over_data(function: Function) -> bool:
    """Declared as an iterator: its yields go to a `for` of the package and never to the kernel."""
    return function.returns is not None and ast.unparse(function.returns).startswith(("Iterator[", "AsyncIterator["))


SOCKET_TRAPS = {"_readable", "_writable"}
"""Where a socket has its two traps, for all its life: `yield from` would cost a generator for each wait."""


def is_own_trap(owner: ast.ClassDef | None, value: ast.expr | None, traps: set[str]) -> bool:
    """`yield self` in a trap, `yield SomeTrap(...)` of a trap that lives in the same file, or one of a socket's two."""
    if isinstance(value, ast.Attribute):
        return value.attr in SOCKET_TRAPS
    if isinstance(value, ast.Name) and value.id == "self":
        return owner is not None and owner.name in traps
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in traps


def test_only_traps_py_yields_to_the_kernel_save_for_traps_beside_what_they_wait_for() -> None:
    strangers = []
    everywhere = derived_from({name for tree in TREES.values() for name in traps_of(tree)}, TREES.values())
    for module, tree in TREES.items():
        if module == "kernel.core.traps":
            continue
        traps = everywhere & {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        for owner, function in functions(tree):
            if not iterates_over_data(function):
                if (module, function.name) == ("kernel.rescheduling", "reattach_detached_coroutine_object"):
                    continue  # its yield goes to another kernel than ours
                strangers += [
                    f"{module}.{function.name}:{node.lineno}"
                    for node in own_yields(function)
                    if not is_own_trap(owner, node.value, traps)
                ]
    assert strangers == []


def test_the_search_for_bare_yields_finds_them() -> None:
    tree = ast.parse(
        """
class Lot:
    def abort(self): ...
    def park(self): yield self
class Other:
    def park(self): yield self
class Line(core.Lot[int]):
    pass
def stray():
    if x:
        yield None
def late():
    return 1
    yield
def trap(): yield Lot()
def outer():
    def inner(): yield 1
"""
    )
    traps = traps_of(tree)
    assert derived_from(traps, [tree]) == {"Lot", "Line"}
    found = {
        (owner.name if owner else None, function.name): [
            is_own_trap(owner, y.value, traps) for y in own_yields(function)
        ]
        for owner, function in functions(tree)
    }
    assert found == {
        ("Lot", "abort"): [], ("Lot", "park"): [True], ("Other", "park"): [False], (None, "stray"): [False],
        (None, "late"): [], (None, "trap"): [True], (None, "outer"): [], (None, "inner"): [False],
    }  # fmt: skip


def test_every_yield_in_traps_py_is_in_an_operation_or_in_the_trap_itself() -> None:
    for _, function in functions(TREES["kernel.core.traps"]):
        if own_yields(function):
            marks = [ast.unparse(mark) for mark in function.decorator_list]
            assert marks == ["operation"] or function.name == "__iter__", function.name


def test_the_loop_knows_no_trap_by_name() -> None:
    traps = traps_of(TREES["kernel.core.traps"])
    named = {node.id for node in ast.walk(TREES["kernel.core.loop"]) if isinstance(node, ast.Name)}
    assert "kernel.core.traps" not in ours("kernel.core.loop")
    assert not named & traps
