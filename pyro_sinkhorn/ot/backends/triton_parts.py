r"""What the Triton kernels have in common: a tile of scores, guarded logarithms, Anderson mixing.

Everything is in base 2, with :math:`s = \log_2(e)/\varepsilon`. For squared Euclidean costs the potentials travel
without their squared norms, :math:`\phi_i = s\,(f_i - |x_i|^2)` and :math:`\gamma_j = s\,(g_j - |y_j|^2)` for centred clouds
(see :mod:`~pyro_sinkhorn.ot.backends.triton_layout`), so that the density of the plan is

.. math:: D_{ij} = 2^{\phi_i + \gamma_j + S_{ij}}, \qquad S_{ij} = 2s\,\langle x_i, y_j\rangle,

one exponential for each entry and no cost matrix. For any other cost :math:`S = -sC` is read from memory.
Weights multiply sums of densities instead of adding their logarithms to the potentials: a point of weight zero takes part
in no sum, but still has sums of its own, so its potential is its half-step like everyone's.

A half-step with a running maximum is taken at the beginning alone. From then on the columns are exact, which bounds the
densities: sums need no maximum, and a sum that underflows moves its potential by no more than :data:`LARGEST_MOVE`.

This module and the kernels beside it import Triton; they are imported by the functions that launch them.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Densities are cut at 2 to this: only those between two points of no weight come near it.
LARGEST_EXPONENT = tl.constexpr(90.0)
#: Most that one step moves a potential, in base 2: a scaled density stays finite, and a sum that underflows is corrected
#: step by step.
LARGEST_MOVE = tl.constexpr(30.0)
#: In place of minus infinity, whose differences are NaN.
NOTHING = tl.constexpr(-1.0e30)
#: An error this many times the smallest makes Anderson mixing forget its past and take the plain step it had replaced.
RESTART = tl.constexpr(3.0)
#: Most that Anderson mixing changes a plain step, in base 2, as in :mod:`~pyro_sinkhorn.ot.backends.anderson`.
LARGEST_CHANGE = tl.constexpr(4.0)
#: Squared length, relative to what it was, below which a new direction lies in the span of those remembered.
DEPENDENT = tl.constexpr(1.0e-6)


@triton.jit
def score_tile(
    x_ptr,
    y_ptr,
    rows,
    cols,
    n_rows,
    n_cols,
    stride_row,
    stride_col,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``S[rows, cols]``, ``(BR, BC)``: inner products of two clouds of width D, or read from the matrix at ``x_ptr``."""
    row_mask, col_mask = rows < n_rows, cols < n_cols
    if DENSE:
        where = rows[:, None].to(tl.int64) * stride_row + cols[None, :].to(tl.int64) * stride_col
        scores = tl.load(x_ptr + where, mask=row_mask[:, None] & col_mask[None, :], other=0.0)
    else:
        scores = tl.zeros([BR, BC], tl.float32)
        for start in range(0, D, BD):
            k = start + tl.arange(0, BD)
            x = tl.load(x_ptr + rows[:, None] * D + k[None, :], mask=row_mask[:, None], other=0.0)
            y = tl.load(y_ptr + cols[None, :] * D + k[:, None], mask=col_mask[None, :], other=0.0)
            scores = tl.dot(x, y, scores, input_precision=PRECISION)
    return scores


@triton.jit
def density(scores, row_potential, col_potential):
    """``D``, cut where nothing bounds it."""
    return tl.exp2(tl.minimum(scores + row_potential[:, None] + col_potential[None, :], LARGEST_EXPONENT))


@triton.jit
def log_weight(weight):
    """Base 2; a very negative number for a weight of zero."""
    return tl.where(weight > 0, tl.log2(tl.where(weight > 0, weight, 1.0)), NOTHING)


@triton.jit
def correction(sums):
    """What to add to a potential whose density sums to ``sums`` and should to 1."""
    return tl.minimum(tl.maximum(-tl.log2(tl.maximum(sums, 1.0e-37)), -LARGEST_MOVE), LARGEST_MOVE)


@triton.jit
def scaling(sums, move):
    """Two to ``move``, more exactly where nothing was cut."""
    exact = (move < LARGEST_MOVE) & (move > -LARGEST_MOVE)
    return tl.where(exact, 1.0 / tl.where(exact, sums, 1.0), tl.exp2(move))


@triton.jit
def bounded(largest):
    """What a change is multiplied by whose largest element is ``largest``."""
    return tl.minimum(1.0, LARGEST_CHANGE / tl.maximum(largest, 1.0e-30))


@triton.jit
def mix(point, residual, error, weight, last_point, last_residual, best, q1, w1, q2, w2, q3, w3):
    r"""A step of Anderson mixing with memory 3 on one vector.

    The memory holds orthonormal differences of residuals :math:`q_k` and the differences of points that made them,
    :math:`w_k`, so the least-squares problem is three inner products:
    :math:`p + r - \sum_k \langle q_k, r\rangle (w_k + q_k)`. The oldest pair leaves. A memory of zeros is no memory, and
    ``best``, the smallest error, is negative at first.

    :param weight: of the inner product: points of weight zero have no say, and take the plain step
    :returns: the next point, then ``last_point``, ``last_residual``, ``best`` and the memory as they are to be then
    """
    dr, dp = residual - last_residual, point - last_point
    length = tl.sum(weight * dr * dr, 0)
    h1, h2, h3 = tl.sum(weight * q1 * dr, 0), tl.sum(weight * q2 * dr, 0), tl.sum(weight * q3 * dr, 0)
    dr = dr - h1 * q1 - h2 * q2 - h3 * q3
    dp = dp - h1 * w1 - h2 * w2 - h3 * w3
    left = tl.sum(weight * dr * dr, 0)
    remember = error <= RESTART * best
    back = (best >= 0) & (error > RESTART * best)
    new = remember & (left > DEPENDENT * length)
    unit = tl.where(new, tl.rsqrt(tl.where(new, left, 1.0)), 0.0)
    q3, w3 = tl.where(new, q2, q3), tl.where(new, w2, w3)
    q2, w2 = tl.where(new, q1, q2), tl.where(new, w1, w2)
    q1, w1 = tl.where(new, dr * unit, q1), tl.where(new, dp * unit, w1)
    q1, w1 = tl.where(remember, q1, 0.0), tl.where(remember, w1, 0.0)
    q2, w2 = tl.where(remember, q2, 0.0), tl.where(remember, w2, 0.0)
    q3, w3 = tl.where(remember, q3, 0.0), tl.where(remember, w3, 0.0)
    h1 = tl.sum(weight * q1 * residual, 0)
    h2 = tl.sum(weight * q2 * residual, 0)
    h3 = tl.sum(weight * q3 * residual, 0)
    following = point + residual
    change = tl.where(weight > 0, h1 * (w1 + q1) + h2 * (w2 + q2) + h3 * (w3 + q3), 0.0)
    following -= change * bounded(tl.max(tl.abs(change), 0))
    following = tl.where(back, last_point + last_residual, following)
    last_point, last_residual = tl.where(back, last_point, point), tl.where(back, last_residual, residual)
    best = tl.where(remember, tl.minimum(best, error), tl.where(back, best, error))
    return following, last_point, last_residual, best, q1, w1, q2, w2, q3, w3
