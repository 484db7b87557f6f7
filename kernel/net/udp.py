"""UDP: datagrams, sent and received one by one or many at a time.

A datagram arrives whole, or not at all, or twice, or late; nobody is told. What is sent need not be received by anyone.
`open_udp_socket(local_address=...)` is a server's, `open_udp_socket(remote_address=...)` a client's.

A busy socket has several datagrams waiting whenever its task gets a turn. `receive_many` takes them all at once: the
trap, the wake-up and the generator are paid once per batch, 3 us of the 5 that a `receive` costs.
"""

from __future__ import annotations

import errno
import socket as stdlib
from collections.abc import Generator
from typing import Any, Final

from ..abc import AsyncResource
from ..core.errors import BusyResourceError, ClosedResourceError
from ..core.traps import consume_budget, operation
from .resolve import getaddrinfo
from .sockets import Address, Buffer, SocketType, socket

__all__ = ["UDPSocket", "open_udp_socket"]

MAX_DATAGRAM: Final = 65535  # bytes: more than fit in any, so that none is cut off
BATCH: Final = 64


@operation
def open_udp_socket(
    local_address: tuple[str | bytes | None, int] | None = None,
    *,
    remote_address: tuple[str | bytes, int] | None = None,
    reuse_port: bool = False,
    broadcast: bool = False,
) -> Generator[Any, Any, UDPSocket]:
    """A socket for datagrams.

    Args:
        local_address: `(host, port)`, where to receive. Host None: all addresses of this machine, IPv6 and IPv4 if the
            system can do both on one socket. Port 0: a free one. By default the system chooses when first needed.
        remote_address: `(host, port)`, the one peer: `send` goes there, and only what comes from there is received. If
            a name has several addresses, the first one that the system has a route for.
        reuse_port: let other sockets receive on the same port if they say the same (SO_REUSEPORT).
        broadcast: allow sending to broadcast addresses.

    Always a cancel point; a schedule point if there is a name to look up. A cancellation leaves nothing behind.

    Raises:
        OSError: the address is in use, or not this machine's, or not reachable; `socket.gaierror`, no such host.
        ValueError: there is no SO_REUSEPORT on this system.
    """
    if reuse_port and not hasattr(stdlib, "SO_REUSEPORT"):
        raise ValueError("there is no SO_REUSEPORT on this system")
    wanted, flags = (remote_address, 0) if remote_address is not None else (local_address, stdlib.AI_PASSIVE)
    host, port = wanted if wanted is not None else (None, 0)
    found = yield from getaddrinfo(host, port, type=stdlib.SOCK_DGRAM, flags=flags)
    if host is None:
        found = sorted(found, key=lambda info: info[0] != stdlib.AF_INET6)  # such a socket takes both, see below
    trouble: OSError | None = None
    for family, type, proto, _, address in found:
        try:
            sock = socket(family, type, proto)
        except OSError as error:  # this system does not know the family
            trouble = error
            continue
        try:
            if reuse_port:
                sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_REUSEPORT, 1)
            if broadcast:
                sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_BROADCAST, 1)
            if family == stdlib.AF_INET6:
                sock.setsockopt(stdlib.IPPROTO_IPV6, stdlib.IPV6_V6ONLY, host is not None)
            if remote_address is None:
                if local_address is not None:
                    yield from sock.bind(address)
            else:
                if local_address is not None:
                    yield from sock.bind(local_address)
                yield from sock.connect(address)
            return UDPSocket(sock)
        except OSError as error:
            sock.close()
            trouble = error
        except BaseException:
            sock.close()
            raise
    assert trouble is not None, "getaddrinfo returns at least one address"
    try:
        raise trouble
    finally:
        del trouble  # it knows this frame


class UDPSocket(AsyncResource):
    """A socket for datagrams, which it owns from then on. `async for data, address in it:` receives for ever.

    One task at a time may receive; any number may send.

    Attributes:
        socket: the socket, a `kernel.socket.SocketType` of type SOCK_DGRAM.

    Raises:
        TypeError, ValueError: `socket` is no such thing.

    A connected socket reports what the network told about earlier datagrams as an error of the next operation, such as
    ConnectionRefusedError: nobody listens there. It can be used on, and such errors may be ignored.
    """

    __slots__ = ("__weakref__", "_receiving", "_trouble", "socket")

    def __init__(self, socket: SocketType) -> None:
        if not isinstance(socket, SocketType):
            raise TypeError(f"UDPSocket() wants a socket of kernel.socket, not {socket!r}")
        if socket.type != stdlib.SOCK_DGRAM:
            raise ValueError(f"UDPSocket() wants a socket of type SOCK_DGRAM, not {socket!r}")
        self.socket = socket
        self._receiving = False
        self._trouble: OSError | None = None  # what the last batch ended with

    @operation
    def receive(self) -> Generator[Any, Any, tuple[bytes, Address]]:
        """Wait for a datagram; returns its data, perhaps `b""`, and the address it comes from.

        Always a cancel point, and then none was taken.

        Raises:
            BusyResourceError: another task is receiving.
            ClosedResourceError: the socket is closed, or was closed by another task meanwhile.
            OSError: see the class.
        """
        if self._receiving:
            raise BusyResourceError(f"another task is receiving from {self!r}: put a lock around it")
        self._receiving = True
        try:
            if self._trouble is not None:
                yield from consume_budget()
                error, self._trouble = self._trouble, None
                raise error
            return (yield from self.socket.recvfrom(MAX_DATAGRAM))
        except OSError as error:
            _raise_if_closed(error)
            raise
        finally:
            self._receiving = False

    @operation
    def receive_many(self, max_datagrams: int = BATCH) -> Generator[Any, Any, list[tuple[bytes, Address]]]:
        """Wait for a datagram, and return it and all others that are there, at most `max_datagrams`, as a list.

        Checkpoint and errors are those of `receive`. An error that shows after some were received waits for the next
        call.
        """
        if max_datagrams < 1:
            raise ValueError(f"max_datagrams must be a whole number from 1 up, not {max_datagrams!r}")
        batch = [(yield from self.receive())]
        if type(self.socket) is not SocketType:  # somebody's own, whose methods we must not go round
            return batch
        receive = self.socket._sock.recvfrom
        try:
            while len(batch) < max_datagrams:
                batch.append(receive(MAX_DATAGRAM))
        except BlockingIOError:
            pass
        except OSError as error:
            self._trouble = error.with_traceback(None)  # it would know this frame, and so this object
        return batch

    @operation
    def send(self, data: Buffer) -> Generator[Any, Any, None]:
        """Send a datagram to the one peer. Always a cancel point, before it; a schedule point if there is no room.

        Raises:
            OSError: EDESTADDRREQ, there is no one peer; EMSGSIZE, it is too long; or see the class.
            ClosedResourceError: the socket is closed.
        """
        try:
            yield from self.socket.send(data)
        except OSError as error:
            _raise_if_closed(error)
            raise

    @operation
    def send_to(self, data: Buffer, address: Address) -> Generator[Any, Any, None]:
        """Send a datagram to `address`, `(host, port)`. A name is looked up, each time. Otherwise as `send`."""
        try:
            yield from self.socket.sendto(data, address)
        except OSError as error:
            _raise_if_closed(error)
            raise

    @operation
    def aclose(self) -> Generator[Any, Any, None]:
        """Close the socket, in any case: who waits on it wakes with ClosedResourceError. Then a cancel point."""
        self.socket.close()
        yield from consume_budget()

    def __aiter__(self) -> UDPSocket:
        return self

    @operation
    def __anext__(self) -> Generator[Any, Any, tuple[bytes, Address]]:
        return (yield from self.receive())

    def __repr__(self) -> str:
        return f"<UDPSocket on {self.socket!r}>"


def _raise_if_closed(error: OSError) -> None:
    if error.errno == errno.EBADF:
        raise ClosedResourceError("this socket was closed before") from error
