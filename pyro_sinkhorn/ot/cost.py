r"""Ground costs between point clouds.

A cost maps points ``x`` of shape ``(..., n, d)`` and ``y`` of shape ``(..., m, d)`` to a matrix
``(..., n, m)``.

====================  ==================================  =======================================
name                  formula                             note
====================  ==================================  =======================================
``"sqeuclidean"``     :math:`\|x-y\|^2`                   no factor one half; units of x squared
``"euclidean"``       :math:`\|x-y\|`                     gradient 0 where two points coincide
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


_NAMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sqeuclidean": sqeuclidean, "euclidean": euclidean}


def cost_matrix(cost: Cost, x: Tensor, y: Tensor) -> Tensor:
    """Cost matrices of a batch of problems: ``(B, n, d)`` and ``(B, m, d)`` to ``(B, n, m)``.

    Raises ``ValueError`` for an unknown name, and where a callable returns another shape than ``(n, m)``.
    """
    if isinstance(cost, str):
        if cost not in _NAMED:
            raise ValueError(
                f"unknown cost {cost!r}: expected one of {sorted(_NAMED)} or a callable cost(x, y)"
            )
        return _NAMED[cost](x, y)
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
