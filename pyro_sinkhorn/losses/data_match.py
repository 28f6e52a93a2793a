"""The match of simulated data to observed data, group by group: clouds, gather, match."""

from __future__ import annotations

import dataclasses

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.distributed import active
from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.losses.clouds import Cloud, make_cloud, slices
from pyro_sinkhorn.losses.covariates import Covariates, covariates_of
from pyro_sinkhorn.losses.data_columns import DataColumns, Scale, covariate_columns, mean_cost_within
from pyro_sinkhorn.losses.gathering import Rows, gather
from pyro_sinkhorn.losses.latent_match import GroupMatch
from pyro_sinkhorn.losses.learned_cost import LearnedCost
from pyro_sinkhorn.losses.matching import MatchOptions, MatchState, match
from pyro_sinkhorn.losses.simulation import Simulation
from pyro_sinkhorn.structure import Group, carried_along


class DataMatch:
    """Match of all observed sites of a program; owns what is estimated once from the data.

    :param options: how clouds are compared
    :param scale: the unit of a site: one number for it, one for each of its columns, or none
    :param covariates: what is appended to both clouds
    """

    def __init__(self, options: MatchOptions, scale: Scale = "site", covariates: Covariates = "warn") -> None:
        self.options = options
        self.covariates: Covariates = covariates
        self.state = MatchState()
        self.columns = DataColumns(self.state, scale)
        self.warned: set[str] = set()

    @property
    def scale(self) -> Scale:
        """How the unit of a site is chosen."""
        return self.columns.scale

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
        if active() is None and _leaves_nothing(weights, n_data):
            return GroupMatch(group.name, torch.zeros(()), n_data)
        covariates = covariates_of(self.covariates, call, group, self.warned)
        key = f"covariates of {group.name}"
        wanted = {*carried, *group.sites, *([key] if covariates else [])}
        if not wanted <= set(self.state.units):
            for name in (*carried, *group.sites):
                self.columns.estimate(call.observed, name, group.plates, weights)
            self._beside(call, group, carried, key, covariates, weights)
            self.state.take_first()
        beside = self._beside(call, group, carried, key, covariates, weights)
        traces = [left, right]
        if group.name not in self.state.mean_costs and right is not call.observed:
            traces.append(call.observed)
        (held,) = gather(
            [
                Rows(
                    [self._points(trace, group, carried) for trace in traces],
                    weights,
                    n_data,
                    group,
                    None if beside is None else beside.unsqueeze(0),
                )
            ]
        )
        n_data = held.n_data
        if _leaves_nothing(held.weights, n_data):
            return GroupMatch(group.name, torch.zeros(()), n_data)
        options, cost = self.options, self.options.cost

        def cloud(points: Tensor) -> Cloud:
            if held.beside is not None:
                columns = held.beside.to(points).expand(points.shape[0], -1, -1)
                points = torch.cat([points, columns], -1)
            if isinstance(cost, LearnedCost):
                points = cost.features(points)
            return make_cloud(points, held.weights, held.group)

        x, y, *reference = (cloud(points) for points in held.points)
        if isinstance(cost, LearnedCost):
            # Its features change from step to step, so their unit is that of this batch.
            options = dataclasses.replace(options, cost=cost.ground)
            mean = mean_cost_within(cost.ground, y.points)
        else:
            if group.name not in self.state.mean_costs:
                self.state.mean_costs[group.name] = mean_cost_within(cost, (*reference, y)[0].points)
                self.state.take_first()
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

    def _beside(
        self,
        call: Simulation,
        group: Group,
        carried: tuple[str, ...],
        key: str,
        covariates: list[tuple[str, Tensor]],
        weights: Tensor,
    ) -> Tensor | None:
        """Covariates in their unit, which is estimated if it has not been."""
        return covariate_columns(
            self.state, key, covariates, weights, lambda: self._points(call.observed, group, carried)
        )

    def _points(self, trace: Trace, group: Group, carried: tuple[str, ...]) -> Tensor:
        """Rows ``(particles, n, e)``: every site embedded, in its unit."""
        columns = [self.columns.rows(trace, name, group.plates) for name in (*carried, *group.sites)]
        particles = max(rows.shape[0] for rows in columns)
        return torch.cat([rows.expand(particles, -1, -1).to(columns[0]) for rows in columns], -1)


def _leaves_nothing(weights: Tensor, n_data: float) -> bool:
    """Whether a mask leaves no slice, or a single one, which no half can be made of."""
    return n_data == 0 or (bool((weights == 0).any()) and int((weights > 0).sum()) < 2)
