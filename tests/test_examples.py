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


THREAD_FEEDS_KERNEL = """\
Every reading
  20.0 degrees
  20.5 degrees
  21.0 degrees
  21.5 degrees
  22.0 degrees
  warm enough
  thermometer: the program has ended, and so do I
Only the newest
  the last one shown: 100000
  looked far fewer times than it turned: True
"""

GUEST_ASYNCIO = """\
The shop asks the wholesaler
  wholesaler: hung up while looking for silk
  shop: no price for silk
  shop: salt is 6.00
  shop: tea is 4.50
  shop: agreed on 90.00
  shop: the wholesaler has no 'snow'
  asyncio: got 2 prices
asyncio runs out of time
  shop: open
  shop: closed
  asyncio: TimeoutError
"""

GUEST_TK = """\
This example opens a window, and that cannot be done here
"""

CRAWLER = """\
 1.0 s  /: 3 links
 2.0 s  /news: 3 links
 2.0 s  /about: 2 links
 3.0 s  /news/1: 2 links
 3.0 s  /news/2: 2 links
 4.0 s  /shop: 2 links
 4.0 s  /team: 1 links
 4.0 s  /old: not found
 5.0 s  /shop/cart: 1 links
 9.0 s  /slow: too slow
 9.0 s  that was all: 10 pages, and nobody is left
"""

RATE_LIMITER = """\
Nothing
  12  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  4  .  .  .
A bucket
  number 9 gave up at 2.5 s
   3  1  1  1  1  1  1  1  1  .  .  .  .  .  .  .  3  1  .  .
A window
  number 9 gave up at 2.5 s
   4  .  .  .  4  .  .  .  3  .  .  .  .  .  .  .  4  .  .  .
"""

WORKER_POOL = """\
 0.5 s  archive: open
 1.0 s  ann: develops Adams
 1.0 s  ben: develops Brandt
 1.0 s  cat: develops Cameron
 3.1 s  archive: has Adams
 3.1 s  ann: develops Doisneau
 6.0 s  boss: closing time, you have 5 seconds
 6.0 s  Goldin: sent away
 7.0 s  Hoepker: sent away
 7.2 s  archive: has Doisneau
 8.1 s  archive: has Brandt
11.0 s  cat: had no time to finish Cameron
11.0 s  boss: gives Evans the film back
11.0 s  boss: gives Frank the film back
11.5 s  archive: closed
11.5 s  boss: goes home, and the archive is closed
"""

PHILOSOPHERS = """\
A slow dinner
  nothing can happen any more: all tasks (6) wait, and nobody is left to wake one of them.
  They wait for one another:
    'Arendt' waits for <fork 1>, held by 'Benjamin'
    'Benjamin' waits for <fork 2>, held by 'Cassirer'
    'Cassirer' waits for <fork 3>, held by 'Descartes'
    'Descartes' waits for <fork 4>, held by 'Epicurus'
    'Epicurus' waits for <fork 0>, held by 'Arendt'
A quick dinner
  ends well, when served first come, first served
  and under another schedule:
  nothing can happen any more: all tasks (6) wait, and nobody is left to wake one of them.
  They wait for one another:
    'Arendt' waits for <fork 1>, held by 'Benjamin'
    'Benjamin' waits for <fork 2>, held by 'Cassirer'
    'Cassirer' waits for <fork 3>, held by 'Descartes'
    'Descartes' waits for <fork 4>, held by 'Epicurus'
    'Epicurus' waits for <fork 0>, held by 'Arendt'
An ordered dinner
  1,000 schedules hold
A dinner with four chairs
  1,000 schedules hold
"""


CTRL_C = """\
While a clerk computes
  ann computes
  ann leaves, because of KeyboardInterrupt
  ben leaves, because of Cancelled
  the ledger is closed with 5 names and 5 sums
  ended by Ctrl-C
While everybody sleeps
  ann leaves, because of Cancelled
  ben leaves, because of Cancelled
  the ledger is closed with 7 names and 7 sums
  ended by Ctrl-C
In the middle of an entry
  ben leaves, because of Cancelled
  ann leaves, because of Cancelled
  the ledger is closed with 7 names and 7 sums
  ended by Ctrl-C
"""

DEADLOCK = """\
Crosswise
  ann has 100, ben has 100
  nothing can happen any more: all tasks (3) wait, and nobody is left to wake one of them.
  They wait for one another:
    'ann pays ben' waits for <Lock at 0x..., held by 'ben pays ann', 1 waiting>
    'ben pays ann' waits for <Lock at 0x..., held by 'ann pays ben', 1 waiting>
  If waiting for ever is what you want, say so with sleep_forever().
  Task tree at 1.000 s: 3 tasks, 0 ready, 0 timers, 0 waits for files
  crosswise: waits for its children
      examples/deadlock.py in crosswise: async with kernel.open_nursery() as nursery:
    nursery, 2 tasks
      ann pays ben: waits for <Lock at 0x..., held by 'ben pays ann', 1 waiting>
      ben pays ann: waits for <Lock at 0x..., held by 'ann pays ben', 1 waiting>
          examples/deadlock.py in book: async with target.lock:
In one's own way
  nothing can happen any more: all tasks (3) wait, and nobody is left to wake one of them.
  They wait for one another:
    'audit' waits for its child 'Rome'
    'Rome' waits for <Lock at 0x..., held by 'audit', 2 waiting>
  If waiting for ever is what you want, say so with sleep_forever().
  Task tree at 0.000 s: 3 tasks, 0 ready, 0 timers, 0 waits for files
  audit: waits for its children
      examples/deadlock.py in audit: async with bank, kernel.open_nursery() as nursery:
    nursery, 2 tasks
      Rome: waits for <Lock at 0x..., held by 'audit', 2 waiting>
      Oslo: waits for <Lock at 0x..., held by 'audit', 2 waiting>
          examples/deadlock.py in audit.<locals>.count: async with bank:
In order
  ann has 80, ben has 120
"""

TRACER = """\
  time  cook                      waiter
   0.0  *
   0.0                            *
        | fetches the pot
   0.0  waits until 2.0
   0.0                            yields
   0.0                            *
   0.0                            waits for cook's tray
   2.0  *
   2.0                            *
   2.0  ends with Value
                                  | has the tray
   2.0                            waits until 2.5
   2.5                            *
   2.5                            ends with Value
"""


CPU_MAP = """\
primes in each part: 2762 2371 2260 2199 2142 2114 2068 2068
below 200,000 there are 17,984
awake meanwhile: True
"""

HASH_FILES = """\
e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 0.bin
ee78cd29d3a534713b36e6ff6fa3668c8a8f851a542d5eb2401c25ca4e057d02 1.bin
80e4f8bd46c3f5355d3576cbfeb78b298868ef51d2f66cb48e6134a4f3edb67b 2.bin
4955f5f0b4164bfef8d80f630a5344f67154c825bc0357271b2a5d26a60303dd 3.bin
cb2e94436d8a1e5b315c4941c7a66d57493897662ea5e667d99b18d425486dfb 4.bin
0bc08e3c631f6c4ecadd4729cb937a9428e2b221f20f47ff7ab22bd5a2fbc0b8 5.bin
"""


SUPERVISOR = """\
steady
    up, attempt 1
    ended by SIGKILL
    up, attempt 2
    ended by SIGTERM
flaky
    ended with status 1
    ended with status 1
    up, attempt 3
    ended by SIGTERM
hopeless
    ended with status 3
    ended with status 3
    ended with status 3
    given up
family
    up, attempt 1
    ended by SIGTERM
no process is left
"""


def without_times(output: str) -> str:
    return re.sub(r"^  \d+\.\d s  ", "  ", output, flags=re.MULTILINE)


def without_reason(output: str) -> str:
    """Why there is no window: no display, or no tkinter. With a display, the example is run in test_guest.py."""
    return re.sub(
        r"and (that cannot be done here: |this Python has no tkinter).*", "and that cannot be done here", output
    )


TLS_CLIENT = """\
As it should be
  TLSv1.3, certified for localhost
  the whole answer: Rye, walnut, and the loaf of the day.
Is this the bank?
  refused: Hostname mismatch, certificate is not valid for 'bank.example'.
Who says that this is the bakery?
  refused: unable to get local issuer certificate
Cut off
  TLSv1.3, certified for localhost
  not to be relied on, as there was no goodbye: Rye, walnut, and
"""

ECHO_STREAMS = """\
ada: hello from ada
bob: hello from bob
cyd: hello from cyd
"""

HTTP_SERVER = """\
GET /: 200 OK, b'hello\\n'
POST /upper: 200 OK, b'SHOUT'
GET /nowhere: 404 Not Found, b'there is no such thing\\n'
DELETE /: 405 Method Not Allowed, b'not in this way\\n'
nonsense: HTTP/1.1 400 Bad Request
the server has ended
GET /slow, while the server ends: b'at last\\n'
"""


CHAT = """\
Two guests
  ann hears  * ben comes in
  ann hears  ann: good evening
  ben hears  ann: good evening
  ann hears  ben: must go
  ben hears  ben: must go
  ann hears  * ben has left
One who does not listen
  ann hears  * cyd comes in
  ann hears all she has said: True
  cyd hears less: True
  cyd hears  * you were too slow, and have missed something
The end
  ann hears  * closing time
  cyd hears  * closing time
"""

PORT_FORWARDER = """\
digest: 16 MiB through the forwarder
  the answer came after the end: True
echo: 16 MiB through the forwarder
  they came back at the same time, intact: True
nobody at the other end
forwarder: ConnectionRefusedError
client: b''
"""

SERVER_ALL_CORES = """\
each process has answered: True
work has begun
it was finished all the same: True
all have ended well: True
"""


def without_addresses_and_lines(output: str) -> str:
    output = re.sub(r"0x[0-9a-f]+", "0x...", output)
    return re.sub(r"\S*examples/(\w+\.py):\d+", r"examples/\1", output)


def unchanged(output: str) -> str:
    return output


EXPECTED: dict[str, tuple[str, Callable[[str], str]]] = {
    "thread_feeds_kernel.py": (THREAD_FEEDS_KERNEL, unchanged),
    "hello.py": (HELLO, without_times),
    "echo.py": (ECHO, unchanged),
    "echo_generators.py": (ECHO, unchanged),
    "custom_trap.py": (CUSTOM_TRAP, unchanged),
    "pitfalls.py": (PITFALLS, unchanged),
    "deadlock.py": (DEADLOCK, without_addresses_and_lines),
    "tracer.py": (TRACER, unchanged),
    "ctrl_c.py": (CTRL_C, unchanged),
    "guest_asyncio.py": (GUEST_ASYNCIO, unchanged),
    "guest_tk.py": (GUEST_TK, without_reason),
    "crawler.py": (CRAWLER, unchanged),
    "rate_limiter.py": (RATE_LIMITER, unchanged),
    "worker_pool.py": (WORKER_POOL, unchanged),
    "philosophers.py": (PHILOSOPHERS, unchanged),
    "cpu_map.py": (CPU_MAP, unchanged),
    "hash_files.py": (HASH_FILES, unchanged),
    "supervisor.py": (SUPERVISOR, unchanged),
    "echo_streams.py": (ECHO_STREAMS, unchanged),
    "tls_client.py": (TLS_CLIENT, unchanged),
    "http_server.py": (HTTP_SERVER, unchanged),
    "chat.py": (CHAT, unchanged),
    "port_forwarder.py": (PORT_FORWARDER, unchanged),
    "server_all_cores.py": (SERVER_ALL_CORES, unchanged),
}

NEEDS = {"hash_files.py": "rich", "http_server.py": "h11", "tls_client.py": "trustme"}
"""What an example needs that the test extra does not bring. Without it the test is skipped; .ci/run installs it."""


def run_example(name: str, cwd: Path, *args: str) -> str:
    """Run an example as a user does, from any directory, with warnings as errors; return what it printed."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "DISPLAY": ""},
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
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{name} needs {NEEDS[name]}: pip install -e '.[examples]'")
    expected, comparable = EXPECTED[name]
    assert comparable(run_example(name, tmp_path)) == comparable(expected)
    assert not list(tmp_path.iterdir()), "an example leaves no files behind"


def test_cpu_map_prints_the_same_on_a_cluster(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="needs Dask: pip install -e '.[distributed]'")
    assert run_example("cpu_map.py", tmp_path, "dask") == CPU_MAP


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
