"""`unwrap_single` and `raise_single`: the one error in a group."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import TracebackType

import pytest

import kernel
from kernel import raise_single, unwrap_single


async def fail() -> None:
    raise ValueError("lid stuck")


async def fail_with_history() -> None:
    try:
        raise KeyError("first")
    except KeyError:
        raise ValueError("second") from OSError("cause")


def frames(traceback: TracebackType | None) -> list[str]:
    names = []
    while traceback is not None:
        names.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    return names


# ---- unwrap_single -----------------------------------------------------------------------------------


def test_unwrap_single_finds_the_one_error_at_any_depth() -> None:
    error = ValueError()
    group: BaseExceptionGroup[BaseException] = BaseExceptionGroup("", [error])
    for _ in range(2000):
        assert unwrap_single(group) is error
        group = BaseExceptionGroup("", [group])


@pytest.mark.parametrize(
    "error", [ValueError(), KeyboardInterrupt(), ExceptionGroup("", [ValueError(), KeyError()])], ids=repr
)
def test_unwrap_single_returns_everything_else_as_it_is(error: BaseException) -> None:
    assert unwrap_single(error) is error


def test_unwrap_single_stops_at_the_first_group_of_several() -> None:
    several = ExceptionGroup("", [ValueError(), KeyError()])
    assert unwrap_single(ExceptionGroup("", [ExceptionGroup("", [several])])) is several


def test_unwrap_single_changes_nothing() -> None:
    error = ValueError()
    error.__cause__, error.__context__ = OSError(), KeyError()
    before = (error.__cause__, error.__context__, error.__traceback__, error.__suppress_context__)
    unwrap_single(ExceptionGroup("", [error]))
    assert (error.__cause__, error.__context__, error.__traceback__, error.__suppress_context__) == before


# ---- raise_single ------------------------------------------------------------------------------------


def test_raise_single_raises_the_one_error_of_a_nursery_with_its_own_history() -> None:
    async def main() -> None:
        with raise_single():
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(fail_with_history)

    with pytest.raises(ValueError, match="second") as caught:
        kernel.run(main)
    assert isinstance(caught.value.__cause__, OSError)
    assert isinstance(caught.value.__context__, KeyError)
    names = frames(caught.value.__traceback__)
    assert names[-3:] == ["main", "__exit__", "fail_with_history"]


def test_raise_single_gives_an_error_without_context_that_of_the_group() -> None:
    with pytest.raises(ValueError) as caught:
        try:
            raise KeyError("no such page")
        except KeyError:
            with raise_single():
                raise ExceptionGroup("", [ExceptionGroup("", [ValueError()])])  # noqa: B904
    assert isinstance(caught.value.__context__, KeyError)
    assert caught.value.__cause__ is None


def test_raise_single_keeps_from_none() -> None:
    async def main() -> None:
        async def quiet() -> None:
            try:
                raise KeyError
            except KeyError:
                raise ValueError from None

        with raise_single():
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(quiet)

    with pytest.raises(ValueError) as caught:
        kernel.run(main)
    assert caught.value.__suppress_context__


def test_raise_single_lets_several_errors_and_everything_else_pass_as_they_are() -> None:
    several = ExceptionGroup("both", [ValueError(), KeyError()])
    nested = ExceptionGroup("", [several])
    for error in (several, nested, ValueError(), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, raise_single():
            raise error
        assert caught.value is error
    with raise_single():
        pass


def test_raise_single_lets_cancelled_pass_to_its_scope() -> None:
    async def main() -> bool:
        with kernel.move_on_after(0) as scope, raise_single():
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(kernel.sleep_forever)
        return scope.cancelled_caught

    assert kernel.run(main)


def test_raise_single_serves_generators_and_many_blocks() -> None:
    single = raise_single()

    def body(nursery: kernel.Nursery) -> Iterator[None]:
        nursery.start_soon(fail)
        yield from kernel.sleep(0)

    def main() -> Iterator[None]:
        for _ in range(2):
            with pytest.raises(ValueError, match="lid"), single:
                yield from kernel.within(kernel.open_nursery(), body)

    kernel.run(main)  # type: ignore[arg-type]


def test_raise_single_leaves_no_garbage_to_collect() -> None:
    async def scene() -> None:
        try:
            with raise_single():
                async with kernel.open_nursery() as nursery:
                    nursery.start_soon(fail)
        except ValueError:
            pass

    async def main() -> None:
        await scene()
        await kernel.sleep(0)
        gc.collect()
        for _ in range(5):
            await scene()
        await kernel.sleep(0)
        assert gc.collect() == 0

    gc.disable()
    try:
        kernel.run(main)
    finally:
        gc.enable()
