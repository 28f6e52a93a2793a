"""Four priors on digit images: Sinkhorn matching beside same-batch debiasing, MMD, the ELBO and a plain autoencoder.

Data: scikit-learn's digits, 1200 to train, 297 to choose weights, 300 to test. Every method has the same networks,
optimiser, steps, data order and number of weights to choose from. The weight is chosen once for each prior and method
on the validation digits with a seed of its own: among those whose validation reconstruction is at most 1.15 times the
autoencoder's, the one whose generated images are nearest (energy distance) to the validation digits; if none is, the
one with the best reconstruction. Then three other seeds are run and tested.

    python benchmarks/digits.py              # about an hour on two cores
    python benchmarks/digits.py --smoke-test
"""

from __future__ import annotations

import argparse
import functools
import math
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pyro
import torch
from _latent_peers import MMDMatch, NormalGuide
from _report import write
from _scale_site import ScaleSite
from pyro.infer import TraceMeanField_ELBO
from scipy.stats import t as student
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from pyro_sinkhorn import AutoImplicit, SinkhornProgram, Trace_Sinkhorn
from pyro_sinkhorn.models import dirichlet_archetypes, gaussian, hypersphere, sphere_and_normal
from pyro_sinkhorn.ot import ConvergenceWarning

PRIORS: dict[str, Callable[..., Any]] = {
    "dirichlet": dirichlet_archetypes,
    "hypersphere": hypersphere,
    "gaussian": gaussian,
    "sphere x normal": sphere_and_normal,
}
#: Equal in number; each range was centred by a first look with the seed of the choice.
WEIGHTS = {
    "sinkhorn": [10.0, 30.0, 100.0, 300.0],
    "self": [10.0, 30.0, 100.0, 300.0],
    "mmd": [30.0, 100.0, 300.0, 1000.0],
    "elbo": [0.1, 0.3, 1.0, 3.0],
    "autoencoder": [0.0],
}
TUNING_SEED = 100
SIGMA = 0.2


class Split:
    """The digits, split once."""

    def __init__(self) -> None:
        digits = load_digits()
        order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
        x = torch.tensor(digits.data / 16, dtype=torch.float32)[order]
        y = torch.tensor(digits.target)[order]
        self.train, self.validation, self.test = x[:1200], x[1200:1497], x[1497:]
        self.y_train, self.y_validation, self.y_test = y[:1200], y[1200:1497], y[1497:]


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased: 2 E|x-y| - E|x-x'| - E|y-y'|."""
    n, m = len(x), len(y)
    within_x, within_y = torch.cdist(x, x).sum() / (n * (n - 1)), torch.cdist(y, y).sum() / (m * (m - 1))
    return float(2 * torch.cdist(x, y).mean() - within_x - within_y)


def flat(draws: dict[str, Tensor]) -> Tensor:
    """All latents side by side, ``(n, columns)``."""
    return torch.cat([v.reshape(-1, v.shape[-1]) for name, v in draws.items() if name != "x"], -1)


def make_program(prior: str, method: str, weight: float) -> SinkhornProgram:
    """A program with the loss of a method."""
    model = PRIORS[prior]()
    if method == "elbo":
        beta = ScaleSite("z", weight)
        return SinkhornProgram(beta(model), beta(NormalGuide(10)), TraceMeanField_ELBO())
    loss = Trace_Sinkhorn(prior_weight=weight, debias="self" if method == "self" else "independent")
    if method == "mmd":
        loss.matcher = MMDMatch(loss.latent_match.options)
    guide = functools.partial(AutoImplicit, noise_dim=0) if method == "autoencoder" else None
    return SinkhornProgram(model, guide, loss)


def run(prior: str, method: str, weight: float, seed: int, steps: int, part: str) -> dict[str, Any]:
    """Fit once and measure on ``part``, ``"validation"`` or ``"test"``."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    split = Split()
    held, labels = (
        (split.validation, split.y_validation) if part == "validation" else (split.test, split.y_test)
    )
    torch.manual_seed(seed)  # initial weights of the decoder
    program = make_program(prior, method, weight)
    optim = pyro.optim.CosineAnnealingLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 2e-3}, "T_max": steps}
    )
    start = time.perf_counter()
    program.fit(split.train, num_steps=steps, batch_size=256, optim=optim, seed=seed, progress=False)
    seconds = time.perf_counter() - start
    decoder = program.modules["decoder"]
    z_train, z_held = flat(program.encode(split.train, seed=1)), flat(program.encode(held, seed=2))
    z_prior = draw_prior(prior, 4000, seed=3)
    with torch.no_grad():
        reconstruction = float((decoder(z_held).sigmoid() - held).square().mean())
        generated = decoder(z_prior[:2000]).sigmoid()
    neighbours = KNeighborsClassifier(5).fit(z_train, split.y_train)
    return {
        "prior": prior,
        "method": method,
        "weight": weight,
        "seed": seed,
        "part": part,
        "reconstruction": reconstruction,
        "latent_energy": energy_distance(z_train, z_prior),
        "generated_energy": energy_distance(generated, held),
        "knn_accuracy": float(neighbours.score(z_held, labels)),
        "fit_seconds": seconds,
    }


def draw_prior(prior: str, n: int, seed: int) -> Tensor:
    """Latents of the prior, ``(n, columns)``."""
    return flat(SinkhornProgram(PRIORS[prior]()).generate(1, torch.zeros(n, 64), seed=seed))


def floors(prior: str) -> dict[str, float]:
    """Energy distance between independent prior clouds of the sizes used: what a perfect match measures."""
    reference = draw_prior(prior, 4000, seed=3)
    values = torch.tensor(
        [energy_distance(draw_prior(prior, 1200, seed=1000 + i), reference) for i in range(20)]
    )
    return {"mean": float(values.mean()), "sd": float(values.std())}


def choose(rows: list[dict[str, Any]], limit: float) -> float:
    """The weight of the nearest generated images among those that reconstruct well enough."""
    good = [row for row in rows if row["reconstruction"] <= limit]
    if good:
        return min(good, key=lambda row: row["generated_energy"])["weight"]
    return min(rows, key=lambda row: row["reconstruction"])["weight"]


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    if options.smoke_test:
        options.steps, options.seeds = 3, [0]
    pairs = [(p, m) for p in PRIORS for m in WEIGHTS if m != "elbo" or p == "gaussian"]
    if options.smoke_test:
        pairs = [
            ("dirichlet", "autoencoder"),
            ("dirichlet", "mmd"),
            ("gaussian", "autoencoder"),
            ("gaussian", "elbo"),
        ]
    with ProcessPoolExecutor(options.workers) as pool:
        jobs = {
            (prior, method, weight): pool.submit(
                run, prior, method, weight, TUNING_SEED, options.steps, "validation"
            )
            for prior, method in pairs
            for weight in (WEIGHTS[method][:1] if options.smoke_test else WEIGHTS[method])
        }
        tuning = {}
        for key, job in jobs.items():
            tuning[key] = job.result()
            print(_line(tuning[key]), flush=True)
        chosen = {}
        for prior, method in pairs:
            limit = 1.15 * tuning[prior, "autoencoder", 0.0]["reconstruction"]
            chosen[prior, method] = choose(
                [row for k, row in tuning.items() if k[:2] == (prior, method)], limit
            )
        finals = [
            pool.submit(run, prior, method, chosen[prior, method], seed, options.steps, "test")
            for prior, method in pairs
            for seed in options.seeds
        ]
        rows = []
        for job in finals:
            rows.append(job.result())
            print(_line(rows[-1]), flush=True)
    split = Split()
    summary = summarise(rows, pairs)
    payload = {
        "settings": {"steps": options.steps, "batch_size": 256, "sigma": SIGMA, "weights": WEIGHTS},
        "chosen_weights": {f"{p} / {m}": w for (p, m), w in chosen.items()},
        "latent_floor": {prior: floors(prior) for prior in {p for p, _ in pairs}},
        "train_to_test_energy": energy_distance(split.train, split.test),
        "summary": summary,
        "runs": rows,
        "tuning": list(tuning.values()),
    }
    if not options.smoke_test:
        write("digits", payload, seeds=[TUNING_SEED, *options.seeds], packages=["scikit-learn"])
    print_summary(payload)


def summarise(rows: list[dict[str, Any]], pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Mean and 95% half-width (Student, over seeds) of every measure."""
    out = []
    for prior, method in pairs:
        mine = [row for row in rows if (row["prior"], row["method"]) == (prior, method)]
        base = [row for row in rows if (row["prior"], row["method"]) == (prior, "autoencoder")]
        entry: dict[str, Any] = {"prior": prior, "method": method, "weight": mine[0]["weight"]}
        for name in ("reconstruction", "latent_energy", "generated_energy", "knn_accuracy"):
            values = torch.tensor([row[name] for row in mine], dtype=torch.float64)
            n = len(values)
            half = float(values.std()) / math.sqrt(n) * student.ppf(0.975, n - 1) if n > 1 else math.nan
            entry[name] = {"mean": float(values.mean()), "half_width": half}
        baseline = sum(row["reconstruction"] for row in base) / len(base)
        entry["reconstruction_ratio"] = entry["reconstruction"]["mean"] / baseline
        out.append(entry)
    return out


def print_summary(payload: dict[str, Any]) -> None:
    """A table a person can read."""
    print(f"train-to-test energy distance {payload['train_to_test_energy']:.4f}")
    for prior, floor in payload["latent_floor"].items():
        print(f"latent floor of {prior}: {floor['mean']:.4f} +- {floor['sd']:.4f}")
    print(
        f"{'prior':<16}{'method':<12}{'weight':>7} {'rec/AE':>7} {'latent energy':>18} {'generated':>18} {'k-NN':>7}"
    )
    for row in payload["summary"]:
        latent, generated = row["latent_energy"], row["generated_energy"]
        print(
            f"{row['prior']:<16}{row['method']:<12}{row['weight']:>7g} {row['reconstruction_ratio']:>7.3f} "
            f"{latent['mean']:>9.4f} +-{latent['half_width']:>6.4f} "
            f"{generated['mean']:>9.4f} +-{generated['half_width']:>6.4f} {row['knn_accuracy']['mean']:>7.3f}"
        )


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['prior']:<16}{row['method']:<12}{row['weight']:>7g} seed {row['seed']:<4} rec {row['reconstruction']:.4f} "
        f"latent {row['latent_energy']:.4f} generated {row['generated_energy']:.4f} knn {row['knn_accuracy']:.3f} "
        f"{row['fit_seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
