"""Items out of a stream: the same whatever the chunks, nothing lost to a cancellation or an error, linear in cost."""

from __future__ import annotations

import builtins
import io
import os
import pickle
from collections.abc import Generator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import kernel
from kernel import BusyResourceError, CancelScope, ClosedResourceError, buffered
from kernel.abc import HalfCloseableStream, ReceiveStream, Stream
from kernel.buffered import (
    BufferedReceiveStream,
    BufferedStream,
    IncompleteReadError,
    ItemTooLongError,
    TextReceiveStream,
)
from kernel.lowlevel import checkpoint, operation
from kernel.testing import (
    assert_checkpoints,
    cancel_target,
    check_half_closeable_stream,
    check_two_way_stream,
    explore_cancellation,
    lockstep_stream_pair,
    memory_stream_one_way_pair,
    memory_stream_pair,
    wait_all_tasks_blocked,
)

LONG = 20 if os.environ.get("KERNEL_TEST_LONG") else 1
MORE = settings(max_examples=300 * LONG, deadline=None)


class Source(ReceiveStream):
    """Gives out chunks, each after a checkpoint, and then the end. In call number `cancel[i]` it cancels `scope`."""

    def __init__(self, *chunks: bytes, cancel: frozenset[int] = frozenset()) -> None:
        self.chunks = list(chunks)
        self.cancel = cancel
        self.calls = 0
        self.closed = False
        self.scope = CancelScope()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        self.calls += 1
        if self.closed:
            raise ClosedResourceError
        if self.calls - 1 in self.cancel:
            self.scope.cancel()
        await checkpoint()
        chunk = self.chunks.pop(0) if self.chunks else b""
        if max_bytes is not None and len(chunk) > max_bytes:
            self.chunks.insert(0, chunk[max_bytes:])
            chunk = chunk[:max_bytes]
        return chunk

    async def aclose(self) -> None:
        self.closed = True


def over(*chunks: bytes) -> BufferedReceiveStream[Source]:
    return BufferedReceiveStream(Source(*chunks))


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """`data` in chunks, cut at these places modulo its length."""
    at = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[i:j] for i, j in pairwise(at)]


async def outcome_of(function: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return await function(*args, **kwargs)
    except Exception as error:
        return error


# ---- what is an item, and what is left ------------------------------------------------------------------


def test_items_of_all_kinds_from_one_stream() -> None:
    async def main() -> None:
        stream = over(b"GET / HT", b"TP/1.1\r\nLength: 5\n\r", b"\nhello--wor", b"ld--rest")
        assert await stream.receive_line() == b"GET / HTTP/1.1"
        assert await stream.receive_line() == b"Length: 5"
        assert await stream.receive_line() == b""
        assert await stream.receive_exactly(0) == b""
        assert await stream.receive_exactly(5) == b"hello"
        assert await stream.receive_until(b"--") == b""
        assert await stream.receive_until(b"--") == b"world"
        assert await stream.receive_some(3) == b"res"
        assert stream.buffered == b"t"
        assert await stream.receive_some() == b"t"
        assert await stream.receive_some() == await stream.receive_some() == b""

    kernel.run(main)


def test_generator_style_works() -> None:
    def main() -> Generator[Any, Any, Any]:
        stream = over(b"a\nbb", b"b\nc|d")
        line = yield from stream.receive_line()
        other = yield from stream.receive_line()
        item = yield from stream.receive_until(b"|")
        last = yield from stream.receive_exactly(1)
        end = yield from stream.receive_some()
        yield from stream.aclose()
        return line, other, item, last, end

    assert kernel.run(main) == (b"a", b"bbb", b"c", b"d", b"")


def test_a_chunk_may_be_a_bytearray_and_items_are_bytes_all_the_same() -> None:
    async def main() -> None:
        chunk = bytearray(b"ab\ncd\nef")
        stream = over(chunk, bytearray(b"gh"))  # type: ignore[arg-type]
        items = [await stream.receive_line(), await stream.receive_exactly(1), await stream.receive_some()]
        items += [await stream.receive_some()]
        assert items == [b"ab", b"c", b"d\nef", b"gh"]
        assert {type(item) for item in items} == {bytes}

    kernel.run(main)


def test_an_end_in_an_item_is_an_error_that_has_the_beginning_and_takes_nothing() -> None:
    async def main() -> None:
        for function, *args in (("receive_exactly", 10), ("receive_until", b"|"), ("receive_line",)):
            stream = over(b"ab", b"c")
            for _ in range(2):
                with pytest.raises(IncompleteReadError) as caught:
                    await getattr(stream, function)(*args)
                assert caught.value.partial == b"abc"
                assert caught.value.expected == (10 if function == "receive_exactly" else None)
                assert isinstance(caught.value, EOFError)
                assert "3 bytes" in str(caught.value)
            assert await stream.receive_some() == b"abc"
            with pytest.raises(IncompleteReadError, match="there is no further item") as caught:
                await getattr(stream, function)(*args)
            assert caught.value.partial == b""
            assert pickle.loads(pickle.dumps(caught.value)).partial == b""

    kernel.run(main)


def test_an_item_that_is_too_long_is_an_error_that_takes_nothing_and_says_what_to_write() -> None:
    async def main() -> None:
        stream = over(b"abc", b"de", b"fgh\nij")
        for _ in range(2):
            with pytest.raises(ItemTooLongError, match="larger max=") as caught:
                await stream.receive_line(max=4)
            assert caught.value.max == 4
        assert pickle.loads(pickle.dumps(caught.value)).max == 4
        assert stream.buffered == b"abcdefgh\nij"
        with pytest.raises(ItemTooLongError):  # this time its end is in the buffer
            await stream.receive_until(b"\n", max=7)
        assert await stream.receive_until(b"\n", max=8) == b"abcdefgh"

    kernel.run(main)


def test_an_item_of_exactly_max_is_not_too_long_whatever_its_line_ending() -> None:
    async def main() -> None:
        for size in (1, 2, 3, 100):
            for chunks in (
                (b"abc\r\nabc\n",),
                (b"abc\r", b"\nabc\n"),
                tuple(b"abc\r\nabc\n"[i : i + 1] for i in range(9)),
            ):
                stream = over(*chunks)
                if size < 3:
                    assert type(await outcome_of(stream.receive_line, max=size)) is ItemTooLongError
                    assert type(await outcome_of(stream.receive_until, b"\r\n", max=size)) is ItemTooLongError
                else:
                    assert await stream.receive_line(max=size) == await stream.receive_line(max=size) == b"abc"

    kernel.run(main)


def test_an_unfinished_item_is_too_long_as_soon_as_no_end_could_save_it() -> None:
    async def main() -> None:
        assert type(await outcome_of(over(b"ab").receive_line, max=1)) is IncompleteReadError  # as a carriage return, b
        assert type(await outcome_of(over(b"abc").receive_line, max=1)) is ItemTooLongError
        assert type(await outcome_of(over(b"ab|").receive_until, b"||", max=2)) is IncompleteReadError
        assert type(await outcome_of(over(b"abc|").receive_until, b"||", max=2)) is ItemTooLongError
        assert type(await outcome_of(TextReceiveStream(Source(b"a")).receive_line, max=1)) is IncompleteReadError
        assert type(await outcome_of(TextReceiveStream(Source(b"ab")).receive_line, max=1)) is ItemTooLongError

    kernel.run(main)


@pytest.mark.parametrize("delimiter", [b"\n", b"\r\n", b"END"])
def test_one_can_go_on_behind_an_item_that_is_too_long(delimiter: bytes) -> None:
    async def main(chunk_size: int) -> None:
        data = b"x" * 995 + delimiter + b"next" + delimiter
        stream = over(*(data[i : i + chunk_size] for i in range(0, len(data), chunk_size)))
        skipped = b""
        while True:
            try:
                rest = await stream.receive_until(delimiter, max=10)
                break
            except ItemTooLongError as error:
                skipped += await stream.receive_exactly(error.max)
        assert (rest, skipped) == (b"x" * 5, b"x" * 990)
        assert await stream.receive_until(delimiter, max=10) == b"next"

    for chunk_size in (1, 2, 7, 2000):
        kernel.run(main, chunk_size)


def test_lines_end_where_the_stream_does() -> None:
    async def main() -> None:
        assert [line async for line in over(b"a\nb", b"c\r\n", b"\n").lines()] == [b"a", b"bc", b""]
        assert [line async for line in over().lines()] == []

    kernel.run(main)


def test_a_last_line_without_an_end_is_an_error_unless_one_says_otherwise() -> None:
    async def main() -> None:
        seen = []
        with pytest.raises(IncompleteReadError) as caught:
            async for line in over(b"a\nb", b"c").lines():
                seen.append(line)
        assert (seen, caught.value.partial) == ([b"a"], b"bc")
        assert [line async for line in over(b"a\nb", b"c").lines(strict=False)] == [b"a", b"bc"]
        assert [line async for line in over(b"a\n").lines(strict=False)] == [b"a"]

    kernel.run(main)


def test_other_operations_fit_in_between_lines_and_leaving_the_loop_loses_nothing() -> None:
    async def main() -> None:
        stream = over(b"3\nabc5\nhel", b"lo0\nrest\nend")
        got = []
        async for line in stream.lines(max=10):
            got.append(await stream.receive_exactly(int(line)))
            if line == b"0":
                break
        assert got == [b"abc", b"hello", b""]
        assert await stream.receive_line() == b"rest"
        assert stream.buffered == b"end"
        with pytest.raises(ItemTooLongError):
            [line async for line in over(b"long\n").lines(max=3)]

    kernel.run(main)


def test_iterating_over_the_stream_itself_gives_chunks() -> None:
    async def main() -> None:
        stream = over(b"a\nb", b"c", b"d")
        await stream.receive_line()
        assert [chunk async for chunk in stream] == [b"b", b"c", b"d"]

    kernel.run(main)


def test_what_was_put_back_comes_first() -> None:
    async def main() -> None:
        stream = over(b"world\nab", b"cd")
        stream.unread(b"hello ")
        stream.unread(bytearray(b"> "))
        assert stream.buffered == b"> hello "
        assert await stream.receive_line() == b"> hello world"
        stream.unread(memoryview(b"--"))
        assert stream.buffered == b"--ab"
        with pytest.raises(IncompleteReadError):
            await stream.receive_exactly(100)
        stream.unread(b"++")
        assert await stream.receive_exactly(3) == b"++-"
        stream.unread(b"")
        assert await stream.receive_some() == b"-abcd"

    kernel.run(main)


# ---- whatever the chunks, wherever it is cancelled ------------------------------------------------------

BYTES = st.lists(st.sampled_from([b"a", b"b", b"\n", b"\r", b"\r\n", b"|", b"||"]), max_size=40).map(b"".join)
OPERATIONS = st.one_of(
    st.tuples(st.just("some"), st.sampled_from([None, 1, 2, 5])),
    st.tuples(st.just("exactly"), st.integers(0, 12)),
    st.tuples(st.just("until"), st.sampled_from([b"|", b"||", b"|\n", b"a||"]), st.sampled_from([1, 2, 5, 65536])),
    st.tuples(st.just("line"), st.sampled_from([1, 2, 5, 65536])),
    st.tuples(st.just("unread"), st.sampled_from([b"", b"\n", b"xy|"])),
)


def item_in(rest: bytes, kind: str, *args: Any) -> tuple[Any, int]:
    """What an operation shall give when `rest` is all that will ever come: the result or error, and what is taken."""
    if kind == "exactly":
        return (rest[: args[0]], args[0]) if args[0] <= len(rest) else (IncompleteReadError(rest, args[0]), 0)
    delimiter, limit = (b"\n", args[0]) if kind == "line" else args
    end = rest.find(delimiter)
    stop = end - 1 if kind == "line" and rest[:end].endswith(b"\r") and end > 0 else end
    spare = 1 if kind == "line" else 0
    if stop > limit or (end < 0 and len(rest) >= limit + spare + len(delimiter)):
        return ItemTooLongError(limit), 0
    if end < 0:
        return IncompleteReadError(rest), 0
    return rest[:stop], end + len(delimiter)


@MORE
@given(
    BYTES,
    st.lists(st.integers(0, 60), max_size=12),
    st.lists(OPERATIONS, max_size=12),
    st.frozensets(st.integers(0, 30), max_size=8),
    st.frozensets(st.integers(0, 11), max_size=3),
)
@example(b"ab||c", [1, 2, 3, 4], [("until", b"||", 5), ("some", None)], frozenset({1, 3}), frozenset())
def test_items_do_not_depend_on_chunks_and_cancellations(
    data: bytes, cuts: list[int], operations: list[Any], cancel: frozenset[int], cancel_before: frozenset[int]
) -> None:
    source = Source(*cut(data, cuts), cancel=cancel)
    stream = BufferedReceiveStream(source)

    async def do(kind: str, *args: Any) -> Any:
        if kind == "until":
            return await stream.receive_until(args[0], max=args[1])
        if kind == "line":
            return await stream.receive_line(max=args[0])
        return await getattr(stream, f"receive_{kind}")(*args)

    async def until_it_works(number: int, *what: Any) -> Any:
        before = number in cancel_before
        while True:
            with CancelScope() as source.scope:
                if before:
                    source.scope.cancel()
                before = False
                return await outcome_of(do, *what)
            assert stream.buffered + b"".join(source.chunks) == rest

    rest = data

    async def main() -> None:
        nonlocal rest
        for number, (kind, *args) in enumerate(operations):
            if kind == "unread":
                stream.unread(args[0])
                rest = args[0] + rest
                continue
            got = await until_it_works(number, kind, *args)
            if kind == "some":
                assert rest.startswith(got)
                assert bool(got) == bool(rest)
                assert len(got) <= (args[0] or len(data) + 100)
                taken = len(got)
            else:
                wanted, taken = item_in(rest, kind, *args)
                assert (type(got), getattr(got, "args", got)) == (type(wanted), getattr(wanted, "args", wanted))
            rest = rest[taken:]
            assert stream.buffered + b"".join(source.chunks) == rest

    kernel.run(main)


def test_cancelled_at_every_moment_no_byte_is_lost() -> None:
    """Every place that there is, of all operations, the fast paths too."""
    data = b"one\r\ntwo|3xyz\nfour\ntail"

    async def program() -> None:
        sender, receiver = memory_stream_one_way_pair()
        stream = BufferedReceiveStream(receiver)

        async def send() -> None:
            for chunk in (data[:2], data[2:9], data[9:15], data[15:]):
                await sender.send_all(chunk)
                await checkpoint()
            await sender.aclose()

        operations: list[tuple[Any, ...]] = [
            (stream.receive_line,), (stream.receive_until, b"|"), (stream.receive_exactly, 1),
            (stream.receive_exactly, 3), (stream.receive_line,), (stream.receive_line,), (stream.receive_some, 2),
            (stream.receive_some,),
        ]  # fmt: skip
        got: list[bytes] = []
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(send)
            for function, *args in operations:
                again = True
                while again:
                    again = False
                    with cancel_target() as scope:
                        got.append(await function(*args))
                    again = scope.cancelled_caught
        assert got == [b"one", b"two", b"3", b"xyz", b"", b"four", b"ta", b"il"]

    assert (explore_cancellation(program, cancel="targets").cancelled or 0) > 10


def test_a_timeout_around_a_line_is_harmless(virtual: Any) -> None:
    log: list[Any] = []

    async def main() -> None:
        sender, receiver = memory_stream_one_way_pair()
        stream = BufferedReceiveStream(receiver)

        async def drip() -> None:
            for byte in b"slow\n":
                await kernel.sleep(2)
                await sender.send_all(bytes([byte]))

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(drip)
            line = None
            while line is None:
                with kernel.move_on_after(3.5):
                    line = await stream.receive_line()
                log.append((line, stream.buffered))

    virtual(main)
    assert log == [(None, b"s"), (None, b"slo"), (b"slow", b"")]


# ---- who may use it, and when ---------------------------------------------------------------------------


def test_an_item_that_is_there_takes_no_trap_and_no_further_generator() -> None:
    async def main() -> None:
        stream = over(b"a\nb\ncd|efgh")
        await stream.receive_line()
        calls = stream.transport_stream.calls
        for call, result in (
            (stream.receive_line(), b"b"), (stream.receive_until(b"|"), b"cd"), (stream.receive_exactly(2), b"ef"),
            (stream.receive_some(1), b"g"), (stream.receive_some(), b"h"),
        ):  # fmt: skip
            generator: Any = call
            with pytest.raises(StopIteration) as stop:
                generator.send(None)
            assert stop.value.value == result
        assert stream.transport_stream.calls == calls

    kernel.run(main)


def test_each_operation_is_a_checkpoint_whether_it_waits_or_not() -> None:
    async def main() -> None:
        for stream in (over(b"a\nb\ncd|efgh"), BufferedReceiveStream(Source())):
            if stream.transport_stream.chunks:
                await stream.receive_line()
            for function, *args in (
                (stream.receive_line,), (stream.receive_until, b"|"), (stream.receive_exactly, 2),
                (stream.receive_exactly, 0), (stream.receive_some, 1), (stream.receive_some,),
            ):  # fmt: skip
                with assert_checkpoints():
                    await outcome_of(function, *args)
        for text in (TextReceiveStream(Source(b"a\nb\nc")), TextReceiveStream(Source())):
            await outcome_of(text.receive_line)
            for method in (text.receive_line, text.receive_some, text.receive_some):
                with assert_checkpoints():
                    await outcome_of(method)

    kernel.run(main)


def test_in_a_cancelled_scope_nothing_is_taken_though_it_is_there() -> None:
    async def main() -> None:
        stream = over(b"x\na\nb|")
        await stream.receive_line()
        text = TextReceiveStream(Source(b"x\na\nb"))
        await text.receive_line()
        for function, *args in (
            (stream.receive_line,), (stream.receive_until, b"|"), (stream.receive_exactly, 2), (stream.receive_some,),
            (text.receive_line,), (text.receive_some,), (anext, stream.lines()), (anext, text.lines()),
        ):  # fmt: skip
            with CancelScope() as scope:
                scope.cancel()
                await function(*args)
                pytest.fail("it was no cancel point")
        assert stream.buffered == b"a\nb|"
        assert await text.receive_some() == "a\nb"

    kernel.run(main)


def test_a_task_that_finds_all_its_items_there_lets_others_run_all_the_same() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await checkpoint()
            turns += 1

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(other)
            async for _ in over(b"x\n" * 1000).lines():
                pass
            async for _ in TextReceiveStream(Source(b"x\n" * 1000)).lines():
                pass
            nursery.cancel_scope.cancel()

    kernel.run(main)
    assert turns > 10


@pytest.mark.parametrize("first", ["receive_some", "receive_line", "receive_exactly", "receive_until"])
def test_one_task_at_a_time_may_receive_and_a_cancelled_one_makes_room(first: str) -> None:
    arguments: dict[str, list[Any]] = {"receive_exactly": [5], "receive_until": [b"|"]}

    async def main() -> None:
        sender, receiver = memory_stream_one_way_pair()
        stream = BufferedReceiveStream(receiver)
        if first != "receive_some":
            await sender.send_all(b"ab")  # the buffer is not empty, and it is the waiting one's
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(getattr(stream, first), *arguments.get(first, []))
            await wait_all_tasks_blocked()
            for function in ("receive_some", "receive_line", "receive_exactly", "receive_until"):
                with pytest.raises(BusyResourceError, match="lock"):
                    await getattr(stream, function)(*arguments.get(function, []))
            with pytest.raises(BusyResourceError):
                await stream.receive_exactly(0)
            with pytest.raises(BusyResourceError):
                stream.unread(b"x")
            nursery.cancel_scope.cancel()
        await sender.send_all(b"cde|\n")
        assert await stream.receive_line() in (b"abcde|", b"cde|")

    kernel.run(main)


def test_one_task_at_a_time_may_receive_text() -> None:
    async def main() -> None:
        sender, receiver = memory_stream_one_way_pair()
        stream = TextReceiveStream(receiver)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(stream.receive_line)
            await wait_all_tasks_blocked()
            for function in (stream.receive_some, stream.receive_line):
                with pytest.raises(BusyResourceError, match="lock"):
                    await function()
            await sender.send_all(b"a\nb\n")
        assert await stream.receive_line() == "b"

    kernel.run(main)


def test_wrong_arguments_are_refused_and_take_nothing() -> None:
    async def main() -> None:
        stream = over(b"x\nabc|\n")
        await stream.receive_line()
        text: TextReceiveStream[Any] = TextReceiveStream(Source())
        calls: list[tuple[type[Exception], Any]] = [
            (TypeError, lambda: stream.receive_some("1")),  # type: ignore[arg-type]
            (ValueError, lambda: stream.receive_some(0)),
            (TypeError, lambda: stream.receive_exactly(1.0)),  # type: ignore[arg-type]
            (ValueError, lambda: stream.receive_exactly(-1)),
            (TypeError, lambda: stream.receive_until("|")),  # type: ignore[arg-type]
            (TypeError, lambda: stream.receive_until(124)),  # type: ignore[arg-type]
            (ValueError, lambda: stream.receive_until(b"")),
            *(
                (error, lambda wait=wait, number=number: wait(max=number))
                for wait in (stream.receive_line, lambda max: stream.receive_until(b"|", max=max), text.receive_line)
                for error, number in ((TypeError, None), (TypeError, "5"), (ValueError, 0), (ValueError, -1))
            ),
        ]
        for error, call in calls:
            with pytest.raises(error, match=r"must (not )?be"):
                await call()
        assert stream.buffered == b"abc|\n"
        with pytest.raises(TypeError):
            stream.unread("text")  # type: ignore[arg-type]
        assert await stream.receive_exactly(True) == b"a"

    kernel.run(main)


def test_operations_need_a_kernel() -> None:
    stream, text = over(b"abc"), TextReceiveStream(Source(b"abc"))
    for wait in (
        stream.receive_some(), stream.receive_line(), stream.receive_exactly(1), stream.receive_until(b"|"),
        text.receive_line(), text.receive_some(),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="outside the kernel"):
            next(iter(wait))


# ---- closing, errors from below, layers -----------------------------------------------------------------


def test_closing_forgets_what_is_buffered_and_closes_the_stream_below() -> None:
    async def main() -> None:
        for stream in (over(b"a\nb\nc"), TextReceiveStream(Source(b"a\nb\nc")), over(b"a\nb", b"c")):
            async with stream:
                await stream.receive_line()
                if isinstance(stream, BufferedReceiveStream):
                    await outcome_of(stream.receive_exactly, 100)
            assert stream.transport_stream.closed
            for function in (stream.receive_line, stream.receive_some):
                with pytest.raises(ClosedResourceError):
                    await function()
            await stream.aclose()

    kernel.run(main)


def test_closing_wakes_who_waits() -> None:
    async def main() -> None:
        for make in (BufferedReceiveStream, TextReceiveStream):
            sender, receiver = memory_stream_one_way_pair()
            stream: Any = make(receiver)
            await sender.send_all(b"unfinished")
            outcome: list[Any] = []

            async def receive(stream: Any = stream, outcome: list[Any] = outcome) -> None:
                outcome.append(await outcome_of(stream.receive_line))

            async with kernel.open_nursery() as nursery:
                nursery.start_soon(receive)
                await wait_all_tasks_blocked()
                await stream.aclose()
            assert [type(error) for error in outcome] == [ClosedResourceError]

    kernel.run(main)


def test_an_error_from_below_passes_and_takes_nothing() -> None:
    class Breaks(Source):
        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            if not self.chunks:
                raise kernel.BrokenResourceError("reset")
            return await super().receive_some(max_bytes)

    async def main() -> None:
        stream = BufferedReceiveStream(Breaks(b"ab", b"c"))
        for wait in (stream.receive_line(), stream.receive_exactly(9), stream.receive_until(b"|")):
            with pytest.raises(kernel.BrokenResourceError, match="reset"):
                await wait
        assert await stream.receive_some() == b"abc"

    kernel.run(main)


class OfGenerators(Source):
    @operation
    def receive_some(self, max_bytes: int | None = None) -> Generator[Any, Any, bytes]:  # type: ignore[override]
        yield from checkpoint()
        return self.chunks.pop(0) if self.chunks else b""

    @operation
    def aclose(self) -> Generator[Any, Any, None]:  # type: ignore[override]
        yield from checkpoint()
        self.closed = True


class OfAwaitables(Source):
    def receive_some(self, max_bytes: int | None = None) -> Any:
        below = super().receive_some(max_bytes)

        class Wait:
            def __await__(self) -> Generator[Any, Any, bytes]:
                return below.__await__()

        return Wait()


@pytest.mark.parametrize("kind", [OfGenerators, OfAwaitables])
def test_the_stream_below_may_be_made_of_anything_that_can_be_awaited(kind: type[Source]) -> None:
    async def main() -> None:
        async with BufferedReceiveStream(kind(b"ab", b"c\nd")) as stream:
            assert await stream.receive_line() == b"abc"
            assert await stream.receive_some() == b"d"
            assert await stream.receive_some() == b""
        assert stream.transport_stream.closed
        async with TextReceiveStream(kind(b"ab", b"c\nd")) as text:
            assert await text.receive_line() == "abc"
        assert text.transport_stream.closed

    kernel.run(main)


def test_a_layer_on_top_gets_what_is_buffered_first() -> None:
    async def main() -> None:
        stream = over(b"HEAD\r\n\xc3", b"\xa4\nrest")
        assert await stream.receive_line() == b"HEAD"
        text = TextReceiveStream(stream)
        assert [line async for line in text.lines(strict=False)] == ["ä", "rest"]
        below = over(b"a\nb\nc", b"\n")
        assert await below.receive_line() == b"a"
        assert await BufferedReceiveStream(below).receive_line() == b"b"

    kernel.run(main)


def test_its_repr_shows_the_stream_and_how_much_is_buffered() -> None:
    async def main() -> None:
        stream = over(b"a\nbcd")
        await stream.receive_line()
        assert repr(stream) == f"<BufferedReceiveStream over {stream.transport_stream!r}, 3 bytes buffered>"
        assert repr(TextReceiveStream(stream)) == f"<TextReceiveStream over {stream!r}>"

    kernel.run(main)


# ---- both directions ------------------------------------------------------------------------------------


def test_a_buffered_stream_keeps_the_promises_of_streams() -> None:
    async def make() -> tuple[HalfCloseableStream, HalfCloseableStream]:
        one, two = memory_stream_pair()
        return BufferedStream(one), BufferedStream(two)

    async def make_clogged() -> tuple[HalfCloseableStream, HalfCloseableStream]:
        one, two = lockstep_stream_pair()
        return BufferedStream(one), BufferedStream(two)

    async def main() -> None:
        await check_half_closeable_stream(make, None)
        await check_two_way_stream(make_clogged, make_clogged)

    kernel.run(main)


def test_what_is_sent_goes_through_and_a_conversation_works() -> None:
    async def main() -> None:
        one, two = memory_stream_pair()
        client, server = BufferedStream(one), BufferedStream(two)

        async def serve() -> None:
            async for line in server.lines():
                await server.wait_send_all_might_not_block()
                await server.send_all(line.upper() + b"\r\n")
            await server.send_eof()

        async with kernel.open_nursery() as nursery:
            nursery.start_soon(serve)
            await client.send_all(b"hello\nwor")
            assert await client.receive_line() == b"HELLO"
            await client.send_all(b"ld\n")
            assert await client.receive_line() == b"WORLD"
            await client.send_eof()
            assert await client.receive_some() == b""
        assert isinstance(client.transport_stream, kernel.StapledStream)

    kernel.run(main)


def test_ending_one_half_of_a_stream_that_cannot_is_an_error_that_says_so() -> None:
    class Whole(Source, Stream):
        async def send_all(self, data: object) -> None: ...

        async def wait_send_all_might_not_block(self) -> None: ...

    stream = BufferedStream(Whole())
    with pytest.raises(TypeError, match="no send_eof"):
        stream.send_eof()


# ---- what it costs --------------------------------------------------------------------------------------


class Count:
    """Bytes looked at by `find`, and bytes copied, in all the buffers that are made while it is in place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.searched = self.copied = 0
        count = self

        class CountedBytes(builtins.bytes):
            def __new__(cls, data: Any = b"") -> Any:
                count.copied += len(data)
                return super().__new__(cls, data)

            def find(self, sub: Any, start: Any = 0) -> int:  # type: ignore[override]
                found = super().find(sub, start)
                count.searched += (found if found >= 0 else len(self)) - start
                return found

            def __getitem__(self, at: Any) -> Any:
                part = super().__getitem__(at)
                if isinstance(at, slice):
                    count.copied += len(part)
                return part

        class CountedBytearray(bytearray):
            def find(self, sub: Any, start: Any = 0) -> int:  # type: ignore[override]
                found = super().find(sub, start)
                count.searched += (found if found >= 0 else len(self)) - start
                return found

            def __iadd__(self, data: Any) -> Any:  # type: ignore[misc]
                count.copied += len(data)
                return super().__iadd__(data)

        monkeypatch.setattr(buffered, "bytes", CountedBytes, raising=False)
        monkeypatch.setattr(buffered, "bytearray", CountedBytearray, raising=False)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    return Count(monkeypatch)


@pytest.mark.parametrize(
    ("line", "chunk"), [(100_000, 10), (4000, 1), (1000, 100), (9, 65_536), (999, 65_536), (30_000, 65_536)]
)
def test_lines_cost_a_few_times_their_bytes_whatever_the_sizes(line: int, chunk: int, count: Count) -> None:
    data = (b"x" * line + b"\n") * max(1, (200_000 if chunk > 1 else 8000) // line)

    async def main() -> int:
        stream = over(*(data[i : i + chunk] for i in range(0, len(data), chunk)))
        number = 0
        async for got in stream.lines(max=line):
            assert len(got) == line
            number += 1
        return number

    assert kernel.run(main) == len(data) // (line + 1)
    assert count.searched <= 3 * len(data)
    assert count.copied <= 5 * len(data)


@pytest.mark.parametrize(
    ("item", "chunk"), [(100_000, 10), (4000, 1), (1000, 100), (10, 65_536), (1000, 65_536), (0, 10)]
)
def test_exact_items_cost_a_few_times_their_bytes_whatever_the_sizes(item: int, chunk: int, count: Count) -> None:
    number = (200_000 if chunk > 1 else 8000) // item if item else 100
    data = b"x" * (item * number)

    async def main() -> None:
        stream = over(*(data[i : i + chunk] for i in range(0, len(data), chunk)))
        for _ in range(number):
            assert len(await stream.receive_exactly(item)) == item

    kernel.run(main)
    assert count.searched == 0
    assert count.copied <= 5 * len(data)


def test_small_reads_from_a_large_buffer_do_not_move_the_rest(count: Count) -> None:
    data = b"x" * 60_000

    async def main() -> None:
        stream = over(data, b"\n")
        with pytest.raises(IncompleteReadError):
            await stream.receive_exactly(100_000)
        for _ in range(10_000):
            await stream.receive_exactly(3)
            await stream.receive_some(3)
        assert await stream.receive_line() == b""

    kernel.run(main)
    assert count.copied <= 5 * len(data)


def test_to_skip_an_item_that_is_too_long_does_not_move_the_rest(count: Count) -> None:
    size = 50_000

    async def main() -> None:
        stream = over(b"x" * size)
        for _ in range(100):
            with pytest.raises(ItemTooLongError):
                await stream.receive_line(max=500)
            await stream.receive_exactly(499)

    kernel.run(main)
    assert count.copied <= 5 * size


def test_a_long_item_that_is_given_up_again_and_again_is_not_copied_each_time(count: Count) -> None:
    size = 5000
    source = Source(*[b"x"] * size, cancel=frozenset(range(1, 2 * size, 2)))
    stream = BufferedReceiveStream(source)

    async def main() -> None:
        while True:
            with CancelScope() as source.scope:
                assert len(await stream.receive_exactly(size)) == size
                return

    kernel.run(main)
    assert source.calls > size
    assert count.copied <= 5 * size


def test_memory_for_an_item_is_bounded_by_max_and_a_chunk() -> None:
    async def main() -> None:
        stream = over(*[b"x" * 100] * 1000)
        with pytest.raises(ItemTooLongError):
            await stream.receive_line(max=1000)
        assert len(stream.buffered) <= 1100
        text = TextReceiveStream(Source(*[b"x" * 100] * 1000))
        with pytest.raises(ItemTooLongError):
            await text.receive_line(max=1000)
        assert text.transport_stream.calls == 11

    kernel.run(main)


# ---- text -----------------------------------------------------------------------------------------------


def test_text_is_the_same_wherever_the_bytes_are_cut() -> None:
    async def main() -> None:
        raw = "grün\r\n日本\r😀\n".encode()
        for size in range(1, len(raw) + 1):
            stream = TextReceiveStream(Source(*(raw[i : i + size] for i in range(0, len(raw), size))))
            assert [line async for line in stream.lines()] == ["grün", "日本", "😀"]
            stream = TextReceiveStream(Source(*(raw[i : i + size] for i in range(0, len(raw), size))))
            text = ""
            while piece := await stream.receive_some():
                text += piece
            assert text == "grün\n日本\n😀\n"

    kernel.run(main)


ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-be", "shift_jis", "latin-1"])


@MORE
@given(
    st.text(st.sampled_from("abé日\n\r"), max_size=30),
    ENCODINGS,
    st.sampled_from([None, "\n"]),
    st.lists(st.integers(0, 130), max_size=20),
    st.frozensets(st.integers(0, 30), max_size=8),
    st.booleans(),
)
def test_lines_of_text_are_those_of_a_file_whatever_the_chunks_and_cancellations(
    text: str, encoding: str, newline: str | None, cuts: list[int], cancel: frozenset[int], in_pieces: bool
) -> None:
    raw = text.encode(encoding, errors="ignore")
    file = io.TextIOWrapper(io.BytesIO(raw), encoding, newline=newline)
    source = Source(*cut(raw, cuts), cancel=cancel)
    stream = TextReceiveStream(source, encoding, newline=newline)
    got = []

    async def main() -> None:
        lines = stream.lines(strict=False)
        while True:
            with CancelScope() as source.scope:
                if in_pieces:
                    piece = await stream.receive_some()
                    if not piece:
                        return
                else:
                    piece = await anext(lines, None)  # type: ignore[arg-type]
                    if piece is None:
                        return
                got.append(piece)

    kernel.run(main)
    if in_pieces:
        assert "".join(got) == file.read()
    else:
        assert got == [line.removesuffix("\n") for line in file]


@pytest.mark.parametrize(
    ("encoding", "good", "bad"),
    [
        ("utf-8", "aé\n€😀b", b"\xff"), ("utf-8", "é", b"\xe2\x28\xa1"), ("utf-8-sig", "aé", b"\xff"),
        ("ascii", "a\nb", b"\xe9"), ("utf-16", "aé😀", b"\x00\xd8\x00\x00"), ("utf-32", "a", b"\xff\xff\xff\xff"),
        ("shift_jis", "aあ\n", b"\xfd\xff"), ("gb18030", "a中", b"\xff"), ("iso2022_jp", "aあb", b"\xff"),
        ("cp1252", "abé", b"\x81"), ("utf-7", "aé", b"\xff"),
    ],
)  # fmt: skip
def test_text_before_bytes_that_are_none_arrives_and_then_comes_the_error_for_ever(
    encoding: str, good: str, bad: bytes
) -> None:
    raw = good.encode(encoding) + bad + b"aaaa\n"

    async def main(size: int) -> None:
        stream = TextReceiveStream(Source(*(raw[i : i + size] for i in range(0, len(raw), size))), encoding)
        *lines, rest = good.split("\n")
        for line in lines:
            assert await stream.receive_line() == line
        with pytest.raises(UnicodeDecodeError):
            await stream.receive_line()
        got = ""
        for _ in range(2):
            with pytest.raises(UnicodeDecodeError):
                while True:
                    got += await stream.receive_some()
        assert got == rest

    for size in range(1, len(raw) + 1):
        kernel.run(main, size)


def test_a_character_that_the_end_has_cut_is_an_error_or_replaced() -> None:
    async def main() -> None:
        stream = TextReceiveStream(Source(b"a\n\xc3"))
        assert await stream.receive_line() == "a"
        with pytest.raises(UnicodeDecodeError):
            await stream.receive_line()
        lenient = TextReceiveStream(Source(b"a\n\xc3"), errors="replace")
        assert [line async for line in lenient.lines(strict=False)] == ["a", "�"]
        assert [line async for line in TextReceiveStream(Source(b"a\xff\n"), errors="ignore").lines()] == ["a"]
        assert await TextReceiveStream(Source(b"\xe4\n"), "latin-1").receive_line() == "ä"

    kernel.run(main)


def test_a_text_that_ends_in_a_line_is_incomplete_and_nothing_is_taken() -> None:
    async def main() -> None:
        stream = TextReceiveStream(Source(b"a\nbc", "dé".encode()))
        assert await stream.receive_line() == "a"
        for _ in range(2):
            with pytest.raises(IncompleteReadError, match="4 characters") as caught:
                await stream.receive_line()
            assert caught.value.partial == "bcdé"
        with pytest.raises(IncompleteReadError):
            [line async for line in stream.lines()]
        assert await stream.receive_some() == "bcdé"
        assert await stream.receive_some() == ""
        with pytest.raises(IncompleteReadError) as caught:
            await stream.receive_line()
        assert caught.value.partial == ""

    kernel.run(main)


def test_a_line_of_text_that_is_too_long_takes_nothing() -> None:
    async def main() -> None:
        for chunks in ((b"abcd\ne\n",), (b"ab", b"cd", b"\ne\n")):
            stream = TextReceiveStream(Source(*chunks))
            for _ in range(2):
                with pytest.raises(ItemTooLongError) as caught:
                    await stream.receive_line(max=3)
                assert caught.value.max == 3
            assert await stream.receive_line(max=4) == "abcd"
            assert await stream.receive_line(max=1) == "e"

    kernel.run(main)


def test_only_encodings_of_text_and_two_kinds_of_newline_are_taken() -> None:
    for encoding, errors in (("no-such", "strict"), ("utf-8", "no-such"), ("hex", "strict")):
        with pytest.raises(LookupError):
            TextReceiveStream(Source(), encoding, errors=errors)
    for newline in ("", "\r\n", "x"):
        with pytest.raises(ValueError, match="newline"):
            TextReceiveStream(Source(), newline=newline)
