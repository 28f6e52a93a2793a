"""Which state a training ends with: a running average, or an earlier one that held-out data clearly prefer."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """Running average of the last thousand states, which is less noisy than any of them (Polyak and Juditsky 1992)."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the state after this step."""
        keep = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - keep)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The guide has the averages inside."""
        own = [p.detach().clone() for p in self.parameters]
        self.give(self.values)
        try:
            yield
        finally:
            self.give(own)

    @torch.no_grad()
    def give(self, values: list[Tensor]) -> None:
        """Put values into the parameters."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


class Keeper:
    """The state to end with: the average at the end, or an earlier one that was clearly better on what was held out.

    Held-out scores are flat and noisy near the end; the best of them is often not the best state. So an earlier one wins only
    where its score is better by two standard errors of the difference: where few simulations were learned by heart.
    """

    def __init__(self, guide: nn.Module, average: Average) -> None:
        self.guide, self.average = guide, average
        self.best: Tensor | None = None
        self.last: Tensor | None = None
        self.state: dict[str, Any] | None = None

    def offer(self, scores: Tensor) -> None:
        """The current state, by its scores on the held-out chunks."""
        self.last = scores
        if self.best is None or scores.mean() < self.best.mean():
            self.best, self.state = scores, copy.deepcopy(self.guide.state_dict())

    def settle(self) -> None:
        """Leave the guide in the chosen state."""
        self.average.give(self.average.values)
        if self.state is None or self.best is None or self.last is None:
            return
        worse = self.last - self.best
        error = float(worse.std()) / math.sqrt(len(worse)) if len(worse) > 1 else math.inf
        if float(worse.mean()) > 2 * error:
            self.guide.load_state_dict(self.state)
