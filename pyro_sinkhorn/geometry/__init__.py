"""Supports: how a latent is produced by a network and compared with another."""

from pyro_sinkhorn.geometry.base import Elementwise, Geometry
from pyro_sinkhorn.geometry.composite import Pieces
from pyro_sinkhorn.geometry.curved import Circle, Simplex, Sphere
from pyro_sinkhorn.geometry.discrete import Boolean, Counts, Discrete, Integers, OneHot
from pyro_sinkhorn.geometry.elementwise import HalfLine, Interval, Real
from pyro_sinkhorn.geometry.matrices import (
    CorrCholesky,
    CorrMatrix,
    LowerCholesky,
    LowerTriangular,
    PositiveDefinite,
)
from pyro_sinkhorn.geometry.ordered import Ordered, PositiveOrdered
from pyro_sinkhorn.geometry.registry import geometry_of, register_geometry

__all__ = [
    "Boolean",
    "Circle",
    "CorrCholesky",
    "CorrMatrix",
    "Counts",
    "Discrete",
    "Elementwise",
    "Geometry",
    "HalfLine",
    "Integers",
    "Interval",
    "LowerCholesky",
    "LowerTriangular",
    "OneHot",
    "Ordered",
    "Pieces",
    "PositiveDefinite",
    "PositiveOrdered",
    "Real",
    "Simplex",
    "Sphere",
    "geometry_of",
    "register_geometry",
]
