r"""The manifold of MNIST: digits decoded from the unit square by transport alone (Genevay, Peyré and Cuturi 2017, 4.2).

    python benchmarks/papers/mnist_manifold.py --data-dir FOLDER     # about half an hour of one core
    python benchmarks/papers/mnist_manifold.py --smoke-test          # scikit-learn's digits; writes nothing

z ~ Uniform([0, 1]^2), x = sigmoid(f(z)), f a perceptron with two hidden layers; no likelihood, no encoder. All fits start
from the same generator, see the same minibatches where these have one size, and make the same number of steps of Adam,
unless said otherwise, by ``Trace_DataSinkhorn``:

- *the paper's form*: :math:`\bar W = 2W(\mu,\nu) - W(\mu,\mu) - W(\nu,\nu)` on one batch, W the sharp value
  :math:`\langle P, C\rangle` after exactly L iterations, the gradient unrolled through them. C is the squared distance of grey
  values in [0, 1], 105 on average between two digits, and epsilon is taken to be in its unit. The factor 2 of this
  convention changes nothing under Adam
- *halves*: this package's defaults, independent halves of the batch, entropic value at convergence, envelope gradient,
  epsilon a tenth of the mean cost; also with three times the steps, about the time of the paper's form, and with its
  epsilon (at most 100 iterations)
- *energy distance*: the same halves with the distance itself as cost and epsilon -> infinity
- *MMD*: unbiased, mixture of five Gaussian kernels around the median distance

Learning rates are chosen from ``RATES`` for each method by the Fréchet distance to held-out training images after
``TUNING_STEPS`` steps with a seed that is not reported; two rows take theirs from another, see ``Method.tuned_as``. For
the energy distance and MMD that was the largest one, at which whole fits end in speckles: they might do better by a
smaller one.

Measures, of 5000 images against the test images:

- ``frechet``: between normals fitted to the features of a small classifier
- ``present``: of the ten digits, how many make up at least 1% of the images, counting those that the classifier is sure of
  (probability above .9); ``unsure`` is the share of the others
- ``energy``: energy distance between pixels

As many training images in place of generated ones say what could be reached.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _path
import numpy as np
import pyro
import torch
from _mnist import Classifier, Split, classifier, fit_classifier, load
from _report import RESULTS
from _resume import Rows
from digits import energy_distance
from learned_cost import GaussianMMD, pixel_distance
from torch import Tensor, nn

from pyro_sinkhorn import SinkhornProgram, Trace_DataSinkhorn
from pyro_sinkhorn.models.image_generator import image_generator, latent_grid
from pyro_sinkhorn.ot import ConvergenceWarning

STEPS, TUNING_STEPS, TUNING_SEED, SEEDS = 500, 150, 100, [0, 1, 2]
RATES = [3e-3, 1e-2, 3e-2]
SCORED, SIDE = 5000, 10
PANELS = RESULTS / "papers_mnist_manifold.npz"
FIGURE = _path.FIGURES / "mnist_manifold.png"


class Kernels(GaussianMMD):
    """For programs, which start from a fresh copy of their loss."""

    def fresh(self) -> Kernels:
        """It learns nothing."""
        return copy.copy(self)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    batch:     images a step
    options:   of the loss
    kernel:    "" for transport, "mmd" for Gaussian kernels
    longer:    factor on the number of steps
    seeds:     how many
    tuned_as:  method whose learning rate it has; its own if empty
    """

    name: str
    batch: int
    options: dict[str, Any]
    kernel: str = ""
    longer: int = 1
    seeds: int = 3
    tuned_as: str = ""

    def loss(self, data: Tensor) -> Trace_DataSinkhorn:
        """The loss; ``epsilon`` among the options is absolute."""
        options = dict(self.options)
        if "epsilon" in options:
            options["relative_epsilon"] = options.pop("epsilon") / mean_cost(data)
        loss = Trace_DataSinkhorn(match_size=self.batch // 2, scale=None, **options)
        if self.kernel == "mmd":
            loss.matcher = Kernels(loss, 1.0, data[:1000])
        return loss


def paper(epsilon: float, iterations: int) -> dict[str, Any]:
    """The paper's form of the loss."""
    return {
        "epsilon": epsilon,
        "value": "sharp",
        "gradient": "unrolled",
        "tolerance": 0.0,
        "max_iters": iterations,
        "debias": "self",
    }


def mean_cost(data: Tensor) -> float:
    """Mean squared distance between two images."""
    return 2 * float(data[:5000].var(0).sum())


#: A row of the results that is no fit: as many training images. A panel of the figure that is none.
FLOOR, TEST = "training images", "test images"
METHODS = [
    Method("paper's form, ε = 1, L = 10, m = 200", 200, paper(1.0, 10)),
    Method(
        "paper's form, ε = .1, L = 100, m = 200",
        200,
        paper(0.1, 100),
        seeds=1,
        tuned_as="paper's form, ε = 1, L = 10, m = 200",
    ),
    Method("paper's form, ε = 1, L = 10, m = 10", 10, paper(1.0, 10)),
    Method("halves, m = 200", 200, {}),
    Method("halves, m = 10", 10, {}),
    Method("halves, m = 200, 3x steps", 200, {}, longer=3, tuned_as="halves, m = 200"),
    Method("halves, ε = 1, m = 200", 200, {"epsilon": 1.0, "max_iters": 100}),
    Method("energy distance, m = 200", 200, {"relative_epsilon": 1e3, "cost": pixel_distance}),
    Method("MMD, Gaussian kernels, m = 200", 200, {}, kernel="mmd"),
]


def fit(
    method: Method, rate: float, seed: int, steps: int, data: Split, hidden: int
) -> tuple[nn.Module, dict[str, float]]:
    """The decoder, and what it cost."""
    torch.manual_seed(seed)
    model = image_generator(data.train.shape[1], hidden)
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": rate}, "T_max": steps}
    program = SinkhornProgram(model, loss=method.loss(data.train))
    began = time.process_time()
    program.fit(
        data.train,
        num_steps=steps,
        batch_size=method.batch,
        seed=seed,
        optim=pyro.optim.CosineAnnealingLR(schedule),
        progress=False,
    )
    seconds = time.process_time() - began
    return program.modules["decoder"], {"cpu_seconds": seconds, "ms_per_step": 1e3 * seconds / steps}


@torch.no_grad()
def decode(decoder: nn.Module, z: Tensor) -> Tensor:
    """Split of points of the square."""
    return decoder(z).sigmoid()


@torch.no_grad()
def scores(judge: Classifier, images: Tensor, reference: Tensor) -> dict[str, float]:
    """How far images are from reference images."""
    sure, label = judge.verdicts(images).max(-1)
    counts = torch.bincount(label[sure > 0.9], minlength=10)
    return {
        "frechet": judge.frechet(images, reference),
        "present": int((counts >= len(images) / 100).sum()),
        "unsure": float((sure <= 0.9).double().mean()),
        "energy": energy_distance(images, reference),
    }


@dataclass
class Study:
    """What all fits share."""

    data: Split
    judge: Classifier
    rows: Rows
    steps: int
    tuning_steps: int
    hidden: int
    scored: int
    panels: dict[str, np.ndarray]
    keep: bool

    def run(self, method: Method, rate: float, seed: int) -> None:
        """Fit and score, unless that is done."""
        tuning = seed == TUNING_SEED
        steps = self.tuning_steps if tuning else self.steps * method.longer
        self.rows.make(
            lambda: self.row(method, rate, seed, steps), method=method.name, rate=rate, seed=seed, steps=steps
        )

    def row(self, method: Method, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """One fit; of seed 0 the decoded square is kept."""
        held = self.data.validation if seed == TUNING_SEED else self.data.test
        decoder, cost = fit(method, rate, seed, steps, self.data, self.hidden)
        z = torch.rand(self.scored, 2, generator=torch.Generator().manual_seed(5))
        found = scores(self.judge, decode(decoder, z), held[: self.scored])
        if seed == 0:
            grid = decode(decoder, latent_grid(SIDE))
            self.panels[method.name] = (grid * 255).round().byte().numpy()
            if self.keep:
                np.savez_compressed(PANELS, allow_pickle=False, **self.panels)
        return found | cost

    def rate_of(self, method: Method) -> float:
        """The chosen learning rate."""
        name = method.tuned_as or method.name
        tried = [row for row in self.rows.rows if row["seed"] == TUNING_SEED and row["method"] == name]
        return min(tried, key=lambda row: row["frechet"])["rate"]


def draw(panels: dict[str, np.ndarray]) -> None:
    """The decoded square of every method, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in (*(method.name for method in METHODS), TEST) if name in panels]
    figure, axes = plt.subplots(2, 5, figsize=(15, 6.6), layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        images = panels[name]
        side = round(images.shape[-1] ** 0.5)
        tiles = images.reshape(SIDE, SIDE, side, side).transpose(0, 2, 1, 3).reshape(SIDE * side, -1)
        axis.imshow(tiles, cmap="gray_r", vmin=0, vmax=255)
        axis.set_title(name, fontsize=10, loc="left")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)
    plt.close(figure)
    print("wrote", FIGURE)


def main() -> None:
    """Tune, fit, print, write, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="folder of mnist.npz")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    if options.data_dir is None and not options.smoke_test:
        parser.error("give the folder of mnist.npz as --data-dir")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    smoke = options.smoke_test
    steps, tuning_steps, hidden, seeds = (
        (1, 1, 32, [0]) if smoke else (STEPS, TUNING_STEPS, 256, options.seeds)
    )
    # Small epsilons underflow, and processors are slow at numbers below the normal range.
    torch.set_flush_denormal(True)
    data = load(None if smoke else options.data_dir)
    judge = fit_classifier(data, 1) if smoke else classifier(data)
    settings = {
        "steps": steps, "tuning_steps": tuning_steps, "hidden": hidden, "rates": RATES, "scored": SCORED,
        "mean_cost": mean_cost(data.train),
    }  # fmt: skip
    rows = Rows("papers_mnist_manifold", settings, ["method", "rate", "seed", "steps"], keep=not smoke)
    panels = dict(np.load(PANELS)) if not smoke and PANELS.exists() else {}
    panels[TEST] = (data.test[: SIDE**2] * 255).byte().numpy()
    study = Study(
        data, judge, rows, steps, tuning_steps, hidden, 300 if smoke else SCORED, panels, keep=not smoke
    )
    rows.make(
        lambda: scores(judge, data.train[:SCORED], data.test[:SCORED]) | {"accuracy": judge.accuracy(data.test, data.y_test)},
        method=FLOOR, rate=0.0, seed=0, steps=0,
    )  # fmt: skip
    for method in METHODS:
        for rate in [] if method.tuned_as else RATES[:1] if smoke else RATES:
            study.run(method, rate, TUNING_SEED)
    # Seed by seed, so that a run that was cut short has every method; what has one seed alone comes last.
    jobs = [(seed, method) for seed in seeds for method in METHODS if seed in seeds[: method.seeds]]
    for seed, method in sorted(jobs, key=lambda job: job[1].seeds == 1):
        study.run(method, study.rate_of(method), seed)
        if seed == 0 and not smoke:
            draw(panels)


if __name__ == "__main__":
    main()
