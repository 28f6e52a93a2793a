r"""What does a step of SVI cost with ``Trace_Sinkhorn``, beside ``Trace_ELBO``?

One program: 10 latents, a decoder 10-128-64, batches of 256 scikit-learn digits, Adam. Rows:

- ``Trace_ELBO``: normal prior and a normal encoder
- ``Trace_Sinkhorn``: the same prior and networks, and ``AutoImplicit`` around them
- the same with a Dirichlet prior, which ``Trace_ELBO`` cannot have
- the Dirichlet with the encoder that ``AutoImplicit`` makes by itself (standardised input,
  64-128-128), as most people will run it

The encoder is 64-128, then the three-layer head of ``AutoImplicit`` (10 noise inputs in the implicit guide, 10 more
outputs in the normal one): equal to a few percent in parameters. Steps of all rows alternate in one run, after a
warm-up that trains each, since the solver's iterations depend on how near the clouds are. Times are CPU time of one
thread, float32, medians, so that a busy neighbour counts for less.

The profile wraps a few functions of the library with clocks; each part's time excludes that of the parts inside it.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
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
from pyro_sinkhorn.guide.encoder import NoiseHead

# Not an attribute of its package: there the function of the same name hides the module.
solver = importlib.import_module("pyro_sinkhorn.ot.sinkhorn")

BATCH, PIXELS, LATENTS, WIDTH = 256, 64, 10, 128
SEED = 0


def encoder_network() -> nn.Module:
    return nn.Sequential(nn.Linear(PIXELS, WIDTH), nn.SiLU())


def make_model(dirichlet: bool) -> Callable[[Tensor], None]:
    decoder = nn.Sequential(nn.Linear(LATENTS, WIDTH), nn.SiLU(), nn.Linear(WIDTH, PIXELS))

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


def normal_guide() -> Callable[[Tensor], None]:
    encoder, head = encoder_network(), NoiseHead(WIDTH, 0, 2 * LATENTS, WIDTH)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.module("head", head)
        loc, log_scale = head(encoder(x), None).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return guide


class Row:
    """One program with its own parameters, optimiser and loss."""

    def __init__(self, model: Any, guide: Any, loss: Any) -> None:
        self.store: dict[str, Any] | None = None
        self.guide, self.loss = guide, loss
        self.svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)

    @contextmanager
    def active(self) -> Iterator[SVI]:
        with pyro.get_param_store().scope(self.store) as self.store:
            yield self.svi

    def parameters(self) -> int:
        with self.active():
            return sum(value.numel() for value in pyro.get_param_store().values())


def make_rows() -> dict[str, Row]:
    rows = {"Trace_ELBO, normal prior": Row(make_model(False), normal_guide(), Trace_ELBO())}
    for name, is_dirichlet, encoder in (
        ("Trace_Sinkhorn, normal prior", False, encoder_network()),
        ("Trace_Sinkhorn, Dirichlet prior", True, encoder_network()),
        ("Trace_Sinkhorn, Dirichlet prior, default encoder", True, None),
    ):
        model = make_model(is_dirichlet)
        rows[name] = Row(model, AutoImplicit(model, encoder), Trace_Sinkhorn())
    return rows


def batches(data: Tensor) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(len(data)).split(BATCH)[: len(data) // BATCH]


def measure(rows: dict[str, Row], data: Tensor, warm_up: int, rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of every step, the rows taking turns."""
    index = batches(data)
    for row in rows.values():
        with row.active() as svi:
            for _ in range(warm_up):
                svi.step(data[next(index)])
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, row in rows.items():
            x = data[next(index)]
            with row.active() as svi:
                start = time.process_time()
                svi.step(x)
                times[name].append((time.process_time() - start) * 1e3)
    return times


class Clock:
    """CPU time by part; a part's time excludes that of parts inside it."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)
        self._inside = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = (time.process_time() - start) * 1e3
                self.parts[part] += spent - self._inside.pop()
                self._inside[-1] += spent

        return wrapper


def profile(row: Row, data: Tensor, rounds: int) -> dict[str, Any]:
    """Median CPU milliseconds of the parts of a step, and of the solver's iterations."""
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
        (losses.latent_match, "match"): "match: split, costs, value",
        (solver, "solve"): "match: solver",
        (Tensor, "backward"): "backward",
    }
    index = batches(data)
    iterations, steps, wholes = [], [], []
    solve = solver.solve

    def counted(*args: Any, **kwargs: Any) -> Any:
        solution = solve(*args, **kwargs)
        iterations.append(solution.n_iters)
        return solution

    with row.active() as svi:
        optim, guide = svi.optim, svi.guide
        for _ in range(rounds):
            clock = Clock()
            with ExitStack() as stack:
                for (owner, name), part in places.items():
                    function = counted if part == "match: solver" else getattr(owner, name)
                    stack.enter_context(mock.patch.object(owner, name, clock.timed(part, function)))
                svi.optim, svi.guide = clock.timed("optimiser", optim), clock.timed("guide run", guide)
                try:
                    x = data[next(index)]
                    clock.timed("rest: traces, handlers, bookkeeping", svi.step)(x)
                finally:
                    svi.optim, svi.guide = optim, guide
            steps.append(dict(clock.parts))
            wholes.append(sum(clock.parts.values()))
    parts = {
        part: median(step.get(part, 0.0) for step in steps) for part in sorted({p for s in steps for p in s})
    }
    parts = dict(sorted(parts.items(), key=lambda item: -item[1]))
    return {"whole_ms": median(wholes), "parts_ms": parts, "solver_iterations": median(iterations)}


def quantile(values: list[float], q: float) -> float:
    return torch.tensor(values).quantile(q).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="a few steps; writes nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(SEED)
    warm_up, rounds = (2, 3) if args.smoke_test else (300, 300)
    data = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    rows = make_rows()
    times = measure(rows, data, warm_up, rounds)
    baseline = median(times["Trace_ELBO, normal prior"])
    table = []
    print(
        f"{'CPU ms a step at batch 256':<52} {'median':>7} {'quartiles':>15} {'ratio':>6} {'parameters':>11}"
    )
    for name, row in rows.items():
        middle, low, high = median(times[name]), quantile(times[name], 0.25), quantile(times[name], 0.75)
        table.append(
            {
                "program": name,
                "median_ms": middle,
                "quartiles_ms": [low, high],
                "ratio_to_elbo": middle / baseline,
                "parameters": row.parameters(),
            }
        )
        print(
            f"{name:<52} {middle:7.2f} {low:7.2f}-{high:<7.2f} {middle / baseline:6.2f} {row.parameters():11d}"
        )
    profiles = {}
    for name, row in rows.items():
        if isinstance(row.loss, Trace_Sinkhorn):
            profiles[name] = found = profile(row, data, rounds)
            print(f"\n{name}: {found['whole_ms']:.2f} ms, {found['solver_iterations']:.0f} solver iterations")
            for part, ms in found["parts_ms"].items():
                print(f"    {part:<38} {ms:6.2f} ms {ms / found['whole_ms']:5.0%}")
    if not args.smoke_test:
        settings = {
            "batch": BATCH,
            "dtype": "float32",
            "decoder": f"{LATENTS}-{WIDTH}-{PIXELS}",
            "data": "scikit-learn digits, 64 pixels",
            "validation": pyro.settings.get("validate_distributions_pyro"),
            "warm_up": warm_up,
            "rounds": rounds,
        }
        payload = settings | {"table": table, "profile_of_a_step": profiles}
        print("wrote", write("svi_step_cost", payload, seeds=[SEED], packages=["scikit-learn"]))


if __name__ == "__main__":
    main()
