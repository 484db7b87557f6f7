"""Tools for testing programs that run in the kernel."""

from .clock import MockClock
from .idle import wait_all_tasks_blocked

__all__ = ["MockClock", "wait_all_tasks_blocked"]
