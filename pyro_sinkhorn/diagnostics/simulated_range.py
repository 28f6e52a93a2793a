"""Whether data lie where a program simulates: outside, no guide that learned from simulations knows anything."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sinkhorn.errors import NonFiniteError
from pyro_sinkhorn.explain import bad_rows
from pyro_sinkhorn.losses.data_columns import data_geometry
from pyro_sinkhorn.losses.pairs import Pairs, Simulator
from pyro_sinkhorn.structure import Structure, present_of

#: Chance of a false alarm, at most.
_LEVEL = 1e-3
#: Points that are compared with: enough for one beyond all of them to be news at this level, by either of two statistics.
_REFERENCE = 2048
#: Where they are simulated one by one.
_FEW = 512
#: Rows of data sets that are simulated, at most, unless so few data sets need more.
_MOST_ROWS = 2_000_000


class OutOfRangeWarning(UserWarning):
    """Observed data lie outside of what the program simulates."""


@dataclass(frozen=True)
class RangeReport:
    """How far data are from simulated ones.

    distance: of each datum, or of the data set, to the nearest simulated one
    floor:    the same between simulations
    outside:  data further away than all but a hundredth of simulations, or of few data than all of them
    p_value:  of as many outside, or of one as far outside, at most, if the data were simulated
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
            f"nearest simulated one than simulations are (p = {self.p_value:.2g}); largest distance {worst:.3g}, typical "
            f"between simulations {typical:.3g}"
        )


@torch.no_grad()
def simulated_range(model: Callable[..., Any], *args: Any, **kwargs: Any) -> RangeReport:
    """Distance of data to simulated data, against the distance between simulations.

    Data are embedded by their support, standardised by the simulations and compressed by asinh. Of a program without
    globals every datum is compared with data simulated for all rows; of one with globals the whole data set, by mean and
    standard deviation of its rows, with simulated data sets of the same size. What a mask hides is left out.

    Data that were simulated are called outside in one of 1000 cases, at most.

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
    few, many = _FEW, max(_FEW, min(_REFERENCE, _MOST_ROWS // rows))
    if not structure.globals:
        few, many = (max(math.ceil(2 * size / rows), 2) for size in (_FEW, _REFERENCE))
    pairs = simulator(model, args, kwargs, few)
    if simulator.vectorize:
        pairs = simulator(model, args, kwargs, many)
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
    deviation = (there - centre).abs()
    # The mean where most are equal, as rare events are; nothing where all are.
    spread = torch.where(deviation.median(0).values > 0, deviation.median(0).values, deviation.mean(0))
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    there, here = ((there - centre) / spread).asinh(), ((here - centre) / spread).asinh()
    if structure.globals:
        # Data sets may be expensive: each is compared with all others, the observed one with all.
        floor = _distances(there, there).fill_diagonal_(math.inf).min(1).values
        distance = _distances(here, there).min(1).values
    else:
        # To the same points, so that, these given, all distances are independent.
        order = torch.randperm(len(there))
        first, second = (there[half[:_REFERENCE]] for half in order.tensor_split(2))
        floor = _distances(second, first).min(1).values
        distance = torch.cat([_distances(part, first).min(1).values for part in here.split(_REFERENCE)])
    # Of few data one beyond all simulated ones is seen best; of many, several beyond the upper hundredth.
    n_above = max(1, round(min(0.01, len(distance) / 5000) * len(floor)))
    far = floor.topk(n_above).values[-1]
    outside = int((distance > far).sum())
    number = _p_of_number(outside, len(distance), len(floor), n_above)
    return RangeReport(
        distance,
        floor,
        outside,
        min(1.0, 2 * min(number, _p_of_extreme(here, there))),
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
        present = present_of(seen.nodes[name])
        if present is not None:
            embedded = torch.where(present.unsqueeze(-1), embedded, torch.zeros_like(embedded))
        batch = embedded.dim() - 1
        moved = embedded.movedim(batch + plate.dim, 1)
        flat = moved.reshape(len(value), plate.size, -1).double()
        if not bool(flat.isfinite().all()):
            raise NonFiniteError(
                f"observed site {name!r}: {bad_rows(flat.flatten(0, 1))} of the values (shape {tuple(value.shape)}): remove or "
                "mask them"
            )
        columns.append(flat)
    return torch.cat(columns, -1)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # Matrix products are faster in many dimensions, but tell equal points apart by their rounding.
    wide = x.shape[-1] > 16
    mode = "use_mm_for_euclid_dist_if_necessary" if wide else "donot_use_mm_for_euclid_dist"
    return torch.cdist(x, y, compute_mode=mode)


def _summary(rows: Tensor) -> Tensor:
    """Mean and standard deviation along the rows of each data set."""
    return torch.cat([rows.mean(1), rows.std(1, correction=0)], -1)


def _p_of_number(outside: int, n: int, m: int, n_above: int) -> float:
    """Of so many of n data beyond the ``n_above``-th largest of m simulated distances: beta-binomial, whatever their law.

    Simulated and observed distances are exchangeable if the data were simulated; ties make fewer lie beyond.
    """
    from scipy.stats import betabinom

    return float(betabinom.sf(outside - 1, n, n_above, m + 1 - n_above)) if outside else 1.0


def _p_of_extreme(here: Tensor, there: Tensor) -> float:
    r"""Of the datum furthest out in any of its columns, beyond all of m simulated ones: at most

    .. math:: \frac{n}{m+1}\exp\Bigl(-\frac{r - r_{\max}}{2e}\Bigr),

    with :math:`r` the largest absolute column. By ranks one of n lies beyond with probability n/(m+1); how far, ranks do not
    say. A power law, compressed by asinh, falls off exponentially and lighter tails fall off faster; e is the mean excess
    over the 90% quantile, taken twice since it is estimated.
    """
    radius, reference = here.abs().amax(-1).max(), there.abs().amax(-1)
    beyond = float(radius - reference.max())
    if beyond <= 0:
        return 1.0
    high = reference.quantile(0.9)
    excess = reference[reference > high] - high
    scale = float(excess.mean()) if len(excess) else 1.0
    return min(1.0, len(here) / (len(there) + 1) * math.exp(-beyond / (2 * scale)))
