"""Expected coverage: how often posterior regions of a given mass hold the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from pyro_sinkhorn.diagnostics.calibration import SHOWN
from pyro_sinkhorn.diagnostics.drawn import Joined, PosteriorDraws
from pyro_sinkhorn.diagnostics.ranks import central_counts, checked_level, random_source, rank
from pyro_sinkhorn.errors import ProgramError

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
#: The row of all scalars together.
JOINT = "(joint)"
#: Numbers of one block of covariances, or of whitened points: 64 MB in float64.
BLOCK = 8_000_000


@dataclass(frozen=True, eq=False)
class CoverageReport:
    """What :func:`expected_coverage` found; prints as a table.

    names:       of the Q quantities; the last is ``"(joint)"`` where there are several scalars
    nominal:     mass of each region, ``(L,)``, among those that n_draws draws can express
    coverage:    share of simulations whose region holds the truth, ``(Q, L)``
    low, high:   where all shares lie with probability 1 - level at least, ``(L,)``
    p_values:    two-sided, of the binomial count, ``(Q, L)``
    level:       probability that a right posterior fails anywhere
    """

    names: tuple[str, ...]
    nominal: Tensor
    coverage: Tensor
    low: Tensor
    high: Tensor
    p_values: Tensor
    level: float
    n_sim: int
    n_draws: int

    @property
    def passed(self) -> bool:
        """Every share is inside its band."""
        return not any(self.verdicts())

    def verdicts(self) -> tuple[str, ...]:
        """For each quantity: '' where it passed, else what is wrong with the draws."""
        below = (self.coverage < self.low).any(-1).tolist()
        above = (self.coverage > self.high).any(-1).tolist()
        words = {
            (False, False): "",
            (True, False): "too narrow or biased",
            (False, True): "too wide",
            (True, True): "another shape",
        }
        return tuple(words[pair] for pair in zip(below, above, strict=True))

    def table(self, most: int | None = None) -> str:
        """A row for each quantity; those that fail first, and no more than ``most``, if given."""
        rows = list(range(len(self.names)))
        if most is not None and len(rows) > most:
            rows = self.p_values.min(-1).values.argsort(stable=True)[:most].tolist()
        width = max([8, *(len(self.names[row]) for row in rows)])

        def line(name: str, values: Tensor, verdict: str = "") -> str:
            return f"{name:<{width}} " + " ".join(f"{float(v):>6.3f}" for v in values) + f"  {verdict}"

        verdicts = self.verdicts()
        lines = [line("nominal", self.nominal).rstrip()]
        lines += [line(self.names[row], self.coverage[row], verdicts[row] or "passed") for row in rows]
        lines += [line("low", self.low).rstrip(), line("high", self.high).rstrip()]
        if len(rows) < len(self.names):
            lines.append(f"and {len(self.names) - len(rows)} more with larger p-values")
        return "\n".join(lines)

    def __str__(self) -> str:
        failed = sum(map(bool, self.verdicts()))
        verdict = "passed" if not failed else f"{failed} of {len(self.names)} quantities failed"
        head = f"coverage in {self.n_sim} simulations with {self.n_draws} draws each: {verdict} (level {self.level:g})"
        return head + "\n" + self.table(SHOWN)

    def plot(self, **options: Any) -> Any:
        """The figure of :func:`pyro_sinkhorn.plots.plot_coverage`."""
        from pyro_sinkhorn.plots import plot_coverage

        return plot_coverage(self, **options)


def expected_coverage(
    drawn: PosteriorDraws, levels: Sequence[float] | None = None, level: float = 1e-3, seed: int = 0
) -> CoverageReport:
    r"""Share of simulations whose posterior region of mass p holds the truth; p if the draws are the posterior's.

    *Of a scalar*, the central interval. Between the k-th lowest and k-th highest of S draws lies the truth with
    probability :math:`(S + 1 - 2k) / (S + 1)` exactly, for any law; so each level asked for is rounded to one of
    these, and the numbers found follow a binomial law exactly.

    *Of all scalars together*, a region in place of that of highest density, which would need a density: the points with
    least Mahalanobis distance from the mean of the draws. Mean and covariance are those of truth and draws alike, so that the
    truth has no distance of its own; the covariance is shrunk towards its diagonal by :math:`k / (k + S)`, so that fewer
    draws than scalars do. Of a normal posterior it is that of highest density; of one with several modes it is an ellipsoid
    around all of them, whose coverage is right too, but which sees less.

    High coverage alone is no merit: the prior has the right one.

    :param levels: masses p between 0 and 1; default .1, .2, ..., .9, .95, .99
    :param level: probability that a right posterior fails anywhere; shared by all quantities and masses (Bonferroni)
    :param seed: of the places of truths among equal draws
    :raises ProgramError: nothing to check, wrong levels, or too few draws for any of them

    >>> rng = torch.Generator().manual_seed(0)
    >>> z, noise, fresh = torch.randn(300, generator=rng), torch.randn(300, generator=rng), torch.randn(99, 300, generator=rng)
    >>> narrow = PosteriorDraws({"z": z}, {"z": (z + noise) / 2 + 0.3 * fresh})
    >>> print(expected_coverage(narrow, levels=[0.5, 0.9]))
    coverage in 300 simulations with 99 draws each: 1 of 1 quantities failed (level 0.001)
    nominal   0.500  0.900
    z         0.233  0.527  too narrow or biased
    low       0.400  0.837
    high      0.600  0.953
    """
    level = checked_level(level)
    source = random_source(seed)
    sizes = _sizes(levels, drawn.n_draws)
    nominal = sizes / (drawn.n_draws + 1)
    scalars, total = list(drawn.scalars()), drawn.n_draws
    outside = []  # of each quantity: how many of the possible ranks lie further inside than the truth's
    for scalar in scalars:
        ranks = rank(scalar.truth, scalar.draws, source)
        outside.append((2 * ranks - total).abs())
    names = [scalar.name for scalar in scalars]
    joined = drawn.joined()
    if len(scalars) > 1:
        names.append(JOINT)
        distance = mahalanobis_distances(joined)
        outside.append(rank(distance[0], distance[1:], source))
    # The interval of m ranks is |2 r - S| < m; the region of m ranks is r < m.
    counts = np.stack([[int((far < size).sum()) for size in sizes] for far in outside])
    lower = binom.cdf(counts, drawn.n_sim, nominal)
    upper = binom.sf(counts - 1, drawn.n_sim, nominal)
    low, high = central_counts(level / counts.size, drawn.n_sim, nominal)
    return CoverageReport(
        names=tuple(names),
        nominal=torch.from_numpy(nominal),
        coverage=torch.from_numpy(counts / drawn.n_sim),
        low=torch.from_numpy(low / drawn.n_sim),
        high=torch.from_numpy(high / drawn.n_sim),
        p_values=torch.from_numpy(np.minimum(1.0, 2 * np.minimum(lower, upper))),
        level=level,
        n_sim=drawn.n_sim,
        n_draws=drawn.n_draws,
    )


def mahalanobis_distances(joined: Joined) -> Tensor:
    """Of truth and draws from their common mean, ``(1 + n_draws, n_sim)``.

    In float32, so that equal points tie on every machine, also where a sum is rounded by its place in the batch.
    """
    points = torch.cat([joined.truth[None], joined.draws])
    n, _, k = points.shape
    return torch.cat([_distances(some) for some in points.split(max(1, BLOCK // (k * max(n, k))), 1)], 1)


def _distances(points: Tensor) -> Tensor:
    n, _, k = points.shape
    columns = (points - points.mean(0)).permute(1, 2, 0)
    covariance = columns @ columns.mT / n
    diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    shrunk = torch.lerp(covariance, diagonal, k / (k + n - 1))
    # Where all draws of a simulation agree in a column there is nothing to divide by.
    shrunk = shrunk + 1e-12 * torch.eye(k, dtype=shrunk.dtype)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(shrunk), columns, upper=False)
    return white.square().sum(1).T.float()


def _sizes(levels: Sequence[float] | None, n_draws: int) -> np.ndarray:
    """Numbers of ranks, of n_draws + 1, in the regions: those of central intervals, nearest to the levels."""
    wanted = np.asarray(LEVELS if levels is None else list(levels), dtype=float)
    if wanted.ndim != 1 or not wanted.size or not ((wanted > 0) & (wanted < 1)).all():
        raise ProgramError(f"levels are {levels!r}: expected masses between 0 and 1")
    beyond = np.round((n_draws + 1) * (1 - wanted) / 2).astype(int)
    sizes = np.unique(n_draws + 1 - 2 * beyond)
    sizes = sizes[(sizes > 0) & (sizes <= n_draws)]
    if not sizes.size:
        raise ProgramError(f"{n_draws} draws cannot express a central interval of mass {levels}: draw more")
    return sizes
