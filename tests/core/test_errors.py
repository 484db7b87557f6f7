"""The exceptions: what `Cancelled` tells, what cannot be done to it, and who derives from whom."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest

import kernel
from kernel import Cancelled, CancelScope, move_on_after, open_nursery, sleep_forever
from kernel.core import errors
from kernel.core.errors import CancelReason, new_cancelled
from kernel.lowlevel import checkpoint, current_task

Run = Callable[..., Any]


async def caught_in(scope: CancelScope) -> Cancelled:
    """The `Cancelled` that a cancel point inside `scope` raises."""
    caught = None
    with scope:
        try:
            await sleep_forever()
        except Cancelled as exc:
            caught = exc
    assert caught is not None
    return caught


# ---- making one ---------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [(), ("stop",), (CancelReason("explicit"),)], ids=["empty", "text", "reason"])
def test_cancelled_cannot_be_made_by_hand_and_the_error_names_the_cure(args: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match=r"cannot be made by hand.*Call \.cancel\(\) on the scope"):
        Cancelled(*args)


def test_raising_the_cancelled_class_is_the_same_type_error() -> None:
    with pytest.raises(TypeError, match="cannot be made by hand"):
        raise Cancelled


def test_a_guessed_keyword_does_not_make_a_cancelled() -> None:
    with pytest.raises(TypeError):
        Cancelled(_key=object())  # type: ignore[call-arg]


def test_a_subclass_of_cancelled_cannot_be_made_by_hand_either() -> None:
    class Mine(Cancelled):
        pass

    with pytest.raises(TypeError, match="cannot be made by hand"):
        Mine()


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda exc: pickle.loads(pickle.dumps(exc))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_cancelled_cannot_be_copied_or_pickled(duplicate: Callable[[object], object]) -> None:
    """No scope would own the copy."""
    with pytest.raises(TypeError, match="Cancelled cannot be"):
        duplicate(new_cancelled(CancelReason("explicit")))


def test_except_exception_lets_cancelled_pass() -> None:
    assert issubclass(Cancelled, BaseException)
    assert not issubclass(Cancelled, Exception)


# ---- what it tells ------------------------------------------------------------------------------


def test_cancelled_tells_who_called_cancel_and_the_reason(virtual: Run) -> None:
    async def main() -> None:
        scope = CancelScope()

        async def boss() -> None:
            boss_text.append(f"<Task 'boss' at {id(current_task()):#x}>")
            scope.cancel(reason="lunch")

        boss_text: list[str] = []
        async with open_nursery() as nursery:
            nursery.start_soon(boss, name="boss")
            exc = await caught_in(scope)
        (who,) = boss_text
        assert exc.source == "explicit"
        assert exc.source_task == who
        assert exc.reason == "lunch"
        assert str(exc) == f"cancelled by explicit, with reason 'lunch', from task {who}"
        assert repr(exc) == f"<Cancelled by explicit, with reason 'lunch', from task {who}>"

    virtual(main)


def test_cancelled_without_a_reason_says_nothing_of_one(virtual: Run) -> None:
    async def main() -> None:
        scope = CancelScope()
        scope.cancel()
        exc = await caught_in(scope)
        assert exc.reason is None
        assert exc.source_task == f"<Task {current_task().name!r} at {id(current_task()):#x}>"
        assert str(exc) == f"cancelled by explicit, from task {exc.source_task}"

    virtual(main)


def test_an_empty_reason_is_a_reason(virtual: Run) -> None:
    async def main() -> None:
        scope = CancelScope()
        scope.cancel("")
        assert (await caught_in(scope)).reason == ""

    virtual(main)


def test_cancelled_by_a_deadline_names_no_task(virtual: Run) -> None:
    async def main() -> None:
        exc = await caught_in(move_on_after(1))
        assert (exc.source, exc.source_task, exc.reason) == ("deadline", None, None)
        assert str(exc) == "cancelled by deadline"
        assert repr(exc) == "<Cancelled by deadline>"

    virtual(main)


def test_cancelled_from_before_the_run_names_no_task(virtual: Run) -> None:
    scope = CancelScope()
    scope.cancel("not today")

    async def main() -> None:
        exc = await caught_in(scope)
        assert (exc.source, exc.source_task, exc.reason) == ("explicit", None, "not today")
        assert str(exc) == "cancelled by explicit, with reason 'not today'"

    virtual(main)


def test_cancelled_by_a_failed_sibling_names_the_sibling_and_its_error(virtual: Run) -> None:
    caught: list[Cancelled] = []

    async def sleeper() -> None:
        try:
            await sleep_forever()
        except Cancelled as exc:
            caught.append(exc)
            raise

    async def failing() -> None:
        await checkpoint()
        raise ZeroDivisionError

    async def main() -> None:
        with pytest.raises(ExceptionGroup):
            async with open_nursery() as nursery:
                nursery.start_soon(sleeper)
                nursery.start_soon(failing, name="clumsy")

    virtual(main)
    (exc,) = caught
    assert exc.source == "nursery"
    assert exc.source_task is not None
    assert re.fullmatch(r"<Task 'clumsy' at 0x[0-9a-f]+>", exc.source_task)
    assert exc.reason == "it ended with ZeroDivisionError"


@pytest.mark.parametrize("source", ["deadline", "explicit", "nursery", "KeyboardInterrupt", "shutdown"])
def test_the_text_begins_with_the_source(source: Any) -> None:
    exc = new_cancelled(CancelReason(source))
    assert (exc.source, exc.source_task, exc.reason) == (source, None, None)
    assert str(exc) == f"cancelled by {source}"


def test_main_that_ends_cancels_what_it_left_behind_as_a_shutdown(virtual: Run) -> None:
    sources: list[str] = []

    async def left_behind() -> None:
        try:
            await sleep_forever()
        except Cancelled as exc:
            sources.append(exc.source)
            raise

    async def main() -> None:
        nursery = current_task().parent_nursery
        assert nursery is not None
        nursery.start_soon(left_behind)
        await checkpoint()

    virtual(main)
    assert sources == ["shutdown"]


@pytest.mark.parametrize("name", ["source", "source_task", "reason"])
def test_what_cancelled_tells_is_read_only(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(new_cancelled(CancelReason("explicit")), name, "other")


def test_the_text_of_cancelled_is_built_only_when_asked_for(virtual: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most are never printed, and a reason may be long (trio#3232)."""
    built: list[str] = []
    text = CancelReason.__str__
    monkeypatch.setattr(CancelReason, "__str__", lambda self: built.append(self.source) or text(self))

    async def main() -> None:
        exc = await caught_in(move_on_after(1))
        assert built == []
        assert str(exc) == "cancelled by deadline"
        assert built == ["deadline"]

    virtual(main)


def test_each_cancel_point_raises_a_cancelled_of_its_own_that_tells_the_same(virtual: Run) -> None:
    """One exception raised twice would carry the traceback of both places."""

    async def main() -> None:
        caught = []
        with CancelScope() as scope:
            scope.cancel("once")
            for _ in range(2):
                try:
                    await checkpoint()
                except Cancelled as exc:
                    caught.append(exc)
        first, second = caught
        assert first is not second
        assert str(first) == str(second)

    virtual(main)


# ---- the family ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, BaseException)],
)
def test_every_error_is_public_under_the_name_it_has(name: str) -> None:
    assert getattr(kernel, name) is getattr(errors, name)
    assert name in kernel.__all__
    assert getattr(errors, name).__name__ == name
    assert getattr(errors, name).__doc__


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("TooSlowError", Exception),
        ("WouldBlock", Exception),
        ("BusyResourceError", Exception),
        ("ClosedResourceError", Exception),
        ("BrokenResourceError", Exception),
        ("EndOfChannel", Exception),
        ("RunFinishedError", RuntimeError),
        ("KernelInternalError", Exception),
        ("Cancelled", BaseException),
    ],
)
def test_errors_have_the_bases_that_trio_gives_them(name: str, base: type[BaseException]) -> None:
    assert getattr(errors, name).__bases__ == (base,)
