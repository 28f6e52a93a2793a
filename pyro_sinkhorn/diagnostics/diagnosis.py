"""All that can be said of a fitted program at once: its match, and its posterior where it has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyro_sinkhorn.diagnostics.bound import BoundReport
from pyro_sinkhorn.diagnostics.calibration import SbcReport, simulation_based_calibration
from pyro_sinkhorn.diagnostics.contraction import ContractionReport, posterior_contraction
from pyro_sinkhorn.diagnostics.coverage import CoverageReport, expected_coverage
from pyro_sinkhorn.diagnostics.matching import GroupReport, MatchReport
from pyro_sinkhorn.diagnostics.simulated_posterior import posterior_of_simulations
from pyro_sinkhorn.diagnostics.simulated_range import RangeReport, simulated_range
from pyro_sinkhorn.errors import checked_integer
from pyro_sinkhorn.notebook import Printed

#: Posterior draws of every simulation.
_DRAWS = 99


@dataclass(frozen=True)
class PosteriorReport(Printed):
    """How far a posterior guide can be believed.

    range:       whether the data lie where the program simulates
    calibration: ranks of simulated latents among their posterior draws, familywise at ``1e-3``
    coverage:    of credible intervals, each latent and all jointly
    contraction: what the data say of each latent
    """

    range: RangeReport
    calibration: SbcReport
    coverage: CoverageReport
    contraction: ContractionReport

    def __str__(self) -> str:
        parts = (f"observed data: {self.range}", self.calibration, self.coverage, self.contraction)
        return "\n\n".join(map(str, parts))


@dataclass(frozen=True)
class Diagnosis(Printed):
    """What :meth:`SinkhornProgram.diagnose <pyro_sinkhorn.SinkhornProgram.diagnose>` found; prints as tables.

    match:     reconstruction and match against noise floor, for losses that match clouds
    posterior: for programs that have one
    bound:     on the distance between data and model, where it was asked for
    """

    match: MatchReport | None
    posterior: PosteriorReport | None
    bound: BoundReport | None = None

    def __str__(self) -> str:
        return "\n\n".join(str(part) for part in (self.match, self.posterior, self.bound) if part is not None)

    @property
    def groups(self) -> tuple[GroupReport, ...]:
        """Rows of the match; none for a loss that matches nothing."""
        return () if self.match is None else self.match.groups

    def plot(self) -> dict[str, Any]:
        """Figures by name, for a program with a posterior: needs matplotlib."""
        if self.posterior is None:
            return {}
        return {
            "calibration": self.posterior.calibration.plot(),
            "coverage": self.posterior.coverage.plot(),
            "contraction": self.posterior.contraction.plot(),
        }


def posterior_report(
    model: Callable[..., Any], guide: Any, args: Any, kwargs: Any, num_simulations: int
) -> PosteriorReport:
    """Simulate from the program, and check the guide's draws against the latents that were drawn.

    :param num_simulations: at least 20
    """
    checked_integer("num_simulations", num_simulations, 20)
    drawn = posterior_of_simulations(
        model, guide, *args, num_simulations=num_simulations, num_draws=_DRAWS, **kwargs
    )
    return PosteriorReport(
        simulated_range(model, *args, **kwargs),
        simulation_based_calibration(drawn),
        expected_coverage(drawn),
        posterior_contraction(drawn),
    )
