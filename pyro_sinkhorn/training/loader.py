"""Minibatches of a ``torch.utils.data`` loader or data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.rng import undisturbed
from pyro_sinkhorn.training.minibatches import Batch, Epoch
from pyro_sinkhorn.training.rows import as_tensor


def is_loader(value: Any) -> bool:
    """Whether batches are to be read from this, rather than cut from it."""
    return isinstance(value, (DataLoader, Dataset))


def loader_of(given: Any, batch_size: int | None) -> DataLoader[Any]:
    """A loader as it is; of a data set, one that shuffles where it can.

    :raises ProgramError: a loader that makes no batches, or a data set without a batch size
    """
    if isinstance(given, DataLoader):
        if given.batch_size is None and given.batch_sampler is None:
            raise ProgramError(
                "the DataLoader hands out single data (batch_size=None): give it a batch size, since clouds of a batch "
                "are matched"
            )
        return given
    if batch_size is None:
        raise ProgramError(
            f"batch_size=None with a {type(given).__name__}: pass a batch size, or a DataLoader"
        )
    shuffle = None if isinstance(given, IterableDataset) else True
    return DataLoader(given, batch_size=batch_size, shuffle=shuffle, drop_last=True)


class LoadedBatches:
    """Endless minibatches of a loader, pass after pass; they stand where :class:`Minibatches` of arrays do.

    A batch that is a tuple or list holds the arguments of the model, a dictionary its keyword arguments, anything else
    its only argument. A last batch that is smaller than the first of its pass is left out.

    The order comes from the random state at the start of a pass, which is kept, so that an interrupted fit goes on in the
    middle of one: batches it has seen are read again and passed over. An ``IterableDataset`` that draws its own order from
    elsewhere cannot be continued to the bit.

    :param epoch: to continue with, and to advance
    """

    def __init__(self, loader: DataLoader[Any], epoch: Epoch, device: torch.device | None = None) -> None:
        self.loader, self.epoch, self.device = loader, epoch, device
        data = loader.dataset
        self.n = len(data) if hasattr(data, "__len__") and not isinstance(data, IterableDataset) else 0
        self.replace, self.everything = False, False
        self._batches: Iterator[Any] | None = None
        with undisturbed():
            example = next(iter(loader), None)
        if example is None:
            raise ProgramError(
                f"the loader of a {type(data).__name__} gave no batch: it is empty, or smaller than one batch"
            )
        self.example = self._arguments(example)
        self.batch_size = self._size(self.example)
        if not self.batch_size:
            raise ProgramError(
                "the first batch of the loader holds no tensor with rows: expected a tensor, or a tuple or dictionary with "
                f"some, but got {type(example).__name__}"
            )
        self.whole = self.n == self.batch_size
        if epoch.n != self.n or not len(epoch.start):
            epoch.n, epoch.order, epoch.drawn, epoch.start = self.n, Epoch().order, 0, Epoch().start

    def draw(self) -> Batch:
        """The next batch, of the next pass where this one is over."""
        if self._batches is None and len(self.epoch.start):
            self._go_on()
        for _ in range(2):
            if self._batches is None:
                self.epoch.start, self.epoch.drawn = torch.get_rng_state(), 0
                self._batches = iter(self.loader)
            for raw in self._batches:
                self.epoch.drawn += 1
                batch = self._arguments(raw)
                if self._size(batch) >= self.batch_size:
                    return batch
            self._batches = None
        raise ProgramError(
            f"a pass over the loader gave no batch of {self.batch_size}, though its first one had so many"
        )

    def steps(self, num_epochs: float) -> int:
        """How many batches make so many epochs.

        :raises ProgramError: the loader does not know how long it is
        """
        try:
            in_all = len(self.loader)
        except TypeError as error:
            raise ProgramError(
                f"num_epochs={num_epochs:g}, but a {type(self.loader.dataset).__name__} does not say how long a pass is: "
                "give num_steps"
            ) from error
        if self.n and self.n < in_all * self.batch_size and in_all > 1:
            in_all -= 1  # the last one is smaller, and left out
        return max(round(num_epochs * in_all), 1)

    def first(self) -> Batch:
        """A batch to look at."""
        return self.example

    def look(self, size: int) -> Batch:
        """So many data to look at the model with: rows of the first batch, the first of them again where it has too few."""
        index = torch.arange(size) % self.batch_size

        def rows(value: Any) -> Any:
            sized = isinstance(value, Tensor) and value.dim() and len(value) == self.batch_size
            return value[index.to(value.device)] if sized else value

        args, kwargs = self.example
        return tuple(rows(value) for value in args), {name: rows(value) for name, value in kwargs.items()}

    def _go_on(self) -> None:
        """Into the pass that was interrupted."""
        with undisturbed():
            torch.set_rng_state(self.epoch.start)
            self._batches = iter(self.loader)
            for _ in range(self.epoch.drawn):
                next(self._batches, None)

    def _arguments(self, batch: Any) -> Batch:
        if isinstance(batch, Mapping):
            return (), {name: as_tensor(value, self.device) for name, value in batch.items()}
        held = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        return tuple(as_tensor(value, self.device) for value in held), {}

    @staticmethod
    def _size(batch: Batch) -> int:
        args, kwargs = batch
        return next((len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()), 0)
