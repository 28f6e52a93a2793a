r"""Anderson mixing: the next iterate from the last few, a least-squares problem of their number.

Given iterates :math:`p_k` and what a plain step would add to them, :math:`r_k`, take the weights :math:`w`, summing to 1,
that minimise :math:`\|\sum_k w_k r_k\|^2`, and go to :math:`\sum_k w_k (p_k + r_k)` (Anderson 1965; Walker and Ni 2011,
*Anderson acceleration for fixed-point iterations*). On Sinkhorn's logarithms of scalings it needs a third to a tenth of
the plain iterations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: An error this many times the best of its problem means that the steps have gone astray: they begin anew. Less often is
#: better: in small problems the error goes up and down by factors of ten on its way.
ASTRAY = 100.0

#: Largest correction of a plain step, in base 2: a factor of 16 in a scaling. Clouds in parts that hardly meet have flat
#: directions, along which the least squares go too far, and back, for hundreds of iterations.
LIMIT = 4.0

#: After so many iterations without progress, as many are plain steps, which cannot go astray.
PATIENCE = 50


class Anderson:
    """Mixing for a batch of vectors ``(B, n)``.

    :param weights: of the inner product, ``(B, n)``: a coordinate of weight zero has no say
    :param memory: iterates remembered. Beyond six nothing was gained at the accuracies matching asks for
    """

    def __init__(self, weights: Tensor, memory: int = 6) -> None:
        self.memory, self.count = memory, 0
        batch, n = weights.shape
        self._root = weights.sqrt()
        self._targets = weights.new_empty(batch, memory, n)
        self._residuals = weights.new_empty(batch, memory, n)
        self._ones = weights.new_ones(batch, memory, 1)
        # Relative to each residual. In float32 directions below it are rounding noise; in float64 it keeps the weights of
        # problems with fewer points than memory in bounds.
        self._ridge = 1e-6 if weights.dtype == torch.float32 else 1e-8
        self._tiny = torch.eye(memory, dtype=weights.dtype, device=weights.device)
        # A problem solved exactly has residuals of zero, and a matrix of zeros: the root of the smallest number leaves room
        # for its inverse.
        self._tiny *= torch.finfo(weights.dtype).tiny ** 0.5

    def step(self, point: Tensor, residual: Tensor, restart: Tensor | None = None) -> Tensor:
        """The next iterate.

        :param point: where the iteration is, ``(B, n)``
        :param residual: what the plain step would add, ``(B, n)``
        :param restart: problems whose past is to be forgotten, booleans ``(B,)``
        """
        slot = self.count % self.memory
        self.count += 1
        target = torch.add(point, residual, out=self._targets[:, slot])
        weighted = torch.mul(residual, self._root, out=self._residuals[:, slot])
        if self.count == 1:
            return target.clone()
        if restart is not None:
            # Copies of the present in place of the past: the minimum then is the plain step.
            self._targets[restart] = target[restart].unsqueeze(1)
            self._residuals[restart] = weighted[restart].unsqueeze(1)
        k = min(self.count, self.memory)
        recent = self._residuals[:, :k]
        gram = torch.baddbmm(self._tiny[:k, :k], recent, recent.mT)
        gram.diagonal(dim1=-2, dim2=-1).mul_(1 + self._ridge)
        solved, _ = torch.linalg.solve_ex(gram, self._ones[:, :k])
        mixed = torch.bmm(solved.mT, self._targets[:, :k]).squeeze(1).div_(solved.sum(-2))
        correction = mixed.sub_(target).nan_to_num_(
            0.0, 0.0, 0.0
        )  # least squares that fail leave the plain step
        largest = torch.linalg.vector_norm(correction, torch.inf, -1, keepdim=True)
        return torch.addcmul(target, correction, (LIMIT / largest).clamp_max_(1))


class Progress:
    """Watches the errors of a batch, and says when mixing must begin anew and when it must pause."""

    def __init__(self) -> None:
        self._best: Tensor | None = None
        self._best_worst, self._best_iteration, self._plain_until = math.inf, 0, 0

    def forget(self, iteration: int) -> None:
        """The problems were set up anew."""
        self._best, self._best_worst, self._best_iteration = None, math.inf, iteration

    def see(self, error: Tensor, worst: float, iteration: int) -> tuple[Tensor | None, bool]:
        """Problems to restart, booleans ``(B,)`` or None for none, and whether the step is to be plain.

        :param error: of each problem, ``(B,)``; ``worst`` is their largest
        """
        restart = None
        if worst > ASTRAY * self._best_worst and self._best is not None:
            restart = error > ASTRAY * self._best
            self._best, self._best_worst = self._best.where(~restart, torch.inf), math.inf
        self._best = error if self._best is None else torch.minimum(self._best, error)
        if worst < self._best_worst:
            self._best_worst, self._best_iteration = worst, iteration
        elif iteration - self._best_iteration > PATIENCE:
            self._best_iteration, self._plain_until = iteration, iteration + PATIENCE
        return restart, iteration < self._plain_until
