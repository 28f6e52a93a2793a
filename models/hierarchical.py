r"""Random effects: subjects that differ, below globals that say how much."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
from torch import Tensor

Model = Callable[[Tensor, Tensor], None]


def growth_curves(noise_scale: float = 0.5) -> Model:
    r"""Straight lines, one a subject, measured at common times :math:`t_j`:

    .. math::

        \mu \sim N(0, 5^2 I_2), \quad \tau_k \sim \mathrm{HalfNormal}(2), \quad b_i \sim N(\mu, \mathrm{diag}\,\tau^2),
        \quad x_{ij} \sim N(b_{i1} + b_{i2} t_j, \sigma^2).

    The globals ``mean`` :math:`\mu` and ``spread`` :math:`\tau` are scored with their densities; the effects are matched
    to their law below them.

    :param noise_scale: :math:`\sigma`, of a measurement
    :returns: a model of measurements ``x``, ``(n, num_times)``, at ``times``, ``(num_times,)``, with globals ``mean`` and
        ``spread``, ``(2,)``, and latents ``effects`` in the plate ``subjects``, ``(n, 2)``: intercept and slope

    Laird and Ware 1982, *Random-effects models for longitudinal data*.

    >>> import torch
    >>> growth_curves()(torch.randn(5, 4), torch.arange(4.0))
    """

    def model(x: Tensor, times: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(2), 5.0).to_event(1))
        spread = pyro.sample("spread", dist.HalfNormal(x.new_full((2,), 2.0)).to_event(1))
        with pyro.plate("subjects", len(x)):
            effects = pyro.sample("effects", dist.Normal(mean, spread).to_event(1))
            line = effects[..., :1] + effects[..., 1:] * times
            pyro.sample("x", dist.Normal(line, noise_scale).to_event(1), obs=x)

    return model
