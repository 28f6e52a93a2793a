"""What every exhibit is, and what several need: simulated data, digits, drawings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from sklearn.datasets import load_digits
from torch import Tensor

from pyro_sinkhorn import AutoImplicit, SinkhornProgram, Trace_Sinkhorn

NUM_TRAIN = 1497  # of 1797 digits


@dataclass(frozen=True)
class Exhibit:
    """A program and the data it is fitted to; ``check`` and ``draw`` are called after the fit."""

    program: SinkhornProgram
    data: tuple[Tensor, ...]
    check: Callable[[], str]
    draw: Callable[[Any], None]
    num_steps: int = 400
    lr: float = 5e-3


def fitted_by(
    model: Any, reads: Callable[..., Tensor] | None = None, loss: Any = None, **options: Any
) -> SinkhornProgram:
    """A program whose encoder reads what is said, or the data; ``options`` are those of AutoImplicit."""
    guide = AutoImplicit(model, encoder_input=reads, **options)
    return SinkhornProgram(model, guide, loss or Trace_Sinkhorn(prior_weight=100.0))


@torch.no_grad()
def simulate(
    model: Any, *args: Tensor, seed: int = 0, given: dict[str, Tensor] | None = None, **parameters: Tensor
) -> dict[str, Tensor]:
    """One draw of all sites of a model, but those given, whose parameters are these."""
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, value in parameters.items():
            pyro.param(name, value.clone())  # which will require a gradient
        program = poutine.condition(poutine.uncondition(model), given or {})
        sites = poutine.trace(program).get_trace(*args).nodes
        return {name: site["value"] for name, site in sites.items() if site["type"] == "sample"}


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Images with values in [0, 1] and their labels, in random order."""
    data = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.data / 16, dtype=torch.get_default_dtype())
    return images[order], torch.tensor(data.target)[order]


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.square().mean().sqrt())


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased energy distance between two clouds, 2 E|x-y| - E|x-x'| - E|y-y'|; 0 for equal laws."""
    n, m = len(x), len(y)
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return float(2 * torch.cdist(x, y).mean() - within)


def show_images(axes: Any, images: Tensor, columns: int) -> None:
    """Square images, ``(n, side, side)`` or flattened, in a grid with grey lines between."""
    side = round(images[0].numel() ** 0.5)
    padded = torch.nn.functional.pad(images.reshape(-1, columns, side, side), (1, 1, 1, 1), value=0.2)
    axes.imshow(padded.permute(0, 2, 1, 3).reshape(-1, columns * (side + 2)), cmap="gray_r", vmin=0, vmax=1)
    axes.set_axis_off()


def scatter(axes: Any, truth: Tensor, found: Tensor, label: str) -> None:
    """Found against true values, and the diagonal."""
    axes.plot(truth.flatten(), found.flatten(), ".", ms=2, alpha=0.4)
    ends = [float(truth.min()), float(truth.max())]
    axes.plot(ends, ends, color="0.4", lw=1)
    axes.set(xlabel=f"true {label}", ylabel="encoded")


def decoded(program: SinkhornProgram, *codes: Tensor) -> Tensor:
    """Images of codes."""
    with torch.no_grad():
        return program.modules["decoder"](torch.cat(codes, -1)).sigmoid()
