"""The records that travel between callers and backends: a batched, weighted problem and its solution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_sinkhorn.ot.cost import Cost, cost_matrix


class ConvergenceWarning(RuntimeWarning):
    """The solver stopped at ``max_iters`` before the marginal error reached ``tolerance``."""


@dataclass(frozen=True)
class Problem:
    """A batch of ``B`` entropic transport problems of equal sizes.

    x, y:       points, ``(B, n, d)`` and ``(B, m, d)``; they may carry gradients
    a, b:       weights, ``(B, n)`` and ``(B, m)``, rows summing to 1; zeros are allowed (masked points)
    epsilon:    regularisation in units of the cost, ``(B,)``, positive
    cost:       a name or a callable, see :mod:`pyro_sinkhorn.ot.cost`
    tolerance:  stop once the L1 error of the row marginals is below it, for every problem of the batch
    max_iters:  stop there in any case
    """

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    epsilon: Tensor
    cost: Cost = "sqeuclidean"
    tolerance: float = 1e-6
    max_iters: int = 2_000

    @cached_property
    def cost_matrix(self) -> Tensor:
        """``(B, n, m)``, differentiable in the points. A backend that never needs it whole does not pay for it."""
        with torch.enable_grad():  # a backend asks for it under no_grad, the value then needs its graph
            return cost_matrix(self.cost, self.x, self.y)


@dataclass(frozen=True)
class Solution:
    """Dual potentials of a :class:`Problem` and how they were reached; nothing here carries a graph.

    f, g:            potentials, ``(B, n)`` and ``(B, m)``, in units of the cost
    marginal_error:  L1 error of the row marginals of this very pair ``(B,)``; its columns are exact
    n_iters:         pairs of half-steps made, epsilon schedule included
    converged:       ``marginal_error <= tolerance``, ``(B,)``
    """

    f: Tensor
    g: Tensor
    marginal_error: Tensor
    n_iters: int
    converged: Tensor


def plan(problem: Problem, solution: Solution) -> Tensor:
    r"""The coupling :math:`P_{ij} = a_i b_j \exp((f_i+g_j-C_{ij})/\varepsilon)`, ``(B, n, m)``, detached."""
    with torch.no_grad():
        f, g = without_masked(solution.f, problem.a), without_masked(solution.g, problem.b)
        exponent = f.unsqueeze(-1) + g.unsqueeze(-2) - problem.cost_matrix
        density = (exponent / problem.epsilon[:, None, None]).exp()
        return problem.a.unsqueeze(-1) * problem.b.unsqueeze(-2) * density


def without_masked(potential: Tensor, weights: Tensor) -> Tensor:
    r"""The potential with :math:`-\infty` at points of zero weight, whose density is then 0.

    No constraint bounds the density between two masked points: it may overflow, and 0 times infinity is NaN.
    """
    return potential.masked_fill(weights == 0, -torch.inf)
