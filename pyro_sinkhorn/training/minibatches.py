"""A model's arguments, cut into minibatches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError, checked_integer
from pyro_sinkhorn.losses.pairs import picked


def as_tensor(value: Any, device: torch.device | None) -> Any:
    """Arrays to tensors, floats to the default dtype, everything to the device; other arguments as they are.

    Data are data: a graph behind them, left by whatever simulated them, would be walked a second time at the second step.
    """
    if isinstance(value, np.ndarray):
        # torch cannot share memory that is read-only or runs backwards.
        shareable = value.flags.writeable and all(stride >= 0 for stride in value.strides)
        value = torch.from_numpy(value if shareable else value.copy())
        if value.is_floating_point():
            value = value.to(torch.get_default_dtype())
    if isinstance(value, Tensor) and device is not None:
        value = value.to(device)
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


@dataclass
class Epoch:
    """What is left of a pass over ``n`` data in random order; the next fit goes on with it."""

    n: int = 0
    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


class Minibatches:
    """Endless minibatches of a model's arguments.

    Tensors whose first dimension equals that of the first tensor are sliced, others passed whole. Data come in
    shuffled epochs that run into each other, so that every batch is full: a last, smaller batch would change the
    size at which clouds are matched.

    :param epoch: to continue with, and to advance; one over another number of data is begun anew

    replace:  draw every datum of a batch anew from all, instead of in epochs. A loss that compares data wants it: its
              simulated clouds are independent draws, and halves of few data that exhaust them are not
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch_size: int | None,
        epoch: Epoch | None = None,
    ) -> None:
        self.args, self.kwargs = args, kwargs
        sizes = [len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
        self.n = sizes[0] if sizes else 0
        if batch_size is not None:  # None for all data at once
            batch_size = checked_integer("batch_size", batch_size, 1)
        if sizes and self.n == 0:
            shapes = [tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            raise ProgramError(f"the data are empty: arguments of shape {shapes}; fit needs at least 2 data")
        self.everything = batch_size is None
        self.whole = batch_size is None or batch_size >= self.n
        self.batch_size = self.n if self.whole or batch_size is None else batch_size
        self.replace = False
        self.epoch = Epoch() if epoch is None else epoch
        if self.epoch.n != self.n:
            self.epoch.n, self.epoch.order = self.n, Epoch().order

    def draw(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The next minibatch."""
        if self.replace:
            return self.pick(torch.randint(self.n, (self.batch_size,)))
        if self.whole:
            return self.args, self.kwargs
        order = self.epoch.order
        while len(order) < self.batch_size:
            order = torch.cat([order, torch.randperm(self.n)])
        index, self.epoch.order = order[: self.batch_size], order[self.batch_size :]
        return self.at(index)

    def first(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A minibatch to look at: the first data, in their order."""
        return self.at(torch.arange(self.batch_size))

    def at(self, index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The data at these positions."""
        return (self.args, self.kwargs) if self.whole else self.pick(index)

    def pick(self, index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The data at these positions, whatever the batch size."""
        return picked(self.args, self.kwargs, self.n, index)
