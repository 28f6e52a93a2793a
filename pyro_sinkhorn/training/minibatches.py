"""A model's arguments, cut into minibatches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError, checked_integer
from pyro_sinkhorn.training.rows import as_tensor, has_rows, rows_of

Batch = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Epoch:
    """What is left of a pass over ``n`` data in random order; the next fit goes on with it.

    order:  positions still to come, of data in memory
    drawn:  batches taken from the current pass over a loader
    start:  random state at which that pass began; empty where there is none
    """

    n: int = 0
    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    drawn: int = 0
    start: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))


class Minibatches:
    """Endless minibatches of a model's arguments.

    Tensors whose first dimension equals that of the first tensor are sliced, others passed whole; so are memory-mapped
    arrays and sparse matrices, of which only the rows of a batch become a tensor. Data come in
    shuffled epochs that run into each other, so that every batch is full: a last, smaller batch would change the
    size at which clouds are matched.

    :param epoch: to continue with, and to advance; one over another number of data is begun anew
    :param device: of what is read by rows

    replace:  draw every datum of a batch anew from all, instead of in epochs. A loss that compares data wants it: its
              simulated clouds are independent draws, and halves of few data that exhaust them are not
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch_size: int | None,
        epoch: Epoch | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.device = device
        sizes = [v.shape[0] for v in (*args, *kwargs.values()) if has_rows(v)]
        self.n = sizes[0] if sizes else 0
        if batch_size is not None:  # None for all data at once
            batch_size = checked_integer("batch_size", batch_size, 1)
        if sizes and self.n == 0:
            shapes = [tuple(v.shape) for v in (*args, *kwargs.values()) if has_rows(v)]
            raise ProgramError(f"the data are empty: arguments of shape {shapes}; fit needs at least 2 data")
        self.everything = batch_size is None
        self.whole = batch_size is None or batch_size >= self.n
        if self.whole:
            args = tuple(as_tensor(value, device) for value in args)
            kwargs = {name: as_tensor(value, device) for name, value in kwargs.items()}
        self.args, self.kwargs = args, kwargs
        self.batch_size = self.n if self.whole or batch_size is None else batch_size
        self.replace = False
        self.epoch = Epoch() if epoch is None else epoch
        if self.epoch.n != self.n:
            self.epoch.n, self.epoch.order = self.n, Epoch().order

    def draw(self) -> Batch:
        """The next minibatch."""
        if self.whole and not self.replace:
            return self.args, self.kwargs
        return self.pick(self.positions())

    def positions(self) -> Tensor:
        """Positions of the data of the next minibatch."""
        if self.replace:
            return torch.randint(self.n, (self.batch_size,))
        if self.whole:
            return torch.arange(self.n)
        order = self.epoch.order
        while len(order) < self.batch_size:
            order = torch.cat([order, torch.randperm(self.n)])
        index, self.epoch.order = order[: self.batch_size], order[self.batch_size :]
        return index

    def steps(self, num_epochs: float) -> int:
        """How many minibatches make so many epochs."""
        return max(round(num_epochs * self.n / self.batch_size), 1) if self.n else max(round(num_epochs), 1)

    def first(self) -> Batch:
        """A minibatch to look at: the first data, in their order."""
        return self.at(torch.arange(self.batch_size))

    def look(self, size: int) -> Batch:
        """So many data to look at the model with."""
        return self.at(torch.arange(size))

    def at(self, index: Tensor) -> Batch:
        """The data at these positions."""
        return (self.args, self.kwargs) if self.whole else self.pick(index)

    def pick(self, index: Tensor) -> Batch:
        """The data at these positions, whatever the batch size."""
        return (
            tuple(rows_of(value, self.n, index, self.device) for value in self.args),
            {name: rows_of(value, self.n, index, self.device) for name, value in self.kwargs.items()},
        )
