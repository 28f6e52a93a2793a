"""Is the transport right? Largest differences to POT, geomloss and closed forms, and the divergence of equal laws.

    python benchmarks/ot_accuracy.py               # about a minute; writes benchmarks/results/ot_accuracy.json
    python benchmarks/ot_accuracy.py --smoke-test  # seconds; writes nothing

All in float64. Epsilon is given as a multiple of the mean cost where it is called relative.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import geomloss
import ot as pot
import torch
from _report import RESULTS, machine, write
from torch import Tensor

from pyro_sinkhorn.ot import sinkhorn, sinkhorn_divergence
from pyro_sinkhorn.ot.divergence import Debias

D = torch.float64
COSTS = ("sqeuclidean", "euclidean")
MODES: tuple[Debias, ...] = ("independent", "self", None)


def ground(cost: str, x: Tensor, y: Tensor) -> Tensor:
    distance = torch.cdist(x, y)
    return distance.square() if cost == "sqeuclidean" else distance


def draw(n: int, m: int, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two unlike clouds with uneven weights."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=D, generator=rng)
    y = 0.7 * torch.randn(m, d, dtype=D, generator=rng) + 0.5
    a, b = (torch.rand(k, dtype=D, generator=rng) + 0.2 for k in (n, m))
    return x, y, a / a.sum(), b / b.sum()


# Against other libraries


def against_pot(smoke: bool) -> Iterator[dict[str, Any]]:
    """Both solved to a marginal error of 1e-9; POT's value is <P, C> + epsilon KL(P | a x b) of its plan."""
    sizes = [(30, 40, 3)] if smoke else [(30, 40, 3), (100, 80, 2), (100, 150, 16)]
    for (n, m, d), cost, relative in product(sizes, COSTS, (0.05, 0.2, 1.0)):
        x, y, a, b = draw(n, m, d, seed=n)
        matrix = ground(cost, x, y)
        epsilon = relative * matrix.mean().item()
        ours = sinkhorn(x, y, epsilon, a, b, cost, tolerance=1e-9, max_iters=20_000)
        plan = pot.bregman.sinkhorn(
            a, b, matrix, epsilon, method="sinkhorn_log", stopThr=1e-10, numItermax=20_000
        )
        value = (plan * matrix + epsilon * torch.xlogy(plan, plan / (a.unsqueeze(-1) * b))).sum()
        yield {
            "peer": "POT",
            "what": "transport",
            "cost": cost,
            "n": n,
            "m": m,
            "d": d,
            "relative_epsilon": relative,
            "value": ours.value.item(),
            "difference": (ours.value - value).abs().item(),
            "plan_difference": (ours.plan() - plan).abs().max().item(),
        }


def clamped(x: Tensor, y: Tensor) -> Tensor:
    """geomloss's distance is at least 1e-4, on the diagonal of a cloud's cost to itself too."""
    return (x.unsqueeze(1) - y).square().sum(-1).clamp_min(1e-8).sqrt()


def against_geomloss(smoke: bool) -> Iterator[dict[str, Any]]:
    """Its p=2 cost is half of ours, epsilon is blur^p. Without a stopping rule, a slower schedule is nearer."""
    costs: dict[str, Any] = {
        "sqeuclidean": "sqeuclidean",
        "euclidean": "euclidean",
        "euclidean, clamped as theirs": clamped,
    }
    scalings = (0.9, 0.99) if smoke else (0.5, 0.9, 0.99, 0.999)
    for cost, relative, debias, scaling in product(costs, (0.2, 1.0), (False, True), scalings):
        n, m, d = 30, 40, 3
        x, y, a, b = draw(n, m, d, seed=n)
        p = 2 if cost == "sqeuclidean" else 1
        epsilon = relative * ground(cost, x, y).mean().item()
        loss = geomloss.SamplesLoss(
            "sinkhorn",
            p=p,
            blur=(epsilon / p) ** (1 / p),
            scaling=scaling,
            debias=debias,
            backend="tensorized",
        )
        ours = sinkhorn_divergence(
            x, y, epsilon, a, b, costs[cost], "self" if debias else None, tolerance=1e-8, max_iters=20_000
        )
        yield {
            "peer": "geomloss",
            "what": "divergence" if debias else "transport",
            "cost": cost,
            "n": n,
            "m": m,
            "d": d,
            "relative_epsilon": relative,
            "scaling": scaling,
            "value": ours.value.item(),
            "difference": (ours.value - p * loss(a, x, b, y)).abs().item(),
        }


# Against closed forms


def two_points() -> float:
    """x = y = {0, 1}: the value is eps log 2p with p = 1 / (1 + exp(-1/eps))."""
    x = torch.tensor([[0.0], [1.0]], dtype=D)
    errors = []
    for epsilon in (0.1, 1.0, 10.0):
        expected = epsilon * math.log(2 / (1 + math.exp(-1 / epsilon)))
        errors.append(abs(sinkhorn(x, x, epsilon, tolerance=1e-12).value.item() - expected))
    return max(errors)


def sorted_assignment() -> float:
    """Small epsilon on the line: the sorted assignment, and log n for being a permutation."""
    rng, n, epsilon = torch.Generator().manual_seed(0), 30, 0.05
    grid = torch.arange(n, dtype=D)
    x = grid + 0.3 * torch.rand(n, dtype=D, generator=rng)
    y = grid + 0.3 * torch.rand(n, dtype=D, generator=rng) + 0.5
    expected = (x - y).square().mean() + epsilon * math.log(n)
    shuffled = x[torch.randperm(n, generator=rng)].unsqueeze(-1)
    return (sinkhorn(shuffled, y.unsqueeze(-1), epsilon).value - expected).abs().item()


def gaussians() -> float:
    """Janati et al. 2020, theorem 1, epsilon = 2 sigma^2; the laws by quadrature on a grid, not by samples."""
    mean_x, mean_y = torch.zeros(2, dtype=D), torch.tensor([1.0, -0.5], dtype=D)
    cov_x = torch.tensor([[1.0, 0.4], [0.4, 0.6]], dtype=D)
    cov_y = torch.tensor([[0.5, -0.2], [-0.2, 0.8]], dtype=D)
    line = torch.linspace(-6.5, 6.5, 36, dtype=D)
    grid = torch.cartesian_prod(line, line)
    a, b = (
        torch.distributions.MultivariateNormal(mean, cov).log_prob(grid).softmax(0)
        for mean, cov in ((mean_x, cov_x), (mean_y, cov_y))
    )
    values, vectors = torch.linalg.eigh(cov_x)
    root = (vectors * values.sqrt()) @ vectors.mT
    errors = []
    for epsilon in (1.0, 10.0):
        variance = epsilon / 2
        spectrum = (4 * torch.linalg.eigvalsh(root @ cov_y @ root) + variance**2).sqrt()
        entropic = (
            -spectrum + variance * (1 - math.log(2 * variance)) + variance * (spectrum + variance).log()
        )
        expected = (mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() + entropic.sum()
        errors.append((sinkhorn(grid, grid, epsilon, a, b, tolerance=1e-8).value - expected).abs().item())
    return max(errors)


def energy_distance() -> float:
    """Epsilon to infinity: the energy distance of the weighted clouds, diagonals included."""
    x, y, a, b = draw(40, 60, 3, seed=0)
    errors = []
    for cost in COSTS:
        xy, xx, yy = (ground(cost, p, q) for p, q in ((x, y), (x, x), (y, y)))
        expected = a @ xy @ b - a @ xx @ a / 2 - b @ yy @ b / 2
        value = sinkhorn_divergence(x, y, 1e7, a, b, cost, "self", tolerance=1e-9).value
        errors.append((value - expected).abs().item())
    return max(errors)


def unregularised() -> float:
    """Epsilon to zero: how far the value lies outside [emd, emd + epsilon * least entropy], which is exact."""
    x, y, a, b = draw(20, 25, 2, seed=0)
    entropy = min(-torch.xlogy(w, w).sum().item() for w in (a, b))
    outside = 0.0
    for cost, relative in product(COSTS, (0.5, 0.1, 0.02)):
        matrix = ground(cost, x, y)
        exact, epsilon = pot.emd2(a, b, matrix).item(), relative * matrix.mean().item()
        value = sinkhorn(x, y, epsilon, a, b, cost, tolerance=1e-4, max_iters=20_000).value.item()
        outside = max(outside, exact - value, value - exact - epsilon * entropy)
    return outside


def gradients() -> float:
    """Envelope gradients in points and weights against central differences, relative to the largest entry."""
    x, y, a, b = (t.requires_grad_() for t in draw(8, 9, 2, seed=0))
    worst = 0.0
    for cost, debias in product(COSTS, MODES):

        def value(x: Tensor, cost: str = cost, debias: Debias = debias) -> Tensor:
            rng = torch.Generator().manual_seed(0)
            options: dict[str, Any] = {"tolerance": 1e-9, "max_iters": 20_000, "generator": rng}
            return sinkhorn_divergence(x, y, 1.0, a, b, cost, debias, **options).value

        (grad,) = torch.autograd.grad(value(x), x)
        with torch.no_grad():
            for i in range(len(x)):
                step = torch.zeros_like(x)
                step[i, 0] = 1e-4
                near, far = (value(x + k * step) - value(x - k * step) for k in (1, 2))
                slope = (8 * near - far) / 12e-4
                worst = max(worst, ((slope - grad[i, 0]).abs() / grad.abs().max()).item())
    return worst


CLOSED_FORMS: dict[str, Callable[[], float]] = {
    "two points": two_points,
    "sorted assignment on the line": sorted_assignment,
    "Gaussians (Janati et al. 2020)": gaussians,
    "energy distance, epsilon to infinity": energy_distance,
    "outside the bounds of exact transport": unregularised,
    "gradient against differences, relative": gradients,
}


# The divergence of equal laws


def equal_laws(smoke: bool) -> Iterator[dict[str, Any]]:
    """Mean and standard error of the divergence between two clouds of one normal law: zero is right."""
    repeats, chunk = (40, 20) if smoke else (300, 50)
    shapes = [(2, 16), (2, 17)] if smoke else [(2, 32), (2, 33), (8, 64), (8, 65), (32, 64), (32, 128)]
    for (d, n), debias in product(shapes, MODES):
        values = []
        for seed in range(repeats // chunk):  # each chunk has a split of its own
            rng = torch.Generator().manual_seed(seed)
            x, y = torch.randn(2, chunk, n, d, dtype=D, generator=rng)
            out = sinkhorn_divergence(
                x, y, 0.2 * 2 * d, debias=debias, tolerance=1e-3, max_iters=10_000, generator=rng
            )
            values.append(out.value)
        value = torch.cat(values)
        error = value.std() / math.sqrt(len(value))
        yield {
            "d": d,
            "n": n,
            "odd": n % 2 == 1,
            "debias": debias,
            "relative_epsilon": 0.2,
            "repeats": len(value),
            "mean_cost": 2.0 * d,
            "mean": value.mean().item(),
            "standard_error": error.item(),
            "z": (value.mean() / error).item(),
        }


# Printing


def print_peers(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'largest difference to':<58} transport  divergence")
    for peer, scaling, cost in dict.fromkeys((r["peer"], r.get("scaling"), r["cost"]) for r in rows):
        name = f"{peer}{f', scaling={scaling}' if scaling else ''}, {cost}"
        cells = []
        for what in ("transport", "divergence"):
            key = (peer, scaling, cost, what)
            found = [
                r["difference"] for r in rows if (r["peer"], r.get("scaling"), r["cost"], r["what"]) == key
            ]
            cells.append(f"{max(found):.1e}" if found else "")
        print(f"  {name:<56} {cells[0]:>9} {cells[1]:>11}")
    plans = max(r["plan_difference"] for r in rows if r["peer"] == "POT")
    print(f"  {'POT, entries of the plan':<56} {plans:>9.1e}")


def print_equal_laws(rows: list[dict[str, Any]]) -> None:
    print("\nequal laws: mean of the divergence ± standard error (zero is right)")
    print("   d    n", *(f"{mode:>18}" for mode in ("independent", "self", "None")))
    for d, n in dict.fromkeys((r["d"], r["n"]) for r in rows):
        cells = (f"{r['mean']:9.4f} ± {r['standard_error']:.4f}" for r in rows if (r["d"], r["n"]) == (d, n))
        print(f"{d:>4} {n:>4}", *(f"{cell:>18}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="small and quick; writes nothing")
    parser.add_argument(
        "--output", type=Path, help="folder of the result file, benchmarks/results by default"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine()["in_words"])

    started = time.perf_counter()
    peers = [*against_pot(arguments.smoke_test), *against_geomloss(arguments.smoke_test)]
    print_peers(peers)
    closed = {name: measure() for name, measure in CLOSED_FORMS.items()}
    print("\nlargest error against closed forms")
    for name, error in closed.items():
        print(f"  {name:<40} {error:.1e}")
    laws = list(equal_laws(arguments.smoke_test))
    print_equal_laws(laws)

    if arguments.smoke_test and arguments.output is None:
        return
    payload = {
        "precision": "float64",
        "seconds": round(time.perf_counter() - started, 1),
        "peers": peers,
        "closed_forms": closed,
        "equal_laws": laws,
    }
    seeds = sorted({*range(6), *(r["n"] for r in peers)})
    folder = arguments.output or RESULTS
    path = write("ot_accuracy", payload, seeds=seeds, packages=["POT", "geomloss"], folder=folder)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
