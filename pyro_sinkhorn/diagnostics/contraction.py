"""Posterior z-scores and contraction: is the posterior where the truth is, and what have the data told?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import binom, norm, spearmanr
from torch import Tensor

from pyro_sinkhorn.diagnostics.calibration import SHOWN
from pyro_sinkhorn.diagnostics.drawn import PosteriorDraws, Scalar
from pyro_sinkhorn.errors import ProgramError

#: Standard errors from which a flag is raised.
FLAG = 5.0
NOTHING = "nothing learned from the data"


@dataclass(frozen=True, eq=False)
class ScalarContraction:
    """One scalar.

    z_scores:         (posterior mean - truth) / posterior standard deviation, ``(n_sim,)``; infinite where all draws agree
    contractions:     1 - posterior variance / prior variance, ``(n_sim,)``
    z_mean:           mean of the finite z-scores; 0 if the posterior is right
    z_sd:             their standard deviation; about 1
    error_ratio:      root of mean squared error of the posterior mean over mean posterior variance; 1
    contraction:      1 - mean posterior variance / prior variance
    contraction_sd:   how much it differs between simulations
    flags:            what is far from what it should be
    """

    name: str
    z_scores: Tensor
    contractions: Tensor
    z_mean: float
    z_sd: float
    error_ratio: float
    contraction: float
    contraction_sd: float
    flags: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ContractionReport:
    """What :func:`posterior_contraction` found; prints as a table."""

    quantities: tuple[ScalarContraction, ...]
    n_sim: int
    n_draws: int

    @property
    def passed(self) -> bool:
        """No flag of any scalar. A latent on which the data are silent has one under its exact posterior too."""
        return not any(row.flags for row in self.quantities)

    def table(self, most: int | None = None) -> str:
        """A row for each scalar; those with flags first, and no more than ``most``, if given."""
        rows = self.quantities
        if most is not None and len(rows) > most:
            rows = tuple(sorted(rows, key=lambda row: not row.flags)[:most])
        width = max([8, *(len(row.name) for row in rows)])
        lines = [
            f"{'scalar':<{width}} {'z mean':>7} {'z sd':>7} {'error':>7} {'contraction':>11} {'± sd':>6}  flags"
        ]
        for r in rows:
            lines.append(
                f"{r.name:<{width}} {r.z_mean:>7.2f} {r.z_sd:>7.2f} {r.error_ratio:>7.2f} {r.contraction:>11.3f} "
                f"{r.contraction_sd:>6.3f}  {'; '.join(r.flags)}".rstrip()
            )
        if len(rows) < len(self.quantities):
            lines.append(f"and {len(self.quantities) - len(rows)} more")
        return "\n".join(lines)

    def __str__(self) -> str:
        head = f"posteriors of {self.n_sim} simulations with {self.n_draws} draws each"
        return head + "\n" + self.table(SHOWN)

    def plot(self, **options: Any) -> Any:
        """The figure of :func:`pyro_sinkhorn.plots.plot_posterior_contraction`."""
        from pyro_sinkhorn.plots import plot_posterior_contraction

        return plot_posterior_contraction(self, **options)


def posterior_contraction(drawn: PosteriorDraws) -> ContractionReport:
    r"""Posterior z-scores and contraction of every scalar (Betancourt 2018; Schad, Betancourt and Vasishth 2021).

    .. math:: z_i = \frac{\bar\theta_i - \theta_i}{s_i}, \qquad c_i = 1 - \frac{s_i^2}{\mathrm{var}_{prior}},

    with mean and variance of the draws of simulation i, and the prior's variance estimated from the truths. Contraction
    near 1: the data say much; near 0: nothing. Ranks cannot tell the two apart, and the prior has the right ones.

    Two flags test the posterior. *biased*: the mean error :math:`\bar\theta_i - \theta_i` is not 0. *too narrow*, *too
    wide*: its square is not :math:`(1 + 1/S) s_i^2` in the mean. Both hold exactly for draws of the posterior, at any
    number of draws and for any law with a variance; the flag is raised 5 standard errors from it. Two more say how
    much was learned: *nothing learned from the data*, where the ranks of posterior mean and truth are not correlated, at
    the level of 5 standard errors (the data are silent on it, the draws ignore them, or the simulations are too few), and
    *wider than the prior*, which no posterior is on average. *Draws all equal and wrong*: in more simulations than rare
    states explain.

    A law without variance (Cauchy, half-Cauchy) has no contraction. Where a single simulation makes up half the prior's
    estimated variance, the flag *heavy tails* says so, and only ranks are to be trusted: or give the logarithm in place of
    the latent.

    :raises ProgramError: fewer than 10 simulations, or nothing that varies

    >>> rng = torch.Generator().manual_seed(0)
    >>> z, noise, fresh = torch.randn(300, generator=rng), torch.randn(300, generator=rng), torch.randn(99, 300, generator=rng)
    >>> right = PosteriorDraws({"z": z}, {"z": (z + noise) / 2 + 0.5**0.5 * fresh})
    >>> report = posterior_contraction(right)
    >>> report.passed, round(report.quantities[0].contraction, 1)
    (True, 0.5)
    >>> posterior_contraction(PosteriorDraws({"z": z}, {"z": fresh})).quantities[0].flags
    ('nothing learned from the data',)
    """
    if drawn.n_sim < 10:
        raise ProgramError(
            f"{drawn.n_sim} simulations are too few for a mean and its error: give 10 at least"
        )
    rows = tuple(_of_scalar(scalar) for scalar in drawn.scalars())
    if not rows:
        raise ProgramError(f"nothing to check: {', '.join(drawn.constants())} never vary")
    return ContractionReport(rows, drawn.n_sim, drawn.n_draws)


def _of_scalar(scalar: Scalar) -> ScalarContraction:
    truth, draws = scalar.truth, scalar.draws
    variance, error = draws.var(0), draws.mean(0) - truth
    prior = truth.var()
    # Where draws and truth are one number the error is nothing, not undefined.
    z_scores = torch.where(error == 0, error, error / variance.sqrt())
    expected = (1 + 1 / len(draws)) * variance
    contractions = 1 - variance / prior if float(prior) > 0 else torch.full_like(variance, torch.nan)
    finite = z_scores[z_scores.isfinite()]
    flags = _flags(truth, variance, error, expected)
    wrong = len(z_scores) - len(finite)
    if wrong and _odd_truths_p_value(truth, draws) < 2 * norm.sf(FLAG):
        flags.append(f"draws all equal and wrong in {wrong} simulations")
    return ScalarContraction(
        name=scalar.name,
        z_scores=z_scores,
        contractions=contractions,
        z_mean=float(finite.mean()) if len(finite) else math.nan,
        z_sd=float(finite.std()) if len(finite) > 1 else math.nan,
        error_ratio=math.sqrt(float(error.square().mean() / expected.mean()))
        if float(expected.mean()) > 0
        else math.inf,
        contraction=float(contractions.mean()),
        contraction_sd=float(contractions.std()),
        flags=tuple(flags),
    )


def _flags(truth: Tensor, variance: Tensor, error: Tensor, expected: Tensor) -> list[str]:
    flags = []
    if abs(_t(error)) > FLAG:
        flags.append("biased high" if float(error.mean()) > 0 else "biased low")
    excess = _t(error.square() - error.mean().square() - expected)
    if abs(excess) > FLAG:
        flags.append("too narrow" if excess > 0 else "too wide")
    squares = (truth - truth.mean()).square()
    if float(squares.max()) > float(squares.sum()) / 2:
        return [*flags, "heavy tails: no contraction"]
    if _t(squares * len(truth) / (len(truth) - 1) - variance) < -FLAG:
        flags.append("wider than the prior")
    mean = truth + error
    # By ranks: the mean of products would need a hundred simulations for a correlation of 1.
    if bool((mean == mean[0]).all()) or spearmanr(mean, truth, alternative="greater").pvalue > norm.sf(FLAG):
        flags.append(NOTHING)
    return flags


def _odd_truths_p_value(truth: Tensor, draws: Tensor) -> float:
    """Probability of so many simulations whose draws all agree, and not with the truth, if both are exchangeable.

    A rare state of a discrete latent makes such simulations under its exact posterior too. But where S of S + 1 values
    agree and one is odd, it is the truth in one of S + 1 cases.
    """
    low, high = draws.min(0).values, draws.max(0).values
    below, above = (draws == low).sum(0), (draws == high).sum(0)
    odd_truth = (low == high) & (truth != low)
    # All draws but one agree with each other and with the truth.
    odd_draw = (low != high) & (
        ((below == 1) & (above == len(draws) - 1) & (truth == high))
        | ((above == 1) & (below == len(draws) - 1) & (truth == low))
    )
    wrong, cases = int(odd_truth.sum()), int((odd_truth | odd_draw).sum())
    return float(binom.sf(wrong - 1, cases, 1 / (len(draws) + 1)))


def _t(values: Tensor) -> float:
    """Mean over its standard error."""
    mean, error = float(values.mean()), float(values.std()) / math.sqrt(len(values))
    return mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0
