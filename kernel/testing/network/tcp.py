"""Simulated TCP: two ends, and a line from each to the other, on which everything arrives in order or not at all."""

from __future__ import annotations

import errno
import os
import socket as stdlib
import struct
from collections import deque
from math import inf
from typing import TYPE_CHECKING, Any, Final

from .sockets import ANY, Address, Simulated

if TYPE_CHECKING:
    from .world import Event, Host, Network

__all__ = ["TCP"]

WINDOW: Final = 65536  # bytes that a socket holds for its reader
FIRST_RETRY: Final = 0.2  # seconds; each further one comes after twice as long, up to
LAST_RETRY: Final = 60.0

Piece = bytes | str
"""What goes over a line: bytes, or one of these."""
_HELLO: Final = "hello"  # I have got your answer: the connection is there
_END: Final = "end"  # nothing comes after this
_RESET: Final = "reset"  # there is no such connection


class TCP(Simulated):
    """One end of a TCP connection, or a listener, or not yet either."""

    type = stdlib.SOCK_STREAM

    def __init__(self, network: Network, host: Host, family: int) -> None:
        super().__init__(network, host, family)
        self._backlog = -1  # how many may queue; a listener's
        self._listener: TCP | None = None  # for which this end was made, until it queues there
        self._peer: TCP | None = None
        self._state = "new"  # then "listening"; or "connecting" and "connected", and "over" once the other end is gone
        self._incoming = bytearray()
        self._ended = False  # nothing comes after what is incoming
        self._finished = False  # this end has sent its end
        self._line = Line(self)
        self._waiting_for: Event | None = None

    def _takes(self, ip: str, source: Address) -> bool:
        return self._state == "listening" and self._covers(ip)

    def _excludes(self, other: Simulated) -> bool:
        if self._has("SO_REUSEPORT") and other._has("SO_REUSEPORT"):
            return False
        listening = isinstance(other, TCP) and other._state == "listening"
        return listening or not (self._has("SO_REUSEADDR") and other._has("SO_REUSEADDR"))

    def listen(self, backlog: int = 128) -> None:
        self._check_open()
        if self._state not in ("new", "listening"):
            raise OSError(errno.EINVAL, "this socket is connected: it cannot listen")
        if self._local is None:
            self._bind(ANY[self.family == stdlib.AF_INET6], 0)
        if any(isinstance(other, TCP) and other._state == "listening" and self._excludes(other)
               for other in self._neighbours()):  # fmt: skip
            raise OSError(errno.EADDRINUSE, "another socket listens on this port")
        self._state = "listening"
        self._backlog = max(0, backlog)

    def getsockopt(self, level: int, option: int, buflen: int = 0) -> Any:
        if (level, option) == (stdlib.SOL_SOCKET, stdlib.SO_ACCEPTCONN):
            self._check_open()
            return int(self._state == "listening")
        return super().getsockopt(level, option, buflen)

    def getpeername(self) -> tuple[Any, ...]:
        self._check_open()
        if self._state != "connected":
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return super().getpeername()

    def _can_read(self) -> bool:
        return bool(self._error or self._incoming or self._ended or self._queue)

    def _can_write(self) -> bool:
        if self._state == "connecting":
            return bool(self._error)
        return bool(self._error) or self._finished or self._room() > 0

    def _room(self) -> int:
        """How many bytes may be sent: what is under way will have to fit in the buffer there."""
        peer = self._peer
        return WINDOW - self._line.bytes - (len(peer._incoming) if peer is not None else 0)

    # ---- connecting ----

    def connect(self, address: tuple[Any, ...]) -> None:
        self._check()
        if self._state != "new":
            raise OSError(errno.EALREADY if self._state == "connecting" else errno.EISCONN, f"{self!r} is in use")
        ip, port = self._target(address)
        ip = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(ip, ip)
        there = self._network._owner(ip, self._host)
        if there is None:
            raise OSError(errno.EHOSTUNREACH, f"the simulated network has no host with the address {ip}")
        self._bind_for(ip)
        self._remote = (ip, port)
        self._state = "connecting"
        self._ask(there, FIRST_RETRY, self._network._give_up)
        raise BlockingIOError(errno.EINPROGRESS, os.strerror(errno.EINPROGRESS))

    def _ask(self, there: Host, retry: float, left: float) -> None:
        """Send the first packet; and again, until there is an answer."""
        if self._number != -1:
            self._waiting_for = self._network._later(
                self._network._delay(self._host, there), self._knock, there, retry, left
            )

    def _knock(self, there: Host, retry: float, left: float) -> None:
        """The first packet arrives there, or does not."""
        network = self._network
        assert self._local is not None
        assert self._remote is not None
        found = there._find(self.type, *self._remote, self._local)
        far = there is not self._host
        lost = not network._reachable(self._host, there) or (far and network._happens(network._loss))
        if not lost and found is None:
            self._answer(there, None)
        elif lost or not isinstance(found, TCP) or len(found._queue) > found._backlog:  # or nobody has room for it
            if left <= 0:
                self._fail(errno.ETIMEDOUT)
            else:
                self._waiting_for = network._later(retry, self._ask, there, min(retry * 2, LAST_RETRY), left - retry)
        else:
            server = TCP(network, there, found.family)
            server._local, server._remote = self._remote, self._local
            server._state, server._peer, server._listener = "connected", self, found
            self._answer(there, server)

    def _answer(self, there: Host, server: TCP | None) -> None:
        self._waiting_for = self._network._later(self._network._delay(there, self._host), self._answered, server)

    def _answered(self, server: TCP | None) -> None:
        self._waiting_for = None
        if self._number == -1:  # closed meanwhile
            if server is not None:
                server._discard()
        elif server is None:
            self._fail(errno.ECONNREFUSED)
        else:
            self._network._note(f"{self!r} connected")
            self._state, self._peer = "connected", server
            self._line.put(_HELLO)
            self._look()

    def _discard(self) -> None:
        """The handshake was not finished, and nobody will accept this one: close it in silence."""
        self._finished = True
        self.close()

    def _fail(self, number: int) -> None:
        """The connection is over, or has not come about, with an error for whoever uses it next. What had arrived can
        still be received; and who has seen the end will see no error after it.
        """
        self._network._note(f"{self!r} fails: {errno.errorcode[number]}")
        if self._state == "connecting":
            self._state, self._remote = "new", None
        else:
            self._state, self._finished = "over", True
        if not self._ended:
            self._error = number
        self._ended = self._state == "over"
        self._line.drop()
        self._look()

    def accept(self) -> tuple[TCP, Any]:
        self._check()
        if self._state != "listening":
            raise OSError(errno.EINVAL, "this socket does not listen")
        if not self._queue:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        server: TCP = self._queue.popleft()
        return server, server._shown(server._remote)

    # ---- talking ----

    def _take(self, size: int, flags: int) -> tuple[bytes, Any]:
        self._check_open()
        data = bytes(self._incoming[:size])
        if not data:
            self._check()
            if self._state in ("new", "listening"):
                raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
            if not self._ended:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if not flags & stdlib.MSG_PEEK:
            del self._incoming[:size]
            if self._peer is not None:
                self._peer._writable.look()
        return data, None

    def _give(self, data: bytes, address: Any) -> int:
        self._check()
        if self._finished or self._state in ("new", "listening"):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        room = self._room()
        if self._state == "connecting" or (data and room <= 0):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if data:
            self._line.put(data[:room])
        return min(len(data), room)

    def shutdown(self, how: int) -> None:
        self.getpeername()
        if how in (stdlib.SHUT_RD, stdlib.SHUT_RDWR):
            self._ended = True
            self._look()
        if how in (stdlib.SHUT_WR, stdlib.SHUT_RDWR) and not self._finished:
            self._finished = True
            self._line.put(_END)
            self._look()

    def close(self) -> None:
        if self._number == -1:
            return
        super().close()
        for other in self._queue:  # connected, and nobody will ever accept them
            other._abort()
        linger = self._options.get((stdlib.SOL_SOCKET, stdlib.SO_LINGER))
        if self._incoming or (isinstance(linger, bytes) and struct.unpack("ii", linger) == (1, 0)):
            self._abort()
        elif self._state == "connected" and not self._finished:
            self._finished = True
            self._line.put(_END)

    def _abort(self) -> None:
        """Close, with a reset for the peer after what was sent before."""
        super().close()
        if self._state == "connected":
            self._line.put(_RESET)

    def _vanish(self) -> None:
        super()._vanish()
        self._incoming.clear()
        self._line.drop()
        if self._waiting_for is not None:
            self._waiting_for.withdraw()

    def _receive(self, piece: Piece) -> None:
        """Something has arrived from the peer."""
        if self not in self._host._sockets:  # closed, or of a host that has crashed meanwhile
            if isinstance(piece, bytes):  # they have nowhere to go; the other's end is nothing to mind
                self._line.drop()
                self._line.put(_RESET)
        elif isinstance(piece, bytes):
            self._incoming += piece
            self._look()
        elif piece == _RESET:
            self._fail(errno.ECONNRESET)
        elif piece == _END:
            self._ended = True
            self._look()
        else:
            listener, self._listener = self._listener, None
            assert listener is not None
            if listener in self._host._sockets:
                listener._queue.append(self)
                listener._look()
            else:
                self._abort()


class Line:
    """One direction of a connection: what was sent and has not arrived, in order."""

    def __init__(self, end: TCP) -> None:
        self._from = end
        self._pieces: deque[tuple[float, Piece]] = deque()  # when they would arrive, if nothing happened
        self._event: Event | None = None
        self._last = -inf
        self.bytes = 0

    def put(self, piece: Piece) -> None:
        """Send."""
        network, end = self._from._network, self._from
        peer = end._peer
        if network._kernel is None or peer is None or (not end._host.up and piece != _RESET):
            return
        now = network._kernel.clock.current_time()
        self._last = max(self._last, now + network._delay(end._host, peer._host))
        self._pieces.append((self._last, piece))
        self.bytes += len(piece) if isinstance(piece, bytes) else 0
        if self._event is None:
            self._event = network._later(self._last - now, self._arrive, FIRST_RETRY, network._give_up)

    def drop(self) -> None:
        """Nothing of what is under way arrives."""
        self._pieces.clear()
        self.bytes = 0
        if self._event is not None:
            self._event.withdraw()
            self._event = None

    def _arrive(self, retry: float, left: float) -> None:
        """The first piece arrives. If the way is blocked, or the piece lost, it will be sent again."""
        network, end = self._from._network, self._from
        peer = end._peer
        assert network._kernel is not None
        assert peer is not None
        self._event = None
        far = end._host is not peer._host
        if not network._reachable(end._host, peer._host) or (far and network._happens(network._loss)):
            if left > 0:
                self._event = network._later(retry, self._arrive, min(retry * 2, LAST_RETRY), left - retry)
            else:
                self._give_up()
            return
        _, piece = self._pieces.popleft()
        if isinstance(piece, bytes):
            self.bytes -= len(piece)
        network._note(f"{end!r}: {piece if isinstance(piece, str) else f'{len(piece)} bytes'}")
        if self._pieces:
            now = network._kernel.clock.current_time()
            self._event = network._later(
                max(0.0, self._pieces[0][0] - now), self._arrive, FIRST_RETRY, network._give_up
            )
        peer._receive(piece)

    def _give_up(self) -> None:
        end, peer = self._from, self._from._peer
        assert peer is not None
        if [piece for _, piece in self._pieces] == [_HELLO]:  # only the server waits for that, and gives up in silence
            self.drop()
            peer._discard()
        elif end._number != -1:
            end._fail(errno.ETIMEDOUT)
