"""What an encoder reads: the values of the observed sites, under the current sub-sample.

The obvious way to learn them is to run the model to its observed sites, decoder included. Mostly that is not needed:
the observed value *is* an argument of the model, or a reshape of it, or an argument indexed by the sub-sample. Where
one of these explains the first run, later values are read off the arguments.

Data may be missing: masked by ``poutine.mask``, ``.mask()`` or ``obs_mask=``. Which are is read in the same way, so that
the encoder can be told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.explain import Path, tensors_of
from pyro_sinkhorn.geometry.registry import is_angle
from pyro_sinkhorn.structure import Plate, Structure, check_tensors, is_data, masks_of, plates_of, present_of


@dataclass(frozen=True)
class Source:
    """Where an observed value comes from: the argument at ``path``, indexed or reshaped; ``path`` None is unknown."""

    path: Path | None
    index_axis: int | None = None
    index_plate: str | None = None
    tail: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Observed:
    """An observed site: its plates, its event dimensions, where its values come from, its mask, if it has one, and whether
    its values are angles.
    """

    name: str
    event_dim: int
    plates: tuple[Plate, ...]
    source: Source
    mask: Source | None = None
    angles: bool = False


class Readings(dict[str, Tensor]):
    """Values of the observed sites by name; ``present`` says of masked ones which count: booleans that broadcast with them."""

    def __init__(self, values: Mapping[str, Tensor] = {}, present: Mapping[str, Tensor] = {}) -> None:
        super().__init__(values)
        self.present = dict(present)

    def for_encoder(self, observed: list[Observed]) -> Any:
        """What an encoder of the user's gets: the values, 0 where masked; in a dict if there are several."""
        filled = dict(self)
        for site in observed:
            if site.name in self.present:
                present, value = self.present[site.name], self[site.name]
                present = present.reshape(*present.shape, *[1] * site.event_dim)
                filled[site.name] = torch.where(present, value, torch.zeros_like(value))
        return filled if len(filled) > 1 else next(iter(filled.values()))


def find_observed(
    trace: Trace,
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    indices: dict[str, Tensor],
) -> list[Observed]:
    """Describe every observed site of a complete run.

    :raises ProgramError: data that are no tensor
    """
    check_tensors(trace, structure)
    found = []
    for name in structure.data:
        site, tensors = trace.nodes[name], dict(tensors_of(args, kwargs))
        source = _source(site["value"], tensors, indices, plates_of(site))
        masks = list(masks_of(site))
        mask = _source(masks[0], tensors, indices, plates_of(site)) if len(masks) == 1 else Source(None)
        fn, present = site["fn"], mask if masks else None
        found.append(Observed(name, len(fn.event_shape), plates_of(site), source, present, is_angle(fn)))
    return found


def read_observed(
    observed: list[Observed],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    indices: dict[str, Tensor],
    run: Callable[[], Trace],
) -> Readings:
    """Current values of the observed sites; ``run`` runs the model where an argument does not tell.

    :raises ProgramError: a site is not observed any more
    """
    tensors = dict(tensors_of(args, kwargs))
    read = Readings()
    trace: Trace | None = None
    for site in observed:
        value = _look_up(site.source, tensors, indices)
        if value is None:
            trace = trace or run()
            _check_observed(site.name, trace)
            value = trace.nodes[site.name]["value"]
        read[site.name] = value
        if site.mask is None:
            continue
        present = _look_up(site.mask, tensors, indices)
        if present is None:
            trace = trace or run()
            present = present_of(trace.nodes[site.name])
        if present is not None:
            read.present[site.name] = present != 0
    return read


def _look_up(source: Source, tensors: dict[Path, Tensor], indices: dict[str, Tensor]) -> Tensor | None:
    argument = tensors.get(source.path) if source.path is not None else None
    if argument is None:
        return None
    if source.index_plate is not None:
        assert source.index_axis is not None
        return argument.index_select(source.index_axis, indices[source.index_plate].to(argument.device))
    return argument if source.tail is None else argument.reshape(-1, *source.tail)


def _check_observed(name: str, trace: Trace) -> None:
    if name not in trace.nodes or not is_data(trace.nodes[name]):
        raise ProgramError(
            f"site {name!r} was observed when AutoImplicit was made and is not in this call. Data that are there for some rows "
            f"only are said in one call, by pyro.sample({name!r}, ..., obs=values, obs_mask=present); a guide written by "
            "hand may also sample the site in some calls only"
        )


def _source(
    value: Tensor, tensors: dict[Path, Tensor], indices: dict[str, Tensor], plates: tuple[Plate, ...]
) -> Source:
    for path, tensor in tensors.items():
        if value is tensor:
            return Source(path)
    for path, tensor in tensors.items():
        for plate in plates:
            index = indices.get(plate.name)
            if index is None or plate.size == plate.full_size:
                continue
            for axis in range(tensor.dim()):
                # Sub-sampled values are copies: only equal contents show where they come from.
                if tensor.shape[axis] == plate.full_size and tensor.dim() == value.dim():
                    picked = tensor.index_select(axis, index.to(tensor.device))
                    if picked.shape == value.shape and picked.dtype == value.dtype and _same(picked, value):
                        return Source(path, axis, plate.name)
        shares = value.data_ptr() == tensor.data_ptr() and value.numel() == tensor.numel()
        if (
            shares
            and value.dtype == tensor.dtype
            and value.dim()
            and value.is_contiguous()
            and tensor.is_contiguous()
        ):
            if value.shape == tensor.shape:
                return Source(path)
            if len(plates) == 1 and tensor.dim() and value.shape[0] == tensor.shape[0] == plates[0].size:
                return Source(path, tail=tuple(value.shape[1:]))
    return Source(None)


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())
