"""Supports: how a latent is produced by a network and compared with another."""

from pyro_sinkhorn.geometry.base import Elementwise, Geometry
from pyro_sinkhorn.geometry.curved import Circle, Simplex, Sphere
from pyro_sinkhorn.geometry.elementwise import HalfLine, Interval, Real
from pyro_sinkhorn.geometry.registry import geometry_of, register_geometry

__all__ = [
    "Circle",
    "Elementwise",
    "Geometry",
    "HalfLine",
    "Interval",
    "Real",
    "Simplex",
    "Sphere",
    "geometry_of",
    "register_geometry",
]
