"""The contract of Trace_Sinkhorn: an ELBO for SVI and ELBOModule, for all ways to write a program."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import nn

from pyro_sinkhorn import AutoImplicit, Implicit, Trace_Sinkhorn
from pyro_sinkhorn.losses import Terms

SMALL = {"match_size": 4}


def normal(d=2):
    return dist.Normal(torch.zeros(d), 1.0).to_event(1)


def data(n=12, d=2):
    return torch.randn(n, d)


def observe(mean, x, name="x"):
    pyro.sample(name, dist.Normal(mean, 0.5).to_event(x.dim() - 1), obs=x)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal())
        observe(z * pyro.param("slope", torch.ones(2)), x)


def implicit(x):
    shift, spread = pyro.param("shift", torch.zeros(2)), pyro.param("spread", torch.ones(2))
    with pyro.plate("data", len(x)):
        noise = pyro.sample("noise", normal(), infer={"is_auxiliary": True})
        pyro.sample("z", Implicit(x + shift + spread * noise, event_dim=1))


def delta(x):
    shift = pyro.param("shift", torch.zeros(2))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(x + shift, event_dim=1))


def gaussian(x):
    shift, spread = pyro.param("shift", torch.zeros(2)), pyro.param("spread", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x + shift, spread.exp()).to_event(1))


def step(model, guide, *args, num_steps=2, **kwargs):
    options = kwargs.pop("options", {})
    svi = SVI(model, guide, Adam({"lr": 1e-2}), loss=Trace_Sinkhorn(**SMALL | options))
    losses = [svi.step(*args, **kwargs) for _ in range(num_steps)]
    assert all(isinstance(value, float) and math.isfinite(value) for value in losses)
    assert math.isfinite(svi.evaluate_loss(*args, **kwargs))
    return svi


def seeded(function, *args, seed=11):
    pyro.set_rng_seed(seed)
    return function(*args)


# SVI, ELBOModule, torch


@pytest.mark.parametrize("guide", [implicit, delta, gaussian], ids=lambda g: g.__name__)
def test_steps_change_parameters_and_evaluation_does_not(guide):
    x = data()
    svi = step(model, guide, x)
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    assert len(before) >= 2
    svi.evaluate_loss(x)
    assert all(torch.equal(before[name], value) for name, value in pyro.get_param_store().items())
    svi.step(x)
    assert not any(torch.equal(before[name], value) for name, value in pyro.get_param_store().items())


class Decoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 2)
        self.scale = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal())
            pyro.sample("x", dist.Normal(self.linear(z), self.scale).to_event(1), obs=x)


@pytest.mark.parametrize("local", [False, True], ids=["param store", "local parameters"])
def test_as_a_module_for_torch_optimisers(local):
    with pyro.settings.context(module_local_params=local):
        x, program = data(), Decoder()
        guide, elbo = AutoImplicit(program), Trace_Sinkhorn(**SMALL)
        loss = elbo(program, guide)
        loss(x)  # makes the networks
        optimiser = torch.optim.Adam(loss.parameters(), lr=1e-2)
        before = [parameter.clone() for parameter in loss.parameters()]
        for _ in range(2):
            optimiser.zero_grad()
            value = loss(x)
            value.backward()
            optimiser.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, loss.parameters(), strict=True))
        assert seeded(loss, x).item() == pytest.approx(seeded(elbo.loss, program, guide, x))


@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorised"])
@pytest.mark.parametrize("particles", [1, 3])
def test_loss_and_grads_is_the_gradient_of_the_differentiable_loss(particles, vectorize):
    x = data()
    loss = Trace_Sinkhorn(**SMALL, num_particles=particles, vectorize_particles=vectorize)
    loss.loss(model, implicit, x)
    parameters = [pyro.param(name) for name in ("shift", "spread", "slope")]
    value = seeded(loss.differentiable_loss, model, implicit, x)
    expected = torch.autograd.grad(value, parameters)
    assert seeded(loss.loss_and_grads, model, implicit, x) == pytest.approx(value.item())
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert gradient.abs().max() > 0
        assert torch.allclose(parameter.unconstrained().grad, gradient)
    assert seeded(loss.loss, model, implicit, x) == pytest.approx(value.item())


# What it is made of


def test_the_loss_is_the_likelihood_and_the_match_scaled_by_the_number_of_data():
    x, n, weight = data(), 12, 7.0
    loss = Trace_Sinkhorn(weight, **SMALL)
    loss.loss(model, delta, x)
    value = loss.loss(model, delta, x)
    likelihood = dist.Normal(x, 0.5).log_prob(x).sum().item()
    terms = loss.terms
    assert terms.reconstruction == pytest.approx(-likelihood / n)
    assert terms.loss == pytest.approx(value / n)
    assert terms.globals == 0
    assert terms.match.keys() == {"z"}
    assert value == pytest.approx(-likelihood + n * weight * terms.match["z"])


def test_terms_before_the_first_call():
    assert math.isnan(Trace_Sinkhorn().terms.loss)
    assert Terms().match == {}


def test_without_a_prior_weight_it_is_an_autoencoder():
    latents = []

    class Counted(dist.Normal):
        def rsample(self, sample_shape=()):
            latents.append(1)
            return super().rsample(sample_shape)

    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Counted(torch.zeros(2), 1.0).to_event(1))
            observe(z * pyro.param("slope", torch.ones(2)), x)

    x = data()
    loss = Trace_Sinkhorn(prior_weight=0.0)
    value = loss.differentiable_loss(program, delta, x)
    slope, shift = pyro.param("slope"), pyro.param("shift")
    expected = -dist.Normal((x + shift) * slope, 0.5).log_prob(x).sum()
    assert value.item() == pytest.approx(expected.item())
    for ours, theirs in zip(
        *(torch.autograd.grad(v, [slope, shift]) for v in (value, expected)), strict=True
    ):
        assert torch.allclose(ours, theirs)
    assert not latents  # the prior is not even drawn
    assert loss.terms.match == {}
    assert loss.loss(program, delta, x[:1]) > 0  # nor is a batch of one split


def test_globals_are_scored_with_their_densities():
    def program(x):
        m = pyro.sample("m", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            observe(m.expand(x.shape), x)

    def guide(x):
        pyro.sample("m", dist.Normal(1.0, 0.1))

    x = data()
    loss = Trace_Sinkhorn()
    value = seeded(loss.loss, program, guide, x)
    m = seeded(lambda: dist.Normal(1.0, 0.1).sample())
    ratio = dist.Normal(1.0, 0.1).log_prob(m) - dist.Normal(0.0, 5.0).log_prob(m)
    likelihood = dist.Normal(m, 0.5).log_prob(x).sum()
    assert value == pytest.approx((ratio - likelihood).item())
    assert loss.terms.globals == pytest.approx(ratio.item() / 12)
    assert loss.terms.reconstruction == pytest.approx(-likelihood.item() / 12)
    assert loss.terms.match == {}


def test_factors_add_to_the_likelihood():
    def with_factor(x):
        model(x)
        with pyro.plate("more", len(x)):
            pyro.factor("penalty", torch.full((len(x),), -3.0))

    x, loss = data(), Trace_Sinkhorn(**SMALL)
    loss.loss(model, delta, x)
    assert seeded(loss.loss, with_factor, delta, x) == pytest.approx(
        seeded(loss.loss, model, delta, x) + 3 * 12
    )


def test_terms_and_losses_are_means_over_particles():
    x = data()
    for vectorise in (False, True):
        loss = Trace_Sinkhorn(**SMALL, num_particles=4, vectorize_particles=vectorise)
        value = loss.loss(model, implicit, x)
        assert value == pytest.approx(12 * loss.terms.loss)
        assert loss.terms.loss == pytest.approx(loss.terms.reconstruction + 10 * loss.terms.match["z"])


def test_a_prior_that_learns_gets_a_gradient():
    def program(x):
        loc = pyro.param("loc", torch.full((2,), 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            observe(torch.zeros_like(x), x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal())

    x = data(64)
    Trace_Sinkhorn(match_size=32).loss_and_grads(program, guide, x)
    assert (pyro.param("loc").unconstrained().grad > 0).all()  # towards the guide, at 0


def test_a_prior_that_learns_in_vain_is_reported_once_by_name():
    def program(x):
        concentration = pyro.param("concentration", torch.tensor(2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1))
            a = pyro.sample("a", dist.VonMises(0.0, concentration))
            observe(z + a.unsqueeze(-1), x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal())
            pyro.sample("a", Implicit(torch.zeros(len(x))))

    loss = Trace_Sinkhorn(**SMALL)
    with pytest.warns(UserWarning, match="prior of 'a', a VonMises, has learnable parameters") as record:
        loss.loss_and_grads(program, guide, data())
    assert len(record) == 1
    loss.loss_and_grads(program, guide, data())  # a second warning would be an error here


# All ways to write a program


def test_a_conditioned_model():
    def program():
        with pyro.plate("data", 12):
            z = pyro.sample("z", normal())
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1))

    conditioned = pyro.condition(program, data={"x": data()})
    step(conditioned, AutoImplicit(conditioned))


def test_a_model_that_sub_samples_a_full_array():
    def program(x):
        with pyro.plate("data", len(x), subsample_size=8) as index:
            z = pyro.sample("z", normal())
            observe(z, x[index])

    x = data(40)
    step(program, AutoImplicit(program), x)

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=8) as index:
            pyro.sample("z", Implicit(x[index] + pyro.param("shift", torch.zeros(2)), event_dim=1))

    loss = Trace_Sinkhorn(**SMALL)
    value = loss.loss(program, guide, x)
    # Each datum is reconstructed from its own latent: guide and model see one sub-sample.
    assert loss.terms.reconstruction == pytest.approx(2 * (0.5 * math.log(2 * math.pi) + math.log(0.5)))
    assert value == pytest.approx(40 * loss.terms.loss)


def keyword(*, x):
    model(x)


def in_dict(batch):
    model(batch["x"])


def in_list(batch):
    model(batch[0])


@pytest.mark.parametrize(
    ("program", "args", "kwargs"),
    [
        (keyword, lambda x: (), lambda x: {"x": x}),
        (in_dict, lambda x: ({"x": x},), lambda x: {}),
        (in_list, lambda x: ([x, 3],), lambda x: {}),
    ],
)
def test_data_in_any_argument(program, args, kwargs):
    guide = AutoImplicit(program)
    for n in (12, 9):
        x = data(n)
        step(program, guide, *args(x), **kwargs(x))


def test_images_flattened_inside_the_model():
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
            logits = z.sum(-1, keepdim=True).expand(-1, 16)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x.reshape(-1, 16))

    step(program, AutoImplicit(program), torch.rand(12, 1, 4, 4).round())


def test_two_kinds_of_data():
    def program(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal())
            observe(z, x)
            pyro.sample("y", dist.Categorical(logits=z), obs=y)

    x, y = data(), torch.randint(0, 2, (12,))
    guide = AutoImplicit(program)
    step(program, guide, x, y)
    assert guide.encoders[0].standardise.loc.shape == (3,)


def test_two_data_sets_in_plates_of_their_own():
    def program(x, y):
        with pyro.plate("one", len(x)):
            observe(pyro.sample("z", normal()), x)
        with pyro.plate("two", len(y)):
            observe(pyro.sample("w", dist.Gamma(2.0, 2.0)), y, "y")

    svi = step(program, AutoImplicit(program), data(), torch.randn(20))
    assert svi.evaluate_loss(data(10), torch.randn(30))


@pytest.mark.parametrize(
    ("default", "given"),
    [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.float32)],
)
def test_dtypes_of_data_and_defaults_may_differ(default, given):
    torch.set_default_dtype(default)
    x = data().to(given)

    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal())
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            observe(z + p[..., :2], x)

    step(program, AutoImplicit(program), x)
    pyro.clear_param_store()
    step(program, AutoImplicit(program), x, options={"num_particles": 2, "vectorize_particles": True})


def test_latents_in_nested_plates():
    def program(x):
        with pyro.plate("documents", x.shape[-1]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("words", len(x)):
                w = pyro.sample("w", dist.Normal(z, 0.3))
                pyro.sample("x", dist.Normal(w, 0.5), obs=x)

    x = data(3, 12)
    guide = AutoImplicit(program)
    svi = step(program, guide, x)
    loss = Trace_Sinkhorn(**SMALL)
    value = loss.loss(program, guide, x)
    assert loss.terms.match.keys() == {"z", "w"}
    # The sum over slices: 12 documents, 36 words; the terms are per document.
    expected = 12 * (loss.terms.reconstruction + 10 * loss.terms.match["z"] + 30 * loss.terms.match["w"])
    assert value == pytest.approx(expected)
    svi.step(data(3, 9))


def test_a_global_stated_after_the_local_latents():
    def program(x):
        plate = pyro.plate("data", len(x))
        with plate:
            z = pyro.sample("z", normal())
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with plate:
            w = pyro.sample("w", dist.Normal(m, 1.0))
            observe(z + w.unsqueeze(-1), x)

    step(program, AutoImplicit(program), data())
    pyro.clear_param_store()
    step(program, AutoImplicit(program, global_guide="delta"), data())


def test_keyword_and_other_arguments_reach_the_programs():
    def program(x, flag, *, scale=1.0):
        assert flag == "on"
        model(x * scale)

    step(program, AutoImplicit(program), data(), "on", scale=2.0)


# Particles and plates


@pytest.mark.parametrize("guide", [implicit, gaussian], ids=lambda g: g.__name__)
def test_the_depth_of_plates_is_found_without_scoring_an_implicit_guide(guide):
    loss = Trace_Sinkhorn(**SMALL, num_particles=3, vectorize_particles=True)
    assert pyro.infer.util.is_validation_enabled()
    assert loss.max_plate_nesting == math.inf
    assert math.isfinite(loss.loss_and_grads(model, guide, data()))
    assert loss.max_plate_nesting == 2
    given = Trace_Sinkhorn(**SMALL, num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    assert given.max_plate_nesting == 2
    assert math.isfinite(given.loss(model, guide, data()))


def test_vectorised_particles_of_the_automatic_guide_differ():
    guide, x, seen = AutoImplicit(model), data(), []

    def spy(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal())
            seen.append(z)
            observe(z, x)

    Trace_Sinkhorn(**SMALL, num_particles=3, vectorize_particles=True, max_plate_nesting=1).loss(
        spy, guide, x
    )
    z = next(value for value in seen if value.dim() == 3)
    assert z.shape == (3, 12, 2)
    assert not torch.equal(z[0], z[1])


# Auxiliary runs leave no mark


def test_the_decoder_runs_once_a_step():
    calls = []

    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal())
            w = pyro.sample("w", dist.Normal(z, 1.0).to_event(1))
            calls.append(len(x))
            observe(w, x)

    x = data()
    svi = step(program, AutoImplicit(program), x, num_steps=1)
    calls.clear()
    for n in (12, 12, 9):
        svi.step(data(n))
    assert calls == [12, 12, 9]


class Between(nn.Module):
    """A network with BatchNorm: in the prior, in the decoder."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("particles", [1, 2])
def test_batch_statistics_follow_the_scored_runs_alone(particles):
    prior_net, decoder, encoder = Between(), Between(), Between()

    def program(x):
        pyro.module("prior_net", prior_net)
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal())
            w = pyro.sample("w", dist.Normal(prior_net(z), 1.0).to_event(1))
            observe(decoder(w), x)

    x = data()
    guide = AutoImplicit(program, encoder=encoder)
    svi = SVI(program, guide, Adam({"lr": 1e-3}), loss=Trace_Sinkhorn(**SMALL, num_particles=particles))
    for number in (1, 2, 3):
        svi.step(x)
        for network in (prior_net, decoder, encoder):
            assert network.layers[1].num_batches_tracked == number * particles
    # The statistics are those of the latents that were scored, not of the prior's.
    seen = []
    handle = prior_net.layers[0].register_forward_hook(
        lambda module, args, out: seen.append(out.detach().mean(0))
    )
    before = prior_net.layers[1].running_mean.clone()
    svi.loss(program, guide, x)
    handle.remove()
    after = prior_net.layers[1].running_mean
    candidates = [torch.allclose(after, 0.9 * before + 0.1 * mean) for mean in seen]
    assert len(seen) > 2
    assert sum(candidates) == 1 or particles > 1


def test_guessing_the_depth_of_plates_leaves_batch_statistics_alone():
    decoder = Between()

    def program(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal())
            observe(decoder(z.reshape(-1, 2)).reshape(z.shape), x)

    Trace_Sinkhorn(**SMALL, num_particles=2, vectorize_particles=True).loss(
        program, AutoImplicit(program), data()
    )
    assert decoder.layers[1].num_batches_tracked == 1


# Options


def test_config_makes_an_equal_loss():
    loss = Trace_Sinkhorn(
        3.0,
        0.2,
        5,
        "marginal",
        2,
        "self",
        "euclidean",
        1e-3,
        50,
        "log",
        num_particles=2,
        vectorize_particles=True,
    )
    assert Trace_Sinkhorn(**loss.config()).config() == loss.config()
    assert loss.config()["match_size"] == 5
    assert Trace_Sinkhorn(max_plate_nesting=2).config()["max_plate_nesting"] == 2


def test_a_fresh_loss_has_seen_no_program():
    loss = Trace_Sinkhorn(3.0, **SMALL, num_particles=2, vectorize_particles=True)
    loss.loss(model, implicit, data())
    fresh = loss.fresh()
    assert fresh.config() == loss.config()
    assert math.isnan(fresh.terms.loss)
    assert not fresh.latent_match.state.units
    assert loss.latent_match.state.units

    def deeper(x):
        with pyro.plate("documents", x.shape[-1]), pyro.plate("words", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    fresh.loss(deeper, AutoImplicit(deeper), data(3, 12))
    assert fresh.max_plate_nesting == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_weight": -1.0}, "prior_weight is -1.0: expected a number of at least 0"),
        ({"prior_weight": math.nan}, "prior_weight is nan"),
        ({"relative_epsilon": -0.1}, "relative_epsilon is -0.1: expected a number of at least 0"),
        ({"match_size": 0}, "match_size is 0"),
        ({"num_prior_batches": 0}, "num_prior_batches is 0"),
        ({"groups": "both"}, "groups is 'both': expected 'joint', 'markov', 'marginal' or cliques"),
        ({"debias": "yes"}, "debias is 'yes': expected 'independent', 'self' or None"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Trace_Sinkhorn(**options)


def test_graphs_may_be_kept():
    x = data()
    loss = Trace_Sinkhorn(**SMALL, retain_graph=True)
    loss.loss_and_grads(model, delta, x)
    with poutine.block():
        value = loss.differentiable_loss(model, delta, x)
    value.backward(retain_graph=True)
    value.backward()


def test_a_callable_cost():
    step(model, implicit, data(), options={"cost": lambda x, y: torch.cdist(x, y).square()})
