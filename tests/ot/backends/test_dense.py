"""The dense backend: the reference's answers, also where numbers run out of range, in fewer iterations."""

import dataclasses
import math
import warnings

import pytest
import torch

from pyro_sinkhorn.ot import sinkhorn
from pyro_sinkhorn.ot.backends import dense, solve_dense, solve_log_domain
from pyro_sinkhorn.ot.backends.anderson import LIMIT, Anderson
from pyro_sinkhorn.ot.backends.exponents import LOG2E, Exponents
from pyro_sinkhorn.ot.backends.start import gaussian_potentials, starting_potentials
from pyro_sinkhorn.ot.checks import make_problem
from pyro_sinkhorn.ot.cost import sqeuclidean
from pyro_sinkhorn.ot.value import coupling_of

D = torch.float64


def normal(*shape, seed=0, dtype=D):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(x, y, epsilon, a=None, b=None, cost="sqeuclidean", tolerance=1e-9, max_iters=20_000):
    return make_problem(x, y, epsilon, a, b, cost, tolerance, max_iters)[0]


def weights(n, seed, masked=0):
    w = torch.rand(n, dtype=D, generator=torch.Generator().manual_seed(seed)) + 0.1
    w[:masked] = 0
    return w / w.sum()


def assert_same(ours, reference, tolerance=1e-6):
    """Equal potentials, which are unique up to a constant."""
    shift = (ours.f - reference.f).mean(-1, keepdim=True)
    torch.testing.assert_close(ours.f - shift, reference.f, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours.g + shift, reference.g, atol=tolerance, rtol=tolerance)


# Awkward problems


def heavy(n, seed):
    return (
        torch.distributions.Cauchy(0.0, 1.0).icdf(torch.linspace(0.004, 0.996, n, dtype=D)).unsqueeze(-1)
        + seed
    )


AWKWARD = {
    "far apart": (normal(30, 3), normal(40, 3, seed=1) + 100, 1.0),
    "far from the origin": (normal(30, 3) + 1e4, normal(30, 3, seed=1) + 1e4, 1.0),
    "small epsilon": (normal(30, 2), normal(30, 2, seed=1), 0.05),
    "large epsilon": (normal(30, 2), normal(30, 2, seed=1), 1e6),
    "an outlier": (torch.cat([normal(29, 2), torch.full((1, 2), 60.0, dtype=D)]), normal(30, 2, seed=1), 1.0),
    "heavy tails": (heavy(40, 0.0), heavy(40, 0.5), 1.0),
    "one point": (normal(1, 2), normal(20, 2, seed=1), 0.5),
    "all in one place": (torch.ones(10, 2, dtype=D), torch.zeros(12, 2, dtype=D), 0.5),
    "two scales": (torch.cat([normal(15, 2) / 100, normal(15, 2) * 10]), normal(30, 2, seed=1), 0.5),
}


@pytest.mark.parametrize("case", AWKWARD)
def test_awkward_clouds_have_the_reference_answer(case):
    x, y, epsilon = AWKWARD[case]
    given = problem(x, y, epsilon, tolerance=1e-8)
    ours = solve_dense(given)
    assert ours.converged.all()
    columns = ours.coupling.matrix().sum(-2)
    torch.testing.assert_close(columns, given.b, atol=1e-10, rtol=1e-8)
    rows = ours.coupling.matrix().sum(-1)
    torch.testing.assert_close((rows - given.a).abs().sum(-1), ours.marginal_error, atol=1e-10, rtol=0)
    reference = solve_log_domain(given)
    if bool(reference.converged.all()):  # plain steps do not always get there
        # Between parts that hardly meet, the constant of each is free: plans are compared, not potentials.
        torch.testing.assert_close(
            ours.coupling.matrix(), coupling_of(given, reference), atol=1e-7, rtol=1e-4
        )


@pytest.mark.parametrize("case", ["far apart", "an outlier", "small epsilon", "heavy tails", "two scales"])
def test_single_precision_reaches_its_tolerance_on_awkward_clouds(case):
    x, y, epsilon = AWKWARD[case]
    single = sinkhorn(x.float(), y.float(), epsilon, tolerance=3e-4, max_iters=20_000, backend="dense")
    double = sinkhorn(x, y, epsilon, tolerance=1e-8, max_iters=20_000, backend="dense")
    assert single.converged
    torch.testing.assert_close(single.value.double(), double.value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("masked", [0, 3])
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", lambda x, y: sqeuclidean(x, y).sqrt() + 1])
def test_weights_and_masks_have_the_reference_answer_also_at_masked_points(cost, masked):
    x, y = normal(20, 2), normal(25, 2, seed=1)
    given = problem(x, y, 0.4, weights(20, 2, masked), weights(25, 3, masked), cost)
    ours, reference = solve_dense(given), solve_log_domain(given)
    assert_same(ours, reference)
    plan = ours.coupling.matrix()
    assert (plan[:, :masked] == 0).all() and (plan[..., :masked] == 0).all()
    values = normal(1, 25, 4, seed=5)
    torch.testing.assert_close(ours.coupling.product(values), plan @ values)
    values = normal(1, 20, 4, seed=5)
    torch.testing.assert_close(ours.coupling.transposed_product(values), plan.mT @ values)


def test_problems_that_have_converged_wait_for_the_others(monkeypatch):
    x, y = normal(4, 20, 2), normal(4, 20, 2, seed=1)
    epsilon = torch.tensor([5.0, 0.02, 1.0, 0.1], dtype=D)
    given = problem(x, y, epsilon, tolerance=1e-4)
    together = solve_dense(given)
    monkeypatch.setattr(dense, "SKIP", 0)
    waiting = solve_dense(given)
    assert together.n_iters == waiting.n_iters
    assert waiting.converged.all()
    plan = waiting.coupling.matrix()
    torch.testing.assert_close(plan.sum(-2), given.b)
    torch.testing.assert_close(
        (plan.sum(-1) - given.a).abs().sum(-1), waiting.marginal_error, atol=1e-12, rtol=0
    )
    for i in range(4):
        alone = solve_dense(problem(x[i], y[i], epsilon[i], tolerance=1e-4))
        torch.testing.assert_close(alone.coupling.matrix()[0], plan[i], atol=2e-4, rtol=0)


# Numbers out of range


def test_scalings_that_drift_are_absorbed(monkeypatch):
    x, y = normal(30, 2), normal(30, 2, seed=1) + 3
    given = problem(x, y, 0.2)
    expected, made = solve_dense(given), []
    rebuild = dense.Scaling.rebuild
    monkeypatch.setattr(dense, "RANGE", {D: 1.0})
    monkeypatch.setattr(dense.Scaling, "rebuild", lambda *args: made.append(args) or rebuild(*args))
    absorbed = solve_dense(given)
    torch.testing.assert_close(absorbed.coupling.matrix(), expected.coupling.matrix(), atol=1e-8, rtol=1e-5)
    assert len(made) > 2


def test_a_matrix_that_under_or_overflows_is_set_right_in_the_log_domain(monkeypatch):
    x, y = normal(20, 2), normal(20, 2, seed=1)
    given = problem(x, y, 0.5)
    used = []
    from_log_domain = dense.Scaling.from_log_domain
    monkeypatch.setattr(
        dense.Scaling, "from_log_domain", lambda self: used.append(1) or from_log_domain(self)
    )
    for bad in (1e5, -1e5):
        start = (torch.full_like(given.a, bad), torch.zeros_like(given.b))
        assert_same(solve_dense(dataclasses.replace(given, start=start)), solve_dense(given))
        assert used.pop()
        assert not used


def test_what_cannot_be_set_right_goes_to_the_reference(monkeypatch):
    given = problem(normal(10, 2), normal(10, 2, seed=1), 0.5)
    monkeypatch.setattr(dense.Scaling, "alternating", lambda self: None)
    handed = solve_dense(given)
    assert handed.coupling is None
    assert_same(handed, solve_log_domain(given))


@pytest.mark.parametrize("where", ["x", "y"])
def test_points_that_are_no_numbers_end_it(where):
    x, y = normal(10, 2), normal(10, 2, seed=1)
    (x if where == "x" else y)[3, 1] = math.nan
    out = solve_dense(problem(x, y, 0.5, max_iters=200))
    assert not out.converged.any()
    assert out.marginal_error.isnan().all()
    twice = solve_dense(dataclasses.replace(problem(x, x, 0.5, max_iters=200)))
    assert twice.converged.all() == (where == "y")


def test_a_tolerance_of_zero_asks_for_so_many_iterations():
    out = solve_dense(problem(normal(10, 2), normal(10, 2, seed=1), 5.0, tolerance=0, max_iters=80))
    assert out.n_iters == 80
    assert out.marginal_error < 1e-12
    assert out.f.isfinite().all()


# What makes it fast


def test_anderson_mixing_saves_most_iterations_and_changes_no_answer(monkeypatch):
    x, y = normal(100, 2), normal(100, 2, seed=1)
    given = problem(x, y, 0.05, tolerance=1e-4)
    mixed = solve_dense(given)
    monkeypatch.setattr(Anderson, "step", lambda self, point, residual, restart=None: point + residual)
    plain = solve_dense(given)
    assert mixed.n_iters < plain.n_iters / 4
    torch.testing.assert_close(mixed.coupling.matrix(), plain.coupling.matrix(), atol=1e-4, rtol=0)


def test_mixing_weights_minimise_the_residual():
    # On an affine map of d dimensions, d + 1 residuals span everything: the next iterate is the fixed point.
    matrix = 0.9 * torch.linalg.qr(normal(3, 3))[0]
    fixed = normal(3, seed=1)
    mixing, point = Anderson(torch.full((1, 3), 1 / 3, dtype=D)), torch.zeros(1, 3, dtype=D)
    for _ in range(5):
        point = mixing.step(point, (point - fixed) @ matrix.T + fixed - point)
    torch.testing.assert_close(point, fixed.unsqueeze(0), atol=1e-4, rtol=0)


def test_forgetting_the_past_leaves_the_plain_step():
    mixing = Anderson(torch.full((2, 5), 0.2, dtype=D))
    for i in range(3):
        mixing.step(normal(2, 5, seed=i), normal(2, 5, seed=10 + i))
    point, residual = normal(2, 5, seed=20), normal(2, 5, seed=21)
    moved = mixing.step(point, residual, torch.tensor([True, False]))
    torch.testing.assert_close(moved[0], (point + residual)[0])
    assert not torch.allclose(moved[1], (point + residual)[1], atol=1e-3)


def test_a_normal_start_is_near_the_answer_between_normal_clouds():
    x, y = 2 * normal(2000, 1) + 1, 0.5 * normal(2000, 1, seed=1)
    given = problem(x, y, 1.0, tolerance=1e-8)
    exponents = Exponents(given)
    start = exponents.potentials(*starting_potentials(given, exponents))
    out = solve_dense(given)
    for mine, found, w in ((start[0], out.f, given.a), (start[1], out.g, given.b)):
        off = (mine - found) - ((mine - found) * w).sum()
        # a few percent, as 2000 points tell their variance, of potentials that vary by several units
        assert (off.square() * w).sum().sqrt() < 0.1 * (found - found.mean()).square().mul(w).sum().sqrt()


def test_equal_weights_need_not_be_said():
    x, y, w = normal(1, 9, 2), normal(1, 7, 2, seed=1), torch.full((1, 9), 1 / 9, dtype=D)
    v = torch.full((1, 7), 1 / 7, dtype=D)
    said = gaussian_potentials(x, y, w, v, torch.ones(1, dtype=D))
    for mine, theirs in zip(said, gaussian_potentials(x, y, None, None, torch.ones(1, dtype=D)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_start_saves_iterations_where_points_persist():
    x, y = normal(50, 2), normal(50, 2, seed=1)
    cold = sinkhorn(x, y, 0.1, tolerance=1e-6, backend="dense")
    again = sinkhorn(x, y, 0.1, tolerance=1e-6, backend="dense", start=cold)
    near = sinkhorn(x + 1e-3, y, 0.1, tolerance=1e-6, backend="dense", start=cold)
    assert again.n_iters <= 2
    assert again.n_iters <= near.n_iters < cold.n_iters
    torch.testing.assert_close(again.value, cold.value)
    with pytest.raises(
        ValueError, match=r"start has potentials of shape \(50,\) and \(50,\): expected those of"
    ):
        sinkhorn(x[:40], y, 0.1, start=cold)


@pytest.mark.parametrize("masked", [0, 2])
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "l1"])
def test_a_cloud_against_itself_takes_one_potential_and_few_steps(cost, masked):
    x, a = normal(40, 2), weights(40, 2, masked)
    itself = problem(x, x, 0.05, a, a, cost, tolerance=1e-6)
    assert itself.symmetric
    ours, general = solve_dense(itself), solve_dense(dataclasses.replace(itself, symmetric=False))
    assert ours.n_iters < 20  # errors shrink by three
    assert torch.equal(ours.f, ours.g)
    torch.testing.assert_close(ours.coupling.matrix(), general.coupling.matrix(), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(ours.coupling.matrix(), ours.coupling.matrix().mT)


def test_only_costs_known_to_be_negative_definite_take_the_symmetric_step():
    x = normal(5, 2)
    assert not problem(x, x.clone(), 0.5).symmetric
    sphere = x / x.norm(dim=-1, keepdim=True)
    assert not problem(sphere, sphere, 0.5, cost="geodesic").symmetric
    assert not problem(x, x, 0.5, cost=sqeuclidean).symmetric
    assert not problem(x, x, 0.5, a=weights(5, 0), b=weights(5, 1)).symmetric


def test_gradients_short_of_convergence_are_nearer_to_those_of_the_end_than_the_slope_of_the_value():
    errors = []
    for seed in range(10):
        x, y = normal(100, 8, seed=seed).requires_grad_(), normal(100, 8, seed=100 + seed)

        def gradient(x=x, y=y, **options):
            return torch.autograd.grad(sinkhorn(x, y, 2.0, **options).value, x)[0]

        end = gradient(tolerance=1e-8)
        near = gradient(tolerance=0, max_iters=3, backend="dense")
        slope = gradient(
            tolerance=0, max_iters=3, backend="dense", cost=sqeuclidean
        )  # through the cost matrix
        errors.append(((near - end).norm(), (slope - end).norm()))
    near, slope = torch.tensor(errors).mean(0)
    assert near < 0.7 * slope


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_exponents_are_those_of_the_plan(cost):
    x, y = normal(2, 5, 3) + 7, normal(2, 6, 3, seed=1) + 7
    given = problem(x, y, torch.tensor([0.5, 2.0], dtype=D), cost=cost)
    phi, gamma = normal(2, 5, seed=2), normal(2, 6, seed=3)
    exponents = Exponents(given)
    f, g = exponents.potentials(phi, gamma)
    expected = (f.unsqueeze(-1) + g.unsqueeze(-2) - given.cost_matrix) * LOG2E / given.epsilon[:, None, None]
    torch.testing.assert_close(exponents(phi, gamma), expected)
    for there, back in zip((phi, gamma), exponents.in_base_2(f, g), strict=True):
        torch.testing.assert_close(back, there)


def test_it_says_when_it_stopped_short():
    x, y = normal(50, 2), normal(50, 2, seed=1)
    with pytest.warns(RuntimeWarning, match="Sinkhorn stopped after 5 iterations"):
        sinkhorn(x, y, 0.01, max_iters=5, backend="dense")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkhorn(x, y, 0.01, max_iters=5, tolerance=0, backend="dense")


# Batches


def test_batches_of_tiny_problems_end_where_each_would():
    # Some are solved exactly long before the others: nothing is left of them to mix.
    for n, dtype, seed in ((4, D, 0), (3, torch.float32, 1), (3, D, 2)):
        x, y = normal(200, n, 2, seed=seed, dtype=dtype), normal(200, n, 2, seed=seed + 10, dtype=dtype)
        out = sinkhorn(x, y, 0.5, tolerance=1e-4, backend="dense")
        assert out.converged.all()
        assert out.n_iters < 200
        assert out.value.isfinite().all()


def test_a_problem_that_is_no_number_leaves_its_neighbours_alone():
    x, y = normal(4, 30, 2), normal(4, 30, 2, seed=1)
    healthy = sinkhorn(x, y, 0.05, tolerance=1e-6, backend="dense")
    x = x.index_fill(0, torch.tensor([2]), math.nan)
    out = solve_dense(problem(x, y, 0.05, tolerance=1e-6))
    assert out.converged.tolist() == [True, True, False, True]
    assert out.marginal_error[2].isnan()
    others = torch.tensor([0, 1, 3])
    own = out.coupling.matrix()[others]
    torch.testing.assert_close(own, healthy.plan()[others], atol=1e-6, rtol=0)


def test_potentials_far_from_the_start_are_reached_along_a_schedule(monkeypatch):
    x, y = 40 * normal(20, 1), 40 * normal(20, 1, seed=1)
    used = []
    schedule = dense.Scaling.along_a_schedule
    monkeypatch.setattr(
        dense.Scaling,
        "along_a_schedule",
        lambda self, *args: used.append(args[0].all()) or schedule(self, *args),
    )
    monkeypatch.setattr(dense, "LATE", 3)
    given = problem(x, y, 1.0, tolerance=1e-4, max_iters=5_000)
    out = solve_dense(given)
    assert used and all(used) and out.converged.all()
    reference = solve_log_domain(problem(x, y, 1.0, tolerance=1e-6))
    torch.testing.assert_close(out.coupling.matrix(), coupling_of(given, reference), atol=1e-3, rtol=0)


def test_a_schedule_begins_the_chosen_problems_anew_and_leaves_the_others():
    x, y = 40 * normal(2, 20, 1), 40 * normal(2, 20, 1, seed=1)
    scaling = dense.Scaling(problem(x, y, 1.0))
    phi, gamma = normal(2, 20, seed=2), normal(2, 20, seed=3)
    scaling.along_a_schedule(torch.tensor([True, False]), phi, gamma)
    assert torch.equal(scaling.phi[1], phi[1]) and torch.equal(scaling.gamma[1], gamma[1])
    torch.testing.assert_close(scaling.kernel[0].sum(0), scaling.b[0])
    reached = (scaling.kernel[0].sum(1) - scaling.a[0]).abs().sum()
    zero = torch.zeros(2, 20, dtype=D)
    scaling.rebuild(zero, scaling.column_half_step(zero))
    assert reached < (scaling.kernel[0].sum(1) - scaling.a[0]).abs().sum() / 2


def test_a_correction_is_bounded_in_the_direction_it_has():
    mixing, point = Anderson(torch.full((1, 4), 0.25, dtype=D)), torch.zeros(1, 4, dtype=D)
    residual = torch.tensor([[1.0, -2.0, 0.5, 0.25]], dtype=D)
    mixing.step(point, residual)
    moved = mixing.step(point + residual, 0.99 * residual)  # the fixed point seems to be a hundred steps away
    correction = moved - (point + 1.99 * residual)
    torch.testing.assert_close(correction.abs().max(), torch.tensor(LIMIT, dtype=D))
    torch.testing.assert_close(correction / correction.norm(), residual / residual.norm())


def test_a_start_of_a_general_problem_serves_a_symmetric_one():
    x = normal(12, 2)
    general = sinkhorn(x, x.clone() + 0.3, 0.3, backend="log")
    expected = sinkhorn(x, x, 0.3, backend="log")
    for backend in ("dense", "streaming"):
        out = sinkhorn(x, x, 0.3, start=general, backend=backend)
        assert out.converged
        torch.testing.assert_close(out.value, expected.value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["dense", "log", "streaming"])
def test_every_backend_begins_at_the_start(backend):
    x, y = normal(50, 2), normal(50, 2, seed=1)
    cold = sinkhorn(x, y, 0.2, tolerance=1e-6, backend=backend)
    assert sinkhorn(x, y, 0.2, tolerance=1e-6, backend=backend, start=cold).n_iters <= 3 < cold.n_iters


@pytest.mark.parametrize("backend", ["dense", "log", "streaming"])
def test_autocast_does_not_reach_it(backend):
    x, y = normal(20, 2, dtype=torch.float32).requires_grad_(), normal(20, 2, seed=1, dtype=torch.float32)
    expected = sinkhorn(x, y, 0.3, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sinkhorn(x, y, 0.3, backend=backend)
    out.value.backward()
    assert out.value.dtype == torch.float32
    torch.testing.assert_close(out.value, expected.value)
    torch.testing.assert_close(x.grad, torch.autograd.grad(expected.value, x)[0])


@pytest.mark.parametrize("backend", ["dense", "log", "streaming"])
def test_second_derivatives_are_refused(backend):
    x, y = normal(10, 2).requires_grad_(), normal(10, 2, seed=1)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(sinkhorn(x, y, 0.3, backend=backend).value, x, create_graph=True)


BAD_STARTS = {
    "no result": ({"start": 3}, "start is a int: expected a result of sinkhorn"),
    "unrolled": ({"gradient": "unrolled"}, "only iterations with gradient='envelope'"),
    "exact": ({"epsilon": 0.0}, "only iterations with gradient='envelope' and a positive epsilon"),
}


@pytest.mark.parametrize("case", BAD_STARTS)
def test_a_start_that_cannot_be_one_is_refused(case):
    x, y = normal(10, 2), normal(10, 2, seed=1)
    changes, message = BAD_STARTS[case]
    with pytest.raises(ValueError, match=message):
        sinkhorn(**{"x": x, "y": y, "epsilon": 0.3, "start": sinkhorn(x, y, 0.3)} | changes)


BAD = {
    "no problems": (
        lambda: sinkhorn(torch.zeros(0, 3, 2), torch.zeros(0, 3, 2), 1.0),
        "a batch of no problems",
    ),
    "too large for the dtype": (
        lambda: sinkhorn(torch.ones(2, 1).float(), torch.ones(2, 1).float(), 1e40),
        r"epsilon is 1e\+40, out of the range of torch.float32",
    ),
    "too small": (
        lambda: sinkhorn(torch.ones(2, 1).float(), torch.ones(2, 1).float(), 1e-50),
        "epsilon is 1e-50, out of the range of torch.float32",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_it_cannot_solve_is_said(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
