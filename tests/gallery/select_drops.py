"""Waiting for two queues at once, and what the loser of the race had in its hands.

"Whichever has something first" is written as a race of two `receive`s, of which the second is cancelled. But if both
queues have something in the same moment, both calls return, and only one result is used. The other item is gone.

What is taken out by a call that may be thrown away must not be taken by it. Let the sources send into one channel.

Seen in Kanal's channels under `select!` (fereidani/kanal#50). tokio's documentation lists for each of its operations
whether it may be used there, under the heading "cancel safety".
"""

from __future__ import annotations

import kernel

ERROR = kernel.Deadlock


async def buggy() -> None:
    send_mail, receive_mail = kernel.open_memory_channel[str](1)
    send_news, receive_news = kernel.open_memory_channel[str](1)

    async def reader() -> None:
        for _ in range(2):
            await kernel.race(receive_mail.receive, receive_news.receive)

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(reader, name="reader")
        nursery.start_soon(send_mail.send, "a letter", name="mail")
        nursery.start_soon(send_news.send, "an earthquake", name="news")


async def correct() -> None:
    send_channel, receive_channel = kernel.open_memory_channel[str](1)

    async def reader() -> None:
        for _ in range(2):
            await receive_channel.receive()

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(reader, name="reader")
        nursery.start_soon(send_channel.send, "a letter", name="mail")
        nursery.start_soon(send_channel.send, "an earthquake", name="news")
