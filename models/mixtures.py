r"""A mixture with its choice kept: which component a datum came from is a discrete latent, not summed out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

Model = Callable[[Tensor], None]


def gaussian_mixture(
    num_components: int = 3, dim: int = 4, shares: Tensor | None = None, start: Tensor | None = None
) -> Model:
    r"""Points in clusters:

    .. math:: z_i \sim \mathrm{Categorical}(\pi), \qquad x_i \sim N(c_{z_i}, \mathrm{diag}\,s_{z_i}^2).

    Under ``TraceEnum_Sinkhorn`` the shares :math:`\pi` are what the clusters of all data are matched to: no cluster can die
    or swallow another, which the likelihood alone would allow.

    :param num_components: :math:`K`
    :param dim: of a point
    :param shares: :math:`\pi`, ``(num_components,)``, known; by default equal
    :param start: where the centres start, ``(num_components, dim)``, such as :func:`~pyro_sinkhorn.models.spread_points` of
        the data; by default drawn from a standard normal
    :returns: a model of points ``x``, ``(n, dim)``, with latents ``z``, ``(n,)``, integers, and parameters ``centres``
        :math:`c` and ``scales`` :math:`s`, ``(num_components, dim)``
    :raises ValueError: ``shares`` or ``start`` of another shape

    McLachlan and Peel 2000, *Finite mixture models*; balanced clusters as transport, Genevay, Dulac-Arnold and Vert 2019,
    *Differentiable deep clustering with cluster size constraints*.

    >>> gaussian_mixture(2, 3)(torch.randn(5, 3))
    """
    if shares is not None and shares.shape != (num_components,):
        raise ValueError(f"shares have shape {tuple(shares.shape)}: expected {(num_components,)}")
    if start is not None and start.shape != (num_components, dim):
        raise ValueError(
            f"start has shape {tuple(start.shape)}: expected {(num_components, dim)}, a row a component"
        )

    def model(x: Tensor) -> None:
        first = torch.randn(num_components, dim) if start is None else start.detach().clone()
        centres = pyro.param("centres", lambda: first.to(x))
        scales = pyro.param(
            "scales", lambda: x.new_ones(num_components, dim), constraint=constraints.positive
        )
        weights = x.new_ones(num_components) / num_components if shares is None else shares.to(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(centres[z], scales[z]).to_event(1), obs=x)

    return model
