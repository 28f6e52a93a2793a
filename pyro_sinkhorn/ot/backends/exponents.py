r"""Exponents of the plan, in base 2.

With :math:`\varphi = f \log_2 e/\varepsilon` and :math:`\gamma = g \log_2 e/\varepsilon`, the density of the plan is

.. math:: P_{ij} / (a_i b_j) = 2^{\varphi_i + \gamma_j - s\,C_{ij}}, \qquad s = \log_2 e/\varepsilon.

Base 2 because ``torch.exp2`` takes a third of the time of ``torch.exp`` on a processor. For the squared Euclidean cost
the matrix :math:`C` is never formed: one product of points with their biases appended,

.. math:: \bigl(2s x_i,\; \varphi_i - s\|x_i\|^2,\; 1\bigr) \cdot \bigl(y_j,\; 1,\; \gamma_j - s\|y_j\|^2\bigr),

is the exponent. Both clouds are centred first: in float32 the expansion of the square loses digits far from the origin.
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

    scale:  ``log2(e) / epsilon``, ``(B, 1)``: potentials times it are in base 2
    x, y:   centred points, for the squared Euclidean cost; None for others
    """

    def __init__(self, problem: Problem) -> None:
        self.scale = (LOG2E / problem.epsilon).unsqueeze(-1)
        self.x: Tensor | None = None
        self.y: Tensor | None = None
        if problem.cost == "sqeuclidean":
            x, y = problem.x.detach(), problem.y.detach()
            centre = x.mean(-2, keepdim=True)
            self.x, self.y = x - centre, x - centre if problem.symmetric else y - centre
            self._left = self.x * (2 * self.scale.unsqueeze(-1))
            self._bias_x = self.x.square().sum(-1) * self.scale
            self._bias_y = self._bias_x if problem.symmetric else self.y.square().sum(-1) * self.scale
            self._one = self._bias_x.new_ones(())
        else:
            self._scaled_cost = problem.cost_matrix.detach() * self.scale.unsqueeze(-1)

    def __call__(self, phi: Tensor, gamma: Tensor) -> Tensor:
        """``phi_i + gamma_j - s C_ij``, a new tensor."""
        if self.x is None or self.y is None:
            return (phi.unsqueeze(-1) - self._scaled_cost).add_(gamma.unsqueeze(-2))
        left = torch.cat([self._left, *self._with_one(phi - self._bias_x)], -1)
        right = torch.cat([self.y, *self._with_one(gamma - self._bias_y)[::-1]], -1)
        return torch.bmm(left, right.mT)

    def _with_one(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        return bias.unsqueeze(-1), self._one.expand(*bias.shape, 1)

    def potential(self, base2: Tensor) -> Tensor:
        """From base 2 to units of the cost."""
        return base2 / self.scale
