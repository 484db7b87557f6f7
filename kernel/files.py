"""Files, whose every operation may block, in worker threads.

    async with await open_file("log.txt") as file:
        async for line in file:
            ...

No system reports a regular file as "ready": reading one takes as long as the disk takes, and epoll refuses it. So a
wrapped file does each operation in a thread, through `to_thread.run_sync`: a method that may block is an operation of
the same name, and what cannot block is passed through. That costs some 10 us each time; read and write much at a time.

A file is not meant for two tasks at once, no more than Python's own is for two threads.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial, wraps
from typing import IO, TYPE_CHECKING, Any, AnyStr, Final, Generic, Literal, Protocol, overload

from .abc import AsyncResource
from .core.scopes import CancelScope
from .core.traps import Operation, checkpoint_if_cancelled, operation
from .to_thread import run_sync

__all__ = ["AsyncFile", "open_file", "temporary_directory", "temporary_file", "wrap_file"]

_PASSED_THROUGH: Final = frozenset(
    (
        "buffer", "closed", "closefd", "encoding", "errors", "fileno", "getbuffer", "getvalue", "isatty",
        "line_buffering", "mode", "name", "newlines", "raw", "readable", "seekable", "writable", "write_through",
    )
)  # fmt: skip
_IN_A_THREAD: Final = frozenset(
    (
        "flush", "peek", "read", "read1", "readall", "readinto", "readinto1", "readline", "readlines", "reconfigure",
        "rollover", "seek", "tell", "truncate", "write", "writelines",
    )
)  # fmt: skip


class AsyncFile(AsyncResource, Generic[AnyStr]):
    """A file whose blocking methods are operations. Made by `open_file` and `wrap_file`.

    It has the methods that the wrapped file has: `hasattr` says which. `close` is called `aclose`, and `async with`
    does it. Each method is a cancel point before it begins; once begun, it is not interrupted, so that the position in
    the file is known.
    """

    def __init__(self, file: IO[AnyStr]) -> None:
        self._wrapped: Any = file

    @property
    def wrapped(self) -> IO[AnyStr]:
        """The file underneath."""
        file: IO[AnyStr] = self._wrapped
        return file

    def __getattr__(self, name: str) -> Any:
        if name in _PASSED_THROUGH:
            return getattr(self._wrapped, name)
        if name in _IN_A_THREAD:
            method = _in_a_thread(getattr(self._wrapped, name))
            setattr(self, name, method)  # found without us from now on
            return method
        hint = ", it is aclose() here" if name == "close" else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    def __dir__(self) -> Iterable[str]:
        offered: Iterable[str] = _PASSED_THROUGH | _IN_A_THREAD
        return [*super().__dir__(), *(attribute for attribute in offered if hasattr(self._wrapped, attribute))]

    @operation
    def aclose(self) -> Generator[Any, Any, None]:
        """Close the file, in any case: what is buffered is written even if the task is cancelled, which it sees then.

        Always a cancel point, after the file was closed.
        """
        with CancelScope(shield=True):
            yield from run_sync(self._wrapped.close)
        yield from checkpoint_if_cancelled()

    @operation
    def detach(self) -> Generator[Any, Any, AsyncFile[Any]]:
        """As the method of buffered and text files: separate the file beneath, and return it, wrapped."""
        return wrap_file((yield from run_sync(self._wrapped.detach)))

    def __aiter__(self) -> AsyncFile[AnyStr]:
        return self

    @operation
    def __anext__(self) -> Generator[Any, Any, AnyStr]:
        line: AnyStr = yield from run_sync(self._wrapped.readline)
        if not line:
            raise StopAsyncIteration
        return line

    def __repr__(self) -> str:
        return f"<AsyncFile of {self._wrapped!r}>"

    if TYPE_CHECKING:
        closed: bool
        encoding: str
        errors: str | None
        mode: str
        name: Any
        newlines: str | tuple[str, ...] | None

        def fileno(self) -> int: ...
        def isatty(self) -> bool: ...
        def readable(self) -> bool: ...
        def seekable(self) -> bool: ...
        def writable(self) -> bool: ...
        def flush(self) -> Operation[None]: ...
        def peek(self, size: int = ..., /) -> Operation[bytes]: ...
        def read(self, size: int | None = ..., /) -> Operation[AnyStr]: ...
        def read1(self, size: int = ..., /) -> Operation[bytes]: ...
        def readall(self) -> Operation[bytes]: ...
        def readinto(self, buffer: Any, /) -> Operation[int]: ...
        def readinto1(self, buffer: Any, /) -> Operation[int]: ...
        def readline(self, size: int = ..., /) -> Operation[AnyStr]: ...
        def readlines(self, hint: int = ..., /) -> Operation[list[AnyStr]]: ...
        def seek(self, offset: int, whence: int = ..., /) -> Operation[int]: ...
        def tell(self) -> Operation[int]: ...
        def truncate(self, size: int | None = ..., /) -> Operation[int]: ...
        def write(self, data: AnyStr, /) -> Operation[int]: ...
        def writelines(self, lines: Iterable[AnyStr], /) -> Operation[None]: ...


def _in_a_thread(method: Callable[..., Any]) -> Callable[..., Operation[Any]]:
    @operation
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        return (yield from run_sync(partial(method, *args, **kwargs)))

    return call


class _HasClose(Protocol):
    def close(self) -> object: ...


@overload
def wrap_file(file: IO[AnyStr]) -> AsyncFile[AnyStr]: ...
@overload
def wrap_file(file: _HasClose) -> AsyncFile[Any]: ...
def wrap_file(file: Any) -> AsyncFile[Any]:
    """Wrap an open file object, so that its blocking methods are operations. Not a checkpoint.

    Raises TypeError if `file` has no `close`, and neither `read` nor `write`.
    """
    if not hasattr(file, "close") or not (hasattr(file, "read") or hasattr(file, "write")):
        raise TypeError(f"wrap_file() wants an open file, not {file!r}. To open one, use open_file().")
    return AsyncFile(file)


OpenTextMode = Literal["r", "rt", "r+", "w", "wt", "w+", "a", "at", "a+", "x", "xt", "x+"]
OpenBinaryMode = Literal[
    "rb", "br", "r+b", "rb+", "wb", "bw", "w+b", "wb+", "ab", "ba", "a+b", "ab+", "xb", "x+b", "xb+"
]
FilePath = int | str | bytes | os.PathLike[str] | os.PathLike[bytes]


@overload
def open_file(
    file: FilePath, mode: OpenTextMode = "r", buffering: int = -1, encoding: str | None = None,
    errors: str | None = None, newline: str | None = None, closefd: bool = True,
    opener: Callable[[str, int], int] | None = None,
) -> Operation[AsyncFile[str]]: ...  # fmt: skip
@overload
def open_file(
    file: FilePath, mode: OpenBinaryMode, buffering: int = -1, encoding: None = None, errors: None = None,
    newline: None = None, closefd: bool = True, opener: Callable[[str, int], int] | None = None,
) -> Operation[AsyncFile[bytes]]: ...  # fmt: skip
@overload
def open_file(file: FilePath, mode: str, *args: Any, **kwargs: Any) -> Operation[AsyncFile[Any]]: ...
@operation
def open_file(
    file: FilePath,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Callable[[str, int], int] | None = None,
) -> Generator[Any, Any, AsyncFile[Any]]:
    """Open a file, as the built-in `open` does with the same arguments, in a thread; return it wrapped.

    Always a cancel point, before the file is opened, and then it was not; always a schedule point. Errors are those of
    `open`. Opening a named pipe waits for the other side, as it does there, and a cancellation waits with it.
    """
    opened = yield from run_sync(io.open, file, mode, buffering, encoding, errors, newline, closefd, opener)
    return wrap_file(opened)


@overload
def temporary_file(mode: OpenTextMode, **options: Any) -> AbstractAsyncContextManager[AsyncFile[str]]: ...
@overload
def temporary_file(mode: OpenBinaryMode = "w+b", **options: Any) -> AbstractAsyncContextManager[AsyncFile[bytes]]: ...
@overload
def temporary_file(mode: str, **options: Any) -> AbstractAsyncContextManager[AsyncFile[Any]]: ...
@asynccontextmanager
async def temporary_file(mode: str = "w+b", **options: Any) -> AsyncIterator[AsyncFile[Any]]:
    """`async with temporary_file() as file:` a file, wrapped, that is gone after the block.

    Arguments and errors are those of `tempfile.NamedTemporaryFile`; `file.name` is its path. Entering is a cancel point
    before the file is made. Leaving removes it in any case; without an error it is a cancel point after that.
    """
    async with wrap_file(await run_sync(partial(tempfile.NamedTemporaryFile, mode, **options))) as file:
        yield file


@asynccontextmanager
async def temporary_directory(**options: Any) -> AsyncIterator[str]:
    """`async with temporary_directory() as path:` a directory that is gone after the block, with all that is in it.

    `path` is a str. Arguments and errors are those of `tempfile.TemporaryDirectory`. Otherwise as `temporary_file`.
    """
    directory = await run_sync(partial(tempfile.TemporaryDirectory, **options))
    try:
        yield directory.name
    finally:
        with CancelScope(shield=True):
            await run_sync(directory.cleanup)
    await checkpoint_if_cancelled()
