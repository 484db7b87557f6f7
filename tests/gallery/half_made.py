"""Made once, and used before it is made.

Settings are loaded when somebody first asks. So that they are not loaded twice, the first one puts up a flag, and then
loads. The second one sees the flag, and reads settings that are not there yet.

The flag says "begun", and is read as "done". One needs both: a lock for those who come while it is being made, and a
look, before the lock and again behind it, at what says that it is done.

Microsoft's configuration builders had it, and people saw their settings missing now and then
(aspnet/MicrosoftConfigurationBuilders#164).
"""

from __future__ import annotations

import kernel
from kernel.lowlevel import checkpoint

ERROR = KeyError


class NaiveSettings:
    def __init__(self) -> None:
        self.loaded = False
        self.values: dict[str, str] = {}

    async def load(self) -> None:
        await checkpoint()
        self.values = {"colour": "red"}

    async def get(self, key: str) -> str:
        if not self.loaded:
            self.loaded = True
            await self.load()
        return self.values[key]


class Settings(NaiveSettings):
    def __init__(self) -> None:
        super().__init__()
        self.lock = kernel.Lock()

    async def get(self, key: str) -> str:
        if not self.loaded:
            async with self.lock:
                if not self.loaded:
                    await self.load()
                    self.loaded = True
        return self.values[key]


async def story(settings: NaiveSettings) -> None:
    async def ben() -> None:
        await checkpoint()  # comes a little later
        await settings.get("colour")

    async with kernel.open_nursery() as nursery:
        nursery.start_soon(settings.get, "colour", name="ann")
        nursery.start_soon(ben, name="ben")


async def buggy() -> None:
    await story(NaiveSettings())


async def correct() -> None:
    await story(Settings())
