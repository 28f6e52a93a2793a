r"""The ``triton`` backend: float32 problems on a CUDA device, in the regime that their size asks for.

==========================  ===============================================================================================
up to 128 points            a program a problem, the whole solve in one launch (:mod:`.triton_small`)
up to 1024 points           a panel of 16 columns a program, all of them at work at once, one barrier an iteration
                            (:mod:`.triton_panel`)
any size                    tiles computed again in every pass (:mod:`.triton_tiles`); memory ``O(n + m)``
==========================  ===============================================================================================

All three iterate on the row potentials with exact columns, in base 2, under Anderson mixing with memory 3 on the logarithms
of the scalings; a symmetric problem has one potential and moves it 2/3 of a half-step. Value and gradients come from
products with the plan whose tiles are computed again. Squared Euclidean costs never see a cost matrix; any other cost is
solved from its matrix, which then is what its gradient goes through.

Inner products take three TF32 products each, which is float32 accuracy; after
``torch.set_float32_matmul_precision("high")`` they take one, for a relative error of the gradient of some 1e-3.
"""

from __future__ import annotations

import contextlib
import os
from typing import Literal

import torch

from pyro_sinkhorn.ot.backends.triton_layout import State, lay_out
from pyro_sinkhorn.ot.problem import Coupling, Problem, Solution

Regime = Literal["small", "panel", "tiles"]

#: Of a batch: what a CUDA grid holds in its second and third dimension.
MOST_PROBLEMS = 65_535


@torch.no_grad()
def solve_triton(problem: Problem, regime: Regime | None = None) -> Solution:
    """Solve a batch of problems; no number is read back from the device while a CUDA graph is captured.

    :param problem: in float32, on a CUDA device (with ``TRITON_INTERPRET=1`` also on the processor, slowly, for tests).
        While a graph is captured, ``n_iters`` of the solution is ``max_iters``
    :param regime: by size if None
    :raises ValueError: for points that are not float32 on a CUDA device
    :raises ImportError: without Triton, which CUDA builds of torch bring along
    """
    _check(problem)
    layout, phi, gamma = lay_out(problem)
    state = State.of(layout)
    size = max(layout.n, layout.m)
    with _on(problem.x.device):
        from pyro_sinkhorn.ot.backends.triton_panel import LARGEST as LARGEST_PANEL
        from pyro_sinkhorn.ot.backends.triton_panel import solve_panel
        from pyro_sinkhorn.ot.backends.triton_products import TritonCoupling
        from pyro_sinkhorn.ot.backends.triton_small import LARGEST, solve_small
        from pyro_sinkhorn.ot.backends.triton_tiles import may_look, solve_tiles

        if regime is None:
            if size <= LARGEST:
                regime = "small"
            else:
                regime = "panel" if size <= LARGEST_PANEL else "tiles"
        solver = {"small": solve_small, "panel": solve_panel, "tiles": solve_tiles}[regime]
        solver(layout, phi, gamma, state, problem.tolerance, problem.max_iters)
    if layout.symmetric:
        gamma = phi
    f, g = layout.to_cost_units(phi, gamma)
    error = state.error.masked_fill(layout.invalid, torch.nan)
    coupling: Coupling | None = None if layout.dense else TritonCoupling(layout, phi, gamma)
    n_iters = int(state.count.max()) if may_look(phi) else problem.max_iters
    return Solution(f, g, error, n_iters, error <= problem.tolerance, coupling=coupling)


def _check(problem: Problem) -> None:
    """What the kernels cannot take, in words."""
    points = problem.x
    try:
        import triton  # noqa: F401
    except ImportError:
        raise ImportError(
            "backend 'triton' needs the package triton, which CUDA builds of torch install on Linux: install such a build, "
            "or take backend='dense' or 'streaming'"
        ) from None
    if len(points) > MOST_PROBLEMS:
        raise ValueError(
            f"backend 'triton' solves {MOST_PROBLEMS} problems at once at most, not {len(points)}: split the batch, or "
            "take backend='dense'"
        )
    if points.dtype != torch.float32:
        raise ValueError(
            f"backend 'triton' computes in float32 and the points are {points.dtype}: convert points and weights with "
            ".float(), or take backend='dense'"
        )
    if not points.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend 'triton' runs on CUDA devices and the points are on {points.device}: move them with .cuda(), or take "
            "backend='dense' or 'streaming'"
        )


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Kernels are launched on the current device: make it that of the points."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
