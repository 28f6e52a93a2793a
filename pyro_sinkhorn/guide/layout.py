"""Tensor layouts of plates: which dimension is whose."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.guide.observed import Observed, Readings
from pyro_sinkhorn.structure import Plate


def plate_shape(plates: tuple[Plate, ...]) -> tuple[int, ...]:
    """Batch shape with every plate at its own dimension and 1 elsewhere."""
    shape = [1] * max(-plate.dim for plate in plates)
    for plate in plates:
        shape[plate.dim] = plate.size
    return tuple(shape)


def features_of(observed: list[Observed], values: Readings, plates: tuple[Plate, ...]) -> Tensor:
    """Numbers that an encoder of these plates reads, ``(*plate_shape, n_features)``.

    An observed site in more plates than these is flattened along the others (all words of a document); one in
    fewer is repeated; one in none of them belongs to another data set and is not read. Masked values become NaN, which
    stands for missing, and a column says where they are. Angles are read as points of the circle.
    """
    shape = plate_shape(plates)
    keep, names = {plate.dim for plate in plates}, {plate.name for plate in plates}
    columns = []
    for site in observed:
        if names.isdisjoint(plate.name for plate in site.plates):
            continue
        value = values[site.name]
        if not value.is_floating_point():
            value = value.to(torch.get_default_dtype())
        batch = tuple(value.shape[: value.dim() - site.event_dim])
        value = value.reshape(*batch, -1)
        if site.angles:
            value = torch.cat([value.cos(), value.sin()], -1)
        value = no_number(value)
        if site.name in values.present:
            present = values.present[site.name].unsqueeze(-1)
            batch = tuple(torch.broadcast_shapes(batch, present.shape[:-1]))
            value = torch.where(present, value, torch.nan)
            value = torch.cat([value, present.to(value).expand(*batch, 1)], -1)
        depth = max(len(shape), len(batch))
        value = value.reshape(*[1] * (depth - len(batch)), *value.shape)
        # Plate dimensions that are not ours follow the kept ones and end among the features.
        laid_out = _flattened_along(value, [axis for axis in range(depth) if axis - depth not in keep])
        laid_out = laid_out.reshape(*laid_out.shape[depth - len(shape) : depth], -1)
        for plate in plates:
            if laid_out.shape[plate.dim - 1] not in (1, plate.size):
                raise ProgramError(
                    f"observed site {site.name!r} has shape {tuple(values[site.name].shape)}, of which plate "
                    f"{plate.name!r} holds {laid_out.shape[plate.dim - 1]} slices, not its {plate.size}"
                )
        columns.append(laid_out.expand(*shape, laid_out.shape[-1]))
    return torch.cat(columns, -1)


def _flattened_along(value: Tensor, axes: list[int]) -> Tensor:
    """Slices of some batch dimensions side by side as columns; those dimensions are left with size 1."""
    for axis in axes:
        if value.shape[axis] != 1:
            value = torch.cat(value.split(1, axis), -1)
    return value


def columns_along(value: Tensor, plates: tuple[Plate, ...], nesting: int) -> Tensor:
    """``(..., c)`` with what varies along other plates of the model as columns: ``(..., plates, c')``.

    :param nesting: dimensions of all plates of the model; those further left (draws, data sets) stay
    """
    batch = value.dim() - 1
    value = value.reshape(*[1] * max(nesting - batch, 0), *value.shape)
    keep = {plate.dim for plate in plates}
    depth = value.dim() - 1
    return _flattened_along(value, [depth + dim for dim in range(-nesting, 0) if dim not in keep])


def along_plates(value: Tensor, plates: tuple[Plate, ...], indices: Mapping[str, Tensor]) -> Tensor | None:
    """``(*sizes of plates, c)`` of a tensor whose first dimensions are those of the outermost plates; else None.

    :param indices: sub-samples, which a tensor as long as the full plate is cut to
    """
    lead = 0
    for plate in plates:
        if lead >= value.dim():
            break
        if value.shape[lead] == plate.full_size != plate.size and plate.name in indices:
            value = value.index_select(lead, indices[plate.name].to(value.device))
        if value.shape[lead] != plate.size:
            break
        lead += 1
    if lead == 0:
        return None
    sizes = [plate.size for plate in plates]
    value = value.reshape(*sizes[:lead], *(1 for _ in sizes[lead:]), -1)
    return value.expand(*sizes, -1)


def rows_of(value: Tensor, plates: tuple[Plate, ...], group: str) -> Tensor:
    """What the user's ``encoder_input`` returned, laid out like :func:`features_of`.

    :raises ProgramError: its first dimensions are not those of the plates
    """
    ordered = sorted(plates, key=lambda plate: plate.dim)
    sizes = tuple(plate.size for plate in ordered)
    if not isinstance(value, Tensor) or tuple(value.shape[: len(sizes)]) != sizes:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ProgramError(
            f"latent group ({group}): encoder_input returned {got}; expected a tensor whose first dimensions are {sizes}, "
            f"the slices of the plates {[plate.name for plate in ordered]} in this call. A model that sub-samples by itself "
            "needs no encoder_input: its observed values are read under the sub-sample"
        )
    return no_number(value.reshape(*plate_shape(plates), -1))


def no_number(value: Tensor) -> Tensor:
    """NaN, which would be read as missing, as infinity, which will show."""
    return torch.where(value.isnan(), math.inf, value)


def place_extra_plates(raw: Tensor, extra: list[Plate]) -> Tensor:
    """Unfold outputs for plates inside the datum: ``(*batch, k * num_raw)`` to ``(*batch with the plates, num_raw)``."""
    if not extra:
        return raw
    sizes = [plate.size for plate in extra]
    depth = max(raw.dim() - 1, *(-plate.dim for plate in extra))
    raw = raw.reshape(*[1] * (depth - raw.dim() + 1), *raw.shape[:-1], *sizes, -1)
    for i, plate in enumerate(extra):
        raw = raw.transpose(depth + plate.dim, depth + i)
    return raw.reshape(*raw.shape[:depth], raw.shape[-1])
