"""The automatic guide: every latent, in its support, with its own noise, from networks that all learn."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn

from pyro_sinkhorn import AutoImplicit, Trace_Sinkhorn
from pyro_sinkhorn.distributions import HypersphericalUniform
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.geometry import Geometry, registry
from pyro_sinkhorn.guide.encoder import Standardise
from pyro_sinkhorn.structure import is_latent, sample_sites

PARTICLES = "num_particles_vectorized"


def observe(mean, x):
    pyro.sample("x", dist.Normal(mean, 0.5).expand(x.shape).to_event(1), obs=x)


def line(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(1.0, 3.0))
        observe(z.unsqueeze(-1), x)


def supports(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Gamma(2.0, 0.1))
        b = pyro.sample("b", dist.Beta(torch.ones(2), 2.0).to_event(1))
        c = pyro.sample("c", dist.Dirichlet(torch.ones(3)))
        d = pyro.sample("d", HypersphericalUniform(3))
        e = pyro.sample("e", dist.VonMises(0.0, 1.0))
        f = pyro.sample("f", dist.Cauchy(torch.zeros(2), 1.0).to_event(1))
        observe(
            (a + e).unsqueeze(-1) + b.sum(-1, keepdim=True) + c.sum(-1, keepdim=True) + (d[..., :2] + f), x
        )


def chain(x):
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        z2 = pyro.sample("z2", dist.Normal(z1, 0.2).to_event(1))
        observe(z2, x)


def globals_(x):
    m = pyro.sample("m", dist.Normal(0.0, 5.0))
    s = pyro.sample("s", dist.Gamma(2.0, 2.0))
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, s))
        observe(z.unsqueeze(-1) + p @ v, x)


def only_globals(x):
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    with pyro.plate("data", len(x)):
        observe(m, x)


def nested(x):
    with pyro.plate("documents", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("words", x.shape[-1]):
            w = pyro.sample("w", dist.Normal(z[..., 0], 0.3))
            pyro.sample("x", dist.Normal(w, 0.5), obs=x.T)


def inner_plate(x):
    data = pyro.plate("data", len(x), dim=-1)
    with data, pyro.plate("parts", 3, dim=-2):
        part = pyro.sample("part", dist.Dirichlet(torch.ones(2)))
    with data:
        observe(part.sum(-3), x)


def sub_sampled(x):
    with pyro.plate("data", len(x), subsample_size=len(x) // 2) as index:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        observe(z, x[index])


def covariates(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(100 * x, 0.1).to_event(1))
        observe(z, x)


def counts(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x.exp().round().long())


ZOO = {
    program.__name__: program
    for program in (
        line,
        supports,
        chain,
        globals_,
        only_globals,
        nested,
        inner_plate,
        sub_sampled,
        covariates,
        counts,
    )
}


@pytest.fixture(params=ZOO)
def model(request):
    return ZOO[request.param]


def data(n=16):
    return torch.randn(n, 2)


def latents(trace):
    return {name: site for name, site in sample_sites(trace) if is_latent(site)}


# Laws over all programs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("global_guide", ["normal", "delta"])
def test_every_latent_is_made_in_its_shape_and_support(model, dtype, global_guide):
    torch.set_default_dtype(dtype)
    guide, x = AutoImplicit(model, global_guide=global_guide), data()
    for batch in (x, x[:6], data(20)):  # the last minibatch is smaller; the next epoch's first is not
        trace = poutine.trace(guide).get_trace(batch)
        scored = poutine.trace(poutine.replay(model, trace=trace)).get_trace(batch)
        expected = latents(poutine.trace(model).get_trace(batch))
        assert latents(trace).keys() == expected.keys()
        for name, site in expected.items():
            value = trace.nodes[name]["value"]
            assert value is scored.nodes[name]["value"]
            assert value.shape == site["value"].shape
            assert value.dtype == dtype
            assert site["fn"].support.check(value.double() if dtype == torch.float32 else value).all() or (
                name in "cpd" and dtype == torch.float32  # sums to 1 within float32
            )
        if model is sub_sampled:
            assert torch.equal(trace.nodes["data"]["value"], scored.nodes["data"]["value"])


def test_the_call_returns_what_it_sampled(model):
    guide, x = AutoImplicit(model), data()
    with poutine.trace() as tracer:
        returned = guide(x)
    assert returned.keys() == latents(tracer.trace).keys()
    assert all(value is tracer.trace.nodes[name]["value"] for name, value in returned.items())


def test_every_parameter_is_known_to_svi_and_learns(model):
    guide, x = AutoImplicit(model), data()
    svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=Trace_Sinkhorn(match_size=4))
    svi.step(x)
    before = {name: parameter.clone() for name, parameter in guide.named_parameters()}
    assert before
    svi.step(x)
    assert not [name for name, parameter in guide.named_parameters() if torch.equal(parameter, before[name])]
    store = pyro.get_param_store()
    assert {id(p) for p in guide.parameters()} == {id(store._params[name]) for name in store}


def test_vectorised_particles_and_slices_have_noise_of_their_own(model):
    guide, x = AutoImplicit(model), torch.ones(8, 2)
    guide(x)
    with pyro.plate(PARTICLES, 3, dim=-3):
        values = guide(x)
    for name, value in values.items():
        assert value.shape[0] == 3, name
        assert not torch.equal(value[0], value[1])
    # All data are equal, so that slices differ by their noise alone.
    for value in values.values():
        columns = value.reshape(3, -1)
        assert len(columns[0].unique()) > 1 or columns.shape[1] == 1


def test_a_copy_is_a_guide_of_its_own(model):
    guide, x = AutoImplicit(model), data()
    guide(x)
    twin = copy.deepcopy(guide)
    pyro.set_rng_seed(1)
    values = guide(x)
    pyro.set_rng_seed(1)
    with pyro.get_param_store().scope():  # in one store, PyroModules of one name share their values
        assert all(torch.equal(value, values[name]) for name, value in twin(x).items())
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in guide.parameters()}


def test_the_same_seed_makes_the_same_guide_and_draws(model):
    x = data()

    def draw():
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        return AutoImplicit(model)(x)

    first = draw()
    assert all(torch.equal(value, first[name]) for name, value in draw().items())


# Noise


def test_without_noise_the_guide_is_deterministic():
    guide, x = AutoImplicit(chain, noise_dim=0), data()
    assert torch.equal(guide(x)["z2"], guide(x)["z2"])
    assert not [name for name, _ in sample_sites(poutine.trace(guide).get_trace(x)) if "noise" in name]


def test_noise_is_an_auxiliary_site_in_the_plates_of_its_group():
    trace = poutine.trace(AutoImplicit(nested, noise_dim=7)).get_trace(data(4))
    noise = [site for _, site in sample_sites(trace) if site["infer"].get("is_auxiliary")]
    assert [site["value"].shape for site in noise] == [(4, 7), (2, 4, 7)]


# Where latents start


def test_latents_start_at_the_location_and_scale_of_the_prior():
    def model(x):
        with pyro.plate("data", len(x)):
            far = pyro.sample("far", dist.Normal(100.0, 3.0))
            positive = pyro.sample("positive", dist.LogNormal(5.0, 0.1))
            bounded = pyro.sample("bounded", dist.Uniform(-7.0, -3.0))
            observe((far + positive + bounded).unsqueeze(-1), x)

    values = AutoImplicit(model)(data(500))
    assert abs(values["far"].mean() - 100) < 6
    assert 0.5 < values["far"].std() < 12
    assert abs(values["positive"].log().mean() - 5) < 0.3
    assert 0.01 < values["positive"].log().std() < 0.4
    assert -6 < values["bounded"].mean() < -4


def test_locals_follow_the_global_above_them():
    guide, x = AutoImplicit(globals_), data()
    guide(x)
    m = guide.global_guides[0]
    assert m.site_name == "m"
    with torch.no_grad():
        m.loc.fill_(1000.0)
    values = guide(x)
    assert abs(values["z"].mean() - values["m"]) < 50
    values["z"].sum().backward()
    assert m.loc.grad == pytest.approx(len(x))


def test_locals_follow_their_covariates():
    x = data()
    values = AutoImplicit(covariates)(x)
    assert (values["z"] - 100 * x).abs().max() < 2


def test_a_latent_below_another_is_not_tied_to_a_fresh_draw_of_it():
    """Its prior mean in an auxiliary run is that of another z1: it must not leak into the guide."""
    guide, x = AutoImplicit(chain, noise_dim=0), data()
    assert torch.equal(guide(x)["z2"], guide(x)["z2"])


def test_a_prior_that_loses_its_moments_later_is_reported():
    guide, x = AutoImplicit(covariates), data()
    guide(x)
    with pyro.validation_enabled(False):
        x[2] = torch.nan
        with pytest.raises(
            NonFiniteError, match="latent site 'z': the mean or standard deviation of its prior"
        ):
            guide(x)


# Globals


def test_guides_of_globals_have_a_density_and_stay_in_the_support():
    guide, x = AutoImplicit(globals_), data()
    trace = poutine.trace(guide).get_trace(x)
    for name, shape in [("m", ()), ("s", ()), ("p", (3,)), ("v", (3, 2))]:
        site = trace.nodes[name]
        assert site["value"].shape == shape
        assert site["fn"].log_prob(site["value"]).isfinite().all()
    assert trace.nodes["v"]["fn"].batch_shape == (3,)
    assert trace.nodes["s"]["value"] > 0


def test_several_globals_do_not_share_parameters():
    guide, x = AutoImplicit(globals_), data()
    guide(x)
    names = [name for name in pyro.get_param_store() if "global" in name]
    assert len(names) == len(set(names)) == 8
    assert {id(g.scale.unconstrained()) for g in guide.global_guides} == {
        id(pyro.get_param_store()._params[name]) for name in names if name.endswith("scale")
    }


def test_a_point_guide_of_a_global():
    guide, x = AutoImplicit(globals_, global_guide="delta"), data()
    first, second = guide(x), guide(x)
    for name in ("m", "s", "p", "v"):
        assert torch.equal(first[name], second[name])


def test_a_discrete_global_is_refused_by_name():
    def model(x):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            observe(k, x)

    with pytest.raises(
        ProgramError, match=r"global latent 'k' is a Bernoulli with the discrete support Boolean\(\)"
    ):
        AutoImplicit(model)(data())


# Encoders


class Spy(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.linear = nn.Linear(2, width)
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return self.linear(x)


@pytest.mark.filterwarnings("ignore::pyro_sinkhorn.ot.ConvergenceWarning")  # its codes are wild
def test_the_users_encoder_sees_the_values_as_they_are_and_learns():
    spy, x = Spy(), 1000 * data()
    guide = AutoImplicit(line, encoder=spy)
    svi = SVI(line, guide, Adam({"lr": 1e-3}), loss=Trace_Sinkhorn(match_size=4))
    svi.step(x)
    assert all(seen is x for seen in spy.seen)
    before = spy.linear.weight.clone()
    svi.step(x)
    assert not torch.equal(spy.linear.weight, before)


def test_the_users_encoder_sees_the_sub_sample():
    spy, x = Spy(), data()
    guide = AutoImplicit(sub_sampled, encoder=spy)
    trace = poutine.trace(guide).get_trace(x)
    assert torch.equal(spy.seen[-1], x[trace.nodes["data"]["value"]])


def test_set_up_leaves_no_mark_on_the_users_encoder():
    encoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
    guide, x = AutoImplicit(line, encoder=encoder), data()
    for step in (1, 2):
        guide(x)
        assert encoder[1].num_batches_tracked == step


def test_an_encoder_of_several_observed_sites_gets_a_dictionary():
    class Both(nn.Module):
        def forward(self, values):
            return torch.cat([values["x"], values["y"].unsqueeze(-1)], -1)

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            observe(z.unsqueeze(-1), x)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    assert AutoImplicit(model, encoder=Both())(data(), torch.randn(16))["z"].shape == (16,)


def test_encoder_input_replaces_what_is_read():
    spy = Spy()

    def model(x, extra):
        line(x)

    extra = data()
    AutoImplicit(model, encoder=spy, encoder_input=lambda x, extra: extra)(data(), extra)
    assert spy.seen[-1] is extra
    guide = AutoImplicit(
        model, encoder_input=lambda x, extra: extra.unsqueeze(1).expand(-1, 3, -1), noise_dim=0
    )
    values = guide(data(), extra)["z"]
    assert torch.equal(values, guide(data(), extra)["z"])  # x is not read
    assert guide.encoders[0].standardise.loc.shape == (6,)


@pytest.mark.parametrize("encoder_input", [lambda x: x, lambda x: x.flatten(), lambda x: 3.0])
def test_encoder_input_must_have_a_row_for_each_slice(encoder_input):
    with pytest.raises(
        ProgramError, match=r"\(z\): encoder_input returned .* first dimensions are \(8,\).*\['data'\]"
    ):
        AutoImplicit(sub_sampled, encoder_input=encoder_input)(data())


@pytest.mark.parametrize(
    ("encoder", "got"),
    [
        (nn.Flatten(0), r"\(32,\)"),
        (
            nn.Linear(2, 2).requires_grad_(False) and nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (8, 4))),
            r"\(8, 4\)",
        ),
        (nn.LSTM(2, 2), "tuple"),
    ],
)
def test_an_encoder_must_return_a_code_for_each_slice(encoder, got):
    with pytest.raises(ProgramError, match=rf"\(z\): the encoder returned {got}; expected .* \(16, width\)"):
        AutoImplicit(line, encoder=encoder.to(torch.float64))(data())


def test_arguments_are_checked():
    with pytest.raises(ProgramError, match="encoder is a function: expected an nn.Module"):
        AutoImplicit(line, encoder=lambda x: x)
    with pytest.raises(ProgramError, match=r"global_guide is 'beta': expected one of \['delta', 'normal'\]"):
        AutoImplicit(line, global_guide="beta")


def test_a_model_without_latents():
    def model(x):
        with pyro.plate("data", len(x)):
            observe(0.0, x)

    with pytest.raises(ProgramError, match="no latent site to guide"):
        AutoImplicit(model)(data())


def test_data_of_another_width():
    guide = AutoImplicit(line)
    guide(data())
    with pytest.raises(
        ProgramError, match=r"\(z\): the encoder was made for 2 observed numbers .* now gets 5"
    ):
        guide(torch.randn(16, 5))


def test_a_model_that_is_a_module_is_no_part_of_its_guide():
    class Model(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(1, 2)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                observe(self.decoder(z.unsqueeze(-1)), x)

    model = Model()
    guide = AutoImplicit(model)
    guide(data())
    assert not {id(p) for p in guide.parameters()} & {id(p) for p in model.parameters()}
    assert guide.model is model


def test_networks_made_without_gradients_can_learn():
    guide = AutoImplicit(line)
    with torch.no_grad():
        guide(data())
    assert all(parameter.requires_grad for parameter in guide.parameters())
    assert guide(data())["z"].requires_grad


def test_a_first_call_that_fails_can_be_repeated(monkeypatch):
    monkeypatch.setattr(registry, "_BY_TYPE", dict(registry._BY_TYPE))
    monkeypatch.delitem(registry._BY_SUPPORT, type(dist.constraints.corr_cholesky))

    def program(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            r = pyro.sample("r", dist.LKJCholesky(2, 1.0))
            observe(z.unsqueeze(-1) + r[..., 1, :], x)

    guide, x = AutoImplicit(program), data()
    for _ in range(2):
        with pytest.raises(ValueError, match="latent site 'r'"):
            guide(x)
    registry.register_geometry(dist.LKJCholesky, Rotation)
    svi = SVI(program, guide, Adam({"lr": 1e-3}), loss=Trace_Sinkhorn(match_size=4))
    assert torch.tensor(svi.step(x)).isfinite()
    assert len(guide.global_guides) == len(guide.heads) == 1


class Rotation(Geometry):
    def __init__(self, fn):
        super().__init__(fn.event_shape, dim=1, num_raw=1)

    def head(self, raw):
        c, s = raw[..., 0].tanh(), 1 / raw[..., 0].cosh()
        return self.unflatten(torch.stack([torch.ones_like(c), torch.zeros_like(c), c, s], -1))

    def embed(self, value):
        return value[..., 1, :1]


def test_inputs_of_the_last_call_are_kept():
    guide, x = AutoImplicit(line), data()
    guide(data())
    guide(x)
    assert guide.last_inputs.keys() == {"x"}
    assert guide.last_inputs["x"] is x


# Standardisation


def test_standardisation_is_robust():
    x = torch.randn(400, 4)
    x[:, 1] = 5.0  # constant
    x[:, 2] *= 1e6
    x[0] = 1e9
    x[1] = torch.nan
    layer = Standardise(4)
    layer.fit(x)
    out = layer(x[2:])
    assert out.isfinite().all()
    assert out.abs().max() < 5
    assert 0.2 < out[:, 2].std() < 2
    assert layer(torch.full((1, 4), 1e9)).isfinite().all()
    assert layer.state_dict().keys() == {"loc", "scale"}


def test_a_feature_that_first_varies_later_does_not_explode():
    layer = Standardise(2)
    layer.fit(torch.stack([torch.randn(100), torch.zeros(100)], -1))
    assert layer(torch.tensor([[0.0, 1.0]])).abs().max() < 4
    layer.fit(torch.zeros(10, 2))
    assert (layer(torch.zeros(1, 2)) == 0).all()
