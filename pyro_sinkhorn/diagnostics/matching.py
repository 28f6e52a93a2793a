"""How well a program matches its prior, measured against the noise of the measurement."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError, checked_integer
from pyro_sinkhorn.losses.base import SinkhornLoss
from pyro_sinkhorn.losses.call import Call
from pyro_sinkhorn.losses.data_set_match import DataSetMatch, DataSets
from pyro_sinkhorn.losses.latent_match import GroupMatch
from pyro_sinkhorn.losses.matching import MatchOptions
from pyro_sinkhorn.losses.prior import fixed_values
from pyro_sinkhorn.losses.simulation import Simulation
from pyro_sinkhorn.losses.trace_data_sinkhorn import Trace_DataSinkhorn
from pyro_sinkhorn.losses.trace_joint_sinkhorn import Trace_JointSinkhorn
from pyro_sinkhorn.losses.trace_sinkhorn import Trace_Sinkhorn
from pyro_sinkhorn.notebook import Printed
from pyro_sinkhorn.runs import run_model, subsamples
from pyro_sinkhorn.scoring import (
    check_guide,
    log_density,
    number_of_data,
    run_guide,
    run_scored,
    scored_sites,
)
from pyro_sinkhorn.structure import Group, structure_of


@dataclass(frozen=True)
class GroupReport:
    """One group: latents, observed sites where simulated data are compared, or both where joints are.

    match:             normalised divergence between aggregated posterior and prior, simulated data and data, or their
                       joints; mean of several evaluations
    floor, floor_sd:   mean and standard deviation of the same statistic between independent prior clouds, or simulations
    z:                 distance from the floor in standard errors of the difference of the two means
    encoder_variance:  share of the latents' variance that is noise of the encoder, 0 for a deterministic one; None for
                       observed sites alone
    """

    name: str
    match: float
    floor: float
    floor_sd: float
    z: float
    encoder_variance: float | None


@dataclass(frozen=True)
class MatchReport(Printed):
    """What :func:`match_report` measured; prints as a table.

    reconstruction:  -log p(x | z) per datum; None without a likelihood
    groups:          one row a group
    n_data:          data that were encoded, or compared; of a program with globals, simulated data sets
    match_size:      units in each half-cloud: the floor shrinks as it grows
    covariates:      what was appended to the clouds of a conditional simulator
    joint:           whether data were compared together with their latents
    lost_mass:       of counts, the prior's mass beyond the states that the guide produces
    """

    reconstruction: float | None
    groups: tuple[GroupReport, ...]
    n_data: float
    match_size: int
    covariates: tuple[str, ...] = ()
    lost_mass: dict[str, float] = field(default_factory=dict)
    joint: bool = False

    def __str__(self) -> str:
        width = max([20, *(len(g.name) for g in self.groups)])
        described = (
            "" if self.reconstruction is None else f", reconstruction {self.reconstruction:.4f} per datum"
        )
        lines = [f"{self.n_data:.0f} data{described}; match at size {self.match_size}"]
        if self.groups:
            known = any(g.encoder_variance is not None for g in self.groups)
            encoder = f" {'encoder var':>12}" if known else ""
            lines.append(f"{'group':<{width}} {'match':>9} {'floor':>9} {'± sd':>8} {'z':>7}{encoder}")
        for g in self.groups:
            encoder = "" if g.encoder_variance is None else f" {g.encoder_variance:>12.3f}"
            lines.append(
                f"{g.name:<{width}} {g.match:>9.4f} {g.floor:>9.4f} {g.floor_sd:>8.4f} {g.z:>7.1f}{encoder}"
            )
        lines += [f"{'':<{width}} {note}" for note in self.notes()]
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """What a reader should conclude."""
        notes = []
        if self.covariates:
            notes.append(f"compared together with the covariates: {', '.join(self.covariates)}")
        for name, lost in self.lost_mass.items():
            notes.append(f"{name}: its states are cut off where {lost:.1e} of the prior's mass is left")
        for g in self.groups:
            if g.z > 5 and self.joint:
                notes.append(
                    f"{g.name}: data with the guide's latents are not pairs of the program, so its draws are no posterior; "
                    "train on, or the program cannot make these data"
                )
            elif g.z > 5 and g.encoder_variance is None:
                notes.append(
                    f"{g.name}: the simulated data are not the data; train on, or the program is too simple"
                )
            elif g.z > 5:
                notes.append(
                    f"{g.name}: the aggregated posterior is not the prior; raise prior_weight or train on"
                )
            if g.encoder_variance is not None and g.encoder_variance < 0.01:
                notes.append(f"{g.name}: the encoder is deterministic; its draws say nothing of uncertainty")
        return notes


@torch.no_grad()
def match_report(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    loss: SinkhornLoss | None = None,
    num_floor: int = 20,
    num_draws: int = 8,
    **kwargs: Any,
) -> MatchReport:
    """Reconstruction, match of each group against its noise floor, and what is left of the encoder's noise.

    The floor is the same statistic between independent prior clouds, split and sized alike: a match within a few
    standard errors of it is as good as the data given here can show. More data, or more ``num_floor``, show more.

    Under equality z has standard deviation about 1, measured on normal latents; about 2 where the encoder is
    deterministic and the data are only twice ``match_size``, since then every evaluation sees one and the same cloud.

    Simulated data are compared with one and the same data at every evaluation; z allows for that, and is then rather
    below 1 under equality.

    :param args: arguments of the model; at least twice ``match_size`` data for a stable number
    :param loss: the loss whose match to report; default ``Trace_Sinkhorn()``. With a ``Trace_DataSinkhorn`` the match is
        that of simulated data to data, with a ``Trace_JointSinkhorn`` that of the joints with the latents; the floor is
        then that between independent simulations. Where such a program has globals, all data sets are simulated
    :param num_floor: evaluations of match and floor each, at least 2
    :param num_draws: guide draws for the encoder's variance, at least 2
    :raises ProgramError: model, guide and data do not fit together

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_sinkhorn import AutoImplicit
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
    >>> report = match_report(model, AutoImplicit(model), torch.randn(128), num_floor=2)
    >>> report.groups[0].name
    'z'
    """
    num_floor, num_draws = (
        checked_integer("num_floor", num_floor, 2),
        checked_integer("num_draws", num_draws, 2),
    )
    # A copy, since what a report meets first must not become the unit of later training.
    loss = copy.deepcopy(loss or Trace_Sinkhorn())
    if isinstance(loss, Trace_JointSinkhorn):
        sets = loss.data_sets(model, guide, args, kwargs)
        if sets is not None:
            return _report_of_data_sets(DataSetMatch(loss.joint_match), sets, num_floor, num_draws)
    if isinstance(loss, Trace_DataSinkhorn | Trace_JointSinkhorn):
        return _report_of_data(loss, model, guide, args, kwargs, num_floor, num_draws)
    if not isinstance(loss, Trace_Sinkhorn):
        raise ProgramError(f"there is no report of the match of a {type(loss).__name__}")
    latent_match = loss.latent_match
    matches: list[list[GroupMatch]] = []
    floors: list[list[GroupMatch]] = []
    reconstructions: list[float] = []
    for _ in range(num_floor):
        call = _call(model, guide, args, kwargs)
        n_data = number_of_data(call.scored, call.structure)
        reconstructions.append(-float(log_density(call.scored, scored_sites(call.scored), "model")) / n_data)
        matches.append(latent_match(call))
        floors.append(latent_match.floor(call))
    values = fixed_values(call.structure, call.scored)
    traces = _draws_of_the_same_data(call, values, guide, num_draws)

    def noise(name: str) -> float:
        clouds = [dataclasses.replace(call, scored=one) for one in traces]
        return _noise_share(torch.stack([latent_match.coordinates(one, name) for one in clouds]))

    size = _size(latent_match.options, call.structure.groups)
    return MatchReport(
        reconstruction=sum(reconstructions) / num_floor,
        groups=_compared(matches, floors, noise),
        n_data=n_data,
        match_size=size,
        lost_mass=dict(getattr(guide, "lost_mass", {})),
    )


def _report_of_data(
    loss: Trace_DataSinkhorn | Trace_JointSinkhorn,
    model: Callable[..., Any],
    guide: Any,
    args: Any,
    kwargs: Any,
    num_floor: int,
    num_draws: int,
) -> MatchReport:
    """Simulated data, or pairs, against those at hand, and against themselves."""
    matcher = loss.matcher
    for network in loss.modules().values():
        network.eval()
    matches, floors = [], []
    for _ in range(num_floor):
        call = loss.simulation(model, guide, args, kwargs)
        matches.append(matcher(call))
        floors.append(matcher.floor(call))
    joint = isinstance(loss, Trace_JointSinkhorn)
    traces = _draws_of_the_same_data(call, subsamples(call.simulated), guide, num_draws) if joint else []

    def noise(name: str) -> float | None:
        draws = [rows for one in traces if (rows := matcher.coordinates(call, one, name)) is not None]
        return _noise_share(torch.stack(draws)) if draws else None

    return MatchReport(
        reconstruction=None,
        groups=_compared(matches, floors, noise, one_sample=True),
        n_data=number_of_data(call.observed, call.structure),
        match_size=_size(matcher.options, call.groups),
        covariates=matcher.covariate_names(call),
        joint=joint,
    )


def _report_of_data_sets(match: DataSetMatch, sets: DataSets, num_floor: int, num_draws: int) -> MatchReport:
    """Simulated data sets with the guide's latents against others with their own."""
    matches = [match(sets) for _ in range(num_floor)]
    floors = [match.floor(sets) for _ in range(num_floor)]
    pairs = sets.pairs()
    traces = [sets.inferred(pairs) for _ in range(num_draws)]
    units = min(match.joint.options.match_size, max(sets.num // 2, 1))
    return MatchReport(
        reconstruction=None,
        groups=_compared(
            matches,
            floors,
            lambda name: _noise_share(torch.stack([match.coordinates(sets, one, name) for one in traces])),
        ),
        n_data=sets.num,
        match_size=units,
        joint=True,
    )


def _compared(
    matches: list[list[GroupMatch]],
    floors: list[list[GroupMatch]],
    noise: Callable[[str], float | None],
    one_sample: bool = False,
) -> tuple[GroupReport, ...]:
    """A row for each group, of several evaluations of match and floor.

    :param one_sample: all matches are of one and the same sample of data. Its own noise is not averaged out: at most
        half of the floor's variance, since at equal laws the statistic treats both clouds alike
    """
    rows = []
    for i, first in enumerate(matches[0]):
        match = torch.stack([values[i].value for values in matches]).double()
        floor = torch.stack([values[i].value for values in floors]).double()
        error = math.sqrt(float(match.var() + floor.var()) / len(match) + one_sample * float(floor.var()) / 2)
        rows.append(
            GroupReport(
                name=first.name,
                match=float(match.mean()),
                floor=float(floor.mean()),
                floor_sd=float(floor.std()),
                z=float(match.mean() - floor.mean()) / error if error > 0 else 0.0,
                encoder_variance=noise(first.name),
            )
        )
    return tuple(rows)


def _size(options: MatchOptions, groups: tuple[Group, ...]) -> int:
    """Units in each half: what was asked for, or what the data allow."""
    units = min((group.plates[0].size for group in groups), default=2 * options.match_size)
    return min(options.match_size, max(units // 2, 1))


def _call(model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any) -> Call:
    guide_trace = run_guide(guide, args, kwargs)
    scored = run_scored(model, guide_trace, args, kwargs)
    structure = structure_of(scored)
    check_guide(guide_trace, structure, structure.locals)  # nothing is differentiated
    return Call(model, args, kwargs, structure, scored)


def _draws_of_the_same_data(
    call: Call | Simulation, values: dict[str, Tensor], guide: Callable[..., Any], num_draws: int
) -> list[Trace]:
    """Runs that differ in the local latents alone.

    :param values: of sub-samples and globals, those of the call
    """
    traces = []
    for _ in range(num_draws):
        guide_trace = run_model(guide, call.args, call.kwargs, values=values)
        traces.append(run_scored(call.model, guide_trace, call.args, call.kwargs))
    return traces


def _noise_share(draws: Tensor) -> float:
    """Variance within a datum over the whole, from draws ``(k, n, e)``."""
    within = draws.var(0).mean(0).sum()
    total = draws.flatten(0, 1).var(0, correction=0).sum()
    return float(within / total) if float(total) > 0 else 0.0
