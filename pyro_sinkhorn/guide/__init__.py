"""Guides that need no density."""

from pyro_sinkhorn.guide.auto_implicit import AutoImplicit

__all__ = ["AutoImplicit"]
