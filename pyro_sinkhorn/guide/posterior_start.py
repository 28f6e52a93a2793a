"""How the posterior guide starts: from simulated data sets, which show scales, relations and what it cannot serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.geometry.registry import base_support
from pyro_sinkhorn.guide.auto_implicit import AutoImplicit
from pyro_sinkhorn.guide.encoder import DefaultEncoder, Standardise
from pyro_sinkhorn.guide.posterior_networks import SetEncoder
from pyro_sinkhorn.guide.reading import Reading
from pyro_sinkhorn.guide.start import has_start, stands_alone
from pyro_sinkhorn.runs import Resample, check_appeared, run_model, subsamples
from pyro_sinkhorn.structure import Group, Plate, Structure

#: Rows of simulations that networks are started from, and runs made for them, at most.
_START_ROWS, _START_RUNS = 512, 128
#: Observed numbers a slice from which on they pass a perceptron first.
_WIDE = 64


def factors(structure: Structure) -> list[Group]:
    """Globals, if there are any, and then the groups of local latents, coarse ones first."""
    return [*([Group(structure.globals, ())] if structure.globals else []), *structure.groups]


def simulations(
    model: Callable[..., Any], structure: Structure, args: Any, kwargs: Any, indices: dict[str, Tensor]
) -> list[Trace]:
    """Simulated data sets, enough to know the scale of everything in them."""
    slices = min([block.plates[0].size for block in structure.groups] if not structure.globals else [1])
    runs = min(max(-(-_START_ROWS // max(slices, 1)), 15), _START_RUNS)
    draws = [run_model(Resample()(model), args, kwargs, values=indices) for _ in range(runs)]
    for draw in draws:
        check_appeared(draw, structure.latents, known=structure.data)
    return draws


def find_relative(
    model: Callable[..., Any], structure: Structure, draws: list[Trace], args: Any, kwargs: Any
) -> frozenset[str]:
    """Local sites on the line whose prior the latents above tell."""
    above = {name: draws[0].nodes[name]["value"] for name in structure.globals} | subsamples(draws[0])
    found = set()
    for group in structure.groups:
        again = run_model(model, args, kwargs, values=above, stop_after=structure.latents)
        for name in group.sites:
            fn = again.nodes[name]["fn"]
            discrete = getattr(fn.support, "is_discrete", False)
            if not discrete and stands_alone(draws[0], again, name) and has_start(fn, name):
                found.add(name)
        above |= {name: draws[0].nodes[name]["value"] for name in group.sites}
    return frozenset(found)


def make_reader(
    block: Group,
    readings: list[Reading],
    hidden: int,
    encoded: bool,
    fitted: tuple[AutoImplicit, ...],
) -> nn.Module:
    """What turns the rows of a block into codes; of globals, an encoder of the data set for every stack of plates."""

    def pooled(plates: tuple[Plate, ...]) -> Tensor:
        return torch.cat([reading.rows(plates).flatten(0, -2) for reading in readings])

    if not block.plates:
        encoders = nn.ModuleList()
        for stack in readings[0].stacks():
            rows = pooled(stack)
            encoder = SetEncoder(rows.shape[-1], len(stack), hidden).to(rows)
            encoder.standardise.fit(rows)
            encoders.append(encoder)
        return encoders
    rows = pooled(block.plates)
    if rows.shape[-1] <= _WIDE or encoded:
        reader = Standardise(rows.shape[-1], where_heavy=True).to(rows)
        reader.fit(rows)
        return reader
    wide = DefaultEncoder(rows.shape[-1]).to(rows)
    wide.standardise.fit(rows)
    for guide in fitted:
        for trained in guide.encoders:
            if {n: t.shape for n, t in trained.state_dict().items()} == {
                n: t.shape for n, t in wide.state_dict().items()
            }:
                wide.load_state_dict(trained.state_dict())
    return wide


def check_subsampling(structure: Structure) -> None:
    """Globals need all data."""
    for plate in structure.data_plates:
        if structure.globals and plate.size != plate.full_size:
            raise ProgramError(
                f"plate {plate.name!r} sub-samples {plate.size} of {plate.full_size}, but the posterior of the globals "
                f"{list(structure.globals)} depends on all data: call the model with the whole data set and no sub-sample"
            )


def check_supports(structure: Structure, draws: list[Trace]) -> None:
    """Bounds of a support may vary along plates, with covariates, but not with other latents."""
    for name in structure.latents:
        bounds = []
        for draw in draws:
            support = base_support(draw.nodes[name]["fn"])
            held = [getattr(support, bound, 0.0) for bound in ("lower_bound", "upper_bound")]
            bounds.append([torch.as_tensor(value) for value in held])
        if any(
            not torch.equal(a, b) for others in bounds[1:] for a, b in zip(bounds[0], others, strict=True)
        ):
            raise ProgramError(
                f"latent site {name!r}: the bounds of its support, {draws[0].nodes[name]['fn'].support}, depend on other "
                "latents, so no head can be made for it. Draw it from fixed bounds and rescale: for Uniform(0, b), "
                "u = pyro.sample('u', Uniform(0, 1)) and z = b * u"
            )
