"""Tools for testing programs that run in the kernel."""

from .clock import MockClock
from .explore import Exploration, InvariantError, ScheduleFailure, TooManySteps, explore, replay
from .idle import wait_all_tasks_blocked

__all__ = [
    "Exploration",
    "InvariantError",
    "MockClock",
    "ScheduleFailure",
    "TooManySteps",
    "explore",
    "replay",
    "wait_all_tasks_blocked",
]
