"""Time series: one site a step in a data plate, or one site whose event is the whole path."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms

from pyro_sinkhorn import AutoImplicit, Trace_Sinkhorn

T = 4


def normal(*shape):
    return dist.Normal(torch.zeros(*shape), 1.0).to_event(len(shape))


def stepwise(x):
    """A random walk with a site for every step."""
    with pyro.plate("data", len(x)):
        z = torch.zeros(())
        for t in pyro.markov(range(T)):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 0.5))
            pyro.sample(f"x_{t}", dist.Normal(z, 0.3), obs=x[:, t])


def walk():
    """The same walk as one draw: cumulative sums of its steps."""
    sums = transforms.LowerCholeskyAffine(torch.zeros(T), 0.5 * torch.ones(T, T).tril())
    return dist.TransformedDistribution(normal(T), [sums])


def vectorised(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", walk())
        pyro.sample("x", dist.Normal(z, 0.3).to_event(1), obs=x)


def state_space(x):
    """The latent path of a linear-Gaussian state space as the prior of one site."""
    prior = dist.GaussianHMM(
        normal(2),
        0.9 * torch.eye(2).expand(T, 2, 2),
        dist.Normal(torch.zeros(T, 2), 0.3).to_event(1),
        torch.tensor([[1.0], [0.0]]).expand(T, 2, 1),
        dist.Normal(torch.zeros(T, 1), 0.1).to_event(1),
    )
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", prior)
        pyro.sample("x", dist.Normal(z[..., 0], 0.3).to_event(1), obs=x)


def paths(n=64):
    return (0.5 * torch.randn(n, T)).cumsum(-1) + 0.3 * torch.randn(n, T)


@pytest.mark.parametrize("particles", [{}, {"num_particles": 2, "vectorize_particles": True}], ids=["1", "2"])
@pytest.mark.parametrize("model", [stepwise, vectorised, state_space], ids=lambda model: model.__name__)
def test_a_time_series_is_fitted(model, particles, fit):
    guide = fit(model, paths(12), **particles)
    for n in (12, 9):
        values = guide(paths(n))
        assert values.keys() == ({f"z_{t}" for t in range(T)} if model is stepwise else {"z"})
        assert all(len(value) == n for value in values.values())


def test_a_path_is_one_unit_of_the_match():
    loss = Trace_Sinkhorn(match_size=4)
    x = paths(12)
    value = loss.loss(vectorised, lambda x: pyro.sample("z", dist.Delta(x, event_dim=1)), x)
    likelihood = float(dist.Normal(x, 0.3).log_prob(x).sum())
    assert value == pytest.approx(-likelihood + 12 * 10 * loss.terms.match["z"])


@pytest.mark.filterwarnings("ignore::pyro_sinkhorn.ot.ConvergenceWarning")
def test_the_steps_of_a_walk_keep_their_size(fit):
    """Matched jointly, generated transitions are the encoded ones; step by step they would not be."""
    x = paths(128)
    guide = AutoImplicit(stepwise, hidden=64)
    fit(stepwise, x, guide=guide, steps=100, lr=3e-2, prior_weight=30.0, match_size=16)
    with torch.no_grad():
        values = guide(x)
    z = torch.stack([values[f"z_{t}"] for t in range(T)], -1)
    assert (z.diff(dim=-1).std(0) - 0.5).abs().max() < 0.15
    assert (z - x).square().mean().sqrt() < 0.5  # x is z with noise of .3


def test_the_steps_of_a_markov_chain_belong_to_one_group():
    from pyro_sinkhorn.structure import structure_of

    structure = structure_of(poutine.trace(stepwise).get_trace(paths(5)))
    assert [group.sites for group in structure.groups] == [tuple(f"z_{t}" for t in range(T))]
    assert structure.data == tuple(f"x_{t}" for t in range(T))
