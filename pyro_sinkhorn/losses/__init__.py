"""Losses that drop into :class:`pyro.infer.SVI` in place of the ELBO."""

from pyro_sinkhorn.losses.trace_sinkhorn import Terms, Trace_Sinkhorn

__all__ = ["Terms", "Trace_Sinkhorn"]
