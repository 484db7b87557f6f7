"""Signals as an async iterator.

    with open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as signals:
        async for number in signals:
            ...

A signal handler may run between any two lines, so ours does next to nothing: it notes the number, and asks the loop to
hand it over between two steps. Numbers come out in the order in which they came. As in the system itself, a signal that
comes again before the first was taken counts once: how many there were is not known, only that there was one.

While the block lasts, the signals do nothing else. When it ends, the handlers from before are put back, and signals
that came and were not taken are raised again, so that they meet those handlers: none is lost. A handler that has
outlived its run, which broke off, or got into a forked child, does the same at once.

What does not work: Python runs signal handlers between two lines of the main thread. A task that computes without end
in C code, or a step that blocks, holds them up like everything else. And a handler that C code has installed behind
Python's back (`faulthandler.register`, an embedding program) is unknown here: the default takes its place.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from .core.task import Task, current_kernel
from .core.traps import consume_budget, operation
from .interrupts import _in_main_thread

if TYPE_CHECKING:
    from .core.loop import Kernel

__all__ = ["SignalReceiver", "open_signal_receiver"]


class SignalReceiver:
    """What `open_signal_receiver` gives: an async iterator over the numbers of signals that came. It is its own trap.

    Attributes:
        signals: the signals it was opened for.
    """

    def __init__(self, kernel: Kernel, signals: tuple[int, ...]) -> None:
        self.signals = signals
        self._kernel = kernel
        self._open = True
        self._previous: dict[int, Any] = {}  # the handlers from before
        # What came and was not taken. The handler adds to it at any moment, so each use is one call into C.
        self._came: deque[int] = deque()
        self._waiting: dict[Task, None] = {}

    # ---- at any moment, in the main thread --------------------------------------------------------

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._open or not self._kernel.running:  # we should be gone: see the module
            if self._restore(number):
                signal.raise_signal(number)
        elif number not in self._came:
            # In this order: another handler may come in between and raise. What was noted must be handed over.
            self._kernel.call_soon(self._hand_over)
            self._came.append(number)

    def _restore(self, number: int) -> bool:
        """Put the previous handler back; False if somebody has put another one in our place, which stays."""
        if signal.getsignal(number) != self._handle:
            return False
        handler = self._previous[number]
        # Another receiver's, perhaps, opened before this one and closed before it as well.
        while isinstance(owner := getattr(handler, "__self__", None), SignalReceiver) and not owner._open:
            handler = owner._previous[number]
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not Python's, and out of reach
        return True

    # ---- between two steps, and in tasks ------------------------------------------------------------

    def _hand_over(self) -> None:
        while self._came and self._waiting:
            task = next(iter(self._waiting))
            del self._waiting[task]
            self._kernel.wake(task, self._came.popleft())

    def __aiter__(self) -> SignalReceiver:
        return self

    @operation
    def __anext__(self) -> Generator[Any, Any, int]:
        """Wait for the next signal and return its number.

        Always a cancel point, and then no signal was taken; a schedule point if it waits. Several tasks may wait; each
        signal goes to one of them, the first first.

        Raises:
            RuntimeError: the block has ended, or ends meanwhile.
        """
        yield from consume_budget()
        if not self._open:
            raise _closed()
        if self._waiting or not self._came:
            number: int = yield self
            return number
        return self._came.popleft()

    def arm(self, kernel: Kernel, task: Task) -> None:
        """Of the trap: the task sleeps until a signal comes."""
        self._waiting[task] = None

    def abort(self, kernel: Kernel, task: Task) -> bool:
        """Of the trap: the task has taken nothing."""
        del self._waiting[task]
        return True

    def _close(self) -> None:
        """The previous handlers are back: let them have what nobody has taken."""
        self._open = False
        waiting, self._waiting = self._waiting, {}
        for task in waiting:
            self._kernel.wake(task, error=_closed())
        with ExitStack() as stack:  # each of them, though the handler of one may raise
            while self._came:
                stack.callback(signal.raise_signal, self._came.pop())

    def __repr__(self) -> str:
        names = ", ".join(getattr(number, "name", str(number)) for number in self.signals)
        return f"<SignalReceiver for {names}, {f'{len(self._came)} to be taken' if self._open else 'closed'}>"


def _closed() -> RuntimeError:
    return RuntimeError("the signal receiver is closed: its `with` block has ended")


@contextmanager
def open_signal_receiver(*signals: int) -> Iterator[SignalReceiver]:
    """Receive `signals` as an async iterator while the block lasts. Entering and leaving are not checkpoints.

    `signal.SIGINT` may be among them: then Ctrl-C is a signal like others, until the block ends. While a receiver is
    open, no deadlock is reported. If several are open for one signal, the one opened last gets it. What a previous
    handler raises when signals are raised again comes out of the block.

    Raises:
        TypeError: no signal is given, or it is no number.
        ValueError: a number is no signal.
        RuntimeError: not in the main thread, where alone Python handles signals; or outside the kernel.
        OSError: the system lets nobody handle this signal, such as SIGKILL.

    If one is raised, nothing has changed. Cost: 5 us per signal.
    """
    if not signals:
        raise TypeError("open_signal_receiver() wants at least one signal, such as signal.SIGTERM")
    kernel = current_kernel("open_signal_receiver()")
    if not _in_main_thread():
        raise RuntimeError("signals can be received in the main thread only; this kernel runs in another one")
    receiver = SignalReceiver(kernel, tuple(dict.fromkeys(signals)))
    with ExitStack() as stack:
        stack.callback(receiver._close)  # after the others
        for number in receiver.signals:
            receiver._previous[number] = signal.signal(number, receiver._handle)
            stack.callback(receiver._restore, number)
        yield receiver
