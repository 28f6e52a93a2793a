"""The match of two joints over data and latents, group by group: clouds, gather, match.

A point is a datum with its latents: the latents' columns in the prior's unit, as where latents alone are matched, then
those of the data in the data's unit, as where data alone are, then covariates. So a standardised
column of data weighs as much as a standardised latent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.losses.cliques import Clique
from pyro_sinkhorn.losses.clouds import Cloud, blanked, is_ragged, make_cloud, slices
from pyro_sinkhorn.losses.coordinates import Coordinates, Draws, blank_of
from pyro_sinkhorn.losses.covariates import Covariates, covariates_of
from pyro_sinkhorn.losses.data_columns import (
    DataColumns,
    FeatureMap,
    Scale,
    covariate_columns,
    mean_cost_within,
    present_rows,
)
from pyro_sinkhorn.losses.joint_call import prior_of
from pyro_sinkhorn.losses.latent_match import GroupMatch
from pyro_sinkhorn.losses.matching import MatchOptions, MatchState, match
from pyro_sinkhorn.losses.simulation import Simulation
from pyro_sinkhorn.losses.site_cost import SiteCost, check_names
from pyro_sinkhorn.structure import Group, carried_along

Features = FeatureMap | Mapping[str, FeatureMap] | None


@dataclass(frozen=True)
class _Joint:
    """One group with what it carries along.

    latents:  all of its latents; None where it has none
    own:      costs of these
    data:     names of its observed sites
    """

    group: Group
    latents: Clique | None
    own: dict[str, SiteCost | None]
    data: tuple[str, ...]


class JointMatch:
    """Match of all groups of a program; owns what is estimated once from its prior and the data.

    :param options: how clouds are compared
    :param data_weight: factor of the squared distance between the data's columns
    :param scale: the unit of an observed site: one number for it, one for each of its columns, or none
    :param features: what is compared instead of the values of observed sites
    :param covariates: what is appended to both clouds
    """

    def __init__(
        self,
        options: MatchOptions,
        data_weight: float = 1.0,
        scale: Scale = "site",
        features: Features = None,
        covariates: Covariates = "warn",
    ) -> None:
        self.options = options
        self.data_weight = data_weight
        self.features = features
        self.covariates: Covariates = covariates
        self.latent_columns = Coordinates(options.cost)
        self.data_columns = DataColumns(self.state, scale)
        self.warned: set[str] = set()

    @property
    def state(self) -> MatchState:
        """What was estimated."""
        return self.latent_columns.state

    def fresh(self) -> JointMatch:
        """One with the same options that has seen nothing."""
        return type(self)(
            self.options, self.data_weight, self.data_columns.scale, self.features, self.covariates
        )

    def __call__(self, call: Simulation) -> list[GroupMatch]:
        """Compare the data and the guide's latents with simulated ones."""
        return self._compare(call, call.observed, call.simulated)

    def floor(self, call: Simulation) -> list[GroupMatch]:
        """The same statistic between independent simulations: its spread is the noise of the match."""
        return self._compare(call, call.again(), call.again())

    def covariate_names(self, call: Simulation) -> tuple[str, ...]:
        """What is appended to the clouds of a call, in words."""
        found = [pair for group in call.groups for pair in self._covariates(call, group)]
        return tuple(dict.fromkeys(name for name, _ in found))

    def coordinates(self, call: Simulation, trace: Trace, name: str) -> Tensor | None:
        """Rows ``(particles * n, e)`` of the latents of a group, in the prior's unit; None where it has none."""
        group = next(group for group in call.groups if group.name == name)
        joint = self._joint(call, group)
        if joint.latents is None:
            return None
        own: dict[str, SiteCost | None] = dict.fromkeys(joint.own)
        return torch.cat(self.latent_columns.columns(trace, joint.latents, own), -1).flatten(0, 1)

    def _compare(self, call: Simulation, left: Trace, right: Trace) -> list[GroupMatch]:
        if isinstance(self.options.cost, Mapping):
            check_names(self.options.cost, set(call.structure.locals))
        self.data_columns.features = self.features_by_site(call.structure.data)
        draws = Draws(lambda: prior_of(call))
        return [self._compare_group(call, left, right, group, draws) for group in call.groups]

    def features_by_site(self, data: tuple[str, ...]) -> dict[str, FeatureMap]:
        """Maps that were given for the observed sites.

        :raises ProgramError: they are of other sites
        """
        if self.features is None:
            return {}
        if not isinstance(self.features, Mapping):
            if len(data) > 1:
                raise ProgramError(
                    f"features= is one function, but the model observes the sites {list(data)}: give a dictionary "
                    "{site: function}; sites that it leaves out are compared as they are"
                )
            return {data[0]: self.features}
        unknown = sorted(set(self.features) - set(data))
        if unknown:
            raise ProgramError(
                f"features= names the sites {unknown}, but the observed sites of the model are {list(data)}"
            )
        return dict(self.features)

    def _compare_group(
        self, call: Simulation, left: Trace, right: Trace, group: Group, draws: Draws
    ) -> GroupMatch:
        weights, n_data = slices(call.observed, group)
        if n_data == 0 or (bool((weights == 0).any()) and int((weights > 0).sum()) < 2):
            # Masked out, or all but one, which no half can be made of.
            return GroupMatch(group.name, torch.zeros(()), n_data)
        joint = self._joint(call, group)
        self._estimate(call, joint, weights, draws)
        beside = covariate_columns(
            self.state,
            f"covariates of {group.name}",
            self._covariates(call, group),
            weights,
            lambda: self._points(call.simulated, call.observed, joint),
        )

        def cloud(latents: Trace, data: Trace) -> Cloud:
            points = self._points(latents, data, joint)
            if beside is not None:
                points = torch.cat([points, beside.to(points).expand(points.shape[0], -1, -1)], -1)
            return make_cloud(points, weights, group)

        cost = self.options.cost
        if joint.latents is not None:
            cost = self.latent_columns.cost(call.simulated, joint.latents, joint.own)
        elif cost is None or isinstance(cost, Mapping):
            cost = "sqeuclidean"
        key = f"joint of {group.name}"
        if key not in self.state.mean_costs:
            # Of the prior and the data: the guide's latents, at the start of a training, may be anywhere.
            reference = cloud(call.simulated, call.observed)
            self.state.mean_costs[key] = mean_cost_within(cost, reference.points)
        x, y = cloud(left, left), cloud(right, right)
        sites = (*joint.own, *joint.data)
        paired = beside is not None or x.weights is not None
        paired = paired or x.paired or is_ragged(call.observed, sites, weights, group)
        value = match(
            x,
            y,
            self.state.mean_costs[key].to(x.points),
            dataclasses.replace(self.options, cost=cost),
            group=f"data and latents ({group.name})",
            paired=paired,
            warned=self.warned,
        )
        return GroupMatch(group.name, value.mean(), n_data)

    def _joint(self, call: Simulation, group: Group) -> _Joint:
        carried, locals_ = carried_along(group, call.groups), set(call.structure.locals)
        inner = tuple(name for name in group.sites if name in locals_)
        outer = tuple(name for name in carried if name in locals_)
        data = tuple(name for name in (*carried, *group.sites) if name not in locals_)
        if not (inner or outer):
            return _Joint(group, None, {}, data)
        clique = Clique(", ".join((*outer, *inner)), Group(inner, group.plates), outer, 1.0)
        return _Joint(group, clique, self.latent_columns.own_costs(call.simulated, clique), data)

    def _covariates(self, call: Simulation, group: Group) -> list[tuple[str, Tensor]]:
        return covariates_of(self.covariates, call, group, self.warned)

    def _points(self, latents: Trace, data: Trace, joint: _Joint) -> Tensor:
        """Rows ``(particles, n, e)``, with latents and data each from a trace of their own."""
        columns: list[Tensor] = []
        if joint.latents is not None:
            columns += self.latent_columns.columns(latents, joint.latents, joint.own)
        plates = joint.group.plates
        for name in joint.data:
            rows = self.data_columns.rows(data, name, plates)
            blank = self.state.units.get(blank_of(name), rows.new_zeros(()))
            rows = blanked(rows, data.nodes[name], plates, blank) * math.sqrt(self.data_weight)
            columns.append(rows.to(columns[0]) if columns else rows)
        particles = max(rows.shape[0] for rows in columns)
        return torch.cat([rows.expand(particles, -1, -1) for rows in columns], -1)

    @torch.no_grad()
    def _estimate(self, call: Simulation, joint: _Joint, weights: Tensor, draws: Draws) -> None:
        """Units of all sites, and what stands for a masked datum; only what is new."""
        plates = joint.group.plates
        if joint.latents is not None:
            self.latent_columns.estimate(call.simulated, joint.latents, joint.own, draws)
        for name in joint.data:
            mine = weights * (slices(call.observed, Group((name,), plates))[0] > 0)
            self.data_columns.estimate(call.observed, name, plates, mine)
            if name in self.state.units and blank_of(name) not in self.state.units:
                rows = present_rows(self.data_columns.rows(call.observed, name, plates), mine)
                # The datum nearest to the mean: a constant between blank and other rows that costs little.
                self.state.units[blank_of(name)] = rows[(rows - rows.mean(0)).square().sum(-1).argmin()]
