r"""An encoder alone, without a decoder: Swiss roll into a square and a sphere, MNIST into a sphere (SAE, section on maps).

The encoder :math:`z = f(x)` is deterministic and trained by the match alone, so that :math:`f\#\,\mathrm{data}` is the
prior. As a Pyro program this is a model whose likelihood is masked out (:func:`program`). Spaces, with the paper's
epsilon in units of squared distance:

square     Swiss roll, uniform on [0, 1]^2, epsilon .001; two hidden layers of 50, ReLU
sphere     Swiss roll, uniform on the sphere in three coordinates, epsilon .001; the same network
mnist      MNIST, uniform on the sphere in ten coordinates, epsilon .5; two hidden layers of 256, ReLU

Methods share network, start, data order, optimiser and steps; nothing is tuned.

ours             ``Trace_Sinkhorn`` with independent halves, at the paper's epsilon
ours, default    the same with the library's epsilon, a tenth of the mean cost between prior draws
published        one batch, sharp cost, gradients unrolled through the paper's default of L = 50 iterations (square only)
converged        one batch, iterations to convergence. On the Swiss roll with the envelope gradient of the entropic cost,
                 which is the limit of the other (see ``agreement``): unrolling until the plan's marginals are right
                 to 1% takes seconds a step at this epsilon. On MNIST it is the sharp cost, unrolled
same batch       one batch, debiased by its own self terms (v3)
sliced           sliced Wasserstein distance, 100 projections

    python benchmarks/papers/encoder_only.py --data-dir ../shared/data   # ten minutes of one core
    python benchmarks/papers/encoder_only.py --figure                    # draws the kept maps again
    python benchmarks/papers/encoder_only.py --smoke-test
"""

from __future__ import annotations

import argparse
import base64
import functools
import itertools
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _path
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _report import RESULTS
from _resume import Rows
from pyro import poutine
from pyro.infer import SVI
from sklearn.datasets import load_digits, make_swiss_roll
from sklearn.manifold import trustworthiness
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from pyro_sinkhorn import Implicit, Trace_Sinkhorn
from pyro_sinkhorn.distributions import HypersphericalUniform
from pyro_sinkhorn.losses.latent_match import LatentMatch
from pyro_sinkhorn.ot import ConvergenceWarning, sinkhorn

NAME = "papers_encoder_only"
METHODS = ("untrained", "ours", "ours, default", "published", "converged", "same batch", "sliced")
#: The roll needs few data a step: a step of the unrolled loss costs the square of their number.
SETTINGS: dict[str, dict[str, Any]] = {
    "square": {"epsilon": 1e-3, "batch": 128, "steps": 500, "lr": 5e-3, "hidden": 50},
    "sphere": {"epsilon": 1e-3, "batch": 128, "steps": 500, "lr": 5e-3, "hidden": 50},
    "mnist": {"epsilon": 0.5, "batch": 256, "steps": 500, "lr": 2e-3, "hidden": 256},
}
PRIORS: dict[str, Callable[[], Any]] = {
    "square": lambda: dist.Uniform(torch.zeros(2), torch.ones(2)).to_event(1),
    "sphere": lambda: HypersphericalUniform(3),
    "mnist": lambda: HypersphericalUniform(10),
}
#: Mean squared distance of two prior draws: what ``relative_epsilon`` multiplies.
MEAN_COST = {"square": 1 / 3, "sphere": 2.0, "mnist": 2.0}
SHOWN = 700
REFERENCE_SEED, AGREEMENT_SEED = 77, 5
N_TEST = 2000


class Normalise(nn.Module):
    """Onto the unit sphere."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


class SlicedMatch(LatentMatch):
    """Sliced Wasserstein distance of the same clouds (Kolouri et al. 2018), squared, by sorted projections."""

    def divergence(
        self, x: Any, y: Any, mean: Tensor, group: str, paired: bool, cost: Any = "sqeuclidean"
    ) -> Tensor:
        """One value a particle, over the mean prior-prior cost."""
        directions = nn.functional.normalize(torch.randn(x.points.shape[-1], 100), dim=0)
        along_x, along_y = (cloud.points @ directions for cloud in (x, y))
        difference = along_x.sort(-2).values - along_y.sort(-2).values
        return difference.square().mean((-2, -1)) / mean


def make_loss(method: str, space: str) -> Trace_Sinkhorn:
    """The match alone: there is nothing to weigh it against."""
    settings = SETTINGS[space]
    paper, half = settings["epsilon"] / MEAN_COST[space], settings["batch"] // 2
    unrolled: dict[str, Any] = {"debias": None, "value": "sharp", "gradient": "unrolled"}
    options: dict[str, dict[str, Any]] = {
        "ours": {"relative_epsilon": paper},
        "ours, default": {},
        "published": {"relative_epsilon": paper, "tolerance": 0.0, "max_iters": 50} | unrolled,
        "converged": {"relative_epsilon": paper} | (unrolled if space == "mnist" else {"debias": None}),
        "same batch": {"relative_epsilon": paper, "debias": "self"},
        "sliced": {},
    }
    loss = Trace_Sinkhorn(prior_weight=1.0, match_size=half, **options[method])
    if method == "sliced":
        loss.matcher = SlicedMatch(loss.latent_match.options)
    return loss


def make_encoder(space: str, num_inputs: int) -> nn.Module:
    hidden, outputs = SETTINGS[space]["hidden"], PRIORS[space]().event_shape[0]
    return nn.Sequential(
        nn.Linear(num_inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
        nn.Sigmoid() if space == "square" else Normalise(),
    )


def program(space: str, encoder: nn.Module) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """Model and guide. The observed site says what the data are and how many; its density is masked out."""
    prior = PRIORS[space]()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior)
            with poutine.mask(mask=False):
                pyro.sample("x", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", Implicit(encoder(x), event_dim=1))

    return model, guide


class Data:
    """Inputs to train and to test on, with labels or the position along the roll."""

    def __init__(self, space: str, folder: Path | None) -> None:
        if space != "mnist":
            points, position = make_swiss_roll(4000 + N_TEST, random_state=0)
            x = torch.tensor(points, dtype=torch.float32)
            x, y = (x - x.mean(0)) / x.std(0), torch.tensor(position)
            self.train, self.test, self.y_train, self.y_test = x[:4000], x[4000:], y[:4000], y[4000:]
        elif folder is None:
            digits = load_digits()
            x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
            self.train, self.test, self.y_train, self.y_test = x[:1400], x[1400:], y[:1400], y[1400:]
        else:
            with np.load(folder / "mnist.npz") as held:
                self.train, self.test = (
                    torch.tensor(held[part].reshape(-1, 784) / np.float32(255))
                    for part in ("x_train", "x_test")
                )
                self.y_train, self.y_test = (torch.tensor(held[part]) for part in ("y_train", "y_test"))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased: 2 E|x-y| - E|x-x'| - E|y-y'|."""
    n, m = len(x), len(y)
    within_x, within_y = torch.cdist(x, x).sum() / (n * (n - 1)), torch.cdist(y, y).sum() / (m * (m - 1))
    return float(2 * torch.cdist(x, y).mean() - within_x - within_y)


def train(method: str, space: str, data: Data, encoder: nn.Module, steps: int) -> float:
    """Fit in place; CPU milliseconds a step."""
    if method == "untrained":
        return 0.0
    settings = SETTINGS[space]
    pyro.clear_param_store()
    schedule = pyro.optim.CosineAnnealingLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": settings["lr"]}, "T_max": steps}
    )
    svi = SVI(*program(space, encoder), schedule, loss=make_loss(method, space))
    start = time.process_time()
    for _ in range(steps):
        svi.step(data.train[torch.randint(len(data.train), (settings["batch"],))])
        schedule.step()
    return (time.process_time() - start) / steps * 1e3


def run(method: str, space: str, seed: int, data: Data, steps: int | None = None) -> dict[str, Any]:
    """Fit once, measure on data not trained on."""
    pyro.set_rng_seed(seed)
    encoder = make_encoder(space, data.train.shape[-1])
    ms = train(method, space, data, encoder, steps or SETTINGS[space]["steps"])
    x, labels = data.test[:N_TEST], data.y_test[:N_TEST]
    with torch.no_grad():
        z = encoder(x)
    pyro.set_rng_seed(1000 + seed)
    row: dict[str, Any] = {
        "energy": energy_distance(z, PRIORS[space]().sample((len(z),))),
        "trustworthiness": float(trustworthiness(x.numpy(), z.numpy(), n_neighbors=12)),
        "continuity": float(trustworthiness(z.numpy(), x.numpy(), n_neighbors=12)),
        "cpu_ms_per_step": ms,
    }
    if space == "mnist":
        with torch.no_grad():
            codes = encoder(data.train[:10_000])
        row["knn_accuracy"] = neighbours(codes, data.y_train[:10_000], z, labels)
    elif seed == 0:
        row["map"] = base64.b64encode((z[:SHOWN] * 10_000).short().numpy().tobytes()).decode()
    return row


def neighbours(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> float:
    """Share of held-out labels that five neighbours guess."""
    return float(KNeighborsClassifier(5).fit(x, y).score(x_test, y_test))


def reference(space: str, data: Data) -> dict[str, Any]:
    """What a perfect match measures; k-NN on the pixels themselves."""
    pyro.set_rng_seed(REFERENCE_SEED)
    prior, n = PRIORS[space](), len(data.test[:N_TEST])
    floor = torch.tensor([energy_distance(prior.sample((n,)), prior.sample((n,))) for _ in range(40)])
    row: dict[str, Any] = {"floor_mean": float(floor.mean()), "floor_95": float(floor.quantile(0.95))}
    if space == "mnist":
        row["knn_pixels"] = neighbours(
            data.train[:10_000], data.y_train[:10_000], data.test[:N_TEST], data.y_test[:N_TEST]
        )
    return row


def agreement(batch: int, smoke: bool) -> dict[str, Any]:
    """Unrolled sharp gradients on the square against exact transport's, and seconds each takes.

    Five pairs of independent clouds of one law, as late in a training; the cosine is the mean over them.
    """
    torch.manual_seed(AGREEMENT_SEED)
    out = {}
    settings: dict[str, dict[str, Any]] = {
        "envelope": {"tolerance": 1e-2},
        "unrolled, 50": {"tolerance": 0.0, "max_iters": 50, "value": "sharp", "gradient": "unrolled"},
        "unrolled, 1%": {"tolerance": 1e-2, "max_iters": 2000, "value": "sharp", "gradient": "unrolled"},
    }
    pairs = [(torch.rand(batch, 2), torch.rand(batch, 2)) for _ in range(1 if smoke else 5)]
    for name, options in settings.items():
        cosines, seconds, iterations = [], [], []
        for x, y in pairs:
            leaf = x.clone().requires_grad_()
            (exact,) = torch.autograd.grad(sinkhorn(leaf, y, 0.0).value, leaf)
            start = time.process_time()
            found = sinkhorn(leaf, y, SETTINGS["square"]["epsilon"], **options)
            (gradient,) = torch.autograd.grad(found.value, leaf)
            seconds.append(time.process_time() - start)
            cosines.append(float((gradient * exact).sum() / gradient.norm() / exact.norm()))
            iterations.append(found.n_iters)
        out[name] = {
            "cosine": float(np.mean(cosines)),
            "seconds": float(np.median(seconds)),
            "iterations": float(np.mean(iterations)),
        }
    return out


def show_row(row: dict[str, Any]) -> None:
    """One line, without the map."""
    print({name: entry for name, entry in row.items() if name != "map"}, flush=True)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The roll, then both maps of every method, coloured by the position along the roll; Mollweide keeps areas."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = Data("square", None)
    roll, colour = data.test[:SHOWN], data.y_test[:SHOWN]
    maps = {(row["space"], row["method"]): row["map"] for row in rows if "map" in row}
    methods = [m for m in METHODS if ("square", m) in maps]
    figure = plt.figure(figsize=(2.1 * (len(methods) + 1), 4.2), layout="constrained")
    axis = figure.add_subplot(2, len(methods) + 1, 1, projection="3d")
    axis.scatter(*roll.T, c=colour, s=3, cmap="Spectral")
    axis.view_init(12, -80)
    axis.set_xticks([]), axis.set_yticks([]), axis.set_zticks([])
    axis.set_title("Swiss roll", fontsize=9)
    for i, method in enumerate(methods):
        for j, space in enumerate(("square", "sphere")):
            place = j * (len(methods) + 1) + i + 2
            axis = figure.add_subplot(
                2, len(methods) + 1, place, projection="mollweide" if space == "sphere" else None
            )
            if (space, method) not in maps:
                axis.set_axis_off()
                continue
            packed = np.frombuffer(base64.b64decode(maps[space, method]), dtype=np.int16) / 10_000
            z = packed.reshape(SHOWN, -1)
            if space == "sphere":
                z = np.stack([np.arctan2(z[:, 1], z[:, 0]), np.arcsin(z[:, 2].clip(-1, 1))], -1)
            else:
                axis.set_aspect("equal")
                axis.set_xlim(-0.02, 1.02), axis.set_ylim(-0.02, 1.02)
                axis.set_title(method, fontsize=9)
            axis.scatter(*z.T, c=colour, s=3, cmap="Spectral")
            axis.set_xticks([]), axis.set_yticks([])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the study, or draw what is kept of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="folder of mnist.npz; without it scikit-learn's digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--figure", action="store_true", help="draw the kept maps again")
    parser.add_argument("--smoke-test", action="store_true", help="a few steps; writes nothing")
    options = parser.parse_args()
    figure = _path.FIGURES / "encoder_only.png"
    if options.figure:
        draw(json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))["rows"], figure)
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    smoke = options.smoke_test
    if options.data_dir is None and not smoke:
        parser.error("give --data-dir, the folder of mnist.npz")
    rows = Rows(
        NAME, SETTINGS, ("space", "method", "seed"), keep=not smoke, packages=["scikit-learn"], show=show_row
    )
    spaces = {space: Data(space, None if smoke else options.data_dir) for space in SETTINGS}
    for space, data in spaces.items():
        measure = functools.partial(reference, space, data)
        rows.make(measure, space=space, method="reference", seed=REFERENCE_SEED)
    steps, seeds = (2, [0]) if smoke else (None, options.seeds)
    for seed, (space, data), method in itertools.product(seeds, spaces.items(), METHODS):
        # L = 50 is for comparison alone: the paper's maps went to convergence.
        if method == "published" and space != "square":
            continue
        fit = functools.partial(run, method, space, seed, data, steps)
        rows.make(fit, space=space, method=method, seed=seed)
    measure = functools.partial(agreement, SETTINGS["square"]["batch"], smoke)
    rows.make(measure, space="square", method="agreement", seed=AGREEMENT_SEED)
    if not smoke:
        draw(rows.rows, figure)


if __name__ == "__main__":
    main()
