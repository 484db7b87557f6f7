"""Sockets with the standard library's methods, of which those that may have to wait are operations.

A `SocketType` has a non-blocking socket of the standard library beneath it and two traps, one to read and one to write.
Each operation is the same few lines: be a cancel point, try, and if the system says that it would block, sleep on the
trap and try again. Trying first is what gives the right error at once. One exception pays: what a stream's last `recv`
has not filled the buffer with was not there, so the next one sleeps first and saves a system call that is bound to
fail, 1.2 us with its exception.

Rules:

* Errors are the standard library's, `OSError` above all; a timeout is a scope's business, and `settimeout` is missing.
* One task at a time may wait to receive, and one to send: BusyResourceError for the next.
* `close` wakes whoever waits, with ClosedResourceError, and may be called from any thread: but who waits for the
  descriptor by its number (`wait_readable`) is found only by the run it waits in. Methods of a closed socket raise
  OSError (EBADF).
* Runs in several threads may share a socket if one of them receives and the other sends.
* A cancelled operation did nothing; if some bytes have gone out, or a connection is under way, its docstring says so.

What is beneath need not be a real socket: `set_custom_socket_factory` may bring one that lives in memory, if it has the
methods, an `is_readable()`, and a `readiness()` that returns the two traps. `kernel.testing.network` does that.
"""

from __future__ import annotations

import errno
import os
import select
import socket as stdlib
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from operator import index
from typing import IO, Any, Final, TypeVar

from .. import to_thread
from ..abc import SocketFactory
from ..core.errors import Cancelled
from ..core.task import current_kernel, here
from ..core.traps import Operation, checkpoint, consume_budget, operation, sleep
from ..inbox import RunVar
from .readiness import Readable, Readiness, Writable
from .resolve import getaddrinfo

__all__ = ["SocketType", "from_stdlib_socket", "fromfd", "set_custom_socket_factory", "socket", "socketpair"]

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview
Address = Any
"""A tuple for AF_INET and AF_INET6, a path for AF_UNIX, and whatever else the system has."""

SENDFILE_SIZE: Final = 1 << 30  # at most so many bytes per system call: Linux takes no more than 2 GiB

_factory: RunVar[SocketFactory | None] = RunVar("socket factory", None)


def set_custom_socket_factory(factory: SocketFactory | None) -> SocketFactory | None:
    """From now on, and in this run, `kernel.socket.socket` and all that is built on it asks `factory`; None: nobody.

    Returns the one before, or None. What has a file descriptor already (`fromfd`, `socketpair`, an accepted connection)
    does not come from a factory.

    Raises:
        TypeError: `factory` is no `kernel.abc.SocketFactory`.
        RuntimeError: used outside the kernel.
    """
    if factory is not None and not isinstance(factory, SocketFactory):
        raise TypeError(f"set_custom_socket_factory() wants a kernel.abc.SocketFactory or None, not {factory!r}")
    before = _factory.get()
    _factory.set(factory)
    return before


def socket(
    family: int = stdlib.AF_INET, type: int = stdlib.SOCK_STREAM, proto: int = 0, fileno: int | None = None
) -> SocketType:
    """A new socket, or one for the descriptor `fileno`, which it owns from then on. Not a checkpoint.

    Raises:
        OSError: the system refuses; EBADF or ENOTSOCK for a bad `fileno`.
    """
    if fileno is not None:
        return SocketType(_of_descriptor(index(fileno), family, type, proto))
    kernel = here.kernel
    factory = kernel.locals.get(_factory) if kernel is not None else None
    if factory is not None:
        made: SocketType = factory.socket(family, type, proto)
        return made
    return SocketType(stdlib.socket(family, type, proto))


def from_stdlib_socket(sock: stdlib.socket) -> SocketType:
    """A socket around one of the standard library's, which it owns from then on and makes non-blocking.

    Raises:
        TypeError: `sock` is no `socket.socket`, or one of a derived class such as `ssl.SSLSocket`, which does more than
            pass on what the system does.
    """
    if type(sock) is not stdlib.socket:
        raise TypeError(
            f"from_stdlib_socket() wants a plain socket.socket, not {sock!r}"
            + (". For TLS use kernel.SSLStream around a stream." if isinstance(sock, stdlib.socket) else "")
        )
    return SocketType(sock)


def fromfd(
    fd: int, family: int = stdlib.AF_INET, type: int = stdlib.SOCK_STREAM, proto: int = 0
) -> SocketType:  # fmt: skip
    """A socket for a duplicate of the descriptor `fd`, which stays the caller's."""
    duplicate = os.dup(index(fd))
    try:
        return SocketType(_of_descriptor(duplicate, family, type, proto))
    except BaseException:
        os.close(duplicate)
        raise


def socketpair(
    family: int | None = None, type: int = stdlib.SOCK_STREAM, proto: int = 0
) -> tuple[SocketType, SocketType]:
    """Two sockets that are connected with each other; of family AF_UNIX where there is such a thing."""
    left, right = stdlib.socketpair(family, type, proto)
    return SocketType(left), SocketType(right)


def _of_descriptor(fd: int, family: int, type: int, proto: int) -> stdlib.socket:
    """What kind of a socket it is the system knows better than the caller, where it can be asked (trio#251)."""
    if sys.platform == "linux":
        probe = stdlib.socket(family, type, proto, fileno=fd)
        try:
            family, type, proto = (
                probe.getsockopt(stdlib.SOL_SOCKET, option)
                for option in (stdlib.SO_DOMAIN, stdlib.SO_TYPE, stdlib.SO_PROTOCOL)
            )
        finally:
            probe.detach()
    return stdlib.socket(family, type, proto, fileno=fd)


class SocketType:
    """A socket. Made by the functions of `kernel.socket`; this class itself is for `isinstance`, and for factories.

    Args:
        sock: a socket of the standard library, which becomes non-blocking; or what has the methods of one, raises
            BlockingIOError likewise, and has a `readiness()` that returns two traps, to read and to write.

    `with` closes it. All that is not explained below is as in the standard library.
    """

    __slots__ = ("__weakref__", "_drained", "_is_stream", "_readable", "_sock", "_writable", "did_shutdown_SHUT_WR")

    def __init__(self, sock: Any) -> None:
        if isinstance(sock, stdlib.socket):
            fd = sock.fileno()
            if fd == -1:
                raise OSError(errno.EBADF, "this socket is closed")
            sock.setblocking(False)
            self._readable: Any = Readable(fd)
            self._writable: Any = Writable(fd)
        elif hasattr(sock, "readiness"):
            self._readable, self._writable = sock.readiness()
        else:
            raise TypeError(
                f"SocketType() wants a socket.socket, not {sock!r}. Use kernel.socket.socket() to make one."
            )
        self._sock = sock
        self._is_stream = sock.type == stdlib.SOCK_STREAM
        self._drained = False  # a stream: the last recv took all that was there, so the next one had better wait
        self.did_shutdown_SHUT_WR: bool = False
        """Whether `shutdown` has ended the sending half."""

    # ---- what never waits ----

    @property
    def family(self) -> int:
        """AF_INET and so on."""
        family: int = self._sock.family
        return family

    @property
    def type(self) -> int:
        """SOCK_STREAM and so on."""
        kind: int = self._sock.type
        return kind

    @property
    def proto(self) -> int:
        """The protocol's number; 0 for the usual one."""
        proto: int = self._sock.proto
        return proto

    def fileno(self) -> int:
        """The descriptor's number, -1 once the socket is closed."""
        fd: int = self._sock.fileno()
        return fd

    def getpeername(self) -> Address:
        """The address at the other end."""
        return self._sock.getpeername()

    def getsockname(self) -> Address:
        """The address at this end."""
        return self._sock.getsockname()

    def getsockopt(self, level: int, option: int, buflen: int = 0) -> Any:
        """The value of an option: an int, or with `buflen` so many bytes."""
        return self._sock.getsockopt(level, option, *([buflen] if buflen else []))

    def setsockopt(self, level: int, option: int, value: int | Buffer | None, length: int | None = None) -> None:
        """Set an option to an int or to bytes; or to NULL of a `length`, with None as the value."""
        if length is not None:
            self._sock.setsockopt(level, option, value, length)
        else:
            self._sock.setsockopt(level, option, value)

    def get_inheritable(self) -> bool:
        """Whether programs that are started inherit the descriptor."""
        inheritable: bool = self._sock.get_inheritable()
        return inheritable

    def set_inheritable(self, inheritable: bool) -> None:
        """Let programs that are started inherit the descriptor, or not."""
        self._sock.set_inheritable(inheritable)

    def listen(self, backlog: int = min(stdlib.SOMAXCONN, 128)) -> None:
        """Let connections come in; about `backlog` of them queue until they are accepted."""
        self._sock.listen(backlog)

    def shutdown(self, how: int) -> None:
        """End one half of the connection, or both: SHUT_RD, SHUT_WR or SHUT_RDWR."""
        self._sock.shutdown(how)
        if how in (stdlib.SHUT_WR, stdlib.SHUT_RDWR):
            self.did_shutdown_SHUT_WR = True

    def is_readable(self) -> bool:
        """Whether a receiving operation would not have to wait right now."""
        if not isinstance(self._sock, stdlib.socket):
            readable: bool = self._sock.is_readable()
            return readable
        if sys.platform == "win32":
            return bool(select.select([self._sock], [], [], 0)[0])
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))

    def dup(self) -> SocketType:
        """Another socket with a descriptor of its own for the same connection."""
        return SocketType(self._sock.dup())

    def detach(self) -> int:
        """Give the descriptor away: this socket is closed, the connection is not. Who waits wakes as with `close`."""
        self._forget()
        fd: int = self._sock.detach()
        return fd

    def close(self) -> None:
        """Close the socket. Whoever waits on it wakes with ClosedResourceError. Closing again does nothing."""
        if self._sock.fileno() != -1:
            self._forget()
            self._sock.close()

    def _forget(self) -> None:
        self._drained = False  # no wait without asking the socket first: the number may be somebody else's by then
        self._readable.forget()
        self._writable.forget()

    def __enter__(self) -> SocketType:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        # What is beneath closes itself, with a ResourceWarning. The poller must drop the number, which will be reused.
        sock = getattr(self, "_sock", None)
        if sock is not None and sock.fileno() != -1 and isinstance(self._readable, Readiness):
            for trap in (self._readable, self._writable):
                if trap.poller is not None:
                    trap.poller.forget(trap.fd)

    def __repr__(self) -> str:
        return repr(self._sock).replace("<socket.socket", "<kernel.socket.socket", 1)

    # ---- coming together ----

    @operation
    def bind(self, address: Address) -> Generator[Any, Any, None]:
        """Give this end an address. A name in it is looked up. A cancel point; waits for look-ups, and for the disk."""
        address = yield from self._resolve(address, local=True)
        if self._sock.family == getattr(stdlib, "AF_UNIX", -1) and address[:1] not in ("", b"", "\0", b"\0"):
            yield from to_thread.run_sync(self._sock.bind, address)  # a path: the file system may be slow
        else:
            yield from consume_budget()
            self._sock.bind(address)

    @operation
    def accept(self) -> Generator[Any, Any, tuple[SocketType, Address]]:
        """Wait for a connection; returns a socket for it and the address it comes from. Always a cancel point."""
        sock, address = yield from self._accept()
        return SocketType(sock), address

    @operation
    def _accept(self) -> Generator[Any, Any, tuple[Any, Address]]:
        """`accept`, but what it returns is the socket beneath."""
        kernel = here.kernel or current_kernel("socket.accept()")
        kernel.budget -= 1
        if kernel.budget < 0 or kernel.current.scope.cancelled is not None:  # type: ignore[union-attr]
            yield from checkpoint()
        while True:
            try:
                result: tuple[Any, Address] = self._sock.accept()
                return result
            except BlockingIOError:
                pass
            yield self._readable

    @operation
    def connect(self, address: Address) -> Generator[Any, Any, None]:
        """Connect with `address`. A name in it is looked up; the first answer is taken.

        Always a cancel point. Once the connection is under way, it cannot be taken back: a cancellation closes the
        socket then.

        Raises:
            OSError: it did not work: ConnectionRefusedError, TimeoutError (the system's, minutes), ...
            ClosedResourceError: another task closed the socket meanwhile.
        """
        address = yield from self._resolve(address, local=False)
        yield from consume_budget()
        pause = 0.001
        while True:
            try:
                self._sock.connect(address)
                return
            except BlockingIOError as error:
                if error.errno != errno.EAGAIN or self._sock.family != getattr(stdlib, "AF_UNIX", -1):
                    break
            # The queue of a listening Unix socket is full. Nothing is under way, and nobody tells when there is room.
            yield from sleep(pause)
            pause = min(0.05, pause * 2)
        try:
            yield self._writable
        except Cancelled:
            self.close()
            raise
        if error_number := self._sock.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_ERROR):
            raise OSError(error_number, f"cannot connect with {address!r}: {os.strerror(error_number)}")

    @operation
    def _resolve(self, address: Address, *, local: bool) -> Generator[Any, Any, Address]:
        """`address` with numbers in the place of names. Mistakes in its shape are ValueErrors."""
        family = self._sock.family
        if family == stdlib.AF_INET:
            if not isinstance(address, tuple) or len(address) != 2:
                raise ValueError(f"an AF_INET address is a tuple (host, port), not {address!r}")
        elif family == stdlib.AF_INET6:
            if not isinstance(address, tuple) or not 2 <= len(address) <= 4:
                raise ValueError(
                    f"an AF_INET6 address is a tuple (host, port[, flowinfo[, scope_id]]), not {address!r}"
                )
        else:
            return os.fspath(address) if isinstance(address, os.PathLike) else address
        host, port, *rest = address
        if isinstance(port, int) and not 0 <= port <= 0xFFFF:  # the lookup would take its lower 16 bits
            raise OverflowError(f"a port is a number from 0 to 65535, not {port}")
        if isinstance(port, int) and host is not None:
            with suppress(OSError, TypeError, ValueError):
                stdlib.inet_pton(family, host)
                return address
        flags = stdlib.AI_PASSIVE if local else 0
        if family == stdlib.AF_INET6 and not self._sock.getsockopt(stdlib.IPPROTO_IPV6, stdlib.IPV6_V6ONLY):
            flags |= stdlib.AI_V4MAPPED
        host = {"": None, "<broadcast>": "255.255.255.255"}.get(host, host)
        found = yield from getaddrinfo(host, port, family, self._sock.type, self._sock.proto, flags)
        resolved: tuple[Any, ...] = found[0][4]
        return (*resolved[:2], *rest, *resolved[2 + len(rest) :])

    # ---- receiving ----

    @operation
    def recv(self, bufsize: int, flags: int = 0, /) -> Generator[Any, Any, bytes]:
        """Receive what is there, at most `bufsize` bytes; `b""` at the end. A cancellation takes nothing."""
        kernel = here.kernel or current_kernel("socket.recv()")
        kernel.budget -= 1
        if kernel.budget < 0 or kernel.current.scope.cancelled is not None:  # type: ignore[union-attr]
            yield from checkpoint()
        if self._drained and not flags and bufsize > 0:
            self._drained = False
            yield self._readable
        while True:
            try:
                data: bytes = self._sock.recv(bufsize, flags)
                break
            except BlockingIOError:
                pass
            yield self._readable
        self._drained = self._is_stream and not flags and 0 < len(data) < bufsize
        return data

    def recv_into(self, buffer: Buffer, nbytes: int = 0, flags: int = 0) -> Operation[int]:
        """Receive into `buffer`, at most `nbytes` bytes (0: as many as it holds). Returns how many."""
        return self._read(self._sock.recv_into, buffer, nbytes, flags)

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> Operation[tuple[bytes, Address]]:
        """Receive a datagram and the address it comes from. What exceeds `bufsize` bytes is lost."""
        return self._read(self._sock.recvfrom, bufsize, flags)

    def recvfrom_into(self, buffer: Buffer, nbytes: int = 0, flags: int = 0) -> Operation[tuple[int, Address]]:
        """`recvfrom` into `buffer`. Returns how many bytes there were, and the address."""
        return self._read(self._sock.recvfrom_into, buffer, nbytes, flags)

    def recvmsg(
        self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /
    ) -> Operation[tuple[bytes, list[tuple[int, int, bytes]], int, Address]]:
        """Receive data and ancillary data, such as descriptors: `(data, ancillary, flags, address)`."""
        return self._read(self._sock.recvmsg, bufsize, ancbufsize, flags)

    def recvmsg_into(
        self, buffers: Iterable[Buffer], ancbufsize: int = 0, flags: int = 0, /
    ) -> Operation[tuple[int, list[tuple[int, int, bytes]], int, Address]]:
        """`recvmsg` into several buffers, one after the other."""
        return self._read(self._sock.recvmsg_into, list(buffers), ancbufsize, flags)

    @operation
    def _read(self, function: Callable[..., T], *args: Any) -> Generator[Any, Any, T]:
        yield from consume_budget()
        while True:
            try:
                return function(*args)
            except BlockingIOError:
                pass
            yield self._readable

    # ---- sending ----

    @operation
    def send(self, data: Buffer, flags: int = 0, /) -> Generator[Any, Any, int]:
        """Send as much of `data` as there is room for, at least a byte, and return how much that was. A cancellation
        has sent nothing.
        """
        kernel = here.kernel or current_kernel("socket.send()")
        kernel.budget -= 1
        if kernel.budget < 0 or kernel.current.scope.cancelled is not None:  # type: ignore[union-attr]
            yield from checkpoint()
        while True:
            try:
                sent: int = self._sock.send(data, flags)
                return sent
            except BlockingIOError:
                pass
            yield self._writable

    @operation
    def sendall(self, data: Buffer, flags: int = 0) -> Generator[Any, Any, None]:
        """Send all of `data`. What this raises, `Cancelled` included, has an attribute `bytes_sent`."""
        sent = 0
        try:
            with memoryview(data).cast("B") as view:
                while True:
                    sent += yield from self.send(view[sent:], flags)
                    if sent >= len(view):
                        return
        except BaseException as error:
            error.bytes_sent = sent  # type: ignore[attr-defined]
            raise

    @operation
    def sendto(self, data: Buffer, *flags_and_address: Any) -> Generator[Any, Any, int]:
        """`sendto(data, address)` or `sendto(data, flags, address)`: send a datagram, and return its size in bytes.

        A name in the address is looked up, each time.
        """
        if not 1 <= len(flags_and_address) <= 2:
            raise TypeError("sendto() takes data and an address, or data, flags and an address")
        *flags, address = flags_and_address
        address = yield from self._resolve(address, local=False)
        return (yield from self._write(self._sock.sendto, data, *flags, address))

    @operation
    def sendmsg(
        self,
        buffers: Iterable[Buffer],
        ancdata: Iterable[tuple[int, int, Buffer]] = (),
        flags: int = 0,
        address: Address = None,
        /,
    ) -> Generator[Any, Any, int]:
        """Send what is in `buffers`, one after the other, with ancillary data. Returns how many bytes have gone out."""
        if address is not None:
            address = yield from self._resolve(address, local=False)
        return (yield from self._write(self._sock.sendmsg, list(buffers), list(ancdata), flags, address))

    @operation
    def _write(self, function: Callable[..., int], *args: Any) -> Generator[Any, Any, int]:
        yield from consume_budget()
        pause = 0.0
        while True:
            try:
                return function(*args)
            except BlockingIOError:
                pass
            if not pause:
                yield self._writable
            else:
                yield from sleep(pause)
            if not self._is_stream and self.family == getattr(stdlib, "AF_UNIX", -1):
                # There is room here, so if it does not work now, it is the addressee's queue that is full, and nobody
                # tells when there is room.
                pause = min(0.05, pause * 2) or 0.001

    def _sendfile(self, file: IO[bytes], offset: int, count: int) -> int:
        # Both numbers are asked for each time: while one waits, they may be closed, and become other files.
        return os.sendfile(self.fileno(), file.fileno(), offset, count)

    @operation
    def sendfile(self, file: IO[bytes], offset: int = 0, count: int | None = None) -> Generator[Any, Any, int]:
        """Send `count` bytes of a binary file from `offset` on, or all to its end. Returns how many have gone out.

        A regular file goes from the disk to the network without a detour through Python, where the system can do that;
        the program stands still as long as the disk takes. Another file is read in threads. Always a cancel point. What
        this raises has an attribute `bytes_sent`, and the file's position is behind what was sent, whatever happens.

        Raises:
            ValueError: the file is in text mode, or `count` is not positive; or this is no stream socket.
            OSError: sending has failed.
        """
        if "b" not in getattr(file, "mode", "b"):
            raise ValueError("sendfile() wants a file opened in binary mode")
        if not self._is_stream:
            raise ValueError("sendfile() works on stream sockets only")
        if count is not None and count <= 0:
            raise ValueError(f"count must be a whole number from 1 up, or None for all, not {count!r}")
        sent = 0
        try:
            if isinstance(self._sock, stdlib.socket) and hasattr(os, "sendfile"):
                try:
                    while count is None or sent < count:
                        block = SENDFILE_SIZE if count is None else min(SENDFILE_SIZE, count - sent)
                        done = yield from self._write(self._sendfile, file, offset + sent, block)
                        if not done:
                            break
                        sent += done
                    return sent
                except (AttributeError, OSError) as error:  # io.UnsupportedOperation is an OSError
                    if sent or getattr(error, "errno", None) not in (None, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                        raise
            yield from to_thread.run_sync(file.seek, offset)
            while count is None or sent < count:
                block = 65536 if count is None else min(65536, count - sent)
                chunk = yield from to_thread.run_sync(file.read, block)
                if not chunk:
                    break
                try:
                    yield from self.sendall(chunk)
                except BaseException as error:
                    sent += getattr(error, "bytes_sent", 0)
                    raise
                sent += len(chunk)
            return sent
        except BaseException as error:
            error.bytes_sent = sent  # type: ignore[attr-defined]
            raise
        finally:
            with suppress(OSError, AttributeError, ValueError):
                file.seek(offset + sent)
