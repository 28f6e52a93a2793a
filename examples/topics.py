"""Find the topics of a collection of documents, under the Dirichlet prior that topic models are named after.

    python examples/topics.py                   # a small corpus, made here, with known topics
    python examples/topics.py --data-dir DIR    # 20 Newsgroups, from DIR/newsgroups20.npz
    python examples/topics.py --smoke-test      # a few steps, to see that everything runs

A document is a mixture of topics, theta ~ Dirichlet(alpha), and a topic says which words are frequent. Variational
autoencoders for text put the softmax of a normal in place of the Dirichlet; here it stays, as it is only sampled from.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_sinkhorn import AutoImplicit, SinkhornProgram, Trace_Sinkhorn
from pyro_sinkhorn.models import TopicDecoder, TopicEncoder, prod_lda

torch.set_num_threads(1)  # clouds of this size gain nothing from two, and lose much beside a busy neighbour

TOPICS = {
    "space": "orbit rocket moon launch satellite planet shuttle astronaut",
    "kitchen": "oven flour butter recipe onion pepper bake taste",
    "football": "goal team coach season league match player score",
    "medicine": "doctor patient disease drug hospital symptom cure nurse",
    "music": "guitar song concert album drum melody piano band",
    "money": "bank price market stock trade profit tax loan",
}
EVERYWHERE = ["people", "time", "day", "year", "way", "thing", "world", "work", "week", "place"]


def made_corpus(n: int = 3000, length: int = 60) -> tuple[Tensor, list[str]]:
    """Counts and vocabulary: two fifths of the words say nothing, the others are drawn from the document's topics."""
    vocabulary = [word for words in TOPICS.values() for word in words.split()] + EVERYWHERE
    topics = torch.zeros(len(TOPICS), len(vocabulary))
    for k, words in enumerate(TOPICS.values()):
        topics[k, [vocabulary.index(word) for word in words.split()]] = 0.6 / len(words.split())
    topics[:, -len(EVERYWHERE) :] = 0.4 / len(EVERYWHERE)
    theta = dist.Dirichlet(torch.full((len(TOPICS),), 0.2)).sample((n,))
    return dist.Multinomial(length, theta @ topics).sample(), vocabulary


def newsgroups(data_dir: Path) -> tuple[Tensor, list[str]]:
    """Counts of the training documents of 20 Newsgroups, and the vocabulary."""
    parts = np.load(data_dir / "newsgroups20.npz")
    vocabulary = [str(word) for word in parts["vocabulary"]]
    indptr = parts["train_indptr"]
    counts = torch.zeros(len(indptr) - 1, len(vocabulary))
    rows = np.repeat(np.arange(len(counts)), np.diff(indptr))
    counts[rows, parts["train_indices"].astype(int)] = torch.from_numpy(parts["train_counts"]).to(counts)
    return counts, vocabulary


def main() -> None:
    """Fit, print topics and what a document is about."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir", type=Path, help="folder of newsgroups20.npz; default a corpus made here"
    )
    parser.add_argument("--num-topics", type=int, help="default 6, or 20 for 20 Newsgroups")
    parser.add_argument("--num-steps", type=int, help="default 300, or 800 for 20 Newsgroups")
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    made = options.data_dir is None
    counts, vocabulary = made_corpus() if made else newsgroups(options.data_dir)
    num_topics = options.num_topics or (len(TOPICS) if made else 20)
    num_steps = 5 if options.smoke_test else options.num_steps or (300 if made else 800)

    size = len(vocabulary)
    decoder = TopicDecoder(num_topics, size, dropout=0.0)
    program = SinkhornProgram(
        prod_lda(num_topics, size, concentration=0.2, decoder=decoder),
        functools.partial(AutoImplicit, encoder=TopicEncoder(size)),
        Trace_Sinkhorn(prior_weight=100.0, match_size=128),
    )
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "T_max": num_steps}
    program.fit(counts, num_steps=num_steps, seed=0, optim=pyro.optim.CosineAnnealingLR(schedule))

    theta = program.encode(counts, seed=1)["theta"][0]
    (trained,) = program.modules.values()
    print(f"\n{'share':<8}largest words")
    for share, topic in sorted(
        zip(theta.mean(0).tolist(), trained.topics, strict=True), key=lambda pair: -pair[0]
    ):
        print(f"{share:<8.3f}{' '.join(vocabulary[i] for i in topic.topk(8).indices)}")
    largest = theta.max(-1).values.mean()
    prior = dist.Dirichlet(torch.full((num_topics,), 0.2)).sample((10_000,)).max(-1).values.mean()
    print(f"\nlargest share of a document, on average: {largest:.3f}, under the prior {prior:.3f}\n")
    program.diagnose(counts[:2048], seed=2)


if __name__ == "__main__":
    main()
