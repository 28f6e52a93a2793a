r"""A union of solid ellipsoids: the simulator with which Genevay et al. 2017 cluster the iris flowers.

A point is uniform in one of ``num`` ellipsoids, each chosen equally often:

.. math::

    k_i \sim \mathrm{Uniform}\{1,\dots,K\}, \quad u_i \sim \mathrm{Uniform}\{u : \|u\|\le 1\}, \quad
    x_i = A_{k_i} u_i + c_{k_i}.

There is no useful likelihood (a point outside all ellipsoids has density 0, and passes no gradient), but the draw is
differentiable in :math:`A` and :math:`c` at fixed noise: :class:`pyro_sinkhorn.Trace_DataSinkhorn` fits both.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_sinkhorn.distributions import HypersphericalUniform, Implicit

Model = Callable[[Tensor], None]


def ellipsoids(num: int = 3, dim: int = 3, centres: Tensor | None = None, radius: float = 1.0) -> Model:
    r"""Points uniform in a union of ellipsoids of equal mass, as many as the model is given data.

    The choice :math:`k` is discrete and carries no gradient, and needs none: the shares are fixed. The uniform law of
    the ball is a direction on the sphere times a radius :math:`v^{1/d}` with :math:`v` uniform on [0, 1].

    :param num: number of ellipsoids :math:`K`
    :param dim: dimension :math:`d` of the space, at least 2
    :param centres: where they start, ``(num, dim)``, for instance :func:`spread_points` of the data; by default drawn
        from a standard normal
    :param radius: radius of the balls they start as, :math:`A_k = \mathrm{radius}\cdot I`
    :returns: a model of points ``(n, dim)`` with parameters ``axes`` :math:`A`, ``(num, dim, dim)``, and ``centres``
        :math:`c`, ``(num, dim)``; latents ``which``, ``direction`` and ``level``
    :raises ValueError: ``centres`` are not ``(num, dim)``

    Genevay, Peyré, Cuturi 2017, *Learning generative models with Sinkhorn divergences*, section 4.1;
    ``benchmarks/iris_ellipsoids.py`` repeats their experiment.

    >>> _ = pyro.set_rng_seed(0)
    >>> model = ellipsoids(centres=torch.tensor([[-9.0, 0, 0], [0, 0, 0], [9, 0, 0]]), radius=2.0)
    >>> x = pyro.poutine.trace(model).get_trace(torch.zeros(300, 3)).nodes["x"]["fn"].rsample()
    >>> radii = ellipsoid_radii(x, pyro.param("axes"), pyro.param("centres"))
    >>> bool((radii.amin(-1) <= 1).all()), radii.argmin(-1).bincount().min().item() > 70
    (True, True)
    """
    if centres is not None and centres.shape != (num, dim):
        raise ValueError(f"centres have shape {tuple(centres.shape)}: expected {(num, dim)}, one a row")

    def model(x: Tensor) -> None:
        start = torch.randn(num, dim) if centres is None else centres
        axes = pyro.param("axes", lambda: (radius * torch.eye(dim).repeat(num, 1, 1)).to(x))
        c = pyro.param("centres", lambda: start.detach().clone().to(x))
        with pyro.plate("data", len(x)):
            which = pyro.sample("which", dist.Categorical(logits=x.new_zeros(num)))
            direction = pyro.sample("direction", HypersphericalUniform(dim, dtype=x.dtype, device=x.device))
            level = pyro.sample("level", dist.Uniform(x.new_zeros(()), x.new_ones(())))
            u = direction * level.unsqueeze(-1) ** (1 / dim)
            points = (axes[which] @ u.unsqueeze(-1)).squeeze(-1) + c[which]
            pyro.sample("x", Implicit(points, event_dim=1), obs=x)

    return model


def ellipsoid_radii(x: Tensor, axes: Tensor, centres: Tensor) -> Tensor:
    r"""Distance of every point from every centre in the metric of its ellipsoid, :math:`\|A_k^{-1}(x_i-c_k)\|`.

    At most 1 inside; the smallest of a row names the ellipsoid to which the point belongs.

    :param x: points, ``(n, dim)``
    :param axes: ``(num, dim, dim)``
    :param centres: ``(num, dim)``
    :returns: ``(n, num)``

    >>> axes = torch.diag(torch.tensor([1.0, 0.5]))[None]
    >>> ellipsoid_radii(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), axes, torch.zeros(1, 2)).tolist()
    [[2.0], [4.0]]
    """
    offsets = x.mT.unsqueeze(0) - centres.unsqueeze(-1)
    return torch.linalg.solve(axes, offsets).norm(dim=1).mT


@torch.no_grad()
def spread_points(
    x: Tensor, num: int, tries: int = 20, generator: torch.Generator | None = None
) -> tuple[Tensor, float]:
    r"""Start of the ellipsoids from the data alone: data points far apart, and the radius of balls around them.

    Each further point is drawn with probability proportional to its squared distance from the nearest one chosen; of
    ``tries`` such choices the one is kept from which the data have the least mean squared distance :math:`s^2`
    (Arthur and Vassilvitskii 2007, *k-means++*). A uniform ball of radius :math:`r` in :math:`d` dimensions has
    :math:`\mathbb{E}\|u\|^2 = r^2 d/(d+2)`, so the balls get :math:`r = s\sqrt{(d+2)/d}`.

    :param x: data, ``(n, dim)``
    :param num: how many points
    :param tries: choices to take the best of
    :param generator: source of the draws; torch's global one by default. It lives on the CPU, whatever the data's device
    :returns: points ``(num, dim)`` and the radius

    >>> centres, radius = spread_points(torch.tensor([[0.0, 0], [0, 1], [9, 0], [9, 1]]), num=2)
    >>> sorted(centres[:, 0].tolist()), radius
    ([0.0, 9.0], 1.0)
    """
    best: tuple[float, Tensor] | None = None
    for _ in range(tries):
        chosen = torch.randint(len(x), (1,), generator=generator).to(x.device)
        for _ in range(num - 1):
            squares = torch.cdist(x, x[chosen]).amin(-1).square()
            further = torch.multinomial(squares.cpu(), 1, generator=generator).to(x.device)
            chosen = torch.cat([chosen, further])
        spread = float(torch.cdist(x, x[chosen]).amin(-1).square().mean())
        if best is None or spread < best[0]:
            best = spread, x[chosen]
    if best is None:
        raise ValueError(f"tries is {tries}: expected at least 1")
    dim = x.shape[-1]
    return best[1], (best[0] * (dim + 2) / dim) ** 0.5
