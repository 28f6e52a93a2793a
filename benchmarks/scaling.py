r"""How time and memory of the divergence grow: with n, d, epsilon and the number of problems.

    python benchmarks/scaling.py                # goes on where it stopped
    python benchmarks/scaling.py --smoke-test   # seconds; writes nothing

Value and gradient in ``x`` of the same-batch divergence at the solver's default tolerance, float32, one thread, on the
clouds of ``_clouds.py``, each point in a process of its own with a limit of time. Backends that are not there are
skipped by name. One thing varies at a time, around n = 512, d = 8, kappa = .2, one problem. Exponents are slopes of
log time, or log memory, with 95% intervals (Student) over the points listed with them: below n = 512 the call itself is
what costs.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from _clouds import Cell
from _peers import available_backends
from _resume import Rows
from _worker import Worker

FIGURE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "solver_scaling.png"
SECONDS = 120.0
BASE = {"n": 512, "d": 8, "kappa": 0.2, "groups": 1}
VALUES: dict[str, tuple[float, ...]] = {
    "n": (64, 128, 256, 512, 1024, 2048, 4096, 8192),
    "d": (2, 4, 8, 16, 32, 64, 128),
    "kappa": (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01),
    "groups": (1, 2, 4, 8, 16, 32, 64),
}
#: These keep no matrix, and go on.
LARGE = (16_384, 32_768, 65_536, 100_000)
STREAMING = ("streaming", "triton", "flash")
#: Exponents are fitted from here on.
FROM = {"n": 512, "d": 8, "kappa": 0.0, "groups": 4}

Record = dict[str, Any]


def point(backend: str, axis: str, values: Record, seconds: float, repeat: float = 2.0) -> Record:
    """One point of a study: medians of a few calls, in a process of its own."""
    cell = Cell(int(values["n"]), int(values["d"]), values["kappa"], values["seed"])
    worker = Worker(threads=1)
    try:
        request = {"method": "ours", "options": {"backend": backend}, "cell": asdict(cell), "target": 0.0}
        request |= {"seconds": seconds, "repeat": repeat, "only_default": True}
        worker.send({"do": "prepare", **request})
        *_, ready = worker.answers(120)
        if ready["end"] != "done":
            return {"end": ready.get("reason", ready["end"])}
        groups = int(values["groups"]) if axis == "groups" else None
        worker.send({"do": "sweep", "groups": groups, **request})
        *answers, last = worker.answers(1.2 * seconds)
    finally:
        worker.stop()
    if not answers:
        return {"end": last["end"]}
    (found,) = answers
    return {
        "end": "done",
        "ms": median(found["cpu_ms"]),
        "wall_ms": median(found["wall_ms"]),
        "first_ms": found["first_ms"],
        "peak_mb": found["peak_mb"],
        "passes": found["passes"],
        "repetitions": len(found["cpu_ms"]) if found["repeated"] else 1,
    }


def exponents(rows: list[Record]) -> list[Record]:
    """Slopes by study, backend and quantity."""
    from scipy import stats

    found = []
    for axis, backend in sorted({(row["axis"], row["backend"]) for row in rows}):
        for quantity in ("ms", "peak_mb"):
            points = sorted(
                (row[axis], row[quantity])
                for row in rows
                if (row["axis"], row["backend"], row["end"]) == (axis, backend, "done")
                and row[axis] >= FROM[axis]
                and (row[quantity] or 0)
                > (1 if quantity == "peak_mb" else 0)  # below 1 MB is the allocator's
            )
            if len(points) < 3:
                continue
            fit = stats.linregress([math.log(x) for x, _ in points], [math.log(y) for _, y in points])
            half = float(stats.t.ppf(0.975, len(points) - 2) * fit.stderr)
            span = {"from": points[0][0], "to": points[-1][0], "points": len(points)}
            found.append(
                {"axis": axis, "backend": backend, "quantity": quantity}
                | {"exponent": float(fit.slope), "half_width": half, **span}
            )
    return found


def draw(rows: list[Record], path: Path = FIGURE) -> Path:
    """Time above, memory below; a column for each study."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"n": "n = m", "d": "d", "kappa": "epsilon / std(C)", "groups": "problems of n = 512"}
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    figure, axes = plt.subplots(2, len(labels), figsize=(13, 6), layout="constrained", sharey="row")
    slopes = {(e["axis"], e["backend"], e["quantity"]): e["exponent"] for e in exponents(rows)}
    for column, (axis, label) in enumerate(labels.items()):
        for line, quantity in enumerate(("ms", "peak_mb")):
            panel = axes[line, column]
            for index, backend in enumerate(backends):
                points = sorted(
                    (row[axis], row[quantity])
                    for row in rows
                    if (row["axis"], row["backend"], row["end"]) == (axis, backend, "done")
                    and (row[quantity] or 0) > 0
                )
                if not points:
                    continue
                slope = slopes.get((axis, backend, quantity))
                name = backend if slope is None else f"{backend} ({slope:.2f})"
                panel.plot(*zip(*points, strict=True), marker="o", ms=4, color=f"C{index}", label=name)
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.grid(color="0.9", lw=0.6)
            if panel.get_legend_handles_labels()[0]:
                panel.legend(frameon=False, fontsize=8)
            for side in ("top", "right"):
                panel.spines[side].set_visible(False)
        axes[1, column].set_xlabel(label)
    axes[0, 0].set_ylabel("ms, one thread")
    axes[1, 0].set_ylabel("peak memory, MB")
    figure.suptitle("Debiased divergence, value and gradient, by backend (fitted exponent)", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke-test", action="store_true", help="three small points; writes nothing")
    parser.add_argument("--figure", action="store_true", help="draw the kept results again")
    parser.add_argument("--backends", nargs="*", default=["auto", "dense", "streaming", "log"])
    parser.add_argument("--axes", nargs="*", choices=list(VALUES), default=list(VALUES))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one point")
    options = parser.parse_args()
    smoke = options.smoke_test
    rows = Rows(
        "solver_scaling",
        {"base": BASE, "threads": 1},
        ("axis", "backend", "n", "d", "kappa", "groups", "seed"),
        keep=not smoke,
        show=lambda row: print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}),
    )
    present = available_backends()
    for backend in options.backends:
        if backend not in present:
            print(f"skipped: no backend {backend!r} in this version, or not on this machine")
            continue
        if options.figure:
            continue
        for axis in options.axes:
            values: tuple[float, ...] = VALUES[axis]
            if axis == "n" and backend in STREAMING:
                values += LARGE
            if smoke:
                values = {"n": (64, 96, 128), "groups": (2,)}.get(axis, ())
            for value in values:
                key = BASE | {axis: value, "seed": 0}
                if smoke and axis != "n":
                    key["n"] = 64
                if axis == "n" and _hopeless(rows.rows, backend, value, options.seconds):
                    print(f"not tried: {backend}, n = {value:g}")
                    continue
                given = (backend, axis, key, options.seconds, 0.05 if smoke else 2.0)
                rows.make(lambda given=given: point(*given), axis=axis, backend=backend, **key)
    for fitted in exponents(rows.rows):
        print(
            f"{fitted['backend']:<10} {fitted['quantity']:<8} in {fitted['axis']:<7} exponent "
            f"{fitted['exponent']:.2f} ± {fitted['half_width']:.2f} ({fitted['points']} points)"
        )
    if not smoke:
        print("wrote", draw(rows.rows))


def _hopeless(rows: list[Record], backend: str, n: float, seconds: float) -> bool:
    """Whether the next smaller cloud says that this one will not be done in time."""
    smaller = [row for row in rows if (row["axis"], row["backend"]) == ("n", backend) and row["n"] < n]
    if not smaller:
        return False
    last = max(smaller, key=lambda row: row["n"])
    return last["end"] != "done" or last["ms"] * (n / last["n"]) ** 2 > seconds * 1e3


if __name__ == "__main__":
    main()
