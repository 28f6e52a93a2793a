r"""The expectation of the divergence of independent halves, exactly, between laws on a few atoms.

With ``k`` points in each half the clouds are multisets of ``k`` out of ``m`` atoms. Let P and Q be their multinomial
probabilities under the two laws and :math:`K_{st}` the transport cost between multisets. Then

.. math:: E = P^\top K Q - \tfrac12 P^\top K P - \tfrac12 Q^\top K Q = -\tfrac12 (P-Q)^\top K\,(P-Q),

which is never negative for all pairs of laws exactly if K is of negative type on what multinomial laws span. No sampling,
so no sampling error: a negative number found here is a counterexample.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment, minimize
from torch import Tensor

#: Laws of a search have weights of at least about e^-8, and atoms in a box of this half width.
BOX = 3.0


def ground_cost(atoms: Tensor, power: float | str) -> Tensor:
    r"""``(m, m)``: :math:`\|x-y\|^p` of points, or with ``"arc"`` the squared arc between angles ``(m, 1)``."""
    if power == "arc":
        gap = (atoms - atoms.mT).remainder(2 * math.pi)
        return torch.minimum(gap, 2 * math.pi - gap).square()
    squares = (atoms.unsqueeze(1) - atoms.unsqueeze(0)).square().sum(-1)
    return squares if power == 2 else (squares + 1e-30) ** (float(power) / 2)


def multisets(m: int, k: int) -> Tensor:
    """Every cloud of ``k`` points on ``m`` atoms, ``(number, k)``."""
    return torch.tensor(list(itertools.combinations_with_replacement(range(m), k)))


def probabilities(weights: Tensor, clouds: Tensor) -> Tensor:
    """Of the clouds, for ``k`` independent draws of a law."""
    k = clouds.shape[1]
    counts = torch.stack([(clouds == i).sum(1) for i in range(len(weights))], 1).to(weights)
    return (math.lgamma(k + 1) - torch.lgamma(counts + 1).sum(1) + torch.xlogy(counts, weights).sum(1)).exp()


def transport_matrix(cost: Tensor, clouds: Tensor) -> Tensor:
    """Exact assignments between all clouds, ``(number, number)``."""
    c = cost.numpy()
    out = np.zeros((len(clouds), len(clouds)))
    for i, s in enumerate(clouds.numpy()):
        for j, t in enumerate(clouds[:i].numpy()):
            part = c[np.ix_(s, t)]
            out[i, j] = out[j, i] = part[linear_sum_assignment(part)].mean()
    return torch.as_tensor(out)


def expectation(matrix: Tensor, clouds: Tensor, p: Tensor, q: Tensor) -> tuple[float, float]:
    """Of the divergence, and of the cost between the laws."""
    a, b = probabilities(p, clouds), probabilities(q, clouds)
    return float(-0.5 * (a - b) @ matrix @ (a - b)), float(a @ matrix @ b)


def exactly(atoms: Tensor, power: float | str, p: Tensor, q: Tensor, k: int) -> tuple[float, float]:
    """:func:`expectation` with ``k`` points a half."""
    clouds = multisets(len(atoms), k)
    return expectation(transport_matrix(ground_cost(atoms, power), clouds), clouds, p, q)


def search(
    m: int, d: int, k: int, power: float | str, starts: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Atoms and two laws with the smallest expectation that descent from random starts found, relative to their cost.

    For powers below 2 relative to the expectation with one point a half, the energy distance, which is then zero for equal
    laws alone: relative to the cost, descent would only make the laws equal.
    """
    rng = np.random.default_rng(seed)
    clouds = multisets(m, k)
    orders = torch.tensor(list(itertools.permutations(range(k))))
    left = clouds[:, None, None, :].expand(-1, len(clouds), len(orders), -1)
    right = clouds[None][:, :, orders].expand(len(clouds), -1, -1, -1)

    def parts(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        atoms, logits = v[: m * d].reshape(m, d), v[m * d :].reshape(2, m)
        return atoms, *torch.softmax(logits, -1)

    def ratio(values: np.ndarray) -> tuple[float, np.ndarray]:
        v = torch.tensor(values, requires_grad=True)
        atoms, p, q = parts(v)
        matrix = ground_cost(atoms, power)[left, right].mean(-1).amin(-1)
        a, b = probabilities(p, clouds), probabilities(q, clouds)
        top, cross = -0.5 * (a - b) @ matrix @ (a - b), a @ matrix @ b
        if power in (2, "arc"):
            out = top / (cross + 1e-9)
        else:  # kept away from equal laws, where both are zero
            energy = -0.5 * (p - q) @ ground_cost(atoms, power) @ (p - q)
            out = (top + 1e-3 * cross) / (energy + 1e-12)
        (slope,) = torch.autograd.grad(out, v)
        return float(out.detach()), slope.numpy()

    limits = [(-BOX, BOX)] * (m * d) + [(-4.0, 4.0)] * (2 * m)
    best = None
    for _ in range(starts):
        start = np.concatenate([rng.standard_normal(m * d), 1.5 * rng.standard_normal(2 * m)])
        found = minimize(
            ratio, start.clip(-BOX, BOX), jac=True, method="L-BFGS-B", bounds=limits, options={"maxiter": 150}
        )
        if best is None or found.fun < best.fun:
            best = found
    assert best is not None
    atoms, p, q = parts(torch.tensor(best.x))
    # Rounded, so that a reader can write the laws down; what is reported is of these.
    atoms, p, q = atoms.round(decimals=2), p.round(decimals=2), q.round(decimals=2)
    return atoms, p / p.sum(), q / q.sum()
