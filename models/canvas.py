r"""A digit somewhere on a canvas: *what* it is and *where* it is, told apart by the program.

The decoder paints a small glyph; a spatial transformer with no weights puts it in its place. So the position is a
latent with a meaning, a point of a square, and not a direction of some code.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from pyro_sinkhorn.distributions import HypersphericalUniform
from pyro_sinkhorn.models.digits import decoder_network

Model = Callable[[Tensor], None]


def canvas_digits(dim: int = 10, side: int = 20, glyph_side: int = 8, noise_scale: float = 0.2) -> Model:
    r"""Images of one digit on a canvas:

    .. math::

        w_i \sim \mathrm{Uniform}[-1, 1]^2, \quad z_i \sim \mathrm{Uniform}(S^{d-1}), \quad
        x_i \sim N\bigl(T_{w_i}\,\mathrm{sigmoid}(f_\theta(z_i)), \sigma^2 I\bigr)

    with :math:`T_w` of :func:`place_on_canvas`.

    :param dim: :math:`d`, of *what*
    :param side: of the canvas, in pixels
    :param glyph_side: of the glyph
    :param noise_scale: :math:`\sigma`
    :returns: a model of images ``x``, ``(n, side, side)``, with values in [0, 1] and latents ``z_where``, ``(n, 2)``,
        across and down, and ``z_what``, ``(n, dim)``

    Eslami et al. 2016, *Attend, infer, repeat*; Jaderberg et al. 2015, *Spatial transformer networks*; Patrini et al.
    2019 fit such a program with a Sinkhorn autoencoder.

    >>> canvas_digits()(torch.rand(3, 20, 20))
    """
    decoder = decoder_network(dim, glyph_side**2)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            where = pyro.sample("z_where", dist.Uniform(-x.new_ones(2), x.new_ones(2)).to_event(1))
            what = pyro.sample("z_what", HypersphericalUniform(dim, dtype=x.dtype, device=x.device))
            glyphs = decoder(what).sigmoid().unflatten(-1, (glyph_side, glyph_side))
            mean = place_on_canvas(glyphs, where, side)
            pyro.sample("x", dist.Normal(mean, noise_scale).to_event(2), obs=x)

    return model


def place_on_canvas(glyphs: Tensor, where: Tensor, side: int = 20) -> Tensor:
    r"""Glyphs on empty canvases, interpolated linearly, differentiable in both arguments.

    A point :math:`u\in[-1,1]^2` of the canvas shows the point :math:`(u - (1-s) w)/s` of the glyph, with :math:`s` the
    ratio of their sides: ``where`` of -1 puts the glyph at the left (upper) edge, 1 at the right (lower) one.

    :param glyphs: ``(..., g, g)``
    :param where: across and down, ``(..., 2)``
    :param side: of the canvas
    :returns: ``(..., side, side)``

    >>> place_on_canvas(torch.ones(2, 2), torch.tensor([1.0, -1.0]), 4).tolist()[:3]
    [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    ratio = glyphs.shape[-1] / side
    return _looked_at(glyphs, 1 / ratio, where * (1 - 1 / ratio), side)


def cut_from_canvas(images: Tensor, where: Tensor, glyph_side: int = 8) -> Tensor:
    """The inverse: what a canvas shows at a place, interpolated linearly, differentiable in both arguments.

    :param images: ``(..., side, side)``
    :param where: across and down, ``(..., 2)``
    :param glyph_side: of the window
    :returns: ``(..., glyph_side, glyph_side)``

    >>> cut_from_canvas(torch.arange(16.0).reshape(4, 4), torch.tensor([1.0, -1.0]), 2).tolist()
    [[2.0, 3.0], [6.0, 7.0]]
    """
    ratio = glyph_side / images.shape[-1]
    return _looked_at(images, ratio, where * (1 - ratio), glyph_side)


class GlimpseEncoder(nn.Module):
    """Looks at the canvas, then closely at one window of it: ``(n, side, side)`` to codes ``(n, width + 2)``.

    Where to look is learned, by a gradient through the window. A perceptron of all pixels would have to learn every digit
    at every place instead.

    >>> GlimpseEncoder()(torch.rand(5, 20, 20)).shape
    torch.Size([5, 130])
    """

    def __init__(self, side: int = 20, glyph_side: int = 8, width: int = 128) -> None:
        super().__init__()
        self.glyph_side = glyph_side
        self.locate = nn.Sequential(
            nn.Flatten(), nn.Linear(side**2, 64), nn.SiLU(), nn.Linear(64, 2), nn.Tanh()
        )
        self.read = nn.Sequential(
            nn.Flatten(), nn.Linear(glyph_side**2, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, images: Tensor) -> Tensor:
        """The place looked at, and what is read there."""
        where = self.locate(images)
        return torch.cat([where, self.read(cut_from_canvas(images, where, self.glyph_side))], -1)


def _looked_at(images: Tensor, zoom: float, shift: Tensor, side: int) -> Tensor:
    """Pixels of ``images``, ``(..., h, h)``, at the points zoom · v + shift, for v in a square grid of this side."""
    lead, size = images.shape[:-2], images.shape[-2:]
    flat = images.reshape(-1, 1, *size)
    corner = shift.expand(*lead, 2).reshape(-1, 2, 1)
    scaled = zoom * torch.eye(2, dtype=flat.dtype, device=flat.device).expand(len(flat), 2, 2)
    grid = affine_grid(torch.cat([scaled, corner], -1), [len(flat), 1, side, side], align_corners=False)
    return grid_sample(flat, grid, align_corners=False).reshape(*lead, side, side)
