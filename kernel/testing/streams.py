"""Byte streams without a network: for testing what is written on streams.

    memory      what is sent lies in a buffer without limit until it is fetched. Hooks say when it moves on
    lockstep    no buffer at all: `send_all` returns when the other side has received the last byte

A memory stream is two things: what the program under test sees, a `SendStream` or `ReceiveStream`, and handles for the
test: `get_data` and `put_data`, with which it plays the other side, and *hooks*, which are called in the midst of an
operation. `memory_stream_pump` moves bytes from one to the other. A pair is nothing but two streams and a hook that
pumps:

    send_all ---> [ buffer ] --- memory_stream_pump ---> [ buffer ] ---> receive_some
                   sender                                 receiver

So a test can replace the hook, and the network drips, stalls or breaks as it likes. See docs/testing-tools.md.

Both kinds keep what `kernel.abc` promises of streams. Both let the others run, with the stream marked as busy, more
often than they must: a program in which two tasks send at once shall be found out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from typing import Any, TypeVar

from ..abc import ReceiveStream, SendStream
from ..core.errors import BrokenResourceError, BusyResourceError, ClosedResourceError, WouldBlock
from ..core.nursery import call_async
from ..core.scopes import CancelScope
from ..core.traps import checkpoint, consume_budget, operation
from ..parking import ParkingLot
from ..streams import StapledStream

__all__ = [
    "MemoryReceiveStream",
    "MemorySendStream",
    "lockstep_stream_one_way_pair",
    "lockstep_stream_pair",
    "memory_stream_one_way_pair",
    "memory_stream_pair",
    "memory_stream_pump",
]

Bytes = bytes | bytearray | memoryview
AsyncHook = Callable[[], Awaitable[object] | Generator[Any, Any, object]]
SyncHook = Callable[[], object]
SendT = TypeVar("SendT", bound=SendStream)
ReceiveT = TypeVar("ReceiveT", bound=ReceiveStream)

_CLOSED_BEFORE = "this stream was closed before"
_CLOSED_MEANWHILE = "another task closed this stream while it was in use"


class _OneAtATime:
    """`with guard:` raises BusyResourceError if another task is inside."""

    __slots__ = ("_busy", "_doing")

    def __init__(self, doing: str) -> None:
        self._busy = False
        self._doing = doing

    def __enter__(self) -> None:
        if self._busy:
            raise BusyResourceError(f"another task is {self._doing} already: put a lock around it")
        self._busy = True

    def __exit__(self, *exc_info: object) -> None:
        self._busy = False


def _check_max_bytes(max_bytes: int | None) -> None:
    if max_bytes is None:
        return
    if not isinstance(max_bytes, int):
        raise TypeError(f"max_bytes must be a whole number from 1 up, not {max_bytes!r}")
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be a whole number from 1 up, not {max_bytes!r}")


# ---- memory streams -----------------------------------------------------------------------------------


class _Buffer:
    """Bytes on their way. `close` ends what is put in; what is in may still be taken out, and then comes `b""`."""

    __slots__ = ("_arrival", "_data", "_taking", "closed")

    def __init__(self, whose: object) -> None:
        self.closed = False
        self._data = bytearray()
        self._arrival = ParkingLot(whose)  # of data, or of the end
        self._taking = _OneAtATime("waiting for data here")

    def put(self, data: Bytes) -> None:
        if self.closed:
            raise ClosedResourceError(_CLOSED_BEFORE)
        self._data += data
        if self._data:
            self._arrival.unpark_all()

    def close(self) -> None:
        self.closed = True
        self._arrival.unpark_all()

    def take_nowait(self, max_bytes: int | None) -> bytearray:
        _check_max_bytes(max_bytes)
        with self._taking:
            if not self._data and not self.closed:
                raise WouldBlock("there is no data yet")
            return self._take(max_bytes)

    @operation
    def take(self, max_bytes: int | None) -> Generator[Any, Any, bytearray]:
        _check_max_bytes(max_bytes)
        with self._taking:
            if self._data or self.closed:
                yield from consume_budget()
            else:
                yield from self._arrival.park()
            return self._take(max_bytes)

    def _take(self, max_bytes: int | None) -> bytearray:
        chunk = self._data[:max_bytes]
        del self._data[:max_bytes]
        return chunk


class _MemoryEnd:
    """What both ends have in common: they are closed, and their hooks are called."""

    def __init__(self, close_hook: SyncHook | None, doing: str) -> None:
        self.close_hook = close_hook
        self._buffer = _Buffer(self)
        self._busy = _OneAtATime(doing)
        self._in_hook = CancelScope()

    @operation
    def _call(self, hook: AsyncHook | None, name: str) -> Generator[Any, Any, None]:
        """Call a hook, and stop it when the stream is closed by another task."""
        if hook is not None:
            with CancelScope() as self._in_hook:
                yield from call_async(hook, (), name)  # type: ignore[misc]  # ours are operations
            if self._in_hook.cancelled_caught:
                raise ClosedResourceError(_CLOSED_MEANWHILE)

    def close(self) -> None:
        """Close the stream, then call `close_hook`. Who is in an operation gets ClosedResourceError.

        Not a checkpoint. Closing again only calls the hook again.
        """
        self._buffer.close()
        self._in_hook.cancel("the stream was closed")
        if self.close_hook is not None:
            self.close_hook()

    @operation
    def aclose(self) -> Generator[Any, Any, None]:
        """As `close`, and then a cancel point; a schedule point if the budget is used up."""
        self.close()
        yield from consume_budget()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {id(self):#x}>"


class MemorySendStream(_MemoryEnd, SendStream):
    """A stream that keeps what is sent until a test fetches it.

    All hooks may be None, and may be changed at any time.

    Attributes:
        send_all_hook: an async function without arguments, called in `send_all` when the data is in the buffer.
        wait_send_all_might_not_block_hook: one that is called in `wait_send_all_might_not_block`.
        close_hook: a plain function, called by `close` and `aclose` when the stream is closed.
    """

    def __init__(
        self,
        send_all_hook: AsyncHook | None = None,
        wait_send_all_might_not_block_hook: AsyncHook | None = None,
        close_hook: SyncHook | None = None,
    ) -> None:
        super().__init__(close_hook, "sending on this stream")
        self.send_all_hook = send_all_hook
        self.wait_send_all_might_not_block_hook = wait_send_all_might_not_block_hook

    @operation
    def send_all(self, data: Bytes) -> Generator[Any, Any, None]:
        """Put `data` into the buffer, then call `send_all_hook`.

        Always a cancel point, before anything is sent, and a schedule point. What this raises has an attribute
        `bytes_sent`: the length of `data` if it is in the buffer, or else 0.

        Raises:
            BusyResourceError: another task is sending.
            ClosedResourceError: the stream is closed, or was closed by another task meanwhile.
            BaseException: what the hook raises. That of a pair: BrokenResourceError, if the other end is closed.
        """
        sent = 0
        try:
            with self._busy:
                yield from checkpoint()
                self._buffer.put(data)
                sent = memoryview(data).nbytes
                yield from self._call(self.send_all_hook, "send_all_hook")
        except BaseException as error:
            error.bytes_sent = sent  # type: ignore[attr-defined]
            raise

    @operation
    def wait_send_all_might_not_block(self) -> Generator[Any, Any, None]:
        """Call `wait_send_all_might_not_block_hook`. Without one there is nothing to wait for.

        Always a cancel point and a schedule point. Errors are those of `send_all`.
        """
        with self._busy:
            yield from checkpoint()
            if self._buffer.closed:
                raise ClosedResourceError(_CLOSED_BEFORE)
            yield from self._call(self.wait_send_all_might_not_block_hook, "wait_send_all_might_not_block_hook")

    @operation
    def get_data(self, max_bytes: int | None = None) -> Generator[Any, Any, bytearray]:
        """Wait for data and take it out of the buffer: all of it, or at most `max_bytes`. `b""` when the stream is
        closed and its buffer empty.

        Always a cancel point, and then nothing was taken; a schedule point if it waits.

        Raises:
            BusyResourceError: another task waits for data.
            TypeError, ValueError: `max_bytes` is not a whole number from 1 up.
        """
        return (yield from self._buffer.take(max_bytes))

    def get_data_nowait(self, max_bytes: int | None = None) -> bytearray:
        """As `get_data`, without waiting. Raises WouldBlock if there is nothing to take."""
        return self._buffer.take_nowait(max_bytes)


class MemoryReceiveStream(_MemoryEnd, ReceiveStream):
    """A stream from which comes what a test has put there.

    Both hooks may be None, and may be changed at any time.

    Attributes:
        receive_some_hook: an async function without arguments, called in `receive_some` before it looks for data.
        close_hook: a plain function, called by `close` and `aclose` when the stream is closed.
    """

    def __init__(self, receive_some_hook: AsyncHook | None = None, close_hook: SyncHook | None = None) -> None:
        super().__init__(close_hook, "receiving from this stream")
        self.receive_some_hook = receive_some_hook
        self._closed = False  # by us; the buffer's being closed means that the end is in sight

    @operation
    def receive_some(self, max_bytes: int | None = None) -> Generator[Any, Any, bytearray]:
        """Call `receive_some_hook`, then wait for data and return all there is, or at most `max_bytes`; `b""` at the
        end.

        Always a cancel point, and then nothing was received, and a schedule point.

        Raises:
            BusyResourceError: another task is receiving.
            ClosedResourceError: the stream is closed, or was closed by another task meanwhile.
            TypeError, ValueError: `max_bytes` is not a whole number from 1 up.
            BaseException: what the hook raises.
        """
        _check_max_bytes(max_bytes)
        with self._busy:
            yield from checkpoint()
            if self._closed:
                raise ClosedResourceError(_CLOSED_BEFORE)
            yield from self._call(self.receive_some_hook, "receive_some_hook")
            data = yield from self._buffer.take(max_bytes)
            if self._closed:
                raise ClosedResourceError(_CLOSED_MEANWHILE)
            return data

    def close(self) -> None:
        """As `MemorySendStream.close`. What has not been received is lost."""
        self._closed = True
        super().close()

    def put_data(self, data: Bytes) -> None:
        """Append to the buffer. Not a checkpoint. Raises ClosedResourceError after `put_eof` and on a closed stream."""
        self._buffer.put(data)

    def put_eof(self) -> None:
        """Behind what is in the buffer, that is the end. Not a checkpoint. Doing it again does nothing."""
        self._buffer.close()


def memory_stream_pump(
    memory_send_stream: MemorySendStream, memory_receive_stream: MemoryReceiveStream, *, max_bytes: int | None = None
) -> bool:
    """Move what was sent, at most `max_bytes` of it, or the end, to where it will be received. Not a checkpoint.

    Returns:
        whether there was anything to move. At the end there always is: the end.

    Raises:
        BrokenResourceError: it cannot be received any more. It is lost.
        BusyResourceError: a task waits for it in `get_data`.
        TypeError, ValueError: `max_bytes` is not a whole number from 1 up.
    """
    try:
        data = memory_send_stream.get_data_nowait(max_bytes)
    except WouldBlock:
        return False
    if not data:
        memory_receive_stream.put_eof()
        return True
    try:
        memory_receive_stream.put_data(data)
    except ClosedResourceError:
        raise BrokenResourceError("the other end is closed") from None
    return True


def memory_stream_one_way_pair() -> tuple[MemorySendStream, MemoryReceiveStream]:
    """A stream from left to right, with a buffer without limit.

    Its `send_all_hook` and `close_hook` call `memory_stream_pump`, so what is sent, and the end, are there at once.
    """
    sender, receiver = MemorySendStream(), MemoryReceiveStream()

    async def send() -> None:
        memory_stream_pump(sender, receiver)

    def close() -> None:
        with suppress(BrokenResourceError):  # there is nobody left who would miss it
            memory_stream_pump(sender, receiver)  # what another hook may have left behind
            memory_stream_pump(sender, receiver)  # the end

    sender.send_all_hook = send
    sender.close_hook = close
    return sender, receiver


def memory_stream_pair() -> tuple[
    StapledStream[MemorySendStream, MemoryReceiveStream], StapledStream[MemorySendStream, MemoryReceiveStream]
]:
    """A stream in both directions, with buffers without limit: two of `memory_stream_one_way_pair`, stapled together.

    The parts are the attributes `send_stream` and `receive_stream` of each. So this makes a stream drip:

        async def drip():
            while memory_stream_pump(left.send_stream, right.receive_stream, max_bytes=1):
                await sleep(1)

        left.send_stream.send_all_hook = drip
    """
    return _staple(memory_stream_one_way_pair(), memory_stream_one_way_pair())


def _staple(
    there: tuple[SendT, ReceiveT], back: tuple[SendT, ReceiveT]
) -> tuple[StapledStream[SendT, ReceiveT], StapledStream[SendT, ReceiveT]]:
    return StapledStream(there[0], back[1]), StapledStream(back[0], there[1])


# ---- lockstep streams ---------------------------------------------------------------------------------


class _Lockstep:
    """What the two ends share. `offered` is what a task in `send_all` holds out; the receiver bites off as it likes."""

    __slots__ = ("changed", "offered", "receiver_open", "receiver_waits", "sender_open")

    def __init__(self) -> None:
        self.offered = memoryview(b"")
        self.sender_open = self.receiver_open = True
        self.receiver_waits = False
        self.changed = ParkingLot(self)  # anything of the above: whoever waits, one a side, looks for itself

    def __repr__(self) -> str:
        return f"<lockstep stream at {id(self):#x}>"


class LockstepSendStream(SendStream):
    """The sending end of `lockstep_stream_one_way_pair`."""

    def __init__(self, state: _Lockstep) -> None:
        self._state = state
        self._busy = _OneAtATime("sending on this stream")

    @operation
    def send_all(self, data: Bytes) -> Generator[Any, Any, None]:
        """Wait until all of `data` was received.

        Always a cancel point; a schedule point unless `data` is empty. What this raises has an attribute `bytes_sent`:
        so many were received.

        Raises:
            BusyResourceError: another task is sending.
            BrokenResourceError: the other end is closed.
            ClosedResourceError: this end is closed, or was closed by another task meanwhile.
        """
        state, rest = self._state, memoryview(data).cast("B")
        size = len(rest)
        try:
            with self._busy:
                yield from consume_budget()
                self._check()
                state.offered = rest
                state.changed.unpark_all()
                try:
                    while state.offered:
                        yield from state.changed.park()
                        if state.offered:
                            self._check()
                finally:
                    rest, state.offered = state.offered, memoryview(b"")
        except BaseException as error:
            error.bytes_sent = size - len(rest)  # type: ignore[attr-defined]
            raise

    def _check(self) -> None:
        if not self._state.sender_open:
            raise ClosedResourceError("this stream is closed")
        if not self._state.receiver_open:
            raise BrokenResourceError("the other end is closed")

    @operation
    def wait_send_all_might_not_block(self) -> Generator[Any, Any, None]:
        """Wait until a task is receiving, or the other end is closed.

        Always a cancel point; a schedule point if it waits. Errors are those of `send_all`.
        """
        state = self._state
        with self._busy:
            yield from consume_budget()
            self._check()
            while not state.receiver_waits:
                yield from state.changed.park()
                self._check()

    def close(self) -> None:
        """Close this end. Not a checkpoint. What was offered and not received is withdrawn."""
        self._state.sender_open = False
        self._state.changed.unpark_all()

    @operation
    def aclose(self) -> Generator[Any, Any, None]:
        """As `close`, and then a cancel point; a schedule point if the budget is used up."""
        self.close()
        yield from consume_budget()


class LockstepReceiveStream(ReceiveStream):
    """The receiving end of `lockstep_stream_one_way_pair`."""

    def __init__(self, state: _Lockstep) -> None:
        self._state = state
        self._busy = _OneAtATime("receiving from this stream")

    @operation
    def receive_some(self, max_bytes: int | None = None) -> Generator[Any, Any, bytearray]:
        """Wait until a task is sending; return all it has left to send, or at most `max_bytes`; `b""` at the end.

        Always a cancel point, and then nothing was received; a schedule point if it waits.

        Raises:
            BusyResourceError: another task is receiving.
            ClosedResourceError: this end is closed, or was closed by another task meanwhile.
            TypeError, ValueError: `max_bytes` is not a whole number from 1 up.
        """
        _check_max_bytes(max_bytes)
        state = self._state
        with self._busy:
            yield from consume_budget()
            self._check()
            if state.sender_open and not state.offered:
                state.receiver_waits = True
                state.changed.unpark_all()
                try:
                    while state.sender_open and not state.offered:
                        yield from state.changed.park()
                        self._check()
                finally:
                    state.receiver_waits = False
            if not state.sender_open:
                return bytearray()
            chunk = bytearray(state.offered[:max_bytes])
            state.offered = state.offered[len(chunk) :]
            state.changed.unpark_all()
            return chunk

    def _check(self) -> None:
        if not self._state.receiver_open:
            raise ClosedResourceError("this stream is closed")

    def close(self) -> None:
        """Close this end. Not a checkpoint."""
        self._state.receiver_open = False
        self._state.changed.unpark_all()

    @operation
    def aclose(self) -> Generator[Any, Any, None]:
        """As `close`, and then a cancel point; a schedule point if the budget is used up."""
        self.close()
        yield from consume_budget()


def lockstep_stream_one_way_pair() -> tuple[LockstepSendStream, LockstepReceiveStream]:
    """A stream from left to right without any buffer: `send_all` waits until the other side has received it all.

    For what must hold however little the network takes, and as the `clogged_stream_maker` of the checkers.
    """
    state = _Lockstep()
    return LockstepSendStream(state), LockstepReceiveStream(state)


def lockstep_stream_pair() -> tuple[
    StapledStream[LockstepSendStream, LockstepReceiveStream], StapledStream[LockstepSendStream, LockstepReceiveStream]
]:
    """A stream in both directions without any buffer: two of `lockstep_stream_one_way_pair`, stapled together."""
    return _staple(lockstep_stream_one_way_pair(), lockstep_stream_one_way_pair())
