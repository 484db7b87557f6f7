"""Hosts, and the network between them: who is where, what becomes of that which is under way, and when."""

from __future__ import annotations

import errno
import ipaddress
import random
import socket as stdlib
from collections.abc import Callable, Generator, Iterable
from contextvars import ContextVar
from itertools import count, cycle
from math import inf
from typing import Any, Final

from ...abc import HostnameResolver, SocketFactory
from ...core.loop import Kernel
from ...core.nursery import AsyncFn, call_async
from ...core.scopes import CancelScope
from ...core.task import current_kernel
from ...core.traps import consume_budget, operation
from ...net.resolve import set_custom_hostname_resolver
from ...net.sockets import SocketType, set_custom_socket_factory
from ..schedules import Schedule
from .sockets import PORTS, UDP, Simulated
from .tcp import TCP

__all__ = ["Event", "Host", "Network"]

LOOPBACK: Final = {stdlib.AF_INET: "127.0.0.1", stdlib.AF_INET6: "::1"}

_here: ContextVar[Host] = ContextVar("the simulated host that this runs on")


class Host:
    """One computer of a `Network`, made by `network.host(name)`.

    Attributes:
        name: what it is called, in the network's name service too.
        ipv4, ipv6: its addresses.
        up: whether it runs.
    """

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.name = name
        self.up = True
        self.ipv4 = str(ipaddress.IPv4Address("10.0.0.0") + number)
        self.ipv6 = str(ipaddress.IPv6Address("fd00::") + number)
        self.network = network
        self._sockets: dict[Simulated, None] = {}
        self._bound: dict[tuple[int, int], list[Simulated]] = {}  # by type and port
        self._scopes: dict[CancelScope, None] = {}
        self._ports = cycle(PORTS)

    @operation
    def run(self, async_fn: AsyncFn, *args: Any) -> Generator[Any, Any, Any]:
        """Run `async_fn(*args)` on this host: the sockets it makes, and all tasks it starts make, belong to it.

        Returns what that returns; or None if the host crashes meanwhile, in which case all of it is cancelled.

        Raises:
            RuntimeError: the host is down.
        """
        if not self.up:
            raise RuntimeError(f"host {self.name!r} is down: nothing can run on it before restart()")
        token = _here.set(self)
        try:
            with CancelScope() as scope:
                self._scopes[scope] = None
                coro: Any = call_async(async_fn, args, "Host.run")
                return (yield from coro)
        finally:
            self._scopes.pop(scope, None)
            _here.reset(token)

    def crash(self) -> None:
        """Stop the host at once. What runs on it is cancelled, and its sockets are gone, without a word to anybody.

        Clean-up code does run, as otherwise files and threads of this process would be left behind; but what it sends
        goes nowhere.
        """
        self.up = False
        self.network._note(f"{self.name} crashes")
        for sock in list(self._sockets):
            sock._vanish()
        for scope in list(self._scopes):
            scope.cancel(f"host {self.name!r} has crashed")

    def restart(self) -> None:
        """Let the host run again. It has forgotten all connections; programs must be started anew with `run`."""
        self.up = True
        self.network._note(f"{self.name} restarts")

    def _find(self, kind: int, ip: str, port: int, source: tuple[str, int]) -> Simulated | None:
        """For whom is what comes from `source` to this address? The more exactly a socket is bound, the better; among
        equals, which have all said SO_REUSEPORT, it is the one for which the least is queued.
        """
        found = [sock for sock in self._bound.get((kind, port), ()) if sock._takes(ip, source)]
        return max(
            found, key=lambda sock: (sock._remote is not None, sock._local_ip() == ip, -len(sock._queue)), default=None
        )

    def _owns(self, ip: str) -> bool:
        return ip in (self.ipv4, self.ipv6) or ipaddress.ip_address(ip).is_loopback

    def __repr__(self) -> str:
        return f"<Host {self.name!r}, {self.ipv4}{'' if self.up else ', down'}>"


class Network(SocketFactory, HostnameResolver):
    """The network. `with Network() as network:` puts it in the place of the real one, for this run.

    Args:
        seed: for all that is random. In an exploration the schedule decides instead, between the least and the most.
        latency: seconds from one host to another, one way; or a pair, between which each piece takes anything.
        loss: the probability with which a datagram, or a piece of a TCP stream, does not arrive.
        duplicates: the probability with which a datagram arrives twice.
        give_up: seconds after which TCP does not send the same again any more.

    Attributes:
        log: a line of text for each event so far; the same for the same seed.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        seed: int | str = 0,
        latency: float | tuple[float, float] = 0.001,
        loss: float = 0.0,
        duplicates: float = 0.0,
        give_up: float = 120.0,
    ) -> None:
        self._latency = latency if isinstance(latency, tuple) else (latency, latency)
        if not 0 <= self._latency[0] <= self._latency[1] < inf:
            raise ValueError(f"latency must be seconds from 0 up, or a pair (least, most) of them, not {latency!r}")
        for name, value in (("loss", loss), ("duplicates", duplicates)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a probability, from 0 to 1, not {value!r}")
        if not give_up > 0:
            raise ValueError(f"give_up must be a number of seconds above 0, not {give_up!r}")
        self._loss = loss
        self._duplicates = duplicates
        self._give_up = give_up
        self._random = random.Random(seed)
        self._choose: Callable[[int], int] | None = None
        self._kernel: Kernel | None = None
        self._hosts: dict[str, Host] = {}
        self._apart: set[frozenset[Host]] = set()
        self._under_way: dict[Event, None] = {}
        self._numbers = count(1 << 30)  # instead of file descriptors: beyond all that a system gives out
        self.log: list[str] = []
        self._before: Any = None

    def __enter__(self) -> Network:
        if self._kernel is not None:
            raise RuntimeError("this network is in use already")
        self._kernel = current_kernel("with Network()")
        schedule: Schedule | None = self._kernel.locals.get(Schedule)
        self._choose = schedule.choose if schedule is not None else None
        self._before = set_custom_socket_factory(self), set_custom_hostname_resolver(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """What is still under way does not arrive any more. Sockets that are still open are dead."""
        set_custom_socket_factory(self._before[0])
        set_custom_hostname_resolver(self._before[1])
        for event in list(self._under_way):
            event.withdraw()
        for host in self._hosts.values():
            for sock in list(host._sockets):
                sock._vanish()
        self._kernel = None

    # ---- the world ----

    def host(self, name: str) -> Host:
        """The host of this name, which is made when first asked for."""
        if name not in self._hosts:
            self._hosts[name] = Host(self, name, len(self._hosts) + 1)
        return self._hosts[name]

    def partition(self, *groups: Iterable[Host]) -> None:
        """Cut all connections between hosts of different groups. Those within a group stay. Adds to earlier cuts."""
        sets = [set(group) for group in groups]
        for number, one in enumerate(sets):
            for other in sets[:number]:
                self._apart.update(frozenset((a, b)) for a in one for b in other if a is not b)
        self._note("partition " + " | ".join(", ".join(sorted(host.name for host in group)) for group in sets))

    def heal(self) -> None:
        """End all partitions."""
        self._apart.clear()
        self._note("heal")

    def _reachable(self, one: Host, other: Host) -> bool:
        return one.up and other.up and frozenset((one, other)) not in self._apart

    # ---- fate ----

    def _delay(self, one: Host, other: Host) -> float:
        least, most = (0.0, 0.0) if one is other else self._latency
        if least == most:
            return least
        if self._choose is not None:
            return most if self._choose(2) else least
        return self._random.uniform(least, most)

    def _happens(self, probability: float) -> bool:
        if probability in (0, 1):
            return bool(probability)
        if self._choose is not None:
            return bool(self._choose(2))
        return self._random.random() < probability

    def _note(self, text: str) -> None:
        if self._kernel is not None:
            self.log.append(f"{self._kernel.clock.current_time():.6f} {text}")

    def _later(self, seconds: float, function: Callable[..., object], *args: Any) -> Event | None:
        if self._kernel is None:  # it is over
            return None
        event = Event(self, function, args)
        self._kernel.timers.add(self._kernel.clock.current_time() + seconds, event)
        self._under_way[event] = None
        return event

    # ---- what the kernel's hooks ask ----

    def socket(self, family: int = stdlib.AF_INET, type: int = stdlib.SOCK_STREAM, proto: int = 0) -> SocketType:
        """A socket on the host that the calling task runs on; outside `Host.run` that is one named "main"."""
        if family not in LOOPBACK or type not in (stdlib.SOCK_STREAM, stdlib.SOCK_DGRAM):
            raise OSError(errno.EAFNOSUPPORT, "the simulated network has TCP and UDP only, over IPv4 and IPv6")
        return SocketType(self._socket(family, type))

    def _socket(self, family: int, type: int, host: Host | None = None) -> Simulated:
        host = host or self._current()
        return (TCP if type == stdlib.SOCK_STREAM else UDP)(self, host, family)

    def _current(self) -> Host:
        host = _here.get(None)
        return host if host is not None and host.network is self else self.host("main")

    def _owner(self, ip: str, asking: Host) -> Host | None:
        if ipaddress.ip_address(ip).is_loopback:
            return asking
        return next((host for host in self._hosts.values() if host._owns(ip)), None)

    @operation
    def getaddrinfo(
        self, host: bytes | None, port: bytes | str | int | None, family: int = 0, type: int = 0, proto: int = 0,
        flags: int = 0,
    ) -> Generator[Any, Any, list[tuple[int, int, int, str, tuple[Any, ...]]]]:  # fmt: skip
        """The addresses of a host by its name, at once: IPv4 first."""
        yield from consume_budget()
        name = "" if host is None else host.decode("ascii")
        found = self._hosts.get(name)
        if name == "localhost":
            ips = dict(LOOPBACK)
        elif found is not None:
            ips = {stdlib.AF_INET: found.ipv4, stdlib.AF_INET6: found.ipv6}
        else:
            raise stdlib.gaierror(stdlib.EAI_NONAME, f"there is no host named {name!r} in the simulated network")
        answer: list[tuple[int, int, int, str, tuple[Any, ...]]] = []
        for its_family, ip in ips.items():
            if family in (0, its_family):
                answer += stdlib.getaddrinfo(
                    ip, port, its_family, type, proto, flags | stdlib.AI_NUMERICHOST | stdlib.AI_NUMERICSERV
                )
        if not answer:
            raise stdlib.gaierror(stdlib.EAI_NONAME, f"{name!r} has no address of this family")
        return answer

    @operation
    def getnameinfo(self, sockaddr: tuple[Any, ...], flags: int) -> Generator[Any, Any, tuple[str, str]]:
        """The name of the host that has an address."""
        yield from consume_budget()
        ip, port = sockaddr[:2]
        owner = next((host for host in self._hosts.values() if ip in (host.ipv4, host.ipv6)), None)
        if owner is None or flags & stdlib.NI_NUMERICHOST:
            if flags & stdlib.NI_NAMEREQD:
                raise stdlib.gaierror(stdlib.EAI_NONAME, f"{ip} has no name in the simulated network")
            return ip, str(port)
        return owner.name, str(port)


class Event:
    """Something on its way: a timer of the kernel's."""

    __slots__ = ("_args", "_function", "_network", "timer")

    def __init__(self, network: Network, function: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._network = network
        self._function = function
        self._args = args
        self.timer: tuple[float, float, Any] | None = None

    def expire(self, kernel: Kernel) -> None:
        self._network._under_way.pop(self, None)
        self._function(*self._args)

    def withdraw(self) -> None:
        """It does not happen. Nothing, if it has happened."""
        if self in self._network._under_way:
            del self._network._under_way[self]
            assert self._network._kernel is not None
            self._network._kernel.timers.remove(self)
