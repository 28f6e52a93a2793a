r"""Langevin and Hamiltonian chains, many side by side, every unit accepting its own moves.

With M = L Lᵀ the covariance of the chains, one step of size ε takes p ~ N(0, I) and then, ``num_leapfrog`` times,

    p ← p + ε/2 Lᵀ∇log π(u),   u ← u + ε L p,   p ← p + ε/2 Lᵀ∇log π(u),

and accepts the end with probability min(1, exp(log π(u') - |p'|²/2 - log π(u) + |p|²/2)). With one leapfrog step this is
MALA (Roberts and Tweedie 1996, *Exponential convergence of Langevin distributions*); with more, HMC (Neal 2011, *MCMC using
Hamiltonian dynamics*).

While adapting, ε of every unit follows the acceptance of its chains (Robbins and Monro 1951; the average of its last part
is kept), and L the spread of the chains. Both are fixed afterwards: only then do steps leave the posterior invariant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.refinement.blocks import DENSE, Block
from pyro_sinkhorn.refinement.density import Density, Values, is_singular
from pyro_sinkhorn.refinement.report import BlockReport

#: Fewer chains say too little about memory and shift.
_ENOUGH = 10


class BlockChains:
    """The chains of one block, given all other latents.

    :param target: acceptance that the step size aims at
    :param step_size: a fixed one in place of adaptation
    """

    def __init__(
        self, density: Density, block: Block, num_leapfrog: int, target: float, step_size: float | None
    ) -> None:
        self.density, self.block, self.num_leapfrog, self.target = density, block, num_leapfrog, target
        self.free = block.pack(density.free, density.nesting)
        self.first = block.pack(density.start, density.nesting)
        chains, units, coordinates = self.first.shape
        self.fixed = step_size is not None
        # The best step for many independent coordinates (Roberts and Rosenthal 1998), here only a beginning.
        self.initial = step_size or 1.6 * max(coordinates, 1) ** (-1 / 6) / num_leapfrog**0.5
        self.log_step = self.first.new_zeros(units)
        self.rescale(self.first)
        self.accepted = self.first.new_zeros(chains, units)
        self.steps = 0
        self.moved = torch.zeros(chains, units, dtype=torch.bool, device=self.first.device)
        self.middle = self.first

    def rescale(self, state: Tensor) -> None:
        """Take L from the spread of the chains, and begin anew to look for a step size."""
        self.factor = spread(state, self.free)
        self.log_step = torch.full_like(self.log_step, self.initial).log()
        self.trials, self.kept = 0, []  # type: ignore[var-annotated]

    def adapt(self, acceptance: Tensor) -> None:
        """Robbins-Monro on the mean acceptance of the chains; the later half is averaged."""
        self.trials += 1
        # A power above 1/2 forgets the beginning, below 1 still moves; the gain lets a step shrink tenfold in two trials.
        self.log_step = self.log_step + 2.5 * self.trials**-0.6 * (acceptance.mean(0) - self.target)
        self.kept.append(self.log_step)

    def settle(self, state: Tensor) -> None:
        """Adaptation is over: what follows is recorded."""
        if not self.fixed and self.kept:
            self.log_step = torch.stack(self.kept[len(self.kept) // 2 :]).mean(0)
        self.middle = state

    def step(self, coordinates: Values, adapting: bool, known: tuple[Tensor, Tensor] | None) -> tuple:
        """One step; returns the new coordinates, and their log density and gradient.

        :param known: log density and gradient at ``coordinates``, where nothing else has moved since
        """
        block, nesting = self.block, self.density.nesting
        state = block.pack(coordinates, nesting)
        log_p, grad = known or self.evaluate(coordinates, state)
        start, momentum, failed = (state, log_p, grad), torch.randn_like(state), self.density.failed
        kinetic = momentum.square().sum(-1) / 2
        # Now and then a far shorter step, whatever the state: it moves chains out of places too narrow for the usual one.
        short = torch.rand_like(log_p) < 0.1
        size = (self.log_step.exp() * torch.where(short, 0.1, 1.0)).unsqueeze(-1)
        if self.num_leapfrog > 1:
            size = size * (0.8 + 0.4 * torch.rand_like(size))  # no trajectory closes on itself every time
        for _ in range(self.num_leapfrog):
            momentum = momentum + size / 2 * times(self.factor, grad, transposed=True)
            state = state + size * times(self.factor, momentum)
            log_p, grad = self.evaluate(coordinates, state)
            momentum = momentum + size / 2 * times(self.factor, grad, transposed=True)
        ratio = log_p - momentum.square().sum(-1) / 2 - start[1] + kinetic
        if self.density.failed > failed:
            # A singular matrix somewhere on the way; whose it is, torch does not say, so nobody moves. Each chain's way back
            # passes the same places, so this keeps the balance; going on from there would not.
            ratio = torch.full_like(ratio, -torch.inf)
        acceptance = ratio.clamp(max=0).exp().nan_to_num(0.0)
        accept = torch.rand_like(acceptance) < acceptance
        state, grad = (
            torch.where(accept.unsqueeze(-1), new, old) for new, old in ((state, start[0]), (grad, start[2]))
        )
        log_p = torch.where(accept, log_p, start[1])
        self.moved |= accept
        if adapting:
            # The short steps are accepted more often and say nothing of the usual ones.
            usual = (~short).sum(0)
            mean = torch.where(short, 0.0, acceptance).sum(0) / usual.clamp(min=1)
            self.adapt(torch.where(usual > 0, mean, self.target).unsqueeze(0))
        else:
            self.accepted += acceptance
            self.steps += 1
        moved = self.density.canonical(block.unpack(state, coordinates, nesting))
        return coordinates | moved, (log_p, grad)

    def evaluate(self, coordinates: Values, state: Tensor) -> tuple[Tensor, Tensor]:
        """Log density of every unit and its gradient; where it is no number, the density is zero and nothing pulls."""
        state = state.detach().requires_grad_()
        values = coordinates | self.block.unpack(state, coordinates, self.density.nesting)
        grad = torch.zeros_like(state)
        with torch.enable_grad():
            try:
                log_p = self.block.total(self.density.parts(values), self.density.nesting)
            except (RuntimeError, ValueError) as error:
                if not is_singular(error):
                    raise
                self.density.failed += 1
                return state.new_full(state.shape[:2], -torch.inf), grad
            if log_p.requires_grad:
                grad = torch.autograd.grad(log_p.sum(), state, allow_unused=True)[0]
                grad = torch.zeros_like(state) if grad is None else grad
        log_p = log_p.detach()
        return torch.where(log_p.isnan(), -torch.inf, log_p), grad.nan_to_num(0.0, 0.0, 0.0)

    def report(self, coordinates: Values) -> BlockReport:
        """What happened; see :class:`BlockReport`."""
        block = self.block
        last = block.pack(coordinates, self.density.nesting)
        free = self.free.all(0)
        memory = shift = widening = None
        if len(last) >= _ENOUGH and bool(free.any()):
            first, middle, last_sd = (
                self.first,
                self.middle,
                last.std(0).clamp(min=torch.finfo(last.dtype).tiny),
            )
            product = ((middle - middle.mean(0)) * (last - last.mean(0))).sum(0) / (len(last) - 1)
            memory = float(
                (product / (middle.std(0).clamp(min=torch.finfo(last.dtype).tiny) * last_sd))[free].mean()
            )
            shift = float(((last.mean(0) - first.mean(0)) / last_sd)[free].square().mean().sqrt())
            widening = float((last_sd.log() - first.std(0).log())[free].mean().exp())
        moving = self.free.any(-1)
        return BlockReport(
            name=block.name,
            plates=tuple(plate.name for plate in block.plates),
            acceptance=(self.accepted.mean(0) / max(self.steps, 1)).reshape(block.sizes),
            step_size=self.log_step.exp().reshape(block.sizes),
            unmoved=float((~self.moved & moving).sum() / moving.sum().clamp(min=1)),
            memory=memory,
            shift=shift,
            spread=widening,
        )


def spread(state: Tensor, free: Tensor) -> Tensor:
    """L of every unit, ``(units, k, k)``, or ``(units, k)`` where it is diagonal; zero for coordinates that must not move.

    Spreads and correlations of a few chains are noisy: spreads are drawn towards those of all units, correlations to 0.
    """
    chains, units, k = state.shape
    free = free.all(0)
    centred = state - state.mean(0)
    variance = centred.square().sum(0) / max(chains - 1, 1)
    # Medians, since latents of some units may be spread over orders of magnitude.
    pooled = variance.median(0, keepdim=True).values
    if chains < 2 and units > 1:
        low, high = state[0].quantile(torch.tensor([0.25, 0.75]).to(state), 0)
        pooled = ((high - low) / 1.349).square().unsqueeze(0)
    variance = (chains - 1) / (chains + 1) * variance + 2 / (chains + 1) * pooled
    tiny = torch.finfo(state.dtype).eps ** 2
    variance = torch.where(variance > tiny, variance, torch.where(pooled > tiny, pooled, 1.0)).expand(
        units, k
    )
    sd = variance.sqrt()
    if not 1 < k <= DENSE or chains < 3:
        return sd * free
    z = centred / sd * free
    trust = chains / (chains + k + 2)
    correlation = trust * torch.einsum("cui,cuj->uij", z, z) / (chains - 1)
    correlation.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    factor, failed = torch.linalg.cholesky_ex(correlation)
    factor = torch.where((failed == 0)[:, None, None], factor, torch.eye(k).to(factor))
    return factor * (sd * free).unsqueeze(-1) * free.unsqueeze(-2)


def times(factor: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """L x or Lᵀ x for ``x`` of shape ``(chains, units, k)``."""
    if factor.dim() == 2:
        return factor * x
    return torch.einsum("uji,cuj->cui" if transposed else "uij,cuj->cui", factor, x)


def run_chains(density: Density, chains: list[BlockChains], coordinates: Values, num_steps: int) -> Values:
    """All steps: the first half adapts, the second is recorded. Blocks take turns, each given the others."""
    known = None
    fixed = any(one.fixed for one in chains)
    adapting = 0 if fixed else num_steps // 2
    for i in range(num_steps):
        if i == adapting:
            for one in chains:
                one.settle(one.block.pack(coordinates, density.nesting))
        elif i < adapting and i in (adapting // 4, adapting // 2) and i:
            for one in chains:
                one.rescale(one.block.pack(coordinates, density.nesting))
        for one in chains:
            coordinates, known = one.step(coordinates, i < adapting, known if len(chains) == 1 else None)
    return coordinates


def restarted(density: Density, blocks: list[Block]) -> tuple[Values, int]:
    """Starts where the density is positive: those of zero density are replaced by other chains' starts for the same data.

    :raises ProgramError: no draw of some data has a positive density
    """
    plates = frozenset.intersection(*[frozenset(block.plates) for block in blocks])
    order = tuple(sorted(plates, key=lambda plate: plate.dim))
    whole = Block(tuple(density.latents), order, frozenset(density.sites))
    scored = frozenset.union(*[block.scored for block in blocks])
    parts = density.parts(density.start)
    total = Block(whole.sites, order, scored).total(parts, density.nesting).detach()
    state = whole.pack(density.start, density.nesting)
    bad = ~total.isfinite() | ~state.isfinite().all(-1)
    if not bool(bad.any()):
        return density.start, 0
    if bool(bad.all(0).any()):
        unit = int(bad.all(0).nonzero()[0])
        wrong = [n for n in density.latents if not bool(density.start[n].isfinite().all())]
        wrong += [n for n in sorted(scored) if not bool(parts[n].isfinite().all())]
        where = f"slice {unit} of plates {[p.name for p in order]}" if order else "the data"
        raise ProgramError(
            f"none of the {density.chains} draws of {where} has a finite log density; sites that are not finite: "
            f"{list(dict.fromkeys(wrong))}. A chain cannot start there: give draws inside the supports, or a likelihood "
            "that is positive near them; data that are NaN must be masked"
        )
    # Among the chains that are good, one at random for each that is not.
    donors = torch.where(bad, -1.0, torch.rand_like(total)).argsort(0, descending=True)
    good = (~bad).sum(0)
    pick = (torch.rand_like(total) * good).long().clamp(max=density.chains - 1)
    own = torch.arange(density.chains, device=bad.device).unsqueeze(-1).expand_as(bad)
    index = torch.where(bad, donors.gather(0, pick), own)
    state = state.gather(0, index.unsqueeze(-1).expand_as(state))
    return whole.unpack(state, density.start, density.nesting), int(bad.sum())
