"""TCP: connections to a host, listeners on a port, and a server in one call.

Connecting is where a name with several addresses makes trouble. One of them may lead nowhere, most often the IPv6 one,
and TCP takes minutes to find out. `open_tcp_stream` follows RFC 8305, "Happy Eyeballs": the addresses are tried in
turn, families alternating, and the next one's turn comes when the one before has failed, or after a quarter of a
second. The first connection that comes about wins:

    ::1         +------------------------ (no answer) -----x  closed
    192.0.2.1           +---- (no answer) -----------------x  closed
    192.0.2.2                   +--------------------------=  the stream
                0.00    0.25    0.50

The addresses and their order are the system's (RFC 6724), from one lookup of both families, and nothing is remembered
from one call to the next.
"""

from __future__ import annotations

import errno
import os
import socket as stdlib
import sys
from collections.abc import Generator
from contextlib import suppress
from itertools import chain, zip_longest
from math import inf
from typing import Any, Final

from ..core.nursery import TASK_STATUS_IGNORED, Nursery, TaskStatus, _IgnoredStatus
from ..core.task import current_kernel, current_task
from ..core.traps import operation
from ..sync import Event
from ..timeouts import move_on_after
from .resolve import AddressInfo, getaddrinfo
from .serving import Handler, HandlerErrors, HandlerNursery, serve_listeners
from .sockets import Address, SocketType, socket
from .streams import SocketListener, SocketStream

__all__ = ["open_tcp_listeners", "open_tcp_stream", "serve_tcp"]

DEFAULT_DELAY: Final = 0.25
"""Seconds between two attempts to connect: what RFC 8305 recommends."""

MAX_BACKLOG: Final = 0xFFFF
"""Systems take less if they cannot do with so many, but some only look at the lower 16 bits."""

PORT_TRIES: Final = 10


@operation
def open_tcp_stream(
    host: str | bytes,
    port: int,
    *,
    happy_eyeballs_delay: float | None = DEFAULT_DELAY,
    local_address: str | None = None,
) -> Generator[Any, Any, SocketStream]:
    """Connect to a host by TCP.

    Args:
        host: a name or an address. If a name has several addresses, the first that answers is taken.
        port: from 0 to 65535.
        happy_eyeballs_delay: seconds after which the next address is tried as well, while the one before has neither
            worked nor failed. None: not until it has failed.
        local_address: the address, or name, to connect from. Only addresses of the same family can be reached then, so
            "0.0.0.0" means IPv4, and "::" IPv6. By default the system chooses.

    Always a cancel point, before anything is done, and a schedule point. A cancellation leaves no connection behind,
    and at most a lookup that goes on in its thread. There is no timeout but the system's, which is minutes: use
    `fail_after`.

    Raises:
        OSError: no address could be connected to. What each of them had to say is in `__cause__`, an ExceptionGroup; if
            they all agree, `errno` and the class are theirs too: `ConnectionRefusedError`.
        socket.gaierror: an OSError; there is no such host, or names cannot be looked up.
        ValueError: `host` is no name; `port` or `happy_eyeballs_delay` is out of range.
        TypeError: `port` is no whole number.
    """
    if not isinstance(host, str | bytes):
        raise ValueError(f"host must be a str or bytes, not {host!r}")
    _check_port(port)
    delay = inf if happy_eyeballs_delay is None else happy_eyeballs_delay
    if not delay >= 0:
        raise ValueError(f"happy_eyeballs_delay must be a number of seconds from 0 up, or None, not {delay!r}")
    targets = alternating((yield from getaddrinfo(host, port, type=stdlib.SOCK_STREAM)))
    errors: list[OSError] = []
    sock = yield from _connect_to_first(targets, delay, local_address, errors).__await__()
    if sock is not None:
        return SocketStream(sock)
    name = host.decode("ascii", "backslashreplace") if isinstance(host, bytes) else host
    try:
        raise _failure(f"cannot connect to {f'[{name}]' if ':' in name else name}:{port}", errors)
    finally:
        errors.clear()  # their tracebacks know the frames of the attempts, which know this list


async def _connect_to_first(
    targets: list[AddressInfo], delay: float, local_address: str | None, errors: list[OSError]
) -> SocketType | None:
    """Return the first socket that connects, and close the others. None if there is none: `errors` has grown."""
    winner: SocketType | None = None

    async def attempt(target: AddressInfo, failed: Event) -> None:
        nonlocal winner
        family, type, proto, _, address = target
        try:
            sock = socket(family, type, proto)
            try:
                if local_address is not None:
                    await _bind(sock, local_address, address)
                await sock.connect(address)
                if winner is None:  # or two have connected in the same pass
                    winner = sock
                    nursery.cancel_scope.cancel("another address has answered first")
            finally:
                if winner is not sock:
                    sock.close()
        except OSError as error:
            errors.append(error)
            failed.set()

    try:
        async with Nursery(current_kernel(), current_task(), bare=True) as nursery:
            for target in targets:
                failed = Event()
                nursery.start_soon(attempt, target, failed)
                with move_on_after(delay):
                    await failed.wait()
    except BaseException:  # from outside, in the moment of success
        if winner is not None:
            winner.close()
        raise
    return winner


@operation
def _bind(sock: SocketType, local_address: str, remote: Address) -> Generator[Any, Any, None]:
    # Let connect choose the port. It knows with whom, and can use one that is in use with somebody else.
    with suppress(OSError, AttributeError):
        sock.setsockopt(stdlib.IPPROTO_IP, stdlib.IP_BIND_ADDRESS_NO_PORT, 1)
    try:
        yield from sock.bind((local_address, 0))
    except OSError as error:
        raise OSError(
            error.errno, f"cannot connect from local_address={local_address!r} to {remote!r}: {error}"
        ) from error


def alternating(targets: list[AddressInfo]) -> list[AddressInfo]:
    """Addresses in the order in which to try them: as they are, but that the families take turns."""
    families: dict[int, list[AddressInfo]] = {}
    for target in dict.fromkeys(targets):
        families.setdefault(target[0], []).append(target)
    return [target for target in chain(*zip_longest(*families.values())) if target is not None]


@operation
def open_tcp_listeners(
    port: int, *, host: str | bytes | None = None, backlog: int | None = None, reuse_port: bool = False
) -> Generator[Any, Any, list[SocketListener]]:
    """Listen for TCP connections.

    Args:
        port: from 0 to 65535. 0 stands for a free one, the same on all addresses:
            `listeners[0].socket.getsockname()[1]`.
        host: the address to listen on, or a name, which may have several. None: all addresses of this machine, IPv4 and
            IPv6. "0.0.0.0" are all of IPv4, "::" all of IPv6, and "127.0.0.1" is reached from this machine only.
        backlog: how many connections may wait to be accepted. None: as many as the system allows.
        reuse_port: let other sockets, of other processes too, listen on the same port if they say the same. The system
            divides the connections among them (SO_REUSEPORT).

    A port that was in use until just now can be listened on again (SO_REUSEADDR, but not on Windows, where it would
    mean one that is in use). An IPv6 socket takes IPv6 only. If this machine does not have a family, or no IPv6
    address, that is passed over, as long as something is left.

    Always a cancel point; a schedule point if there is a name to look up. A cancellation leaves nothing behind.

    Returns:
        one listener for each address; connections queue from now on.

    Raises:
        OSError: EADDRINUSE, the port is in use; EACCES, not everybody may listen there; EADDRNOTAVAIL, the address is
            not this machine's; `socket.gaierror`, there is no such host. Nothing listens then.
        TypeError: `port` or `backlog` is no whole number.
        ValueError: `port` or `backlog` is out of range; there is no SO_REUSEPORT on this system.
    """
    _check_port(port)
    if backlog is None:
        backlog = MAX_BACKLOG
    elif not isinstance(backlog, int):
        raise TypeError(f"backlog must be a whole number or None, not {backlog!r}")
    elif backlog < 0:
        raise ValueError(f"backlog must not be negative, and is {backlog}")
    if reuse_port and not hasattr(stdlib, "SO_REUSEPORT"):
        raise ValueError("there is no SO_REUSEPORT on this system")
    found = yield from getaddrinfo(host, port, type=stdlib.SOCK_STREAM, flags=stdlib.AI_PASSIVE)
    addresses = list(dict.fromkeys(found))
    tries = 1 if port else PORT_TRIES  # the port that is free on one address may be in use on another
    while True:
        tries -= 1
        try:
            return (yield from _listen(addresses, min(backlog, MAX_BACKLOG), reuse_port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not tries:
                raise


@operation
def _listen(addresses: list[AddressInfo], backlog: int, reuse_port: bool) -> Generator[Any, Any, list[SocketListener]]:
    """A listener for each address, all on one port; or an error, and none."""
    listeners: list[SocketListener] = []
    absent: list[OSError] = []
    try:
        for family, type, proto, _, (host, port, *rest) in addresses:
            if port == 0 and listeners:
                port = listeners[0].socket.getsockname()[1]
            try:
                sock = socket(family, type, proto)
                try:
                    _set_options(sock, reuse_port)
                    yield from sock.bind((host, port, *rest))
                    sock.listen(backlog)
                    listeners.append(SocketListener(sock))
                except BaseException:
                    sock.close()
                    raise
            except OSError as error:
                # A system without IPv6 may know nothing of it, or may have no address of the kind.
                no_ipv6 = family == stdlib.AF_INET6 and error.errno == errno.EADDRNOTAVAIL
                if error.errno != errno.EAFNOSUPPORT and not no_ipv6:
                    raise
                absent.append(error)
        if not listeners:
            raise _failure("this system has none of the addresses to listen on", absent)
    except BaseException:
        for listener in listeners:
            listener.socket.close()
        raise
    finally:
        absent.clear()
    return listeners


def _set_options(sock: SocketType, reuse_port: bool) -> None:
    if sys.platform != "win32":
        sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_REUSEADDR, 1)
    if reuse_port:
        sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_REUSEPORT, 1)
    if sock.family == stdlib.AF_INET6:
        sock.setsockopt(stdlib.IPPROTO_IPV6, stdlib.IPV6_V6ONLY, 1)


def _failure(text: str, errors: list[OSError]) -> OSError:
    """One error for several, which are its cause. If they agree on a number, it is one of that class."""
    numbers = {error.errno for error in errors}
    number = numbers.pop() if len(numbers) == 1 else None
    failure = OSError(text) if number is None else OSError(number, f"{text}: {os.strerror(number)}")
    failure.__cause__ = ExceptionGroup(text, tuple(errors)) if errors else None  # a custom resolver may find nothing
    return failure


def _check_port(port: int) -> None:
    if not isinstance(port, int):
        raise TypeError(f"port must be a whole number, not {port!r}")
    if not 0 <= port <= 0xFFFF:  # the system would look at the lower 16 bits only
        raise ValueError(f"port must be from 0 to 65535, and is {port}")


@operation
def serve_tcp(
    handler: Handler[SocketStream],
    port: int,
    *,
    host: str | bytes | None = None,
    backlog: int | None = None,
    reuse_port: bool = False,
    handler_nursery: HandlerNursery | None = None,
    max_connections: int | None = None,
    drain: float = 0.0,
    handler_errors: HandlerErrors = "raise",
    task_status: TaskStatus[list[SocketListener]] | _IgnoredStatus = TASK_STATUS_IGNORED,
) -> Generator[Any, Any, None]:
    """Listen for TCP connections, and run `handler(stream)` as a task for each, until cancelled.

    `await nursery.start(serve_tcp, handler, 0)` returns the listeners when connections are possible. This is
    `open_tcp_listeners` and `serve_listeners`: see there for the arguments, and for what else there is to know.
    """
    listeners = yield from open_tcp_listeners(port, host=host, backlog=backlog, reuse_port=reuse_port)
    yield from serve_listeners(
        handler, listeners, handler_nursery=handler_nursery, max_connections=max_connections, drain=drain,
        handler_errors=handler_errors, task_status=task_status,
    )  # fmt: skip
