"""What "auto" stands for, and what it does about kernels that no test of ours has seen compiled."""

import dataclasses

import pytest
import torch

from pyro_sinkhorn.ot import backends, sinkhorn
from pyro_sinkhorn.ot.backends import BACKENDS, choose, kernels_agree, solve_dense
from pyro_sinkhorn.ot.checks import make_problem
from pyro_sinkhorn.ot.cost import sqeuclidean


def problem(n=5, cost="sqeuclidean", dtype=torch.float64):
    x = torch.randn(n, 2).to(dtype)
    return make_problem(x, x.clone(), 1.0, None, None, cost, 1e-2, 100)[0]


def test_matrices_are_held_while_they_fit(monkeypatch):
    assert choose(problem()) == "dense"
    monkeypatch.setattr(backends, "DENSE_BYTES", 5 * 5 * 8 - 1)
    assert choose(problem()) == "streaming"
    assert choose(problem(4)) == "dense"
    assert choose(problem(cost="euclidean")) == "dense"  # only squared distances have tiles
    assert choose(problem(cost=sqeuclidean)) == "dense"


def test_the_chosen_backend_solves(monkeypatch):
    seen = []
    monkeypatch.setattr(backends, "DENSE_BYTES", 0)
    monkeypatch.setitem(BACKENDS, "streaming", lambda problem: seen.append(problem) or solve_dense(problem))
    x = torch.randn(5, 2)
    sinkhorn(x, x + 1, 1.0)
    assert len(seen) == 1


@pytest.fixture
def device(monkeypatch):
    """Of kernels that stand for the compiled ones; the verdict is not remembered."""
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    kernels_agree.cache_clear()
    yield torch.device("cpu")
    kernels_agree.cache_clear()


def test_kernels_that_agree_are_used(device, monkeypatch):
    monkeypatch.setattr(backends, "solve_triton", solve_dense)
    assert kernels_agree(device)


def wrong(problem):
    return solve_dense(dataclasses.replace(problem, epsilon=2 * problem.epsilon))


def unfinished(problem):
    solution = solve_dense(problem)
    return dataclasses.replace(solution, converged=torch.zeros_like(solution.converged))


def broken(problem):
    raise TypeError("no such instruction")


@pytest.mark.parametrize(
    ("solver", "reason"),
    [(wrong, "they differ"), (unfinished, "they differ"), (broken, "TypeError: no such instruction")],
)
def test_kernels_that_fail_or_differ_are_not_used_and_that_is_said_once(device, monkeypatch, solver, reason):
    monkeypatch.setattr(backends, "solve_triton", solver)
    with pytest.warns(RuntimeWarning, match=f"clouds of 64 points are not used on cpu: {reason}"):
        assert not kernels_agree(device)
    assert not kernels_agree(device)  # no second warning


def test_without_triton_there_is_nothing_to_look_at(monkeypatch):
    kernels_agree.cache_clear()
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert not kernels_agree(torch.device("cpu"))
    kernels_agree.cache_clear()
