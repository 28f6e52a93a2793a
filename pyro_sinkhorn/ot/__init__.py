"""Optimal transport on tensors; knows nothing of Pyro."""

from pyro_sinkhorn.ot.cost import mahalanobis
from pyro_sinkhorn.ot.divergence import DivergenceResult, sinkhorn_divergence
from pyro_sinkhorn.ot.problem import ConvergenceWarning
from pyro_sinkhorn.ot.rounding import round_plan
from pyro_sinkhorn.ot.sinkhorn import SinkhornResult, sinkhorn

__all__ = [
    "ConvergenceWarning",
    "DivergenceResult",
    "SinkhornResult",
    "mahalanobis",
    "round_plan",
    "sinkhorn",
    "sinkhorn_divergence",
]
