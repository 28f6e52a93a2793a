"""Supports made of independent numbers: the line, half-lines and intervals."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from pyro_sinkhorn.geometry.base import Elementwise


class Real(Elementwise):
    r"""The line. Head: linear. Embedding: :math:`z/\mathrm{sd}(\text{prior})`.

    heavy_tailed:  the prior has no second moment (Cauchy, StudentT, Levy), hence no expected squared cost. The unit
                   is then the interquartile range and the embedding
                   :math:`\operatorname{asinh}((z - \mathrm{median})/\mathrm{unit})`, linear in the bulk and logarithmic in
                   the tails

    The type does not tell of a scale mixture: a normal whose scale is a latent (funnel, horseshoe) has heavy tails though
    every slice of it is normal. So draws whose standard deviation is above 1.5 times what the middle nine tenths of them say
    count as heavy, too; for a Laplace it is equal, for half normals and half zeros below.
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
        if self.tails(embedded) is None:
            return super().unit(embedded)
        spread = _spread(embedded, 0.25)
        return torch.where(spread > 0, spread, torch.ones_like(spread))

    def tails(self, embedded: Tensor) -> Tensor | None:
        """The median, for heavy tails."""
        spread = _spread(embedded, 0.05)
        seen = (embedded.std(0, correction=0) > 1.5 * spread) & (spread > 0)
        return embedded.median(0).values if self.heavy_tailed or bool(seen.any()) else None

    def finish(self, embedded: Tensor, heavy: bool = False) -> Tensor:
        """Compress heavy tails."""
        return embedded.asinh() if self.heavy_tailed or heavy else embedded


def _spread(embedded: Tensor, tail: float) -> Tensor:
    """Standard deviation of a normal that has as much as each column between its quantiles ``tail`` and ``1 - tail``."""
    levels = torch.tensor([tail, 1 - tail], dtype=embedded.dtype, device=embedded.device)
    low, high = embedded.quantile(levels, dim=0)
    return (high - low) / (2 * statistics.NormalDist().inv_cdf(1 - tail))


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
    r"""``interval(low, high)``. Head: sigmoid, then affine. Embedding: :math:`\arcsin\sqrt p` of the position p, over its
    prior sd: Hellinger's, as on a simplex. The position itself is flat where the sigmoid saturates, and priors with mass at
    the ends, such as Beta(.5, .5), drove guides into them for good.
    """

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
        """Arcsine; its slopes at the ends, which are infinite, are bounded."""
        edge = 4 * torch.finfo(value.dtype).eps
        return self._position(value).clamp(edge, 1 - edge).sqrt().asin()

    def _position(self, value: Tensor) -> Tensor:
        return self.flatten((value - self.low) / (self.high - self.low))

    def inverse(self, value: Tensor) -> Tensor:
        """Logit of the position, kept finite at the ends."""
        return self._position(value).clamp(1e-6, 1 - 1e-6).logit()
