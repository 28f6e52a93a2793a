"""A program that outlives its process: files, pickles, copies."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from pyro.infer import ELBO
from pyro.optim.optim import PyroOptim
from torch import nn

from pyro_sinkhorn import optimiser, snapshot, state
from pyro_sinkhorn.modules import Owned, shared_copy, submodule_pairs
from pyro_sinkhorn.rng import RandomStream
from pyro_sinkhorn.training import Epoch, History


class Persistent:
    """Methods of :class:`~pyro_sinkhorn.SinkhornProgram` that copy, write and read it."""

    model: Callable[..., Any]
    guide: Any
    owned: Owned
    optim: PyroOptim | None
    pending_optim: dict[str, Any]
    device: torch.device | None
    modules: Any
    to: Any
    _guide_given: Any
    _loss_given: Any
    pending_guide: dict[str, Any] | None
    loss: Any
    stream: RandomStream | None
    history: History
    epoch: Epoch
    num_steps: int
    calibration: Any

    def clone(self) -> Self:
        """An independent program with equal state."""
        other = cast(Any, type(self))(self.model, self._guide_given, self._loss_given)
        if isinstance(self.guide, nn.Module):
            # Networks that the guide has made at its first call are not in the one that was given.
            pairs = [(mine, other.modules[name]) for name, mine in self.modules.items()]
            other.guide = shared_copy(self.guide, self.model, replaced=submodule_pairs(pairs))
        snapshot.restore(other, state.detached(snapshot.take(self)), like=cast(Any, self))
        other._continue_with(self.optim)
        other.device = self.device
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything learned to a file of tensors and numbers, atomically; the model's code is not in it."""
        state.write(snapshot.take(self), path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Callable[..., Any],
        guide: Any = None,
        loss: ELBO | None = None,
        *,
        encoder: nn.Module | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Read a saved program back, given the code of its model; needs no data and no training step.

        :param guide: as given when the program was made, if it was
        :param loss: as given when the program was made; one of ours without functions in it is made again from the file
        :raises ValueError: a damaged or foreign file, or modules that differ from the saved ones
        """
        saved = state.read(path)
        loss = snapshot.make_loss(saved) if loss is None else loss
        program = cast(Any, cls)(model, guide, loss, encoder=encoder)
        snapshot.check_loss(program, saved)
        snapshot.restore(program, saved)
        return program if device is None else program.to(device)

    def __reduce__(self) -> Any:
        return type(self)._rebuild, snapshot.pickled_parts(self)

    @classmethod
    def _rebuild(cls, reference: Any, guide: Any, loss: Any, optim: Any, saved: dict[str, Any]) -> Self:
        """The inverse of pickling; always a new program, never the one that the name stands for."""
        program = cast(Any, cls)(snapshot.referred(reference), guide, loss)
        snapshot.restore(program, saved)
        program._continue_with(optim)
        return program

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.clone()

    def _continue_with(self, optim: PyroOptim | None) -> None:
        """Go on as another program that had this optimiser and this program's state."""
        if optim is not None:
            self.optim = optimiser.choose(None, self.pending_optim, optim, None)
            self.pending_optim = {}
