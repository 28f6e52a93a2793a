r"""A plan as a matrix between two scalings, :math:`P = \mathrm{diag}(u)\,K\,\mathrm{diag}(v)`, and products with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScaledPlan:
    """The :class:`~pyro_sinkhorn.ot.problem.Coupling` of the dense backend.

    kernel:       ``(B, n, m)``
    left, right:  scalings, ``(B, n)`` and ``(B, m)``
    """

    kernel: Tensor
    left: Tensor
    right: Tensor

    def product(self, values: Tensor) -> Tensor:
        """``P @ values``."""
        return narrow_product(self.right.unsqueeze(-1) * values, self.kernel.mT) * self.left.unsqueeze(-1)

    def transposed_product(self, values: Tensor) -> Tensor:
        """``P.mT @ values``."""
        return narrow_product(self.left.unsqueeze(-1) * values, self.kernel) * self.right.unsqueeze(-1)

    def matrix(self) -> Tensor:
        """``P``."""
        return self.kernel * self.left.unsqueeze(-1) * self.right.unsqueeze(-2)


def narrow_product(values: Tensor, kernel: Tensor) -> Tensor:
    """``kernel.mT @ values``, ``(B, m, k)``, with the few columns in front: much faster than behind."""
    return torch.bmm(values.mT, kernel).mT


def times_rows(w: Tensor, kernel: Tensor, active: Sequence[int] | None, out: Tensor) -> Tensor:
    """:math:`\\sum_i w_i K_{ij}`, ``(B, m)``. Problems that are not ``active`` keep what ``out`` holds.

    A row vector times a matrix: for batches the other order is much slower in ``torch.bmm`` on a processor.
    """
    if active is None:
        return torch.bmm(w.unsqueeze(1), kernel).squeeze(1)
    for i in active:
        torch.mm(w[i : i + 1], kernel[i], out=out[i : i + 1])
    return out


def times_columns(kernel: Tensor, w: Tensor, active: Sequence[int] | None, out: Tensor) -> Tensor:
    """:math:`\\sum_j K_{ij} w_j`, ``(B, n)``, as :func:`times_rows`."""
    return times_rows(w, kernel.mT, active, out)
