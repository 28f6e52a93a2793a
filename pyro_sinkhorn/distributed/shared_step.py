r"""One evaluation of a loss that all processes make together, each on data of its own.

Every process is to draw its own noise for its own data, and all are to draw the same where there is one of something: how
clouds are split, and the noise of latents outside the data. At the start of a step rank 0 draws a number :math:`s` from its
random state. Rank :math:`r` then draws from a generator seeded by :math:`(s, r)`, whatever its own random state was, and what
is common from one seeded by :math:`s`. So the same seed on all ranks, as scripts set it, is no mistake, and a step is
repeated by repeating rank 0's random state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_sinkhorn.distributed.group import Ranks, next_evaluation
from pyro_sinkhorn.errors import LostRankError
from pyro_sinkhorn.rng import undisturbed
from pyro_sinkhorn.structure import PARTICLE_PLATE

_ACTIVE: ContextVar[SharedStep | None] = ContextVar("shared_step", default=None)
_MASK = 2**63 - 1


class SharedStep(Ranks):
    """What the processes have in common in one step.

    number:     of the step, among all that the ranks make together
    generator:  for what all draw alike, the split of clouds; on the CPU
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"evaluation {number} of a shared loss")
        self.number = number
        drawn = torch.tensor([int(torch.randint(2**62, ())), number])
        found = torch.stack(self.gathered(drawn, "at its start")).tolist()
        numbers = [other for _, other in found]
        if len(set(numbers)) > 1:
            raise LostRankError(
                f"the ranks are at the evaluations {numbers} of a loss that they share: all must evaluate it equally often. "
                "Work of one rank, such as a diagnosis, goes into `with distributed.alone():`"
            )
        self.seed = found[0][0]
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def own_seed(self) -> int:
        """Of what this rank draws for its own data."""
        return _mixed(self.seed, self.rank + 1)

    def any_vary(self, laid_out: Sequence[Tensor], vary: Sequence[bool]) -> list[bool]:
        """Whether rows ``(particles, n, e)`` vary, over all ranks together.

        :param vary: whether this rank's do
        """
        if not laid_out:
            return []
        firsts = [rows[:, 0].flatten().double() for rows in laid_out]
        own = torch.cat([torch.tensor(vary, dtype=torch.float64), *(one.cpu() for one in firsts)])
        found = torch.stack(self.gathered(own, "comparing priors along the data"))
        parts = found[:, len(vary) :].split([len(one) for one in firsts], 1)
        apart = [bool(((one - one[:1]).abs() > 1e-6 * (1 + one.abs())).any()) for one in parts]
        return [
            bool(some) or other
            for some, other in zip(found[:, : len(vary)].any(0).tolist(), apart, strict=True)
        ]


def active() -> SharedStep | None:
    """The step that is being made together; None when alone."""
    return _ACTIVE.get()


@contextmanager
def shared_step() -> Iterator[SharedStep]:
    """Make a step together with the other ranks; the random state is advanced by one draw."""
    step = SharedStep(next_evaluation())
    token = _ACTIVE.set(step)
    try:
        with undisturbed():
            torch.manual_seed(step.own_seed)
            with _CommonNoise(_mixed(step.seed, 0)):
                yield step
    finally:
        _ACTIVE.reset(token)


class _CommonNoise(Messenger):
    """Draws sites outside every plate, of which all data have one, alike on all ranks."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with undisturbed():
            torch.manual_seed(seed)
            self.common = _random_state()
        self.own: list[Tensor] | None = None

    def _pyro_sample(self, msg: Any) -> None:
        inside = any(frame.vectorized and frame.name != PARTICLE_PLATE for frame in msg["cond_indep_stack"])
        if inside or msg["done"] or msg["value"] is not None or isinstance(msg["fn"], _Subsample):
            return
        self.own = _random_state()
        _set_random_state(self.common)

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.own is not None:
            self.common = _random_state()
            _set_random_state(self.own)
            self.own = None


def _random_state() -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    for cuda in state[1:]:
        torch.cuda.set_rng_state(cuda)


def _mixed(seed: int, part: int) -> int:
    """Seeds far from each other, by the finaliser of splitmix64."""
    mixed = (seed + (part + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) & _MASK
