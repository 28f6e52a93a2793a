"""Data outside of what a program simulates are seen; data that were simulated are not, whatever their law."""

import functools
import importlib

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import binom

from pyro_sinkhorn.diagnostics.simulated_range import OutOfRangeWarning, simulated_range, warn_of_range
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.losses.pairs import Simulator

#: The package shows the function of this name, not the module.
module = importlib.import_module("pyro_sinkhorn.diagnostics.simulated_range")


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def wide(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def cauchy(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Cauchy(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def counts(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(0.5, 0.1))
        pyro.sample("x", dist.Poisson(z), obs=x)


def rare(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Beta(1.0, 100.0))
        pyro.sample("x", dist.Bernoulli(z), obs=x)


def data_set(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, s), obs=x)


def heavy_data_set(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfCauchy(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, s), obs=x)


def rare_data_set(x):
    p = pyro.sample("p", dist.Beta(0.5, 50.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(p), obs=x)


QUICK = [(local, (30,)), (data_set, (15,))]
SLOW = [
    (local, (1,)),
    (local, (400,)),
    (wide, (30, 5)),
    (cauchy, (1,)),
    (cauchy, (40,)),
    (counts, (40,)),
    (rare, (60,)),
    (heavy_data_set, (15,)),
    (rare_data_set, (20,)),
]


@pytest.mark.parametrize(
    ("model", "shape"),
    [*QUICK, *[pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_p_values_of_simulated_data_are_small_no_more_often_than_they_say(model, shape, monkeypatch):
    """With fewer simulations to compare with, for speed: the p-value is to hold for every number of them."""
    monkeypatch.setattr(module, "_REFERENCE", 128)
    monkeypatch.setattr(module, "_FEW", 64)
    monkeypatch.setattr(module, "Simulator", functools.partial(Simulator, True))
    n = 300
    simulated = Simulator()(model, (torch.zeros(shape),), {}, n).values["x"].reshape(n, *shape)
    p = torch.tensor([simulated_range(model, x).p_value for x in simulated])
    for level in (0.2, 0.05, 0.02, module._LEVEL):
        found = int((p <= level).sum())
        assert binom.sf(found - 1, n, level) > 1e-4, (level, found)


def test_the_levels_are_within_reach():
    """One data set, or one datum, beyond all simulated ones is news by its rank alone."""
    assert 2 / (module._REFERENCE + 1) <= module._LEVEL


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (local, 4 + torch.zeros(50)),
        (local, 3 * torch.linspace(-1.7, 1.7, 50)),
        (local, torch.tensor([10.0])),
        (wide, 2.5 * torch.linspace(-1.7, 1.7, 150).reshape(30, 5)),
        (cauchy, 1e6 + torch.zeros(40)),
        (counts, 200 + torch.zeros(40)),
        (data_set, 10 + 0.3 * torch.linspace(-1.7, 1.7, 15)),
    ],
    ids=["shifted", "scaled", "one", "wide", "heavy", "counts", "data set"],
)
def test_data_outside_are_seen(model, x):
    report = simulated_range(model, x)
    assert not report.passed and "outside" in str(report)
    with pytest.warns(OutOfRangeWarning, match="outside the range"):
        warn_of_range(model, (x,), {})


def test_says_what_was_compared():
    assert simulated_range(local, torch.zeros(10)).unit == "data"
    report = simulated_range(data_set, torch.randn(10))
    assert report.unit == "data set" and report.distance.shape == (1,) and "inside" in str(report)


def test_placeholders_of_masked_data_do_not_count():
    def masked(x, present):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=present):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    present = torch.arange(40) < 30
    x = torch.where(present, torch.randn(40), -999.0)
    assert simulated_range(masked, x, present).passed
    assert not simulated_range(masked, x, torch.ones(40, dtype=torch.bool)).passed


def test_data_that_are_no_number_are_named():
    with pytest.raises(NonFiniteError, match="'x'.*remove or mask"):
        simulated_range(local, torch.tensor([0.0, float("nan"), 1.0]))


@pytest.mark.parametrize(
    ("model", "x", "said"),
    [
        (local, torch.randn(9, 2), r"data of shape \(9, 2\), expected \(9,\).*to_event"),
        (local, torch.randn(1, 9), r"data of shape \(1, 9\), expected \(1,\)"),
        (wide, torch.randn(9, 4), r"data of shape \(9, 4\), expected \(9, 5\)"),
        (wide, torch.randn(9, 1), r"data of shape \(9, 1\), expected \(9, 5\)"),
        (wide, torch.randn(9), r"data of shape \(9,\), expected \(9, 5\)"),
        (local, [0.1, 0.2], r"the data are a list, expected a tensor of shape \(2,\)"),
    ],
    ids=["columns", "a row", "narrow", "one column", "no columns", "list"],
)
def test_data_of_the_wrong_shape_are_named(model, x, said):
    with pytest.raises(ProgramError, match=f"observed site 'x': {said}"):
        simulated_range(model, x)


def test_models_that_do_not_vectorise_are_served():
    def loop(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = torch.stack([z[i] for i in range(len(x))])
            pyro.sample("x", dist.Normal(mean, 0.5), obs=x)

    assert simulated_range(loop, torch.randn(20)).passed
    assert not simulated_range(loop, torch.randn(20) + 9).passed
