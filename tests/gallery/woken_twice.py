"""A task is woken for a wait that it has given up, and is in the middle of the next one.

A queue keeps the tasks that wait for an item, and wakes the first when one comes. One of them is cancelled. The queue
says yes, that can be taken back, and forgets to take the task off its list. Later an item comes, and the queue wakes a
task that is asleep in quite another place, or ready, or over.

Who says "taken back" must have taken it back: nothing in the world may still know this wait.

Seen in `trio.Queue`, in trio's first years ("an interesting crash will result", python-trio/trio#553). A kernel can
notice when the task is not asleep. When it sleeps elsewhere, it cannot: `sleep` returns an item, and early.
"""

from __future__ import annotations

from collections import deque

import outcome

import kernel
from kernel.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

ERROR = RuntimeError


class NaiveQueue:
    """Without a buffer: an item that nobody waits for is thrown away."""

    def __init__(self) -> None:
        self.waiting: deque[Task] = deque()

    async def get(self) -> str:
        task = current_task()
        self.waiting.append(task)

        def abort(raise_cancel: object) -> Abort:
            self.given_up(task)
            return Abort.SUCCEEDED

        item: str = await wait_task_rescheduled(abort)
        return item

    def given_up(self, task: Task) -> None:
        """Does not know that there is anything to do."""

    def put(self, item: str) -> None:
        if self.waiting:
            reschedule(self.waiting.popleft(), outcome.Value(item))


class Queue(NaiveQueue):
    def given_up(self, task: Task) -> None:
        self.waiting.remove(task)


async def story(queue: NaiveQueue) -> None:
    patience = kernel.CancelScope()

    async def consumer() -> None:
        with patience:
            await queue.get()

    async def producer() -> None:
        queue.put("an item")

    async def canceller() -> None:
        patience.cancel()

    async with kernel.open_nursery() as nursery:
        for task in (consumer, producer, canceller):
            nursery.start_soon(task, name=task.__name__)
        nursery.start_soon(late_put, queue, name="late producer")


async def late_put(queue: NaiveQueue) -> None:
    """So that in the end somebody is there for the consumer in any case."""
    await kernel.sleep(1)
    queue.put("another item")


async def buggy() -> None:
    await story(NaiveQueue())


async def correct() -> None:
    await story(Queue())
