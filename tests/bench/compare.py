"""Compare this package with asyncio, uvloop, trio and curio: `python tests/bench/compare.py`.

Each measurement runs in a process of its own. The contenders take turns, for several rounds, and the best round
counts: the best is what the code can do, the rest is what else the machine was doing. The garbage collector is left as
it is. Sizes grow until a measurement takes long enough, except where the row is about a number of tasks.

The tables are Markdown: the figures, each peer's with how many times this package's figure it is; then what the
project wants of them; then how the cost of an operation grows with the number of tasks asleep, and with the number of
those that wait for the same thing. Needs the `bench` extra; a peer that is not installed is left out with a notice. The
workloads are in `workloads_*.py`.

curio runs under `python -O`, as it checks `task not in ready` at each wake-up, which is linear in the ready tasks.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workloads import BACKGROUNDS, CONTENDERS, SCALING_CONTENDERS, UNITS, WAITED_FOR, WORKLOADS, Workload

MEASURE = str(Path(__file__).with_name("measure.py"))
TIME_LIMIT = 300.0

# Workload -> contender -> what each round gave, in seconds or bytes per operation.
Samples = dict[str, dict[str, list[float]]]
# "contender, operation, what the population does" -> population -> the best, in seconds.
Curves = dict[str, dict[int, float]]


def main() -> int:
    options = parse_options()
    contenders = available(options.contenders)
    if contenders[:1] != ["kernel"]:
        print("the package itself is not importable: install it, `pip install -e .[bench]`", file=sys.stderr)
        return 1
    wanted = [workload for workload in WORKLOADS if not options.only or workload.name in options.only]
    started = time.monotonic()
    samples = run_rounds(wanted, contenders, options)
    top = 4 if options.quick else 6 if options.full else 5
    curves = run_curves("scaling", BACKGROUNDS, range(2, top + 1), contenders, options)
    waiters = run_curves("waiters", WAITED_FOR, range(1, min(top, 5) + 1), contenders, options)
    best = {name: {who: min(values) for who, values in row.items() if values} for name, row in samples.items()}
    told = environment(contenders)

    print("\n".join(f"{key}: {value}" for key, value in told.items() if isinstance(value, str)))
    for lines in (
        figures_table(wanted, contenders, best),
        targets_table(wanted, best),
        scaling_table("so many asleep", curves),
        scaling_table("so many waiting", waiters),
    ):
        if lines:
            print("\n" + "\n".join(lines))
    print(f"\n{time.monotonic() - started:.0f} s", file=sys.stderr)
    if options.json:
        write_json(options.json, told, samples, best, curves, waiters)
    if options.png:
        draw(options.png, told, wanted, contenders, best, curves, waiters)
    return 0


def parse_options() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [*(workload.name for workload in WORKLOADS), "scaling", "waiters"]
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default 5)")
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD", choices=names, help=f"some of: {', '.join(names)}")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw a picture (with matplotlib)")
    parser.add_argument("--full", action="store_true", help="scaling up to 1e6 tasks: 1 GB and a minute or two")
    parser.add_argument("--quick", action="store_true", help="one short round: to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    options.seconds, options.repeats = (0.03, 1) if options.quick else (0.15, 2)
    return options


def available(wanted: list[str]) -> list[str]:
    """Those that are installed, the package itself first: it is what the others are compared with."""
    found = []
    for name in CONTENDERS:
        if name != "kernel" and name not in wanted:
            continue
        if name == "curio" and sys.version_info >= (3, 12):
            print("curio does not run on Python 3.12 and later, and is left out", file=sys.stderr)
        elif importlib.util.find_spec(name) is None:
            print(f"{name} is not installed and is left out", file=sys.stderr)
        else:
            found.append(name)
    return found


# ---- measuring ------------------------------------------------------------------------------------------


def run_rounds(wanted: list[Workload], contenders: list[str], options: argparse.Namespace) -> Samples:
    samples: Samples = {workload.name: {who: [] for who in contenders} for workload in wanted}
    for number in range(options.rounds):
        for workload in wanted:
            progress(f"round {number + 1} of {options.rounds}: {workload.name}")
            for who in contenders:
                figure = measure(who, workload.name, options)
                if figure is not None:
                    samples[workload.name][who].append(figure)
    progress("")
    return samples


def run_curves(
    name: str, subjects: tuple[str, ...], exponents: range, contenders: list[str], options: argparse.Namespace
) -> Curves:
    """Best of two rounds, or of one for a million: that takes long, and is steady."""
    curves: Curves = {}
    for subject in subjects if not options.only or name in options.only else ():
        for exponent in exponents:
            population = 10**exponent
            for who in contenders * (2 if exponent < 6 and not options.quick else 1):
                if who not in SCALING_CONTENDERS or (exponent > 5 and who != "kernel"):
                    continue
                progress(f"{name}: {who}, {population}, {subject}")
                for operation, figure in (measure(who, f"{name}:{subject}:{population}", options) or {}).items():
                    curve = curves.setdefault(f"{who}, {operation}, {subject}", {})
                    curve[population] = min(figure, curve.get(population, figure))
    progress("")
    return curves


def measure(who: str, name: str, options: argparse.Namespace) -> Any:
    """A figure from a process of its own, or None, with the reason on stderr."""
    command = [sys.executable, *(["-O"] if who == "curio" else []), MEASURE, who, name]
    command += [str(options.seconds), str(options.repeats)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        print(f"\n{who}: {name} took longer than {TIME_LIMIT:.0f} s", file=sys.stderr)
        return None
    if result.returncode:
        print(f"\n{who}: {name} failed:\n{result.stderr}", file=sys.stderr)
        return None
    return json.loads(result.stdout)


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def environment(contenders: list[str]) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in contenders if name not in ("kernel", "asyncio")}
    return {
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "CPU": f"{cpu_model()}, {os.cpu_count()} cores",
        "system": platform.system(),
        "peers": ", ".join(f"{name} {version}" for name, version in versions.items()) or "asyncio",
        "versions": versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ---- telling --------------------------------------------------------------------------------------------

Best = dict[str, dict[str, float]]


def ratios(best: Best, workload: Workload) -> dict[str, float]:
    """Of each peer: how many times this package's figure its own is."""
    row = best.get(workload.name, {})
    return {who: figure / row["kernel"] for who, figure in row.items() if who != "kernel" and row.get("kernel")}


def figures_table(wanted: list[Workload], contenders: list[str], best: Best) -> list[str]:
    if not wanted:
        return []
    lines = table_head(["workload", "unit", *contenders], right=len(contenders))
    for workload in wanted:
        row, ratio = best[workload.name], ratios(best, workload)
        cells = [
            (number(row[who] * UNITS[workload.unit]) + (f" ({ratio[who]:.1f})" if who in ratio else ""))
            if who in row
            else "-"
            for who in contenders
        ]
        lines.append(table_row([workload.what, workload.unit, *cells]))
    return [*lines, "", "In parentheses: how many times the kernel's figure, so above 1 the kernel is better."]


def targets_table(wanted: list[Workload], best: Best) -> list[str]:
    rows = []
    for workload in wanted:
        ratio = ratios(best, workload)
        targets = {who: least for who, least in workload.targets.items() if who in ratio}
        if targets:
            short = [who for who, least in targets.items() if ratio[who] < least]
            rows.append(
                [
                    workload.what,
                    ", ".join(f"{who} {least:.3g}" for who, least in targets.items()),
                    ", ".join(f"{who} {ratio[who]:.2f}" for who in targets),
                    "yes" if not short else "not for " + ", ".join(short),
                ]
            )
    if not rows:
        return []
    return [*table_head(["workload", "wanted, at least", "measured", "reached"]), *map(table_row, rows)]


def scaling_table(what: str, curves: Curves) -> list[str]:
    if not curves:
        return []
    populations = sorted({population for curve in curves.values() for population in curve})
    head = [f"ns per operation, with {what}:", *(f"1e{len(str(population)) - 1}" for population in populations)]
    lines = table_head([*head, "last / 1e3"], right=len(populations) + 1)
    for name, curve in curves.items():
        cells = [number(curve[population] * 1e9) if population in curve else "-" for population in populations]
        growth = f"{curve[max(curve)] / curve[1000]:.2f}" if 1000 in curve else "-"
        lines.append(table_row([name, *cells, growth]))
    return lines


def table_head(cells: list[str], right: int = 0) -> list[str]:
    """The last `right` columns are numbers."""
    rules = ["---"] * (len(cells) - right) + ["---:"] * right
    return [table_row(cells), table_row(rules)]


def table_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def number(value: float) -> str:
    """Three digits, or all those before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_json(path: Path, told: dict[str, Any], samples: Samples, best: Best, curves: Curves, waiters: Curves) -> None:
    rows = {
        workload.name: {
            "what": workload.what,
            "unit": "bytes" if workload.unit == "B" else "seconds",
            "best": best[workload.name],
            "rounds": samples[workload.name],
            "ratios": ratios(best, workload),
            "targets": workload.targets,
        }
        for workload in WORKLOADS
        if workload.name in best
    }
    told_of_all = {"environment": told, "workloads": rows, "scaling": curves, "waiters": waiters}
    path.write_text(json.dumps(told_of_all, indent=1) + "\n")


def draw(
    path: Path,
    told: dict[str, Any],
    wanted: list[Workload],
    contenders: list[str],
    best: Best,
    curves: Curves,
    waiters: Curves,
) -> None:
    """Bars of the ratios, the curves of this package, and everybody's with many waiting for the same thing."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    sizes = {"height_ratios": (2 + 0.35 * len(wanted), 5, 5, 5), "figsize": (11, 17 + 0.35 * len(wanted))}
    figure, (bars, lines, let_go, cancel) = plt.subplots(4, 1, **sizes, layout="constrained")
    figure.suptitle(f"{told['Python']}, {told['CPU']}\n{told['peers']}", fontsize=10)

    peers = [who for who in contenders if who != "kernel"]
    shown = [workload for workload in wanted if ratios(best, workload)]
    for position, who in enumerate(peers):
        ratio = {at: ratios(best, workload).get(who) for at, workload in enumerate(shown)}
        at = [x for x, value in ratio.items() if value is not None]
        height = 0.8 / len(peers)
        bars.barh([x + position * height for x in at], [ratio[x] for x in at], height, label=who)
    bars.set_xscale("log")
    bars.axvline(1, color="black", linewidth=1)
    bars.set_yticks([x + 0.4 - 0.4 / max(1, len(peers)) for x in range(len(shown))], [w.what for w in shown])
    bars.invert_yaxis()
    bars.set_title("how many times the kernel's figure (right of 1: the kernel is better)")
    bars.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    bars.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    bars.grid(axis="x", alpha=0.3)

    colours: dict[str, str] = {}
    for name, curve in curves.items():
        who, operation, background = name.split(", ")
        if who != "kernel":
            continue
        xs = sorted(curve)
        ns = [curve[x] * 1e9 for x in xs]
        dashes = "-" if background == BACKGROUNDS[0] else "--"
        (drawn,) = lines.plot(
            xs, ns, dashes, marker="o", color=colours.get(operation), label=f"{operation}, {background}"
        )
        colours[operation] = drawn.get_color()
    lines.set_xscale("log")
    lines.set_ylim(bottom=0)
    lines.set_title("the kernel: ns per operation, by the number of tasks asleep or deadlines standing")
    lines.grid(alpha=0.3)
    if curves:
        lines.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    dashes_of = {"kernel": "-", "asyncio": "--", "trio": ":"}
    for panel, wanted_operation in ((let_go, "let one go"), (cancel, "cancel one")):
        for name, curve in waiters.items():
            who, operation, thing = name.split(", ")
            if operation == wanted_operation:
                xs = sorted(curve)
                colour = f"C{WAITED_FOR.index(thing)}"
                ns = [curve[x] * 1e9 for x in xs]
                panel.plot(xs, ns, dashes_of[who], marker="o", color=colour, label=f"{who}, {thing}")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(f"{wanted_operation} of so many that wait for the same thing: ns")
        panel.grid(alpha=0.3)
        if waiters:
            panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
