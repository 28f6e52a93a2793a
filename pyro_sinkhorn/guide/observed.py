"""What an encoder reads: the values of the observed sites, under the current sub-sample.

The obvious way to learn them is to run the model to its observed sites, decoder included. Mostly that is not needed:
the observed value *is* an argument of the model, or a reshape of it, or an argument indexed by the sub-sample. Where
one of these explains the first run, later values are read off the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.explain import Path, tensors_of
from pyro_sinkhorn.structure import Plate, Structure, plates_of


@dataclass(frozen=True)
class Source:
    """Where an observed value comes from: the argument at ``path``, indexed or reshaped; ``path`` None is unknown."""

    path: Path | None
    index_axis: int | None = None
    index_plate: str | None = None
    tail: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Observed:
    """An observed site: its plates, its event dimensions and where its values come from."""

    name: str
    event_dim: int
    plates: tuple[Plate, ...]
    source: Source


def find_observed(
    trace: Trace,
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    indices: dict[str, Tensor],
) -> list[Observed]:
    """Describe every observed site of a complete run."""
    found = []
    for name in structure.data:
        site = trace.nodes[name]
        source = _source(site["value"], dict(tensors_of(args, kwargs)), indices, plates_of(site))
        found.append(Observed(name, len(site["fn"].event_shape), plates_of(site), source))
    return found


def read_observed(
    observed: list[Observed],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    indices: dict[str, Tensor],
    run: Callable[[], Trace],
) -> dict[str, Tensor]:
    """Current values of the observed sites; ``run`` runs the model where an argument does not tell."""
    tensors = dict(tensors_of(args, kwargs))
    values: dict[str, Tensor] = {}
    trace: Trace | None = None
    for site in observed:
        source = site.source
        argument = tensors.get(source.path) if source.path is not None else None
        if argument is None:
            trace = trace or run()
            values[site.name] = trace.nodes[site.name]["value"]
        elif source.index_plate is not None:
            assert source.index_axis is not None
            index = indices[source.index_plate].to(argument.device)
            values[site.name] = argument.index_select(source.index_axis, index)
        elif source.tail is not None:
            values[site.name] = argument.reshape(-1, *source.tail)
        else:
            values[site.name] = argument
    return values


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
