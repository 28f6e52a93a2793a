"""Coordinates of a clique of latents: which columns its clouds have, in which unit, and what their distance costs."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.geometry.registry import geometry_at
from pyro_sinkhorn.losses.cliques import Clique
from pyro_sinkhorn.losses.clouds import blanked, embedded, varying_parameters
from pyro_sinkhorn.losses.matching import MatchState, mean_cost
from pyro_sinkhorn.losses.prior import reference_rows
from pyro_sinkhorn.losses.site_cost import GroupCost, SiteCost, site_cost
from pyro_sinkhorn.losses.states import JointStates
from pyro_sinkhorn.ot.cost import Cost
from pyro_sinkhorn.structure import Group, plates_of


class Coordinates:
    """Columns, units and costs of all cliques of a program; owns what is estimated once from its prior.

    :param given: the ``cost`` argument of the loss
    """

    def __init__(self, given: Any) -> None:
        self.given = given
        self.state = MatchState()

    def own_costs(self, prior: Trace, clique: Clique) -> dict[str, SiteCost | None]:
        """Sites of a clique in the order of their columns, each with its own cost if it has one."""
        given = self.given
        whole = not (given is None or isinstance(given, Mapping))  # a cost for all of the group

        def own(name: str) -> SiteCost | None:
            site = prior.nodes[name]
            return None if whole else site_cost(name, site, geometry_at(site), given)

        return {name: own(name) for name in clique.sites}

    def columns(
        self,
        trace: Trace,
        clique: Clique,
        own: Mapping[str, SiteCost | None],
        states: JointStates | None = None,
    ) -> list[Tensor]:
        """Rows ``(particles, n, e)`` of every site: embedded in the prior's unit, or as its cost wants it.

        :param states: as in :func:`~pyro_sinkhorn.losses.clouds.embedded`
        """
        columns = []
        for name, cost in own.items():
            rows = embedded(trace, name, clique.group.plates, None if cost is None else cost.columns, states)
            if cost is None or cost.in_units:
                unit, centre = self.state.units[name], self.state.units.get(centre_of(name))
                rows = rows if centre is None else rows - centre.to(rows)
                geometry = geometry_at(trace.nodes[name])
                rows = geometry.finish(rows / unit.to(rows), heavy=centre is not None)
            blank = self.state.units.get(blank_of(name))
            columns.append(blanked(rows, trace.nodes[name], clique.group.plates, blank))
        particles = max(rows.shape[0] for rows in columns)
        return [rows.expand(particles, *rows.shape[1:]) for rows in columns]

    def cost(self, prior: Trace, clique: Clique, own: Mapping[str, SiteCost | None]) -> Cost:
        """The cost between rows of :meth:`columns`."""
        given = self.given
        if given is not None and not isinstance(given, Mapping):
            return given
        if not any(own.values()):
            return "sqeuclidean"
        widths = [rows.shape[-1] for rows in self.columns(prior, clique, own)]
        factors = [
            1.0 if cost is None else float(self.state.units[factor_of(name)]) for name, cost in own.items()
        ]
        return GroupCost(list(zip(widths, own.values(), factors, strict=True)))

    def features(self, constant: list[Trace], clique: Clique) -> Tensor | None:
        """Columns that tell slices with unlike priors apart, as they are."""
        # Those of the latents carried along, too: slices that differ in them are not exchangeable either.
        group = Group(clique.sites, clique.group.plates)
        found: list[Tensor] = []
        for run in constant:
            varying = varying_parameters(run, group)
            # States mostly do not change how the covariates enter.
            if varying is not None and not any(torch.equal(varying, other) for other in found):
                found.append(varying)
        return torch.cat(found, -1) if found else None

    def in_unit(self, features: Tensor, clique: Clique) -> Tensor:
        """Such columns of all slices, together as far apart as the latents are."""
        key = f"features of {clique.name}"
        spread = 2 * features.flatten(0, 1).var(0, correction=0).sum()
        unit = (spread / self.state.mean_costs[clique.name].to(spread)).sqrt()
        # The largest seen: a prior network near zero must not fix a unit that its features outgrow.
        self.state.units[key] = torch.maximum(unit, self.state.units.get(key, unit).to(unit))
        return features / self.state.units[key]

    def estimate(
        self, first: Trace, clique: Clique, own: Mapping[str, SiteCost | None], draws: Draws
    ) -> None:
        """Units of the sites, factors of their own costs and mean cost of the clique, from at least 512 prior points.

        Only what has not been estimated before.
        """
        wanted = {
            *own,
            *map(blank_of, own),
            *(factor_of(name) for name, cost in own.items() if cost is not None),
        }
        if clique.name in self.state.mean_costs and wanted <= set(self.state.units):
            return
        plates = clique.group.plates
        with torch.no_grad():
            for name in clique.sites:
                if name in self.state.units:
                    continue
                lay_out = functools.partial(embedded, name=name, plates=plates)
                pooled = reference_rows(draws.again(), first, lay_out)
                geometry = geometry_at(first.nodes[name])
                unit, centre = geometry.unit(pooled), geometry.tails(pooled)
                # One number for all columns would weigh a site in a plate inside the datum as if there were one of it.
                copies = math.prod(p.size for p in plates_of(first.nodes[name]) if p not in plates)
                self.state.units[name] = unit if unit.dim() else unit / math.sqrt(copies)
                if centre is not None:
                    self.state.units[centre_of(name)] = centre
            pooled = reference_rows(
                draws.again(), first, lambda trace: torch.cat(self.columns(trace, clique, own), -1)
            )
            start = 0
            for (name, cost), rows in zip(own.items(), self.columns(first, clique, own), strict=True):
                if cost is not None and factor_of(name) not in self.state.units:
                    mean = mean_cost(cost.matrix, pooled[:, start : start + rows.shape[-1]])
                    self.state.units[factor_of(name)] = 2 * max(cost.geometry.dim, 1) / mean
                if blank_of(name) not in self.state.units:
                    drawn = pooled[:, start : start + rows.shape[-1]]
                    # The draw nearest to the mean: a constant between blank and other rows that costs little.
                    nearest = (drawn - drawn.mean(0)).square().sum(-1).argmin()
                    self.state.units[blank_of(name)] = drawn[nearest]
                start += rows.shape[-1]
            self.state.mean_costs[clique.name] = mean_cost(self.cost(first, clique, own), pooled)
        self.state.take_first()


class Draws:
    """Prior runs that all estimates of a call share, since each costs a run of the model."""

    def __init__(self, draw: Callable[[], Trace]) -> None:
        self._draw = draw
        self._drawn: list[Trace] = []

    def again(self) -> Callable[[], Trace]:
        """The same runs from the first, and fresh ones after the last."""
        position = itertools.count()

        def following() -> Trace:
            i = next(position)
            if i == len(self._drawn):
                self._drawn.append(self._draw())
            return self._drawn[i]

        return following


def factor_of(name: str) -> str:
    """Where the factor of a site's own cost is kept among the units."""
    return f"cost of {name}"


def blank_of(name: str) -> str:
    """Where the row that stands for a masked site is kept among the units."""
    return f"blank of {name}"


def centre_of(name: str) -> str:
    """Where the centre of a heavy-tailed site is kept among the units."""
    return f"centre of {name}"
