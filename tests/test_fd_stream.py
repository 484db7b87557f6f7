"""FdStream: bytes through pipes, who may use it, and what is left of the descriptor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

import kernel
from kernel import BrokenResourceError, BusyResourceError, ClosedResourceError
from kernel.lowlevel import FdStream
from kernel.testing import wait_all_tasks_blocked

MUCH = bytes(range(256)) * 4096  # a megabyte: more than any pipe holds


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends as numbers; what a test has not closed is closed."""
    read, write = os.pipe()
    yield read, write
    for fd in (read, write):
        try:
            os.close(fd)
        except OSError:
            pass


async def open_pipe() -> tuple[FdStream, FdStream]:
    read, write = os.pipe()
    return FdStream(read), FdStream(write)


async def swallow(error: type[BaseException], log: list[str], function: Any, *args: Any) -> None:
    try:
        log.append(f"returned {await function(*args)!r}")
    except error as caught:
        log.append(f"{type(caught).__name__}")


def test_what_is_sent_is_received_and_then_comes_the_end() -> None:
    async def main() -> None:
        receiver, sender = await open_pipe()
        async with receiver:
            async with sender:
                await sender.send_all(b"hello")
                assert await receiver.receive_some() == b"hello"
                await sender.send_all(bytearray(b"abc"))
                await sender.send_all(memoryview(b"def"))
                await sender.send_all(b"")
                assert await receiver.receive_some(4) == b"abcd"
                assert await receiver.receive_some(4) == b"ef"
            assert await receiver.receive_some() == b""
            assert await receiver.receive_some() == b""

    kernel.run(main)


def test_more_than_the_pipe_holds_arrives_in_order() -> None:
    async def main() -> None:
        receiver, sender = await open_pipe()
        got = bytearray()

        async def send() -> None:
            async with sender:
                await sender.send_all(MUCH)

        async with receiver, kernel.open_nursery() as nursery:
            nursery.start_soon(send)
            async for chunk in receiver:
                got += chunk
        assert got == MUCH

    kernel.run(main)


def test_a_view_of_larger_items_is_sent_as_bytes() -> None:
    async def main() -> None:
        receiver, sender = await open_pipe()
        async with receiver, sender:
            await sender.send_all(memoryview(b"12345678").cast("I"))
            assert await receiver.receive_some() == b"12345678"

    kernel.run(main)


def test_generator_style_works() -> None:
    def main() -> Any:
        read, write = os.pipe()
        receiver, sender = FdStream(read), FdStream(write)
        yield from sender.send_all(b"hello")
        chunk = yield from receiver.receive_some()
        yield from sender.aclose()
        yield from receiver.aclose()
        return chunk

    assert kernel.run(main) == b"hello"


def test_a_cancelled_send_says_how_many_bytes_went_out(pipe: tuple[int, int]) -> None:
    async def main() -> tuple[int, int]:
        async with FdStream(pipe[1]) as sender:
            with kernel.CancelScope() as scope, pytest.raises(kernel.Cancelled) as caught:
                async with kernel.open_nursery() as nursery:
                    nursery.start_soon(wait_then_cancel, scope)
                    try:
                        await sender.send_all(MUCH)
                    except kernel.Cancelled as cancelled:
                        sent = cancelled.bytes_sent  # type: ignore[attr-defined]
                        raise
            assert caught.type is kernel.Cancelled
        return sent, len(os.read(pipe[0], len(MUCH)))

    async def wait_then_cancel(scope: kernel.CancelScope) -> None:
        await wait_all_tasks_blocked()
        scope.cancel()

    sent, arrived = kernel.run(main)
    assert sent == arrived
    assert 0 < sent < len(MUCH)


def test_a_send_and_a_receive_in_a_cancelled_scope_do_nothing(pipe: tuple[int, int]) -> None:
    async def main() -> None:
        async with FdStream(pipe[1]) as sender, FdStream(os.dup(pipe[0])) as receiver:
            await sender.send_all(b"kept")
            with kernel.CancelScope() as scope:
                scope.cancel()
                with pytest.raises(kernel.Cancelled) as caught:
                    await sender.send_all(b"not sent")
                assert caught.value.bytes_sent == 0  # type: ignore[attr-defined]
                with pytest.raises(kernel.Cancelled):
                    await receiver.receive_some()
            assert await receiver.receive_some() == b"kept"

    kernel.run(main)


def test_sending_to_nobody_breaks_and_says_how_many_bytes_went_out() -> None:
    async def main() -> None:
        receiver, sender = await open_pipe()

        async def leave() -> None:
            await wait_all_tasks_blocked()
            await receiver.aclose()

        async with sender, kernel.open_nursery() as nursery:
            nursery.start_soon(leave)
            with pytest.raises(BrokenResourceError) as caught:
                await sender.send_all(MUCH)
            assert 0 < caught.value.bytes_sent < len(MUCH)  # type: ignore[attr-defined]
            assert isinstance(caught.value.__cause__, BrokenPipeError)

    kernel.run(main)


def test_one_task_may_send_and_one_receive_and_others_are_told_so() -> None:
    log: list[str] = []

    async def main() -> None:
        receiver, sender = await open_pipe()
        async with receiver, sender:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(receiver.receive_some)
                await wait_all_tasks_blocked()
                await swallow(BusyResourceError, log, receiver.receive_some)
                await sender.send_all(b"x")
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(sender.send_all, MUCH)
                await wait_all_tasks_blocked()
                await swallow(BusyResourceError, log, sender.send_all, b"")
                await swallow(BusyResourceError, log, sender.wait_send_all_might_not_block)
                nursery.cancel_scope.cancel()
            async with kernel.open_nursery() as nursery:  # after the cancellation it is free again
                nursery.start_soon(sender.wait_send_all_might_not_block)
                await wait_all_tasks_blocked()
                await swallow(BusyResourceError, log, sender.send_all, b"")
                await receiver.receive_some()

    kernel.run(main)
    assert log == ["BusyResourceError"] * 4


@pytest.mark.parametrize("sends", [False, True])
def test_closing_wakes_who_waits(sends: bool) -> None:
    log: list[str] = []

    async def main() -> None:
        receiver, sender = await open_pipe()
        stream = sender if sends else receiver
        async with receiver, sender, kernel.open_nursery() as nursery:
            if sends:
                nursery.start_soon(swallow, ClosedResourceError, log, sender.send_all, MUCH)
            else:
                nursery.start_soon(swallow, ClosedResourceError, log, receiver.receive_some)
            await wait_all_tasks_blocked()
            await stream.aclose()

    kernel.run(main)
    assert log == ["ClosedResourceError"]


def test_a_receiver_that_was_woken_finds_the_stream_closed_and_never_reads_a_stranger(pipe: tuple[int, int]) -> None:
    """It is committed to go on when another task closes the stream; the number may be somebody else's by then."""
    log: list[str] = []

    async def main() -> None:
        receiver = FdStream(pipe[0])

        async def receive() -> None:
            await swallow(ClosedResourceError, log, receiver.receive_some)

        async def close_first() -> None:
            await kernel.lowlevel.wait_readable(ready)
            receiver.close()
            other, other_write = os.pipe()
            os.write(other_write, b"a stranger's")
            assert other == pipe[0]
            assert os.read(other, 100) == b"a stranger's"
            os.close(other)
            os.close(other_write)

        ready, go = os.pipe()
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(close_first)
            await wait_all_tasks_blocked()
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            os.write(go, b"x")  # both are ready in one poll; close_first has waited longer
            os.write(pipe[1], b"x")
        os.close(ready)
        os.close(go)

    kernel.run(main)
    assert log == ["ClosedResourceError"]


def test_a_closed_stream_refuses_everything_and_may_be_closed_again() -> None:
    log: list[str] = []

    async def main() -> None:
        receiver, sender = await open_pipe()
        for stream in (receiver, sender, sender):
            await stream.aclose()
        assert (receiver.fileno(), repr(receiver)) == (-1, "<FdStream closed>")
        for function, *args in (
            (receiver.receive_some,), (sender.send_all, b""), (sender.wait_send_all_might_not_block,)
        ):  # fmt: skip
            await swallow(ClosedResourceError, log, function, *args)

    kernel.run(main)
    assert log == ["ClosedResourceError"] * 3


def test_aclose_closes_even_if_cancelled(pipe: tuple[int, int]) -> None:
    async def main() -> None:
        stream = FdStream(pipe[0])
        with kernel.CancelScope() as scope:
            scope.cancel()
            with pytest.raises(kernel.Cancelled):
                await stream.aclose()
        assert stream.fileno() == -1
        with pytest.raises(OSError):
            os.fstat(pipe[0])

    kernel.run(main)


def test_a_second_receiver_does_not_take_what_the_first_one_waits_for(pipe: tuple[int, int]) -> None:
    log: list[str] = []

    async def main() -> None:
        async with FdStream(os.dup(pipe[0])) as receiver, kernel.open_nursery() as nursery:
            nursery.start_soon(swallow, BusyResourceError, log, receiver.receive_some)
            await wait_all_tasks_blocked()
            os.write(pipe[1], b"x")  # the first one is still asleep
            await swallow(BusyResourceError, log, receiver.receive_some)

    kernel.run(main)
    assert log == ["BusyResourceError", "returned b'x'"]


def test_closed_behind_its_back_is_a_closed_error(pipe: tuple[int, int]) -> None:
    log: list[str] = []

    async def main() -> None:
        receiver = FdStream(pipe[0])
        os.close(pipe[0])
        await swallow(ClosedResourceError, log, receiver.receive_some)
        receiver._fd = -1

    kernel.run(main)
    assert log == ["ClosedResourceError"]


def test_failure_to_read_is_a_broken_stream(tmp_path: Any) -> None:
    async def main() -> None:
        async with FdStream(os.open(tmp_path, os.O_RDONLY)) as directory:
            with pytest.raises(BrokenResourceError) as caught:
                await directory.receive_some()
            assert isinstance(caught.value.__cause__, IsADirectoryError)

    kernel.run(main)


def test_the_blocking_mode_is_put_back_at_close(pipe: tuple[int, int]) -> None:
    async def main() -> None:
        for blocking in (True, False):
            os.set_blocking(pipe[0], blocking)
            stream = FdStream(os.dup(pipe[0]))
            assert os.get_blocking(pipe[0]) is False
            await stream.aclose()
            assert os.get_blocking(pipe[0]) is blocking

    kernel.run(main)


def test_a_stream_that_is_forgotten_closes_its_descriptor(pipe: tuple[int, int]) -> None:
    stream = FdStream(os.dup(pipe[0]))
    number = stream.fileno()
    del stream
    with pytest.raises(OSError):
        os.fstat(number)
    assert os.get_blocking(pipe[0]) is True


def test_wrong_arguments_are_refused_and_take_nothing(pipe: tuple[int, int]) -> None:
    with pytest.raises(TypeError, match="file descriptor"):
        FdStream("0")  # type: ignore[arg-type]
    with pytest.raises(OSError):
        FdStream(10_000)

    async def main() -> None:
        async with FdStream(os.dup(pipe[0])) as stream:
            for wrong, error in ((0, ValueError), (-1, ValueError), ("1", TypeError), (1.5, TypeError)):
                with pytest.raises(error, match="max_bytes"):
                    await stream.receive_some(wrong)  # type: ignore[arg-type]
        async with FdStream(os.dup(pipe[1])) as stream:
            with pytest.raises(TypeError):
                await stream.send_all("text")  # type: ignore[arg-type]
            await stream.send_all(b"works still")
        assert os.read(pipe[0], 100) == b"works still"

    kernel.run(main)


def test_operations_need_a_kernel(pipe: tuple[int, int]) -> None:
    stream = FdStream(os.dup(pipe[0]))
    with pytest.raises(RuntimeError, match="outside the kernel"):
        next(iter(stream.receive_some()))


def test_a_task_that_never_blocks_lets_others_run_all_the_same(pipe: tuple[int, int]) -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await kernel.lowlevel.checkpoint()
            turns += 1

    async def main() -> None:
        async with FdStream(pipe[1]) as sender, FdStream(pipe[0]) as receiver, kernel.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(1000):
                await sender.send_all(b"x")
                await receiver.receive_some()
            nursery.cancel_scope.cancel()

    kernel.run(main)
    assert turns > 5


def test_a_sleeping_task_tells_for_which_descriptor_it_waits() -> None:
    async def main() -> None:
        receiver, sender = await open_pipe()
        async with receiver, sender, kernel.open_nursery() as nursery:
            nursery.start_soon(receiver.receive_some)
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            assert repr(task.trap) == f"<WaitReadable fd={receiver.fileno()}>"
            nursery.cancel_scope.cancel()

    kernel.run(main)
