r"""What is compared of a whole data set: few numbers that say what it says of the globals.

By default of every column :math:`c` of every observed site, over the slices :math:`i` of its data plates that no mask hides,

.. math:: \bar c = \frac1n\sum_i c_i, \qquad \Bigl(\frac1n\sum_i (c_i - \bar c)^2\Bigr)^{1/2},

each less its median over simulated data sets and over its spread there; columns with heavy tails (the standard
deviation of data with a half-Cauchy scale spans decades) are compressed by asinh. The units are estimated once and stored. How
many data there are is no column: all data sets of a call are of one size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.losses.clouds import embedded, slices
from pyro_sinkhorn.losses.data_columns import FeatureMap, data_geometry, featured
from pyro_sinkhorn.losses.matching import MatchState
from pyro_sinkhorn.structure import Group, Plate, plates_of, present_of

#: Mean absolute deviations beyond which a Laplace has e^-10 of its mass, and the share that counts as heavy tails.
_FAR, _SHARE = 10.0, 1e-3
#: Standard deviation of a normal over its mean absolute deviation.
_NORMAL = math.sqrt(math.pi / 2)


class Summaries:
    """Columns of data sets, in units that are estimated once.

    :param state: where the units are kept
    :param features: for some sites, what a data set is summarised by instead
    """

    def __init__(self, state: MatchState, features: Mapping[str, FeatureMap]) -> None:
        self.state = state
        self.features = dict(features)

    def columns(self, trace: Trace, seen: Trace, plate: Plate, data: tuple[str, ...]) -> Tensor:
        """Rows ``(P, e)``, of all observed sites.

        :param trace: data sets in a plate
        :param seen: one of them, with the masks
        :param plate: of the data sets
        """
        found = []
        for name in data:
            raw = self._raw(trace, seen, plate, name)
            loc, scale, light = self.state.units[summary_of(name)].to(raw)
            columns = (raw - loc) / scale
            found.append(torch.where(light > 0, columns, columns.asinh()))
        return torch.cat(found, -1)

    @torch.no_grad()
    def estimate(self, trace: Trace, seen: Trace, plate: Plate, data: tuple[str, ...]) -> None:
        """Median, spread and whether the tails are light of every column; only if there are none yet."""
        for name in data:
            if summary_of(name) in self.state.units:
                continue
            raw = self._raw(trace, seen, plate, name)
            loc = raw.median(0).values
            deviation = (raw - loc).abs()
            spread = deviation.mean(0)
            light = (deviation > _FAR * spread).to(raw).mean(0) < _SHARE
            scale = _NORMAL * spread
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            self.state.units[summary_of(name)] = torch.stack([loc, scale, light.to(raw)])

    def _raw(self, trace: Trace, seen: Trace, plate: Plate, name: str) -> Tensor:
        """``(P, e)``, in the unit of the data."""
        site, plates = seen.nodes[name], plates_of(seen.nodes[name])
        if name in self.features:
            return featured(self.features[name], name, *_laid_out(trace, seen, plate, name))
        rows = embedded(trace, name, (plate, *plates), data_geometry(site["fn"], name).embed)
        rows = rows.reshape(plate.size, -1, rows.shape[-1])
        present = slices(seen, Group((name,), plates))[0] > 0
        rows = rows[:, present]
        if not rows.shape[1]:
            return rows.new_zeros(plate.size, 1)
        return torch.cat([rows.mean(1), rows.std(1, correction=0)], -1)


def _laid_out(trace: Trace, seen: Trace, plate: Plate, name: str) -> tuple[Tensor, torch.Size]:
    """Values ``(P, *plates, *event)`` of a site, what is masked out being 0, and the shape of a data set."""
    site, plates, value = seen.nodes[name], plates_of(seen.nodes[name]), trace.nodes[name]["value"]
    event = tuple(site["fn"].event_shape)
    present = present_of(site)
    if present is not None:
        present = present.reshape(*present.shape, *[1] * len(event))
        value = torch.where(present, value, torch.zeros_like(value))
    first = value.dim() - len(event)
    axes = [first + one.dim for one in plates]
    others = [axis for axis in range(1, first) if axis not in axes]
    value = value.permute(0, *axes, *others, *range(first, value.dim()))
    shape = torch.Size([*(one.size for one in plates), *event])
    return value.reshape(plate.size, *shape), shape


def summary_of(name: str) -> str:
    """Where the units of a site's summary are kept."""
    return f"summary of {name}"
