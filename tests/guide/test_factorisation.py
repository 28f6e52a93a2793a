"""Programs whose posterior does not factorise over plates are refused, all others are not."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sinkhorn import AutoPosterior, Implicit
from pyro_sinkhorn.errors import ProgramError


def crossed(x):
    rows = pyro.plate("rows", x.shape[0], dim=-2)
    columns = pyro.plate("columns", x.shape[1], dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with columns:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with rows, columns:
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


def indexed(y, x, index):
    with pyro.plate("groups", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z[..., index], 1.0), obs=x)


def shifted(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.roll(1, -1), 1.0), obs=x)


def test_crossed_plates():
    with pytest.raises(ProgramError, match=r"observed site 'x'.*\(b\) and of \(a\).*cross"):
        AutoPosterior(crossed)(torch.randn(4, 3))


def test_a_latent_that_reaches_other_slices():
    with pytest.raises(
        ProgramError, match=r"latent group \(z\): a slice of plate 'data' changes the law of 'x'"
    ):
        AutoPosterior(shifted)(torch.randn(5))


def test_a_latent_that_reaches_other_plates():
    with pytest.raises(
        ProgramError, match=r"latent group \(z\): a slice of plate 'groups' changes the law of 'x'"
    ):
        AutoPosterior(indexed)(torch.randn(3), torch.randn(6), torch.arange(6) % 3)


def fine_local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
        k = pyro.sample("k", dist.Categorical(z))
        pyro.sample("x", Implicit(z[..., 0] * k + torch.randn(len(x))), obs=x)


def fine_nested(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("documents", x.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        with pyro.plate("words", x.shape[1], dim=-1):
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def fine_inner(x):
    with pyro.plate("data", len(x), dim=-1):
        with pyro.plate("parts", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.sum(-2), 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (fine_local, torch.randn(5)),
        (fine_local, torch.randn(1)),
        (fine_nested, torch.randn(4, 3)),
        (fine_inner, torch.randn(5)),
    ],
)
def test_others_pass(model, x):
    assert AutoPosterior(model)(x)
