r"""Where iterations begin: the potentials of two normal laws with the variances of the clouds.

For :math:`N(0, A)` and :math:`N(0, B)` with diagonal covariances and cost :math:`\|x-y\|^2` the entropic potentials are
quadratic (Janati et al. 2020, *Entropic optimal transport between unbalanced Gaussian measures has a closed form*):
coordinate by coordinate, with :math:`r = \sqrt{AB + \varepsilon^2/16} + \varepsilon/4`,

.. math:: f(x) = (1 - B/r)\,x^2, \qquad g(y) = (1 - A/r)\,y^2,

up to a constant, which the first half-step sets.
Other costs begin at the c-transforms of zero, whose exponents are at most 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sinkhorn.ot.backends.exponents import Exponents, weighted_mean
from pyro_sinkhorn.ot.problem import Problem


def starting_potentials(problem: Problem, exponents: Exponents) -> tuple[Tensor, Tensor]:
    """Potentials in base 2, ``(B, n)`` and ``(B, m)``: those of ``problem.start``, where it has one."""
    if problem.start is not None:
        phi, gamma = exponents.in_base_2(*problem.start)
        if problem.symmetric:
            phi = gamma = (phi + gamma) / 2
        return phi, gamma
    if exponents.x is None or exponents.y is None:
        zero = exponents(torch.zeros_like(problem.a), torch.zeros_like(problem.b))
        phi = -zero.amax(-1)
        return phi, -(zero.add_(phi.unsqueeze(-1))).amax(-2)
    a, b = (None, None) if problem.uniform else (problem.a.detach(), problem.b.detach())
    f, g = gaussian_potentials(exponents.x, exponents.y, a, b, problem.epsilon)
    return f * exponents.scale, g * exponents.scale


def gaussian_potentials(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, epsilon: Tensor
) -> tuple[Tensor, Tensor]:
    """Potentials of the diagonal normal laws of two centred clouds, in units of the cost.

    :param x: points ``(B, n, d)``; ``y`` is ``(B, m, d)``
    :param a: weights ``(B, n)``, None for equal ones
    :returns: ``(B, n)`` and ``(B, m)``
    """
    quarter = (
        epsilon.reshape(-1, 1, 1) / 4
    )  # hypot, since the squares of variances leave the range of float32 soon
    squares_x = x.square()
    variance_x = weighted_mean(squares_x, a)
    if y is x:
        f = (squares_x * (1 - variance_x / (variance_x.hypot(quarter) + quarter))).sum(-1)
        return f, f
    squares_y = y.square()
    variance_y = weighted_mean(squares_y, b)
    root = (variance_x.sqrt() * variance_y.sqrt()).hypot(quarter) + quarter
    return (squares_x * (1 - variance_y / root)).sum(-1), (squares_y * (1 - variance_x / root)).sum(-1)
