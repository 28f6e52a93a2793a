"""Runs of a model at given latents: what is computed there, how well the data are explained, and under which sub-sample."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.guide.lazy import LazyGuide
from pyro_sinkhorn.scoring import log_density
from pyro_sinkhorn.structure import present_of


def replayed(
    runs: Iterable[Trace], computed: Collection[str], data: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values of computed sites and log densities of observed ones, by name, stacked over runs.

    :param computed: names of sites
    :param data: sites to score, by the names that the result has them under; those without a density are left out of it
    :raises ProgramError: a value that its distribution cannot score
    """
    values: dict[str, list[Tensor]] = {name: [] for name in computed}
    densities: dict[str, list[Tensor]] = {name: [] for name in data}
    for trace in runs:
        for name in computed:
            values[name].append(trace.nodes[name]["value"])
        for name in list(densities):
            density = log_prob(trace, data[name])
            if density is None:
                del densities[name]
            else:
                densities[name].append(density)
    return (
        {name: torch.stack(column) for name, column in values.items()},
        {name: torch.stack(column) for name, column in densities.items()},
    )


def log_prob(trace: Trace, name: str) -> Tensor | None:
    """Log density of an observed site, a number a slice of its plates, NaN where masked; None if it has none.

    Plates' scales, and those of ``poutine.scale``, do not enter: a datum of a sub-sample is one datum.

    :raises ProgramError: a value that its distribution cannot score
    """
    try:
        log_density(trace, {name}, "model")
    except ProgramError as error:
        cause: BaseException | None = error
        while cause is not None:  # Pyro wraps it as well
            if isinstance(cause, NotImplementedError):
                return None
            cause = cause.__cause__
        raise
    site = trace.nodes[name]
    value, present = site["unscaled_log_prob"], present_of(site)
    value = value.expand(torch.broadcast_shapes(value.shape, site["fn"].batch_shape))
    return value if present is None else torch.where(present, value, torch.nan)


class DrawnSubsamples(Messenger):
    """Names of the plates that draw indices, and were not given any."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if isinstance(fn, _Subsample) and msg["value"] is None and (fn.subsample_size or fn.size) < fn.size:
            self.names.append(msg["name"])


@contextmanager
def pinned(guides: Iterable[Any], trace: Trace, names: Collection[str]) -> Iterator[None]:
    """Inside, some plates have the indices of a trace: what is drawn in several runs then belongs to the same data.

    :param guides: automatic ones run their model out of sight of handlers outside, so theirs is replaced for as long
    :param names: of these plates
    """
    if not names:
        yield
        return
    seen = Trace()
    seen.nodes.update({name: trace.nodes[name] for name in names})
    models = [(guide, guide._model) for guide in guides if isinstance(guide, LazyGuide)]
    try:
        for guide, (model,) in models:
            guide._model = (poutine.replay(model, trace=seen),)
        with poutine.replay(trace=seen):
            yield
    finally:
        for guide, kept in models:
            guide._model = kept
