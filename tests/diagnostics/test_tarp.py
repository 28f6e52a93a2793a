"""TARP: uniform under exact draws whatever the references, and with references from the data the prior does not pass.

The model: z ~ N(0, 1) in d coordinates, x ~ N(z, 1), posterior N(x / 2, 1 / 2).
"""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm

from pyro_sinkhorn.diagnostics import PosteriorDraws, tarp
from pyro_sinkhorn.diagnostics.tarp import nearest_earlier
from pyro_sinkhorn.errors import NonFiniteError, ProgramError

SD = 0.5**0.5


def simulations(n_sim=500, n_draws=49, d=2, wider=1.0, shift=0.0, prior=False, data=True):
    z = torch.randn(n_sim, d)
    x = z + torch.randn(n_sim, d)
    fresh = torch.randn(n_draws, n_sim, d)
    draws = fresh if prior else x / 2 + shift * SD + wider * SD * fresh
    return PosteriorDraws({"z": z}, {"z": draws}, {"x": x} if data else None)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_exact_posterior_passes(seed, data):
    torch.manual_seed(seed)
    report = tarp(simulations(data=data), level=1e-6)
    assert report.passed and report.quantities[0].verdict == ""
    assert report.references == ("data" if data else "noise")


@pytest.mark.parametrize("data", [True, False])
def test_p_values_of_exact_posteriors_are_uniform(data):
    reports = [tarp(simulations(n_sim=200, data=data), seed=seed) for seed in range(200)]
    for p in ([r.p_value for r in reports], [r.ks_p_value for r in reports]):
        assert kstest(p, "uniform").pvalue > 1e-6
    assert kstest([r.atc_z for r in reports], norm.cdf).pvalue > 1e-6


@pytest.mark.parametrize(
    ("wrong", "verdict", "atc"),
    [
        ({"wider": 0.6}, "draws too near to where the data point, too narrow", -1),
        ({"wider": 1.8}, "draws too far from where the data point", 1),
        ({"prior": True}, "draws too far from where the data point", 1),
    ],
)
def test_what_is_wrong_is_said_in_words(wrong, verdict, atc):
    report = tarp(simulations(n_sim=2000, **wrong))
    found = report.quantities[0].verdict
    assert found.startswith(verdict.split(",")[0])
    assert report.p_value < 1e-6 and report.ks_p_value < 1e-6 and not report.passed
    assert np.sign(report.atc) == atc and abs(report.atc_z) > 4
    assert found in str(report) and "references from data" in str(report)


@pytest.mark.parametrize("data", [True, False])
def test_a_shift_is_found(data):
    assert not tarp(simulations(n_sim=2000, shift=0.8, data=data)).passed


def test_the_prior_passes_with_references_that_know_nothing_of_the_data():
    """Why references come from the data where there are data."""
    assert tarp(simulations(n_sim=2000, prior=True, data=False), level=1e-6).passed


def test_dependence_that_ranks_do_not_show_is_found():
    """Prior with correlation .95, draws independent with the right margins."""
    factor = torch.tensor([[1.0, 0.0], [0.95, (1 - 0.95**2) ** 0.5]])
    drawn = PosteriorDraws({"z": torch.randn(4000, 2) @ factor.T}, {"z": torch.randn(49, 4000, 2)})
    assert tarp(drawn).p_value < 1e-6


def test_references_are_truths_of_earlier_simulations_only():
    data, truth = {"x": torch.randn(60, 3)}, torch.arange(60.0)[:, None]
    points = nearest_earlier(data, truth, torch.full((60, 1), -1.0))
    assert points[0] == -1 and (points[1:] < truth[1:]).all()
    # Blocks are there to save memory alone.
    assert torch.equal(nearest_earlier(data, truth, torch.full((60, 1), -1.0), block=60 * 7), points)


def test_references_are_those_with_the_nearest_data():
    """Pairs of like data, the second of each some way on: its reference is the truth of the first."""
    x = torch.randn(30, 2)
    points = nearest_earlier({"x": torch.cat([x, x + 1e-6])}, torch.arange(60.0)[:, None], torch.zeros(60, 1))
    assert torch.equal(points[30:, 0], torch.arange(30.0))


def test_constant_and_wild_data_are_no_failure():
    data = {
        "x": torch.distributions.Cauchy(0.0, 1.0).sample((50, 2)) ** 3,
        "one": torch.ones(50),
        "k": torch.arange(50),
    }
    points = nearest_earlier(data, torch.randn(50, 2), torch.zeros(50, 2))
    assert points.isfinite().all()


def test_noise_is_no_stream_of_a_seeded_program():
    """Truths and references from one seed would be one and the same point."""
    torch.manual_seed(0)
    truth = torch.randn(300, 2)
    drawn = PosteriorDraws({"z": truth}, {"z": torch.randn(49, 300, 2)})
    assert tarp(drawn, level=1e-6, seed=0).passed
    rng = np.random.default_rng(0)
    drawn = PosteriorDraws(
        {"z": torch.from_numpy(rng.standard_normal((300, 2)))}, {"z": torch.randn(49, 300, 2)}
    )
    assert tarp(drawn, level=1e-6, seed=0).passed


def test_references_of_your_own_are_in_the_latents_units():
    drawn = simulations(n_sim=1000)
    unit = torch.tensor([1000.0, 0.001])
    scaled = PosteriorDraws({"z": drawn.truth["z"] * unit}, {"z": drawn.draws["z"] * unit})
    points = torch.randn(1000, 2)
    report, same = tarp(drawn, points), tarp(scaled, points * unit)
    assert report.references == "given"
    # Apart from rounding in float32 the distances are those of the same standardised columns.
    assert (report.quantities[0].ranks - same.quantities[0].ranks).abs().max() <= 1
    # The truth itself as reference is not allowed, and shows: nothing is nearer.
    assert tarp(drawn, drawn.truth["z"]).quantities[0].ranks.max() == 0


def test_the_curve():
    report = tarp(simulations(n_sim=1000, n_draws=19, wider=0.5))
    assert report.credibility.tolist() == pytest.approx([k / 20 for k in range(21)])
    assert report.coverage[0] == 0 and report.coverage[-1] == 1
    assert (report.coverage.diff() >= 0).all()
    # The area between curve and diagonal above 1/2, by the trapezoid: what atc is, up to the steps of the grid.
    upper = (report.coverage - report.credibility)[10:]
    area = float(((upper[1:] + upper[:-1]) / 2).sum() / 20)
    assert report.atc == pytest.approx(area, abs=0.005)
    assert report.atc_z == pytest.approx(report.atc / math.sqrt(5 / 192 / 1000))


def test_discrete_latents_pass():
    """k ~ Binomial(3, 1/2), each of them seen with probability 1/2."""
    k = torch.distributions.Binomial(3, 0.5).sample((2000,))
    seen = torch.distributions.Binomial(k, 0.5).sample()
    draws = seen + torch.distributions.Binomial(3 - seen, 1 / 3).sample((19,))
    assert tarp(PosteriorDraws({"k": k}, {"k": draws}, {"seen": seen}), level=1e-6).passed
    prior = torch.distributions.Binomial(3, 0.5).sample((19, 2000))
    assert not tarp(PosteriorDraws({"k": k}, {"k": prior}, {"seen": seen})).passed


@pytest.mark.parametrize(
    ("references", "error", "message"),
    [
        (torch.zeros(50), ProgramError, r"references are \(50,\): expected a tensor \(50, 2\)"),
        (torch.zeros(2, 50), ProgramError, r"with columns z\[0\], z\[1\]"),
        ("data", ProgramError, "references are str"),
        (torch.full((50, 2), torch.nan), NonFiniteError, "references have NaN"),
    ],
)
def test_wrong_references(references, error, message):
    with pytest.raises(error, match=message):
        tarp(simulations(50, 9), references)


def test_wrong_level_and_too_few():
    with pytest.raises(ProgramError, match="level is 0.0"):
        tarp(simulations(50, 9), level=0.0)
    with pytest.raises(ProgramError, match="cannot reject anything"):
        tarp(simulations(1, 9))
