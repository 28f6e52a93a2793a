"""Gradients through the iterations: those of autograd, of differences, and at convergence of the envelope."""

import math
from itertools import pairwise

import pytest
import torch

from pyro_sinkhorn.errors import NonFiniteError
from pyro_sinkhorn.ot import ConvergenceWarning, sinkhorn, sinkhorn_divergence
from pyro_sinkhorn.ot.backends import log_domain
from pyro_sinkhorn.ot.backends.log_domain import half_step
from pyro_sinkhorn.ot.rounding import rounded

D = torch.float64
COSTS = ["sqeuclidean", "euclidean"]
VALUES = ["entropic", "sharp", "rounded"]


def clouds(*batch, n=7, m=9, d=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, d, dtype=D, generator=rng)
    return x, 0.7 * torch.randn(*batch, m, d, dtype=D, generator=rng) + 0.5


def weights(*shape, seed=1):
    w = torch.rand(*shape, dtype=D, generator=torch.Generator().manual_seed(seed)) + 0.2
    return w / w.sum(-1, keepdim=True)


def problem(*batch):
    """Points and weights that ask for gradients."""
    inputs = (*clouds(*batch), weights(*batch, 7), weights(*batch, 9, seed=2))
    return tuple(t.requires_grad_() for t in inputs)


def by_autograd(x, y, epsilon, a, b, value, n_iters):
    """The same iterations in plain torch, every matrix kept; for positive weights."""
    cost = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    eps, g = torch.full(x.shape[:1], epsilon, dtype=D), torch.zeros_like(b)
    for _ in range(n_iters):
        f = half_step(g, cost, b.log(), eps)
        g = half_step(f, cost.mT, a.log(), eps)
    plan = a.unsqueeze(-1) * b.unsqueeze(-2) * ((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / epsilon).exp()
    if value == "entropic":
        dual = (a * f).sum(-1) + (b * g).sum(-1)
        return dual - epsilon * (plan.sum((-2, -1)) - a.sum(-1) * b.sum(-1))
    return ((rounded(plan, a, b) if value == "rounded" else plan) * cost).sum((-2, -1))


def off_constant(grad):
    """Weights sum to 1: a constant added to their gradient means nothing."""
    return grad - grad.mean(-1, keepdim=True)


def slope(function, at, direction, step=1e-4):
    """Central difference, of the fourth order, of ``function`` along ``direction``."""
    near, far = (function(at + h * direction) - function(at - h * direction) for h in (step, 2 * step))
    return (8 * near - far) / (12 * step)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("n_iters", [1, 2, 7])
def test_value_and_gradients_are_those_of_plain_autograd(value, n_iters):
    inputs = problem(3)
    x, y, a, b = inputs
    options = {"value": value, "gradient": "unrolled", "tolerance": 0, "max_iters": n_iters}
    out = sinkhorn(x, y, 0.3, a, b, **options)
    expected = by_autograd(x, y, 0.3, a, b, value, n_iters)
    assert out.n_iters == n_iters
    torch.testing.assert_close(out.value, expected, atol=1e-12, rtol=0)
    probe = torch.tensor([1.0, -2.0, 0.5], dtype=D)
    for grad, reference in zip(
        torch.autograd.grad(out.value @ probe, inputs),
        torch.autograd.grad(expected @ probe, inputs),
        strict=True,
    ):
        if grad.dim() == 2:
            grad, reference = off_constant(grad), off_constant(reference)
        torch.testing.assert_close(grad, reference, atol=1e-10, rtol=0)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_at_convergence_the_entropic_gradient_is_that_of_the_envelope(cost, batch):
    inputs = problem(*batch)
    x, y, a, b = inputs
    results = []
    for gradient in ("envelope", "unrolled"):
        out = sinkhorn(x, y, 0.5, a, b, cost, gradient=gradient, tolerance=1e-9)
        results.append((out, torch.autograd.grad(out.value.sum(), inputs)))
    (one, envelope), (two, unrolled) = results
    assert two.converged.all()
    torch.testing.assert_close(two.value, one.value, atol=1e-8, rtol=0)
    torch.testing.assert_close(two.plan(), one.plan(), atol=1e-8, rtol=0)
    for index, (grad, reference) in enumerate(zip(unrolled, envelope, strict=True)):
        if index > 1:
            grad, reference = off_constant(grad), off_constant(reference)
        torch.testing.assert_close(grad, reference, atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    "stop", [{"tolerance": 1e-11, "max_iters": 3_000}, {"tolerance": 0, "max_iters": 20}]
)
def test_the_gradient_matches_differences_at_convergence_and_short_of_it(value, cost, stop):
    x, y, a, b = (t.detach() for t in problem())
    epsilon = (
        0.5 if stop["tolerance"] else 0.1
    )  # after 20 iterations at 0.1 the rows are off by more than 1e-4

    def run(x, y, a, b):
        return sinkhorn(x, y, epsilon, a, b, cost, value=value, gradient="unrolled", **stop)

    error = run(x, y, a, b).marginal_error
    assert error <= 1e-11 if stop["tolerance"] else error > 1e-4
    inputs = [t.clone().requires_grad_() for t in (x, y, a, b)]
    grads = torch.autograd.grad(run(*inputs).value, inputs)
    rng = torch.Generator().manual_seed(3)
    for index, grad in enumerate(grads):
        move = torch.randn(grad.shape, dtype=D, generator=rng)
        if index > 1:
            move = off_constant(move) / 10

        def along(t, index=index):
            return run(*(t if k == index else other for k, other in enumerate((x, y, a, b)))).value

        expected = slope(along, (x, y, a, b)[index], move)
        torch.testing.assert_close((grad * move).sum(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("stop", [{"tolerance": 1e-10}, {"tolerance": 0, "max_iters": 3}])
def test_points_of_weight_zero_get_no_gradient_and_make_no_nan(value, stop):
    # Two masked points far out that coincide: nothing bounds their density.
    x = torch.tensor([[0.0], [1.0], [500.0]], dtype=D, requires_grad=True)
    y = torch.tensor([[0.2], [0.7], [500.0]], dtype=D, requires_grad=True)
    a = torch.tensor([0.4, 0.6, 0.0], dtype=D, requires_grad=True)
    b = torch.tensor([0.5, 0.5, 0.0], dtype=D, requires_grad=True)
    options = {"value": value, "gradient": "unrolled", **stop}
    out = sinkhorn(x, y, 0.1, a, b, **options)
    small = [t.detach()[:2].requires_grad_() for t in (x, y, a, b)]
    expected = sinkhorn(*small[:2], 0.1, *small[2:], **options)
    torch.testing.assert_close(out.value, expected.value, atol=1e-9, rtol=0)
    grads = torch.autograd.grad(out.value, (x, y, a, b))
    for grad, reference in zip(grads, torch.autograd.grad(expected.value, small), strict=True):
        assert grad.isfinite().all()
        difference = grad[:2] - reference
        if grad.dim() == 1:
            difference = off_constant(difference)
        torch.testing.assert_close(difference, torch.zeros_like(reference), atol=1e-7, rtol=0)
    assert grads[0][2] == grads[1][2] == 0


@pytest.mark.parametrize("gradient", ["envelope", "unrolled"])
def test_a_masked_density_that_overflows_makes_no_nan(gradient, monkeypatch):
    # After one cold iteration the potential of the masked point at 10 is off by ten thousand epsilons.
    monkeypatch.setattr(log_domain, "epsilon_schedule", lambda *args: [])
    x = torch.tensor([[0.0], [0.1], [10.0]], dtype=D, requires_grad=True)
    y = torch.tensor([[0.0], [10.0]], dtype=D, requires_grad=True)
    a = torch.tensor([0.25, 0.75, 0.0], dtype=D, requires_grad=True)
    for value in VALUES if gradient == "unrolled" else ["entropic"]:
        out = sinkhorn(x, y, 0.01, a, value=value, gradient=gradient, tolerance=0, max_iters=1)
        assert out.value.isfinite()
        for grad in torch.autograd.grad(out.value, (x, y, a)):
            assert grad.isfinite().all()


@pytest.mark.parametrize("value", ["entropic", "sharp"])
@pytest.mark.parametrize("stop", [{"tolerance": 1e-11}, {"tolerance": 0, "max_iters": 3}])
def test_a_weight_of_zero_has_the_gradient_of_giving_it_mass(value, stop):
    x, y = clouds(n=5, m=5)
    a = torch.tensor([0.3, 0.0, 0.2, 0.5, 0.0], dtype=D, requires_grad=True)
    for sides in (lambda w: (w, a.detach().flip(0)), lambda w: (a.detach().flip(0), w)):

        def run(w, sides=sides):
            return sinkhorn(x, y, 1.0, *sides(w), value=value, gradient="unrolled", **stop).value

        (grad,) = torch.autograd.grad(run(a), a)
        move = torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0], dtype=D)
        w, h = a.detach(), 1e-4  # one-sided, second order: there is nothing left of zero
        forward = (4 * run(w + h * move) - run(w + 2 * h * move) - 3 * run(w)) / (2 * h)
        torch.testing.assert_close(grad @ move, forward, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gradient", ["envelope", "unrolled"])
def test_a_tolerance_of_zero_is_exactly_that_many_iterations_and_no_warning(gradient):
    x, y = clouds()
    options = {"gradient": gradient, "tolerance": 0}
    few, more = (sinkhorn(x, y, 0.05, max_iters=k, **options) for k in (3, 8))
    assert more.n_iters - few.n_iters == 5
    # One point converges at once, with an error of 0 exactly: it goes on all the same.
    settled = sinkhorn(torch.zeros(1, 1, dtype=D), torch.zeros(1, 1, dtype=D), 1.0, max_iters=50, **options)
    assert (settled.n_iters, settled.marginal_error) == (50, 0)
    with pytest.warns(ConvergenceWarning, match=r"after .* iterations .* above the tolerance 1e-06"):
        sinkhorn(x, y, 0.05, gradient=gradient, max_iters=3)


def test_the_start_is_cold_and_the_columns_are_exact():
    (x, y), a, b = clouds(), weights(7), weights(9, seed=2)
    out = sinkhorn(x, y, 0.1, a, b, value="sharp", gradient="unrolled", tolerance=0, max_iters=1)
    kernel = (-torch.cdist(x, y).square() / 0.1).exp() * a.unsqueeze(-1) * b
    plan = kernel * (a / kernel.sum(-1)).unsqueeze(-1)
    plan = plan * (b / plan.sum(-2))
    torch.testing.assert_close(out.plan(), plan, atol=1e-12, rtol=0)
    torch.testing.assert_close(out.value, (plan * torch.cdist(x, y).square()).sum())
    error = (out.plan().sum(-1) - a).abs().sum()
    torch.testing.assert_close(out.marginal_error, error)
    assert not any(t.requires_grad for t in (out.f, out.g, out.plan(), out.marginal_error))


@pytest.mark.parametrize("value", VALUES)
def test_a_batch_is_a_loop(value):
    x, y = clouds(2, 3)
    a, epsilon = weights(2, 3, 7), torch.linspace(0.3, 3, 6, dtype=D).reshape(2, 3)
    options = {"value": value, "gradient": "unrolled", "tolerance": 0, "max_iters": 12}
    x.requires_grad_()
    out = sinkhorn(x, y, epsilon, a, **options)
    (grad,) = torch.autograd.grad(out.value.sum(), x)
    for i in range(2):
        for j in range(3):
            xi = x[i, j].detach().requires_grad_()
            one = sinkhorn(xi, y[i, j], epsilon[i, j].item(), a[i, j], **options)
            torch.testing.assert_close(out.value[i, j], one.value, atol=1e-12, rtol=0)
            torch.testing.assert_close(grad[i, j], torch.autograd.grad(one.value, xi)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("convention", ["feydy", "genevay"])
def test_self_terms_are_differentiated_through_both_arguments(value, convention):
    x, y, a, b = (t.detach() for t in problem())
    options = {"value": value, "gradient": "unrolled", "tolerance": 0, "max_iters": 6}

    def run(*inputs):
        x, y, a, b = inputs
        return sinkhorn_divergence(x, y, 0.3, a, b, debias="self", convention=convention, **options).value

    leaves = [t.clone().requires_grad_() for t in (x, y, a, b)]
    moves = (*clouds(seed=5), off_constant(weights(7, seed=6)), off_constant(weights(9, seed=7)))
    for index, grad in enumerate(torch.autograd.grad(run(*leaves), leaves)):

        def along(t, index=index):
            return run(*(t if k == index else other for k, other in enumerate((x, y, a, b))))

        expected = slope(along, (x, y, a, b)[index], moves[index])
        torch.testing.assert_close((grad * moves[index]).sum(), expected, atol=1e-7, rtol=1e-7)


def saved_bytes(n_iters, gradient, n=30, m=40, batch=2, dtype=D):
    """Bytes of all storages the graph keeps, each counted once."""
    x, y = (t.to(dtype).requires_grad_() for t in clouds(batch, n=n, m=m))
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = "sharp" if gradient == "unrolled" else "entropic"
        out = sinkhorn(x, y, 0.3, value=value, gradient=gradient, tolerance=0, max_iters=n_iters)
    assert out.value.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_the_graph_grows_by_two_potentials_an_iteration(dtype):
    sizes = [saved_bytes(k, "unrolled", dtype=dtype) for k in (5, 10, 20, 40)]
    per_iteration = 2 * (30 + 40) * dtype.itemsize
    assert [b - a for a, b in pairwise(sizes)] == [k * per_iteration for k in (5, 10, 20)]
    assert sizes[0] < 12 * 2 * 30 * 40 * dtype.itemsize  # and the constant is a few matrices


def test_the_graph_of_the_envelope_does_not_grow():
    assert saved_bytes(5, "envelope") == saved_bytes(40, "envelope")


def test_parameters_of_a_cost_get_their_gradient():
    x, y = clouds()
    scale = torch.tensor([1.0, 3.0], dtype=D, requires_grad=True)

    def run(scale):
        def cost(x, y):
            return (scale * (x.unsqueeze(1) - y)).square().sum(-1)

        return sinkhorn(
            x, y, 0.5, cost=cost, value="sharp", gradient="unrolled", tolerance=0, max_iters=4
        ).value

    (grad,) = torch.autograd.grad(run(scale), scale)
    move = torch.tensor([1.0, -0.5], dtype=D)
    torch.testing.assert_close(grad @ move, slope(run, scale.detach(), move), atol=1e-7, rtol=0)


def test_points_that_are_no_numbers_are_named():
    x, y = clouds()
    x[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"x, shape .* point 0\)"):
        sinkhorn(x, y, 0.5, gradient="unrolled", max_iters=10**9)  # the loop ends


def test_float32_agrees_with_float64():
    x, y = (t.float() for t in clouds(n=40, m=50))
    results = []
    for dtype in (torch.float32, D):
        points = x.to(dtype).requires_grad_()
        out = sinkhorn(
            points, y.to(dtype), 0.3, value="sharp", gradient="unrolled", tolerance=0, max_iters=50
        )
        assert out.value.dtype == dtype
        results.append((out.value.to(D), torch.autograd.grad(out.value, points)[0].to(D)))
    (value, grad), (true_value, true_grad) = results
    assert (value - true_value).abs() < 1e-5
    assert (grad - true_grad).norm() < 1e-3 * true_grad.norm()


def test_another_backend_cannot_be_unrolled(monkeypatch):
    from pyro_sinkhorn.ot.backends import BACKENDS

    monkeypatch.setitem(BACKENDS, "other", BACKENDS["log"])
    with pytest.raises(ValueError, match="backend is 'other' with gradient='unrolled'.*leave backend='auto'"):
        sinkhorn(*clouds(), 0.5, gradient="unrolled", backend="other")
