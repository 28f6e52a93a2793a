"""The streaming backend: the answers of the reference without its matrices, and a range that nothing leaves silently."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from pyro_sinkhorn.ot.backends import streaming, tiles
from pyro_sinkhorn.ot.backends.log_domain import half_step as log_half_step
from pyro_sinkhorn.ot.backends.log_domain import solve_log_domain
from pyro_sinkhorn.ot.backends.streaming import solve_streaming
from pyro_sinkhorn.ot.cost import sqeuclidean
from pyro_sinkhorn.ot.envelope import entropic_value
from pyro_sinkhorn.ot.problem import Problem

D = torch.float64


@pytest.fixture(params=[None, 64], ids=["one tile", "many tiles"])
def tile_size(request, monkeypatch):
    """Small clouds fit in one tile: every law is also stated for strips of 8 rows and square blocks of 8."""
    if request.param is not None:
        monkeypatch.setitem(tiles.ENTRIES, "cpu", request.param)


either = pytest.mark.usefixtures("tile_size")


def weights(*shape, zeros=0, seed=1):
    w = torch.rand(*shape, dtype=D, generator=torch.Generator().manual_seed(seed)) + 0.2
    w[..., 1 : 2 * zeros : 2] = 0  # not at the end
    return w / w.sum(-1, keepdim=True)


def problem(n=21, m=30, d=2, batch=2, zeros=0, epsilon=(0.5, 2.0), symmetric=False, seed=0, **options):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, d, dtype=D, generator=rng)
    y = 0.7 * torch.randn(batch, m, d, dtype=D, generator=rng) + 0.5
    a, b = weights(batch, n, zeros=zeros), weights(batch, m, zeros=zeros, seed=2)
    if symmetric:
        y, b = x, a
    options = {"tolerance": 1e-9, "max_iters": 5000} | options
    return Problem(x, y, a, b, torch.tensor(epsilon[:batch], dtype=D), symmetric=symmetric, **options)


def reference(given, **options):
    """The log backend knows no symmetry and no start."""
    options = {"symmetric": False, "start": None, "dtype": D} | options
    dtype = options.pop("dtype")
    points = {k: getattr(given, k).to(dtype) for k in ("x", "y", "a", "b", "epsilon")}
    return solve_log_domain(dataclasses.replace(given, **points, **options))


def densities(given, solution):
    """Row and column sums of the density at the returned potentials, from the cost matrix."""
    exponent = solution.f.unsqueeze(-1) + solution.g.unsqueeze(-2) - sqeuclidean(given.x, given.y)
    density = (exponent / given.epsilon[:, None, None]).exp()
    density[given.a == 0] = 0
    density.mT[given.b == 0] = 0
    return (density @ given.b.unsqueeze(-1)).squeeze(-1), (density.mT @ given.a.unsqueeze(-1)).squeeze(-1)


def plan(given, solution):
    exponent = solution.f.unsqueeze(-1) + solution.g.unsqueeze(-2) - sqeuclidean(given.x, given.y)
    density = (exponent / given.epsilon[:, None, None]).exp()
    outer = given.a.unsqueeze(-1) * given.b.unsqueeze(-2)
    return (outer * density).masked_fill(outer == 0, 0)


# The answer


@either
@pytest.mark.parametrize("zeros", [0, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("n", "m", "d"), [(21, 30, 2), (30, 21, 5), (1, 9, 1), (70, 1, 3)])
def test_value_and_gradients_are_those_of_the_reference(n, m, d, symmetric, zeros):
    # The reference takes thousands of steps to the symmetric pair where epsilon is small.
    epsilon = (3.0, 6.0) if symmetric else (0.5, 2.0)
    zeros = min(zeros, (min(n, n if symmetric else m) - 1) // 2)
    given = problem(n, m, d, zeros=zeros, symmetric=symmetric, epsilon=epsilon)
    ours, theirs = solve_streaming(given), reference(given)
    assert ours.converged.all() and theirs.converged.all()
    results = []
    for solution in (ours, theirs):
        # The two sides of a symmetric problem are one variable; the reference is given two, to sum their gradients.
        leaves = [t.detach().clone().requires_grad_() for t in (given.x, given.y, given.a, given.b)]
        x, y, a, b = leaves
        inputs = dataclasses.replace(given, x=x, y=y, a=a, b=b)
        value = entropic_value(inputs, solution)
        results.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
    for name, mine, other in zip(("value", "x", "y", "a", "b"), *results, strict=True):
        if name in "ab":  # weights sum to 1: their gradient is one up to a constant
            mine, other = mine - mine.mean(-1, keepdim=True), other - other.mean(-1, keepdim=True)
        torch.testing.assert_close(mine, other, atol=2e-7, rtol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


@either
@pytest.mark.parametrize("zeros", [0, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-6])
def test_the_error_is_that_of_the_pair_returned_and_its_columns_are_exact(symmetric, zeros, tolerance):
    given = problem(symmetric=symmetric, zeros=zeros, epsilon=(0.05, 0.1), tolerance=tolerance)
    solution = solve_streaming(given)
    rows, columns = densities(given, solution)
    error = (given.a * (rows - 1).abs()).sum(-1)
    torch.testing.assert_close(solution.marginal_error, error, atol=1e-11, rtol=1e-6)
    assert (error > 0).all()
    if symmetric:
        assert torch.equal(solution.f, solution.g)
    else:
        torch.testing.assert_close(
            columns[given.b > 0], torch.ones_like(columns[given.b > 0]), atol=1e-11, rtol=0
        )


@either
@pytest.mark.parametrize("symmetric", [False, True])
def test_potentials_of_masked_points_are_their_half_steps(symmetric):
    given = problem(symmetric=symmetric, zeros=4)
    solution, cost = solve_streaming(given), sqeuclidean(given.x, given.y)
    f = log_half_step(solution.g, cost, given.b.log(), given.epsilon)
    g = log_half_step(solution.f, cost.mT, given.a.log(), given.epsilon)
    assert (given.a == 0).sum() == 8
    torch.testing.assert_close(solution.f[given.a == 0], f[given.a == 0])
    torch.testing.assert_close(solution.g[given.b == 0], g[given.b == 0])


@either
@pytest.mark.parametrize("symmetric", [False, True])
def test_masked_points_far_out_make_no_nan(symmetric):
    # They coincide: nothing bounds the density between them, and 0 times infinity is NaN.
    given = problem(symmetric=symmetric, zeros=4, epsilon=(0.5, 2.0))
    x, y = given.x.clone(), given.y.clone()
    x[given.a == 0], y[given.b == 0] = 500.0, 500.0
    solution = solve_streaming(dataclasses.replace(given, x=x, y=y))
    assert solution.converged.all()
    assert solution.f.isfinite().all() and solution.g.isfinite().all()
    torch.testing.assert_close(
        solution.coupling.matrix(), solve_streaming(given).coupling.matrix(), atol=1e-9, rtol=0
    )
    ones = torch.ones(2, y.shape[1], 1, dtype=D)
    torch.testing.assert_close(solution.coupling.product(ones)[..., 0], given.a, atol=1e-8, rtol=0)


@either
@pytest.mark.parametrize("symmetric", [False, True])
def test_products_are_those_of_the_plan(symmetric):
    # Stopped early: rows and columns of a plan that is still off must not be taken for the weights.
    given = problem(symmetric=symmetric, zeros=3, epsilon=(0.05, 0.3), tolerance=0, max_iters=2)
    solution = solve_streaming(given)
    expected = plan(given, solution)
    coupling = solution.coupling
    torch.testing.assert_close(coupling.matrix(), expected)
    assert not coupling.matrix()[(given.a.unsqueeze(-1) * given.b.unsqueeze(-2)) == 0].any()
    rng = torch.Generator().manual_seed(3)
    right, left = (torch.randn(2, k, 3, dtype=D, generator=rng) for k in expected.shape[:0:-1])
    torch.testing.assert_close(coupling.product(right), expected @ right)
    torch.testing.assert_close(coupling.transposed_product(left), expected.mT @ left)


def test_a_batch_is_a_loop():
    given = problem(zeros=2)
    together = solve_streaming(given)
    for k in range(2):
        one = solve_streaming(
            Problem(
                *(getattr(given, name)[k : k + 1] for name in ("x", "y", "a", "b", "epsilon")), tolerance=1e-9
            )
        )
        torch.testing.assert_close(together.f[k], one.f[0])
        torch.testing.assert_close(together.g[k], one.g[0])
        assert one.n_iters <= together.n_iters


def test_where_it_starts_is_honoured():
    given = problem(epsilon=(0.05, 0.1))
    solution = solve_streaming(given)
    again = solve_streaming(dataclasses.replace(given, start=(solution.f, solution.g)))
    assert again.n_iters == 1 < solution.n_iters
    one_off = dataclasses.replace(given, start=(solution.f, torch.zeros_like(solution.g)))
    assert solve_streaming(one_off).n_iters == 1  # columns are made exact from the row potentials
    self_given = problem(symmetric=True, zeros=3)
    solution = solve_streaming(self_given)
    assert solve_streaming(dataclasses.replace(self_given, start=(solution.f, solution.g))).n_iters == 1


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("passes", [1, 7])
def test_a_tolerance_of_zero_asks_for_exactly_max_iters(symmetric, passes):
    x = torch.zeros(1, 3, 2, dtype=D)  # solved at once, and without error
    w = torch.full((1, 3), 1 / 3, dtype=D)
    eps = torch.ones(1, dtype=D)
    given = Problem(x, x, w, w, eps, tolerance=0, max_iters=passes, symmetric=symmetric)
    assert solve_streaming(given).n_iters == passes
    assert solve_streaming(dataclasses.replace(given, tolerance=1e-6)).n_iters == 1


# Range


def test_few_passes_are_needed():
    # Plain Sinkhorn from zero needs 130 to 200: a mixing or a start that went wrong would still converge.
    given = problem(200, 250, 3, batch=1, epsilon=(0.2,), tolerance=1e-6)
    assert solve_streaming(given).n_iters < 40
    alike = problem(200, symmetric=True, d=3, batch=1, epsilon=(0.05,), tolerance=1e-6)
    assert solve_streaming(alike).n_iters < 15


def test_the_symmetric_step_converges_without_mixing(monkeypatch):
    # Errors shrink by three; a whole step would swing for ever between two potentials.
    monkeypatch.setattr(streaming, "MEMORY", 1)
    alike = problem(50, symmetric=True, d=3, batch=1, epsilon=(0.5,), tolerance=1e-6, max_iters=100)
    assert solve_streaming(alike).n_iters < 25


@either
@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("epsilon", [1e-3, 3e-5])
def test_far_points_at_a_tiny_epsilon(dtype, epsilon):
    # Groups of points 10 to 70 apart: exponents of minus 10^8, far below any float. Each group keeps its mass.
    centres = torch.tensor([0.0, 10.0, 30.0, 70.0], dtype=D)
    shift = torch.tensor([0.01, -0.02], dtype=D)
    x = torch.cat([centres, centres + 0.05]).reshape(1, -1, 1).to(dtype)
    y = (centres.unsqueeze(-1) + shift).reshape(1, -1, 1).to(dtype)
    w = torch.full((1, 8), 1 / 8, dtype=dtype)
    given = Problem(x, y, w, w, torch.tensor([epsilon], dtype=dtype), tolerance=1e-2, max_iters=2000)
    solution = solve_streaming(given)
    assert solution.converged.all()
    assert solution.f.isfinite().all() and solution.g.isfinite().all()
    group = torch.kron(torch.eye(4), torch.ones(2, 2))  # of y, which is sorted by group
    masses = solution.coupling.matrix()[0].to(D).reshape(2, 4, 8).sum(0) @ group[::2].mT
    torch.testing.assert_close(masses, torch.eye(4, dtype=D) / 4, atol=6e-3, rtol=0)


@either
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_start_out_of_range_is_no_trouble(symmetric, dtype, sign):
    # Densities of 2^(+-3000) at first, in every column (every row, where symmetric).
    given = problem(symmetric=symmetric, batch=1, epsilon=(0.5,), tolerance=1e-4)
    cast = {k: getattr(given, k).to(dtype) for k in ("x", "y", "a", "b", "epsilon")}
    start = tuple(torch.full_like(cast[w], sign * 1000.0) for w in ("a", "b"))
    solution = solve_streaming(dataclasses.replace(given, **cast, start=start))
    assert solution.converged.all()
    value = entropic_value(dataclasses.replace(given, **cast), solution)
    expected = entropic_value(dataclasses.replace(given, symmetric=False), reference(given))
    torch.testing.assert_close(value.to(D), expected, atol=1e-3, rtol=0)


@either
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_rows_that_underflow_are_set_right(dtype):
    # One row starts 10^4 below the others: its sum is 0, of which there is no logarithm.
    given = problem(batch=1, epsilon=(0.5,), tolerance=1e-4)
    cast = {k: getattr(given, k).to(dtype) for k in ("x", "y", "a", "b", "epsilon")}
    f, g = torch.zeros_like(cast["a"]), torch.zeros_like(cast["b"])
    f[0, 3] = -1e4
    solution = solve_streaming(dataclasses.replace(given, **cast, start=(f, g)))
    assert solution.converged.all()
    assert solution.n_iters < 40
    torch.testing.assert_close(
        densities(given, solution)[0][0, 3].to(D), torch.ones((), dtype=D), atol=1e-2, rtol=0
    )


@either
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_clouds_that_are_not_finite_end_with_a_nan(symmetric, tolerance, bad):
    given = problem(symmetric=symmetric, tolerance=tolerance, max_iters=30)
    x = given.x.clone()
    x[1, 2, 0] = bad
    solution = solve_streaming(dataclasses.replace(given, x=x, y=x if symmetric else given.y))
    assert solution.marginal_error[1].isnan()
    assert not solution.converged[1]
    assert solution.marginal_error[0].isfinite()
    alone = dataclasses.replace(
        given, **{k: getattr(given, k)[1:] for k in ("y", "a", "b", "epsilon")}, x=x[1:]
    )
    if symmetric:
        alone = dataclasses.replace(alone, y=x[1:])
    assert solve_streaming(alone).n_iters == (1 if tolerance else 30)


# Precision


@pytest.mark.parametrize("symmetric", [False, True])
def test_float32_agrees_with_float64(symmetric):
    given = problem(300, 200, 3, batch=1, epsilon=(0.3,), symmetric=symmetric, tolerance=1e-5)
    cast = {
        k: (getattr(given, k) + (100 if k in "xy" else 0)).float() for k in ("x", "y", "a", "b", "epsilon")
    }
    single = dataclasses.replace(given, **cast)  # far from the origin
    solution = solve_streaming(single)
    assert solution.converged.all()
    true = dataclasses.replace(given, **{k: t.to(D) for k, t in cast.items()}, symmetric=False)
    expected = entropic_value(true, solve_log_domain(true))
    torch.testing.assert_close(entropic_value(single, solution).to(D), expected, atol=1e-5, rtol=1e-5)


def test_autocast_and_short_products_are_kept_out():
    given = problem(batch=1, epsilon=(0.05,))
    given = dataclasses.replace(
        given, **{k: getattr(given, k).float() for k in ("x", "y", "a", "b", "epsilon")}, tolerance=1e-5
    )
    expected = solve_streaming(given)
    values = torch.randn(1, 30, 2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = solve_streaming(given)
        product = solution.coupling.product(values)
    assert solution.f.dtype == product.dtype == torch.float32
    assert torch.equal(solution.f, expected.f)
    assert torch.equal(product, expected.coupling.product(values))


@either
def test_biases_apart_from_the_product_give_the_same_exponents(monkeypatch):
    given = problem(zeros=2)
    expected = solve_streaming(given)
    monkeypatch.setattr(tiles, "products_are_exact", lambda like: False)
    solution = solve_streaming(given)
    torch.testing.assert_close(solution.f, expected.f, atol=1e-7, rtol=0)
    torch.testing.assert_close(solution.coupling.matrix(), expected.coupling.matrix(), atol=1e-9, rtol=0)


def test_short_products_are_noticed(monkeypatch):
    single, double = torch.ones(1, dtype=torch.float32), torch.ones(1, dtype=D)
    assert tiles.products_are_exact(single) and tiles.products_are_exact(double)
    assert not tiles.products_are_exact(single.to("meta"))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not tiles.products_are_exact(single)
        assert tiles.products_are_exact(double)
    finally:
        torch.set_float32_matmul_precision(before)

    def mixed():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert not tiles.products_are_exact(single)


def test_row_sums_of_many_strips_keep_their_digits(monkeypatch):
    # 20,000 equal terms, which a float32 sum rounds alike: in 500 strips of 40 without groups they lose 1e-4. In groups the
    # bound is half a digit for each of 480 terms in a group and of 42 groups.
    monkeypatch.setitem(tiles.ENTRIES, "cpu", 64)
    x, y = torch.zeros(1, 8, 2, dtype=torch.float32), torch.zeros(1, 20_000, 2, dtype=torch.float32)
    a, b = (torch.full(t.shape[:2], 1 / t.shape[1], dtype=torch.float32) for t in (x, y))
    given = Problem(x, y, a, b, torch.ones(1, dtype=torch.float32), tolerance=0, max_iters=1)
    assert solve_streaming(given).marginal_error < (480 + 42) * 2**-24


# What it refuses, and what it is there for


@pytest.mark.parametrize("cost", ["euclidean", lambda x, y: torch.cdist(x, y)])
def test_other_costs_are_refused(cost):
    with pytest.raises(
        ValueError, match=r"streaming backend was asked for the cost .* and has only 'sqeuclidean'"
    ):
        solve_streaming(dataclasses.replace(problem(), cost=cost))


MEMORY = """
import resource, torch
torch.set_num_threads({threads})
from pyro_sinkhorn.ot.backends.streaming import solve_streaming
from pyro_sinkhorn.ot.envelope import entropic_value
from pyro_sinkhorn.ot.problem import Problem

def run(n, max_iters, symmetric):
    x = torch.randn(1, n, 8, generator=rng, dtype=torch.float32).requires_grad_()
    y = x if symmetric else torch.randn(1, n, 8, generator=rng, dtype=torch.float32)
    w = torch.full((1, n), 1 / n, dtype=torch.float32)
    eps = torch.tensor([3.0], dtype=torch.float32)
    problem = Problem(x, y, w, w, eps, tolerance=0, max_iters=max_iters, symmetric=symmetric)
    entropic_value(problem, solve_streaming(problem)).sum().backward()
    assert x.grad.isfinite().all()

rng = torch.Generator().manual_seed(0)
run(50, 3, False)  # what torch itself takes at first use
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run({n}, {max_iters}, {symmetric})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def extra_memory(n, max_iters, symmetric=False, threads=1):
    """Megabytes of resident memory that a solution and its gradient add to a fresh process."""
    script = MEMORY.format(n=n, max_iters=max_iters, symmetric=symmetric, threads=threads)
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(out.stdout) / (2**20 if sys.platform == "darwin" else 2**10)


def test_memory_is_linear():
    # The matrix of 20,000 points would be 1.6 GB.
    assert extra_memory(20_000, 1) < 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "passes", "symmetric", "limit"), [(20_000, 2, True, 100), (100_000, 2, False, 1000)]
)
def test_memory_stays_linear(n, passes, symmetric, limit):
    assert extra_memory(n, passes, symmetric, threads=2) < limit
