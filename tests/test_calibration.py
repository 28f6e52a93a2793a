"""calibrate(): a posterior trained on simulations, while the program stays as it is to the bit."""

import functools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_sinkhorn import (
    AutoImplicit,
    AutoPosterior,
    Implicit,
    SinkhornProgram,
    Trace_DataSinkhorn,
    Trace_EnergyScore,
    Trace_Sinkhorn,
)
from pyro_sinkhorn.averaging import Average, Keeper
from pyro_sinkhorn.diagnostics.simulated_range import OutOfRangeWarning
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.losses.pairs import Simulator
from pyro_sinkhorn.simulations import Simulations

Small = functools.partial(AutoPosterior, hidden=16, depth=1)
decoder = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()


def plain(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def decoded(x):
    pyro.module("decoder", decoder)
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        mean = decoder(z.reshape(-1, 1)).reshape(*z.shape, 2)
        pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)


def with_global(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def calibrated(model=plain, x=None, loss=None, **options):
    x = torch.randn(20) if x is None else x
    options = {"num_steps": 4, "seed": 0, "guide": Small, "progress": False} | options
    return SinkhornProgram(model, loss=loss).calibrate(x, **options)


# What there is to ask.


def test_there_is_no_posterior_before():
    x, program = torch.randn(20), SinkhornProgram(plain, loss=Trace_Sinkhorn(match_size=4))
    program.fit(x, num_steps=1, progress=False)
    assert not program.has_posterior
    with pytest.raises(ProgramError, match=r"guide of Trace_Sinkhorn is an encoder.*calibrate\(data\)"):
        program.posterior(x)
    with pytest.raises(ProgramError, match=r"call fit\(\) first"):
        SinkhornProgram(plain, loss=Trace_EnergyScore()).posterior(x)
    assert program.calibrate(x, num_steps=1, guide=Small, progress=False) is program
    assert program.has_posterior


@pytest.mark.parametrize("model", [plain, with_global], ids=lambda m: m.__name__)
def test_draws_have_the_shapes_of_predictive(model):
    x, program = torch.randn(20), calibrated(model)
    drawn = program.posterior(x, num_samples=7, check_range=False)
    with torch.no_grad():
        guide = Predictive(model, guide=program.calibration.guide, num_samples=7)(x)
    for name, value in drawn.items():
        assert value.shape == guide[name].shape, name
    simulated = Predictive(pyro.poutine.uncondition(model), posterior_samples=drawn)(x)["x"]
    assert simulated.shape == (7, 20)


def test_of_other_sizes_and_with_one_draw():
    program = calibrated(with_global)
    for n in (1, 20, 33):
        drawn = program.posterior(torch.randn(n), num_samples=1, check_range=False)
        assert drawn["z"].shape == (1, n) and drawn["mu"].shape == (1, 1)


@pytest.mark.slow
def test_many_draws_at_once_are_the_same_law():
    from pyro_sinkhorn.sampling import encoder_draws, posterior_draws

    x, program = torch.randn(6), calibrated(with_global)
    guide = program.calibration.guide
    with torch.no_grad():
        one = encoder_draws(guide, 1500, (x,), {})
        many = posterior_draws(with_global, guide, 1500, (x,), {})
    for name in ("mu", "z"):
        a, b = one[name].reshape(1500, -1), many[name].reshape(1500, -1)
        z = (a.mean(0) - b.mean(0)) / ((a.var(0) + b.var(0)) / 1500).sqrt()
        assert float(z.abs().max()) < 5
        ratio = (a.var(0) / b.var(0)).log().abs().max()
        assert float(ratio) < 5 * math.sqrt(4 / 1500) * 1.5  # a normal's, and somewhat more


def test_data_outside_of_what_is_simulated_are_warned_of():
    program = calibrated(plain)
    program.posterior(torch.randn(20), num_samples=2)
    with pytest.warns(OutOfRangeWarning, match="outside the range"):
        program.posterior(torch.randn(20) + 30, num_samples=2)


def test_a_program_that_was_fitted_on_is_warned_of():
    x = torch.randn(20)
    program = SinkhornProgram(plain, loss=Trace_Sinkhorn(match_size=4)).fit(x, num_steps=2, progress=False)
    program.calibrate(x, num_steps=2, guide=Small, progress=False)
    program.posterior(x, num_samples=2, check_range=False)
    program.fit(x, num_steps=3, progress=False)
    with pytest.warns(UserWarning, match="3 more steps after calibrate"):
        program.posterior(x, num_samples=2, check_range=False)
    program.calibrate(x, num_steps=2, progress=False)
    program.posterior(x, num_samples=2, check_range=False)


# What stays as it is.


def test_the_program_stays_as_it_is_to_the_bit():
    x = torch.randn(30, 2)
    program = SinkhornProgram(decoded, loss=Trace_Sinkhorn(match_size=8)).fit(
        x, num_steps=3, seed=0, progress=False
    )

    def state():
        modules = [*program.modules.values(), program.guide]
        tensors = [t for module in modules for t in module.state_dict().values()]
        return [t.detach().clone() for t in (*tensors, program.owned.store["params"]["scale"])]

    before, history, steps = state(), list(program.history.loss), program.num_steps
    originals = [t.clone() for t in decoder.state_dict().values()]
    program.calibrate(x, num_steps=4, num_simulations=40, num_rounds=2, guide=Small, progress=False)
    program.posterior(x, num_samples=2, check_range=False)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(originals, decoder.state_dict().values(), strict=True))
    assert program.history.loss == history and program.num_steps == steps


def test_an_encoder_that_was_fitted_is_the_start():
    x = torch.randn(30, 2)
    program = SinkhornProgram(decoded, loss=Trace_Sinkhorn(match_size=8), encoder=nn.Linear(2, 4))
    program.fit(x, num_steps=2, progress=False)
    fitted = program.guide.encoder.weight.detach().clone()
    program.calibrate(x, num_steps=1, lr=1e-12, progress=False)
    torch.testing.assert_close(program.calibration.guide.encoder.weight, fitted)
    program.calibrate(x, num_steps=1, lr=1e-1, progress=False)
    assert not torch.equal(program.calibration.guide.encoder.weight, fitted)
    assert torch.equal(program.guide.encoder.weight, fitted)


# Simulations.


def test_seeds_repeat():
    one, again, other = (calibrated(seed=seed) for seed in (1, 1, 2))
    assert one.calibration.energy == again.calibration.energy != other.calibration.energy
    x = torch.randn(5)
    draws = [program.posterior(x, num_samples=2, seed=3)["z"] for program in (one, again)]
    assert torch.equal(*draws)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    one.posterior(x, num_samples=2, seed=3)
    assert torch.equal(torch.rand(2), expected)


def test_fresh_simulations_are_counted():
    assert calibrated().calibration.num_simulations == 4 * 128
    program = calibrated(with_global)
    assert program.calibration.num_simulations == 4 * 128
    program.calibrate(torch.randn(20), num_steps=2, progress=False)
    assert program.calibration.num_simulations == 6 * 128 and program.calibration.num_steps == 6
    assert not program.calibration.held_out


@pytest.mark.parametrize("model", [plain, with_global], ids=lambda m: m.__name__)
@pytest.mark.parametrize("num", [2, 50, 100, 300, 700])
def test_a_tenth_of_a_fixed_number_is_held_out(model, num):
    simulations = Simulations(model, Trace_EnergyScore(wake=False), (torch.randn(20),), {}, num, None)
    simulations.prepare(1.0)

    def count(chunks):
        return sum(len(chunk.args[0]) if simulations.in_rows else len(chunk.pairs) for chunk in chunks)

    assert simulations.drawn == num
    assert count(simulations.held_out) == max(1, round(0.1 * num))
    assert count(simulations.chunks) == num - count(simulations.held_out)


def test_a_fixed_number_is_not_exceeded_and_the_best_state_is_kept():
    program = calibrated(num_steps=60, num_simulations=40, lr=3e-2)
    found = program.calibration
    assert found.num_simulations == 40 and len(found.held_out) >= 20
    best = min(score for _, score in found.held_out)
    last = found.held_out[-1][1]
    assert best < last  # 40 simulations are learned by heart
    simulations = torch.stack([torch.randn(400), torch.randn(400)])
    z, x = simulations[0], simulations[0] + 0.5 * simulations[1]
    with torch.no_grad():
        draws = torch.stack([found.guide(x)["z"] for _ in range(2)])
    assert float((draws.mean(0) - z).square().mean()) < 1.0  # better than the prior's mean


def test_the_best_state_is_what_is_left():
    net = nn.Linear(1, 1)
    for last, kept in ((2.0, 2.0), (1.05, 4.0), (math.nan, 4.0)):
        keeper = Keeper(net, Average(list(net.parameters())))
        for score, value in ((3.0, 1.0), (1.0, 2.0), (2.0, 3.0), (last, 4.0)):
            nn.init.constant_(net.weight, value)
            keeper.offer(score + torch.tensor([0.5, -0.5, 0.0]) * (value == 4.0))
        keeper.average.values = [p.detach().clone() for p in net.parameters()]
        keeper.settle()
        assert float(net.weight.detach()) == kept  # only where it is clearly better


def test_few_simulations_are_held_out_in_several_chunks():
    # Of one alone nobody knows how exact its score is, and no earlier state would ever be kept.
    simulations = Simulations(plain, Trace_EnergyScore(wake=False), (torch.randn(20),), {}, 300, None)
    simulations.prepare(1.0)
    assert len(simulations.held_out) == 10


def test_sizes_vary_between_their_bounds():
    seen = []

    def model(x):
        seen.append(len(x))
        return with_global(x)

    program = calibrated(model, sizes=(2, 5), num_steps=12)
    # And once one datum more, to see that the plate follows; local latents are scored at a row of each data set.
    assert set(seen) - {1, 6, 20, 21} == {2, 3, 4, 5}
    assert program.posterior(torch.randn(3), num_samples=2, check_range=False)["z"].shape == (2, 3)


@pytest.mark.slow
def test_rounds_simulate_near_the_data():
    x = torch.full((20,), 2.0)
    program = calibrated(x=x, num_steps=40, num_rounds=2)
    assert program.calibration.num_steps == 40 and program.has_posterior
    program = calibrated(with_global, x=x, num_steps=20, num_simulations=200, num_rounds=3)
    assert program.calibration.num_steps == 20


def test_covariates_stay_with_the_latents_that_they_tell_of():
    """p(z | c) = N(c, .01²): proposals that forget which row a latent was drawn for would break this."""

    def model(x, c):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(c, 0.01))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    c = torch.linspace(-3, 3, 30)
    loss = Trace_EnergyScore(wake=False)
    simulations = Simulations(model, loss, (c + 0.1, c), {}, None, None)
    guide = Small(model)
    guide(c + 0.1, c)
    simulations.focus(guide, 0.2)
    chunk = simulations.simulate(256)
    assert float((chunk.pairs.values["z"][0] - chunk.args[1]).abs().max()) < 0.1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_steps": 1, "num_rounds": 2}, "num_steps is 1"),
        ({"num_rounds": 0}, "num_rounds is 0"),
        ({"num_simulations": 1}, "num_simulations is 1"),
        ({"prior_share": 0.0, "num_rounds": 2}, "prior_share is 0.0"),
        ({"prior_share": "all", "num_rounds": 2}, "prior_share is 'all'"),
        ({"lr": 0.0}, "lr is 0.0: expected a positive number"),
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"sizes": (2, 5)}, "sizes= is for programs with globals"),
        ({"sizes": 5}, "sizes is 5: expected two integers"),
        ({"guide": AutoNormal}, r"AutoNormal gives the latents \['z'\] one law for all data"),
        ({"guide": lambda x: None}, "posterior guide is a function"),
        ({"loss": Trace_Sinkhorn()}, "expected an instance of Trace_EnergyScore"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_arguments_are_checked(options, said):
    program = SinkhornProgram(plain)
    with pytest.raises(ProgramError, match=said):
        program.calibrate(torch.randn(20), **{"num_steps": 2, "progress": False} | options)
    assert not program.has_posterior and program.calibration is None


@pytest.mark.parametrize(
    ("sizes", "options", "said"),
    [
        ((5, 2), {}, r"sizes\[1\]"),
        ((0, 2), {}, r"sizes\[0\]"),
        ((2, 5), {"num_rounds": 2}, "give one of the two"),
    ],
    ids=str,
)
def test_sizes_are_checked(sizes, options, said):
    with pytest.raises(ProgramError, match=said):
        calibrated(with_global, sizes=sizes, **options)


def test_a_guide_without_parameters_of_its_own_cannot_be_calibrated():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("w", torch.tensor(0.1)) * x, 1.0))

    program = SinkhornProgram(plain, guide=guide, loss=Trace_EnergyScore())
    with pytest.raises(ProgramError, match="posterior guide is a function.*fit"):
        program.calibrate(torch.randn(20), num_steps=1, progress=False)


def test_the_guide_of_an_energy_score_program_is_calibrated_itself():
    program = SinkhornProgram(plain, guide=Small, loss=Trace_EnergyScore())
    program.calibrate(torch.randn(20), num_steps=2, progress=False)
    assert program.calibration.guide is program.guide and program.has_posterior
    program.fit(torch.randn(20), num_steps=1, progress=False)
    program.posterior(torch.randn(20), num_samples=1, check_range=False)  # both are trained, nothing is stale


def test_a_loss_given_is_copied_and_taken_by_a_second_call():
    loss = Trace_EnergyScore(num_draws=3, wake=False)
    program = calibrated(loss=None).calibrate(torch.randn(20), num_steps=1, loss=loss, progress=False)
    assert program.calibration.loss.num_draws == 3 and program.calibration.loss is not loss
    assert program.calibration.num_steps == 5


class ByHand(pyro.nn.PyroModule):
    """Returns nothing; holds a decoder of the program's besides weights of its own."""

    def __init__(self, held=None):
        super().__init__()
        self.held, self.net = held, nn.Linear(2, 1)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            seen = x if self.held is None else self.held(x.unsqueeze(-1)).squeeze(-1)
            pyro.sample("z", Implicit(self.net(torch.stack([seen, noise], -1)).squeeze(-1)))


def test_rounds_of_a_guide_by_hand():
    program = calibrated(guide=ByHand(), num_steps=2, num_rounds=2, num_simulations=20)
    assert program.calibration.num_simulations == 20


def test_a_guide_does_not_train_what_it_holds_of_the_program():
    net = nn.Linear(1, 1)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(net(z.unsqueeze(-1)).squeeze(-1), 0.5), obs=x)

    guide = ByHand(net)
    before = [p.detach().clone() for p in (net.weight, guide.net.weight)]
    program = calibrated(model, guide=guide)
    assert torch.equal(program.modules["net"].weight, before[0])
    assert not torch.equal(guide.net.weight, before[1])


def test_a_model_that_insists_on_its_number_of_data():
    def model(x):
        assert len(x) == 20
        plain(x)

    assert calibrated(model).has_posterior


# Failures.


def test_simulations_that_are_no_number_are_named_and_leave_nothing_behind():
    def broken(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", Implicit(z.log()), obs=x)

    program = SinkhornProgram(broken, loss=Trace_DataSinkhorn())
    with pytest.raises(NonFiniteError, match="'x'"):
        program.calibrate(torch.randn(20), num_steps=2, progress=False)
    assert program.calibration is None


def test_a_guide_that_diverges_keeps_its_last_good_state():
    x = torch.randn(20)
    program = calibrated(x=x)
    with pytest.raises(NonFiniteError, match="calibration step"):
        program.calibrate(x, num_steps=50, lr=1e300, progress=False)
    assert program.has_posterior and program.calibration.num_steps >= 4


def test_interrupted_before_its_first_step_the_calibration_of_before_is_back(monkeypatch):
    x = torch.randn(20)
    program = calibrated(x=x)
    before = program.calibration

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Simulator, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        program.calibrate(x, num_steps=2, guide=Small, progress=False)
    assert program.calibration is before


def test_interrupted_later_it_is_of_the_program_that_it_saw(monkeypatch):
    x = torch.randn(20)
    program = SinkhornProgram(plain, loss=Trace_Sinkhorn(match_size=4)).fit(x, num_steps=2, progress=False)
    monkeypatch.setattr(Average, "update", lambda self, i: 1 / (i - 2))
    with pytest.raises(ZeroDivisionError):
        program.calibrate(x, num_steps=5, guide=Small, progress=False)
    assert program.calibration.num_steps == 2 and program.calibration.program_steps == 2


# State.


def test_one_datum_is_enough_after_loading(tmp_path):
    def model(x, sd):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, sd), obs=x)

    x, sd = torch.randn(20), torch.tensor([0.5])
    program = SinkhornProgram(model).calibrate(x, sd, num_steps=1, progress=False)
    program.save(tmp_path / "program")
    loaded = SinkhornProgram.load(tmp_path / "program", model)
    # A constant is as long as one datum, and no covariate for that.
    assert loaded.posterior(x[:1], sd, num_samples=3, check_range=False)["z"].shape == (3, 1)


def test_a_loss_of_its_own_is_kept(tmp_path):
    program = SinkhornProgram(plain, guide=Small, loss=Trace_EnergyScore())
    program.calibrate(torch.randn(20), loss=Trace_EnergyScore(num_draws=3), num_steps=1, progress=False)
    program.save(tmp_path / "program")
    loaded = SinkhornProgram.load(tmp_path / "program", plain, guide=Small)
    assert loaded.calibration.loss.num_draws == 3 and loaded.loss.num_draws == 8


@pytest.mark.parametrize("how", ["clone", "pickle", "save"])
@pytest.mark.parametrize(
    "loss", [Trace_Sinkhorn(match_size=4), Trace_EnergyScore()], ids=lambda v: type(v).__name__
)
def test_a_calibrated_program_is_kept(how, loss, tmp_path):
    x = torch.randn(20)
    program = SinkhornProgram(plain, loss=loss).calibrate(
        x, num_steps=3, num_simulations=30, seed=0, progress=False
    )
    expected = program.posterior(x, num_samples=3, seed=1, check_range=False)["z"]
    if how == "clone":
        again = program.clone()
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(program))
    else:
        program.save(tmp_path / "program")
        again = SinkhornProgram.load(tmp_path / "program", plain)
    assert again.has_posterior
    assert torch.equal(again.posterior(x, num_samples=3, seed=1, check_range=False)["z"], expected)
    assert again.calibration.held_out == program.calibration.held_out
    assert (again.calibration.guide is again.guide) == isinstance(loss, Trace_EnergyScore)
    for one in (program, again):
        one.calibrate(x, num_steps=2, progress=False)
    assert again.calibration.energy == program.calibration.energy


@pytest.mark.parametrize("encoder", [False, True])
def test_a_guide_with_options_of_its_own_is_not_taken_for_the_default_one(encoder, tmp_path):
    class Encoder(nn.Linear):
        def forward(self, x):
            return super().forward(x.unsqueeze(-1))

    x = torch.randn(20)
    program = calibrated(x=x, guide=functools.partial(Small, encoder=Encoder(1, 3) if encoder else None))
    program.save(tmp_path / "program")
    if encoder:
        with pytest.raises(ValueError, match="guide of its own"):
            SinkhornProgram.load(tmp_path / "program", plain)
    copies = [program.clone()] + ([] if encoder else [SinkhornProgram.load(tmp_path / "program", plain)])
    expected = program.posterior(x, num_samples=2, seed=0, check_range=False)["z"]
    for copied in copies:
        assert torch.equal(copied.posterior(x, num_samples=2, seed=0, check_range=False)["z"], expected)
        copied.calibrate(x, num_steps=1, lr=0.1, progress=False)
    assert torch.equal(program.posterior(x, num_samples=2, seed=0, check_range=False)["z"], expected)


def test_reset_forgets_the_calibration():
    program = calibrated()
    assert not program.reset().has_posterior


def test_auto_implicit_may_be_calibrated():
    program = calibrated(guide=AutoImplicit)
    assert isinstance(program.calibration.guide, AutoImplicit)
    assert program.posterior(torch.randn(5), num_samples=2, check_range=False)["z"].shape == (2, 5)
