r"""Digits together with what they are labelled: given the label, or with the label as a latent that is seen now and then."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_sinkhorn.models.digits import decoder_network

ConditionalModel = Callable[[Tensor, Tensor], None]


def conditional_digits(
    num_classes: int = 10, dim: int = 6, num_pixels: int = 64, noise_scale: float = 0.2
) -> ConditionalModel:
    r"""Images given their labels :math:`y`, with a prior of the style that depends on the label:

    .. math:: z_i \sim N(m_\phi(y_i), I), \qquad x_i \sim N(\mathrm{sigmoid}(f_\theta(z_i, y_i)), \sigma^2 I).

    Latents are compared label by label, in that the prior's mean is appended to both clouds: a style that gives the label
    away is not the prior's, though all styles together may be.

    :param num_classes: labels are integers below
    :param dim: of the style
    :returns: a model of images ``x``, ``(n, num_pixels)``, with values in [0, 1], and labels ``y``, ``(n,)``, with latents
        ``z``, ``(n, dim)``. ``generate(1, x, y)`` draws images with the labels asked for

    Sohn, Lee and Yan 2015, *Learning structured output representation using deep conditional generative models*.

    >>> conditional_digits()(torch.rand(3, 64), torch.tensor([0, 1, 1]))
    """
    decoder = decoder_network(dim + num_classes, num_pixels)
    prior = nn.Linear(num_classes, dim)

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("decoder", decoder)
        pyro.module("prior", prior)
        label = one_hot(y, num_classes).to(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(prior(label), 1.0).to_event(1))
            logits = decoder(torch.cat([z, label.expand(*z.shape[:-1], -1)], -1))
            pyro.sample("x", dist.Normal(logits.sigmoid(), noise_scale).to_event(1), obs=x)

    return model


def semi_supervised_digits(
    num_classes: int = 10,
    dim: int = 6,
    num_pixels: int = 64,
    noise_scale: float = 0.2,
    label_error: float = 1e-3,
    label_weight: float = 1.0,
) -> ConditionalModel:
    r"""Images of which few are labelled: the class is a latent of all, and a label an observation of it,

    .. math::

        y_i \sim \mathrm{Uniform}\{1,\dots,K\}, \quad z_i \sim N(0, I), \quad
        x_i \sim N(\mathrm{sigmoid}(f_\theta(z_i, y_i)), \sigma^2 I), \quad
        \ell_i \sim (1-\varepsilon)\,\delta_{y_i} + \varepsilon/K .

    So labelled and unlabelled data share one program and one encoder; where there is no label, its site is masked. An
    encoder that read the label would copy it, and have nothing to go by without:
    ``AutoImplicit(model, encoder_input=lambda x, label: x)``.

    :param num_classes: :math:`K`
    :param dim: of the style ``z``
    :param label_error: :math:`\varepsilon`, of labels that are drawn at random; a wrong class of a labelled image costs
        :math:`\log(1 + K(1-\varepsilon)/\varepsilon)` nats
    :returns: a model of images ``x``, ``(n, num_pixels)``, and labels ``label``, ``(n,)``, integers, -1 where unknown, with
        latents ``y``, ``(n, num_classes)``, one-hot, and ``z``, ``(n, dim)``; observed sites ``x`` and ``label``

    Kingma, Rezende, Mohamed and Welling 2014, *Semi-supervised learning with deep generative models*, model M2. They add a
    classification loss by hand, since their guide never sees a labelled class; here the label's likelihood is that loss, and
    ``label_weight`` its weight.

    >>> semi_supervised_digits()(torch.rand(3, 64), torch.tensor([4, -1, -1]))
    """
    decoder = decoder_network(dim + num_classes, num_pixels, hidden=128)

    def model(x: Tensor, label: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(num_classes)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(dim), 1.0).to_event(1))
            lead = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1])  # y may be enumerated to the left
            logits = decoder(torch.cat([z.expand(*lead, -1), y.expand(*lead, -1)], -1))
            pyro.sample("x", dist.Normal(logits.sigmoid(), noise_scale).to_event(1), obs=x)
            told = dist.Categorical((1 - label_error) * y + label_error / num_classes)
            with pyro.poutine.mask(mask=label >= 0), pyro.poutine.scale(scale=label_weight):
                pyro.sample("label", told, obs=label.clamp_min(0))

    return model
