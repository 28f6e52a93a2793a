"""Priors that are not fixed: conditional on covariates, learned, flat."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_sinkhorn import AutoImplicit, Trace_Sinkhorn
from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.structure import structure_of

far_at_first = pytest.mark.filterwarnings("ignore::pyro_sinkhorn.ot.ConvergenceWarning")


# Covariates


def conditional(c, x):
    """The data tell nothing of z: what the guide knows of it must come from the covariate."""
    with pyro.plate("data", len(c)):
        pyro.sample("z", dist.LogNormal(c, 0.2))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


@far_at_first
def test_an_encoder_that_reads_the_covariate_learns_the_conditional_prior(fit):
    """Matching all data at once would be content with the law of z over all of them, whatever c."""
    c = torch.linspace(-2, 2, 128, dtype=torch.float64)
    x = torch.randn(128)
    guide = AutoImplicit(conditional, encoder_input=lambda c, x: c.unsqueeze(-1), hidden=32)
    fit(conditional, c, x, guide=guide, steps=120, lr=2e-2, prior_weight=100.0, match_size=32)
    with torch.no_grad():
        residual = torch.stack([guide(c, x)["z"].log() - c for _ in range(20)])
    assert residual.mean(0).square().mean().sqrt() < 0.25  # the standard deviation of c is 1.2
    assert 0.1 < residual.std(0).mean() < 0.4


def test_a_prior_below_a_covariate_and_a_latent_of_the_same_plate(prior_as_guide, z_scores, too_far):
    c = torch.linspace(-2, 2, 8, dtype=torch.float64)

    def model():
        with pyro.plate("data", 8):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(a + 3 * c, 0.1))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(8))

    def wrong():
        with pyro.plate("data", 8):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(a + 3 * c.flip(0), 0.1))

    assert abs(z_scores(model, prior_as_guide(model))["a, b"]) < too_far
    assert z_scores(model, wrong)["a, b"] > too_far
    # Pooled, the two could not be told apart.
    assert abs(z_scores(model, wrong, groups="marginal")["a"]) < too_far


# Learned


@far_at_first
def test_the_scale_and_location_of_a_prior_are_learned(fit):
    """x is z with little noise, so that the law of z is known: N(1, 2)."""

    def model(x):
        loc = pyro.param("loc", torch.zeros(()))
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, scale))
            pyro.sample("x", dist.Normal(z, 0.3), obs=x)

    x = 1 + 2 * torch.randn(128)
    guide = AutoImplicit(model, hidden=32)
    fit(model, x, guide=guide, steps=120, lr=5e-2, match_size=32)
    assert pyro.param("loc").item() == pytest.approx(float(x.mean()), abs=0.5)
    assert pyro.param("scale").item() == pytest.approx(float(x.std()), rel=0.2)


@far_at_first
def test_a_network_as_conditional_prior_is_learned(fit):
    """z given c is N(2 c, .3), and x is z with little noise."""
    net = nn.Linear(1, 1).double()
    with torch.no_grad():
        net.weight.zero_()

    def model(c, x):
        pyro.module("net", net)
        with pyro.plate("data", len(c)):
            z = pyro.sample("z", dist.Normal(net(c.unsqueeze(-1)).squeeze(-1), 0.3))
            pyro.sample("x", dist.Normal(z, 0.2), obs=x)

    c = torch.linspace(-1, 1, 64, dtype=torch.float64)
    x = 2 * c + 0.3 * torch.randn(64) + 0.2 * torch.randn(64)
    fit(model, c, x, guide=AutoImplicit(model, hidden=32), steps=250, lr=5e-2, match_size=16)
    assert net.weight.item() == pytest.approx(2.0, abs=0.3)
    assert net.bias.item() == pytest.approx(0.0, abs=0.2)


def test_a_learned_prior_between_latents_gets_its_gradient():
    """The second latent of a chain: its slope and spread are the prior's."""

    def model(x):
        slope, spread = pyro.param("slope", torch.zeros(())), pyro.param("spread", torch.tensor(2.0))
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(slope * a, spread))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(a, 0.5))

    x = torch.zeros(256)
    for _ in range(5):
        Trace_Sinkhorn(match_size=64).loss_and_grads(model, guide, x)
    assert pyro.param("slope").grad < 0  # descent raises it towards 1
    assert pyro.param("spread").grad > 0  # and lowers it towards .5


# Flat


def flat(x):
    rate = pyro.sample("rate", dist.ImproperUniform(dist.constraints.positive, (), ()))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + rate, 0.5), obs=x)


@far_at_first
def test_a_flat_prior_of_a_global_is_a_density_and_needs_no_sample(fit):
    x = 3 + 0.5**0.5 * torch.randn(96) + 0.5 * torch.randn(96)
    assert structure_of(poutine.trace(poutine.condition(flat, {"rate": torch.ones(())})).get_trace(x)).data
    guide = AutoImplicit(flat, hidden=32, global_guide="delta")
    fit(flat, x, guide=guide, steps=150, lr=5e-2, prior_weight=30.0, match_size=16)
    assert guide(x)["rate"].item() == pytest.approx(float(x.mean()), abs=0.3)


def test_a_flat_prior_of_a_global_with_a_guide_by_hand(step):
    def guide(x):
        loc = pyro.param("loc", torch.zeros(()))
        pyro.sample("rate", dist.LogNormal(loc, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.1))

    assert step(flat, guide, torch.randn(12)).match.keys() == {"z"}


def test_a_flat_prior_of_a_vector_in_a_plate_without_data(fit):
    def model(x):
        with pyro.plate("components", 3):
            v = pyro.sample("v", dist.ImproperUniform(dist.constraints.real, (3,), (2,)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(z @ v, 0.5).to_event(1), obs=x)

    x = torch.randn(12, 2)
    assert fit(model, x)(x)["v"].shape == (3, 2)


def test_a_flat_prior_of_a_local_latent_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def by_hand(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    for guide in (AutoImplicit(model), by_hand):
        with pytest.raises(
            ProgramError, match="latent site 'z': its ImproperUniform is no law.*proper prior"
        ):
            Trace_Sinkhorn(match_size=4).loss(model, guide, torch.randn(12))
