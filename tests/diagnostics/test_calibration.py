"""Simulation-based calibration: the exact posterior passes, each wrong one fails in the right words.

The model throughout: z ~ N(0, 1), x ~ N(z, 1), posterior N(x / 2, 1 / 2), in each of d independent coordinates.
"""

import numpy as np
import pytest
import torch
from scipy.stats import binom, kstest

from pyro_sinkhorn.diagnostics import PosteriorDraws, simulation_based_calibration
from pyro_sinkhorn.errors import NonFiniteError, ProgramError

SD = 0.5**0.5


def simulations(n_sim=500, n_draws=99, d=1, wider=1.0, shift=0.0):
    z = torch.randn(n_sim, d)
    x = z + torch.randn(n_sim, d)
    draws = x / 2 + shift * SD + wider * SD * torch.randn(n_draws, n_sim, d)
    return PosteriorDraws({"z": z}, {"z": draws}, {"x": x})


def prior_as_posterior(n_sim=500, n_draws=99):
    right = simulations(n_sim, n_draws)
    return PosteriorDraws(right.truth, {"z": torch.randn(n_draws, n_sim, 1)}, right.data)


@pytest.mark.parametrize("seed", range(5))
def test_the_exact_posterior_passes(seed):
    torch.manual_seed(seed)
    # Level 1e-6: a right implementation fails once in 2e5 runs of these five.
    report = simulation_based_calibration(simulations(d=3), level=1e-6)
    assert report.passed
    assert [check.verdict for check in report.quantities] == ["", "", ""]
    assert report.p_value == pytest.approx(min(1, 3 * min(check.p_value for check in report.quantities)))


def test_p_values_of_exact_posteriors_are_uniform():
    p = []
    for _ in range(20):
        report = simulation_based_calibration(simulations(n_sim=300, n_draws=49, d=15))
        p += [check.p_value for check in report.quantities]
    assert kstest(p, "uniform").pvalue > 1e-6


def test_a_right_posterior_fails_as_often_as_the_level_says():
    """Several quantities share the level: with 4 of them and level .2, at most a fifth of 200 reports fail."""
    failed = sum(
        not simulation_based_calibration(simulations(n_sim=100, n_draws=19, d=4), level=0.2).passed
        for _ in range(200)
    )
    assert binom.ppf(1e-6, 200, 0.10) <= failed <= binom.isf(1e-6, 200, 0.2)


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        ({"wider": 0.6}, "too narrow"),
        ({"wider": 0.05}, "too narrow"),
        ({"wider": 1.8}, "too wide"),
        ({"wider": 20.0}, "too wide"),
        ({"shift": 0.5}, "biased high"),
        ({"shift": -0.5}, "biased low"),
        ({"shift": 2.0}, "biased high"),
        ({"shift": -30.0}, "biased low"),
        ({"shift": 0.8, "wider": 0.3}, "biased high, too narrow"),
        ({"shift": 0.8, "wider": 4.0}, "biased high, too wide"),
    ],
)
def test_what_is_wrong_is_said_in_words(wrong, verdict):
    report = simulation_based_calibration(simulations(n_sim=1000, **wrong))
    assert report.quantities[0].verdict == verdict
    # All lie far beyond any level one would choose.
    assert report.quantities[0].p_value < 1e-9 and not report.passed
    assert verdict in str(report) and "1 of 1 quantities failed" in str(report)


def test_a_wrong_shape_with_right_moments_fails():
    """Ranks at 1/2 ± sqrt(1/12): mean and spread of uniform ones."""
    truth = torch.where(torch.rand(1000) < 0.5, 0.2113, 0.7887)
    report = simulation_based_calibration(PosteriorDraws({"z": truth}, {"z": torch.rand(999, 1000)}))
    assert report.quantities[0].verdict == "another shape"


def test_one_wrong_coordinate_of_many_is_found_and_shown_first():
    drawn = simulations(n_sim=1000, d=40)
    drawn.draws["z"][..., 17] *= 0.5
    report = simulation_based_calibration(drawn)
    failed = [check.name for check in report.quantities if not check.passed]
    assert failed == ["z[17]"]
    shown = str(report).splitlines()
    assert shown[2].startswith("z[17]") and "and 10 more with larger p-values" in shown[-1]
    assert len(report.table().splitlines()) == 41


def test_the_prior_passes_by_its_ranks_and_fails_by_its_likelihood():
    drawn = prior_as_posterior()
    report = simulation_based_calibration(drawn, level=1e-6)
    assert report.passed and "the prior itself would pass too" in str(report)
    x = drawn.data["x"][:, 0]
    report = simulation_based_calibration(
        drawn, statistics={"log p(x | z)": lambda values: -((x - values["z"][:, 0]) ** 2)}
    )
    assert [check.verdict for check in report.quantities] == ["", "biased low"]


def test_statistics_of_the_data_pass_with_the_exact_posterior():
    drawn = simulations()
    x = drawn.data["x"][:, 0]
    report = simulation_based_calibration(
        drawn, 1e-6, {"log p(x | z)": lambda values: -((x - values["z"][:, 0]) ** 2)}
    )
    assert report.passed and [check.name for check in report.quantities] == ["z[0]", "log p(x | z)"]


def test_statistics_see_dependence_that_scalars_do_not():
    """Two coordinates with correlation .9 in the prior, whose draws are right one by one and independent."""
    factor = torch.tensor([[1.0, 0.0], [0.9, 0.19**0.5]])
    truth, draws = torch.randn(1000, 2) @ factor.T, torch.randn(99, 1000, 2)
    drawn = PosteriorDraws({"z": truth}, {"z": draws})
    report = simulation_based_calibration(
        drawn, 1e-6, statistics={"difference": lambda values: values["z"][:, 0] - values["z"][:, 1]}
    )
    assert [check.verdict for check in report.quantities] == ["", "", "too wide"]


def discrete(n_sim=2000, n_draws=20):
    """k ~ Binomial(3, 1/2) thinned with probability 1/2: what is left of k given what was taken is exact."""
    k = torch.distributions.Binomial(3, 0.5).sample((n_sim,))
    seen = torch.distributions.Binomial(k, 0.5).sample()
    # k - seen | seen ~ Binomial(3 - seen, 1/3)
    rest = torch.distributions.Binomial(3 - seen, 1 / 3).sample((n_draws,))
    return PosteriorDraws({"k": k.long()}, {"k": (seen + rest).long()})


def test_a_discrete_posterior_passes_and_a_wrong_one_fails():
    right = discrete()
    assert simulation_based_calibration(right, level=1e-6).passed
    wrong = PosteriorDraws(right.truth, {"k": (right.draws["k"] + 1).clamp(max=3)})
    assert "biased high" in simulation_based_calibration(wrong).quantities[0].verdict


def test_values_that_rounding_made_equal_do_no_harm():
    z = (simulations(n_sim=2000).truth["z"][:, 0] * 2).round() / 2
    draws = (torch.randn(50, 2000) * 2).round() / 2
    assert simulation_based_calibration(PosteriorDraws({"z": z}, {"z": draws}), level=1e-6).passed


def test_the_same_seed_gives_the_same_report_and_leaves_the_global_one_alone():
    drawn = discrete(200)
    state = torch.get_rng_state()
    first, again = simulation_based_calibration(drawn), simulation_based_calibration(drawn)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.quantities[0].ranks, again.quantities[0].ranks)
    other = simulation_based_calibration(drawn, seed=1)
    assert not torch.equal(first.quantities[0].ranks, other.quantities[0].ranks)


def test_numbers_that_never_vary_cost_nothing_and_are_named():
    drawn = simulations(100, 9, 2)
    truth, draws = drawn.truth["z"], drawn.draws["z"]
    truth[:, 0] = draws[..., 0] = 1.0
    report = simulation_based_calibration(PosteriorDraws({"z": truth}, {"z": draws}))
    assert [check.name for check in report.quantities] == ["z[1]"]
    assert "left out, since they never vary: z[0]" in str(report)


def test_the_table():
    report = simulation_based_calibration(simulations(n_sim=200, n_draws=9, wider=0.2))
    head, columns, row = str(report).splitlines()
    assert head.startswith("calibration of 200 simulations with 9 draws each: 1 of 1 quantities failed (p = ")
    assert columns.split() == ["quantity", "p-value", "mean", "spread", "verdict"]
    assert row.startswith("z[0]") and row.endswith("too narrow")


def test_two_draws_are_enough():
    report = simulation_based_calibration(simulations(n_sim=2000, n_draws=2), level=1e-6)
    assert report.passed and np.isfinite(report.quantities[0].spread)
    wrong = simulation_based_calibration(simulations(n_sim=2000, n_draws=2, wider=0.3))
    assert wrong.quantities[0].verdict == "too narrow"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"level": 2.0}, ProgramError, "level is 2.0: expected a number between 0 and 1"),
        ({"seed": 0.5}, ProgramError, "seed is 0.5: expected an integer"),
        ({"statistics": {"z[0]": lambda v: v["z"][:, 0]}}, ProgramError, r"a statistic is called 'z\[0\]'"),
        ({"statistics": {"s": lambda v: v["z"]}}, ProgramError, r"'s' returned shape \(100, 1\).*\(100,\)"),
        ({"statistics": {"s": lambda v: 1.0}}, ProgramError, "'s' returned float"),
        ({"statistics": {"s": lambda v: v["z"][:, 0] / 0}}, NonFiniteError, "'s' returned NaN or infinite"),
    ],
)
def test_wrong_use(options, error, message):
    with pytest.raises(error, match=message):
        simulation_based_calibration(simulations(100, 9), **options)


def test_nothing_to_check():
    with pytest.raises(ProgramError, match="nothing to check: z never vary"):
        simulation_based_calibration(PosteriorDraws({"z": torch.ones(9)}, {"z": torch.ones(4, 9)}))


def test_too_few_simulations():
    with pytest.raises(ProgramError, match="1 simulations with 9 draws each cannot reject"):
        simulation_based_calibration(simulations(1, 9))
