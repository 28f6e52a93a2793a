"""Ground costs: the formulas, their gradients, and float32 far from the origin."""

import pytest
import torch

from pyro_sinkhorn.ot.cost import cost_matrix, euclidean, geodesic, sqeuclidean

D = torch.float64


def clouds(*batch, n=5, m=7, d=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*batch, n, d, dtype=D, generator=rng),
        torch.randn(*batch, m, d, dtype=D, generator=rng) + 0.5,
    )


@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3)])
def test_the_entries_are_those_of_the_formula(batch):
    x, y = clouds(*batch)
    squares, distances = sqeuclidean(x, y), euclidean(x, y)
    assert squares.shape == distances.shape == (*batch, 5, 7)
    for i in range(5):
        for j in range(7):
            expected = (x[..., i, :] - y[..., j, :]).square().sum(-1)
            torch.testing.assert_close(squares[..., i, j], expected, atol=1e-13, rtol=0)
            torch.testing.assert_close(distances[..., i, j], expected.sqrt(), atol=1e-13, rtol=0)


@pytest.mark.parametrize("cost", [sqeuclidean, euclidean])
def test_leading_dimensions_broadcast(cost):
    x, y = clouds(3)
    torch.testing.assert_close(cost(x, y[1]), torch.stack([cost(xi, y[1]) for xi in x]))


@pytest.mark.parametrize("cost", [sqeuclidean, euclidean])
def test_a_cost_is_symmetric_and_zero_on_the_diagonal(cost):
    x, y = clouds()
    torch.testing.assert_close(cost(x, y), cost(y, x).mT)
    assert cost(x, x).diagonal().abs().max() < 1e-14
    assert (cost(x, x) >= 0).all()


def test_the_euclidean_cost_is_a_metric():
    x, y = clouds()
    through = (euclidean(x, y).unsqueeze(1) + euclidean(x, y).unsqueeze(0)).amin(-1)  # x to some y to x
    assert (euclidean(x, x) <= through + 1e-12).all()


@pytest.mark.parametrize("cost", [sqeuclidean, euclidean])
def test_the_gradient_is_that_of_the_formula(cost):
    x, y = (t.requires_grad_() for t in clouds(2))
    assert torch.autograd.gradcheck(cost, (x, y))


@pytest.mark.parametrize("cost", [sqeuclidean, euclidean])
def test_the_gradient_is_zero_where_two_points_coincide(cost):
    # The root has an infinite slope at 0; 0 times infinity would be NaN.
    x = clouds()[0].requires_grad_()
    (grad,) = torch.autograd.grad(cost(x, x.detach().clone()).diagonal().sum(), x)
    torch.testing.assert_close(grad, torch.zeros_like(x), atol=1e-13, rtol=0)


@pytest.mark.parametrize("cost", [sqeuclidean, euclidean])
def test_float32_survives_a_shift_far_from_the_origin(cost):
    # |x|^2 + |y|^2 - 2xy is about 1e4 each here: without centring its float32 error would be near 1e-2.
    x, y = (t.float() + 100 for t in clouds(n=60, m=60))
    error = (cost(x, y) - cost(x.double(), y.double())).abs().max()
    assert error < 2e-5


def test_a_callable_is_called_once_a_problem_with_two_clouds():
    x, y = clouds(4)
    seen = []

    def manhattan(xi, yi):
        seen.append((xi.shape, yi.shape))
        return (xi.unsqueeze(1) - yi).abs().sum(-1)

    matrix = cost_matrix(manhattan, x, y)
    assert seen == [((5, 3), (7, 3))] * 4
    torch.testing.assert_close(matrix, torch.cdist(x, y, p=1))


def test_a_callable_may_be_learned_and_the_spaces_may_differ():
    x, y = clouds(2)[0], clouds(2, d=2)[1]
    metric = torch.randn(3, 2, dtype=D, requires_grad=True)
    matrix = cost_matrix(
        lambda xi, yi: (xi @ metric - yi.sum(-1).mean()).sum(-1, keepdim=True) + 0 * yi[:, 0], x, y
    )
    assert matrix.shape == (2, 5, 7)
    (grad,) = torch.autograd.grad(matrix.sum(), metric)
    assert grad.abs().min() > 0


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown cost 'manhattan'.*euclidean.*sqeuclidean.*callable"):
        cost_matrix("manhattan", *clouds(1))


@pytest.mark.parametrize(
    ("wrong", "given"),
    [
        (lambda x, y: torch.cdist(y, x), r"\(7, 5\)"),
        (lambda x, y: torch.cdist(x, y).sum(), r"\(\)"),
        (lambda x, y: 1.0, "float"),
    ],
)
def test_a_callable_that_returns_another_shape_is_told_both(wrong, given):
    with pytest.raises(ValueError, match=rf"\(5, 3\) and \(7, 3\) and returned {given}: expected .*\(5, 7\)"):
        cost_matrix(wrong, *clouds(1))


def test_the_error_names_the_callable():
    def diagonal(x, y):
        return x[:, :1]

    with pytest.raises(ValueError, match="the cost 'diagonal'"):
        cost_matrix(diagonal, *clouds(1))


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e25, 1e30])
def test_distances_stay_in_the_range_of_float32_where_their_squares_do_not(scale):
    x, y = torch.randn(5, 3), torch.randn(4, 3)
    single = euclidean((scale * x).float(), (scale * y).float())
    torch.testing.assert_close(single.double() / scale, euclidean(x, y), rtol=1e-5, atol=0)


def test_arcs_near_antipodes_keep_their_digits():
    angle = torch.tensor([0.0, 1e-4, 1e-2, 1.0, 3.0, 3.14, 3.14159, torch.pi], dtype=torch.float32)
    x = torch.stack([angle.cos(), angle.sin()], -1)
    found = geodesic(x, torch.tensor([[1.0, 0.0]], dtype=torch.float32)).sqrt().squeeze(-1)
    torch.testing.assert_close(found, angle, rtol=1e-6, atol=1e-7)
