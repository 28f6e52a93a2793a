r"""Latent penalties of the papers and their peers, each on the clouds that ``Trace_Sinkhorn`` makes.

Every one is divided by the mean cost between prior draws, as ``Trace_Sinkhorn``'s own match, so that weights are in one unit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pyro_sinkhorn.losses.call import Call
from pyro_sinkhorn.losses.latent_match import GroupMatch, LatentMatch
from pyro_sinkhorn.losses.matching import MatchOptions
from pyro_sinkhorn.ot import sinkhorn

#: Defaults of Sinkhorn AutoEncoders v1; its epsilon is in units of the squared distance of latents.
EPSILON, ITERATIONS = 0.1, 50


def published_sinkhorn(cost: Tensor, epsilon: float | Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    r"""Algorithm of v1: u = 1, then L times v = 1/(K'u), u = 1/(Kv); the sharp cost :math:`\langle R,C\rangle/M`.

    The gradient goes through all iterations. In logarithms, since K = exp(-C/epsilon) underflows in single precision beyond a
    cost of 9 at epsilon .1, and normal latents have costs of 20 and 128. Exponents are cut off at -80: smaller terms
    change no digit, and processors take a hundred times longer over numbers below the normal range.

    >>> rng = torch.Generator().manual_seed(0)
    >>> x, y = torch.randn(2, 16, 3, generator=rng)
    >>> value, plan = published_sinkhorn(torch.cdist(x, y).square(), 0.5, 50)
    >>> same = sinkhorn(y, x, 0.5, value="sharp", gradient="unrolled", tolerance=0, max_iters=50)
    >>> torch.allclose(value, same.value, rtol=1e-4), torch.allclose(plan.T, same.plan(), atol=1e-5)
    (True, True)

    :param cost: ``(..., n, n)``
    :returns: one value a problem, and the detached plan
    """
    scaled = cost / epsilon
    log_u = torch.zeros_like(scaled[..., 0])
    for _ in range(iterations):
        log_v = -_log_sum(log_u.unsqueeze(-2) - scaled.mT)
        log_u = -_log_sum(log_v.unsqueeze(-2) - scaled)
    exponent = log_u.unsqueeze(-1) + log_v.unsqueeze(-2) - scaled
    plan = exponent.clamp_min(-80).exp() / cost.shape[-1]
    return (plan * cost).sum((-2, -1)), plan.detach()


def _log_sum(exponent: Tensor) -> Tensor:
    largest = exponent.detach().amax(-1, keepdim=True)
    return (exponent - largest).clamp_min(-80).exp().sum(-1).log() + largest.squeeze(-1)


class PublishedMatch(LatentMatch):
    """SAE v1: sharp Sinkhorn cost of one batch, gradients unrolled through L iterations, not debiased."""

    def divergence(
        self, x: Any, y: Any, mean: Tensor, group: str, paired: bool, cost: Any = "sqeuclidean"
    ) -> Tensor:
        """One value a particle."""
        squared = torch.cdist(x.points, y.points, compute_mode="donot_use_mm_for_euclid_dist").square()
        value, _ = published_sinkhorn(squared, self.options.relative_epsilon * mean, ITERATIONS)
        return value / mean


class SlicedMatch(LatentMatch):
    """Sliced WAE (Kolouri et al. 2018): squared distances of sorted projections on random directions, times d.

    Along one of d directions lies a d-th of the squared distance: the factor brings the value to the unit of the others.
    """

    num_projections = 50

    def divergence(
        self, x: Any, y: Any, mean: Tensor, group: str, paired: bool, cost: Any = "sqeuclidean"
    ) -> Tensor:
        """One value a particle."""
        dim = x.points.shape[-1]
        directions = nn.functional.normalize(torch.randn(dim, self.num_projections), dim=0)
        along_x, along_y = ((cloud.points @ directions).sort(-2).values for cloud in (x, y))
        return dim * (along_x - along_y).square().mean((-2, -1)) / mean


class FixedTargets(LatentMatch):
    """Noise as targets (Bojanowski and Joulin 2017): every datum has a prior draw of its own, which it may swap.

    The targets of a batch are matched to its codes, by an assignment or by :func:`published_sinkhorn`; then they are
    swapped so that each datum owns the target it was assigned to (of a Sinkhorn plan, by the best assignment of the
    plan's mass). A target is drawn when its datum is first seen. The model's second argument holds the numbers of the
    data of the batch.

    :param num_data: number of data
    :param hungarian: assignment rather than Sinkhorn
    """

    def __init__(self, options: MatchOptions, num_data: int, hungarian: bool) -> None:
        super().__init__(options)
        self.num_data, self.hungarian = num_data, hungarian
        self.targets = torch.empty(0, 0)
        self._index = torch.empty(0, dtype=torch.long)

    def fresh(self) -> FixedTargets:
        """One with no targets yet."""
        return FixedTargets(self.options, self.num_data, self.hungarian)

    def __call__(self, call: Call) -> list[GroupMatch]:
        """Compare the codes of the batch with its targets."""
        self._index = call.args[1]
        return super().__call__(call)

    def divergence(
        self, x: Any, y: Any, mean: Tensor, group: str, paired: bool, cost: Any = "sqeuclidean"
    ) -> Tensor:
        """One value; the targets are swapped."""
        codes, drawn = x.points[0], y.points[0]
        if not self.targets.numel():
            self.targets = torch.full((self.num_data, codes.shape[-1]), math.nan)
        own = self.targets[self._index]
        own = torch.where(own.isnan(), drawn, own)
        if self.hungarian:
            out = sinkhorn(codes, own, 0)
            value, order = out.value, out.plan().argmax(-1)
        else:
            squared = torch.cdist(codes, own, compute_mode="donot_use_mm_for_euclid_dist").square()
            value, plan = published_sinkhorn(squared, self.options.relative_epsilon * mean, ITERATIONS)
            order = torch.as_tensor(linear_sum_assignment(-plan.numpy())[1])
        self.targets[self._index] = own[order]
        return value / mean
