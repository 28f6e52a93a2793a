"""Pyro's semi-supervised variational autoencoder, as it is and with its guide and loss exchanged.

    python examples/pyro_ports/ss_vae.py
    python examples/pyro_ports/ss_vae.py --guide sinkhorn --smoke-test

The model is that of Pyro's ``examples/vae/ss_vae_M2.py`` (Kingma et al. 2014, *Semi-supervised learning with deep
generative models*): 50 normal latents for style, a one-hot digit, one hidden layer of 500 softplus units, Bernoulli pixels;
the digit is enumerated where it is not known; the auxiliary loss of the classifier with the original's weight 46.
Data: scikit-learn's digits, 8 by 8, made binary, of which 256 are labelled; every fourth step is on these.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _harness import Budget, batches, binary, digits, fit, generate, main, report, start, told_apart
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.optim import Adam
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_sinkhorn import Implicit, TraceEnum_Sinkhorn

BUDGET = Budget(steps=600, batch=256)
LABELLED, AUXILIARY = 256, 46.0


class Perceptron(nn.Module):
    """One hidden layer of softplus units over several inputs, which are broadcast against each other."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.Softplus(), nn.Linear(hidden, outputs))
        nn.init.normal_(self.layers[0].weight, std=1e-3)
        nn.init.normal_(self.layers[0].bias, std=1e-3)

    def forward(self, *inputs: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(*(each.shape[:-1] for each in inputs))
        return self.layers(torch.cat([each.expand(*batch, -1) for each in inputs], -1))


class SSVAE(nn.Module):
    """The generative program: sites "z" and "y" in plate "data", then "x"; and the classifier of its auxiliary loss."""

    def __init__(self, num_pixels: int = 64, classes: int = 10, z_dim: int = 50, hidden: int = 500) -> None:
        super().__init__()
        self.num_pixels, self.classes, self.z_dim, self.hidden = num_pixels, classes, z_dim, hidden
        self.encoder_y = Perceptron(num_pixels, hidden, classes)
        self.decoder = Perceptron(z_dim + classes, hidden, num_pixels)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            standard = dist.Normal(x.new_zeros(()), x.new_ones(()))
            z = pyro.sample("z", standard.expand([len(x), self.z_dim]).to_event(1))
            uniform = x.new_full((len(x), self.classes), 1 / self.classes)
            y = pyro.sample("y", dist.OneHotCategorical(uniform), obs=y)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z, y)).to_event(1), obs=x)

    def classify(self, x: Tensor, y: Tensor) -> None:
        pyro.module("encoder_y", self.encoder_y)
        with pyro.plate("data", len(x)), poutine.scale(scale=AUXILIARY):
            pyro.sample("y_aux", dist.OneHotCategorical(logits=self.encoder_y(x)), obs=y)


def set_up_pyro(vae: SSVAE) -> SVI:
    encoder_z = Perceptron(vae.num_pixels + vae.classes, vae.hidden, 2 * vae.z_dim)

    @config_enumerate(default="parallel", expand=True)
    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("encoder_y", vae.encoder_y)
        pyro.module("encoder_z", encoder_z)
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=vae.encoder_y(x)))
            loc, log_scale = encoder_z(x, y).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    loss = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    return SVI(vae.model, guide, Adam({"lr": 1e-3}), loss=loss)


def set_up_sinkhorn(vae: SSVAE) -> SVI:
    encoder_z = Perceptron(vae.num_pixels + vae.classes + vae.z_dim, vae.hidden, vae.z_dim)

    @config_enumerate(default="parallel", expand=True)
    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("encoder_y", vae.encoder_y)
        pyro.module("encoder_z", encoder_z)
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=vae.encoder_y(x)))
            noise = x.new_empty(*y.shape[:-1], vae.z_dim).normal_()
            pyro.sample("z", Implicit(encoder_z(x, y, noise), event_dim=1))

    loss = TraceEnum_Sinkhorn(prior_weight=100.0, max_plate_nesting=1)
    return SVI(vae.model, guide, Adam({"lr": 1e-3}), loss=loss)


SET_UPS = {"pyro": set_up_pyro, "sinkhorn": set_up_sinkhorn}


def run(way: str, budget: Budget = BUDGET, seed: int = 0, part: str = "test") -> dict[str, Any]:
    """Fit one way and measure on held-out images, whose digits are not shown."""
    train, classes, held_out, held_out_classes = digits(part)
    train, held_out = binary(train), binary(held_out)
    start(seed)
    vae = SSVAE()
    svi = SET_UPS[way](vae)
    classifier = SVI(vae.classify, lambda x, y: None, Adam({"lr": 1e-3}), loss=Trace_ELBO())
    labels = one_hot(classes[:LABELLED], vae.classes).to(train)
    unlabelled = batches(budget.batch, train[LABELLED:])

    def draw(step: int) -> tuple[Tensor, ...]:
        if step % 4 != 1:
            return unlabelled(step)
        classifier.step(train[:LABELLED], labels)
        return train[:LABELLED], labels

    seconds = fit(svi, draw, budget.steps)
    torch.manual_seed(seed)
    generated = generate(svi, held_out)["x"]
    found = vae.encoder_y(held_out).argmax(-1)
    return report(svi, budget, held_out) | {
        "accuracy": float((found == held_out_classes).float().mean()),
        "c2st": told_apart(generated, held_out, train, budget.rows),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main(run, SET_UPS, BUDGET, __doc__)
