"""What the study of digits on canvases stands on: boxes, places, the measure of dependence, the law of AIR's guide."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import avg_pool2d, normalize

from pyro_sinkhorn.distributions import HypersphericalUniform

FOLDER = Path(__file__).parents[1] / "benchmarks" / "papers"


@pytest.fixture
def part(monkeypatch):
    """Import a module of the folder, which is no package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: importlib.import_module(f"_canvas_{name}")


def test_a_patch_lies_in_its_box(part):
    data, measures = part("data"), part("measures")
    where = torch.tensor([[0.3, 0.5, -1.1], [-1.0, -1.5, 0.2]])
    placed = data.place(torch.ones(2, 28, 28), where)
    side, centre = data.box_of(where)
    assert torch.allclose(side, 28 * torch.exp(0.2 * where[:, 0]))
    low, high = data.ink_box(placed, 0.5)
    # Pixels are whole: an edge is up to half of one off.
    assert torch.allclose(low, centre - side.unsqueeze(-1) / 2, atol=0.51)
    assert torch.allclose(high, centre + side.unsqueeze(-1) / 2, atol=0.51)
    found = measures.localisation(where, placed, data.Canvases(placed, placed, where, torch.zeros(2)))
    assert found["iou"] == pytest.approx(1) and found["ink_iou"] == 1 and found["centre"] == 0


def test_cutting_undoes_placing(part):
    data = part("data")
    at = torch.linspace(-1, 1, 28)
    patch = torch.exp(-3 * (at - 0.2).square() - 5 * (at[:, None] + 0.1).square()).expand(2, 28, 28)
    where = torch.tensor([[1.0, 0.5, -0.7], [-0.5, -0.4, 0.2]])
    # Two linear interpolations, each off by about h^2/8 times the curvature 16 at the top, .023 together; a place that is off
    # by half a pixel changes the patch by .07.
    assert (data.cut(data.place(patch, where), where, 28) - patch).abs().max() < 0.04


def test_overlap_of_rectangles(part):
    corners = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 4.0]])
    others = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 3.0]])
    assert part("measures").overlap(*corners, *others).item() == pytest.approx(2 / (8 + 4 - 2))
    apart = torch.tensor([[5.0, 0.0]]), torch.tensor([[6.0, 9.0]])
    assert part("measures").overlap(*corners, *apart).item() == 0


def test_digits_lie_within_and_salt_has_its_rate(part):
    data = part("data")
    made = data.make(torch.ones(200, 8, 8), torch.zeros(200), seed=1)
    side, centre = data.box_of(made.where)
    assert ((centre - side.unsqueeze(-1) / 2) >= 0).all() and ((centre + side.unsqueeze(-1) / 2) <= 64).all()
    empty = made.clean == 0
    rate, n = made.noisy[empty].mean(), empty.sum()
    assert abs(rate - data.SALT) < 5 * math.sqrt(data.SALT / n)
    assert ((made.noisy == made.clean) | (made.noisy == 1)).all()


def test_distance_correlation_is_unbiased_and_sees_dependence(part):
    dependence = part("measures").dependence
    found = torch.tensor(
        [dependence(torch.randn(8, 3), torch.randn(8, 2), 1)["distance_correlation"] for _ in range(2000)]
    )
    assert abs(found.mean()) < 5 * found.std() / math.sqrt(len(found))
    x = torch.randn(100, 1)
    seen = dependence(x, x.square() + 0.1 * torch.randn(100, 1), 99)
    assert seen["p_independent"] == pytest.approx(1 / 100)
    assert dependence(x, x, 1)["distance_correlation"] == pytest.approx(1)


def test_power_spherical_density_and_draws_agree(part):
    n, d = 40_000, 10
    loc = normalize(torch.randn(d), dim=-1).expand(n, d)
    kappa = torch.full((n,), 4.0, requires_grad=True)
    law = part("program").PowerSpherical(loc, kappa)
    uniform = HypersphericalUniform(d)
    points = uniform.sample((n,))
    ratio = (law.log_prob(points) - uniform.log_prob(points)).exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(n)
    # The mean cosine by the density, and by the draws; and its slope in the concentration, in closed form.
    a, b = 4.5 + 4.0, 4.5
    cosine = (law.rsample() * loc).sum(-1)
    assert abs(cosine.mean() - (a - b) / (a + b)) < 5 * cosine.std() / math.sqrt(n)
    weighed = ratio * (points * loc[0]).sum(-1)
    assert abs(weighed.mean() - (a - b) / (a + b)) < 5 * weighed.std() / math.sqrt(n)
    (slope,) = torch.autograd.grad(cosine.sum(), kappa)
    assert abs(slope.mean() - 2 * b / (a + b) ** 2) < 5 * slope.std() / math.sqrt(n)


def test_energy_distance_is_zero_between_equal_laws(part):
    energy = part("measures").energy_distance
    images = [torch.rand(30, 16, 16) for _ in range(80)]
    found = torch.tensor([energy(x, y) for x, y in zip(images[::2], images[1::2], strict=True)])
    assert abs(found.mean()) < 5 * found.std() / math.sqrt(len(found))
    far = energy(images[0], images[1] + 1)
    gap = avg_pool2d(torch.ones(1, 1, 16, 16), 4).norm()
    assert far > gap


def test_digits_are_judged_where_mnist_has_them(part):
    standard = part("measures").standard
    digit = torch.zeros(1, 28, 28)
    digit[0, 4:24, 9:19] = 1  # 20 high, its middle in the middle
    assert torch.allclose(standard(digit, 28), digit, atol=1e-5)
    half = torch.zeros(1, 28, 28)
    half[0, 1:11, 20:25] = 1  # half as large, and elsewhere
    # Only the row of pixels next to the edge is blurred by the interpolation.
    assert (standard(half, 28) - digit).abs().mean() < 0.05
