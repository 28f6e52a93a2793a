"""Time of one debiased match, forward and backward, on the GPU beside the CPU.

python benchmarks/gpu_matching.py                # needs CUDA
python benchmarks/gpu_matching.py --smoke-test   # CPU only, tiny
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _report import RESULTS, write

from pyro_sinkhorn.ot import sinkhorn_divergence


def milliseconds(n: int, d: int, device: str, repeats: int) -> float:
    """Median time of a divergence with independent halves and its gradient, relative epsilon .1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=torch.float32).to(device).requires_grad_()
    y = torch.randn(n, d, generator=generator, dtype=torch.float32).to(device)
    times = []
    for _ in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        sinkhorn_divergence(x, y, 0.2 * d, tolerance=1e-2).value.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    devices = ["cpu"] if options.smoke_test else ["cpu", "cuda"]
    sizes = [(64, 2)] if options.smoke_test else [(256, 8), (512, 16), (1024, 64), (4096, 64)]
    rows: list[dict[str, Any]] = []
    print(f"{'n':>6}{'d':>5}" + "".join(f"{device + ' ms':>12}" for device in devices))
    for n, d in sizes:
        row: dict[str, Any] = {"n": n, "d": d}
        for device in devices:
            row[device] = milliseconds(
                n, d, device, 2 if options.smoke_test else (20 if device == "cuda" else 5)
            )
        rows.append(row)
        print(f"{n:>6}{d:>5}" + "".join(f"{row[device]:>12.2f}" for device in devices), flush=True)
    if not options.smoke_test:
        write("gpu_matching", {"rows": rows}, seeds=[0], folder=options.output)


if __name__ == "__main__":
    main()
