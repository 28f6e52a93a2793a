r"""Sinkhorn's iterations as a part of the graph: the gradient of the value after L of them, converged or not.

The two papers whose loss is :math:`\langle P_L, C\rangle` differentiate through the loop (Genevay, Peyré and Cuturi
2018, *Learning generative models with Sinkhorn divergences*; Patrini et al. 2019, *Sinkhorn autoencoders*). As in
both, the start is cold (zero potentials: :math:`u=v=1`) and every iteration is at the epsilon asked for. Rows first:
the columns of the last plan are exact.

Memory grows with L all the same. Autograd alone keeps ``2 * B * n * m`` numbers of every iteration: for two clouds of
256 in float64 1.05 MB, 214 MB at the peak of 200 iterations. Here a half-step keeps its potentials and computes its
matrix again on the way back, in about the same time: ``B * (n + m)`` numbers of every iteration, 4.1 kB, and 5.1 MB at
that peak, of which 4.3 MB do not depend on L (``benchmarks/unrolled_gradients.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_sinkhorn.ot.backends.log_domain import half_step, measured, row_error
from pyro_sinkhorn.ot.first_derivative import first_derivative
from pyro_sinkhorn.ot.problem import Problem, Solution, largest_exponent


def solve_unrolled(problem: Problem) -> Solution:
    """As :func:`~pyro_sinkhorn.ot.backends.log_domain.solve_log_domain`, with a graph behind the potentials."""
    cost, a, b, epsilon = problem.cost_matrix, problem.a, problem.b, problem.epsilon
    f = half_step_with_gradient(torch.zeros_like(b), cost, b, epsilon)
    g = half_step_with_gradient(f, cost.mT, a, epsilon)
    iteration = 1
    while True:
        last = iteration == problem.max_iters
        if last:
            with torch.no_grad():  # it only measures
                f_next = half_step_with_gradient(g, cost, b, epsilon)
        else:
            f_next = half_step_with_gradient(g, cost, b, epsilon)
        if last or problem.tolerance > 0:
            near = row_error(f.detach(), f_next.detach(), a.detach(), epsilon)
            error = measured(problem, f, g, near, last)
            if error is not None:
                return Solution(f, g, error, iteration, error <= problem.tolerance)
        f = f_next
        g = half_step_with_gradient(f, cost.mT, a, epsilon)
        iteration += 1


def half_step_with_gradient(potential: Tensor, cost: Tensor, weights: Tensor, epsilon: Tensor) -> Tensor:
    """:func:`~pyro_sinkhorn.ot.backends.log_domain.half_step`, differentiable in weights that may be zero."""
    return _HalfStep.apply(potential, cost, weights, epsilon)


class _HalfStep(torch.autograd.Function):
    r"""With :math:`h_i = -\varepsilon\log\sum_j w_j e^{(\phi_j-C_{ij})/\varepsilon}` and
    :math:`E_{ij} = e^{(\phi_j-C_{ij}+h_i)/\varepsilon}`: :math:`\partial h_i/\partial\phi_j = -w_jE_{ij}
    = -\partial h_i/\partial C_{ij}`, and :math:`\partial h_i/\partial w_j = -\varepsilon E_{ij}`.
    """

    @staticmethod
    def forward(ctx: Any, potential: Tensor, cost: Tensor, weights: Tensor, epsilon: Tensor) -> Tensor:
        out = half_step(potential, cost, weights.log(), epsilon)
        ctx.save_for_backward(potential, cost, weights, epsilon, out)
        return out

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        potential, cost, weights, epsilon, out = ctx.saved_tensors
        (grad,) = grad_outputs
        masked = weights == 0
        # The logarithm of a weight has an infinite slope at 0. There, and only there, the weight is left out of the
        # exponent; nothing bounds what remains.
        weight = weights.masked_fill(masked, 1)
        eps = epsilon[:, None]
        share = (weight.log() + potential / eps).unsqueeze(-2) + (out.unsqueeze(-1) - cost) / eps.unsqueeze(
            -1
        )
        share = share.clamp_max_(largest_exponent(share.dtype)).exp_()
        total = (grad.unsqueeze(-2) @ share).squeeze(-2)
        need_potential, need_cost, need_weights = ctx.needs_input_grad[:3]
        return (
            -total.masked_fill(masked, 0) if need_potential else None,
            share.mul_(grad.unsqueeze(-1)).masked_fill_(masked.unsqueeze(-2), 0) if need_cost else None,
            -eps * total / weight if need_weights else None,
            None,
        )
