"""Hashing many files at once, in threads, with a progress bar.

Run it from the root of the checkout, after the README's first command has made the environment:

    .venv/bin/pip install -e '.[examples]'
    .venv/bin/python examples/hash_files.py

It makes some files, and prints a line for each, as `sha256sum` does. With a folder behind it, it takes those in there.

Reading a file blocks, and so does hashing it; but `hashlib` lets go of the interpreter's lock meanwhile, so threads are
enough to keep all processors busy. Each thread has a say in the kernel after each megabyte: it moves the bar, in the
kernel's thread, so that nobody else has to be careful with it; and it looks whether it is wanted any more. So Ctrl-C
ends the program within a megabyte, with the threads and files in good order.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

import kernel
from kernel import from_thread, to_thread

CHUNK = 1 << 20


def sha256(path: Path, moved: Callable[[int], object]) -> str:
    """In a thread."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            from_thread.check_cancelled()
            from_thread.run_sync(moved, len(chunk))
    return digest.hexdigest()


def find_files(folder: Path) -> list[tuple[Path, int]]:
    """In a thread too: a folder may be large, and far away."""
    return sorted((path, path.stat().st_size) for path in folder.rglob("*") if path.is_file())


async def hash_files(folder: Path) -> None:
    files = await to_thread.run_sync(find_files, folder)
    console = Console(stderr=True)
    bar = Progress(
        BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console, disable=not console.is_terminal
    )
    with bar:
        moved = partial(bar.advance, bar.add_task("hashing", total=sum(size for _, size in files)))

        async def hash_one(path: Path) -> str:
            return await to_thread.run_sync(sha256, path, moved)

        digests = await kernel.map_concurrently(hash_one, [path for path, _ in files], limit=os.cpu_count())
    for (path, _), digest in zip(files, digests, strict=True):
        print(digest, path.relative_to(folder))


async def main(folder: str | None = None) -> None:
    if folder is not None:
        await hash_files(Path(folder))
        return
    async with kernel.temporary_directory() as made:
        for number in range(6):
            await kernel.Path(made, f"{number}.bin").write_bytes(bytes([number]) * number * CHUNK)
        await hash_files(Path(made))


if __name__ == "__main__":
    kernel.run(main, *sys.argv[1:2])
