r"""Ground costs between point clouds.

A cost maps points ``x`` of shape ``(..., n, d)`` and ``y`` of shape ``(..., m, d)`` to a matrix
``(..., n, m)``.

====================  ==================================  =======================================
name                  formula                             note
====================  ==================================  =======================================
``"sqeuclidean"``     :math:`\|x-y\|^2`                   no factor one half; units of x squared
``"euclidean"``       :math:`\|x-y\|`                     gradient 0 where two points coincide
``"l1"``              :math:`\|x-y\|_1`                 units of x
``"geodesic"``        :math:`\arccos^2\langle x,y\rangle`  unit vectors only; radians squared
a callable            ``cost(x, y) -> (n, m)``            called once for every problem of a batch
====================  ==================================  =======================================
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Cost = str | Callable[[Tensor, Tensor], Tensor]


def sqeuclidean(x: Tensor, y: Tensor) -> Tensor:
    r"""Squared Euclidean cost :math:`\|x_i-y_j\|^2`, shape ``(..., n, m)``.

    Both clouds are centred first: in float32 the expansion of the square loses digits when clouds
    lie far from the origin.

    >>> x = torch.tensor([[0.0], [1.0]])
    >>> sqeuclidean(x, torch.tensor([[3.0]])).tolist()
    [[9.0], [4.0]]
    """
    centre = x.detach().mean(-2, keepdim=True)
    x, y = x - centre, y - centre
    squares = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
    return (squares - 2 * x @ y.mT).clamp_min(0)


def euclidean(x: Tensor, y: Tensor) -> Tensor:
    r"""Euclidean cost :math:`\|x_i-y_j\|`, shape ``(..., n, m)``; its gradient at coinciding points is 0.

    >>> euclidean(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])).tolist()
    [[5.0]]
    """
    # In units of a power of 2, which changes no digit, and about as large as the coordinates: squares stay in range.
    unit = _power_of_2(torch.maximum(_largest(x), _largest(y)))
    # The matrix-product form would be faster and wrong by 1e-3 near zero in float32, where the root blows up.
    return torch.cdist(x / unit, y / unit, compute_mode="donot_use_mm_for_euclid_dist") * unit


def _largest(points: Tensor) -> Tensor:
    return points.detach().abs().amax((-2, -1), keepdim=True)


def _power_of_2(largest: Tensor) -> Tensor:
    """The largest that is not above it; 1 for 0."""
    mantissa, _ = torch.frexp(largest)
    return (largest / (2 * mantissa)).where(largest > 0, 1)


def l1(x: Tensor, y: Tensor) -> Tensor:
    r"""Sum of absolute differences :math:`\|x_i-y_j\|_1`, shape ``(..., n, m)``.

    >>> l1(torch.zeros(1, 2), torch.tensor([[3.0, -4.0]])).tolist()
    [[7.0]]
    """
    return torch.cdist(x, y, p=1.0)


def geodesic(x: Tensor, y: Tensor) -> Tensor:
    r"""Squared arc :math:`\arccos^2\langle x_i, y_j\rangle` between unit vectors, shape ``(..., n, m)``.

    An arc is told by its chord :math:`2r`, or by that to the antipode :math:`2r'`, whichever is the shorter:
    :math:`2\arcsin r = \pi - 2\arcsin r'`. The longer one hardly changes with the arc, as the cosine does near both ends.
    At antipodes no direction is the shorter one; there the gradient is 0.

    >>> round(geodesic(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).sqrt().item(), 4)  # a quarter circle
    1.5708
    """
    near, far = euclidean(x, y) / 2, euclidean(x, -y) / 2
    nearer = near <= far
    # What is not used must have a finite slope too: the arc sine has none at 1.
    arc = torch.where(
        nearer,
        2 * torch.where(nearer, near, 0.5).asin(),
        math.pi - 2 * torch.where(nearer, 0.5, far).asin(),
    )
    return arc.square()


def mahalanobis(precision: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    r"""The cost :math:`(x_i-y_j)^\top A\,(x_i-y_j)` of a positive definite ``precision`` :math:`A`, ``(d, d)``.

    :raises ValueError: it is not positive definite

    >>> cost = mahalanobis(torch.diag(torch.tensor([1.0, 4.0])))
    >>> cost(torch.zeros(1, 2), torch.tensor([[1.0, 1.0]])).tolist()
    [[5.0]]
    """
    factor, failed = torch.linalg.cholesky_ex(precision)
    if precision.dim() != 2 or bool(failed.any()):
        raise ValueError(f"precision has shape {tuple(precision.shape)}: expected a positive definite (d, d)")

    def cost(x: Tensor, y: Tensor) -> Tensor:
        root = factor.to(x)
        return sqeuclidean(x @ root, y @ root)

    return cost


#: Costs by name.
NAMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sqeuclidean": sqeuclidean,
    "euclidean": euclidean,
    "l1": l1,
    "geodesic": geodesic,
}


def cost_matrix(cost: Cost, x: Tensor, y: Tensor) -> Tensor:
    """Cost matrices of a batch of problems: ``(B, n, d)`` and ``(B, m, d)`` to ``(B, n, m)``.

    Raises ``ValueError`` for an unknown name, and where a callable returns another shape than ``(n, m)``.
    """
    if isinstance(cost, str):
        if cost not in NAMED:
            raise ValueError(
                f"unknown cost {cost!r}: expected one of {sorted(NAMED)} or a callable cost(x, y)"
            )
        return NAMED[cost](x, y)
    # A user's cost is written for two clouds: it is called once a problem instead of being asked to broadcast.
    matrices = [cost(xi, yi) for xi, yi in zip(x, y, strict=True)]
    expected = (x.shape[-2], y.shape[-2])
    for matrix in matrices:
        if not isinstance(matrix, Tensor) or tuple(matrix.shape) != expected:
            got = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ValueError(
                f"the cost {getattr(cost, '__name__', cost)!r} was given clouds of shape "
                f"{tuple(x.shape[1:])} and {tuple(y.shape[1:])} and returned {got}: "
                f"expected a tensor of shape {expected}"
            )
    return torch.stack(matrices)
