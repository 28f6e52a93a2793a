"""Pyro's ProdLDA, as it is and with its guide and loss exchanged.

    python examples/pyro_ports/prodlda.py
    python examples/pyro_ports/prodlda.py --guide sinkhorn --smoke-test
    python examples/pyro_ports/prodlda.py --data-dir DATA    # with newsgroups20.npz in it

The model is that of Pyro's tutorial ``prodlda`` (Srivastava and Sutton 2017, *Autoencoding variational inference for topic
models*): a logistic normal in the place of the Dirichlet, a product of experts with batch normalisation, dropout of .2,
Adam at 1e-3. The Dirichlet itself, which only one of the two ways can keep, is not in this file: here the model stays.
Data: documents of 60 words drawn from ten known topics; batches of 256 instead of 32, since clouds are matched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _harness import Budget, batches, evidence_bound, fit, generate, main, report, start, told_apart
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from pyro_sinkhorn import AutoImplicit, Trace_Sinkhorn

BUDGET = Budget(steps=600, batch=256)
NUM_TOPICS, VOCABULARY, WORDS = 10, 300, 60


class Decoder(nn.Module):
    """Weights of topics to probabilities of words."""

    def __init__(self, vocabulary: int, num_topics: int, dropout: float) -> None:
        super().__init__()
        self.beta = nn.Linear(num_topics, vocabulary, bias=False)
        self.norm = nn.BatchNorm1d(vocabulary, affine=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, theta: Tensor) -> Tensor:
        return self.norm(self.beta(self.drop(theta))).softmax(-1)


class ProdLDA(nn.Module):
    """The generative program: site "logtheta" in plate "documents", then "obs"."""

    def __init__(self, vocabulary: int, num_topics: int, hidden: int = 100, dropout: float = 0.2) -> None:
        super().__init__()
        self.vocabulary, self.num_topics, self.hidden, self.dropout = vocabulary, num_topics, hidden, dropout
        self.decoder = Decoder(vocabulary, num_topics, dropout)

    def model(self, docs: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("documents", len(docs)):
            standard = dist.Normal(docs.new_zeros(()), docs.new_ones(()))
            logtheta = pyro.sample("logtheta", standard.expand([len(docs), self.num_topics]).to_event(1))
            words = self.decoder(logtheta.softmax(-1))
            # Any count does for the density, which does not read it; only one number for all documents may be given.
            pyro.sample("obs", dist.Multinomial(int(docs.sum(-1).max()), words), obs=docs)


class Encoder(nn.Module):
    """Location and scale of a document's weights, batch-normalised against collapse."""

    def __init__(self, vocabulary: int, num_topics: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Linear(vocabulary, hidden),
            nn.Softplus(),
            nn.Linear(hidden, hidden),
            nn.Softplus(),
            nn.Dropout(dropout),
        )
        self.loc = nn.Sequential(nn.Linear(hidden, num_topics), nn.BatchNorm1d(num_topics, affine=False))
        self.log_var = nn.Sequential(nn.Linear(hidden, num_topics), nn.BatchNorm1d(num_topics, affine=False))

    def forward(self, docs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(docs)
        return self.loc(hidden), (0.5 * self.log_var(hidden)).exp()


def set_up_pyro(lda: ProdLDA) -> SVI:
    lda.encoder = Encoder(lda.vocabulary, lda.num_topics, lda.hidden, lda.dropout)

    def guide(docs: Tensor) -> None:
        pyro.module("encoder", lda.encoder)
        with pyro.plate("documents", len(docs)):
            loc, scale = lda.encoder(docs)
            pyro.sample("logtheta", dist.Normal(loc, scale).to_event(1))

    loss = TraceMeanField_ELBO()
    return SVI(lda.model, guide, Adam({"lr": 1e-3}), loss=loss)


def set_up_sinkhorn(lda: ProdLDA) -> SVI:
    guide = AutoImplicit(lda.model)
    loss = Trace_Sinkhorn(prior_weight=30.0)
    return SVI(lda.model, guide, Adam({"lr": 1e-3}), loss=loss)


SET_UPS = {"pyro": set_up_pyro, "sinkhorn": set_up_sinkhorn}


def corpus(part: str) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of words to train ``(2000, V)`` and to test ``(1000, V)`` from ProdLDA itself, and its ``(topics, V)`` logits.

    :param part: "validation" draws other documents of the same topics to test
    """
    rng = torch.Generator().manual_seed(0)
    topics = torch.randn(NUM_TOPICS, VOCABULARY, generator=rng)
    logits = torch.randn(4000, NUM_TOPICS, generator=rng).softmax(-1) @ topics
    words = ((logits - logits.mean(0)) / logits.std(0)).softmax(-1)  # as the decoder's normalisation has it
    drawn = torch.multinomial(words, WORDS, replacement=True, generator=rng)
    docs = torch.zeros(len(words), VOCABULARY).scatter_add_(1, drawn, torch.ones(drawn.shape))
    return docs[:2000], docs[2000:3000] if part == "validation" else docs[3000:], topics


def newsgroups(folder: Path, part: str) -> tuple[Tensor, Tensor, None]:
    """The 1000 most frequent words of 20 Newsgroups, in documents that have at least 20 of them."""
    stored = np.load(folder / "newsgroups20.npz")

    def split(name: str) -> Tensor:
        parts = (stored[f"{name}_{key}"] for key in ("counts", "indices", "indptr"))
        matrix = csr_matrix(
            tuple(parts), shape=(len(stored[f"{name}_indptr"]) - 1, len(stored["vocabulary"]))
        )
        return torch.tensor(matrix.toarray(), dtype=torch.get_default_dtype())

    train, test = split("train"), split("test")
    frequent = train.sum(0).topk(1000).indices
    train, test = (docs[:, frequent] for docs in (train, test))
    train, test = (docs[docs.sum(-1) >= 20] for docs in (train, test))
    return (train[:-1000], train[-1000:], None) if part == "validation" else (train, test[:1000], None)


def topics_found(lda: ProdLDA, topics: Tensor) -> float:
    """Mean correlation of the best pairing of learned topics with true ones, over the words."""
    learned, true = lda.decoder.beta.weight.detach().T, topics
    pairs = torch.corrcoef(torch.cat([learned, true]))[: len(learned), len(learned) :].numpy()
    return float(pairs[linear_sum_assignment(-pairs)].mean())


def run(
    way: str, budget: Budget = BUDGET, seed: int = 0, part: str = "test", data_dir: str | None = None
) -> dict[str, Any]:
    """Fit one way and measure on held-out documents."""
    train, held_out, topics = newsgroups(Path(data_dir), part) if data_dir else corpus(part)
    start(seed)
    lda = ProdLDA(train.shape[-1], 20 if data_dir else NUM_TOPICS)
    svi = SET_UPS[way](lda)
    seconds = fit(svi, batches(budget.batch, train), budget.steps)
    lda.eval()
    torch.manual_seed(seed)
    found = report(svi, budget, held_out)
    if topics is not None:  # whose documents are equally long, as generated ones are
        generated = generate(svi, held_out)["obs"]
        found["c2st"] = told_apart(generated, held_out, train, budget.rows)
        found["topic_correlation"] = topics_found(lda, topics)
    found["evidence_bound"] = evidence_bound(
        set_up_pyro, lda, batches(budget.batch, train), budget.steps, held_out
    )
    return found | {"seconds": seconds}


if __name__ == "__main__":
    main(run, SET_UPS, BUDGET, __doc__)
