"""Density, moments, divergences, shapes and errors of the von Mises-Fisher distribution."""

import copy
import pickle

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import vonmises_fisher
from torch.distributions import kl_divergence

from pyro_sinkhorn.distributions import HypersphericalUniform, VonMisesFisher
from pyro_sinkhorn.distributions._sphere import log_surface


def unit(*shape, dtype=torch.float64, seed=0):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (x / x.norm(dim=-1, keepdim=True)).to(dtype)


def vmf(dim, kappa, dtype=torch.float64):
    return VonMisesFisher(unit(dim, dtype=dtype), torch.tensor(kappa, dtype=dtype))


def integrate(d, function):
    """Integral of function(log_prob, cosine) times the density over the sphere, by quadrature in the polar
    angle."""
    across = unit(d.dim, seed=1)
    across = across - (across @ d.loc) * d.loc
    across = across / across.norm()

    def integrand(angle):
        x = np.cos(angle) * d.loc + np.sin(angle) * across
        log_prob = d.log_prob(x / x.norm()).item()
        ring = np.exp(log_surface(d.dim - 1) + (d.dim - 2) * np.log(np.sin(angle)) + log_prob)
        return ring * function(log_prob, np.cos(angle))

    # The mass lies within a few standard deviations of the peak of sin^(d-2) exp(kappa cos).
    kappa = d.concentration.item()
    r = kappa / max(d.dim - 2, 1e-9)
    peak = np.arccos(np.sqrt(1 + (1 / (2 * r)) ** 2) - 1 / (2 * r)) if r > 0 else np.pi / 2
    width = 1 / np.sqrt(max(kappa, d.dim / 2, 1))
    low, high = max(1e-300, peak - 12 * width), min(np.pi, peak + 12 * width)
    return quad(integrand, low, high, epsabs=1e-12, epsrel=1e-10, limit=200)[0]


CASES = [(d, k) for d in (2, 3, 8, 64, 512) for k in (0.0, 1e-3, 1.0, 100.0, 1e5)]


@pytest.mark.parametrize(("dim", "kappa"), CASES)
def test_density_integrates_to_one(dim, kappa):
    # The off-centre rounding of x costs kappa * 1e-16.
    assert integrate(vmf(dim, kappa), lambda log_prob, w: 1.0) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize(("dim", "kappa"), CASES[::2])
def test_mean_variance_and_entropy_by_quadrature(dim, kappa):
    d = vmf(dim, kappa)
    mean = integrate(d, lambda log_prob, w: w)
    assert (d.mean @ d.loc).item() == pytest.approx(mean, abs=1e-8)
    assert d.entropy().item() == pytest.approx(
        -integrate(d, lambda log_prob, w: log_prob), rel=1e-8, abs=1e-8
    )
    # The variance along loc = e1 is its first coordinate; the total is 1 - |mean|^2.
    e1 = torch.eye(dim, dtype=torch.float64)[0]
    variance = VonMisesFisher(e1, d.concentration).variance
    along = integrate(d, lambda log_prob, w: (w - mean) ** 2)
    assert variance[0].item() == pytest.approx(along, rel=1e-5, abs=1e-14)
    assert d.variance.sum().item() == pytest.approx(1 - mean**2, rel=1e-5)
    assert (d.variance > 0).all()


# Not in high dimension at low concentration, where scipy's normaliser underflows.
@pytest.mark.parametrize(
    ("dim", "kappa"), [(d, k) for d in (2, 3, 8) for k in (1e-3, 1.0, 100.0)] + [(64, 500.0)]
)
def test_log_prob_agrees_with_scipy(dim, kappa):
    d = vmf(dim, kappa)
    x = torch.cat([unit(20, dim, seed=2), d.loc[None], -d.loc[None]])
    want = vonmises_fisher(d.loc.numpy(), kappa).logpdf(x.numpy())
    torch.testing.assert_close(d.log_prob(x), torch.as_tensor(want), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kappa", [0.0, 0.5, 40.0])
def test_circle_agrees_with_von_mises(kappa):
    # torch's von Mises normaliser is good to about 1e-7.
    angle = torch.linspace(-3, 3, 11, dtype=torch.float64)
    point = torch.stack([angle.cos(), angle.sin()], -1)
    want = dist.VonMises(
        torch.zeros((), dtype=torch.float64), torch.tensor(max(kappa, 1e-9), dtype=torch.float64)
    )
    got = VonMisesFisher(torch.tensor([1.0, 0.0], dtype=torch.float64), kappa).log_prob(point)
    torch.testing.assert_close(got, want.log_prob(angle), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [2, 3, 8, 512])
def test_zero_concentration_is_uniform_with_finite_gradients(dim):
    loc = unit(dim).requires_grad_()
    kappa = torch.zeros((), dtype=torch.float64, requires_grad=True)
    d = VonMisesFisher(loc, kappa)
    x = unit(6, dim, seed=3)
    log_prob = d.log_prob(x)
    torch.testing.assert_close(
        log_prob, HypersphericalUniform(dim, dtype=torch.float64).log_prob(x), rtol=1e-14, atol=0
    )
    loc_grad, kappa_grad = torch.autograd.grad(log_prob.sum(), [loc, kappa])
    assert (loc_grad == 0).all()
    assert kappa_grad.item() == pytest.approx((x @ loc).sum().item(), abs=1e-12)  # the score at 0
    assert d.entropy().item() == pytest.approx(log_surface(dim), rel=1e-14)
    moments = d.mean.sum() + d.variance.sum() + d.entropy() + kl_divergence(d, HypersphericalUniform(dim))
    assert all(g.isfinite().all() for g in torch.autograd.grad(moments, [loc, kappa]))


@pytest.mark.parametrize("dim", [2, 3, 8, 64])
@pytest.mark.parametrize("kappa", [0.01, 1.0, 100.0])
def test_gradients(dim, kappa):
    def log_prob(loc, concentration, value):
        # Normalised, so that finite differences stay on the sphere.
        loc, value = loc / loc.norm(dim=-1, keepdim=True), value / value.norm(dim=-1, keepdim=True)
        return VonMisesFisher(loc, concentration).log_prob(value)

    def moments(loc, concentration):
        d = VonMisesFisher(loc / loc.norm(), concentration)
        return d.mean, d.variance, d.entropy(), kl_divergence(d, HypersphericalUniform(dim))

    loc = unit(dim).requires_grad_()
    value = unit(2, dim, seed=5).requires_grad_()
    concentration = torch.tensor(kappa, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_prob, (loc, concentration, value))
    assert torch.autograd.gradcheck(moments, (loc, concentration), atol=1e-6)


def test_gradient_in_value_is_that_of_the_textbook_form_along_the_sphere():
    loc, x = unit(5), unit(5, seed=6).requires_grad_()
    (gradient,) = torch.autograd.grad(VonMisesFisher(loc, 7.0).log_prob(x), x)
    tangent = torch.eye(5, dtype=torch.float64) - torch.outer(x.detach(), x.detach())
    torch.testing.assert_close(tangent @ gradient, tangent @ (7 * loc))


def test_float32_log_prob_keeps_its_digits_at_high_concentration():
    for dim in (2, 3, 64, 512):
        d = vmf(dim, 1e5, dtype=torch.float32)
        x = VonMisesFisher(d.loc, d.concentration).sample((100,))
        exact = VonMisesFisher(d.loc.double(), d.concentration.double(), validate_args=False)
        assert d.log_prob(x).dtype == torch.float32
        difference = d.log_prob(x).double() - exact.log_prob(x.double())
        # <loc, x> * 1e5 in float32 would be off by 0.01 and, with loc a unit vector up to rounding, by more.
        assert (difference.abs() < 2e-6 * exact.log_prob(x.double()).abs() + 1e-4).all()
        assert d.mean.dtype == d.variance.dtype == d.entropy().dtype == torch.float32


@pytest.mark.parametrize(("dim", "kappa"), [(2, 0.5), (3, 5.0), (8, 100.0), (64, 3.0)])
def test_kl_divergences_by_quadrature_and_sampling(dim, kappa):
    torch.manual_seed(0)
    p = vmf(dim, kappa)
    uniform = HypersphericalUniform(dim, dtype=torch.float64)
    want = integrate(p, lambda log_prob, w: log_prob + log_surface(dim))
    assert kl_divergence(p, uniform).item() == pytest.approx(want, rel=1e-8)

    q = VonMisesFisher(unit(dim, seed=8), torch.tensor(2.5, dtype=torch.float64))
    x = p.sample((20_000,))
    ratio = p.log_prob(x) - q.log_prob(x)
    standard_error = (ratio.std() / len(x) ** 0.5).item()
    assert abs(kl_divergence(p, q).item() - ratio.mean().item()) < 5 * standard_error
    assert kl_divergence(p, p).item() == pytest.approx(0, abs=1e-11)
    zero = VonMisesFisher(q.loc, 0.0)
    assert kl_divergence(p, zero).item() == pytest.approx(want, rel=1e-8)


def test_kl_is_never_negative_near_uniform_and_broadcasts():
    kappa = torch.logspace(-12, 0, 49, dtype=torch.float64)
    for dim in (2, 3, 512):
        divergence = kl_divergence(VonMisesFisher(unit(dim), kappa), HypersphericalUniform(dim))
        assert divergence.shape == (49,) and (divergence >= 0).all()
        assert ((divergence - kappa**2 / (2 * dim)).abs() <= 1e-15 * kappa + kappa**4).all()
    p = VonMisesFisher(unit(3), kappa).to_event(1)
    q = HypersphericalUniform(3).expand((49,)).to_event(1)
    assert kl_divergence(p, q).shape == ()
    assert kl_divergence(VonMisesFisher(unit(3), 1.0), HypersphericalUniform(3, (4,))).shape == (4,)
    with pytest.raises(ValueError, match="same sphere, but got dim 3 and 4"):
        kl_divergence(VonMisesFisher(unit(3), 1.0), HypersphericalUniform(4))


@pytest.mark.parametrize("dim", [2, 3, 5])
def test_shapes(dim):
    d = VonMisesFisher(unit(4, 1, dim), torch.rand(6, dtype=torch.float64))
    assert d.batch_shape == (4, 6) and d.event_shape == (dim,) and d.event_dim == 1
    assert VonMisesFisher.infer_shapes(loc=(4, 1, dim), concentration=(6,)) == (d.batch_shape, d.event_shape)
    x = d.sample((2,))
    assert x.shape == d.shape((2,)) == (2, 4, 6, dim)
    assert d.log_prob(x).shape == (2, 4, 6)
    assert d.log_prob(x[0, 0, 0]).shape == (4, 6)
    assert d.mean.shape == d.variance.shape == d.mode.shape == (4, 6, dim)
    assert d.entropy().shape == (4, 6)
    wide = d.expand((3, 4, 6))
    assert isinstance(wide, VonMisesFisher) and wide.batch_shape == (3, 4, 6)
    assert not torch.equal(wide.sample()[0], wide.sample()[1])
    torch.testing.assert_close(wide.log_prob(x[:1].expand(3, 4, 6, dim)), d.log_prob(x[:1]).expand(3, 4, 6))
    event = d.to_event(1)
    assert event.batch_shape == (4,) and event.event_shape == (6, dim) and event.log_prob(x).shape == (2, 4)
    assert event.support.check(x).all()
    empty = VonMisesFisher(unit(dim), 1.0).sample((0,))
    assert empty.shape == (0, dim)


def test_batches_equal_single_distributions():
    kappa = torch.tensor([0.0, 1e-3, 1.0, 100.0, 1e5], dtype=torch.float64)
    loc, x = unit(5, 6), unit(6, seed=9)
    together = VonMisesFisher(loc, kappa).log_prob(x)
    apart = torch.stack([VonMisesFisher(loc[i], kappa[i]).log_prob(x) for i in range(5)])
    torch.testing.assert_close(together, apart, rtol=1e-14, atol=0)


def test_copies_and_validation_survive_expand():
    d = VonMisesFisher(unit(3), torch.tensor(2.0, dtype=torch.float64), validate_args=True)
    for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d)), d.expand((2,))):
        assert twin._validate_args
        torch.testing.assert_close(twin.log_prob(d.loc).flatten()[0], d.log_prob(d.loc))
    with pytest.raises(ValueError, match="within the support"):
        d.expand((2,)).log_prob(2 * d.loc)


def test_numbers_are_accepted_as_concentration():
    d = VonMisesFisher(unit(3, dtype=torch.float32), 2)
    assert d.concentration.dtype == torch.float32 and d.sample().dtype == torch.float32


def test_errors():
    with pytest.raises(ValueError, match=r"last dimension of 2 or more .* shape \(5, 1\)"):
        VonMisesFisher(torch.ones(5, 1), torch.ones(5))
    with pytest.raises(ValueError, match=r"last dimension of 2 or more .* shape \(\)"):
        VonMisesFisher(torch.tensor(1.0), 1.0)
    with pytest.raises(ValueError, match=r"does not broadcast with concentration, of shape \(4,\)"):
        VonMisesFisher(unit(5, 3), torch.ones(4))
    with pytest.raises(ValueError, match=r"unit vectors .* from 1 to 2\. Normalise it: loc / loc\.norm"):
        VonMisesFisher(unit(2, 3) * torch.tensor([[1.0], [2.0]]), 1.0, validate_args=True)
    with pytest.raises(ValueError, match="unit vectors"):
        VonMisesFisher(torch.full((3,), float("nan")), 1.0, validate_args=True)
    with pytest.raises(ValueError, match=r"nonnegative, but its smallest entry is -1 .* use -loc"):
        VonMisesFisher(unit(3), torch.tensor([1.0, -1.0]), validate_args=True)
    with pytest.raises(TypeError, match="concentration must be a tensor or a number, got str"):
        VonMisesFisher(unit(3), "high")
    with pytest.raises(TypeError, match="floating point tensor, but got torch.int64"):
        VonMisesFisher(torch.tensor([1, 0]), 1.0)
    with pytest.raises(TypeError, match="floating point tensor, but got list"):
        VonMisesFisher([1.0, 0.0], 1.0)
    VonMisesFisher(2 * unit(3), -1.0, validate_args=False)  # unchecked when asked not to check
    with pytest.raises(NotImplementedError):
        VonMisesFisher(unit(3), 1.0).rsample()
