"""Arrays whose dimensions have names, plates' and events', and ArviZ's container of them, in its versions 0.2x and 1.x.

ArviZ wants every group as a dataset ``(chain, draw, *dims)``. Version 0.2x gathers datasets in an ``InferenceData``,
version 1 in an ``xarray.DataTree``, and their ``from_dict`` differ; ``dict_to_dataset``, which both are built on, differs in
one argument only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.structure import Site, innermost, plates_of, present_of

#: Dimensions that every draw has. There is one chain: draws are independent of each other.
SAMPLE_DIMS = ("chain", "draw")


@dataclass(frozen=True)
class Layout:
    """How values of one site are laid out.

    shape:      to which they are broadcast
    dims:       a name for every dimension of it; None for one of size 1 that belongs to no plate, which is dropped
    event_dim:  how many of the last ones are the event's
    """

    shape: tuple[int, ...]
    dims: tuple[str | None, ...]
    event_dim: int = 0

    def batch(self) -> Layout:
        """The plates alone, as a log density has them."""
        n = len(self.shape) - self.event_dim
        return Layout(self.shape[:n], self.dims[:n])

    def labelled(self, name: str, values: np.ndarray, sampled: bool) -> Labelled:
        """Values of a site with their names.

        :param sampled: whether the first dimension counts draws
        :raises ProgramError: the values do not fit
        """
        lead = values.shape[:1] if sampled else ()
        rest = list(values.shape[len(lead) :])
        while len(rest) > len(self.shape) and rest[0] == 1:  # as Predictive leaves them
            rest.pop(0)
        try:
            wide = np.broadcast_to(
                values.reshape((*lead, *[1] * (len(self.shape) - len(rest)), *rest)), lead + self.shape
            )
        except ValueError as error:
            raise ProgramError(
                f"site {name!r}: the {'draws' if sampled else 'values'} have shape {tuple(values.shape)}, the model's value "
                f"{self.shape}{f' in each of {lead[0]} draws' if lead else ''}: call with the data that they belong to"
            ) from error
        kept = [(dim, size) for dim, size in zip(self.dims, self.shape, strict=True) if dim is not None]
        # A copy: the data of the caller must not change with the export's.
        array = wide.reshape((*lead, *[size for _, size in kept])).copy()
        return Labelled(array, tuple(dim for dim, _ in kept), sampled)


@dataclass(frozen=True)
class Labelled:
    """An array and the names of its dimensions, that of the draws left out."""

    values: np.ndarray
    dims: tuple[str, ...]
    sampled: bool

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Names and sizes of the dimensions."""
        return zip(self.dims, self.values.shape[self.sampled :], strict=True)


Groups = dict[str, dict[str, Labelled]]


def layout_of(name: str, site: Site) -> Layout:
    """The layout of a site of the model's trace."""
    value, fn = site["value"], site["fn"]
    plates = {plate.dim: plate for plate in plates_of(site)}
    shape, event_dim = tuple(value.shape), len(fn.event_shape)
    if value.dim() > event_dim or not plates:
        # A value that is the same for all slices of a plate, such as data without its dimension, is repeated.
        try:
            shape = tuple(torch.broadcast_shapes(shape, fn.batch_shape + fn.event_shape))
        except RuntimeError as error:
            raise ProgramError(
                f"site {name!r}: the value has shape {shape}, its {type(innermost(fn)).__name__} batch shape "
                f"{tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)}, which do not fit: pass data of the shape "
                "that the program was fitted to"
            ) from error
    elif site["infer"].get("_deterministic"):
        # pyro.deterministic takes all dimensions for the event's, unless told. Mostly the plates' come first.
        depth = -min(plates)
        if len(shape) >= depth and all(shape[depth + dim] == plate.size for dim, plate in plates.items()):
            event_dim = len(shape) - depth
    else:
        shape = tuple(fn.batch_shape + fn.event_shape)
    n = len(shape) - event_dim
    dims: list[str | None] = []
    unnamed = (f"{name}_dim_{i}" for i in range(len(shape)))
    for axis, size in enumerate(shape):
        plate = plates.get(axis - n) if axis < n else None
        dims.append(plate.name if plate else None if axis < n and size == 1 else next(unnamed))
    return Layout(shape, tuple(dims), event_dim)


def with_gaps(site: Site) -> Tensor:
    """The value of an observed site, NaN where it is masked: what is there may be anything."""
    value, present = site["value"], present_of(site)
    if present is None or bool(present.all()):
        return value
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    return torch.where(present.reshape(*present.shape, *[1] * len(site["fn"].event_shape)), value, torch.nan)


def as_array(tensor: Tensor) -> np.ndarray:
    """A tensor as NumPy has it."""
    return tensor.detach().cpu().numpy()


def renamed(groups: Groups, dims: Mapping[str, Sequence[str]] | None) -> Groups:
    """Give dimensions the user's names. A list that is too short names the first dimensions, one a name of a site.

    :param dims: ``{site: names}``, plates first, then the event's
    :raises ProgramError: too many names, or a site that is in no group
    """
    dims = {} if dims is None else dict(dims)
    known = {name for group in groups.values() for name in group}
    for name, names in dims.items():
        if name not in known:
            raise ProgramError(f"dims names {name!r}, which is not exported; there are {sorted(known)}")
        if isinstance(names, str) or not all(isinstance(one, str) for one in names):
            raise ProgramError(
                f"dims of {name!r} are {names!r}: expected a list of names, such as ['school']"
            )
        most = max((group[name].dims for group in groups.values() if name in group), key=len)
        if len(names) > len(most):
            raise ProgramError(
                f"dims of {name!r} are {list(names)}: {len(names)} names for its {len(most)} dimensions {list(most)}; "
                "those of chain and draw are not named"
            )
    return {
        group: {
            name: Labelled(
                one.values,
                (*dims.get(name, ()), *one.dims[len(dims.get(name, ())) :])[: len(one.dims)],
                one.sampled,
            )
            for name, one in members.items()
        }
        for group, members in groups.items()
    }


def checked_coords(
    groups: Groups, given: Mapping[str, Any] | None, default: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Coordinates of all dimensions: the user's, else those of the plates, else ArviZ's ranges.

    :raises ProgramError: names that collide, sizes that differ, coordinates of another length or of no dimension
    """
    sizes: dict[str, tuple[int, str]] = {}
    for group, members in groups.items():
        for name, one in members.items():
            for dim, size in one.sizes():
                advice = f"name the dimensions of {name!r} by dims={{{name!r}: [...]}}"
                if dim in SAMPLE_DIMS or dim in members or list(one.dims).count(dim) > 1:
                    raise ProgramError(
                        f"site {name!r} in group {group!r}: its dimension {dim!r} is also the name of "
                        f"{'a dimension of the draws' if dim in SAMPLE_DIMS else 'another dimension or a site'}; {advice}"
                    )
                before, other = sizes.setdefault(dim, (size, name))
                if before != size:
                    raise ProgramError(
                        f"dimension {dim!r} has size {before} for site {other!r} and {size} for site {name!r}; {advice}"
                    )
    coords = {dim: values for dim, values in default.items() if sizes.get(dim, (-1,))[0] == len(values)}
    for dim, values in (given or {}).items():
        if dim not in sizes:
            raise ProgramError(f"coords names {dim!r}, which is no dimension; there are {sorted(sizes)}")
        if np.ndim(values) != 1 or len(values) != sizes[dim][0]:
            raise ProgramError(
                f"coords of {dim!r} have shape {np.shape(values)}: expected {sizes[dim][0]} values, as site "
                f"{sizes[dim][1]!r} has along it"
            )
        coords[dim] = values
    return coords


def container(
    groups: Groups,
    coords: Mapping[str, Any],
    attributes: Mapping[str, Any],
    notes: Mapping[str, Mapping[str, Any]],
) -> Any:
    """``arviz.InferenceData``, or from ArviZ 1 on an ``xarray.DataTree``.

    :param attributes: of the whole and of every group
    :param notes: attributes of single groups
    """
    import arviz

    modern = int(arviz.__version__.partition(".")[0]) >= 1
    datasets = {}
    for group, members in groups.items():
        sampled = any(one.sampled for one in members.values())
        sample_dims = list(SAMPLE_DIMS if sampled else ())
        datasets[group] = arviz.dict_to_dataset(
            {name: one.values[None] if sampled else one.values for name, one in members.items()},
            coords=dict(coords),
            dims={name: list(one.dims) for name, one in members.items()},
            attrs={**attributes, **notes.get(group, {})},
            **({"sample_dims": sample_dims} if modern else {"default_dims": sample_dims}),
        )
    if not modern:
        return arviz.InferenceData(attrs=dict(attributes), **datasets)
    from xarray import DataTree  # which ArviZ depends on

    tree = DataTree.from_dict(datasets)
    tree.attrs = dict(attributes)
    return tree
