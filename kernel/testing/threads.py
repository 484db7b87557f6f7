"""Waiting until no thread works for the run any more."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from ..core.task import current_kernel
from ..core.traps import consume_budget, operation
from ..parking import ParkingLot
from ..threads.calls import Call, _State

__all__ = ["active_thread_count", "wait_all_threads_completed"]


class _Calls(dict[Call, None]):
    """The calls that go on in threads, as the run keeps them; and tasks that want to know when one has ended."""

    def __init__(self, calls: dict[Call, None]) -> None:
        super().__init__(calls)
        self.one_less = ParkingLot("the run's threads to complete")

    def __delitem__(self, call: Call) -> None:
        super().__delitem__(call)
        self.one_less.unpark_all()


def active_thread_count() -> int:
    """How many calls of `to_thread.run_sync` go on in this run, also those that were abandoned. Not a checkpoint.

    Raises RuntimeError outside the kernel.
    """
    state: _State | None = current_kernel("active_thread_count()").locals.get(_State)
    return len(state.calls) if state is not None else 0


@operation
def wait_all_threads_completed() -> Generator[Any, Any, None]:
    """Wait until no call of `to_thread.run_sync` goes on in this run, nor one that was abandoned.

    What the calls have left for tasks to do may start others. To wait until really nothing happens any more:

        while True:
            await wait_all_threads_completed()
            await wait_all_tasks_blocked()
            if active_thread_count() == 0:
                break

    Always a cancel point; a schedule point if it waits. A cancellation leaves nothing behind. Raises RuntimeError
    outside the kernel.
    """
    if active_thread_count() == 0:
        yield from consume_budget()
    while active_thread_count():
        state: _State = current_kernel().locals[_State]
        if not isinstance(state.calls, _Calls):  # from now on; a run in which nobody waits need not care
            state.calls = _Calls(state.calls)
        yield from state.calls.one_less.park()
