"""Small programs whose tasks share kernel objects, and all that can become of them. For test_pruning.py.

A program is data: for each task a list of operations, each a tuple of a name and arguments. So hypothesis can make one,
and shrink it. Each task writes down what came of each operation, in a list of its own. The *ending* of a run is all of
these lists, the error it ended with, and the time.
"""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from typing import Any

from hypothesis import strategies as st

import kernel
from kernel.children import TaskHandle
from kernel.lowlevel import ParkingLot, checkpoint, consume_budget
from kernel.testing.explore import _Options, _Run
from kernel.testing.footprints import Footprints
from kernel.testing.pruning import Pruned
from kernel.testing.schedules import Exhaustive

Operation = tuple[Any, ...]
Program = Sequence[Sequence[Operation]]
Ending = tuple[Any, ...]


class World:
    """The objects that the tasks of one run share."""

    def __init__(self, program: Program) -> None:
        self.locks = [kernel.Lock(), kernel.Lock()]
        self.event = kernel.Event()
        self.semaphore = kernel.Semaphore(1)
        self.limiter = kernel.CapacityLimiter(1)
        self.condition = kernel.Condition()
        self.lot = ParkingLot()
        self.barrier = kernel.Barrier(2)
        self.ends = [kernel.open_memory_channel[Any](size) for size in (0, 1)]
        self.news = kernel.open_broadcast_channel(1)
        self.latest = kernel.open_latest_channel(None)
        self.scopes = [kernel.CancelScope() for _ in program]
        self.handles: list[TaskHandle[Any]] = []
        self.nursery: Any = None
        self.variable = kernel.lowlevel.RunVar[Any]("variable", None)

    # ---- operations ----

    async def lock(self, which: int) -> None:
        await self.locks[which].acquire()

    async def unlock(self, which: int) -> None:
        self.locks[which].release()

    async def locked(self, which: int) -> None:
        async with self.locks[which]:
            await checkpoint()

    async def is_locked(self, which: int) -> Any:
        return self.locks[which].locked()

    async def wait(self) -> None:
        await self.event.wait()

    async def set(self) -> None:
        self.event.set()

    async def is_set(self) -> Any:
        return self.event.is_set()

    async def take(self) -> None:
        await self.semaphore.acquire()

    async def give(self) -> None:
        self.semaphore.release()

    async def value(self) -> Any:
        return self.semaphore.value

    async def limited(self) -> None:
        async with self.limiter:
            await checkpoint()

    async def borrowed(self) -> Any:
        return self.limiter.borrowed_tokens

    async def wait_for_change(self) -> None:
        async with self.condition:
            await self.condition.wait()

    async def change(self) -> None:
        async with self.condition:
            self.condition.notify()

    async def park(self) -> None:
        await self.lot.park()

    async def unpark(self) -> Any:
        return len(self.lot.unpark())

    async def meet(self) -> Any:
        return await self.barrier.wait()

    async def send(self, which: int, value: int) -> None:
        await self.ends[which][0].send(value)

    async def receive(self, which: int) -> Any:
        return await self.ends[which][1].receive()

    async def send_nowait(self, which: int, value: int) -> None:
        self.ends[which][0].send_nowait(value)

    async def receive_nowait(self, which: int) -> Any:
        return self.ends[which][1].receive_nowait()

    async def close(self, which: int) -> None:
        self.ends[which][0].close()

    async def buffered(self, which: int) -> Any:
        return self.ends[which][0].statistics().current_buffer_used

    async def listen(self) -> Any:
        with self.news.subscribe() as news:
            return await news.receive()

    async def tell(self, value: int) -> None:
        await self.news.send(value)

    async def watch(self) -> Any:
        with self.latest.subscribe() as latest:
            return await latest.receive(), await latest.receive()

    async def update(self, value: int) -> None:
        self.latest.set(value)

    async def cancel(self, which: int) -> None:
        self.scopes[which % len(self.scopes)].cancel()

    async def was_cancelled(self, which: int) -> Any:
        return self.scopes[which % len(self.scopes)].cancel_called

    async def shield(self, which: int) -> None:
        scope = self.scopes[which % len(self.scopes)]
        scope.shield = not scope.shield

    async def cancel_all(self) -> None:
        self.nursery.cancel_scope.cancel()

    async def cancel_child(self, which: int) -> None:
        self.handles[which % len(self.handles)].cancel()

    async def join(self, which: int) -> Any:
        return await self.handles[which % len(self.handles)]

    async def done(self, which: int) -> Any:
        return self.handles[which % len(self.handles)].done

    async def children(self) -> Any:
        return len(self.nursery.child_tasks)

    async def start(self) -> None:
        self.nursery.start_soon(consume_budget)

    async def gather(self) -> Any:
        return await kernel.gather(self.is_set, self.set)

    async def race(self) -> Any:
        async def first() -> str:
            await checkpoint()
            return "first"

        async def second() -> str:
            await consume_budget()
            return "second"

        return await kernel.race(first, second)

    async def race_of_failures(self) -> Any:
        async def fail(how: type[Exception]) -> Any:
            await checkpoint()
            raise how

        return await kernel.race(lambda: fail(KeyError), lambda: fail(ValueError))

    async def nested(self) -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(self.set)
            nursery.start_soon(checkpoint)

    async def time_out(self) -> Any:
        with kernel.move_on_after(1) as scope:
            await self.event.wait()
        return scope.cancelled_caught

    async def brief(self) -> Any:
        with kernel.move_on_after(1) as scope:
            await checkpoint()
        return scope.cancelled_caught

    async def sleep(self, seconds: int) -> None:
        await kernel.sleep(seconds)

    async def write(self, value: int) -> None:
        self.variable.set(value)

    async def read(self) -> Any:
        return self.variable.get()

    async def step(self) -> None:
        await checkpoint()

    async def fail(self) -> None:
        raise LookupError


def as_function(program: Program, logs: list[list[Any]]) -> Callable[[], Awaitable[None]]:
    """The program as an async function, whose tasks write into `logs`."""

    async def main() -> None:
        world = World(program)
        logs[:] = [[] for _ in program]

        async def task(number: int) -> None:
            log = logs[number]
            with world.scopes[number]:
                for name, *arguments in program[number]:
                    try:
                        log.append((name, repr(await getattr(world, name)(*arguments))))
                    except Exception as problem:
                        log.append((name, kind(problem)))
                        if name == "fail":
                            raise
                    except kernel.Cancelled:
                        log.append((name, "cancelled"))
                        raise
            log.append(("end", kernel.current_time()))

        async with kernel.open_nursery() as world.nursery:
            for number in range(len(program)):
                world.handles.append(world.nursery.spawn(task, number))

    return main


def kind(error: BaseException) -> Any:
    if isinstance(error, BaseExceptionGroup):
        return tuple(kind(one) for one in error.exceptions)
    return type(error).__name__


def endings_of(program: Program, limit: int, *, prune: bool, **options: Any) -> tuple[set[Ending], int] | None:
    """All endings, and the number of schedules it took; None if there are more than `limit`."""
    logs: list[list[Any]] = []
    main = as_function(program, logs)
    endings: set[Ending] = set()
    run = _Run(_Options(**options), observed=prune)
    footprints = Footprints(run.kernel)
    space = Pruned(footprints) if prune else Exhaustive()
    with footprints.watching() if prune else nullcontext():
        for number, schedule in enumerate(space, 1):
            error = run.run(main, schedule)
            endings.add((*map(tuple, logs), None if error is None else kind(error)))
            if number >= limit:
                return None
            if run.kernel._closed:  # a deadlock that even a cancellation could not end
                del error
                run = _Run(_Options(**options), observed=prune)
                footprints.serve(run.kernel)
                gc.collect()  # or else what is left of that run ends in the midst of another one
    return endings, number


_which = st.integers(0, 1)
_values = st.integers(0, 2)
ONE_OF_TWO = "lock unlock locked is_locked receive receive_nowait close buffered sleep"
ONE_OF_THREE = "tell update write join done cancel was_cancelled shield cancel_child"
ARGUMENTS: dict[str, tuple[st.SearchStrategy[int], ...]] = {
    **dict.fromkeys(ONE_OF_TWO.split(), (_which,)),
    **dict.fromkeys(ONE_OF_THREE.split(), (_values,)),
    **dict.fromkeys(("send", "send_nowait"), (_which, _values)),
}

SUBJECTS = (
    "lock unlock locked is_locked", "wait set is_set time_out nested gather", "take give value", "limited borrowed",
    "wait_for_change change", "park unpark", "meet", "send receive send_nowait receive_nowait close buffered",
    "listen tell", "watch update", "cancel was_cancelled shield step", "cancel_all cancel_child children start",
    "join done cancel_child", "race race_of_failures", "sleep time_out brief step", "write read step", "step fail",
)  # fmt: skip
"""What belongs together: operations of one subject are likely to meet."""


@st.composite
def programs(draw: st.DrawFn) -> list[list[Operation]]:
    """Two tasks with up to three operations each, or three with up to two, all of one or two subjects."""
    subjects = draw(st.lists(st.sampled_from(SUBJECTS), min_size=1, max_size=2, unique=True))
    names = sorted({name for subject in subjects for name in subject.split()})
    operations = st.one_of([st.tuples(st.just(name), *ARGUMENTS.get(name, ())) for name in names])
    tasks, most = draw(st.sampled_from([(2, 3), (3, 2), (3, 1)]))
    return [draw(st.lists(operations, min_size=1, max_size=most)) for _ in range(tasks)]
