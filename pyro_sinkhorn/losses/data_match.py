"""The match of simulated data to observed data, group by group: clouds, gather, match."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.geometry.base import Geometry
from pyro_sinkhorn.geometry.elementwise import Real
from pyro_sinkhorn.geometry.registry import geometry_of
from pyro_sinkhorn.losses.clouds import Cloud, embedded, make_cloud, slices
from pyro_sinkhorn.losses.covariates import Covariates, covariates_of
from pyro_sinkhorn.losses.latent_match import GroupMatch
from pyro_sinkhorn.losses.learned_cost import LearnedCost
from pyro_sinkhorn.losses.matching import MatchOptions, MatchState, gather, match
from pyro_sinkhorn.losses.simulation import Simulation
from pyro_sinkhorn.ot.cost import Cost, cost_matrix
from pyro_sinkhorn.structure import Group, carried_along, innermost

Scale = Literal["site", "column"] | None
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


class DataMatch:
    """Match of all observed sites of a program; owns what is estimated once from the data.

    :param options: how clouds are compared
    :param scale: the unit of a site: one number for it, one for each of its columns, or none
    :param covariates: what is appended to both clouds
    """

    def __init__(self, options: MatchOptions, scale: Scale = "site", covariates: Covariates = "warn") -> None:
        self.options = options
        self.scale: Scale = scale
        self.covariates: Covariates = covariates
        self.state = MatchState()
        self.warned: set[str] = set()

    def fresh(self) -> DataMatch:
        """One with the same options that has seen no data; a cost that learns is copied as it is now."""
        cost = self.options.cost
        if isinstance(cost, LearnedCost):
            cost = cost.fresh()
        return type(self)(dataclasses.replace(self.options, cost=cost), self.scale, self.covariates)

    def __call__(self, call: Simulation) -> list[GroupMatch]:
        """Compare the simulated data with the observed ones."""
        return self._compare(call, call.simulated, call.observed)

    def floor(self, call: Simulation) -> list[GroupMatch]:
        """The same statistic between independent simulations: its spread is the noise of the match."""
        return self._compare(call, call.again(), call.again())

    def covariate_names(self, call: Simulation) -> tuple[str, ...]:
        """What is appended to the clouds of a call, in words."""
        names = [
            name
            for group in call.groups
            for name, _ in covariates_of(self.covariates, call, group, self.warned)
        ]
        return tuple(dict.fromkeys(names))

    def _compare(self, call: Simulation, left: Trace, right: Trace) -> list[GroupMatch]:
        if isinstance(self.options.cost, LearnedCost) and len(call.groups) > 1:
            raise ProgramError(
                f"a LearnedCost has one network, but the observed sites {[group.name for group in call.groups]} are in "
                "different plates and are compared apart: observe them in one plate, or take a fixed cost"
            )
        return [
            self._compare_group(call, left, right, group, carried_along(group, call.groups))
            for group in call.groups
        ]

    def _compare_group(
        self, call: Simulation, left: Trace, right: Trace, group: Group, carried: tuple[str, ...]
    ) -> GroupMatch:
        weights, n_data = slices(call.observed, group)
        if n_data == 0 or (bool((weights == 0).any()) and int((weights > 0).sum()) < 2):
            # Masked out, or all but one, which no half can be made of.
            return GroupMatch(group.name, torch.zeros(()), n_data)
        self._estimate_units(call, group, carried, weights)
        beside = self._beside(call, group, carried, weights)
        options, cost = self.options, self.options.cost

        def cloud(trace: Trace) -> Cloud:
            points = self._points(trace, group, carried)
            if beside is not None:
                points = torch.cat([points, beside.to(points).expand(points.shape[0], -1, -1)], -1)
            if isinstance(cost, LearnedCost):
                points = cost.features(points)
            return gather(make_cloud(points, weights, group))

        x, y = cloud(left), cloud(right)
        if isinstance(cost, LearnedCost):
            # Its features change from step to step, so their unit is that of this batch.
            options = dataclasses.replace(options, cost=cost.ground)
            mean = mean_cost_within(cost.ground, y.points)
        else:
            if group.name not in self.state.mean_costs:
                reference = y if right is call.observed else cloud(call.observed)
                self.state.mean_costs[group.name] = mean_cost_within(cost, reference.points)
            mean = self.state.mean_costs[group.name].to(x.points)
        paired = beside is not None or x.weights is not None
        inner = (
            f", whose units are the slices of plate {group.plates[0].name!r},"
            if len(group.plates) > 1
            else ""
        )
        label = f"observed data ({group.name}){inner}"
        value = match(x, y, mean, options, group=label, paired=paired, warned=self.warned)
        return GroupMatch(group.name, value.mean(), n_data)

    def _points(self, trace: Trace, group: Group, carried: tuple[str, ...]) -> Tensor:
        """Rows ``(particles, n, e)``: every site embedded, in its unit."""
        columns = []
        for name in (*carried, *group.sites):
            rows = embedded(trace, name, group.plates, data_geometry(trace.nodes[name]["fn"], name).embed)
            columns.append(rows / self.state.units[name].to(rows))
        particles = max(rows.shape[0] for rows in columns)
        return torch.cat([rows.expand(particles, -1, -1).to(columns[0]) for rows in columns], -1)

    @torch.no_grad()
    def _estimate_units(
        self, call: Simulation, group: Group, carried: tuple[str, ...], weights: Tensor
    ) -> None:
        for name in (*carried, *group.sites):
            if name in self.state.units:
                continue
            fn = call.observed.nodes[name]["fn"]
            rows = embedded(call.observed, name, group.plates, data_geometry(fn, name).embed)
            spread = _present(rows, weights).var(0, correction=0)
            if self.scale == "site":
                spread = spread.mean()
            unit = spread.sqrt() if self.scale is not None else torch.ones_like(spread.mean())
            # A column that does not vary in the data stays in its own unit: simulated data may vary there.
            self.state.units[name] = torch.where(unit > 0, unit, torch.ones_like(unit))

    @torch.no_grad()
    def _beside(
        self, call: Simulation, group: Group, carried: tuple[str, ...], weights: Tensor
    ) -> Tensor | None:
        """Covariates, in a unit that spreads them as far as the data."""
        found = covariates_of(self.covariates, call, group, self.warned)
        if not found:
            return None
        beside = torch.cat([rows.to(found[0][1]) for _, rows in found], -1)
        key = f"covariates of {group.name}"
        if key not in self.state.units:
            points = self._points(call.observed, group, carried)
            spread = _present(points, weights).var(0, correction=0).sum()
            mine = beside[weights > 0].var(0, correction=0)
            columns = (
                torch.where(mine > 0, mine, torch.ones_like(mine)).sqrt()
                * (mine > 0).sum().clamp_min(1).sqrt()
            )
            self.state.units[key] = columns / torch.where(spread > 0, spread, torch.ones_like(spread)).sqrt()
        return beside / self.state.units[key].to(beside)


def _present(rows: Tensor, weights: Tensor) -> Tensor:
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
