"""Draws of a guide for data whose latents are known, since they were simulated: what calibration is checked on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_sinkhorn.diagnostics.drawn import PosteriorDraws
from pyro_sinkhorn.errors import checked_integer
from pyro_sinkhorn.guide.lazy import LazyGuide
from pyro_sinkhorn.guide.observed import Readings, find_observed, read_observed
from pyro_sinkhorn.guide.shown import Shown, showing
from pyro_sinkhorn.losses.pairs import Pairs, Simulator, substituted
from pyro_sinkhorn.losses.side_by_side import DRAWS_OF_GUIDE, ROWS_AT_ONCE, draws_in_plate
from pyro_sinkhorn.scoring import run_guide
from pyro_sinkhorn.structure import Structure, is_latent, plates_of, sample_sites


@torch.no_grad()
def posterior_of_simulations(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_simulations: int = 1000,
    num_draws: int = 99,
    **kwargs: Any,
) -> PosteriorDraws:
    """Simulate data from a program, and draw the guide's latents for each.

    A simulation is one datum (a slice of the outermost data plate) where the program has no globals, else a whole data
    set, of which one slice of each local latent is kept: its other slices depend on it.

    :param args: arguments of the model: shapes and covariates of the data to simulate
    :param num_simulations: simulations at least
    :param num_draws: guide draws of each

    >>> import pyro.distributions as dist
    >>> from pyro_sinkhorn import AutoImplicit
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
    >>> drawn = posterior_of_simulations(model, AutoImplicit(model), torch.zeros(20), num_simulations=40, num_draws=9)
    >>> drawn.truth["z"].shape, drawn.draws["z"].shape
    (torch.Size([40]), torch.Size([9, 40]))
    """
    num_simulations = checked_integer("num_simulations", num_simulations, 2)
    num_draws = checked_integer("num_draws", num_draws, 2)
    simulator = Simulator()
    seen, structure, _ = simulator.look(model, args, kwargs)
    rows = 1 if structure.globals else max(structure.data_plates[0].size, 1)
    pairs = simulator(model, args, kwargs, math.ceil(num_simulations / rows))
    if isinstance(guide, LazyGuide):
        guide(*args, **kwargs)  # makes its networks where it has none
    fast = isinstance(guide, LazyGuide) and (simulator.vectorize or draws_in_plate(structure))
    fast = fast and getattr(guide, "_encoder_input", None) is None
    if fast:
        draws = _side_by_side(guide, pairs, seen, structure, num_draws, args, kwargs)
    else:
        draws = _one_by_one(guide, pairs, seen, structure, num_draws, args, kwargs)
    truth, kept = {}, {}
    for name in structure.latents:
        truth[name] = _simulations(pairs.values[name].unsqueeze(0), name, pairs, structure, seen)[0]
        kept[name] = _simulations(draws[name], name, pairs, structure, seen)
    data = {
        name: _simulations(pairs.values[name].unsqueeze(0), name, pairs, structure, seen)[0]
        for name in structure.data
    }
    return PosteriorDraws(truth, kept, data)


def _side_by_side(
    guide: Any, pairs: Pairs, seen: Any, structure: Structure, num_draws: int, args: Any, kwargs: Any
) -> dict[str, Tensor]:
    """``(S, P, *batch, *event)`` in few calls: data sets and draws lie in plates."""
    observed = find_observed(seen, structure, args, kwargs, dict(pairs.indices))
    present = read_observed(observed, args, kwargs, dict(pairs.indices), lambda: seen).present
    rows = math.prod(plate.size for plate in structure.data_plates)
    size = max(ROWS_AT_ONCE // max(rows * num_draws, 1), 1)
    parts: list[dict[str, Tensor]] = []
    for index in torch.arange(len(pairs)).split(size):
        part = pairs.pick(index)
        values = {name: part.values[name] for name in structure.data}
        plate = part.plate
        with (
            showing(guide, Shown(Readings(values, present), plate, pairs.indices)),
            pyro.plate(DRAWS_OF_GUIDE, num_draws, dim=plate.dim - 1),
            pyro.plate(plate.name, plate.size, dim=plate.dim),
        ):
            trace = run_guide(guide, args, kwargs)
        parts.append({name: trace.nodes[name]["value"] for name in structure.latents})
    return {name: torch.cat([part[name] for part in parts], 1) for name in structure.latents}


def _one_by_one(
    guide: Any, pairs: Pairs, seen: Any, structure: Structure, num_draws: int, args: Any, kwargs: Any
) -> dict[str, Tensor]:
    observed = find_observed(seen, structure, args, kwargs, dict(pairs.indices))
    paths = {site.name: site.source.path for site in observed}
    found: dict[str, list[Tensor]] = {name: [] for name in structure.latents}
    for i in range(len(pairs)):
        shown_args, shown_kwargs = substituted(paths, pairs, i, args, kwargs)
        draws = [run_guide(guide, shown_args, shown_kwargs) for _ in range(num_draws)]
        for name in structure.latents:
            shape = pairs.values[name].shape[1:]
            found[name].append(torch.stack([_value(trace, name).reshape(shape) for trace in draws]))
    return {name: torch.stack(values, 1) for name, values in found.items()}


def _value(trace: Any, name: str) -> Tensor:
    return next(site["value"] for n, site in sample_sites(trace) if n == name and is_latent(site))


def _simulations(value: Tensor, name: str, pairs: Pairs, structure: Structure, seen: Any) -> Tensor:
    """``(S, P, *batch, *event)`` as ``(S, simulations, ...)``; of data sets, one slice of every local latent."""
    data_plates = {plate.name for plate in structure.data_plates}
    plates = tuple(plate for plate in plates_of(seen.nodes[name]) if plate.name in data_plates)
    first = 2 + pairs.nesting  # where the event begins
    observed = name in structure.data
    for plate in () if observed else plates if structure.globals else plates[1:]:
        value = value.narrow(first + plate.dim, 0, 1)
    if plates and not structure.globals:
        value = value.movedim(first + plates[0].dim, 2).flatten(1, 2)
        first -= 1
    keep = [size for i, size in enumerate(value.shape) if i < 2 or i >= first or size != 1]
    return value.reshape(keep)
