"""Nurseries: children are joined, errors arrive, cancellation goes where it belongs; `start()`; what misuse does."""

from __future__ import annotations

import asyncio
import gc
import re
import signal
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import AsyncExitStack
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest

import kernel
from kernel import (
    TASK_STATUS_IGNORED,
    Cancelled,
    CancelScope,
    Nursery,
    TaskStatus,
    current_effective_deadline,
    current_time,
    fail_after,
    move_on_after,
    move_on_at,
    open_nursery,
    sleep,
    sleep_forever,
    within,
)
from kernel.lowlevel import (
    Kernel,
    ParkingLot,
    cancel_shielded_checkpoint,
    checkpoint,
    current_kernel,
    current_task,
)
from kernel.testing import MockClock, wait_all_tasks_blocked

Run = Callable[..., Any]
Status = TaskStatus[Any]


async def fail_with(error: BaseException, after: float = 0) -> None:
    await sleep(after)
    raise error


async def fail_at_once(error_type: type[BaseException]) -> None:
    raise error_type


async def kernel_lives_on() -> None:
    """After a misuse: scopes, deadlines and nurseries still do what they should."""
    with move_on_after(1) as scope:
        async with open_nursery() as nursery:
            nursery.start_soon(sleep_forever)
    assert scope.cancelled_caught
    await checkpoint()


def leaves(error: BaseException) -> list[BaseException]:
    """The errors in a group, groups within groups taken apart."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for exc in error.exceptions for leaf in leaves(exc)]


# ---- the block ----------------------------------------------------------------------------------


def test_the_block_ends_when_its_body_and_all_its_children_have_ended(virtual: Run) -> None:
    log = []

    async def child(seconds: float) -> None:
        await sleep(seconds)
        log.append(seconds)

    async def main() -> None:
        async with open_nursery() as nursery:
            for seconds in (3, 1, 2):
                nursery.start_soon(child, seconds)
            log.append(0)
        log.append(4)

    virtual(main)
    assert log == [0, 1, 2, 3, 4]


def test_children_started_by_children_are_waited_for(virtual: Run) -> None:
    log = []

    async def child(nursery: Nursery, number: int) -> None:
        log.append(number)
        if number < 3:
            nursery.start_soon(child, nursery, number + 1)

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(child, nursery, 1)
        log.append("end")

    virtual(main)
    assert log == [1, 2, 3, "end"]


def test_a_nursery_accepts_children_while_its_parent_waits(virtual: Run) -> None:
    log = []

    async def late() -> None:
        log.append("late")

    async def outsider(nursery: Nursery) -> None:
        await sleep(1)
        nursery.start_soon(late)

    async def main() -> None:
        async with open_nursery() as outer:
            async with open_nursery() as nursery:
                nursery.start_soon(sleep, 2)
                outer.start_soon(outsider, nursery)
            log.append("end")

    virtual(main)
    assert log == ["late", "end"]


def test_entering_is_no_checkpoint_and_leaving_is_no_cancel_point(virtual: Run) -> None:
    """trio#1457: a nursery does not make up a `Cancelled` that nobody received."""
    log = []

    async def other() -> None:
        log.append("other")

    async def main() -> None:
        async with open_nursery() as outer:
            outer.start_soon(other)
            with CancelScope() as scope:
                scope.cancel()
                async with open_nursery():
                    pass
                log.append("left")
            assert not scope.cancelled_caught

    virtual(main)
    assert log == ["left", "other"]


def test_a_join_of_children_that_end_well_in_a_cancelled_scope_raises_nothing(virtual: Run) -> None:
    """trio#1457"""
    log = []

    async def child() -> None:
        with CancelScope(shield=True):
            await sleep(1)

    async def main() -> None:
        with CancelScope() as scope:
            async with open_nursery() as nursery:
                nursery.start_soon(child)
                scope.cancel()
            log.append("after the nursery")
            await checkpoint()
            log.append("not reached")
        assert scope.cancelled_caught
        assert current_time() == 1

    virtual(main)
    assert log == ["after the nursery"]


def test_a_task_that_only_opens_empty_nurseries_lets_the_others_run_in_the_end(virtual: Run) -> None:
    log = []

    async def other() -> None:
        log.append("other")

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(1000):
                async with open_nursery():
                    pass
            log.append("main")

    virtual(main)
    assert log == ["other", "main"]


def test_the_budget_checkpoint_of_an_empty_nursery_is_no_cancel_point(virtual: Run) -> None:
    async def main() -> None:
        with CancelScope() as scope:
            scope.cancel()
            for _ in range(1000):
                async with open_nursery():
                    pass
        assert not scope.cancelled_caught

    virtual(main)


def test_nobody_can_come_in_while_an_empty_nursery_lets_the_others_run(virtual: Run) -> None:
    """Its body has ended and there is nobody to wait for: who came now would outlive the block."""
    log = []

    async def intruder(latest: list[Nursery]) -> None:
        try:
            latest[0].start_soon(sleep, 5)
            log.append("came in")
        except RuntimeError:
            log.append("refused")

    async def main() -> None:
        async with open_nursery() as outer:
            latest = [outer]
            await checkpoint()
            outer.start_soon(intruder, latest)
            for _ in range(1000):
                async with open_nursery() as latest[0]:
                    pass
                assert not latest[0].child_tasks

    virtual(main)
    assert log == ["refused"]


def test_nobody_can_come_in_between_the_last_childs_end_and_the_parents_return(virtual: Run) -> None:
    log = []

    async def bystander(lot: ParkingLot, nursery: Nursery) -> None:
        await lot.park()
        with pytest.raises(RuntimeError, match="the nursery is closed"):
            nursery.start_soon(sleep, 5)
        log.append("refused")

    async def last_child(lot: ParkingLot) -> None:
        await wait_all_tasks_blocked()
        lot.unpark()  # runs after this child has ended, and before the parent

    async def main() -> None:
        lot = ParkingLot()
        async with open_nursery() as outer:
            async with open_nursery() as nursery:
                outer.start_soon(bystander, lot, nursery)
                nursery.start_soon(last_child, lot)
            log.append("parent")

    virtual(main)
    assert log == ["refused", "parent"]


# ---- what a nursery shows -----------------------------------------------------------------------


def test_a_nursery_shows_its_parent_its_children_and_its_scope(virtual: Run) -> None:
    async def child(nursery: Nursery) -> None:
        assert current_task() in nursery.child_tasks
        assert current_task().parent_nursery is nursery
        assert current_task().eventual_parent_nursery is None

    async def main() -> None:
        async with open_nursery() as nursery:
            assert nursery.parent_task is current_task()
            assert nursery.child_tasks == frozenset()
            assert isinstance(nursery.cancel_scope, CancelScope)
            assert current_task().child_nurseries == [nursery]
            nursery.start_soon(child, nursery)
            assert isinstance(nursery.child_tasks, frozenset)
            assert len(nursery.child_tasks) == 1
        assert nursery.child_tasks == frozenset()
        assert current_task().child_nurseries == []

    virtual(main)


def test_repr_says_whose_nursery_it_is_its_state_and_how_many_children(virtual: Run) -> None:
    async def parent() -> None:
        nursery = open_nursery()
        at = f"<Nursery of 'house' at {id(nursery):#x}, "
        assert repr(nursery) == f"{at}new, 0 children>"
        async with nursery:
            nursery.start_soon(checkpoint)
            assert repr(nursery) == f"{at}open, 1 children>"
        assert repr(nursery) == f"{at}closed, 0 children>"

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(parent, name="house")

    virtual(main)


def test_a_joining_parent_says_what_it_waits_for(virtual: Run) -> None:
    async def child() -> None:
        parent = current_task().parent_nursery
        assert parent is not None
        assert repr(parent.parent_task.trap).startswith(f"<Join of <Nursery of {parent.parent_task.name!r}")

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(child)

    virtual(main)


def test_children_start_in_the_order_of_start_soon_and_not_before_it_returns(virtual: Run) -> None:
    log = []

    async def child(number: int) -> None:
        log.append(number)

    async def main() -> None:
        async with open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(child, number)
            log.append("body")

    virtual(main)
    assert log == ["body", 0, 1, 2, 3, 4]


@pytest.mark.parametrize("how", ["start_soon", "start"])
def test_names_come_from_the_function_unless_given(virtual: Run, how: str) -> None:
    names = []

    async def plumber(*args: object, task_status: Any = TASK_STATUS_IGNORED) -> None:
        names.append(current_task().name)
        task_status.started()

    async def main() -> None:
        async with open_nursery() as nursery:
            for function, name in (
                (plumber, None), (partial(plumber, 1), None), (plumber, "mario"), (plumber, fail_with)
            ):  # fmt: skip
                if how == "start":
                    await nursery.start(function, name=name)
                else:
                    nursery.start_soon(function, name=name)
                    await checkpoint()

    virtual(main)
    own = f"{test_names_come_from_the_function_unless_given.__name__}.<locals>.plumber"
    assert names == [own, own, "mario", "fail_with"]


@pytest.mark.parametrize("how", ["start_soon", "start"])
def test_a_child_gets_a_copy_of_the_context_in_which_it_was_started(virtual: Run, how: str) -> None:
    var: ContextVar[str] = ContextVar("var", default="unset")
    log = []

    async def child(task_status: Any = TASK_STATUS_IGNORED) -> None:
        log.append(var.get())
        var.set("child")
        task_status.started()

    async def main() -> None:
        var.set("opened")
        async with open_nursery() as nursery:
            var.set("started")
            if how == "start":
                await nursery.start(child)
            else:
                nursery.start_soon(child)
                var.set("too late")
                await checkpoint()
                var.set("started")
            log.append(var.get())

    virtual(main)
    assert log == ["started", "started"]


# ---- what can be started, and what the error says otherwise -------------------------------------


async def _good() -> None:
    """For the names in messages."""


def _plain() -> int:
    return 7


async def _stream() -> AsyncGenerator[int, None]:
    yield 1


def _generator() -> Generator[Any, Any, None]:
    yield from checkpoint()


def _refused(nursery: Nursery, given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        nursery.start_soon(given)
    assert not nursery.child_tasks


@pytest.mark.parametrize("make", [_good, _generator], ids=["coroutine", "generator"])
def test_a_call_instead_of_a_function_is_refused_with_the_cure(virtual: Run, make: Callable[[], Any]) -> None:
    name = make.__name__

    async def main() -> None:
        async with open_nursery() as nursery:
            _refused(
                nursery,
                make(),
                rf"nursery\.start_soon wants the function, .* Write nursery\.start_soon\({name}, \.\.\.\), not "
                rf"nursery\.start_soon\({name}\(\.\.\.\)\)",
            )

    virtual(main)


def test_a_plain_function_is_refused_with_the_cure(virtual: Run) -> None:
    async def main() -> None:
        async with open_nursery() as nursery:
            _refused(
                nursery, _plain, r"_plain is a plain one: it has run already and returned 7\. Write `async def _plain`"
            )

    virtual(main)


def test_an_async_generator_function_is_refused_with_the_cure(virtual: Run) -> None:
    async def main() -> None:
        async with open_nursery() as nursery:
            _refused(nursery, _stream, r"_stream is an async generator: it contains `yield`.*async for item in _stream")

    virtual(main)


def test_a_future_of_asyncio_is_refused_with_the_cure(virtual: Run) -> None:
    loop = asyncio.new_event_loop()
    future = loop.create_future()

    def fetch() -> Any:
        return future

    async def main() -> None:
        async with open_nursery() as nursery:
            _refused(
                nursery, fetch, r"fetch returned <Future.*a future of asyncio, which only asyncio can wait for\. Use"
            )
            _refused(nursery, future, r"nursery\.start_soon wants an async function, not <Future")

    try:
        virtual(main)
    finally:
        loop.close()


@pytest.mark.parametrize("given", [None, 5, "function"])
def test_what_cannot_be_called_is_refused(virtual: Run, given: Any) -> None:
    async def main() -> None:
        async with open_nursery() as nursery:
            _refused(nursery, given, rf"nursery\.start_soon wants an async function, not {given!r}")

    virtual(main)


def test_a_type_error_of_the_function_itself_comes_through(virtual: Run) -> None:
    async def main() -> None:
        async with open_nursery() as nursery:
            with pytest.raises(TypeError, match=r"_good\(\) takes 0 positional arguments but 1 was given"):
                nursery.start_soon(_good, 1)

    virtual(main)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: _good(), r"nursery\.start wants the function, .* Write nursery\.start\(_good, \.\.\.\)"),
        (lambda: None, r"nursery\.start wants an async function, not None"),
        (
            lambda: lambda task_status: 7,
            r"nursery\.start wants an async function, but .*<lambda> is a plain one.*returned 7",
        ),
        (
            lambda: lambda task_status: _stream(),
            r"nursery\.start wants an async function, but .* is an async generator",
        ),
    ],
    ids=["coroutine", "nothing", "plain", "async generator"],
)
def test_start_refuses_the_same_with_the_same_cure(virtual: Run, given: Callable[[], Any], message: str) -> None:
    async def main() -> None:
        async with open_nursery() as nursery:
            with pytest.raises(TypeError, match=message):
                await nursery.start(given())
            assert not nursery.child_tasks
            assert not nursery.cancel_scope.cancel_called
        await kernel_lives_on()

    virtual(main)


def test_start_of_a_function_without_task_status_is_a_type_error(virtual: Run) -> None:
    async def main() -> None:
        async with open_nursery() as nursery:
            with pytest.raises(TypeError, match="task_status"):
                await nursery.start(_good)

    virtual(main)


def test_awaitable_objects_and_callables_of_all_kinds_can_be_started(virtual: Run) -> None:
    log = []

    class Waiting:
        def __await__(self) -> Iterator[Any]:
            log.append("awaitable")
            yield from checkpoint()

    class Callable_:
        async def __call__(self, word: str) -> None:
            log.append(word)

        async def method(self) -> None:
            log.append("method")

    async def words(*args: str) -> None:
        log.extend(args)

    def generator() -> Generator[Any, Any, None]:
        yield from checkpoint()
        log.append("generator")

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(Waiting)
            nursery.start_soon(Callable_(), "object")
            nursery.start_soon(Callable_().method)
            nursery.start_soon(partial(words, "partial"), "args")
            nursery.start_soon(lambda: words("lambda"))
            nursery.start_soon(generator)
            nursery.start_soon(checkpoint)

    virtual(main)
    assert log == ["awaitable", "object", "method", "partial", "args", "lambda", "generator"]


@pytest.mark.parametrize("how", ["start_soon", "start"])
def test_a_closed_nursery_refuses_children_with_the_cure(virtual: Run, how: str) -> None:
    async def main() -> None:
        async with open_nursery() as nursery:
            pass
        with pytest.raises(
            RuntimeError, match=r"_good cannot be started: the nursery is closed\..*Open the nursery in a"
        ):
            if how == "start":
                await nursery.start(_good)
            else:
                nursery.start_soon(_good)
        assert not nursery.child_tasks

    virtual(main)


@pytest.mark.parametrize("how", ["start_soon", "start"])
def test_an_unopened_nursery_refuses_children_with_the_cure(virtual: Run, how: str) -> None:
    async def main() -> None:
        nursery = open_nursery()
        with pytest.raises(RuntimeError, match="not open yet: write `async with open_nursery"):
            if how == "start":
                await nursery.start(_good)
            else:
                nursery.start_soon(_good)
        assert not nursery.child_tasks

    virtual(main)


def test_another_thread_cannot_start_children(virtual: Run) -> None:
    errors: list[BaseException] = []

    def in_thread(nursery: Nursery) -> None:
        try:
            nursery.start_soon(_good)
        except BaseException as exc:
            errors.append(exc)

    async def main() -> None:
        async with open_nursery() as nursery:
            thread = threading.Thread(target=in_thread, args=(nursery,))
            thread.start()
            thread.join()
            assert not nursery.child_tasks

    virtual(main)
    (error,) = errors
    assert isinstance(error, RuntimeError)
    assert "outside its kernel's thread" in str(error)


def test_a_nursery_of_a_run_that_has_ended_refuses_children(virtual: Run) -> None:
    async def main() -> Nursery:
        async with open_nursery() as nursery:
            return nursery

    nursery = virtual(main)
    with pytest.raises(RuntimeError, match="after its run had ended"):
        nursery.start_soon(_good)


# ---- errors ---------------------------------------------------------------------------------------


def test_a_failing_child_cancels_its_siblings_and_the_body(virtual: Run) -> None:
    log = []
    error = ZeroDivisionError()

    async def sleeper() -> None:
        try:
            await sleep_forever()
        finally:
            log.append("sibling")

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with open_nursery() as nursery:
                nursery.start_soon(sleeper)
                nursery.start_soon(fail_with, error, 1, name="failing")
                try:
                    await sleep_forever()
                except Cancelled as exc:
                    log.append(exc.source)
                    log.append(str(exc.source_task).partition(" at ")[0])
                    raise
        assert caught.value.exceptions == (error,)
        assert caught.value.message.startswith("in a nursery of")
        assert nursery.cancel_scope.cancel_called
        await checkpoint()

    virtual(main)
    assert log == ["nursery", "<Task 'failing'", "sibling"]


def test_a_failing_body_cancels_the_children_and_arrives_in_a_group(virtual: Run) -> None:
    log = []
    error = ZeroDivisionError()

    async def child() -> None:
        try:
            await sleep_forever()
        except Cancelled as exc:
            log.append((exc.source, exc.reason))
            raise

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with open_nursery() as nursery:
                nursery.start_soon(child)
                await checkpoint()
                raise error
        assert caught.value.exceptions == (error,)

    virtual(main)
    assert log == [("nursery", "it ended with ZeroDivisionError")]


def test_a_single_error_comes_in_a_group_too(virtual: Run) -> None:
    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with open_nursery():
                raise KeyError
        assert [type(exc) for exc in caught.value.exceptions] == [KeyError]

    virtual(main)


def test_errors_arrive_in_the_order_in_which_they_happened(virtual: Run) -> None:
    errors = [KeyError(1), KeyError(2), KeyError(3), KeyError(4)]

    async def at_cleanup(error: BaseException, after: float) -> None:
        try:
            await sleep_forever()
        finally:
            with CancelScope(shield=True):
                await fail_with(error, after)

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with open_nursery() as nursery:
                nursery.start_soon(at_cleanup, errors[3], 3)
                nursery.start_soon(at_cleanup, errors[2], 2)
                nursery.start_soon(fail_with, errors[0], 1)
                try:
                    await sleep_forever()
                finally:
                    raise errors[1]
        assert caught.value.exceptions == tuple(errors)

    virtual(main)


def test_an_error_that_is_no_exception_makes_a_base_exception_group(virtual: Run) -> None:
    async def main() -> None:
        with pytest.raises(BaseExceptionGroup) as caught:
            async with open_nursery() as nursery:
                nursery.start_soon(fail_at_once, SystemExit)
                nursery.start_soon(fail_at_once, KeyError)
        assert not isinstance(caught.value, ExceptionGroup)
        assert [type(exc) for exc in caught.value.exceptions] == [SystemExit, KeyError]

    virtual(main)


def test_nested_nurseries_nest_their_groups(virtual: Run) -> None:
    error = ZeroDivisionError()

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with open_nursery(), open_nursery() as inner:
                inner.start_soon(fail_with, error)
        (group,) = caught.value.exceptions
        assert isinstance(group, ExceptionGroup)
        assert group.exceptions == (error,)

    virtual(main)


def test_errors_keep_their_cause_context_and_traceback(virtual: Run) -> None:
    cause, context = KeyError("cause"), KeyError("context")

    async def child() -> None:
        try:
            raise context
        except KeyError:
            raise ZeroDivisionError from cause

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with open_nursery() as nursery:
                nursery.start_soon(child)
        (error,) = caught.value.exceptions
        assert error.__cause__ is cause
        assert error.__context__ is context
        assert [name for _, name in frames(error)] == ["child"]
        assert caught.value.__context__ is None
        assert caught.value.__cause__ is None

    virtual(main)


def test_the_group_of_a_failing_body_has_no_context(virtual: Run) -> None:
    """The body's error is in it; to be its context too would print it twice."""

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with open_nursery():
                raise ZeroDivisionError
        assert caught.value.__context__ is None

    virtual(main)


def test_the_outermost_frame_of_a_group_is_where_the_nursery_was_left(virtual: Run) -> None:
    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with open_nursery() as nursery:
                nursery.start_soon(fail_with, ZeroDivisionError())
        assert frames(caught.value)[0] == (__file__, "main")

    virtual(main)


# ---- Cancelled and errors ---------------------------------------------------------------------------


def test_cancelled_is_filtered_out_of_the_errors(virtual: Run) -> None:
    """anyio#634"""

    async def main() -> None:
        with CancelScope() as outer:
            with pytest.raises(ExceptionGroup) as caught:
                async with open_nursery() as nursery:
                    nursery.start_soon(sleep_forever)
                    nursery.start_soon(sleep_forever)
                    nursery.start_soon(_error_at_cleanup, KeyError())
                    await wait_all_tasks_blocked()
                    outer.cancel()
            assert [type(exc) for exc in caught.value.exceptions] == [KeyError]
            assert caught.value.subgroup(Cancelled) is None
            outer_still_cancelled = False
            try:
                await checkpoint()
            except Cancelled:
                outer_still_cancelled = True
                raise
        assert outer_still_cancelled

    virtual(main)


async def _error_at_cleanup(error: BaseException) -> None:
    try:
        await sleep_forever()
    finally:
        raise error


def test_cancelled_never_replaces_the_error_of_the_body_while_the_nursery_is_left(virtual: Run) -> None:
    """trio#455, trio#746, trio#1559"""
    error = ZeroDivisionError()

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught, CancelScope() as outer:
            async with open_nursery() as nursery:
                nursery.start_soon(sleep_forever)
                await wait_all_tasks_blocked()
                outer.cancel()
                raise error
        assert caught.value.exceptions == (error,)
        assert error.__context__ is None
        assert not outer.cancelled_caught

    virtual(main)


def test_an_outer_deadline_that_passes_during_the_join_does_not_replace_the_error(virtual: Run) -> None:
    """trio#1559"""
    error = ZeroDivisionError()

    async def child() -> None:
        with CancelScope(shield=True):
            await sleep(5)
        await checkpoint()

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught, move_on_after(1):
            async with open_nursery() as nursery:
                nursery.start_soon(child)
                await checkpoint()
                raise error
        assert caught.value.exceptions == (error,)
        assert current_time() == 5

    virtual(main)


@pytest.mark.parametrize("who", ["body", "child", "both"])
def test_nothing_but_cancelled_goes_up_as_one_bare_cancelled_to_its_scope(virtual: Run, who: str) -> None:
    async def main() -> None:
        seen: list[BaseException] = []
        with CancelScope() as outer:
            try:
                async with open_nursery() as nursery:
                    if who != "body":
                        nursery.start_soon(sleep_forever)
                        nursery.start_soon(sleep_forever)
                    await wait_all_tasks_blocked()
                    outer.cancel("leave")
                    if who != "child":
                        await checkpoint()
            except BaseException as exc:
                seen.append(exc)
                raise
        assert outer.cancelled_caught
        assert not nursery.cancel_scope.cancelled_caught
        (exc,) = seen
        assert isinstance(exc, Cancelled)
        assert exc.reason == "leave"

    virtual(main)


def test_the_bodys_own_cancelled_goes_on_as_it_is_though_a_childs_came_first(virtual: Run) -> None:
    async def main() -> None:
        raised: list[BaseException] = []
        seen: list[BaseException] = []
        with CancelScope() as outer:
            try:
                async with open_nursery() as nursery:
                    nursery.start_soon(sleep_forever)
                    await wait_all_tasks_blocked()
                    outer.cancel()
                    await cancel_shielded_checkpoint()
                    assert not nursery.child_tasks
                    try:
                        await checkpoint()
                    except Cancelled as exc:
                        raised.append(exc)
                        raise
            except Cancelled as exc:
                seen.append(exc)
                raise
        assert seen == raised

    virtual(main)


def test_of_several_childrens_cancelled_the_first_goes_on(virtual: Run) -> None:
    async def child(raised: list[BaseException]) -> None:
        try:
            await sleep_forever()
        except Cancelled as exc:
            raised.append(exc)
            raise

    async def main() -> None:
        raised: list[BaseException] = []
        seen: list[BaseException] = []
        with CancelScope() as outer:
            try:
                async with open_nursery() as nursery:
                    for _ in range(3):
                        nursery.start_soon(child, raised)
                    await wait_all_tasks_blocked()
                    outer.cancel()
            except Cancelled as exc:
                seen.append(exc)
                raise
        assert len(raised) == 3
        assert seen == raised[:1]

    virtual(main)


def test_cancelling_the_nursery_itself_ends_its_block_quietly(virtual: Run) -> None:
    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(sleep_forever)
            nursery.cancel_scope.cancel()
            await sleep_forever()
        assert nursery.cancel_scope.cancelled_caught
        await checkpoint()

    virtual(main)


def test_a_nursery_and_its_parent_both_cancelled_the_outer_cancel_is_still_seen(virtual: Run) -> None:
    """trio#3291; py#116720, py#155433"""
    log = []

    async def main() -> None:
        with CancelScope() as outer:
            async with open_nursery() as nursery:
                nursery.start_soon(sleep_forever)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
                outer.cancel()
            log.append("the children's Cancelled is the outer scope's")
        assert log == []
        assert outer.cancelled_caught
        assert not nursery.cancel_scope.cancelled_caught

    virtual(main)


def test_an_outer_cancel_during_the_cleanup_of_a_failed_nursery_is_still_seen_after_its_error(virtual: Run) -> None:
    """py#116720"""

    async def cleaning_up() -> None:
        try:
            await sleep_forever()
        finally:
            with CancelScope(shield=True):
                await sleep(2)

    async def main() -> None:
        with move_on_after(1) as outer:
            with pytest.raises(ExceptionGroup):
                async with open_nursery() as nursery:
                    nursery.start_soon(cleaning_up)
                    nursery.start_soon(fail_with, KeyError())
            await checkpoint()
            raise AssertionError("unreachable: the outer scope is cancelled")
        assert outer.cancelled_caught

    virtual(main)


def test_a_body_that_swallows_the_cancel_before_a_child_fails_leaves_a_clean_state(virtual: Run) -> None:
    """py#95289"""
    error = ZeroDivisionError()

    async def main() -> None:
        with CancelScope() as outer:
            with pytest.raises(ExceptionGroup) as caught:
                async with open_nursery() as nursery:
                    nursery.start_soon(_error_at_cleanup, error)
                    await checkpoint()
                    nursery.cancel_scope.cancel()
                    try:
                        await sleep_forever()
                    except Cancelled:
                        pass
            assert caught.value.exceptions == (error,)
            assert nursery.cancel_scope.cancel_called
            await checkpoint()
        assert not outer.cancel_called
        await kernel_lives_on()

    virtual(main)


def test_a_child_that_cancels_its_group_in_its_first_step_ends_it(virtual: Run) -> None:
    """py#128588, py#155418: no hang and no leak."""
    log = []

    async def first(nursery: Nursery) -> None:
        log.append("first")
        nursery.cancel_scope.cancel()

    async def second() -> None:
        log.append("second")
        await checkpoint()
        log.append("not reached")

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(first, nursery)
            nursery.start_soon(second)
        assert not nursery.child_tasks
        assert nursery.cancel_scope.cancelled_caught

    virtual(main)
    assert log == ["first", "second"]


def test_a_child_started_in_a_cancelled_nursery_runs_to_its_first_cancel_point(virtual: Run) -> None:
    """py#155418"""
    log = []

    async def child() -> None:
        log.append("started")
        await checkpoint()
        log.append("not reached")

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.cancel_scope.cancel()
            nursery.start_soon(child)

    virtual(main)
    assert log == ["started"]


def test_a_user_made_group_with_cancelled_from_a_child_is_split_by_the_scope_it_belongs_to(virtual: Run) -> None:
    """anyio#634"""
    error = ZeroDivisionError()

    async def child() -> None:
        try:
            await sleep_forever()
        except Cancelled as exc:
            raise BaseExceptionGroup("mine", [exc, error]) from None

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught, CancelScope() as outer:
            async with open_nursery() as nursery:
                nursery.start_soon(child)
                await wait_all_tasks_blocked()
                outer.cancel()
        assert leaves(caught.value) == [error]
        assert outer.cancelled_caught

    virtual(main)


def test_a_user_made_group_of_nothing_but_cancelled_is_swallowed(virtual: Run) -> None:
    async def child() -> None:
        try:
            await sleep_forever()
        except Cancelled as exc:
            raise BaseExceptionGroup("mine", [exc]) from None

    async def main() -> None:
        with CancelScope() as outer:
            async with open_nursery() as nursery:
                nursery.start_soon(child)
                await wait_all_tasks_blocked()
                outer.cancel()
        assert outer.cancelled_caught

    virtual(main)


def test_except_star_around_a_nursery_picks_errors_and_the_rest_goes_on(virtual: Run) -> None:
    """anyio#1091"""
    log = []

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            try:
                async with open_nursery() as nursery:
                    nursery.start_soon(fail_at_once, KeyError)
                    nursery.start_soon(fail_at_once, ValueError)
                    nursery.start_soon(sleep_forever)
            except* KeyError as group:
                log.append(len(group.exceptions))
        assert [type(exc) for exc in leaves(caught.value)] == [ValueError]

    virtual(main)
    assert log == [1]


def test_except_star_in_a_nursery_body_may_reraise_its_cancelled(virtual: Run) -> None:
    """anyio#634: as a group with nothing else in it, it is caught like a bare one."""

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(sleep_forever)
            nursery.cancel_scope.cancel()
            try:
                await checkpoint()
            except* Cancelled:
                raise
        assert nursery.cancel_scope.cancelled_caught

    virtual(main)


def test_a_cancelled_host_that_cannot_be_interrupted_does_not_spin(
    virtual: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """anyio#695, anyio#1111, anyio#1257: it sleeps until its children have ended."""
    passes: list[float] = []
    poll = Kernel.poll
    monkeypatch.setattr(Kernel, "poll", lambda self, timeout: (passes.append(timeout), poll(self, timeout))[1])

    async def child(lot: ParkingLot) -> None:
        with CancelScope(shield=True):
            await sleep(10)
            await lot.park()

    async def main() -> None:
        lot = ParkingLot()
        with move_on_after(1) as outer:
            async with open_nursery() as nursery:
                nursery.start_soon(child, lot)
                nursery.start_soon(_unpark_later, lot)
        assert outer.cancel_called
        assert current_time() == 20

    virtual(main)
    assert len(passes) < 20


async def _unpark_later(lot: ParkingLot) -> None:
    with CancelScope(shield=True):
        await sleep(20)
    lot.unpark()


def test_cancelling_a_nursery_whose_host_has_finished_harms_nobody(virtual: Run) -> None:
    """anyio#1111"""

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(checkpoint)
        nursery.cancel_scope.cancel()
        await checkpoint()
        await kernel_lives_on()

    virtual(main)


# ---- start() --------------------------------------------------------------------------------------


def test_start_returns_what_the_child_says_and_the_child_goes_on_in_the_nursery(virtual: Run) -> None:
    log: list[object] = []

    async def server(port: int, *, task_status: Status) -> None:
        task = current_task()
        log.append((task.parent_nursery is box[0], task.eventual_parent_nursery is box[0]))
        await sleep(1)
        task_status.started(port + 1)
        log.append((task.parent_nursery is box[0], task.eventual_parent_nursery))
        await sleep(1)
        log.append("served")

    box: list[Nursery] = []

    async def main() -> None:
        async with open_nursery() as nursery:
            box.append(nursery)
            assert await nursery.start(server, 80) == 81
            assert len(nursery.child_tasks) == 1
            log.append("start returned")
        log.append("end")

    virtual(main)
    assert log == [(False, True), (True, None), "start returned", "served", "end"]


def test_start_without_a_value_returns_none(virtual: Run) -> None:
    async def child(task_status: Status) -> None:
        task_status.started()

    async def main() -> None:
        async with open_nursery() as nursery:
            assert await nursery.start(child) is None

    virtual(main)


def test_start_of_a_child_that_ends_at_once_after_started_still_returns_the_value(virtual: Run) -> None:
    async def child(task_status: Status) -> None:
        task_status.started(5)

    async def main() -> None:
        async with open_nursery() as nursery:
            assert await nursery.start(child) == 5
            assert not nursery.child_tasks

    virtual(main)


def test_start_works_with_generators_on_both_sides(virtual: Run) -> None:
    def child(task_status: Status) -> Generator[Any, Any, None]:
        yield from checkpoint()
        task_status.started("up")
        yield from sleep(1)

    def body(nursery: Nursery) -> Generator[Any, Any, object]:
        return (yield from nursery.start(child))

    def main() -> Generator[Any, Any, object]:
        return (yield from within(open_nursery(), body))

    assert virtual(main) == "up"


def test_started_twice_is_an_error(virtual: Run) -> None:
    async def child(task_status: Status) -> None:
        task_status.started(1)
        with pytest.raises(RuntimeError, match=r"started\(\) was called a second time"):
            task_status.started(2)

    async def main() -> None:
        async with open_nursery() as nursery:
            assert await nursery.start(child) == 1

    virtual(main)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_child_that_ends_without_started_is_an_error_that_names_it(virtual: Run, steps: int) -> None:
    async def child(task_status: Status) -> None:
        for _ in range(steps):
            await checkpoint()

    async def main() -> None:
        async with open_nursery() as nursery:
            with pytest.raises(RuntimeError, match=r"child ended without calling task_status\.started\(\)"):
                await nursery.start(child)
            with pytest.raises(RuntimeError, match=r"^sprinter ended without calling task_status\.started\(\)"):
                await nursery.start(child, name="sprinter")
            assert not nursery.cancel_scope.cancel_called

    virtual(main)


def test_started_after_start_has_ended_is_an_error(virtual: Run) -> None:
    saved: list[Status] = []

    async def child(task_status: Status) -> None:
        saved.append(task_status)

    async def main() -> None:
        async with open_nursery() as nursery:
            with pytest.raises(RuntimeError, match="without calling"):
                await nursery.start(child)
            with pytest.raises(RuntimeError, match=r"started\(\) was called after start\(\) had ended"):
                saved[0].started()

    virtual(main)


def test_an_error_before_started_comes_out_of_start_as_it_is(virtual: Run) -> None:
    """trio#2611, trio#2844, trio#3261: not wrapped, `__cause__` and `__context__` kept."""
    error, cause, context = ZeroDivisionError(), KeyError("cause"), KeyError("context")

    async def child(task_status: Status) -> None:
        await checkpoint()
        try:
            raise context
        except KeyError:
            raise error from cause

    async def main() -> None:
        async with open_nursery() as nursery:
            with pytest.raises(ZeroDivisionError) as caught:
                await nursery.start(child)
            assert caught.value is error
            assert error.__cause__ is cause
            assert error.__context__ is context
            assert not nursery.cancel_scope.cancel_called
            assert not nursery.child_tasks

    virtual(main)


def test_start_inside_an_except_block_does_not_change_the_context_of_the_childs_error(virtual: Run) -> None:
    """trio#3261"""
    error = ZeroDivisionError()

    async def child(task_status: Status) -> None:
        raise error from None

    async def main() -> None:
        async with open_nursery() as nursery:
            try:
                raise KeyError("being handled")
            except KeyError:
                with pytest.raises(ZeroDivisionError):
                    await nursery.start(child)
        assert error.__cause__ is None
        assert error.__suppress_context__

    virtual(main)


def test_a_group_raised_before_started_comes_out_of_start_as_it_is(virtual: Run) -> None:
    """trio#2611"""
    error = ZeroDivisionError()

    async def child(task_status: Status) -> None:
        async with open_nursery():
            raise error

    async def main() -> None:
        async with open_nursery() as nursery:
            with pytest.raises(ExceptionGroup) as caught:
                await nursery.start(child)
            assert caught.value.exceptions == (error,)

    virtual(main)


def test_an_error_after_started_is_the_nurserys(virtual: Run) -> None:
    error = ZeroDivisionError()

    async def child(task_status: Status) -> None:
        task_status.started(7)
        raise error

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with open_nursery() as nursery:
                assert await nursery.start(child) == 7
        assert caught.value.exceptions == (error,)

    virtual(main)


def test_two_children_that_fail_before_started_come_out_of_start_as_a_group(virtual: Run) -> None:
    """The child has started a sibling where it runs itself, in the room that `start()` made for it."""
    errors = KeyError(1), KeyError(2)

    async def child(task_status: Status) -> None:
        room = current_task().parent_nursery
        assert room is not None
        room.start_soon(_error_at_cleanup, errors[1])
        await wait_all_tasks_blocked()
        raise errors[0]

    async def main() -> None:
        async with open_nursery() as nursery:
            with pytest.raises(ExceptionGroup) as caught:
                await nursery.start(child)
            assert caught.value.exceptions == errors

    virtual(main)


def test_a_sibling_started_beside_the_child_moves_with_it(virtual: Run) -> None:
    log = []

    async def sibling() -> None:
        await sleep(2)
        log.append("sibling")

    async def child(task_status: Status) -> None:
        room = current_task().parent_nursery
        assert room is not None
        room.start_soon(sibling)
        await checkpoint()
        task_status.started()

    async def main() -> None:
        async with open_nursery() as nursery:
            with CancelScope() as scope:
                await nursery.start(child)
                scope.cancel()
            log.append("started")

    virtual(main)
    assert log == ["started", "sibling"]


# ---- start() and cancellation -------------------------------------------------------------------


def test_a_child_cancelled_before_started_makes_start_raise_cancelled_and_not_runtime_error(virtual: Run) -> None:
    """trio#2611, trio#2844"""
    log = []

    async def child(task_status: Status) -> None:
        try:
            await sleep_forever()
        finally:
            log.append("child left")

    async def main() -> None:
        async with open_nursery() as nursery:
            with move_on_after(1) as scope:
                try:
                    await nursery.start(child)
                except BaseException as exc:
                    log.append(type(exc).__name__)
                    raise
            assert scope.cancelled_caught
            assert not nursery.cancel_scope.cancel_called
            nursery.start_soon(checkpoint)
            await checkpoint()

    virtual(main)
    assert log == ["child left", "Cancelled"]


def test_a_child_that_swallows_its_cancel_and_ends_without_started_makes_start_raise_cancelled(virtual: Run) -> None:
    """trio#2844"""

    async def child(task_status: Status) -> None:
        try:
            await sleep_forever()
        except Cancelled:
            pass

    async def main() -> None:
        async with open_nursery() as nursery:
            with CancelScope() as outer, CancelScope() as scope:
                outer.cancel("outer")
                scope.cancel("inner")
                with pytest.raises(Cancelled) as caught:
                    await nursery.start(child)
                assert caught.value.reason == "outer"
            assert not nursery.cancel_scope.cancel_called

    virtual(main)


def test_start_in_a_cancelled_scope_does_not_cancel_the_nursery(virtual: Run) -> None:
    """anyio#685, anyio#710"""
    log = []

    async def child(task_status: Status) -> None:
        log.append("first step")
        await checkpoint()
        log.append("not reached")

    async def bystander() -> None:
        await sleep(1)
        log.append("bystander")

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(bystander)
            with CancelScope() as scope:
                scope.cancel()
                await nursery.start(child)
            assert scope.cancelled_caught
            assert not nursery.cancel_scope.cancel_called
            await checkpoint()

    virtual(main)
    assert log == ["first step", "bystander"]


def test_start_stays_cancellable_until_started(virtual: Run) -> None:
    """anyio#517"""

    async def child(task_status: Status) -> None:
        await sleep_forever()

    async def main() -> None:
        async with open_nursery() as nursery:
            with pytest.raises(kernel.TooSlowError), fail_after(3):
                await nursery.start(child)
            assert current_time() == 3

    virtual(main)


def test_a_shielded_child_survives_the_cancel_of_the_caller(virtual: Run) -> None:
    """anyio#837"""
    log: list[object] = []

    async def child(task_status: Status) -> None:
        with CancelScope(shield=True):
            await sleep(2)
            task_status.started("value")
            await sleep(2)
            log.append("child ended")

    async def main() -> None:
        async with open_nursery() as nursery:
            with move_on_after(1) as scope:
                log.append(await nursery.start(child))
                await checkpoint()
                log.append("not reached")
            assert scope.cancelled_caught
            assert not nursery.cancel_scope.cancel_called
            assert current_time() == 4

    virtual(main)
    assert log == ["child ended", "value"]


def test_started_in_a_start_that_is_being_cancelled_leaves_the_child_to_be_cancelled_with_it(virtual: Run) -> None:
    log: list[object] = []

    async def child(nursery: Nursery, task_status: Status) -> None:
        try:
            await sleep_forever()
        finally:
            task_status.started()
            log.append(current_task() in nursery.child_tasks)
            try:
                await checkpoint()
            except Cancelled:
                log.append("still cancelled")
                raise

    async def main() -> None:
        async with open_nursery() as nursery:
            with move_on_after(1) as scope:
                await nursery.start(child, nursery)
            assert scope.cancelled_caught
            assert not nursery.cancel_scope.cancel_called

    virtual(main)
    assert log == [False, "still cancelled"]


def test_an_error_of_a_child_that_stayed_behind_comes_out_of_start(virtual: Run) -> None:
    error = ZeroDivisionError()

    async def child(task_status: Status) -> None:
        task_status.started()
        raise error

    async def main() -> None:
        async with open_nursery() as nursery:
            with CancelScope() as scope:
                scope.cancel()
                with pytest.raises(ZeroDivisionError):
                    await nursery.start(child)
            assert not nursery.cancel_scope.cancel_called

    virtual(main)


def test_after_started_the_callers_cancel_does_not_reach_the_child_and_the_nurserys_does(virtual: Run) -> None:
    log = []

    async def child(task_status: Status) -> None:
        task_status.started()
        try:
            await sleep_forever()
        except Cancelled as exc:
            log.append((current_time(), exc.reason))
            raise

    async def main() -> None:
        async with open_nursery() as nursery:
            with CancelScope() as scope:
                await nursery.start(child)
                scope.cancel("caller")
                await sleep(1)
            await sleep(2)
            nursery.cancel_scope.cancel("nursery")

    virtual(main)
    assert log == [(2, "nursery")]


def test_before_started_the_nurserys_cancel_does_not_reach_the_child(virtual: Run) -> None:
    log = []

    async def child(task_status: Status) -> None:
        await sleep(2)
        log.append("not cancelled")
        task_status.started("up")
        await checkpoint()
        log.append("not reached")

    async def caller(nursery: Nursery) -> None:
        assert await nursery.start(child) == "up"
        log.append("start returned")

    async def main() -> None:
        async with open_nursery() as outer:
            async with open_nursery() as nursery:
                outer.start_soon(caller, nursery)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            assert current_time() == 2
            assert nursery.cancel_scope.cancelled_caught
            log.append("nursery ended")

    virtual(main)
    assert log[0] == "not cancelled"
    assert set(log) == {"not cancelled", "start returned", "nursery ended"}


def test_a_child_that_moves_into_a_cancelled_nursery_is_cancelled_with_all_that_is_in_it(virtual: Run) -> None:
    """Also where it sleeps: somebody else may call `started()` for it."""
    log = []

    async def sleeper(name: str) -> None:
        try:
            await sleep_forever()
        finally:
            log.append(name)

    async def child(box: list[Status], task_status: Status) -> None:
        box.append(task_status)
        with CancelScope():
            async with open_nursery() as inner:
                inner.start_soon(sleeper, "grandchild")
                await sleeper("child")

    async def caller(nursery: Nursery, box: list[Status]) -> None:
        await nursery.start(child, box)

    async def main() -> None:
        box: list[Status] = []
        async with open_nursery() as outer, open_nursery() as nursery:
            outer.start_soon(caller, nursery, box)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            with CancelScope(shield=True):
                await wait_all_tasks_blocked()
                assert log == []
                box[0].started()
                await wait_all_tasks_blocked()
                assert sorted(log) == ["child", "grandchild"]

    virtual(main)


def test_a_sleeping_child_without_scopes_that_is_moved_into_a_cancelled_nursery_is_cancelled(virtual: Run) -> None:
    log = []

    async def child(box: list[Status], task_status: Status) -> None:
        box.append(task_status)
        try:
            await sleep_forever()
        finally:
            log.append("cancelled")

    async def main() -> None:
        box: list[Status] = []
        async with open_nursery() as outer, open_nursery() as nursery:
            outer.start_soon(partial(nursery.start, child, box))
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            box[0].started()

    virtual(main)
    assert log == ["cancelled"]


def test_scopes_opened_before_started_move_with_the_child(virtual: Run) -> None:
    log: list[object] = []

    async def child(task_status: Status) -> None:
        with move_on_at(50) as own, CancelScope() as inner:
            log.append(current_effective_deadline())
            task_status.started()
            log.append(current_effective_deadline())
            try:
                await sleep_forever()
            except Cancelled as exc:
                log.append(exc.reason)
                raise
        log.append((own.cancelled_caught, inner.cancelled_caught))

    async def main() -> None:
        with move_on_at(20):
            async with open_nursery() as nursery:
                with move_on_at(5) as scope:
                    await nursery.start(child)
                    scope.cancel("the caller's")
                await sleep(9)
                nursery.cancel_scope.cancel("the nursery's")

    virtual(main)
    assert log == [5, 20, "the nursery's"]


def test_a_scope_opened_before_started_still_catches_its_own_cancel_afterwards(virtual: Run) -> None:
    log: list[object] = []

    async def child(task_status: Status) -> None:
        with move_on_after(3) as own:
            task_status.started()
            await sleep_forever()
        log.append((own.cancelled_caught, current_time()))
        await checkpoint()

    async def main() -> None:
        async with open_nursery() as nursery:
            with CancelScope() as scope:
                await nursery.start(child)
                scope.cancel()

    virtual(main)
    assert log == [(True, 3)]


def test_grandchildren_started_before_started_move_with_the_child(virtual: Run) -> None:
    log: list[object] = []

    async def grandchild() -> None:
        try:
            await sleep_forever()
        except Cancelled as exc:
            log.append((exc.reason, current_time()))
            raise

    async def child(task_status: Status) -> None:
        async with open_nursery() as inner:
            inner.start_soon(grandchild)
            await checkpoint()
            task_status.started()
            await sleep_forever()

    async def main() -> None:
        async with open_nursery() as nursery:
            with CancelScope() as scope:
                await nursery.start(child)
                scope.cancel("caller")
            await sleep(1)
            nursery.cancel_scope.cancel("nursery")

    virtual(main)
    assert log == [("nursery", 1)]


def test_a_nursery_waits_for_a_start_that_is_pending_elsewhere_and_then_for_the_child(virtual: Run) -> None:
    log = []

    async def child(task_status: Status) -> None:
        await sleep(1)
        task_status.started()
        await sleep(1)
        log.append("child ended")

    async def caller(nursery: Nursery) -> None:
        await nursery.start(child)
        log.append("start returned")

    async def main() -> None:
        async with open_nursery() as outer:
            async with open_nursery() as nursery:
                outer.start_soon(caller, nursery)
                await wait_all_tasks_blocked()
                assert not nursery.child_tasks
            log.append("nursery ended")

    virtual(main)
    assert log == ["start returned", "child ended", "nursery ended"]


def test_a_nursery_whose_last_child_ends_still_waits_for_a_pending_start(virtual: Run) -> None:
    log = []

    async def child(task_status: Status) -> None:
        await sleep(2)
        task_status.started()
        log.append("started")
        await sleep(1)

    async def main() -> None:
        async with open_nursery() as outer:
            async with open_nursery() as nursery:
                nursery.start_soon(sleep, 1)
                outer.start_soon(partial(nursery.start, child))
                await checkpoint()
            log.append("nursery ended")
            assert current_time() == 3

    virtual(main)
    assert log == ["started", "nursery ended"]


@pytest.mark.parametrize("end", ["error", "cancel", "no started"])
def test_a_nursery_that_waits_for_a_pending_start_goes_on_when_that_fails(virtual: Run, end: str) -> None:
    async def child(task_status: Status) -> None:
        await sleep(1)
        if end == "error":
            raise ZeroDivisionError
        if end == "cancel":
            await sleep_forever()

    async def caller(nursery: Nursery) -> None:
        try:
            with move_on_after(5):
                await nursery.start(child)
        except (ZeroDivisionError, RuntimeError):
            pass

    async def main() -> None:
        async with open_nursery() as outer:
            async with open_nursery() as nursery:
                outer.start_soon(caller, nursery)
                await wait_all_tasks_blocked()
            assert current_time() == (5 if end == "cancel" else 1)
            assert not nursery.cancel_scope.cancel_called

    virtual(main)


@pytest.mark.parametrize("how", ["refused", "in a cancelled scope"])
def test_a_start_that_fails_leaves_the_nursery_free_to_close(virtual: Run, how: str) -> None:
    async def child(task_status: Status) -> None:
        await checkpoint()

    async def main() -> None:
        async with open_nursery() as nursery:
            with CancelScope() as scope:
                scope.cancel()
                with pytest.raises(TypeError if how == "refused" else Cancelled):
                    await nursery.start(_good if how == "refused" else child)
            nursery.start_soon(sleep, 1)
        assert current_time() == 1

    virtual(main)


def test_task_status_ignored_does_nothing_and_says_its_name(virtual: Run) -> None:
    log = []

    async def child(task_status: Any = TASK_STATUS_IGNORED) -> None:
        task_status.started()
        task_status.started(5)
        log.append(repr(task_status))

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(child)

    virtual(main)
    assert log == ["TASK_STATUS_IGNORED"]


def test_start_from_a_child_into_the_nursery_it_runs_in(virtual: Run) -> None:
    log = []

    async def worker(task_status: Status) -> None:
        task_status.started("up")
        await sleep(1)
        log.append("worked")

    async def child(nursery: Nursery) -> None:
        log.append(await nursery.start(worker))

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(child, nursery)
        log.append("end")

    virtual(main)
    assert log == ["up", "worked", "end"]


# ---- generators -------------------------------------------------------------------------------------


def test_a_generator_can_be_child_body_and_main(virtual: Run) -> None:
    log = []

    def child(name: str) -> Generator[Any, Any, None]:
        yield from sleep(1)
        log.append(name)

    def body(nursery: Nursery) -> Generator[Any, Any, str]:
        nursery.start_soon(child, "a")
        nursery.start_soon(child, "b")
        yield from checkpoint()
        log.append("body")
        return "result"

    def main() -> Generator[Any, Any, str]:
        result: str = yield from within(open_nursery(), body)
        log.append("end")
        return result

    assert virtual(main) == "result"
    assert log == ["body", "a", "b", "end"]


def test_within_gives_the_errors_of_body_and_children_in_a_group(virtual: Run) -> None:
    errors = KeyError(1), KeyError(2)

    def child() -> Generator[Any, Any, None]:
        try:
            yield from sleep_forever()
        finally:
            raise errors[1]

    def body(nursery: Nursery) -> Generator[Any, Any, None]:
        nursery.start_soon(child)
        yield from checkpoint()
        raise errors[0]

    def main() -> Generator[Any, Any, None]:
        yield from within(open_nursery(), body)

    with pytest.raises(ExceptionGroup) as caught:
        virtual(main)
    assert caught.value.exceptions == errors


def test_a_generator_body_is_cancelled_like_any_other(virtual: Run) -> None:
    log = []

    def body(nursery: Nursery) -> Generator[Any, Any, None]:
        nursery.start_soon(fail_with, ZeroDivisionError())
        try:
            yield from sleep_forever()
        except Cancelled:
            log.append("cancelled")
            raise

    def main() -> Generator[Any, Any, None]:
        yield from within(open_nursery(), body)

    with pytest.raises(ExceptionGroup):
        virtual(main)
    assert log == ["cancelled"]


def test_within_takes_an_async_body_too_and_passes_arguments(virtual: Run) -> None:
    async def body(nursery: Nursery, *words: str) -> tuple[str, ...]:
        nursery.start_soon(checkpoint)
        return words

    async def main() -> None:
        assert await within(open_nursery(), body, "a", "b") == ("a", "b")

    virtual(main)


def test_within_refuses_a_plain_body_with_the_cure(virtual: Run) -> None:
    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            await within(open_nursery(), lambda nursery: 7)
        (error,) = caught.value.exceptions
        assert isinstance(error, TypeError)
        assert re.match(r"within wants an async function, but .*<lambda> is a plain one", str(error))

    virtual(main)


# ---- misuse -----------------------------------------------------------------------------------------


def test_a_plain_with_is_refused_with_the_cure(virtual: Run) -> None:
    async def main() -> None:
        nursery = open_nursery()
        with pytest.raises(RuntimeError, match=r"write `async with open_nursery\(\)`, not `with open_nursery\(\)`"):
            nursery.__enter__()
        async with nursery:
            pass

    virtual(main)


def test_open_nursery_needs_a_task() -> None:
    with pytest.raises(RuntimeError, match=r"open_nursery\(\) was used outside the kernel"):
        open_nursery()
    said: list[str] = []

    class Curious(MockClock):
        def autojump(self, deadline: float) -> None:
            try:
                open_nursery()
            except RuntimeError as exc:
                said.append(str(exc))
            super().autojump(deadline)

    kernel.run(sleep, 1, clock=Curious(autojump_threshold=0))
    assert len(said) == 1
    assert re.match(r"open_nursery\(\) was .* outside any .*task", said[0])


def test_a_nursery_is_entered_once(virtual: Run) -> None:
    async def main() -> None:
        async with open_nursery() as nursery:
            with pytest.raises(RuntimeError, match=r"serves one `async with` block; call open_nursery\(\) for each"):
                await nursery.__aenter__()
            nursery.start_soon(checkpoint)
        with pytest.raises(RuntimeError, match="serves one `async with` block"):
            await nursery.__aenter__()
        await kernel_lives_on()

    virtual(main)


def test_a_nursery_left_without_having_been_entered_or_twice_is_an_error(virtual: Run) -> None:
    async def main() -> None:
        nursery = open_nursery()
        with pytest.raises(RuntimeError, match="left without having been entered, or a second time"):
            await nursery.__aexit__(None, None, None)
        async with open_nursery() as nursery:
            pass
        with pytest.raises(RuntimeError, match="left without having been entered, or a second time"):
            await nursery.__aexit__(None, None, None)
        await kernel_lives_on()

    virtual(main)


def test_a_nursery_belongs_to_the_task_that_enters_it(virtual: Run) -> None:
    """Whoever called `open_nursery()`: it is that task's block, and that task waits."""
    log = []

    async def child(nursery: Nursery) -> None:
        async with nursery:
            assert nursery.parent_task is current_task()
            nursery.start_soon(sleep, 1)
        log.append(("inner ended", current_time()))

    async def main() -> None:
        nursery = open_nursery()
        async with open_nursery() as outer:
            outer.start_soon(child, nursery)
        log.append(("outer ended", current_time()))

    virtual(main)
    assert log == [("inner ended", 1), ("outer ended", 1)]


def test_a_scope_left_inside_a_nursery_that_it_surrounds_is_one_runtime_error(virtual: Run) -> None:
    """trio#882"""
    log = []

    async def child() -> None:
        await sleep(1)
        log.append("child ended")

    async def main() -> None:
        with CancelScope() as outermost:
            scope = CancelScope()
            scope.__enter__()
            async with open_nursery() as nursery:
                nursery.start_soon(child)
                with pytest.raises(RuntimeError, match="left before a scope or nursery inside it was"):
                    scope.__exit__(None, None, None)
                scope.cancel()
            assert log == ["child ended"]
            outermost.cancel()
            await checkpoint()
        assert outermost.cancelled_caught
        await kernel_lives_on()

    virtual(main)


def test_after_a_surrounding_scope_is_taken_out_the_children_hang_from_the_next_one(virtual: Run) -> None:
    """trio#882"""
    log = []

    async def child() -> None:
        try:
            await sleep_forever()
        except Cancelled as exc:
            log.append(exc.reason)
            raise

    async def main() -> None:
        with CancelScope() as outermost:
            shield = CancelScope(shield=True)
            shield.__enter__()
            async with open_nursery() as nursery:
                nursery.start_soon(child)
                await wait_all_tasks_blocked()
                outermost.cancel("outermost")
                with pytest.raises(RuntimeError):
                    shield.__exit__(None, None, None)
        await kernel_lives_on()

    virtual(main)
    assert log == ["outermost"]


def test_a_nursery_left_before_a_scope_inside_it_joins_and_is_one_runtime_error(virtual: Run) -> None:
    """trio#882, trio#1061"""
    log = []

    async def child() -> None:
        await sleep(1)
        log.append("child ended")

    async def main() -> None:
        nursery = open_nursery()
        await nursery.__aenter__()
        nursery.start_soon(child)
        with move_on_after(5) as scope:
            with pytest.raises(RuntimeError, match="left before a scope or nursery inside it was") as caught:
                await nursery.__aexit__(None, None, None)
            assert caught.value.__cause__ is None
            assert log == ["child ended"]
            assert current_effective_deadline() == 5
            await sleep_forever()
        assert scope.cancelled_caught
        with pytest.raises(RuntimeError, match="the nursery is closed"):
            nursery.start_soon(child)
        await kernel_lives_on()

    virtual(main)


def test_a_nursery_left_out_of_order_keeps_the_errors_as_the_cause(virtual: Run) -> None:
    error = ZeroDivisionError()

    async def main() -> None:
        nursery = open_nursery()
        await nursery.__aenter__()
        nursery.start_soon(fail_with, error)
        with CancelScope():
            with pytest.raises(RuntimeError) as caught:
                await nursery.__aexit__(None, None, None)
            assert caught.value.__cause__ is not None
            assert leaves(caught.value.__cause__) == [error]
        await kernel_lives_on()

    virtual(main)


def test_nested_nurseries_left_in_the_wrong_order_are_one_runtime_error(virtual: Run) -> None:
    """trio#882"""
    log = []

    async def child(name: str) -> None:
        await sleep(1)
        log.append(name)

    async def main() -> None:
        outer, inner = open_nursery(), open_nursery()
        await outer.__aenter__()
        await inner.__aenter__()
        outer.start_soon(child, "outer's")
        inner.start_soon(child, "inner's")
        with pytest.raises(RuntimeError, match="left before a scope or nursery inside it was"):
            await outer.__aexit__(None, None, None)
        await inner.__aexit__(None, None, None)
        await kernel_lives_on()

    virtual(main)
    assert log == ["outer's", "inner's"]


def test_a_nursery_left_through_an_async_generator_is_one_runtime_error(virtual: Run) -> None:
    """trio#1061, trio#3298"""
    log = []

    async def child() -> None:
        try:
            await sleep_forever()
        finally:
            log.append("child left")

    async def numbers() -> AsyncGenerator[int, None]:
        async with open_nursery() as nursery:
            nursery.start_soon(child)
            yield 1

    async def main() -> None:
        generator = numbers()
        assert await anext(generator) == 1
        with CancelScope() as scope:
            await checkpoint()
            with pytest.raises(RuntimeError, match="left before a scope or nursery inside it was"):
                await generator.aclose()
            assert log == ["child left"]
            scope.cancel()
            await checkpoint()
        assert scope.cancelled_caught
        await kernel_lives_on()

    virtual(main)


def test_a_nursery_left_by_another_task_joins_there_and_is_one_runtime_error_there(virtual: Run) -> None:
    """trio#1443, trio#3298"""
    log: list[object] = []

    async def child() -> None:
        await sleep(2)
        log.append("child ended")

    async def closer(nursery: Nursery) -> None:
        with pytest.raises(RuntimeError, match=r"was entered by <Task '.*main'.*> but left by <Task 'closer'"):
            await nursery.__aexit__(None, None, None)
        log.append(("closer", current_time()))
        await sleep(1)
        log.append(("closer ended", current_time()))

    async def main() -> None:
        nursery = open_nursery()
        await nursery.__aenter__()
        nursery.start_soon(child)
        async with open_nursery() as outer:
            outer.start_soon(closer, nursery, name="closer")
        log.append(("outer ended", current_time()))
        await kernel_lives_on()

    virtual(main)
    assert log == ["child ended", ("closer", 2), ("closer ended", 3), ("outer ended", 3)]


# ---- a task ends inside an open nursery -----------------------------------------------------------


def test_children_of_a_nursery_left_open_go_to_the_nursery_of_its_task_and_are_joined(virtual: Run) -> None:
    """trio#3298"""
    log: list[object] = []

    async def orphan(outer: Nursery) -> None:
        try:
            await sleep_forever()
        except Cancelled as exc:
            assert current_task().parent_nursery is outer
            assert current_task() in outer.child_tasks
            log.append(exc.source)
            with CancelScope(shield=True):
                await sleep(2)
            log.append(current_time())
            raise

    async def careless(outer: Nursery) -> None:
        nursery = open_nursery()
        await nursery.__aenter__()
        nursery.start_soon(orphan, outer)
        await checkpoint()

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with open_nursery() as outer:
                outer.start_soon(careless, outer, name="careless")
        assert current_time() == 2
        (error,) = caught.value.exceptions
        assert isinstance(error, RuntimeError)
        assert re.match(r"<Task 'careless' .* ended inside <CancelScope .*which it never left", str(error))
        await kernel_lives_on()

    virtual(main)
    assert log == ["nursery", 2]


def test_orphans_with_scopes_and_nurseries_of_their_own_are_adopted_with_them(virtual: Run) -> None:
    log = []

    async def grandchild() -> None:
        try:
            await sleep_forever()
        finally:
            log.append("grandchild")

    async def orphan() -> None:
        with CancelScope(), move_on_after(5):
            async with open_nursery() as nursery:
                nursery.start_soon(grandchild)

    async def careless() -> None:
        stack = [open_nursery(), open_nursery()]
        for nursery in stack:
            await nursery.__aenter__()
            CancelScope().__enter__()
            nursery.start_soon(orphan)
        await wait_all_tasks_blocked()

    async def main() -> None:
        with pytest.raises(ExceptionGroup):
            async with open_nursery() as outer:
                outer.start_soon(careless)
        assert current_time() == 0
        await kernel_lives_on()

    virtual(main)
    assert log == ["grandchild", "grandchild"]


def test_errors_of_adopted_children_arrive(virtual: Run) -> None:
    error = ZeroDivisionError()

    async def careless() -> None:
        nursery = open_nursery()
        await nursery.__aenter__()
        nursery.start_soon(_error_at_cleanup, error)
        await checkpoint()

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with open_nursery() as outer:
                outer.start_soon(careless)
        assert [type(exc) for exc in caught.value.exceptions] == [RuntimeError, ZeroDivisionError]

    virtual(main)


def test_errors_that_a_nursery_left_open_had_gathered_arrive_too(virtual: Run) -> None:
    """All errors arrive, whatever the task that should have raised them did."""
    error = ZeroDivisionError()

    async def careless() -> None:
        nursery = open_nursery()
        await nursery.__aenter__()
        nursery.start_soon(fail_with, error)
        try:
            await sleep_forever()
        except Cancelled:
            pass

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with open_nursery() as outer:
                outer.start_soon(careless)
        assert error in leaves(caught.value)
        assert RuntimeError in [type(exc) for exc in leaves(caught.value)]

    virtual(main)


def test_a_nursery_left_open_by_a_task_that_ended_takes_no_more_children(virtual: Run) -> None:
    """Nobody would join them."""

    async def careless(box: list[Nursery]) -> None:
        nursery = open_nursery()
        box.append(await nursery.__aenter__())

    async def main() -> None:
        box: list[Nursery] = []
        with pytest.raises(ExceptionGroup):
            async with open_nursery() as outer:
                outer.start_soon(careless, box)
        with pytest.raises(RuntimeError, match="the nursery is closed"):
            box[0].start_soon(checkpoint)
        assert not box[0].child_tasks

    virtual(main)


def test_a_child_being_started_into_a_nursery_left_open_does_not_outlive_the_run_unnoticed(virtual: Run) -> None:
    """The nursery that it was to move to is gone: it must be joined somewhere, or be cancelled by its `start()`."""
    log = []

    async def child(task_status: Status) -> None:
        try:
            await sleep(1)
            task_status.started()
            await sleep(1)
        finally:
            log.append("child ended")

    async def careless(box: list[Nursery]) -> None:
        nursery = open_nursery()
        box.append(await nursery.__aenter__())
        await wait_all_tasks_blocked()

    async def caller(box: list[Nursery]) -> None:
        await checkpoint()
        try:
            await box[0].start(child)
        except RuntimeError:
            pass

    async def main() -> None:
        box: list[Nursery] = []
        async with open_nursery() as outermost:
            outermost.start_soon(caller, box)
            with pytest.raises(ExceptionGroup):
                async with open_nursery() as outer:
                    outer.start_soon(careless, box)
        assert log == ["child ended"]

    virtual(main)


def test_main_that_ends_inside_an_open_nursery_joins_its_children(virtual: Run) -> None:
    log = []

    async def child() -> None:
        try:
            await sleep_forever()
        finally:
            log.append("child left")

    async def main() -> None:
        nursery = open_nursery()
        await nursery.__aenter__()
        nursery.start_soon(child)
        await checkpoint()

    with pytest.raises(RuntimeError, match="ended inside <CancelScope"):
        virtual(main)
    assert log == ["child left"]


def test_errors_of_children_that_main_left_behind_arrive_and_are_no_internal_error(virtual: Run) -> None:
    error = ZeroDivisionError()

    async def main() -> None:
        nursery = open_nursery()
        await nursery.__aenter__()
        nursery.start_soon(_error_at_cleanup, error)
        await checkpoint()

    with pytest.raises((RuntimeError, BaseExceptionGroup)) as caught:
        virtual(main)
    assert {RuntimeError, ZeroDivisionError} <= {type(exc) for exc in leaves(caught.value)}


def test_an_async_generator_with_a_nursery_closed_after_its_tasks_end_says_nothing_more(virtual: Run) -> None:
    """trio#3298"""

    async def numbers() -> AsyncGenerator[int, None]:
        async with open_nursery() as nursery:
            nursery.start_soon(sleep_forever)
            yield 1

    async def child(generator: AsyncGenerator[int, None]) -> None:
        await anext(generator)

    async def main() -> None:
        generator = numbers()
        with pytest.raises(ExceptionGroup) as caught:
            async with open_nursery() as nursery:
                nursery.start_soon(child, generator)
        assert [type(exc) for exc in caught.value.exceptions] == [RuntimeError]
        try:
            await generator.aclose()
        except BaseExceptionGroup as group:
            assert [type(exc) for exc in leaves(group)] == [GeneratorExit]  # noqa: PT017
        await kernel_lives_on()

    virtual(main)


def test_a_run_that_crashes_throws_its_tasks_away_without_further_noise() -> None:
    """Their blocks are left when there is no kernel any more: there is nobody to wait with, and nobody to tell."""

    class Broken(MockClock):
        def autojump(self, deadline: float) -> None:
            raise ZeroDivisionError("the clock broke")

    async def child() -> None:
        with CancelScope(), move_on_after(5):
            await sleep(5)

    async def main() -> None:
        with CancelScope():
            async with open_nursery() as nursery:
                nursery.start_soon(child)
                await sleep(5)

    with pytest.raises(kernel.KernelInternalError):
        kernel.run(main, clock=Broken(autojump_threshold=0))
    gc.collect()  # warnings about exceptions in there are errors


# ---- size, garbage, tracebacks ------------------------------------------------------------------


def frames(error: BaseException) -> list[tuple[str, str]]:
    """File and function of every line in the traceback of `error`."""
    found, traceback = [], error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        found.append((code.co_filename, code.co_name))
        traceback = traceback.tb_next
    return found


def all_frames(error: BaseException | None, seen: set[int] | None = None) -> list[tuple[str, str]]:
    """The same for everything that is printed with it: group members, causes and contexts."""
    seen = set() if seen is None else seen
    if error is None or id(error) in seen:
        return []
    seen.add(id(error))
    found = frames(error)
    for exc in (error.__cause__, error.__context__, *getattr(error, "exceptions", ())):
        found += all_frames(exc, seen)
    return found


async def _nest_and_fail(depth: int) -> None:
    async with open_nursery() as nursery:
        if depth:
            nursery.start_soon(_nest_and_fail, depth - 1)
        else:
            raise ZeroDivisionError


async def _nest_and_sleep(depth: int) -> None:
    async with open_nursery() as nursery:
        if depth:
            nursery.start_soon(_nest_and_sleep, depth - 1)
        else:
            await sleep_forever()


async def _start_and_fail() -> None:
    async def child(task_status: Status) -> None:
        await checkpoint()
        raise ZeroDivisionError

    async with open_nursery() as nursery:
        await nursery.start(child)


@pytest.mark.parametrize("scenario", [partial(_nest_and_fail, 3), _start_and_fail], ids=["nested", "start"])
def test_no_traceback_that_reaches_the_user_shows_a_line_of_the_loop(
    virtual: Run, scenario: Callable[[], Awaitable[None]]
) -> None:
    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            await scenario()
        files = {file for file, _ in all_frames(caught.value)}
        assert __file__ in files
        assert not [file for file in files if file.endswith("loop.py")]

    virtual(main)


def test_the_traceback_of_a_cancelled_that_went_through_nurseries_shows_no_line_of_the_loop(virtual: Run) -> None:
    async def main() -> None:
        seen: list[BaseException] = []
        with CancelScope() as scope:
            async with open_nursery() as nursery:
                nursery.start_soon(_nest_and_sleep, 5)
                await wait_all_tasks_blocked()
                scope.cancel()
                try:
                    await checkpoint()
                except Cancelled as exc:
                    seen.append(exc)
            raise AssertionError("unreachable: the children's Cancelled came up")
        assert not [file for file, _ in all_frames(seen[0]) if file.endswith("loop.py")]

    virtual(main)


async def _traceback_length(scenario: Callable[[int], Awaitable[None]], depth: int) -> int:
    try:
        with CancelScope() as scope:
            async with open_nursery() as nursery:
                nursery.start_soon(scenario, depth)
                await wait_all_tasks_blocked()
                scope.cancel()
                try:
                    await checkpoint()
                except Cancelled:
                    pass
    except ExceptionGroup as group:
        return len(all_frames(group))
    raise AssertionError("unreachable: it has failed")


def test_tracebacks_of_errors_grow_linearly_with_the_depth_of_tasks(virtual: Run) -> None:
    """trio#1793"""

    async def main() -> None:
        at_10, at_20, at_40 = [await _traceback_length(_nest_and_fail, depth) for depth in (10, 20, 40)]
        assert at_40 - at_20 == 2 * (at_20 - at_10) > 0

    virtual(main)


def test_the_traceback_of_cancelled_grows_linearly_with_the_depth_of_tasks(virtual: Run) -> None:
    """trio#1793"""

    async def length(depth: int) -> int:
        with CancelScope() as scope:
            try:
                async with open_nursery() as nursery:
                    nursery.start_soon(_nest_and_sleep, depth)
                    await wait_all_tasks_blocked()
                    scope.cancel()
            except Cancelled as exc:
                return len(all_frames(exc))
        raise AssertionError("unreachable: it was cancelled")

    async def main() -> None:
        at_10, at_20, at_40 = [await length(depth) for depth in (10, 20, 40)]
        assert at_40 - at_20 == 2 * (at_20 - at_10) > 0

    virtual(main)


async def _failing_nursery() -> None:
    try:
        async with open_nursery() as nursery:
            nursery.start_soon(sleep_forever)
            nursery.start_soon(fail_at_once, ZeroDivisionError)
    except ExceptionGroup:
        pass


async def _failing_body() -> None:
    try:
        async with open_nursery() as nursery:
            nursery.start_soon(sleep_forever)
            await checkpoint()
            raise ZeroDivisionError
    except ExceptionGroup:
        pass


async def _nested_failure() -> None:
    try:
        await _nest_and_fail(4)
    except ExceptionGroup:
        pass


async def _cancelled_nursery() -> None:
    with move_on_after(1):
        await _nest_and_sleep(4)


async def _cancelled_body() -> None:
    async with open_nursery() as nursery:
        nursery.cancel_scope.cancel()
        await sleep_forever()


async def _ordinary() -> None:
    async with open_nursery() as nursery:
        nursery.start_soon(sleep, 1)
        nursery.start_soon(checkpoint)


async def _failing_start() -> None:
    async def child(task_status: Status) -> None:
        await checkpoint()
        raise ZeroDivisionError

    async with open_nursery() as nursery:
        try:
            await nursery.start(child)
        except ZeroDivisionError:
            pass


async def _refused_start() -> None:
    async with open_nursery() as nursery:
        try:
            await nursery.start(_good)
        except TypeError:
            pass


async def _start_without_started() -> None:
    async def child(task_status: Status) -> None:
        await checkpoint()

    async with open_nursery() as nursery:
        try:
            await nursery.start(child)
        except RuntimeError:
            pass


async def _cancelled_start() -> None:
    async def child(task_status: Status) -> None:
        await sleep_forever()

    async with open_nursery() as nursery:
        with move_on_after(1):
            await nursery.start(child)


async def _good_start() -> None:
    async def child(task_status: Status) -> None:
        task_status.started(5)
        await sleep(1)

    async with open_nursery() as nursery:
        await nursery.start(child)


@pytest.mark.parametrize(
    "scenario",
    [
        _ordinary, _failing_nursery, _failing_body, _nested_failure, _cancelled_nursery, _cancelled_body,
        _failing_start, _refused_start, _start_without_started, _cancelled_start, _good_start,
    ],
    ids=lambda scenario: scenario.__name__.strip("_"),
)  # fmt: skip
def test_a_nursery_leaves_no_cyclic_garbage(virtual: Run, scenario: Callable[[], Awaitable[None]]) -> None:
    """trio#1770, trio#2063; anyio#806, anyio#863"""

    async def main() -> None:
        await scenario()
        gc.collect()
        gc.disable()
        try:
            await scenario()
            assert gc.collect() == 0
        finally:
            gc.enable()

    virtual(main)


def test_the_locals_of_a_failed_child_are_freed_with_its_error(virtual: Run) -> None:
    """trio#1770"""
    import weakref

    class Thing:
        pass

    async def child(refs: list[weakref.ref[Thing]]) -> None:
        thing = Thing()
        refs.append(weakref.ref(thing))
        await checkpoint()
        raise ZeroDivisionError

    async def main() -> None:
        refs: list[weakref.ref[Thing]] = []
        gc.disable()
        try:
            try:
                async with open_nursery() as nursery:
                    nursery.start_soon(child, refs)
            except ExceptionGroup:
                pass
            assert refs[0]() is None
        finally:
            gc.enable()

    virtual(main)


async def _end_of(async_fn: Callable[..., Awaitable[None]], *args: Any) -> tuple[type[BaseException] | None, int]:
    """How it ends: the type of the one error, and how many groups it is in. Nobody can print 2,000 nested groups."""
    error: BaseException | None = None
    try:
        await async_fn(*args)
    except BaseException as exc:
        error = exc
    depth = 0
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
        depth += 1
    return (None if error is None else type(error)), depth


def test_a_cancelled_child_in_a_tree_of_two_thousand_generations_needs_no_recursion(virtual: Run) -> None:
    """trio#1235"""

    async def main() -> None:
        with move_on_after(1) as scope:
            assert await _end_of(_nest_and_sleep, 2000) == (Cancelled, 0)
            await checkpoint()
        assert scope.cancelled_caught

    virtual(main)


def test_an_error_in_a_tree_of_two_thousand_generations_arrives(virtual: Run) -> None:
    """trio#1235: itself, and not a `RecursionError` in its place."""

    async def main() -> None:
        assert await _end_of(_nest_and_fail, 2000) == (ZeroDivisionError, 2001)

    virtual(main)


def test_two_thousand_nurseries_in_one_task_need_no_recursion(virtual: Run) -> None:
    """trio#1235"""

    async def main() -> None:
        with move_on_after(1) as scope:
            assert await _end_of(nest) == (Cancelled, 0)
            await checkpoint()
        assert scope.cancelled_caught

    async def nest() -> None:
        async with AsyncExitStack() as stack:
            for _ in range(2000):
                nursery = await stack.enter_async_context(open_nursery())
                nursery.start_soon(sleep_forever)
            assert len(current_task().child_nurseries) == 2000

    virtual(main)


def test_ctrl_c_ends_a_tree_of_two_thousand_generations(virtual: Run) -> None:
    """trio#1235, trio#3290: no RecursionError, and the reason has a short text at every depth."""
    sources: set[str] = set()
    texts: set[int] = set()

    class Interrupting(MockClock):
        def autojump(self, deadline: float) -> None:
            signal.raise_signal(signal.SIGINT)

    async def nest(depth: int) -> None:
        try:
            async with open_nursery() as nursery:
                if depth:
                    nursery.start_soon(nest, depth - 1)
                else:
                    await sleep(5)
        except Cancelled as exc:
            sources.add(exc.source)
            texts.add(len(repr(exc)))
            raise

    async def main() -> None:
        assert await _end_of(nest, 2000) == (KeyboardInterrupt, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kernel.run(main, clock=Interrupting(autojump_threshold=0))
    assert sources == {"KeyboardInterrupt"}
    assert len(texts) == 1


def test_the_text_of_a_reason_does_not_grow_with_the_depth_of_failures(virtual: Run) -> None:
    """trio#3290"""
    lengths: list[int] = []

    async def nest(depth: int) -> None:
        async with open_nursery() as nursery:
            if depth:
                nursery.start_soon(nest, depth - 1, name="nest")
            nursery.start_soon(witness)
            if not depth:
                await checkpoint()
                raise ZeroDivisionError

    async def witness() -> None:
        try:
            await sleep_forever()
        except Cancelled as exc:
            lengths.append(len(str(exc)))
            raise

    async def main() -> None:
        with pytest.raises(ExceptionGroup):
            await nest(50)

    virtual(main)
    assert len(lengths) == 51
    assert max(lengths) < 200


def test_a_join_takes_two_steps_of_the_parent_however_many_children_end(
    virtual: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[str] = []
    wake = Kernel.wake

    def counting(self: Kernel, task: Any, *args: Any, **kwargs: Any) -> None:
        woken.append(task.name)
        wake(self, task, *args, **kwargs)

    monkeypatch.setattr(Kernel, "wake", counting)

    async def parent() -> None:
        async with open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(checkpoint)

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(parent, name="parent")

    virtual(main)
    assert woken.count("parent") == 1


def test_cancel_shielded_checkpoint_lets_children_of_a_cancelled_nursery_end(virtual: Run) -> None:
    log = []

    async def child() -> None:
        try:
            await sleep_forever()
        finally:
            log.append("child left")

    async def main() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(child)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            await cancel_shielded_checkpoint()
            assert log == ["child left"]
            assert not nursery.child_tasks
            assert len(current_kernel().timers) == 0

    virtual(main)


def test_a_nursery_that_has_outlived_its_task_says_so(virtual: Callable[..., Any]) -> None:
    """It refers to the task weakly, as the task, by the traceback of its error, may refer to it."""

    async def short_lived(kept: list[Nursery]) -> None:
        async with open_nursery() as nursery:
            kept.append(nursery)
            assert nursery.parent_task is kernel.lowlevel.current_task()

    async def main() -> None:
        kept: list[Nursery] = []
        async with open_nursery() as nursery:
            nursery.start_soon(short_lived, kept)
        assert "of nobody" in repr(kept[0])
        with pytest.raises(RuntimeError, match="its task is gone"):
            _ = kept[0].parent_task

    virtual(main)
