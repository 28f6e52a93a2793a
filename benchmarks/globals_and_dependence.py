"""Two programs with exact answers: a global above the latents, and a latent that depends on another.

    python benchmarks/globals_and_dependence.py
    python benchmarks/globals_and_dependence.py --smoke-test

*Global*: mu ~ N(0, 5), z_i ~ N(mu, .5), x_i ~ N(z_i, .5), 200 data shifted so that the exact posterior of mu has mean 2.890.
*Dependence*: z1 ~ N(0, 1), z2 ~ N(z1, .2), x ~ N(z1, .5): standard deviation of z2 - z1 under the aggregated posterior.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _report import write
from pyro.infer import SVI
from torch import Tensor

from pyro_sinkhorn import AutoImplicit, Trace_Sinkhorn
from pyro_sinkhorn.ot import ConvergenceWarning

N = 200
PRECISION = N / 0.5 + 1 / 25
EXACT_MEAN, EXACT_SD = 2.890, PRECISION**-0.5


def hierarchy(x: Tensor) -> None:
    """One global above 200 locals."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 0.5))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def chain(x: Tensor) -> None:
    """Two dependent locals, of which the data show one."""
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.sample("z2", dist.Normal(z1, 0.2))
        pyro.sample("x", dist.Normal(z1, 0.5), obs=x)


def fit(model: Any, x: Tensor, batch: int, steps: int, lr: float, seed: int, **options: Any) -> AutoImplicit:
    """A guide fitted with Adam and a cosine schedule."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoImplicit(model)
    optim = pyro.optim.CosineAnnealingLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "T_max": steps}
    )
    svi = SVI(model, guide, optim, Trace_Sinkhorn(**options))
    for _ in range(steps):
        svi.step(x[torch.randperm(len(x))[:batch]])
        optim.step()
    return guide


def run_global(prior_weight: float, seed: int, steps: int) -> dict[str, Any]:
    """Mean and standard deviation of the guide of mu."""
    x = 3 + 0.7 * torch.randn(N, generator=torch.Generator().manual_seed(0))
    x = x + EXACT_MEAN * PRECISION / (N / 0.5) - x.mean()
    mu = fit(hierarchy, x, N, steps, 1e-2, seed, prior_weight=prior_weight).global_guides[0]
    return {"prior_weight": prior_weight, "seed": seed, "mean": float(mu.loc), "sd": float(mu.scale)}


def run_dependence(groups: str, seed: int, steps: int) -> dict[str, Any]:
    """Standard deviation of z2 - z1 over 10,000 draws."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, generator=generator) + 0.5 * torch.randn(512, generator=generator)
    guide = fit(chain, x, 256, steps, 5e-3, seed, prior_weight=100.0, groups=groups)
    with torch.no_grad():
        z = guide(x.repeat(20))
    return {"groups": groups, "seed": seed, "sd_of_difference": float((z["z2"] - z["z1"]).std())}


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    steps, seeds = (3, [0]) if options.smoke_test else (1500, [0, 1, 2])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    rows: dict[str, list[dict[str, Any]]] = {"global": [], "dependence": []}
    for seed in seeds:
        for weight in (1.0, 10.0, 100.0):
            rows["global"].append(run_global(weight, seed, steps))
            print(rows["global"][-1], flush=True)
        for groups in ("joint", "marginal"):
            rows["dependence"].append(run_dependence(groups, seed, steps))
            print(rows["dependence"][-1], flush=True)
    if not options.smoke_test:
        exact = {"mean": EXACT_MEAN, "sd": EXACT_SD, "sd_of_difference": 0.2}
        write("globals_and_dependence", {"exact": exact, "steps": steps, **rows}, seeds=seeds)


if __name__ == "__main__":
    main()
