"""The uniform distribution on the sphere."""

import copy
import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from scipy.stats import beta, kstest

from pyro_sinkhorn.distributions import HypersphericalUniform
from pyro_sinkhorn.distributions._sphere import random_directions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [2, 3, 8, 512])
def test_draws(dim, dtype):
    torch.manual_seed(0)
    d = HypersphericalUniform(dim, dtype=dtype, validate_args=True)
    x = d.sample((5000,))
    assert x.dtype == dtype and dist.constraints.sphere.check(x).all()
    along = x.double() @ random_directions(torch.Size([dim]), torch.float64, None)
    shape = (dim - 1) / 2
    assert kstest(((1 + along) / 2).numpy(), beta(shape, shape).cdf).pvalue > 1e-6
    assert (x.double().mean(0) / (d.variance.double() / 5000).sqrt()).abs().max() < 5.5
    torch.testing.assert_close(
        x.double().var(0).mean(), torch.tensor(1 / dim, dtype=torch.float64), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize(("dim", "surface"), [(2, 2 * math.pi), (3, 4 * math.pi), (4, 2 * math.pi**2)])
def test_density_and_entropy(dim, surface):
    d = HypersphericalUniform(dim, (5,), dtype=torch.float64)
    log_prob = d.log_prob(d.sample((2,)))
    assert log_prob.shape == (2, 5)
    torch.testing.assert_close(log_prob, torch.full_like(log_prob, -math.log(surface)))
    torch.testing.assert_close(d.entropy(), -log_prob[0])


def test_shapes():
    d = HypersphericalUniform(3, (4,))
    assert d.batch_shape == (4,) and d.event_shape == (3,) and d.dim == 3
    assert d().shape == (4, 3) and d.rsample((2,)).shape == (2, 4, 3) and d.log_prob(d()).shape == (4,)
    assert d.log_prob(d()[0]).shape == (4,)
    wide = d.expand((2, 4))
    assert isinstance(wide, HypersphericalUniform) and wide.sample().shape == wide.mean.shape == (2, 4, 3)
    event = wide.to_event(1)
    assert event.batch_shape == (2,) and event.log_prob(wide.sample()).shape == (2,)
    assert wide.variance.shape == (2, 4, 3) and wide.entropy().shape == (2, 4)


def test_dtype_follows_the_default_and_the_request():
    assert HypersphericalUniform(2).sample().dtype == torch.get_default_dtype()
    d = HypersphericalUniform(2, dtype=torch.float32).expand((3,))
    assert d.sample().dtype == d.mean.dtype == d.variance.dtype == d.entropy().dtype == torch.float32
    half = HypersphericalUniform(5, dtype=torch.bfloat16).sample((9,))
    assert half.dtype == torch.bfloat16
    assert ((half.float().norm(dim=-1) - 1).abs() < 2 * torch.finfo(torch.bfloat16).eps).all()


def test_a_zero_normal_still_gives_a_unit_vector(monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda shape, **kwargs: torch.zeros(shape, **kwargs))
    assert random_directions(torch.Size([2, 3]), torch.float64, None).norm(dim=-1).tolist() == [1, 1]


def test_copies_and_repr():
    d = HypersphericalUniform(3, (2,), validate_args=True)
    assert repr(d) == "HypersphericalUniform(dim=3, batch_shape=(2,))"
    for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d)), d.expand((5, 2))):
        assert twin._validate_args and twin.dim == 3
    with pytest.raises(ValueError, match="within the support"):
        d.expand((5, 2)).log_prob(torch.ones(3))


def test_errors():
    with pytest.raises(ValueError, match=r"at least 2 \(the circle\), but got 1"):
        HypersphericalUniform(1)
    with pytest.raises(TypeError, match="dim must be an int, but got 3.0"):
        HypersphericalUniform(3.0)
    with pytest.raises(TypeError, match="floating point one, but got torch.int64"):
        HypersphericalUniform(3, dtype=torch.int64)
