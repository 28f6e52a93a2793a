"""Prior clouds: runs of the model with its local latents free.

Sub-samples and globals are replayed from the trace being scored, so that both clouds speak of the same data and are
conditional on the same globals. Gradients are kept: a graph arises only where a prior parameter or a global learns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.distributed import active
from pyro_sinkhorn.runs import check_appeared, run_model, subsamples
from pyro_sinkhorn.structure import Group, Site, Structure, parameters_of

Model = Callable[..., Any]

#: States of a discrete latent that constant runs go through, at most; others are shown at other calls.
MAX_STATES_SHOWN = 8


def fixed_values(structure: Structure, scored: Trace) -> dict[str, Tensor]:
    """What every auxiliary run shares with a scored trace: its globals and sub-samples."""
    return {name: scored.nodes[name]["value"] for name in structure.globals} | subsamples(scored)


def prior_trace(
    model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], structure: Structure, scored: Trace
) -> Trace:
    """One prior cloud for every group: the model run up to its last local latent.

    :raises ProgramError: the prior cannot be sampled, or a latent of the scored trace did not appear
    """
    values = fixed_values(structure, scored)
    trace = run_model(model, args, kwargs, values=values, stop_after=structure.locals, grad=True)
    check_appeared(trace, structure.locals, known=structure.globals)
    return trace


def constant_traces(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    structure: Structure,
    scored: Trace,
    prior: Trace,
) -> list[Trace]:
    """Runs of the model with every local latent equal in all slices: what then varies comes from covariates.

    One run shows it where latents are continuous. A discrete one may switch the covariates off, so the runs go through
    the states that the prior run drew of it, ``MAX_STATES_SHOWN`` at most.
    """
    fixed = fixed_values(structure, scored)
    shown: dict[str, list[Tensor]] = {}
    for group in structure.groups:
        for name in group.sites:
            shown[name] = _shown(prior.nodes[name], group)
    ranks = active()
    if ranks is not None:  # else one rank's slices would seem unlike another's
        shown = ranks.agreed(
            {name: [value.cpu() for value in found] for name, found in shown.items()},
            "drawing latents to show",
        )
    runs = []
    for i in range(max(map(len, shown.values()))):
        values = dict(fixed)
        for name, found in shown.items():
            value = prior.nodes[name]["value"]
            values[name] = found[i % len(found)].to(value).expand(value.shape).contiguous()
        runs.append(run_model(model, args, kwargs, values=values, stop_after=structure.locals))
    return runs


def _shown(site: Site, group: Group) -> list[Tensor]:
    """Values for all slices of a latent: the first slice's, or states of a discrete one, in random order."""
    value = site["value"].detach()
    event_dim = len(site["fn"].event_shape)
    if getattr(site["fn"].support, "is_discrete", False):
        states = value.flatten(0, value.dim() - event_dim - 1) if value.dim() > event_dim else value[None]
        states = states.unique(dim=0)
        chosen = states[torch.randperm(len(states), device=states.device)[:MAX_STATES_SHOWN]]
        return list(chosen)
    for plate in group.plates:
        axis = plate.dim - event_dim
        if value.dim() >= -axis:
            value = value.narrow(axis, 0, 1)
    return [value]


def warn_if_gradient_lost(prior: Trace, structure: Structure, warned: set[str]) -> None:
    """Warn, once a site, of a prior whose parameters learn but whose sampler passes no gradient to them."""
    for name in structure.locals:
        fn = prior.nodes[name]["fn"]
        if name in warned or fn.has_rsample:
            continue
        if any(parameter.requires_grad for parameter, _ in parameters_of(fn)):
            warned.add(name)
            warnings.warn(
                f"the prior of {name!r}, a {type(fn).__name__}, has learnable parameters but samples without "
                "reparametrisation: matching gives them no gradient, so they stay as they are. Reparametrise the "
                "prior (a transform of noise), or fix its parameters",
                UserWarning,
                stacklevel=2,
            )


def reference_rows(
    draw: Callable[[], Trace], first: Trace, lay_out: Callable[[Trace], Tensor], n_points: int = 512
) -> Tensor:
    """At least ``n_points`` prior points ``(n, e)``, pooled over slices and particles, for units and mean costs."""
    pooled: list[Tensor] = []
    trace = first
    for _ in range(n_points):
        rows = lay_out(trace).detach().flatten(0, 1)
        pooled.append(rows)
        if sum(len(r) for r in pooled) >= n_points:
            break
        with torch.no_grad():
            trace = draw()
    return torch.cat(pooled)
