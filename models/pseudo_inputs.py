r"""A prior that is learned: a mixture whose components are the codes of pseudo-inputs, images that are learned as well."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_sinkhorn.models.digits import decoder_network

Model = Callable[[Tensor], None]


def pseudo_input_digits(
    num_components: int = 16,
    dim: int = 8,
    num_pixels: int = 64,
    noise_scale: float = 0.2,
    start: Tensor | None = None,
) -> Model:
    r"""Images of digits below a mixture of normals that a network makes of pseudo-inputs :math:`u_k`:

    .. math::

        z_i \sim \frac1K \sum_k N\bigl(m_\phi(u_k), \mathrm{diag}\,s_\phi(u_k)^2\bigr), \qquad
        x_i \sim N(\mathrm{sigmoid}(f_\theta(z_i)), \sigma^2 I).

    The means are standardised over the components, coordinate by coordinate. Otherwise prior and codes could shrink
    together, and any match with them; the size of the latents means nothing to the decoder.

    :param num_components: :math:`K`
    :param dim: of the latents
    :param start: images that pseudo-inputs start from, ``(num_components, num_pixels)``, strictly between 0 and 1, such as
        data kept off the edges; by default random ones
    :returns: a model of images ``x``, ``(n, num_pixels)``, with values in [0, 1], latents ``z``, ``(n, dim)``, and
        a parameter ``pseudo_inputs``, ``(num_components, num_pixels)``
    :raises ValueError: ``start`` of another shape

    Tomczak and Welling 2018, *VAE with a VampPrior*. There the network is the encoder; here the encoder has no density to
    mix, so the prior has a network of its own. Draws are differentiable through the choice of the component
    (``MixtureOfDiagNormals``, Jankowiak and Karaletsos 2019, *Pathwise derivatives for multivariate distributions*).

    >>> pseudo_input_digits(4)(torch.rand(3, 64))
    """
    if start is not None and start.shape != (num_components, num_pixels):
        raise ValueError(
            f"start has shape {tuple(start.shape)}: expected {(num_components, num_pixels)}, a row a component"
        )
    decoder = decoder_network(dim, num_pixels)
    prior = nn.Sequential(nn.Linear(num_pixels, 64), nn.SiLU(), nn.Linear(64, 2 * dim))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        pyro.module("prior", prior)
        images = torch.rand(num_components, num_pixels) * 0.9 + 0.05 if start is None else start
        u = pyro.param("pseudo_inputs", lambda: images.to(x), constraint=constraints.unit_interval)
        means, raw = prior(u).chunk(2, -1)
        means = (means - means.mean(-2, keepdim=True)) / means.std(-2, keepdim=True)
        law = dist.MixtureOfDiagNormals(means, 0.05 + 0.95 * raw.sigmoid(), x.new_zeros(num_components))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", law)
            pyro.sample("x", dist.Normal(decoder(z).sigmoid(), noise_scale).to_event(1), obs=x)

    return model
