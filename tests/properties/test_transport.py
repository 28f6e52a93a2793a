"""Laws of transport over every kind of problem a caller might give: a right answer, or an error that says what is wrong.

Answers are held against bounds from float64, with what rounding in the dtype may add. A problem that is reported as solved
must be within its tolerance; one that is not must be warned of, and its value must lie within what its marginal error allows.
"""

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from pyro_sinkhorn.errors import NonFiniteError
from pyro_sinkhorn.ot import ConvergenceWarning, sinkhorn, sinkhorn_divergence
from tests.properties.laws import hold
from tests.properties.problems import POWER, Case, cases
from tests.properties.reference import certified

#: Iterations at most: most problems need fewer, and what is said of the others is part of the laws.
OPTIONS = {"max_iters": 300}
SEEN: Counter[str] = Counter()


def solved(case: Case, solve=sinkhorn, **options):
    """The result, or None where an error was due, and whether a warning came."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            out = solve(
                case.x,
                case.y,
                case.epsilon,
                case.a,
                case.b,
                case.cost,
                backend=case.backend,
                **OPTIONS | case.options | options,
            )
        except (ValueError, NonFiniteError) as error:
            named = any(words in str(error) for words in ("out of the range", "NaN or infinite"))
            if not (named and impossible(case)):
                raise AssertionError(f"{case}: {error}") from error
            SEEN["named errors"] += 1
            return None
    assert {w.category for w in caught} <= {ConvergenceWarning}
    assert bool(caught) == (not bool(out.converged.all()))
    assert all("marginal error of" in str(w.message) for w in caught)
    SEEN["solved" if out.converged.all() else "warned of"] += 1
    return out


def impossible(case: Case) -> bool:
    """Whether the dtype has not the range for this problem."""
    limits = torch.finfo(case.dtype)
    if not (bool(case.x.isfinite().all()) and bool(case.y.isfinite().all())):
        return True
    size = max(float(t.detach().double().abs().max()) for t in (case.x, case.y))
    size = (4 * size) ** POWER[case.cost] * case.x.shape[-1]
    return not (limits.tiny <= case.epsilon <= limits.max / 10) or size + case.epsilon > limits.max / 100


def flat(t: torch.Tensor, ends: int) -> np.ndarray:
    return t.detach().double().reshape(-1, *t.shape[t.dim() - ends :]).numpy()


def rounding(case: Case, cost: np.ndarray) -> float:
    """Of numbers of the size of the largest cost, or of epsilon, summed over the coordinates one after the other."""
    limits = torch.finfo(case.dtype)
    return limits.eps * (20 + case.x.shape[-1] / 4) * (float(cost.max()) + case.epsilon) + 100 * limits.tiny


def check_transport(case: Case) -> None:
    out = solved(case)
    if out is None:
        return
    n, m = case.x.shape[-2], case.y.shape[-2]
    batch = torch.broadcast_shapes(case.x.shape[:-2], case.y.shape[:-2])
    assert out.value.shape == out.converged.shape == out.marginal_error.shape == batch
    assert (out.f.shape, out.g.shape) == ((*batch, n), (*batch, m))
    assert {t.dtype for t in (out.value, out.f, out.g, out.marginal_error)} == {case.dtype}
    tolerance = 1e-6 if case.dtype == torch.float64 else 1e-4
    plan = out.plan()
    assert plan.isfinite().all() and (plan >= 0).all()
    eps = torch.finfo(case.dtype).eps
    values, errors, converged = (flat(t, 0) for t in (out.value, out.marginal_error, out.converged))
    rows = zip(
        case.parts(),
        case.costs(),
        values,
        errors,
        converged,
        flat(plan, 2),
        flat(out.f, 1),
        flat(out.g, 1),
        strict=True,
    )
    for (_, _, a, b), cost, value, error, done, matrix, f, g in rows:
        assert bool(done) == (error <= tolerance)
        # The plan is as far from its marginals as is said.
        off = [np.abs(matrix.sum(1) - a).sum(), np.abs(matrix.sum(0) - b).sum()]
        assert max(off) <= (1.001 if done else 1.05) * error + (20 + n + m) * eps
        # The dual is concave: D(f*, g*) <= D(f, g) + <a - P1, f* - f> + <b - P'1, g* - g>. Where rounding has taken the mass of
        # the plan from 1, the constant of f + g is off too, by epsilon times its logarithm.
        truth, noise, mass = certified(cost, a, b, case.epsilon), rounding(case, cost), float(matrix.sum())
        below = error / 2 * (np.ptp(f[a > 0]) + truth.spans[0]) + off[1] / 2 * (
            np.ptp(g[b > 0]) + truth.spans[1]
        )
        below += abs(mass - 1) * (case.epsilon * abs(np.log(max(mass, 1e-30))) + noise)
        assert truth.lower - below - noise <= value <= truth.upper + noise


def check_gradients_are_finite(case: Case) -> None:
    leaves = [t if t is None else t.detach().requires_grad_() for t in (case.x, case.y, case.a, case.b)]
    x, y, a, b = leaves
    out = solved(Case(x, y, case.epsilon, a, b, case.cost, case.backend, case.words, case.options))
    if out is None:
        return
    grads = torch.autograd.grad(out.value.sum(), [t for t in leaves if t is not None])
    assert all(bool(g.isfinite().all()) for g in grads)


def near(case: Case, first, second, *scales: float) -> None:
    """Two answers to one question: both are off by rounding, and by what their marginal errors allow."""
    noise = max(rounding(case, cost) + 2 * float(cost.max()) * 1e-30 for cost in case.costs())
    slack = 0.0
    for out in (first, second):
        spread = (out.f.amax(-1) - out.f.amin(-1) + max(float(c.max()) for c in case.costs())).abs()
        slack = slack + float((out.marginal_error * spread).max())
    assert float((first.value.double() - second.value.double()).abs().max()) <= 2 * noise + slack


def check_relations(case: Case, seed: int) -> None:
    """Order, sides, scale and how points are divided do not matter."""
    first = solved(case)
    if first is None:
        return
    rng = torch.Generator().manual_seed(seed)
    order, other = (torch.randperm(t.shape[-2], generator=rng) for t in (case.x, case.y))
    a, b = (None if w is None else w[..., o] for w, o in ((case.a, order), (case.b, other)))
    moved = Case(
        case.x[..., order, :], case.y[..., other, :], case.epsilon, a, b, case.cost, case.backend, case.words
    )
    exchanged = Case(case.y, case.x, case.epsilon, case.b, case.a, case.cost, case.backend, case.words)
    doubled = Case(
        torch.cat([case.x, case.x], -2),
        case.y,
        case.epsilon,
        None if case.a is None else torch.cat([case.a, case.a], -1) / 2,
        case.b,
        case.cost,
        case.backend,
        case.words,
    )
    for same in (moved, exchanged, doubled)[seed % 3 :][:1]:
        second = solved(same)
        if second is not None:
            near(case, first, second)
    if case.cost != "geodesic":  # a power of 2 changes no digit, as long as nothing leaves the normal range
        power = POWER[case.cost]
        scaled = Case(
            case.x * 4,
            case.y * 4,
            case.epsilon * 4**power,
            case.a,
            case.b,
            case.cost,
            case.backend,
            case.words,
        )
        second = solved(scaled)
        if second is not None and not second.value.isinf().any():
            back = second.value / 4**power
            noise = max(rounding(case, cost) for cost in case.costs())
            slack = noise + float((first.value.abs() * 1e-3).max()) * (not bool(first.converged.all()))
            slack += float((first.marginal_error * (first.f.amax(-1) - first.f.amin(-1))).max()) * 2
            assert float((back - first.value).abs().max()) <= slack


def check_divergence(case: Case, debias, value: str, seed: int) -> None:
    if debias == "independent" and min(case.x.shape[-2], case.y.shape[-2]) < 2:
        with pytest.raises(ValueError, match="cannot be split"):
            sinkhorn_divergence(case.x, case.y, 1.0, cost=case.cost)
        return
    if debias == "independent" and any(w is not None and bool((w == 0).any()) for w in (case.a, case.b)):
        return  # a half may be left without mass
    with torch.no_grad():
        out = solved(
            case,
            sinkhorn_divergence,
            debias=debias,
            value=value,
            generator=torch.Generator().manual_seed(seed),
        )
    if out is None:
        return
    assert out.value.isfinite().all() and out.value.dtype == case.dtype
    assert torch.equal(out.value, out.cross - out.self_x / 2 - out.self_y / 2)
    if debias is None and value == "entropic":
        near_value = sinkhorn_value(case)
        if near_value is not None:
            torch.testing.assert_close(out.value, near_value)
    if debias == "self" and value == "entropic" and bool(out.converged.all()) and case.cost != "geodesic":
        # Of a negative definite cost it is never negative (Feydy et al. 2019).
        largest = max(float(c.max()) for c in case.costs())
        own = max(
            float((t.detach().double().amax(-2) - t.detach().double().amin(-2)).abs().sum())
            for t in (case.x, case.y)
        )
        size = max(largest, (2 * own) ** POWER[case.cost])
        noise = rounding(case, np.array(size)) + 4 * float(out.marginal_error.max()) * size
        assert float(out.value.min()) >= -4 * noise


def sinkhorn_value(case: Case):
    out = solved(case)
    return None if out is None else out.value


def check_slope(case: Case, seed: int) -> None:
    """The gradient in the points against a central difference in double precision."""
    rng = torch.Generator().manual_seed(seed)
    x = case.x.detach().clone().requires_grad_()
    options = {"cost": case.cost, "backend": case.backend, "tolerance": 1e-11, "max_iters": 5_000}
    move = torch.randn(x.shape, generator=rng, dtype=x.dtype)
    if case.cost == "geodesic":
        return

    def value(points):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return sinkhorn(points, case.y, case.epsilon, case.a, case.b, **options)

    out = value(x)
    step = 1e-5
    found = float((torch.autograd.grad(out.value.sum(), x)[0] * move).sum())
    there, back = (value(case.x + sign * step * move) for sign in (1, -1))
    if not all(bool(o.converged.all()) for o in (out, there, back)):
        return
    lengths = float(torch.cdist(case.x + 0 * move, case.y).amin()) if case.cost != "sqeuclidean" else 1.0
    gaps = float((case.x.unsqueeze(-2) - case.y.unsqueeze(-3)).abs().amin()) if case.cost == "l1" else lengths
    if gaps < 1e-3:  # a kink: the slope is one of many
        return
    expected = float((there.value - back.value).sum()) / (2 * step)
    scale = max(float(c.max()) for c in case.costs()) + 1
    assert abs(found - expected) <= 1e-5 * scale * (1 + float(move.abs().sum()))


FAULTS = [
    "nan x",
    "inf y",
    "dtype",
    "width",
    "weights sum",
    "weights sign",
    "weights length",
    "epsilon",
    "cost",
    "backend",
    "kind",
]


def check_fault(case: Case, fault: str, at: int) -> None:
    arguments = {
        "x": case.x,
        "y": case.y,
        "epsilon": 1.0,
        "a": None,
        "b": None,
        "cost": case.cost,
        "backend": case.backend,
    }
    n = case.x.shape[-2]
    expected, words = ValueError, ""
    if fault in ("nan x", "inf y"):
        name = fault[-1]
        points = arguments[name].clone(memory_format=torch.contiguous_format)
        points[..., at % points.shape[-2], 0] = torch.nan if name == "x" else torch.inf
        arguments[name], expected, words = points, NonFiniteError, f"{name}, shape .* is NaN or infinite in"
        if case.cost == "geodesic" and name == "y":
            expected, words = ValueError, "between unit vectors"
    elif fault == "dtype":
        other = torch.float32 if case.dtype == torch.float64 else torch.float64
        arguments["y"], words = case.y.to(other), "move both clouds to one dtype"
    elif fault == "width":
        arguments |= {"y": torch.cat([case.y, case.y], -1), "cost": "l1", "backend": "auto"}
        words = "the last dimension"
    elif fault.startswith("weights"):
        w = torch.full((n + (fault == "weights length"),), 1 / n, dtype=case.dtype)
        w[0] += 0.5 if fault == "weights sum" else 0
        w = torch.cat([-torch.ones_like(w), w, torch.ones_like(w)]) if fault == "weights sign" else w
        arguments["a"], words = w, "the weights a"
    elif fault == "epsilon":
        arguments["epsilon"], words = [-1.0, torch.nan, torch.inf, 1e-320][at % 4], "epsilon is"
    elif fault == "cost":
        arguments["cost"], words = "cosine", "unknown cost|has only 'sqeuclidean'"
    elif fault == "backend":
        arguments["backend"], words = "magic", "unknown backend"
    else:
        arguments["x"], words = case.x.round().clamp(-9, 9).long(), "expected floating points"
    with pytest.raises(expected, match=words):
        sinkhorn(**arguments)


mild = cases(extreme=False)
DEBIAS = st.sampled_from(["independent", "self", None])
VALUES = st.sampled_from(["entropic", "entropic", "sharp", "rounded"])
SEEDS = st.integers(0, 1000)
#: Each law with its arguments and its examples in the quick and in the slow suite.
LAWS = {
    "values and marginals": (check_transport, {"case": cases()}, 100, 6_000),
    "finite gradients": (check_gradients_are_finite, {"case": cases()}, 60, 1_500),
    "order, sides and scale": (check_relations, {"case": cases(), "seed": SEEDS}, 40, 1_000),
    "divergences": (
        check_divergence,
        {"case": cases(), "debias": DEBIAS, "value": VALUES, "seed": SEEDS},
        50,
        1_000,
    ),
    "slopes": (check_slope, {"case": mild, "seed": SEEDS}, 15, 300),
    "faults": (check_fault, {"case": mild, "fault": st.sampled_from(FAULTS), "at": SEEDS}, 40, 700),
}


def run(name: str, number: int) -> int:
    law, arguments, *_ = LAWS[name]
    return hold(law, arguments, number)


@pytest.mark.parametrize("name", LAWS)
def test_transport_obeys(name):
    run(name, LAWS[name][2])


@pytest.mark.slow
@pytest.mark.timeout(3_000)
def test_transport_obeys_ten_thousand_times():
    SEEN.clear()
    found = {name: run(name, LAWS[name][3]) for name in LAWS}
    print(f"examples: {found}, {sum(found.values())} in all; calls: {dict(SEEN)}")
    assert sum(found.values()) >= 10_000
