"""Held-out data: what a fit measures on them, when it stops for them, and the state that was best."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_sinkhorn import distributed
from pyro_sinkhorn.distributed import Ranks
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.losses.base import SinkhornLoss
from pyro_sinkhorn.modules import training_mode
from pyro_sinkhorn.rng import undisturbed
from pyro_sinkhorn.training import (
    Batch,
    Epoch,
    LoadedBatches,
    Minibatches,
    Trainer,
    as_tensor,
    is_lazy,
    is_loader,
    loader_of,
)


def split(
    args: tuple[Any, ...], kwargs: dict[str, Any], share: float, positions: Tensor | None = None
) -> tuple[Batch, Batch, Tensor]:
    """Hold a random share of the data out.

    :param positions: of the data that an earlier fit held out
    :returns: what is left to train on, what is held out, and its positions
    :raises ProgramError: the share is none, or leaves too few on one side
    """
    whole = Minibatches(args, kwargs, 1)
    n = whole.n
    held = round(share * n) if 0 < share < 1 else 0
    if held < 2 or n - held < 2:
        raise ProgramError(
            f"validation={share!r} of {n} data: expected a share between 0 and 1 that leaves at least 2 on each side, or "
            "the arguments to validate on"
        )
    if positions is None:
        positions = torch.randperm(n)[:held].sort().values
    left = torch.ones(n, dtype=torch.bool)
    left[positions] = False
    return whole.pick(left.nonzero()[:, 0]), whole.pick(positions), positions


class HeldOut:
    """Data to validate on, batch by batch.

    :param given: arguments of one call, or a loader or data set
    """

    def __init__(self, given: Any, batch_size: int | None, device: torch.device | None) -> None:
        self.batches: Minibatches | LoadedBatches
        if is_loader(given):
            self.batches = LoadedBatches(loader_of(given, batch_size), Epoch(), device)
        else:
            args, kwargs = given
            self.batches = Minibatches(args, kwargs, batch_size, device=device)
            if not self.batches.n and not args and not kwargs:
                raise ProgramError("validation holds no arguments: expected those of one call of the model")

    def __iter__(self) -> Iterator[Batch]:
        """One pass, in order; a last batch that is smaller is left out, as in training."""
        if isinstance(self.batches, LoadedBatches):
            for _ in range(self.batches.steps(1)):
                yield self.batches.draw()
            return
        size = self.batches.batch_size or 1
        for start in range(0, max(self.batches.n - size, 0) + 1, size):
            yield self.batches.at(torch.arange(start, start + size))


def _arguments(given: Any) -> Batch:
    """Arguments of one call: positional ones, a single one, or a pair of a tuple and a dictionary."""
    parts = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    if len(parts) == 2 and isinstance(parts[0], tuple) and isinstance(parts[1], dict):
        return parts[0], parts[1]
    return parts, {}


def check_validation(given: Any) -> None:
    """Whether this can be data to hold out.

    :raises ProgramError: it is neither a share, nor arguments of a call, nor a loader
    """
    args, kwargs = _arguments(given)
    tensors = [
        part for part in (*args, *kwargs.values()) if isinstance(part, (Tensor, np.ndarray)) or is_lazy(part)
    ]
    if not (isinstance(given, float) or is_loader(given) or tensors):
        raise ProgramError(
            f"validation is {given!r}: expected a share between 0 and 1, the arguments of a call (a tensor or an array among "
            "them), or a DataLoader"
        )


def as_held_out(validation: Any, device: torch.device | None) -> Any:
    """Arguments as tensors, loaders as they are."""
    if is_loader(validation):
        return validation
    args, kwargs = _arguments(validation)
    return (
        tuple(as_tensor(value, device) for value in args),
        {name: as_tensor(value, device) for name, value in kwargs.items()},
    )


@dataclass
class Best:
    """The best state so far, and how many measurements ago.

    value, step:  loss of the held-out data, and after how many steps of this fit
    stale:        measurements since
    tensors:      copies of everything that was learned, by name
    weight:       of the match when it was measured: losses under different weights do not compare
    """

    value: float = math.inf
    step: int = 0
    stale: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weight: float | None = None


def learned_tensors(program: Any) -> dict[str, Tensor]:
    """Parameters and buffers of a program and of its loss, by name; the program must be active."""
    found: dict[str, Tensor] = {}
    modules = {**program.modules, "": program.guide}
    if isinstance(program.loss, SinkhornLoss):
        modules |= {f"loss.{name}": module for name, module in program.loss.modules().items()}
    for name, module in modules.items():
        if isinstance(module, nn.Module):
            found |= {f"{name}:{key}": p for key, p in module.named_parameters()}
            found |= {f"{name}:{key}": b for key, b in module.named_buffers()}
    found |= {f"param:{name}": p for name, p in pyro.get_param_store().named_parameters()}
    return found


class Validation:
    """Measures the loss of held-out data, keeps the best state, and says when to stop.

    Every measurement draws the same noise and the same prior clouds, so that two of them differ by the program alone;
    networks are in evaluation mode. The measure is the whole loss per datum, the match with its weight.

    :param patience: measurements without a better one after which to stop; None for never
    :param keep_best: whether the fit ends in the best state
    """

    SEED = 20181001  # the same for all, so that a resumed fit measures as before

    def __init__(self, data: HeldOut, patience: int | None, keep_best: bool, best: Best) -> None:
        self.data, self.patience, self.keep_best, self.best = data, patience, keep_best, best

    def measure(self, program: Any, trainer: Trainer, steps: int) -> float:
        """The loss per datum, remembered where it is the best.

        :raises NonFiniteError: it is no number
        """
        try:
            with distributed.alone():  # held-out data are not shared out: all would measure the same
                value = self._loss(program, trainer)
        except (NonFiniteError, ProgramError) as error:
            raise type(error)(f"the held-out data, after {steps} steps: {error}") from error
        if distributed.running():
            value = Ranks(f"after step {program.num_steps}").agreed(value, "measuring held-out data")
        if not math.isfinite(value):
            raise NonFiniteError(f"the loss of the held-out data is {value} after {steps} steps")
        weight = getattr(program.loss, "weight", None)
        if value < self.best.value or weight != self.best.weight:
            kept = learned_tensors(program) if self.keep_best else {}
            self.best = Best(value, steps, 0, {name: t.detach().clone() for name, t in kept.items()}, weight)
        else:
            self.best.stale += 1
        return value

    @property
    def over(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.best.stale >= self.patience

    @torch.no_grad()
    def restore(self, program: Any) -> None:
        """Put the best state back."""
        if not self.best.tensors:
            return
        now = learned_tensors(program)
        for name, value in self.best.tensors.items():
            if name in now:
                now[name].copy_(value)

    def _loss(self, program: Any, trainer: Trainer) -> float:
        loss, total, count = program.loss, 0.0, 0
        terms = getattr(loss, "terms", None)
        with undisturbed(), training_mode(trainer.modules, training=False), torch.no_grad():
            torch.manual_seed(self.SEED)
            for args, kwargs in self.data:
                value = float(loss.loss(trainer.model, trainer.guide, *args, **kwargs))
                ours = isinstance(loss, SinkhornLoss)
                size = self.data.batches.batch_size or 1
                total += loss.terms.loss if ours else value / size
                count += 1
        if terms is not None:
            loss.terms = terms
        return total / max(count, 1)
