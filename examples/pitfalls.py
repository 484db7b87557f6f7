"""Three classic mistakes: what becomes of them in asyncio, and what in this kernel.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/pitfalls.py

Each pair is the same small program twice, with the same mistake or the same idea in it. The asyncio side is not made
to look bad. It uses what its documentation recommends (`asyncio.timeout`, a kept reference to each task,
`loop.sock_recv`), and it does the same on CPython 3.11, 3.12 and 3.13.

1. A timeout that is lost. An `except` that is too wide takes the cancellation for a failure. asyncio delivers a
   cancellation once, so it is gone. Here it is a state of the scope: the next wait raises it again. (If no wait
   followed, the timeout would go unnoticed here too. Let `Cancelled` pass.)
2. A task that leaks. A function starts a task and returns. asyncio lets the task live on, and its error has nobody to
   go to. Here a task is started in a nursery, and the block around it ends when the task has, with its error.
3. A reader that is forgotten. Two tasks wait to read one socket. asyncio remembers the last one only. Here the second
   one gets an error that says so.
"""

import asyncio
import gc
import socket
import time
from typing import Any

import kernel
from kernel.lowlevel import wait_readable

# ---- 1. A timeout that is lost --------------------------------------------------------------------


async def price_in_asyncio() -> str:
    try:
        await asyncio.sleep(10)  # the shop is slow today
    except BaseException:  # the mistake: this is not only the shop's failures
        print("  no answer from the shop, asking the wholesaler")
        await asyncio.sleep(0.3)
    return "4.50"


async def lost_timeout_in_asyncio() -> None:
    began = time.monotonic()
    try:
        async with asyncio.timeout(0.1):
            print(f"  the price is {await price_in_asyncio()}")
        late = time.monotonic() - began > 0.3
        print(f"  no TimeoutError; took more than three times its 0.1 s: {late}")
    except TimeoutError:
        print("  TimeoutError")


async def price_in_kernel() -> str:
    try:
        await kernel.sleep(10)
    except BaseException:  # the same mistake
        print("  no answer from the shop, asking the wholesaler")
        await kernel.sleep(0.3)
    return "4.50"


async def lost_timeout_in_kernel() -> None:
    try:
        with kernel.fail_after(0.1):
            print(f"  the price is {await price_in_kernel()}")
    except kernel.TooSlowError:
        print("  TooSlowError")


# ---- 2. A task that leaks -------------------------------------------------------------------------

background: set["asyncio.Task[None]"] = set()


async def order_in_asyncio() -> None:
    task = asyncio.create_task(print_receipt_in_asyncio())
    background.add(task)  # or it might be garbage collected while it runs
    task.add_done_callback(background.discard)


async def print_receipt_in_asyncio() -> None:
    await asyncio.sleep(0.05)
    raise OSError("out of paper")


async def leaking_task_in_asyncio() -> None:
    def log(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        print(f"  in a log, some time later: {context['message']}")

    asyncio.get_running_loop().set_exception_handler(log)  # the default one writes to stderr
    try:
        await order_in_asyncio()
        print(f"  the order is done; tasks still running behind its back: {len(background)}")
        await asyncio.sleep(0.1)
        gc.collect()  # the message comes when the task is freed
        print("  the program goes on as if all were well")
    except OSError as error:
        print(f"  the order failed: {error}")


async def order_in_kernel() -> None:
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(print_receipt_in_kernel)


async def print_receipt_in_kernel() -> None:
    await kernel.sleep(0.05)
    raise OSError("out of paper")


async def leaking_task_in_kernel() -> None:
    try:
        await order_in_kernel()
        print("  the order is done")
    except* OSError as group:
        print(f"  the order failed: {group.exceptions[0]}")


# ---- 3. A reader that is forgotten ----------------------------------------------------------------


async def forgotten_reader_in_asyncio() -> None:
    loop = asyncio.get_running_loop()
    ours, theirs = non_blocking_pair()
    with ours, theirs:
        first = asyncio.create_task(loop.sock_recv(ours, 100))
        await asyncio.sleep(0)
        second = asyncio.create_task(loop.sock_recv(ours, 100))
        await asyncio.sleep(0)
        theirs.send(b"one")
        print(f"  the second reader got {await second!r}")
        theirs.send(b"two")
        await asyncio.wait([first], timeout=0.1)
        print(f"  the first reader sleeps on, with b'two' waiting for it: {not first.done()}")
        first.cancel()
        await asyncio.wait([first])


async def forgotten_reader_in_kernel() -> None:
    async def read(which: str) -> None:
        try:
            await wait_readable(ours)
            print(f"  the {which} reader got {ours.recv(100)!r}")
        except kernel.BusyResourceError:
            print(f"  the {which} reader got a BusyResourceError")

    ours, theirs = non_blocking_pair()
    with ours, theirs:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(read, "first")
            nursery.start_soon(read, "second")
            await kernel.sleep(0)  # let both begin
            theirs.send(b"one")


def non_blocking_pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


# ---- all of them ----------------------------------------------------------------------------------


def main() -> None:
    for title, in_asyncio, in_kernel in (
        ("A timeout that is lost", lost_timeout_in_asyncio, lost_timeout_in_kernel),
        ("A task that leaks", leaking_task_in_asyncio, leaking_task_in_kernel),
        ("A reader that is forgotten", forgotten_reader_in_asyncio, forgotten_reader_in_kernel),
    ):
        print(f"{title}, in asyncio")
        asyncio.run(in_asyncio())
        print(f"{title}, in the kernel")
        kernel.run(in_kernel)


if __name__ == "__main__":
    main()
