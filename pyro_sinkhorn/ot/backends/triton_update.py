r"""The step between two passes over tiles: residual, error, Anderson mixing, whether to go on. One launch.

Vectors too long for the registers of a program are swept five times. The mixing is that of
:func:`~pyro_sinkhorn.ot.backends.triton_parts.mix`: orthonormal differences of residuals, the oldest leaving.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from pyro_sinkhorn.ot.backends.triton_layout import Layout, State
from pyro_sinkhorn.ot.backends.triton_parts import DEPENDENT, RESTART, bounded, correction

#: Pairs of differences remembered.
MEMORY = 3


@dataclass(frozen=True)
class Memory:
    """Scratch of one solve.

    sums:     row sums in parts, ``(B, splits, n)``
    vectors:  residual, last residual, last point, then :data:`MEMORY` differences of residuals and as many of points, then what
              they change,
              ``(B, 4 + 2 MEMORY, n)``
    best:     the smallest error, negative at first, ``(B,)``
    """

    sums: Tensor
    vectors: Tensor
    best: Tensor

    @staticmethod
    def of(layout: Layout, splits: int) -> Memory:
        new = layout.a.new_zeros
        shape = layout.batch, layout.n
        return Memory(
            new(shape[0], splits, shape[1]), new(shape[0], 4 + 2 * MEMORY, shape[1]), new(shape[0]) - 1.0
        )


@triton.jit(do_not_specialize=["max_iters", "splits", "blocks"])
def update_kernel(
    weight_ptr,
    phi_ptr,
    sums_ptr,
    column_error_ptr,
    vectors_ptr,
    best_ptr,
    error_ptr,
    count_ptr,
    done_ptr,
    tolerance,
    max_iters,
    n,
    splits,
    blocks,
    SYMMETRIC: tl.constexpr,
    MEMORY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program p moves the potential of problem p. The slot of a new difference is the round's number modulo MEMORY."""
    p = tl.program_id(0)
    if tl.load(done_ptr + p) == 0:
        weight_ptr += p * n
        phi_ptr += p * n
        sums_ptr += (p * splits).to(tl.int64) * n
        residual_ptr = vectors_ptr + (p * (4 + 2 * MEMORY)).to(tl.int64) * n
        last_residual_ptr, last_phi_ptr, q_ptr = residual_ptr + n, residual_ptr + 2 * n, residual_ptr + 3 * n
        w_ptr = q_ptr + MEMORY * n
        change_ptr = w_ptr + MEMORY * n
        error = 0.0
        mean = 0.0
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < n
            sums = tl.zeros([BLOCK], tl.float32)
            for split in range(0, splits):
                sums += tl.load(sums_ptr + split * n + i, mask=inside, other=0.0)
                if SYMMETRIC:  # the next pass adds to it
                    tl.store(sums_ptr + split * n + i, tl.zeros([BLOCK], tl.float32), mask=inside)
            weight = tl.load(weight_ptr + i, mask=inside, other=0.0)
            own = correction(sums)
            error += tl.sum(weight * tl.abs(sums - 1.0), 0)
            mean += tl.sum(weight * own, 0)
            tl.store(residual_ptr + i, own, mask=inside)
        if SYMMETRIC:
            share = 2.0 / 3.0
            mean = 0.0
        else:
            share = 1.0
            for block in range(0, blocks):
                error += tl.load(column_error_ptr + p * blocks + block)
        count = tl.load(count_ptr + p) + 1
        going = (count < max_iters) & ((error > tolerance) | (tolerance == 0.0))
        best = tl.load(best_ptr + p)
        remember = error <= RESTART * best
        back = (best >= 0) & (error > RESTART * best)
        kept = tl.where(back, 0, n)  # where the last point and residual are replaced
        tl.store(error_ptr + p, error)
        best = tl.where(remember, tl.minimum(best, error), tl.where(back, best, error))
        tl.store(best_ptr + p, best)
        tl.store(count_ptr + p, count)
        tl.store(done_ptr + p, tl.where(going, 0, 1))
        tl.debug_barrier()

        # Sweep 2: how much of the new difference lies along those remembered. Forgotten ones become zero.
        slot = count % MEMORY
        length = 0.0
        k = tl.arange(0, 4)
        along = tl.zeros([4], tl.float32)
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < n
            weight = tl.load(weight_ptr + i, mask=inside, other=0.0)
            residual = share * (tl.load(residual_ptr + i, mask=inside, other=0.0) - mean)
            dr = residual - tl.load(last_residual_ptr + i, mask=inside, other=0.0)
            length += tl.sum(weight * dr * dr, 0)
            for s in range(0, MEMORY):
                q = tl.load(q_ptr + s * n + i, mask=inside, other=0.0)
                along += tl.where(k == s, tl.sum(weight * q * dr, 0), 0.0)
                forget = i < tl.where(remember, 0, n)
                tl.store(q_ptr + s * n + i, tl.zeros([BLOCK], tl.float32), mask=forget)
                tl.store(w_ptr + s * n + i, tl.zeros([BLOCK], tl.float32), mask=forget)
        tl.debug_barrier()

        # Sweep 3: what is left of it, in place of the last residual and point, and how much of the residual lies along
        # each of the differences.
        left = 0.0
        ahead = 0.0
        reach = tl.zeros([4], tl.float32)
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < n
            weight = tl.load(weight_ptr + i, mask=inside, other=0.0)
            phi = tl.load(phi_ptr + i, mask=inside, other=0.0)
            residual = share * (tl.load(residual_ptr + i, mask=inside, other=0.0) - mean)
            dr = residual - tl.load(last_residual_ptr + i, mask=inside, other=0.0)
            dp = phi - tl.load(last_phi_ptr + i, mask=inside, other=0.0)
            for s in range(0, MEMORY):
                h = tl.sum(tl.where(k == s, along, 0.0), 0)
                q = tl.load(q_ptr + s * n + i, mask=inside, other=0.0)
                dr -= h * q
                dp -= h * tl.load(w_ptr + s * n + i, mask=inside, other=0.0)
                reach += tl.where(k == s, tl.sum(weight * q * residual, 0), 0.0)
            left += tl.sum(weight * dr * dr, 0)
            ahead += tl.sum(weight * dr * residual, 0)
            tl.store(last_residual_ptr + i, dr, mask=i < kept)
            tl.store(last_phi_ptr + i, dp, mask=i < kept)
        new = remember & (left > DEPENDENT * length)
        unit = tl.where(new, tl.rsqrt(tl.where(new, left, 1.0)), 0.0)
        slot = tl.where(new, slot, -1)  # none is replaced
        reach = tl.where(k == slot, unit * ahead, reach)
        tl.debug_barrier()

        # Sweep 4: it takes the slot of the oldest; what all of them change in the plain step, and how much.
        largest = 0.0
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < n
            weight = tl.load(weight_ptr + i, mask=inside, other=0.0)
            last_residual = tl.load(last_residual_ptr + i, mask=inside, other=0.0)
            last_phi = tl.load(last_phi_ptr + i, mask=inside, other=0.0)
            change = tl.zeros([BLOCK], tl.float32)
            for s in range(0, MEMORY):
                replaced = i < tl.where(slot == s, n, 0)
                q = tl.where(
                    replaced, unit * last_residual, tl.load(q_ptr + s * n + i, mask=inside, other=0.0)
                )
                w = tl.where(replaced, unit * last_phi, tl.load(w_ptr + s * n + i, mask=inside, other=0.0))
                tl.store(q_ptr + s * n + i, q, mask=replaced)
                tl.store(w_ptr + s * n + i, w, mask=replaced)
                change += tl.sum(tl.where(k == s, reach, 0.0), 0) * (q + w)
            change = tl.where(weight > 0, change, 0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(change), 0))
            tl.store(change_ptr + i, change, mask=inside)
        part = bounded(largest)
        tl.debug_barrier()

        # Sweep 5: the step.
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < n
            weight = tl.load(weight_ptr + i, mask=inside, other=0.0)
            phi = tl.load(phi_ptr + i, mask=inside, other=0.0)
            own = tl.load(residual_ptr + i, mask=inside, other=0.0)
            residual = share * (own - mean)
            following = phi + residual - part * tl.load(change_ptr + i, mask=inside, other=0.0)
            last_residual = tl.load(last_residual_ptr + i, mask=inside, other=0.0)
            last_phi = tl.load(last_phi_ptr + i, mask=inside, other=0.0)
            following = tl.where(back, last_phi + last_residual, following)
            # The last round only measures; a point of weight zero ends at its half-step.
            final = tl.where(weight > 0, phi, phi + own)
            tl.store(last_phi_ptr + i, phi, mask=i < kept)
            tl.store(last_residual_ptr + i, residual, mask=i < kept)
            tl.store(phi_ptr + i, tl.where(going, following, final), mask=inside)


def update(
    layout: Layout,
    phi: Tensor,
    state: State,
    memory: Memory,
    column_error: Tensor | None,
    tolerance: float,
    max_iters: int,
    largest_block: int = 2048,
) -> None:
    """Move ``phi`` and ``state`` on by one round. ``column_error`` in parts, ``(B, blocks)``; a symmetric problem has none."""
    block = min(largest_block, triton.next_power_of_2(layout.n))
    update_kernel[(layout.batch,)](
        layout.a,
        phi,
        memory.sums,
        memory.best if column_error is None else column_error,
        memory.vectors,
        memory.best,
        state.error,
        state.count,
        state.done,
        tolerance,
        max_iters,
        layout.n,
        memory.sums.shape[1],
        0 if column_error is None else column_error.shape[1],
        SYMMETRIC=layout.symmetric,
        MEMORY=MEMORY,
        BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
    )
