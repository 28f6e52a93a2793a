"""What linear memory costs: time, passes and memory of the streaming backend up to 100,000 points, and its error.

    python benchmarks/streaming.py               # ten minutes; writes benchmarks/results/streaming.json
    python benchmarks/streaming.py --smoke-test  # seconds; writes nothing

Two clouds of n points in 8 dimensions, uniform weights, squared Euclidean cost, epsilon .2 times the standard deviation of
the cost, float32: transport from x to y, and of x to itself (symmetric), value and gradient in x.

scale:   each n in a process of its own, on --threads threads. Seconds of wall clock (the machine's load is beside them), of
         the solver and of value and gradient; passes over the tiles; megabytes of resident memory beyond what the process
         held after a solution of 50 points; megabytes that the matrix alone would take. Marginal error 3e-3, the one at
         which the gradient is good to a per cent.
errors:  at n = 4096, both solved to a marginal error of 1e-8 in float64, largest difference to the reference backend
         in value and gradient, relative to the value and to the largest entry of the gradient; and float32 at its
         default tolerance of 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _report import RESULTS, machine, write
from torch import Tensor

from pyro_sinkhorn.ot.backends.log_domain import solve_log_domain
from pyro_sinkhorn.ot.backends.streaming import solve_streaming
from pyro_sinkhorn.ot.envelope import entropic_value
from pyro_sinkhorn.ot.problem import Problem, Solution

DIMENSIONS = 8
RELATIVE = 0.2
SEED = 0


def draw(n: int, dtype: torch.dtype, tolerance: float, symmetric: bool = False) -> Problem:
    """Ten clusters and a normal law."""
    rng = torch.Generator().manual_seed(SEED)
    centres = 2 * torch.randn(10, DIMENSIONS, generator=rng)
    x = centres[torch.randint(10, (n,), generator=rng)] + 0.3 * torch.randn(n, DIMENSIONS, generator=rng)
    y = x if symmetric else torch.randn(n, DIMENSIONS, generator=rng)
    # Of random pairs: a matrix would raise the most that was resident before anything is measured.
    pairs = torch.randint(n, (2, 20_000), generator=rng)
    epsilon = RELATIVE * (x[pairs[0]] - y[pairs[1]]).square().sum(-1).std().item()
    x = x.to(dtype)[None].requires_grad_()
    weights = torch.full((1, n), 1 / n, dtype=dtype)
    return Problem(
        x,
        x if symmetric else y.to(dtype)[None],
        weights,
        weights,
        torch.tensor([epsilon], dtype=dtype),
        tolerance=tolerance,
        symmetric=symmetric,
    )


def value_and_gradient(problem: Problem, solution: Solution) -> tuple[Tensor, Tensor]:
    value = entropic_value(problem, solution)
    return value.detach(), torch.autograd.grad(value.sum(), problem.x)[0]


def memory() -> float:
    """Megabytes: the most that was ever resident in this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def one_size(n: int, symmetric: bool, threads: int) -> dict[str, Any]:
    """A row, measured in this process."""
    torch.set_num_threads(threads)
    small = draw(50, torch.float32, 3e-3, symmetric)
    value_and_gradient(small, solve_streaming(small))
    problem = draw(n, torch.float32, 3e-3, symmetric)
    before, load, started = memory(), os.getloadavg()[0], time.perf_counter()
    solution = solve_streaming(problem)
    solved = time.perf_counter()
    value, gradient = value_and_gradient(problem, solution)
    done = time.perf_counter()
    assert gradient.isfinite().all()
    return {
        "n": n,
        "symmetric": symmetric,
        "threads": threads,
        "load_before": load,
        "passes": solution.n_iters,
        "converged": bool(solution.converged.all()),
        "marginal_error": solution.marginal_error.item(),
        "solver_seconds": solved - started,
        "gradient_seconds": done - solved,
        "megabytes": memory() - before,
        "matrix_megabytes": 4 * n * n / 2**20,
        "value": value.item(),
    }


def in_a_process(n: int, symmetric: bool, threads: int) -> dict[str, Any]:
    arguments = ["--only", str(n), "--threads", str(threads), *(["--symmetric"] if symmetric else [])]
    out = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    row: dict[str, Any] = json.loads(out)
    return row


def error_row(
    n: int, dtype: torch.dtype, tolerance: float, expected: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    problem = draw(n, dtype, tolerance)
    solution = solve_streaming(problem)
    value, gradient = (t.double() for t in value_and_gradient(problem, solution))
    true_value, true_gradient = expected
    return {
        "n": n,
        "dtype": str(dtype).removeprefix("torch."),
        "tolerance": tolerance,
        "passes": solution.n_iters,
        "value_error": ((value - true_value).abs() / true_value.abs()).item(),
        "gradient_error": ((gradient - true_gradient).abs().max() / true_gradient.abs().max()).item(),
        "gradient_error_l2": ((gradient - true_gradient).norm() / true_gradient.norm()).item(),
    }


def errors(n: int, threads: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    problem = draw(n, torch.float64, 1e-8)
    expected = value_and_gradient(problem, solve_log_domain(problem))
    return [
        error_row(n, torch.float64, 1e-8, expected),
        error_row(n, torch.float32, 1e-4, expected),
        error_row(n, torch.float32, 3e-3, expected),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="small and quick; writes nothing")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--only", type=int, help="print the row of this n as JSON, measured in this process")
    parser.add_argument("--symmetric", action="store_true", help="with --only: the transport of x to itself")
    parser.add_argument(
        "--output", type=Path, help="folder of the result file, benchmarks/results by default"
    )
    arguments = parser.parse_args()
    if arguments.only is not None:
        print(json.dumps(one_size(arguments.only, arguments.symmetric, arguments.threads)))
        return
    print(machine()["in_words"])
    rows = []
    print("\n      n  symmetric  passes  solver s  gradient s  extra MB  matrix MB")
    for n in (300, 3000) if arguments.smoke_test else (10_000, 30_000, 100_000):
        for symmetric in (False, True):
            row = in_a_process(n, symmetric, arguments.threads)
            rows.append(row)
            print(
                f"{n:>7}  {symmetric!s:>9}  {row['passes']:>6}  {row['solver_seconds']:>8.2f}  "
                f"{row['gradient_seconds']:>10.2f}  {row['megabytes']:>8.0f}  {row['matrix_megabytes']:>9.0f}",
                flush=True,
            )
    against = errors(256 if arguments.smoke_test else 4096, arguments.threads)
    print("\nerrors against the reference backend, relative")
    for row in against:
        print(
            f"  n={row['n']}, {row['dtype']} to {row['tolerance']:.0e}: value {row['value_error']:.1e}, "
            f"gradient {row['gradient_error']:.1e}, {row['passes']} passes"
        )
    if arguments.smoke_test and arguments.output is None:
        return
    payload = {
        "dimensions": DIMENSIONS,
        "relative_epsilon": RELATIVE,
        "precision": "float32",
        "scale": rows,
        "errors": against,
    }
    path = write("streaming", payload, seeds=[SEED], folder=arguments.output or RESULTS)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
