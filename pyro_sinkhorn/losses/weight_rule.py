"""``prior_weight="auto"``: a weight that rises until the match is at its noise floor."""

from __future__ import annotations

import math
from typing import Any


class WeightRule:
    r"""Raises the weight of the match whenever the match has stopped falling above its floor.

    Independent halves have expectation zero where the laws agree, so that the floor needs no measurement. After every
    ``PERIOD`` steps the mean match since the last change of the weight (of the last ``WINDOW`` periods at most, the first
    after a change left out) is compared with zero, in its own standard errors. The weight becomes ``FACTOR`` times as
    large where that mean is

    - above the floor: more than ``ERRORS`` standard errors above zero, which chance does at one of 700 looks, and
    - no longer falling: the last period's is more than ``SLOWER`` of the one's before.

    It never falls, and stops at ``MOST``. The rule sees the match of training batches; a match at its floor there is no proof
    of one on other data, which :func:`~pyro_sinkhorn.diagnostics.match_report` looks at.

    >>> rule = WeightRule()
    >>> for _ in range(3 * rule.PERIOD):
    ...     rule.observe(0.5)
    >>> rule.weight
    15.0
    """

    START, PERIOD, WINDOW, FACTOR, ERRORS, SLOWER, MOST = 10.0, 50, 8, 1.5, 3.0, 0.8, 1e4

    def __init__(self) -> None:
        self.weight = self.START
        self.count, self.total, self.squares = 0, 0.0, 0.0
        #: Mean match of the periods since the last change, and the variance of each mean.
        self.means: list[float] = []
        self.variances: list[float] = []

    def observe(self, match: float) -> None:
        """Take in the match of one training step."""
        self.count += 1
        self.total += match
        self.squares += match * match
        if self.count < self.PERIOD:
            return
        mean = self.total / self.count
        variance = max(self.squares / self.count - mean * mean, 0.0)
        self.means.append(mean)
        self.variances.append(variance / (self.count - 1))
        self.count, self.total, self.squares = 0, 0.0, 0.0
        self._look()

    def _look(self) -> None:
        settled = slice(max(1, len(self.means) - self.WINDOW), None)
        means, variances = self.means[settled], self.variances[settled]
        if not means:
            return
        above = sum(means) > self.ERRORS * math.sqrt(sum(variances))
        if above and self.means[-1] > self.SLOWER * self.means[-2]:
            self.weight = min(self.weight * self.FACTOR, self.MOST)
            self.means, self.variances = [], []
        else:
            del self.means[: -self.WINDOW - 1], self.variances[: -self.WINDOW - 1]

    def state(self) -> dict[str, Any]:
        """What :meth:`load` goes on from."""
        return {name: list(value) if isinstance(value, list) else value for name, value in vars(self).items()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        vars(self).update({name: list(v) if isinstance(v, list) else v for name, v in state.items()})
