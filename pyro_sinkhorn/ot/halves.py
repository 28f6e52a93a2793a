r"""How clouds are split for the independent-halves divergence.

Rules without which the estimate is biased again: the four halves are **equal** in units (odd ones are dropped
at random), split **at random** (data may be sorted), and by **unit**: points that belong together (words of
one document, particles of one datum) stay together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Half:
    """Points of ``n_blocks`` halves: ``index`` and ``weight``, ``(n_blocks, k)``.

    Padding has weight 0, everything else 1; no weights where there is no padding.
    """

    index: Tensor
    weight: Tensor | None


@dataclass(frozen=True)
class Halves:
    """Two independent halves of each cloud, for every block."""

    x1: Half
    x2: Half
    y1: Half
    y2: Half


def draw_halves(
    n_x: int,
    n_y: int,
    size: int | None = None,
    units_x: Tensor | None = None,
    units_y: Tensor | None = None,
    shared: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Halves:
    """Split clouds of ``n_x`` and ``n_y`` points into disjoint blocks of two halves each.

    :param size: units in a half; default (and at most) half of the smaller cloud. Where both clouds hold
        several times ``2 * size`` units, they are cut into that many blocks, whose estimates are averaged
    :param units_x: unit of each point, integers ``(n_x,)``; default every point its own
    :param shared: the clouds are paired unit by unit (they share covariates): split both alike, so that ``x1``
        and ``y2`` have no unit in common
    :param generator: source of randomness; torch's global one by default
    :raises ValueError: where a cloud has fewer than two units

    >>> halves = draw_halves(5, 8)
    >>> [tuple(half.index.shape) for half in (halves.x1, halves.x2, halves.y1, halves.y2)]
    [(1, 2), (1, 2), (1, 2), (1, 2)]
    """
    (ids_x, members_x), (ids_y, members_y) = _members(n_x, units_x, device), _members(n_y, units_y, device)
    width = max(members_x.shape[1], members_y.shape[1])
    members_x, members_y = _pad(members_x, width), _pad(members_y, width)
    units = min(len(members_x), len(members_y))
    if units < 2:
        raise ValueError(
            f"clouds of {len(members_x)} and {len(members_y)} independent units cannot be split into two "
            "halves: give at least 2 of each, or debias='self' or None"
        )
    if shared and not torch.equal(ids_x, ids_y):
        raise ValueError(
            f"clouds paired by unit must hold the same units: given {len(ids_x)} and {len(ids_y)} of them, "
            f"{len(set(ids_x.tolist()) & set(ids_y.tolist()))} in common"
        )
    if size is not None and size < 1:
        raise ValueError(f"match_size is {size}: expected a positive number of units in each half")
    size = units // 2 if size is None else min(size, units // 2)
    n_blocks = units // (2 * size)
    source = None if generator is None else generator.device
    order_x = torch.randperm(len(members_x), generator=generator, device=source).to(members_x.device)
    order_y = order_x
    if not shared:
        order_y = torch.randperm(len(members_y), generator=generator, device=source).to(members_y.device)

    def take(members: Tensor, order: Tensor, half: int) -> Half:
        chosen = order[: n_blocks * 2 * size].reshape(n_blocks, 2, size)[:, half]
        index = members[chosen].reshape(n_blocks, -1)
        if width == 1:
            return Half(index, None)
        present = index >= 0
        return Half(index.clamp_min(0), present.to(torch.get_default_dtype()))

    return Halves(
        take(members_x, order_x, 0),
        take(members_x, order_x, 1),
        take(members_y, order_y, 0),
        take(members_y, order_y, 1),
    )


def _members(n: int, units: Tensor | None, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Sorted unit ids, and the point indices of each unit, ``(n_units, largest unit)``, padded with -1."""
    if units is None:
        points = torch.arange(n, device=device)
        return points, points.unsqueeze(-1)
    if units.shape != (n,):
        raise ValueError(f"unit ids have shape {tuple(units.shape)}: expected ({n},), one for each point")
    ids, unit, counts = units.unique(return_inverse=True, return_counts=True)
    order = unit.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    position = torch.arange(n, device=units.device) - starts[unit[order]]
    members = units.new_full((len(counts), int(counts.max())), -1, dtype=torch.long)
    members[unit[order], position] = order
    return ids, members


def _pad(members: Tensor, width: int) -> Tensor:
    """Equal sizes for all halves, so that one batch holds every problem."""
    return torch.nn.functional.pad(members, (0, width - members.shape[1]), value=-1)
