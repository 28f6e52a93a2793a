"""A fit that several processes share: each is given all data, and takes its part of every minibatch.

``batch_size`` is that of all together, so that a script means the same alone and under ``torchrun``. Rank 0 draws the
positions of a minibatch, and every rank takes its piece of them; pieces are equally long, or one apart.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_sinkhorn import distributed
from pyro_sinkhorn.distributed import Ranks
from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.losses.shared import refuse_unshared
from pyro_sinkhorn.rng import undisturbed
from pyro_sinkhorn.runs import run_model
from pyro_sinkhorn.structure import structure_of
from pyro_sinkhorn.training.data_scale import Batches
from pyro_sinkhorn.training.minibatches import Batch, Minibatches


class Part:
    """Minibatches of which this process takes its part."""

    def __init__(self, batches: Minibatches) -> None:
        self.batches = batches
        self.ranks = Ranks("between two steps of fit")

    def draw(self) -> Batch:
        """This rank's part of the next minibatch."""
        positions = self.ranks.of_first(self.batches.positions(), "drawing a minibatch")
        return self.batches.pick(positions.tensor_split(self.ranks.size)[self.ranks.rank])


def shared_out(model: Callable[..., Any], loss: Any, batches: Batches) -> Batches | Part:
    """The minibatches that a fit is to draw from: those given when alone, else this rank's part of each.

    :raises ProgramError: the loss or the data cannot be shared out, or differ between ranks
    """
    if not distributed.running():
        if distributed.size() == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            warnings.warn(
                f"fit runs alone in each of the {os.environ['WORLD_SIZE']} processes that torchrun started: put the script "
                "into `with pyro_sinkhorn.distributed.processes():` to have them share it",
                UserWarning,
                stacklevel=2,
            )
        return batches
    refuse_unshared(loss)
    if not isinstance(batches, Minibatches):
        raise ProgramError(
            "fit cannot share a DataLoader out between processes: pass arrays, tensors or memory-mapped arrays, of which each "
            "reads the rows of its part, or write the loop with SVI, in which every process has a loader of its own"
        )
    ranks = Ranks("at the start of fit")
    _check_same(ranks, batches)
    _check_follows(model, batches, ranks.size)
    loss.in_step_with_others = frozenset()
    return Part(batches)


def common_random_state() -> None:
    """Go on from the random state of rank 0, so that what a fit draws besides its steps is the same on all ranks."""
    if distributed.running():
        ranks = Ranks("at the start of fit")
        torch.set_rng_state(ranks.of_first(torch.get_rng_state(), "taking over the random state"))


def _check_same(ranks: Ranks, batches: Minibatches) -> None:
    own = [batches.n, batches.batch_size, *map(_said, (*batches.args, *batches.kwargs.values()))]
    found = ranks.objects(own, "comparing the data")
    if any(other != found[0] for other in found):
        said = "; ".join(f"rank {i}: {n} data in batches of {size}" for i, (n, size, *_) in enumerate(found))
        raise ProgramError(
            f"the ranks were given different data ({said}). fit shares the data out by itself: pass all of them, in one order, "
            "on every rank. Where each rank is to have data of its own, use SVI with the same loss"
        )
    if batches.batch_size < 2 * ranks.size:
        raise ProgramError(
            f"batch_size={batches.batch_size} for {ranks.size} ranks, which share every batch: give at least 2 data a rank, "
            f"{2 * ranks.size}, and far more for the default match_size"
        )


def _said(value: Any) -> str:
    """What tells one argument from another; of what is read by rows, its shape."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} {float(value.double().sum())!r}"
    return f"{type(value).__name__} {getattr(value, 'shape', '')}"


def _check_follows(model: Callable[..., Any], batches: Minibatches, size: int) -> None:
    """The outermost data plate must be as long as the data are."""
    sizes: list[dict[str, int]] = []
    part = -(-batches.batch_size // size)
    for rows in (part, part - 1):
        args, kwargs = batches.pick(torch.arange(rows))
        with undisturbed():
            plates = structure_of(run_model(model, args, kwargs)).data_plates
        sizes.append({plate.name: plate.full_size for plate in plates})
    outermost = next(iter(sizes[0]))
    if sizes[0][outermost] == sizes[1].get(outermost):
        raise ProgramError(
            f"plate {outermost!r}, the outermost one of the data, has {sizes[0][outermost]} slices however many data the "
            "model is given, so the data cannot be shared out between processes. Write its size as that of the argument, "
            "pyro.plate('data', len(x)), and let it be the outermost"
        )
