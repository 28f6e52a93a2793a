"""Pyro programs with any prior you can sample, fitted by matching clouds of latents with optimal transport."""

from pyro_sinkhorn.decorator import sinkhorn_infer
from pyro_sinkhorn.distributions import Implicit
from pyro_sinkhorn.export import to_arviz
from pyro_sinkhorn.geometry import register_geometry
from pyro_sinkhorn.guide import AutoImplicit, AutoPosterior
from pyro_sinkhorn.losses import (
    Trace_DataSinkhorn,
    Trace_EnergyScore,
    Trace_JointSinkhorn,
    Trace_Sinkhorn,
    TraceEnum_Sinkhorn,
)
from pyro_sinkhorn.program import SinkhornProgram

__all__ = [
    "AutoImplicit",
    "AutoPosterior",
    "Implicit",
    "SinkhornProgram",
    "TraceEnum_Sinkhorn",
    "Trace_DataSinkhorn",
    "Trace_EnergyScore",
    "Trace_JointSinkhorn",
    "Trace_Sinkhorn",
    "register_geometry",
    "sinkhorn_infer",
    "to_arviz",
]
