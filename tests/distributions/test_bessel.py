"""The normaliser and mean of the von Mises-Fisher law against mpmath and scipy, over orders 0 to 255 and
beyond."""

import mpmath as mp
import pytest
import torch
from scipy.special import gammaln, ive

from pyro_sinkhorn.distributions._bessel import log_tilt, mean_projection, over_concentration

DIMS = [2, 3, 4, 8, 17, 41, 42, 43, 128, 512, 2000]
# The values around 20 lie on both sides of the border between the two expansions, for small orders.
CONCENTRATIONS = [1e-12, 1e-6, 1e-3, 0.1, 1, 3, 10, 19.999, 20.001, 32, 45.3, 100, 1e3, 1e5, 1e7]


def relative(got: torch.Tensor, want: mp.mpf) -> float:
    return abs(float((mp.mpf(got.item()) - want) / want))


@pytest.mark.parametrize("dim", DIMS)
def test_accuracy_against_mpmath(dim):
    kappa = torch.tensor(CONCENTRATIONS, dtype=torch.float64, requires_grad=True)
    tilt = log_tilt(dim, kappa)
    mean, shortfall = mean_projection(dim, kappa)
    quotient = over_concentration(dim, kappa, mean)
    (slope,) = torch.autograd.grad(tilt.sum(), kappa, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), kappa)
    with mp.workdps(50):
        v = mp.mpf(dim) / 2 - 1
        for i, k in enumerate(CONCENTRATIONS):
            k = mp.mpf(k)
            bessel = mp.besseli(v, k)
            a = mp.besseli(v + 1, k) / bessel
            assert relative(tilt[i], mp.log(mp.gamma(v + 1) * (2 / k) ** v * bessel) - k) < 1e-13
            assert relative(mean[i], a) < 1e-13
            assert relative(shortfall[i], 1 - a) < 1e-13
            assert relative(quotient[i], a / k) < 1e-13
            assert relative(slope[i], a - 1) < 1e-13
            # The curvature is 1e-14 where the terms it is made of are 1: it keeps fewer digits.
            assert relative(curvature[i], 1 - a * a - (dim - 1) * a / k) < (1e-10 if k <= 1e5 else 1e-7)


@pytest.mark.parametrize("dim", [2, 3, 8, 64])
def test_accuracy_against_scipy(dim):
    kappa = torch.logspace(-1, 5, 61, dtype=torch.float64)
    v = dim / 2 - 1
    scaled = torch.as_tensor(ive(v, kappa.numpy()))
    inside = scaled > 1e-290  # ive underflows for small arguments of a high order
    want = gammaln(dim / 2) + v * (2 / kappa).log() + scaled.log()
    torch.testing.assert_close(log_tilt(dim, kappa)[inside], want[inside], rtol=1e-10, atol=1e-12)
    want = torch.as_tensor(ive(v + 1, kappa.numpy())) / scaled
    torch.testing.assert_close(mean_projection(dim, kappa)[0][inside], want[inside], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dim", [2, 3, 8, 512])
def test_zero_concentration_is_the_limit(dim):
    kappa = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    tilt = log_tilt(dim, kappa)
    mean, shortfall = mean_projection(dim, kappa)
    assert tilt.item() == 0 and mean.item() == 0 and shortfall.item() == 1
    (slope,) = torch.autograd.grad(tilt, kappa, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, kappa)
    assert slope.item() == -1
    assert curvature.item() == pytest.approx(1 / dim, rel=1e-12)
    quotient = over_concentration(dim, kappa, mean)
    assert quotient.item() == pytest.approx(1 / dim, rel=1e-14)
    assert torch.autograd.grad(quotient, kappa)[0].item() == 0


@pytest.mark.parametrize("dim", [2, 3, 8, 512])
def test_derivatives_agree_with_finite_differences(dim):
    kappa = torch.tensor([0.3, 2.0, 30.0, 70.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k: log_tilt(dim, k), kappa)
    assert torch.autograd.gradcheck(lambda k: mean_projection(dim, k), kappa)
    assert torch.autograd.gradgradcheck(lambda k: log_tilt(dim, k), kappa)


def test_functional_transforms():
    kappa = torch.tensor([0.5, 5.0, 50.0], dtype=torch.float64)
    mapped = torch.func.vmap(torch.func.grad(lambda k: log_tilt(8, k)))(kappa)
    torch.testing.assert_close(mapped, -mean_projection(8, kappa)[1], rtol=1e-15, atol=0)


def test_extremes_stay_finite():
    kappa = torch.tensor([0.0, 5e-324, 1e-300, 1e30, 1e150], dtype=torch.float64, requires_grad=True)
    for dim in (2, 3, 512, 100_000):
        tilt = log_tilt(dim, kappa)
        (slope,) = torch.autograd.grad(tilt.sum(), kappa)
        assert tilt.isfinite().all() and slope.isfinite().all()
        assert all(part.isfinite().all() for part in mean_projection(dim, kappa))


def test_float32_goes_through_float64():
    kappa = torch.tensor([1e5], dtype=torch.float32, requires_grad=True)
    tilt = log_tilt(8, kappa)
    assert tilt.dtype == torch.float64
    tilt.sum().backward()
    assert kappa.grad.dtype == torch.float32
    assert kappa.grad.item() == pytest.approx(-3.5e-5, rel=1e-4)
