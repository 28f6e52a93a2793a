"""The records that travel between callers and backends: a batched, weighted problem and its solution."""

from __future__ import annotations

import math
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
    epsilon:    regularisation in units of the cost, ``(B,)``: all positive, or all 0 for exact assignments
    cost:       a name or a callable, see :mod:`pyro_sinkhorn.ot.cost`
    tolerance:  stop once the L1 error of the row marginals is below it, for every problem of the batch; 0 never stops
    max_iters:  iterations at most, and exactly where the tolerance is 0
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
    """Dual potentials of a :class:`Problem` and how they were reached.

    Nothing here carries a graph, but for the potentials of unrolled iterations.

    f, g:            potentials, ``(B, n)`` and ``(B, m)``, in units of the cost
    marginal_error:  L1 error of the row marginals of this very pair ``(B,)``; its columns are exact
    n_iters:         pairs of half-steps made, epsilon schedule included
    converged:       ``marginal_error <= tolerance``, ``(B,)``
    assignment:      where epsilon is 0, the point of y for each of x, ``(B, n)``
    """

    f: Tensor
    g: Tensor
    marginal_error: Tensor
    n_iters: int
    converged: Tensor
    assignment: Tensor | None = None


def without_masked(potential: Tensor, weights: Tensor) -> Tensor:
    r"""The potential with :math:`-\infty` at points of zero weight, whose density is then 0.

    No constraint bounds the density between two masked points: it may overflow, and 0 times infinity is NaN.
    """
    return potential.masked_fill(weights == 0, -torch.inf)


def largest_exponent(dtype: torch.dtype) -> float:
    """Densities at points of zero weight are cut at its exponential, whose square is still finite.

    >>> largest_exponent(torch.float32) < 45
    True
    """
    return math.log(torch.finfo(dtype).max) / 2
