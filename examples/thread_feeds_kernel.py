"""A thread feeds a kernel program: a thermometer whose driver calls back in a thread of its own.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/python examples/thread_feeds_kernel.py

Drivers for sensors, sound, message buses and the like often come with a thread, and call a function of yours in it.
Nothing of the kernel may be used there, but for one thing: the run's token. `token.run_sync_soon(fn, *args)` has the
kernel call `fn(*args)` in its own thread, and returns at once. Four points are worth a look:

* `fn` may not raise: the kernel would take that for a bug and end the run. So `deliver` says what to do when nobody
  wants a reading any more.
* Calls are made in the order in which they were left, and none is lost. That needs no lock and no queue of your own.
* After the run, `run_sync_soon` raises `RunFinishedError`. That is how the thread of the driver learns that it is over.
* If only the newest state counts, pass `idempotent=True`: a hundred thousand notes that say the same are one.
"""

import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import kernel
from kernel.lowlevel import current_kernel_token


class Thermometer:
    """Stands for a vendor's driver. It knows nothing of kernels."""

    def __init__(self, on_reading: Callable[[float], object]) -> None:
        self._on_reading = on_reading
        self.thread = threading.Thread(target=self._read, name="thermometer")
        self.thread.start()

    def _read(self) -> None:
        celsius = 20.0
        with suppress(EOFError):
            while True:
                self._on_reading(celsius)
                celsius += 0.5
                time.sleep(0.002)


async def every_reading() -> Thermometer:
    token = current_kernel_token()
    send, receive = kernel.open_memory_channel[float](math.inf)

    def on_reading(celsius: float) -> None:  # in the driver's thread
        try:
            token.run_sync_soon(deliver, celsius)
        except kernel.RunFinishedError:
            print("  thermometer: the program has ended, and so do I")
            raise EOFError from None  # this driver's way of being told to stop

    def deliver(celsius: float) -> None:  # in the kernel's thread, between two steps
        with suppress(kernel.BrokenResourceError):  # the receiver has left already
            send.send_nowait(celsius)

    thermometer = Thermometer(on_reading)
    async with receive:
        async for celsius in receive:
            print(f"  {celsius:.1f} degrees")
            if celsius >= 22:
                print("  warm enough")
                break
    return thermometer


class Odometer:
    """Another driver: it turns far faster than anybody can look, and has a number to look at."""

    def __init__(self, turns: int, on_change: Callable[[], object]) -> None:
        self.count = 0
        self._turns = turns
        self._on_change = on_change
        self.thread = threading.Thread(target=self._turn, name="odometer")
        self.thread.start()

    def _turn(self) -> None:
        for _ in range(self._turns):
            self.count += 1
            self._on_change()


async def only_the_newest(turns: int = 100_000) -> None:
    token = current_kernel_token()
    changed = kernel.Event()

    def note() -> None:  # in the kernel's thread
        changed.set()

    odometer = Odometer(turns, lambda: token.run_sync_soon(note, idempotent=True))
    looks = shown = 0
    while shown < turns:
        await changed.wait()
        changed = kernel.Event()  # before looking: a turn that comes from now on is another note
        shown = odometer.count
        looks += 1
    odometer.thread.join()
    print(f"  the last one shown: {shown}")
    print(f"  looked far fewer times than it turned: {looks < turns / 10}")


if __name__ == "__main__":
    print("Every reading")
    kernel.run(every_reading).thread.join()
    print("Only the newest")
    kernel.run(only_the_newest)
