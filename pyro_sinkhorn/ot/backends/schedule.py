r"""Epsilon schedule: solve blurred problems first, each the start of the next.

At a large epsilon one Sinkhorn step nearly solves the problem, so a geometric descent
:math:`\varepsilon_0, r\varepsilon_0, r^2\varepsilon_0, \dots, \varepsilon` with one step a stage brings the
potentials close for a few steps in all, where a cold start would need about :math:`\max C/\varepsilon` of
them (Schmitzer 2019, *Stabilized sparse scaling algorithms for entropy regularized transport problems*).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def epsilon_schedule(diameter: Tensor, epsilon: Tensor, ratio: float = 0.5) -> list[Tensor]:
    """Stages from the largest cost down to, not including, ``epsilon``; each has the shape of ``epsilon``.

    diameter:  largest cost of each problem, ``(B,)``
    epsilon:   target, ``(B,)``
    ratio:     between 0 and 1. One half costs few steps and leaves the potentials near enough that the steps
               at the target finish the job; slower descents gained nothing on the clouds of the benchmarks

    >>> stages = epsilon_schedule(torch.tensor([8.0]), torch.tensor([1.0]))
    >>> [s.item() for s in stages]
    [8.0, 4.0, 2.0]
    """
    if not 0 < ratio < 1:
        raise ValueError(f"the ratio of the epsilon schedule is {ratio}: expected a number between 0 and 1")
    span = float((diameter / epsilon).max())
    if not math.isfinite(span) or span <= 1:
        return []
    n_stages = math.ceil(math.log(span) / -math.log(ratio))
    return [torch.maximum(diameter * ratio**k, epsilon) for k in range(n_stages)]
