"""Wrong input to a comparison of data: each error names the site, says what was given and what to do."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.optim import Adam

from pyro_sinkhorn import Implicit, SinkhornProgram, Trace_DataSinkhorn
from pyro_sinkhorn.errors import NonFiniteError, ProgramError


def nothing(*_args):
    """An empty guide."""


def model_of(simulate, event_dim=1):
    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", Implicit(simulate(scale, x), event_dim=event_dim), obs=x)

    return model


def step(model, *args, guide=nothing, **options):
    return SVI(model, guide, Adam({"lr": 0.1}), Trace_DataSinkhorn(match_size=8, **options)).step(*args)


good = model_of(lambda scale, x: scale * torch.randn(len(x), 2))


@pytest.mark.parametrize(
    ("simulate", "cause"),
    [
        (
            lambda s, x: (s * torch.randn(len(x), 2)).detach(),
            r"the tensor given to Implicit .* parameters \['scale'\]",
        ),
        (lambda s, x: torch.tensor((s * torch.randn(len(x), 2)).tolist()), "the tensor given to Implicit"),
        (lambda s, x: (s * torch.randn(len(x), 2) > 0).double(), "the tensor given to Implicit"),
    ],
)
def test_a_simulator_without_gradient(simulate, cause):
    with pytest.raises(ProgramError, match=cause) as caught:
        step(model_of(simulate), torch.randn(16, 2))
    said = str(caught.value)
    assert "observed site 'x'" in said and "Two ways out: (1)" in said and "(2)" in said
    assert "(16, 2)" in said


def test_a_likelihood_without_reparametrisation():
    def model(x):
        rate = pyro.param("rate", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    with pytest.raises(
        ProgramError, match=r"'x'.*a Poisson is sampled without reparametrisation .* Two ways out"
    ):
        step(model, torch.ones(16))
    assert isinstance(Trace_DataSinkhorn(match_size=8).loss(model, nothing, torch.ones(16)), float)


def test_a_program_without_parameters():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ProgramError, match="nothing to learn: no pyro.param or pyro.module was met"):
        step(model, torch.ones(16))


def test_an_unreparametrised_latent_is_named():
    def model(x):
        probs = pyro.param("probs", torch.ones(2) / 2, constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(probs))
            pyro.sample("x", Implicit(k.double()), obs=x)

    with pytest.raises(ProgramError, match=r"the latents \[\"'k', a Categorical\"\] pass none on"):
        step(model, torch.ones(16))


def test_one_lost_gradient_among_others_is_warned_of():
    def model(x):
        probs = pyro.param("probs", torch.ones(2) / 2, constraint=constraints.simplex)
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(probs))
            pyro.sample("x", Implicit(loc + k), obs=x)

    with pytest.warns(UserWarning, match="the prior of 'k', a Categorical, has learnable parameters"):
        step(model, torch.randn(16))


def test_copies_of_one_draw():
    with pytest.raises(ProgramError, match=r"'x': the simulated value has no dimension for plate 'data'"):
        step(model_of(lambda s, x: s * torch.randn(2)), torch.randn(16, 2))


def test_copies_of_one_particle():
    with pytest.raises(ProgramError, match=r"'x': its 4 vectorised particles are copies of one simulation"):
        step(good, torch.randn(16, 2), num_particles=4, vectorize_particles=True)


def test_shapes_that_differ():
    with pytest.raises(
        ProgramError, match=r"'x': the data have shape \(16, 3\), the simulated data \(16, 2\)"
    ):
        step(good, torch.randn(16, 3))
    with pytest.raises(ValueError, match=r"Shape mismatch inside plate\('data'\)"):
        step(model_of(lambda s, x: s * torch.randn(7, 2)), torch.randn(16, 2))


def test_dtypes_that_differ():
    with pytest.raises(ProgramError, match=r"the data are torch.float32, the simulated data torch.float64"):
        step(good, torch.randn(16, 2).float())
    with pytest.raises(ProgramError, match=r"the data are torch.int64, the simulated data torch.float64"):
        step(good, torch.ones(16, 2).long())


def test_data_that_are_not_finite():
    x = torch.randn(16, 2)
    x[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"observed site 'x': .* in 1 rows \(first: 3\) of the data"):
        step(good, x)


def test_simulated_data_that_are_not_finite():
    with pytest.raises(
        NonFiniteError, match="'x': .* of the simulated data, though its parameters .* are finite"
    ):
        step(model_of(lambda s, x: s * torch.randn(len(x), 2).log()), torch.randn(16, 2))
    pyro.clear_param_store()
    pyro.param("scale", torch.tensor(torch.nan))
    with pytest.raises(NonFiniteError, match="of the simulated data: the parameter 'scale' is NaN"):
        step(good, torch.randn(16, 2))


def test_a_fit_keeps_the_last_good_state():
    def simulate(scale, x):
        simulated = scale * torch.randn(len(x), 2)
        return simulated * torch.inf if float(scale.detach()) < 0.9 else simulated

    program = SinkhornProgram(model_of(simulate), loss=Trace_DataSinkhorn(match_size=8))
    with pytest.raises(NonFiniteError, match=r"step \d+: observed site 'x'.*keeps the state"):
        program.fit(0.1 * torch.randn(64, 2), num_steps=50, lr=0.05, batch_size=16, seed=0, progress=False)
    with program.active():
        assert 0 < float(pyro.param("scale").detach()) < 0.9
    assert 0 < program.num_steps < 50


def test_empty_and_single_batches():
    with pytest.raises(ProgramError, match="batch is empty"):
        step(good, torch.randn(0, 2))
    with pytest.raises(ProgramError, match=r"observed data \(x\): a batch of 1 cannot be split"):
        step(good, torch.randn(1, 2))


def test_a_small_batch_is_warned_of():
    with pytest.warns(
        UserWarning, match=r"observed data \(x\): a batch of 8 gives halves of 4, below match_size=8"
    ):
        step(good, torch.randn(8, 2))


def test_no_data_and_no_plate():
    def unobserved(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match="observes nothing"):
        step(unobserved, torch.ones(4))

    def plateless(x):
        pyro.sample("x", Implicit(torch.randn(4), event_dim=1), obs=x)

    with pytest.raises(ProgramError, match="in no plate"):
        step(plateless, torch.ones(4))


def test_a_global_without_a_guide():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", Implicit(mu + torch.randn(len(x))), obs=x)

    with pytest.raises(ProgramError, match=r"'mu' is outside every data plate.*AutoNormal\(poutine.block"):
        step(model, torch.ones(16))

    def implicit(x):
        pyro.sample("mu", Implicit(torch.zeros(())))

    with pytest.raises(ProgramError, match="'mu' has an Implicit guide"):
        step(model, torch.ones(16), guide=implicit)


def test_a_guide_for_what_is_simulated():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", Implicit(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(
        ProgramError, match=r"the guide samples the latents \['z'\], which are inside the data plate"
    ):
        step(model, torch.ones(16), guide=guide)

    def other(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match=r"the guide samples \['w'\], which are not latents"):
        step(model, torch.ones(16), guide=other)


def test_nothing_to_encode():
    program = SinkhornProgram(good, loss=Trace_DataSinkhorn())
    with pytest.raises(ProgramError, match="nothing to encode.*generate"):
        program.encode(torch.randn(16, 2))
    with pytest.raises(
        ProgramError, match="infers no latents, so there is nothing to encode: leave encoder= out"
    ):
        SinkhornProgram(good, loss=Trace_DataSinkhorn(), encoder=torch.nn.Linear(2, 2))


def test_covariates_that_are_none():
    def model(t, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", Implicit(pyro.param("b", torch.tensor(1.0)) * t + torch.randn(len(x))), obs=x)

    x, t = torch.randn(16), torch.arange(16.0)
    loss = Trace_DataSinkhorn(match_size=8)
    with pytest.warns(UserWarning, match=r"argument 0 \(16, 1\), as long as plate 'data'"):
        loss.loss(model, nothing, t, x)
    loss.loss(model, nothing, t, x)  # it was said once
    with pytest.raises(ProgramError, match=r"covariates function returned \(3,\) for observed sites \(x\)"):
        step(model, t, x, covariates=lambda t, x: torch.ones(3))
    with pytest.raises(ProgramError, match=r"covariates function returned NoneType"):
        step(model, t, x, covariates=lambda t, x: None)
    with pytest.raises(NonFiniteError, match="the covariates function, a covariate of observed sites"):
        step(model, t, x, covariates=lambda t, x: torch.full((16,), torch.nan))


def test_a_wholly_masked_batch_is_nothing():
    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=False):
            pyro.sample("x", Implicit(pyro.param("b", torch.tensor(1.0)) * torch.randn(len(x))), obs=x)

    assert step(model, torch.randn(16)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.0}, "weight is 0.0: expected a positive number"),
        ({"scale": "row"}, "scale is 'row': expected 'site', 'column' or None"),
        ({"covariates": "all"}, "covariates is 'all'"),
        ({"cost": torch.nn.Linear(2, 2)}, r"pass cost=LearnedCost\(network\)"),
        ({"relative_epsilon": -1.0}, "relative_epsilon is -1.0"),
        ({"match_size": 0}, "match_size is 0"),
        ({"debias": "both"}, "debias is 'both'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Trace_DataSinkhorn(**options)


@pytest.mark.parametrize(
    ("likelihood", "data", "message"),
    [
        (lambda s: dist.LogNormal(s, 1.0), lambda: torch.tensor([1.0, -1.0] * 8), "8 of 16 data lie outside the support"),
        (lambda s: dist.Gamma(s, 1.0), lambda: torch.tensor([1.0, 0.0] * 8), "8 numbers lie on the bound of the support"),
        (lambda s: dist.Dirichlet(s * torch.ones(2)), lambda: 50 * torch.ones(16, 2), "16 of 16 data lie outside"),
    ],
)  # fmt: skip
def test_data_outside_the_support(likelihood, data, message):
    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", likelihood(scale), obs=x)

    with pytest.raises(ProgramError, match=f"observed site 'x': {message}"):
        step(model, data())


def test_a_global_does_not_hide_the_cause():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(mu.exp()), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    with pytest.raises(ProgramError, match="a Poisson is sampled without reparametrisation"):
        step(model, torch.ones(16), guide=guide)


def test_a_tensor_that_pyro_does_not_know():
    loose = torch.tensor(1.0, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", Implicit(loose * torch.randn(len(x))), obs=x)

    program = SinkhornProgram(model, loss=Trace_DataSinkhorn(match_size=8))
    with pytest.raises(ProgramError, match="neither model nor guide has a parameter to train"):
        program.fit(torch.randn(16), num_steps=1, batch_size=16, progress=False)


def test_a_small_outer_plate_is_named():
    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("features", 4, dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", Implicit(scale * torch.randn(4, len(x))), obs=x.mT)

    with pytest.warns(
        UserWarning, match=r"observed data \(x\), whose units are the slices of plate 'features'"
    ):
        step(model, torch.randn(8, 4))
