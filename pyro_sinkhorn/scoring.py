"""Scoring a pair of traces: densities where they exist, and errors that name the site where they do not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from pyro.util import check_site_shape
from torch import Tensor

from pyro_sinkhorn.distributions.implicit import Implicit
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.explain import Recorder, explained
from pyro_sinkhorn.structure import (
    Site,
    Structure,
    innermost,
    is_data,
    is_latent,
    plates_of,
    present_of,
    sample_sites,
)


def check_guide(guide: Trace, structure: Structure, enumerated: Collection[str] = ()) -> None:
    """A guide must produce every latent, locals with a gradient and globals with a density.

    :param enumerated: sites whose states are all laid out, which need no gradient of their values
    :raises ProgramError: naming the site and the way out
    """
    produced = {name: site for name, site in sample_sites(guide) if is_latent(site)}
    missing = [name for name in structure.latents if name not in produced]
    if missing:
        raise ProgramError(
            f"the guide does not sample the latent sites {missing}; it samples {sorted(produced)}. Every latent of "
            "the model needs a sample statement of the same name in the guide, and must be sampled in every call, whatever "
            "the values of the others"
        )
    unknown = [name for name in produced if name not in structure.latents]
    if unknown:
        raise ProgramError(
            f"the guide samples {unknown}, which are not latents of the model ({sorted(structure.latents)}): rename "
            "them, or mark noise as auxiliary with infer={'is_auxiliary': True}"
        )
    for name in structure.locals:
        fn = produced[name]["fn"]
        if name in enumerated:
            continue
        if _is_discrete(fn) or not produced[name]["value"].is_floating_point():
            raise ProgramError(
                f"guide site {name!r} is a {_kind(fn)}, a discrete latent, whose values pass no gradient: use "
                "TraceEnum_Sinkhorn, which enumerates states (those of vectors through distributions.Finite), or "
                "AutoImplicit(..., discrete='straight_through')"
            )
        if not getattr(fn, "has_rsample", False):
            raise ProgramError(
                f"guide site {name!r} is a {_kind(fn)}, which is sampled without a gradient "
                "(has_rsample is False): use Implicit, Delta or a reparametrised distribution"
            )
    for name in structure.globals:
        if _is_implicit(produced[name]["fn"]):
            raise ProgramError(
                f"global latent {name!r} has an Implicit guide: there is one of it, so it is scored with a density and "
                "never matched to its prior. Give it a guide with a density, such as Normal or Delta (AutoImplicit "
                "does); latents inside the data plate may be Implicit"
            )


def check_supports(
    model: Trace, structure: Structure, enumerated: Mapping[str, Tensor] = MappingProxyType({})
) -> None:
    """Guide values of local latents must lie in the prior's support (only under Pyro's validation).

    :param enumerated: log probabilities of sites whose states are all laid out: those of probability zero may lie anywhere
    :raises ProgramError: naming the site and its support
    """
    if not is_validation_enabled():
        return
    for name in structure.locals:
        site = model.nodes[name]
        value, support = site["value"], site["fn"].support
        inside = support.check(renormalised(value.detach(), support))
        if name in enumerated:
            inside = inside | enumerated[name].isneginf()
        if not bool(inside.all()):
            raise ProgramError(
                f"latent site {name!r}: {int((~inside).sum())} of {inside.numel()} guide values of shape "
                f"{tuple(value.shape)} lie outside the prior's support, {support}: transform them, or let AutoImplicit "
                "choose the head"
            )


def check_inputs(read: dict[str, Tensor], model: Trace) -> None:
    """What the encoder read must be what the model observed.

    :param read: values of the observed sites that the guide read, by name
    :raises ProgramError: they differ
    """
    for name, value in read.items():
        if name not in model.nodes or not is_data(model.nodes[name]):
            raise ProgramError(
                f"observed site {name!r}, which AutoImplicit read, was not observed when the model ran with the guide's "
                "latents: which sites are observed must not depend on latents"
            )
        observed = model.nodes[name]["value"]
        if value is observed:
            continue
        if value.shape != observed.shape or bool(
            ((value != observed) & ~(value.isnan() & observed.isnan())).any()
        ):
            raise ProgramError(
                f"observed site {name!r}: AutoImplicit read a value of shape {tuple(value.shape)} off the model's "
                f"arguments, where an earlier call had the data, but the model now observes another one, of shape "
                f"{tuple(observed.shape)}: say what to read with AutoImplicit(model, encoder_input=...)"
            )


def log_density(
    trace: Trace,
    names: set[str],
    owner: str,
    total_of: Callable[[str, Site], Tensor] | None = None,
    max_plate_nesting: float = float("inf"),
) -> Tensor:
    """Sum of scaled and masked log densities of some sites.

    :param owner: ``"model"`` or ``"guide"``, for errors
    :param total_of: how one scored site adds up; by default a plain sum
    :param max_plate_nesting: dimensions further left are enumerated states
    :raises ProgramError: a value that its distribution cannot score, or a missing plate
    """
    total: Tensor | float = 0.0
    for name, site in sample_sites(trace):
        if name not in names:
            continue
        if "log_prob_sum" not in site:
            _check_dtype(name, site)
            try:
                _fill_masked(site)
                trace.compute_log_prob(lambda n, _site, wanted=name: n == wanted)
            except (ValueError, RuntimeError, IndexError, TypeError, NotImplementedError) as error:
                raise ProgramError(_unscored(name, site, owner, error)) from error
            if is_validation_enabled():
                check_site_shape(site, max_plate_nesting)  # type: ignore[arg-type]
        total = total + (site["log_prob_sum"] if total_of is None else total_of(name, site))
    return torch.as_tensor(total)


def scored_sites(trace: Trace) -> set[str]:
    """Observed sites of the model, ``pyro.factor`` included; all add to the likelihood."""
    return {name for name, site in sample_sites(trace) if site["is_observed"]}


def run_guide(guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Trace the guide; errors as in :mod:`pyro_sinkhorn.explain`."""
    with explained("guide", args, kwargs) as recorder:
        guide(*args, **kwargs)
    return recorder.trace


def run_scored(model: Any, guide: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Trace the model with the guide's latents; errors as in :mod:`pyro_sinkhorn.explain`.

    :raises ProgramError: the guide's value of a site has another shape than the model's
    """
    with explained("model", args, kwargs, _CheckShapes(guide)) as recorder:
        poutine.replay(model, trace=guide)(*args, **kwargs)
    return recorder.trace


class _CheckShapes(Recorder):
    """Refuse a guide's value of the wrong shape at its site, before it breaks a network further down."""

    def __init__(self, guide: Trace) -> None:
        super().__init__()
        self.guide = guide

    def _pyro_post_sample(self, msg: Any) -> None:
        super()._pyro_post_sample(msg)
        if msg["name"] in self.guide.nodes and not (msg["is_observed"] or isinstance(msg["fn"], _Subsample)):
            check_latent_shape(msg, msg["value"])


def check_latent_shape(site: Site, value: Tensor) -> None:
    """A guide's value of a latent must have the shape of the model's site.

    :raises ProgramError: naming the site
    """
    name, fn = site["name"], site["fn"]
    shape, event_dim = tuple(value.shape), len(fn.event_shape)
    if shape[max(len(shape) - event_dim, 0) :] != tuple(fn.event_shape):
        raise ProgramError(
            f"latent site {name!r}: the guide gives values of shape {shape}, but the prior, a {_kind(fn)}, has the "
            f"event shape {tuple(fn.event_shape)}: the last {event_dim} dimensions must be equal to it"
        )
    for plate in plates_of(site):
        axis = len(shape) - event_dim + plate.dim
        if axis >= 0 and shape[axis] not in (1, plate.size):
            raise ProgramError(
                f"latent site {name!r}: the guide gives values of shape {shape}, of which plate {plate.name!r} of the "
                f"model holds {shape[axis]} slices, not its {plate.size}"
            )


def check_drawn_shapes(trace: Trace, seen: Trace) -> None:
    """Draws of the wrong shape would be broadcast against the truth.

    :raises ProgramError: naming the site
    """
    for name, site in sample_sites(trace):
        if is_latent(site) and name in seen.nodes:
            check_latent_shape(seen.nodes[name], site["value"])
            shape, wanted = site["value"].shape, seen.nodes[name]["value"].shape
            if shape[: max(len(shape) - len(wanted), 0)].numel() > 1:
                raise ProgramError(
                    f"latent site {name!r}: the guide gives values of shape {tuple(shape)}, the model's have {tuple(wanted)}: "
                    "too many dimensions; say event_dim of Implicit and the guide's plates as in the model"
                )


def number_of_data(model: Trace, structure: Structure) -> float:
    """Data that the trace stands for: slices of the outermost data plate times the scale of its observed site."""
    plate = structure.data_plates[0]
    site = next(model.nodes[name] for name in structure.data if plate in plates_of(model.nodes[name]))
    scale = site["scale"]
    number = float(scale.double().mean()) if isinstance(scale, Tensor) else float(scale)
    return plate.size * number or 1.0


def blame(model: Trace, guide: Trace, structure: Structure) -> NonFiniteError | None:
    """Find where a non-finite loss came from, looking at causes before effects: data, latents, decoder, density."""
    for name in structure.data:
        value, finite = model.nodes[name]["value"], _finite_or_masked(model.nodes[name])
        if value.is_floating_point() and not bool(finite.all()):
            bad = (~finite).reshape(len(value), -1).any(-1) if value.dim() else ~finite
            return NonFiniteError(
                f"observed site {name!r}: the data of shape {tuple(value.shape)} are NaN or infinite in "
                f"{int(bad.sum())} rows (first: {int(bad.nonzero()[0])} of this batch); remove or mask them"
            )
    for name in structure.latents:
        value = guide.nodes[name]["value"]
        if not bool(value.isfinite().all()):
            return NonFiniteError(
                f"latent site {name!r}: the guide produced NaN or infinite values (shape {tuple(value.shape)}); look "
                "for a diverged encoder (lower the learning rate, clip gradients)"
            )
    for name, site in sample_sites(model):
        for attribute in getattr(innermost(site["fn"]), "arg_constraints", {}):
            parameter = innermost(site["fn"]).__dict__.get(attribute)
            if isinstance(parameter, Tensor) and not bool(parameter.isfinite().all()):
                return NonFiniteError(
                    f"site {name!r}: {attribute} of its {_kind(site['fn'])}, shape "
                    f"{tuple(parameter.shape)}, is NaN or infinite though its inputs are finite: the network that "
                    "makes it (the decoder) diverged"
                )
    for trace, owner in ((model, "model"), (guide, "guide")):
        for name, site in sample_sites(trace):
            if "log_prob_sum" in site and not bool(torch.as_tensor(site["log_prob_sum"]).isfinite().all()):
                return NonFiniteError(f"site {name!r} of the {owner}: its log density is NaN or infinite")
    return None


def _fill_masked(site: Site) -> None:
    """Put a draw in place of masked data outside the support: NaN or -1 in padding, whose density would poison gradients."""
    present = present_of(site)
    if present is None or not site["is_observed"] or bool(present.all()):
        return
    fn, value = site["fn"], site["value"]
    inside = fn.support.check(value)
    wrong = ~(inside | present)
    if bool(wrong.any()):
        with torch.no_grad():
            draw = fn.sample().to(value)
        site["value"] = torch.where(wrong.reshape(*wrong.shape, *[1] * len(fn.event_shape)), draw, value)


def _finite_or_masked(site: Site) -> Tensor:
    """Which entries of an observed value are numbers, or do not count."""
    finite, present = site["value"].isfinite(), present_of(site)
    if present is None:
        return finite
    return finite | ~present.reshape(*present.shape, *[1] * len(site["fn"].event_shape))


def _check_dtype(name: str, site: Site) -> None:
    value, fn = site["value"], site["fn"]
    if not (is_data(site) and isinstance(value, Tensor)) or value.is_floating_point():
        return
    if not getattr(fn.support, "is_discrete", False) or _kind(fn) in ("Bernoulli", "ContinuousBernoulli"):
        raise ProgramError(
            f"observed site {name!r}: the data are {value.dtype} where {_kind(fn)} needs floating "
            f"points; pass them as x.float() (shape {tuple(value.shape)})"
        )


def _unscored(name: str, site: Site, owner: str, error: Exception) -> str:
    fn, value = site["fn"], site["value"]
    kind = "observed site" if site["is_observed"] else "latent site"
    return (
        f"{kind} {name!r} of the {owner} cannot be scored: its value has shape {tuple(getattr(value, 'shape', ()))} "
        f"and dtype {getattr(value, 'dtype', type(value).__name__)}, its {_kind(fn)} batch shape "
        f"{tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)}. {str(error).partition('Trace Shapes:')[0].strip()}"
    )


def renormalised(value: Tensor, support: Any) -> Tensor:
    """Forgive float32 rounding, which the tolerances of 1e-6 of the simplex and the sphere do not."""
    constraint = support
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    kind = type(constraint).__name__.lower()
    if value.dtype != torch.float64 and ("simplex" in kind or "sphere" in kind):
        value = value.double()
        norm = value.sum(-1, keepdim=True) if "simplex" in kind else value.norm(dim=-1, keepdim=True)
        return torch.where((norm - 1).abs() < 1e-4, value / norm, value)
    return value


def _kind(fn: Any) -> str:
    return type(innermost(fn)).__name__


def _is_discrete(fn: Any) -> bool:
    if getattr(fn, "has_rsample", False):
        return False
    return getattr(fn, "has_enumerate_support", False) or getattr(fn.support, "is_discrete", False)


def _is_implicit(fn: Any) -> bool:
    return isinstance(innermost(fn), Implicit)
