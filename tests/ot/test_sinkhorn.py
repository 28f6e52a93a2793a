"""Entropic transport: the laws it obeys, its gradients, and the answers of other libraries."""

import functools
import math

import geomloss
import ot as pot
import pytest
import torch

from pyro_sinkhorn.errors import NonFiniteError
from pyro_sinkhorn.ot import ConvergenceWarning, sinkhorn, sinkhorn_divergence
from pyro_sinkhorn.ot.backends import BACKENDS, log_domain

D = torch.float64
COSTS = ["sqeuclidean", "euclidean"]


def manhattan(x, y):
    return torch.cdist(x, y, p=1)


def clouds(*batch, n=12, m=17, d=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, d, dtype=D, generator=rng)
    return x, 0.7 * torch.randn(*batch, m, d, dtype=D, generator=rng) + 0.5


def weights(*shape, seed=1):
    w = torch.rand(*shape, dtype=D, generator=torch.Generator().manual_seed(seed)) + 0.2
    return w / w.sum(-1, keepdim=True)


def weighted(kind, n, m):
    return (weights(n), weights(m, seed=2)) if kind == "weighted" else (None, None)


def ground(cost, x, y):
    return torch.cdist(x, y).square() if cost == "sqeuclidean" else torch.cdist(x, y)


def entropic_cost(plan, cost, epsilon, a, b):
    """<P, C> + epsilon KL(P | a x b), the definition."""
    reference = a.unsqueeze(-1) * b.unsqueeze(-2)
    return (plan * cost + epsilon * torch.xlogy(plan, plan / reference)).sum((-2, -1))


def uniform(n):
    return torch.full((n,), 1 / n, dtype=D)


# The definition


@pytest.mark.parametrize("kind", ["uniform", "weighted"])
@pytest.mark.parametrize("cost", COSTS)
def test_the_plan_is_a_coupling_and_its_cost_is_the_value(backend, cost, kind):
    # A feasible plan bounds the minimum from above, a dual pair from below: where they meet, both are optimal.
    x, y = clouds()
    a, b = weighted(kind, 12, 17)
    out = sinkhorn(x, y, 0.5, a, b, cost, tolerance=1e-9, backend=backend)
    a, b = uniform(12) if a is None else a, uniform(17) if b is None else b
    plan = out.plan()
    torch.testing.assert_close(plan.sum(-1), a, atol=1e-9, rtol=0)
    torch.testing.assert_close(plan.sum(-2), b, atol=1e-9, rtol=0)
    primal = entropic_cost(plan, ground(cost, x, y), 0.5, a, b)
    torch.testing.assert_close(out.value, primal, atol=1e-8, rtol=0)
    torch.testing.assert_close(out.value, a @ out.f + b @ out.g, atol=1e-8, rtol=0)
    density = ((out.f.unsqueeze(-1) + out.g - ground(cost, x, y)) / 0.5).exp()
    torch.testing.assert_close(plan, a.unsqueeze(-1) * b * density)


def test_the_record_has_the_shapes_it_promises(backend):
    x, y = clouds(3)
    out = sinkhorn(x.requires_grad_(), y, 0.5, backend=backend)
    assert out.value.shape == out.marginal_error.shape == out.converged.shape == (3,)
    assert (out.f.shape, out.g.shape, out.plan().shape) == ((3, 12), (3, 17), (3, 12, 17))
    assert out.converged.dtype == torch.bool
    assert out.converged.all()
    assert (out.marginal_error <= 1e-6).all()
    assert isinstance(out.n_iters, int)
    assert out.n_iters > 0
    assert out.value.requires_grad
    assert not any(t.requires_grad for t in (out.f, out.g, out.plan(), out.marginal_error))
    single = sinkhorn(x[0], y[0], 0.5, backend=backend)
    assert single.value.shape == single.converged.shape == ()
    assert single.plan().shape == (12, 17)


def test_two_points_by_hand(backend):
    # x = y = {0, 1}: the plan keeps a point with weight p = 1 / (1 + exp(-1/eps)), and the value is eps log 2p.
    x = torch.tensor([[0.0], [1.0]], dtype=D)
    for epsilon in (0.1, 1.0, 10.0):
        out = sinkhorn(x, x, epsilon, tolerance=1e-12, backend=backend)
        stay = 1 / (1 + math.exp(-1 / epsilon))
        assert out.plan()[0, 0].item() == pytest.approx(stay / 2, abs=1e-12)
        assert out.value.item() == pytest.approx(epsilon * math.log(2 * stay), abs=1e-12)


def test_one_point_has_nothing_to_choose(backend):
    x, y = clouds(n=1)
    out = sinkhorn(x, y, 0.1, b=weights(17), backend=backend)
    torch.testing.assert_close(out.value, (ground("sqeuclidean", x, y)[0] * weights(17)).sum())


# Laws


def test_exchanging_the_clouds_transposes_the_plan(backend):
    (x, y), (a, b) = clouds(), weighted("weighted", 12, 17)
    one = sinkhorn(x, y, 0.5, a, b, tolerance=1e-9, backend=backend)
    two = sinkhorn(y, x, 0.5, b, a, tolerance=1e-9, backend=backend)
    torch.testing.assert_close(one.value, two.value, atol=1e-8, rtol=0)
    torch.testing.assert_close(one.plan(), two.plan().mT, atol=1e-8, rtol=0)


def test_the_order_of_the_points_does_not_matter(backend):
    (x, y), (a, b) = clouds(), weighted("weighted", 12, 17)
    one = sinkhorn(x, y, 0.5, a, b, tolerance=1e-9, backend=backend)
    two = sinkhorn(x.flip(0), y, 0.5, a.flip(0), b, tolerance=1e-9, backend=backend)
    torch.testing.assert_close(one.value, two.value, atol=1e-8, rtol=0)
    torch.testing.assert_close(one.plan().flip(0), two.plan(), atol=1e-8, rtol=0)


@pytest.mark.parametrize(("cost", "power"), [("sqeuclidean", 2), ("euclidean", 1)])
def test_scaling_the_space_scales_the_value_and_epsilon(backend, cost, power):
    x, y = clouds()
    one = sinkhorn(x, y, 0.5, cost=cost, tolerance=1e-9, backend=backend)
    two = sinkhorn(30 * x, 30 * y, 0.5 * 30**power, cost=cost, tolerance=1e-9, backend=backend)
    torch.testing.assert_close(two.value, 30**power * one.value)


def test_moving_one_cloud_adds_its_squared_shift_and_a_cross_term(backend):
    x, y = clouds()
    shift = torch.tensor([2.0, -1.0], dtype=D)
    one, two = (sinkhorn(x, z, 0.5, tolerance=1e-9, backend=backend).value for z in (y, y + shift))
    expected = one + shift.square().sum() + 2 * shift @ (y.mean(0) - x.mean(0))
    torch.testing.assert_close(two, expected, atol=1e-8, rtol=0)


def test_the_value_grows_with_epsilon(backend):
    # It is a minimum of functions that grow with epsilon, and the KL term is the slope.
    x, y = clouds()
    out = [sinkhorn(x, y, e, tolerance=1e-8, backend=backend) for e in (0.5, 0.5 + 1e-4, 1.0, 5.0, 50.0)]
    values = [o.value.item() for o in out]
    assert values == sorted(values)
    transport = (out[0].plan() * ground("sqeuclidean", x, y)).sum()
    slope = (out[0].value - transport) / 0.5
    assert (values[1] - values[0]) / 1e-4 == pytest.approx(slope.item(), rel=1e-3)


def test_points_of_weight_zero_change_nothing(backend):
    (x, y), (a, b) = clouds(), weighted("weighted", 12, 17)
    far, nothing = torch.tensor([[3.0, 4.0], [-20.0, 5.0]], dtype=D), torch.zeros(2, dtype=D)
    plain = sinkhorn(x, y, 0.5, a, b, tolerance=1e-9, backend=backend)
    padded = sinkhorn(
        torch.cat([x, far]),
        torch.cat([far, y]),
        0.5,
        torch.cat([a, nothing]),
        torch.cat([nothing, b]),
        tolerance=1e-9,
        backend=backend,
    )
    torch.testing.assert_close(padded.value, plain.value, atol=1e-8, rtol=0)
    expected = torch.nn.functional.pad(plain.plan(), (2, 0, 0, 2))
    torch.testing.assert_close(padded.plan(), expected, atol=1e-8, rtol=0)


def test_splitting_a_point_in_two_changes_nothing(backend):
    (x, y), (a, b) = clouds(), weighted("weighted", 12, 17)
    plain = sinkhorn(x, y, 0.5, a, b, tolerance=1e-9, backend=backend)
    split = torch.cat([a[:1] * 0.3, a[1:], a[:1] * 0.7])
    double = sinkhorn(torch.cat([x, x[:1]]), y, 0.5, split, b, tolerance=1e-9, backend=backend)
    torch.testing.assert_close(double.value, plain.value, atol=1e-8, rtol=0)


# Other libraries


@pytest.mark.parametrize("kind", ["uniform", "weighted"])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("epsilon", [0.3, 1.0, 5.0])
def test_value_and_plan_are_those_of_pot(backend, cost, epsilon, kind):
    x, y = clouds(n=20, m=30, d=3)
    a, b = weighted(kind, 20, 30)
    out = sinkhorn(x, y, epsilon, a, b, cost, backend=backend)
    a, b = uniform(20) if a is None else a, uniform(30) if b is None else b
    matrix = ground(cost, x, y)
    plan = pot.bregman.sinkhorn(
        a, b, matrix, epsilon, method="sinkhorn_log", stopThr=1e-10, numItermax=10_000
    )
    torch.testing.assert_close(out.plan(), plan, atol=1e-6, rtol=0)
    expected = entropic_cost(plan, matrix, epsilon, a, b)
    torch.testing.assert_close(out.value, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["uniform", "weighted"])
@pytest.mark.parametrize(("p", "epsilon", "scaling"), [(1, 1.0, 0.99), (2, 1.0, 0.998), (2, 5.0, 0.995)])
def test_the_value_is_that_of_geomloss(backend, p, epsilon, scaling, kind):
    # Its p = 2 is half the squared distance, with blur = sqrt(epsilon): a factor two in value and epsilon both.
    # It has no stopping rule, and stops 5e-5 short of convergence even at scaling=.99.
    x, y = clouds(3, n=20, m=30, d=3)
    a, b = (
        w.expand(3, -1)
        for w in (weighted(kind, 20, 30) if kind == "weighted" else (uniform(20), uniform(30)))
    )
    loss = geomloss.SamplesLoss(
        "sinkhorn", p=p, blur=(epsilon / p) ** (1 / p), scaling=scaling, debias=False, backend="tensorized"
    )
    cost = "sqeuclidean" if p == 2 else "euclidean"
    out = sinkhorn(x, y, epsilon, a, b, cost, backend=backend)
    torch.testing.assert_close(out.value, p * loss(a, x, b, y), atol=1e-5, rtol=0)


# Closed forms and limits


def test_small_epsilon_on_the_line_is_the_sorted_assignment(backend):
    # The plan is a permutation over n, and KL(permutation / n | uniform) = log n.
    rng = torch.Generator().manual_seed(0)
    n, epsilon = 12, 0.05
    grid = torch.arange(n, dtype=D)
    x = (grid + 0.3 * torch.rand(n, dtype=D, generator=rng))[torch.randperm(n, generator=rng)].unsqueeze(-1)
    y = (grid + 0.3 * torch.rand(n, dtype=D, generator=rng) + 0.5).unsqueeze(-1)
    x.requires_grad_()
    out = sinkhorn(x, y, epsilon, backend=backend)
    expected = (x.sort(0).values - y).square().mean()
    torch.testing.assert_close(out.value, expected + epsilon * math.log(n), atol=1e-6, rtol=0)
    (grad,) = torch.autograd.grad(out.value, x, retain_graph=True)
    (assigned,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(grad, assigned, atol=1e-6, rtol=0)


@pytest.mark.parametrize("cost", COSTS)
def test_epsilon_to_zero_closes_in_on_unregularised_transport(backend, cost):
    # KL(P | a x b) of a coupling is at most the entropy of either marginal, so the bound is exact at every epsilon.
    (x, y), (a, b) = clouds(n=8, m=10), weighted("weighted", 8, 10)
    exact = pot.emd2(a, b, ground(cost, x, y))
    entropy = min(-torch.xlogy(w, w).sum() for w in (a, b))
    for epsilon in (1.0, 0.3, 0.1, 0.03):
        value = sinkhorn(x, y, epsilon, a, b, cost, tolerance=1e-3, max_iters=20_000, backend=backend).value
        assert exact - 1e-3 < value < exact + epsilon * entropy + 1e-3
    assert value - exact < 0.05


@pytest.mark.parametrize("cost", COSTS)
def test_epsilon_to_infinity_is_the_mean_cost(backend, cost):
    # The next term is -Var(C) / (2 epsilon) for the doubly centred cost, here below 1e-5.
    (x, y), (a, b) = clouds(), weighted("weighted", 12, 17)
    value = sinkhorn(x, y, 1e6, a, b, cost, backend=backend).value
    torch.testing.assert_close(value, a @ ground(cost, x, y) @ b, atol=1e-5, rtol=0)


def gaussian_closed_form(mean_x, cov_x, mean_y, cov_y, epsilon):
    """Entropic transport of two Gaussians at cost |x - y|^2 (Janati et al. 2020, theorem 1; epsilon = 2 sigma^2).

    D = (4 A^1/2 B A^1/2 + sigma^4 I)^1/2:
    |a - b|^2 + tr A + tr B - tr D + d sigma^2 (1 - log 2 sigma^2) + sigma^2 log det(D + sigma^2 I)
    """
    variance = epsilon / 2
    values, vectors = torch.linalg.eigh(cov_x)
    root = (vectors * values.sqrt()) @ vectors.mT
    spectrum = (4 * torch.linalg.eigvalsh(root @ cov_y @ root) + variance**2).sqrt()  # of D
    return (
        (mean_x - mean_y).square().sum()
        + cov_x.trace()
        + cov_y.trace()
        + (-spectrum + variance * (1 - math.log(2 * variance)) + variance * (spectrum + variance).log()).sum()
    )


GAUSSIANS = {
    1: ([0.0], [[1.0]], [0.5], [[0.3]]),
    2: ([0.0, 0.0], [[1.0, 0.4], [0.4, 0.6]], [1.0, -0.5], [[0.5, -0.2], [-0.2, 0.8]]),
}


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 10.0])
@pytest.mark.parametrize("d", [1, 2])
def test_gaussians_by_quadrature_have_the_closed_form(backend, d, epsilon):
    # A grid weighted by the density: the trapezoid rule converges exponentially, so there is no sampling error.
    parameters = [torch.tensor(p, dtype=D) for p in GAUSSIANS[d]]
    line = torch.linspace(-5.5, 5.5, {1: 100, 2: 26}[d], dtype=D)
    grid = torch.cartesian_prod(*[line] * d).reshape(-1, d)
    a, b = (
        torch.distributions.MultivariateNormal(mean, cov).log_prob(grid).softmax(0)
        for mean, cov in (parameters[:2], parameters[2:])
    )
    value = sinkhorn(grid, grid, epsilon, a, b, backend=backend).value
    expected = gaussian_closed_form(*parameters, epsilon)
    torch.testing.assert_close(value, expected, atol=2e-5, rtol=0)


def test_gaussian_samples_have_the_closed_form_within_their_standard_error(backend):
    # OT(n) = OT + L_n + B / n + o(1/n), where L_n is a mean of n independent terms with expectation 0. Twice the
    # whole cloud less the mean of its halves has the same L_n and no B: over independent clouds its z is standard
    # normal, and without a truth to fit.
    parameters = [torch.tensor(p, dtype=D) for p in GAUSSIANS[2]]
    rng = torch.Generator().manual_seed(0)
    n, repeats, epsilon = 200, 60, 2.0
    x, y = (
        mean + torch.randn(repeats, n, 2, dtype=D, generator=rng) @ torch.linalg.cholesky(cov).mT
        for mean, cov in (parameters[:2], parameters[2:])
    )
    whole = sinkhorn(x, y, epsilon, tolerance=1e-3, backend=backend).value
    halves = [
        sinkhorn(x[:, i], y[:, i], epsilon, tolerance=1e-3, backend=backend).value
        for i in (slice(None, n // 2), slice(n // 2, None))
    ]
    extrapolated = 2 * whole - (halves[0] + halves[1]) / 2
    error = extrapolated.std() / math.sqrt(repeats)
    assert error < 0.05  # the test has power: the whole value is near 2.7
    expected = gaussian_closed_form(*parameters, epsilon)
    assert abs(extrapolated.mean() - expected) < 5 * error


# Gradients


def slope(function, at, direction, step=1e-4):
    """Central difference, of the fourth order, of ``function`` along ``direction``."""
    near, far = (function(at + h * direction) - function(at - h * direction) for h in (step, 2 * step))
    return (8 * near - far) / (12 * step)


@pytest.mark.parametrize("cost", [*COSTS, manhattan])
@pytest.mark.parametrize("kind", ["uniform", "weighted"])
def test_gradients_in_the_points_match_differences(backend, cost, kind):
    x, y = (t.requires_grad_() for t in clouds(n=5, m=6))
    a, b = weighted(kind, 5, 6)

    def value(x, y):
        return sinkhorn(x, y, 0.5, a, b, cost, tolerance=1e-9, backend=backend).value

    grad_x, grad_y = torch.autograd.grad(value(x, y), (x, y))
    x, y = x.detach(), y.detach()
    for i in range(5):
        for k in range(2):
            unit = torch.zeros_like(x)
            unit[i, k] = 1
            torch.testing.assert_close(grad_x[i, k], slope(lambda z: value(z, y), x, unit), atol=1e-7, rtol=0)
    for i in range(6):
        unit = torch.zeros_like(y)
        unit[i, 0] = 1
        torch.testing.assert_close(grad_y[i, 0], slope(lambda z: value(x, z), y, unit), atol=1e-7, rtol=0)


@pytest.mark.parametrize("cost", [*COSTS, manhattan])
def test_gradients_in_the_weights_match_differences_along_the_simplex(backend, cost):
    x, y = clouds(n=5, m=6)
    a, b = (w.requires_grad_() for w in weighted("weighted", 5, 6))

    def value(a, b):
        return sinkhorn(x, y, 0.5, a, b, cost, tolerance=1e-9, backend=backend).value

    grad_a, grad_b = torch.autograd.grad(value(a, b), (a, b))
    a, b = a.detach(), b.detach()
    for i in range(1, 5):
        move = torch.zeros_like(a)
        move[0], move[i] = -1, 1  # mass from one point to another
        torch.testing.assert_close(grad_a @ move, slope(lambda w: value(w, b), a, move), atol=1e-7, rtol=0)
    for i in range(1, 6):
        move = torch.zeros_like(b)
        move[0], move[i] = -1, 1
        torch.testing.assert_close(grad_b @ move, slope(lambda w: value(a, w), b, move), atol=1e-7, rtol=0)


def test_the_gradient_of_a_weight_is_its_potential(backend):
    (x, y), (a, b) = clouds(), weighted("weighted", 12, 17)
    out = sinkhorn(x, y, 0.5, a.requires_grad_(), b.requires_grad_(), tolerance=1e-9, backend=backend)
    grad_a, grad_b = torch.autograd.grad(out.value, (a, b))
    torch.testing.assert_close(grad_a, out.f, atol=1e-7, rtol=0)
    torch.testing.assert_close(grad_b, out.g, atol=1e-7, rtol=0)


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_weight_of_zero_has_the_gradient_of_giving_it_mass(backend, side):
    x, y = clouds(n=5, m=5)
    a = torch.tensor([0.3, 0.0, 0.2, 0.5, 0.0], dtype=D, requires_grad=True)
    other = {"a": "b", "b": "a"}[side]

    def value(w):
        masses = {side: w, other: a.detach().flip(0)}
        return sinkhorn(x, y, 0.5, **masses, tolerance=1e-10, backend=backend).value

    (grad,) = torch.autograd.grad(value(a), a)
    move = torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0], dtype=D)
    a, h = a.detach(), 1e-4  # one-sided, second order: there is nothing left of zero
    forward = (4 * value(a + h * move) - value(a + 2 * h * move) - 3 * value(a)) / (2 * h)
    torch.testing.assert_close(grad @ move, forward, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cost", COSTS)
def test_points_of_weight_zero_get_no_gradient_and_make_no_nan(backend, cost):
    # Two masked points far out that coincide: nothing bounds their density, and 0 times infinity is NaN.
    x = torch.tensor([[0.0], [1.0], [500.0]], dtype=D, requires_grad=True)
    y = torch.tensor([[0.2], [0.7], [500.0]], dtype=D, requires_grad=True)
    a = torch.tensor([0.4, 0.6, 0.0], dtype=D, requires_grad=True)
    b = torch.tensor([0.5, 0.5, 0.0], dtype=D, requires_grad=True)
    out = sinkhorn(x, y, 0.1, a, b, cost, tolerance=1e-9, backend=backend)
    small = [t.detach()[:2].requires_grad_() for t in (x, y, a, b)]
    expected = sinkhorn(*small[:2], 0.1, *small[2:], cost, tolerance=1e-9, backend=backend)
    torch.testing.assert_close(out.value, expected.value, atol=1e-8, rtol=0)
    torch.testing.assert_close(out.plan()[:2, :2], expected.plan(), atol=1e-8, rtol=0)
    assert not out.plan()[2].any()
    assert not out.plan()[:, 2].any()
    grads = torch.autograd.grad(out.value, (x, y, a, b))
    for grad, reference in zip(grads, torch.autograd.grad(expected.value, small), strict=True):
        assert grad.isfinite().all()
        difference = grad[:2] - reference
        if grad.dim() == 1:  # of weights, which sum to 1: a constant means nothing
            difference = difference - difference.mean()
        torch.testing.assert_close(difference, torch.zeros_like(reference), atol=1e-7, rtol=0)
    assert grads[0][2] == grads[1][2] == 0


def test_a_masked_point_cannot_end_the_loop_early(backend, monkeypatch):
    # The potential of the masked point at 10 moves by 100, ten thousand epsilons: its density overflows at weight
    # zero, and a NaN error would stop there, silently. Only a cold start gets so far off.
    monkeypatch.setattr(log_domain, "epsilon_schedule", lambda *args: [])
    x = torch.tensor([[0.0], [0.1], [10.0]], dtype=D)
    y = torch.tensor([[0.0], [10.0]], dtype=D)
    a = torch.tensor([0.25, 0.75, 0.0], dtype=D)
    out = sinkhorn(x, y, 0.01, a, max_iters=20_000, backend=backend)
    assert out.converged
    torch.testing.assert_close(out.value, sinkhorn(x[:2], y, 0.01, a[:2], max_iters=20_000).value)


@pytest.mark.parametrize("cost", COSTS)
def test_the_gradient_is_finite_where_points_coincide(backend, cost):
    x = clouds()[0].requires_grad_()
    out = sinkhorn(x, x.detach().clone(), 0.5, cost=cost, tolerance=1e-9, backend=backend)
    (grad,) = torch.autograd.grad(out.value, x)
    assert grad.isfinite().all()
    assert grad.abs().max() > 0
    same = torch.zeros(4, 2, dtype=D, requires_grad=True)
    (grad,) = torch.autograd.grad(
        sinkhorn(same, torch.zeros_like(same), 0.5, cost=cost, backend=backend).value, same
    )
    assert not grad.any()


def test_parameters_of_a_cost_get_their_gradient(backend):
    x, y = clouds()
    scale = torch.tensor([1.0, 3.0], dtype=D, requires_grad=True)

    def value(scale):
        def cost(x, y):
            return (scale * (x.unsqueeze(1) - y)).square().sum(-1)

        return sinkhorn(x, y, 0.5, cost=cost, tolerance=1e-9, backend=backend).value

    (grad,) = torch.autograd.grad(value(scale), scale)
    move = torch.tensor([1.0, -0.5], dtype=D)
    expected = slope(value, scale.detach(), move)
    torch.testing.assert_close(grad @ move, expected, atol=1e-7, rtol=0)


def test_short_of_convergence_the_gradient_is_still_that_of_the_value_returned(backend):
    # The potentials are constants of the value; what they lack is kept in the gradient of the weights.
    (x, y), (a, b) = clouds(), weighted("weighted", 12, 17)
    a.requires_grad_()
    with pytest.warns(ConvergenceWarning):
        out = sinkhorn(x, y, 0.05, a, b, max_iters=1, backend=backend)
    (grad,) = torch.autograd.grad(out.value, a)
    matrix = ground("sqeuclidean", x, y)

    def dual(a):
        density = ((out.f.unsqueeze(-1) + out.g - matrix) / 0.05).exp()
        return a @ out.f + b @ out.g - 0.05 * (a @ density @ b - 1)

    (expected,) = torch.autograd.grad(dual(a), a)
    move = torch.linspace(-1, 1, 12, dtype=D)
    torch.testing.assert_close(out.value, dual(a))
    torch.testing.assert_close(grad @ move, expected @ move, atol=1e-8, rtol=1e-8)


def graph(value):
    """How many nodes stand behind ``value``."""
    seen, todo = set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return len(seen)


def test_no_graph_runs_through_the_iterations(backend):
    x, y = (t.requires_grad_() for t in clouds())
    a = weights(12).requires_grad_()
    nodes, saved = [], []
    for tolerance in (1e-1, 1e-9):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            out = sinkhorn(x, y, 0.3, a, tolerance=tolerance, backend=backend)
        nodes.append((out.n_iters, graph(out.value)))
        saved.append(sum(t.numel() for t in kept))
    (few, small), (many, large) = nodes
    assert many > 2 * few
    assert large == small < 40
    assert saved[0] == saved[1]


# Batches and precision


@pytest.mark.parametrize("cost", [*COSTS, manhattan])
def test_a_batch_is_a_loop(backend, cost):
    x, y = clouds(2, 3, n=6, m=7)
    a, b = weights(2, 3, 6), weights(2, 3, 7, seed=2)
    epsilon = torch.tensor([[0.3, 0.5, 1.0], [2.0, 4.0, 8.0]], dtype=D)
    x.requires_grad_()
    out = sinkhorn(x, y, epsilon, a, b, cost, tolerance=1e-9, backend=backend)
    (grad,) = torch.autograd.grad(out.value.sum(), x)
    assert out.value.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            xi = x[i, j].detach().requires_grad_()
            one = sinkhorn(
                xi, y[i, j], epsilon[i, j].item(), a[i, j], b[i, j], cost, tolerance=1e-9, backend=backend
            )
            torch.testing.assert_close(out.value[i, j], one.value, atol=1e-8, rtol=0)
            torch.testing.assert_close(out.plan()[i, j], one.plan(), atol=1e-8, rtol=0)
            torch.testing.assert_close(grad[i, j], *torch.autograd.grad(one.value, xi), atol=1e-8, rtol=0)


def test_batch_dimensions_broadcast(backend):
    x, y = clouds(3, 1)[0], clouds(2)[1]
    b = weights(17).requires_grad_()
    out = sinkhorn(x, y, torch.tensor([0.5, 1.0]), b=b, tolerance=1e-9, backend=backend)
    assert out.value.shape == (3, 2)
    assert out.plan().shape == (3, 2, 12, 17)
    for i in range(3):
        for j in range(2):
            one = sinkhorn(x[i, 0], y[j], (0.5, 1.0)[j], b=b, tolerance=1e-9, backend=backend)
            torch.testing.assert_close(out.value[i, j], one.value, atol=1e-8, rtol=0)
    (grad,) = torch.autograd.grad(out.value.sum(), b)
    torch.testing.assert_close(grad, out.g.sum((0, 1)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("cost", COSTS)
def test_float32_agrees_with_float64_far_from_the_origin(backend, cost):
    x, y = ((t + 100).float() for t in clouds(n=50, m=60, d=3))
    results = []
    for dtype in (torch.float32, D):
        points = x.to(dtype).requires_grad_()
        out = sinkhorn(points, y.to(dtype), 0.5, cost=cost, backend=backend)
        assert out.value.dtype == out.f.dtype == out.plan().dtype == dtype
        assert out.converged
        results.append((out.value.to(D), torch.autograd.grad(out.value, points)[0].to(D)))
    (value, grad), (true_value, true_grad) = results
    assert (value - true_value).abs() < 1e-4 * true_value
    assert (grad - true_grad).norm() < 1e-3 * true_grad.norm()


def test_a_number_for_epsilon_is_not_rounded_to_the_default_dtype(backend):
    x, y = clouds()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        single = sinkhorn(x, y, 0.3, backend=backend).value
        torch.set_default_dtype(D)
        double = sinkhorn(x, y, 0.3, backend=backend).value
    finally:
        torch.set_default_dtype(default)
    assert single == double


def test_weights_off_by_rounding_still_converge(backend):
    # Softmax in float32, say: the mass they lack would be a floor of the marginal error, far above 1e-6.
    x, y = clouds()
    a = weights(12)
    rounded = (a + 1e-6).requires_grad_()
    out = sinkhorn(x, y, 0.5, rounded, tolerance=1e-9, backend=backend)
    assert out.converged
    torch.testing.assert_close(out.value, sinkhorn(x, y, 0.5, a, backend=backend).value, atol=1e-4, rtol=0)
    (grad,) = torch.autograd.grad(out.value, rounded)
    torch.testing.assert_close(grad, out.f, atol=1e-4, rtol=0)


def test_the_same_call_gives_the_same_answer_and_touches_no_random_state(backend):
    x, y = clouds()
    before = torch.get_rng_state()
    one, two = (sinkhorn(x, y, 0.5, backend=backend) for _ in range(2))
    assert torch.equal(one.value, two.value)
    assert torch.equal(one.f, two.f)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_inputs_are_left_alone(backend):
    (x, y), (a, b) = clouds(), weighted("weighted", 12, 17)
    copies = [t.clone() for t in (x, y, a, b)]
    sinkhorn(x.requires_grad_(), y, 0.5, a, b, backend=backend).value.backward()
    assert all(torch.equal(t, copy) for t, copy in zip((x, y, a, b), copies, strict=True))


def test_under_no_grad_the_value_has_no_graph(backend):
    x, y = (t.requires_grad_() for t in clouds())
    with torch.no_grad():
        assert not sinkhorn(x, y, 0.5, backend=backend).value.requires_grad


# What goes wrong is said


def test_stopping_short_warns_with_what_to_change(backend):
    x, y = clouds()
    with pytest.warns(
        ConvergenceWarning, match=r"marginal error of .*, above the tolerance 1e-06: raise epsilon"
    ):
        out = sinkhorn(x, y, 0.01, max_iters=3, backend=backend)
    assert not out.converged
    # The error is that of the very plan returned.
    error = (out.plan().sum(-1) - uniform(12)).abs().sum()
    torch.testing.assert_close(out.marginal_error, error, rtol=1e-6, atol=0)


def test_one_slow_problem_of_a_batch_is_told_apart(backend):
    x, y = clouds(2)
    with pytest.warns(ConvergenceWarning):
        out = sinkhorn(x, y, torch.tensor([0.01, 10.0]), max_iters=20, backend=backend)
    assert out.converged.tolist() == [False, True]


def test_a_looser_tolerance_needs_fewer_iterations(backend):
    x, y = clouds()
    loose, tight = (sinkhorn(x, y, 0.3, tolerance=t, backend=backend) for t in (1e-2, 1e-8))
    assert loose.n_iters < tight.n_iters
    assert tight.marginal_error <= 1e-8 < loose.marginal_error <= 1e-2


def ones(n):
    return torch.ones(n, dtype=D)


BAD = {
    "x no tensor": ({"x": [[0.0]]}, r"x is a list: expected a tensor of points, shape \(\.\.\., n, d\)"),
    "x one-dimensional": ({"x": ones(4)}, r"x has shape \(4,\): expected \(\.\.\., n, d\)"),
    "y empty": ({"y": torch.zeros(0, 2, dtype=D)}, r"y has shape \(0, 2\): expected .* at least 1"),
    "y without a space": ({"y": torch.zeros(3, 0, dtype=D)}, r"y has shape \(3, 0\): expected .* at least 1"),
    "x of integers": (
        {"x": torch.zeros(4, 2, dtype=torch.long)},
        r"x is torch\.int64: expected floating.*\.float",
    ),
    "two dtypes": (
        {"x": torch.zeros(4, 2, dtype=torch.float32)},
        r"x is torch\.float32 .* y is torch\.float64.*one",
    ),
    "two spaces": (
        {"x": torch.zeros(4, 3, dtype=D)},
        r"x has shape \(4, 3\) and y \(17, 2\): the last dimension",
    ),
    "two batches": (
        {"x": torch.zeros(2, 4, 2, dtype=D), "y": torch.zeros(3, 4, 2, dtype=D)},
        r"x has shape \(2, 4, 2\) and y \(3, 4, 2\): .*leading dimensions.* must broadcast",
    ),
    "epsilon zero": ({"epsilon": 0.0}, r"epsilon is 0 for clouds of 12 and 17 points: .* needs equal sizes"),
    "tolerance negative": ({"tolerance": -1e-6}, r"tolerance is -1e-06: expected .* at least 0"),
    "epsilon negative": ({"epsilon": -1.0}, r"epsilon is -1\.0: expected a positive"),
    "epsilon NaN": ({"epsilon": math.nan}, r"epsilon is nan: expected a positive"),
    "epsilon infinite": ({"epsilon": math.inf}, r"epsilon is inf: expected a positive finite"),
    "one epsilon of many": (
        {"epsilon": torch.tensor([1.0, -1.0])},
        r"epsilon is tensor\(.*: expected a positive",
    ),
    "too many epsilons": ({"epsilon": torch.ones(3)}, r"epsilon has shape \(3,\): expected .* batch \(\)"),
    "a too short": (
        {"a": uniform(11)},
        r"weights a have shape \(11,\): expected \(\.\.\., 12\), one a point",
    ),
    "b too long": ({"b": uniform(18)}, r"weights b have shape \(18,\): expected \(\.\.\., 17\)"),
    "a of another batch": (
        {"a": uniform(12).expand(2, 12)},
        r"weights a have shape \(2, 12\): .* broadcast to \(12,\)",
    ),
    "a of another dtype": (
        {"a": uniform(12).float()},
        r"weights a are torch\.float32 .*: expected torch\.float64",
    ),
    "a not normalised": ({"a": ones(12)}, r"weights a must be nonnegative and sum to 1; their sum is 12"),
    "b negative": ({"b": torch.cat([-ones(1), 2 * ones(1), 0 * ones(15)])}, r"weights b must be nonnegative"),
    "a NaN": ({"a": math.nan * ones(12)}, r"weights a must be nonnegative and sum to 1; their sum is nan"),
    "no unit vectors": (
        {"cost": "geodesic"},
        r"x has vectors of lengths .* to .*: the cost 'geodesic' is between unit vectors",
    ),
    "unknown cost": (
        {"cost": "cosine"},
        r"unknown cost 'cosine': expected one of \['euclidean', 'geodesic', 'l1', 'sqeuclidean'\]",
    ),
    "wrong cost": (
        {"cost": lambda x, y: x},
        r"clouds of shape \(12, 2\) and \(17, 2\) and returned \(12, 2\)",
    ),
    "unknown backend": (
        {"backend": "magic"},
        r"unknown backend 'magic': expected 'auto' or one of \[.*'log'",
    ),
    "no iterations": ({"max_iters": 0}, r"max_iters is 0: expected at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_problem_is_refused_with_what_was_given_and_expected(case):
    x, y = clouds()
    changes, message = BAD[case]
    arguments = {"x": x, "y": y, "epsilon": 0.5} | changes
    with pytest.raises(ValueError, match=message):
        sinkhorn(**arguments)


@pytest.mark.parametrize("debias", [False, None, "self", "independent"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_points_that_are_no_numbers_are_named(backend, value, debias):
    x, y = clouds()
    y[4, 0] = value
    solve = sinkhorn if debias is False else functools.partial(sinkhorn_divergence, debias=debias)
    # No ConvergenceWarning, which would blame epsilon.
    with pytest.raises(
        NonFiniteError, match=r"^y, shape \(17, 2\), is NaN or infinite in 1 of 17 points .* point 4\)"
    ):
        solve(x, y, 0.5, backend=backend)


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (
            "sqeuclidean",
            r"the cost 'sqeuclidean' is out of the range of torch.float32, since the largest .* 1e\+30",
        ),
        (
            lambda x, y: (x @ y.mT).log(),
            "the cost '<lambda>' returned (nan|-inf) between points that are finite",
        ),
    ],
)
def test_costs_that_are_no_numbers_are_named(cost, message):
    x, y = torch.full((3, 1), 1e30, dtype=torch.float32), torch.full((4, 1), -1e30, dtype=torch.float32)
    with pytest.raises(NonFiniteError, match=message):
        sinkhorn(x, y, 1.0, cost=cost)


def test_exponents_beyond_the_range_are_named(backend):
    x, y = clouds()
    with pytest.raises(NonFiniteError, match=r"potentials or plan are NaN or infinite .* epsilon 1e-305"):
        sinkhorn(1e5 * x, y, 1e-305, backend=backend)


def test_a_new_backend_needs_only_a_name(monkeypatch):
    calls = []

    def counting(problem):
        calls.append(problem)
        return BACKENDS["log"](problem)

    monkeypatch.setitem(BACKENDS, "counting", counting)
    x, y = clouds(2, 3)
    out = sinkhorn(x, y, 0.5, backend="counting")
    torch.testing.assert_close(out.value, sinkhorn(x, y, 0.5).value)
    (problem,) = calls
    assert problem.x.shape == (6, 12, 2)
    assert problem.a.shape == (6, 12)
    assert problem.epsilon.shape == (6,)
