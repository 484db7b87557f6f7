"""Running a function in another process: `await kernel.to_process.run_sync(fn, *args)`, for what computes.

A thread does not help a function that computes: the interpreter's lock lets one of them go on at a time. A process has
an interpreter of its own. What it costs: function, arguments and result are pickled, so the function must be one that
the other side can import; and the first call takes 50 to 100 ms, while the process starts. As always with
`multiprocessing`, the program's main module is imported there too, and its main part belongs under
`if __name__ == "__main__":`.

Each worker is a `ProcessPoolExecutor` of one process, so that one can be killed without the others. They are started
afresh (`spawn`), inherit no file or lock, are used again within the run, and are gone when it ends. They ignore Ctrl-C,
which is the kernel's business, and do not outlive this process. For a pool of your own, or a cluster, use
`kernel.run_in(executor, fn, *args)`.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from math import inf
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, Final, TypeVar

from .core.errors import Cancelled
from .core.scopes import CancelScope
from .core.task import current_kernel
from .core.traps import checkpoint_if_cancelled, operation
from .inbox import RunVar, when_run_ends
from .sync import CapacityLimiter
from .threads.executors import wait_future
from .to_thread import run_sync as run_sync_in_thread

__all__ = ["current_default_process_limiter", "run_sync"]

T = TypeVar("T")

PATIENCE: Final = 1.0
"""Seconds that workers have for leaving when the run ends, before they are killed."""

_limiter: RunVar[CapacityLimiter] = RunVar("default process limiter")
_workers: RunVar[_Workers] = RunVar("worker processes")


def current_default_process_limiter() -> CapacityLimiter:
    """The limiter of this run's `run_sync`: as many processes at once as there are processors.

    Raises RuntimeError outside the kernel.
    """
    current_kernel("current_default_process_limiter()")
    return _limiter.get_or_make(lambda: CapacityLimiter(os.cpu_count() or 1))


@operation
def run_sync(
    sync_fn: Callable[..., T], *args: Any, kill_on_cancel: bool = False, limiter: CapacityLimiter | None = None
) -> Generator[Any, Any, T]:
    """Call `sync_fn(*args)` in a worker process, and return what it returns or raise what it raises.

    Args:
        kill_on_cancel: on cancellation, kill the process, and leave when it is dead. Otherwise the task stays until the
            function has returned, and sees the cancellation at its next cancel point.
        limiter: bounds how many processes work at once; by default `current_default_process_limiter()`.

    Always a cancel point, before the function is called, and then it was not; always a schedule point. Context
    variables are not carried. Cost: 100 to 200 us once the process is there, and the pickling, which is done in the
    kernel's thread.

    Raises:
        BaseException: what the function raises, with the traceback in the other process as its `__cause__`.
        concurrent.futures.process.BrokenProcessPool: the process has died. The next call gets another one.
        pickle.PicklingError, AttributeError, TypeError: function, arguments, result or error cannot be pickled, or not
            be found on the other side.
        TypeError: `sync_fn` is not callable.
        RuntimeError: used outside the kernel.
    """
    current_kernel("to_process.run_sync()")
    if not callable(sync_fn):
        raise TypeError(f"to_process.run_sync() wants a function and its arguments, not {sync_fn!r}")
    borrower = object()
    limiter = limiter if limiter is not None else current_default_process_limiter()
    yield from limiter.acquire_on_behalf_of(borrower)
    try:
        job = pickle.dumps((sync_fn, args))
        workers = _workers.get_or_make(_Workers)
        worker: _Worker = yield from workers.take()
        try:
            result = yield from worker.do(job, kill_on_cancel)
        except (Cancelled, BrokenExecutor):
            yield from workers.kill(worker)
            raise
        finally:
            workers.put_back(worker)
        return pickle.loads(result)  # type: ignore[no-any-return]
    finally:
        limiter.release_on_behalf_of(borrower)


class _Workers:
    """The worker processes of one run."""

    def __init__(self) -> None:
        self._all: set[_Worker] = set()
        self._idle: list[_Worker] = []  # set(_idle) <= _all
        self._no_limit = CapacityLimiter(inf)  # what is done in threads here must not wait for the program's threads
        when_run_ends(current_kernel(), self.close)

    @operation
    def take(self) -> Generator[Any, Any, _Worker]:
        """The one that became idle last, or a new one."""
        while self._idle:
            worker = self._idle.pop()
            if not wait([worker.process.sentinel], timeout=0):  # unlike is_alive(), this does not mind who reaps it
                return worker
            yield from self.kill(worker)
        worker = yield from run_sync_in_thread(_Worker, limiter=self._no_limit)
        self._all.add(worker)
        return worker

    def put_back(self, worker: _Worker) -> None:
        if worker in self._all:
            self._idle.append(worker)

    @operation
    def kill(self, worker: _Worker) -> Generator[Any, Any, None]:
        """Kill it if it is alive, and wait until it is gone."""
        self._all.remove(worker)
        worker.process.kill()
        with CancelScope(shield=True):
            yield from run_sync_in_thread(worker.executor.shutdown, limiter=self._no_limit)

    def close(self) -> None:
        """The run is over. Ask all to leave, and kill those that do not. It takes some 10 ms."""
        closing = {worker: threading.Thread(target=worker.executor.shutdown) for worker in self._all}
        for thread in closing.values():
            thread.start()
        end = time.monotonic() + PATIENCE
        for worker, thread in closing.items():
            thread.join(max(0.0, end - time.monotonic()))
            worker.process.kill()  # the dead don't mind
            thread.join()


class _Worker:
    """One process, and the executor that feeds it. Made in a thread, as it takes some ms."""

    def __init__(self) -> None:
        context = _Context()
        self.executor = ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_begin)
        self._started: Future[int] | None = self.executor.submit(int)  # this starts the process
        self.process = context.process

    @operation
    def do(self, job: bytes, kill_on_cancel: bool) -> Generator[Any, Any, bytes]:
        """Have it done. If this raises Cancelled or BrokenExecutor, the process is of no use any more."""
        if self._started is not None:
            try:
                yield from wait_future(self._started)
            except BrokenExecutor as error:
                error.add_note(
                    "The process died while it started; it may have said why on stderr. The usual cause: it imports "
                    'the main module, whose main part must stand under `if __name__ == "__main__":`.'
                )
                raise
            self._started = None
        yield from checkpoint_if_cancelled()  # it may have come while the task had its token, or process, already
        result: bytes = yield from wait_future(self.executor.submit(_do, job), abandon_on_cancel=kill_on_cancel)
        return result


class _Context(SpawnContext):
    """What the executor makes its queues and its process with. Keeps the process, so that it can be killed."""

    process: SpawnProcess

    def Process(self, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]
        self.process = SpawnProcess(**kwargs)
        return self.process


# ---- in the other process ---------------------------------------------------------------------------


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(job: bytes) -> bytes:
    """Unpickle, call, and pickle, here, where an error is one of the call. In the executor it would be its end."""
    function, args = pickle.loads(job)
    try:
        return pickle.dumps(function(*args))
    except BaseException as error:
        pickle.loads(pickle.dumps(error))  # some can be pickled, but not back
        raise
