"""A file is closed twice, and the second time it is somebody else's.

`close` looks whether the file is closed already, writes out what is left, closes the number, and forgets it. Two tasks
call it. Both see an open file. After the first has closed the number, the system gives it to the next who opens
something, as it always gives the lowest one that is free. The second `close` closes that.

Closing is a change of hands: forget the number first, then do what takes time. Who comes second finds nothing to do.

Seen in the standard library's asyncore (python/cpython#75163) and in uvloop (MagicStack/uvloop#738 and #763), where in
production files closed at random.
"""

from __future__ import annotations

from contextlib import suppress

import kernel
from kernel.lowlevel import checkpoint

ERROR = AssertionError


class System:
    """Gives out numbers, the lowest first."""

    def __init__(self) -> None:
        self.files: dict[int, str] = {}

    def open(self, name: str) -> int:
        number = next(number for number in range(3, 10) if number not in self.files)
        self.files[number] = name
        return number

    def close(self, number: int) -> None:
        del self.files[number]


class NaiveFile:
    def __init__(self, system: System) -> None:
        self.system = system
        self.number: int | None = system.open("ours")

    async def close(self) -> None:
        if self.number is not None:
            await checkpoint()  # writes out what is left
            with suppress(KeyError, TypeError):  # a file may be closed twice, that does no harm
                self.system.close(self.number)
            await checkpoint()  # tells whoever waits for it
            self.number = None


class File(NaiveFile):
    async def close(self) -> None:
        number, self.number = self.number, None
        if number is not None:
            await checkpoint()
            self.system.close(number)
            await checkpoint()


async def story(file_type: type[NaiveFile]) -> None:
    system = System()
    file = file_type(system)

    async def bystander() -> None:
        number = system.open("theirs")
        await checkpoint()
        assert system.files.get(number) == "theirs", "somebody has closed a file that is not theirs"

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(file.close, name="ann")
        nursery.start_soon(file.close, name="ben")
        nursery.start_soon(bystander, name="bystander")


async def buggy() -> None:
    await story(NaiveFile)


async def correct() -> None:
    await story(File)
