"""The guide that is to be a posterior: every latent in its support, whatever the plates, the sizes and the order of data."""

import dataclasses
import functools
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_sinkhorn import AutoImplicit, AutoPosterior, Trace_EnergyScore
from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.losses.pairs import Simulator

Small = functools.partial(AutoPosterior, hidden=16, depth=1)
Blind = functools.partial(Small, covariates=None)  # of models that observe what they compute


def observe(mean, x):
    pyro.sample("x", dist.Normal(mean, 0.5).expand((*mean.shape[:-1], 2)).to_event(1), obs=x)


def locals_(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Gamma(2.0, 0.1))
        b = pyro.sample("b", dist.Dirichlet(torch.ones(2)))
        c = pyro.sample("c", dist.Normal(b, 1.0).to_event(1))
        observe(a.unsqueeze(-1) + c, x)


def only_globals(x):
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    s = pyro.sample("s", dist.HalfCauchy(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, s.unsqueeze(-1)).to_event(1), obs=x)


def both(x):
    m = pyro.sample("m", dist.Normal(0.0, 5.0))
    s = pyro.sample("s", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, s))
        observe(z.unsqueeze(-1), x)


def nested(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("documents", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        with pyro.plate("words", x.shape[-1]):
            k = pyro.sample("k", dist.Bernoulli(0.4))
            w = pyro.sample("w", dist.Normal(z + k, 0.3))
            pyro.sample("x", dist.Normal(w, 0.5), obs=x.T)


def inner_plate(x):
    data = pyro.plate("data", len(x), dim=-1)
    with pyro.plate("parts", 3, dim=-2), data:
        part = pyro.sample("part", dist.Normal(0.0, 1.0))
    with data:
        observe(part.sum(-2, keepdim=False).unsqueeze(-1), x)


def vectors_in_own_plates(x):
    with pyro.plate("components", 3):
        v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        s = pyro.sample("s", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal((v * s.unsqueeze(-1)).sum(-2, keepdim=True), 0.5).to_event(1), obs=x)


def vectors_above_locals(x):
    with pyro.plate("components", 3):  # at the dimension of the data
        v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(v.sum(-1).sum(-1, keepdim=True), 1.0))
        observe(z.unsqueeze(-1), x)


def discrete_global(x):
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.8])))
    m = pyro.sample("m", dist.Normal(k.double(), 1.0))
    with pyro.plate("data", len(x)):
        observe(m.unsqueeze(-1), x)


def discrete_local(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.OneHotCategorical(torch.ones(3)))
        b = pyro.sample("b", dist.Bernoulli(torch.full((2,), 0.3)).to_event(1))
        z = pyro.sample("z", dist.Normal(k.argmax(-1).double(), 0.2))
        observe(z.unsqueeze(-1) + b, x)


FLAT = [locals_, only_globals, both, inner_plate, vectors_in_own_plates, vectors_above_locals]
FLAT += [discrete_global, discrete_local]
FAMILY = [(model, (5, 2)) for model in FLAT] + [(nested, (5, 3))]
over_family = pytest.mark.parametrize(("model", "shape"), FAMILY, ids=lambda v: getattr(v, "__name__", ""))


def plain(value):
    """The shape less leading dimensions of size 1, which broadcast."""
    shape = list(value.shape)
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


def one_step(model, guide, *args, **options):
    loss = Trace_EnergyScore(**{"wake": False, "num_draws": 3, "num_simulations": 4} | options)
    return loss.differentiable_loss(model, guide, *args)


@over_family
def test_every_latent_is_drawn_in_its_shape_and_support(model, shape):
    x = torch.randn(shape)
    prior = poutine.trace(model).get_trace(x)
    guide = Blind(model)
    drawn = guide(x)
    latents = {
        name for name, site in prior.nodes.items() if site["type"] == "sample" and not site["is_observed"]
    }
    assert set(drawn) == latents - {"data", "documents", "words", "parts", "components"}
    for name, value in drawn.items():
        assert plain(value) == plain(prior.nodes[name]["value"]), name
        assert bool(prior.nodes[name]["fn"].support.check(value).all()), name


@over_family
def test_one_sleep_step_gives_every_parameter_a_gradient(model, shape):
    guide = Blind(model)
    guide(torch.randn(shape))
    optim = torch.optim.SGD(guide.parameters(), 1e-2)
    for _ in range(3):  # residual blocks are the identity at first, so their inner layers wait for a step
        optim.zero_grad()
        one_step(model, guide, torch.randn(shape), num_simulations=16).backward()
        optim.step()
    dead = [name for name, p in guide.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert not dead


@over_family
def test_serves_data_sets_of_other_sizes(model, shape):
    guide = Blind(model)
    for n in (5, 1, 12, 2):
        x = torch.randn(n, *shape[1:])
        drawn = guide(x)
        prior = poutine.trace(model).get_trace(x)
        assert all(plain(value) == plain(prior.nodes[name]["value"]) for name, value in drawn.items())
        assert bool(one_step(model, guide, x).isfinite())


@pytest.mark.parametrize("model", [only_globals, both, vectors_in_own_plates, discrete_global])
def test_globals_know_no_order_of_the_data(model):
    x, guide = torch.randn(20, 2), Small(model)
    guide(x)
    drawn = []
    for rows in (x, x[torch.randperm(20)], x[:19]):
        pyro.set_rng_seed(7)
        drawn.append(guide(rows))
    globals_ = [name for name, value in drawn[0].items() if name != "z"]
    for name in globals_:
        torch.testing.assert_close(drawn[0][name], drawn[1][name])
    assert any(not torch.equal(drawn[0][name], drawn[2][name]) for name in globals_)


def test_globals_know_how_many_data_there_are():
    x, guide = torch.randn(6, 2), Small(only_globals)
    guide(x)
    pyro.set_rng_seed(7)
    one = guide(x)
    pyro.set_rng_seed(7)
    twice = guide(torch.cat([x, x]))
    assert not torch.allclose(one["m"], twice["m"])


def test_masked_rows_do_not_count():
    def model(x, present):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=present):
            pyro.sample("x", dist.Normal(m, 0.5), obs=x)

    x, present = torch.randn(8), torch.arange(8) < 5
    guide = Small(model)
    guide(x, present)
    drawn = []
    for shown, there in ((x, present), (torch.where(present, x, torch.nan), present), (x[:5], present[:5])):
        pyro.set_rng_seed(7)
        drawn.append(guide(shown, there)["m"])
    torch.testing.assert_close(drawn[0], drawn[1])
    torch.testing.assert_close(drawn[0], drawn[2])


def test_a_row_with_a_zero_counts_where_another_site_is_masked():
    def model(x, y, present):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            with poutine.mask(mask=present):
                pyro.sample("x", dist.Normal(m, 0.5), obs=x)
            pyro.sample("y", dist.Normal(m, 0.5), obs=y)

    x, y, present = torch.randn(8), torch.randn(8).abs() + 1, torch.arange(8) < 5
    guide = Small(model)
    guide(x, y, present)
    y[6:] = 0.0
    drawn = []
    for rows in (slice(None), slice(6)):
        pyro.set_rng_seed(7)
        drawn.append(guide(x[rows], y[rows], present[rows])["m"].detach())
    assert not torch.allclose(*drawn)
    here = torch.arange(8) < 6  # nor do covariates make a row count that is masked
    reading = guide._reading(guide.last_inputs, (), {}, (x[:6], y[:6], present[:6]), {})
    assert reading.counted(reading.stacks()[0]) is None
    only = dataclasses.replace(reading, observed=[site for site in reading.observed if site.name == "x"])
    assert only.counted(only.stacks()[0]).tolist() == (here & present)[:6].tolist()


def test_globals_know_no_order_within_a_slice():
    # The outer plate gets the rightmost dimension where Pyro chooses.
    def model(x):
        spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", x.shape[1]):
            z = pyro.sample("z", dist.Normal(0.0, spread))
            with pyro.plate("members", len(x)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, guide = torch.randn(4, 6), Small(model)
    guide(x)
    within, across = x.clone(), x.clone()
    within[:, 2] = x[[3, 1, 0, 2], 2]
    across[0] = x[0].roll(1)
    drawn = []
    for shown in (x, within, across):
        pyro.set_rng_seed(7)
        drawn.append(guide(shown)["spread"].detach())
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-12, atol=0)
    assert abs(float(drawn[0] - drawn[2])) > 1e-9  # who belongs together counts


# Angles.


def headings(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.VonMises(0.5, 2.0))
        pyro.sample("x", dist.VonMises(z, 5.0), obs=x)


@pytest.mark.parametrize("kind", [Small, AutoImplicit])
def test_angles_are_read_whatever_their_branch(kind):
    """-pi and pi are one direction, and so is what lies turns away: data in [0, 2 pi) are usual."""
    guide, x = kind(headings), torch.linspace(-3.1, 3.1, 20)
    guide(x)

    def drawn(x):
        pyro.set_rng_seed(7)
        return guide(x)["z"].detach()

    away = (drawn(x + 2 * torch.pi) - drawn(x)).abs()
    torch.testing.assert_close(torch.minimum(away, 2 * torch.pi - away), torch.zeros(20), rtol=0, atol=1e-9)
    assert (drawn(x + 1) - drawn(x)).abs().max() > 1e-3


def test_an_angle_that_is_no_number_is_not_taken_for_a_missing_one():
    guide, x = Small(headings), torch.randn(20)
    guide(x)
    assert not guide(torch.where(torch.arange(20) == 3, torch.inf, x))["z"][3].isfinite()


# Covariates.


def regression(x, design):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(slope * design, 0.1), obs=x)


def slopes(guide, x, design):
    pyro.set_rng_seed(7)
    return guide(x, design)["slope"]


def test_covariates_are_read_by_default():
    x, design = torch.randn(10), torch.randn(10)
    guide = Small(regression)
    guide(x, design)
    assert not torch.equal(slopes(guide, x, design), slopes(guide, x, -design))
    blind = Small(regression, covariates=None)
    blind(x, design)
    assert torch.equal(slopes(blind, x, design), slopes(blind, x, -design))


def test_arguments_may_come_by_position_and_by_name():
    x, design = torch.randn(10), torch.randn(10)
    by_position, by_name = Small(regression), Small(regression)
    by_position(x, design)
    by_name(x, design=design)
    for guide in (by_position, by_name):
        # By name the observed values are those of a run of the model, which moves on the random state: noise is set.
        sites = poutine.trace(guide).get_trace(x, design).nodes.values()
        noise = {site["name"]: site["value"] for site in sites if site.get("infer", {}).get("is_auxiliary")}
        quiet = poutine.condition(guide, noise)
        named = quiet(x=x, design=design)["slope"]
        assert torch.equal(quiet(x, design)["slope"], named)
        assert not torch.equal(quiet(x, -design)["slope"], named)


def test_covariates_by_a_function():
    x, design = torch.randn(10), torch.randn(10)
    guide = Small(regression, covariates=lambda x, design: design.abs())
    guide(x, design)
    assert torch.equal(slopes(guide, x, design), slopes(guide, x, -design))
    assert not torch.equal(slopes(guide, x, design), slopes(guide, x, 2 * design))
    with pytest.raises(ProgramError, match=r"covariates function returned \(3,\).*'data'"):
        Small(regression, covariates=lambda x, design: design[:3])(x, design)
    with pytest.raises(ProgramError, match="covariates is 'all'"):
        Small(regression, covariates="all")


def test_covariates_that_may_be_the_data_are_warned_of():
    def model(raw, design):
        return regression(raw.log(), design)

    with pytest.warns(UserWarning, match=r"\['x'\] are no arguments"):
        Small(model)(torch.rand(10), torch.randn(10))


# An encoder of the user's.


@pytest.mark.parametrize("model", [locals_, both, inner_plate, discrete_local], ids=lambda m: m.__name__)
def test_an_encoder_sees_rows_and_learns(model):
    shapes = []

    class Encoder(nn.Linear):
        def forward(self, x):
            shapes.append(tuple(x.shape))
            return super().forward(x)

    encoder = Encoder(2, 4)
    guide = Small(model, encoder)
    guide(torch.randn(5, 2))
    one_step(model, guide, torch.randn(5, 2)).backward()
    assert (5, 2) in shapes and (20, 2) in shapes and {shape[1:] for shape in shapes} == {(2,)}
    assert bool((encoder.weight.grad != 0).any())


def test_an_encoder_of_images_side_by_side():
    class Pictures(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4, 3))

        def forward(self, x):
            return self.layers(x)

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample(
                "x",
                dist.Normal(z.reshape(*z.shape, 1, 1, 1), 1.0).expand(z.shape + x.shape[1:]).to_event(3),
                obs=x,
            )

    guide = Small(model, Pictures())
    assert guide(torch.randn(5, 1, 4, 4))["z"].shape == (5,)
    assert bool(one_step(model, guide, torch.randn(5, 1, 4, 4)).isfinite())
    assert bool(one_step(model, guide, torch.randn(1, 1, 4, 4)).isfinite())


def test_an_encoder_side_by_side_reads_the_rows_that_it_reads_alone():
    """Nested plates, the outer one innermost among the dimensions, and square, so that shapes hide a wrong order."""

    def model(x):
        with pyro.plate("documents", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("words", x.shape[1]):
                pyro.sample("x", dist.Normal(z, 0.01), obs=x.T)

    class Keep(nn.Module):
        def forward(self, x):
            self.seen = x
            return x

    keep = Keep()
    guide = Blind(model, keep)
    x = torch.arange(16.0).reshape(4, 4)
    guide(x)
    assert torch.equal(keep.seen, x)
    simulator = Simulator()
    pairs = simulator(model, (x,), {}, 3)
    seen, structure, _ = simulator.look(model, (x,), {})
    Trace_EnergyScore(num_draws=2).sleeper(guide, pairs, seen, structure, (x,), {})
    assert torch.equal(keep.seen, pairs.values["x"].transpose(1, 2).reshape(12, 4))


def test_what_an_encoder_must_return():
    with pytest.raises(ProgramError, match="expected an nn.Module"):
        Small(both, lambda x: x)
    with pytest.raises(ProgramError, match=r"encoder returned \(10,\).*\(5, width\)"):
        Small(both, nn.Flatten(0))(torch.randn(5, 2))


# State.


@pytest.mark.parametrize("model", [both, discrete_local], ids=lambda m: m.__name__)
def test_a_state_may_be_loaded_before_the_first_call(model):
    x, guide = torch.randn(6, 2), Small(model)
    guide(x)
    fresh = Small(model)
    fresh.load_state_dict(guide.state_dict())
    assert set(fresh.state_dict()) == set(guide.state_dict())
    outside = torch.get_rng_state()
    fresh(x)
    pyro.set_rng_seed(7)
    expected = guide(x)
    pyro.set_rng_seed(7)
    drawn = fresh(x)
    assert all(torch.equal(drawn[name], value) for name, value in expected.items())
    assert not torch.equal(outside, torch.get_rng_state())


def test_a_guide_pickles():
    x, guide = torch.randn(6, 2), Small(both)
    guide(x)
    pyro.set_rng_seed(7)
    expected = guide(x)
    pyro.clear_param_store()
    again = pickle.loads(pickle.dumps(guide))
    pyro.set_rng_seed(7)
    assert torch.equal(again(x)["z"], expected["z"])


def test_starts_from_a_fitted_encoder_of_wide_data():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand((*z.shape, 70)).to_event(1), obs=x)

    x, fitted = torch.randn(6, 70), AutoImplicit(model)
    fitted(x)
    guide = Small(model)
    guide.start_from(fitted)
    guide(x)
    trained = fitted.encoders[0].state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in guide.readers[0].state_dict().items())


# What it refuses.


def test_bounds_that_depend_on_latents_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.02))
            z = pyro.sample("z", dist.Uniform(0.0, 1.0 + k))
            observe(z.unsqueeze(-1), x)

    with pytest.raises(ProgramError, match=r"(?s)'z'.*depend on other latents"):
        Small(model)(torch.randn(20, 2))


def test_bounds_may_follow_covariates():
    def model(x, high):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, high))
            observe(z.unsqueeze(-1), x)

    high = torch.tensor([1.0, 100.0, 3.0])
    drawn = Small(model)(torch.randn(3, 2), high)["z"]
    assert bool((drawn < high).all() and (drawn > 0).all())


def test_globals_of_a_sub_sample_are_refused():
    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=2) as index:
            observe(m.unsqueeze(-1), x[index])

    with pytest.raises(ProgramError, match=r"'data' sub-samples 2 of 5.*\['m'\]"):
        Small(model)(torch.randn(5, 2))


def test_data_of_another_width_are_refused():
    guide = Small(locals_)
    guide(torch.randn(5, 2))

    def wider(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Gamma(2.0, 0.1))
            pyro.sample("b", dist.Dirichlet(torch.ones(2)))
            pyro.sample("c", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            observe(a.unsqueeze(-1), x)

    guide._model = (wider,)
    with pytest.raises(ProgramError, match="made for 2 numbers a slice.*now gets 4"):
        guide(torch.randn(5, 4))


def test_a_model_without_latents_and_one_that_observes_nothing_are_refused():
    def no_latent(x):
        with pyro.plate("data", len(x)):
            observe(torch.zeros(len(x), 1), x)

    def no_data(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match="no latent site"):
        Small(no_latent)(torch.randn(5, 2))
    with pytest.raises(ProgramError, match="observes nothing"):
        Small(no_data)(torch.randn(5, 2))


@pytest.mark.parametrize("model", [locals_, only_globals, both])
def test_data_in_single_precision(model):
    guide = Small(model)
    drawn = guide(torch.randn(5, 2, dtype=torch.float32))
    assert all(value.dtype == torch.float64 for value in drawn.values())  # the priors'
    assert bool(one_step(model, guide, torch.randn(5, 2, dtype=torch.float32)).isfinite())
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()
    single = Small(model)
    assert single(torch.randn(5, 2))["m" if model is not locals_ else "a"].dtype == torch.float32
    assert bool(one_step(model, single, torch.randn(5, 2)).isfinite())


def test_an_empty_data_set_is_named():
    with pytest.raises(ProgramError, match="the batch is empty"):
        Small(both)(torch.zeros(0, 2))
