"""One function over many values, each of which keeps a processor busy: on one machine, and on a cluster.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/cpu_map.py

It counts the primes below 200,000, one part per call, in worker processes of its own. With `dask` behind it, it does so
on a cluster of Dask's, which is started on this machine for the time being:

    .venv/bin/pip install -e '.[distributed]'
    .venv/bin/python examples/cpu_map.py dask

Where the parts are counted is decided in one line, `call = ...`. Everything else is the same: the calls run side by
side, errors come back, a cancellation goes there, and the kernel's other tasks stay awake meanwhile.
"""

import sys
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from functools import partial

import kernel

LIMIT = 200_000
STEP = 25_000


def count_primes(start: int) -> int:
    """What takes the time. It knows nothing of kernels."""
    return sum(all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(max(start, 2), start + STEP))


@contextmanager
def dask_cluster() -> Iterator[Executor]:
    """An executor that leads to two processes on this machine. `Client("tcp://...")` alone leads to a real cluster."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        yield client.get_executor()


async def main(executor: Executor | None) -> None:
    call: Callable[..., Awaitable[int]]
    call = partial(kernel.run_in, executor) if executor is not None else kernel.to_process.run_sync

    ticks: list[float] = []
    async with kernel.open_nursery() as nursery:
        nursery.start_soon(tick, ticks)
        counts = await kernel.map_concurrently(partial(call, count_primes), range(0, LIMIT, STEP))
        nursery.cancel_scope.cancel()
    print("primes in each part:", *counts)
    print(f"below {LIMIT:,} there are {sum(counts):,}")
    print("awake meanwhile:", len(ticks) > 1)


async def tick(ticks: list[float]) -> None:
    while True:
        ticks.append(kernel.current_time())
        await kernel.sleep(0.01)


if __name__ == "__main__":
    with dask_cluster() if sys.argv[1:] == ["dask"] else nullcontext() as executor:
        kernel.run(main, executor)
