"""Several levels: globals above globals, groups of data, locals below locals."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_sinkhorn import AutoImplicit, Trace_Sinkhorn
from pyro_sinkhorn.losses.latent_match import Call
from pyro_sinkhorn.scoring import run_guide, run_scored
from pyro_sinkhorn.structure import structure_of

GROUPS, EACH = 3, 16


def population(x, group):
    """Population -> group -> datum, the groups by index: their means are globals."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", GROUPS):
        theta = pyro.sample("theta", dist.Normal(mean, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta[..., group], 0.5))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def population_data():
    group = torch.arange(GROUPS * EACH) % GROUPS
    x = torch.tensor([-0.5, 0.5, 1.5])[group] + 0.5**0.5 * torch.randn(len(group))
    return x, group


def exact_means(x, group):
    """Posterior means of (mean, theta): all is Gaussian once z is integrated out, x ~ N(theta, .5)."""
    totals = torch.zeros(GROUPS).index_add(0, group, x)
    counts = torch.bincount(group, minlength=GROUPS).to(x)
    precision = torch.zeros(1 + GROUPS, 1 + GROUPS)
    precision[0, 0] = 1 / 9 + GROUPS
    precision[0, 1:] = precision[1:, 0] = -1.0
    precision[1:, 1:] = torch.diag(1 + counts / 0.5)
    return torch.linalg.solve(precision, torch.cat([torch.zeros(1), totals / 0.5]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_sinkhorn.ot.ConvergenceWarning")  # at first, far apart
def test_the_means_of_two_global_levels_are_those_of_the_posterior(fit):
    x, group = population_data()
    guide = AutoImplicit(population, hidden=32)
    fit(population, x, group, guide=guide, steps=400, lr=0.1, prior_weight=30.0, match_size=8)
    found = torch.cat([g.loc.detach().reshape(-1) for g in guide.global_guides])
    exact = exact_means(x, group)
    assert (found[1:] - exact[1:]).abs().max() < 0.3  # two seeds: .07 at most
    assert abs(found[0] - exact[0]) < 0.4  # its own posterior has a standard deviation of .58


def test_the_prior_cloud_is_drawn_below_the_globals_of_the_guide_at_every_level():
    x, group = population_data()
    guide = AutoImplicit(population)
    trace = run_guide(guide, (x, group), {})
    scored = run_scored(population, trace, (x, group), {})
    prior = Call(population, (x, group), {}, structure_of(scored), scored).prior()
    for name in ("mean", "theta"):
        assert torch.equal(prior.nodes[name]["value"], trace.nodes[name]["value"])
    assert not torch.equal(prior.nodes["z"]["value"], scored.nodes["z"]["value"])
    assert torch.equal(prior.nodes["z"]["fn"].mean, trace.nodes["theta"]["value"][group])


def test_globals_of_every_level_are_scored_with_their_densities():
    x, group = population_data()
    theta = torch.tensor([-1.0, 2.0, 4.0])

    def guide(x, group):
        pyro.sample("mean", dist.Delta(torch.tensor(1.0)))
        with pyro.plate("groups", GROUPS):
            pyro.sample("theta", dist.Delta(theta))
        pyro.sample("z", dist.Delta(x))

    loss = Trace_Sinkhorn(prior_weight=0.0)
    value = loss.loss(population, guide, x, group)
    density = dist.Normal(0.0, 3.0).log_prob(torch.tensor(1.0)) + dist.Normal(1.0, 1.0).log_prob(theta).sum()
    assert value == pytest.approx(float(-density - dist.Normal(x, 0.5).log_prob(x).sum()))


def test_groups_as_a_plate_around_the_data_are_local(fit):
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("groups", len(x), dim=-2):
            theta = pyro.sample("theta", dist.Normal(mean, 1.0))
            with pyro.plate("data", x.shape[-1], dim=-1):
                z = pyro.sample("z", dist.Normal(theta, 0.5))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.randn(12, 5)
    structure = structure_of(poutine.trace(model).get_trace(x))
    assert structure.globals == ("mean",)
    assert [group.name for group in structure.groups] == ["theta", "z"]
    values = fit(model, x)(x)
    assert values["theta"].shape == (12, 1)
    assert values["z"].shape == (12, 5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_sinkhorn.ot.ConvergenceWarning")
def test_a_chain_of_three_keeps_its_dependence(fit):
    def chain(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 0.3))
            pyro.sample("c", dist.Normal(b, 0.3))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    guide = fit(chain, torch.randn(256), steps=400, lr=2e-2, prior_weight=100.0, match_size=64)
    with torch.no_grad():
        values = guide(torch.randn(4000))
    steps = torch.stack([values["b"] - values["a"], values["c"] - values["b"]])
    assert (steps.std(-1) - 0.3).abs().max() < 0.06
    assert abs(torch.corrcoef(steps)[0, 1]) < 0.15
