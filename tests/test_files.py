"""Files in threads: what is passed through, what becomes an operation, and what is left after a cancellation."""

from __future__ import annotations

import inspect
import io
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import kernel
from kernel import open_file, temporary_directory, temporary_file, wrap_file
from kernel.files import _IN_A_THREAD, _PASSED_THROUGH, AsyncFile
from kernel.lowlevel import checkpoint
from kernel.testing import wait_all_tasks_blocked


class Held:
    """A function that is stuck in its thread until the test says so."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.result: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.begun.set()
        assert self.go_on.wait(10)
        self.result = self._function(*args, **kwargs)
        return self.result


async def cancel_in_the_midst(held: Held, scope: kernel.CancelScope) -> None:
    """Cancel once the function has begun; let it go on only after that."""
    await wait_all_tasks_blocked()
    assert held.begun.wait(10)
    scope.cancel()
    held.go_on.set()


# ---- opening, reading, writing ---------------------------------------------------------------------------


def test_text_goes_in_and_comes_out(tmp_path: Path) -> None:
    async def main() -> None:
        async with await open_file(tmp_path / "f", "w", encoding="utf-16", newline="\r\n") as file:
            assert await file.write("eins\nzwei\n") == 10
            await file.writelines(["drei\n", "vier"])
        async with await open_file(tmp_path / "f", encoding="utf-16") as file:
            assert await file.readline() == "eins\n"
            assert await file.read(3) == "zwe"
            assert await file.readlines() == ["i\n", "drei\n", "vier"]
            assert await file.read() == ""
        assert (tmp_path / "f").read_bytes().decode("utf-16") == "eins\r\nzwei\r\ndrei\r\nvier"

    kernel.run(main)


def test_bytes_go_in_and_come_out(tmp_path: Path) -> None:
    async def main() -> None:
        async with await open_file(tmp_path / "f", "w+b") as file:
            await file.write(b"0123456789")
            assert await file.tell() == 10
            assert await file.seek(-4, os.SEEK_END) == 6
            assert await file.peek(1) == b"6789"
            assert await file.read1(2) == b"67"
            buffer = bytearray(2)
            assert await file.readinto(buffer) == 2
            assert buffer == b"89"
            assert await file.truncate(3) == 3
            await file.flush()
            assert (tmp_path / "f").read_bytes() == b"012"
        async with await open_file(tmp_path / "f", "rb", buffering=0) as file:
            assert await file.readall() == b"012"

    kernel.run(main)


def test_async_for_gives_the_lines_up_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("a\n\nb")

    async def main() -> None:
        async with await open_file(tmp_path / "f") as file:
            assert [line async for line in file] == ["a\n", "\n", "b"]
        async with await open_file(tmp_path / "f", "rb") as raw:
            assert [line async for line in raw] == [b"a\n", b"\n", b"b"]

    kernel.run(main)


def test_open_file_has_the_arguments_of_open(tmp_path: Path) -> None:
    builtin = inspect.signature(io.open).parameters
    ours = inspect.signature(open_file).parameters
    assert list(ours) == list(builtin)
    assert [p.default for p in ours.values()] == [p.default for p in builtin.values()]
    opened: list[Any] = []

    def opener(path: str, flags: int) -> int:
        opened.append(path)
        return os.open(path, flags)

    async def main() -> None:
        fd = os.open(tmp_path / "f", os.O_CREAT | os.O_RDWR)
        async with await open_file(fd, "wb", closefd=False):
            pass
        os.close(fd)
        async with await open_file(bytes(tmp_path / "f"), "rb", -1, None, None, None, True, opener) as file:
            assert file.mode == "rb"

    kernel.run(main)
    assert opened == [bytes(tmp_path / "f")]


def test_errors_are_the_systems_and_show_where_they_come_from(tmp_path: Path) -> None:
    async def opens_it() -> None:
        await open_file(tmp_path / "missing")

    with pytest.raises(FileNotFoundError) as caught:
        kernel.run(opens_it)
    assert caught.value.filename == str(tmp_path / "missing")
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert "opens_it" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]

    async def misuses_it() -> None:
        async with await open_file(tmp_path / "f", "w") as file:
            with pytest.raises(io.UnsupportedOperation):
                await file.read()
            with pytest.raises(TypeError):
                await file.write(b"bytes")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="closed file"):
            await file.write("too late")
        with pytest.raises(ValueError, match="invalid mode"):
            await open_file(tmp_path / "f", "nonsense")

    kernel.run(misuses_it)


def test_each_method_runs_in_a_worker_thread_and_in_its_context() -> None:
    threads: list[int] = []

    class File(io.StringIO):
        def read(self, size: int | None = -1) -> str:
            threads.append(threading.get_ident())
            return super().read(size)

    async def main() -> None:
        assert await wrap_file(File("abc")).read(2) == "ab"

    kernel.run(main)
    assert threads
    assert threading.get_ident() not in threads


def test_generator_style_works(tmp_path: Path) -> None:
    def main() -> Any:
        file = yield from open_file(tmp_path / "f", "w+")
        yield from file.write("a\nb\n")
        yield from file.seek(0)
        first = yield from file.__anext__()
        yield from file.aclose()
        return first, file.closed

    assert kernel.run(main) == ("a\n", True)


# ---- the wrapper -----------------------------------------------------------------------------------------


def public(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


@pytest.mark.parametrize("mode", ["r", "rb", "wb", "r+b", "unbuffered", "StringIO", "BytesIO"])
def test_the_wrapper_has_what_the_file_has(mode: str, tmp_path: Path) -> None:
    """But for `close`, which is `aclose`; what nobody should use; and what only a program that sends fds needs."""
    (tmp_path / "f").touch()
    kinds: dict[str, Any] = {"StringIO": io.StringIO, "BytesIO": io.BytesIO, "unbuffered": partial(open, mode="rb")}
    arguments = {} if mode.endswith("IO") else {"file": tmp_path / "f", "buffering": 0 if mode == "unbuffered" else -1}
    with kinds.get(mode, partial(open, mode=mode))(**arguments) as file:
        wrapped = wrap_file(file)
        of_the_file = {name for name in public(file) if hasattr(file, name)} - {"close"}
        assert public(wrapped) == of_the_file | {"aclose", "wrapped", "detach"}
        for name in of_the_file - {"detach"}:
            assert hasattr(wrapped, name)
            assert name in _PASSED_THROUGH | _IN_A_THREAD
        for name in (_PASSED_THROUGH | _IN_A_THREAD) - of_the_file:
            assert not hasattr(wrapped, name)


def test_what_cannot_block_is_passed_through(tmp_path: Path) -> None:
    with open(tmp_path / "f", "w", encoding="ascii", errors="replace", newline="\n") as file:
        wrapped = wrap_file(file)
        assert wrapped.wrapped is file
        assert wrapped.name is file.name
        assert (wrapped.mode, wrapped.encoding, wrapped.errors) == ("w", "ascii", "replace")
        assert wrapped.fileno() == file.fileno()
        assert (wrapped.readable(), wrapped.writable(), wrapped.seekable()) == (False, True, True)
        assert wrapped.isatty() is wrapped.closed is False
        assert repr(wrapped) == f"<AsyncFile of {file!r}>"
    assert wrapped.closed is True


def test_methods_have_the_names_and_signatures_of_the_files() -> None:
    file = io.BytesIO()
    wrapped = wrap_file(file)
    assert inspect.signature(wrapped.read) == inspect.signature(file.read)
    assert wrapped.read.__name__ == "read"
    assert wrapped.read.__doc__ == file.read.__doc__
    assert wrapped.read is wrapped.read

    async def main() -> None:
        with pytest.raises(TypeError):
            await wrapped.read(limiter=None)  # type: ignore[call-arg]

    kernel.run(main)


def test_close_is_called_aclose_here() -> None:
    wrapped: Any = wrap_file(io.BytesIO())
    with pytest.raises(AttributeError, match=r"'AsyncFile' object has no attribute 'close', it is aclose\(\) here"):
        wrapped.close()
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'$"):
        wrapped.nonsense
    with pytest.raises(AttributeError):
        wrapped.encoding


@pytest.mark.parametrize("thing", [None, "f", Path("f"), object(), 3])
def test_what_is_no_file_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"wants an open file.*use open_file\(\)"):
        wrap_file(thing)


def test_what_is_something_like_a_file_is_accepted() -> None:
    class Sink:
        closed_with = None

        def write(self, data: str) -> int:
            return len(data)

        def close(self) -> None:
            self.closed_with = threading.get_ident()

    sink = Sink()

    async def main() -> None:
        async with wrap_file(sink) as file:
            assert await file.write("abc") == 3
            assert not hasattr(file, "read")

    kernel.run(main)
    assert sink.closed_with not in (None, threading.get_ident())


def test_detach_separates_and_wraps_the_file_beneath(tmp_path: Path) -> None:
    async def main() -> None:
        text = await open_file(tmp_path / "f", "w")
        await text.write("abc")
        binary = await text.detach()
        assert isinstance(binary, AsyncFile)
        assert isinstance(binary.wrapped, io.BufferedWriter)
        await binary.write(b"def")
        await binary.aclose()
        assert (tmp_path / "f").read_bytes() == b"abcdef"
        with pytest.raises(ValueError, match="detached"):
            await text.write("more")

    kernel.run(main)


# ---- cancellation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["read", "readline", "readlines", "seek", "tell", "__anext__"])
def test_in_a_cancelled_scope_a_method_does_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("abc\n" * 3)

    async def main() -> None:
        async with await open_file(tmp_path / "f", "rb") as file:
            with kernel.CancelScope() as scope:
                scope.cancel()
                await getattr(file, name)(*[2] if name == "seek" else [])
            assert scope.cancelled_caught
            assert await file.tell() == 0

    kernel.run(main)


def test_opening_in_a_cancelled_scope_opens_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        with kernel.CancelScope() as scope:
            scope.cancel()
            await open_file(tmp_path / "f", "w")
        assert scope.cancelled_caught
        assert not (tmp_path / "f").exists()

    kernel.run(main)


def test_an_open_that_is_cancelled_while_it_goes_on_leaks_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file arrives all the same, and its block closes it. (The fixture of all tests counts descriptors.)"""
    held = Held(io.open)
    monkeypatch.setattr(io, "open", held)
    log: list[str] = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            with kernel.CancelScope() as scope:
                nursery.start_soon(cancel_in_the_midst, held, scope)
                async with await open_file(tmp_path / "f", "w") as file:
                    log.append("opened")
                    await file.write("x")
                    log.append("not reached")
            assert scope.cancelled_caught
            assert file.closed

    kernel.run(main)
    assert log == ["opened"]
    assert held.result.closed


def test_closing_under_cancellation_writes_what_is_buffered_and_is_cancelled_then(tmp_path: Path) -> None:
    log: list[str] = []

    async def main() -> None:
        with kernel.CancelScope() as scope:
            file = await open_file(tmp_path / "f", "w")
            await file.write("kept")
            scope.cancel()
            try:
                await file.aclose()
            except kernel.Cancelled:
                log.append("cancelled")
                raise
            finally:
                assert file.closed
        assert (tmp_path / "f").read_text() == "kept"

    kernel.run(main)
    assert log == ["cancelled"]


def test_the_cancellation_of_a_close_does_not_replace_an_error(tmp_path: Path) -> None:
    async def main() -> None:
        with kernel.CancelScope() as scope:
            async with await open_file(tmp_path / "f", "w"):
                scope.cancel()
                raise LookupError

    with pytest.raises(LookupError):
        kernel.run(main)


def test_closing_twice_does_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        file = await open_file(tmp_path / "f", "w")
        await file.aclose()
        await file.aclose()
        assert file.closed

    kernel.run(main)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full disk at hand")
def test_a_close_that_cannot_write_says_so_and_closes() -> None:
    async def main() -> None:
        file = await open_file("/dev/full", "w")
        await file.write("no room")
        with pytest.raises(OSError, match="No space left"):
            await file.aclose()
        assert file.closed

    kernel.run(main)


def test_a_read_that_has_begun_is_not_torn_and_the_others_go_on_meanwhile() -> None:
    read, write = os.pipe()
    log: list[Any] = []

    async def reader(file: AsyncFile[bytes]) -> None:
        log.append(await file.read())
        await checkpoint()
        log.append("not reached")

    async def main() -> None:
        async with await open_file(read, "rb") as file, kernel.open_nursery() as nursery:
            nursery.start_soon(reader, file)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            with kernel.CancelScope(shield=True):
                for _ in range(10):
                    await checkpoint()
            log.append("the others go on")
            os.write(write, b"abc")
            os.close(write)

    kernel.run(main)
    assert log == ["the others go on", b"abc"]


# ---- temporary files and directories ---------------------------------------------------------------------


def test_a_temporary_file_is_there_in_the_block_and_gone_after_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with temporary_file(dir=tmp_path, suffix=".x") as file:
            assert isinstance(file, AsyncFile)
            assert os.listdir(tmp_path) == [os.path.basename(file.name)]
            assert file.name.endswith(".x")
            await file.write(b"abc")
            await file.seek(0)
            assert await file.read() == b"abc"
        assert file.closed
        assert os.listdir(tmp_path) == []
        async with temporary_file("w+", dir=tmp_path, encoding="ascii") as text:
            await text.write("a\nb\n")
            await text.seek(0)
            assert [line async for line in text] == ["a\n", "b\n"]
            await text.aclose()
            assert os.listdir(tmp_path) == []

    kernel.run(main)


def test_a_temporary_directory_is_gone_after_the_block_with_all_that_is_in_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with temporary_directory(dir=tmp_path, prefix="work-") as path:
            assert type(path) is str
            assert os.listdir(tmp_path) == [os.path.basename(path)]
            assert os.path.basename(path).startswith("work-")
            os.mkdir(os.path.join(path, "a"))
            Path(path, "a", "f").touch()
        assert os.listdir(tmp_path) == []

    kernel.run(main)


KINDS = pytest.mark.parametrize("make", [temporary_file, temporary_directory])


@KINDS
@pytest.mark.parametrize("how", ["error", "cancelled", "cancelled at the end"])
def test_it_is_gone_however_the_block_ends(make: Any, how: str, tmp_path: Path) -> None:
    reached: list[str] = []

    async def main() -> None:
        with kernel.CancelScope() as scope:
            async with make(dir=tmp_path):
                assert len(os.listdir(tmp_path)) == 1
                if how != "error":
                    scope.cancel()
                if how == "cancelled":
                    await checkpoint()
                if how == "error":
                    raise LookupError
            reached.append("after")  # leaving is a cancel point
        assert scope.cancelled_caught

    if how == "error":
        with pytest.raises(LookupError):
            kernel.run(main)
    else:
        kernel.run(main)
    assert os.listdir(tmp_path) == []
    assert reached == []


@KINDS
def test_entering_in_a_cancelled_scope_makes_nothing(make: Any, tmp_path: Path) -> None:
    async def main() -> None:
        with kernel.CancelScope() as scope:
            scope.cancel()
            async with make(dir=tmp_path):
                raise AssertionError("it was entered")
        assert scope.cancelled_caught

    kernel.run(main)
    assert os.listdir(tmp_path) == []


@KINDS
def test_cancelled_while_it_is_being_made_it_is_gone_all_the_same(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "NamedTemporaryFile" if make is temporary_file else "TemporaryDirectory"
    held = Held(getattr(tempfile, name))
    monkeypatch.setattr(tempfile, name, held)
    log: list[Any] = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            with kernel.CancelScope() as scope:
                nursery.start_soon(cancel_in_the_midst, held, scope)
                async with make(dir=tmp_path):
                    log.append(len(os.listdir(tmp_path)))
                    await checkpoint()
                    log.append("not reached")
            assert scope.cancelled_caught

    kernel.run(main)
    assert log == [1]
    assert os.listdir(tmp_path) == []


@KINDS
def test_errors_of_making_one_are_tempfiles(make: Any, tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            async with make(dir=tmp_path / "missing"):
                raise AssertionError("it was entered")

    kernel.run(main)


@KINDS
def test_both_work_in_generator_style(make: Any, tmp_path: Path) -> None:
    def body(_: Any) -> Any:
        yield from checkpoint()
        return os.listdir(tmp_path)

    def main() -> Any:
        return (yield from kernel.within(make(dir=tmp_path), body))

    assert len(kernel.run(main)) == 1
    assert os.listdir(tmp_path) == []


# ---- types -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.environ.get("KERNEL_TEST_LONG"), reason="mypy takes seconds; KERNEL_TEST_LONG=1")
def test_types_are_what_they_should_be(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        textwrap.dedent("""
        import io
        import kernel

        async def main(mode: str) -> None:
            async with await kernel.open_file("f") as text:
                reveal_type(await text.read())
                async for line in text:
                    reveal_type(line)
                reveal_type(text.name)
            async with await kernel.open_file("f", "rb") as binary:
                reveal_type(await binary.read(3))
            reveal_type(await kernel.open_file("f", mode))
            reveal_type(kernel.wrap_file(io.StringIO()))
            path = kernel.Path("a") / "b"
            reveal_type(path)
            reveal_type(await path.iterdir())
            reveal_type(await path.open("wb"))
            async with kernel.temporary_file() as file:
                reveal_type(file)
            async with kernel.temporary_file("w") as file_2:
                reveal_type(file_2)
            async with kernel.temporary_directory() as directory:
                reveal_type(directory)
            with kernel.open_signal_receiver(1) as receiver:
                async for number in receiver:
                    reveal_type(number)
        """)
    )
    environment = {**os.environ, "MYPYPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    revealed = [line.partition("Revealed type is ")[2].strip('"') for line in done.stdout.splitlines()]
    assert [kind.replace("builtins.", "").replace("kernel.files.", "") for kind in revealed] == [
        "str", "str", "Any", "bytes", "AsyncFile[Any]", "AsyncFile[str]", "kernel.path.Path", "list[kernel.path.Path]",
        "AsyncFile[bytes]", "AsyncFile[bytes]", "AsyncFile[str]", "str", "int",
    ]  # fmt: skip
