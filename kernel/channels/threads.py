"""Ends of a memory channel for threads: their calls block the thread, while tasks use the other end.

    send_channel, receive_channel = open_memory_channel(10)
    threading.Thread(target=produce, args=[send_channel.for_thread()]).start()
    async for value in receive_channel: ...

A thread cannot wait in a kernel, so a task waits for it. Each call goes to the kernel through its inbox; what can be
done at once is done there, and otherwise a system task does it, in the same rows as all other tasks. All decisions fall
in the kernel's thread, one after the other. So when the thread's patience ends just as a value arrives, there is one
answer: the call was in time, or it did nothing.

When the run ends, calls that still wait raise `RunFinishedError`: no thread is left behind. The cost of a call is that
of waking a thread and a kernel, 20 to 50 us; if you have many small values, send them in lists.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from outcome import Error, Outcome, Value

from ..core.errors import ClosedResourceError, EndOfChannel, RunFinishedError, WouldBlock
from ..core.scopes import CancelScope
from ..core.task import here
from ..inbox import KernelToken, spawn_system_task

if TYPE_CHECKING:
    from .memory import MemoryReceiveChannel, MemorySendChannel

__all__ = ["ThreadReceiveChannel", "ThreadSendChannel"]

T = TypeVar("T")
AnyEnd = TypeVar("AnyEnd", bound="_ThreadEnd")


class _Call:
    """One call of a thread. Made there; then it is the kernel thread's business, until `done` is set.

    Args:
        name: of the task, if one must wait.
        attempt: what is tried first; if it raises WouldBlock, a task awaits `wait()`.
        give_back: what to do with a result that nobody takes.
    """

    def __init__(
        self,
        name: str,
        attempt: Callable[[], Any],
        wait: Callable[[], Any],
        give_back: Callable[[Any], object] | None = None,
    ) -> None:
        self.name = name
        self.attempt = attempt
        self.wait = wait
        self.give_back = give_back
        self.scope = CancelScope()
        self.done = threading.Event()
        self.outcome: Outcome[Any] = Error(RunFinishedError("the kernel's run has ended, so this cannot be done"))
        self.abandoned = False

    def start(self) -> None:
        """Called by the kernel."""
        try:
            self.outcome = Value(self.attempt())
        except WouldBlock:
            try:
                spawn_system_task(self._wait, name=self.name)
            except RuntimeError:  # the run is about to end; the outcome says so already
                pass
            else:
                return
        except Exception as error:
            self.outcome = Error(error)
        self.done.set()

    async def _wait(self) -> None:
        try:
            with self.scope:
                self.outcome = Value(await self.wait())
            if self.scope.cancelled_caught:
                self.outcome = Error(TimeoutError("the channel was not ready in time"))
        except Exception as error:
            self.outcome = Error(error)
        finally:
            self.done.set()
            if self.abandoned:
                self._return()

    def abandon(self) -> None:
        """The thread was interrupted, and will not take the result. Called by the kernel."""
        self.abandoned = True
        self.scope.cancel()
        if self.done.is_set():
            self._return()

    def _return(self) -> None:
        if self.give_back is not None and isinstance(self.outcome, Value):
            self.give_back(self.outcome.value)


class _ThreadEnd:
    """What the ends have in common. Leaving a `with` block closes them."""

    def __init__(self, end: MemorySendChannel[Any] | MemoryReceiveChannel[Any], token: KernelToken) -> None:
        self._token = token
        self._end = end
        self._closed = False

    def _call(self, call: _Call, timeout: float | None) -> Any:
        if here.kernel is not None:
            raise RuntimeError(
                "a channel end made by for_thread() was used in a kernel's own thread, where it would stop all tasks. "
                "Use the channel's other ends there, with `await`."
            )
        if self._closed:
            raise ClosedResourceError(f"{self!r} was closed before: it cannot be used any more")
        try:
            self._token.run_sync_soon(call.start)
            if not call.done.wait(timeout):
                self._tell(call.scope.cancel)
                call.done.wait()
            outcome = call.outcome
        except RunFinishedError:
            raise
        except BaseException:  # a KeyboardInterrupt, in the middle of anything
            self._tell(call.abandon)
            raise
        return outcome.unwrap()

    def _tell(self, sync_fn: Callable[[], object]) -> None:
        try:
            self._token.run_sync_soon(sync_fn)
        except RunFinishedError:
            pass

    def close(self) -> None:
        """Close this end, as `MemorySendChannel.close` or `MemoryReceiveChannel.close` would. Does not block.

        From any thread, and also after the run has ended. Other threads that wait in this end's calls get
        `ClosedResourceError`.
        """
        self._closed = True
        self._tell(self._end.close)

    def __enter__(self: AnyEnd) -> AnyEnd:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {id(self):#x}{', closed' if self._closed else ''}, of {self._end!r}>"


class ThreadSendChannel(_ThreadEnd, Generic[T]):
    """A sending end for threads. Made by `MemorySendChannel.for_thread()`. Any number of threads may use it."""

    def send(self, value: T, timeout: float | None = None) -> None:
        """Send `value`; blocks the thread while there is no room, at most `timeout` seconds.

        With a timeout of 0, what can be done at once is done. The time that the kernel takes to answer counts, but an
        answer is waited for in any case.

        Raises:
            TimeoutError: there was no room in time. The value was not sent.
            ClosedResourceError, BrokenResourceError: as `MemorySendChannel.send`.
            RunFinishedError: the kernel's run has ended. The value was not sent.
            RuntimeError: used in a kernel's own thread.
            KeyboardInterrupt: Ctrl-C, if this is the main thread. The value was not sent if it had to wait until then.
        """
        end: MemorySendChannel[T] = self._end  # type: ignore[assignment]
        self._call(_Call("a thread's send", lambda: end.send_nowait(value), lambda: end.send(value)), timeout)


class ThreadReceiveChannel(_ThreadEnd, Generic[T]):
    """A receiving end for threads. Made by `MemoryReceiveChannel.for_thread()`. Any number of threads may use it.

    A `for` loop takes values until the sending side is closed and nothing is left, or this end is closed.
    """

    def receive(self, timeout: float | None = None) -> T:
        """Receive the next value; blocks the thread while there is none, at most `timeout` seconds.

        The timeout is as in `ThreadSendChannel.send`.

        Raises:
            TimeoutError: there was none in time. Nothing was taken.
            EndOfChannel, ClosedResourceError: as `MemoryReceiveChannel.receive`.
            RunFinishedError: the kernel's run has ended.
            RuntimeError: used in a kernel's own thread.
            KeyboardInterrupt: Ctrl-C, if this is the main thread. A value that had arrived just then goes back, to the
                front of the channel.
        """
        end: MemoryReceiveChannel[T] = self._end  # type: ignore[assignment]
        value: T = self._call(_Call("a thread's receive", end.receive_nowait, end.receive, end._give_back), timeout)
        return value

    def __iter__(self) -> ThreadReceiveChannel[T]:
        return self

    def __next__(self) -> T:
        try:
            return self.receive()
        except (EndOfChannel, ClosedResourceError):
            raise StopIteration from None
