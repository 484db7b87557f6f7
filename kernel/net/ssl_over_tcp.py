"""TLS over TCP in one call: `open_tcp_stream`, `open_tcp_listeners` and `serve_tcp` with an `SSLStream` around each.

No handshake is made here. It is part of the first send or receive, so for a server it happens in the connection's own
task, and a slow client holds up nobody.
"""

from __future__ import annotations

import ssl
from collections.abc import Generator
from typing import Any

from ..core.nursery import TASK_STATUS_IGNORED, TaskStatus, _IgnoredStatus
from ..core.traps import operation
from ..streams import aclose_forcefully
from ..to_thread import run_sync
from .serving import Handler, HandlerErrors, HandlerNursery, serve_listeners
from .streams import SocketStream
from .tcp import DEFAULT_DELAY, open_tcp_listeners, open_tcp_stream
from .tls import SSLListener, SSLStream, check_context

__all__ = ["open_ssl_over_tcp_listeners", "open_ssl_over_tcp_stream", "serve_ssl_over_tcp"]


@operation
def open_ssl_over_tcp_stream(
    host: str | bytes,
    port: int,
    *,
    https_compatible: bool = False,
    ssl_context: ssl.SSLContext | None = None,
    happy_eyeballs_delay: float | None = DEFAULT_DELAY,
    local_address: str | None = None,
) -> Generator[Any, Any, SSLStream[SocketStream]]:
    """Connect to a host by TCP, to talk to it by TLS.

    Args:
        host: a name or an address. The server's certificate must be for it.
        port: from 0 to 65535.
        https_compatible: see `SSLStream`.
        ssl_context: None: a new `ssl.create_default_context()`, which trusts whom the system trusts. To read all these
            certificates takes a thread some 50 ms. For more than a few connections, make one context and pass it.
        happy_eyeballs_delay, local_address: see `open_tcp_stream`.

    Checkpoints are those of `open_tcp_stream`; a cancellation leaves no connection behind.

    Raises: what `open_tcp_stream` and `SSLStream` raise. What is wrong with the certificate shows in the handshake.
    """
    if ssl_context is None:
        ssl_context = yield from run_sync(ssl.create_default_context, abandon_on_cancel=True)
    check_context(ssl_context)
    stream = yield from open_tcp_stream(
        host, port, happy_eyeballs_delay=happy_eyeballs_delay, local_address=local_address
    )
    try:
        return SSLStream(stream, ssl_context, server_hostname=host, https_compatible=https_compatible)
    except BaseException:
        yield from aclose_forcefully(stream)
        raise


@operation
def open_ssl_over_tcp_listeners(
    port: int,
    ssl_context: ssl.SSLContext,
    *,
    host: str | bytes | None = None,
    https_compatible: bool = False,
    backlog: int | None = None,
    reuse_port: bool = False,
) -> Generator[Any, Any, list[SSLListener[SocketStream]]]:
    """Listen for TCP connections, to talk TLS on them.

    Args:
        port, host, backlog, reuse_port: see `open_tcp_listeners`.
        ssl_context: an `ssl.SSLContext` for servers, with a certificate.
        https_compatible: see `SSLStream`.

    Checkpoints and errors are those of `open_tcp_listeners`; and TypeError if `ssl_context` is no context.

    Returns:
        one listener for each address. The socket is `listener.transport_listener.socket`.
    """
    check_context(ssl_context)
    listeners = yield from open_tcp_listeners(port, host=host, backlog=backlog, reuse_port=reuse_port)
    return [SSLListener(listener, ssl_context, https_compatible=https_compatible) for listener in listeners]


@operation
def serve_ssl_over_tcp(
    handler: Handler[SSLStream[SocketStream]],
    port: int,
    ssl_context: ssl.SSLContext,
    *,
    host: str | bytes | None = None,
    https_compatible: bool = False,
    backlog: int | None = None,
    reuse_port: bool = False,
    handler_nursery: HandlerNursery | None = None,
    max_connections: int | None = None,
    drain: float = 0.0,
    handler_errors: HandlerErrors = "raise",
    task_status: TaskStatus[list[SSLListener[SocketStream]]] | _IgnoredStatus = TASK_STATUS_IGNORED,
) -> Generator[Any, Any, None]:
    """Listen for TCP connections, and run `handler(stream)` as a task for each, with an `SSLStream`; until cancelled.

    `await nursery.start(serve_ssl_over_tcp, handler, 0, ssl_context)` returns the listeners when connections are
    possible. This is `open_ssl_over_tcp_listeners` and `serve_listeners`: see there for the arguments.

    When the handler has ended the connection is closed without more ado. A handler that wants the client to know that
    this was all closes the stream itself: `async with stream:`. What a client that is not to be trusted, or speaks no
    TLS, makes the handler raise is BrokenResourceError; `handler_errors="log"` is for servers that outlive it.
    """
    listeners = yield from open_ssl_over_tcp_listeners(
        port, ssl_context, host=host, https_compatible=https_compatible, backlog=backlog, reuse_port=reuse_port
    )
    yield from serve_listeners(
        handler, listeners, handler_nursery=handler_nursery, max_connections=max_connections, drain=drain,
        handler_errors=handler_errors, task_status=task_status,
    )  # fmt: skip
