r"""What each way of debiasing costs at equal shrinkage.

A linear map of N(0, I) is fitted to N(0, I) by the divergence alone; its mean singular value should be 1. Same-batch debiasing
falls short by an amount that goes down with the batch, independent halves do not. So the question is not what a step costs at
equal batch, but at which batch ``self`` is as right as ``independent`` is at 128, and what a step costs there. Where
no measured batch suffices, the batch is extrapolated by the power law fitted to those measured, the time as a constant and a
part that grows with the entries of the matrix, and both are said to be.
"""

from __future__ import annotations

import math
import time
import warnings
from statistics import mean, median, stdev
from typing import Any

import torch
from _peers import chosen_backend
from _resume import Rows

DIMENSIONS, BATCHES, SEEDS = (2, 8, 32), (128, 256, 512, 1024), (0, 1, 2)
STEPS, LEARNING_RATE = 500, 2e-2
#: Of the mean cost between two prior draws, 2d: the losses' own default.
RELATIVE_EPSILON = 0.1
TARGETS = (0.1, 0.05, 0.02)

Record = dict[str, Any]


def fit(debias: str, d: int, batch: int, seed: int, backend: str, steps: int = STEPS) -> Record:
    """Fit the map; its singular values, and the processor time of a step."""
    from pyro_sinkhorn.ot import sinkhorn_divergence

    rng = torch.Generator().manual_seed(seed)
    matrix = (torch.randn(d, d, generator=rng) * 0.3 + torch.eye(d) * 0.7).requires_grad_()
    optimiser = torch.optim.Adam([matrix], LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    times = []
    for _ in range(steps):
        x = torch.randn(batch, d, generator=rng) @ matrix.mT
        y = torch.randn(batch, d, generator=rng)
        start = time.process_time()
        options: dict[str, Any] = {"debias": debias, "backend": backend, "generator": rng}
        loss = sinkhorn_divergence(x, y, RELATIVE_EPSILON * 2 * d, **options).value
        optimiser.zero_grad()
        loss.backward()
        times.append((time.process_time() - start) * 1e3)
        optimiser.step()
        schedule.step()
    values = torch.linalg.svdvals(matrix.detach())
    return {
        "mean": values.mean().item(),
        "min": values.min().item(),
        "max": values.max().item(),
        "ms": median(times),
    }


def power_law(sizes: list[int], values: list[float]) -> tuple[float, float]:
    """Factor and exponent of values = factor * size ** exponent, by least squares of logarithms."""
    x, y = [math.log(n) for n in sizes], [math.log(v) for v in values]
    slope = sum((a - mean(x)) * b for a, b in zip(x, y, strict=True)) / sum((a - mean(x)) ** 2 for a in x)
    return math.exp(mean(y) - slope * mean(x)), slope


def call_and_entries(sizes: list[int], values: list[float]) -> tuple[float, float]:
    """The a and b, not negative, of values = a + b * size ** 2, by least squares of relative errors."""
    import numpy as np
    from scipy.optimize import nnls

    design = np.array([[1 / v, n**2 / v] for n, v in zip(sizes, values, strict=True)])
    scale = design.max(0)
    a, b = nnls(design / scale, np.ones(len(sizes)))[0] / scale
    return float(a), float(b)


def conclusions(rows: list[Record]) -> list[Record]:
    """By dimension: where ``self`` is within each target, and where it is as right as ``independent``."""
    found = []
    for d in sorted({row["d"] for row in rows}):
        cells: dict[tuple[str, int], list[Record]] = {}
        for row in rows:
            if row["d"] == d:
                cells.setdefault((row["debias"], row["batch"]), []).append(row)
        batches = sorted({batch for _, batch in cells})
        if not all(("self", batch) in cells for batch in batches) or ("independent", batches[0]) not in cells:
            continue
        own = {n: cells["self", n] for n in batches}
        short = {n: abs(mean(r["mean"] for r in own[n]) - 1) for n in batches}
        cost = {n: median(r["ms"] for r in own[n]) for n in batches}
        independent = cells["independent", batches[0]]
        errors = [r["mean"] - 1 for r in independent]
        noise = stdev(errors) / math.sqrt(len(errors)) if len(errors) > 1 else 0.0
        equal = max(abs(mean(errors)), noise)  # not righter than can be told
        factor, slope = power_law(batches, [short[n] for n in batches]) if len(batches) > 1 else (0.0, 0.0)
        call, entry = call_and_entries(batches, [cost[n] for n in batches])
        for target, name in [*((t, f"{t:g}") for t in TARGETS), (equal, "as independent")]:
            measured = next((n for n in batches if short[n] <= target), None)
            record: Record = {"d": d, "target": target, "name": name, "extrapolated": measured is None}
            if measured is not None:
                record |= {"batch": measured, "ms": cost[measured]}
            elif slope < 0:
                batch = (target / factor) ** (1 / slope)
                record |= {"batch": round(batch), "ms": call + entry * batch**2, "exponent": slope}
            else:
                record |= {"batch": None, "ms": None}
            reference = median(r["ms"] for r in independent)
            record |= {"independent_batch": batches[0], "independent_ms": reference}
            found.append(record)
    return found


def run(backend: str, smoke: bool) -> None:
    """All fits, one row a fit, and what follows."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    used = chosen_backend(backend)
    steps = 5 if smoke else STEPS
    settings = {
        "backend": used,
        "steps": steps,
        "learning_rate": LEARNING_RATE,
        "relative_epsilon": RELATIVE_EPSILON,
    }
    rows = Rows("solver_shrinkage", settings, ("debias", "d", "batch", "seed"), keep=not smoke)
    for d in (2,) if smoke else DIMENSIONS:
        for batch in (32, 64) if smoke else BATCHES:
            for debias in ("self", "independent"):
                for seed in (0,) if smoke else SEEDS:
                    rows.make(
                        lambda key=(debias, d, batch, seed): fit(*key, used, steps),
                        debias=debias,
                        d=d,
                        batch=batch,
                        seed=seed,
                    )
    for record in conclusions(rows.rows):
        size = "never" if record["batch"] is None else f"{record['batch']:,}, {record['ms']:.1f} ms"
        how = " (extrapolated)" if record["extrapolated"] else ""
        print(
            f"d {record['d']}, |mean - 1| {record['name']}: self at batch {size} a step{how}; independent at "
            f"{record['independent_batch']}, {record['independent_ms']:.1f} ms"
        )
