r"""Digits somewhere on a canvas, with salt noise: the data of the study, made from digit images by a seed.

An image of a digit, a square with MNIST's margins, is put on an empty canvas, 64 pixels wide, by a *place*
:math:`w\in\mathbb R^3`: its side is :math:`28\,e^{0.2 w_1}` pixels and its centre :math:`32 + 8\,(w_2, w_3)`. Places are drawn
from N(0, I) until the square lies within the canvas. Then every pixel turns white with probability 3%: the salt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from _mnist import Split
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

SIDE = 64
GLYPH = 28
SIDE_SPREAD = 0.2
CENTRE_SPREAD = 8.0
SALT = 0.03


def box_of(where: Tensor) -> tuple[Tensor, Tensor]:
    """Side ``(...)`` and centre ``(..., 2)``, across and down, in pixels, of the square at a place ``(..., 3)``."""
    return GLYPH * (SIDE_SPREAD * where[..., 0]).exp(), SIDE / 2 + CENTRE_SPREAD * where[..., 1:]


def place(patches: Tensor, where: Tensor) -> Tensor:
    """Square patches ``(n, g, g)`` at places ``(n, 3)`` of empty canvases ``(n, 64, 64)``: a spatial transformer."""
    side, centre = box_of(where)
    ratio = side / SIDE
    return looked_at(patches, 1 / ratio, -(2 * centre / SIDE - 1) / ratio.unsqueeze(-1), SIDE)


def cut(images: Tensor, where: Tensor, num_pixels: int, margin: float = 1.0) -> Tensor:
    """What canvases ``(n, 64, 64)`` show in the squares at places ``(n, 3)``, ``margin`` times as wide."""
    side, centre = box_of(where)
    return looked_at(images, margin * side / SIDE, 2 * centre / SIDE - 1, num_pixels)


def looked_at(images: Tensor, zoom: Tensor, shift: Tensor, num_pixels: int) -> Tensor:
    """Images ``(n, h, h)`` at the points zoom · v + shift, ``(n,)`` and ``(n, 2)``, for v in a square grid."""
    scaled = zoom[:, None, None] * torch.eye(2, dtype=images.dtype)
    grid = affine_grid(
        torch.cat([scaled, shift.unsqueeze(-1)], -1),
        [len(images), 1, num_pixels, num_pixels],
        align_corners=False,
    )
    return grid_sample(images.unsqueeze(1), grid, align_corners=False).squeeze(1)


@dataclass(frozen=True)
class Canvases:
    """Canvases with and without noise, ``(n, 64, 64)``, their true places and the digits' labels."""

    noisy: Tensor
    clean: Tensor
    where: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.noisy)


def make(images: Tensor, labels: Tensor, seed: int) -> Canvases:
    """One canvas for every digit image ``(n, h, h)`` with values in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    where = torch.randn(len(images), 3, generator=generator)
    while len(out := torch.nonzero(~_inside(where)).flatten()):
        where[out] = torch.randn(len(out), 3, generator=generator)
    clean = place(images, where)
    salt = torch.rand(clean.shape, generator=generator) < SALT
    return Canvases(torch.where(salt, torch.ones_like(clean), clean), clean, where, labels)


def _inside(where: Tensor) -> Tensor:
    side, centre = box_of(where)
    return ((centre - SIDE / 2).abs().amax(-1) + side / 2) <= SIDE / 2


def ink_box(images: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Corners ``(n, 2)``, across and down, of the smallest rectangle that holds all pixels above a threshold.

    An image without any has its whole as the rectangle.
    """
    ink = images > threshold
    size = images.shape[-1]
    at = torch.arange(size, dtype=images.dtype)
    low, high = [], []
    for used in (ink.any(-2), ink.any(-1)):  # columns, rows
        none = ~used.any(-1)
        low.append(torch.where(used, at, size).amin(-1).masked_fill(none, 0))
        high.append(torch.where(used, at + 1, 0).amax(-1).masked_fill(none, size))
    return torch.stack(low, -1), torch.stack(high, -1)


def canvases_of(split: Split, num_train: int, num_held: int) -> dict[str, Canvases]:
    """Canvases to train, to choose weights and to test, of the images that the split has for each."""
    parts = {
        "train": (split.train, split.y_train, num_train),
        "validation": (split.validation, split.y_validation, num_held),
        "test": (split.test, split.y_test, num_held),
    }
    shape = (split.side, split.side)
    return {
        part: make(x[:n].unflatten(-1, shape), y[:n], seed)
        for seed, (part, (x, y, n)) in enumerate(parts.items(), 1)
    }
