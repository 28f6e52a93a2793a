"""The distributions inside Pyro programs: plates, observation, replay, losses with and without a density."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import Adam

from pyro_sinkhorn.distributions import HypersphericalUniform, Implicit, VonMisesFisher


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield


def trace(model, *args):
    return poutine.trace(model).get_trace(*args)


def test_sphere_priors_in_plates():
    loc = torch.tensor([1.0, 0.0, 0.0])

    def model():
        with pyro.plate("outer", 4, dim=-2):
            centre = pyro.sample("centre", HypersphericalUniform(3))
            with pyro.plate("inner", 5, dim=-1):
                flat = pyro.sample("flat", VonMisesFisher(loc, 2.0))
                near = pyro.sample("near", VonMisesFisher(centre, 50.0))
        return flat, near

    t = trace(model)
    t.compute_log_prob()
    for name, batch in (("centre", (4, 1)), ("flat", (4, 5)), ("near", (4, 5))):
        site = t.nodes[name]
        assert site["value"].shape == (*batch, 3)
        assert site["log_prob"].shape == batch
    draws = t.nodes["flat"]["value"].reshape(-1, 3)
    assert len(draws.unique(dim=0)) == 20  # a plate draws, it does not repeat
    replayed = trace(poutine.replay(model, trace=t))
    assert torch.equal(replayed.nodes["near"]["value"], t.nodes["near"]["value"])
    many = Predictive(model, num_samples=7, parallel=True)()
    assert many["flat"].shape == (7, 4, 5, 3) and many["near"].shape == (7, 4, 5, 3)


def test_parameters_learn_by_maximum_likelihood():
    truth = VonMisesFisher(torch.tensor([0.0, 0.6, 0.0, -0.8]), 15.0)
    data = truth.sample((2000,))

    def model(x):
        loc = pyro.param("loc", torch.tensor([0.5, 0.5, 0.5, 0.5]), constraint=dist.constraints.sphere)
        kappa = pyro.param("kappa", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", VonMisesFisher(loc, kappa), obs=x)

    svi = SVI(model, lambda x: None, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(150):
        svi.step(data)
    torch.testing.assert_close(pyro.param("loc"), truth.loc, rtol=0, atol=0.03)
    assert abs(pyro.param("kappa").item() - 15) < 1.5


def test_as_a_guide_with_density():
    """No reparametrised draws, so Pyro falls back on the score function."""

    def model(x):
        z = pyro.sample("z", HypersphericalUniform(3))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        kappa = pyro.param("kappa", torch.tensor(2.0), constraint=constraints.positive)
        pyro.sample("z", VonMisesFisher(torch.tensor([1.0, 0.0, 0.0]), kappa))

    x = torch.tensor([0.9, 0.1, 0.0])
    Trace_ELBO(num_particles=10, vectorize_particles=True).loss_and_grads(model, guide, x)
    gradient = pyro.param("kappa").unconstrained().grad
    assert gradient.isfinite() and gradient != 0


def test_implicit_observation_and_guide():
    x = torch.randn(6, 2)

    def model(x):
        scale = pyro.param("scale", torch.tensor(2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", Implicit(scale * z, event_dim=1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Implicit(2 * x, event_dim=1))

    t = trace(model, x)
    assert t.nodes["x"]["value"] is x and t.nodes["x"]["is_observed"]
    simulated = trace(poutine.uncondition(model), x).nodes["x"]
    assert simulated["value"].shape == x.shape and simulated["value"].requires_grad
    assert torch.equal(trace(guide, x).nodes["z"]["value"], 2 * x)
    with pytest.raises(ValueError, match=r"site 'x'[\s\S]*Implicit has no density"):
        SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(x)


def test_implicit_is_broadcast_by_plates():
    def program():
        with pyro.plate("particles", 4, dim=-2), pyro.plate("data", 3, dim=-1):
            return pyro.sample("z", Implicit(torch.arange(3.0)))

    assert torch.equal(program(), torch.arange(3.0).expand(4, 3))

    def wrong():
        with pyro.plate("data", 4):
            pyro.sample("z", Implicit(torch.arange(3.0)))

    with pytest.raises(ValueError, match="Shape mismatch inside plate"):
        trace(wrong)
