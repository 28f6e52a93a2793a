"""How problems are solved: every backend maps a :class:`~pyro_sinkhorn.ot.problem.Problem` to its solution.

=============  ==================================================================  =============================
name           method                                                              for
=============  ==================================================================  =============================
``"auto"``     one of those below, by size, device and cost                        everything
``"dense"``    scalings of a matrix made once, Anderson mixing                     any cost, while the matrices fit
``"streaming"``  the same, tiles of the matrix made again in every iteration        squared distances of large clouds
``"log"``      Sinkhorn's algorithm in the log domain                              the reference: slow, hard to upset
=============  ==================================================================  =============================
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyro_sinkhorn.ot.backends.dense import solve_dense
from pyro_sinkhorn.ot.backends.log_domain import solve_log_domain
from pyro_sinkhorn.ot.backends.streaming import solve_streaming
from pyro_sinkhorn.ot.problem import Problem, Solution

Backend = Callable[[Problem], Solution]

#: Backends by name. *How* one executes a batch is its own affair; what it returns is a solution.
BACKENDS: dict[str, Backend] = {"log": solve_log_domain, "dense": solve_dense, "streaming": solve_streaming}

#: Bytes of matrices above which ``"auto"`` takes tiles instead, for costs that have them.
DENSE_BYTES = 2**30


def choose(problem: Problem) -> str:
    """The name of the backend that ``"auto"`` stands for."""
    if problem.x.dtype not in (torch.float32, torch.float64):
        return "log"
    matrices = problem.a.numel() * problem.b.shape[-1] * problem.x.element_size()
    if matrices > DENSE_BYTES and problem.cost == "sqeuclidean":
        return "streaming"
    return "dense"


def backend_named(name: str, problem: Problem) -> Backend:
    """The backend of that name, or a ``ValueError`` that lists the names there are."""
    if name == "auto":
        return BACKENDS[choose(problem)]
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected 'auto' or one of {sorted(BACKENDS)}")
    return BACKENDS[name]
