"""Networks of the posterior guide: a residual head that mixes noise in, and an encoder of whole data sets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_sinkhorn.guide.encoder import Standardise, perceptron


class ResidualBlock(nn.Module):
    r""":math:`h + W_2\,\mathrm{silu}(W_1\,\mathrm{norm}(h))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.Linear(width, width)
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), last)
        nn.init.zeros_(last.weight)  # the identity at first, at any depth
        nn.init.zeros_(last.bias)

    def forward(self, h: Tensor) -> Tensor:
        """``(..., width)`` to the same shape."""
        return h + self.layers(h)


class ResidualHead(nn.Module):
    r"""Context and noise to the raw outputs of all latents of a block, jointly.

    Residual blocks on both, plus a linear map of both, which alone is the posterior of a linear-Gaussian program. Outputs
    start in the prior's own scale, ``loc + scale * (...)``, as those of :class:`~pyro_sinkhorn.guide.encoder.NoiseHead`;
    those marked ``heavy`` pass a hyperbolic sine first, which undoes the compression of heavy-tailed inputs.
    """

    loc: Tensor
    scale: Tensor
    heavy: Tensor

    def __init__(self, width: int, noise_dim: int, num_raw: int, hidden: int, depth: int) -> None:
        super().__init__()
        # Apart, since the context is the same for all draws.
        self.context, self.noise = nn.Linear(width, hidden), nn.Linear(noise_dim, hidden, bias=False)
        self.blocks = nn.Sequential(*[ResidualBlock(hidden) for _ in range(depth)])
        self.last = nn.Sequential(nn.LayerNorm(hidden), nn.SiLU(), nn.Linear(hidden, num_raw))
        self.direct = nn.Linear(width, num_raw)
        self.direct_noise = nn.Linear(noise_dim, num_raw, bias=False)
        self.register_buffer("loc", torch.zeros(num_raw))
        self.register_buffer("scale", torch.ones(num_raw))
        self.register_buffer("heavy", torch.zeros(num_raw, dtype=torch.bool))

    def forward(self, context: Tensor, noise: Tensor | None) -> Tensor:
        """``(..., width)`` and ``(..., noise_dim)`` to ``(..., num_raw)``."""
        h, raw = self.context(context), self.direct(context)
        if noise is not None:
            h, raw = h + self.noise(noise), raw + self.direct_noise(noise)
        raw = raw + self.last(self.blocks(h))
        raw = torch.where(self.heavy, raw.clamp(-30, 30).sinh(), raw)
        return self.loc + self.scale * raw


class SetEncoder(nn.Module):
    r"""Rows of a data set to one code, whatever their order and number (Zaheer et al. 2017, *Deep sets*).

    Rows are standardised, pass a perceptron, are averaged along the innermost plate, pass another, and so on outwards:

    .. math:: c = \bigl(\tfrac1n \sum_i h(x_i),\ \tfrac1n \sum_i x_i,\ \log n\bigr).

    Features themselves are averaged beside, so that what is linear in sums of the data is linear in the code. The logarithm
    of the number of rows lets the guide narrow as data come in. Rows that a mask leaves nothing of are not counted; zeros
    and covariates beside missing values do not tell which these are, so it is said.
    """

    def __init__(self, n_features: int, num_plates: int, width: int) -> None:
        super().__init__()
        self.standardise = Standardise(n_features, where_heavy=True)
        sizes = [n_features + i * (width + 1) for i in range(num_plates)]
        self.layers = nn.ModuleList([perceptron(size, width, width) for size in sizes])
        self.width = n_features + num_plates * (width + 1)

    def forward(self, rows: Tensor, dims: list[int], counted: Tensor | None = None) -> Tensor:
        """``(..., plates, n_features)`` to the same with plates of size 1 and ``width`` columns.

        :param dims: batch dimensions of the plates, innermost first
        :param counted: rows that count, ``(plates,)``; None for all
        """
        counts = rows.new_ones((*rows.shape[:-1], 1))
        counts = counts if counted is None else counts * counted.unsqueeze(-1).to(rows)
        h = self.standardise(rows)
        for layer, dim in zip(self.layers, dims, strict=True):
            n = counts.sum(dim - 1, keepdim=True)
            beside = torch.cat([layer(h), h], -1)
            mean = (beside * counts).sum(dim - 1, keepdim=True) / n.clamp_min(1)
            h = torch.cat([mean, n.clamp_min(1).log()], -1)
            counts = (n > 0).to(rows)
        return h
