"""The same call on a cluster: `run_in` with Dask, on real worker processes of which some are killed; Ray's futures.

Skipped where Dask is not installed (`pip install -e '.[distributed]'`); .ci/run installs it. A cluster takes seconds to
come up, so the tests are few and long.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from leftovers import idle_workers_leave, resource_tracker_leaves
from process_jobs import die, fail, tell, tell_and_wait

import kernel
from kernel import run_in, to_thread, wait_future
from kernel.testing import wait_all_tasks_blocked

__all__ = ["idle_workers_leave", "resource_tracker_leaves"]

LIVES = 1
"""How often a piece of work may take its worker with it, and is tried again."""


@pytest.fixture
def client(
    idle_workers_leave: None,
    resource_tracker_leaves: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[Any]:
    """A client of a cluster of two worker processes on this machine. Afterwards nothing of it is left."""
    dask = pytest.importorskip("dask", reason="needs the extra 'distributed'")
    distributed = pytest.importorskip("distributed", reason="needs the extra 'distributed'")

    # Each worker imports the main module, and pytest is slow.
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    settings = {"distributed.scheduler.allowed-failures": LIVES, "temporary-directory": str(tmp_path)}
    # Dask keeps one thread for the life of the program. It gets another one for this test.
    with ThreadPoolExecutor(1) as offload, dask.config.set(settings):
        monkeypatch.setattr(distributed.utils, "_offload_executor", offload)
        with (
            distributed.LocalCluster(
                n_workers=2,
                threads_per_worker=1,
                processes=True,
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            client.run(sys.path.append, str(Path(__file__).parent))
            yield client


def die_at_first(marker: Path) -> int:
    """Take the worker with it, unless it did so before."""
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def keys_at_worker(dask_worker: Any) -> list[str]:
    return list(dask_worker.state.tasks)


def test_a_dask_cluster_does_what_an_executor_does(client: Any, tmp_path: Path) -> None:
    pipes = [(tmp_path / f"begun{i}", tmp_path / f"go{i}") for i in range(2)]
    for pipe in (pipe for pair in pipes for pipe in pair):
        os.mkfifo(pipe)
    executor = client.get_executor(pure=False)

    async def main() -> None:
        await results()
        await errors()
        await pending_work_is_cancelled()
        await nobody_else_is_disturbed()

    async def results() -> None:
        assert await kernel.gather(*[partial(run_in, executor, pow, 2, i) for i in range(20)]) == [
            2**i for i in range(20)
        ]
        assert await run_in(executor, os.getpid) != os.getpid()

    async def errors() -> None:
        with pytest.raises(LookupError, match="lost"):
            await run_in(executor, fail, LookupError("lost"))

    async def pending_work_is_cancelled() -> None:
        """Two workers are kept busy. What is queued behind them is cancelled with its task, at the scheduler too."""
        async with kernel.open_nursery() as nursery:
            for begun, go in pipes:
                nursery.start_soon(run_in, executor, tell_and_wait, begun, go)
                await to_thread.run_sync(begun.read_text)
            future = executor.submit(tell, tmp_path / "called", "called")
            waiter = nursery.spawn(wait_future, future)
            await wait_all_tasks_blocked()
            assert not future.done()
            waiter.cancel()
            with pytest.raises(kernel.TaskCancelled):
                await waiter
            assert future.cancelled()
            while any(key.startswith("tell-") for keys in client.run(keys_at_worker).values() for key in keys):
                pass  # the word is on its way to the worker
            for _, go in pipes:
                await to_thread.run_sync(tell, go, "go")

    async def nobody_else_is_disturbed() -> None:
        assert await run_in(executor, pow, 2, 10) == 1024
        assert not (tmp_path / "called").exists()

    kernel.run(main)


def test_work_that_kills_its_worker_is_tried_again_on_another_until_dask_gives_up(client: Any, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    executor = client.get_executor(pure=False)

    async def main() -> None:
        before = set(client.run(os.getpid).values())
        survivor = await run_in(executor, die_at_first, tmp_path / "marker")
        assert (tmp_path / "marker").exists()
        assert len(before - set(client.run(os.getpid).values())) == 1, "one worker was killed, and one lives on"
        assert survivor in client.run(os.getpid).values()
        with pytest.raises(distributed.KilledWorker):
            await run_in(executor, die, signal.SIGKILL)
        assert await run_in(executor, pow, 2, 10) == 1024

    kernel.run(main)


def test_futures_of_dasks_own_kind_are_refused_with_the_cure(client: Any) -> None:
    with pytest.raises(TypeError, match=r"client\.get_executor\(\)"):
        kernel.run(run_in, client, pow, 2, 10)


# ---- Ray -------------------------------------------------------------------------------------------------


class ObjectRef:
    """Stands in for Ray's: `future()` makes a plain Future, which a thread of Ray's settles. As with Ray's, nobody says
    when the work begins, so such a future can always be cancelled, and the work does not hear of it.
    """

    def __init__(self, function: Any, *args: Any) -> None:
        self._future: Future[Any] = Future()
        self.thread = threading.Thread(target=self._work, args=(function, *args))
        self.thread.start()

    def _work(self, function: Any, *args: Any) -> None:
        try:
            result = function(*args)
        except BaseException as error:
            self._future.set_exception(error)
        else:
            if not self._future.cancelled():
                self._future.set_result(result)

    def future(self) -> Future[Any]:
        return self._future


def test_a_future_as_ray_gives_it_out_is_waited_for_and_cancelled() -> None:
    async def main() -> None:
        ref = ObjectRef(pow, 2, 10)
        assert await wait_future(ref.future()) == 1024
        ref.thread.join()

        go = threading.Event()
        ref = ObjectRef(go.wait)
        async with kernel.open_nursery() as nursery:
            nursery.start_soon(wait_future, ref.future())
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert ref.future().cancelled()
        with pytest.raises(concurrent.futures.CancelledError):
            await wait_future(ref.future())
        go.set()
        ref.thread.join()

    kernel.run(main)


def test_rays_own_kind_is_refused_with_the_cure() -> None:
    ref = ObjectRef(abs, 1)
    with pytest.raises(TypeError, match=r"ref\.future\(\)"):
        kernel.run(wait_future, ref)  # type: ignore[arg-type]
    ref.thread.join()
