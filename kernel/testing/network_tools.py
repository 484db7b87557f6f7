"""Small tools for tests with real sockets."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Final

from ..core.traps import operation
from ..net.sockets import socket
from ..net.streams import SocketListener, SocketStream

__all__ = ["open_stream_to_socket_listener"]

_LOOPBACK: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@operation
def open_stream_to_socket_listener(socket_listener: SocketListener) -> Generator[Any, Any, SocketStream]:
    """Connect to a listener of this machine, TCP or Unix, wherever it listens.

        listeners = await open_tcp_listeners(0)
        client = await open_stream_to_socket_listener(listeners[0])

    Always a cancel point; a schedule point if it waits. A cancellation leaves no connection behind.

    Raises:
        OSError: the connection failed, or the listener is closed.
    """
    sock = socket_listener.socket
    address = sock.getsockname()
    if isinstance(address, tuple):
        host, *rest = address
        address = (_LOOPBACK.get(host, host), *rest)
    client = socket(sock.family, sock.type, sock.proto)
    try:
        yield from client.connect(address)
    except BaseException:
        client.close()
        raise
    return SocketStream(client)
