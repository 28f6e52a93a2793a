"""What the other tests of this distribution leave open, in dimensions 2 to 512 at concentrations 0 to 1e5.

The law of angle and tangent is tested in ``test_von_mises_fisher_sampler.py``, the normaliser in
``test_von_mises_fisher.py`` and ``test_bessel.py``. Here: ``log_prob`` in every combination, where scipy's underflows too,
and draws against the density of the same object.
"""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.stats import kstest, vonmises_fisher

from pyro_sinkhorn.distributions import VonMisesFisher

CASES = [(d, k) for d in (2, 3, 8, 64, 512) for k in (0.0, 1e-3, 1.0, 100.0, 1e5)]
POSITIVE = [(d, k) for d, k in CASES if k > 0]


def unit(*shape, seed=0):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def vmf(dim, kappa):
    return VonMisesFisher(unit(dim), torch.tensor(kappa, dtype=torch.float64))


def log_normaliser(dim, kappa):
    r"""Logarithm of :math:`\kappa^\nu / ((2\pi)^{d/2} I_\nu(\kappa))`, :math:`\nu = d/2 - 1`, to 50 digits."""
    with mpmath.workdps(50):
        order, half = mpmath.mpf(dim) / 2 - 1, mpmath.mpf(dim) / 2
        if kappa == 0:
            return mpmath.loggamma(half) - mpmath.log(2) - half * mpmath.log(mpmath.pi)
        bessel = mpmath.log(mpmath.besseli(order, kappa))
        return order * mpmath.log(kappa) - half * mpmath.log(2 * mpmath.pi) - bessel


@pytest.mark.parametrize(("dim", "kappa"), CASES)
def test_log_prob_to_fifty_digits(dim, kappa):
    d = vmf(dim, kappa)
    near = torch.nn.functional.normalize(d.loc + 1e-3 * unit(20, dim, seed=1), dim=-1)
    x = torch.cat([unit(20, dim, seed=2), near, d.loc[None], -d.loc[None]])
    constant = log_normaliser(dim, kappa)
    want = [
        float(
            constant
            + kappa * mpmath.fsum(mpmath.mpf(a) * mpmath.mpf(b) for a, b in zip(row, loc, strict=True))
        )
        for loc in [d.loc.tolist()]
        for row in x.tolist()
    ]
    # Unit vectors are such to 1e-16 times the root of their length; the exponent multiplies that by the concentration.
    slack = 1e-12 + 1e-16 * kappa * math.sqrt(dim)
    torch.testing.assert_close(d.log_prob(x), torch.tensor(want), rtol=1e-12, atol=10 * slack)


@pytest.mark.parametrize(("dim", "kappa"), POSITIVE)  # scipy refuses 0
def test_log_prob_agrees_with_scipy_wherever_that_is_finite(dim, kappa):
    d = vmf(dim, kappa)
    x = torch.cat([unit(5, dim, seed=2), d.loc[None]])
    with np.errstate(divide="ignore"):
        want = torch.as_tensor(vonmises_fisher(d.loc.numpy(), kappa).logpdf(x.numpy()))
    if not want.isfinite().all():
        assert dim >= 64 and kappa <= 100
        pytest.skip("scipy's Bessel function underflows")
    torch.testing.assert_close(d.log_prob(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dim", "kappa"), CASES)
def test_the_mean_log_density_of_draws_is_minus_the_entropy(dim, kappa):
    """Ties sampler, density and entropy of one object: five standard errors, a level of 6e-7."""
    torch.manual_seed(0)
    d = vmf(dim, kappa)
    log_prob = d.log_prob(d.sample((20_000 if dim < 512 else 4000,)))
    error = log_prob.std() / math.sqrt(len(log_prob))
    # At concentration 0 the density is constant and so is the error.
    assert abs(log_prob.mean() + d.entropy()) <= 5 * error + 1e-9 * max(1.0, float(d.entropy().abs()))


@pytest.mark.parametrize(("dim", "kappa"), POSITIVE)
def test_the_density_ratio_of_two_concentrations_has_mean_one(dim, kappa):
    r"""Importance weights: :math:`\mathbb{E}_p[q/p] = 1` for a neighbour of twice bounded weights."""
    torch.manual_seed(1)
    p = vmf(dim, kappa)
    # Standard deviation of kappa cos(angle) is of order sqrt(d) or less: half of one over it keeps weights near 1
    sd = float(p.concentration * (p.variance * p.loc.square()).sum().sqrt()) + 1e-3
    q = vmf(dim, kappa * (1 - min(0.5, 0.5 / sd)))
    x = p.sample((20_000 if dim < 512 else 4000,))
    weight = (q.log_prob(x) - p.log_prob(x)).exp()
    assert abs(weight.mean() - 1) < 5 * weight.std() / math.sqrt(len(weight)) + 1e-9


@pytest.mark.parametrize("dim", [2, 3, 8, 64, 512])
def test_draws_do_not_depend_on_where_the_mean_points(dim):
    """A rotation of the mean rotates the law: angles from two means, one of them an axis, come from one law."""
    torch.manual_seed(2)
    axis = torch.eye(dim)[-1]
    n = 20_000 if dim < 512 else 4000
    angles = [VonMisesFisher(loc, 3.0 * dim).sample((n,)) @ loc for loc in (unit(dim), axis, -axis)]
    for other in angles[1:]:
        assert kstest(angles[0].numpy(), other.numpy()).pvalue > 1e-6
