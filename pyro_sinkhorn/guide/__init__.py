"""Guides without a density."""

from pyro_sinkhorn.guide.auto_implicit import AutoImplicit
from pyro_sinkhorn.guide.auto_posterior import AutoPosterior

__all__ = ["AutoImplicit", "AutoPosterior"]
