"""Topics of 20 Newsgroups: a true Dirichlet prior under Trace_Sinkhorn beside ProdLDA's stand-in under an ELBO.

    python benchmarks/newsgroups.py --data-dir DIR               # DIR has newsgroups20.npz; goes on where it was interrupted
    python benchmarks/newsgroups.py --data-dir DIR --fresh       # forgets what an interrupted run left
    python benchmarks/newsgroups.py --data-dir DIR --smoke-test

Both sides share decoder, encoder, optimiser, learning rate, batches and number of steps; what differs is the prior and how it
is enforced. Both have a grid of six: concentration of the prior by weight of the term that holds on to it. (A Dirichlet and
``prior_weight``; the normal of Pyro's tutorial or a Laplace approximation to a Dirichlet, and a factor on its KL divergence,
of which 1 is the ELBO.) *As in the tutorial* is Pyro's recipe without the liberties that both were given: a learned offset for
every word and no dropout of shares, which had helped both on validation documents, and an encoder trained on random halves of
documents; and it has a linear map behind the encoder where AutoImplicit, and the other ELBO, have two hidden layers and a
shortcut.

Measures. Perplexity by document completion: one random half of a document's words is encoded, the other half scored by the
mean predicted probability over draws of the guide. Coherence: NPMI of all pairs of the ten largest words of a topic, by their
co-occurrence in documents, of the test split and of the training split; a pair that never meets counts -1. Diversity: share of
unlike words among them.

Tuning reads the training split only, in two parts, with three seeds a setting. Of each grid two settings are tested, both
trained on the whole training split with other seeds: that of lowest perplexity, and the most coherent of those within 5% of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from _report import RESULTS, write
from _scale_site import ScaleSite
from pyro.infer import SVI, TraceMeanField_ELBO
from scipy import sparse
from scipy.stats import t as student
from torch import Tensor

from pyro_sinkhorn import AutoImplicit, Trace_Sinkhorn
from pyro_sinkhorn.guide.encoder import NoiseHead
from pyro_sinkhorn.models import SoftmaxNormalGuide, TopicDecoder, TopicEncoder, prod_lda, prod_lda_normal
from pyro_sinkhorn.ot import ConvergenceWarning

NUM_TOPICS, WIDTH = 20, 128
BATCH, LEARNING_RATE, MATCH_SIZE, DRAWS, TOP = 256, 1e-2, 128, 10, 10
#: One seed is too few to choose a setting by.
TUNING_SEEDS = (100, 101, 102)
SINKHORN, ELBO, TUTORIAL = (
    "Dirichlet, Trace_Sinkhorn",
    "softmax-normal, ELBO",
    "softmax-normal, ELBO, as in the tutorial",
)
WITHIN = 1.05

Setting = dict[str, Any]
GRIDS: dict[str, list[Setting]] = {
    SINKHORN: [
        {"concentration": alpha, "weight": weight} for alpha in (0.1, 0.2, 0.4) for weight in (30.0, 100.0)
    ],
    ELBO: [{"concentration": alpha, "weight": weight} for alpha in (None, 0.4, 0.2) for weight in (0.5, 1.0)],
}


class Head(NoiseHead):
    """Codes to means and log variances as AutoImplicit makes latents of them: two hidden layers and a linear shortcut."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 0, 2 * NUM_TOPICS)

    def forward(self, code: Tensor, noise: Tensor | None = None) -> Tensor:
        """Without noise."""
        return super().forward(code, None)


@dataclass
class Fitted:
    """A topic model after training."""

    shares: Callable[[Tensor], Tensor]
    decoder: TopicDecoder
    ms_per_step: float
    match: float | None

    @torch.no_grad()
    def perplexity(self, seen: sparse.csr_matrix, scored: sparse.csr_matrix) -> float:
        """Of the counts ``scored`` given the counts ``seen`` of the same documents."""
        total = 0.0
        for start in range(0, seen.shape[0], 1000):
            x, words = dense(seen[start : start + 1000]), scored[start : start + 1000].tocoo()
            probability = sum(self.decoder(self.shares(x)).exp() for _ in range(DRAWS)) / DRAWS
            total += float((np.log(probability.numpy()[words.row, words.col]) * words.data).sum())
        return math.exp(-total / scored.sum())

    def top_words(self) -> np.ndarray:
        """Columns of the largest weights, ``(num_topics, TOP)``."""
        return self.decoder.topics.topk(TOP).indices.numpy()


def fit(method: str, setting: Setting, seed: int, counts: Tensor, steps: int) -> Fitted:
    """Train with Adam and a cosine schedule on shuffled epochs."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    n, size = counts.shape
    plain = method == TUTORIAL
    decoder = TopicDecoder(NUM_TOPICS, size, dropout=0.2 if plain else 0.0, offset=not plain)
    encoder = TopicEncoder(size, WIDTH, thinning=0.0 if plain else 0.5)
    if method == SINKHORN:
        model: Any = prod_lda(NUM_TOPICS, size, setting["concentration"], decoder)
        network: Any = AutoImplicit(model, encoder=encoder)
        guide: Any = network
        loss: Any = Trace_Sinkhorn(prior_weight=setting["weight"], match_size=min(MATCH_SIZE, n // 2))

        def shares(x: Tensor) -> Tensor:
            return network(x)["theta"]
    else:
        head = None if plain else Head()
        network = SoftmaxNormalGuide(encoder, NUM_TOPICS, WIDTH, head)
        tempered = ScaleSite("h", setting["weight"])
        model = tempered(prod_lda_normal(NUM_TOPICS, size, setting["concentration"], decoder))
        guide = tempered(network)
        loss = TraceMeanField_ELBO()

        def shares(x: Tensor) -> Tensor:
            return network(x).softmax(-1)

    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": LEARNING_RATE}, "T_max": steps}
    optim = pyro.optim.CosineAnnealingLR(schedule)
    svi = SVI(model, guide, optim, loss)
    batch = min(BATCH, n)
    order: list[Tensor] = []
    start = time.process_time()
    for _ in range(steps):
        if not order:
            order = list(torch.randperm(n)[: n // batch * batch].split(batch))
        svi.step(counts[order.pop()])
        optim.step()
    elapsed = time.process_time() - start
    decoder.eval()
    network.eval()
    match = loss.terms.match["theta"] if method == SINKHORN else None
    return Fitted(shares, decoder, 1e3 * elapsed / steps, match)


# Documents.


def read(data_dir: Path, split: str) -> sparse.csr_matrix:
    """Counts of a split, ``(documents, words)``."""
    parts = np.load(data_dir / "newsgroups20.npz")
    data, indices, indptr = (parts[f"{split}_{name}"] for name in ("counts", "indices", "indptr"))
    shape = (len(indptr) - 1, len(parts["vocabulary"]))
    return sparse.csr_matrix((data.astype(np.float32), indices.astype(np.int32), indptr), shape=shape)


def dense(counts: sparse.csr_matrix) -> Tensor:
    """As a tensor."""
    return torch.from_numpy(counts.toarray())


def two_halves(counts: sparse.csr_matrix, seed: int) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Every word goes to one half or the other by a fair coin."""
    first = counts.copy()
    first.data = np.random.default_rng(seed).binomial(counts.data.astype(int), 0.5).astype(np.float32)
    return first, (counts - first).tocsr()


def meeting(counts: sparse.csr_matrix) -> np.ndarray:
    """Share of the documents in which two words are both present, ``(words, words)``."""
    present = (counts > 0).astype(np.float64)
    return (present.T @ present).toarray() / present.shape[0]


def coherence(top: np.ndarray, both: np.ndarray) -> float:
    """Mean normalised pointwise mutual information (Bouma 2009; Lau et al. 2014) over pairs of a topic's words."""
    pairs = [pair for topic in top for pair in itertools.combinations(topic, 2)]
    i, j = np.array(pairs).T
    joint, apart = both[i, j], both[i, i] * both[j, j]
    met = joint > 0
    values = np.full(len(pairs), -1.0)
    values[met] = np.log(joint[met] / apart[met]) / -np.log(joint[met])
    return float(values.mean())


# Runs.


class Corpus:
    """The training split in a part to fit and a part to validate on, and the test split."""

    def __init__(self, data_dir: Path, smoke: bool) -> None:
        self.train, self.test = read(data_dir, "train"), read(data_dir, "test")
        self.vocabulary = np.load(data_dir / "newsgroups20.npz")["vocabulary"]
        if smoke:
            self.train, self.test = self.train[:600], self.test[:200]
        order = np.random.default_rng(0).permutation(self.train.shape[0])
        held = self.train.shape[0] // 9
        self.validation, self.fitted = self.train[order[:held]], self.train[order[held:]]

    def run(self, method: str, setting: Setting, seed: int, steps: int, part: str) -> dict[str, Any]:
        """Fit once and measure on ``part``, ``"validation"`` or ``"test"``."""
        used, held = (self.fitted, self.validation) if part == "validation" else (self.train, self.test)
        fitted = fit(method, setting, seed, dense(used), steps)
        top = fitted.top_words()
        row = {
            "method": method,
            **setting,
            "seed": seed,
            "part": part,
            "steps": steps,
            "perplexity": fitted.perplexity(*two_halves(held, seed=1)),
            "npmi_train": coherence(top, meeting(used)),
            "diversity": len(np.unique(top)) / top.size,
            "ms_per_step": fitted.ms_per_step,
            "match": fitted.match,  # of the last batch, with the encoder's words thinned
        }
        if part == "test":
            row["npmi_test"] = coherence(top, meeting(self.test))
            row["top_words"] = [" ".join(self.vocabulary[topic]) for topic in top]
        return row


def unigram_perplexity(train: sparse.csr_matrix, test: sparse.csr_matrix) -> float:
    """Of one distribution of words for all documents, with half a word added to every count."""
    frequency = np.asarray(train.sum(0), dtype=np.float64).ravel() + 0.5
    scored = np.asarray(two_halves(test, seed=1)[1].sum(0)).ravel()
    return math.exp(-(np.log(frequency / frequency.sum()) * scored).sum() / scored.sum())


def choose(tuning: list[list[dict[str, Any]]]) -> dict[str, Setting]:
    """By means over seeds: the setting of lowest perplexity, and the most coherent of those within 5% of it."""
    rows = [
        {**group[0], **{name: np.mean([row[name] for row in group]) for name in ("perplexity", "npmi_train")}}
        for group in tuning
    ]
    best = min(rows, key=lambda row: row["perplexity"])
    near = [row for row in rows if row["perplexity"] <= WITHIN * best["perplexity"]]
    coherent = max(near, key=lambda row: row["npmi_train"])
    return {
        rule: {name: row[name] for name in ("concentration", "weight")}
        for rule, row in (("lowest perplexity", best), ("most coherent", coherent))
    }


def summary_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and 95% half-width (Student, over seeds) of every measure."""
    out = {}
    for name in ("perplexity", "npmi_test", "npmi_train", "diversity", "ms_per_step"):
        values = np.array([row[name] for row in rows])
        n = len(values)
        half = float(values.std(ddof=1) / math.sqrt(n) * student.ppf(0.975, n - 1)) if n > 1 else 0.0
        out[name] = {"mean": float(values.mean()), "half_width": half}
    return out


class Runs:
    """Rows made so far, kept in a file beside the results until all are there."""

    def __init__(self, corpus: Corpus, path: Path | None, fresh: bool) -> None:
        self.corpus, self.path = corpus, path
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.exists() and not fresh:
            self.rows = json.loads(path.read_text(encoding="utf-8"))

    def get(self, method: str, setting: Setting, seed: int, steps: int, part: str) -> dict[str, Any]:
        """A row that is there, or a new one."""
        wanted = {"method": method, **setting, "seed": seed, "part": part, "steps": steps}
        for row in self.rows:
            if all(row[name] == value for name, value in wanted.items()):
                return row
        row = self.corpus.run(method, setting, seed, steps, part)
        self.rows.append(row)
        if self.path is not None:
            self.path.write_text(json.dumps(self.rows), encoding="utf-8")
        print(
            f"{part:<11}{method:<42}{setting['concentration']!s:>5}{setting['weight']:>7g} seed {seed:<4}"
            f"perplexity {row['perplexity']:7.1f} NPMI {row.get('npmi_test', row['npmi_train']):.3f} "
            f"diversity {row['diversity']:.3f} {row['ms_per_step']:.0f} ms a step",
            flush=True,
        )
        return row


def tested(
    runs: Runs, method: str, rules: Iterable[tuple[str, Setting]], seeds: list[int], steps: int
) -> Any:
    """Rows of the table, one a rule."""
    for rule, setting in rules:
        rows = [runs.get(method, setting, seed, steps, "test") for seed in seeds]
        yield {
            "method": method,
            "rule": rule,
            **setting,
            **summary_of(rows),
            "top_words": rows[0]["top_words"],
        }


def main() -> None:
    """Choose settings, test, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    grids, tuning_seeds = GRIDS, TUNING_SEEDS
    if options.smoke_test:
        options.steps, options.seeds, tuning_seeds = 3, [0], TUNING_SEEDS[:1]
        grids = {method: grid[:2] for method, grid in GRIDS.items()}
    torch.set_num_threads(1)
    pyro.enable_validation(False)  # as a long run is: the counts are checked again in every step otherwise
    torch.set_default_dtype(torch.float32)
    warnings.simplefilter("ignore", ConvergenceWarning)
    corpus = Corpus(options.data_dir, options.smoke_test)
    partial = None if options.smoke_test else RESULTS / "newsgroups.partial.json"
    runs = Runs(corpus, partial, options.fresh)
    table = []
    for method, grid in grids.items():
        tuning = [
            [runs.get(method, setting, seed, options.steps, "validation") for seed in tuning_seeds]
            for setting in grid
        ]
        table += tested(runs, method, choose(tuning).items(), options.seeds, options.steps)
    recipe = {"concentration": None, "weight": 1.0}
    table += tested(runs, TUTORIAL, [("as it is", recipe)], options.seeds, options.steps)
    payload = {
        "settings": {
            "num_topics": NUM_TOPICS,
            "steps": options.steps,
            "batch_size": BATCH,
            "learning_rate": LEARNING_RATE,
            "match_size": MATCH_SIZE,
            "grids": grids,
        },
        "unigram_perplexity": unigram_perplexity(corpus.train, corpus.test),
        "summary": table,
        "runs": runs.rows,
    }
    if not options.smoke_test:
        write("newsgroups", payload, seeds=[*TUNING_SEEDS, *options.seeds], packages=["scipy"])
        partial.unlink()
    print(f"unigram perplexity {payload['unigram_perplexity']:.1f}")
    for row in table:
        print(
            f"{row['method']:<42}{row['rule']:<20}perplexity {row['perplexity']['mean']:.1f} +- "
            f"{row['perplexity']['half_width']:.1f} NPMI test {row['npmi_test']['mean']:.3f} +- "
            f"{row['npmi_test']['half_width']:.3f} train {row['npmi_train']['mean']:.3f} "
            f"diversity {row['diversity']['mean']:.3f}"
        )
    for words in table[1]["top_words"]:
        print("   ", words)


if __name__ == "__main__":
    main()
