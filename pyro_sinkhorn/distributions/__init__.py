"""Distributions that Pyro lacks and this package needs: on the sphere, over listed states, and without a density."""

from pyro_sinkhorn.distributions.finite import Finite
from pyro_sinkhorn.distributions.hyperspherical_uniform import HypersphericalUniform
from pyro_sinkhorn.distributions.implicit import Implicit
from pyro_sinkhorn.distributions.von_mises_fisher import VonMisesFisher

__all__ = ["Finite", "HypersphericalUniform", "Implicit", "VonMisesFisher"]
