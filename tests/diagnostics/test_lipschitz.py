"""Lipschitz constants: exact where they are known, and in the right order everywhere."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyro_sinkhorn.diagnostics.lipschitz import SLOPES, local_norms, upper_bound

#: Functions of one number, with the name their operation has.
ACTIVATIONS = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "cos": torch.cos,
    "abs": torch.abs,
    "neg": torch.neg,
    "softplus": F.softplus,
    "log_sigmoid_forward": F.logsigmoid,
    "clamp_min": lambda x: x.clamp_min(0.5),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
}


def norm(module):
    return float(torch.linalg.matrix_norm(module.weight.detach(), 2))


def slopes(function, z, iterations=100):
    def over(values, by):
        return {"z": values["z"] / by.unsqueeze(-1)}

    return local_norms(lambda v: function(v["z"]), {"z": z}, lambda v: v["z"].norm(dim=-1), over, iterations)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_of_activations_are_their_suprema(name):
    x = torch.linspace(-20, 20, 40_001).requires_grad_()
    (found,) = torch.autograd.grad(ACTIVATIONS[name](x).sum(), x)
    assert 0.97 * SLOPES[name] <= float(found.abs().max()) <= SLOPES[name]
    z = torch.randn(4, 3)
    assert upper_bound(lambda: ACTIVATIONS[name](z), [z]).constant == SLOPES[name]


@pytest.mark.parametrize(("slope", "expected"), [(0.1, 1.0), (3.0, 3.0)])
def test_slopes_that_are_arguments(slope, expected):
    z = torch.randn(4, 3)
    assert upper_bound(lambda: F.leaky_relu(z, slope), [z]).constant == expected
    assert upper_bound(lambda: F.elu(z, slope), [z]).constant == expected


def test_softmax_halves_distances_at_least():
    z = torch.randn(50, 4)
    found = upper_bound(lambda: z.softmax(-1), [z]).constant
    assert found == 0.5
    two = torch.zeros(1, 2)  # where the constant is reached
    assert slopes(lambda v: v.softmax(-1), two)[0] == pytest.approx(0.5)


def test_a_stack_of_layers_has_the_product_of_their_norms():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5), nn.Sigmoid())
    z = torch.randn(6, 3)
    found = upper_bound(lambda: net(z), [z])
    assert found.reason == ""
    assert found.constant == pytest.approx(norm(net[0]) * norm(net[2]) * norm(net[4]) / 4)


def test_sums_products_and_pieces():
    z, w = torch.randn(2, 4, 3)
    scale = torch.tensor([1.0, -2.0, 0.5])

    def constant(function):
        return upper_bound(function, [z, w]).constant

    assert constant(lambda: z + w) == 2
    assert constant(lambda: z - 3 * w) == 4
    assert constant(lambda: z * scale + 1) == 2
    assert constant(lambda: scale / 4 * z) == 0.5
    assert constant(lambda: z / scale) == 2
    assert constant(lambda: torch.cat([z, w, z], -1)) == pytest.approx(math.sqrt(3))
    assert constant(lambda: z.mean(-1)) == pytest.approx(1 / math.sqrt(3))
    assert constant(lambda: z.sum(-1, keepdim=True)) == pytest.approx(math.sqrt(3))
    assert constant(lambda: z[:, :1].expand(4, 9)) == pytest.approx(3)
    assert constant(lambda: z[:, :1] + torch.zeros(4, 9)) == pytest.approx(3)  # repeated without being asked
    assert constant(lambda: torch.ones(4, 2)) == 0


def test_what_has_no_constant_is_named():
    z = torch.randn(4, 3)
    assert upper_bound(lambda: z.exp().tanh(), [z]).reason == "exp"
    assert upper_bound(lambda: z * z, [z]).reason == "mul"
    assert upper_bound(lambda: torch.where(z > 0, z, -z), [z]).reason != ""
    assert "choice" in upper_bound(lambda: z if bool((z > 0).all()) else -z, [z]).reason
    assert upper_bound(lambda: z.exp(), [z]).constant == math.inf


def test_in_place_layers():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    z = torch.randn(6, 3)
    assert upper_bound(lambda: net(z), [z]).constant == pytest.approx(norm(net[0]) * norm(net[2]))


def test_local_norms_are_those_of_the_jacobians():
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 7))
    z = torch.randn(20, 3)
    jacobians = torch.func.vmap(torch.func.jacrev(net))(z)
    exact = torch.linalg.matrix_norm(jacobians, 2).detach()
    found = slopes(net, z)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=0)
    assert bool((found <= exact * (1 + 1e-10)).all())
    assert float(found.max()) <= upper_bound(lambda: net(z), [z]).constant
    assert bool((slopes(net, z, iterations=1) <= exact).all())


def test_a_constant_function_has_no_slope():
    assert float(slopes(lambda z: torch.ones(5, 2), torch.randn(5, 3)).max()) == 0
