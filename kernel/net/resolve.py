"""Names to addresses and back: `getaddrinfo`, `getnameinfo`, `getprotobyname`, off the loop.

What the system offers for this blocks: it reads files, asks servers, and may wait half a minute for one that is down.
It can't be told to stop, either. So it is called in a thread, and whoever is cancelled meanwhile leaves without it:

    task                         worker thread
    ----                         -------------
    take a token of the limiter
    yield lookup   ---------->   socket.getaddrinfo(...)
    (asleep)                       hangs
    Cancelled, gone                hangs
                                   returns; the token goes back, and the answer to nobody

* The limiter is the lookups' own, with `LOOKUPS` tokens. When the name server is down, threads pile up that nobody
  waits for any more, each with its token; they must not take those of `to_thread.run_sync`.
* This is not `to_thread.run_sync`, which makes the end of a run wait a second for threads that were abandoned and then
  complain about them, as they may be doing something that matters. A lookup only wants to know. When nobody asks any
  more, it matters to nobody, and the run ends without it.
* An address in numbers, with a port in numbers, is no question for anybody. The system answers it on the spot (5 us),
  and so do we, without a thread.
* Host names outside ASCII are encoded before the system sees them: see `encode_hostname`.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from outcome import Error, Outcome

from ..abc import HostnameResolver
from ..core.errors import RunFinishedError
from ..core.task import Task, current_kernel
from ..core.traps import Trap, consume_budget, operation
from ..inbox import KernelToken, RunVar, current_kernel_token
from ..sync import CapacityLimiter
from ..threads.cache import start_thread_soon

if TYPE_CHECKING:
    from ..core.loop import Kernel

__all__ = [
    "SystemResolver",
    "encode_hostname",
    "getaddrinfo",
    "getnameinfo",
    "getprotobyname",
    "set_custom_hostname_resolver",
]

T = TypeVar("T")

AddressInfo = tuple[int, int, int, str, tuple[Any, ...]]
"""Family, type, protocol, canonical name, and the address to connect or bind to."""

LOOKUPS: Final = 40
"""How many threads of one run look something up at once, those included that nobody waits for any more."""

_NUMERIC: Final = socket.AI_NUMERICHOST | getattr(socket, "AI_NUMERICSERV", 0)  # not everywhere: trio#3133
_NUMERIC_NAMES: Final = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV

_limiter: RunVar[CapacityLimiter] = RunVar("limiter of lookups")


class _Lookup(Trap):
    """A question that blocks. Sleep until a thread has the answer; leave without it if cancelled."""

    __slots__ = ("limiter", "question", "task", "token")

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.question = partial(function, *args)
        self.limiter = _limiter.get_or_make(lambda: CapacityLimiter(LOOKUPS))
        self.token: KernelToken = current_kernel_token()
        self.task: Task | None = None

    @operation
    def answer(self) -> Generator[Any, Any, Any]:
        yield from self.limiter.acquire_on_behalf_of(self)
        return (yield self)

    def arm(self, kernel: Kernel, task: Task) -> None:
        try:
            start_thread_soon(self.question, self._deliver)
        except BaseException:
            self.limiter.release_on_behalf_of(self)
            raise
        self.task = task

    def abort(self, kernel: Kernel, task: Task) -> bool:
        self.task = None
        return True

    def _deliver(self, outcome: Outcome[Any]) -> None:
        """In the thread."""
        try:
            self.token.run_sync_soon(self._finish, outcome)
        except RunFinishedError:
            pass  # nobody is there any more

    def _finish(self, outcome: Outcome[Any]) -> None:
        self.limiter.release_on_behalf_of(self)
        if self.task is None:
            return
        if isinstance(outcome, Error):
            outcome.error.add_note(f"in {self}")  # the system's own text does not say which name is not known
            current_kernel().wake(self.task, error=outcome.error)
        else:
            current_kernel().wake(self.task, outcome.unwrap())

    def __repr__(self) -> str:
        return f"<lookup {self.question.func.__name__}{self.question.args}>"


class SystemResolver(HostnameResolver):
    """The default: asks the system, each question in a thread. Derive from it to add something of your own."""

    __slots__ = ()

    def getaddrinfo(
        self, host: bytes | None, port: bytes | str | int | None, family: int = 0, type: int = 0, proto: int = 0,
        flags: int = 0,
    ) -> Awaitable[list[AddressInfo]]:  # fmt: skip
        """`socket.getaddrinfo` in a thread."""
        return _Lookup(socket.getaddrinfo, host, port, family, type, proto, flags).answer()

    def getnameinfo(self, sockaddr: tuple[Any, ...], flags: int) -> Awaitable[tuple[str, str]]:
        """`socket.getnameinfo` in a thread, unless both names are to be numbers."""
        return _getnameinfo(sockaddr, flags)


_resolver: RunVar[HostnameResolver | None] = RunVar("hostname resolver", None)
_system: Final = SystemResolver()


def set_custom_hostname_resolver(resolver: HostnameResolver | None) -> HostnameResolver | None:
    """Have this run's `getaddrinfo` and `getnameinfo` ask `resolver`; None brings the system's back.

    Returns the one before, or None. Not a checkpoint. Lookups that go on are not concerned. Raises RuntimeError outside
    the kernel.
    """
    before = _resolver.get()
    _resolver.set(resolver)
    return before


@operation
def getaddrinfo(
    host: bytes | str | None,
    port: bytes | str | int | None,
    family: int = 0,
    type: int = 0,
    proto: int = 0,
    flags: int = 0,
) -> Generator[Any, Any, list[AddressInfo]]:
    """The addresses of a host and a service, as `socket.getaddrinfo` gives them.

    A name outside ASCII is encoded by `encode_hostname` (the standard library uses the older IDNA 2003, and may find
    another host). Nobody is asked about numbers: "::1", 80. Everything else goes to the custom resolver if there is
    one, or to a thread.

    Always a cancel point; a schedule point if somebody must be asked. A cancellation leaves a thread to itself, which
    works on until the system gives up. At most `LOOKUPS` (40) threads of a run do so at once; the next lookup waits.

    Raises:
        socket.gaierror: the name is not known, the name server does not answer, or the arguments do not fit together.
        UnicodeError: the name can't be encoded: no host is called that.
        ValueError: there is a null character in it, where the system would stop reading.
        RuntimeError: the name needs the `idna` package, which is not installed; or used outside the kernel.
        TypeError: a name or port that is nothing of the kind.
        Exception: what a custom resolver raises.
    """
    if isinstance(host, str):
        host = encode_hostname(host)
    if isinstance(host, bytes) and b"\0" in host:
        raise ValueError(f"a host name can't have a null character in it: {host!r}")
    yield from consume_budget()
    try:
        found: list[Any] = socket.getaddrinfo(host, port, family, type, proto, flags | _NUMERIC)
        return found
    except socket.gaierror as error:
        if error.errno != socket.EAI_NONAME:
            raise
    answer = (_resolver.get() or _system).getaddrinfo(host, port, family, type, proto, flags)
    return (yield from _awaited(answer).__await__())


@operation
def getnameinfo(sockaddr: tuple[Any, ...], flags: int) -> Generator[Any, Any, tuple[str, str]]:
    """The names of the host and the service at `sockaddr`, as `socket.getnameinfo` gives them.

    A custom resolver is asked in any case. The system is asked in a thread, and without one if `flags` has both
    `NI_NUMERICHOST` and `NI_NUMERICSERV`. Checkpoints and cancellation as in `getaddrinfo`.

    Raises:
        socket.gaierror: there is no name where one is required, or the address is none.
        TypeError, OverflowError: as `socket.getnameinfo`, for things that are no address.
        RuntimeError: used outside the kernel.
        Exception: what a custom resolver raises.
    """
    yield from consume_budget()
    return (yield from _awaited((_resolver.get() or _system).getnameinfo(sockaddr, flags)).__await__())


@operation
def _getnameinfo(sockaddr: tuple[Any, ...], flags: int) -> Generator[Any, Any, tuple[str, str]]:
    if flags & _NUMERIC_NAMES == _NUMERIC_NAMES:
        return socket.getnameinfo(sockaddr, flags)
    result: tuple[str, str] = yield from _Lookup(socket.getnameinfo, sockaddr, flags).answer()
    return result


@operation
def getprotobyname(name: str) -> Generator[Any, Any, int]:
    """The number of a protocol such as "tcp", as `socket.getprotobyname` gives it. In a thread, as it is in a file.

    Always a cancel point and a schedule point; a cancellation leaves the thread to itself. Raises OSError if there is
    no such protocol.
    """
    number: int = yield from _Lookup(socket.getprotobyname, name).answer()
    return number


def encode_hostname(hostname: str) -> bytes:
    """The ASCII form of a host name, in which the system and the network know it: what `getaddrinfo` will look up.

    ASCII is left as it is. Anything else is encoded according to IDNA 2008, after the mappings of UTS 46 (capitals
    become small, full-width characters narrow), as trio and the browsers do. That takes the `idna` package, an extra of
    this one. The standard library's codec is IDNA 2003, under which some names are names of *other* hosts.

    Raises:
        UnicodeError: no name can be like that. `idna.IDNAError` is one.
        RuntimeError: the `idna` package is not installed.
    """
    if hostname.isascii():
        return hostname.encode("ascii")
    try:
        import idna
    except ImportError as error:
        raise RuntimeError(
            f"the host name {hostname!r} is not ASCII, and to encode it takes a package: pip install trapkernel[idna]. "
            "Or pass the name as bytes, encoded by you."
        ) from error
    return idna.encode(hostname, uts46=True)


async def _awaited(answer: Awaitable[T]) -> T:
    """A custom resolver's methods may be of any kind that `await` takes."""
    return await answer
