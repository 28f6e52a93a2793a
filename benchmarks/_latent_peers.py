"""Peers of latent matching that several benchmarks share: WAE's penalty on the same clouds, and a guide for the ELBO."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_sinkhorn.guide.encoder import DefaultEncoder, perceptron
from pyro_sinkhorn.losses.latent_match import LatentMatch


def multiquadric_mmd(x: Tensor, y: Tensor, mean: Tensor | float) -> Tensor:
    r"""Unbiased squared MMD of clouds ``(..., n, d)``, ``(..., m, d)``: one value a batch.

    The kernel is that of Tolstikhin et al. 2018, :math:`\sum_s sc/(sc+\|x-y\|^2)` over seven scales s around the mean
    cost c between prior draws.
    """

    def kernel(p: Tensor, q: Tensor) -> Tensor:
        cost = torch.cdist(p, q).square()
        return sum(s * mean / (s * mean + cost) for s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0))

    def off_diagonal(k: Tensor, n: int) -> Tensor:
        return (k.sum((-2, -1)) - k.diagonal(dim1=-2, dim2=-1).sum(-1)) / (n * (n - 1))

    n, m = x.shape[-2], y.shape[-2]
    return off_diagonal(kernel(x, x), n) + off_diagonal(kernel(y, y), m) - 2 * kernel(x, y).mean((-2, -1))


class MMDMatch(LatentMatch):
    """WAE-MMD's penalty on the same clouds: unbiased MMD with the sum of inverse multiquadrics of Tolstikhin 2018."""

    def divergence(
        self, x: Any, y: Any, mean: Tensor, group: str, paired: bool, cost: Any = "sqeuclidean"
    ) -> Tensor:
        """One value a particle; the scale of the kernels is the mean prior-prior cost."""
        return multiquadric_mmd(x.points, y.points, mean)


class NormalGuide(nn.Module):
    """Mean-field normal guide with the encoder of AutoImplicit's size, for the ELBO.

    :param encoder: a network with an attribute ``width``; by default that of ``AutoImplicit``, without standardisation
    """

    def __init__(
        self, dim: int, num_pixels: int = 64, hidden: int = 128, encoder: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.encoder: Any = DefaultEncoder(num_pixels) if encoder is None else encoder
        width = self.encoder.width
        self.mixed = perceptron(width, hidden, 2 * dim)
        self.direct = nn.Linear(width, 2 * dim)

    def forward(self, x: Tensor) -> None:
        """Sample z given images."""
        pyro.module("normal_guide", self)
        code = self.encoder(x)
        loc, log_scale = (self.direct(code) + self.mixed(code)).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
