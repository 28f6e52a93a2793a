"""The structure of a program, read off one trace: which sites are data, local or global, and which belong together.

- A *data plate* is a plate of a scored observed site (never the particle plate).
- A latent inside a data plate is *local*, any other *global*.
- Local latents that share a stack of data plates form one *group*: they are produced and matched jointly, since
  matching site by site loses their dependence.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError

#: Name that :class:`pyro.infer.ELBO` gives to the plate of vectorised particles.
PARTICLE_PLATE = "num_particles_vectorized"

Site = dict[str, Any]


@dataclass(frozen=True)
class Plate:
    """A vectorised plate as one trace saw it: ``size`` slices present, of ``full_size``, at batch dimension ``dim``."""

    name: str
    dim: int
    size: int
    full_size: int


@dataclass(frozen=True)
class Group:
    """Local latents that share their data plates; ``plates`` runs from the outermost, whose slices are the units."""

    sites: tuple[str, ...]
    plates: tuple[Plate, ...]

    @property
    def name(self) -> str:
        """Site names joined by commas: how tables and errors call the group."""
        return ", ".join(self.sites)


@dataclass(frozen=True)
class Structure:
    """What :func:`structure_of` finds in a trace of the model."""

    data: tuple[str, ...]
    data_plates: tuple[Plate, ...]
    groups: tuple[Group, ...]
    globals: tuple[str, ...]

    @property
    def locals(self) -> tuple[str, ...]:
        """Names of all local latents."""
        return tuple(name for group in self.groups for name in group.sites)

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of all latents."""
        return self.globals + self.locals


def carried_along(group: Group, groups: tuple[Group, ...]) -> tuple[str, ...]:
    """Sites of the groups around a group, whose plates are some of its own: it is compared together with them."""
    names = {plate.name for plate in group.plates}
    return tuple(
        name for other in groups if {plate.name for plate in other.plates} < names for name in other.sites
    )


def refuse_inner_plates(name: str, inner: Iterable[str]) -> None:
    """A discrete latent may lie in data plates alone.

    :param inner: its other plates
    :raises ProgramError: there are some
    """
    found = sorted(inner)
    if found:
        raise ProgramError(
            f"discrete latent {name!r} is in the plates {found}, which hold no observed site: they lie inside a datum, "
            "which depends on all of its states jointly. Declare it as one site with an event dimension (.to_event), "
            "whose joint states are enumerated"
        )


def sample_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Sample statements of a trace, the sub-sampling of plates left out."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample):
            yield name, site


def is_data(site: Site) -> bool:
    """Whether a site carries observed data: not a ``pyro.deterministic``, a ``pyro.factor`` or a reparametrised site."""
    if not site["is_observed"] or site["infer"].get("_deterministic"):
        return False
    return not isinstance(innermost(site["fn"]), dist.Unit) and not _is_computed(site)


def _is_computed(site: Site) -> bool:
    """Whether an observed site is a point at its own value: ``poutine.reparam`` makes a site into one."""
    fn, value = innermost(site["fn"]), site["value"]
    return isinstance(fn, dist.Delta) and isinstance(value, Tensor) and fn.v.data_ptr() == value.data_ptr()


def is_latent(site: Site) -> bool:
    """Whether a site is one to infer: not observed, not noise."""
    return not site["is_observed"] and not site["infer"].get("is_auxiliary", False)


def plates_of(site: Site) -> tuple[Plate, ...]:
    """Vectorised plates around a site, outermost first, the particle plate left out."""
    return tuple(
        Plate(frame.name, frame.dim, frame.size, frame.full_size or frame.size)
        for frame in site["cond_indep_stack"]
        if frame.vectorized and frame.name != PARTICLE_PLATE
    )


def check_tensors(trace: Trace, structure: Structure) -> None:
    """Observed values must be tensors.

    :raises ProgramError: naming the site
    """
    for name in structure.data:
        value, fn = trace.nodes[name]["value"], trace.nodes[name]["fn"]
        if not isinstance(value, Tensor):
            raise ProgramError(
                f"observed site {name!r}: the data are a {type(value).__name__}, expected a tensor of shape "
                f"{tuple(fn.batch_shape + fn.event_shape)}: convert them, for example by torch.tensor"
            )


def check_shapes(trace: Trace, structure: Structure) -> None:
    """Observed values must have the shape of their sites; who scores no density would not notice.

    :raises ProgramError: naming the site
    """
    check_tensors(trace, structure)
    for name in structure.data:
        fn = trace.nodes[name]["fn"]
        batch, event = tuple(fn.batch_shape), tuple(fn.event_shape)
        shape = tuple(trace.nodes[name]["value"].shape)
        fits = len(shape) <= len(batch + event) and all(
            mine in (1, size) for mine, size in zip(shape[::-1], (batch + event)[::-1], strict=False)
        )
        if not fits or shape[max(len(shape) - len(event), 0) :] != event:
            raise ProgramError(
                f"observed site {name!r}: data of shape {shape}, expected {batch + event}: with these arguments its "
                f"{type(innermost(fn)).__name__} has batch shape {batch} and event shape {event}. Several numbers a datum are "
                "declared by .to_event, or by a plate inside that of the data"
            )


def nesting_of(trace: Trace) -> int:
    """How many dimensions the plates of a trace take."""
    dims = [f.dim for _, site in sample_sites(trace) for f in site["cond_indep_stack"] if f.vectorized]
    return -min(dims, default=0)


def present_of(site: Site) -> Tensor | None:
    """Where a site counts, by the masks of handlers and of ``fn.mask``: booleans that broadcast with its batch; None is all."""
    present: Tensor | None = None
    for mask in masks_of(site):
        present = mask if present is None else present & mask
    return present


def masks_of(site: Site) -> Iterator[Tensor]:
    """Masks of handlers and of ``fn.mask``, as booleans; a mask of a plain True is none.

    One inside ``to_event`` (``fn.mask(m).to_event(1)``) has dimensions of the event: the event counts where any of it does.
    """
    masks, fn, inside = [(site["mask"], 0)], site["fn"], 0
    while hasattr(fn, "base_dist"):
        masks.append((getattr(fn, "_mask", None), inside))
        inside += getattr(fn, "reinterpreted_batch_ndims", 0)
        fn = fn.base_dist
    for mask, inside in masks:
        if isinstance(mask, Tensor):
            present = mask if mask.dtype == torch.bool else mask != 0
            for _ in range(min(inside, present.dim())):
                present = present.any(-1)
            yield present
        elif mask is not None and not mask:
            yield torch.zeros((), dtype=torch.bool, device=site["value"].device)


def structure_of(trace: Trace) -> Structure:
    """Read the structure off a trace of the model.

    :raises ProgramError: no observed site; observed sites outside every vectorised plate; a local latent whose prior is
        no law, or has been turned into a density
    """
    sites = dict(sample_sites(trace))
    data = tuple(name for name, site in sites.items() if is_data(site))
    latents = [name for name, site in sites.items() if is_latent(site)]
    if not data:
        raise ProgramError(
            f"the model observes nothing: none of its sample sites {list(sites)} has obs=. Condition one on data, "
            "for example pyro.sample('x', likelihood, obs=x), or wrap the model in pyro.condition"
        )
    for name in data:
        sequential = [frame.name for frame in sites[name]["cond_indep_stack"] if not frame.vectorized]
        if sequential and not plates_of(sites[name]):
            raise ProgramError(
                f"observed site {name!r} is in the sequential plate {sequential[0]!r} (for i in pyro.plate): latents "
                f"are compared as clouds, so write it vectorised, with pyro.plate({sequential[0]!r}, size). A sequential plate "
                "may stand around or inside a vectorised one that holds the data"
            )
    data_plates = {plate.name: plate for name in data for plate in plates_of(sites[name])}
    if not data_plates:
        raise ProgramError(
            f"observed sites {list(data)} are in no plate, so nothing says which of their dimensions holds the data: "
            f"put their sample statements in `with pyro.plate('data', len(x)):`"
        )
    members: dict[tuple[Plate, ...], list[str]] = {}
    global_sites = []
    for name in latents:
        stack = tuple(plate for plate in plates_of(sites[name]) if plate.name in data_plates)
        if stack:
            _check_local(name, sites[name])
            members.setdefault(stack, []).append(name)
        else:
            global_sites.append(name)
    for name, site in sites.items():
        if site["is_observed"] and any(plate.name in data_plates for plate in plates_of(site)):
            _check_computed(name, site)
    # Coarse groups first: a nested group may carry their latents along.
    stacks = sorted(members, key=len)
    groups = tuple(Group(tuple(members[stack]), stack) for stack in stacks)
    return Structure(data, tuple(data_plates.values()), groups, tuple(global_sites))


def _check_local(name: str, site: Site) -> None:
    if isinstance(innermost(site["fn"]), dist.ImproperUniform):
        raise ProgramError(
            f"latent site {name!r}: its ImproperUniform is no law that could be drawn from, so there is nothing to compare "
            "the latents with. Give it a proper prior; outside the data plates, where densities are used, it may stay"
        )


def _check_computed(name: str, site: Site) -> None:
    fn = innermost(site["fn"])
    if isinstance(fn, dist.Delta) and _is_computed(site) and bool((fn.log_density != 0).any()):
        raise ProgramError(
            f"site {name!r} was reparametrised by a density (as NeuTraReparam, StructuredReparam, SplitReparam and "
            "ConjugateReparam do): what is left to sample is not the prior, so no prior cloud can be drawn. Leave it out of "
            "the reparam, or use one that only rewrites how it is drawn, such as LocScaleReparam or TransformReparam"
        )


def parameters_of(fn: Any) -> Iterator[tuple[Tensor, int]]:
    """Parameters of a distribution, each with how many of its last dimensions are not batch dimensions of ``fn``.

    Transforms, base distributions and mixture components are included. Attributes that torch computes lazily are
    left out: they repeat others.
    """
    if hasattr(fn, "base_dist"):
        reinterpreted = getattr(fn, "reinterpreted_batch_ndims", 0)
        yield from ((parameter, dims + reinterpreted) for parameter, dims in parameters_of(fn.base_dist))
        for transform in getattr(fn, "transforms", ()):
            for attribute in ("loc", "scale"):
                parameter = getattr(transform, attribute, None)
                if isinstance(parameter, Tensor):
                    yield parameter, max(transform.domain.event_dim, len(fn.event_shape))
        return
    if hasattr(fn, "mixture_distribution"):
        yield from parameters_of(fn.mixture_distribution)
        yield from ((parameter, dims + 1) for parameter, dims in parameters_of(fn.component_distribution))
        return
    for attribute, constraint in getattr(fn, "arg_constraints", {}).items():
        # Beta keeps its concentrations inside a Dirichlet and shows them as properties.
        shown = isinstance(inspect.getattr_static(type(fn), attribute, None), property)
        parameter = getattr(fn, attribute) if shown else fn.__dict__.get(attribute)
        if isinstance(parameter, Tensor):
            declared = 0 if constraint is constraints.dependent else getattr(constraint, "event_dim", 0)
            yield parameter, max(declared, parameter.dim() - len(fn.batch_shape))


def innermost(fn: Any) -> Any:
    """The distribution under Independent, Masked and Expanded, whose type says what it is."""
    while hasattr(fn, "base_dist") and not hasattr(fn, "transforms"):
        fn = fn.base_dist
    return fn
