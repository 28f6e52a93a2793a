r"""Transport solved another way, in double precision, with a certificate: two numbers that the truth lies between.

The log-domain iteration of the definition, written out again in numpy. Any pair of potentials gives a lower bound, any
coupling an upper one,

.. math:: \langle a,f\rangle+\langle b,g\rangle-\varepsilon\langle a\otimes b,e^{(f\oplus g-C)/\varepsilon}-1\rangle
          \;\le\; \mathrm{OT}_\varepsilon \;\le\; \langle P,C\rangle+\varepsilon\,\mathrm{KL}(P\,\|\,a\otimes b),

so that nothing is assumed of how far the iteration came. Where it is slow, at a tiny epsilon, POT's network simplex
gives another pair:

.. math:: \mathrm{OT}_0 \le \mathrm{OT}_\varepsilon \le \mathrm{OT}_0 + \varepsilon\,\mathrm{KL}(P_0\,\|\,a\otimes b).
"""

from dataclasses import dataclass

import numpy as np
import ot as pot


@dataclass(frozen=True)
class Certified:
    """Bounds of the entropic value, and the plan and potentials of the upper and lower one, where the iteration found both.

    ``spans`` bound how much optimal potentials of rows and of columns vary: they are c-transforms, so no more than a column or
    a row of the cost.
    """

    lower: float
    upper: float
    plan: np.ndarray
    f: np.ndarray
    g: np.ndarray
    spans: tuple[float, float]


def cost_of(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """By the formula, point by point; scaled so that squares neither over- nor underflow."""
    difference = x[:, None, :] - y[None, :, :]
    if name == "l1":
        return np.abs(difference).sum(-1)
    if name == "geodesic":
        together = np.linalg.norm(x[:, None, :] + y[None, :, :], axis=-1)
        return (2 * np.arctan2(np.linalg.norm(difference, axis=-1), together)) ** 2
    largest = max(np.abs(difference).max(), 1e-300)
    length = largest * np.sqrt(((difference / largest) ** 2).sum(-1))
    return length if name == "euclidean" else length**2


def certified(cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, rounds: int = 200) -> Certified:
    """Bounds of one problem. Masked points have no part in it; their potentials here are 0."""
    rows, columns = a > 0, b > 0
    largest = max(float(cost[np.ix_(rows, columns)].max()), epsilon)
    found = _solved(cost[np.ix_(rows, columns)] / largest, a[rows], b[columns], epsilon / largest, rounds)
    f, g, plan = np.zeros(len(a)), np.zeros(len(b)), np.zeros(cost.shape)
    f[rows], g[columns], plan[np.ix_(rows, columns)] = found.f * largest, found.g * largest, found.plan
    spans = tuple(float(np.ptp(cost[np.ix_(rows, columns)], axis=axis).max()) for axis in (0, 1))
    return Certified(found.lower * largest, found.upper * largest, plan, f, g, spans)


def _solved(cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, rounds: int) -> Certified:
    a, b = a / a.sum(), b / b.sum()
    log_a, log_b = np.log(a), np.log(b)
    g, stage = np.zeros(len(b)), 1.0
    for number in range(rounds):
        stage = max(stage / 2, epsilon)
        f = -stage * _logsumexp(log_b[None, :] + (g[None, :] - cost) / stage, 1)
        g = -stage * _logsumexp(log_a[:, None] + (f[:, None] - cost) / stage, 0)
        if stage == epsilon and number % 10 == 9:
            plan = _plan(f, g, cost, log_a, log_b, epsilon)
            if np.abs(plan.sum(1) - a).sum() < 1e-11:
                break
    if stage > epsilon:
        f = -epsilon * _logsumexp(log_b[None, :] + (g[None, :] - cost) / epsilon, 1)
        g = -epsilon * _logsumexp(log_a[:, None] + (f[:, None] - cost) / epsilon, 0)
    plan = _coupling(_plan(f, g, cost, log_a, log_b, epsilon), a, b)
    # The columns are exact, so that the mass is 1 and the exponential term of the dual 0.
    lower, upper = float(a @ f + b @ g), _primal(plan, cost, a, b, epsilon)
    if upper - lower > 1e-9:
        exact = pot.emd(a, b, cost)
        exact = _coupling(exact, a, b)
        lower = max(lower, float((exact * cost).sum()) - 1e-13)
        upper = min(upper, _primal(exact, cost, a, b, epsilon))
    return Certified(lower, upper, plan, f, g, (0.0, 0.0))


def _logsumexp(values: np.ndarray, axis: int) -> np.ndarray:
    largest = values.max(axis, keepdims=True)
    return np.log(np.exp(values - largest).sum(axis)) + largest.squeeze(axis)


def _plan(f, g, cost, log_a, log_b, epsilon) -> np.ndarray:
    return np.exp((f[:, None] + g[None, :] - cost) / epsilon + log_a[:, None] + log_b[None, :])


def _primal(plan: np.ndarray, cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.where(plan > 0, plan * np.log(plan / np.outer(a, b)), 0.0).sum()
    return float((plan * cost).sum() + epsilon * entropy)


def _coupling(plan: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rows and columns scaled down to their weight, what is missing put back as a product."""
    plan = plan * np.minimum(a / np.maximum(plan.sum(1), 1e-300), 1)[:, None]
    plan = plan * np.minimum(b / np.maximum(plan.sum(0), 1e-300), 1)[None, :]
    missing_a, missing_b = np.maximum(a - plan.sum(1), 0), np.maximum(b - plan.sum(0), 0)
    return plan + np.outer(missing_a, missing_b) / max(missing_a.sum(), 1e-300)
