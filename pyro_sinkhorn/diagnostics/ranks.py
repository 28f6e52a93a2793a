"""Ranks of a truth among draws, and the exact law of their empirical distribution when they are uniform."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import gammaln
from scipy.stats import binom, poisson
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError, checked_integer

#: The distribution of ranks is looked at in this many places at most: more cost time and show little.
MAX_POINTS = 200


class RankBand(NamedTuple):
    """Where the numbers of ranks below each of ``points`` lie together with probability at least 1 - level.

    points:  ranks at which the distribution is looked at, ``(K,)``, from 1 to n_draws
    low:     least count of ranks below each point
    high:    greatest count
    """

    points: np.ndarray
    low: np.ndarray
    high: np.ndarray


def random_source(seed: int) -> np.random.Generator:
    """Randomness of the checks themselves.

    Never the stream that torch or NumPy make of the same seed: a reference point drawn from that would be the very noise
    that made the truth, where both were seeded with 0.
    """
    return np.random.default_rng([checked_integer("seed", seed, 0), 0x5BC])


def rank(truth: Tensor, draws: Tensor, source: np.random.Generator) -> Tensor:
    """The number of draws below the truth, 0 to n_draws; ``truth (n_sim,)``, ``draws (n_draws, n_sim)``.

    If truth and draws are exchangeable, the rank is uniform on n_draws + 1 values. With ties, of a discrete latent or of
    values rounded to one another, that holds only if the truth takes a uniformly random place among its equals: counting
    ties as below, above, or half would pile up the ranks of a right posterior.
    """
    ties = (draws == truth).sum(0)
    return (draws < truth).sum(0) + torch.from_numpy(source.integers(0, ties.numpy(), endpoint=True))


def checked_level(level: float) -> float:
    """:raises ProgramError: no number between 0 and 1"""
    if not isinstance(level, float) or not 0 < level < 1:
        raise ProgramError(
            f"level is {level!r}: expected a number between 0 and 1, the probability of a false alarm"
        )
    return level


def points_of(n_draws: int) -> np.ndarray:
    """Where to look: at every rank, or at ``MAX_POINTS`` of them, spread evenly. It must not depend on the ranks."""
    count = min(n_draws, MAX_POINTS)
    return np.unique(np.round(np.linspace(0, n_draws + 1, count + 2))[1:-1].astype(int))


def counts_below(ranks: Tensor, points: np.ndarray) -> np.ndarray:
    """Ranks below each point, ``(K,)``."""
    return np.searchsorted(np.sort(ranks.numpy()), points, side="left")


def rank_p_value(ranks: Tensor, n_draws: int) -> float:
    r"""Probability that uniform ranks are as far from uniform somewhere as these are.

    With :math:`C_k` the count of ranks below k, :math:`z_k = k / (S + 1)` and N simulations, the statistic is (Säilynoja,
    Bürkner and Vehtari 2022)

    .. math:: \gamma = 2 \min_k \min \{ P(\mathrm{Bin}(N, z_k) \le C_k),\; P(\mathrm{Bin}(N, z_k) \ge C_k) \},

    the p-value of the most surprising count. The p-value returned is :math:`P(\gamma^* \le \gamma)` under uniform ranks,
    by recursion over k rather than by simulation: exact far out in the tail, and seldom more than a tenth of a second.
    """
    points = points_of(n_draws)
    counts, n = counts_below(ranks, points), len(ranks)
    z = points / (n_draws + 1)
    gamma = 2 * min(binom.cdf(counts, n, z).min(), binom.sf(counts - 1, n, z).min())
    return leaving_probability(*central_counts(min(gamma, 1.0), n, z), n, z)


@functools.cache
def rank_band(n_sim: int, n_draws: int, level: float) -> RankBand:
    r"""The simultaneous band that uniform ranks leave with probability ``level`` at most.

    At each point the central range of a binomial outside which less than :math:`\gamma` lies, with the largest
    :math:`\gamma` whose band is left with probability ``level`` at most.

    :raises ProgramError: so few simulations that not even the most extreme ranks are this improbable

    >>> band = rank_band(100, 9, 0.05)
    >>> band.points.tolist(), band.low.tolist()[:2], band.high.tolist()[:2]
    ([1, 2, 3, 4, 5, 6, 7, 8, 9], [3, 11], [18, 31])
    """
    points = points_of(n_draws)
    z = points / (n_draws + 1)
    # The smallest value that gamma can take: all ranks 0, or all n_draws.
    low = math.log(2) + n_sim * math.log(min(z[0], 1 - z[-1]))
    high = 0.0
    if leaving_probability(*central_counts(math.exp(low), n_sim, z), n_sim, z) > level:
        raise ProgramError(
            f"{n_sim} simulations with {n_draws} draws each cannot reject anything at level {level:.2g}: give more of both"
        )
    low = max(low, math.log(level / (2 * len(points))))  # by the union bound
    while high - low > 1e-4:
        middle = (low + high) / 2
        if leaving_probability(*central_counts(math.exp(middle), n_sim, z), n_sim, z) <= level:
            low = middle
        else:
            high = middle
    return RankBand(points, *central_counts(math.exp(low), n_sim, z))


def central_counts(gamma: float, n: int, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest count of ``Bin(n, z)`` whose tails, doubled, are both greater than gamma; arrays like z."""
    gamma = gamma * (1 + 1e-9)  # a count whose tail is gamma itself must fall outside, whatever the rounding

    def least(z: np.ndarray) -> np.ndarray:
        count = binom.ppf(gamma / 2, n, z).astype(int)
        return count + (binom.cdf(count, n, z) <= gamma / 2)

    return least(z), n - least(1 - z)


def leaving_probability(low: np.ndarray, high: np.ndarray, n: int, z: np.ndarray) -> float:
    r"""Probability that the counts of n uniform values below z, an increasing ``(K,)``, leave ``[low, high]`` somewhere.

    The counts are a Poisson process of rate n conditioned on having n points in all. Its increments are independent, so
    the mass of the paths inside follows by convolutions; what falls outside at a point is weighted by the probability of
    coming to n from there. Summing what leaves, instead of subtracting what stays from 1, keeps every digit of a small
    probability.
    """
    mass, start, left, before, at_end = np.ones(1), 0, 0.0, 0.0, poisson.logpmf(n, n)
    steps: dict[float, np.ndarray] = {}
    for least, greatest, here in zip(low, high, z, strict=True):
        step = round(n * (here - before), 9)
        if step not in steps:
            jumps = poisson.pmf(np.arange(n + 1), step)
            steps[step] = jumps[: np.flatnonzero(jumps)[-1] + 1]
        moved = np.convolve(mass, steps[step])[: n + 1 - start]
        counts = start + np.arange(len(moved))
        outside = (counts < least) | (counts > greatest)
        rest, rate = n - counts[outside], n * (1 - here)
        onward = rest * math.log(rate) - rate - gammaln(rest + 1) - at_end
        left += float((moved[outside] * np.exp(onward)).sum())
        inside = ~outside
        if not inside.any():
            return min(left, 1.0)
        mass, start, before = moved[inside], int(counts[inside][0]), here
    return min(left, 1.0)
