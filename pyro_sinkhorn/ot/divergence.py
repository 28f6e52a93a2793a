r"""Debiased transport: the minibatch energy distance, and the Sinkhorn divergence it replaces.

The usual debiased divergence subtracts from :math:`\mathrm{OT}(X,Y)` half of each cloud's cost *to itself*.
On a minibatch a cloud is closer to itself than to a fresh sample of its own law, so the minimum is a shrunken
law. ``debias="independent"`` splits each cloud into independent halves of equal size and uses

.. math::

    \tfrac12\Bigl[\tfrac24\textstyle\sum_{i,j}\mathrm{OT}(X_i,Y_j)
        - \mathrm{OT}(X_1,X_2) - \mathrm{OT}(Y_1,Y_2)\Bigr]

(Salimans et al. 2018, *Improving GANs using optimal transport*), whose expectation is exactly zero when the
laws agree and whose gradient is unbiased. **A single estimate can be negative: that is correct.** ``"self"`` is
the divergence of Feydy et al. 2019, kept for comparison; ``None`` is plain transport. Genevay, Peyré and Cuturi
2018 write twice of it, :math:`\bar W = 2W(X,Y) - W(X,X) - W(Y,Y)`: ``convention="genevay"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyro_sinkhorn.ot.checks import (
    Gradient,
    Value,
    check_clouds,
    check_epsilon,
    check_stopping,
    check_variant,
    check_weights,
)
from pyro_sinkhorn.ot.cost import Cost
from pyro_sinkhorn.ot.extension import Moves
from pyro_sinkhorn.ot.faults import naming_points
from pyro_sinkhorn.ot.halves import Half, Halves, draw_halves
from pyro_sinkhorn.ot.sinkhorn import Transport

Debias = Literal["independent", "self"] | None
Convention = Literal["feydy", "genevay"]

#: Up to this many points both self terms go to the backend as one batch; above, one after the other saves memory.
TOGETHER = 512

#: What the divergence is of ``cross - self_x / 2 - self_y / 2``.
SCALES: dict[str, int] = {"feydy": 1, "genevay": 2}


@dataclass(frozen=True)
class DivergenceResult:
    """What :func:`sinkhorn_divergence` returns; batch dimensions lead every tensor.

    value:            the divergence, ``cross - self_x / 2 - self_y / 2`` or, in the convention of Genevay, twice that;
                      differentiable
    cross:            transport cost between the clouds, in either convention
    self_x, self_y:   transport cost within each law (zero with ``debias=None``)
    marginal_error:   the largest among the problems solved
    n_iters:          iterations of the slowest problem
    converged:        whether every problem reached the tolerance
    variation:        ``(..., n, s)``, first variation of the value in the mass at each of the ``candidates``, times the
                      weight of their point: differences along the last dimension are what moving it would change, to
                      first order. Detached; zero for points left out of the halves; None without candidates
    """

    value: Tensor
    cross: Tensor
    self_x: Tensor
    self_y: Tensor
    marginal_error: Tensor
    n_iters: int
    converged: Tensor
    variation: Tensor | None = None


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: Cost = "sqeuclidean",
    debias: Debias = "independent",
    *,
    value: Value = "entropic",
    gradient: Gradient = "envelope",
    convention: Convention = "feydy",
    match_size: int | None = None,
    units_x: Tensor | None = None,
    units_y: Tensor | None = None,
    shared_units: bool = False,
    candidates: Tensor | None = None,
    tolerance: float | None = None,
    max_iters: int = 2_000,
    backend: str = "auto",
    generator: torch.Generator | None = None,
) -> DivergenceResult:
    r"""Debiased transport between the laws that ``x`` and ``y`` were drawn from.

    :param x: points, ``(..., n, d)``
    :param y: points, ``(..., m, d)``
    :param epsilon: regularisation, absolute, in units of the cost. 0 is exact transport, for uniform weights: between
        clouds of any size with ``"independent"``, whose halves are equal, of one size otherwise
    :param a: weights of ``x``, ``(..., n)``; uniform by default. They are renormalised within each half. A point
        of weight zero still counts as a unit of its half: leave masked points out, or halves are unequal again
    :param b: weights of ``y``, ``(..., m)``
    :param cost: see :func:`~pyro_sinkhorn.ot.sinkhorn`
    :param debias: ``"independent"`` (default: the only one without shrinkage on minibatches), ``"self"`` or
        ``None``
    :param value: ``"entropic"``, ``"sharp"`` or ``"rounded"``, of every part: see :func:`~pyro_sinkhorn.ot.sinkhorn`
    :param gradient: ``"envelope"`` or ``"unrolled"``, of every part; unrolled self terms are differentiated through
        both of their arguments
    :param convention: ``"feydy"`` (default) is ``cross - self_x / 2 - self_y / 2``, on the scale of transport;
        ``"genevay"`` is ``2 * cross - self_x - self_y``, exactly twice that
    :param match_size: units in each half, so that each transport problem is ``match_size`` square; larger clouds
        are cut into blocks, whose estimates are averaged. Default half of the smaller cloud. Between unequal
        laws the expectation depends on it, so a comparison should hold it fixed. Used by ``"independent"`` only
    :param units_x: integers ``(n,)``: points with equal ids are never separated
    :param units_y: integers ``(m,)``
    :param shared_units: the clouds are paired unit by unit and only the pairings ``(x1, y2)``, ``(x2, y1)`` are
        used
    :param candidates: other places that each point of ``x`` might be at, ``(..., n, s, d)``; see ``variation`` of the
        result
    :param generator: source of the random split; torch's global one by default
    :returns: a :class:`DivergenceResult`
    :raises ValueError: for clouds that make no transport problem, or cannot be split, and as
        :func:`~pyro_sinkhorn.ot.sinkhorn` for a value without the gradient asked of it
    :raises NonFiniteError: as :func:`~pyro_sinkhorn.ot.sinkhorn`

    >>> rng = torch.Generator().manual_seed(0)
    >>> x, y = torch.randn(2, 400, 2, generator=rng)
    >>> sinkhorn_divergence(x, y, epsilon=1.0, generator=rng).value.abs().item() < 0.05  # zero on average
    True
    >>> sinkhorn_divergence(x + 2, y, epsilon=1.0, generator=rng).value.item() > 6  # the squared shift is 8
    True
    """
    if debias not in ("independent", "self", None):
        raise ValueError(f"debias is {debias!r}: expected 'independent', 'self' or None")
    if convention not in SCALES:
        raise ValueError(f"convention is {convention!r}: expected one of {sorted(SCALES)}")
    check_variant(value, gradient)
    scale = SCALES[convention]
    x, y = check_clouds(x, y, cost)
    epsilon = check_epsilon(epsilon, x)
    uniform = a is None and b is None
    a, b = check_weights(a, x, "a"), check_weights(b, y, "b")
    tolerance = check_stopping(tolerance, max_iters, x.dtype)

    transport = Transport(cost, value, gradient, tolerance, max_iters, backend)
    if candidates is not None and (
        candidates.dim() != x.dim() + 1 or candidates.shape[:-2] + candidates.shape[-1:] != x.shape
    ):
        raise ValueError(
            f"candidates have shape {tuple(candidates.shape)}: expected (*{tuple(x.shape[:-1])}, s, {x.shape[-1]}), s places "
            "for each point of x"
        )
    with naming_points(x, y):
        if debias == "independent":
            halves = draw_halves(
                x.shape[-2],
                y.shape[-2],
                match_size,
                units_x,
                units_y,
                shared_units,
                generator=generator,
                device=x.device,
            )
            return _independent(
                x, y, epsilon, a, b, cost, halves, shared_units, scale, uniform, transport, candidates
            )
        return _whole(x, y, epsilon, a, b, cost, debias, scale, uniform, transport, candidates)


def _whole(
    x: Tensor,
    y: Tensor,
    epsilon: Tensor,
    a: Tensor,
    b: Tensor,
    cost: Cost,
    debias: Debias,
    scale: int,
    uniform: bool,
    transport: Transport,
    candidates: Tensor | None,
) -> DivergenceResult:
    out = transport(x, y, a, b, epsilon, uniform)
    moves = Moves(candidates, a, epsilon, cost)
    moves.add(1.0, y, b, out.g)
    if debias is None:
        zero = torch.zeros_like(out.value)
        return DivergenceResult(
            value=scale * out.value,
            cross=out.value,
            self_x=zero,
            self_y=zero,
            marginal_error=out.marginal_error,
            n_iters=out.n_iters,
            converged=out.converged,
            variation=moves.total(scale),
        )
    if x.shape == y.shape and x.shape[-2] <= TOGETHER:
        z, w = torch.stack([x, y]), torch.stack([a, b])
        selves = [transport(z, z, w, w, epsilon.expand(w.shape[:-1]), uniform, symmetric=True)]
    else:
        selves = [transport(p, p, w, w, epsilon, uniform, symmetric=True) for p, w in ((x, a), (y, b))]

    def of_both(field: str) -> Tensor:
        return torch.cat([getattr(part, field).reshape(-1, *out.value.shape) for part in selves])

    self_x, self_y = of_both("value")
    moves.add(
        -0.5, x, a, selves[0].g.reshape(-1, *a.shape)[0]
    )  # a point moves on both sides of its own cloud
    moves.add(-0.5, x, a, selves[0].f.reshape(-1, *a.shape)[0])
    return DivergenceResult(
        value=scale * (out.value - self_x / 2 - self_y / 2),
        cross=out.value,
        self_x=self_x,
        self_y=self_y,
        marginal_error=torch.maximum(out.marginal_error, of_both("marginal_error").amax(0)),
        n_iters=max(part.n_iters for part in (out, *selves)),
        converged=out.converged & of_both("converged").all(0),
        variation=moves.total(scale),
    )


def _independent(
    x: Tensor,
    y: Tensor,
    epsilon: Tensor,
    a: Tensor,
    b: Tensor,
    cost: Cost,
    halves: Halves,
    shared: bool,
    scale: int,
    uniform: bool,
    transport: Transport,
    candidates: Tensor | None,
) -> DivergenceResult:
    x1, x2 = _take(x, a, halves.x1), _take(x, a, halves.x2)
    y1, y2 = _take(y, b, halves.y1), _take(y, b, halves.y2)
    cross = [(x1, y2), (x2, y1)] if shared else [(x1, y1), (x1, y2), (x2, y1), (x2, y2)]
    # All problems have one size and go to the backend as one batch (pairs, *batch_shape, blocks).
    left, right = zip(*cross, (x1, x2), (y1, y2), strict=True)
    (xs, ws), (ys, vs) = (tuple(map(torch.stack, zip(*side, strict=True))) for side in (left, right))
    out = transport(
        xs, ys, ws, vs, epsilon.unsqueeze(-1).expand(ws.shape[:-1]), uniform and halves.x1.weight is None
    )
    costs = out.value.mean(-1)  # over blocks
    cross_value, self_x, self_y = costs[:-2].mean(0), costs[-2], costs[-1]

    def _variation(candidates: Tensor) -> Tensor:
        """Of both halves, laid back to the points they hold."""
        total = candidates.new_zeros(candidates.shape[:-1])
        for number, half in ((1, halves.x1), (2, halves.x2)):
            weights = (ws[-2] if number == 1 else vs[-2]) / len(half.index)  # mean over blocks
            moves = Moves(candidates[..., half.index, :, :], weights, epsilon.unsqueeze(-1), cost)
            for pair, (mine, _) in enumerate(cross):
                if mine is (x1 if number == 1 else x2):
                    moves.add(1 / len(cross), ys[pair], vs[pair], out.g[pair])
            others = (ys[-2], vs[-2], out.g[-2]) if number == 1 else (xs[-2], ws[-2], out.f[-2])
            moves.add(-0.5, *others)
            found = moves.total(1)
            assert found is not None
            index = half.index.flatten().unsqueeze(-1).expand(*found.shape[:-3], -1, found.shape[-1])
            total.scatter_add_(-2, index, found.flatten(-3, -2))
        return total

    return DivergenceResult(
        value=scale * (cross_value - self_x / 2 - self_y / 2),
        cross=cross_value,
        self_x=self_x,
        self_y=self_y,
        marginal_error=out.marginal_error.amax((0, -1)),
        n_iters=out.n_iters,
        converged=out.converged.all(0).all(-1),
        variation=None if candidates is None else scale * _variation(candidates),
    )


def _take(points: Tensor, weights: Tensor, half: Half) -> tuple[Tensor, Tensor]:
    """Points ``(*batch, blocks, k, d)`` of a half and their weights ``(*batch, blocks, k)``, renormalised."""
    w = weights[..., half.index]
    if half.weight is not None:
        w = half.weight.to(points.dtype) * w
    return points[..., half.index, :], w / w.sum(-1, keepdim=True)
