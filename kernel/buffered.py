"""Reading items from a byte stream: so many bytes, up to a delimiter, a line. And text.

A stream gives bytes as they come: half a line, or two and a half. A buffer in between makes items of them:

    transport_stream.receive_some() -> b"GET / HT"  b"TP/1.1\\r\\nHost: exam"  b"ple.org\\r\\n"
    receive_line()                  -> b"GET / HTTP/1.1"  b"Host: example.org"

Rules:

* An operation that fails takes nothing, whether it was cancelled, the stream has ended, or the item is too long. Bytes
  wait in the buffer until the item is complete, and leave it with the `return`. So a timeout around a read is harmless:
  read again later, and go on where you were.
* An end in the middle of an item is an error. A line that was cut off is not a line.
* Items with a delimiter have a longest length, `max`. Without, whoever is at the other end decides how much memory we
  need.
* One task at a time. What another one waits for is not given away.

The buffer is in two parts, of which one at least is empty:

    _chunk[_at:]    what is left of the chunk that came last: items are sliced out of it
    _grown          the beginning of an item that is longer than that; it becomes the chunk once the item is taken

So an item that is there costs a search, a slice and no trap. Whatever the items and the chunks, the cost is linear in
the bytes: each is copied a few times, and what was searched is not searched again as the item grows.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Generator
from io import IncrementalNewlineDecoder
from typing import Any, Final, Generic, NoReturn, Protocol, TypeVar

from .abc import AsyncResource, HalfCloseableStream, ReceiveStream, Stream
from .core.errors import BusyResourceError
from .core.task import current_kernel, current_task, here
from .core.traps import Operation, checkpoint, consume_budget, operation

__all__ = ["BufferedReceiveStream", "BufferedStream", "IncompleteReadError", "ItemTooLongError", "TextReceiveStream"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
ReceiveStreamT = TypeVar("ReceiveStreamT", bound=ReceiveStream)
StreamT = TypeVar("StreamT", bound=Stream)

MAX: Final = 65536
"""How long an item that ends with a delimiter may be, unless `max` says something else."""

_CR: Final = ord("\r")


class IncompleteReadError(EOFError):
    """The stream has ended, and the item has not. Nothing was taken: `receive_some` gives what there is.

    Attributes:
        partial: the beginning of the item, `bytes`, or `str` if it is text. If it is empty, the stream has ended
            between two items.
        expected: how many bytes the item should have had; None if a delimiter was to tell.
    """

    def __init__(self, partial: bytes | str, expected: int | None = None) -> None:
        super().__init__(partial, expected)
        self.partial = partial
        self.expected = expected

    def __str__(self) -> str:
        if not self.partial:
            return "the stream has ended: there is no further item"
        there = f"{len(self.partial)} {'characters' if isinstance(self.partial, str) else 'bytes'}"
        missing = "no delimiter" if self.expected is None else f"{self.expected} were expected"
        return f"the stream has ended in the middle of an item: {there} are there, and {missing}"


class ItemTooLongError(Exception):
    """So much has come, and no delimiter. Nothing was taken.

    To go on behind the item, take `max` bytes away with `receive_exactly(error.max)` and try again, until it works:
    that gives the rest of it. The delimiter is never among the bytes that are taken away.

    Attributes:
        max: how long the item might have been.
    """

    def __init__(self, max: int) -> None:
        super().__init__(max)
        self.max = max

    def __str__(self) -> str:
        return (
            f"the item is longer than {self.max}, and its end is not in sight. What has come of it is in the buffer "
            "still. If items may be as long as that, pass a larger max="
        )


class BufferedReceiveStream(ReceiveStream, Generic[ReceiveStreamT]):
    """Receives whole items from `transport_stream`, any `ReceiveStream`. Closing it closes that.

    It is a `ReceiveStream` itself. A layer that is put on top of it gets what is in the buffer first.

    Attributes:
        transport_stream: where the bytes come from. Who goes on with that must not forget what is `buffered`.
    """

    def __init__(self, transport_stream: ReceiveStreamT) -> None:
        self.transport_stream = transport_stream
        self._chunk = b""
        self._at = 0
        self._grown = bytearray()
        self._receiving = False  # a task waits for more

    @property
    def buffered(self) -> bytes:
        """What has come and was not taken. A copy: it stays there."""
        return bytes(self._grown) + self._chunk[self._at :]

    def unread(self, data: bytes | bytearray | memoryview) -> None:
        """Put `data` in front of what comes next: bytes looked at, or left over by another parser. Not a checkpoint.

        Cost: that of copying the buffer. Raises BusyResourceError if a task is receiving.
        """
        if self._receiving:
            _refuse_second(self)
        self._chunk, self._at = bytes(data) + self.buffered, 0
        self._grown.clear()

    @operation
    def receive_some(self, max_bytes: int | None = None) -> Generator[Any, Any, bytes]:
        """Receive what is in the buffer, at most `max_bytes`; if that is empty, what comes next. `b""` at the end.

        Always a cancel point, and then nothing was taken; a schedule point if it waits.

        Raises:
            BusyResourceError: another task is receiving.
            TypeError, ValueError: `max_bytes` is not a whole number from 1 up.
            Exception: what the transport stream raises.
        """
        if max_bytes is not None:
            _check_number(max_bytes, "max_bytes", 1)
        kernel = here.kernel or current_kernel("receive_some()")
        task = kernel.current or current_task("receive_some()")
        kernel.budget -= 1
        if kernel.budget < 0 or task.scope.cancelled is not None:
            yield from checkpoint()
        if self._receiving:
            _refuse_second(self)
        if self._grown:
            self._stop_growing()
        chunk, at = self._chunk, self._at
        if at == len(chunk):
            return bytes((yield from self._more(max_bytes)))
        self._at = len(chunk) if max_bytes is None else min(at + max_bytes, len(chunk))
        return chunk[at : self._at]

    @operation
    def receive_exactly(self, count: int) -> Generator[Any, Any, bytes]:
        """Receive `count` bytes.

        Always a cancel point, and then nothing was taken; a schedule point if it waits.

        Raises:
            IncompleteReadError: the stream ends before that.
            BusyResourceError: another task is receiving.
            TypeError, ValueError: `count` is not a whole number from 0 up.
            Exception: what the transport stream raises.
        """
        if type(count) is not int or count < 0:  # a call less, a tenth of the whole
            _check_number(count, "count", 0)
        kernel = here.kernel or current_kernel("receive_exactly()")
        task = kernel.current or current_task("receive_exactly()")
        kernel.budget -= 1
        if kernel.budget < 0 or task.scope.cancelled is not None:
            yield from checkpoint()
        if self._receiving:
            _refuse_second(self)
        if count > len(self._chunk) - self._at:
            self._grow()
            while len(self._grown) < count:
                yield from self._fill(count)
            self._stop_growing()
        at = self._at
        self._at = end = at + count
        return self._chunk[at:end]

    @operation
    def receive_until(self, delimiter: bytes, *, max: int = MAX) -> Generator[Any, Any, bytes]:
        """Receive all up to the first `delimiter`. That is taken too, and left out of what is returned.

        Always a cancel point, and then nothing was taken; a schedule point if it waits.

        Args:
            delimiter: one byte or more.
            max: how many bytes there may be before it.

        Raises:
            ItemTooLongError: there are more.
            IncompleteReadError: the stream ends before a delimiter has come.
            BusyResourceError: another task is receiving.
            TypeError, ValueError: `delimiter` is not `bytes`, or empty; `max` is not a whole number from 1 up.
            Exception: what the transport stream raises.
        """
        if not isinstance(delimiter, bytes):
            raise TypeError(f"delimiter must be bytes, not {delimiter!r}")
        if not delimiter:
            raise ValueError("delimiter must not be empty: it would be found before anything else, for ever")
        if type(max) is not int or max < 1:
            _check_number(max, "max", 1)
        kernel = here.kernel or current_kernel("receive_until()")
        task = kernel.current or current_task("receive_until()")
        kernel.budget -= 1
        if kernel.budget < 0 or task.scope.cancelled is not None:
            yield from checkpoint()
        if self._receiving:
            _refuse_second(self)
        chunk, at = self._chunk, self._at
        end = chunk.find(delimiter, at)
        if end < 0:
            end = yield from self._wait_for(delimiter, max)
            chunk, at = self._chunk, self._at
        if not 0 <= end - at <= max:
            raise ItemTooLongError(max)
        self._at = end + len(delimiter)
        return chunk[at:end]

    @operation
    def receive_line(self, *, max: int = MAX) -> Generator[Any, Any, bytes]:
        """Receive a line, without the `\\n` or `\\r\\n` at its end.

        As `receive_until`. `max` is how many bytes the line may have, its end not counted.
        """
        if type(max) is not int or max < 1:
            _check_number(max, "max", 1)
        kernel = here.kernel or current_kernel("receive_line()")
        task = kernel.current or current_task("receive_line()")
        kernel.budget -= 1
        if kernel.budget < 0 or task.scope.cancelled is not None:
            yield from checkpoint()
        if self._receiving:
            _refuse_second(self)
        chunk, at = self._chunk, self._at
        end = chunk.find(b"\n", at)
        if end < 0:
            end = yield from self._wait_for(b"\n", max + 1)
            chunk, at = self._chunk, self._at
        stop = end - 1 if end > at and chunk[end - 1] == _CR else end
        if not 0 <= stop - at <= max:
            raise ItemTooLongError(max)
        self._at = end + 1
        return chunk[at:stop]

    def lines(self, *, max: int = MAX, strict: bool = True) -> AsyncIterator[bytes]:
        """The lines, up to the end of the stream: `async for line in stream.lines()`. Each is a `receive_line`.

        Other operations may be called in between. Leaving the loop loses nothing.

        Args:
            max: how many bytes a line may have.
            strict: if the stream ends in the middle of a line, raise IncompleteReadError. With False, what has come of
                it is the last line; fit for files and what programs print, while a peer may have meant more.
        """
        return _Lines(self, max, strict)

    @operation
    def aclose(self) -> Generator[Any, Any, None]:
        """Forget what is buffered, and close the transport stream. Checkpoints and errors are those of its `aclose`."""
        self._chunk, self._at = b"", 0
        self._grown.clear()
        yield from _awaited(self.transport_stream.aclose()).__await__()

    def _grow(self) -> None:
        self._grown += self._chunk[self._at :]
        self._chunk, self._at = b"", 0

    def _stop_growing(self) -> None:
        self._chunk, self._at = bytes(self._grown), 0
        self._grown.clear()

    @operation
    def _wait_for(self, delimiter: bytes, bound: int) -> Generator[Any, Any, int]:
        """Where in the chunk the first `delimiter` begins, when it has come. Below 0: not within `bound` bytes.

        The chunk that is there has been searched.
        """
        bound += len(delimiter)
        if len(self._chunk) - self._at >= bound:
            return -1
        self._grow()
        grown, searched = self._grown, 0
        while (end := grown.find(delimiter, searched)) < 0:
            if len(grown) >= bound:
                return -1
            searched = max(0, len(grown) - len(delimiter) + 1)
            yield from self._fill()
        self._stop_growing()
        return end

    @operation
    def _fill(self, expected: int | None = None) -> Generator[Any, Any, None]:
        chunk = yield from self._more()
        if not chunk:
            raise IncompleteReadError(bytes(self._grown), expected)
        self._grown += chunk

    @operation
    def _more(self, max_bytes: int | None = None) -> Generator[Any, Any, bytes | bytearray]:
        self._receiving = True
        try:
            return (yield from _awaited(self.transport_stream.receive_some(max_bytes)).__await__())
        finally:
            self._receiving = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self.transport_stream!r}, {len(self.buffered)} bytes buffered>"


class BufferedStream(BufferedReceiveStream[StreamT], HalfCloseableStream):
    """A `BufferedReceiveStream` for both directions. What is sent goes to `transport_stream` as it is.

    So guards, `bytes_sent`, checkpoints and errors of sending are the transport stream's.
    """

    def send_all(self, data: bytes | bytearray | memoryview) -> Awaitable[None]:
        """`transport_stream.send_all(data)`."""
        return self.transport_stream.send_all(data)

    def wait_send_all_might_not_block(self) -> Awaitable[None]:
        """`transport_stream.wait_send_all_might_not_block()`."""
        return self.transport_stream.wait_send_all_might_not_block()

    def send_eof(self) -> Awaitable[None]:
        """`transport_stream.send_eof()`. Raises TypeError if it has none, as with TLS."""
        if not isinstance(self.transport_stream, HalfCloseableStream):
            raise TypeError(f"{self.transport_stream!r} has no send_eof(): it ends in both directions, by aclose()")
        return self.transport_stream.send_eof()


class TextReceiveStream(AsyncResource, Generic[ReceiveStreamT]):
    """Receives text from `transport_stream`, any `ReceiveStream`. Closing it closes that.

    A character may be cut in two by the chunks; the decoder keeps the first half. The rules are those of this module,
    with characters in place of bytes. What has been decoded cannot be had as bytes any more.

    Args:
        encoding: as `open` takes it, but by default UTF-8 everywhere.
        errors: what to do about bytes that are no text: "strict", "replace", "ignore", ...
        newline: what ends a line. None: `\\n`, `\\r\\n` and `\\r`, and each is turned into `\\n`. "\\n": only that.

    Raises:
        LookupError: there is no such encoding, or no such way to handle errors.
        ValueError: another `newline`.
    """

    def __init__(
        self,
        transport_stream: ReceiveStreamT,
        encoding: str = "utf-8",
        *,
        errors: str = "strict",
        newline: str | None = None,
    ) -> None:
        if newline not in (None, "\n"):
            raise ValueError(f"newline must be None, for all kinds, or a line feed, not {newline!r}")
        codecs.lookup_error(errors)
        "".encode(encoding)  # refuses codecs that are not about text, such as hex
        decoder = codecs.getincrementaldecoder(encoding)(errors)
        self.transport_stream = transport_stream
        self._decoder = decoder if newline == "\n" else IncrementalNewlineDecoder(decoder, translate=True)
        self._lines: deque[str] = deque()  # complete
        self._pieces = [""]  # what came after that
        self._length = 0  # sum(map(len, _pieces))
        self._receiving = False
        self._trouble: UnicodeDecodeError | None = None  # what comes after that

    @operation
    def receive_some(self) -> Generator[Any, Any, str]:
        """Receive the text that is there, at least one character; `""` at the end.

        Always a cancel point, and then nothing was taken; a schedule point if it waits.

        Raises:
            UnicodeDecodeError: what comes next is no text. Nothing that is behind it will be received.
            BusyResourceError: another task is receiving.
            Exception: what the transport stream raises.
        """
        yield from consume_budget()
        if self._receiving:
            _refuse_second(self)
        while not self._lines and not self._length:
            try:
                yield from self._fill()
            except IncompleteReadError:
                return ""
        text = "\n".join([*self._lines, "".join(self._pieces)])
        self._lines.clear()
        self._pieces, self._length = [""], 0
        return text

    @operation
    def receive_line(self, *, max: int = MAX) -> Generator[Any, Any, str]:
        """Receive a line, without the `\\n` at its end.

        Always a cancel point, and then nothing was taken; a schedule point if it waits.

        Args:
            max: how many characters the line may have, its end not counted.

        Raises:
            ItemTooLongError: there are more. To go on behind the line, take them away with `receive_some`.
            IncompleteReadError: the stream ends before the line does.
            UnicodeDecodeError: the line has something in it that is no text. Nothing behind it will be received.
            BusyResourceError: another task is receiving.
            TypeError, ValueError: `max` is not a whole number from 1 up.
            Exception: what the transport stream raises.
        """
        _check_number(max, "max", 1)
        kernel = here.kernel or current_kernel("receive_line()")
        task = kernel.current or current_task("receive_line()")
        kernel.budget -= 1
        if kernel.budget < 0 or task.scope.cancelled is not None:
            yield from checkpoint()
        if self._receiving:
            _refuse_second(self)
        while not self._lines:
            if self._length > max:
                raise ItemTooLongError(max)
            yield from self._fill()
        if len(self._lines[0]) > max:
            raise ItemTooLongError(max)
        return self._lines.popleft()

    def lines(self, *, max: int = MAX, strict: bool = True) -> AsyncIterator[str]:
        """The lines, up to the end of the stream, as `BufferedReceiveStream.lines` gives them."""
        return _Lines(self, max, strict)

    @operation
    def aclose(self) -> Generator[Any, Any, None]:
        """Forget what is buffered, and close the transport stream. Checkpoints and errors are those of its `aclose`."""
        self._lines.clear()
        self._pieces, self._length = [""], 0
        yield from _awaited(self.transport_stream.aclose()).__await__()

    @operation
    def _fill(self) -> Generator[Any, Any, None]:
        if self._trouble is not None:
            raise UnicodeDecodeError(*self._trouble.args)
        self._receiving = True
        try:
            chunk = yield from _awaited(self.transport_stream.receive_some()).__await__()
        finally:
            self._receiving = False
        text = self._decode(chunk)
        if not text and not chunk and self._trouble is None:
            raise IncompleteReadError("".join(self._pieces))
        first, *others = text.split("\n")
        self._pieces.append(first)
        self._length += len(first)
        if others:
            self._lines += ["".join(self._pieces), *others[:-1]]
            self._pieces, self._length = others[-1:], len(others[-1])

    def _decode(self, chunk: bytes | bytearray) -> str:
        """The text of `chunk`; an empty one is the end. What comes before bytes that are no text is text still."""
        before = self._decoder.getstate()
        try:
            return self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            self._trouble = error
            self._decoder.setstate(before)
            bad = len(error.object) - error.start  # counted from the end: the object may begin with earlier bytes
            return self._decoder.decode(chunk[:-bad])

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self.transport_stream!r}>"


class _Lined(Protocol[T_co]):
    def receive_line(self, *, max: int) -> Operation[T_co]: ...

    def receive_some(self) -> Operation[T_co]: ...


class _Lines(AsyncIterator[T]):
    """What `lines` returns."""

    __slots__ = ("_max", "_stream", "_strict")

    def __init__(self, stream: _Lined[T], max: int, strict: bool) -> None:
        self._stream = stream
        self._max = max
        self._strict = strict

    @operation
    def __anext__(self) -> Generator[Any, Any, T]:
        try:
            return (yield from self._stream.receive_line(max=self._max))
        except IncompleteReadError as error:
            if error.partial and self._strict:
                raise
            if not error.partial:
                raise StopAsyncIteration from None
        return (yield from self._stream.receive_some())


def _refuse_second(stream: object) -> NoReturn:
    raise BusyResourceError(f"another task is receiving from {stream!r}: put a lock around it")


def _check_number(number: object, name: str, least: int) -> None:
    if not isinstance(number, int):
        raise TypeError(f"{name} must be a whole number from {least} up, not {number!r}")
    if number < least:
        raise ValueError(f"{name} must be a whole number from {least} up, not {number!r}")


async def _awaited(operation: Awaitable[T]) -> T:
    """A transport stream's methods may be of any kind that `await` takes."""
    return await operation
