"""Programs to ArviZ: groups, names, numbers, and what ArviZ makes of them. Run under ArviZ 0.2x and under ArviZ 1."""

import functools
import math
import re
import subprocess
import sys
from pathlib import Path

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from torch import nn

from pyro_sinkhorn import (
    AutoImplicit,
    AutoPosterior,
    Implicit,
    SinkhornProgram,
    Trace_DataSinkhorn,
    Trace_EnergyScore,
    Trace_Sinkhorn,
    TraceEnum_Sinkhorn,
    to_arviz,
)
from pyro_sinkhorn.errors import NonFiniteError, ProgramError

MODERN = int(az.__version__.split(".")[0]) >= 1
LOSS = Trace_Sinkhorn(match_size=4)
N = 20
S = 12


def normals(x, scale=0.5):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)


def fitted(model, *args, loss=LOSS, batch_size=None, **options):
    program = SinkhornProgram(model, loss=loss, **options)
    return program.fit(*args, num_steps=2, batch_size=batch_size, seed=0, progress=False)


def export(model, *args, num_samples=S, **options):
    return fitted(model, *args, **options).to_arviz(*args, num_samples=num_samples, seed=1)


def groups(exported):
    return set(exported.children) if MODERN else set(exported.groups())


def dims(exported, group):
    found = exported[group]
    return {str(name): found[name].dims for name in found.data_vars}


def from_dict(**found):
    return az.from_dict(found) if MODERN else az.from_dict(**found)


def elpd(found):
    return float(found.elpd if MODERN else found.elpd_loo)


def drawn(*rest):
    return ("chain", "draw", *rest)


class Known(SinkhornProgram):
    """A program whose posterior is known: one number per datum, normal prior, normal noise of scale 1/2."""

    has_posterior = True
    change = staticmethod(lambda draws: draws)

    def posterior(self, x, num_samples, seed=None):
        mean, sd = 0.8 * x, math.sqrt(0.2)
        return self.change({"z": mean + sd * torch.randn(num_samples, len(x))})


def plain(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.fixture
def x():
    return torch.randn(N)


@pytest.fixture
def rows():
    return torch.randn(N, 3)


# Groups and numbers


def test_a_program_without_posterior_exports_encoder_draws_and_no_posterior(rows):
    exported = export(normals, rows)
    assert type(exported).__name__ == ("DataTree" if MODERN else "InferenceData")
    assert groups(exported) == {
        *("encoder_draws", "prior", "prior_predictive", "posterior_predictive", "log_likelihood"),
        "observed_data",
    }
    assert dims(exported, "encoder_draws") == {"z": drawn("data", "z_dim_0")}
    assert dims(exported, "prior") == {"z": drawn("data", "z_dim_0")}
    assert dims(exported, "posterior_predictive") == {"x": drawn("data", "x_dim_0")}
    assert dims(exported, "prior_predictive") == {"x": drawn("data", "x_dim_0")}
    assert dims(exported, "log_likelihood") == {"x": drawn("data")}
    assert dims(exported, "observed_data") == {"x": ("data", "x_dim_0")}
    assert exported["encoder_draws"]["z"].shape == (1, S, N, 3)
    assert np.array_equal(exported["observed_data"]["x"].values, rows.numpy())
    for group in groups(exported):
        assert exported[group].attrs["latents_from"] == "encoder"
    assert "not make a posterior" in exported["encoder_draws"].attrs["note"]


def test_attributes_say_what_made_the_export(rows):
    exported = export(normals, rows)
    for attrs in (exported.attrs, exported["encoder_draws"].attrs, exported["observed_data"].attrs):
        assert attrs["inference_library"] == "pyro_sinkhorn"
        assert attrs["inference_library_version"][0].isdigit()
        assert (attrs["loss"], attrs["num_steps"], attrs["omitted"]) == ("Trace_Sinkhorn", 2, "nothing")
        assert "T" in attrs["created_at"]
    assert exported["log_likelihood"].attrs["conditional_on"] == "z"
    assert "leave-one-out" in exported["log_likelihood"].attrs["note"]


def test_a_program_with_posterior_exports_it(x):
    exported = Known(plain, loss=LOSS).to_arviz(x, num_samples=400, seed=0)
    assert "posterior" in groups(exported) and "encoder_draws" not in groups(exported)
    assert {exported[group].attrs["latents_from"] for group in groups(exported)} == {"posterior"}
    z = exported["posterior"]["z"].values[0]
    assert stats.kstest(((z - 0.8 * x.numpy()) / math.sqrt(0.2)).ravel(), "norm").pvalue > 1e-6


def test_log_likelihood_is_that_of_the_exported_latents(rows):
    exported = export(normals, rows)
    z = torch.as_tensor(exported["encoder_draws"]["z"].values)
    expected = dist.Normal(z, 0.5).log_prob(rows).sum(-1)
    assert np.allclose(exported["log_likelihood"]["x"].values, expected.numpy())


@pytest.mark.parametrize("group", ["encoder_draws", "prior"])
def test_predictive_draws_belong_to_the_latents_of_the_same_draw(rows, group):
    exported = fitted(normals, rows).to_arviz(rows, num_samples=100, seed=1)
    predictive = exported["prior_predictive" if group == "prior" else "posterior_predictive"]
    residual = (predictive["x"].values - exported[group]["z"].values).ravel() / 0.5
    assert stats.kstest(residual, "norm").pvalue > 1e-6


def test_prior_draws_are_from_the_prior(rows):
    z = fitted(normals, rows).to_arviz(rows, num_samples=100, seed=1)["prior"]["z"].values.ravel()
    assert stats.kstest(z, "norm").pvalue > 1e-6


def test_a_seed_decides_everything_and_leaves_torchs_state_alone(rows):
    program = fitted(normals, rows)
    before = torch.get_rng_state()
    first, again, other = (program.to_arviz(rows, num_samples=3, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), before)
    for group in groups(first):
        for name in first[group].data_vars:
            one = first[group][name].values
            assert np.array_equal(one, again[group][name].values)
            assert group == "observed_data" or not np.array_equal(one, other[group][name].values)
    # One stream for all: the encoder's noise is not the prior's.
    assert not np.array_equal(first["prior"]["z"].values, first["encoder_draws"]["z"].values)


def test_the_program_stays_as_it_was(rows):
    decoder = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    program = fitted(model, rows)
    before = {name: value.clone() for name, value in program.modules["decoder"].state_dict().items()}
    program.to_arviz(rows, num_samples=2)
    after = program.modules["decoder"].state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert program.modules["decoder"].training
    assert not pyro.get_param_store().keys()


def test_the_export_shares_no_memory_with_the_data(rows):
    before = rows.clone()
    exported = fitted(normals, rows).to_arviz(rows, num_samples=2)
    exported["observed_data"]["x"].values[:] = 0.0
    assert torch.equal(rows, before)


def test_the_function_and_the_method_are_one(rows):
    program = fitted(normals, rows)
    names = {"dims": {"z": ["item", "axis"]}, "coords": {"axis": list("abc")}}
    a = to_arviz(program, rows, num_samples=3, seed=0, **names)
    b = program.to_arviz(rows, num_samples=3, seed=0, **names)
    assert np.array_equal(a["prior"]["z"].values, b["prior"]["z"].values)
    assert dims(b, "prior") == dims(a, "prior") == {"z": drawn("item", "axis")}


# Structure


def test_globals_and_nested_plates_have_the_dimensions_they_are_in():
    def model(x):
        location = pyro.sample("location", dist.Normal(0.0, 1.0))
        spread = pyro.sample("spread", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("data", N, dim=-1):
            z = pyro.sample("z", dist.Normal(location, 1.0))
            with pyro.plate("words", 4, dim=-2):
                w = pyro.sample("w", dist.Normal(z, spread[0]))
                pyro.sample("x", dist.Normal(w, 1.0), obs=x)
        with pyro.plate("words_alone", 4, dim=-2):
            pyro.sample("topic", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    x = torch.randn(4, N)
    exported = export(model, x)
    expected = {
        "location": drawn(),
        "spread": drawn("spread_dim_0"),
        "z": drawn("data"),
        "w": drawn("words", "data"),
        "topic": drawn("words_alone", "topic_dim_0"),
    }
    assert dims(exported, "encoder_draws") == expected
    assert dims(exported, "prior") == expected
    assert dims(exported, "log_likelihood") == {"x": drawn("words", "data")}
    assert dims(exported, "observed_data") == {"x": ("words", "data")}
    w = torch.as_tensor(exported["encoder_draws"]["w"].values)
    expected = dist.Normal(w, 1.0).log_prob(x).numpy()
    assert np.allclose(exported["log_likelihood"]["x"].values, expected)


def test_deterministic_sites_stand_with_the_latents(x):
    def model(x):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        pyro.deterministic("vector", torch.stack([t, -t]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(t, 1.0))
            pyro.deterministic("square", z**2)
            pyro.deterministic("pair", torch.stack([z, -z], -1))
            pyro.deterministic("told", torch.stack([z, -z], -1), event_dim=1)
            pyro.deterministic("outer", t)
            pyro.factor("more", -(z**2))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    exported = export(model, x)
    for group in ("encoder_draws", "prior"):
        found = dims(exported, group)
        assert found == {
            "t": drawn(),
            "z": drawn("data"),
            "vector": drawn("vector_dim_0"),
            "square": drawn("data"),
            "pair": drawn("data", "pair_dim_0"),
            "told": drawn("data", "told_dim_0"),
            "outer": drawn(),
        }
        values = exported[group]
        assert np.allclose(values["square"].values, values["z"].values ** 2)
        assert np.allclose(values["pair"].values[..., 1], -values["z"].values)
    assert dims(exported, "log_likelihood") == {"x": drawn("data")}  # factors are no data


def test_data_that_lack_a_plates_dimension_are_repeated(x):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("twice", 2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    exported = export(model, x)
    assert exported["observed_data"]["x"].dims == ("twice", "data")
    assert exported["posterior_predictive"]["x"].shape == (1, S, 2, N)


def test_discrete_latents_and_counts():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.Poisson(1.0 + 8.0 * k), obs=x)

    x = dist.Poisson(5.0).sample((N,))
    exported = export(model, x, loss=TraceEnum_Sinkhorn(match_size=4))
    k = exported["encoder_draws"]["k"].values
    assert k.dtype.kind == "i" and k.shape == (1, S, N) and set(np.unique(k)) <= {0, 1}
    expected = stats.poisson.logpmf(x.numpy(), 1.0 + 8.0 * k)
    assert np.allclose(exported["log_likelihood"]["x"].values, expected)


@pytest.mark.skipif(MODERN, reason="plots of ArviZ 0.2x")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
def test_counts_are_integers_and_drawn_as_such():
    """Of numbers with a point ArviZ estimates a density: none is there where all draws of a data set are 0."""
    import matplotlib.pyplot as plt

    def rare(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Poisson(0.1 + 0.1 * k), obs=x)

    x = (torch.arange(N) == 3).double()
    exported = export(rare, x, loss=TraceEnum_Sinkhorn(match_size=4))
    for group in ("prior_predictive", "posterior_predictive", "observed_data"):
        assert exported[group]["x"].dtype.kind == "i"
    assert exported["prior"]["k"].dtype.kind == exported["encoder_draws"]["k"].dtype.kind == "i"
    assert exported["log_likelihood"]["x"].dtype.kind == "f"
    assert np.array_equal(exported["observed_data"]["x"].values, x.numpy())
    assert (exported["posterior_predictive"]["x"].values.sum(-1) == 0).any()
    az.plot_ppc(exported)
    plt.close("all")


def test_several_observed_sites(x):
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Bernoulli(logits=z), obs=y)

    exported = export(model, x, (torch.rand(N) < 0.5).double())
    for group in ("log_likelihood", "posterior_predictive", "prior_predictive", "observed_data"):
        assert set(exported[group].data_vars) == {"x", "y"}


def test_the_sites_of_an_obs_mask_become_one_with_gaps(x):
    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x, obs_mask=seen)

    seen = torch.arange(N) % 3 > 0
    exported = export(model, torch.where(seen, x, torch.nan), seen)
    for group in ("log_likelihood", "posterior_predictive", "prior_predictive", "observed_data"):
        assert set(exported[group].data_vars) == {"x"}
    assert set(exported["encoder_draws"].data_vars) == {"z", "x_unobserved"}
    observed, density = exported["observed_data"]["x"].values, exported["log_likelihood"]["x"].values
    assert np.array_equal(np.isnan(observed), ~seen.numpy())
    assert np.array_equal(np.isnan(density), np.broadcast_to(~seen.numpy(), density.shape))
    assert np.array_equal(observed[seen], x[seen].numpy())
    # What is missing is drawn in every replicate: imputed by the guide, or from the prior.
    assert np.isfinite(exported["posterior_predictive"]["x"].values).all()
    imputed = exported["encoder_draws"]["x_unobserved"].values[..., ~seen]
    assert np.array_equal(exported["posterior_predictive"]["x"].values[..., ~seen], imputed)
    assert set(exported["constant_data"].data_vars) == {"seen"}


@pytest.mark.parametrize("way", ["handler", "distribution"])
def test_masked_data_are_gaps_whole_numbers_too(way):
    present = torch.arange(N) < N - 3

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            fn = dist.Poisson(z.exp())
            with poutine.mask(mask=present if way == "handler" else True):
                pyro.sample("x", fn if way == "handler" else fn.mask(present), obs=x)

    x = torch.where(present, torch.randint(0, 5, (N,)), -1)
    exported = export(model, x)
    assert np.array_equal(np.isnan(exported["observed_data"]["x"].values), ~present.numpy())
    assert np.isnan(exported["log_likelihood"]["x"].values[..., N - 3 :]).all()
    z = exported["encoder_draws"]["z"].values[..., : N - 3]
    expected = stats.poisson.logpmf(x[present].numpy(), np.exp(z))
    assert np.allclose(exported["log_likelihood"]["x"].values[..., : N - 3], expected)


def test_scales_do_not_enter_the_density_of_a_datum(x):
    def model(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=7.0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    exported = export(model, x)
    z = exported["encoder_draws"]["z"].values
    assert np.allclose(exported["log_likelihood"]["x"].values, stats.norm.logpdf(x, z, 1.0))


# Sub-samples


def subsampled(x, indices=None):
    with pyro.plate(
        "data", len(x), subsample_size=None if indices is not None else 6, subsample=indices
    ) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[i])


DETERMINISTIC = functools.partial(AutoImplicit, noise_dim=0)


def by_hand(x):
    with pyro.plate("data", len(x), subsample_size=6) as i:
        pyro.sample("z", Implicit(x[i] * pyro.param("slope", torch.tensor(0.5))))


@pytest.mark.parametrize("guide", [DETERMINISTIC, by_hand], ids=["automatic", "by hand"])
def test_a_drawn_sub_sample_is_the_same_for_the_whole_export(x, guide):
    program = fitted(subsampled, x, guide=guide, loss=Trace_Sinkhorn(match_size=3))
    exported = program.to_arviz(x, num_samples=S, seed=1)
    indices = exported["observed_data"]["data"].values.copy()
    assert len(set(indices)) == 6 and set(indices) <= set(range(N))
    for group in groups(exported) - {"constant_data"}:
        assert np.array_equal(exported[group]["data"].values, indices)
    assert np.array_equal(exported["observed_data"]["x"].values, x[indices].numpy())
    z = exported["encoder_draws"]["z"].values[0]
    assert np.array_equal(z, np.broadcast_to(z[0], z.shape))  # one value of one datum in every draw
    assert np.argsort(z[0]).tolist() == np.argsort(x[indices].numpy()).tolist() or guide is not by_hand
    assert np.allclose(exported["log_likelihood"]["x"].values, stats.norm.logpdf(x[indices], z, 0.5))
    other = program.to_arviz(x, num_samples=2, seed=2)["observed_data"]["data"].values
    assert not np.array_equal(indices, other)
    renamed = program.to_arviz(x, num_samples=2, seed=1, dims={"z": ["item"]})
    assert np.array_equal(renamed["prior"]["item"].values, indices)
    if isinstance(program.guide, AutoImplicit):
        assert program.guide.model is subsampled  # put back


def test_a_given_sub_sample_gives_the_coordinates(x):
    indices = torch.tensor([3, 1, 7, 12, 4, 9, 0, 15])
    exported = export(subsampled, x, indices)
    assert np.array_equal(exported["encoder_draws"]["data"].values, indices.numpy())
    assert np.array_equal(exported["observed_data"]["x"].values, x[indices].numpy())


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [False, True])
def test_posterior_draws_of_a_drawn_sub_sample_belong_to_one_too(calibrated):
    """Data far apart and little noise: a posterior draw shows which datum it was made for."""
    x = torch.linspace(-2.0, 2.0, 12)
    guide = None if calibrated else functools.partial(AutoPosterior)
    program = SinkhornProgram(
        subsampled, guide, loss=Trace_Sinkhorn(match_size=3) if calibrated else Trace_EnergyScore()
    )
    if calibrated:
        program.calibrate(x, num_steps=300, lr=1e-2, seed=0, progress=False)
    else:
        program.fit(x, num_steps=300, batch_size=None, lr=1e-2, seed=0, progress=False)
    exported = program.to_arviz(x, num_samples=60, seed=1)
    assert exported.attrs["latents_from"] == "posterior"
    indices = exported["posterior"]["data"].values.copy()
    mean = exported["posterior"]["z"].values[0].mean(0)
    # Exact: 0.8 x. Draws of other data would all have mean 0 here.
    assert np.polyfit(x[indices], mean, 1)[0] > 0.5
    guide = program.calibration.guide if calibrated else program.guide
    assert guide.model is subsampled  # put back


# Constant data


def test_constant_data_are_the_tensors_that_are_not_observed(rows):
    def model(x, weights, options, *more, flags=None, name="n"):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, weights).to_event(1), obs=x.float())

    options = {"a": torch.ones(N, 2), "b": "words"}
    x, weights = rows.float().double(), torch.ones(3)
    args, flags = (x, weights, options, torch.tensor(3.0), np.arange(N)), torch.arange(N) > 2
    program = SinkhornProgram(model, loss=LOSS, encoder=nn.Linear(3, 4).float())
    program.num_steps = 1
    with torch.no_grad():
        program.guide = lambda x, *args, **kwargs: pyro.sample("z", Implicit(x, 1).expand([N]))
    found = program.to_arviz(*args, flags=flags, num_samples=2)["constant_data"]
    assert {str(name): found[name].dims for name in found.data_vars} == {
        "weights": ("weights_dim_0",),
        "options_a": ("data", "options_a_dim_0"),
        "more_0": () if MODERN else ("more_0_dim_0",),  # ArviZ 0.2x knows no numbers
        "more_1": ("data",),
        "flags": ("data",),
    }
    assert np.array_equal(found["flags"].values, flags.numpy())


# The user's names


def test_names_and_coordinates_of_the_users(rows):
    exported = fitted(normals, rows).to_arviz(
        rows,
        num_samples=3,
        dims={"z": ["item", "axis"], "x": ["row"]},
        coords={"item": [f"i{k}" for k in range(N)], "axis": np.array(["a", "b", "c"])},
    )
    assert dims(exported, "prior") == {"z": drawn("item", "axis")}
    assert dims(exported, "prior_predictive") == {"x": drawn("row", "x_dim_0")}
    assert dims(exported, "log_likelihood") == {"x": drawn("row")}
    assert list(exported["prior"]["axis"].values) == ["a", "b", "c"]
    assert list(exported["observed_data"]["row"].values) == list(range(N))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": {"y": ["a"]}}, r"dims names 'y', which is not exported; there are \['x', 'z'\]"),
        ({"dims": {"z": ["a", "b", "c"]}}, r"3 names for its 2 dimensions \['data', 'z_dim_0'\]"),
        ({"dims": {"z": "ab"}}, "expected a list of names"),
        ({"dims": {"z": [1]}}, "expected a list of names"),
        ({"dims": {"z": ["draw"]}}, "'draw' is also the name of a dimension of the draws"),
        ({"dims": {"z": ["a", "a"]}}, "'a' is also the name of another dimension"),
        ({"dims": {"z": ["z"]}}, "'z' is also the name of another dimension or a site"),
        ({"dims": {"z": ["x_dim_0"]}}, "'x_dim_0' has size"),
        ({"coords": {"row": [1]}}, "coords names 'row', which is no dimension; there are"),
        ({"coords": {"data": [1, 2]}}, rf"coords of 'data' have shape \(2,\): expected {N} values"),
        ({"coords": {"data": 1}}, r"have shape \(\): expected"),
    ],
)
def test_names_that_do_not_fit_are_refused(rows, options, message):
    with pytest.raises(ProgramError, match=message):
        fitted(normals, rows).to_arviz(rows, num_samples=2, **options)


def test_a_plate_named_like_a_dimension_of_the_draws(x):
    def model(x):
        with pyro.plate("draw", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ProgramError, match=r"dims=\{'z': \[...\]\}"):
        export(model, x)
    exported = fitted(model, x).to_arviz(x, num_samples=2, dims={"z": ["ball"], "x": ["ball"]})
    assert exported["prior"]["z"].dims == drawn("ball")


def test_a_slash_in_a_name_becomes_a_dot(x):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("a/z", dist.Normal(0.0, 1.0))
            pyro.sample("a/x", dist.Normal(z, 1.0), obs=x)

    program = fitted(model, x)
    exported = program.to_arviz(x, num_samples=2, dims={"a/z": ["item"]})
    assert dims(exported, "encoder_draws") == {"a.z": drawn("item")}
    assert dims(exported, "log_likelihood") == {"a.x": drawn("data")}


# Programs that have less


def simulator(x):
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
        pyro.sample("x", Implicit(loc + noise), obs=x)


def test_a_simulator_exports_prior_and_data(x):
    exported = export(simulator, x, loss=Trace_DataSinkhorn(match_size=4))
    assert groups(exported) == {"prior", "prior_predictive", "observed_data"}
    assert exported.attrs["latents_from"] == "none"
    assert exported.attrs["omitted"] == "encoder_draws (the guide samples no latents)"
    shift = exported["prior_predictive"]["x"].values - exported["prior"]["noise"].values
    assert np.allclose(shift, shift.flat[0]) and shift.flat[0] != 0  # the learned one


def test_a_guide_of_globals_alone_has_no_conditional_density(x):
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(loc + noise, 0.1), obs=x)

    guide = AutoNormal(poutine.block(model, expose=["loc"]))
    exported = export(model, x, loss=Trace_DataSinkhorn(match_size=4), guide=guide)
    assert dims(exported, "encoder_draws") == {"loc": drawn()}
    assert "posterior_predictive" in groups(exported) and "log_likelihood" not in groups(exported)
    assert exported.attrs["omitted"] == "log_likelihood (no draws of the latents noise)"


def test_an_observed_site_without_density_has_no_log_likelihood(x):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", Implicit(z + 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    class Shown(Known):
        def posterior(self, x, num_samples, seed=None):
            return {"z": torch.randn(num_samples, len(x))}

    exported = Shown(model, loss=LOSS).to_arviz(x, num_samples=3)
    assert set(exported["log_likelihood"].data_vars) == {"y"}
    assert exported.attrs["omitted"] == "log_likelihood of x (its distribution has no density)"
    assert np.allclose(exported["posterior_predictive"]["x"].values, exported["posterior"]["z"].values + 1)


def test_a_program_that_was_not_fitted_warns_and_exports_its_prior(rows):
    with pytest.warns(UserWarning, match="not been fitted: only its prior"):
        exported = SinkhornProgram(normals).to_arviz(rows, num_samples=3)
    assert groups(exported) == {"prior", "prior_predictive", "observed_data"}
    assert exported.attrs["omitted"] == "encoder_draws (not fitted)"


# Wrong use


@pytest.mark.parametrize("num_samples", [0, -1, 2.5, None, "many"])
def test_bad_numbers_of_draws(rows, num_samples):
    with pytest.raises(ProgramError, match="num_samples is .*: expected an integer of at least 1"):
        fitted(normals, rows).to_arviz(rows, num_samples=num_samples)


def test_one_draw_is_enough(rows):
    assert fitted(normals, rows).to_arviz(rows, num_samples=1)["prior"]["z"].shape == (1, 1, N, 3)


def test_no_data_and_other_arguments(rows):
    program = fitted(normals, rows)
    with pytest.raises(ProgramError, match=r"the model takes \(x, scale=0.5\), but to_arviz was given none"):
        program.to_arviz()
    with pytest.raises(ProgramError, match=r"given the arguments \['0', \"'y'\"\]"):
        program.to_arviz(rows, y=rows)
    with pytest.raises(ProgramError, match="size 0: the batch is empty"):
        program.to_arviz(rows[:0])
    with pytest.raises(ProgramError, match=rf"site 'x': the value has shape \({N}, 2\), its Normal"):
        program.to_arviz(rows[:, :2])
    with pytest.raises(NonFiniteError, match="argument 0"):
        program.to_arviz(rows * math.nan, num_samples=2)
    with pytest.raises(ProgramError, match="to_arviz got a function: expected a SinkhornProgram"):
        to_arviz(normals, rows)


def test_a_model_that_observes_nothing(x):
    def model(x=None, n=5):
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ProgramError, match="the model observes nothing"):
        fitted(model, x, N).to_arviz()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda draws: {"z": draws["z"][:, :5]}, rf"site 'z': the draws have shape \(3, 5\).*\({N},\)"),
        (lambda draws: {"z": draws["z"][..., None]}, rf"site 'z': the draws have shape \(3, {N}, 1\)"),
        (lambda draws: {"z": draws["z"][:2]}, rf"draws of 'z' have shape \(2, {N}\): expected 3 of them"),
        (lambda draws: {"y": draws["z"]}, r"draws of 'y': no latent of the model, which has \['z'\]"),
    ],
)
def test_posterior_draws_that_do_not_fit(x, change, message):
    class Wrong(Known):
        pass

    Wrong.change = staticmethod(change)
    with pytest.raises(ProgramError, match=message):
        Wrong(plain, loss=LOSS).to_arviz(x, num_samples=3)


# What ArviZ makes of it


@pytest.fixture
def known(x):
    return Known(plain, loss=LOSS).to_arviz(x, num_samples=200, seed=0)


def test_summary_has_the_means_of_the_draws(known):
    table = az.summary(known, round_to="none")
    assert len(table) == N
    assert float(table["mean"].iloc[3]) == pytest.approx(
        float(known["posterior"]["z"].values[0, :, 3].mean())
    )


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_loo_sees_every_datum_and_needs_to_be_told_of_encoder_draws(known, x):
    found = az.loo(known)
    assert (found.n_data_points, found.n_samples) == (N, 200)
    density = {"x": stats.norm.logpdf(x, known["posterior"]["z"].values, 0.5)}
    other = az.loo(from_dict(log_likelihood=density), reff=1.0)
    assert elpd(found) == pytest.approx(elpd(other))
    exported = fitted(plain, x).to_arviz(x, num_samples=200, seed=0)
    with pytest.raises((TypeError, KeyError, ValueError), match="posterior"):
        az.loo(exported)
    assert az.loo(exported, reff=1.0).n_data_points == N


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_loo_after_gaps_are_dropped(x):
    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 2.0), obs=x, obs_mask=seen)

    exported = export(model, x, torch.arange(N) > 4, num_samples=50)
    density = exported["log_likelihood"]["x"].dropna("data")
    found = az.loo(from_dict(log_likelihood={"x": density.values}), reff=1.0)
    assert found.n_data_points == N - 5 and math.isfinite(elpd(found))


@pytest.mark.skipif(MODERN, reason="plots of ArviZ 0.2x")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
def test_plots_of_arviz_0(known, x):
    import matplotlib.pyplot as plt

    az.plot_ppc(known, num_pp_samples=10)
    az.plot_ppc(known, num_pp_samples=10, group="prior")
    az.plot_loo_pit(known, y="x")
    az.plot_forest(known)
    az.plot_ppc(fitted(plain, x).to_arviz(x, num_samples=20), num_pp_samples=10)
    plt.close("all")


@pytest.mark.skipif(not MODERN, reason="plots of ArviZ 1")
@pytest.mark.parametrize("plot", ["plot_ppc_dist", "plot_ppc_pit", "plot_loo_pit", "plot_forest"])
def test_plots_of_arviz_1(known, plot):
    import matplotlib.pyplot as plt

    getattr(az, plot)(known, backend="matplotlib")
    plt.close("all")


@pytest.mark.skipif(not MODERN, reason="plots of ArviZ 1")
def test_the_pit_of_arviz_1(known):
    import matplotlib.pyplot as plt
    from xarray import DataTree

    pit = az.loo_pit(known)
    assert pit["x"].shape == (N,)
    az.plot_ecdf_pit(DataTree.from_dict({"loo_pit": pit}), group="loo_pit", sample_dims=["data"])
    plt.close("all")


def test_round_trip_through_a_file(known, rows, tmp_path):
    def model(x, seen, label):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    seen = torch.arange(N) > 3
    program = fitted(model, rows, seen, torch.arange(N))
    exported = program.to_arviz(
        rows, seen, torch.arange(N), num_samples=4, coords={"data": [f"r{i}" for i in range(N)]}
    )
    exported.to_netcdf(tmp_path / "program.nc")
    back = az.from_netcdf(tmp_path / "program.nc")
    assert groups(back) == groups(exported) and "encoder_draws" in groups(back)
    for group in groups(exported):
        assert dims(back, group) == dims(exported, group)
        for name in exported[group].data_vars:
            assert np.array_equal(back[group][name].values, exported[group][name].values)
        assert dict(back[group].attrs)["latents_from"] == "encoder"
    assert list(back["encoder_draws"]["data"].values[:2]) == ["r0", "r1"]
    assert back.attrs["loss"] == "Trace_Sinkhorn"


# Beside ArviZ


def nested(x):
    t = pyro.sample("t", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", N, dim=-1):
        z = pyro.sample("z", dist.Normal(t, 1.0).to_event(1))
        with pyro.plate("words", 4, dim=-2):
            w = pyro.sample("w", dist.Normal(z, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(w, 0.5).to_event(1), obs=x)


@pytest.mark.parametrize("method", ["encode", pytest.param("posterior", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*data lie outside")  # three steps are no fit
def test_pyros_predictive_takes_what_a_program_returns(method):
    x = torch.randn(4, N, 3)
    program = fitted(nested, x, loss=LOSS if method == "encode" else Trace_EnergyScore())
    draws = getattr(program, method)(x, num_samples=5)
    expected = {"t": (5, 1, 1, 3), "z": (5, 1, N, 3), "w": (5, 4, N, 3)}
    assert {name: tuple(value.shape) for name, value in draws.items()} == expected
    for parallel in (False, True):
        again = Predictive(poutine.uncondition(program), posterior_samples=draws, parallel=parallel)(x)["x"]
        assert again.shape == (5, 4, N, 3)
        residual = ((again - draws["w"]) / 0.5).detach().flatten().numpy()
        assert stats.kstest(residual, "norm").pvalue > 1e-6
    group = "encoder_draws" if method == "encode" else "posterior"
    assert dims(program.to_arviz(x, num_samples=3), group) == {
        "t": drawn("t_dim_0"),
        "z": drawn("data", "z_dim_0"),
        "w": drawn("words", "data", "w_dim_0"),
    }


def test_arviz_is_imported_when_it_is_used():
    code = "import sys, pyro_sinkhorn; print({'arviz', 'xarray', 'arviz_base'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_the_snippets_of_the_page_run():
    page = Path(__file__).parents[1] / "docs" / "arviz.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    exec(compile("\n".join(blocks), str(page), "exec"), {})
