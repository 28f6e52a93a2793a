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

from pyro_sinkhorn.runs import check_appeared, run_model, subsamples
from pyro_sinkhorn.structure import Structure, parameters_of

Model = Callable[..., Any]


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


def constant_trace(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    structure: Structure,
    scored: Trace,
    prior: Trace,
) -> Trace:
    """The model run with every local latent equal in all slices: what then varies comes from covariates."""
    values = fixed_values(structure, scored)
    for group in structure.groups:
        for name in group.sites:
            site = prior.nodes[name]
            value = site["value"].detach()
            event_dim = len(site["fn"].event_shape)
            first = value
            for plate in group.plates:
                axis = plate.dim - event_dim
                if value.dim() >= -axis:
                    first = first.narrow(axis, 0, 1)
            values[name] = first.expand(value.shape).contiguous()
    return run_model(model, args, kwargs, values=values, stop_after=structure.locals)


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
