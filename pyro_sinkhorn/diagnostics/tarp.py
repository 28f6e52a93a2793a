"""TARP: coverage of balls around random points, of all latents jointly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import kstest
from torch import Tensor

from pyro_sinkhorn.diagnostics.calibration import RankCheck, check_ranks
from pyro_sinkhorn.diagnostics.drawn import Joined, PosteriorDraws
from pyro_sinkhorn.diagnostics.ranks import RankBand, checked_level, random_source, rank, rank_band
from pyro_sinkhorn.errors import NonFiniteError, ProgramError

#: Elements of one block of distances: 64 MB in float64.
BLOCK = 8_000_000
#: A mean rank below that of uniform ones: the truth is nearer to its reference than the draws are.
WORDS = ("draws too far from {}", "draws too near to {}", "too wide", "too narrow")
POINTS = {"data": "where the data point", "noise": "the references", "given": "the references"}


@dataclass(frozen=True, eq=False)
class TarpReport:
    """What :func:`tarp` found.

    quantities:   one :class:`RankCheck`: ranks of the truth by distance from its reference point
    credibility:  levels from 0 to 1, ``(n_draws + 2,)``
    coverage:     expected coverage at each: the share of truths inside the ball that holds so much of the draws
    atc:          area between coverage and credibility above one half: negative for draws too narrow, positive for too wide
    atc_z:        the same in null standard errors
    ks_p_value:   Kolmogorov and Smirnov's, of the same ranks; ``quantities[0].p_value`` sees the ends better
    references:   'data', 'noise' or 'given'
    band:         of the ranks, left with probability ``level`` at most
    """

    quantities: tuple[RankCheck, ...]
    credibility: Tensor
    coverage: Tensor
    atc: float
    atc_z: float
    ks_p_value: float
    references: str
    n_sim: int
    n_draws: int
    level: float
    band: RankBand

    @property
    def passed(self) -> bool:
        """The ranks are uniform at this level."""
        return self.quantities[0].passed

    @property
    def p_value(self) -> float:
        """Of the largest excess along the whole curve."""
        return self.quantities[0].p_value

    def __str__(self) -> str:
        check = self.quantities[0]
        return (
            f"TARP of {self.n_sim} simulations with {self.n_draws} draws each, references from {self.references}: "
            f"{check.verdict or 'passed'}\n"
            f"p = {check.p_value:.2g} (level {self.level:g}), area to curve {self.atc:+.4f} "
            f"({self.atc_z:+.1f} sd), KS p = {self.ks_p_value:.2g}"
        )

    def plot(self, **options: Any) -> Any:
        """The figure of :func:`pyro_sinkhorn.plots.plot_calibration`."""
        from pyro_sinkhorn.plots import plot_calibration

        return plot_calibration(self, **options)


def tarp(
    drawn: PosteriorDraws, references: Tensor | None = None, level: float = 1e-3, seed: int = 0
) -> TarpReport:
    r"""Tests of accuracy with random points (Lemos, Coogan, Hezaveh and Perreault-Levasseur 2023).

    For each simulation a reference point :math:`\rho_i` and :math:`f_i`, the share of draws that are nearer to it than the
    truth is. With exact draws f is uniform, whatever the points, as long as given the data they do not depend on the
    truth. Distances are Euclidean between the columns of :meth:`PosteriorDraws.joined`.

    Draws too wide, as a rule, lie too far from the points, and draws too narrow too near to them; a bias shows as one or the
    other. Which errors show depends on the points. Those that do not depend on the data let the prior pass in place of the
    posterior; those that do can find any error, given enough simulations. So:

    * ``drawn.data`` given: the truth of that *earlier* simulation whose data are most alike. Simulations are independent,
      and none looks at itself or at a later one, so all ranks are independent and uniform under exact draws
    * no data: normal noise, as wide as the truths
    * ``references``: yours. They must be made without the truth of their own simulation

    Distances between data are Euclidean over all their columns, each in units of its robust spread: with images or other
    data of many columns, give references from a better summary.

    :param references: ``(n_sim, k)``, in the latents' own units and in the order of ``drawn.joined().names``
    :param level: probability that a right posterior fails
    :param seed: of noise, and of truths among draws at equal distances
    :raises ProgramError: wrong references, or too few simulations for this level
    :raises NonFiniteError: NaN or infinity in ``references``

    >>> rng = torch.Generator().manual_seed(0)
    >>> z, noise, fresh = torch.randn(300, generator=rng), torch.randn(300, generator=rng), torch.randn(99, 300, generator=rng)
    >>> x = z + noise
    >>> right = PosteriorDraws({"z": z}, {"z": x / 2 + 0.5**0.5 * fresh}, {"x": x})
    >>> tarp(right).passed
    True
    >>> prior = PosteriorDraws({"z": z}, {"z": fresh}, {"x": x})
    >>> tarp(prior).quantities[0].verdict
    'draws too far from where the data point'
    """
    level = checked_level(level)
    source = random_source(seed)
    joined = drawn.joined()
    if references is not None:
        kind, points = "given", _checked(references, drawn, joined)
    else:
        kind, points = "noise", torch.from_numpy(source.standard_normal(joined.truth.shape))
        if drawn.data is not None:
            kind, points = "data", nearest_earlier(drawn.data, joined.truth, points)
    # In float32, so that equal points tie on every machine, also where a sum is rounded by its place in the batch.
    truth = torch.linalg.vector_norm(joined.truth - points, dim=-1).float()
    draws = torch.stack([torch.linalg.vector_norm(one - points, dim=-1) for one in joined.draws]).float()
    ranks = rank(truth, draws, source)
    low, high, inside, outside = (word.format(POINTS[kind]) for word in WORDS)
    check = check_ranks("distance", ranks, drawn.n_draws, level, (low, high, inside, outside))
    share = (ranks + torch.from_numpy(source.random(len(ranks)))) / (drawn.n_draws + 1)
    credibility = torch.arange(drawn.n_draws + 2, dtype=torch.float64) / (drawn.n_draws + 1)
    coverage = torch.searchsorted(share.sort().values, credibility) / len(share)
    # The area under the step curve of one f is 1 - max(f, 1/2), that under the diagonal 3/8.
    atc = float((1 - share.clamp(min=0.5)).mean()) - 3 / 8
    return TarpReport(
        quantities=(check,),
        credibility=credibility,
        coverage=coverage,
        atc=atc,
        atc_z=atc / math.sqrt(5 / 192 / len(share)),  # the variance of 1 - max(f, 1/2) for a uniform f
        ks_p_value=float(kstest(share.numpy(), "uniform").pvalue),
        references=kind,
        n_sim=drawn.n_sim,
        n_draws=drawn.n_draws,
        level=level,
        band=rank_band(drawn.n_sim, drawn.n_draws, level),
    )


def nearest_earlier(
    data: Mapping[str, Tensor], truth: Tensor, otherwise: Tensor, block: int = BLOCK
) -> Tensor:
    """For each simulation, the truth of the earlier one with the nearest data; the first has ``otherwise``."""
    rows = torch.cat([value.reshape(len(value), -1).cpu().double() for value in data.values()], -1)
    # NumPy's, since that of torch takes no more than 16 million elements.
    low, middle, high = torch.from_numpy(np.quantile(rows.numpy(), [0.16, 0.5, 0.84], axis=0))
    scale = torch.where(high > low, (high - low) / 2, torch.ones_like(low))
    # Wildly scaled data are the rule under heavy-tailed priors; a few of them must not be all that a distance sees.
    rows = torch.asinh((rows - middle) / scale)
    nearest = []
    for start in range(1, len(rows), step := max(1, block // len(rows))):
        distance = torch.cdist(rows[start : start + step], rows)
        later = torch.arange(len(rows)) >= torch.arange(start, start + len(distance))[:, None]
        nearest.append(distance.masked_fill(later, torch.inf).argmin(-1))
    return torch.cat([otherwise[:1], truth[torch.cat(nearest)]]) if nearest else otherwise


def _checked(references: Tensor, drawn: PosteriorDraws, joined: Joined) -> Tensor:
    """In the columns' standardised units."""
    if not isinstance(references, Tensor) or references.shape != joined.truth.shape:
        given = tuple(references.shape) if isinstance(references, Tensor) else type(references).__name__
        raise ProgramError(
            f"references are {given}: expected a tensor {tuple(joined.truth.shape)}, (n_sim, k), with columns "
            f"{', '.join(joined.names[:5])}{', ...' if len(joined.names) > 5 else ''}"
        )
    if not bool(references.isfinite().all()):
        raise NonFiniteError("references have NaN or infinite values")
    return (references.detach().cpu().double() - joined.centre) / joined.scale
