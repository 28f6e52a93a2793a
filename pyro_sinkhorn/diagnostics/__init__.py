"""Diagnostics: what to look at before believing a fit."""

from pyro_sinkhorn.diagnostics.matching import GroupReport, MatchReport, match_report

__all__ = ["GroupReport", "MatchReport", "match_report"]
