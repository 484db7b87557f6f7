"""What tests have done in worker processes. A module of its own, and a light one, as each worker imports it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any, NoReturn


class Fussy(Exception):
    """Can be pickled, but not back."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")


class OnlyThere:
    """Can be pickled, and refuses to come back."""

    def __reduce__(self) -> Any:
        return _refuse, ()


class NotThere:
    """Can be pickled, and refuses to arrive in a worker."""

    def __reduce__(self) -> Any:
        return _refuse_in_worker, ()


def _refuse() -> None:
    if multiprocessing.parent_process() is None:
        raise LookupError("not in this process")


def _refuse_in_worker() -> None:
    if multiprocessing.parent_process() is not None:
        raise LookupError("not in a worker")


def make_something_that_cannot_be_pickled() -> object:
    return threading.Lock()


def fail(error: BaseException) -> NoReturn:
    raise error


def fail_fussily() -> NoReturn:
    raise Fussy("this", "that")


def die(how: signal.Signals) -> None:
    os.kill(os.getpid(), how)


def tell(fifo: Path, text: str) -> None:
    fifo.write_text(text)


def tell_and_wait(begun: Path, go: Path) -> str:
    """Write the process's number to one pipe, and return what comes from the other."""
    begun.write_text(str(os.getpid()))
    return go.read_text()


def start_something_that_stays() -> None:
    threading.Thread(target=threading.Event().wait).start()


def ctrl_c_is_ignored() -> bool:
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def keep_the_interpreter_busy(begun: Path) -> None:
    """Computes for ever in C, without ever looking at signals."""
    begun.write_text(str(os.getpid()))
    ctypes.PyDLL(None).sleep(1000)


def run_in_a_kernel_of_its_own() -> int:
    import kernel
    from kernel import to_process

    return kernel.run(partial(to_process.run_sync, pow, 2, 10))
