r"""Methods of the autoencoding studies: one model, one encoder, and what is asked of the latents.

Every method fits the ready-made Pyro program of its prior (``pyro_sinkhorn.models``), with a decoder d-256-256-784 and
Gaussian likelihood, and reads images through the same encoder 784-256-256 and head 256-128-128-d.

========  ==============================================================================================================
ae        nothing; without noise. On the sphere its codes are normalised
vae       KL to the prior, weight 1: a normal guide, on the sphere von Mises-Fisher
beta-vae  the same with the weight chosen
wae       MMD to fresh prior draws (Tolstikhin et al. 2018)
swae      sliced Wasserstein distance to fresh prior draws (Kolouri et al. 2018)
hae       exact assignment to fresh prior draws (v1's Hungarian autoencoder)
nat       exact assignment to fixed targets (Bojanowski and Joulin 2017)
sae-v1    sharp Sinkhorn cost as published in v1: epsilon .1, 50 iterations, unrolled, one batch, not debiased
sae-v1-fixed  the same to fixed targets
sae-v3    debiased by the batch's own self terms, as in v3; the library's epsilon
ours      ``Trace_Sinkhorn`` as it comes: independent halves
========  ==============================================================================================================

Of v3 only the debiasing is taken: roots and rounding are known from a digest alone, and with epsilon, value and solver of the
last row the difference is the debiasing. The encoders of all but the plain autoencoder have noise, one variable a latent:
where it does not help they learn to ignore it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import _path  # noqa: F401 (the folder above)
from _latent_peers import MMDMatch, NormalGuide
from _matches import EPSILON, FixedTargets, PublishedMatch, SlicedMatch
from _scale_site import ScaleSite
from _vmf_guide import VonMisesFisherGuide
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_sinkhorn import AutoImplicit, SinkhornProgram, Trace_Sinkhorn

ELBO_METHODS = ("vae", "beta-vae")
FIXED = ("nat", "sae-v1-fixed")


class Encoder(nn.Module):
    """Two hidden layers on centred pixels; uncentred, all images begin with nearly the same code.

    :param mean: the mean of the training images
    """

    width = 256
    mean: Tensor

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        width = self.width
        self.register_buffer("mean", mean)
        self.layers = nn.Sequential(
            nn.Linear(len(mean), width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.LayerNorm(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images to codes of that width; pixels have a standard deviation of about .3."""
        return self.layers(3 * (x - self.mean))


def make_loss(method: str, weight: float, mean_cost: float, num_data: int, **options: Any) -> Trace_Sinkhorn:
    """The loss of a method that compares clouds.

    :param mean_cost: mean squared distance of two prior draws, for an epsilon that is absolute
    :param num_data: number of data, for fixed targets
    :param options: further ones of ``Trace_Sinkhorn``, such as the match size
    """
    if method == "ae":
        return Trace_Sinkhorn(prior_weight=0.0)
    if method == "sae-v3":
        return Trace_Sinkhorn(prior_weight=weight, debias="self", **options)
    if method == "hae":
        return Trace_Sinkhorn(prior_weight=weight, debias=None, relative_epsilon=0.0, **options)
    published = {"debias": None, "relative_epsilon": EPSILON / mean_cost}
    loss = Trace_Sinkhorn(prior_weight=weight, **options | (published if "v1" in method else {}))
    given = loss.latent_match.options
    if method in FIXED:
        loss.matcher = FixedTargets(given, num_data, hungarian=method == "nat")
    elif method != "ours":
        loss.matcher = {"wae": MMDMatch, "swae": SlicedMatch, "sae-v1": PublishedMatch}[method](given)
    return loss


def make_program(
    method: str,
    weight: float,
    model: Callable[[Tensor], None],
    *,
    dim: int,
    sphere: bool,
    train: Tensor,
    **options: Any,
) -> SinkhornProgram:
    """A program with the guide and the loss of a method; those of ``FIXED`` take the numbers of the data as well.

    :param sphere: whether the prior is uniform on the sphere; else it is a standard normal
    :param train: the training images
    :param options: further ones of ``Trace_Sinkhorn``
    """
    encoder = Encoder(train.mean(0))
    if method in ELBO_METHODS:
        guide = VonMisesFisherGuide(dim, encoder) if sphere else NormalGuide(dim, encoder=encoder)
        scaled = ScaleSite("z", weight)
        return SinkhornProgram(scaled(model), scaled(guide), TraceMeanField_ELBO())
    loss = make_loss(method, weight, 2.0 if sphere else 2.0 * dim, len(train), **options)

    def numbered(x: Tensor, numbers: Tensor) -> None:
        model(x)

    shown = numbered if method in FIXED else model
    return SinkhornProgram(
        shown, AutoImplicit(shown, encoder=encoder, noise_dim=0 if method == "ae" else None), loss
    )
