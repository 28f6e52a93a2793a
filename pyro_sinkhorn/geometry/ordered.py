"""Supports of increasing vectors: any, and positive ones."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sinkhorn.geometry.base import Elementwise


def _increasing(value: Tensor) -> Tensor:
    """Strictly so: a gap below the resolution of its neighbours rounds away, so every step gets that much."""
    size = value.detach().abs().amax(-1, keepdim=True)
    steps = torch.arange(value.shape[-1], dtype=value.dtype, device=value.device)
    return value + steps * (4 * torch.finfo(value.dtype).eps * size)


def _exp(raw: Tensor) -> Tensor:
    limit = 80.0 if raw.dtype != torch.float64 else 600.0
    return raw.clamp(-limit, limit).exp()


class Ordered(Elementwise):
    """``ordered_vector``. Head: a first number and positive gaps. Embedding: that number and the logarithms of the gaps, over
    their prior sd: entries themselves leave small gaps between large ones unseen.
    """

    def head(self, raw: Tensor) -> Tensor:
        """Cumulative sums."""
        raw = self.unflatten(raw)
        return _increasing(torch.cat([raw[..., :1], _exp(raw[..., 1:])], -1).cumsum(-1))

    def embed(self, value: Tensor) -> Tensor:
        """As the outputs of the head."""
        return self.inverse(value)

    def inverse(self, value: Tensor) -> Tensor:
        """The first entry and the logarithms of the gaps."""
        gaps = value.diff(dim=-1).clamp_min(torch.finfo(value.dtype).tiny)
        return self.flatten(torch.cat([value[..., :1], gaps.log()], -1))


class PositiveOrdered(Elementwise):
    """``positive_ordered_vector``. Head: cumulative sums of exponentials. Embedding: logarithms over their prior sd."""

    def head(self, raw: Tensor) -> Tensor:
        """Cumulative sums."""
        return _increasing(_exp(self.unflatten(raw)).cumsum(-1))

    def embed(self, value: Tensor) -> Tensor:
        """Logarithms of the entries."""
        return self.flatten(value.clamp_min(torch.finfo(value.dtype).tiny).log())

    def inverse(self, value: Tensor) -> Tensor:
        """Logarithms of the gaps, the first from 0."""
        gaps = value.diff(dim=-1, prepend=torch.zeros_like(value[..., :1]))
        return self.flatten(gaps.clamp_min(torch.finfo(value.dtype).tiny).log())
