"""Pyro's variational autoencoder, as it is and with its guide and loss exchanged.

    python examples/pyro_ports/vae.py
    python examples/pyro_ports/vae.py --guide sinkhorn --smoke-test

The model is that of Pyro's ``examples/vae/vae.py``: 50 normal latents, one hidden layer of 400 softplus units, Bernoulli
pixels, batches of 256, Adam at 1e-3. Data: scikit-learn's digits, 8 by 8, made binary.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _harness import (
    Budget,
    batches,
    binary,
    digits,
    evidence_bound,
    fit,
    generate,
    main,
    report,
    start,
    told_apart,
)
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_sinkhorn import AutoImplicit, Trace_Sinkhorn

BUDGET = Budget(steps=600, batch=256)


class VAE(nn.Module):
    """The generative program: site "latent" in plate "data", then "obs"."""

    def __init__(self, num_pixels: int = 64, z_dim: int = 50, hidden: int = 400) -> None:
        super().__init__()
        self.num_pixels, self.z_dim, self.hidden = num_pixels, z_dim, hidden
        self.decoder = nn.Sequential(nn.Linear(z_dim, hidden), nn.Softplus(), nn.Linear(hidden, num_pixels))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            standard = dist.Normal(x.new_zeros(()), x.new_ones(()))
            z = pyro.sample("latent", standard.expand([len(x), self.z_dim]).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


class Encoder(nn.Module):
    """Location and scale of every latent of an image, for the guide with a density."""

    def __init__(self, num_pixels: int, hidden: int, z_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(num_pixels, hidden), nn.Softplus())
        self.loc, self.log_scale = nn.Linear(hidden, z_dim), nn.Linear(hidden, z_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(x)
        return self.loc(hidden), self.log_scale(hidden).exp()


def set_up_pyro(vae: VAE) -> SVI:
    encoder = Encoder(vae.num_pixels, vae.hidden, vae.z_dim)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, scale = encoder(x)
            pyro.sample("latent", dist.Normal(loc, scale).to_event(1))

    loss = Trace_ELBO()
    return SVI(vae.model, guide, Adam({"lr": 1e-3}), loss=loss)


def set_up_sinkhorn(vae: VAE) -> SVI:
    guide = AutoImplicit(vae.model)
    loss = Trace_Sinkhorn(prior_weight=100.0)
    return SVI(vae.model, guide, Adam({"lr": 1e-3}), loss=loss)


SET_UPS = {"pyro": set_up_pyro, "sinkhorn": set_up_sinkhorn}


def run(way: str, budget: Budget = BUDGET, seed: int = 0, part: str = "test") -> dict[str, Any]:
    """Fit one way and measure on held-out images."""
    train, _, held_out, _ = digits(part)
    train, held_out = binary(train), binary(held_out)
    start(seed)
    vae = VAE()
    svi = SET_UPS[way](vae)
    seconds = fit(svi, batches(budget.batch, train), budget.steps)
    torch.manual_seed(seed)
    generated = generate(svi, held_out)["obs"]
    return report(svi, budget, held_out) | {
        "c2st": told_apart(generated, held_out, train, budget.rows),
        "evidence_bound": evidence_bound(
            set_up_pyro, vae, batches(budget.batch, train), budget.steps, held_out
        ),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main(run, SET_UPS, BUDGET, __doc__)
