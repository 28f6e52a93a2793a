"""What is measured on canvases, given inferred and drawn latents; boxes are compared in pixels."""

from __future__ import annotations

import torch
from _canvas_data import Canvases, box_of, ink_box, looked_at
from torch import Tensor
from torch.nn.functional import avg_pool2d

INK = (
    0.3  # brightness from which a pixel belongs to the digit, of clean canvases and of reconstructions alike
)


def localisation(where: Tensor, clean: Tensor, canvases: Canvases) -> dict[str, float]:
    """Of inferred places ``(n, 3)`` and noise-free reconstructions ``(n, 64, 64)``.

    ``centre`` is the distance between centres, ``iou`` compares the square of the place with the square that the image was
    put into, ``ink_iou`` the rectangle around the ink of the reconstruction with that of the clean canvas.
    """
    side, centre = box_of(where)
    true_side, true_centre = box_of(canvases.where)
    iou = overlap(*_corners(side, centre), *_corners(true_side, true_centre))
    ink = overlap(*ink_box(clean, INK), *ink_box(canvases.clean, INK))
    return {
        "centre": float((centre - true_centre).norm(dim=-1).mean()),
        "side_bias": float((side / true_side).log().mean().exp()),
        "iou": float(iou.mean()),
        "iou_above_half": float((iou > 0.5).float().mean()),
        "ink_iou": float(ink.mean()),
        "clean_error": float((clean - canvases.clean).square().mean()),
    }


def _corners(side: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    half = side.unsqueeze(-1) / 2
    return centre - half, centre + half


def overlap(low: Tensor, high: Tensor, other_low: Tensor, other_high: Tensor) -> Tensor:
    """Intersection over union of rectangles, corners ``(n, 2)`` each."""
    shared = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp_min(0).prod(-1)
    return shared / ((high - low).prod(-1) + (other_high - other_low).prod(-1) - shared)


def standard(patches: Tensor, num_pixels: int) -> Tensor:
    """Patches as MNIST has them, in so many pixels: the ink 20 of 28 parts at its longer side, its mean in the middle."""
    low, high = ink_box(patches, INK)
    size = patches.shape[-1]
    side = (high - low).amax(-1) * 28 / 20
    weights = patches / patches.sum((-2, -1), keepdim=True).clamp_min(1e-6)
    at = torch.arange(size, dtype=patches.dtype) + 0.5
    middle = torch.stack([weights.sum(-2) @ at, weights.sum(-1) @ at], -1)
    return looked_at(patches, side / size, 2 * middle / size - 1, num_pixels)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased energy distance 2 E|x-y| - E|x-x'| - E|y-y'| between canvases seen at a quarter of their resolution."""
    x, y = (avg_pool2d(images.unsqueeze(1), 4).flatten(1) for images in (x, y))
    n, m = len(x), len(y)
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return float(2 * torch.cdist(x, y).mean() - within)


def dependence(x: Tensor, y: Tensor, num_permutations: int, seed: int = 0) -> dict[str, float]:
    r"""Bias-corrected distance correlation of paired rows, zero in expectation at independence, and its permutation p-value.

    With :math:`A` the U-centred matrix of distances between rows of x, and B of y,
    :math:`\langle A,B\rangle=\frac{1}{n(n-3)}\sum_{i\ne j}A_{ij}B_{ij}` estimates the squared distance covariance without bias,
    and the correlation is :math:`\langle A,B\rangle/\sqrt{\langle A,A\rangle\langle B,B\rangle}`.

    Székely and Rizzo 2014, *Partial distance correlation with methods for dissimilarities*.
    """
    a, b = _centred(x), _centred(y)
    generator = torch.Generator().manual_seed(seed)
    observed = (a * b).sum()
    shuffled = torch.stack(
        [
            (a * b[order][:, order]).sum()
            for order in (torch.randperm(len(x), generator=generator) for _ in range(num_permutations))
        ]
    )
    return {
        "distance_correlation": float(observed / (a.square().sum() * b.square().sum()).sqrt()),
        "p_independent": float((1 + (shuffled >= observed).sum()) / (1 + num_permutations)),
    }


def _centred(x: Tensor) -> Tensor:
    distances = torch.cdist(x.double(), x.double())
    n = len(x)
    rows = distances.sum(0) / (n - 2)
    centred = distances - rows - rows.unsqueeze(-1) + distances.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0)
