"""The checkers of streams: good ones pass, and for every promise there is a stream that breaks it and is found out."""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable
from functools import partial
from math import inf
from typing import Any

import pytest

import kernel
from kernel import BrokenResourceError, StapledStream
from kernel.abc import ReceiveStream, SendStream, Stream
from kernel.core.traps import checkpoint_if_cancelled
from kernel.lowlevel import FdStream, cancel_shielded_checkpoint, checkpoint, operation
from kernel.testing import (
    MemoryReceiveStream,
    MemorySendStream,
    check_half_closeable_stream,
    check_one_way_stream,
    check_streams,
    check_two_way_stream,
    lockstep_stream_one_way_pair,
    lockstep_stream_pair,
    memory_stream_one_way_pair,
    memory_stream_pair,
    memory_stream_pump,
)
from kernel.testing.streams import LockstepReceiveStream, LockstepSendStream, _Lockstep

Maker = Callable[[], Awaitable[tuple[Any, Any]]]


def made_by(make_pair: Callable[[], tuple[Any, Any]]) -> Maker:
    async def make() -> tuple[Any, Any]:
        return make_pair()

    return make


def pipe() -> tuple[FdStream, FdStream]:
    read, write = os.pipe()
    return FdStream(write), FdStream(read)


def clogged_pipe() -> tuple[FdStream, FdStream]:
    sender, receiver = pipe()
    try:
        while True:
            os.write(sender.fileno(), b"x" * 4096)
    except BlockingIOError:
        return sender, receiver


def both_ways(make_pair: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    (one, two), (three, four) = make_pair(), make_pair()
    return StapledStream(one, four), StapledStream(three, two)


class HalfCloseableLockstep(StapledStream[LockstepSendStream, LockstepReceiveStream]):
    """A StapledStream has no guard of its own, so its `send_eof` goes in between a `send_all`. This one has."""

    @operation
    def send_eof(self) -> Any:
        with self.send_stream._busy:
            yield from self.send_stream.aclose()


def half_closeable() -> tuple[HalfCloseableLockstep, HalfCloseableLockstep]:
    one, two = lockstep_stream_pair()
    return (
        HalfCloseableLockstep(one.send_stream, one.receive_stream),
        HalfCloseableLockstep(two.send_stream, two.receive_stream),
    )


# ---- good streams -----------------------------------------------------------------------------------------


def test_memory_streams_keep_all_promises() -> None:
    kernel.run(check_one_way_stream, made_by(memory_stream_one_way_pair), None)
    kernel.run(check_half_closeable_stream, made_by(memory_stream_pair), None)


def test_a_memory_stream_whose_hooks_wait_keeps_all_promises() -> None:
    """Its receiver fetches what was sent, so the network is as clogged as can be."""

    def make() -> tuple[MemorySendStream, MemoryReceiveStream]:
        sender, receiver = memory_stream_one_way_pair()
        fetched = kernel.lowlevel.ParkingLot()
        waiting = False

        async def until_fetched() -> None:
            while sender._buffer._data:
                await fetched.park()
            if receiver._closed:
                raise BrokenResourceError

        async def until_somebody_waits() -> None:
            while not waiting and not receiver._closed:
                await fetched.park()

        async def fetch() -> None:
            nonlocal waiting
            waiting = True
            fetched.unpark_all()
            try:
                while not receiver._buffer._data and not receiver._buffer.closed:
                    memory_stream_pump(sender, receiver)
                    fetched.unpark_all()
                    if not receiver._buffer._data and not receiver._buffer.closed:
                        await arrival.park()
            finally:
                waiting = False

        arrival = kernel.lowlevel.ParkingLot()

        async def send() -> None:
            if receiver._closed:
                raise BrokenResourceError
            arrival.unpark_all()
            await until_fetched()

        def closed() -> None:
            sender._buffer._data.clear()
            fetched.unpark_all()

        def ended() -> None:
            receiver.put_eof()
            arrival.unpark_all()

        sender.send_all_hook = send
        sender.wait_send_all_might_not_block_hook = until_somebody_waits
        sender.close_hook = ended
        receiver.receive_some_hook = fetch
        receiver.close_hook = closed
        return sender, receiver

    kernel.run(check_one_way_stream, made_by(make), made_by(make))


def test_lockstep_streams_keep_all_promises() -> None:
    make = made_by(lockstep_stream_one_way_pair)
    kernel.run(check_one_way_stream, make, make)
    make = made_by(lockstep_stream_pair)
    kernel.run(check_two_way_stream, make, make)
    make = made_by(half_closeable)
    kernel.run(check_half_closeable_stream, make, make)


def test_a_stream_need_not_know_how_much_it_has_sent() -> None:
    class DoesNotSay(LockstepSendStream):
        async def send_all(self, data: Any) -> None:
            try:
                await super().send_all(data)
            except kernel.Cancelled as cancelled:
                del cancelled.bytes_sent  # type: ignore[attr-defined]
                raise

    make = made_by(partial(lockstep_pair, DoesNotSay))
    kernel.run(check_one_way_stream, make, make)


def test_pipes_keep_all_promises() -> None:
    kernel.run(check_one_way_stream, made_by(pipe), made_by(clogged_pipe))


def test_stapled_pipes_keep_all_promises() -> None:
    kernel.run(check_two_way_stream, made_by(partial(both_ways, pipe)), made_by(partial(both_ways, clogged_pipe)))
    kernel.run(check_half_closeable_stream, made_by(partial(both_ways, pipe)), None)


def test_the_checkers_work_in_virtual_time(virtual: Any) -> None:
    """A stream may sleep, in time that is the clock's own."""

    def make() -> tuple[MemorySendStream, MemoryReceiveStream]:
        sender, receiver = memory_stream_one_way_pair()

        async def drip() -> None:
            while memory_stream_pump(sender, receiver, max_bytes=5000):
                await kernel.sleep(1)

        sender.send_all_hook = drip
        return sender, receiver

    virtual(check_one_way_stream, made_by(make), None)


def test_all_streams_that_were_made_are_closed_also_when_a_check_fails() -> None:
    made: list[Any] = []

    def make(receiver: type[MemoryReceiveStream] = MemoryReceiveStream) -> tuple[Any, Any]:
        made.extend(memory_pair(receiver=receiver))
        return made[-2], made[-1]

    kernel.run(check_one_way_stream, made_by(make), None)
    with pytest.raises(AssertionError):
        kernel.run(check_one_way_stream, made_by(partial(make, ReceivesAll)), None)
    assert len(made) > 40
    assert all(
        sender._buffer.closed and receiver._closed for sender, receiver in zip(made[::2], made[1::2], strict=True)
    )


# ---- what the broken ones are made of ---------------------------------------------------------------------


def memory_pair(
    sender: type[MemorySendStream] = MemorySendStream, receiver: type[MemoryReceiveStream] = MemoryReceiveStream
) -> tuple[MemorySendStream, MemoryReceiveStream]:
    one, two = sender(), receiver()

    async def send() -> None:
        memory_stream_pump(one, two)

    def close() -> None:
        try:
            memory_stream_pump(one, two)
            memory_stream_pump(one, two)
        except BrokenResourceError:
            pass

    one.send_all_hook = send
    one.close_hook = close
    return one, two


def lockstep_pair(
    sender: type[LockstepSendStream] = LockstepSendStream, receiver: type[LockstepReceiveStream] = LockstepReceiveStream
) -> tuple[LockstepSendStream, LockstepReceiveStream]:
    state = _Lockstep()
    return sender(state), receiver(state)


def is_cancelled() -> bool:
    return kernel.current_effective_deadline() == -inf


BROKEN: list[Any] = []


def breaks(check: Callable[..., Any], what: str = "") -> Callable[[type], type]:
    """Class decorator: a check must fail for this stream, and its error must say `what` (a regular expression)."""

    def note(cls: type) -> type:
        if issubclass(cls, StapledStream):
            inner = memory_pair if issubclass(cls, OnMemory) else lockstep_pair

            def make() -> tuple[Any, Any]:
                one, two = both_ways(inner)
                return cls(one.send_stream, one.receive_stream), cls(two.send_stream, two.receive_stream)

            half = cls.checker is check_half_closeable_stream
            checker: Any = check_half_closeable_stream if half else check_two_way_stream
            clogged = inner is lockstep_pair
        else:
            pair: Any = memory_pair if issubclass(cls, MemorySendStream | MemoryReceiveStream) else lockstep_pair
            make = partial(pair, **{"sender" if issubclass(cls, SendStream) else "receiver": cls})
            checker, clogged = check_one_way_stream, pair is lockstep_pair
        BROKEN.append(pytest.param(checker, made_by(make), clogged, check, what, id=cls.__name__))
        return cls

    return note


class OnMemory(StapledStream[Any, Any]):
    checker = check_half_closeable_stream


class OnLockstep(HalfCloseableLockstep):
    checker = check_half_closeable_stream


# ---- broken: one way --------------------------------------------------------------------------------------


@breaks(check_streams._sent_and_received, "no checkpoint")
class SendsWithoutACheckpoint(MemorySendStream):
    async def send_all(self, data: Any) -> None:
        self._buffer.put(data)
        await self.send_all_hook()


@breaks(check_streams._sent_and_received, "no cancel point")
class SendsShielded(MemorySendStream):
    async def send_all(self, data: Any) -> None:
        await cancel_shielded_checkpoint()
        self._buffer.put(data)
        await self.send_all_hook()


@breaks(check_streams._sent_and_received, "no schedule point")
class NeverLetsOthersRun(MemorySendStream):
    async def send_all(self, data: Any) -> None:
        await checkpoint_if_cancelled()
        self._buffer.put(data)
        await self.send_all_hook()


@breaks(check_streams._sent_and_received, "no checkpoint")
class ReceivesWithoutACheckpoint(MemoryReceiveStream):
    async def receive_some(self, max_bytes: int | None = None) -> bytearray:
        return self._buffer.take_nowait(max_bytes) if self._buffer._data else await super().receive_some(max_bytes)


@breaks(check_streams._sent_and_received, "send_all.. returns 1")
class SaysHowMany(MemorySendStream):
    async def send_all(self, data: Any) -> int:
        await super().send_all(data)
        return len(data)


@breaks(check_streams._sent_and_received, "are no bytes")
class ReturnsText(MemoryReceiveStream):
    async def receive_some(self, max_bytes: int | None = None) -> Any:
        return (await super().receive_some(max_bytes)).decode("latin-1")


@breaks(check_streams._sent_and_received, "was received, not b'x'")
class ReceivesOtherBytes(MemoryReceiveStream):
    async def receive_some(self, max_bytes: int | None = None) -> bytearray:
        return bytearray(len(await super().receive_some(max_bytes)))


@breaks(check_streams._receiver_first, "it hangs")
class DoesNotWakeReceivers(MemoryReceiveStream):
    def put_data(self, data: Any) -> None:
        self._buffer._data += data


@breaks(check_streams._nothing_is_sent, "ClosedResourceError")
class SendingNothingIsTheEnd(MemorySendStream):
    async def send_all(self, data: Any) -> None:
        await super().send_all(data)
        if not data:
            self._buffer.close()
            await self.send_all_hook()


@breaks(check_streams._nothing_is_sent, "no checkpoint")
class SendingNothingIsNoCheckpoint(MemorySendStream):
    async def send_all(self, data: Any) -> None:
        if data:
            await super().send_all(data)


@breaks(check_streams._any_kind_of_bytes, "TypeError")
class WantsBytes(MemorySendStream):
    async def send_all(self, data: Any) -> None:
        if not isinstance(data, bytes):
            raise TypeError("bytes, please")
        await super().send_all(data)


@breaks(check_streams._any_kind_of_bytes, r"b'\?\?\?'")
class KeepsTheCallersBuffer(MemorySendStream):
    """What is sent is kept, and copied only when the next thing happens."""

    async def send_all(self, data: Any) -> None:
        await checkpoint()
        kept = [data]
        hook = self.send_all_hook

        async def late() -> None:
            await checkpoint()
            await checkpoint()
            await super(KeepsTheCallersBuffer, self).send_all(kept[0])
            await hook()

        kernel.lowlevel.spawn_system_task(late)


@breaks(check_streams._max_bytes, r"receive_some\(0\) does not raise ValueError")
class TakesZero(MemoryReceiveStream):
    async def receive_some(self, max_bytes: int | None = None) -> bytearray:
        return bytearray() if max_bytes == 0 else await super().receive_some(max_bytes)


@breaks(check_streams._max_bytes, r"receive_some\(1.5\) does not raise TypeError")
class TakesFractions(MemoryReceiveStream):
    async def receive_some(self, max_bytes: Any = None) -> bytearray:
        if isinstance(max_bytes, float):
            return bytearray()
        return await super().receive_some(max_bytes)


@breaks(check_streams._max_bytes, "returns bytearray")
class ReceivesAll(MemoryReceiveStream):
    async def receive_some(self, max_bytes: Any = None) -> bytearray:
        return await super().receive_some(None if max_bytes == 3 else max_bytes)


@breaks(check_streams._max_bytes, "before the end")
class ReturnsNothingAtTimes(MemoryReceiveStream):
    turn = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytearray:
        self.turn += 1
        if self.turn == 8:
            return bytearray()
        return await super().receive_some(max_bytes)


@breaks(check_streams._order_and_end, "other bytes")
class SwapsBytes(MemoryReceiveStream):
    async def receive_some(self, max_bytes: int | None = None) -> bytearray:
        chunk = await super().receive_some(max_bytes)
        if len(chunk) > 1000:
            chunk[0], chunk[1] = chunk[1], chunk[0]
        return chunk


@breaks(check_streams._order_and_end, "0 received before the end")
class ClosingLosesWhatIsOnItsWay(MemorySendStream):
    def close(self) -> None:
        self.receiver._buffer._data.clear()
        super().close()

    @property
    def receiver(self) -> Any:
        return self.send_all_hook.__closure__[1].cell_contents  # type: ignore[union-attr]


@breaks(check_streams._order_and_end, "RuntimeError: I have said so")
class EndsOnce(MemoryReceiveStream):
    ended = False

    async def receive_some(self, max_bytes: int | None = None) -> bytearray:
        if self.ended:
            raise RuntimeError("I have said so")
        chunk = await super().receive_some(max_bytes)
        self.ended = not chunk
        return chunk


@breaks(check_streams._blocks_and_loops, "ClosedResourceError|hangs|does not raise")
class LeavingABlockDoesNotClose(MemoryReceiveStream):
    async def __aexit__(self, *exc_info: object) -> None:
        pass


@breaks(check_streams._blocks_and_loops, "by `async for`")
class LoopsOnce(MemoryReceiveStream):
    ended = False

    async def __anext__(self) -> bytearray:
        if self.ended:
            raise StopAsyncIteration
        self.ended = True
        return await self.receive_some(10)


@breaks(check_streams._two_receive, "does not raise BusyResourceError|hangs")
class ManyMayReceive(LockstepReceiveStream):
    async def receive_some(self, max_bytes: int | None = None) -> bytearray:
        self._busy._busy = False
        return await super().receive_some(max_bytes)


@breaks(check_streams._two_receive, "BusyResourceError")
class StaysBusy(MemoryReceiveStream):
    async def receive_some(self, max_bytes: int | None = None) -> bytearray:
        try:
            return await super().receive_some(max_bytes)
        except kernel.BusyResourceError:
            self.__dict__["receive_some"] = self.busy
            raise

    async def busy(self, max_bytes: int | None = None) -> bytearray:
        raise kernel.BusyResourceError


@breaks(check_streams._cancelled_while_receiving, "BusyResourceError")
class BusyAfterACancellation(MemoryReceiveStream):
    async def receive_some(self, max_bytes: int | None = None) -> bytearray:
        try:
            return await super().receive_some(max_bytes)
        except kernel.Cancelled:
            self._busy._busy = True
            raise


@breaks(check_streams._cancelled_while_receiving, "hangs")
class ACancelledReceiverEatsAByte(MemoryReceiveStream):
    eaten = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytearray:
        try:
            return await super().receive_some(max_bytes)
        except kernel.Cancelled:
            self.eaten = 1
            raise

    def put_data(self, data: Any) -> None:
        eaten, self.eaten = self.eaten, 0
        super().put_data(data[eaten:])


@breaks(check_streams._cancelled_while_receiving, "'!ept' was received, not b'kept'")
class ACancelledReceiverSpoilsAByte(ACancelledReceiverEatsAByte):
    def put_data(self, data: Any) -> None:
        eaten, self.eaten = self.eaten, 0
        MemoryReceiveStream.put_data(self, b"!" * eaten + data[eaten:])


@breaks(check_streams._cancelled_before, "b'xkep'")
class SendsBeforeItLooks(MemorySendStream):
    async def send_all(self, data: Any) -> None:
        self._buffer.put(data)
        await self.send_all_hook()
        await checkpoint()


@breaks(check_streams._cancelled_before, "hangs")
class ReceivesBeforeItLooks(MemoryReceiveStream):
    async def receive_some(self, max_bytes: int | None = None) -> bytearray:
        if not self._buffer._data:
            return await super().receive_some(max_bytes)
        data = self._buffer.take_nowait(max_bytes)
        await checkpoint()
        return data


@breaks(check_streams._cancelled_before, r"send_all\(b''\) in a cancelled scope does not raise Cancelled")
class IsNotCancelledWhenNothingIsSent(MemorySendStream):
    async def send_all(self, data: Any) -> None:
        try:
            await super().send_all(data)
        except kernel.Cancelled:
            if data:
                raise


@breaks(check_streams._cancelled_before, "it hangs, and is not to be cancelled")
class WaitsForDataShielded(LockstepReceiveStream):
    async def receive_some(self, max_bytes: int | None = None) -> bytearray:
        with kernel.CancelScope(shield=is_cancelled() and not self._state.offered):
            return await super().receive_some(max_bytes)


@breaks(check_streams._cancelled_before, "RuntimeError: not after that")
class CannotBeClosedAfterACancellation(MemorySendStream):
    cancelled = False

    async def send_all(self, data: Any) -> None:
        try:
            await super().send_all(data)
        except kernel.Cancelled:
            self.cancelled = True
            raise

    async def aclose(self) -> None:
        await super().aclose()
        if self.cancelled:
            raise RuntimeError("not after that")


@breaks(check_streams._cancelled_before, "says that it has sent some")
class SaysItHasSent(MemorySendStream):
    async def send_all(self, data: Any) -> None:
        try:
            await super().send_all(data)
        except kernel.Cancelled as cancelled:
            cancelled.bytes_sent = 1  # type: ignore[attr-defined]
            raise


@breaks(check_streams._cancelled_before, r"wait_send_all_might_not_block\(\) in a cancelled scope does not raise")
class WaitsShielded(MemorySendStream):
    async def wait_send_all_might_not_block(self) -> None:
        with kernel.CancelScope(shield=True):
            await super().wait_send_all_might_not_block()


@breaks(check_streams._room, "no schedule point")
class WaitingIsNoSchedulePoint(MemorySendStream):
    async def wait_send_all_might_not_block(self) -> None:
        await checkpoint_if_cancelled()
        if self._buffer.closed:
            raise kernel.ClosedResourceError


@breaks(check_streams._room, "hangs")
class NeverHasRoom(MemorySendStream):
    async def wait_send_all_might_not_block(self) -> None:
        await super().wait_send_all_might_not_block()
        await kernel.sleep_forever()


@breaks(check_streams._receiver_closes, "does not raise BrokenResourceError")
class SendsToNobody(MemorySendStream):
    async def send_all(self, data: Any) -> None:
        try:
            await super().send_all(data)
        except BrokenResourceError:
            pass


@breaks(check_streams._receiver_closes, r"on a broken stream does not raise")
class BreaksOnce(MemorySendStream):
    broken = False

    async def send_all(self, data: Any) -> None:
        try:
            await super().send_all(data)
        except BrokenResourceError:
            if self.broken:
                return
            self.broken = True
            raise


@breaks(check_streams._receiver_closes_forcefully, "does not raise BrokenResourceError")
class OnlyPolitePartingIsNoticed(MemoryReceiveStream):
    polite = False

    async def aclose(self) -> None:
        try:
            await super().aclose()
            self.polite = True
        except kernel.Cancelled:
            raise

    def put_data(self, data: Any) -> None:
        if not self._closed or self.polite:
            super().put_data(data)


@breaks(check_streams._sender_closes_forcefully, r"b'bye'")
class SaysGoodbyeInAnyCase(MemorySendStream):
    async def aclose(self) -> None:
        if is_cancelled() and not self._buffer.closed:
            self._buffer.put(b"bye")
        await super().aclose()


@breaks(check_streams._sender_closes_forcefully, "hangs")
class TheEndIsSentPolitelyOnly(MemorySendStream):
    async def aclose(self) -> None:
        hook, self.close_hook = self.close_hook, None
        await super().aclose()
        if hook:
            hook()


@breaks(check_streams._blocks_and_loops, r"send_all\(b''\) on a closed stream")
class NothingCanAlwaysBeSent(MemorySendStream):
    async def send_all(self, data: Any) -> None:
        await super().send_all(data) if data else await checkpoint()


@breaks(check_streams._closed, "no checkpoint")
class ClosingAgainIsNoCheckpoint(MemorySendStream):
    async def aclose(self) -> None:
        if not self._buffer.closed:
            await super().aclose()


@breaks(check_streams._sender_closes_forcefully, "does not raise ClosedResourceError")
class AsksBeforeItCloses(MemorySendStream):
    async def aclose(self) -> None:
        await checkpoint()
        self.close()


@breaks(check_streams._cancelled_aclose, "does not raise Cancelled")
class ClosesShielded(MemoryReceiveStream):
    async def aclose(self) -> None:
        with kernel.CancelScope(shield=is_cancelled()):
            await super().aclose()


@breaks(check_streams._closed_while_receiving, "does not raise ClosedResourceError")
class ClosingLooksLikeTheEnd(MemoryReceiveStream):
    async def receive_some(self, max_bytes: int | None = None) -> bytearray:
        if self._closed:
            return await super().receive_some(max_bytes)
        try:
            return await super().receive_some(max_bytes)
        except kernel.ClosedResourceError:
            return bytearray()


@breaks(check_streams._closed_while_receiving, "it hangs")
class ClosingDoesNotWakeReceivers(LockstepReceiveStream):
    def close(self) -> None:
        self._state.receiver_open = False
        if self._state.offered or not self._state.receiver_waits:
            super().close()


# ---- broken: clogged --------------------------------------------------------------------------------------


@breaks(check_streams._until_there_is_room, "at once")
class AlwaysHasRoom(LockstepSendStream):
    async def wait_send_all_might_not_block(self) -> None:
        await checkpoint()
        with self._busy:
            self._check()


@breaks(check_streams._until_there_is_room, "hangs")
class DoesNotNoticeRoom(LockstepSendStream):
    async def wait_send_all_might_not_block(self) -> None:
        with self._busy:
            await checkpoint()
            self._check()
            if not self._state.receiver_waits:
                await kernel.sleep_forever()


@breaks(check_streams._two_send, "hangs")
class ManyMaySend(LockstepSendStream):
    async def send_all(self, data: Any) -> None:
        self._busy._busy = False
        await super().send_all(data)


@breaks(check_streams._two_send, "does not wait any more")
class TheSecondDisturbsTheFirst(LockstepSendStream):
    async def send_all(self, data: Any) -> None:
        if self._busy._busy:
            self._state.offered = memoryview(b"")
            self._state.changed.unpark_all()
        await super().send_all(data)


@breaks(check_streams._two_wait, "hangs")
class SendsWhileOthersWait(LockstepSendStream):
    async def wait_send_all_might_not_block(self) -> None:
        with self._busy:
            await checkpoint()
            self._check()
        while not self._state.receiver_waits:
            await self._state.changed.park()
            self._check()


@breaks(check_streams._two_wait, "BusyResourceError")
class StaysBusyAfterACancelledWait(LockstepSendStream):
    async def wait_send_all_might_not_block(self) -> None:
        was_cancelled = is_cancelled()
        try:
            await super().wait_send_all_might_not_block()
        except kernel.Cancelled:
            self._busy._busy = not was_cancelled
            raise


class _Miscounts(LockstepSendStream):
    by = 0

    async def send_all(self, data: Any) -> None:
        try:
            await super().send_all(data)
        except kernel.Cancelled as cancelled:
            if cancelled.bytes_sent:  # type: ignore[attr-defined]
                cancelled.bytes_sent += self.by  # type: ignore[attr-defined]
            raise


@breaks(check_streams._cancelled_while_sending, "it hangs")
class SaysTooMuch(_Miscounts):
    by = 1


@breaks(check_streams._cancelled_while_sending, "bytes_sent is 999")
class SaysTooLittle(_Miscounts):
    by = -1


@breaks(check_streams._receiver_closes_while_waiting, "hangs")
class WaitsForAClosedReceiver(LockstepSendStream):
    async def wait_send_all_might_not_block(self) -> None:
        with self._busy:
            await checkpoint()
            while not self._state.receiver_waits:
                if not self._state.sender_open:
                    raise kernel.ClosedResourceError
                await self._state.changed.park()


@breaks(check_streams._cancelled_while_sending, "or twice")
class RepeatsAByte(LockstepReceiveStream):
    async def receive_some(self, max_bytes: int | None = None) -> bytearray:
        chunk = await super().receive_some(max_bytes)
        return chunk + chunk[-1:] if len(chunk) == 1000 else chunk


@breaks(check_streams._receiver_closes_while_waiting, "hangs")
class ClosingDoesNotWakeWhoWaits(LockstepReceiveStream):
    def close(self) -> None:
        self._state.receiver_open = False
        if self._state.offered or self._state.receiver_waits:
            super().close()


@breaks(check_streams._receiver_closes_while_waiting, "hangs")
class WaitsForWhoHasGone(LockstepSendStream):
    async def wait_send_all_might_not_block(self) -> None:
        if self._state.sender_open and not self._state.receiver_open:
            await kernel.sleep_forever()
        await super().wait_send_all_might_not_block()


@breaks(check_streams._receiver_closes_while_sending, "hangs")
class OnlyAPoliteReceiverWakesSenders(LockstepReceiveStream):
    def close(self) -> None:
        self._state.receiver_open = False
        if not self._state.offered or not is_cancelled():
            super().close()


@breaks(check_streams._closed_while_sending, "it hangs")
class ClosingDoesNotWakeSenders(LockstepSendStream):
    def close(self) -> None:
        self._state.sender_open = False
        if not self._state.offered:
            super().close()


@breaks(check_streams._closed_while_sending, "BrokenResourceError")
class ClosingIsBreaking(LockstepSendStream):
    async def send_all(self, data: Any) -> None:
        was_open = self._state.sender_open
        try:
            await super().send_all(data)
        except kernel.ClosedResourceError:
            if was_open:
                raise BrokenResourceError from None
            raise


@breaks(check_streams._closed_while_waiting, "does not raise ClosedResourceError")
class ClosingEndsWaiting(LockstepSendStream):
    async def wait_send_all_might_not_block(self) -> None:
        was_open = self._state.sender_open
        try:
            await super().wait_send_all_might_not_block()
        except kernel.ClosedResourceError:
            if not was_open:
                raise


# ---- broken: both ways ------------------------------------------------------------------------------------


@breaks(check_streams._duplex, "BusyResourceError|no Stream")
class OneThingAtATime(OnMemory):
    using = 0

    async def send_all(self, data: Any) -> None:
        self.using += 1
        try:
            if self.using > 1 and len(data) > 5000:
                raise kernel.BusyResourceError
            await super().send_all(data)
        finally:
            self.using -= 1

    async def receive_some(self, max_bytes: int | None = None) -> Any:
        self.using += 1
        try:
            return await super().receive_some(max_bytes)
        finally:
            self.using -= 1


@breaks(check_streams._duplex, "other bytes")
class SwapsBytesOfLateChunks(OnMemory):
    received = 0

    async def receive_some(self, max_bytes: int | None = None) -> Any:
        chunk = await super().receive_some(max_bytes)
        self.received += len(chunk)
        return chunk if self.received < 200_000 else chunk[::-1]


@breaks(check_streams._send_while_receiving, "what was sent comes back")
class Echoes(OnMemory):
    async def send_all(self, data: Any) -> None:
        await super().send_all(data)
        if data == b"there":
            self.receive_stream.put_data(b"!")


@breaks(check_streams._send_while_receiving, "BusyResourceError")
class SendsOnlyWhenNobodyReceives(OnMemory):
    receiving = False

    async def send_all(self, data: Any) -> None:
        if self.receiving and data == b"there":
            raise kernel.BusyResourceError
        await super().send_all(data)

    async def receive_some(self, max_bytes: int | None = None) -> Any:
        self.receiving = True
        try:
            return await super().receive_some(max_bytes)
        finally:
            self.receiving = False


@breaks(check_streams._both_ways_closed, r"receive_some\(\) on a closed stream does not raise ClosedResourceError")
class ClosesOneWay(OnMemory):
    """Whichever is tried first, sending or receiving, is refused."""

    refused = False

    async def send_all(self, data: Any) -> None:
        try:
            await super().send_all(data)
        except kernel.ClosedResourceError:
            self.refused = True
            raise

    async def receive_some(self, max_bytes: int | None = None) -> Any:
        if self.refused:
            return b""
        return await super().receive_some(max_bytes)


# ---- broken: half-closed ----------------------------------------------------------------------------------


@breaks(check_streams._half_closed, "no checkpoint")
class EndsWithoutACheckpoint(OnMemory):
    async def send_eof(self) -> None:
        self.send_stream.close()


@breaks(check_streams._half_closed, "hangs")
class NobodySeesTheEnd(OnMemory):
    async def send_eof(self) -> None:
        await checkpoint()


@breaks(check_streams._half_closed, "b'' was received up to the end, not b'x'")
class EndingLosesWhatIsOnItsWay(OnMemory):
    async def send_all(self, data: Any) -> None:
        self.hook = self.send_stream.send_all_hook
        await super().send_all(data)

    async def send_eof(self) -> None:
        self.hook.__closure__[1].cell_contents._buffer._data.clear()
        await super().send_eof()


@breaks(check_streams._half_closed, "does not raise ClosedResourceError")
class SendsAfterTheEnd(OnMemory):
    async def send_eof(self) -> None:
        self.ended = True
        await super().send_eof()

    ended = False

    async def send_all(self, data: Any) -> None:
        if not self.ended:
            await super().send_all(data)


@breaks(check_streams._half_closed, "RuntimeError: ended before")
class EndsOnlyOnce(OnMemory):
    ended = False

    async def send_eof(self) -> None:
        if self.ended:
            raise RuntimeError("ended before")
        self.ended = True
        await super().send_eof()


@breaks(check_streams._half_closed, "ClosedResourceError|BrokenResourceError")
class EndsBothWays(OnMemory):
    async def send_eof(self) -> None:
        await self.aclose()


@breaks(check_streams._cancelled_send_eof, "does not raise Cancelled")
class EndsShielded(OnMemory):
    async def send_eof(self) -> None:
        with kernel.CancelScope(shield=is_cancelled()):
            await super().send_eof()


@breaks(check_streams._cancelled_send_eof, "ClosedResourceError|BrokenResourceError")
class ACancelledEndEndsBothWays(OnMemory):
    async def send_eof(self) -> None:
        try:
            await super().send_eof()
        except kernel.Cancelled:
            self.receive_stream.close()
            raise


@breaks(check_streams._send_eof_while_sending, "does not raise BusyResourceError")
class EndsInTheMidstOfSending(OnLockstep):
    async def send_eof(self) -> None:
        if self.send_stream._state.offered:
            await checkpoint()
        else:
            await super().send_eof()


@breaks(check_streams._send_eof_while_waiting, "does not raise BusyResourceError")
class EndsInTheMidstOfWaiting(OnLockstep):
    async def send_eof(self) -> None:
        if self.send_stream._busy._busy and not self.send_stream._state.offered:
            await checkpoint()
        else:
            await super().send_eof()


# ---- broken: not of the kind ------------------------------------------------------------------------------


class Wrapped:
    """It has all the methods, and works, but does not say what it is."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def send_all(self, data: Any) -> Any:
        return self.stream.send_all(data)

    def wait_send_all_might_not_block(self) -> Any:
        return self.stream.wait_send_all_might_not_block()

    def send_eof(self) -> Any:
        return self.stream.send_eof()

    def receive_some(self, max_bytes: int | None = None) -> Any:
        return self.stream.receive_some(max_bytes)

    def aclose(self) -> Any:
        return self.stream.aclose()


class OnlySends(Wrapped, SendStream):
    pass


class SendsAndReceives(Wrapped, SendStream, ReceiveStream):
    pass


class NeverEndsByHalves(Wrapped, Stream):
    pass


@pytest.mark.parametrize(
    ("checker", "kind", "what"),
    [
        (check_one_way_stream, Wrapped, "is no SendStream"),
        (check_one_way_stream, OnlySends, "is no ReceiveStream"),
        (check_two_way_stream, SendsAndReceives, "is no Stream"),
        (check_half_closeable_stream, NeverEndsByHalves, "is no HalfCloseableStream"),
    ],
)
def test_a_stream_of_another_kind_is_found(checker: Any, kind: Any, what: str) -> None:
    def make() -> tuple[Any, Any]:
        one, two = memory_stream_pair()
        return kind(one), kind(two)

    with pytest.raises(AssertionError, match=what):
        kernel.run(checker, made_by(make), None)


# ---- all of them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("checker", "make", "clogged", "check", "what"), BROKEN)
def test_a_broken_promise_is_found(
    checker: Any, make: Maker, clogged: bool, check: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_streams, "PATIENCE", 0.01)
    with pytest.raises(AssertionError) as caught:
        kernel.run(checker, make, make if clogged else None)
    message = str(caught.value)
    promise = " ".join(check.__doc__.split())
    assert f"break a promise: {promise}\n" in message
    assert re.search(what, message.partition("\n")[2])


def test_for_every_promise_there_is_a_stream_that_breaks_it() -> None:
    checks = {
        *check_streams.ONE_WAY, *check_streams.CLOGGED, *check_streams.TWO_WAY, *check_streams.HALF_CLOSEABLE,
        *check_streams.HALF_CLOSEABLE_CLOGGED,
    }  # fmt: skip
    assert {param.values[3] for param in BROKEN} == checks


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("clogged", [False, True])
def test_both_directions_are_checked(there: bool, clogged: bool) -> None:
    def make() -> tuple[Any, Any]:
        good = lockstep_pair() if clogged else memory_pair()
        broken: Any = lockstep_pair(AlwaysHasRoom) if clogged else memory_pair(SendsWithoutACheckpoint)
        (one, two), (three, four) = (broken, good) if there else (good, broken)
        return StapledStream(one, four), StapledStream(three, two)

    with pytest.raises(AssertionError, match="at once" if clogged else "no checkpoint"):
        kernel.run(check_two_way_stream, made_by(make), made_by(make) if clogged else None)


def test_a_check_that_fails_with_an_error_of_the_streams_keeps_it_as_its_cause() -> None:
    class Fails(MemorySendStream):
        async def send_all(self, data: Any) -> None:
            raise ValueError("no bytes today")

    with pytest.raises(AssertionError, match="ValueError: no bytes today") as caught:
        kernel.run(check_one_way_stream, made_by(partial(memory_pair, sender=Fails)), None)
    assert type(caught.value.__cause__) is ValueError


def test_a_cancelled_checker_is_cancelled() -> None:
    async def main() -> bool:
        with kernel.CancelScope() as scope:
            scope.cancel()
            await check_one_way_stream(made_by(memory_stream_one_way_pair), None)
        return scope.cancelled_caught

    assert kernel.run(main)


def test_what_hangs_is_called_off_and_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the kernel would never call it a deadlock: on a pipe."""

    class Deaf(FdStream):
        def wait_send_all_might_not_block(self) -> Any:
            return kernel.sleep_forever()

    def make() -> tuple[Any, Any]:
        read, write = os.pipe()
        return Deaf(write), FdStream(read)

    monkeypatch.setattr(check_streams, "PATIENCE", 0.01)
    with pytest.raises(AssertionError, match="it hangs"):
        kernel.run(check_one_way_stream, made_by(make), None)
