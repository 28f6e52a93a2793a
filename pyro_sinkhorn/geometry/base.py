r"""What a support must know to take part: how to be produced and how to be compared.

A :class:`Geometry` teaches one site two maps:

- ``head``: network output :math:`\to` value in the support, so that a guide can produce it;
- ``embed``: value :math:`\to \mathbb{R}^e`, where squared Euclidean distance is the ground cost.

Every loss and every transport backend then sees plain point clouds. Embeddings of one group are concatenated, so
each is brought to a common unit first: divided by :meth:`Geometry.unit` of the prior, which makes the mean squared
distance between two prior draws :math:`2\,\mathtt{dim}`, that of ``dim`` standardised coordinates. Without it a
Dirichlet (mean squared distance below 1) would vanish beside a ten-dimensional normal (20).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Geometry:
    """Base class. ``event_shape`` is that of the site; subclasses fill in the rest.

    event_shape:  shape of one value
    dim:          intrinsic dimension, which sets the weight of the site in its group
    num_raw:      how many network outputs :meth:`head` reads
    cost:         None: squared distance of embeddings. Else a name or function that compares values instead, see
                  :mod:`pyro_sinkhorn.losses.site_cost`
    """

    cost: Any = None

    def __init__(self, event_shape: torch.Size, dim: int | None = None, num_raw: int | None = None) -> None:
        self.event_shape = torch.Size(event_shape)
        self.dim = math.prod(event_shape) if dim is None else dim
        self.num_raw = math.prod(event_shape) if num_raw is None else num_raw

    def head(self, raw: Tensor) -> Tensor:
        """``(..., num_raw)`` to ``(..., *event_shape)``: any real numbers to a value in the support."""
        raise NotImplementedError(
            f"{type(self).__name__} defines no head, so no guide can produce its values"
        )

    def embed(self, value: Tensor) -> Tensor:
        """``(..., *event_shape)`` to ``(..., e)``, differentiable everywhere in the support, ends included."""
        raise NotImplementedError(f"{type(self).__name__} defines no embed, so its values cannot be compared")

    def inverse(self, value: Tensor) -> Tensor | None:
        """Raw outputs that :meth:`head` maps to ``value``, or None where there is no natural choice.

        A guide uses it once, on prior draws, to start at the prior's own location and scale.
        """
        return None

    def unit(self, embedded: Tensor) -> Tensor:
        """Unit of length from embedded prior draws ``(n, e)``: a number here, one a coordinate where those differ."""
        mean_square = 2 * embedded.var(0, correction=0).sum()
        return _nonzero((mean_square / (2 * max(self.dim, 1))).sqrt())

    def tails(self, embedded: Tensor) -> Tensor | None:
        """Where heavy tails are measured from, ``(e,)``, of embedded prior draws ``(n, e)``; None for light ones."""
        return None

    def finish(self, embedded: Tensor, heavy: bool = False) -> Tensor:
        """Last step on the embedding in its unit, from where its tails are measured; heavy ones are compressed here.

        heavy:  :meth:`tails` found them so
        """
        return embedded

    def flatten(self, value: Tensor) -> Tensor:
        """``(..., *event_shape)`` to ``(..., numel)``."""
        lead = value.shape[: value.dim() - len(self.event_shape)]
        return value.reshape(*lead, -1)

    def unflatten(self, raw: Tensor) -> Tensor:
        """``(..., numel)`` to ``(..., *event_shape)``."""
        return raw.reshape(raw.shape[:-1] + self.event_shape)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(event_shape={tuple(self.event_shape)})"


class Elementwise(Geometry):
    """A geometry of independent numbers: each coordinate of the embedding has a unit of its own."""

    def unit(self, embedded: Tensor) -> Tensor:
        """Standard deviation of every coordinate under the prior, ``(e,)``."""
        return _nonzero(embedded.std(0, correction=0))


def _nonzero(unit: Tensor) -> Tensor:
    """A prior that is constant along a coordinate leaves it as it is."""
    return torch.where(unit > 0, unit, torch.ones_like(unit))
