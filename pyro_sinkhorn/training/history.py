"""What every step of every fit came to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tqdm.auto import tqdm

from pyro_sinkhorn.losses.base import Terms


@dataclass
class History:
    """Every step of every ``fit``: per-datum ``loss``, ``reconstruction`` and ``match`` (what its weight multiplies).

    validation:    loss of the data held out, per datum, each time it was measured
    validated_at:  after how many steps
    """

    loss: list[float] = field(default_factory=list)
    reconstruction: list[float] = field(default_factory=list)
    match: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    validated_at: list[int] = field(default_factory=list)

    def append(self, terms: Terms) -> None:
        """Add one step."""
        self.loss.append(terms.loss)
        self.reconstruction.append(terms.reconstruction)
        self.match.append(terms.total_match)

    def show_last(self, bar: tqdm) -> None:
        """Put the last step into a progress bar."""
        bar.set_postfix({name: f"{value:.4g}" for name, value in self.last().items()}, refresh=False)

    def last(self) -> dict[str, float]:
        """The last step; a loss without likelihood has no reconstruction, a fit without held-out data no validation."""
        named = {name: getattr(self, name) for name in ("loss", "reconstruction", "match", "validation")}
        return {name: values[-1] for name, values in named.items() if values and not math.isnan(values[-1])}

    def __len__(self) -> int:
        return len(self.loss)

    def __repr__(self) -> str:
        if not self.loss:
            return "History(no steps)"
        last = ", ".join(f"{name}={value:.4g}" for name, value in self.last().items())
        return f"History({len(self)} steps, last: {last})"
