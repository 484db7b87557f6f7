"""Simulated sockets: the methods of a non-blocking socket of the standard library, with no system beneath; and UDP.

Where a program can see a difference to Linux that is not on the package's list, it is a bug: the tests run the same
programs here and on the real loopback (tests/testing/test_network_like_the_real.py).
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket as stdlib
import warnings
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ...core.errors import BusyResourceError, ClosedResourceError
from ...core.loop import Kernel
from ...core.task import Task, current_kernel
from ...core.traps import Trap

if TYPE_CHECKING:
    from .world import Host, Network

__all__ = ["ANY", "PORTS", "UDP", "Address", "Ready", "Simulated"]

Address = tuple[str, int]

QUEUE: Final = 256  # datagrams that a UDP socket holds; further ones are lost
PORTS: Final = range(49152, 65536)  # those that the system gives out
ANY: Final = ("0.0.0.0", "::")


class Ready(Trap):
    """Sleep until a simulated socket is ready in one direction: what `Readiness` is for a real one."""

    __slots__ = ("_doing", "_is_ready", "_sock", "task")

    def __init__(self, sock: Simulated, doing: str, is_ready: Callable[[], bool]) -> None:
        self._sock = sock
        self._doing = doing
        self._is_ready = is_ready
        self.task: Task | None = None

    def arm(self, kernel: Kernel, task: Task) -> None:
        if self.task is not None:
            raise BusyResourceError(f"{self.task!r} is {self._doing} this socket already")
        self.task = task
        if self._is_ready():  # as with a real one, that is found at the end of the pass; until then it can be cancelled
            kernel.call_soon(self.look)

    def abort(self, kernel: Kernel, task: Task) -> bool:
        self.task = None
        return True

    def look(self) -> None:
        """Something has changed."""
        if self.task is not None and self._is_ready():
            task, self.task = self.task, None
            current_kernel().wake(task)

    def forget(self) -> None:
        if self.task is not None:
            task, self.task = self.task, None
            current_kernel().wake(
                task, error=ClosedResourceError("another task closed this socket while it was in use")
            )

    def __repr__(self) -> str:
        return f"<{self._doing} {self._sock!r}>"


class Simulated:
    """What TCP and UDP sockets have in common: the methods of a non-blocking socket of the standard library."""

    type: int

    def __init__(self, network: Network, host: Host, family: int) -> None:
        self.family = family
        self.proto = 0
        self._network = network
        self._host = host
        self._number = next(network._numbers)
        self._options: dict[tuple[int, int], Any] = {}
        self._local: Address | None = None
        self._remote: Address | None = None
        self._queue: deque[Any] = deque()  # datagrams, or connections that nobody has accepted yet
        self._error = 0  # for SO_ERROR, and for the next operation
        self._dead = False  # the error stays
        self._readable = Ready(self, "receiving from", self._can_read)
        self._writable = Ready(self, "sending on", self._can_write)
        if host.up:
            host._sockets[self] = None
        else:
            self._vanish()

    def readiness(self) -> tuple[Ready, Ready]:
        return self._readable, self._writable

    def _can_read(self) -> bool:
        raise NotImplementedError

    def _can_write(self) -> bool:
        raise NotImplementedError

    def _look(self) -> None:
        self._readable.look()
        self._writable.look()

    def is_readable(self) -> bool:
        return self._can_read()

    # ---- addresses ----

    def _target(self, address: tuple[Any, ...]) -> Address:
        """An address as the network knows it: without IPv6's way of writing IPv4."""
        ip, port = ipaddress.ip_address(address[0]), address[1]
        if not 0 <= port <= 65535:
            raise OverflowError("port must be 0-65535")
        return str(getattr(ip, "ipv4_mapped", None) or ip), port

    def _shown(self, address: Address | None) -> tuple[Any, ...]:
        """An address as this socket's family writes it."""
        if address is None:
            address = (ANY[self.family == stdlib.AF_INET6], 0)
        ip, port = address
        if self.family == stdlib.AF_INET:
            return ip, port
        return (ip if ":" in ip else f"::ffff:{ip}"), port, 0, 0

    def _local_ip(self) -> str:
        assert self._local is not None
        return self._local[0]

    def _has(self, option: str) -> bool:
        return bool(self._options.get((stdlib.SOL_SOCKET, getattr(stdlib, option, -1))))

    def _covers(self, ip: str) -> bool:
        """Whether `ip` is among the addresses that this socket is bound to."""
        bound = self._local_ip()
        if bound not in ANY:
            return bound == ip
        if ":" in ip:
            return self.family == stdlib.AF_INET6
        return self.family == stdlib.AF_INET or not self._options.get((stdlib.IPPROTO_IPV6, stdlib.IPV6_V6ONLY))

    def _takes(self, ip: str, source: Address) -> bool:
        """Whether what comes from `source` for `ip` is for this socket."""
        raise NotImplementedError

    def _excludes(self, other: Simulated) -> bool:
        """Whether the two cannot be bound to the same address, as TCP and UDP see it."""
        raise NotImplementedError

    def bind(self, address: tuple[Any, ...]) -> None:
        self._check_open()
        if self._local is not None:
            raise OSError(errno.EINVAL, "this socket has an address already")
        ip, port = self._target(address)
        if ip not in ANY and not self._host._owns(ip):
            raise OSError(errno.EADDRNOTAVAIL, f"{ip} is not an address of host {self._host.name!r}")
        self._bind(ip, port)

    def _bind(self, ip: str, port: int) -> None:
        bound = self._host._bound
        if not port:
            free = (next(self._host._ports) for _ in PORTS)
            port = next((candidate for candidate in free if (self.type, candidate) not in bound), 0)
            if not port:
                raise OSError(errno.EADDRINUSE, f"all ports of host {self._host.name!r} are in use")
        self._local = (ip, port)
        if any(self._excludes(other) for other in self._neighbours()):
            self._local = None
            raise OSError(errno.EADDRINUSE, f"port {port} is in use on host {self._host.name!r}")
        bound.setdefault((self.type, port), []).append(self)

    def _neighbours(self) -> list[Simulated]:
        """Other sockets that are bound to the same port, and to an address that this one is bound to."""
        assert self._local is not None
        ip, port = self._local
        sockets = [sock for sock in self._host._bound.get((self.type, port), ()) if sock is not self]
        return [sock for sock in sockets if sock._covers(ip) or self._covers(sock._local_ip())]

    def _bind_for(self, target: str) -> None:
        """Be bound to the one address from which `target` is reached; if need be to a port of the system's choice."""
        ip = self._source(target)
        if self._local is None:
            self._bind(ip, 0)
        else:
            self._local = (ip, self._local[1])

    def _source(self, target: str) -> str:
        """The address of this host from which `target` is reached."""
        if self._local is not None and self._local[0] not in ANY:
            return self._local[0]
        if ipaddress.ip_address(target).is_loopback:
            return target
        return self._host.ipv6 if ":" in target else self._host.ipv4

    def getsockname(self) -> tuple[Any, ...]:
        self._check_open()
        return self._shown(self._local)

    def getpeername(self) -> tuple[Any, ...]:
        self._check_open()
        if self._remote is None:
            raise OSError(errno.ENOTCONN, "this socket is not connected")
        return self._shown(self._remote)

    # ---- what has nothing to do with the network ----

    def fileno(self) -> int:
        return self._number

    def setblocking(self, flag: bool) -> None:
        pass

    def getsockopt(self, level: int, option: int, buflen: int = 0) -> Any:
        self._check_open()
        if (level, option) == (stdlib.SOL_SOCKET, stdlib.SO_ERROR):
            error, self._error = self._error, 0
            return error
        return self._options.get((level, option), b"" if buflen else 0)

    def setsockopt(self, level: int, option: int, value: Any, length: int | None = None) -> None:
        self._check_open()
        self._options[level, option] = value

    def get_inheritable(self) -> bool:
        return False

    def set_inheritable(self, inheritable: bool) -> None:
        pass

    def dup(self) -> Any:
        raise OSError(errno.EOPNOTSUPP, "a simulated socket cannot be duplicated")

    def detach(self) -> int:
        raise OSError(errno.EOPNOTSUPP, "a simulated socket has no file descriptor to give away")

    def _check_open(self) -> None:
        if self._number == -1:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def _check(self) -> None:
        """Raise what is wrong with this socket, once."""
        self._check_open()
        if self._error:
            number = self._error
            self._error = number if self._dead else 0
            raise OSError(number, os.strerror(number))

    def close(self) -> None:
        self._number = -1
        self._host._sockets.pop(self, None)
        self._release()

    def _release(self) -> None:
        """Give the port back."""
        if self._local is not None:
            key = (self.type, self._local[1])
            others = [sock for sock in self._host._bound.get(key, ()) if sock is not self]
            if others:
                self._host._bound[key] = others
            else:
                self._host._bound.pop(key, None)

    def _vanish(self) -> None:
        """The host has crashed, or the network is gone."""
        self._host._sockets.pop(self, None)
        self._release()
        self._queue.clear()
        self._error, self._dead = errno.ENETDOWN, True
        self._look()

    # ---- what only TCP can do ----

    def listen(self, backlog: int = 128) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def accept(self) -> Any:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    # ---- the other ways to receive and to send, by means of `_take` and `_give` ----

    def _take(self, size: int, flags: int) -> tuple[bytes, Any]:
        raise NotImplementedError

    def _give(self, data: bytes, address: Any) -> int:
        raise NotImplementedError

    def _receive_checked(self, size: int, flags: int) -> tuple[bytes, Any]:
        if size < 0:
            raise ValueError(f"negative buffersize: {size}")
        if flags & ~stdlib.MSG_PEEK:
            raise OSError(errno.EOPNOTSUPP, f"the simulated network knows no flag but MSG_PEEK, and got {flags}")
        return self._take(size, flags)

    def recv(self, size: int, flags: int = 0) -> bytes:
        return self._receive_checked(size, flags)[0] if size else b""

    def recvfrom(self, size: int, flags: int = 0) -> tuple[bytes, Any]:
        return self._receive_checked(size, flags)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        return self.recvfrom_into(buffer, nbytes, flags)[0]

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        with memoryview(buffer).cast("B") as view:
            data, address = self._receive_checked(nbytes or len(view), flags)
            view[: len(data)] = data
        return len(data), address

    def recvmsg(self, size: int, ancbufsize: int = 0, flags: int = 0) -> tuple[bytes, list[Any], int, Any]:
        data, address = self._receive_checked(size, flags)
        return data, [], 0, address

    def recvmsg_into(
        self, buffers: list[Any], ancbufsize: int = 0, flags: int = 0
    ) -> tuple[int, list[Any], int, Any]:  # fmt: skip
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        data, address = self._receive_checked(sum(map(len, views)), flags)
        rest = data
        for view in views:
            view[: len(rest)], rest = rest[: len(view)], rest[len(view) :]
        return len(data), [], 0, address

    def send(self, data: Any, flags: int = 0) -> int:
        return self._give(bytes(data), None)

    def sendto(self, data: Any, *flags_and_address: Any) -> int:
        return self._give(bytes(data), flags_and_address[-1])

    def sendmsg(self, buffers: list[Any], ancdata: Any = (), flags: int = 0, address: Any = None) -> int:
        if ancdata:
            raise OSError(errno.EOPNOTSUPP, "the simulated network carries no ancillary data")
        return self._give(b"".join(buffers), address)

    def __del__(self) -> None:
        if self._number != -1 and self in self._host._sockets:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)

    def __repr__(self) -> str:
        ends = " to ".join(f"{ip}:{port}" for ip, port in filter(None, (self._local, self._remote)))
        return f"<simulated {type(self).__name__} socket on {self._host.name!r}{', ' if ends else ''}{ends}>"


class UDP(Simulated):
    """Datagrams."""

    type = stdlib.SOCK_DGRAM

    def _can_read(self) -> bool:
        return bool(self._queue or self._error)

    def _can_write(self) -> bool:
        return True

    def _takes(self, ip: str, source: Address) -> bool:
        return self._covers(ip) and self._remote in (None, source)

    def _excludes(self, other: Simulated) -> bool:
        return not any(self._has(option) and other._has(option) for option in ("SO_REUSEADDR", "SO_REUSEPORT"))

    def connect(self, address: tuple[Any, ...]) -> None:
        self._check()
        target = self._target(address)
        self._bind_for(target[0])
        self._remote = target

    def shutdown(self, how: int) -> None:
        """Nothing, as there is no connection that could end. (Linux refuses what is then sent all the same.)"""
        self.getpeername()

    def _take(self, size: int, flags: int) -> tuple[bytes, Any]:
        self._check()
        if not self._queue:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        data, address = self._queue[0] if flags & stdlib.MSG_PEEK else self._queue.popleft()
        return data[:size], self._shown(address)

    def _give(self, data: bytes, address: Any) -> int:
        self._check()
        target = self._remote if address is None else self._target(address)
        if target is None:
            raise OSError(errno.EDESTADDRREQ, os.strerror(errno.EDESTADDRREQ))
        if len(data) > 65507:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        network, there = self._network, self._network._owner(target[0], self._host)
        if self._local is None:
            self._bind(ANY[self.family == stdlib.AF_INET6], 0)
        assert self._local is not None
        if there is None:
            raise OSError(errno.EHOSTUNREACH, f"the simulated network has no host with the address {target[0]}")
        source = (self._source(target[0]), self._local[1])
        what = f"{source[0]}:{source[1]} > {target[0]}:{target[1]} datagram of {len(data)}"
        far = there is not self._host
        if far and network._happens(network._loss):
            network._note(what + " lost")
            return len(data)
        for _ in range(2 if far and network._happens(network._duplicates) else 1):
            network._later(network._delay(self._host, there), self._arrive, there, data, source, target, what)
        return len(data)

    def _arrive(self, there: Host, data: bytes, source: Address, target: Address, what: str) -> None:
        network = self._network
        sock = there._find(self.type, *target, source)
        if sock is None or len(sock._queue) >= QUEUE or not network._reachable(self._host, there):
            network._note(what + " lost")
            if sock is None and network._reachable(self._host, there):
                network._later(network._delay(there, self._host), self._refused, target)
        else:
            network._note(what)
            sock._queue.append((data, source))
            sock._look()

    def _refused(self, target: Address) -> None:
        """Word has come that nobody is there. Who sends to many is not told, as it would not know whom it is about."""
        if self._remote == target and not self._error:
            self._error = errno.ECONNREFUSED
            self._look()
