"""The law of uniform ranks: exact p-values, bands that hold as often as they say, ties at random."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, chisquare, kstest

from pyro_sinkhorn.diagnostics import ranks as module
from pyro_sinkhorn.diagnostics.ranks import (
    checked_level,
    leaving_probability,
    random_source,
    rank,
    rank_band,
    rank_p_value,
)
from pyro_sinkhorn.errors import ProgramError


def uniform(n_sim, n_draws, repetitions, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, n_draws + 1, (repetitions, n_sim)))


def test_the_probability_of_leaving_is_that_of_all_paths():
    """Against the sum over all 4^5 outcomes of 5 values in 4 cells."""
    z, low, high = np.array([0.1, 0.4, 0.8]), np.array([0, 1, 3]), np.array([1, 3, 5])
    cells = np.diff(np.concatenate([[0], z, [1]]))
    left = 0.0
    for outcome in np.ndindex(4, 4, 4, 4, 4):
        counts = np.array([sum(cell <= k for cell in outcome) for k in range(3)])
        left += math.prod(cells[list(outcome)]) * bool(((counts < low) | (counts > high)).any())
    assert leaving_probability(low, high, 5, z) == pytest.approx(left, rel=1e-12)


def test_a_tiny_probability_keeps_its_digits():
    """With a single point the count is binomial."""
    n, z = 1000, np.array([0.3])
    exact = binom.cdf(99, n, 0.3) + binom.sf(600, n, 0.3)
    assert exact < 1e-45
    assert leaving_probability(np.array([100]), np.array([600]), n, z) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize(("n_sim", "n_draws"), [(30, 4), (100, 20), (200, 99)])
def test_p_values_are_those_of_the_null(n_sim, n_draws):
    """Never below a level too often, and on it as often as a discrete statistic can be.

    Of 1000 data sets, the number at or below a level is at most binomial: 1e-6 beyond.
    """
    p = np.array([rank_p_value(row, n_draws) for row in uniform(n_sim, n_draws, 1000)])
    for level in (0.01, 0.05, 0.2, 0.5, 0.8):
        assert (p <= level).sum() <= binom.isf(1e-6, 1000, level)
        assert (p <= level * 1.35).sum() >= binom.ppf(1e-6, 1000, min(level, 1))


def test_p_values_of_many_simulations_are_uniform():
    p = [rank_p_value(row, 99) for row in uniform(500, 99, 500, seed=1)]
    assert kstest(p, "uniform").pvalue > 1e-5


@pytest.mark.parametrize("level", [0.01, 0.1])
@pytest.mark.parametrize(("n_sim", "n_draws"), [(50, 9), (300, 60), (100, 500)])
def test_bands_hold_as_often_as_they_say(n_sim, n_draws, level):
    points, low, high = rank_band(n_sim, n_draws, level)
    exact = leaving_probability(low, high, n_sim, points / (n_draws + 1))
    assert 0.6 * level < exact <= level
    samples = uniform(n_sim, n_draws, 10_000, seed=2).numpy()
    counts = np.stack([(samples < k).sum(1) for k in points], 1)
    left = ((counts < low) | (counts > high)).any(1).sum()
    # A binomial with the exact probability: 1e-6 at either side.
    assert binom.ppf(1e-6, 10_000, exact) <= left <= binom.isf(1e-6, 10_000, exact)


def test_the_band_and_the_p_value_agree():
    level = 0.05
    points, low, high = rank_band(100, 19, level)
    samples = uniform(100, 19, 1000, seed=3)
    outside = []
    for row in samples:
        counts = (row.numpy() < points[:, None]).sum(1)
        outside.append(bool(((counts < low) | (counts > high)).any()))
    assert outside == [rank_p_value(row, 19) <= level for row in samples]
    assert 10 < sum(outside) < 100


def test_the_places_to_look_at_are_few_and_even():
    assert module.points_of(5).tolist() == [1, 2, 3, 4, 5]
    many = module.points_of(1000)
    assert len(many) == module.MAX_POINTS
    assert many.min() >= 1 and many.max() <= 1000
    assert set(np.diff(many)) <= {4, 5}


def test_ties_are_broken_at_random():
    """Truth and draws from three states: without randomness the ranks would sit on a few values."""
    truth, draws = torch.randint(3, (20_000,)), torch.randint(3, (9, 20_000))
    ranks = rank(truth, draws, random_source(0))
    assert chisquare(torch.bincount(ranks, minlength=10).numpy()).pvalue > 1e-6
    assert ((draws < truth).sum(0) <= ranks).all() and (ranks <= (draws <= truth).sum(0)).all()


def test_the_seed_decides_and_is_no_seed_of_others():
    truth, draws = torch.zeros(50), torch.zeros(9, 50)
    first = rank(truth, draws, random_source(3))
    assert torch.equal(first, rank(truth, draws, random_source(3)))
    assert not torch.equal(first, rank(truth, draws, random_source(4)))
    assert random_source(0).random() != np.random.default_rng(0).random()
    with pytest.raises(ProgramError, match="seed is -1"):
        random_source(-1)


def test_extreme_ranks_have_a_p_value():
    assert rank_p_value(torch.zeros(5000, dtype=torch.long), 100) < 1e-300
    assert 0 < rank_p_value(torch.zeros(30, dtype=torch.long), 100) < 1e-50


def test_too_few_simulations_for_a_level():
    with pytest.raises(
        ProgramError, match="2 simulations with 9 draws each cannot reject anything at level 0.001"
    ):
        rank_band(2, 9, 0.001)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, "a", None, 1])
def test_a_level_is_a_probability(level):
    with pytest.raises(ProgramError, match="level is"):
        checked_level(level)
