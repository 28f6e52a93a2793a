"""Draws of a guide brought closer to the posterior by Markov chains that start from them."""

from pyro_sinkhorn.refinement.refine import refine
from pyro_sinkhorn.refinement.report import BlockReport, Refined

__all__ = ["BlockReport", "Refined", "refine"]
