"""What naive matching destroys: the inference of globals, and the dependence between latents.

Both programs have an exact answer. The tests train to it, so they take a while.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import PyroLRScheduler

from pyro_sinkhorn import AutoImplicit, Trace_Sinkhorn

# At first, guide and prior are far apart.
pytestmark = pytest.mark.filterwarnings("ignore::pyro_sinkhorn.ot.ConvergenceWarning")


def fit(model, guide, batches, num_steps, lr, **options):
    optim = PyroLRScheduler(
        torch.optim.lr_scheduler.CosineAnnealingLR,
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "T_max": num_steps},
    )
    svi = SVI(model, guide, optim, loss=Trace_Sinkhorn(**options))
    for _ in range(num_steps):
        svi.step(batches())
        optim.step()
    return svi


# mu ~ N(0, 5), z_i ~ N(mu, .5), x_i ~ N(z_i, .5), with 200 data

N = 200
EXACT = 2.890


def hierarchy(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 0.5))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def hierarchical_data():
    """Shifted so that the posterior mean of mu is exactly EXACT: x_i | mu ~ N(mu, .5 + .25 + .25)."""
    x = 3 + math.sqrt(0.5) * torch.randn(N)
    precision = N / 0.5 + 1 / 25
    return x - x.mean() + EXACT * precision / (N / 0.5)


@pytest.mark.parametrize("prior_weight", [100.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_global_above_the_latents_is_inferred(prior_weight):
    x = hierarchical_data()
    guide = AutoImplicit(hierarchy, hidden=32)
    fit(hierarchy, guide, lambda: x, 800, 6e-2, prior_weight=prior_weight)
    mu = guide.global_guides[0]
    assert mu.loc.item() == pytest.approx(EXACT, abs=0.02)  # six seeds: .005 at most
    assert 0 < mu.scale.item() < 0.1
    with torch.no_grad():
        z = torch.stack([guide(x)["z"] for _ in range(20)])
    assert float(z.mean()) == pytest.approx(EXACT, abs=0.05)


def test_a_global_as_a_point():
    x = hierarchical_data()
    guide = AutoImplicit(hierarchy, global_guide="delta", hidden=32)
    fit(hierarchy, guide, lambda: x, 500, 6e-2, prior_weight=100.0)
    assert guide.global_guides[0].loc.item() == pytest.approx(EXACT, abs=0.05)  # six seeds: .007 at most


# z2 ~ N(z1, .2)


def chain(x):
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.sample("z2", dist.Normal(z1, 0.2))
        # Tells nothing of them: what a likelihood wants of z2 - z1 is traded against the match, at any weight.
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def moments(guide, x):
    with torch.no_grad():
        values = guide(x)
    z1, z2 = values["z1"], values["z2"]
    return float((z2 - z1).std()), float(torch.corrcoef(torch.stack([z1, z2]))[0, 1])


def test_dependent_latents_stay_dependent():
    guide = AutoImplicit(chain)
    fit(chain, guide, lambda: torch.randn(256), 600, 1e-2, prior_weight=100.0)
    spread, correlation = moments(guide, torch.randn(20_000))
    assert spread == pytest.approx(0.2, rel=0.05)  # two seeds: .198, .196
    assert correlation == pytest.approx(1 / math.sqrt(1.04), abs=0.01)


def test_matching_site_by_site_loses_the_dependence():
    guide = AutoImplicit(chain)
    fit(chain, guide, lambda: torch.randn(128), 150, 1e-2, prior_weight=100.0, groups="marginal")
    spread, _ = moments(guide, torch.randn(20_000))
    assert spread > 0.3
