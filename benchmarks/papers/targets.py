r"""Hungarian or Sinkhorn matching, to fresh samples or to fixed targets (Table 1 of SAE v1): sphere in 10 dimensions, MNIST.

Four penalties of ``_methods.py`` at the paper's weights 10 and 100 of the squared distance between latents (twice that in our
unit, the mean cost of two prior draws, 2 on the sphere), and ``Trace_Sinkhorn`` beside them. The likelihood is Gaussian with a
standard deviation of .2 a pixel, the paper's a Bernoulli, so that a weight of ours is only about theirs. All are fitted to
10,000 training images: then every datum comes back fifteen times, without which fixed targets would be as good as fresh.
Nothing is tuned; test images, three seeds. Networks and measures are those of ``generative_autoencoding.py``.

    python benchmarks/papers/targets.py --data-dir ../shared/data      # twenty minutes of one core; resumes
    python benchmarks/papers/targets.py --smoke-test
"""

from __future__ import annotations

import argparse
import functools
import random

import _path  # noqa: F401 (the folder above)
from _fits import BATCH, LEARNING_RATE, MATCH_SIZE, prepare, run, show
from _resume import Rows

NAME = "papers_targets"
PRIOR = "sphere-10"
METHODS = ("hae", "nat", "sae-v1", "sae-v1-fixed", "ours")
BETAS = (10.0, 100.0)
NUM_TRAIN = 10_000
STEPS = 1200


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", help="folder of mnist.npz")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    if options.smoke_test:
        options.data_dir, options.steps, options.seeds = None, 2, [0]
    elif options.data_dir is None:
        parser.error("give --data-dir, the folder of mnist.npz, or --smoke-test")
    prepare()
    settings = {
        "steps": options.steps,
        "batch": BATCH,
        "match_size": MATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "num_train": NUM_TRAIN,
    }
    rows = Rows(NAME, settings, ("method", "beta", "seed"), not options.smoke_test, ["scipy"], show)
    # Seed by seed, so that a run that is stopped has whole tables; several processes share each in different orders.
    for seed in options.seeds:
        jobs = [(method, beta) for method in METHODS for beta in BETAS[: 1 if options.smoke_test else 2]]
        random.shuffle(jobs)
        for method, beta in jobs:
            made = (PRIOR, method, 2 * beta, seed, options.steps, "test", options.data_dir, NUM_TRAIN)
            rows.make(functools.partial(run, *made), method=method, beta=beta, seed=seed)


if __name__ == "__main__":
    main()
