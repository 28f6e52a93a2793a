"""Posterior draws of an amortised guide, refined by Markov chains."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import torch

from pyro_sinkhorn.errors import ProgramError, checked_integer
from pyro_sinkhorn.refinement.blocks import blocks_of
from pyro_sinkhorn.refinement.chains import BlockChains, restarted, run_chains
from pyro_sinkhorn.refinement.density import Density, Values, is_singular
from pyro_sinkhorn.refinement.nuts import run_nuts
from pyro_sinkhorn.refinement.report import Refined
from pyro_sinkhorn.rng import RandomStream

#: Acceptance at which many independent coordinates move fastest: Roberts and Rosenthal 1998; Beskos and others 2013, rounded
#: up as usual since a lower one is the costlier mistake; Hoffman and Gelman 2014.
_TARGETS = {"mala": 0.574, "hmc": 0.75, "nuts": 0.8}
_KERNELS = tuple(_TARGETS)


def refine(
    model: Callable[..., Any],
    draws: Values,
    *args: Any,
    num_steps: int = 100,
    kernel: str = "mala",
    num_leapfrog: int = 5,
    target_accept: float | None = None,
    step_size: float | None = None,
    joint: bool | None = None,
    parallel: bool | None = None,
    num_chains: int = 1,
    seed: int | None = None,
    **kwargs: Any,
) -> Refined:
    r"""Move draws of an approximate posterior towards the exact one, by chains that leave the exact one invariant.

    Every draw starts a chain of its own; all chains run side by side. They move in unconstrained coordinates u with
    z = T(u), in the density

    .. math:: \log p(T(u), x) + \log |\det \partial T / \partial u|,

    whose normalising constant is not needed. Without global latents the data are independent of each other, so each datum
    accepts its own moves, with a step size of its own. With global latents, a chain either moves all latents together, or
    blocks take turns: globals given locals, accepted by chain, then locals given globals, accepted by datum.

    **What the draws are.** Once adaptation is over, every step brings their law nearer to the posterior, or leaves it as near
    in total variation as it was; they are the same only in the limit. How near is not known after any finite number of
    steps: ``memory`` says how much of the start is left. Chains do not jump between separated modes: a mode that the guide
    missed is still missed, and the weights of modes stay those of the guide. Draws of one datum share adaptation, and are
    independent otherwise.

    **Cost.** MALA takes ``num_steps`` gradient evaluations, each for all chains and data together; HMC ``num_leapfrog`` times
    as many. With blocks in turns, every block takes these, and one more a step. The memory is that of the model at all
    draws at once; refine a part of the draws, or of the data, at a time where it is too much.

    :param model: a Pyro program whose latents are continuous and whose sites have densities. It runs under the current
        parameter store, and no parameter is changed
    :param draws: ``{site: (num_samples, *plates, *event)}`` for every latent, as ``encode``, ``posterior`` and
        :class:`pyro.infer.Predictive` return them
    :param args: arguments of the model; the data that the draws belong to
    :param num_steps: steps of every chain, at least 4. The first half adapts, the second is fixed. For "nuts", warm-up
        steps
    :param kernel: "mala", Langevin steps (the default: cheapest for good starts); "hmc", ``num_leapfrog`` gradient steps
        between acceptances, for correlated latents or starts far off; "nuts", :class:`pyro.infer.NUTS` on all latents
        jointly, from ``num_chains`` of the draws, one chain after the other: slow, for few data. Its draws are successive
        states of these chains, and depend on each other
    :param num_leapfrog: leapfrog steps of "hmc"
    :param target_accept: acceptance that adaptation aims at, between 0 and 1; default .574 for "mala", .75 for "hmc", .8
        for "nuts"
    :param step_size: a fixed one, in units of the draws' spread: nothing adapts, and all steps leave the posterior
        invariant, up to the dependence of that spread on the draws
    :param joint: with latents on several levels, whether they move together; otherwise blocks take turns. None moves them
        together where they are at most 64 coordinates (of one slice of the plates common to all): dependence between
        levels slows turns down, a large number of coordinates slows joint moves down
    :param parallel: whether chains run as one, in an outer plate, which wants a model that leaves room for dimensions on
        the left; None tries, compares with chains alone, and falls back to one after the other with a warning
    :param num_chains: runs of "nuts"
    :param seed: None draws from torch's global random state
    :raises ProgramError: naming the site: one without density (``Implicit``), a discrete latent, a support without
        coordinates (spheres), a sub-sampled plate, missing draws, draws of the wrong shape or outside of the support, a
        density that is random

    Sources: Roberts and Tweedie 1996 (MALA); Neal 2011 (HMC); Hoffman and Gelman 2014 (NUTS).

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> x = torch.tensor([-2.0, 0.0, 4.0])
    >>> narrow = {"z": 0.1 * torch.randn(200, 3)}
    >>> refined = refine(model, narrow, x, num_steps=60, seed=0)
    >>> refined.draws["z"].shape
    torch.Size([200, 3])
    >>> bool(((refined.draws["z"].mean(0) - x / 2).abs() < 0.3).all())
    True
    """
    began = time.perf_counter()
    num_steps = checked_integer("num_steps", num_steps, 4)
    num_leapfrog = checked_integer("num_leapfrog", num_leapfrog, 1)
    num_chains = checked_integer("num_chains", num_chains, 1)
    if kernel not in _KERNELS:
        raise ProgramError(f"kernel={kernel!r}: expected one of {', '.join(map(repr, _KERNELS))}")
    target = _TARGETS[kernel] if target_accept is None else target_accept
    if not 0 < target < 1:
        raise ProgramError(f"target_accept={target_accept!r}: expected a number between 0 and 1")
    if step_size is not None and not (step_size > 0 and kernel != "nuts"):
        raise ProgramError(
            f"step_size={step_size!r} with kernel={kernel!r}: expected a positive number, and 'mala' or 'hmc'"
        )
    with torch.enable_grad(), nullcontext() if seed is None else RandomStream(seed).active():
        density = _density(model, args, kwargs, draws, parallel)
        if density.reason:
            warnings.warn(
                f"the model cannot run in an outer plate of {density.chains} chains, so they run one after the other, which "
                f"takes about {density.chains} times as long: {density.reason}. Index dimensions from the right (x[..., i], "
                "sum(-1)) to avoid it, or pass parallel=False to say that it is meant",
                UserWarning,
                stacklevel=2,
            )
        with pyro.validation_enabled(False):
            blocks = blocks_of(density, True if kernel == "nuts" else joint)
            density.start, replaced = restarted(density, blocks)
            divergences, runs = 0, density.chains
            density.evaluations = 0
            if kernel == "nuts":
                runs = min(num_chains, density.chains)
                coordinates, reports, divergences = run_nuts(density, blocks[0], num_steps, target, runs)
            else:
                leapfrog = 1 if kernel == "mala" else num_leapfrog
                chains = [BlockChains(density, block, leapfrog, target, step_size) for block in blocks]
                coordinates = run_chains(density, chains, density.start, num_steps)
                reports = tuple(one.report(coordinates) for one in chains)
            evaluations = density.evaluations
            values = density.values(coordinates)
    refined = Refined(
        draws=values,
        kernel=kernel,
        blocks=reports,
        num_steps=num_steps,
        num_chains=runs,
        gradient_evaluations=evaluations,
        parallel=density.parallel,
        restarted=replaced,
        divergences=divergences,
        failed=density.failed,
        seconds=time.perf_counter() - began,
    )
    _warn(refined, target)
    return refined


def _density(model: Any, args: Any, kwargs: Any, draws: Values, parallel: bool | None) -> Density:
    try:
        return Density(model, args, kwargs, draws, parallel)
    except (RuntimeError, ValueError) as error:
        if not is_singular(error):
            raise
        text = str(error).partition("\n")[0]
        raise ProgramError(
            f"a matrix of the model cannot be factorised at the draws, where chains would start: {text}. Add a small "
            "multiple of the identity to it in the model"
        ) from error


def _warn(refined: Refined, target: float) -> None:
    for block in refined.blocks:
        poor = block.acceptance < target / 4
        # A slice in a hundred may be so by chance, with few chains; the table shows the lowest rate.
        if float(poor.double().mean()) > 0.01:
            slices = f"in {int(poor.sum())} of {poor.numel()} slices of {list(block.plates)}"
            warnings.warn(
                f"latents {block.name!r}: {slices if block.plates else 'for all chains'} the acceptance rate is below "
                f"{target / 4:.2f} (lowest {float(block.acceptance.min()):.3f}, target {target:.2f}): these draws have hardly "
                "moved. More steps, step_size=None, or starts that are less far off",
                UserWarning,
                stacklevel=3,
            )
