r"""A ground cost that learns, against a fixed one and against MMD: a generator of MNIST digits.

One program (normal noise of 16 dimensions, a small perceptron, 14×14 pixels in [0, 1], averages of 2×2, ``Implicit``, no
likelihood) is fitted by ``Trace_DataSinkhorn`` with the cost :math:`\|x-y\|` between pixels, with a learned
:math:`\|f(x)-f(y)\|`, each at four values of the relative epsilon, and by the unbiased MMD with a mixture of Gaussian
kernels between pixels. All have the same initial generator, minibatches and number of its steps; a learned cost makes
``num_steps`` steps of its own before each of them, so that wall-clock and CPU time of a fit are reported beside its
scores. Further rows: a learned cost with ``debias="self"``, as in the paper; the fixed cost with as many steps as fill
the time of a learned one; learned features beside the pixels instead of in their place. Fixed is the euclidean cost
and not its square, because the limit of large epsilon of the square compares means alone.

Scores need a notion of digit: a small convolutional classifier, trained here on the training images.

- ``score``: :math:`\exp E\,\mathrm{KL}(p(y|x)\,\|\,p(y))`, the inception score with this classifier; 10 at most
- ``frechet``: Fréchet distance of generated to test images between normals fitted to the classifier's 64 features; the
  floor is that of as many training images
- ``entropy``: of the mean of p(y|x), in nats; log 10 = 2.303 if all classes are equally frequent

They are comparable within this file and with nothing else. ``--tune`` runs the grid of settings of each kind with a seed
and with test images that the study itself does not use, for 1500 steps where the study has 1000; what it chose is
written in ``CHOSEN`` below by hand, by the smallest Fréchet distance unless a comment says otherwise. Both keep every
finished fit in the file given as ``--resume`` and skip what is there.

    python benchmarks/learned_cost.py --data-dir ../shared/data     # about 20 minutes of one core
    python benchmarks/learned_cost.py --tune --resume FILE
    python benchmarks/learned_cost.py --smoke-test
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _report import RESULTS, write
from pyro.infer import SVI
from torch import Tensor, nn

from pyro_sinkhorn import Implicit, Trace_DataSinkhorn
from pyro_sinkhorn.losses.data_match import DataMatch
from pyro_sinkhorn.losses.latent_match import GroupMatch
from pyro_sinkhorn.losses.learned_cost import LearnedCost
from pyro_sinkhorn.losses.simulation import Simulation
from pyro_sinkhorn.ot import ConvergenceWarning
from pyro_sinkhorn.ot.cost import sqeuclidean

FIGURE = RESULTS.parents[1] / "docs" / "figures" / "learned_cost.png"
STEPS, TUNING_STEPS, BATCH, MATCH_SIZE, NOISE = 1000, 1500, 200, 100, 16
SIDE = 14  # of the images, in pixels
#: Of the solver. At the smallest epsilon it would else run to its default of 500 while the clouds are far apart.
MAX_ITERS = 50
SEEDS, TUNING_SEED = [0, 1, 2], 100
EPSILONS = [0.05, 1.0, 10.0, 100.0]
SCORED = 5000
IMAGES = 16  # kept for the figure

#: Settings of each kind, found by --tune. The nearest learned cost was the one beside the pixels, which is mostly the fixed
#: one: "learned" is the nearest without pixels.
CHOSEN: dict[str, dict[str, Any]] = {
    "fixed": {"lr": 2e-2},
    "learned": {
        "lr": 6e-3,
        "critic": "cnn",
        "n_c": 1,
        "constraint": "spectral",
        "critic_lr": 5e-4,
        "critic_betas": [0.5, 0.9],
    },
    "beside": {"lr": 2e-2, "critic": "beside", "n_c": 1, "constraint": "spectral", "critic_lr": 5e-4},
    "mmd": {"lr": 2e-2, "bandwidth": 0.5},
}


@dataclass(frozen=True)
class Method:
    """What one row of the table is.

    kind:     "fixed", "learned", "beside" (learned features beside the pixels) or "mmd"
    epsilon:  relative; not for MMD
    debias:   of the divergence
    longer:   factor on the number of steps
    """

    kind: str
    epsilon: float | None = None
    debias: str = "independent"
    longer: float = 1.0

    @property
    def name(self) -> str:
        """As in the table."""
        if self.kind == "mmd":
            return "MMD"
        extra = "" if self.debias == "independent" else ", debias='self'"
        extra += "" if self.longer == 1 else f", {self.longer:g}x the steps"
        kind = "learned beside pixels" if self.kind == "beside" else self.kind
        return f"{kind}, eps {self.epsilon:g}{extra}"


METHODS = [
    Method("mmd"),
    *(Method("fixed", epsilon) for epsilon in EPSILONS),
    *(Method("learned", epsilon) for epsilon in EPSILONS),
    Method("learned", 1.0, debias="self"),
    Method("fixed", 1.0, longer=2.5),  # about the CPU time of a learned cost
]
#: Run after the others: the best learned cost of the tuning, which has the fixed one inside.
EXTRAS = [Method("beside", 0.05)]


@dataclass(frozen=True)
class Data:
    """MNIST as rows in [0, 1]."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load(folder: Path) -> Data:
    """Read mnist.npz, or say that it is absent and stop."""
    path = folder / "mnist.npz"
    if not path.exists():
        print(
            f"skipped: no {path}. This study needs MNIST as the file mnist.npz with x_train, y_train, x_test and "
            "y_test, which is not part of the repository; say where it is with --data-dir"
        )
        sys.exit(0)
    with np.load(path) as file:
        images = {key: torch.tensor(file[key]) for key in ("x_train", "y_train", "x_test", "y_test")}

    def rows(x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x.unsqueeze(1).float() / 255, 28 // SIDE).flatten(1)

    return Data(
        rows(images["x_train"]), images["y_train"].long(), rows(images["x_test"]), images["y_test"].long()
    )


# The judge.


class Judge(nn.Module):
    """A small convolutional classifier; ``features`` is its penultimate layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Unflatten(1, (1, SIDE, SIDE)),
            nn.Conv2d(1, 16, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * SIDE**2, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes."""
        return self.head(self.body(x))

    @torch.no_grad()
    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and log probabilities, in double precision."""
        features = torch.cat([self.body(rows) for rows in x.split(1000)])
        return features.double(), self.head(features).double().log_softmax(-1)


def train_judge(data: Data, epochs: int) -> Judge:
    """Train on all training images."""
    torch.manual_seed(7)
    judge = Judge()
    batch = 128
    steps = max(int(epochs * len(data.x_train) / batch), 1)
    optim = torch.optim.Adam(judge.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
    for _ in range(steps):
        rows = torch.randint(len(data.x_train), (batch,))
        loss = nn.functional.cross_entropy(judge(data.x_train[rows]), data.y_train[rows])
        optim.zero_grad()
        loss.backward()
        optim.step()
        schedule.step()
    return judge


def frechet(x: Tensor, y: Tensor) -> float:
    """Fréchet distance between the normals fitted to two clouds of features."""
    cov_x, cov_y = x.mT.cov(), y.mT.cov()
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross)


def scores(judge: Judge, x: Tensor, reference: Tensor) -> dict[str, float]:
    """Scores of images against the reference images."""
    features, log_p = judge.read(x)
    p = log_p.exp()
    log_mean = p.mean(0).clamp_min(1e-300).log()
    return {
        "score": float((p * (log_p - log_mean)).sum(-1).mean().exp()),
        "frechet": frechet(features, judge.read(reference)[0]),
        "entropy": float(-(p.mean(0) * log_mean).sum()),
    }


# The program and what it is compared by.


def make_decoder() -> nn.Module:
    """Noise to pixels."""
    return nn.Sequential(
        nn.Linear(NOISE, 128),
        nn.ReLU(),
        nn.Linear(128, 256),
        nn.ReLU(),
        nn.Linear(256, SIDE**2),
        nn.Sigmoid(),
    )


class Beside(nn.Module):
    """The pixels themselves, and learned features beside them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Both, side by side: squared distances add up."""
        return torch.cat([x, self.network(x)], -1)


def make_critic(kind: str, width: int = 256, features: int = 32) -> nn.Module:
    """Features of the learned cost."""
    if kind == "beside":
        return Beside(make_critic("cnn", width, features))
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(SIDE**2, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, features),
        )
    channels = width // 16
    return nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
        nn.Conv2d(1, channels, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(channels, 2 * channels, 3, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(2 * channels * 16, features),
    )


def pixel_distance(x: Tensor, y: Tensor) -> Tensor:
    """``cost="euclidean"`` by matrix products: several times faster in hundreds of dimensions.

    Different images are far apart, so that nothing is lost near zero.
    """
    return (sqeuclidean(x, y) + 1e-6).sqrt()


class GaussianMMD(DataMatch):
    """Unbiased MMD between the pixels, Gaussian kernels at five multiples of ``bandwidth`` times the median distance."""

    def __init__(self, loss: Trace_DataSinkhorn, bandwidth: float, data: Tensor) -> None:
        super().__init__(loss.data_match.options, loss.data_match.scale, None)
        self.unit = bandwidth**2 * float(sqeuclidean(data, data).median())

    def __call__(self, call: Simulation) -> list[GroupMatch]:
        """One group, the images."""
        x, y = (trace.nodes["x"]["value"] for trace in (call.simulated, call.observed))
        n = len(x)
        squares = sqeuclidean(*[torch.cat([x, y])] * 2) / self.unit
        kernel = sum((-squares / (2 * s**2)).exp() for s in (0.25, 0.5, 1.0, 2.0, 4.0))
        kernel = kernel - kernel.diagonal().diag_embed()
        within = (kernel[:n, :n].sum() + kernel[n:, n:].sum()) / (n * (n - 1))
        return [GroupMatch("data", within - 2 * kernel[:n, n:].mean(), n)]


def make_loss(method: Method, settings: dict[str, Any], data: Data) -> Trace_DataSinkhorn:
    """The loss of a method."""
    cost: Any = pixel_distance
    if method.kind in ("learned", "beside"):
        betas = settings.get("critic_betas")
        rate = settings["critic_lr"]

        def optim(parameters: Any) -> torch.optim.Optimizer:
            if betas is None:
                return torch.optim.RMSprop(parameters, rate)
            return torch.optim.Adam(parameters, rate, betas=betas)

        shape = {key: settings[key] for key in ("width", "features") if key in settings}
        cost = LearnedCost(
            make_critic(settings["critic"], **shape),
            settings["n_c"],
            settings["constraint"],
            settings.get("bound"),
            optim=optim,
        )
    loss = Trace_DataSinkhorn(
        relative_epsilon=method.epsilon or 1.0,
        match_size=MATCH_SIZE,
        cost=cost,
        scale=None,
        debias=method.debias,
        max_iters=MAX_ITERS,
    )
    if method.kind == "mmd":
        loss.matcher = GaussianMMD(loss, settings["bandwidth"], data.x_train[:1000])
    return loss


def no_guide(x: Tensor) -> None:
    """All latents are inside the plate."""


def fit(
    method: Method, settings: dict[str, Any], seed: int, steps: int, data: Data
) -> tuple[nn.Module, dict[str, float]]:
    """Fit the generator; also seconds, and the match at the end."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    decoder = make_decoder()  # before anything that differs between methods

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([NOISE]).to_event(1))
            pyro.sample("x", Implicit(decoder(z), event_dim=1), obs=x)

    loss = make_loss(method, settings, data)
    optim = pyro.optim.CosineAnnealingLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": settings["lr"], "betas": (0.5, 0.999)},
            "T_max": steps,
        }
    )
    svi = SVI(model, no_guide, optim, loss=loss)
    # The generator's minibatches are the same for all methods; those of a learned cost come from a stream of their own.
    own, critics = (torch.Generator().manual_seed(1000 * seed + i) for i in (1, 2))

    def batch(generator: torch.Generator) -> Tensor:
        return data.x_train[torch.randint(len(data.x_train), (BATCH,), generator=generator)]

    wall, cpu = time.perf_counter(), time.process_time()
    last = []
    for _ in range(steps):
        if loss.learned_cost is not None:
            for _ in range(loss.learned_cost.num_steps):
                loss.cost_step(model, no_guide, batch(critics))
        svi.step(batch(own))
        optim.step()  # the schedule
        last = [*last[-49:], *loss.terms.match.values()]
    return decoder, {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "final_match": sum(last) / len(last),
    }


@torch.no_grad()
def generate(decoder: nn.Module, n: int) -> Tensor:
    """Images, from the same noise for all."""
    return decoder(torch.randn(n, NOISE, generator=torch.Generator().manual_seed(5)))


# The study.


class Kept:
    """Finished fits by name, in a file if one is given."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self.rows = json.loads(path.read_text(encoding="utf-8"))

    def put(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row, whole or not at all."""
        self.rows[key] = row
        if self.path is not None:
            temporary = self.path.with_suffix(".part")
            temporary.write_text(json.dumps(self.rows), encoding="utf-8")
            temporary.replace(self.path)


@dataclass
class Study:
    """What all fits share."""

    data: Data
    judge: Judge
    kept: Kept
    steps: int
    scored: int

    def run(self, method: Method, settings: dict[str, Any], seed: int) -> dict[str, Any]:
        """Fit and score, unless that is kept already."""
        steps = round(self.steps * method.longer)
        key = json.dumps([method.name, settings, seed, steps], sort_keys=True)
        if key not in self.kept.rows:
            # The tuning looks at the second half of the test images, the study at the first.
            half = len(self.data.x_test) // 2
            held = self.data.x_test[half:] if seed == TUNING_SEED else self.data.x_test[:half]
            row: dict[str, Any] = {"method": method.name, "settings": settings, "seed": seed, "steps": steps}
            try:
                decoder, facts = fit(method, settings, seed, steps, self.data)
            except Exception as error:
                if seed != TUNING_SEED:
                    raise
                # A setting that breaks a fit is a result of the tuning.
                row["failed"] = f"{type(error).__name__}: {error}"
            else:
                row |= scores(self.judge, generate(decoder, self.scored), held[: self.scored]) | facts
                pixels = (generate(decoder, IMAGES) * 255).round().int()
                row["images"] = pixels.tolist()
            self.kept.put(key, row)
        row = self.kept.rows[key]
        print(line(row), flush=True)
        return row


def line(row: dict[str, Any]) -> str:
    """One fit, for a person who waits."""
    start = f"{row['method']:<28} seed {row['seed']:<3} {json.dumps(row['settings'])}"
    if "failed" in row:
        return f"{start} failed: {row['failed']}"
    return (
        f"{start}: score {row['score']:.2f} frechet {row['frechet']:.1f} entropy {row['entropy']:.3f} "
        f"match {row['final_match']:.4f} {row['cpu_seconds']:.0f} s"
    )


def grid() -> list[tuple[Method, dict[str, Any]]]:
    """What was tried; more for the learned cost, which has more to set and did worse."""
    base = {"critic": "cnn", "n_c": 1, "constraint": "spectral", "critic_lr": 5e-4}
    adam = {"critic_betas": [0.5, 0.9]}
    learned = [
        {"lr": 3e-3},
        {"lr": 3e-3, "constraint": None, "critic_lr": 2e-4, **adam},
        {"lr": 3e-3, "critic": "mlp", "constraint": "clip", "bound": 0.05},
        {"lr": 3e-3, "critic_lr": 1e-4},
        {"lr": 2e-3, "critic_lr": 2e-4, "features": 128, "n_c": 2},
        {"lr": 1e-2, "constraint": None, "critic_lr": 2e-4, **adam},
        {"lr": 1e-2, "critic_lr": 1e-4},
        {"lr": 1e-2, "critic": "beside"},
        {"lr": 1e-2, "critic": "beside", "constraint": "clip", "bound": 0.05},
        {"lr": 1e-2, "n_c": 0},
        {"lr": 6e-3, **adam},
    ]
    return [
        *((Method("fixed", 1.0), {"lr": rate}) for rate in (3e-3, 6e-3, 1e-2, 2e-2, 4e-2)),
        *((Method("mmd"), {"lr": rate, "bandwidth": 1.0}) for rate in (3e-3, 6e-3, 1e-2)),
        *((Method("mmd"), {"lr": rate, "bandwidth": 0.5}) for rate in (1e-2, 2e-2)),
        *((Method("learned", 1.0), base | change) for change in learned),
        # A second look, after the study had shown the smallest epsilon to be the best for both costs.
        (Method("fixed", 0.05), {"lr": 2e-2}),
        (Method("learned", 0.05), base | {"lr": 2e-2, "critic": "beside"}),
        (Method("learned", 0.05), base | {"lr": 6e-3, "critic_lr": 2e-4, "features": 128, **adam}),
    ]


def summarise(rows: list[dict[str, Any]], methods: list[Method]) -> list[dict[str, Any]]:
    """Mean and values of every measure."""
    out = []
    for method in methods:
        mine = [row for row in rows if row["method"] == method.name]
        entry: dict[str, Any] = {"method": method.name, "steps": mine[0]["steps"]}
        for name in ("score", "frechet", "entropy", "wall_seconds", "cpu_seconds"):
            values = [row[name] for row in mine]
            entry[name] = {"mean": sum(values) / len(values), "values": values}
        entry["cpu_ms_per_step"] = 1e3 * entry["cpu_seconds"]["mean"] / mine[0]["steps"]
        out.append(entry)
    return out


def print_summary(payload: dict[str, Any]) -> None:
    """A table a person can read."""
    judge = payload["classifier"]
    print(f"classifier: test accuracy {judge['test_accuracy']:.4f}")
    for name, row in payload["reference"].items():
        print(f"{name}: score {row['score']:.2f} frechet {row['frechet']:.2f} entropy {row['entropy']:.3f}")
    print(
        f"{'method':<30}{'score':>6} {'(seeds)':<19}{'frechet':>8} {'(seeds)':<22}{'entropy':>8}{'wall s':>8}{'CPU s':>7}"
        f"{'ms/step':>9}"
    )
    for row in payload["summary"]:
        score, distance = row["score"], row["frechet"]
        print(
            f"{row['method']:<30}{score['mean']:>6.2f} {' '.join(f'{v:.2f}' for v in score['values']):<19}"
            f"{distance['mean']:>8.1f} {' '.join(f'{v:.1f}' for v in distance['values']):<22}"
            f"{row['entropy']['mean']:>8.3f}{row['wall_seconds']['mean']:>8.0f}{row['cpu_seconds']['mean']:>7.0f}"
            f"{row['cpu_ms_per_step']:>9.0f}"
        )


def draw(rows: list[dict[str, Any]], methods: list[Method], real: Tensor, reference: dict[str, Any]) -> None:
    """A row of samples for every method, first seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = min(row["seed"] for row in rows)
    strips = [("test images", reference["test images"], real[:IMAGES])]
    for method in methods:
        row = next(row for row in rows if row["method"] == method.name and row["seed"] == first)
        strips.append((method.name, row, torch.tensor(row["images"]) / 255))
    figure, axes = plt.subplots(len(strips), 1, figsize=(8.4, 0.46 * len(strips)), layout="constrained")
    for axis, (name, row, images) in zip(axes, strips, strict=True):
        strip = images.reshape(-1, SIDE, SIDE).permute(1, 0, 2).reshape(SIDE, -1)
        axis.imshow(strip, cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        text = f"{name}\nscore {row['score']:.2f}, Fréchet {row['frechet']:.1f}"
        axis.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=7)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=130)
    plt.close(figure)
    print("wrote", FIGURE)


def main() -> None:
    """Run the study, or its tuning."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    parser.add_argument("--data-dir", type=Path, default=default, help="folder of mnist.npz")
    parser.add_argument("--resume", type=Path, help="file that keeps finished fits, and is read first")
    parser.add_argument("--tune", action="store_true", help="run the grid of settings; writes no result")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--smoke-test", action="store_true", help="a few steps of each; writes nothing")
    args = parser.parse_args()
    if args.smoke_test:
        args.steps, args.seeds = 2, [0]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    data = load(args.data_dir)
    start = time.perf_counter()
    judge = train_judge(data, epochs=0.1 if args.smoke_test else 4)
    with torch.no_grad():
        accuracy = float((judge(data.x_test).argmax(-1) == data.y_test).double().mean())
    print(f"classifier: test accuracy {accuracy:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    scored = 200 if args.smoke_test else SCORED
    study = Study(data, judge, Kept(args.resume), args.steps, scored)
    if args.tune:
        study.steps = TUNING_STEPS
        for method, settings in grid():
            study.run(method, settings, TUNING_SEED)
        return
    first_half = data.x_test[:scored]
    reference = {
        "test images": scores(judge, data.x_test[-scored:], first_half),
        "training images": scores(judge, data.x_train[:scored], first_half),
    }
    methods = METHODS + EXTRAS
    rows = [
        study.run(method, CHOSEN[method.kind], seed)
        for part in (METHODS, EXTRAS)
        for seed in args.seeds
        for method in part
    ]
    if args.smoke_test:
        print_summary(
            {
                "classifier": {"test_accuracy": accuracy},
                "reference": reference,
                "summary": summarise(rows, methods),
            }
        )
        return
    tuning = [row for row in study.kept.rows.values() if row["seed"] == TUNING_SEED]
    payload = {
        "settings": {
            "steps": args.steps,
            "batch": BATCH,
            "match_size": MATCH_SIZE,
            "max_iters": MAX_ITERS,
            "side": SIDE,
            "noise": f"normal, {NOISE} dimensions",
            "decoder": "perceptron 16-128-256-196",
            "optimiser": "Adam, betas (.5, .999), cosine schedule to 0",
            "images_scored": scored,
            "chosen": CHOSEN,
        },
        "classifier": {"test_accuracy": accuracy},
        "reference": reference,
        "summary": summarise(rows, methods),
        "runs": [without_images(row) for row in rows],
        "tuning": [without_images(row) for row in tuning],
    }
    print_summary(payload)
    draw(rows, methods, data.x_test, reference)
    print("wrote", write("learned_cost", payload, seeds=[TUNING_SEED, *args.seeds]))


def without_images(row: dict[str, Any]) -> dict[str, Any]:
    """What the result file keeps of a fit."""
    return {key: value for key, value in row.items() if key != "images"}


if __name__ == "__main__":
    main()
