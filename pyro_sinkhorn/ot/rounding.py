r"""From a matrix that is nearly a coupling to one that is: rounding to the transport polytope.

With :math:`r(M)` and :math:`c(M)` the row and column sums, algorithm 2 of Altschuler, Weed and Rigollet 2017,
*Near-linear time approximation algorithms for optimal transport via Sinkhorn iteration*:

.. math::

    F' = \operatorname{diag}\min(a/r(P), 1)\,P, \qquad
    F  = F'\,\operatorname{diag}\min(b/c(F'), 1), \qquad
    \operatorname{round}(P) = F + \frac{(a-r(F))\,(b-c(F))^\top}{\|a-r(F)\|_1}.

Rows, then columns that have too much mass are scaled down, and what is missing is put back as a product.
It moves at most :math:`2(\|r(P)-a\|_1 + \|c(P)-b\|_1)` of the mass.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_plan(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    r"""The rounding of ``plan`` to a coupling of ``a`` and ``b``, differentiable in all three.

    Its cost bounds exact transport from above, however far from its marginals the plan was. The gradient is that of
    the branch taken; where a marginal is met exactly the minimum has a kink, and one of its slopes is used.

    :param plan: nonnegative, ``(..., n, m)``; leading dimensions are a batch
    :param a: row sums to reach, nonnegative, ``(..., n)``, broadcast against the batch
    :param b: column sums to reach, ``(..., m)``, of the same total mass
    :returns: ``(..., n, m)``, nonnegative, with those marginals up to the rounding of its dtype
    :raises ValueError: for shapes that do not fit, negative entries, and masses that differ

    >>> plan, half = torch.tensor([[0.4, 0.2], [0.1, 0.1]]), torch.tensor([0.5, 0.5])
    >>> rounded = round_plan(plan, half, half)
    >>> torch.allclose(rounded.sum(-1), half) and torch.allclose(rounded.sum(-2), half)
    True
    """
    if plan.dim() < 2 or plan.shape[-2:] != (*a.shape[-1:], *b.shape[-1:]):
        raise ValueError(
            f"plan has shape {tuple(plan.shape)}, a {tuple(a.shape)} and b {tuple(b.shape)}: "
            "expected (..., n, m), (..., n) and (..., m)"
        )
    if any(bool((t.detach() < 0).any()) for t in (plan, a, b)):
        raise ValueError(
            "plan, a and b must be nonnegative: these are masses, and rounding cannot make them so"
        )
    masses = a.detach().sum(-1), b.detach().sum(-1)
    if not torch.allclose(*masses, rtol=1e-4, atol=0):
        raise ValueError(
            f"a has mass {masses[0].tolist()} and b {masses[1].tolist()}: no plan has both marginals; "
            "divide each by its sum"
        )
    return rounded(plan, a, b)


def rounded(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """:func:`round_plan` of what is known to fit."""
    scaled = plan * _at_most(a, plan.sum(-1)).unsqueeze(-1)
    scaled = scaled * _at_most(b, scaled.sum(-2)).unsqueeze(-2)
    # Nonnegative but for rounding: a row that was scaled down lacks nothing, or 1e-17 less than nothing.
    rows, columns = (a - scaled.sum(-1)).clamp_min(0), (b - scaled.sum(-2)).clamp_min(0)
    missing = rows.sum(-1, keepdim=True)
    share = rows / missing.where(missing > 0, 1)  # nothing is missing from a coupling: 0 / 0
    return scaled + share.unsqueeze(-1) * columns.unsqueeze(-2)


def _at_most(target: Tensor, mass: Tensor) -> Tensor:
    """``min(target / mass, 1)``, whose slope stays finite where there is no mass."""
    above = mass > target
    return torch.where(above, target / mass.where(above, 1), 1)
