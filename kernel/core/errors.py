"""Every exception the kernel raises on purpose, in one place.

The names and meanings are trio's, so that an `except` clause moves over unchanged. `Cancelled` is the one that is not
an error: it says *please leave*, and derives from `BaseException` so that `except Exception` lets it pass. Misuse gets
none of these but a `RuntimeError`, `TypeError` or `ValueError` that says what to write instead.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, NoReturn

Source = Literal["deadline", "explicit", "nursery", "KeyboardInterrupt", "shutdown"]


class CancelReason(NamedTuple):
    """Who cancelled a scope, and why. Made once per cancelled scope, shared by every `Cancelled` it causes.

    It keeps the *name* of the cancelling task and not the task: a reason lives as long as the tracebacks that show it,
    and must not keep a finished task's frames alive or close a reference cycle through them.
    """

    source: Source
    task_name: str | None = None
    task_id: int = 0
    reason: str | None = None

    @property
    def source_task(self) -> str | None:
        """The task that cancelled, as text; None for a deadline or a call from outside any task."""
        if self.task_name is None:
            return None
        return f"<Task {self.task_name!r} at {self.task_id:#x}>"

    def __str__(self) -> str:
        text: str = self.source
        if self.reason is not None:
            text += f", with reason {self.reason!r}"
        if self.task_name is not None:
            text += f", from task {self.source_task}"
        return text


class Cancelled(BaseException):
    """Raised at a cancel point inside a cancelled scope. Let it pass: the scope that was cancelled catches it.

    A task that swallows it is not free: cancellation is a *state* of the scope, so the next cancel point raises it
    again. To clean up, use `finally`, with a shielded scope around whatever must wait.

    Attributes:
        source: "deadline", "explicit" (`cancel()` was called), "nursery" (a sibling failed), "KeyboardInterrupt"
            or "shutdown" (the run is ending).
        source_task: the task that called `cancel()`, as text, or None.
        reason: what was passed to `cancel(reason=...)`, or None.

    The text is built when it is asked for: most are never printed. Only the kernel makes one; calling the class is a
    `TypeError` (cancel a scope instead).
    """

    __slots__ = ("_why",)
    _why: CancelReason

    def __init__(self, *args: object) -> None:
        raise TypeError(
            "Cancelled cannot be made by hand: no scope would own it. Call .cancel() on the scope that should end."
        )

    @property
    def source(self) -> Source:
        return self._why.source

    @property
    def source_task(self) -> str | None:
        return self._why.source_task

    @property
    def reason(self) -> str | None:
        return self._why.reason

    def __reduce__(self) -> NoReturn:
        raise TypeError("Cancelled cannot be pickled or copied: it belongs to one scope of one run")

    def __str__(self) -> str:
        return f"cancelled by {self._why}"

    def __repr__(self) -> str:
        return f"<Cancelled by {self._why}>"


def new_cancelled(why: CancelReason) -> Cancelled:
    """The kernel's own way to make a `Cancelled`: without `__init__`, which refuses."""
    cancelled = BaseException.__new__(Cancelled)
    cancelled._why = why
    return cancelled


class TooSlowError(Exception):
    """Raised by `fail_after` and `fail_at` when their time ran out."""


class WouldBlock(Exception):
    """Raised by the `*_nowait` functions when they would have to wait."""


class BusyResourceError(Exception):
    """Raised when two tasks use something at once that only one can, such as waiting to read the same fd."""


class ClosedResourceError(Exception):
    """Raised when something is used after *this* end of it was closed, or closed while it was being waited on."""


class BrokenResourceError(Exception):
    """Raised when something stopped working for a reason outside this task's control, such as a peer gone away."""


class EndOfChannel(Exception):
    """Raised when receiving from a channel that is closed at the other end and has nothing more to give."""


class RunFinishedError(RuntimeError):
    """Raised when a finished run is asked to do something."""


class Deadlock(RuntimeError):
    """Nothing can ever happen again in this run. Raised by `kernel.run`; the text says who waits for whom."""


class KernelInternalError(Exception):
    """The kernel or one of its drivers broke: a bug, not a misuse. The run is over; the cause is in `__cause__`."""
