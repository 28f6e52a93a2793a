"""Learning a program whose posterior has two modes, and being calibrated about it.

    python benchmarks/learning_and_calibration.py
    python benchmarks/learning_and_calibration.py --smoke-test

z ~ N(0, I_2), x1 ~ N(z1 + z2 / 2, s), x2 ~ N(theta z2^2, s), with theta and s to be learned from 2000 data. Given x, z2 is
near +a or -a, and z1 goes with it: two modes of unequal weight. Three cases: *mild*, theta = 1 and s = .6, from 2 and 1;
*sharp*, 1.5 and .3, from 3 and .6, where z2 is known within a few hundredths but for its sign; *narrow start*, the same from .5
and 1, where the data lie outside of what the program simulates at first.

Beside each other, with the same steps, batches and learning rates, and networks of the same layers: ``Trace_EnergyScore`` with
its guide, and ``Trace_ELBO`` with normal guides, of independent coordinates and of full covariance. The guide of the first is
calibrated for 300 steps before the program learns, since the wake step believes whatever the guide says; the others get as
many steps in all. The maximum likelihood estimate on the same data, by quadrature over z2, says what could be learned at
best. Calibration of each guide is that of its *own* fitted program: data are simulated from it (1000, and 99 draws for each).

A run that is killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import time
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _resume import Rows
from pyro.nn import PyroModule
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import softplus

from pyro_sinkhorn import AutoPosterior, SinkhornProgram, Trace_EnergyScore
from pyro_sinkhorn.diagnostics import expected_coverage, simulation_based_calibration, tarp
from pyro_sinkhorn.diagnostics.simulated_posterior import posterior_of_simulations
from pyro_sinkhorn.guide.encoder import Standardise
from pyro_sinkhorn.guide.posterior_networks import ResidualHead

#: Truth and start of theta and s.
CASES = {
    "mild": ((1.0, 0.6), (2.0, 1.0)),
    "sharp": ((1.5, 0.3), (3.0, 0.6)),
    "narrow start": ((1.5, 0.3), (0.5, 1.0)),
}
NAMES = ("theta", "s")
LEVEL = 1e-3


def model(x: Tensor, case: str) -> None:
    """Two latents, of which the second is seen through its square."""
    positive = dist.constraints.positive
    theta, s = (
        pyro.param(name, torch.tensor(value), constraint=positive)
        for name, value in zip(NAMES, CASES[case][1], strict=True)
    )
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = torch.stack([z[..., 0] + z[..., 1] / 2, theta * z[..., 1].square()], -1)
        pyro.sample("x", dist.Normal(loc, s).to_event(1), obs=x)


def simulate(n: int, case: str, seed: int) -> Tensor:
    """Data of the truth."""
    theta, s = CASES[case][0]
    rng = torch.Generator().manual_seed(seed)
    z, noise = torch.randn(n, 2, generator=rng), torch.randn(n, 2, generator=rng)
    loc = torch.stack([z[:, 0] + z[:, 1] / 2, theta * z[:, 1].square()], -1)
    return loc + s * noise


class NormalGuide(PyroModule):
    """A normal law of the latents given x, its mean and spread by the network that AutoPosterior has."""

    def __init__(self, x: Tensor, full: bool) -> None:
        super().__init__()
        self.full = full
        self.standardise = Standardise(2, where_heavy=True)
        self.standardise.fit(x)
        self.head = ResidualHead(2, 0, 5, hidden=128, depth=3)

    def forward(self, x: Tensor) -> None:
        """Sample z."""
        raw = self.head(self.standardise(x), None)
        loc, scale = raw[..., :2], softplus(raw[..., 2:4]) + 1e-4
        tril = torch.diag_embed(scale)
        if self.full:
            below = torch.zeros_like(tril)
            below[..., 1, 0] = 1.0
            tril = tril + below * raw[..., 4, None, None]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))


def likelihood_estimate(x: Tensor) -> dict[str, float]:
    """Maximum likelihood by quadrature over z2; z1 is integrated in closed form."""
    data = x.double().numpy()
    z, step = np.linspace(-5, 5, 2001, retstep=True)

    def loss(logs: np.ndarray) -> float:
        theta, s = np.exp(logs)
        total = 0.0
        for part in np.array_split(data, 8):
            log_p = -0.5 * (z**2 + (part[:, :1] - z / 2) ** 2 / (1 + s**2))
            log_p = log_p - 0.5 * ((part[:, 1:] - theta * z**2) / s) ** 2
            total += float(np.log(np.exp(log_p).sum(-1) * step).sum())
        return -total + len(data) * (0.5 * math.log(1 + s**2) + math.log(s))

    simplex = np.log([[0.8, 0.4], [1.6, 0.4], [0.8, 0.8]])
    options = {"xatol": 1e-4, "initial_simplex": simplex}
    found = minimize(loss, simplex[0], method="Nelder-Mead", options=options)
    theta, s = np.exp(found.x)
    return {"theta": float(theta), "s": float(s)}


def learning_rates(name: str) -> dict[str, float]:
    """Two numbers have farther to go than networks."""
    return {"lr": 5e-3 if name in NAMES else 1e-3}


def run(method: str, case: str, seed: int, steps: int, warm_up: int, num: int) -> dict[str, Any]:
    """One fit, what it learned, and whether its guide is calibrated."""
    x = simulate(2000, case, seed)
    started = functools.partial(model, case=case)
    began = time.perf_counter(), time.process_time()
    if method.startswith("Trace_EnergyScore"):
        loss = Trace_EnergyScore(wake_steps=10 if method.endswith("wake_steps=10") else 0)
        program = SinkhornProgram(started, AutoPosterior, loss)
        program.calibrate(x, num_steps=warm_up, seed=seed, progress=False)
    else:
        pyro.set_rng_seed(seed)
        guide = NormalGuide(x, full=method.endswith("full covariance"))
        program = SinkhornProgram(started, guide, pyro.infer.Trace_ELBO())
        steps = steps + warm_up
    optim = pyro.optim.CosineAnnealingLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": learning_rates,
            "T_max": steps,
        }
    )
    program.fit(x, num_steps=steps, batch_size=256, optim=optim, seed=seed, progress=False)
    cost = {"seconds": time.perf_counter() - began[0], "cpu_seconds": time.process_time() - began[1]}
    pyro.set_rng_seed(seed + 100)
    with program.active():
        learned = {name: float(pyro.param(name).detach()) for name in NAMES}
        drawn = posterior_of_simulations(started, program.guide, x[:num], num_simulations=num, num_draws=99)
    # Beside the coordinates: how far z2 is from 0, which both modes share, and what goes with the mode.
    further = {
        "z[1]^2": lambda z: z["z"][:, 1].square(),
        "z[0] z[1]": lambda z: z["z"].prod(-1),
    }
    report = simulation_based_calibration(drawn, LEVEL, further)
    return cost | {
        "learned": learned,
        "likelihood_estimate": likelihood_estimate(x),
        "passed": report.passed,
        "p_value": report.p_value,
        "p_values": {c.name: c.p_value for c in report.quantities},
        "failed": {c.name: c.verdict for c in report.quantities if not c.passed},
        "coverage_passed": expected_coverage(drawn, level=LEVEL).passed,
        "tarp_passed": tarp(drawn, level=LEVEL).passed,
    }


METHODS = (
    "Trace_EnergyScore",
    "Trace_EnergyScore, wake_steps=10",
    "Trace_ELBO, independent normals",
    "Trace_ELBO, full covariance",
)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke-test", action="store_true")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # a head without noise
    smoke = options.smoke_test
    steps, warm_up, seeds, num = (4, 2, [0], 60) if smoke else (options.steps, 300, options.seeds, 1000)
    settings = {"simulations": num, "level": LEVEL, "cases": CASES, "warm_up": warm_up}
    rows = Rows("learning_and_calibration", settings, ["method", "case", "seed", "steps"], keep=not smoke)
    for case, seed, method in itertools.product(options.cases, seeds, options.methods):
        rows.make(
            lambda m=method, c=case, s=seed: run(m, c, s, steps, warm_up, num),
            method=method, case=case, seed=seed, steps=steps,
        )  # fmt: skip


if __name__ == "__main__":
    main()
