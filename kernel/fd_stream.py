"""A byte stream on a file descriptor: a pipe, a FIFO, a terminal. POSIX only.

Reading and writing are tried at once, and the task sleeps only when the system says that it would block. For that the
file must be in non-blocking mode, which is a flag of the *open file*, not of the descriptor: everybody who has a
duplicate of it, in whatever process, finds it changed. So:

* The stream sets the flag, and puts it back as it was when it is closed.
* Between these two, nobody else should use the same open file. Both ends of a pipe are files of their own, so a pipe
  to a child is harmless. The terminal is one file that all programs on it share, and stdin, stdout and stderr are
  mostly duplicates of it: a stream on one of them makes `print` fail with `BlockingIOError` when the terminal is slow.
* Regular files are always ready. They may be read through a stream, and block the program as long as the disk takes.
  Use `kernel.open_file`.

There is a way to read a pipe without the flag, Linux's `preadv2` with `RWF_NOWAIT`, but none to write and none for
terminals, where it would matter.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from typing import Any, Final

from .abc import Stream
from .core.errors import BrokenResourceError, BusyResourceError, ClosedResourceError
from .core.traps import consume_budget, notify_closing, operation, wait_readable, wait_writable

__all__ = ["FdStream"]

RECEIVE_SIZE: Final = 65536  # what a pipe holds on Linux


class FdStream(Stream):
    """A stream that owns the descriptor `fd`, and closes it when it is closed, or else when it is collected.

    One task at a time may send, and one receive.

    Raises:
        TypeError: `fd` is no int.
        OSError: `fd` is not open.
    """

    __slots__ = ("__weakref__", "_fd", "_receiving", "_sending", "_was_blocking")

    def __init__(self, fd: int) -> None:
        self._fd = -1  # what __del__ finds if the next lines fail, and what a closed stream has: it is no file's number
        self._sending = self._receiving = False
        if not isinstance(fd, int):
            raise TypeError(f"FdStream() wants a file descriptor, an int, not {fd!r}")
        self._was_blocking = os.get_blocking(fd)
        os.set_blocking(fd, False)
        self._fd = fd

    @operation
    def send_all(self, data: bytes | bytearray | memoryview) -> Generator[Any, Any, None]:
        """Send all of `data`.

        Always a cancel point, before anything is sent; a schedule point if it waits. What this raises, `Cancelled`
        included, has an attribute `bytes_sent`: so many went out before.

        Raises:
            BusyResourceError: another task is sending.
            BrokenResourceError: nobody will read this, as the other end is closed.
            ClosedResourceError: the stream is closed, or was closed by another task meanwhile.
        """
        self._start_sending()
        sent = 0
        try:
            yield from consume_budget()
            with memoryview(data).cast("B") as view:
                while True:
                    sent += self._write(view[sent:])
                    if sent == len(view):
                        return
                    yield from wait_writable(self._fd)  # it has taken what there was room for
        except BaseException as error:
            error.bytes_sent = sent  # type: ignore[attr-defined]
            raise
        finally:
            self._sending = False

    @operation
    def wait_send_all_might_not_block(self) -> Generator[Any, Any, None]:
        """Wait until there is room for at least some bytes, or `send_all` would fail.

        Always a cancel point and a schedule point. Errors are those of `send_all`.
        """
        self._start_sending()
        try:
            yield from wait_writable(self._fd)
        finally:
            self._sending = False

    @operation
    def receive_some(self, max_bytes: int | None = None) -> Generator[Any, Any, bytes]:
        """Receive the bytes that are there, at least one and at most `max_bytes` (65,536); `b""` at the end.

        The end is where nobody is left who could write. Always a cancel point, and then nothing was received; a
        schedule point if it waits.

        Raises:
            BusyResourceError: another task is receiving.
            BrokenResourceError: reading has failed; the cause is the OSError. At a pseudo-terminal it is the end.
            ClosedResourceError: the stream is closed, or was closed by another task meanwhile.
            TypeError, ValueError: `max_bytes` is not a whole number from 1 up.
        """
        if max_bytes is None:
            max_bytes = RECEIVE_SIZE
        elif not isinstance(max_bytes, int):
            raise TypeError(f"max_bytes must be a whole number from 1 up, not {max_bytes!r}")
        elif max_bytes < 1:
            raise ValueError(f"max_bytes must be a whole number from 1 up, not {max_bytes!r}")
        if self._receiving:
            raise BusyResourceError(f"another task is receiving from {self!r}: put a lock around it")
        self._check_open()
        self._receiving = True
        try:
            yield from consume_budget()
            while True:
                try:
                    return os.read(self._fd, max_bytes)
                except BlockingIOError:
                    pass
                except OSError as error:
                    raise self._failure(error) from error
                yield from wait_readable(self._fd)
        finally:
            self._receiving = False

    @operation
    def __anext__(self) -> Generator[Any, Any, bytes]:
        chunk = yield from self.receive_some()
        if not chunk:
            raise StopAsyncIteration
        return chunk

    @operation
    def aclose(self) -> Generator[Any, Any, None]:
        """Close the stream, in any case: who waits on it wakes with ClosedResourceError. Then a cancel point."""
        self.close()
        yield from consume_budget()

    def close(self) -> None:
        """`aclose` without being a checkpoint. Closing again does nothing. Raises RuntimeError outside the kernel."""
        if self._fd != -1:
            notify_closing(self._fd)
            self._close()

    def fileno(self) -> int:
        """The descriptor's number; -1 once the stream is closed."""
        return self._fd

    def _start_sending(self) -> None:
        if self._sending:
            raise BusyResourceError(f"another task is sending on {self!r}: put a lock around it")
        self._check_open()
        self._sending = True

    def _check_open(self) -> None:
        if self._fd == -1:
            raise ClosedResourceError("this stream was closed before")

    def _write(self, data: memoryview) -> int:
        """Write what there is room for, perhaps nothing, and return how much that was."""
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> Exception:
        if error.errno == errno.EBADF:
            return ClosedResourceError("another task closed this stream while it was in use")
        return BrokenResourceError(f"{self!r} does not work any more: {error}")

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        try:
            if self._was_blocking:
                os.set_blocking(fd, True)
        finally:
            os.close(fd)

    def __del__(self) -> None:
        if self._fd != -1:  # nobody waits on it, or it would not be collected
            self._close()

    def __repr__(self) -> str:
        return f"<FdStream {'closed' if self._fd == -1 else f'fd={self._fd}'}>"
