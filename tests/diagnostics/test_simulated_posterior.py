"""Draws beside the truths that made the data: of every structure, side by side or one by one, of the same law."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sinkhorn import AutoImplicit, AutoPosterior
from pyro_sinkhorn.diagnostics.simulated_posterior import posterior_of_simulations
from pyro_sinkhorn.errors import ProgramError


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z.sum(-1) + k, 0.5), obs=x)


def with_global(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("kinds", 3):
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z + v.sum(-1, keepdim=True), 0.5), obs=x)


def nested(x):
    with pyro.plate("documents", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("words", 3, dim=-1):
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 0.5), obs=x)


def loop(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mean = torch.stack([z[i] for i in range(len(x))])
        pyro.sample("x", dist.Normal(mean, 0.5), obs=x)


class Exact(pyro.nn.PyroModule):
    """p(z | x) of ``loop``, off by a factor in its spread."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, self.factor * math.sqrt(0.2)))


@pytest.mark.parametrize(
    ("model", "shape", "n", "events"),
    [
        (local, (20,), 40, {"z": (2,), "k": ()}),
        (with_global, (4,), 7, {"mu": (), "v": (3,), "z": ()}),
        (nested, (5, 3), 10, {"z": (), "w": ()}),
        (loop, (20,), 40, {"z": ()}),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_shapes(model, shape, n, events):
    guide = AutoPosterior(model, hidden=8)
    drawn = posterior_of_simulations(model, guide, torch.zeros(shape), num_simulations=n, num_draws=3)
    assert {name: tuple(value.shape[1:]) for name, value in drawn.truth.items()} == events
    assert {name: tuple(value.shape[2:]) for name, value in drawn.draws.items()} == events
    assert drawn.n_sim == n and drawn.n_draws == 3


def test_simulations_are_at_least_as_many_as_asked():
    drawn = posterior_of_simulations(
        local, AutoImplicit(local), torch.zeros(20), num_simulations=41, num_draws=2
    )
    assert drawn.n_sim == 60
    for wrong in ({"num_simulations": 1}, {"num_draws": 1}):
        with pytest.raises(ProgramError, match=next(iter(wrong))):
            posterior_of_simulations(local, AutoImplicit(local), torch.zeros(20), **wrong)


def ranks(guide, model=loop):
    drawn = posterior_of_simulations(model, guide, torch.zeros(20), num_simulations=400, num_draws=19)
    return (drawn.draws["z"] < drawn.truth["z"]).sum(0).double()


def test_draws_belong_to_the_data_of_their_truth():
    # Uniform on 0..19: the mean is 9.5, the variance 33.25, whose standard error at 400 is that of a uniform law, 1.49.
    right, narrow = ranks(Exact()), ranks(Exact(0.3))
    assert abs(float(right.mean()) - 9.5) < 5 * math.sqrt(33.25 / 400)
    assert abs(float(right.var()) - 33.25) < 5 * 1.49
    assert float(narrow.var()) > 33.25 + 10 * 1.49


def test_side_by_side_shows_the_data_that_belong_to_the_truth():
    """A guide whose latents follow its data at once: its encoder is made to pass them on."""
    guide = AutoPosterior(nested, hidden=8)
    guide(torch.zeros(4, 3))
    drawn = posterior_of_simulations(nested, guide, torch.zeros(4, 3), num_simulations=12, num_draws=400)
    again = posterior_of_simulations(nested, guide, torch.zeros(4, 3), num_simulations=12, num_draws=400)
    assert not torch.equal(drawn.truth["z"], again.truth["z"])
    # An untrained guide reads data linearly: draws of one simulation agree more than those of several.
    within = drawn.draws["w"].mean(0).var() / drawn.draws["w"].var()
    assert float(within) > 10 / 400


def test_data_may_not_hide_from_a_guide_that_reads_arguments():
    def computed(x):
        return loop(2 * x)

    with pytest.raises(ProgramError, match="'x'.*no argument of the model"):
        posterior_of_simulations(computed, Exact(), torch.zeros(20), num_simulations=20, num_draws=2)
