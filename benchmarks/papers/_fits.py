r"""One fit of a method of the autoencoding studies, and what is measured of it.

==============  ========================================================================================================
reconstruction  squared error of an image, summed over its pixels, from one draw of the encoder
latent_mmd      1000 times the unbiased squared MMD between codes of held images and the prior, 3000 draws each; 0 on
                average when the laws agree. The kernel is WAE-MMD's own
frechet         Fréchet distance between generated images (means of the decoder at prior draws) and held images, in
                features of the classifier
spread          mean singular value of the centred codes over that of the prior: below 1, the codes have shrunk
norm            mean length of a code over that of a prior draw
==============  ========================================================================================================
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import _path  # noqa: F401 (the folder above)
import pyro
import torch
from _latent_peers import multiquadric_mmd
from _methods import FIXED, make_program
from _mnist import Classifier, Split, classifier, fit_classifier, load
from scipy.stats import t as student
from torch import Tensor

from pyro_sinkhorn import SinkhornProgram
from pyro_sinkhorn.distributions import HypersphericalUniform
from pyro_sinkhorn.models import gaussian, hypersphere
from pyro_sinkhorn.ot import ConvergenceWarning

BATCH = 128
MATCH_SIZE = BATCH // 2
LEARNING_RATE = 4e-3
MMD_DRAWS = 3000
MEASURES = ("reconstruction", "latent_mmd", "frechet", "spread", "norm")


@dataclass(frozen=True)
class Prior:
    """A prior by its dimension and kind."""

    dim: int
    sphere: bool = False

    @property
    def mean_cost(self) -> float:
        """Mean squared distance of two draws."""
        return 2.0 if self.sphere else 2.0 * self.dim

    @property
    def deviation(self) -> float:
        """Standard deviation of a coordinate: the singular values of many draws, over the root of their number."""
        return math.sqrt(self.mean_cost / 2 / self.dim)

    def draw(self, n: int, seed: int) -> Tensor:
        """``(n, dim)``, from a seed of its own."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return HypersphericalUniform(self.dim).sample((n,)) if self.sphere else torch.randn(n, self.dim)


PRIORS = {"gaussian-10": Prior(10), "sphere-10": Prior(10, sphere=True), "gaussian-64": Prior(64)}


@functools.cache
def data(data_dir: str | None) -> tuple[Split, Classifier]:
    """Images and their judge; in a smoke test a hasty one."""
    split = load(data_dir)
    return split, classifier(split) if data_dir else fit_classifier(split, epochs=2)


def fit(
    prior: str, method: str, weight: float, seed: int, steps: int, split: Split
) -> tuple[SinkhornProgram, float]:
    """A fitted program, and the CPU seconds it took."""
    spec = PRIORS[prior]
    torch.manual_seed(seed)  # initial weights
    model = (hypersphere if spec.sphere else gaussian)(spec.dim, split.train.shape[-1])
    program = make_program(
        method,
        weight,
        model,
        dim=spec.dim,
        sphere=spec.sphere,
        train=split.train,
        match_size=MATCH_SIZE,
    )
    optim = pyro.optim.CosineAnnealingLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": LEARNING_RATE, "fused": True},
            "T_max": steps,
        }
    )
    numbers = [torch.arange(len(split.train))] if method in FIXED else []
    start = time.process_time()
    with warnings.catch_warnings():
        # At the start of a fit the clouds are far apart, and the solver stops early: the same for every method.
        warnings.simplefilter("ignore", ConvergenceWarning)
        program.fit(
            split.train, *numbers, num_steps=steps, batch_size=BATCH, optim=optim, seed=seed, progress=False
        )
    return program, time.process_time() - start


def codes(program: SinkhornProgram, x: Tensor, method: str, seed: int) -> Tensor:
    """One draw of the encoder an image."""
    numbers = [torch.arange(len(x))] if method in FIXED else []
    drawn = program.encode(x, *numbers, seed=seed)["z"]
    return drawn.reshape(len(x), -1)


def measure(
    program: SinkhornProgram, prior: str, method: str, held: Tensor, judge: Classifier
) -> dict[str, float]:
    """All measures of a fitted program on held images."""
    spec, decoder = PRIORS[prior], program.modules["decoder"]
    z = codes(program, held, method, seed=2)
    draws = spec.draw(len(held), seed=3)
    with torch.no_grad():
        reconstruction = float((decoder(z).sigmoid() - held).square().sum(-1).mean())
        generated = decoder(draws).sigmoid()
        mmd = float(multiquadric_mmd(z[:MMD_DRAWS], draws[:MMD_DRAWS], spec.mean_cost))
    singular = torch.linalg.svdvals((z - z.mean(0)).double()) / math.sqrt(len(z) - 1)
    return {
        "reconstruction": reconstruction,
        "latent_mmd": 1000 * mmd,
        "frechet": judge.frechet(generated, held),
        "spread": float(singular.mean()) / spec.deviation,
        "norm": float(z.norm(dim=-1).mean() / draws.norm(dim=-1).mean()),
    }


def run(
    prior: str,
    method: str,
    weight: float,
    seed: int,
    steps: int,
    part: str,
    data_dir: str | None,
    num_train: int | None = None,
) -> dict[str, Any]:
    """Fit once and measure on ``part``, ``"validation"`` or ``"test"``.

    :param num_train: fit to so many training images, the first; by default to all
    """
    split, judge = data(data_dir)
    fitted_to = dataclasses.replace(split, train=split.train[:num_train], y_train=split.y_train[:num_train])
    program, seconds = fit(prior, method, weight, seed, steps, fitted_to)
    held = split.validation if part == "validation" else split.test
    row: dict[str, Any] = measure(program, prior, method, held, judge) | {"fit_cpu_seconds": seconds}
    if part == "test" and seed == 0:
        row["samples"] = packed(program, prior)
    return row


def packed(program: SinkhornProgram, prior: str, n: int = 10) -> str:
    """Images decoded from prior draws, the same for every method: bytes in base 64, for a figure."""
    with torch.no_grad():
        images = program.modules["decoder"](PRIORS[prior].draw(n, seed=4)).sigmoid()
    return base64.b64encode((255 * images).round().byte().numpy().tobytes()).decode()


def show(row: dict[str, Any]) -> None:
    """Print a row, without its images."""
    said = {name: value for name, value in row.items() if name != "samples"}
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in said.items()}, flush=True)


def prepare() -> None:
    """One thread, and no checks of supports at every site: they cost the same for every method."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    pyro.enable_validation(False)


def mmd_floor(prior: str, n: int = MMD_DRAWS, repetitions: int = 10) -> dict[str, float]:
    """``latent_mmd`` between independent prior clouds: what a perfect match measures."""
    spec = PRIORS[prior]
    values = [
        1000 * float(multiquadric_mmd(spec.draw(n, 1000 + i), spec.draw(n, 2000 + i), spec.mean_cost))
        for i in range(repetitions)
    ]
    return {"mean": float(torch.tensor(values).mean()), "sd": float(torch.tensor(values).std())}


def frechet_floor(data_dir: str | None) -> float:
    """Between as many training as test images."""
    split, judge = data(data_dir)
    return judge.frechet(split.train[: len(split.test)], split.test)


def interval(values: Iterable[float]) -> dict[str, float]:
    """Mean and 95% half-width by Student's t."""
    found = torch.tensor(list(values), dtype=torch.float64)
    n = len(found)
    half = float(found.std()) / math.sqrt(n) * student.ppf(0.975, n - 1) if n > 1 else math.nan
    return {"mean": float(found.mean()), "half_width": half}
