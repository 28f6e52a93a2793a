"""``prior_weight="auto"``: a weight that rises until the match is at its noise floor."""

from __future__ import annotations

import math
from typing import Any


class WeightRule:
    r"""Raises the weight of the match whenever the match has stopped falling above its floor.

    Independent halves have expectation zero where the laws agree, so that the floor needs no measurement: after every
    ``PERIOD`` steps the mean match of these is compared with zero, in its own standard errors. The weight becomes
    ``FACTOR`` times as large where the mean is

    - above the floor: more than ``ERRORS`` standard errors above zero, which chance does once in 700 periods, and
    - no longer falling: more than ``SLOWER`` of what it was in the period before.

    It never falls, and stops at ``MOST``. The rule sees the match of training batches; a match at its floor there is no proof
    of one on other data, which :func:`~pyro_sinkhorn.diagnostics.match_report` looks at.

    >>> rule = WeightRule()
    >>> for _ in range(3 * rule.PERIOD):
    ...     rule.observe(0.5)
    >>> round(rule.weight, 1)
    22.5
    """

    START, PERIOD, FACTOR, ERRORS, SLOWER, MOST = 10.0, 50, 1.5, 3.0, 0.8, 1e4

    def __init__(self) -> None:
        self.weight = self.START
        self.count, self.total, self.squares = 0, 0.0, 0.0
        self.before = math.inf

    def observe(self, match: float) -> None:
        """Take in the match of one training step."""
        self.count += 1
        self.total += match
        self.squares += match * match
        if self.count < self.PERIOD:
            return
        mean = self.total / self.count
        variance = max(self.squares / self.count - mean * mean, 0.0)
        error = math.sqrt(variance / (self.count - 1))
        if mean > max(self.ERRORS * error, self.SLOWER * self.before):
            self.weight = min(self.weight * self.FACTOR, self.MOST)
        self.before = mean
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def state(self) -> dict[str, Any]:
        """What :meth:`load` goes on from."""
        return dict(vars(self))

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        vars(self).update(state)
