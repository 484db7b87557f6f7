"""Echo servers compared, over TCP on the loopback: `python tests/bench/echo.py`. Linux.

Each server of `echo_servers.py` sends back what it receives. A load (`echo_load.c`, or `echo_load.py` where there is no
C compiler) keeps so many connections busy, checks every byte, and counts. The server has one CPU to itself, the load
another. What counts is the rate relative to `epoll`, callbacks by hand: the most that Python can do.

To be fair to all, and to mean something:

* The contenders take turns, in rounds, and each is compared with the limit of its own round. The median counts.
* Each measurement has a fresh server, and before it a short run whose connections are closed again. Without that,
  asyncio's buffers of 256 KiB are an `mmap` each: malloc keeps such a block only once it has seen one freed.
* The load spins, and no CPU may fall asleep while this runs (/dev/cpu_dma_latency, for which one must be root). Else a
  single connection measures how long it takes to wake a CPU; and a slow server, which finds the next message there
  already and does not sleep, comes out better than a fast one.
* The load takes its source ports itself, as those of closed connections are blocked for a minute.
* Beside the rate stands the CPU time that the server takes for a request. Where the server was not busy all the time,
  the load was a limit too.
* Slices of 50 ms in which something else had one of the two CPUs for a while are left out. If these were most of them,
  the measurement is made again. If that does not help, the figure does not count, or has a `~` if there is none better.

The tables are Markdown. Needs the `bench` extra; a contender that is not installed is left out with a notice.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

from compare import environment, progress, table_head, table_row
from echo_servers import SERVERS, missing, options

HERE = Path(__file__).parent
LIMIT = "epoll"
LIFETIME = 120  # seconds after which a server ends by itself
ATTEMPTS = 4  # to make a measurement that nobody disturbs; on a busy machine two on average
DISTURBED = 0.03  # part of a slice in which server or load waited for its CPU


@dataclass(frozen=True)
class Case:
    """One column of the table. `wanted` is what part of the limit's rate this package shall reach."""

    name: str
    what: str
    kind: str
    connections: int
    size: int
    wanted: float


CASES = (
    Case("1x1KiB", "1 connection, 1 KiB", "echo", 1, 1024, 0.88),
    Case("50x1KiB", "50, 1 KiB", "echo", 50, 1024, 0.76),
    Case("500x1KiB", "500, 1 KiB", "echo", 500, 1024, 0.70),
    Case("50x64KiB", "50, 64 KiB", "echo", 50, 65536, 0.80),
    Case("connect", "connect, echo, close", "connect", 50, 1024, 0.75),
)


@dataclass(frozen=True)
class Figure:
    """What one measurement gave."""

    rate: float  # requests per second
    cpu: float  # of the server: seconds per request
    busy: float  # part of the time in which the server ran
    calm: float  # part of the slices that were not disturbed; if below a half, none is left out

    @property
    def counts(self) -> bool:
        return self.calm >= 0.5


@dataclass(frozen=True)
class Result:
    """What the rounds gave, of one contender in one case."""

    rate: float
    cpu: float
    busy: float
    ratio: float | None = None  # of its rate to the limit's: the median, the lowest and the highest of the rounds
    lowest: float | None = None
    highest: float | None = None
    cpu_ratio: float | None = None  # of the limit's CPU time per request to its own
    disturbed: int = 0  # rounds in which it, or the limit, was
    doubtful: bool = False  # as there was no other round


# Case -> contender -> a figure from each round; None where it failed.
Figures = dict[str, dict[str, list[Figure | None]]]
Results = dict[str, dict[str, Result]]


def main() -> int:
    choice = parse_options()
    cases, contenders = choice.cases, [name for name in choice.contenders if takes_part(name)]
    started = time.monotonic()
    with load_command(choice.load) as load, nobody_asleep():
        figures = run_rounds(cases, contenders, load, choice)
    results = {name: {who: r for who in row if (r := result(row, who))} for name, row in figures.items()}
    told = environment(list(dict.fromkeys(name.partition("-")[0] for name in contenders if name != LIMIT)))
    tables = [
        ratios_table(cases, contenders, results),
        figures_table(cases, contenders, results),
        targets_table(cases, results) if "kernel" in contenders and LIMIT in contenders else [],
    ]
    lines = [f"{key}: {value}  " for key, value in told.items() if isinstance(value, str)]
    for table in tables:
        lines += ["", *table] if table else []
    print("\n".join(lines))
    print(f"\n{time.monotonic() - started:.0f} s, load: {load[-1]}", file=sys.stderr)
    if choice.json:
        write_json(choice.json, told, figures, results)
    if choice.markdown:
        put_between_marks(choice.markdown, lines)
    return 0


def parse_options() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [case.name for case in CASES]
    parser.add_argument("--rounds", type=int, default=7, help="how often each is measured (default 7)")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each time (default 1)")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=[*names, *SERVERS],
        default=[],
        help=f"some cases, some contenders, or both: {', '.join([*names, *SERVERS])}. {LIMIT} always takes part",
    )
    parser.add_argument("--load", choices=("c", "python"), help="which load (default: C, if there is a compiler)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="put the tables into FILE, between the marks for this Python"
    )
    choice = parser.parse_args()
    choice.cases = [case for case in CASES if case.name in choice.only] or CASES
    chosen = {name for name in choice.only if name in SERVERS} or set(SERVERS)
    choice.contenders = [name for name in SERVERS if name in chosen | {LIMIT}]
    return choice


def takes_part(name: str) -> bool:
    if why := missing(name):
        print(f"{name} is left out: {why}", file=sys.stderr)
    return not why


# ---- measuring ----------------------------------------------------------------------------------------------


class Server:
    """A server in a process of its own, for as long as the block lasts: `with Server("trio", cpu) as server`."""

    def __init__(self, name: str, cpu: int | None = None) -> None:
        command = [sys.executable, *options(name), str(HERE / "echo_servers.py"), name, str(LIFETIME)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        pin(self.pid, cpu)

    def __enter__(self) -> Server:
        assert self.process.stdout is not None
        try:
            self.port = int(self.process.stdout.readline())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def run_rounds(cases: list[Case], contenders: list[str], load: list[str], choice: argparse.Namespace) -> Figures:
    figures: Figures = {case.name: {who: [] for who in contenders} for case in cases}
    spare = choice.rounds * len(cases) * len(contenders)
    for number in range(choice.rounds):
        for case in cases:
            # Forth and back, so that a machine that gets slower or faster favours nobody.
            for who in contenders if number % 2 == 0 else reversed(contenders):
                progress(f"round {number + 1} of {choice.rounds}: {case.what}: {who}")
                figure, attempts = measure(who, case, load, choice.seconds, min(ATTEMPTS, 1 + spare))
                figures[case.name][who].append(figure)
                spare -= attempts - 1
    progress("")
    return figures


def measure(who: str, case: Case, load: list[str], seconds: float, attempts: int) -> tuple[Figure | None, int]:
    """The first calm figure of some attempts, or else the calmest, and how many there were; None, with the reason on
    stderr, if the contender fails.
    """
    best = None
    for attempt in range(1, attempts + 1):
        try:
            with Server(who, cpus()[0]) as server:
                run_load(load, server, case, min(seconds, 0.2))
                figure = run_load(load, server, case, seconds)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            print(f"\n{who}: {case.name} failed: {error}", file=sys.stderr)
            return None, attempt
        best = max(best or figure, figure, key=lambda figure: figure.calm)
        if best.counts:
            break
    return best, attempt


def run_load(load: list[str], server: Server, case: Case, seconds: float) -> Figure:
    command = [*load, str(server.port), case.kind, str(case.connections), str(case.size), str(seconds), str(server.pid)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        pin(process.pid, cpus()[-1])
        try:
            told, _ = process.communicate(timeout=seconds + 30)
        finally:
            process.kill()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    slices = [[float(word) for word in line.split()] for line in told.splitlines()]
    calm = [(requests, time_, cpu, waited) for requests, time_, cpu, waited in slices if waited < DISTURBED * time_]
    share = len(calm) / len(slices)
    requests, time_, cpu, _ = map(sum, zip(*(calm if share >= 0.5 else slices), strict=True))
    return Figure(rate=requests / time_, cpu=cpu / max(1, requests), busy=cpu / time_, calm=share)


@contextlib.contextmanager
def load_command(wanted: str | None) -> Iterator[list[str]]:
    """How to start the load, compiled if it can be."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if wanted == "c" and compiler is None:
        raise SystemExit("there is no C compiler")
    if wanted == "python" or compiler is None:
        print("the load is in Python: it is slower than a good server, so the ratios are too good", file=sys.stderr)
        yield [sys.executable, str(HERE / "echo_load.py")]
        return
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "echo_load"))
        subprocess.run([compiler, "-O2", "-o", program, str(HERE / "echo_load.c")], check=True)
        yield [program]


@contextlib.contextmanager
def nobody_asleep() -> Iterator[None]:
    """Keep idle CPUs awake: the system does, as long as somebody holds this file open and wants 0 us of latency."""
    try:
        wish = os.open("/dev/cpu_dma_latency", os.O_WRONLY)
    except OSError:
        print("not root: CPUs may sleep, and with one connection the time to wake them is measured", file=sys.stderr)
        yield
        return
    try:
        os.write(wish, struct.pack("i", 0))
        yield
    finally:
        os.close(wish)


def cpus() -> list[int | None]:
    """Those that we may use: the first is the server's, the last the load's."""
    allowed = sorted(os.sched_getaffinity(0))
    return [*allowed] if len(allowed) > 1 else [None]


def pin(pid: int, cpu: int | None) -> None:
    if cpu is not None:
        os.sched_setaffinity(pid, {cpu})


# ---- reckoning ----------------------------------------------------------------------------------------------


def result(row: dict[str, list[Figure | None]], who: str) -> Result | None:
    """The medians over the rounds that count; over all, if none does."""
    own = [figure for figure in row[who] if figure]
    if not own:
        return None
    calm = [figure for figure in own if figure.counts] or own
    both = [(mine, limit) for mine, limit in zip(row[who], row.get(LIMIT, []), strict=False) if mine and limit]
    pairs = [(mine, limit) for mine, limit in both if mine.counts and limit.counts] or both
    ratios = [mine.rate / limit.rate for mine, limit in pairs]
    return Result(
        rate=median(figure.rate for figure in calm),
        cpu=median(figure.cpu for figure in calm),
        busy=median(figure.busy for figure in calm),
        ratio=median(ratios) if ratios else None,
        lowest=min(ratios, default=None),
        highest=max(ratios, default=None),
        cpu_ratio=median(limit.cpu / mine.cpu for mine, limit in pairs) if pairs else None,
        disturbed=sum(not (mine.counts and limit.counts) for mine, limit in both),
        doubtful=not all(mine.counts and limit.counts for mine, limit in pairs),
    )


# ---- telling ------------------------------------------------------------------------------------------------


def ratios_table(cases: list[Case], contenders: list[str], results: Results) -> list[str]:
    """What it is all about."""
    lines = table_head(["rate, of the limit's", *(case.what for case in cases)], right=len(cases))
    for who in contenders:
        found = [results[case.name].get(who) for case in cases]
        cells = [f"{'~' * r.doubtful}{r.ratio:.2f}" if r and r.ratio else "-" for r in found]
        lines.append(table_row([who, *cells]))
    return lines


def figures_table(cases: list[Case], contenders: list[str], results: Results) -> list[str]:
    head = ["requests per second; server CPU, us per request", *(case.what for case in cases)]
    lines = table_head(head, right=len(cases))
    for who in contenders:
        cells = []
        for case in cases:
            r = results[case.name].get(who)
            idle = f" ({r.busy:.0%} busy)" if r and r.busy < 0.9 else ""
            cells.append(f"{r.rate:,.0f}; {r.cpu * 1e6:.1f}{idle}" if r else "-")
        lines.append(table_row([who, *cells]))
    return lines


def targets_table(cases: list[Case], results: Results) -> list[str]:
    head = ["kernel, of the limit's", "wanted", "rate", "from - to", "by CPU time", "reached", "disturbed rounds"]
    lines = table_head(head)
    for case in cases:
        r = results[case.name].get("kernel")
        if r and r.ratio and r.cpu_ratio:
            spread = f"{r.lowest:.2f} - {r.highest:.2f}"
            reached = "?" if r.doubtful else "yes" if r.ratio >= case.wanted else "no"
            cells = [f"{case.wanted:.2f}", f"{r.ratio:.2f}", spread, f"{r.cpu_ratio:.2f}", reached, str(r.disturbed)]
            lines.append(table_row([case.what, *cells]))
    return lines


def write_json(path: Path, told: dict[str, Any], figures: Figures, results: Results) -> None:
    cases = {
        name: {
            who: {
                "median": dataclasses.asdict(results[name][who]) if who in results[name] else None,
                "rounds": [dataclasses.asdict(figure) if figure else None for figure in rounds],
            }
            for who, rounds in row.items()
        }
        for name, row in figures.items()
    }
    wanted = {case.name: case.wanted for case in CASES if case.name in figures}
    path.write_text(json.dumps({"environment": told, "wanted": wanted, "cases": cases}, indent=1) + "\n")


def put_between_marks(path: Path, lines: list[str], what: str = "figures") -> None:
    """Replace what stands between `<!-- figures: CPython 3.13 -->`, or whatever runs this, and `<!-- end -->`."""
    mark = f"<!-- {what}: CPython {sys.version_info.major}.{sys.version_info.minor} -->"
    text, count = re.subn(
        f"(?<={re.escape(mark)}\n).*?(?=<!-- end -->)",
        lambda _: "\n".join(["", *lines, "", ""]),
        path.read_text(),
        count=1,
        flags=re.DOTALL,
    )
    if not count:
        raise SystemExit(f"{path} has no line {mark!r} with a line '<!-- end -->' after it")
    path.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
