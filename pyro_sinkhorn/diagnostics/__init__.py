"""Diagnostics: what to look at before believing a fit."""

from pyro_sinkhorn.diagnostics.bound import BoundReport, wasserstein_bound
from pyro_sinkhorn.diagnostics.c2st import C2STResult, c2st
from pyro_sinkhorn.diagnostics.calibration import RankCheck, SbcReport, simulation_based_calibration
from pyro_sinkhorn.diagnostics.contraction import ContractionReport, ScalarContraction, posterior_contraction
from pyro_sinkhorn.diagnostics.coverage import CoverageReport, expected_coverage
from pyro_sinkhorn.diagnostics.diagnosis import Diagnosis, PosteriorReport
from pyro_sinkhorn.diagnostics.drawn import PosteriorDraws
from pyro_sinkhorn.diagnostics.matching import GroupReport, MatchReport, match_report
from pyro_sinkhorn.diagnostics.simulated_posterior import posterior_of_simulations
from pyro_sinkhorn.diagnostics.simulated_range import OutOfRangeWarning, RangeReport, simulated_range
from pyro_sinkhorn.diagnostics.tarp import TarpReport, tarp

__all__ = [
    "BoundReport",
    "C2STResult",
    "ContractionReport",
    "CoverageReport",
    "Diagnosis",
    "GroupReport",
    "MatchReport",
    "OutOfRangeWarning",
    "PosteriorDraws",
    "PosteriorReport",
    "RangeReport",
    "RankCheck",
    "SbcReport",
    "ScalarContraction",
    "TarpReport",
    "c2st",
    "expected_coverage",
    "match_report",
    "posterior_contraction",
    "posterior_of_simulations",
    "simulated_range",
    "simulation_based_calibration",
    "tarp",
    "wasserstein_bound",
]
