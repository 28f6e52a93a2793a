"""Test canvases with boxes, reconstructions and samples of every method, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _canvas_data import box_of
from torch import Tensor

TITLES = {"joint": "Sinkhorn, joint", "marginal": "Sinkhorn, sum of two costs", "AIR": "AIR, simplified"}


@dataclass(frozen=True)
class Shown:
    """What is drawn of one method: n test canvases with true and inferred places, reconstructions, 2n samples."""

    method: str
    noisy: Tensor
    true_where: Tensor
    where: Tensor
    reconstruction: Tensor
    samples: Tensor


def draw(methods: list[Shown], path: Path) -> Path:
    """One block of columns a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n = len(methods[0].noisy)
    figure = plt.figure(figsize=(15, 4.1), layout="constrained")
    for block, shown in zip(figure.subfigures(1, len(methods), wspace=0.03), methods, strict=True):
        block.suptitle(TITLES[shown.method])
        axes = block.subplots(4, n)
        images = [shown.noisy, shown.reconstruction, shown.samples[:n], shown.samples[n:]]
        for row, (label, strip) in enumerate(
            zip(("data", "reconstructed", "samples", ""), images, strict=True)
        ):
            for column, image in enumerate(strip):
                axis = axes[row, column]
                axis.imshow(image, cmap="gray", vmin=0, vmax=1, extent=(0, 64, 64, 0))
                axis.set(xticks=[], yticks=[], xlim=(0, 64), ylim=(64, 0))
                if row == 0:
                    _box(axis, shown.true_where[column], "#56b4e9", "--")
                    _box(axis, shown.where[column], "#e69f00", "-")
            if shown is methods[0]:
                axes[row, 0].set_ylabel(label, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _box(axis: Any, where: Tensor, colour: str, style: str) -> None:
    from matplotlib.patches import Rectangle

    side, centre = box_of(where)
    corner = (float(centre[0] - side / 2), float(centre[1] - side / 2))
    axis.add_patch(Rectangle(corner, float(side), float(side), fill=False, ec=colour, ls=style, lw=1.4))
