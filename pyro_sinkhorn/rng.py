"""One explicit source of randomness a program: data order, guide noise, prior draws and the split of clouds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pyro_sinkhorn.errors import checked_integer


class RandomStream:
    """A random state of its own, swapped in for torch's global one.

    Pyro's distributions draw from torch's global generator and take no other, so the stream *becomes* the global one
    while it is active; outside, the global state is untouched. Two streams never influence each other, and a stream
    saved and restored continues to the bit on the CPU.

    >>> stream = RandomStream(0)
    >>> with stream.active():
    ...     first = torch.rand(())
    >>> with RandomStream(0).active():
    ...     bool(torch.rand(()) == first)
    True
    """

    def __init__(self, seed: int | None = None) -> None:
        self.generator = torch.Generator()
        if seed is None:
            # Follow the global one: pyro.set_rng_seed keeps its meaning.
            seed = int(torch.randint(2**62, ()))
        self.generator.manual_seed(checked_integer("seed", seed))
        self.cuda_state: Tensor | None = None
        self._depth = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the global random state inside; nested uses are one."""
        self._depth += 1
        if self._depth > 1:
            try:
                yield
            finally:
                self._depth -= 1
            return
        outside = torch.get_rng_state()
        outside_cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        torch.set_rng_state(self.generator.get_state())
        if outside_cuda is not None:
            if self.cuda_state is None:
                torch.cuda.manual_seed(self.generator.initial_seed())
            else:
                torch.cuda.set_rng_state(self.cuda_state)
        try:
            yield
        finally:
            self._depth -= 1
            self.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(outside)
            if outside_cuda is not None:
                self.cuda_state = torch.cuda.get_rng_state()
                torch.cuda.set_rng_state(outside_cuda)

    def state(self) -> dict[str, Tensor]:
        """Tensors that :meth:`restore` continues from, also from inside."""
        cpu, cuda = self.generator.get_state(), self.cuda_state
        if self._depth:
            cpu = torch.get_rng_state()
            cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else cuda
        return {"cpu": cpu} if cuda is None else {"cpu": cpu, "cuda": cuda}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue where :meth:`state` was taken."""
        self.generator.set_state(state["cpu"])
        self.cuda_state = state.get("cuda")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever is drawn inside, the global random state goes on from where it was."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
