"""Ready-made generative programs; plain Pyro functions, to use or to copy."""

from pyro_sinkhorn.models.digits import (
    decoder_network,
    dirichlet_archetypes,
    gaussian,
    hypersphere,
    sphere_and_normal,
)

__all__ = ["decoder_network", "dirichlet_archetypes", "gaussian", "hypersphere", "sphere_and_normal"]
