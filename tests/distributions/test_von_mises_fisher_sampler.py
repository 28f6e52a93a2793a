"""Goodness of fit of the sampler, by exact tests.

The angle from ``loc`` is compared with its distribution function, integrated numerically; the direction in
the tangent space with the beta law of one coordinate of a uniform direction. Seeds are fixed and the level is
1e-6.
"""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import cumulative_simpson
from scipy.stats import beta, binomtest, kstest

from pyro_sinkhorn.distributions import VonMisesFisher, _wood
from pyro_sinkhorn.distributions._sphere import random_tangents

LEVEL = 1e-6
DIMS = [2, 3, 8, 64, 512]
CONCENTRATIONS = [0.0, 1e-3, 1.0, 100.0, 1e5]


def draws(dim):
    return 4000 if dim == 512 else 20_000


def unit(dim, dtype=torch.float64):
    x = torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))
    return (x / x.norm()).to(dtype)


def angle_from(loc, x):
    # The arccosine of <loc, x> would lose all digits near loc.
    loc, x = loc.double(), x.double()
    return 2 * torch.asin((((x - loc).norm(dim=-1)) / 2).clamp(max=1))


def angle_cdf(dim, kappa):
    """Distribution function of the angle, density proportional to sin^(d-2) exp(kappa cos), on a grid."""

    def log_density_at(angle):
        # A point just off the poles stands for them, where the logarithm is infinite or, on the circle, 0
        # times that.
        return (dim - 2) * np.log(np.sin(angle.clip(1e-12, np.pi - 1e-12))) - 2 * kappa * np.sin(
            angle / 2
        ) ** 2

    angle = np.linspace(0, np.pi, 4001)
    log_density = log_density_at(angle)
    heavy = np.flatnonzero(log_density > log_density.max() - 40)
    # A fine grid over the part that holds the mass.
    angle = np.linspace(angle[max(heavy[0] - 1, 0)], angle[min(heavy[-1] + 1, 4000)], 20_001)
    log_density = log_density_at(angle)
    cdf = cumulative_simpson(np.exp(log_density - log_density.max()), x=angle, initial=0)
    return lambda t: np.interp(t, angle, cdf / cdf[-1])


def p_value(x, loc, kappa):
    return kstest(angle_from(loc, x).numpy(), angle_cdf(x.shape[-1], kappa)).pvalue


def tangent_coordinates(x, loc):
    """Coordinates of the tangent directions along two orthonormal tangents at loc."""
    tangent = x - loc - ((x - loc) @ loc).unsqueeze(-1) * loc
    tangent = tangent / tangent.norm(dim=-1, keepdim=True)
    basis = torch.linalg.qr(torch.stack([loc, *torch.eye(len(loc), dtype=loc.dtype)[:2]], -1))[0]
    return tangent @ basis[:, 1:3]


@pytest.mark.parametrize("kappa", CONCENTRATIONS)
@pytest.mark.parametrize("dim", DIMS)
def test_angle_and_tangent(dim, kappa):
    torch.manual_seed(0)
    loc = unit(dim)
    x = VonMisesFisher(loc, torch.tensor(kappa, dtype=torch.float64)).sample((draws(dim),))
    assert (x.norm(dim=-1) - 1).abs().max() < 1e-14
    assert p_value(x, loc, kappa) > LEVEL

    coordinates = tangent_coordinates(x, loc)
    if dim == 2:
        positive = int((coordinates[:, 0] > 0).sum())
        assert binomtest(positive, len(x)).pvalue > LEVEL
    else:
        shape = (dim - 2) / 2
        for column in coordinates.T:
            assert kstest(((1 + column) / 2).numpy(), beta(shape, shape).cdf).pvalue > LEVEL
    # Angle and tangent are independent: five standard errors is a level of 6e-7.
    correlation = np.corrcoef(angle_from(loc, x).numpy(), coordinates[:, 0].numpy())[0, 1]
    assert abs(correlation) < 5 / len(x) ** 0.5


@pytest.mark.parametrize("dim", [2, 3, 8, 64, 512])
@pytest.mark.parametrize("kappa", [1.0, 1e5])
def test_float32(dim, kappa):
    torch.manual_seed(1)
    loc = unit(dim, torch.float32)
    d = VonMisesFisher(loc, torch.tensor(kappa, dtype=torch.float32), validate_args=True)
    x = d.sample((draws(dim),))
    assert x.dtype == torch.float32
    assert dist.constraints.sphere.check(x).all()
    assert d.log_prob(x).isfinite().all()
    assert p_value(x, loc / loc.norm(), kappa) > LEVEL


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_draws_are_unit_vectors(dtype):
    torch.manual_seed(2)
    x = VonMisesFisher(unit(8, dtype), 3.0, validate_args=False).sample((100,))
    assert x.dtype == dtype
    assert ((x.double().norm(dim=-1) - 1).abs() < 2 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("dim", DIMS)
def test_a_mixed_batch_mixes_nothing_up(dim):
    """Every entry of a batch is resampled on its own until accepted; none may receive another's draw."""
    torch.manual_seed(3)
    loc = torch.stack([unit(dim), -unit(dim)])
    kappa = torch.tensor(CONCENTRATIONS, dtype=torch.float64).unsqueeze(-1)
    x = VonMisesFisher(loc, kappa).sample((draws(dim) // 4,))
    for i, k in enumerate(CONCENTRATIONS):
        for j in range(2):
            assert p_value(x[:, i, j], loc[j], k) > LEVEL


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_mean_and_variance_of_draws(dim):
    torch.manual_seed(4)
    d = VonMisesFisher(unit(dim), torch.tensor([0.0, 2.0, 50.0], dtype=torch.float64))
    x = d.sample((20_000,))
    error = (x.mean(0) - d.mean) / (d.variance / len(x)).sqrt()
    assert error.abs().max() < 5.5
    torch.testing.assert_close(x.var(0), d.variance, rtol=0.1, atol=0)


@pytest.mark.parametrize("dim", DIMS)
def test_the_fit_test_notices_a_wrong_concentration(dim):
    """Power: a quarter too much concentration must not pass where the law depends on it."""
    torch.manual_seed(5)
    loc = unit(dim)
    x = VonMisesFisher(loc, torch.tensor(125.0, dtype=torch.float64)).sample((draws(dim),))
    assert p_value(x, loc, 100.0) < LEVEL


@pytest.mark.parametrize("dim", [2, 8, 64])
def test_the_fit_test_notices_a_missing_rejection(dim, monkeypatch):
    def accept_everything(dim, kappa, propose=_wood._propose):
        proposal, rejected = propose(dim, kappa)
        return proposal, torch.zeros_like(rejected)

    torch.manual_seed(6)
    monkeypatch.setattr(_wood, "_propose", accept_everything)
    loc = unit(dim)
    x = VonMisesFisher(loc, torch.tensor(100.0, dtype=torch.float64)).sample((20_000,))
    assert p_value(x, loc, 100.0) < LEVEL


@pytest.mark.parametrize("dim", [2, 3, 512])
def test_tangents_near_the_poles_of_the_reflection(dim):
    torch.manual_seed(7)
    e1 = torch.eye(dim, dtype=torch.float64)[0]
    for step in (0.0, 1e-300, 1e-16, 1e-8, 1e-3):
        for sign in (1, -1):
            loc = sign * e1.clone()
            loc[1] = step
            loc = (loc / loc.norm()).expand(200, dim)
            tangent = random_tangents(loc)
            assert (tangent.norm(dim=-1) - 1).abs().max() < 1e-14
            assert (tangent * loc).sum(-1).abs().max() < 1e-15


def test_extreme_concentrations():
    torch.manual_seed(8)
    for dim in (2, 3, 8):
        loc = unit(dim)
        for kappa in (1e-320, 1e12, 1e300, float("inf")):
            x = VonMisesFisher(loc, torch.tensor(kappa, dtype=torch.float64)).sample((100,))
            assert (x.norm(dim=-1) - 1).abs().max() < 1e-14
            if kappa > 1:
                assert (x - loc).norm(dim=-1).max() < 10 * (dim / kappa) ** 0.5 + 1e-15
        # Garbage in, garbage out, but no endless loop.
        assert VonMisesFisher(loc, float("nan"), validate_args=False).sample((3,)).isnan().all()


def test_acceptance_rate_is_bounded_below():
    torch.manual_seed(9)
    for dim in (2, 4, 64, 512):
        for kappa in CONCENTRATIONS:
            _, rejected = _wood._propose(dim, torch.full((4000,), kappa, dtype=torch.float64))
            assert rejected.double().mean() < 0.38


def test_seeds_and_gradients():
    loc, kappa = unit(5).requires_grad_(), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    d = VonMisesFisher(loc, kappa)
    torch.manual_seed(0)
    first = d.sample((10,))
    torch.manual_seed(0)
    assert torch.equal(first, d.sample((10,)))
    assert not first.requires_grad
