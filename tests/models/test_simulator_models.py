"""The simulators: laws against closed forms, gradients against differences, independence of data, wide ranges."""

import itertools

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats
from scipy.integrate import solve_ivp

from pyro_sinkhorn import SinkhornProgram
from pyro_sinkhorn.errors import NoDensityError
from pyro_sinkhorn.models import g_and_k, g_and_k_quantile, lotka_volterra, simulate_lotka_volterra

RATES = (1.0, 0.005, 0.6)
THETA = (3.0, 1.0, 2.0, 0.5)
MODELS = {
    "lotka_volterra": (lotka_volterra, 16, ("birth", "predation", "death")),
    "g_and_k": (g_and_k, 1, ("a", "b", "g", "k")),
}


def generated(model, n, columns):
    return SinkhornProgram(model).generate(1, torch.empty(n, columns), seed=0)["x"][0]


# As programs.


@pytest.mark.parametrize(("make", "columns", "names"), MODELS.values(), ids=MODELS)
def test_a_program_of_parameters_noise_and_an_output_without_density(make, columns, names):
    trace = poutine.trace(make()).get_trace(torch.zeros(5, columns))
    assert tuple(trace.param_nodes) == names
    assert trace.observation_nodes == ["x"] and trace.nodes["x"]["fn"].shape() == (5, columns)
    assert all([f.name for f in trace.nodes[n]["cond_indep_stack"]] == ["data"] for n in ("noise", "x"))
    with pytest.raises(NoDensityError):
        trace.nodes["x"]["fn"].log_prob(torch.zeros(5, columns))


@pytest.mark.parametrize(("make", "columns", "names"), MODELS.values(), ids=MODELS)
def test_arguments_are_where_parameters_start_and_dtype_follows_the_data(make, columns, names):
    start = (0.7, 0.9, 0.4, 0.3)[: len(names)]
    make(*start)(torch.zeros(5, columns, dtype=torch.float32))
    values = [pyro.param(name) for name in names]
    assert torch.tensor(start).float().allclose(torch.stack(values)) and values[0].dtype == torch.float32


@pytest.mark.parametrize(("make", "columns", "names"), MODELS.values(), ids=MODELS)
def test_data_are_independent_of_each_other(make, columns, names):
    first, second = (stats.rankdata(half, axis=0) for half in generated(make(), 4000, columns).chunk(2))
    correlation = np.corrcoef(first.T, second.T)[:columns, columns:]
    assert np.abs(correlation).max() < 6 / 2000**0.5  # at most 256 correlations: p = 5e-7


def test_the_noise_of_one_datum_reaches_no_other():
    noise = torch.randn(4, 20, 3)
    before = simulate_lotka_volterra(*torch.tensor(RATES), noise)
    noise[2] = torch.randn(20, 3)
    changed = (simulate_lotka_volterra(*torch.tensor(RATES), noise) != before).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False]


def test_columns_are_log_populations_at_the_times_observed():
    model = lotka_volterra(*RATES, start=(30.0, 60.0), num_times=3, interval=0.5, substeps=4)
    trace = poutine.trace(poutine.uncondition(model)).get_trace(torch.zeros(5, 6))
    noise = trace.nodes["noise"]["value"]
    assert noise.shape == (5, 12, 3)
    paths = simulate_lotka_volterra(*torch.tensor(RATES), noise, (30.0, 60.0), 0.125)
    prey, predators = paths[:, [3, 7, 11]].unbind(-1)
    assert trace.nodes["x"]["value"].allclose(torch.cat([1 + prey, 1 + predators], -1).log())


# The g-and-k law.


def formula(u, a, b, g, k):
    """Rayner and MacGillivray's, written out."""
    z = stats.norm.ppf(u)
    return a + b * (1 + 0.8 * (1 - np.exp(-g * z)) / (1 + np.exp(-g * z))) * (1 + z**2) ** k * z


@pytest.mark.parametrize("theta", [THETA, (0.0, 2.0, -1.0, 0.1), (-1.0, 0.5, 0.0, -0.2)])
def test_draws_follow_the_quantile_function(theta):
    u = stats.norm.cdf(np.linspace(-8, 8, 100_001))
    x = generated(g_and_k(*theta), 20_000, 1)[:, 0].numpy()
    quantiles = formula(u, *theta)
    assert np.isclose(np.interp(0.3, u, quantiles), formula(0.3, *theta), rtol=1e-6)
    assert stats.kstest(x, lambda x: np.interp(x, quantiles, u)).pvalue > 1e-6


def test_without_skewness_and_tails_it_is_normal():
    z = torch.randn(100)
    assert g_and_k_quantile(*torch.tensor([3.0, 2.0, 0.0, 0.0]), z).allclose(3 + 2 * z)


# Predators and prey.


def ode(times):
    a, b, d = RATES

    def field(_, s):
        return [a * s[0] - b * s[0] * s[1], b * s[0] * s[1] - d * s[1]]

    return torch.tensor(solve_ivp(field, (0, times[-1]), [50, 100], t_eval=times, rtol=1e-9, atol=1e-9).y.T)


def test_without_noise_it_solves_the_differential_equation_to_first_order():
    exact = ode(np.arange(1.0, 9.0))
    errors = []
    for substeps in (200, 400):
        path = simulate_lotka_volterra(*torch.tensor(RATES), torch.zeros(8 * substeps, 3), step=1 / substeps)
        errors.append((path[substeps - 1 :: substeps] / exact - 1).abs().max().item())
    assert errors[1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_in_a_large_volume_the_noise_dies_out_as_its_square_root():
    n, spreads = 2000, []
    for volume in (1e4, 1e6):
        rates = torch.tensor([RATES[0], RATES[1] / volume, RATES[2]])
        start = (50 * volume, 100 * volume)
        paths = simulate_lotka_volterra(*rates, torch.randn(n, 50, 3), start)[:, -1] / volume
        limit = simulate_lotka_volterra(*rates, torch.zeros(50, 3), start)[-1] / volume
        sd = paths.std(0)
        # 6 standard errors, and a mean that is off by the order of a variance: the flow is curved.
        assert ((paths.mean(0) - limit).abs() < 6 * sd / n**0.5 + sd.square()).all()
        spreads.append(sd)
    # Each spread has a relative standard error of 1 / sqrt(2n); 6 of those of a ratio.
    assert (spreads[0] / spreads[1] / 10 - 1).abs().max() < 6 / n**0.5


def test_a_short_step_has_the_mean_and_covariance_of_three_reactions():
    n, h, state = 400_000, 1e-4, torch.tensor([1000.0, 800.0])
    rates = torch.tensor(RATES)
    noise = torch.randn(n, 1, 3)
    change = simulate_lotka_volterra(*rates, noise, tuple(state.tolist()), h)[:, 0] - state
    reactions = torch.stack([rates[0] * state[0], rates[1] * state.prod(), rates[2] * state[1]])
    stoichiometry = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]])
    mean, covariance = stoichiometry @ reactions * h, stoichiometry * reactions * h @ stoichiometry.T
    variance = covariance.diagonal()
    # The implicit losses are off by 4e-4 of the drift, a tenth of a standard error here.
    assert ((change.mean(0) - mean).abs() < 6 * (variance / n).sqrt()).all()
    found = change.T.cov()
    error = ((torch.outer(variance, variance) + covariance.square()) / n).sqrt()  # of normal draws
    assert ((found - covariance).abs() < 6 * error + 1e-3 * covariance.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("start", [(50.0, 100.0), (1.0, 1.0), (1.0, 1e4)], ids=str)
def test_positive_and_finite_with_finite_gradients_over_wide_ranges(dtype, start):
    for rates in itertools.product((0.01, 1.0, 5.0), (1e-4, 0.005, 0.5), (0.01, 0.6, 10.0)):
        theta = torch.tensor(rates, dtype=dtype, requires_grad=True)
        paths = simulate_lotka_volterra(*theta, torch.randn(16, 80, 3, dtype=dtype), start)
        assert paths.isfinite().all() and (paths > 0).all(), rates
        (gradient,) = torch.autograd.grad(paths.log1p().mean(), theta)
        assert gradient.isfinite().all() and gradient.any(), rates


def test_a_path_that_noise_would_push_below_zero_keeps_its_gradient():
    # Without the bend, one prey would become 1 + .1 - 6 * sqrt(.1) = -.8 of them; a clamp would cut the path off here.
    rates = torch.tensor(RATES, requires_grad=True)
    prey, _ = simulate_lotka_volterra(*rates, torch.tensor([[-6.0, 0.0, 0.0]]), (1.0, 1.0))[0]
    (gradient,) = torch.autograd.grad(prey, rates)
    assert 0 < prey < 0.05
    assert gradient[0] < 0  # of .1 * birth - 6 * sqrt(.1 * birth)


# Gradients.


def test_gradients_are_those_of_the_path_at_a_fixed_noise():
    noise = torch.randn(3, 15, 3)
    rates = torch.tensor(RATES, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: simulate_lotka_volterra(*r, noise).log1p(), rates, atol=1e-3)
    theta = torch.tensor(THETA, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: g_and_k_quantile(*t, noise), theta)


@pytest.mark.parametrize(("make", "columns", "names"), MODELS.values(), ids=MODELS)
def test_every_parameter_gets_a_finite_gradient_through_the_program(make, columns, names):
    trace = poutine.trace(poutine.uncondition(make())).get_trace(torch.zeros(50, columns))
    value = trace.nodes["x"]["value"]
    value.square().mean().backward()
    for name in names:
        gradient = pyro.param(name).unconstrained().grad
        assert gradient.isfinite() and gradient != 0, name
