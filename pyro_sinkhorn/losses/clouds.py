r"""From traces to point clouds.

A trace holds a value per site, of shape *(particles, plates, event)*; transport wants points. For one group this
module embeds every site (:mod:`pyro_sinkhorn.geometry`), brings it to the prior's unit, concatenates the sites, and
lays the slices of the data plates out as rows: a :class:`Cloud` of shape ``(particles, n, e)``.

Two kinds of columns are appended. A nested group carries the latents of the groups around it. Where the prior varies
along the plate (covariates, observed parents), its parameters are appended, so that slices with unlike priors are
not pooled.

Rows that a mask leaves nothing of are dropped. Where it leaves some sites of a group (a short sequence, a label that is
known), the columns of the others hold one constant in both clouds, so that only what counts is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.distributed import active
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.geometry.registry import geometry_at
from pyro_sinkhorn.losses.states import JointStates
from pyro_sinkhorn.structure import (
    PARTICLE_PLATE,
    Group,
    Plate,
    Site,
    masks_of,
    parameters_of,
    plates_of,
    present_of,
)


@dataclass(frozen=True)
class Cloud:
    """Points of one group: the hand-over between *clouds*, *gather* and *match*.

    points:  ``(particles, n, e)``, in the prior's unit
    units:   ``(n,)``, equal for slices of one datum, which are never separated; None when every point is a unit
    weights: ``(n,)``, relative; None when all are equal
    states:  where the points would be in each of the states that a guide enumerated
    paired:  rows are not exchangeable (they share weights, or units differ in size): split both clouds alike
    """

    points: Tensor
    units: Tensor | None = None
    weights: Tensor | None = None
    states: CloudStates | None = None
    paired: bool = False


@dataclass(frozen=True)
class CloudStates:
    """Every point of a cloud in every joint state of its discrete latents.

    points:        ``(particles, n, s, e)``, detached
    probabilities: ``(particles, n, s)``, of the guide, with a gradient
    """

    points: Tensor
    probabilities: Tensor


def slices(trace: Trace, group: Group) -> tuple[Tensor, float]:
    """Weight of each slice of the group (scale, or 0 if masked), ``(n,)``, and the number of data they stand for."""
    n = math.prod(plate.size for plate in group.plates)
    if all(_scaled_alike(trace.nodes[name]) for name in group.sites):
        scale = min(trace.nodes[name]["scale"] for name in group.sites)
        weight = torch.full((1,), float(scale), device=trace.nodes[group.sites[0]]["value"].device)
        # One number seen n times, which a cloud recognises; its sum as that of any weights.
        return weight.expand(n), float(weight.repeat(n).sum())
    scales, masks = [], []
    for name in group.sites:
        site = trace.nodes[name]
        one = torch.ones((), device=site["value"].device)
        scale, present = torch.as_tensor(site["scale"], device=one.device), present_of(site)
        scales.append(_slice_weights(one * scale, site, group).expand(n))
        masks.append(_slice_weights(one if present is None else present.to(one), site, group).expand(n))
    # A group is matched as one: a slice counts as far as all its sites do. A mask of some of them only hides these.
    total = torch.stack(scales).amin(0) * torch.stack(masks).amax(0)
    return total, float(total.sum())


def _scaled_alike(site: Site) -> bool:
    """Whether all slices of a site count alike: nothing masks them, and their scale is a number."""
    return isinstance(site["scale"], (int, float)) and next(masks_of(site), None) is None


def blanked(laid_out: Tensor, site: Site, plates: tuple[Plate, ...], blank: Tensor | None) -> Tensor:
    """Rows ``(particles, n, ..., e)`` of a site with ``blank``, ``(e,)``, in place of what is masked."""
    counts = None if blank is None else _counts(site, plates)
    if counts is None or blank is None:
        return laid_out
    counts = counts.repeat_interleave(laid_out.shape[-1] // counts.shape[-1], -1)
    counts = counts.reshape(*counts.shape[:2], *[1] * (laid_out.dim() - 3), -1)
    return torch.where(counts, laid_out, blank.to(laid_out))


def is_ragged(trace: Trace, names: Iterable[str], weights: Tensor, group: Group) -> bool:
    """Whether a mask hides some of these sites in slices that count: such slices are no longer exchangeable."""
    found = [_counts(trace.nodes[name], group.plates) for name in names]
    return any(counts is not None and not bool(counts[:, weights > 0].all()) for counts in found)


def _counts(site: Site, plates: tuple[Plate, ...]) -> Tensor | None:
    """Which rows of a site count, ``(particles, n, slices inside the row)``; None if all do."""
    present = present_of(site)
    if present is None or bool(present.all()):
        return None
    own = plates_of(site)
    shape = [1] * max((-plate.dim for plate in own), default=0)
    for plate in own:
        shape[plate.dim] = plate.size
    batch = torch.broadcast_shapes(present.shape, tuple(shape))
    return rows(present.expand(batch).unsqueeze(-1), particles_of(site), plates)


def embedded(
    trace: Trace,
    name: str,
    plates: tuple[Plate, ...],
    columns: Callable[[Tensor], Tensor] | None = None,
    states: JointStates | None = None,
) -> Tensor:
    """Rows ``(particles, n, columns)`` of one site, embedded, in the geometry's own unit.

    :param plates: plates whose slices become rows; a site outside some of them is repeated along those
    :param columns: ``(batch..., *event)`` to ``(batch..., e)``; by default the embedding of the registered geometry
    :param states: joint states that the trace runs through; the rows are then ``(particles, n, states, columns)``
    :raises NonFiniteError: a value is NaN or infinite
    """
    site = trace.nodes[name]
    columns = columns or geometry_at(site).embed
    value = site["value"]
    if not bool(value.isfinite().all()):
        bad = int((~value.isfinite()).sum())
        raise NonFiniteError(
            f"latent site {name!r}: {bad} of {value.numel()} values of shape {tuple(value.shape)} are NaN or infinite"
        )
    if states is None:
        return rows(columns(value), particles_of(site), plates)
    table = columns(states.at_all(value, site["fn"].event_dim)).movedim(0, -2)
    laid_out = rows(table.flatten(-2), particles_of(site), plates).unflatten(-1, (-1, *table.shape[-2:]))
    return laid_out.transpose(2, 3).flatten(-2)


def rows(columns: Tensor, n_particles: int, plates: tuple[Plate, ...]) -> Tensor:
    """Lay ``(batch..., e)`` out as ``(particles, n, e')``: plates of the group become rows, others columns.

    Without plates there is one row.
    """
    depth = max((-plate.dim for plate in plates), default=0)
    batch = tuple(columns.shape[:-1])
    # Everything left of the group's plates is either the particle plate, outermost, or a plate the group lacks.
    batch = (1,) * max(depth - len(batch), 0) + batch
    columns = columns.reshape(*batch, columns.shape[-1])
    axes = [len(batch) + plate.dim for plate in plates]
    for plate, axis in zip(plates, axes, strict=True):
        if batch[axis] not in (1, plate.size):
            raise ProgramError(
                f"plate {plate.name!r} has {plate.size} slices but a value has {batch[axis]} there"
            )
    particle_axis = [0] if n_particles > 1 and batch[0] == n_particles and 0 not in axes else []
    others = [axis for axis in range(len(batch)) if axis not in axes and axis not in particle_axis]
    shape = list(columns.shape)
    for plate, axis in zip(plates, axes, strict=True):
        shape[axis] = plate.size
    columns = columns.expand(shape).permute(*particle_axis, *axes, *others, len(batch))
    lead = n_particles if particle_axis else 1
    return columns.reshape(lead, math.prod(plate.size for plate in plates), -1)


def varying_parameters(constant: Trace, group: Group) -> Tensor | None:
    """Prior parameters that differ between slices although all latents agree, as rows ``(particles, n, p)``.

    :param constant: a run of the model whose local latents have the same value in every slice: what still differs
        along the plates comes from covariates or observed parents
    """
    candidates, vary = [], []
    for name in group.sites:
        site = constant.nodes[name]
        for parameter, dims in parameters_of(site["fn"]):
            batch = parameter.shape[: max(parameter.dim() - dims, 0)]
            strides = parameter.stride()[: len(batch)]
            # A parameter that the plate has expanded holds one number for all slices.
            if all(
                -plate.dim > len(batch) or batch[plate.dim] == 1 or strides[plate.dim] == 0
                for plate in group.plates
            ):
                continue
            columns = parameter.detach().reshape(*batch, -1)
            laid_out = rows(columns, particles_of(site), group.plates)
            spread = laid_out - laid_out[:, :1]
            candidates.append(laid_out)
            vary.append(bool((spread.abs() > 1e-6 * (1 + laid_out.abs())).any()))
    ranks = active()
    if ranks is not None:
        vary = ranks.any_vary(candidates, vary)
    found = [laid_out for laid_out, varies in zip(candidates, vary, strict=True) if varies]
    if not found:
        return None
    particles = max(rows_.shape[0] for rows_ in found)
    return torch.cat([rows_.expand(particles, -1, -1) for rows_ in found], -1)


def make_cloud(points: Tensor, weights: Tensor, group: Group, states: CloudStates | None = None) -> Cloud:
    """Drop rows of weight zero, name the unit of each row, and keep weights only where they differ."""
    units: Tensor | None = None
    if len(group.plates) > 1:
        # The outermost plate's slice: words of one document are not independent of each other.
        inner = math.prod(plate.size for plate in group.plates[1:])
        units = torch.arange(group.plates[0].size, device=points.device).repeat_interleave(inner)
    alike = weights.stride() == (0,)
    keep = weights[:1] > 0 if alike else weights > 0
    if not bool(keep.all()):
        keep = keep.expand(len(weights))
        points, weights = points[:, keep], weights[keep]
        units = None if units is None else units[keep]
        if states is not None:
            states = CloudStates(states.points[:, keep], states.probabilities[:, keep])
    equal = alike or bool((weights == weights[0]).all())
    ragged = units is not None and len(units.unique(return_counts=True)[1].unique()) > 1
    return Cloud(
        points, units, None if equal else weights.to(points.dtype), states, paired=ragged or not equal
    )


def particles_of(site: Site) -> int:
    """How many vectorised particles a site holds."""
    return next((frame.size for frame in site["cond_indep_stack"] if frame.name == PARTICLE_PLATE), 1)


def _slice_weights(weight: Tensor, site: Site, group: Group) -> Tensor:
    """``(n,)`` from a scale or mask that broadcasts with the batch of its site."""
    if weight.dim() == 0:
        return weight.expand(math.prod(plate.size for plate in group.plates))
    laid_out = rows(weight.unsqueeze(-1), particles_of(site), group.plates)
    # Particles share a mask; a mask along a plate inside the datum leaves the datum in as long as anything is.
    return laid_out.amax((0, -1))
