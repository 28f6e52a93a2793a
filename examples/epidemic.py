"""Infer an epidemic from weekly case counts: a stochastic simulator, a budget of runs, and a check of calibration.

    python examples/epidemic.py                # writes epidemic.png and epidemic_calibration.png
    python examples/epidemic.py --smoke-test   # a few steps, to see that everything runs

How many people does one case infect, for how long, and what share of cases is reported? The simulator draws infections,
recoveries and reports day by day; its likelihood would sum over all paths. It is run a fixed number of times, as one would
with a simulator that is slow. Whether the posterior can be believed is then checked on outbreaks whose truth is known
(simulation-based calibration), before it is asked about one outbreak.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from pyro_sinkhorn import SinkhornProgram
from pyro_sinkhorn.models import epidemic, simulate_epidemic

matplotlib.use("Agg")
import matplotlib.pyplot as plt

torch.set_num_threads(1)

WEEKS = 12
TRUTH = {"r0": 1.8, "days": 5.0, "reported": 0.3}
WORDS = {
    "r0": "infected by one case",
    "days": "days infectious",
    "reported": "share of cases reported",
}


def weekly(parameters: dict[str, Tensor]) -> Tensor:
    """Reported cases a week, simulated for every row of these parameters."""
    cases = simulate_epidemic(*(parameters[name] for name in TRUTH), num_days=7 * WEEKS)
    return cases.unflatten(-1, (WEEKS, 7)).sum(-1)


def main() -> None:
    """Simulate one outbreak, train, check, infer, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--num-simulations", type=int, default=20_000)
    parser.add_argument("--output", type=Path, default=Path("epidemic.png"))
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    num_steps = 5 if options.smoke_test else options.num_steps
    num_simulations = 1000 if options.smoke_test else options.num_simulations

    torch.manual_seed(3)
    observed = weekly({name: torch.tensor(value) for name, value in TRUTH.items()})
    print("reported cases a week:", " ".join(f"{int(n)}" for n in observed))

    program = SinkhornProgram(epidemic(num_weeks=WEEKS))
    data = observed.log1p().unsqueeze(0)
    began = time.perf_counter()
    program.calibrate(data, num_steps=num_steps, num_simulations=num_simulations, seed=0)
    print(f"trained on {program.calibration.num_simulations} simulated outbreaks", end=" ")
    print(f"in {time.perf_counter() - began:.0f} s\n")

    report = program.diagnose(data, num_simulations=100 if options.smoke_test else 1000, seed=2)
    calibration = options.output.with_stem(options.output.stem + "_calibration")
    report.plot()["calibration"].savefig(calibration, dpi=110)

    draws = {name: value[:, 0] for name, value in program.posterior(data, num_samples=4000, seed=1).items()}
    print(f"\n{'':<26}{'truth':>8}{'mean':>8}{'sd':>8}{'5%':>8}{'95%':>8}")
    for name, truth in TRUTH.items():
        value = draws[name]
        low, high = value.quantile(torch.tensor([0.05, 0.95]))
        print(f"{WORDS[name]:<26}{truth:>8.2f}{value.mean():>8.2f}{value.std():>8.2f}{low:>8.2f}{high:>8.2f}")
    prior = {
        name: value[:, 0] for name, value in program.generate(4000, data, seed=1).items() if name in TRUTH
    }
    draw(options.output, observed, prior, draws)
    print(f"figures: {options.output}, {calibration}")


def draw(path: Path, observed: Tensor, prior: dict[str, Tensor], posterior: dict[str, Tensor]) -> None:
    """The outbreak among outbreaks simulated from prior and posterior, and the parameters of both."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), width_ratios=[1.5, 1, 1, 1], layout="constrained")
    weeks = range(1, WEEKS + 1)
    clouds = (("prior", prior, "0.6"), ("posterior", posterior, "#0072b2"))
    for label, parameters, colour in clouds:
        low, high = weekly(parameters).quantile(torch.tensor([0.05, 0.95]), 0)
        axes[0].fill_between(weeks, low, high, color=colour, alpha=0.35, lw=0, label=f"{label}, middle 90%")
    axes[0].plot(weeks, observed, "o-", color="black", ms=4, lw=1, label="observed")
    axes[0].set(xlabel="week", ylabel="reported cases", yscale="symlog")
    axes[0].set_ylim(0)
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    for axis, (name, truth) in zip(axes[1:], TRUTH.items(), strict=True):
        low, high = prior[name].quantile(torch.tensor([0.002, 0.995])).tolist()
        for label, parameters, colour in clouds:
            axis.hist(
                parameters[name].clamp(low, high),
                50,
                (low, high),
                density=True,
                color=colour,
                alpha=0.6,
                label=label,
            )
        axis.axvline(truth, color="black", lw=1.2, ls="--", label="truth")
        axis.set(xlabel=WORDS[name], yticks=[], xlim=(low, high))
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
