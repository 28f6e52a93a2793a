"""Rounding to the transport polytope: always inside, close by, and with the gradient of what it returns."""

import ot as pot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_sinkhorn.ot import round_plan, sinkhorn

D = torch.float64


def clouds(*batch, n=8, m=11, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, 2, dtype=D, generator=rng)
    return x, 0.7 * torch.randn(*batch, m, 2, dtype=D, generator=rng) + 0.5


def weights(*shape, seed=1):
    w = torch.rand(*shape, dtype=D, generator=torch.Generator().manual_seed(seed)) + 0.2
    return w / w.sum(-1, keepdim=True)


def algorithm_2(plan, a, b):
    """Altschuler, Weed and Rigollet 2017, line by line."""
    plan = torch.diag(torch.minimum(a / plan.sum(1), torch.ones_like(a))) @ plan
    plan = plan @ torch.diag(torch.minimum(b / plan.sum(0), torch.ones_like(b)))
    rows, columns = a - plan.sum(1), b - plan.sum(0)
    return plan + torch.outer(rows, columns) / rows.abs().sum()


def assert_coupling(plan, a, b):
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(-1), a.expand(plan.shape[:-1]), atol=1e-12, rtol=0)
    torch.testing.assert_close(plan.sum(-2), b.expand(plan.mT.shape[:-1]), atol=1e-12, rtol=0)


@given(st.integers(0, 10_000), st.floats(-6, 3), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_any_nonnegative_matrix_becomes_a_coupling_nearby(seed, log_scale, n, m, sparse):
    rng = torch.Generator().manual_seed(seed)
    plan = torch.rand(3, n, m, dtype=D, generator=rng) * 10**log_scale
    a, b = weights(3, n, seed=seed), weights(m, seed=seed + 1)
    if sparse:  # empty rows, empty columns, no mass at all, and points that must get none
        plan = plan * (torch.rand(plan.shape, generator=rng) > 0.6)
        a = torch.cat([a, torch.zeros(3, 1, dtype=D)], -1)
        plan = torch.cat([plan, plan[:, :1]], -2)
    out = round_plan(plan, a, b)
    assert_coupling(out, a, b)
    # Lemma 7 of the paper, for plans of at most unit mass
    off = (plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)
    assert ((out - plan).abs().sum((-2, -1)) <= 2 * off + 1e-12).all()


def test_it_is_the_algorithm_of_the_paper():
    plan, a, b = weights(8 * 11).reshape(8, 11), weights(8, seed=2), weights(11, seed=3)
    torch.testing.assert_close(round_plan(plan, a, b), algorithm_2(plan, a, b), atol=1e-15, rtol=0)


def test_a_coupling_stays_as_it_is():
    a, b = weights(8), weights(11, seed=2)
    plan = a.unsqueeze(-1) * b
    torch.testing.assert_close(round_plan(plan, a, b), plan, atol=1e-15, rtol=0)


@pytest.mark.parametrize("gradient", ["envelope", "unrolled"])
@pytest.mark.parametrize("n_iters", [1, 3, 50])
@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_the_rounded_plan_of_a_stopped_solver_is_a_coupling_whose_cost_bounds_the_exact_one(
    gradient, n_iters, epsilon
):
    (x, y), a, b = clouds(3), weights(3, 8), weights(3, 11, seed=2)
    matrix = torch.cdist(x, y).square()
    out = sinkhorn(x, y, epsilon, a, b, value="rounded", gradient=gradient, tolerance=0, max_iters=n_iters)
    plan = out.plan(rounded=True)
    assert_coupling(plan, a, b)
    torch.testing.assert_close(out.value, (plan * matrix).sum((-2, -1)))
    for i in range(3):
        assert out.value[i] >= pot.emd2(a[i], b[i], matrix[i]) - 1e-12
    if n_iters == 1:  # which the plan itself is not, nor its cost a bound
        assert (out.plan().sum(-1) - a).abs().max() > 1e-3


def test_the_sharp_cost_of_a_stopped_plan_is_no_bound_and_the_rounded_one_is():
    # Columns are exact, rows are not: nothing holds the second point at 3, and all of y is met where x has one.
    x, y = torch.tensor([[1.0], [3.0], [1.0]], dtype=D), torch.tensor([[1.0], [3.0], [3.0]], dtype=D)
    options = {"gradient": "unrolled", "tolerance": 0, "max_iters": 1}
    sharp, rounded = (sinkhorn(x, y, 0.3, value=v, **options).value for v in ("sharp", "rounded"))
    exact = 4 / 3
    assert sharp < 1e-4
    assert exact <= rounded < exact + 1e-5


def slope(function, at, direction, step=1e-4):
    """Central difference, of the fourth order, of ``function`` along ``direction``."""
    near, far = (function(at + h * direction) - function(at - h * direction) for h in (step, 2 * step))
    return (8 * near - far) / (12 * step)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_gradient_matches_differences(which):
    rng = torch.Generator().manual_seed(4)
    inputs = [weights(2, 8 * 11).reshape(2, 8, 11), weights(2, 8, seed=2), weights(2, 11, seed=3)]
    probe = torch.randn(2, 8, 11, dtype=D, generator=rng)
    move = torch.randn(inputs[which].shape, dtype=D, generator=rng)
    move = (move - move.mean(-1, keepdim=True)) * inputs[which].abs().min() / 100

    def run(t):
        return (round_plan(*(t if k == which else u for k, u in enumerate(inputs))) * probe).sum()

    leaf = inputs[which].clone().requires_grad_()
    (grad,) = torch.autograd.grad(run(leaf), leaf)
    expected = slope(run, inputs[which], move, step=1e-2)
    torch.testing.assert_close((grad * move).sum(), expected, atol=0, rtol=1e-6)


def test_the_gradient_is_finite_where_there_is_no_mass():
    plan = torch.tensor([[0.0, 0.0], [1e-300, 0.0], [0.4, 0.6]], dtype=D, requires_grad=True)
    a = torch.tensor([0.0, 0.5, 0.5], dtype=D, requires_grad=True)
    out = round_plan(plan, a, torch.tensor([1.0, 0.0], dtype=D))
    grads = torch.autograd.grad((out * torch.arange(6, dtype=D).reshape(3, 2)).sum(), (plan, a))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    ("plan", "a", "b", "message"),
    [
        ((8, 11), 8, 8, r"plan has shape \(8, 11\), a \(8,\) and b \(8,\): expected \(\.\.\., n, m\)"),
        ((8,), 8, 8, r"plan has shape \(8,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(plan, a, b, message):
    with pytest.raises(ValueError, match=message):
        round_plan(torch.ones(plan), weights(a), weights(b))


def test_masses_that_cannot_be_met_are_refused():
    plan, a, b = torch.ones(8, 11, dtype=D), weights(8), weights(11)
    with pytest.raises(ValueError, match="no plan has both marginals"):
        round_plan(plan, a, 2 * b)
    with pytest.raises(ValueError, match="must be nonnegative"):
        round_plan(-plan, a, b)
