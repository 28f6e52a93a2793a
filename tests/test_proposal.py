"""Truncated proposals: more simulations near the data, and weights that make up for it exactly."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sinkhorn import AutoPosterior, SinkhornProgram, Trace_EnergyScore
from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.proposal import Proposal, Region
from pyro_sinkhorn.simulations import Simulations


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.Gamma(2.0, 2.0))
        pyro.sample("x", dist.Normal(z, s), obs=x)


def prior(num):
    return {"z": torch.randn(num), "s": dist.Gamma(2.0, 2.0).sample((num,))}


def made(share=0.2):
    nodes = pyro.poutine.trace(model).get_trace(torch.zeros(1)).nodes
    proposal = Proposal(("z", "s"), share)
    draws = {"z": 1.5 + 0.2 * torch.randn(300), "s": 0.5 + 0.1 * torch.rand(300)}
    proposal.update(draws, prior, nodes)
    return proposal


@pytest.fixture(scope="module")
def repeated():
    """Weighted means of functions of the latents, under independent proposals and draws."""
    rows = []
    for _ in range(40):
        values, weights = made().draw(2000, prior)
        assert weights.shape == (2000,) and values["z"].shape == (2000,)
        z, s = values["z"], values["s"]
        rows.append(
            [weights.mean(), (weights * z).mean(), (weights * z * z).mean(), (weights * s).mean(), z.mean()]
        )
    return torch.tensor(rows)


def test_weighted_means_are_the_priors(repeated):
    exact = torch.tensor([1.0, 0.0, 1.0, 1.0])
    found = repeated[:, :4]
    z = (found.mean(0) - exact) / (found.std(0) / math.sqrt(len(found)))
    assert float(z.abs().max()) < 5


def test_without_the_weights_they_are_not(repeated):
    z = repeated[:, 4].mean() / (repeated[:, 4].std() / math.sqrt(len(repeated)))
    assert float(z) > 50


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_weights_are_bounded_and_most_draws_are_near(share):
    proposal = made(share)
    values, weights = proposal.draw(4000, prior)
    assert float(weights.max()) <= 1 / share + 1e-9
    near = (values["z"] - 1.5).abs() < 1.5
    expected = (1 - share) * 1.0 + share * 0.43
    assert abs(float(near.double().mean()) - expected) < 0.1


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_the_share_is_checked(share):
    with pytest.raises(ValueError, match="share of prior draws"):
        Proposal(("z",), share)


def test_what_is_carried_stays_with_its_draw():
    nodes = pyro.poutine.trace(model).get_trace(torch.zeros(1)).nodes
    proposal = Proposal(("z",), 0.3, carried=("row",))

    def rows(num):
        z = torch.randn(num)
        return {"z": z, "row": (1e6 * z).long()}

    proposal.update({"z": 1 + 0.1 * torch.randn(100)}, rows, nodes)
    values, _ = proposal.draw(5000, rows)
    assert torch.equal(values["row"], (1e6 * values["z"]).long())


def test_a_guide_where_the_prior_has_nothing_is_named(monkeypatch):
    monkeypatch.setattr("pyro_sinkhorn.proposal._PATIENCE", 100)
    nodes = pyro.poutine.trace(model).get_trace(torch.zeros(1)).nodes
    with pytest.raises(ProgramError, match=r"prior draws of \['z', 's'\].*not trained far enough"):
        Proposal(("z", "s"), 0.2).update({"z": 50 + torch.rand(100), "s": 1 + torch.rand(100)}, prior, nodes)


def test_a_region_holds_its_anchors_and_not_what_is_far():
    region = Region.around(torch.randn(200, 2))
    assert bool(region.holds(region.anchors).all())
    assert not bool(region.holds(torch.full((3, 2), 100.0)).any())


def test_latents_of_inner_plates_are_refused():
    def nested(x):
        with pyro.plate("documents", len(x), dim=-2), pyro.plate("words", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoPosterior(nested, hidden=8)
    simulations = Simulations(nested, Trace_EnergyScore(wake=False), (torch.zeros(4, 3),), {}, None, None)
    with pytest.raises(ProgramError, match="'z' lies in the plates"):
        simulations.focus(guide, 0.2)


@pytest.mark.parametrize("prior_of_k", [dist.Bernoulli(0.3), dist.Categorical(torch.ones(3))], ids=["b", "c"])
def test_discrete_latents_may_be_proposed(prior_of_k):
    def switched(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", prior_of_k)
            pyro.sample("x", dist.Normal(3.0 * k, 0.5), obs=x)

    x = torch.full((20,), 3.0)
    guide = AutoPosterior(switched, hidden=8)
    simulations = Simulations(switched, Trace_EnergyScore(wake=False), (x,), {}, None, None)
    guide(x)
    simulations.focus(guide, 0.2)
    weights = simulations.simulate(256).pairs.weights
    assert weights.shape == (1, 256) and 0.5 < float(weights.mean()) < 2


@pytest.mark.slow
@pytest.mark.parametrize("with_global", [False, True])
def test_after_rounds_the_posterior_is_exact_near_the_data_and_far(with_global):
    def local(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def of_all(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    conjugate, n, precision = (of_all, 4, 5.0) if with_global else (local, 1, 5.0)
    x = torch.full((n,), 1.2)
    program = SinkhornProgram(conjugate)
    guide = functools.partial(AutoPosterior, hidden=32)
    program.calibrate(x, num_steps=1200, num_rounds=3, guide=guide, seed=0, lr=3e-3, progress=False)
    for value in (1.2, -0.5):
        z = program.posterior(torch.full((n,), value), num_samples=4000, seed=1, check_range=False)["z"]
        assert abs(float(z.mean()) - value * 4 / precision) < 0.1
        assert abs(float(z.std()) * math.sqrt(precision) - 1) < 0.15
