r"""Own costs of single sites: which a site has, and how a group adds them up.

A group of latents is compared by the sum of its sites' costs, each brought to the weight every site has: a mean of
:math:`2\,\mathtt{dim}` between two prior draws. Without a cost of its own a site is compared by the squared distance of
its embedding. Costs are looked for in this order:

1. the loss's argument: ``Trace_Sinkhorn(cost={"z": ...})``;
2. the model's annotation: ``pyro.sample("z", ..., infer={"sinkhorn": {"cost": ...}})``, or ``poutine.infer_config``;
3. the registered geometry's attribute ``cost``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.geometry.base import Geometry
from pyro_sinkhorn.geometry.curved import Circle, Sphere
from pyro_sinkhorn.ot.cost import NAMED, Cost, cost_matrix, geodesic

#: A cost for all of a group, or one for each of some sites; None leaves it to the sites.
GivenCost = Cost | Mapping[str, Cost] | None
#: What an annotation may say.
_KEYS = {"cost"}


@dataclass(frozen=True)
class SiteCost:
    """The cost of one site.

    name:      of the site
    cost:      a name, which sees the embedding, or a function of two tensors of values, ``(n, *event_shape)`` and
               ``(m, *event_shape)``, that returns ``(n, m)``
    geometry:  of the site
    """

    name: str
    cost: Cost
    geometry: Geometry

    @property
    def in_units(self) -> bool:
        """Whether it compares embeddings in the prior's unit; arcs and functions know none."""
        return isinstance(self.cost, str) and self.cost != "geodesic"

    def columns(self, value: Tensor) -> Tensor:
        """What this cost compares, ``(..., columns)``: values for a function, else the embedding."""
        return self.geometry.flatten(value) if callable(self.cost) else self.geometry.embed(value)

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """``(n, m)`` of columns ``(n, k * width)`` and ``(m, k * width)``: k events in a row add up."""
        if isinstance(self.cost, str) and self.cost != "geodesic":
            return cost_matrix(self.cost, x.unsqueeze(0), y.unsqueeze(0))[0]
        shape = self.geometry.event_shape
        angles = self.cost == "geodesic" and isinstance(self.geometry, Circle)
        width = math.prod(shape) * (2 if angles else 1)
        events = zip(x.split(width, -1), y.split(width, -1), strict=True)
        if callable(self.cost):
            matrices = [
                _checked(self.name, self.cost, a.reshape(-1, *shape), b.reshape(-1, *shape))
                for a, b in events
            ]
        elif angles:
            # Cosines of all angles come before their sines.
            pairs = [(_pairs(a), _pairs(b)) for a, b in events]
            matrices = [geodesic(a[:, i], b[:, i]) for a, b in pairs for i in range(a.shape[1])]
        else:
            size = shape[-1]
            matrices = [
                geodesic(u, v)
                for a, b in events
                for u, v in zip(a.split(size, -1), b.split(size, -1), strict=True)
            ]
        return torch.stack(matrices).sum(0)


def site_cost(name: str, site: Any, geometry: Geometry, given: GivenCost) -> SiteCost | None:
    """The own cost of a site, or None where the squared distance of its embedding serves.

    :param site: its node in a trace of the model
    :param given: the argument of the loss
    :raises ProgramError: an annotation or a cost that is none
    """
    annotation = site["infer"].get("sinkhorn", {})
    if not isinstance(annotation, Mapping) or not set(annotation) <= _KEYS:
        raise ProgramError(
            f"site {name!r} is annotated with infer={{'sinkhorn': {annotation!r}}}: expected a dictionary with the keys "
            f"{sorted(_KEYS)}"
        )
    cost: Any = given.get(name) if isinstance(given, Mapping) else None
    if cost is None:
        cost = annotation.get("cost")
    if cost is None:
        # A function on the class would be bound to its instance.
        cost = inspect.getattr_static(geometry, "cost")
        cost = cost.__func__ if isinstance(cost, staticmethod) else cost
    if cost is None or (cost == "sqeuclidean"):
        return None
    if not callable(cost) and cost not in NAMED:
        raise ProgramError(
            f"site {name!r}: unknown cost {cost!r}: expected one of {sorted(NAMED)} or a function of two tensors of values, "
            f"(n, *{tuple(geometry.event_shape)}) and (m, *{tuple(geometry.event_shape)})"
        )
    if cost == "geodesic" and not isinstance(geometry, (Sphere, Circle)):
        raise ProgramError(
            f"site {name!r}: cost='geodesic' is the arc on a sphere or circle, but its geometry is {geometry!r}: pass a "
            "function cost(x, y) of your own"
        )
    return SiteCost(name, cost, geometry)


def check_names(given: GivenCost, names: set[str]) -> None:
    """Every site that the loss's argument names must exist.

    :raises ProgramError: one does not
    """
    unknown = sorted(set(given) - names) if isinstance(given, Mapping) else []
    if unknown:
        raise ProgramError(
            f"cost= names the sites {unknown}, but the latents of the model are {sorted(names)}"
        )


class GroupCost:
    """The cost of a group, as every cost of :mod:`pyro_sinkhorn.ot`: blocks of columns, each with its own.

    :param blocks: width in columns, own cost or None, and factor of every site, in order. What comes after them
        (covariates) is compared by squared distance
    """

    def __init__(self, blocks: list[tuple[int, SiteCost | None, float]]) -> None:
        self.blocks = blocks

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """``(n, m)``."""
        total, plain_x, plain_y, start = x.new_zeros(()), [], [], 0
        for width, own, factor in self.blocks:
            a, b = x[:, start : start + width], y[:, start : start + width]
            start += width
            if own is None:
                plain_x.append(a)
                plain_y.append(b)
            else:
                total = total + factor * own.matrix(a, b)
        rest_x, rest_y = torch.cat([*plain_x, x[:, start:]], -1), torch.cat([*plain_y, y[:, start:]], -1)
        if rest_x.shape[-1]:
            total = total + NAMED["sqeuclidean"](rest_x, rest_y)
        return total


def _pairs(x: Tensor) -> Tensor:
    """``(n, 2 k)`` of cosines, then sines, to ``(n, k, 2)``."""
    return torch.stack(x.chunk(2, -1), -1)


def _checked(name: str, cost: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    matrix = cost(x, y)
    if not isinstance(matrix, Tensor) or matrix.shape != (len(x), len(y)):
        got = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ProgramError(
            f"site {name!r}: its cost was given values of shape {tuple(x.shape)} and {tuple(y.shape)} and returned {got}: "
            f"expected a tensor of shape {(len(x), len(y))}"
        )
    return matrix
