"""The ``triton`` and ``flash`` backends on a CUDA device, at sizes that the interpreter cannot reach."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from pyro_sinkhorn.ot.backends.graph import capture
from pyro_sinkhorn.ot.backends.log_domain import solve_log_domain
from pyro_sinkhorn.ot.backends.triton_backend import solve_triton
from pyro_sinkhorn.ot.envelope import entropic_value
from pyro_sinkhorn.ot.problem import Problem

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]


def make(batch, n, m, d, symmetric=False, tolerance=1e-4, max_iters=200, masked=True):
    rng = torch.Generator().manual_seed(n)
    x = torch.randn(batch, n, d, generator=rng, dtype=torch.float64) + 3
    y = 1.3 * torch.randn(batch, m, d, generator=rng, dtype=torch.float64) + 3.5
    a, b = (torch.rand(batch, k, generator=rng, dtype=torch.float64) + 0.1 for k in (n, m))
    if masked:
        a[:, ::7], b[:, 1::5] = 0, 0
    x, y, a, b = (t.float().cuda() for t in (x, y, a, b))
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    if symmetric:
        y, b = x, a
    epsilon = 0.4 * d * torch.linspace(1, 2, batch).float().cuda()
    return Problem(x, y, a, b, epsilon, "sqeuclidean", tolerance, max_iters, symmetric)


def value_and_gradient(problem, solver):
    x = problem.x.clone().requires_grad_()
    problem = replace(problem, x=x, y=x if problem.symmetric else problem.y)
    solution = solver(problem)
    value = entropic_value(problem, solution)
    return solution, value.detach().double(), torch.autograd.grad(value.sum(), x)[0].double()


def reference(problem):
    a, b = (w.double() / w.double().sum(-1, keepdim=True) for w in (problem.a, problem.b))
    x, y = problem.x.double(), problem.y.double()
    if problem.symmetric:
        y, b = x, a
    exact = replace(
        problem, x=x, y=y, a=a, b=b, epsilon=problem.epsilon.double(), tolerance=1e-9, max_iters=5000
    )
    return value_and_gradient(exact, solve_log_domain)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("batch", "n", "m", "d", "regime"),
    [
        (6, 100, 128, 8, "small"),
        (200, 60, 60, 3, "small"),
        (6, 300, 310, 16, "panel"),  # more problems than groups on most devices
        (3, 512, 512, 16, "panel"),
        (2, 700, 1024, 64, "panel"),
        (2, 1000, 900, 5, "tiles"),
        (1, 5000, 3000, 64, "tiles"),
        (1, 2000, 2000, 100, "tiles"),
    ],
)
def test_values_and_gradients_are_those_of_the_reference(batch, n, m, d, regime, symmetric):
    problem = make(batch, n, n if symmetric else m, d, symmetric)
    solution, value, slope = value_and_gradient(problem, lambda p: solve_triton(p, regime))
    _, expected, expected_slope = reference(problem)
    assert bool(solution.converged.all())
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    assert float((slope - expected_slope).norm() / expected_slope.norm()) < 2e-3


def test_one_launch_of_panels_repeats_one_launch_an_iteration():
    from pyro_sinkhorn.ot.backends.triton_layout import State, lay_out
    from pyro_sinkhorn.ot.backends.triton_panel import solve_panel

    for symmetric in (False, True):
        layout, phi, gamma = lay_out(make(6, 500, 500, 8, symmetric))
        results = []
        for persistent in (True, True, False):
            state, found = State.of(layout), (phi.clone(), gamma.clone())
            solve_panel(layout, *found, state, 1e-4, 100, persistent)
            results.append((*found[: 1 if symmetric else 2], state.error, state.count))
        for first, second, apart in zip(*results, strict=True):
            torch.testing.assert_close(first, second, atol=0, rtol=0)  # in the same order every time
            torch.testing.assert_close(first, apart, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("n", "regime"), [(100, "small"), (512, "panel"), (1500, "tiles")])
def test_a_graph_replays_the_solve_on_new_points(n, regime, symmetric):
    problem = make(2, n, n, 8, symmetric, tolerance=1e-3, max_iters=30)
    match = capture(problem, lambda p: solve_triton(p, regime))
    for seed in range(2):
        moved = problem.x + torch.randn(
            problem.x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
        ).to(problem.x)
        again = replace(problem, x=moved, y=moved if symmetric else problem.y)
        match(again.x, match.problem.y if symmetric else again.y)
        solution, value, slope = value_and_gradient(again, lambda p: solve_triton(p, regime))
        torch.testing.assert_close(match.value.double(), value, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(match.grad_x.double(), slope, rtol=1e-2, atol=1e-5)
        torch.testing.assert_close(match.marginal_error, solution.marginal_error, rtol=0.2, atol=1e-5)


def test_one_tf32_product_is_accurate_enough():
    problem = make(1, 2000, 2000, 64, tolerance=1e-3)
    _, expected, expected_slope = reference(problem)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        _, value, slope = value_and_gradient(problem, solve_triton)
    finally:
        torch.set_float32_matmul_precision(precision)
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3)
    assert float((slope - expected_slope).norm() / expected_slope.norm()) < 1e-2


@pytest.mark.skipif(importlib.util.find_spec("flash_sinkhorn") is None, reason="needs flash-sinkhorn")
@pytest.mark.parametrize("d", [8, 64])
def test_flash_solves_the_same_problem(d):
    from pyro_sinkhorn.ot.backends.flash import solve_flash

    problem = make(1, 2000, 1500, d, tolerance=1e-3, masked=False)
    _, value, slope = value_and_gradient(problem, solve_flash)
    _, expected, expected_slope = reference(problem)
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3)
    assert float((slope - expected_slope).norm() / expected_slope.norm()) < 1e-2
