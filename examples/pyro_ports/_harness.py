"""What the ports share: a training loop, the measures, a command line. Nothing here knows which guide or loss it serves."""

from __future__ import annotations

import argparse
import inspect
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pyro_sinkhorn import Trace_Sinkhorn
from pyro_sinkhorn.diagnostics import c2st, match_report
from pyro_sinkhorn.ot import ConvergenceWarning

Args = tuple[Any, ...]


@dataclass(frozen=True)
class Budget:
    """How much is done, the same every way.

    steps: optimiser steps
    batch: data a step
    rows:  of each sample that the classifier is to tell apart
    floor: evaluations of match and floor
    """

    steps: int
    batch: int
    rows: int = 300
    floor: int = 20

    def smoke(self) -> Budget:
        """As little as shows that everything runs."""
        return replace(self, steps=3, rows=40, floor=2)


def digits(part: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``(n, 64)`` of grey levels 0 to 16 with classes, to train and to test, of scikit-learn's digits.

    :param part: ``"test"``: 1297 to train and 500 to test. ``"validation"``: the former, cut again into 897 and 400; where
        weights are chosen
    """
    bunch = load_digits()
    order = torch.randperm(len(bunch.data), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(bunch.data, dtype=torch.get_default_dtype())[order]
    y = torch.tensor(bunch.target)[order]
    if part == "validation":
        return x[:897], y[:897], x[897:1297], y[897:1297]
    return x[:1297], y[:1297], x[1297:], y[1297:]


def binary(grey: Tensor) -> Tensor:
    """One Bernoulli draw of each pixel, always the same, so that generated and real images are of one kind."""
    generator = torch.Generator().manual_seed(1)
    return torch.bernoulli(grey / 16, generator=generator)


def start(seed: int) -> None:
    """A fresh parameter store and a fixed seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)


def fit(svi: SVI, draw: Callable[[int], Args], steps: int) -> float:
    """Make steps on what ``draw(step)`` returns; seconds taken."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for step in range(steps):
            svi.step(*draw(step))
    return time.perf_counter() - began


def batches(size: int, *tensors: Tensor) -> Callable[[int], Args]:
    """Minibatches without replacement within an epoch; the same rows at the same step both ways."""

    def draw(step: int) -> Args:
        n = len(tensors[0])
        epoch, position = divmod(step, max(n // size, 1))
        order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch))
        rows = order[position * size : (position + 1) * size]
        return tuple(tensor[rows] for tensor in tensors)

    return draw


def report(svi: SVI, budget: Budget, *args: Any, **options: Any) -> dict[str, float]:
    """Log-likelihood under the guide, per datum, and the match of the guide's latents to the prior beside its floor.

    The match of *any* guide whose draws have gradients, so of Pyro's as well as ours: only samples are compared.

    :param options: of the ``Trace_Sinkhorn`` that compares
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = match_report(
            svi.model, svi.guide, *args, loss=Trace_Sinkhorn(**options), num_floor=budget.floor, num_draws=8
        )
    worst = max(found.groups, key=lambda group: group.z)
    assert found.reconstruction is not None
    return {
        "log_likelihood": -found.reconstruction,
        "match": worst.match,
        "floor": worst.floor,
        "floor_sd": worst.floor_sd,
        "z": worst.z,
        "encoder_variance": float(worst.encoder_variance or 0.0),
    }


def evidence_bound(
    set_up: Callable[[Any], SVI], program: nn.Module, draw: Callable[[int], Args], steps: int, *held_out: Any
) -> float:
    """A lower bound of the log evidence of held-out data, per datum, that treats the models of both ways alike.

    Pyro's own guide and ELBO are trained again, from the start, below the finished model, which is held still.

    :param set_up: Pyro's own
    :param program: owner of the model, and of all that the model learned
    """
    for parameter in program.parameters():
        parameter.requires_grad_(False)
    program.eval()
    pyro.clear_param_store()  # or pyro.module would give the new guide what the old one learned
    svi = set_up(program)
    fit(svi, draw, steps)
    program.eval()  # the new guide's networks too, where they belong to the program
    return -sum(svi.evaluate_loss(*held_out) for _ in range(10)) / 10 / len(held_out[0])


@torch.no_grad()
def generate(svi: SVI, *args: Any, keep: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """All sites of the model run freely: latents from their prior, data from their likelihood.

    :param keep: sites taken from the guide instead, such as global weights
    """
    model: Callable[..., Any] = poutine.uncondition(svi.model)
    if keep:
        guide = poutine.trace(svi.guide).get_trace(*args)
        model = poutine.condition(model, {name: guide.nodes[name]["value"] for name in keep})
    trace = poutine.trace(model).get_trace(*args)
    return {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}


def told_apart(generated: Tensor, real: Tensor, train: Tensor, rows: int, components: int = 16) -> float:
    """Accuracy of a classifier between generated and held-out data: .5 where it cannot tell them apart.

    :param train: its first principal components are what the classifier reads
    :param rows: of each sample
    """
    mean = train.mean(0)
    basis = torch.linalg.svd(train - mean, full_matrices=False).Vh[:components].T
    return c2st((real[:rows] - mean) @ basis, (generated[:rows] - mean) @ basis).value


def main(run: Callable[..., dict[str, Any]], ways: Iterable[str], budget: Budget, doc: str | None) -> None:
    """The command line of every port: one way or all, printed side by side."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guide", choices=tuple(ways), help="one way alone; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-steps", type=int, default=budget.steps)
    parser.add_argument(
        "--part", choices=("test", "validation"), default="test", help="data that measures are of"
    )
    parser.add_argument("--smoke-test", action="store_true")
    if "data_dir" in inspect.signature(run).parameters:
        parser.add_argument("--data-dir", help="folder of data sets; by default synthetic data")
    options = vars(parser.parse_args())
    torch.set_num_threads(1)
    only, smoke, steps = (options.pop(name) for name in ("guide", "smoke_test", "num_steps"))
    budget = budget.smoke() if smoke else replace(budget, steps=steps)
    rows = {way: run(way, budget, **options) for way in ways if only in (way, None)}
    print(f"{budget.steps} steps of {budget.batch}" + " " * 20 + "".join(f"{way:>18}" for way in rows))
    for name in next(iter(rows.values())):
        print(f"{name:<32}" + "".join(f"{row[name]:>18.4f}" for row in rows.values()))
