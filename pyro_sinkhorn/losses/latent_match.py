"""The match of every latent group of a program: prior runs, clouds, gather, match."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.geometry.registry import geometry_of
from pyro_sinkhorn.losses.clouds import Cloud, embedded, make_cloud, slices, varying_parameters
from pyro_sinkhorn.losses.matching import MatchOptions, MatchState, gather, match, mean_cost
from pyro_sinkhorn.losses.prior import constant_trace, prior_trace, reference_rows, warn_if_gradient_lost
from pyro_sinkhorn.losses.site_cost import GroupCost, SiteCost, check_names, site_cost
from pyro_sinkhorn.ot.cost import Cost
from pyro_sinkhorn.structure import Group, Structure, carried_along, plates_of

Grouping = Literal["joint", "marginal"]


@dataclass(frozen=True)
class Call:
    """One call of a model that the match is computed for: its traced run and how to run it again."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    structure: Structure
    scored: Trace

    def prior(self) -> Trace:
        """A fresh prior run, conditional on the globals and sub-samples of the scored one."""
        return prior_trace(self.model, self.args, self.kwargs, self.structure, self.scored)

    def constant(self, prior: Trace) -> Trace:
        """A run whose latents agree in all slices."""
        return constant_trace(self.model, self.args, self.kwargs, self.structure, self.scored, prior)


@dataclass(frozen=True)
class GroupMatch:
    """The normalised divergence of one group, averaged over particles and prior clouds, and the data it stands for."""

    name: str
    value: Tensor
    n_data: float


class LatentMatch:
    """Match of all groups of a program; owns what is estimated once from its prior.

    :param options: how clouds are compared
    :param grouping: ``"joint"`` or ``"marginal"``
    :param num_prior_batches: independent prior clouds a call
    """

    def __init__(
        self, options: MatchOptions, grouping: Grouping = "joint", num_prior_batches: int = 1
    ) -> None:
        self.options = options
        self.grouping = grouping
        self.num_prior_batches = num_prior_batches
        self.state = MatchState()
        self._warned: set[str] = set()

    def fresh(self) -> LatentMatch:
        """One with the same options that has seen no prior."""
        return type(self)(self.options, self.grouping, self.num_prior_batches)

    def __call__(self, call: Call) -> list[GroupMatch]:
        """Compare the scored trace with fresh prior clouds."""
        if not call.structure.groups:
            return []
        priors = [call.prior() for _ in range(self.num_prior_batches)]
        warn_if_gradient_lost(priors[0], call.structure, self._warned)
        return self._compare(call, call.scored, priors)

    def floor(self, call: Call) -> list[GroupMatch]:
        """The same statistic between independent prior clouds: its spread is the noise of the match."""
        if not call.structure.groups:
            return []
        return self._compare(call, call.prior(), [call.prior()])

    def divergence(
        self, x: Cloud, y: Cloud, mean: Tensor, group: str, paired: bool, cost: Cost = "sqeuclidean"
    ) -> Tensor:
        """Normalised divergence between two clouds, one value a particle; a subclass may compare otherwise."""
        options = dataclasses.replace(self.options, cost=cost)
        label = f"latent group ({group})"
        return match(x, y, mean, options, group=label, paired=paired, warned=self._warned)

    def coordinates(self, call: Call, name: str) -> Tensor:
        """Rows ``(particles * n, e)`` of the scored trace for the group of this name, in the prior's unit."""
        group, carried = next((g, c) for g, c in self._groups(call.structure) if g.name == name)
        own = dict.fromkeys((*carried, *group.sites))
        return torch.cat(self._columns(call.scored, group, own), -1).flatten(0, 1)

    def _compare(self, call: Call, left: Trace, priors: list[Trace]) -> list[GroupMatch]:
        constant: Trace | None = None
        check_names(self.options.cost, set(call.structure.locals))
        groups = list(self._groups(call.structure))
        # Asked at every call: a batch may have equal covariates by chance, a prior network may start at zero. The run
        # is spared where parameters agree even below different latents.
        if any(varying_parameters(priors[0], group) is not None for group, _ in groups):
            constant = call.constant(priors[0])
        return [
            self._compare_group(call, left, priors, constant, group, carried) for group, carried in groups
        ]

    def _compare_group(
        self,
        call: Call,
        left: Trace,
        priors: list[Trace],
        constant: Trace | None,
        group: Group,
        carried: tuple[str, ...],
    ) -> GroupMatch:
        weights, n_data = slices(call.scored, group)
        if n_data == 0:
            return GroupMatch(group.name, torch.zeros(()), 0.0)
        own = self._own_costs(priors[0], group, carried)
        wanted = {*carried, *group.sites, *(factor_of(name) for name, cost in own.items() if cost)}
        if group.name not in self.state.mean_costs or not wanted <= set(self.state.units):
            self._estimate(call, priors[0], group, carried, own)
        features = self._features(constant, group, carried)

        def cloud(trace: Trace) -> Cloud:
            points = torch.cat(self._columns(trace, group, own), -1)
            if features is not None:
                points = torch.cat([points, features.expand(points.shape[0], -1, -1)], -1)
            return gather(make_cloud(points, weights, group))

        x = cloud(left)
        mean = self.state.mean_costs[group.name].to(x.points)
        paired = features is not None or x.weights is not None
        cost = self._group_cost(priors[0], group, own)
        values = [self.divergence(x, cloud(prior), mean, group.name, paired, cost).mean() for prior in priors]
        return GroupMatch(group.name, torch.stack(values).mean(), n_data)

    def _groups(self, structure: Structure) -> Iterator[tuple[Group, tuple[str, ...]]]:
        """Groups to match, each with the latents of the groups around it, which it carries along."""
        for group in structure.groups:
            if self.grouping == "marginal":
                for name in group.sites:
                    yield Group((name,), group.plates), ()
                continue
            yield group, carried_along(group, structure.groups)

    def _own_costs(self, prior: Trace, group: Group, carried: tuple[str, ...]) -> dict[str, SiteCost | None]:
        """Sites of a group in the order of their columns, each with its own cost if it has one."""
        given = self.options.cost
        whole = not (given is None or isinstance(given, Mapping))  # a cost for all of the group

        def own(name: str) -> SiteCost | None:
            site = prior.nodes[name]
            return None if whole else site_cost(name, site, geometry_of(site["fn"], name), given)

        return {name: own(name) for name in (*carried, *group.sites)}

    def _columns(self, trace: Trace, group: Group, own: Mapping[str, SiteCost | None]) -> list[Tensor]:
        """Rows ``(particles, n, e)`` of every site of a group: embedded in the prior's unit, or as its cost wants it."""
        columns = []
        for name, cost in own.items():
            rows = embedded(trace, name, group.plates, None if cost is None else cost.columns)
            if cost is None or cost.in_units:
                unit, centre = self.state.units[name], self.state.units.get(centre_of(name))
                rows = rows if centre is None else rows - centre.to(rows)
                geometry = geometry_of(trace.nodes[name]["fn"], name)
                rows = geometry.finish(rows / unit.to(rows), heavy=centre is not None)
            columns.append(rows)
        particles = max(rows.shape[0] for rows in columns)
        return [rows.expand(particles, -1, -1) for rows in columns]

    def _group_cost(self, prior: Trace, group: Group, own: Mapping[str, SiteCost | None]) -> Cost:
        """The cost between rows of :meth:`_columns`."""
        given = self.options.cost
        if given is not None and not isinstance(given, Mapping):
            return given
        if not any(own.values()):
            return "sqeuclidean"
        widths = [rows.shape[-1] for rows in self._columns(prior, group, own)]
        factors = [
            1.0 if cost is None else float(self.state.units[factor_of(name)]) for name, cost in own.items()
        ]
        return GroupCost(list(zip(widths, own.values(), factors, strict=True)))

    def _features(self, constant: Trace | None, group: Group, carried: tuple[str, ...]) -> Tensor | None:
        """Columns that tell slices with unlike priors apart, together as far apart as the latents are."""
        if constant is None:
            return None
        features = varying_parameters(constant, group)
        if features is None:
            return None
        key = f"features of {group.name}"
        spread = 2 * features.flatten(0, 1).var(0, correction=0).sum()
        unit = (spread / self.state.mean_costs[group.name].to(spread)).sqrt()
        # The largest seen: a prior network near zero must not fix a unit that its features outgrow.
        self.state.units[key] = torch.maximum(unit, self.state.units.get(key, unit).to(unit))
        return features / self.state.units[key]

    @torch.no_grad()
    def _estimate(
        self,
        call: Call,
        first: Trace,
        group: Group,
        carried: tuple[str, ...],
        own: Mapping[str, SiteCost | None],
    ) -> None:
        """Units of the sites, factors of their own costs and mean cost of the group, from at least 512 prior points."""
        for name in (*carried, *group.sites):
            if name not in self.state.units:
                lay_out = functools.partial(embedded, name=name, plates=group.plates)
                pooled = reference_rows(call.prior, first, lay_out)
                geometry = geometry_of(first.nodes[name]["fn"], name)
                unit, centre = geometry.unit(pooled), geometry.tails(pooled)
                # One number for all columns would weigh a site in a plate inside the datum as if there were one of it.
                copies = math.prod(p.size for p in plates_of(first.nodes[name]) if p not in group.plates)
                self.state.units[name] = unit if unit.dim() else unit / math.sqrt(copies)
                if centre is not None:
                    self.state.units[centre_of(name)] = centre
        pooled = reference_rows(
            call.prior, first, lambda trace: torch.cat(self._columns(trace, group, own), -1)
        )
        start = 0
        for (name, cost), rows in zip(own.items(), self._columns(first, group, own), strict=True):
            if cost is not None and factor_of(name) not in self.state.units:
                mean = mean_cost(cost.matrix, pooled[:, start : start + rows.shape[-1]])
                self.state.units[factor_of(name)] = 2 * max(cost.geometry.dim, 1) / mean
            start += rows.shape[-1]
        self.state.mean_costs[group.name] = mean_cost(self._group_cost(first, group, own), pooled)


def factor_of(name: str) -> str:
    """Where the factor of a site's own cost is kept among the units."""
    return f"cost of {name}"


def centre_of(name: str) -> str:
    """Where the centre of a heavy-tailed site is kept among the units."""
    return f"centre of {name}"
