r"""Exponents of the plan, in base 2.

With :math:`\varphi = f \log_2 e/\varepsilon` and :math:`\gamma = g \log_2 e/\varepsilon`, the density of the plan is

.. math:: P_{ij} / (a_i b_j) = 2^{\varphi_i + \gamma_j - s\,C_{ij}}, \qquad s = \log_2 e/\varepsilon.

Base 2 because ``torch.exp2`` is the faster by far on a processor. For the squared Euclidean cost
the matrix :math:`C` is never formed: one product of points with their biases appended,

.. math:: \bigl(2s x_i,\; \varphi_i - s\|x_i\|^2,\; 1\bigr) \cdot \bigl(y_j,\; 1,\; \gamma_j - s\|y_j\|^2\bigr),

is the exponent. In float32 the expansion of the square loses digits far from the origin, so each cloud is taken about its
own mean. With :math:`\delta` from the mean of y to that of x, and primes for centred points,

.. math:: \|x_i-y_j\|^2 = \|x_i'-y_j'\|^2 + (2\langle\delta,x_i'\rangle + \|\delta\|^2) - 2\langle\delta,y_j'\rangle:

what the shift adds is a potential of either side, however far apart the clouds are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_sinkhorn.ot.problem import Problem

#: Exponents in base 2 of one unit of ``f / epsilon``.
LOG2E = 1 / math.log(2.0)


class Exponents:
    """Builds the exponents of a batch of problems, ``(B, n, m)``, from potentials in base 2.

    scale:  ``log2(e) / epsilon``, ``(B, 1)``
    x, y:   points about the mean of their cloud, for the squared Euclidean cost; None for others
    """

    def __init__(self, problem: Problem) -> None:
        self.scale = (LOG2E / problem.epsilon).unsqueeze(-1)
        self.x: Tensor | None = None
        self.y: Tensor | None = None
        self._shift: tuple[Tensor, Tensor] | None = None
        if problem.cost != "sqeuclidean":
            self._scaled_cost = problem.cost_matrix.detach() * self.scale.unsqueeze(-1)
            return
        a, b = (None, None) if problem.uniform else (problem.a.detach(), problem.b.detach())
        mean_x = weighted_mean(problem.x.detach(), a)
        self.x = self.y = problem.x.detach() - mean_x
        self._bias_x = self._bias_y = self.x.square().sum(-1) * self.scale
        if not problem.symmetric:
            mean_y = weighted_mean(problem.y.detach(), b)
            self.y = problem.y.detach() - mean_y
            self._bias_y = self.y.square().sum(-1) * self.scale
            delta = (mean_x - mean_y).mT
            constant = delta.square().sum(-2)
            self._shift = (
                (2 * self.x @ delta).squeeze(-1) + constant,
                (2 * self.y @ delta).squeeze(-1).neg(),
            )
        self._left = self.x * (2 * self.scale.unsqueeze(-1))
        self._one = self._bias_x.new_ones(())

    def __call__(self, phi: Tensor, gamma: Tensor) -> Tensor:
        """``phi_i + gamma_j - s C_ij``, a new tensor."""
        if self.x is None or self.y is None:
            return (phi.unsqueeze(-1) - self._scaled_cost).add_(gamma.unsqueeze(-2))
        left = torch.cat([self._left, *self._with_one(phi - self._bias_x)], -1)
        right = torch.cat([self.y, *self._with_one(gamma - self._bias_y)[::-1]], -1)
        return torch.bmm(left, right.mT)

    def _with_one(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        return bias.unsqueeze(-1), self._one.expand(*bias.shape, 1)

    def potentials(self, phi: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """``f`` and ``g`` in units of the cost."""
        f, g = phi / self.scale, gamma / self.scale
        return (f, g) if self._shift is None else (f + self._shift[0], g + self._shift[1])

    def in_base_2(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`potentials`."""
        if self._shift is not None:
            f, g = f - self._shift[0], g - self._shift[1]
        return f * self.scale, g * self.scale


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Over points, ``(B, n, d)`` to ``(B, 1, d)``; equal weights if None. Weightless points have no say."""
    return values.mean(-2, keepdim=True) if weights is None else weights.unsqueeze(-2) @ values
