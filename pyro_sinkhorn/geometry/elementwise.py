"""Supports made of independent numbers: the line, half-lines and intervals."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sinkhorn.geometry.base import Elementwise


class Real(Elementwise):
    r"""The line. Head: linear. Embedding: :math:`z/\mathrm{sd}(\text{prior})`.

    heavy_tailed:  the prior has no second moment (Cauchy, StudentT, Levy), hence no expected squared cost. The unit
                   is then the interquartile range and the embedding :math:`\operatorname{asinh}(z/\mathrm{unit})`,
                   linear in the bulk and logarithmic in the tails
    """

    def __init__(self, event_shape: torch.Size, heavy_tailed: bool = False) -> None:
        super().__init__(event_shape)
        self.heavy_tailed = heavy_tailed

    def head(self, raw: Tensor) -> Tensor:
        """``raw`` itself, reshaped."""
        return self.unflatten(raw)

    def embed(self, value: Tensor) -> Tensor:
        """``value`` itself, flattened."""
        return self.flatten(value)

    def inverse(self, value: Tensor) -> Tensor:
        """``value`` itself, flattened."""
        return self.flatten(value)

    def unit(self, embedded: Tensor) -> Tensor:
        """Standard deviation, or interquartile range over 1.349 (a normal's ratio of the two) for heavy tails."""
        if not self.heavy_tailed:
            return super().unit(embedded)
        quartiles = embedded.quantile(
            torch.tensor([0.25, 0.75], dtype=embedded.dtype, device=embedded.device), dim=0
        )
        spread = (quartiles[1] - quartiles[0]) / 1.349
        return torch.where(spread > 0, spread, torch.ones_like(spread))

    def finish(self, embedded: Tensor) -> Tensor:
        """Compress heavy tails."""
        return embedded.asinh() if self.heavy_tailed else embedded


class HalfLine(Elementwise):
    r"""``positive``, ``nonnegative``, ``greater_than(bound)`` and, with ``sign=-1``, ``less_than(bound)``.

    Head: :math:`\mathrm{bound} \pm e^{raw}`. Embedding: :math:`\log|z-\mathrm{bound}|` over its prior sd, so that
    ratios count and the two maps undo each other.
    """

    def __init__(self, event_shape: torch.Size, bound: float | Tensor = 0.0, sign: int = 1) -> None:
        super().__init__(event_shape)
        self.bound, self.sign = bound, sign

    def head(self, raw: Tensor) -> Tensor:
        """Exponential; clamped well inside the floating range, where e^raw would be 0 or infinite."""
        limit = 80.0 if raw.dtype != torch.float64 else 600.0
        distance = self.unflatten(raw).clamp(-limit, limit).exp()
        # Beside a bound other than 0 a small distance rounds away, and the bound itself is outside.
        bound = torch.as_tensor(self.bound, dtype=raw.dtype, device=raw.device)
        resolution = 2 * torch.finfo(raw.dtype).eps * bound.abs()
        return bound + self.sign * (distance + resolution)

    def embed(self, value: Tensor) -> Tensor:
        """Logarithm of the distance to the bound; exact zeros are moved to the smallest normal number."""
        distance = self.sign * (value - self.bound)
        return self.flatten(distance.clamp_min(torch.finfo(value.dtype).tiny).log())

    def inverse(self, value: Tensor) -> Tensor:
        """The same logarithm."""
        return self.embed(value)


class Interval(Elementwise):
    """``interval(low, high)``. Head: sigmoid, then affine. Embedding: position in the interval over its prior sd."""

    def __init__(
        self, event_shape: torch.Size, low: float | Tensor = 0.0, high: float | Tensor = 1.0
    ) -> None:
        super().__init__(event_shape)
        self.low, self.high = low, high

    def head(self, raw: Tensor) -> Tensor:
        """``low + (high - low) * sigmoid(raw)``, kept off the ends by the rounding there, so that open ones hold."""
        low, high = (
            torch.as_tensor(end, dtype=raw.dtype, device=raw.device) for end in (self.low, self.high)
        )
        margin = 2 * torch.finfo(raw.dtype).eps * torch.maximum(low.abs(), high.abs())
        return low + margin + (high - low - 2 * margin) * self.unflatten(raw).sigmoid()

    def embed(self, value: Tensor) -> Tensor:
        """Position between 0 and 1."""
        return self.flatten((value - self.low) / (self.high - self.low))

    def inverse(self, value: Tensor) -> Tensor:
        """Logit of the position, kept finite at the ends."""
        return self.embed(value).clamp(1e-6, 1 - 1e-6).logit()
