"""Losses that drop into :class:`pyro.infer.SVI` in place of the ELBO."""

from pyro_sinkhorn.losses.base import Terms
from pyro_sinkhorn.losses.energy import energy_score
from pyro_sinkhorn.losses.learned_cost import LearnedCost
from pyro_sinkhorn.losses.trace_data_sinkhorn import Trace_DataSinkhorn
from pyro_sinkhorn.losses.trace_energy_score import Trace_EnergyScore
from pyro_sinkhorn.losses.trace_enum_sinkhorn import TraceEnum_Sinkhorn
from pyro_sinkhorn.losses.trace_joint_sinkhorn import Trace_JointSinkhorn
from pyro_sinkhorn.losses.trace_sinkhorn import Trace_Sinkhorn

__all__ = [
    "LearnedCost",
    "Terms",
    "TraceEnum_Sinkhorn",
    "Trace_DataSinkhorn",
    "Trace_EnergyScore",
    "Trace_JointSinkhorn",
    "Trace_Sinkhorn",
    "energy_score",
]
