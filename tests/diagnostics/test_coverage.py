"""Expected coverage: exact under exact draws, of one scalar and of all; wrong draws are outside the band."""

import numpy as np
import pytest
import torch
from scipy.stats import binom

from pyro_sinkhorn.diagnostics import PosteriorDraws, expected_coverage
from pyro_sinkhorn.diagnostics.coverage import mahalanobis_distances
from pyro_sinkhorn.errors import ProgramError

SD = 0.5**0.5


def simulations(n_sim=500, n_draws=99, d=1, wider=1.0, shift=0.0):
    z = torch.randn(n_sim, d)
    draws = (z + torch.randn(n_sim, d)) / 2 + shift * SD + wider * SD * torch.randn(n_draws, n_sim, d)
    return PosteriorDraws({"z": z}, {"z": draws})


def correlated(n_sim, draws_too, n_draws=99):
    """Both from the prior, each coordinate standard normal; correlation .95 between them in the truth."""
    factor = torch.tensor([[1.0, 0.0], [0.95, (1 - 0.95**2) ** 0.5]])
    draws = torch.randn(n_draws, n_sim, 2)
    truth = torch.randn(n_sim, 2) @ factor.T
    return PosteriorDraws({"z": truth}, {"z": draws @ factor.T if draws_too else draws})


@pytest.mark.parametrize("seed", range(4))
def test_the_exact_posterior_passes(seed):
    torch.manual_seed(seed)
    report = expected_coverage(simulations(n_sim=1000, d=3), level=1e-6)
    assert report.passed and report.names == ("z[0]", "z[1]", "z[2]", "(joint)")
    assert report.coverage.shape == report.p_values.shape == (4, len(report.nominal))


@pytest.mark.parametrize("n_draws", [4, 5, 50])
def test_nominal_masses_are_exact_at_any_number_of_draws(n_draws):
    """With 5 draws an interval of mass .3 does not exist. What is reported must be what happens: 40000 simulations."""
    report = expected_coverage(simulations(40_000, n_draws, d=2), level=1e-6)
    assert report.passed
    assert (report.nominal > 0).all() and (report.nominal < 1).all()
    assert len(set(report.nominal.tolist())) == len(report.nominal)


def test_few_draws_of_many_scalars_are_as_exact():
    """Fewer draws than scalars: the covariance alone would be singular."""
    assert expected_coverage(simulations(20_000, 5, d=8), level=1e-6).passed
    # Without shrinking, all 6 points would be at one and the same distance, and nothing would ever fail.
    narrow = expected_coverage(simulations(2000, 5, d=8, wider=0.7), level=1e-6)
    assert narrow.verdicts()[-1] == "too narrow or biased"


def test_a_right_posterior_fails_as_often_as_the_level_says():
    failed = sum(not expected_coverage(simulations(80, 19, d=2), level=0.3).passed for _ in range(200))
    assert 3 <= failed <= binom.isf(1e-6, 200, 0.3)


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        ({"wider": 0.6}, "too narrow or biased"),
        ({"wider": 1.8}, "too wide"),
        ({"shift": 1.0}, "too narrow or biased"),
    ],
)
def test_what_is_wrong_is_said_in_words(wrong, verdict):
    report = expected_coverage(simulations(n_sim=1000, d=2, **wrong))
    assert report.verdicts() == (verdict,) * 3
    assert not report.passed and "3 of 3 quantities failed" in str(report)


def test_coverage_of_a_known_wrong_posterior():
    """A posterior half as wide: the interval of mass .9 holds the truth with probability P(|N| < 1.645 / 2)."""
    report = expected_coverage(simulations(n_sim=10_000, n_draws=399, wider=0.5), levels=[0.9])
    assert report.nominal.item() == pytest.approx(0.9)
    # 5 standard errors, .0049 each; that the ends are quantiles of 399 draws costs some .002.
    assert report.coverage.item() == pytest.approx(0.589, abs=0.025)


def test_the_joint_region_sees_what_intervals_do_not():
    right, wrong = correlated(2000, True), correlated(2000, False)
    assert expected_coverage(right, level=1e-6).passed
    assert expected_coverage(wrong, level=1e-6).verdicts()[:2] == ("", "")
    # Truths on the diagonal of a round cloud: too few of them in the middle distances.
    assert expected_coverage(wrong).verdicts()[2] != ""


def test_the_joint_region_does_not_depend_on_units():
    drawn = simulations(200, 50, d=2)
    scale = torch.tensor([1e5, 1e-5])
    scaled = PosteriorDraws({"z": drawn.truth["z"] * scale}, {"z": drawn.draws["z"] * scale})
    distance = mahalanobis_distances(drawn.joined())
    assert torch.allclose(distance, mahalanobis_distances(scaled.joined()), rtol=1e-4)


def test_truth_and_draws_have_the_same_law_of_distances():
    """Were the mean that of the draws alone, the truth would lie further out: at 4 draws nearly always."""
    distance = mahalanobis_distances(simulations(20_000, 4, d=2).joined())
    assert distance.shape == (5, 20_000)
    furthest = int((distance.argmax(0) == 0).sum())
    assert binom.ppf(1e-6, 20_000, 0.2) <= furthest <= binom.isf(1e-6, 20_000, 0.2)


def test_equal_draws_are_at_equal_distances():
    """Two states in two columns, of which the second is a copy."""
    truth, draws = torch.randint(2, (5000, 1)), torch.randint(2, (9, 5000, 1))
    drawn = PosteriorDraws({"k": truth.expand(-1, 2)}, {"k": draws.expand(-1, -1, 2)})
    distance = mahalanobis_distances(drawn.joined())
    assert all(len(column.unique()) <= 2 for column in distance.T[:200])
    assert expected_coverage(drawn, level=1e-6).passed


def test_draws_that_all_agree_are_no_failure_of_arithmetic():
    truth = torch.randn(200, 2)
    report = expected_coverage(PosteriorDraws({"z": truth}, {"z": torch.zeros(20, 200, 2)}))
    assert report.verdicts() == ("too narrow or biased",) * 3
    right = expected_coverage(PosteriorDraws({"z": truth}, {"z": truth.expand(20, -1, -1)}))
    assert right.coverage.isfinite().all()


def test_masses_asked_for_are_rounded_to_what_draws_can_say():
    report = expected_coverage(simulations(100, 100), levels=[0.5, 0.9, 0.901])
    assert report.nominal.tolist() == pytest.approx([51 / 101, 91 / 101])


def test_the_table_shows_the_worst():
    drawn = simulations(500, 50, d=35)
    drawn.draws["z"][..., 30] *= 0.2
    lines = str(expected_coverage(drawn)).splitlines()
    assert any(line.startswith("z[30]") and line.endswith("too narrow or biased") for line in lines[:5])
    assert lines[-1] == "and 6 more with larger p-values"


@pytest.mark.parametrize("levels", [[], [0.0], [1.0], [0.5, 1.2], [[0.5]], [np.nan]])
def test_levels_are_masses(levels):
    with pytest.raises(ProgramError, match="expected masses between 0 and 1"):
        expected_coverage(simulations(50, 9), levels=levels)


def test_too_few_draws_for_a_level():
    with pytest.raises(ProgramError, match="2 draws cannot express a central interval of mass"):
        expected_coverage(simulations(50, 2), levels=[0.99])
