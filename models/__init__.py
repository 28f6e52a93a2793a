"""Ready-made generative programs; plain Pyro functions, to use or to copy."""

from pyro_sinkhorn.models.canvas import GlimpseEncoder, canvas_digits, cut_from_canvas, place_on_canvas
from pyro_sinkhorn.models.covariance import lkj_covariance
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
from pyro_sinkhorn.models.digits_conditional import conditional_digits, semi_supervised_digits
from pyro_sinkhorn.models.directions import circular_walk, even_directions, sun_sensors
from pyro_sinkhorn.models.ellipsoids import ellipsoid_radii, ellipsoids, spread_points
from pyro_sinkhorn.models.epidemic import epidemic, simulate_epidemic
from pyro_sinkhorn.models.factors import spike_and_slab
from pyro_sinkhorn.models.hierarchical import growth_curves
from pyro_sinkhorn.models.image_generator import image_generator, latent_grid
from pyro_sinkhorn.models.mixtures import gaussian_mixture
from pyro_sinkhorn.models.posteriors import (
    eight_schools,
    eight_schools_data,
    regression_with_globals,
    two_moons,
    two_moons_posterior,
)
from pyro_sinkhorn.models.pseudo_inputs import pseudo_input_digits
from pyro_sinkhorn.models.simulators import (
    g_and_k,
    g_and_k_quantile,
    lotka_volterra,
    simulate_lotka_volterra,
)
from pyro_sinkhorn.models.state_space import simulate_state_space, state_space, van_der_pol_step
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
    "GlimpseEncoder",
    "SoftmaxNormalGuide",
    "TopicDecoder",
    "TopicEncoder",
    "canvas_digits",
    "circular_walk",
    "conditional_digits",
    "correlation_digits",
    "cut_from_canvas",
    "decoder_network",
    "digits_with",
    "dirichlet_archetypes",
    "eight_schools",
    "eight_schools_data",
    "ellipsoid_radii",
    "ellipsoids",
    "epidemic",
    "even_directions",
    "g_and_k",
    "g_and_k_quantile",
    "gaussian",
    "gaussian_mixture",
    "growth_curves",
    "hypersphere",
    "image_generator",
    "latent_grid",
    "lkj_covariance",
    "lotka_volterra",
    "mixture_digits",
    "place_on_canvas",
    "prod_lda",
    "prod_lda_normal",
    "pseudo_input_digits",
    "ranked_digits",
    "regression_with_globals",
    "semi_supervised_digits",
    "simulate_epidemic",
    "simulate_lotka_volterra",
    "simulate_state_space",
    "sphere_and_normal",
    "spike_and_slab",
    "spread_points",
    "state_space",
    "strength_and_parts_digits",
    "sun_sensors",
    "switch_digits",
    "torus_digits",
    "two_moons",
    "two_moons_posterior",
    "van_der_pol_step",
]
