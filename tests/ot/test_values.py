"""Entropic, sharp and rounded: how they lie to each other, their limits, and which gradients are refused."""

import ot as pot
import pytest
import torch

from pyro_sinkhorn.ot import sinkhorn, sinkhorn_divergence

D = torch.float64
COSTS = ["sqeuclidean", "euclidean"]
VALUES = ["entropic", "sharp", "rounded"]
MODES = ["independent", "self", None]


def clouds(*batch, n=10, m=13, d=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, d, dtype=D, generator=rng)
    return x, 0.7 * torch.randn(*batch, m, d, dtype=D, generator=rng) + 0.5


def weights(*shape, seed=1):
    w = torch.rand(*shape, dtype=D, generator=torch.Generator().manual_seed(seed)) + 0.2
    return w / w.sum(-1, keepdim=True)


def ground(cost, x, y):
    return torch.cdist(x, y).square() if cost == "sqeuclidean" else torch.cdist(x, y)


def values(x, y, epsilon, a=None, b=None, cost="sqeuclidean", **options):
    return [sinkhorn(x, y, epsilon, a, b, cost, value=v, **options).value for v in VALUES]


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 10.0])
def test_exact_sharp_and_entropic_are_ordered(backend, cost, epsilon):
    (x, y), a, b = clouds(), weights(10), weights(13, seed=2)
    entropic, sharp, rounded = values(
        x, y, epsilon, a, b, cost, tolerance=1e-9, max_iters=20_000, backend=backend
    )
    exact = pot.emd2(a, b, ground(cost, x, y))
    assert exact - 1e-8 < sharp < entropic  # KL > 0
    assert exact < rounded
    torch.testing.assert_close(rounded, sharp, atol=1e-7, rtol=0)


def test_sharp_is_the_cost_of_the_plan_and_entropic_adds_the_divergence(backend):
    (x, y), a, b = clouds(), weights(10), weights(13, seed=2)
    out = sinkhorn(x, y, 0.3, a, b, value="sharp", tolerance=1e-10, backend=backend)
    plan, matrix = out.plan(), ground("sqeuclidean", x, y)
    torch.testing.assert_close(out.value, (plan * matrix).sum())
    divergence = torch.xlogy(plan, plan / (a.unsqueeze(-1) * b)).sum()
    entropic = sinkhorn(x, y, 0.3, a, b, tolerance=1e-10, backend=backend).value
    torch.testing.assert_close(entropic, out.value + 0.3 * divergence, atol=1e-8, rtol=0)


@pytest.mark.parametrize("value", ["sharp", "rounded"])
def test_epsilon_to_zero_is_exact(backend, value):
    # <P, C> - OT <= epsilon (KL of the exact plan - KL of P) <= epsilon * entropy of a marginal.
    (x, y), a, b = clouds(n=8, m=10), weights(8), weights(10, seed=2)
    exact = pot.emd2(a, b, ground("sqeuclidean", x, y))
    gaps = []
    for epsilon in (1.0, 0.3, 0.1, 0.03, 0.01):
        out = sinkhorn(x, y, epsilon, a, b, value=value, tolerance=1e-6, max_iters=50_000, backend=backend)
        gaps.append((out.value - exact).item())
        assert -1e-4 < gaps[-1] < epsilon * 2.4
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-3


@pytest.mark.parametrize("debias", MODES)
@pytest.mark.parametrize("value", VALUES)
def test_the_convention_of_genevay_is_exactly_twice_that_of_feydy(backend, value, debias):
    x, y = clouds(2)
    options = {"debias": debias, "value": value, "backend": backend}
    feydy, genevay = (
        sinkhorn_divergence(x, y, 5.0, convention=c, generator=torch.Generator().manual_seed(0), **options)
        for c in ("feydy", "genevay")
    )
    assert torch.equal(genevay.value, 2 * feydy.value)
    for part in ("cross", "self_x", "self_y"):  # costs of transport in either
        assert torch.equal(getattr(genevay, part), getattr(feydy, part))
    total = 2 * genevay.cross - genevay.self_x - genevay.self_y
    torch.testing.assert_close(genevay.value, total)


@pytest.mark.parametrize("value", VALUES)
def test_epsilon_to_infinity_is_the_energy_distance(backend, value):
    # 2 E|x-y| - E|x-x'| - E|y-y'|, the squared MMD of the kernel -|x-y|; V-statistics: the diagonal counts.
    (x, y), a, b = clouds(), weights(10), weights(13, seed=2)
    out = sinkhorn_divergence(
        x, y, 1e7, a, b, "euclidean", "self", value=value, convention="genevay", backend=backend
    )
    signed = torch.cat([a, -b])
    points = torch.cat([x, y])
    mmd = signed @ -torch.cdist(points, points) @ signed
    torch.testing.assert_close(out.value, mmd, atol=1e-5, rtol=0)


def test_the_sharp_divergence_of_a_cloud_with_itself_is_zero(backend):
    x = clouds()[0]
    out = sinkhorn_divergence(
        x, x.flip(0), 2.0, debias="self", value="sharp", tolerance=1e-10, backend=backend
    )
    assert out.value.abs() < 1e-8


@pytest.mark.parametrize("value", VALUES)
def test_unrolled_and_envelope_agree_on_the_value(value):
    x, y = clouds(2)
    one, two = (
        sinkhorn(x, y, 0.5, value=value, gradient=g, tolerance=1e-10).value for g in ("envelope", "unrolled")
    )
    torch.testing.assert_close(one, two, atol=1e-8, rtol=0)


# The envelope theorem is about the entropic value


@pytest.mark.parametrize("value", ["sharp", "rounded"])
@pytest.mark.parametrize("which", ["x", "y", "a", "b", "cost"])
def test_a_wrong_gradient_is_refused_with_the_right_ones(value, which):
    x, y = clouds()
    scale = torch.ones((), dtype=D)
    inputs = {"x": x, "y": y, "a": weights(10), "b": weights(13, seed=2)}
    {**inputs, "cost": scale}[which].requires_grad_()

    def cost(x, y):
        return scale * torch.cdist(x, y)

    message = (
        f"value='{value}' with gradient='envelope' .* envelope theorem .* value='entropic' with "
        f"gradient='envelope', or value='{value}' with gradient='unrolled'"
    )
    with pytest.raises(ValueError, match=message):
        sinkhorn(**inputs, epsilon=0.5, cost=cost, value=value)
    with pytest.raises(ValueError, match=message):
        sinkhorn_divergence(**inputs, epsilon=0.5, cost=cost, value=value, debias="self")
    with torch.no_grad():
        out = sinkhorn(**inputs, epsilon=0.5, cost=cost, value=value)
    assert not out.value.requires_grad
    unrolled = sinkhorn(**inputs, epsilon=0.5, cost=cost, value=value, gradient="unrolled")
    torch.testing.assert_close(out.value, unrolled.value.detach(), atol=1e-5, rtol=0)
    assert unrolled.value.requires_grad


@pytest.mark.parametrize("value", ["sharp", "rounded"])
def test_without_a_gradient_the_value_is_computed_as_asked(backend, value):
    x, y = clouds()
    out = sinkhorn(x, y, 0.5, value=value, backend=backend)
    assert out.value.isfinite()
    assert not out.value.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": "blunt"}, r"value is 'blunt': expected one of \['entropic', 'sharp', 'rounded'\]"),
        ({"gradient": "implicit"}, r"gradient is 'implicit': expected one of \['envelope', 'unrolled'\]"),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(options, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(*clouds(), 0.5, **options)
