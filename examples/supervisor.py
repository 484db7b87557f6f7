"""A supervisor: it starts programs, starts them again when they end, gives up on hopeless ones, and leaves none behind.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/supervisor.py

What it shows:

* A service is a task around a process. The task decides what happens when the process ends; a failure is data here.
* `await nursery.start(run_process, ...)` gives the process while it runs. Whatever ends the block of the nursery, the
  process has ended after it.
* Who fails again and again gets longer pauses, and in the end no further chance.
* `kill_tree=True`: one of the services has a child of its own, which would outlive it.
* To shut down is to cancel. `grace=2` bounds how long the services may take to end.

POSIX only, for the shell scripts.
"""

import os
import signal
import subprocess
from functools import partial

import kernel

TRIES = 3
"""So many failures in a row are the end."""

SCRIPTS = {
    "steady": "echo ready; exec sleep 1000",
    "flaky": "test $ATTEMPT -ge 3 || exit 1; echo ready; exec sleep 1000",
    "hopeless": "exit 3",
    "family": "sleep 1000 & echo ready; wait",
}


class Service:
    """A program that ought to run. It says something on its stdout when it is up."""

    def __init__(self, name: str, script: str) -> None:
        self.name = name
        self.script = script
        self.attempt = 0
        self.process: kernel.Process | None = None
        self.up = kernel.Event()
        self.log: list[str] = []

    async def keep_running(self) -> None:
        failures = 0
        while failures < TRIES:
            if await self.run_once():
                failures = 0
            failures += 1
            await kernel.sleep(0.01 * 2**failures)
        self.log.append("given up")
        self.up.set()  # nobody needs to wait for it

    async def run_once(self) -> bool:
        """Run the program until it ends. Returns whether it ever was up."""
        self.attempt += 1
        was_up = False
        command = partial(
            kernel.run_process,
            ["sh", "-c", self.script],
            env=os.environ | {"ATTEMPT": str(self.attempt)},
            stdout=subprocess.PIPE,
            check=False,
            kill_tree=True,
        )
        try:
            async with kernel.open_nursery() as nursery:
                self.process = await nursery.start(command)
                async with self.process.stdout as stdout:
                    if await stdout.receive_some():
                        was_up = True
                        self.log.append(f"up, attempt {self.attempt}")
                        self.up.set()
                    await self.process.wait()
        finally:
            self.log.append(how_it_ended(self.process))
        return was_up


def how_it_ended(process: kernel.Process) -> str:
    code = process.returncode
    return f"ended with status {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"


async def main() -> None:
    services = {name: Service(name, script) for name, script in SCRIPTS.items()}
    async with kernel.open_nursery() as nursery:
        for service in services.values():
            nursery.start_soon(service.keep_running, name=service.name)
        for service in services.values():
            await service.up.wait()

        steady = services["steady"]
        steady.up = kernel.Event()
        steady.process.kill()  # an accident
        await steady.up.wait()

        nursery.cancel_scope.cancel("closing time", grace=2)

    for service in services.values():
        print(service.name)
        for line in service.log:
            print("   ", line)
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        print("no process is left")


if __name__ == "__main__":
    kernel.run(main)
