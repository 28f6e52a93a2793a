"""A guide's latents for simulated data sets, one draw each, with their gradients: what a joint of data sets is made of.

The guide runs free: what it draws below a global is drawn below its own. An :class:`~pyro_sinkhorn.AutoPosterior` sees
all data sets side by side in a plate where the model can run in one; other guides, and models that cannot, are run
data set by data set, with the simulated values in place of the data among the arguments.
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.explain import bad_rows
from pyro_sinkhorn.guide.lazy import LazyGuide
from pyro_sinkhorn.guide.observed import Readings, find_observed, read_observed
from pyro_sinkhorn.guide.shown import Shown, showing
from pyro_sinkhorn.losses.joint_call import refuse_discrete
from pyro_sinkhorn.losses.pairs import Pairs, substituted
from pyro_sinkhorn.losses.sleep import check_drawn, refuse_plain_globals
from pyro_sinkhorn.scoring import renormalised, run_guide
from pyro_sinkhorn.structure import Structure, innermost, is_latent, sample_sites


def draws_of_data_sets(
    guide: Any, pairs: Pairs, vectorized: bool, seen: Trace, structure: Structure, args: Any, kwargs: Any
) -> Trace:
    """One draw of all latents for each data set, as :func:`data_sets_as_trace` with the simulated data beside them.

    :param vectorized: whether the model can run in a plate of data sets
    :param seen: a plain run of the model on its data
    :raises ProgramError: the guide does not serve the model, naming the site
    :raises NonFiniteError: its draws are NaN or infinite
    """
    refuse_plain_globals(guide, structure)
    observed = find_observed(seen, structure, args, kwargs, dict(pairs.indices))
    lazy = isinstance(guide, LazyGuide)
    if lazy and guide._structure is None:
        with poutine.block(hide_types=["sample"]):
            guide(*args, **kwargs)
    if lazy and vectorized and getattr(guide, "_encoder_input", None) is None:
        present = read_observed(observed, args, kwargs, dict(pairs.indices), lambda: seen).present
        values = {name: pairs.values[name] for name in structure.data}
        plate = pairs.plate
        with (
            showing(guide, Shown(Readings(values, present), plate, pairs.indices)),
            poutine.block(hide_types=["sample"]),
            pyro.plate(plate.name, plate.size, dim=plate.dim),
        ):
            trace = run_guide(guide, args, kwargs)
        _check_sites(trace, structure)
        drawn = {
            name: _shaped(name, trace.nodes[name]["value"], pairs.values[name]) for name in structure.latents
        }
    else:
        paths = {site.name: site.source.path for site in observed}
        apart: list[dict[str, Tensor]] = []
        for i in range(len(pairs)):
            shown_args, shown_kwargs = substituted(paths, pairs, i, args, kwargs)
            with poutine.block(hide_types=["sample"]):
                trace = run_guide(guide, shown_args, shown_kwargs)
            _check_sites(trace, structure)
            apart.append(
                {
                    name: _shaped(name, trace.nodes[name]["value"], pairs.values[name][i])
                    for name in structure.latents
                }
            )
        drawn = {name: torch.stack([one[name] for one in apart]) for name in structure.latents}
    for name, value in drawn.items():
        if not bool(value.isfinite().all()):
            raise NonFiniteError(
                f"latent site {name!r}: the guide produced NaN or infinite values in {bad_rows(value)} of the draws (shape "
                f"{tuple(value.shape)}, data sets first); look for a diverged guide (lower the learning rate, clip gradients)"
            )
        _check_support(
            name, value, seen, "guide values", "transform them, or let AutoPosterior choose the head"
        )
    return data_sets_as_trace(pairs, seen, structure, drawn)


def data_sets_as_trace(
    pairs: Pairs, seen: Trace, structure: Structure, latents: dict[str, Tensor] | None = None
) -> Trace:
    """Simulated data sets as a run of the model in one more plate, from which clouds can be made.

    :param latents: ``(P, *batch, *event)`` in place of those that made the data
    :raises ProgramError: the support of a latent varies with other latents
    """
    plate, found = pairs.plate, Trace()
    frame = CondIndepStackFrame(plate.name, plate.dim, plate.size, 0, plate.size)
    for name in (*structure.latents, *structure.data):
        if name not in pairs.values:
            continue  # a run that was left after the latents
        site, value = seen.nodes[name], pairs.values[name]
        if latents is None and name in structure.latents:
            _check_support(
                name,
                value,
                seen,
                "simulated values",
                "its bounds depend on other latents. Draw it from fixed bounds and rescale: for Uniform(0, b), "
                "u = pyro.sample('u', Uniform(0, 1)) and z = b * u",
            )
        found.nodes[name] = site | {
            "value": (latents or {}).get(name, value),
            "cond_indep_stack": (frame, *site["cond_indep_stack"]),
        }
    return found


def _check_sites(trace: Trace, structure: Structure) -> None:
    refuse_discrete(trace, structure.latents)
    free = {name: (site["fn"], site["value"]) for name, site in sample_sites(trace) if is_latent(site)}
    check_drawn(free, structure.latents)


def _shaped(name: str, value: Tensor, truth: Tensor) -> Tensor:
    """A guide's value in the shape of the simulated one."""
    if value.numel() == truth.numel():
        return value.reshape(truth.shape)
    try:
        return value.expand(truth.shape)
    except RuntimeError:
        raise ProgramError(
            f"latent site {name!r}: the guide produced a value of shape {tuple(value.shape)}, the model one of shape "
            f"{tuple(truth.shape)}: both must have the plates' sizes and then the event's"
        ) from None


def _check_support(name: str, value: Tensor, seen: Trace, what: str, advice: str) -> None:
    """All data sets are laid out by the geometry of one run, whose support must be theirs."""
    site = seen.nodes[name]
    if site["mask"] is not None:
        return  # what is masked out may be anything
    support = site["fn"].support
    inside = support.check(renormalised(value.detach(), support))
    if not bool(inside.all()):
        raise ProgramError(
            f"latent site {name!r}, a {type(innermost(site['fn'])).__name__}: {int((~inside).sum())} of {inside.numel()} "
            f"{what} of shape {tuple(value.shape)}, data sets first, lie outside the support {support}: {advice}"
        )
