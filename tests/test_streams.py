"""Streams made of streams, and closing one without ceremony."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from typing import Any

import pytest

import kernel
from kernel import StapledStream, aclose_forcefully
from kernel.abc import AsyncResource, HalfCloseableStream, Listener, ReceiveStream, SendStream, Stream


class Sender(SendStream):
    def __init__(self, log: list[object]) -> None:
        self.log = log

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.log.append(("send_all", bytes(data)))

    async def wait_send_all_might_not_block(self) -> None:
        self.log.append("wait")

    async def aclose(self) -> None:
        self.log.append("close sender")
        await kernel.lowlevel.checkpoint()


class Receiver(ReceiveStream):
    def __init__(self, log: list[object], chunks: list[bytes]) -> None:
        self.log, self.chunks = log, chunks

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        self.log.append(("receive_some", max_bytes))
        return self.chunks.pop(0) if self.chunks else b""

    async def aclose(self) -> None:
        self.log.append("close receiver")
        await kernel.lowlevel.checkpoint()


class HalfCloseable(Sender, Receiver, HalfCloseableStream):
    def __init__(self, log: list[object]) -> None:
        self.log = log

    async def send_eof(self) -> None:
        self.log.append("eof")

    async def aclose(self) -> None:
        raise AssertionError("not asked for")


def test_stapled_stream_sends_to_one_and_receives_from_the_other() -> None:
    log: list[object] = []

    async def main() -> list[bytes | bytearray]:
        stream = StapledStream(Sender(log), Receiver(log, [b"one", b"two", b"three"]))
        await stream.send_all(b"hello")
        await stream.wait_send_all_might_not_block()
        assert await stream.receive_some(7) == b"one"
        return [chunk async for chunk in stream]

    assert kernel.run(main) == [b"two", b"three"]
    assert log[:3] == [("send_all", b"hello"), "wait", ("receive_some", 7)]


def test_stapled_stream_shows_its_end_by_closing_a_sender_that_cannot_do_it_better() -> None:
    log: list[object] = []

    async def main() -> None:
        await StapledStream(Sender(log), Receiver(log, [])).send_eof()
        await StapledStream(HalfCloseable(log), Receiver(log, [])).send_eof()

    kernel.run(main)
    assert log == ["close sender", "eof"]


def test_stapled_stream_closes_both_sender_first() -> None:
    log: list[object] = []

    async def main() -> None:
        async with StapledStream(Sender(log), Receiver(log, [])):
            pass

    kernel.run(main)
    assert log == ["close sender", "close receiver"]


def test_stapled_stream_closes_the_receiver_though_the_sender_fails() -> None:
    log: list[object] = []

    class Failing(Sender):
        async def aclose(self) -> None:
            raise ValueError("lid stuck")

    async def main() -> None:
        with pytest.raises(ValueError, match="lid stuck"):
            await StapledStream(Failing(log), Receiver(log, [])).aclose()

    kernel.run(main)
    assert log == ["close receiver"]


def test_stapled_stream_that_is_cancelled_while_it_closes_keeps_the_error_of_the_sender() -> None:
    log: list[object] = []

    class Failing(Sender):
        async def aclose(self) -> None:
            raise ValueError("lid stuck")

    async def main() -> None:
        with kernel.CancelScope() as scope:
            scope.cancel()
            with pytest.raises(ValueError, match="lid stuck"):
                await StapledStream(Failing(log), Receiver(log, [])).aclose()

    kernel.run(main)
    assert log == ["close receiver"]


def test_stapled_stream_works_in_generator_style_and_takes_type_arguments() -> None:
    log: list[object] = []

    def main() -> Any:
        stream = StapledStream[Sender, Receiver](Sender(log), Receiver(log, []))
        yield from stream.aclose()
        return repr(stream)

    assert kernel.run(main).startswith("<StapledStream of <")
    assert log == ["close sender", "close receiver"]


def test_aclose_forcefully_does_not_wait() -> None:
    log: list[object] = []

    class Polite(AsyncResource):
        async def aclose(self) -> None:
            try:
                log.append("goodbye?")
                await kernel.sleep_forever()
            finally:
                log.append("closed")

    async def main() -> None:
        await aclose_forcefully(Polite())
        log.append("and on")
        await kernel.lowlevel.checkpoint()

    kernel.run(main)
    assert log == ["goodbye?", "closed", "and on"]


def test_aclose_forcefully_takes_async_generators_and_lets_errors_through() -> None:
    log: list[object] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            log.append("closed")

    class Failing(AsyncResource):
        async def aclose(self) -> None:
            raise ValueError("lid stuck")

    async def main() -> None:
        generator: Any = numbers()
        await generator.__anext__()
        await aclose_forcefully(generator)
        with pytest.raises(ValueError, match="lid stuck"):
            await aclose_forcefully(Failing())

    kernel.run(main)
    assert log == ["closed"]


def test_the_stream_classes_have_the_hierarchy_that_programs_test_for() -> None:
    assert issubclass(HalfCloseableStream, Stream)
    assert issubclass(Stream, SendStream)
    assert issubclass(Stream, ReceiveStream)
    assert issubclass(kernel.lowlevel.FdStream, Stream)
    assert issubclass(StapledStream, HalfCloseableStream)
    for interface, abstract in (
        (SendStream, {"aclose", "send_all", "wait_send_all_might_not_block"}),
        (ReceiveStream, {"aclose", "receive_some"}),
        (HalfCloseableStream, {"aclose", "send_all", "wait_send_all_might_not_block", "receive_some", "send_eof"}),
        (Listener, {"aclose", "accept"}),
    ):
        assert inspect.isabstract(interface)
        assert set(interface.__abstractmethods__) == abstract
    assert Listener[Stream]
