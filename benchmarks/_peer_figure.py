"""Time against n for every method, at one dimension, kappa and thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FIGURE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "solver_peers.png"
COLOURS = {
    "ours": "#d55e00",
    "ours, independent halves": "#e69f00",
    "ours, log backend": "#cc79a7",
    "unrolled": "#000000",
    "log domain, envelope": "#999999",
    "geomloss": "#f0e442",
    "POT": "#009e73",
    "OTT": "#56b4e9",
    "OTT, tuned": "#0072b2",
    "flash-sinkhorn": "#7f3c8d",
}


def draw(
    rows: list[dict[str, Any]],
    path: Path = FIGURE,
    d: int = 8,
    kappa: float = 0.2,
    targets: tuple[str, ...] = ("0.01", "0.001"),
) -> Path:
    """One panel for each accuracy; a method has a point where it reached it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    shown = [r for r in rows if (r["d"], r["kappa"], r["threads"]) == (d, kappa, 1)]
    shown.sort(key=lambda row: row["n"])
    figure, axes = plt.subplots(
        1, len(targets), figsize=(11, 4.8), sharey=True, layout="constrained", squeeze=False
    )
    lines: dict[str, Any] = {}
    for axis, target in zip(axes[0], targets, strict=True):
        for name, colour in COLOURS.items():
            points = []
            for row in shown:
                method = row["methods"].get(name)
                if method and target in method["best"]:
                    index = method["best"][target]
                    ms = next(a["ms"] for a in method["attempts"] if a["index"] == index)
                    points.append((row["n"], ms))
            if points:
                own = name == "ours"
                (lines[name],) = axis.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    ms=5 if own else 4,
                    lw=2.4 if own else 1.3,
                    color=colour,
                    ls="--" if "," in name and name.startswith("ours") else "-",
                    zorder=3 if own else 2,
                )
        floors = [(row["n"], row["floor"]["ms"]) for row in shown if row["floor"]]
        if floors and target == targets[0]:
            (lines["computed floor of ours"],) = axis.plot(*zip(*floors, strict=True), color="0.6", ls=":")
        axis.set_xscale("log")
        axis.set_yscale("log")
        sizes = sorted({row["n"] for row in shown})
        axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_xlabel("n = m")
        axis.set_title(f"gradient within {float(target):g} of the float64 reference", fontsize=10)
        axis.grid(which="major", color="0.9", lw=0.6)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0][0].set_ylabel("ms, value and gradient, one thread")
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8.5
    )
    figure.suptitle(
        f"Debiased divergence of two clouds, d = {d}, epsilon = {kappa:g} std(C); no point where not reached",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
