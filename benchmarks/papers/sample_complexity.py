r"""How fast the divergence of two samples of one law falls with their size (Genevay, Peyré and Cuturi 2017, section 3).

Both clouds are ``n`` independent draws of the uniform law on :math:`[0,1]^d`, the cost is :math:`\|x-y\|^{3/2}`. The
divergence of the law from itself is 0, so that whatever comes out is error. Measured of each estimator: its mean (the
bias) and its root mean square, over many pairs of clouds, and the slope of the logarithm of the latter against
:math:`\log n`, by least squares weighted with the standard errors of the points.

same-batch          as in the paper: :math:`2W(X,Y) - W(X,X) - W(Y,Y)`
independent halves  :math:`\tfrac12\sum_{ij} W(X_i,Y_j) - W(X_1,X_2) - W(Y_1,Y_2)`, of the same clouds cut in two

each with W the sharp value, as in the paper, and the entropic one. :math:`\varepsilon = 0` is the exact assignment,
:math:`\varepsilon = \infty` the mean cost, which makes the divergence the energy distance (MMD) of that cost.

    python benchmarks/papers/sample_complexity.py
    python benchmarks/papers/sample_complexity.py --figure      # of the results there are
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import _path
import torch
from _resume import Rows
from _tables import load
from torch import Tensor

from pyro_sinkhorn.ot import sinkhorn
from pyro_sinkhorn.ot.halves import draw_halves

POWER = 1.5
DIMENSIONS = (2, 5, 10)
EPSILONS = (0.0, 0.01, 0.1, 1.0, 10.0, math.inf)
#: Pairs of clouds at each size.
REPETITIONS = {32: 1000, 64: 600, 128: 400, 256: 200, 512: 100}
#: Slopes are of sizes from here on.
FROM = 64
SEED = 0
#: Numbers in the cost matrices of one call.
CHUNK = 2**22


def cost(x: Tensor, y: Tensor) -> Tensor:
    """The paper's."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** POWER


def transport(x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """Entropic and sharp value of a batch of pairs, ``(2, B)``."""
    if math.isinf(epsilon):
        return torch.stack([c.mean() for c in map(cost, x, y)]).expand(2, -1)
    out = sinkhorn(x, y, epsilon, cost=cost, tolerance=1e-6, max_iters=20_000)
    if epsilon == 0:
        return out.value.expand(2, -1)
    sharp = torch.stack([(plan * cost(*pair)).sum() for plan, *pair in zip(out.plan(), x, y, strict=True)])
    return torch.stack([out.value, sharp])


def estimates(x: Tensor, y: Tensor, epsilon: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Both estimators of each pair of clouds ``(B, n, d)``: ``(2, B)``, entropic and sharp."""
    halves = draw_halves(x.shape[-2], y.shape[-2], generator=generator)
    x1, x2 = (x[:, half.index[0]] for half in (halves.x1, halves.x2))
    y1, y2 = (y[:, half.index[0]] for half in (halves.y1, halves.y2))
    left = torch.cat([x1, x1, x2, x2, x1, y1])
    right = torch.cat([y1, y2, y1, y2, x2, y2])
    parts = transport(left, right, epsilon).unflatten(-1, (6, -1))
    own = 0.0
    if epsilon > 0:  # a cloud is at no distance from itself
        own = transport(torch.cat([x, y]), torch.cat([x, y]), epsilon).unflatten(-1, (2, -1)).sum(1)
    return {
        "same-batch": 2 * transport(x, y, epsilon) - own,
        "halves": parts[:, :4].sum(1) / 2 - parts[:, 4] - parts[:, 5],
    }


def measure(dimension: int, epsilon: float, n: int, repetitions: int) -> dict[str, Any]:
    """Mean and root mean square of both estimators, with their standard errors."""
    generator = torch.Generator().manual_seed(
        SEED + 1000 * dimension + n
    )  # the clouds are those of every epsilon
    found: dict[str, list[Tensor]] = {"same-batch": [], "halves": []}
    batch = max(1, min(repetitions, CHUNK // (2 * n * n)))
    for start in range(0, repetitions, batch):
        size = min(batch, repetitions - start)
        x, y = torch.rand(2, size, n, dimension, generator=generator, dtype=torch.float64)
        for name, values in estimates(x, y, epsilon, generator).items():
            found[name].append(values)
    row: dict[str, Any] = {"repetitions": repetitions}
    for name, chunks in found.items():
        for value, v in zip(("entropic", "sharp"), torch.cat(chunks, -1), strict=True):
            squares = v.square()
            rms, root = float(squares.mean().sqrt()), len(v) ** 0.5
            row[f"{name}, {value}"] = {
                "mean": float(v.mean()),
                "mean_se": float(v.std()) / root,
                "rms": rms,
                "rms_se": float(squares.std()) / root / (2 * rms),
                "negative": float((v < 0).double().mean()),
            }
    return row


def slope(points: list[tuple[int, float, float]]) -> dict[str, float]:
    """Of log error on log size, points ``(n, error, its standard error)``; ``chi2`` of what the line leaves."""
    x = torch.tensor([math.log(n) for n, _, _ in points], dtype=torch.float64)
    y = torch.tensor([math.log(e) for _, e, _ in points], dtype=torch.float64)
    w = torch.tensor([(e / se) ** 2 for _, e, se in points], dtype=torch.float64)
    centre = (w * x).sum() / w.sum()
    spread = (w * (x - centre) ** 2).sum()
    b = (w * (x - centre) * y).sum() / spread
    rest = y - (w * y).sum() / w.sum() - b * (x - centre)
    return {"slope": float(b), "se": float(spread**-0.5), "chi2": float((w * rest**2).sum())}


def slopes(rows: list[dict[str, Any]], start: int = FROM) -> Iterator[dict[str, Any]]:
    """For every dimension, epsilon and estimator."""
    for d, e in dict.fromkeys((row["dimension"], row["epsilon"]) for row in rows):
        mine = [row for row in rows if (row["dimension"], row["epsilon"]) == (d, e) and row["n"] >= start]
        for name in ("same-batch, sharp", "same-batch, entropic", "halves, sharp", "halves, entropic"):
            points = [(row["n"], row[name]["rms"], row[name]["rms_se"]) for row in mine]
            yield {"dimension": d, "epsilon": e, "estimator": name, **slope(points)}


def figure(rows: list[dict[str, Any]]) -> None:
    """Error against size: same-batch drawn through, halves dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dimensions = sorted({row["dimension"] for row in rows})
    epsilons = list(dict.fromkeys(row["epsilon"] for row in rows))
    colours = plt.get_cmap("viridis")(torch.linspace(0, 0.9, len(epsilons)).numpy())
    drawn, axes = plt.subplots(
        1, len(dimensions), figsize=(4 * len(dimensions), 4), sharey=True, layout="constrained"
    )
    for ax, d in zip(axes, dimensions, strict=True):
        for colour, e in zip(colours, epsilons, strict=True):
            mine = [row for row in rows if (row["dimension"], row["epsilon"]) == (d, e)]
            sizes = [row["n"] for row in mine]
            for name, style in (("same-batch, sharp", "o-"), ("halves, sharp", "s--")):
                label = ("ε = ∞" if e == "inf" else f"ε = {e:g}") if style == "o-" else None
                errors, ses = ([row[name][key] for row in mine] for key in ("rms", "rms_se"))
                ax.errorbar(
                    sizes, errors, ses, fmt=style, color=colour, label=label, markersize=3.5, linewidth=1.2
                )
        ax.set(
            xscale="log", yscale="log", xlabel="points in each cloud", title=f"uniform on $[0, 1]^{{{d}}}$"
        )
        ax.set_xticks(sizes, map(str, sizes))
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("root mean square of the divergence (truth 0)")
    handles, labels = axes[0].get_legend_handles_labels()
    for style, text in (("k-", "same-batch"), ("k--", "independent halves")):
        handles.append(plt.Line2D([], [], color="k", linestyle=style[1:]))
        labels.append(text)
    axes[-1].legend(handles, labels, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _path.FIGURES.mkdir(parents=True, exist_ok=True)
    drawn.savefig(_path.FIGURES / "sample_complexity.png", dpi=130)
    plt.close(drawn)


def show(row: dict[str, Any]) -> None:
    """One line of a row."""
    both = [f"{name} {row[name]['rms']:.4g}" for name in ("same-batch, sharp", "halves, sharp")]
    print(f"d {row['dimension']}, epsilon {row['epsilon']}, n {row['n']}:", *both, flush=True)


def main() -> None:
    """All sizes, then the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke-test", action="store_true")
    parser.add_argument("--figure", action="store_true")
    options = parser.parse_args()
    if options.figure:
        figure(load("papers_sample_complexity")["rows"])
        return
    torch.set_num_threads(1)
    repetitions = {16: 20, 32: 20} if options.smoke_test else REPETITIONS
    dimensions = DIMENSIONS[:1] if options.smoke_test else DIMENSIONS
    settings = {
        "cost": f"euclidean^{POWER}",
        "repetitions": repetitions,
        "tolerance": 1e-6,
        "slopes_from": FROM,
    }
    rows = Rows(
        "papers_sample_complexity",
        settings,
        ("dimension", "epsilon", "n"),
        keep=not options.smoke_test,
        packages=["scipy"],
        show=show,
    )
    for n, times in repetitions.items():
        for d in dimensions:
            for e in EPSILONS:
                name = "inf" if math.isinf(e) else e
                rows.make(
                    lambda d=d, e=e, n=n, times=times: measure(d, e, n, times) | {"seed": SEED},
                    dimension=d,
                    epsilon=name,
                    n=n,
                )
    for found in slopes(rows.rows, start=0 if options.smoke_test else FROM):
        line = [f"{found[key]:>22}" for key in ("dimension", "epsilon", "estimator")]
        print(*line, f"slope {found['slope']:.3f} ± {found['se']:.3f}, chi2 {found['chi2']:.1f}")
    if not options.smoke_test:
        figure(rows.rows)


if __name__ == "__main__":
    main()
