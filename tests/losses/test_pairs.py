"""Simulated pairs: side by side only where that is the same law as one by one."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sinkhorn import Implicit
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.losses.pairs import Simulator, substituted
from pyro_sinkhorn.losses.side_by_side import in_plate, packed
from pyro_sinkhorn.runs import Resample, run_model
from pyro_sinkhorn.structure import Plate


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def everything(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("kinds", 3):
        v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("groups", x.shape[1]):
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        with pyro.plate("items", x.shape[0]):
            w = pyro.sample("w", dist.Bernoulli(0.3))
            mean = z + w + v.sum(-1).sum(-1, keepdim=True) + k
            pyro.sample("x", dist.Normal(mean, 0.1), obs=x)


def subsampled(x):
    with pyro.plate("data", len(x), subsample_size=3) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])


def masked(x):
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=torch.arange(len(x)) > 1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def noise_of_its_own(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", Implicit(z + 0.5 * torch.randn(z.shape)), obs=x)


def cumulative(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.cumsum(0), 0.5), obs=x)


def first_slice(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + z[0], 0.5), obs=x)


def loop(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mean = torch.stack([z[i].sin() for i in range(len(x))])
        pyro.sample("x", dist.Normal(mean, 0.5), obs=x)


def noise_by_length(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", Implicit(z + torch.randn(len(x))), obs=x)


def noise_in_the_mean(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + torch.randn(len(x)), 0.1), obs=x)


def pooled_global(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu.mean(), 0.5), obs=x)


ALLOWING = [
    (local, (5,)),
    (local, (1,)),
    (everything, (4, 3)),
    (subsampled, (7,)),
    (masked, (5,)),
    (noise_of_its_own, (5,)),
]
MIXING = [
    (cumulative, (5,)),
    (cumulative, (1,)),
    (first_slice, (5,)),
    (first_slice, (1,)),
    (loop, (5,)),
    (noise_by_length, (5,)),
    (noise_in_the_mean, (5,)),
    (pooled_global, (5,)),
]


@pytest.mark.parametrize(("model", "shape"), ALLOWING, ids=lambda v: getattr(v, "__name__", str(v)))
def test_models_that_broadcast_are_simulated_side_by_side(model, shape):
    simulator = Simulator()
    simulator(model, (torch.zeros(shape),), {}, 4)
    assert simulator.vectorize


@pytest.mark.parametrize(("model", "shape"), MIXING, ids=lambda v: getattr(v, "__name__", str(v)))
def test_models_that_would_mix_data_sets_up_are_found_out(model, shape):
    simulator = Simulator()
    pairs = simulator(model, (torch.zeros(shape),), {}, 4)
    assert simulator.vectorize is False
    assert pairs.values["x"].shape == (4, *shape)


@pytest.mark.parametrize(("model", "shape"), ALLOWING, ids=lambda v: getattr(v, "__name__", str(v)))
def test_one_data_set_in_a_plate_is_that_of_a_plain_run(model, shape):
    x, free = torch.zeros(shape), Resample()(model)
    nesting = len(shape)
    pyro.set_rng_seed(3)
    plain = run_model(free, (x,), {})
    pyro.set_rng_seed(3)
    inside = run_model(in_plate(free, Plate("sets", -nesting - 1, 1, 1)), (x,), {})
    for name in ("z", "x"):
        assert torch.equal(packed(plain.nodes[name], 1, nesting), packed(inside.nodes[name], 1, nesting))


@pytest.mark.parametrize("vectorize", [True, False])
def test_values_have_equally_many_batch_dimensions(vectorize):
    pairs = Simulator(vectorize)(everything, (torch.zeros(4, 3),), {}, 6)
    assert {name: tuple(value.shape) for name, value in pairs.values.items()} == {
        "mu": (6, 1, 1),
        "v": (6, 1, 3, 2),
        "k": (6, 1, 3),
        "z": (6, 1, 3),
        "w": (6, 4, 3),
        "x": (6, 4, 3),
    }
    assert len(pairs) == 6 and pairs.plate.dim == -3
    loc, scale = pairs.moments["z"]
    torch.testing.assert_close(loc, pairs.values["mu"].unsqueeze(-1).expand(loc.shape))
    torch.testing.assert_close(scale, torch.ones_like(scale))
    part = pairs.pick(torch.tensor([4, 1]))
    assert torch.equal(part.values["v"], pairs.values["v"][[4, 1]])
    assert torch.equal(part.moments["z"][0], loc[[4, 1]])


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_law_is_the_programs(vectorize):
    # 5 standard errors.
    n = 1500 if vectorize else 300
    pairs = Simulator(vectorize)(everything, (torch.zeros(2, 2),), {}, n)
    x = pairs.values["x"]
    x = x - pairs.values["v"].sum((-1, -2, -3)).reshape(n, 1, 1) - pairs.values["k"]
    # Items of one group share mu and z, those of two groups mu alone.
    for one, other, shared in ((x[:, 0, 0], x[:, 1, 0], 2.0), (x[:, 0, 0], x[:, 0, 1], 1.0)):
        products = (one - 0.3) * (other - 0.3)
        assert abs(float((products.mean() - shared) / products.std())) * math.sqrt(n) < 5


def test_data_sets_are_independent_of_each_other():
    for model in (noise_by_length, cumulative):
        pairs = Simulator()(model, (torch.zeros(1),), {}, 800)
        noise = (pairs.values["x"] - pairs.values["z"]).flatten()
        products = noise[1:] * noise[:-1]
        assert abs(float(products.mean() / products.std())) * math.sqrt(len(products)) < 5


@pytest.mark.parametrize("vectorize", [True, False])
def test_given_latents_are_kept_and_the_rest_follows_them(vectorize):
    mu = torch.tensor([-1e6, 1e6]).reshape(2, 1, 1)
    pairs = Simulator(vectorize)(everything, (torch.zeros(4, 3),), {}, 2, {"mu": mu})
    assert torch.equal(pairs.values["mu"], mu)
    assert bool((pairs.values["x"].mean((1, 2)) * mu.flatten() > 0).all())


def test_sub_samples_are_common_to_all_and_may_be_given():
    index = torch.tensor([5, 2, 0])
    pairs = Simulator()(subsampled, (torch.zeros(7),), {}, 4, indices={"data": index})
    assert torch.equal(pairs.indices["data"], index)


def test_runs_may_stop_after_the_latents():
    pairs = Simulator()(local, (torch.zeros(5),), {}, 4, stop_after=("z",))
    assert "x" not in pairs.values and pairs.values["z"].shape == (4, 5)


def test_looking_for_mixing_leaves_the_random_numbers_alone():
    from pyro_sinkhorn.losses.side_by_side import vectorises

    for model in (local, cumulative):
        pyro.set_rng_seed(5)
        expected = torch.rand(3)
        pyro.set_rng_seed(5)
        vectorises(model, (torch.zeros(5),), {}, {}, 1)
        assert torch.equal(torch.rand(3), expected)


def test_simulations_that_are_no_number_are_named():
    def broken(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", Implicit(z.log()), obs=x)

    with pytest.raises(NonFiniteError, match=r"'x'.*simulated values"):
        Simulator()(broken, (torch.zeros(20),), {}, 4)


def test_a_prior_that_is_no_law_is_refused():
    def improper(x):
        m = pyro.sample("m", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    with pytest.raises(ProgramError, match=r"'m'.*ImproperUniform"):
        Simulator()(improper, (torch.zeros(20),), {}, 4)


def test_arguments_are_shown_with_simulated_values():
    pairs = Simulator()(local, (torch.zeros(5),), {}, 4)
    (shown,), _ = substituted({"x": (0,)}, pairs, 2, (torch.zeros(5),), {})
    assert torch.equal(shown, pairs.values["x"][2])
    _, shown_kwargs = substituted({"x": ("x",)}, pairs, 2, (), {"x": torch.zeros(5)})
    assert torch.equal(shown_kwargs["x"], pairs.values["x"][2])
    with pytest.raises(ProgramError, match="no argument of the model"):
        substituted({"x": None}, pairs, 0, (), {})
    with pytest.raises(ProgramError, match="sub-sample"):
        substituted({"x": (0,)}, pairs, 0, (torch.zeros(7),), {})
