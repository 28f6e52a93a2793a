"""Epsilon 0: the exact assignment, its potentials, its gradients, and what it refuses."""

from itertools import permutations

import ot as pot
import pytest
import torch

from pyro_sinkhorn.errors import NonFiniteError
from pyro_sinkhorn.ot import sinkhorn, sinkhorn_divergence

D = torch.float64
COSTS = ["sqeuclidean", "euclidean"]
VALUES = ["entropic", "sharp", "rounded"]


def clouds(*batch, n=14, d=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, d, dtype=D, generator=rng)
    return x, 0.7 * torch.randn(*batch, n, d, dtype=D, generator=rng) + 0.5


def uniform(n):
    return torch.full((n,), 1 / n, dtype=D)


def ground(cost, x, y):
    return torch.cdist(x, y).square() if cost == "sqeuclidean" else torch.cdist(x, y)


@pytest.mark.parametrize("cost", COSTS)
def test_it_is_the_best_of_all_permutations(backend, cost):
    x, y = clouds(n=5)
    matrix = ground(cost, x, y)
    best = min(sum(matrix[i, j] for i, j in enumerate(p)) / 5 for p in permutations(range(5)))
    torch.testing.assert_close(sinkhorn(x, y, 0, cost=cost, backend=backend).value, best)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("cost", COSTS)
def test_value_and_plan_are_those_of_pot(backend, cost, value):
    x, y = clouds(2, 3)
    out = sinkhorn(x, y, 0.0, cost=cost, value=value, backend=backend)
    plan, matrix = out.plan(), ground(cost, x, y)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        i, j = index
        theirs = pot.emd(uniform(14), uniform(14), matrix[i, j])
        torch.testing.assert_close(plan[i, j], theirs, atol=1e-12, rtol=0)
        torch.testing.assert_close(out.value[i, j], (theirs * matrix[i, j]).sum())
    assert torch.equal(out.plan(rounded=True).round(decimals=12), plan.round(decimals=12))
    assert out.n_iters == 0
    assert out.converged.all()
    assert not out.marginal_error.any()
    assert out.converged.shape == out.marginal_error.shape == (2, 3)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_the_potentials_are_feasible_tight_on_the_plan_and_worth_its_cost(cost, dtype):
    x, y = (t.to(dtype) for t in clouds(4, n=60))
    out = sinkhorn(x, y, 0, cost=cost)
    slack = ground(cost, x, y) - out.f.unsqueeze(-1) - out.g.unsqueeze(-2)
    small = 1e-12 if dtype == D else 1e-5
    assert slack.min() > -small
    assert slack[out.plan() > 0].abs().max() < small
    torch.testing.assert_close(out.f.mean(-1), out.g.mean(-1))
    torch.testing.assert_close(out.f.mean(-1) + out.g.mean(-1), out.value)


@pytest.mark.parametrize("cost", COSTS)
def test_gradients_in_the_points_match_differences(cost):
    x, y = (t.requires_grad_() for t in clouds())
    grads = torch.autograd.grad(sinkhorn(x, y, 0, cost=cost).value, (x, y))
    points, h = [x.detach(), y.detach()], 1e-6
    for index, grad in enumerate(grads):
        for i in range(14):
            move = torch.zeros_like(grad)
            move[i, i % 2] = h
            ahead, behind = (
                sinkhorn(
                    *(p + s * move if k == index else p for k, p in enumerate(points)), 0, cost=cost
                ).value
                for s in (1, -1)
            )
            torch.testing.assert_close(grad[i, i % 2], (ahead - behind) / (2 * h), atol=1e-8, rtol=0)


@pytest.mark.parametrize("side", [0, 1])
def test_the_gradient_of_the_weights_is_a_potential_and_bounds_exact_transport_from_below(side):
    # Exact transport is convex in the weights: a subgradient is a tangent plane below it.
    x, y = clouds()
    w = [uniform(14).requires_grad_(), uniform(14).requires_grad_()]
    out = sinkhorn(x, y, 0, *w)
    grad = torch.autograd.grad(out.value, w)[side]
    torch.testing.assert_close(grad, (out.f, out.g)[side])
    matrix, rng = ground("sqeuclidean", x, y), torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 0.05):
        for _ in range(10):
            move = torch.randn(14, dtype=D, generator=rng)
            move = size * (move - move.mean()) / move.abs().max() / 2
            moved = [uniform(14), uniform(14)]
            moved[side] = moved[side] + move
            assert pot.emd2(*moved, matrix) >= out.value + grad @ move - 1e-12


def test_small_epsilon_closes_in_on_it(backend):
    x, y = clouds(n=6)
    exact = sinkhorn(x, y, 0, backend=backend)
    near = sinkhorn(x, y, 2e-3, value="sharp", tolerance=1e-3, max_iters=50_000, backend=backend)
    torch.testing.assert_close(near.value, exact.value, atol=5e-3, rtol=0)
    torch.testing.assert_close(near.plan(), exact.plan(), atol=1e-2, rtol=0)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("debias", ["independent", "self", None])
def test_the_divergence_takes_it_in_every_mode(value, debias):
    x, y = clouds(2)
    x.requires_grad_()
    out = sinkhorn_divergence(x, y, 0, debias=debias, value=value, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(out.value, out.cross - out.self_x / 2 - out.self_y / 2)
    (grad,) = torch.autograd.grad(out.value.sum(), x)
    assert grad.isfinite().all()
    assert grad.abs().max() > 0
    if debias != "independent":
        assert not out.self_x.any() or debias == "self"
        torch.testing.assert_close(out.self_x, torch.zeros_like(out.self_x), atol=1e-12, rtol=0)
        torch.testing.assert_close(out.value, sinkhorn(x, y, 0).value)


def test_halves_are_equal_whatever_the_clouds():
    x, y = clouds(n=20)
    out = sinkhorn_divergence(x, y[:13], 0)
    assert out.value.isfinite()
    for debias in ("self", None):
        with pytest.raises(ValueError, match="clouds of 20 and 13 points"):
            sinkhorn_divergence(x, y[:13], 0, debias=debias)


def test_equal_points_and_ties_make_no_trouble():
    x = torch.zeros(6, 2, dtype=D, requires_grad=True)
    out = sinkhorn(x, torch.zeros(6, 2, dtype=D), 0, cost="euclidean")
    assert out.value == 0
    assert not torch.autograd.grad(out.value, x)[0].any()
    grid = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0)).to(D)
    tied = sinkhorn(grid, grid.flip(0) + 0.5, 0)
    slack = ground("sqeuclidean", grid, grid.flip(0) + 0.5) - tied.f.unsqueeze(-1) - tied.g
    assert slack.min() > -1e-10
    assert slack[tied.plan() > 0].abs().max() < 1e-10


def test_points_that_are_no_numbers_are_named():
    x, y = clouds(2)
    x[1, 3, 0] = torch.nan
    with pytest.raises(
        NonFiniteError, match=r"x, shape \(2, .* in 1 of \d+ points .* point 3 of problem \(1,\)"
    ):
        sinkhorn(x, y, 0)


NO_ASSIGNMENT = {
    "unequal sizes": (
        {"y": torch.zeros(9, 2, dtype=D)},
        r"clouds of 14 and 9 points: .* equally many .* ot\.emd",
    ),
    "weights": (
        {"a": torch.linspace(0.5, 1.5, 14, dtype=D) / 14},
        r"weights a between 0\.0357 and 0\.107: .* uniform weights.* small positive epsilon .*ot\.emd",
    ),
    "masked": (
        {"b": torch.cat([uniform(13), torch.zeros(1, dtype=D)])},
        r"weights b between 0 and 0\.0769: .* here 1/14",
    ),
    "unrolled": ({"gradient": "unrolled"}, r"'unrolled' at epsilon 0, .* leave gradient='envelope'"),
    "some of a batch": (
        {"epsilon": torch.tensor([0.0, 1.0])},
        r"epsilon is tensor.*: expected all problems .* call once for each kind",
    ),
    "unknown backend": ({"backend": "magic"}, r"unknown backend 'magic'"),
}


@pytest.mark.parametrize("case", NO_ASSIGNMENT)
def test_what_is_no_assignment_is_refused_with_what_to_do(case):
    x, y = clouds()
    changes, message = NO_ASSIGNMENT[case]
    if case == "some of a batch":
        x = x.expand(2, -1, -1)
    with pytest.raises(ValueError, match=message):
        sinkhorn(**({"x": x, "y": y, "epsilon": 0.0} | changes))
