"""The match of every latent clique of a program: prior runs, clouds, gather, match."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.distributed import active
from pyro_sinkhorn.losses.call import Call
from pyro_sinkhorn.losses.cliques import Clique, Grouping, cliques_of, model_graph
from pyro_sinkhorn.losses.clouds import (
    Cloud,
    CloudStates,
    is_ragged,
    make_cloud,
    particles_of,
    rows,
    slices,
    varying_parameters,
)
from pyro_sinkhorn.losses.coordinates import Coordinates, Draws
from pyro_sinkhorn.losses.gathering import Rows, gather
from pyro_sinkhorn.losses.matching import MatchOptions, MatchState, match
from pyro_sinkhorn.losses.prior import fixed_values, warn_if_gradient_lost
from pyro_sinkhorn.losses.site_cost import SiteCost, check_names
from pyro_sinkhorn.ot.cost import Cost


@dataclass(frozen=True)
class GroupMatch:
    """The normalised divergence of one clique, averaged over particles and prior clouds.

    n_data:  the data it stands for, shared between the cliques of their plates
    """

    name: str
    value: Tensor
    n_data: float


@dataclass(frozen=True)
class _Comparison:
    """Clouds of one clique, ready to be compared; ``y`` has one for each prior run."""

    clique: Clique
    x: Cloud
    y: list[Cloud]
    mean: Tensor
    paired: bool
    cost: Cost

    def like(self, other: _Comparison) -> bool:
        """Whether both can be compared in one go, as further problems of a batch."""
        return (
            self.clique.group.plates == other.clique.group.plates
            and self.x.points.shape
            == other.x.points.shape
            == self.y[0].points.shape
            == other.y[0].points.shape
            and self.paired == other.paired
            and self.cost == other.cost == "sqeuclidean"
            and self.x.states is None
            and other.x.states is None
            and _equal(self.x.units, other.x.units)
            and _equal(self.x.weights, other.x.weights)
        )


class LatentMatch:
    """Match of all cliques of a program; owns what is estimated once from its prior.

    :param options: how clouds are compared
    :param grouping: which latents are compared together, see :mod:`pyro_sinkhorn.losses.cliques`
    :param num_prior_batches: independent prior clouds a call
    """

    def __init__(
        self, options: MatchOptions, grouping: Grouping = "joint", num_prior_batches: int = 1
    ) -> None:
        self.options = self._options_at = options  # the second with the cost of the last comparison
        self.grouping = grouping
        self.num_prior_batches = num_prior_batches
        self.coordinates_of_prior = Coordinates(options.cost)
        self._graph: dict[str, frozenset[str]] | None = None
        self._warned: set[str] = set()

    @property
    def state(self) -> MatchState:
        """What was estimated from the prior."""
        return self.coordinates_of_prior.state

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
        if cost is not self._options_at.cost:
            self._options_at = dataclasses.replace(self.options, cost=cost)
        options = self._options_at
        label = f"latent group ({group})"
        return match(x, y, mean, options, group=label, paired=paired, warned=self._warned)

    def coordinates(self, call: Call, name: str) -> Tensor:
        """Rows ``(particles * n, e)`` of the scored trace for the clique of this name, in the prior's unit."""
        clique = next(clique for clique in self.cliques(call) if clique.name == name)
        own: dict[str, SiteCost | None] = dict.fromkeys(clique.sites)
        return torch.cat(self.coordinates_of_prior.columns(call.scored, clique, own), -1).flatten(0, 1)

    def cliques(self, call: Call) -> list[Clique]:
        """What is compared together, in the order of the matches."""

        def graph() -> dict[str, frozenset[str]]:
            if self._graph is None or set(self._graph) != set(call.structure.locals):
                values = fixed_values(call.structure, call.scored)
                self._graph = model_graph(call.model, call.args, call.kwargs, call.structure, values)
            return self._graph

        return cliques_of(self.grouping, call.structure, graph)

    def _compare(self, call: Call, left: Trace, priors: list[Trace]) -> list[GroupMatch]:
        constant: list[Trace] = []
        check_names(self.options.cost, set(call.structure.locals))
        cliques = self.cliques(call)
        # Asked at every call: a batch may have equal covariates by chance, a prior network may start at zero. The run
        # is spared where parameters agree even below different latents.
        if any(varying_parameters(priors[0], group) is not None for group in call.structure.groups):
            constant = call.constant(priors[0])
        varying = [
            group
            for group in call.structure.groups
            if any(varying_parameters(run, group) is not None for run in constant)
        ]
        draws = Draws(call.prior)
        laid_out = {}
        for clique in cliques:
            weights, n = slices(call.scored, clique.group)
            if n or active() is not None:  # others may have data where this process has none
                laid_out[clique.name] = self._lay_out(call, left, priors, constant, clique, weights, n, draws)
        gathered = dict(zip(laid_out, gather(list(laid_out.values())), strict=True))
        values: dict[str, Tensor] = {}
        n_data: dict[str, float] = {}
        ready: list[_Comparison] = []
        for clique in cliques:
            held = gathered.get(clique.name)
            n_data[clique.name] = 0.0 if held is None else held.n_data * clique.share
            if held is None or held.n_data == 0:
                values[clique.name] = torch.zeros(())
            else:
                # Covariates reach a clique through latents that it does not hold: its slices have unlike laws, too.
                unlike = any(set(group.plates) <= set(clique.group.plates) for group in varying)
                ready.append(self._prepare(held, clique, priors[0], unlike))
        while ready:
            batch = [other for other in ready if other is ready[0] or other.like(ready[0])]
            ready = [other for other in ready if not any(other is one for one in batch)]
            values |= self._values(batch)
        return [GroupMatch(name, values[name], n) for name, n in n_data.items()]

    def _lay_out(
        self,
        call: Call,
        left: Trace,
        priors: list[Trace],
        constant: list[Trace],
        clique: Clique,
        weights: Tensor,
        n_data: float,
        draws: Draws,
    ) -> Rows:
        """The clique in every trace as rows, those of this process."""
        found = self.coordinates_of_prior
        own = found.own_costs(priors[0], clique)
        found.estimate(priors[0], clique, own, draws)
        states = None
        if call.enumeration is not None and left is call.scored:
            states = self._states(call, clique, own)
        return Rows(
            [torch.cat(found.columns(trace, clique, own), -1) for trace in (left, *priors)],
            weights,
            n_data,
            clique.group,
            found.features(constant, clique),
            states,
            is_ragged(call.scored, own, weights, clique.group),
        )

    def _prepare(self, held: Rows, clique: Clique, prior: Trace, unlike: bool) -> _Comparison:
        """The rows of all processes as clouds."""
        found = self.coordinates_of_prior
        features = None if held.beside is None else found.in_unit(held.beside, clique)

        def with_features(points: Tensor) -> Tensor:
            if features is None:
                return points
            beside = features if points.dim() == 3 else features.unsqueeze(2)
            return torch.cat([points, beside.expand(*points.shape[:-1], -1)], -1)

        states = held.states
        if states is not None:
            states = CloudStates(with_features(states.points), states.probabilities)
        x, *y = (
            make_cloud(with_features(points), held.weights, held.group, states if i == 0 else None)
            for i, points in enumerate(held.points)
        )
        return _Comparison(
            clique,
            x,
            y,
            self.state.mean_costs[clique.name].to(x.points),
            unlike or x.paired or held.ragged,
            found.cost(prior, clique, found.own_costs(prior, clique)),
        )

    def _states(self, call: Call, clique: Clique, own: dict[str, SiteCost | None]) -> CloudStates | None:
        """The clique at all states that its latents depend on; None where there is no choice."""
        enumeration = call.enumeration
        assert enumeration is not None
        nodes = [enumeration.trace.nodes[name] for name in clique.sites]
        states, sites = enumeration.joint((node["value"], node["fn"].event_dim) for node in nodes)
        if not sites:
            return None
        with torch.no_grad():
            columns = self.coordinates_of_prior.columns(enumeration.trace, clique, own, states)
        table = states.at_all(enumeration.probabilities(sites), 0).movedim(0, -1)
        points = torch.cat(columns, -1)
        probabilities = rows(table, particles_of(nodes[0]), clique.group.plates)
        # Where only states are there, all particles share the places, and each has probabilities of its own.
        lead = torch.broadcast_shapes(points.shape[:-1], probabilities.shape)
        return CloudStates(points.expand(*lead, -1), probabilities.expand(lead))

    def _values(self, batch: list[_Comparison]) -> dict[str, Tensor]:
        """Mean divergence of every comparison of a batch: cliques lie side by side where else only particles do."""
        first = batch[0]
        if len(batch) == 1:
            compared = [
                self.divergence(first.x, y, first.mean, first.clique.name, first.paired, first.cost).mean()
                for y in first.y
            ]
            return {first.clique.name: torch.stack(compared).mean()}
        n_particles = len(first.x.points)
        mean = torch.stack([one.mean for one in batch]).repeat_interleave(n_particles)
        label = f"{first.clique.name} to {batch[-1].clique.name}"
        x = dataclasses.replace(first.x, points=torch.cat([one.x.points for one in batch]))
        values = []
        for clouds in zip(*(one.y for one in batch), strict=True):
            y = dataclasses.replace(clouds[0], points=torch.cat([cloud.points for cloud in clouds]))
            found = self.divergence(x, y, mean, label, first.paired, first.cost)
            values.append(found.reshape(len(batch), -1).mean(-1))
        averaged = torch.stack(values).mean(0)
        return {one.clique.name: averaged[i] for i, one in enumerate(batch)}


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool((a == b).all())
