"""The energy score: unbiased, proper, exact over states, with finite gradients."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_sinkhorn.losses.energy import energy_score, expected_energy_score

#: Standard errors. Under the truth more come up with probability 6e-7.
TOO_FAR = 5.0


def z_score(values, expected):
    return float((values.mean() - expected) / (values.std() / math.sqrt(len(values))))


@pytest.mark.parametrize("num_draws", [2, 3, 8])
def test_is_unbiased(num_draws):
    # E|N(0, s²)| = s sqrt(2/π): to the truth s² = 4 + 1 (mean 0), between draws s² = 8.
    draws, truth = 2 * torch.randn(num_draws, 40_000, 1), torch.randn(40_000, 1)
    exact = math.sqrt(2 / math.pi) * (math.sqrt(5) - 0.5 * math.sqrt(8))
    assert abs(z_score(energy_score(draws, truth), exact)) < TOO_FAR


@pytest.mark.parametrize("num_draws", [2, 3, 4, 5, 8])
def test_is_the_formula(num_draws):
    draws, truth = torch.randn(num_draws, 6, 3), torch.randn(6, 3)
    to_truth = sum((draw - truth).norm(dim=-1) for draw in draws) / num_draws
    pairs = [(a - b).norm(dim=-1) for i, a in enumerate(draws) for j, b in enumerate(draws) if i != j]
    expected = to_truth - 0.5 * sum(pairs) / len(pairs)
    torch.testing.assert_close(energy_score(draws, truth), expected)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.8])
@pytest.mark.parametrize(
    "wrong", [(0.3, 1.0), (0.0, 0.6), (0.0, 1.5)], ids=["shifted", "too narrow", "too wide"]
)
def test_is_least_at_the_true_law(beta, wrong):
    n = 100_000
    truth, noise = torch.randn(n, 1), torch.randn(4, n, 1)
    loc, scale = wrong
    right = energy_score(noise, truth, beta)
    other = energy_score(loc + scale * noise, truth, beta)
    # Common random numbers: the difference has a standard error of its own.
    assert z_score(other - right, 0.0) > TOO_FAR


def test_sees_dependence():
    n = 50_000
    first = torch.randn(5, n, 1)
    rest = torch.randn(5, n, 1)
    dependent = torch.cat([first, 0.9 * first + math.sqrt(1 - 0.81) * rest], -1)
    apart = torch.cat([first, rest], -1)
    truth, draws = dependent[0], dependent[1:]
    assert z_score(energy_score(apart[1:], truth) - energy_score(draws, truth), 0.0) > TOO_FAR


@pytest.mark.parametrize("beta", [0.0, 2.0, -1.0, 2.5, math.nan])
def test_refuses_an_exponent_that_is_not_proper(beta):
    with pytest.raises(ValueError, match="between 0 and 2"):
        energy_score(torch.randn(4, 3, 1), torch.randn(3, 1), beta)


def test_refuses_a_single_draw():
    with pytest.raises(ValueError, match="at least 2"):
        energy_score(torch.randn(1, 3, 1), torch.randn(3, 1))


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_of_a_law_on_states_is_the_mean_over_draws(beta):
    states = torch.randn(4, 3)
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(20_000, 4)
    truth = states[dist.Categorical(torch.tensor([0.4, 0.3, 0.2, 0.1])).sample((20_000,))]
    drawn = states[dist.Categorical(probabilities).sample((4,))]
    exact = expected_energy_score(states, probabilities, truth, beta)
    assert exact.shape == (20_000,)
    assert abs(z_score(energy_score(drawn, truth, beta) - exact, 0.0)) < TOO_FAR


def test_of_a_law_on_states_is_least_at_the_true_probabilities():
    states, p = torch.eye(3), torch.tensor([0.5, 0.3, 0.2])

    def expected(q):
        return float((p * expected_energy_score(states, q.expand(3, 3), states)).sum())

    others = [torch.tensor(q) for q in ([0.6, 0.2, 0.2], [0.45, 0.35, 0.2], [1.0, 0.0, 0.0], [1 / 3] * 3)]
    assert all(expected(q) > expected(p) for q in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.1, 1.0, 1.9])
def test_gradients_are_finite_at_coinciding_points(dtype, beta):
    draws = torch.zeros(4, 2, 3, dtype=dtype, requires_grad=True)
    energy_score(draws, torch.zeros(2, 3, dtype=dtype), beta).sum().backward()
    assert bool(draws.grad.isfinite().all())
    probabilities = torch.tensor([0.0, 1.0], dtype=dtype, requires_grad=True)
    states = torch.eye(2, dtype=dtype)
    expected_energy_score(states, probabilities, states[1], beta).backward()
    assert bool(probabilities.grad.isfinite().all())
