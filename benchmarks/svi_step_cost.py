r"""What does a step of SVI cost with ``Trace_Sinkhorn``, beside ``Trace_ELBO`` with a mean-field guide?

The digits program: 64 pixels, 10 latents, decoder 10-w-w-64, encoder 64-w-w-10, SiLU; w is 128 and 512, the batch 256 and
1024 of scikit-learn's digits. Networks are the same on both sides. The encoder is the head of ``AutoImplicit`` on the
pixels, a perceptron with two hidden layers and a linear map beside it; it reads 10 noise variables more in the implicit
guide and has 10 outputs more in the normal one. The decoder's Bernoulli does not check its logits, and Pyro's validation
is on as it is by default. Rows:

- ``Trace_ELBO``: normal prior, normal guide
- ``Trace_Sinkhorn``: the same prior, and ``AutoImplicit`` around the same encoder
- the same with a Dirichlet prior, which ``Trace_ELBO`` cannot have
- at width 128, the Dirichlet with all that ``AutoImplicit`` makes by itself (standardised input 64-128-128, head
  138-128-128-10), as most people will run it

Steps of all rows alternate in one run, after a warm-up that trains each, since the solver's iterations depend on how near
the clouds are. Times are CPU time of one thread, float32, medians, so that a busy neighbour counts for less.

``matching`` is transport with all that belongs to it: the split into halves, costs, solver, value, and its share of the
backward pass. It and the parts are measured in further steps between the others, in which functions wear clocks: a part's
time excludes that of the parts inside it. The share of the backward pass is a gradient of the match with respect to its
clouds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from _clock import Clock
from _report import write
from pyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyro_sinkhorn.guide.auto_implicit
import pyro_sinkhorn.losses.base
import pyro_sinkhorn.losses.call
import pyro_sinkhorn.losses.coordinates
import pyro_sinkhorn.losses.latent_match
import pyro_sinkhorn.losses.matching
import pyro_sinkhorn.losses.trace_sinkhorn
from pyro_sinkhorn import AutoImplicit, Trace_Sinkhorn
from pyro_sinkhorn.guide.encoder import NoiseHead, perceptron

PIXELS, LATENTS = 64, 10
WIDTHS, BATCHES = (128, 512), (256, 1024)
ELBO, NORMAL, DIRICHLET, DEFAULT = (
    "Trace_ELBO, normal prior",
    "Trace_Sinkhorn, normal prior",
    "Trace_Sinkhorn, Dirichlet prior",
    "Trace_Sinkhorn, Dirichlet prior, default encoder",
)
MATCHING = ("match", "match: backward")
SEED = 0


class Key(NamedTuple):
    """What a row is."""

    program: str
    width: int
    batch: int


def make_model(width: int, dirichlet: bool) -> Callable[[Tensor], None]:
    decoder = perceptron(LATENTS, width, PIXELS)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        if dirichlet:
            prior = dist.Dirichlet(torch.full((LATENTS,), 0.5))
        else:
            prior = dist.Normal(0.0, 1.0).expand([LATENTS]).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(logits=decoder(z), validate_args=False).to_event(1), obs=x)

    return model


def normal_guide(width: int) -> Callable[[Tensor], None]:
    encoder = NoiseHead(PIXELS, 0, 2 * LATENTS, width)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x, None).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return guide


class Row:
    """One program with its own parameters, optimiser, loss and data."""

    def __init__(self, key: Key, data: Tensor) -> None:
        model = make_model(key.width, dirichlet=key.program in (DIRICHLET, DEFAULT))
        loss: Any = Trace_ELBO() if key.program == ELBO else Trace_Sinkhorn()
        guide: Any
        if key.program == ELBO:
            guide = normal_guide(key.width)
        elif key.program == DEFAULT:
            guide = AutoImplicit(model)
        else:
            # The pixels themselves as the code of a datum: then the head is the whole encoder.
            guide = AutoImplicit(model, nn.Identity(), hidden=key.width)
        self.store: dict[str, Any] | None = None
        self.svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)
        self.minibatches = minibatches(data, key.batch)

    @contextmanager
    def active(self) -> Iterator[SVI]:
        with pyro.get_param_store().scope(self.store) as self.store:
            yield self.svi

    def parameters(self) -> int:
        with self.active():
            return sum(value.numel() for value in pyro.get_param_store().values())


def minibatches(data: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for index in torch.randperm(len(data)).split(size)[: len(data) // size]:
            yield data[index]


def make_rows(data: Tensor) -> dict[Key, Row]:
    keys = [
        Key(program, width, batch)
        for width in WIDTHS
        for batch in BATCHES
        for program in (ELBO, NORMAL, DIRICHLET, *([DEFAULT] if width == 128 else []))
    ]
    return {key: Row(key, data) for key in keys}


def measure(rows: dict[Key, Row], warm_up: int, rounds: int) -> tuple[dict[Key, list[float]], dict[Key, Any]]:
    """CPU milliseconds of every step, the rows taking turns, and of the parts of steps between these."""
    for row in rows.values():
        with row.active() as svi:
            for _ in range(warm_up):
                svi.step(next(row.minibatches))
    times: dict[Key, list[float]] = {key: [] for key in rows}
    parts: dict[Key, list[Any]] = {key: [] for key in rows if key.program != ELBO}
    for _ in range(rounds):
        for key, row in rows.items():
            x = next(row.minibatches)
            with row.active() as svi:
                start = time.process_time()
                svi.step(x)
                times[key].append((time.process_time() - start) * 1e3)
            if key.program != ELBO:
                parts[key].append(profiled_step(row))
    return times, {key: summary(found) for key, found in parts.items()}


def summary(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over steps."""
    iterations = median(step.pop("solver iterations") for step in steps)
    parts = {part: median(step.get(part, 0.0) for step in steps) for part in set().union(*steps)}
    return {
        "whole_ms": median(sum(step.values()) for step in steps),
        "matching_ms": median(sum(step[part] for part in MATCHING) for step in steps),
        "parts_ms": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "solver_iterations": iterations,
    }


def profiled_step(row: Row) -> dict[str, float]:
    """CPU milliseconds of the parts of one step, and the solver's iterations."""
    losses = pyro_sinkhorn.losses
    places = {
        (pyro_sinkhorn.guide.auto_implicit, "run_model"): "guide: prior run for its plates",
        (losses.base, "run_scored"): "model run",
        (losses.trace_sinkhorn, "structure_of"): "checks",
        (losses.trace_sinkhorn, "check_guide"): "checks",
        (losses.trace_sinkhorn, "check_supports"): "checks",
        (losses.trace_sinkhorn, "log_density"): "likelihood",
        (losses.call, "prior_trace"): "prior run",
        (losses.call, "constant_traces"): "prior run",
        (losses.latent_match, "varying_parameters"): "clouds",
        (losses.coordinates, "embedded"): "clouds",
        (losses.coordinates, "varying_parameters"): "clouds",
        (losses.latent_match, "make_cloud"): "clouds",
        (losses.latent_match, "slices"): "clouds",
        (Tensor, "backward"): "backward",
    }
    iterations: list[int] = []
    transport, match = losses.matching.sinkhorn_divergence, losses.latent_match.match
    clock = Clock()

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = transport(*args, **kwargs)
        iterations.append(result.n_iters)
        return result

    def with_backward(x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
        value = clock.timed("match", match)(x, y, *args, **kwargs)
        learned = [cloud.points for cloud in (x, y) if cloud.points.requires_grad]
        # Besides the pass through the whole graph, which holds it a second time: taken off below.
        clock.timed("match: backward", torch.autograd.grad)(value.sum(), learned, retain_graph=True)
        return value

    with (
        row.active() as svi,
        mock.patch.object(losses.matching, "sinkhorn_divergence", counted),
        mock.patch.object(losses.latent_match, "match", with_backward),
        clock.around(places),
    ):
        optim, guide = svi.optim, svi.guide
        svi.optim, svi.guide = clock.timed("optimiser", optim), clock.timed("guide run", guide)
        try:
            clock.timed("rest: traces, handlers, bookkeeping", svi.step)(next(row.minibatches))
        finally:
            svi.optim, svi.guide = optim, guide
    clock.parts["backward"] -= clock.parts["match: backward"]
    return dict(clock.parts) | {"solver iterations": sum(iterations)}


def quantile(values: list[float], q: float) -> float:
    return torch.tensor(values).quantile(q).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="a few steps; writes nothing")
    parser.add_argument("--rounds", type=int, default=150, help="steps of every row that are timed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(SEED)
    warm_up, rounds = (2, 3) if args.smoke_test else (150, args.rounds)
    data = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    rows = make_rows(data)
    times, profiles = measure(rows, warm_up, rounds)
    table = []
    print(
        f"{'CPU ms a step':<66} {'median':>7} {'quartiles':>15} {'ratio':>6} {'matching':>9} {'without':>8}"
    )
    for key, row in rows.items():
        found = times[key]
        middle, low, high = median(found), quantile(found, 0.25), quantile(found, 0.75)
        baseline = median(times[Key(ELBO, key.width, key.batch)])
        matching = profiles[key]["matching_ms"] if key in profiles else 0.0
        table.append(
            key._asdict()
            | {
                "median_ms": middle,
                "quartiles_ms": [low, high],
                "ratio_to_elbo": middle / baseline,
                "matching_ms": matching,
                "ratio_without_matching": (middle - matching) / baseline,
                "parameters": row.parameters(),
            }
        )
        name = f"width {key.width}, batch {key.batch:4}: {key.program}"
        print(
            f"{name:<66} {middle:7.2f} {low:7.2f}-{high:<7.2f} {middle / baseline:6.2f} {matching:9.2f} "
            f"{(middle - matching) / baseline:8.2f}"
        )
    for key, found in profiles.items():
        print(f"\n{key}: {found['whole_ms']:.2f} ms, {found['solver_iterations']:.0f} solver iterations")
        for part, ms in found["parts_ms"].items():
            print(f"    {part:<38} {ms:6.2f} ms {ms / found['whole_ms']:5.0%}")
    if not args.smoke_test:
        settings = {
            "dtype": "float32",
            "networks": f"encoder {PIXELS}-w-w-{LATENTS}, decoder {LATENTS}-w-w-{PIXELS}, SiLU",
            "data": "scikit-learn digits, 64 pixels",
            "validation": pyro.settings.get("validate_distributions_pyro"),
            "warm_up": warm_up,
            "rounds": rounds,
        }
        parts = [key._asdict() | found for key, found in profiles.items()]
        payload = settings | {"table": table, "profile_of_a_step": parts}
        print("wrote", write("svi_step_cost", payload, seeds=[SEED], packages=["scikit-learn"]))


if __name__ == "__main__":
    main()
