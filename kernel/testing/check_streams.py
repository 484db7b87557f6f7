"""Does a stream keep what `kernel.abc` promises of streams? A battery of checks for one of your own.

    async def make_pair():
        return ...  # two streams, connected

    await check_half_closeable_stream(make_pair, make_clogged_pair)

Each check is a function below. Its docstring is the promise, and stands in the error when that is not kept; it gets a
pair of its own, which is closed afterwards. One that does not come to an end is called off: when nothing has happened
for `PATIENCE` seconds, it hangs.

The checks take streams for what the interfaces say and no more. A stream need not have a buffer, so nothing is sent
without somebody receiving at the same time; it may have a large one, so that the other end is gone need not show at
once; closing it may take the other side's help.

With a `clogged_stream_maker`, what happens while a task waits to send is checked, too. That is where streams differ
from their promises most.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from random import Random
from typing import Any, Final, TypeVar

from ..abc import AsyncResource, HalfCloseableStream, ReceiveStream, SendStream, Stream
from ..children import open_nursery
from ..core.errors import BrokenResourceError, BusyResourceError, Cancelled, ClosedResourceError
from ..core.scopes import CancelScope
from ..gathering import gather
from ..groups import raise_single
from ..streams import aclose_forcefully
from .checkpoints import assert_checkpoints
from .idle import wait_all_tasks_blocked

__all__ = ["check_half_closeable_stream", "check_one_way_stream", "check_two_way_stream"]

PATIENCE: float = 1.0
"""After so many real seconds in which nothing happens, a check hangs."""

T = TypeVar("T")
Call = Callable[[], Awaitable[T]]
SendT = TypeVar("SendT", bound=SendStream)
ReceiveT = TypeVar("ReceiveT", bound=ReceiveStream)
StreamMaker = Callable[[], Awaitable[tuple[SendT, ReceiveT]]]
Check = Callable[[Any, Any], Awaitable[None]]

_LONG: Final = Random(0).randbytes(100_000)
_TRIES: Final = 1000  # of sending to nobody, until that must have been noticed


# ---- what checks are made of ----------------------------------------------------------------------------


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


@contextmanager
def _raises(error: type[Exception], what: str) -> Iterator[None]:
    try:
        yield
    except error:
        return
    raise AssertionError(f"{what} does not raise {error.__name__}")


async def _together(*calls: Call[Any]) -> list[Any]:
    """The results of `calls`, made at once. A single error arrives without a group."""
    with raise_single():
        return await gather(*calls)
    raise AssertionError("unreachable: mypy takes raise_single for one that swallows")


async def _checkpoint(call: Call[T]) -> T:
    with assert_checkpoints():
        return await call()


async def _is_cancelled(call: Call[object], what: str) -> None:
    """In a cancelled scope `call` must raise Cancelled."""
    with CancelScope() as scope:
        scope.cancel()
        try:
            await call()
        except Cancelled as cancelled:
            _expect(getattr(cancelled, "bytes_sent", 0) == 0, f"{what} in a cancelled scope says that it has sent some")
            raise
    _expect(scope.cancelled_caught, f"{what} in a cancelled scope does not raise Cancelled")


async def _receive(stream: ReceiveStream, size: float = inf) -> bytes:
    """Receive `size` bytes, or up to the end."""
    got = bytearray()
    while len(got) < size:
        chunk = await stream.receive_some(None if size == inf else int(size) - len(got))
        if not chunk:
            break
        got += chunk
    return bytes(got)


async def _arrives(data: bytes, s: SendStream, r: ReceiveStream) -> None:
    """`data` goes from `s` to `r`, so both are in working order."""
    _, got = await _together(partial(s.send_all, data), partial(_receive, r, len(data)))
    _expect(got == data, f"{got[:20]!r} was received, not {data[:20]!r}")


async def _breaks(s: SendStream) -> None:
    """Sending on `s`, the other end of which is closed, fails in the end."""
    with _raises(BrokenResourceError, "send_all() to a closed end, again and again,"):
        for _ in range(_TRIES):
            await s.send_all(b"x" * 100)


async def _refuses_to_send(s: SendStream) -> None:
    for data in (b"x", b""):
        with _raises(ClosedResourceError, f"send_all({data!r}) on a closed stream"):
            await s.send_all(data)
    with _raises(ClosedResourceError, "wait_send_all_might_not_block() on a closed stream"):
        await s.wait_send_all_might_not_block()


async def _refuses_to_receive(r: ReceiveStream) -> None:
    with _raises(ClosedResourceError, "receive_some() on a closed stream"):
        await r.receive_some(10)


# ---- one way ----------------------------------------------------------------------------------------------


async def _sent_and_received(s: SendStream, r: ReceiveStream) -> None:
    """What is sent is received. send_all and receive_some are checkpoints, whether or not they need to wait."""
    _expect(isinstance(s, SendStream), f"{s!r} is no SendStream")
    _expect(isinstance(r, ReceiveStream), f"{r!r} is no ReceiveStream")
    for _ in range(2):
        async with open_nursery() as nursery:
            sender = nursery.spawn(_checkpoint, partial(s.send_all, b"x"))
            await wait_all_tasks_blocked()
            got = await _checkpoint(partial(r.receive_some, 1))
            nothing = await sender
        _expect(isinstance(got, bytes | bytearray), f"receive_some() returns {got!r}, which are no bytes")
        _expect(got == b"x", f"{got!r} was received, not b'x'")
        _expect(nothing is None, f"send_all() returns {nothing!r}")


async def _receiver_first(s: SendStream, r: ReceiveStream) -> None:
    """A task that is receiving wakes when there is something to receive."""
    async with open_nursery() as nursery:
        receiver = nursery.spawn(_checkpoint, partial(r.receive_some, 1))
        await wait_all_tasks_blocked()
        await _checkpoint(partial(s.send_all, b"x"))
        got = await receiver
        _expect(got == b"x", f"{got!r} was received, not b'x'")


async def _nothing_is_sent(s: SendStream, r: ReceiveStream) -> None:
    """Sending b"" is allowed, is a checkpoint, and does not look like the end."""

    async def send() -> None:
        await _checkpoint(partial(s.send_all, b""))
        await s.send_all(b"y")

    _, got = await _together(send, partial(r.receive_some, 1))
    _expect(got == b"y", f"{got!r} was received, not b'y'")


async def _any_kind_of_bytes(s: SendStream, r: ReceiveStream) -> None:
    """send_all takes bytes, bytearray and memoryview, and has done with them when it returns."""
    for kind in (bytes, bytearray, memoryview):
        store = bytearray(b"123")

        async def send(data: Any, store: bytearray) -> None:
            await s.send_all(data)
            store[:] = b"???"

        data: Any = memoryview(store) if kind is memoryview else store if kind is bytearray else bytes(store)
        async with open_nursery() as nursery:
            nursery.start_soon(send, data, store)
            await wait_all_tasks_blocked()
            got = await _receive(r, 3)
        _expect(got == b"123", f"{got!r} was received, not b'123', which was sent as {kind.__name__}")


async def _max_bytes(s: SendStream, r: ReceiveStream) -> None:
    """receive_some returns at least one byte and at most max_bytes; without, any number. Others than from 1 up are a
    ValueError, what is no whole number a TypeError, and neither takes anything.
    """
    for wrong in (0, -1):
        with _raises(ValueError, f"receive_some({wrong})"):
            await r.receive_some(wrong)
    odd: Any
    for odd in (1.5, "1"):
        with _raises(TypeError, f"receive_some({odd!r})"):
            await r.receive_some(odd)

    async def receive(*args: int | None) -> bytes:
        got = bytearray()
        while len(got) < 10:
            chunk = await r.receive_some(*args)
            _expect(len(chunk) > 0, f"receive_some{args} returns b'' before the end")
            _expect(len(chunk) <= (args[0] if args and args[0] else 10), f"receive_some{args} returns {chunk!r}")
            got += chunk
        return bytes(got)

    for args in ((3,), (1,), (10,), (1000,), (None,), ()):
        _, got = await _together(partial(s.send_all, b"0123456789"), partial(receive, *args))
        _expect(got == b"0123456789", f"{got!r} was received, not b'0123456789'")


async def _order_and_end(s: SendStream, r: ReceiveStream) -> None:
    """All bytes arrive, in order, also if the sender closes before they are received; then comes b"", and again."""

    async def send() -> None:
        sizes, view = Random(1), memoryview(_LONG)
        while view:
            size = sizes.randint(1, 5000)
            await s.send_all(view[:size])
            view = view[size:]
        await _checkpoint(s.aclose)

    async def receive() -> None:
        await wait_all_tasks_blocked()
        sizes, got = Random(2), bytearray()
        while chunk := await r.receive_some(sizes.randint(1, 5000)):
            got += chunk
        _expect(len(got) == len(_LONG), f"{len(_LONG)} bytes were sent, {len(got)} received before the end")
        _expect(got == _LONG, "other bytes were received than were sent")
        _expect(await _checkpoint(r.receive_some) == b"", "after the end comes something else than the end")
        await _checkpoint(r.aclose)

    await _together(send, receive)


async def _blocks_and_loops(s: SendStream, r: ReceiveStream) -> None:
    """`async with` closes, and `async for` takes all there is."""

    async def send() -> None:
        async with s:
            await s.send_all(_LONG)

    async def receive() -> None:
        got = bytearray()
        async with r:
            async for chunk in r:
                got += chunk
        _expect(got == _LONG, f"{len(_LONG)} bytes were sent, {len(got)} received by `async for`")

    await _together(send, receive)
    await _refuses_to_send(s)
    await _refuses_to_receive(r)


async def _two_receive(s: SendStream, r: ReceiveStream) -> None:
    """While a task is receiving, another one gets BusyResourceError, and the first one gets what is sent."""
    async with open_nursery() as nursery:
        first = nursery.spawn(r.receive_some, 1)
        await wait_all_tasks_blocked()
        with _raises(BusyResourceError, "receive_some() while another task is receiving"):
            await r.receive_some(1)
        await s.send_all(b"x")
        got = await first
        _expect(got == b"x", f"{got!r} was received, not b'x'")
    await _arrives(b"free again", s, r)


async def _cancelled_while_receiving(s: SendStream, r: ReceiveStream) -> None:
    """A task that is cancelled while it is receiving has received nothing, and left nothing behind."""
    for _ in range(2):
        async with open_nursery() as nursery:
            nursery.start_soon(r.receive_some, 1)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    await _arrives(b"kept", s, r)


async def _cancelled_before(s: SendStream, r: ReceiveStream) -> None:
    """Every operation is a cancel point, before it does anything, whether or not it needs to wait."""
    await _is_cancelled(partial(s.send_all, b"x"), "send_all()")
    await _is_cancelled(partial(s.send_all, b""), "send_all(b'')")
    await _is_cancelled(s.wait_send_all_might_not_block, "wait_send_all_might_not_block()")
    await _is_cancelled(partial(r.receive_some, 1), "receive_some()")
    async with open_nursery() as nursery:
        nursery.start_soon(s.send_all, b"kept")
        await wait_all_tasks_blocked()
        await _is_cancelled(partial(r.receive_some, 1), "receive_some() with something to receive")
        got = await _receive(r, 4)
        _expect(got == b"kept", f"{got!r} was received after cancelled calls, not b'kept'")
    await _together(partial(_checkpoint, s.aclose), partial(_checkpoint, r.aclose))


async def _room(s: SendStream, r: ReceiveStream) -> None:
    """While a task is receiving and nothing is on its way, wait_send_all_might_not_block returns; a checkpoint."""
    async with open_nursery() as nursery:
        nursery.start_soon(r.receive_some, 1)
        await wait_all_tasks_blocked()
        for _ in range(2):
            nothing: object = await _checkpoint(s.wait_send_all_might_not_block)
            _expect(nothing is None, f"wait_send_all_might_not_block() returns {nothing!r}")
        nursery.cancel_scope.cancel()
    await _arrives(b"x", s, r)


async def _receiver_closes(s: SendStream, r: ReceiveStream) -> None:
    """When the receiver has closed, sending breaks, sooner or later, and for good."""
    await _together(partial(_breaks, s), r.aclose)
    with _raises(BrokenResourceError, "send_all() on a broken stream"):
        await s.send_all(b"x")
    await _refuses_to_receive(r)


async def _receiver_closes_forcefully(s: SendStream, r: ReceiveStream) -> None:
    """When the receiver has closed without ceremony, sending breaks, sooner or later, and for good."""
    await aclose_forcefully(r)
    await _breaks(s)
    with _raises(BrokenResourceError, "send_all() on a broken stream"):
        await s.send_all(b"x")
    await _refuses_to_receive(r)


async def _sender_closes_forcefully(s: SendStream, r: ReceiveStream) -> None:
    """When the sender has closed without ceremony, the receiver gets the end, or BrokenResourceError."""
    await aclose_forcefully(s)
    await _refuses_to_send(s)
    with suppress(BrokenResourceError):
        got = await r.receive_some(10)
        _expect(got == b"", f"{got!r} was received, which was never sent")


async def _closed(s: SendStream, r: ReceiveStream) -> None:
    """aclose is a checkpoint. A closed stream refuses everything, but to be closed again."""
    await _together(partial(_checkpoint, s.aclose), partial(_checkpoint, r.aclose))
    for _ in range(2):
        await _refuses_to_send(s)
        await _refuses_to_receive(r)
        await _checkpoint(s.aclose)
        await _checkpoint(r.aclose)


async def _cancelled_aclose(s: SendStream, r: ReceiveStream) -> None:
    """aclose closes also when it is cancelled. It is a cancel point, each time."""
    for _ in range(2):
        await _is_cancelled(r.aclose, "aclose() of the receiver")
        await _refuses_to_receive(r)
        await _is_cancelled(s.aclose, "aclose() of the sender")
        await _refuses_to_send(s)


async def _closed_while_receiving(s: SendStream, r: ReceiveStream) -> None:
    """A task that is receiving gets ClosedResourceError when another one closes the stream."""
    async with open_nursery() as nursery:

        async def receive() -> None:
            with _raises(ClosedResourceError, "receive_some() on a stream that is closed meanwhile"):
                await r.receive_some(10)

        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        await aclose_forcefully(r)


ONE_WAY: Final[tuple[Check, ...]] = (
    _sent_and_received, _receiver_first, _nothing_is_sent, _any_kind_of_bytes, _max_bytes, _order_and_end,
    _blocks_and_loops, _two_receive, _cancelled_while_receiving, _cancelled_before, _room, _receiver_closes,
    _receiver_closes_forcefully, _sender_closes_forcefully, _closed, _cancelled_aclose, _closed_while_receiving,
)  # fmt: skip


# ---- clogged ----------------------------------------------------------------------------------------------


async def _until_there_is_room(s: SendStream, r: ReceiveStream) -> None:
    """wait_send_all_might_not_block waits while there is no room, and wakes when there is."""
    async with open_nursery() as nursery:
        waiter = nursery.spawn(partial(_checkpoint, s.wait_send_all_might_not_block))
        await wait_all_tasks_blocked()
        _expect(not waiter.done, "wait_send_all_might_not_block() returns at once, although there is no room")

        async def receive() -> None:
            while True:
                await r.receive_some(16_384)

        nursery.start_soon(receive)
        await waiter
        nursery.cancel_scope.cancel()


async def _two_send(s: SendStream, r: ReceiveStream) -> None:
    """While a task is sending, others that send or wait get BusyResourceError, and it is not disturbed."""
    await _is_busy(partial(s.send_all, b"123"), s)


async def _two_wait(s: SendStream, r: ReceiveStream) -> None:
    """While a task waits to send, others that send or wait get BusyResourceError, and it is not disturbed."""
    for _ in range(2):
        await _is_busy(s.wait_send_all_might_not_block, s)


async def _is_busy(call: Call[object], s: SendStream, *others: tuple[str, Call[object]]) -> None:
    async with open_nursery() as nursery:
        first = nursery.spawn(call)
        await wait_all_tasks_blocked()
        for name, other in others or (
            ("send_all(b'x')", partial(s.send_all, b"x")), ("send_all(b'')", partial(s.send_all, b"")),
            ("wait_send_all_might_not_block()", s.wait_send_all_might_not_block)
        ):  # fmt: skip
            with _raises(BusyResourceError, f"{name} while another task is sending, or waiting to,"):
                await other()
        await wait_all_tasks_blocked()
        _expect(not first.done, "the task that was there first does not wait any more, although there is no room")
        nursery.cancel_scope.cancel()


async def _cancelled_while_sending(s: SendStream, r: ReceiveStream) -> None:
    """Of what a cancelled send_all had to send, the first bytes arrive, and no others. If the exception has
    `bytes_sent`, one can go on behind so many.
    """
    data = _LONG * 20
    async with open_nursery() as nursery:
        sent: int | None = None

        async def send() -> None:
            nonlocal sent
            try:
                await s.send_all(data)
            except Cancelled as cancelled:
                sent = getattr(cancelled, "bytes_sent", None)
                raise

        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        got = bytearray(await r.receive_some(1000))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    async def go_on() -> None:
        with suppress(BrokenResourceError):
            if sent is not None:
                await s.send_all(data[sent:])
                return
        await aclose_forcefully(s)

    start = -1

    async def receive() -> None:
        nonlocal start
        with suppress(BrokenResourceError):
            while start < 0 or len(got) - start < len(data):
                got.extend(chunk := await r.receive_some())
                if not chunk:
                    break
                if start < 0:
                    start = got.find(data[:16])  # before it may be what the stream was clogged with

    await _together(go_on, receive)
    if start >= 0:
        arrived = bytes(got[start:])
        _expect(data.startswith(arrived), f"other bytes were received than were sent, or twice; bytes_sent is {sent}")


async def _receiver_closes_while_waiting(s: SendStream, r: ReceiveStream) -> None:
    """A task that waits to send wakes when the receiver closes, with BrokenResourceError or well."""

    async def wait() -> None:
        with suppress(BrokenResourceError):
            await _checkpoint(s.wait_send_all_might_not_block)

    async with open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        await aclose_forcefully(r)
    await wait()  # and now does not wait


async def _receiver_closes_while_sending(s: SendStream, r: ReceiveStream) -> None:
    """A task that is sending gets BrokenResourceError when the receiver closes."""
    async with open_nursery() as nursery:
        nursery.start_soon(_breaks, s)
        await wait_all_tasks_blocked()
        await aclose_forcefully(r)


async def _closed_while_sending(s: SendStream, r: ReceiveStream) -> None:
    """A task that is sending gets ClosedResourceError when another one closes the stream."""
    await _is_closed(partial(s.send_all, b"x"), "send_all()", s)


async def _closed_while_waiting(s: SendStream, r: ReceiveStream) -> None:
    """A task that waits to send gets ClosedResourceError when another one closes the stream."""
    await _is_closed(s.wait_send_all_might_not_block, "wait_send_all_might_not_block()", s)


async def _is_closed(call: Call[object], name: str, s: SendStream) -> None:
    async def use() -> None:
        with _raises(ClosedResourceError, f"{name} on a stream that is closed meanwhile"):
            await call()

    async with open_nursery() as nursery:
        nursery.start_soon(use)
        await wait_all_tasks_blocked()
        await aclose_forcefully(s)


CLOGGED: Final[tuple[Check, ...]] = (
    _until_there_is_room, _two_send, _two_wait, _cancelled_while_sending, _receiver_closes_while_waiting,
    _receiver_closes_while_sending, _closed_while_sending, _closed_while_waiting,
)  # fmt: skip


# ---- both ways --------------------------------------------------------------------------------------------


async def _duplex(one: Stream, two: Stream) -> None:
    """Both ends may send and receive at the same time, and what goes one way does not get in the way of the other."""
    _expect(isinstance(one, Stream), f"{one!r} is no Stream")
    _expect(isinstance(two, Stream), f"{two!r} is no Stream")

    async def send(stream: Stream, data: bytes, seed: int) -> None:
        sizes, view = Random(seed), memoryview(data)
        while view:
            size = sizes.randint(1, 16_384)
            await stream.send_all(view[:size])
            view = view[size:]

    async def receive(stream: Stream, data: bytes, seed: int) -> None:
        sizes, got = Random(seed), bytearray()
        while len(got) < len(data):
            chunk = await stream.receive_some(sizes.randint(1, 16_384))
            _expect(len(chunk) > 0, "the end came too early")
            got += chunk
        _expect(got == data, "other bytes were received than were sent")

    there, back = _LONG * 5, _LONG[::-1] * 5
    await _together(
        partial(send, one, there, 1), partial(send, two, back, 2),
        partial(receive, one, back, 3), partial(receive, two, there, 4),
    )  # fmt: skip


async def _send_while_receiving(one: Stream, two: Stream) -> None:
    """A task may send while another is receiving at the same end."""
    async with open_nursery() as nursery:
        receiver = nursery.spawn(one.receive_some, 1)
        await wait_all_tasks_blocked()
        await _arrives(b"there", one, two)
        _expect(not receiver.done, "what was sent comes back")
        await two.send_all(b"!")
        got = await receiver
        _expect(got == b"!", f"{got!r} was received, not b'!'")


async def _both_ways_closed(one: Stream, two: Stream) -> None:
    """Closing an end ends both ways: here everything is refused, and the other side gets the end."""

    async def receive() -> None:
        got = await two.receive_some(10)
        _expect(got == b"", f"{got!r} was received, not the end")
        await two.aclose()

    await _together(one.aclose, receive)
    for stream in (one, two):
        await _refuses_to_send(stream)
        await _refuses_to_receive(stream)


TWO_WAY: Final[tuple[Check, ...]] = (_duplex, _send_while_receiving, _both_ways_closed)


# ---- half-closed ------------------------------------------------------------------------------------------


async def _half_closed(one: HalfCloseableStream, two: HalfCloseableStream) -> None:
    """After send_eof the other side gets what was sent, and then the end. Here sending is refused, send_eof allowed
    again, and receiving goes on. It is a checkpoint.
    """
    _expect(isinstance(one, HalfCloseableStream), f"{one!r} is no HalfCloseableStream")
    _expect(isinstance(two, HalfCloseableStream), f"{two!r} is no HalfCloseableStream")

    async def send(stream: HalfCloseableStream) -> None:
        await stream.send_all(b"x")
        await _checkpoint(stream.send_eof)

    async def receive(stream: HalfCloseableStream) -> None:
        await wait_all_tasks_blocked()
        got = await _receive(stream)
        _expect(got == b"x", f"{got!r} was received up to the end, not b'x'")

    for here, there in ((one, two), (two, one)):
        await _together(partial(send, here), partial(receive, there))
        for data in (b"x", b""):
            with _raises(ClosedResourceError, f"send_all({data!r}) after send_eof()"):
                await here.send_all(data)
        await _checkpoint(here.send_eof)


async def _cancelled_send_eof(one: HalfCloseableStream, two: HalfCloseableStream) -> None:
    """send_eof is a cancel point, also the second time, and a cancelled one does not get in the way of receiving."""
    for _ in range(2):
        await _is_cancelled(one.send_eof, "send_eof()")
    await _arrives(b"x", two, one)


async def _send_eof_while_sending(one: HalfCloseableStream, two: HalfCloseableStream) -> None:
    """While a task is sending, send_eof raises BusyResourceError."""
    await _is_busy(partial(one.send_all, b"x"), one, ("send_eof()", one.send_eof))


async def _send_eof_while_waiting(one: HalfCloseableStream, two: HalfCloseableStream) -> None:
    """While a task waits to send, send_eof raises BusyResourceError."""
    await _is_busy(one.wait_send_all_might_not_block, one, ("send_eof()", one.send_eof))


HALF_CLOSEABLE: Final[tuple[Check, ...]] = (_half_closed, _cancelled_send_eof)
HALF_CLOSEABLE_CLOGGED: Final[tuple[Check, ...]] = (_send_eof_while_sending, _send_eof_while_waiting)


# ---- running them -----------------------------------------------------------------------------------------


async def _run(checks: tuple[Check, ...], maker: StreamMaker[Any, Any] | None) -> None:
    if maker is None:
        return
    for check in checks:
        one, two = await maker()
        try:
            await _run_one(check, one, two)
        except Exception as error:
            promise = " ".join((check.__doc__ or "").split())
            raise AssertionError(
                f"{one!r} and {two!r} break a promise: {promise}\n{type(error).__name__}: {error}"
            ) from error
        finally:
            await _close_both(one, two)


async def _run_one(check: Check, one: Any, two: Any) -> None:
    """Run `check`, and end it if it hangs."""
    hangs = False

    async def call_off() -> None:
        nonlocal hangs
        await wait_all_tasks_blocked(PATIENCE)
        hangs = True
        scope.cancel()
        await wait_all_tasks_blocked(PATIENCE)  # for ever, unless it waits in a shield
        await _close_both(one, two)

    try:
        with raise_single():
            async with open_nursery() as nursery:
                nursery.start_soon(call_off)
                with CancelScope() as scope:
                    await check(one, two)
                nursery.cancel_scope.cancel()
    except Exception as error:
        if not hangs:
            raise
        raise AssertionError("it hangs, and is not to be cancelled") from error
    _expect(not hangs, "it hangs")


async def _close_both(one: AsyncResource, two: AsyncResource) -> None:
    try:
        await aclose_forcefully(one)
    finally:
        await aclose_forcefully(two)


def _flipped(maker: StreamMaker[Any, Any] | None) -> StreamMaker[Any, Any] | None:
    async def make() -> tuple[Any, Any]:
        assert maker is not None
        one, two = await maker()
        return two, one

    return None if maker is None else make


async def check_one_way_stream(
    stream_maker: StreamMaker[SendStream, ReceiveStream],
    clogged_stream_maker: StreamMaker[SendStream, ReceiveStream] | None,
) -> None:
    """Check that a stream keeps the promises of `kernel.abc.SendStream` and `ReceiveStream`.

    Args:
        stream_maker: an async function without arguments that returns a connected pair: one to send, one to receive.
            It is called some twenty times.
        clogged_stream_maker: likewise, but the pair is in a state in which `send_all` and
            `wait_send_all_might_not_block` wait until something is received. None: what needs that is not checked.

    Always a cancel point and a schedule point. All streams that were made are closed, forcefully. Cost: some
    milliseconds. Where time is virtual, it may pass.

    Raises:
        AssertionError: a promise is not kept; the message says which. The cause is what was seen.
    """
    await _run(ONE_WAY, stream_maker)
    await _run(CLOGGED, clogged_stream_maker)


async def check_two_way_stream(
    stream_maker: StreamMaker[Stream, Stream], clogged_stream_maker: StreamMaker[Stream, Stream] | None
) -> None:
    """Check that a stream keeps the promises of `kernel.abc.Stream`: both ways as `check_one_way_stream`, and more.

    The makers return two streams, connected; a clogged pair is so both ways. Errors likewise.
    """
    await check_one_way_stream(stream_maker, clogged_stream_maker)
    await _run(ONE_WAY, _flipped(stream_maker))
    await _run(CLOGGED, _flipped(clogged_stream_maker))
    await _run(TWO_WAY, stream_maker)


async def check_half_closeable_stream(
    stream_maker: StreamMaker[HalfCloseableStream, HalfCloseableStream],
    clogged_stream_maker: StreamMaker[HalfCloseableStream, HalfCloseableStream] | None,
) -> None:
    """Check that a stream keeps the promises of `kernel.abc.HalfCloseableStream`: as `check_two_way_stream`, and more.

    The makers return two streams, connected; a clogged pair is so both ways. Errors likewise.
    """
    await check_two_way_stream(stream_maker, clogged_stream_maker)
    await _run(HALF_CLOSEABLE, stream_maker)
    await _run(HALF_CLOSEABLE_CLOGGED, clogged_stream_maker)
