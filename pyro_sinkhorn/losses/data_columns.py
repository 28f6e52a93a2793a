"""Columns that observed values and covariates take in a cloud, and the units they are brought to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.geometry.base import Geometry
from pyro_sinkhorn.geometry.elementwise import Real
from pyro_sinkhorn.geometry.registry import geometry_of
from pyro_sinkhorn.losses.clouds import embedded
from pyro_sinkhorn.losses.matching import MatchState
from pyro_sinkhorn.ot.cost import Cost, cost_matrix
from pyro_sinkhorn.runs import preserved_buffers
from pyro_sinkhorn.structure import Plate, innermost

Scale = Literal["site", "column"] | None
#: Maps values of an observed site, ``(n, *event)``, to ``(n, f)``.
FeatureMap = Callable[[Tensor], Tensor]
#: Rows that a mean cost is estimated from, at most.
_REFERENCE = 1024


class Numbers(Real):
    """Counts and booleans as the numbers they are: data far from the simulated ones must be seen to be far."""

    def embed(self, value: Tensor) -> Tensor:
        """The numbers, flattened."""
        return self.flatten(value if value.is_floating_point() else value.to(torch.get_default_dtype()))


def data_geometry(fn: Any, name: str) -> Geometry:
    """How values of an observed site are laid out as points."""
    labels = isinstance(innermost(fn), dist.Categorical)
    if getattr(fn.support, "is_discrete", False) and not labels:
        return Numbers(fn.event_shape)
    return geometry_of(fn, name)


class DataColumns:
    """Observed sites as columns of a cloud, in units that are estimated once.

    :param state: where the units are kept
    :param scale: the unit of a site: one number for it, one for each of its columns, or none
    :param features: for some sites, what is compared instead of their values
    """

    def __init__(
        self, state: MatchState, scale: Scale, features: Mapping[str, FeatureMap] | None = None
    ) -> None:
        self.state = state
        self.scale: Scale = scale
        self.features = dict(features or {})

    def rows(self, trace: Trace, name: str, plates: tuple[Plate, ...]) -> Tensor:
        """Rows ``(particles, n, e)`` of one site, in its unit."""
        rows = self._raw(trace, name, plates)
        unit = self.state.units.get(name)
        return rows if unit is None else rows / unit.to(rows)

    @torch.no_grad()
    def estimate(self, trace: Trace, name: str, plates: tuple[Plate, ...], weights: Tensor) -> None:
        """The unit of a site, from the rows that weigh something; only if it has none yet."""
        if name in self.state.units:
            return
        rows = present_rows(self._raw(trace, name, plates), weights)
        if not len(rows):
            return  # all are missing in this batch
        spread = rows.var(0, correction=0)
        if self.scale == "site":
            spread = spread.mean()
        unit = spread.sqrt() if self.scale is not None else torch.ones_like(spread.mean())
        # A column that does not vary in the data stays in its own unit: simulated data may vary there.
        self.state.units[name] = torch.where(unit > 0, unit, torch.ones_like(unit))

    def _raw(self, trace: Trace, name: str, plates: tuple[Plate, ...]) -> Tensor:
        fn = trace.nodes[name]["fn"]
        if name not in self.features:
            return embedded(trace, name, plates, data_geometry(fn, name).embed)
        return embedded(
            trace, name, plates, lambda value: featured(self.features[name], name, value, fn.event_shape)
        )


def featured(features: FeatureMap, name: str, value: Tensor, event_shape: torch.Size) -> Tensor:
    """``(batch..., f)`` of values ``(batch..., *event)``; a network's own parameters get no gradient.

    :raises ProgramError: it is no such map, naming the site
    :raises NonFiniteError: it returns NaN or infinity
    """
    batch = value.shape[: value.dim() - len(event_shape)]
    flat = value.reshape(-1, *event_shape)
    if isinstance(features, nn.Module):
        fixed = {key: parameter.detach() for key, parameter in features.named_parameters()}
        with preserved_buffers():
            found = torch.func.functional_call(features, fixed, (flat,))
    else:
        found = features(flat)
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(flat):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ProgramError(
            f"observed site {name!r}: features= was given values of shape {tuple(flat.shape)} and returned {got}: expected "
            f"a tensor of shape ({len(flat)}, f), one row a value"
        )
    if not bool(found.isfinite().all()):
        raise NonFiniteError(
            f"observed site {name!r}: features= returned NaN or infinity for finite values of shape {tuple(flat.shape)}"
        )
    found = found if found.is_floating_point() else found.to(torch.get_default_dtype())
    return found.reshape(*batch, found.shape[-1])


@torch.no_grad()
def covariate_columns(
    state: MatchState,
    key: str,
    found: list[tuple[str, Tensor]],
    weights: Tensor,
    points: Callable[[], Tensor],
) -> Tensor | None:
    """Covariates ``(n, c)``, in a unit that spreads them as far as the points beside them; None if there are none.

    :param key: where the unit is kept
    :param found: covariates with what to call them, each ``(n, c)``
    :param points: asked once for the rows ``(particles, n, e)`` beside them
    """
    if not found:
        return None
    beside = torch.cat([rows.to(found[0][1]) for _, rows in found], -1)
    if key not in state.units:
        spread = present_rows(points(), weights).var(0, correction=0).sum()
        mine = beside[weights > 0].var(0, correction=0)
        columns = (
            torch.where(mine > 0, mine, torch.ones_like(mine)).sqrt() * (mine > 0).sum().clamp_min(1).sqrt()
        )
        state.units[key] = columns / torch.where(spread > 0, spread, torch.ones_like(spread)).sqrt()
    return beside / state.units[key].to(beside)


def present_rows(rows: Tensor, weights: Tensor) -> Tensor:
    """Rows ``(particles, n, e)`` that are not masked out, of all particles, ``(k, e)``."""
    return rows[:, weights > 0].flatten(0, 1)


@torch.no_grad()
def mean_cost_within(cost: Cost, points: Tensor) -> Tensor:
    """Mean cost between two different points of a cloud ``(particles, n, e)``; 1 where there is no spread."""
    rows = points.detach()[:1]
    rows = rows[:, torch.randperm(rows.shape[1], device=rows.device)[:_REFERENCE]]
    matrix = cost_matrix(cost, rows, rows)[0]
    n = len(matrix)
    value = (matrix.sum() - matrix.diagonal().sum()) / max(n * (n - 1), 1)
    return value if bool(value > 0) else torch.ones_like(value)
