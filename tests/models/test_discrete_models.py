"""Programs with discrete latents: their laws, and that they broadcast over enumerated states."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch.nn.functional import one_hot

from pyro_sinkhorn import AutoImplicit, SinkhornProgram, TraceEnum_Sinkhorn
from pyro_sinkhorn.models import gaussian_mixture, semi_supervised_digits, spike_and_slab

N = 40

#: Model, its arguments, every state of its discrete site, enumerated to the left of the plate.
ENUMERATED = {
    "gaussian_mixture": (gaussian_mixture, lambda: (torch.randn(N, 4),), "z", torch.arange(3).reshape(3, 1)),
    "spike_and_slab": (
        spike_and_slab,
        lambda: (torch.randn(N, 12),),
        "switches",
        torch.cartesian_prod(*[torch.arange(2.0)] * 4).unsqueeze(1),
    ),
    "semi_supervised_digits": (
        semi_supervised_digits,
        lambda: (torch.rand(N, 64), torch.arange(N) % 11 - 1),
        "y",
        torch.eye(10).unsqueeze(1),
    ),
}


@pytest.mark.parametrize(("make", "data", "name", "states"), ENUMERATED.values(), ids=ENUMERATED)
def test_all_states_at_once_score_as_one_by_one(make, data, name, states):
    model, args = make(), data()
    states = states.to(torch.get_default_dtype()) if states.is_floating_point() else states
    first = poutine.trace(model).get_trace(*args)
    others = {n: s["value"] for n, s in first.nodes.items() if s["type"] == "sample" and n != name}
    together = poutine.trace(poutine.condition(model, others | {name: states})).get_trace(*args)
    together.compute_log_prob()
    for i, state in enumerate(states):
        every = state.expand(N, *state.shape[1:])
        alone = poutine.trace(poutine.condition(model, others | {name: every})).get_trace(*args)
        alone.compute_log_prob()
        for site in first.observation_nodes:
            assert together.nodes[site]["log_prob"][i].allclose(alone.nodes[site]["log_prob"]), site


def without_label(*args):
    return args[0]


@pytest.mark.parametrize(("make", "data", "name", "states"), ENUMERATED.values(), ids=ENUMERATED)
def test_a_loss_step_reaches_every_parameter(make, data, name, states):
    model, args = make(), data()
    guide = AutoImplicit(model, encoder_input=without_label)
    TraceEnum_Sinkhorn(match_size=8).loss_and_grads(model, guide, *args)
    found = dict(pyro.get_param_store().named_parameters())
    for parameter_name, parameter in found.items():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), parameter_name
        assert bool(parameter.grad.any()), parameter_name
    learned = {"z": {"centres", "scales"}, "switches": {"loadings"}, "y": {"decoder"}}[name]
    assert {n.split("$$$")[0] for n in found if not n.startswith("AutoImplicit")} == learned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("make", "data", "name", "states"), ENUMERATED.values(), ids=ENUMERATED)
def test_it_fits_encodes_and_generates(make, data, name, states, dtype):
    torch.set_default_dtype(dtype)
    model, args = make(), data()
    guide = AutoImplicit(model, encoder_input=without_label)
    program = SinkhornProgram(model, guide, TraceEnum_Sinkhorn(match_size=8))
    program.fit(*args, num_steps=2, batch_size=20, seed=0, progress=False)
    generated, codes = program.generate(3, *args), program.encode(*args)
    assert codes[name].shape == (1, N, *states.shape[2:]) and generated[name].shape == (
        3,
        N,
        *states.shape[2:],
    )
    assert generated["x"].shape == (3, *args[0].shape) and bool(generated["x"].isfinite().all())
    every = states.flatten(0, 1).reshape(len(states), -1).to(codes[name].dtype)
    for drawn in (codes[name], generated[name]):
        assert (drawn.reshape(-1, 1, every.shape[-1]) == every).all(-1).any(-1).all()


# Mixtures.


def test_points_lie_around_the_centre_of_their_component():
    start = torch.randn(3, 2)
    shares = torch.tensor([0.2, 0.3, 0.5])
    pyro.param("scales", torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]))
    model = poutine.uncondition(gaussian_mixture(3, 2, shares, start))
    nodes = poutine.trace(model).get_trace(torch.zeros(30_000, 2)).nodes
    z, x = nodes["z"]["value"], nodes["x"]["value"]
    assert stats.chisquare(z.bincount().numpy(), 30_000 * shares.numpy()).pvalue > 1e-6
    for k in range(3):
        part, scale = x[z == k], pyro.param("scales")[k].detach()
        assert (part.mean(0) - start[k]).abs().lt(5 * scale / len(part) ** 0.5).all()
        assert (part.var(0) / scale**2 - 1).abs().lt(5 * math.sqrt(2 / len(part))).all()


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"shares have shape \(2,\): expected \(3,\)"):
        gaussian_mixture(3, shares=torch.ones(2) / 2)
    with pytest.raises(ValueError, match=r"start has shape \(3, 2\): expected \(3, 4\)"):
        gaussian_mixture(3, start=torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"start has shape \(3, 2\): expected \(4, 12\)"):
        spike_and_slab(start=torch.zeros(3, 2))


# Sparse factors.


def test_a_factor_is_on_for_its_share_and_data_have_the_covariance_that_says():
    n, start = 40_000, torch.randn(3, 5)
    model = poutine.uncondition(spike_and_slab(3, 5, share=0.3, noise_scale=0.5, start=start))
    nodes = poutine.trace(model).get_trace(torch.zeros(n, 5)).nodes
    on = nodes["switches"]["value"].sum(0).numpy()
    assert min(stats.binomtest(int(k), n, 0.3).pvalue for k in on) > 1e-6
    x = nodes["x"]["value"]
    exact = 0.3 * start.mT @ start + 0.25 * torch.eye(5)
    products = x.unsqueeze(-1) * x.unsqueeze(-2)
    z = (products.mean(0) - exact) / (products.std(0) / n**0.5)
    assert z.abs().max() < 6  # 15 numbers: p = 3e-8


# Few labels.


def scored(label, y):
    model = poutine.condition(semi_supervised_digits(label_error=0.01), {"y": y})
    trace = poutine.trace(model).get_trace(torch.rand(len(y), 64), label)
    trace.compute_log_prob()
    return trace.nodes["label"]["log_prob"]


def test_a_label_is_an_observation_of_the_class_and_none_says_nothing():
    y = one_hot(torch.tensor([3, 3, 3]), 10).to(torch.get_default_dtype())
    right, wrong, unknown = scored(torch.tensor([3, 4, -1]), y).exp().tolist()
    assert right == pytest.approx(0.991) and wrong == pytest.approx(0.001) and unknown == 1.0
    assert math.log(right / wrong) == pytest.approx(math.log(1 + 10 * 0.99 / 0.01))


def test_the_weight_of_labels():
    model = poutine.condition(semi_supervised_digits(label_weight=7.0), {"y": torch.eye(10)})
    assert poutine.trace(model).get_trace(torch.rand(10, 64), torch.arange(10)).nodes["label"]["scale"] == 7.0


def test_classes_are_equally_frequent():
    model = poutine.uncondition(semi_supervised_digits())
    nodes = poutine.trace(model).get_trace(torch.zeros(5000, 64), torch.zeros(5000, dtype=torch.long)).nodes
    counts = nodes["y"]["value"].sum(0).numpy()
    assert stats.chisquare(counts).pvalue > 1e-6
    agree = np.mean((nodes["label"]["value"] == nodes["y"]["value"].argmax(-1)).numpy())
    assert agree > 0.99  # of labels only one in a thousand is drawn at random
