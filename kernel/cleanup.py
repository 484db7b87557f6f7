"""Cleaning up while being cancelled: `with cleanup(5): await connection.aclose()`.

In a cancelled scope every cancel point raises, so a `finally` that must wait needs a shield; and a shield needs a
deadline, or one peer that does not answer holds up the whole program. `cleanup(seconds)` is both, in one line.

How long a cleanup may take is known in two places. Who cleans up knows what it is worth: `cleanup(5)`. Who cancels
knows how much time there is: `scope.cancel(grace=2)`. The earlier of the two ends counts:

                  cancel(grace=2)                 + 2 s
    outside       ----+------------------------------+-------------
    work              x Cancelled                    :
    cleanup(5)        +==============================x Cancelled
    cleanup(1)        +==============x Cancelled     :
    shield=True       +=========================================>

So a cancellation has two phases. The first reaches all code but that behind a shield. The second, after the grace,
reaches into the `cleanup` blocks. It does not break the shields of `shield=True`: those are for the few lines whose
interruption would leave something broken, such as taking a lock back.

Rules:

* `cancel()` without a grace leaves each cleanup its own time, in full.
* A cleanup that is entered later, while unwinding, has what is left of the grace.
* A cleanup within a cleanup ends with the outer one, or before.

It need not be a `finally`. If a server handles each request in a `cleanup(inf)` block, `cancel(grace=10)` means: no new
requests, and ten seconds for those under way.
"""

from __future__ import annotations

from math import inf
from typing import ClassVar

from .core.scopes import CancelScope

__all__ = ["cleanup"]


class _Cleanup(CancelScope):
    """A shield with a deadline, which `hasten` may bring forward."""

    __slots__ = ()
    soft: ClassVar[bool] = True

    def __enter__(self) -> CancelScope:
        super().__enter__()
        end = _end_of_grace(self._parent)
        if end < self._deadline:
            self._set_deadline(end)
        return self


def cleanup(seconds: float) -> CancelScope:
    """A scope for work that must be done even though, or because, one is being cancelled.

    A cancellation from outside does not reach into the block, for `seconds` from entering. Then the block is cancelled;
    it is left quietly, as with `move_on_after`, and an exception that was on its way goes on. If a scope around it is
    or was cancelled with a `grace`, the time ends with that. `inf` leaves it to the grace alone.

    Entering and leaving are not checkpoints. Cost: as a timeout, and proportional to the scopes it is in.

    Returns:
        the scope. `cancelled_caught` says afterwards whether the time was too short.

    Raises:
        ValueError: `seconds` is negative or NaN.
        RuntimeError: entered outside a task.
    """
    return _Cleanup(relative_deadline=seconds, shield=True)


def _end_of_grace(scope: CancelScope | None) -> float:
    """When cleanup inside `scope` must be over, by all that is around it up to the first hard shield."""
    end = inf
    while scope is not None:
        end = min(end, scope._grace_end)
        if scope._shield:
            if not scope.soft:
                break
            end = min(end, scope._deadline)
        scope = scope._parent
    return end
