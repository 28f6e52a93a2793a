"""What the posterior guide reads: rows of observed values and covariates, and whole data sets."""

from __future__ import annotations

import dataclasses
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.explain import Path, spoken, tensors_of
from pyro_sinkhorn.guide.layout import along_plates, features_of, plate_shape
from pyro_sinkhorn.guide.observed import Observed, Readings
from pyro_sinkhorn.structure import Plate

Covariates = Literal["auto"] | Callable[..., Tensor] | None


@dataclasses.dataclass(frozen=True)
class Reading:
    """One call's data, ready to be laid out along any plates.

    observed:   the observed sites, with the plates of this call
    values:     theirs, data sets outermost where several are shown
    covariates: what else the slices of the outermost plate are read with
    lead:       the plate of data sets, if several are shown
    code:       of an encoder of the user's, for the slices of the outermost plate: ``(lead, plate_shape, width)``
    """

    observed: list[Observed]
    values: Readings
    covariates: list[Tensor]
    indices: Mapping[str, Tensor]
    lead: tuple[Plate, ...] = ()
    code: Tensor | None = None

    def rows(self, plates: tuple[Plate, ...]) -> Tensor:
        """Numbers read in every slice: ``(lead, plate_shape, n_features)``."""
        around = (*self.lead, *plates)
        columns = []
        if self.code is None or len(plates) > 1:
            columns.append(features_of(self.observed, self.values, around))
        if self.code is not None:
            columns.append(self.code)
        for value in self.covariates:
            laid_out = along_plates(value, plates, self.indices)
            if laid_out is not None:
                columns.append(placed(laid_out.to(columns[0]), plates))
        shape = plate_shape(around)
        return torch.cat([column.expand(*shape, column.shape[-1]) for column in columns], -1)

    def counted(self, plates: tuple[Plate, ...]) -> Tensor | None:
        """Slices in which something was observed, along the dimensions of the plates; None for all.

        Sites outside of some of the plates do not count: their values are repeated along these.
        """
        names, keep = {plate.name for plate in plates}, {plate.dim for plate in plates}
        found: Tensor | None = None
        for site in self.observed:
            if not names <= {plate.name for plate in site.plates}:
                continue
            if site.name not in self.values.present:
                return None
            present = self.values.present[site.name]
            for dim in range(-present.dim(), 0):
                present = present if dim in keep else present.any(dim, keepdim=True)
            depth = max(-dim for dim in keep)
            present = present.reshape(present.shape[max(present.dim() - depth, 0) :])
            found = present if found is None else found | present
        return found

    def stacks(self) -> list[tuple[Plate, ...]]:
        """Plates of the observed sites, each stack once."""
        return list(dict.fromkeys(site.plates for site in self.observed))


def placed(value: Tensor, plates: tuple[Plate, ...]) -> Tensor:
    """``(*sizes of plates, c)`` with every plate at its own dimension."""
    order = sorted(range(len(plates)), key=lambda i: plates[i].dim)
    return value.permute(*order, len(plates)).reshape(*plate_shape(plates), value.shape[-1])


def resized(observed: list[Observed], values: Readings) -> list[Observed]:
    """Observed sites with the plate sizes of these values: data sets may vary in size."""
    found = []
    for site in observed:
        shape = values[site.name].shape
        batch = shape[: len(shape) - site.event_dim]
        plates = tuple(
            plate
            if plate.size != plate.full_size or len(batch) < -plate.dim
            else dataclasses.replace(plate, size=batch[plate.dim], full_size=batch[plate.dim])
            for plate in site.plates
        )
        found.append(dataclasses.replace(site, plates=plates))
    return found


def find_covariates(
    given: Covariates, observed: list[Observed], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Path]:
    """Arguments along the outermost data plates that hold no data, for ``"auto"``.

    Where some data are no argument as it is, any argument may be what they were computed from; then none is read, and
    a warning says so.
    """
    if given != "auto":
        return []
    sources = {site.source.path for site in observed} | {site.mask.path for site in observed if site.mask}
    outermost = {site.plates[0].full_size for site in observed}
    found = [
        path
        for path, value in tensors_of(args, kwargs)
        if value.dim() and len(value) in outermost and path not in sources
    ]
    unknown = [site.name for site in observed if site.source.path is None]
    if found and unknown:
        warnings.warn(
            f"observed sites {unknown} are no arguments of the model as they are, so {[spoken(path) for path in found]} may be "
            "what they are computed from, and the guide reads none of them beside the observed values. If it should (a "
            "design, known errors), say AutoPosterior(model, covariates=lambda *args: ...); if not, covariates=None",
            UserWarning,
            stacklevel=2,
        )
        return []
    return found


class KnowsCovariates:
    """A guide whose state says which arguments are covariates: data of another size need not show it."""

    #: Where they are among the arguments.
    _covariate_paths: list[Path] = []

    def get_extra_state(self) -> Any:
        """Paths as bytes, which a state of tensors can hold."""
        return torch.tensor(list(json.dumps(self._covariate_paths).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """The inverse of :meth:`get_extra_state`."""
        self._covariate_paths = [tuple(path) for path in json.loads(bytes(state.tolist()))]


def read_covariates(
    given: Covariates,
    paths: list[Path],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    plate: Plate,
    model: Callable[..., Any],
) -> list[Tensor]:
    """Covariates of this call, floating.

    :param model: whose names for its arguments hold when one comes by position and later by name
    :raises ProgramError: the function returned something else than one row a slice
    """
    if callable(given):
        value = given(*args, **kwargs)
        if (
            not isinstance(value, Tensor)
            or not value.dim()
            or len(value) not in (plate.size, plate.full_size)
        ):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ProgramError(
                f"the covariates function returned {got}: expected a tensor of shape ({plate.size},) and then columns, one "
                f"row for each slice of plate {plate.name!r}"
            )
        found = [value]
    else:
        held = _by_either_key(dict(tensors_of(args, kwargs)), model)
        missing = [spoken(path) for path in paths if path not in held]
        if missing:
            raise ProgramError(
                f"{missing} was a tensor when the guide was made, which read it as a covariate, and is none now: call model "
                "and guide with the same kinds of arguments, or say covariates=None"
            )
        found = [held[path] for path in paths]
    return [value if value.is_floating_point() else value.to(torch.get_default_dtype()) for value in found]


def _by_either_key(held: dict[Path, Tensor], model: Callable[..., Any]) -> dict[Path, Tensor]:
    """Arguments by position and by name, whichever they were passed by."""
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):  # a callable that does not say
        return held
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in signature.parameters.values() if parameter.kind in kinds]
    other: dict[Any, Any] = dict(enumerate(names)) | {name: i for i, name in enumerate(names)}
    return held | {(other[path[0]], *path[1:]): value for path, value in held.items() if path[0] in other}


def encoded(
    encoder: nn.Module, values: Readings, observed: list[Observed], lead: tuple[Plate, ...]
) -> Tensor:
    """Codes of an encoder of the user's: ``(lead, plate_shape, width)`` for the slices of the outermost plate.

    :raises ProgramError: the encoder returned something else than one code a slice
    """
    outer = observed[0].plates[0]
    around = (*lead, outer)
    sizes = [plate.size for plate in around]
    read = values.for_encoder(observed)

    def merged(value: Tensor, site: Observed) -> Tensor:
        """Slices of the outermost plate first, those of several data sets one after the other."""
        if outer.name not in {plate.name for plate in site.plates}:
            if lead:
                raise ProgramError(
                    f"observed site {site.name!r} is not in plate {outer.name!r}, whose slices the encoder reads: data sets "
                    "side by side leave it no room. Use AutoPosterior without encoder"
                )
            return value
        # Data sets lie left of all plates of the model, not only of this site's.
        depth = max(-plate.dim for plate in site.plates)
        event = value.shape[value.dim() - site.event_dim :]
        batch = value.shape[: value.dim() - site.event_dim]
        batch = (
            batch[: len(lead)] + (1,) * (depth + len(lead) - len(batch)) + batch[max(len(batch) - depth, 0) :]
        )
        value = value.reshape(*batch, *event)
        value = value.movedim(len(lead) + depth + outer.dim, len(lead))
        return value.flatten(0, 1) if lead else value

    if isinstance(read, dict):
        read = {site.name: merged(read[site.name], site) for site in observed}
    else:
        read = merged(read, observed[0])
    code = encoder(read)
    if not isinstance(code, Tensor) or code.dim() != 2 or len(code) != torch.Size(sizes).numel():
        got = tuple(code.shape) if isinstance(code, Tensor) else type(code).__name__
        shape = (
            tuple(read.shape) if isinstance(read, Tensor) else {n: tuple(v.shape) for n, v in read.items()}
        )
        raise ProgramError(
            f"the encoder returned {got} for values of shape {shape}: expected ({torch.Size(sizes).numel()}, width), one code "
            f"for each slice of plate {outer.name!r}"
        )
    return code.reshape(*plate_shape(around), -1)
