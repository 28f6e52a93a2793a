"""Three tasks of sbibm (Lueckmann et al. 2021): a posterior guide beside neural posterior estimation.

    python benchmarks/sbibm.py --data-dir DIR              # needs `pip install sbi` for the second
    python benchmarks/sbibm.py --own                       # observations simulated here, with exact posteriors
    python benchmarks/sbibm.py --smoke-test

Two moons, Gaussian linear, Gaussian mixture; 10,000 and 100,000 simulations; the classifier two-sample test of sbibm between
2000 reference draws and 2000 of the method, for ten observations. Settings were chosen on observations simulated by ``--own``
alone. Rows are written as they are done; those in the result file are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _report import RESULTS, write
from torch import Tensor

from pyro_sinkhorn import Implicit, SinkhornProgram
from pyro_sinkhorn.diagnostics import c2st

STEPS = {10_000: 6000, 100_000: 10_000}


@dataclass(frozen=True)
class Task:
    """A prior, a simulator, and exact posterior draws given one observation."""

    prior: Callable[[], Any]
    simulate: Callable[[Tensor], Tensor]
    posterior: Callable[[Tensor, int], Tensor]

    def program(self, x: Tensor) -> None:
        """The task in Pyro: parameters of every datum, and a simulator without likelihood."""
        with pyro.plate("data", len(x)):
            theta = pyro.sample("theta", self.prior())
            pyro.sample("x", Implicit(self.simulate(theta), event_dim=1), obs=x)


def crescent(shape: torch.Size) -> Tensor:
    """The noise of two moons."""
    angle = math.pi * (torch.rand(shape) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(shape)
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1)


def moons(theta: Tensor) -> Tensor:
    """Two moons."""
    shift = torch.stack([-theta.sum(-1).abs(), theta[..., 1] - theta[..., 0]], -1) / math.sqrt(2)
    return crescent(theta.shape[:-1]) + shift


def moons_posterior(x: Tensor, num: int) -> Tensor:
    """Exact draws: noise is drawn and the simulator inverted; two solutions each, those outside the prior are dropped."""
    found: list[Tensor] = []
    while sum(map(len, found)) < num:
        noise = crescent(torch.Size([20_000]))
        total, difference = noise[:, 0] - x[0], x[1] - noise[:, 1]
        total, difference = total[total >= 0], difference[total >= 0]
        total = total * (2 * torch.randint(0, 2, total.shape) - 1)
        theta = torch.stack([total - difference, total + difference], -1) / math.sqrt(2)
        found.append(theta[(theta.abs() <= 1).all(-1)])
    return torch.cat(found)[:num]


def mixed(theta: Tensor) -> Tensor:
    """Gaussian mixture: a wide or a narrow normal around theta."""
    scale = torch.where(torch.rand(theta.shape[:-1]) < 0.5, 1.0, 0.1).unsqueeze(-1)
    return theta + scale * torch.randn(theta.shape)


def mixed_posterior(x: Tensor, num: int) -> Tensor:
    """Exact draws: the mixture around x, cut off at the prior's box."""
    found: list[Tensor] = []
    while sum(map(len, found)) < num:
        theta = mixed(x.expand(20_000, 2))
        found.append(theta[(theta.abs() <= 10).all(-1)])
    return torch.cat(found)[:num]


TASKS = {
    "two_moons": Task(lambda: dist.Uniform(-torch.ones(2), 1.0).to_event(1), moons, moons_posterior),
    "gaussian_linear": Task(
        lambda: dist.Normal(torch.zeros(10), 0.1**0.5).to_event(1),
        lambda theta: theta + 0.1**0.5 * torch.randn(theta.shape),
        lambda x, num: x / 2 + 0.05**0.5 * torch.randn(num, 10),
    ),
    "gaussian_mixture": Task(
        lambda: dist.Uniform(-10 * torch.ones(2), 10.0).to_event(1), mixed, mixed_posterior
    ),
}

Sampler = Callable[[Tensor, int], Tensor]


def guide(task: Task, budget: int, seed: int, steps: int) -> Sampler:
    """Ours: ``calibrate`` with a fixed number of simulations, defaults else."""
    pyro.set_rng_seed(seed)
    program = SinkhornProgram(task.program)
    like = task.simulate(task.prior().sample((2,)))
    program.calibrate(like, num_steps=steps, num_simulations=budget, seed=seed, progress=False)

    def sample(x: Tensor, num: int) -> Tensor:
        return program.posterior(x.unsqueeze(0), num_samples=num, seed=seed, check_range=False)["theta"][:, 0]

    return sample


def neural_posterior(density: str) -> Callable[[Task, int, int, int], Sampler]:
    """Neural posterior estimation by sbi, its defaults with one of its density estimators."""

    def fit(task: Task, budget: int, seed: int, steps: int) -> Sampler:
        from sbi.inference import NPE  # type: ignore[import-not-found]

        torch.manual_seed(seed)
        prior = task.prior()
        theta = prior.sample((budget,))
        inference = NPE(_torch_prior(prior), density_estimator=density, show_progress_bars=False)
        inference.append_simulations(theta, task.simulate(theta))
        limit = {"max_num_epochs": 2} if steps < 100 else {}
        inference.train(**limit)
        posterior = inference.build_posterior()
        return lambda x, num: posterior.sample((num,), x=x, show_progress_bars=False)

    return fit


def _torch_prior(prior: Any) -> Any:
    """The same prior in torch's own classes, which sbi wants."""
    base = prior.base_dist
    if isinstance(base, torch.distributions.Uniform):
        inner: Any = torch.distributions.Uniform(base.low, base.high)
    else:
        inner = torch.distributions.Normal(base.loc, base.scale)
    return torch.distributions.Independent(inner, 1)


METHODS: dict[str, Callable[[Task, int, int, int], Sampler]] = {
    "guide": guide,
    "npe_maf": neural_posterior("maf"),
    "npe_nsf": neural_posterior("nsf"),  # slow: by name only
}


def observations(task: Task, name: str, options: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Ten observations, each with 2000 reference draws."""
    if options.data_dir is None:
        torch.manual_seed(777)
        data = task.simulate(task.prior().sample((10,)))
        return [(x, task.posterior(x, 2000)) for x in data]
    held = np.load(Path(options.data_dir) / f"{name}.npz")
    return [
        (
            torch.as_tensor(held[f"observation_{j}"], dtype=torch.float32).reshape(-1),
            torch.as_tensor(held[f"reference_samples_{j}"], dtype=torch.float32),
        )
        for j in range(1, 11)
    ]


def run(name: str, method: str, budget: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once, and score all observations."""
    task, steps = TASKS[name], 20 if options.smoke_test else options.steps or STEPS[budget]
    start, cpu = time.perf_counter(), time.process_time()
    sampler = METHODS[method](task, 400 if options.smoke_test else budget, seed, steps)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    pairs = observations(task, name, options)[: 1 if options.smoke_test else 10]
    num = 100 if options.smoke_test else 2000
    scores = []
    for x, reference in pairs:
        with torch.no_grad():
            drawn = sampler(x, num)
        scores.append(c2st(reference[:num], drawn, seed=1).value)
    row = {"task": name, "method": method, "simulations": budget, "seed": seed, "c2st": scores}
    row |= {"mean": float(np.mean(scores)), "steps": steps if method == "guide" else None}
    return row | {"seconds": seconds, "cpu_seconds": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", help="holds two_moons.npz, gaussian_linear.npz, gaussian_mixture.npz")
    parser.add_argument("--own", action="store_true", help="observations simulated here")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="*", default=["guide", "npe_maf"], choices=list(METHODS))
    parser.add_argument("--budgets", nargs="*", type=int, default=list(STEPS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="of the guide; default by budget")
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    if options.data_dir is None and not (options.own or options.smoke_test):
        parser.error("give --data-dir, or --own for observations simulated here")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.smoke_test:
        print(run("two_moons", "guide", 10_000, 0, options))
        return
    name = "sbibm" if options.data_dir else "sbibm_own"
    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    for budget in options.budgets:
        for task in options.tasks:
            for method in options.methods:
                for seed in options.seeds:
                    key = (task, method, budget, seed)
                    if any((r["task"], r["method"], r["simulations"], r["seed"]) == key for r in rows):
                        continue
                    rows.append(run(task, method, budget, seed, options))
                    print({k: v for k, v in rows[-1].items() if k != "c2st"}, flush=True)
                    write(name, {"rows": rows}, seeds=options.seeds, packages=["sbi", "scikit-learn"])


if __name__ == "__main__":
    main()
