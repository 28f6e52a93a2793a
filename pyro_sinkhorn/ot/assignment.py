r"""Transport without regularisation between clouds of equal size: the best one-to-one assignment.

With uniform weights and as many points on either side, an optimal plan is a permutation (Birkhoff-von Neumann),

.. math:: \mathrm{OT}_0 = \min_\sigma \tfrac1n\textstyle\sum_i C_{i\sigma(i)}
          = \max_{f_i+g_j\le C_{ij}} \tfrac1n\sum_i f_i + \tfrac1n\sum_j g_j,

found by the shortest augmenting paths of Jonker and Volgenant in :func:`scipy.optimize.linear_sum_assignment`:
:math:`O(n^3)` at worst, on the processor, one problem after the other. Where the optimum is unique, its plan is the
gradient in the costs (Danskin); the potentials are a subgradient in the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sinkhorn.ot.problem import Problem, Solution


@torch.no_grad()
def solve_assignment(problem: Problem) -> Solution:
    """Optimal permutations and potentials of a batch, computed in float64 whatever the dtype of the points."""
    matrix = problem.cost_matrix.detach()
    cost = matrix.double()
    valid = ~cost.isnan().any(-1).any(-1)
    chosen = torch.stack([_assign(c) for c in cost])
    f, g = (t.to(matrix.dtype) for t in potentials(cost, chosen))
    return Solution(f, g, torch.zeros_like(problem.epsilon), 0, valid, assignment=chosen)


def _assign(cost: Tensor) -> Tensor:
    """The column of each row."""
    from scipy.optimize import linear_sum_assignment

    if bool(cost.isnan().any()):  # the caller's to report; the value is NaN whatever the assignment
        return torch.arange(len(cost), device=cost.device)
    return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=cost.device)


def potentials(cost: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    r"""Optimal duals of optimal assignments: :math:`f_i+g_j\le C_{ij}`, with equality at :math:`j=\sigma(i)`.

    Equality fixes :math:`g_{\sigma(i)} = C_{i\sigma(i)} - f_i`, and what remains,
    :math:`f_k \le f_i + (C_{k\sigma(i)} - C_{i\sigma(i)})`, is what shortest paths satisfy: Bellman-Ford from zero,
    whole rounds at a time, at most n of them because the optimum leaves no negative circle. The constant is chosen so
    that both potentials have one mean.

    :param cost: ``(B, n, n)``
    :param chosen: the column of each row, ``(B, n)``
    """
    paid = cost.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    steps = cost.gather(-1, chosen.unsqueeze(-2).expand_as(cost)).mT - paid.unsqueeze(-1)  # from i to k
    f = torch.zeros_like(paid)
    for _ in range(cost.shape[-1]):
        shorter = (f.unsqueeze(-1) + steps).amin(-2)
        if not bool((shorter < f).any()):
            break
        f = torch.minimum(f, shorter)
    g = torch.empty_like(f).scatter_(-1, chosen, paid - f)
    shift = (g.mean(-1, keepdim=True) - f.mean(-1, keepdim=True)) / 2
    return f + shift, g - shift
