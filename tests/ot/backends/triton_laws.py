"""What the kernels of the ``triton`` backend are held to, on small problems.

Not collected by name: Triton decides when it is first imported whether kernels are interpreted, so ``test_triton.py`` runs
this file in a process of its own, on the processor with TRITON_INTERPRET=1, or on a CUDA device where there is one.
"""

import math
import sys
import types
from dataclasses import replace

import pytest
import torch

from pyro_sinkhorn.ot.backends import triton_panel, triton_tiles
from pyro_sinkhorn.ot.backends.log_domain import half_step, solve_log_domain
from pyro_sinkhorn.ot.backends.triton_backend import solve_triton
from pyro_sinkhorn.ot.backends.triton_layout import State, lay_out
from pyro_sinkhorn.ot.envelope import entropic_value
from pyro_sinkhorn.ot.problem import Problem
from pyro_sinkhorn.ot.value import plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton 3.9 announces a default that its next version changes.
pytestmark = [pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)
REGIMES = ["small", "panel", "tiles"]
#: For laws that hold by what all regimes share: the slow interpreter of the last two is left to the slow tests.
MOSTLY_SMALL = ["small", *(pytest.param(name, marks=pytest.mark.slow) for name in REGIMES[1:])]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles a side and several stretches, also for a few dozen points."""
    monkeypatch.setattr(triton_tiles, "TILE", {"BR": 16, "BC": 16, "num_warps": 4, "num_stages": 1})
    monkeypatch.setattr(triton_tiles, "stretches", lambda programs, device: 2)


def make(
    n=25,
    m=34,
    d=3,
    symmetric=False,
    masked=False,
    tolerance=1e-4,
    max_iters=300,
    cost="sqeuclidean",
    **options,
):
    """Two problems of unlike epsilon, far from the origin, in float32."""
    rng = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float32)

    x, y = draw(2, n, d) + 3, 1.3 * draw(2, m, d) + 3.5
    a, b = draw(2, n).abs() + 0.1, draw(2, m).abs() + 0.1
    if masked:
        a[:, ::5], b[:, 1::4] = 0, 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    epsilon = d * torch.tensor([0.3, 1.0], dtype=torch.float32)
    x, y, a, b, epsilon = (t.to(DEVICE) for t in (x, y, a, b, epsilon))
    if symmetric:
        y, b = x, a
    return Problem(x, y, a, b, epsilon, cost, tolerance, max_iters, symmetric, **options)


def in_double(problem, **changes):
    """The same problem for the reference, solved as far as float64 goes."""
    x, a, epsilon = (t.detach().double().cpu() for t in (problem.x, problem.a, problem.epsilon))
    y, b = (
        (x, a)
        if problem.symmetric
        else (problem.y.detach().double().cpu(), problem.b.detach().double().cpu())
    )
    # The weights of float32 sum to 1 up to its rounding, which would be a floor of the error.
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    b = a if problem.symmetric else b
    changes = {"tolerance": 1e-9, "max_iters": 5000, **changes}
    return replace(problem, x=x, y=y, a=a, b=b, epsilon=epsilon, **changes)


def value_and_gradients(problem, solver):
    def leaf(t):
        return t.clone().requires_grad_()

    x, a = leaf(problem.x), leaf(problem.a)
    y, b = (x, a) if problem.symmetric else (leaf(problem.y), leaf(problem.b))
    problem = replace(problem, x=x, y=y, a=a, b=b)
    solution = solver(problem)
    value = entropic_value(problem, solution)
    points, weights = ([x], [a]) if problem.symmetric else ([x, y], [a, b])
    slopes = torch.autograd.grad(value.sum(), points + weights)
    # Weights are free up to a constant.
    slopes = [s if s.dim() == 3 else s - s.mean(-1, keepdim=True) for s in slopes]
    return solution, value.detach().double().cpu(), [s.double().cpu() for s in slopes]


@pytest.mark.parametrize(
    ("symmetric", "masked", "cost"),
    [
        (False, True, "sqeuclidean"),
        (True, True, "sqeuclidean"),
        pytest.param(False, False, "sqeuclidean", marks=pytest.mark.slow),
        pytest.param(True, False, "sqeuclidean", marks=pytest.mark.slow),
        pytest.param(False, True, "euclidean", marks=pytest.mark.slow),
        pytest.param(True, True, "l1", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("regime", REGIMES)
def test_value_and_gradients_are_those_of_the_reference(regime, symmetric, masked, cost):
    problem = make(symmetric=symmetric, masked=masked, cost=cost, m=25 if symmetric else 34)
    solution, value, slopes = value_and_gradients(problem, lambda p: solve_triton(p, regime))
    _, expected, expected_slopes = value_and_gradients(in_double(problem), solve_log_domain)
    assert bool(solution.converged.all())
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    for slope, reference in zip(slopes, expected_slopes, strict=True):
        # One part of a gradient moves by the marginal error, 1e-4, times the cost.
        assert float((slope - reference).norm() / reference.norm()) < 1e-3


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
def test_the_error_is_that_of_the_returned_pair_and_its_columns_are_exact(regime, symmetric):
    # Far from convergence, after exactly three rounds.
    problem = make(
        n=21, m=21 if symmetric else 34, symmetric=symmetric, masked=True, tolerance=0.0, max_iters=3
    )
    solution = solve_triton(problem, regime)
    assert solution.n_iters == 3
    for coupling in (solution.coupling.matrix(), plan(problem, replace(solution, coupling=None))):
        rows = (coupling.sum(-1) - problem.a).abs().sum(-1)
        torch.testing.assert_close(rows, solution.marginal_error, rtol=1e-3, atol=1e-5)
        if not symmetric:
            torch.testing.assert_close(coupling.sum(-2), problem.b, rtol=1e-4, atol=1e-6)
        assert bool((coupling[:, ::5] == 0).all()) and (symmetric or bool((coupling[:, :, 1::4] == 0).all()))
    assert float(solution.marginal_error.min()) > 1e-4


def test_all_regimes_make_the_same_iterations():
    for symmetric in (False, True):
        problem = make(n=20, m=20, symmetric=symmetric, masked=True, tolerance=0.0, max_iters=4)
        solutions = [solve_triton(problem, regime) for regime in REGIMES]
        for other in solutions[1:]:
            torch.testing.assert_close(other.f, solutions[0].f, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(
                other.marginal_error, solutions[0].marginal_error, rtol=2e-2, atol=2e-5
            )


@pytest.mark.parametrize("regime", MOSTLY_SMALL)
def test_masked_points_end_at_their_half_step(regime):
    problem = make(n=20, m=26, masked=True, tolerance=1e-5)
    solution = solve_triton(problem, regime)
    exact = in_double(problem)
    cost, epsilon = exact.cost_matrix, exact.epsilon
    f, g = solution.f.double().cpu(), solution.g.double().cpu()
    torch.testing.assert_close(f, half_step(g, cost, exact.b.log(), epsilon), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(g, half_step(f, cost.mT, exact.a.log(), epsilon), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("regime", MOSTLY_SMALL)
def test_one_round_and_none_left_over(regime):
    problem = make(n=20, m=26, tolerance=0.0, max_iters=1)
    solution = solve_triton(problem, regime)
    assert solution.n_iters == 1 and bool(solution.f.isfinite().all())
    loose = solve_triton(replace(problem, tolerance=10.0, max_iters=50), regime)
    assert loose.n_iters == 1 and bool(loose.converged.all())
    torch.testing.assert_close(loose.f, solution.f)


@pytest.mark.parametrize("regime", REGIMES)
def test_a_tolerance_of_zero_makes_every_round_though_nothing_is_left_to_do(regime):
    solution = solve_triton(make(n=1, m=1, tolerance=0.0, max_iters=4), regime)
    assert solution.n_iters == 4
    assert solution.marginal_error.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("regime", MOSTLY_SMALL)
def test_nan_stays_in_its_problem(regime, symmetric):
    problem = make(n=20, m=20, symmetric=symmetric)
    good = solve_triton(problem, regime)
    problem.x[0, 3, 1] = math.nan
    solution = solve_triton(problem, regime)
    assert solution.marginal_error.isnan().tolist() == [True, False]
    assert solution.converged.tolist() == [False, True]
    value = entropic_value(problem, solution)
    assert value.isnan().tolist() == [True, False]
    torch.testing.assert_close(solution.f[1], good.f[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("regime", MOSTLY_SMALL)
def test_a_start_at_the_solution_is_the_solution(regime, symmetric):
    problem = make(n=20, m=20, symmetric=symmetric, tolerance=1e-3)
    exact = solve_log_domain(in_double(problem))
    f = exact.f
    if symmetric:  # one potential for both sides
        f = (exact.f + exact.g) / 2
    start = (f.float().to(DEVICE), (f if symmetric else exact.g).float().to(DEVICE))
    cold, warm = solve_triton(problem, regime), solve_triton(replace(problem, start=start), regime)
    assert cold.n_iters > 1
    assert warm.n_iters == 1


@pytest.mark.parametrize("regime", MOSTLY_SMALL)
def test_clouds_far_apart_at_a_small_epsilon(regime):
    # Costs are thousands of epsilons. Taken about one centre, their digits alone would make errors of 1e-2.
    problem = make(n=20, m=26, d=2, tolerance=3e-3, max_iters=100)
    problem = replace(problem, y=problem.y + 100, epsilon=torch.full_like(problem.epsilon, 0.3))
    solution = solve_triton(problem, regime)
    assert bool(solution.converged.all())
    value = entropic_value(problem, solution).double().cpu()
    torch.testing.assert_close(value, _exact_value(problem), rtol=1e-6, atol=0)


def test_a_start_where_every_sum_underflows():
    problem = make(n=20, m=26, d=2, tolerance=3e-3, max_iters=100)
    zero = torch.zeros_like(problem.a), torch.zeros_like(problem.b)
    problem = replace(problem, y=problem.y + 30, epsilon=torch.full_like(problem.epsilon, 0.3), start=zero)
    solution = solve_triton(problem)
    assert bool(solution.converged.all())
    value = entropic_value(problem, solution).double().cpu()
    torch.testing.assert_close(value, _exact_value(problem), rtol=1e-5, atol=0)


def _exact_value(problem):
    exact = in_double(problem, tolerance=1e-6)
    return entropic_value(exact, solve_log_domain(exact))


@pytest.mark.slow
def test_a_problem_that_mixing_alone_would_lose():
    # Mixing without a way back ended at an error of .4 after 100 rounds, and worse later.
    problem = make(n=20, m=26, d=2, tolerance=5e-3, max_iters=150)
    problem = replace(problem, y=problem.y + 30, epsilon=torch.full_like(problem.epsilon, 0.05))
    assert bool(solve_triton(problem).converged.all())


@pytest.mark.parametrize(("d", "width"), [(3, 2), pytest.param(70, 40, marks=pytest.mark.slow)])
def test_products_are_those_of_the_matrix(d, width):
    problem = make(n=37, m=70, d=d, masked=True)
    coupling = solve_triton(problem, "small").coupling
    right, left = (
        torch.randn(2, 70, width, device=DEVICE).float(),
        torch.randn(2, 37, width, device=DEVICE).float(),
    )
    matrix = coupling.matrix()
    torch.testing.assert_close(coupling.product(right), matrix @ right, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(coupling.transposed_product(left), matrix.mT @ left, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_single_launch_of_panels_repeats_the_launches(symmetric):
    # With one panel there is no one to wait for, so the interpreter can run it too.
    problem = make(n=16 if symmetric else 37, m=16, symmetric=symmetric, masked=True)
    layout, phi, gamma = lay_out(problem)
    results = []
    for persistent in (True, False):
        found, state = (phi.clone(), gamma.clone()), State.of(layout)
        triton_panel.solve_panel(layout, *found, state, 1e-4, 100, persistent)
        results.append((*found[: 1 if symmetric else 2], state.error, state.count))
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_vectors_longer_than_a_program_holds(monkeypatch):
    from pyro_sinkhorn.ot.backends import triton_update

    problem = make(n=37, m=37, masked=True, tolerance=0.0, max_iters=4)
    whole = solve_triton(problem, "tiles")
    plain = triton_update.update
    monkeypatch.setattr(triton_tiles, "update", lambda *args: plain(*args, largest_block=16))
    swept = solve_triton(problem, "tiles")
    torch.testing.assert_close(swept.f, whole.f, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(swept.marginal_error, whole.marginal_error, rtol=1e-2, atol=1e-5)


def test_mixing_saves_iterations():
    problem = make(n=30, m=30, tolerance=1e-3)
    problem = replace(problem, epsilon=problem.epsilon / 3)
    plain = solve_log_domain(replace(in_double(problem), tolerance=1e-3))
    assert solve_triton(problem, "small").n_iters < 0.6 * plain.n_iters


def test_float64_is_refused():
    problem = make(n=20, m=20)
    with pytest.raises(ValueError, match="float64"):
        solve_triton(replace(problem, x=problem.x.double()))


@pytest.mark.parametrize("symmetric", [False, True])
def test_flash_potentials_become_a_solution(monkeypatch, symmetric):
    """A stand-in with the interface of flash-sinkhorn 0.4, which runs on CUDA devices alone."""
    from pyro_sinkhorn.ot.backends.flash import solve_flash

    class SamplesLoss:
        def __init__(
            self, loss, *, backend, potentials, eps, n_iters, use_epsilon_scaling, threshold, **options
        ):
            assert (loss, backend, potentials, use_epsilon_scaling) == (
                "sinkhorn",
                "alternating",
                True,
                False,
            )
            assert options == {"normalize": False, "allow_tf32": False, "inner_iterations": 10}
            self.eps, self.n_iters, self.threshold = eps, n_iters, threshold

        def __call__(self, a, x, b, y):
            one = Problem(x[None], y[None], a[None], b[None], torch.tensor([self.eps]).to(x))
            solution = solve_log_domain(
                in_double(one, tolerance=self.threshold / self.eps, max_iters=self.n_iters)
            )
            return solution.f[0].float().to(x.device), solution.g[0].float().to(x.device)

    monkeypatch.setitem(sys.modules, "flash_sinkhorn", types.SimpleNamespace(SamplesLoss=SamplesLoss))
    problem = make(n=20, m=20, symmetric=symmetric)
    solution, value, slopes = value_and_gradients(problem, solve_flash)
    _, expected, expected_slopes = value_and_gradients(in_double(problem), solve_log_domain)
    assert bool(solution.converged.all()) and solution.n_iters == problem.max_iters
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    for slope, reference in zip(slopes, expected_slopes, strict=True):
        assert float((slope - reference).norm() / reference.norm()) < 1e-3
    with pytest.raises(ValueError, match="positive weights alone"):
        solve_flash(make(n=20, m=20, masked=True))
    with pytest.raises(ValueError, match="euclidean"):
        solve_flash(make(n=20, m=20, cost="euclidean"))
