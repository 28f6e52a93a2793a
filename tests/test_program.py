"""A program is callable as its model, fits, encodes, generates; whatever shape the user's code has."""

import functools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.inspect import get_model_relations
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_sinkhorn import AutoImplicit, Implicit, SinkhornProgram, Trace_Sinkhorn, sinkhorn_infer, snapshot
from pyro_sinkhorn.errors import ProgramError

LOSS = Trace_Sinkhorn(match_size=8)


def make_model(**layers):
    """A normal prior below a linear decoder with a learned noise scale."""
    decoder = nn.Sequential(nn.Linear(2, 3), *layers.values())

    def model(x):
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    return model, decoder


def data(n=40):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(1))


def fitted(num_steps=3, model=None, **options):
    program = SinkhornProgram(model or make_model()[0], loss=LOSS, **options)
    return program.fit(data(), num_steps=num_steps, batch_size=16, seed=0, progress=False)


def weights(program):
    """Everything that training moves, in one vector."""
    state = snapshot.take(program)
    parts = [*state["modules"].values(), state["guide"], {k: v["value"] for k, v in state["params"].items()}]
    return torch.cat([part[key].flatten().double() for part in parts for key in sorted(part)])


# Callable as the model.


def test_the_decorator_makes_a_program_with_and_without_options():
    model, _ = make_model()
    loss = Trace_Sinkhorn(prior_weight=30.0, match_size=8)
    assert isinstance(sinkhorn_infer(model), SinkhornProgram)
    program = sinkhorn_infer(loss=loss, encoder=nn.Linear(3, 5))(model)
    assert program.loss.prior_weight == 30.0 and program.loss is not loss
    assert (program.__name__, program.__doc__, program.__wrapped__) == (model.__name__, model.__doc__, model)
    assert repr(program) == "SinkhornProgram(model, AutoImplicit, Trace_Sinkhorn, 0 steps)"
    program.fit(data(), num_steps=1, batch_size=16, progress=False)
    assert program.guide.encoder.weight.shape == (5, 3)


def test_a_program_runs_as_its_model_with_its_own_parameters():
    program = fitted()
    trace = poutine.trace(program).get_trace(data(5))
    assert list(trace.stochastic_nodes) == ["data", "z"] and list(trace.observation_nodes) == ["x"]
    weight = trace.nodes["decoder$$$0.weight"]["value"]
    assert weight is program.modules["decoder"][0].weight
    conditioned = pyro.condition(program, data={"z": torch.zeros(5, 2)})
    trace = poutine.trace(conditioned).get_trace(data(5))
    assert trace.nodes["x"]["fn"].mean[0].equal(program.modules["decoder"][0].bias)


def test_predictive_and_the_model_graph_take_a_program():
    program = fitted()
    with torch.no_grad():
        draws = Predictive(poutine.uncondition(program), num_samples=4)(data(5))
    assert draws["x"].shape == (4, 5, 3)
    relations = get_model_relations(program, (data(5),))
    assert relations["sample_sample"] == {"z": [], "x": ["z"]}
    assert relations["plate_sample"] == {"data": ["z", "x"]}
    assert relations["param_constraint"]["scale"] == "GreaterThan(lower_bound=0.0)"


def test_render_model_takes_a_program():
    pytest.importorskip("graphviz")
    assert "z" in pyro.render_model(fitted(), model_args=(data(5),)).source


# Fitting.


def test_fit_returns_itself_and_records_every_step():
    program = SinkhornProgram(make_model()[0], loss=LOSS)
    assert program.fit(data(), num_steps=3, batch_size=16, progress=False) is program
    program.fit(data(), num_steps=2, batch_size=16, progress=False)
    history = program.history
    assert len(history) == len(history.loss) == len(history.reconstruction) == len(history.match) == 5
    assert program.num_steps == 5
    assert all(
        loss == pytest.approx(rec + LOSS.prior_weight * match)
        for loss, rec, match in zip(history.loss, history.reconstruction, history.match, strict=True)
    )
    assert repr(history).startswith("History(5 steps, last: loss=")


def test_fit_improves_the_loss():
    program = fitted(num_steps=1)
    program.fit(data(), num_steps=150, batch_size=32, lr=1e-2, progress=False)
    first, last = np.mean(program.history.loss[:5]), np.mean(program.history.loss[-20:])
    assert last < 0.7 * first


def test_two_fits_are_one_long_fit():
    model, _ = make_model(dropout=nn.Dropout(0.3), norm=nn.BatchNorm1d(3))
    long, short = (SinkhornProgram(model, loss=LOSS) for _ in range(2))
    long.fit(data(), num_steps=30, batch_size=16, seed=3, progress=False)
    short.fit(data(), num_steps=13, batch_size=16, seed=3, progress=False)
    torch.rand(5)  # what happens outside does not matter
    short.encode(data(), seed=1)
    short.diagnose(data(), num_floor=2, seed=1)
    short.fit(data(), num_steps=17, batch_size=16, progress=False)
    assert long.history == short.history
    assert weights(long).equal(weights(short))
    assert long.modules["decoder"][2].running_mean.equal(short.modules["decoder"][2].running_mean)


def test_an_equal_seed_gives_equal_results_and_another_seed_others():
    model, _ = make_model()
    programs = [SinkhornProgram(model, loss=LOSS) for _ in range(3)]
    for program, seed in zip(programs, (5, 5, 6), strict=True):
        program.fit(data(), num_steps=5, batch_size=16, seed=seed, progress=False)
    a, b, c = map(weights, programs)
    assert a.equal(b) and not a.equal(c)
    assert programs[0].encode(data(), seed=1)["z"].equal(programs[1].encode(data(), seed=1)["z"])


def test_without_a_seed_fit_follows_pyros():
    model, _ = make_model()
    found = []
    for _ in range(2):
        pyro.set_rng_seed(11)
        program = SinkhornProgram(model, loss=LOSS)
        found.append(weights(program.fit(data(), num_steps=2, batch_size=16, progress=False)))
    assert found[0].equal(found[1])


def test_reset_goes_back_to_before_the_first_fit():
    program = fitted()
    before = weights(program)
    assert program.reset() is program
    assert program.num_steps == len(program.history) == 0 and not program.owned.store["params"]
    program.fit(data(), num_steps=3, batch_size=16, seed=0, progress=False)
    assert weights(program).equal(before)


def test_a_clone_is_equal_and_then_goes_its_own_way():
    program = fitted()
    clone = program.clone()
    assert repr(clone) == repr(program) and clone.history == program.history
    assert weights(clone).equal(weights(program))
    assert clone.encode(data(), seed=2)["z"].equal(program.encode(data(), seed=2)["z"])
    # Both continue alike, optimiser and random stream included ...
    kept = weights(program)
    clone.fit(data(), num_steps=3, batch_size=16, progress=False)
    assert weights(program).equal(kept) and program.num_steps == 3
    program.fit(data(), num_steps=3, batch_size=16, progress=False)
    assert weights(clone).equal(weights(program))
    # ... until they are told otherwise.
    clone.fit(data(), num_steps=3, batch_size=16, seed=9, progress=False)
    assert not weights(clone).equal(weights(program))


def test_a_clone_continues_an_optimiser_of_the_user():
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "step_size": 2, "gamma": 0.5}
    model, _ = make_model()
    program = SinkhornProgram(model, loss=LOSS)
    program.fit(data(), num_steps=3, batch_size=16, seed=0, optim=pyro.optim.StepLR(schedule), progress=False)
    clone = program.clone().fit(data(), num_steps=3, batch_size=16, progress=False)
    program.fit(data(), num_steps=3, batch_size=16, progress=False)
    assert weights(clone).equal(weights(program))


def test_an_unfitted_program_clones():
    clone = SinkhornProgram(make_model()[0], loss=LOSS).clone()
    assert clone.fit(data(), num_steps=1, batch_size=16, progress=False).num_steps == 1


@pytest.mark.parametrize(
    ("make", "extra", "rate"),
    [
        (pyro.optim.ExponentialLR, {"gamma": 0.5}, 0.01 * 0.5**3),
        # The first step is the best so far; the other two are not better by a threshold out of reach.
        (
            pyro.optim.ReduceLROnPlateau,
            {"patience": 0, "factor": 0.5, "threshold": 1e9, "threshold_mode": "abs"},
            0.01 * 0.5**2,
        ),
    ],
    ids=["exponential", "plateau"],
)
def test_schedules_advance_every_step_and_the_users_optimiser_is_not_touched(make, extra, rate):
    optim = make({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}} | extra)
    program = SinkhornProgram(make_model()[0], loss=LOSS)
    program.fit(data(), num_steps=3, batch_size=16, optim=optim, progress=False)
    rates = [s.optimizer.param_groups[0]["lr"] for s in program.optim.optim_objs.values()]
    assert rates == pytest.approx([rate] * len(rates)) and optim.optim_objs == {}


def test_a_learning_rate_given_again_is_used_from_then_on():
    program = fitted()
    moved = {}
    for lr in (None, 1e-12):
        before = weights(program)
        program.fit(data(), num_steps=1, batch_size=16, lr=lr, progress=False)
        moved[lr] = float((weights(program) - before).abs().max())
    assert moved[None] > 1e-4 and moved[1e-12] < 1e-9


def test_the_progress_bar_tells_loss_reconstruction_and_match(capsys):
    program = SinkhornProgram(make_model()[0], loss=LOSS)
    program.fit(data(), num_steps=12, batch_size=16)
    bar = capsys.readouterr().err
    assert all(word in bar for word in ("model:", "loss=", "reconstruction=", "match=", "12/12"))
    program.fit(data(), num_steps=1, batch_size=16, progress=False)
    assert capsys.readouterr().err == ""


def test_a_device_may_be_named():
    program = fitted().fit(data(), num_steps=1, batch_size=16, device="cpu", progress=False)
    assert program.device == torch.device("cpu")
    assert program.to("cpu") is program and program.encode(data())["z"].device.type == "cpu"


# What may be passed.


def test_arrays_keywords_and_further_arguments():
    seen = []

    def model(x, y, table, flag=None, *, u=None, name="none"):
        seen.append((x.shape, y.shape, table.shape, u.shape, u.dtype, flag, name))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ table + u[:, None], 1.0).to_event(1), obs=x)

    program = SinkhornProgram(model, loss=LOSS)
    x, y = np.ones((40, 3), dtype=np.float32)[::-1], np.random.default_rng(0).normal(size=(40, 2))
    x.flags.writeable = False
    table, u = torch.ones(2, 3), np.arange(40)
    program.fit(x, y, table, True, u=u, name="n", num_steps=1, batch_size=16, progress=False)
    shapes = ((16, 3), (16, 2), (2, 3), (16,), torch.int64, True, "n")
    assert set(seen) == {shapes}
    assert program.encode(x, y, table, u=u)["z"].shape == (1, 40, 2)


def test_rows_of_several_arguments_stay_together():
    def model(x, y):
        assert y.equal(2 * x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.arange(40.0)
    SinkhornProgram(model, loss=LOSS).fit(x, 2 * x, num_steps=4, batch_size=16, progress=False)


def test_a_batch_longer_than_the_data_is_all_of_them():
    program = SinkhornProgram(make_model()[0], loss=LOSS)
    program.fit(data(20), num_steps=1, batch_size=500, progress=False)
    assert program.epoch.n == 20 and len(program.epoch.order) == 0


def test_another_data_set_begins_its_own_epoch():
    program = fitted()
    program.fit(data(20), num_steps=3, batch_size=16, progress=False)
    program.fit(data(50), num_steps=3, batch_size=16, progress=False)
    assert program.num_steps == 9


def test_a_model_without_arguments_has_its_data_conditioned():
    def model():
        with pyro.plate("data", 20):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    program = SinkhornProgram(pyro.condition(model, data={"x": torch.randn(20)}), loss=LOSS)
    program.fit(num_steps=2, progress=False)
    assert program.encode()["z"].shape == (1, 20)


def test_a_model_that_sub_samples_takes_all_data():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=16) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    program = SinkhornProgram(model, loss=LOSS)
    with pytest.raises(ProgramError, match=r"'data' sub-samples 16 of 20 by itself: .* batch_size=None"):
        program.fit(torch.randn(40), num_steps=1, batch_size=20, progress=False)
    program.fit(torch.randn(40), num_steps=2, batch_size=None, progress=False)
    assert program.encode(torch.randn(40))["z"].shape == (1, 16)


# Guides of the user's.


def hand_written(encoder):
    def guide(x):
        pyro.module("encoder", encoder)
        scale = pyro.param("scale_of_guide", torch.tensor(0.1), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(encoder(x), scale).to_event(1))

    return guide


def test_the_encoder_of_a_guide_function_is_the_programs_own():
    encoder = nn.Linear(3, 2)
    before = encoder.weight.detach().clone()
    program = fitted(guide=hand_written(encoder))
    assert set(program.modules) == {"decoder", "guide.encoder"}
    assert encoder.weight.equal(before) and not program.modules["guide.encoder"].weight.equal(before)
    assert program.encode(data())["z"].shape == (1, 40, 2)


class Guide(PyroModule):
    def __init__(self, _model=None, width=4):
        super().__init__()
        self.first, self.second = nn.Linear(3, width), nn.Linear(width, 2)
        self.scale = PyroParam(torch.tensor(0.1), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc = self.second(self.first(x).tanh())
            pyro.sample("z", dist.Normal(loc, self.scale).to_event(1))


@pytest.mark.parametrize("given", ["class", "partial", "instance"])
def test_a_guide_may_be_a_class_a_partial_or_an_instance(given):
    instance = Guide()
    guide = {"class": Guide, "partial": functools.partial(Guide, width=6), "instance": instance}[given]
    program = fitted(guide=guide)
    assert isinstance(program.guide, Guide) and program.guide is not instance
    assert program.guide.first.out_features == (6 if given == "partial" else 4)
    assert set(program.modules) == {"decoder"}
    assert program.guide.scale.item() != pytest.approx(0.1)
    assert instance.scale.item() == pytest.approx(0.1)


def test_options_of_the_automatic_guide():
    guide = functools.partial(AutoImplicit, noise_dim=0, hidden=7)
    program = fitted(guide=guide)
    assert program.guide.heads[0].mixed[0].out_features == 7
    z = program.encode(data(), num_samples=2)["z"]
    assert z[0].equal(z[1])
    model, _ = make_model()
    given = AutoImplicit(model)
    assert fitted(model=model, guide=given).guide is not given


def test_a_decoder_that_the_guide_holds_too_is_one():
    model, decoder = make_model()

    class Tied(PyroModule):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", Implicit((x - self.decoder[0].bias) @ self.decoder[0].weight, event_dim=1))

    program = fitted(model=model, guide=Tied())
    mine = program.modules["decoder"][0].weight
    assert program.guide.decoder[0].weight is mine and decoder[0].weight is not mine
    clone = program.clone()
    assert (
        clone.guide.decoder is clone.modules["decoder"] and clone.guide.decoder is not program.guide.decoder
    )


def test_the_loss_given_to_two_programs_stays_apart():
    loss = Trace_Sinkhorn(match_size=8)
    first, second = (SinkhornProgram(make_model()[0], loss=loss) for _ in range(2))
    first.fit(data(), num_steps=1, batch_size=16, progress=False)
    assert first.loss.latent_match.state.units and not second.loss.latent_match.state.units
    assert not loss.latent_match.state.units and np.isnan(loss.terms.loss)


def test_a_program_takes_over_guide_and_loss_of_another():
    first = SinkhornProgram(make_model()[0], functools.partial(AutoImplicit, hidden=9), Trace_Sinkhorn(17.0))
    second = SinkhornProgram(first)
    assert second.model is first.model and second.loss.prior_weight == 17.0
    assert second.guide._hidden == 9 and second.guide is not first.guide
    assert SinkhornProgram(first, loss=Trace_Sinkhorn(3.0)).loss.prior_weight == 3.0


def test_the_elbo_fits_too_for_comparison():
    model, _ = make_model()
    program = SinkhornProgram(model, AutoNormal(model), Trace_ELBO())
    program.fit(data(), num_steps=3, batch_size=None, progress=False)
    assert len(program.history) == 3 and np.isfinite(program.history.loss).all()
    assert program.encode(data())["z"].shape == (1, 40, 2)


# Models of every kind.


class Net(PyroModule):
    """A model that is a module, with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 3)
        self.scale = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)


class Plain(nn.Module):
    """The same without Pyro's help."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 3)

    def forward(self, x):
        pyro.module("net", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)


class Vae:
    """Model and guide as methods of one object, as in Pyro's tutorials."""

    def __init__(self):
        self.encoder, self.decoder = nn.Linear(3, 2), nn.Linear(2, 3)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.1).to_event(1))


class VaeModule(nn.Module, Vae):
    def __init__(self):
        nn.Module.__init__(self)
        Vae.__init__(self)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (Net(), None),
        lambda: (Plain(), None),
        lambda: (Vae().model, None),
        lambda: (VaeModule().model, None),
        lambda: (lambda vae: (vae.model, vae.guide))(Vae()),
        lambda: (lambda vae: (vae.model, vae.guide))(VaeModule()),
        lambda: (functools.partial(lambda net, x: net(x), Net()), None),
        lambda: (poutine.scale(make_model()[0], 0.1), None),
    ],
    ids=[
        "pyro module",
        "module",
        "method",
        "method of module",
        "both",
        "both of module",
        "partial",
        "handler",
    ],
)
def test_every_kind_of_model_trains_its_own_copies(make):
    model, guide = make()
    unused = "encoder" if guide is None else "nothing"
    programs = [SinkhornProgram(model, guide, LOSS) for _ in range(2)]
    first, second = programs
    originals = {name: module.state_dict() for name, module in first.owned.originals.items()}
    kept = {name: {k: v.clone() for k, v in state.items()} for name, state in originals.items()}
    untouched = weights(second)
    first.fit(data(), num_steps=3, batch_size=16, seed=0, lr=0.01, progress=False)
    assert first.modules
    for name, module in first.modules.items():
        for key, value in module.state_dict().items():
            assert originals[name][key].equal(kept[name][key]), (name, key)
            assert value.equal(kept[name][key]) == (unused in f"{name}.{key}"), (name, key)
    assert weights(second).equal(untouched)
    second.fit(data(), num_steps=3, batch_size=16, seed=0, lr=0.01, progress=False)
    assert weights(first).equal(weights(second))
    clone = first.clone()
    first.fit(data(), num_steps=1, batch_size=16, progress=False)
    clone.fit(data(), num_steps=1, batch_size=16, progress=False)
    assert weights(first).equal(weights(clone))


def test_a_recurrent_decoder_trains():
    # Recurrent layers of torch keep a list of their weights beside the parameters.
    decoder = nn.GRU(1, 3, batch_first=True)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z.unsqueeze(-1))[0][:, -1], 0.5).to_event(1), obs=x)

    before = decoder.weight_hh_l0.detach().clone()
    program = fitted(model=model)
    z = torch.randn(4, 2, 1)
    assert decoder.weight_hh_l0.equal(before)
    assert not program.modules["decoder"].weight_hh_l0.equal(before)
    assert not program.modules["decoder"](z)[0].equal(decoder(z)[0])


# Encoding and generating.


def nested(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", x.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(mu * torch.ones(2), 1.0).to_event(1))
        with pyro.plate("columns", x.shape[1], dim=-1):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * w, event_dim=0)
            pyro.sample("x", dist.Normal(w + z.sum(-1), 0.5), obs=x)
    pyro.factor("prior", -0.1 * mu**2)


def test_shapes_are_predictives():
    x = torch.randn(20, 4)
    program = SinkhornProgram(nested, loss=LOSS).fit(x, num_steps=1, batch_size=None, progress=False)
    draws = program.encode(x, num_samples=3)
    with torch.no_grad(), program.active():
        expected = Predictive(program.guide, num_samples=3)(x)
    assert {name: v.shape for name, v in draws.items()} == {name: expected[name].shape for name in draws}
    assert set(draws) == {"mu", "z", "w"} and draws["mu"].shape == (3, 1, 1)
    made = program.generate(3, x)
    with torch.no_grad(), program.active():
        expected = Predictive(poutine.uncondition(nested), num_samples=3)(x)
    assert set(made) == {"mu", "z", "w", "twice", "x"}  # a factor is no site to draw
    assert {name: v.shape for name, v in made.items()} == {name: expected[name].shape for name in made}
    assert made["twice"].equal(2 * made["w"])


def test_generate_follows_the_plate_sizes_of_its_arguments():
    program = fitted()
    draws = program.generate(4, torch.empty(7, 3))
    assert draws["x"].shape == (4, 7, 3) and draws["z"].shape == (4, 7, 2)
    assert not draws["x"].requires_grad
    draws = program.generate(100, torch.empty(7, 3), seed=0)
    with torch.no_grad():
        residual = draws["x"] - program.modules["decoder"](draws["z"])
    # 2100 draws of N(0, .5), give or take three steps of the scale: the standard error is 1.5%.
    assert float(residual.std()) == pytest.approx(0.5, rel=0.08)


def test_one_datum_encodes_alone():
    program = fitted()
    x = data()
    assert program.encode(x[:1])["z"].shape == (1, 1, 2)
    with torch.no_grad():
        everyone = functools.partial(program.encode, seed=4)
        assert everyone(x[:1], num_samples=5)["z"].shape == (5, 1, 2)


def test_encode_reads_each_datum_by_itself():
    program = fitted(guide=functools.partial(AutoImplicit, noise_dim=0))
    x = data()
    z = program.encode(x)["z"][0]
    order = torch.randperm(40)
    torch.testing.assert_close(program.encode(x[order])["z"][0], z[order])
    torch.testing.assert_close(program.encode(x[3:4])["z"][0], z[3:4])


def test_a_seed_makes_draws_repeatable_and_their_absence_does_not():
    program = fitted()
    for draw in (functools.partial(program.encode, data()), functools.partial(program.generate, 2, data())):
        assert draw(seed=1)["z"].equal(draw(seed=1)["z"])
        assert not draw(seed=1)["z"].equal(draw(seed=2)["z"])
        assert not draw()["z"].equal(draw()["z"])


def test_generate_uses_what_was_learned():
    program = fitted()
    with torch.no_grad():
        program.modules["decoder"][0].weight.zero_()
        program.modules["decoder"][0].bias.fill_(100.0)
    assert float(program.generate(1, data())["x"].min()) > 90


def test_evaluation_runs_in_eval_mode_and_puts_every_mode_back():
    model, decoder = make_model(norm=nn.BatchNorm1d(3), drop=nn.Dropout(0.5))
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9), nn.BatchNorm1d(4))
    program = SinkhornProgram(model, loss=LOSS, encoder=encoder)
    program.modules["decoder"][1].eval()  # as a user may freeze one layer
    program.fit(data(), num_steps=2, batch_size=16, seed=0, progress=False)
    modes = [m.training for root in (program.modules["decoder"], program.guide) for m in root.modules()]
    assert not program.modules["decoder"][1].training and decoder[1].training
    buffers = [b.clone() for root in (*program.modules.values(), program.guide) for b in root.buffers()]
    noise = program.encode(data(), seed=0)["z"] - program.encode(data(), seed=0)["z"]
    assert float(noise.abs().max()) == 0
    alone, together = program.encode(data()[:1], seed=0)["z"], program.encode(data(), seed=0)["z"]
    with program.active(), torch.no_grad():
        code = program.guide.encoder.eval()(data())
        torch.testing.assert_close(code[:1], program.guide.encoder(data()[:1]))
        program.guide.encoder.train()
    assert alone.shape == (1, 1, 2) and together.shape == (1, 40, 2)
    program.generate(2, data())
    program.diagnose(data(), num_floor=2)
    with pytest.raises(ZeroDivisionError, match="probe"):
        program.encode(_Broken())
    after = [m.training for root in (program.modules["decoder"], program.guide) for m in root.modules()]
    assert after == modes
    now = [b for root in (*program.modules.values(), program.guide) for b in root.buffers()]
    assert all(a.equal(b) for a, b in zip(buffers, now, strict=True))


class _Broken:
    def __len__(self):
        raise ZeroDivisionError("probe")


def test_dropout_is_on_in_fit_and_off_in_evaluation():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(self.training)
            return x

    program = SinkhornProgram(make_model(spy=Spy())[0], loss=LOSS)
    program.encode(data(5))
    assert seen and not any(seen)
    seen.clear()
    program.fit(data(), num_steps=2, batch_size=16, progress=False)
    assert seen and all(seen)
    seen.clear()
    program.generate(2, data())
    program.diagnose(data(), num_floor=2)
    assert seen and not any(seen)


def test_networks_made_during_evaluation_train_afterwards():
    program = SinkhornProgram(make_model()[0], loss=LOSS)
    program.encode(data(5))
    assert all(module.training for module in program.guide.modules())


def test_batch_norm_learns_in_fit():
    program = fitted(model=make_model(norm=nn.BatchNorm1d(3))[0])
    norm = program.modules["decoder"][1]
    # Once a step: the runs of the model for the prior cloud and for a look at it do not count.
    assert int(norm.num_batches_tracked) == 3
    assert not norm.running_mean.equal(torch.zeros(3))


def test_diagnose_prints_its_report(capsys):
    program = fitted()
    report = program.diagnose(data(), num_floor=2).match
    assert capsys.readouterr().out.strip() == str(report).strip()
    assert report.groups[0].name == "z" and report.n_data == 40


# Globals and the scale of minibatches.


def with_global(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 0.5))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def expected_loss(model, guide, x, batch_size):
    """Mean over all minibatches of one epoch of the loss that fit would minimise, latents fixed."""
    from pyro_sinkhorn.training import Minibatches, data_scale

    batches = Minibatches((x,), {}, batch_size)
    scale = data_scale(model, batches)
    loss = Trace_Sinkhorn(prior_weight=0.0)
    scaled = model if scale is None else scale(model)
    epoch = [batches.draw() for _ in range(len(x) // batches.batch_size)]
    return torch.stack(
        [loss.differentiable_loss(scaled, guide, *args, **kwargs) for args, kwargs in epoch]
    ).mean()


@pytest.mark.parametrize("batch_size", [10, 20])
def test_minibatches_stand_for_all_data_where_there_are_globals(batch_size):
    x = torch.randn(40) + 3
    loc = torch.tensor(1.3, requires_grad=True)

    def guide(x):
        pyro.sample("mu", dist.Delta(loc))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x))

    whole, parts = (expected_loss(with_global, guide, x, size) for size in (None, batch_size))
    torch.testing.assert_close(parts, whole)
    (gradient,) = torch.autograd.grad(whole, loc, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(parts, loc)[0], gradient)


def test_a_factor_keeps_its_weight_against_minibatches():
    def model(x):
        scale = pyro.param("scale", torch.tensor(2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        pyro.factor("penalty", -(scale**2))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x))

    x = torch.randn(40)
    torch.testing.assert_close(expected_loss(model, guide, x, 10), expected_loss(model, guide, x, None))


def test_a_plate_that_no_minibatch_cuts_is_not_scaled():
    table = torch.randn(40, 10)

    def model(x):
        with pyro.plate("features", 10, dim=-1):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("seen", dist.Normal(w, 1.0), obs=torch.ones(10))
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("features again", 10, dim=-1):
                pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    def guide(x):
        with pyro.plate("features", 10, dim=-1):
            pyro.sample("w", dist.Delta(torch.ones(10)))
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Delta(x.mean(-1, keepdim=True)))

    for batch_size in (10, 20):  # at 10 two plates are as long as the batch
        whole, parts = (expected_loss(model, guide, table, size) for size in (None, batch_size))
        torch.testing.assert_close(parts, whole)


def test_a_plate_of_fixed_size_is_named():
    def model(x):
        with pyro.plate("data", 40):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    program = SinkhornProgram(model, loss=LOSS)
    with pytest.raises(ProgramError, match=r"'data' has size 40 .*pyro.plate\('data', len\(x\)\)"):
        program.fit(torch.randn(40), num_steps=1, batch_size=10, progress=False)
    program.fit(torch.randn(40), num_steps=1, batch_size=None, progress=False)


def test_the_elbo_has_model_and_guide_at_one_scale():
    def guide(x):
        loc = pyro.param("loc", torch.tensor(3.0))
        pyro.sample("mu", dist.Normal(loc, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.3))

    x = torch.randn(40) + 3
    scales = []

    class Spy(Trace_ELBO):
        def loss_and_grads(self, model, guide, *args, **kwargs):
            for side in (model, guide):
                trace = poutine.trace(side).get_trace(*args, **kwargs)
                scales.append((trace.nodes["mu"]["scale"], trace.nodes["z"]["scale"]))
            return super().loss_and_grads(model, guide, *args, **kwargs)

    program = SinkhornProgram(with_global, guide, Spy())
    program.fit(x, num_steps=1, batch_size=10, progress=False)
    assert set(scales) == {(1.0, 4.0)}
    svi = SVI(with_global, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    assert program.history.loss[0] == pytest.approx(svi.evaluate_loss(x) / 40, rel=0.5)
