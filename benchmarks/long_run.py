"""Resident memory over ten thousand steps.

    python benchmarks/long_run.py
    python benchmarks/long_run.py --smoke-test

A small program is fitted in minibatches, with held-out data measured and a checkpoint written every thousand steps, as long
runs are. Memory is read from the system after every thousand steps. What a program must keep, its history, grows by about 100
bytes a step.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import resource
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _report import write
from torch import Tensor, nn

from pyro_sinkhorn import SinkhornProgram, Trace_Sinkhorn


def resident() -> float:
    """Megabytes now, freed memory given back first."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main() -> None:
    """Fit, and watch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke-test", action="store_true")
    parser.add_argument("--steps", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = 20 if options.smoke_test else options.steps
    every = steps // 10
    decoder = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 16))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(4)))
            pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x)

    seen: list[tuple[int, float]] = []

    def watch(program: Any, values: dict[str, float]) -> None:
        if values["step"] % every == 0:
            seen.append((int(values["step"]), resident()))

    x = torch.randn(2000, 16)
    program = SinkhornProgram(model, loss=Trace_Sinkhorn(match_size=16))
    with tempfile.TemporaryDirectory() as folder:
        program.fit(
            x,
            num_steps=steps,
            batch_size=64,
            seed=0,
            progress=False,
            validation=0.1,
            validate_every=every,
            checkpoint=Path(folder) / "fit.pt",
            every=every,
            callbacks=[watch],
        )
    late = np.array(seen[1:])
    slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0]) * 1000
    found = {"steps": steps, "megabytes": seen, "megabytes_per_thousand_steps": slope}
    print(found)
    if not options.smoke_test:
        write("long_run", found, seeds=[0])


if __name__ == "__main__":
    main()
