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
        """``raw / |raw|``; the exact origin, which has no direction, becomes the first axis."""
        vector, size = _of_unit_size(self.unflatten(raw))
        first_axis = torch.nn.functional.one_hot(torch.zeros((), dtype=torch.long), vector.shape[-1]).to(
            vector
        )
        vector = torch.where(size > 0, vector, first_axis)
        return vector / vector.norm(dim=-1, keepdim=True)

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
        pair, _ = _of_unit_size(raw.reshape(*raw.shape[:-1], *self.event_shape, 2))
        x, y = pair.unbind(-1)
        degenerate = (x == 0) & (y == 0)
        return torch.atan2(y, torch.where(degenerate, torch.ones_like(x), x))

    def embed(self, value: Tensor) -> Tensor:
        """``(cos, sin)`` of every angle."""
        flat = self.flatten(value)
        return torch.cat([flat.cos(), flat.sin()], -1)


def _of_unit_size(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors over their largest entry, and that entry, detached: a direction does not depend on it, squares do."""
    size = vector.detach().abs().amax(-1, keepdim=True)
    return vector / torch.where(size > 0, size, torch.ones_like(size)), size
