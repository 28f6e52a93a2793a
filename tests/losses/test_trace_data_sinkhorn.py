"""Simulated data against observed data: what is compared, how it is scaled, and that parameters come out right."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.optim import Adam, PyroLRScheduler
from torch import nn

from pyro_sinkhorn import Implicit, SinkhornProgram, Trace_DataSinkhorn
from pyro_sinkhorn.losses.data_match import mean_cost_within
from pyro_sinkhorn.losses.simulation import run_simulated
from pyro_sinkhorn.scoring import run_guide


def nothing(*_args):
    """An empty guide."""


def cosine(num_steps, lr):
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "T_max": num_steps}
    return PyroLRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR, schedule)


def fit(model, *args, num_steps, lr=0.05, batch_size=128, guide=None, **options):
    options = {"match_size": 64} | options
    program = SinkhornProgram(model, guide, Trace_DataSinkhorn(**options))
    program.fit(
        *args,
        num_steps=num_steps,
        batch_size=batch_size,
        seed=0,
        optim=cosine(num_steps, lr),
        progress=False,
    )
    with program.active():
        return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def compared(model, *args, guide=nothing, **options):
    """The simulation of one call, and the loss that compared it."""
    loss = Trace_DataSinkhorn(match_size=8, **({"covariates": None} | options))
    call = loss.simulation(model, guide, args, {})
    loss.data_match(call)
    return call, loss


def scaled(x):
    d = x.shape[-1]
    scale = pyro.param("scale", torch.full((d,), 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", Implicit(scale * torch.randn(len(x), d), event_dim=1), obs=x)


# What is learned


@pytest.mark.parametrize(("debias", "num_steps"), [("independent", 500), ("self", 250)])
def test_spread_is_learned_with_independent_halves_alone(debias, num_steps):
    """Against fresh data at every step: the truth is 1, and only the optimiser's own noise is left."""
    svi_optim = cosine(num_steps, 0.03)
    svi = SVI(scaled, nothing, svi_optim, Trace_DataSinkhorn(match_size=64, debias=debias))
    values = []
    for i in range(num_steps):
        svi.step(torch.randn(128, 8))
        svi_optim.step()
        if i >= num_steps // 2:
            values.append(pyro.param("scale").detach().abs().mean())
    value = float(torch.stack(values).mean())
    if debias == "independent":
        assert value == pytest.approx(1, abs=0.02)
    else:
        assert value < 0.97


def test_a_likelihood_with_rsample_is_simulated():
    def model(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    x = torch.randn(1000, 2) + torch.tensor([2.0, -1.0])
    found = fit(model, x, num_steps=300)
    # the sampling error of a mean of 1000 data is .03; that of the fit comes on top
    assert torch.allclose(found["loc"], x.mean(0), atol=0.1)


def test_observed_sites_are_compared_jointly():
    """Each site alone has the same law for every correlation: only the pairs tell."""

    def model(x, y):
        rho = pyro.param("rho", torch.tensor(-0.3), constraint=constraints.interval(-1, 1))
        with pyro.plate("data", len(x)):
            u, v = torch.randn(2, len(x))
            pyro.sample("x", Implicit(u), obs=x)
            pyro.sample("y", Implicit(rho * u + (1 - rho**2).sqrt() * v), obs=y)

    u, v = torch.randn(2, 2000)
    found = fit(model, u, 0.8 * u + 0.6 * v, num_steps=400)
    assert float(found["rho"]) == pytest.approx(0.8, abs=0.06)


def conditional(t, y):
    slope = pyro.param("slope", torch.tensor(-0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", Implicit(slope * t + 0.3 * torch.randn(len(y))), obs=y)


@pytest.mark.parametrize(("covariates", "slope"), [("auto", 1.0), (lambda t, y: t, 1.0), (None, -1.0)])
def test_covariates_are_appended(covariates, slope):
    """With t symmetric both signs of the slope give the same outputs; without the pairs the nearer one wins."""
    t = torch.randn(2000)

    def in_a_small_unit(t, y):
        conditional(1000 * t, y)

    found = fit(
        in_a_small_unit,
        t / 1000,  # the unit must not matter
        t + 0.3 * torch.randn(2000),
        num_steps=300,
        covariates=covariates,
    )
    assert float(found["slope"]) == pytest.approx(slope, abs=0.06)


def test_a_latent_is_drawn_from_its_prior():
    def model(x):
        spread = pyro.param("spread", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            z = pyro.sample("z", dist.Normal(3.0 * k, spread))
            pyro.sample("x", Implicit(z), obs=x)

    x = 3.0 * torch.randint(2, (2000,)) + torch.randn(2000)
    assert float(fit(model, x, num_steps=300)["spread"]) == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoDelta])
def test_a_global_is_inferred_by_a_guide_with_a_density(autoguide):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", Implicit(mu + torch.randn(len(x))), obs=x)

    guide = autoguide(poutine.block(model, expose=["mu"]))
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_DataSinkhorn(match_size=64))
    x = torch.randn(128) + 3
    for _ in range(200):
        svi.step(x)
    assert float(guide.median()["mu"]) == pytest.approx(float(x.mean()), abs=0.2)


def test_a_factor_is_added():
    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.factor("penalty", -5.0 * loc.abs() - 7.0)
        with pyro.plate("data", len(x)):
            pyro.sample("x", Implicit(loc + torch.randn(len(x))), obs=x)

    x = torch.randn(64)
    loss = Trace_DataSinkhorn(match_size=32)
    pyro.set_rng_seed(0)
    whole = loss.loss(model, nothing, x)
    assert whole == pytest.approx(7 + 64 * loss.terms.match["x"])


# What is simulated, and what is compared


def test_a_parent_is_simulated_too():
    """The data of a parent must not leak into the simulation of its child."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            first = pyro.sample("x", Implicit(torch.zeros(len(x))), obs=x)
            pyro.sample("y", Implicit(first + 1), obs=y)

    call, _ = compared(model, torch.full((16,), 5.0), torch.zeros(16))
    assert (call.simulated.nodes["y"]["value"] == 1).all()
    assert (call.observed.nodes["x"]["value"] == 5).all()


def test_condition_gives_data_as_obs_does():
    x = torch.randn(16, 2)

    def model():
        with pyro.plate("data", 16):
            pyro.sample("x", Implicit(torch.zeros(16, 2), event_dim=1))

    call, _ = compared(pyro.condition(model, {"x": x}))
    assert call.observed.nodes["x"]["value"] is x


def test_the_gradient_is_that_of_the_loss():
    """Finite differences under the same noise, at a tight tolerance."""
    x = torch.randn(32, 2) * torch.tensor([1.0, 2.0])
    loss = Trace_DataSinkhorn(match_size=16, tolerance=1e-9, max_iters=20_000)

    def at(scale):
        pyro.set_rng_seed(1)
        return loss.differentiable_loss(scaled, nothing, x)

    at(None)
    parameter = pyro.param("scale")
    (gradient,) = torch.autograd.grad(at(parameter), parameter)
    for i in range(2):
        shifted = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[i] += sign * 1e-5
                shifted.append(at(parameter))
                parameter[i] -= sign * 1e-5
        assert float((shifted[0] - shifted[1]) / 2e-5) == pytest.approx(float(gradient[i]), rel=1e-5)


def test_equal_laws_are_at_zero_on_average():
    """The mean of independent evaluations within 5 standard errors of 0; same-batch terms are far off."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", Implicit(torch.randn(len(x), 4), event_dim=1), obs=x)

    def mean_and_error(debias):
        loss = Trace_DataSinkhorn(match_size=16, debias=debias)
        values = torch.tensor([loss.loss(model, nothing, torch.randn(32, 4)) / 32 for _ in range(200)])
        return float(values.mean()), float(values.std()) / math.sqrt(200)

    mean, error = mean_and_error("independent")
    assert abs(mean) < 5 * error
    mean, error = mean_and_error("self")
    assert mean > 20 * error


@pytest.mark.parametrize("vectorize", [False, True])
def test_particles_are_clouds_of_their_own(vectorize):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)

    x = torch.randn(32, 2)
    loss = Trace_DataSinkhorn(match_size=16, num_particles=64, vectorize_particles=vectorize)
    one = Trace_DataSinkhorn(match_size=16)
    single = torch.tensor([one.loss(model, nothing, x) for _ in range(100)])
    many = torch.tensor([loss.loss(model, nothing, x) for _ in range(3)])
    error = float(single.std()) * math.sqrt(1 / 100 + 1 / 64)
    assert (many - single.mean()).abs().max() < 5 * error


def test_the_loss_is_per_datum_times_data():
    x = torch.randn(64, 2)
    loss = Trace_DataSinkhorn(match_size=16, weight=3.0)
    value = loss.loss(scaled, nothing, x)
    assert value == pytest.approx(3 * 64 * loss.terms.match["x"])
    assert loss.terms.loss == pytest.approx(value / 64)
    assert math.isnan(loss.terms.reconstruction)


def test_a_sub_sampled_plate_stands_for_all_data():
    full, t = torch.randn(100), torch.randn(100)

    def model(t, x):
        with pyro.plate("data", 100, subsample_size=20) as index:
            simulated = pyro.param("scale", torch.tensor(1.0)) * torch.randn(20)
            pyro.sample("x", Implicit(simulated + t[index]), obs=x[index])

    call, loss = compared(model, t, full, covariates="auto")
    index = call.simulated.nodes["data"]["value"]
    assert torch.equal(call.observed.nodes["x"]["value"], full[index])
    loss.loss(model, nothing, t, full)
    assert loss.terms.loss == pytest.approx(loss.terms.match["x"])
    assert "covariates of x" in loss.data_match.state.units


def test_masked_data_do_not_count():
    def model(x, mask):
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("x", Implicit(pyro.param("loc", torch.zeros(2)) + torch.zeros(len(x), 2), 1), obs=x)

    x = torch.zeros(32, 2)
    x[20:] = 1e6
    mask = torch.arange(32) < 20
    loss = Trace_DataSinkhorn(match_size=10)
    assert loss.loss(model, nothing, x, torch.arange(32) < 1) == 0  # one datum cannot be split
    assert loss.loss(model, nothing, x, mask) == pytest.approx(0, abs=1e-9)
    x[:10] = 1e6
    assert loss.loss(model, nothing, x, mask) > 1
    assert loss.loss(model, nothing, x, torch.zeros(32, dtype=torch.bool)) == 0


def test_data_of_nested_plates_carry_those_around_them():
    """The words of a document are compared together with its title: apart, both laws agree."""

    def model(title, words):
        n, m = words.shape
        with pyro.plate("documents", n, dim=-2):
            a = pyro.sample("title", Implicit(torch.randn(n, 1)), obs=title)
            with pyro.plate("words", m, dim=-1):
                pyro.sample("word", Implicit(sign * a + 0.1 * torch.randn(n, m)), obs=words)

    title = torch.randn(64, 1)
    words = title + 0.1 * torch.randn(64, 3)
    loss = Trace_DataSinkhorn(match_size=32)
    sign = 1
    loss.loss(model, nothing, title, words)
    assert abs(loss.terms.match["word"]) < 0.1
    sign = -1
    loss.loss(model, nothing, title, words)
    assert loss.terms.match["word"] > 0.2


def test_minibatches_in_fit_stand_for_all_data():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", Implicit(loc + torch.randn(len(x))), obs=x)

    def guide(x):
        loc = pyro.param("loc_q", torch.tensor(1.0))
        pyro.sample("loc", dist.Delta(loc))

    seen = []

    class Watched(Trace_DataSinkhorn):
        def loss_and_grads(self, *args, **kwargs):
            seen.append(super().loss_and_grads(*args, **kwargs))
            return seen[-1]

    program = SinkhornProgram(model, guide, Watched(match_size=16))
    program.fit(torch.randn(320), num_steps=1, batch_size=32, seed=0, progress=False)
    # 320 data, of which 32 were seen: the divergence counts ten times, and terms are per datum of all
    assert seen[0] == pytest.approx(320 * program.history.loss[0])
    assert program.history.match[0] == pytest.approx(
        program.history.loss[0] - program.loss.terms.globals, rel=1e-6
    )


# Units


def test_scale_of_a_site_and_of_its_columns():
    x = torch.randn(64, 2) * torch.tensor([1.0, 100.0])

    def units(scale):
        return compared(scaled, x, scale=scale)[1].data_match.state.units["x"]

    assert units("site") == pytest.approx(float(x.var(0, correction=0).mean().sqrt()))
    assert torch.allclose(units("column"), x.std(0, correction=0))
    assert units(None) == 1


def test_a_constant_column_keeps_its_unit():
    x = torch.stack([torch.randn(64), torch.zeros(64)], -1)
    assert compared(scaled, x, scale="column")[1].data_match.state.units["x"][1] == 1


def test_columns_in_units_of_their_own_leave_the_loss_alone():
    """With scale="column" the unit of measurement of a column is no part of the answer."""

    def value(factor):
        def model(x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", Implicit(torch.randn(len(x), 2) * factor, event_dim=1), obs=x)

        pyro.set_rng_seed(3)
        return Trace_DataSinkhorn(match_size=16, scale="column").loss(model, nothing, data * factor)

    data = 2 * torch.randn(32, 2)
    assert value(torch.tensor([1.0, 1e4])) == pytest.approx(value(torch.ones(2)))


def test_a_support_chooses_the_cost():
    """Positive data are compared by ratios where the support says so."""

    def model(x, support):
        with pyro.plate("data", len(x)):
            pyro.sample("x", Implicit(x * 10, support=support), obs=x)

    x = torch.rand(32).exp()
    call, loss = compared(model, x, constraints.positive)
    points = loss.data_match._points(call.observed, call.groups[0], ())
    unit = loss.data_match.state.units["x"]
    assert torch.allclose(points[0, :, 0] * unit, x.log())


def test_mean_cost_leaves_out_the_diagonal():
    points = torch.tensor([[[0.0], [1.0], [3.0]]])
    assert mean_cost_within("sqeuclidean", points) == pytest.approx((1 + 9 + 4) / 3)
    assert mean_cost_within("sqeuclidean", torch.ones(1, 4, 2)) == 1


def test_discrete_data_are_compared_without_a_gradient():
    """The second way out of the error: a derivative-free search over ``loss``."""
    scipy_optimize = pytest.importorskip("scipy.optimize")
    x = torch.distributions.Poisson(torch.tensor(7.0)).sample((2048,)).long()
    k = torch.distributions.Categorical(torch.tensor([0.2, 0.8])).sample((2048,))

    def model(x, k):
        rate = pyro.param("rate", torch.tensor(2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)
            pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.8])), obs=k)

    loss = Trace_DataSinkhorn(match_size=128)
    loss.loss(model, nothing, x, k)
    assert loss.terms.match.keys() == {"x, k"}

    def objective(rate):
        pyro.get_param_store()["rate"] = torch.tensor(rate)
        pyro.set_rng_seed(0)
        return loss.loss(model, nothing, x, k)

    found = scipy_optimize.minimize_scalar(
        objective, bounds=(1.0, 20.0), method="bounded", options={"xatol": 0.1}
    ).x
    assert found == pytest.approx(float(x.double().mean()), abs=0.6)


# In a program


def test_a_program_makes_no_guide_and_generates():
    program = SinkhornProgram(scaled, loss=Trace_DataSinkhorn(match_size=16))
    program.fit(torch.randn(64, 2), num_steps=2, batch_size=32, seed=0, progress=False)
    assert program.generate(5, torch.zeros(7, 2))["x"].shape == (5, 7, 2)
    assert repr(program) == "SinkhornProgram(scaled, no_guide, Trace_DataSinkhorn, 2 steps)"


def test_a_program_of_another_loss_gets_its_guide():
    program = SinkhornProgram(scaled, loss=Trace_DataSinkhorn())
    assert type(SinkhornProgram(program).guide).__name__ == "function"

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    other = SinkhornProgram(SinkhornProgram(model), loss=Trace_DataSinkhorn())
    assert other.guide.__name__ == "no_guide"


def test_the_report_compares_with_the_floor(capsys):
    x = torch.randn(64, 2)
    program = SinkhornProgram(scaled, loss=Trace_DataSinkhorn(match_size=32))
    report = program.diagnose(x, seed=0).match
    (row,) = report.groups
    assert (row.name, row.encoder_variance, report.reconstruction) == ("x", None, None)
    assert row.z > 5
    assert "x: the simulated data are not the data" in capsys.readouterr().out
    pyro.get_param_store().clear()
    with program.active():
        pyro.get_param_store()["scale"] = torch.ones(2)
    assert abs(program.diagnose(torch.randn(64, 2), seed=0, num_floor=40).groups[0].z) < 5


def test_the_report_names_covariates():
    program = SinkhornProgram(conditional, loss=Trace_DataSinkhorn(match_size=16, covariates="auto"))
    assert program.diagnose(torch.randn(32), torch.randn(32), num_floor=2).match.covariates == ("argument 0",)


def test_training_goes_on_after_loading(tmp_path):
    x = torch.randn(128, 2)
    program = SinkhornProgram(
        scaled, loss=Trace_DataSinkhorn(match_size=16, relative_epsilon=0.3, scale="column")
    )
    program.fit(x, num_steps=3, batch_size=32, seed=0, progress=False)
    program.save(tmp_path / "program.pt")
    loaded = SinkhornProgram.load(tmp_path / "program.pt", scaled)
    assert loaded.loss.config() == program.loss.config()
    for one in (program, loaded):
        one.fit(x, num_steps=3, batch_size=32, progress=False)
    assert loaded.history.loss == program.history.loss


def test_a_file_needs_functions_given_again(tmp_path):
    x, t = torch.randn(2, 64)
    loss = Trace_DataSinkhorn(match_size=16, covariates=lambda t, y: t)
    program = SinkhornProgram(conditional, loss=loss).fit(t, x, num_steps=1, batch_size=32, progress=False)
    program.save(tmp_path / "program.pt")
    with pytest.raises(ValueError, match=r"pass one as loss=|covariates of its own"):
        SinkhornProgram.load(tmp_path / "program.pt", conditional)
    with pytest.raises(ValueError, match="with a covariates of its own"):
        SinkhornProgram.load(tmp_path / "program.pt", conditional, loss=Trace_DataSinkhorn())
    SinkhornProgram.load(tmp_path / "program.pt", conditional, loss=loss)


def test_it_runs_in_an_elbo_module():
    class Model(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", Implicit(self.scale * torch.randn(len(x))), obs=x)

    class Empty(nn.Module):
        def forward(self, x):
            pass

    model = Model()
    module = Trace_DataSinkhorn(match_size=16)(model, Empty())
    module(torch.randn(32)).backward()
    assert model.scale.grad is not None


def test_traces_of_one_call():
    guide = run_guide(nothing, (torch.zeros(4, 2),), {})
    trace = run_simulated(scaled, guide, (torch.zeros(4, 2),), {})
    assert trace.nodes["x"]["infer"]["was_observed"]
    assert trace.nodes["x"]["value"].requires_grad


# The papers' variants


@pytest.mark.parametrize(
    "options",
    [
        {"relative_epsilon": 0.0},
        {"value": "sharp", "gradient": "unrolled", "tolerance": 0.0, "max_iters": 20, "debias": "self"},
        {"value": "rounded", "gradient": "unrolled", "tolerance": 0.0, "max_iters": 20},
    ],
    ids=["exact", "sharp", "rounded"],
)
def test_variants_give_the_gradient_of_their_value(options):
    x = torch.randn(16, 2)
    loss = Trace_DataSinkhorn(match_size=8, **options)
    assert type(loss)(**loss.config()).config() == loss.config()

    def at():
        pyro.set_rng_seed(1)
        return loss.differentiable_loss(scaled, nothing, x)

    at()
    parameter = pyro.param("scale")
    (gradient,) = torch.autograd.grad(at(), parameter)
    shifted = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter[0] += sign * 1e-6
            shifted.append(float(at()))
            parameter[0] -= sign * 1e-6
    assert (shifted[0] - shifted[1]) / 2e-6 == pytest.approx(float(gradient[0]), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": "sharp"}, "value='sharp' has no envelope gradient"),
        ({"relative_epsilon": 0.0, "gradient": "unrolled"}, "no iterations to unroll"),
        ({"value": "blunt"}, "blunt"),
    ],
)
def test_variants_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        Trace_DataSinkhorn(**options)


# What is not a covariate


@pytest.mark.parametrize(
    "observe",
    [lambda x: x.log(), lambda x: (x - 1) / 2, lambda x: x + 0.01 * torch.rand(len(x))],
    ids=["log", "standardised", "dequantised"],
)
def test_what_the_data_are_computed_from_is_no_covariate(observe):
    """Appended, every simulated datum would carry the observed one along, and the spread would be fitted away."""

    def model(x):
        spread = pyro.param("spread", torch.tensor(0.3), constraint=constraints.positive)
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", Implicit(loc + spread * torch.randn(len(x))), obs=observe(x))

    x = (0.5 * torch.randn(2000)).exp()
    with pytest.warns(
        UserWarning, match=r"argument 0 \(128, 1\), as long as plate 'data', was not observed as it is"
    ):
        found = fit(model, x, num_steps=300)
    assert float(found["spread"]) == pytest.approx(float(observe(x).std()), rel=0.15)


def test_a_part_of_a_table_is_observed():
    def model(table):
        with pyro.plate("data", len(table)):
            pyro.sample(
                "x", Implicit(pyro.param("s", torch.tensor(1.0)) * torch.randn(len(table))), obs=table[:, 1]
            )

    _, loss = compared(model, torch.randn(16, 2), covariates="auto")
    assert "covariates of x" not in loss.data_match.state.units


def test_one_hot_covariates():
    def model(k, y):
        effect = pyro.param("effect", torch.zeros(3))
        with pyro.plate("data", len(y)):
            pyro.sample("y", Implicit(effect[k] + 0.3 * torch.randn(len(y))), obs=y)

    k = torch.randint(3, (2000,))
    truth = torch.tensor([2.0, -1.0, 0.5])
    y = truth[k] + 0.3 * torch.randn(2000)
    found = fit(model, k, y, num_steps=300, covariates=lambda k, y: nn.functional.one_hot(k, 3))
    assert torch.allclose(found["effect"], truth, atol=0.1)


def test_a_report_is_conditional_on_globals_and_sub_samples():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 64, subsample_size=32) as index:
            pyro.sample("x", Implicit(mu + torch.randn(32)), obs=x[index])

    def guide(x):
        pyro.sample("mu", dist.Normal(3.0, 0.1))

    call = Trace_DataSinkhorn(match_size=8).simulation(model, guide, (torch.randn(64),), {})
    again = call.again()
    assert again.nodes["mu"]["value"] is call.simulated.nodes["mu"]["value"]
    assert torch.equal(again.nodes["data"]["value"], call.simulated.nodes["data"]["value"])
    assert not torch.equal(again.nodes["x"]["value"], call.simulated.nodes["x"]["value"])


def test_a_loss_says_what_it_is():
    assert (
        repr(Trace_DataSinkhorn(scale="column", match_size=64))
        == "Trace_DataSinkhorn(match_size=64, scale='column')"
    )


def test_a_guide_of_pyros_own_comes_back(tmp_path):
    """Pyro's automatic guides make their parameters at their first call: saved ones wait for it."""
    program = SinkhornProgram(with_global, autoguide(), Trace_DataSinkhorn(match_size=16))
    x = 3 + torch.randn(64)
    program.fit(x, num_steps=5, batch_size=32, seed=0, progress=False)
    program.save(tmp_path / "one.pt")
    loaded = SinkhornProgram.load(tmp_path / "one.pt", with_global, autoguide())
    loaded.save(tmp_path / "two.pt")  # before it was called
    loaded = SinkhornProgram.load(tmp_path / "two.pt", with_global, autoguide())
    assert torch.equal(loaded.encode(x, seed=1)["mu"], program.encode(x, seed=1)["mu"])
    for one in (program, loaded):
        one.fit(x, num_steps=3, batch_size=32, progress=False)
    assert loaded.history.loss == program.history.loss


def with_global(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", Implicit(mu + torch.randn(len(x))), obs=x)


def autoguide():
    return AutoNormal(poutine.block(with_global, expose=["mu"]))
