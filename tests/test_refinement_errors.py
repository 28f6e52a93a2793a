"""What :func:`refine` cannot refine is refused by the name of its site."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_sinkhorn import Implicit
from pyro_sinkhorn.distributions import HypersphericalUniform
from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.refinement import refine

X = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)


def model_with(prior, likelihood=None):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(x))
            pyro.sample("x", likelihood(z) if likelihood else dist.Normal(z.reshape(3, -1)[:, 0], 1.0), obs=x)

    return model


def normal(x):
    return dist.Normal(torch.zeros_like(x), 1.0)


def normal_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


DRAWS = {"z": torch.zeros(4, 3, dtype=torch.float64)}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            model_with(lambda x: Implicit(x + torch.randn(3))),
            "latent site 'z' is Implicit.*needs the density",
        ),
        (
            model_with(normal, lambda z: Implicit(z + torch.randn(3))),
            "observed site 'x' is Implicit.*needs the density",
        ),
        (
            model_with(lambda x: dist.Bernoulli(torch.full((3,), 0.5))),
            "latent site 'z' is discrete, a Bernoulli",
        ),
        (model_with(lambda x: dist.Poisson(torch.ones(3))), "latent site 'z' is discrete, a Poisson"),
        (
            model_with(lambda x: dist.Categorical(torch.ones(3, 2))),
            "latent site 'z' is discrete, a Categorical",
        ),
        (model_with(lambda x: dist.Delta(x)), "latent site 'z' is a Delta"),
        (
            model_with(lambda x: HypersphericalUniform(2)),
            r"latent site 'z': no smooth bijection.*HypersphericalUniform with event shape \(2,\)",
        ),
        (
            model_with(lambda x: dist.Normal(torch.zeros(3, 2), 1.0).mask(torch.ones(3, 2) > 0).to_event(1)),
            "mask of its Normal",
        ),
    ],
)
def test_sites_that_cannot_be_refined(model, message):
    with torch.no_grad():
        prior = poutine.trace(model).get_trace(X).nodes["z"]["value"]
    draws = {"z": prior.expand(4, *prior.shape)}
    with pytest.raises(ProgramError, match=f"(?s){message}"):
        refine(model, draws, X)


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        ({}, r"'z'\] are missing"),
        (DRAWS | {"noise": torch.zeros(4)}, r"'noise'\] are no latents"),
        ({"z": torch.zeros(4, 2)}, r"latent site 'z': draws of shape \(4, 2\), expected \(num_samples, 3\)"),
        ({"z": torch.zeros(3)}, r"latent site 'z': draws of shape \(3,\)"),
        ({"z": [1.0]}, "draws of list"),
        ({"z": torch.zeros(0, 3, dtype=torch.float64)}, "at least 1"),
        (
            {"z": torch.zeros(4, 3, dtype=torch.float32)},
            "'z': draws of torch.float32, but the model works in torch.float64",
        ),
        ({"z": torch.full((4, 3), torch.nan, dtype=torch.float64)}, "outside the prior's support"),
        ([1], "draws is a list"),
    ],
)
def test_draws_that_do_not_fit(draws, message):
    with pytest.raises(ProgramError, match=f"(?s){message}"):
        refine(normal_model, draws, X)


def test_draws_of_two_numbers():
    def model(x):
        pyro.sample("mean", dist.Normal(0.0, 1.0))
        normal_model(x)

    with pytest.raises(ProgramError, match=r"one number of samples.*'mean': 5.*'z': 4"):
        refine(model, DRAWS | {"mean": torch.zeros(5)}, X)


def test_draws_outside_of_the_support():
    model = model_with(lambda x: dist.Beta(torch.ones(3), torch.ones(3)))
    with pytest.raises(
        ProgramError, match=r"latent site 'z': 4 of 12 draws of shape \(4, 3\) lie outside.*support"
    ):
        refine(model, {"z": torch.tensor([0.5, 0.7, -2.0]).expand(4, 3)}, X)


def test_data_without_a_draw_of_positive_density():
    model = model_with(normal, lambda z: dist.Uniform(z, z + 1))
    with pytest.raises(ProgramError, match=r"(?s)slice 1 of plates \['data'\].*finite log density.*'x'"):
        refine(model, {"z": torch.tensor([-0.5, 3.0, 1.5]).expand(4, 3)}, X)


def test_sub_sampling():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    with pytest.raises(ProgramError, match=r"plate 'data' holds 2 of 3 slices"):
        refine(model, {"z": torch.zeros(4, 2)}, X)


def test_a_dimension_without_a_plate():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ProgramError, match=r"latent site 'z', a Normal.*batch dimension -1 is in no plate"):
        refine(model, DRAWS, X)


def test_a_random_density():
    dropout = nn.Dropout()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(8), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(dropout(z).sum(-1), 1.0), obs=x)

    draws = {"z": torch.randn(4, 3, 8)}
    with pytest.raises(ProgramError, match=r"density of site 'x' was another one.*eval mode"):
        refine(model, draws, X, parallel=False)
    dropout.eval()
    refine(model, draws, X, num_steps=20)


@pytest.mark.parametrize("mixed", ["data", "chains"])
def test_slices_that_depend_on_each_other(mixed):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            centre = z.mean(-1, keepdim=True) if mixed == "data" else z.mean()
            pyro.sample("x", dist.Normal(z - centre, 1.0), obs=x)

    with pytest.raises(ProgramError, match=r"latents \['z'\].*slices? of the plates \['data'\].*independent"):
        refine(model, {"z": torch.randn(4, 3)}, X, parallel=False)


def test_chains_that_depend_on_each_other_run_alone():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean - mean.mean(), 1.0), obs=x)

    with pytest.warns(UserWarning, match="one after the other.*site 'x' has another density"):
        refine(model, {"mean": torch.randn(6, 1)}, X, num_steps=20)


def test_sites_that_come_and_go():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if float(z.max()) > -50:
            pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ProgramError, match=r"the sites \['w'\] came or went"):
        refine(
            model,
            {"z": torch.tensor([[0.0], [-60.0], [-60.0], [0.0]]), "w": torch.zeros(4, 1)},
            X,
            parallel=False,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "gibbs"}, "kernel='gibbs': expected one of 'mala', 'hmc', 'nuts'"),
        ({"num_steps": 3}, "num_steps is 3"),
        ({"num_steps": 10.0}, "num_steps is 10.0"),
        ({"num_leapfrog": 0}, "num_leapfrog is 0"),
        ({"num_chains": 0}, "num_chains is 0"),
        ({"target_accept": 1.0}, "target_accept=1.0"),
        ({"step_size": -1.0}, "step_size=-1.0"),
        ({"step_size": 1.0, "kernel": "nuts"}, "step_size=1.0 with kernel='nuts'"),
    ],
)
def test_options(options, message):
    with pytest.raises(ProgramError, match=message):
        refine(normal_model, DRAWS, X, **options)


def test_nothing_to_refine():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ProgramError, match="no latent sites"):
        refine(model, {}, X)


def correlated(x):
    r = pyro.sample("r", dist.Normal(0.0, 1.0))
    covariance = torch.eye(3) + r[..., None, None] * (torch.ones(3, 3) - torch.eye(3))
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), covariance_matrix=covariance), obs=x)


@pytest.mark.parametrize("kernel", ["mala", "hmc"])
def test_a_covariance_that_fails_is_a_rejection(kernel):
    refined = refine(correlated, {"r": 0.2 * torch.rand(10)}, X, num_steps=60, seed=0, kernel=kernel)
    assert refined.failed > 0 and "singular matrix" in str(refined)
    assert bool(((refined.draws["r"] > -0.5) & (refined.draws["r"] < 1)).all())
    with pytest.raises(ProgramError, match="cannot be factorised at the draws"):
        refine(correlated, {"r": torch.full((10,), 2.0)}, X)


def test_dtypes_that_do_not_go_together():
    network = nn.Linear(1, 1)  # of double precision here

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(network(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)

    with pytest.raises(ProgramError, match=r"argument 'draws'\['z'\] is torch.float32"):
        refine(model, {"z": torch.zeros(4, 3, dtype=torch.float32)}, X)
