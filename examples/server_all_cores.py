"""A server on all cores: several processes, each with a kernel of its own, listen on one port.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/server_all_cores.py

A kernel runs in one thread, and so uses one core. More of them takes more processes; nothing needs to be shared but the
port. With SO_REUSEPORT (`serve_tcp(..., reuse_port=True)`) each process has a listening socket of its own, and the
system deals out the connections. (Linux does. On macOS one of the processes gets them all.)

The processes are `multiprocessing`'s, and ended by SIGTERM, as a supervisor would do it. Points worth a look:

* *The port.* It is to be one that is free. So the parent takes one, with SO_REUSEPORT, and keeps it, without listening.
* *Ending.* SIGTERM cancels the server. It accepts nobody any more, and finishes what is under way. How long that may
  take is said by who cancels, so `drain` is without a limit of its own. Who listens to signals is a service: it stays
  for as long as there is something to be ended.
* *A connection belongs to a process* as soon as it has come in. Those that a process has not accepted when it closes
  its socket are reset. Who cannot have that must lead new connections elsewhere first.
"""

import multiprocessing
import os
import signal
import socket
from functools import partial
from math import inf

import kernel

PROCESSES = max(2, min(os.cpu_count() or 1, 4))


async def answer(stream: kernel.SocketStream) -> None:
    """Tells who answers; to "work", after a while."""
    question = await stream.receive_some()
    if question == b"work":
        await stream.send_all(b"begun ")
        await kernel.sleep(0.3)
    await stream.send_all(f"{os.getpid()}".encode())


async def obey(nursery: kernel.Nursery, task_status: kernel.TaskStatus[None]) -> None:
    """The first SIGTERM leaves ten seconds to what is under way, the second one none."""
    with kernel.open_signal_receiver(signal.SIGTERM) as signals:
        task_status.started()
        for grace in (10, 0):
            await anext(signals)
            nursery.cancel("SIGTERM", grace=grace)


async def serve(port: int) -> None:
    async with kernel.open_nursery() as nursery:
        await nursery.start_service(obey, nursery)
        nursery.start_soon(partial(kernel.serve_tcp, answer, port, host="127.0.0.1", reuse_port=True, drain=inf))


def work(port: int) -> None:
    """What each process runs."""
    kernel.run(serve, port)


# ---- to try it out -----------------------------------------------------------------------------------------


async def ask(port: int, question: bytes) -> kernel.SocketStream:
    stream = await kernel.open_tcp_stream("127.0.0.1", port)
    await stream.send_all(question)
    return stream


async def who_answers(port: int) -> int:
    async with await ask(port, b"who?") as stream:
        return int(b"".join([chunk async for chunk in stream]))


async def main(port: int, processes: list[multiprocessing.process.BaseProcess]) -> None:
    seen: set[int] = set()
    with kernel.fail_after(30):
        while len(seen) < PROCESSES:
            try:
                seen.add(await who_answers(port))
            except ConnectionRefusedError:
                await kernel.sleep(0.01)  # none of them is up yet
    print(f"each process has answered: {seen == {process.pid for process in processes}}")

    async with await ask(port, b"work") as stream:
        print(f"work has {(await stream.receive_some()).decode().strip()}")
        for process in processes:
            process.terminate()  # that is SIGTERM
        pid = int(b"".join([chunk async for chunk in stream]))
        print(f"it was finished all the same: {pid in seen}")


if __name__ == "__main__":
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        processes: list[multiprocessing.process.BaseProcess] = [
            context.Process(target=work, args=(port,)) for _ in range(PROCESSES)
        ]
        for process in processes:
            process.start()
        try:
            kernel.run(main, port, processes)
        except BaseException:
            for process in processes:
                process.kill()
            raise
        finally:
            for process in processes:
                process.join()
    print(f"all have ended well: {all(process.exitcode == 0 for process in processes)}")
