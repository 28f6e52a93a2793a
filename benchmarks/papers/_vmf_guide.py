r"""The encoder of the hyperspherical VAE (Davidson et al. 2018), with the right gradient in the concentration.

:class:`pyro_sinkhorn.distributions.VonMisesFisher` draws exactly but is not reparametrised, and the published code
differentiates through an accepted proposal, which is biased for :math:`d\ne3`. Here the gradient is *implicit* (Figurnov,
Mohamed and Mnih 2018): a draw is :math:`x = w\mu + \sqrt{1-w^2}\,v`, where v is a uniform unit tangent at :math:`\mu` and w
has density :math:`p_\kappa(w)\propto(1-w^2)^{(d-3)/2}e^{\kappa w}`, whose distribution function F gives

.. math:: \frac{\partial w}{\partial\kappa} = -\frac{\partial F/\partial\kappa}{p_\kappa(w)}
          = \int_w^1 (t - A)\,\frac{p_\kappa(t)}{p_\kappa(w)}\,dt, \qquad A = \mathbb E\,w,

one smooth integral a draw, by Gauss-Legendre. In :math:`\mu` the draw is carried along by the rotation that moves
:math:`\mu`: :math:`dv = -\langle v, d\mu\rangle\mu`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_sinkhorn.distributions import VonMisesFisher
from pyro_sinkhorn.guide.encoder import perceptron

NODES = 48


class ReparametrisedVMF(VonMisesFisher):
    """The same law with ``rsample``; d of at least 4, where the integrand is smooth enough for the quadrature.

    >>> _ = torch.manual_seed(0)
    >>> kappa = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    >>> loc = torch.eye(10, dtype=torch.float64)[0]
    >>> x = ReparametrisedVMF(loc, kappa).rsample((20_000,))
    >>> (mine,) = torch.autograd.grad((x @ loc).mean(), kappa)
    >>> exact = torch.autograd.functional.jacobian(lambda k: VonMisesFisher(loc, k).mean[0], kappa.detach())
    >>> bool((mine / exact - 1).abs() < 0.02)
    True
    """

    has_rsample = True

    def expand(self, batch_shape: Any, _instance: Any = None) -> ReparametrisedVMF:
        """The same law for every slice."""
        new = self._get_checked_instance(ReparametrisedVMF, _instance)
        return super().expand(batch_shape, new)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws that carry the gradients of loc and concentration."""
        x = self.sample(sample_shape)
        loc, kappa = self.loc.expand_as(x), self.concentration.expand(x.shape[:-1])
        with torch.no_grad():
            u = ((x - loc).square().sum(-1) / 2).clamp(1e-12, 2 - 1e-6)  # 1 - w
            tangent = x - (1 - u).unsqueeze(-1) * loc
            tangent = tangent / tangent.norm(dim=-1, keepdim=True)
            slope = -_cosine_slope(self.dim, u, kappa)
        u = u + slope * (kappa - kappa.detach())
        moved = loc - loc.detach()
        tangent = tangent - (tangent * moved).sum(-1, keepdim=True) * loc.detach()
        return (1 - u).unsqueeze(-1) * loc + (u * (2 - u)).sqrt().unsqueeze(-1) * tangent


def _cosine_slope(dim: int, u: Tensor, kappa: Tensor) -> Tensor:
    """The integral above in s = 1 - t over [0, u], in float64 since its first factor takes both signs."""
    nodes, weights = (torch.as_tensor(part) for part in np.polynomial.legendre.leggauss(NODES))
    dtype, u, kappa = u.dtype, u.double().unsqueeze(-1), kappa.double().unsqueeze(-1)
    pole = torch.eye(dim, dtype=kappa.dtype)[0]
    shortfall = 1 - VonMisesFisher(pole, kappa, validate_args=False).mean[..., 0]
    s = u * (nodes + 1) / 2
    power = (dim - 3) / 2 * (s * (2 - s) / (u * (2 - u))).log()
    terms = (shortfall - s) * (power + kappa * (u - s)).exp() * weights
    return (terms.sum(-1) * u.squeeze(-1) / 2).to(dtype)


class VonMisesFisherGuide(nn.Module):
    """Mean direction and concentration, at least 1, from images; networks as those of the normal guide."""

    def __init__(self, dim: int, encoder: nn.Module, hidden: int = 128) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.mixed = perceptron(self.encoder.width, hidden, dim + 1)
        self.direct = nn.Linear(self.encoder.width, dim + 1)

    def forward(self, x: Tensor) -> None:
        """Sample z given images."""
        pyro.module("von_mises_fisher_guide", self)
        code = self.encoder(x)
        raw = self.direct(code) + self.mixed(code)
        loc = nn.functional.normalize(raw[..., :-1], dim=-1)
        # Of the order of the dimension at first: a posterior that already says something about its image.
        concentration = 1 + 2 * loc.shape[-1] * nn.functional.softplus(raw[..., -1])
        with pyro.plate("data", len(x)):
            pyro.sample("z", ReparametrisedVMF(loc, concentration))
