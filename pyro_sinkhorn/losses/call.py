"""One call of a model, and the runs of it that its match needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyro.poutine.trace_struct import Trace

from pyro_sinkhorn.losses.prior import constant_traces, prior_trace
from pyro_sinkhorn.losses.states import Enumeration
from pyro_sinkhorn.structure import Structure


@dataclass(frozen=True)
class Call:
    """One call of a model that the match is computed for: its traced run and how to run it again.

    scored:       a run with the guide's latents; where the guide enumerates states, with one of them a datum
    enumeration:  the states it enumerated, with a trace that holds the latents at all of them
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    structure: Structure
    scored: Trace
    enumeration: Enumeration | None = None

    def prior(self) -> Trace:
        """A fresh prior run, conditional on the globals and sub-samples of the scored one."""
        return prior_trace(self.model, self.args, self.kwargs, self.structure, self.scored)

    def constant(self, prior: Trace) -> list[Trace]:
        """Runs whose latents agree in all slices, together in several states where there are any."""
        return constant_traces(self.model, self.args, self.kwargs, self.structure, self.scored, prior)
