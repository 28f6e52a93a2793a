r"""Wasserstein variational inference (Ambrogioni et al. 2018) on MNIST: transport between the joints, beside the VAE.

    python benchmarks/papers/wasserstein_vi.py --data-dir FOLDER     # twenty minutes of one core
    python benchmarks/papers/wasserstein_vi.py --smoke-test          # scikit-learn's digits; writes nothing

z ~ N(0, I_10), x ~ N(sigmoid(g(z)), .2^2), and a normal guide q(z | x) with independent coordinates, whose network reads the
first 50 principal components of x. Program, networks, minibatches and steps are the same for all:

- *VAE*: ``TraceMeanField_ELBO``
- *latents*: ``Trace_Sinkhorn``, likelihood and transport between codes and prior
- *joint, pixels* and *joint, components*: ``Trace_JointSinkhorn``, transport between data(x) q(z|x) and p(z) p(x|z) with the
  cost :math:`\|z-z'\|^2 + w\|x-x'\|^2` in units of prior and data; x is the image, or (``features=``) its components
- *joint, components, autoencoding*: the paper's further costs beside it. Of
  :math:`\|(x-g(z))-(x'-g(z'))\|^2` a plan decides nothing where the program's own pairs leave no residual but noise, and
  likewise of :math:`\|(z-f(x))-(z'-f(x'))\|^2`, f the guide's mean, where the guide is narrow. What remains is added
  as such: :math:`w_a` times :math:`E_q\|x-g(z)\|^2` and :math:`E_p\|z-f(x)\|^2`, over the mean squared distance between two
  data and two latents
- *VAE, then energy score*: the VAE's program as it was fitted, and a guide of the same form trained on its simulations
  (``Trace_EnergyScore(wake=False)``) for as many steps: what this package offers for a posterior

Each method has three candidates of its one weight (the VAE, which has none, of its learning rate), chosen by the Fréchet
distance of generated images to held-out training images, with a seed that is not reported, after ``TUNING_STEPS`` steps.

Measures, on the 10,000 test images unless said otherwise:

- ``mse``: squared error a pixel of the decoded draw of the guide
- ``latent``: energy distance of 2000 draws of the guide, one a test image, to the prior; the floor is that between prior draws
- ``frechet``: of 5000 images g(z), z from the prior, in the features of a small classifier
- calibration under the fitted program: 1000 simulated pairs, 99 draws of the guide for each. ``sbc``: of the ten latents, how
  many fail ``simulation_based_calibration``; ``coverage``: share of truths inside the central 90%, mean over latents;
  ``contraction``: share of the prior's variance that the guide takes away, which is 0 for a guide that ignores its data
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import pyro
import pyro.distributions as dist
import torch
from _mnist import Classifier, Split, classifier, fit_classifier, load
from _resume import Rows
from digits import energy_distance
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_sinkhorn import Trace_EnergyScore, Trace_JointSinkhorn, Trace_Sinkhorn
from pyro_sinkhorn.diagnostics import expected_coverage, posterior_contraction, simulation_based_calibration
from pyro_sinkhorn.diagnostics.simulated_posterior import posterior_of_simulations
from pyro_sinkhorn.models.digits import decoder_network
from pyro_sinkhorn.ot import ConvergenceWarning

DIM, COMPONENTS, HIDDEN = 10, 50, 256
STEPS, TUNING_STEPS, TUNING_SEED, SEEDS, BATCH, RATE = 800, 400, 100, [0, 1, 2], 256, 2e-3
LEVEL, NOISE = 1e-3, 0.2


class Components(nn.Module):
    """Principal components of the training images, in the unit of the first."""

    def __init__(self, x: Tensor, k: int) -> None:
        super().__init__()
        self.mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - self.mean).T @ (x - self.mean) / len(x))
        self.directions = vectors[:, -k:].flip(-1) / values[-1].sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """``(n, pixels)`` to ``(n, k)``."""
        return (x - self.mean) @ self.directions

    def error(self, x: Tensor) -> float:
        """Squared error a pixel of what the components alone say of images."""
        units = self.directions.norm(dim=0)
        again = self.mean + (self(x) / units) @ (self.directions / units).T
        return float((x - again).square().mean())


def make_program(mean_image: Tensor) -> Any:
    """Normal latents, decoded by a perceptron that starts near the mean image.

    What of an image the components do not say stays as it started where components alone are compared.
    """
    decoder = decoder_network(DIM, len(mean_image), HIDDEN)
    with torch.no_grad():
        decoder[-1].bias.copy_(mean_image.clamp(0.01, 0.99).logit())

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z).sigmoid(), NOISE).to_event(1), obs=x)

    return model


class NormalGuide(PyroModule):
    """q(z | x): mean and spread by a perceptron of the components."""

    def __init__(self, components: Components, dim: int) -> None:
        super().__init__()
        self.components = [components]  # in a list: no part of what is trained
        k = components.directions.shape[1]
        self.network = nn.Sequential(
            nn.Linear(k, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 2 * dim)
        )

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation."""
        mean, raw = self.network(self.components[0](x)).chunk(2, -1)
        return mean, softplus(raw) + 1e-4

    def forward(self, x: Tensor) -> None:
        """Sample z."""
        mean, scale = self.read(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, scale).to_event(1))


@dataclass(frozen=True)
class Method:
    """A row: its kind, and the candidates of its one setting."""

    name: str
    kind: str
    candidates: tuple[float, ...]


METHODS = [
    Method("VAE", "elbo", (1e-3, 2e-3, 4e-3)),
    Method("latents", "latents", (10.0, 30.0, 100.0)),
    Method("joint, pixels", "pixels", (1.0, 3.0, 10.0)),
    Method("joint, components", "components", (1.0, 3.0, 10.0)),
    Method("joint, components, autoencoding", "autoencoding", (0.3, 1.0, 3.0)),
]
ENERGY = "VAE, then energy score"
#: A row of the results that is no fit.
FLOOR = "floors"


def look(model: Any, guide: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents of the guide, and what the program decodes them to."""
    drawn = poutine.trace(guide).get_trace(x)
    return drawn.nodes["z"]["value"], decode(model, drawn.nodes["z"]["value"], x)


def decode(model: Any, z: Tensor, like: Tensor) -> Tensor:
    """Means of the images of latents."""
    trace = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(like[:1].expand(len(z), -1))
    return trace.nodes["x"]["fn"].mean


def autoencoding(
    model: Any, guide: NormalGuide, x: Tensor, *, joint: Trace_JointSinkhorn, weight: float, unit: float
) -> Tensor:
    """The joint loss with the paper's autoencoding costs, as far as a plan leaves them open."""
    _, mean = look(model, guide, x)
    simulated = poutine.trace(poutine.uncondition(model)).get_trace(x)
    z, image = (simulated.nodes[name]["value"] for name in ("z", "x"))
    of_data = (x - mean).square().sum(-1).mean() / unit
    of_latents = (z - guide.read(image)[0]).square().sum(-1).mean() / (2 * z.shape[-1])
    return joint.differentiable_loss(model, guide, x) + len(x) * weight * (of_data + of_latents)


def make_loss(method: Method, candidate: float, components: Components, unit: float) -> Any:
    """What SVI minimises."""
    if method.kind == "elbo":
        return TraceMeanField_ELBO()
    if method.kind == "latents":
        return Trace_Sinkhorn(prior_weight=candidate)
    if method.kind == "pixels":
        return Trace_JointSinkhorn(data_weight=candidate)
    if method.kind == "components":
        return Trace_JointSinkhorn(data_weight=candidate, features=components)
    joint = Trace_JointSinkhorn(features=components)
    return partial(autoencoding, joint=joint, weight=candidate, unit=unit)


def train(model: Any, guide: Any, loss: Any, x: Tensor, *, steps: int, rate: float, seed: int) -> float:
    """Minimise; CPU seconds."""
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": rate}, "T_max": steps}
    optim = pyro.optim.CosineAnnealingLR(schedule)
    svi = SVI(model, guide, optim, loss)
    batches = torch.Generator().manual_seed(seed)
    began = time.process_time()
    for _ in range(steps):
        svi.step(x[torch.randint(len(x), (BATCH,), generator=batches)])
        optim.step()
    return time.process_time() - began


@dataclass
class Study:
    """What all fits share."""

    data: Split
    judge: Classifier
    components: Components
    rows: Rows
    steps: int
    tuning_steps: int
    simulations: int

    def run(self, method: Method, candidate: float, seed: int, name: str = "") -> None:
        """Fit and score, unless that is done."""
        steps = self.tuning_steps if seed == TUNING_SEED else self.steps
        name = name or method.name
        self.rows.make(
            lambda: self.row(method, candidate, seed, steps, energy=name == ENERGY),
            method=name, candidate=candidate, seed=seed, steps=steps,
        )  # fmt: skip

    def row(self, method: Method, candidate: float, seed: int, steps: int, energy: bool) -> dict[str, Any]:
        """One fit."""
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        x = self.data.train
        model = make_program(x.mean(0))
        guide = NormalGuide(self.components, DIM)
        unit = 2 * float(x.var(0).sum())
        loss = make_loss(method, candidate, self.components, unit)
        rate = candidate if method.kind == "elbo" else RATE
        seconds = train(model, guide, loss, x, steps=steps, rate=rate, seed=seed)
        if energy:
            pyro.clear_param_store()  # forgets the first guide; what the program learned is in its decoder
            guide = NormalGuide(self.components, DIM)
            loss = Trace_EnergyScore(wake=False)
            seconds += train(model, guide, loss, x, steps=steps, rate=RATE, seed=seed + 1000)
        pyro.set_rng_seed(seed + 1)
        held = self.data.validation if seed == TUNING_SEED else self.data.test
        found = self.scores(model, guide, held)
        if seed != TUNING_SEED:
            found |= calibration(model, guide, x[: self.simulations])
        return found | {"cpu_seconds": seconds, "ms_per_step": 1e3 * seconds / steps}

    @torch.no_grad()
    def scores(self, model: Any, guide: Any, held: Tensor) -> dict[str, float]:
        """How well images are made, made again, and encoded."""
        z, mean = look(model, guide, held)
        images = decode(model, torch.randn(5000, DIM), held)
        return {
            "mse": float((held - mean).square().mean()),
            "latent": energy_distance(z[:2000], torch.randn(2000, DIM)),
            "frechet": self.judge.frechet(images, held[:5000]),
        }

    def chosen(self, method: Method) -> float:
        """The candidate with the nearest images."""
        tried = [row for row in self.rows.rows if row["seed"] == TUNING_SEED and row["method"] == method.name]
        return min(tried, key=lambda row: row["frechet"])["candidate"]


def calibration(model: Any, guide: Any, like: Tensor) -> dict[str, Any]:
    """Whether the guide is the posterior of the fitted program, on data simulated from it."""
    drawn = posterior_of_simulations(model, guide, like, num_simulations=len(like), num_draws=99)
    report = simulation_based_calibration(drawn, LEVEL)
    coverage = expected_coverage(drawn, levels=[0.9], level=LEVEL)
    contraction = posterior_contraction(drawn).quantities
    return {
        "sbc": sum(not check.passed for check in report.quantities),
        "verdicts": sorted({check.verdict for check in report.quantities if not check.passed}),
        "coverage": float(coverage.coverage[:-1].mean()),
        "coverage_joint": float(coverage.coverage[-1].mean()),
        "error_ratio": sum(row.error_ratio for row in contraction) / len(contraction),
        "contraction": sum(row.contraction for row in contraction) / len(contraction),
    }


def floors(study: Study) -> dict[str, Any]:
    """What equal laws get: latent energy distance (95% of the time less) and Fréchet distance of training images."""
    rng = torch.Generator().manual_seed(7)
    equal = [energy_distance(*torch.randn(2, 2000, DIM, generator=rng)) for _ in range(20)]
    return {
        "latent": sorted(equal)[-2],
        "frechet": study.judge.frechet(study.data.train[:5000], study.data.test[:5000]),
        "mean_image_mse": float((study.data.test - study.data.train.mean(0)).square().mean()),
        "components_mse": study.components.error(study.data.test),
    }


def main() -> None:
    """Tune, fit, print, write."""
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
    steps, tuning_steps, simulations = (3, 2, 60) if smoke else (STEPS, TUNING_STEPS, 1000)
    settings = {
        "steps": steps, "tuning_steps": tuning_steps, "batch": BATCH, "rate": RATE, "dim": DIM, "noise": NOISE,
        "components": COMPONENTS, "hidden": HIDDEN, "simulations": simulations, "level": LEVEL,
        "candidates": {method.name: method.candidates for method in METHODS},
    }  # fmt: skip
    torch.set_flush_denormal(True)
    data = load(None if smoke else options.data_dir)
    judge = fit_classifier(data, 1) if smoke else classifier(data)
    rows = Rows("papers_wasserstein_vi", settings, ["method", "candidate", "seed", "steps"], keep=not smoke)
    components = Components(data.train, min(COMPONENTS, data.train.shape[1] // 2))
    study = Study(data, judge, components, rows, steps, tuning_steps, simulations)
    for method in METHODS:
        for candidate in method.candidates[:1] if smoke else method.candidates:
            study.run(method, candidate, TUNING_SEED)
    for seed in options.seeds[:1] if smoke else options.seeds:
        for method in METHODS:
            study.run(method, study.chosen(method), seed)
        study.run(METHODS[0], study.chosen(METHODS[0]), seed, ENERGY)
    rows.make(lambda: floors(study), method=FLOOR, candidate=0.0, seed=0, steps=0)


if __name__ == "__main__":
    main()
