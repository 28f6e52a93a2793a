"""Both joints of one call: data with the guide's latents, and a simulation of both.

The program runs once in full, with latents and data free: that is the generative joint. For the other only the values
differ, so its trace is the same run with the data and the guide's latents put in; the decoder does not run on these.
The prior of the latents does, since where its support depends on other latents so does how a value is compared.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.losses.simulation import Simulation, simulation_of, why_no_gradient
from pyro_sinkhorn.runs import Resample, check_appeared, run_model, subsamples
from pyro_sinkhorn.scoring import blame, check_guide, check_latent_shape, check_supports
from pyro_sinkhorn.structure import (
    Group,
    Plate,
    Structure,
    innermost,
    is_latent,
    parameters_of,
    plates_of,
    sample_sites,
)


def without_latents(guide: Trace) -> Trace:
    """The sub-samples of a guide alone: what a free simulation shares with it."""
    kept = Trace()
    for name, node in guide.nodes.items():
        if node["type"] == "sample" and isinstance(node["fn"], _Subsample):
            kept.add_node(name, **{key: value for key, value in node.items() if key != "name"})
    return kept


def joint_call(model: Any, simulated: Trace, guide: Trace, args: Any, kwargs: Any) -> Simulation:
    """Put a run of :func:`~pyro_sinkhorn.losses.simulation.run_simulated` beside the data and the guide's latents.

    ``observed`` of the result holds both; its ``groups`` are of all sites that share their data plates.

    :raises ProgramError: model, guide and data do not fit together, naming the site
    :raises NonFiniteError: data, simulated data or the guide's latents are NaN or infinite
    """
    call = simulation_of(model, simulated, guide, args, kwargs, _check_guide)
    structure, observed = call.structure, call.observed
    values = {name: guide.nodes[name]["value"] for name in structure.locals}
    for name, value in values.items():
        check_latent_shape(simulated.nodes[name], value)
    if not all(bool(value.isfinite().all()) for value in values.values()):
        raise blame(observed, guide, structure) or AssertionError("a latent is not finite")
    below = run_model(
        model, args, kwargs, values=values | subsamples(simulated), stop_after=structure.locals, grad=True
    )
    check_appeared(below, structure.locals)
    for name in structure.locals:
        observed.nodes[name] = below.nodes[name]
    check_supports(observed, structure)
    return dataclasses.replace(call, groups=joint_groups(structure, observed))


def prior_of(call: Simulation) -> Trace:
    """Free latents of a fresh run, which is left after the last of them."""
    return run_model(
        Resample()(call.model),
        call.args,
        call.kwargs,
        values=subsamples(call.simulated),
        stop_after=call.structure.locals,
    )


def warn_if_nothing_learned(call: Simulation, warned: set[str]) -> None:
    """Say, once each, which parameters of the program the simulated data pass no gradient to.

    A program without parameters is a legitimate one: then the guide alone learns.
    """
    learned = [
        name
        for name, node in call.simulated.nodes.items()
        if node["type"] == "param" and node["value"].requires_grad
    ]
    sites = {name: call.simulated.nodes[name] for name in call.structure.data}
    none_do = not any(site["value"].requires_grad for site in sites.values())
    for name, site in sites.items():
        if not learned or site["value"].requires_grad or f"gradient of {name}" in warned:
            continue
        lost = not getattr(site["fn"], "has_rsample", False) and any(
            parameter.requires_grad for parameter, _ in parameters_of(site["fn"])
        )
        if not (lost or none_do):
            continue
        warned.add(f"gradient of {name}")
        kind = type(innermost(site["fn"])).__name__
        warnings.warn(
            f"observed site {name!r}: the simulated data ({kind}, shape {tuple(site['value'].shape)}) carry no gradient, so "
            f"of the parameters {learned} those they depend on learn nothing by them; the guide does. The cause: "
            f"{why_no_gradient(call, name)}. To learn them, write the simulator as torch functions of its parameters and of "
            "noise that does not depend on them (rsample, reparametrised or relaxed distributions); if they are to stay "
            "as they are, do not register them with Pyro (requires_grad_(False)). This is said once",
            UserWarning,
            stacklevel=2,
        )


def _check_guide(guide: Trace, structure: Structure) -> None:
    """Every latent is a local one, produced by the guide with a gradient."""
    if structure.globals:
        raise ProgramError(
            f"latent sites {list(structure.globals)} are outside every data plate, and this loss was first called on a program "
            "that had none: give this program a loss of its own"
        )
    if not structure.locals:
        raise ProgramError(
            "the model has no latent site in its data plates, so the two joints are laws of the data alone: use "
            "Trace_DataSinkhorn, which compares these and needs no guide"
        )
    refuse_discrete(guide, structure.locals)
    check_guide(guide, structure)


def refuse_discrete(guide: Trace, latents: tuple[str, ...]) -> None:
    """A cloud of states teaches a guide nothing.

    :raises ProgramError: naming the first of these latents that the guide draws so
    """
    for name, site in sample_sites(guide):
        discrete = getattr(site["fn"].support, "is_discrete", False) and not site["fn"].has_rsample
        if name in latents and is_latent(site) and (discrete or not _is_floating(site)):
            raise ProgramError(
                f"guide site {name!r} is a {type(innermost(site['fn'])).__name__}, a discrete latent: a cloud of its states "
                "passes no gradient to the guide. Use Trace_EnergyScore, whose guide scores them, or "
                "AutoImplicit(..., discrete='straight_through') with its biased gradient"
            )


def _is_floating(site: Any) -> bool:
    return isinstance(site["value"], torch.Tensor) and site["value"].is_floating_point()


def joint_groups(structure: Structure, observed: Trace) -> tuple[Group, ...]:
    """Latents and observed sites by the data plates they share, coarse ones first."""
    members: dict[tuple[Plate, ...], list[str]] = {g.plates: list(g.sites) for g in structure.groups}
    for name in structure.data:
        members.setdefault(plates_of(observed.nodes[name]), []).append(name)
    return tuple(Group(tuple(members[stack]), stack) for stack in sorted(members, key=len))
