r"""Sparse factors: every datum switches a few of them on."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

Model = Callable[[Tensor], None]


def spike_and_slab(
    num_factors: int = 4,
    dim: int = 12,
    share: float = 0.4,
    noise_scale: float = 0.2,
    start: Tensor | None = None,
) -> Model:
    r"""Linear factors, each of which is exactly zero for most data:

    .. math::

        s_{ik} \sim \mathrm{Bernoulli}(\pi), \qquad f_{ik} \sim N(0, 1), \qquad
        x_i \sim N\Bigl(\sum_k s_{ik} f_{ik} w_k,\; \sigma^2 I\Bigr).

    All :math:`2^K` patterns of switches are enumerated by ``TraceEnum_Sinkhorn``, so keep :math:`K` small.

    :param num_factors: :math:`K`
    :param dim: of a datum
    :param share: :math:`\pi`, of the data that a factor is on for
    :param noise_scale: :math:`\sigma`
    :param start: where the loadings start, ``(num_factors, dim)``; by default drawn from a standard normal
    :returns: a model of data ``x``, ``(n, dim)``, with latents ``switches`` and ``strengths``, ``(n, num_factors)``, and a
        parameter ``loadings`` :math:`w`, ``(num_factors, dim)``
    :raises ValueError: ``start`` of another shape

    Mitchell and Beauchamp 1988, *Bayesian variable selection in linear regression*, for the prior; Titsias and
    Lázaro-Gredilla 2011, *Spike and slab variational inference for multi-task and multiple kernel learning*, for factors
    below it.

    >>> spike_and_slab(2, 5)(torch.randn(3, 5))
    """
    if start is not None and start.shape != (num_factors, dim):
        raise ValueError(
            f"start has shape {tuple(start.shape)}: expected {(num_factors, dim)}, a row a factor"
        )

    def model(x: Tensor) -> None:
        first = torch.randn(num_factors, dim) if start is None else start.detach().clone()
        loadings = pyro.param("loadings", lambda: first.to(x))
        with pyro.plate("data", len(x)):
            switches = pyro.sample("switches", dist.Bernoulli(x.new_full((num_factors,), share)).to_event(1))
            strengths = pyro.sample("strengths", dist.Normal(x.new_zeros(num_factors), 1.0).to_event(1))
            mean = (switches * strengths) @ loadings
            pyro.sample("x", dist.Normal(mean, noise_scale).to_event(1), obs=x)

    return model
