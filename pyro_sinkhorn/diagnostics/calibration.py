"""Simulation-based calibration: are the ranks of the truths among posterior draws uniform?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import norm
from torch import Tensor

from pyro_sinkhorn.diagnostics.drawn import PosteriorDraws, Scalar
from pyro_sinkhorn.diagnostics.ranks import (
    RankBand,
    checked_level,
    random_source,
    rank,
    rank_band,
    rank_p_value,
)
from pyro_sinkhorn.errors import NonFiniteError, ProgramError

#: A report prints this many rows, those that fail first; ``table()`` has all.
SHOWN = 30
#: What the ranks say of the draws: their mean below and above that of uniform ones, their spread below and above.
WORDS = ("biased high", "biased low", "too wide", "too narrow")
Statistic = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True, eq=False)
class RankCheck:
    """One quantity: are its ranks uniform?

    ranks:    rank of the truth among the draws of every simulation, ``(n_sim,)``, from 0 to n_draws
    p_value:  probability of ranks this far from uniform, of this quantity alone
    mean:     mean rank less that of uniform ones, in standard errors; positive where the truth lies above the draws
    spread:   mean squared distance of the ranks from the middle, likewise; positive where the truth lies at their ends
    passed:   p_value is above the level divided by the number of quantities
    verdict:  what is wrong with the draws, in words; '' where it passed
    """

    name: str
    ranks: Tensor
    p_value: float
    mean: float
    spread: float
    passed: bool
    verdict: str


@dataclass(frozen=True, eq=False)
class SbcReport:
    """What :func:`simulation_based_calibration` found; prints as a table.

    quantities:  one :class:`RankCheck` each
    n_sim:       simulations
    n_draws:     posterior draws for each
    level:       probability that a right posterior fails anywhere
    band:        what uniform ranks leave, in any quantity, with probability ``level`` at most
    constants:   numbers that never vary and were left out
    """

    quantities: tuple[RankCheck, ...]
    n_sim: int
    n_draws: int
    level: float
    band: RankBand
    constants: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """No quantity failed."""
        return all(check.passed for check in self.quantities)

    @property
    def p_value(self) -> float:
        """Of all quantities together, by Bonferroni."""
        return min(1.0, len(self.quantities) * min(check.p_value for check in self.quantities))

    def table(self, most: int | None = None) -> str:
        """A row for each quantity; those that fail first, and no more than ``most``, if given."""
        checks = self.quantities
        if most is not None and len(checks) > most:
            checks = tuple(sorted(checks, key=lambda check: check.p_value)[:most])
        width = max([8, *(len(check.name) for check in checks)])
        lines = [f"{'quantity':<{width}} {'p-value':>9} {'mean':>7} {'spread':>7}  verdict"]
        for c in checks:
            lines.append(
                f"{c.name:<{width}} {c.p_value:>9.2g} {c.mean:>7.1f} {c.spread:>7.1f}  {c.verdict or 'passed'}"
            )
        if len(checks) < len(self.quantities):
            lines.append(f"and {len(self.quantities) - len(checks)} more with larger p-values")
        return "\n".join(lines)

    def __str__(self) -> str:
        failed = sum(not check.passed for check in self.quantities)
        verdict = "passed" if self.passed else f"{failed} of {len(self.quantities)} quantities failed"
        head = (
            f"calibration of {self.n_sim} simulations with {self.n_draws} draws each: {verdict} "
            f"(p = {self.p_value:.2g}, level {self.level:g})"
        )
        return "\n".join([head, self.table(SHOWN), *self.notes()])

    def notes(self) -> list[str]:
        """What a reader should know besides."""
        notes = []
        if self.passed:
            notes.append("the prior itself would pass too: see posterior_contraction, or tarp with data")
        if self.constants:
            names = ", ".join(self.constants[:5]) + (", ..." if len(self.constants) > 5 else "")
            notes.append(f"left out, since they never vary: {names}")
        return notes

    def plot(self, **options: Any) -> Any:
        """The figure of :func:`pyro_sinkhorn.plots.plot_calibration`."""
        from pyro_sinkhorn.plots import plot_calibration

        return plot_calibration(self, **options)


def simulation_based_calibration(
    drawn: PosteriorDraws,
    level: float = 1e-3,
    statistics: Mapping[str, Statistic] | None = None,
    seed: int = 0,
) -> SbcReport:
    r"""Rank of the truth among its posterior draws, for every scalar (Talts et al. 2018; Cook, Gelman and Rubin 2006).

    If the draws are those of the posterior, :math:`r = \#\{s : \theta^s < \theta\}` is uniform on :math:`0, \ldots, S`.
    The distribution of the ranks is compared with that along its whole length, in bands that hold simultaneously
    (Säilynoja, Bürkner and Vehtari 2022); the p-values are exact, see :func:`~.ranks.rank_p_value`. Several quantities
    share the level equally (Bonferroni).

    It cannot see what the ranks of these quantities do not show. The *prior* passes in place of the posterior. Quantities
    that depend on the data too, such as the likelihood :math:`\log p(x_i \mid \theta)`, find it (Modrák et al. 2023);
    :func:`tarp` makes one from the data alone.

    :param level: probability that a right posterior fails anywhere in this report; small, since many reports are made
    :param statistics: further quantities by name: functions of ``{site: (n_sim, *event)}`` that return ``(n_sim,)``.
        They are called once with the truths and once with each set of draws; row i always belongs to simulation i, so a
        function may look at the data of that simulation
    :param seed: of the places of truths among equal draws
    :raises ProgramError: nothing to check, wrong statistics, or too few simulations for this level
    :raises NonFiniteError: a statistic returns NaN or infinity

    >>> rng = torch.Generator().manual_seed(0)
    >>> z, noise, fresh = torch.randn(300, generator=rng), torch.randn(300, generator=rng), torch.randn(99, 300, generator=rng)
    >>> mean = (z + noise) / 2
    >>> right = PosteriorDraws({"z": z}, {"z": mean + 0.5**0.5 * fresh})
    >>> simulation_based_calibration(right).passed
    True
    >>> narrow = PosteriorDraws({"z": z}, {"z": mean + 0.3 * fresh})
    >>> simulation_based_calibration(narrow).quantities[0].verdict
    'too narrow'
    """
    level = checked_level(level)
    source = random_source(seed)
    scalars = [*drawn.scalars(), *_of_statistics(drawn, statistics or {})]
    if not scalars:
        raise ProgramError(f"nothing to check: {', '.join(drawn.constants())} never vary")
    share = level / len(scalars)
    band = rank_band(drawn.n_sim, drawn.n_draws, share)
    checks = tuple(
        check_ranks(s.name, rank(s.truth, s.draws, source), drawn.n_draws, share, WORDS) for s in scalars
    )
    return SbcReport(checks, drawn.n_sim, drawn.n_draws, level, band, drawn.constants())


def check_ranks(
    name: str, ranks: Tensor, n_draws: int, level: float, words: tuple[str, str, str, str]
) -> RankCheck:
    """Test of uniform ranks.

    :param words: what to say of a mean below and above that of uniform ranks, and of a spread below and above
    """
    p_value = rank_p_value(ranks, n_draws)
    mean, spread = rank_moments(ranks, n_draws)
    passed = p_value > level
    verdict = "" if passed else _in_words(mean, spread, float(norm.isf(level / 2)), words)
    return RankCheck(name, ranks, p_value, mean, spread, passed, verdict)


def rank_moments(ranks: Tensor, n_draws: int) -> tuple[float, float]:
    """Of u = (rank + 1/2) / (n_draws + 1) - 1/2: the means of u and u², less their null means, in null standard errors."""
    places = (torch.arange(n_draws + 1, dtype=torch.float64) + 0.5) / (n_draws + 1) - 0.5
    u, n = places[ranks], len(ranks)
    variance = places.square().mean()
    mean = u.mean() / (variance / n).sqrt()
    spread = (u.square().mean() - variance) / (places.square().var(correction=0) / n).sqrt()
    # Two draws or three leave u² one or two values; with one there is no spread to speak of.
    return float(mean), float(spread) if math.isfinite(spread) else 0.0


def _in_words(mean: float, spread: float, beyond: float, words: tuple[str, str, str, str]) -> str:
    low, high, inside, outside = words
    said = []
    if abs(mean) > beyond:
        said.append(low if mean < 0 else high)
    # A shift alone takes the truths to one end, which raises the spread too: to sqrt(5/3) times the mean at most.
    if spread < -beyond:
        said.append(inside)
    elif spread > beyond and spread > math.sqrt(5 / 3) * abs(mean) * 1.01:
        said.append(outside)
    return ", ".join(said) or "another shape"


def _of_statistics(drawn: PosteriorDraws, statistics: Mapping[str, Statistic]) -> Iterator[Scalar]:
    names = {scalar.name for scalar in drawn.scalars()}
    for name, function in statistics.items():
        if name in names:
            raise ProgramError(f"a statistic is called '{name}', as a latent is: give it another name")
        truth = _value(name, function, dict(drawn.truth), drawn.n_sim)
        each = [
            _value(name, function, {site: value[s] for site, value in drawn.draws.items()}, drawn.n_sim)
            for s in range(drawn.n_draws)
        ]
        yield Scalar(name, truth, torch.stack(each))


def _value(name: str, function: Statistic, values: dict[str, Tensor], n_sim: int) -> Tensor:
    result = function(values)
    if not isinstance(result, Tensor) or result.shape != (n_sim,):
        given = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ProgramError(
            f"statistic '{name}' returned {given}: expected a tensor ({n_sim},), one number a simulation"
        )
    if not bool(result.isfinite().all()):
        raise NonFiniteError(f"statistic '{name}' returned NaN or infinite values")
    return result.detach().cpu().double()
