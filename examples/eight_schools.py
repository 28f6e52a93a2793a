"""Infer eight schools by a guide that was trained on simulated schools, and then other schools at once.

    python examples/eight_schools.py                # writes eight_schools.png
    python examples/eight_schools.py --smoke-test   # a few steps, to see that everything runs

The guide is trained once, on data sets that the program simulates: 4 to 12 schools, with standard errors between 8 and 20. It
sees the data of the eight schools only when it is asked for their posterior. The numbers it is printed beside are those of
posteriordb (eight_schools, reference posterior of 10,000 draws, github.com/stan-dev/posteriordb). A second data set, of five
schools, is then answered by the same guide with no further training, beside numerical integration; and since this program
has a density, its draws are refined by Markov chains in the end.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from pyro_sinkhorn import SinkhornProgram
from pyro_sinkhorn.models import eight_schools, eight_schools_data

matplotlib.use("Agg")
import matplotlib.pyplot as plt

torch.set_num_threads(1)

#: posteriordb's reference posterior: mean, standard deviation, 5%, 95%.
PUBLISHED = {
    "mu": (4.411, 3.309, -0.94, 9.83),
    "tau": (3.602, 3.198, 0.26, 9.73),
    "theta[1]": (6.151, 5.616, -1.68, 16.33),
    "theta[2]": (4.940, 4.645, -2.22, 12.82),
    "theta[3]": (3.906, 5.280, -4.91, 11.84),
    "theta[4]": (4.796, 4.771, -2.67, 12.64),
    "theta[5]": (3.614, 4.614, -4.26, 10.60),
    "theta[6]": (4.051, 4.796, -3.87, 11.52),
    "theta[7]": (6.317, 5.003, -0.85, 15.31),
    "theta[8]": (4.884, 5.317, -3.32, 13.55),
}
#: Five schools made up for this script, which differ much.
OTHERS = torch.tensor([-12.0, 3.0, 31.0, 22.0, 40.0]), torch.tensor([9.0, 12.0, 10.0, 15.0, 11.0])
Summary = dict[str, tuple[float, float, float, float]]


def summary(draws: dict[str, Tensor]) -> Summary:
    """Mean, standard deviation, 5% and 95% of every number."""
    found = {}
    for name, value in draws.items():
        columns = value.reshape(len(value), -1).unbind(-1)
        for i, column in enumerate(columns, 1):
            low, high = column.quantile(torch.tensor([0.05, 0.95]).to(column)).tolist()
            label = f"{name}[{i}]" if len(columns) > 1 else name
            found[label] = (column.mean().item(), column.std().item(), low, high)
    return found


def exact_draws(y: Tensor, sigma: Tensor, num_samples: int = 100_000) -> dict[str, Tensor]:
    """Draws of the exact posterior: tau on a fine grid, all else is normal given tau."""
    y, sigma = y.double(), sigma.double()
    # Equal steps of the prior's probability, HalfCauchy(5), so that every point of the grid has the same prior.
    tau = 5 * (torch.pi / 2 * (torch.arange(20_000).double() + 0.5) / 20_000).tan()
    variance = sigma**2 + tau.unsqueeze(-1) ** 2
    precision = (1 / variance).sum(-1) + 1 / 25
    mean = (y / variance).sum(-1) / precision
    # The marginal likelihood of tau, mu integrated out.
    log_p = -0.5 * (
        variance.log().sum(-1) + (y**2 / variance).sum(-1) + precision.log() - precision * mean**2
    )
    pick = torch.multinomial(log_p.softmax(0), num_samples, replacement=True)
    tau, mu = tau[pick], mean[pick] + torch.randn(num_samples).double() / precision[pick].sqrt()
    share = 1 / (1 + (sigma / tau.unsqueeze(-1)) ** 2)
    centre = mu.unsqueeze(-1) + share * (y - mu.unsqueeze(-1))
    theta = centre + (share.sqrt() * sigma) * torch.randn(num_samples, len(y)).double()
    return {"mu": mu, "tau": tau, "theta": theta}


def compare(title: str, exact: Summary, others: dict[str, Summary]) -> None:
    """A table of means and standard deviations, and how far off each column is."""
    print(f"\n{title}")
    print(f"{'':<10}" + "".join(f"{name:>18}" for name in others))
    print(f"{'':<10}" + "".join(f"{'mean':>11}{'sd':>7}" for _ in others))
    for label in exact:
        print(f"{label:<10}" + "".join(f"{s[label][0]:>11.2f}{s[label][1]:>7.2f}" for s in others.values()))
    for name, found in list(others.items())[1:]:
        shift = max(abs(found[k][0] - exact[k][0]) / exact[k][1] for k in exact)
        spread = max(abs(found[k][1] / exact[k][1] - 1) for k in exact)
        print(f"{name}: means off by at most {shift:.2f} standard deviations, those by at most {spread:.0%}")


def main() -> None:
    """Train once, infer twice, refine, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--output", type=Path, default=Path("eight_schools.png"))
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    num_steps = 5 if options.smoke_test else options.num_steps
    num_samples = 200 if options.smoke_test else 4000

    # Only the standard errors of these schools are read, as a covariate; their effects are simulated.
    torch.manual_seed(0)
    errors = 8 + 12 * torch.rand(400)
    program = SinkhornProgram(eight_schools())
    began = time.perf_counter()
    program.calibrate(torch.zeros(400), errors, sizes=(4, 12), num_steps=num_steps, seed=0)
    print(f"trained on {program.calibration.num_simulations} simulated data sets", end=" ")
    print(f"in {time.perf_counter() - began:.0f} s")

    schools = eight_schools_data()
    eight = summary(program.posterior(*schools, num_samples=num_samples, seed=1))
    compare("the eight schools", PUBLISHED, {"published": PUBLISHED, "guide": eight})

    began = time.perf_counter()
    draws = program.posterior(*OTHERS, num_samples=num_samples, seed=1)
    print(f"\n{num_samples} draws for five other schools in {time.perf_counter() - began:.2f} s; refined:")
    steps = 10 if options.smoke_test else 100
    refined = program.posterior(
        *OTHERS, num_samples=num_samples, seed=1, refine_steps=steps, check_range=False
    )
    exact = summary(exact_draws(*OTHERS))
    five = {"exact": exact, "guide": summary(draws), "refined": summary(refined)}
    compare("five other schools", exact, five)

    draw(options.output, schools, {"published": PUBLISHED, "guide": eight}, five)
    print(f"figure: {options.output}")


def draw(
    path: Path, schools: tuple[Tensor, Tensor], eight: dict[str, Summary], five: dict[str, Summary]
) -> None:
    """Means and middle 90% of the schools' effects, both data sets."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=[3, 2], layout="constrained")
    colours = {"published": "0.45", "exact": "0.45", "guide": "#0072b2", "refined": "#d55e00"}
    panels = (("the eight schools", schools, eight), ("five other schools, same guide", OTHERS, five))
    for axis, (title, (y, _), summaries) in zip(axes, panels, strict=True):
        names = ["mu", "tau", *(f"theta[{i}]" for i in range(1, len(y) + 1))]
        axis.scatter(range(2, len(names)), y, marker="x", color="black", s=28, label="observed", zorder=3)
        for i, (label, found) in enumerate(summaries.items()):
            places = [j + 0.2 * (i - (len(summaries) - 1) / 2) for j in range(len(names))]
            mean, _, low, high = zip(*(found[name] for name in names), strict=True)
            axis.vlines(places, low, high, color=colours[label], lw=3, alpha=0.6)
            axis.scatter(places, mean, color=colours[label], s=22, zorder=3, label=label)
        labels = [r"$\mu$", r"$\tau$", *(rf"$\theta_{{{i}}}$" for i in range(1, len(y) + 1))]
        axis.set_xticks(range(len(names)), labels)
        axis.axhline(0, color="0.85", lw=1, zorder=0)
        axis.set_title(title, loc="left")
        axis.legend(frameon=False, fontsize=8, loc="upper center", ncols=4, bbox_to_anchor=(0.5, -0.08))
    axes[0].set_ylabel("points; mean and middle 90%")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
