r"""The program of *what* and *where*, the networks that mirror it, and its guides: one without density, one of AIR's kind.

.. math::

    w \sim N(0, I_3), \quad z \sim \mathrm{Uniform}(S^9), \quad x \sim N\bigl(T_w f_\theta(z), 0.3^2 I\bigr):

a patch, put on a black canvas by a spatial transformer. The salt noise of the data is not in it.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _canvas_data import CENTRE_SPREAD, GLYPH, SIDE, cut, place
from pyro import poutine
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, normalize, softplus

from pyro_sinkhorn import Implicit
from pyro_sinkhorn.distributions import HypersphericalUniform

DIM = 10
SIGMA = 0.3


class Program(nn.Module):
    """The generative program.

    :param kl_weight: scales the latents' densities, which only an ELBO reads
    """

    def __init__(self, kl_weight: float = 1.0, hidden: int = 256) -> None:
        super().__init__()
        self.kl_weight = kl_weight
        last = nn.Linear(hidden, GLYPH**2)
        nn.init.constant_(last.bias, -2.0)  # a dark patch at first: most pixels of a digit are
        self.decoder = nn.Sequential(
            nn.Linear(DIM, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last
        )

    def paint(self, what: Tensor) -> Tensor:
        """Patches ``(n, 28, 28)`` of codes."""
        return self.decoder(what).sigmoid().unflatten(-1, (GLYPH, GLYPH))

    def forward(self, x: Tensor) -> None:
        """Canvases ``(n, 64, 64)``."""
        pyro.module("program", self)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=self.kl_weight):
                where = pyro.sample("z_where", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                what = pyro.sample("z_what", HypersphericalUniform(DIM, dtype=x.dtype))
            mean = place(self.paint(what), where)
            pyro.sample("x", dist.Normal(mean, SIGMA).to_event(2), obs=x)


class Encoder(nn.Module):
    """Looks three times, ever closer: ``where`` of canvases, then ``what`` at that place.

    1. A blurred canvas, in cells of 4 pixels, says roughly where most ink is: its mean position under a softmax. The
       blur is learned, and starts as an average.
    2. A wide window there says by how much the place is off, and how large the digit is.
    3. A window at the place found is read for what it shows.
    """

    def __init__(self, hidden: int = 192) -> None:
        super().__init__()
        self.blur = nn.Conv2d(1, 1, 5, padding=2)
        nn.init.constant_(self.blur.weight, 1 / 25)
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(60.0)))
        self.adjust = _reader(3, hidden)
        with torch.no_grad():  # the first guess stands until something better is known
            self.adjust[-1].weight.mul_(0.1)
            self.adjust[-1].bias.zero_()
        self.read = _reader(DIM, hidden)
        # For a guide with a density alone.
        self.log_spread = nn.Linear(hidden, 3)
        self.concentration = nn.Linear(hidden, 1)

    def where(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Places ``(n, 3)`` and logarithms of their standard deviations."""
        cells = avg_pool2d(x.unsqueeze(1), 4)
        heat = (self.log_sharpness.exp() * self.blur(cells)).flatten(1).softmax(-1)
        size = cells.shape[-1]
        at = (torch.arange(size, dtype=x.dtype) + 0.5) * SIDE / size
        heat = heat.unflatten(-1, (size, size))
        centre = torch.stack([heat.sum(-2) @ at, heat.sum(-1) @ at], -1)
        rough = torch.cat([x.new_zeros(len(x), 1), (centre - SIDE / 2) / CENTRE_SPREAD], -1)
        hidden = self.adjust[:-1](cut(x, rough, GLYPH, margin=1.6))
        return rough + self.adjust[-1](hidden), self.log_spread(hidden) - 2

    def what(self, x: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Directions ``(n, 10)`` at given places, and concentrations."""
        hidden = self.read[:-1](cut(x, where, GLYPH, margin=1.0))
        concentration = 100 * softplus(self.concentration(hidden).squeeze(-1) + 0.5)
        return normalize(self.read[-1](hidden), dim=-1), concentration


def _reader(num_out: int, hidden: int) -> nn.Sequential:
    """A window of 28 by 28 pixels to ``num_out`` numbers."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(GLYPH**2, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, num_out),
    )


class Deterministic(nn.Module):
    """The guide without density: codes are functions of the canvas, as in the paper."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def forward(self, x: Tensor) -> None:
        """Sample the latents given canvases."""
        pyro.module("encoder", self.encoder)
        where, _ = self.encoder.where(x)
        what, _ = self.encoder.what(x, where)
        with pyro.plate("data", len(x)):
            pyro.sample("z_where", Implicit(where, event_dim=1))
            pyro.sample("z_what", Implicit(what, event_dim=1, support=constraints.sphere))


class AIR(nn.Module):
    """The guide of Attend, Infer, Repeat (Eslami et al. 2016) for one object: a normal, then a law on the sphere.

    :param kl_weight: that of the program
    """

    def __init__(self, kl_weight: float = 1.0) -> None:
        super().__init__()
        self.kl_weight = kl_weight
        self.encoder = Encoder()

    def forward(self, x: Tensor) -> None:
        """Sample the latents given canvases."""
        pyro.module("encoder", self.encoder)
        loc, log_spread = self.encoder.where(x)
        with pyro.plate("data", len(x)), poutine.scale(scale=self.kl_weight):
            where = pyro.sample("z_where", dist.Normal(loc, log_spread.exp()).to_event(1))
            pyro.sample("z_what", PowerSpherical(*self.encoder.what(x, where)))


def inferred(guide: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """``where`` and ``what`` of canvases, at the centres of the guide's laws."""
    where, _ = guide.encoder.where(x)
    return where, guide.encoder.what(x, where)[0]


class PowerSpherical(TorchDistribution):
    r"""Power spherical law on :math:`S^{d-1}`, the reparametrised relative of the von Mises-Fisher law.

    .. math:: p(x) = \frac{(1+\langle\mu,x\rangle)^\kappa}{2^{a+b}\,\pi^b\,\Gamma(a)/\Gamma(a+b)},
        \qquad b = \tfrac{d-1}2, \quad a = b + \kappa.

    De Cao and Aziz 2020, *The power spherical distribution*. Concentration 0, which a heavy KL term leads to, is uniform.
    """

    arg_constraints = {"loc": constraints.sphere, "concentration": constraints.nonnegative}
    support = constraints.sphere
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.concentration = loc, concentration
        super().__init__(concentration.shape, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PowerSpherical:
        batch_shape = torch.Size(batch_shape)
        loc = self.loc.expand(batch_shape + self.event_shape)
        return PowerSpherical(loc, self.concentration.expand(batch_shape), validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        b = (shape[-1] - 1) / 2
        share = dist.Beta(b + self.concentration, torch.full_like(self.concentration, b)).rsample(
            sample_shape
        )
        cosine = (2 * share - 1).clamp(-1 + 1e-6, 1 - 1e-6).unsqueeze(-1)
        tangent = torch.randn(shape, dtype=self.loc.dtype)
        tangent = tangent - (tangent * self.loc).sum(-1, keepdim=True) * self.loc
        drawn = cosine * self.loc + (1 - cosine.square()).sqrt() * normalize(tangent, dim=-1)
        return normalize(drawn, dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        b = (self.event_shape[0] - 1) / 2
        a = b + self.concentration
        constant = (a + b) * math.log(2) + b * math.log(math.pi) + a.lgamma() - (a + b).lgamma()
        return self.concentration * (self.loc * value).sum(-1).log1p() - constant
