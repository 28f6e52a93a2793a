"""Small pieces of geometry on the unit sphere, shared by the distributions on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_surface(dim: int) -> float:
    r"""Logarithm of the surface of :math:`S^{d-1}`, which is :math:`2\pi^{d/2}/\Gamma(d/2)`.

    >>> round(math.exp(log_surface(3)) / math.pi, 12)
    4.0
    """
    return math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)


def random_directions(shape: torch.Size, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Uniform unit vectors along the last dimension: normalised normal draws.

    >>> random_directions(torch.Size([2, 3]), torch.float64, None).norm(dim=-1).round(decimals=12).tolist()
    [1.0, 1.0]
    """
    normal = torch.randn(shape, dtype=dtype, device=device)
    norm = normal.norm(dim=-1, keepdim=True)
    # All coordinates can be exactly 0, in one dimension about once in 1e9 float32 draws. Any fixed direction
    # will do then.
    fallback = torch.zeros_like(normal)
    fallback[..., 0] = 1
    return torch.where(norm > 0, normal / norm.clamp_min(torch.finfo(dtype).tiny), fallback)


def random_tangents(loc: Tensor) -> Tensor:
    r"""Uniform unit vectors orthogonal to the unit vectors ``loc``.

    A direction in the coordinates 2 to d is carried over by the Householder reflection that takes :math:`e_1`
    to :math:`\mp\mu`. The reflection normal is :math:`\mu \pm e_1`; the sign is that of :math:`\mu_1`, so its
    squared length :math:`2(1+|\mu_1|)` is never below 2. The usual choice :math:`\mu - e_1` vanishes at
    :math:`e_1`.

    >>> mu = torch.tensor([0.6, -0.8], dtype=torch.float64)
    >>> abs(random_tangents(mu) @ mu).item() < 1e-15
    True
    """
    first = loc[..., :1]
    tangent = random_directions(torch.Size((*loc.shape[:-1], loc.shape[-1] - 1)), loc.dtype, loc.device)
    tangent = torch.cat([torch.zeros_like(first), tangent], dim=-1)
    sign = torch.where(first >= 0, torch.ones_like(first), -torch.ones_like(first))
    reflector = torch.cat([first + sign, loc[..., 1:]], dim=-1)
    return tangent - reflector * ((loc * tangent).sum(-1, keepdim=True) / (1 + first.abs()))
