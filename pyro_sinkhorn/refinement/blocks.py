"""Which latents move together, and how finely a move can be accepted.

Given all others, latents in different slices of a plate are independent. A *block* holds latents that move together; its
*units* are the slices of its plates, each of which accepts its own moves. The plates of a block are those that its latents
share with every site whose density depends on them: latents that are read across slices (``theta[group]``) lose the plate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.refinement.density import Density, Values, is_singular, same
from pyro_sinkhorn.structure import Plate, plates_of

#: Up to so many coordinates a unit, moves follow the covariance of the draws; above, only their spreads.
DENSE = 64


@dataclass(frozen=True)
class Block:
    """Latents that move together. States are ``(chains, units, coordinates)``.

    plates: outermost first; the units are their slices
    scored: sites whose density depends on these latents
    """

    sites: tuple[str, ...]
    plates: tuple[Plate, ...]
    scored: frozenset[str]

    @property
    def name(self) -> str:
        return ", ".join(self.sites)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(plate.size for plate in self.plates)

    def pack(self, values: Values, nesting: int) -> Tensor:
        """``(chains, units, coordinates)`` of a dictionary of coordinates."""
        rows = []
        for name in self.sites:
            value = values[name]
            value = value.permute(_order(self, value.dim(), nesting))
            rows.append(value.reshape(len(value), self.sizes_product, -1))
        return torch.cat(rows, -1)

    def unpack(self, state: Tensor, like: Values, nesting: int) -> Values:
        """The inverse of :meth:`pack`; ``like`` says the shapes."""
        values, at = {}, 0
        for name in self.sites:
            order = _order(self, like[name].dim(), nesting)
            shape = [len(state), *like[name].shape[1:]]
            size = like[name][0].numel() // self.sizes_product
            rows = state[..., at : at + size].reshape([shape[i] for i in order])
            values[name] = rows.permute([order.index(i) for i in range(len(order))])
            at += size
        return values

    def total(self, parts: Values, nesting: int) -> Tensor:
        """Log density of every unit, up to what does not depend on it: ``(chains, units)``."""
        kept = [1 + nesting + plate.dim for plate in self.plates]
        summed = [i for i in range(1, 1 + nesting) if i not in kept]
        totals = [parts[name].sum(summed) if summed else parts[name] for name in sorted(self.scored)]
        total = totals[0]
        for other in totals[1:]:
            total = total + other
        return total.reshape(len(total), -1)

    @property
    def sizes_product(self) -> int:
        return int(torch.Size(self.sizes).numel())


def _order(block: Block, dim: int, nesting: int) -> list[int]:
    kept = [1 + nesting + plate.dim for plate in block.plates]
    return [0, *kept, *[i for i in range(1, dim) if i not in kept]]


def blocks_of(density: Density, joint: bool | None) -> list[Block]:
    """Blocks of a program, coarse ones first.

    :param joint: move all latents together, accepted by the slices of the plates common to everything; None does so where
        these have at most :data:`DENSE` coordinates
    :raises ProgramError: slices of a plate are not independent
    """
    blocks = _blocks(density, joint is not False)
    if joint is None and blocks[0].pack(density.start, density.nesting).shape[-1] > DENSE:
        blocks = _blocks(density, joint=False)
    for block in blocks:
        _check_independence(density, block)
    return blocks


def _blocks(density: Density, joint: bool) -> list[Block]:
    names = {name: frozenset(plates_of(density.sites[name])) for name in density.latents}
    groups: dict[frozenset[Plate], list[str]] = {}
    for name in density.latents:
        groups.setdefault(frozenset() if joint else names[name], []).append(name)
    found: dict[frozenset[Plate], tuple[list[str], set[str]]] = {}
    for sites in groups.values():
        scored = dependent(density, sites)
        plates = frozenset.intersection(
            *[frozenset(plates_of(density.sites[name])) for name in {*sites, *scored}]
        )
        members, known = found.setdefault(plates, ([], set()))
        members += sites
        known |= scored
    return [
        Block(tuple(sites), tuple(sorted(plates, key=lambda plate: plate.dim)), frozenset(scored))
        for plates, (sites, scored) in sorted(found.items(), key=lambda item: len(item[0]))
    ]


def dependent(density: Density, sites: list[str]) -> set[str]:
    """Sites whose density depends on some latents: by its gradient, or by its value where that has none (``z > 0``)."""
    probe = {name: u.clone().requires_grad_(name in sites) for name, u in density.start.items()}
    inputs = [probe[name] for name in sites]
    found = set(sites)
    with torch.enable_grad():
        before = density.parts(probe)
        for name, part in before.items():
            if part.requires_grad:
                grads = torch.autograd.grad(part.sum(), inputs, allow_unused=True, retain_graph=True)
                if any(grad is not None for grad in grads):
                    found.add(name)
    with torch.no_grad():
        after = _after(density, lambda size: {name: _nudged(density.start[name], size) for name in sites})
    return found | {name for name, part in after.items() if not same(part, before[name])}


def _check_independence(density: Density, block: Block) -> None:
    """Move half of the units: the others must not notice."""
    with torch.no_grad():
        before = block.total(density.parts(density.start), density.nesting)
        if before.numel() == 1:
            return
        state = block.pack(density.start, density.nesting)
        moved = torch.rand_like(before) < 0.5

        def some(size: float) -> Values:
            nudged = torch.where(moved.unsqueeze(-1), _nudged(state, size), state)
            return block.unpack(nudged, density.start, density.nesting)

        after = block.total(_after(density, some), density.nesting)
    if not same(after[~moved], before[~moved], 100):
        where = f"plates {[plate.name for plate in block.plates]}" if block.plates else "chains"
        raise ProgramError(
            f"latents {list(block.sites)}: the density in one slice of the {where} changed when latents of other slices did. "
            "Slices of a plate must be independent given what is outside; put networks that mix rows (BatchNorm) into eval "
            "mode, and take sites that join slices out of the plate"
        )


def _after(density: Density, nudged: Callable[[float], Values]) -> Values:
    """Densities after a nudge, a smaller one where a matrix of the model is singular after it."""
    for size in (1.0, 0.1, 0.01):
        try:
            return density.parts(density.start | nudged(size))
        except (RuntimeError, ValueError) as error:
            if not is_singular(error):
                raise
    return density.parts(density.start | nudged(1e-3))


def _nudged(u: Tensor, size: float) -> Tensor:
    """Far enough to cross thresholds, near enough to stay where densities are finite."""
    finite = u[u.isfinite()]
    scale = float(finite.std()) if finite.numel() > 1 else 1.0
    return u + size * max(scale, 0.1) * torch.randn_like(u)
