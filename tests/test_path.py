"""Path: all that `pathlib.Path` has, with the same results and errors, in a thread."""

from __future__ import annotations

import ast
import copy
import inspect
import os
import pathlib
import pickle
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any

import pytest

import kernel
from kernel import Path, PosixPath, WindowsPath
from kernel import path as module
from kernel.files import AsyncFile

posix = pytest.mark.skipif(os.name != "posix", reason="the system's paths are others")
since_3_12 = pytest.mark.skipif(sys.version_info < (3, 12), reason="pathlib has it since 3.12")


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


PLAIN = public(PurePath) | {"as_uri", "from_uri"}
"""They look at the name only."""


def stubs() -> set[str]:
    """The methods that the source names under `if TYPE_CHECKING`, for the Python that runs."""

    def names(body: list[ast.stmt]) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef):
                yield node.name
            elif isinstance(node, ast.If) and eval(ast.unparse(node.test), {"sys": sys}):
                yield from names(node.body)

    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "Path":
            (block,) = (
                sub for sub in node.body if isinstance(sub, ast.If) and ast.unparse(sub.test) == "TYPE_CHECKING"
            )
            return set(names(block.body))
    raise AssertionError("no class Path")


# ---- nothing is missing --------------------------------------------------------------------------------


def test_all_that_pathlib_has_is_here() -> None:
    assert public(pathlib.Path) <= public(Path)
    assert public(Path) <= public(pathlib.Path)


def test_what_touches_the_disk_is_an_operation_and_nothing_else_is() -> None:
    operations = set()
    for name in public(Path):
        function = inspect.getattr_static(Path, name)
        function = getattr(function, "__func__", function)
        code = getattr(function, "__code__", None)
        if code is not None and code.co_flags & inspect.CO_ITERABLE_COROUTINE:
            operations.add(name)
    assert operations == public(pathlib.Path) - PLAIN


def test_the_stubs_name_what_is_there_on_this_python() -> None:
    assert stubs() == public(pathlib.Path) - public(PurePath)


@pytest.mark.parametrize("name", sorted(public(pathlib.Path) - PLAIN))
def test_signature_and_help_are_pathlibs(name: str) -> None:
    ours, theirs = getattr(Path, name), getattr(pathlib.Path, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert ours.__name__ == name
    assert ours.__qualname__ == f"Path.{name}"
    assert ours.__doc__.startswith(f"As `pathlib.Path.{name}`, in a thread.")
    assert (inspect.getdoc(theirs) or "") in ours.__doc__


def test_a_property_of_a_newer_python_is_passed_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """`info` of 3.14, which no older one has."""
    monkeypatch.setattr(pathlib.Path, "later", property(lambda self: (type(self), str(self))), raising=False)
    module._take_over()
    try:
        assert Path("a").later == (type(pathlib.Path()), "a")  # type: ignore[attr-defined]
    finally:
        del Path.later  # type: ignore[attr-defined]


# ---- every one of them works ---------------------------------------------------------------------------


CALLS: dict[str, Callable[[pathlib.Path], tuple[Any, ...]]] = {
    "chmod": lambda path: (0o600,),
    "resolve": lambda path: (True,),
    "samefile": lambda path: (path,),
    "write_bytes": lambda path: (b"abc",),
    "write_text": lambda path: ("abc",),
}
"""How to call each on a path that is a file with three bytes. For most of them, with nothing."""

ELSEWHERE = {
    *("glob", "hardlink_to", "iterdir", "lchmod", "link_to", "mkdir", "open", "readlink", "rename", "replace", "rglob"),
    *("rmdir", "symlink_to", "unlink", "walk"),
}
"""These have tests of their own, below."""


def plain(value: Any) -> Any:
    """A path of ours as one of `pathlib`'s."""
    return pathlib.Path(value) if isinstance(value, Path) else value


@pytest.mark.parametrize("name", sorted(public(pathlib.Path) - PLAIN - ELSEWHERE))
def test_it_returns_what_pathlib_returns(name: str, tmp_path: pathlib.Path) -> None:
    theirs = tmp_path / "file"
    theirs.write_bytes(b"abc")
    arguments = CALLS[name](theirs) if name in CALLS else ()

    async def main() -> Any:
        ours = Path(theirs)
        result = await getattr(ours, name)(*[Path(a) if isinstance(a, PurePath) else a for a in arguments])
        assert not isinstance(result, pathlib.Path)
        assert not isinstance(result, PurePath) or type(result) is type(ours)
        return plain(result)

    expected = getattr(theirs, name)(*arguments)
    got = kernel.run(main)
    if isinstance(expected, os.stat_result):
        got, expected = (got.st_ino, got.st_size), (expected.st_ino, expected.st_size)
    assert got == expected


def test_directories_come_and_go(tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        top = Path(tmp_path) / "top"
        await top.mkdir()
        await (top / "a" / "b").mkdir(parents=True, exist_ok=True)
        await (top / "a" / "file.txt").write_text("x", encoding="ascii")
        found = await top.iterdir()
        assert found == [top / "a"]
        assert [type(path) for path in found] == [type(top)]
        assert await top.glob("*/*.txt") == [top / "a" / "file.txt"]
        assert sorted(await top.rglob("*")) == [top / "a", top / "a" / "b", top / "a" / "file.txt"]
        await (top / "a" / "file.txt").unlink()
        await (top / "a" / "file.txt").unlink(missing_ok=True)
        for path in (top / "a" / "b", top / "a", top):
            await path.rmdir()
        assert not await top.exists()

    kernel.run(main)


@since_3_12
def test_walk_gives_a_list_of_paths_of_ours_and_of_names(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").touch()
    errors: list[OSError] = []

    async def main() -> None:
        top = Path(tmp_path)
        walked = await top.walk()  # type: ignore[attr-defined,unused-ignore]
        assert walked == [(top, ["a"], []), (top / "a", ["b"], ["file"]), (top / "a" / "b", [], [])]
        assert {type(directory) for directory, _, _ in walked} == {type(top)}
        await (top / "missing").walk(on_error=errors.append)  # type: ignore[attr-defined,unused-ignore]

    kernel.run(main)
    assert [type(error) for error in errors] == [FileNotFoundError]


@posix
def test_links_and_names_change(tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        top = Path(tmp_path)
        one, two, three = top / "one", top / "two", top / "three"
        await one.write_bytes(b"1")
        await two.symlink_to(one)
        assert await two.readlink() == one
        assert await two.resolve() == await one.resolve()
        await three.hardlink_to(one)
        assert await three.samefile(one)
        assert await three.samefile(str(two))
        moved = await one.rename(top / "four")
        assert (moved, type(moved)) == (top / "four", type(top))
        await (top / "five").touch()
        assert await moved.replace(target=top / "five") == top / "five"
        assert sorted(path.name for path in await top.iterdir()) == ["five", "three", "two"]

    kernel.run(main)


@posix
def test_lchmod_says_what_pathlib_says(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()

    def outcome(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except NotImplementedError as error:
            return str(error)

    ours = outcome(lambda: kernel.run(Path(tmp_path / "file").lchmod, 0o600))
    assert ours == outcome(lambda: (tmp_path / "file").lchmod(0o600))


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="3.12 has dropped it")
def test_link_to_works_where_pathlib_has_it(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")

    async def main() -> None:
        with pytest.warns(DeprecationWarning, match="link_to"):
            await Path(tmp_path / "file").link_to(tmp_path / "other")  # type: ignore[attr-defined,unused-ignore]

    kernel.run(main)
    assert (tmp_path / "other").read_bytes() == b"abc"


def test_open_gives_a_wrapped_file(tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        path = Path(tmp_path) / "file"
        async with await path.open("w", encoding="utf-8", newline="\n") as file:
            assert isinstance(file, AsyncFile)
            await file.write("ä\n")
        async with await path.open("rb", 0) as raw:
            assert await raw.read() == "ä\n".encode()
        async with await path.open() as file:
            assert [line async for line in file] == ["ä\n"]
        with pytest.raises(FileNotFoundError):
            await (path / "no").parent.with_name("no").open()

    kernel.run(main)


def test_uris_need_no_disk() -> None:
    path = Path("/a b")
    assert path.as_uri() == "file:///a%20b"
    with pytest.raises(ValueError):
        Path("a").as_uri()
    if sys.version_info >= (3, 13):
        made = Path.from_uri("file:///a%20b")
        assert (made, type(made)) == (path, type(path))


def test_all_run_in_a_worker_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    real = os.stat

    def noted(*args: Any, **kwargs: Any) -> os.stat_result:
        threads.append(threading.get_ident())
        return real(*args, **kwargs)

    monkeypatch.setattr(os, "stat", noted)
    kernel.run(Path("/").stat)
    assert threads
    assert threading.get_ident() not in threads


def test_generator_style_works(tmp_path: pathlib.Path) -> None:
    def main() -> Any:
        yield from Path(tmp_path, "file").write_text("x")
        cwd = yield from Path.cwd()
        return (yield from Path(tmp_path, "file").read_text()), cwd

    assert kernel.run(main) == ("x", Path(os.getcwd()))


# ---- a path like any other -----------------------------------------------------------------------------


def test_it_is_of_the_systems_kind() -> None:
    assert type(Path("a")) is (WindowsPath if os.name == "nt" else PosixPath)
    assert isinstance(Path("a"), PurePath)
    assert not isinstance(Path("a"), pathlib.Path)
    assert repr(Path("a", "b")) == f"kernel.Path({os.path.join('a', 'b')!r})"
    assert not hasattr(Path("a"), "__dict__")


def test_it_equals_pathlibs_and_has_its_hash_and_order() -> None:
    ours: Any = Path("a/b")
    theirs: Any = pathlib.Path("a/b")
    assert ours == theirs
    assert theirs == ours
    assert hash(ours) == hash(theirs)
    assert {ours: 1}[theirs] == 1
    assert ours != Path("a/c")
    assert sorted([ours, pathlib.Path("a")]) == [pathlib.Path("a"), ours]
    assert Path(theirs) == ours
    assert pathlib.Path(ours) == theirs


def test_it_can_be_pickled_and_copied() -> None:
    path = Path("a/b")
    copies = [copy.copy(path), copy.deepcopy(path)]
    copies += [pickle.loads(pickle.dumps(path, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    assert copies == [path] * len(copies)
    assert {type(copied) for copied in copies} == {type(path)}


def test_it_is_fit_for_the_standard_library(tmp_path: pathlib.Path) -> None:
    path = Path(tmp_path) / "file"
    with open(path, "w") as file:
        file.write("x")
    assert os.fspath(path) == str(path)
    assert bytes(path) == os.fsencode(path)
    assert os.path.exists(path)


def test_names_are_taken_apart_at_once_and_stay_of_our_kind() -> None:
    path = Path("/a/b.txt")
    derived = [path.parent, path / "c", "z" / Path("y"), path.with_name("c"), path.with_suffix(".py"), *path.parents]
    assert {type(other) for other in derived} == {type(path)}
    assert (path.name, path.suffix, path.stem) == ("b.txt", ".txt", "b")
    assert path.joinpath("c").relative_to("/a") == Path("b.txt/c")


def test_a_subclass_gets_paths_of_its_own_kind(tmp_path: pathlib.Path) -> None:
    class Mine(type(Path())):  # type: ignore[misc]
        __slots__ = ()

    async def main() -> None:
        path = Mine(tmp_path)
        await (path / "file").touch()
        found = [*await path.iterdir(), await path.resolve(), await Mine.cwd(), path.parent]
        assert {type(other) for other in found} == {Mine}

    kernel.run(main)


@since_3_12
def test_a_subclass_of_path_itself_works_and_may_carry_something_along(tmp_path: pathlib.Path) -> None:
    class Labelled(Path):
        def __init__(self, *args: Any, label: str) -> None:
            super().__init__(*args)  # type: ignore[call-arg,unused-ignore]
            self.label = label

        def __new__(cls, *args: Any, label: str) -> Any:
            return super().__new__(cls, *args)

        def with_segments(self, *args: Any) -> Any:
            return Labelled(*args, label=self.label)

    async def main() -> None:
        path: Any = Labelled(tmp_path, label="mine")
        await (path / "file").touch()
        (found,) = await path.iterdir()
        assert (found.name, found.label) == ("file", "mine")

    kernel.run(main)


@posix
def test_windows_paths_can_be_looked_at_elsewhere_and_their_operations_are_refused() -> None:
    path = WindowsPath("c:\\a\\b")
    assert path.parts == ("c:\\", "a", "b")

    async def main() -> None:
        with pytest.raises(NotImplementedError):
            await path.exists()

    kernel.run(main)


# ---- errors and cancellation ---------------------------------------------------------------------------


def test_errors_are_the_systems_and_show_where_they_come_from(tmp_path: pathlib.Path) -> None:
    missing = tmp_path / "missing"

    async def asks_for_it() -> None:
        await Path(missing).stat()

    with pytest.raises(FileNotFoundError) as caught:
        kernel.run(asks_for_it)
    assert caught.value.filename == str(missing) or caught.value.filename == missing
    assert caught.value.__cause__ is caught.value.__context__ is None
    functions = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "asks_for_it" in functions
    assert "stat" in functions

    async def wrong_arguments() -> None:
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            await Path(missing).stat(nonsense=1)  # type: ignore[call-arg]

    kernel.run(wrong_arguments)


def test_a_cancelled_operation_did_nothing(tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        path = Path(tmp_path) / "file"
        with kernel.CancelScope() as scope:
            scope.cancel()
            await path.touch()
        assert scope.cancelled_caught
        assert not (tmp_path / "file").exists()
        with kernel.CancelScope() as scope:
            scope.cancel()
            await Path.cwd()
        assert scope.cancelled_caught

    kernel.run(main)


@posix
def test_an_operation_that_has_begun_is_done_and_the_cancellation_comes_after_it(tmp_path: pathlib.Path) -> None:
    """A named pipe holds up who opens it, until the other side is there."""
    os.mkfifo(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    got: list[Any] = []

    async def reader() -> None:
        got.append(await Path(tmp_path, "pipe").read_bytes())
        await kernel.lowlevel.checkpoint()
        got.append("not reached")

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(reader)
            await kernel.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            with kernel.CancelScope(shield=True):
                await Path(tmp_path, "pipe").write_bytes(b"abc")

    kernel.run(main)
    assert got == [b"abc"]
