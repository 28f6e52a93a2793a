r"""Whether a posterior factorises over the slices of the data plates, as the posterior guide takes for granted.

Given the globals, the slices of a plate are independent where every site that depends on a local latent lies in its slice. A
program may break that: crossed plates (an effect of the row and one of the column in every cell), or an index that
carries a latent into other slices (``z[group]``). The guide would then be confidently wrong, so such programs are refused, as
far as distributions with parameters show it; of a simulator whose output is ``Implicit`` it is taken on trust.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.distributions.implicit import Implicit
from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.rng import undisturbed
from pyro_sinkhorn.runs import run_model, subsamples
from pyro_sinkhorn.structure import Plate, Structure, innermost, parameters_of, plates_of


def check_factorises(
    model: Callable[..., Any], structure: Structure, draws: list[Trace], args: Any, kwargs: Any
) -> None:
    """Move every group of local latents, in the first slice of its outermost plate: nothing outside may notice.

    :param draws: two complete simulations at least
    :raises ProgramError: naming the latent and what depends on it
    """
    _refuse_crossed(structure, draws[0])
    values = {name: draws[0].nodes[name]["value"] for name in structure.latents} | subsamples(draws[0])
    before = _run(model, args, kwargs, values)
    for group in structure.groups:
        plate = group.plates[0]
        moved = {}
        for name in group.sites:
            site = draws[0].nodes[name]
            axis = site["value"].dim() - len(site["fn"].event_shape) + plate.dim
            moved[name] = _first_slice_of(draws[1].nodes[name]["value"], site["value"], axis)
        after = _run(model, args, kwargs, values | moved)
        for name in (*structure.latents, *structure.data):
            if name not in group.sites and _noticed(before.nodes[name], after.nodes[name], plate):
                raise ProgramError(
                    f"latent group ({group.name}): a slice of plate {plate.name!r} changes the law of {name!r} in other "
                    "slices or outside of the plate. AutoPosterior makes them independently of each other given the globals, "
                    "which is not the posterior of this program. Draw the latents as one site with an event dimension "
                    "outside of the plate, as a global, or write the guide by hand"
                )


def _refuse_crossed(structure: Structure, run: Trace) -> None:
    for name in structure.data:
        around = {plate.name for plate in plates_of(run.nodes[name])}
        inside = [group for group in structure.groups if {plate.name for plate in group.plates} <= around]
        for i, one in enumerate(inside):
            for other in inside[:i]:
                a, b = ({plate.name for plate in group.plates} for group in (one, other))
                if not (a <= b or b <= a):
                    raise ProgramError(
                        f"observed site {name!r} lies in the plates of the latents ({one.name}) and of ({other.name}), "
                        f"{sorted(a)} and {sorted(b)}, which cross: given the data they are not independent, as "
                        "AutoPosterior would make them. Draw one of them as a site with an event dimension outside of the "
                        "plates, as a global, or write the guide by hand"
                    )


def _run(model: Callable[..., Any], args: Any, kwargs: Any, values: dict[str, Tensor]) -> Trace:
    """A run with these latents."""
    with undisturbed():
        return run_model(model, args, kwargs, values=values)


def _first_slice_of(other: Tensor, value: Tensor, axis: int) -> Tensor:
    mixed = value.clone()
    mixed.select(axis, 0).copy_(other.select(axis, 0))
    return mixed


def _noticed(before: Any, after: Any, plate: Plate) -> bool:
    """Whether the law of a site has changed beyond the first slice of a plate; of Implicit ones nobody can tell.

    Their noise may change with their parameters: samplers such as the binomial's take as many random numbers as they need.
    """
    if isinstance(innermost(before["fn"]), Implicit):
        return False
    inside = plate.name in {own.name for own in plates_of(before)}
    for (one, dims), (other, _) in zip(parameters_of(before["fn"]), parameters_of(after["fn"]), strict=True):
        axis = one.dim() - dims + plate.dim
        if one.shape != other.shape:
            return True
        if inside and axis >= 0 and one.shape[axis] == plate.size:
            one, other = (part.narrow(axis, 1, plate.size - 1) for part in (one, other))
        elif inside and plate.size == 1:
            continue
        if not torch.allclose(one.double(), other.double(), rtol=1e-6, atol=1e-9, equal_nan=True):
            return True
    return False
