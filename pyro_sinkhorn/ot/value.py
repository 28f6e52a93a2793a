r"""What is reported of a plan: three values of one solution.

============  =========================================  ====================================================
``entropic``  :math:`\langle P,C\rangle                  the objective of the solver, as its dual: the
              + \varepsilon\,\mathrm{KL}(P\|a\otimes b)` envelope theorem gives its gradient
``sharp``     :math:`\langle P,C\rangle`                 Cuturi 2013; Genevay, Peyré and Cuturi 2018
``rounded``   :math:`\langle\mathrm{round}(P),C\rangle`  at least the exact cost, see
                                                         :mod:`pyro_sinkhorn.ot.rounding`
============  =========================================  ====================================================

Potentials that carry a graph (:mod:`pyro_sinkhorn.ot.unrolled`) pass it on to any of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_sinkhorn.ot.checks import Value
from pyro_sinkhorn.ot.problem import Problem, Solution, largest_exponent, without_masked
from pyro_sinkhorn.ot.rounding import rounded


def value_of(problem: Problem, solution: Solution, value: Value) -> Tensor:
    """The chosen value of a solution, ``(B,)``."""
    if solution.assignment is not None:
        return assigned_value(problem, solution, solution.assignment)
    if value == "entropic":
        return entropic_value(problem, solution)
    coupling = coupling_of(problem, solution)
    if value == "rounded":
        coupling = rounded(coupling, problem.a, problem.b)
    return (coupling * problem.cost_matrix).sum((-2, -1))


def plan(problem: Problem, solution: Solution) -> Tensor:
    """The coupling, ``(B, n, m)``, detached."""
    with torch.no_grad():
        if solution.assignment is None:
            return coupling_of(problem, solution)
        n = problem.a.shape[-1]
        empty = problem.cost_matrix.new_zeros(len(problem.a), n, n)
        return empty.scatter_(-1, solution.assignment.unsqueeze(-1), 1 / n)


def coupling_of(problem: Problem, solution: Solution) -> Tensor:
    r""":math:`P_{ij} = a_i b_j \exp((f_i+g_j-C_{ij})/\varepsilon)`, ``(B, n, m)``, with the graph of its parts."""
    exponent = solution.f.unsqueeze(-1) + solution.g.unsqueeze(-2) - problem.cost_matrix
    density = torch.minimum(exponent / problem.epsilon[:, None, None], _ceiling(problem.a)).exp()
    return problem.a.unsqueeze(-1) * problem.b.unsqueeze(-2) * density


def _ceiling(a: Tensor) -> Tensor:
    """Largest exponents, ``(B, n, 1)``: infinite but for masked rows, whose density nothing bounds short of convergence.

    It may overflow, and weight 0 times infinity is NaN. Columns are exact and need no bound.
    """
    return torch.full_like(a, torch.inf).masked_fill(a == 0, largest_exponent(a.dtype)).unsqueeze(-1)


def assigned_value(problem: Problem, solution: Solution, chosen: Tensor) -> Tensor:
    """The mean cost of an assignment, whose gradients are the plan and, in the weights, the potentials."""
    paid = problem.cost_matrix.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).mean(-1)
    for w, potential in ((problem.a, solution.f), (problem.b, solution.g)):
        if w.requires_grad:
            paid = paid + ((w - w.detach()) * potential).sum(-1)
    return paid


def entropic_value(problem: Problem, solution: Solution) -> Tensor:
    """The dual objective at the solution, ``(B,)``, differentiable in points and weights of the problem."""
    matrix = problem.cost_matrix
    return _DualValue.apply(matrix, problem.a, problem.b, solution.f, solution.g, problem.epsilon)


class _DualValue(torch.autograd.Function):
    """Dual objective with all its partial derivatives. One pass over the plan serves value and backward.

    Those in the potentials vanish at convergence: without a graph behind f and g, the rest is the envelope gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: Tensor
    ) -> Tensor:
        eps = epsilon[:, None, None]
        density = (f.unsqueeze(-1) + without_masked(g, b).unsqueeze(-2) - cost) / eps
        density = density.clamp_max_(_ceiling(a)).exp_()
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
            coupling,
            f - epsilon[:, None] * (rows - 1),
            g - epsilon[:, None] * (columns - 1),
            (a * (1 - rows)).masked_fill(a == 0, 0) if ctx.needs_input_grad[3] else density.new_empty(0),
            b * (1 - columns) if ctx.needs_input_grad[4] else density.new_empty(0),
        )
        return (a * f).sum(-1) + (b * g).sum(-1) - epsilon * (total - a.sum(-1) * b.sum(-1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        coupling, *vectors = ctx.saved_tensors
        grad = grad_outputs[0]
        needed = ctx.needs_input_grad
        return (
            grad[:, None, None] * coupling if needed[0] else None,
            *(grad[:, None] * v if need else None for v, need in zip(vectors, needed[1:5], strict=True)),
            None,
        )
