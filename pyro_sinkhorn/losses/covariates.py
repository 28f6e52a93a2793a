"""Covariates of a conditional simulator: what was given, beside what was observed.

Comparing the outputs of a simulator alone says nothing of which input made them. Where a program is given covariates,
they are appended to both clouds, so that transport has to respect the pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.explain import spoken, tensors_of
from pyro_sinkhorn.losses.simulation import Simulation
from pyro_sinkhorn.runs import subsamples
from pyro_sinkhorn.structure import Group, Plate

#: ``"auto"``: floating arguments as long as the data plate that were not observed; a function of the model's arguments.
Covariates = Literal["auto"] | Callable[..., Tensor] | None


def covariate_rows(given: Covariates, call: Simulation, group: Group, warned: set[str]) -> Tensor | None:
    """Covariates of every slice of a group, ``(n, c)``, or None where there are none.

    :param warned: arguments that were already warned of
    :raises ProgramError: a function returned something else than one row a slice
    """
    if given is None:
        return None
    indices = subsamples(call.simulated)
    if callable(given):
        value = given(*call.args, **call.kwargs)
        laid_out = _rows(value, group.plates, indices) if isinstance(value, Tensor) else None
        if laid_out is None:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            sizes = tuple(plate.size for plate in group.plates)
            raise ProgramError(
                f"the covariates function returned {got} for observed sites ({group.name}): expected a tensor of shape "
                f"{sizes[:1]} and then columns, one row for each slice of plate {group.plates[0].name!r}"
            )
        found = {"the covariates": (value, laid_out)}
    else:
        found = {
            path: (value, laid_out)
            for path, value in _candidates(call, group)
            if (laid_out := _rows(value, group.plates, indices)) is not None
        }
    columns = []
    for path, (value, laid_out) in found.items():
        if callable(given) or value.is_floating_point():
            if not bool(laid_out.isfinite().all()):
                raise NonFiniteError(
                    f"{path}, covariates of observed sites ({group.name}), are NaN or infinite"
                )
            columns.append(laid_out)
        elif path not in warned:
            warned.add(path)
            warnings.warn(
                f"{path} ({value.dtype}, shape {tuple(value.shape)}) is as long as the data plate, but is not floating, "
                "so it was not taken for a covariate. Say what is one with covariates=lambda *args: ..., one-hot for "
                "classes, or covariates=None",
                UserWarning,
                stacklevel=2,
            )
    return torch.cat([c.to(columns[0]) for c in columns], -1) if columns else None


def covariate_names(given: Covariates, call: Simulation, group: Group) -> list[str]:
    """How to call the covariates of a group in a report."""
    if given is None or callable(given):
        return [] if given is None else ["covariates function"]
    indices = subsamples(call.simulated)
    return [
        path
        for path, value in _candidates(call, group)
        if value.is_floating_point() and _rows(value, group.plates, indices) is not None
    ]


def _candidates(call: Simulation, group: Group) -> list[tuple[str, Tensor]]:
    """Arguments that hold no observed data, with the words for them; booleans are mostly masks."""
    indices = subsamples(call.simulated)
    observed = [call.observed.nodes[name]["value"] for name in call.structure.data]
    return [
        (spoken(path), value)
        for path, value in tensors_of(call.args, call.kwargs)
        if value.dim()
        and value.dtype != torch.bool
        and not any(_is_source(value, data, group.plates, indices) for data in observed)
    ]


def _is_source(value: Tensor, data: Tensor, plates: tuple[Plate, ...], indices: dict[str, Tensor]) -> bool:
    """Whether the data are this argument: itself, a reshape, a cast, or a sub-sample of it."""
    if value.data_ptr() == data.data_ptr():
        return True
    for axis in range(value.dim()):
        for plate in plates:
            index = indices.get(plate.name)
            if index is not None and plate.size != plate.full_size and value.shape[axis] == plate.full_size:
                picked = value.index_select(axis, index.to(value.device))
                if _same(picked, data):
                    return True
    return _same(value, data)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.numel() != b.numel() or a.device != b.device:
        return False
    return bool((a.reshape(-1).to(b.dtype) == b.reshape(-1)).all())


def _rows(value: Tensor, plates: tuple[Plate, ...], indices: dict[str, Tensor]) -> Tensor | None:
    """``(n, c)`` of a tensor whose first dimensions are those of the outermost plates, or None if they are not."""
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
    return value.expand(*sizes, -1).flatten(0, len(sizes) - 1)
