"""Simulated data beside observed data: one run of a model in which every observed site is drawn instead.

A model that writes ``pyro.sample("x", likelihood, obs=x)`` says both what was observed and how to simulate it. Here it
runs with its observed sites free: downstream sites see simulated values, as in the law the program stands for, and
the observed values are kept beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.distributions.implicit import Implicit
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.explain import bad_rows, explained
from pyro_sinkhorn.geometry.elementwise import HalfLine
from pyro_sinkhorn.geometry.registry import base_support, geometry_of
from pyro_sinkhorn.runs import Resample, run_model, subsamples
from pyro_sinkhorn.scoring import renormalised
from pyro_sinkhorn.structure import (
    PARTICLE_PLATE,
    Group,
    Site,
    Structure,
    innermost,
    is_latent,
    parameters_of,
    plates_of,
    present_of,
    sample_sites,
    structure_of,
)


@dataclass(frozen=True)
class Simulation:
    """One call of a model: what it simulated, what it observed, and how to simulate again.

    structure:  of its latents
    groups:     observed sites by the plates they share, coarse ones first
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    structure: Structure
    groups: tuple[Group, ...]
    simulated: Trace
    observed: Trace

    def again(self) -> Trace:
        """A fresh simulation, conditional on the same globals and sub-samples."""
        values = {name: self.simulated.nodes[name]["value"] for name in self.structure.globals}
        values |= subsamples(self.simulated)
        return run_model(Resample()(self.model), self.args, self.kwargs, values=values)


def run_simulated(model: Any, guide: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Trace the model with its observed sites drawn, and the guide's latents; errors as in ``explain``."""
    with explained("model", args, kwargs) as recorder, Resample():
        poutine.replay(model, trace=guide)(*args, **kwargs)
    return recorder.trace


def simulation_of(
    model: Any,
    simulated: Trace,
    guide: Trace,
    args: Any,
    kwargs: Any,
    check_guide: Callable[[Trace, Structure], None] | None = None,
) -> Simulation:
    """Put a run of :func:`run_simulated` beside its data.

    :param check_guide: what the guide must be; by default it infers globals alone
    :raises ProgramError: they do not fit together, or the guide does not fit the model; naming the site
    :raises NonFiniteError: data or simulated data are NaN or infinite
    """
    observed = with_data(simulated)
    structure = structure_of(observed)
    (check_guide or _check_guide)(guide, structure)
    members: dict[Any, list[str]] = {}
    for name in structure.data:
        _leave_autocast(simulated.nodes[name], observed.nodes[name]["value"])
        _fill_missing(simulated.nodes[name], observed.nodes[name])
        members.setdefault(plates_of(observed.nodes[name]), []).append(name)
        _check_data(name, simulated, observed)
    groups = tuple(Group(tuple(members[stack]), stack) for stack in sorted(members, key=len))
    return Simulation(model, args, kwargs, structure, groups, simulated, observed)


def with_data(simulated: Trace) -> Trace:
    """A run of :func:`run_simulated` with the observed values in place of the simulated ones."""
    observed = simulated.copy()
    for name, site in sample_sites(simulated):
        if site["infer"].get("was_observed"):
            observed.nodes[name] = {**site, "value": site["infer"]["obs"], "is_observed": True}
    return observed


def check_gradient(call: Simulation) -> None:
    """Simulated data must depend on something that learns.

    :raises ProgramError: naming the site, why it carries no gradient, and the two ways out
    """
    sites = {name: call.simulated.nodes[name] for name in call.structure.data}
    if any(site["value"].requires_grad for site in sites.values()):
        return
    name, site = next(iter(sites.items()))
    kind, value = type(innermost(site["fn"])).__name__, site["value"]
    raise ProgramError(
        f"observed site {name!r}: the simulated data ({kind}, shape {tuple(value.shape)}, {value.dtype}) carry no gradient, "
        f"so nothing can be learned by comparing them with the data. The cause: {why_no_gradient(call, name)}. Two ways "
        "out: (1) write the simulator as torch functions of its parameters and of noise that does not depend on them "
        "(rsample, reparametrised or relaxed distributions), without .detach(), no_grad, NumPy, rounding or comparisons on "
        "the way; (2) keep the simulator and minimise loss.loss(model, guide, *args), which needs no gradient, with a "
        "derivative-free optimiser such as scipy.optimize.minimize(method='Nelder-Mead')"
    )


def why_no_gradient(call: Simulation, name: str) -> str:
    """Why the simulated values of an observed site carry none, in words."""
    site = call.simulated.nodes[name]
    fn = innermost(site["fn"])
    kind = type(fn).__name__
    learned = [n for n, node in call.simulated.nodes.items() if node["type"] == "param"]
    unreparametrised = [
        f"{n!r}, a {type(innermost(s['fn'])).__name__}"
        for n, s in sample_sites(call.simulated)
        if n in call.structure.locals and not getattr(s["fn"], "has_rsample", False)
    ]
    if not getattr(site["fn"], "has_rsample", False):
        reason = f"a {kind} is sampled without reparametrisation (has_rsample is False)"
    elif not learned and not call.structure.globals:
        reason = "the program has nothing to learn: no pyro.param or pyro.module was met in its run"
    elif isinstance(fn, Implicit):
        reason = f"the tensor given to Implicit does not depend, for autograd, on the parameters {learned}"
    else:
        reason = f"the parameters of its {kind} do not depend, for autograd, on the parameters {learned}"
    if unreparametrised and learned:
        reason += f"; the latents {unreparametrised} pass none on either"
    return reason


def _check_guide(guide: Trace, structure: Structure) -> None:
    produced = {name: site for name, site in sample_sites(guide) if is_latent(site)}
    for name in structure.globals:
        if name not in produced:
            raise ProgramError(
                f"latent site {name!r} is outside every data plate, so all simulated data would share one draw of it, "
                "which is not the law of the program. Make it a pyro.param to learn it, move it into the plate to "
                f"simulate it for every datum, or infer it by a guide with a density, such as "
                f"AutoNormal(poutine.block(model, expose=[{name!r}]))"
            )
        if isinstance(innermost(produced[name]["fn"]), Implicit):
            raise ProgramError(
                f"global latent {name!r} has an Implicit guide, but it is scored: give it a guide with a density, such "
                "as Normal or Delta"
            )
    inside = [name for name in produced if name in structure.locals]
    if inside:
        raise ProgramError(
            f"the guide samples the latents {inside}, which are inside the data plate: this loss compares data with free "
            "simulations, whose latents come from their prior. Leave them out of the guide (an empty guide is "
            "`lambda *args: None`), or use Trace_Sinkhorn, which has an encoder"
        )
    unknown = [name for name in produced if name not in structure.globals]
    if unknown:
        raise ProgramError(
            f"the guide samples {unknown}, which are not latents of the model {structure.latents}"
        )


def _leave_autocast(simulated: Site, data: Any) -> None:
    """Simulated values in the dtype of the data where it is autocast that made another one of it."""
    value = simulated["value"]
    if not (isinstance(data, Tensor) and value.dtype in (torch.bfloat16, torch.float16)):
        return
    if data.dtype == torch.float32 and torch.is_autocast_enabled(value.device.type):
        simulated["value"] = value.float()


def _fill_missing(simulated: Site, observed: Site) -> None:
    """Put simulated values in place of NaN and infinities that a mask hides: they do not count, but would spoil sums."""
    value, present = observed["value"], present_of(observed)
    if present is None or not isinstance(value, Tensor) or value.shape != simulated["value"].shape:
        return
    event = [1] * len(observed["fn"].event_shape)
    hidden = ~present.reshape([*present.shape, *event]) & ~value.isfinite()
    if bool(hidden.any()):
        observed["value"] = torch.where(hidden, simulated["value"].detach().to(value), value)


def _check_data(name: str, simulated: Trace, observed: Trace) -> None:
    site = simulated.nodes[name]
    value, data = site["value"], observed.nodes[name]["value"]
    where = f"observed site {name!r}"
    if not isinstance(data, Tensor):
        raise ProgramError(f"{where}: the data are a {type(data).__name__}: expected a tensor")
    event_dim = len(site["fn"].event_shape)
    _check_shapes(where, site, value, data, event_dim)
    discrete = getattr(site["fn"].support, "is_discrete", False)
    if not discrete and data.dtype != value.dtype:
        raise ProgramError(
            f"{where}: the data are {data.dtype}, the simulated data {value.dtype}: bring both to one dtype, for example "
            f"with x.to({value.dtype})"
        )
    if data.device != value.device:
        raise ProgramError(
            f"{where}: the data are on {data.device}, the simulated data on {value.device}: move data, modules and "
            "constants to one device"
        )
    if not bool(data.isfinite().all()):
        raise NonFiniteError(f"{where}: {bad_rows(data)} of the data; remove or replace them")
    _check_support(where, site, data)
    if not bool(value.isfinite().all()):
        raise NonFiniteError(f"{where}: {bad_rows(value)} of the simulated data{_not_finite(simulated)}")


def _check_support(where: str, site: Any, data: Tensor) -> None:
    """Data must be what the site could be: the geometry of its support would otherwise make something of them."""
    fn, support = site["fn"], site["fn"].support
    if site["mask"] is not None:
        return  # what is masked out may be anything
    inside = support.check(renormalised(data, support))
    if not bool(inside.all()):
        raise ProgramError(
            f"{where}: {int((~inside).sum())} of {inside.numel()} data lie outside the support {support} of its "
            f"{type(innermost(fn)).__name__}: transform them, or write Implicit without a support to have them compared "
            "as numbers"
        )
    lower = getattr(base_support(fn), "lower_bound", None)
    if lower is None or getattr(support, "is_discrete", False) or not isinstance(geometry_of(fn), HalfLine):
        return
    at_bound = int(torch.as_tensor(data == lower).sum())
    if at_bound:
        raise ProgramError(
            f"{where}: {at_bound} numbers lie on the bound of the support {support}, whose data are compared by the "
            "logarithm of their distance to it: write Implicit without a support to have them compared as numbers"
        )


def _check_shapes(where: str, site: Any, value: Tensor, data: Tensor, event_dim: int) -> None:
    particles = any(frame.name == PARTICLE_PLATE for frame in site["cond_indep_stack"])
    mine = value.shape[1:] if particles else value.shape
    if _stripped(mine, event_dim) != _stripped(data.shape, event_dim):
        raise ProgramError(
            f"{where}: the data have shape {tuple(data.shape)}, the simulated data {tuple(mine)}, with event shape "
            f"{tuple(site['fn'].event_shape)}: both must have the plates' sizes and then the event's"
        )
    if particles and len(value) > 1 and value.stride(0) == 0:
        raise ProgramError(
            f"{where}: its {len(value)} vectorised particles are copies of one simulation, whose noise knows nothing of their "
            "plate: draw it by pyro.sample inside the data plate, or leave out vectorize_particles"
        )
    for plate in plates_of(site):
        axis = plate.dim - event_dim
        if plate.size > 1 and value.dim() >= -axis and value.stride(axis) == 0:
            raise ProgramError(
                f"{where}: the simulated value has no dimension for plate {plate.name!r}, so its {plate.size} slices are "
                f"copies of one draw: simulate a value for each, {plate.size} along dimension {plate.dim} of the batch "
                f"shape (event shape {tuple(site['fn'].event_shape)})"
            )


def _stripped(shape: torch.Size, event_dim: int) -> tuple[int, ...]:
    """Without leading dimensions of size 1 in front of the event."""
    sizes = list(shape)
    while len(sizes) > event_dim and sizes[0] == 1:
        sizes.pop(0)
    return tuple(sizes)


def _not_finite(trace: Trace) -> str:
    """Causes before effects: a parameter, a latent, else the simulator itself."""
    for name, node in trace.nodes.items():
        if node["type"] == "param" and not bool(node["value"].isfinite().all()):
            return f": the parameter {name!r} is NaN or infinite"
    for name, site in sample_sites(trace):
        latent = is_latent(site) and not site["infer"].get("was_observed")
        if latent and not bool(site["value"].isfinite().all()):
            return f": the latent {name!r} is NaN or infinite"
    for name, site in sample_sites(trace):
        if isinstance(innermost(site["fn"]), Implicit):
            continue
        for parameter, _ in parameters_of(site["fn"]):
            if site["infer"].get("was_observed") and not bool(parameter.isfinite().all()):
                return f", since a parameter of the distribution of {name!r} is"
    return ", though its parameters and latents are finite: the simulator overflows or divides by zero there"
