"""Covariates of a conditional simulator: what was given, beside what was observed.

Comparing the outputs of a simulator alone says nothing of which input made them. Covariates are appended to both clouds,
so that transport has to respect the pairs. Which argument of a program is one cannot be known for certain: one from
which the *data* are computed (by a logarithm, say) must not be, or every simulated datum would carry the observed one
with it, and the noise would be fitted away. So nothing is appended unasked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.explain import spoken, tensors_of
from pyro_sinkhorn.guide.layout import along_plates
from pyro_sinkhorn.losses.simulation import Simulation
from pyro_sinkhorn.runs import subsamples
from pyro_sinkhorn.structure import Group, Plate

#: ``"warn"``: none, but say so where an argument looks like one. ``"auto"``: those. A function of the model's arguments.
Covariates = Literal["warn", "auto"] | Callable[..., Tensor] | None


def covariates_of(
    given: Covariates, call: Simulation, group: Group, warned: set[str]
) -> list[tuple[str, Tensor]]:
    """Covariates of a group with what to call them, each ``(n, c)``, floating.

    :param warned: what was already said
    :raises ProgramError: a function returned something else than one row a slice
    :raises NonFiniteError: a covariate is NaN or infinite
    """
    if given is None or (given == "warn" and f"covariates of {group.name}" in warned):
        return []
    found = _given(given, call, group) if callable(given) else _candidates(call, group)
    if given == "warn":
        warned.add(f"covariates of {group.name}")
        if found:
            said = " and ".join(f"{name} {tuple(rows.shape)}" for name, rows in found)
            warnings.warn(
                f"observed sites ({group.name}): {said}, as long as plate {group.plates[0].name!r}, was not observed as it is. "
                "If the simulator depends on it, have it compared with the data by covariates='auto' or "
                "covariates=lambda *args: ... in the loss; if not, or if the data are computed from it, say "
                "covariates=None",
                UserWarning,
                stacklevel=2,
            )
        return []
    for name, rows in found:
        if not bool(rows.isfinite().all()):
            raise NonFiniteError(f"{name}, a covariate of observed sites ({group.name}), is NaN or infinite")
    return found


def _given(given: Callable[..., Tensor], call: Simulation, group: Group) -> list[tuple[str, Tensor]]:
    value = given(*call.args, **call.kwargs)
    rows = _rows(value, group.plates, subsamples(call.simulated)) if isinstance(value, Tensor) else None
    if rows is None:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ProgramError(
            f"the covariates function returned {got} for observed sites ({group.name}): expected a tensor of shape "
            f"({group.plates[0].size},) and then columns, one row for each slice of plate {group.plates[0].name!r}"
        )
    return [
        ("the covariates function", rows if rows.is_floating_point() else rows.to(torch.get_default_dtype()))
    ]


def _candidates(call: Simulation, group: Group) -> list[tuple[str, Tensor]]:
    """Floating arguments as long as the outermost plate that hold no observed data."""
    indices = subsamples(call.simulated)
    sites = [call.observed.nodes[name] for name in call.structure.data]
    # As they were given: what is missing may have been filled in.
    observed = [site["infer"].get("obs", site["value"]) for site in sites]
    found = []
    for path, value in tensors_of(call.args, call.kwargs):
        if not value.dim() or not value.is_floating_point():
            continue
        if any(_is_source(value, data, group.plates, indices) for data in observed):
            continue
        rows = _rows(value, group.plates, indices)
        if rows is not None:
            found.append((spoken(path), rows))
    return found


def _is_source(value: Tensor, data: Tensor, plates: tuple[Plate, ...], indices: dict[str, Tensor]) -> bool:
    """Whether the data are this argument or a part of it: itself, a view, a cast, or a sub-sample."""
    if value.untyped_storage().data_ptr() == data.untyped_storage().data_ptr():
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
    a, b = a.reshape(-1).to(b.dtype), b.reshape(-1)
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _rows(value: Tensor, plates: tuple[Plate, ...], indices: dict[str, Tensor]) -> Tensor | None:
    """``(n, c)`` of a tensor whose first dimensions are those of the outermost plates, or None if they are not."""
    found = along_plates(value, plates, indices)
    return None if found is None else found.flatten(0, len(plates) - 1)
