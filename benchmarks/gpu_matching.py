"""Time of one debiased match, forward and backward, on the GPU: torch, torch in a CUDA graph, Triton, Triton in a graph, and
flash-sinkhorn where it is installed.

Every method stops at a marginal error of 3e-3 or is given the number of iterations that torch needed for it; the error of
its gradient against float64 is in the table beside its time. Debiasing is that of one batch: one problem across and
two symmetric ones, relative epsilon .2, cost |x - y|^2.

python benchmarks/gpu_matching.py                # needs CUDA
python benchmarks/gpu_matching.py --smoke-test   # CPU only, tiny
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _report import RESULTS, write
from torch import Tensor

from pyro_sinkhorn.ot.backends.log_domain import solve_log_domain
from pyro_sinkhorn.ot.envelope import entropic_value
from pyro_sinkhorn.ot.problem import Problem, Solution

TOLERANCE = 3e-3
#: (n, d); float64 log-domain matrices are not made above LARGEST_EXACT, where the yardstick is skipped too.
SIZES = [(128, 8), (512, 16), (1024, 64), (4096, 64), (10_000, 64), (50_000, 64)]
LARGEST_EXACT = 10_000


def clouds(n: int, d: int, device: str) -> tuple[Tensor, Tensor, float]:
    """Ten clusters, a standard normal cloud, and .2 standard deviations of their cost."""
    rng = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.randn(10, d, generator=rng, dtype=torch.float32)
    x = centres[torch.randint(10, (n,), generator=rng)]
    x = x + 0.3 * torch.randn(n, d, generator=rng, dtype=torch.float32)
    y = torch.randn(n, d, generator=rng, dtype=torch.float32)
    epsilon = 0.2 * float(torch.cdist(x[:1000], y[:1000]).square().std())
    return x.to(device), y.to(device), epsilon


def problem_of(x: Tensor, y: Tensor, epsilon: float, symmetric: bool = False, **options: Any) -> Problem:
    """A batch of one."""
    a, b = (points.new_full((1, len(points)), 1 / len(points)) for points in (x, y))
    x = x[None]
    y, b = (x, a) if symmetric else (y[None], b)
    return Problem(x, y, a, b, x.new_full((1,), epsilon), symmetric=symmetric, **options)


def debiased(
    x: Tensor, y: Tensor, epsilon: float, solver: Callable[[Problem], Solution], **options: Any
) -> Tensor:
    """The divergence; the term of y alone has no gradient here and is solved all the same."""

    def value(*arguments: Any) -> Tensor:
        problem = problem_of(*arguments, **options)
        return entropic_value(problem, solver(problem)).sum()

    return value(x, y, epsilon) - value(x, x, epsilon, True) / 2 - value(y, y, epsilon, True) / 2


@torch.no_grad()
def solve_torch(problem: Problem) -> Solution:
    """Plain torch, a fixed number of launches: log domain, ``max_iters`` rounds whatever the error. The yardstick."""
    cost = problem.cost_matrix.detach()
    epsilon, log_a, log_b = problem.epsilon[:, None], problem.a.log(), problem.b.log()
    scores = -cost / epsilon.unsqueeze(-1)
    f, g, f_next = torch.zeros_like(log_a), torch.zeros_like(log_b), torch.zeros_like(log_a)
    if problem.symmetric:
        for _ in range(problem.max_iters):
            f, f_next = f + 2 / 3 * (f_next - f), f
            f_next = -torch.logsumexp(scores + (f + log_a).unsqueeze(-2), -1)
        g = f
    else:
        f_next = -torch.logsumexp(scores + log_b.unsqueeze(-2), -1)
        for _ in range(problem.max_iters):
            f = f_next
            g = -torch.logsumexp(scores + (f + log_a).unsqueeze(-1), -2)
            f_next = -torch.logsumexp(scores + (g + log_b).unsqueeze(-2), -1)
    error = (problem.a * torch.expm1(f - f_next).abs()).sum(-1)
    return Solution(epsilon * f, epsilon * g, error, problem.max_iters, error <= problem.tolerance)


def rounds_of_torch(x: Tensor, y: Tensor, epsilon: float) -> int:
    """Iterations that plain Sinkhorn needs across to reach the tolerance."""
    for rounds in range(5, 500, 5):
        problem = problem_of(x, y, epsilon, tolerance=TOLERANCE, max_iters=rounds)
        if bool(solve_torch(problem).converged.all()):
            return rounds
    return 500


@cache
def reference(n: int, d: int, device: str) -> tuple[Tensor | None, int]:
    """The gradient in float64, and the rounds of the yardstick; nothing above :data:`LARGEST_EXACT`."""
    if n > LARGEST_EXACT:
        return None, 0
    x, y, epsilon = clouds(n, d, device)
    x64 = x.double().requires_grad_()
    value = debiased(x64, y.double(), epsilon, solve_log_domain, tolerance=1e-6, max_iters=500)
    return torch.autograd.grad(value, x64)[0], rounds_of_torch(x, y, epsilon)


def milliseconds(call: Callable[[], Any], device: str, budget: float = 2.0) -> float:
    """Median time of a call, by events on the device where there is one."""
    for _ in range(2):
        call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 5 or (len(times) < 50 and time.perf_counter() - began < budget):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            before = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - before))
    return statistics.median(times)


def graphed(
    forward: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> tuple[Callable[[], Any], Tensor]:
    """A CUDA graph of the value and its gradient in x, and the gradient's tensor."""
    x = x.clone().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(forward(x, y), x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (slope,) = torch.autograd.grad(forward(x, y), x)
    return graph.replay, slope


def methods(
    n: int, rounds: int, device: str
) -> dict[str, tuple[Callable[[Problem], Solution], dict[str, Any], bool]]:
    """Solver, options and whether it is captured, by name; None of what is not installed or does not fit."""
    from pyro_sinkhorn.ot.backends.triton_backend import solve_triton

    found: dict[str, tuple[Callable[[Problem], Solution], dict[str, Any], bool]] = {}
    fixed = {"tolerance": TOLERANCE, "max_iters": rounds}
    stopped = {"tolerance": TOLERANCE, "max_iters": 100}
    if n <= LARGEST_EXACT:
        found["torch"] = solve_torch, fixed, False
        if device == "cuda":
            found["torch, graph"] = solve_torch, fixed, True
    if importlib.util.find_spec("triton") and (device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        found["triton"] = solve_triton, stopped, False
        if device == "cuda":
            found["triton, graph"] = solve_triton, {**stopped, "max_iters": 20}, True
    if importlib.util.find_spec("flash_sinkhorn") and device == "cuda":
        from pyro_sinkhorn.ot.backends.flash import solve_flash

        found["flash"] = solve_flash, {**stopped, "max_iters": 500}, False
    return found


def measure(n: int, d: int, device: str, precision: str) -> list[dict[str, Any]]:
    """A row for every method."""
    x, y, epsilon = clouds(n, d, device)
    exact, rounds = reference(n, d, device)
    rows = []
    for name, (solver, options, captured) in methods(n, rounds, device).items():
        row: dict[str, Any] = {"n": n, "d": d, "method": name, "precision": precision}
        try:
            torch.set_float32_matmul_precision(precision)
            leaf = x.clone().requires_grad_()

            def forward(
                x: Tensor, y: Tensor, solver: Callable[[Problem], Solution] = solver, options: Any = options
            ) -> Tensor:
                return debiased(x, y, epsilon, solver, **options)

            def call(leaf: Tensor = leaf, forward: Callable[[Tensor, Tensor], Tensor] = forward) -> Tensor:
                return torch.autograd.grad(forward(leaf, y), leaf)[0]

            if captured:
                replay, slope = graphed(forward, x, y)
                row["ms"] = milliseconds(replay, device)
            else:
                slope = call()
                row["ms"] = milliseconds(call, device)
            problem = problem_of(x, y, epsilon, **options)
            solution = solver(problem)
            row["rounds"] = solution.n_iters
            row["marginal_error"] = float(solution.marginal_error.max())
            if exact is not None:
                row["gradient_error"] = float((slope - exact).norm() / exact.norm())
        except Exception as error:  # one method that fails must not hide the others
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        finally:
            torch.set_float32_matmul_precision("highest")
            if device == "cuda":
                torch.cuda.empty_cache()
        rows.append(row)
        shown = row.get("failed") or (
            f"{row['ms']:>10.3f} ms{row['rounds']:>8} rounds{row.get('gradient_error', float('nan')):>10.1e}"
        )
        print(f"{n:>7}{d:>5}  {precision:<8} {name:<16}{shown}", flush=True)
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke-test", action="store_true")
    parser.add_argument("--budget", type=float, default=240, help="seconds; no size begins after it")
    options = parser.parse_args()
    device = "cpu" if options.smoke_test else "cuda"
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    print(f"{'n':>7}{'d':>5}  {'products':<8} {'method':<16}{'time':>10}{'':>18}{'gradient error':>16}")
    for n, d in [(32, 2)] if options.smoke_test else SIZES:
        for precision in ("highest",) if options.smoke_test else ("highest", "high"):
            if time.perf_counter() - began > options.budget:
                print(f"{n:>7}{d:>5}  {precision:<8} left out: the time is up", flush=True)
                continue
            rows += measure(n, d, device, precision)
            if not options.smoke_test:
                write("gpu_matching", {"rows": rows}, seeds=[0], packages=["triton"], folder=options.output)
    if all("failed" in row for row in rows):
        raise SystemExit("every method failed")


if __name__ == "__main__":
    main()
