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
    # The matrix-product form would be faster and wrong by 1e-3 near zero in float32, where the root blows up.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def l1(x: Tensor, y: Tensor) -> Tensor:
    r"""Sum of absolute differences :math:`\|x_i-y_j\|_1`, shape ``(..., n, m)``.

    >>> l1(torch.zeros(1, 2), torch.tensor([[3.0, -4.0]])).tolist()
    [[7.0]]
    """
    return torch.cdist(x, y, p=1.0)


def geodesic(x: Tensor, y: Tensor) -> Tensor:
    r"""Squared arc :math:`\arccos^2\langle x_i, y_j\rangle` between unit vectors, shape ``(..., n, m)``.

    As a function of the squared chord :math:`4s`, it is :math:`4\arcsin^2\sqrt s`: smooth where points coincide, where
    the arc cosine has an infinite slope. At antipodes no direction is the shorter one; there the slope is cut off.

    >>> round(geodesic(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).sqrt().item(), 4)  # a quarter circle
    1.5708
    """
    s = (sqeuclidean(x, y) / 4).clamp_max(1 - 4 * torch.finfo(x.dtype).eps)
    near = s < 1e-4
    safe = torch.where(near, 0.25, s)
    return torch.where(near, 4 * s + 4 * s**2 / 3 + 32 * s**3 / 45, 4 * safe.sqrt().asin().square())


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
