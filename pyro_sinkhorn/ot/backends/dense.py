r"""The dense backend: Sinkhorn's algorithm as products with a matrix that is exponentiated once.

The plan :math:`K_{ij} = a_i b_j 2^{\varphi_i+\gamma_j-sC_{ij}}` at potentials close to the answer is made once; from there
only scalings :math:`u, v` move,

.. math:: v_j \leftarrow b_j / \textstyle\sum_i u_i K_{ij}, \qquad
          r_i = u_i \textstyle\sum_j K_{ij} v_j / a_i,

and :math:`\log_2 u` takes Anderson's step instead of :math:`-\log_2 r`. An iteration is two products and no exponential;
the matrix then gives the plan, and with it the gradient, for a third product. Where the scalings drift so far that
entries lost to underflow would matter, their logarithms are absorbed into the potentials and the matrix is made again
(Schmitzer 2019, *Stabilized sparse scaling algorithms for entropy regularized transport problems*). A row or column that
underflows as a whole is set right by half-steps in the log domain, and what resists these is handed to the reference
backend.

Symmetric problems have one potential and the relaxed step :math:`u \leftarrow u\,r^{-2/3}`: for a conditionally negative
definite cost the eigenvalues of the plan lie between 0 and 1, so errors shrink by at least 3 (Knight, Ruiz and Uçar 2014
use the exponent ½, which guarantees 2).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from pyro_sinkhorn.ot.backends.anderson import Anderson, Progress
from pyro_sinkhorn.ot.backends.exponents import LOG2E, Exponents
from pyro_sinkhorn.ot.backends.log_domain import half_step, solve_log_domain
from pyro_sinkhorn.ot.backends.scaled_plan import ScaledPlan, times_columns, times_rows
from pyro_sinkhorn.ot.backends.schedule import epsilon_schedule
from pyro_sinkhorn.ot.backends.start import starting_potentials
from pyro_sinkhorn.ot.problem import Problem, Solution
from pyro_sinkhorn.ot.value import plan

#: Scalings up to two to this power are multiplied into the matrix as they are; beyond, it is made again.
RANGE = {torch.float32: 50.0, torch.float64: 400.0}

#: A problem that has an error of FAR left after LATE iterations is begun anew along an epsilon schedule. Potentials that have
#: thousands of epsilons to go, as between clouds that have nothing in common yet, get there no other way.
LATE, FAR = 30, 0.05

#: From this many entries of the matrices on, products of problems that have converged are saved.
SKIP = 2**17


@torch.no_grad()
def solve_dense(problem: Problem) -> Solution:
    """Solve a batch of problems until every marginal error is below the tolerance."""
    scaling = Scaling(problem)
    solved = scaling.symmetric() if problem.symmetric else scaling.alternating()
    if solved is not None:
        return solved
    if len(problem.a) == 1:
        return solve_log_domain(dataclasses.replace(problem, symmetric=False, start=None))
    # One of them resists, or holds a NaN: the others are not to pay for it.
    parts = [_one(problem, i) for i in range(len(problem.a))]
    return _together(parts, [solve_dense(part) for part in parts])


def _one(problem: Problem, i: int) -> Problem:
    own = {name: getattr(problem, name)[i : i + 1] for name in ("x", "y", "a", "b", "epsilon")}
    start = None if problem.start is None else (problem.start[0][i : i + 1], problem.start[1][i : i + 1])
    return dataclasses.replace(problem, **own, start=start)


def _together(problems: list[Problem], solutions: list[Solution]) -> Solution:
    """One record of problems solved apart, with the plan of each at hand."""
    plans = torch.cat(
        [plan(problem, solution) for problem, solution in zip(problems, solutions, strict=True)]
    )
    f, g, error, converged = (
        torch.cat([getattr(solution, name) for solution in solutions])
        for name in ("f", "g", "marginal_error", "converged")
    )
    coupling = ScaledPlan(plans, torch.ones_like(f), torch.ones_like(g))
    return Solution(f, g, error, max(s.n_iters for s in solutions), converged, coupling=coupling)


class Scaling:
    """The matrix of a batch of problems, the potentials it was made at, and the iterations on it.

    phi, gamma:  potentials in base 2 that the matrix holds, ``(B, n)`` and ``(B, m)``
    kernel:      the plan at these potentials, ``(B, n, m)``; 0 in masked rows and columns
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.exponents = problem, Exponents(problem)
        self.a, self.b = problem.a.detach(), problem.b.detach()
        self.log_a, self.log_b = self.a.log2(), self.b.log2()
        self.range = RANGE[self.a.dtype]
        self.masked = not problem.uniform and bool((self.a == 0).any() or (self.b == 0).any())
        self.rebuild(*starting_potentials(problem, self.exponents))

    def rebuild(self, phi: Tensor, gamma: Tensor) -> None:
        """Make the matrix at these potentials."""
        self.phi, self.gamma = phi, gamma
        self.kernel = self.exponents(phi + self.log_a, gamma + self.log_b).exp2_()

    def alternating(self) -> Solution | None:
        """Columns exact, Anderson's steps on the rows; None where the range of the numbers was not enough."""
        a, b, problem = self.a, self.b, self.problem
        mixing, phi, u = Anderson(a), self.phi, torch.ones_like(a)
        columns, rows = torch.empty_like(b), torch.empty_like(a)
        progress = Progress()
        active: list[int] | None = None
        failures = 0
        for iteration in range(1, problem.max_iters + 1):
            columns = times_rows(u, self.kernel, active, columns)
            v = b / columns
            if self.masked:
                v.masked_fill_(b == 0, 0)
            rows = times_columns(self.kernel, v, active, rows)
            sums = u * rows
            error = (sums - a).abs_().sum(-1)
            worst = float(error.amax())
            last = iteration == problem.max_iters
            done = last or (problem.tolerance > 0 and worst <= problem.tolerance)
            if not math.isfinite(worst):
                failures += 1
                if failures > 3 or last:
                    return None
                self.from_log_domain()
                phi, u, active, mixing = self.phi, torch.ones_like(a), None, Anderson(a)
                progress.forget(iteration)
                continue
            if (done or worst > 0.1 or iteration % 8 == 0) and self.out_of_range(phi - self.phi, v.log2()):
                self.rebuild(phi, self.gamma + self.finite(v.log2()))
                u, active = torch.ones_like(a), None
                if not last:
                    continue
                v, error = self.with_exact_columns(u)
                if not bool(error.isfinite().all()):
                    return None
            if done:
                return self.solution(phi, self.gamma + v.log2(), u, v, error, iteration)
            if iteration == LATE and worst > FAR and problem.tolerance > 0:
                self.along_a_schedule(error > FAR, phi, self.gamma + self.finite(v.log2()))
                phi, u, active, mixing = self.phi, torch.ones_like(a), None, Anderson(a)
                progress.forget(iteration)
                continue
            restart, plain = progress.see(error, worst, iteration)
            step = self.log_residual(sums).neg_()
            moved = phi + step if plain else mixing.step(phi, step, restart)
            if self.kernel.numel() > SKIP and len(error) > 1 and problem.tolerance > 0:
                unsolved = error > problem.tolerance
                active = unsolved.nonzero().flatten().tolist()
                moved = moved.where(unsolved.unsqueeze(-1), phi)
            phi = moved
            u = (phi - self.phi).exp2_()
        raise AssertionError("max_iters is at least 1")

    def symmetric(self) -> Solution | None:
        """The relaxed step, one potential for both sides; None for clouds that are not finite."""
        a, problem = self.a, self.problem
        u, phi = torch.ones_like(a), self.phi
        tried = False
        for iteration in range(1, problem.max_iters + 1):
            sums = u * times_rows(u, self.kernel, None, u)
            error = (sums - a).abs_().sum(-1)
            worst = float(error.amax())
            if not math.isfinite(worst):
                if tried or iteration == problem.max_iters:
                    return None
                tried = True
                # Half a step from zero: no entry is above 1, no row empty.
                start = self.row_half_step(torch.zeros_like(a)) / 2
                self.rebuild(start, start)
                phi, u = self.phi, torch.ones_like(a)
                continue
            if iteration == problem.max_iters or (problem.tolerance > 0 and worst <= problem.tolerance):
                return self.solution(phi, phi, u, u, error, iteration)
            # The first step is halved: it has the constant to find, which a half step finds at once.
            step = self.log_residual(sums).mul_(-1 / 2 if iteration == 1 else -2 / 3)
            phi = phi + step
            if worst > 0.1 and self.out_of_range(phi - self.phi, step):
                self.rebuild(phi, phi)
            u = (phi - self.phi).exp2_()
        raise AssertionError("max_iters is at least 1")

    def with_exact_columns(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The column scaling, and the error of the rows: of a matrix made again, which is not the one measured before."""
        v = self.b / times_rows(u, self.kernel, None, self.b)
        if self.masked:
            v.masked_fill_(self.b == 0, 0)
        return v, (u * times_columns(self.kernel, v, None, self.a) - self.a).abs_().sum(-1)

    def log_residual(self, sums: Tensor) -> Tensor:
        """Logarithm of what the rows hold over what they should. One that lost all to underflow lacks the whole range."""
        residual = (sums / self.a).clamp_min_(2.0 ** -(2 * self.range)).log2_()
        return residual.masked_fill_(self.a == 0, 0) if self.masked else residual

    def out_of_range(self, left: Tensor, right: Tensor) -> bool:
        """Whether the logarithms of the scalings are so large that lost entries of the matrix may matter."""
        largest = torch.maximum(self.finite(left).abs().amax(), self.finite(right).abs().amax())
        return float(largest) > self.range

    def finite(self, logarithm: Tensor) -> Tensor:
        """Masked points have no scaling."""
        return logarithm.nan_to_num(0, 0, 0) if self.masked else logarithm

    def from_log_domain(self) -> None:
        """Two half-steps that neither over- nor underflow, and the matrix at where they lead: all columns exact."""
        phi = self.row_half_step(self.gamma)
        self.rebuild(phi, self.column_half_step(phi))

    def along_a_schedule(self, chosen: Tensor, phi: Tensor, gamma: Tensor) -> None:
        """The chosen problems from zero potentials, one half-step of either side at every epsilon from the largest cost down.

        :param chosen: booleans ``(B,)``; the others stay at ``phi`` and ``gamma``
        """
        rows, columns = torch.zeros_like(phi), torch.zeros_like(gamma)
        cost = self.exponents(rows, columns).div_(-LOG2E)  # in units of epsilon
        one = torch.ones_like(self.problem.epsilon)
        log_a, log_b = self.log_a / LOG2E, self.log_b / LOG2E
        for stage in [*epsilon_schedule(cost.amax((-2, -1)), one), one]:
            rows = half_step(columns, cost, log_b, stage)
            columns = half_step(rows, cost.mT, log_a, stage)
        chosen = chosen.unsqueeze(-1)
        self.rebuild((rows * LOG2E).where(chosen, phi), (columns * LOG2E).where(chosen, gamma))

    def row_half_step(self, gamma: Tensor) -> Tensor:
        r""":math:`-\log_2\sum_j b_j 2^{\\gamma_j - sC_{ij}}`, whatever the range."""
        exponents = self.exponents(torch.zeros_like(self.a), gamma + self.log_b)
        return exponents.div_(LOG2E).logsumexp(-1).mul_(-LOG2E)

    def column_half_step(self, phi: Tensor) -> Tensor:
        r""":math:`-\log_2\sum_i a_i 2^{\\varphi_i - sC_{ij}}`."""
        exponents = self.exponents(phi + self.log_a, torch.zeros_like(self.b))
        return exponents.div_(LOG2E).logsumexp(-2).mul_(-LOG2E)

    def solution(
        self, phi: Tensor, gamma: Tensor, u: Tensor, v: Tensor, error: Tensor, iterations: int
    ) -> Solution:
        """The record of a pair of potentials; masked points get theirs by a half-step."""
        if self.masked:
            phi = phi.where(self.a > 0, self.row_half_step(self.finite(gamma)))
            gamma = phi if self.problem.symmetric else gamma.where(self.b > 0, self.column_half_step(phi))
        return Solution(
            *self.exponents.potentials(phi, gamma),
            error,
            iterations,
            error <= self.problem.tolerance,
            coupling=ScaledPlan(self.kernel, u, v),
        )
