"""Regime 1, clouds of at most 128 points: a program solves a problem in one launch, its scores on the chip.

The tile of scores stays in registers from the first half-step to the last. An iteration is one exponential for each entry
and two sums over the tile; Anderson mixing keeps its memory in registers too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyro_sinkhorn.ot.backends.triton_layout import Layout, State
from pyro_sinkhorn.ot.backends.triton_parts import (
    correction,
    density,
    log_weight,
    mix,
    scaling,
    score_tile,
)

#: Points of the larger cloud at most.
LARGEST = 128


@triton.jit(do_not_specialize=["max_iters"])
def small_kernel(
    x_ptr,
    y_ptr,
    a_ptr,
    b_ptr,
    phi_ptr,
    gamma_ptr,
    error_ptr,
    count_ptr,
    done_ptr,
    tolerance,
    max_iters,
    n,
    m,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DENSE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program p solves problem p. The potentials it finds replace those it starts from."""
    p = tl.program_id(0)
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    if DENSE:
        scores = score_tile(x_ptr + p * n * m, y_ptr, i, j, n, m, m, 1, D, BD, BM, BN, True, PRECISION)
    else:
        scores = score_tile(
            x_ptr + p * n * D, y_ptr + p * m * D, i, j, n, m, 0, 0, D, BD, BM, BN, False, PRECISION
        )
    a = tl.load(a_ptr + p * n + i, mask=i < n, other=0.0)
    b = tl.load(b_ptr + p * m + j, mask=j < m, other=0.0)
    phi = tl.load(phi_ptr + p * n + i, mask=i < n, other=0.0)
    gamma = tl.load(gamma_ptr + p * m + j, mask=j < m, other=0.0)

    exponent = scores + (gamma + log_weight(b))[None, :]
    top = tl.max(exponent, 1)
    step = -top - tl.log2(tl.sum(tl.exp2(exponent - top[:, None]), 1))
    if SYMMETRIC:
        phi += (2.0 / 3.0) * (step - phi)
    else:
        phi = step
        exponent = scores + (phi + log_weight(a))[:, None]
        top_of_column = tl.max(exponent, 0)
        gamma = -top_of_column - tl.log2(tl.sum(tl.exp2(exponent - top_of_column[None, :]), 0))

    zero = phi * 0.0
    q1, w1, q2, w2, q3, w3, last_phi, last_residual = zero, zero, zero, zero, zero, zero, zero, zero
    error = tl.sum(zero, 0)
    best = error - 1.0
    count = 0
    going = tl.load(done_ptr + p) == 0
    while going:
        count += 1
        if SYMMETRIC:
            # Potentials of the columns are those of the rows, in the other layout.
            other = tl.sum(tl.where(i[:, None] == j[None, :], phi[:, None], 0.0), 0)
            sums = tl.sum(density(scores, phi, other) * b[None, :], 1)
            error = tl.sum(a * tl.abs(sums - 1.0), 0)
            residual = (2.0 / 3.0) * correction(sums)
            own = correction(sums)
        else:
            plan = density(scores, phi, gamma)
            columns = tl.sum(plan * a[:, None], 0)
            move = correction(columns)
            v = scaling(columns, move)
            gamma += move
            sums = tl.sum(plan * (b * v)[None, :], 1)
            error = tl.sum(a * tl.abs(sums - 1.0), 0) + tl.sum(b * tl.abs(columns * v - 1.0), 0)
            own = correction(sums)
            residual = own - tl.sum(a * own, 0)  # a constant moves from one side to the other: no progress
        going = (count < max_iters) & ((error > tolerance) | (tolerance == 0.0))
        following, last_phi, last_residual, best, q1, w1, q2, w2, q3, w3 = mix(
            phi, residual, error, a, last_phi, last_residual, best, q1, w1, q2, w2, q3, w3
        )
        # The last round only measures; a point of weight zero ends at its half-step.
        phi = tl.where(going, following, tl.where(a > 0, phi, phi + own))
    tl.store(phi_ptr + p * n + i, phi, mask=i < n)
    if not SYMMETRIC:
        tl.store(gamma_ptr + p * m + j, gamma, mask=j < m)
    tl.store(error_ptr + p, error)
    tl.store(count_ptr + p, count)


def solve_small(
    layout: Layout, phi: Tensor, gamma: Tensor, state: State, tolerance: float, max_iters: int
) -> None:
    """One launch; ``phi``, ``gamma`` and ``state`` hold the answer."""
    bm, bn = (max(16, triton.next_power_of_2(k)) for k in (layout.n, layout.m))
    small_kernel[(layout.batch,)](
        layout.left,
        layout.right,
        layout.a,
        layout.b,
        phi,
        gamma,
        state.error,
        state.count,
        state.done,
        tolerance,
        max_iters,
        layout.n,
        layout.m,
        **layout.constants,
        BM=bm,
        BN=bn,
        SYMMETRIC=layout.symmetric,
        num_warps=4 if bm * bn <= 4096 else 8,
    )
