"""`pathlib.Path`, with every method that touches the disk as an operation.

    for entry in await Path("logs").iterdir(): ...
    async with await Path("logs/today").open() as file: ...

What only looks at the name (`parent`, `/`, `suffix`, `with_name`) is inherited from `pathlib.PurePath` and stays a
plain function. All else is taken from `pathlib.Path` by looking at what it has, on whatever Python this is, so nothing
is missing on a newer one. Each such method runs in a thread; those that give an iterator there give a list here, as a
step of an iterator may block too. So `walk` has gone everywhere before you see the first directory, and taking names
out of its lists keeps it from nothing.

The stubs say the same to type checkers, once more and by hand; a test compares them.
"""

from __future__ import annotations

import functools
import inspect
import io
import os
import pathlib
import sys
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self, overload

from .core.traps import Operation, operation
from .files import AsyncFile, OpenBinaryMode, OpenTextMode, wrap_file
from .to_thread import run_sync

__all__ = ["Path", "PosixPath", "WindowsPath"]

_ONLY_NAMES: Final = frozenset({"as_uri", "from_uri"})
"""Methods of `pathlib.Path` that don't touch the disk: taken as they are."""


class Path(pathlib.PurePath):
    """A path, of the system's kind. Equal to the `pathlib` path of the same name, and fit wherever `os.PathLike` is.

    Methods have the arguments, results and errors of `pathlib.Path`'s. They are always a cancel point, before anything
    is done, and always a schedule point. Once begun, they are not interrupted: a cancellation waits.

    To derive a class of your own on Python 3.11, derive it from `PosixPath` or `WindowsPath`, as with `pathlib`.
    """

    __slots__ = ()

    _theirs: ClassVar[type[pathlib.Path]] = pathlib.Path

    def __new__(cls, *args: str | os.PathLike[str]) -> Self:
        kind: Any = (WindowsPath if os.name == "nt" else PosixPath) if cls is Path else cls
        made: Self = super().__new__(kind, *args)
        return made

    def __repr__(self) -> str:
        return f"kernel.Path({str(self)!r})"

    if TYPE_CHECKING:

        @classmethod
        def cwd(cls) -> Operation[Self]: ...
        @classmethod
        def home(cls) -> Operation[Self]: ...

        if sys.version_info >= (3, 13):

            @classmethod
            def from_uri(cls, uri: str) -> Self: ...

        def absolute(self) -> Operation[Self]: ...
        def chmod(self, mode: int, *, follow_symlinks: bool = True) -> Operation[None]: ...
        def exists(self, *, follow_symlinks: bool = True) -> Operation[bool]: ...
        def expanduser(self) -> Operation[Self]: ...
        def glob(self, pattern: str, **options: Any) -> Operation[list[Self]]: ...
        def group(self) -> Operation[str]: ...
        def hardlink_to(self, target: str | os.PathLike[str]) -> Operation[None]: ...
        def is_block_device(self) -> Operation[bool]: ...
        def is_char_device(self) -> Operation[bool]: ...
        def is_dir(self) -> Operation[bool]: ...
        def is_fifo(self) -> Operation[bool]: ...
        def is_file(self) -> Operation[bool]: ...

        if sys.version_info >= (3, 12):

            def is_junction(self) -> Operation[bool]: ...

        def is_mount(self) -> Operation[bool]: ...
        def is_socket(self) -> Operation[bool]: ...
        def is_symlink(self) -> Operation[bool]: ...
        def iterdir(self) -> Operation[list[Self]]: ...
        def lchmod(self, mode: int) -> Operation[None]: ...

        if sys.version_info < (3, 12):

            def link_to(self, target: str | os.PathLike[str]) -> Operation[None]: ...

        def lstat(self) -> Operation[os.stat_result]: ...
        def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> Operation[None]: ...
        @overload
        def open(
            self, mode: OpenTextMode = "r", buffering: int = -1, encoding: str | None = None,
            errors: str | None = None, newline: str | None = None,
        ) -> Operation[AsyncFile[str]]: ...  # fmt: skip
        @overload
        def open(
            self, mode: OpenBinaryMode, buffering: int = -1, encoding: None = None,
            errors: None = None, newline: None = None,
        ) -> Operation[AsyncFile[bytes]]: ...  # fmt: skip
        @overload
        def open(self, mode: str, *args: Any, **kwargs: Any) -> Operation[AsyncFile[Any]]: ...
        def open(self, *args: Any, **kwargs: Any) -> Operation[AsyncFile[Any]]: ...
        def owner(self) -> Operation[str]: ...
        def read_bytes(self) -> Operation[bytes]: ...
        def read_text(self, encoding: str | None = None, errors: str | None = None) -> Operation[str]: ...
        def readlink(self) -> Operation[Self]: ...
        def rename(self, target: str | os.PathLike[str]) -> Operation[Self]: ...
        def replace(self, target: str | os.PathLike[str]) -> Operation[Self]: ...
        def resolve(self, strict: bool = False) -> Operation[Self]: ...
        def rglob(self, pattern: str, **options: Any) -> Operation[list[Self]]: ...
        def rmdir(self) -> Operation[None]: ...
        def samefile(self, other_path: str | os.PathLike[str]) -> Operation[bool]: ...
        def stat(self, *, follow_symlinks: bool = True) -> Operation[os.stat_result]: ...
        def symlink_to(self, target: str | os.PathLike[str], target_is_directory: bool = False) -> Operation[None]: ...
        def touch(self, mode: int = 0o666, exist_ok: bool = True) -> Operation[None]: ...
        def unlink(self, missing_ok: bool = False) -> Operation[None]: ...

        if sys.version_info >= (3, 12):

            def walk(
                self,
                top_down: bool = True,
                on_error: Callable[[OSError], object] | None = None,
                follow_symlinks: bool = False,
            ) -> Operation[list[tuple[Self, list[str], list[str]]]]: ...

        def write_bytes(self, data: bytes) -> Operation[int]: ...
        def write_text(
            self, data: str, encoding: str | None = None, errors: str | None = None, newline: str | None = None
        ) -> Operation[int]: ...


class PosixPath(Path, pathlib.PurePosixPath):
    """A `Path` on POSIX."""

    __slots__ = ()

    _theirs = pathlib.PosixPath


class WindowsPath(Path, pathlib.PureWindowsPath):
    """A `Path` on Windows. Elsewhere it can be made and looked at, and its operations raise NotImplementedError."""

    __slots__ = ()

    _theirs = pathlib.WindowsPath


def _theirs(value: Any) -> Any:
    """A path of ours as one of `pathlib`'s, which does more with its own than with others (`samefile`, for one)."""
    return value._theirs(value) if isinstance(value, Path) else value


def _ours(make: Callable[..., Path], value: Any) -> Any:
    """What `pathlib` has returned, with what `make` makes in the place of its own paths, and files wrapped."""
    if isinstance(value, pathlib.Path):
        return make(value)
    if isinstance(value, io.IOBase):
        return wrap_file(value)
    if type(value) is tuple:  # of `walk`; `stat` has a type of its own
        return tuple(_ours(make, item) for item in value)
    if hasattr(value, "__next__"):
        return [_ours(make, item) for item in value]
    return value


def _call(make: Callable[..., Path], original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """In the thread."""
    kwargs = {name: _theirs(value) for name, value in kwargs.items()}
    return _ours(make, original(*map(_theirs, args), **kwargs))


def _in_a_thread(original: Callable[..., Any]) -> Any:
    """A method of `pathlib.Path`'s as an operation of ours."""

    @operation
    def method(self: Path, *args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        make = getattr(self, "with_segments", type(self))  # which Python has since 3.12
        return (yield from run_sync(_call, make, original, (self, *args), kwargs))

    return _dressed_as(original, method)


def _in_a_thread_for_the_class(original: Any) -> Any:
    """A class method's counterpart."""

    @operation
    def method(cls: type[Path], *args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        return (yield from run_sync(_call, cls, original, args, kwargs))

    return classmethod(_dressed_as(original.__func__, method))


def _passed_through(name: str) -> Any:
    return property(lambda self: getattr(_theirs(self), name))


def _dressed_as(original: Callable[..., Any], method: Any) -> Any:
    """With its signature, for `inspect` and `help`."""
    functools.update_wrapper(method, original)
    name = original.__name__
    method.__module__ = __name__
    method.__qualname__ = f"Path.{name}"
    method.__doc__ = f"As `pathlib.Path.{name}`, in a thread.\n\n{inspect.getdoc(getattr(pathlib.Path, name)) or ''}"
    return method


def _take_over() -> None:
    """Give `Path` all that `pathlib.Path` has and `PurePath` has not."""
    for name in dir(pathlib.Path):
        method = inspect.getattr_static(pathlib.Path, name)
        inherited = method is inspect.getattr_static(pathlib.PurePath, name, None)
        if name.startswith("_") or name in vars(Path) or inherited:
            continue
        if name in _ONLY_NAMES:
            setattr(Path, name, method)
        elif isinstance(method, property):  # `info` of 3.14: an object, whose methods look at the disk when asked
            setattr(Path, name, _passed_through(name))
        elif isinstance(method, classmethod):
            setattr(Path, name, _in_a_thread_for_the_class(getattr(pathlib.Path, name)))
        else:
            setattr(Path, name, _in_a_thread(method))


_take_over()
