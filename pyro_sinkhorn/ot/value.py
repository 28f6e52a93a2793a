r"""What is reported of a plan: three values of one solution.

============  =========================================  ====================================================
``entropic``  :math:`\langle P,C\rangle                  the objective of the solver, as its dual: the
              + \varepsilon\,\mathrm{KL}(P\|a\otimes b)` envelope theorem gives its gradient
``sharp``     :math:`\langle P,C\rangle`                 Cuturi 2013; Genevay, Peyré and Cuturi 2018
``rounded``   :math:`\langle\mathrm{round}(P),C\rangle`  at least the exact cost, see
                                                         :mod:`pyro_sinkhorn.ot.rounding`
============  =========================================  ====================================================

Potentials that carry a graph (:mod:`pyro_sinkhorn.ot.unrolled`) pass it on to any of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sinkhorn.ot.checks import Value
from pyro_sinkhorn.ot.envelope import entropic_value
from pyro_sinkhorn.ot.problem import Problem, Solution, ceiling
from pyro_sinkhorn.ot.rounding import rounded


def value_of(problem: Problem, solution: Solution, value: Value) -> Tensor:
    """The chosen value of a solution, ``(B,)``."""
    if solution.assignment is not None:
        return assigned_value(problem, solution, solution.assignment)
    if value == "entropic":
        return entropic_value(problem, solution)
    coupling = coupling_of(problem, solution)
    if value == "rounded":
        coupling = rounded(coupling, problem.a, problem.b)
    return (coupling * problem.cost_matrix).sum((-2, -1))


def plan(problem: Problem, solution: Solution) -> Tensor:
    """The coupling, ``(B, n, m)``, detached."""
    with torch.no_grad():
        if solution.coupling is not None:
            return solution.coupling.matrix()
        if solution.assignment is None:
            return coupling_of(problem, solution)
        n = problem.a.shape[-1]
        empty = problem.cost_matrix.new_zeros(len(problem.a), n, n)
        return empty.scatter_(-1, solution.assignment.unsqueeze(-1), 1 / n)


def coupling_of(problem: Problem, solution: Solution) -> Tensor:
    r""":math:`P_{ij} = a_i b_j \exp((f_i+g_j-C_{ij})/\varepsilon)`, ``(B, n, m)``, with the graph of its parts."""
    return coupling_at(problem, solution.f, solution.g)


def coupling_at(problem: Problem, f: Tensor, g: Tensor) -> Tensor:
    """:func:`coupling_of` at potentials that are no solution yet."""
    exponent = f.unsqueeze(-1) + g.unsqueeze(-2) - problem.cost_matrix
    density = torch.minimum(exponent / problem.epsilon[:, None, None], ceiling(problem.a)).exp()
    return problem.a.unsqueeze(-1) * problem.b.unsqueeze(-2) * density


def assigned_value(problem: Problem, solution: Solution, chosen: Tensor) -> Tensor:
    """The mean cost of an assignment, whose gradients are the plan and, in the weights, the potentials."""
    paid = problem.cost_matrix.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).mean(-1)
    for w, potential in ((problem.a, solution.f), (problem.b, solution.g)):
        if w.requires_grad:
            paid = paid + ((w - w.detach()) * potential).sum(-1)
    return paid
