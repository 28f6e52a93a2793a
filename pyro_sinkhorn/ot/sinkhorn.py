r"""Optimal transport between two weighted clouds, entropic or exact, differentiable in points and weights.

The solver's objective is the entropic value,

.. math:: \mathrm{OT}_\varepsilon
          = \min_{P\in\Pi(a,b)} \langle P, C\rangle + \varepsilon\,\mathrm{KL}(P\,\|\,a\otimes b)
          = \max_{f,g} \langle a,f\rangle + \langle b,g\rangle
            - \varepsilon\langle a\otimes b, e^{(f\oplus g-C)/\varepsilon} - 1\rangle,

so by the envelope theorem its gradients need no graph through the iterations: :math:`\partial C_{ij}=P_{ij}`,
:math:`\partial a_i=f_i`, :math:`\partial b_j=g_j`, exact at convergence (Cuturi 2013; Feydy et al. 2019). The other
values of :mod:`pyro_sinkhorn.ot.value` are no minima; their gradients go through :mod:`pyro_sinkhorn.ot.unrolled`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_sinkhorn.ot.assignment import solve_assignment
from pyro_sinkhorn.ot.backends import backend_named, check_name
from pyro_sinkhorn.ot.checks import (
    Gradient,
    Value,
    check_assignment,
    check_envelope,
    check_start,
    check_variant,
    flat_problem,
    make_problem,
)
from pyro_sinkhorn.ot.cost import Cost
from pyro_sinkhorn.ot.faults import check_finite, naming_points
from pyro_sinkhorn.ot.precision import full_precision
from pyro_sinkhorn.ot.problem import ConvergenceWarning, Problem, Solution
from pyro_sinkhorn.ot.rounding import rounded as round_to_coupling
from pyro_sinkhorn.ot.unrolled import solve_unrolled
from pyro_sinkhorn.ot.value import plan, value_of


@dataclass(frozen=True)
class SinkhornResult:
    """What :func:`sinkhorn` returns. Batch dimensions of the clouds lead every field but ``n_iters``.

    value:           transport cost, the one chosen by ``value``, differentiable in points and weights
    f, g:            dual potentials in units of the cost, ``(n,)`` and ``(m,)``, detached
    marginal_error:  L1 error of the row marginals of the plan
    n_iters:         iterations made, those of the epsilon schedule included; 0 for an assignment
    converged:       whether the error reached the tolerance, which a tolerance of 0 leaves to chance
    """

    value: Tensor
    f: Tensor
    g: Tensor
    marginal_error: Tensor
    n_iters: int
    converged: Tensor
    _problem: Problem = field(repr=False)
    _solution: Solution = field(repr=False)
    _batch_shape: torch.Size = field(repr=False)

    def plan(self, rounded: bool = False) -> Tensor:
        """The coupling, ``(n, m)``, detached; computed when asked for.

        As it stands its rows are off by ``marginal_error``; ``rounded`` makes both marginals exact, see
        :func:`~pyro_sinkhorn.ot.round_plan`.
        """
        coupling = plan(self._problem, self._solution)
        if rounded:
            coupling = round_to_coupling(coupling, self._problem.a.detach(), self._problem.b.detach())
        return coupling.reshape(self._batch_shape + coupling.shape[-2:])


def sinkhorn(
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: Cost = "sqeuclidean",
    *,
    value: Value = "entropic",
    gradient: Gradient = "envelope",
    tolerance: float | None = None,
    max_iters: int = 2_000,
    backend: str = "auto",
    start: SinkhornResult | None = None,
) -> SinkhornResult:
    r"""Optimal transport from ``x`` to ``y``, entropic, or exact with ``epsilon=0``.

    :param x: points, ``(..., n, d)``; leading dimensions are a batch of independent problems. Half precisions are
        brought to float32 first, which the result then has
    :param y: points, ``(..., m, d)``
    :param epsilon: regularisation, absolute, in units of the cost: a number, or one per problem. 0 is the exact assignment
        (uniform weights, ``n == m``): its value is :math:`\tfrac1n\sum_i C_{i\sigma(i)}`, whichever ``value`` is asked
        for, with the gradients of a unique optimum, and ``f``, ``g`` are optimal for the exact dual
    :param a: weights of ``x``, ``(..., n)``, rows summing to 1; uniform by default
    :param b: weights of ``y``, ``(..., m)``
    :param cost: ``"sqeuclidean"`` (:math:`\|x-y\|^2`, no ½), ``"euclidean"`` or a callable
        ``(n, d), (m, d) -> (n, m)``
    :param value: ``"entropic"`` (default: the objective that was minimised); ``"sharp"``, :math:`\langle P,C\rangle`
        at the plan the solver stopped at (Cuturi 2013; Genevay, Peyré and Cuturi 2018); or ``"rounded"``, the cost of
        that plan rounded to a coupling (Altschuler, Weed and Rigollet 2017): at least the exact cost, wherever the
        solver stopped. At convergence sharp is at most rounded and at most entropic
    :param gradient: ``"envelope"`` (default: one plan, whatever the iterations), right for the entropic value alone;
        or ``"unrolled"``, through all iterations, right for every value and also short of convergence. Unrolled
        iterations start cold and have no epsilon schedule, and the graph keeps ``B * (n + m)`` numbers of each, 4.1 kB
        for two clouds of 256 in float64, besides some 6 matrices ``B * n * m`` for all of them; plain autograd would
        keep 2 such matrices of each, 1.05 MB
    :param tolerance: L1 marginal error to stop at; 1e-6 by default in float64, 1e-4 in float32, whose
        rounding noise lies just below. 0 asks for exactly ``max_iters`` iterations (after the epsilon schedule, where
        there is one) and gives no warning
    :param max_iters: iterations at most; a :class:`ConvergenceWarning` says when that was not enough
    :param backend: ``"auto"`` (default: by size, device and cost) or a name of :mod:`pyro_sinkhorn.ot.backends`. Unrolled
        iterations are those of ``"log"`` and take no other
    :param start: a result between clouds of the same shapes, whose potentials are where the iterations begin. It saves
        some where the points have moved little since (full batches); between fresh minibatches it saves none.
        A result holds the matrix of its problem: keep one, not many
    :returns: a :class:`SinkhornResult`
    :raises ValueError: for clouds, weights or an epsilon that make no transport problem; for a sharp or rounded value
        with the envelope gradient, where one is needed; for an assignment of unequal sizes or weights, or unrolled
    :raises NonFiniteError: for points that are NaN or infinite, and where costs or potentials leave the range of the dtype

    >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    >>> out = sinkhorn(x, y, epsilon=0.01)
    >>> round(out.value.item(), 3)  # shifts every point by one, and pays log(2) * epsilon to be sharp
    1.007
    >>> [[round(p, 3) for p in row] for row in out.plan().tolist()]
    [[0.5, 0.0], [0.0, 0.5]]
    >>> sinkhorn(x, y, epsilon=0).value.item()
    1.0
    >>> out = sinkhorn(x.requires_grad_(), y, epsilon=0.1, value="sharp", gradient="unrolled", tolerance=0, max_iters=20)
    >>> out.n_iters, round(out.value.item(), 3)
    (20, 0.988)
    """
    check_variant(value, gradient)
    problem, batch_shape = make_problem(x, y, epsilon, a, b, cost, tolerance, max_iters)
    if start is not None:
        problem = dataclasses.replace(problem, start=check_start(start, problem, batch_shape, gradient))
    transport = Transport(cost, value, gradient, problem.tolerance, max_iters, backend)
    with naming_points(x, y):
        return transport.solve(problem, batch_shape)


@dataclass(frozen=True)
class Transport:
    """How problems whose parts were checked are solved, several of one size as one batch; see :func:`sinkhorn`."""

    cost: Cost
    value: Value
    gradient: Gradient
    tolerance: float
    max_iters: int
    backend: str

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        epsilon: Tensor,
        uniform: bool,
        symmetric: bool = False,
    ) -> SinkhornResult:
        """Of clouds that have all batch dimensions; ``symmetric`` where ``y`` is ``x``, ``uniform`` without weights."""
        problem = flat_problem(
            x, y, a, b, epsilon, self.cost, self.tolerance, self.max_iters, uniform, symmetric
        )
        return self.solve(problem, x.shape[:-2])

    def solve(self, problem: Problem, batch_shape: torch.Size) -> SinkhornResult:
        """The result with the batch dimensions put back."""
        with full_precision():
            return self._solve(problem, batch_shape)

    def _solve(self, problem: Problem, batch_shape: torch.Size) -> SinkhornResult:
        if problem.exact:
            check_assignment(problem, self.gradient)
        elif self.gradient == "envelope":
            check_envelope(self.value, problem)
        solution = solve(problem, self.backend, self.gradient)
        value = value_of(problem, solution, self.value)
        check_finite(problem, solution, value)

        def unbatch(t: Tensor) -> Tensor:
            return t.reshape(batch_shape + t.shape[1:])

        return SinkhornResult(
            value=unbatch(value),
            f=unbatch(solution.f.detach()),
            g=unbatch(solution.g.detach()),
            marginal_error=unbatch(solution.marginal_error),
            n_iters=solution.n_iters,
            converged=unbatch(solution.converged),
            _problem=problem,
            _solution=solution,
            _batch_shape=batch_shape,
        )


def solve(problem: Problem, backend: str = "auto", gradient: Gradient = "envelope") -> Solution:
    """Solve as asked, and warn where that stopped short of the tolerance."""
    check_name(backend)
    if problem.exact:
        return solve_assignment(problem)
    if gradient == "unrolled":
        if backend not in ("auto", "log"):
            raise ValueError(
                f"backend is {backend!r} with gradient='unrolled', which differentiates the iterations of 'log' and "
                "no others: leave backend='auto', or take gradient='envelope'"
            )
        solution = solve_unrolled(problem)
    else:
        solution = backend_named(backend, problem)(problem)
    if problem.tolerance > 0 and not bool(solution.converged.all()):
        worst = float(solution.marginal_error.max())
        if not math.isnan(worst):  # an error follows, which names the source
            warnings.warn(
                f"Sinkhorn stopped after {solution.n_iters} iterations with a marginal error of {worst:.2g}, "
                f"above the tolerance {problem.tolerance:.2g}: raise epsilon "
                f"(now {float(problem.epsilon.min()):.3g}), max_iters or the tolerance{_in_double(problem)}",
                ConvergenceWarning,
                stacklevel=5,
            )
    return solution


def _in_double(problem: Problem) -> str:
    """A hint where the digits of the dtype may be what is missing: exponents ``C / epsilon`` lose theirs as they grow."""
    return (
        "" if problem.x.dtype == torch.float64 else f", or give float64 instead of {str(problem.x.dtype)[6:]}"
    )
