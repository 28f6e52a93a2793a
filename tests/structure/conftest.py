"""How structured programs are tested: their own prior as a guide, repeated matches, a few steps of SVI."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import Adam, PyroLRScheduler

from pyro_sinkhorn import AutoImplicit, Trace_Sinkhorn

#: Standard errors. With 60 values the chance of more under the truth is 9e-7.
TOO_FAR = 5.5


@pytest.fixture
def too_far():
    return TOO_FAR


@pytest.fixture
def prior_as_guide():
    """A guide that draws from the model's prior by running it with its data hidden: the right law, by another route."""

    def make(model):
        def guide(*args, **kwargs):
            poutine.block(model, hide_fn=lambda msg: msg["type"] == "sample" and msg["is_observed"])(
                *args, **kwargs
            )

        return guide

    return make


@pytest.fixture
def z_scores():
    """Standard errors between zero and the mean match of every group, over ``n`` calls of ``particles`` each."""

    def measure(model, guide, *args, n=60, particles=10, **options):
        loss = Trace_Sinkhorn(
            prior_weight=1.0,
            num_particles=particles,
            vectorize_particles=particles > 1,
            **{"match_size": 4} | options,
        )
        values: dict[str, list[float]] = {}
        for _ in range(n):
            loss.loss(model, guide, *args)
            for name, value in loss.terms.match.items():
                values.setdefault(name, []).append(value)
        return {name: z_score(torch.tensor(column)) for name, column in values.items()}

    return measure


def z_score(values: torch.Tensor) -> float:
    assert values.std() > 0
    return float(values.mean() / (values.std() / math.sqrt(len(values))))


@pytest.fixture
def fit():
    """SVI with a falling learning rate; returns the guide."""

    def run(model, *args, guide=None, steps=2, lr=1e-2, **options):
        guide = AutoImplicit(model) if guide is None else guide
        optim = PyroLRScheduler(
            torch.optim.lr_scheduler.CosineAnnealingLR,
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "T_max": steps},
        )
        svi = SVI(model, guide, optim, loss=Trace_Sinkhorn(**{"match_size": 4} | options))
        for _ in range(steps):
            assert math.isfinite(svi.step(*args))
            optim.step()
        return guide

    return run


@pytest.fixture
def step():
    """One step of SVI and its terms."""

    def run(model, guide, *args, **options):
        loss = Trace_Sinkhorn(**{"match_size": 4} | options)
        value = SVI(model, guide, Adam({"lr": 1e-3}), loss=loss).step(*args)
        assert math.isfinite(value)
        return loss.terms

    return run


@pytest.fixture
def seeded():
    """Call a function from a fixed seed."""

    def run(function, *args, seed=11):
        pyro.set_rng_seed(seed)
        return function(*args)

    return run
