"""What a public function of this package is given: checked, in words where it makes no problem, and made a batch."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyro_sinkhorn.ot.cost import Cost
from pyro_sinkhorn.ot.problem import Problem

#: Costs whose kernel exp(-C / epsilon) is positive definite, so that a cloud meets itself in symmetric steps.
NEGATIVE_DEFINITE = ("sqeuclidean", "euclidean", "l1")

Value = Literal["entropic", "sharp", "rounded"]
Gradient = Literal["envelope", "unrolled"]


def make_problem(
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    a: Tensor | None,
    b: Tensor | None,
    cost: Cost,
    tolerance: float | None,
    max_iters: int,
) -> tuple[Problem, torch.Size]:
    """Check the inputs of a public function and flatten their batch dimensions into one."""
    symmetric = x is y and a is b
    x, y = check_clouds(x, y, cost)
    eps = check_epsilon(epsilon, x)
    weights_a, weights_b = check_weights(a, x, "a"), check_weights(b, y, "b")
    tolerance = check_stopping(tolerance, max_iters, x.dtype)
    problem = flat_problem(
        x, y, weights_a, weights_b, eps, cost, tolerance, max_iters, a is None and b is None, symmetric
    )
    return problem, x.shape[:-2]


def flat_problem(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    cost: Cost,
    tolerance: float,
    max_iters: int,
    uniform: bool,
    symmetric: bool = False,
) -> Problem:
    """The problem of parts that were checked and have all batch dimensions, flattened into one.

    :param symmetric: ``y`` is ``x`` and ``b`` is ``a``
    """
    x, a = x.reshape(-1, *x.shape[-2:]), a.reshape(-1, a.shape[-1])
    symmetric = symmetric and cost in NEGATIVE_DEFINITE
    if symmetric:
        y, b = x, a
    else:
        y, b = y.reshape(-1, *y.shape[-2:]), b.reshape(-1, b.shape[-1])
    return Problem(x, y, a, b, epsilon.reshape(-1), cost, tolerance, max_iters, symmetric, uniform)


def check_stopping(tolerance: float | None, max_iters: int, dtype: torch.dtype) -> float:
    """The tolerance to stop at, with its default."""
    if max_iters < 1:
        raise ValueError(f"max_iters is {max_iters}: expected at least 1")
    if tolerance is None:
        return 1e-6 if dtype == torch.float64 else 1e-4
    if not tolerance >= 0:
        raise ValueError(
            f"tolerance is {tolerance}: expected a marginal error of at least 0, or 0 for exactly max_iters iterations"
        )
    return tolerance


def check_clouds(x: Tensor, y: Tensor, cost: Cost) -> tuple[Tensor, Tensor]:
    """Both clouds, expanded to common batch dimensions, or a ``ValueError`` that says why they are no problem."""
    x, y = check_cloud(x, "x"), check_cloud(y, "y")
    if cost == "geodesic":
        _check_unit_vectors(x, "x")
        _check_unit_vectors(y, "y")
    if x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device} and y is {y.dtype} on {y.device}: "
            "move both clouds to one dtype and device"
        )
    if isinstance(cost, str) and x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}: "
            "the last dimension, that of the space, must agree"
        )
    if x.shape[:-2] == y.shape[:-2]:
        return x, y
    try:
        batch_shape = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}: "
            "their leading dimensions, a batch of problems, must broadcast"
        ) from None
    return x.expand(batch_shape + x.shape[-2:]), y.expand(batch_shape + y.shape[-2:])


def check_cloud(points: Tensor, name: str) -> Tensor:
    """A tensor ``(..., n, d)`` with at least one point, in float32 or float64, or a ``ValueError`` that says what it is."""
    if not isinstance(points, Tensor):
        raise ValueError(
            f"{name} is a {type(points).__name__}: expected a tensor of points, shape (..., n, d)"
        )
    if points.dim() < 2 or points.shape[-2] == 0 or points.shape[-1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(points.shape)}: expected (..., n, d) with n and d at least 1"
        )
    if points.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(points.shape)}, a batch of no problems: leave the call out for an empty batch"
        )
    if not points.is_floating_point():
        raise ValueError(
            f"{name} is {points.dtype}: expected floating points; convert with .float() or .double()"
        )
    return _at_least_single(points)


def _at_least_single(t: Tensor) -> Tensor:
    """In float32 where it has half the digits or fewer: too few for the exponents of a plan. Autocast makes such points."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def _check_unit_vectors(points: Tensor, name: str) -> None:
    lengths = torch.linalg.vector_norm(points.detach(), dim=-1)
    if bool(((lengths - 1).abs() > 1e-2).any()):  # NaN passes: it is named later, with its point
        raise ValueError(
            f"{name} has vectors of lengths {float(lengths.min()):.3g} to {float(lengths.max()):.3g}: the cost 'geodesic' is "
            "between unit vectors; divide them by their lengths, or take another cost"
        )


def check_epsilon(epsilon: float | Tensor, points: Tensor) -> Tensor:
    """One epsilon for every problem of the batch of ``points``: all positive, or all 0 for exact assignments."""
    limits = torch.finfo(points.dtype)
    if (
        isinstance(epsilon, float) and limits.tiny <= epsilon <= limits.max
    ):  # the common case, without looking at a tensor
        return points.new_full(points.shape[:-2], epsilon)
    exact = (
        torch.float64 if isinstance(epsilon, (int, float)) else None
    )  # a number is not rounded to the default dtype
    given = torch.as_tensor(epsilon, dtype=exact, device=points.device).detach()
    if not bool((given >= 0).all()) or not bool(given.isfinite().all()):
        raise ValueError(
            f"epsilon is {epsilon}: expected a positive finite number, in units of the cost, "
            "or 0 for the exact assignment"
        )
    # Below the smallest normal number there are few digits, and one over it is infinite.
    if bool(((given > 0) & ((given < limits.tiny) | (given > limits.max))).any()):
        raise ValueError(
            f"epsilon is {epsilon}, out of the range of {points.dtype}, {limits.tiny:.3g} to {limits.max:.3g}: give exactly 0 "
            "for the assignment, divide the points by their scale and epsilon by that of the cost, or give float64"
        )
    eps = given.to(points.dtype)
    if bool((eps == 0).any()) and bool((eps > 0).any()):
        raise ValueError(
            f"epsilon is {epsilon}: expected all problems of a batch to be exact (0) or all to be regularised "
            "(positive): call once for each kind"
        )
    try:
        return eps.expand(points.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"epsilon has shape {tuple(eps.shape)}: expected a number, or one for each problem of the batch "
            f"{tuple(points.shape[:-2])}"
        ) from None


def check_weights(w: Tensor | None, points: Tensor, name: str) -> Tensor:
    """Weights of ``points``, summing to 1; ``points`` already has the batch dimensions of the problem."""
    shape = points.shape[:-1]
    if w is None:
        return points.new_full(shape, 1 / shape[-1])
    if w.shape[-1:] != shape[-1:]:
        raise ValueError(
            f"the weights {name} have shape {tuple(w.shape)}: expected (..., {shape[-1]}), one a point"
        )
    w = _at_least_single(w)
    if w.dtype != points.dtype or w.device != points.device:
        raise ValueError(
            f"the weights {name} are {w.dtype} on {w.device}: expected {points.dtype} on {points.device}"
        )
    try:
        w = w.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"the weights {name} have shape {tuple(w.shape)}: expected it to broadcast to {tuple(shape)}"
        ) from None
    total = w.detach().sum(-1, keepdim=True)
    if bool((w.detach() < 0).any()) or not torch.allclose(total, torch.ones_like(total), atol=1e-4, rtol=0):
        raise ValueError(
            f"the weights {name} must be nonnegative and sum to 1; their sum is {total.squeeze(-1).tolist()}"
        )
    # The rounding left in the sum would be a floor of the marginal error. It is divided out detached, so that
    # the gradient stays the potential.
    return w / total


def check_variant(value: str, gradient: str) -> None:
    """Names of a value and of a gradient that exist."""
    if value not in get_args(Value):
        raise ValueError(f"value is {value!r}: expected one of {list(get_args(Value))}")
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient is {gradient!r}: expected one of {list(get_args(Gradient))}")


def check_envelope(value: Value, problem: Problem) -> None:
    """Refuse the envelope gradient of a value that is no minimum; without gradients there is nothing to refuse."""
    if value == "entropic" or not torch.is_grad_enabled():
        return
    # A cost with parameters carries a gradient where no point does.
    inputs = (problem.x, problem.y, problem.a, problem.b, problem.cost_matrix)
    if any(t.requires_grad for t in inputs):
        raise ValueError(
            f"value={value!r} with gradient='envelope' would be a wrong gradient: the envelope theorem leaves out "
            "how the plan moves, which costs nothing at the minimum that the entropic value is, and <P, C> is none. "
            f"Take value='entropic' with gradient='envelope', or value={value!r} with gradient='unrolled'; "
            "without a gradient (torch.no_grad(), or detached inputs) this value is computed as asked"
        )


def check_assignment(problem: Problem, gradient: Gradient) -> None:
    """Equal sizes, uniform weights and no iterations to unroll: what epsilon = 0 needs."""
    n, m = problem.a.shape[-1], problem.b.shape[-1]
    instead = "or give a small positive epsilon (POT's ot.emd solves the general exact problem)"
    if gradient == "unrolled":
        raise ValueError(
            "gradient is 'unrolled' at epsilon 0, where the assignment is exact and there is no iteration to "
            "differentiate: leave gradient='envelope', which is exact there for every value, or raise epsilon"
        )
    if n != m:
        raise ValueError(
            f"epsilon is 0 for clouds of {n} and {m} points: the exact assignment needs equal sizes; "
            f"take equally many points of both, {instead}"
        )
    for name, w in (("a", problem.a), ("b", problem.b)):
        # Weights that were normalised by a sum of n rounded numbers are uniform up to that sum's rounding.
        if bool(((w.detach() * n - 1).abs() > 1e3 * math.sqrt(n) * torch.finfo(w.dtype).eps).any()):
            raise ValueError(
                f"epsilon is 0 with weights {name} between {float(w.min()):.3g} and {float(w.max()):.3g}: the exact "
                f"assignment needs uniform weights, here 1/{n}; leave {name} out, {instead}"
            )


def check_start(
    start: Any, problem: Problem, batch_shape: torch.Size, gradient: Gradient
) -> tuple[Tensor, Tensor]:
    """Potentials of a result to begin at, flattened to the batch of the problem."""
    if problem.exact or gradient == "unrolled":
        raise ValueError(
            f"start was given with epsilon {float(problem.epsilon.max()):.3g} and gradient={gradient!r}: only iterations with "
            "gradient='envelope' and a positive epsilon begin anywhere else than they always do; leave start out"
        )
    f, g = getattr(start, "f", None), getattr(start, "g", None)
    if not isinstance(f, Tensor) or not isinstance(g, Tensor):
        raise ValueError(f"start is a {type(start).__name__}: expected a result of sinkhorn")
    expected = [(*batch_shape, w.shape[-1]) for w in (problem.a, problem.b)]
    if [tuple(f.shape), tuple(g.shape)] != expected:
        raise ValueError(
            f"start has potentials of shape {tuple(f.shape)} and {tuple(g.shape)}: expected those of a result between "
            f"clouds of these shapes, {expected[0]} and {expected[1]}"
        )
    return f.to(problem.a).reshape(problem.a.shape), g.to(problem.b).reshape(problem.b.shape)
