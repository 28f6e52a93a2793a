"""The ready-made programs: what they declare, that every parameter learns, that they fit, save and load."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_sinkhorn import SinkhornProgram, Trace_Sinkhorn
from pyro_sinkhorn.distributions import HypersphericalUniform
from pyro_sinkhorn.models import (
    decoder_network,
    dirichlet_archetypes,
    gaussian,
    hypersphere,
    sphere_and_normal,
)

#: Model, its latents with their dimensions, and the law of each.
MODELS = {
    "dirichlet": (dirichlet_archetypes, {"z": 10}, {"z": dist.Dirichlet}),
    "hypersphere": (hypersphere, {"z": 10}, {"z": HypersphericalUniform}),
    "gaussian": (gaussian, {"z": 10}, {"z": dist.Independent}),
    "sphere and normal": (
        sphere_and_normal,
        {"z_what": 8, "z_how": 2},
        {"z_what": HypersphericalUniform, "z_how": dist.Independent},
    ),
}
LOSS = Trace_Sinkhorn(match_size=8)


def images(n=40, num_pixels=64):
    return torch.rand(n, num_pixels, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("make", "dims", "laws"), MODELS.values(), ids=MODELS)
def test_the_declared_priors_in_one_data_plate(make, dims, laws):
    trace = poutine.trace(make()).get_trace(images(5))
    latents = {name: trace.nodes[name] for name in trace.stochastic_nodes if name != "data"}
    assert {name: site["value"].shape for name, site in latents.items()} == {
        n: (5, d) for n, d in dims.items()
    }
    assert all(isinstance(site["fn"], laws[name]) for name, site in latents.items())
    assert trace.observation_nodes == ["x"]
    x = trace.nodes["x"]["fn"]
    assert (
        bool((x.mean > 0).all()) and bool((x.mean < 1).all()) and x.base_dist.scale.unique().tolist() == [0.2]
    )
    assert all(
        [f.name for f in s["cond_indep_stack"]] == ["data"] for s in (*latents.values(), trace.nodes["x"])
    )
    assert {name.split("$$$")[0] for name in trace.param_nodes} == {"decoder"}


@pytest.mark.parametrize(("make", "dims", "_laws"), MODELS.values(), ids=MODELS)
def test_every_parameter_learns_and_the_program_fits_encodes_generates(make, dims, _laws, tmp_path):
    program = SinkhornProgram(make(), loss=LOSS)
    before = {name: p.detach().clone() for name, p in program.modules["decoder"].named_parameters()}
    program.fit(images(), num_steps=3, batch_size=16, seed=0, progress=False)
    after = dict(program.modules["decoder"].named_parameters())
    assert all(not after[name].equal(value) for name, value in before.items())
    codes = program.encode(images(7), num_samples=2)
    assert {name: value.shape for name, value in codes.items()} == {n: (2, 7, d) for n, d in dims.items()}
    draws = program.generate(3, images(4))
    assert draws["x"].shape == (3, 4, 64)
    for name in dims:
        trace = poutine.trace(program.model).get_trace(images(7))
        assert bool(trace.nodes[name]["fn"].support.check(codes[name][0]).all())
    program.save(tmp_path / "a.pt")
    loaded = SinkhornProgram.load(tmp_path / "a.pt", make())
    assert loaded.generate(3, images(4), seed=0)["x"].equal(program.generate(3, images(4), seed=0)["x"])
    assert loaded.encode(images(7), seed=0)[name].equal(program.encode(images(7), seed=0)[name])


@pytest.mark.parametrize(
    ("make", "dims"),
    [
        (lambda: dirichlet_archetypes(4, 0.2, num_pixels=9, noise_scale=0.5), {"z": 4}),
        (lambda: hypersphere(3, num_pixels=9, noise_scale=0.5), {"z": 3}),
        (lambda: gaussian(3, num_pixels=9, noise_scale=0.5), {"z": 3}),
        (lambda: sphere_and_normal(3, 1, num_pixels=9, noise_scale=0.5), {"z_what": 3, "z_how": 1}),
    ],
    ids=MODELS,
)
def test_sizes_are_arguments(make, dims):
    x = images(5, 9)
    trace = poutine.trace(make()).get_trace(x)
    assert {name: trace.nodes[name]["value"].shape[-1] for name in dims} == dims
    assert trace.nodes["x"]["fn"].base_dist.scale.unique().tolist() == [0.5]
    assert trace.nodes["x"]["fn"].shape() == (5, 9)


def test_the_concentration_is_an_argument():
    fn = poutine.trace(dirichlet_archetypes(4, 0.2, num_pixels=9)).get_trace(images(2, 9)).nodes["z"]["fn"]
    assert fn.concentration.unique().tolist() == [0.2]


@pytest.mark.parametrize("make", [model for model, *_ in MODELS.values()], ids=MODELS)
def test_latents_follow_the_dtype_of_the_images(make):
    model = make()
    pyro.clear_param_store()
    for module in [
        cell.cell_contents for cell in model.__closure__ if isinstance(cell.cell_contents, torch.nn.Module)
    ]:
        module.float()
    trace = poutine.trace(model).get_trace(images(5).float())
    assert all(
        trace.nodes[name]["value"].dtype == torch.float32 for name in trace.nodes if name.startswith("z")
    )


def test_two_models_of_one_kind_have_decoders_of_their_own():
    first, second = (SinkhornProgram(gaussian(), loss=LOSS) for _ in range(2))
    assert first.owned.originals["decoder"] is not second.owned.originals["decoder"]


def test_the_decoder_maps_any_batch():
    assert decoder_network(3, 7, hidden=5)(torch.zeros(2, 4, 3)).shape == (2, 4, 7)
