"""The finding the project stands on: debiasing on one minibatch shrinks latents, independent halves do not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import PyroLRScheduler

from pyro_sinkhorn import Implicit, Trace_Sinkhorn

D, BATCH = 8, 128


def model(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([D]).to_event(1), obs=x)  # tells nothing of z


def affine(x):
    matrix, shift = pyro.param("matrix", torch.eye(D)), pyro.param("shift", torch.zeros(D))
    with pyro.plate("data", len(x)):
        pyro.sample("z", Implicit(x @ matrix.T + shift, event_dim=1))


def mean_singular_value(num_steps, **options):
    """Of an affine map of N(0, I) fitted to N(0, I), averaged over the second half of the steps."""
    optim = PyroLRScheduler(
        torch.optim.lr_scheduler.CosineAnnealingLR,
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 2e-2}, "T_max": num_steps},
    )
    svi = SVI(model, affine, optim, loss=Trace_Sinkhorn(**options))
    values = []
    for i in range(num_steps):
        svi.step(torch.randn(BATCH, D))
        optim.step()
        if i >= num_steps // 2:
            values.append(torch.linalg.svdvals(pyro.param("matrix").detach()).mean())
    return float(torch.stack(values).mean())


@pytest.mark.parametrize(("debias", "num_steps"), [("independent", 600), ("self", 250)])
def test_latents_keep_their_scale_with_independent_halves_alone(debias, num_steps):
    value = mean_singular_value(num_steps, debias=debias)
    if debias == "independent":
        assert value == pytest.approx(1, abs=0.02)
    else:
        assert value < 0.98
