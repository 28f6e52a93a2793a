"""Figures of what the diagnostics found. Needs matplotlib, and draws without touching its global state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binom

from pyro_sinkhorn.errors import ProgramError, checked_integer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FINE, WRONG, BAND, GRID = "#2b6ca3", "#c0392b", "#d5dde6", "#e9e9e9"
#: Panels side by side.
ACROSS = 4
#: Pass or fail by colour is also said in words, for those who see no difference.
PASSED = "passed"


def plot_calibration(report: Any, most: int = 12) -> Figure:
    """Ranks of an ``SbcReport`` or a ``TarpReport``: for each quantity their distribution function and their histogram.

    Above, the share of ranks up to each, less that of uniform ranks, within the band that right posteriors leave in any
    quantity with probability ``report.level``. Below, the histogram within bands for each bar alone (99%). A hill in
    the histogram says too wide, a valley too narrow, a slope biased.

    :param most: quantities to draw; those with the smallest p-values, if there are more
    :raises ImportError: matplotlib is not installed

    >>> import torch
    >>> from pyro_sinkhorn.diagnostics import PosteriorDraws, simulation_based_calibration
    >>> drawn = PosteriorDraws({"z": torch.randn(100)}, {"z": torch.randn(9, 100)})
    >>> len(plot_calibration(simulation_based_calibration(drawn)).axes)
    2
    """
    checks = _worst(report.quantities, most, lambda check: check.p_value)
    figure, axes = _panels(len(checks), 2)
    for check, (above, below) in zip(checks, axes, strict=True):
        colour = FINE if check.passed else WRONG
        _draw_excess(above, check.ranks.numpy(), report, colour)
        _draw_histogram(below, check.ranks.numpy(), report.n_draws, colour)
        above.set_title(f"{check.name}: {check.verdict or PASSED}", fontsize=9, color=colour)
        below.set_xlabel("rank / draws", fontsize=8)
    for row in range(0, len(axes), ACROSS):
        axes[row][0].set_ylabel("ECDF - uniform", fontsize=8)
        axes[row][1].set_ylabel("simulations", fontsize=8)
    _say_what_is_missing(figure, len(checks), len(report.quantities))
    return figure


def plot_coverage(report: Any, most: int = 8) -> Figure:
    """A ``CoverageReport``: share of regions that hold the truth, less their mass, within the band.

    Quantities that pass are drawn alike; those that fail have colours of their own, those furthest out named.

    :param most: quantities to name
    :raises ImportError: matplotlib is not installed

    >>> import torch
    >>> from pyro_sinkhorn.diagnostics import PosteriorDraws, expected_coverage
    >>> drawn = PosteriorDraws({"z": torch.randn(100)}, {"z": torch.randn(99, 100)})
    >>> len(plot_coverage(expected_coverage(drawn)).axes)
    1
    """
    most = checked_integer("most", most, 1)
    figure = _figure((5.2, 4.0))
    axes = figure.add_subplot()
    nominal, coverage = report.nominal.numpy(), report.coverage.numpy()
    _style(axes)
    axes.fill_between(
        nominal,
        report.low.numpy() - nominal,
        report.high.numpy() - nominal,
        color=BAND,
        lw=0,
        label=f"band, level {report.level:g}",
    )
    axes.axhline(0, color="0.4", lw=0.8)
    verdicts = report.verdicts()
    failing = [row for row in report.p_values.min(-1).values.argsort().tolist() if verdicts[row]]
    passing = [row for row in range(len(verdicts)) if not verdicts[row]]
    for i, row in enumerate(passing):
        name = f"{len(passing)} passed" if len(passing) > 1 else f"{report.names[row]}: {PASSED}"
        axes.plot(nominal, coverage[row] - nominal, color=FINE, lw=1, alpha=0.7, label=None if i else name)
    for i, row in enumerate(failing):
        look: dict[str, Any] = {"color": _shade(i, len(failing)), "ls": ("-", "--", "-.", ":")[i % 4]}
        named = f"{report.names[row]}: {verdicts[row]}" if i < most else None
        axes.plot(nominal, coverage[row] - nominal, lw=1.3, marker="o", ms=2.5, label=named, **look)
    axes.set_xlim(0, 1)
    axes.set_xlabel("mass of the region")
    axes.set_ylabel("share that holds the truth - mass")
    axes.legend(fontsize=7, frameon=False, loc="best")
    return figure


def plot_posterior_contraction(report: Any, most: int = 12) -> Figure:
    """A ``ContractionReport``: z-score against contraction, a point a simulation, a panel a scalar.

    A good posterior lies to the right (much learned) within a few units of 0 (near the truth). To the left it is as wide as
    the prior; high or low it is sure of something wrong.

    :param most: scalars to draw; those with flags first, if there are more
    :raises ImportError: matplotlib is not installed

    >>> import torch
    >>> from pyro_sinkhorn.diagnostics import PosteriorDraws, posterior_contraction
    >>> drawn = PosteriorDraws({"z": torch.randn(100)}, {"z": torch.randn(9, 100)})
    >>> len(plot_posterior_contraction(posterior_contraction(drawn)).axes)
    1
    """
    rows = _worst(report.quantities, most, lambda row: not row.flags)
    figure, axes = _panels(len(rows), 1)
    for row, (panel,) in zip(rows, axes, strict=True):
        colour = WRONG if row.flags else FINE
        seen = (row.z_scores.isfinite() & row.contractions.isfinite()).numpy()
        contractions, z_scores = row.contractions.numpy()[seen], row.z_scores.numpy()[seen]
        panel.axhspan(-2, 2, color=BAND, lw=0)
        panel.axhline(0, color="0.4", lw=0.8)
        panel.axvline(0, color="0.4", lw=0.8, ls=":")
        panel.scatter(contractions, z_scores, s=5, color=colour, alpha=0.5, lw=0)
        # A few simulations far out, as heavy tails make them, must not shrink all others to a line.
        left = float(np.quantile(contractions, 0.01)) if len(contractions) else 0.0
        panel.set_xlim(min(-0.1, left - 0.1), 1.05)
        top = max(4.0, float(np.quantile(np.abs(z_scores), 0.99)) * 1.2) if len(z_scores) else 4.0
        panel.set_ylim(-top, top)
        panel.set_title(f"{row.name}\n{'; '.join(row.flags) or PASSED}", fontsize=9, color=colour)
        panel.set_xlabel("contraction", fontsize=8)
    for start in range(0, len(axes), ACROSS):
        axes[start][0].set_ylabel("z-score", fontsize=8)
    _say_what_is_missing(figure, len(rows), len(report.quantities))
    return figure


def _draw_excess(axes: Axes, ranks: np.ndarray, report: Any, colour: str) -> None:
    points, low, high = report.band
    z, n = points / (report.n_draws + 1), len(ranks)
    excess = np.searchsorted(np.sort(ranks), points, side="left") / n - z
    ends = np.concatenate([[0], z, [1]])
    axes.fill_between(
        ends, np.pad(low / n - z, 1), np.pad(high / n - z, 1), color=BAND, lw=0, step=None, zorder=1
    )
    axes.axhline(0, color="0.4", lw=0.8, zorder=2)
    axes.plot(ends, np.pad(excess, 1), color=colour, lw=1.3, zorder=3)
    axes.set_xlim(0, 1)


def _draw_histogram(axes: Axes, ranks: np.ndarray, n_draws: int, colour: str) -> None:
    """Bars of as equal a number of ranks as can be, about 20, each beside its own binomial band."""
    edges = np.unique(np.round(np.linspace(0, n_draws + 1, min(20, n_draws + 1) + 1)).astype(int))
    counts = np.histogram(ranks, bins=edges - 0.5)[0]
    share = np.diff(edges) / (n_draws + 1)
    low, high = binom.ppf([[0.005], [0.995]], len(ranks), share)
    left, width = edges[:-1] / (n_draws + 1), share
    # Bars of unequal width are drawn by their density, so that uniform ranks stay level.
    level = share * len(edges[:-1])
    axes.bar(left, counts / level, width * 0.92, align="edge", color=colour, alpha=0.45)
    for bound in (low, high):
        axes.stairs(bound / level, np.append(left, 1.0), color="0.35", lw=0.9, ls="--", baseline=None)
    axes.axhline(len(ranks) / len(share), color="0.4", lw=0.8)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, None)


def _worst(rows: Sequence[Any], most: int, key: Any) -> list[Any]:
    """All, in their order, or those that sort first."""
    most = checked_integer("most", most, 1)
    if not rows:
        raise ProgramError("the report is of nothing: there is nothing to draw")
    return list(rows) if len(rows) <= most else sorted(rows, key=key)[:most]


def _panels(count: int, stacked: int) -> tuple[Figure, list[tuple[Axes, ...]]]:
    """A figure with ``count`` columns of ``stacked`` panels, ``ACROSS`` side by side."""
    across, down = min(count, ACROSS), math.ceil(count / ACROSS)
    figure = _figure((max(2.6 * across, 4.0), (1.7 * stacked + 0.5) * down))
    axes = []
    for i in range(count):
        row, column = divmod(i, ACROSS)
        panels = [
            figure.add_subplot(down * stacked, across, (row * stacked + j) * across + column + 1)
            for j in range(stacked)
        ]
        for panel in panels:
            _style(panel)
        axes.append(tuple(panels))
    return figure, axes


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install matplotlib") from error
    # Not pyplot's: that keeps every figure alive until it is closed.
    return Figure(size, layout="constrained")


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7)
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)


def _shade(i: int, count: int) -> Any:
    """From red to orange."""
    start, end = np.array([0.75, 0.22, 0.17]), np.array([0.95, 0.65, 0.2])
    return tuple(start + (end - start) * i / max(count - 1, 1))


def _say_what_is_missing(figure: Figure, drawn: int, there: int) -> None:
    if drawn < there:
        figure.supxlabel(f"the {drawn} worst of {there}", fontsize=8)
