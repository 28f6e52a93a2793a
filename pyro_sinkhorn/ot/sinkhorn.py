r"""Entropic optimal transport between two weighted clouds, differentiable in points and weights.

The value is the entropic one,

.. math:: \mathrm{OT}_\varepsilon
          = \min_{P\in\Pi(a,b)} \langle P, C\rangle + \varepsilon\,\mathrm{KL}(P\,\|\,a\otimes b)
          = \max_{f,g} \langle a,f\rangle + \langle b,g\rangle
            - \varepsilon\langle a\otimes b, e^{(f\oplus g-C)/\varepsilon} - 1\rangle,

so by the envelope theorem its gradients need no graph through the iterations: :math:`\partial C_{ij}=P_{ij}`,
:math:`\partial a_i=f_i`, :math:`\partial b_j=g_j`, exact at convergence (Cuturi 2013; Feydy et al. 2019).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_sinkhorn.ot.cost import Cost
from pyro_sinkhorn.ot.log_domain import solve_log_domain
from pyro_sinkhorn.ot.problem import ConvergenceWarning, Problem, Solution, plan, without_masked

Backend = Callable[[Problem], Solution]

#: Backends by name. *How* one executes a batch is its own affair; what it returns is a :class:`Solution`.
BACKENDS: dict[str, Backend] = {"log": solve_log_domain}


@dataclass(frozen=True)
class SinkhornResult:
    """What :func:`sinkhorn` returns. Batch dimensions of the clouds lead every field but ``n_iters``.

    value:           entropic transport cost, differentiable in points and weights
    f, g:            dual potentials in units of the cost, ``(n,)`` and ``(m,)``, detached
    marginal_error:  L1 error of the row marginals of the plan
    n_iters:         iterations made
    converged:       whether the error reached the tolerance
    """

    value: Tensor
    f: Tensor
    g: Tensor
    marginal_error: Tensor
    n_iters: int
    converged: Tensor
    _problem: Problem = field(repr=False)
    _solution: Solution = field(repr=False)
    _batch_shape: torch.Size = field(repr=False)

    def plan(self) -> Tensor:
        """The coupling, ``(n, m)``, detached; computed when asked for."""
        coupling = plan(self._problem, self._solution)
        return coupling.reshape(self._batch_shape + coupling.shape[-2:])


def sinkhorn(
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: Cost = "sqeuclidean",
    *,
    tolerance: float | None = None,
    max_iters: int = 2_000,
    backend: str = "log",
) -> SinkhornResult:
    r"""Entropic optimal transport from ``x`` to ``y``.

    :param x: points, ``(..., n, d)``; leading dimensions are a batch of independent problems
    :param y: points, ``(..., m, d)``
    :param epsilon: regularisation, absolute, in units of the cost: a number, or one per problem
    :param a: weights of ``x``, ``(..., n)``, rows summing to 1; uniform by default
    :param b: weights of ``y``, ``(..., m)``
    :param cost: ``"sqeuclidean"`` (:math:`\|x-y\|^2`, no ½), ``"euclidean"`` or a callable
        ``(n, d), (m, d) -> (n, m)``
    :param tolerance: L1 marginal error to stop at; 1e-6 by default in float64, 1e-4 in float32, whose
        rounding noise lies just below
    :param max_iters: iterations at most; a :class:`ConvergenceWarning` says when that was not enough
    :param backend: a name in :data:`BACKENDS`
    :returns: a :class:`SinkhornResult`
    :raises ValueError: for clouds, weights or an epsilon that make no transport problem

    >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    >>> out = sinkhorn(x, y, epsilon=0.01)
    >>> round(out.value.item(), 3)  # shifts every point by one, and pays log(2) * epsilon to be sharp
    1.007
    >>> [[round(p, 3) for p in row] for row in out.plan().tolist()]
    [[0.5, 0.0], [0.0, 0.5]]
    """
    problem, batch_shape = make_problem(x, y, epsilon, a, b, cost, tolerance, max_iters)
    solution = solve(problem, backend)
    value = entropic_value(problem, solution)

    def unbatch(t: Tensor) -> Tensor:
        return t.reshape(batch_shape + t.shape[1:])

    return SinkhornResult(
        value=unbatch(value),
        f=unbatch(solution.f),
        g=unbatch(solution.g),
        marginal_error=unbatch(solution.marginal_error),
        n_iters=solution.n_iters,
        converged=unbatch(solution.converged),
        _problem=problem,
        _solution=solution,
        _batch_shape=batch_shape,
    )


def solve(problem: Problem, backend: str = "log") -> Solution:
    """Run a backend, and warn where it stopped short of the tolerance."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: expected one of {sorted(BACKENDS)}")
    solution = BACKENDS[backend](problem)
    if not bool(solution.converged.all()):
        worst = float(solution.marginal_error.max())
        if not math.isnan(worst):  # NaN inputs are the caller's to report, with the name of their source
            warnings.warn(
                f"Sinkhorn stopped after {solution.n_iters} iterations with a marginal error of {worst:.2g}, "
                f"above the tolerance {problem.tolerance:.2g}: raise epsilon "
                f"(now {float(problem.epsilon.min()):.3g}), max_iters or the tolerance",
                ConvergenceWarning,
                stacklevel=3,
            )
    return solution


def entropic_value(problem: Problem, solution: Solution) -> Tensor:
    """The dual objective at the solution, ``(B,)``, differentiable in points and weights of the problem."""
    matrix = problem.cost_matrix
    return _DualValue.apply(matrix, problem.a, problem.b, solution.f, solution.g, problem.epsilon)


class _DualValue(torch.autograd.Function):
    """Dual objective with its envelope gradients. One pass over the plan serves value and backward."""

    @staticmethod
    def forward(
        ctx: Any, cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: Tensor
    ) -> Tensor:
        eps = epsilon[:, None, None]
        density = ((f.unsqueeze(-1) + without_masked(g, b).unsqueeze(-2) - cost) / eps).exp_()
        rows, columns = (density @ b.unsqueeze(-1)).squeeze(-1), (density.mT @ a.unsqueeze(-1)).squeeze(-1)
        columns = columns.masked_fill(b == 0, 1)  # the columns of a solution are exact
        total = (a * rows).masked_fill(a == 0, 0).sum(-1)
        if ctx.needs_input_grad[0]:
            coupling = density.mul_(a.unsqueeze(-1)).mul_(b.unsqueeze(-2))
        else:
            coupling = density.new_empty(0)
        # rows and columns are 1 up to the marginal error; keeping them makes this the exact gradient of the
        # value returned, converged or not.
        ctx.save_for_backward(
            coupling, f - epsilon[:, None] * (rows - 1), g - epsilon[:, None] * (columns - 1)
        )
        return (a * f).sum(-1) + (b * g).sum(-1) - epsilon * (total - a.sum(-1) * b.sum(-1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        coupling, grad_a, grad_b = ctx.saved_tensors
        grad = grad_outputs[0]
        need_cost, need_a, need_b = ctx.needs_input_grad[:3]
        return (
            grad[:, None, None] * coupling if need_cost else None,
            grad[:, None] * grad_a if need_a else None,
            grad[:, None] * grad_b if need_b else None,
            None,
            None,
            None,
        )


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
    x, y = check_clouds(x, y, cost)
    batch_shape = x.shape[:-2]
    eps = check_epsilon(epsilon, x).reshape(-1)
    weights_a, weights_b = check_weights(a, x, "a"), check_weights(b, y, "b")
    if max_iters < 1:
        raise ValueError(f"max_iters is {max_iters}: expected at least 1")
    if tolerance is None:
        tolerance = 1e-6 if x.dtype == torch.float64 else 1e-4
    flat_x, flat_y = x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:])
    flat_a, flat_b = weights_a.reshape(-1, x.shape[-2]), weights_b.reshape(-1, y.shape[-2])
    return Problem(flat_x, flat_y, flat_a, flat_b, eps, cost, tolerance, max_iters), batch_shape


def check_clouds(x: Tensor, y: Tensor, cost: Cost) -> tuple[Tensor, Tensor]:
    """Both clouds, expanded to common batch dimensions, or a ``ValueError`` that says why they are no problem."""
    x, y = check_cloud(x, "x"), check_cloud(y, "y")
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
    try:
        batch_shape = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}: "
            "their leading dimensions, a batch of problems, must broadcast"
        ) from None
    return x.expand(batch_shape + x.shape[-2:]), y.expand(batch_shape + y.shape[-2:])


def check_cloud(points: Tensor, name: str) -> Tensor:
    """A floating tensor ``(..., n, d)`` with at least one point, or a ``ValueError`` that says what it is."""
    if not isinstance(points, Tensor):
        raise ValueError(
            f"{name} is a {type(points).__name__}: expected a tensor of points, shape (..., n, d)"
        )
    if points.dim() < 2 or points.shape[-2] == 0 or points.shape[-1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(points.shape)}: expected (..., n, d) with n and d at least 1"
        )
    if not points.is_floating_point():
        raise ValueError(
            f"{name} is {points.dtype}: expected floating points; convert with .float() or .double()"
        )
    return points


def check_epsilon(epsilon: float | Tensor, points: Tensor) -> Tensor:
    """One positive epsilon for every problem of the batch of ``points``."""
    eps = torch.as_tensor(epsilon, dtype=points.dtype, device=points.device).detach()
    if not bool((eps > 0).all()) or not bool(eps.isfinite().all()):
        raise ValueError(f"epsilon is {epsilon}: expected a positive finite number, in units of the cost")
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
