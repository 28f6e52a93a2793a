"""What every step of every fit came to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tqdm.auto import tqdm

from pyro_sinkhorn.losses.base import Terms


@dataclass
class History:
    """Every step of every ``fit``: per-datum ``loss``, ``reconstruction`` and ``match`` (what its weight multiplies)."""

    loss: list[float] = field(default_factory=list)
    reconstruction: list[float] = field(default_factory=list)
    match: list[float] = field(default_factory=list)

    def append(self, terms: Terms) -> None:
        """Add one step."""
        self.loss.append(terms.loss)
        self.reconstruction.append(terms.reconstruction)
        self.match.append(terms.total_match)

    def show_last(self, bar: tqdm) -> None:
        """Put the last step into a progress bar."""
        bar.set_postfix({name: f"{value:.4g}" for name, value in self._last().items()}, refresh=False)

    def _last(self) -> dict[str, float]:
        """The last step; a loss without likelihood has no reconstruction."""
        last = {name: values[-1] for name, values in vars(self).items()}
        return {name: value for name, value in last.items() if not math.isnan(value)}

    def __len__(self) -> int:
        return len(self.loss)

    def __repr__(self) -> str:
        if not self.loss:
            return "History(no steps)"
        last = ", ".join(f"{name}={value:.4g}" for name, value in self._last().items())
        return f"History({len(self)} steps, last: {last})"
