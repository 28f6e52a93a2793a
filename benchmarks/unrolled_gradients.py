"""What unrolled gradients cost and how wrong they are after L iterations, next to the envelope gradient.

    python benchmarks/unrolled_gradients.py               # two minutes; writes benchmarks/results/unrolled_gradients.json
    python benchmarks/unrolled_gradients.py --smoke-test  # seconds; writes nothing

Two clouds of n points in d dimensions, uniform weights, squared Euclidean cost. Epsilon is relative: times the mean cost.

cost:    for the unrolled gradient (which computes the matrix of a half-step again on the way back) and for the same
         iterations in plain autograd (which keeps them): bytes of all storages the graph keeps, the peak of what torch
         allocates during forward and backward, and their time as a multiple of the envelope gradient of the solver at
         its defaults on the same clouds. Times are medians of processor time; the three are timed
         in turns.
errors:  relative L2 error in the gradient of the points x of the unrolled value after exactly L iterations, against the
         converged gradient of the entropic value, and against the converged gradient of the sharp value. The entropic
         envelope gradient after L iterations is there too.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _report import RESULTS, write
from torch import Tensor

from pyro_sinkhorn.ot import ConvergenceWarning, sinkhorn
from pyro_sinkhorn.ot.backends.log_domain import half_step

DTYPES = {"float32": torch.float32, "float64": torch.float64}
RELATIVE = (0.01, 0.1, 1.0)
SEED = 0


def draw(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Two unlike clouds, and their mean cost."""
    rng = torch.Generator().manual_seed(SEED)
    x = torch.randn(n, d, dtype=torch.float64, generator=rng)
    y = 0.7 * torch.randn(n, d, dtype=torch.float64, generator=rng) + 0.5
    return x.to(dtype), y.to(dtype), torch.cdist(x, y).square().mean().item()


def envelope(x: Tensor, y: Tensor, epsilon: float, **options: Any) -> Tensor:
    return sinkhorn(x, y, epsilon, **options).value


def unrolled(x: Tensor, y: Tensor, epsilon: float, n_iters: int, value: Any = "sharp") -> Tensor:
    options: dict[str, Any] = {"value": value, "gradient": "unrolled"}
    return sinkhorn(x, y, epsilon, tolerance=0, max_iters=n_iters, **options).value


def plain(x: Tensor, y: Tensor, epsilon: float, n_iters: int) -> Tensor:
    """The sharp value after the same iterations, left to autograd."""
    cost = (x.square().sum(-1, keepdim=True) + y.square().sum(-1) - 2 * x @ y.mT).clamp_min(0).unsqueeze(0)
    eps, log_w = x.new_full((1,), epsilon), x.new_full((1, len(x)), 1 / len(x)).log()
    g = torch.zeros_like(log_w)
    for _ in range(n_iters):
        f = half_step(g, cost, log_w, eps)
        g = half_step(f, cost.mT, log_w, eps)
    plan = ((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / epsilon).exp() / len(x) ** 2
    return (plan * cost).sum()


# Cost


def saved_bytes(run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes of all storages the graph keeps, each counted once."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x.clone().requires_grad_())
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Most that torch had allocated at once during forward and backward, from the profiler's record of allocations."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        gradient(run, x)
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def gradient(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(run(leaf), leaf)[0]


def seconds(runs: dict[str, Callable[[Tensor], Tensor]], x: Tensor, repeats: int) -> dict[str, float]:
    """Median processor time of forward and backward of each, taken in turns; one thread, so others do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            gradient(run, x)
            times[name].append(time.process_time() - start)
    return {name: median(values[1:]) for name, values in times.items()}  # the first warms up


def costs(n: int, d: int, lengths: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name, dtype in DTYPES.items():
        x, y, scale = draw(n, d, dtype)
        epsilon = 0.1 * scale
        for n_iters in lengths:
            runs: dict[str, Callable[[Tensor], Tensor]] = {
                "envelope": partial(envelope, y=y, epsilon=epsilon),
                "unrolled": partial(unrolled, y=y, epsilon=epsilon, n_iters=n_iters),
                "plain_autograd": partial(plain, y=y, epsilon=epsilon, n_iters=n_iters),
            }
            taken = seconds(runs, x, repeats)
            row: dict[str, Any] = {
                "dtype": name,
                "n_iters": n_iters,
                "relative_epsilon": 0.1,
                "envelope_iterations": sinkhorn(x, y, epsilon).n_iters,
                "envelope_seconds": taken["envelope"],
            }
            for method, run in runs.items():
                row[method] = {
                    "saved_bytes": saved_bytes(run, x),
                    "peak_bytes": peak_bytes(run, x),
                    "time_over_envelope": taken[method] / taken["envelope"],
                }
            difference = gradient(runs["unrolled"], x) - gradient(runs["plain_autograd"], x)
            row["unrolled_minus_plain"] = (difference.norm() / gradient(runs["unrolled"], x).norm()).item()
            rows.append(row)
    return rows


def bytes_per_iteration(rows: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """Slopes of the bytes in L, which are lines; ``matrices`` counts them in n * n numbers."""
    found = []
    for name, dtype in DTYPES.items():
        first, *_, last = (row for row in rows if row["dtype"] == name)
        for method in ("envelope", "unrolled", "plain_autograd"):
            slope = {
                key: (last[method][key] - first[method][key]) / (last["n_iters"] - first["n_iters"])
                for key in ("saved_bytes", "peak_bytes")
            }
            numbers = slope["saved_bytes"] / dtype.itemsize
            found.append({"dtype": name, "method": method, **slope, "saved_matrices": numbers / n**2})
    return found


# Errors


def errors(n: int, d: int, lengths: tuple[int, ...], reference_iters: int) -> list[dict[str, Any]]:
    rows = []
    for relative in RELATIVE:
        x, y, scale = draw(n, d, torch.float64)
        epsilon = relative * scale
        stop: dict[str, Any] = {"tolerance": 1e-9, "max_iters": reference_iters}
        with torch.no_grad():
            reference = sinkhorn(x, y, epsilon, gradient="unrolled", **stop)
        entropic = gradient(partial(envelope, y=y, epsilon=epsilon, **stop), x)
        sharp = gradient(partial(unrolled, y=y, epsilon=epsilon, n_iters=reference.n_iters), x)
        # Half as many iterations: how much the reference itself still moves.
        settled = gradient(partial(unrolled, y=y, epsilon=epsilon, n_iters=reference.n_iters // 2 + 1), x)
        for name, dtype in DTYPES.items():
            xs, ys, _ = draw(n, d, dtype)
            for n_iters in lengths:
                at: dict[str, Any] = {"y": ys, "epsilon": epsilon}
                found = {
                    "unrolled_sharp": gradient(partial(unrolled, n_iters=n_iters, **at), xs),
                    "unrolled_entropic": gradient(
                        partial(unrolled, n_iters=n_iters, value="entropic", **at), xs
                    ),
                    "envelope": gradient(partial(envelope, tolerance=0, max_iters=n_iters, **at), xs),
                }
                rows.append(
                    {
                        "dtype": name,
                        "relative_epsilon": relative,
                        "n_iters": n_iters,
                        "marginal_error": marginal_error(xs, ys, epsilon, n_iters),
                        "reference_iterations": reference.n_iters,
                        "reference_marginal_error": reference.marginal_error.item(),
                        "sharp_reference_change_from_half": error_of(settled, sharp),
                        "sharp_to_entropic": error_of(sharp, entropic),
                        **{f"{key}_to_entropic": error_of(grad, entropic) for key, grad in found.items()},
                        **{f"{key}_to_sharp": error_of(grad, sharp) for key, grad in found.items()},
                    }
                )
    return rows


def marginal_error(x: Tensor, y: Tensor, epsilon: float, n_iters: int) -> float:
    with torch.no_grad():
        out = sinkhorn(x, y, epsilon, gradient="unrolled", tolerance=0, max_iters=n_iters)
    return out.marginal_error.item()


def error_of(grad: Tensor, reference: Tensor) -> float:
    return ((grad.double() - reference).norm() / reference.norm()).item()


def show(cost_rows: list[dict[str, Any]], error_rows: list[dict[str, Any]]) -> None:
    print(
        "         L   saved MB: unrolled  plain   peak MB: unrolled  plain   time / envelope: unrolled  plain"
    )
    for row in cost_rows:
        u, p = row["unrolled"], row["plain_autograd"]
        print(
            f"{row['dtype']} {row['n_iters']:4d} {u['saved_bytes'] / 1e6:15.2f} {p['saved_bytes'] / 1e6:9.1f} "
            f"{u['peak_bytes'] / 1e6:14.2f} {p['peak_bytes'] / 1e6:10.1f} "
            f"{u['time_over_envelope']:18.2f} {p['time_over_envelope']:10.2f}"
        )
    print("\nrelative error of the gradient (float64)")
    print(
        "eps/mean    L  marginal   sharp_L to sharp, entropic   entropic_L to entropic   envelope_L to entropic"
    )
    for row in error_rows:
        if row["dtype"] == "float64":
            print(
                f"{row['relative_epsilon']:8} {row['n_iters']:4d} {row['marginal_error']:9.1e} "
                f"{row['unrolled_sharp_to_sharp']:14.1e} {row['unrolled_sharp_to_entropic']:11.1e} "
                f"{row['unrolled_entropic_to_entropic']:20.1e} {row['envelope_to_entropic']:22.1e}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke-test", action="store_true", help="small clouds, nothing written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)  # marginal errors are in the result
    smoke = arguments.smoke_test
    n, d, lengths = (32, 10, (2, 5)) if smoke else (256, 10, (10, 20, 50, 100, 200))
    start = time.perf_counter()
    cost_rows = costs(n, d, lengths, repeats=1 if smoke else 5)
    error_rows = errors(n, d, lengths, reference_iters=200 if smoke else 4_000)
    show(cost_rows, error_rows)
    if not smoke:
        payload = {
            "settings": {"n": n, "m": n, "d": d, "cost": "sqeuclidean", "repeats": 5},
            "seconds": round(time.perf_counter() - start),
            "cost": cost_rows,
            "per_iteration": bytes_per_iteration(cost_rows, n),
            "errors": error_rows,
        }
        print(write("unrolled_gradients", payload, seeds=[SEED], folder=arguments.out))


if __name__ == "__main__":
    main()
