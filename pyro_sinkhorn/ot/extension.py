r"""Potentials beyond the points they were solved at, and what it costs to move a point there.

A potential extends to any place by one more half-step,

.. math:: f(x) = -\varepsilon\log\sum_j b_j\, e^{(g_j - c(x, y_j))/\varepsilon},

and is the first variation of transport in its first law: moving mass :math:`w` from :math:`x` to :math:`x'` changes
:math:`\mathrm{OT}_\varepsilon` by :math:`w\,(f(x') - f(x)) + O(w^2)` (Feydy et al. 2019, proposition 2). So the states
that a datum was *not* drawn to be in have a price too, which is the gradient to their probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sinkhorn.ot.cost import Cost, cost_matrix


@torch.no_grad()
def extended_potential(
    places: Tensor, y: Tensor, b: Tensor, g: Tensor, epsilon: Tensor, cost: Cost = "sqeuclidean"
) -> Tensor:
    r"""The potential of the first law at other places.

    :param places: ``(..., k, d)``
    :param y: points of the second law, ``(..., m, d)``
    :param b: its weights, ``(..., m)``
    :param g: its potential, ``(..., m)``
    :param epsilon: as solved with, one number a problem ``(...)``; 0 is the transform
        :math:`\min_j c(x, y_j) - g_j` of exact transport
    :returns: ``(..., k)``, detached

    >>> x, y = torch.randn(2, 1, 20, 2)
    >>> from pyro_sinkhorn.ot import sinkhorn
    >>> out, b = sinkhorn(x, y, 1.0), torch.full((1, 20), 1 / 20)
    >>> f = extended_potential(x, y, b, out.g, torch.ones(1))
    >>> bool(torch.allclose(f, out.f, atol=1e-3))  # where the potential was solved, it is the same
    True
    """
    batch = torch.broadcast_shapes(places.shape[:-2], y.shape[:-2])
    places, y = (t.expand(*batch, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (places, y))
    b, g = (t.expand(*batch, t.shape[-1]).reshape(-1, t.shape[-1]) for t in (b, g))
    epsilon = epsilon.expand(batch).reshape(-1, 1, 1)
    reduced = g.unsqueeze(-2) - cost_matrix(cost, places, y)
    if bool((epsilon == 0).all()):
        found = -reduced.masked_fill(b.unsqueeze(-2) == 0, -torch.inf).amax(-1)
    else:
        found = -epsilon[..., 0] * (reduced / epsilon + b.log().unsqueeze(-2)).logsumexp(-1)
    return found.reshape(*batch, -1)


class Moves:
    """Sums what every transport problem of a divergence says of moving points of ``x`` to their candidates.

    :param candidates: ``(..., k, s, d)``, or None for nothing to sum
    :param weights: of the points, ``(..., k)``
    """

    def __init__(self, candidates: Tensor | None, weights: Tensor, epsilon: Tensor, cost: Cost) -> None:
        self.candidates, self.weights, self.epsilon, self.cost = candidates, weights, epsilon, cost
        self.sum: Tensor | float = 0.0

    def add(self, factor: float, y: Tensor, b: Tensor, g: Tensor) -> None:
        """A problem against ``y``, with a factor."""
        if self.candidates is None:
            return
        k, s = self.candidates.shape[-3:-1]
        potential = extended_potential(self.candidates.flatten(-3, -2), y, b, g, self.epsilon, self.cost)
        self.sum = self.sum + factor * potential.unflatten(-1, (k, s))

    def total(self, scale: float) -> Tensor | None:
        """``(..., k, s)``, times the weight of the point."""
        if self.candidates is None:
            return None
        return scale * self.weights.detach().unsqueeze(-1) * torch.as_tensor(self.sum)
