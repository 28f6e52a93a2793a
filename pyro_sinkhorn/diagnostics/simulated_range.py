"""Whether data lie where a program simulates: outside, no guide that learned from simulations knows anything."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sinkhorn.losses.data_columns import data_geometry
from pyro_sinkhorn.losses.pairs import Pairs, Simulator
from pyro_sinkhorn.structure import Structure

#: Rows, or data sets, that are simulated to compare with.
_REFERENCE = 512
#: Chance of a false alarm.
_LEVEL = 1e-4


class OutOfRangeWarning(UserWarning):
    """Observed data lie outside of what the program simulates."""


@dataclass(frozen=True)
class RangeReport:
    """How far data are from simulated ones.

    distance: of each datum, or of the data set, to the nearest simulated one
    floor:    the same between simulations
    outside:  data further away than 99% of simulations are
    p_value:  of as many outside, or of one as far outside, if the data were simulated
    unit:     what was compared: ``"data"`` or ``"data set"``
    """

    distance: Tensor
    floor: Tensor
    outside: int
    p_value: float
    unit: str

    @property
    def passed(self) -> bool:
        """Whether the data could have been simulated, as far as distances show."""
        return self.p_value > _LEVEL

    def __str__(self) -> str:
        typical, worst = float(self.floor.median()), float(self.distance.max())
        said = "inside" if self.passed else "outside"
        return (
            f"{said} the range of the simulations: {self.outside} of {len(self.distance)} ({self.unit}) further from the "
            f"nearest simulated one than 99% of simulations are (p = {self.p_value:.2g}); largest distance {worst:.3g}, "
            f"typical between simulations {typical:.3g}"
        )


@torch.no_grad()
def simulated_range(model: Callable[..., Any], *args: Any, **kwargs: Any) -> RangeReport:
    """Distance of data to simulated data, against the distance between simulations.

    Data are embedded by their support, standardised by the simulations and compressed by asinh. Of a program without
    globals every datum is compared with data simulated for all rows; of one with globals the whole data set, by mean and
    standard deviation of its rows, with as many simulated data sets.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
    >>> simulated_range(model, torch.randn(50)).passed, simulated_range(model, torch.randn(50) + 9).passed
    (True, False)
    """
    simulator = Simulator()
    seen, structure, nesting = simulator.look(model, args, kwargs)
    rows = max(structure.data_plates[0].size, 1)
    number = _REFERENCE if structure.globals else max(math.ceil(_REFERENCE / rows), 2)
    pairs = simulator(model, args, kwargs, number)
    observed = Pairs(
        {name: seen.nodes[name]["value"].unsqueeze(0) for name in structure.data},
        pairs.event_dims,
        {},
        {},
        nesting,
    )
    there, here = _features(pairs, structure, seen), _features(observed, structure, seen)
    if structure.globals:
        there, here = _summary(there), _summary(here)
    else:
        there, here = there.flatten(0, 1), here.flatten(0, 1)
    centre = there.median(0).values
    spread = (there - centre).abs().mean(0)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    there, here = ((there - centre) / spread).asinh(), ((here - centre) / spread).asinh()
    order = torch.randperm(len(there))
    first, second = there[order[: len(there) // 2]], there[order[len(there) // 2 :]][:2000]
    first = first[:2000]
    floor = torch.cdist(second, first).min(1).values
    distance = torch.cat([torch.cdist(part, first).min(1).values for part in here.split(2000)])
    far = floor.quantile(0.99)
    outside = int((distance > far).sum())
    return RangeReport(
        distance,
        floor,
        outside,
        _p_value(distance, floor, outside),
        "data set" if structure.globals else "data",
    )


def warn_of_range(model: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Warn where data lie outside of what the program simulates."""
    report = simulated_range(model, *args, **kwargs)
    if not report.passed:
        warnings.warn(
            f"the observed data lie {report}. Posterior draws there extrapolate: look at prior predictive draws "
            "(generate()), widen the prior, or correct the model. check_range=False leaves this check out",
            OutOfRangeWarning,
            stacklevel=3,
        )


def _features(pairs: Pairs, structure: Structure, seen: Any) -> Tensor:
    """Rows ``(P, n, columns)`` of the outermost data plate."""
    plate = structure.data_plates[0]
    columns = []
    for name in structure.data:
        own = {frame.name for frame in seen.nodes[name]["cond_indep_stack"]}
        if plate.name not in own:
            continue
        value = pairs.values[name]
        embedded = data_geometry(seen.nodes[name]["fn"], name).embed(value)
        batch = embedded.dim() - 1
        moved = embedded.movedim(batch + plate.dim, 1)
        flat = moved.reshape(len(value), plate.size, -1).double()
        columns.append(torch.where(flat.isfinite(), flat, torch.zeros_like(flat)))
    return torch.cat(columns, -1)


def _summary(rows: Tensor) -> Tensor:
    """Mean and standard deviation along the rows of each data set."""
    return torch.cat([rows.mean(1), rows.std(1, correction=0)], -1)


def _p_value(distance: Tensor, floor: Tensor, outside: int) -> float:
    """Of the number beyond the 99% quantile, and of the one furthest out relative to the scale of the floor's tail."""
    from scipy.stats import binom

    n = len(distance)
    # The quantile is itself estimated: a rate somewhat above 1% is no news.
    many = float(binom.sf(outside - 1, n, 0.02)) if outside else 1.0
    # Beyond the 90% quantile distances of a light-tailed cloud fall off exponentially or faster.
    high, top = floor.quantile(0.9), floor.quantile(0.99)
    rate = math.log(10) / max(float(top - high), 1e-12)
    furthest = float((distance.max() - top).clamp_min(0))
    one = min(1.0, n * 0.01 * math.exp(-rate * furthest)) if furthest > 0 else 1.0
    return min(1.0, 2 * min(many, one))
