"""What the tests here have in common: a scene, of which all schedules are run, with each task cancelled at each point.

    class TwoTasks(Scene):
        def __init__(self):
            self.lock = kernel.Lock()

        async def ann(self): ...
        async def ben(self): ...

        def between_steps(self): ...
        def at_the_end(self): ...

    explored(TwoTasks)

A scene is made anew for each run. Its async methods without an underscore are its tasks, in the order in which they
stand. `between_steps` is what must be true between any two steps, `at_the_end` when all is over; both raise, or return
False, if it is not.

By default every schedule is run without a cancellation, and with each task alone cancelled at each place of it. So a
test that passes says: two or three tasks that do this may be run in any order, whoever is cancelled when.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any, Literal

import pytest

import kernel
from kernel.core.task import START, Task
from kernel.testing import Exploration, explore

__all__ = ["Scene", "committed", "explored", "large"]

LONG = os.environ.get("KERNEL_TEST_LONG", "") not in ("", "0")


class Scene:
    """One run's state, its tasks, and what must be true of them."""

    def between_steps(self) -> object:
        """What is true between any two steps."""

    def at_the_end(self) -> object:
        """What is true when all is over."""


def explored(
    make: Callable[[], Scene],
    *,
    children: bool = False,
    deadlines: Literal["idle", "any time"] = "idle",
) -> Exploration:
    """Run all schedules of a scene; fail if one does. With `children`, those that its tasks have started are cancelled
    too, each alone.
    """
    scene = make()
    names = [name for name, _ in _tasks(scene)]

    async def program() -> None:
        nonlocal scene
        scene = make()
        async with kernel.open_nursery() as nursery:
            for name, task in _tasks(scene):
                nursery.start_soon(task, name=name)

    result = explore(
        program,
        cancel=lambda task: children or task.name in names,
        invariant=lambda: scene.between_steps(),
        check=lambda: scene.at_the_end(),
        deadlines=deadlines,
    )
    assert result.complete, f"there are more than {result.schedules:,} schedules"
    return result


def large(make: Callable[[], Scene]) -> Any:
    """A parameter of a test that is left out but in the long mode."""
    return pytest.param(make, marks=pytest.mark.skipif(not LONG, reason="takes long; KERNEL_TEST_LONG=1"))


def _tasks(scene: Scene) -> list[tuple[str, Callable[[], Any]]]:
    """In the order in which they were written."""
    found = {
        name: getattr(scene, name)
        for kind in reversed(type(scene).__mro__)
        for name, member in vars(kind).items()
        if inspect.iscoroutinefunction(member) and not name.startswith("_")
    }
    return list(found.items())


def committed(task: Task) -> bool:
    """Whether the task was woken and has not run yet: it has been handed what it waited for.

    A task that was interrupted, or queues at a checkpoint, has been handed nothing.
    """
    return task.trap is None and task.step not in (None, START, kernel.Cancelled)
