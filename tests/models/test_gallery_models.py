"""The programs of the gallery: each trains all its parameters and generates; and a fact of each."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch.nn.functional import one_hot

from pyro_sinkhorn import AutoImplicit, SinkhornProgram, Trace_Sinkhorn
from pyro_sinkhorn.models import (
    GlimpseEncoder,
    canvas_digits,
    circular_walk,
    conditional_digits,
    cut_from_canvas,
    even_directions,
    growth_curves,
    lkj_covariance,
    place_on_canvas,
    pseudo_input_digits,
    sun_sensors,
)

N = 40


def angles_read(x):
    return torch.cat([x.cos(), x.sin()], -1)


def moments_read(x):
    return (x.mT @ x).flatten(1)


#: Model, its arguments, latent event shapes, shape of a datum, what the encoder reads, parameters of the model.
PROGRAMS = {
    "sun_sensors": (sun_sensors, lambda: (torch.rand(N, 12),), {"z": (3,)}, (12,), None, {"gains"}),
    "circular_walk": (
        lambda: circular_walk(3),
        lambda: (6 * torch.rand(N, 3) - 3,),
        {"z_0": (), "z_2": ()},
        None,
        angles_read,
        set(),
    ),
    "growth_curves": (
        growth_curves,
        lambda: (torch.randn(N, 4), torch.arange(4.0)),
        {"mean": (2,), "spread": (2,), "effects": (2,)},
        (4,),
        None,
        set(),
    ),
    "lkj_covariance": (
        lkj_covariance,
        lambda: (torch.randn(N, 9, 3),),
        {"scales": (3,), "tril": (3, 3)},
        (9, 3),
        moments_read,
        set(),
    ),
    "canvas_digits": (
        canvas_digits,
        lambda: (torch.rand(N, 20, 20),),
        {"z_where": (2,), "z_what": (10,)},
        (20, 20),
        None,
        {"decoder"},
    ),
    "conditional_digits": (
        conditional_digits,
        lambda: (torch.rand(N, 64), torch.arange(N) % 10),
        {"z": (6,)},
        (64,),
        None,
        {"decoder", "prior"},
    ),
    "pseudo_input_digits": (
        lambda: pseudo_input_digits(4),
        lambda: (torch.rand(N, 64),),
        {"z": (8,)},
        (64,),
        None,
        {"decoder", "prior", "pseudo_inputs"},
    ),
}
ALL = pytest.mark.parametrize(
    ("make", "data", "latents", "datum", "reads", "parameters"), PROGRAMS.values(), ids=PROGRAMS
)


@ALL
def test_a_loss_step_reaches_every_parameter(make, data, latents, datum, reads, parameters):
    model, args = make(), data()
    guide = AutoImplicit(model, encoder_input=None if reads is None else lambda x, *_: reads(x))
    Trace_Sinkhorn(match_size=8).loss_and_grads(model, guide, *args)
    found = dict(pyro.get_param_store().named_parameters())
    for name, parameter in found.items():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name
    assert {n.split("$$$")[0] for n in found if not n.startswith("AutoImplicit")} == parameters


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_fits_encodes_and_generates(make, data, latents, datum, reads, parameters, dtype):
    torch.set_default_dtype(dtype)
    model, args = make(), data()
    guide = AutoImplicit(model, encoder_input=None if reads is None else lambda x, *_: reads(x))
    program = SinkhornProgram(model, guide, Trace_Sinkhorn(match_size=8))
    program.fit(*args, num_steps=2, batch_size=20, seed=0, progress=False)
    generated, codes = program.generate(3, *args), program.encode(*args)
    trace = poutine.trace(program.model).get_trace(*args)
    for name, event in latents.items():
        assert codes[name].dtype == generated[name].dtype == dtype
        assert codes[name].shape[2:] == event
        assert bool(trace.nodes[name]["fn"].support.check(codes[name][0]).all())
    if datum is not None:
        assert generated["x"].shape == (3, N, *datum)
        assert bool(generated["x"].isfinite().all())


# Directions.


def test_directions_are_spread_evenly():
    directions = even_directions(200)
    assert directions.norm(dim=-1).allclose(torch.ones(200))
    assert (directions.mT @ directions / 200).allclose(torch.eye(3) / 3, atol=1e-3)
    nearest = (directions @ directions.mT - 2 * torch.eye(200)).amax(-1).clamp_max(1).acos()
    assert nearest.max() / nearest.min() < 1.4
    # Every direction is seen by four of the default cells, one more than it has coordinates.
    seen = even_directions(50_000) @ even_directions(12).mT > 0
    assert seen.sum(-1).min() == 4


def test_a_cell_reads_the_cosine_times_its_gain_and_nothing_in_the_shade():
    pyro.param("gains", torch.linspace(0.5, 1.5, 12))
    trace = poutine.trace(sun_sensors(noise_scale=0.1)).get_trace(torch.zeros(50, 12))
    z, law = trace.nodes["z"]["value"], trace.nodes["x"]["fn"]
    cosines = z @ even_directions(12).mT
    assert law.mean.allclose(torch.where(cosines > 0, cosines, 0.0) * torch.linspace(0.5, 1.5, 12))
    assert (law.mean == 0).any() and law.variance.allclose(torch.tensor(0.01))


def test_steps_of_the_walk_and_its_observations_have_the_concentrations_asked_for():
    n = 20_000
    walk = poutine.uncondition(circular_walk(3, steadiness=6.0, precision=3.0))
    sites = poutine.trace(walk).get_trace(torch.zeros(n, 3)).nodes
    draws = {name: sites[name]["value"] for name in ("z_0", "z_1", "z_2", "x_2")}
    pairs = {6.0: draws["z_2"] - draws["z_1"], 3.0: draws["x_2"] - draws["z_2"], 1.0: draws["z_0"]}
    for concentration, difference in pairs.items():
        law = stats.vonmises(concentration)
        exact, second = (
            law.expect(np.cos, lb=-np.pi, ub=np.pi),
            law.expect(lambda a: np.cos(a) ** 2, lb=-np.pi, ub=np.pi),
        )
        error = 5 * math.sqrt((second - exact**2) / n)  # p = 6e-7
        assert float(difference.cos().mean()) == pytest.approx(exact, abs=error)
        assert abs(float(difference.sin().mean())) < 5 * math.sqrt((1 - second) / n)


def test_the_seam_of_the_circle_is_no_border():
    """An observation at 3.1 is as likely below -3.1 as the difference across the seam says."""
    model = poutine.condition(circular_walk(1), {"z_0": torch.tensor([-3.1, 0.0])})
    trace = poutine.trace(model).get_trace(torch.tensor([[3.1], [3.1 + 3.1 - 2 * math.pi]]))
    trace.compute_log_prob()
    likelihood = trace.nodes["x_0"]["log_prob"]
    assert likelihood[0].item() == pytest.approx(likelihood[1].item())


# Random effects and covariances.


def test_measurements_spread_with_time_as_random_slopes_say():
    times, n = torch.tensor([-1.0, 0.0, 2.0]), 40_000
    fixed = {"mean": torch.tensor([1.0, -2.0]), "spread": torch.tensor([0.5, 1.5])}
    program = poutine.condition(poutine.uncondition(growth_curves(0.5)), fixed)
    x = poutine.trace(program).get_trace(torch.zeros(n, 3), times).nodes["x"]["value"]
    variance = 0.25 + 2.25 * times.square() + 0.25
    assert (x.mean(0) - (1 - 2 * times)).abs().lt(5 * (variance / n).sqrt()).all()
    assert (x.var(0) / variance - 1).abs().lt(5 * math.sqrt(2 / n)).all()


def test_the_density_of_a_group_is_that_of_its_covariance():
    x = torch.randn(4, 7, 3)
    trace = poutine.trace(lkj_covariance()).get_trace(x)
    trace.compute_log_prob()
    for i in range(4):
        factor = trace.nodes["scales"]["value"][i].diag() @ trace.nodes["tril"]["value"][i]
        exact = (
            stats.multivariate_normal(np.zeros(3), (factor @ factor.mT).numpy()).logpdf(x[i].numpy()).sum()
        )
        assert trace.nodes["x"]["log_prob"][i].item() == pytest.approx(exact)


def test_correlations_of_two_responses_are_uniform():
    tril = poutine.trace(lkj_covariance(2)).get_trace(torch.zeros(5000, 1, 2)).nodes["tril"]["value"]
    assert stats.kstest(tril[:, 1, 0].numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-6


# Digits.


@pytest.mark.parametrize(("across", "down"), [(0, 0), (12, 0), (0, 12), (3, 7)])
def test_a_glyph_is_pasted_where_it_is_said(across, down):
    glyph = torch.rand(8, 8)
    where = torch.tensor([across, down]) / 6.0 - 1
    expected = torch.zeros(20, 20)
    expected[down : down + 8, across : across + 8] = glyph
    assert place_on_canvas(glyph, where).allclose(expected, atol=1e-12)


def test_canvases_in_batches_and_their_gradient_in_the_place():
    glyphs, where = torch.rand(2, 3, 8, 8), (torch.rand(2, 3, 2) * 1.9 - 0.95).requires_grad_()
    batched = place_on_canvas(glyphs, where)
    assert batched.shape == (2, 3, 20, 20)
    assert batched[1, 2].allclose(place_on_canvas(glyphs[1, 2], where[1, 2]))
    # Between pixels the interpolation is linear, so that a difference is the derivative.
    weights, step = torch.rand(20, 20), torch.tensor([1e-6, 0.0])
    (gradient,) = torch.autograd.grad((weights * batched[0, 0]).sum(), where)
    here = where.detach()[0, 0]
    moved = place_on_canvas(glyphs[0, 0], here + step) - place_on_canvas(glyphs[0, 0], here - step)
    assert float((weights * moved).sum() / 2e-6) == pytest.approx(float(gradient[0, 0, 0]), rel=1e-5)
    assert not gradient[0, 1:].any()


@pytest.mark.parametrize(("across", "down"), [(0, 0), (12, 12), (3, 7)])
def test_cutting_takes_back_what_was_pasted(across, down):
    glyphs, where = torch.rand(5, 8, 8), torch.tensor([across, down]) / 6.0 - 1
    assert cut_from_canvas(place_on_canvas(glyphs, where), where).allclose(glyphs, atol=1e-12)


def test_an_encoder_that_looks_reads_the_same_glyph_the_same_anywhere():
    places = torch.tensor([[-0.5, 0.5], [0.5, 0.0]])

    class Told(torch.nn.Module):
        def forward(self, images):
            return places

    encoder = GlimpseEncoder()
    encoder.locate = Told()
    codes = encoder(place_on_canvas(torch.rand(8, 8).expand(2, 8, 8), places))
    assert codes[:, :2].equal(places) and codes[0, 2:].allclose(codes[1, 2:])


def test_where_to_look_is_learned_through_the_window():
    encoder = GlimpseEncoder()
    encoder(torch.rand(4, 20, 20))[:, 2:].square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in encoder.parameters())


def test_the_prior_of_a_style_is_that_of_its_label():
    model, y = conditional_digits(dim=2), torch.tensor([3, 0, 3])
    trace = poutine.trace(model).get_trace(torch.rand(3, 64), y)
    weight, bias = pyro.param("prior$$$weight"), pyro.param("prior$$$bias")
    assert trace.nodes["z"]["fn"].mean.allclose(one_hot(y, 10).double() @ weight.T + bias)
    assert trace.nodes["z"]["fn"].variance.eq(1).all()


def test_components_have_standard_means_and_scales_below_one():
    start = torch.rand(5, 64) * 0.9 + 0.05
    law = poutine.trace(pseudo_input_digits(5, start=start)).get_trace(torch.rand(3, 64)).nodes["z"]["fn"]
    assert law.locs[0].mean(0).abs().max() < 1e-12 and law.locs[0].std(0).allclose(torch.ones(8))
    assert (law.coord_scale < 1).all() and (law.coord_scale > 0).all()
    assert pyro.param("pseudo_inputs").allclose(start)
    with pytest.raises(ValueError, match=r"start has shape \(5, 64\): expected \(4, 64\)"):
        pseudo_input_digits(4, start=start)
