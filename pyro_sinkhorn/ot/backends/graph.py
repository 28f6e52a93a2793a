"""A match in a CUDA graph: value and gradients of problems of one shape, solved again and again at one launch each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_sinkhorn.ot.backends.triton_backend import solve_triton
from pyro_sinkhorn.ot.envelope import entropic_value
from pyro_sinkhorn.ot.problem import Problem, Solution


@dataclass(frozen=True)
class CapturedMatch:
    """What :func:`capture` returns: call it with new points, and weights, of the captured shapes.

    problem:        whose tensors are the graph's inputs: a call copies into them
    value:          entropic values ``(B,)``
    grad_x, grad_y: their gradients in the points, ``(B, n, d)`` and ``(B, m, d)``
    marginal_error: of the pair of potentials, ``(B,)``: look at it now and then, a graph cannot warn

    The next call overwrites all of them.
    """

    graph: torch.cuda.CUDAGraph
    problem: Problem
    value: Tensor
    grad_x: Tensor
    grad_y: Tensor
    marginal_error: Tensor

    def __call__(
        self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None
    ) -> CapturedMatch:
        """Replay with these inputs; what is left out stays as it was."""
        with torch.no_grad():
            pairs = ((self.problem.x, x), (self.problem.y, y), (self.problem.a, a), (self.problem.b, b))
            for held, given in pairs:
                if given is None or held is given:
                    continue
                if held.shape != given.shape:
                    raise ValueError(
                        f"the graph was captured for a tensor of shape {tuple(held.shape)} and is given "
                        f"{tuple(given.shape)}: capture one for every shape"
                    )
                held.copy_(given)
        self.graph.replay()
        return self


def capture(problem: Problem, solver: Callable[[Problem], Solution] = solve_triton) -> CapturedMatch:
    """Record a solve, its value and both gradients in a CUDA graph.

    Outside the single-launch regimes every iteration is a few launches of the graph, those after convergence too: a
    ``max_iters`` of 20 to 40 is right there. Recording needs a solver that reads nothing from the device meanwhile.

    :param problem: on a CUDA device; its tensors are copied. Of a symmetric problem, whose clouds are one, ``grad_x`` is the
        whole gradient, and ``grad_y`` is the same tensor
    :raises ValueError: for a problem that is not on a CUDA device
    """
    if not problem.x.is_cuda:
        raise ValueError(f"a CUDA graph needs CUDA tensors and the points are on {problem.x.device}")

    def held(t: Tensor, gradient: bool) -> Tensor:
        return t.detach().clone().requires_grad_(gradient)

    x, a = held(problem.x, True), held(problem.a, False)
    y, b = (x, a) if problem.symmetric else (held(problem.y, True), held(problem.b, False))
    problem = replace(problem, x=x, y=y, a=a, b=b, epsilon=problem.epsilon.detach().clone())

    def once() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        fresh = replace(problem)  # a new record: no cost matrix kept from the last time
        solution = solver(fresh)
        value = entropic_value(fresh, solution)
        slopes = torch.autograd.grad(value.sum(), [x] if y is x else [x, y])
        return value.detach(), slopes[0], slopes[-1], solution.marginal_error

    stream = torch.cuda.Stream(problem.x.device)
    stream.wait_stream(torch.cuda.current_stream(problem.x.device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled and chosen before the recording
            once()
    torch.cuda.current_stream(problem.x.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, grad_x, grad_y, error = once()
    return CapturedMatch(graph, problem, value, grad_x, grad_y, error)
