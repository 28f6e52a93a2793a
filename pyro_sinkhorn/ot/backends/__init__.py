"""How problems are solved: every backend maps a :class:`~pyro_sinkhorn.ot.problem.Problem` to its solution.

=============  ==================================================================  =============================
name           method                                                              for
=============  ==================================================================  =============================
``"auto"``     one of those below, by size, device and cost                        everything
``"dense"``    scalings of a matrix made once, Anderson mixing                     any cost, up to a few thousand points
``"log"``      Sinkhorn's algorithm in the log domain                              the reference: slow, hard to upset
=============  ==================================================================  =============================
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyro_sinkhorn.ot.backends.dense import solve_dense
from pyro_sinkhorn.ot.backends.log_domain import solve_log_domain
from pyro_sinkhorn.ot.problem import Problem, Solution

Backend = Callable[[Problem], Solution]

#: Backends by name. *How* one executes a batch is its own affair; what it returns is a solution.
BACKENDS: dict[str, Backend] = {"log": solve_log_domain, "dense": solve_dense}


def choose(problem: Problem) -> str:
    """The name of the backend that ``"auto"`` stands for."""
    if problem.x.dtype not in (torch.float32, torch.float64):
        return "log"
    return "dense"


def backend_named(name: str, problem: Problem) -> Backend:
    """The backend of that name, or a ``ValueError`` that lists the names there are."""
    if name == "auto":
        return BACKENDS[choose(problem)]
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected 'auto' or one of {sorted(BACKENDS)}")
    return BACKENDS[name]
