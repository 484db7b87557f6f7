"""The task: what it says of itself, in every state, and where its stack is."""

from __future__ import annotations

import re
import threading
from collections.abc import AsyncIterator, Callable, Generator
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
from outcome import Error, Value

import kernel
from kernel.core.task import name_of
from kernel.lowlevel import Park, ParkingLot, Task, checkpoint, current_kernel, current_task, operation
from kernel.testing import MockClock, wait_all_tasks_blocked


async def sleeper() -> None:
    await kernel.sleep_forever()


def generator_sleeper() -> Generator[Any, Any, None]:
    yield from kernel.sleep_forever()


def look_at(async_fn: Callable[..., Any], look: Callable[[Task], None], *args: Any, **kwargs: Any) -> None:
    """Start `async_fn`, wait until it sleeps, look at its task, cancel it."""

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(async_fn, *args, **kwargs)
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            look(task)
            nursery.cancel_scope.cancel()

    kernel.run(main)


# ---- state and outcome --------------------------------------------------------------------------


def test_a_task_goes_from_ready_to_running_to_sleeping_to_ready_to_finished() -> None:
    log: list[str] = []
    lot = ParkingLot()

    async def child() -> str:
        log.append(current_task().state)
        await lot.park()
        return "result"

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            (task,) = nursery.child_tasks
            log.append(task.state)
            assert task.outcome is None
            await wait_all_tasks_blocked()
            log.append(task.state)
            assert task.trap is lot
            lot.unpark()
            log.append(task.state)
            assert task.trap is None
            assert task.outcome is None
        log.append(task.state)
        assert task.outcome == Value("result")

    kernel.run(main)
    assert log == ["ready", "running", "sleeping", "ready", "finished"]


def test_a_task_at_a_checkpoint_is_ready() -> None:
    async def child() -> None:
        await checkpoint()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)
            (task,) = nursery.child_tasks
            await checkpoint()
            assert task.state == "ready"
            assert task.trap is None

    kernel.run(main)


def test_a_task_that_failed_keeps_its_error_as_outcome() -> None:
    error = ValueError("mine")
    tasks: list[Task] = []

    async def child() -> None:
        tasks.append(current_task())
        raise error

    async def main() -> None:
        with pytest.raises(ExceptionGroup):
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(child)

    kernel.run(main)
    (task,) = tasks
    assert isinstance(task.outcome, Error)
    assert task.outcome.error is error
    assert task.state == "finished"
    for _ in range(2):  # each look builds a new one, so it can be unwrapped again
        assert task.outcome is not None
        with pytest.raises(ValueError, match="mine"):
            task.outcome.unwrap()


def test_a_task_that_was_cancelled_has_the_cancelled_as_outcome() -> None:
    tasks: list[Task] = []
    look_at(sleeper, tasks.append)
    outcome = tasks[0].outcome
    assert isinstance(outcome, Error)
    assert isinstance(outcome.error, kernel.Cancelled)


@pytest.mark.parametrize("value", [None, 0, "x", Value, Error])
def test_any_value_may_be_a_result(value: object) -> None:
    tasks: list[Task] = []

    async def child() -> object:
        tasks.append(current_task())
        return value

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child)

    kernel.run(main)
    assert tasks[0].outcome == Value(value)


# ---- attributes -----------------------------------------------------------------------------------


def test_a_task_knows_its_coroutine_its_nursery_and_where_it_hangs() -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(sleeper)
            (task,) = nursery.child_tasks
            assert task.coro.__name__ == "sleeper"
            assert task.parent_nursery is nursery
            assert task.eventual_parent_nursery is None
            assert nursery.parent_task is current_task()
            assert nursery in current_task().child_nurseries
            assert task.custom_sleep_data is None
            nursery.cancel_scope.cancel()

    kernel.run(main)


def test_every_task_but_the_root_has_a_parent() -> None:
    async def main() -> list[str]:
        names = []
        task = current_task()
        assert current_kernel().main_task is task
        while True:
            names.append(task.name)
            if task.parent_nursery is None:
                return names
            task = task.parent_nursery.parent_task

    (mine, root) = kernel.run(main)
    assert mine.endswith("main")
    assert root == "<root>"


def test_eventual_parent_nursery_is_set_while_a_child_is_being_started() -> None:
    async def child(*, task_status: Any) -> None:
        task = current_task()
        assert task.eventual_parent_nursery is nursery_of_main[0]
        assert task.parent_nursery is not nursery_of_main[0]
        task_status.started()
        assert task.eventual_parent_nursery is None
        assert task.parent_nursery is nursery_of_main[0]

    nursery_of_main: list[kernel.Nursery] = []

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery_of_main.append(nursery)
            await nursery.start(child)

    kernel.run(main)


def test_child_nurseries_are_listed_from_the_outermost_and_only_while_open() -> None:
    async def main() -> None:
        task = current_task()
        assert task.child_nurseries == []
        async with kernel.open_nursery() as one:
            assert task.child_nurseries == [one]
            with kernel.CancelScope():
                async with kernel.open_nursery() as two:
                    assert task.child_nurseries == [one, two]
                    two.start_soon(child, [one, two])
            assert task.child_nurseries == [one]
        assert task.child_nurseries == []

    async def child(parents: list[kernel.Nursery]) -> None:
        assert current_task().child_nurseries == []  # those of the parent are not its own
        async with kernel.open_nursery() as mine:
            assert current_task().child_nurseries == [mine]
            assert parents[1].parent_task.child_nurseries == parents

    kernel.run(main)


def test_custom_sleep_data_is_left_alone() -> None:
    async def main() -> None:
        current_task().custom_sleep_data = {"mine": 1}
        await checkpoint()
        await kernel.sleep(0)
        assert current_task().custom_sleep_data == {"mine": 1}

    kernel.run(main)


def test_tasks_are_compared_by_identity_and_can_be_weakly_referenced() -> None:
    import weakref

    async def main() -> None:
        task = current_task()
        assert len({task, task}) == 1
        assert weakref.ref(task)() is task

    kernel.run(main)


# ---- names ------------------------------------------------------------------------------------------


class Cook:
    async def cook(self) -> None:
        await kernel.sleep_forever()


@pytest.mark.parametrize(
    ("async_fn", "name", "expected"),
    [
        (sleeper, None, "sleeper"),
        (generator_sleeper, None, "generator_sleeper"),
        (Cook().cook, None, "Cook.cook"),
        (partial(sleeper), None, "sleeper"),
        (sleeper, "soup", "soup"),
        (sleeper, "", ""),
        (sleeper, Cook, "Cook"),
        (sleeper, partial(partial(Cook.cook)), "Cook.cook"),
        (sleeper, 42, "42"),
    ],
)
def test_a_task_is_named_by_what_it_was_given_or_by_its_function(async_fn: Any, name: object, expected: str) -> None:
    seen: list[str] = []
    look_at(async_fn, lambda task: seen.append(task.name), name=name)
    assert seen == [expected]


def test_the_name_can_be_changed() -> None:
    def look(task: Task) -> None:
        task.name = "noodles"
        assert task.name == "noodles"
        assert "'noodles'" in repr(task)

    look_at(sleeper, look)


def test_name_of_says_something_about_everything() -> None:
    assert name_of("as it is") == "as it is"
    assert name_of(len) == "len"
    assert name_of(partial(partial(len))) == "len"
    assert name_of(42) == "42"
    assert name_of(Cook.cook) == "Cook.cook"


# ---- repr -----------------------------------------------------------------------------------------------


def test_the_repr_shows_name_and_state() -> None:
    log: list[str] = []
    lot = ParkingLot("the noodles")

    async def child() -> None:
        log.append(repr(current_task()))
        await lot.park()

    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child, name="it")
            (task,) = nursery.child_tasks
            log.append(repr(task))
            await wait_all_tasks_blocked()
            log.append(repr(task))
            lot.unpark()
        log.append(repr(task))

    kernel.run(main)
    bare = [re.sub(r"0x[0-9a-f]+", "0x", text) for text in log]
    assert bare == [
        "<Task 'it' at 0x, ready>",
        "<Task 'it' at 0x, running>",
        "<Task 'it' at 0x, sleeping on <ParkingLot of the noodles, 1 waiting>>",
        "<Task 'it' at 0x, finished>",
    ]


def test_the_repr_of_a_task_works_when_no_kernel_runs() -> None:
    tasks: list[Task] = []
    look_at(sleeper, tasks.append)
    assert repr(tasks[0]).endswith(", finished>")


# ---- the stack ------------------------------------------------------------------------------------------


def stack_of(async_fn: Callable[..., Any]) -> list[str]:
    """The functions on the stack of a sleeping task, and a check that the line numbers are those of the frames."""
    seen: list[str] = []

    def look(task: Task) -> None:
        for frame, line in task.iter_await_frames():
            assert line == frame.f_lineno
            seen.append(frame.f_code.co_name)

    look_at(async_fn, look)
    return seen


async def inner() -> None:
    await kernel.sleep_forever()


def inner_generator() -> Generator[Any, Any, None]:
    yield from kernel.sleep_forever()


@operation
def inner_operation() -> Generator[Any, Any, None]:
    yield from inner_generator()


async def inner_async_generator() -> AsyncIterator[int]:
    yield 1
    await inner()
    yield 2


class AwaitableByGenerator:
    def __await__(self) -> Generator[Any, Any, None]:
        yield from inner_generator()


class AwaitableByCoroutine:
    def __await__(self) -> Generator[Any, Any, None]:
        return inner().__await__()


class AwaitableByCStuff:
    """Something without a frame, as objects written in C are."""

    class Steps:
        def __iter__(self) -> Any:
            return self

        def __next__(self) -> object:
            return Park("something")

        def throw(self, error: BaseException) -> None:
            raise error

    def __await__(self) -> Any:
        return self.Steps()


async def through_coroutines() -> None:
    await inner()


async def through_an_operation() -> None:
    await inner_operation()


def through_generators() -> Generator[Any, Any, None]:
    yield from inner_generator()


async def through_an_async_generator() -> None:
    async for _ in inner_async_generator():
        pass


async def through_asend() -> None:
    agen: Any = inner_async_generator()
    await agen.asend(None)
    await agen.asend(inner_async_generator())  # an argument is not a part of the stack


async def through_athrow() -> None:
    agen = thrown_into()
    await agen.__anext__()
    await agen.athrow(KeyError)  # type: ignore[attr-defined]


async def thrown_into() -> AsyncIterator[int]:
    try:
        yield 1
    except KeyError:
        await inner()


async def through_await_of_a_generator() -> None:
    await AwaitableByGenerator()


async def through_await_of_a_coroutine() -> None:
    await AwaitableByCoroutine()


def through_await_in_a_generator() -> Generator[Any, Any, None]:
    yield from inner().__await__()


async def through_c() -> None:
    await AwaitableByCStuff()


async def through_a_nursery() -> None:
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(inner)


@pytest.mark.parametrize(
    ("async_fn", "expected"),
    [
        (through_coroutines, ["inner", "sleep_forever"]),
        (through_an_operation, ["inner_operation", "inner_generator", "sleep_forever"]),
        (through_generators, ["inner_generator", "sleep_forever"]),
        (through_an_async_generator, ["inner_async_generator", "inner", "sleep_forever"]),
        (through_asend, ["inner_async_generator", "inner", "sleep_forever"]),
        (through_athrow, ["thrown_into", "inner", "sleep_forever"]),
        (through_await_of_a_generator, ["__await__", "inner_generator", "sleep_forever"]),
        (through_await_of_a_coroutine, ["inner", "sleep_forever"]),
        (through_await_in_a_generator, ["inner", "sleep_forever"]),
        (through_c, []),
        (through_a_nursery, ["_close"]),
    ],
)
def test_the_stack_of_a_sleeping_task_is_followed_to_where_it_traps(async_fn: Any, expected: list[str]) -> None:
    assert stack_of(async_fn) == [async_fn.__name__, *expected]


def test_the_stack_of_a_task_that_has_not_begun_or_has_ended() -> None:
    async def main() -> None:
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(inner)
            (task,) = nursery.child_tasks
            assert [frame.f_code.co_name for frame, _ in task.iter_await_frames()] == ["inner"]
            nursery.cancel_scope.cancel()
        assert list(task.iter_await_frames()) == []

    kernel.run(main)


def test_a_line_number_of_the_stack_is_that_of_the_await() -> None:
    lines: list[int] = []
    look_at(through_coroutines, lambda task: lines.extend(line for _, line in task.iter_await_frames()))
    assert lines[0] == through_coroutines.__code__.co_firstlineno + 1


# ---- context variables -----------------------------------------------------------------------------------

var: ContextVar[str] = ContextVar("var", default="default")


def test_each_task_has_a_copy_of_its_spawners_context_made_when_it_was_started() -> None:
    seen: dict[str, str] = {}

    async def child(name: str) -> None:
        before = var.get()
        var.set(name)
        await checkpoint()
        seen[name] = f"{before}, then {var.get()}"

    async def main() -> None:
        var.set("first")
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(child, "a")
            var.set("second")
            nursery.start_soon(child, "b")
            var.set("third")
            await wait_all_tasks_blocked()
        assert var.get() == "third"

    kernel.run(main)
    assert seen == {"a": "first, then a", "b": "second, then b"}
    assert var.get() == "default"


def test_a_tasks_context_can_be_looked_into_from_outside() -> None:
    async def child() -> None:
        var.set("in the child")
        await kernel.sleep_forever()

    look_at(child, lambda task: seen.append(task.context[var]))
    assert seen.pop() == "in the child"


seen: list[str] = []


def test_a_generator_task_has_its_context_too() -> None:
    def main() -> Generator[Any, Any, str]:
        var.set("mine")
        yield from checkpoint()
        return var.get()

    assert kernel.run(main) == "mine"
    assert var.get() == "default"


# ---- who is running ---------------------------------------------------------------------------------------


def test_current_task_outside_the_kernel_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"^current_task\(\) was used outside the kernel"):
        current_task()
    with pytest.raises(RuntimeError, match=r"^this function was used outside the kernel"):
        current_kernel()


def test_current_task_between_steps_is_an_error_that_says_so() -> None:
    errors: list[BaseException] = []

    class Curious(kernel.lowlevel.SleepUntil):
        def expire(self, kernel: Any) -> None:
            try:
                current_task()
            except RuntimeError as error:
                errors.append(error)
            super().expire(kernel)

    async def main() -> None:
        await Curious(10)

    kernel.run(main, clock=MockClock(autojump_threshold=0))
    assert re.match(r"current_task\(\) was .*outside any", str(errors[0]))


def test_another_thread_does_not_see_the_kernel() -> None:
    errors: list[BaseException] = []

    def thread() -> None:
        try:
            current_kernel("the thread")
        except RuntimeError as error:
            errors.append(error)

    async def main() -> None:
        one = threading.Thread(target=thread)
        one.start()
        one.join(30)

    kernel.run(main)
    assert "the thread was used outside the kernel" in str(errors[0])
