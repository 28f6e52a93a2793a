"""From the code of a datum to its latents: states first, then what may depend on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_sinkhorn.distributions.implicit import Implicit
from pyro_sinkhorn.errors import NonFiniteError
from pyro_sinkhorn.geometry.base import Geometry
from pyro_sinkhorn.geometry.discrete import Discrete
from pyro_sinkhorn.geometry.registry import geometry_at
from pyro_sinkhorn.guide.encoder import joined
from pyro_sinkhorn.guide.layout import place_extra_plates
from pyro_sinkhorn.guide.shown import Moments
from pyro_sinkhorn.guide.start import moments
from pyro_sinkhorn.guide.states import relaxed
from pyro_sinkhorn.structure import Group, Plate, Structure, plates_of


@dataclass
class Produced:
    """Latents of the groups produced so far.

    values:  by name
    states:  of discrete sites, embedded, each with its plates: what later networks read
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    states: list[tuple[tuple[Plate, ...], Tensor]] = field(default_factory=list)

    def known(self, plates: Sequence[Plate]) -> list[Tensor]:
        """States of the plates around some, and of these themselves."""
        names = {plate.name for plate in plates}
        return [state for around, state in self.states if {plate.name for plate in around} <= names]


@dataclass(frozen=True)
class Recipe:
    """How a group is produced.

    head:         code, states and noise to the raw outputs of its continuous sites; None where there are none
    state_heads:  code and states to the probabilities of its discrete sites, by name
    noise_dim:    noise variables of a slice
    noise_name:   of their sample site
    relative:     sites produced relative to their prior's moments, or probabilities
    temperature:  of relaxed discrete sites
    below_globals: whether the program has globals, whose guide needs the gradient of the prior's scale
    known_moments: of priors, instead of those of the prior run
    """

    group: Group
    head: nn.Module | None
    state_heads: dict[str, Any]
    noise_dim: int
    noise_name: str
    relative: frozenset[str]
    temperature: float
    below_globals: bool
    known_moments: Mapping[str, Moments] = field(default_factory=dict)

    def sample(
        self, plates: tuple[Plate, ...], code: Tensor, prior: Trace, contexts: dict[str, Any], done: Produced
    ) -> None:
        """Sample all sites of the group, and add them to what was produced."""
        with entered(contexts, [plate.name for plate in plates]):
            for name, head in self.state_heads.items():
                fn = prior.nodes[name]["fn"]
                states = head(joined(code, *done.known(plates)), fn, follow=name in self.relative)
                # Without an enumerating handler around, the mark does nothing and a state is drawn.
                value = pyro.sample(name, states, infer={"enumerate": "parallel"})
                done.values[name] = value
                done.states.append((plates, geometry_at(prior.nodes[name]).embed(value).to(code)))
            if self.head is not None:
                self._sample_continuous(plates, joined(code, *done.known(plates)), prior, contexts, done)

    def _sample_continuous(
        self, plates: tuple[Plate, ...], code: Tensor, prior: Trace, contexts: dict[str, Any], done: Produced
    ) -> None:
        assert self.head is not None
        noise = None
        if self.noise_dim:
            unit = dist.Normal(code.new_zeros(()), code.new_ones(()), validate_args=False)
            unit = unit.expand([self.noise_dim]).to_event(1)
            # A sample site, so that plates and vectorised particles each get their own.
            noise = pyro.sample(self.noise_name, unit, infer={"is_auxiliary": True})
        raw = self.head(code, noise)
        names = {plate.name for plate in plates}
        column = 0
        for name in self.group.sites:
            if name in self.state_heads:
                continue
            fn, stack = prior.nodes[name]["fn"], plates_of(prior.nodes[name])
            extra = [plate for plate in stack if plate.name not in names]
            geometry = geometry_at(prior.nodes[name])
            n_raw = num_outputs(geometry) * math.prod(plate.size for plate in extra)
            part = place_extra_plates(raw[..., column : column + n_raw], extra)
            column += n_raw
            if name in self.relative and not isinstance(geometry, Discrete):
                if name in self.known_moments:
                    loc, spread = self.known_moments[name]
                    part = loc + spread * part
                else:
                    part = _relative_to_prior(name, part, fn, geometry, not self.below_globals)
            part = part.to(_dtype(prior.nodes[name]["value"]))
            with entered(contexts, [plate.name for plate in extra]):
                if isinstance(geometry, Discrete):
                    produced = relaxed(name, geometry, part, self.temperature)
                else:
                    value = geometry.head(part)
                    produced = Implicit(value, event_dim=len(geometry.event_shape), support=fn.support)
                done.values[name] = pyro.sample(name, produced)


def plates_around(
    prior: Trace, structure: Structure, indices: dict[str, Tensor]
) -> tuple[dict[str, Plate], dict[str, Any]]:
    """Plates of all latents as this call has them, by name, and what enters each, under the same sub-samples."""
    plates = {plate.name: plate for name in structure.latents for plate in plates_of(prior.nodes[name])}
    contexts = {
        plate.name: pyro.plate(plate.name, plate.full_size, subsample=indices.get(plate.name), dim=plate.dim)
        for plate in plates.values()
    }
    return plates, contexts


def num_outputs(geometry: Geometry) -> int:
    """Raw outputs of one value of a site: for a relaxed discrete one those of its coordinates, not of its states."""
    return math.prod(geometry.event_shape) if isinstance(geometry, Discrete) else geometry.num_raw


def _relative_to_prior(name: str, part: Tensor, fn: Any, geometry: Geometry, detach_scale: bool) -> Tensor:
    found = moments(fn, geometry, detach_scale)
    if found is None:
        raise NonFiniteError(
            f"latent site {name!r}: the mean or standard deviation of its prior is NaN, infinite or zero "
            "in this batch, though not in the first: the covariates are, or the network that makes the "
            "prior diverged"
        )
    return found[0] + found[1] * part


def _dtype(value: Tensor) -> torch.dtype:
    return value.dtype if value.is_floating_point() else torch.get_default_dtype()


@contextmanager
def entered(contexts: dict[str, Any], names: list[str]) -> Iterator[None]:
    """Inside some plates."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(contexts[name])
        yield
