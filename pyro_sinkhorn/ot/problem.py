"""The records that travel between callers and backends: a batched, weighted problem and its solution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

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
    symmetric:  ``y`` is ``x`` and ``b`` is ``a``, and the cost is conditionally negative definite, so that one
                potential serves both sides and the relaxed symmetric iteration applies
    uniform:    no weight was given, so that none needs be looked at
    start:      potentials ``(f, g)`` to begin at, in units of the cost; a backend has its own beginning without
    """

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    epsilon: Tensor
    cost: Cost = "sqeuclidean"
    tolerance: float = 1e-6
    max_iters: int = 2_000
    symmetric: bool = False
    uniform: bool = False
    start: tuple[Tensor, Tensor] | None = None

    @cached_property
    def exact(self) -> bool:
        """Whether epsilon is 0: an assignment."""
        return bool((self.epsilon == 0).any())

    @cached_property
    def cost_matrix(self) -> Tensor:
        """``(B, n, m)``, differentiable in the points. A backend that never needs it whole does not pay for it."""
        with torch.enable_grad():  # a backend asks for it under no_grad, the value then needs its graph
            return cost_matrix(self.cost, self.x, self.y)


class Coupling(Protocol):
    r"""The plan :math:`P_{ij} = a_i b_j e^{(f_i+g_j-C_{ij})/\varepsilon}` of a solution, as what is asked of it.

    With products alone a backend need not hold the matrix: they give the value of a squared Euclidean problem and its
    gradients. Entries of masked points (weight zero) are exactly 0.
    """

    def product(self, values: Tensor) -> Tensor:
        """``P @ values``: ``(B, m, k)`` to ``(B, n, k)``."""
        ...

    def transposed_product(self, values: Tensor) -> Tensor:
        """``P.mT @ values``: ``(B, n, k)`` to ``(B, m, k)``."""
        ...

    def matrix(self) -> Tensor:
        """The plan itself, ``(B, n, m)``: for costs whose gradient needs every entry."""
        ...


@dataclass(frozen=True)
class Solution:
    """Dual potentials of a :class:`Problem` and how they were reached.

    Nothing here carries a graph, but for the potentials of unrolled iterations. Potentials at points of zero weight
    are finite: their half-step from the other side.

    f, g:            potentials, ``(B, n)`` and ``(B, m)``, in units of the cost
    marginal_error:  L1 error of the row marginals of this very pair ``(B,)``; its columns are exact, but for a symmetric
                     problem, whose two marginals are one, and where rounding leaves them further off than the rows
    n_iters:         pairs of half-steps made, epsilon schedule included
    converged:       ``marginal_error <= tolerance``, ``(B,)``
    assignment:      where epsilon is 0, the point of y for each of x, ``(B, n)``
    coupling:        the plan of this pair of potentials, where the backend has one at hand; None leaves it to be computed
                     from the cost matrix
    """

    f: Tensor
    g: Tensor
    marginal_error: Tensor
    n_iters: int
    converged: Tensor
    assignment: Tensor | None = None
    coupling: Coupling | None = None


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


def ceiling(a: Tensor) -> Tensor:
    """Largest exponents, ``(B, n, 1)``: infinite but for masked rows, whose density nothing bounds short of convergence.

    It may overflow, and weight 0 times infinity is NaN. Columns are exact and need no bound.
    """
    return torch.full_like(a, torch.inf).masked_fill(a == 0, largest_exponent(a.dtype)).unsqueeze(-1)
