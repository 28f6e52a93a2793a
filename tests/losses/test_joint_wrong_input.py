"""Wrong input to a comparison of joints: each error names the site, says what was given and what to do."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn

from pyro_sinkhorn import AutoImplicit, Implicit, SinkhornProgram, Trace_JointSinkhorn
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.losses import LearnedCost


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def guide_of(draw):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Implicit(draw(x), event_dim=1))

    return guide


def value(program, guide, *args, **options):
    options = {"match_size": 8, "covariates": None} | options
    return Trace_JointSinkhorn(**options).loss(program, guide, *args)


X = torch.zeros(16, 2, dtype=torch.float64) + torch.arange(16.0, dtype=torch.float64)[:, None] / 8


def test_a_discrete_latent_passes_no_gradient():
    def program(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(k.double()[:, None].expand(-1, 2), 1.0).to_event(1), obs=x)

    with pytest.raises(ProgramError, match=r"'k' is a .*discrete latent.*Trace_EnergyScore"):
        value(program, AutoImplicit(program), X)


def test_a_relaxed_discrete_latent_is_taken():
    def program(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(k, 1.0).to_event(1), obs=x)

    guide = AutoImplicit(program, discrete="straight_through")
    loss = Trace_JointSinkhorn(match_size=8).differentiable_loss(program, guide, X)
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in guide.parameters() if p.numel())


def test_a_program_without_latents():
    def program(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)

    with pytest.raises(ProgramError, match="no latent site in its data plates.*Trace_DataSinkhorn"):
        value(program, lambda x: None, X)


def test_latents_of_the_wrong_shape():
    with pytest.raises(ProgramError, match=r"'z': .* values of shape \(16, 1\).*event shape \(2,\)"):
        value(model, guide_of(lambda x: x[:, :1]), X)


def test_too_few_slices_of_a_latent():
    def guide(x):
        pyro.sample("z", Implicit(x[:5], event_dim=1))

    with pytest.raises(ProgramError, match=r"'z': .*\(5, 2\).*plate 'data'.*holds 5 slices, not its 16"):
        value(model, guide, X)


def test_latents_missing_and_unknown():
    with pytest.raises(ProgramError, match=r"does not sample the latent sites \['z'\]"):
        value(model, lambda x: None, X)

    def guide(x):
        guide_of(lambda x: x)(x)
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match=r"samples \['w'\], which are not latents"):
        value(model, guide, X)


def test_a_guide_without_gradient():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.VonMises(x, 1.0).to_event(1))

    with pytest.raises(ProgramError, match=r"'z' is a VonMises.*without a gradient"):
        value(model, guide, X)


def test_latents_outside_the_support():
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.ones(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    with pytest.raises(ProgramError, match=r"'z': 1 of 16 guide values.*outside the prior's support"):
        value(program, guide_of(lambda x: x - 0.1), X)


def test_what_is_not_finite_is_named():
    bad = X.clone()
    bad[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"'x': .*in 1 rows \(first: 3\) of the data"):
        value(model, guide_of(lambda x: x.nan_to_num()), bad)
    with pytest.raises(NonFiniteError, match=r"'z': the guide produced NaN"):
        value(model, guide_of(lambda x: x / 0), X)

    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", Implicit(z / 0, event_dim=1), obs=x)

    with pytest.raises(NonFiniteError, match=r"'x': .*of the simulated data.*overflows"):
        value(program, guide_of(lambda x: x), X)


def test_data_of_the_wrong_shape_or_kind():
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", Implicit(z[:, :1], event_dim=1), obs=x)

    with pytest.raises(ProgramError, match=r"'x': data of shape \(16, 2\), expected \(16, 1\)"):
        value(program, guide_of(lambda x: x), X)
    with pytest.raises(ProgramError, match=r"'x': the data are torch.float32"):
        value(model, guide_of(lambda x: x.double()), X.float())


def test_one_datum_cannot_be_split():
    with pytest.raises(ProgramError, match=r"data and latents \(z, x\): a batch of 1 cannot be split"):
        value(model, guide_of(lambda x: x), X[:1])


def test_a_factor_that_is_not_finite():
    def program(x):
        model(x)
        pyro.factor("penalty", torch.tensor(float("inf")))

    with (
        pytest.warns(UserWarning, match="inf"),
        pytest.raises(NonFiniteError, match=r"the factors \['penalty'\]"),
    ):
        value(program, guide_of(lambda x: x), X)


@pytest.mark.parametrize(
    ("features", "match"),
    [
        (lambda x: x.sum(), r"'x': features= was given values of shape \(16, 2\) and returned \(\)"),
        (lambda x: x[0], r"expected a tensor of shape \(16, f\)"),
        (lambda x: [1], "returned list"),
        ({"y": lambda x: x}, r"names the sites \['y'\], but the observed sites of the model are \['x'\]"),
    ],
)
def test_features_of_the_wrong_shape(features, match):
    with pytest.raises(ProgramError, match=match):
        value(model, guide_of(lambda x: x), X, features=features)


def test_features_that_are_not_finite():
    with pytest.raises(NonFiniteError, match=r"'x': features= returned NaN"):
        value(model, guide_of(lambda x: x), X, features=lambda x: x / 0)


def test_one_feature_map_for_two_sites():
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=x[:, 0])

    with pytest.raises(ProgramError, match=r"observes the sites \['x', 'y'\]: give a dictionary"):
        value(program, guide_of(lambda x: x), X, features=lambda x: x)


def test_a_cost_of_a_site_that_is_none():
    with pytest.raises(
        ProgramError, match=r"names the sites \['x'\], but the latents of the model are \['z'\]"
    ):
        value(model, guide_of(lambda x: x), X, cost={"x": "l1"})


@pytest.mark.parametrize(
    "options",
    [
        {"data_weight": 0.0},
        {"data_weight": float("nan")},
        {"scale": "row"},
        {"covariates": "all"},
        {"features": 3},
        {"features": {"x": 3}},
        {"cost": LearnedCost(nn.Linear(2, 2))},
        {"match_size": 0},
        {"num_particles": 0},
        {"data_weight": "much"},
        {"relative_epsilon": "small"},
        {"debias": "both"},
    ],
)
def test_arguments_that_are_none(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Trace_JointSinkhorn(**options)


# What a program does not learn is said once; what has nothing to learn is not mentioned.


def step(program, guide):
    svi = SVI(program, guide, Adam({"lr": 0.1}), Trace_JointSinkhorn(match_size=8, covariates=None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            svi.step(X)
    return [str(one.message) for one in caught]


def learned_guide(x):
    gain = pyro.param("gain", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(gain * x, 0.4).to_event(1))


@pytest.mark.parametrize(
    ("likelihood", "cause"),
    [
        (lambda s, z: dist.Poisson((s * z).exp()).to_event(1), "a Poisson is sampled without reparam"),
        (
            lambda s, z: Implicit((s * z).detach(), event_dim=1),
            "the tensor given to Implicit does not depend",
        ),
        (lambda s, z: dist.Normal(s.item() * z, 1.0).to_event(1), "the parameters of its Normal"),
    ],
)
def test_parameters_that_get_no_gradient(likelihood, cause):
    def program(x):
        s = pyro.param("s", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", likelihood(s, z), obs=x.round())

    said = step(program, learned_guide)
    assert len(said) == 1
    assert "observed site 'x'" in said[0] and "['s']" in said[0] and cause in said[0]


def test_nothing_is_said_of_programs_without_parameters():
    def counts(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(z.exp()).to_event(1), obs=x.round())

    assert step(counts, learned_guide) == []
    assert step(model, learned_guide) == []


def test_a_prior_that_does_not_learn_is_mentioned():
    def program(x):
        a = pyro.param("a", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.VonMises(torch.zeros(2), a).to_event(1))
            pyro.sample("x", dist.Normal(pyro.param("b", torch.ones(2)) * z, 1.0).to_event(1), obs=x)

    said = step(program, AutoImplicit(program))
    assert len(said) == 1 and "the prior of 'z'" in said[0]


def test_a_program_keeps_its_state_after_an_error():
    program = SinkhornProgram(model, loss=Trace_JointSinkhorn(match_size=8))
    program.fit(X, num_steps=2, batch_size=16, seed=0, progress=False)
    bad = X.clone()
    bad[0] = torch.inf
    with pytest.raises(NonFiniteError, match="step 2: observed site 'x'"):
        program.fit(bad, num_steps=20, batch_size=16, progress=False)
    assert program.num_steps == 2
    program.fit(X, num_steps=1, batch_size=16, progress=False)
