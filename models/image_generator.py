r"""Images decoded from the unit square, without pixel noise: a law on a surface, which has no density.

.. math:: z_i \sim \mathrm{Uniform}([0, 1]^2), \qquad x_i = \mathrm{sigmoid}(f_\theta(z_i)).

The images fill a surface of two dimensions among all images, so there is no likelihood to maximise, and no encoder is
wanted: the only use of the program is to be run. :class:`pyro_sinkhorn.Trace_DataSinkhorn` fits it so.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_sinkhorn.distributions import Implicit
from pyro_sinkhorn.models.digits import decoder_network

Model = Callable[[Tensor], None]


def image_generator(num_pixels: int = 64, hidden: int = 256, dim: int = 2) -> Model:
    """Images ``(n, num_pixels)`` with values in [0, 1], decoded from uniform points by a perceptron.

    :param num_pixels: length of an image
    :param hidden: width of the two hidden layers
    :param dim: dimension of the cube; 2 can be shown whole, as :func:`latent_grid`
    :returns: a model with the module ``decoder``, from the cube to logits of pixels, and the latent ``z``

    Genevay, Peyré, Cuturi 2017, *Learning generative models with Sinkhorn divergences*, section 4.2 (MNIST).

    >>> model = image_generator()
    >>> x = pyro.poutine.trace(model).get_trace(torch.rand(3, 64)).nodes["x"]["fn"].rsample()
    >>> x.shape, x.requires_grad
    (torch.Size([3, 64]), True)
    """
    decoder = decoder_network(dim, num_pixels, hidden)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(x.new_zeros(dim), x.new_ones(dim)).to_event(1))
            pyro.sample("x", Implicit(decoder(z).sigmoid(), event_dim=1), obs=x)

    return model


def latent_grid(side: int = 20) -> Tensor:
    """Centres of ``side`` by ``side`` equal squares that tile the unit square, row by row from the top left.

    >>> latent_grid(2).tolist()
    [[0.25, 0.75], [0.75, 0.75], [0.25, 0.25], [0.75, 0.25]]
    """
    ticks = (torch.arange(side) + 0.5) / side
    return torch.cartesian_prod(1 - ticks, ticks).flip(-1)
