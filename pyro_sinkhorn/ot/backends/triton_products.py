r"""The plan of a solution as products with it, its tiles computed again: :math:`P V = a \odot D\,(b \odot V)`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyro_sinkhorn.ot.backends.triton_layout import Layout
from pyro_sinkhorn.ot.backends.triton_parts import LARGEST_EXPONENT, density, score_tile

#: Rows and columns of a tile, and the warps that compute it, by the width of what is multiplied.
NARROW = {"BR": 64, "BC": 32, "num_warps": 4, "num_stages": 2}
WIDE = {"BR": 64, "BC": 32, "num_warps": 8, "num_stages": 2}


@triton.jit
def product_kernel(
    x_ptr,
    y_ptr,
    row_potential_ptr,
    col_potential_ptr,
    values_ptr,
    out_ptr,
    n,
    m,
    stride_row,
    stride_col,
    width,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out = D @ values``, ``(B, n, width)``; program ``(rows, values, problem)``."""
    p = tl.program_id(2)
    rows, k = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1) * BK + tl.arange(0, BK)
    if DENSE:
        x, y = x_ptr + p.to(tl.int64) * n * m, y_ptr
    else:
        x, y = x_ptr + p.to(tl.int64) * n * D, y_ptr + p.to(tl.int64) * m * D
    values = values_ptr + p.to(tl.int64) * m * width
    own = tl.load(row_potential_ptr + p * n + rows, mask=rows < n, other=0.0)
    total = tl.zeros([BR, BK], tl.float32)
    for start in range(0, m, BC):
        cols = start + tl.arange(0, BC)
        scores = score_tile(x, y, rows, cols, n, m, stride_row, stride_col, D, BD, BR, BC, DENSE, PRECISION)
        other = tl.load(col_potential_ptr + p * m + cols, mask=cols < m, other=0.0)
        inside = (cols < m)[:, None] & (k < width)[None, :]
        v = tl.load(values + cols[:, None] * width + k[None, :], mask=inside, other=0.0)
        total = tl.dot(density(scores, own, other), v, total, input_precision=PRECISION)
    out = out_ptr + p.to(tl.int64) * n * width
    tl.store(out + rows[:, None] * width + k[None, :], total, mask=(rows < n)[:, None] & (k < width)[None, :])


@dataclass(frozen=True)
class TritonCoupling:
    """The plan of potentials ``phi`` and ``gamma`` of a layout; see :class:`~pyro_sinkhorn.ot.problem.Coupling`."""

    layout: Layout
    phi: Tensor
    gamma: Tensor

    def product(self, values: Tensor) -> Tensor:
        """``P @ values``: ``(B, m, k)`` to ``(B, n, k)``."""
        side = self.layout
        weighted = side.b.unsqueeze(-1) * values.detach()
        x, y, strides = side.left, side.right, (side.m, 1)
        return self._finished(side.a, _product(side, x, y, self.phi, self.gamma, weighted, strides))

    def transposed_product(self, values: Tensor) -> Tensor:
        """``P.mT @ values``: ``(B, n, k)`` to ``(B, m, k)``."""
        side = self.layout
        weighted = side.a.unsqueeze(-1) * values.detach()
        x, y = (side.left, side.right) if side.dense else (side.right, side.left)
        return self._finished(side.b, _product(side, x, y, self.gamma, self.phi, weighted, (1, side.m)))

    def matrix(self) -> Tensor:
        """The plan itself, ``(B, n, m)``, by torch."""
        side = self.layout
        scores = side.left if side.dense else side.left @ side.right.mT
        exponent = scores + self.phi.unsqueeze(-1) + self.gamma.unsqueeze(-2)
        plan = exponent.clamp_max_(LARGEST_EXPONENT.value).exp2_().mul_(side.b.unsqueeze(-2))
        return self._finished(side.a, plan)

    def _finished(self, weights: Tensor, product: Tensor) -> Tensor:
        product = product * weights.unsqueeze(-1)
        return product.masked_fill(self.layout.invalid[:, None, None], torch.nan)


def _product(
    layout: Layout,
    x: Tensor,
    y: Tensor,
    row_potential: Tensor,
    col_potential: Tensor,
    values: Tensor,
    strides: tuple[int, int],
) -> Tensor:
    (batch, n), m, width = row_potential.shape, col_potential.shape[1], values.shape[-1]
    out = torch.empty(batch, n, width, dtype=values.dtype, device=values.device)
    bk = min(128, max(16, triton.next_power_of_2(width)))
    tile = NARROW if bk <= 32 else WIDE
    grid = (triton.cdiv(n, tile["BR"]), triton.cdiv(width, bk), batch)
    product_kernel[grid](
        x,
        y,
        row_potential,
        col_potential,
        values.contiguous(),
        out,
        n,
        m,
        *strides,
        width,
        BK=bk,
        **layout.constants,
        **tile,
    )
    return out
