"""The probabilistic program of Sinkhorn AutoEncoders: what a digit is and where it is on a canvas, with noise nobody modelled.

Three ways to fit one program with one set of networks: Trace_Sinkhorn matching ``z_what`` and ``z_where`` jointly; the same
with the paper's sum of two Sinkhorn costs (``groups="marginal"``); a simplified AIR (one object, Trace_ELBO). MNIST digits on
64 by 64 canvases, 3% salt noise: 20,000 to train, 2000 to choose weights, 2000 to test. The weight (of the match; of AIR's KL
term) is chosen for each method among four, on the validation canvases with a seed of its own: among those whose error against
the clean canvas is at most 1.15 times the method's smallest, the one whose generated canvases are nearest to clean ones.
Then three other seeds are tested; of AIR also its ELBO as it is, weight 1.

    python benchmarks/papers/canvas.py --data-dir FOLDER   # with mnist.npz; about twenty minutes of one core
    python benchmarks/papers/canvas.py --smoke-test        # scikit-learn's digits, a few seconds
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import _path
import pyro
import torch
from _canvas_data import GLYPH, Canvases, canvases_of, cut, place
from _canvas_figure import Shown, draw
from _canvas_measures import dependence, energy_distance, localisation, standard
from _canvas_program import AIR, DIM, Deterministic, Encoder, Program, inferred
from _mnist import Classifier, classifier, fit_classifier, load
from _resume import Rows
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.nn.functional import normalize

from pyro_sinkhorn import SinkhornProgram, Trace_Sinkhorn
from pyro_sinkhorn.ot import ConvergenceWarning

WEIGHTS = {
    "joint": [100.0, 300.0, 1000.0, 3000.0],
    "marginal": [100.0, 300.0, 1000.0, 3000.0],
    "AIR": [0.01, 0.1, 1.0, 10.0],
}
TUNING_SEED = 100
BATCH = 128


def make_program(method: str, weight: float) -> SinkhornProgram:
    """The program with the guide and the loss of a method."""
    if method == "AIR":
        return SinkhornProgram(Program(weight), AIR(weight), Trace_ELBO())
    return SinkhornProgram(Program(), Deterministic(), Trace_Sinkhorn(weight, groups=method))


class Study:
    """Data, judge and settings, and what is done with them.

    :param fits: folder of fitted programs, which are read back from there instead of being fitted anew
    """

    def __init__(self, data: dict[str, Canvases], judge: Classifier, steps: int, fits: Path | None) -> None:
        self.data, self.judge, self.steps, self.fits = data, judge, steps, fits

    def fitted(self, method: str, weight: float, seed: int) -> tuple[SinkhornProgram, float]:
        """A fitted program, and the seconds of processor time that it took."""
        torch.manual_seed(seed)  # initial weights
        program = make_program(method, weight)
        path = None if self.fits is None else self.fits / f"{method}_{weight:g}_{seed}_{self.steps}.pt"
        if path is not None and path.exists():
            program = SinkhornProgram.load(path, program.model, program.guide, program.loss)
            return program, float(path.with_suffix(".seconds").read_text(encoding="utf-8"))
        optim = pyro.optim.CosineAnnealingLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 2e-3}, "T_max": self.steps}
        )
        start = time.process_time()
        program.fit(
            self.data["train"].noisy,
            num_steps=self.steps,
            batch_size=BATCH,
            optim=optim,
            seed=seed,
            progress=False,
        )
        seconds = time.process_time() - start
        if path is not None:
            program.save(path)
            path.with_suffix(".seconds").write_text(str(seconds), encoding="utf-8")
        return program, seconds

    def row(self, method: str, weight: float, seed: int, part: str) -> dict[str, Any]:
        """Fit once and measure on ``part``, ``"validation"`` or ``"test"``."""
        program, seconds = self.fitted(method, weight, seed)
        canvases = self.data[part]
        with torch.no_grad():
            where, patches = explain(program, canvases.noisy)
            drawn_where, drawn = generate(program, len(canvases), seed=3)
        # The aggregated posterior is the law of draws, which AIR's differ from the centres of.
        codes = program.encode(canvases.noisy[:1000], seed=4)
        generated = place(drawn, drawn_where)
        return (
            localisation(where, place(patches, where), canvases)
            | {"generated_energy": energy_distance(generated, canvases.clean)}
            | dependence(codes["z_what"][0], codes["z_where"][0], num_permutations=499)
            | judged(self.judge, patches, drawn, canvases.label)
            | {"cpu_seconds": seconds}
        )

    def shown(self, method: str, weight: float, seed: int, n: int = 6) -> Shown:
        """The first test canvases as this program sees them, and samples of it."""
        program, _ = self.fitted(method, weight, seed)
        test = self.data["test"]
        with torch.no_grad():
            where, patches = explain(program, test.noisy[:n])
            drawn_where, drawn = generate(program, 2 * n, seed=3)
        return Shown(
            method, test.noisy[:n], test.where[:n], where, place(patches, where), place(drawn, drawn_where)
        )


def networks(program: SinkhornProgram) -> Program:
    """The program's own copy of the generative networks."""
    (found,) = [module for module in program.modules.values() if isinstance(module, Program)]
    return found


def explain(program: SinkhornProgram, x: Tensor) -> tuple[Tensor, Tensor]:
    """Places and painted patches that the guide infers."""
    where, what = inferred(program.guide, x)
    return where, networks(program).paint(what)


def generate(program: SinkhornProgram, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Places and painted patches of the prior."""
    generator = torch.Generator().manual_seed(seed)
    where = torch.randn(n, 3, generator=generator)
    what = normalize(torch.randn(n, DIM, generator=generator), dim=-1)
    return where, networks(program).paint(what)


def judged(judge: Classifier, patches: Tensor, drawn: Tensor, label: Tensor) -> dict[str, float]:
    """What a classifier of MNIST says of reconstructed digits, whose label is known, and of drawn ones."""
    seen, free = (judge.verdicts(standard(images, judge.side).flatten(1)) for images in (patches, drawn))
    classes = free.argmax(-1).bincount(minlength=10) / len(free)
    return {
        "accuracy": float((seen.argmax(-1) == label).float().mean()),
        "confidence": float(free.amax(-1).mean()),
        "class_entropy": float(torch.special.entr(classes).sum()),
    }


def of_data(study: Study) -> dict[str, float]:
    """What there is to compare with: the noise, an empty canvas, equal laws, real digits, boxes of an untrained encoder."""
    test, other = study.data["test"], study.data["validation"]
    torch.manual_seed(TUNING_SEED)
    with torch.no_grad():
        start = localisation(Encoder().where(test.noisy)[0], test.clean, test)
    real = cut(test.clean, test.where, GLYPH)
    return {
        "noisy_error": float((test.noisy - test.clean).square().mean()),
        "black_error": float(test.clean.square().mean()),
        "generated_energy": energy_distance(other.clean, test.clean),
        "untrained_centre": start["centre"],
        "untrained_iou": start["iou"],
    } | judged(study.judge, real, real, test.label)


def choose(rows: list[dict[str, Any]]) -> float:
    """The weight of the nearest samples among those whose error is close to the smallest."""
    limit = 1.15 * min(row["clean_error"] for row in rows)
    return min((row for row in rows if row["clean_error"] <= limit), key=lambda row: row["generated_energy"])[
        "weight"
    ]


def main() -> None:
    """Choose weights, test, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="folder of mnist.npz")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fits", type=Path, help="folder that keeps fitted programs, to measure them again")
    parser.add_argument("--method", action="append", choices=WEIGHTS, help="only these, without the figure")
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    if options.smoke_test:
        options.steps, options.seeds, options.data_dir = 3, [0], None
    elif options.data_dir is None:
        parser.error("give the folder of mnist.npz as --data-dir")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    warnings.simplefilter("ignore", ConvergenceWarning)
    if options.fits is not None:
        options.fits.mkdir(parents=True, exist_ok=True)
    split = load(options.data_dir)
    num_train, num_held = (256, 128) if options.smoke_test else (20_000, 2000)
    judge = fit_classifier(split, 1) if options.smoke_test else classifier(split)
    study = Study(canvases_of(split, num_train, num_held), judge, options.steps, options.fits)
    settings = {
        "steps": options.steps,
        "batch_size": BATCH,
        "num_train": num_train,
        "num_held": num_held,
        "weights": WEIGHTS,
        "of_data": of_data(study),
    }
    keys = ("method", "weight", "seed", "part")
    rows = Rows("papers_canvas", settings, keys, not options.smoke_test, ["scikit-learn"])
    chosen = {}
    for method in options.method or WEIGHTS:
        for weight in WEIGHTS[method][: 1 if options.smoke_test else None]:
            key = {"method": method, "weight": weight, "seed": TUNING_SEED, "part": "validation"}
            rows.make(lambda key=key: study.row(**key), **key)
        tried = [row for row in rows.rows if row["method"] == method and row["part"] == "validation"]
        chosen[method] = choose(tried)
    for seed in options.seeds:
        for method, weight in dict.fromkeys([*chosen.items(), *[("AIR", 1.0)] * ("AIR" in chosen)]):
            key = {"method": method, "weight": weight, "seed": seed, "part": "test"}
            rows.make(lambda key=key: study.row(**key), **key)
    if options.smoke_test or (
        options.fits is not None and not options.method
    ):  # else it would take further fits
        path = Path("canvas.png") if options.smoke_test else _path.FIGURES / "canvas.png"
        draw([study.shown(method, weight, options.seeds[0]) for method, weight in chosen.items()], path)


if __name__ == "__main__":
    main()
