r"""The match of two joints over whole data sets and latents, for programs with globals.

A global has one draw a data set, so data sets are the points: two independent sets of simulated ones, the first with the
guide's latents, the second with those that made it. Compared are

- the globals beside a summary of their data set, :math:`(s(x), g)`;
- of every group of local latents some slices, :math:`(z_i, x_i, g)`, each slice with the same one of other data sets, so
  that covariates that vary along the plate are equal in both clouds.

All points of a cloud are of different data sets, hence independent: every point is a unit of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.guide.shown import DATA_SETS
from pyro_sinkhorn.losses.cliques import Clique
from pyro_sinkhorn.losses.clouds import Cloud, blanked, slices
from pyro_sinkhorn.losses.coordinates import Draws
from pyro_sinkhorn.losses.data_columns import DataColumns, mean_cost_within
from pyro_sinkhorn.losses.data_set_draws import data_sets_as_trace, draws_of_data_sets
from pyro_sinkhorn.losses.data_set_summary import Summaries
from pyro_sinkhorn.losses.joint_call import joint_groups
from pyro_sinkhorn.losses.joint_match import JointMatch
from pyro_sinkhorn.losses.latent_match import GroupMatch
from pyro_sinkhorn.losses.matching import match
from pyro_sinkhorn.losses.pairs import Pairs, Simulator
from pyro_sinkhorn.losses.site_cost import SiteCost, check_names
from pyro_sinkhorn.structure import Group, Plate, Structure, carried_along, nesting_of

#: Slices of every group of local latents that are compared at a call.
_SLICES = 4


@dataclass(frozen=True)
class DataSets:
    """One call of a program with globals: how to simulate data sets like the one it was called with.

    seen:  a plain run of the model on its data: sites, plates, masks
    num:   data sets of a cloud
    """

    model: Callable[..., Any]
    guide: Any
    args: Any
    kwargs: Any
    seen: Trace
    structure: Structure
    simulator: Simulator
    num: int
    indices: Mapping[str, Tensor]

    def pairs(self, only_latents: bool = False) -> Pairs:
        """Fresh simulations."""
        stop_after = self.structure.latents if only_latents else ()
        return self.simulator(
            self.model, self.args, self.kwargs, self.num, indices=self.indices, stop_after=stop_after
        )

    def simulated(self, only_latents: bool = False) -> Trace:
        """Fresh simulations with the latents that made them."""
        return data_sets_as_trace(self.pairs(only_latents), self.seen, self.structure)

    def inferred(self, pairs: Pairs | None = None) -> Trace:
        """Simulations with latents of the guide."""
        pairs = self.pairs() if pairs is None else pairs
        return draws_of_data_sets(
            self.guide,
            pairs,
            bool(self.simulator.vectorize),
            self.seen,
            self.structure,
            self.args,
            self.kwargs,
        )

    @property
    def plate(self) -> Plate:
        """The plate of the data sets."""
        return Plate(DATA_SETS, -(nesting_of(self.seen) + 1), self.num, self.num)


@dataclass(frozen=True)
class _Rows:
    """What one cloud is made of.

    latents:  globals, and below them the local latents of a group
    data:     observed sites of the slice; None for the summary of the data set
    counted:  slices that no mask hides; None where data sets are not cut
    """

    name: str
    latents: Clique
    data: tuple[str, ...] | None
    counted: Tensor | None


class DataSetMatch:
    """Match of the globals and of all groups of local latents; what it estimates is kept by a :class:`JointMatch`."""

    def __init__(self, joint: JointMatch) -> None:
        self.joint = joint

    def __call__(self, call: DataSets) -> list[GroupMatch]:
        """Compare data sets with the guide's latents and others with their own."""
        return self._compare(call, call.inferred(), call.simulated())

    @torch.no_grad()
    def floor(self, call: DataSets) -> list[GroupMatch]:
        """The same statistic between independent simulations."""
        return self._compare(call, call.simulated(), call.simulated())

    def coordinates(self, call: DataSets, trace: Trace, name: str) -> Tensor:
        """Rows ``(n, e)`` of the latents of one cloud, globals carried along left out, in the prior's unit."""
        rows = next(rows for rows in self._rows(call) if rows.name == name)
        own: dict[str, SiteCost | None] = dict.fromkeys(
            name for name in rows.latents.sites if rows.data is None or name not in call.structure.globals
        )
        return torch.cat(self.joint.latent_columns.columns(trace, rows.latents, own), -1).flatten(0, 1)

    def _compare(self, call: DataSets, left: Trace, right: Trace) -> list[GroupMatch]:
        joint = self.joint
        if isinstance(joint.options.cost, Mapping):
            check_names(joint.options.cost, set(call.structure.latents))
        summaries = Summaries(joint.state, joint.features_by_site(call.structure.data))
        summaries.estimate(right, call.seen, call.plate, call.structure.data)
        draws = Draws(functools.partial(call.simulated, only_latents=True))
        return [self._compare_rows(call, rows, left, right, summaries, draws) for rows in self._rows(call)]

    def _compare_rows(
        self, call: DataSets, rows: _Rows, left: Trace, right: Trace, summaries: Summaries, draws: Draws
    ) -> GroupMatch:
        joint, options = self.joint, self.joint.options
        if rows.counted is not None and not len(rows.counted):
            return GroupMatch(rows.name, torch.zeros(()), 0.0)
        plates = rows.latents.group.plates
        own = joint.latent_columns.own_costs(right, rows.latents)
        joint.latent_columns.estimate(right, rows.latents, own, draws)
        if rows.data is None:
            index = None
        else:
            assert rows.counted is not None
            index = rows.counted[torch.randperm(len(rows.counted))[:_SLICES]]
            # Whole data sets are what features= are of: of a slice its values are compared.
            values = DataColumns(joint.state, joint.data_columns.scale)
            for name in rows.data:
                values.estimate(right, name, plates, slices(right, Group((name,), plates))[0])

        def cloud(trace: Trace) -> Cloud:
            columns = joint.latent_columns.columns(trace, rows.latents, own)
            if rows.data is None:
                beside = [summaries.columns(trace, call.seen, call.plate, call.structure.data).unsqueeze(0)]
            else:
                # What a mask hides is simulated all the same, but no guide has seen it.
                beside = [
                    blanked(values.rows(trace, name, plates), trace.nodes[name], plates, torch.zeros(()))
                    for name in rows.data
                ]
            weight = math.sqrt(joint.data_weight)
            points = torch.cat([*columns, *(weight * one.to(columns[0]) for one in beside)], -1)
            if index is not None:  # every slice is a cloud of its own
                points = points.reshape(call.num, -1, points.shape[-1])[:, index].transpose(0, 1)
            return Cloud(points)

        x, y = cloud(left), cloud(right)
        cost = joint.latent_columns.cost(right, rows.latents, own)
        key = f"data sets of {rows.name}"
        if key not in joint.state.mean_costs:
            joint.state.mean_costs[key] = mean_cost_within(cost, y.points)
        value = match(
            x,
            y,
            joint.state.mean_costs[key].to(x.points),
            dataclasses.replace(options, cost=cost),
            group=f"data sets and latents ({rows.name})",
            warned=joint.warned,
        )
        return GroupMatch(rows.name, value.mean(), 1.0)

    def _rows(self, call: DataSets) -> list[_Rows]:
        structure, plate = call.structure, call.plate
        found = []
        names = ", ".join(structure.globals)
        found.append(_Rows(names, Clique(names, Group(structure.globals, (plate,)), (), 1.0), None, None))
        groups = joint_groups(structure, call.seen)
        for group in groups:
            sites = (*carried_along(group, groups), *group.sites)
            local = tuple(name for name in sites if name in structure.locals)
            if not local:
                continue  # data alone: the summary holds them
            data = tuple(name for name in sites if name not in structure.locals)
            inner = Group(tuple(name for name in group.sites if name in local), (plate, *group.plates))
            carried = (*structure.globals, *(name for name in local if name not in inner.sites))
            clique = Clique(", ".join((*carried, *inner.sites)), inner, carried, 1.0)
            weights = slices(call.seen, group)[0]
            found.append(_Rows(group.name, clique, data, (weights > 0).nonzero().flatten()))
        return found
