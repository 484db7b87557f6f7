"""The workloads on uvloop: asyncio's, on uvloop's event loop."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any

import uvloop
from workloads_asyncio import *  # noqa: F403
from workloads_asyncio import memory, noop  # noqa: F401


def run(async_fn: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
    return uvloop.run(async_fn(*args))


def run_noop(n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        uvloop.run(noop())
    return perf_counter() - start
