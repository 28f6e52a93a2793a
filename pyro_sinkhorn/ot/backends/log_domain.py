r"""The reference backend: Sinkhorn's algorithm in the log domain.

Block coordinate ascent on the dual of
:math:`\min_P \langle P,C\rangle + \varepsilon\,\mathrm{KL}(P\,\|\,a\otimes b)`:

.. math::

    f_i \leftarrow -\varepsilon \log \textstyle\sum_j b_j \exp((g_j - C_{ij})/\varepsilon), \qquad
    g_j \leftarrow -\varepsilon \log \textstyle\sum_i a_i \exp((f_i - C_{ij})/\varepsilon).

It is the slowest way to reach the answer and the hardest to upset: every other backend is tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sinkhorn.ot.backends.schedule import epsilon_schedule
from pyro_sinkhorn.ot.problem import Problem, Solution
from pyro_sinkhorn.ot.value import coupling_at


@torch.no_grad()
def solve_log_domain(problem: Problem) -> Solution:
    """Solve a batch of problems until every marginal error is below the tolerance."""
    cost = problem.cost_matrix.detach()
    log_a, log_b = problem.a.detach().log(), problem.b.detach().log()
    epsilon = problem.epsilon
    f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)

    stages: list[Tensor] = []
    if problem.start is None:
        stages = epsilon_schedule(cost.amax((-2, -1)), epsilon)
    else:
        g = problem.start[1]
    for stage in stages:
        f, g = half_step(g, cost, log_b, stage), half_step(f, cost.mT, log_a, stage)

    f = half_step(g, cost, log_b, epsilon)
    g = half_step(f, cost.mT, log_a, epsilon)
    error = torch.full_like(epsilon, torch.inf)
    iteration = 0
    for iteration in range(1, problem.max_iters + 1):
        # After a column step the columns are exact and the rows off by exp((f - f_next)/epsilon): the next
        # row step measures the error of the pair (f, g) for nothing.
        f_next = half_step(g, cost, log_b, epsilon)
        # Written so that NaN ends the loop too. The last round only measures: the error is the returned pair's.
        # A tolerance of 0 asks for exactly max_iters rounds, also where rounding makes the error 0.
        last = iteration == problem.max_iters
        if last or problem.tolerance > 0:
            near = row_error(f, f_next, problem.a.detach(), epsilon)
            found = measured(problem, f, g, near, last)
            if found is not None:
                error = found
                break
        f = f_next
        g = half_step(f, cost.mT, log_a, epsilon)
    return Solution(f, g, error, len(stages) + iteration, error <= problem.tolerance)


def half_step(potential: Tensor, cost: Tensor, log_weights: Tensor, epsilon: Tensor) -> Tensor:
    r"""Soft c-transform :math:`-\varepsilon\log\sum_j \exp(\log w_j + (\phi_j - C_{ij})/\varepsilon)`."""
    eps = epsilon[:, None]
    exponent = (log_weights + potential / eps).unsqueeze(-2) - cost / eps.unsqueeze(-1)
    return -eps * torch.logsumexp(exponent, -1)


@torch.no_grad()
def measured(problem: Problem, f: Tensor, g: Tensor, near: Tensor, last: bool) -> Tensor | None:
    r"""The error to stop with, ``(B,)``; None to go on.

    It is that of the plan as it will be made: the L1 error of its rows or its columns, the larger. Exponents are small
    differences of numbers as large as :math:`C/\varepsilon`. Where these have no digits to spare, a plan is further from its
    marginals than its potentials tell, and no iteration brings it nearer.

    :param near: what the potentials tell, see :func:`row_error`
    :param last: to stop in any case
    """
    if not last and bool((near > problem.tolerance).any()):
        return None
    plan = coupling_at(problem, f.detach(), g.detach())
    rows, columns = plan.sum(-1) - problem.a.detach(), plan.sum(-2) - problem.b.detach()
    error = torch.maximum(rows.abs().sum(-1), columns.abs().sum(-1))
    unsolved = (error > problem.tolerance) & (near > problem.tolerance / 10)
    return error if last or not bool(unsolved.any()) else None


def row_error(f: Tensor, f_next: Tensor, a: Tensor, epsilon: Tensor) -> Tensor:
    """L1 error of the row sums of the pair ``(f, g)``, ``(B,)``, where ``f_next`` is the row step from ``g``."""
    residual = a * torch.expm1((f - f_next) / epsilon[:, None]).abs()
    return residual.where(a > 0, 0).sum(-1)  # expm1 may overflow at a masked point: 0 * inf
