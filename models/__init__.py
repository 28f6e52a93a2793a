"""Ready-made generative programs; plain Pyro functions, to use or to copy."""

from pyro_sinkhorn.models.digit_priors import (
    correlation_digits,
    digits_with,
    mixture_digits,
    ranked_digits,
    strength_and_parts_digits,
    switch_digits,
    torus_digits,
)
from pyro_sinkhorn.models.digits import (
    decoder_network,
    dirichlet_archetypes,
    gaussian,
    hypersphere,
    sphere_and_normal,
)
from pyro_sinkhorn.models.ellipsoids import ellipsoid_radii, ellipsoids, spread_points
from pyro_sinkhorn.models.image_generator import image_generator, latent_grid
from pyro_sinkhorn.models.simulators import (
    g_and_k,
    g_and_k_quantile,
    lotka_volterra,
    simulate_lotka_volterra,
)
from pyro_sinkhorn.models.topics import (
    BagOfWords,
    SoftmaxNormalGuide,
    TopicDecoder,
    TopicEncoder,
    prod_lda,
    prod_lda_normal,
)

__all__ = [
    "BagOfWords",
    "SoftmaxNormalGuide",
    "TopicDecoder",
    "TopicEncoder",
    "correlation_digits",
    "decoder_network",
    "digits_with",
    "dirichlet_archetypes",
    "ellipsoid_radii",
    "ellipsoids",
    "g_and_k",
    "g_and_k_quantile",
    "gaussian",
    "hypersphere",
    "image_generator",
    "latent_grid",
    "lotka_volterra",
    "mixture_digits",
    "prod_lda",
    "prod_lda_normal",
    "ranked_digits",
    "simulate_lotka_volterra",
    "sphere_and_normal",
    "spread_points",
    "strength_and_parts_digits",
    "switch_digits",
    "torus_digits",
]
