"""The benchmark of echo servers: its loads notice a wrong echo, its servers echo rightly, its arithmetic is right."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

if sys.platform != "linux":
    pytest.skip("epoll is of Linux", allow_module_level=True)

import echo
from echo import Case, Figure, Server
from echo_servers import SERVERS, missing

LOADS = [
    pytest.param("c", marks=pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")),
    "python",
]
SECONDS = 0.05
LARGE = Case(
    "large", "2 connections, 5 MB", "echo", 2, 5_000_000, 0
)  # more than buffers hold: servers must wait to send
BRIEF = Case("brief", "connect, echo, close", "connect", 3, 1000, 0)


@pytest.mark.parametrize("load", LOADS)
def test_every_server_sends_back_what_it_gets(load: str) -> None:
    present = [name for name in SERVERS if not missing(name) and (load == "c" or name in ("epoll", "kernel"))]
    with echo.load_command(load) as command, ExitStack() as stack:
        servers = {name: Server(name) for name in present}  # all start at once, as importing takes longest
        for server in servers.values():
            stack.push(server.__exit__)
        for name, server in servers.items():
            server.__enter__()
            for case in (LARGE, BRIEF):
                try:  # the load ends well only if all that it sent has come back, at least a message per connection
                    echo.run_load(command, server, case, SECONDS)
                except subprocess.SubprocessError as error:
                    pytest.fail(f"{name}, {case.what}: {error}")


def _changed(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _swallowed(data: bytes) -> bytes:
    return b""


def _doubled(data: bytes) -> bytes:
    return data + data[:1]


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [(_changed, "not what was sent"), (_doubled, "more than it got"), (_swallowed, "closed a connection")],
)
@pytest.mark.parametrize("load", LOADS)
def test_a_load_complains_about_a_server_that_is_wrong(
    load: str, answer: Callable[[bytes], bytes], complaint: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, echo.load_command(load) as command:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(answer(connection.recv(1000)))

        thread = threading.Thread(target=serve)
        thread.start()
        port, pid = str(listener.getsockname()[1]), "1"
        done = subprocess.run(
            [*command, port, "echo", "1", "1000", str(SECONDS), pid], capture_output=True, text=True, timeout=30
        )
        thread.join()
    assert done.returncode == 1
    assert complaint in done.stderr
    assert not done.stdout


def test_only_undisturbed_rounds_count_as_long_as_there_are_any() -> None:
    calm, disturbed = [Figure(rate=rate, cpu=1 / rate, busy=1, calm=0.9) for rate in (100, 80)], 0.2
    slow = Figure(rate=10, cpu=1, busy=0.1, calm=disturbed)
    row: dict[str, list[Figure | None]] = {
        "epoll": [calm[0], calm[0], slow, calm[0]],
        "kernel": [calm[1], slow, calm[1], None],
    }
    result = echo.result(row, "kernel")
    assert result is not None
    assert (result.ratio, result.lowest, result.highest, result.disturbed, result.doubtful) == (0.8, 0.8, 0.8, 2, False)
    assert result.rate == 80
    assert result.cpu_ratio == pytest.approx(0.8)

    doubtful = echo.result({"epoll": [slow], "kernel": [slow]}, "kernel")
    assert doubtful is not None
    assert (doubtful.ratio, doubtful.doubtful) == (1.0, True)
    assert echo.result({"epoll": [slow], "kernel": [None]}, "kernel") is None


def test_slices_in_which_something_was_disturbed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def figure(*slices: str) -> Figure:
        command = [sys.executable, "-c", f"print({chr(10).join(slices)!r})"]
        return echo.run_load(command, SimpleNamespace(port=0, pid=0), LARGE, SECONDS)

    monkeypatch.setattr(echo, "cpus", lambda: [None])
    assert figure("50 0.5 0.4 0", "50 0.5 0.4 0", "1 0.5 0.1 0.3") == Figure(rate=100, cpu=0.008, busy=0.8, calm=2 / 3)
    assert figure("50 0.5 0.4 0.4", "50 0.5 0.4 0.4") == Figure(rate=100, cpu=0.008, busy=0.8, calm=0)


def test_the_tables_go_between_the_marks_of_this_python(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    mark = f"<!-- figures: CPython {sys.version_info.major}.{sys.version_info.minor} -->"
    page.write_text(f"above\n{mark}\nold\n<!-- end -->\n<!-- figures: CPython 2.7 -->\nancient\n<!-- end -->\n")
    for lines in (["new"], ["newer", "still"]):
        echo.put_between_marks(page, lines)
    assert page.read_text() == (
        f"above\n{mark}\n\nnewer\nstill\n\n<!-- end -->\n<!-- figures: CPython 2.7 -->\nancient\n<!-- end -->\n"
    )
    page.write_text("nothing\n")
    with pytest.raises(SystemExit, match="no line"):
        echo.put_between_marks(page, ["new"])
