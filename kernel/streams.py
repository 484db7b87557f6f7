"""Byte streams made of other streams, and closing one without ceremony."""

from __future__ import annotations

from collections.abc import Awaitable, Generator
from typing import Any, Generic, Protocol, TypeVar

from .abc import HalfCloseableStream, ReceiveStream, SendStream
from .core.scopes import CancelScope
from .core.traps import operation

__all__ = ["StapledStream", "aclose_forcefully"]

SendStreamT = TypeVar("SendStreamT", bound=SendStream)
ReceiveStreamT = TypeVar("ReceiveStreamT", bound=ReceiveStream)


class _Closeable(Protocol):
    def aclose(self) -> Awaitable[Any]: ...


@operation
def aclose_forcefully(resource: _Closeable) -> Generator[Any, Any, None]:
    """Close `resource` at once, without parting in a civil manner: call its `aclose()` in a cancelled scope.

    A resource closes when told to, come what may; what it would wait for is only politeness. Also takes async
    generators. A cancel point if the resource's `aclose` is one; a schedule point, but never a long wait.

    Raises:
        Exception: what `aclose` raises.
    """
    with CancelScope() as scope:
        scope.cancel("aclose_forcefully()")
        yield from _aclose(resource).__await__()


async def _aclose(resource: _Closeable) -> None:
    await resource.aclose()


class StapledStream(HalfCloseableStream, Generic[SendStreamT, ReceiveStreamT]):
    """A stream for both directions, made of one for each, such as a process's `stdin` and `stdout`.

    Args:
        send_stream: what is sent goes there.
        receive_stream: what is received comes from there.

    Both are attributes, too. Checkpoints and errors are those of the two streams.
    """

    def __init__(self, send_stream: SendStreamT, receive_stream: ReceiveStreamT) -> None:
        self.send_stream = send_stream
        self.receive_stream = receive_stream

    def send_all(self, data: bytes | bytearray | memoryview) -> Awaitable[None]:
        """`send_stream.send_all(data)`."""
        return self.send_stream.send_all(data)

    def wait_send_all_might_not_block(self) -> Awaitable[None]:
        """`send_stream.wait_send_all_might_not_block()`."""
        return self.send_stream.wait_send_all_might_not_block()

    def send_eof(self) -> Awaitable[None]:
        """`send_stream.send_eof()`; or if that can only send, closing it is how it shows its end."""
        if isinstance(self.send_stream, HalfCloseableStream):
            return self.send_stream.send_eof()
        return self.send_stream.aclose()

    def receive_some(self, max_bytes: int | None = None) -> Awaitable[bytes | bytearray]:
        """`receive_stream.receive_some(max_bytes)`."""
        return self.receive_stream.receive_some(max_bytes)

    @operation
    def aclose(self) -> Generator[Any, Any, None]:
        """Close both, the one that sends first, and the other whatever comes of that."""
        yield from self._close_both().__await__()

    async def _close_both(self) -> None:
        async with self.receive_stream:
            await self.send_stream.aclose()

    def __repr__(self) -> str:
        return f"<StapledStream of {self.send_stream!r} and {self.receive_stream!r}>"
