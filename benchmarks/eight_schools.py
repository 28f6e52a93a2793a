"""Eight schools, amortised over data sets, beside the reference posterior of posteriordb.

    python benchmarks/eight_schools.py
    python benchmarks/eight_schools.py --smoke-test

mu ~ N(0, 5), tau ~ HalfCauchy(5), theta_j ~ N(mu, tau), y_j ~ N(theta_j, sigma_j). The guide sees simulated data sets only;
then the classic data. Goals: posterior means within .15 reference standard deviations, standard deviations within 15%.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _report import RESULTS, write
from torch import Tensor

from pyro_sinkhorn import SinkhornProgram

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
#: Mean and standard deviation of 10,000 reference draws (posteriordb, eight_schools, non-centred).
REFERENCE = {
    "mu": [(4.411, 3.309)],
    "tau": [(3.602, 3.198)],
    "theta": [
        (6.151, 5.616),
        (4.940, 4.645),
        (3.906, 5.280),
        (4.796, 4.771),
        (3.614, 4.614),
        (4.051, 4.796),
        (6.317, 5.003),
        (4.884, 5.317),
    ],
}


def schools(y: Tensor, sigma: Tensor) -> None:
    """The model, centred."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def compared(draws: dict[str, Tensor]) -> dict[str, list[float]]:
    """Error of every mean in reference standard deviations, and ratio of every standard deviation."""
    errors, ratios = [], []
    for name, reference in REFERENCE.items():
        for values, (mean, sd) in zip(draws[name].reshape(len(draws[name]), -1).T, reference, strict=True):
            errors.append(float(values.mean() - mean) / sd)
            ratios.append(float(values.std()) / sd)
    return {"error_in_sd": errors, "sd_ratio": ratios}


def run(seed: int, steps: int, num_samples: int) -> list[dict[str, Any]]:
    """One guide: its own draws, and these refined."""
    program = SinkhornProgram(schools)
    start, cpu = time.perf_counter(), time.process_time()
    program.calibrate(Y, SIGMA, num_steps=steps, seed=seed, progress=False)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    rows = []
    for refine_steps in (0, 200):
        start = time.perf_counter()
        draws = program.posterior(Y, SIGMA, num_samples=num_samples, seed=seed, refine_steps=refine_steps)
        took = time.perf_counter() - start
        found = compared(draws)
        row = {"seed": seed, "steps": steps, "refine_steps": refine_steps, "seconds": seconds}
        row |= {"cpu_seconds": cpu, "posterior_seconds": took, **found}
        row["worst_error"] = max(map(abs, found["error_in_sd"]))
        row["worst_ratio"] = max(abs(ratio - 1) for ratio in found["sd_ratio"])
        print(
            {key: row[key] for key in ("seed", "refine_steps", "worst_error", "worst_ratio", "seconds")},
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke_test:
        run(0, 20, 100)
        return
    path = RESULTS / "eight_schools.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    for seed in options.seeds:
        if not any(row["seed"] == seed for row in rows):
            rows += run(seed, options.steps, 10_000)
            write("eight_schools", {"rows": rows}, seeds=options.seeds)


if __name__ == "__main__":
    main()
