"""Recover the rates of a stochastic predator-prey simulator that has no likelihood, in under a minute.

    python examples/lotka_volterra.py                # writes lotka_volterra.png
    python examples/lotka_volterra.py --smoke-test   # a few steps, to see that everything runs

A thousand trajectories are simulated at known rates. The same program, started at rates twice too large or too small,
is then run beside them, and its rates are moved until simulated trajectories are distributed like the data: optimal
transport between the two clouds, differentiated through the simulator. No density, no summary statistics, no guide.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import pyro
import torch
from torch import Tensor

from pyro_sinkhorn import SinkhornProgram, Trace_DataSinkhorn
from pyro_sinkhorn.models import lotka_volterra

matplotlib.use("Agg")
import matplotlib.pyplot as plt

torch.set_num_threads(1)  # clouds of this size gain nothing from two, and lose much beside a busy neighbour

TRUTH = {"birth": 1.0, "predation": 0.005, "death": 0.6}
START = {"birth": 0.5, "predation": 0.01, "death": 0.3}
TIMES = 8


def simulated(program: SinkhornProgram, n: int, seed: int) -> Tensor:
    """Trajectories of a program with its present rates, ``(n, 2 * TIMES)``."""
    return program.generate(1, torch.empty(n, 2 * TIMES), seed=seed)["x"][0]


def main() -> None:
    """Simulate, fit, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("lotka_volterra.png"))
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    num_steps = 5 if options.smoke_test else options.num_steps

    data = simulated(SinkhornProgram(lotka_volterra(**TRUTH)), 1000, seed=2)
    program = SinkhornProgram(lotka_volterra(**START), loss=Trace_DataSinkhorn())
    before = simulated(program, 1000, seed=1)
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "T_max": num_steps}
    program.fit(data, num_steps=num_steps, seed=0, optim=pyro.optim.CosineAnnealingLR(schedule))
    after = simulated(program, 1000, seed=1)

    with program.active():
        found = {name: pyro.param(name).item() for name in TRUTH}
    print(f"\n{'rate':<12}{'truth':>9}{'start':>9}{'found':>9}{'error':>9}")
    for name, truth in TRUTH.items():
        error = found[name] / truth - 1
        print(f"{name:<12}{truth:>9.4f}{START[name]:>9.4f}{found[name]:>9.4f}{error:>+9.2%}")
    draw(options.output, data, before, after)
    print(f"figure: {options.output}")


def draw(path: Path, data: Tensor, before: Tensor, after: Tensor, shown: int = 25) -> None:
    """Some trajectories of each species and the median of all, beside the data's: data, start, fit."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), sharex=True, sharey="row", layout="constrained")
    times = range(1, TIMES + 1)
    clouds = (
        ("data", data, "0.35"),
        ("simulated before fitting", before, "#d55e00"),
        ("simulated after fitting", after, "#0072b2"),
    )
    observed = populations(data)
    for column, (title, cloud, colour) in zip(axes.T, clouds, strict=True):
        for i, axis in enumerate(column):
            paths = populations(cloud)[i]
            low, median, high = observed[i].quantile(torch.tensor([0.05, 0.5, 0.95]), 0)
            axis.fill_between(times, low, high, color="0.6", alpha=0.3, lw=0, label="data, middle 90%")
            axis.plot(times, paths[:shown].T, color=colour, lw=0.6, alpha=0.5)
            axis.plot(times, paths.quantile(0.5, 0), color=colour, lw=2.5, label="median")
            axis.plot(times, median, color="black", lw=1.2, ls="--", label="data, median")
            axis.set_yscale("symlog", linthresh=10)
        column[0].set_title(title, loc="left")
        column[1].set_xlabel("time")
    for axis, species, ticks in zip(
        axes[:, 0], ("prey", "predators"), ([0, 10, 100], [30, 100, 300]), strict=True
    ):
        axis.set_ylabel(species)
        axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axes[0, 1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def populations(x: Tensor) -> tuple[Tensor, ...]:
    """Prey and predators, each ``(n, TIMES)``, of data on the logarithmic scale of the program."""
    return x.expm1().reshape(-1, 2, TIMES).unbind(1)


if __name__ == "__main__":
    main()
