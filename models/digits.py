r"""Four priors for images of digits: archetypes, hypersphere, Gaussian, and a product of two.

Each function returns a plain Pyro model of images ``x`` of shape ``(n, num_pixels)`` with values in [0, 1]:

.. math:: z_i \sim \mathrm{prior}, \qquad x_i \sim N(\mathrm{sigmoid}(f_\theta(z_i)), \sigma^2 I),

with a perceptron :math:`f_\theta`, registered as ``decoder``. Only the prior differs. ``noise_scale`` is fixed: it
sets what a unit of reconstruction error costs against ``prior_weight``.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_sinkhorn.distributions import HypersphericalUniform

Model = Callable[[Tensor], None]


def decoder_network(dim: int, num_pixels: int = 64, hidden: int = 256) -> nn.Sequential:
    """Perceptron with two hidden layers: ``(..., dim)`` to logits ``(..., num_pixels)``."""
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, num_pixels)
    )


def dirichlet_archetypes(
    num_archetypes: int = 10, concentration: float = 0.5, num_pixels: int = 64, noise_scale: float = 0.2
) -> Model:
    r"""Images as mixtures of archetypes, :math:`z\sim\mathrm{Dirichlet}(\alpha,\dots,\alpha)`; the vertices of the
    simplex decode to the archetypes themselves.

    Cutler and Breiman 1994, *Archetypal analysis*; Patrini et al. 2019 fit MNIST with this prior.

    >>> model = dirichlet_archetypes()
    >>> model(torch.rand(3, 64))
    """
    decoder = decoder_network(num_archetypes, num_pixels)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        alpha = x.new_full((num_archetypes,), concentration)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(alpha))
            _observe(x, decoder(z), noise_scale)

    return model


def hypersphere(dim: int = 10, num_pixels: int = 64, noise_scale: float = 0.2) -> Model:
    """Directions, uniform on the sphere in ``dim`` dimensions: no centre where unlike images must meet.

    Davidson et al. 2018, *Hyperspherical variational auto-encoders*; Patrini et al. 2019.

    >>> model = hypersphere()
    >>> model(torch.rand(3, 64))
    """
    decoder = decoder_network(dim, num_pixels)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", HypersphericalUniform(dim, dtype=x.dtype, device=x.device))
            _observe(x, decoder(z), noise_scale)

    return model


def gaussian(dim: int = 10, num_pixels: int = 64, noise_scale: float = 0.2) -> Model:
    """The prior of the variational autoencoder (Kingma and Welling 2014), for comparison.

    >>> model = gaussian()
    >>> model(torch.rand(3, 64))
    """
    decoder = decoder_network(dim, num_pixels)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(dim), 1.0).to_event(1))
            _observe(x, decoder(z), noise_scale)

    return model


def sphere_and_normal(
    sphere_dim: int = 8, normal_dim: int = 2, num_pixels: int = 64, noise_scale: float = 0.2
) -> Model:
    """Two latents of unlike kinds, matched jointly: *what* on a sphere, *how* (slant, stroke) in a plane.

    The split of Patrini et al. 2019's digit program, without its canvas.

    >>> model = sphere_and_normal()
    >>> model(torch.rand(3, 64))
    """
    decoder = decoder_network(sphere_dim + normal_dim, num_pixels)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            what = pyro.sample("z_what", HypersphericalUniform(sphere_dim, dtype=x.dtype, device=x.device))
            how = pyro.sample("z_how", dist.Normal(x.new_zeros(normal_dim), 1.0).to_event(1))
            _observe(x, decoder(torch.cat([what, how], -1)), noise_scale)

    return model


def _observe(x: Tensor, logits: Tensor, noise_scale: float) -> None:
    pyro.sample("x", dist.Normal(logits.sigmoid(), noise_scale).to_event(1), obs=x)
