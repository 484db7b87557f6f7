"""Streams over sockets: what nearly every program wants of the network.

A `SocketStream` is a connected stream socket with the face of `kernel.abc.HalfCloseableStream`; a `SocketListener` is a
listening one, out of which `SocketStream`s come. Errors are those of streams, with the `OSError` as their cause.

The two methods that everything passes through, `receive_some` and `send_all`, do their system call themselves, without
the methods of the socket in between: a generator within a generator would cost a tenth of an echo. A socket of a
derived class, whose methods may do more, is asked by its methods.
"""

from __future__ import annotations

import errno
import socket as stdlib
from collections.abc import Generator
from contextlib import suppress
from typing import Any, Final

from ..abc import HalfCloseableStream, Listener
from ..core.errors import BrokenResourceError, BusyResourceError, ClosedResourceError
from ..core.task import current_kernel, here
from ..core.traps import checkpoint, consume_budget, operation
from .sockets import Buffer, SocketType

__all__ = ["SocketListener", "SocketStream"]

RECEIVE_SIZE: Final = 66560
"""Bytes that `receive_some` asks for. A bit more than 64 KiB, so that such a message does not fill the buffer, as if
there were more. From 128 KiB on the C library gets and returns each buffer by a system call.
"""

IGNORABLE: Final = frozenset(
    getattr(errno, name)
    for name in (
        # The connection had failed before it was accepted; Linux tells so by these (accept(2)). The listener is well.
        "ECONNABORTED", "EPERM", "EPROTO", "ENETDOWN", "ENOPROTOOPT", "EHOSTDOWN", "ENONET", "EHOSTUNREACH",
        "EOPNOTSUPP", "ENETUNREACH",
    )
    if hasattr(errno, name)
)  # fmt: skip


class SocketStream(HalfCloseableStream):
    """A byte stream on a connected stream socket, which it owns from then on: TCP, Unix, whatever has the type
    SOCK_STREAM.

    One task at a time may send, and one receive. Nagle's algorithm is off (TCP_NODELAY): what is sent goes out.

    Attributes:
        socket: the socket, a `kernel.socket.SocketType`.

    Raises:
        TypeError: `socket` is no SocketType.
        ValueError: it is of another type than SOCK_STREAM.
    """

    __slots__ = ("__weakref__", "_beneath", "_receiving", "_sending", "socket")

    def __init__(self, socket: SocketType) -> None:
        if not isinstance(socket, SocketType):
            raise TypeError(f"SocketStream() wants a socket of kernel.socket, not {socket!r}")
        if not socket._is_stream:
            raise ValueError(f"SocketStream() wants a socket of type SOCK_STREAM, not {socket!r}")
        self.socket = socket
        # None: a socket that somebody derived, whose methods we must not go round.
        self._beneath = socket._sock if type(socket) is SocketType else None
        self._sending = self._receiving = False
        try:
            socket._sock.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)
        except OSError:
            pass  # not a TCP socket

    @operation
    def send_all(self, data: Buffer) -> Generator[Any, Any, None]:
        """Send all of `data`.

        Always a cancel point, before anything is sent; a schedule point if it waits for room. What this raises,
        `Cancelled` included, has an attribute `bytes_sent`: so many went out before. Cost: 0.5 us and the system call.

        Raises:
            BusyResourceError: another task is sending.
            BrokenResourceError: the connection has failed, or the other end does not take any more.
            ClosedResourceError: the stream is closed, was closed by another task meanwhile, or has sent its end.
        """
        kernel = here.kernel or current_kernel("send_all()")
        socket, sent = self._start_sending(), 0
        try:
            kernel.budget -= 1
            if kernel.budget < 0 or kernel.current.scope.cancelled is not None:  # type: ignore[union-attr]
                yield from checkpoint()
            if self._beneath is None:
                yield from socket.sendall(data)
                return
            try:
                sent = self._beneath.send(data)
            except BlockingIOError:
                pass
            if sent == (len(data) if type(data) is bytes else memoryview(data).nbytes):
                return
            with memoryview(data).cast("B") as view:
                while sent < len(view):
                    yield socket._writable
                    try:
                        sent += self._beneath.send(view[sent:])
                    except BlockingIOError:
                        pass
        except OSError as error:
            failure = _translated(error, self)
            failure.bytes_sent = getattr(error, "bytes_sent", sent)  # type: ignore[attr-defined]
            raise failure from error
        except BaseException as error:
            if not hasattr(error, "bytes_sent"):
                error.bytes_sent = sent  # type: ignore[attr-defined]
            raise
        finally:
            self._sending = False

    @operation
    def wait_send_all_might_not_block(self) -> Generator[Any, Any, None]:
        """Wait until there is room for at least some bytes, or `send_all` would fail.

        Always a cancel point and a schedule point. Errors are those of `send_all`.
        """
        socket = self._start_sending()
        try:
            if socket.fileno() == -1:
                raise ClosedResourceError("this stream was closed before")
            yield socket._writable
        finally:
            self._sending = False

    @operation
    def send_eof(self) -> Generator[Any, Any, None]:
        """Let the other side see the end, and go on receiving. A cancel point. Doing it again does nothing.

        Raises: as `send_all`.
        """
        if self._sending:
            raise BusyResourceError(f"another task is sending on {self!r}: wait for it before send_eof()")
        yield from consume_budget()
        if not self.socket.did_shutdown_SHUT_WR:
            try:
                self.socket.shutdown(stdlib.SHUT_WR)
            except OSError as error:
                raise _translated(error, self) from error

    @operation
    def receive_some(self, max_bytes: int | None = None) -> Generator[Any, Any, bytes]:
        """Receive the bytes that are there, at least one and at most `max_bytes` (66,560); `b""` at the end.

        Always a cancel point, and then nothing was received; a schedule point if it waits. Cost: 0.6 us and the system
        call.

        Raises:
            BusyResourceError: another task is receiving.
            BrokenResourceError: the connection has failed.
            ClosedResourceError: the stream is closed, or was closed by another task meanwhile.
            TypeError, ValueError: `max_bytes` is not a whole number from 1 up.
        """
        if max_bytes is None:
            max_bytes = RECEIVE_SIZE
        elif not isinstance(max_bytes, int):
            raise TypeError(f"max_bytes must be a whole number from 1 up, not {max_bytes!r}")
        elif max_bytes < 1:
            raise ValueError(f"max_bytes must be a whole number from 1 up, not {max_bytes!r}")
        kernel = here.kernel or current_kernel("receive_some()")
        if self._receiving:
            raise BusyResourceError(f"another task is receiving from {self!r}: put a lock around it")
        self._receiving = True
        socket = self.socket
        try:
            kernel.budget -= 1
            if kernel.budget < 0 or kernel.current.scope.cancelled is not None:  # type: ignore[union-attr]
                yield from checkpoint()
            if self._beneath is None:
                return (yield from socket.recv(max_bytes))
            if socket._drained:
                socket._drained = False
                yield socket._readable
            while True:
                try:
                    data: bytes = self._beneath.recv(max_bytes)
                    break
                except BlockingIOError:
                    pass
                yield socket._readable
            socket._drained = 0 < len(data) < max_bytes
            return data
        except OSError as error:
            raise _translated(error, self) from error
        finally:
            self._receiving = False

    @operation
    def aclose(self) -> Generator[Any, Any, None]:
        """Close the connection, in any case: who waits on it wakes with ClosedResourceError. Then a cancel point."""
        self.socket.close()
        yield from consume_budget()

    def setsockopt(self, level: int, option: int, value: int | Buffer | None, length: int | None = None) -> None:
        """`socket.setsockopt`."""
        self.socket.setsockopt(level, option, value, length)

    def getsockopt(self, level: int, option: int, buffersize: int = 0) -> Any:
        """`socket.getsockopt`."""
        return self.socket.getsockopt(level, option, buffersize)

    def _start_sending(self) -> SocketType:
        if self._sending or self.socket.did_shutdown_SHUT_WR:
            raise self._refusal()
        self._sending = True
        return self.socket

    def _refusal(self) -> Any:
        error: Any
        if self._sending:
            error = BusyResourceError(f"another task is sending on {self!r}: put a lock around it")
        else:
            error = ClosedResourceError("send_eof() was called on this stream: it cannot send any more")
        error.bytes_sent = 0
        return error

    def __repr__(self) -> str:
        return f"<SocketStream on {self.socket!r}>"


class SocketListener(Listener[SocketStream]):
    """Where connections come in, on a listening socket that it owns from then on.

    Attributes:
        socket: the socket, a `kernel.socket.SocketType`.

    Raises:
        TypeError: `socket` is no SocketType.
        ValueError: it is of another type than SOCK_STREAM, or does not listen.
    """

    __slots__ = ("__weakref__", "socket")

    def __init__(self, socket: SocketType) -> None:
        if not isinstance(socket, SocketType):
            raise TypeError(f"SocketListener() wants a socket of kernel.socket, not {socket!r}")
        if not socket._is_stream:
            raise ValueError(f"SocketListener() wants a socket of type SOCK_STREAM, not {socket!r}")
        with suppress(OSError):  # macOS before 13 cannot tell
            if not socket.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_ACCEPTCONN):
                raise ValueError(f"{socket!r} does not listen: call listen() first")
        self.socket = socket

    @operation
    def accept(self) -> Generator[Any, Any, SocketStream]:
        """Wait for a connection, and return it. Connections that fail before they are accepted are passed over.

        Always a cancel point, and then no connection was taken. Only one task at a time may wait.

        Raises:
            BusyResourceError: another task is waiting.
            ClosedResourceError: the listener is closed, or was closed by another task meanwhile.
            OSError: the system is short of something: EMFILE, ENFILE, ENOMEM, ENOBUFS. Close something, and try again.
        """
        while True:
            try:
                socket, _ = yield from self.socket.accept()
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL) and self.socket.fileno() == -1:
                    raise ClosedResourceError("this listener was closed before") from error
                if error.errno not in IGNORABLE:
                    raise
            else:
                return SocketStream(socket)

    @operation
    def aclose(self) -> Generator[Any, Any, None]:
        """Close the listener, in any case: who waits for a connection wakes with ClosedResourceError. Then a cancel
        point.
        """
        self.socket.close()
        yield from consume_budget()

    def __repr__(self) -> str:
        return f"<SocketListener on {self.socket!r}>"


def _translated(error: OSError, stream: object) -> Exception:
    """What a stream raises when its socket has raised `error`."""
    if error.errno == errno.EBADF:
        return ClosedResourceError("this stream was closed before")
    return BrokenResourceError(f"{stream!r} does not work any more: {error}")
