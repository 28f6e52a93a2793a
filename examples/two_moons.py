"""The posterior of a simulator that has no likelihood: two crescents, drawn by a guide and exactly.

    python examples/two_moons.py                # writes two_moons.png
    python examples/two_moons.py --smoke-test   # a few steps, to see that everything runs

Two moons is a test of simulation-based inference (Lueckmann et al. 2021): the posterior of its two parameters is two bent
crescents, and the simulator can only be run. The guide learns from simulated pairs, and then answers any observation. This
simulator can be inverted by hand, so there are exact draws to compare with.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from pyro_sinkhorn import SinkhornProgram
from pyro_sinkhorn.diagnostics import c2st
from pyro_sinkhorn.models import two_moons, two_moons_posterior

matplotlib.use("Agg")
import matplotlib.pyplot as plt

torch.set_num_threads(1)

OBSERVED = torch.tensor([[0.0, 0.0], [-0.4, 0.3], [-0.7, -0.3]])


def main() -> None:
    """Train, compare with exact draws at three observations, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-steps", type=int, default=6000)
    parser.add_argument("--output", type=Path, default=Path("two_moons.png"))
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    num_steps = 5 if options.smoke_test else options.num_steps
    num_samples = 200 if options.smoke_test else 2000

    # The data say how many pairs a step simulates and that a datum has two columns. Their values are not read.
    program = SinkhornProgram(two_moons())
    began = time.perf_counter()
    program.calibrate(torch.zeros(256, 2), num_steps=num_steps, seed=0)
    print(f"trained on {program.calibration.num_simulations} simulations", end=" ")
    print(f"in {time.perf_counter() - began:.0f} s")

    torch.manual_seed(1)
    draws = program.posterior(OBSERVED, num_samples=num_samples, seed=1)["theta"]
    exact = torch.stack([two_moons_posterior(x, num_samples) for x in OBSERVED], 1)
    print(
        "\nc2st: accuracy of a classifier told to tell guide from exact draws; .5 is chance, 1 is easy"
        f"\n\n{'x':<16}{'c2st':>7}{'share of draws with theta1 + theta2 > 0 (exact: .5)':>56}"
    )
    for i, x in enumerate(OBSERVED):
        told = c2st(exact[:, i], draws[:, i], seed=1)
        share = (draws[:, i].sum(-1) > 0).double().mean()
        print(f"({x[0]:>5.2f}, {x[1]:>5.2f}){told.value:>9.3f}{share:>56.3f}")
    draw(options.output, exact, draws)
    print(f"\nfigure: {options.output}")


def draw(path: Path, exact: Tensor, draws: Tensor) -> None:
    """Exact draws above, the guide's below, a column an observation."""
    figure, axes = plt.subplots(
        2, len(OBSERVED), figsize=(9, 6.2), sharex=True, sharey=True, layout="constrained"
    )
    rows = (("exact", exact, "0.25"), ("guide", draws, "#0072b2"))
    for row, (name, cloud, colour) in zip(axes, rows, strict=True):
        for i, (axis, x) in enumerate(zip(row, OBSERVED, strict=True)):
            axis.scatter(*cloud[:, i].T, s=3, lw=0, alpha=0.4, color=colour)
            axis.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
            if cloud is exact:
                axis.set_title(f"x = ({x[0]:.1f}, {x[1]:.1f})", loc="left")
            else:
                axis.set_xlabel(r"$\theta_1$")
        row[0].set_ylabel(f"{name}\n" + r"$\theta_2$")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
