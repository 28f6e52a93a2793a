"""Bayesian regression without a Markov chain: one guide answers for 10 patients and for 100.

    python examples/bayesian_regression.py                # writes bayesian_regression.png
    python examples/bayesian_regression.py --smoke-test   # a few steps, to see that everything runs

Progress of diabetes is regressed on five standardised measurements (Efron et al. 2004; bundled with scikit-learn). Weights
and noise are globals, read off a whole data set. The guide is trained on simulated responses for 10 to 100 patients drawn
from the table; the true responses are only looked at when it is asked for the posterior. The exact posterior, printed
beside, is normal given the noise, which is integrated on a grid.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from pyro_sinkhorn import SinkhornProgram
from pyro_sinkhorn.models import regression_with_globals

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from sklearn.datasets import load_diabetes

torch.set_num_threads(1)

COLUMNS = {"age": "age", "sex": "sex", "bmi": "body mass", "bp": "blood pressure", "s5": "triglycerides"}
SIZES = (10, 30, 100)
WEIGHT_SCALE, NOISE_SCALE = 0.5, 1.0


def diabetes() -> tuple[Tensor, Tensor]:
    """Responses and measurements of 442 patients, in random order, every column of mean 0 and standard deviation 1."""
    bunch = load_diabetes()
    table = torch.tensor(bunch.data)[:, [bunch.feature_names.index(name) for name in COLUMNS]]
    table = torch.cat([torch.tensor(bunch.target).unsqueeze(-1), table], -1)
    table = (table - table.mean(0)) / table.std(0)
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))].float()
    return table[:, 0], table[:, 1:]


def exact_draws(y: Tensor, features: Tensor, num_samples: int) -> dict[str, Tensor]:
    """Draws of the exact posterior: the noise on a grid, the weights normal given it."""
    y, features = y.double(), features.double()
    n, k = features.shape
    noise = torch.linspace(0.2, 3.0, 2000).double()
    precision = (
        features.mT @ features / noise.reshape(-1, 1, 1) ** 2 + torch.eye(k).double() / WEIGHT_SCALE**2
    )
    factor = torch.linalg.cholesky(precision)
    right = (features.mT @ y) / noise.unsqueeze(-1) ** 2
    mean = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    # The marginal likelihood of the noise, weights integrated out, times its half-normal prior.
    log_p = -n * noise.log() - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_p += 0.5 * ((mean * right).sum(-1) - y.square().sum() / noise**2 - noise**2 / NOISE_SCALE**2)
    pick = torch.multinomial(log_p.softmax(0), num_samples, replacement=True)
    standard = torch.randn(num_samples, k, 1).double()
    weights = mean[pick] + torch.linalg.solve_triangular(factor[pick].mT, standard, upper=True).squeeze(-1)
    return {"weights": weights, "noise": noise[pick]}


def numbers(draws: dict[str, Tensor]) -> Tensor:
    """All latents as columns, ``(num_samples, 6)``."""
    return torch.cat([draws["weights"].flatten(1), draws["noise"].reshape(-1, 1)], -1).double()


def main() -> None:
    """Train once, infer for three sizes, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-steps", type=int, default=2500)
    parser.add_argument("--output", type=Path, default=Path("bayesian_regression.png"))
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    num_steps = 5 if options.smoke_test else options.num_steps
    num_samples = 200 if options.smoke_test else 4000

    y, features = diabetes()
    program = SinkhornProgram(regression_with_globals(weight_scale=WEIGHT_SCALE, noise_scale=NOISE_SCALE))
    began = time.perf_counter()
    program.calibrate(y, features, sizes=(10, 100), num_steps=num_steps, seed=0)
    print(f"trained on {program.calibration.num_simulations} simulated data sets", end=" ")
    print(f"in {time.perf_counter() - began:.0f} s")

    torch.manual_seed(1)
    found, exact = {}, {}
    for n in SIZES:
        found[n] = numbers(program.posterior(y[:n], features[:n], num_samples=num_samples, seed=1))
        exact[n] = numbers(exact_draws(y[:n], features[:n], 10 * num_samples))
        print(f"\n{n} patients{'exact':>20}{'guide':>17}\n{'':<16}{'mean':>9}{'sd':>8}{'mean':>9}{'sd':>8}")
        for i, name in enumerate([*COLUMNS.values(), "noise"]):
            pairs = [(cloud[:, i].mean(), cloud[:, i].std()) for cloud in (exact[n], found[n])]
            print(f"{name:<16}" + "".join(f"{mean:>9.3f}{sd:>8.3f}" for mean, sd in pairs))
        shift = ((found[n].mean(0) - exact[n].mean(0)) / exact[n].std(0)).abs().max()
        spread = (found[n].std(0) / exact[n].std(0) - 1).abs().max()
        print(f"means off by at most {shift:.2f} standard deviations, those by at most {spread:.0%}")
    draw(options.output, exact, found)
    print(f"\nfigure: {options.output}")


def draw(path: Path, exact: dict[int, Tensor], found: dict[int, Tensor]) -> None:
    """Mean and middle 90% of weights and noise, exact and by the guide, for every number of patients."""
    figure, axes = plt.subplots(
        1, len(SIZES), figsize=(11, 3.6), sharex=True, sharey=True, layout="constrained"
    )
    names = [*COLUMNS.values(), "noise"]
    for axis, n in zip(axes, SIZES, strict=True):
        for label, cloud, colour, shift in (
            ("exact", exact[n], "0.45", -0.14),
            ("guide", found[n], "#0072b2", 0.14),
        ):
            low, high = cloud.quantile(torch.tensor([0.05, 0.95]).double(), 0)
            places = torch.arange(len(names)) + shift
            axis.hlines(places, low, high, color=colour, lw=3, alpha=0.6)
            axis.scatter(cloud.mean(0), places, color=colour, s=22, zorder=3, label=label)
        axis.axvline(0, color="0.85", lw=1, zorder=0)
        axis.set_title(f"{n} patients", loc="left")
        axis.set_xlabel("mean and middle 90%")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
