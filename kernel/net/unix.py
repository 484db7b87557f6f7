"""Unix sockets: streams between processes of one machine, through a path in the file system. POSIX only.

They are faster than TCP, and can do two things more: tell who is at the other end (`peer_credentials`), and hand over
open files (`send_fds`, `receive_fds`).

A listening socket leaves its path behind when its process ends, and then nobody can listen there until it is removed.
So `open_unix_listener` takes a path over if nobody listens on it any more, which connecting shows, and its `aclose`
removes the path if it is still its own.

On Linux, a path that begins with a zero byte is no file but a name in a space of its own, and goes with the socket.
"""

from __future__ import annotations

import array
import errno
import os
import socket as stdlib
import stat
import struct
import sys
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from .. import to_thread
from ..core.errors import BrokenResourceError, BusyResourceError
from ..core.nursery import TASK_STATUS_IGNORED, TaskStatus, _IgnoredStatus
from ..core.traps import consume_budget, operation
from .serving import Handler, HandlerErrors, HandlerNursery, serve_listeners
from .sockets import Buffer, SocketType, socket
from .streams import SocketListener, SocketStream, _translated

__all__ = [
    "PeerCredentials",
    "UnixListener",
    "open_unix_listener",
    "open_unix_socket",
    "peer_credentials",
    "receive_fds",
    "send_fds",
    "serve_unix",
]

HAVE_UNIX: Final = hasattr(stdlib, "AF_UNIX")
FD_SIZE: Final = array.array("i").itemsize
MAX_FDS: Final = 253  # SCM_MAX_FD of Linux: it takes no more in one message

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]


@operation
def open_unix_socket(filename: Path) -> Generator[Any, Any, SocketStream]:
    """Connect with whoever listens on a Unix socket.

    Always a cancel point, before anything is done. A cancellation leaves no connection behind.

    Raises:
        FileNotFoundError, ConnectionRefusedError, PermissionError: OSErrors; nobody listens there, or it is forbidden.
        RuntimeError: this system has no Unix sockets.
    """
    _check_system()
    yield from consume_budget()
    sock = socket(stdlib.AF_UNIX, stdlib.SOCK_STREAM)
    try:
        yield from sock.connect(os.fspath(filename))
        return SocketStream(sock)
    except BaseException:
        sock.close()
        raise


class UnixListener(SocketListener):
    """A listener on a path, which it removes when it is closed, if the path is still its own."""

    __slots__ = ("_identity", "_path")

    def __init__(self, socket: SocketType) -> None:
        super().__init__(socket)
        self._path = socket.getsockname()
        self._identity: tuple[int, int] | None = None
        if self._path and self._path[:1] not in ("\0", b"\0"):
            with suppress(OSError):
                self._identity = _identity(self._path)

    @operation
    def aclose(self) -> Generator[Any, Any, None]:
        """Close the listener and remove its path, in any case. Then a cancel point."""
        # Before closing: as long as it is open, nobody takes the path over.
        if self.socket.fileno() != -1 and self._identity is not None:
            with suppress(OSError):
                if _identity(self._path) == self._identity:
                    os.unlink(self._path)
        yield from super().aclose()

    def __repr__(self) -> str:
        return f"<UnixListener on {self.socket!r}>"


@operation
def open_unix_listener(
    path: Path, *, mode: int | None = None, backlog: int | None = None
) -> Generator[Any, Any, UnixListener]:
    """Listen on a Unix socket.

    Args:
        path: where in the file system; at most 107 bytes on Linux. Left behind by a process that has gone, it is taken
            over.
        mode: the permissions of the path, such as 0o600: who may write may connect. None: what the umask leaves.
        backlog: how many connections may wait to be accepted. None: as many as the system allows.

    Always a cancel point, before anything is done; works in a thread, as file systems may be slow. A cancellation
    leaves nothing behind.

    Raises:
        OSError: EADDRINUSE, somebody listens there, or it is a file of another kind; ENOENT, there is no such
            directory; EACCES, it is not allowed; and others.
        ValueError: `backlog` is negative.
        RuntimeError: this system has no Unix sockets.
    """
    _check_system()
    if backlog is not None and backlog < 0:
        raise ValueError(f"backlog must not be negative, and is {backlog}")
    sock = stdlib.socket(stdlib.AF_UNIX, stdlib.SOCK_STREAM)
    try:
        yield from to_thread.run_sync(_listen, sock, os.fspath(path), mode, 0xFFFF if backlog is None else backlog)
        return UnixListener(SocketType(sock))
    except BaseException:
        sock.close()
        raise


def _listen(sock: stdlib.socket, path: Any, mode: int | None, backlog: int) -> None:
    """In a thread. What a process that has gone has left at `path` is taken away first."""
    abstract = path[:1] in ("", b"", "\0", b"\0")
    try:
        sock.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or abstract or not _is_abandoned(path):
            raise
        os.unlink(path)
        sock.bind(path)
    try:
        if mode is not None and not abstract:
            os.chmod(path, mode)
        sock.listen(backlog)  # before this nobody can connect, whatever the mode
    except BaseException:
        if not abstract:
            os.unlink(path)
        raise


def _is_abandoned(path: Any) -> bool:
    """Whether there is a socket at `path` on which nobody listens."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with stdlib.socket(stdlib.AF_UNIX, stdlib.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) == errno.ECONNREFUSED


def _identity(path: Any) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


@operation
def serve_unix(
    handler: Handler[SocketStream],
    path: Path,
    *,
    mode: int | None = None,
    backlog: int | None = None,
    handler_nursery: HandlerNursery | None = None,
    max_connections: int | None = None,
    drain: float = 0.0,
    handler_errors: HandlerErrors = "raise",
    task_status: TaskStatus[Sequence[UnixListener]] | _IgnoredStatus = TASK_STATUS_IGNORED,
) -> Generator[Any, Any, None]:
    """Listen on a Unix socket, and run `handler(stream)` as a task for each connection, until cancelled.

    `await nursery.start(serve_unix, handler, path)` returns a list with the listener when connections are possible.
    This is `open_unix_listener` and `serve_listeners`: see there for the arguments, and for what else there is to know.
    """
    listener = yield from open_unix_listener(path, mode=mode, backlog=backlog)
    yield from serve_listeners(
        handler, [listener], handler_nursery=handler_nursery, max_connections=max_connections, drain=drain,
        handler_errors=handler_errors, task_status=task_status,
    )  # fmt: skip


# ---- who is there -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PeerCredentials:
    """Who is at the other end of a Unix socket, as the system saw it when the connection was made.

    Attributes:
        pid: the process; None where the system does not tell. It may have ended since, and the number be another's.
        uid: the user it ran as.
        gid: its group.
    """

    pid: int | None
    uid: int
    gid: int


def peer_credentials(stream: SocketStream) -> PeerCredentials:
    """Who has connected, or who listens. The system says so, not the peer, so it can be relied on. Not a checkpoint.

    Raises:
        OSError: the stream is closed, or on no Unix socket.
        RuntimeError: this system does not tell.
    """
    sock = stream.socket
    if sock.fileno() != -1 and sock.family != getattr(stdlib, "AF_UNIX", -1):
        raise OSError(errno.EOPNOTSUPP, f"only Unix sockets know who is at the other end, and this is {sock!r}")
    if hasattr(stdlib, "SO_PEERCRED"):
        return PeerCredentials(*struct.unpack("iII", sock.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_PEERCRED, 12)))
    if sys.platform == "darwin":  # LOCAL_PEERCRED: struct xucred, with the version, the uid, and a list of groups
        level, peercred, peerpid = 0, 1, 2
        _, uid, _, gid = struct.unpack_from("2IhxxI", sock.getsockopt(level, peercred, 76))
        return PeerCredentials(sock.getsockopt(level, peerpid), uid, gid)
    raise RuntimeError("this system does not tell who is at the other end of a Unix socket")


# ---- handing over open files --------------------------------------------------------------------------


@operation
def send_fds(stream: SocketStream, data: Buffer, fds: Sequence[int]) -> Generator[Any, Any, None]:
    """Send `data`, and with its first byte duplicates of the descriptors `fds`. The caller's stay open.

    Always a cancel point, before anything is sent. What this raises has an attribute `bytes_sent`: if it is above 0,
    the descriptors have gone out.

    Raises:
        ValueError: there are no data (they would be lost on the way), or too many descriptors.
        OSError: EBADF, one of `fds` is not open.
        BrokenResourceError, ClosedResourceError, BusyResourceError: as `SocketStream.send_all`.
    """
    if not memoryview(data).nbytes:
        raise ValueError("descriptors travel with data: send at least one byte")
    if len(fds) > MAX_FDS:
        raise ValueError(f"at most {MAX_FDS} descriptors fit in one message, not {len(fds)}")
    with memoryview(data).cast("B") as view:
        sent = 0
        try:
            stream._start_sending()
            try:
                ancillary = [(stdlib.SOL_SOCKET, stdlib.SCM_RIGHTS, array.array("i", fds).tobytes())]
                sent = yield from stream.socket.sendmsg([view], ancillary)
            except OSError as error:
                if error.errno == errno.EBADF and stream.socket.fileno() != -1:
                    raise  # one of the fds
                raise _translated(error, stream) from error
            finally:
                stream._sending = False
            if sent < len(view):
                yield from stream.send_all(view[sent:])
        except BaseException as error:
            error.bytes_sent = sent + getattr(error, "bytes_sent", 0)  # type: ignore[attr-defined]
            raise


@operation
def receive_fds(
    stream: SocketStream, max_bytes: int = 65536, max_fds: int = MAX_FDS
) -> Generator[Any, Any, tuple[bytes, list[int]]]:
    """Receive bytes, and the descriptors that were sent with them: `(data, fds)`; `(b"", [])` at the end.

    The descriptors are the caller's, to be closed by it; programs that are started do not inherit them. Data that came
    without descriptors end where such with some begin. `receive_some` would drop descriptors.

    Always a cancel point, and then nothing was received.

    Raises:
        BrokenResourceError: more than `max_fds` came with one message (they have been closed, and the data are lost),
            or the connection has failed.
        ClosedResourceError, BusyResourceError, ValueError: as `SocketStream.receive_some`.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be a whole number from 1 up, not {max_bytes!r}")
    if stream._receiving:
        raise BusyResourceError(f"another task is receiving from {stream!r}: put a lock around it")
    stream._receiving = True
    try:
        flags = getattr(stdlib, "MSG_CMSG_CLOEXEC", 0)
        data, ancillary, flags, _ = yield from stream.socket.recvmsg(
            max_bytes, stdlib.CMSG_SPACE(max_fds * FD_SIZE), flags
        )
    except OSError as error:
        raise _translated(error, stream) from error
    finally:
        stream._receiving = False
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == stdlib.SOL_SOCKET and kind == stdlib.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % FD_SIZE])
    if not hasattr(stdlib, "MSG_CMSG_CLOEXEC"):
        for fd in fds:
            os.set_inheritable(fd, False)
    if flags & stdlib.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        raise BrokenResourceError(f"more than max_fds={max_fds} descriptors were sent with one message")
    return data, list(fds)


def _check_system() -> None:
    if not HAVE_UNIX:
        raise RuntimeError("this system has no Unix sockets")
