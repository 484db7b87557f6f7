"""Servers: accept connections, and run a handler for each.

    async def handler(stream):
        async for chunk in stream:
            await stream.send_all(chunk)

    await serve_tcp(handler, 8000, max_connections=1000, drain=10)

This is the part that has nothing to do with TCP: whatever has an `accept()` can be served. How it is made:

    nursery of the acceptors     one task per listener: accept, start a handler, accept, ...
      shelter                    keeps a cancellation from outside away from the handlers, if they are to be drained
        nursery of the handlers  one task per connection

A server is stopped by cancelling it. The acceptors leave at once and close their listeners. Then the shelter gets a
deadline: the `drain` seconds, or what is left of the grace of who cancels, whichever is over first.

Rules:

* Nobody is accepted who cannot be served. While `max_connections` handlers run, the next one waits in the system's
  queue.
* A system that is short of descriptors or memory does not end a server. It pauses for a moment, says so in the log, and
  tries again.
* Every stream is closed when its handler has ended, in whatever way.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Generator, Sequence
from functools import partial
from math import inf, isnan
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

from ..abc import AsyncResource, HalfCloseableStream, Listener, Stream
from ..children import open_nursery
from ..cleanup import cleanup
from ..core.errors import BrokenResourceError, BusyResourceError, Cancelled, TooSlowError
from ..core.nursery import TASK_STATUS_IGNORED, Nursery, TaskStatus, _IgnoredStatus, call_async
from ..core.scopes import CancelScope
from ..core.task import current_kernel, current_task, name_of
from ..core.traps import checkpoint_if_cancelled, operation, sleep
from ..groups import unwrap_single
from ..streams import aclose_forcefully
from ..sync import Event, Semaphore
from ..timeouts import move_on_after
from .sockets import Buffer
from .streams import SocketStream

__all__ = ["TimeoutStream", "serve_listeners"]

T_Stream = TypeVar("T_Stream", bound=AsyncResource)
T_Transport = TypeVar("T_Transport", bound=Stream)
Handler = Callable[[T_Stream], Awaitable[object] | Generator[Any, Any, object]]
HandlerErrors = Literal["raise", "log"]

SHORTAGES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
PAUSE: Final = 0.1
"""Seconds before the next try when the system is short of something."""
EPISODE: Final = 60.0
"""Seconds without a shortage after which the next one is news."""
PIECE: Final = 65536

_log = logging.getLogger("kernel.serve_listeners")


class HandlerNursery(Protocol):
    """Where handlers are started: a nursery, or anything else that has this method."""

    def start_soon(self, async_fn: Any, /, *args: Any) -> object: ...


@operation
def serve_listeners(
    handler: Handler[T_Stream],
    listeners: Sequence[Listener[T_Stream]],
    *,
    handler_nursery: HandlerNursery | None = None,
    max_connections: int | None = None,
    drain: float = 0.0,
    handler_errors: HandlerErrors = "raise",
    task_status: TaskStatus[Any] | _IgnoredStatus = TASK_STATUS_IGNORED,
) -> Generator[Any, Any, None]:
    """Accept connections from `listeners`, and run `handler(stream)` as a task for each, until cancelled.

    Args:
        handler: an async function, or a generator function in generator style. The stream is closed when it has ended.
        listeners: any number of them. They are closed in the end, however that comes.
        handler_nursery: where the handlers are started. None: in a nursery of this call's own, so that none of them
            outlives it.
        max_connections: how many handlers may run at once. While so many do, nothing is accepted. (But for one case:
            two listeners have a connection each when there is room for one. The second one then waits, accepted.)
        drain: how many seconds handlers may go on when this is cancelled. New connections are not accepted any more,
            the listeners are closed. `inf` leaves it to the `grace` of who cancels. Not for a `handler_nursery`, whose
            handlers go on anyway.
        handler_errors: what becomes of an `Exception` from a handler. "raise": it ends the server, and all other
            handlers. "log": it ends that connection and is logged, with its traceback; what is only the peer's doing,
            BrokenResourceError and TooSlowError, as a warning of one line.
        task_status: `await nursery.start(serve_listeners, handler, listeners)` returns `listeners`.

    When the system is short of descriptors or memory, accepting is tried again ten times a second. The logger,
    "kernel.serve_listeners", gets an error, but not again until a minute has passed without a shortage.

    Always a cancel point and a schedule point. Ends when cancelled, or with an error; never returns. Cost: a task per
    connection.

    Raises:
        ExceptionGroup: one or several handlers have failed.
        OSError: accepting has failed for another reason than a shortage.
        ClosedResourceError: somebody has closed one of the listeners.
        ValueError: an argument is out of range; there are no listeners; both `drain` and `handler_nursery`.
        TypeError: `max_connections` is no whole number.
    """
    try:
        _check(listeners, handler_nursery, max_connections, drain, handler_errors)
    except BaseException:
        for listener in listeners:
            yield from aclose_forcefully(listener)
        raise
    server = _Server(handler, max_connections, handler_errors == "log")
    if handler_nursery is not None:
        server.start_soon = handler_nursery.start_soon
        serving = _serve(server, listeners, task_status)
    else:
        serving = _serve_and_drain(server, listeners, drain, task_status)
    yield from serving.__await__()


def _check(
    listeners: Sequence[object],
    handler_nursery: object,
    max_connections: int | None,
    drain: float,
    handler_errors: str,
) -> None:
    if not listeners:
        raise ValueError("there are no listeners to serve")
    if max_connections is not None and not isinstance(max_connections, int):
        raise TypeError(f"max_connections must be a whole number or None, not {max_connections!r}")
    if max_connections is not None and max_connections < 1:
        raise ValueError(f"max_connections must be at least 1, not {max_connections}")
    if not drain >= 0:
        raise ValueError(f"drain must be a number of seconds from 0 up, not {drain!r}")
    if drain and handler_nursery is not None:
        raise ValueError(
            "drain= is for the server's own nursery: handlers in a handler_nursery go on for as long as that does"
        )
    if handler_errors not in ("raise", "log"):
        raise ValueError(f'handler_errors must be "raise" or "log", not {handler_errors!r}')


async def _serve(server: _Server[Any], listeners: Sequence[Listener[Any]], task_status: Any) -> None:
    """With the handlers elsewhere."""
    async with Nursery(current_kernel(), current_task(), bare=True) as acceptors:
        for listener in listeners:
            acceptors.start_soon(server.accept_from, listener)
        task_status.started(listeners)


async def _serve_and_drain(
    server: _Server[Any], listeners: Sequence[Listener[Any]], drain: float, task_status: Any
) -> None:
    """With the handlers here."""
    async with Nursery(current_kernel(), current_task(), bare=True) as acceptors:
        with cleanup(inf) if drain else CancelScope() as shelter:
            async with open_nursery() as handlers:
                server.start_soon = partial(handlers.start_soon, name=name_of(server.handler))
                for listener in listeners:
                    acceptors.start_soon(server.accept_from, listener)
                task_status.started(listeners)
                await server.over.wait()
                shelter.deadline = min(shelter.deadline, current_kernel().clock.current_time() + drain)


class _Server(Generic[T_Stream]):
    """What the acceptors and the handlers of one server know in common.

    Attributes:
        start_soon: starts a handler where handlers are to live.
        over: set when an acceptor has ended: the others have been cancelled as well, or will be.
    """

    start_soon: Callable[..., object]

    def __init__(self, handler: Handler[T_Stream], max_connections: int | None, log: bool) -> None:
        self.handler = handler
        self.over = Event()
        self._places = None if max_connections is None else Semaphore(max_connections)
        self._log = log
        self._last_shortage = -inf

    async def accept_from(self, listener: Listener[T_Stream]) -> None:
        """One task per listener runs this."""
        async with listener:
            try:
                while True:
                    await self._accept_one(listener)
            finally:
                self.over.set()

    async def _accept_one(self, listener: Listener[T_Stream]) -> None:
        if self._places is not None:
            async with self._places:
                pass  # there is room, so accept; to keep the place meanwhile would keep it from the other listeners
        try:
            stream = await listener.accept()
        except OSError as error:
            if error.errno not in SHORTAGES:
                raise
            self._tell(error)
            await sleep(PAUSE)
            return
        try:
            if self._places is not None:
                await self._places.acquire()
            await checkpoint_if_cancelled()  # the nursery of the handlers may be closed by now
            self.start_soon(self._handle, stream)
        except BaseException:
            await aclose_forcefully(stream)
            raise

    def _tell(self, shortage: OSError) -> None:
        now = current_kernel().clock.current_time()
        if now - self._last_shortage > EPISODE:
            _log.error("no connection can be accepted: %s. Trying again every %g s", shortage, PAUSE)
        self._last_shortage = now

    @operation
    def _handle(self, stream: T_Stream) -> Generator[Any, Any, None]:
        try:
            coro: Any = call_async(self.handler, (stream,), "serve_listeners")
            yield from coro
        except Exception as error:
            if not self._log:
                raise
            if _is_the_peers(error):
                _log.warning("%r was given up: %s", stream, repr(unwrap_single(error)))
            else:
                _log.exception("the handler of %r has failed", stream)
        finally:
            try:
                if type(stream) is SocketStream:
                    stream.socket.close()  # type: ignore[attr-defined]  # the same; saves the 6 us of a scope
                else:
                    yield from aclose_forcefully(stream)
            finally:
                if self._places is not None:
                    self._places.release()


def _is_the_peers(error: Exception) -> bool:
    kinds = (BrokenResourceError, TooSlowError)
    return isinstance(error, kinds) or (isinstance(error, ExceptionGroup) and error.split(kinds)[1] is None)


class TimeoutStream(HalfCloseableStream, Generic[T_Transport]):
    """A stream that does not wait for its peer any longer than `seconds`.

    Only the time spent waiting for the other side counts, so a handler may take its own time. And it is the time
    without any progress: what is sent goes out in pieces of 64 KiB, each with a timeout of its own. So a peer that is
    slow, but steady, is served, if it reads a third of what the system's buffer holds in `seconds`: only then does the
    system take more. For a limit on a whole request, use `fail_after` in the handler.

    Args:
        transport_stream: the stream beneath, which it owns from then on.
        seconds: the longest wait; `inf` for no limit. Settable, as an attribute of the same name.

    Raises:
        ValueError: `seconds` is not above 0.

    Cost: 2 us for each call.
    """

    __slots__ = ("__weakref__", "_seconds", "_sending", "transport_stream")

    def __init__(self, transport_stream: T_Transport, seconds: float) -> None:
        self.transport_stream = transport_stream
        self.seconds = seconds
        self._sending = False

    @property
    def seconds(self) -> float:
        """The longest wait. A new value counts from the next wait on."""
        return self._seconds

    @seconds.setter
    def seconds(self, seconds: float) -> None:
        if isnan(seconds) or seconds <= 0:
            raise ValueError(f"seconds must be a number above 0, not {seconds!r}")
        self._seconds = seconds

    @operation
    def receive_some(self, max_bytes: int | None = None) -> Generator[Any, Any, bytes | bytearray]:
        """As the transport's. Raises TooSlowError if nothing has come for `seconds`; nothing is lost then."""
        with move_on_after(self._seconds):
            # A coroutine or an operation; in an operation one can delegate to both.
            data: bytes | bytearray = yield from self.transport_stream.receive_some(max_bytes)  # type: ignore[misc]
            return data
        raise TooSlowError(f"nothing was received for {self._seconds:g} seconds")

    @operation
    def send_all(self, data: Buffer) -> Generator[Any, Any, None]:
        """As the transport's. Raises TooSlowError if less than a piece has gone out in `seconds`.

        What this raises has an attribute `bytes_sent` if the transport's errors have one.
        """
        self._start_sending()
        sent = 0
        try:
            with memoryview(data).cast("B") as view:
                while True:
                    sent += yield from self._send_piece(view[sent : sent + PIECE])
                    if sent >= len(view):
                        return
        except BaseException as error:
            if hasattr(error, "bytes_sent"):
                error.bytes_sent += sent
            raise
        finally:
            self._sending = False

    @operation
    def _send_piece(self, piece: memoryview) -> Generator[Any, Any, int]:
        slow = TooSlowError(f"the other side has not taken {len(piece)} bytes in {self._seconds:g} seconds")
        with move_on_after(self._seconds):
            try:
                yield from self.transport_stream.send_all(piece)  # type: ignore[misc]
                return len(piece)
            except Cancelled as cancelled:
                if hasattr(cancelled, "bytes_sent"):
                    slow.bytes_sent = cancelled.bytes_sent  # type: ignore[attr-defined]
                raise
        raise slow

    @operation
    def wait_send_all_might_not_block(self) -> Generator[Any, Any, None]:
        """As the transport's. Raises TooSlowError after `seconds`."""
        self._start_sending()
        try:
            with move_on_after(self._seconds):
                yield from self.transport_stream.wait_send_all_might_not_block()  # type: ignore[misc]
                return
            raise TooSlowError(f"there was no room to send for {self._seconds:g} seconds")
        finally:
            self._sending = False

    @operation
    def send_eof(self) -> Generator[Any, Any, None]:
        """As the transport's. Raises TooSlowError after `seconds`, and TypeError if it has no such method."""
        if not isinstance(self.transport_stream, HalfCloseableStream):
            raise TypeError(f"{self.transport_stream!r} cannot end one direction alone: it has no send_eof()")
        self._start_sending()
        try:
            with move_on_after(self._seconds):
                yield from self.transport_stream.send_eof()  # type: ignore[misc]
                return
            raise TooSlowError(f"the end could not be sent for {self._seconds:g} seconds")
        finally:
            self._sending = False

    @operation
    def aclose(self) -> Generator[Any, Any, None]:
        """Close the transport; after `seconds` without waiting any longer for the other side."""
        with move_on_after(self._seconds):
            yield from self.transport_stream.aclose()  # type: ignore[misc]

    def _start_sending(self) -> None:
        if self._sending:
            raise BusyResourceError(f"another task is sending on {self!r}: put a lock around it")
        self._sending = True

    def __repr__(self) -> str:
        return f"<TimeoutStream of {self._seconds:g} s over {self.transport_stream!r}>"
