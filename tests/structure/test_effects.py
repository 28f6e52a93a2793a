"""Pyro's handlers and statements around latents: factor, deterministic, reparam, lift, condition, do, scale."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoStructured
from pyro.infer.reparam import LocScaleReparam, StructuredReparam, TransformReparam

from pyro_sinkhorn import AutoImplicit, SinkhornProgram, Trace_Sinkhorn
from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.structure import structure_of

N = 12


def model(x):
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(1.0, 2.0))
        y = pyro.sample("y", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + y + shift, 0.5), obs=x)


def guide(x, hide=(), add=()):
    """Points for all latents but some, and for further ones."""
    points = {"shift": torch.tensor(0.5), "z": x, "y": x.exp(), **dict(add)}
    for name, value in points.items():
        if name not in hide:
            pyro.sample(name, dist.Delta(value))


def likelihood(x, z=None, y=None, shift=0.5):
    mean = (x if z is None else z) + (x.exp() if y is None else y) + shift
    return float(dist.Normal(mean, 0.5).log_prob(x).sum())


def no_match():
    return Trace_Sinkhorn(prior_weight=0.0)


def prior_of_shift(value=0.5):
    return float(dist.Normal(0.0, 1.0).log_prob(torch.tensor(value)))


def structure(program, *args):
    return structure_of(poutine.trace(program).get_trace(*args))


# Statements


def test_factors_in_and_out_of_plates_add_to_the_likelihood_and_are_no_data():
    def program(x):
        model(x)
        pyro.factor("outside", torch.tensor(-3.0))
        with pyro.plate("data2", N):
            pyro.factor("inside", -2 * x.square())

    x = torch.randn(N)
    found = no_match().loss(program, guide, x)
    assert found == pytest.approx(-likelihood(x) - prior_of_shift() + 3 + 2 * float(x.square().sum()))
    assert structure(program, x).data == ("x",)
    assert AutoImplicit(program)(x).keys() == {"shift", "z", "y"}


def test_deterministic_sites_between_latents_are_neither_data_nor_latents(fit):
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.deterministic("z", 2 * pyro.sample("e", dist.Normal(0.0, 1.0)))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.randn(N)
    found = structure(program, x)
    assert (found.data, found.latents) == (("x",), ("e",))
    assert fit(program, x)(x).keys() == {"e"}
    drawn = SinkhornProgram(program, loss=Trace_Sinkhorn(match_size=4)).generate(3, x)
    assert torch.equal(drawn["z"].reshape(3, N), 2 * drawn["e"].reshape(3, N))


# Reparametrisation


@pytest.mark.parametrize(
    ("config", "latents"),
    [
        ({"z": LocScaleReparam(0.0)}, {"shift", "z_decentered", "y"}),
        ({"z": LocScaleReparam()}, {"shift", "z_decentered", "y"}),
        ({"y": TransformReparam()}, {"shift", "z", "y_base"}),
        ({"shift": LocScaleReparam(0.0)}, {"shift_decentered", "z", "y"}),
        ({"z": LocScaleReparam(0.0), "y": TransformReparam()}, {"shift", "z_decentered", "y_base"}),
    ],
    ids=["loc-scale", "learned", "transform", "global", "two"],
)
def test_reparametrised_sites_are_no_data_and_their_noise_is_the_latent(config, latents, fit):
    program, x = poutine.reparam(model, config), torch.randn(N)
    found = structure(program, x)
    assert found.data == ("x",)
    assert set(found.latents) == latents
    automatic = fit(program, x)
    assert automatic(x).keys() == latents
    assert automatic.last_inputs.keys() == {"x"}


def test_a_reparametrised_program_has_the_likelihood_of_the_original():
    x, e = torch.randn(2, N)
    program = poutine.reparam(model, {"z": LocScaleReparam(0.0)})

    def decentred(x):
        guide(x, hide=("z",), add={"z_decentered": e}.items())

    found = no_match().loss(program, decentred, x)
    assert found == pytest.approx(-likelihood(x, z=1 + 2 * e) - prior_of_shift())


def test_a_reparametrisation_by_a_density_is_refused_for_local_latents():
    learned = AutoStructured(model)
    learned(torch.randn(N))
    program = poutine.reparam(model, {"z": StructuredReparam(learned)})
    with pytest.raises(ProgramError, match="site 'z' was reparametrised by a density.*LocScaleReparam"):
        AutoImplicit(program)(torch.randn(N))


# Handlers


def test_lifted_parameters_are_globals():
    def program(x):
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    prior = dist.LogNormal(0.0, 1.0)
    lifted, x = poutine.lift(program, prior={"scale": prior}), torch.randn(N)
    assert structure(lifted, x).globals == ("scale",)
    assert AutoImplicit(lifted)(x)["scale"] > 0

    def points(x):
        pyro.sample("scale", dist.Delta(torch.tensor(2.0)))
        pyro.sample("z", dist.Delta(x))

    expected = -float(dist.Normal(x, 0.5).log_prob(x).sum() + prior.log_prob(torch.tensor(2.0)))
    assert no_match().loss(lifted, points, x) == pytest.approx(expected)


def test_a_local_latent_that_is_conditioned_on_becomes_data(fit):
    y, x = torch.rand(N) + 0.5, torch.randn(N)
    program = poutine.condition(model, data={"y": y})
    assert set(structure(program, x).data) == {"y", "x"}
    automatic = fit(program, x)
    assert automatic(x).keys() == {"shift", "z"}
    assert torch.equal(automatic.last_inputs["y"], y)
    found = no_match().loss(program, lambda x: guide(x, hide=("y",)), x)
    density = float(dist.LogNormal(0.0, 1.0).log_prob(y).sum())
    assert found == pytest.approx(-likelihood(x, y=y) - density - prior_of_shift())


def test_a_global_that_is_conditioned_on_is_given(fit):
    x = torch.randn(N)
    program = poutine.condition(model, data={"shift": torch.tensor(0.5)})
    with pytest.raises(ProgramError, match=r"observed sites \['shift'\] are in no plate"):
        structure(poutine.condition(lambda: pyro.sample("shift", dist.Normal(0.0, 1.0)), {"shift": x[0]}))
    assert structure(program, x).globals == ()
    assert fit(program, x)(x).keys() == {"z", "y"}
    found = no_match().loss(program, lambda x: guide(x, hide=("shift",)), x)
    assert found == pytest.approx(-likelihood(x) - prior_of_shift())


def test_an_intervention_cuts_a_latent_off_from_the_data():
    """The latent is still drawn, and matched; what lies below sees the value given."""
    x, given = torch.randn(N), torch.full((N,), 3.0)
    program = poutine.do(model, data={"z": given})
    found = no_match().loss(program, guide, x)
    assert found == pytest.approx(-likelihood(x, z=given) - prior_of_shift())
    assert AutoImplicit(program)(x).keys() == {"shift", "z", "y"}


def test_a_scale_around_one_of_two_observed_sites():
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)
            with poutine.scale(scale=3.0):
                pyro.sample("y", dist.Normal(-z, 0.5), obs=x)

    x = torch.randn(N)
    found = no_match().loss(program, lambda x: pyro.sample("z", dist.Delta(x)), x)
    one, two = (float(dist.Normal(m, 0.5).log_prob(x).sum()) for m in (x, -x))
    assert found == pytest.approx(-one - 3 * two)


def test_handlers_nest(fit):
    x = torch.randn(N)
    program = poutine.scale(poutine.reparam(model, {"z": LocScaleReparam(0.0)}), 2.0)
    program = poutine.condition(program, data={"shift": torch.tensor(0.5)})
    assert fit(program, x)(x).keys() == {"z_decentered", "y"}

    def points(x):
        pyro.sample("z_decentered", dist.Delta((x - 1) / 2))
        pyro.sample("y", dist.Delta(x.exp()))

    found = no_match().loss(program, points, x)
    assert found == pytest.approx(-2 * likelihood(x) - 2 * prior_of_shift())
