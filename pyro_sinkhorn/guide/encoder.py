"""Networks of the implicit guide: standardise, encode, mix with noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_sinkhorn.errors import ProgramError


class Standardise(nn.Module):
    r"""Robust standardisation, :math:`\operatorname{asinh}((x - m)/s)`, fitted once and stored with the weights.

    ``m`` is the median and ``s`` the mean absolute deviation from it, feature by feature. Simulated data can be
    wildly scaled (a half-Cauchy scale spans decades): asinh is linear in the bulk and logarithmic in the tails. A
    feature that hardly varies in the first batch, such as a border pixel, gets a floor of a quarter of the average
    deviation, so that its first appearance is not an explosion. NaN stands for a missing value, and becomes the median, 0.

    :param where_heavy: compress only features whose tails are heavier than a Laplace's when fitted: what is linear in the data,
        as the posterior mean of a normal, then stays so
    """

    loc: Tensor
    scale: Tensor
    light: Tensor

    def __init__(self, n_features: int, where_heavy: bool = False) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))
        self.where_heavy = where_heavy
        if where_heavy:
            self.register_buffer("light", torch.zeros(n_features, dtype=torch.bool))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Estimate from rows ``(n, n_features)``; infinite or missing entries are left out."""
        x = x.detach().to(self.loc.dtype)
        x = torch.where(x.isfinite(), x, x.new_full((), torch.nan))
        loc = x.nanmedian(0).values.nan_to_num()
        deviation = (x - loc).abs().nanmean(0).nan_to_num()
        average = deviation.mean()
        scale = deviation.clamp_min(float(0.25 * average)) if average > 0 else torch.ones_like(deviation)
        self.loc.copy_(loc)
        self.scale.copy_(scale)
        if self.where_heavy:
            # 10 mean deviations: e^-10 of a Laplace lies there, a hundredth of a StudentT(2).
            far = ((x - loc).abs() > 10 * scale).to(x.dtype).mean(0)
            self.light.copy_(far < 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., n_features)`` to the same shape."""
        x = x.to(self.loc.dtype)
        x = (torch.where(x.isnan(), self.loc, x) - self.loc) / self.scale
        return torch.where(self.light, x, x.asinh()) if self.where_heavy else x.asinh()


class DefaultEncoder(nn.Module):
    """Standardised features through a multi-layer perceptron: ``(..., n_features)`` to ``(..., width)``.

    The width follows the data (between 64 and 512), so that the default is neither a toy on images nor a monster on
    a two-dimensional simulator.
    """

    def __init__(self, n_features: int, width: int | None = None) -> None:
        super().__init__()
        width = width or int(min(512, max(64, 2 ** (2 * n_features - 1).bit_length())))
        self.standardise = Standardise(n_features)
        self.layers = nn.Sequential(
            nn.Linear(n_features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.LayerNorm(width)
        )
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Features to code."""
        return self.layers(self.standardise(x))


def perceptron(width: int, hidden: int, num_out: int) -> nn.Sequential:
    """Two hidden layers: ``(..., width)`` to ``(..., num_out)``."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, num_out)
    )


class NoiseHead(nn.Module):
    r"""Code and noise to the raw outputs of all latents of a group, jointly.

    A perceptron of both plus a linear map of each: with the perceptron near zero at first, the outputs start as a
    random projection of the noise around the code, with about unit variance, and then in the prior's own scale:
    ``loc + scale * (...)`` where loc and scale are those of the prior in raw space.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, width: int, noise_dim: int, num_raw: int, hidden: int = 128) -> None:
        super().__init__()
        self.mixed = perceptron(width + noise_dim, hidden, num_raw)
        self.direct = nn.Linear(width + noise_dim, num_raw)
        self.register_buffer("loc", torch.zeros(num_raw))
        self.register_buffer("scale", torch.ones(num_raw))

    def forward(self, code: Tensor, noise: Tensor | None) -> Tensor:
        """``(..., width)`` and ``(..., noise_dim)`` to ``(..., num_raw)``."""
        both = code if noise is None else joined(code, noise)
        return self.loc + self.scale * (self.direct(both) + self.mixed(both))


def joined(*tensors: Tensor) -> Tensor:
    """Side by side along the last dimension, after broadcasting all others."""
    if len(tensors) == 1:
        return tensors[0]
    if any(tensor.shape[:-1] != tensors[0].shape[:-1] for tensor in tensors):
        shape = torch.broadcast_shapes(*(tensor.shape[:-1] for tensor in tensors))
        tensors = tuple(tensor.expand(*shape, tensor.shape[-1]) for tensor in tensors)
    return torch.cat(tensors, -1)


def check_device(module: nn.Module, read: Any) -> None:
    """Refuse to mix devices, naming both.

    :raises ProgramError: the module is elsewhere than what it is to read
    """
    parameter = next(module.parameters(), None)
    if isinstance(read, Tensor) and parameter is not None and read.device != parameter.device:
        raise ProgramError(
            f"the encoder's parameters are on {parameter.device} and the observed values, of shape {tuple(read.shape)}, "
            f"on {read.device}: move one of them, for example with x.to({str(parameter.device)!r})"
        )
