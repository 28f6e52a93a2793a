"""NUTS from a few of the draws, one chain after the other, through Pyro's own sampler."""

from __future__ import annotations

import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_sinkhorn.refinement.blocks import Block
from pyro_sinkhorn.refinement.chains import spread, times
from pyro_sinkhorn.refinement.density import Density, Values
from pyro_sinkhorn.refinement.report import BlockReport


def run_nuts(
    density: Density, block: Block, warmup: int, target: float, runs: int
) -> tuple[Values, tuple[BlockReport, ...], int]:
    """As many states as there were draws, from chains that start at some of them.

    NUTS moves in w with u = u₀ + L w, where L is the spread of the draws, and adapts a diagonal mass on top.
    """
    nesting = density.nesting
    first = block.pack(density.start, nesting)
    chains = len(first)
    free = block.pack(density.free, nesting)
    factor = spread(first, free)
    moving = free.all(0)  # (units, k)
    states: list[Tensor] = []
    rates, steps, divergences = [], [], 0
    share = [chains // runs + (i < chains % runs) for i in range(runs)]
    for i in torch.randperm(chains)[:runs].tolist():
        origin = first[i : i + 1]
        like = {name: value[:1] for name, value in density.start.items()}

        def coordinates_of(w: Tensor, origin: Tensor = origin, like: Values = like) -> tuple[Tensor, Values]:
            whitened = torch.zeros_like(origin)
            whitened[:, moving] = w
            state = origin + times(factor, whitened)
            return state, like | block.unpack(state, like, nesting)

        def potential(params: Values) -> Tensor:
            return -block.total(density.parts(coordinates_of(params["w"])[1]), nesting).sum()

        kernel = NUTS(potential_fn=potential, target_accept_prob=target)
        mcmc = MCMC(
            kernel,
            num_samples=share[len(states)],
            warmup_steps=warmup,
            initial_params={"w": first.new_zeros(int(moving.sum()))},
            disable_progbar=True,
        )
        mcmc.run()
        found = mcmc.get_samples()["w"]
        states.append(torch.cat([coordinates_of(w)[0] for w in found]).detach())
        told = mcmc.diagnostics() if len(found) > 3 else {}
        rates.append(told.get("acceptance rate", {}).get("chain 0", float("nan")))
        divergences += len(told.get("divergences", {}).get("chain 0", []))
        steps.append(kernel.step_size)
    state = torch.cat(states)
    coordinates = density.start | block.unpack(state, density.start, nesting)
    report = BlockReport(
        name=block.name,
        plates=(),
        acceptance=torch.tensor(rates).mean(),
        step_size=torch.tensor(steps).mean(),
        unmoved=0.0,
        memory=None,
        shift=None,
        spread=None,
    )
    return coordinates, (report,), divergences
