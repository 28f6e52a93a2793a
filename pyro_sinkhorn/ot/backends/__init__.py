"""How problems are solved: every backend maps a :class:`~pyro_sinkhorn.ot.problem.Problem` to its solution.

===============  ================================================================  =======================================
name             method                                                            for
===============  ================================================================  =======================================
``"auto"``       one of those below, by size, device and cost                      everything
``"dense"``      scalings of a matrix made once, Anderson mixing                   any cost, while the matrices fit
``"streaming"``  the same, tiles of the matrix made again in every iteration       squared distances of large clouds
``"triton"``     kernels that keep the plan on the chip, or make its tiles again   CUDA, float32
``"flash"``      flash-sinkhorn, an optional extra, kept for comparison            CUDA, float32, squared distances
``"log"``        Sinkhorn's algorithm in the log domain                            the reference: slow, hard to upset
===============  ================================================================  =======================================
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache

import torch

from pyro_sinkhorn.ot.backends.dense import solve_dense
from pyro_sinkhorn.ot.backends.flash import solve_flash
from pyro_sinkhorn.ot.backends.log_domain import solve_log_domain
from pyro_sinkhorn.ot.backends.streaming import solve_streaming
from pyro_sinkhorn.ot.backends.triton_backend import MOST_PROBLEMS, solve_triton
from pyro_sinkhorn.ot.problem import Problem, Solution

Backend = Callable[[Problem], Solution]

#: Backends by name. *How* one executes a batch is its own affair; what it returns is a solution.
BACKENDS: dict[str, Backend] = {
    "log": solve_log_domain,
    "dense": solve_dense,
    "streaming": solve_streaming,
    "triton": solve_triton,
    "flash": solve_flash,
}

#: Bytes of matrices above which ``"auto"`` takes tiles instead, for costs that have them.
DENSE_BYTES = 2**30


def choose(problem: Problem) -> str:
    """The name of the backend that ``"auto"`` stands for."""
    squared = problem.cost == "sqeuclidean"
    single = problem.x.is_cuda and problem.x.dtype == torch.float32
    if single and squared and len(problem.x) <= MOST_PROBLEMS and kernels_agree(problem.x.device):
        return "triton"
    matrices = problem.a.numel() * problem.b.shape[-1] * problem.x.element_size()
    return "streaming" if squared and matrices > DENSE_BYTES else "dense"


@cache
def kernels_agree(device: torch.device) -> bool:
    """Whether the kernels give the dense backend's answers on this device, tried once on a small problem of each regime.

    They are compiled on the machine, by whichever Triton it has: what no test of ours has seen is looked at before it is
    relied on. Where they fail or differ, a warning says so and ``"auto"`` does without.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "backend='auto' looks at the kernels once before it uses them, which cannot be captured in a CUDA graph: name "
            "the backend, or solve once before the capture"
        )
    rng = torch.Generator().manual_seed(0)
    for n in (64, 256, 1_100):
        # Whatever dtype and device are the default at this moment.
        x, y = (
            torch.randn(2, n, 3, generator=rng, dtype=torch.float32, device="cpu").to(device) for _ in "xy"
        )
        weights = torch.full((2, n), 1 / n, dtype=torch.float32, device=device)
        problem = Problem(x, y, weights, weights, torch.ones_like(weights[:, 0]), tolerance=1e-4)
        try:
            kernels, dense = solve_triton(problem), solve_dense(problem)
            assert kernels.coupling is not None and dense.coupling is not None
            moved, expected = kernels.coupling.product(y), dense.coupling.product(y)
            agree = torch.allclose(moved, expected, atol=1e-2 / n, rtol=1e-2) and bool(
                kernels.converged.all()
            )
            reason = "they differ from the dense backend"
        except Exception as error:
            agree, reason = False, f"{type(error).__name__}: {error}"
        if not agree:
            warnings.warn(
                f"the Triton kernels for clouds of {n} points are not used on {device}: {reason}. Transport is solved by "
                "the dense backend instead, which is slower; please report this with the versions of torch and triton",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
    return True


def backend_named(name: str, problem: Problem) -> Backend:
    """The backend of that name, for this problem where it is ``"auto"``."""
    check_name(name)
    return BACKENDS[choose(problem) if name == "auto" else name]


def check_name(name: str) -> None:
    """A name there is, or a ``ValueError`` that lists them."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected 'auto' or one of {sorted(BACKENDS)}")
