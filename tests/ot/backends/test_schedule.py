"""The epsilon schedule: a geometric descent that saves iterations and changes no answer."""

import itertools
import math

import pytest
import torch

from pyro_sinkhorn.ot import sinkhorn
from pyro_sinkhorn.ot.backends import log_domain
from pyro_sinkhorn.ot.backends.schedule import epsilon_schedule

D = torch.float64


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("span", [1.5, 8.0, 1e4])
def test_the_descent_is_geometric_from_the_diameter_to_just_above_epsilon(ratio, span):
    epsilon = torch.tensor([0.3], dtype=D)
    stages = epsilon_schedule(span * epsilon, epsilon, ratio)
    torch.testing.assert_close(stages[0], span * epsilon)
    for earlier, later in itertools.pairwise(stages):
        torch.testing.assert_close(later, ratio * earlier)
    # The target itself is left to the solver: it is neither among the stages nor further than one step away.
    assert (epsilon < stages[-1]).all()
    assert (stages[-1] * ratio <= epsilon * (1 + 1e-9)).all()


def test_every_problem_of_a_batch_stops_at_its_own_epsilon():
    diameter, epsilon = torch.tensor([8.0, 8.0, 1.0], dtype=D), torch.tensor([1.0, 4.0, 2.0], dtype=D)
    stages = torch.stack(epsilon_schedule(diameter, epsilon))
    assert stages.tolist() == [[8.0, 8.0, 2.0], [4.0, 4.0, 2.0], [2.0, 4.0, 2.0]]


@pytest.mark.parametrize("diameter", [0.0, 0.5, 1.0, math.nan, math.inf])
def test_there_is_nothing_to_descend_from_a_small_or_senseless_diameter(diameter):
    assert epsilon_schedule(torch.tensor([diameter]), torch.tensor([1.0])) == []


@pytest.mark.parametrize("ratio", [-1.0, 0.0, 1.0, 2.0, math.nan])
def test_a_ratio_that_does_not_descend_is_refused(ratio):
    with pytest.raises(ValueError, match=f"is {ratio}: expected a number between 0 and 1"):
        epsilon_schedule(torch.tensor([8.0]), torch.tensor([1.0]), ratio)


def test_the_schedule_saves_iterations_and_changes_no_answer(monkeypatch):
    # It saves where epsilon is small beside the cost; the last digits are then Sinkhorn's own slow business.
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 2, dtype=D, generator=rng), torch.randn(20, 2, dtype=D, generator=rng) + 1

    def solve_twice():
        return tuple(
            sinkhorn(x, y, epsilon, tolerance=tolerance, backend="log")
            for epsilon, tolerance in ((0.1, 1e-2), (0.5, 1e-8))
        )

    quick, exact = solve_twice()
    monkeypatch.setattr(log_domain, "epsilon_schedule", lambda *args: [])
    slow, same = solve_twice()
    assert quick.n_iters < 0.8 * slow.n_iters
    torch.testing.assert_close(exact.value, same.value, atol=1e-8, rtol=0)
    torch.testing.assert_close(exact.plan(), same.plan(), atol=1e-8, rtol=0)
