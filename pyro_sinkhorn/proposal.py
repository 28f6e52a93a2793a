r"""Simulations nearer to the observed data than the prior predictive, and the weights that make up for it.

Most simulations from a wide prior look nothing like the data at hand. Here a share :math:`1-\alpha` of the latents is drawn
from the prior *truncated* to a region :math:`A` around what the guide so far takes for the posterior at the observed data,
and a share :math:`\alpha` from the whole prior (a defensive mixture). The law proposed and its weight are

.. math::

    r(z) = p(z)\Bigl(\alpha + (1-\alpha)\frac{1[z\in A]}{P(A)}\Bigr), \qquad w(z) = \frac{p(z)}{r(z)} \le \frac1\alpha,

which needs no density: the prior cancels, and :math:`P(A)` is the share of prior draws that fall into the region. The weighted
energy score is that under the prior itself, so the guide stays a posterior for all data, best near these.

References: Deistler, Goncalves, Macke 2022, *Truncated proposals for scalable and hassle-free simulation-based inference*;
Hesterberg 1995, *Weighted average importance sampling and defensive mixture distributions*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.geometry.registry import geometry_of
from pyro_sinkhorn.structure import Site

#: Draws of latents from their prior, at least so many: by site, ``(m, *event)``.
Prior = Callable[[int], Mapping[str, Tensor]]

#: Prior draws that are looked through for one that falls into the region, at most, for each wanted.
_PATIENCE = 2000


@dataclass(frozen=True)
class Region:
    """All points as near to one of the anchors as these are to each other, with a margin.

    anchors:  ``(k, e)``, embedded draws of the guide at the observed data, in the prior's unit
    radius:   of the balls around them
    """

    anchors: Tensor
    radius: Tensor

    @classmethod
    def around(cls, anchors: Tensor, margin: float = 2.0) -> Region:
        """Balls as wide as ``margin`` times the largest distance of an anchor to its nearest neighbour."""
        distance = torch.cdist(anchors, anchors)
        distance.fill_diagonal_(torch.inf)
        nearest = distance.min(1).values
        return cls(anchors, margin * nearest[nearest.isfinite()].max())

    def holds(self, points: Tensor) -> Tensor:
        """Whether points ``(n, e)`` lie in the region."""
        inside = [
            (torch.cdist(part, self.anchors).min(1).values <= self.radius) for part in points.split(4096)
        ]
        return torch.cat(inside)


class Proposal:
    """Draws latents from the truncated prior or, now and then, from the whole of it.

    :param names: latents that are proposed, all of one datum or data set jointly
    :param share: of plain prior draws, the defensive part of the mixture
    :param carried: what the prior says of each draw besides, which stays with it: covariates that it was drawn for
    """

    def __init__(self, names: tuple[str, ...], share: float, carried: tuple[str, ...] = ()) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"the share of prior draws is {share}: expected a number above 0 and at most 1")
        self.names, self.share, self.carried = names, share, carried
        self.region: Region | None = None
        self.probability = 1.0
        self._unit: dict[str, Tensor] = {}
        self._stock: dict[str, Tensor] = {}

    def update(self, draws: Mapping[str, Tensor], prior: Prior, nodes: Mapping[str, Site]) -> None:
        """Centre the region on a guide's draws, and look how much of the prior lies in it.

        :param draws: by site, ``(k, *event)``
        :param prior: draws the latents from their prior
        :raises ProgramError: hardly any of the prior lies in the region
        """
        self._nodes = nodes
        reference = prior(4096)
        points = self._embedded(reference, fit=True)
        self.region = Region.around(self._embedded(draws))
        inside = self.region.holds(points)
        tried, held = len(points), [self._chosen(reference, inside)]
        n_held = int(inside.sum())
        while n_held < 256:
            if tried > 256 * _PATIENCE:
                raise ProgramError(
                    f"of {tried} prior draws of {list(self.names)} only {n_held} lie where the guide puts the posterior: "
                    "the guide is not trained far enough, or the prior is too wide to be truncated; train more rounds on "
                    "the whole prior first, or leave the proposal out"
                )
            more = prior(16384)
            inside = self.region.holds(self._embedded(more))
            held.append(self._chosen(more, inside))
            tried, n_held = tried + len(inside), n_held + int(inside.sum())
        self.probability = n_held / tried
        self._stock = {name: torch.cat([one[name] for one in held]) for name in held[0]}

    def draw(self, num: int, prior: Prior) -> tuple[dict[str, Tensor], Tensor]:
        """Latents ``(num, *event)`` by site, what is carried along, and their weights ``(num,)``, of mean about 1."""
        assert self.region is not None
        plain = torch.rand(num) < self.share
        drawn = prior(num)
        n_in = int((~plain).sum())
        while len(self._stock[self.names[0]]) < n_in:
            more = prior(max(int(1.2 * n_in / self.probability), 1024))
            inside = self.region.holds(self._embedded(more))
            chosen = self._chosen(more, inside)
            self._stock = {name: torch.cat([self._stock[name], chosen[name]]) for name in chosen}
        values = {}
        for name in (*self.names, *self.carried):
            value = drawn[name][:num].clone()
            value[~plain] = self._stock[name][:n_in].to(value)
            self._stock[name] = self._stock[name][n_in:]
            values[name] = value
        inside = self.region.holds(self._embedded(values)).double()
        weights = 1 / (self.share + (1 - self.share) * inside / self.probability)
        return values, weights

    def _chosen(self, values: Mapping[str, Tensor], inside: Tensor) -> dict[str, Tensor]:
        return {name: values[name][inside.to(values[name].device)] for name in (*self.names, *self.carried)}

    def _embedded(self, values: Mapping[str, Tensor], fit: bool = False) -> Tensor:
        columns = []
        for name in self.names:
            geometry = geometry_of(self._nodes[name]["fn"], name)
            rows = geometry.embed(values[name]).reshape(len(values[name]), -1)
            if fit:
                self._unit[name] = geometry.unit(rows)
            columns.append(rows / self._unit[name].to(rows))
        return torch.cat(columns, -1)
