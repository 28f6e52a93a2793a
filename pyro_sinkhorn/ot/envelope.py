r"""The entropic value at a solution, and its gradient by the envelope theorem.

The dual objective

.. math:: D(f, g) = \langle a,f\rangle + \langle b,g\rangle
          - \varepsilon\langle a\otimes b, e^{(f\oplus g-C)/\varepsilon} - 1\rangle

has no slope in the potentials at its maximum, so what is left is its partial derivatives,

.. math:: \partial_{C_{ij}} = P_{ij}, \qquad
          \partial_{a_i} = f_i - \varepsilon\bigl(\textstyle\sum_j b_j e^{(f_i+g_j-C_{ij})/\varepsilon} - 1\bigr),

all of them exact for the value returned, converged or not. For :math:`C_{ij}=\|x_i-y_j\|^2` no matrix is in the graph,
and each cloud's slope is taken after its own half-step, which makes its marginal exact,

.. math:: \partial_{x_i} = 2 a_i\,\bigl(x_i - \textstyle\sum_j P_{ij}\,y_j / \sum_j P_{ij}\bigr):

the same at convergence, and nearer to it short of that, since the marginal error itself would push every point along its
own position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_sinkhorn.ot.first_derivative import first_derivative
from pyro_sinkhorn.ot.problem import Coupling, Problem, Solution, ceiling, without_masked


def entropic_value(problem: Problem, solution: Solution) -> Tensor:
    """The dual objective at the solution, ``(B,)``, differentiable in points and weights of the problem."""
    coupling = solution.coupling
    if coupling is not None and problem.cost == "sqeuclidean":
        return _SquaredValue.apply(
            problem.x,
            problem.y,
            problem.a,
            problem.b,
            solution.f,
            solution.g,
            problem.epsilon,
            coupling,
            problem.symmetric,
        )
    matrix = problem.cost_matrix
    return _DualValue.apply(matrix, problem.a, problem.b, solution.f, solution.g, problem.epsilon, coupling)


class _SquaredValue(torch.autograd.Function):
    """Of squared Euclidean problems whose plan is at hand as products: nothing ``n x m`` is kept for the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        f: Tensor,
        g: Tensor,
        epsilon: Tensor,
        coupling: Coupling,
        symmetric: bool,
    ) -> Tensor:
        need_x, need_y, need_a, need_b = ctx.needs_input_grad[:4]
        # Differences of nearby points far from the origin lose digits: both clouds are taken about one centre.
        centre = x.mean(-2, keepdim=True)
        rows, grad_x = _marginal(coupling.product, x, y, a, centre, need_x or (symmetric and need_y))
        if symmetric:
            columns, grad_y = rows, grad_x
        elif need_y or need_b:
            columns, grad_y = _marginal(coupling.transposed_product, y, x, b, centre, need_y)
        else:
            columns, grad_y = b, None
        value = (a * f).sum(-1) + (b * g).sum(-1) - epsilon * (rows.sum(-1) - a.sum(-1) * b.sum(-1))
        ctx.save_for_backward(
            grad_x if need_x else None,
            grad_y if need_y else None,
            _weight_slope(f, rows, a, epsilon) if need_a else None,
            _weight_slope(g, columns, b, epsilon) if need_b else None,
        )
        return value

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        slopes = ctx.saved_tensors
        return (
            *(
                None if slope is None else grad.reshape(-1, *[1] * (slope.dim() - 1)) * slope
                for slope in slopes
            ),
            *(None,) * 5,
        )


def _marginal(
    product: Any, mine: Tensor, other: Tensor, weights: Tensor, centre: Tensor, need_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Sums of the plan over the other cloud, ``(B, n)``, and the slope in my points, ``(B, n, d)``."""
    ones = other.new_ones(*other.shape[:-1], 1)
    if not need_gradient:
        return product(ones).squeeze(-1), None
    sums = product(torch.cat([other - centre, ones], -1))
    total = sums[..., -1:]
    # A masked point has no mass to move; the tiny number keeps its 0 / 0 away.
    mean = sums[..., :-1] / total.clamp_min(torch.finfo(total.dtype).tiny)
    return total.squeeze(-1), (mine - centre - mean) * (2 * weights.unsqueeze(-1))


def _weight_slope(potential: Tensor, sums: Tensor, weights: Tensor, epsilon: Tensor) -> Tensor:
    """In the weights. The potential at a masked point is its half-step, whose density sums to 1."""
    density = (sums / weights).masked_fill(weights == 0, 1)
    return potential - epsilon[:, None] * (density - 1)


class _DualValue(torch.autograd.Function):
    """Of any cost, through its matrix. One pass over the plan serves value and backward.

    Unrolled potentials carry a graph: for them the slopes in f and g are there too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        cost: Tensor,
        a: Tensor,
        b: Tensor,
        f: Tensor,
        g: Tensor,
        epsilon: Tensor,
        coupling: Coupling | None,
    ) -> Tensor:
        if coupling is None:
            eps = epsilon[:, None, None]
            density = (f.unsqueeze(-1) + without_masked(g, b).unsqueeze(-2) - cost) / eps
            density = density.clamp_max_(ceiling(a)).exp_()
            rows, columns = (
                (density @ b.unsqueeze(-1)).squeeze(-1),
                (density.mT @ a.unsqueeze(-1)).squeeze(-1),
            )
            plan = density.mul_(a.unsqueeze(-1)).mul_(b.unsqueeze(-2)) if ctx.needs_input_grad[0] else None
        else:
            plan = coupling.matrix()
            rows, columns = plan.sum(-1) / a, plan.sum(-2) / b
            rows = rows.masked_fill(a == 0, 1)
        columns = columns.masked_fill(b == 0, 1)  # the columns of a solution are exact
        total = (a * rows).masked_fill(a == 0, 0).sum(-1)
        # rows and columns are 1 up to the marginal error; keeping them makes this the exact gradient of the
        # value returned, converged or not.
        ctx.save_for_backward(
            plan if ctx.needs_input_grad[0] else None,
            f - epsilon[:, None] * (rows - 1),
            g - epsilon[:, None] * (columns - 1),
            (a * (1 - rows)).masked_fill(a == 0, 0) if ctx.needs_input_grad[3] else None,
            b * (1 - columns) if ctx.needs_input_grad[4] else None,
        )
        return (a * f).sum(-1) + (b * g).sum(-1) - epsilon * (total - a.sum(-1) * b.sum(-1))

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        plan, *vectors = ctx.saved_tensors
        grad = grad_outputs[0]
        needed = ctx.needs_input_grad
        return (
            grad[:, None, None] * plan if needed[0] else None,
            *(grad[:, None] * v if need else None for v, need in zip(vectors, needed[1:5], strict=True)),
            None,
            None,
        )
