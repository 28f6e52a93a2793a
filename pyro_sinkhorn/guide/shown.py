"""Simulated data sets shown to a guide in place of the observed one.

A guide that is to be a posterior learns from data whose latents are known: simulated ones. Many data sets are shown at
once, side by side in one more plate, outside of all plates of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pyro_sinkhorn.guide.observed import Readings
from pyro_sinkhorn.structure import Plate

#: Name of the plate that data sets lie in.
DATA_SETS = "simulated_data_sets"

Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shown:
    """Data sets, ``plate.size`` of them, in the outermost dimension of everything here.

    readings:  values of the observed sites, with the masks of the observed data
    plate:     of the data sets, left of all plates of the model
    indices:   sub-samples of the model's plates, common to all data sets
    moments:   mean and standard deviation of priors on the line given their parents, by site: ``(P, *batch, numel)``;
               None where the guide goes on with what it drew itself, which gives them by a run of the model
    only_globals: local latents are not wanted
    """

    readings: Readings
    plate: Plate
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Moments] | None = None
    only_globals: bool = False


@contextmanager
def showing(guide: Any, shown: Shown) -> Iterator[None]:
    """Let one of the automatic guides read these data inside, whatever its arguments are."""
    before, guide._shown = guide._shown, shown
    try:
        yield
    finally:
        guide._shown = before
