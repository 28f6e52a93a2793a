"""z-scores and contraction: known values of a known posterior, and flags for what is wrong."""

import math

import pytest
import torch

from pyro_sinkhorn.diagnostics import PosteriorDraws, posterior_contraction
from pyro_sinkhorn.errors import ProgramError

SD = 0.5**0.5


def simulations(n_sim=2000, n_draws=50, d=1, wider=1.0, shift=0.0):
    z = torch.randn(n_sim, d)
    draws = (z + torch.randn(n_sim, d)) / 2 + shift * SD + wider * SD * torch.randn(n_draws, n_sim, d)
    return PosteriorDraws({"z": z}, {"z": draws})


def first(drawn):
    return posterior_contraction(drawn).quantities[0]


def test_known_values():
    row = first(simulations(n_sim=20_000, n_draws=200))
    # Standard errors: .007, .005, .005; that of the contraction is that of a variance ratio, .005.
    assert row.z_mean == pytest.approx(0, abs=0.036)
    assert row.z_sd == pytest.approx(math.sqrt((1 + 1 / 200) * 199 / 197), abs=0.026)
    assert row.error_ratio == pytest.approx(1, abs=0.026)
    assert row.contraction == pytest.approx(0.5, abs=0.026)
    assert row.z_scores.shape == row.contractions.shape == (20_000,)
    assert row.contractions.mean() == pytest.approx(row.contraction)


@pytest.mark.parametrize("n_draws", [2, 5, 50])
def test_exact_posteriors_have_no_flag_at_any_number_of_draws(n_draws):
    """z-scores of 2 draws have no variance; the flags must not rest on them. 5 standard errors, 80 flags."""
    report = posterior_contraction(simulations(n_draws=n_draws, d=40))
    assert report.passed and not any(row.flags for row in report.quantities)


def test_exact_posteriors_of_another_shape_have_no_flag():
    """z ~ Exponential(1), a count x ~ Poisson(z): posterior Gamma(x + 1, 2)."""
    z = torch.distributions.Exponential(1.0).sample((3000, 20))
    x = torch.distributions.Poisson(z).sample()
    draws = torch.distributions.Gamma(x + 1, 2.0).sample((30,))
    assert posterior_contraction(PosteriorDraws({"z": z}, {"z": draws})).passed


@pytest.mark.parametrize(
    ("wrong", "flags"),
    [
        ({"wider": 0.7}, ("too narrow",)),
        ({"wider": 1.3}, ("too wide",)),
        ({"shift": 0.5}, ("biased high",)),
        ({"shift": -0.5}, ("biased low",)),
        ({"wider": 3.0}, ("too wide", "wider than the prior")),
        ({"shift": 0.5, "wider": 0.5}, ("biased high", "too narrow")),
    ],
)
def test_flags_say_what_is_wrong(wrong, flags):
    drawn = simulations(**wrong)
    assert first(drawn).flags == flags
    assert "; ".join(flags) in str(posterior_contraction(drawn))


def test_the_prior_as_posterior_has_learned_nothing():
    drawn = PosteriorDraws({"z": torch.randn(2000)}, {"z": torch.randn(50, 2000)})
    assert first(drawn).flags == ("nothing learned from the data",)
    assert first(drawn).contraction == pytest.approx(0, abs=0.16)  # 5 standard errors of the truths' variance


def test_as_wide_as_the_prior_is_not_to_have_learned_nothing():
    drawn = simulations(wider=2**0.5)
    assert first(drawn).flags == ("too wide",) and abs(first(drawn).contraction) < 0.16


def test_heavy_tails_are_named():
    truth = torch.randn(500)
    truth[7] = 1e6
    row = first(PosteriorDraws({"z": truth}, {"z": truth + torch.randn(50, 500)}))
    assert "heavy tails: no contraction" in row.flags


def test_draws_that_all_agree():
    truth = torch.randint(2, (400,))
    drawn = PosteriorDraws({"k": truth}, {"k": torch.zeros(20, 400, dtype=torch.long)})
    row = first(drawn)
    wrong = int(truth.sum())
    assert f"draws all equal and wrong in {wrong} simulations" in row.flags
    assert "nothing learned from the data" in row.flags
    assert row.z_mean == 0 and row.error_ratio == math.inf
    exact = first(PosteriorDraws({"k": truth}, {"k": truth.expand(20, -1)}))
    assert exact.flags == () and exact.contraction == 1


def test_a_rare_state_is_no_fault_of_its_exact_posterior():
    p = torch.where(torch.rand(3000) < 0.5, 0.01, 0.99)
    truth, draws = torch.bernoulli(p), torch.bernoulli(p.expand(20, -1))
    wrong = int(((draws == draws[0]).all(0) & (draws[0] != truth)).sum())
    assert wrong > 10  # of 3000, about 25 are expected
    assert first(PosteriorDraws({"k": truth}, {"k": draws})).flags == ()
    # A posterior that is surer than it should be: states of probability .01 are never drawn.
    sure = (p > 0.5).double().expand(20, -1)
    assert any(
        "all equal and wrong" in flag for flag in first(PosteriorDraws({"k": truth}, {"k": sure})).flags
    )


def test_the_table():
    drawn = simulations(500, 20, d=33)
    drawn.draws["z"][..., 32] += 3
    lines = str(posterior_contraction(drawn)).splitlines()
    assert lines[0] == "posteriors of 500 simulations with 20 draws each"
    assert lines[1].split() == ["scalar", "z", "mean", "z", "sd", "error", "contraction", "±", "sd", "flags"]
    assert lines[2].startswith("z[32]") and "biased high" in lines[2]
    assert lines[-1] == "and 3 more"


def test_wrong_use():
    with pytest.raises(ProgramError, match="9 simulations are too few"):
        posterior_contraction(simulations(9))
    with pytest.raises(ProgramError, match="nothing to check: z never vary"):
        posterior_contraction(PosteriorDraws({"z": torch.ones(20)}, {"z": torch.ones(4, 20)}))
