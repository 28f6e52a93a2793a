r"""Exact draws of the cosine of a von Mises-Fisher vector, as its distance from 1.

The cosine :math:`w = \langle\mu, x\rangle` has density proportional to
:math:`(1-w^2)^{(d-3)/2} e^{\kappa w}`. At high concentration w is 1 up to rounding, and everything about x
lies in :math:`u = 1-w`. So u is what is drawn, and 1 - w is never computed as a difference.

* :math:`d=3`: the distribution function is an exponential and is inverted.
* otherwise: rejection from the image of a beta variable (Ulrich 1984, *Computer generation of distributions
  on the m-sphere*; corrected by Wood 1994, *Simulation of the von Mises Fisher distribution*). For
  :math:`d=2` this is the sampler of Best and Fisher 1979 for the von Mises law, whose acceptance rate, at
  least 0.66, is the lowest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sample_one_minus_cosine(dim: int, concentration: Tensor) -> Tensor:
    """One draw of 1 - w for every entry of ``concentration``, which must be float64; not differentiable.

    >>> u = sample_one_minus_cosine(3, torch.full((1000,), 1e5, dtype=torch.float64))
    >>> bool((u >= 0).all() and (0.8 < 1e5 * u.mean() < 1.2))
    True
    """
    with torch.no_grad():
        if dim == 3:
            return _invert(concentration)
        return _reject(dim, concentration.reshape(-1)).reshape(concentration.shape)


def _invert(kappa: Tensor) -> Tensor:
    # exp(-kappa u) is uniform on [exp(-2 kappa), 1]. At the smallest normal number the quotient is the
    # uniform law's.
    kappa = kappa.clamp_min(torch.finfo(kappa.dtype).tiny)
    return -torch.log1p(torch.rand_like(kappa) * torch.expm1(-2 * kappa)) / kappa


def _reject(dim: int, kappa: Tensor) -> Tensor:
    u = torch.empty_like(kappa)
    pending = torch.arange(len(kappa), device=kappa.device)
    while len(pending):
        proposal, rejected = _propose(dim, kappa[pending])
        u[pending] = proposal
        pending = pending[rejected]
    return u


def _propose(dim: int, kappa: Tensor) -> tuple[Tensor, Tensor]:
    r"""A proposal for u, and whether it is rejected.

    In Wood's words, with :math:`m=d-1`: :math:`w = (1-(1+b)z)/(1-(1-b)z)` for z ~ Beta(m/2, m/2). With
    :math:`z = g_1/(g_1+g_2)` and :math:`t = g_1/(g_2 + b g_1)` this is :math:`u = 2bt`, and the logarithm of
    the acceptance probability becomes the expression below. Neither holds a difference of close numbers.
    """
    m = dim - 1
    slack = 2 * kappa + torch.hypot(2 * kappa, torch.full_like(kappa, m))
    b = m / slack
    g1, g2 = _beta_parts(m, kappa)
    t = g1 / (g2 + b * g1)
    log_accept = 2 * m * (kappa / slack) * (1 / (1 + b) - t) + m * ((1 + b) * (1 + (1 - b) * t) / 2).log()
    # Written so that a concentration that is not a number ends the loop and gives a result that is not one
    # either.
    return 2 * b * t, log_accept < torch.rand_like(kappa).log()


def _beta_parts(m: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Two positive numbers whose share g1 / (g1 + g2) is Beta(m/2, m/2)."""
    if m == 1:  # the arcsine law
        angle = torch.rand_like(like) * (math.pi / 2)
        return angle.sin().square(), angle.cos().square()
    gamma = torch.distributions.Gamma(
        torch.full_like(like, m / 2), torch.ones_like(like), validate_args=False
    )
    return gamma.sample(), gamma.sample()
