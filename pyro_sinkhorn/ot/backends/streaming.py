r"""The streaming backend: Sinkhorn's algorithm in :math:`O((n+m)d)` memory, for the squared Euclidean cost.

An iteration goes over the columns once, a strip of them at a time. The tile :math:`K_{ij} = 2^{\varphi_i+\gamma_j-sC_{ij}}`
of a strip :math:`J` is made once for both half-steps: its column sums make the columns exact, and the same entries then
add to the row sums,

.. math::

    v_j = 1/\textstyle\sum_i a_i K_{ij}, \qquad \gamma_j \leftarrow \gamma_j + \log_2 v_j, \qquad
    r_i \leftarrow r_i + \textstyle\sum_{j\in J} K_{ij}\, b_j v_j .

After the pass :math:`r` are the row sums of the pair :math:`(\varphi,\gamma)`, its error
:math:`\sum_i a_i|r_i-1|`, and :math:`-\log_2 r` is the plain step in :math:`\varphi`, from which Anderson mixing makes a
better one. Entries cannot overflow once columns are exact: :math:`a_i K_{ij} v_j \le 1`.

A symmetric problem has one potential and the relaxed step :math:`-\tfrac23\log_2 r`: the eigenvalues of its plan lie
between 0 and 1, so errors shrink by at least 3. Only the tiles of its upper triangle are made; each adds to the sums of
its rows and of its columns.

Sums out of the range of the dtype, which far points or a tiny epsilon give before the potentials have settled, are made
again about the largest exponent: of a strip of columns at once, of rows after the pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sinkhorn.ot.backends.anderson import Anderson, Progress
from pyro_sinkhorn.ot.backends.exponents import Exponents
from pyro_sinkhorn.ot.backends.start import starting_potentials
from pyro_sinkhorn.ot.backends.tiles import (
    Cloud,
    Tile,
    half_step,
    in_full_precision,
    product,
    strips,
    symmetric_product,
    transposed_product,
)
from pyro_sinkhorn.ot.problem import Problem, Solution

#: Iterates Anderson mixing remembers. Beside a pass they cost nothing, and small errors need fewer passes with more.
MEMORY = 10
#: Strips whose row sums are added up before they join the total: thousands of terms one by one would lose digits.
GROUP = 12


@in_full_precision
def solve_streaming(problem: Problem) -> Solution:
    """Solve problems one after the other, each until its marginal error is below the tolerance.

    :raises ValueError: for a cost other than ``"sqeuclidean"``, whose entries are no products of points
    """
    if problem.cost != "sqeuclidean":
        name = (
            problem.cost if isinstance(problem.cost, str) else getattr(problem.cost, "__name__", "a callable")
        )
        raise ValueError(
            f"the streaming backend was asked for the cost {name!r} and has only 'sqeuclidean': take another backend, "
            "which holds the cost matrix, or embed the points so that the cost is a squared distance"
        )
    solved = [_solve(_one(problem, k)) for k in range(len(problem.x))]
    error = torch.stack([s.error for s in solved])
    return Solution(
        f=torch.stack([s.f for s in solved]),
        g=torch.stack([s.g for s in solved]),
        marginal_error=error,
        n_iters=max(s.passes for s in solved),
        converged=error <= problem.tolerance,
        coupling=StreamedCoupling([s.plan for s in solved]),
    )


class StreamedCoupling:
    """Plans of a batch as products; their tiles are made when one is asked for."""

    def __init__(self, plans: list[StreamedPlan]) -> None:
        self.plans = plans

    def product(self, values: Tensor) -> Tensor:
        """``P @ values``: ``(B, m, k)`` to ``(B, n, k)``."""
        return torch.stack([plan.product(v) for plan, v in zip(self.plans, values, strict=True)])

    def transposed_product(self, values: Tensor) -> Tensor:
        """``P.mT @ values``: ``(B, n, k)`` to ``(B, m, k)``."""
        return torch.stack([plan.transposed_product(v) for plan, v in zip(self.plans, values, strict=True)])

    def matrix(self) -> Tensor:
        """``(B, n, m)``: all the memory this backend is there to save."""
        return torch.stack([plan.matrix() for plan in self.plans])


@dataclass(frozen=True)
class StreamedPlan:
    """One plan, between scalings ``left`` and ``right`` of its tiles.

    Of the very tiles whose sums were measured: where a float32 has no digits left for the sum of potentials and cost,
    tiles made at the potentials that came out, or another way round, would be those of another plan.

    x, y:          clouds about their means, without their masked points, whose entries are 0
    phi, gamma:    potentials in base 2 between these that the tiles hold
    at_x, at_y:    which points of the problem these are, booleans
    symmetric:     y is x
    """

    x: Cloud
    y: Cloud
    phi: Tensor
    gamma: Tensor
    left: Tensor
    right: Tensor
    at_x: Tensor
    at_y: Tensor
    symmetric: bool

    def factors(self) -> tuple[Tensor, Tensor]:
        """The rows of the tiles are points of y."""
        return self.y.rows(self.gamma), self.x.columns(self.phi)

    @in_full_precision
    def product(self, values: Tensor) -> Tensor:
        multiply = symmetric_product if self.symmetric else transposed_product
        found = values.new_zeros(len(self.at_x), values.shape[1])
        found[self.at_x] = self.left[:, None] * multiply(
            *self.factors(), self.right[:, None] * values[self.at_y]
        )
        return found

    @in_full_precision
    def transposed_product(self, values: Tensor) -> Tensor:
        multiply = symmetric_product if self.symmetric else product
        found = values.new_zeros(len(self.at_y), values.shape[1])
        found[self.at_y] = self.right[:, None] * multiply(
            *self.factors(), self.left[:, None] * values[self.at_x]
        )
        return found

    @in_full_precision
    def matrix(self) -> Tensor:
        rows, columns = self.factors()
        density = Tile(rows).exponents(rows, columns).exp2_().mT
        found = rows.new_zeros(len(self.at_x), len(self.at_y))
        at = self.at_x.nonzero(), self.at_y.nonzero().squeeze(-1)
        found[at] = self.left[:, None] * density * self.right
        return found


@dataclass(frozen=True)
class _Solved:
    f: Tensor
    g: Tensor
    error: Tensor
    passes: int
    plan: StreamedPlan


def _one(problem: Problem, k: int) -> Problem:
    this = slice(k, k + 1)
    return Problem(
        problem.x.detach()[this],
        problem.y.detach()[this],
        problem.a.detach()[this],
        problem.b.detach()[this],
        problem.epsilon.detach()[this],
        tolerance=problem.tolerance,
        max_iters=problem.max_iters,
        symmetric=problem.symmetric,
        start=None if problem.start is None else (problem.start[0][this], problem.start[1][this]),
    )


def _solve(problem: Problem) -> _Solved:
    """Solve one problem among its points of positive weight; the potentials of the others are their half-steps."""
    at_x, at_y = problem.a[0] != 0, problem.b[0] != 0
    kept = _restricted(problem, at_x, at_y)
    exponents = Exponents(kept)
    assert exponents.x is not None and exponents.y is not None  # the cost is squared Euclidean
    scale = exponents.scale[0]
    x, y = Cloud(exponents.x[0], kept.a[0], scale), Cloud(exponents.y[0], kept.b[0], scale)
    phi, gamma = (t[0].clone() for t in starting_potentials(kept, exponents))

    def one_pass(phi: Tensor, gamma: Tensor) -> Pass:
        return _triangle(x, phi) if problem.symmetric else _columns(x, y, phi, gamma)

    phi, last, error, passes = _iterate(one_pass, x.weights, phi, gamma, problem)
    plan = StreamedPlan(
        x, y, phi, last.gamma, x.weights, y.weights / last.columns, at_x, at_y, problem.symmetric
    )
    kept_f, kept_g = (t[0] for t in exponents.potentials(phi[None], (last.gamma - last.columns.log2())[None]))
    f, g = phi.new_empty(len(at_x)), phi.new_empty(len(at_y))
    f[at_x], g[at_y] = kept_f, kept_g
    for potential, points, at, other, mean, theirs in (
        (f, problem.x[0], at_x, y, kept.b[0] @ kept.y[0], kept_g),
        (g, problem.y[0], at_y, x, kept.a[0] @ kept.x[0], kept_f),
    ):
        if not bool(at.all()):
            # About the mean of the other cloud, where no shift between the clouds adds to the potentials.
            masked = Cloud(points[~at] - mean, potential[~at], scale)
            zero = torch.zeros_like(masked.weights)
            potential[~at] = (
                half_step(masked.rows(zero), other.columns(theirs * scale), other.weights) / scale
            )
    return _Solved(f, g, error, passes, plan)


def _restricted(problem: Problem, at_x: Tensor, at_y: Tensor) -> Problem:
    """The problem without masked points: nothing bounds the density between two of them, and 0 times infinity is NaN."""
    if bool(at_x.all()) and bool(at_y.all()):
        return problem
    start = problem.start
    return Problem(
        problem.x[:, at_x],
        problem.y[:, at_y],
        problem.a[:, at_x],
        problem.b[:, at_y],
        problem.epsilon,
        symmetric=problem.symmetric,
        start=None if start is None else (start[0][:, at_x], start[1][:, at_y]),
    )


@dataclass(frozen=True)
class Pass:
    """What a pass over the tiles at potentials ``phi`` and ``gamma`` found.

    columns:     sums of their columns, by which these are divided; 1 in symmetric problems
    rows:        sums of the rows, with the columns so divided
    logarithms:  of ``rows``, in base 2, also where these are out of range
    """

    gamma: Tensor
    columns: Tensor
    rows: Tensor
    logarithms: Tensor


def _iterate(
    one_pass: Callable[[Tensor, Tensor], Pass], weights: Tensor, phi: Tensor, gamma: Tensor, problem: Problem
) -> tuple[Tensor, Pass, Tensor, int]:
    """Passes until the error of the very pair they measured is small enough: ``phi``, the last one, error, their number."""
    mixing, progress = Anderson(weights[None], MEMORY), Progress()
    for passes in range(1, problem.max_iters + 1):
        last = one_pass(phi, gamma)
        error = (weights * (last.rows - 1).abs()).sum()
        now = float(error)
        # NaN ends the loop too. A tolerance of 0 asks for exactly max_iters passes.
        if passes == problem.max_iters or (problem.tolerance > 0 and not now > problem.tolerance):
            break
        restart, plain = progress.see(error[None], now, passes)
        # The first symmetric step is halved: it has the constant to find, which half a step finds at once.
        step = last.logarithms * (-1 if not problem.symmetric else -1 / 2 if passes == 1 else -2 / 3)
        if plain or (problem.symmetric and passes == 1):
            phi = phi + step
        else:
            phi = mixing.step(phi[None], step[None], restart)[0]
        gamma = last.gamma - last.columns.log2()
    return phi, last, error, passes


def _columns(x: Cloud, y: Cloud, phi: Tensor, gamma: Tensor) -> Pass:
    """One pass over strips of columns, the rows of its tiles."""
    gamma = gamma.clone()
    rows, columns = y.rows(gamma), x.columns(phi)
    tile, sums = Tile(rows), torch.empty_like(gamma)
    total, group = torch.zeros_like(phi), torch.zeros_like(phi)
    low = torch.finfo(phi.dtype).tiny ** 0.5
    for k, strip in enumerate(strips(len(rows), len(phi), rows)):
        density = tile.exponents(rows[strip], columns).exp2_()
        found = density @ x.weights
        if bool(((found < low) | (found > 1 / low)).any()):
            # What is taken off is taken off the potential, so that all tiles of a pass are tiles at ``gamma``.
            gamma[strip] -= tile.exponents(rows[strip], columns).amax(-1)
            rows[strip] = y.rows(gamma)[strip]
            density = tile.exponents(rows[strip], columns).exp2_()
            found = density @ x.weights
        sums[strip] = found
        group.addmv_(density.mT, y.weights[strip] / found)
        if k % GROUP == GROUP - 1:
            total += group
            group.zero_()
    total += group
    return Pass(gamma, sums, total, _logarithms(total, x, phi, y, gamma - sums.log2()))


def _triangle(x: Cloud, phi: Tensor) -> Pass:
    """One pass over the tiles of the upper triangle."""
    rows = symmetric_product(x.rows(phi), x.columns(phi), x.weights[:, None])[:, 0]
    return Pass(phi, torch.ones_like(phi), rows, _logarithms(rows, x, phi, x, phi))


def _logarithms(sums: Tensor, x: Cloud, phi: Tensor, y: Cloud, gamma: Tensor) -> Tensor:
    """``log2`` of row sums; where these left the range of the dtype, by the half-step in the log domain."""
    found = sums.log2()
    low = torch.finfo(sums.dtype).tiny ** 0.25  # entries lost below ``tiny`` then still matter to no digit
    outside = (sums < low) | (sums > 1 / low)
    if bool(outside.any()):
        found[outside] = -half_step(x.rows(phi)[outside], y.columns(gamma), y.weights)
    return found
