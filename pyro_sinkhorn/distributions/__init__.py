"""Distributions that Pyro lacks and this package needs: two on the sphere, and one without a density."""

from pyro_sinkhorn.distributions.hyperspherical_uniform import HypersphericalUniform
from pyro_sinkhorn.distributions.implicit import Implicit
from pyro_sinkhorn.distributions.von_mises_fisher import VonMisesFisher

__all__ = ["HypersphericalUniform", "Implicit", "VonMisesFisher"]
