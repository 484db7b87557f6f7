"""The kernel as a guest of Tk: a window that stays alive while tasks drive it.

    .venv/bin/python examples/guest_tk.py
    .venv/bin/python examples/guest_tk.py --demo    (presses its own buttons, and ends by itself)

Each bar is a task, all are in one nursery, and each button is one line: Pause is an event, Stop is `scope.cancel()`,
and so is closing the window. There is no thread to be seen, and no lock, as buttons and tasks take turns.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import kernel
from kernel.lowlevel import ParkingLot, start_guest_run

try:
    import tkinter
    from tkinter import ttk
except ImportError:
    tkinter = None  # type: ignore[assignment]


class Host:
    """What a guest needs from Tk: have a function called soon, from this thread and from others."""

    def __init__(self, root: tkinter.Tk) -> None:
        self.root = root
        self.calls: deque[Callable[[], object]] = deque()
        self.reader, self.writer = os.pipe()
        root.createfilehandler(self.reader, tkinter.READABLE, self._called)

    def soon(self, function: Callable[[], object]) -> None:
        # By way of an idle callback. With `after(0)` alone, a busy guest would keep Tk from drawing, which it does
        # when it is idle; with `after_idle` alone, from everything else.
        self.root.after_idle(self.root.after, 0, function)

    def soon_threadsafe(self, function: Callable[[], object]) -> None:
        # Not even `after` is safe in another thread. A byte in a pipe is.
        self.calls.append(function)
        os.write(self.writer, b"\0")

    def _called(self, *_: object) -> None:
        os.read(self.reader, 1)
        self.calls.popleft()()

    def close(self) -> None:
        self.root.deletefilehandler(self.reader)
        os.close(self.reader)
        os.close(self.writer)


class Window:
    def __init__(self, root: tkinter.Tk) -> None:
        self.root = root
        self.scope = kernel.CancelScope()
        self.paused = False
        self.lot = ParkingLot("the Pause button")
        root.title("guest")
        root.protocol("WM_DELETE_WINDOW", self.stop)
        self.frame = ttk.Frame(root, padding=12)
        self.frame.grid()
        self.clock = ttk.Label(self.frame, text="0.0 s")
        self.clock.grid(row=0, column=0)
        self.pause_button = ttk.Button(self.frame, text="Pause", command=self.pause)
        self.pause_button.grid(row=0, column=1)
        self.stop_button = ttk.Button(self.frame, text="Stop", command=self.stop)
        self.stop_button.grid(row=0, column=2)

    # The buttons. Tk calls these between two ticks of the kernel, and they use its plain functions.

    def pause(self) -> None:
        self.paused = not self.paused
        self.pause_button["text"] = "Go on" if self.paused else "Pause"
        if not self.paused:
            self.lot.unpark_all()

    def stop(self) -> None:
        self.scope.cancel("Stop")

    # The tasks.

    async def main(self, demo: bool) -> str:
        with self.scope:
            async with kernel.open_nursery() as nursery:
                nursery.start_soon(self.tell_time)
                if demo:
                    nursery.start_soon(self.press_buttons)
                async with kernel.open_nursery() as downloads:
                    for row, (name, speed) in enumerate({"tea": 20, "salt": 50, "silk": 0.01}.items(), 1):
                        downloads.start_soon(self.download, row, name, speed)
            return "all is here"
        return "stopped"

    async def download(self, row: int, name: str, speed: float) -> None:
        ttk.Label(self.frame, text=name).grid(row=row, column=0)
        bar = ttk.Progressbar(self.frame, length=200)
        bar.grid(row=row, column=1, columnspan=2)
        try:
            for percent in range(0, 101, 4):
                if self.paused:
                    await self.lot.park()
                bar["value"] = percent
                await kernel.sleep(0.1 / speed)
            print(f"{name}: here")
        finally:
            if bar["value"] < 100:
                print(f"{name}: given up")

    async def tell_time(self) -> None:
        began = kernel.current_time()
        while True:
            self.clock["text"] = f"{kernel.current_time() - began:.1f} s"
            await kernel.sleep(0.05)

    async def press_buttons(self) -> None:
        """For --demo: what a person would do."""
        self.pause_button.invoke()
        print("paused")
        await kernel.sleep(0.1)
        self.pause_button.invoke()
        print("going on")
        await kernel.sleep(0.8)
        self.stop_button.invoke()


def run(demo: bool) -> None:
    root = tkinter.Tk()
    window = Window(root)
    host = Host(root)
    outcomes: list[Any] = []

    def done(outcome: Any) -> None:
        outcomes.append(outcome)
        root.quit()

    start_guest_run(
        window.main,
        demo,
        run_sync_soon_threadsafe=host.soon_threadsafe,
        run_sync_soon_not_threadsafe=host.soon,
        done_callback=done,
    )
    try:
        root.mainloop()
    finally:
        host.close()
        root.destroy()
    print(outcomes[0].unwrap())


def main() -> None:
    if tkinter is None:
        print("This example opens a window, and this Python has no tkinter.")
        return
    try:
        tkinter.Tk().destroy()
    except tkinter.TclError as error:
        print(f"This example opens a window, and that cannot be done here: {error}")
        return
    run(demo="--demo" in sys.argv)


if __name__ == "__main__":
    main()
