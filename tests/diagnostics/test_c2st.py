"""The classifier two-sample test: .5 for equal laws, more for unequal ones, and a null band that holds."""

import math

import pytest
import torch

from pyro_sinkhorn.diagnostics import c2st
from pyro_sinkhorn.errors import NonFiniteError, ProgramError


def test_equal_laws_are_not_told_apart():
    result = c2st(torch.randn(500, 2), torch.randn(500, 2))
    assert abs(result.value - 0.5) < 5 * result.null_sd
    assert result.null_sd == pytest.approx(0.5 / math.sqrt(1000))
    assert len(result.folds) == 5
    assert result.value == pytest.approx(sum(result.folds) / 5)
    assert str(result).startswith("C2ST 0.")


def test_a_difference_of_shape_is_seen():
    """The positive control: equal means and variances, another shape. The Bayes rate is about .66."""
    x = torch.randn(1000, 1)
    y = 2 * torch.randint(2, (1000, 1)) - 1 + 0.3 * torch.randn(1000, 1)
    assert c2st(x, y / y.std()).value > 0.58


def test_the_accuracy_is_that_of_the_best_rule():
    """Two normals a distance apart: the best rule is right with probability Phi(distance / 2)."""
    x, y = torch.randn(1000, 1), torch.randn(1000, 1) + 2
    best = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    result = c2st(x, y)
    assert abs(result.value - best) < 5 * result.null_sd


def test_sites_are_compared_jointly():
    z = torch.randn(600, 1)
    joined = {"a": z, "b": z + 0.1 * torch.randn(600, 1)}
    apart = {"b": torch.randn(600, 1), "a": torch.randn(600, 1)}
    assert c2st(joined, apart).value > 0.8


def test_the_longer_sample_is_cut():
    """Else guessing it at every point would be right in nine cases of ten."""
    result = c2st(torch.randn(100, 1), torch.randn(900, 1))
    assert result.null_sd == pytest.approx(0.5 / math.sqrt(200))
    assert abs(result.value - 0.5) < 5 * result.null_sd


def test_units_do_not_matter():
    x, y = torch.randn(200, 2), torch.randn(200, 2) + 1
    scale = torch.tensor([1e6, 1e-6])
    assert c2st(x * scale, y * scale).value == pytest.approx(c2st(x, y).value, abs=0.03)
    constant = torch.cat([x, torch.ones(200, 1)], -1)
    assert 0 <= c2st(constant, constant).value <= 1


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.zeros(9, 2), torch.zeros(9, 3), ProgramError, "x has 2 columns and y 3"),
        (torch.zeros(4, 2), torch.zeros(9, 2), ProgramError, "samples of 4 and 9 cannot be cut into 5 folds"),
        (torch.zeros(()), torch.zeros(9, 2), ProgramError, "x is no sample"),
        (torch.zeros(0, 2), torch.zeros(9, 2), ProgramError, "samples of 0 and 9 cannot be cut into 5 folds"),
        ({}, {}, ProgramError, "x is no sample"),
        ({"a": torch.zeros(3), "b": torch.zeros(4)}, {}, ProgramError, r"the sites of x have \[3, 4\] rows"),
        (torch.full((9, 1), torch.nan), torch.zeros(9, 1), NonFiniteError, "x, shape .* has NaN"),
    ],
)
def test_wrong_input(x, y, error, message):
    with pytest.raises(error, match=message):
        c2st(x, y)


def test_the_number_is_that_of_sbibm():
    """Its classifier, folds and z-scoring written out: metrics/c2st.py, with its seed."""
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    reference, other = 3 + 5 * torch.randn(150, 2), 4 + 5 * torch.randn(150, 2)
    mean, sd = reference.mean(0), reference.std(0)
    points = torch.cat([(reference - mean) / sd, (other - mean) / sd]).numpy()
    network = MLPClassifier(
        activation="relu", hidden_layer_sizes=(20, 20), max_iter=10000, solver="adam", random_state=1
    )
    folds = KFold(n_splits=5, shuffle=True, random_state=1)
    labels = torch.arange(300) >= 150
    expected = cross_val_score(network, points, labels.double().numpy(), cv=folds, scoring="accuracy").mean()
    assert c2st(reference, other, seed=1).value == pytest.approx(float(expected), abs=1e-12)
