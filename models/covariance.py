r"""Covariance matrices as latents: every group of observations has its own scales and its own correlations."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
from torch import Tensor

Model = Callable[[Tensor], None]


def lkj_covariance(dim: int = 3, concentration: float = 1.0, spread: float = 0.5) -> Model:
    r"""Groups of vectors, each group with its covariance, split into scales and correlations:

    .. math::

        s_i \sim \mathrm{LogNormal}(0, \tau^2 I), \quad L_i \sim \mathrm{LKJ}(\eta), \quad
        x_{ij} \sim N(0, \Sigma_i), \quad \Sigma_i = D_i L_i L_i^\top D_i, \; D_i = \mathrm{diag}(s_i).

    At :math:`\eta=1` all correlation matrices are equally likely. Both latents are matched jointly, each in its own
    geometry: logarithms of scales, rows of Cholesky factors.

    :param dim: number of responses
    :param concentration: :math:`\eta`
    :param spread: :math:`\tau`
    :returns: a model of groups ``x``, ``(n, num_obs, dim)``, with latents ``scales``, ``(n, dim)``, and ``tril`` :math:`L`,
        ``(n, dim, dim)``, in the plate ``groups``. All that an encoder needs of a group is its second moments:
        ``AutoImplicit(model, encoder_input=lambda x: (x.mT @ x).flatten(1))``

    Lewandowski, Kurowicka and Joe 2009, *Generating random correlation matrices*; Barnard, McCulloch and Meng 2000,
    *Modeling covariance matrices in terms of standard deviations and correlations*.

    >>> import torch
    >>> lkj_covariance()(torch.randn(4, 20, 3))
    """

    def model(x: Tensor) -> None:
        with pyro.plate("groups", len(x)):
            scales = pyro.sample("scales", dist.LogNormal(x.new_zeros(dim), spread).to_event(1))
            tril = pyro.sample("tril", dist.LKJCholesky(dim, x.new_tensor(concentration)))
            factor = (scales.unsqueeze(-1) * tril).unsqueeze(-3)
            law = dist.MultivariateNormal(x.new_zeros(dim), scale_tril=factor)
            pyro.sample("x", law.expand((*factor.shape[:-3], x.shape[-2])).to_event(1), obs=x)

    return model
