r"""Regime 2, up to 1024 points: all programs at work at once, each with a panel of 16 columns of the scores in registers.

The matrix of scores is built first, by one product. A program makes its columns exact without asking anyone and leaves the
part that they have in every row's sum. After a barrier of the programs of a problem every one of them adds up the parts and
makes the same step of Anderson mixing, so nothing else is passed on: one barrier an iteration. Parts of even and odd
iterations lie apart, because a program may be one barrier ahead of another. A symmetric problem has its sums whole.

The barrier needs all programs of a problem on the device together, which a cooperative launch guarantees or refuses;
several problems share the device in groups. Where that is not possible (:data:`PROGRAMS` says how many there are to a
multiprocessor), and in Triton's interpreter, which runs one program after the other, each iteration is a launch of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyro_sinkhorn.ot.backends.triton_layout import Layout, State
from pyro_sinkhorn.ot.backends.triton_parts import correction, density, log_weight, mix, scaling, score_tile
from pyro_sinkhorn.ot.backends.triton_tiles import LOOK_AFTER, half_step_kernel, may_look

#: Points of the larger cloud at most.
LARGEST = 1024
#: Columns of a panel.
PANEL = 16
#: Programs that a multiprocessor surely holds, for panels of up to 512 rows and for longer ones: half of its registers.
PROGRAMS = {512: 2, 1024: 1}
#: Parts of the row sums that a program reads together.
AT_ONCE = tl.constexpr(8)
#: Vectors that a program remembers between launches.
VECTORS = tl.constexpr(9)


@triton.jit
def produce(scores, phi, gamma, a, b, i, j, n, m, part_ptr, off_ptr, panel, SYMMETRIC: tl.constexpr):
    """Exact columns for this panel, and its part in the row sums; returns the new potentials of its columns."""
    if SYMMETRIC:
        own = tl.sum(tl.where(i[None, :] == j[:, None], phi[None, :], 0.0), 1)
        sums = tl.sum(density(scores, own, phi) * a[None, :], 1)
        tl.store(part_ptr + j, sums, mask=j < m, cache_modifier=".cg")
    else:
        plan = density(scores, gamma, phi)
        columns = tl.sum(plan * a[None, :], 1)
        move = correction(columns)
        v = scaling(columns, move)
        gamma += move
        part = tl.sum(plan * (b * v)[:, None], 0)
        tl.store(part_ptr + panel * n + i, part, mask=i < n, cache_modifier=".cg")
        tl.store(off_ptr + panel, tl.sum(b * tl.abs(columns * v - 1.0), 0), cache_modifier=".cg")
    return gamma


@triton.jit
def consume(a, i, n, part_ptr, off_ptr, panels, SYMMETRIC: tl.constexpr):
    """Row sums of all panels: error, what a full half-step adds, and what the iteration adds."""
    if SYMMETRIC:
        sums = tl.load(part_ptr + i, mask=i < n, other=1.0, cache_modifier=".cg")
        error = tl.sum(a * tl.abs(sums - 1.0), 0)
        own = correction(sums)
        residual = (2.0 / 3.0) * own
    else:
        sums = tl.zeros(i.shape, tl.float32)
        error = 0.0
        # Several parts at once: one after the other they would take a trip to memory each.
        for start in range(0, panels, AT_ONCE):
            c = start + tl.arange(0, AT_ONCE)
            inside = (c < panels)[:, None] & (i < n)[None, :]
            parts = tl.load(
                part_ptr + c[:, None] * n + i[None, :], mask=inside, other=0.0, cache_modifier=".cg"
            )
            sums += tl.sum(parts, 0)
            error += tl.sum(tl.load(off_ptr + c, mask=c < panels, other=0.0, cache_modifier=".cg"), 0)
        error += tl.sum(a * tl.abs(sums - 1.0), 0)
        own = correction(sums)
        residual = own - tl.sum(a * own, 0)
    return error, own, residual


@triton.jit
def first_columns(scores, phi, gamma, a):
    """The half-step of a panel with a maximum."""
    exponent = scores + (phi + log_weight(a))[None, :]
    top = tl.max(exponent, 1)
    return -top - tl.log2(tl.sum(tl.exp2(exponent - top[:, None]), 1))


@triton.jit
def wait_for_all(counter_ptr, arrivals):
    """Until that many programs of the group have arrived here, this one included."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(counter_ptr, 0, sem="acq_rel", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=["max_iters", "batch", "panels"])
def panel_kernel(
    scores_ptr,
    a_ptr,
    b_ptr,
    phi_ptr,
    gamma_ptr,
    part_ptr,
    off_ptr,
    counter_ptr,
    error_ptr,
    count_ptr,
    done_ptr,
    tolerance,
    max_iters,
    batch,
    panels,
    n,
    m,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Programs ``(panel, group)``; a group takes every so manieth problem. ``ALONE``: one panel needs no barrier."""
    panel, group = tl.program_id(0), tl.program_id(1)
    i, j = tl.arange(0, BM), panel * BN + tl.arange(0, BN)
    arrivals = 0
    for p in range(group, batch, tl.num_programs(1)):
        going = tl.load(done_ptr + p) == 0
        scores = score_tile(
            scores_ptr + p * n * m, scores_ptr, j, i, m, n, n, 1, 16, 16, BN, BM, True, "ieee"
        )
        a = tl.load(a_ptr + p * n + i, mask=i < n, other=0.0)
        b = tl.load(b_ptr + p * m + j, mask=j < m, other=0.0)
        phi = tl.load(phi_ptr + p * n + i, mask=i < n, other=0.0)
        gamma = tl.load(gamma_ptr + p * m + j, mask=j < m, other=0.0)
        if not SYMMETRIC:
            tl.store(gamma_ptr + p * m + j, first_columns(scores, phi, gamma, a), mask=j < m)
            tl.debug_barrier()
        zero = phi * 0.0
        q1, w1, q2, w2, q3, w3, last_phi, last_residual = zero, zero, zero, zero, zero, zero, zero, zero
        error = tl.sum(zero, 0)
        best = error - 1.0
        count = 0
        while going:
            part = part_ptr + (2 * p + count % 2) * panels * n
            off = off_ptr + (2 * p + count % 2) * panels
            # In memory, where only this program looks: carried along in registers it breaks the compiler of Triton 3.6.
            gamma = tl.load(gamma_ptr + p * m + j, mask=j < m, other=0.0)
            gamma = produce(scores, phi, gamma, a, b, i, j, n, m, part, off, panel, SYMMETRIC)
            tl.store(gamma_ptr + p * m + j, gamma, mask=j < m)
            arrivals += panels
            if ALONE:
                tl.debug_barrier()
            else:
                wait_for_all(counter_ptr + group, arrivals)
            error, own, residual = consume(a, i, n, part, off, panels, SYMMETRIC)
            count += 1
            going = (count < max_iters) & ((error > tolerance) | (tolerance == 0.0))
            following, last_phi, last_residual, best, q1, w1, q2, w2, q3, w3 = mix(
                phi, residual, error, a, last_phi, last_residual, best, q1, w1, q2, w2, q3, w3
            )
            # The last round only measures; a point of weight zero ends at its half-step.
            phi = tl.where(going, following, tl.where(a > 0, phi, phi + own))
        if (count > 0) & (panel == 0):
            tl.store(phi_ptr + p * n + i, phi, mask=i < n)
            tl.store(error_ptr + p, error)
            tl.store(count_ptr + p, count)


@triton.jit(do_not_specialize=["round", "max_iters", "panels"])
def panel_step_kernel(
    scores_ptr,
    a_ptr,
    b_ptr,
    phi_ptr,
    gamma_ptr,
    part_ptr,
    off_ptr,
    memory_ptr,
    best_ptr,
    error_ptr,
    count_ptr,
    done_ptr,
    tolerance,
    round,
    max_iters,
    panels,
    n,
    m,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """Programs ``(panel, problem)``: what follows the barrier of the round before, and what precedes this round's."""
    panel, p = tl.program_id(0), tl.program_id(1)
    if tl.load(done_ptr + p) == 0:
        i, j = tl.arange(0, BM), panel * BN + tl.arange(0, BN)
        scores = score_tile(
            scores_ptr + p * n * m, scores_ptr, j, i, m, n, n, 1, 16, 16, BN, BM, True, "ieee"
        )
        a = tl.load(a_ptr + p * n + i, mask=i < n, other=0.0)
        b = tl.load(b_ptr + p * m + j, mask=j < m, other=0.0)
        gamma = tl.load(gamma_ptr + p * m + j, mask=j < m, other=0.0)
        # Every program keeps its own copy of the memory, which no other reads: all copies are equal.
        memory = memory_ptr + (p * panels + panel) * VECTORS * BM + i
        phi = tl.load(phi_ptr + p * n + i, mask=i < n, other=0.0)
        going = max_iters > 0
        if round == 0:
            if not SYMMETRIC:
                gamma = first_columns(scores, phi, gamma, a)
            tl.store(memory, phi)
        else:
            phi = tl.load(memory)
            part = part_ptr + (2 * p + (round - 1) % 2) * panels * n
            off = off_ptr + (2 * p + (round - 1) % 2) * panels
            error, own, residual = consume(a, i, n, part, off, panels, SYMMETRIC)
            going = (round < max_iters) & ((error > tolerance) | (tolerance == 0.0))
            following, last_phi, last_residual, best, q1, w1, q2, w2, q3, w3 = mix(
                phi,
                residual,
                error,
                a,
                tl.load(memory + 7 * BM),
                tl.load(memory + 8 * BM),
                tl.load(best_ptr + p * panels + panel),
                tl.load(memory + BM),
                tl.load(memory + 2 * BM),
                tl.load(memory + 3 * BM),
                tl.load(memory + 4 * BM),
                tl.load(memory + 5 * BM),
                tl.load(memory + 6 * BM),
            )
            tl.debug_barrier()
            tl.store(memory + BM, q1)
            tl.store(memory + 2 * BM, w1)
            tl.store(memory + 3 * BM, q2)
            tl.store(memory + 4 * BM, w2)
            tl.store(memory + 5 * BM, q3)
            tl.store(memory + 6 * BM, w3)
            tl.store(memory + 7 * BM, last_phi)
            tl.store(memory + 8 * BM, last_residual)
            tl.store(best_ptr + p * panels + panel, best)
            phi = tl.where(going, following, tl.where(a > 0, phi, phi + own))
            tl.store(memory, phi)
            if panel == 0:
                tl.store(error_ptr + p, error)
                tl.store(count_ptr + p, round)
                if going == 0:
                    # Programs of this launch that begin after this have nothing left to do.
                    tl.store(phi_ptr + p * n + i, phi, mask=i < n)
                    tl.store(done_ptr + p, 1)
        if going:
            part = part_ptr + (2 * p + round % 2) * panels * n
            off = off_ptr + (2 * p + round % 2) * panels
            gamma = produce(scores, phi, gamma, a, b, i, j, n, m, part, off, panel, SYMMETRIC)
            tl.store(gamma_ptr + p * m + j, gamma, mask=j < m)


def solve_panel(
    layout: Layout,
    phi: Tensor,
    gamma: Tensor,
    state: State,
    tolerance: float,
    max_iters: int,
    persistent: bool | None = None,
) -> None:
    """``phi``, ``gamma`` and ``state`` hold the answer.

    :param persistent: one cooperative launch, or one an iteration; by whether the device holds the programs if None
    """
    batch, n, m = layout.batch, layout.n, layout.m
    panels = triton.cdiv(m, PANEL)
    bm = max(16, triton.next_power_of_2(n))
    options: dict[str, Any] = {
        "BM": bm,
        "BN": PANEL,
        "SYMMETRIC": layout.symmetric,
        "num_warps": 4 if bm <= 512 else 8,
    }
    scores = layout.transposed_scores()
    begin(layout, phi, gamma)
    parts, off = phi.new_zeros(batch, 2, panels, n), phi.new_zeros(batch, 2, panels)
    groups = min(batch, capacity(phi.device, bm) // panels)
    if persistent is None:
        persistent = phi.is_cuda and groups > 0
    shared = (scores, layout.a, layout.b, phi, gamma, parts, off)
    flags = (state.error, state.count, state.done)
    if persistent:
        counters = torch.zeros(max(groups, 1), dtype=torch.int32, device=phi.device)
        if phi.is_cuda:
            options["launch_cooperative_grid"] = True
        panel_kernel[(panels, max(groups, 1))](
            *shared, counters, *flags, tolerance, max_iters, batch, panels, n, m, **options, ALONE=panels == 1
        )
        return
    memory, best = phi.new_zeros(batch, panels, VECTORS.value, bm), phi.new_full((batch, panels), -1.0)
    for round in range(max_iters + 1):
        panel_step_kernel[(panels, batch)](
            *shared, memory, best, *flags, tolerance, round, max_iters, panels, n, m, **options
        )
        if round % LOOK_AFTER == 0 and may_look(phi) and bool(state.done.all()):
            break


def begin(layout: Layout, phi: Tensor, gamma: Tensor) -> None:
    """The first row potentials, from where ``gamma`` begins."""
    tile: dict[str, Any] = {"BR": 64, "BC": 64, "num_warps": 4}
    share, source = 1.0, gamma
    if layout.symmetric:
        share, source = 2 / 3, phi.clone()  # what is read must not move meanwhile
    half_step_kernel[(triton.cdiv(layout.n, 64), layout.batch)](
        layout.left,
        layout.right,
        layout.b,
        source,
        phi,
        layout.n,
        layout.m,
        layout.m,
        1,
        share,
        **layout.constants,
        **tile,
    )


def capacity(device: torch.device, rows: int) -> int:
    """Programs with panels of so many rows that the device surely holds at once."""
    processors = 132
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * next(programs for longest, programs in PROGRAMS.items() if rows <= longest)
