"""Every example runs by itself, ends well, says nothing on stderr, and prints what it is meant to print.

Where the output depends on nothing but the program, all of it is compared. The one example whose lines carry times is
run twice: as a user runs it, compared without the times, and in virtual time, compared with them.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

HELLO = """\
One pot after the other
  0.0 s  pork: water on the fire
  0.2 s  pork: dumplings in
  0.5 s  pork: served
  0.5 s  leek: water on the fire
  0.6 s  leek: dumplings in
  0.8 s  leek: served
  0.8 s  dinner is ready
Both pots at once
  0.0 s  pork: water on the fire
  0.0 s  leek: water on the fire
  0.1 s  leek: dumplings in
  0.2 s  pork: dumplings in
  0.3 s  leek: served
  0.5 s  pork: served
  0.5 s  dinner is ready
Both pots at once, and 0.4 s for the whole dinner
  0.0 s  pork: water on the fire
  0.0 s  leek: water on the fire
  0.1 s  leek: dumplings in
  0.2 s  pork: dumplings in
  0.3 s  leek: served
  0.4 s  pork: taken off the fire, half done
  0.4 s  time is up, we eat what there is
"""

ECHO = """\
server: open
server: connections: 1
server: connections: 2
server: connections: 3
server: connections: 4
server: connections: 5
ada: 3 questions, 3 answers, and then b''
bob: 16 MiB sent while they came back, intact
cyd: hung up, and the reader got ClosedResourceError
dan: lost patience after 0.1 s
server: told to leave, 'closing time'
server: closed
eve: stayed until the server hung up: b''
"""

CUSTOM_TRAP = """\
Two tasks meet
ann: has tea
ann's task sleeps on <Swap of 'tea' at the market>
ben: has salt
ann: leaves with salt
ben: leaves with tea
One loses patience, and is gone when the next one comes
cal: has snow
cal: leaves with snow
deb: has rice
eli: has figs
deb: leaves with figs
eli: leaves with rice
One has been told to leave before it comes
fay: has wool
gus: has sand
gus: leaves with sand
hal: has silk
fay: leaves with silk
hal: leaves with wool
"""

PITFALLS = """\
A timeout that is lost, in asyncio
  no answer from the shop, asking the wholesaler
  the price is 4.50
  no TimeoutError; took more than three times its 0.1 s: True
A timeout that is lost, in the kernel
  no answer from the shop, asking the wholesaler
  TooSlowError
A task that leaks, in asyncio
  the order is done; tasks still running behind its back: 1
  in a log, some time later: Task exception was never retrieved
  the program goes on as if all were well
A task that leaks, in the kernel
  the order failed: out of paper
A reader that is forgotten, in asyncio
  the second reader got b'one'
  the first reader sleeps on, with b'two' waiting for it: True
A reader that is forgotten, in the kernel
  the second reader got a BusyResourceError
  the first reader got b'one'
"""


def without_times(output: str) -> str:
    return re.sub(r"^  \d+\.\d s  ", "  ", output, flags=re.MULTILINE)


def unchanged(output: str) -> str:
    return output


EXPECTED: dict[str, tuple[str, Callable[[str], str]]] = {
    "hello.py": (HELLO, without_times),
    "echo.py": (ECHO, unchanged),
    "echo_generators.py": (ECHO, unchanged),
    "custom_trap.py": (CUSTOM_TRAP, unchanged),
    "pitfalls.py": (PITFALLS, unchanged),
}


def run_example(name: str, cwd: Path) -> str:
    """Run an example as a user does, from any directory, with warnings as errors; return what it printed."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert finished.stderr == ""
    assert finished.returncode == 0
    return finished.stdout


def test_every_example_is_checked_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example_prints_what_it_is_meant_to(name: str, tmp_path: Path) -> None:
    expected, comparable = EXPECTED[name]
    assert comparable(run_example(name, tmp_path)) == comparable(expected)
    assert not list(tmp_path.iterdir()), "an example leaves no files behind"


@pytest.mark.parametrize("name", EXPECTED)
def test_example_says_what_it_shows_and_how_to_run_it(name: str) -> None:
    doc = ast.get_docstring(ast.parse((EXAMPLES / name).read_text(encoding="utf-8")))
    assert doc is not None
    assert f".venv/bin/python examples/{name}\n" in doc


def test_hello_is_on_time_when_time_is_virtual(virtual: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    virtual(runpy.run_path(str(EXAMPLES / "hello.py"))["main"])
    assert capsys.readouterr().out == HELLO


def test_generator_style_uses_no_async() -> None:
    source = (EXAMPLES / "echo_generators.py").read_text(encoding="utf-8")
    program = source.split('"""\n', 1)[1]
    assert not re.search(r"\b(async|await)\b", program)


def test_readme_shows_what_its_first_command_prints() -> None:
    """The fenced block right after the command that ends in `examples/echo.py` is that program's output."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"python examples/echo\.py\n```\n\n.*?```text\n(.*?)```\n", readme, flags=re.DOTALL)
    assert shown is not None
    assert shown[1] == ECHO


def test_readme_map_names_files_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    map_ = re.search(r"## Where things are\n\n```text\n(.*?)```\n", readme, flags=re.DOTALL)
    assert map_ is not None
    folders: list[str] = []
    for indent, name in re.findall(r"^((?:  )*)(\S+)  ", map_[1], flags=re.MULTILINE):
        folders[len(indent) // 2 :] = [name]
        path = "".join(folders)
        assert (ROOT / path).exists(), f"README.md names {path}"
