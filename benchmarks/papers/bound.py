"""The bound of the Sinkhorn autoencoders on a fitted program: the example of docs/papers.md.

    python benchmarks/papers/bound.py
    python benchmarks/papers/bound.py --smoke-test

Noisy points on a curved surface in five dimensions, a perceptron of two normal latents fitted to them for 500 steps, and
what ``diagnose(bound=True)`` then says. The report is kept as it is printed.
"""

from __future__ import annotations

import argparse

import _path  # noqa: F401
import pyro
import pyro.distributions as dist
import torch
from _report import write
from torch import Tensor, nn

from pyro_sinkhorn import SinkhornProgram, Trace_Sinkhorn
from pyro_sinkhorn.diagnostics import wasserstein_bound

SEED, NOISE = 0, 0.1


def points(n: int) -> Tensor:
    """A surface over the plane, bent, and noise."""
    u = torch.randn(n, 2)
    bent = torch.stack([u[:, 0], u[:, 1], u.prod(-1) / 2, u[:, 0].sin(), u[:, 1].cos()], -1)
    return bent + NOISE * torch.randn(n, 5)


def main() -> None:
    """Fit, bound, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    n, steps = (100, 2) if options.smoke_test else (2000, 500)
    x = points(n)
    decoder = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 5))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), NOISE).to_event(1), obs=x)

    loss = Trace_Sinkhorn(prior_weight=30.0, match_size=16 if options.smoke_test else 64)
    program = SinkhornProgram(model, loss=loss)
    program.fit(x, num_steps=steps, batch_size=min(256, n), seed=SEED, progress=False)
    torch.manual_seed(SEED)
    with program.active(), torch.no_grad():
        report = wasserstein_bound(model, program.guide, x)
    print(report)
    if not options.smoke_test:
        write("papers_bound", {"steps": steps, "report": str(report).splitlines()}, seeds=[SEED])


if __name__ == "__main__":
    main()
