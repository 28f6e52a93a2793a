"""Networks of one group of latents, made once from the shapes of the first call."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_sinkhorn.geometry.discrete import Discrete
from pyro_sinkhorn.geometry.registry import geometry_of
from pyro_sinkhorn.guide.encoder import NoiseHead
from pyro_sinkhorn.guide.posterior_networks import ResidualHead
from pyro_sinkhorn.guide.produce import Produced, num_outputs
from pyro_sinkhorn.guide.start import has_heavy_tails, start
from pyro_sinkhorn.guide.states import StateHead, key_of, log_prior_of
from pyro_sinkhorn.structure import Group, plates_of, refuse_inner_plates


def make_group(
    group: Group,
    draws: list[Trace],
    code: Tensor,
    done: Produced,
    relative: frozenset[str],
    enumerated: bool,
    noise_dim: int | None,
    hidden: int,
    states: Mapping[str, Tensor],
    make_head: Callable[[int, int, int], NoiseHead | ResidualHead] | None = None,
    noise_per_output: int = 1,
) -> tuple[nn.ModuleDict, nn.Module, int]:
    """Heads of the discrete sites, head of the others (an identity where there are none), and noise variables.

    :param draws: prior runs
    :param code: of this batch, for its width and place
    :param done: states of the groups before; those of this one are added
    :param relative: sites produced relative to their prior's moments
    :param enumerated: whether discrete sites get a probability for every state
    :param noise_dim: as asked for, or None for ``noise_per_output`` times as many as raw outputs
    :param make_head: of width, noise variables and raw outputs; by default a :class:`NoiseHead`
    :param states: states of discrete sites from an earlier set-up by key, which win over the prior's
    """
    nodes = draws[0].nodes
    floating = [nodes[n]["value"] for n in group.sites if nodes[n]["value"].is_floating_point()]
    factory: dict[str, Any] = {"device": code.device, "dtype": floating[0].dtype if floating else code.dtype}
    state_heads = nn.ModuleDict()
    width = code.shape[-1] + sum(state.shape[-1] for state in done.known(group.plates))
    locs, scales, heavy = [], [], []
    for name in group.sites:
        fn = nodes[name]["fn"]
        geometry = geometry_of(fn, name)
        if not (isinstance(geometry, Discrete) and enumerated):
            continue
        plates = {plate.name for plate in plates_of(nodes[name])}
        refuse_inner_plates(name, plates - {plate.name for plate in group.plates})
        values = states.get(key_of(name), geometry.states(name)).to(nodes[name]["value"])
        log_prior = log_prior_of(fn, values).to(**factory)
        state_heads[key_of(name)] = StateHead(width, values, log_prior, hidden, factory)
        embedded = geometry.embed(nodes[name]["value"]).to(code)
        done.states.append((group.plates, embedded))
        width += embedded.shape[-1]
    names = {plate.name for plate in group.plates}
    for name in group.sites:
        if key_of(name) in state_heads:
            continue
        site = nodes[name]
        geometry = geometry_of(site["fn"], name)
        copies = math.prod(plate.size for plate in plates_of(site) if plate.name not in names)
        if name in relative or isinstance(geometry, Discrete):
            loc, scale = torch.zeros(num_outputs(geometry)), torch.ones(num_outputs(geometry))
        else:
            loc, scale = start(name, draws)
        tails = name not in relative and has_heavy_tails(name, draws)
        heavy.append(torch.full((len(loc) * copies,), tails))
        locs.append(loc.to(code).repeat(copies))
        scales.append(scale.to(code).repeat(copies))
    if not locs:
        return state_heads, nn.Identity(), 0
    num_raw = sum(len(loc) for loc in locs)
    noise_dim = noise_per_output * num_raw if noise_dim is None else noise_dim
    make_head = make_head or functools.partial(NoiseHead, hidden=hidden)
    head = make_head(width, noise_dim, num_raw).to(**factory)
    head.loc.copy_(torch.cat(locs))
    head.scale.copy_(torch.cat(scales))
    if isinstance(head, ResidualHead):
        head.heavy.copy_(torch.cat(heavy))
    return state_heads, head, noise_dim
