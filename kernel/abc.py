"""The interfaces: what a resource, the two ends of a channel, and a byte stream promise, whoever wrote them.

Write against these to take anybody's implementation, and derive from them to be taken. Names, methods and meanings are
trio's. A method that is shown returning an `Awaitable` may be an `async def` of yours; ours are operations, fit for
`yield from` as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .core.errors import Cancelled, EndOfChannel
from .core.ports import Clock
from .core.task import Task
from .core.traps import Trap

if TYPE_CHECKING:
    from .net.sockets import SocketType

__all__ = [
    "AsyncResource",
    "Clock",
    "HalfCloseableStream",
    "HostnameResolver",
    "Instrument",
    "Listener",
    "ReceiveChannel",
    "ReceiveStream",
    "SendChannel",
    "SendStream",
    "SocketFactory",
    "Stream",
]

Self = TypeVar("Self", bound="AsyncResource")
Receiver = TypeVar("Receiver", bound="ReceiveChannel[object]")
SendType = TypeVar("SendType", contravariant=True)
ReceiveType = TypeVar("ReceiveType", covariant=True)
ChunkReceiver = TypeVar("ChunkReceiver", bound="ReceiveStream")
StreamType = TypeVar("StreamType", bound="AsyncResource", covariant=True)


class AsyncResource(ABC):
    """Something that must be closed, and may have to wait in order to close well. `async with` closes it."""

    __slots__ = ()

    @abstractmethod
    def aclose(self) -> Awaitable[None]:
        """Close the resource, for good and in any case.

        It may wait, to part in a civil manner. If that fails, or is cancelled, the resource is closed all the same, and
        the error tells only that it was not done well. Closing what is closed already does nothing.
        """

    async def __aenter__(self: Self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self.aclose()
        except Cancelled:
            if exc is None or isinstance(exc, Cancelled):
                raise
            # A `Cancelled` never replaces a real error (trio#1559). It will be raised again at the next cancel point.


class SendChannel(AsyncResource, Generic[SendType]):
    """The end of a channel that objects are put into."""

    __slots__ = ()

    @abstractmethod
    def send(self, value: SendType) -> Awaitable[None]:
        """Send `value`, if need be after a wait.

        Raises:
            ClosedResourceError: this end is closed, or was closed by another task meanwhile.
            BrokenResourceError: the other end is closed, or the channel has failed.
            BusyResourceError: another task is sending, and this channel cannot do with two.
        """


class ReceiveChannel(AsyncResource, Generic[ReceiveType]):
    """The end of a channel that objects are taken out of. `async for value in channel:` takes all, up to the end."""

    __slots__ = ()

    @abstractmethod
    def receive(self) -> Awaitable[ReceiveType]:
        """Receive the next object, if need be after a wait.

        Raises:
            EndOfChannel: the other end is closed, and all that was sent has been received. Not an error.
            ClosedResourceError: this end is closed, or was closed by another task meanwhile.
            BrokenResourceError: the channel has failed.
            BusyResourceError: another task is receiving, and this channel cannot do with two.
        """

    def __aiter__(self: Receiver) -> Receiver:
        return self

    def __anext__(self) -> Awaitable[ReceiveType]:
        return self._next()

    async def _next(self) -> ReceiveType:
        try:
            return await self.receive()
        except EndOfChannel:
            raise StopAsyncIteration from None


class SendStream(AsyncResource):
    """The end of a byte stream that bytes are put into."""

    __slots__ = ()

    @abstractmethod
    def send_all(self, data: bytes | bytearray | memoryview) -> Awaitable[None]:
        """Send all of `data`, if need be after waits.

        Whatever exception this raises, `Cancelled` included, some of the bytes may have gone out by then. An
        implementation that knows how many says so in the exception's attribute `bytes_sent`.

        Raises:
            BusyResourceError: another task is sending, or waiting to.
            BrokenResourceError: the stream has failed, or the other end is closed.
            ClosedResourceError: this end is closed, or was closed by another task meanwhile.
        """

    @abstractmethod
    def wait_send_all_might_not_block(self) -> Awaitable[None]:
        """Wait until `send_all` could possibly do without a wait. It may return too early, and must not return late.

        For who wants to decide as late as possible what to send. Errors as in `send_all`.
        """


class ReceiveStream(AsyncResource):
    """The end of a byte stream that bytes come out of. `async for chunk in stream:` takes all, up to the end."""

    __slots__ = ()

    @abstractmethod
    def receive_some(self, max_bytes: int | None = None) -> Awaitable[bytes | bytearray]:
        """Wait for bytes and return those that are there, at least one and at most `max_bytes`; `b""` at the end.

        Raises:
            BusyResourceError: another task is receiving.
            BrokenResourceError: the stream has failed.
            ClosedResourceError: this end is closed, or was closed by another task meanwhile.
        """

    def __aiter__(self: ChunkReceiver) -> ChunkReceiver:
        return self

    def __anext__(self) -> Awaitable[bytes | bytearray]:
        return self._next()

    async def _next(self) -> bytes | bytearray:
        chunk = await self.receive_some()
        if not chunk:
            raise StopAsyncIteration
        return chunk


class Stream(SendStream, ReceiveStream):
    """A byte stream in both directions."""

    __slots__ = ()


class HalfCloseableStream(Stream):
    """A byte stream whose sending half can be ended by itself."""

    __slots__ = ()

    @abstractmethod
    def send_eof(self) -> Awaitable[None]:
        """Let the other side see the end, and go on receiving. Doing it again does nothing. Errors as in `send_all`."""


class Listener(AsyncResource, Generic[StreamType]):
    """Where connections come in, each as a stream."""

    __slots__ = ()

    @abstractmethod
    def accept(self) -> Awaitable[StreamType]:
        """Wait for a connection, and return it.

        Raises:
            ClosedResourceError: the listener is closed, or was closed by another task meanwhile.
            BusyResourceError: another task is waiting, and this listener cannot do with two.
        """


class HostnameResolver(ABC):
    """Who turns names into addresses. Put one in place with `kernel.socket.set_custom_hostname_resolver`.

    Arguments and results are those of the functions of the same names in the standard library's `socket`. Numeric
    addresses do not get here: they need nobody's help.
    """

    __slots__ = ()

    @abstractmethod
    def getaddrinfo(
        self, host: bytes | None, port: bytes | str | int | None, family: int = 0, type: int = 0, proto: int = 0,
        flags: int = 0,
    ) -> Awaitable[list[tuple[int, int, int, str, tuple[Any, ...]]]]:  # fmt: skip
        """The addresses of `host`, which is ASCII: other names have been encoded according to IDNA 2008.

        Raises:
            OSError: `socket.gaierror`, there is none.
        """

    @abstractmethod
    def getnameinfo(self, sockaddr: tuple[Any, ...], flags: int) -> Awaitable[tuple[str, str]]:
        """The names of a host and a service. Raises `socket.gaierror`, an OSError, when that fails."""


class SocketFactory(ABC):
    """Who makes sockets. Put one in place with `kernel.socket.set_custom_socket_factory`."""

    __slots__ = ()

    @abstractmethod
    def socket(self, family: int, type: int, proto: int) -> SocketType:
        """A new socket, derived from `kernel.socket.SocketType`; or raise an OSError if there can't be one."""


class Instrument:
    """Hooks that the kernel calls as things happen. Override those you want; each defaults to doing nothing.

    Pass instances to `kernel.run(..., instruments=[...])`, or later to `kernel.lowlevel.add_instrument(...)`. Hooks are
    called in the kernel's thread, between steps, and must be quick. They may look at anything and should change
    nothing. If one raises, whatever it is, that is logged and the instrument removed; the run goes on. A hook that
    nobody overrides costs nothing. All of them, empty, make a step nine times as long.

    They are trio's, in trio's order, and one more: `task_trapped`. An object with these methods will do as well.
    """

    __slots__ = ()

    def before_run(self) -> None:
        """The run begins. Not called for instruments that are added later."""

    def after_run(self) -> None:
        """The run has ended, well or not."""

    def task_spawned(self, task: Task) -> None:
        """`task` was made, and is about to be scheduled for the first time."""

    def task_scheduled(self, task: Task) -> None:
        """`task` became ready: it will run when its turn comes."""

    def before_task_step(self, task: Task) -> None:
        """`task` is about to run."""

    def task_trapped(self, task: Task, trap: Trap | None) -> None:
        """`task` has yielded `trap`; None for a checkpoint. Comes before the trap is armed."""

    def after_task_step(self, task: Task) -> None:
        """`task` has stopped running, because it trapped or ended."""

    def task_exited(self, task: Task) -> None:
        """`task` has ended; `task.outcome` says how. Comes before its last `after_task_step`."""

    def before_io_wait(self, timeout: float) -> None:
        """The loop is about to ask for files that are ready, and to sleep for up to `timeout` seconds."""

    def after_io_wait(self, timeout: float) -> None:
        """The loop has asked. `timeout` is what `before_io_wait` got."""
