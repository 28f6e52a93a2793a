r"""One squared Euclidean problem, its plan a tile at a time: nothing ``n x m`` is ever held.

A tile of exponents in base 2 is one product of points with their biases appended (see
:mod:`pyro_sinkhorn.ot.backends.exponents`), exponentiated in place. Tiles are made anew whenever they are needed: a
fresh entry costs little, and memory stays at :math:`O((n+m)d)`.

A tile has about :data:`ENTRIES` entries, which stay in the cache of a processor between the product, the exponential and
the sums. It is wide and flat where a sum over a whole cloud is needed at once, square elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_sinkhorn.ot.precision import full_precision

#: Entries of a tile by type of device. On a processor, smaller ones pay for calls and larger ones leave the
#: cache; other devices want work enough for a launch.
ENTRIES = {"cpu": 2**20}
ENTRIES_ELSEWHERE = 2**24

Function = TypeVar("Function", bound=Callable[..., Any])


def in_full_precision(function: Function) -> Function:
    """Without autocast and without a graph."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), full_precision():
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


@dataclass(frozen=True)
class Cloud:
    """Points of positive weight: centred, ``(n, d)``; weights ``(n,)``; ``scale`` is :math:`s = \\log_2 e/\\varepsilon`."""

    points: Tensor
    weights: Tensor
    scale: Tensor

    def rows(self, potential: Tensor) -> Tensor:
        """Of tiles: ``(2 s x, phi - s |x|^2, 1)``, ``(n, d + 2)``."""
        bias = potential - self.scale * self.points.square().sum(-1)
        return torch.cat([2 * self.scale * self.points, bias[:, None], torch.ones_like(bias)[:, None]], -1)

    def columns(self, potential: Tensor) -> Tensor:
        """Of tiles: ``(y, 1, gamma - s |y|^2)``, transposed: ``(d + 2, m)``."""
        bias = potential - self.scale * self.points.square().sum(-1)
        return torch.cat([self.points.mT, torch.ones_like(bias)[None], bias[None]])


class Tile:
    """Room for one tile after the other: fresh memory would cost more than the exponentials."""

    def __init__(self, like: Tensor) -> None:
        self._room = like.new_empty(0)

    def exponents(self, rows: Tensor, columns: Tensor) -> Tensor:
        """``phi_i + gamma_j - s |x_i - y_j|^2``. The next call overwrites it."""
        shape = len(rows), columns.shape[1]
        if self._room.numel() < math.prod(shape):
            self._room = rows.new_empty(math.prod(shape))
        out = self._room[: math.prod(shape)].view(shape)
        if products_are_exact(rows):
            return torch.mm(rows, columns, out=out)
        # Of a product with short mantissas the biases, which are large, stay out.
        torch.mm(rows[:, :-2], columns[:-2], out=out)
        return out.add_(rows[:, -2:-1]).add_(columns[-1])


def products_are_exact(like: Tensor) -> bool:
    """Whether a matrix product has all digits of its dtype, whatever the settings of torch."""
    if like.dtype == torch.float64:
        return True
    try:
        return like.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the answer of torch where its old and its new settings were both used
        return False


def strips(length: int, width: int, like: Tensor) -> Iterator[slice]:
    """Cut ``length`` rows of ``width`` entries into wide, flat tiles."""
    # Products with few rows are slow, and a tile of 40 is still of the size of the clouds.
    height = max(40, ENTRIES.get(like.device.type, ENTRIES_ELSEWHERE) // width)
    return (slice(start, min(start + height, length)) for start in range(0, length, height))


def blocks(length: int, like: Tensor) -> list[slice]:
    """Cut one side of square tiles."""
    side = math.isqrt(ENTRIES.get(like.device.type, ENTRIES_ELSEWHERE))
    return [slice(start, min(start + side, length)) for start in range(0, length, side)]


def half_step(rows: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    r"""The log-domain half-step :math:`-\log_2\sum_j w_j 2^{E_{ij}}` of the exponents, ``(n,)``; no range can upset it."""
    tile, found = Tile(rows), rows.new_empty(len(rows))
    for strip in strips(len(rows), columns.shape[1], rows):
        exponents = tile.exponents(rows[strip], columns)
        largest = exponents.amax(-1, keepdim=True)
        found[strip] = -(exponents.sub_(largest).exp2_() @ weights).log2_() - largest.squeeze(-1)
    return found


def product(rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """``2^E @ values``: ``(m, k)`` to ``(n, k)``."""
    # Few rows times a matrix, whichever way the tile lies: a tile times few columns takes ten times as long.
    tile, flat, found = Tile(rows), values.mT.contiguous(), values.new_zeros(values.shape[1], len(rows))
    for i in blocks(len(rows), rows):
        for j in blocks(columns.shape[1], rows):
            found[:, i].addmm_(flat[:, j], tile.exponents(rows[i], columns[:, j]).exp2_().mT)
    return found.mT


def transposed_product(rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """``(2^E).mT @ values``, of the very same tiles: ``(n, k)`` to ``(m, k)``."""
    tile, flat, found = (
        Tile(rows),
        values.mT.contiguous(),
        values.new_zeros(values.shape[1], columns.shape[1]),
    )
    for i in blocks(len(rows), rows):
        for j in blocks(columns.shape[1], rows):
            found[:, j].addmm_(flat[:, i], tile.exponents(rows[i], columns[:, j]).exp2_())
    return found.mT


def symmetric_product(rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """``2^E @ values`` where E is symmetric, from the tiles of its upper triangle."""
    tile, flat = Tile(rows), values.mT.contiguous()
    found, cuts = torch.zeros_like(flat), blocks(len(rows), rows)
    for k, i in enumerate(cuts):
        for j in cuts[k:]:
            density = tile.exponents(rows[i], columns[:, j]).exp2_()
            found[:, i].addmm_(flat[:, j], density.mT)
            if j is not i:
                found[:, j].addmm_(flat[:, i], density)
    return found.mT
