"""The one error in a group, for those who expect no more than one.

A nursery raises groups, always, since several children may fail at once. Code that starts children as a detail of its
own work, and promises its caller a `TimeoutError`, wants to raise that and no group:

    with raise_single():
        async with open_nursery() as nursery:
            ...

Only what a group of one says is lost by this: through which nurseries the error came. Where there are several errors,
all of them arrive as ever.
"""

from __future__ import annotations

from types import TracebackType

__all__ = ["raise_single", "unwrap_single"]


def unwrap_single(error: BaseException) -> BaseException:
    """The error in a group that holds just one, at whatever depth; any other exception, as it is.

    For looking: `match unwrap_single(group): ...`. For raising use `raise_single`, as `raise unwrap_single(group)` in
    an `except` block would make the group the context of the error that is in it. Changes nothing.
    """
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


class raise_single:  # read it as a verb
    """`with raise_single():` a group that leaves the block with just one error in it leaves as that error.

    The error keeps its traceback, cause and context; if it has no context, it gets that of the group. Several errors
    leave as the group they are in, and every other exception leaves as it is. Not a checkpoint. One object may serve
    any number of blocks, one after the other or at once.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: TracebackType | None) -> None:
        if not isinstance(exc, BaseExceptionGroup) or (error := unwrap_single(exc)) is exc:
            return
        if isinstance(error, BaseExceptionGroup):  # several errors, inside groups of one
            return
        context = error.__context__ or exc.__context__
        try:
            raise error
        finally:
            error.__context__ = context  # `raise` has made it the group: a false history, and a reference cycle
            del error, exc, context
