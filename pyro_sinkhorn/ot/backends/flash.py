r"""The optional ``flash`` backend: potentials by flash-sinkhorn, a peer's Triton kernels for large clouds on CUDA devices.

flash-sinkhorn (0.4; MIT licence) iterates the same half-steps on tiles computed again, one problem at a time, and stops by
the largest move of a potential, which bounds the marginal error: rows are off by :math:`e^{\Delta f/\varepsilon} - 1`. It is
here for comparison. Its potentials then are where one round of :mod:`~pyro_sinkhorn.ot.backends.triton_tiles` begins, which
makes the columns exact, measures the error and multiplies by the plan, as everywhere else.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch

from pyro_sinkhorn.ot.backends.triton_backend import solve_triton
from pyro_sinkhorn.ot.problem import Problem, Solution

#: Iterations between two looks at how far the potentials moved.
LOOK_AFTER = 10


@torch.no_grad()
def solve_flash(problem: Problem) -> Solution:
    """Solve a batch, one problem after the other.

    :param problem: squared Euclidean, in float32 on a CUDA device, every weight positive
    :raises ImportError: without flash-sinkhorn
    :raises ValueError: for what it cannot solve

    The number of iterations is the most it was allowed; how many it made it does not say.
    """
    try:
        from flash_sinkhorn import SamplesLoss
    except ImportError:
        raise ImportError(
            "backend 'flash' needs the package flash-sinkhorn and a CUDA device: pip install 'pyro_sinkhorn[flash]', or take "
            "backend='triton'"
        ) from None
    if problem.cost != "sqeuclidean":
        raise ValueError(
            f"backend 'flash' has only 'sqeuclidean' and the cost is {problem.cost!r}: take backend='triton' or 'dense'"
        )
    if not problem.uniform and (bool((problem.a == 0).any()) or bool((problem.b == 0).any())):
        raise ValueError(
            "backend 'flash' takes positive weights alone and some are zero: leave masked points out, or take "
            "backend='triton'"
        )
    rounds = max(1, problem.max_iters - 1)
    start = []
    for x, y, a, b, epsilon in zip(
        problem.x.detach(),
        problem.y.detach(),
        problem.a.detach(),
        problem.b.detach(),
        problem.epsilon.tolist(),
        strict=True,
    ):
        loss = SamplesLoss(
            "sinkhorn",
            backend="alternating",
            potentials=True,
            eps=epsilon,
            n_iters=rounds,
            use_epsilon_scaling=False,
            normalize=False,
            allow_tf32=torch.get_float32_matmul_precision() != "highest",
            threshold=problem.tolerance * epsilon if problem.tolerance > 0 else None,
            inner_iterations=LOOK_AFTER,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what it did not reach is measured below
            start.append(loss(a, x, b, y))
    f, g = (torch.stack([potential.float() for potential in side]) for side in zip(*start, strict=True))
    if problem.symmetric:
        f = g = (f + g) / 2
    last = solve_triton(replace(problem, start=(f, g), max_iters=1), "tiles")
    return replace(last, n_iters=problem.max_iters)
