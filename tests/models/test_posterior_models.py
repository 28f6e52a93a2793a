"""The programs to infer: laws against closed forms, room for many data sets at once, and that a guide can be trained."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats

from pyro_sinkhorn import SinkhornProgram
from pyro_sinkhorn.diagnostics import c2st
from pyro_sinkhorn.errors import NoDensityError, ProgramError
from pyro_sinkhorn.losses.pairs import Simulator
from pyro_sinkhorn.models import (
    eight_schools,
    eight_schools_data,
    epidemic,
    regression_with_globals,
    simulate_epidemic,
    two_moons,
    two_moons_posterior,
)

#: Model, its arguments, event shapes of its globals and of its local latents.
PROGRAMS = {
    "eight_schools": (eight_schools(), eight_schools_data, {"mu": (), "tau": ()}, {"theta": ()}),
    "two_moons": (two_moons(), lambda: (torch.zeros(6, 2),), {}, {"theta": (2,)}),
    "epidemic": (
        epidemic(num_weeks=4),
        lambda: (torch.ones(6, 4),),
        {},
        {"r0": (), "days": (), "reported": ()},
    ),
    "normal": (
        regression_with_globals(),
        lambda: (torch.randn(6), torch.randn(6, 3)),
        {"weights": (3,), "noise": ()},
        {},
    ),
    "student": (
        regression_with_globals("student"),
        lambda: (torch.randn(6), torch.randn(6, 3)),
        {"weights": (3,), "noise": ()},
        {},
    ),
    "logistic": (
        regression_with_globals("logistic"),
        lambda: ((torch.rand(6) < 0.5) * 1.0, torch.randn(6, 3)),
        {"weights": (3,)},
        {},
    ),
}
ALL = pytest.mark.parametrize(
    ("model", "data", "global_shapes", "local_shapes"), PROGRAMS.values(), ids=PROGRAMS
)


def cast(data, dtype):
    return tuple(value.to(dtype) for value in data())


# As programs.


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_posterior_is_trained_saved_and_drawn(model, data, global_shapes, local_shapes, dtype, tmp_path):
    torch.set_default_dtype(dtype)
    args = cast(data, dtype)
    program = SinkhornProgram(model).calibrate(*args, num_steps=2, seed=0, progress=False)
    draws = program.posterior(*args, num_samples=3, check_range=False, seed=1)
    trace = poutine.trace(model).get_trace(*args)
    n = len(args[0])
    assert set(draws) == {*global_shapes, *local_shapes}
    for name, value in draws.items():
        assert value.dtype == dtype and bool(trace.nodes[name]["fn"].support.check(value).all())
    for name, event in local_shapes.items():
        assert draws[name].shape == (3, n, *event)
    for name, event in global_shapes.items():
        assert draws[name].shape in ((3, *event), (3, 1, *event))
    program.save(tmp_path / "program.pt")
    again = SinkhornProgram.load(tmp_path / "program.pt", model)
    for name, value in again.posterior(*args, num_samples=3, check_range=False, seed=1).items():
        assert value.equal(draws[name])


@ALL
def test_many_data_sets_are_simulated_side_by_side(model, data, global_shapes, local_shapes):
    simulator = Simulator()
    pairs = simulator(model, data(), {}, 50)
    # How many random numbers a binomial takes depends on its parameters, so that data sets cannot be seen to stand alone:
    # the epidemic is simulated one by one.
    assert simulator.vectorize is (model is not PROGRAMS["epidemic"][0])
    for name, value in pairs.values.items():
        rows = value.flatten(1)
        if name != "y" or model is not PROGRAMS["logistic"][0]:  # whose data are few patterns
            assert len(rows.unique(dim=0)) == 50, name


@ALL
def test_nothing_in_them_is_a_parameter(model, data, global_shapes, local_shapes):
    model(*data())
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("name", ["two_moons", "epidemic"])
def test_simulators_have_no_density_and_no_latent_noise(name):
    model, data, _, local_shapes = PROGRAMS[name]
    trace = poutine.trace(model).get_trace(*data())
    assert set(trace.stochastic_nodes) - {"data", "outbreaks"} == set(local_shapes)
    with pytest.raises(NoDensityError):
        trace.nodes["x"]["fn"].log_prob(data()[0])


def test_a_program_that_was_only_calibrated_is_diagnosed_by_its_posterior(capsys):
    # Its encoder was never fitted, and its simulator has no likelihood that a match could be reported beside.
    x = torch.zeros(6, 2)
    program = SinkhornProgram(two_moons()).calibrate(x, num_steps=2, seed=0, progress=False)
    report = program.diagnose(x, num_simulations=60, seed=0)
    assert report.match is None and report.posterior is not None
    assert "calibration of" in capsys.readouterr().out


# Two moons.


def test_the_moon_is_half_a_ring_shifted_by_theta():
    pairs = Simulator()(two_moons(), (torch.zeros(5000, 2),), {}, 4)
    theta, x = pairs.values["theta"], pairs.values["x"]
    first, second = theta.unbind(-1)
    centre = torch.stack([-(first + second).abs(), second - first], -1) / math.sqrt(2)
    ring = (x - centre - torch.tensor([0.25, 0.0])).flatten(0, 1)
    angle = torch.atan2(ring[:, 1], ring[:, 0])
    assert stats.kstest(angle.numpy(), stats.uniform(-np.pi / 2, np.pi).cdf).pvalue > 1e-6
    assert stats.kstest(ring.norm(dim=-1).numpy(), stats.norm(0.1, 0.01).cdf).pvalue > 1e-6
    assert abs(np.corrcoef(angle.numpy(), first.flatten().numpy())[0, 1]) < 5 / 20_000**0.5


def test_exact_draws_reproduce_the_joint_law():
    # Truth and one posterior draw are exchangeable, so each scalar has a rank among 19 draws that is uniform.
    pairs = Simulator()(two_moons(), (torch.zeros(600, 2),), {}, 1)
    theta, x = pairs.values["theta"][0], pairs.values["x"][0]
    draws = torch.stack([two_moons_posterior(row, 19) for row in x])
    for statistic in (lambda t: t[..., 0], lambda t: t.sum(-1), lambda t: t[..., 1] - t[..., 0]):
        ranks = (statistic(draws) < statistic(theta).unsqueeze(-1)).sum(-1)
        counts = torch.bincount(ranks, minlength=20)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-6


def test_what_the_two_moons_cannot_make_is_refused():
    with pytest.raises(ValueError, match=r"hardly ever produce x = \[3.0, 0.0\]"):
        two_moons_posterior(torch.tensor([3.0, 0.0]), 10)
    with pytest.raises(ValueError, match=r"x has shape \(1, 2\): expected \(2,\), one point"):
        two_moons_posterior(torch.zeros(1, 2), 10)


def test_exact_draws_are_those_of_the_benchmark(shared_data):
    saved = np.load(shared_data / "sbibm" / "two_moons.npz")
    for j in range(1, 4):
        x = torch.from_numpy(saved[f"observation_{j}"]).double().reshape(2)
        reference = torch.from_numpy(saved[f"reference_samples_{j}"]).double()
        told = c2st(reference, two_moons_posterior(x, len(reference)))
        # Accuracy of 4000 rows has a standard error of .008 under the null, folds included a little more.
        assert abs(told.value - 0.5) < 0.05


# The epidemic.


def test_infections_and_recoveries_of_a_day_are_binomial():
    n = 20_000
    full = torch.full((n,), 4.0)
    # All are reported, so the first day's reports are its infections.
    reports = simulate_epidemic(torch.full((n,), 2.0), full, torch.ones(n), 1000, 100, 1)[:, 0]
    law = stats.binom(900, -math.expm1(-2.0 / 4.0 * 100 / 1000))
    assert abs(float(reports.mean()) - law.mean()) < 5 * law.std() / n**0.5
    assert abs(float(reports.var()) / law.var() - 1) < 5 * math.sqrt(2 / n)


def test_the_second_day_starts_from_what_the_first_has_left():
    n, rng = 40_000, np.random.default_rng(0)
    ones = torch.ones(n)
    days = simulate_epidemic(2.0 * ones, 0.5 * ones, ones, 1000, 100, 2)
    infected = rng.binomial(900, -math.expm1(-2.0 / 0.5 * 100 / 1000), n)
    infectious = 100 + infected - rng.binomial(100, -math.expm1(-1 / 0.5), n)
    second = rng.binomial(900 - infected, -np.expm1(-2.0 / 0.5 * infectious / 1000))
    error = (float(days[:, 1].var()) / n + second.var() / n) ** 0.5
    assert abs(float(days[:, 1].mean()) - second.mean()) < 5 * error


def test_a_share_of_cases_is_reported():
    n = 20_000
    r0, days = torch.full((n,), 2.0), torch.full((n,), 4.0)
    infections = stats.binom(900, -math.expm1(-2.0 / 4.0 * 100 / 1000))
    reports = simulate_epidemic(r0, days, torch.full((n,), 0.3), 1000, 100, 1)[:, 0]
    # A thinned binomial is a binomial.
    thinned = stats.binom(900, 0.3 * infections.mean() / 900)
    assert abs(float(reports.mean()) - thinned.mean()) < 5 * thinned.std() / n**0.5
    assert abs(float(reports.var()) / thinned.var() - 1) < 5 * math.sqrt(2 / n)


def test_in_a_large_population_the_final_size_is_that_of_the_equation():
    # Kermack and McKendrick: 1 - s = 1 - exp(-R0 (1 - s)) for a small start; days of ten hold the step's error down.
    n, population = 200, 1_000_000
    r0, days = torch.full((n,), 2.0), torch.full((n,), 10.0)
    total = simulate_epidemic(r0, days, torch.ones(n), population, 1000, 500).sum(-1) / population
    # With recoveries at the end of a day, the days at risk are 1 / (1 - exp(-1 / D)), not D.
    effective = 2.0 / 10.0 / -math.expm1(-1 / 10.0)
    share = 0.999
    for _ in range(200):
        share = 1 - 0.999 * math.exp(-effective * share)
    assert float(total.mean()) == pytest.approx(share - 0.001, abs=0.002)


def test_people_are_counted_once():
    r0, days, reported = torch.tensor([0.5, 3.0, 20.0]), torch.tensor([1.0, 6.0, 40.0]), torch.ones(3)
    cases = simulate_epidemic(r0, days, reported, 500, 10, 300)
    assert (cases >= 0).all() and (cases == cases.round()).all() and (cases.sum(-1) <= 490).all()


def test_weeks_are_sums_of_days_on_the_scale_of_logarithms():
    torch.manual_seed(0)
    model = poutine.uncondition(epidemic(population=500, infected=10, num_weeks=3, days_a_week=5))
    trace = poutine.trace(model).get_trace(torch.zeros(4, 3))
    weeks = trace.nodes["x"]["value"].expm1()
    assert weeks.shape == (4, 3) and weeks.allclose(weeks.round()) and (weeks.sum(-1) <= 490).all()


# Schools and regression.


def test_schools_given_their_mean_and_spread_are_normal():
    y, sigma = eight_schools_data()
    fixed = {"mu": torch.tensor(2.0), "tau": torch.tensor(3.0)}
    model = poutine.condition(poutine.uncondition(eight_schools()), fixed)
    n = 5000
    with pyro.plate("sets", n, dim=-2):
        drawn = poutine.trace(model).get_trace(y, sigma).nodes["y"]["value"]
    variance = 9 + sigma**2
    assert ((drawn.mean(0) - 2).abs() < 5 * (variance / n).sqrt()).all()
    assert ((drawn.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / n)).all()


def test_the_priors_of_the_schools_are_posteriordbs():
    trace = poutine.trace(eight_schools()).get_trace(*eight_schools_data())
    mu, tau = trace.nodes["mu"]["fn"], trace.nodes["tau"]["fn"]
    assert (mu.mean, mu.stddev) == (0.0, 5.0)
    assert float(tau.icdf(torch.tensor(0.5))) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("likelihood", "law"),
    [
        ("normal", lambda line, noise: stats.norm(line, noise).logpdf),
        ("student", lambda line, noise: stats.t(4, line, noise).logpdf),
        ("logistic", lambda line, noise: stats.bernoulli(1 / (1 + np.exp(-line))).logpmf),
    ],
)
def test_responses_have_the_law_asked_for(likelihood, law):
    features, y = torch.randn(7, 3), (torch.rand(7) < 0.5) * 1.0
    weights, noise = torch.tensor([0.5, -1.0, 2.0]), torch.tensor(0.7)
    model = poutine.condition(regression_with_globals(likelihood), {"weights": weights, "noise": noise})
    trace = poutine.trace(model).get_trace(y, features)
    trace.compute_log_prob()
    exact = law((features @ weights).numpy(), 0.7)(y.numpy())
    assert trace.nodes["y"]["log_prob"].numpy() == pytest.approx(exact)
    assert ("noise" in trace.nodes) == (likelihood != "logistic")


def test_another_likelihood_is_refused():
    with pytest.raises(ProgramError, match="likelihood is 'poisson': expected 'normal', 'student' or"):
        regression_with_globals("poisson")
