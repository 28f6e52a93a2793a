"""Supports made of others: pieces laid side by side along a dimension of the event."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_sinkhorn.geometry.base import Geometry


class Pieces(Geometry):
    """``constraints.cat`` and ``constraints.stack``: each piece keeps the geometry of its own support.

    :param pieces: geometries, in order
    :param axis: the dimension, counted from the end of the event, along which they lie
    :param stacked: pieces lack that dimension; else it adds up from theirs
    """

    def __init__(
        self, event_shape: torch.Size, pieces: Sequence[Geometry], axis: int, stacked: bool = False
    ) -> None:
        super().__init__(event_shape, sum(p.dim for p in pieces), sum(p.num_raw for p in pieces))
        self.pieces, self.axis, self.stacked = list(pieces), axis, stacked

    def head(self, raw: Tensor) -> Tensor:
        """Every piece from its own share of the outputs."""
        parts = raw.split([piece.num_raw for piece in self.pieces], -1)
        values = [piece.head(part) for piece, part in zip(self.pieces, parts, strict=True)]
        return torch.stack(values, self.axis) if self.stacked else torch.cat(values, self.axis)

    def embed(self, value: Tensor) -> Tensor:
        """Embeddings of the pieces, side by side, each in its own unit later on."""
        return torch.cat([p.embed(v) for p, v in zip(self.pieces, self._split(value), strict=True)], -1)

    def inverse(self, value: Tensor) -> Tensor | None:
        """Where every piece has one."""
        parts = [p.inverse(v) for p, v in zip(self.pieces, self._split(value), strict=True)]
        found = [part for part in parts if part is not None]
        return torch.cat(found, -1) if len(found) == len(parts) else None

    def unit(self, embedded: Tensor) -> Tensor:
        """Units of the pieces, one for every coordinate."""
        units, widths = [], self._widths(embedded)
        for piece, part in zip(self.pieces, embedded.split(widths, -1), strict=True):
            units.append(piece.unit(part).expand(part.shape[-1]))
        return torch.cat(units)

    def tails(self, embedded: Tensor) -> Tensor | None:
        """Where any piece's are measured from."""
        parts = embedded.split(self._widths(embedded), -1)
        found = [p.tails(part) for p, part in zip(self.pieces, parts, strict=True)]
        if all(one is None for one in found):
            return None
        zeros = (torch.zeros_like(part[0]) for part in parts)
        return torch.cat([zero if one is None else one for one, zero in zip(found, zeros, strict=True)])

    def finish(self, embedded: Tensor, heavy: bool = False) -> Tensor:
        """The last steps of the pieces."""
        parts = embedded.split(self._widths(embedded), -1)
        return torch.cat([p.finish(part, heavy) for p, part in zip(self.pieces, parts, strict=True)], -1)

    def _split(self, value: Tensor) -> list[Tensor]:
        if self.stacked:
            return list(value.unbind(self.axis))
        return list(value.split([piece.event_shape[self.axis] for piece in self.pieces], self.axis))

    def _widths(self, embedded: Tensor) -> list[int]:
        """Columns of every piece's embedding."""
        return [
            piece.embed(piece.head(embedded.new_zeros(1, piece.num_raw))).shape[-1] for piece in self.pieces
        ]
