r"""Regime 3, clouds of any size: tiles of scores are computed again in every pass, nothing ``n x m`` is held.

A general iteration is a pass of column sums and a pass of row sums, each program summing over a stretch of the other
cloud. Feeding both sums from one tile would make every pass a parallel update of both potentials, which converges half as
fast: on the clouds of the benchmarks it took as many passes with Anderson mixing as alternating takes, or more.
A symmetric problem has one potential. There each tile above the diagonal feeds its rows and its columns, and an
iteration is half a pass; its sums meet in atomic additions, whose order leaves the last digits to chance.

Launches are the same whatever the data: problems that are done skip their work. While a CUDA graph is captured nothing is
read back; otherwise the flags are looked at after every :data:`LOOK_AFTER` iterations.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyro_sinkhorn.ot.backends.triton_layout import Layout, State
from pyro_sinkhorn.ot.backends.triton_parts import (
    correction,
    density,
    log_weight,
    scaling,
    score_tile,
)
from pyro_sinkhorn.ot.backends.triton_update import Memory, update

#: Iterations between two looks at whether all problems are done.
LOOK_AFTER = 8
#: Rows and columns of a tile, and the warps that compute it.
TILE: dict[str, Any] = {"BR": 64, "BC": 64, "num_warps": 4, "num_stages": 2}
#: Elements of a vector that a program takes at once.
STRETCH = 1024
#: Below any exponent, those of weights of zero included.
NOTHING_YET = tl.constexpr(-3.0e30)


@triton.jit
def half_step_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    potential_ptr,
    out_ptr,
    n,
    m,
    stride_row,
    stride_col,
    share,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    r"""With a running maximum: ``out`` moves by ``share`` of the way to
    :math:`-\log_2\sum_j w_j 2^{\gamma_j+S_{ij}}`."""
    p = tl.program_id(1)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    if DENSE:
        x, y = x_ptr + p.to(tl.int64) * n * m, y_ptr
    else:
        x, y = x_ptr + p.to(tl.int64) * n * D, y_ptr + p.to(tl.int64) * m * D
    top = tl.full([BR], NOTHING_YET, tl.float32)
    total = tl.zeros([BR], tl.float32)
    for start in range(0, m, BC):
        cols = start + tl.arange(0, BC)
        scores = score_tile(x, y, rows, cols, n, m, stride_row, stride_col, D, BD, BR, BC, DENSE, PRECISION)
        weight = tl.load(weight_ptr + p * m + cols, mask=cols < m, other=0.0)
        potential = tl.load(potential_ptr + p * m + cols, mask=cols < m, other=0.0)
        exponent = scores + (potential + log_weight(weight))[None, :]
        higher = tl.maximum(top, tl.max(exponent, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(exponent - higher[:, None]), 1)
        top = higher
    old = tl.load(out_ptr + p * n + rows, mask=rows < n, other=0.0)
    tl.store(out_ptr + p * n + rows, old + share * (-top - tl.log2(total) - old), mask=rows < n)


@triton.jit
def sums_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    row_potential_ptr,
    col_potential_ptr,
    sums_ptr,
    done_ptr,
    n,
    m,
    stride_row,
    stride_col,
    stretch,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``sums[p, split, i] = sum_j w_j D_ij`` over the columns of a stretch, ``(B, splits, n)``."""
    split, p = tl.program_id(1), tl.program_id(2)
    if tl.load(done_ptr + p) == 0:
        rows = tl.program_id(0) * BR + tl.arange(0, BR)
        if DENSE:
            x, y = x_ptr + p.to(tl.int64) * n * m, y_ptr
        else:
            x, y = x_ptr + p.to(tl.int64) * n * D, y_ptr + p.to(tl.int64) * m * D
        own = tl.load(row_potential_ptr + p * n + rows, mask=rows < n, other=0.0)
        total = tl.zeros([BR], tl.float32)
        for start in range(split * stretch, tl.minimum(m, (split + 1) * stretch), BC):
            cols = start + tl.arange(0, BC)
            scores = score_tile(
                x, y, rows, cols, n, m, stride_row, stride_col, D, BD, BR, BC, DENSE, PRECISION
            )
            weight = tl.load(weight_ptr + p * m + cols, mask=cols < m, other=0.0)
            other = tl.load(col_potential_ptr + p * m + cols, mask=cols < m, other=0.0)
            total += tl.sum(density(scores, own, other) * weight[None, :], 1)
        splits = tl.num_programs(1)
        tl.store(sums_ptr + (p * splits + split).to(tl.int64) * n + rows, total, mask=rows < n)


@triton.jit
def triangle_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    potential_ptr,
    sums_ptr,
    done_ptr,
    n,
    m,
    stride_row,
    stride_col,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a symmetric problem: ``sums[p, i] += sum_j w_j D_ij``, each tile on or above the diagonal computed once."""
    tl.static_assert(BR == BC)
    block, split, p = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if tl.load(done_ptr + p) == 0:
        rows = block * BR + tl.arange(0, BR)
        if DENSE:
            x, y = x_ptr + p.to(tl.int64) * n * m, y_ptr
        else:
            x, y = x_ptr + p.to(tl.int64) * n * D, y_ptr + p.to(tl.int64) * m * D
        own = tl.load(potential_ptr + p * n + rows, mask=rows < n, other=0.0)
        own_weight = tl.load(weight_ptr + p * n + rows, mask=rows < n, other=0.0)
        total = tl.zeros([BR], tl.float32)
        for other_block in range(block + split, tl.cdiv(n, BC), tl.num_programs(1)):
            cols = other_block * BC + tl.arange(0, BC)
            scores = score_tile(
                x, y, rows, cols, n, m, stride_row, stride_col, D, BD, BR, BC, DENSE, PRECISION
            )
            weight = tl.load(weight_ptr + p * n + cols, mask=cols < n, other=0.0)
            other = tl.load(potential_ptr + p * n + cols, mask=cols < n, other=0.0)
            plan = density(scores, own, other)
            total += tl.sum(plan * weight[None, :], 1)
            below = cols < tl.where(other_block > block, n, 0)
            tl.atomic_add(
                sums_ptr + p * n + cols, tl.sum(plan * own_weight[:, None], 0), mask=below, sem="relaxed"
            )
        tl.atomic_add(sums_ptr + p * n + rows, total, mask=rows < n, sem="relaxed")


@triton.jit
def columns_kernel(weight_ptr, gamma_ptr, sums_ptr, error_ptr, done_ptr, m, splits, BLOCK: tl.constexpr):
    """Makes the columns exact, and says by how much they are not where a move was cut, ``error`` ``(B, blocks)``."""
    block, p = tl.program_id(0), tl.program_id(1)
    if tl.load(done_ptr + p) == 0:
        j = block * BLOCK + tl.arange(0, BLOCK)
        columns = tl.zeros([BLOCK], tl.float32)
        for split in range(0, splits):
            columns += tl.load(sums_ptr + (p * splits + split).to(tl.int64) * m + j, mask=j < m, other=0.0)
        move = correction(columns)
        weight = tl.load(weight_ptr + p * m + j, mask=j < m, other=0.0)
        gamma = tl.load(gamma_ptr + p * m + j, mask=j < m, other=0.0)
        tl.store(gamma_ptr + p * m + j, gamma + move, mask=j < m)
        off = tl.sum(weight * tl.abs(columns * scaling(columns, move) - 1.0), 0)
        tl.store(error_ptr + p * tl.num_programs(0) + block, off)


def solve_tiles(
    layout: Layout,
    phi: Tensor,
    gamma: Tensor,
    state: State,
    tolerance: float,
    max_iters: int,
    splits: int | None = None,
    tile: dict[str, Any] | None = None,
) -> None:
    """``phi``, ``gamma`` and ``state`` hold the answer after a fixed sequence of launches.

    :param splits: stretches that a pass is cut into; as many as keep the device busy by default
    """
    batch, n, m, tile = layout.batch, layout.n, layout.m, tile or TILE
    rows, columns = triton.cdiv(n, tile["BR"]), triton.cdiv(m, tile["BR"])
    splits = splits or stretches(min(rows, columns) * batch, phi.device)
    options = {**layout.constants, **tile}
    x, y = layout.left, layout.right
    along, across = (m, 1), (1, m)  # strides of scores read from memory
    memory = Memory.of(layout, splits=1 if layout.symmetric else splits)
    half_step = half_step_kernel[(rows, batch)]
    if layout.symmetric:
        gamma = phi.clone()  # what is read must not move meanwhile
        half_step(x, y, layout.b, gamma, phi, n, m, *along, 2 / 3, **options)
    else:
        half_step(x, y, layout.b, gamma, phi, n, m, *along, 1.0, **options)
        half_step_kernel[(columns, batch)](
            y_or(x, y, layout), x, layout.a, phi, gamma, m, n, *across, 1.0, **options
        )
        blocks = triton.cdiv(m, STRETCH)
        column_sums, column_error = phi.new_empty(batch, splits, m), phi.new_zeros(batch, blocks)
    for iteration in range(max_iters):
        if layout.symmetric:
            triangle_kernel[(rows, splits, batch)](
                x, y, layout.a, phi, memory.sums, state.done, n, m, *along, **options
            )
            update(layout, phi, state, memory, None, tolerance, max_iters)
        else:
            stretch = whole_tiles(n, splits, tile)
            sums_kernel[(columns, splits, batch)](
                y_or(x, y, layout),
                x,
                layout.a,
                gamma,
                phi,
                column_sums,
                state.done,
                m,
                n,
                *across,
                stretch,
                **options,
            )
            columns_kernel[(blocks, batch)](
                layout.b, gamma, column_sums, column_error, state.done, m, splits, BLOCK=STRETCH
            )
            stretch = whole_tiles(m, splits, tile)
            sums_kernel[(rows, splits, batch)](
                x, y, layout.b, phi, gamma, memory.sums, state.done, n, m, *along, stretch, **options
            )
            update(layout, phi, state, memory, column_error, tolerance, max_iters)
        if iteration % LOOK_AFTER == LOOK_AFTER - 1 and may_look(phi) and bool(state.done.all()):
            break


def y_or(x: Tensor, y: Tensor, layout: Layout) -> Tensor:
    """The right cloud as the rows of a transposed pass; scores read from memory are one matrix for both."""
    return x if layout.dense else y


def whole_tiles(points: int, splits: int, tile: dict[str, Any]) -> int:
    """Points in a stretch: whole tiles, so that no point is in two of them."""
    return triton.cdiv(triton.cdiv(points, splits), tile["BC"]) * tile["BC"]


def stretches(programs: int, device: torch.device) -> int:
    """Into how many stretches a pass is cut so that there are four programs for each multiprocessor."""
    processors = 132
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(16, triton.cdiv(4 * processors, programs)))


def may_look(tensor: Tensor) -> bool:
    """Whether reading from the device is allowed: not while a CUDA graph is being captured."""
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
