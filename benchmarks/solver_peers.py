r"""How fast is the divergence at a given accuracy, beside everybody else's?

    python benchmarks/solver_peers.py                # the whole grid; hours; goes on where it stopped
    python benchmarks/solver_peers.py --anchors      # eight cells, one thread, about twelve minutes
    python benchmarks/solver_peers.py --shrinkage    # what each way of debiasing costs at equal shrinkage
    python benchmarks/solver_peers.py --smoke-test   # seconds; writes nothing

Value and gradient in ``x`` of the same-batch divergence of two clouds of n points in float32, epsilon kappa times the standard
deviation of the cost (``_clouds.py``). Each method (``_peers.py``) is swept over its own accuracy knob, and counts
with its fastest setting whose gradient is within 1e-2, or 1e-3, of a float64 reference (relative L2). The defaults are listed
whatever their error. ``independent`` halves at equal n are another function, with a reference of their own.

Each method and cell has a process of its own and a limit of time: not reaching the accuracy in it is a result. The
processes of a cell import first, are swept one after another, and then time their chosen settings in turns.
Milliseconds are medians of processor time for one thread, so that a neighbour counts for less, and of the wall clock for
more. Memory is the process's peak during the call above what it held before the first one; the cold start is the first
call, with compilation, without imports.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from _clouds import FOLDER, Cell, NotConverged, reference
from _floor import floor
from _peer_figure import draw
from _peers import METHODS
from _report import RESULTS
from _resume import Rows
from _worker import Worker

TARGETS = (1e-2, 1e-3)
PACKAGES = ("geomloss", "POT", "ott-jax", "jax", "flash-sinkhorn")
ANCHORS = [
    Cell(128, 8, 0.2),
    Cell(256, 8, 0.05),
    Cell(512, 8, 0.2),
    Cell(512, 8, 0.05),
    Cell(512, 64, 0.2),
    Cell(1024, 8, 0.2),
    Cell(4096, 8, 0.2),
    Cell(10_000, 8, 0.2),
]
SIZES, DIMENSIONS, KAPPAS = (128, 256, 512, 1024, 4096, 10_000), (2, 8, 16, 64), (0.2, 0.05, 0.01)
INDEPENDENT = "ours, independent halves"

Record = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """How long anything may take."""

    seconds: float = 20.0  # for a method's sweep, up to n = 1024
    large_seconds: float = 40.0  # above
    repeat: float = 0.1  # for one setting, within the sweep and in each round of turns
    rounds: int = 3
    cheap_ms: float = 300.0  # what is slower is not timed again in turns

    def sweep(self, n: int) -> float:
        return self.seconds if n <= 1024 else self.large_seconds


def grid(sizes: Iterable[int], dimensions: Iterable[int], kappas: Iterable[float]) -> list[Cell]:
    """The anchors among them first."""
    cells = [Cell(*values) for values in itertools.product(sizes, dimensions, kappas)]
    return [c for c in ANCHORS if c in cells] + [c for c in cells if c not in ANCHORS]


# One cell.


def measure(
    cell: Cell, threads: int, methods: list[str], backend: str, limits: Limits, before: list[Record]
) -> Record:
    """All methods on one cell."""
    held: dict[str, Any] = {}
    for debias in sorted({_debias(name) for name in methods}):
        try:
            held[debias] = reference(cell, debias).seconds
        except NotConverged as failed:
            return {"methods": {}, "floor": None, "no_reference": str(failed)}
    found: dict[str, Record] = {}
    for name in methods:
        reason = hopeless(name, cell, threads, limits, before)
        if reason:
            found[name] = {"end": reason, "attempts": []}
    workers = {name: Worker(threads) for name in methods if name not in found}
    try:
        for name, worker in workers.items():
            worker.send({"do": "prepare", "method": name})
        for name, worker in workers.items():
            *_, last = worker.answers(120)
            if last["end"] != "done":
                found[name] = {"end": _why(last), "attempts": []}
        for name, worker in workers.items():
            if name not in found:
                found[name] = sweep(worker, name, cell, backend, limits)
                if found[name]["end"].startswith("stopped"):
                    worker.stop()
        in_turns(workers, found, limits)
    finally:
        for worker in workers.values():
            worker.stop()
    methods_found = {name: summary(found[name], threads) for name in methods}
    return {"methods": methods_found, "floor": of_ours(cell, threads, methods_found), "reference_s": held}


def _debias(method: str) -> str:
    return "independent" if method == INDEPENDENT else "self"


def _why(last: Record) -> str:
    return f"skipped: {last['reason']}" if last["end"] == "skipped" else last["end"]


def hopeless(name: str, cell: Cell, threads: int, limits: Limits, before: list[Record]) -> str | None:
    """Why a method need not be tried, from a smaller cell like this one."""
    like = [
        row
        for row in before
        if (row["d"], row["kappa"], row["threads"], row["seed"]) == (cell.d, cell.kappa, threads, cell.seed)
        and row["n"] < cell.n
        and name in row["methods"]
    ]
    if not like:
        return None
    row = max(like, key=lambda row: row["n"])
    there = row["methods"][name]
    if "out of memory" in there["end"]:
        return f"not tried: out of memory at n = {row['n']}"
    if there["end"].startswith("not tried"):
        return str(there["end"])
    times = [attempt["ms"] for attempt in there["attempts"]]
    if times and min(times) * (cell.n / row["n"]) ** 2 > limits.sweep(cell.n) * 1e3:
        return f"not tried: {min(times) / 1e3:.1f} s or more at n = {row['n']}"
    return None


def sweep(worker: Worker, name: str, cell: Cell, backend: str, limits: Limits) -> Record:
    """All settings of one method, until the time is up."""
    key = "_".join(f"{key}{value}" for key, value in asdict(cell).items())
    seconds = limits.sweep(cell.n)
    worker.send(
        {
            "do": "sweep",
            "method": name,
            "options": {"backend": backend} if name in ("ours", INDEPENDENT) else {},
            "cell": asdict(cell),
            "reference": str(FOLDER / f"{key}_{_debias(name)}.pt"),
            "seconds": seconds,
            "repeat": limits.repeat,
            "target": min(TARGETS),
        }
    )
    *attempts, last = worker.answers(1.5 * seconds)
    return {"end": _why(last), "attempts": attempts}


def in_turns(workers: dict[str, Worker], found: dict[str, Record], limits: Limits) -> None:
    """Time the chosen settings of all methods again, interleaved; their times are added to those of the sweep."""
    chosen = {
        (name, attempt["index"]): attempt
        for name, worker in workers.items()
        if worker.alive
        for attempt in [*reached(found[name]["attempts"]).values(), *defaults(found[name]["attempts"])]
        if median(attempt["wall_ms"]) < limits.cheap_ms
    }
    for attempt in chosen.values():
        attempt["cpu_ms"], attempt["wall_ms"] = [], []
    for _ in range(limits.rounds):
        for (name, index), attempt in chosen.items():
            workers[name].send({"do": "time", "index": index, "seconds": limits.repeat})
            *answers, _last = workers[name].answers(60)
            for answer in answers:
                attempt["cpu_ms"] += answer["cpu_ms"]
                attempt["wall_ms"] += answer["wall_ms"]


def reached(attempts: list[Record]) -> dict[str, Record]:
    """The fastest attempt within each target."""
    found = {}
    for target in TARGETS:
        good = [a for a in attempts if a.get("gradient_error", 0.0) <= target]
        if good:
            found[f"{target:g}"] = min(good, key=lambda a: median(a["cpu_ms"]))
    return found


def defaults(attempts: list[Record]) -> list[Record]:
    return [attempt for attempt in attempts if attempt["default"]]


def summary(found: Record, threads: int) -> Record:
    """What is kept of a method: medians instead of all repetitions."""
    kept = []
    for attempt in found["attempts"]:
        cpu, wall = attempt.pop("cpu_ms"), attempt.pop("wall_ms")
        ms = {"ms": median(cpu if threads == 1 else wall), "wall_ms": median(wall), "least_ms": min(wall)}
        kept.append({**attempt, **ms, "repetitions": len(wall)})
    best = {
        f"{target:g}": min(good, key=lambda a: a["ms"])["index"]
        for target in TARGETS
        if (good := [a for a in kept if a.get("gradient_error", 0.0) <= target])
    }
    default = next((a["index"] for a in kept if a["default"]), None)
    return {"end": found["end"], "best": best, "default": default, "attempts": kept}


def of_ours(cell: Cell, threads: int, methods: dict[str, Record]) -> Record | None:
    """The floor for the passes that ``ours`` made to reach the looser target, and how near it came."""
    ours = methods.get("ours", {"best": {}})
    index = ours["best"].get(f"{TARGETS[0]:g}")
    if index is None:
        return None
    attempt = next(a for a in ours["attempts"] if a["index"] == index)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = floor(cell, attempt["passes"], attempt["tolerance"] or 1e-4)
    finally:
        torch.set_num_threads(before)
    return found | {"fraction": found["ms"] / attempt["ms"]}


# The table in the terminal.


def show(row: Record) -> None:
    print(f"\nn {row['n']}, d {row['d']}, kappa {row['kappa']:g}, threads {row['threads']}", flush=True)
    if "no_reference" in row:
        print(f"  no reference: {row['no_reference']}")
    if row["floor"]:
        print(f"  floor {row['floor']['ms']:.2f} ms; ours at {row['floor']['fraction']:.0%} of it")
    for name, method in row["methods"].items():
        by_index = {a["index"]: a for a in method["attempts"]}
        cells = []
        for target in TARGETS:
            a = by_index.get(method["best"].get(f"{target:g}"))
            text = f"{a['ms']:.2f} ms ({a['variant']} {a['knob']})" if a else "not reached"
            cells.append(f"{target:g}: {text}")
        default = by_index.get(method["default"])
        if default:
            cells.append(f"default {default['ms']:.2f} ms, error {default['gradient_error']:.1e}")
        text = "; ".join(cells) if by_index else ""
        end = "" if method["end"] == "done" else f" [{method['end']}]"
        print(f"  {name:<26} {text}{end}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke-test", action="store_true", help="one small cell; writes nothing")
    parser.add_argument("--anchors", action="store_true", help="the eight cells that are followed over time")
    parser.add_argument(
        "--shrinkage", action="store_true", help="time at equal shrinkage instead (_equal_shrinkage.py)"
    )
    parser.add_argument("--figure", action="store_true", help="draw the kept results again")
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--dimensions", nargs="*", type=int, default=list(DIMENSIONS))
    parser.add_argument("--kappas", nargs="*", type=float, default=list(KAPPAS))
    parser.add_argument("--threads", nargs="*", type=int, help="1 for --anchors, else 1 2 by default")
    parser.add_argument("--backend", default="auto", help="of 'ours'; 'log' where there is no 'auto'")
    parser.add_argument(
        "--methods", nargs="*", choices=list(METHODS), help="only these; then nothing is kept"
    )
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="for a sweep, up to n = 1024")
    parser.add_argument("--large-seconds", type=float, default=Limits.large_seconds, help="for a sweep above")
    options = parser.parse_args()
    if options.shrinkage:
        from _equal_shrinkage import run

        run(options.backend, options.smoke_test)
        return
    if options.figure:  # whatever limits they were measured under
        print("wrote", draw(json.loads((RESULTS / "solver_peers.json").read_text())["rows"]))
        return
    methods = options.methods or list(METHODS)
    limits = Limits(options.seconds, options.large_seconds)
    cells = ANCHORS if options.anchors else grid(options.sizes, options.dimensions, options.kappas)
    threads = options.threads or ([1] if options.anchors else [1, 2])
    if options.smoke_test:
        cells, threads, limits = [Cell(64, 2, 0.2)], [1], Limits(seconds=4.0, repeat=0.02, rounds=1)
    settings = {"backend": options.backend, "targets": TARGETS, **asdict(limits)}
    keys = ("n", "d", "kappa", "seed", "threads")
    keep = not options.smoke_test and options.methods is None
    rows = Rows("solver_peers", settings, keys, keep, PACKAGES, show)
    for count, cell in itertools.product(threads, cells):
        rows.make(
            lambda cell=cell, count=count: measure(cell, count, methods, options.backend, limits, rows.rows),
            **asdict(cell),
            threads=count,
        )
    if keep:
        print("\nwrote", draw(rows.rows))


if __name__ == "__main__":
    main()
