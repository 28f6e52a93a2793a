r"""Directions as latents: on the sphere, of a light seen by a few cells; on the circle, of a wind that turns.

Neither prior reparametrises, and an angle has no mean that could be shifted: the usual way out, a normal that is
normalised afterwards, is another prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_sinkhorn.distributions import VonMisesFisher

Model = Callable[[Tensor], None]


def sun_sensors(num_sensors: int = 12, concentration: float = 2.0, noise_scale: float = 0.05) -> Model:
    r"""Where the light comes from, from cells that look in known directions :math:`n_m`:

    .. math::

        z_i \sim \mathrm{vMF}(e_3, \kappa), \qquad x_{im} \sim N\bigl(g_m \max(0, n_m^\top z_i), \sigma^2\bigr).

    A cell in the shade reads zero. The gains :math:`g_m` are a positive parameter ``gains``, 1 at first.

    :param num_sensors: cells, looking evenly in all directions (:func:`even_directions`); each direction must be seen by
        three of them, so at least 9
    :param concentration: :math:`\kappa`, around the third axis
    :param noise_scale: :math:`\sigma`
    :returns: a model of readings ``x``, ``(n, num_sensors)``, with latents ``z``, ``(n, 3)``

    Fisher 1953, *Dispersion on a sphere*; Mardia and Jupp 2000, *Directional statistics*; coarse sun sensors of
    satellites work like this, Wertz 1978, *Spacecraft attitude determination and control*.

    >>> sun_sensors()(torch.rand(5, 12))
    """
    normals = even_directions(num_sensors)

    def model(x: Tensor) -> None:
        gains = pyro.param("gains", lambda: x.new_ones(num_sensors), constraint=constraints.positive)
        pole = x.new_tensor([0.0, 0.0, 1.0])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", VonMisesFisher(pole, x.new_tensor(concentration)))
            reading = gains * (z @ normals.to(z).mT).clamp_min(0)
            pyro.sample("x", dist.Normal(reading, noise_scale).to_event(1), obs=x)

    return model


def even_directions(num: int) -> Tensor:
    """Unit vectors ``(num, 3)`` spread evenly over the sphere, on a spiral of the golden angle.

    >>> even_directions(100).mean(0).norm() < 0.01
    tensor(True)
    """
    i = torch.arange(num, dtype=torch.get_default_dtype())
    height = 1 - (2 * i + 1) / num
    angle = math.pi * (3 - math.sqrt(5)) * i
    radius = (1 - height.square()).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin(), height], -1)


def circular_walk(num_steps: int = 8, steadiness: float = 16.0, precision: float = 2.0) -> Model:
    r"""A direction that turns a little at every step, and is seen through noise: a random walk on the circle,

    .. math::

        z_0 \sim \mathrm{vM}(0, 1), \quad z_t \sim \mathrm{vM}(z_{t-1}, \kappa), \quad x_t \sim \mathrm{vM}(z_t, \lambda).

    :param num_steps: length of a series
    :param steadiness: :math:`\kappa`; a step has a standard deviation of about :math:`1/\sqrt\kappa` radians
    :param precision: :math:`\lambda` of an observation
    :returns: a model of series of angles ``x`` in radians, ``(n, num_steps)``, with latents ``z_0``, ``z_1``, ..., each
        ``(n,)``. An encoder should read their cosines and sines, since -3.1 and 3.1 are neighbours:
        ``AutoImplicit(model, encoder_input=lambda x: torch.cat([x.cos(), x.sin()], -1))``

    Breckling 1989, *The analysis of directional time series: applications to wind speed and direction*; Kurz, Gilitschenski
    and Hanebeck 2016, *Recursive Bayesian filtering in circular state spaces*.

    >>> circular_walk(3)(torch.tensor([[0.1, 0.5, -3.0], [3.0, -3.1, 3.0]]))
    """

    def model(x: Tensor) -> None:
        mean, concentration = x.new_zeros(()), x.new_ones(())
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(num_steps)):
                z = pyro.sample(f"z_{t}", dist.VonMises(mean, concentration))
                pyro.sample(f"x_{t}", dist.VonMises(z, x.new_tensor(precision)), obs=x[:, t])
                mean, concentration = z, x.new_tensor(steadiness)

    return model
