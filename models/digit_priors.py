r"""Images of digits under priors that no encoder with a density reaches easily: each keeps the shape it was meant to have.

.. math:: z_i \sim \mathrm{prior}, \qquad x_i \sim N(\mathrm{sigmoid}(f_\theta(\phi(z_i))), \sigma^2 I),

with coordinates :math:`\phi` that the decoder reads: cosines and sines of angles, entries of a triangle, logarithms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_sinkhorn.models.digits import decoder_network

Model = Callable[[Tensor], None]
#: Latent sites by name, made for images ``x``.
Priors = Callable[[Tensor], Mapping[str, Any]]


def digits_with(
    priors: Priors,
    features: Callable[..., Tensor],
    num_features: int,
    num_pixels: int = 64,
    noise_scale: float = 0.2,
) -> Model:
    """A model of images from any prior.

    :param priors: images to the distributions of the latent sites, by name
    :param features: values of the sites, in that order, to coordinates ``(n, num_features)`` for the decoder

    >>> model = digits_with(lambda x: {"z": dist.Laplace(x.new_zeros(3), 1.0).to_event(1)}, lambda z: z, 3)
    >>> model(torch.rand(5, 64))
    """
    decoder = decoder_network(num_features, num_pixels)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            values = [pyro.sample(name, prior) for name, prior in priors(x).items()]
            mean = decoder(features(*values)).sigmoid()
            pyro.sample("x", dist.Normal(mean, noise_scale).to_event(1), obs=x)

    return model


def correlation_digits(size: int = 5, concentration: float = 1.0) -> Model:
    """Every image a correlation matrix: its Cholesky factor has the law of Lewandowski, Kurowicka and Joe 2009.

    >>> correlation_digits()(torch.rand(3, 64))
    """
    rows, columns = torch.tril_indices(size, size)

    def features(z: Tensor) -> Tensor:
        return z[..., rows, columns]

    def priors(x: Tensor) -> Mapping[str, Any]:
        return {"z": dist.LKJCholesky(size, x.new_tensor(concentration))}

    return digits_with(priors, features, len(rows))


def torus_digits(num_angles: int = 8, concentration: float = 1.0) -> Model:
    """Every image a point of a torus: angles of von Mises laws (Mardia and Jupp 2000, *Directional statistics*).

    >>> torus_digits()(torch.rand(3, 64))
    """

    def priors(x: Tensor) -> Mapping[str, Any]:
        return {"z": dist.VonMises(x.new_zeros(num_angles), x.new_tensor(concentration)).to_event(1)}

    return digits_with(priors, lambda z: torch.cat([z.cos(), z.sin()], -1), 2 * num_angles)


def switch_digits(num_switches: int = 10, concentration: float = 0.5) -> Model:
    """Every image a row of switches, mostly near 0 or 1: Beta(.5, .5), the arcsine law.

    >>> switch_digits()(torch.rand(3, 64))
    """

    def priors(x: Tensor) -> Mapping[str, Any]:
        alpha = x.new_full((num_switches,), concentration)
        return {"z": dist.Beta(alpha, alpha).to_event(1)}

    return digits_with(priors, lambda z: 2 * z - 1, num_switches)


def strength_and_parts_digits(num_parts: int = 9) -> Model:
    """Shares of parts, Dirichlet, and a strength with heavy tails, half-Cauchy: two sites matched jointly.

    >>> strength_and_parts_digits()(torch.rand(3, 64))
    """

    def priors(x: Tensor) -> Mapping[str, Any]:
        return {
            "strength": dist.HalfCauchy(x.new_ones(())),
            "parts": dist.Dirichlet(x.new_full((num_parts,), 0.5)),
        }

    def features(strength: Tensor, parts: Tensor) -> Tensor:
        return torch.cat([strength.log().unsqueeze(-1), 2 * parts - 1], -1)

    return digits_with(priors, features, num_parts + 1)


def mixture_digits(num_components: int = 10, dim: int = 10, separation: float = 3.0) -> Model:
    """Images in clusters: a mixture of normals around the vertices of a simplex, without a relaxed choice.

    >>> mixture_digits()(torch.rand(3, 64))
    """

    def priors(x: Tensor) -> Mapping[str, Any]:
        centres = separation * torch.eye(num_components, dim, dtype=x.dtype, device=x.device)
        components = dist.Normal(centres, x.new_tensor(0.5)).to_event(1)
        return {"z": dist.MixtureSameFamily(dist.Categorical(logits=x.new_zeros(num_components)), components)}

    return digits_with(priors, lambda z: z, dim)


class OrderedNormal(dist.TorchDistribution):
    """Order statistics of independent standard normals: increasing vectors."""

    arg_constraints: dict[str, Any] = {}
    has_rsample = True
    support = dist.constraints.ordered_vector

    def __init__(self, dim: int, like: Tensor) -> None:
        self.like = like.new_zeros(())
        super().__init__(torch.Size(), torch.Size([dim]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> OrderedNormal:
        """The same law for every slice."""
        new = OrderedNormal(self.event_shape[0], self.like)
        super(OrderedNormal, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Sorted draws."""
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        return torch.randn(shape, dtype=self.like.dtype, device=self.like.device).sort(-1).values


def ranked_digits(dim: int = 8) -> Model:
    """Every image an increasing vector, the sorted draws of a normal.

    >>> ranked_digits()(torch.rand(3, 64))
    """

    def priors(x: Tensor) -> Mapping[str, Any]:
        return {"z": OrderedNormal(dim, x)}

    return digits_with(priors, lambda z: z, dim)
