"""What a program needs so that chains can move in its density: densities, continuous latents, all of the data, good draws."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.distributions import Implicit
from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.structure import Site, innermost, plates_of


def check_plates(trace: Trace) -> None:
    """All data must be there: the density of a sub-sample is only an estimate.

    :raises ProgramError: naming the plate that is sub-sampled
    """
    for name, site in trace.nodes.items():
        for plate in plates_of(site) if site["type"] == "sample" else ():
            if plate.size < plate.full_size:
                raise ProgramError(
                    f"plate {plate.name!r} holds {plate.size} of {plate.full_size} slices (seen at site {name!r}): the density "
                    "of a sub-sample changes with the sample, and scaled up it is not the posterior's. Refine with the whole "
                    "data, or with a model of the part: pyro.plate(name, len(x)) without subsample_size"
                )


def check_site(name: str, site: Site) -> None:
    """A site must have a density in all of its dimensions, and a latent one that is smooth.

    :raises ProgramError: naming the site
    """
    fn, kind = site["fn"], type(innermost(site["fn"])).__name__
    what = f"{'observed' if site['is_observed'] else 'latent'} site {name!r}"
    shapes = f"batch shape {tuple(fn.batch_shape)}, event shape {tuple(fn.event_shape)}"
    if isinstance(innermost(fn), Implicit):
        raise ProgramError(
            f"{what} is Implicit ({shapes}): it can be drawn from but has no density, and refinement needs the density of "
            "every site to know which moves to accept. Use the guide's draws as they are, or give the site a distribution "
            "with a density"
        )
    covered = {plate.dim for plate in plates_of(site)}
    bare = [i - len(fn.batch_shape) for i, size in enumerate(fn.batch_shape) if size > 1]
    bare = [dim for dim in bare if dim not in covered]
    if bare:
        raise ProgramError(
            f"{what}, a {kind} ({shapes}): its batch dimension {bare[0]} is in no plate. Put it in a plate, or make it part of "
            "the event with .to_event(1)"
        )
    if site["is_observed"]:
        return
    if isinstance(innermost(fn), dist.Delta):
        raise ProgramError(
            f"{what} is a Delta, a point: there is nothing to refine. Write it as pyro.deterministic"
        )
    if not site["value"].is_floating_point() or fn.has_enumerate_support or fn.support.is_discrete:
        raise ProgramError(
            f"{what} is discrete, a {kind} ({shapes}): its density has no gradient to follow, and held fixed it would keep the "
            "error of its draw. Sum it out in the likelihood (MixtureSameFamily), or use the guide's draws as they are"
        )
    if _masked_in_event(fn):
        raise ProgramError(
            f"{what}: the mask of its {kind} lies inside the event ({shapes}), so that some coordinates of a draw have no "
            "density. Mask whole events, or make these dimensions a plate"
        )


def check_draws(latents: dict[str, Site], draws: Any) -> int:
    """Draws for every latent, in the shapes of ``Predictive``; returns their number.

    :raises ProgramError: naming the site
    """
    if not latents:
        raise ProgramError("the model has no latent sites, so there is nothing to refine")
    if not isinstance(draws, dict):
        raise ProgramError(
            f"draws is a {type(draws).__name__}: expected a dictionary {{site: (num_samples, *plates, *event)}}, as encode() "
            "and pyro.infer.Predictive return it"
        )
    missing, unknown = [n for n in latents if n not in draws], [n for n in draws if n not in latents]
    if missing or unknown:
        raise ProgramError(
            f"draws hold {sorted(draws)}, but the latent sites of the model are {sorted(latents)}: "
            + (f"{missing} are missing" if missing else f"{unknown} are no latents; leave them out")
            + ". Every latent needs a starting value, and nothing else is moved"
        )
    counts = {}
    for name, site in latents.items():
        value, fn = draws[name], site["fn"]
        expected = (*fn.batch_shape, *fn.event_shape)
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        if not fits(value, fn):
            given = type(value).__name__ if shape is None else f"shape {shape}"
            raise ProgramError(
                f"latent site {name!r}: draws of {given}, expected (num_samples, {', '.join(map(str, expected))}): the site "
                f"has batch shape {tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)} with these arguments"
            )
        counts[name] = len(value)
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ProgramError(f"draws must have one number of samples of at least 1, got {counts}")
    return next(iter(counts.values()))


def fits(value: Any, fn: Any) -> bool:
    """Whether draws have the shape of a site, with dimensions of size 1 where ``Predictive`` puts them."""
    expected = (*fn.batch_shape, *fn.event_shape)
    padding = value.dim() - 1 - len(expected) if isinstance(value, Tensor) else -1
    return padding >= 0 and tuple(value.shape[1:]) == (*[1] * padding, *expected)


def _masked_in_event(fn: Any) -> bool:
    inside = 0
    while hasattr(fn, "base_dist"):
        mask = getattr(fn, "_mask", None)
        if inside and mask is not None and not (isinstance(mask, bool) and mask):
            return True
        inside += getattr(fn, "reinterpreted_batch_ndims", 0)
        fn = fn.base_dist
    return False
