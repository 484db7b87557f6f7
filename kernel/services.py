"""Service tasks: they live while their clients do, and then end by themselves.

A connection with a task that reads it, a pool with a task that tends it, a nursery whose children use both: the
children are the *clients*, the two tasks are *services*. Cancelling them by hand when the last client is gone is easy
to write and easy to get wrong, above all when everything is cancelled: a client that cleans up may need its service
once more. So:

* A service does not keep its nursery open. When the body and all ordinary children have ended, services are cancelled
  and waited for.
* They end in the reverse order of their start, each when the one after it has ended: a service may use those that were
  started before it.
* Until then a cancellation from outside does not reach a service. It reaches its clients, they leave, and then it is
  the turn of the services. Only the end of a grace (`cancel(grace=...)`) does reach it, as it does a `cleanup` block.
* A service that fails is a child that fails: its clients are cancelled, and the error is in the group. A service may
  also end early and well; nobody minds.

The services of a nursery live in a second one, whose scope lies around that of the clients:

    outside <- [ services ] <- [ clients ] <- body's scopes
                     ^              ^
    a service        +- [ shelter ] |
    a child                         +- ...

It is put there when the first service is started, so that nurseries without services know nothing of it.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import Any, Final

from .core.errors import CancelReason
from .core.nursery import AsyncFn, Nursery, TaskStatus, _Join, call_async
from .core.scopes import CancelScope, hasten
from .core.task import name_of
from .core.traps import operation

_CLIENTS_ENDED: Final = CancelReason("nursery", reason="all clients of this service have ended")


class Services(Nursery):
    """The services of one nursery, `clients`. What goes wrong here is reported there."""

    __slots__ = ("_clients", "_ending", "_shelters")

    def __init__(self, clients: Nursery) -> None:
        super().__init__(clients._kernel, clients.parent_task)
        self._clients = clients
        self._ending = False
        self._shelters: dict[_Shelter, None] = {}  # of those that run, in the order of their start
        self._state = "open"
        self.cancel_scope = scope = _Outskirts()
        scope.nursery = self
        scope.surround(clients.cancel_scope)

    def launch(self, async_fn: AsyncFn, args: tuple[Any, ...], name: object) -> None:
        """Start a service."""
        shelter = _Shelter(shield=True)
        coro: Any = self._serve(shelter, call_async(async_fn, args, "nursery.start_service_soon"))
        self._spawn(coro, name_of(name or async_fn))
        self._shelters[shelter] = None  # already: those before it must outlast it, even while it has not begun

    @operation
    def bring_up(self, async_fn: AsyncFn, args: tuple[Any, ...], name: object) -> Generator[Any, Any, Any]:
        """Start a service and wait until it has called `started()`. Until then, it is in the hands of who waits."""
        shelter = _Shelter()

        def serve(task_status: TaskStatus[Any]) -> Any:
            told = partial(async_fn, task_status=_ServiceStatus(task_status, shelter))
            return self._serve(shelter, call_async(told, args, "nursery.start_service"))

        return (yield from self.start(serve, name=name_of(name or async_fn)))

    @operation
    def _serve(self, shelter: _Shelter, coro: Any) -> Generator[Any, Any, None]:
        self._shelters[shelter] = None
        try:
            self._end_last()
            with shelter:
                yield from coro
        finally:
            del self._shelters[shelter]
            self._end_last()

    def _end_last(self) -> None:
        """If the services are to end: cancel the one that was started last. Its end brings the next one here."""
        if self._ending and self._shelters:
            last = next(reversed(self._shelters))
            last._cancel(_CLIENTS_ENDED)
            hasten(last, self._clients.cancel_scope._grace_end)

    def begin_end(self) -> None:
        """All clients have ended, or nobody is left who would wait for them."""
        self._ending = True
        self._end_last()

    def _failed(self, task: Any, error: BaseException) -> None:
        self._clients._failed(task, error)


class _Shelter(CancelScope):
    """Around each service, and what cancels it: a shield that gives way to the end of a grace."""

    __slots__ = ()
    soft = True


class _Outskirts(CancelScope):
    """The scope of the services' nursery. It is put around another one, and not entered."""

    __slots__ = ()

    def surround(self, inner: CancelScope) -> None:
        """Take the place between `inner` and its parent."""
        self._kernel, self._task, self._parent = inner._kernel, inner._task, inner._parent
        assert self._parent is not None
        self._state = "active"
        self.cancelled = self._parent.cancelled
        inner._parent = self

    def _retire(self) -> None:
        """The block is over. If it was left in disorder there may be services still; somebody else waits for them."""
        assert isinstance(self.nursery, Services)
        self.nursery.begin_end()
        super()._retire()


class _ServiceStatus:
    """The `task_status` of a service: once the service is up, cancellation does not reach it any more."""

    def __init__(self, status: TaskStatus[Any], shelter: _Shelter) -> None:
        self._status = status
        self._shelter = shelter

    def started(self, value: Any = None) -> None:
        """See `TaskStatus.started`."""
        self._status.started(value)
        self._shelter.shield = not self._status._room.child_tasks  # it stays if `start_service()` is being cancelled


@operation
def wait_for_children(nursery: Nursery) -> Generator[Any, Any, None]:
    """What a nursery does at the end of its body: wait until nothing is left, and let nobody in any more."""
    if nursery._children or nursery._pending_starts:
        nursery._joining = nursery._kernel.current
        yield from _Join(nursery)
    nursery._state = "closed"
