"""Items per second out of a byte stream that is in memory: ours beside what the others have.

    PYTHONPATH=. .venv/bin/python tests/bench/buffered.py

All contenders run in this process, in turn, several rounds; of each the best. They read the same bytes, from a source
that hands out 64 KiB at a time after a checkpoint, so what is measured is the buffering and not the system:

    kernel          BufferedReceiveStream
    kernel, lines   the same, `async for line in stream.lines()`
    asyncio         StreamReader.readline, readexactly; fed by a task
    trio            has none. The usual class written by hand: a bytearray, and where the search goes on
    anyio           BufferedByteReceiveStream on asyncio

A *line* ends with a newline. A *frame* is a length in four bytes and so many bytes, so two items. *large* is one item
of 4 MiB that comes in chunks of 4 KiB. Printed are microseconds per item, and how many times as long the others take.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import anyio
import trio
from anyio.abc import ByteReceiveStream
from anyio.streams.buffered import BufferedByteReceiveStream

import kernel
from kernel.abc import ReceiveStream
from kernel.buffered import BufferedReceiveStream
from kernel.lowlevel import checkpoint

LARGE = 4 << 20
NO_LIMIT = 1 << 30

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


def cut(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def workloads() -> dict[str, tuple[str, bytes, int, int]]:
    """What to read: the way to do it, the bytes, the size of the chunks, and how many items there are."""
    frame = (100).to_bytes(4, "big") + b"x" * 100
    return {
        "lines of 20": ("lines", (b"x" * 19 + b"\n") * 20_000, 65536, 20_000),
        "lines of 100": ("lines", (b"x" * 99 + b"\n") * 20_000, 65536, 20_000),
        "lines of 1000": ("lines", (b"x" * 999 + b"\n") * 5_000, 65536, 5_000),
        "frames of 100": ("frames", frame * 10_000, 65536, 10_000),
        "large, exactly": ("exactly", b"x" * LARGE, 4096, 1),
        "large, until": ("until", b"x" * (LARGE - 1) + b"\n", 4096, 1),
    }


class KernelSource(ReceiveStream):
    def __init__(self, data: bytes, size: int) -> None:
        self.chunks = cut(data, size)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await checkpoint()
        return next(self.chunks, b"")

    async def aclose(self) -> None:
        pass


async def with_kernel(way: str, data: bytes, size: int, count: int) -> None:
    stream = BufferedReceiveStream(KernelSource(data, size))
    if way == "lines":
        for _ in range(count):
            await stream.receive_line()
    elif way == "frames":
        for _ in range(count):
            await stream.receive_exactly(int.from_bytes(await stream.receive_exactly(4), "big"))
    elif way == "exactly":
        await stream.receive_exactly(LARGE)
    else:
        await stream.receive_until(b"\n", max=NO_LIMIT)


async def with_kernel_lines(way: str, data: bytes, size: int, count: int) -> None:
    async for _ in BufferedReceiveStream(KernelSource(data, size)).lines():
        pass


async def with_asyncio(way: str, data: bytes, size: int, count: int) -> None:
    reader = asyncio.StreamReader(limit=NO_LIMIT)

    async def feed() -> None:
        for chunk in cut(data, size):
            reader.feed_data(chunk)
            await asyncio.sleep(0)
            while len(reader._buffer) >= 65536 and way in ("lines", "frames"):  # type: ignore[attr-defined]
                await asyncio.sleep(0)

    feeder = asyncio.create_task(feed())
    if way == "lines":
        for _ in range(count):
            await reader.readline()
    elif way == "frames":
        for _ in range(count):
            await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
    elif way == "exactly":
        await reader.readexactly(LARGE)
    else:
        await reader.readuntil(b"\n")
    await feeder


class TrioSource(trio.abc.ReceiveStream):
    def __init__(self, data: bytes, size: int) -> None:
        self.chunks = cut(data, size)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        return next(self.chunks, b"")

    async def aclose(self) -> None:
        pass


class ByHand:
    """What one writes, with care, for oneself. No guard, and no checkpoint unless it waits."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self.stream = stream
        self.buffer = bytearray()

    async def until(self, delimiter: bytes, limit: int = 65536) -> bytes:
        searched = 0
        while True:
            end = self.buffer.find(delimiter, searched)
            if end >= 0:
                item = bytes(self.buffer[:end])
                del self.buffer[: end + len(delimiter)]
                return item
            if len(self.buffer) > limit:
                raise ValueError("too long")
            searched = max(0, len(self.buffer) - len(delimiter) + 1)
            await self.fill()

    async def exactly(self, count: int) -> bytes:
        while len(self.buffer) < count:
            await self.fill()
        item = bytes(self.buffer[:count])
        del self.buffer[:count]
        return item

    async def fill(self) -> None:
        chunk = await self.stream.receive_some()
        if not chunk:
            raise EOFError
        self.buffer += chunk


async def with_trio(way: str, data: bytes, size: int, count: int) -> None:
    stream = ByHand(TrioSource(data, size))
    if way == "lines":
        for _ in range(count):
            await stream.until(b"\n")
    elif way == "frames":
        for _ in range(count):
            await stream.exactly(int.from_bytes(await stream.exactly(4), "big"))
    elif way == "exactly":
        await stream.exactly(LARGE)
    else:
        await stream.until(b"\n", NO_LIMIT)


class AnyioSource(ByteReceiveStream):
    def __init__(self, data: bytes, size: int) -> None:
        self.chunks = cut(data, size)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await asyncio.sleep(0)
        try:
            return next(self.chunks)
        except StopIteration:
            raise anyio.EndOfStream from None

    async def aclose(self) -> None:
        pass


async def with_anyio(way: str, data: bytes, size: int, count: int) -> None:
    stream = BufferedByteReceiveStream(AnyioSource(data, size))
    if way == "lines":
        for _ in range(count):
            await stream.receive_until(b"\n", 65536)
    elif way == "frames":
        for _ in range(count):
            await stream.receive_exactly(int.from_bytes(await stream.receive_exactly(4), "big"))
    elif way == "exactly":
        await stream.receive_exactly(LARGE)
    else:
        await stream.receive_until(b"\n", NO_LIMIT)


CONTENDERS: dict[str, tuple[Callable[..., Any], Callable[..., Coroutine[Any, Any, None]]]] = {
    "kernel": (kernel.run, with_kernel),
    "kernel, lines": (kernel.run, with_kernel_lines),
    "asyncio": (lambda fn, *args: asyncio.run(fn(*args)), with_asyncio),
    "trio": (trio.run, with_trio),
    "anyio": (lambda fn, *args: asyncio.run(fn(*args)), with_anyio),
}


def main(rounds: int) -> None:
    print(f"us per item, best of {rounds}; in brackets: times ours. CPython {sys.version.split()[0]}")
    for name, (way, data, size, count) in workloads().items():
        best = dict.fromkeys(CONTENDERS, float("inf"))
        if way != "lines":
            del best["kernel, lines"]
        for _ in range(rounds):
            for contender in best:
                run, function = CONTENDERS[contender]
                gc.collect()
                start = time.perf_counter()
                run(function, way, data, size, count)
                best[contender] = min(best[contender], time.perf_counter() - start)
        ours = best["kernel"]
        figures = [f"{who} {spent / count * 1e6:.2f} ({spent / ours:.2f})" for who, spent in best.items()]
        print(f"{name:15}", "  ".join(figures), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args().rounds)
