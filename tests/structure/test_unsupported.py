"""What cannot be matched is refused by an error that names the site."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sinkhorn import AutoImplicit, Trace_Sinkhorn
from pyro_sinkhorn.errors import ProgramError

N = 12


def loss(model, guide, *args, times=1):
    measure = Trace_Sinkhorn(match_size=4)
    for _ in range(times):
        measure.loss(model, guide, *args)


def observe(mean, x, name="x"):
    pyro.sample(name, dist.Normal(mean, 1.0), obs=x)


# Sites that depend on latents


def sometimes_more(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z.mean() > 0:
            z = z + pyro.sample("w", dist.Normal(0.0, 1.0))
        observe(z, x)


def one_or_the_other(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w" if z.mean() > 0 else "v", dist.Normal(0.0, 1.0))
        observe(z + w, x)


def below_a_global(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        if m > 0:
            z = z + pyro.sample("w", dist.Normal(0.0, 1.0))
        observe(z, x)


def as_many_as_drawn(x):
    m = pyro.sample("m", dist.Exponential(1.0))
    with pyro.plate("data", len(x)):
        z = sum(pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0)) for i in range(1 + int(m)))
        observe(z, x)


BRANCHING = [sometimes_more, one_or_the_other, below_a_global, as_many_as_drawn]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("model", BRANCHING, ids=lambda model: model.__name__)
def test_stochastic_branching_is_refused_by_the_automatic_guide(model, seed):
    pyro.set_rng_seed(seed)
    with pytest.raises(
        ProgramError,
        match=r"latent sites \['(w|v|z_\d)'.*\] (did not appear|were new) when the model ran again.*torch.where",
    ):
        AutoImplicit(model)(torch.randn(N))


def test_stochastic_branching_is_refused_with_a_guide_by_hand():
    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("w" if z.mean() > 0 else "v", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match=r"latent sites \['(w|v)'\] did not appear"):
        loss(one_or_the_other, guide, torch.randn(N), times=30)

    def without(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(
        ProgramError,
        match=r"guide does not sample the latent sites \['w'\].*in every call, whatever the values of the others",
    ):
        loss(sometimes_more, without, torch.randn(N), times=30)


def test_observed_sites_that_depend_on_latents_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            observe(z, x, "x" if 1e3 * z.sum() % 2 < 1 else "y")

    with pytest.raises(ProgramError, match="observed site '[xy]', which AutoImplicit read, was not observed"):
        loss(model, AutoImplicit(model), torch.randn(N), times=30)


# Sites that are latent in one call and data in another


def labelled(x, y=None):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        z = pyro.sample("z", dist.Normal(y, 1.0))
        observe(z, x)


def test_a_latent_that_is_observed_later_is_refused_by_the_automatic_guide():
    x, y = torch.randn(2, N)
    guide = AutoImplicit(labelled)
    guide(x)
    with pytest.raises(
        ProgramError,
        match=r"sites \['y'\] were latent in an earlier call and are observed.*obs=values, obs_mask=present",
    ):
        guide(x, y)


def test_data_that_are_latent_later_are_refused_by_the_automatic_guide():
    x, y = torch.randn(2, N)
    guide = AutoImplicit(labelled)
    guide(x, y)
    with pytest.raises(ProgramError, match=r"latent sites \['y'\] were new.*obs= and obs_mask="):
        guide(x)


def test_data_that_are_missing_in_a_later_call_are_refused_by_the_automatic_guide():
    def model(x, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            observe(z, x)
            if y is not None:
                observe(z, y, "y")

    x, y = torch.randn(2, N)
    guide = AutoImplicit(model)
    guide(x, y)
    with pytest.raises(ProgramError, match="site 'y' was observed when AutoImplicit was made and is not"):
        guide(x)


# Sequences of another length


def test_a_sequence_of_another_length_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))
                observe(z, x[:, t], f"x_{t}")

    guide = AutoImplicit(model)
    guide(torch.randn(N, 3))
    for length, message in [(4, r"\['z_3'\]"), (2, r"\['z_2'\] did not appear")]:
        with pytest.raises(ProgramError, match=f"latent sites {message}"):
            loss(model, guide, torch.randn(N, length))
