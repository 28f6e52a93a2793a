"""Diagnostics: what to look at before believing a fit."""

from pyro_sinkhorn.diagnostics.c2st import C2STResult, c2st
from pyro_sinkhorn.diagnostics.matching import GroupReport, MatchReport, match_report

__all__ = ["C2STResult", "GroupReport", "MatchReport", "c2st", "match_report"]
