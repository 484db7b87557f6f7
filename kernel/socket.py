"""The standard library's `socket` module for this kernel: the same names, and `await` where something may have to wait.

    from kernel import socket

    sock = socket.socket()
    await sock.connect(("127.0.0.1", 8000))
    await sock.sendall(b"hello")

Constants, exceptions and the functions that only compute are the standard library's own. What waits is written anew as
an operation: the methods of sockets, `getaddrinfo`, `getnameinfo`, `getprotobyname`. What would block the program is
missing, and says what to use instead.
"""

from __future__ import annotations

import socket as _stdlib
from socket import *  # noqa: F403
from typing import TYPE_CHECKING

from .net.resolve import (  # type: ignore[assignment]  # noqa: F401
    getaddrinfo,
    getnameinfo,
    getprotobyname,
    set_custom_hostname_resolver,
)
from .net.sockets import (  # type: ignore[assignment]  # noqa: F401
    SocketType,
    from_stdlib_socket,
    fromfd,
    set_custom_socket_factory,
    socket,
    socketpair,
)

_INSTEAD = {
    "create_connection": "use kernel.open_tcp_stream()",
    "create_server": "use kernel.open_tcp_listeners()",
    "getdefaulttimeout": "sockets have no timeouts here; use kernel.move_on_after() or kernel.fail_after()",
    "setdefaulttimeout": "sockets have no timeouts here; use kernel.move_on_after() or kernel.fail_after()",
    "gethostbyaddr": "use kernel.socket.getnameinfo()",
    "gethostbyname": "use kernel.socket.getaddrinfo()",
    "gethostbyname_ex": "use kernel.socket.getaddrinfo()",
    "getfqdn": "use kernel.socket.getnameinfo()",
    "getservbyname": "use socket.getservbyname() of the standard library: it reads a file",
    "getservbyport": "use socket.getservbyport() of the standard library: it reads a file",
    "SocketIO": "use kernel.SocketStream",
    "timeout": "sockets have no timeouts here",
    "close": "use the method close() of the socket",
    "dup": "use the method dup() of the socket",
    "fromshare": "use from_stdlib_socket(socket.fromshare(...))",
    "send_fds": "use kernel.send_fds()",
    "recv_fds": "use kernel.receive_fds()",
}

if not TYPE_CHECKING:
    for _name in _INSTEAD:
        globals().pop(_name, None)
    del _name

    def __getattr__(name: str) -> object:
        if name in _INSTEAD:
            raise AttributeError(f"kernel.socket has no {name}: {_INSTEAD[name]}", name=name, obj=None)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_OWN = [
    "SocketType",
    "from_stdlib_socket",
    "fromfd",
    "getaddrinfo",
    "getnameinfo",
    "getprotobyname",
    "set_custom_hostname_resolver",
    "set_custom_socket_factory",
    "socket",
    "socketpair",
]

__all__ = sorted({name for name in _stdlib.__all__ if name in globals()}.union(_OWN))
