"""Supports with a shape: the simplex, the sphere and the circle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_sinkhorn.geometry.base import Geometry


class Simplex(Geometry):
    r"""Probability vectors. Head: softmax. Embedding: :math:`\sqrt p` (Hellinger), which sends the simplex to a piece
    of the sphere and treats small probabilities by their ratio rather than by their size.
    """

    def __init__(self, event_shape: torch.Size) -> None:
        super().__init__(event_shape, dim=math.prod(event_shape[:-1]) * (event_shape[-1] - 1))

    def head(self, raw: Tensor) -> Tensor:
        """Softmax over the last dimension."""
        return self.unflatten(raw).softmax(-1)

    def embed(self, value: Tensor) -> Tensor:
        """Square root; the slope at an exact zero, which is infinite, is replaced by 0."""
        return self.flatten(value.clamp_min(torch.finfo(value.dtype).tiny).sqrt())


class Sphere(Geometry):
    """Unit vectors. Head: normalise. Embedding: identity, so that the cost is the squared chord."""

    def __init__(self, event_shape: torch.Size) -> None:
        super().__init__(event_shape, dim=math.prod(event_shape[:-1]) * (event_shape[-1] - 1))

    def head(self, raw: Tensor) -> Tensor:
        """``raw / |raw|``; the exact origin, which has no direction, stays finite."""
        vector = self.unflatten(raw)
        return vector / vector.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(raw.dtype).tiny ** 0.5)

    def embed(self, value: Tensor) -> Tensor:
        """The vector itself."""
        return self.flatten(value)


class Circle(Geometry):
    """Angles. Head: the angle of a pair of outputs. Embedding: cosine and sine, so that -pi and pi coincide.

    Pyro's ``VonMises`` declares its support ``real``: this geometry is found by the type of the distribution.
    """

    def __init__(self, event_shape: torch.Size) -> None:
        super().__init__(event_shape, num_raw=2 * math.prod(event_shape))

    def head(self, raw: Tensor) -> Tensor:
        """Angle in (-pi, pi]; the exact origin, where the angle has no gradient, is moved off."""
        pair = raw.reshape(*raw.shape[:-1], *self.event_shape, 2)
        x, y = pair.unbind(-1)
        degenerate = (x == 0) & (y == 0)
        return torch.atan2(y, torch.where(degenerate, torch.ones_like(x), x))

    def embed(self, value: Tensor) -> Tensor:
        """``(cos, sin)`` of every angle."""
        flat = self.flatten(value)
        return torch.cat([flat.cos(), flat.sin()], -1)
