"""NaN and infinity stop a solve, with where they came from: causes before effects, points before costs before potentials."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from pyro_sinkhorn.errors import NonFiniteError
from pyro_sinkhorn.ot.problem import Problem, Solution


def check_finite(problem: Problem, solution: Solution, value: Tensor) -> None:
    """Value, potentials and marginal error are numbers.

    :raises NonFiniteError: they are not; the message says why
    """
    found = (value.detach(), solution.f.detach(), solution.g.detach(), solution.marginal_error)
    # Infinity and NaN times 0 are NaN: one sum tells, which is one transfer from a device.
    if not bool(sum((t * 0).sum() for t in found) == 0):
        raise NonFiniteError(_cause(problem))


@contextmanager
def naming_points(x: Tensor, y: Tensor) -> Iterator[None]:
    """Of problems between parts of two clouds, an error names the point of the cloud."""
    try:
        yield
    except NonFiniteError as error:
        message = _bad_points(x, y)
        if message is None:
            raise
        raise NonFiniteError(message) from error


def _bad_points(x: Tensor, y: Tensor) -> str | None:
    for name, points in (("x", x), ("y", y)):
        bad = ~points.detach().isfinite().all(-1)
        if bool(bad.any()):
            *problem, point = bad.nonzero()[0].tolist()
            where = (
                f" of problem {tuple(problem)} of the batch"
                if problem and len(bad.flatten(0, -2)) > 1
                else ""
            )
            return (
                f"{name}, shape {tuple(points.shape)}, is NaN or infinite in {int(bad.sum())} of {bad.numel()} points (the "
                f"first is point {point}{where}): leave these points out, or mend what made them"
            )
    return None


def _cause(problem: Problem) -> str:
    if (message := _bad_points(problem.x, problem.y)) is not None:
        return message
    cost = problem.cost_matrix.detach()
    largest = f"the largest coordinates are {_largest(problem.x):.3g} and {_largest(problem.y):.3g}"
    bad = ~cost.isfinite()
    if bool(bad.any()):
        if not isinstance(problem.cost, str):
            name = getattr(problem.cost, "__name__", repr(problem.cost))
            return (
                f"the cost {name!r} returned {float(cost[bad][0])} between points that are finite: {largest}"
            )
        return (
            f"the cost {problem.cost!r} is out of the range of {cost.dtype}, since {largest}: divide the points by their "
            "scale, and epsilon by that of the cost, or give float64"
        )
    return (
        f"potentials or plan are NaN or infinite though points and costs are finite: {largest}, the largest cost is "
        f"{_largest(cost):.3g}, epsilon {float(problem.epsilon.min()):.3g}. {cost.dtype} has no digits left at that ratio: "
        "bring the clouds nearer to each other, or raise epsilon"
    )


def _largest(t: Tensor) -> float:
    return float(t.detach().abs().max())
