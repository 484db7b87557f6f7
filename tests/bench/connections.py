"""Idle connections held, and what each costs in memory: `python tests/bench/connections.py`. Linux.

To each server of `echo_servers.py` so many connections are opened, 10,000 unless told otherwise. Each says a kilobyte
and gets it back, so that it is really served, and is silent then. When all are there, the memory is measured; each
speaks once more, to show that it lives; and they are closed, after which the server must not hold a descriptor more
than before.

    memory      resident memory of the server per connection, in bytes, without what the operating system holds
    left        what remains of that when all of them are closed again
    CPU         of the server for accepting one, answering twice and closing, in us

Each server runs in a process of its own, once per round; the median counts. Memory does not depend on what else the
machine does, so a round or two are enough. Needs as many descriptors in two processes: the limit is raised as far as it
may be (`ulimit -Hn`), and if that is not enough, fewer connections are made.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from compare import environment, progress, table_head, table_row
from echo import LIMIT, Server, put_between_marks, takes_part
from echo_servers import SERVERS

FIRST = 100  # connections that are there before: what is allocated once stays out of the figure
SPARE = 100  # descriptors for everything else
MESSAGE = bytes(range(256)) * 4
SILENCE = 10.0  # seconds without an answer after which the server is taken to be stuck


@dataclass(frozen=True)
class Figure:
    memory: float
    left: float
    cpu: float


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--connections", type=int, default=10_000, metavar="N", help="how many (default 10,000)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default 3)")
    parser.add_argument("--only", nargs="+", metavar="CONTENDER", choices=list(SERVERS), default=list(SERVERS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="put the table into FILE, between the marks for this Python"
    )
    choice = parser.parse_args()
    contenders = [name for name in SERVERS if name in choice.only and takes_part(name)]
    count = min(choice.connections, raise_limit() - FIRST - SPARE)
    if count < choice.connections:
        print(f"only {count:,} connections: no more descriptors may be had", file=sys.stderr)

    figures: dict[str, list[Figure]] = {who: [] for who in contenders}
    for number in range(choice.rounds):
        for who in contenders:
            progress(f"round {number + 1} of {choice.rounds}: {who}")
            try:
                with Server(who) as server:
                    figures[who].append(hold(server, count))
            except (OSError, ValueError) as error:
                print(f"\n{who} failed: {error}", file=sys.stderr)
    progress("")
    told = environment(list(dict.fromkeys(name.partition("-")[0] for name in contenders if name != LIMIT)))
    lines = [
        *(f"{key}: {value}  " for key, value in told.items() if isinstance(value, str)),
        "",
        *table(figures, count),
    ]
    print("\n".join(lines))
    if choice.markdown:
        put_between_marks(choice.markdown, lines, "connections")
    if choice.json:
        rounds = {who: [vars(figure) for figure in row] for who, row in figures.items()}
        choice.json.write_text(
            json.dumps({"environment": told, "connections": count, "rounds": rounds}, indent=1) + "\n"
        )
    return 0


def raise_limit() -> int:
    """Let this process, and those that it will start, have as many descriptors as they may. Returns how many."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most if most != resource.RLIM_INFINITY else sys.maxsize


def hold(server: Server, count: int) -> Figure:
    """Open `count` connections, look at the server's memory, and close them."""
    first = open_connections(server.port, FIRST)
    held: list[socket.socket] = []
    try:
        before, files, cpu = resident(server.pid), open_files(server.pid), cpu_time(server.pid)
        held = open_connections(server.port, count)
        during = resident(server.pid)
        for connection in held:
            converse(connection)
            connection.close()
        deadline = time.monotonic() + SILENCE
        while (too_many := open_files(server.pid) - files) > 0:
            if time.monotonic() > deadline:
                raise ValueError(f"{too_many} descriptors were left open")
            time.sleep(0.01)
        after, cpu = resident(server.pid), cpu_time(server.pid) - cpu
    finally:
        for connection in (*first, *held):
            connection.close()
    return Figure((during - before) / count, (after - before) / count, cpu / count)


def open_connections(port: int, count: int) -> list[socket.socket]:
    connections: list[socket.socket] = []
    try:
        for _ in range(count):
            connections.append(socket.create_connection(("127.0.0.1", port), timeout=SILENCE))
            converse(connections[-1])
    except BaseException:
        for connection in connections:
            connection.close()
        raise
    return connections


def converse(connection: socket.socket) -> None:
    connection.sendall(MESSAGE)
    answer = b""
    while len(answer) < len(MESSAGE) and (data := connection.recv(65536)):
        answer += data
    if answer != MESSAGE:
        raise ValueError("what came back is not what was sent")


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def cpu_time(pid: int) -> float:
    return time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid() returns


def table(figures: dict[str, list[Figure]], count: int) -> list[str]:
    head = [f"{count:,} idle connections", "memory, B each", "of asyncio streams'", "left, B each", "CPU, us each"]
    lines = table_head(head, right=4)
    peer = figures.get("asyncio-streams")
    for who, row in figures.items():
        if row:
            memory = median(figure.memory for figure in row)
            ratio = f"{memory / median(figure.memory for figure in peer):.2f}" if peer else "-"
            left, cpu = median(figure.left for figure in row), median(figure.cpu for figure in row)
            lines.append(table_row([who, f"{memory:,.0f}", ratio, f"{left:,.0f}", f"{cpu * 1e6:.0f}"]))
    return lines


if __name__ == "__main__":
    sys.exit(main())
