"""Is the posterior guide calibrated, support by support? And the guide of ``Trace_Sinkhorn``, which is no posterior?

    python benchmarks/posterior_calibration.py
    python benchmarks/posterior_calibration.py --smoke-test

Programs with latents on different supports. Each is calibrated by ``SinkhornProgram.calibrate``; then 1000 fresh simulations
are made, and simulation-based calibration asks whether the true latents are exchangeable with the guide's 99 draws for each.
A report ranks every coordinate of every latent, those of unit vectors and of simplices too, and rejects a right posterior
with probability 1e-3. Beside: the ``AutoImplicit`` guide of the same program, fitted by ``Trace_Sinkhorn``
(``TraceEnum_Sinkhorn`` where latents are discrete) with default settings to 2000 simulated data. A program with globals has
no such row: ``Trace_Sinkhorn``'s guide gives globals one law for all data sets.

The same check on 1000 further simulations comes in ``repeated``: one pass in two would be luck. A run that is killed goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _resume import Rows
from torch import Tensor

from pyro_sinkhorn import AutoImplicit, SinkhornProgram, Trace_Sinkhorn, TraceEnum_Sinkhorn
from pyro_sinkhorn.diagnostics import (
    expected_coverage,
    posterior_contraction,
    simulation_based_calibration,
    tarp,
)
from pyro_sinkhorn.diagnostics.simulated_posterior import posterior_of_simulations
from pyro_sinkhorn.distributions import HypersphericalUniform
from pyro_sinkhorn.ot import ConvergenceWarning

LEVEL = 1e-3


def normal_vector(x: Tensor) -> None:
    """Three normals, of which two mixtures are seen."""
    mixing = torch.tensor([[1.0, 0.5, -0.5], [0.0, 1.0, 1.0]])
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ mixing.T, 0.5).to_event(1), obs=x)


def simplex(x: Tensor) -> None:
    """A composition, seen as 20 counts."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Dirichlet(torch.tensor([0.7, 1.0, 2.0])))
        pyro.sample("x", dist.Multinomial(20, z), obs=x)


def interval(x: Tensor) -> None:
    """An angle of incidence in an interval, seen through its sine."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(-1.0, 2.0))
        pyro.sample("x", dist.Normal(z.sin(), 0.3), obs=x)


def positive(x: Tensor) -> None:
    """A rate and a scale above four measurements."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.5))
        loc, scale = rate.unsqueeze(-1).expand(*rate.shape, 4), scale.unsqueeze(-1)
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


def sphere(x: Tensor) -> None:
    """A direction, seen with noise."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", HypersphericalUniform(3))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def mixture(x: Tensor) -> None:
    """A cluster, a place in it, and a noisy look."""
    means = torch.tensor([[-2.0, 0.0], [0.0, 1.5], [1.5, -0.5]])
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
        z = pyro.sample("z", dist.Normal(means[c], 0.7).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.7).to_event(1), obs=x)


def hierarchy(x: Tensor) -> None:
    """A mean and a spread above eight groups."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(-0.5, 0.5))
    with pyro.plate("groups", len(x)):
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@dataclass(frozen=True)
class Case:
    """A program, data of its shape (one row is enough), and the loss whose guide is compared."""

    model: Callable[[Tensor], None]
    row: Tensor
    sinkhorn: Callable[[], Any] | None = Trace_Sinkhorn


CASES = {
    "normal vector": Case(normal_vector, torch.zeros(2)),
    "simplex": Case(simplex, torch.tensor([20.0, 0.0, 0.0])),
    "interval": Case(interval, torch.tensor(0.0)),
    "positive": Case(positive, torch.zeros(4)),
    "sphere": Case(sphere, torch.zeros(3)),
    "mixture, discrete and continuous": Case(mixture, torch.zeros(2), TraceEnum_Sinkhorn),
    "hierarchy, globals and locals": Case(hierarchy, torch.tensor(0.0), None),
}


def check(
    case: Case, program: SinkhornProgram, guide: Any, seed: int, num: int, draws: int
) -> dict[str, Any]:
    """Ranks, coverage, TARP and contraction on fresh simulations."""
    rows = 8 if case.sinkhorn is None else num
    shape = case.row.expand(rows, *case.row.shape)
    pyro.set_rng_seed(seed)
    with program.active():
        drawn = posterior_of_simulations(case.model, guide, shape, num_simulations=num, num_draws=draws)
    report = simulation_based_calibration(drawn, LEVEL)
    coverage, distance = expected_coverage(drawn, level=LEVEL), tarp(drawn, level=LEVEL)
    return {
        "passed": report.passed,
        "p_value": report.p_value,
        "failed": {c.name: c.verdict for c in report.quantities if not c.passed},
        "largest_shift": max(abs(c.mean) for c in report.quantities),
        "largest_spread": max(abs(c.spread) for c in report.quantities),
        "spread": {c.name: c.spread for c in report.quantities},
        "shift": {c.name: c.mean for c in report.quantities},
        "coverage_passed": coverage.passed,
        "tarp_passed": distance.passed,
        "contraction_passed": posterior_contraction(drawn).passed,
    }


def posterior(case: Case, seed: int, steps: int, num: int, draws: int) -> dict[str, Any]:
    """AutoPosterior, calibrated."""
    program = SinkhornProgram(case.model)
    rows = 8 if case.sinkhorn is None else 256
    began = time.perf_counter(), time.process_time()
    program.calibrate(case.row.expand(rows, *case.row.shape), num_steps=steps, seed=seed, progress=False)
    cost = {"seconds": time.perf_counter() - began[0], "cpu_seconds": time.process_time() - began[1]}
    assert program.calibration is not None
    guide = program.calibration.guide
    found = check(case, program, guide, seed + 100, num, draws)
    again = check(case, program, guide, seed + 200, num, draws)
    return cost | found | {"repeated": again}


def encoder(case: Case, seed: int, steps: int, num: int, draws: int) -> dict[str, Any]:
    """AutoImplicit, fitted by matching its draws to the prior."""
    assert case.sinkhorn is not None
    pyro.set_rng_seed(seed)
    rows = case.row.expand(2000, *case.row.shape)
    x = SinkhornProgram(case.model, AutoImplicit, case.sinkhorn()).generate(1, rows, seed=seed + 300)["x"][0]
    program = SinkhornProgram(case.model, AutoImplicit, case.sinkhorn())
    began = time.perf_counter(), time.process_time()
    program.fit(x, num_steps=steps, seed=seed, progress=False)
    cost = {"seconds": time.perf_counter() - began[0], "cpu_seconds": time.process_time() - began[1]}
    return cost | check(case, program, program.guide, seed + 100, num, draws)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke-test", action="store_true")
    parser.add_argument("--steps", type=int, default=2000, help="of every calibration")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--guide", choices=["AutoPosterior", "AutoImplicit"], help="rows of one of them only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    smoke = options.smoke_test
    steps, seeds, num, draws = (4, [0], 50, 99) if smoke else (options.steps, options.seeds, 1000, 99)
    settings = {"simulations": num, "draws": draws, "level": LEVEL}
    rows = Rows("posterior_calibration", settings, ["program", "guide", "seed", "steps"], keep=not smoke)
    fit_steps = 4 if smoke else 2000  # the default of fit
    wanted = ["AutoPosterior", "AutoImplicit"] if options.guide is None else [options.guide]
    for seed, guide, (name, case) in itertools.product(seeds, wanted, CASES.items()):
        if guide == "AutoPosterior":
            rows.make(
                lambda c=case, s=seed: posterior(c, s, steps, num, draws),
                program=name, guide=guide, seed=seed, steps=steps,
            )  # fmt: skip
        elif case.sinkhorn is not None:
            rows.make(
                lambda c=case, s=seed: encoder(c, s, fit_steps, num, draws),
                program=name, guide=guide, seed=seed, steps=fit_steps,
            )  # fmt: skip


if __name__ == "__main__":
    main()
