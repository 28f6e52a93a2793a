"""Pyro's sparse gamma deep exponential family, as it is and with its guide and loss exchanged.

    python examples/pyro_ports/sparse_gamma_def.py
    python examples/pyro_ports/sparse_gamma_def.py --guide sinkhorn --smoke-test

The model is that of Pyro's ``examples/sparse_gamma_def.py`` (Ranganath et al. 2015, *Deep exponential families*): three
layers of gamma latents, 100, 40 and 15 wide, joined by gamma weights, below Poisson pixels; all of the data in every step.
Data: scikit-learn's digits, 64 counts from 0 to 16 each, instead of 4096 pixels of faces, which need a download.

The guide stays too, and with it the optimiser: gammas have gradients, so the loss can match their draws. It holds two numbers
for every latent of every image and knows no other images: for these the numbers are fitted anew, by the loss of either
way, with the guide of the weights held still (:func:`fold_in`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _harness import Budget, digits, fit, generate, main, report, start, told_apart
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import AdagradRMSProp
from torch import Tensor
from torch.nn.functional import softplus

from pyro_sinkhorn import Trace_Sinkhorn

BUDGET = Budget(steps=150, batch=1297)
OPTIM = {"eta": 4.5, "t": 0.1}  # of the original's "custom" guide


class SparseGammaDEF:
    """The generative program: global weights "w_*", then local "z_*" in plate "data", then "obs"."""

    def __init__(self, top: int = 100, mid: int = 40, bottom: int = 15, num_pixels: int = 64) -> None:
        self.widths = {"top": top, "mid": mid, "bottom": bottom}
        self.latents = [f"z_{layer}" for layer in self.widths]
        self.shapes = {"top": (top, mid), "mid": (mid, bottom), "bottom": (bottom, num_pixels)}
        self.alpha, self.beta_z, self.beta_w = torch.tensor(0.1), torch.tensor(0.1), torch.tensor(0.3)

    def model(self, x: Tensor) -> None:
        w = {}
        for layer, (rows, columns) in self.shapes.items():
            with pyro.plate(f"w_{layer}_plate", rows * columns):
                flat = pyro.sample(f"w_{layer}", dist.Gamma(self.alpha, self.beta_w))
            w[layer] = flat.reshape(*flat.shape[:-1], rows, columns)
        with pyro.plate("data", len(x)):
            top = dist.Gamma(self.alpha, self.beta_z).expand([self.widths["top"]])
            mean = pyro.sample("z_top", top.to_event(1)) @ w["top"]
            mean = pyro.sample("z_mid", dist.Gamma(self.alpha, self.beta_z / mean).to_event(1)) @ w["mid"]
            mean = (
                pyro.sample("z_bottom", dist.Gamma(self.alpha, self.beta_z / mean).to_event(1)) @ w["bottom"]
            )
            pyro.sample("obs", dist.Poisson(mean).to_event(1), obs=x)


def mean_field(family: SparseGammaDEF) -> Callable[[Tensor], None]:
    """Pyro's "custom" guide: a gamma of its own, by shape and mean, for every weight and every latent of every image."""

    def gamma(site: str, shape: tuple[int, ...], owner: str) -> dist.Gamma:
        alpha = pyro.param(f"alpha_{site}_{owner}", lambda: 0.5 + 0.1 * torch.randn(shape))
        mean = pyro.param(f"mean_{site}_{owner}", lambda: 0.1 * torch.randn(shape))
        alpha.data.clamp_(min=-2.5)
        mean.data.clamp_(min=-4.5)
        return dist.Gamma(softplus(alpha), softplus(alpha) / softplus(mean))

    def guide(x: Tensor) -> None:
        for layer, (rows, columns) in family.shapes.items():
            with pyro.plate(f"w_{layer}_plate", rows * columns):
                pyro.sample(f"w_{layer}", gamma(f"w_{layer}", (rows * columns,), "weights"))
        with pyro.plate("data", len(x)):
            for layer, width in family.widths.items():
                local = gamma(f"z_{layer}", (len(x), width), f"{len(x)}_images")
                pyro.sample(f"z_{layer}", local.to_event(1))

    return guide


def tenth_roots(x: Tensor, y: Tensor) -> Tensor:
    """Squared distance of tenth roots, ``(n, m)``: a gamma of shape .1 is nearly uniform in them.

    Its logarithm, which is what positive latents are compared by otherwise, spreads over decades that are all zero to the
    pixels, and is blind to the mean beside them.
    """
    x, y = x**0.1, y**0.1
    return x.square().sum(-1, keepdim=True) + y.square().sum(-1) - 2 * x @ y.T


def set_up_pyro(family: SparseGammaDEF) -> SVI:
    guide = mean_field(family)
    loss = TraceMeanField_ELBO()
    return SVI(family.model, guide, AdagradRMSProp(OPTIM), loss=loss)


def set_up_sinkhorn(family: SparseGammaDEF) -> SVI:
    guide = mean_field(family)
    loss = Trace_Sinkhorn(prior_weight=1000.0, cost=dict.fromkeys(family.latents, tenth_roots))
    return SVI(family.model, guide, AdagradRMSProp(OPTIM), loss=loss)


SET_UPS = {"pyro": set_up_pyro, "sinkhorn": set_up_sinkhorn}


def fold_in(set_up: Callable[[SparseGammaDEF], SVI], family: SparseGammaDEF, x: Tensor, steps: int) -> SVI:
    """Give the images of ``x`` numbers of their own in the guide, those of the weights being held still."""

    def rate(name: str) -> dict[str, float]:
        return OPTIM | ({"eta": 0.0} if name.endswith("_weights") else {})

    svi = set_up(family)
    svi.optim = AdagradRMSProp(rate)
    fit(svi, lambda step: (x,), steps)
    return svi


def run(way: str, budget: Budget = BUDGET, seed: int = 0, part: str = "test") -> dict[str, Any]:
    """Fit one way and measure on held-out images."""
    train, _, held_out, _ = digits(part)
    start(seed)
    family = SparseGammaDEF()
    seconds = fit(SET_UPS[way](family), lambda step: (train,), budget.steps)
    torch.manual_seed(seed)
    svi = fold_in(SET_UPS[way], family, held_out, budget.steps)
    generated = generate(svi, held_out, keep=("w_top", "w_mid", "w_bottom"))["obs"]
    return report(svi, budget, held_out, cost=dict.fromkeys(family.latents, tenth_roots)) | {
        "c2st": told_apart(generated, held_out, train, budget.rows),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main(run, SET_UPS, BUDGET, __doc__)
